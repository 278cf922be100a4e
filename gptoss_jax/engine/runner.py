"""An engine's part on the devices: the cache, the slots' state, and the compiled programs that change them.

Knows slots and pages by number, and nothing of requests that wait. Everything is compiled before the first token, for
fixed shapes; what varies (lengths, sampling, stop ids, steps per dispatch) is data.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.engine import programs, sampling
from gptoss_jax.engine.held import HeldSlots
from gptoss_jax.engine.held_decode import Holds, decode_held
from gptoss_jax.engine.programs import NO_TOKEN, Chunks, RingCopy, SlotOptions, SlotState
from gptoss_jax.engine.request import EngineConfig, Request
from gptoss_jax.engine.sampling import Draw
from gptoss_jax.model import kv_cache
from gptoss_jax.model.config import ModelConfig
from gptoss_jax.model.config_ranges import MAX_STOP_IDS
from gptoss_jax.model.sharding import Sharding
from gptoss_jax.model.transformer import Model, Params


class Chunk(NamedTuple):
    """What one slot reads in one dispatch.

    Attributes:
        tokens: the next of its prompt, no more than the dispatch is wide.
        budget: tokens that may be drawn after them; 0: the prompt goes on.
    """

    tokens: Sequence[int]
    budget: int


class Pending(NamedTuple):
    """A token that goes into the cache with the next step of decoding, where no chunk of the prompt draws it.

    Attributes:
        token: its id.
        budget: tokens that may be drawn after it.
    """

    token: int
    budget: int


NOTHING_PENDING = Pending(0, 0)

CompileProgram = Callable[[str, Any, tuple[Any, ...]], Any]
"""Compiles the program of this name, a jitted function, for these arguments."""


def compile_anew(name: str, program: Any, arguments: tuple[Any, ...]) -> Any:
    """Traces and compiles, whatever was compiled before."""
    del name
    return program.lower(*arguments).compile()


class Compiled(NamedTuple):
    """The programs of an engine, compiled for its shapes."""

    admit: Any
    halt: Any
    prefill: dict[int, Any]  # by width
    decode: Any
    later: dict[str, Any]  # programs that are compiled when they are first asked for
    save_rings: Any = None  # without a prefix cache, neither
    restore_rings: Any = None


class ModelRunner:
    """Runs the model for an engine's slots.

    Attributes:
        deterministic: see `EngineConfig`; chosen here where that leaves it open.
        forms: how slots share the arithmetic.
        num_shards: data shards, each with its own slots and pages.
        pages_per_shard: pages of the pool of each.
        page_tokens: of a page, over all the devices that hold parts of it.
        snapshots_per_shard: rings that each can keep for prefixes; 0: there is no prefix cache.
        compiled: the programs, for another runner just like this one.
        compile_seconds: what compiling them took.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        config: ModelConfig,
        sharding: Sharding,
        cache_dtype: jnp.dtype,
        engine_config: EngineConfig,
        *,
        compiled: Compiled | None = None,
        compile_program: CompileProgram = compile_anew,
        report: Callable[[int, int], object] = lambda done, total: None,
    ):
        """`compiled` are the programs of a runner just like this one; `report` hears how many of all are compiled."""
        sharding.check(config, engine_config.slots)
        self._config, self._engine_config, self._sharding, self._params = config, engine_config, sharding, params
        on_cpu = sharding.mesh.devices.flat[0].platform == "cpu"
        self.deterministic = on_cpu if engine_config.deterministic is None else engine_config.deterministic
        self.forms = programs.choose(model, config, sharding, deterministic=self.deterministic)
        self.num_shards = sharding.size("batch")
        self.page_tokens = kv_cache.page_tokens(sharding)
        self.pages_per_shard = -(-_pool_pages(engine_config, self.page_tokens) // self.num_shards)
        self._slots_per_shard = engine_config.slots // self.num_shards
        width = kv_cache.num_pages(engine_config.max_context_tokens, self.page_tokens)
        self._table = np.zeros((engine_config.slots, width), np.int32)
        self._table_changed = False
        self._cache = kv_cache.allocator(
            config,
            sharding,
            slots=engine_config.slots,
            pages=self.pages_per_shard * self.num_shards,
            max_context_tokens=engine_config.max_context_tokens,
            dtype=cache_dtype,
        )()
        self._options, self._state = self._empty_slots()
        self.snapshots_per_shard = -(-num_snapshots(engine_config, self.page_tokens) // self.num_shards)
        self._snapshots = self._empty_snapshots(cache_dtype) if self.snapshots_per_shard else None
        self._compile_program = compile_program
        began = time.perf_counter()
        self.compiled = compiled or self._compile(compile_program, report)
        self.compile_seconds = time.perf_counter() - began

    # ---- set-up ----

    def _empty_slots(self) -> tuple[SlotOptions, SlotState]:
        axes = (programs.OPTIONS_AXES, programs.STATE_AXES)
        one, count = self._slot(Request((), ()), ()), self._engine_config.slots
        every = jax.tree.map(lambda x: np.broadcast_to(x, (count, *np.shape(x))), one)
        return jax.tree.map(self._sharding.put, every, axes)

    def _empty_snapshots(self, dtype: jnp.dtype) -> kv_cache.Rings:
        return kv_cache.ring_allocator(
            self._config,
            self._sharding,
            count=self.snapshots_per_shard * self.num_shards,
            max_context_tokens=self._engine_config.max_context_tokens,
            dtype=dtype,
        )()

    def _slot(self, request: Request, drawn: Sequence[int], pending: Pending = NOTHING_PENDING) -> tuple[Any, Any]:
        """Options and state of a slot, on the host, without the leading axis; it is active if something is pending."""
        config = self._config
        stop_ids = np.full(MAX_STOP_IDS, NO_TOKEN, np.int32)
        stop_ids[: len(request.stop_ids)] = request.stop_ids
        constants = sampling.constants(request.sampling, request.token_ids, config.vocab_size, config.num_token_ids)
        state = [*map(np.int32, pending), sampling.count_ids(drawn, config.vocab_size)]
        return SlotOptions._make([stop_ids, constants]), SlotState._make(state)

    def _to_slots(self, array: np.ndarray) -> jax.Array:
        """A host array with a leading slot axis, each slot on its data shard."""
        return self._sharding.put(array, ("batch", *(None,) * (array.ndim - 1)))

    def _compile(self, compile_program: CompileProgram, report: Callable[[int, int], object]) -> Compiled:
        cache, options, state = jax.tree.map(lambda x: x.sharding, (self._cache, self._options, self._state))
        draws = self._sharding.readable
        widths = sorted(set(self._engine_config.prefill_widths))
        done = itertools.count(1)

        def build(name: str, program: Any, *arguments: Any) -> Any:
            compiled = compile_program(name, program, arguments)
            report(next(done), len(widths) + (3 if self._snapshots is None else 5))
            return compiled

        decode = functools.partial(programs.decode, self.forms.decode)
        admit = jax.jit(programs.admit, donate_argnums=(0, 1, 2), out_shardings=(cache.lengths, options, state))
        halt = jax.jit(programs.halt, donate_argnums=0, out_shardings=state.remaining)
        prefill = jax.jit(self.forms.prefill.prefill, donate_argnums=(1, 3), out_shardings=(draws, cache, state))
        decode = jax.jit(decode, donate_argnums=(1, 3), out_shardings=(draws, cache, state))
        slots, none = (self._options, self._state), np.int32(0)
        nobody = self._to_slots(np.zeros(self._engine_config.slots, np.bool_))
        return Compiled(
            admit=build("admit", admit, self._cache.lengths, *slots, none, none, self._slot(Request((), ()), ())),
            halt=build("halt", halt, self._state.remaining, nobody),
            prefill={
                width: build(f"prefill-{width}", prefill, self._params, self._cache, *slots, *self._chunks(width, {}))
                for width in widths
            },
            decode=build("decode", decode, self._params, self._cache, *slots, np.int32(1)),
            later={},
            **({} if self._snapshots is None else self._compile_ring_copies(build, self._snapshots)),
        )

    def _compile_ring_copies(self, build: Callable[..., Any], snapshots: kv_cache.Rings) -> dict[str, Any]:
        """The programs that save rings to `snapshots`, and restore them."""
        copy = functools.partial(programs.copy_rings, self._sharding, self._config)
        copy = jax.jit(
            copy, donate_argnums=1, out_shardings=self._sharding.named_tree(kv_cache.ring_axes(self._config))
        )
        rings, nothing = kv_cache.rings(self._config, self._cache), self._ring_copy(0, 0, 0)
        return {
            "save_rings": build("save-rings", copy, rings, snapshots, nothing),
            "restore_rings": build("restore-rings", copy, snapshots, rings, nothing),
        }

    @property
    def on_several_hosts(self) -> bool:
        """Whether other processes run the same programs, and so have to decide the same on their own."""
        return self._sharding.mesh.is_multi_process

    @property
    def prefills_in_one_batch(self) -> bool:
        """Whether the prompts of all slots can be read in one dispatch, or one of each data shard."""
        return self.forms.prefill.num_chunks is None

    @property
    def decodes_in_one_batch(self) -> bool:
        """Whether a decoding step runs the model once for all slots, or once for each."""
        return self.forms.decode.num_chunks is None

    # ---- slots and pages ----

    def shard_of(self, slot: int) -> int:
        """The data shard that a slot and its pages lie in."""
        return slot // self._slots_per_shard

    def admit(
        self,
        slot: int,
        request: Request,
        drawn: Sequence[int],
        cached: int = 0,
        pending: Pending = NOTHING_PENDING,
    ) -> None:
        """Makes a slot ready for a request, of whose answer `drawn` is known; its pages come with `set_pages`.

        `cached` tokens of its prompt are in these pages already, and in the rings that `restore_rings` gives it. Where
        something is `pending`, the slot would decode at once: until its prompt is read, it has to sit out.
        """
        numbers = np.int32(slot), np.int32(cached)
        lengths, self._options, self._state = self.compiled.admit(
            self._cache.lengths, self._options, self._state, *numbers, self._slot(request, drawn, pending)
        )
        self._cache = self._cache._replace(lengths=lengths)

    def save_rings(self, slot: int, snapshot: int) -> None:
        """Copies a slot's rings to a snapshot of its shard, counted within the shard."""
        rings, copy = kv_cache.rings(self._config, self._cache), self._ring_copy(slot, self._in_shard(slot), snapshot)
        self._snapshots = self.compiled.save_rings(rings, self._snapshots, copy)

    def restore_rings(self, slot: int, snapshot: int) -> None:
        """Copies a snapshot of a slot's shard to the slot's rings."""
        rings, copy = kv_cache.rings(self._config, self._cache), self._ring_copy(slot, snapshot, self._in_shard(slot))
        self._cache = kv_cache.with_rings(
            self._config, self._cache, self.compiled.restore_rings(self._snapshots, rings, copy)
        )

    def _in_shard(self, slot: int) -> int:
        return slot % self._slots_per_shard

    def _ring_copy(self, slot: int, source: int, target: int) -> RingCopy:
        """A copy within the slot's shard."""
        of_shards = np.zeros((len(RingCopy._fields), self.num_shards), np.int32)
        of_shards[:, self.shard_of(slot)] = source, target, 1
        return RingCopy(*map(self._to_slots, of_shards))

    def set_pages(self, slot: int, pages: Sequence[int]) -> None:
        """Says where a slot's tokens lie: pages of its shard, in the order of its positions."""
        self._table[slot, : len(pages)] = pages
        self._table_changed = True

    def _send_table(self) -> None:
        """Brings the devices' page table up to date, once a dispatch at most."""
        if self._table_changed:
            table = self._to_slots(self._table.copy())
            self._cache, self._table_changed = self._cache._replace(page_table=table), False

    def halt(self, slots: Sequence[int]) -> None:
        """Has these slots draw no more."""
        if slots:
            halted = np.zeros(self._engine_config.slots, np.bool_)
            halted[list(slots)] = True
            remaining = self.compiled.halt(self._state.remaining, self._to_slots(halted))
            self._state = self._state._replace(remaining=remaining)

    # ---- dispatches ----

    def choose_chunk(self, unread: Mapping[int, int]) -> tuple[int, list[int]]:
        """The width of the next chunk, and the slots that take part in it.

        Where prompts are read alone, one slot of each data shard goes, and the width follows from its own prompt.

        Args:
            unread: slot -> tokens of its prompt that are not in the cache; the first are served first.
        """
        widths = sorted(self.compiled.prefill)
        fitting = {slot: next((w for w in widths if w >= left), widths[-1]) for slot, left in unread.items()}
        if self.prefills_in_one_batch:
            return max(fitting.values()), list(unread)
        width = next(iter(fitting.values()))
        first = {self.shard_of(slot): slot for slot in reversed(unread) if fitting[slot] == width}
        return width, list(first.values())

    def prefill(self, width: int, chunks: Mapping[int, Chunk]) -> Draw:
        """Reads a chunk of each slot's prompt, and gives draws [C, ...], on the devices: `place_of` says whose."""
        self._send_table()
        draw, self._cache, self._state = self.compiled.prefill[width](
            self._params, self._cache, self._options, self._state, *self._chunks(width, chunks)
        )
        return draw

    def place_of(self, slot: int) -> int:
        """The slot's place among the chunks of a prefill, and among its draws."""
        return slot if self.prefills_in_one_batch else self.shard_of(slot)

    def _chunks(self, width: int, chunks: Mapping[int, Chunk]) -> tuple[Chunks, jax.Array]:
        count = self.forms.prefill.num_chunks or self._engine_config.slots
        tokens, counts, budget = (np.zeros(shape, np.int32) for shape in ((count, width), count, count))
        at = np.zeros(self.num_shards, np.int32)
        for slot, chunk in chunks.items():
            place = self.place_of(slot)
            tokens[place, : len(chunk.tokens)] = chunk.tokens
            counts[place], budget[place] = len(chunk.tokens), chunk.budget
            at[self.shard_of(slot)] = self._in_shard(slot)
        return Chunks(*map(self._to_slots, (tokens, counts, budget))), self._to_slots(at)

    def decode(self, steps: int) -> Draw:
        """Up to `steps` tokens of each active slot: draws [B, MAX_STEPS_PER_DISPATCH, ...], on the devices."""
        self._send_table()
        draws, self._cache, self._state = self.compiled.decode(
            self._params, self._cache, self._options, self._state, np.int32(steps)
        )
        return draws

    def decode_held(self, steps: int, held: HeldSlots) -> Draw:
        """As `decode`, with slots held to masks; the first call compiles the program, if nobody has before."""
        self._send_table()
        self.compile_held()
        draws, self._cache, self._state = self.compiled.later["decode-held"](*self._held_arguments(steps, held))
        return draws

    def compile_held(self) -> None:
        """Compiles what `decode_held` runs, for who would rather not wait for it with the first held request."""
        if "decode-held" not in self.compiled.later:
            cache, state = jax.tree.map(lambda x: x.sharding, (self._cache, self._state))
            shardings = (self._sharding.readable, cache, state)
            program = functools.partial(decode_held, self.forms.decode)
            program = jax.jit(program, donate_argnums=(1, 3), out_shardings=shardings)
            arguments = self._held_arguments(1, self.unheld())
            self.compiled.later["decode-held"] = self._compile_program("decode-held", program, arguments)

    def _held_arguments(self, steps: int, held: HeldSlots) -> tuple[Any, ...]:
        return self._params, self._cache, self._options, self._state, np.int32(steps), self._holds(held)

    def _holds(self, held: HeldSlots) -> Holds:
        arrays = (held.mask, held.stands_below, held.forced, held.takes_part)
        return Holds._make(map(self._to_slots, arrays))

    def unheld(self) -> HeldSlots:
        """What `decode_held` takes, for slots of which none is held yet."""
        return HeldSlots(self._engine_config.slots, self._config.vocab_size, programs.MAX_STEPS_PER_DISPATCH)


def block_tokens(engine_config: EngineConfig, page_tokens: int = kv_cache.PAGE_TOKENS) -> int:
    """Tokens of a block of the prefix cache: whole pages, and whole chunks of a long prompt."""
    return math.lcm(max(engine_config.prefill_widths), page_tokens)


def num_snapshots(engine_config: EngineConfig, page_tokens: int = kv_cache.PAGE_TOKENS) -> int:
    """Snapshots of all shards together: no more than blocks fit the pool, and none if no prompt goes on after one."""
    block = block_tokens(engine_config, page_tokens)
    if block >= engine_config.max_context_tokens:
        return 0
    wanted = engine_config.prefix_snapshots
    most = max(1, _pool_pages(engine_config, page_tokens) * page_tokens // block)
    return min(max(16, engine_config.slots), most) if wanted is None else wanted


def _pool_pages(engine_config: EngineConfig, page_tokens: int) -> int:
    """Pages of all shards together."""
    if engine_config.pool_tokens is not None:
        return kv_cache.num_pages(engine_config.pool_tokens, page_tokens)
    return engine_config.slots * kv_cache.num_pages(engine_config.max_context_tokens, page_tokens)
