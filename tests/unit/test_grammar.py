"""Answers held to a form, on the host: headers in every variant, bodies, what is refused, what finished answers say."""

import json
import time
from typing import Any

import numpy as np
import pytest

from gptoss_jax.errors import GptossError
from gptoss_jax.grammar import forms, vocabulary
from gptoss_jax.grammar.compiled import compile_form
from gptoss_jax.grammar.forms import AUTO, Body, ToolChoice, answer_form
from gptoss_jax.grammar.verdict import verdict
from gptoss_jax.harmony import tokenizer
from gptoss_jax.harmony.settings import GrammarFormat, Settings
from tests.followed import THOUGHT, followed, held, is_masked, schema_format, settings_of
from tests.made_answers import WORDS, answer, ids_of

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "kind": {"enum": ["near", "far"]}},
    "required": ["x", "kind"],
    "additionalProperties": False,
}
WHOLE = '{"x":1,"kind":"far"}'
STRICT = {"name": "move", "strict": True, "parameters": POINT}
LOOSE = {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}
FINAL = "<|channel|>final<|message|>"


@pytest.fixture(scope="module")
def point():
    """Answers of one schema, without tools."""
    return held(settings_of(response_format=schema_format(POINT)))


@pytest.fixture(scope="module")
def calls():
    """Answers that may call a strict function and one that is not, or answer freely."""
    return held(settings_of(tools=[STRICT, LOOSE]))


@pytest.mark.parametrize(
    "text",
    [
        f"{FINAL}{WHOLE}<|return|>",
        f"<|channel|>final<|constrain|>json<|message|>{WHOLE}<|return|>",
        f"<|channel|>final <|constrain|>json<|message|>{WHOLE}<|return|>",
        f"<|channel|>final json<|message|>{WHOLE}<|return|>",
        f"{THOUGHT}{FINAL}{WHOLE}<|return|>",
        f"{THOUGHT}{THOUGHT}{FINAL}{WHOLE}<|return|>",
        THOUGHT + FINAL + '{ "x": -12,\n  "kind": "near"\n}<|return|>',
        '<|channel|>analysis<|message|>{"x": "a 🙂 é\n\n\n',
    ],
)
def test_every_variant_of_a_header_may_lead_to_the_final_answer(point, text):
    """Guards what models write: with and without `<|constrain|>`, reasoning first or not, pretty JSON."""
    assert followed(point, text) == text


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        (f"{FINAL}{WHOLE}<|end|>", f"{FINAL}{WHOLE}"),
        (f"{FINAL}{WHOLE}<|call|>", f"{FINAL}{WHOLE}"),
        (f"{FINAL}{WHOLE} and more", f"{FINAL}{WHOLE}"),
        (f"{FINAL}Sure: {WHOLE}", FINAL),
        (FINAL + '{"x":1.5', FINAL + '{"x":1'),
        (FINAL + '{"x":1,"kind":"fat', FINAL + '{"x":1,"kind":"'),
        (FINAL + '{"x":1}', FINAL + '{"x":1'),
        (FINAL + '{"x":1,    ', FINAL + '{"x":1,'),
        ("<|channel|>commentary<|message|>", "<|channel|>"),
        (" to=functions.move", ""),
        ("<|return|>", ""),
        ("Sure", ""),
        (f"{THOUGHT}<|return|>", THOUGHT),
        ("<|channel|>analysis<|message|>Hm<|return|>", "<|channel|>analysis<|message|>Hm"),
        ("<|channel|>analysis<|message|>Hm<|end|><|start|>user", "<|channel|>analysis<|message|>Hm<|end|><|start|>"),
    ],
)
def test_nothing_else_can_follow(point, text, allowed):
    """Guards the hold: no prose around the JSON, no other end, no call of nothing, no blanks for ever,
    no other speaker.
    """
    assert followed(point, text) == allowed


@pytest.mark.parametrize(
    "text",
    [
        " to=functions.move<|channel|>commentary<|message|>" + WHOLE + "<|call|>",
        " to=functions.move<|channel|>commentary <|constrain|>json<|message|>" + WHOLE + "<|call|>",
        "<|channel|>commentary to=functions.move <|constrain|>json<|message|>" + WHOLE + "<|call|>",
        "<|channel|>commentary to=functions.move json<|message|>" + WHOLE + "<|call|>",
        THOUGHT + "<|channel|>commentary<|message|>I go.<|end|><|start|>assistant to=functions.look<|channel|>"
        'commentary<|message|>{"at":"it","more":[1,null]}<|call|>',
        f"{THOUGHT}{FINAL}Any text, even <b>this</b>.<|return|>",
    ],
)
def test_calls_and_preambles_are_held_as_far_as_asked(calls, text):
    """Guards calls: the recipient before and after the channel, preambles, free answers beside strict functions."""
    assert followed(calls, text) == text


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("<|channel|>commentary to=functions.sing", "<|channel|>commentary to=functions"),
        (
            '<|channel|>commentary to=functions.move<|message|>{"y"',
            "<|channel|>commentary to=functions.move<|message|>",
        ),
        ('<|channel|>commentary to=functions.look<|message|>["', "<|channel|>commentary to=functions.look<|message|>"),
        ("<|channel|>analysis to=functions.move", "<|channel|>analysis"),
        (f"{FINAL}text<|call|>", f"{FINAL}text"),
    ],
)
def test_no_call_but_of_what_is_there(calls, text, allowed):
    """Guards arguments: of a strict function its schema's, of another an object; no name that nobody gave."""
    assert followed(calls, text)[: len(allowed)] == allowed
    assert followed(calls, text) != text


def test_a_choice_of_tools_leaves_nothing_else():
    """Guards required and named choices: no final answer, no other function; reasoning and preambles stay."""
    settings = settings_of(tools=[STRICT, LOOSE], builtin_tools=("python",))
    call = "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>"
    required, named = held(settings, ToolChoice(required=True)), held(settings, forms.tool_choice(_chosen("look")))
    for form in (required, named):
        assert followed(form, f"{THOUGHT}{FINAL}") == f"{THOUGHT}<|channel|>"
        assert followed(form, THOUGHT + call.format("look")) == THOUGHT + call.format("look")
        assert followed(form, " to=python<|channel|>") != " to=python<|channel|>"
    assert followed(required, call.format("move")) == call.format("move")
    assert followed(named, call.format("move")) != call.format("move")
    auto = held(settings)
    for header in (" to=python<|channel|>analysis code", "<|channel|>analysis to=python code"):
        text = header + "<|message|>print(1)<|call|>"
        assert followed(auto, text) == text


def _chosen(name: str) -> dict:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("value", "choice"),
    [
        ("auto", AUTO),
        ("required", ToolChoice(required=True)),
        (_chosen("functions.look"), ToolChoice(True, ("look",))),
        ({"type": "function", "name": "look"}, ToolChoice(True, ("look",))),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "look"}]},
            ToolChoice(False, ("look",)),
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [_chosen("a"), _chosen("b")]}},
            ToolChoice(True, ("a", "b")),
        ),
    ],
)
def test_choices_in_either_of_openais_forms(value, choice):
    """Guards the translation, and that what is echoed is taken back as the same."""
    assert forms.tool_choice(value) == choice
    assert forms.tool_choice(forms.choice_document(choice)) == choice


@pytest.mark.parametrize("value", ["any", 5, {}, {"type": "function"}, {"type": "allowed_tools", "tools": []}, None])
def test_other_choices_are_refused(value):
    """Guards against a choice that is passed over."""
    with pytest.raises(GptossError, match=r"^tool_choice is "):
        forms.tool_choice(value)


def test_nothing_is_held_where_nothing_asks_for_it():
    """Guards requests of before: functions that are not strict, and texts, run without a grammar."""
    assert answer_form(settings_of(tools=[LOOSE])) is None
    assert answer_form(Settings()) is None


@pytest.mark.parametrize(
    ("grammar", "taken", "refused"),
    [
        (GrammarFormat("regex", r"[a-z/]+\d{2}"), ["ab/c12", "z00"], ["12", "ab1", "ab123"]),
        (GrammarFormat("regex", "a/b\\/c"), ["a/b/c"], ["a/b"]),
        (GrammarFormat("lark", 'start: word ("," word)*\nword: /[a-z]+/'), ["a,bc", "x"], ["a,", ",", "A"]),
        (GrammarFormat("json_object"), ["{}", '{"a":[1,{"b":null}]}'], ["[]", "1", '"a"']),
    ],
)
def test_other_forms_of_grammars(grammar, taken, refused):
    """Guards our extensions: the whole answer is the expression's, and no part of it."""
    form = held(Settings(response_format=grammar))
    for text in taken:
        assert followed(form, f"{FINAL}{text}<|return|>") == f"{FINAL}{text}<|return|>"
    for text in refused:
        assert followed(form, f"{FINAL}{text}<|return|>") != f"{FINAL}{text}<|return|>"


def _deep(levels: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("response_format", "text"),
    [
        (
            schema_format({"not": {"type": "string"}}),
            'schema has "not", which cannot be enforced: take it out, or set st',
        ),
        (schema_format({"type": "array", "uniqueItems": True}), 'schema has "uniqueItems", which cannot be enforced'),
        (schema_format({"enum": [], "a": 1}), "schema cannot be held: Unsatisfiable schema: anyOf is empty"),
        (
            schema_format({"type": "string", "minLength": 5, "maxLength": 3}),
            "minLength (5) is greater than maxLength (3)",
        ),
        (
            schema_format({"allOf": [{"type": "string"}, {"type": "integer"}]}),
            "Unsatisfiable schema: incompatible types",
        ),
        (schema_format({"$ref": "#/$defs/gone"}), "Pointer '/$defs/gone' does not exist"),
        (schema_format({"$ref": "https://example.com/schema"}), "Resource 'https://example.com/schema' is not present"),
        (schema_format({"type": "text"}), "Invalid type: text"),
        (schema_format({"type": "string", "pattern": "(?=a)b"}), "look-around, including look-ahead"),
        (schema_format({"type": "string", "format": "colour"}), "Unknown format: colour"),
        (schema_format(_deep(200)), "recursion limit exceeded"),
        (schema_format({"enum": ["x" * 600_000]}), "has 600013 characters, expected at most 524288: shorten it"),
        ({"type": "regex", "regex": "a("}, "response_format, regex cannot be held: invalid regex"),
        ({"type": "lark", "lark": "start: nothing"}, "response_format, lark cannot be held: "),
        ({"type": "lark", "lark": "start: <[200007]>"}, "response_format, lark names a control token"),
    ],
)
def test_what_cannot_be_held_is_refused_in_one_line(response_format, text):
    """Guards refusals: which schema, which keyword, what to do; no traceback of a library, no half of a hold."""
    with pytest.raises(GptossError) as error:
        held(settings_of(response_format=response_format))
    assert str(error.value).startswith("response_format, ")
    assert text in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_strict_function_is_named_where_it_cannot_be_held():
    """Guards several tools: the error says whose schema it is; one that is not strict is held as far as can be."""
    loose = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}}
    with pytest.raises(GptossError, match=r"^tool 'f', parameters has \"not\", which cannot be enforced"):
        held(settings_of(tools=[LOOSE, {**loose, "strict": True}]))
    form = held(settings_of(tools=[STRICT, loose]))
    assert form.remarks == ("tool 'f', parameters: \"not\" is not enforced",)


ODD = {
    "type": "object",
    "properties": {
        'né\u2028"\\': {"const": '🙂\n\t\\"/é'},
        "who": {"$ref": "#/$defs/node"},
        "n": {"anyOf": [{"type": "null"}, {"enum": [1, 2, -3]}]},
        "map": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3},
    },
    "required": ['né\u2028"\\', "who", "n", "map"],
    "additionalProperties": False,
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["next"],
            "additionalProperties": False,
        }
    },
}


def test_odd_schemas_are_held_to_the_letter():
    """Guards unicode, escapes, recursion, constants, whole enums and maps; each step towards a break is refused."""
    form = held(settings_of(response_format=schema_format(ODD)))
    value = {'né\u2028"\\': '🙂\n\t\\"/é', "who": {"next": {"next": None}}, "n": -3, "map": {"a": 1, "b": 2}}
    text = f"{FINAL}{json.dumps(value, ensure_ascii=False, separators=(',', ':'))}<|return|>"
    assert followed(form, text) == text
    for broken in (value | {"n": 3}, value | {"more": 1}, value | {"map": {"a": "b"}}, value | {"who": {}}):
        text = f"{FINAL}{json.dumps(broken, ensure_ascii=False, separators=(',', ':'))}<|return|>"
        assert followed(form, text) != text


ONE_OF = {
    "type": "object",
    "properties": {"v": {"oneOf": [{"type": "number"}, {"type": "integer"}]}},
    "required": ["v"],
}


def test_one_of_is_coerced_and_the_answer_checked():
    """Guards the keyword that grammars lack: said before, and in the end, with the place of what is broken."""
    form = held(settings_of(response_format=schema_format(ONE_OF)))
    assert form.remarks == ("response_format, schema: oneOf is held as anyOf, and the finished answer is checked",)
    assert verdict(form, answer(FINAL + '{"v":1.5}<|return|>')) == {
        "status": "valid",
        "fault": None,
        "remarks": list(form.remarks),
    }
    found = verdict(form, answer(FINAL + '{"v":1}<|return|>'))
    assert (found["status"], found["fault"]) == ("invalid", "response_format, schema: the answer['v'] breaks 'oneOf'")
    apart = held(settings_of(response_format=schema_format({"oneOf": [{"type": "string"}, {"type": "null"}]})))
    assert apart.remarks == ()  # no text is of both: nothing needs coercing


def test_lenient_formats_pass_keywords_over_and_are_checked():
    """Guards `strict: false`: held as far as can be, the rest named, and looked at in the end."""
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    form = held(settings_of(response_format=schema_format(schema, strict=False)))
    assert form.remarks == ('response_format, schema: "uniqueItems" is not enforced',)
    assert verdict(form, answer(f"{FINAL}[1,2]<|return|>"))["status"] == "valid"
    assert verdict(form, answer(f"{FINAL}[1,1]<|return|>"))["fault"].endswith("the answer breaks 'uniqueItems'")
    patterned = {"type": "array", "items": {"type": "string", "pattern": "^(a+)+$"}}
    enforced = held(settings_of(response_format=schema_format(patterned, strict=False)))
    assert verdict(enforced, answer(f'{FINAL}["aa"]<|return|>'))["status"] == "valid"  # nothing is left to look at
    partly = held(settings_of(response_format=schema_format(patterned | {"uniqueItems": True}, strict=False)))
    slow = "a" * 60 + "b"  # for ever in Python's `re`
    assert verdict(partly, answer(f'{FINAL}["{slow}"]<|return|>'))["status"] == "unchecked"
    digits = "1" * 5000  # more than Python reads as a whole number
    assert verdict(form, answer(f"{FINAL}[{digits},-{digits}]<|return|>"))["status"] == "valid"
    assert verdict(form, answer(f"{FINAL}[{digits},{digits}]<|return|>"))["status"] == "unchecked"


def lenient(**schema: Any):
    """An object of any kind under a schema that is passed over, and checked in the end."""
    return held(settings_of(response_format=schema_format({"type": "object", **schema}, strict=False)))


@pytest.mark.parametrize(
    "schema",
    [
        {"not": {"type": "no such type"}},
        {"not": {"minProperties": "two"}},
        {"$id": "a", "not": {"$ref": "#/nowhere"}},
        {"unevaluatedProperties": False},
        {"not": {"$ref": "#/kept"}, "kept": {"$ref": "file:///etc/passwd"}},
    ],
)
def test_whatever_stands_in_what_is_passed_over_is_no_error(schema):
    """Guards a server and a job against a schema's own mistakes, at which jsonschema fails: nobody can say."""
    assert verdict(lenient(**schema), answer(f"{FINAL}{{}}<|return|>"))["status"] == "unchecked"


DOUBLING = {
    **{f"d{at}": {"allOf": [{"$ref": f"#/$defs/d{at + 1}"}, {"$ref": f"#/$defs/d{at + 1}"}]} for at in range(40)},
    "d40": {},
}


@pytest.mark.parametrize("dialect", [{}, {"$schema": "https://json-schema.org/draft/2020-12/schema"}])
def test_a_check_that_would_never_end_is_given_up(dialect):
    """Guards everybody's streams, which wait while an answer is checked: references that double at each of 40 steps."""
    forever = lenient(**{"$defs": DOUBLING, "not": {**dialect, "$ref": "#/$defs/d0"}})
    began = time.thread_time()
    assert "TooMuchWork" in verdict(forever, answer(f"{FINAL}{{}}<|return|>"))["fault"]
    assert time.thread_time() - began < 3


def test_a_list_too_long_to_compare_each_with_each_is_not_checked():
    """Guards the same against the one keyword that takes time by itself; a list of some hundreds is looked at."""
    unique = lenient(properties={"a": {"type": "array", "uniqueItems": True}})
    for count, status in ((300, "valid"), (1000, "unchecked")):
        items = json.dumps([{"b": number} for number in range(count)])
        assert verdict(unique, answer(f'{FINAL}{{"a":{items}}}<|return|>'))["status"] == status


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (answer(FINAL + '{"x":1', reason="length"), "the answer was cut at its limit of tokens"),
        (answer(FINAL + '{"x":1', reason="constraint"), "the grammar met a limit of its own"),
        (answer(FINAL + WHOLE, stop=('"kind"',)), "the answer ended before the stop string '\"kind\"'"),
        (answer(FINAL + '{"x":1'), "the answer ended at a stop id before it was whole"),
        (answer("<|channel|>analysis<|message|>Hm.<|end|>"), "the answer ended at a stop id before it was whole"),
    ],
)
def test_a_cut_answer_says_so(point, given, fault):
    """Guards against half of an object that passes for one: limits, stop strings, stop ids, the grammar itself."""
    found = verdict(point, given)
    assert found["status"] == "cut"
    assert found["fault"].startswith(fault)
    assert verdict(point, answer(f"{FINAL}{WHOLE}<|return|>"))["status"] == "valid"


def test_free_text_is_held_by_one_mask():
    """Guards the speed of reasoning: the same constant bits after every token, which stand until a control token."""
    matcher = held(settings_of(response_format=schema_format(POINT))).start()
    first = matcher.advance(ids_of("<|channel|>analysis<|message|>"))
    assert first.stands_below == tokenizer.STARTOFTEXT
    assert matcher.advance(ids_of("Hm, so")).mask is first.mask
    assert matcher.advance(()).mask is first.mask
    assert first.mask is not None
    bits = np.unpackbits(first.mask.view(np.uint8), bitorder="little")
    assert np.flatnonzero(bits).tolist() == [*range(tokenizer.STARTOFTEXT), tokenizer.END]


def test_what_can_only_follow_in_one_way_is_forced():
    """Guards forced runs: the vocabulary's own cutting, which stays the same though it is taken in parts."""
    value = {"a rather long key": "and a rather long value"}
    matcher = held(settings_of(response_format=schema_format({"const": value}))).start()
    hold = matcher.advance(ids_of("<|channel|>analysis<|message|>Hm.<|end|>"))
    run = tuple(ids_of("<|start|>assistant<|channel|>"))
    assert hold.forced == run
    assert matcher.advance(run[:1]).forced == run[1:]
    assert not matcher.advance(run[1:]).forced  # final or analysis
    text = json.dumps(value, separators=(",", ":")) + "<|return|>"
    hold, num_forced = matcher.advance(ids_of("final<|message|>")), 0
    while text:
        num_forced += len(hold.forced)
        following = hold.forced or (next(i for i in (*ids_of(text[:2]), *ids_of(text)) if not is_masked(hold, i)),)
        assert text.startswith(WORDS.decode(following))
        text, hold = text.removeprefix(WORDS.decode(following)), matcher.advance(following)
    assert num_forced >= 8


def test_what_a_matcher_cannot_follow_is_a_fault_and_no_exception(point):
    """Guards the engine's threads: a token that nobody allowed gives a hold that says so, in one line."""
    hold = point.start().advance(ids_of("<|return|>"))
    assert hold.mask is None
    assert hold.fault.startswith("id 200002 may not follow in the form that the answer is held to")
    assert "\n" not in hold.fault


def test_forms_are_compiled_once():
    """Guards batch jobs of a million rows with one schema, and requests that share a form but not a matcher."""
    first = held(settings_of(response_format=schema_format(POINT)))
    began = time.process_time()
    again = held(settings_of(response_format=schema_format(dict(POINT))))
    assert again is first
    assert time.process_time() - began < 0.05
    one, other = first.start(), first.start()
    one.advance(ids_of("<|channel|>final<|message|>"))
    assert other.advance(()).fault == ""


def test_what_is_missing_is_named(monkeypatch):
    """Guards installations without the extra: one line with the command, and only where a form is asked for."""
    monkeypatch.setattr(vocabulary, "NEEDED", ("json", "no_such_package"))
    with pytest.raises(GptossError, match=r"needs no_such_package, which is not installed: pip install 'gptoss-jax\["):
        compile_form(forms.AnswerForm(final=Body("regex", "never compiled before", "r")), WORDS)
