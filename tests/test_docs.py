"""What the documents say of the tree: files they name exist, code they repeat is equal."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
FOLDERS = (
    "rollout",
    "engine",
    "kernels",
    "trainer_bridge",
    "recipes",
    "benchmarks",
    "tests",
    "docs",
)

_NAMED = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./*{{}},-]*?)(?:::\w+)?`")
_BRACES = re.compile(r"{([^{}]+)}")
_LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
_ABSOLUTE = re.compile(r"(?:^|[\s\"'=:])/\w+/")
_RUN = re.compile(r"python (?:-m ([\w.]+)|((?:recipes|benchmarks|docs)/[\w/]+\.py))")


def by_name(path: Path) -> str:
    return path.name


def expanded(name: str) -> list[str]:
    """A path with {a,b} as the paths that it stands for."""
    found = _BRACES.search(name)
    if found is None:
        return [name]
    parts = found[1].split(",")
    return [
        n for part in parts for n in expanded(name[: found.start()] + part + name[found.end() :])
    ]


def strings(value: Any) -> Iterator[str]:
    """Every string of a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, dict):
        yield from value
        yield from strings(list(value.values()))


@pytest.mark.parametrize("example", EXAMPLES, ids=by_name)
def test_examples_are_repeated_as_they_are(example: Path) -> None:
    blocks = re.findall(
        r"^```python\n(.*?)^```$",
        (ROOT / "docs" / "external_trainers.md").read_text(),
        flags=re.MULTILINE | re.DOTALL,
    )
    assert example.read_text() in blocks


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_named_files_exist(document: Path) -> None:
    names = [n for found in _NAMED.findall(document.read_text()) for n in expanded(found)]
    missing = [name for name in names if not any(ROOT.glob(name.rstrip("/")))]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_links_lead_somewhere(document: Path) -> None:
    links = [link for link in _LINK.findall(document.read_text()) if "://" not in link]
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_commands_name_programs_that_exist(document: Path) -> None:
    found = _RUN.findall(document.read_text())
    ours = [module.replace(".", "/") for module, _ in found if module.split(".")[0] in FOLDERS]
    scripts = [script for _, script in found if script]
    missing = [name for name in ours if not any(ROOT.glob(f"{name}*"))]
    missing += [name for name in scripts if not (ROOT / name).is_file()]
    assert not missing


@pytest.mark.parametrize("result", RESULTS, ids=by_name)
def test_results_hold_no_path_of_a_machine(result: Path) -> None:
    texts = strings(json.loads(result.read_text()))
    assert [text for text in texts if _ABSOLUTE.search(text)] == []
