"""What an engine is asked and what it answers: requests of token ids, events of tokens, the sizes it is made for.

Knows no JAX, so that a request is checked before JAX is imported.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

from gptoss_jax.engine.constraint import Constraint
from gptoss_jax.engine.sampling_params import SamplingParams, check_whole, whole_numbers
from gptoss_jax.errors import GptossError, short
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.config_ranges import MAX_STOP_IDS

T = TypeVar("T")

NOT_FINITE = "logits are not finite; check the checkpoint (convert --verify) and the kernels"

NOT_HELD = "the form that the answer is held to could not be followed any further: its grammar met a limit"

FinishReason = Literal["stop", "length", "error", "constraint"]


class RequestError(GptossError):
    """A request that this engine can never serve."""


def to_ids(name: str, ids: Any) -> tuple[int, ...]:
    """Ids in any sequence, of any whole type, NumPy's too, as a request holds them.

    Raises:
        RequestError: something else, called `name`.
    """
    return _refused(whole_numbers, name, ids)


def to_whole(name: str, value: Any) -> int:
    """A whole number of any type, NumPy's too.

    Raises:
        RequestError: something else, called `name`.
    """
    return _refused(check_whole, name, value)


def _refused(check: Callable[..., T], *arguments: Any) -> T:
    """What `check` gives for these arguments; what it refuses is a RequestError."""
    try:
        return check(*arguments)
    except GptossError as error:
        raise RequestError(str(error)) from None


class NumericsError(GptossError):
    """The model gave logits that are not finite: its weights or a kernel are at fault."""


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """What the programs are compiled for.

    Attributes:
        slots: requests that run at once.
        max_context_tokens: prompt and answer of one request, at most.
        prefill_widths: tokens per slot of each prefill program; a prompt goes through the widest, its tail through the
            narrowest that holds it.
        pool_tokens: tokens that the full-attention layers can hold for all slots together; a request waits until its
            pages are free. None: enough for every slot at its longest.
        deterministic: a request's tokens and log probabilities are bitwise the same alone, in any company and in any
            order; unless kernels are batch invariant, weights are then read once for every slot. None: on CPUs.
        prefix_snapshots: how many beginnings of prompts can be found again in the cache, so that a prompt which goes on
            from one need not read it; each takes as much memory as a slot's sliding-window layers (of the 20b 3.1 MB,
            of the 120b 4.7 MB). None: one for each slot, 16 at least, no more than there is use for. 0: no prefix is
            looked for, and nothing is allocated or compiled for it.
    """

    slots: int = 1
    max_context_tokens: int = 4096
    prefill_widths: tuple[int, ...] = (128,)
    pool_tokens: int | None = None
    deterministic: bool | None = None
    prefix_snapshots: int | None = None

    def __post_init__(self):
        for name, least in (("slots", 1), ("max_context_tokens", 1), ("pool_tokens", 1), ("prefix_snapshots", 0)):
            value = getattr(self, name)
            if name in ("pool_tokens", "prefix_snapshots") and value is None:
                continue
            if check_whole(name, value) < least:
                raise GptossError(f"{name} is {value}, expected at least {least}")
        widths = whole_numbers("prefill_widths", self.prefill_widths)
        if not widths or min(widths) < 1:
            raise GptossError(f"prefill_widths is {widths}, expected widths of at least 1")
        if self.deterministic not in (None, False, True):
            raise GptossError(f"deterministic is {short(self.deterministic)}, expected True, False or None")


@dataclasses.dataclass(frozen=True)
class Request:
    """Token ids to go on from.

    Attributes:
        token_ids: the prompt.
        stop_ids: ids after which the answer ends; the id itself is part of the answer.
        max_new_tokens: length of the answer at most; None: as far as the context goes.
        sampling: how tokens are drawn.
        ends_at: called with each token of the answer in order; true if the answer ends with it (a stop string, which
            only the caller's text can show). One request, one such function: it may keep state, and must not raise.
        constraint: the form that the answer is held to; its `end_ids` become stop ids. None: none.

    Raises:
        RequestError: a field of another type. Ids may be of any whole type, and in any sequence, NumPy's too.
    """

    token_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    max_new_tokens: int | None = None
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    ends_at: Callable[[int], bool] | None = None
    constraint: Constraint | None = None

    def __post_init__(self):
        for name in ("token_ids", "stop_ids"):
            object.__setattr__(self, name, to_ids(name, getattr(self, name)))
        if self.max_new_tokens is not None:
            to_whole("max_new_tokens", self.max_new_tokens)
        if not isinstance(self.sampling, SamplingParams):
            raise RequestError(f"sampling is {short(self.sampling)}, expected SamplingParams")
        if self.ends_at is not None and not callable(self.ends_at):
            raise RequestError(f"ends_at is {short(self.ends_at)}, expected a function of a token id, or None")
        if not isinstance(self.constraint, Constraint | None):
            raise RequestError(f"constraint is {short(self.constraint)}, expected a Constraint, or None")
        if self.constraint:
            stop_ids = dict.fromkeys((*self.constraint.end_ids, *self.stop_ids))
            object.__setattr__(self, "stop_ids", tuple(stop_ids))

    def check(self, config: ModelConfig, engine_config: EngineConfig) -> int:
        """How many tokens the answer may have at most.

        Raises:
            RequestError: no model of `config` in an engine of `engine_config` can serve this.
        """
        context = engine_config.max_context_tokens
        if context > config.max_context_tokens:
            raise RequestError(f"max_context_tokens is {context}, the model has {config.max_context_tokens} at most")
        if not self.token_ids:
            raise RequestError("the prompt has no tokens, expected at least one")
        for position, token in enumerate(self.token_ids):
            if not 0 <= token < config.vocab_size:
                raise RequestError(
                    f"token id {token} at position {position} is outside the vocabulary, "
                    f"expected 0 to {config.vocab_size - 1}"
                )
        if len(self.stop_ids) > MAX_STOP_IDS:
            raise RequestError(f"{len(self.stop_ids)} stop ids, expected at most {MAX_STOP_IDS}")
        if any(not 0 <= stop < config.vocab_size for stop in self.stop_ids):
            raise RequestError(f"stop ids {self.stop_ids}, expected ids from 0 to {config.vocab_size - 1}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")
        _refused(self.sampling.check, config.num_token_ids)
        if self.constraint:
            self._check_constraint(self.constraint, config)
        limit = self.max_new_tokens or context - len(self.token_ids)
        if limit < 1 or len(self.token_ids) + limit > context:
            raise RequestError(
                f"a prompt of {len(self.token_ids)} tokens and an answer of up to {max(limit, 1)} exceed the context "
                f"of {context} tokens: shorten them, or raise max_context_tokens"
            )
        return limit

    def _check_constraint(self, constraint: Constraint, config: ModelConfig) -> None:
        if constraint.num_ids > config.vocab_size:
            raise RequestError(
                f"the form of the answer speaks of {constraint.num_ids} ids, but the model has {config.vocab_size}"
            )
        if self.sampling.never_drawn:
            raise RequestError(
                "ids are banned (banned_ids, or logit_bias of -inf) where the answer is held to a form: leave one of "
                "both out, since nothing might be left to draw"
            )


class Event(NamedTuple):
    """News of one request: tokens in the order drawn; the last event of a request says why it ended."""

    request_id: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # natural logarithm, at temperature 1
    finish_reason: FinishReason | None
    step: int = 0  # tokens of the answer before these
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()  # per token, if asked for: id and logprob, best first
    cached_tokens: int = 0  # of the prompt, which the prefix cache held when the request first got a slot
