"""Prints the wheels that compile for GPUs and TPUs on a machine without them, one a line, for the JAX that is here.

    python -m benchmarks.compilers

The CUDA ones are a tenth of what `jax[cuda13]` brings: no library that only a GPU could run.
"""

import importlib.metadata
import re

from gptoss_jax.cli import command


def wheels() -> list[str]:
    """What pip is to install, without dependencies."""
    version = importlib.metadata.version("jax")
    wanted = importlib.metadata.requires("jax") or []
    libtpu = next(line for line in wanted if re.match(r"libtpu\b", line) and "extra" in line)
    cuda = [f"jax-cuda13-{part}=={version}" for part in ("plugin", "pjrt")]
    return [libtpu.split(";")[0].replace(" ", ""), *cuda, "nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-nvdisasm"]


def main(arguments: list[str]) -> None:
    """Prints them."""
    del arguments
    print("\n".join(wheels()))


if __name__ == "__main__":
    command.run(main, "compilers")
