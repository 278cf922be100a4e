"""Pallas's interpreter for GPU kernels, which runs them on a CPU and finds races; JAX 0.10 does not export it yet."""

from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams


def races_found() -> bool:
    """Whether the last kernel that ran with `detect_races=True` raced."""
    return gpu_callbacks.get_races().races_found


__all__ = ["InterpretGPUParams", "races_found"]
