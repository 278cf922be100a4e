"""How many keys tokens see in a layer, and how many are read for them: what attention costs. Knows no JAX."""

from gptoss_jax.model.config import ModelConfig


def seen(config: ModelConfig, layer: int, context: int, width: int) -> int:
    """Keys that the last `width` tokens of a context see, all together."""
    first = context - width + 1  # tokens up to the chunk's first, itself included
    if not config.has_sliding_window(layer):
        return width * (first + context) // 2
    window = config.sliding_window
    growing = max(0, min(width, window - first + 1))  # tokens that see everything before them
    return growing * (2 * first + growing - 1) // 2 + (width - growing) * min(window, context)


def read(config: ModelConfig, layer: int, context: int, width: int) -> int:
    """Keys that are read once for the last `width` tokens of a context."""
    if not config.has_sliding_window(layer):
        return context
    return min(context, config.sliding_window + width - 1)
