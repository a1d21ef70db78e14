"""Hugging Face's package `kernels` beside ours: before or behind it, imported, or over it."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.children import ROOT, child_environment

# What transformers asks of it, defined where it defines it.
NAMES = [
    "CUDAProperties",
    "Device",
    "KernelizeFallback",
    "LayerRepository",
    "LocalLayerRepository",
    "Mode",
    "ROCMProperties",
    "get_kernel",
    "kernelize",
    "register_kernel_mapping",
    "replace_kernel_forward_from_hub",
    "use_kernel_forward_from_hub",
    "use_kernelized_func",
    "use_kernel_mapping",
]
LAYER = "".join(
    f"class {name}:\n    def __init__(self, *a, **k): pass\n"
    "    def __call__(self, *a, **k): return a[0] if a else None\n"
    for name in NAMES
)
ROOT_FILE = f"__version__ = '0.18.2'\nfrom kernels.layer import {', '.join(NAMES)}\n"

# Other modules of theirs: none may have the name of one of ours.
THEIRS = [
    "archs",
    "backends",
    "benchmark",
    "benchmarks",
    "check",
    "cli",
    "compat",
    "deps",
    "digest",
    "hf_hub",
    "importer",
    "init",
    "install",
    "load",
    "lockfile",
    "locking",
    "metadata",
    "minver",
    "python_deps",
    "redirect",
    "resolver",
    "status",
    "upload",
    "utils",
    "validate",
    "variants",
    "verify",
    "verify_cache",
    "versions_cli",
]

LONG = functools.partial(pytest.param, marks=pytest.mark.long)

USES = """
import importlib, pkgutil, sys
import trainer_bridge
for module in pkgutil.walk_packages(trainer_bridge.__path__, "trainer_bridge."):
    importlib.import_module(module.name)
import torch
from engine.protocol import TensorSpec
from trainer_bridge.checksum import with_checksums
(spec,) = with_checksums([TensorSpec("w", "float32", [3])], [("w", torch.ones(3))])
assert spec.checksum, spec
import engine.executor, engine.worker, kernels.norm, kernels.layer
from kernels import get_kernel, norm
assert get_kernel is kernels.layer.get_kernel
assert norm.rms_norm
from trainer_bridge import load_causal_lm
from transformers.utils import is_kernels_available
assert is_kernels_available()
from transformers import LlamaForCausalLM
try:
    from kernels import nowhere
except ImportError:
    print("all found")
"""


def write_hub(folder: Path) -> None:
    package = folder / "kernels"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text(ROOT_FILE)
    (package / "layer.py").write_text(LAYER)
    for name in THEIRS:
        (package / f"{name}.py").touch()
    metadata = folder / "kernels-0.18.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")


def run(code: str, *path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd="/",
        env=child_environment(*path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def copy_ours(folder: Path) -> None:
    for package in ("engine", "kernels", "trainer_bridge", "rollout"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored, dirs_exist_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", [*map(LONG, ["before ours", "behind ours"]), "imported first"])
def test_both_packages_are_found_whichever_comes_first(how: str, tmp_path: Path) -> None:
    write_hub(tmp_path)
    path = (ROOT, tmp_path) if how == "behind ours" else (tmp_path, ROOT)
    first = "import kernels\n" if how == "imported first" else ""
    assert run(first + USES, *path) == "all found"


@pytest.mark.slow
@pytest.mark.parametrize("last", [LONG("ours"), "theirs"])
def test_both_packages_may_be_installed_into_one_folder(last: str, tmp_path: Path) -> None:
    if last == "ours":
        write_hub(tmp_path)
        copy_ours(tmp_path)
    else:
        copy_ours(tmp_path)
        write_hub(tmp_path)
    assert run(USES, tmp_path) == "all found"


def test_no_module_of_ours_has_the_name_of_one_of_theirs() -> None:
    ours = {path.stem for path in (ROOT / "kernels").iterdir()}
    assert not ours & {"layer", *THEIRS}


def test_a_name_of_neither_package_is_no_attribute() -> None:
    assert run("import kernels; print(hasattr(kernels, 'get_kernel'))", ROOT) == "False"
