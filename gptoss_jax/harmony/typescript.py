"""JSON schemas of tools -> the TypeScript types that stand in a prompt: as openai-harmony writes them, nothing lost.

Where openai-harmony's renderer (src/encoding.rs, `json_schema_to_typescript`) keeps a schema's shape, the text is the
same to the letter, since that is what the model knows: titles, descriptions, examples and defaults are comments, and
what only narrows a value (minimum, pattern, format) is left out. What it drops is written as TypeScript has it:
references, `anyOf`, `allOf`, `const`, enums of anything, maps, tuples, null, types that are only implied.
"""

import json
import re
import urllib.parse
from collections.abc import Mapping
from typing import Any, NamedTuple

from gptoss_jax.errors import GptossError, short
from gptoss_jax.harmony.json_values import json_text

MAX_DEPTH = 32
MAX_CHARACTERS = 2**19  # more than the longest context holds

_SIMPLE = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean", "null": "null"}
_TYPES = (*_SIMPLE, "array", "object")
_OBJECT_KEYS = ("properties", "required", "patternProperties", "additionalProperties")
_ARRAY_KEYS = ("items", "prefixItems")
_COMBINING_KEYS = ("$ref", "oneOf", "anyOf", "allOf")
# TypeScript has no word for these: they stand in a comment as they are.
_UNSAYABLE_KEYS = (
    *("not", "if", "then", "else", "contains", "propertyNames", "dependentRequired", "dependentSchemas"),
    *("dependencies", "unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$recursiveRef"),
)
_IDENTIFIER = re.compile(r"(?!\d)[\w$]+")
_IN_FIELD, _IN_VARIANT = "    ", "   "  # how much further openai-harmony indents

Schema = Mapping[str, Any]


def parameters_type(schema: Schema, where: str) -> str:
    """The type of a function's parameters.

    Args:
        schema: JSON Schema of any draft, or OpenAPI's.
        where: what errors call the function.

    Raises:
        GptossError: an unknown type, a reference that leads nowhere, a keyword with a value that it cannot have; the
            error names the parameter.
    """
    return _Writer(schema, where).whole()


class _Type(NamedTuple):
    """A type in TypeScript.

    Attributes:
        members: of the union that it is; one if it is none.
        on_lines: each member stands on a line of its own, and a comment may follow it.
        ends_in_comment: one follows the last.
    """

    members: tuple[str, ...]
    on_lines: bool = False
    ends_in_comment: bool = False

    def text(self, indent: str) -> str:
        if self.on_lines:
            return "".join(f"\n{indent} | {member}" for member in self.members)
        return " | ".join(self.members)

    def closed(self, indent: str) -> str:
        """Text that anything may follow: no comment swallows it."""
        return self.text(indent) + (f"\n{indent}" if self.ends_in_comment else "")

    def grouped(self, indent: str) -> str:
        """Text that `[]` or `&` may follow."""
        if len(self.members) == 1 and not self.on_lines:
            return self.members[0]
        return f"({self.closed(indent)})"

    def or_null(self) -> "_Type":
        return self if "null" in self.members else self._replace(members=(*self.members, "null"), ends_in_comment=False)

    def after(self, comments: str, indent: str) -> "_Type":
        """The type with lines of comments before it."""
        if not comments:
            return self
        if self.on_lines:
            return _Type((comments + self.grouped(indent),))
        return self._replace(members=(comments + self.members[0], *self.members[1:]))


class _Writer:
    """Writes the types of one schema.

    A reference is written out where it stands. Inside of itself a definition goes by its name, which then stands in a
    comment where the definition begins.
    """

    def __init__(self, root: Schema, where: str):
        self._root, self._where = root, where
        self._open: list[str] = []  # references that are being written out, outermost first
        self._recursive: set[str] = set()
        self._depth = self._referred_characters = 0

    def whole(self) -> str:
        self._open.append("#")
        found = self._type(self._root, "", "", described=True)
        return self._named("#", found, "").closed("")

    def _type(
        self, schema: object, indent: str, place: str, *, described: bool, above: list[str] | None = None
    ) -> _Type:
        """The type of a schema.

        Args:
            schema: its value in the document, which may be a boolean.
            indent: of the lines after the first.
            place: of the parameter, as `point.lat`.
            described: whether its description is to stand before it, whatever it is; that of an object always does.
            above: the description that stands above it already, if any; None: it is not a field's.
        """
        if isinstance(schema, bool):
            return _Type(("any" if schema else "never",))
        known, references = self._resolve(schema, place)
        if isinstance(known, bool):
            return self._type(known, indent, place, described=described)
        for reference in references:
            if reference in self._open:
                self._recursive.add(reference)
                found = _Type((_name(reference),))
                return found.or_null() if known.get("nullable") is True else found
        if self._depth == MAX_DEPTH:
            raise self._refused(place, f"is nested too deeply, at most {MAX_DEPTH} levels are taken")
        self._depth += 1
        self._open += references
        found = self._shape(known, indent, place, described, above)
        self._depth -= 1
        for reference in reversed(references):
            self._open.remove(reference)
            found = self._named(reference, found, indent)
        self._count(found, references, place)
        return found

    def _shape(self, schema: Schema, indent: str, place: str, described: bool, above: list[str] | None) -> _Type:
        """What the keywords say together."""
        self._check_types(schema, place)
        combining = [key for key in _COMBINING_KEYS if schema.get(key)]
        parts = []
        if _has_shape(schema) or not combining:
            parts.append(_Type(self._plain(schema, indent, place)))
        for key in combining:
            if key in ("oneOf", "anyOf"):
                parts.append(self._variants(key, schema, indent, place, above))
            else:
                all_of = [{"$ref": schema[key]}] if key == "$ref" else self._list(schema, key, place)
                parts += [self._type(part, indent, place, described=True) for part in all_of]
        found = parts[0] if len(parts) == 1 else _Type((" & ".join(part.grouped(indent) for part in parts),))
        if schema.get("nullable") is True:
            found = found.or_null()
        comments = [f"{key}: {_json(schema[key])}" for key in _UNSAYABLE_KEYS if key in schema]
        if described or (_kind(schema) == "object" and not combining):
            comments = [*_description(schema), *comments]
        return found.after(_comments(comments, indent), indent)

    def _plain(self, schema: Schema, indent: str, place: str) -> tuple[str, ...]:
        """What `const`, `enum` or `type` say."""
        if "const" in schema:
            return (_json(schema["const"]),)
        if values := self._list(schema, "enum", place):
            return tuple(map(_json, values))
        kind = _kind(schema)
        if not isinstance(kind, list):
            return ("any" if kind is None else self._of_kind(kind, schema, indent, place),)
        # As there: in a list of types, `object` and `array` are words where the schema says no more of them.
        bare = [] if _has_shape(schema) else ["object", "array"]
        return tuple(each if each in bare else self._of_kind(each, schema, indent, place) for each in kind)

    def _check_types(self, schema: Schema, place: str) -> None:
        kind = _kind(schema)
        for each in kind if isinstance(kind, list) else [] if kind is None else [kind]:
            if each not in _TYPES:
                raise self._refused(place, f"has type {short(each)}, expected one of {', '.join(_TYPES)}")

    def _of_kind(self, kind: object, schema: Schema, indent: str, place: str) -> str:
        if kind == "object":
            return self._object(schema, indent, place)
        return self._array(schema, indent, place) if kind == "array" else _SIMPLE[str(kind)]

    def _object(self, schema: Schema, indent: str, place: str) -> str:
        properties, others = self._mapping(schema, "properties", place), schema.get("additionalProperties")
        required = [] if isinstance(schema.get("required"), bool) else self._list(schema, "required", place)
        fields = []
        for key, value in properties.items():
            needed = key in required or (isinstance(value, dict) and value.get("required") is True)  # as in draft 3
            fields.append(self._field(_key(key) + ("" if needed else "?"), value, indent, f"{place}.{key}"))
        for key in required:
            if isinstance(key, str) and key not in properties:
                fields.append(self._field(_key(key), others or True, indent, f"{place}.{key}"))
        for pattern, value in self._mapping(schema, "patternProperties", place).items():
            fields.append(_comments([f"keys that match {_json(pattern)}"], indent))
            fields.append(self._field("[key: string]", value, indent, f"{place}.*"))
        if others is not None and others is not False:
            fields.append(self._field("[key: string]", others, indent, f"{place}.*"))
        return f"{{\n{''.join(fields)}{indent}}}"

    def _field(self, label: str, schema: object, indent: str, place: str) -> str:
        """The lines of one field of an object."""
        known = {} if isinstance(schema, bool) else self._resolve(schema, place)[0]
        known = {} if isinstance(known, bool) else known
        inner = indent if known.get("oneOf") or known.get("anyOf") else indent + _IN_FIELD
        found = self._type(schema, inner, place, described=False, above=_description(known))
        title = "".join(_comments([text], indent) + f"{indent}//\n" for text in _said(known, "title"))
        description, examples = _comments(_description(known), indent), _comments(_examples(known), indent)
        default = _default(known, quote_enum=False)
        if found.on_lines:
            head = title + examples + description + _comments(default, indent)
            return f"{head}{indent}{label}:{found.text(indent)}\n{indent},\n"
        return f"{title}{description}{examples}{indent}{label}: {found.text(inner)},{_trailing(default)}\n"

    def _variants(self, key: str, schema: Schema, indent: str, place: str, above: list[str] | None) -> _Type:
        """The union that `oneOf` or `anyOf` lists."""
        indent += _IN_VARIANT
        types, comments = [], []
        for variant in self._list(schema, key, place):
            if isinstance(variant, dict) and "type" in schema and not _says_anything(variant):
                variant = {"type": schema["type"], **variant}
            types.append(self._type(variant, indent, place, described=False))
            described_inside = key == "anyOf" and types[-1].members[0].lstrip().startswith("//")
            comments.append(self._after_variant(variant, place, above, described_inside))
        if key == "anyOf" and not any(comments):
            return _Type(tuple(dict.fromkeys(found.closed(indent) for found in types)))
        members = tuple(found.text(indent) + comment for found, comment in zip(types, comments, strict=True))
        return _Type(members, on_lines=True, ends_in_comment=bool(comments[-1]) or types[-1].ends_in_comment)

    def _after_variant(self, variant: object, place: str, above: list[str] | None, described_inside: bool) -> str:
        known, references = (variant, []) if isinstance(variant, bool) else self._resolve(variant, place)
        if isinstance(known, bool):
            return ""
        said = described_inside or _description(known) == above or any(each in self._open for each in references)
        return _trailing([*([] if said else _description(known)), *_default(known, quote_enum=above is None)])

    def _array(self, schema: Schema, indent: str, place: str) -> str:
        items, place = schema.get("items"), f"{place}[]"
        first = self._list(schema, "prefixItems", place) or (items if isinstance(items, list) else [])
        if first:
            rest = schema.get("additionalItems") if first is items else items
            types = [self._type(each, indent, place, described=True).closed(indent) for each in first]
            if isinstance(rest, dict):
                types.append(f"...{self._type(rest, indent, place, described=True).grouped(indent)}[]")
            return f"[{', '.join(types)}]"
        if items is None:
            return "Array<any>"
        # Parentheses, which openai-harmony leaves out: without them `"a" | "b"[]` is "a", or a list.
        return f"{self._type(items or True, indent, place, described=True).grouped(indent)}[]"

    def _resolve(self, schema: object, place: str) -> tuple[Schema | bool, list[str]]:
        """A schema without the references that are all of its shape, and these, in order.

        What stands beside a reference goes before what it leads to.
        """
        references: list[str] = []
        while True:
            if not isinstance(schema, dict):
                raise self._refused(place, f"is {short(schema)}, expected a schema")
            combining = [key for key in _COMBINING_KEYS if schema.get(key)]
            if _has_shape(schema) or combining not in (["$ref"], ["allOf"]):
                return schema, references
            beside = {key: value for key, value in schema.items() if key not in ("type", *combining)}
            if combining == ["$ref"]:
                reference = schema["$ref"]
                if reference in references or len(references) == MAX_DEPTH:
                    fault = "leads back to itself" if reference in references else "is one of too many in a row"
                    raise self._refused(place, f"has the reference {short(reference)}, which {fault}")
                target = self._target(reference, place)
                references.append(reference)
            else:
                all_of = self._list(schema, "allOf", place)
                if len(all_of) > 1:
                    return schema, references
                target = all_of[0]
            if isinstance(target, bool):
                return target, references
            if isinstance(target, dict):
                kind = {"type": schema["type"]} if "type" in schema and not _says_anything(target) else {}
                target = {**kind, **target, **beside}
            schema = target

    def _target(self, reference: object, place: str) -> object:
        """What a reference within the document leads to, by its JSON pointer (RFC 6901)."""
        found: Any = self._root
        try:
            if not isinstance(reference, str) or not re.match(r"#(/|$)", reference):
                raise KeyError
            for part in urllib.parse.unquote(reference).split("/")[1:]:
                key = part.replace("~1", "/").replace("~0", "~")
                found = found[int(key) if isinstance(found, list) else key]
        except (KeyError, IndexError, ValueError, TypeError):
            expected = "a place in the same schema, such as '#/$defs/Point'"
            raise self._refused(place, f"has the reference {short(reference)}, expected {expected}") from None
        return found

    def _named(self, reference: str, found: _Type, indent: str) -> _Type:
        """The type with its name before it, if it stands in itself."""
        if reference not in self._recursive:
            return found
        self._recursive.discard(reference)
        return _Type((f"/* {_name(reference)} */ {found.grouped(indent)}",))

    def _count(self, found: _Type, references: list[str], place: str) -> None:
        """Refuses what grows beyond all bounds once references to references are written out."""
        self._referred_characters += sum(map(len, found.members)) if references else 0
        if self._referred_characters > MAX_CHARACTERS:
            raise self._refused(
                place, f"is longer than {MAX_CHARACTERS} characters once its references are written out"
            )

    def _list(self, schema: Schema, key: str, place: str) -> list[Any]:
        value = schema.get(key)
        if value is not None and not isinstance(value, list):
            raise self._refused(place, f"has {key} {short(value)}, expected a list")
        return value or []

    def _mapping(self, schema: Schema, key: str, place: str) -> Schema:
        value = schema.get(key)
        if value not in (None, []) and not isinstance(value, dict):  # [] is PHP's empty object
            raise self._refused(place, f"has {key} {short(value)}, expected an object")
        return value or {}

    def _refused(self, place: str, fault: str) -> GptossError:
        named = place.lstrip(".")
        parameter = f"parameter {short(named)}" if named else "the schema of its parameters"
        return GptossError(f"{self._where}: {parameter} {fault}")


def comment_lines(text: str) -> list[str]:
    """Lines of a text that becomes a comment; the end of the last line adds none."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _comments(lines: list[str], indent: str) -> str:
    return "".join(f"{indent}// {line}\n" for text in lines for line in comment_lines(text))


def _trailing(comments: list[str]) -> str:
    """A comment after a type, where the line must not end."""
    return f" // {' '.join(line for text in comments for line in comment_lines(text))}" if comments else ""


def _said(schema: Schema, key: str) -> list[str]:
    """The one text under a key, or none."""
    return [] if schema.get(key) is None else [json_text(schema[key])]


def _description(schema: Schema) -> list[str]:
    return _said(schema, "description")


def _examples(schema: Schema) -> list[str]:
    examples = schema.get("examples")
    values = examples if isinstance(examples, list) else [] if examples is None else [examples]
    return ["Examples:", *(f"- {_json(value)}" for value in values)] if values else []


def _default(schema: Schema, *, quote_enum: bool) -> list[str]:
    """`quote_enum`: whether one of an enum's texts is quoted, which openai-harmony does beside fields not."""
    if "default" not in schema:
        return []
    text = _json(schema["default"])
    bare = isinstance(schema["default"], str) and schema.get("enum") and not quote_enum
    return [f"default: {text[1:-1] if bare else text}"]


def _kind(schema: Schema) -> Any:
    """The type, or types, that a schema names or implies; None: any."""
    implied = {"object": _OBJECT_KEYS, "array": _ARRAY_KEYS}
    return schema.get("type") or next((kind for kind, keys in implied.items() if any(k in schema for k in keys)), None)


def _has_shape(schema: Schema) -> bool:
    """Whether a schema says more of its own than the name of a type."""
    keys = ("enum", *_OBJECT_KEYS, *_ARRAY_KEYS)
    return "const" in schema or any(schema.get(key) not in (None, False, [], {}) for key in keys)


def _says_anything(schema: Schema) -> bool:
    return _has_shape(schema) or any(key in schema for key in ("type", *_COMBINING_KEYS))


def _key(name: str) -> str:
    return name if _IDENTIFIER.fullmatch(name) else _json(name)


def _name(reference: str) -> str:
    """What a definition is called inside of itself."""
    return re.sub(r"\W+", "_", re.sub(r"^#/?(\$defs/|definitions/)?", "", reference)) or "Parameters"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
