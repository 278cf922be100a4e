"""What lies in a folder: a checkpoint of ours, or published safetensors. Found out without JAX, from headers alone."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_jax.checkpoints import huggingface, published
from gptoss_jax.checkpoints.leaf import Leaf
from gptoss_jax.checkpoints.orbax import manifest
from gptoss_jax.checkpoints.orbax.manifest import CheckpointError, Manifest
from gptoss_jax.errors import Fault, listed
from gptoss_jax.model.config import ModelConfig

if TYPE_CHECKING:
    import gptoss_jax.model.sharding


@dataclasses.dataclass(frozen=True)
class StoredWeights:
    """Weights on disk, not read yet.

    Attributes:
        config: the model that they are of.
        described: what kind of folder holds them, in words.
        are_random: whether the published files say that nobody trained them.
        read: gives every leaf of what a model declares, by name, as an array on the host or in its sharding. It raises
            a GptossError that lists everything that speaks against it.
    """

    config: ModelConfig
    described: str
    are_random: bool
    read: Callable[[Mapping[str, Leaf], "gptoss_jax.model.sharding.Sharding"], Iterator[tuple[str, Any]]]


def open_weights(path: Path) -> StoredWeights:
    """The weights at `path`.

    Raises:
        CheckpointError: a checkpoint that is unfinished, damaged, or not of the model in its config.json.
        SourceError: nothing that holds weights, or headers that are at fault.
        ConfigError: its config.json is not a gpt-oss model.
    """
    if manifest.is_checkpoint(path) or manifest.is_unfinished(path):
        return _open_checkpoint(path)
    source = published.open_source(path)
    source.check_headers()
    metadata = [file.metadata for file in source.files.values()]

    def read(leaves: Mapping[str, Leaf], sharding: "gptoss_jax.model.sharding.Sharding") -> Iterator[tuple[str, Any]]:
        return source.read_all(leaves)

    return StoredWeights(source.config, f"safetensors ({source.format})", any(map(_says_random, metadata)), read)


def _open_checkpoint(path: Path) -> StoredWeights:
    stored = Manifest.read(path)  # raises for an unfinished one, and says what to do
    config = manifest.read_config(path)
    check_names(path, stored, config)
    provenance = manifest.read_provenance(path)
    try:
        are_random = any(_says_random(file["metadata"]) for file in provenance.get("source", {}).get("files", []))
    except (AttributeError, KeyError, TypeError):
        raise CheckpointError(f"{path / manifest.PROVENANCE}: damaged, convert again") from None

    def read(leaves: Mapping[str, Leaf], sharding: "gptoss_jax.model.sharding.Sharding") -> Iterator[tuple[str, Any]]:
        from gptoss_jax.checkpoints.orbax import reader  # here, since it imports JAX

        return reader.read(path, leaves, sharding)

    return StoredWeights(config, "Orbax checkpoint", are_random, read)


def check_names(path: Path, stored: Manifest, config: ModelConfig) -> None:
    """Refuses a config.json whose model has other leaves than are stored, before anything is made of its numbers.

    Raises:
        CheckpointError: lists those that are missing, and those that are too many.
    """
    wanted = huggingface.mxfp4_recipes(config).keys()
    faults = [Fault(f"{path}: leaf {name}", "missing") for name in sorted(wanted - stored.leaves.keys())]
    unexpected = f"unexpected, the model in {manifest.CONFIG} has none of that name"
    faults += [Fault(f"{path}: leaf {name}", unexpected) for name in sorted(stored.leaves.keys() - wanted)]
    if faults:
        raise CheckpointError(listed(faults))


def _says_random(metadata: Mapping[str, str] | None) -> bool:
    return "random" in (metadata or {}).get("weights", "")
