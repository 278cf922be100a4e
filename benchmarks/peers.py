"""llama.cpp and transformers, run as they would run by themselves: tokens per second of one prefill or some steps.

Each call is one measurement, so that a benchmark can take them in turns with its own. Both fill their caches by
prefill, which is why nobody wants them at 131,072 tokens.
"""

# pyright: reportMissingImports=false
# (torch and transformers are installed by `make gates` alone, and looked for where they are asked for)

import concurrent.futures
import contextlib
import functools
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptoss_jax.errors import GptossError
from gptoss_jax.model.config import ModelConfig, to_huggingface


class Llama(NamedTuple):
    """llama.cpp's own benchmarks on one file, in a process per measurement.

    Attributes:
        bench: llama-bench.
        batched_bench: llama-batched-bench, for more than one sequence, or None.
        model: the GGUF file.
        threads: how many it may use.
        huge_pages: whether weights are read into pages of 2 MiB (by glibc's tunable) in place of its default, a mapping
            of the file and a repacked copy.
    """

    bench: Path
    batched_bench: Path | None
    model: Path
    threads: int
    huge_pages: bool

    @property
    def name(self) -> str:
        """What tables call it."""
        return "llama.cpp, huge pages" if self.huge_pages else "llama.cpp"

    def decode(self, sequences: int, context_tokens: int, steps: int) -> float:
        """Tokens per second of all sequences together."""
        if sequences == 1:
            return self._bench("-p", 0, "-n", steps, "-d", context_tokens)
        return self._batched(sequences, context_tokens, steps)["speed_tg"]

    def prefill(self, sequences: int, tokens: int) -> float:
        """Tokens per second of all sequences together."""
        return self._bench("-p", tokens, "-n", 0) if sequences == 1 else self._batched(sequences, tokens, 1)["speed_pp"]

    def can_run(self, sequences: int) -> bool:
        """Whether there is a program for so many sequences."""
        return sequences == 1 or self.batched_bench is not None

    def _bench(self, *arguments: Any) -> float:
        mapping = ["-lm", "none"] if self.huge_pages else []
        command = [self.bench, "-r", 1, "-o", "json", *self._common(), *mapping, *arguments]
        return json.loads(self._run(command))[0]["avg_ts"]

    def _batched(self, sequences: int, prompt: int, steps: int) -> dict[str, float]:
        sizes = ["-npl", sequences, "-npp", prompt, "-ntg", steps, "-c", sequences * (prompt + steps + 32)]
        mapping = ["--load-mode", "none"] if self.huge_pages else []
        command = [self.batched_bench, "--output-format", "jsonl", *self._common(), *mapping, *sizes]
        lines = [line for line in self._run(command).splitlines() if line.startswith("{")]
        return json.loads(lines[-1])

    def _common(self) -> list[Any]:
        return ["-m", self.model, "-t", self.threads]

    def _run(self, command: list[Any]) -> str:
        tunables = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if self.huge_pages else {}
        arguments = [str(argument) for argument in command]
        done = subprocess.run(arguments, env=os.environ | tunables, capture_output=True, text=True)
        if done.returncode:
            raise GptossError(f"{' '.join(arguments)}: exit code {done.returncode}: {done.stderr.strip()[-500:]}")
        return done.stdout


class LlamaServer(NamedTuple):
    """llama.cpp's server, in a process per measurement, with continuous batching over parallel slots.

    Attributes:
        program: llama-server; None: the one in the wheel xllamacpp.
        model: the GGUF file.
        threads: how many it may use.
        slots: sequences at once.
        context_tokens: of each slot.
    """

    program: Path | None
    model: Path
    threads: int
    slots: int
    context_tokens: int

    def seconds(self, rows: Sequence[tuple[Sequence[int], int]], *, cache_prompt: bool) -> float:
        """Seconds until the last answer has come to rows of a prompt and the length of its answer, all asked at once.

        `cache_prompt`: whether a prompt may go on from what its slot holds.
        """
        with self.running() as address, concurrent.futures.ThreadPoolExecutor(len(rows)) as callers:
            self._answer(address, ([1, 2, 3], 2), cache_prompt=False)  # what is done once is done
            began = time.perf_counter()
            drawn = list(callers.map(functools.partial(self._answer, address, cache_prompt=cache_prompt), rows))
            seconds = time.perf_counter() - began
        if drawn != [tokens for _, tokens in rows]:
            raise GptossError("llama-server: answers of other lengths than were asked for")
        return seconds

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """Its address, while it runs; weights in huge pages, as `Llama`."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        sizes = ["-np", self.slots, "-c", self.slots * (self.context_tokens + 8), "-t", self.threads]
        program = (
            [self.program]
            if self.program
            else [sys.executable, "-c", "from benchmarks import llama_wheel; llama_wheel.main()"]
        )
        command = [*program, "-m", self.model, "--load-mode", "none", "--host", "127.0.0.1", "--port", port, *sizes]
        environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        process = subprocess.Popen(
            list(map(str, command)), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            address = f"http://127.0.0.1:{port}"
            while not self._is_ready(address):
                if process.poll() is not None:
                    raise GptossError(f"{self.program or 'xllamacpp'}: exit code {process.returncode} while it started")
                time.sleep(0.2)
            yield address
        finally:
            process.kill()
            process.wait()

    def _is_ready(self, address: str) -> bool:
        with contextlib.suppress(OSError), _DIRECT.open(f"{address}/health", timeout=5) as reply:
            return reply.status == 200
        return False

    def _answer(self, address: str, row: tuple[Sequence[int], int], *, cache_prompt: bool) -> int:
        """Tokens of an answer."""
        prompt, tokens = row
        asked = {
            "prompt": list(prompt),
            "n_predict": tokens,
            "ignore_eos": True,
            "cache_prompt": cache_prompt,
            "samplers": ["temperature"],
            "temperature": 1.0,
        }
        request = urllib.request.Request(
            f"{address}/completion", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with _DIRECT.open(request) as reply:
            return json.load(reply)["tokens_predicted"]


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy knows no 127.0.0.1


class Transformers:
    """Hugging Face's model in bfloat16, experts dequantised as it does on CPUs, on random weights of its own.

    Its weights are its own since time does not depend on their values; one sequence at a time.
    """

    name = "transformers"

    def __init__(self, config: ModelConfig, threads: int, device: str = "cpu"):
        import torch
        import transformers

        torch.set_num_threads(threads)
        self._torch, self._cache = torch, transformers.DynamicCache
        settings = transformers.GptOssConfig.from_dict(to_huggingface(config))
        with torch.no_grad():
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.bfloat16)
            with torch.device(device):
                self._model = transformers.GptOssForCausalLM(settings).eval()
            torch.set_default_dtype(before)
        self._device = device
        self._vocab_size = config.vocab_size

    @staticmethod
    def why_not(device: str = "cpu") -> str | None:
        """Why it cannot run on `device` here, or None."""
        missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
        if missing:
            return f"{' and '.join(missing)} not installed"
        import torch

        return "torch sees no GPU" if device == "cuda" and not torch.cuda.is_available() else None

    def can_run(self, sequences: int) -> bool:
        """Whether it runs so many sequences here."""
        return sequences == 1

    def prefill(self, sequences: int, tokens: int) -> float:
        """Tokens per second."""
        del sequences
        return tokens / self._prefill(tokens)[0]

    def decode(self, sequences: int, context_tokens: int, steps: int) -> float:
        """Tokens per second."""
        del sequences
        cache = self._prefill(context_tokens)[1]
        token = self._torch.zeros((1, 1), dtype=self._torch.long, device=self._device)
        int(self._step(token, cache))  # allocates
        began = time.perf_counter()
        for _ in range(steps):
            token = self._step(token, cache)
        int(token)  # waits for the device
        return steps / (time.perf_counter() - began)

    def _prefill(self, tokens: int) -> tuple[float, Any]:
        ids = self._torch.randint(0, self._vocab_size, (1, tokens), device=self._device)
        cache = self._cache(config=self._model.config)
        began = time.perf_counter()
        int(self._step(ids, cache))  # waits for the device
        return time.perf_counter() - began, cache

    def _step(self, ids: Any, cache: Any) -> Any:
        with self._torch.no_grad():
            logits = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            return logits[:, -1:].argmax(-1)
