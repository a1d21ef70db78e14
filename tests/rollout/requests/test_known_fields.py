"""A field that a body takes is read, or stands in the table of those without effect."""

from __future__ import annotations

import ast
from pathlib import Path

from rollout.requests.known_fields import UNSERVED, WITHOUT_EFFECT

ROOT = Path(__file__).resolve().parents[3]
HTTP = ROOT / "rollout" / "http"


def fields_of_bodies(tree: ast.Module) -> set[str]:
    """Of the msgspec structs that a file defines."""
    return {
        field.target.id
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


def test_every_field_of_a_body_is_read_or_is_listed() -> None:
    trees = {path: ast.parse(path.read_text()) for path in HTTP.rglob("*.py")}
    read = {
        node.attr
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    routes = {
        path: tree
        for path, tree in trees.items()
        if "-> Routes:" in path.read_text() or path.name.endswith("bodies.py")
    }
    listed = {*WITHOUT_EFFECT["control"], *UNSERVED["control"]}
    unread = {
        f"{path.relative_to(HTTP)}: {field}"
        for path, tree in routes.items()
        for field in fields_of_bodies(tree) - read - listed
    }
    assert not unread
    assert len(routes) > 10


def test_a_field_is_not_both_refused_and_without_effect() -> None:
    for bodies, unserved in UNSERVED.items():
        both = unserved.keys() & WITHOUT_EFFECT[bodies]
        # Refused in an item and passed over beside it; refused but for the value that is served.
        assert both <= {"modalities"}
