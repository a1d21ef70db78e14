"""Values that no storage holds, of the wrong type, too long, too deep or no JSON at all, and bodies
that carry one of them in one place.

Values are JSON texts, not objects: integers beyond any machine word, nesting that Python's own
encoder refuses and halves of surrogate pairs have to reach the server as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from hypothesis import strategies as st

DEPTH = 5_000
Path = tuple[str | int, ...]
_HOLE = "\u2400hole\u2400"

HOSTILE: dict[str, str] = {
    "null": "null",
    "true": "true",
    "false": "false",
    "zero": "0",
    "minus zero": "-0",
    "one": "1",
    "one as a float": "1.0",
    "minus one": "-1",
    "two to the 16": str(2**16),
    "largest int32": str(2**31 - 1),
    "two to the 31": str(2**31),
    "below int32": str(-(2**31) - 1),
    "two to the 53, plus one": str(2**53 + 1),
    "largest int64": str(2**63 - 1),
    "two to the 63": str(2**63),
    "below int64": str(-(2**63) - 1),
    "largest uint64": str(2**64 - 1),
    "two to the 64": str(2**64),
    "a thousand digits": "9" * 1000,
    "more digits than Python reads": "9" * 5000,
    "half": "0.5",
    "below float32": "1e-46",
    "beyond float32": "1e39",
    "below minus float32": "-1e39",
    "beyond float64": "1e309",
    "below minus float64": "-1e309",
    "largest float": "1e308",
    "smallest float": "5e-324",
    "below float64": "1e-400",
    "minus 1e308": "-1e308",
    "minus zero as a float": "-0.0",
    "NaN": '"NaN"',
    "infinity as text": '"-Infinity"',
    "a float as text": '"1e308"',
    "NaN as a number": "NaN",
    "infinity as a number": "Infinity",
    "no text": '""',
    "a space": '" "',
    "text": '"a"',
    "a number as text": '"1"',
    "zero as text": '"0"',
    "a long number as text": '"' + "9" * 400 + '"',
    "a digit of another script": '"\u0663"',
    "a path": '"/proc/self/mem"',
    "a long path": '"/' + "a" * 5_000 + '"',
    "a climbing path": '"../../../../etc/passwd"',
    "NUL": '"a\\u0000b"',
    "half a surrogate pair": '"\\ud800"',
    "its other half": '"a\\udc00"',
    "an emoji": '"\U0001f600"',
    "a format": '"%s%n{0}"',
    "long text": '"' + "x" * 5_000 + '"',
    "longer text": '"' + "x " * 100_000 + '"',
    "no list": "[]",
    "list of null": "[null]",
    "list of lists": "[[[]]]",
    "list of numbers": "[1, 2, 3]",
    "list of no texts": '["", ""]',
    "list of a list of minus one": "[[-1]]",
    "a shape of many dimensions": "[[" + "1," * 299 + "1]]",
    "a shape beyond memory": f"[[{2**62}, {2**62}]]",
    "list of a huge number": f"[{2**63}]",
    "mixed list": '[1, "a", null, {}, 1e308]',
    "long list": "[" + "7," * 20_000 + "7]",
    "long list of texts": "[" + '"a",' * 5_000 + '"a"]',
    "no object": "{}",
    "object": '{"a": 1}',
    "object without a name": '{"": 0}',
    "list of objects": '[{"a": []}]',
    "object of numbers": '{"1": 1e308, "-1": 0}',
    "moderately deep list": "[" * 150 + "]" * 150,
    "deep list": "[" * DEPTH + "]" * DEPTH,
    "deep object": '{"a":' * DEPTH + "1" + "}" * DEPTH,
    "no JSON": "[1,",
    "nothing": "",
}


def objects() -> list[Any]:
    """Those of the values that Python's own reader takes."""
    found = []
    for text in HOSTILE.values():
        # Too deep, too many digits, or no JSON.
        with suppress(ValueError, RecursionError):
            found.append(json.loads(text))
    return found


def any_json() -> st.SearchStrategy[str]:
    """The text of any JSON value: those above, and whatever hypothesis thinks of."""
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40)
    trees = st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
        ),
        max_leaves=8,
    )
    return st.sampled_from(sorted(HOSTILE.values())) | trees.map(json.dumps)


def with_value(body: Any, path: Path, text: str) -> bytes:
    """The body as JSON with the value at `path` replaced, or added, by a JSON text."""
    whole = json.dumps(_replaced(body, path, _HOLE))
    return whole.replace(json.dumps(_HOLE), text).encode("utf-8", "surrogatepass")


def _replaced(value: Any, path: Path, new: Any) -> Any:
    if not path:
        return new
    first, rest = path[0], path[1:]
    if isinstance(value, list):
        assert isinstance(first, int)
        return [*value[:first], _replaced(value[first], rest, new), *value[first + 1 :]]
    return {**value, first: _replaced(value.get(first), rest, new)}


class Bodies:
    """Examples of bodies, made from the schemas of an OpenAPI document.

    schemas: its components.
    """

    def __init__(self, schemas: Mapping[str, Any]) -> None:
        self._schemas = schemas

    def example(self, schema: Mapping[str, Any]) -> Any:
        """A value that fits a schema: required fields, and those that hold objects."""
        schema = self._resolved(schema)
        if "const" in schema or "enum" in schema:
            return schema.get("const", schema.get("enum", [None])[0])
        if "anyOf" in schema:
            return self.example(schema["anyOf"][0])
        match schema.get("type"):
            case "object":
                return self._object(schema)
            case "array":
                return [self.example(schema["items"])] if schema.get("items") else []
            case "string":
                return "a"
            case "integer" | "number":
                return max(1, schema.get("minimum", 1))
            case "boolean":
                return False
            case _:
                return None

    def paths(self, schema: Mapping[str, Any], value: Any, prefix: Path = ()) -> Iterator[Path]:
        """Where a body can be changed: the whole, every field of the schema, every entry."""
        yield prefix
        schema = self._resolved(schema)
        if "anyOf" in schema:
            schema = self._matching(schema["anyOf"], value)
        if isinstance(value, list) and value:
            yield from self.paths(schema.get("items") or {}, value[0], (*prefix, 0))
        elif isinstance(value, dict):
            fields = schema.get("properties", {})
            for name in dict.fromkeys([*value, *fields]):
                inner = fields.get(name, {})
                yield from self.paths(inner, value.get(name), (*prefix, name))

    def _object(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        fields = schema.get("properties", {})
        required = schema.get("required", [])
        return {
            name: self.example(field)
            for name, field in fields.items()
            if name in required or _refers(field)
        }

    def _matching(self, options: list[Any], value: Any) -> Mapping[str, Any]:
        kinds = {dict: "object", list: "array"}
        resolved = [self._resolved(option) for option in options]
        for option in resolved:
            if "anyOf" in option:
                option = self._matching(option["anyOf"], value)
            if option.get("type") == kinds.get(type(value)) and _tag_fits(option, value):
                return option
        return {}

    def _resolved(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        name = schema.get("$ref", "").removeprefix("#/components/schemas/")
        return self._schemas[name] if name else schema


def _refers(field: Mapping[str, Any]) -> bool:
    """Whether a field's value is an object with a schema of its own, required or not."""
    options = field.get("anyOf", [field])
    return "$ref" in options[0] and options[1:] in ([], [{"type": "null"}])


def _tag_fits(schema: Mapping[str, Any], value: Any) -> bool:
    tags = schema.get("properties", {}).get("type", {}).get("enum")
    return tags is None or not isinstance(value, dict) or value.get("type") in tags
