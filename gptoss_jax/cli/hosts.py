"""One model over several hosts: every host runs the same command, and process 0 alone answers.

The processes decide everything for themselves and alike, from the same input; what could differ, a hand on a keyboard,
they tell one another.
"""

import hashlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from gptoss_jax.cli import interrupts, relay, roll_call, watch
from gptoss_jax.errors import GptossError, short

if TYPE_CHECKING:
    import numpy as np

    import gptoss_jax.cli.terminal

HOST_FLAGS = ("coordinator", "num_processes", "process_id", "coordinator_timeout", "host_timeout")
AUTO = "auto"
SHUTDOWN_SECONDS = 3600  # that a process which ends waits for the others, one of which may have much to write
MIN_HOST_TIMEOUT = 2
JAX_LATER_SECONDS = 3600  # that JAX's own watch waits longer than ours, which says whom it lost
_OF_ONE_HOST = {"process_id", "checkpoint", "compilation_cache", "vocab", "save"}  # flags that name places of a host


def define_flags() -> None:
    """The flags named in HOST_FLAGS."""
    flags.DEFINE_string(
        "coordinator", None, 'HOST:PORT: Several hosts run one model: where process 0 listens; "auto" asks the cluster.'
    )
    flags.DEFINE_integer("num_processes", None, "N: Processes in all, one a host; each runs this command.")
    flags.DEFINE_integer("process_id", None, "I: Which of them this one is, from 0; 0 alone prints and writes files.")
    flags.DEFINE_integer("coordinator_timeout", 300, "SECONDS: How long to wait until all processes are there.")
    flags.DEFINE_integer(
        "host_timeout", 60, "SECONDS: After how much silence of a process in the run the others end, with exit code 75."
    )


def check(options: flags.FlagValues) -> None:
    """Raises GptossError for flags of HOST_FLAGS that do not fit together."""
    if options.coordinator_timeout < 1:
        raise GptossError(f"--coordinator-timeout is {options.coordinator_timeout}, expected at least 1 second")
    if options.host_timeout < MIN_HOST_TIMEOUT:
        raise GptossError(f"--host-timeout is {options.host_timeout}, expected at least {MIN_HOST_TIMEOUT} seconds")
    coordinator, count, process_id = options.coordinator, options.num_processes, options.process_id
    if coordinator is None or coordinator == AUTO:
        if count is not None or process_id is not None:
            raise GptossError("--num-processes and --process-id have an effect with --coordinator HOST:PORT only")
        return
    _address(coordinator)
    if count is None or process_id is None:
        raise GptossError("--coordinator HOST:PORT has an effect with --num-processes and --process-id only: give both")
    if not 0 <= process_id < count:
        raise GptossError(f"--process-id is {process_id}, expected 0 to {count - 1}: one less than --num-processes")


def _address(coordinator: str) -> tuple[str, int]:
    found = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:\s]+)):(\d{1,5})", coordinator)
    if not found or not 0 < int(found[3]) < 1 << 16:
        raise GptossError(f"--coordinator is {short(coordinator)}, expected HOST:PORT such as 10.0.0.1:8476, or auto")
    return found[1] or found[2], int(found[3])


def join(options: flags.FlagValues, screen: "gptoss_jax.cli.terminal.Screen") -> None:
    """Waits for all processes of the run, if the flags name several; all but the first say no more than errors.

    A second call does nothing. To be called before anything asks JAX for devices.

    Raises:
        GptossError: processes are missing, or were not started alike.
    """
    if options.coordinator is None or _is_joined():
        return
    watch.say_goodbye_at_exit()
    place = _of_cluster(options) if options.coordinator == AUTO else _of_flags(options)
    where = _meet(place, options)
    screen.leave_stdout_to_answers()  # gloo prints there
    with interrupts.ended_by_ctrl_c():
        import jax

        jax.distributed.initialize(
            initialization_timeout=options.coordinator_timeout, shutdown_timeout_seconds=SHUTDOWN_SECONDS, **where
        )
    if not is_first():
        screen.hush()
    alike = {name: value for name, value in options.flag_values_dict().items() if name not in _OF_ONE_HOST}
    check_same("the command line", alike)


class _Place(NamedTuple):
    """Of this process in the run: as the flags say, or the cluster."""

    coordinator: str  # HOST:PORT
    num_processes: int
    process_id: int
    local_device_ids: Sequence[int] | None = None  # None: all of this host


def _of_flags(options: flags.FlagValues) -> _Place:
    return _Place(options.coordinator, options.num_processes, options.process_id)


def _of_cluster(options: flags.FlagValues) -> _Place:
    """What JAX finds by itself, in the environment or by asking the cluster."""
    with interrupts.ended_by_ctrl_c():
        from jax._src.clusters import ClusterEnv  # JAX tells it in public only where nobody can meet before it joins
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")  # as JAX looks for it
    timeout = options.coordinator_timeout
    coordinator, count, process_id, local_device_ids = ClusterEnv.auto_detect_unset_distributed_params(
        address, None, None, None, None, timeout
    )
    if coordinator is None or count is None or process_id is None:
        raise GptossError(
            "--coordinator auto: JAX knows no cluster here, expected Slurm, Open MPI, Cloud TPU or Kubernetes: give "
            "--coordinator HOST:PORT, --num-processes and --process-id"
        )
    if os.environ.get("JAX_LOCAL_DEVICE_IDS"):  # which JAX reads later, and prefers to what a cluster says
        local_device_ids = None
    return _Place(coordinator, count, process_id, local_device_ids)


def _meet(place: _Place, options: flags.FlagValues) -> dict[str, Any]:
    """Waits for all processes, watches them from then on, and gives the arguments of `jax.distributed.initialize`."""
    (host, port), count, process_id = _address(place.coordinator), place.num_processes, place.process_id
    connections = roll_call.wait(host, port, count, process_id, options.coordinator_timeout)
    watch.start(connections, count, options.host_timeout)
    return {
        "coordinator_address": relay.start(host, port) if process_id else place.coordinator,
        "num_processes": count,
        "process_id": process_id,
        "local_device_ids": place.local_device_ids,
        "cluster_detection_method": "deactivate",
        "heartbeat_timeout_seconds": options.host_timeout + JAX_LATER_SECONDS,
    }


def _is_joined() -> bool:
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process prints and writes files: the first of a run over several hosts, or the only one."""
    import jax

    return jax.process_index() == 0


def check_same(what: str, value: object) -> None:
    """Raises GptossError, in every process, if `value` does not print alike in all of them."""
    digest = hashlib.sha256(repr(value).encode(errors="surrogateescape")).digest()
    found = _gathered(digest)
    if different := [process for process, its in enumerate(found) if its != found[0]]:
        raise GptossError(
            f"{what} of process {', '.join(map(str, different))} is not process 0's: start the same command, on the "
            "same input, on every host"
        )


def of_first(values: "np.ndarray") -> "np.ndarray":
    """The values that the first process has, in every process; all call it with arrays of one shape."""
    import numpy as np
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(values))


def agreed(asked: Callable[[], bool]) -> Callable[[], bool]:
    """`asked`, true in every process as soon as it is in one: all have to call it equally often."""
    import jax

    if jax.process_count() == 1:
        return asked
    return lambda: b"\1" in _gathered(b"\1" if asked() else b"\0")


def _gathered(content: bytes) -> list[bytes]:
    """What each process gave, in their order; all of the same length."""
    import jax

    if jax.process_count() == 1:
        return [content]
    import numpy as np
    from jax.experimental import multihost_utils

    everybody = multihost_utils.process_allgather(np.frombuffer(content, np.uint8))
    return [each.tobytes() for each in np.asarray(everybody).reshape(jax.process_count(), -1)]
