"""A mesh without its devices: its axes, rules that say which axis cuts what, its exchange, what it cuts evenly.

Knows no JAX, so that a mesh can be planned where there is none of its devices. `sharding.py` puts devices in.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptoss_jax.errors import GptossError, short
from gptoss_jax.files import FileError, of_configs, read_json
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.config_ranges import MXFP4_BLOCK

MOST_DEVICES = 999_999_999  # of one axis: a typing error, not a machine, has more
PAGE_TOKENS = 64  # that a device holds of each page of keys and values
MESH_AXES = ("data", "expert", "tensor", "sequence")

# Logical axis -> the mesh axes that cut it, outermost first. To add a mesh axis, add it above and use it here.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data",),
    "pages": ("data",),
    "positions": ("sequence",),
    "heads": ("tensor",),
    "experts": ("expert",),
    "expert_hidden": ("tensor",),
    "vocab": ("expert", "tensor", "sequence"),
}

AUTO = "auto"
EXCHANGES = ("sum", "gather", "all_to_all")  # how tokens meet experts of other devices; `exchange.py` has them
RAGGED_PLATFORMS = ("gpu", "tpu")  # whose compilers know an all-to-all of as many rows as there are


class MeshError(GptossError):
    """A mesh or a rule that this model or these devices cannot follow."""


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """The axes of a mesh and the rules by which logical axes are laid over them.

    Attributes:
        axes: size of each mesh axis; one that is left out is 1.
        rules: logical axis -> mesh axes.
        exchange: of EXCHANGES, or AUTO: see `choose_exchange`.

    Raises:
        MeshError: rules that name what is not there, or that no model could follow.
    """

    axes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rules: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: RULES)
    exchange: str = AUTO

    def __post_init__(self):
        check_rules(self.rules, MESH_AXES)
        choose_exchange(self.exchange, self.mesh_axes)
        if shared := set(self.mesh_axes("experts")) & set(self.mesh_axes("expert_hidden")):
            raise MeshError(
                f"rules cut both experts and expert_hidden by {', '.join(sorted(shared))}: "
                "a mesh axis can cut one axis of an array only"
            )

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.axes.values())

    def mesh_axes(self, logical: str) -> tuple[str, ...]:
        """Mesh axes that cut `logical`."""
        return self.rules.get(logical, RULES[logical])

    def size(self, *logical: str) -> int:
        """Shards into which the mesh axes that cut any of `logical` cut together: devices of a sum over them."""
        axes = {axis for name in logical for axis in self.mesh_axes(name)}
        return math.prod(self.axes.get(axis, 1) for axis in axes)

    @property
    def exchange_name(self) -> str:
        """Of EXCHANGES, the one that is asked for or follows from the rules."""
        return choose_exchange(self.exchange, self.mesh_axes)

    @property
    def pooled_batches(self) -> int:
        """Batch shards that share a set of experts: shards of the mesh axes that cut both."""
        return math.prod(self.axes.get(axis, 1) for axis in _cuts_both(self.mesh_axes))

    def expert_width(self, config: ModelConfig) -> int:
        """Columns of an expert's width that each device holds, zeros included."""
        shards = self.size("expert_hidden")
        return expert_width(config, shards) // shards

    def check(self, config: ModelConfig, slots: int = 1) -> None:
        """Refuses a mesh that does not cut this model and `slots` slots into equal shards.

        Raises:
            MeshError: as `check_even`.
        """
        check_even(config, self.mesh_axes, self.size, slots)

    def __str__(self) -> str:
        """As --mesh takes it, and what rules differ."""
        sizes = [f"{axis}={self.axes[axis]}" for axis in MESH_AXES if self.axes.get(axis, 1) > 1]
        changed = [
            f"{name} over {' and '.join(cut) or 'none'}" for name, cut in self.rules.items() if cut != RULES[name]
        ]
        if self.exchange_name != choose_exchange(AUTO, self.mesh_axes):
            changed.append(f"exchange {self.exchange_name}")
        return ", ".join([",".join(sizes) or "one device", *changed])


def read(mesh: str | Path) -> MeshShape:
    """The mesh of a text or a file, as `sharding.make` takes it.

    Raises:
        MeshError: unknown axis, malformed text.
    """
    raw: dict[str, Any] = (
        _read_file(Path(mesh)) if str(mesh).endswith(".json") else {"axes": _parse(str(mesh)) if mesh else {}}
    )
    for name, size in raw["axes"].items():
        if name not in MESH_AXES:
            raise unknown_axis(name)
        if type(size) is not int or not 1 <= size <= MOST_DEVICES:
            raise MeshError(f"mesh axis {name}={short(size)}, expected a whole number from 1 to {MOST_DEVICES}")
    rules = {name: tuple(axes) for name, axes in raw.get("rules", {}).items()}
    return MeshShape(raw["axes"], {**RULES, **rules}, raw.get("exchange", AUTO))


def num_devices(mesh: str | Path) -> int:
    """How many devices `sharding.make` takes for a mesh that is a text or a file.

    Raises:
        MeshError: as `read`.
    """
    return read(mesh).devices


def num_shards(mesh: str | Path) -> dict[str, int]:
    """Into how many shards `sharding.make` would cut each logical axis, whether or not there are so many devices.

    Raises:
        MeshError: as `read`.
    """
    shape = read(mesh)
    return {logical: shape.size(logical) for logical in shape.rules}


def check_rules(rules: Mapping[str, tuple[str, ...]], axis_names: Sequence[str]) -> None:
    """Refuses rules that name what is not there, or under which sums would mix sequences.

    Raises:
        MeshError: says which rule.
    """

    def cut(logical: str) -> tuple[str, ...]:
        return rules.get(logical, RULES[logical])

    for logical, axes in rules.items():
        if logical not in RULES:
            raise MeshError(f"unknown logical axis {short(logical)} in rules, expected one of {', '.join(RULES)}")
        for axis in axes:
            if axis not in axis_names:
                raise MeshError(f"rule {logical}: unknown mesh axis {short(axis)}, expected {tuple(axis_names)}")
    if cut("pages") != cut("batch"):
        raise MeshError("rules cut pages and batch differently, but a slot's pages lie on its own devices")
    for logical in ("heads", "expert_hidden", "vocab", "positions"):
        if shared := set(cut(logical)) & set(cut("batch")):
            raise MeshError(f"rules cut both batch and {logical} by {', '.join(shared)}: sums would mix sequences")
    if shared := set(cut("heads")) & set(cut("positions")):
        raise MeshError(
            f"rules cut both heads and positions by {', '.join(sorted(shared))}: "
            "a mesh axis can cut one axis of the keys only"
        )


def _cuts_both(mesh_axes: Callable[[str], tuple[str, ...]]) -> list[str]:
    """Mesh axes that cut experts and the batch: each of their devices has experts, and slots, of its own."""
    return [axis for axis in mesh_axes("experts") if axis in mesh_axes("batch")]


def choose_exchange(asked: str, mesh_axes: Callable[[str], tuple[str, ...]]) -> str:
    """Which of EXCHANGES `asked` is under these rules: where it is AUTO, sum if the devices have the same tokens.

    Raises:
        MeshError: there is none of that name, or not under these rules.
    """
    if asked not in (AUTO, *EXCHANGES):
        raise MeshError(f"unknown exchange {short(asked)}, expected one of {', '.join((AUTO, *EXCHANGES))}")
    both = _cuts_both(mesh_axes)
    if asked == "sum" and both:
        raise MeshError(
            f"exchange sum adds what devices make of the same tokens, but rules cut experts and batch by "
            f"{', '.join(both)}: expected gather or all_to_all"
        )
    if asked == "gather" and not both:
        raise MeshError(
            'exchange gather is for experts cut by what cuts the batch, as rules {"experts": ["data"]} do: '
            "expected sum or all_to_all"
        )
    return asked if asked != AUTO else "gather" if both else "sum"


def expert_width(config: ModelConfig, shards: int) -> int:
    """Columns of an expert's width over all `shards`, which hold as many whole MXFP4 blocks each: some may be zeros."""
    blocks = config.intermediate_size // MXFP4_BLOCK
    return -(-blocks // shards) * shards * MXFP4_BLOCK


def check_even(
    config: ModelConfig,
    mesh_axes: Callable[[str], tuple[str, ...]],
    size: Callable[[str], int],
    slots: int,
    *,
    pads: bool = True,
) -> None:
    """Refuses a cut of this model and `slots` slots that does not come out even.

    Args:
        config: the model.
        mesh_axes: logical axis -> mesh axes that cut it.
        size: logical axis -> into how many shards.
        slots: of the batch.
        pads: whether an expert's width may have blocks of zeros at its end, as `gptoss_jax.load` makes them; training
            has none.

    Raises:
        MeshError: names each axis that does not come out even and the sizes that would.
    """
    blocks = config.intermediate_size // MXFP4_BLOCK
    lengths = {
        "heads": (config.num_kv_heads, "key/value heads"),
        "experts": (config.num_experts, "experts"),
        "expert_hidden": (blocks, f"MXFP4 blocks of {MXFP4_BLOCK} in an expert's width"),
        "vocab": (config.vocab_size, "vocabulary ids"),
        "batch": (slots, "slots of the batch"),
        "positions": (-(-config.max_context_tokens // PAGE_TOKENS), f"pages of {PAGE_TOKENS} tokens in the context"),
    }
    faults = []
    for logical, (length, what) in lengths.items():
        shards, may_be_padded = size(logical), pads and logical == "expert_hidden"  # see `expert_width`
        if length % shards and not (may_be_padded and shards <= length):
            legal = [str(n) for n in range(1, min(length, 1024) + 1) if may_be_padded or length % n == 0]
            axes = " * ".join(mesh_axes(logical))
            faults.append(f"{length} {what} over {axes} = {shards} (even: {', '.join(legal)})")
    if faults:
        raise MeshError("the mesh does not divide the model: " + "; ".join(faults))


def unknown_axis(name: Any) -> MeshError:
    """What is said of an axis that is none of MESH_AXES."""
    return MeshError(f"unknown mesh axis {short(name)}, expected {', '.join(MESH_AXES)}")


def _parse(text: str) -> dict[str, Any]:
    pairs = [part.partition("=") for part in text.split(",")]
    if any(not re.fullmatch(r"[0-9]{1,9}", number) for _, _, number in pairs):
        raise MeshError(f"mesh {short(text)}, expected for example data=1,expert=4,tensor=2, or a .json file")
    axes = {name.strip(): int(number) for name, _, number in pairs}
    if len(axes) < len(pairs):
        raise MeshError(f"mesh {short(text)} names an axis twice")
    return axes


def _read_file(path: Path) -> dict[str, Any]:
    try:
        raw = read_json(of_configs(path))
    except FileError as error:
        raise MeshError(f"mesh file {error}") from None
    types = {"axes": dict, "rules": dict, "exchange": str}
    right = isinstance(raw, dict) and "axes" in raw and not raw.keys() - types.keys()
    right = right and all(isinstance(part, types[name]) for name, part in raw.items())
    rules = raw.get("rules", {}).values() if right else ()
    if not right or not all(isinstance(axes, list) and all(isinstance(a, str) for a in axes) for axes in rules):
        raise MeshError(
            f'mesh file {path}: expected {{"axes": {{"expert": 4}}, "rules": {{"heads": ["expert"]}}, '
            '"exchange": "all_to_all"}, the last two if they are needed'
        )
    return raw
