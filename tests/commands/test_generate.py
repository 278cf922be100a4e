"""`python -m gptoss_jax.generate` as people run it, in processes of its own; and `load` from Python."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import pytest
from jax.sharding import Mesh

import gptoss_jax
from converters import convert
from gptoss_jax import generate, score
from gptoss_jax.checkpoints.orbax.manifest import CheckpointError
from gptoss_jax.engine.request import EngineConfig, RequestError
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.harmony import tokenizer
from gptoss_jax.model import layers, sharding
from pallas_kernels.choice import Hardware
from tests import processes, scripted
from tests.gate import TinyModel
from tests.goldens import make as golden

SMALL = golden.two_layers_config()
# With the real vocabulary, so that text goes in and comes out.
WORDY = SMALL | {"vocab_size": 201_088, "eos_token_id": 200_002, "pad_token_id": 199_999}
TOKENIZER = tokenizer.load_tokenizer()
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather now.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights, published and converted; models that say what their scripts hold; a home for caches."""
    folder = tmp_path_factory.mktemp("generate")
    TinyModel(WORDY).write(folder)
    convert.run(convert.Options(folder / "published", folder / "checkpoint"))
    for name in ("thinker", "caller"):
        scripted.write(folder / name, name)
    return folder


def _generate(folder, model, *arguments, stdin="", home="home", **environment) -> processes.Done:
    checkpoint = ["--checkpoint", folder / model] if model else []
    environment = {"XDG_CACHE_HOME": str(folder / home), "NO_COLOR": None} | environment
    return processes.run("gptoss_jax.generate", *checkpoint, *arguments, stdin=stdin, environment=environment)


def _document(folder, model, *arguments, stdin="") -> dict:
    done = _generate(folder, model, *arguments, "--json", stdin=stdin)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _prompt(document) -> str:
    return TOKENIZER.decode(document["prompt_token_ids"])


# ---- what comes out ----


def test_the_answer_alone_goes_to_stdout(folder):
    """Guards pipes: nothing but the final answer on stdout; no reasoning, no codes, whatever the terminal settings."""
    for environment in ({}, {"NO_COLOR": "1"}, {"FORCE_COLOR": None, "TERM": "xterm-256color"}):
        done = _generate(folder, "thinker", "Why is the sky blue?", **environment)
        assert done[:2] == (0, scripted.ANSWER + "\n"), done.stderr
        assert "\x1b" not in done.stderr
        assert scripted.REASONING not in done.stderr
    for said in ("loaded safetensors", "kernels attention", "prompt of 62 tokens"):
        assert said in done.stderr
    assert re.fullmatch(r"35 tokens in \d+\.\d s, \d+\.\d tokens/s after the first", done.stderr.splitlines()[-1])
    assert "RANDOM" not in done.stderr


def test_notes_can_be_had_at_length_or_not_at_all(folder):
    """Guards --stats, which measures the memory, and --quiet: what is wrong with an answer is said all the same."""
    done = _generate(folder, "thinker", "Why?", "--stats")
    assert re.search(r"first token after .* s; 35 tokens, .* tokens/s, .* % of what .* GB/s", done.stderr)
    done = _generate(folder, "thinker", "Why?", "--quiet")
    assert done == (0, scripted.ANSWER + "\n", "")
    done = _generate(folder, "thinker", "Why?", "--quiet", "--max-new-tokens", "28")
    assert done.stderr == "the answer was cut at 28 tokens (--max-new-tokens, --max-context-tokens)\n"


def test_reasoning_is_shown_on_demand_and_on_stderr(folder):
    """Guards --show-reasoning: labelled, in front of the answer, which stays alone on stdout."""
    done = _generate(folder, "thinker", "Why is the sky blue?", "--show-reasoning")
    assert done.stdout == scripted.ANSWER + "\n"
    assert f"\n[reasoning]\n{scripted.REASONING}\n\n35 tokens in" in done.stderr


def test_json_holds_everything(folder):
    """Guards the document: what was asked, drawn and parsed, and settings as they acted."""
    document = _document(folder, "thinker", "Why is the sky blue?", "--top-logprobs", "2", "--reasoning-effort", "high")
    (answer,) = document["answers"]
    assert answer["token_ids"] == scripted.script_ids("thinker")
    assert (answer["final"], answer["reasoning"]) == (scripted.ANSWER, scripted.REASONING)
    assert (answer["parse_status"], answer["finish_reason"], answer["faults"]) == ("ok", "stop", [])
    assert answer["text"] == scripted.SCRIPTS["thinker"]
    assert [m["channel"] for m in answer["messages"]] == ["analysis", "final"]
    assert len(answer["logprobs"]) == len(answer["top_logprobs"]) == len(answer["token_ids"])
    for token, logprob, top in zip(*(answer[k] for k in ("token_ids", "logprobs", "top_logprobs")), strict=True):
        assert len(top) == 2
        assert top[0] == [token, logprob]
    settings = document["settings"]
    assert (settings["temperature"], settings["reasoning_effort"], settings["date"]) == (1.0, "high", None)
    assert settings["deterministic"] is True
    assert settings["prompt"] == "Why is the sky blue?"
    assert "Reasoning: high" in _prompt(document)
    assert "Current date" not in _prompt(document)
    assert _prompt(document).endswith("<|start|>user<|message|>Why is the sky blue?<|end|><|start|>assistant")
    assert [m["role"] for m in document["conversation"]] == ["system", "user", "assistant", "assistant"]
    assert document["statistics"]["answer_tokens"] == len(answer["token_ids"])
    assert 0 < document["statistics"]["share_of_bandwidth_limit"] < 1
    listed = {name for names in generate.SECTIONS.values() for name in names}
    assert set(settings) == listed


def test_a_cut_answer_is_said_to_be_cut(folder):
    """Guards the reader against half an answer; while it was reasoning there is none, and that is said too."""
    done = _generate(folder, "thinker", "Why?", "--max-new-tokens", "20")
    assert done[:2] == (0, ""), done.stderr
    assert "the answer was cut at 20 tokens (--max-new-tokens, --max-context-tokens)" in done.stderr
    assert "no final answer: the model was still reasoning (--show-reasoning shows it)" in done.stderr
    done = _generate(folder, "thinker", "Why?", "--max-new-tokens", "20", "--show-reasoning")
    assert "no final answer: the model was still reasoning\n" in done.stderr
    done = _generate(folder, "thinker", "Why?", "--max-new-tokens", "1")
    assert "no final answer: the model had not come to one\n" in done.stderr
    done = _generate(folder, "thinker", "Why?", "--max-new-tokens", "28")
    assert scripted.ANSWER.startswith(done.stdout.strip())
    assert done.stdout.strip()
    assert "the answer was cut at 28 tokens" in done.stderr
    assert "no final answer" not in done.stderr


def test_a_stop_string_ends_the_answer(folder):
    """Guards --stop: nothing of it is printed, and the tokens say where it was."""
    done = _generate(folder, "thinker", "Why?", "--stop", "waves", "--stop", "never")
    assert done.stdout == "Because air scatters short \n"
    document = _document(folder, "thinker", "Why?", "--stop", "waves")
    (answer,) = document["answers"]
    assert (answer["final"], answer["finish_reason"], answer["stop_string"]) == (
        "Because air scatters short ",
        "stop",
        "waves",
    )
    assert answer["text"].endswith("short waves")


def test_a_call_is_kept_and_printed_as_json(folder, tmp_path):
    """Guards tools end to end: declared, called, kept at <|call|>, answered from a file, and gone on from."""
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    asked = ("Umbrella?", "--tools", tmp_path / "tools.json", "--save", tmp_path / "chat.json")
    done = _generate(folder, "caller", *asked)
    assert done[:2] == (0, json.dumps({"name": "get_weather", "arguments": scripted.CALL}) + "\n"), done.stderr
    document = _document(folder, "caller", *asked)
    assert "type get_weather = (_: {\ncity: string,\n}) => any;" in _prompt(document)
    (answer,) = document["answers"]
    assert answer["token_ids"][-1] == tokenizer.CALL
    assert answer["tool_calls"] == [{"name": "get_weather", "arguments": scripted.CALL}]
    assert (answer["final"], answer["parse_status"]) == (None, "ok")

    (tmp_path / "results.json").write_text(json.dumps([{"name": "get_weather", "content": {"rain": True}}]))
    (tmp_path / "answer.json").write_text(json.dumps(document))
    results = ("--tool-results", tmp_path / "results.json")
    prompts = [
        _prompt(_document(folder, "caller", "--messages", tmp_path / name, *results))
        for name in ("chat.json", "answer.json")
    ]
    assert prompts[0] == prompts[1]
    assert prompts[0].startswith(_prompt(document))
    assert prompts[0].endswith(
        "<|start|>assistant<|channel|>analysis<|message|>Hmm, weather<|end|>"
        "<|start|>assistant to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>"
        + scripted.CALL
        + '<|call|><|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>{"rain": true}<|end|>'
        + "<|start|>assistant"
    )


def test_a_call_that_was_cut_is_not_printed_as_one(folder, tmp_path):
    """Guards the programs that read stdout: half a call is none, in text, in JSON, and in what is saved."""
    begun = scripted.SCRIPTS["caller"].partition("<|message|>{")[0] + "<|message|>"
    limit = len(TOKENIZER.encoding.encode(begun, allowed_special="all")) + 3
    asked = ("Umbrella?", "--max-new-tokens", limit, "--save", tmp_path / "chat.json")
    done = _generate(folder, "caller", *asked)
    (answer,) = _document(folder, "caller", *asked)["answers"]
    (cut,) = answer["cut_calls"]
    assert (cut["name"], answer["tool_calls"]) == ("get_weather", [])
    assert scripted.CALL.startswith(cut["arguments"])
    assert answer["unparsed_text"] == cut["arguments"] != ""
    assert done[:2] == (0, ""), done.stderr
    assert f"[cut call to functions.get_weather]\n{cut['arguments']}\n" in done.stderr
    assert "the call to functions.get_weather was cut, so it is none\n" in done.stderr
    last = json.loads((tmp_path / "chat.json").read_text())[-1]
    assert (last["recipient"], last["is_cut"]) == (None, True)
    assert last["content"][0]["text"] == f"[cut call to functions.get_weather] {cut['arguments']}"


def test_text_outside_of_any_message_is_not_lost(folder):
    """Guards refusals without a header, and models that know no harmony: the text is printed, and why is said."""
    done = _generate(folder, "checkpoint", "Grüße!", "--temperature", "0", "--max-new-tokens", "20")
    assert done.returncode == 0
    (answer,) = _document(folder, "checkpoint", "Grüße!", "--temperature", "0", "--max-new-tokens", "20")["answers"]
    assert answer["parse_status"] == "unparsed"
    assert answer["unparsed_text"]
    assert done.stdout.strip() in answer["unparsed_text"]
    assert done.stdout.strip()
    assert "no final answer: this is text that the model wrote outside of any message" in done.stderr
    assert "these weights are RANDOM: the text is noise, not an answer" in done.stderr


def test_raw_prints_the_stream_as_it_is(folder):
    """Guards the researcher's view: control tokens spelled out, everything once."""
    done = _generate(folder, "thinker", "Why?", "--raw")
    assert done.stdout == scripted.SCRIPTS["thinker"] + "\n"


def test_n_answers_are_those_of_their_seeds(folder):
    """Guards --n: each answer is what its seed gives alone, bit by bit; more than run at once, too."""
    asked = ("checkpoint", "--token-ids", "1,2,3", "--max-new-tokens", "6", "--seed", "4294967295")
    document = _document(folder, *asked, "--n", "3")
    answers = document["answers"]
    for seed, answer in zip((4294967295, 0, 1), answers, strict=True):
        (alone,) = _document(folder, *asked[:-1], seed)["answers"]
        assert (alone["token_ids"], alone["logprobs"]) == (answer["token_ids"], answer["logprobs"])
    assert len({tuple(answer["token_ids"]) for answer in answers}) == 3
    assert document["conversation"] == []
    assert document["statistics"]["cached_prompt_tokens"] == 0
    long = ",".join(map(str, range(1, 301)))
    document = _document(folder, "checkpoint", "--token-ids", long, "--max-new-tokens", "2", "--n", "3")
    assert document["statistics"]["cached_prompt_tokens"] == 2 * 256  # read once for all
    done = _generate(folder, "thinker", "Why?", "--n", "2")
    assert done.stdout == 2 * (scripted.ANSWER + "\n")
    assert "answer 1 of 2 (seed 0):\nanswer 2 of 2 (seed 1):\n" in done.stderr
    cut = ("the answer was cut at 20 tokens", "no final answer: the model was still reasoning")
    done = _generate(folder, "thinker", "Why?", "--n", "2", "--max-new-tokens", "20")
    lines = [line for line in done.stderr.splitlines() if line.startswith(("answer", *cut))]
    assert [line.startswith(start) for line, start in zip(lines, 2 * ("answer", *cut), strict=True)] == 6 * [True]
    done = _generate(folder, "thinker", "Why?", "--n", "2", "--max-new-tokens", "20", "--json")
    assert "answer 2 of 2 (seed 1): the answer was cut at 20 tokens" in done.stderr


def test_sampling_flags_reach_the_sampler(folder):
    """Guards every flag of drawing: each changes the draw or is echoed as it acted."""
    base = ("--token-ids", "5,6,7", "--max-new-tokens", "8", "--temperature", "0")
    (plain,) = _document(folder, "checkpoint", *base)["answers"]
    first, second = plain["token_ids"][:2]
    (banned,) = _document(folder, "checkpoint", *base, "--banned-ids", f"{first}")["answers"]
    assert first not in banned["token_ids"]
    (biased,) = _document(folder, "checkpoint", *base, "--logit-bias", "77=100,5=-inf")["answers"]
    assert biased["token_ids"] == [77] * 8
    (stopped,) = _document(folder, "checkpoint", *base, "--stop-ids", second)["answers"]
    assert (stopped["token_ids"], stopped["finish_reason"]) == ([first, second], "stop")
    penalised = ("--frequency-penalty", "2", "--presence-penalty", "2", "--repetition-penalty", "3")
    (varied,) = _document(folder, "checkpoint", *base, "--logit-bias", "77=3,78=3", *penalised)["answers"]
    assert varied["token_ids"] != [77] * 8
    cold = ("--token-ids", "5,6,7", "--max-new-tokens", "8", "--temperature", "5")
    for narrow in (("--top-k", "1"), ("--top-p", "0"), ("--min-p", "1")):
        (greedy,) = _document(folder, "checkpoint", *cold, *narrow)["answers"]
        assert greedy["token_ids"] == plain["token_ids"]


def test_the_fast_mode_can_be_asked_for(folder):
    """Guards --nodeterministic: it is echoed, and answers as the other does."""
    document = _document(folder, "thinker", "Why?", "--nodeterministic")
    assert document["settings"]["deterministic"] is False
    assert document["answers"][0]["final"] == scripted.ANSWER


# ---- what goes in ----


def test_prompts_come_from_anywhere(folder, tmp_path):
    """Guards the ways in: the same prompt as an argument, by flag, from a file, from stdin, as a conversation."""
    (tmp_path / "prompt.txt").write_text("Why?\nReally.\n")
    (tmp_path / "chat.json").write_text(json.dumps([{"role": "user", "content": "Why?\nReally."}]))
    ways = {
        "argument": (["Why?\nReally."], ""),
        "flag": (["--prompt", "Why?\nReally."], ""),
        "file": (["--prompt-file", tmp_path / "prompt.txt"], ""),
        "stdin": ([], "Why?\nReally.\n"),
        "dash": (["--prompt-file", "-"], "Why?\nReally.\n"),
        "messages": (["--messages", tmp_path / "chat.json"], ""),
    }
    prompts = {
        name: _document(folder, "thinker", "--max-new-tokens", "1", *arguments, stdin=stdin)["prompt_token_ids"]
        for name, (arguments, stdin) in ways.items()
    }
    assert len({tuple(ids) for ids in prompts.values()}) == 1
    assert TOKENIZER.decode(prompts["stdin"]).endswith("<|start|>user<|message|>Why?\nReally.<|end|><|start|>assistant")


def test_the_settings_reach_the_prompt(folder, tmp_path):
    """Guards system and developer messages: dates, cut-off, instructions, tools of both kinds, response format."""
    schema = {"type": "object", "properties": {"answer": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}}
    (tmp_path / "form.json").write_text(json.dumps(form))
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    (tmp_path / "chat.json").write_text(
        json.dumps({"messages": [{"role": "user", "content": "One."}, {"role": "assistant", "content": "Two."}]})
    )
    settings = ["--date", "2026-11-25", "--knowledge-cutoff", "2025-01", "--system", "Speak <|end|> softly."]
    settings += ["--tools", tmp_path / "tools.json", "--builtin-tools", "browser,python"]
    settings += ["--response-format", tmp_path / "form.json", "--messages", tmp_path / "chat.json", "Three."]
    document = _document(folder, "thinker", "--max-new-tokens", "1", *settings)
    prompt = _prompt(document)
    for said in (
        "Knowledge cutoff: 2025-01\nCurrent date: 2026-11-25\n",
        "Reasoning: medium",
        "## browser",
        "## python",
        "# Instructions\n\nSpeak <|end|> softly.",
        "type get_weather",
        "# Response Formats\n\n## reply\n",
        "<|start|>user<|message|>One.<|end|><|start|>assistant<|channel|>final<|message|>Two.<|end|>"
        "<|start|>user<|message|>Three.<|end|><|start|>assistant",
    ):
        assert said in prompt
    assert document["prompt_token_ids"].count(tokenizer.END) == 5  # one a message: the instructions' is text
    (tmp_path / "own.json").write_text(json.dumps(document))
    again = _document(folder, "thinker", "--max-new-tokens", "1", "--messages", tmp_path / "own.json", "Four.")
    assert _prompt(again).startswith(prompt.removesuffix("<|start|>assistant"))


def test_text_files_from_windows(folder, tmp_path):
    """Guards prompts, conversations and tools that a Windows editor wrote: no mark, no last carriage return."""
    mark, windows = b"\xef\xbb\xbf", b"Why is\r\nthe sky blue?\r\n"
    (tmp_path / "q.txt").write_bytes(mark + windows)
    chat = [{"role": "user", "content": "Why is\r\nthe sky blue?"}]
    (tmp_path / "chat.json").write_bytes(mark + json.dumps(chat, indent=1).replace("\n", "\r\n").encode())
    (tmp_path / "tools.json").write_bytes(mark + json.dumps(TOOLS).encode())
    ways = [
        (["--prompt-file", tmp_path / "q.txt"], ""),
        ([], mark + windows),
        (["--messages", tmp_path / "chat.json"], ""),
    ]
    for arguments, stdin in ways:
        asked = (*arguments, "--tools", tmp_path / "tools.json", "--max-new-tokens", "1")
        prompt = _prompt(_document(folder, "thinker", *asked, stdin=stdin))
        assert prompt.endswith("<|start|>user<|message|>Why is\r\nthe sky blue?<|end|><|start|>assistant")
        assert "\ufeff" not in prompt
        assert "type get_weather = " in prompt


def test_runs_without_breaks_are_read_or_refused_in_a_line(folder, tmp_path):
    """Guards base64, DNA and megabytes of spaces: tokens in linear time, or one line, and no panic."""
    for text, said in (
        ("ACGT" * 250_000, "exceed the context of 4096 tokens"),
        ("a" * 1_000_000, "exceed the context of 4096 tokens"),
        ("a" + " " * 1_000_000 + "b", "its longest run of white space is 1000000, expected fewer than a million"),
    ):
        (tmp_path / "q.txt").write_text(text)
        start = time.monotonic()
        done = _generate(folder, "thinker", "--prompt-file", tmp_path / "q.txt")
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
        assert time.monotonic() - start < 20


def test_a_seed_can_be_drawn_and_is_always_echoed(folder):
    """Guards --seed: -1 and random draw one, and what was drawn can be given again."""
    asked = ("checkpoint", "--token-ids", "1,2,3", "--max-new-tokens", "6")
    drawn = [_document(folder, *asked, "--seed", word) for word in ("-1", "random", "Random")]
    seeds = [document["settings"]["seed"] for document in drawn]
    assert len(set(seeds)) == 3
    again = _document(folder, *asked, "--seed", seeds[0])
    assert again["answers"][0]["token_ids"] == drawn[0]["answers"][0]["token_ids"]
    assert _document(folder, *asked)["settings"]["seed"] == 0
    done = _generate(folder, "thinker", "Why?", "--seed", "17", "--max-new-tokens", "1")
    assert "prompt of 58 tokens; effort medium, date none, seed 17\n" in done.stderr
    done = _generate(folder, *asked, "--seed", "17")
    assert "prompt of 3 tokens; seed 17\n" in done.stderr
    assert "two runs without it answer alike; -1 or random draws one" in " ".join(
        _generate(folder, "", "--help").stdout.split()
    )
    for wrong in ("-2", "1.5", "4294967296"):
        done = _generate(folder, *asked, f"--seed={wrong}")
        assert done.returncode == 2
        assert "seed" in done.stderr.splitlines()[-1]


def test_what_the_prompt_leaves_out_is_said(folder, tmp_path):
    """Guards lines on keys that were ignored, in each file, and on an effort in the instructions that does not act."""
    chat = [{"role": "system", "content": "Reasoning: high"}, {"role": "user", "content": "Hi", "id": "m"}]
    (tmp_path / "chat.json").write_text(json.dumps(chat))
    (tmp_path / "tools.json").write_text(json.dumps([TOOLS[0] | {"cache_control": {"type": "ephemeral"}}]))
    asked = ("--messages", tmp_path / "chat.json", "--tools", tmp_path / "tools.json", "--max-new-tokens", "1")
    lines = _generate(folder, "thinker", *asked).stderr.splitlines()
    ignored = "ignored, since the prompt has no place for it: "
    said = [line for line in lines if line.startswith((ignored, "the instructions say"))]
    effort = "the instructions say 'Reasoning: high', but the effort that acts is medium"
    assert said == [ignored + "'id'", ignored + "'cache_control'", effort]
    done = _generate(folder, "thinker", *asked, "--reasoning-effort", "high")
    assert "the instructions say" not in done.stderr


def test_today_is_put_in_when_asked_for_and_only_then(folder):
    """Guards reproducibility: no run takes the day's date by itself."""
    asked = ("thinker", "Why?", "--max-new-tokens", "1")
    assert "Current date" not in _prompt(_document(folder, *asked))
    assert _document(folder, *asked, "--date", "none")["settings"]["date"] is None
    before = time.strftime("%Y-%m-%d")
    document = _document(folder, *asked, "--date", "today")
    day = document["settings"]["date"]
    assert f"Current date: {day}" in _prompt(document)
    assert day in (before, time.strftime("%Y-%m-%d"))


def test_settings_are_echoed_as_they_acted(folder, tmp_path):
    """Guards --json against flags that a file overrode, or that had nothing to act on."""
    path = tmp_path / "chat.json"
    form = {"type": "json_schema", "json_schema": {"name": "reply", "schema": {"type": "object"}}}
    chat = {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]}
    path.write_text(json.dumps(chat | {"reasoning_effort": "high", "tools": TOOLS, "response_format": form}))
    document = _document(folder, "thinker", "--messages", path, "--max-new-tokens", "1")
    settings = document["settings"]
    assert (settings["reasoning_effort"], settings["system"]) == ("high", "Be kind.")
    assert settings["tools"] == [TOOLS[0]["function"]]
    held = {"name": "reply", "schema": {"type": "object"}, "description": None, "strict": True}
    assert settings["response_format"] == held
    assert tokenizer.RETURN in settings["stop_ids"]
    path.write_text(json.dumps(document))
    settings = _document(folder, "thinker", "More?", "--messages", path, "--max-new-tokens", "1")["settings"]
    assert (settings["reasoning_effort"], settings["system"], settings["date"]) == (None, None, None)
    settings = _document(folder, "checkpoint", "--token-ids", "1", "--max-new-tokens", "1")["settings"]
    assert (settings["reasoning_effort"], settings["tools"]) == (None, [])


# ---- interruptions and bad input ----


def _interrupted(folder, arguments) -> tuple[int, str, str]:
    """A long answer, interrupted a second after its first words."""
    command = [sys.executable, "-m", "gptoss_jax.generate", "--checkpoint", folder / "checkpoint", *arguments]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "home"), "XLA_FLAGS": "", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=golden.ROOT, env=environment, **pipes) as process:
        assert process.stderr and process.stdout
        said = ""
        while "prompt of" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        time.sleep(1)
        for _ in range(3):  # a hand that insists
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        out, rest = process.communicate(timeout=120)
        return process.returncode, out, said + rest


def test_ctrl_c_keeps_what_had_come(folder):
    """Guards answers against impatience: what was drawn is printed, in --json too, and the exit code says 130."""
    code, out, said = _interrupted(folder, ["--raw", "Tell a long story."])
    assert code == 130, said
    assert len(out) > 20
    assert "the answer was interrupted after" in said
    assert "Traceback" not in said
    code, out, said = _interrupted(folder, ["--json", "Tell a long story."])
    assert code == 130, said
    (answer,) = json.loads(out)["answers"]
    assert answer["finish_reason"] == "cancelled"
    assert len(answer["token_ids"]) > 5


@pytest.mark.parametrize("during", ["loading", "compiling"])
def test_ctrl_c_before_the_first_token_ends_the_command(folder, during):
    """Guards the wait: an interruption may fall into JAX's callbacks, which swallow exceptions; it is not lost."""
    command = [sys.executable, "-m", "gptoss_jax.generate", "--checkpoint", folder / "checkpoint", "Why?"]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / during), "XLA_FLAGS": "", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=golden.ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        said = process.stderr.readline() if during == "compiling" else ""
        time.sleep(0 if said else 1)  # amid imports
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=120)
    assert process.returncode in ((130,) if said else (130, -signal.SIGINT)), said + rest
    assert "first token" not in rest
    assert "Exception ignored" not in rest
    assert not said or "Traceback" not in rest


@pytest.fixture(scope="module")
def spoilt(folder):
    """A model whose numbers are not finite after a word in the middle of its answer."""
    return scripted.write(folder / "spoilt", "thinker", spoilt=" short").name


def test_a_fault_keeps_what_had_come(folder, spoilt, tmp_path):
    """Guards answers against logits that are not finite: each is printed and saved up to there, and the step named."""
    fault = "the answer ended at step 26: logits are not finite; check the checkpoint (convert --verify)"
    done = _generate(folder, spoilt, "Why?", "--save", tmp_path / "chat.json")
    assert done[:2] == (2, "Because air scatters short\n"), done.stderr
    assert fault in done.stderr
    assert json.loads((tmp_path / "chat.json").read_text())[-1]["content"][0]["text"] == "Because air scatters short"
    done = _generate(folder, spoilt, "Why?", "--json", "--n", "2")
    assert done.returncode == 2
    assert f"answer 2 of 2 (seed 1): {fault}" in done.stderr
    for answer in json.loads(done.stdout)["answers"]:
        assert (answer["final"], answer["finish_reason"]) == ("Because air scatters short", "error")
        assert len(answer["token_ids"]) == len(answer["logprobs"]) == 26


class _Gone(NamedTuple):
    """Standard streams to files, one of them to a pipe that nobody reads."""

    descriptor: int
    folder: str

    def __call__(self) -> None:
        for descriptor in (1, 2):
            path = os.path.join(self.folder, str(descriptor))
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, self.descriptor)


def test_readers_that_went_away(folder, tmp_path):
    """Guards `| head` and a lost terminal: what is to be saved is saved; nobody on stderr is no reason to stop."""
    asked = ("gptoss_jax.generate", "--checkpoint", folder / "thinker", "Why?", "--save", tmp_path / "chat.json")
    for descriptor, code in ((1, 141), (2, 0)):
        gone = _Gone(descriptor, str(tmp_path))
        process = processes.start(*asked, prepare=gone, environment={"XDG_CACHE_HOME": str(folder / "home")})
        process.join(120)
        assert process.exitcode == code, (tmp_path / "2").read_text()
        said = json.loads((tmp_path / "chat.json").read_text())
        assert [message["role"] for message in said][:2] == ["system", "user"]
        (tmp_path / "chat.json").unlink()
    assert (tmp_path / "1").read_text() == scripted.ANSWER + "\n"
    assert "Traceback" not in (tmp_path / "2").read_text()


def test_calls_that_nobody_answered_are_said(folder, tmp_path):
    """Guards the reader of an answer that was given without a tool's result."""
    call = {"function": {"name": "get_weather", "arguments": "{}"}}
    chat = [{"role": "user", "content": "Umbrella?"}, {"role": "assistant", "tool_calls": [call]}]
    (tmp_path / "chat.json").write_text(json.dumps(chat))
    done = _generate(folder, "thinker", "--messages", tmp_path / "chat.json", "--max-new-tokens", "1")
    assert "holds a call to functions.get_weather and no result of it (--tool-results gives one)" in done.stderr


BAD = {
    "empty checkpoint": ([None, "--prompt", "x", "--checkpoint="], "--checkpoint is missing"),
    "absent checkpoint": ([None, "--prompt", "x", "--checkpoint", "absent"], "absent"),
    "no prompt": ([], "stdin holds no text (--help lists the ways to give one)"),
    "empty prompt": (["--prompt", " "], "the prompt is empty, expected text"),
    "two prompts": (["--prompt", "x", "--token-ids", "1"], "--prompt and --token-ids: expected one of them"),
    "prompt and file": (["x", "--prompt-file", "README.md"], "a prompt and --prompt-file: expected one of them"),
    "absent file": (["--prompt-file", "absent"], "generate: absent: No such file or directory"),
    "bad ids": (["--token-ids", "1,zwei"], "--token-ids is '1,zwei', expected whole numbers such as 1,2,3"),
    "id outside": (
        ["--token-ids", "1,201088"],
        "token id 201088 at position 1 is outside the vocabulary, expected 0 to 201087",
    ),
    "ids and instructions": (
        ["--token-ids", "1", "--system", "Hi"],
        "--token-ids is the whole prompt, so --system has no place in it",
    ),
    "too long": (
        ["--prompt", "x " * 90, "--max-context-tokens", "100", "--max-new-tokens", "9"],
        "exceed the context of 100 tokens: shorten them, or raise --max-context-tokens",
    ),
    "no tokens": (["--token-ids", "1", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
    "no answers": (["x", "--n", "0"], "--n is 0, expected 1 to 1024"),
    "many answers": (["x", "--n", "1025"], "--n is 1025, expected 1 to 1024"),
    "prompt of bytes": (["x \udcff"], "the prompt is not valid UTF-8"),
    "system of bytes": (["x", "--system", "\udcff"], "--system is not valid UTF-8"),
    "bias twice": (["x", "--logit-bias", "5=1,6=1,5=2"], "--logit-bias names id 5 2 times, expected once"),
    "raw and json": (["x", "--raw", "--json"], "--raw and --json: leave one of them out"),
    "stats and quiet": (["x", "--stats", "--quiet"], "--stats and --quiet: leave one of them out"),
    "raw and reasoning": (["x", "--raw", "--show-reasoning"], "--raw and --show-reasoning: leave one of them out"),
    "top logprobs unseen": (["x", "--top-logprobs", "2"], "--top-logprobs has an effect with --json only: give both"),
    "chat and save": (["--chat", "--save", "x"], "leave --save out; /save FILE in the session writes the conversation"),
    "unquoted prompt": (["why", "is"], "unexpected argument 'is': a prompt of several words goes in quotes"),
    "unknown flag": (["--promt", "x"], "unknown flag --promt: did you mean --prompt?"),
    "bad temperature": (["x", "--temperature", "-1"], "--temperature is -1.0, expected 0 to 10000"),
    "bad bias": (["x", "--logit-bias", "5"], "--logit-bias is '5', expected pairs such as 1234=2.5,99=-inf"),
    "bias outside": (["x", "--logit-bias", "200019=1"], "--logit-bias names id 200019, expected ids from 0 to 200018"),
    "many stops": (["x", "--stop-ids", "1,2,3,4,5,6"], "9 stop ids, expected at most 8"),
    "empty stop": (["x", "--stop", ""], "a stop string is empty"),
    "bad date": (["x", "--date", "tomorrow"], "--date is 'tomorrow', expected a date as YYYY-MM-DD, or none"),
    "utf-16": (["--prompt-file", "UTF_16"], "q.txt is UTF-16, expected UTF-8: convert it with `iconv -f UTF-16"),
    "misspelt type": (["x", "--tools", "MISSPELT"], "tool 'f': parameter 'city' has type 'strnig', expected one of"),
    "bad effort": (
        ["x", "--reasoning-effort", "extreme"],
        "--reasoning-effort is 'extreme', expected one of low, medium, high",
    ),
    "bad tools": (["x", "--tools", "README.md"], "README.md, line 1, column 1: Expecting value; expected JSON"),
    "bad messages": (
        ["--messages", "pyproject.toml"],
        "pyproject.toml, line 1, column 2: Expecting value; expected JSON",
    ),
    "save nowhere": (["x", "--save", "absent/chat.json"], "cannot write absent/chat.json: there is no folder"),
    "results alone": (["x", "--tool-results", "TOOLS"], "--tool-results has an effect with --messages only: give both"),
    "results of no call": (["--messages", "CHAT", "--tool-results", "TOOLS"], "waiting for a result: no call"),
    "chat and json": (["--chat", "--json"], "--chat and --json: leave one of them out"),
    "chat and a prompt": (["--chat", "Hello"], "--chat and a prompt: leave one of them out"),
    "bad kernel": (["x", "--kernels", "fast"], "kernel 'fast', expected auto"),
    "bad mesh": (["x", "--mesh", "tensor=4"], "a mesh of 4 devices"),
    "altered vocabulary": (["x", "--vocab", "README.md"], "README.md"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(name, folder, tmp_path):
    """Guards the user's eyes: what was got, what was expected, no traceback, nothing on stdout."""
    arguments, message = BAD[name]
    (tmp_path / "results.json").write_text('[{"name": "f", "content": "x"}]')
    (tmp_path / "chat.json").write_text('[{"role": "user", "content": "x"}]')
    (tmp_path / "q.txt").write_bytes("Why is the sky blue?\r\n".encode("utf-16"))
    misspelt = {"type": "object", "properties": {"city": {"type": "strnig"}}}
    (tmp_path / "tools.json").write_text(json.dumps([{"name": "f", "parameters": misspelt}]))
    files = {"TOOLS": tmp_path / "results.json", "CHAT": tmp_path / "chat.json"}
    files |= {"UTF_16": tmp_path / "q.txt", "MISSPELT": tmp_path / "tools.json"}
    model = "checkpoint" if arguments[:1] != [None] else ""
    given = [files.get(argument, argument) for argument in arguments if argument is not None]
    done = _generate(folder, model, *given)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("generate: ")
    assert message in last
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_files_and_flags_that_disagree_are_refused(folder, tmp_path):
    """Guards against a flag that a file overrides without a word, and the other way round."""
    path = tmp_path / "chat.json"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}], "reasoning_effort": "high"}))
    prompt = _prompt(_document(folder, "thinker", "--messages", path, "--max-new-tokens", "1"))
    assert "Reasoning: high" in prompt
    done = _generate(folder, "thinker", "--messages", path, "--reasoning-effort", "low")
    assert "--reasoning-effort and the conversation say different things" in done.stderr
    assert done.returncode == 2
    own = _document(folder, "thinker", "Hi", "--reasoning-effort", "high", "--max-new-tokens", "1")
    path.write_text(json.dumps(own))
    done = _generate(folder, "thinker", "--messages", path, "--reasoning-effort", "medium")
    assert "brings its own system message, so --reasoning-effort cannot be set" in done.stderr
    assert done.returncode == 2


@pytest.mark.parametrize(
    "flag", ["prompt-file", "messages", "tools", "tool-results", "response-format", "save", "vocab"]
)
def test_an_empty_file_name_is_no_file_name(folder, flag):
    """Guards scripts whose variable is empty: the flag is refused by name, rather than left out."""
    done = _generate(folder, "thinker", "Why?", f"--{flag}=")
    assert done == (2, "", f"generate: --{flag} is empty, expected the name of a file\n")


@pytest.mark.parametrize("command", [generate, score])
def test_help_is_grouped_and_fits_a_terminal(command):
    """Guards --help: every flag of a command in exactly one section, with its default, in 80 columns."""
    done = processes.run(command.__name__, "--help")
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    names = [name for names in command.SECTIONS.values() for name in names]
    assert len(set(names)) == len(names)
    assert set(names) == _defined_flags(command.__name__)
    for name in names:
        spelled = name.replace("_", "-")
        assert f"\n  --{spelled} " in done.stdout or f"\n  --[no]{spelled}\n" in done.stdout
    for heading in command.SECTIONS:
        assert f"\n{heading}:\n" in done.stdout
    for text in ("[4096]", "[bfloat16]", "Exit codes:", "--checkpoint DIR"):
        assert text in done.stdout


def _defined_flags(module: str) -> set[str]:
    """The flags that a command defines, asked in a process of its own: all but absl's."""
    code = (
        f"import {module} as m; from absl import app, flags; before = set(flags.FLAGS); m.define_flags();"
        "print(*sorted(set(flags.FLAGS) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=golden.ROOT, check=True)
    return set(done.stdout.split())


# ---- the cache, and Python ----


def _compiled_in(said: str) -> set[str]:
    """Of the engine's programs, those that JAX says it traced."""
    return {name for name in ("admit", "halt", "prefill", "decode") if f"tracing {name} " in said}


def test_kept_programs_are_not_compiled_again_and_garbled_ones_are(folder):
    """Guards the second start, and a cache whose files were damaged or changed places: the same answer."""
    asked = ("--checkpoint", folder / "checkpoint", "--token-ids", "1,2,3", "--max-new-tokens", "3", "--json")
    command = [sys.executable, "-m", "gptoss_jax.generate", *asked]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "other"), "JAX_LOG_COMPILES": "1"}
    programs = folder / "other" / "gptoss_jax" / "programs"

    def answers() -> tuple[set[str], object]:
        done = subprocess.run(command, cwd=golden.ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return _compiled_in(done.stderr), json.loads(done.stdout)["answers"]

    everything, fresh = answers()
    assert everything == {"admit", "halt", "prefill", "decode"}
    assert answers() == (set(), fresh)
    admit, decode, _, prefill = sorted(programs.iterdir())
    exchanged = admit.read_bytes(), prefill.read_bytes()
    for path, content in zip((prefill, admit), exchanged, strict=True):
        path.write_bytes(content)
    whole = decode.read_bytes()
    decode.write_bytes(whole[: len(whole) // 2] + b"?" + whole[len(whole) // 2 + 1 :])
    assert answers() == (everything - {"halt"}, fresh)
    assert answers() == (set(), fresh)


def test_python_gives_what_the_command_gives(folder):
    """Guards the thin command: `load(...).generate(...)` draws the same tokens, from safetensors as well."""
    document = _document(folder, "checkpoint", "Grüße!", "--temperature", "0", "--max-new-tokens", "20")
    for path in ("checkpoint", "published"):
        model = gptoss_jax.load(folder / path)
        assert model.weights_are_random
        events = list(model.generate(document["prompt_token_ids"], max_new_tokens=20, temperature=0.0))
        assert [token for event in events for token in event.token_ids] == document["answers"][0]["token_ids"]
        assert [event.finish_reason for event in events][-1] == "length"


def test_python_answers_texts_as_the_command_does(folder):
    """Guards text in, text out: the prompts are rendered and the answers parsed as the command does it."""
    model = gptoss_jax.load(folder / "thinker")
    ids = _document(folder, "thinker", "Hi")["prompt_token_ids"]
    answers = list(model.answers(["Why is the sky blue?", "And the sea?", ids], slots=2))
    for prompt, answer in zip(("Why is the sky blue?", "And the sea?", "Hi"), answers, strict=True):
        (expected,) = _document(folder, "thinker", prompt)["answers"]
        assert (answer.final, answer.parsed.reasoning) == (expected["final"], expected["reasoning"])
        assert answer.final
    events = list(model.generate("Hi"))
    assert [token for event in events for token in event.token_ids] == list(answers[2].parsed.token_ids)
    with pytest.raises(RequestError, match="context"):
        next(model.answers(["Hi", ids * 1000]))


def test_a_model_is_shown_in_two_lines(folder):
    """Guards notebooks and debuggers, which show whatever they meet: gathering every array would take gigabytes."""
    shown = repr(gptoss_jax.load(folder / "published"))
    assert shown.count("\n") == 1
    assert len(shown) < 500
    assert "2 layers, 7 experts" in shown
    assert "random weights from safetensors" in shown


def test_python_takes_all_sampling_options_once(folder):
    """Guards the two ways of giving a temperature: either, not both."""
    model = gptoss_jax.load(folder / "published")
    asked = {"max_new_tokens": 5, "stop_ids": ()}
    short = model.generate([1, 2], temperature=0.5, seed=3, **asked)
    whole = model.generate([1, 2], sampling=SamplingParams(temperature=0.5, seed=3), **asked)
    drawn = [[token for event in events for token in event.token_ids] for events in (short, whole)]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 5
    with pytest.raises(ValueError, match="temperature and seed beside sampling: expected them inside it"):
        model.generate([1, 2], sampling=SamplingParams(), seed=3)


@pytest.mark.parametrize("format", ["huggingface", "openai", "huggingface-bf16"])
def test_load_takes_every_published_format(format, tmp_path):
    """Guards loading without conversion: the formats of one model give the same logits; nothing is written."""
    published = TinyModel(SMALL).write(tmp_path, format)
    before = sorted(path.name for path in published.rglob("*"))
    tokens = golden.token_ids(40, seed=1).tolist()
    logits = gptoss_jax.load(published, dtype="float32").logits(tokens)
    assert logits.dtype == np.float32
    assert logits.shape == (40, 512)
    other = TinyModel(SMALL).write(tmp_path / "other")
    np.testing.assert_array_equal(logits, gptoss_jax.load(other, dtype="float32").logits(tokens))
    assert sorted(path.name for path in published.rglob("*")) == before


@pytest.mark.parametrize("path", ["checkpoint", "published"])
def test_loading_and_compiling_report_how_far_they_are(folder, path):
    """Guards progress bars: what is done only grows, and ends at all of it, from either kind of folder."""
    loaded, compiled = [], []
    model = gptoss_jax.load(folder / path, report=lambda *done: loaded.append(done))
    model.engine(EngineConfig(max_context_tokens=64), report=lambda *done: compiled.append(done))
    for reports in (loaded, compiled):
        assert len(reports) > 1
        assert reports == sorted(set(reports))
        assert reports[-1][0] == reports[-1][1]


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


def test_logits_refuse_ids_outside_the_vocabulary(tmp_path):
    """Guards indexing: an id beyond the table would be clamped to its last row without a word."""
    model = gptoss_jax.load(TinyModel(SMALL).write(tmp_path))
    for ids in ([512], [-1], []):
        with pytest.raises(RequestError, match="expected a list of ids from 0 to 511"):
            model.logits(ids)


def test_kernels_are_chosen_by_op_or_altogether():
    """Guards the flag: each op can be named by itself, and a name that is no op is refused."""
    both, line = layers.choose_kernels("reference", Hardware("cpu"))
    assert "linear: reference (asked for by name)" in line
    mixed, line = layers.choose_kernels("linear=streamed", Hardware("gpu", "NVIDIA A100", "8.0"))
    assert "attention: reference (portable jnp" in line
    assert both.linear is not mixed.linear
    with pytest.raises(ValueError, match="unknown op 'attn', expected attention, expert_mlp, linear"):
        layers.choose_kernels("attn=reference", Hardware("cpu"))


@dataclasses.dataclass(frozen=True)
class _Device:
    """As much of an accelerator as a mesh looks at."""

    platform: str
    id: int = 0
    device_kind: str = "a device"
    process_index: int = 0


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_kernels_for_cpus_are_refused_for_other_devices(platform, tmp_path):
    """Guards against kernels that are found to have no such target only where XLA compiles, after all was loaded."""
    mesh = Mesh(np.array([[[[_Device(platform)], [_Device(platform, 1)]]]], object), sharding.MESH_AXES)
    for kernels in ("cpu", "linear=reference,attention=cpu"):
        message = (
            f"attention kernel 'cpu' cannot run: it is C\\+\\+ for CPUs, and the devices are {platform}; auto takes"
        )
        with pytest.raises(ValueError, match=message):
            gptoss_jax.load(tmp_path, mesh=mesh, kernels=kernels)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_unknown_dtypes_are_refused(dtype, tmp_path):
    """Guards the policy table against a silent default."""
    with pytest.raises(ValueError, match=f"dtype is '{dtype}', expected one of bfloat16, float32"):
        gptoss_jax.load(tmp_path, dtype=dtype)
    with pytest.raises(ValueError, match="dense is 'int4', expected one of bfloat16, int8"):
        gptoss_jax.load(tmp_path, dense="int4")
