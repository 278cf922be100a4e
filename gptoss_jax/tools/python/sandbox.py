"""A Python of its own for code that nobody has read: started, given code, watched, and ended with all it started.

What it may do is what `launcher` leaves it: namespaces without network, a root of read-only libraries and one folder of
its own. Time, memory and output are watched from outside, here.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import subprocess
import sys
import sysconfig
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gptoss_jax.errors import GptossError, one_line, short
from gptoss_jax.tools.python import seccomp

_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
_DISTRIBUTION_PACKAGES = "/usr/lib/python3/dist-packages"
_OPEN_FILES = 64
_START_SECONDS = 60  # of a sandbox, on a machine that is busy with other things
_LOOK_SECONDS = 0.05
_READ_BYTES, _LAST_READS = 1 << 16, 32  # a pipe holds a MiB at most
_MESSAGE_BYTES = 4096
_HELD = ("RssAnon:", "RssShmem:")
_WHAT_IT_TAKES = (
    ". It takes Linux 5.14 or newer where users may make user namespaces: see sysctl user.max_user_namespaces, "
    "kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns, and a container's seccomp profile"
)


@dataclass(frozen=True)
class Limits:
    """What code may use, at most. Above a limit it is stopped, or the system refuses it more.

    Attributes:
        seconds: of a call's code, on the clock.
        cpu_seconds: of each process, over its life.
        memory_bytes: address space of a process, and what all of them hold together (looked at 20 times a second).
        disk_bytes: its folder, which lies in memory too, and any file in it.
        output_bytes: what a call gives back: the first and the last half, the middle is left out.
        processes: processes and threads, at one time.

    Raises:
        GptossError: a limit that is not a positive number.
    """

    seconds: int | float = 120
    cpu_seconds: int = 600
    memory_bytes: int = 1 << 30
    disk_bytes: int = 64 << 20
    output_bytes: int = 16_384
    processes: int = 32

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or not value > 0:
                raise GptossError(f"{field.name} is {short(value)}, expected a number above 0")


@dataclass(frozen=True)
class Outcome:
    """What came of a script or a cell.

    Attributes:
        text: what it printed, both streams as they came, the middle left out where that is too much.
        stopped: which limit or signal ended it; None if it ended, or waits for more, by itself.
        broken: why there was no sandbox; None if there was one.
    """

    text: str
    stopped: str | None = None
    broken: str | None = None


class Sandbox:
    """One Python, with its processes and its folder.

    Args:
        limits: as above.
        is_session: many `run`s that share variables; else one `run`, of a script.
        packages: a folder of installed packages that code may import, read-only.
    """

    def __init__(self, limits: Limits, *, is_session: bool, packages: Path | None = None):
        self._limits, self._is_session = limits, is_session
        self._running = threading.RLock()  # pipes are closed when nobody reads them any more
        program = str(Path(__file__).with_name("launcher.py"))
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            (_python(), "-I", "-S", program, json.dumps(_plan(limits, is_session, packages))),
            stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, env={}, cwd="/", start_new_session=True,
        )  # fmt: skip
        self._pipes = [stream for stream in (self._process.stdin, self._process.stdout, self._process.stderr) if stream]
        for stream in self._pipes:
            os.set_blocking(stream.fileno(), False)

    def run(self, source: str) -> Outcome:
        """Run code until it ends or meets a limit. A script's sandbox, and one that has ended, are closed then."""
        code = source.encode(errors="surrogatepass")
        call = _Call(self._process.pid, self._pipes, len(code).to_bytes(8, "big") + code, self._limits)
        with self._running, contextlib.ExitStack() as at_end:
            at_end.callback(self.close)
            stopped = call.wait()
            if self._is_session and not (stopped or call.is_ended):
                at_end.pop_all()
            else:
                self._end()
            outcome = call.outcome(stopped)
        if self._is_session and self.is_closed and not outcome.stopped:
            return dataclasses.replace(outcome, stopped="the session has ended")
        return outcome

    def close(self) -> None:
        """End every process, from any thread; a `run` that waits for them returns. Again is no fault."""
        self._end()
        with self._running:
            for stream in self._pipes:
                stream.close()

    def _end(self) -> None:
        """Returns when all processes have ended."""
        self._process.terminate()
        self._process.wait()

    @property
    def is_closed(self) -> bool:
        """Whether there is nothing left to `run` in."""
        return self._process.poll() is not None


class _Call:
    """A script or a cell on its way: what is left to write, what has come, and since when."""

    def __init__(self, process: int, pipes: list[IO[bytes]], request: bytes, limits: Limits):
        self._process, self._limits, self._request = process, limits, memoryview(request)
        self._requests, self._printed, self._messages = pipes
        self._ends_at, self._has_begun = time.monotonic() + _START_SECONDS, False
        self._looks_at = 0.0
        self._output, self._said = _CutOutput(limits.output_bytes), b""
        self.is_ended = False

    def wait(self) -> str | None:
        """Until the code has ended: None, or the limit that it has met."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._requests, selectors.EVENT_WRITE, self._write)
            selector.register(self._printed, selectors.EVENT_READ, self._read)
            selector.register(self._messages, selectors.EVENT_READ, self._listen)
            while not (self.is_ended or b"done\n" in self._said):
                for key, _ in selector.select(_LOOK_SECONDS):
                    if not key.data():
                        selector.unregister(key.fileobj)
                if limit := self._limit_met():
                    return limit
        return None

    def _limit_met(self) -> str | None:
        now = time.monotonic()
        if now >= self._ends_at:
            seconds = self._limits.seconds if self._has_begun else _START_SECONDS
            return f"stopped after {seconds:g} seconds"
        if now >= self._looks_at:
            self._looks_at = now + _LOOK_SECONDS
            if held_bytes(self._process) > self._limits.memory_bytes:
                return f"stopped: its processes held more than {self._limits.memory_bytes >> 20:,} MiB of memory"
        return None

    def outcome(self, stopped: str | None) -> Outcome:
        """What has come, and the rest that lies in the pipes."""
        for _ in range(_LAST_READS):
            if not self._read():
                break
        while self._listen():
            pass
        said = dict(line.split(": ", 1) for line in self._said.decode(errors="replace").splitlines() if ": " in line)
        if "signal" in said and not stopped:
            stopped = _meaning_of(said["signal"], self._limits)
        return Outcome(self._output.text(), stopped, one_line(said["failed"]) if "failed" in said else None)

    # Each of these is called when its pipe is ready, and says whether to go on with it.

    def _write(self) -> bool:
        try:
            self._request = self._request[self._requests.write(self._request) or 0 :]
        except BrokenPipeError:  # it has ended without reading, which the other pipes say
            return False
        return bool(self._request)

    def _read(self) -> bool:
        data = self._printed.read(_READ_BYTES)
        self._output.add(data or b"")
        return bool(data)

    def _listen(self) -> bool:
        data = self._messages.read(_MESSAGE_BYTES)
        self.is_ended = self.is_ended or data == b""
        self._said = (self._said + (data or b""))[-_MESSAGE_BYTES:]
        if not self._has_begun and b"begun\n" in self._said:
            self._ends_at, self._has_begun = time.monotonic() + self._limits.seconds, True
        return bool(data)


class _CutOutput:
    """The first and the last bytes of an output of any length."""

    def __init__(self, limit: int):
        self._half, self._first, self._last, self._count = max(1, limit // 2), bytearray(), bytearray(), 0

    def add(self, data: bytes) -> None:
        """Take more of it; never more than a read and both halves is held."""
        self._count += len(data)
        room = self._half - len(self._first)
        self._first += data[:room]
        self._last += data[room:]
        del self._last[: -self._half]

    def text(self) -> str:
        """All of it, or both ends and how much was left out between them; what is no UTF-8 is replaced."""
        left_out = self._count - len(self._first) - len(self._last)
        if not left_out:
            return (self._first + self._last).decode(errors="replace")
        middle = f"\n[... {left_out:,} bytes of output left out ...]\n"
        return f"{self._first.decode(errors='replace')}{middle}{self._last.decode(errors='replace')}"


def check(limits: Limits, packages: Path | None = None) -> None:
    """Starts a sandbox and ends it, to know that there can be one.

    Raises:
        GptossError: there can be none, and why.
    """
    if sys.platform != "linux":
        raise GptossError(f"the python tool needs Linux for its sandbox, and this is {sys.platform}")
    if packages is not None and not packages.is_dir():
        raise GptossError(f"packages is {one_line(str(packages))}, expected a folder (pip install --target FOLDER ...)")
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        raise GptossError(
            "the python tool limits memory by /proc/PID/task/TID/children, which this kernel does not have"
        )
    patient = dataclasses.replace(limits, seconds=max(limits.seconds, _START_SECONDS))
    sandbox = Sandbox(patient, is_session=False, packages=packages)
    outcome = sandbox.run("import os\nos.path.exists('/packages') and os.listdir('/packages')\nprint('ready')")
    if outcome == Outcome("ready\n"):
        return
    last_line = (outcome.text.splitlines() or ["it says nothing"])[-1]
    reason = outcome.broken or outcome.stopped or one_line(last_line)
    raise GptossError(
        f"the python tool runs code in a sandbox only, and there can be none here: {reason}"
        + (_WHAT_IT_TAKES if outcome.broken else "")
    )


def held_bytes(process: int) -> int:
    """Memory of a process and its descendants that no file stands for; pages that forks share count in each."""
    held, waiting = 0, [process]
    while waiting:
        process = waiting.pop()
        with contextlib.suppress(OSError):  # it has ended meanwhile
            status = Path(f"/proc/{process}/status").read_text()
            held += sum(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(_HELD))
            for task in os.listdir(f"/proc/{process}/task"):
                waiting += map(int, Path(f"/proc/{process}/task/{task}/children").read_text().split())
    return held


def _meaning_of(name: str, limits: Limits) -> str:
    if name == "SIGXCPU":
        return f"stopped after {limits.cpu_seconds:,} seconds of CPU time"
    return f"ended by {one_line(name)}"


def _python() -> str:
    """The interpreter itself, not a virtual environment's name of it."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _plan(limits: Limits, is_session: bool, packages: Path | None) -> dict[str, Any]:
    """What `launcher` is to do: `shown` and `links` at their own paths, `shown_as` elsewhere, `hidden` empty."""
    base, stdlib = Path(os.path.realpath(sys.base_prefix)), Path(os.path.realpath(sysconfig.get_path("stdlib")))
    folders = [path for path in map(Path, (*_LIBRARIES, base / "lib", base / "lib64", stdlib)) if path.is_dir()]
    shown = {path for path in folders if not path.is_symlink()}
    outermost = [path for path in shown if not shown & set(path.parents)]
    files = [path for path in (_python(), "/etc/ld.so.cache") if os.path.isfile(path)]
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packaged = (stdlib / "site-packages", base / "lib" / version / "dist-packages", Path(_DISTRIBUTION_PACKAGES))
    code = Path(__file__).with_name("inside.py").read_text()
    return {
        "shown": [*sorted(map(str, outermost)), *files],
        "links": {str(path): os.readlink(path) for path in folders if path.is_symlink()},
        "shown_as": {} if packages is None else {os.path.realpath(packages): "/packages"},
        "hidden": sorted({str(path) for path in packaged if path.is_dir() and not path.is_symlink()}),
        "disk_bytes": int(limits.disk_bytes),
        "limits": {
            "RLIMIT_AS": int(limits.memory_bytes),
            "RLIMIT_CPU": int(limits.cpu_seconds),
            "RLIMIT_FSIZE": int(limits.disk_bytes),
            "RLIMIT_NPROC": int(limits.processes),
            "RLIMIT_NOFILE": _OPEN_FILES,
            "RLIMIT_CORE": 0,
            "RLIMIT_MSGQUEUE": 0,
            "RLIMIT_MEMLOCK": 0,
        },
        "filter": seccomp.program().hex(),
        "pivot_root": seccomp.pivot_root_number(),
        "command": [_python(), "-I", "-S", "-B", "-X", "utf8", "-c", code, "session" if is_session else "script"],
    }
