"""One model over several hosts: two processes with four devices each give what one gives with eight."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.goldens.make import ROOT

MESHES = ["expert=4,tensor=2", "data=2,expert=2,tensor=2"]
PROXIES = {name for name in os.environ if name.lower().endswith("_proxy")}  # which gRPC would ask for 127.0.0.1


class Ended(NamedTuple):
    """How a process ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of random weights whose sizes eight devices divide, as it is published, and converted."""
    folder = tmp_path_factory.mktemp("small")
    for arguments in (
        ["converters.random_weights", folder / "published", "--config", ROOT / "configs" / "small.json"],
        ["converters.convert", folder / "published", folder / "converted"],
    ):
        subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, check=True, capture_output=True)
    return folder


def start(
    module: str,
    *arguments: object,
    devices: int,
    folder: Path,
    file_bytes: int = resource.RLIM_INFINITY,
    variables: Mapping[str, str] = {},
) -> subprocess.Popen[bytes]:
    """A command on so many devices, its streams into files of `folder`; no file can grow beyond `file_bytes`."""
    environment = {name: value for name, value in os.environ.items() if name not in PROXIES} | dict(variables)
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    folder.mkdir()
    command = [sys.executable, "-m", f"gptoss_jax.{module}", *map(str, arguments)]
    with open(folder / "stdout", "wb") as out, open(folder / "stderr", "wb") as err:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    return process


def end(process: subprocess.Popen[bytes], folder: Path, timeout_seconds: float = 240) -> Ended:
    """What a process came to."""
    try:
        process.wait(timeout_seconds)
    finally:
        process.kill()
    return Ended(process.returncode, (folder / "stdout").read_text(), (folder / "stderr").read_text())


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start_both(
    tmp_path: Path, module: str, *arguments: object, file_bytes: int = resource.RLIM_INFINITY
) -> list[subprocess.Popen[bytes]]:
    """The same command as processes 0 and 1 of two; `{process_id}` in arguments is its own."""
    hosts = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2]
    return [
        start(
            module,
            *hosts,
            *("--process-id", i),
            *(str(argument).replace("{process_id}", str(i)) for argument in arguments),
            devices=4,
            folder=tmp_path / str(i),
            file_bytes=file_bytes,
        )
        for i in range(2)
    ]


def slurm(count: int, process_id: int, port: int) -> dict[str, str]:
    """The environment of a process of a Slurm job."""
    place = {"SLURM_PROCID": str(process_id), "SLURM_LOCALID": "0", "JAX_COORDINATOR_PORT": str(port)}
    return place | {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count)}


def gke(count: int, process_id: int, port: int) -> dict[str, str]:
    """The environment of a process of a TPU slice on GKE, on a machine without TPUs; no server is asked for slices."""
    place = {"TPU_WORKER_ID": str(process_id), "TPU_WORKER_HOSTNAMES": ",".join(["localhost"] * count)}
    one_slice = {"MEGASCALE_COORDINATOR_ADDRESS": "", "MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"}
    here = {"JAX_FORCE_TPU_INIT": "1", "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_PORT": str(port)}
    return place | one_slice | here


def start_on_cluster(
    tmp_path: Path, cluster: Callable[[int, int, int], dict[str, str]], count: int, module: str, *arguments: object
) -> list[subprocess.Popen[bytes]]:
    """The same command as all processes of a job of one device each, as far as their environment tells."""
    port = free_port()
    asked = module, "--coordinator", "auto", *arguments
    return [start(*asked, devices=1, folder=tmp_path / str(i), variables=cluster(count, i, port)) for i in range(count)]


def run_both(tmp_path: Path, module: str, *arguments: object) -> list[Ended]:
    """`start_both`, until both have ended."""
    processes = start_both(tmp_path, module, *arguments)
    return [end(process, tmp_path / str(i)) for i, process in enumerate(processes)]


def logprobs(answers: list[dict[str, Any]]) -> list[float]:
    """Of every token of every answer: sums over hosts may add in another order."""
    return [logprob for answer in answers for logprob in answer["logprobs"]]


def without_logprobs(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All else of the answers."""
    return [{name: value for name, value in answer.items() if "logprob" not in name} for answer in answers]


@pytest.mark.parametrize("mesh", MESHES)
def test_two_processes_draw_what_one_draws(mesh, folders, tmp_path):
    """Guards every place where a host decides or reads: the same tokens, from process 0, and from nobody else."""
    asked = ["--mesh", mesh, "--n", 3, "--max-new-tokens", 20, "--stop", "e", "--dtype", "float32", "--json"]
    asked += ["Why is the sky blue?"]
    one = end(
        start("generate", "--checkpoint", folders / "converted", *asked, devices=8, folder=tmp_path / "one"),
        tmp_path / "one",
    )
    saving = ["--save", tmp_path / "saved-{process_id}.json"]
    first, second = run_both(tmp_path, "generate", "--checkpoint", folders / "converted", *saving, *asked)
    assert (one.returncode, first.returncode, second.returncode) == (0, 0, 0), first.stderr + second.stderr
    expected, found = json.loads(one.stdout), json.loads(first.stdout)
    assert logprobs(found["answers"]) == pytest.approx(logprobs(expected["answers"]), abs=1e-4)
    assert without_logprobs(found["answers"]) == without_logprobs(expected["answers"])
    assert len({tuple(answer["token_ids"]) for answer in found["answers"]}) == 3
    assert (second.stdout, second.stderr) == ("", "")
    assert (tmp_path / "saved-0.json").exists()
    assert not (tmp_path / "saved-1.json").exists()


def test_two_processes_score_published_weights_as_one_does(folders, tmp_path):
    """Guards weights that every host reads whole and keeps in part, and logits that no host has whole."""
    asked = ["--checkpoint", folders / "published", "--mesh", MESHES[1], "--dtype", "float32", "--json", "The sky is."]
    one = end(start("score", *asked, devices=8, folder=tmp_path / "one"), tmp_path / "one")
    first, second = run_both(tmp_path, "score", *asked)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    expected, found = json.loads(one.stdout)["texts"], json.loads(first.stdout)["texts"]
    assert found[0]["logprobs"][1:] == pytest.approx(expected[0]["logprobs"][1:], abs=1e-4)
    assert second.stdout == ""


@pytest.mark.parametrize(
    ("process_id", "message"),
    [(0, "generate: --process-id 1 of 2 processes did not come: "), (1, "generate: process 0 did not answer at 127")],
)
def test_a_missing_process_is_named_within_the_time_out(process_id, message, folders, tmp_path):
    """Guards the wait: JAX's own ends with a stack trace that names nobody."""
    hosts = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2, "--process-id", process_id]
    asked = ["--checkpoint", folders / "converted", *hosts, "--coordinator-timeout", 2, "Hello"]
    ended = end(start("generate", *asked, devices=4, folder=tmp_path / "lonely"), tmp_path / "lonely", 60)
    assert ended.returncode == 2
    assert ended.stderr.startswith(message)
    assert ended.stderr.count("\n") == 1


def test_where_there_is_no_cluster_it_is_said(folders, tmp_path):
    """Guards --coordinator auto on a machine of one's own: what to give in its place."""
    asked = ["--checkpoint", folders / "converted", "--coordinator", "auto", "Hello"]
    ended = end(start("generate", *asked, devices=1, folder=tmp_path / "lonely"), tmp_path / "lonely", 60)
    assert ended.returncode == 2
    assert ended.stderr.startswith("generate: --coordinator auto: JAX knows no cluster here, expected Slurm")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Process {process_id}"], "generate: the prompt of process 1 is not process 0's: start the same command"),
        (["--seed", "{process_id}", "Hello"], "generate: the command line of process 1 is not process 0's: start"),
        (["--mesh", "data=2", "Hello"], "generate: a mesh of 2 of the 8 devices leaves processes [1] without one"),
    ],
)
def test_processes_that_were_not_started_alike_are_refused(arguments, message, folders, tmp_path):
    """Guards against runs that hang, or whose hosts compute different things together."""
    mesh = [] if "--mesh" in arguments else ["--mesh", MESHES[0]]
    for ended in run_both(tmp_path, "generate", "--checkpoint", folders / "converted", "--quiet", *mesh, *arguments):
        assert ended.returncode == 2
        assert ended.stderr.splitlines()[-1].startswith(message)


def test_ctrl_c_at_one_process_ends_all_and_keeps_what_had_come(folders, tmp_path):
    """Guards the agreement: a process that left alone would leave the others waiting for its devices."""
    asked = [
        "--mesh",
        MESHES[0],
        "--max-new-tokens",
        7000,
        "--max-context-tokens",
        8192,
        "--logit-bias",
        "200002=-100,200012=-100",
        "--raw",
    ]
    processes = start_both(tmp_path, "generate", "--checkpoint", folders / "converted", *asked, "Hello")
    deadline = time.monotonic() + 200
    while not (tmp_path / "0" / "stdout").read_text():
        assert time.monotonic() < deadline
        assert processes[0].poll() is None, (tmp_path / "0" / "stderr").read_text()
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGINT)
    first, second = (end(process, tmp_path / str(i), 60) for i, process in enumerate(processes))
    assert (first.returncode, second.returncode) == (130, 130)
    assert "the answer was interrupted after" in first.stderr
    assert (second.stdout, second.stderr) == ("", "")


def test_two_processes_do_one_job(folders, tmp_path):
    """Guards batch jobs of a model over several hosts: one of them keeps the lines, and all end together."""
    rows = [{"id": str(i), "prompt": f"Question {i}?", "max_new_tokens": 4 + i} for i in range(5)] + [{"id": "bad"}]
    given = tmp_path / "in.jsonl"
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["--checkpoint", folders / "converted", "--mesh", MESHES[0], "--dtype", "float32", "--slots", 4]
    one = tmp_path / "one.jsonl"
    assert end(start("batch", given, one, *asked, devices=8, folder=tmp_path / "one"), tmp_path / "one").returncode == 0
    both = tmp_path / "both.jsonl"
    for run in ("first", "again"):
        (tmp_path / run).mkdir()
        first, second = run_both(tmp_path / run, "batch", given, both, *asked)
        assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
        assert (second.stdout, second.stderr) == ("", "")
    assert sorted(both.read_bytes().splitlines()) == sorted(one.read_bytes().splitlines())
    (tmp_path / "other").mkdir()
    other, also = run_both(tmp_path / "other", "batch", given, both, "--seed", 1, *asked)
    assert (other.returncode, also.returncode) == (2, 2)
    assert "settings, seed: 0 then, 1 now" in other.stderr


def test_a_full_disk_at_the_first_ends_both(folders, tmp_path):
    """Guards a process that waits for another which has left: what is on the disk stays, and all end in a moment."""
    given, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text("".join(f'{{"id": "{i}", "prompt": "Question {i}?", "max_new_tokens": 8}}\n' for i in range(9)))
    asked = ["--checkpoint", folders / "converted", "--mesh", MESHES[0], "--dtype", "float32", "--slots", 2]
    processes = start_both(tmp_path, "batch", given, out, *asked, "--compilation-cache=", file_bytes=4096)
    first, second = (end(process, tmp_path / str(i)) for i, process in enumerate(processes))
    assert (first.returncode, second.returncode) == (2, 130), first.stderr + second.stderr
    assert first.stderr.splitlines()[-1] == f"batch: {out}: File too large"
    lines = out.read_bytes()
    assert 0 < len(lines) <= 4096 and lines.endswith(b"\n")
    assert all(json.loads(line) for line in lines.splitlines())
