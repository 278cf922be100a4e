"""Prints the fidelity table of docs/numerics.md: how far we, and transformers in bfloat16, are from float32.

python -m tests.fidelity
"""

import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np

import gptoss_jax
from tests.gate import TinyModel
from tests.goldens.make import divergence, tiny_config

GOLDEN = np.load(Path(__file__).parent / "goldens" / "tiny.npz")


def main() -> None:
    """One row per range of positions: mean KL divergence in nats, and top-1 agreement in float32."""
    positions, expected = GOLDEN["long_positions"], GOLDEN["long_float32"]
    with tempfile.TemporaryDirectory() as folder:
        published = TinyModel(tiny_config()).write(Path(folder))
        tokens = GOLDEN["long_tokens"].tolist()
        ours = {
            dtype: gptoss_jax.load(published, dtype=dtype).logits(tokens)[positions]
            for dtype in ("float32", "bfloat16")
        }
    print("| positions | ours, float32 | top-1 | ours, bfloat16 | transformers, bfloat16 |")
    print("|---|---|---|---|---|")
    for low, high in pairwise(GOLDEN["range_edges"]):
        here = (positions >= low) & (positions < high)
        top1 = (ours["float32"][here].argmax(-1) == expected[here].argmax(-1)).mean()
        float32, bfloat16, theirs = (
            divergence(expected[here], logits[here]).mean()
            for logits in (ours["float32"], ours["bfloat16"], GOLDEN["long_bfloat16"])
        )
        print(f"| {low} to {high} | {float32:.1e} | {100 * top1:.0f} % | {bfloat16:.1e} | {theirs:.1e} |")


if __name__ == "__main__":
    main()
