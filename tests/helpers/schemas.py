"""Random JSON Schemas whose values are short, and whether a text is one."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema_rs


def random_schema(rng: random.Random) -> dict[str, Any]:
    """A schema of the keywords that are served; every value of it has a bounded length."""
    shared = _schema(rng, 0)
    while "$ref" in shared:
        shared = _schema(rng, 0)
    return {"$defs": {"shared/0": shared}, **_schema(rng, 2)}


def is_valid(schema: dict[str, Any], text: str) -> bool:
    """Whether `text` is JSON that fits the schema."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return jsonschema_rs.validator_for(schema).is_valid(value)


def _schema(rng: random.Random, depth: int) -> dict[str, Any]:
    makers = [_integer, _number, _string, _pattern, _enum, _boolean, _referred]
    if depth > 0:
        makers += [_array, _object, _object, _object, _any_of]
    return rng.choice(makers)(rng, depth)


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(-50, 50)
    return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 2000)}


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": rng.randint(1, 90)}


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(0, 3)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 6)}


def _pattern(rng: random.Random, depth: int) -> dict[str, Any]:
    formats = [{"pattern": "^[a-c]{2,4}$"}, {"format": "date"}, {"pattern": "^x[0-9]{1,3}y?$"}]
    return {"type": "string", **rng.choice(formats)}


def _enum(rng: random.Random, depth: int) -> dict[str, Any]:
    values: list[Any] = ["a", "ab", 'a"b', "é", 0, 1.5, None, True, [1, "x"], {"k": 1}]
    return {"enum": rng.sample(values, rng.randint(1, 4))}


def _boolean(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": rng.choice(["boolean", "null", ["boolean", "null"]])}


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(0, 2)
    items = _schema(rng, depth - 1)
    found = {"type": "array", "items": items, "minItems": low, "maxItems": low + rng.randint(0, 2)}
    if rng.random() < 0.3:
        found["prefixItems"] = [_schema(rng, depth - 1)]
        found["maxItems"] += 1
    return found


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(["a", "b", "name", "ü", 'q"', "x y"], rng.randint(0, 4))
    properties = {name: _schema(rng, depth - 1) for name in names}
    required = [name for name in names if rng.random() < 0.6]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}


def _referred(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"$ref": "#/$defs/shared~10"}
