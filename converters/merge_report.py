"""What merging an adapter does to a model: for each matrix what rounding leaves of it, and what the whole model loses.

Measured before anything is written, on a text: the best is one of the kind that the adapter was trained on.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptoss_jax.checkpoints import peft
from gptoss_jax.checkpoints.export import Export, ExportError, Progress
from gptoss_jax.checkpoints.merging import Loss, Merger
from gptoss_jax.errors import GptossError
from gptoss_jax.model import adapters
from gptoss_jax.model.adapters import LowRank

FILE = "merge_report.json"
BFLOAT16, EXPORTED = "merged, bfloat16", "merged, MXFP4"
ROW_TOKENS, MAX_TOKENS = 512, 1024  # of a row, and of all that is measured
LITTLE = 0.5  # kept of a difference: less, and the table marks the matrix
TEXT = """Sleet had been falling since noon, and the ferry was late again. "If it leaves at 4:35 and takes fifty
minutes, when are we there?" asked Mira. Her brother counted on his fingers: "Twenty-five past five." He was right.

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

To find the area of a rectangle, multiply its length by its width: 12 m by 7 m gives 84 square metres. A glacier is a
body of dense ice that moves slowly under its own weight; most of the fresh water on Earth is stored in glaciers.
"""
"""What is measured on where no text is given: a little of everything, which says less than one's own."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What merging does.

    Attributes:
        format: that the export is of.
        losses: by matrix.
        divergences: by model, `runtime.merge_loss.Divergence`: the base, and the adapter merged before and after
            rounding to MXFP4, where that is done.
        exported: which of them is written.
        tokens: how many were measured.
        adapter_sha256: of the adapter's weights.
    """

    format: str
    losses: Mapping[str, Loss]
    divergences: Mapping[str, Any]
    exported: str
    tokens: int
    adapter_sha256: str

    @property
    def is_lost(self) -> bool:
        """Whether the merged model is nearer to the base than to the adapter's."""
        return self.divergences[self.exported].is_nearer_the_base

    def text(self) -> str:
        """For people: the table of matrices, and the models below it."""
        width = max(map(len, [*self.losses, *self.divergences]))
        lines = [f"{'matrix':{width}}  delta/W    kept   error  weights  nibbles   scales", *self._rows(width), ""]
        lines.append(
            f"{f'on {self.tokens:,} tokens':{width}}  KL(adapter || it)  KL(base || it)  same token as adapter"
        )
        for name, found in self.divergences.items():
            from_adapter, from_base = f"{found.from_adapter:.3g}", f"{found.from_base:.3g}"
            lines.append(f"{name:{width}}  {from_adapter:>17}  {from_base:>14}  {found.agrees:>21.1%}")
        return "\n".join(lines)

    def _rows(self, width: int) -> list[str]:
        rows = []
        for path, loss in self.losses.items():
            shares = (
                f"{loss.changed / loss.weights:8.1%} {_share(loss.nibbles, loss):>8} {_share(loss.scales, loss, 32):>8}"
            )
            mark = "  lost in rounding" if loss.kept < LITTLE else ""
            rows.append(f"{path:{width}}  {loss.delta:7.2g} {loss.kept:7.1%} {loss.error:7.3g} {shares}{mark}")
        return rows

    def document(self, *, accepted: bool) -> bytes:
        """The same as JSON, to lie beside the weights."""
        matrices = {
            path: loss._asdict() | {"delta": loss.delta, "kept": loss.kept, "error": loss.error}
            for path, loss in self.losses.items()
        }
        content = {
            "format": self.format,
            "adapter_sha256": self.adapter_sha256,
            "exported": self.exported,
            "tokens": self.tokens,
            "divergences": {name: found._asdict() for name, found in self.divergences.items()},
            "nearer_the_base": self.is_lost,
            "loss_accepted": accepted,
            "matrices": matrices,
        }
        return json.dumps(content, indent=2).encode() + b"\n"

    def refusal(self) -> str:
        """One line: why the merged model is not worth writing, and what to do."""
        found = self.divergences[self.exported]
        lost = sum(loss.kept < LITTLE for loss in self.losses.values())
        why = (
            f"merged, the model is nearer to the base than to the adapter's: KL(adapter || merged) "
            f"{found.from_adapter:.3g}, KL(base || merged) {found.from_base:.3g} nats a token; {lost} of "
            f"{len(self.losses)} matrices lost more than {1 - LITTLE:.0%} of their delta in rounding"
        )
        bf16 = "--keep-scales, --format bf16 or " if self.exported == EXPORTED else ""
        return (
            f"{why}: train longer or with a larger --lora-alpha, or all weights with --quantize-from; or take {bf16}"
            "--keep-adapter; --accept-loss writes it all the same"
        )


def _share(count: int, loss: Loss, weights_each: int = 1) -> str:
    """Of codes or scales; of a matrix that is not packed: none."""
    return f"{count * weights_each / loss.weights:.1%}" if loss.packed else "-"


def measure(
    export: Export, folder: Path, factors: Mapping[str, LowRank], merger: Merger, text: Path | None, show: Progress
) -> Report:
    """Merges all of the adapter, leaf by leaf and for the numbers alone, and runs the models that come of it.

    Args:
        export: of the base.
        folder: the adapter's.
        factors: what `peft.read` gives of it.
        merger: makes what is exported; its losses are then those of the report.
        text: a file to measure on: conversations if its name ends with .jsonl; None: TEXT.
        show: shows how far it is.

    Raises:
        ExportError: a text that is of no use here.
        CheckpointError: the checkpoint is damaged.
        GptossError: an adapter that cannot be merged.
    """
    packs = export.packs and adapters.have_experts(factors)
    merges = {BFLOAT16: Merger(export.config, factors, pack=False), EXPORTED: merger} if packs else {BFLOAT16: merger}
    exported = EXPORTED if packs else BFLOAT16
    rows, measured = _tokens(text)
    if (largest := max(map(max, rows))) >= export.config.vocab_size:
        raise ExportError(
            f"{text or 'the text to measure on'}: has token id {largest}, but the model knows "
            f"{export.config.vocab_size}: give a --text that it can read"
        )
    from gptoss_jax.runtime import merge_loss  # here, since it imports JAX

    with show("measuring", export.leaves_bytes, 0) as report_bytes:
        found = merge_loss.measure(
            export.checkpoint,
            export.config,
            export.records,
            factors,
            merges,
            merge_loss.Text.of(rows, measured),
            report_bytes,
        )
    losses = {path: merger.losses[path] for path in adapters.targets(export.config) if path in factors}
    digest = hashlib.sha256((folder / peft.WEIGHTS).read_bytes()).hexdigest()
    return Report(export.format, losses, found, exported, sum(map(sum, measured)), digest)


Rows = tuple[list[list[int]], list[list[bool]]]
"""Token ids, row by row, and after which of them predictions are compared."""


def _tokens(text: Path | None) -> Rows:
    """At most MAX_TOKENS tokens to measure on."""
    if text is not None and text.suffix == ".jsonl":
        return _conversations(text)
    from gptoss_jax.cli import flag_values
    from gptoss_jax.harmony.tokenizer import load_tokenizer

    ids = load_tokenizer().encode(TEXT if text is None else flag_values.read_text(str(text)))[:MAX_TOKENS]
    rows = [ids[first : first + ROW_TOKENS] for first in range(0, len(ids), ROW_TOKENS)]
    return rows, [[True] * len(row) for row in rows]


def _conversations(path: Path) -> Rows:
    """The first ones, as training reads them, compared where the assistant's tokens are predicted."""
    from gptoss_jax.training import corpus

    found = corpus.read([str(path)], row_tokens=1 << 20)
    rows, measured, left = [], [], MAX_TOKENS
    for first, end in zip(found.offsets[:-1], found.offsets[1:], strict=True):
        end = min(int(end), int(first) + min(ROW_TOKENS, left))
        learned = [*found.learned[first + 1 : end].tolist(), False]  # whether the next token is the assistant's
        if end - first > 1 and any(learned):
            rows.append(found.ids[first:end].tolist())
            measured.append(learned)
            left -= end - int(first)
        if left <= 1:
            break
    if not rows:
        raise ExportError(f"{path}: no conversation in which the assistant speaks within {ROW_TOKENS} tokens")
    return rows, measured


def beside(export: Export, folder: Path) -> Export:
    """The export of the base as it is, with the adapter in its folder adapter/."""
    copied = {f"adapter/{name}": _content(folder / name) for name in (peft.CONFIG, peft.WEIGHTS)}
    return dataclasses.replace(export, small_files={**export.small_files, **copied})


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise GptossError(f"{path}: {error.strerror}") from None
