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

OURS = (  # number format of the activations, of the dense weights, kernels
    ("float32", "bfloat16", "auto"),
    ("bfloat16", "bfloat16", "auto"),
    ("bfloat16", "bfloat16", "expert_mlp=reference"),
    ("bfloat16", "int8", "auto"),
)


def main() -> None:
    """One row per range of positions: mean KL divergence from transformers in float32, nats, and top-1 agreement."""
    positions, expected = GOLDEN["long_positions"], GOLDEN["long_float32"]
    with tempfile.TemporaryDirectory() as folder:
        published = TinyModel(tiny_config()).write(Path(folder))
        tokens = GOLDEN["long_tokens"].tolist()
        ours = [
            gptoss_jax.load(published, dtype=dtype, dense=dense, kernels=kernels).logits(tokens)[positions]
            for dtype, dense, kernels in OURS
        ]
    print("| positions | float32 | bfloat16 | its products exact | bfloat16, dense int8 | transformers, bfloat16 |")
    print("|---|---|---|---|---|---|")
    for low, high in pairwise(GOLDEN["range_edges"]):
        here = (positions >= low) & (positions < high)
        cells = []
        for logits in (*ours, GOLDEN["long_bfloat16"]):
            top1 = (logits[here].argmax(-1) == expected[here].argmax(-1)).mean()
            cells.append(f"{divergence(expected[here], logits[here]).mean():.1e}, {100 * top1:.1f} %")
        print(f"| {low} to {high} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
