"""The bench table says what it needs on CPU, and has a row for every op on a GPU."""

from __future__ import annotations

import pytest

from kernels import bench


def test_says_that_it_needs_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    assert bench.main() == 1
    assert "needs a CUDA GPU" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.slow
def test_table_has_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main() == 0
    table = capsys.readouterr().out
    for name in (
        "rms_norm",
        "silu_mul",
        "apply_rotary",
        "write_kv",
        "decode",
        "extend",
        "sample",
        "run_experts",
    ):
        assert f"\n{name}" in table
