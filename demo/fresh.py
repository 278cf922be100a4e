"""Writes random weights for the demo model to be trained from, as a checkpoint.

    python -m demo.fresh FRESH --data data.jsonl --config configs/demo.json --seed 0

Rows of the embedding and of the unembedding begin as sums of random vectors,
one for each digit or letter of the token at its place: 417 is 4 hundreds, 1
ten, 7 ones; so what is learned of a number's digits holds for numbers that are
rare. All other matrices are normal, sinks and biases 0, norms 1.

Rows that the data do not use are all equal, so that they compress away. Their
row of the unembedding points against the first axis of the residual stream,
which every token sets and no layer writes to at first: their logits are far
below the others'. demo.seal makes sure of it after training.
"""

if __name__ == "__main__":  # before what takes long to import
    from gptoss_jax.cli import interrupts

    interrupts.end_at_once()

import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import flags

from demo import vocabulary
from gptoss_jax.checkpoints import packing
from gptoss_jax.cli import command
from gptoss_jax.errors import GptossError
from gptoss_jax.files import of_configs
from gptoss_jax.model.config import ModelConfig, read_config

CONSTANT = 2.0  # what every token's embedding holds at the first axis
UNUSED_LOGIT = -40.0  # about: the constant, over the stream's root mean square, times this
_OWN, _SHARED = 0.5, 0.6  # deviation of a row's own vector, and of each of its digits' or letters', in the embedding
_OWN_LOGIT, _SHARED_LOGIT = 0.02, 0.05  # the same in the unembedding: logits begin near 0
_BFLOAT16 = ml_dtypes.bfloat16


def define_flags() -> None:
    """This command's flags."""
    flags.DEFINE_string(
        "data", None, "FILE: The conversations to be trained on, as demo.data writes them.", required=True
    )
    flags.DEFINE_string("config", "configs/demo.json", "FILE: config.json of the model, in the Hugging Face spelling.")
    flags.DEFINE_integer("seed", 0, "SEED: The same seed gives the same weights.")


def main(arguments: list[str]) -> None:
    """Writes what the flags say."""
    options = flags.FLAGS
    if len(arguments) != 1:
        raise GptossError(f"expected one folder to write, got {arguments or 'none'}")
    config = read_config(of_configs(options.config))
    used = vocabulary.used_ids(options.data)
    write(arguments[0], config, used, seed=options.seed)
    print(f"{arguments[0]}: {len(used):,} of {config.vocab_size:,} rows are in use, seed {options.seed}")


def write(dst: str | Path, config: ModelConfig, used: list[int], *, seed: int) -> None:
    """Writes a checkpoint of random weights at `dst`.

    Raises:
        CheckpointError: `dst` exists.
    """
    from gptoss_jax.checkpoints.orbax import writer

    random = {"files": [{"metadata": {"weights": f"random, seed {seed}"}}]}  # so that they are not taken for trained
    writer.save(dst, dict(leaves(config, used, seed=seed)), config, {"made by": "demo.fresh", "source": random})


def leaves(config: ModelConfig, used: list[int], *, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Every leaf of a model with random weights, as the model declares it.

    Args:
        config: the model.
        used: ids whose rows are their own, sorted.
        seed: of all values; a leaf's follow from it and the leaf's name.
    """
    from gptoss_jax.model import sharding, transformer  # here, so that a mistake is found before JAX is imported

    for name, leaf in transformer.declare(config, sharding.make()).leaves.items():
        shape = leaf.shape
        kind = name.rpartition("/")[2]
        if name in ("embedding", "unembedding"):
            yield name, _rows(name, shape, used, seed)
        elif kind == "blocks":
            yield from _experts(name.removesuffix("/blocks"), shape, config, seed)
        elif kind != "scales":  # which come with the blocks
            inputs = math.prod(shape[-leaf.num_inputs :]) if leaf.num_inputs else shape[-1]
            yield name, _dense(name, shape, inputs, config, seed).astype(_BFLOAT16)


def _generator(name: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _rows(name: str, shape: tuple[int, ...], used: list[int], seed: int) -> np.ndarray:
    random, (vocab_size, width) = _generator(name, seed), shape
    own, shared = (_OWN, _SHARED) if name == "embedding" else (_OWN_LOGIT, _SHARED_LOGIT)
    table = shared * random.standard_normal((vocabulary.NUM_FEATURES, width), np.float32)
    found = own * random.standard_normal((len(used), width), np.float32) + vocabulary.features(used) @ table
    if name == "embedding":
        found[:, 0] = CONSTANT
        unused = found[used.index(vocabulary.unknown_id())]
    else:
        found[:, 0] = 0
        unused = np.eye(width, dtype=np.float32)[0] * UNUSED_LOGIT
    rows = np.empty((vocab_size, width), _BFLOAT16)
    rows[:] = unused
    rows[used] = found
    return rows


def _dense(name: str, shape: tuple[int, ...], inputs: int, config: ModelConfig, seed: int) -> np.ndarray:
    if name.endswith("norm"):
        return np.ones(shape, np.float32)
    if name.endswith(("bias", "sinks")):
        return np.zeros(shape, np.float32)
    weights = _generator(name, seed).standard_normal(shape, np.float32) / math.sqrt(inputs)
    if name.endswith("out/weight"):
        weights /= math.sqrt(2 * config.num_layers)
        weights[0] = 0  # the first axis of the residual stream stays constant
    return weights


def _experts(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    experts, out, blocks, _ = shape
    inputs = blocks * packing.BLOCK
    weights = _generator(name, seed).standard_normal((experts, inputs, out), np.float32) / math.sqrt(inputs)
    if name.endswith("down"):
        weights *= 1.5 / math.sqrt(2 * config.num_layers)
        weights[:, :, 0] = 0
    packed = [packing.pack(expert.astype(_BFLOAT16)) for expert in weights]
    yield f"{name}/blocks", np.stack([expert.blocks for expert in packed])
    yield f"{name}/scales", np.stack([expert.scales for expert in packed])


def cli() -> None:
    """What `python -m` runs."""
    define_flags()
    command.run(main, "fresh")


if __name__ == "__main__":
    cli()
