"""How tokens meet experts of other devices: every exchange gives what one device with all experts gives."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.model import exchange, mesh, sharding
from gptoss_jax.model.exchange import LocalExperts, RoutedTokens

EXPERTS, PER_TOKEN, SIZE, TOKENS = 8, 2, 6, 40  # 5 tokens of each batch shard, where there are eight
OVER_DATA = {"experts": ("data",)}
TENSOR_AND_DATA = {"experts": ("tensor", "data"), "expert_hidden": ()}  # not in the order of the mesh
MESHES = {  # sums are in proofs/test_sharding.py
    "gather": [
        ({"data": 8}, OVER_DATA),
        ({"data": 4, "tensor": 2}, OVER_DATA),
        ({"data": 4, "tensor": 2}, TENSOR_AND_DATA),
    ],
    "all_to_all": [
        ({"expert": 8}, {}),
        ({"data": 2, "expert": 2, "tensor": 2}, {}),
        ({"data": 8}, OVER_DATA),
        ({"data": 4, "tensor": 2}, OVER_DATA),
        ({"data": 4, "tensor": 2}, TENSOR_AND_DATA),
        ({"tensor": 8}, {}),
    ],
}


def _routings() -> dict[str, np.ndarray]:
    """Expert ids [TOKENS, PER_TOKEN] by name; -1 is padding."""
    rng = np.random.default_rng(0)
    drawn = np.stack([rng.permutation(EXPERTS)[:PER_TOKEN] for _ in range(TOKENS)]).astype(np.int32)
    ragged, skewed = drawn.copy(), drawn.copy()
    ragged[[0, 1, 2, 3, 4, 9, 17, 39]] = -1  # a batch shard without a token, and others with fewer
    skewed[:, 0], skewed[:, 1] = 5, -1
    return {"drawn": drawn, "ragged": ragged, "one expert": skewed, "none": np.full_like(drawn, -1)}


def _added(tokens, matrices, first):
    """What experts from number `first` on add, one after the other: LocalExperts.run, without a kernel."""
    x, ids, weights = tokens
    out = jnp.zeros(x.shape, jnp.float32)
    for i, matrix in enumerate(matrices):
        is_assigned = ids == first + i
        weight = jnp.sum(jnp.where(is_assigned, weights, 0), axis=1)
        out += jnp.where(is_assigned.any(1)[:, None], weight[:, None] * (x @ matrix), 0)
    return out


@pytest.mark.parametrize(
    ("name", "axes", "rules"), [(name, *each) for name, meshes in MESHES.items() for each in meshes]
)
def test_every_exchange_equals_one_device(name, axes, rules):
    """Guards against tokens that are dropped, added twice or brought back to another row, however uneven experts are.

    Padding is NaN, and its weights are: nothing of it may reach a token. The tokens of a shard divide by nothing.
    """
    _equals_one_device(sharding.make(mesh.MeshShape(axes, rules, name)))


def _layer(laid_out):
    """What experts add for TOKENS tokens on a mesh, of x, ids, weights and the experts' matrices."""
    hidden = laid_out.size("expert_hidden")

    def local(x, ids, weights, matrices):
        def run(tokens):
            return _added(tokens, matrices, laid_out.index("experts") * len(matrices)) / hidden

        given, tokens = LocalExperts(run, len(matrices)), RoutedTokens(x, ids, weights)
        return exchange.IMPLEMENTATIONS[laid_out.exchange_name](laid_out, given, tokens)

    rows = ("batch", None)
    return jax.jit(laid_out.map(local, in_axes=(rows, rows, rows, ("experts", None, None)), out_axes=rows))


def _equals_one_device(laid_out):
    run, matrices = _layer(laid_out), jax.random.normal(jax.random.key(0), (EXPERTS, SIZE, SIZE))
    x, weights = (np.asarray(jax.random.normal(jax.random.key(i), (TOKENS, n))) for i, n in ((1, SIZE), (2, PER_TOKEN)))
    for case, ids in _routings().items():
        is_padding = (ids == -1).all(1, keepdims=True)
        found = np.asarray(run(np.where(is_padding, np.nan, x), ids, np.where(ids == -1, np.nan, weights), matrices))
        expected = np.einsum("tx,txde,td->te", np.where(ids == -1, 0, weights), np.asarray(matrices)[ids], x)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=case)


def _ragged_as_documented(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`jax.lax.ragged_all_to_all` as its documentation defines it, of collectives that XLA for CPUs has."""
    everybody = (operand, input_offsets, send_sizes, output_offsets)
    rows, begins, sizes, places = (jax.lax.all_gather(array, axis_name) for array in everybody)
    me, at = jax.lax.axis_index(axis_name), jnp.arange(len(operand))
    for sender in range(len(rows)):
        sent = rows[sender][(begins[sender, me] + at) % len(operand)]
        place = jnp.where(at < sizes[sender, me], places[sender, me] + at, len(output))
        output = output.at[place].set(sent, mode="drop")
    is_expected = jnp.all(recv_sizes == sizes[:, me])
    return jnp.where(is_expected, output, jnp.array(jnp.nan if output.dtype == jnp.float32 else -1, output.dtype))


@pytest.mark.parametrize(("axes", "rules"), MESHES["all_to_all"][1::2])
def test_rows_sent_raggedly_equal_one_device(axes, rules, monkeypatch):
    """Guards the form for GPUs and TPUs, which no machine here runs: where rows begin, how many, and where they go."""
    monkeypatch.setattr(exchange, "RAGGED_PLATFORMS", ("cpu",))
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", _ragged_as_documented)
    _equals_one_device(sharding.make(mesh.MeshShape(axes, rules, "all_to_all")))


def test_rows_sent_raggedly_have_gradients(monkeypatch):
    """Guards training on GPUs and TPUs: JAX's own ragged all-to-all, in the backward pass too."""
    monkeypatch.setattr(exchange, "RAGGED_PLATFORMS", ("cpu",))
    run = _layer(sharding.make(mesh.MeshShape({"data": 8}, OVER_DATA, "all_to_all")))
    ids, matrices = jnp.zeros((TOKENS, PER_TOKEN), jnp.int32), jnp.ones((EXPERTS, SIZE, SIZE))
    gradient = jax.grad(lambda x, weights: run(x, ids, weights, matrices).sum(), argnums=(0, 1))
    traced = str(jax.make_jaxpr(gradient)(jnp.ones((TOKENS, SIZE)), jnp.ones((TOKENS, PER_TOKEN))))
    assert traced.count("ragged_all_to_all") > 4, "activations, ids, weights, outputs; and some of them back"


def test_names_are_those_of_the_mesh():
    """Guards the two tables, one of which knows no JAX."""
    assert tuple(exchange.IMPLEMENTATIONS) == mesh.EXCHANGES


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        ({"axes": {"expert": 8}}, "sum", "expert=8"),
        ({"axes": {"data": 8}, "rules": {"experts": ["data"]}}, "gather", "data=8, experts over data"),
        ({"axes": {"expert": 8}, "exchange": "all_to_all"}, "all_to_all", "expert=8, exchange all_to_all"),
        ({"axes": {"expert": 8}, "exchange": "auto"}, "sum", "expert=8"),
    ],
)
def test_an_exchange_follows_from_the_rules_or_is_named(content, name, said, tmp_path):
    """Guards the file's key, the default, and that a plan says what is not the default."""
    path = tmp_path / "mesh.json"
    path.write_text(json.dumps(content))
    assert mesh.read(path).exchange_name == sharding.make(path).exchange_name == name
    assert str(mesh.read(path)) == said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"exchange": "ring"}, "unknown exchange 'ring', expected one of auto, sum, gather, all_to_all"),
        ({"exchange": 1}, 'mesh.json: expected {"axes": .*"exchange": "all_to_all"}, the last two if they are needed'),
        ({"exchange": "gather"}, "gather is for experts cut by what cuts the batch, .* expected sum or all_to_all"),
        (
            {"exchange": "sum", "rules": {"experts": ["data"]}},
            "sum adds what devices make of the same tokens, but rules cut experts and batch by data: expected gather",
        ),
    ],
)
def test_an_exchange_that_cannot_be_is_refused(content, message, tmp_path):
    """Guards sums that would mix slots, and names with a typing error: the ways out are named."""
    path = tmp_path / "mesh.json"
    path.write_text(json.dumps({"axes": {"data": 2}, **content}))
    with pytest.raises(mesh.MeshError, match=message):
        sharding.make(path)
