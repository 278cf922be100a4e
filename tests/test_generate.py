"""`python -m gptoss_jax.generate` as people run it, in processes of its own; and `load` from Python."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from absl import flags

import gptoss_jax
from converters import convert
from gptoss_jax import generate, runtime, tokenizer
from gptoss_jax.checkpoint import CheckpointError
from gptoss_jax.config import parse_config
from gptoss_jax.engine import Event, Request, RequestError
from gptoss_jax.sampling import SamplingParams
from tests.gate import TinyModel
from tests.goldens import make as golden

SMALL = golden.tiny_config() | {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
# With the real vocabulary, so that text goes in and comes out.
WORDY = SMALL | {"vocab_size": 201_088, "eos_token_id": 200_002, "pad_token_id": 199_999}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A published folder, a converted checkpoint, and a home for caches."""
    folder = tmp_path_factory.mktemp("generate")
    TinyModel(WORDY).write(folder)
    options = convert.Options(folder / "published", folder / "checkpoint", False, False, False)
    convert.run(options)
    return folder


def _generate(folder, *arguments, home="home") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "gptoss_jax.generate", *map(str, arguments)]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / home), "XLA_FLAGS": ""}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=golden.ROOT, env=environment, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def answered(folder):
    """One greedy answer as text, and the same as JSON."""
    asked = (
        "--checkpoint",
        folder / "checkpoint",
        "--prompt",
        "Grüße!",
        "--temperature",
        "0",
        "--max-new-tokens",
        "20",
    )
    return _generate(folder, *asked), _generate(folder, *asked, "--json")


def test_text_goes_to_stdout_and_all_else_to_stderr(answered):
    """Guards pipes: stdout holds the answer alone; stderr says that it was cut and that weights are random."""
    text, as_json = answered
    assert text.returncode == as_json.returncode == 0, text.stderr + as_json.stderr
    document = json.loads(as_json.stdout)
    assert text.stdout == document["text"] + "\n"
    assert document["text"] == tokenizer.load_tokenizer().decode(document["token_ids"])
    for said in ("loaded Orbax checkpoint", "kernels attention", "RANDOM", "first token after", "tokens/s", "GB/s"):
        assert said in text.stderr
    assert "the answer was cut at 20 tokens (--max-new-tokens)" in text.stderr


def test_json_holds_what_was_asked_and_drawn(answered):
    """Guards the document's fields, and the harmony rendering of the prompt."""
    document = json.loads(answered[1].stdout)
    assert len(document["token_ids"]) == len(document["logprobs"]) == 20
    assert document["finish_reason"] == "length"
    assert document["settings"]["temperature"] == 0
    assert document["settings"]["prompt"] == "Grüße!"
    prompt = tokenizer.load_tokenizer().decode(document["prompt_token_ids"])
    assert prompt.startswith("<|start|>system<|message|>")
    assert "Reasoning: medium" in prompt
    assert prompt.endswith("<|start|>user<|message|>Grüße!<|end|><|start|>assistant")
    statistics = document["statistics"]
    assert statistics["decode_tokens_per_second"] > 0
    assert 0 < statistics["share_of_bandwidth_limit"] < 1


def test_second_process_compiles_no_large_program(folder, answered):
    """Guards the persistent cache: the second start takes its programs from the user's cache folder."""
    asked = ("--checkpoint", folder / "checkpoint", "--token-ids", "1,2,3", "--max-new-tokens", "3", "--json")
    before = {path.name for path in (folder / "home" / "gptoss_jax" / "xla").iterdir() if "-cache" in path.name}
    assert any("prefill" in name for name in before)
    assert any("decode" in name for name in before)
    again = json.loads(_generate(folder, *asked).stdout)
    fresh = json.loads(_generate(folder, *asked, home="other").stdout)
    after = {path.name for path in (folder / "home" / "gptoss_jax" / "xla").iterdir() if "-cache" in path.name}
    assert after == before
    assert again["token_ids"] == fresh["token_ids"]
    assert again["statistics"]["compile_seconds"] < 0.5 * fresh["statistics"]["compile_seconds"]


def test_python_gives_what_the_command_gives(folder, answered):
    """Guards the thin command: `load(...).generate(...)` draws the same tokens, from safetensors as well."""
    document = json.loads(answered[1].stdout)
    for path in ("checkpoint", "published"):
        model = gptoss_jax.load(folder / path)
        assert model.weights_are_random
        events = list(model.generate(document["prompt_token_ids"], max_new_tokens=20, temperature=0.0))
        assert [token for event in events for token in event.token_ids] == document["token_ids"]
        assert [event.finish_reason for event in events][-1] == "length"


@pytest.mark.parametrize("layout", ["huggingface", "openai", "huggingface-bf16"])
def test_load_takes_every_published_layout(layout, tmp_path):
    """Guards loading without conversion: the layouts of one model give the same logits; nothing is written."""
    published = TinyModel(SMALL).write(tmp_path, layout)
    before = sorted(path.name for path in published.rglob("*"))
    tokens = golden.token_ids(40, seed=1).tolist()
    logits = gptoss_jax.load(published, dtype="float32").logits(tokens)
    assert logits.dtype == np.float32
    assert logits.shape == (40, 512)
    other = TinyModel(SMALL).write(tmp_path / "other")
    np.testing.assert_array_equal(logits, gptoss_jax.load(other, dtype="float32").logits(tokens))
    assert sorted(path.name for path in published.rglob("*")) == before


def test_request_is_what_the_flags_say():
    """Guards the thin command: stop ids are the model's, limits and sampling the flags'."""
    values = flags.FlagValues()
    flags.DEFINE_integer("max_new_tokens", 7, "", flag_values=values)
    flags.DEFINE_integer("max_context_tokens", 64, "", flag_values=values)
    values.mark_as_parsed()
    sampling = SamplingParams(temperature=0.5, seed=9)
    request = generate.build_request(values, parse_config(WORDY), [1, 2], sampling)
    assert request == Request((1, 2), (200_002, 200_012, 199_999), 7, sampling)


def test_text_flows_as_tokens_come(capsys):
    """Guards streaming: each event's text is out before the next event, and never half a character."""
    words = tokenizer.load_tokenizer()
    ids = words.encode("naïve 🙂 done")
    seen = []

    def events():
        for token in ids:
            yield Event(0, (token,), (-1.0,), None)
            seen.append(capsys.readouterr().out)
        yield Event(0, (tokenizer.RETURN,), (-1.0,), "stop")

    answer = generate.stream(events(), tokenizer.StreamDecoder(words), echo=True)
    assert "".join(seen) == "naïve 🙂 done"
    assert sum(bool(text) for text in seen) >= 3
    assert answer.token_ids == [*ids, tokenizer.RETURN]
    assert answer.finish_reason == "stop"


def test_unfinished_checkpoints_are_refused_with_the_reason(folder, tmp_path):
    """Guards the first thing after a kill -9: what lies there is said to be unfinished, and how to go on."""
    for moved in ("out.partial/checkpoint", "other"):
        shutil.copytree(folder / "checkpoint", tmp_path / moved)
        (tmp_path / moved / "manifest.json").unlink()
    for path in ("out", "out.partial", "out.partial/checkpoint"):
        with pytest.raises(CheckpointError, match="run the command that writes it again, it resumes"):
            gptoss_jax.load(tmp_path / path)
    with pytest.raises(CheckpointError, match=r"has no manifest\.json, so it is no finished checkpoint"):
        gptoss_jax.load(tmp_path / "other")


BAD = {
    "no checkpoint": (["--prompt", "x"], "--checkpoint is missing"),
    "absent checkpoint": (["--prompt", "x", "--checkpoint", "absent"], "absent"),
    "no prompt": (["--checkpoint", "CHECKPOINT"], "expected one of --prompt TEXT and --token-ids 1,2,3"),
    "two prompts": (["--prompt", "x", "--token-ids", "1"], "expected one of --prompt TEXT and --token-ids 1,2,3"),
    "bad ids": (["--token-ids", "1,zwei"], "--token-ids is '1,zwei', expected whole numbers such as 1,2,3"),
    "id outside": (
        ["--checkpoint", "CHECKPOINT", "--token-ids", "1,201088"],
        "token id 201088 at position 1 is outside the vocabulary, expected 0 to 201087",
    ),
    "too long": (
        ["--checkpoint", "CHECKPOINT", "--prompt", "x " * 90, "--max-context-tokens", "100"],
        "exceed the context of 100 tokens: shorten them, or raise max_context_tokens",
    ),
    "no tokens": (["--checkpoint", "CHECKPOINT", "--token-ids", "1", "--max-new-tokens", "0"], "max_new_tokens is 0"),
    "unquoted prompt": (["--prompt", "why", "is"], "unexpected argument 'is'"),
    "unknown flag": (["--promt", "x"], "Unknown command line flag 'promt'"),
    "bad temperature": (["--prompt", "x", "--temperature", "-1"], "temperature is -1.0"),
    "bad kernel": (
        ["--checkpoint", "CHECKPOINT", "--prompt", "x", "--kernels", "fast"],
        "kernel 'fast', expected auto",
    ),
    "bad mesh": (["--checkpoint", "CHECKPOINT", "--prompt", "x", "--mesh", "tensor=4"], "a mesh of 4 devices"),
    "altered vocabulary": (["--prompt", "x", "--vocab", "README.md"], "README.md"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(name, folder):
    """Guards the user's eyes: what was got, what was expected, no traceback, nothing on stdout."""
    arguments, message = BAD[name]
    done = _generate(folder, *[folder / "checkpoint" if word == "CHECKPOINT" else word for word in arguments])
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("generate: ")
    assert message in last
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_help_lists_own_and_shared_flags(folder):
    """Guards --help: every flag a user can set is there."""
    done = _generate(folder, "--help")
    assert done.returncode == 0
    shown = done.stdout
    for flag in ("--checkpoint", "--prompt", "--token_ids", "--mesh", "--temperature", "--max_new_tokens", "--json"):
        assert flag in shown


def test_logits_refuse_ids_outside_the_vocabulary(tmp_path):
    """Guards indexing: an id beyond the table would be clamped to its last row without a word."""
    model = gptoss_jax.load(TinyModel(SMALL).write(tmp_path))
    for ids in ([512], [-1], []):
        with pytest.raises(RequestError, match="expected a list of ids from 0 to 511"):
            model.logits(ids)


def test_kernels_are_chosen_by_op_or_altogether():
    """Guards the flag: each op can be named by itself, and a name that is no op is refused."""
    both, line = runtime.choose_kernels("reference", "cpu")
    assert "linear: reference (asked for by name)" in line
    mixed, line = runtime.choose_kernels("linear=streamed", "gpu")
    assert "attention: reference (no fused kernel for gpu yet)" in line
    assert both.linear is not mixed.linear
    with pytest.raises(ValueError, match="unknown op 'attn', expected attention, expert_mlp, linear"):
        runtime.choose_kernels("attn=reference", "cpu")


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_unknown_dtypes_are_refused(dtype, tmp_path):
    """Guards the policy table against a silent default."""
    with pytest.raises(ValueError, match=f"dtype is '{dtype}', expected one of bfloat16, float32"):
        gptoss_jax.load(tmp_path, dtype=dtype)
