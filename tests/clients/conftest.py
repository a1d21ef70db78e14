"""Clients as they are installed, against a real server on a tiny model.

Their packages are large and live in an environment of their own: `make clients-test`. Elsewhere
these tests are skipped. Nothing is looked for on a hub.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.serve_process import ServerProcess
from tests.helpers.tiny_models import write_tiny
from tests.helpers.tiny_tokenizer import BOS_ID, EOS_ID, tiny_tokenizer

# Read by the clients when they are imported.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
}
PACKAGES = ("ray", "trl", "openai", "anthropic", "langchain_openai", "lm_eval")
MODEL_NAME = "tiny"
CONTEXT = 2048
# A turn with tools: calls are written as Hermes does, results follow in the role "tool".
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}"
    '<tool_call>{"name": "{{ call.function.name }}", "arguments": '
    "{{ call.function.arguments | tojson }}}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Skipped(pytest.Module):
    """A module that is not imported, since it could not be."""

    def collect(self) -> Iterator[pytest.Item]:
        """Nothing, with the reason."""
        pytest.skip("the clients are not installed: make clients-test", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> Skipped | None:
    """Skip the modules of this folder where a client is missing."""
    if all(find_spec(name) is not None for name in PACKAGES):
        return None
    return Skipped.from_parent(parent, path=module_path)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: a random model of 300 tokens, its tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("model")
    write_tiny(
        folder,
        vocab_size=300,
        max_position_embeddings=CONTEXT,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    tiny_tokenizer(template=TEMPLATE).write_hf(folder)
    return folder


@pytest.fixture(scope="session")
def url(model_folder: Path) -> Iterator[str]:
    """Where the model is served."""
    arguments = ["-m", "rollout", "serve", "--model", str(model_folder), "--port", "0"]
    arguments += ["--served-model-name", MODEL_NAME, "--device", "cpu", "--dtype", "float32"]
    with ServerProcess([*arguments, "--kv-memory", "0.05"]) as server:
        yield server.url
