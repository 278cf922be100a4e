"""Compiles for GPUs and TPUs on a machine that has none: what fits where, and what the compilers say of the kernels.

    python -m benchmarks.ahead_of_time models     # arguments + temporaries of whole steps against each device's memory
    python -m benchmarks.ahead_of_time kernels    # temporaries, registers and spills of each kernel at real shapes
    python -m benchmarks.ahead_of_time launches   # kernels, copies and library calls of a decoding step on a GPU
    python -m benchmarks.ahead_of_time presets    # configs/meshes on their slices, beside what gptoss_jax.plan says

The compilers are the vendors' own, from the compile-only wheels that `make gates` installs; nothing is run. A program
that is too large for a TPU is refused by its compiler; for a GPU it is not, so its bytes are compared here. The last
line is JSON. Times and numbers need the device itself: `benchmarks.gpu`.
"""

import functools
import glob
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import launches as launch_list
from benchmarks import true_width
from gptoss_jax.cli import command
from gptoss_jax.errors import GptossError
from gptoss_jax.model import kv_cache, layers, sharding
from gptoss_jax.model.config import ModelConfig, parse_config, read_config
from gptoss_jax.model.sharding import Sharding
from gptoss_jax.planner import compiled_collectives
from gptoss_jax.runtime import compile_only, lowering
from gptoss_jax.runtime.compile_only import B200_DIFFERS, ENVIRONMENT
from gptoss_jax.runtime.program_memory import logged, program_memory
from pallas_kernels import attention as attention_op
from pallas_kernels import expert_mlp as expert_op
from pallas_kernels import placement as placement_op
from pallas_kernels.choice import Hardware

GIB = 1 << 30


class Target(NamedTuple):
    """A device to compile for, and how many."""

    platform: str  # gpu or tpu
    topology: str
    hardware: Hardware
    memory_gib: float  # that a program may use, of one device
    devices: int = 1
    differs: Mapping[str, str] = {}  # of a GPU, from an H200
    options: Mapping[str, Any] = {}  # of XLA's compiler


_H200 = Hardware("gpu", "NVIDIA H200", "9.0")
TARGETS = {
    "H200": Target("gpu", "1x1x1", _H200, 141.0),
    "2 H200": Target("gpu", "1x1x2", _H200, 141.0, 2),
    "4 H200": Target("gpu", "1x1x4", _H200, 141.0, 4),
    "8 H200": Target("gpu", "1x1x8", _H200, 141.0, 8),
    "B200": Target(
        platform="gpu",
        topology="1x1x1",
        hardware=Hardware("gpu", "NVIDIA B200", "10.0"),
        memory_gib=178.4,
        differs=B200_DIFFERS,
        options={"xla_gpu_enable_cub_radix_sort": False},  # CUB asks the device, here for 201,088 logits
    ),
    "v5e": Target("tpu", "v5e:2x2", Hardware("tpu", "TPU v5 lite"), 15.75),
    "8 v5e": Target("tpu", "v5e:2x4", Hardware("tpu", "TPU v5 lite"), 15.75, 8),
    "16 v5e": Target("tpu", "v5e:4x4", Hardware("tpu", "TPU v5 lite"), 15.75, 16),
    "v6e": Target("tpu", "v6e:2x2", Hardware("tpu", "TPU v6 lite"), 31.25),
    "8 v6e": Target("tpu", "v6e:2x4", Hardware("tpu", "TPU v6 lite"), 31.25, 8),
    "v5p": Target("tpu", "v5p:2x2x1", Hardware("tpu", "TPU v5"), 95.74),
    "8 v5p": Target("tpu", "v5p:2x2x2", Hardware("tpu", "TPU v5"), 95.74, 8),
    "tpu7x": Target("tpu", "tpu7x:2x2x1", Hardware("tpu", "TPU7x"), 94.75),
    "8 tpu7x": Target("tpu", "tpu7x:2x2x1", Hardware("tpu", "TPU7x"), 94.75, 8),
}


def missing(platform: str) -> str | None:
    """Why nothing can be compiled for `platform` here, in a few words, or None if it can."""
    return compile_only.missing(platform)


def devices(target: Target) -> list[Any]:
    """Devices of `target` that can be compiled for, and nothing else.

    Raises:
        GptossError: the compiler's wheels are not installed.
    """
    where = target.platform, target.topology, target.hardware, target.devices, target.differs
    return compile_only.devices(compile_only.Target(*where))


def lower(function: Callable[..., Any], laid_out: Sharding, *arguments: Any, donate: tuple[int, ...] = ()) -> Any:
    """`function` of ShapeDtypeStructs, lowered for the devices of `laid_out`."""
    platform = "tpu" if laid_out.mesh.devices.flat[0].platform == "tpu" else "cuda"
    with jax.sharding.use_abstract_mesh(laid_out.mesh.abstract_mesh):  # so that kernels see which device it is
        return jax.jit(function, donate_argnums=donate).trace(*arguments).lower(lowering_platforms=(platform,))


# ---- whole steps ----


class Step(NamedTuple):
    """One program of an engine, of shapes alone."""

    model: str
    target: str
    slots: int
    context_tokens: int
    width: int = 1  # tokens of each slot: 1 decodes, more are a chunk of a prompt
    mesh: str = ""
    layers: int | None = None  # fewer than the model has; None: all
    dense: str = "bfloat16"  # or int8: the weights of attention and unembedding


def compile_step(step: Step, kernels: str = "auto", options: Mapping[str, Any] = {}) -> Any:
    """The compiled program of `step`, sampling included; `options` are XLA's, beside those of the target."""
    target = TARGETS[step.target]
    chosen, _ = layers.choose_kernels(kernels, target.hardware)
    laid_out = sharding.make(step.mesh, devices(target))
    model = lowering.abstract_model(_config(step), laid_out, chosen, dense=step.dense)
    shape = lowering.StepShape(step.slots, step.context_tokens, step.width)
    lowered = lowering.lower(model, shape, "cuda" if target.platform == "gpu" else target.platform)
    return lowered.compile(compiler_options={**target.options, **options})


GRAPHED = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
"""Everything that XLA can put into a CUDA graph, loops too, which it leaves out by default."""


def launches(step: Step, kernels: str = "auto", *, graphs: str | None = None) -> launch_list.Launches:
    """What one token of a decoding program launches on a GPU; `graphs` may hold these kinds, None: XLA's default."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        options |= {} if graphs is None else {"xla_gpu_enable_command_buffer": graphs}
        return launch_list.of_folder(Path(folder), compile_step(step, kernels, options).as_text())


def _config(step: Step) -> ModelConfig:
    path = true_width.CONFIG.with_name(f"{step.model}.json")
    raw = json.loads(path.read_text())
    return parse_config(raw if step.layers is None else true_width.raw_config(step.layers, path))


MODEL_STEPS = (
    Step("gpt-oss-20b", "H200", 1, 8_192),
    Step("gpt-oss-20b", "H200", 1, 8_192, width=512),
    Step("gpt-oss-20b", "H200", 1, 8_192, dense="int8"),
    Step("gpt-oss-20b", "H200", 1, 131_072),
    Step("gpt-oss-120b", "H200", 1, 131_072),
    Step("gpt-oss-120b", "H200", 1, 131_072, width=512),
    Step("gpt-oss-120b", "8 H200", 64, 8_192, mesh="expert=8"),
    Step("gpt-oss-120b", "8 H200", 8, 8_192, width=512, mesh="expert=8"),
    Step("gpt-oss-20b", "B200", 1, 8_192),
    Step("gpt-oss-20b", "B200", 1, 8_192, width=512),
    Step("gpt-oss-20b", "v6e", 1, 131_072),
    Step("gpt-oss-20b", "v6e", 1, 131_072, width=512),
    Step("gpt-oss-20b", "8 v5e", 8, 8_192, mesh="expert=8"),
    Step("gpt-oss-120b", "8 v6e", 8, 131_072, mesh="expert=8"),
    Step("gpt-oss-120b", "v5p", 1, 131_072),
    Step("gpt-oss-120b", "tpu7x", 1, 131_072),
)


def fit(step: Step, kernels: str = "auto") -> dict[str, Any]:
    """One line of the table: bytes of a step beside those of its device."""
    try:
        with logged() as said:
            compiled = compile_step(step, kernels)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {**step._asdict(), "fits": False, "why": str(error).splitlines()[0][:160]}
    found = program_memory(compiled, *said)
    sizes = {"arguments_gib": found.argument_bytes / GIB, "temporaries_gib": found.temporary_bytes / GIB}
    limit = TARGETS[step.target].memory_gib
    fits = found.total_bytes <= limit * GIB
    sent = [list(each) for each in compiled_collectives.of_program(compiled.as_text()) if each.where != "sampling"]
    sizes = {k: round(v, 2) for k, v in sizes.items()}
    return {**step._asdict(), **sizes, "of_gib": limit, "fits": fits, "collectives": sent}


# ---- kernels by themselves ----


class Case(NamedTuple):
    """One call of an op at a size that a real model makes."""

    name: str
    run: Callable[..., Any]
    arguments: tuple[Any, ...]


INSTRUCTION = r"/\*[0-9a-f]{4,}\*/\s+"  # its address, in the assembler's listing
DUMP_TO = "MOSAIC_GPU_DUMP_TO"  # read once a process, so `main` starts another with it


def cases(target: Target) -> Iterator[Case]:
    """Every op of both models, decoding and prefill, as `target` runs it."""
    attend = attention_op.choose("auto", target.hardware).implementation
    experts = expert_op.choose("auto", target.hardware).implementation
    configs = {
        name: read_config(true_width.CONFIG.with_name(f"{name}.json")) for name in ("gpt-oss-20b", "gpt-oss-120b")
    }
    for name, config in configs.items():
        for tokens in (1, 8, 64, 512, 4_096):
            run = functools.partial(experts.run, limit=config.swiglu_limit)
            yield Case(f"{name} expert_mlp, {tokens} tokens", run, _expert_arguments(config, tokens, experts.layout))
    config = configs["gpt-oss-20b"]  # attention is that of the 120b
    run = functools.partial(_attend_as_stored, attend)
    for sequences, tokens in ((1, 1), (8, 1), (64, 1), (1, 512), (1, 2_048)):
        size = f"{sequences} sequences of {tokens} tokens"
        for form, kv in (
            ("paged attention, 131,072 of context", _paged(config, sequences)),
            ("sliding window attention", _ring(config, sequences, tokens)),
        ):
            yield Case(f"{form}, {size}", run, _attention_arguments(config, sequences, tokens, kv))
    if target.hardware.platform in placement_op.IMPLEMENTATIONS:
        for sequences in (1, 64):
            name = f"rotation and storing, {sequences} sequences of 1 tokens"
            yield Case(name, placement_op.IMPLEMENTATIONS["gpu"], _placement_arguments(config, sequences))


def _attend_as_stored(attend: attention_op.Attend, q: Any, kv: Any, positions: Any, sinks: Any) -> Any:
    """Attention to keys and values as the cache stores them, [., ., K H]."""
    split = [kv_cache.by_heads(stored, stored.shape[2] // q.shape[3]) for stored in kv[:2]]
    return attend(q, type(kv)(*split, *kv[2:]), positions, sinks).out


def _expert_arguments(config: ModelConfig, tokens: int, layout: expert_op.WeightLayout) -> tuple[Any, ...]:
    hidden, inner, experts = config.hidden_size, config.intermediate_size, config.num_experts
    uint8, bfloat16 = jnp.uint8, jnp.bfloat16
    published = expert_op.ExpertWeights(
        _array(uint8, experts, 2 * inner, hidden // 32, 16),
        _array(uint8, experts, 2 * inner, hidden // 32),
        _array(bfloat16, experts, 2 * inner),
        _array(uint8, experts, hidden, inner // 32, 16),
        _array(uint8, experts, hidden, inner // 32),
        _array(bfloat16, experts, hidden),
    )
    packed = jax.eval_shape(functools.partial(expert_op.packed, layout), published)
    assignments = tokens, config.experts_per_token
    return _array(bfloat16, tokens, hidden), _array(jnp.int32, *assignments), _array(jnp.float32, *assignments), packed


def _attention_arguments(config: ModelConfig, sequences: int, tokens: int, kv: Any) -> tuple[Any, ...]:
    q = _array(jnp.bfloat16, sequences, tokens, config.num_heads, config.head_dim)
    return q, kv, _array(jnp.int32, sequences, tokens), _array(jnp.bfloat16, config.num_heads)


def _placement_arguments(config: ModelConfig, sequences: int) -> tuple[Any, ...]:
    heads = config.num_kv_heads, config.num_heads // config.num_kv_heads + 2, config.head_dim
    turns = _array(jnp.float32, sequences, 2, config.head_dim // 2)
    stored = placement_op.Stored(*_paged(config, sequences))
    projected, bias = _array(jnp.float32, sequences, *heads), _array(jnp.bfloat16, *heads)
    return projected, bias, turns, stored, _array(jnp.int32, sequences)


def _paged(config: ModelConfig, sequences: int) -> attention_op.PagedKV:
    pages = kv_cache.num_pages(131_072)  # the pool has two sequences' worth: the others may be shorter
    pool = _array(jnp.bfloat16, 2 * pages, kv_cache.PAGE_TOKENS, config.num_kv_heads * config.head_dim)
    return attention_op.PagedKV(pool, pool, _array(jnp.int32, sequences, pages))


def _ring(config: ModelConfig, sequences: int, tokens: int) -> attention_op.RingKV:
    ring = _array(jnp.bfloat16, sequences, config.sliding_window, config.num_kv_heads * config.head_dim)
    new = _array(jnp.bfloat16, sequences, tokens, config.num_kv_heads, config.head_dim)
    return attention_op.RingKV(ring, ring, new, new, _array(jnp.int32, sequences))


def _array(dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def compile_kernel(case: Case, target: Target) -> dict[str, Any]:
    """Compiles one case for one device: its temporaries, and for a GPU what the assembler says of each kernel."""
    laid_out = sharding.make(None, devices(target))

    def place(argument: Any) -> Any:
        """Packed weights lie as their weight layout says, row-major; the rest as the compiler likes."""
        to = laid_out.row_major if isinstance(argument, expert_op.ExpertWeights) else laid_out.named
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to((None,) * len(x.shape))), argument
        )

    with logged() as said:
        compiled = lower(case.run, laid_out, *map(place, case.arguments)).compile()
    folder, text = Path(os.environ[DUMP_TO]), compiled.as_text()
    kernels = assembler_reports(folder) if target.platform == "gpu" else bundle_reports(folder, text)
    temporaries_mib = round(program_memory(compiled, *said).temporary_bytes / 2**20, 2)
    return {"case": case.name, "temporaries_mib": temporaries_mib, "kernels": kernels}


def assembler_reports(folder: Path) -> list[dict[str, Any]]:
    """What ptxas said of each Mosaic kernel in `folder`, and what its code holds; the files are then deleted."""
    reports = []
    for path in sorted(folder.glob("*.ptxas")):
        said, code = path.read_text(), "".join(p.read_text() for p in folder.glob(f"{path.stem}*.sass*"))
        reports.append(
            {
                "kernel": path.stem,
                "registers": _largest(r"Used (\d+) registers", said),
                "spilled_bytes": _largest(r"(\d+) bytes spill stores", said)
                + _largest(r"(\d+) bytes spill loads", said),
                "wgmma_serialized": "wgmma" in said.lower() and "serializ" in said.lower(),
                "tensor_core_instructions": len(re.findall(r"\bHGMMA", code)),
                "tensor_core_loops": tensor_core_loops(code),
                "local_memory_instructions": len(re.findall(r"\b(?:LDL|STL)\b", code)),
                "instructions": len(re.findall(INSTRUCTION, code)),
            }
        )
    for path in glob.glob(f"{folder}/*"):
        os.remove(path)
    return reports


def _largest(pattern: str, text: str) -> int:
    return max(map(int, re.findall(pattern, text)), default=0)


def tensor_core_loops(code: str) -> list[int]:
    """Instructions in each innermost loop around tensor core instructions, in the order of the code."""
    labels, instructions, loops = {}, [], []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(INSTRUCTION + r"(.*)", line):
            instructions.append(instruction[1])
            branch = re.search(r"\bBRA\b.*\((\.L\w+)\)", instruction[1])
            body = range(labels.get(branch[1], len(instructions)) if branch else len(instructions), len(instructions))
            if any("HGMMA" in instructions[i] for i in body):
                loops.append(body)
    innermost: list[range] = []
    for loop in sorted(loops, key=len):  # what waits for a barrier out of line jumps back into the middle of a loop
        if all(loop.stop <= other.start or other.stop <= loop.start for other in innermost):
            innermost.append(loop)
    return [len(loop) for loop in sorted(innermost, key=lambda loop: loop.start)]


def bundle_reports(folder: Path, compiled: str) -> list[dict[str, Any]]:
    """The static cost of each TPU kernel in `compiled`, from the dumps in `folder`; the files are then deleted.

    A bundle is what a TPU's core issues in one cycle, unless it waits. The longest runs without a branch are a kernel's
    inner loops: of attention, what it does with a block of keys (of decoding, first masked, then not).
    """
    reports = []
    calls = re.findall(r"%([\w.-]+) = .*custom_call_target=\"tpu_custom_call\"(.*)", compiled)
    for name, settings in calls:
        vmem = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"', settings)
        (path,) = folder.glob(f"*-{name}-*[0-9]-final_bundles.txt")
        runs = [0]
        for line in path.read_text().splitlines():
            if re.match(r"\s*(0x[0-9a-f]+|0)\s[^{]*\{", line):
                runs[-1] += 1
            if "sbr.rel" in line or re.match(r"\s*0x[0-9a-f]+\s+(LB|PF|PB)\b", line):
                runs.append(0)
        vmem_mib = round(int(vmem[1]) / 2**20, 2) if vmem else None
        cost = {"bundles": sum(runs), "longest_runs": sorted(runs)[:-4:-1], "vmem_mib": vmem_mib}
        reports.append({"kernel": name, **cost})
    for path in glob.glob(f"{folder}/*"):
        os.remove(path)
    return reports


# ---- the command ----


def main(arguments: list[str]) -> None:
    """Prints one table, then one JSON line."""
    found = {"models": _models, "kernels": _kernels, "launches": _launches, "presets": _presets}
    if len(arguments) != 1 or arguments[0] not in found:
        raise GptossError(f"{' '.join(arguments) or 'nothing'} asked for, expected one of {', '.join(found)}")
    names = flags.FLAGS.target or list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        raise GptossError(f"unknown target {', '.join(unknown)}, expected some of {', '.join(TARGETS)}")
    reports = []
    for report, line in found[arguments[0]](names):
        reports.append(report)
        print(line, flush=True)
    print(json.dumps({"jax": jax.__version__, arguments[0]: reports}))


def _models(names: list[str]) -> Iterator[tuple[dict[str, Any], str]]:
    for step in (step for step in MODEL_STEPS if step.target in names):
        report = fit(step, flags.FLAGS.kernels)
        yield report, _fit_line(report)


def _kernels(names: list[str]) -> Iterator[tuple[dict[str, Any], str]]:
    for name in (name for name in names if TARGETS[name].devices == 1):
        for case in cases(TARGETS[name]):
            report = {"target": name, **compile_kernel(case, TARGETS[name])}
            yield report, _kernel_line(report)


def _launches(names: list[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """From two depths, so that what a layer adds is separate from the step's own (embedding, logits, sampling)."""
    for name in (name for name in names if TARGETS[name].platform == "gpu" and TARGETS[name].devices == 1):
        steps = [Step("gpt-oss-20b", name, 1, 8_192, layers=layers) for layers in (2, 4)]
        two, four = (launches(step, flags.FLAGS.kernels) for step in steps)
        graphed = launches(steps[0], flags.FLAGS.kernels, graphs=GRAPHED)
        counts = launch_list.by_depth(two, 2, four, 4)
        total = {key: sum(of_kind[key] for of_kind in counts.values()) for key in ("per_layer", "beside_layers")}
        host = {"host_waits": four.host_waits, "host_waits_with_loops_in_graphs": graphed.host_waits}
        report = {"target": name, **total, **host, "host_launches": four.host_launches, "kinds": counts}
        yield report, _launches_text(report, two, steps[0])


def _launches_text(report: dict[str, Any], two: launch_list.Launches, step: Step) -> str:
    """The list of a program of two layers, by layer, and the sums."""
    target, lines = report["target"], []
    timed = list(
        zip(two.launches, launch_list.predicted_us(two.launches, _config(step), step.context_tokens), strict=True)
    )
    for layer in (0, 1, None):
        of_layer = [(launch, us) for launch, us in timed if launch.layer == layer]
        heading = "beside the layers" if layer is None else f"layer {layer}"
        lines.append(f"{target}, {heading}: {sum(us for _, us in of_layer):.0f} us predicted")
        lines += [f"  {us:6.1f} us {launch.kind:12} {launch.name:36} {launch.operation}" for launch, us in of_layer]
    for kind, found in report["kinds"].items():
        lines.append(f"{target}: {kind:12} {found['per_layer']:4g} a layer, {found['beside_layers']:3g} beside")
    lines.append(
        f"{target}: {report['per_layer']:g} launches a layer and {report['beside_layers']:g} beside them for a token; "
        f"the host launches {report['host_launches']} graphs and kernels and waits {report['host_waits']} times, "
        f"{report['host_waits_with_loops_in_graphs']} times with loops in graphs"
    )
    return "\n".join(lines)


def _presets(names: list[str]) -> Iterator[tuple[dict[str, Any], str]]:
    from benchmarks import presets  # here: it compiles with this module

    return presets.reports(names, flags.FLAGS.kernels, flags.FLAGS.model, flags.FLAGS.step)


def _fit_line(report: dict[str, Any]) -> str:
    kind = "decoding" if report["width"] == 1 else f"prefill of {report['width']}"
    what = f"{report['model']} on {report['target']}: {kind}, {report['slots']} x {report['context_tokens']:,} tokens"
    what += "" if report["dense"] == "bfloat16" else f", {report['dense']}"
    if "why" in report:
        return f"{what:70} does not fit: {report['why']}"
    total = report["arguments_gib"] + report["temporaries_gib"]
    verdict = "fits" if report["fits"] else "DOES NOT FIT"
    parts = f"{report['arguments_gib']:7.2f} + {report['temporaries_gib']:5.2f} = {total:6.2f} GiB"
    return f"{what:70} {parts} of {report['of_gib']}: {verdict}"


def _kernel_line(report: dict[str, Any]) -> str:
    line = f"{report['target']:7} {report['case']:62} {report['temporaries_mib']:9.2f} MiB"
    for kernel in report["kernels"]:
        if TARGETS[report["target"]].platform == "tpu":
            line += (
                f"; {kernel['bundles']} bundles, longest runs {kernel['longest_runs']}, VMEM {kernel['vmem_mib']} MiB"
            )
            continue
        line += f"; {kernel['registers']} registers, {kernel['spilled_bytes']} bytes spilled"
        line += f", {kernel['tensor_core_instructions']} of {kernel['instructions']} instructions on tensor cores"
        line += (
            f", loops of {' and '.join(map(str, kernel['tensor_core_loops']))}" if kernel["tensor_core_loops"] else ""
        )
    return line


def cli() -> None:
    """The command line, in a process whose environment suits the compilers."""
    if os.environ.get(DUMP_TO) or "--help" in sys.argv:
        flags.DEFINE_list("target", None, "NAMES: compile for these only, comma-separated.")
        models, steps = ["gpt-oss-20b", "gpt-oss-120b"], ["decode", "prefill"]
        flags.DEFINE_multi_enum("model", models, models, "Of presets, this model only.")
        flags.DEFINE_multi_enum("step", steps, steps, "Of presets, this program only.")
        flags.DEFINE_string("kernels", "auto", "NAMES: as for generate; auto takes the best for each target.")
        command.run(main, "ahead_of_time")
        return
    with tempfile.TemporaryDirectory() as folder:
        dumps = {DUMP_TO: folder, **{f"MOSAIC_GPU_DUMP_{kind}": "1" for kind in ("PTXAS", "SASS")}}
        if "kernels" in sys.argv:  # of whole models they would be gigabytes
            llo = (f"dump_to={folder}", "dump_llo_text=true", "dump_llo_pass_label_regex=.*final.*")
            dumps["LIBTPU_INIT_ARGS"] = " ".join(f"--xla_jf_{flag}" for flag in llo)
        call = [sys.executable, "-m", "benchmarks.ahead_of_time", *sys.argv[1:]]
        sys.exit(subprocess.run(call, env=os.environ | ENVIRONMENT | dumps, check=False).returncode)


if __name__ == "__main__":
    cli()
