"""Gives all rows that were never trained one meaning: unknown to read, and never drawn.

    python -m demo.seal TRAINED SEALED

In the embedding they get the row of the word that stands for unknown words in
the data, so that a question with words that nobody trained reads as one about
the unknown. In the unembedding they get one row whose logit is far below all
others wherever a token is drawn: along the direction that is positive on every
such hidden state of many conversations, held-out ones among them. gpt-oss has
no bias in the unembedding that could do it, and training alone leaves single
states where these 200,000 rows together have a percent.

The command fails where the margin is too small; training goes on then, or
begins again from demo.fresh, which gives the model such a direction.
"""

if __name__ == "__main__":  # before what takes long to import
    from gptoss_jax.cli import interrupts

    interrupts.end_at_once()

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from absl import flags
from jaxtyping import Bool, Float

from demo import data, vocabulary
from gptoss_jax.cli import command
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony import messages as harmony_messages
from gptoss_jax.training.examples import ExampleMaker

CONVERSATIONS = 400
MARGIN = 40.0
"""Least nats from the likeliest logit down to that of the rows which were never trained: 200,000 of them have e^-28."""
_RIDGE = 1e-3  # of the mean square of the states
_ROUNDS, _SHARPNESS = 40, 12.0  # of the search; how much more the states count that are nearest to 0
_AIM = 60.0  # how far below 0 the logit is at the nearest state


class Sealed(NamedTuple):
    """The row for all that was never trained, and how far below the likeliest its logits are.

    Attributes:
        row: of the unembedding.
        least_margin: nats, over all states that were looked at.
        mean_margin: nats.
    """

    row: Float[np.ndarray, "D"]
    least_margin: float
    mean_margin: float


def define_flags() -> None:
    """This command's flags."""
    flags.DEFINE_integer("seed", 1, "SEED: Of the conversations that the hidden states are taken from.")


def main(arguments: list[str]) -> None:
    """Writes what the flags say."""
    options = flags.FLAGS
    if len(arguments) != 2:
        raise GptossError(f"expected two folders, the trained checkpoint and a new one, got {arguments or 'none'}")
    found = seal(Path(arguments[0]), Path(arguments[1]), seed=options.seed)
    print(
        f"{arguments[1]}: rows out of use are {found.least_margin:.1f} nats or more below the likeliest, "
        f"{found.mean_margin:.1f} on average"
    )


def seal(source: Path, dst: Path, *, seed: int) -> Sealed:
    """Writes the sealed checkpoint.

    Raises:
        GptossError: no checkpoint of ours, one whose unused rows differ, or one whose hidden states leave no margin.
    """
    from gptoss_jax.checkpoints import opening
    from gptoss_jax.checkpoints.orbax import manifest, writer
    from gptoss_jax.model import sharding, transformer

    one_device = sharding.make()
    stored = opening.open_weights(source)
    leaves = dict(stored.read(transformer.declare(stored.config, one_device).leaves, one_device))
    embedding, unembedding = (np.array(leaves[name]) for name in ("embedding", "unembedding"))
    unused = vocabulary.unused(unembedding)
    found = find_row(_states(source, seed), unembedding[~unused].astype(np.float32))
    if found.least_margin < MARGIN:
        raise GptossError(
            f"{source}: rows out of use come within {found.least_margin:.1f} nats of the likeliest, expected "
            f"{MARGIN:.0f} at least: train for longer, or from new weights of demo.fresh"
        )
    embedding[unused] = embedding[vocabulary.unknown_id()]
    unembedding[unused] = found.row.astype(ml_dtypes.bfloat16)
    origin = manifest.read_provenance(source) if manifest.is_checkpoint(source) else {}
    provenance = {**origin, "sealed by": "demo.seal"}
    writer.save(dst, {**leaves, "embedding": embedding, "unembedding": unembedding}, stored.config, provenance)
    return found


def find_row(states: Float[np.ndarray, "S D"], used: Float[np.ndarray, "U D"]) -> Sealed:
    """The row whose logit is lowest, and alike, on all states.

    Args:
        states: what the unembedding reads where a token is drawn: the residual stream after the last norm.
        used: rows of the unembedding that are in use.

    Raises:
        GptossError: no direction is positive on all states.
    """
    ridge = _RIDGE * float(np.square(states).mean()) * len(states) * np.eye(states.shape[1])
    total, logits = np.zeros(states.shape[1]), np.zeros(len(states))
    for rounds in range(1, _ROUNDS + 1):  # as in boosting: the mean of solutions that each see to the worst states
        weights = np.exp(-_SHARPNESS * (logits - logits.min()))
        weighted = states * (weights / weights.mean())[:, None]
        total += np.linalg.solve(weighted.T @ states + ridge, weighted.sum(axis=0))
        logits = states @ (total / rounds)
    direction, least = total / _ROUNDS, float(logits.min())
    if least <= 0:
        raise GptossError("no row of the unembedding is below the others on all hidden states: begin from demo.fresh")
    row = (-_AIM / least * direction).astype(ml_dtypes.bfloat16).astype(np.float32)
    margins = (states @ used.T).max(axis=1) - states @ row
    return Sealed(row, float(margins.min()), float(margins.mean()))


def _states(checkpoint: Path, seed: int) -> Float[np.ndarray, "S D"]:
    """The final residual stream after the norm, wherever the model speaks in many conversations, half held out."""
    import gptoss_jax

    model = gptoss_jax.load(checkpoint, dtype="float32")
    tap = f"layers/{model.config.num_layers - 1}/residual"
    found = [model.activations(ids, [tap])[tap][drawn_at] for ids, drawn_at in _ids(seed)]
    stream = np.concatenate(found).astype(np.float64)
    scale = np.sqrt(np.square(stream).mean(axis=1, keepdims=True) + model.config.rms_norm_eps)
    return stream / scale * np.asarray(model.params["norm"]).astype(np.float64)


def _ids(seed: int) -> Iterator[tuple[list[int], np.ndarray]]:
    """Token ids, and the places after which the model draws one."""
    maker = ExampleMaker()
    for held_out in (False, True):
        for example in data.examples(CONVERSATIONS // 2, seed=seed, held_out=held_out):
            for turn in maker.examples(harmony_messages.from_json(example.document)):
                yield turn.ids, np.flatnonzero(np.frombuffer(turn.learned, np.uint8)) - 1


def is_sealed(embedding: np.ndarray, unused: Bool[np.ndarray, "V"]) -> bool:
    """Whether all rows out of use read as the unknown word."""
    return bool((embedding[unused] == embedding[vocabulary.unknown_id()]).all())


def cli() -> None:
    """What `python -m` runs."""
    define_flags()
    command.run(main, "seal")


if __name__ == "__main__":
    cli()
