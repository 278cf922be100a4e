"""Jobs on Ray, whose processes die: no row is lost, none is there twice, and the lines are those of the plain run."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from gptoss_jax.jobs import journal
from gptoss_jax.jobs.inputs import Inputs
from gptoss_jax.jobs.survey import survey
from tests import scripted

pytest.importorskip("ray", reason="ray is not installed: make gates does it")

ROWS, SLOTS, WORKERS = 80, 4, 2
BAD = 5  # the row, from 0, that cannot be answered
OPTIONS = ("--slots", SLOTS, "--max-context-tokens", 256, "--deterministic", "--compilation-cache")
STORE_BYTES = 80 << 20
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1 in both ways
# A head and a second machine, as it were; says where they are and the process whose death is the second one's.
TWO_MACHINES = f"""
import sys
from ray.cluster_utils import Cluster
one = dict(node_ip_address="127.0.0.1", num_cpus=1, object_store_memory={STORE_BYTES})
cluster = Cluster(initialize_head=True, head_node_args=dict(one, include_dashboard=False))
second = cluster.add_node(**one)
print(cluster.address, second.all_processes["raylet"][0].process.pid, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


class Machines(NamedTuple):
    """A cluster of two.

    Attributes:
        address: of its head.
        raylet: the process that the second machine stands and falls with.
    """

    address: str
    raylet: int


class Folder(NamedTuple):
    """A job and its plain run.

    Attributes:
        root: where all of it is, in few letters: Ray's sockets lie there, whose names have to be short.
        lines: of the plain run, in the order of the input.
    """

    root: Path
    lines: list[str]

    def batch(self, out: str, *options: object) -> list[str]:
        """The command."""
        root = self.root
        arguments = (root / "in.jsonl", root / out, "--checkpoint", root / "model", *OPTIONS, root / "programs")
        return [sys.executable, "-m", "gptoss_jax.batch", *map(str, (*arguments, *options))]

    def start(self, command: list[str]) -> subprocess.Popen[str]:
        """A process with Ray's files in this folder, and no proxy between this machine and itself."""
        here = {"RAY_TMPDIR": str(self.root), "no_proxy": "127.0.0.1", "RAY_USAGE_STATS_ENABLED": "0"}
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | here
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def journals(self, out: str) -> dict[str, Counter[str]]:
        """How often each id stands in each worker's journal."""
        found: dict[str, Counter[str]] = {}
        for path in (self.root / f"{out}.parts").glob("ray-*.journal"):
            with contextlib.suppress(FileNotFoundError):  # the job has just ended
                found[path.stem] = Counter(_ids(path))
        return found

    def wait_for_lines(self, out: str, count: int, process: subprocess.Popen[str]) -> None:
        """Waits until both workers have finished lines, and so many in all."""

        def enough() -> bool:
            journals = self.journals(out)
            return sum(map(Counter.total, journals.values())) >= count and sum(map(bool, journals.values())) >= WORKERS

        wait_until(enough, process)

    def check(self, out: str, process: subprocess.Popen[str]) -> str:
        """The job ends well, with the plain run's lines; gives what it said."""
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
        assert (self.root / out).read_text().splitlines() == self.lines
        assert not (self.root / f"{out}.parts").exists()
        return said


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Fails if the process ends before."""
    end = time.monotonic() + 120
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def _ids(path: Path) -> list[str]:
    return [json.loads(entry.line)["id"] or "" for entry in journal.entries(path, journal.CHECKED)]


@pytest.fixture(scope="module")
def folder() -> Iterator[Folder]:
    """A job that has been done without Ray."""
    root = Path(tempfile.mkdtemp(prefix="r"))
    scripted.write(root / "model", "thinker")
    rows = [{"id": f"row {i}", "prompt": f"Why {i}?"} for i in range(ROWS)]
    rows[BAD]["prompt"] = ""
    rows[BAD + 1]["id"] = rows[0]["id"]
    (root / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = Folder(root, [])
    process = plain.start(plain.batch("plain.jsonl", "--keep-order"))
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    yield Folder(root, (root / "plain.jsonl").read_text().splitlines())
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def machines(folder: Folder) -> Iterator[Machines]:
    """Two, which this one plays."""
    process = folder.start([sys.executable, "-c", TWO_MACHINES])
    assert process.stdout
    address, raylet = process.stdout.readline().split()
    yield Machines(address, int(raylet))
    process.communicate()


def processes_of_ray(root: Path) -> list[Path]:
    """Folders in /proc of those that have their files in `root`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"RAY_TMPDIR={root}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(entry)
    return found


def workers_of_ray(root: Path) -> list[int]:
    """Those that answer rows."""
    found = []
    for entry in processes_of_ray(root):
        with contextlib.suppress(OSError):
            if (entry / "cmdline").read_bytes().startswith(b"ray::MapWorker"):
                found.append(int(entry.name))
    return found


def listening(root: Path) -> set[str]:
    """Addresses that processes of Ray listen to, as /proc/net has them."""
    sockets = {}
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A":
                sockets[f"socket:[{rest[5]}]"] = local.partition(":")[0]
    found = set()
    for entry in processes_of_ray(root):
        with contextlib.suppress(OSError):
            found |= {sockets.get(os.readlink(descriptor), "") for descriptor in (entry / "fd").iterdir()}
    return found - {""}


def wait_until_gone(found: Callable[[Path], list[Any]], root: Path) -> None:
    """Processes end when they see that the driver has."""
    end = time.monotonic() + 60
    while found(root):
        assert time.monotonic() < end
        time.sleep(0.05)


def children_of(parent: int) -> list[int]:
    """Processes that a process has started, and not theirs."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def test_a_killed_worker_loses_nothing(folder):
    """Guards a job on one machine: a worker dies, and the next one answers its rows, but for the finished ones."""
    process = folder.start(folder.batch("a.jsonl", "--ray", "--ray-workers", WORKERS))
    kept = folder.root / "kept"
    kept.mkdir()
    folder.wait_for_lines("a.jsonl", 10, process)
    addresses = listening(folder.root)
    assert addresses and addresses <= LOOPBACK
    os.kill(workers_of_ray(folder.root)[0], signal.SIGKILL)

    def seen() -> bool:
        for path in (folder.root / "a.jsonl.parts").glob("*.journal"):
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                os.link(path, kept / path.name)  # as long as this is there, its lines are
        return len(list(kept.glob("ray-*"))) > WORKERS

    wait_until(seen, process)
    folder.check("a.jsonl", process)
    times = Counter(name for path in kept.glob("ray-*") for name in _ids(path) if name)
    assert times.total() == len(times), "a finished row was answered again"
    wait_until_gone(processes_of_ray, folder.root)


def test_a_killed_driver_redoes_what_was_in_flight_only(folder, machines):
    """Guards the night's work: this process dies twice; the same command goes on, on Ray and then without it."""
    on_ray = folder.batch("b.jsonl", "--keep-order", "--ray", "--ray-address", machines.address)
    done = 0
    for command, count in ((on_ray, 8), (on_ray, 24)):
        process = folder.start(command)
        folder.wait_for_lines("b.jsonl", count, process)
        process.kill()
        process.communicate()
        done = sum(map(Counter.total, folder.journals("b.jsonl").values()))
        wait_until_gone(workers_of_ray, folder.root)
    process = folder.start(folder.batch("b.jsonl", "--keep-order"))
    said = folder.check("b.jsonl", process)
    summary = json.loads((folder.root / "b.jsonl.summary.json").read_text())
    assert summary["run"]["rows"] <= ROWS - done, said


def test_a_worker_that_cannot_go_on_ends_the_job(folder, machines):
    """Guards against endless retries of a model that cannot be loaded (ray 51946)."""
    process = folder.start(folder.batch("c.jsonl", "--ray", "--ray-address", machines.address, "--mesh", "expert=4"))
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "a mesh of 4 devices, but there are 1" in said.splitlines()[-1], said


def test_a_lost_machine_loses_nothing(folder, machines):
    """Guards the rows that a machine had: no other has room for its worker, before those there have done theirs."""
    command = folder.batch("d.jsonl", "--ray", "--ray-address", machines.address, "--ray-workers", WORKERS)
    process = folder.start(command)
    folder.wait_for_lines("d.jsonl", 10, process)
    for pid in (machines.raylet, *children_of(machines.raylet)):
        os.kill(pid, signal.SIGKILL)
    folder.check("d.jsonl", process)


def test_what_a_worker_cannot_do_is_said_by_every_call(monkeypatch):
    """Guards calls that come after a worker's end, which would wait forever; no cluster runs here."""
    from gptoss_jax.jobs import ray_worker

    monkeypatch.setattr(ray_worker.ray, "get", lambda job: job)
    worker = ray_worker.Actor(SimpleNamespace(folder="/nowhere"), None)
    for _ in range(2):
        group = pickle.dumps([(0, "in.jsonl", 1, b"{}", "")])
        (fault,) = worker({"group": [group], "fault": [""]})["fault"]
        assert fault == f"a worker on {os.uname().nodename}: [Errno 2] No such file or directory: '/nowhere'"


def test_an_input_that_changes_ends_the_job_with_a_line(monkeypatch, tmp_path):
    """Guards answers to rows that nobody has checked, and a traceback where a file is gone; no cluster runs here."""
    from gptoss_jax.jobs import on_ray

    monkeypatch.setattr(on_ray.ray, "get", lambda shared: shared)
    monkeypatch.chdir(tmp_path)
    rows = tmp_path / "in.jsonl"
    rows.write_text('{"prompt":"?"}\n' * 3)
    job = SimpleNamespace(folder=tmp_path, inputs=["in.jsonl"], survey=survey(Inputs(["in.jsonl"])))

    def groups() -> list[tuple[int, str]]:
        """How many rows each has, and its fault."""
        shared = on_ray._Shared(job, np.array([True, False, True]))
        tables = [table.to_pylist()[0] for table in on_ray._groups(shared, 1)]
        return [(len(pickle.loads(table["group"] or pickle.dumps([]))), table["fault"]) for table in tables]

    assert groups() == [(1, ""), (1, "")]
    rows.write_text('{"prompt":"?"}\n' * 2)
    assert groups() == [(1, ""), (0, "the input had 3 rows when the job began, and 2 now")]
    rows.unlink()
    assert groups() == [(0, "in.jsonl: no such file")]
