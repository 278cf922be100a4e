"""Which sequence holds which slot and which pages, who waits for some, and who gives its own back."""

import bisect
from typing import NamedTuple

from gptoss_jax.engine.held import Held
from gptoss_jax.engine.page_pool import PagePool
from gptoss_jax.engine.prefix_cache import Key, Prefix, PrefixCache, block_keys
from gptoss_jax.engine.runner import NOTHING_PENDING, ModelRunner, Pending
from gptoss_jax.engine.scheduler import Scheduler
from gptoss_jax.engine.sequence import Sequence
from gptoss_jax.engine.statistics import Statistics
from gptoss_jax.model import kv_cache


class _Vacancy(NamedTuple):
    """A free slot of a data shard, and what matters there to those that wait.

    Attributes:
        slot: the first one that is free.
        spare_pages: free pages, without one for each sequence that may still grow, so that nobody is admitted only to
            be preempted.
        being_read: blocks that the shard's sequences have still to read, which others will share then.
    """

    slot: int
    spare_pages: int
    being_read: set[Key]


class Placement:
    """Sequences that run, each in a slot with pages of the slot's shard, and those that wait.

    A sequence is admitted with the pages for all that its caller knows of it; more follow as its answer grows. It
    shares those of prompts that began alike and were read before; while such a one is being read, it waits.

    Attributes:
        running: by slot.
        waiting: the oldest first.
    """

    running: dict[int, Sequence]
    waiting: list[Sequence]

    def __init__(
        self, runner: ModelRunner, scheduler: Scheduler, num_slots: int, block_tokens: int, statistics: Statistics
    ):
        """`scheduler` says who goes first and who gives way; `runner` repeats every change on the devices."""
        self._runner, self._scheduler, self._num_slots = runner, scheduler, num_slots
        self._block_tokens, self._statistics = block_tokens, statistics
        self._pools = [PagePool(runner.pages_per_shard) for _ in range(runner.num_shards)]
        self._prefixes = [PrefixCache(pool, runner.snapshots_per_shard, statistics) for pool in self._pools]
        self.running, self.waiting = {}, []

    @property
    def decoding(self) -> dict[int, Sequence]:
        """Sequences whose prompt is read, by slot."""
        return {slot: sequence for slot, sequence in self.running.items() if not sequence.num_unread}

    def _of_shard(self, shard: int, sequences: dict[int, Sequence]) -> list[Sequence]:
        return [sequence for slot, sequence in sequences.items() if self._runner.shard_of(slot) == shard]

    # ---- who gets a slot ----

    def admit(self) -> None:
        """Gives sequences that wait a free slot each, those that the scheduler chooses of those that fit."""
        while self.waiting and (vacancies := self._vacancies()):

            def fits(sequence: Sequence, vacancies: list[_Vacancy] = vacancies) -> bool:
                return self._best(sequence, vacancies) is not None

            sequence = self._scheduler.admit(self.waiting, fits)
            place = sequence and self._best(sequence, vacancies)
            if not sequence or not place:
                return
            for older in self.waiting[: self.waiting.index(sequence)]:
                older.passed += 1
            self.waiting.remove(sequence)
            self._start(sequence, *place)

    def _vacancies(self) -> list[_Vacancy]:
        """One of each data shard that has a free slot."""
        free = [slot for slot in range(self._num_slots) if slot not in self.running]
        first = {self._runner.shard_of(slot): slot for slot in reversed(free)}
        return [self._vacancy(shard, slot) for shard, slot in first.items()]

    def _vacancy(self, shard: int, slot: int) -> _Vacancy:
        sequences = self._of_shard(shard, self.running)
        growing = sum(self._num_pages(s.most_cached) > len(s.pages) for s in sequences)
        unread = (self._keys(s)[s.prefilled // self._block_tokens :] for s in sequences if s.num_unread)
        return _Vacancy(slot, self._pools[shard].num_free - growing, set().union(*unread))

    def _best(self, sequence: Sequence, vacancies: list[_Vacancy]) -> tuple[int, Prefix] | None:
        """A slot that a sequence can have now and what it shares there, as much as it can; None: it has to wait."""
        places = [(v.slot, prefix) for v in vacancies if (prefix := self._prefix_at(v, sequence)) is not None]
        return max(places, key=lambda place: (len(place[1].pages), -place[0]), default=None)

    def _prefix_at(self, vacancy: _Vacancy, sequence: Sequence) -> Prefix | None:
        """What a sequence shares in a slot; None: it cannot have the slot now."""
        keys = self._keys(sequence)[: (len(sequence.prompt) - 1) // self._block_tokens]  # a token is left to go on from
        shard = self._runner.shard_of(vacancy.slot)
        prefix = self._prefixes[shard].find(keys)
        if not vacancy.being_read.isdisjoint(keys[len(prefix.keys) :][:1]):
            return None
        wanted = self._num_pages(sequence.num_known) - self._pools[shard].num_held(prefix.pages)
        return prefix if wanted <= vacancy.spare_pages else None

    def _keys(self, sequence: Sequence) -> list[Key]:
        """The keys of the whole blocks of a sequence's prompt; none without a prefix cache."""
        if sequence.block_keys is None:
            has_cache = self._runner.snapshots_per_shard
            sequence.block_keys = block_keys(sequence.prompt, self._block_tokens) if has_cache else []
        return sequence.block_keys

    def _start(self, sequence: Sequence, slot: int, prefix: Prefix) -> None:
        """Gives a sequence a slot, with the prefix that it shares and the other pages of what is known of it."""
        cached = len(prefix.keys) * self._block_tokens
        self.running[slot] = sequence
        drawn, pending = sequence.tokens[: sequence.drawn], NOTHING_PENDING
        if constraint := sequence.request.constraint:
            sequence.held = Held(constraint, drawn)
            pending = Pending(sequence.prompt[-1], sequence.limit - sequence.drawn)
        self._runner.admit(slot, sequence.request, drawn, cached, pending)
        self._prefixes[self._runner.shard_of(slot)].use(prefix)
        sequence.pages, sequence.prefilled = list(prefix.pages), cached
        sequence.cached = cached if sequence.cached is None else sequence.cached
        if prefix.snapshot is not None:
            self._runner.restore_rings(slot, prefix.snapshot)
        self._take_pages(slot, self._num_pages(sequence.num_known))
        self._statistics.prompt_tokens += len(sequence.prompt)
        self._statistics.cached_prompt_tokens += cached

    @property
    def held(self) -> dict[int, Held]:
        """What holds sequences to a form, by slot, whether their prompt is read or not."""
        return {slot: sequence.held for slot, sequence in self.running.items() if sequence.held}

    # ---- what it holds ----

    def _num_pages(self, tokens: int) -> int:
        """Pages that hold so many of a sequence's tokens."""
        return kv_cache.num_pages(tokens, self._runner.page_tokens)

    def _take_pages(self, slot: int, wanted: int) -> None:
        """Has the sequence in a slot hold `wanted` pages at least."""
        sequence, shard = self.running[slot], self._runner.shard_of(slot)
        if wanted > len(sequence.pages):
            new = self._pools[shard].allocate(wanted - len(sequence.pages))
            self._prefixes[shard].forget(new)
            sequence.pages += new
            self._runner.set_pages(slot, sequence.pages)

    def keep_block(self, slot: int) -> None:
        """Keeps the block of a prompt that the slot has just read the end of, if it has, for others that begin so."""
        sequence = self.running[slot]
        block, rest = divmod(sequence.prefilled, self._block_tokens)
        if rest or not self._keys(sequence):
            return
        pages_of_block = self._block_tokens // self._runner.page_tokens
        pages = sequence.pages[: self._num_pages(sequence.prefilled)][-pages_of_block:]
        prefixes = self._prefixes[self._runner.shard_of(slot)]
        snapshot = prefixes.add(self._keys(sequence)[block - 1], pages)
        if snapshot is not None:
            self._runner.save_rings(slot, snapshot)

    def release(self, slot: int, *, faulty: bool = False) -> Sequence:
        """Takes slot and pages from the sequence in a slot; what is `faulty` is not to be found again."""
        sequence, shard = self.running.pop(slot), self._runner.shard_of(slot)
        if faulty:
            self._prefixes[shard].forget(sequence.pages)
        self._pools[shard].release(reversed(sequence.pages))  # the end of a prefix is given away before its beginning
        return sequence

    @property
    def num_free_pages(self) -> int:
        """Pages of all shards that nobody holds."""
        return sum(pool.num_free for pool in self._pools)

    # ---- when pages are short ----

    def make_room(self, steps: int) -> int:
        """Takes the pages for up to `steps` decoding steps; where even one does not fit, sequences give way.

        Returns:
            For how many steps every sequence that still runs has pages.
        """
        while short := [shard for shard in range(len(self._pools)) if self._lacks_pages(shard, steps)]:
            if steps > 1:
                steps //= 2
            else:
                self._preempt(short[0])
        for slot, sequence in self.decoding.items():
            self._take_pages(slot, self._num_pages(sequence.cached_after(steps)))
        return steps

    def _lacks_pages(self, shard: int, steps: int) -> bool:
        """Whether the answers of a shard cannot all grow by so many steps."""
        growing = self._of_shard(shard, self.decoding)
        wanted = sum(max(0, self._num_pages(s.cached_after(steps)) - len(s.pages)) for s in growing)
        return wanted > self._pools[shard].num_free

    def _preempt(self, shard: int) -> None:
        """Sends a sequence of a shard back to wait, without its pages."""
        chosen = self._scheduler.preempt(self._of_shard(shard, self.running))
        slot = next(slot for slot, sequence in self.running.items() if sequence is chosen)
        self._runner.halt([slot])
        self.release(slot).restart(draw_again=self._runner.deterministic)
        bisect.insort(self.waiting, chosen, key=lambda sequence: sequence.request_id)
        self._statistics.preemptions += 1
