"""A batch job on many machines: Ray Data reads its rows, gives them to workers and starts what has died again.

What is done, Ray is not asked: each worker puts finished lines into a journal of its own beside the output, on a folder
that all machines share. So neither a worker's death nor this process's loses a line that is finished.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import os
import pickle
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow
import ray  # pyright: ignore[reportMissingImports]  (only those who ask for it have it)
import ray.data  # pyright: ignore[reportMissingImports]
import ray.exceptions  # pyright: ignore[reportMissingImports]
from ray.data.block import BlockMetadata  # pyright: ignore[reportMissingImports]
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # pyright: ignore[reportMissingImports]

from gptoss_jax.errors import GptossError, one_line, short
from gptoss_jax.harmony.tokenizer import load_tokenizer
from gptoss_jax.jobs.inputs import Inputs, Line
from gptoss_jax.jobs.journal import CHECKED, Journal
from gptoss_jax.jobs.rows import RowReader
from gptoss_jax.jobs.store import Layout, PartsReader, done_rows
from gptoss_jax.jobs.survey import Survey
from gptoss_jax.jobs.work import Reading, Task, Worker, in_order

if TYPE_CHECKING:
    import gptoss_jax.engine.engine
    import gptoss_jax.runtime.language_model

CALLS_AT_ONCE = 8  # groups of rows that a worker holds: when the last rows of some are slow, others fill the slots
GROUPS_PER_WORKER = 4  # at least, so that workers end at about the same time
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_CONNECT = 10.0
SECONDS_WITHOUT_A_LINE = 60.0  # after which machines are no longer waited for, if no worker has room
STORE_BYTES = 256 << 20  # of Ray's own, in which groups wait; the model is not there


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


class Cluster(NamedTuple):
    """The machines.

    Attributes:
        address: of a cluster that is to be joined; None: one of this machine alone, which ends with this process.
        workers: None: as many as have room.
        devices: that the model of each takes, where machines have accelerators.
    """

    address: str | None
    workers: int | None
    devices: int


# ---- the driver ----


def run(
    job: Job,
    wanted: np.ndarray,
    cluster: Cluster,
    finished: Callable[[Any], object],
    note: Callable[[str], object],
    interrupted: Callable[[], object],
) -> int:
    """Has rows answered, each by a line in some part of the job's; gives how many workers there were. Be `connected`.

    Args:
        job: what it is.
        wanted: rows to be answered, bool [N].
        cluster: who answers them.
        finished: gets the document of each line that comes.
        note: gets what people should hear of.
        interrupted: asked often; once it says so, workers end, and what was under way has no line.

    Raises:
        GptossError: the cluster has no room for the workers, or one of them cannot go on.
    """
    needs, workers = _plan(cluster)
    note(f"workers: {workers} of {_described(needs)} each; machines in Ray: {len(_nodes())}")
    rows = int(wanted.sum()) // (GROUPS_PER_WORKER * workers)
    size = max(1, min(2 * job.reading.engine_config.slots, rows))
    # The dataset runs in a process of its own on this machine: so it can be ended whatever it is doing.
    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(_run_dataset)
    running = remote.remote(_Shared(ray.put(job), ray.put(wanted)), size, needs, workers)
    following = _Following(job, wanted, finished)
    while following.left.any() and not interrupted():
        ended, _ = ray.wait([running], timeout=SECONDS_BETWEEN_LOOKS)
        following.look()
        if ended:
            _check(running)
            break
        if following.seconds_without_a_line > SECONDS_WITHOUT_A_LINE and not _room(needs):
            raise GptossError(f"no machine of the cluster has {_described(needs)} any more: the same command goes on")
    return workers


class _Following:
    """What is finished, as the parts of the job say.

    Attributes:
        left: rows that are still to be answered, bool [N].
    """

    def __init__(self, job: Job, wanted: np.ndarray, finished: Callable[[Any], object]):
        self.left, self._last = wanted.copy(), time.monotonic()
        self._survey, self._parts, self._finished = job.survey, PartsReader(job.layout), finished

    @property
    def seconds_without_a_line(self) -> float:
        """Since the last one came."""
        return time.monotonic() - self._last

    def look(self) -> None:
        """Takes the lines that have come."""
        for line in self._parts.new_lines():
            document = json.loads(line)
            ordinal = self._survey.find(document)
            if self.left[ordinal]:
                self.left[ordinal], self._last = False, time.monotonic()
                self._finished(document)


def _check(running: Any) -> None:
    """Raises what a dataset ended with, if anything."""
    try:
        fault = ray.get(running)
    except ray.exceptions.RayTaskError:
        raise  # a bug of ours, whose traceback it has
    except ray.exceptions.RayError as error:
        raise GptossError(f"Ray has ended the job: {one_line(str(error))}; the same command goes on") from None
    if fault:
        raise GptossError(fault)


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Within a cluster; one that is made here, where `address` is None, listens to this machine only and ends with it.

    Raises:
        GptossError: there is none at this address, or none can be made.
    """
    if address is not None:
        _check_answers(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would be sent to Ray's makers
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is None:
            own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
            ray.init("local", _node_ip_address="127.0.0.1", **own, **quiet)
        else:
            ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise GptossError(f"Ray at {address or 'this machine'}: {one_line(str(error))}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raises GptossError where nothing listens to an address: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise GptossError(f"--ray-address is {short(address)}, expected HOST:PORT of a cluster's head: 10.0.0.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), SECONDS_TO_CONNECT).close()
    except (OSError, OverflowError) as error:
        raise GptossError(f"no Ray cluster at {address}: {error}; `ray start --head` makes one") from None


def _nodes() -> list[dict[str, float]]:
    """What each machine that is alive has in all."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _plan(cluster: Cluster) -> tuple[dict[str, int], int]:
    """What a worker takes, and how many there are.

    Raises:
        GptossError: there is no room for so many.
    """
    nodes = _nodes()
    kind = next((kind for kind in ("GPU", "TPU") if any(node.get(kind) for node in nodes)), "CPU")
    if kind == "CPU":
        counts = [int(node.get(kind, 0)) for node in nodes if node.get(kind, 0) >= 1]
        on_each = -(-(cluster.workers or len(counts)) // max(1, len(counts)))
        needs = {kind: max(1, min(counts, default=1) // on_each)}
    else:
        needs = {kind: cluster.devices}
    room = _room(needs)
    if room < (cluster.workers or 1):
        raise GptossError(f"the cluster has room for {room} workers of {_described(needs)} each: see --ray-workers")
    return needs, cluster.workers or room


def _room(needs: Mapping[str, int]) -> int:
    """How many workers fit on the machines that are alive."""
    ((kind, count),) = needs.items()
    return sum(int(node.get(kind, 0)) // count for node in _nodes())


def _described(needs: Mapping[str, int]) -> str:
    ((kind, count),) = needs.items()
    return f"{count} {kind}{'s' * (count != 1)}"


# ---- the dataset ----


class _Shared(NamedTuple):
    """Of what is large, and every process of a job reads: where Ray has it.

    Attributes:
        job: a Job.
        wanted: bool [N].
    """

    job: Any
    wanted: Any


def _run_dataset(shared: _Shared, rows: int, needs: Mapping[str, int], workers: int) -> str:
    """Reads rows and has them answered; gives why a worker could not go on, "" if all went well. Runs in Ray."""
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = 1  # byte: each group is a block, and goes where a worker waits for it
    context.enable_progress_bars = False
    kinds = {"CPU": "num_cpus", "GPU": "num_gpus"}
    resources: dict[str, Any] = {kinds[kind]: count for kind, count in needs.items() if kind in kinds} or {
        "resources": dict(needs)
    }
    reading = {"num_cpus": 0}  # it would wait for CPUs that workers have
    groups = ray.data.read_datasource(_Groups(shared, rows), override_num_blocks=1, ray_remote_args=reading)
    ended = groups.map_batches(
        _Actor,
        fn_constructor_args=(shared.job, needs.get("CPU")),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            size=workers,
            max_tasks_in_flight_per_actor=CALLS_AT_ONCE,
            max_concurrent_calls_per_actor=CALLS_AT_ONCE,
            enable_true_multi_threading=True,
        ),
        max_restarts=-1,
        max_task_retries=-1,
        **resources,
    )
    return next((row["fault"] for row in ended.iter_rows() if row["fault"]), "")


class _Groups(ray.data.Datasource):
    """Rows of a job, some at a time; what the table calls a row is a whole group."""

    def __init__(self, shared: _Shared, rows: int):
        self._shared, self._rows = shared, rows

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *arguments: Any, **options: Any) -> list[ray.data.ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ray.data.ReadTask(functools.partial(_groups, self._shared, self._rows), unknown)]


def _groups(shared: _Shared, rows: int) -> Iterator[pyarrow.Table]:
    """The read task: groups of (ordinal, line), as they are wanted by workers."""
    job, wanted = ray.get([shared.job, shared.wanted])
    os.chdir(job.folder)
    lines = ((ordinal, line) for ordinal, line in enumerate(Inputs(job.inputs).lines()) if wanted[ordinal])
    while group := list(itertools.islice(lines, rows)):
        yield pyarrow.table({"group": [pickle.dumps([(ordinal, *line) for ordinal, line in group])]})


# ---- a worker ----


class _Group:
    """Rows that belong to one call, and its end."""

    def __init__(self, pairs: Sequence[tuple[int, Line]]):
        self.lines, self.ordinals, self.end = pairs, [ordinal for ordinal, _ in pairs], Future[None]()


class _Actor:
    """A model on its devices, and a journal of its own. Calls overlap, so that the engine is never without rows."""

    def __init__(self, job: Any, cpus: int | None):
        """Does nothing that can fail: what does is said by the first call. `job` refers to a Job."""
        self._job: Job = ray.get(job)
        self._cpus = cpus
        self._arrived, self._open = queue.SimpleQueue[_Group](), list[_Group]()
        threading.Thread(target=self._run, daemon=True).start()

    def __call__(self, table: Mapping[str, Any]) -> dict[str, list[str]]:
        """Answers a group; gives why it cannot, or ""."""
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
