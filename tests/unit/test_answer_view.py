"""What people see of an answer, on two streams, as JSON and in a saved conversation: all that the model wrote.

`make mutations` tries 10,000 broken streams, a tenth of what the parser gets: each is rendered, saved and read again.
"""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai_harmony import Message, TextContent

from gptoss_jax.cli.answer_view import AnswerView, remarks
from gptoss_jax.cli.terminal import Screen
from gptoss_jax.engine.request import Event, FinishReason
from gptoss_jax.harmony import messages, render
from gptoss_jax.harmony.answer import Answer, AnswerStream, call_document
from gptoss_jax.harmony.parsed import CHANNELS
from gptoss_jax.harmony.tokenizer import load_tokenizer
from tests import broken_streams
from tests.broken_streams import CALL_WEATHER, FINAL, MUTATIONS, NEXT, THOUGHT, WHICH, mutated, spelled

TOKENIZER = load_tokenizer()
STREAMS, HEADER_IDS = broken_streams.seeds(TOKENIZER)
A_TENTH = settings(max_examples=max(100, settings().max_examples // 10))  # of the profile's
NEW_LINES = Counter({"\n": 10**6})
STRAY = "<|channel|>commentary to=assistant"
CUT_CALL = CALL_WEATHER[: CALL_WEATHER.index("Bern") + 2]


class _Seen(Screen):
    """A screen that keeps what is written to each stream."""

    def __init__(self):
        self.stdout = self.stderr = ""

    def answer(self, text: str) -> None:
        self.stdout += text

    def aside(self, text: str, style: str) -> None:
        self.stderr += text

    def finish_line(self) -> None:
        pass


def _answer(ids, *, reason: FinishReason | None = "stop", show_reasoning=True, raw=False) -> tuple[Answer, _Seen]:
    """The answer of a model that draws `ids`, and what is shown of it; without a reason, the user has ended it."""
    stream, seen = AnswerStream(TOKENIZER, raw=raw), _Seen()
    view = AnswerView(seen, show_reasoning=show_reasoning, print_calls=not raw)
    for token in ids:
        stream.ends_at(token)
        view.show(stream.take(Event(0, (token,), (-0.5,), None)))
    if reason:
        stream.take(Event(0, (), (), reason))
    answer, rest = stream.finish()
    view.show(rest)
    view.finish(answer)
    return answer, seen


def _read(text, **options):
    return _answer(spelled(TOKENIZER, text), **options)


def _saved(answer):
    """The answer's part of a conversation, written and read again."""
    said = [messages.user("?"), *messages.from_parsed(answer.history())]
    read = messages.from_json(json.loads(json.dumps(messages.to_json(said))))
    assert [type(message) for message in read.messages] == [type(message) for message in said]
    assert list(read.messages) == said
    return said


def _text(message: Message) -> str:
    (part,) = message.content
    assert isinstance(part, TextContent)
    return part.text


def _texts(answer):
    """All that the model wrote but headers: of each message, and each run outside of any."""
    stray = answer.stray_text.split("\n\n") if answer.stray_text else []
    return [message.content for message in answer.messages], stray


@A_TENTH
@given(which=WHICH, other=WHICH, edits=MUTATIONS, reason=st.sampled_from(["stop", "length", None]))
def test_mutations_are_seen_whole(which, other, edits, reason):
    """Guards against text that the parser keeps and nobody sees: on the two streams, in JSON, in what is saved."""
    answer, seen = _answer(mutated(STREAMS[which], edits, HEADER_IDS, STREAMS[other]), reason=reason)
    contents, stray = _texts(answer)
    calls = [json.dumps(call_document(call), ensure_ascii=False) + "\n" for call in answer.parsed.calls]
    assert seen.stdout.endswith("".join(calls))
    for message in answer.messages:
        assert message.kind == "call" or message.content in seen.stdout + seen.stderr
    assert all(run.strip() in seen.stdout + seen.stderr for run in stray)

    document = json.loads(json.dumps(answer.document()))
    whole = [call["arguments"] for call in document["tool_calls"]]
    places = [document["final"] or "", document["reasoning"], *document["preambles"], *whole, document["unparsed_text"]]
    if any(contents) or stray:
        assert (
            Counter("".join(places)) - NEW_LINES == Counter("".join([*contents, answer.parsed.stray_text])) - NEW_LINES
        )
    assert all(message["is_cut"] is False for message in document["messages"][:-1])

    said = _saved(answer)
    saved = "\n".join(map(_text, said))
    for message in answer.messages:
        garbled = message.role == "tool" and message.recipient is None and message.channel in CHANNELS
        assert message.content in saved or not (message.role == "assistant" or garbled)
    assert all(run.strip() in saved for run in stray)
    assert [_text(said[i]) for i in render.waiting_calls(said)] == whole
    assert bool(document["final"]) <= any(message.channel in ("final", None) for message in said[1:])


@pytest.mark.parametrize("cut", range(1, 12))
def test_raw_text_is_seen_once(cut):
    """Guards --raw: what stands there already is not shown again beside it."""
    ids = spelled(TOKENIZER, "Sorry." + STRAY + FINAL + NEXT + CUT_CALL)[: 2 * cut]
    answer, seen = _answer(ids, raw=True)
    assert (seen.stdout, seen.stderr) == (answer.parsed.text, "")


@pytest.mark.parametrize("header", [STRAY, f"{STRAY}{NEXT}", f"{STRAY}<|channel|>commentary"])
def test_a_thought_behind_a_stray_header_is_hidden(header):
    """Guards against a thought that is shown without being asked for, and one taken for an answer."""
    answer, seen = _read(f"{header}{THOUGHT}{NEXT}{header}{FINAL}", show_reasoning=False)
    assert (seen.stdout, seen.stderr) == ("Answer", "")
    document = answer.document()
    assert (document["final"], document["reasoning"], document["unparsed_text"]) == ("Answer", "hm", "")
    assert [(m.channel, m.recipient) for m in answer.history()] == [("analysis", None), ("final", None)]
    answer, _ = _read(f"{STRAY}<|message|>{FINAL}")
    assert [(m.channel, m.content) for m in answer.history()] == [("final", "Answer")]


def test_what_stands_beside_an_answer_is_seen_on_stderr():
    """Guards text outside of any message, which was lost where there was an answer, and words of another role."""
    answer, seen = _read(f"Sorry.{THOUGHT}{NEXT}{FINAL}<|start|>user<|message|>And Rome?<|end|>", show_reasoning=False)
    assert seen.stdout == "Answer"
    assert seen.stderr == "[user]\nAnd Rome?[outside of any message]\nSorry."
    assert answer.document()["unparsed_text"] == "Sorry.\n\nAnd Rome?"
    assert [(m.channel, m.content) for m in answer.history()] == [
        ("analysis", "hm"),
        ("commentary", "Sorry."),
        ("final", "Answer"),
    ]


def test_a_preamble_is_seen_everywhere():
    """Guards what models tell users before a call: it is no reasoning, and had no place in JSON."""
    answer, seen = _read(f"<|channel|>commentary<|message|>Let me look.<|end|>{NEXT}{CALL_WEATHER}")
    document = answer.document()
    assert (document["preambles"], document["final"], document["unparsed_text"]) == (["Let me look."], None, "")
    assert seen.stderr == "[commentary]\nLet me look."
    assert seen.stdout == json.dumps({"name": "get_weather", "arguments": '{"city":"Bern"}'}) + "\n"


@pytest.mark.parametrize("reason", ["length", None])
@pytest.mark.parametrize(
    ("text", "recipient", "content"),
    [
        (CUT_CALL, "functions.get_weather", '{"city":"Be'),
        (CUT_CALL[: CUT_CALL.index("{")], "functions.get_weather", ""),
        (CUT_CALL[: CUT_CALL.index("ther")], "functions.get_wea", ""),
        ("<|channel|>commentary to=functions.<|message|>{}<|call|>", "functions.", "{}"),
        ("<|channel|>analysis to=python code<|message|>print(", "python", "print("),
    ],
)
def test_a_cut_call_is_shown_as_cut(text, recipient, content, reason):
    """Guards against half a call that a program runs, or that waits for a result in a saved conversation."""
    answer, seen = _read(THOUGHT + NEXT + text, reason=reason)
    assert seen.stdout == ""
    assert seen.stderr == f"[reasoning]\nhm[cut call to {recipient}]\n{content}"
    assert f"the call to {recipient} was cut, so it is none" in remarks(answer)
    assert not any(line.startswith("no final answer") for line in remarks(answer))
    document = answer.document()
    assert document["tool_calls"] == []
    assert document["cut_calls"] == [{"name": recipient.removeprefix("functions."), "arguments": content}]
    assert document["unparsed_text"] == content
    *_, thought, noted = _saved(answer)
    assert (thought.channel, noted.recipient) == ("analysis", None)
    assert _text(noted) == f"[cut call to {recipient}] {content}"
    assert render.waiting_calls(_saved(answer)) == []


@pytest.mark.parametrize(
    "text", [THOUGHT, THOUGHT[:-7], f"{THOUGHT}{NEXT}<|channel|>final<|message|>", FINAL[:-12], "I'm sor"]
)
def test_a_conversation_goes_on_from_what_was_cut(text):
    """Guards "continue" after a limit, also from a saved conversation: thoughts are dropped behind a whole answer."""
    answer, _ = _read(f"{THOUGHT}{NEXT}{text}", reason="length")
    going_on = [*_saved(answer), messages.user("continue")]
    assert render.apply_history_rules(going_on) == going_on
    answered, _ = _read(f"{THOUGHT}{NEXT}{FINAL}")
    whole = [*going_on, *_saved(answered)[1:], messages.user("thanks")]
    assert "analysis" not in [message.channel for message in render.apply_history_rules(whole)]


def test_a_garbled_role_makes_no_call():
    """Guards against a call that nobody was shown and that waits in the conversation all the same."""
    answer, _ = _read("<|start|>asistant<|channel|>commentary to=functions.f<|message|>{}<|call|>")
    assert (answer.parsed.calls, answer.document()["unparsed_text"]) == ((), "{}")
    assert render.waiting_calls(_saved(answer)) == []
