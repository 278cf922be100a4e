"""Adapters among the weights: put on a mesh, and laid beside the matrices that they change."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from gptoss_jax.model import adapters as names
from gptoss_jax.model import padding
from gptoss_jax.model.adapters import LowRank
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.layers import Adapted, Dropout
from gptoss_jax.model.sharding import Sharding


def put(config: ModelConfig, adapters: Mapping[str, LowRank], sharding: Sharding) -> dict[str, LowRank]:
    """The factors on the devices that their axes name, bfloat16."""
    targets = names.targets(config)
    return {
        path: LowRank(
            *(
                padding.put(config, sharding, jnp.asarray(factor, jnp.bfloat16), axes)
                for factor, axes in zip(factors, targets[path].axes, strict=True)
            )
        )
        for path, factors in adapters.items()
    }


def beside(
    config: ModelConfig,
    leaves: Iterable[tuple[str, Any]],
    adapters: Mapping[str, LowRank],
    dropouts: Mapping[str, Dropout] | None = None,
) -> Iterator[tuple[str, Any]]:
    """`leaves`, weights by path, those of adapted matrices with their adapters."""
    targets = names.targets(config)
    by_weight = {targets[path].weight: path for path in adapters}
    for path, array in leaves:
        if path not in by_weight:
            yield path, array
            continue
        adapted = by_weight[path]
        yield path, Adapted(array, *adapters[adapted], (dropouts or {}).get(adapted))
