"""Rows of a job: what a line of input is taken for, and that each line of output finds its row again."""

import dataclasses
import json

import pytest

from gptoss_jax.api.asked import Options
from gptoss_jax.engine.request import EngineConfig
from gptoss_jax.engine.sampling_params import SamplingParams
from gptoss_jax.jobs.inputs import Line
from gptoss_jax.jobs.rows import Row, RowError, RowReader, answers_whom
from gptoss_jax.jobs.work import Reading
from gptoss_jax.model.config import read_config
from tests import jobs
from tests.goldens.make import ROOT
from tests.made_answers import FINAL, answer

CONFIG = dataclasses.replace(read_config(ROOT / "configs" / "tiny.json"), vocab_size=201_088)
READING = Reading(Options(), CONFIG, EngineConfig(max_context_tokens=256))
BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
    "/v1/responses": {"input": "Hello"},
    "/v1/completions": {"prompt": "Hello"},
}


def batch_row(url: str = "/v1/chat/completions", **envelope: object) -> dict:
    """A row in OpenAI's form."""
    return {"custom_id": "a", "method": "POST", "url": url, "body": BODIES.get(url, {})} | envelope


def read(*documents: object) -> list[Row]:
    """The rows of one file."""
    reader = RowReader()
    texts = [text if isinstance(text, bytes) else json.dumps(text).encode() for text in documents]
    return [reader.read(i, Line("in.jsonl", i + 1, text)) for i, text in enumerate(texts)]


def fault(*documents: object) -> str:
    """What is wrong with the last of some rows, and nothing with the others."""
    *others, last = [READING.fault_of(row) for row in read(*documents)]
    assert not any(others)
    assert "\n" not in last
    return last


@pytest.mark.parametrize(
    ("document", "row_id"),
    [
        ({"id": "a"}, "a"),
        ({"id": 7}, "7"),
        ({"id": "é ✓ 🙂\n\u2028"}, "é ✓ 🙂\n\u2028"),
        ({"id": "x" * 512}, "x" * 512),
        ({"id": None}, "row-1"),
        ({}, "row-1"),
    ],
)
def test_a_plain_rows_id(document, row_id):
    """Guards ids that are texts, numbers, absent: what stands in the output is a text."""
    row = read(document | {"prompt": "Hello"})[0]
    assert (row.id, READING.fault_of(row)) == (row_id, "")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b"no JSON", "column 1: "),
        (b'{"prompt": "a"', "column 15: "),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b'{"id": "\\ud800", "prompt": "a"}', "half"),
        (b'{"prompt": "a", "prompt": "b"}', "prompt"),
        ([1], "the row is [1], expected a JSON object"),
        ("text", "the row is 'text', expected a JSON object"),
        ({"id": "", "prompt": "a"}, "id is '', expected a text of 1 to 512 characters"),
        ({"id": "x" * 513, "prompt": "a"}, "expected a text of 1 to 512 characters"),
        ({"id": True, "prompt": "a"}, "id is True, expected a text"),
        ({"id": 1.5, "prompt": "a"}, "id is 1.5, expected a text"),
        ({"id": ["a"], "prompt": "a"}, "id is ['a'], expected a text"),
        ({"id": "a"}, "expected one of prompt, messages, token_ids"),
        ({"prompt": "a", "stream": True}, "unknown field 'stream'"),
        ({"prompt": "a", "temprature": 1}, "unknown field 'temprature': did you mean 'temperature'?"),
        ({"prompt": "a", "reasoning_effort": "huge"}, "reasoning_effort is 'huge', expected"),
        ({"token_ids": [1] * 300}, "300"),
        ({"token_ids": [1], "max_new_tokens": 256}, "an answer of up to 256 exceed the context of 256 tokens"),
        ({"token_ids": [300_000]}, "300000"),
        (batch_row(custom_id=None), "custom_id is missing, expected a text that no other row has"),
        (batch_row(custom_id=""), "custom_id is '', expected a text of 1 to 512 characters"),
        (batch_row(method="GET"), "method is 'GET', expected 'POST'"),
        (batch_row("/v1/embeddings"), "url is '/v1/embeddings', expected one of /v1/chat/completions, "),
        (
            {**batch_row(), "url": ["/v1/embeddings"]},
            "url is ['/v1/embeddings'], expected one of /v1/chat/completions, ",
        ),
        (b'{"prompt": "a", "temperature": NaN}', "the row, 'temperature': NaN is no JSON"),
        (b'{"prompt": ' + b"[" * 100_000, "the row is nested too deeply, at most 64 levels are taken"),
        (batch_row(body=[1]), "body is [1], expected a JSON object"),
        (batch_row(extra=1), "unknown field 'extra', expected custom_id, method, url, body"),
        (batch_row(body=BODIES["/v1/chat/completions"] | {"stream": True}), "stream is True"),
        (batch_row(body=BODIES["/v1/chat/completions"] | {"reasoning_effort": "huge"}), "'huge', expected"),
        (batch_row("/v1/responses", body={"input": "a", "reasoning": {"effort": "huge"}}), "'huge', expected"),
    ],
)
def test_a_bad_row_is_a_fault_of_its_own(document, message):
    """Guards the job: whatever stands on a line, the row says in one line what is wrong, and nothing is raised."""
    assert message in fault(document)
    row = READING.task(read(document)[0]).row
    line = json.loads(row.error_line())
    assert line["error"] == {"code": "invalid_request", "message": row.fault, "line": "in.jsonl:1", "row": 1}


@pytest.mark.parametrize("url", BODIES)
def test_rows_of_all_urls_are_read(url):
    """Guards OpenAI's three forms, and a method that is left out."""
    assert fault(batch_row(url)) == ""
    assert fault({key: value for key, value in batch_row(url).items() if key != "method"}) == ""


def test_a_file_has_one_form():
    """Guards a form that is told by the first row: a row of the other is a fault; files have their own."""
    assert "in the plain form, expected OpenAI's Batch form as the file's first" in fault(batch_row(), {"prompt": "a"})
    assert "in OpenAI's Batch form, expected the plain form as the file's first" in fault({"prompt": "a"}, batch_row())
    reader = RowReader()
    for file, document in (("a", {"prompt": "x"}), ("b", batch_row())):
        assert not reader.read(0, Line(file, 1, json.dumps(document).encode())).fault
    assert reader.forms == {"a": "plain", "b": "openai"}


@pytest.mark.parametrize(
    "document", [{"id": "ü", "prompt": "a"}, {"prompt": "a"}, batch_row(), batch_row("/v1/completions")]
)
@pytest.mark.parametrize("reason", ["stop", "length", "error"])
def test_a_line_of_output_finds_its_row(document, reason):
    """Guards resuming: answers, rows that failed and rows that were refused name their row, in both forms."""
    row = read(document)[0]
    asked = READING.task(row).asked
    assert asked
    line = json.loads(row.answered(asked, [answer(FINAL, reason=reason, raw=asked.raw)], "gpt-oss"))
    assert answers_whom(line) == row.id
    assert (line["error"] or {}).get("code") == ("numerics_error" if reason == "error" else None)
    assert answers_whom(json.loads(row.refused("bad").error_line())) == row.id
    without = row.refused("bad", keeps_id=False)
    assert answers_whom(json.loads(without.error_line())) == row.ordinal


@pytest.mark.parametrize("document", [{}, {"id": None}, {"id": 3}, {"custom_id": None, "error": {"row": "1"}}])
def test_a_line_that_no_job_wrote_answers_nothing(document):
    """Guards files of other programs under the output's name."""
    with pytest.raises(RowError, match="is no line of a job's output"):
        answers_whom(document)


def _seeds(documents, seed: int = 0) -> dict[str | None, int]:
    reading = dataclasses.replace(READING, defaults=Options(sampling=SamplingParams(seed=seed)))
    tasks = [reading.task(row) for row in read(*documents)]
    return {task.row.id: task.asked.options.sampling.seed for task in tasks if task.asked}


def test_a_seed_is_a_function_of_the_jobs_seed_and_the_id():
    """Guards order and shards, and a row's own seed; two rows, or two jobs, draw differently."""
    rows = jobs.rows(50)
    seeds = _seeds(rows)
    assert seeds == _seeds(rows[::-1])
    assert {**_seeds(rows[:20]), **_seeds(rows[20:])} == seeds
    assert len({*seeds.values(), *_seeds(rows, seed=1).values()}) == 100
    assert _seeds([rows[0] | {"seed": 3}]) == {rows[0]["id"]: 3}
    assert _seeds([rows[0] | {"temperature": 0.5}]) == {rows[0]["id"]: seeds[rows[0]["id"]]}
