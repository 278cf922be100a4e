"""Write a gpt-oss checkpoint of seeded random weights in a published format, streamed in bounded memory.

    python -m converters.random_weights DST --config configs/tiny.json --layout huggingface --seed 0

Every tensor is a function of the seed, its name in the Hugging Face MXFP4 format, and its shape, so that all
formats of one config and seed hold the same model. The gains keep every part of the network at work, so that
a mistake in any of them shows in the logits. Knows no model code, no JAX and no trained weights.
"""

if __name__ == "__main__":  # before what takes long to import
    from gptoss_jax.cli import interrupts

    interrupts.end_at_once()

import time
from pathlib import Path
from typing import Any

from absl import flags

from converters.random_checkpoint import FORMATS, SHARD_BYTES, with_vocab_size, write_checkpoint
from gptoss_jax.cli import command
from gptoss_jax.errors import GptossError
from gptoss_jax.files import of_configs, read_json
from gptoss_jax.model.config import read_config


def define_flags() -> None:
    """This command's flags."""
    flags.DEFINE_string("config", None, "config.json of the model, in the Hugging Face spelling", required=True)
    flags.DEFINE_enum("layout", "huggingface", list(FORMATS), "published format to write")
    flags.DEFINE_integer("seed", 0, "seed of the weights; all formats of one seed hold the same model")
    flags.DEFINE_integer("vocab_size", None, "vocabulary size in place of the config's", lower_bound=3)
    flags.DEFINE_integer(
        "shard_bytes",
        None,
        "most bytes in one file (Hugging Face formats; 4.8e9 if not given)",
        lower_bound=1,
    )


def main(arguments: list[str]) -> None:
    """Writes what the flags say."""
    options = flags.FLAGS
    if len(arguments) != 1:
        raise GptossError(f"expected one folder to write, DST, got {arguments or 'none'}")
    if options.layout == "openai" and options.shard_bytes is not None:
        raise GptossError("--shard-bytes is for the Hugging Face formats: --layout openai is one file")
    started = time.monotonic()
    config = _read_config(of_configs(options.config), options.vocab_size)
    size = write_checkpoint(
        arguments[0],
        config,
        format=options.layout,
        seed=options.seed,
        shard_bytes=options.shard_bytes or SHARD_BYTES,
    )
    seconds = time.monotonic() - started
    what = f"{options.layout} format, {size:,} bytes of random weights, seed {options.seed}"
    print(f"{arguments[0]}: {what}, {seconds:.1f} s")


def _read_config(path: Path, vocab_size: int | None) -> dict[str, Any]:
    """The raw config, checked by the product's own reader."""
    read_config(path)
    config = read_json(path)
    return config if vocab_size is None else with_vocab_size(config, vocab_size)


def cli() -> None:
    """The console script."""
    define_flags()
    command.run(main, "random_weights")


if __name__ == "__main__":
    cli()
