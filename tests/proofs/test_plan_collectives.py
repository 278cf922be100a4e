"""The planner's closed form beside what the compiler made of an engine's own programs, on eight CPU devices."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from gptoss_jax.engine.request import EngineConfig
from gptoss_jax.engine.runner import ModelRunner
from gptoss_jax.model import mesh, sharding
from gptoss_jax.model.config import read_config
from gptoss_jax.model.mesh import RULES, MeshShape
from gptoss_jax.model.transformer import declare, nest
from gptoss_jax.planner import collectives, compiled_collectives, memory
from gptoss_jax.planner.chips import CHIPS
from gptoss_jax.planner.memory import Workload
from gptoss_jax.runtime.program_memory import program_memory
from tests.goldens.make import ROOT

CPU = CHIPS["cpu"]
WORKLOAD = Workload(slots=8, context_tokens=256, prefill_tokens=16)
QUICKLY: Any = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # code is not looked at
EXCHANGES = {
    str(shape): shape
    for shape in (
        MeshShape({"data": 8}, {**RULES, "experts": ("data",)}, "gather"),
        MeshShape({"data": 4, "tensor": 2}, {**RULES, "experts": ("tensor", "data"), "expert_hidden": ()}, "gather"),
        MeshShape({"data": 4, "tensor": 2}, {**RULES, "experts": ("data",)}, "all_to_all"),
        MeshShape({"data": 2, "expert": 4}, RULES, "all_to_all"),
    )
}
MESHES = (
    ("small", "data=8"),
    ("small", "configs/meshes/expert4-tensor2.json"),
    ("small", "configs/meshes/h200x8.json"),  # heads over experts' devices: eight ways
    ("small", "configs/meshes/data2-expert2-tensor2.json"),
    ("demo", "data=2,tensor=4"),
    ("demo", "expert=8"),
    ("small", "sequence=8"),
    ("demo", "data=2,sequence=4"),
    ("small", "configs/meshes/expert2-tensor2-sequence2.json"),
    *(("demo", name) for name in EXCHANGES),
)


@functools.cache
def _programs(name: str, mesh_text: str) -> dict[str, Any]:
    """An engine's programs, by name, for two layers of a model: one with a sliding window and one without."""
    config, laid_out = _config(name), sharding.make(_shape(mesh_text))
    declared = declare(config, laid_out)
    params = nest({p: laid_out.put(jnp.zeros(*leaf[:2]), leaf.axes) for p, leaf in declared.leaves.items()})
    found = {}

    def compile_program(name: str, program: Any, arguments: tuple[Any, ...]) -> Any:
        if name.startswith(("decode", "prefill")):
            found[name] = program.lower(*arguments).compile(compiler_options=QUICKLY)

    sizes = EngineConfig(
        slots=WORKLOAD.slots,
        max_context_tokens=WORKLOAD.context_tokens,
        prefill_widths=(WORKLOAD.prefill_tokens,),
        deterministic=False,
        prefix_snapshots=0,
    )
    ModelRunner(declared, params, config, laid_out, jnp.dtype(jnp.bfloat16), sizes, compile_program=compile_program)
    return found


def _shape(mesh_text: str) -> MeshShape:
    return EXCHANGES.get(mesh_text) or mesh.read(mesh_text)


def _config(name: str):
    return dataclasses.replace(read_config(ROOT / "configs" / f"{name}.json"), num_layers=2)


@pytest.mark.parametrize(("name", "mesh_text"), MESHES)
def test_collectives_are_those_of_the_compiled_programs(name, mesh_text):
    """Guards what a plan says is sent: a sum that the model lost or gained, an array that is gathered for nothing.

    Kind, bytes, devices, count and when it runs, of every array: nothing is left over on either side.
    """
    config, shape = _config(name), _shape(mesh_text)
    programs = _programs(name, mesh_text)
    closed = {
        "decode": collectives.decode_step(config, shape, CPU, WORKLOAD),
        f"prefill-{WORKLOAD.prefill_tokens}": collectives.prefill_chunk(config, shape, CPU, WORKLOAD),
    }
    assert programs.keys() == closed.keys()
    for step, said in closed.items():
        compiled = compiled_collectives.of_program(programs[step].as_text())
        assert compiled, step
        assert compiled == compiled_collectives.planned(said), step


@pytest.mark.parametrize(("name", "mesh_text"), MESHES)
def test_arguments_are_counted_to_the_byte(name, mesh_text):
    """Guards weights, keys and values, and slots of each device: a leaf that is cut otherwise than the planner says."""
    config, shape = _config(name), _shape(mesh_text)
    said = memory.memory(config, shape, CPU, WORKLOAD).arguments
    steps = jax.dtypes.canonicalize_dtype(jnp.int32).itemsize  # how many a dispatch takes
    assert program_memory(_programs(name, mesh_text)["decode"]).argument_bytes == said + steps


def test_a_collective_too_many_is_found():
    """Guards the comparison itself: one more sum in a program, or one less in the closed form, is a difference."""
    text = _programs("demo", "data=2,tensor=4")["decode"].as_text()
    whole = compiled_collectives.of_program(text)
    line = next(line for line in text.splitlines() if "layer_1/experts" in line and " all-reduce(" in line)
    again = line.replace(" = ", ".again = ", 1)
    assert compiled_collectives.of_program(text.replace(line, f"{line}\n{again}")) != whole
    assert compiled_collectives.of_program(text.replace(line, "")) != whole
    moved = line.replace("layer_1/experts/", "layer_1/elsewhere/")
    with pytest.raises(ValueError, match="where the model has none"):
        compiled_collectives.of_program(text.replace(line, moved))
