"""The export command: what it says, how it ends, and that no kill, full disk or mistake leaves half a folder."""

import errno
import hashlib
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from converters import convert
from converters.random_checkpoint import with_vocab_size, write_checkpoint
from gptoss_jax.checkpoints.orbax.manifest import partial_folder
from tests import processes

ROOT = Path(__file__).parents[2]
TINY = json.loads((ROOT / "configs" / "tiny.json").read_text())
TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
SMALL: dict[str, Any] = with_vocab_size(TINY, 512) | TWO_LAYERS


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A published model in several files; `checkpoint` beside it is what it was converted to."""
    folder = tmp_path_factory.mktemp("models") / "published"
    write_checkpoint(folder, SMALL, shard_bytes=250_000)
    convert.run(convert.Options(folder, folder.with_name("checkpoint")))
    return folder


@pytest.fixture(scope="module")
def checkpoint(source) -> Path:
    """The converted model, for reading only."""
    return source.with_name("checkpoint")


def export(*arguments: object, **options: Any) -> processes.Done:
    """The command, in a process of its own."""
    return processes.run("converters.export", *arguments, **options)


def refusals(*arguments: object, **options: Any) -> list[str]:
    """The lines on stderr of a command that must end with exit code 2, and print nothing else there."""
    done = export(*arguments, **options)
    assert done.returncode == 2, done
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("writing: ", "verifying: "))]
    assert all(line.startswith("export: ") for line in lines), lines
    return [line.removeprefix("export: ") for line in lines]


def hashes(folder: Path) -> dict[str, str]:
    """File -> sha256."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_way_there_and_back(source, checkpoint, tmp_path):
    """Guards the whole command: the same files as the source's, said so, and read again by convert."""
    done = export(checkpoint, tmp_path / "out", "--verify")
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first == f"{checkpoint}: to format Hugging Face, MXFP4 experts, 5 safetensors files as the source's"
    assert re.fullmatch(r".*/out: 8 files, 41 tensors, [\d,]+ bytes, [\d.]+ s", second)
    assert third == f"{tmp_path / 'out'}: verified: all 5 safetensors files equal the source's by sha256"
    assert re.search(r"^writing: [\d.]+ MB of [\d.]+ MB \(100 %\), [\d,]+ MB/s$", done.stderr, re.M)
    assert hashes(tmp_path / "out") == hashes(source)
    again = processes.run("converters.convert", tmp_path / "out", checkpoint)
    assert again.returncode == 0 and "finished already, from this very source" in again.stdout


def test_formats_and_shards(checkpoint, tmp_path):
    """Guards --format and --shard-gb against having no effect."""
    done = export(checkpoint, tmp_path / "bf16", "--format", "bf16", "--verify")
    assert done.returncode == 0
    assert done.stdout.endswith("bf16: verified: all 41 leaves, 950,836 bytes, equal the checkpoint's\n")
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    done = export(checkpoint, tmp_path / "openai", "--format=openai", "--shard-gb", "0.0003")
    assert done.returncode == 0
    assert "note: OpenAI's config.json has no key for it: stop_ids is (510,), and () there" in done.stdout
    names = sorted(path.name for path in (tmp_path / "openai").iterdir())
    assert names[:2] == ["config.json", "dtypes.json"] and names[2].startswith("model--00001-of-0000")
    assert names[-1] == "model.safetensors.index.json"
    assert "rope_ntk_beta" in json.loads((tmp_path / "openai" / "config.json").read_text())


def test_dry_run_touches_nothing(checkpoint, tmp_path):
    """Guards against a plan that writes, or that says less than what is written."""
    done = export(checkpoint, tmp_path / "out", "--dry-run", "--format", "bf16")
    assert (done.returncode, done.stderr, list(tmp_path.iterdir())) == (0, "", [])
    assert "beside them   config.json, generation_config.json\n" in done.stdout
    planned = re.search(r"would write   37 tensors, ([\d.]+) MB, to .*out$", done.stdout, re.M)
    assert planned
    assert export(checkpoint, tmp_path / "out", "--format", "bf16").returncode == 0
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert float(planned[1]) == pytest.approx(written / 1e6, abs=1e-3)


def test_mistakes_are_one_line(source, checkpoint, tmp_path):
    """Guards every first mistake against a traceback, or a folder that is begun for it."""
    out = tmp_path / "out"
    (line,) = refusals(checkpoint)
    assert line.startswith("expected two folders, CHECKPOINT DST, got ['")
    assert refusals() == ["expected two folders, CHECKPOINT DST, got none"]
    (line,) = refusals(source, out)
    assert line.endswith("so it is no finished checkpoint; python -m converters.convert makes one")
    (line,) = refusals(tmp_path / "nothing", out)
    assert line == f"{tmp_path / 'nothing'}: no such folder"
    (line,) = refusals(checkpoint, source)
    assert line == f"{source}: exists; remove it or name another folder"
    (line,) = refusals(checkpoint, source, "--dry-run")
    assert line == f"{source}: exists; remove it or name another folder"
    (line,) = refusals(checkpoint, checkpoint / "out")
    assert line == f"DST {checkpoint / 'out'} lies in CHECKPOINT: name a folder outside of it"
    (line,) = refusals(checkpoint, out, "--format", "gguf")
    assert "--format" in line and "huggingface" in line
    for size in ("0", "-1", "nan", "1e9"):
        (line,) = refusals(checkpoint, out, f"--shard-gb={size}")
        assert line.startswith("--shard-gb is ") and "expected 0.000001 to 1,000,000" in line
    assert list(tmp_path.iterdir()) == []


def test_killed_in_the_middle_it_leaves_no_dst(source, checkpoint, tmp_path):
    """Guards against half a model under the name of a whole one, and a rerun that is stopped by what was left."""
    out = tmp_path / "out"
    for kill_at in (1, 3, 20, 45):
        done = export(checkpoint, out, prepare=_KillAt(kill_at))
        assert done.returncode == -signal.SIGKILL
        assert not out.exists() and partial_folder(out).exists(), kill_at
    assert export(checkpoint, out).returncode == 0
    assert hashes(out) == hashes(source) and list(tmp_path.iterdir()) == [out]


class _KillAt:
    """Kills the process in the middle of its write number `calls`."""

    def __init__(self, calls: int):
        self.left = calls

    def __call__(self) -> None:
        real = os.pwrite

        def pwrite(descriptor: int, content: Any, offset: int) -> int:
            self.left -= 1
            if not self.left:
                real(descriptor, content[: len(content) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(descriptor, content, offset)

        os.pwrite = pwrite


class _FullDisk(_KillAt):
    """A disk that is full at that write."""

    def __call__(self) -> None:
        real = os.pwrite

        def pwrite(descriptor: int, content: Any, offset: int) -> int:
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(descriptor, content, offset)

        os.pwrite = pwrite


class _Slow(_KillAt):
    """A disk that takes its time from that write on, in a process that hears of Ctrl-C whoever started the tests."""

    def __call__(self) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        real = os.pwrite

        def pwrite(descriptor: int, content: Any, offset: int) -> int:
            self.left -= 1
            if self.left < 0:
                time.sleep(60)
            return real(descriptor, content, offset)

        os.pwrite = pwrite


def test_a_full_disk_is_one_line(checkpoint, tmp_path):
    """Guards against a traceback, and gigabytes left on a disk that is full."""
    (line,) = refusals(checkpoint, tmp_path / "out", prepare=_FullDisk(10))
    assert line == f"{tmp_path / 'out'}: the disk is full: make room and run the same command again"
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing(checkpoint, tmp_path):
    """Guards against a traceback, and half a folder, after Ctrl-C."""

    def interrupt(process: Any) -> None:
        deadline = time.monotonic() + 60
        while not partial_folder(tmp_path / "out").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGINT)

    done = export(checkpoint, tmp_path / "out", prepare=_Slow(10), meanwhile=interrupt)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
