"""`kernels` is this product's package, wherever Hugging Face's of the same name is installed.

transformers may bring that one along (https://github.com/huggingface/kernels). Where it comes
first on `sys.path`, `import kernels.norm` would look for our modules in it. The other way round,
`kernels/__init__.py` hands on what transformers asks of it.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

_NAME = "kernels"


def ensure() -> None:
    """Have `kernels` find our modules: called once, when `engine` is imported, which every module
    that needs them does before.

    If the other package is imported already, its search path gets our folder as well; else ours
    is imported in its place. Nothing is done where ours comes first, or both share a folder.
    """
    folder = Path(__file__).resolve().parents[1] / _NAME
    found = find_spec(_NAME)
    places = [] if found is None else [*(found.submodule_search_locations or ())]
    if any(Path(place).resolve() == folder for place in places):
        return
    other = sys.modules.get(_NAME)
    if other is not None:
        other.__path__.append(str(folder))
        return
    ours = spec_from_file_location(
        _NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert ours is not None and ours.loader is not None
    module = module_from_spec(ours)
    sys.modules[_NAME] = module
    ours.loader.exec_module(module)
