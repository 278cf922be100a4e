"""The watch over the processes of a run: who is lost, what each is told, and the relay that hides it from JAX."""

import contextlib
import socket
import threading
import time

import pytest

from gptoss_jax.cli import relay, watch

AGAIN = ": start all of them again"


class _Ended(BaseException):
    """What stands for the end of the process."""


class _Run:
    """Process 0 of three, and the other ends of its connections."""

    def __init__(self, timeout_seconds: float = 30.0):
        pairs = {i: socket.socketpair() for i in (1, 2)}
        self.others = {i: theirs for i, (_, theirs) in pairs.items()}
        for other in self.others.values():
            other.settimeout(10)
        self._sockets = [end for pair in pairs.values() for end in pair]
        self.ended: tuple[str, int] | None = None
        self.watch = watch.Watch({i: ours for i, (ours, _) in pairs.items()}, 3, timeout_seconds, self._end)

    def _end(self, line: str, exit_code: int) -> None:
        self.ended = line, exit_code
        raise _Ended

    def close(self) -> None:
        self.watch._selector.close()
        for end in self._sockets:
            end.close()

    def until_it_ends(self) -> tuple[str, int] | None:
        with contextlib.suppress(_Ended):
            self.watch.run()
        return self.ended


@pytest.fixture
def started():
    """Starts a run."""
    with contextlib.ExitStack() as runs:

        def start(**options: float) -> _Run:
            run = _Run(**options)
            runs.callback(run.close)
            return run

        yield start


def lines_of(connection: socket.socket) -> list[bytes]:
    """What has come, without beats."""
    return [line for line in connection.recv(1000).split(b"\n") if line]


def test_a_connection_that_ends_is_a_process_that_died_and_the_others_hear_who(started):
    """Guards runs of three and more: only process 0 knows all."""
    run = started()
    run.others[1].close()
    line = "process 1 of 3 has died: its connection ended"
    assert run.until_it_ends() == (line + AGAIN, watch.EXIT_CODE)
    assert lines_of(run.others[2]) == [line.encode()]


def test_who_has_said_goodbye_loses_nobody(started):
    """Guards a process that still ends when the other, which heard its goodbye, is gone without one of its own."""
    run = started()
    run.watch.say(watch.GOODBYE)
    for other in run.others.values():
        other.close()
    assert run.until_it_ends() is None


def test_who_says_goodbye_has_not_died(started):
    """Guards ordinary ends, which come one after the other."""
    run = started()
    for other in run.others.values():
        other.sendall(b"\ngood")  # lines come in any pieces
    ending = threading.Timer(0.2, lambda: [other.sendall(b"bye\n") or other.close() for other in run.others.values()])
    ending.start()
    assert run.until_it_ends() is None


def test_silence_is_a_process_that_hangs_and_a_beat_is_none(started):
    """Guards against waiting in a collective for ever, and against ending a run in which nothing but beats is said."""
    run = started(timeout_seconds=0.8)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.1):
            run.others[2].send(b"\n")

    threading.Thread(target=beat, daemon=True).start()
    began = time.monotonic()
    line, code = run.until_it_ends() or ("", 0)
    stop.set()
    assert line.startswith("process 1 of 3 hangs, or its host is gone: nothing came from it for 0.8 s (--host-timeout)")
    assert code == watch.EXIT_CODE
    assert 0.8 < time.monotonic() - began < 10


def test_what_process_0_names_is_passed_on(started):
    """Guards the others, which see nothing of one another; control characters go to no terminal."""
    run = started()
    run.others[1].sendall(b"process 2 of 3 has died: its \x1b connection ended\n")
    line, code = run.until_it_ends() or ("", 0)
    assert line.startswith("process 2 of 3 has died")
    assert "\x1b" not in line
    assert code == watch.EXIT_CODE


def test_a_process_that_fails_alone_ends_the_others_after_a_while(started, monkeypatch):
    """Guards a file that one host lacks: its process says so, and the others would wait for it."""
    monkeypatch.setattr(watch, "GRACE_SECONDS", 0.3)
    run = started()
    run.others[2].sendall(b"failed\n")
    assert run.until_it_ends() == (
        "process 2 of 3 has ended with an error that it names itself" + AGAIN,
        watch.EXIT_CODE,
    )


def test_a_process_that_has_said_its_own_error_keeps_its_exit_code(started):
    """Guards the one line: the others end because of this one, which has said why."""
    run = started()
    run.watch.failed_with = 2
    run.others[1].close()
    assert run.until_it_ends() == ("", 2)


def test_the_relay_passes_everything_on_and_hides_the_end():
    """Guards the reason for it: JAX's client ends the process in the moment in which it sees a connection end."""
    with contextlib.ExitStack() as opened:
        coordinator, source, sink, client = (
            opened.enter_context(end) for pair in (socket.socketpair(), socket.socketpair()) for end in pair
        )
        coordinator.sendall(b"answered")
        coordinator.close()
        relay._copy(source, sink)  # returns, since there is no more
        assert client.recv(100) == b"answered"
        client.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.recv(100)
