"""The pages for those who come from elsewhere: their snippets run, and their flags are ours."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

import rollout.__main__ as cli
from tests.helpers.children import ROOT, child_environment
from tests.helpers.serve_process import ServerProcess
from tests.helpers.tiny_models import write_tiny
from tests.helpers.tiny_tokenizer import BOS_ID, EOS_ID, tiny_tokenizer

PAGES = sorted((ROOT / "docs").glob("from_*.md"))
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ROW = re.compile(r"^\| (.+?) \| (.+?) \|(?: (.*?) ?\|)?$", re.MULTILINE)
_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]+)")
_HERE = "http://127.0.0.1:30000"


def blocks(page: Path, kind: str) -> list[str]:
    return [text for found, text in _BLOCK.findall(page.read_text()) if found == kind]


def commands(page: Path) -> list[str]:
    lines = "".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def snippets() -> list[tuple[str, str]]:
    return [(page.name, code) for page in PAGES for code in blocks(page, "python")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model")
    write_tiny(
        found,
        vocab_size=300,
        max_position_embeddings=512,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    tiny_tokenizer().write_hf(found)
    return found


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    options = ["--port", "0", "--device", "cpu", "--dtype", "float32", "--kv-memory", "0.05"]
    arguments = ["-m", "rollout", "serve", "--model", str(folder), *options]
    with ServerProcess(arguments) as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("page,code", snippets(), ids=lambda value: value[:24].split("\n")[0])
def test_a_snippet_runs_as_it_is(
    page: str, code: str, server: ServerProcess, folder: Path, tmp_path: Path
) -> None:
    for module in re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    code = code.replace(_HERE, server.url).replace("/srv/model", str(folder))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, f"{page}: {done.stderr}"


@pytest.mark.slow
def test_calls_by_hand_are_answered(server: ServerProcess) -> None:
    calls = [line for page in PAGES for line in commands(page) if line.startswith("curl ")]
    assert calls
    for call in calls:
        words = shlex.split(call.replace("localhost:30000", server.url))
        done = subprocess.run(
            [words[0], "-sS", "--fail-with-body", *words[1:]],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{call}: {done.stdout}"


def test_commands_are_ones_that_are_read() -> None:
    """Of `serve` and `router`; those of recipes and files name flags that are there."""
    number = 0
    for page in PAGES:
        for line in commands(page):
            words = shlex.split(line)
            if words[:3] == ["python", "-m", "rollout"]:
                assert cli.parse(words[3:]) is not None
                number += 1
    assert number >= len(PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_on_our_side_of_a_table_are_ours(page: Path) -> None:
    named = {name.replace("_", "-") for name in _serve_options()} | _recipe_options()
    for _, ours, more in _ROW.findall(page.read_text()):
        for flag in _FLAG.findall(f"{ours} {more}"):
            assert flag.removeprefix("no-") in named, f"--{flag} in {page.name}: {ours}"


@cache
def _serve_options() -> set[str]:
    text = subprocess.run(
        [sys.executable, "-m", "rollout", "serve", "--help"],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return set(_FLAG.findall(text)) | {"worker", "policy", "input", "output"}


@cache
def _recipe_options() -> set[str]:
    sources = [path.read_text() for path in (ROOT / "recipes").rglob("*.py")]
    fields = re.findall(r"^    (\w+): ", "\n".join(sources), re.MULTILINE)
    return {name.replace("_", "-") for name in fields} | {"launch"}
