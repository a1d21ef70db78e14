"""schemathesis, which knows many servers, against /openapi.json of this one.

It runs in a process of its own: its plugin for pytest would be in every other test. Every request
that it makes from the document must be answered by something else than a server error, and the
engine answers afterwards. Routes that would change what the others see are left to
`test_any_field.py`, which gives what comes after one a server of its own.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from engine.protocol import GenerateRequest, SamplingParams
from tests.helpers.children import child_environment
from tests.helpers.fake_executor import expected_tokens
from tests.helpers.serve_process import FAKE_WITH_TEXT, ServerProcess

pytestmark = pytest.mark.skipif(find_spec("schemathesis") is None, reason="it is not installed")

DEADLINE_S = 560.0
ENTRY = "from schemathesis.cli import schemathesis; schemathesis()"
PROGRAM = (sys.executable, "-W", "ignore", "-c", ENTRY, "run")
# Pausing, sleeping and half-made updates turn later requests away, as they should (503).
STATEFUL = (
    "/command|/pause.*|/sleep|/wake_up|/(release|resume)_memory_occupation|/start_weight_update"
    "|/begin_weight_update|/update_weight.*|/finish_weight_update|/end_weight_update|/pull_weights"
    "|/init_weight.*|/post_process_weights"
    "|/dashboard/api/live"  # It ends with its reader.
)
FLAGS = (
    "--checks=not_a_server_error,content_type_conformance",
    "--generation-deterministic",
    "--seed=1",
    "--request-timeout=60",
    "--no-color",
    "--suppress-health-check=all",
    "--continue-on-failure",
)


def explore(url: str, folder: Path, num_examples: int, *words: str) -> None:
    done = subprocess.run(
        [*PROGRAM, f"{url}/openapi.json", *FLAGS, f"--max-examples={num_examples}", *words],
        cwd=folder,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def assert_serves(server: ServerProcess) -> None:
    with server.client() as client:
        sampling = SamplingParams(max_new_tokens=5, ignore_eos=True)
        (reply,) = client.generate(GenerateRequest(input_ids=[5], sampling_params=sampling))
        assert reply.output_ids == expected_tokens([5], 5)
    assert server.process.poll() is None


@pytest.mark.slow
def test_every_route_that_changes_nothing_for_others(tmp_path: Path) -> None:
    with ServerProcess(["-c", FAKE_WITH_TEXT]) as server:
        explore(server.url, tmp_path, 3, "--phases=fuzzing", f"--exclude-path-regex=^({STATEFUL})$")
        assert_serves(server)


@pytest.mark.long
def test_every_route_that_changes_nothing_for_others_at_length(tmp_path: Path) -> None:
    with ServerProcess(["-c", FAKE_WITH_TEXT]) as server:
        words = ("--phases=examples,coverage,fuzzing", f"--exclude-path-regex=^({STATEFUL})$")
        explore(server.url, tmp_path, 40, *words)
        assert_serves(server)
