"""A sweep as a picture: throughput of each chip against the speed that each user sees, and the Pareto front."""

from collections.abc import Sequence
from pathlib import Path

from gptoss_jax import pictures
from gptoss_jax.planner.plan import Plan
from gptoss_jax.planner.sweep import pareto

FORMATS = (".png", ".svg")
_NAMED = 12  # points of the front that carry a name


def write(path: Path, found: Sequence[Plan], title: str) -> bool:
    """Draws the plans, of which there is at least one, as a PNG or SVG, whole; False: matplotlib is not installed.

    Raises:
        WriteError: it cannot be written.
    """
    figure = pictures.figure()
    if figure is None:
        return False
    axes = figure.subplots()
    front = sorted(pareto(found), key=lambda i: found[i].tokens_per_second_per_user)
    points = [(plan.tokens_per_second_per_user, plan.tokens_per_second_per_chip) for plan in found]
    axes.scatter(*zip(*points, strict=True), s=10, color="tab:gray", alpha=0.5, label="meshes, batches, contexts")
    of_front = [points[i] for i in front]
    axes.scatter(*zip(*of_front, strict=True), s=24, color="tab:blue", label="Pareto front")
    for i in front[:: -(-len(front) // _NAMED)]:
        request = found[i].request
        axes.annotate(
            f"{request.mesh} b{request.workload.slots}",
            points[i],
            fontsize=6,
            xytext=(4, 4),
            textcoords="offset points",
        )
    axes.set(xscale="log", yscale="log", xlabel="tokens/s of each user", ylabel="tokens/s of each chip")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    pictures.write(path, figure)
    return True
