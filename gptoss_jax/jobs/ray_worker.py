"""A worker of a job on Ray: a model on its devices, rows that arrive in groups, a journal of its own."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pickle
import queue
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray  # pyright: ignore[reportMissingImports]  (only those who ask for it have it)

from gptoss_jax.errors import GptossError
from gptoss_jax.harmony.tokenizer import load_tokenizer
from gptoss_jax.jobs.inputs import Line
from gptoss_jax.jobs.journal import CHECKED, Journal
from gptoss_jax.jobs.rows import RowReader
from gptoss_jax.jobs.store import Layout, PartsReader, done_rows
from gptoss_jax.jobs.survey import Survey
from gptoss_jax.jobs.work import Reading, Task, Worker, in_order
from gptoss_jax.runtime import device_memory

if TYPE_CHECKING:
    import gptoss_jax.engine.engine


@dataclasses.dataclass(frozen=True)
class Job:
    """What every process of a job has to know.

    Attributes:
        folder: the driver's, which relative names are meant from.
        inputs: names of the input.
        layout: the job's files, in a folder that all machines share.
        survey: of the input.
        reading: how rows are read.
        model: arguments of `runtime.loading.load`, but for `programs_folder`.
        programs: of that folder what the user said: None for the default one of each machine, "" for nowhere.
        model_name: stands in responses.
    """

    folder: str
    inputs: Sequence[str]
    layout: Layout
    survey: Survey
    reading: Reading
    model: Mapping[str, Any]
    programs: str | None
    model_name: str


class _Group:
    """Rows that belong to one call, and its end."""

    def __init__(self, pairs: Sequence[tuple[int, Line]]):
        self.lines, self.ordinals, self.end = pairs, [ordinal for ordinal, _ in pairs], Future[None]()


class Actor:
    """A model on its devices, and a journal of its own. Calls overlap, so that the engine is never without rows."""

    def __init__(self, job: Any, cpus: int | None):
        """Does nothing that can fail: what does is said by the first call. `job` refers to a Job."""
        self._job: Job = ray.get(job)
        self._cpus = cpus
        self._arrived, self._open = queue.SimpleQueue[_Group](), list[_Group]()
        threading.Thread(target=self._run, daemon=True).start()

    def __call__(self, table: Mapping[str, Any]) -> dict[str, list[str]]:
        """Answers a group; gives why it cannot, or ""."""
        if fault := str(table["fault"][0]):  # there is none to answer
            return {"fault": [fault]}
        pairs = [(ordinal, Line(*line)) for ordinal, *line in pickle.loads(table["group"][0])]
        group = _Group(pairs)
        self._arrived.put(group)
        try:
            group.end.result()
        except (GptossError, OSError) as error:
            return {"fault": [f"a worker on {os.uname().nodename}: {error}"]}
        return {"fault": [""]}

    def _run(self) -> None:
        """The engine's thread; an error ends every call, those that follow too."""
        try:
            self._answer()
        except BaseException as error:
            for group in itertools.chain(self._open, iter(self._arrived.get, None)):
                group.end.set_exception(error)

    def _answer(self) -> None:
        job = self._job
        os.chdir(job.folder)
        engine = _engine(job, self._cpus)
        written = PartsReader(job.layout).new_lines()
        self._done = done_rows(written, job.survey, str(job.layout.parts), may_repeat=True)
        name = f"ray-{secrets.token_hex(8)}"
        with Journal(job.layout.part(name), CHECKED) as own:
            put = functools.partial(self._put, own)
            worker = Worker(engine, load_tokenizer(job.reading.vocab_path), job.model_name, put)
            worker.run(self._tasks(engine), lambda: False)

    def _tasks(self, engine: "gptoss_jax.engine.engine.Engine") -> Iterator[Task | None]:
        """Rows as they arrive; waits for some if the engine has none."""
        while True:
            with contextlib.suppress(queue.Empty):
                group = self._arrived.get(block=engine.is_idle)
                self._open.append(group)
                yield from in_order(list(self._tasks_of(group)))
                self._end_groups()
            yield None

    def _tasks_of(self, group: _Group) -> Iterator[Task]:
        """Those of a group that no worker has finished, which one may have before it died."""
        reader = RowReader(self._job.survey.forms)
        for ordinal, line in group.lines:
            if not self._done[ordinal]:
                yield self._job.reading.task(self._job.survey.checked(reader.read(ordinal, line)))

    def _put(self, own: Journal, lines: Sequence[bytes]) -> None:
        own.append(lines)
        for line in lines:
            self._done[self._job.survey.find(json.loads(line))] = True
        self._end_groups()

    def _end_groups(self) -> None:
        """Ends the calls all of whose rows are finished."""
        ended = [group for group in self._open if self._done[group.ordinals].all()]
        self._open = [group for group in self._open if group not in ended]
        for group in ended:
            group.end.set_result(None)


def _engine(job: Job, cpus: int | None) -> "gptoss_jax.engine.engine.Engine":
    """The model, with as many threads as this worker has CPUs."""
    if cpus:
        os.environ["NPROC"] = str(cpus)  # XLA's number of threads, and with it that of our kernels
    device_memory.reserve()
    from gptoss_jax.runtime import loading  # not before: it imports JAX

    language_model = loading.load(**job.model, programs_folder=_programs_folder(job.programs))
    config = job.reading.engine_config
    slots = language_model.sharding.even_slots(config.slots)
    return language_model.engine(dataclasses.replace(config, slots=slots))


def _programs_folder(given: str | None) -> Path | None:
    """Where this machine keeps compiled programs; None where it cannot, or is not to."""
    from gptoss_jax.runtime import kept_programs

    if given == "":
        return None
    try:
        folder = Path(given or kept_programs.default_folder())
    except RuntimeError:  # a user without a home
        return None
    return None if kept_programs.why_not(folder) else folder
