"""The roll call of a run over several hosts: who is let in, who is sent away, and what each is told."""

import contextlib
import socket

import pytest

from gptoss_jax.cli import roll_call


@pytest.fixture
def arrive():
    """Has `line` come to process 0 of three, and no more; gives the other end of the connection."""
    with contextlib.ExitStack() as opened:

        def arrive(line: bytes, present: dict[int, socket.socket]) -> socket.socket:
            ours, theirs = map(opened.enter_context, socket.socketpair())
            theirs.sendall(line)
            theirs.shutdown(socket.SHUT_WR)
            roll_call._admit(ours, 3, present)
            return theirs

        yield arrive


def test_a_process_of_this_run_is_present(arrive):
    """Guards the count: processes wait, without a word, until all are there."""
    present = {}
    for process_id in (2, 1):
        arrive(b"process %d of 3\n" % process_id, present)
    assert present.keys() == {1, 2}


@pytest.mark.parametrize(
    "line",
    [b"process 1 of 2\n", b"process 0 of 3\n", b"process 3 of 3\n", b"GET / HTTP/1.1\r\n", b"process 1 of 3", b""],
)
def test_others_are_sent_away_and_told_why(line, arrive):
    """Guards against strangers at the port, and against a run of another size that would wait in vain."""
    present = {}
    told = arrive(line, present).recv(1000)
    assert present == {}
    assert told == b"process 0 was started with --num-processes 3: give all of them the same\n"


def test_of_two_processes_with_one_id_the_first_is_told(arrive):
    """Guards a process that was started again while the others waited, and two hosts with one number."""
    present = {}
    first = arrive(b"process 1 of 3\n", present)
    held = present[1]
    arrive(b"process 1 of 3\n", present)
    assert present.keys() == {1}
    assert present[1] is not held
    assert first.recv(1000) == b"another process was started with --process-id 1\n"
    assert first.recv(1000) == b""


def test_missing_processes_are_named_and_no_more_than_a_few():
    """Guards the line that people read on a cluster where nothing came up."""
    assert roll_call._missing([1, 3], 4).startswith("--process-id 1, 3 of 4 processes did not come: ")
    assert roll_call._missing(list(range(1, 1000)), 1000).startswith("--process-id 1, 2, 3, 4, 5, 6, 7, 8, ... of 1000")


def test_a_port_that_is_taken_is_named():
    """Guards the way out: another port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            roll_call.GptossError, match=f"cannot listen at port {port} .*in use.*: choose another port"
        ):
            roll_call.wait("127.0.0.1", port, 2, 0, 1.0)
