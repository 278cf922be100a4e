"""Which matrices can have an adapter of low rank beside them, and of what shape: names and numbers, without JAX."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from gptoss_jax.errors import GptossError, short
from gptoss_jax.model.config import ModelConfig

GROUPS = {
    "attention": ("attention/q", "attention/k", "attention/v", "attention/out"),
    "router": ("moe/router",),
    "experts": ("moe/gate_up", "moe/down"),
    "unembedding": ("unembedding",),
}
"""What can be asked for, and the matrices of a layer (the unembedding: of the model) that it means."""

Axes = tuple[str | None, ...]


class LowRank(NamedTuple):
    """The two factors of one adapter: where W x stood, W x + b (a x) stands, the scale alpha / R being part of b."""

    a: Any  # [R, *in], of experts [E, R, in]
    b: Any  # [*out, R], of experts [E, out, R]


class Target(NamedTuple):
    """A matrix W [*out, *in], or one [out, in] for each of E experts, as an adapter sees it."""

    weight: str  # path of the leaf that holds W, or of an expert matrix's blocks
    experts: int  # E; 0 where it is no expert's
    out: tuple[int, ...]
    inputs: tuple[int, ...]
    out_axes: Axes
    in_axes: Axes

    def shapes(self, rank: int) -> LowRank:
        """The shapes of the factors."""
        lead = (self.experts,) if self.experts else ()
        return LowRank((*lead, rank, *self.inputs), (*lead, *self.out, rank))

    @property
    def axes(self) -> LowRank:
        """The logical axes of the factors."""
        lead = ("experts",) if self.experts else ()
        return LowRank((*lead, None, *self.in_axes), (*lead, *self.out_axes, None))


def targets(config: ModelConfig, groups: Iterable[str] = tuple(GROUPS)) -> dict[str, Target]:
    """The matrices that `groups` name, by path, as in "layers/0/attention/q".

    Raises:
        GptossError: a group that there is none of.
    """
    groups = tuple(groups)
    for group in groups:
        if group not in GROUPS:
            raise GptossError(f"adapter target {short(group)}, expected some of {', '.join(GROUPS)}")
    kinds = _kinds(config)
    found = {}
    for layer in range(config.num_layers):
        for name in (name for group in groups if group != "unembedding" for name in GROUPS[group]):
            path = f"layers/{layer}/{name}"
            found[path] = Target(f"{path}/{'blocks' if kinds[name][0] else 'weight'}", *kinds[name])
    if "unembedding" in groups:
        hidden = (config.hidden_size,)
        found["unembedding"] = Target("unembedding", 0, (config.vocab_size,), hidden, ("vocab",), (None,))
    return found


def _kinds(config: ModelConfig) -> dict[str, tuple[int, tuple[int, ...], tuple[int, ...], Axes, Axes]]:
    hidden, inner, experts = (config.hidden_size,), (config.intermediate_size,), config.num_experts
    heads, kv_heads = (config.num_heads, config.head_dim), (config.num_kv_heads, config.head_dim)
    whole, by_head, by_inner = (None,), ("heads", None), ("expert_hidden",)
    return {
        "attention/q": (0, heads, hidden, by_head, whole),
        "attention/k": (0, kv_heads, hidden, by_head, whole),
        "attention/v": (0, kv_heads, hidden, by_head, whole),
        "attention/out": (0, hidden, heads, whole, by_head),
        "moe/router": (0, (experts,), hidden, whole, whole),
        "moe/gate_up": (experts, (2 * config.intermediate_size,), hidden, by_inner, whole),
        "moe/down": (experts, hidden, inner, whole, by_inner),
    }


def check(config: ModelConfig, adapters: Mapping[str, LowRank]) -> None:
    """Refuses adapters that are not of this model.

    Raises:
        GptossError: a matrix that it has not, or factors of other shapes than the matrix asks for.
    """
    known = targets(config)
    for path, factors in adapters.items():
        if path not in known:
            raise GptossError(
                f"adapter of {short(path)}: this model has no such matrix; is it another model's adapter?"
            )
        rank = factors.b.shape[-1]
        wanted = known[path].shapes(rank)
        found = LowRank(tuple(factors.a.shape), tuple(factors.b.shape))
        if found != wanted:
            raise GptossError(
                f"adapter of {path}: factors of shapes {found.a} and {found.b}, expected {wanted.a} and {wanted.b} for "
                f"rank {rank}; is it another model's adapter?"
            )


def have_experts(paths: Iterable[str]) -> bool:
    """Whether any of the matrices `paths` is the experts'."""
    return any(path.endswith(GROUPS["experts"]) for path in paths)
