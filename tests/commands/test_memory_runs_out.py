"""A device whose memory is not enough, as the commands say it: what was needed, what there was, which flags help."""

from pathlib import Path

import jax
import pytest

from tests import processes
from tests.gate import TinyModel
from tests.goldens import make as golden

WORDY = golden.two_layers_config() | {"vocab_size": 201_088, "eos_token_id": 200_002, "pad_token_id": 199_999}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Random weights, published."""
    return TinyModel(WORDY).write(tmp_path_factory.mktemp("memory"))


def _exhausted(*arguments: object, **settings: object) -> None:
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 65176371200 bytes.")


def _while_loading() -> None:
    from gptoss_jax.runtime import weight_transforms

    weight_transforms.to_devices = _exhausted


def _while_compiling() -> None:
    from gptoss_jax.engine.runner import ModelRunner

    ModelRunner._compile = _exhausted  # pyright: ignore[reportAttributeAccessIssue]


def _while_decoding() -> None:
    from gptoss_jax.engine.runner import ModelRunner

    ModelRunner.decode = _exhausted  # pyright: ignore[reportAttributeAccessIssue]


def _while_training() -> None:
    from gptoss_jax.training.step import Trainer

    Trainer.open = _exhausted  # pyright: ignore[reportAttributeAccessIssue]


def _on_a_gpu() -> None:
    """A device that says what a GPU says of its memory, on which loading fails."""

    class Device:
        platform, device_kind = "gpu", "NVIDIA H100 80GB HBM3"

        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 64_100_000_000, "bytes_in_use": 1_073_741_824}

    _while_loading()
    jax.local_devices = lambda: [Device()]


@pytest.mark.parametrize("prepare", [_while_loading, _while_compiling, _while_decoding])
def test_generate(prepare, folder):
    """Guards the traceback of XLA's error, which says neither what to do nor that it was memory until its last line."""
    done = processes.run("gptoss_jax.generate", "--checkpoint", folder, "--quiet", "Hello", prepare=prepare)
    helps = "--max-context-tokens, --n, --dense int8, --mesh"
    line = f"generate: out of memory on cpu: 60.7 GiB more were needed; what helps: {helps}\n"
    assert (done.returncode, done.stdout, done.stderr.splitlines(keepends=True)[-1]) == (2, "", line)
    assert "Traceback" not in done.stderr


def test_on_a_gpu_the_share_is_said_first(folder):
    """Guards the note before weights are read, and what there was in the error."""
    done = processes.run("gptoss_jax.score", "--checkpoint", folder, "Hello there", prepare=_on_a_gpu)
    assert done.returncode == 2
    note, error = done.stderr.splitlines()
    assert note.startswith("NVIDIA H100 80GB HBM3: JAX may take 59.7 GiB of its memory (XLA_CLIENT_MEM_FRACTION=0.93)")
    assert error.startswith("score: out of memory on NVIDIA H100 80GB HBM3: 60.7 GiB more were needed, and 1.0 of 59.7")
    assert error.endswith("were in use; what helps: --max-context-tokens, --dense int8, --mesh")


def test_a_batch_job_goes_on_with_other_flags(folder, tmp_path):
    """Guards a job whose slots do not fit: one line, and with fewer of them the same command answers."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "Hello", "max_new_tokens": 2}\n')
    command = ("gptoss_jax.batch", tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--checkpoint", folder, "--quiet")
    done = processes.run(*command, prepare=_while_compiling)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "what helps: --max-context-tokens, --slots, --pool-tokens, --n, --dense int8, --mesh" in done.stderr
    assert processes.run(*command, "--slots", 2).returncode == 0


def test_a_run_of_fine_tuning_gives_its_folder_back(folder, tmp_path):
    """Guards the next try: with other flags it is another run, which would be refused in this one's folder."""
    message = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    (tmp_path / "data.jsonl").write_text(message)
    command = ["--checkpoint", folder, "--data", tmp_path / "data.jsonl", "--output", tmp_path / "run", "--quiet"]
    done = processes.run("gptoss_jax.finetune", *command, prepare=_while_training)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "what helps: --batch-rows, --row-tokens, --accumulate, --rematerialize, --mesh" in done.stderr
    assert not (tmp_path / "run").exists()
