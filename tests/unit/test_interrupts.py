"""Ctrl-C, whatever a command is doing."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from gptoss_jax.cli import command, interrupts
from gptoss_jax.cli.terminal import Screen
from tests.goldens.make import ROOT


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    """Python's own handler, and that of before afterwards."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_progress_is_interrupted_where_it_reports():
    """Guards loading and compiling: Ctrl-C is said to be heard, and raised where no callback can swallow it."""
    done, said, screen = [], [], Screen()
    with (
        pytest.raises(KeyboardInterrupt),
        interrupts.stopping(said.append) as pressed,
        screen.progress("loading", pressed) as report,
    ):
        report(1, 3)
        _press()
        done.append("went on")
        report(2, 3)
        done.append("too far")
    assert done == ["went on"]
    assert said == ["stopping (Ctrl-C again ends at once)"]
    with pytest.raises(KeyboardInterrupt), interrupts.stopping(said.append):
        _press()
        done.append("to its end")
    assert done[1:] == ["to its end"]
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_an_answer_only_notes_ctrl_c():
    """Guards an engine whose state a sudden end would lose, against a hand that insists."""
    with interrupts.noted() as pressed:
        assert not pressed()
        for _ in range(3):
            _press()
        assert pressed()


# Holds the main thread in C, as a compiler does: Python's handlers wait until it comes back.
IN_C = """
import hashlib, sys
from gptoss_jax.cli import interrupts
def say(line):
    print(line, file=sys.stderr, flush=True)
with interrupts.stopping(say):
    say("compiling")
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def test_a_second_ctrl_c_ends_at_once_what_a_compiler_holds():
    """Guards minutes of compiling, in which Python runs no handler: heard at the first, ended at the second."""
    with subprocess.Popen([sys.executable, "-c", IN_C], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        assert process.stderr.readline() == "compiling\n"
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "stopping (Ctrl-C again ends at once)\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr.read() == "\n"
        assert time.monotonic() - began < 20


@pytest.mark.parametrize("collects", [False, True])
def test_ctrl_c_is_not_lost_in_a_callback_of_the_garbage_collector(collects):
    """Guards every command: JAX has such a callback, and Python drops what is raised in one."""
    reached = []

    def callback(phase: str, info: dict[str, int]) -> None:
        if phase == "stop" and not reached:
            _press()
            reached.append("the callback's end")

    def main() -> None:
        if collects:
            gc.callbacks.append(callback)
            gc.collect()
        else:
            _press()
        time.sleep(5)
        reached.append("the command's end")

    try:
        with pytest.raises(SystemExit) as ended:
            command._guard(main, "test")
    finally:
        gc.callbacks[:] = [other for other in gc.callbacks if other is not callback]
    assert ended.value.code == interrupts.EXIT_CODE
    assert reached == (["the callback's end"] if collects else [])


def test_jobs_in_a_scripts_background_ignore_ctrl_c_throughout():
    """Guards `generate ... &` in a script, which the shell starts with the signal ignored."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    reached = []

    def main() -> None:
        _press()
        with interrupts.ended_by_ctrl_c():
            _press()
        with interrupts.stopping(reached.append) as pressed:
            _press()
            reached.append(pressed())
        with interrupts.noted() as pressed:
            _press()
            reached.append(pressed())

    command._guard(main, "test")
    assert reached == [False, False]


@pytest.mark.parametrize("module", ["gptoss_jax.generate", "gptoss_jax.score", "converters.convert"])
def test_imports_are_ended_without_a_traceback(module):
    """Guards the first moments of a command, before it is a command: its own imports, as a module and as a script."""
    press = (
        "import os, signal, sys\nclass Press:\n def find_spec(self, name, *_):\n"
        "  if name == 'absl': os.kill(os.getpid(), signal.SIGINT)\nsys.meta_path.insert(0, Press())\n"
    )
    script = {"gptoss_jax.generate": "generate", "gptoss_jax.score": "score", "converters.convert": "convert"}[module]
    for start in (
        f"import runpy; runpy.run_module('{module}', run_name='__main__', alter_sys=True)",
        f"from gptoss_jax.cli import scripts; scripts.{script}()",
    ):
        done = subprocess.run(
            [sys.executable, "-c", press + start], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "\n")


def test_text_on_its_way_is_not_lost(tmp_path):
    """Guards what convert prints before it imports JAX, where its stdout is a file."""
    code = (
        "import os, signal\nfrom gptoss_jax.cli import interrupts\nprint('format')\n"
        "with interrupts.ended_by_ctrl_c(): os.kill(os.getpid(), signal.SIGINT)\nprint('too far')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (130, "format\n")
