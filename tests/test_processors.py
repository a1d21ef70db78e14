"""The numeric tests as other processors run them: no bound may depend on the instruction set.

torch and oneDNN choose kernels by what the processor has; both can be told to leave instructions
out, so one machine stands for older ones. What it lacks itself cannot be emulated. oneDNN then
takes the best that there is. torch believes what it is told and dies of an illegal instruction,
so such a case is skipped.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.helpers.children import ROOT, child_environment

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

NUMERIC = (
    "tests/kernels",
    "tests/parity",
    "tests/engine/layers",
    "tests/engine/attention",
    "tests/engine/models",
    "tests/engine/test_numerics.py",
    "tests/engine/test_prompt_logprobs.py",
    "tests/engine/test_sampling.py",
    "tests/recipes/trainers",
    "tests/recipes/algorithms",
    "tests/rollout/http/test_serve_process.py::test_replies_are_those_of_the_engine",
)
TRAINERS = "tests/recipes/trainers/test_sharded.py"
LEFT_OUT = (
    # The model that `make grpo` trains: minutes without vector instructions.
    "tests/parity/test_default_model.py",
    # Imports, no numbers.
    "tests/kernels/test_package.py",
    # Processes that train: a minute a run, so they run once, in a case of their own.
    TRAINERS,
)

CAPABILITIES = ("default", "avx2", "avx512")  # as torch ranks them
# What processors of one age have, and each set of one library beside another set of the other.
PROCESSORS = (
    ("default", "AVX2"),
    ("avx2", "AVX2"),
    ("avx2", "AVX512_CORE"),
    ("avx512", "AVX512_CORE"),
    ("avx512", "AVX512_CORE_BF16"),
)


@pytest.mark.parametrize(("capability", "onednn"), PROCESSORS)
def test_numeric_tests_hold_on_an_older_processor(capability: str, onednn: str) -> None:
    present = torch.backends.cpu.get_cpu_capability().lower()
    if present not in CAPABILITIES or CAPABILITIES.index(capability) > CAPABILITIES.index(present):
        pytest.skip(f"this processor has {present}, not {capability}")
    _run({"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": onednn})


def test_sharded_trainers_learn_alike_on_an_older_processor() -> None:
    _run({"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, [TRAINERS])


@pytest.mark.parametrize("threads", ["2", "8"])
def test_numeric_tests_hold_with_other_numbers_of_threads(threads: str) -> None:
    _run({"OMP_NUM_THREADS": threads})


def _run(changes: dict[str, str], only: list[str] | None = None) -> None:
    tests = only or [*NUMERIC, *(f"--ignore={path}" for path in LEFT_OUT)]
    assert all((ROOT / path.split("::")[0]).exists() for path in [*NUMERIC, *LEFT_OUT])
    environment = child_environment(**changes)
    # A test process beside others tells its children so; these are their own.
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    # Near the end of a run, when other files are done, this one has both of two cores.
    command += ["-n", "2", "--dist", "loadfile"]
    marks = "not long and not gpu and not multi_gpu"
    done = subprocess.run(
        [*command, "-m", marks, *tests],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
