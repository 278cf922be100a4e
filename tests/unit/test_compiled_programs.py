"""What is read of compiled programs: instructions, source lines, collectives, products, bytes, buffers at the peak."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gptoss_jax.hlo import live, module, operations, sent
from gptoss_jax.hlo.module import Array, ModuleError, scope
from gptoss_jax.planner import timeline
from gptoss_jax.planner.chips import CHIPS
from gptoss_jax.runtime.program_memory import counted_twice, program_memory

MESH = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
M, K, N = 16, 24, 40


def _layer(x: jax.Array, w: jax.Array, table: jax.Array, ids: jax.Array) -> jax.Array:
    """A gather of rows, and a product whose sum runs over devices, in scopes as the model has them."""
    rows = table[ids]
    with jax.named_scope("layer_3"), jax.named_scope("experts"):

        def product(x: jax.Array, w: jax.Array) -> jax.Array:
            return jax.lax.psum(x @ w, "tensor")

        specs = (PartitionSpec("data", "tensor"), PartitionSpec("tensor", None))
        to = PartitionSpec("data", None)
        y = jax.shard_map(product, mesh=MESH, in_specs=specs, out_specs=to, check_vma=False)(x, w)
    return y + rows


@functools.cache
def _compiled() -> tuple[str, Any, list[live.Buffer]]:
    def shape(*sizes: int, spec: tuple[Any, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(MESH, PartitionSpec(*spec)))

    arguments = (
        shape(M, K, spec=("data", "tensor")),
        shape(K, N, spec=("tensor", None)),
        shape(5000, N, spec=()),
        shape(M, spec=("data",), dtype=jnp.int32),
    )
    with tempfile.TemporaryDirectory() as folder:
        options: Any = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled: Any = jax.jit(_layer).lower(*arguments).compile(compiler_options=options)
        read = module.parse(compiled.as_text())
        return compiled.as_text(), compiled, live.at_peak(Path(folder), read)


def _text(function: Callable[..., Any], *arguments: jax.ShapeDtypeStruct) -> str:
    compiled: Any = jax.jit(function).lower(*arguments).compile()
    return compiled.as_text()


def test_a_sum_is_found_with_its_place_and_its_line():
    """Guards where a collective comes from: bytes of a device, devices, layer, scope, and the line that wrote it."""
    (found,) = sent.of_module(module.parse(_compiled()[0]))
    assert (found.kind, found.devices, found.bytes) == ("all-reduce", 4, 4 * (M // 2) * N)
    assert found.scope == module.Scope(3, "experts", "psum")
    line = next(i + 1 for i, text in enumerate(Path(__file__).read_text().splitlines()) if "lax.psum(" in text)
    assert found.source.endswith(f"unit/test_compiled_programs.py:{line}")
    assert [frame.function for frame in found.stack][:2] == ["_layer.<locals>.product", "_layer"]
    assert found.sent_bytes == 2 * 3 / 4 * found.bytes


def test_products_are_counted_and_gathers_read_rows():
    """Guards operations and bytes: of a device's part, and of a table only the rows that are taken."""
    text, compiled, _ = _compiled()
    found = operations.of_step(module.parse(text))
    assert sum(each.times * each.flops for each in found) == 2 * (M // 2) * (K // 4) * N
    table = 4 * 5000 * N
    assert sum(each.bytes for each in found) < table / 4, [(each.name, each.bytes) for each in found]
    assert compiled.memory_analysis().argument_size_in_bytes > table
    assert [each.kind for each in found].count("collective") == 1


def test_buffers_at_the_peak_are_the_compilers():
    """Guards the list of buffers: all arguments to the byte, and temporaries within what the compiler allots."""
    text, compiled, temporaries = _compiled()
    memory = compiled.memory_analysis()
    arguments = live.arguments(module.parse(text))
    assert sum(each.bytes for each in arguments) == memory.argument_size_in_bytes
    assert program_memory(compiled)[::2] == (memory.argument_size_in_bytes, memory.temp_size_in_bytes), (
        "of CPUs as JAX has it"
    )
    assert arguments[0].what == "table" and arguments[0].type == f"f32[5000,{N}]"
    assert 0 < sum(each.bytes for each in temporaries) <= memory.temp_size_in_bytes
    assert not any(each.is_argument for each in temporaries)


def test_what_is_counted_twice_is_read_of_the_log():
    """Guards temporaries on TPUs: of the last program's HBM alone, in the unit that the compiler chose."""
    log = """XLA::TPU program HBM usage: 1.24G / 31.25G
Program sflag requirement 292B:
    HLO temp            92B (100.0% utilization: Unpadded (92B) Padded (92B), 7.0% fragmentation (7B))
Program hbm requirement 1.24G:
    reserved         784.0K
    HLO temp          1.06G (83.2% utilization: Unpadded (261.19M) Padded (313.81M), 71.1% fragmentation (771.73M))
Program vmem requirement 126.88M:
    HLO temp        126.88M (0.0% utilization: Unpadded (0B) Padded (0B), 100.0% fragmentation (126.88M))
"""
    assert counted_twice(log) == round(771.73 * 2**20)
    assert counted_twice(log + log.replace("771.73M", "18.5K")) == 18_944
    assert counted_twice("of a GPU, whose compiler says nothing of the kind") == 0
    compiled = _compiled()[1]
    assert program_memory(compiled)[2] - program_memory(compiled, log)[2] == round(771.73 * 2**20)


def _loop(x: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, 5, lambda i, y: jnp.tanh(y @ y), x)


def test_loops_count_as_often_as_they_run():
    """Guards products in loops: a step's work is that of all iterations, not of one."""
    text = _text(_loop, jax.ShapeDtypeStruct((32, 32), jnp.float32))
    found = operations.of_step(module.parse(text))
    assert sum(each.times * each.flops for each in found) == 5 * 2 * 32**3


def test_of_a_conditional_the_cheaper_branch_counts():
    """Guards greedy decoding's work: what only some slot asks for is not done in every step."""

    def branch(x: jax.Array, asked: jax.Array) -> jax.Array:
        return jax.lax.cond(asked, lambda y: y @ y @ y, lambda y: y + 1, x)

    arguments = jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((), jnp.bool_)
    text = _text(branch, *arguments)
    assert "conditional(" in text
    assert sum(each.flops for each in operations.of_step(module.parse(text))) == 0


TPU = """HloModule jit_f, is_scheduled=true

ENTRY %main (p: bf16[8,16]) -> (f32[8,32], f32[8]) {
  %p = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} parameter(0), metadata={op_name="params[\\'norm\\'][0]"}
  %w = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(1)
  %c = f32[8,32]{1,0:T(8,128)} convolution(%p, %w), dim_labels=bf_io->bf, metadata={op_name="jit(f)/unembedding/dot"}
  %g = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}
  %d = bf16[32,16]{1,0} all-gather-done(%g)
  ROOT %t = (f32[8,32]{1,0:T(8,128)}, /*index=1*/f32[8]{0}) tuple(%c, %c)
}
"""


def test_what_other_compilers_write_is_read():
    """Guards layouts with tiles, products written as convolutions, and collectives in two halves, as TPUs have them."""
    read = module.parse(TPU)
    found = operations.of_step(read)
    assert [each.kind for each in found] == ["product", "collective"]
    assert found[0].flops == 2 * 8 * 16 * 32 and found[0].scope.part == "unembedding"
    (gathered,) = sent.of_module(read)
    assert (gathered.bytes, gathered.devices, gathered.source) == (2 * 32 * 16, 4, "-")
    assert [each.what for each in live.arguments(read)] == ["argument 1", "params/norm/0"]
    assert read.computations["main"].root.arrays == [Array("f32", (8, 32)), Array("f32", (8,))]


GPU = """HloModule jit_decode, is_scheduled=true

ENTRY %main (p: f32[16,4], n: s32[8]) -> f32[16,4] {
  %p = f32[16,4]{1,0} parameter(0)
  %n = s32[8]{0} parameter(1)
  %a = s32[8]{0} all-to-all(%n), replica_groups={{0,1,2,3,4,5,6,7}}, \
metadata={op_name="jit(decode)/layer_4/experts/all_to_all"}
  %w = s64[8]{0} fusion(%a), kind=kLoop, calls=%convert
  %s = ((f32[16,4]{1,0}, f32[16,4]{1,0}, s64[8]{0}, s64[8]{0}, s64[8]{0}, /*index=5*/s64[8]{0}), f32[16,4]{1,0}) \
ragged-all-to-all-start(%p, %p, %w, %w, %w, /*index=5*/%w), replica_groups={{0,1,2,3,4,5,6,7}}
  ROOT %d = f32[16,4]{1,0} ragged-all-to-all-done(%s), metadata={op_name="jit(decode)/reduce_sum"}
}
"""


def test_a_ragged_exchange_stands_where_its_counts_do():
    """Guards ragged all-to-alls, of which XLA for GPUs forgets the names: the experts' of a layer, not sampling's."""
    read = module.parse(GPU)
    sizes = [(each.kind, each.bytes, each.scope.layer, each.scope.part) for each in sent.of_module(read)]
    assert sizes == [("all-to-all", 32, 4, "experts"), ("ragged-all-to-all", 256, 4, "experts")]
    assert [each.scope.part for each in operations.of_step(read) if each.kind == "collective"] == ["experts"] * 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("jit(decode)/while/body/layer_12/attention/shard_map/psum", (12, "attention", "psum")),
        ("jit(prefill)/layer_0/experts/shard_map/ffi_call", (0, "experts", "ffi_call")),
        ("jit(decode)/while/body/gather", (None, "embedding", "gather")),
        ("jit(decode)/while/body/unembedding/dot_general", (None, "unembedding", "dot_general")),
        ("jit(decode)/while/body/cond/branch_1_fun/top_k", (None, "sampling", "top_k")),
        ("", (None, "sampling", "")),
    ],
)
def test_scopes_are_the_models(name, expected):
    """Guards the table of work by scope: JAX's names with what loops, branches and meshes put around them."""
    assert scope(name) == expected


@pytest.mark.parametrize("text", ["", "HloModule nothing", TPU.replace("%w =", "%p =")])
def test_what_is_no_program_is_refused(text):
    """Guards against a text that is read as a program of nothing, or of half its instructions."""
    with pytest.raises(ModuleError):
        module.parse(text)


def test_a_timeline_is_the_roofline_of_each_operation():
    """Guards predicted times: the larger of products and bytes, a collective's bytes in a ring over all links."""
    chip = CHIPS["h200"]
    assert chip.flops and chip.hbm_bytes and chip.link_bytes
    product, gathered = timeline.rows(operations.of_step(module.parse(TPU)), chip)
    moved = 2 * 8 * 16 + 2 * 16 * 32 + 4 * 8 * 32
    assert product.bytes == moved and product.bound == "memory"
    assert product.seconds == pytest.approx(moved / chip.hbm_bytes)
    assert gathered.seconds == pytest.approx(3 / 4 * 2 * 32 * 16 / chip.link_bytes) and gathered.bound == "interconnect"
    assert all(row.seconds is None for row in timeline.rows(operations.of_step(module.parse(TPU)), CHIPS["cpu"]))


def test_layers_that_do_the_same_stand_once():
    """Guards the timeline of a deep model: alike layers share a block, others and what is beside them do not."""
    row = timeline.Row(None, "embedding", "fusion gather", 1, 0.0, 1e6, 0.0, 1e-6, "memory")
    layers = [row._replace(layer=i, part="experts", what="kernel", bytes=1e6 * (1 + i % 2)) for i in range(6)]
    layers = [each._replace(flops=each.bytes) for each in layers]
    found = timeline.blocks([row, *layers, row])
    assert [block.layers for block in found] == [[], [0, 2, 4], [1, 3, 5], []]
    assert timeline.total_seconds([row, *layers]) == pytest.approx(7e-6)
