"""Measures the server under load: what HTTP costs beside the engine alone, then many connections, some of which break.

    python -m benchmarks.serve
    python -m benchmarks.serve --minutes 10 --connections 64 --slots 16

A server of the checkpoint (left out: of the package's demo model) runs in a process of its own, and so do its clients,
each connection asking for one answer after another. Three phases:

1. alone: each of --requests different requests by itself, over HTTP; prompts and answers are of mixed lengths, and no
   answer stops early.
2. pace: the same requests, --slots of them at a time: first through the engine alone, in this process, then over HTTP,
   streamed, as often as --rounds says, in turns. The overhead is the median of the rounds' ratios, less one: of the
   clock's seconds, and of the CPU time of engine and server, which other work on a busy machine changes less. Clients
   take their share of the clock's seconds where cores are few. With --llama-server (the program, or "wheel": the one in
   xllamacpp) llama.cpp's server of the same weights takes its turn in each round, asked by the same clients.
3. load: --connections of them for --minutes, streamed or not at random; one in --breaks leaves somewhere in the middle.
   Among the requests are --structured times as many conversations under a schema, a response format or a function that
   has to be called: what they give is looked at with jsonschema, unless its limit cut it. Every answer that is not
   broken off is compared with the same request's alone, character by character and log probability by log probability.
   In the end nothing may run or wait, all pages of the cache must be free, and the
   server's memory may not have grown after the first third by more than --leak-mib. With --minutes 0 there is neither
   this phase nor the first.

It fails if an answer is lost, differs or breaks its schema, or something leaks.
"""

import concurrent.futures
import http.client
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from absl import flags

from benchmarks import llama_wheel, serve_requests, write_gguf
from benchmarks.peers import LlamaServer
from benchmarks.serve_requests import STRUCTURED_TOKENS, Asked, Ended
from gptoss_jax.api import completions
from gptoss_jax.api.asked import Options
from gptoss_jax.checkpoints.export import open_export
from gptoss_jax.checkpoints.orbax.manifest import MANIFEST
from gptoss_jax.cli import command
from gptoss_jax.engine.engine import Engine
from gptoss_jax.engine.request import EngineConfig
from gptoss_jax.errors import GptossError
from gptoss_jax.harmony.tokenizer import load_tokenizer
from gptoss_jax.runtime import demo_model, loading
from gptoss_jax.runtime.answers import as_they_end

_DIRECT = {"http_proxy": "", "https_proxy": "", "all_proxy": ""}


# ---- over HTTP ----


class Client:
    """One connection, which asks for one answer after another.

    Attributes:
        first_seconds: until the first line of the last answer came.
    """

    def __init__(self, port: int, *, keeps: bool = True):
        """`keeps` its connection between requests: llama-server closes it after a stream, and does not say so."""
        self._port, self._keeps, self.first_seconds = port, keeps, 0.0
        self._connection: http.client.HTTPConnection | None = None

    def ask(self, asked: Asked, *, stream: bool = False, leaves_after: float | None = None) -> Ended | None:
        """The answer; None where the client has left, `leaves_after` seconds."""
        self._connection = self._connection or http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        sent, began = json.dumps(asked.body | {"stream": stream}), time.perf_counter()
        self._connection.request("POST", asked.path, sent, {"Content-Type": "application/json"})
        if leaves_after is not None:
            time.sleep(leaves_after)
            self.close()
            return None
        response = self._connection.getresponse()
        data = response.readline()  # of a stream, its first event
        self.first_seconds = time.perf_counter() - began
        data += response.read()
        if not self._keeps:
            self.close()
        if response.status != 200:
            raise GptossError(f"status {response.status}: {data[:300].decode()}")
        return serve_requests.answer(data, streamed=stream)

    def close(self) -> None:
        """Leaves, whatever is under way."""
        if self._connection:
            self._connection.close()
        self._connection = None


def _metrics(port: int) -> dict[str, float]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    lines = [line for line in connection.getresponse().read().decode().splitlines() if not line.startswith("#")]
    connection.close()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


@contextmanager
def _server(options: flags.FlagValues, checkpoint: Path, context_tokens: int) -> Iterator[tuple[int, int]]:
    """A server's port and its process' number."""
    arguments = ["--checkpoint", checkpoint, "--port", 0, "--slots", options.slots, "--queue", options.connections]
    arguments += ["--max-context-tokens", context_tokens]
    command_line = [sys.executable, "-m", "gptoss_jax.serve", *map(str, arguments)]
    process = subprocess.Popen(command_line, stderr=subprocess.PIPE, text=True, env=os.environ | _DIRECT)
    said: list[str] = []
    try:
        for line in process.stderr or ():
            said.append(line)
            if found := re.search(r"serving .*:(\d+)/v1", line):
                yield int(found[1]), process.pid
                return
        raise GptossError(f"the server did not start: {' '.join(said)}")
    finally:
        process.terminate()
        process.wait(60)


def _cpu_seconds(pid: int) -> float:
    """CPU time of a process, all of its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _overhead(seconds: dict[str, list[float]]) -> float:
    ratios = [http / bare for http, bare in zip(seconds["http"], seconds["engine"], strict=True)]
    return round(statistics.median(ratios) - 1, 4)


def _rss_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


# ---- phases ----


def _over_http(port: int, asked: Sequence[Asked], connections: int, *, keeps: bool = True) -> tuple[float, list[float]]:
    """Seconds for all of them, so many at a time, streamed, and until the first token of each."""
    clients = [Client(port, keeps=keeps) for _ in range(connections)]
    idle, first = list(clients), list[float]()

    def ask(one: Asked) -> None:
        client = idle.pop()
        client.ask(one, stream=True)
        first.append(client.first_seconds)
        idle.append(client)

    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(connections) as pool:
        list(pool.map(ask, asked))
    seconds = time.perf_counter() - began
    for client in clients:
        client.close()
    return seconds, first


@contextmanager
def _llama_server(options: flags.FlagValues, checkpoint: Path, context_tokens: int) -> Iterator[int | None]:
    """llama.cpp's server of the same weights, if it is asked for: its port."""
    if not options.llama_server:
        yield None
        return
    program = None if options.llama_server == "wheel" else Path(options.llama_server)
    reason = write_gguf.missing() or (llama_wheel.missing() if program is None else None)
    if reason:
        raise GptossError(f"--llama-server: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        published, gguf = checkpoint, Path(folder) / "model.gguf"
        if (checkpoint / MANIFEST).exists():
            published = Path(folder) / "published"
            open_export(checkpoint).run(published)
        write_gguf.write(gguf, write_gguf.published(published), "bf16")
        server = LlamaServer(program, gguf, options.llama_threads, options.slots, context_tokens)
        with server.running() as address:
            yield int(address.rpartition(":")[2])


def _of_llama(asked: Asked) -> Asked:
    """The same request as llama-server takes it: an answer as long, drawn at the same temperature."""
    body = {name: asked.body[name] for name in ("prompt", "max_tokens", "seed")}
    samplers = {"samplers": ["temperature"], "temperature": 1.0, "ignore_eos": True}
    return Asked(asked.path, body | samplers)


def _engine_alone(engine: Any, asked: Sequence[Asked]) -> float:
    """Seconds for the same through an engine without HTTP, text included."""
    tokenizer = load_tokenizer()
    pairs = []
    for each in asked:
        made = completions.ask(each.body, Options()).requests(tokenizer, engine.config.stop_ids)
        pairs += zip(*made, strict=True)
    began = time.perf_counter()
    for _ in as_they_end(engine, pairs):
        pass
    return time.perf_counter() - began


def _under_load(
    options: flags.FlagValues, port: int, pid: int, asked: Sequence[Asked], alone: Sequence[Ended]
) -> dict[str, Any]:
    """Many connections for some minutes; counts what was answered, broken off, lost and different."""
    until = time.monotonic() + 60 * options.minutes
    counts = {"answered": 0, "left": 0, "structured": 0, "cut": 0, "invalid": 0, "different": 0, "lost": 0}
    memory: list[float] = []

    def connection(number: int) -> dict[str, int]:
        draw, client, found = random.Random(number), Client(port), dict.fromkeys(counts, 0)
        while time.monotonic() < until:
            at = draw.randrange(len(asked))
            leaves = draw.random() < 1 / options.breaks
            try:
                ended = client.ask(
                    asked[at], stream=draw.random() < 0.5, leaves_after=3 * draw.random() ** 2 if leaves else None
                )
            except (GptossError, OSError, http.client.HTTPException) as error:
                print(f"lost: {error}", file=sys.stderr)
                found["lost"] += 1
                client.close()
                continue
            found["left" if leaves else "answered"] += 1
            if ended is not None:
                found["different"] += ended != alone[at]
                found["structured"] += asked[at].schema is not None
                found["cut"] += asked[at].schema is not None and ended.reason == "length"
                found["invalid"] += not serve_requests.is_valid(asked[at], ended)
        client.close()
        return found

    with concurrent.futures.ThreadPoolExecutor(options.connections) as pool:
        futures = [pool.submit(connection, number) for number in range(options.connections)]
        while time.monotonic() < until:
            memory.append(_rss_mib(pid))
            time.sleep(min(1.0, 6 * options.minutes))
        for future in futures:
            for name, count in future.result().items():
                counts[name] += count
    deadline = time.monotonic() + 1.0  # in which slots of those that left have to be free
    while (after := _metrics(port))["gptoss_running"] + after["gptoss_waiting"] and time.monotonic() < deadline:
        time.sleep(0.02)
    third = max(memory[: max(1, len(memory) // 3)])
    return counts | {
        "slots_leaked": int(after["gptoss_running"] + after["gptoss_waiting"]),
        "pages_leaked": int(after["gptoss_pages"] - after["gptoss_free_pages"]),
        "rss_mib_first_third": round(third, 1),
        "rss_mib_end": round(_rss_mib(pid), 1),
        "prefix_hit_rate": round(after["gptoss_prefix_hit_rate"], 4),
    }


def measure(options: flags.FlagValues, checkpoint: Path) -> dict[str, Any]:
    """All phases."""
    model = loading.load(checkpoint)
    asked = serve_requests.of_ids(options.requests, options.scale, model.config.num_token_ids)
    held = serve_requests.structured(round(options.requests * options.structured), options.scale)
    context_tokens = max(len(each.body["prompt"]) + each.body["max_tokens"] for each in asked) + 1
    context_tokens = max(context_tokens, STRUCTURED_TOKENS) if held else context_tokens
    engine = model.engine(EngineConfig(slots=options.slots, max_context_tokens=context_tokens))
    with _server(options, checkpoint, context_tokens) as (port, pid):
        alone = _alone(port, [*asked, *held]) if options.minutes else []
        with _llama_server(options, checkpoint, context_tokens) as llama_port:
            figures = _pace(options, engine, asked, port, pid, llama_port)
        return figures | (_under_load(options, port, pid, [*asked, *held], alone) if options.minutes else {})


def _alone(port: int, asked: Sequence[Asked]) -> list[Ended]:
    """Each request's answer, while nothing else runs."""
    client = Client(port)
    found = [client.ask(each) for each in asked]
    client.close()
    return [ended for ended in found if ended is not None]


def _pace(
    options: flags.FlagValues, engine: Engine, asked: Sequence[Asked], port: int, pid: int, llama_port: int | None
) -> dict[str, Any]:
    """The same requests through the engine alone, over HTTP, and through llama-server where it runs, in turns."""
    seconds: dict[str, list[float]] = {"engine": [], "http": []}
    cpu_seconds: dict[str, list[float]] = {"engine": [], "http": []}
    first: dict[str, list[float]] = {"http": []}
    of_llama = [_of_llama(each) for each in asked]
    if llama_port is not None:
        seconds["llama-server"], first["llama-server"] = [], []
        _over_http(llama_port, of_llama[: options.slots], options.slots, keeps=False)  # what is done once is done
    _engine_alone(engine, asked)  # which finds prompts in its cache from then on, as the server does
    _over_http(port, asked, options.slots)
    for _ in range(options.rounds):
        began = time.process_time()
        seconds["engine"].append(_engine_alone(engine, asked))
        cpu_seconds["engine"].append(time.process_time() - began)
        began = _cpu_seconds(pid)
        took, waited = _over_http(port, asked, options.slots)
        cpu_seconds["http"].append(_cpu_seconds(pid) - began)
        seconds["http"].append(took)
        first["http"] += waited
        if llama_port is not None:
            took, waited = _over_http(llama_port, of_llama, options.slots, keeps=False)
            seconds["llama-server"].append(took)
            first["llama-server"] += waited
        print(", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items()), flush=True)
    overhead, cpu_overhead = _overhead(seconds), _overhead(cpu_seconds)
    print(
        f"HTTP beside the engine alone, {options.slots} answers at a time: {100 * overhead:+.1f} % of the clock's "
        f"time, {100 * cpu_overhead:+.1f} % of CPU time (medians of {options.rounds} rounds)",
        flush=True,
    )
    tokens = sum(each.body["max_tokens"] for each in asked)
    return {
        "tokens": tokens,
        "tokens_per_second": {name: round(tokens / statistics.median(took), 1) for name, took in seconds.items()},
        "first_token_seconds": {name: round(statistics.median(waited), 4) for name, waited in first.items()},
        "overhead": overhead,
        "cpu_overhead": cpu_overhead,
    }


# ---- the command ----


def define_flags() -> None:
    """This command's flags."""
    flags.DEFINE_string("checkpoint", None, "FOLDER: A checkpoint; left out: the package's demo model.")
    flags.DEFINE_integer("slots", 16, "Answers that are drawn at once.", lower_bound=1)
    flags.DEFINE_integer("connections", 64, "Connections under load.", lower_bound=1)
    flags.DEFINE_integer("requests", 64, "Different requests.", lower_bound=1)
    flags.DEFINE_float("structured", 0.5, "X: Requests under a schema, for each other one.", lower_bound=0.0)
    flags.DEFINE_integer("rounds", 5, "Measurements of the pace, of which the median counts.", lower_bound=1)
    flags.DEFINE_string("llama_server", None, "PROGRAM: llama-server, to run beside it; or: wheel (xllamacpp).")
    flags.DEFINE_integer("llama_threads", os.cpu_count() or 1, "N: Its threads, which spin.", lower_bound=1)
    flags.DEFINE_float("minutes", 2.0, "X: Time under load; 0: the pace alone.", lower_bound=0.0)
    flags.DEFINE_float("breaks", 5.0, "X: One request in so many is broken off.", lower_bound=1.0)
    flags.DEFINE_float("scale", 1.0, "X: Lengths are multiplied by it.", lower_bound=0.001)
    flags.DEFINE_float("leak_mib", 64.0, "X: Growth of memory after the first third that is no leak.", lower_bound=0.0)


def main(arguments: list[str]) -> None:
    """Prints a line for each round, one for the overhead, then all figures as one line of JSON."""
    if arguments:
        raise GptossError(f"{arguments[0]}: expected flags only")
    options, load_average = flags.FLAGS, os.getloadavg()[0]
    figures = measure(options, Path(options.checkpoint or demo_model.folder()))
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}",
        "load_average_before": round(load_average, 2),
        **{name: options[name].value for name in ("slots", "connections", "requests", "minutes", "rounds")},
    }
    print(json.dumps(about | figures))
    if not options.minutes:
        return
    grown = figures["rss_mib_end"] - figures["rss_mib_first_third"] > options.leak_mib
    faults = ("lost", "different", "invalid", "slots_leaked", "pages_leaked")
    if grown or any(figures[name] for name in faults):
        raise GptossError("an answer was lost, differs or breaks its schema, or something leaks: see the figures")


if __name__ == "__main__":
    define_flags()
    command.run(main, "serve")
