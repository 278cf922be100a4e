"""Which sequence holds which slot and which pages, who waits for some, and who gives its own back."""

from gptoss_jax.engine.page_pool import PagePool
from gptoss_jax.engine.runner import ModelRunner
from gptoss_jax.engine.scheduler import Scheduler
from gptoss_jax.engine.sequence import Sequence
from gptoss_jax.model.kv_cache import num_pages


class Placement:
    """Sequences that run, each in a slot with pages of the slot's shard, and those that wait.

    A sequence is admitted with the pages for all that its caller knows of it; more follow as its answer grows.

    Attributes:
        running: by slot.
        waiting: in no order.
    """

    running: dict[int, Sequence]
    waiting: list[Sequence]

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, num_slots: int):
        """`scheduler` says who goes first and who gives way; `runner` repeats every change on the devices."""
        self._runner, self._scheduler, self._num_slots = runner, scheduler, num_slots
        self._pools = [PagePool(runner.pages_per_shard) for _ in range(runner.num_shards)]
        self.running, self.waiting = {}, []

    @property
    def decoding(self) -> dict[int, Sequence]:
        """Sequences whose prompt is read, by slot."""
        return {slot: sequence for slot, sequence in self.running.items() if not sequence.num_unread}

    def _of_shard(self, shard: int, sequences: dict[int, Sequence]) -> list[Sequence]:
        return [sequence for slot, sequence in sequences.items() if self._runner.shard_of(slot) == shard]

    def admit(self) -> None:
        """Gives sequences that wait a free slot each, as far as pages go.

        A page for each sequence that may still grow stays free, so that nobody is admitted only to be preempted.
        """
        for slot in range(self._num_slots):
            if slot in self.running or not self.waiting:
                continue
            sequence, shard = self._scheduler.admit(self.waiting), self._runner.shard_of(slot)
            growing = sum(num_pages(s.most_cached) > len(s.pages) for s in self._of_shard(shard, self.running))
            wanted = num_pages(sequence.num_known)
            if wanted + growing > self._pools[shard].num_free:
                continue  # another shard may have them; else until a sequence ends
            self.waiting.remove(sequence)
            self.running[slot] = sequence
            self._runner.admit(slot, sequence.request, sequence.tokens[: sequence.drawn])
            self._take_pages(slot, wanted)

    def _take_pages(self, slot: int, wanted: int) -> None:
        """Has the sequence in a slot hold `wanted` pages at least."""
        sequence, pool = self.running[slot], self._pools[self._runner.shard_of(slot)]
        if wanted > len(sequence.pages):
            sequence.pages += pool.allocate(wanted - len(sequence.pages))
            self._runner.set_pages(slot, sequence.pages)

    def release(self, slot: int) -> Sequence:
        """Takes slot and pages from the sequence in a slot."""
        sequence = self.running.pop(slot)
        self._pools[self._runner.shard_of(slot)].release(sequence.pages)
        return sequence

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
            self._take_pages(slot, num_pages(sequence.cached_after(steps)))
        return steps

    def _lacks_pages(self, shard: int, steps: int) -> bool:
        """Whether the answers of a shard cannot all grow by so many steps."""
        growing = self._of_shard(shard, self.decoding)
        wanted = sum(max(0, num_pages(s.cached_after(steps)) - len(s.pages)) for s in growing)
        return wanted > self._pools[shard].num_free

    def _preempt(self, shard: int) -> None:
        """Sends a sequence of a shard back to wait, without its pages."""
        chosen = self._scheduler.preempt(self._of_shard(shard, self.running))
        slot = next(slot for slot, sequence in self.running.items() if sequence is chosen)
        self._runner.halt([slot])
        self.release(slot).restart(draw_again=self._runner.deterministic)
        self.waiting.append(chosen)
