"""Pictures, drawn by matplotlib, which is optional, and written whole."""

import io
from pathlib import Path
from typing import Any

from gptoss_jax import whole_files


def figure() -> Any | None:
    """An empty figure, 960 by 600 dots, to draw in; None: matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, since it is optional
        from matplotlib.figure import Figure
    except ImportError:
        return None
    empty = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(empty)
    return empty


def write(path: Path, drawn: Any) -> None:
    """The figure as the PNG or SVG that the path's suffix names: the same bytes from the same figure.

    Raises:
        WriteError: it cannot be written.
    """
    from matplotlib import rc_context

    out, is_svg = io.BytesIO(), path.suffix == ".svg"
    with rc_context({"svg.hashsalt": "gptoss_jax"}):
        drawn.savefig(out, format=path.suffix[1:], metadata={"Date": None} if is_svg else {"Software": None})
    whole_files.write_whole(path, out.getvalue())
