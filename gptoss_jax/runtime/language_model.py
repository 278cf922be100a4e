"""Where config, mesh, checkpoint, kernels and engine meet: `load`, and the flags that every command shares."""

import dataclasses
import functools
import operator
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from jaxtyping import Float, Int32

from gptoss_jax.checkpoints import host_memory, orbax, published
from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.request import NOT_FINITE, EngineConfig, Event, NumericsError, Request, RequestError
from gptoss_jax.engine.runner import Compiled, ModelRunner
from gptoss_jax.engine.sampling import report_logprobs
from gptoss_jax.engine.sampling_params import MAX_TOP_LOGPROBS, SamplingParams
from gptoss_jax.engine.scheduler import Scheduler
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony import tokenizer
from gptoss_jax.model import kv_cache, layers, sharding, transformer
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.sharding import Sharding
from gptoss_jax.model.transformer import DtypePolicy, Model, Params
from pallas_kernels import expert_mlp as expert_op
from pallas_kernels.choice import Hardware

LOGITS_CHUNK_TOKENS = 256
DENSE_ITEMSIZE = {"bfloat16": 2, "int8": 1}  # bytes of a weight of attention and unembedding


class Scores(NamedTuple):
    """Log probabilities (natural, by the model's own distribution) of T tokens but the first; Z alternatives each."""

    logprobs: Float[np.ndarray, "T-1"]
    top_ids: Int32[np.ndarray, "T-1 Z"]  # the likeliest first
    top_logprobs: Float[np.ndarray, "T-1 Z"]


@dataclasses.dataclass
class LanguageModel:
    """A gpt-oss model with its weights, laid out over a mesh.

    Attributes:
        config: the architecture.
        sharding: the mesh and its rules.
        params: weights, a nested dict of arrays as stored (bfloat16, uint8).
        model: the declaration that `gptoss_jax.model.step` runs.
        policy: which number format holds what.
        dense: that of attention's and the unembedding's weights.
        kernels: for each op, the implementation chosen and why.
        source: what the weights were read from, in words.
        weights_are_random: whether the files say that nobody trained them.
        load_seconds: from the call of `load` to weights on the devices.
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
    _engine: Engine | None = None
    _allocators: dict[int, Callable[[], kv_cache.KVCache]] = dataclasses.field(default_factory=dict)

    def decode_bytes(self, rows: int, context_tokens: int) -> int:
        """`ModelConfig.decode_bytes` in the number formats that hold weights and cache here."""
        return self.config.decode_bytes(rows, context_tokens, self.policy.cache.itemsize, DENSE_ITEMSIZE[self.dense])

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
        """
        runner = ModelRunner(
            self.model,
            self.params,
            self.config,
            self.sharding,
            self.policy.cache,
            engine_config,
            compiled=compiled,
            report=report,
        )
        return Engine(runner, self.config, engine_config, scheduler=scheduler)

    def generate(
        self,
        token_ids: Sequence[int],
        *,
        max_new_tokens: int | None = 256,
        temperature: float | None = None,
        seed: int | None = None,
        sampling: SamplingParams | None = None,
        stop_ids: Sequence[int] | None = None,
        max_context_tokens: int = 4096,
    ) -> Iterator[Event]:
        """Events with the tokens that follow `token_ids`, as they come; the last one says why it ended.

        The engine is compiled at the first call and kept; it is compiled anew for another `max_context_tokens`.

        Args:
            token_ids: the prompt.
            max_new_tokens: length of the answer at most; None: as far as the context goes.
            temperature: 1 where left out; a short way to `sampling`, and so is `seed`, 0 where left out.
            seed: see `SamplingParams`.
            sampling: all options of drawing, in place of `temperature` and `seed`.
            stop_ids: ids after which the answer ends; None: those of the model's config.json.
            max_context_tokens: prompt and answer at most; memory follows it.

        Raises:
            GptossError: a sampling option out of its range, or given twice.
            RequestError: ids outside the vocabulary, or more tokens than the context holds.
        """
        engine_config = EngineConfig(slots=self.sharding.size("batch"), max_context_tokens=max_context_tokens)
        request = Request(
            tuple(map(operator.index, token_ids)),
            tuple(map(operator.index, self.config.stop_ids if stop_ids is None else stop_ids)),
            max_new_tokens,
            _sampling(sampling, temperature, seed),
        )
        request.check(self.config, engine_config)
        if self._engine is None or self._engine.engine_config != engine_config:
            self._engine = self.engine(engine_config)
        elif not self._engine.is_idle:  # an iterator that is still held: it keeps its rows, we get rows of our own
            self._engine = self.engine(engine_config, compiled=self._engine.runner.compiled)
        return _run_one(self._engine, request)

    def logits(self, token_ids: Sequence[int]) -> Float[np.ndarray, "T V"]:
        """The logits that follow each of `token_ids`, teacher-forced, float32 on the host.

        Runs in chunks through the same cache as generation; lengths are rounded up to powers of two of a chunk, so
        that few programs are compiled.

        Raises:
            RequestError: ids outside the vocabulary.
        """
        result = np.empty((len(token_ids), self.config.vocab_size), np.float32)
        for at, logits in self._chunks(self._all_logits, token_ids):
            result[at] = np.asarray(logits)[0, : at.stop - at.start]
        return result

    def score(self, token_ids: Sequence[int], *, top_logprobs: int = 0) -> Scores:
        """How likely each of `token_ids` is behind those before it, teacher-forced through the same forward.

        Args:
            token_ids: T of them, at least 2: nothing stands before the first, so it has no probability.
            top_logprobs: how many of the likeliest ids to report beside each.

        Raises:
            RequestError: fewer than 2 ids, ids that name no token, or more than the model's context holds; more
                than MAX_TOP_LOGPROBS alternatives.
            NumericsError: the model gave logits that are not finite.
        """
        if len(token_ids) < 2:
            raise RequestError(f"{len(token_ids)} tokens to score, expected at least 2: the first has none before it")
        if not 0 <= top_logprobs <= MAX_TOP_LOGPROBS:
            raise RequestError(f"top_logprobs is {top_logprobs}, expected 0 to {MAX_TOP_LOGPROBS}")
        check_named(token_ids, self.config)
        targets = np.roll(np.asarray(token_ids), -1)  # the last has no target: what is there is not read
        parts = []
        for at, found in self._chunks(self._all_reports, token_ids, targets, np.bool_(top_logprobs > 0)):
            parts.append([np.asarray(part)[0, : at.stop - at.start] for part in found])
        logprobs, ids, tops, finite = (np.concatenate(part)[:-1] for part in zip(*parts, strict=True))
        if not finite.all():
            raise NumericsError(f"behind token {int(finite.argmin())}: {NOT_FINITE}")
        return Scores(logprobs, ids[:, :top_logprobs], tops[:, :top_logprobs])

    def _chunks(self, program: Any, token_ids: Sequence[int], *arguments: Any) -> Iterator[tuple[slice, Any]]:
        """What `program` gives for each chunk of `token_ids`, and which tokens those are; one row of each shard.

        Of `arguments`, arrays are cut like the tokens, and scalars are passed as they are.
        """
        ids = np.asarray(token_ids)
        whole = ids.ndim == 1 and ids.size and np.issubdtype(ids.dtype, np.integer)
        if not whole or ids.min() < 0 or ids.max() >= self.config.vocab_size:
            got = f"{ids.dtype} of shape {ids.shape}" + (f", {ids.min()} to {ids.max()}" if whole else "")
            raise RequestError(f"token ids of {got}: expected a list of ids from 0 to {self.config.vocab_size - 1}")
        if ids.size > self.config.max_context_tokens:
            raise RequestError(f"{ids.size} tokens, the model has {self.config.max_context_tokens} at most")
        width, rows = LOGITS_CHUNK_TOKENS, self.sharding.size("batch")  # one row per data shard, all alike
        chunks = -(-ids.size // width)
        cache = self._row_cache(rows, width << (chunks - 1).bit_length())

        def cut(array: np.ndarray, at: slice) -> np.ndarray:
            chunk = np.zeros(width, np.int32)
            chunk[: at.stop - at.start] = array[at]
            return np.broadcast_to(chunk, (rows, width))

        for first in range(0, ids.size, width):
            at = slice(first, min(first + width, ids.size))
            counts = np.full(rows, at.stop - at.start, np.int32)
            others = [cut(x, at) if np.ndim(x) else x for x in arguments]
            found, cache = program(self.params, cut(ids, at), counts, cache, *others)
            yield at, found

    def _row_cache(self, rows: int, tokens: int) -> kv_cache.KVCache:
        """A cache in which each row owns its shard's pages, in order."""
        pages = kv_cache.num_pages(tokens)
        if tokens not in self._allocators:  # compiled once for each capacity
            self._allocators[tokens] = kv_cache.allocator(
                self.config,
                self.sharding,
                slots=rows,
                pages=rows * pages,
                max_context_tokens=tokens,
                dtype=self.policy.cache,
            )
        cache = self._allocators[tokens]()
        table = np.broadcast_to(np.arange(pages, dtype=np.int32), (rows, pages))
        return cache._replace(page_table=jax.device_put(table, cache.page_table.sharding))

    @functools.cached_property
    def _all_logits(self) -> Any:
        layouts = self.sharding.named(("batch", None, None)), kv_cache.layout(self.config, self.sharding)
        return jax.jit(functools.partial(transformer.all_logits, self.model), donate_argnums=3, out_shardings=layouts)

    @functools.cached_property
    def _all_reports(self) -> Any:
        def all_reports(params, tokens, counts, cache, targets, with_top):
            logits, cache = transformer.all_logits(self.model, params, tokens, counts, cache)
            finite = jnp.all(jnp.isfinite(logits), axis=-1)
            return (*report_logprobs(logits, targets, with_top, self.config.num_token_ids), finite), cache

        layouts = None, kv_cache.layout(self.config, self.sharding)
        return jax.jit(all_reports, donate_argnums=3, out_shardings=layouts)


def check_named(token_ids: Sequence[int], config: ModelConfig) -> None:
    """Raises RequestError for an id that names no token: rows of the embedding behind those have no probability."""
    for position, token in enumerate(token_ids):
        if not 0 <= token < config.num_token_ids:
            raise RequestError(
                f"token id {token} at position {position} names no token, expected 0 to {config.num_token_ids - 1}"
            )


def _sampling(sampling: SamplingParams | None, temperature: float | None, seed: int | None) -> SamplingParams:
    """The options, given whole or as the two that are most used."""
    if sampling is None:
        return SamplingParams(temperature=1.0 if temperature is None else temperature, seed=seed or 0)
    if temperature is not None or seed is not None:
        raise GptossError("temperature and seed beside sampling: expected them inside it")
    return sampling


def _run_one(engine: Engine, request: Request) -> Iterator[Event]:
    """The events of a request; if the caller loses interest, the engine is free again."""
    request_id = engine.submit(request)

    def events() -> Iterator[Event]:
        try:
            yield from engine.run()
        finally:
            engine.cancel(request_id)

    return events()


def load(
    path: str | os.PathLike[str],
    *,
    mesh: str | Path | Mesh | Sharding | None = None,
    dtype: str = "bfloat16",
    dense: str = "bfloat16",
    kernels: str = "auto",
    report: Callable[[int, int], object] = lambda done_bytes, total_bytes: None,
) -> LanguageModel:
    """The model at `path`, ready to run.

    Args:
        path: a converted (Orbax) checkpoint, or a folder of safetensors in any published layout, read as it is.
        mesh: None for one device; "data=2,expert=4,tensor=1"; a .json file; or a mesh with these axes.
        dtype: "bfloat16", or "float32" to compute in float32 throughout.
        dense: weights of attention and unembedding: "bfloat16" as stored, or "int8", which halves their bytes and is no
            longer exact (docs/numerics.md has its cost); experts stay as they are.
        kernels: "auto", or implementations by name, which then run or raise: see `layers.choose_kernels`.
        report: called with the bytes of weights that are loaded, and of all.

    Raises:
        ConfigError: the checkpoint's config.json is not a gpt-oss model.
        MeshError: the mesh does not fit the devices or the model.
        CheckpointError: the checkpoint is absent, incomplete, or not of this model.
        GptossError: an unknown dtype, dense or kernel.
    """
    began = time.perf_counter()
    if dtype not in transformer.DTYPE_POLICIES:
        raise GptossError(f"dtype is {dtype!r}, expected one of {', '.join(transformer.DTYPE_POLICIES)}")
    if dense not in DENSE_ITEMSIZE:
        raise GptossError(f"dense is {dense!r}, expected one of {', '.join(DENSE_ITEMSIZE)}")
    policy = transformer.DTYPE_POLICIES[dtype]
    laid_out = sharding.make(mesh)
    chosen, reason = layers.choose_kernels(kernels, Hardware.of(laid_out.mesh.devices.flat[0]), policy.activations)
    stored = _open(Path(path))
    laid_out.check(stored.config, slots=laid_out.size("batch"))
    declared = transformer.declare(stored.config, laid_out, chosen, policy)
    total = sum(orbax.leaf_bytes(leaf) for leaf in declared.leaves.values())
    loaded = 0

    def report_more(num_bytes: int) -> None:
        nonlocal loaded
        loaded += num_bytes
        report(loaded, total)

    leaves = with_dense(stored.read(declared.leaves, laid_out, report_more), declared, dense)
    leaves = with_layout(leaves, declared, chosen.expert_mlp.layout, laid_out)
    params = jax.block_until_ready(transformer.nest(leaves))
    return LanguageModel(
        config=stored.config,
        sharding=laid_out,
        params=params,
        model=declared,
        policy=policy,
        dense=dense,
        kernels=reason,
        source=stored.described,
        weights_are_random=_are_random(stored.provenance),
        load_seconds=time.perf_counter() - began,
    )


def with_dense(leaves: dict[str, jax.Array], declared: Model, dense: str) -> dict[str, Any]:
    """`leaves` with the weights of dense products in a format of DENSE_ITEMSIZE.

    They are taken out of `leaves` one by one, so that little is in memory twice.
    """
    if dense == "bfloat16":
        return leaves
    sizes = {path: leaf.num_inputs for path, leaf in declared.leaves.items()}
    return {path: _quantized(leaves.pop(path), sizes[path]) for path in list(leaves)}


def _quantized(array: jax.Array, num_inputs: int) -> Any:
    return jax.block_until_ready(_quantize(array, num_inputs)) if num_inputs else array


_quantize = jax.jit(layers.quantize, static_argnums=1)


def with_layout(
    leaves: dict[str, Any], declared: Model, layout: expert_op.WeightLayout, sharding: Sharding
) -> dict[str, Any]:
    """`leaves` with the experts' weights in `layout`, each on the devices that its axes then name.

    They are taken out of `leaves` one by one, so that little is in memory twice.

    Raises:
        GptossError: the kernel that wants this layout cannot read a value.
    """

    def rearranged(path: str, way: expert_op.Rearrangement) -> Any:
        array = leaves.pop(path)
        if way is expert_op.AS_PUBLISHED:
            return array
        if way.greatest is not None and (found := int(jnp.max(array))) > way.greatest:
            raise GptossError(
                f"{path} holds the byte {found}, and the chosen kernel reads up to {way.greatest}: "
                "--kernels expert_mlp=reference reads any"
            )
        return jax.block_until_ready(packing(way, declared.leaves[path].axes, sharding)(array))

    return {path: rearranged(path, way) for path, way in declared.rearrangements(layout).items()}


def packing(way: expert_op.Rearrangement, axes: tuple[Any, ...], sharding: Sharding) -> Callable[[Any], jax.Array]:
    """`way.pack` of an array with these axes, compiled: each device packs its own experts, one after the other.

    All at once, a TPU's compiler takes up to 30 times the array on the way.
    """

    def each_expert(array: jax.Array) -> jax.Array:
        return jax.lax.map(lambda expert: way.pack(expert[None])[0], array)

    to = way.axes(axes)
    return jax.jit(sharding.map(each_expert, in_axes=(axes,), out_axes=to), out_shardings=sharding.row_major(to))


class _Stored(NamedTuple):
    """Weights on disk, and how to read them."""

    config: ModelConfig
    described: str
    provenance: dict[str, Any]
    read: Callable[[dict[str, transformer.Leaf], Sharding, Callable[[int], object]], dict[str, jax.Array]]


def _open(path: Path) -> _Stored:
    """What lies at `path`."""
    if orbax.is_checkpoint(path) or orbax.is_unfinished(path):
        orbax.Manifest.read(path)  # raises for an unfinished one, and says what to do
        read = functools.partial(orbax.restore, path)
        return _Stored(orbax.read_config(path), "Orbax checkpoint", orbax.read_provenance(path), read)
    source = published.open_source(path)
    metadata = {"source": {"files": [{"metadata": file.metadata} for file in source.files.values()]}}
    return _Stored(source.config, f"safetensors ({source.layout})", metadata, functools.partial(published.load, source))


def _are_random(provenance: dict[str, Any]) -> bool:
    """Whether the published files said of themselves that their weights are random.

    Raises:
        CheckpointError: the record is not of the form that `Source.provenance` gives it.
    """
    try:
        files = provenance.get("source", {}).get("files", [])
        return any("random" in (file["metadata"] or {}).get("weights", "") for file in files)
    except (AttributeError, KeyError, TypeError):
        raise orbax.CheckpointError("provenance.json: damaged, convert again") from None


# ---- for commands ----


FLAGS = ("checkpoint", "mesh", "dtype", "dense", "kernels", "compilation_cache", "vocab")


def define_flags() -> None:
    """The flags that every command which runs a model shares, those in FLAGS; all but vocab are `load_from_flags`'s."""
    flags.DEFINE_string("checkpoint", None, "FOLDER: A converted checkpoint, or a folder of published safetensors.")
    flags.DEFINE_string("mesh", "", 'AXES: Devices: "data=1,expert=4,tensor=2" or a .json file; empty: one device.')
    flags.DEFINE_enum("dtype", "bfloat16", list(transformer.DTYPE_POLICIES), "Number format of the activations.")
    flags.DEFINE_enum(
        "dense", "bfloat16", list(DENSE_ITEMSIZE), "Weights of attention and unembedding; int8 is rounded."
    )
    flags.DEFINE_string("kernels", "auto", "NAMES: auto, or by name: attention=reference,expert_mlp=reference.")
    flags.DEFINE_string(
        "compilation_cache",
        None,
        "FOLDER: Where compiled programs are kept; left out: in the user's cache folder; empty: nowhere.",
    )
    flags.DEFINE_string("vocab", None, "FILE: A vocabulary in place of the packaged o200k_base.tiktoken.")


def config_from_flags(options: flags.FlagValues) -> ModelConfig:
    """The architecture of --checkpoint, without its weights: what a request can be checked against at once.

    Raises:
        GptossError: --checkpoint is missing, unfinished, or no gpt-oss model.
    """
    if not options.checkpoint:
        raise GptossError("--checkpoint is missing, expected a converted checkpoint or a folder of safetensors")
    return _open(Path(options.checkpoint)).config


def load_from_flags(
    options: flags.FlagValues, report: Callable[[int, int], object] = lambda done_bytes, total_bytes: None
) -> LanguageModel:
    """`load` with the shared flags, compiled programs being kept across processes.

    Raises:
        GptossError: as `load`.
    """
    keep_compiled_programs(options.compilation_cache)
    return load(
        options.checkpoint,
        mesh=options.mesh or None,
        dtype=options.dtype,
        dense=options.dense,
        kernels=options.kernels,
        report=report,
    )


def keep_compiled_programs(folder: str | None) -> None:
    """Lets XLA keep its programs in `folder` (None: xla/ in the user's cache folder; "": nowhere)."""
    if folder is None:
        folder = str(tokenizer.cache_folder() / "xla")
    if folder and not _is_writable(Path(folder)):
        print(f"compiled programs are not kept: cannot write to {folder} (--compilation-cache)", file=sys.stderr)
    elif folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def read_bandwidth(device: Any, num_bytes: int = 1 << 28, repeats: int = 5) -> float:
    """Bytes per second that `device` reads from its memory: best of a few sums over a large array."""
    ones = host_memory.empty(num_bytes).view(np.float32).reshape(256, -1)  # as weights lie, and not twice beside them
    ones.fill(1)
    x = jax.device_put(ones, device)
    total = jax.jit(lambda a: jnp.sum(a, axis=1)).lower(x).compile()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        total(x).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return num_bytes / min(seconds)
