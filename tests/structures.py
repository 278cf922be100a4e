"""The ops' structures made of NumPy arrays, of shapes or of axes' names, where their types say arrays of JAX."""

from typing import Any

from pallas_kernels.attention import Attended, PagedKV, RingKV
from pallas_kernels.expert_mlp import ExpertWeights


def paged_kv(*fields: Any) -> PagedKV:
    """Keys and values in pages."""
    return PagedKV(*fields)


def ring_kv(*fields: Any) -> RingKV:
    """Keys and values of a sliding window."""
    return RingKV(*fields)


def attended(*fields: Any) -> Attended:
    """What attention gives."""
    return Attended(*fields)


def expert_weights(*fields: Any) -> ExpertWeights:
    """A layer's experts; without adapters, unless they are given."""
    return ExpertWeights(*fields)
