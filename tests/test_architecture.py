"""The import rules of the five packages, read from the source with `ast`."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("rollout", "engine", "kernels", "trainer_bridge", "recipes")
CONTRACTS = {"engine.protocol", "engine.config", "engine.errors"}

# What each module prefix may import of ours; the longest matching prefix decides.
ALLOWED: dict[str, set[str]] = {
    "kernels": {"kernels"},
    "engine": {"engine", "kernels"},
    "engine.our_kernels": set(),
    "engine.protocol": {"engine.protocol"},
    "engine.comm": {"engine.comm", "engine.protocol"},
    "engine.config": set(),
    "engine.errors": set(),
    "engine.layers": {
        "engine.layers",
        "engine.quant",
        "engine.parallel",
        "engine.errors",
        "engine.config",
        "kernels",
    },
    "engine.models": {
        "engine.models",
        "engine.layers",
        "engine.parallel",
        "engine.errors",
        "engine.config",
        "engine.protocol",
        "kernels",
    },
    "rollout": {"rollout", *CONTRACTS},
    "rollout.launch": {"rollout", *CONTRACTS, "engine.worker", "engine.executor"},
    "rollout.replica": {"rollout", *CONTRACTS, "engine.worker", "engine.executor"},
    "trainer_bridge": {
        "trainer_bridge",
        "engine.comm",
        "engine.protocol",
        "engine.errors",
        "kernels",
    },
    "recipes": {
        "recipes",
        "trainer_bridge",
        "rollout.client",
        "rollout.offline",
        "rollout.replica",
        "rollout.launch",
        "engine.protocol",
        "engine.config",
        "engine.errors",
        "kernels",
    },
}
# Torch may not be imported here, not even lazily.
TORCH_FREE = ("rollout", "engine.protocol", "engine.comm", "engine.config", "engine.errors")
HEAVY = {"torch", "transformers", "deepspeed", "triton", "flashinfer"}


def modules() -> list[tuple[str, Path]]:
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append((name, path))
    return found


def imports(path: Path) -> set[str]:
    """Every module a file imports, at any depth; `from a import b` gives a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def rule_for(module: str) -> set[str]:
    longest = max((p for p in ALLOWED if within(module, p)), key=len)
    return ALLOWED[longest]


@pytest.mark.parametrize("module,path", modules(), ids=[name for name, _ in modules()])
def test_imports_follow_the_rules(module: str, path: Path) -> None:
    allowed = rule_for(module)
    for name in imports(path):
        if name.split(".")[0] in PACKAGES:
            assert any(within(name, prefix) for prefix in allowed), f"{module} imports {name}"


@pytest.mark.parametrize("module,path", modules(), ids=[name for name, _ in modules()])
def test_the_deciding_side_never_names_torch(module: str, path: Path) -> None:
    if any(within(module, prefix) for prefix in TORCH_FREE):
        heavy = {name.split(".")[0] for name in imports(path)} & HEAVY
        assert not heavy, f"{module} imports {heavy}"


def test_importing_rollout_leaves_torch_out() -> None:
    names = [
        name
        for name, _ in modules()
        if any(within(name, prefix) for prefix in TORCH_FREE) and not name.endswith("__main__")
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"heavy = {HEAVY!r} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Of the product, and of the benchmarks, which are scripts that import by file name."""
    files = dict(modules())
    files |= {path.stem: path for path in (ROOT / "benchmarks").glob("*.py")}
    graph = {
        name: {found if found in files else found.rpartition(".")[0] for found in imports(path)}
        for name, path in files.items()
    }
    left = set(graph)
    while free := {name for name in left if not (graph[name] - {name}) & left}:
        left -= free
    assert not left, sorted(left)


def test_package_roots_import_nothing() -> None:
    for package in PACKAGES:
        if package in ("kernels", "trainer_bridge"):
            continue
        found = imports(ROOT / package / "__init__.py")
        allowed = {"engine.our_kernels"} if package == "engine" else set()
        assert found == allowed, f"{package}/__init__.py imports {found}"


def test_files_stay_small() -> None:
    """At most 400 lines a file, and half of the product's files at most 90."""
    files = [*modules(), *((path.name, path) for path in (ROOT / "benchmarks").glob("*.py"))]
    lines = {name: len(path.read_text().splitlines()) for name, path in files}
    assert {name: count for name, count in lines.items() if count > 400} == {}
    assert statistics.median(lines[name] for name, _ in modules()) <= 90


def test_every_room_says_what_it_is() -> None:
    for name, path in modules():
        if path.name == "__init__.py":
            told = ast.get_docstring(ast.parse(path.read_text()))
            assert told and told.splitlines()[0].endswith("."), f"{name} does not say what it is"


def test_every_test_file_says_what_it_tests() -> None:
    files = (ROOT / "tests").rglob("test_*.py")
    silent = [path.name for path in files if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


def test_no_room_of_the_deciding_side_is_crowded() -> None:
    """Each folder of `rollout/` has two to 14 files."""
    for folder in sorted({path.parent for name, path in modules() if within(name, "rollout")}):
        names = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert 2 <= len(names) <= 14, f"{folder.relative_to(ROOT)} has {len(names)} files"


@pytest.mark.parametrize(
    "word", ["budget", "command", "control", "options", "outputs", "requests", "select", "wire"]
)
def test_a_name_of_many_meanings_is_given_once(word: str) -> None:
    named = [name for name, path in modules() if path.stem == word]
    assert len(named) <= 1, named


def test_one_file_speaks_zmq() -> None:
    found = {name for name, path in modules() if any(within(i, "zmq") for i in imports(path))}
    assert found == {"rollout.replica.ipc"}


def test_one_helper_gives_tests_children_their_path() -> None:
    """Where packages come by PYTHONPATH, a child that gets another one lacks them."""
    files = (ROOT / "tests").rglob("*.py")
    given = re.compile(r'"PYTHONPATH"(:|\] =)')
    named = {path.name for path in files if given.search(path.read_text())}
    assert named == {"children.py"}


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    declared = {_plain_name(re.split(r"[><=\[; ]", line)[0]) for line in lines}
    owners = packages_distributions()
    for module, path in modules():
        for top in {name.split(".")[0] for name in imports(path)} - {*PACKAGES, "__future__"}:
            # What is not installed here is looked at where it is.
            names = {_plain_name(name) for name in owners.get(top, [])}
            assert top in sys.stdlib_module_names or not names or names & declared, (module, top)


def _plain_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
