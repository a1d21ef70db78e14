"""The import name `kernels` must not be taken for the Hub package that transformers probes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels.activation import gelu_tanh_mul, silu_mul
from kernels.attention import paged_attention
from kernels.kv_copy import write_kv
from kernels.norm import add_rms_norm, rms_norm
from kernels.rotary import apply_rotary
from kernels.sampling import sample

pytestmark = pytest.mark.slow

ROOT = Path(kernels.__file__).resolve().parents[1]


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_version_stays_below_the_one_transformers_uses() -> None:
    assert tuple(int(part) for part in kernels.__version__.split(".")) < (0, 9)


@pytest.mark.slow
def test_transformers_ignores_this_package_and_imports_a_model() -> None:
    code = (
        "from transformers.utils import is_kernels_available as available\n"
        "from transformers import LlamaForCausalLM\n"
        "print(available(), LlamaForCausalLM.__name__)"
    )
    assert run_python(code) == "False LlamaForCausalLM"


def test_importing_the_ops_leaves_triton_out() -> None:
    ops = ["norm", "rotary", "activation", "moe", "kv_copy", "attention", "sampling"]
    ops += ["linear", "embedding", "speculative.rows", "speculative.accept"]
    ops += ["speculative.ngram"]
    imports = "; ".join(f"import kernels.{op}" for op in ops)
    assert run_python(f"import sys; {imports}; print('triton' in sys.modules)") == "False"


def test_importing_the_package_leaves_torch_out() -> None:
    assert run_python("import sys, kernels; print('torch' in sys.modules)") == "False"


def test_unknown_backend_lists_the_known_ones() -> None:
    x = torch.ones(1, 2, 4)
    table = torch.ones(1, 4)
    ids = torch.zeros(1, dtype=torch.int64)
    starts = torch.tensor([0, 1], dtype=torch.int32)
    pages = torch.ones(1, 1, 2, 4)
    calls = [
        lambda name: rms_norm(x, table[0], 1e-5, backend=name),
        lambda name: add_rms_norm(x, x, table[0], 1e-5, backend=name),
        lambda name: apply_rotary(x, x, ids, table, backend=name),
        lambda name: silu_mul(x, backend=name),
        lambda name: gelu_tanh_mul(x, backend=name),
        lambda name: write_kv(x, x, pages, pages, ids, backend=name),
        lambda name: paged_attention(
            x, pages, pages, ids[None], starts, ids, scale=1.0, max_query_len=1, backend=name
        ),
        lambda name: sample(table, table[0, :1], ids, ids, backend=name),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="torch, triton; got 'numpy'"):
            call("numpy")
