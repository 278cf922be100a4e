"""Makes tests/goldens/tiny.npz: logits of transformers' GptOssForCausalLM, which nobody here wrote.

    pip install torch==2.13.0 transformers==5.23.0 accelerate    # any CPU build
    python -m tests.goldens.make                                 # at the root; 90 s, 8 GB of memory

The model is configs/tiny.json with a vocabulary of 512 and the random weights of seed 0, its experts
dequantised by transformers from MXFP4. T is 9000; the ranges of positions lie between `range_edges`.

    long_tokens [T]             one sequence
    long_positions [P]          24 positions in each range, its borders among them
    long_float32 [P, 512]       logits there, computed in float32
    long_bfloat16 [P, 512]      the same model and tokens in bfloat16 (every value is one; stored as float32)
    long_bfloat16_kl [T]        KL(float32 || bfloat16) in nats at every position
    range_edges [5]             0, 128, 4096, 8192, 9000
    range_bfloat16_kl [4]       its mean over each range: the gap that bfloat16 may have
    short_tokens [8, 320]       eight more sequences
    short_float32 [8, 4, 512]   logits at their last four positions
    short_bfloat16_kl [8, 320]  KL at every position, since one bfloat16 run is a noisy measure
    meta                        JSON: versions, seeds, the config
"""

# pyright: reportMissingImports=false
# (torch and transformers are installed by `make gates` alone, and imported where they are asked for)

import json
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np

from converters.random_checkpoint import with_vocab_size, write_checkpoint

ROOT = Path(__file__).parents[2]
WEIGHTS_SEED = 0
VOCAB = 512
EDGES = (0, 128, 4096, 8192, 9000)
LONG_SEED, SHORT_SEEDS, SHORT_TOKENS = 100, tuple(range(101, 109)), 320


def tiny_config() -> dict:
    """configs/tiny.json with a vocabulary small enough to keep logits in a repository."""
    return with_vocab_size(json.loads((ROOT / "configs" / "tiny.json").read_text()), VOCAB)


def two_layers_config() -> dict:
    """The same with two layers, one of each kind, for what needs no depth."""
    return tiny_config() | {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}


def token_ids(count: int, seed: int) -> np.ndarray:
    """`count` token ids below 512, from the raw bits of a generator."""
    return (np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count) % VOCAB).astype(np.int64)


def golden_positions() -> np.ndarray:
    """24 positions in each range: evenly spread, and those beside its borders."""
    spread = [np.linspace(low, high - 1, 21).astype(int) for low, high in pairwise(EDGES)]
    borders = [[low + 1, low + 2, high - 2] for low, high in pairwise(EDGES)]
    return np.unique(np.concatenate(spread + borders))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    logits = logits.astype(np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def divergence(logits: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(logits || other) in nats, over the last axis."""
    p, q = log_softmax(logits), log_softmax(other)
    return (np.exp(p) * (p - q)).sum(axis=-1)


def load_transformers(checkpoint: Path, dtype: str):
    """transformers' model, in eval mode, experts dequantised to `dtype`: "float32" or "bfloat16"."""
    import torch
    from transformers import AutoConfig, GptOssForCausalLM, Mxfp4Config

    for function in (torch.cos, torch.sin, torch.exp):
        function(torch.ones(64))  # their first use, if in several threads at once, can go wrong
    packed = hasattr(AutoConfig.from_pretrained(checkpoint), "quantization_config")
    options = {"quantization_config": Mxfp4Config(dequantize=True)} if packed else {}
    return GptOssForCausalLM.from_pretrained(
        checkpoint, dtype=getattr(torch, dtype), attn_implementation="eager", **options
    ).eval()


def transformers_logits(model, tokens: np.ndarray) -> np.ndarray:
    """Logits [T, V] of one sequence as float32, computed in the model's dtype."""
    import torch

    with torch.inference_mode():
        return model(torch.from_numpy(tokens)[None], use_cache=False).logits[0].float().numpy()


def make() -> dict[str, np.ndarray]:
    """The arrays of the file."""
    import torch
    import transformers

    config = tiny_config()
    sequences = [token_ids(EDGES[-1], LONG_SEED)] + [token_ids(SHORT_TOKENS, seed) for seed in SHORT_SEEDS]
    logits = {}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, config, seed=WEIGHTS_SEED)
        for dtype in ("float32", "bfloat16"):
            model = load_transformers(Path(folder), dtype)
            logits[dtype] = [transformers_logits(model, tokens) for tokens in sequences]
    kl = [divergence(a, b) for a, b in zip(logits["float32"], logits["bfloat16"], strict=True)]
    positions = golden_positions()
    meta = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "weights_seed": WEIGHTS_SEED,
    }
    meta |= {"long_seed": LONG_SEED, "short_seeds": SHORT_SEEDS, "config": config}
    return {
        "long_tokens": sequences[0].astype(np.uint16),
        "long_positions": positions,
        "long_float32": logits["float32"][0][positions],
        "long_bfloat16": logits["bfloat16"][0][positions],
        "long_bfloat16_kl": kl[0].astype(np.float32),
        "range_edges": np.array(EDGES),
        "range_bfloat16_kl": np.array([kl[0][low:high].mean() for low, high in pairwise(EDGES)]),
        "short_tokens": np.stack(sequences[1:]).astype(np.uint16),
        "short_float32": np.stack([x[-4:] for x in logits["float32"][1:]]),
        "short_bfloat16_kl": np.stack(kl[1:]).astype(np.float32),
        "meta": np.array(json.dumps(meta)),
    }


def main():
    """Writes the file beside this script."""
    path = Path(__file__).with_name("tiny.npz")
    arrays = make()
    np.savez_compressed(path, allow_pickle=False, **arrays)
    print(f"{path}: {path.stat().st_size:,} bytes")
    print("bfloat16 KL per range:", arrays["range_bfloat16_kl"], "short:", arrays["short_bfloat16_kl"].mean())


if __name__ == "__main__":
    main()
