"""Runs the sections of `benchmarks.gpu`, each in a process with a time limit, and says in the end how each ended.

Imports no JAX: a process that waits must not hold the GPU's memory.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from benchmarks.gpu import results
from benchmarks.gpu.options import OF_MODELS
from benchmarks.gpu.smoke_groups import GROUPS, NO_GRAPHS, XLA_FLAGS
from gptoss_jax.cli.mistakes import spelled
from gptoss_jax.errors import GptossError

LIMIT_SECONDS = {
    "smoke": 140,
    "limits": 90,
    "ops": 300,
    "decode": 420,
    "prefill": 240,
    "profile": 120,
    "transformers": 240,
}
NEEDS_LIMITS = ("ops", "decode", "prefill")
LEAST_SECONDS = 5  # in which nothing can be measured
POLL_SECONDS = 0.1
TAIL = 2000  # characters of what a process that failed has said


class Section(NamedTuple):
    """One process."""

    name: str
    limit_seconds: float
    environment: Mapping[str, str] = {}


class Ended(NamedTuple):
    """How it ended."""

    how: str  # "ok", "failed", "hang", "left out"
    seconds: float


def run(options: flags.FlagValues, arguments: Sequence[str]) -> int:
    """All sections that the flags ask for; gives the exit code.

    Args:
        options: the flags.
        arguments: the command line, which the sections' processes get too.

    Raises:
        GptossError: unknown groups of smoke.
    """
    plan, ends, stopped = batches(options), time.monotonic() + 60 * options.minutes, threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.out or Path(folder) / "results.jsonl").absolute()
        before = len(results.read(path))
        for line in machine():
            print(line, flush=True)
        ended: dict[str, Ended] = {}
        for batch in plan:
            patient = [each._replace(limit_seconds=options.patience * each.limit_seconds) for each in batch]
            with concurrent.futures.ThreadPoolExecutor(options.at_once) as pool:
                try:
                    ends_of = pool.map(lambda section: run_section(section, arguments, path, ends, stopped), patient)
                    ended |= dict(zip((section.name for section in batch), ends_of, strict=True))
                except KeyboardInterrupt:
                    stopped.set()
                    raise
        if not _same_tokens(path, before):
            ended["smoke/graphs"] = Ended("failed", 0)
        entries = results.read(path)[before:]
    bad = [name for name, end in ended.items() if end.how in ("failed", "hang")]
    print(f"ended badly: {', '.join(bad)}" if bad else "all sections ended well", flush=True)
    print(json.dumps(_by_kind(entries) | {"ended": {name: end.how for name, end in ended.items()}}), flush=True)
    return 1 if bad else 0


def batches(options: flags.FlagValues) -> list[list[Section]]:
    """Sections that may run beside one another (smoke's, which time nothing), and all others one by one."""
    only, plan = options.only, list[list[Section]]()
    environment = _programs(options.programs)
    if "smoke" in only:
        groups = GROUPS[options.smoke_sizes]
        if unknown := sorted(set(options.smoke_groups) - groups.keys()):
            raise GptossError(f"{spelled('smoke_groups')} {', '.join(unknown)}, expected some of {', '.join(groups)}")
        asked = [name for name in groups if name in (options.smoke_groups or groups)]
        shared = environment | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        plan.append([_section(f"smoke/{name}", shared | _told(XLA_FLAGS.get(name))) for name in asked])
    if "limits" in only or set(only) & set(NEEDS_LIMITS):
        plan.append([_section("limits", environment)])
    for model in options.models:
        for kind in (kind for kind in OF_MODELS if kind in only):
            plan.append([_section(f"{kind}/{model}", environment)])
            if kind == "profile":  # by name and duration, whatever a tracer says of launches that are one graph
                plan.append([_section(f"{kind}/{model}/launches", environment | _told(NO_GRAPHS))])
    if "transformers" in only:
        plan.append([_section("transformers", {})])
    return plan


def _section(name: str, environment: Mapping[str, str]) -> Section:
    return Section(name, LIMIT_SECONDS[name.partition("/")[0]], environment)


def _programs(folder: str | None) -> dict[str, str]:
    """JAX's cache of compiled programs, of all of them."""
    if not folder:
        return {}
    return {
        "JAX_COMPILATION_CACHE_DIR": str(Path(folder).absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }


def _told(flags: str | None) -> dict[str, str]:
    """XLA's flags, those of the user too."""
    return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()} if flags else {}


def run_section(section: Section, arguments: Sequence[str], path: Path, ends: float, stopped: threading.Event) -> Ended:
    """One of them, which its time limit or the end of all time kills; how it ended is a line of the results too."""
    limit = min(section.limit_seconds, ends - time.monotonic())
    if limit < LEAST_SECONDS or stopped.is_set():
        results.Results(path, section.name).leave_out(section.name, "no time is left")
        return Ended("left out", 0)
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments, "--section", section.name, "--out", str(path)]
    how, seconds, said = in_process(command, os.environ | dict(section.environment), limit, stopped)
    tail = "" if how == "ok" else said[-TAIL:]
    entry = {"section": section.name, "kind": "ended", "how": how, "seconds": round(seconds, 1), "tail": tail}
    results.append(path, entry)
    print("\n".join([f"==== {section.name}: {how}, {seconds:.0f} s", *tail.splitlines()]), flush=True)
    return Ended(how, seconds)


def in_process(
    command: Sequence[str], environment: Mapping[str, str], limit_seconds: float, stopped: threading.Event
) -> tuple[str, float, str]:
    """Runs a command; gives how it ended, seconds, and its stderr.

    After a while it is killed with its children, and as soon as it is `stopped`: Ctrl-C reaches this process alone.
    """
    began = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, env=environment, stderr=said, start_new_session=True)
        while process.poll() is None and time.monotonic() - began < limit_seconds and not stopped.is_set():
            time.sleep(POLL_SECONDS)
        code = process.poll()
        if code is None:
            os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it for good
                process.wait(LEAST_SECONDS)
        seconds = time.monotonic() - began
        last = f"killed after {seconds:.0f} s" if code is None else f"killed by signal {-code}" if code < 0 else ""
        said.seek(0)
        text = said.read().decode(errors="replace").rstrip()
        return "hang" if code is None else "failed" if code else "ok", seconds, f"{text}\n{last}".strip()


def machine() -> Iterator[str]:
    """What can be known of the machine without JAX: where the assembler is, which kernels need, and the GPU's state."""
    ptxas = [path for path in (shutil.which("ptxas"), "/usr/local/cuda/bin/ptxas") if path and os.path.exists(path)]
    yield f"ptxas: {', '.join(ptxas) or 'none in PATH nor in /usr/local/cuda/bin (JAX may bring one)'}"
    yield f"GPU: {gpu_state() or 'no nvidia-smi here'}"


def gpu_state() -> str | None:
    """Clocks, temperature, power and what holds the clocks down, as nvidia-smi says it; None where there is none."""
    fields = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return " | ".join(done.stdout.strip().splitlines()) if done.returncode == 0 else None


def _same_tokens(path: Path, before: int) -> bool:
    """Whether the smoke model drew the same tokens as a CUDA graph and launch by launch; said where both ran."""
    compared = [f"smoke/{name}" for name in XLA_FLAGS]
    entries = [entry for entry in results.read(path)[before:] if entry["kind"] == "drawn"]
    drawn = [entry["tokens"] for entry in entries if entry["section"] in compared]
    if len(drawn) < 2:
        return True
    same = all(tokens == drawn[0] for tokens in drawn)
    digest = hashlib.sha256(json.dumps(drawn[0]).encode()).hexdigest()[:12]
    said = f"{len(drawn)} runs of {len(drawn[0][0])} greedy tokens {'are the same' if same else 'DIFFER'} ({digest})"
    return results.Results(path, "smoke/graphs").judge({}, "with and without command buffers", said, ok=same)


def _by_kind(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in entries:
        kept = {name: value for name, value in entry.items() if name not in ("kind", "tokens")}
        found.setdefault(entry["kind"], []).append(kept)
    return found
