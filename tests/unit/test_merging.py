"""Adapters merged into weights: the right numbers, rounded once, and a true account of what the rounding leaves."""

import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from converters import convert
from converters.random_checkpoint import write_checkpoint
from gptoss_jax.checkpoints import export_leaves, merging, packing
from gptoss_jax.checkpoints.export import Export, open_export
from gptoss_jax.checkpoints.merging import Merger
from gptoss_jax.errors import GptossError
from gptoss_jax.model import adapters
from gptoss_jax.model.adapters import LowRank
from pallas_kernels import mxfp4
from tests.goldens import make as golden
from tests.lora import factors_of


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Export:
    """A converted model of two layers, opened for an export."""
    folder = tmp_path_factory.mktemp("merging")
    write_checkpoint(folder / "published", golden.two_layers_config())
    convert.run(convert.Options(folder / "published", folder / "checkpoint"))
    return open_export(folder / "checkpoint")


def leaf(base: Export, path: str) -> tuple[np.ndarray, ...]:
    """Arrays as a change is given them."""
    records = base.records
    return tuple(export_leaves.read(base.checkpoint, records[name]) for name in export_leaves.leaves_of(path, records))


def plain(arrays: tuple[np.ndarray, ...]) -> np.ndarray:
    """A matrix in float64, of experts [E, out, in], by the codes' table alone."""
    if len(arrays) == 1:
        return arrays[0].astype(np.float64)
    blocks, scales = arrays
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    values = np.array(mxfp4.CODES)[codes] * 2.0 ** (scales.astype(np.int64)[..., None] - 127)
    return values.reshape(*scales.shape[:-1], -1)


def difference(factors: LowRank, is_experts: bool) -> np.ndarray:
    """b a in float64."""
    a, b = (factor.astype(np.float64) for factor in factors)
    return np.einsum("eri,eor->eoi", a, b) if is_experts else np.tensordot(b, a, axes=1)


@pytest.mark.parametrize("name", ["attention/q", "attention/out", "moe/router", "unembedding"])
def test_bfloat16_matrices_are_base_plus_delta(name, base):
    """Guards axes, the scale and the rounding: each number is the nearest bfloat16 to W + b a, ties apart."""
    path = name if name == "unembedding" else f"layers/1/{name}"
    factors = factors_of(base.config, scale=0.02)
    target = adapters.targets(base.config)[path].weight
    before = leaf(base, target)
    (after,) = Merger(base.config, factors, pack=True)(target, tuple(array.copy() for array in before))
    wanted = plain(before) + difference(factors[path], False).reshape(before[0].shape)
    assert after.dtype == ml_dtypes.bfloat16 and (after != before[0]).mean() > 0.5
    step = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(wanted), 1e-30))) - 7)
    assert (np.abs(after.astype(np.float64) - wanted) <= 0.5001 * step + 1e-9).all()


@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_experts_are_rounded_once_by_the_rule(name, base):
    """Guards experts' axes, and against two roundings: the bytes are those of `mxfp4.quantize` on the float32 sum."""
    path = f"layers/0/moe/{name}"
    factors = factors_of(base.config, scale=0.02)
    before = leaf(base, path)
    blocks, scales = Merger(base.config, factors, pack=True)(path, tuple(array.copy() for array in before))
    sums = plain(before).astype(np.float32)
    for expert in range(base.config.num_experts):
        a, b = (factor[expert] for factor in factors[path])
        sums[expert] += (a.T @ b.T).T
    wanted = plain(tuple(map(np.asarray, jax.jit(mxfp4.quantize)(jnp.asarray(sums)))))
    assert (plain((blocks, scales)) == wanted).all()
    (whole,) = Merger(base.config, factors, pack=False)(path, before)
    assert whole.shape == (base.config.num_experts, *sums.shape[:0:-1])
    assert (whole == sums.transpose(0, 2, 1).astype(ml_dtypes.bfloat16)).all()
    assert np.abs(sums - plain(before) - difference(factors[path], True)).max() < 1e-5


def test_rounding_to_odd_rounds_as_from_float32():
    """Guards against a tie that bfloat16 makes: 2.5 and a little is 3, and 2.5 itself is 2."""
    near = np.array(
        [2.5, np.nextafter(np.float32(2.5), np.float32(3)), 5.0, np.nextafter(np.float32(5), np.float32(6))]
    )
    values = np.zeros((32, 1), np.float32)
    values[:4, 0], values[4, 0] = near, 6
    packed = packing.pack(merging._to_odd(values))
    assert packing.unpack(packed.blocks, packed.scales)[:4, 0].astype(float).tolist() == [2, 3, 4, 6]
    rng = np.random.default_rng(5)
    values = (rng.standard_normal((64, 33)) * np.exp(rng.standard_normal((64, 33)) * 20)).astype(np.float32)
    packed = packing.pack(merging._to_odd(values))
    theirs = plain(tuple(map(np.asarray, jax.jit(mxfp4.quantize)(jnp.asarray(values.T)))))
    assert (plain((packed.blocks, packed.scales)) == theirs).all()


def test_the_account_is_true(base):
    """Guards every number of the report against a recount in float64, by the bytes before and after."""
    factors = factors_of(base.config, scale=0.004)
    merger = Merger(base.config, factors, pack=True)
    for path in ("layers/1/moe/down", "layers/1/attention/v"):
        target = adapters.targets(base.config)[path].weight.removesuffix("/blocks")
        before = leaf(base, target)
        after = merger(target, tuple(array.copy() for array in before))
        found, old, new = merger.losses[path], plain(before), plain(after)
        delta = difference(factors[path], path.endswith("down")).reshape(old.shape)
        assert (found.weights, found.changed) == (old.size, np.count_nonzero(old != new))
        assert found.delta == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(old), rel=1e-4)
        assert found.kept == pytest.approx(np.vdot(new - old, delta) / np.vdot(delta, delta), rel=1e-3)
        error = np.linalg.norm(new - old - delta) / np.linalg.norm(delta)
        assert found.error == pytest.approx(error, rel=1e-3)
        if path.endswith("down"):
            nibbles = sum(np.count_nonzero(f(before[0]) != f(after[0])) for f in (lambda x: x & 15, lambda x: x >> 4))
            assert (found.nibbles, found.scales) == (nibbles, np.count_nonzero(before[1] != after[1]))
            assert found.packed == found.weights and 0.1 < found.error < 1.5
        else:
            assert (found.packed, found.nibbles, found.scales) == (0, 0, 0) and 0 < found.error < 0.5


def steady(path: str, base: Export) -> tuple[np.ndarray, np.ndarray]:
    """The leaf, its blocks' largest numbers being 6: what little is added changes no scale."""
    blocks, scales = (array.copy() for array in leaf(base, path))
    blocks[..., 0] = 0x77
    return blocks, scales


def test_a_delta_under_half_a_step_vanishes_and_is_said_to(base):
    """Guards against a merge that gives the base and calls itself done: nothing kept, an error of the delta's size."""
    path = "layers/0/moe/gate_up"
    factors = factors_of(base.config, ["experts"], scale=1e-7)
    merger = Merger(base.config, factors, pack=True)
    before = steady(path, base)
    after = merger(path, tuple(array.copy() for array in before))
    found = merger.losses[path]
    assert all(map(np.array_equal, before, after))
    assert found.delta > 0 and (found.kept, found.changed, found.nibbles, found.scales) == (0, 0, 0, 0)
    assert found.error == pytest.approx(1, rel=1e-5)


def test_kept_scales_spare_what_the_rule_cuts_off(base):
    """Guards --keep-scales: a largest number of 4 that becomes 3.99 stays 4, and no block is further off."""
    path = "layers/1/moe/gate_up"
    blocks, scales = (array.copy() for array in leaf(base, path))
    blocks[...] = np.where(blocks & 7 == 7, blocks - 1, blocks)  # 6 becomes 4, for low nibbles
    blocks[...] = np.where(blocks >> 4 & 7 == 7, blocks - 16, blocks)
    factors, errors = factors_of(base.config, ["experts"], scale=3e-4), []
    old = plain((blocks, scales))
    sums = old + difference(factors[path], True)
    for keep_scales in (False, True):
        merger = Merger(base.config, factors, pack=True, keep_scales=keep_scales)
        new = plain(merger(path, (blocks.copy(), scales.copy())))
        errors.append(np.square(new - sums).reshape(*scales.shape, 32).sum(axis=-1))
        found = merger.losses[path]
        assert found.error**2 * found.delta_power == pytest.approx(errors[-1].sum(), rel=1e-3)
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert errors[1].sum() < 0.05 * errors[0].sum()


def test_blocks_without_a_change_keep_their_bytes(base):
    """Guards blocks that can be written in two ways: a code of 3 at one scale is a code of 6 at the one below."""
    path = "layers/0/moe/down"
    blocks, scales = (array.copy() for array in leaf(base, path))
    blocks[...] = 0x55  # 3 and 3: the rule writes 6 and 6
    factors = factors_of(base.config, ["experts"], scale=0.0)
    after = Merger(base.config, factors, pack=True)(path, (blocks.copy(), scales.copy()))
    assert np.array_equal(after[0], blocks) and np.array_equal(after[1], scales)
    factors[path].b[3, 5] = 1  # one row of one expert
    after = Merger(base.config, factors, pack=True)(path, (blocks.copy(), scales.copy()))
    rows = np.argwhere((after[0] != blocks).any(axis=(2, 3)))
    assert rows.tolist() == [[3, 5]]


def test_all_else_is_byte_for_byte_the_base(base, tmp_path):
    """Guards the leaves that have no adapter, and the order of leaves in an export that something changes."""
    factors = factors_of(base.config, ["attention"], scale=0.05, layers=[1])
    done = base.run(tmp_path / "out", Merger(base.config, factors, pack=True), "a test")
    again = tmp_path / "again"
    convert.run(convert.Options(done.dst, again))

    def digests(folder: Path) -> dict[str, str]:
        records = open_export(folder).records
        return {
            path: hashlib.sha256((folder / record.file).read_bytes()).hexdigest() for path, record in records.items()
        }

    before, after = digests(base.checkpoint), digests(again)
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {f"layers/1/attention/{name}/weight" for name in ("q", "k", "v", "out")}


def test_what_cannot_be_merged_is_one_line(base):
    """Guards against NaN in a whole export, and an adapter of another model."""
    factors = factors_of(base.config, scale=0.1)
    factors["layers/1/attention/k"].a[1, 2] = np.nan
    with pytest.raises(GptossError, match=r"^adapter of layers/1/attention/k: holds NaN or infinity: [^\n]*$"):
        Merger(base.config, factors, pack=True)
    with pytest.raises(GptossError, match=r"no such matrix"):
        Merger(base.config, {"layers/7/attention/k": factors["layers/1/attention/k"]}, pack=True)
