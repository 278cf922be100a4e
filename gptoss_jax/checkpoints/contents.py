"""One pass over a published tensor's contents: NaN, infinities and scale bytes of 255, and whether packing rounds."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from gptoss_jax.checkpoints import packing
from gptoss_jax.checkpoints.recipe import Recipe
from gptoss_jax.checkpoints.safetensors_reader import Entry, tensor_fault
from gptoss_jax.errors import Fault

_BF16_INFINITY = 0x7F80


@dataclasses.dataclass(frozen=True)
class FileReport:
    """What one pass over a file's contents found.

    Attributes:
        sha256: of the whole file; "" where its header is at fault.
        rounding: tensor -> relative RMS error of those of its experts that packing rounds; exact tensors are left out.
        faults: of its tensors.
    """

    sha256: str
    rounding: dict[str, float]
    faults: tuple[Fault, ...]

    def note(self) -> dict[str, Any]:
        """What is to be remembered of a report without faults."""
        return {"sha256": self.sha256, "rounding": self.rounding}

    @classmethod
    def from_note(cls, note: Any) -> "FileReport | None":
        """The report that `note` was made of; None if it was of none: it lay in a file, and files get damaged."""
        match note:
            case {"sha256": str(digest), "rounding": dict(rounding), **others} if not others:
                return cls(digest, rounding, ()) if all(type(x) is float for x in rounding.values()) else None
            case _:
                return None


class ContentCheck:
    """Looks at one tensor's contents, chunk by chunk; `faults` says what it found once it has seen them all.

    Attributes:
        off_grid: experts that packing rounds.
    """

    def __init__(self, entry: Entry, recipe: Recipe | None):
        self._entry, self._recipe = entry, recipe
        self._counts = {"NaN": 0, "Inf": 0, "scale bytes 255 (NaN)": 0}
        self.off_grid = 0
        self._is_transposed = False  # the first expert off the grid lies on it when read untransposed
        self._error_power = self._power = 0.0

    @property
    def rounding(self) -> float:
        """Relative RMS error of the experts that packing rounds; 0 where all are exact."""
        return packing.relative_rms(self._error_power, self._power)

    def chunks(self) -> Iterator[np.ndarray]:
        """The tensor's bytes: expert by expert where they are to be packed."""
        if self._recipe and self._recipe.pack:
            return self._entry.chunks(self._entry.size_bytes // self._entry.shape[0])
        return self._entry.chunks()

    def see(self, chunk: np.ndarray) -> packing.Packed | None:
        """Takes note of the next bytes; gives them packed where that becomes of them and they are numbers."""
        if self._recipe is None:
            return None
        if self._entry.dtype == "U8":
            if self._recipe.tensor.endswith("scales") and chunk.max(initial=0) == 255:
                self._counts["scale bytes 255 (NaN)"] += int(np.count_nonzero(chunk == 255))
            return None
        magnitudes = chunk.view(np.uint16) & 0x7FFF
        if magnitudes.max(initial=0) >= _BF16_INFINITY:
            self._counts["NaN"] += int(np.count_nonzero(magnitudes > _BF16_INFINITY))
            self._counts["Inf"] += int(np.count_nonzero(magnitudes == _BF16_INFINITY))
            return None
        return self._pack(chunk) if self._recipe.pack else None

    def _pack(self, chunk: np.ndarray) -> packing.Packed:
        weights = chunk.view(ml_dtypes.bfloat16).reshape(self._entry.shape[1:])
        packed = packing.pack(weights)
        if not packed.exact and not self.off_grid:
            self._is_transposed = packing.is_on_grid_untransposed(weights)
        self.off_grid += not packed.exact
        self._error_power += packed.error_power
        self._power += packed.power
        return packed

    def faults(self, quantize_experts: bool) -> list[Fault]:
        """What was seen that may not be, once all chunks were."""
        found = [f"{count:,} {what}" for what, count in self._counts.items() if count]
        if self._is_transposed and not found:
            found = [
                "on the MXFP4 grid when read untransposed, off it as [E, in, out]: "
                "a wrongly transposed export, make it again"
            ]
        elif self.off_grid and not found and not quantize_experts:
            found = [
                f"{self.off_grid} of {self._entry.shape[0]} experts are not on the MXFP4 grid; "
                f"converters.convert --quantize-experts rounds them (relative RMS error {self.rounding:.3g})"
            ]
        return [tensor_fault(self._entry.file, self._entry.name, what) for what in found]
