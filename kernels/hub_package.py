"""What Hugging Face's package `kernels` offers, where it is installed beside this one.

transformers asks the installed distributions whether there is one, and then imports its names
from `kernels`, which is us (see `kernels.__getattr__`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

_ALIAS = "_hub_kernels"
_MODULES = ("layer", "utils")
"""Where its names are defined, for when our `__init__.py` has overwritten its own."""


def attribute(name: str, folders: Iterable[str]) -> Any:
    """Its attribute. folders: where the package `kernels` is looked for, ours among them.

    Raises AttributeError for a name that is a module of either package, which is imported as
    such, and for one that is nowhere.
    """
    if find_spec(f"kernels.{name}") is None:
        for module in _places(folders):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module 'kernels' has no attribute {name!r}")


def _places(folders: Iterable[str]) -> Iterable[ModuleType]:
    for folder in map(Path, folders):
        if not (folder / Path(__file__).name).exists() and (folder / "__init__.py").exists():
            yield _root(folder / "__init__.py")
    for module in _MODULES:
        if find_spec(f"kernels.{module}") is not None:
            yield import_module(f"kernels.{module}")


def _root(file: Path) -> ModuleType:
    """Its `__init__.py`, run once, under another name: what it imports of itself by the name
    `kernels` is found there by `kernels.__path__`."""
    if _ALIAS not in sys.modules:
        spec = spec_from_file_location(_ALIAS, file, submodule_search_locations=[str(file.parent)])
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[_ALIAS] = module
        spec.loader.exec_module(module)
    return sys.modules[_ALIAS]
