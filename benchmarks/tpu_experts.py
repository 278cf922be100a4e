"""What TPU compilers make of the expert kernel, with no TPU.

    python -m benchmarks.tpu_experts --only v6e

Needs libtpu, the compiler, which `make gates` installs. For each generation and form, at the real shapes: whether it
compiles, the weights in HBM beside the published bytes, temporaries, and the static cost, as the instruction bundles
that 2^19 weights take (one block of 1,024 x 512). A bundle is a clock; waiting for memory is not in it, and what the
memory takes for as many weights stands beside it.
"""

import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental.layout import Format, Layout

from benchmarks import ahead_of_time
from gptoss_jax.cli import command
from gptoss_jax.errors import GptossError
from gptoss_jax.runtime.program_memory import program_memory
from pallas_kernels.expert_mlp import packed, tpu, tpu_forms
from pallas_kernels.expert_mlp.tiles import tile_rows
from pallas_kernels.expert_mlp.weights import ExpertWeights

BLOCK_WEIGHTS = 1 << 19
HIDDEN = EXPERT_HIDDEN = 2880


class Generation(NamedTuple):
    """A TPU's core, from cloud.google.com/tpu/docs/system-architecture-tpu-vm; clocks are what peak rates suggest."""

    form: str
    bytes_per_clock: float  # of HBM, for each core of a chip


GENERATIONS = {
    "v5e": Generation("words, by integers", 819 / 1.5),
    "v5p": Generation("words, by integers", 2765 / 1.75 / 2),
    "v6e": Generation("words, by selection", 1640 / 1.75),
    "tpu7x": Generation("float4", 7370 / 2.2 / 2),
}


def define_flags() -> None:
    """This command's flags."""
    flags.DEFINE_list("only", list(GENERATIONS), "NAMES: Generations.")
    flags.DEFINE_list("tokens", ["1", "8", "64", "512", "4096"], "N,N,...: Tokens of a call.")
    flags.DEFINE_list("experts", ["32", "128"], "N,N,...: Experts of the layer.")
    flags.DEFINE_enum("form", None, list(tpu_forms.FORMS), "In place of the one that the generation takes.")
    flags.DEFINE_integer("expert_hidden", EXPERT_HIDDEN, "Width inside one expert.", lower_bound=32)
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Number format of the activations.")


def main(arguments: list[str]) -> None:
    """Compiles each case in a process of its own, since libtpu reads its options once."""
    del arguments
    options = flags.FLAGS
    if unknown := [name for name in options.only if name not in GENERATIONS]:
        raise GptossError(f"unknown generation {', '.join(unknown)}, expected some of {', '.join(GENERATIONS)}")
    if absent := ahead_of_time.missing("tpu"):
        raise GptossError(absent)
    print(f"{'TPU':6} {'form':20} E    T     tile  bundles  memory's  spills  weights MiB (published)  temporaries MiB")
    for name, experts, tokens in itertools.product(options.only, options.experts, options.tokens):
        form = options.form or GENERATIONS[name].form
        print(measured(name, form, experts, tokens, str(options.expert_hidden), options.dtype), flush=True)


def measured(*case: str) -> str:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final.*"
        environment = {**os.environ, **ahead_of_time.ENVIRONMENT, "LIBTPU_INIT_ARGS": dump}
        code = f"from benchmarks.tpu_experts import compiled; compiled(*{case})"
        call = [sys.executable, "-W", "ignore", "-c", code]
        run = subprocess.run(call, env=environment, capture_output=True, text=True)
        if run.returncode:
            reason = [line for line in run.stderr.splitlines() if "Error" in line]
            return f"{case[0]:6} {case[1]:20} fails: {(reason or run.stderr.splitlines())[-1][:300]}"
        found = json.loads(run.stdout.splitlines()[-1])
        used = bundles(Path(folder))
    per_block = used["bundles"] * BLOCK_WEIGHTS / found["step_weights"]
    memory = BLOCK_WEIGHTS * found["packed"] / found["weights"] / GENERATIONS[case[0]].bytes_per_clock
    mib = {key: f"{found[key] / 2**20:.1f}" for key in ("packed", "published", "temporaries")}
    return (
        f"{case[0]:6} {case[1]:20} {case[2]:4} {case[3]:5} {found['rows']:4}  {per_block:7.0f}  {memory:8.0f}"
        f"  {used.get('VSTORE:SPILL', 0):6}  {mib['packed']:>11} ({mib['published']})  {mib['temporaries']:>20}"
    )


def bundles(folder: Path) -> dict[str, int]:
    """The kernel's instructions, by the slot they take, and its bundles; from libtpu's dump of its final code."""
    kernel = [
        p for p in folder.glob("*expert_mlp*final_hlo-static-per-bundle-utilization.txt") if "late-" not in p.name
    ]
    most: dict[str, int] = {"bundles": 0}
    for path in kernel:
        lines = path.read_text().splitlines()
        slots = [name.strip() for name in lines[1].split(",")]
        rows = [list(map(int, line.split())) for line in lines[4:] if line.strip() and line.split()[0].isdigit()]
        if len(rows) > most["bundles"]:
            most = {"bundles": len(rows), **dict(zip(slots, map(sum, zip(*rows, strict=True)), strict=False))}
    return most


def compiled(name: str, form_name: str, experts: str, tokens: str, inner: str, dtype: str) -> None:
    """Compiles one case and prints its sizes as JSON; for a process that begins with `ahead_of_time.ENVIRONMENT`."""
    num_experts, num_tokens, per_token, width = int(experts), int(tokens), 4, int(inner)
    mesh = jax.sharding.Mesh(np.array(ahead_of_time.devices(ahead_of_time.TARGETS[name])[:1]), ("all",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def like(shape: tuple[int, ...], dtype: Any) -> Any:  # in the place of an array
        row_major = Format(Layout(major_to_minor=tuple(range(len(shape)))), whole)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=row_major)

    def blocks(rows: int, inputs: int) -> tuple[int, int, int]:
        return num_experts, rows, inputs // 32

    published = ExpertWeights(
        like((*blocks(2 * width, HIDDEN), 16), jnp.uint8),
        like(blocks(2 * width, HIDDEN), jnp.uint8),
        like((num_experts, 2 * width), jnp.bfloat16),
        like((*blocks(HIDDEN, width), 16), jnp.uint8),
        like(blocks(HIDDEN, width), jnp.uint8),
        like((num_experts, HIDDEN), jnp.bfloat16),
    )
    form = tpu_forms.FORMS[form_name]
    weights = jax.tree.map(
        lambda a: like(a.shape, a.dtype), jax.eval_shape(functools.partial(packed, form.layout), published)
    )
    x, assignments = like((num_tokens, HIDDEN), jnp.dtype(dtype)), (num_tokens, per_token)
    run = jax.jit(functools.partial(tpu.expert_mlp, limit=7.0, form=form))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = run.trace(x, like(assignments, jnp.int32), like(assignments, jnp.float32), weights)
        program = traced.lower(lowering_platforms=("tpu",)).compile()
    memory = program_memory(program)
    others = x.size * x.dtype.itemsize + 8 * num_tokens * per_token
    rows = tile_rows(num_tokens * per_token, num_experts, tpu.FEWEST_ROWS, form.most_rows)
    steps = tpu.Steps(form.parts, width // form.parts, HIDDEN)
    sizes = {
        "rows": rows,
        "weights": 3 * num_experts * HIDDEN * width,
        "step_weights": HIDDEN * 2 * steps.inner_block + width * steps.hidden_block,
        "packed": memory.argument_bytes - others,
        "published": sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(published)),
        "temporaries": memory.temporary_bytes,
    }
    print(json.dumps(sizes))


if __name__ == "__main__":
    define_flags()
    command.run(main, "tpu_experts")
