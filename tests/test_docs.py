"""What the documents say of the tree: files they name exist, code they repeat is equal."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.models.gguf_families import FAMILIES
from engine.models.registry import ARCHITECTURES
from rollout.http.config import ServeConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "recipes" / "README.md"]
DOCUMENTS = sorted([*PAGES, *(ROOT / "docs").glob("*.md")])
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

WALKS = [ROOT / "docs" / name for name in ("request.md", "weight_update.md", "state.md")]
# Flags in the documents that are other programs': torchrun's, pytest's, curl's, docker's.
FOREIGN_FLAGS = {
    "nproc-per-node",
    "nnodes",
    "rdzv-endpoint",
    "no-python",
    "ntasks-per-node",
    "noconftest",
    "json",
    "publish",
    "tag",
}

_SYMBOL = re.compile(r"`([\w/.-]+\.py)::([\w.]+)`")
_PLACE = re.compile(r"`([\w./{},-]+(?:\.py|/))(?:::[\w.]+)?`")
_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]+)")
_TEN = re.compile(r"^\d+\. \[([^]]+)\]\(\1\): (.+)$", re.MULTILINE)
_NAMED = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./*{{}},-]*?)(?:::\w+)?`")
_BRACES = re.compile(r"{([^{}]+)}")
_LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
_ANCHOR = re.compile(r"\]\(([^)#]*)#([^)]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_ABSOLUTE = re.compile(r"(?:^|[\s\"'=:])/\w+/")
_RUN = re.compile(r"python (?:-m ([\w.]+)|((?:recipes|benchmarks|docs)/[\w/]+\.py))")


def by_name(path: Path) -> str:
    return path.name


def anchors(document: Path) -> set[str]:
    """What links to the headings of a document end with, as GitHub makes them."""
    headings = [heading.lower() for heading in _HEADING.findall(document.read_text())]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


def expanded(name: str) -> list[str]:
    """A path with {a,b} as the paths that it stands for."""
    found = _BRACES.search(name)
    if found is None:
        return [name]
    parts = found[1].split(",")
    return [
        n for part in parts for n in expanded(name[: found.start()] + part + name[found.end() :])
    ]


def own_text(document: Path) -> str:
    """A document without what its tables and commands say of other programs' flags."""
    text = document.read_text()
    if document.name.startswith("from_"):
        text = re.sub(r"^(\| [^|]+ \||# before: .*$)", "", text, flags=re.MULTILINE)
    return text


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
    pages = "\n".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    blocks = re.findall(r"^```python\n(.*?)^```$", pages, flags=re.MULTILINE | re.DOTALL)
    assert example.read_text() in blocks


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_named_files_exist(document: Path) -> None:
    names = [n for found in _NAMED.findall(document.read_text()) for n in expanded(found)]
    missing = [name for name in names if not any(ROOT.glob(name.rstrip("/")))]
    assert not missing


@pytest.mark.parametrize("walk", WALKS, ids=by_name)
def test_a_bare_file_name_is_in_the_folder_named_last(walk: Path) -> None:
    folder, missing = ROOT, []
    for found in _PLACE.findall(walk.read_text()):
        for name in expanded(found):
            path = ROOT / name
            if name.split("/")[0] not in FOLDERS:
                missing += [] if (folder / name).is_file() else [f"{name} in {folder.name}"]
            elif path.exists():
                folder = path if name.endswith("/") else path.parent
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_named_functions_and_classes_exist(document: Path) -> None:
    missing = []
    for name, symbol in _SYMBOL.findall(document.read_text()):
        wanted = re.compile(
            rf"^\s*(?:async )?(?:def|class) {symbol.split('.')[-1]}\b", re.MULTILINE
        )
        files = [p for folder in FOLDERS for p in (ROOT / folder).rglob(Path(name).name)]
        texts = [p.read_text() for p in files if p.as_posix().endswith(f"/{name}")]
        missing += [] if any(map(wanted.search, texts)) else [f"{name}::{symbol}"]
    assert not missing


def test_named_flags_are_read_by_some_program() -> None:
    sources = [p.read_text() for folder in FOLDERS[:-2] for p in (ROOT / folder).rglob("*.py")]
    sources += [p.read_text() for p in EXAMPLES]
    text = "\n".join(sources)
    fields = set(re.findall(r"^    (\w+): ", text, flags=re.MULTILINE))
    known = {name.replace("_", "-") for name in fields} | set(re.findall(r'"--([\w-]+)"', text))
    known |= set(re.findall(r'\barg\(name="([\w-]+)"', text))
    named = {flag for path in DOCUMENTS for flag in _FLAG.findall(own_text(path))}
    known |= {f"no-{name}" for name in known} | FOREIGN_FLAGS | {"help"}
    assert named - known == set()


def test_every_family_is_in_the_table_of_models() -> None:
    rows = re.findall(
        r"^\| [^|]+ \| `(\w+)` \|(?: `(\w+)`)? \|$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert {name for name, _ in rows} == set(ARCHITECTURES)
    told = {(gguf, name) for name, gguf in rows if gguf}
    assert told == {(gguf, family.architecture) for gguf, family in FAMILIES.items()}


def test_ten_files_to_read_are_short() -> None:
    ten = _TEN.findall((ROOT / "README.md").read_text())
    assert len(ten) == 10
    for name, sentence in ten:
        lines = len((ROOT / name).read_text().splitlines())
        assert lines <= 400, f"{name} has {lines} lines"
        assert sentence.endswith("."), sentence


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_links_lead_somewhere(document: Path) -> None:
    links = [link for link in _LINK.findall(document.read_text()) if "://" not in link]
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_links_into_a_page_lead_to_a_heading(document: Path) -> None:
    found = [each for each in _ANCHOR.findall(document.read_text()) if "://" not in each[0]]
    pages = [(document.parent / page if page else document, anchor) for page, anchor in found]
    assert [anchor for page, anchor in pages if anchor not in anchors(page)] == []


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


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_addresses_are_where_a_server_listens(document: Path) -> None:
    ports = re.findall(r"(?:localhost|127\.0\.0\.1):(\d+)", document.read_text())
    assert set(ports) <= {str(ServeConfig.__dataclass_fields__["port"].default)}
