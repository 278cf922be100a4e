"""llama.cpp's server out of the wheel xllamacpp, with the flags that `peers.LlamaServer` gives to llama-server.

`peers.LlamaServer` runs `main` in a process of its own; it serves until it is killed.
"""

import argparse
import importlib
import importlib.util
import signal


def missing() -> str | None:
    """Why it cannot run here, or None."""
    return None if importlib.util.find_spec("xllamacpp") else "the wheel xllamacpp is not installed"


def main() -> None:
    """Serves, by the flags of the process."""
    parser = argparse.ArgumentParser()
    for flag, kind in (("-m", str), ("--host", str), ("--port", int), ("-np", int), ("-c", int), ("-t", int)):
        parser.add_argument(flag, type=kind, required=True)
    parser.add_argument("--load-mode")  # the wheel has no such choice
    given = parser.parse_args()
    xllamacpp = importlib.import_module("xllamacpp")
    options = xllamacpp.CommonParams()
    options.model.path, options.hostnames, options.port = given.m, [given.host], given.port
    options.n_parallel, options.n_ctx, options.cpuparams.n_threads = given.np, given.c, given.t
    options.n_gpu_layers, options.verbosity, options.warmup = 0, 0, False
    server = xllamacpp.Server(options)
    print(f"serving at {server.listening_address}", flush=True)
    signal.pause()
