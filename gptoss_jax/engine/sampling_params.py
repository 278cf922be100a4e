"""How one request draws its tokens: every option described once, with its range, array type and help.

Checks, the arrays of `gptoss_jax.engine.sampling`, command-line flags and the echo of settings all follow from the
fields here. Knows no JAX. To add an option, add its field here, and where it acts in `sampling.py`.
"""

import dataclasses
import math
import numbers
import operator
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from gptoss_jax.errors import GptossError, short

MAX_TEMPERATURE = 1e4  # where every distribution is flat; float32 would overflow far beyond
MAX_LOGIT_BIAS = 100  # as in OpenAI's API
MAX_TOP_LOGPROBS = 20


class Option(NamedTuple):
    """What there is to know of one option that is a number.

    Attributes:
        low: its lowest value.
        high: its highest value.
        dtype: of its array, one number per slot.
        help: its flag's help: the value's name, a colon, and what it does.
    """

    low: int | float
    high: int | float
    dtype: str
    help: str


def _number(default: int | float, low: int | float, high: int | float, help: str, dtype: str = "float32") -> Any:
    return dataclasses.field(default=default, metadata={"option": Option(low, high, dtype, help)})


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request draws its tokens. The options act in the order in which they stand here, seed last.

    Attributes:
        repetition_penalty: of every id in the prompt or the answer, a positive logit is divided by this and a
            negative one multiplied (CTRL, arXiv:1909.05858); 1 is off.
        frequency_penalty: taken from an id's logit once for each time the answer holds it (OpenAI's API).
        presence_penalty: taken once from the logit of every id that the answer holds.
        logit_bias: added to the logits of these ids; -inf bans one.
        banned_ids: never drawn.
        temperature: divides the logits; 0 takes the likeliest token, the lowest id among equals.
        top_k: only the k likeliest ids can be drawn (and those equal to the k-th); 0 is off.
        top_p: only the likeliest ids whose probabilities, among those that top_k leaves, first reach this sum (and
            those equal to the last); at least one id; 1 is off.
        min_p: only ids at least this share as likely as the likeliest; 0 is off.
        top_logprobs: how many of the likeliest ids are reported beside the chosen one.
        seed: the same seed, prompt and options give the same tokens.

    Penalties are bounded as in OpenAI's API and vLLM. Log probabilities are the model's own, before any of these. Ids
    that the vocabulary does not name are never drawn.

    Raises:
        GptossError: a value out of its range.
    """

    repetition_penalty: float = _number(
        1.0, 0.01, 100.0, "X: Divides the logits of tokens in prompt or answer; 1 is off."
    )
    frequency_penalty: float = _number(
        0.0, -2.0, 2.0, "X: Taken from a logit for each time the answer holds the token."
    )
    presence_penalty: float = _number(0.0, -2.0, 2.0, "X: Taken once from the logits of what the answer holds.")
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    banned_ids: tuple[int, ...] = ()
    temperature: float = _number(
        1.0, 0.0, MAX_TEMPERATURE, "X: Divides the logits; 0 takes the likeliest token each time."
    )
    top_k: int = _number(0, 0, 2**31 - 1, "N: Draw among the k likeliest tokens only; 0 is off.", "int32")
    top_p: float = _number(1.0, 0.0, 1.0, "P: Draw among the likeliest that first reach this probability; 1 is off.")
    min_p: float = _number(0.0, 0.0, 1.0, "P: Draw among those at least this share as likely as the first; 0 is off.")
    top_logprobs: int = _number(
        0, 0, MAX_TOP_LOGPROBS, "N: Report this many of the likeliest at each step, up to 20 (--json).", "int32"
    )
    seed: int = _number(
        0,
        0,
        2**32 - 1,
        "N: Same seed, prompt and settings: same tokens, so two runs without it answer alike; -1 or random draws one.",
        "uint32",
    )

    def __post_init__(self):
        for name, option in OPTIONS.items():
            value = getattr(self, name)
            (check_number if option.dtype == "float32" else check_whole)(name, value)
            if not option.low <= value <= option.high:
                raise GptossError(f"{name} is {value}, expected {option.low:.10g} to {option.high:.10g}")
        if not isinstance(self.logit_bias, Mapping):
            raise GptossError(f"logit_bias is {short(self.logit_bias)}, expected a mapping from ids to numbers")
        for name in ("logit_bias", "banned_ids"):
            whole_numbers(name, getattr(self, name))
        for token, bias in self.logit_bias.items():
            check_number(f"logit_bias of id {token}", bias)
            if not (abs(bias) <= MAX_LOGIT_BIAS or bias == -math.inf):
                raise GptossError(
                    f"logit_bias of id {token} is {bias}, expected -{MAX_LOGIT_BIAS} to {MAX_LOGIT_BIAS}, "
                    "or -inf to ban the id"
                )

    @property
    def never_drawn(self) -> set[int]:
        """Ids that are banned, one way or the other."""
        return {*self.banned_ids, *(token for token, bias in self.logit_bias.items() if bias == -math.inf)}

    def check(self, num_token_ids: int) -> None:
        """Raises GptossError where an id does not exist among `num_token_ids`, or nothing is left to draw."""
        for name, ids in (("logit_bias", self.logit_bias), ("banned_ids", self.banned_ids)):
            for token in ids:
                if not 0 <= token < num_token_ids:
                    raise GptossError(f"{name} names id {token}, expected ids from 0 to {num_token_ids - 1}")
        if len(self.never_drawn) == num_token_ids:
            raise GptossError(f"all {num_token_ids} ids are banned, expected at least one that may be drawn")


OPTIONS: Mapping[str, Option] = {
    field.name: field.metadata["option"] for field in dataclasses.fields(SamplingParams) if "option" in field.metadata
}
"""The options that are numbers, by name."""


def check_number(name: str, value: Any) -> None:
    """Raises GptossError for what is no number."""
    if not isinstance(value, numbers.Real):
        raise GptossError(f"{name} is {short(value)}, expected a number")


def check_whole(name: str, value: Any) -> int:
    """The number, of any whole type, NumPy's too; raises GptossError for what is no whole number."""
    try:
        return operator.index(value)
    except TypeError:
        raise GptossError(f"{name} is {short(value)}, expected a whole number") from None


def whole_numbers(name: str, values: Any) -> tuple[int, ...]:
    """The numbers; raises GptossError for what is no list of whole numbers."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable) or getattr(values, "shape", None) == ():
        raise GptossError(f"{name} is {short(values)}, expected a list of whole numbers")
    return tuple(check_whole(f"an id in {name}", value) for value in values)
