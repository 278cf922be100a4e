"""Fifty JSON schemas of the kinds that people ask for: scalars, objects, lists, unions, references, maps, odd texts."""

from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any]


def _object(properties: Schema, *optional: str, **more: Any) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False, **more}


def _list(items: Schema, most: int = 4, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, "maxItems": most, **more}


_TEXT, _WHOLE, _TRUTH = {"type": "string", "maxLength": 24}, {"type": "integer"}, {"type": "boolean"}
_SMALL = {"type": "integer", "minimum": 0, "maximum": 99}
_POINT = _object({"x": {"type": "number"}, "y": {"type": "number"}})
_DATE = {"type": "string", "format": "date"}
_TREE = _object({"value": _SMALL, "left": {"$ref": "#/$defs/tree"}, "right": {"$ref": "#/$defs/tree"}}, "left", "right")

_SCALARS = [
    *({"type": kind} for kind in ("boolean", "null", "integer", "number")),
    _TEXT,
    _SMALL,
    {"type": "number", "minimum": -1, "maximum": 1},
    {"type": "integer", "multipleOf": 5},
    {"type": ["string", "null"], "maxLength": 9},
    {"enum": ["red", "green", "blue"]},
    {"enum": [1, 2, 3, None, True, "four", [5], {"six": 6}]},
    {"const": {"fixed": [1, "two", None]}},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    {"type": "string", "minLength": 3, "maxLength": 5},
    *({"type": "string", "format": kind} for kind in ("date", "time", "uuid", "ipv4")),
    {"enum": ["é", "日本", "🙂", 'quo"te', "back\\slash", "line\nbreak", "\u2028"]},
]
_OBJECTS = [
    _object({}),
    _POINT,
    _object({"name": _TEXT, "age": _SMALL, "member": _TRUTH}),
    _object({"name": _TEXT, "note": _TEXT, "tag": _TEXT}, "note", "tag"),
    _object({"from": _POINT, "to": _POINT}),
    _object({"day": _DATE, "items": _list(_object({"sku": _TEXT, "count": _SMALL}))}),
    _object({"né": _SMALL, 'a "b"': _TRUTH, "back\\slash": {"type": "null"}, "🙂": _TEXT}),
    _object({"level": {"enum": [1, 2, 3]}, "kind": {"const": "fixed"}}),
    _object({f"field_{i}": _TRUTH for i in range(20)}),
    _object({f"maybe_{i}": _TRUTH for i in range(12)}, *(f"maybe_{i}" for i in range(12))),
    _object({"a": _object({"b": _object({"c": _object({"d": _object({"e": _SMALL})})})})}),
    {"type": "object", "additionalProperties": _SMALL, "maxProperties": 3},
    {"type": "object", "patternProperties": {"^x[0-9]$": _SMALL}, "additionalProperties": False, "maxProperties": 3},
    {"type": "object", "properties": {"known": _SMALL}, "required": ["known"], "maxProperties": 3},
]
_LISTS = [
    _list(_SMALL),
    _list(_TEXT, 3, minItems=2),
    _list(_POINT, 2, minItems=1),
    _list(_list(_SMALL, 3), 3),
    {"type": "array", "prefixItems": [_TEXT, _SMALL, _TRUTH], "items": False, "minItems": 3},
    _list({"enum": ["a", "b"]}, 6, minItems=6),
]
_UNIONS = [
    {"anyOf": [_SMALL, _TEXT, {"type": "null"}]},
    {"anyOf": [_object({"ok": {"const": True}, "value": _SMALL}), _object({"ok": {"const": False}, "why": _TEXT})]},
    {"oneOf": [_SMALL, {"type": "string", "maxLength": 3}]},
    _object({"shape": {"oneOf": [_object({"radius": _SMALL}), _object({"width": _SMALL, "height": _SMALL})]}}),
    {"allOf": [_object({"x": _SMALL}), {"required": ["x"]}]},
    _object({"maybe": {"anyOf": [_POINT, {"type": "null"}]}}),
]
_REFERENCES = [
    {**_object({"home": {"$ref": "#/$defs/place"}, "work": {"$ref": "#/$defs/place"}}), "$defs": {"place": _POINT}},
    {"$ref": "#/$defs/tree", "$defs": {"tree": _TREE}},
    {"$defs": {"a b": _SMALL}, **_object({"v": {"$ref": "#/$defs/a%20b"}})},
    {"definitions": {"old": _TEXT}, **_list({"$ref": "#/definitions/old"}, 2)},
    _object({"steps": _list(_object({"explanation": _TEXT, "output": _TEXT}), 2), "final_answer": _TEXT}),
]

SCHEMAS: tuple[Schema, ...] = (*_SCALARS, *_OBJECTS, *_LISTS, *_UNIONS, *_REFERENCES)
"""All fifty."""
