"""Random weights at temperature 2 under schemas: an answer that is whole has its form, and a cut one says so.

In the engine under fifty of them; in batch jobs, in each form of their rows, and through the Python API under one.
"""

import collections
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from benchmarks.schemas import SCHEMAS
from benchmarks.structured import draw_answers, ending_sampling
from converters.random_checkpoint import write_checkpoint
from gptoss_jax.engine.request import EngineConfig
from gptoss_jax.grammar.forms import ToolChoice
from gptoss_jax.harmony import tool_schemas
from gptoss_jax.harmony.settings import ResponseFormat, Settings
from gptoss_jax.runtime import loading
from gptoss_jax.runtime.language_model import LanguageModel
from tests import jobs
from tests.goldens.make import ROOT

SCHEMA = {
    "type": "object",
    "properties": {
        "size": {"type": "integer", "minimum": 3, "maximum": 40},
        "colours": {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["size", "colours"],
    "additionalProperties": False,
}
FUNCTION = {"type": "function", "name": "paint", "strict": True, "parameters": SCHEMA}
MOST_TOKENS = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Random weights: tiny sizes, the whole vocabulary."""
    folder = tmp_path_factory.mktemp("random") / "model"
    config = json.loads((ROOT / "configs" / "tiny.json").read_text())
    layers = {"num_hidden_layers": 2, "layer_types": config["layer_types"][:2]}
    write_checkpoint(folder, config | layers)
    return folder


@pytest.fixture(scope="module")
def model(folder) -> LanguageModel:
    """They, loaded."""
    return loading.load(folder)


def test_no_whole_answer_is_invalid(model):
    """Guards the promise, whatever the model wants: each answer is valid, by jsonschema, or says that it was cut."""
    engine = model.engine(EngineConfig(slots=8, max_context_tokens=512, prefix_snapshots=0))
    drawn = list(draw_answers(engine, len(SCHEMAS), most_tokens=160))
    found = collections.Counter(each.status for each in drawn)
    assert set(found) <= {"valid", "cut"}, [each.answer.parsed.text for each in drawn if each.status not in found]
    assert found["valid"] >= 25
    assert all(each.answer.finish_reason == "length" for each in drawn if each.status == "cut")
    assert {"final", "call"} <= {message.kind for each in drawn for message in each.answer.messages}


def check(found: Iterable[tuple[str, str | None, str]]) -> None:
    """Looks at answers: kind, text, and what each says of itself; most are whole."""
    statuses = collections.Counter()
    for kind, text, status in found:
        statuses[kind, status] += 1
        if status == "valid":
            jsonschema.validate(json.loads(text or ""), SCHEMA)
    kinds = {kind for kind, _ in statuses}
    assert {status for _, status in statuses} <= {"valid", "cut"}, statuses
    assert all(statuses[kind, "valid"] >= 2 for kind in kinds), statuses


def row_of(number: int, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    """A row whose answer may be anything that its form allows."""
    sampling = ending_sampling(number)
    biases = {str(token): bias for token, bias in sampling.logit_bias.items()}
    drawn = {"temperature": sampling.temperature, "seed": number, "logit_bias": biases, **fields}
    if not kind.startswith("/"):
        return {"id": f"{kind} {number}", "prompt": "Answer.", "max_new_tokens": MOST_TOKENS, **drawn}
    limit = "max_output_tokens" if kind == "/v1/responses" else "max_tokens"
    asked = {"input": "Answer."} if kind == "/v1/responses" else {"messages": [{"role": "user", "content": "Answer."}]}
    body = {**asked, limit: MOST_TOKENS, **drawn}
    return {"custom_id": f"{kind} {number}", "method": "POST", "url": kind, "body": body}


def test_no_whole_answer_of_a_batch_job_is_invalid(folder, tmp_path):
    """Guards jobs: rows of each form, with a schema or a function that has to be called, beside some that are free."""
    inner = {"name": "paint", "schema": SCHEMA}
    calling = {"tools": [FUNCTION], "tool_choice": "required"}
    asked = {
        "plain": {"response_format": {"type": "json_schema", "json_schema": inner}},
        "calling": calling,
        "/v1/chat/completions": {"response_format": {"type": "json_schema", "json_schema": inner}},
        "/v1/responses": {"text": {"format": {"type": "json_schema", **inner}}},
    }
    rows = [row_of(number, kind, fields) for kind, fields in asked.items() for number in range(6)]
    plain = [row for row in rows if "id" in row] + [{"id": "free", "prompt": "Answer.", "max_new_tokens": 5}]
    jobs.write_rows(tmp_path / "plain.jsonl", plain)
    jobs.write_rows(tmp_path / "openai.jsonl", [row for row in rows if "custom_id" in row])
    files = (tmp_path / "plain.jsonl", tmp_path / "openai.jsonl", tmp_path / "out.jsonl")
    sizes = ("--slots", 8, "--max-context-tokens", 512, "--compilation-cache", tmp_path / "programs")
    done = jobs.run(folder, *files, *sizes, model=jobs.REAL)
    assert done.returncode == 0, done.stderr
    lines = jobs.read_rows(tmp_path / "out.jsonl")
    assert len(lines) == len(rows) + 1 and not any(line["error"] for line in lines)
    check(told(line) for line in lines if line.get("id") != "free")


def told(line: dict[str, Any]) -> tuple[str, str | None, str]:
    """What a line says: which kind of row it answers, the text that is held, its verdict."""
    if "id" in line and "custom_id" not in line:
        text = line["tool_calls"][0]["arguments"] if line["tool_calls"] else line["final"]
        return line["id"].split()[0], text, line["structured"]["status"]
    body, kind = line["response"]["body"], line["custom_id"].split()[0]
    if kind == "/v1/responses":
        texts = [item["content"][0]["text"] for item in body["output"] if item["type"] == "message"]
    else:
        texts = [body["choices"][0]["message"]["content"]]
    return kind, texts[-1] if texts else None, body["gptoss"]["answers"][0]["structured"]["status"]


@pytest.mark.parametrize("kind", ["format", "call"])
def test_no_whole_answer_of_the_python_api_is_invalid(model, kind):
    """Guards `LanguageModel.answers`: Settings with a response format, or a function that has to be called."""
    held = {
        "format": {"response_format": ResponseFormat("paint", SCHEMA)},
        "call": {"tools": tool_schemas.tools([FUNCTION])},
    }
    answers = model.answers(
        [f"Answer, {number}." for number in range(8)],
        settings=Settings(**held[kind]),
        tool_choice=ToolChoice(required=kind == "call"),
        sampling=ending_sampling(3),
        max_new_tokens=MOST_TOKENS,
        max_context_tokens=512,
    )
    found = []
    for answer in answers:
        text = answer.parsed.calls[0].content if answer.parsed.calls else answer.final
        found.append((kind, text, "cut" if answer.finish_reason == "length" else "valid"))
    check(found)
