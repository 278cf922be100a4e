"""The planner's work: from flags to a plan, two side by side, or a sweep, on stdout."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from gptoss_jax import whole_files
from gptoss_jax.cli import command, plan_asked
from gptoss_jax.cli.mistakes import spelled
from gptoss_jax.errors import GptossError, short
from gptoss_jax.files import of_configs
from gptoss_jax.model import mesh
from gptoss_jax.model.config import ModelConfig, read_config
from gptoss_jax.planner import chips, compare, plot, report, sweep
from gptoss_jax.planner import plan as plans
from gptoss_jax.planner.plan import Costs, Plan, Request, Workload

_MODELS = ("gpt-oss-20b", "gpt-oss-120b")
_MOST_DEVICES = 1024  # of a sweep: all sizes of three axes


def plan(options: flags.FlagValues, arguments: Sequence[str]) -> None:
    """Prints what the flags ask for.

    Raises:
        GptossError: bad input, or what does not fit.
    """
    if not arguments:
        raise GptossError(f"no model, expected one of {', '.join(_MODELS)}, a config.json or a folder that holds one")
    plan_asked.check(options)
    meshes = _meshes(options, arguments[1:])
    batches, contexts = (_numbers(options, name) for name in ("batch", "context"))
    request = _request(options, arguments[0], meshes[0], batches[0], contexts[0])
    if plan_asked.is_asked(options):
        from gptoss_jax.cli import plan_compiled  # here: the closed form needs neither JAX nor a compiler

        return _print(options, plan_compiled.run(options, request))
    if options.sweep:
        return _sweep(options, request, batches, contexts)
    if len(meshes) == 1:
        found = sweep.make_fitting(request)
        return _print(options, report.to_json(found) if options.json else report.text(found))
    pair = [plans.make(request._replace(mesh=mesh.read(each))) for each in meshes]
    return _print(options, compare.to_json(*pair) if options.json else compare.text(*pair))


def _print(options: flags.FlagValues, said: object) -> None:
    print(command.to_json(said) if options.json else said)


def _meshes(options: flags.FlagValues, more: Sequence[str]) -> list[str]:
    """One mesh to plan, or the two of --compare A B; or of --mesh A --compare B."""
    if options.compare is None:
        if more:
            raise GptossError(f"unexpected argument {short(more[0])}: one model at a time, and --mesh names its mesh")
        return [options.mesh]
    if len(more) > 1 or (more and options.mesh):
        raise GptossError("--compare takes two meshes, as in --compare A B after the model, or one beside --mesh")
    if not more and not options.mesh:
        raise GptossError(f"--compare {options.compare} has nothing to compare with: name another mesh after it")
    return [options.compare, *more] if more else [options.mesh, options.compare]


def _numbers(options: flags.FlagValues, name: str) -> list[int]:
    texts: list[str] = options[name].value  # pyright: ignore[reportAssignmentType]  (a list flag's)
    if not texts or not all(text.strip().isdecimal() and len(text.strip()) < 10 for text in texts):
        raise GptossError(f"--{name} is {short(','.join(texts))}, expected a whole number, of --sweep several: 1,8,64")
    if len(texts) > 1 and not options.sweep:
        raise GptossError(f"--{name} is {','.join(texts)}: several have an effect with --sweep only")
    return [int(text) for text in texts]


def _request(options: flags.FlagValues, model: str, mesh_text: str, batch: int, context: int) -> Request:
    if not options.on:
        raise GptossError(f"--on is missing, expected the chips, for example {chips.EXAMPLES}")
    for name in ("launch_us", "collective_us"):
        value: Any = options[name].value
        if not 0 <= value < 1e6:
            raise GptossError(f"{spelled(name)} is {value}, expected microseconds, from 0")
    name, config = _model(model)
    costs = Costs(1e-6 * options.launch_us, 1e-6 * options.collective_us)
    given = chips.parse_slice(options.on)
    prefill = options.prefill if options["prefill"].present else min(options.prefill, context)
    return Request(config, name, mesh.read(mesh_text), given, Workload(batch, context, prefill), costs)


def _model(text: str) -> tuple[str, ModelConfig]:
    """The name and the numbers of a model that is named, or whose config.json is.

    Raises:
        GptossError: neither.
    """
    path = Path(text)
    if path.is_dir():
        return path.resolve().name, read_config(path / "config.json")
    if path.suffix == ".json":
        return (path.stem if path.stem != "config" else path.resolve().parent.name), read_config(of_configs(path))
    name = text if text in _MODELS else f"gpt-oss-{text}"
    if name not in _MODELS:
        raise GptossError(
            f"model {short(text)}, expected one of {', '.join(_MODELS)}, a config.json or a folder that holds one"
        )
    return name, read_config(of_configs(f"configs/{name}.json"))


# ---- sweeps ----


def _sweep(options: flags.FlagValues, request: Request, batches: Sequence[int], contexts: Sequence[int]) -> None:
    if request.slice.devices > _MOST_DEVICES:
        raise GptossError(
            f"{request.slice.name} has {request.slice.devices:,} devices, swept are {_MOST_DEVICES:,} at most"
        )
    if options.plot is not None and Path(options.plot).suffix not in plot.FORMATS:
        raise GptossError(f"--plot is {options.plot}, expected a file that ends in {' or '.join(plot.FORMATS)}")
    if options.plot is not None and request.slice.chip.flops is None:
        raise GptossError(f"--plot: nothing to draw, {request.slice.chip.source}")
    asked = sweep.requests(request, batches, contexts)
    for each in asked:
        plans.check_workload(each)
    found = sweep.sweep(asked)
    if not found:
        raise GptossError(f"no mesh of {request.slice.name} does: {sweep.alternatives(asked[-1])}")
    if options.csv is not None:
        whole_files.write_whole(options.csv, sweep.to_csv(found).encode())
    if options.plot is not None and not plot.write(Path(options.plot), found, _title(request)):
        raise GptossError("--plot needs matplotlib, which is not installed: pip install matplotlib")
    _print(options, _json(found) if options.json else "\n".join(_table(request, found, len(asked), options.rows)))


def _title(request: Request) -> str:
    return f"{request.model} on {request.slice.name}: {report.BASIS}"


def _json(found: Sequence[Plan]) -> list[object]:
    front = sweep.pareto(found)
    return [sweep.row(each, i + 1, i in front) for i, each in enumerate(found)]


def _table(request: Request, found: Sequence[Plan], asked: int, rows: int) -> list[str]:
    front = sweep.pareto(found)
    lines = [
        _title(request),
        f"{len(found)} of {asked} meshes, batches and contexts come out even and fit; *: none is better in both speeds",
        "",
        f"{'':3}{'tokens/s':>10}{'tokens/s':>10}{'prompts':>11}{'':2}{'':14}{'of each':>12}",
        f"{'':3}{'of a chip':>10}{'of a user':>10}{'of a chip':>11}{'':2}{'bound by':14}{'device':>12}"
        f"{'batch':>7}{'context':>9}  mesh",
    ]
    shown = [i for i in range(len(found)) if i < rows or i in front]
    lines += [_line(found[i], i in front) for i in shown]
    if len(shown) < len(found):
        lines.append(f"{len(found) - len(shown)} more: --csv has all")
    return lines


def _line(found: Plan, in_front: bool) -> str:
    workload = found.request.workload
    speeds = "-".rjust(10) + "-".rjust(10) + "-".rjust(11)
    if found.decode:
        speeds = (
            f"{found.tokens_per_second_per_chip:10,.0f}{found.tokens_per_second_per_user:10,.1f}"
            f"{found.prefill_tokens_per_second_per_chip:11,.0f}"
        )
    bound = found.decode.bound if found.decode else "-"
    size = plans.in_gib(found.memory.total)
    return (
        f"{'*' if in_front else '':3}{speeds}  {bound:14}{size:>12}{workload.slots:7}{workload.context_tokens:9,}  "
        f"{found.request.mesh}"
    )
