"""--ray before anything runs: what is missing, and what cannot be meant. Jobs on Ray are in tests/live/test_ray.py."""

import sys

import pytest

from tests import processes


def without_ray() -> None:
    """Importing it fails, as where it is not installed."""
    sys.modules["ray"] = None  # pyright: ignore[reportArgumentType]  (what Python takes for that)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--ray"], "--ray needs the package ray: pip install 'gptoss-jax[ray]'"),
        (["--ray", "--shard", "0/2"], "--ray and --shard: leave one of them out"),
        (["--ray", "--merge"], "--ray and --merge: leave one of them out"),
        (["--ray", "--coordinator", "host:1"], "--ray and --coordinator: leave one of them out"),
        (["--ray", "--tool", "python"], "--ray and --tool: leave one of them out"),
        (["--ray-workers", "2"], "--ray-workers has an effect with --ray only: give both"),
        (["--ray-address", "host:1"], "--ray-address has an effect with --ray only: give both"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_line(options, expected):
    """Guards people without Ray, who get a traceback or an import of 590 MB, and flags without an effect."""
    done = processes.run("gptoss_jax.batch", "in.jsonl", "out.jsonl", *options, prepare=without_ray)
    assert (done.returncode, done.stderr) == (2, f"batch: {expected}\n")
