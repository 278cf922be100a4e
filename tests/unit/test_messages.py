"""Conversations from JSON: both dialects mean the same ids, nothing is ignored, and every error says where."""

import codecs
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai_harmony import Conversation as LibraryConversation
from openai_harmony import Message, Role, SystemContent, TextContent

from gptoss_jax.cli import flag_values
from gptoss_jax.errors import GptossError
from gptoss_jax.files import decoded
from gptoss_jax.harmony import json_values, messages, parsed, parser, tokenizer
from gptoss_jax.harmony import render as render_module
from gptoss_jax.harmony.conversation import CutMessage
from gptoss_jax.harmony.messages import (
    Conversation,
    from_json,
    from_parsed,
    read_messages,
    read_response_format,
    read_tool_results,
    read_tools,
    to_json,
    tool_results,
)
from gptoss_jax.harmony.render import call_results, opening, render
from gptoss_jax.harmony.settings import ResponseFormat, Settings
from tests.library import harmony_encoding
from tests.unit.test_harmony import FORGED, LIBRARY_CASES, OUR_CASES, call, golden_ids, result, say, user

CITY = {"type": "string", "description": "The city."}
WEATHER = {
    "name": "get_weather",
    "description": "Gets the current weather.",
    "parameters": {"type": "object", "properties": {"city": CITY}, "required": ["city"]},
}


def chat_call(name, arguments, call_id):
    """A tool call as OpenAI writes it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


# The conversation of the golden files history_*.txt, as an OpenAI-style client keeps it.
CHAT = {
    "messages": [
        {"role": "system", "content": "Use a friendly tone."},
        {"role": "user", "content": "What is the weather in Bern?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "Need the weather in Bern.",
            "tool_calls": [chat_call("get_weather", '{"city": "Bern"}', "call_1")],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": '{"sunny": true, "temperature": 20}'},
        {"role": "assistant", "content": "Sunny, 20 degrees.", "refusal": None, "annotations": []},
        {"role": "user", "content": [{"type": "text", "text": "And in "}, {"type": "text", "text": "Basel?"}]},
        {
            "role": "assistant",
            "content": "Let me look that up.",
            "thinking": "Now Basel.",
            "tool_calls": [chat_call("get_weather", {"city": "Basel"}, "call_2")],
        },
        {"role": "tool", "name": "get_weather", "content": "rain"},
    ],
    "tools": [{"type": "function", "function": WEATHER}],
    "reasoning_effort": "medium",
}


@pytest.fixture(scope="module")
def encoding():
    """openai-harmony itself."""
    return harmony_encoding()


@pytest.fixture
def write(tmp_path):
    """Writes a value as a JSON file."""

    def put(value, name="file.json"):
        path = tmp_path / name
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        return path

    return put


def ids_of(conversation, **options):
    """Rendered with the file's own settings."""
    return render(conversation.messages, Settings(**conversation.settings), **options)


@pytest.mark.parametrize(
    ("end", "name", "options"),
    [
        (4, "history_tool_in_flight", {}),
        (6, "history_tool_of_old_turn", {}),
        (8, "history_old_thoughts_dropped_in_flight", {}),
        (8, "history_kept_whole", {"drop_old_analysis": False}),
    ],
)
def test_chat_json_is_rendered_as_the_format_has_it(encoding, write, end, name, options):
    """Guards each field of OpenAI's format: channels, recipients, tool names found by id or name, arguments."""
    conversation = read_messages(write(CHAT | {"messages": CHAT["messages"][:end]}))
    assert ids_of(conversation, **options) == golden_ids(encoding, name)
    if end == 8:  # the file does without the settings that other goldens spell out
        assert conversation.settings["instructions"] == "Use a friendly tone."
        assert conversation.call_ids == {2: "call_1", 8: "call_2"}


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"messages": m}, lambda m: {"conversation": m, "text": "x"}])
def test_both_dialects_in_every_wrapping(write, wrap):
    """Guards equal ids for equal conversations, and that what `generate --json` prints can be continued."""
    chat = read_messages(write(CHAT))
    documents = to_json([*opening(Settings(**chat.settings)), *chat.messages])
    conversation = read_messages(write(wrap(documents)))
    assert conversation.messages[0].author.role is Role.SYSTEM
    assert render(conversation.messages, None) == ids_of(chat)
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert list(read_messages(write(wrap(plain))).messages) == [user("a"), say("b", "final")]


@pytest.mark.parametrize("case", [*LIBRARY_CASES.items(), *OUR_CASES.items()], ids=lambda case: case[0])
def test_round_trip(case):
    """Guards `to_json`, above all fields that are None, which openai-harmony's reader fills with its defaults."""
    given, settings, _ = case[1]
    whole = [*(opening(settings) if settings else []), *given]
    if whole:
        assert list(from_json(json.loads(json.dumps(to_json(whole)))).messages) == whole


def test_round_trip_of_what_is_absent():
    """Guards the lines that a system message leaves out, and an assistant's message that has no channel."""
    bare = SystemContent(model_identity=None, reasoning_effort=None, knowledge_cutoff=None, channel_config=None)
    unchannelled = Message.from_role_and_content(Role.ASSISTANT, "b")
    given = [Message.from_role_and_content(Role.SYSTEM, bare), user("a"), unchannelled]
    for part in (given, given[1:]):
        again = list(from_json(to_json(part)).messages)
        assert again == part
        assert render(again, None) == render(part, None)


@pytest.mark.parametrize("name", [name for name, case in LIBRARY_CASES.items() if case[0]])
def test_the_librarys_own_json(write, name):
    """Guards `openai_harmony.Conversation.to_json`, which leaves out what is absent."""
    given, settings, options = LIBRARY_CASES[name]
    whole = [*(opening(settings) if settings else []), *given]
    if not any(message.channel or message.author.role is Role.SYSTEM for message in whole):
        pytest.fail("this case is chat as well as harmony: choose another")
    path = write(LibraryConversation.from_messages(whole).to_json())
    assert render(read_messages(path).messages, None, **options) == render(whole, None, **options)


FUNCTIONS = [
    {"name": "get_location", "description": "Gets the location of the user."},
    {
        "name": "get_current_weather",
        "description": "Gets the current weather in the provided location.",
        "parameters": {
            "type": "object",
            "properties": {
                "location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"},
                "format": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
            },
            "required": ["location"],
        },
    },
    {
        "name": "get_multiple_weathers",
        "description": "Gets the current weather in the provided list of locations.",
        "parameters": {
            "type": "object",
            "properties": {
                "locations": {
                    "type": "array",
                    "items": {"type": "string"},
                    "description": 'List of city and state, e.g. ["San Francisco, CA", "New York, NY"]',
                },
                "format": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
            },
            "required": ["locations"],
        },
    },
    {
        "name": "kitchensink",
        "description": "A function with various complex schemas.",
        "parameters": {
            "description": "params object",
            "type": "object",
            "properties": {
                "string": {
                    "type": "string",
                    "title": "STRING",
                    "description": "A string",
                    "examples": ["hello", "world"],
                },
                "string_nullable": {
                    "type": "string",
                    "nullable": True,
                    "description": "A nullable string",
                    "default": "the default",
                },
                "string_enum": {"type": "string", "enum": ["a", "b", "c"]},
                "oneof_string_or_number": {
                    "oneOf": [
                        {"type": "string", "default": "default_string_in_oneof"},
                        {"type": "number", "description": "numbers can happen too"},
                    ],
                    "description": "a oneof",
                    "default": 20,
                },
            },
        },
    },
]
WEATHER_QUESTION = [user("What is the weather like in SF?")]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tool: tool,
        lambda tool: {"type": "function", "function": tool},
        lambda tool: {"type": "function"} | tool,
        lambda tool: tool | {"parameters": tool.get("parameters", {"type": "object", "properties": {}})},
        lambda tool: tool | {"strict": False, "parameters": tool.get("parameters", {})},
    ],
)
def test_functions_from_json(encoding, write, wrap):
    """Guards schemas on their way to TypeScript against openai/harmony's golden, in each form that tools come in."""
    tools = read_tools(write([wrap(tool) for tool in FUNCTIONS]))
    settings = Settings(
        reasoning_effort="high", current_date="2025-06-28", instructions="Always respond in riddles", tools=tools
    )
    assert render(WEATHER_QUESTION, settings) == golden_ids(encoding, "test_render_functions_with_parameters")


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({}, "a?: any,"),
        ({"type": ["string", "null"]}, "a?: string | null,"),
        ({"type": "array"}, "a?: Array<any>,"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "a?: string | null,"),
        ({"type": "integer", "enum": [1, 2], "default": 1}, "a?: 1 | 2, // default: 1"),
        ({"type": "string", "description": "für\nspäter"}, "// für\n// später\na?: string,"),
        ({"type": "object", "properties": {"größe": {"type": "number"}}, "required": ["größe"]}, "größe: number,"),
        ({"type": "string", "default": FORGED}, f'// default: "{FORGED}"'),
        (True, "a?: any,"),
    ],
)
def test_odd_schemas(encoding, write, schema, text):
    """Guards against a schema that stops the rendering, or whose text becomes control tokens."""
    tool = {"name": "f", "description": "one\ntwo", "parameters": {"type": "object", "properties": {"a": schema}}}
    ids = render([], Settings(tools=read_tools(write([tool]))), for_completion=False)
    rendered = encoding.decode(ids)
    assert "// one\n// two\ntype f = (_: {\n" in rendered
    assert text in rendered
    assert [i for i in ids if i >= tokenizer.STARTOFTEXT] == [tokenizer.START, tokenizer.MESSAGE, tokenizer.END] * 2


def test_response_format_from_json(write):
    """Guards OpenAI's form of a response format, and that `text` asks for nothing."""
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    inner = {"name": "r", "description": "d", "schema": schema, "strict": False}
    document = {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "text"}}
    assert from_json(document).settings == {}
    document["response_format"] = {"type": "json_schema", "json_schema": inner}
    assert from_json(document).settings == {"response_format": ResponseFormat("r", schema, "d", strict=False)}
    assert read_response_format(write(document["response_format"])) == ResponseFormat("r", schema, "d", strict=False)
    path = write([])
    with pytest.raises(ValueError) as error:
        read_response_format(path)
    assert (
        str(error.value)
        == f"{path}: response_format is [], expected an object with some of type, json_schema, regex, lark"
    )


def test_instructions_in_front_are_joined():
    """Guards a second system message, which the published chat template drops without a word."""
    documents = [
        {"role": "system", "content": "One."},
        {"role": "developer", "content": [{"type": "text", "text": "Two."}]},
        {"role": "user", "content": "Hi", "name": "ann"},
    ]
    conversation = from_json(documents)
    assert conversation.settings == {"instructions": "One.\n\nTwo."}
    assert conversation.messages[0].author.name == "ann"


def test_arguments_that_are_not_json_are_kept():
    """Guards a model's broken call: the history shows what it wrote."""
    documents = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [chat_call("f", '{"a": ', "1")], "content": ""},
    ]
    assert list(from_json(documents).messages) == [user("x"), call("functions.f", '{"a": ')]


USER = {"role": "user", "content": "x"}
CALLING = {"role": "assistant", "tool_calls": [chat_call("f", "{}", "1"), chat_call("g", "{}", "2")]}
SYSTEM_DOCUMENT = {"role": "system", "content": [{"type": "system_content"}]}


def one(document):
    """A chat whose second message is `document`."""
    return [USER, document]


def first(document):
    """A conversation in harmony's JSON whose second message is `document`."""
    return [SYSTEM_DOCUMENT, document]


def tooled(tool):
    """A document with one tool."""
    return {"messages": [USER], "tools": [tool]}


def formatted(response_format):
    """A document with a response format."""
    return {"messages": [USER], "response_format": response_format}


REFUSED = [
    # the document
    (5, "the file is 5, expected an object with some of messages, tools, response_format, reasoning_effort"),
    ({}, "the file has no 'messages', or an empty one"),
    ([], "messages: got [], expected a list that is not empty"),
    ({"messages": "x"}, "messages: got 'x', expected a list that is not empty"),
    ({"conversation": [USER], "messages": [USER]}, "the file holds both 'conversation' and 'messages', expected one"),
    (
        {"messages": [USER], "tool_choice": "required", "temperature": 0.0},
        "the file has 'tool_choice', 'temperature', expected only messages, tools, response_format, reasoning_effort: "
        "put what it says in one of these, or take it out if it does not matter",
    ),
    ({"messages": [USER], "reasoning_effort": "extreme"}, "reasoning_effort is 'extreme', expected one of low, medium"),
    ({"messages": [USER], "reasoning_effort": ["low"]}, "reasoning_effort is ['low'], expected text"),
    ([{"role": "user", "content": "a\ud800"}], "the file, [0], 'content' holds half a surrogate pair"),
    ([{"role": "user", "content": "a", "\udc00": 1}], "a key in the file, [0] holds half a surrogate pair"),
    # chat
    (one("x"), "message 1 has role None, expected one of system, developer, user, assistant, tool"),
    (one({"content": "x"}), "message 1 has role None, expected one of system, developer, user, assistant, tool"),
    (one({"role": "critic", "content": "x"}), "message 1 has role 'critic', expected one of system, developer,"),
    (one({"role": ["user"], "content": "x"}), "message 1 has role ['user'], expected one of"),
    (one({"role": "user", "content": None}), "message 1 has no 'content', or an empty one"),
    (one({"role": "user", "content": 5}), "message 1, content is 5, expected text"),
    (
        one({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}),
        "message 1 has a content part of type 'image_url', expected 'text': the model reads no other",
    ),
    (one({"role": "user", "content": [{"type": "text", "text": 1}]}), "message 1, text is 1, expected text"),
    (one({"role": "user", "content": ["x"]}), "message 1 has a content part of type None, expected 'text'"),
    (one({"role": "user", "content": "x", "name": "a b"}), "message 1 in harmony's terms: name is 'a b', expected one"),
    (one({"role": "user", "content": "x", "name": 1}), "message 1, name: Input should be a valid string"),
    (
        one({"role": "assistant", "content": "x", "audio": {"id": "1"}}),
        "message 1 has 'audio', expected only role, content, refusal, reasoning, reasoning_content, thinking,",
    ),
    (
        one({"role": "assistant", "content": "x", "thinking": "a", "reasoning": "b"}),
        "message 1 has several keys for reasoning that differ, expected one of reasoning, reasoning_content, thinking",
    ),
    (one({"role": "assistant", "content": "x", "thinking": 1}), "message 1, thinking is 1, expected text"),
    (one({"role": "assistant", "tool_calls": 5}), "message 1, tool_calls: got 5, expected a list that is not empty"),
    (
        one({"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]}),
        "message 1, tool call 0 has type 'custom', expected 'function'",
    ),
    (
        one({"role": "assistant", "tool_calls": [{"type": "mcp", "function": {}}]}),
        "message 1, tool call 0 has type 'mcp', expected 'function'",
    ),
    (one({"role": "assistant", "tool_calls": [{"id": "1"}]}), "message 1, tool call 0 has no 'function', or an empty"),
    (
        one({"role": "assistant", "tool_calls": [chat_call("f<|end|>", "{}", "1")]}),
        "message 1, tool call 0: recipient is 'functions.f<|end|>', expected one word without <, | and >",
    ),
    (
        one({"role": "assistant", "tool_calls": [chat_call("functions.", "{}", "1")]}),
        "message 1, tool call 0 has a name that names no function",
    ),
    (
        one({"role": "system", "content": "x"}),
        "message 1 has role 'system' after others, expected it in front: move it there, or write the conversation "
        "as harmony JSON",
    ),
    # tool results in a chat
    (
        one({"role": "tool", "name": "f", "content": "x"}),
        "message 1 answers name 'f', but waiting for a result: no call",
    ),
    (
        [USER, CALLING, {"role": "tool", "content": "x"}],
        "message 2 answers a call it does not name, but waiting for a result: functions.f (1), functions.g (2)",
    ),
    (
        [USER, CALLING, {"role": "tool", "tool_call_id": "9", "content": "x"}],
        "message 2 answers id '9', but waiting for a result: functions.f (1), functions.g (2)",
    ),
    (
        [USER, CALLING, {"role": "tool", "tool_call_id": "1", "name": "g", "content": "x"}],
        "message 2 answers name 'g' and id '1', but waiting for a result: functions.f (1), functions.g (2)",
    ),
    (
        [USER, CALLING, *[{"role": "tool", "tool_call_id": "1", "content": "x"}] * 2],
        "message 3 answers id '1', but waiting for a result: functions.g (2)",
    ),
    ([USER, CALLING, USER, {"role": "tool", "name": "f", "content": "x"}], "message 3 answers name 'f', but waiting"),
    # harmony's own
    (first({"role": "user"}), "message 1, content: got None, expected text or a list"),
    (first({"role": "human", "content": "x"}), "message 1, role: Input should be 'user', 'assistant', 'system', 'dev"),
    (first("x"), "message 1 is 'x', expected an object with some of role, name, content, channel, recipient,"),
    (first({"role": "user", "content": 5}), "message 1, content: got 5, expected text or a list"),
    (
        first({"role": "user", "content": [5]}),
        "message 1 has a content part of type None, expected one of text, system",
    ),
    (first({"role": "user", "content": [{"type": "image"}]}), "message 1 has a content part of type 'image', expected"),
    (
        first({"role": "user", "content": [{"type": ["text"]}]}),
        "message 1 has a content part of type ['text'], expected",
    ),
    (first({"role": "user", "content": [{"type": "text"}]}), "message 1, text: Field required"),
    (first(CALLING), "message 1 has 'tool_calls', expected only role, name, content, channel, recipient, content_type"),
    (first({"role": "assistant", "content": "x", "channel": 5}), "message 1, channel: Input should be a valid string"),
    (first({"role": "assistant", "content": "x", "channel": "a b"}), "message 1: channel is 'a b', expected one word"),
    (first({"role": "tool", "content": "x"}), "message 1: the tool's name is None, expected one such as"),
    (first({"role": "tool", "name": "system", "content": "x"}), "message 1: the tool's name is 'system', expected one"),
    (first(SYSTEM_DOCUMENT | {"role": "user"}), "message 1 has role 'user', but its content is a system message's"),
    (
        [{"role": "system", "content": [{"type": "system_content", "reasoning_effort": "high"}]}],
        "message 0, reasoning_effort: Input should be 'Low', 'Medium' or 'High'",
    ),
    (
        [{"role": "system", "content": [{"type": "system_content", "effort": "High"}]}],
        "message 0 has 'effort', expected only type, model_identity, reasoning_effort, conversation_start_date,",
    ),
    (
        [{"role": "developer", "content": [{"type": "developer_content", "tools": {"f": {"name": "f", "tools": 1}}}]}],
        "message 0, tools.f.tools: Input should be a valid list",
    ),
    (
        [
            {
                "role": "developer",
                "content": [
                    {"type": "developer_content", "tools": {"f": {"name": "f", "tools": [], "description": "", "x": 1}}}
                ],
            }
        ],
        "message 0, tools has 'x', expected only name, description, tools: put what",
    ),
    # tools and response formats
    (tooled(5), "tool 0 is 5, expected an object with some of type, name, description, parameters, strict"),
    (tooled({"type": "browser"}), "tool 0 has type 'browser', expected 'function'; built-in tools are a setting"),
    (tooled({"type": "function", "function": {}}), "tool 0 has no 'name', or an empty one"),
    (tooled({"type": "function", "function": None}), "tool 0 has no 'function', or an empty one"),
    (
        tooled({"name": "f", "strict": "yes"}),
        "tool 0, strict: got 'yes', expected true or false",
    ),
    (tooled({"name": "f", "parameters": "x"}), "tool 0, parameters: Input should be a valid dictionary"),
    (tooled({"name": 5}), "tool 0, name: Input should be a valid string"),
    (tooled({"name": "f g"}), "a name in tools is 'f g', expected letters, digits, and _ . - only"),
    ({"messages": [USER], "tools": [{"name": "f"}, {"name": "f"}]}, "tools holds 'f' 2 times, expected once"),
    ({"messages": [USER], "tools": {}}, "tools: got {}, expected a list that is not empty"),
    (formatted("json"), "response_format is 'json', expected an object with some of type, json_schema"),
    (
        formatted({"type": "xml"}),
        "response_format has type 'xml', expected 'json_schema', 'json_object', 'text', 'regex' or 'lark'",
    ),
    (formatted({"type": "regex"}), "response_format has no 'regex', or an empty one"),
    (formatted({"type": "json_object", "regex": "a"}), "response_format of type 'json_object' has 'regex', expected"),
    (formatted({"type": "json_schema"}), "response_format has no 'json_schema', or an empty one"),
    (formatted({"type": "json_schema", "json_schema": {"name": "r"}}), "response_format has no 'schema', or an empty"),
    (
        formatted({"type": "json_schema", "json_schema": {"name": "r", "schema": 1}}),
        "response_format, schema: got 1, expected an object",
    ),
    (
        formatted({"type": "json_schema", "json_schema": {"name": "r", "schema": {}, "strict": 1}}),
        "response_format, strict: got 1, expected true or false",
    ),
    (
        formatted({"type": "json_schema", "json_schema": {"name": "r s", "schema": {}}}),
        "a name in response_format is 'r s', expected letters, digits, and _ . - only",
    ),
]


@pytest.mark.parametrize(("document", "text"), REFUSED)
def test_what_is_refused(write, document, text):
    """Guards against a key that is ignored, a guess, a traceback: the file, the place and the remedy in one line."""
    path = write(document)
    with pytest.raises(ValueError) as error:
        read_messages(path)
    assert str(error.value).startswith(f"{path}: {text}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('{"messages": [\n  {"role": }]}', ", line 2, column 12: Expecting value; expected JSON"),
        ("", ", line 1, column 1: Expecting value; expected JSON"),
        ("[" * 100_000, " is nested too deeply, at most 64 levels are taken"),
        ('{"a":' * 70 + "1" + "}" * 70, ": the value is nested too deeply, at most 64 levels are taken"),
        ('[{"role": "user", "role": "tool"}]', ": the key 'role' stands twice in one object"),
        ('{"tools": [1e999]}', ": the file, 'tools', [0] is a number out of range"),
        ('[{"role": "user", "content": NaN}]', ": the file, [0], 'content': NaN is no JSON"),
        (
            '{"tools": [' + "9" * 5000 + "]}",
            ": a number of 5000 digits is out of range",
        ),
        (
            '[{"role": "user", "' + "k" * 9999 + '": 1e999}]',
            f": the file, [0], '{'k' * 59}... is a number out of range",
        ),
        ('{"' + "k" * 9999 + '": 1, "' + "k" * 9999 + '": 1}', f": the key '{'k' * 59}... stands twice in one object"),
    ],
)
def test_broken_json(write, content, text):
    """Guards the place in the file, and the stack."""
    path = write(content)
    with pytest.raises(ValueError) as error:
        read_messages(path)
    assert str(error.value) == f"{path}{text}"


def test_files_that_are_no_text(tmp_path, monkeypatch, write):
    """Guards bytes that are no UTF-8, a file that would fill the memory, one with a byte-order mark, and none."""
    path = tmp_path / "latin1.json"
    path.write_bytes('["ü"]'.encode("latin-1"))
    with pytest.raises(ValueError) as error:
        read_messages(path)
    assert str(error.value).startswith(f"{path}: the file is not valid UTF-8 at byte 2; if it is in Windows' older")
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([USER]).encode())
    assert list(read_messages(path).messages) == [user("x")]
    with pytest.raises(FileNotFoundError):
        read_messages(tmp_path / "none.json")
    monkeypatch.setattr(json_values, "MAX_FILE_BYTES", 1 << 20)
    path = write([USER | {"content": "x" * (1 << 20)}])
    with pytest.raises(ValueError) as error:
        read_messages(path)
    assert str(error.value) == f"{path}: the file is larger than 1 MiB, which no context holds"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ["content", "name", "channel", "recipient", "tool_calls", "tool_call_id", "thinking", "content_type"]
CALLS = st.lists(st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": JSON, "arguments": JSON})}) | JSON)
VALUES = st.sampled_from(["f", "final", [{"type": "text", "text": "x"}], [chat_call("f", "{}", "f")]]) | JSON | CALLS
ROWS = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system", "developer"])},
    optional={name: VALUES for name in FIELDS},
)
TOOLS = st.lists(st.fixed_dictionaries({"name": JSON}, optional={"parameters": JSON, "function": JSON}) | JSON)


@given(
    document=JSON
    | st.lists(ROWS, max_size=4)
    | st.fixed_dictionaries(
        {"messages": st.lists(ROWS, max_size=3)},
        optional={"tools": TOOLS, "response_format": JSON, "reasoning_effort": JSON},
    )
)
def test_any_json_is_read_or_refused(document):
    """Guards against a traceback on JSON of another shape: whatever is read can be rendered and written again."""
    try:
        conversation = from_json(document)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    assert ids_of(conversation)
    if conversation.messages:  # there may be instructions alone
        assert from_json(to_json(conversation.messages)).messages == conversation.messages


# A chat that waits for two results, one of a function called twice.
WAITING = Conversation(
    (user("x"), call("functions.f", "1"), call("functions.g", "2"), call("functions.f", "3")), {}, {1: "a", 3: "c"}
)


@pytest.mark.parametrize(
    "results",
    [
        [("name", "f", "one"), ("name", "g", "two"), ("name", "functions.f", "three")],
        [("tool_call_id", "c", "three"), ("name", "g", "two"), ("tool_call_id", "a", "one")],
    ],
)
def test_tool_results_answer_their_calls_in_order(write, results):
    """Guards results given in another order than the calls: harmony has no ids, so the model would confuse them."""
    path = write([{key: value, "content": content} for key, value, content in results])
    answers = read_tool_results(path, WAITING)
    assert answers == [result("functions.f", "one"), result("functions.g", "two"), result("functions.f", "three")]
    assert call_results([*WAITING.messages, *answers]) == {1: 4, 2: 5, 3: 6}


def test_a_single_call_needs_no_name_and_any_json_will_do(write):
    """Guards the simplest file, content that is not text, and where a built-in tool's result goes."""
    waiting = Conversation((user("x"), call("functions.f", "{}")))
    answers = read_tool_results(write([{"content": {"sunny": True, "über": [1.5, None]}}]), waiting)
    assert answers == [result("functions.f", '{"sunny": true, "über": [1.5, null]}')]
    assert tool_results([{"content": []}], waiting) == [result("functions.f", "[]")]
    search = Conversation((user("x"), call("browser.search", "{}", "analysis", "code")))
    path = write([{"name": "browser.search", "content": "page"}])
    assert read_tool_results(path, search) == [result("browser.search", "page", "analysis")]


@pytest.mark.parametrize(
    ("results", "text"),
    [
        ([], "tool results: got [], expected a list that is not empty"),
        ([{"content": "x"}], "result 0 answers a call it does not name, but waiting for a result: functions.f (a), f"),
        (
            [{"name": "h", "content": "x"}],
            "result 0 answers name 'h', but waiting for a result: functions.f (a), funct",
        ),
        (
            [{"name": "g", "content": "x"}] * 2,
            "result 1 answers name 'g', but waiting for a result: functions.f (a), f",
        ),
        ([{"name": "g", "content": "x"}], "without a result: functions.f (a), functions.f (c); give one for each call"),
        ([{"name": "g"}], "result 0 has no 'content'"),
        (
            [{"name": "g", "content": "x", "is_error": True}],
            "result 0 has 'is_error', expected only tool_call_id, name,",
        ),
        (["x"], "result 0 is 'x', expected an object with some of tool_call_id, name, tool_name, content"),
    ],
)
def test_tool_results_that_fit_no_call(write, results, text):
    """Guards against a result that the model takes for another call's, or that gets lost."""
    path = write(results)
    with pytest.raises(ValueError) as error:
        read_tool_results(path, WAITING)
    assert str(error.value).startswith(f"{path}: {text}")


def test_no_call_waits(write):
    """Guards a result given to a finished conversation."""
    with pytest.raises(
        ValueError, match=r"result 0 answers a call it does not name, but waiting for a result: no call"
    ):
        read_tool_results(write([{"content": "x"}]), Conversation((user("x"), say("y", "final"))))


def test_tools_file_errors_name_the_file(write):
    """Guards `read_tools` against errors that do not say where they come from."""
    path = write({"tools": []})
    with pytest.raises(ValueError) as error:
        read_tools(path)
    assert str(error.value) == f"{path}: tools: got {{'tools': []}}, expected a list that is not empty"


def test_a_parsed_answer_goes_on_as_history(encoding):
    """Guards the chat loop: prompt, sampled ids and their parsed messages, rendered again, are the same ids."""
    prompt = [user("2 + 2?")]
    text = (
        "<|channel|>analysis<|message|>Add.<|end|><|start|>assistant to=functions.add<|channel|>commentary "
        "<|constrain|>json<|message|>[2, 2]<|call|>"
    )
    sampled = encoding.encode(text, allowed_special="all")
    answer = parser.parse(sampled, tokenizer.load_tokenizer())
    history = [*prompt, *from_parsed(answer.messages)]
    assert render(history, None, for_completion=False) == render(prompt, None) + sampled


@pytest.mark.parametrize(
    ("parsed", "header"),
    [
        (parsed.Message("assistant", "x", channel="a<|b", recipient="f g"), "assistant to=f_g<|channel|>a_b"),
        (parsed.Message("assistant", "x", content_type="<|constrain|>j|s"), "assistant <|constrain|>j_s"),
        (parsed.Message("user", "x", content_type="<|constrain|>json"), "user _constrain_json"),
        (parsed.Message("tool", "x", name="system:<a>"), "system__a_"),
        (parsed.Message("tool", "x"), "unnamed"),
        (parsed.Message("assistant", "x", channel="", content_type="<|constrain|>"), "assistant"),
    ],
)
def test_a_damaged_header_does_not_end_a_chat(encoding, parsed, header):
    """Guards a chat against a header the model got wrong: it is made harmless, not refused."""
    ids = render(from_parsed([parsed]), None, for_completion=False)
    assert encoding.decode(ids).startswith(f"<|start|>{header}<|message|>x<|")


def test_what_is_written_is_read_back(tmp_path):
    """Guards saved conversations, their letters too."""
    said = [Message.from_role_and_content(Role.USER, "Grüße 🙂")]
    messages.write_messages(tmp_path / "chat.json", said)
    assert list(messages.read_messages(tmp_path / "chat.json").messages) == said


def test_a_thought_alone_is_no_answer():
    """Guards a thought that was cut, as clients keep it, against an empty answer, behind which it is dropped."""
    for thought in ({"reasoning": "t", "content": ""}, {"reasoning_content": "t", "content": []}, {"thinking": "t"}):
        conversation = messages.from_json([{"role": "user", "content": "Hi"}, {"role": "assistant", **thought}])
        assert conversation.messages[1:] == (say("t", "analysis"),)


def test_what_was_cut_is_so_when_it_is_read_again(write):
    """Guards a saved conversation against a turn that was cut and passes for one that ended."""
    cut = from_parsed([parsed.Message("assistant", "Half an", "final", is_cut=True)])
    path = write(messages.to_json(cut))
    assert json.loads(path.read_text())[0]["is_cut"] is True
    read = read_messages(path).messages
    assert (list(read), [type(message) for message in read]) == (cut, [CutMessage])
    whole = from_parsed([parsed.Message("assistant", "Half an", "final")])
    assert "is_cut" not in messages.to_json(whole)[0]
    with pytest.raises(ValueError, match=r"message 0, is_cut: got 'yes', expected true or false"):
        messages.from_json([{"role": "assistant", "channel": "final", "content": "x", "is_cut": "yes"}])


def test_what_clients_write_around_an_answer_is_taken():
    """Guards common client JSON: a refusal is the answer, legacy and Ollama's calls, empty extras, unused keys."""
    asked = {"role": "user", "content": "Hi"}
    for answer in (
        {"content": None, "refusal": "I can't."},
        {"content": [{"type": "refusal", "refusal": "I can't."}]},
        {"content": "I can't.", "refusal": None, "provider_specific_fields": {}, "audio": None, "annotations": []},
        {"content": "I can't.", "reasoning": "", "reasoning_content": None, "thinking": ""},
    ):
        conversation = messages.from_json([asked, {"role": "assistant", **answer}])
        assert conversation.messages[1:] == (say("I can't.", "final"),)
    legacy = [
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "1"},
    ]
    ollama = [
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "tool_name": "f", "content": "1"},
    ]
    for answer in (legacy, ollama):
        conversation = messages.from_json([asked, *answer])
        assert [m.recipient for m in conversation.messages[1:]] == ["functions.f", "assistant"]
        (content,) = conversation.messages[1].content
        assert isinstance(content, TextContent) and content.text == "{}"
        assert conversation.messages[2].author.name == "functions.f"
    with pytest.raises(ValueError, match="several keys for reasoning that differ"):
        messages.from_json([asked, {"role": "assistant", "content": "a", "reasoning": "b", "thinking": "c"}])


def spoken(conversation):
    """Author, recipient, channel and text of each message."""
    rows = json.loads(json.dumps(to_json(conversation.messages)))
    return [
        (row["name"] or row["role"], row["recipient"], row["channel"], "".join(part["text"] for part in row["content"]))
        for row in rows
    ]


ASKED = ("user", None, None, "x")
SPOKEN_CALLS = {
    "a": ("assistant", "functions.f", "commentary", '{"a": 1}'),
    "b": ("assistant", "functions.f", "commentary", '{"b": 2}'),
}
SPOKEN_CALLS |= {"c": ("assistant", "functions.g", "commentary", "{}")}
CHAT_CALLS = {"a": chat_call("f", {"a": 1}, "a"), "b": chat_call("f", {"b": 2}, "b"), "c": chat_call("g", None, "c")}


def answered(call_id, name="functions.f"):
    """A result as harmony has it."""
    return (name, "assistant", "commentary", f"result of {call_id}")


@pytest.mark.parametrize(
    "ended", [[], [USER], [{"role": "assistant", "content": "hm"}]], ids=["open", "user", "assistant"]
)
@pytest.mark.parametrize("order", ["abc", "ba", "cab"])
@pytest.mark.parametrize("given", ["", "a", "b", "c", "ab", "bc"])
def test_calls_may_be_left_without_a_result(order, given, ended):
    """Guards a user who goes on before all tools have answered, and results read as those of another call."""
    results = [
        {"role": "tool", "tool_call_id": each, "content": f"result of {each}"} for each in given if each in order
    ]
    calling = {"role": "assistant", "content": None, "tool_calls": [CHAT_CALLS[each] for each in order]}
    conversation = from_json([USER, calling, *results, *ended])
    first = [each for each in order if each in given]
    calls = [*first, *(each for each in order if each not in given)] if first else list(order)
    names = {"c": "functions.g"}
    expected = [
        ASKED,
        *(SPOKEN_CALLS[each] for each in calls),
        *(answered(e, names.get(e, "functions.f")) for e in first),
    ]
    found = spoken(conversation)
    assert found[: len(expected)] == expected
    assert len(found) == len(expected) + len(ended)
    assert conversation.call_ids == {1 + place: each for place, each in enumerate(calls)}
    pairs = call_results(conversation.messages)
    assert {call: result for call, result in pairs.items() if result} == {
        1 + place: 1 + len(calls) + place for place in range(len(first))
    }


def test_long_conversations_are_read_in_linear_time():
    """Guards against seconds for every thousand turns: each result looks for its call in its own turn."""
    turn = [USER, {"role": "assistant", "tool_calls": [CHAT_CALLS["a"]]}]
    turn += [{"role": "tool", "tool_call_id": "a", "content": "y"}, {"role": "assistant", "content": "z"}]
    start = time.process_time()
    assert len(from_json(turn * 500).messages) == 2000
    assert time.process_time() - start < 2


def test_the_rest_of_the_results_follow():
    """Guards --tool-results on a file that holds some of the results already."""
    calling = {"role": "assistant", "tool_calls": [CHAT_CALLS["a"], CHAT_CALLS["b"]]}
    conversation = from_json([USER, calling, {"role": "tool", "tool_call_id": "b", "content": "result of b"}])
    rest = tool_results([{"tool_call_id": "a", "content": "result of a"}], conversation)
    assert spoken(Conversation((*conversation.messages, *rest)))[1:] == [
        SPOKEN_CALLS["b"],
        SPOKEN_CALLS["a"],
        answered("b"),
        answered("a"),
    ]


@pytest.mark.parametrize("arguments", [{}, *({"arguments": value} for value in (None, "", " ", "null", {}, []))])
def test_no_arguments(arguments):
    """Guards calls of functions that take nothing, however a client writes that."""
    call_document = {"id": "1", "function": {"name": "f", **arguments}}
    conversation = from_json([USER, {"role": "assistant", "tool_calls": [call_document]}])
    assert spoken(conversation)[1:] == [("assistant", "functions.f", "commentary", "{}")]


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": []}])
def test_a_tool_may_give_nothing(content):
    """Guards the result of a command without output."""
    calling = {"role": "assistant", "tool_calls": [CHAT_CALLS["a"]]}
    conversation = from_json([USER, calling, {"role": "tool", "tool_call_id": "a", **content}])
    assert spoken(conversation)[2:] == [("functions.f", "assistant", "commentary", "")]
    conversation = from_json([USER, calling, {"role": "tool", "tool_call_id": "a", "content": {"id": 1}}])
    assert spoken(conversation)[2:] == [("functions.f", "assistant", "commentary", '{"id": 1}')]


@pytest.mark.parametrize(
    ("answer", "channels"),
    [
        ({"content": ""}, []),
        ({"content": None}, []),
        ({}, []),
        ({"content": "", "reasoning": "t"}, ["analysis"]),
        ({"content": None, "thinking": "t"}, ["analysis"]),
        ({"content": "a", "reasoning": "t"}, ["analysis", "final"]),
        ({"content": "", "tool_calls": [CHAT_CALLS["a"]]}, ["commentary"]),
    ],
)
def test_an_assistant_that_says_little(answer, channels):
    """Guards against an empty final where a thought was cut, and a refusal where nothing was said."""
    conversation = from_json([USER, {"role": "assistant", **answer}, USER])
    assert [message.channel for message in conversation.messages[1:-1]] == channels
    left_out = () if channels else ("left out, since the assistant says nothing there: message 1",)
    assert conversation.remarks == left_out


@pytest.mark.parametrize("name", ["functions.get_weather", "get_weather"])
def test_a_name_with_its_namespace(name):
    """Guards against `functions.functions.get_weather`, in calls, results and tools."""
    calling = {"role": "assistant", "tool_calls": [chat_call(name, "{}", "1")]}
    conversation = from_json(
        {
            "messages": [USER, calling, {"role": "tool", "name": name, "content": "3"}],
            "tools": [WEATHER | {"name": name}],
        }
    )
    assert [row[:2] for row in spoken(conversation)[1:]] == [
        ("assistant", "functions.get_weather"),
        ("functions.get_weather", "assistant"),
    ]
    assert conversation.settings["tools"][0].name == "get_weather"


def test_keys_that_change_nothing_are_named_once():
    """Guards clients that send what they keep, and against a line for each of a thousand messages."""
    part = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
    function = {"index": 0, "name": "f", "arguments": {"id": 1, "model": "kept", "_x": 2}}
    calling = {"id": "m1", "role": "assistant", "tool_calls": [{"id": "c", "index": 0, "function": function}]}
    answer = {"role": "assistant", "content": '{"a": 1}', "parsed": {"a": 1}, "text": '{"a": 1}', "created_at": 5}
    document = {
        "model": "m",
        "tool_choice": "auto",
        "messages": [
            {"role": "user", "content": [part], "type": "message", "parts": [{"text": "x"}]},
            calling,
            {"role": "tool", "tool_call_id": "c", "content": [part], "metadata": {}},
            answer,
        ],
        "tools": [{"type": "function", "function": WEATHER, "cache_control": {}, "x-order": 1}],
    }
    conversation = from_json(document)
    assert spoken(conversation) == [
        ASKED,
        ("assistant", "functions.f", "commentary", '{"id": 1, "model": "kept", "_x": 2}'),
        ("functions.f", "assistant", "commentary", "x"),
        ("assistant", None, "final", '{"a": 1}'),
    ]
    assert conversation.call_ids == {1: "c"}
    assert conversation.remarks == (
        "ignored, since the prompt has no place for it: 'model', 'tool_choice', 'cache_control', 'type', 'parts', "
        "'id', 'index', 'parsed', 'text', 'created_at', 'x-order'",
    )


def test_keys_that_say_once_more_what_is_there():
    """Guards LiteLLM's thinking blocks, OpenAI's parsed arguments and a refusal that is the content too."""
    thought = {"thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "s"}]}
    function = {"name": "f", "arguments": '{"a": 1}', "parsed_arguments": {"a": 1}}
    document = [
        USER | {"example": False},
        {"role": "assistant", "content": "No.", "refusal": "No.", "reasoning_content": "hm", **thought},
        USER,
        {"role": "assistant", "tool_calls": [{"id": "c", "function": function}]},
    ]
    assert [row[-1] for row in spoken(from_json(document))[1:]] == ["hm", "No.", USER["content"], '{"a": 1}']
    function["parsed_arguments"], function["arguments"] = {"a": 2}, {"a": 1}
    with pytest.raises(ValueError, match="has 'parsed_arguments', expected only name, arguments"):
        from_json(document)


@pytest.mark.parametrize("content", [[{"id": 7, "status": "open"}], [{"type": "a", "id": 7}, {}], [1, "b"]])
def test_a_list_of_a_tools_own_is_its_result(content):
    """Guards data that a tool gives as a list, and its keys, some of which clients write around messages too."""
    call = {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f"}}]}
    conversation = from_json([USER, call, {"role": "tool", "tool_call_id": "c", "content": content}])
    assert json.loads(spoken(conversation)[-1][-1]) == content
    assert conversation.remarks == ()


@pytest.mark.parametrize(
    ("document", "key"),
    [
        ([USER | {"text": "y"}], "text"),
        ([USER | {"parts": [{"text": "y"}]}], "parts"),
        ([USER, {"role": "assistant", "content": "[1]", "parsed": [2]}], "parsed"),
        ([USER | {"prefix": True}], "prefix"),
        ([USER | {"parts": [{"text": USER["content"]}, {"type": "image", "url": "y"}]}], "parts"),
        (
            [USER, {"role": "assistant", "content": "x", "thinking": "t", "thinking_blocks": [{"text": "u"}]}],
            "thinking_blocks",
        ),
        ([USER | {"type": "reasoning"}], "type"),
        ([USER | {"images": ["aGk="]}], "images"),
        ({"messages": [USER], "tool_choice": "none"}, "tool_choice"),
        ({"messages": [USER], "options": {"temperature": 0}}, "options"),
        ({"messages": [USER], "think": "high"}, "think"),
        ([USER | {"content": [{"type": "text", "text": "x", "image": "y"}]}], "image"),
    ],
)
def test_keys_that_may_change_the_meaning_are_refused(document, key):
    """Guards against words, pictures or settings that never reach the model."""
    with pytest.raises(GptossError, match=f"has '{key}', expected only"):
        from_json(document)


def test_parts_of_both_interfaces():
    """Guards text under OpenAI's newer names for it."""
    parts = [{"type": "input_text", "text": "x"}]
    answer = [{"type": "output_text", "text": "y", "annotations": []}]
    conversation = from_json([{"role": "user", "content": parts}, {"role": "assistant", "content": answer}])
    assert spoken(conversation) == [ASKED, ("assistant", None, "final", "y")]


def test_what_is_said_twice_is_said_once():
    """Guards legacy calls beside the new ones, and OpenRouter's reasoning details."""
    called = {"name": "f", "arguments": "{}"}
    twice = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "function": called}],
        "function_call": called,
    }
    assert len(from_json([USER, twice]).messages) == 2
    details = [{"type": "reasoning.text", "text": "th"}, {"type": "reasoning.summary", "summary": "ink"}]
    for reasoning in ({}, {"reasoning": "think"}):
        answer = {"role": "assistant", "content": "a", "reasoning_details": details, **reasoning}
        assert spoken(from_json([USER, answer]))[1] == ("assistant", None, "analysis", "think")
    with pytest.raises(GptossError, match="several keys for reasoning that differ"):
        from_json([USER, {"role": "assistant", "content": "a", "reasoning_details": details, "reasoning": "b"}])


def test_remarks_on_tools_and_results(write):
    """Guards the lines that name what was ignored in the other two files."""
    remarks = []
    read_tools(write([{"type": "function", "function": WEATHER, "id": "t"}]), remarks)
    waiting = Conversation((user("x"), call("functions.f", "{}")))
    result_document = {"role": "tool", "timestamp": 5, "content": [{"id": "kept"}]}
    assert read_tool_results(write([result_document]), waiting, remarks) == [result("functions.f", '[{"id": "kept"}]')]
    ignored = "ignored, since the prompt has no place for it: "
    assert remarks == [ignored + "'id'", ignored + "'role', 'timestamp'"]


@pytest.mark.parametrize(
    ("text", "effort", "line"),
    [
        ("You are a helper. Reasoning: high", "medium", "'Reasoning: high', but the effort that acts is medium"),
        ("reasoning_effort=LOW", "high", "'reasoning_effort=LOW', but the effort that acts is high"),
        ("**Reasoning:** high", "low", "'Reasoning:** high', but the effort that acts is low"),
        ("Set reasoning to 'high'.", "low", '"reasoning to \'high", but the effort that acts is low'),
        ("Reasoning: medium", "medium", None),
        ("Keep the reasoning low-level.", "medium", None),
        ("Reasoning: highlight it", "medium", None),
        ("Explain your reasoning.", "low", None),
    ],
)
def test_which_effort_acts(text, effort, line):
    """Guards against an effort in the instructions that people think acts: the system message's does."""
    found = render_module.effort_remark(opening(Settings(reasoning_effort=effort, instructions=text)))
    assert found == (line and f"the instructions say {line}")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xef\xbb\xbfWhy?\r\n", "Why?\r\n"),
        ("Why? ü".encode("utf-16"), "UTF-16"),
        (codecs.BOM_UTF16_BE + "Why? 天".encode("utf-16-be"), "UTF-16"),
        ("Why is the sky blue?".encode("utf-16-le"), "UTF-16"),
        ("Why is the sky blue?".encode("utf-16-be"), "UTF-16"),
        ("Why?".encode("utf-32"), "UTF-32"),
        (b"a\0b", "a\0b"),
        (b"", ""),
    ],
)
def test_text_files_of_other_systems(data, text):
    """Guards against marks that reach the model, and UTF-16 that is refused without a remedy."""
    if not text.startswith("UTF-"):
        assert decoded(data, "q.txt") == text
        return
    with pytest.raises(GptossError) as error:
        decoded(data, "q.txt")
    assert str(error.value) == (
        f"q.txt is {text}, expected UTF-8: convert it with `iconv -f {text} -t UTF-8`, or have PowerShell write UTF-8 "
        "(`| Out-File -Encoding utf8 FILE` in place of `> FILE`)"
    )


def test_a_text_without_an_end_is_refused():
    """Guards a device given as a prompt's file, which filled the memory."""
    with pytest.raises(GptossError, match=r"^/dev/zero holds more than 256 MiB, expected a text$"):
        flag_values.read_text("/dev/zero")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_json_in_utf_16_is_refused_with_a_remedy(tmp_path, encoding):
    """Guards conversations and tools that PowerShell wrote."""
    path = tmp_path / "chat.json"
    path.write_bytes(json.dumps([USER]).encode(encoding))
    for read in (read_messages, read_tools, read_response_format):
        with pytest.raises(GptossError, match=r"chat.json: the file is UTF-16, expected UTF-8: convert it with"):
            read(path)
