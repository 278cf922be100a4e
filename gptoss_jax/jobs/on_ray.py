"""A batch job on many machines: Ray Data reads its rows, gives them to workers and starts what has died again.

What is done, Ray is not asked: each worker puts finished lines into a journal of its own beside the output, on a folder
that all machines share. So neither a worker's death nor this process's loses a line that is finished.
"""

import contextlib
import functools
import itertools
import json
import logging
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import ray  # pyright: ignore[reportMissingImports]  (only those who ask for it have it)
import ray.data  # pyright: ignore[reportMissingImports]
import ray.exceptions  # pyright: ignore[reportMissingImports]
from ray.data.block import BlockMetadata  # pyright: ignore[reportMissingImports]
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # pyright: ignore[reportMissingImports]

from gptoss_jax.errors import GptossError, one_line, short
from gptoss_jax.jobs.inputs import Inputs
from gptoss_jax.jobs.ray_worker import Actor, Job
from gptoss_jax.jobs.store import PartsReader
from gptoss_jax.jobs.work import wanted_lines

CALLS_AT_ONCE = 8  # groups of rows that a worker holds: when the last rows of some are slow, others fill the slots
GROUPS_PER_WORKER = 4  # at least, so that workers end at about the same time
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_CONNECT = 10.0
SECONDS_WITHOUT_A_LINE = 60.0  # after which machines are no longer waited for, if no worker has room
STORE_BYTES = 256 << 20  # of Ray's own, in which groups wait; the model is not there


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
        Actor,
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

    def get_read_tasks(self, parallelism: int, *arguments: Any, **options: Any) -> list[Any]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ray.data.ReadTask(functools.partial(_groups, self._shared, self._rows), unknown)]


def _groups(shared: _Shared, rows: int) -> Iterator[pyarrow.Table]:
    """The read task: groups of (ordinal, line), as workers take them; a fault ends them, as a group of its own."""
    job, wanted = ray.get([shared.job, shared.wanted])
    try:
        os.chdir(job.folder)
        lines = wanted_lines(Inputs(job.inputs), job.survey, wanted)
        while group := list(itertools.islice(lines, rows)):
            content = pickle.dumps([(ordinal, *line) for ordinal, line in group])
            yield pyarrow.table({"group": [content], "fault": [""]})
    except (GptossError, OSError) as error:
        yield pyarrow.table({"group": [b""], "fault": [str(error)]})
