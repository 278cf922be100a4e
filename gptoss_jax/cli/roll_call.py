"""Waits until every process of a run over several hosts is there, and says which are not.

`jax.distributed` waits too, but ends a process with a stack trace when it has waited in vain, and names nobody. So the
processes meet first, at the address where its coordinator will listen: each of the others sends process 0 one line,
who it is, and gets one line back, "go" or why not. Their connections stay open, for `watch`. Knows no JAX.
"""

import contextlib
import re
import socket
import time

from gptoss_jax.errors import GptossError, one_line

GO = "go"
MAX_LINE_BYTES = 1000
MAX_STRANGER_SECONDS = 2.0  # for whoever connects and does not say who it is
RETRY_SECONDS = 0.2


def wait(host: str, port: int, num_processes: int, process_id: int, timeout_seconds: float) -> dict[int, socket.socket]:
    """Returns once processes 0 to `num_processes` - 1 are all there, each of which has to call this.

    Gives the open connections, by the process at the other end: in process 0 to all others, in these to process 0.

    Raises:
        GptossError: some are missing after `timeout_seconds`, or were started for another run.
    """
    deadline = time.monotonic() + timeout_seconds
    if process_id == 0:
        return _gather(port, num_processes, deadline)
    return {0: _report(host, port, num_processes, process_id, deadline)}


# ---- process 0 ----


def _gather(port: int, num_processes: int, deadline: float) -> dict[int, socket.socket]:
    """Accepts the other processes, and has them go when all are there, or end when some are not."""
    present: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as if_in_vain:
        if_in_vain.callback(lambda: [connection.close() for connection in present.values()])
        with _listen(port) as server:
            while len(present) < num_processes - 1 and (left := deadline - time.monotonic()) > 0:
                server.settimeout(left)
                with contextlib.suppress(OSError):  # none came, or one left again
                    _admit(server.accept()[0], num_processes, present)
        missing = sorted(set(range(1, num_processes)) - present.keys())
        verdict = _missing(missing, num_processes) if missing else GO
        for connection in present.values():  # where the coordinator will listen, nobody listens any more
            _answer(connection, verdict)
        if missing:
            raise GptossError(verdict)
        if_in_vain.pop_all()
    return present


def _listen(port: int) -> socket.socket:
    """A socket for every address of this host."""
    both = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)
    except OSError as error:
        raise GptossError(
            f"--coordinator: cannot listen at port {port} of this host ({error.strerror}): choose another port"
        ) from None


def _admit(connection: socket.socket, num_processes: int, present: dict[int, socket.socket]) -> None:
    """Adds a process to those that are present; a stranger is sent away."""
    connection.settimeout(MAX_STRANGER_SECONDS)
    found = re.fullmatch(r"process (\d{1,9}) of (\d{1,9})", _read_line(connection))
    if not found or int(found[2]) != num_processes or not 0 < int(found[1]) < num_processes:
        _answer(connection, f"process 0 was started with --num-processes {num_processes}: give all of them the same")
        connection.close()
        return
    process_id = int(found[1])
    if process_id in present:  # it was started again, or there are two
        _answer(present[process_id], f"another process was started with --process-id {process_id}")
        present[process_id].close()
    present[process_id] = connection


def _missing(process_ids: list[int], num_processes: int) -> str:
    named = ", ".join(map(str, process_ids[:8])) + (", ..." if len(process_ids) > 8 else "")
    return (
        f"--process-id {named} of {num_processes} processes did not come: start the same command on every host, each "
        "with a --process-id of its own (--coordinator-timeout says how long to wait)"
    )


# ---- the others ----


def _report(host: str, port: int, num_processes: int, process_id: int, deadline: float) -> socket.socket:
    """Tells process 0 that this one is there, and waits until all are."""
    while (left := deadline - time.monotonic()) > 0:
        verdict = ""
        try:
            connection = socket.create_connection((host, port), timeout=left)
        except socket.gaierror as error:
            raise GptossError(f"--coordinator: no host is called {host} ({error.strerror})") from None
        except OSError:  # process 0 does not listen yet
            connection = None
        if connection:
            with contextlib.suppress(OSError):  # it left
                _answer(connection, f"process {process_id} of {num_processes}")
                verdict = _read_line(connection)
            if verdict == GO:
                return connection
            connection.close()
        if verdict:
            raise GptossError(verdict)
        time.sleep(RETRY_SECONDS)
    raise GptossError(
        f"process 0 did not answer at {host}:{port}: start the same command with --process-id 0 there, at a port that "
        "this host may connect to (--coordinator-timeout says how long to wait)"
    )


# ---- both ----


def _answer(connection: socket.socket, line: str) -> None:
    with contextlib.suppress(OSError):  # it has left
        connection.sendall(line.encode() + b"\n")


def _read_line(connection: socket.socket) -> str:
    """The line that the other side sends, and no byte that follows it; "" if it leaves before."""
    with connection.makefile("rb", buffering=0) as file:
        line = file.readline(MAX_LINE_BYTES)
    return one_line(line[:-1].decode(errors="replace")) if line.endswith(b"\n") else ""
