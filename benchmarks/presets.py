"""Preset meshes compiled for their slices: the compiler's bytes of a device, held and sent, beside the planner's.

Called by `benchmarks.ahead_of_time presets`. An H100 runs an H200's programs, so its presets are compiled as those.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.ahead_of_time import GIB, Step, fit
from gptoss_jax.files import of_configs
from gptoss_jax.model import mesh
from gptoss_jax.model.config import read_config
from gptoss_jax.planner import plan
from gptoss_jax.planner.chips import parse_slice
from gptoss_jax.planner.collectives import Collective
from gptoss_jax.planner.plan import Request, Workload

SLOTS, CONTEXT_TOKENS, PREFILL_TOKENS = 16, 8_192, 128
MODELS = ("gpt-oss-20b", "gpt-oss-120b")
WIDTHS = {"decode": 1, "prefill": PREFILL_TOKENS}


class Preset(NamedTuple):
    """A file of configs/meshes, the slice that it is for as `--on` names it, and the target that is compiled for."""

    name: str
    on: str
    target: str

    @property
    def path(self) -> str:
        """As --mesh takes it."""
        return f"configs/meshes/{self.name}.json"


PRESETS = (
    *(Preset(f"h100x{n}", f"h100x{n}", "H200" if n == 1 else f"{n} H200") for n in (1, 2, 4, 8)),
    *(Preset(f"h200x{n}", f"h200x{n}", "H200" if n == 1 else f"{n} H200") for n in (1, 2, 4, 8)),
    Preset("v5e-8", "v5e:2x4", "8 v5e"),
    Preset("v5e-16", "v5e:4x4", "16 v5e"),
    Preset("v6e-8", "v6e:2x4", "8 v6e"),
    Preset("v5p-8", "v5p:2x2x2", "8 v5p"),
    Preset("tpu7x-8", "tpu7x:2x2x1", "8 tpu7x"),
)


def planned(model: str, preset: Preset, slots: int = SLOTS) -> plan.Plan:
    """What the planner says of a preset."""
    config = read_config(of_configs(f"configs/{model}.json"))
    workload = Workload(slots, CONTEXT_TOKENS, PREFILL_TOKENS)
    return plan.make(Request(config, model, mesh.read(preset.path), parse_slice(preset.on), workload))


def reports(
    names: Sequence[str], kernels: str, models: Sequence[str] = MODELS, steps: Sequence[str] = tuple(WIDTHS)
) -> Iterator[tuple[dict[str, Any], str]]:
    """A report and a line for each preset of these targets, model and step."""
    compiled = (preset for preset in PRESETS if preset.target in names and not preset.name.startswith("h100"))
    for preset, model, name in itertools.product(compiled, models, steps):
        step = Step(model, preset.target, SLOTS, CONTEXT_TOKENS, WIDTHS[name], preset.path)
        report = compared(fit(step, kernels), planned(model, preset))
        yield report, _line(report)


def compared(report: dict[str, Any], found: plan.Plan) -> dict[str, Any]:
    """A report of `ahead_of_time.fit` with the planner's figures for the same step, and their difference."""
    memory = found.memory
    said = memory.program_bytes(report["width"])
    compiled = report["arguments_gib"] + report["temporaries_gib"] if "arguments_gib" in report else None
    work = found.decode_work if report["width"] == 1 else found.prefill_work
    return {
        **report,
        "planned_arguments_gib": round(memory.arguments / GIB, 2),
        "planned_temporaries_gib": round((said - memory.arguments) / GIB, 2),
        "planned_collectives": [list(each) for each in sorted(work.collectives) if each.where != "sampling"],
        "off": None if compiled is None else round(said / GIB / compiled - 1, 4),
    }


def sent_bytes(collectives: list[list[Any]]) -> int:
    """Of all arrays of embedding, attention and experts in a step, after their collectives."""
    return sum(Collective(*each).total_bytes for each in collectives)


def _line(report: dict[str, Any]) -> str:
    kind = "decoding" if report["width"] == 1 else f"prefill of {report['width']}"
    what = f"{report['model']}, {report['mesh'].split('/')[-1]}: {kind}"
    if report["off"] is None:
        return f"{what:55} does not fit: {report['why']}"
    compiled = f"{report['arguments_gib']:7.2f} + {report['temporaries_gib']:5.2f}"
    said = f"{report['planned_arguments_gib']:7.2f} + {report['planned_temporaries_gib']:5.2f}"
    memory = f"{compiled} GiB compiled, {said} planned: {report['off']:+.1%} of {report['of_gib']}"
    sent, said = sorted(report["collectives"]), report["planned_collectives"]
    same = "as planned" if sent == said else f"NOT AS PLANNED: {sent_bytes(said):,} B"
    return f"{what:55} {memory}; sums {sent_bytes(sent):,} B, {same}"
