"""The tests that every implementation of an op passes, of values and of gradients, through Pallas's interpreters."""

import pytest

from pallas_kernels import attention as attention_op
from pallas_kernels import expert_mlp as expert_op
from tests.unit import test_gradients as gradients
from tests.unit import test_kernels as kernels

ATTENTION = kernels.all_of(attention_op.IMPLEMENTATIONS, interpreted=True)
EXPERTS = kernels.all_of(expert_op.IMPLEMENTATIONS, interpreted=True)


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("shape", kernels.SHAPES)
@pytest.mark.parametrize("routing", kernels.ROUTINGS)
def test_expert_mlp(name, shape, routing):
    """Guards drops and duplicates of assignments."""
    kernels.test_expert_mlp(name, shape, routing)


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_paged_attention(name, tokens):
    """Guards page tables, ragged sequences, sinks and the lse."""
    kernels.test_paged_attention(name, tokens)


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("tokens", [1, 5, 12, 40])
def test_sliding_window_attention(name, tokens):
    """Guards the ring: what was never written, wrap-around, chunks shorter and longer than the window."""
    kernels.test_sliding_window_attention(name, tokens)


@pytest.mark.parametrize("name", ATTENTION)
def test_attentions_to_disjoint_keys_merge(name):
    """Guards split decoding and a sequence axis."""
    kernels.test_attentions_to_disjoint_keys_merge(name)


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("routing", ["random", "with skipped assignments"])
def test_gradients_of_experts(name, routing):
    """Guards fine-tuning of the router and of both biases."""
    gradients.test_experts(name, routing)


@pytest.mark.parametrize("name", ATTENTION)
def test_gradients_of_paged_attention(name):
    """Guards fine-tuning through pages."""
    gradients.test_paged_attention(name)


@pytest.mark.parametrize("name", ATTENTION)
def test_gradients_of_sliding_window_attention(name):
    """Guards fine-tuning through the ring."""
    gradients.test_sliding_window_attention(name)
