"""`--coordinator auto`: what JAX is told to join on each cluster is what it would find by itself."""

import functools
import socket
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import pytest
from absl import flags
from jax._src import clusters, distributed
from jax._src.clusters import cloud_tpu_cluster

from gptoss_jax.cli import hosts


class Joined(NamedTuple):
    """What JAX's own runtime is asked for."""

    coordinator: str
    num_processes: int | None  # that the service waits for; None: this process is not the first, and runs none
    process_id: int
    visible_devices: str | None = None  # of GPUs; None: all


SLURM = {"SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "node[07-09],other", "SLURM_NTASKS": "4", "SLURM_LOCALID": "2"}
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2"}
GKE = {"TPU_WORKER_HOSTNAMES": "job-0.name,job-1.name"}
SLICES = {"MEGASCALE_COORDINATOR_ADDRESS": "first-0.name:8081", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
OF_GKE = {"instance-template": "a pool of nodes"}
METADATA = {"agent-worker-number": "1", "worker-network-endpoints": "a:1:10.0.0.7,b:2:10.0.0.8", "tpu-env": "X: 'y'"}
VARIABLES = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JAX_COORDINATOR", "JAX_LOCAL", "KUBERNETES_")

FOUND = {
    "Slurm": (SLURM | {"SLURM_PROCID": "2"}, {}, Joined("node07:61441", None, 2, "2")),
    "Slurm, first": (SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, {}, Joined("node07:61441", 4, 0, "0")),
    "Slurm, a host's devices in one process": (
        SLURM | {"SLURM_PROCID": "1", "JAX_LOCAL_DEVICE_IDS": "0,1,2,3", "JAX_COORDINATOR_PORT": "77"},
        {},
        Joined("node07:77", None, 1, "0,1,2,3"),
    ),
    "Slurm, with an address": (
        SLURM | {"SLURM_PROCID": "1", "JAX_COORDINATOR_ADDRESS": "head:8476"},
        {},
        Joined("head:8476", None, 1, "2"),
    ),
    "Open MPI": (
        OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
        {},
        Joined("10.96.0.1:62624", None, 1, "0"),
    ),
    "GKE": (GKE | {"TPU_WORKER_ID": "1"}, OF_GKE, Joined("job-0.name:8482", None, 1)),
    "GKE, first": (GKE | {"TPU_WORKER_ID": "0"}, OF_GKE, Joined("job-0.name:8482", 2, 0)),
    "GKE, two slices": (GKE | SLICES | {"TPU_WORKER_ID": "1"}, OF_GKE, Joined("first-0.name:8482", None, 3)),
    "Cloud TPU": ({}, METADATA, Joined("10.0.0.7:8482", None, 1)),
    "Cloud TPU, first": ({}, METADATA | {"agent-worker-number": "0"}, Joined("10.0.0.7:8482", 2, 0)),
}


@pytest.fixture
def runtime(monkeypatch):
    """JAX's runtime, which joins nobody and keeps what it is asked for."""
    asked: dict[str, Any] = {}
    client = SimpleNamespace(connect=lambda: None)

    def service(bind: str, num_processes: int, **rest: object) -> None:
        asked["num_processes"] = num_processes

    def connection(coordinator: str, process_id: int, **rest: object) -> object:
        asked.update(coordinator=coordinator, process_id=process_id)
        return client

    fake = SimpleNamespace(get_distributed_runtime_service=service, get_distributed_runtime_client=connection)
    monkeypatch.setattr(distributed, "_jax", fake)
    monkeypatch.setattr(distributed, "config", SimpleNamespace(update=asked.__setitem__))
    monkeypatch.setattr(distributed.State, "initialize_preemption_sync_manager", lambda self: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **of: distributed.State().initialize(**of))
    return asked


@pytest.fixture
def options(monkeypatch):
    """The flags of a command that was given `--coordinator auto`."""
    found = flags.FlagValues()
    for name in ("DEFINE_string", "DEFINE_integer"):
        monkeypatch.setattr(flags, name, functools.partial(getattr(flags, name), flag_values=found))
    hosts.define_flags()
    found(["generate", "--coordinator", "auto"])
    return found


def _joined(asked: dict[str, Any]) -> Joined:
    """What was asked for since the last call."""
    sizes = asked["coordinator"], asked.get("num_processes"), asked["process_id"]
    found = Joined(*sizes, asked.get("jax_cuda_visible_devices"))
    asked.clear()
    return found


def _place(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], metadata: dict[str, str]) -> None:
    """Has JAX find this environment: of TPUs where there is metadata, for which it asks Google's server."""
    for name in (name for name in dict(hosts.os.environ) if name.startswith(VARIABLES)):
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for module in (clusters.cluster, cloud_tpu_cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", bool(metadata))
    monkeypatch.setattr(
        cloud_tpu_cluster, "get_metadata", lambda key: (metadata.get(key, ""), 200 if key in metadata else 404)
    )
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.1")


@pytest.mark.parametrize("cluster", FOUND)
def test_a_cluster_is_joined_as_jax_joins_it(cluster, runtime, options, monkeypatch):
    """Guards arguments of ours that stand before what the cluster says: devices of a process, ports, slices."""
    variables, metadata, expected = FOUND[cluster]
    _place(monkeypatch, variables, metadata)
    jax.distributed.initialize()
    assert _joined(runtime) == expected

    monkeypatch.setattr(hosts, "_is_joined", lambda: False)
    monkeypatch.setattr(hosts.watch, "say_goodbye_at_exit", lambda: None)
    monkeypatch.setattr(hosts.roll_call, "wait", lambda *of: {})
    monkeypatch.setattr(hosts.watch, "start", lambda *of: None)
    monkeypatch.setattr(hosts.relay, "start", lambda host, port: f"{host}:{port}")
    screen: Any = SimpleNamespace(leave_stdout_to_answers=lambda: None)
    hosts.join(options, screen)
    assert _joined(runtime) == expected
