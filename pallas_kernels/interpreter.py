"""Pallas's interpreters, which run kernels for GPUs and TPUs on a CPU; JAX 0.10 does not export the GPU's yet."""

from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental.pallas.tpu import InterpretParams as InterpretTPUParams

# TMA fills with zeros what lies beyond an array; in JAX 0.10 the interpreter does so by this setting only.
ZERO_FILLING = InterpretGPUParams(
    out_of_bounds_reads="uninitialized", uninitialized_memory="zero", num_tma_threads_per_device=16
)


def races_found() -> bool:
    """Whether the last kernel that ran with `detect_races=True` raced."""
    return gpu_callbacks.get_races().races_found


__all__ = ["ZERO_FILLING", "InterpretGPUParams", "InterpretTPUParams", "races_found"]
