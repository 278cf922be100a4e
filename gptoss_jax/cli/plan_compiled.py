"""The part of the planner's work that compiles: `--nofast`, `--show` and `--dump`. Imports what a compiler needs."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from gptoss_jax.cli import interrupts
from gptoss_jax.planner import compiled, report, show, sweep
from gptoss_jax.planner import plan as plans
from gptoss_jax.planner.plan import Request


def run(options: flags.FlagValues, request: Request) -> Any:
    """What the flags ask for, as one text or, with --json, one document.

    Raises:
        GptossError: bad input, what does not fit, or what a compiler refuses.
    """
    request = compiled.of_layers(request, options.layers)
    where = compiled.compiler(request)
    steps = [options.step] if options.show or options["step"].present else compiled.STEPS
    planned = plans.make(request) if options.show or options.dump else sweep.make_fitting(request)
    with interrupts.ended_by_ctrl_c():
        found = {step: compiled.lower(request, where, step) for step in steps}
    said = report.to_json(planned) if options.json else report.text(planned)
    if options.json:
        document: dict[str, Any] = {"basis": where.said, "layers": request.config.num_layers}
        document |= {} if options.show else {"plan": said}
        for step, program in found.items():
            document[step] = _json(options, request, where, program)
        _dump(options, found)
        return document
    parts = [] if options.fast else [said, ""]
    parts += _head(options, request, where)
    for step, program in found.items():
        parts += ["", *_text(options, request, where, step, program)]
    return "\n".join([*parts, *_dump(options, found)])


def _head(options: flags.FlagValues, request: Request, where: compiled.Compiler) -> Iterator[str]:
    workload = request.workload
    many = (
        f"{request.config.num_layers} layers" if options.layers is None else f"the first {options.layers} layers only"
    )
    yield f"{request.model} on {request.slice.name}, {many}: {where.said}"
    yield (
        f"mesh {request.mesh}; batch {workload.slots}, context {workload.context_tokens:,}, prefill chunks of "
        f"{workload.prefill_tokens:,}"
    )


def _text(
    options: flags.FlagValues, request: Request, where: compiled.Compiler, step: str, program: Any
) -> Iterator[str]:
    if not options.show:
        yield from compiled.text(step, program, compiled.closed_form(request, where))
        yield ""
        yield from show.flops(program, request.slice.chip).lines
        return
    for i, name in enumerate(_sections(options)):
        if i:
            yield ""
        yield f"{name} of a {'decoding step' if step == 'decode' else 'prefill chunk'}"
        yield from show.SECTIONS[name](program, request.slice.chip).lines


def _json(options: flags.FlagValues, request: Request, where: compiled.Compiler, program: Any) -> dict[str, Any]:
    if not options.show:
        return compiled.to_json(program, compiled.closed_form(request, where))
    return {name: show.SECTIONS[name](program, request.slice.chip).json for name in _sections(options)}


def _sections(options: flags.FlagValues) -> list[str]:
    names: Sequence[str] = options.show
    return list(show.section_names(names))


def _dump(options: flags.FlagValues, found: dict[str, Any]) -> list[str]:
    """Writes what --dump asks for; gives a line for each file."""
    if not options.dump:
        return []
    written = [path for program in found.values() for path in program.dump(Path(options.dump))]
    return ["", *(f"wrote {path} ({path.stat().st_size:,} bytes)" for path in written)]
