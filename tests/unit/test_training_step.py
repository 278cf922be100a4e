"""The training step: the same numbers however a batch is computed, what is exported, dropout, reports, refusals."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

import gptoss_jax
from gptoss_jax.checkpoints.orbax.writer import Writer
from gptoss_jax.errors import GptossError
from gptoss_jax.training import batch as batches
from gptoss_jax.training import loss as losses
from gptoss_jax.training import rows
from gptoss_jax.training.batch import Batch
from gptoss_jax.training.options import OptimizerOptions
from gptoss_jax.training.step import Evaluation, Trainer
from pallas_kernels import mxfp4
from tests import reference, trainings
from tests.gate import TinyModel
from tests.goldens.make import log_softmax

CONFIG = trainings.CONFIG | {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
OF = trainings.conversations()
BATCH = trainings.batch(OF)
LEARNED = sum(int(conversation.learned.sum()) for conversation in OF)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of one layer."""
    return TinyModel(CONFIG).write(tmp_path_factory.mktemp("step"))


class Run:
    """What a trainer shows of one batch: compiled once, here, since a case has little time."""

    def __init__(self, folder, batch: Batch, steps: int = 1, **options: Any):
        self.trainer = trainings.trainer(folder, **options)
        self.start = self.trainer.init()
        self.evaluation = self.trainer.evaluate(self.start, batch)
        state, self.reports = jax.tree.map(jnp.copy, self.start), []
        for _ in range(steps):
            state, report = self.trainer.step(state, batch)
            self.reports.append(report)
            if len(self.reports) == 1:
                self.gradients = trainings.first_gradients(state)
        self.state = state


@pytest.fixture(scope="module")
def run(folder):
    """Runs of full training, by what differs from the plain one."""
    return functools.cache(lambda **options: Run(folder, BATCH, **options))


def _assert_same_gradients(found, expected, rtol: float = 1e-5):
    assert found.keys() == expected.keys()
    for path, gradient in expected.items():
        off = np.linalg.norm(found[path] - gradient) / np.linalg.norm(gradient)
        assert off <= rtol, path


@pytest.fixture(scope="module")
def plain(run):
    """Of all rows at once."""
    return run()


@pytest.fixture(scope="module", params=[{"accumulate": 2}, {"rematerialize": True}], ids=str)
def other_way(request, run):
    """The same step, computed otherwise."""
    return run(**request.param)


def test_a_step_is_the_same_however_it_is_computed(plain, other_way):
    """Guards accumulation, of parts with unlike numbers of learned tokens, and layers that are computed again."""
    _assert_same_gradients(other_way.gradients, plain.gradients)
    for name in ("loss", "gradient_norm", "learned", "learning_rate"):
        here, there = (float(getattr(run.reports[0], name)) for run in (other_way, plain))
        assert here == pytest.approx(there, rel=1e-5), name


def test_a_report_says_what_the_step_saw(plain, folder):
    """Guards the numbers that people steer by: mean loss, norm, tokens, rate; and that evaluation agrees."""
    report, found = plain.reports[0], plain.evaluation
    expected = trainings.mean_loss(TinyModel(CONFIG).tensors, CONFIG, OF)
    assert float(report.loss) == pytest.approx(expected, rel=1e-5)
    assert float(report.learned) == found.learned == LEARNED
    assert found.loss == pytest.approx(LEARNED * expected, rel=1e-5)
    norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in plain.gradients.values()))
    assert float(report.gradient_norm) == pytest.approx(norm, rel=1e-4)
    assert float(report.learning_rate) == pytest.approx(1e-3)
    assert found.right == _right(TinyModel(CONFIG).tensors)
    assert Evaluation(1.0, 2, 3) + Evaluation(0.5, 1, 1) == Evaluation(1.5, 3, 4)


def _right(tensors) -> int:
    count = 0
    for ids, learned in OF:
        count += int(((reference.forward(tensors, CONFIG, ids)[:-1].argmax(-1) == ids[1:]) & learned[1:]).sum())
    return count


def test_a_batch_that_learns_nothing_changes_nothing(plain):
    """Guards division by no learned tokens, and attention of padding alone: the loss is 0, and nothing is NaN."""
    for nothing in (BATCH._replace(weights=0 * BATCH.weights), batches.stack([rows.empty(trainings.ROW_TOKENS)], 4)):
        after, report = plain.trainer.step(jax.tree.map(jnp.copy, plain.start), nothing)
        assert float(report.loss) == 0 and float(report.learned) == 0
        for path, array in plain.start.trained.items():
            assert np.array_equal(after.trained[path], array), path


def test_the_same_seed_gives_the_same_bits(plain, folder):
    """Guards resumption: a step is a function of its state and batch alone, to the last bit."""
    again, report = plain.trainer.step(jax.tree.map(jnp.copy, plain.start), BATCH)
    assert float(report.loss) == float(plain.reports[0].loss)
    for path, array in plain.state.trained.items():
        assert np.asarray(again.trained[path]).tobytes() == np.asarray(array).tobytes(), path


# ---- adapters ----


@pytest.fixture(scope="module")
def adapters(folder):
    """Three steps of adapters, their inputs dropped half the time, beside what the weights were before."""
    trainer = trainings.trainer(folder, "lora")
    before = {path: np.asarray(leaf).copy() for path, leaf in trainer.frozen_leaves().items()}
    return Run(folder, BATCH, 3, method="lora", lora=dataclasses.replace(trainings.LORA, dropout=0.5)), before


def test_frozen_weights_keep_their_bytes(adapters):
    """Guards the promise of adapters: what they stand beside is what was published, experts packed as ever."""
    run, before = adapters
    frozen = run.trainer.frozen_leaves()
    assert frozen.keys() == before.keys()
    for path, leaf in frozen.items():
        assert leaf.dtype == before[path].dtype and np.asarray(leaf).tobytes() == before[path].tobytes(), path
    for path, array in run.state.trained.items():
        assert not np.array_equal(array, run.start.trained[path]), f"{path} has learned nothing"


def test_dropout_draws_anew_at_each_step_and_never_in_evaluation(adapters, plain):
    """Guards dropout: of the step's number and the seed alone, and absent where losses are compared."""
    run, _ = adapters
    gradients = []
    for number in (0, 0, 1):
        step = jax.device_put(np.int32(number), run.start.step.sharding)
        start = jax.tree.map(jnp.copy, run.start)._replace(step=step)
        gradients.append(trainings.first_gradients(run.trainer.step(start, BATCH)[0]))
    name = "layers/0/attention/q/b"
    assert np.array_equal(gradients[0][name], gradients[1][name])
    assert not np.allclose(gradients[0][name], gradients[2][name], rtol=0.1)
    assert run.evaluation == run.trainer.evaluate(run.start, BATCH)
    assert run.evaluation.loss == pytest.approx(plain.evaluation.loss, rel=1e-5)  # adapters begin as nothing


@pytest.fixture(scope="module")
def drawn(folder):
    """First adapters, of the seeds 1, 1 and 2."""
    return [trainings.trainer(folder, "lora", seed=seed).init().trained for seed in (1, 1, 2)]


def test_another_seed_draws_other_adapters(drawn):
    """Guards --seed, and that the same one draws the same; the factors b begin as 0."""
    for path, array in drawn[0].items():
        assert np.array_equal(array, drawn[1][path])
        assert np.any(array) != path.endswith("/b")
        assert path.endswith("/b") or not np.array_equal(array, drawn[2][path])


# ---- compact vocabulary ----

UNLIKE = (5, 77)  # rows that no conversation uses, and that are not as the others


def _used() -> np.ndarray:
    return np.unique(np.concatenate([conversation.ids for conversation in OF]))


@pytest.fixture(scope="module")
def compact(tmp_path_factory):
    """Runs over a model whose unused rows are equal but for two: with all rows, and with those in use."""
    folder = TinyModel(CONFIG).write(tmp_path_factory.mktemp("compact"))
    used = _used()
    others = np.setdiff1d(np.arange(CONFIG["vocab_size"]), [*used, *UNLIKE])
    for file in folder.glob("*.safetensors"):
        tensors = safetensors.load_file(file)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name].copy()
            tensors[name][others] = np.float32(0.25)
        safetensors.save_file(tensors, file, {"format": "pt"})
    of_rows = trainings.batch(OF)
    ids = np.searchsorted(used, of_rows.tokens), np.searchsorted(used, of_rows.targets)
    batch = of_rows._replace(
        tokens=np.where(of_rows.places.position >= 0, ids[0], 0).astype(np.int32),
        targets=np.where(of_rows.weights > 0, ids[1], 0).astype(np.int32),
    )
    return Run(folder, BATCH), Run(folder, batch, rows=used, compact_vocabulary=True), others


def test_a_compact_vocabulary_gives_the_loss_of_the_whole(compact):
    """Guards the row that stands for many: it counts in the softmax as often, and is the likeliest no more often."""
    whole, few, others = compact
    assert len(few.start.trained["embedding"]) == CONFIG["vocab_size"] - len(others) + 1
    assert few.evaluation.loss == pytest.approx(whole.evaluation.loss, rel=1e-6)
    assert few.evaluation[1:] == whole.evaluation[1:]


def test_a_compact_vocabulary_gives_the_gradients_of_the_whole(compact):
    """Guards every weight's gradient; that of the row that stands for many is the sum of theirs."""
    whole, few, others = compact
    expected = dict(whole.gradients)
    ids = np.concatenate([_used(), np.array(UNLIKE)])
    for table in ("embedding", "unembedding"):
        summed = expected[table][others].sum(0, keepdims=True)
        expected[table] = np.concatenate([expected[table][ids], summed])
    _assert_same_gradients(few.gradients, expected)


def test_a_compact_vocabulary_comes_back_whole(compact):
    """Guards the tables of the result: used rows, unlike rows and equal rows each at their ids."""
    whole, few, _ = compact
    leaves, expected = (dict(run.trainer.trained_leaves(run.start)) for run in (few, whole))
    assert leaves.keys() == expected.keys()
    for path, leaf in expected.items():
        assert leaf.dtype == leaves[path].dtype and leaf.tobytes() == leaves[path].tobytes(), path


# ---- what is exported ----


class Exported(NamedTuple):
    """A run that ends with rounded weights, its last evaluation, and the logits of what it wrote."""

    run: Run
    last: Evaluation
    unrounded: Evaluation
    loss: float


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    """Four steps, the last two with rounded weights, written and loaded."""
    run = Run(folder, BATCH, 4, quantize_from=0.5, optimizer=OptimizerOptions(learning_rate=3e-2, warmup=0.0))
    last = run.trainer.evaluate(run.state, BATCH)
    unrounded = run.trainer.evaluate(run.state._replace(step=jnp.zeros((), jnp.int32)), BATCH)
    path = tmp_path_factory.mktemp("exported") / "weights"
    with Writer(path, {}) as writer:
        for name, leaf in run.trainer.trained_leaves(run.state):
            writer.write(name, leaf)
        writer.finish(run.trainer.config, {})
    model, total = gptoss_jax.load(path, dtype="float32"), 0.0
    for ids, learned in OF:
        likely = log_softmax(model.logits(ids.tolist())[:-1])
        total -= likely[np.arange(len(ids) - 1), ids[1:]][learned[1:]].sum()
    return Exported(run, last, unrounded, total)


def test_what_is_exported_is_what_was_trained(exported):
    """Guards rounding-aware training: the written checkpoint has the loss of the last evaluation, to float32.

    Learned by heart, the loss is a small difference of large logits: sums in another order move it by 1e-5 of itself.
    """
    assert exported.loss == pytest.approx(exported.last.loss, rel=1e-4)
    assert exported.loss != pytest.approx(exported.unrounded.loss, rel=1e-2)  # rounding did something
    state = exported.run.state.trained["layers/0/moe/down/weight"]
    assert not np.array_equal(state, mxfp4.rounded(state))  # what is trained is not rounded itself


def test_rounding_begins_where_it_is_asked_to(exported):
    """Guards quantize_from, a share of the run: at 0.5 of four steps, the third is the first."""
    trainer = exported.run.trainer
    assert [trainer.is_quantized(step) for step in range(5)] == [False, False, True, True, True]
    first = exported.run.reports[0].loss * LEARNED
    assert float(first) == pytest.approx(exported.run.evaluation.loss, rel=1e-5)


# ---- losses ----


def test_a_loss_in_parts_is_the_whole_loss(monkeypatch):
    """Guards logits that are made part by part: sums, hits and gradients, parts of unlike numbers of learned tokens."""
    rng = np.random.default_rng(0)
    x, table = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 12, 5), (9, 5)))
    targets = jnp.asarray(rng.integers(0, 9, (2, 12)), jnp.int32)
    weights, counts = jnp.asarray(rng.integers(0, 2, (2, 12)), jnp.float32), jnp.asarray(rng.random(9), jnp.float32)

    def found():
        def loss(x, table):
            sums = losses.cross_entropy(lambda x: x @ table.T, x, targets, weights, 9, counts)
            return sums.total, sums

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(x, table)

    whole = found()
    for tokens, parts in ((12, 1), (6, 2), (5, 3), (1, 12)):
        monkeypatch.setattr(losses, "LOGITS_BYTES", 4 * 2 * tokens * 9)
        assert losses._parts(2, 12, 9) == parts
        if parts == 3:
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found(), whole)
    likely = log_softmax(np.asarray(x @ table.T + counts))
    expected = -(np.take_along_axis(likely, np.asarray(targets)[..., None], -1)[..., 0] * weights).sum()
    assert float(whole[1].total) == pytest.approx(float(expected), rel=1e-5)
    assert int(whole[1].right) == int(((np.asarray(x @ table.T).argmax(-1) == targets) & (weights > 0)).sum())


def test_routing_is_reported_as_numpy_counts_it():
    """Guards load, entropy and the balance loss: of tokens alone, padding left out, top_k assignments each."""
    rng = np.random.default_rng(1)
    logits = {name: rng.standard_normal((2, 8, 5)).astype(np.float32) for name in ("one", "two")}
    is_token = np.arange(16).reshape(2, 8) % 8 < 6
    router, balance = losses.routing(jax.tree.map(jnp.asarray, logits), jnp.asarray(is_token), 2)
    expected = []
    for layer, array in enumerate(logits.values()):
        of_tokens = array[is_token].astype(np.float64)
        chosen = np.argsort(-of_tokens, axis=-1)[:, :2]
        load = np.bincount(chosen.ravel(), minlength=5) / chosen.size
        mean = np.exp(log_softmax(of_tokens)).mean(0)
        np.testing.assert_allclose(router.load[layer], load, rtol=1e-6)
        assert float(router.entropy[layer]) == pytest.approx(-(mean * np.log(mean)).sum(), rel=1e-5)
        expected.append(5 * (load * mean).sum())
    assert float(balance) == pytest.approx(np.mean(expected), rel=1e-5)


def test_the_balance_loss_moves_probabilities_alone():
    """Guards its gradient: of the mean probabilities, the shares of assignments standing still; padding has none."""
    rng = np.random.default_rng(2)
    logits, is_token = rng.standard_normal((1, 6, 5)), np.arange(6)[None] < 4
    slope = jax.grad(lambda x: losses.routing({"one": x}, jnp.asarray(is_token), 2)[1])(
        jnp.asarray(logits, jnp.float32)
    )
    chosen = np.argsort(-logits[is_token], axis=-1)[:, :2]
    load = np.bincount(chosen.ravel(), minlength=5) / chosen.size
    p = np.exp(log_softmax(logits[is_token]))
    expected = 5 / 4 * p * (load - (p * load).sum(-1, keepdims=True))
    np.testing.assert_allclose(np.asarray(slope)[is_token], expected, rtol=1e-4, atol=1e-7)
    assert not np.any(np.asarray(slope)[~is_token])


def test_routing_of_no_token_is_no_nan():
    """Guards a batch of padding alone."""
    router, balance = losses.routing({"one": jnp.ones((1, 4, 5))}, jnp.zeros((1, 4), bool), 2)
    assert all(np.isfinite(array).all() for array in (*router, balance))


# ---- what does not fit ----


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("full", {"batch_rows": 5, "accumulate": 2}, "batch_rows is 5, expected a multiple of accumulate, 2"),
        ("full", {"mesh": "data=8"}, "batch of 4 rows, expected a multiple of 1 accumulated parts times 8 data shards"),
        ("full", {"mesh": "data=4", "accumulate": 2}, "batch of 4 rows, expected a multiple of 2 accumulated parts"),
        ("lora", {"rows": np.arange(4)}, "a compact vocabulary is for method full"),
        ("full", {"mesh": "tensor=4"}, "tensor"),
        ("full", {"kernels": "fast"}, "kernel 'fast', expected auto or one of"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(method, changes, message, folder):
    """Guards against tracebacks from the middle of a mesh."""
    kernels = changes.pop("kernels", "auto")
    mesh, rows = changes.pop("mesh", None), changes.pop("rows", None)
    with pytest.raises(GptossError, match=message) as error:
        asked = trainings.options(method, **changes)
        Trainer.open(folder, asked, total_steps=4, mesh=mesh, rows=rows, kernels=kernels)
    assert "\n" not in str(error.value)


def test_results_of_the_other_method_are_refused(plain, adapters):
    """Guards a mix-up of what a run ends with."""
    with pytest.raises(GptossError, match="method full trains the weights"):
        plain.trainer.trained_adapters(plain.start)
    run, _ = adapters
    with pytest.raises(GptossError, match="method lora trains adapters"):
        run.trainer.trained_leaves(run.start)
    assert run.trainer.trained_adapters(run.state)["layers/0/moe/down"].a.shape == (7, 3, 160)
