"""The object people hold: a model with its weights on devices. It generates, gives logits, and scores."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.request import (
    NOT_FINITE,
    NOT_HELD,
    EngineConfig,
    Event,
    NumericsError,
    Request,
    RequestError,
    to_ids,
    to_whole,
)
from gptoss_jax.engine.runner import Compiled, CompileProgram, ModelRunner, compile_anew
from gptoss_jax.engine.sampling import report_logprobs
from gptoss_jax.engine.sampling_params import MAX_TOP_LOGPROBS, SamplingParams
from gptoss_jax.engine.scheduler import Scheduler
from gptoss_jax.errors import GptossError, check_list, check_type
from gptoss_jax.grammar.compiled import held_form
from gptoss_jax.grammar.forms import AUTO, ToolChoice
from gptoss_jax.harmony.answer import Answer, AnswerStream
from gptoss_jax.harmony.settings import Settings
from gptoss_jax.harmony.tokenizer import load_tokenizer
from gptoss_jax.model import kv_cache, transformer
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.invariant_sum import row_sum
from gptoss_jax.model.sharding import Sharding
from gptoss_jax.model.transformer import DtypePolicy, Model, Params
from gptoss_jax.runtime import device
from gptoss_jax.runtime.answers import collect, run_one
from gptoss_jax.runtime.kept_programs import KeptPrograms
from gptoss_jax.runtime.number_formats import DENSE_ITEMSIZE
from gptoss_jax.runtime.scoring import Scores, check_named

if TYPE_CHECKING:
    import gptoss_jax.runtime.lowered

LOGITS_CHUNK_TOKENS = 256


@dataclasses.dataclass(repr=False, eq=False)  # nobody who compares two means to compare their arrays
class LanguageModel:
    """A gpt-oss model with its weights, sharded over a mesh. `gptoss_jax.load` makes one.

    Attributes:
        config: the architecture.
        sharding: the mesh and its rules.
        params: weights, a nested dict of arrays as stored (bfloat16, uint8).
        model: the declaration that `gptoss_jax.model.transformer.step` runs.
        policy: which number format holds what.
        dense: the format of attention's and the unembedding's weights.
        kernels: for each op, the implementation chosen and why.
        source: what the weights were read from, in words.
        weights_are_random: whether the files say that nobody trained them.
        load_seconds: from the call of `load` to weights on the devices.
        programs_folder: where the programs of engines are kept for later runs; None: nowhere.
    """

    config: ModelConfig
    sharding: Sharding
    params: Params
    model: Model
    policy: DtypePolicy
    dense: str
    kernels: str
    source: str
    weights_are_random: bool
    load_seconds: float
    programs_folder: Path | None = None
    _engine: Engine | None = None
    _allocators: dict[int, Callable[[], kv_cache.KVCache]] = dataclasses.field(default_factory=dict)
    _programs: dict[tuple[str, int], Any] = dataclasses.field(default_factory=dict)
    _tapped: dict[tuple[str, ...], Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        """Two lines: what it is, and how it is computed. Its arrays are gathered by nobody who only looks."""
        config, devices = self.config, self.mesh.devices
        held_bytes = sum(array.nbytes for array in jax.tree.leaves(self.params))
        trained = "random weights" if self.weights_are_random else "weights"
        where = f"{devices.size} x {devices.flat[0].device_kind}, {dict(self.mesh.shape)}"
        return (
            f"LanguageModel({config.num_layers} layers, {config.num_experts} experts, {held_bytes / 1e9:.1f} GB of "
            f"{trained} from {self.source}, on {where})\n"
            f"  activations {self.policy.activations}, dense weights {self.dense}, {self.kernels}"
        )

    def decode_bytes(self, slots: int, context_tokens: int) -> int:
        """`ModelConfig.decode_bytes` with the number formats that hold weights and cache here."""
        return self.config.decode_bytes(slots, context_tokens, self.policy.cache.itemsize, DENSE_ITEMSIZE[self.dense])

    def read_bandwidth(self, at_least: float = 0.0) -> float:
        """Bytes per second that all devices together read from their memories, as `device.read_bandwidth`."""
        # A CPU's devices share one memory.
        memories = len({d.process_index if d.platform == "cpu" else d.id for d in self.mesh.devices.flat})
        return memories * device.read_bandwidth(self.mesh.local_devices[0], at_least / memories)

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.sharding.mesh

    def engine(
        self,
        engine_config: EngineConfig,
        *,
        scheduler: Scheduler | None = None,
        compiled: Compiled | None = None,
        report: Callable[[int, int], object] = lambda done, total: None,
    ) -> Engine:
        """An engine over this model's weights.

        Args:
            engine_config: what its programs are compiled for.
            scheduler: which requests go first, and which give way; None: first come, first served.
            compiled: those of an engine just like it; None: they are compiled here.
            report: called with the number of programs that are compiled, and of all.

        Raises:
            GptossError: `engine_config` is no EngineConfig.
        """
        check_type("engine_config", engine_config, EngineConfig)
        runner = ModelRunner(
            self.model,
            self.params,
            self.config,
            self.sharding,
            self.policy.cache,
            engine_config,
            compiled=compiled,
            # Programs that take no snapshots are the same whatever their number.
            compile_program=self._compiler(str(dataclasses.replace(engine_config, prefix_snapshots=None))),
            report=report,
        )
        return Engine(runner, self.config, engine_config, scheduler=scheduler)

    def lower(
        self, batch: int, context_tokens: int, mesh: Any = None, *, prefill_tokens: int = 1
    ) -> "gptoss_jax.runtime.lowered.LoweredStep":
        """One program of an engine over this model, lowered and not run: what its compiler makes of it can be read.

        Args:
            batch: sequences at once, over all data shards.
            context_tokens: that each can hold.
            mesh: to lower for, as `load` takes one, over JAX's devices; None: the one that the model lies on. On
                another mesh no weight is moved: shapes are enough.
            prefill_tokens: of each sequence's prompt that are read at once; 1: a decoding step.

        Returns:
            An object with `.memory`, `.collectives`, `.flops` by named scope, `.operations`, `.shardings`, `.buffers`
            and `.text`; it compiles when first asked.

        Raises:
            GptossError: sizes below 1, more context than the model has, an adapter on another mesh.
            MeshError: the mesh does not cut the model and the batch evenly.
        """
        from gptoss_jax.runtime import lowered  # here: whoever generates needs none of it

        sizes = {"batch": batch, "context_tokens": context_tokens, "prefill_tokens": prefill_tokens}
        return lowered.of_loaded(self, mesh, **{name: to_whole(name, size) for name, size in sizes.items()})

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int | None = 256,
        temperature: float | None = None,
        seed: int | None = None,
        sampling: SamplingParams | None = None,
        stop_ids: Sequence[int] | None = None,
        max_context_tokens: int = 4096,
    ) -> Iterator[Event]:
        """Events with the tokens that follow `prompt`, as they come; the last one says why it ended.

        The engine is compiled at the first call and kept; it is compiled anew for another `max_context_tokens`.

        Args:
            prompt: what a user says, which becomes a conversation as `harmony.settings.Settings` has it by default; or
                token ids, as they are.
            max_new_tokens: length of the answer at most; None: as far as the context goes.
            temperature: 1 where left out; a short way to `sampling`, and so is `seed`, 0 where left out.
            seed: see `SamplingParams`.
            sampling: all options of drawing, in place of `temperature` and `seed`.
            stop_ids: ids after which the answer ends; None: those of the model's config.json.
            max_context_tokens: prompt and answer at most; memory grows with it.

        Raises:
            GptossError: a sampling option out of its range, or given twice.
            RequestError: ids outside the vocabulary, or more tokens than the context holds.
        """
        engine_config = EngineConfig(slots=self.sharding.size("batch"), max_context_tokens=max_context_tokens)
        request = Request(
            _ids(prompt, None),
            self.config.stop_ids if stop_ids is None else to_ids("stop_ids", stop_ids),
            max_new_tokens,
            _sampling(sampling, temperature, seed),
        )
        request.check(self.config, engine_config)
        return run_one(self._idle_engine(engine_config), request)

    def answers(
        self,
        prompts: Iterable[str | Sequence[int]],
        *,
        settings: Settings | None = None,
        tool_choice: ToolChoice = AUTO,
        sampling: SamplingParams | None = None,
        max_new_tokens: int | None = None,
        max_context_tokens: int = 4096,
        slots: int = 8,
    ) -> Iterator[Answer]:
        """The answer to each prompt, in order, each as soon as it can be given; `Answer.final` is its text.

        Several run at once. On CPUs an answer's tokens are those that its prompt gets alone.

        Args:
            prompts: what users say, each in a conversation of its own; or token ids, as they are.
            settings: what the system and developer messages say; None: the defaults. A response format, and functions
                that are strict, hold the answers to texts; token ids are answered as they are.
            tool_choice: which functions an answer may or has to call.
            sampling: how tokens are drawn, of each answer alike; None: the defaults.
            max_new_tokens: length of an answer at most, its reasoning included; None: as far as the context goes.
            max_context_tokens: prompt and answer at most; memory grows with it.
            slots: answers that run at once; rounded up to a multiple of the mesh's data shards.

        Raises:
            GptossError: a prompt that cannot be said, or none of this model's; none has been run then.
            NumericsError: the model gave logits that are not finite.
        """
        check_list("prompts", prompts, "prompts, each a text or token ids")
        settings, sampling = settings or Settings(), sampling or SamplingParams()
        check_type("settings", settings, Settings)
        slots = self.sharding.even_slots(to_whole("slots", slots))
        engine_config = EngineConfig(slots=slots, max_context_tokens=max_context_tokens)
        tokenizer, requests, streams = load_tokenizer(), [], []
        form = held_form(settings, tool_choice)
        for prompt in prompts:
            streams.append(AnswerStream(tokenizer))
            ids, ends_at = _ids(prompt, settings), streams[-1].ends_at
            constraint = form if isinstance(prompt, str) else None
            request = Request(ids, self.config.stop_ids, max_new_tokens, sampling, ends_at, constraint)
            request.check(self.config, engine_config)
            requests.append(request)
        for sample in collect(self._idle_engine(engine_config), requests, streams):
            if sample.answer.finish_reason == "error":
                raise NumericsError(NOT_FINITE)
            if sample.answer.finish_reason == "constraint":
                raise GptossError(NOT_HELD)
            yield sample.answer

    def _idle_engine(self, engine_config: EngineConfig) -> Engine:
        """The engine that was used last, if it is like this and has nothing to do; else a new one, which is kept."""
        if self._engine is None or self._engine.engine_config != engine_config:
            self._engine = self.engine(engine_config)
        elif not self._engine.is_idle:  # an iterator that is still held keeps its slots
            self._engine = self.engine(engine_config, compiled=self._engine.runner.compiled)
        return self._engine

    def logits(self, token_ids: Sequence[int]) -> Float[np.ndarray, "T V"]:
        """The logits that follow each of `token_ids`, teacher-forced, float32 on the host.

        Runs in chunks through the same cache as generation; lengths are rounded up to powers of two of a chunk, so
        that few programs are compiled.

        Raises:
            RequestError: ids outside the vocabulary.
        """
        token_ids = to_ids("token_ids", token_ids)
        result = np.empty((len(token_ids), self.config.vocab_size), np.float32)
        for at, logits in self._chunks("logits", self._all_logits, token_ids):
            result[at] = np.asarray(logits)[0, : at.stop - at.start]
        return result

    def score(self, token_ids: Sequence[int], *, top_logprobs: int = 0) -> Scores:
        """How likely each of `token_ids` is after those before it, teacher-forced through the same forward.

        Args:
            token_ids: T of them, at least 2: nothing stands before the first, so it has no probability.
            top_logprobs: how many of the likeliest ids to report beside each.

        Raises:
            RequestError: fewer than 2 ids, ids that name no token, or more than the model's context holds; more
                than MAX_TOP_LOGPROBS alternatives.
            NumericsError: the model gave logits that are not finite.
        """
        token_ids = to_ids("token_ids", token_ids)
        if len(token_ids) < 2:
            raise RequestError(f"{len(token_ids)} tokens to score, expected at least 2: the first has none before it")
        if not 0 <= to_whole("top_logprobs", top_logprobs) <= MAX_TOP_LOGPROBS:
            raise RequestError(f"top_logprobs is {top_logprobs}, expected 0 to {MAX_TOP_LOGPROBS}")
        check_named(token_ids, self.config)
        targets = np.roll(np.asarray(token_ids), -1)  # the last has no target: what is there is not read
        chunks = []
        for at, reports in self._chunks("reports", self._all_reports, token_ids, targets, np.bool_(top_logprobs > 0)):
            chunks.append([np.asarray(report)[0, : at.stop - at.start] for report in reports])
        logprobs, ids, tops, finite = (np.concatenate(chunk)[:-1] for chunk in zip(*chunks, strict=True))
        if not finite.all():
            raise NumericsError(f"after token {int(finite.argmin())}: {NOT_FINITE}")
        return Scores(logprobs, ids[:, :top_logprobs], tops[:, :top_logprobs])

    def activations(self, token_ids: Sequence[int], taps: Sequence[str]) -> dict[str, Float[np.ndarray, "T ..."]]:
        """What goes on inside while the model reads `token_ids`, without a cache; compiled for each set of taps.

        Args:
            token_ids: T of them, from position 0.
            taps: names such as "layers/3/router"; `gptoss_jax.model.taps.PLACES` lists the places.

        Returns:
            Name -> activation on the host: residual [T, D], router [T, E], attention [T, N, H].

        Raises:
            RequestError: ids outside the vocabulary.
            GptossError: a tap that this model does not have.
        """
        check_list("taps", taps, "names")
        ids, slots = self._checked(token_ids), self.sharding.size("batch")
        tokens = np.zeros((slots, -(-ids.size // LOGITS_CHUNK_TOKENS) * LOGITS_CHUNK_TOKENS), np.int32)
        tokens[:, : ids.size] = ids
        program = functools.partial(self._forward, tuple(taps))
        run = self._tapped.setdefault(tuple(taps), jax.jit(program, out_shardings=self.sharding.readable))
        found = run(self.params, tokens, np.full(slots, ids.size, np.int32))
        return {name: np.asarray(activation)[0, : ids.size] for name, activation in found.items()}

    def _forward(self, taps: tuple[str, ...], params: Params, tokens: Any, counts: Any) -> dict[str, jax.Array]:
        return transformer.forward(self.model, params, tokens, counts=counts, taps=taps)[1]

    def _compiler(self, described: str) -> CompileProgram:
        """Compiles programs that depend on `described` and on this model, or takes them from `programs_folder`.

        Where JAX's own cache is on, it keeps them: what XLA:CPU has read from there it cannot write a second time.
        """
        of_jax = jax.config.values["jax_compilation_cache_dir"]
        if self.programs_folder is None or of_jax or jax.process_count() > 1:
            return compile_anew
        of_mesh = self.sharding.rules, self.sharding.exchange_name, self.mesh.shape
        of_model = (self.config, *of_mesh, self.policy, self.dense, self.kernels)
        return KeptPrograms(self.programs_folder, self.mesh.devices.flat, f"{of_model} {described}").compile

    def _checked(self, token_ids: Sequence[int]) -> np.ndarray:
        """The ids as an array, of which each is within the vocabulary, and which the context holds."""
        ids = np.asarray(token_ids)
        is_list = ids.ndim == 1 and ids.size and np.issubdtype(ids.dtype, np.integer)
        if not is_list or ids.min() < 0 or ids.max() >= self.config.vocab_size:
            got = f"{ids.dtype} of shape {ids.shape}" + (f", {ids.min()} to {ids.max()}" if is_list else "")
            raise RequestError(f"token ids of {got}: expected a list of ids from 0 to {self.config.vocab_size - 1}")
        if ids.size > self.config.max_context_tokens:
            raise RequestError(f"{ids.size} tokens, the model has {self.config.max_context_tokens} at most")
        return ids

    def _chunks(
        self, name: str, program: Any, token_ids: Sequence[int], *arguments: Any
    ) -> Iterator[tuple[slice, Any]]:
        """What `program` gives for each chunk of `token_ids`, and which tokens those are: one sequence per data shard.

        It is compiled once for each capacity of the cache, under its name. Of `arguments`, arrays are cut like the
        tokens, and scalars are passed as they are.
        """
        ids = self._checked(token_ids)
        width, slots = LOGITS_CHUNK_TOKENS, self.sharding.size("batch")  # one slot per data shard, all alike
        chunks = -(-ids.size // width)
        capacity = width << (chunks - 1).bit_length()
        cache = self._cache(slots, capacity)

        def cut(array: np.ndarray, at: slice) -> np.ndarray:
            chunk = np.zeros(width, np.int32)
            chunk[: at.stop - at.start] = array[at]
            return np.broadcast_to(chunk, (slots, width))

        for first in range(0, ids.size, width):
            at = slice(first, min(first + width, ids.size))
            counts = np.full(slots, at.stop - at.start, np.int32)
            others = [cut(x, at) if np.ndim(x) else x for x in arguments]
            inputs = (self.params, cut(ids, at), counts, cache, *others)
            if (name, capacity) not in self._programs:
                self._programs[name, capacity] = self._compiler(str(capacity))(name, program, inputs)
            results, cache = self._programs[name, capacity](*inputs)
            yield at, results

    def _cache(self, slots: int, tokens: int) -> kv_cache.KVCache:
        """A cache in which each slot owns its shard's pages, in order."""
        pages = kv_cache.num_pages(tokens, kv_cache.page_tokens(self.sharding))
        if tokens not in self._allocators:  # compiled once for each capacity
            self._allocators[tokens] = kv_cache.allocator(
                self.config,
                self.sharding,
                slots=slots,
                pages=slots * pages,
                max_context_tokens=tokens,
                dtype=self.policy.cache,
            )
        table = np.broadcast_to(np.arange(pages, dtype=np.int32), (slots, pages))
        return self._allocators[tokens]()._replace(page_table=self.sharding.put(table, ("batch", None)))

    @functools.cached_property
    def _all_logits(self) -> Any:
        shardings = self.sharding.readable, kv_cache.layout(self.config, self.sharding)
        return jax.jit(functools.partial(transformer.all_logits, self.model), donate_argnums=3, out_shardings=shardings)

    @functools.cached_property
    def _all_reports(self) -> Any:
        def all_reports(params, tokens, counts, cache, targets, with_top):
            logits, cache = transformer.all_logits(self.model, params, tokens, counts, cache)
            finite = jnp.all(jnp.isfinite(logits), axis=-1)
            total = row_sum(self.mesh.size)
            return (*report_logprobs(logits, targets, with_top, self.config.num_token_ids, total), finite), cache

        shardings = self.sharding.readable, kv_cache.layout(self.config, self.sharding)
        return jax.jit(all_reports, donate_argnums=3, out_shardings=shardings)


def _ids(prompt: str | Sequence[int], settings: Settings | None) -> tuple[int, ...]:
    """Token ids; a text becomes a user's message after what the settings say."""
    if not isinstance(prompt, str):
        return to_ids("token_ids", prompt)
    from gptoss_jax.harmony import messages, render  # here, so that who has ids need not wait for openai-harmony

    return tuple(render.render([messages.user(prompt)], settings or Settings()))


def _sampling(sampling: SamplingParams | None, temperature: float | None, seed: int | None) -> SamplingParams:
    """The options, given whole or as the two that are most used."""
    if sampling is None:
        return SamplingParams(temperature=1.0 if temperature is None else temperature, seed=seed or 0)
    if temperature is not None or seed is not None:
        raise GptossError("temperature and seed beside sampling: expected them inside it")
    return sampling
