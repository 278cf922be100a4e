"""Schemas of tools as TypeScript: openai-harmony's text wherever it keeps the shape, ours where it loses it."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai_harmony import DeveloperContent, Message, Role, ToolDescription

from gptoss_jax.errors import GptossError
from gptoss_jax.harmony import typescript
from gptoss_jax.harmony.message_text import body
from tests.library import harmony_encoding

GOLDENS = Path(__file__).parents[1] / "goldens" / "schemas"


@pytest.fixture(scope="module")
def library():
    """openai-harmony itself."""
    return harmony_encoding()


def developer(*tools):
    """A developer message with function tools."""
    return Message.from_role_and_content(Role.DEVELOPER, DeveloperContent().with_function_tools(tools))


def tool(parameters, name="f"):
    """A tool."""
    return ToolDescription(name=name, description="", parameters=parameters)


def written(parameters):
    """Ours."""
    return typescript.parameters_type(parameters, "tool 'f'")


def fields(parameters):
    """Ours, without the braces of the object."""
    return written(parameters).removeprefix("{\n").removesuffix("}")


# ---- what openai-harmony keeps ----

WORDS = st.sampled_from(["a", "city", "für später", "x, y: z", "", "10 %"])
KEYS = st.sampled_from(["a", "b", "city", "größe", "$id", "_x", "class", "enum", "type"])
SCALARS = st.sampled_from([{"type": name} for name in ("string", "number", "integer", "boolean")])
ENUMS = st.lists(st.sampled_from(["a", "b", "c d", "é"]), min_size=1, max_size=3, unique=True).map(
    lambda values: {"type": "string", "enum": values}
)
TYPE_LISTS = st.lists(
    st.sampled_from(["string", "number", "integer", "boolean", "null", "object", "array"]), min_size=1, max_size=3
).map(lambda names: {"type": names})
IGNORED = st.sampled_from([{}, {"minimum": 1}, {"pattern": "^a"}, {"$comment": "x"}, {"format": "date"}])
DEFAULTS = st.sampled_from(["x", "a", 1, 2.5, True, None, [1, "a"], {"k": {"l": False}}])


@st.composite
def annotated(draw, schemas, *, description=True):
    """A schema with comments."""
    found = dict(draw(schemas)) | draw(IGNORED)
    kinds = {"title": WORDS, "examples": st.lists(WORDS, min_size=1, max_size=2), "default": DEFAULTS}
    if description:
        kinds["description"] = WORDS
    return found | draw(st.fixed_dictionaries({}, optional=kinds))


@st.composite
def variants(draw, schemas):
    """A `oneOf`; where the whole has a description, the library drops that of the first variant."""
    found = {"oneOf": draw(st.lists(annotated(schemas), min_size=1, max_size=3))}
    first = dict(found["oneOf"][0])
    first.pop("description", None)
    return {"oneOf": [first, *found["oneOf"][1:]]}


@st.composite
def objects(draw, schemas):
    """An object with fields."""
    properties = draw(st.dictionaries(KEYS, annotated(schemas | variants(schemas)), max_size=3))
    required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
    found = {"type": "object", "properties": properties, "required": required}
    return found | draw(st.sampled_from([{}, {"additionalProperties": False}]))


def arrays(schemas):
    """An array of what is no union."""
    return schemas.map(lambda items: {"type": "array", "items": items}) | st.just({"type": "array"})


SINGLE = st.recursive(SCALARS, lambda inner: arrays(inner) | objects(inner), max_leaves=6)
KEPT = SINGLE | ENUMS | TYPE_LISTS | SCALARS.map(lambda schema: schema | {"nullable": True})


@given(parameters=objects(KEPT) | arrays(SINGLE) | objects(objects(KEPT) | variants(KEPT)))
def test_what_openai_harmony_keeps_is_written_as_there(library, parameters):
    """Guards the text that the model was trained on: comments, commas, indents, order."""
    message = developer(tool(parameters))
    theirs = library.decode(library.render(message)).removesuffix("<|end|>").partition("<|message|>")[2]
    assert body(message, has_functions=True) == theirs


# ---- what it loses ----


@pytest.mark.parametrize("name", ["odd", "top", "pydantic", "nasty"])
def test_goldens_of_what_openai_harmony_loses(library, name):
    """Guards the shape of every field, as the texts beside the schemas have it, which people have read."""
    functions = [each["function"] for each in json.loads((GOLDENS / f"{name}.json").read_text())["tools"]]
    texts = [f"type {each['name']} = (_: {written(each['parameters'])}) => any;\n" for each in functions]
    assert "\n".join(texts) == (GOLDENS / f"{name}.txt").read_text(encoding="utf-8")
    message = developer(*(tool(each["parameters"], each["name"]) for each in functions))
    assert body(message, has_functions=True) != library.decode(library.render(message))


LOST = [
    ({"anyOf": [{"type": "string", "description": "a name"}, {"type": "null"}]}, "x?:\n | string // a name\n | null\n"),
    ({"type": "string", "anyOf": [{"format": "date"}, {"const": "now"}]}, 'x?: string | "now"'),
    ({"oneOf": [{"type": "string"}], "nullable": True}, "x?:\n | string\n | null\n"),
    ({"allOf": [{"type": "object"}, {"type": ["string", "null"]}]}, "x?: {\n    } & (string | null)"),
    ({"type": "object", "properties": {"a": True}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
     "x?: {\na?: any,\n} & ({\n   a: any,\n   } | {\n   b: any,\n   })"),
    ({"type": "array", "items": {"enum": ["a", "b"]}}, 'x?: ("a" | "b")[]'),
    ({"items": {"type": "array", "items": {"type": "string", "nullable": True}}}, "x?: (string | null)[][]"),
    ({"type": "array", "items": {"type": "string", "description": "an id"}}, "x?:     // an id\nstring[]"),
    ({"items": [{"type": "string"}, {"const": 1}], "additionalItems": {"type": "null"}}, "x?: [string, 1, ...null[]]"),
    ({"prefixItems": [{"type": "string"}], "items": {"type": "number"}}, "x?: [string, ...number[]]"),
    ({"type": ["object", "null"], "properties": {"a": {"type": "null"}}}, "x?: {\n    a?: null,\n    } | null"),
    ({"type": "object", "nullable": True, "properties": {"a": {"type": "null"}}}, "x?: {\n    a?: null,\n    } | null"),
    ({"type": "object", "required": ["q"]}, "x?: {\n    q: any,\n    }"),
    ({"patternProperties": {"^x": {"const": 1}}}, 'x?: {\n    // keys that match "^x"\n    [key: string]: 1,\n    }'),
    ({"type": "object", "properties": [], "required": True}, "x: {\n    }"),
    ({"enum": [{"a": 1}, 1.5, "</|>"]}, 'x?: {"a":1} | 1.5 | "</|>"'),
    ({"not": {"const": 1}}, 'x?:     // not: {"const":1}\nany'),
    (False, "x?: never"),
    ({"$ref": "#/$defs/a~1b%20c", "description": "d"}, "// d\nx?: string"),
    ({"$ref": "#"}, "x?: Parameters"),
    ({"$ref": "#", "nullable": True}, "x?: Parameters | null"),
    ({"$ref": "#/$defs/Json"}, "x?: /* Json */ (string | Json[] | {\n   [key: string]: Json,\n   })"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "text"), LOST, ids=[json.dumps(schema) for schema, _ in LOST])
def test_each_way_to_say_a_shape(schema, text):
    """Guards against `any`, `number` or `{}` where the schema says more, and against types that mean another thing."""
    value = [
        {"type": "string"},
        {"items": {"$ref": "#/$defs/Json"}},
        {"additionalProperties": {"$ref": "#/$defs/Json"}},
    ]
    definitions = {"a/b c": {"type": "string"}, "Json": {"anyOf": value}}
    found = written({"type": "object", "$defs": definitions, "properties": {"x": schema}})
    assert found.removeprefix("/* Parameters */ ") == f"{{\n{text},\n}}"


def test_text_stays_in_its_comment_or_quotes():
    """Guards the rest of a type against a line end in a description, an example, a default or a key."""
    schema = {"description": "one\r\ntwo\n", "examples": ["a\nb", 1], "default": 'c"\nd', "type": "string"}
    properties = {"a\nb: c": schema, "x": {"oneOf": [schema | {"default": 1}]}}
    assert fields({"type": "object", "properties": properties}) == (
        "// one\n// two\n// Examples:\n"
        '// - "a\\nb"\n// - 1\n"a\\nb: c"?: string, // default: "c\\"\\nd"\n'
        "x?:\n | string // one two default: 1\n,\n"
    )


def chained(length, link):
    """A schema whose definitions lead from one to the next."""
    definitions = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(length)}
    return {"$defs": definitions | {f"d{length}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def nested(depth):
    """A schema in a schema in a schema."""
    schema = {}
    for _ in range(depth):
        schema = {"properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (chained(20, lambda ref: {"properties": dict.fromkeys("abcdefgh", ref)}), "is longer than 524288 characters"),
        (chained(100_000, lambda ref: ref), "has the reference '#/$defs/d32', which is one of too many in a row"),
        (chained(10_000, lambda ref: {"items": ref}), "is nested too deeply, at most 32 levels are taken"),
        (nested(200), "is nested too deeply, at most 32 levels are taken"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "'#/$defs/a', which leads back to itself"),
    ],
)  # fmt: skip
def test_schemas_that_would_never_end(schema, text):
    """Guards the stack, the memory and the clock against references to references."""
    start = time.process_time()
    with pytest.raises(ValueError) as error:
        written(schema)
    assert text in str(error.value)
    assert len(str(error.value)) < 300
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (
            {"type": "strnig"},
            "has type 'strnig', expected one of string, number, integer, boolean, null, array, object",
        ),
        ({"type": ["string", 5]}, "has type 5, expected one of string"),
        ({"type": "strnig", "enum": ["a"]}, "has type 'strnig', expected one of string"),
        ({"type": "strnig", "const": "a"}, "has type 'strnig', expected one of string"),
        ({"type": "strnig", "anyOf": [{"type": "null"}]}, "has type 'strnig', expected one of string"),
        ({"type": {"a": 1}}, "has type {'a': 1}, expected one of string"),
        ("string", "is 'string', expected a schema"),
        ({"enum": "a"}, "has enum 'a', expected a list"),
        ({"anyOf": {"type": "string"}}, "has anyOf {'type': 'string'}, expected a list"),
        ({"properties": 5}, "has properties 5, expected an object"),
        ({"$ref": "#/$defs/Point"}, "has the reference '#/$defs/Point', expected a place in the same schema"),
        ({"$ref": "https://example.org/point"}, "has the reference 'https://example.org/point', expected a place in"),
        ({"$ref": ["#"]}, "has the reference ['#'], expected a place in the same schema"),
    ],
)
def test_what_is_no_schema_is_refused_by_name(schema, text):
    """Guards against a misspelt type, or a reference to nothing, that reaches the model as `any`."""
    parameters = {"type": "object", "properties": {"spot": {"type": "array", "items": schema}}}
    with pytest.raises(ValueError) as error:
        written(parameters)
    assert str(error.value).startswith(f"tool 'f': parameter 'spot[]' {text}")


# Any keyword with any value: schemas as people mistype them.
LEAVES = st.sampled_from(
    [None, True, False, 0, 1.5, "", "string", "object", "null", "#", "#/$defs/a", "#/properties/a", [], {}]
)
NAMES = st.sampled_from(["a", "b c", "$defs"])
KEYWORDS = ["type", "enum", "const", "required", "description", "title", "default", "examples", "nullable", "$ref"]
KEYWORDS += ["items", "prefixItems", "additionalItems", "additionalProperties", "oneOf", "anyOf", "allOf", "not"]


def any_schema(inner):
    """A schema whose keywords hold anything, above all schemas."""
    values = inner | st.lists(inner, max_size=2)
    keywords: dict[str, Any] = dict.fromkeys(KEYWORDS, values)
    keywords |= dict.fromkeys(
        ["properties", "patternProperties", "$defs"], st.dictionaries(NAMES, inner, max_size=2) | values
    )
    return st.lists(st.sampled_from(sorted(keywords)), max_size=4, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: keywords[name] for name in names})
    )


@given(schema=any_schema(st.recursive(LEAVES, any_schema, max_leaves=8)))
def test_any_schema_is_written_or_refused(schema):
    """Guards against a traceback, or a type that does not end, on schemas that are none."""
    try:
        text = written(schema)
    except GptossError as error:
        assert "\n" not in str(error)
        return
    assert text
    assert all(text.count(left) == text.count(right) for left, right in ("()", "[]", "{}"))
