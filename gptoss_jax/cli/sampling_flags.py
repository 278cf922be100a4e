"""The flags that say how tokens are drawn and what the engine is compiled for.

Those of numbers follow from `SamplingParams`, where each option has its default, range and help.
"""

import secrets
from collections import Counter
from collections.abc import Sequence
from typing import Any

from absl import flags

from gptoss_jax.cli.flag_values import naming_flags, token_ids
from gptoss_jax.engine.constraint import Constraint
from gptoss_jax.engine.request import EngineConfig, Request
from gptoss_jax.engine.sampling_params import OPTIONS, SamplingParams
from gptoss_jax.errors import GptossError
from gptoss_jax.model.config import ModelConfig

_IN_HELP = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "banned_ids",
    "seed",
    "stop",
    "stop_ids",
    "top_logprobs",
)
SAMPLING_FLAGS = (*_IN_HELP, *(name for name in OPTIONS if name not in _IN_HELP))
"""In the order of --help; an option that has no place there comes last."""
ENGINE_FLAGS = ("max_context_tokens", "deterministic")


class _SeedParser(flags.IntegerParser):
    """A whole number; -1 and `random` draw one, which is then the flag's value and is echoed like any other."""

    def parse(self, argument: str | int) -> int:
        drawn = str(argument).lower() in ("-1", "random")
        return secrets.randbelow(2**32) if drawn else super().parse(argument)


def define_flags() -> None:
    """The flags named in SAMPLING_FLAGS and ENGINE_FLAGS."""
    for name, option in OPTIONS.items():
        if name == "seed":
            flags.DEFINE(_SeedParser(), name, SamplingParams.seed, option.help)
            continue
        define = flags.DEFINE_float if option.dtype == "float32" else flags.DEFINE_integer
        define(name, getattr(SamplingParams, name), option.help)
    flags.DEFINE_integer("max_new_tokens", None, "N: Length of an answer at most; left out: what the context holds.")
    flags.DEFINE_list("logit_bias", [], "ID=X,...: Added to logits, by token id: 1234=2.5,99=-1; -inf bans.")
    flags.DEFINE_list("banned_ids", [], "IDS: Token ids never to draw: 1,2,3. (Ids that name no token never are.)")
    flags.DEFINE_multi_string("stop", [], "TEXT: The answer ends before this text; repeat the flag for several.")
    flags.DEFINE_list("stop_ids", [], "IDS: Token ids that end the answer, beside the model's own: 1,2,3.")

    flags.DEFINE_integer("max_context_tokens", 4096, "N: Prompt and answer at most; memory follows it.")
    flags.DEFINE_bool("deterministic", None, "Same bits alone and in any batch; left out: on CPUs only.")


def sampling(options: flags.FlagValues) -> SamplingParams:
    """How tokens are drawn.

    Raises:
        GptossError: a value out of its range.
    """
    numbers: dict[str, Any] = {name: options[name].value for name in OPTIONS}
    biases, banned = _biases(options.logit_bias), token_ids("banned_ids", options.banned_ids)
    with naming_flags():
        return SamplingParams(**numbers, logit_bias=biases, banned_ids=banned)


def request(
    options: flags.FlagValues,
    config: ModelConfig,
    prompt_ids: Sequence[int],
    sampling: SamplingParams,
    constraint: Constraint | None = None,
) -> Request:
    """The request of one prompt, checked against the model before its weights are read.

    Raises:
        GptossError: the model cannot serve it.
    """
    stop_ids = tuple(dict.fromkeys((*config.stop_ids, *token_ids("stop_ids", options.stop_ids))))
    made = Request(tuple(prompt_ids), stop_ids, options.max_new_tokens, sampling, constraint=constraint)
    with naming_flags():
        made.check(config, engine_config(options))
    return made


def engine_config(
    options: flags.FlagValues, slots: int = 1, *, pool_tokens: int | None = None, prefix_cache: bool = True
) -> EngineConfig:
    """What the engine is compiled for.

    Args:
        options: the command's flags.
        slots: requests that run at once.
        pool_tokens: as in EngineConfig.
        prefix_cache: whether another prompt may begin as one before it.

    Raises:
        GptossError: a size that cannot be.
    """
    with naming_flags():
        return EngineConfig(
            slots=slots,
            max_context_tokens=options.max_context_tokens,
            pool_tokens=pool_tokens,
            deterministic=options.deterministic,
            prefix_snapshots=None if prefix_cache else 0,
        )


def _biases(pairs: Sequence[str]) -> dict[int, float]:
    try:
        biases = [(int(token), float(bias)) for token, bias in (pair.split("=") for pair in pairs)]
    except ValueError:
        raise GptossError(f"--logit-bias is {','.join(pairs)!r}, expected pairs such as 1234=2.5,99=-inf") from None
    for token, count in Counter(token for token, _ in biases).items():
        if count > 1:
            raise GptossError(f"--logit-bias names id {token} {count} times, expected once")
    return dict(biases)
