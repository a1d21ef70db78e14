"""Benchmarks measure the checkout that they lie in, whatever is installed."""

from __future__ import annotations

import ast
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.helpers.children import ROOT, child_environment
from tests.helpers.name_uses import PACKAGES

FOLDER = ROOT / "benchmarks"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.py"))}
SCRIPTS = [name for name, path in FILES.items() if '__name__ == "__main__"' in path.read_text()]


def imported(name: str, seen: set[str]) -> list[str]:
    """The project's packages, and `checkout`, in the order in which a file imports them first."""
    found: list[str] = []
    for node in ast.parse(FILES[name].read_text()).body:
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for top in (module.split(".")[0] for module in modules):
            if top in PACKAGES or top == "checkout":
                found.append(top)
            elif top in FILES and top not in seen:
                seen.add(top)
                found += imported(top, seen)
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_finds_its_checkout_before_it_imports_the_project(name: str) -> None:
    found = imported(name, {name})
    assert found[:1] in ([], ["checkout"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scheduler", "update_host_time"])
def test_a_script_runs_where_nothing_is_installed_or_another_checkout_is(
    name: str, tmp_path: Path
) -> None:
    """Site packages come by PYTHONPATH, whose `.pth` files do nothing: no editable install."""
    other = tmp_path / "engine"
    other.mkdir()
    (other / "__init__.py").write_text("raise AssertionError('another checkout')\n")
    path = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
    done = subprocess.run(
        [sys.executable, "-S", str(FOLDER / f"{name}.py"), "--help"],
        cwd=ROOT,
        env=child_environment(*path, tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
