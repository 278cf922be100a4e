"""The vocabulary, read once for all commands that tests run: `tests/processes.py` imports this before it forks."""

from gptoss_jax.harmony.tokenizer import load_tokenizer

load_tokenizer()
