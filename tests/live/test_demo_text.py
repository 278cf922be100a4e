"""The demo model's text as transformers writes it: the whole way from our checkpoint to another program."""

import subprocess
import sys
import time
from typing import Any

import pytest

import gptoss_jax
from gptoss_jax.checkpoints.export import open_export
from gptoss_jax.runtime import demo_model
from tests.goldens import make as golden
from tests.proofs.test_demo import GREEDY, HIGH, LIMITS, QUESTIONS, prompt_of

torch = pytest.importorskip("torch", reason="the live comparison needs torch")
pytest.importorskip("transformers", reason="the live comparison needs transformers")


def test_transformers_writes_the_same_text(tmp_path):
    """Guards training, rounding, export and inference at once: one token that differs, and the rest is another text."""
    if not demo_model.ARCHIVE.is_file():
        pytest.skip(f"no demo model is packed yet: {demo_model.ARCHIVE} (demo/make.sh makes it)")
    folder, published = demo_model.folder(), tmp_path / "published"
    open_export(folder, "huggingface").run(published)
    ours = gptoss_jax.load(folder, dtype="float32")
    answers = ours.answers(QUESTIONS, settings=HIGH, sampling=GREEDY, slots=1, **LIMITS)
    theirs: Any = golden.load_transformers(published, "float32")
    for question, answer in zip(QUESTIONS, answers, strict=True):
        document = {"messages": [{"role": "user", "content": question}], "reasoning_effort": "high"}
        prompt = torch.tensor([prompt_of(document)])
        written = theirs.generate(
            prompt, do_sample=False, max_new_tokens=LIMITS["max_new_tokens"], eos_token_id=list(ours.config.stop_ids)
        )
        ids = written[0, prompt.shape[1] :].tolist()
        assert ids[: len(answer.parsed.token_ids)] == list(answer.parsed.token_ids), question


def test_the_demo_answers_within_ten_seconds_of_its_start():
    """Guards start-up: an import, a compile that no cache keeps, an archive unpacked anew; the first run fills them."""
    command = [sys.executable, "-m", "gptoss_jax.generate", "What is 417 + 258?"]
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - began)
        assert "675" in answer.stdout
    assert min(seconds[1:]) <= 10
