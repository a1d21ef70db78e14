"""Whether FlashInfer's FA3 prefill kernels are compiled already, without importing it.

FlashInfer compiles a module per dtype and head size when that is first run, for FA3 in about
95 s, and keeps it as `NAME/NAME.so` in its cache or in a package of modules built beforehand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

_DTYPES = {torch.float16: "f16", torch.bfloat16: "bf16"}
_ANY = "*"
# Folders of modules within the packages that may bring them.
_PREBUILT = {"flashinfer": "data/aot", "flashinfer_jit_cache": "jit_cache"}


def cache_folders(environment: Mapping[str, str], home: Path, release: str) -> list[Path]:
    """Where FlashInfer `release` ("*": any) keeps what it compiled, one folder per set of GPU
    architectures. environment: as in `os.environ`."""
    base = Path(environment.get("FLASHINFER_WORKSPACE_BASE", home))
    return sorted(base.glob(f".cache/flashinfer/{release}/*/cached_ops"))


def prebuilt_folders() -> list[Path]:
    """Where installed packages bring compiled modules."""
    found = []
    for package, folder in _PREBUILT.items():
        spec = find_spec(package)
        places = spec.submodule_search_locations if spec is not None else None
        found += [Path(place) / folder for place in places or ()]
    return found


def installed_release() -> str:
    """The version of FlashInfer; "*" if it was installed without saying so."""
    try:
        return version("flashinfer-python")
    except PackageNotFoundError:
        return _ANY


def holds_fa3_prefill(folders: Iterable[Path], dtype: torch.dtype, head_dim: int) -> bool:
    """Whether one of `folders` has the module that prefill of such heads runs: plain causal
    attention, queries and KV of `dtype`."""
    name = _DTYPES[dtype]
    module = (
        f"batch_prefill_with_kv_cache_dtype_q_{name}_dtype_kv_{name}_dtype_o_{name}_*"
        f"_head_dim_qk_{head_dim}_head_dim_vo_{head_dim}_posenc_0_use_swa_False"
        "_use_logits_cap_False_f16qk_False_sm90"
    )
    return any(
        (found / f"{found.name}.so").is_file()
        for folder in folders
        for found in folder.glob(module)
    )
