"""The table of chips: what their makers publish, with the source of each; and slices of them, as `--on` names them.

Rates are of one chip; a chip that JAX sees as two devices gives each half of them.
"""

import math
import re
from typing import NamedTuple

from gptoss_jax.errors import GptossError, short

MOST_CHIPS = 65_536
_GIB, _GB, _TERA = 1 << 30, 1e9, 1e12
_TPU = "docs.cloud.google.com/tpu/docs"


class SliceError(GptossError):
    """A slice that names no chips of the table."""


class Chip(NamedTuple):
    """One kind of chip.

    Attributes:
        name: as people say it.
        platform: JAX's: gpu, tpu, cpu.
        devices: that JAX sees in one chip.
        memory_bytes: of one device, that programs may use: a GPU's as its driver says, a TPU's as its compiler allows.
        flops: multiplications and additions a second, dense, bfloat16. None: not published, as of a simulated device.
        hbm_bytes: that memory gives a second.
        link_bytes: that all links to other chips send a second, in one direction: half of what is published for both.
        dimensions: of a slice's shape; 0: chips are counted.
        expert_layout: how packed experts lie: published, words or float4 (docs/kernels.md).
        launches: (per layer, beside the layers) of a decoding step, by `benchmarks.ahead_of_time launches`; None: not
            counted.
        source: of the figures.
        retiles: whether decoding holds weights once more, in tiles of 16 rows, as the compiler for TPU v7x has it.
    """

    name: str
    platform: str
    devices: int
    memory_bytes: int
    flops: float | None
    hbm_bytes: float | None
    link_bytes: float | None
    dimensions: int
    expert_layout: str
    launches: tuple[float, float] | None
    source: str
    retiles: bool = False


CHIPS = {
    "h100": Chip(
        "H100 SXM", "gpu", 1, int(79.6 * _GIB), 989.4 * _TERA, 3350 * _GB, 450 * _GB, 0, "published", (16, 19),
        "NVIDIA H100 data sheet: 989.4 TFLOP/s dense, 3.35 TB/s, NVLink 900 GB/s both ways; memory as the driver says",
    ),
    "h200": Chip(
        "H200", "gpu", 1, 151_397_597_184, 989.4 * _TERA, 4800 * _GB, 450 * _GB, 0, "published", (16, 19),
        "NVIDIA H200 data sheet: H100's arithmetic and NVLink, 4.8 TB/s; memory: XLA's h200.txtpb",
    ),
    "b200": Chip(
        "B200", "gpu", 1, 191_514_411_008, 2250 * _TERA, 8000 * _GB, 900 * _GB, 0, "published", None,
        "NVIDIA DGX B200 data sheet, an eighth: 2.25 PFLOP/s dense, 8 TB/s, NVLink 1.8 TB/s both ways; memory: XLA's "
        "b200.txtpb",
    ),
    "v5e": Chip(
        "TPU v5e", "tpu", 1, int(15.75 * _GIB), 197 * _TERA, 819 * _GB, 200 * _GB, 2, "words", None,
        f"{_TPU}/v5e: 197 TFLOP/s, 819 GB/s, ICI 400 GB/s both ways; memory: libtpu's limit",
    ),
    "v5p": Chip(
        "TPU v5p", "tpu", 1, int(95.74 * _GIB), 459 * _TERA, 2765 * _GB, 600 * _GB, 3, "words", None,
        f"{_TPU}/v5p: 459 TFLOP/s, 2,765 GB/s, ICI 1,200 GB/s both ways; memory: libtpu's limit",
    ),
    "v6e": Chip(
        "TPU v6e", "tpu", 1, int(31.25 * _GIB), 918 * _TERA, 1638 * _GB, 400 * _GB, 2, "words", None,
        f"{_TPU}/v6e: 918 TFLOP/s, 1,638 GB/s, ICI 800 GB/s both ways; memory: libtpu's limit",
    ),
    "tpu7x": Chip(
        "TPU7x", "tpu", 2, int(94.75 * _GIB), 2307 * _TERA, 7380 * _GB, 600 * _GB, 3, "float4", None,
        f"{_TPU}/tpu7x: 2,307 TFLOP/s, 7,380 GB/s, ICI 1,200 GB/s both ways; memory: libtpu's limit", True,
    ),
    "cpu": Chip(
        "simulated CPU device", "cpu", 1, 0, None, None, None, 1, "published", None,
        "no rates: devices that JAX simulates on one machine share its cores and its memory",
    ),
}  # fmt: skip
EXAMPLES = "h200x8, h100x4, b200x1, v5e:2x4, v6e:2x4, v5p:2x2x2, tpu7x:2x2x1 or cpu:8"


class Slice(NamedTuple):
    """So many chips of a kind, all of them linked."""

    name: str  # as --on gave it
    chip: Chip
    chips: int

    @property
    def devices(self) -> int:
        """That JAX sees."""
        return self.chips * self.chip.devices


def parse_slice(text: str) -> Slice:
    """A slice by its name: GPUs as h200x8, TPUs as v6e:2x4 (their shape), simulated devices as cpu:8.

    Raises:
        SliceError: another name.
    """
    found = re.fullmatch(r"([a-z]+\d+[a-z]?|cpu)(?:x(\d{1,6})|:(\d{1,6}(?:x\d{1,6}){0,2}))?", text.strip().lower())
    chip = CHIPS.get(found[1]) if found else None
    if found is None or chip is None:
        raise SliceError(f"slice {short(text)}, expected for example {EXAMPLES}")
    sizes = [int(size) for size in (found[2] or found[3] or "").split("x") if size]
    if (found[2] is not None) != (chip.dimensions == 0) or len(sizes) != max(1, chip.dimensions):
        wanted = {0: f"{found[1]}x8", 1: "cpu:8", 2: f"{found[1]}:2x4", 3: f"{found[1]}:2x2x1"}[chip.dimensions]
        raise SliceError(f"slice {short(text)}: expected it as in {wanted}")
    if not 1 <= math.prod(sizes) <= MOST_CHIPS:
        raise SliceError(f"slice {short(text)} has {math.prod(sizes)} chips, expected 1 to {MOST_CHIPS:,}")
    return Slice(text.strip().lower(), chip, math.prod(sizes))
