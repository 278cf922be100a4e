"""What results are held against, row by row: one wrong row of thousands must not drown in the norm of all."""

from collections.abc import Callable
from typing import Any

import numpy as np

Compare = Callable[[np.ndarray], tuple[bool, str, dict[str, Any]]]
"""Of what was found: whether it is right, how it is said, the figures to keep."""


def exactly(expected: Any) -> Compare:
    """Equal, element by element; -0 is 0, and NaN is nothing."""

    def compare(found: np.ndarray) -> tuple[bool, str, dict[str, Any]]:
        wrong = np.argwhere(~(found == expected))
        said = f"{len(wrong)} of {found.size} wrong" + f", first at {wrong[:3].tolist()}" * bool(len(wrong))
        return not len(wrong) and found.shape == np.shape(expected), said, {"wrong": len(wrong)}

    return compare


def near(expected: Any, tolerance: float) -> Compare:
    """Each row within `tolerance` of its norm."""

    def compare(found: np.ndarray) -> tuple[bool, str, dict[str, Any]]:
        errors = row_errors(found, expected)
        worst = int(errors.argmax())
        said = f"worst row off by {errors[worst]:.1e} (row {worst}), median {np.median(errors):.1e}"
        return bool(errors.max() < tolerance), said, {"error": float(errors.max())}

    return compare


def row_errors(found: Any, expected: Any) -> np.ndarray:
    """||found - expected|| / ||expected|| of each row; inf where anything is not finite."""
    found, expected = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (found, expected))
    with np.errstate(invalid="ignore", over="ignore"):
        errors = np.linalg.norm(found - expected, axis=1) / np.maximum(np.linalg.norm(expected, axis=1), 1e-30)
    return np.where(np.isfinite(errors), errors, np.inf)
