"""How a model is fine-tuned: every option with its range, checked before anything is read. Knows no JAX."""

import dataclasses
import math
import numbers
from collections.abc import Collection, Mapping
from typing import Any

from gptoss_jax.errors import GptossError, short

METHODS = ("lora", "full")
OPTIMIZERS = ("adamw", "muon")
DTYPES = ("float32", "bfloat16")
CHANNELS = ("analysis", "commentary", "final")
LORA_TARGETS = ("attention", "router", "experts", "unembedding")
MUON_MATRIX_RATE = 0.03

_LARGEST_COUNT = 2**31 - 1


class OptionError(GptossError):
    """An option that has a value which it cannot have, or two that exclude each other."""


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """Low-rank adapters (arXiv:2106.09685): W x + alpha / rank * B A x, of which A and B are trained.

    Attributes:
        rank: rows of A and columns of B.
        alpha: the scale of what is added, before it is divided by the rank.
        dropout: share of an adapter's inputs that is set to zero at each step.
        targets: of LORA_TARGETS, the parts of the model that get adapters.

    Raises:
        OptionError: a value out of its range.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("attention", "experts")

    def __post_init__(self):
        _check_count("rank", self.rank)
        _check_number("alpha", self.alpha, above=0.0)
        _check_number("dropout", self.dropout, low=0.0, below=1.0)
        object.__setattr__(self, "targets", _subset("targets", self.targets, LORA_TARGETS))


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """How weights change: AdamW (arXiv:1711.05101), or Muon for matrices and AdamW for the rest.

    Attributes:
        name: of OPTIMIZERS.
        learning_rate: AdamW's, at its highest.
        matrix_learning_rate: Muon's, at its highest; None is MUON_MATRIX_RATE where Muon is used.
        weight_decay: times the learning rate, the share of a weight that each step takes away; not of norms, biases and
            sinks.
        warmup: share of the run in which the rate rises linearly from 0.
        decay_from: share of the run from which the rate falls linearly to 0; 1 keeps it.
        clip: gradients are scaled to this global norm where theirs is larger; 0 leaves them as they are.

    Raises:
        OptionError: a value out of its range, or a rate that the optimizer does not use.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    matrix_learning_rate: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.03
    decay_from: float = 0.0
    clip: float = 1.0

    def __post_init__(self):
        _check_one_of("optimizer", self.name, OPTIMIZERS)
        _check_number("learning_rate", self.learning_rate, above=0.0)
        if self.name == "muon" and self.matrix_learning_rate is None:
            object.__setattr__(self, "matrix_learning_rate", MUON_MATRIX_RATE)
        if self.matrix_learning_rate is not None:
            if self.name != "muon":
                raise OptionError("matrix_learning_rate is muon's, got optimizer adamw: leave one of them out")
            _check_number("matrix_learning_rate", self.matrix_learning_rate, above=0.0)
        _check_number("weight_decay", self.weight_decay, low=0.0)
        _check_number("warmup", self.warmup, low=0.0, high=1.0)
        _check_number("decay_from", self.decay_from, low=0.0, high=1.0)
        _check_number("clip", self.clip, low=0.0)


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """A whole run: what is trained, on how much of which tokens, and how it is computed.

    Attributes:
        batch_rows: rows of a step, over all devices and all parts that gradients are accumulated over.
        row_tokens: tokens of a row, into which conversations are packed.
        steps: length of the run; or `epochs`, of which exactly one is given.
        epochs: how often the run goes through the conversations; a half goes through half of them.
        method: "lora" trains adapters, "full" every weight.
        lora: the adapters; the defaults where the method is "lora" and none are given.
        optimizer: how weights change.
        accumulate: parts of a step's rows whose gradients are added up one after the other.
        seed: of weights, order and dropout.
        quantize_from: share of the run from which experts are rounded to MXFP4 in the forward pass, their gradients
            passed straight through; None never does.
        balance_loss: weight of the loss that spreads tokens over experts; 0 is off.
        rematerialize: whether layers are computed again in the backward pass, which saves memory.
        compact_vocabulary: whether embeddings keep only the rows of tokens that the conversations hold.
        dtype: of DTYPES, in which activations are computed.
        channels: of CHANNELS, those of the assistant's messages that are learned.

    Raises:
        OptionError: a value out of its range, or two that exclude each other.
    """

    batch_rows: int
    row_tokens: int
    steps: int | None = None
    epochs: float | None = None
    method: str = "lora"
    lora: LoraOptions | None = None
    optimizer: OptimizerOptions = dataclasses.field(default_factory=OptimizerOptions)
    accumulate: int = 1
    seed: int = 0
    quantize_from: float | None = None
    balance_loss: float = 0.0
    rematerialize: bool = False
    compact_vocabulary: bool = False
    dtype: str = "float32"
    channels: tuple[str, ...] = CHANNELS

    def __post_init__(self):
        self._check_method()
        self._check_length()
        _check_whole("seed", self.seed, 0, 2**32 - 1)
        _check_number("balance_loss", self.balance_loss, low=0.0)
        _check_flag("rematerialize", self.rematerialize)
        _check_flag("compact_vocabulary", self.compact_vocabulary)
        _check_one_of("dtype", self.dtype, DTYPES)
        object.__setattr__(self, "channels", _subset("channels", self.channels, CHANNELS))

    def _check_method(self) -> None:
        _check_one_of("method", self.method, METHODS)
        if self.method == "lora" and self.lora is None:
            object.__setattr__(self, "lora", LoraOptions())
        if self.method == "full" and self.lora is not None:
            raise OptionError("lora is given, but method is full, which has no adapters: leave one of them out")
        if self.quantize_from is None:
            return
        _check_number("quantize_from", self.quantize_from, low=0.0, high=1.0)
        if self.method == "lora":
            raise OptionError("quantize_from needs method full, got lora, whose experts stay as they are")

    def _check_length(self) -> None:
        for name in ("batch_rows", "accumulate"):
            _check_count(name, getattr(self, name))
        _check_whole("row_tokens", self.row_tokens, 2, _LARGEST_COUNT)
        if self.batch_rows % self.accumulate:
            raise OptionError(f"batch_rows is {self.batch_rows}, expected a multiple of accumulate, {self.accumulate}")
        if (self.steps is None) == (self.epochs is None):
            got = "neither" if self.steps is None else "both"
            raise OptionError(f"got {got} of steps and epochs, expected exactly one of them")
        if self.steps is not None:
            _check_count("steps", self.steps)
        if self.epochs is not None:
            _check_number("epochs", self.epochs, above=0.0)


def to_dict(options: TrainOptions) -> dict[str, Any]:
    """The options as JSON holds them; `from_dict` takes them back."""
    return _plain(dataclasses.asdict(options))


def from_dict(values: Mapping[str, Any]) -> TrainOptions:
    """The options that `to_dict` wrote.

    Raises:
        OptionError: a key that no option has, one that is needed and absent, or a value out of its range.
    """
    fields = _known(values, TrainOptions, "options")
    if fields.get("lora") is not None:
        fields["lora"] = LoraOptions(**_known(fields["lora"], LoraOptions, "lora"))
    if "optimizer" in fields:
        fields["optimizer"] = OptimizerOptions(**_known(fields["optimizer"], OptimizerOptions, "optimizer"))
    absent = [name for name in ("batch_rows", "row_tokens") if name not in fields]
    if absent:
        raise OptionError(f"options have no {absent[0]}, which is needed")
    return TrainOptions(**fields)


def _plain(value: Any) -> Any:
    """Tuples as lists, since JSON has no other."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _known(values: object, kind: type, name: str) -> dict[str, Any]:
    """A copy of the values, whose keys have to be fields of a dataclass, with tuples for JSON's lists."""
    names = [field.name for field in dataclasses.fields(kind)]
    if not isinstance(values, Mapping):
        raise OptionError(f"{name}: got {short(values)}, expected an object with some of {', '.join(names)}")
    for key in values:
        if key not in names:
            raise OptionError(f"{name}: got the unknown key {short(key)}, expected some of {', '.join(names)}")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


# ---- checks of one value ----


def _check_count(name: str, value: object) -> None:
    _check_whole(name, value, 1, _LARGEST_COUNT)


def _check_whole(name: str, value: object, low: int, high: int) -> None:
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or not low <= int(value) <= high:  # pyright: ignore[reportArgumentType]
        raise OptionError(f"{name} is {short(value)}, expected a whole number from {low} to {high}")


def _check_number(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> None:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not (low <= value <= high and above < value < below):  # pyright: ignore[reportOperatorIssue]
        ends = {"of at least": low, "of at most": high, "above": above, "below": below}
        wanted = " and ".join(f"{word} {end:g}" for word, end in ends.items() if math.isfinite(end))
        raise OptionError(f"{name} is {short(value)}, expected a number {wanted}")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise OptionError(f"{name} is {short(value)}, expected True or False")


def _check_one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise OptionError(f"{name} is {short(value)}, expected one of {', '.join(known)}")


def _subset(name: str, values: object, known: tuple[str, ...]) -> tuple[str, ...]:
    """Some of the known words, at least one, in their order."""
    if isinstance(values, str) or not isinstance(values, Collection):
        raise OptionError(f"{name} is {short(values)}, expected a list of some of {', '.join(known)}")
    for value in values:
        if value not in known:
            raise OptionError(f"{name} holds {short(value)}, expected some of {', '.join(known)}")
    if not values:
        raise OptionError(f"{name} is empty, expected at least one of {', '.join(known)}")
    return tuple(word for word in known if word in values)
