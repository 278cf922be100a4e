"""Hugging Face's model on the same GPU, experts in bfloat16 as it runs them without further kernels.

Its process never asks JAX for a device: JAX keeps what it has taken of the card, and bfloat16 experts need most of it.
"""

from benchmarks.gpu.options import config_path
from benchmarks.gpu.results import Results
from benchmarks.peers import Transformers
from gptoss_jax.model.config import read_config

CONTEXT_TOKENS, STEPS, PROMPT_TOKENS = 1024, 32, 2048
ROUNDS = 3
THREADS = 8


def run(results: Results) -> int:
    """Decoding and prefill of the 20b, the best of a few rounds; gives the exit code."""
    if absent := Transformers.why_not("cuda"):
        results.leave_out("transformers", absent)
        return 0
    model = Transformers(read_config(config_path("gpt-oss-20b")), threads=THREADS, device="cuda")
    for kind, measure in (
        ("decoding", lambda: model.decode(1, CONTEXT_TOKENS, STEPS)),
        ("prefill", lambda: model.prefill(1, PROMPT_TOKENS)),
    ):
        rates = [measure() for _ in range(ROUNDS + 1)][1:]
        entry = {"what": kind, "tokens_per_second": max(rates), "slowest": min(rates)}
        results.add(
            "transformers", entry, f"transformers, 20b: {kind} {max(rates):,.1f} tokens/s (from {min(rates):,.1f})"
        )
    return 0
