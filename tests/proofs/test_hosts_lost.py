"""A run over two processes loses one: the other says which, in one line, in seconds; and what each reads of weights."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.checkpoints.orbax import reader
from gptoss_jax.checkpoints.orbax.writer import save
from gptoss_jax.checkpoints.orbax.zarr import PART_BYTES
from gptoss_jax.cli import watch
from gptoss_jax.model import sharding
from gptoss_jax.model.config import read_config
from gptoss_jax.model.sharding import Sharding
from gptoss_jax.model.transformer import Leaf
from tests.goldens.make import ROOT
from tests.proofs.test_hosts import MESHES, PROXIES, end, folders, free_port, gke, slurm, start_both, start_on_cluster

__all__ = ["folders"]  # the fixture

LONG = ["--max-new-tokens", 7000, "--max-context-tokens", 8192, "--logit-bias", "200002=-100,200012=-100", "--raw"]
HAS_DIED = "has died: its connection ended: start all of them again\n"


def wait_for(path: Path, processes: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Until something is in a file that the processes write."""
    deadline = time.monotonic() + 200
    while not (path.exists() and path.read_bytes()):
        assert time.monotonic() < deadline
        assert [process.poll() for process in processes] == [None] * len(processes), (
            folder / "0" / "stderr"
        ).read_text()
        time.sleep(0.1)


@pytest.mark.parametrize(("lost", "sent"), [(1, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGKILL)])
def test_the_other_names_a_process_that_is_lost_while_they_answer(lost, sent, folders, tmp_path):
    """Guards the wait in a collective: JAX's watch ends with a stack trace, after minutes, and names nobody.

    Where process 0 is lost, which coordinates, JAX's clients would end in that moment.
    """
    asked = ["--checkpoint", folders / "converted", "--mesh", MESHES[0], *LONG, "--quiet", "--host-timeout", 12]
    processes = start_both(tmp_path, "generate", *asked, "Hello")
    try:
        wait_for(tmp_path / "0" / "stdout", processes, tmp_path)
        processes[lost].send_signal(sent)
        began = time.monotonic()
        other = end(processes[1 - lost], tmp_path / str(1 - lost), 60)
    finally:
        processes[lost].kill()
        processes[lost].wait()
    took = time.monotonic() - began
    assert other.returncode == watch.EXIT_CODE, other.stderr
    hangs = "hangs, or its host is gone: nothing came from it for 12 s (--host-timeout): start all of them again\n"
    lines = [line for line in other.stderr.splitlines(keepends=True) if "these weights are RANDOM" not in line]
    assert lines == [f"generate: process {lost} of 2 {HAS_DIED if sent == signal.SIGKILL else hangs}"]
    assert took < 50


@pytest.mark.parametrize("cluster", [slurm, gke])
def test_both_others_name_a_process_of_three_that_a_cluster_started(cluster, folders, tmp_path):
    """Guards --coordinator auto, a mesh over three processes, and one that is not connected to the one that is lost."""
    asked = ["--checkpoint", folders / "converted", "--mesh", "data=3", *LONG, "--quiet"]
    processes = start_on_cluster(tmp_path, cluster, 3, "generate", *asked, "Hello")
    try:
        wait_for(tmp_path / "0" / "stdout", processes, tmp_path)
        processes[1].kill()
        others = [end(processes[i], tmp_path / str(i), 60) for i in (0, 2)]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [other.returncode for other in others] == [watch.EXIT_CODE] * 2, others
    said = f"generate: process 1 of 3 {HAS_DIED}"
    assert [other.stderr.splitlines(keepends=True)[-1] for other in others] == [said] * 2


# ---- what each reads ----

LEAVES = {
    "a/experts": Leaf((8, 2 * PART_BYTES), jnp.dtype(jnp.uint8), ("experts", None)),
    "a/everywhere": Leaf((2, PART_BYTES), jnp.dtype(jnp.uint8), (None, None)),
}
MESH = "expert=4,tensor=2"


def own_bytes(laid: Sharding) -> int:
    """Bytes of all parts of LEAVES that this process's devices hold, each once."""
    count = 0
    for leaf in LEAVES.values():
        indices: Any = laid.named(leaf.axes).addressable_devices_indices_map(leaf.shape).values()
        boxes = {tuple(piece.indices(size)[:2] for piece, size in zip(i, leaf.shape, strict=True)) for i in indices}
        count += sum(math.prod(stop - start for start, stop in box) * leaf.dtype.itemsize for box in boxes)
    return count


JOINED = """
import sys
import jax
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]), cluster_detection_method="deactivate")
from tests.proofs.test_hosts_lost import print_bytes_read  # after it, since tests ask JAX for devices
print_bytes_read(sys.argv[1])
"""


def print_bytes_read(path: str) -> None:
    """In one of two processes: bytes that restoring took from files, and bytes that its devices hold of the weights."""
    import tensorstore

    laid = sharding.make(MESH)
    for name, parts in reader.read(path, LEAVES, laid):
        array = jax.device_put(parts, laid.named(LEAVES[name].axes))
        for shard in array.addressable_shards:
            expected = np.broadcast_to(np.arange(LEAVES[name].shape[0], dtype=np.uint8)[:, None], array.shape)
            assert (np.asarray(shard.data) == expected[shard.index]).all()
    found = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    print(sum(value["value"] for metric in found for value in metric["values"]), own_bytes(laid), flush=True)


def test_each_process_reads_its_shards_of_a_checkpoint_and_no_more(tmp_path):
    """Guards loading of what no single host holds: half of the experts, and what is everywhere."""
    arrays = {
        name: np.ascontiguousarray(np.broadcast_to(np.arange(leaf.shape[0], dtype=np.uint8)[:, None], leaf.shape))
        for name, leaf in LEAVES.items()
    }
    save(tmp_path / "large", arrays, read_config(ROOT / "configs" / "tiny.json"))
    total = sum(array.nbytes for array in arrays.values())
    environment = {name: value for name, value in os.environ.items() if name not in PROXIES}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    command = [sys.executable, "-c", JOINED, str(tmp_path / "large"), f"127.0.0.1:{free_port()}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(i)], cwd=ROOT, env=environment, **pipes) for i in range(2)]
    for process in processes:
        try:
            printed, error = process.communicate(timeout=200)
        finally:
            process.kill()
        assert process.returncode == 0, error
        read, held = map(int, printed.split()[-2:])
        assert held == (arrays["a/experts"].nbytes // 2 + arrays["a/everywhere"].nbytes) < total
        assert held <= read < held + (1 << 16)  # beside them an index of parts, and what Orbax notes
