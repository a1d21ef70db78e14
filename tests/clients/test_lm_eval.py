"""lm-eval: scores of choices against transformers' own, and generation, by both of its API models.

The task is a file of this test: nothing comes from a hub.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.clients.conftest import CONTEXT, MODEL_NAME

pytestmark = pytest.mark.slow

QUESTIONS = [
    {"question": "2 + 2 =", "choices": ["4", "5", "twenty"], "answer": 0},
    {"question": "The sky is", "choices": ["blue", "made of cheese"], "answer": 0},
    {"question": "a b c", "choices": ["d", "e", "z z"], "answer": 0},
    {"question": "Water: wet; fire:", "choices": ["cold", "hot"], "answer": 1},
]
CHOICE = {
    "task": "local_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}
GENERATE = {
    "task": "local_generate",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 6, "temperature": 0.0},
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}},
        "test_split": "test",
    }
    for task in (CHOICE, GENERATE):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**task, **shared}))
    return TaskManager(include_path=str(folder), include_defaults=False)


def samples(
    tasks: TaskManager, task: str, kind: str, path: str, folder: Path, **options: Any
) -> list[dict[str, Any]]:
    """What a run of `task` got from the server, a question each."""
    arguments = {
        "model": MODEL_NAME,
        "base_url": path,
        "tokenizer": str(folder),
        "max_length": CONTEXT,
        "max_retries": 1,
        **options,
    }
    found = lm_eval.simple_evaluate(
        model=kind,
        model_args=arguments,
        tasks=[task],
        task_manager=tasks,
        log_samples=True,
        bootstrap_iters=0,
        apply_chat_template=kind == "local-chat-completions",
    )
    return found["samples"][task]


def score(model: Any, prompt: list[int], answer: list[int]) -> float:
    """Sum of the logprobs of `answer` by a plain forward of transformers."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        rows = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(rows.gather(1, torch.tensor(answer)[:, None]).sum())


@pytest.mark.parametrize("concurrent", [1, 4])
def test_scores_are_those_of_transformers(
    tasks: TaskManager, url: str, model_folder: Path, concurrent: int
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    found = samples(
        tasks,
        "local_choice",
        "local-completions",
        f"{url}/v1/completions",
        model_folder,
        num_concurrent=concurrent,
        batch_size=2,
    )
    assert len(found) == len(QUESTIONS)
    for sample in found:
        question = QUESTIONS[sample["doc_id"]]
        prompt = tokenizer(question["question"])["input_ids"]
        for choice, response in zip(question["choices"], sample["resps"], strict=True):
            whole = tokenizer(f"{question['question']} {choice}")["input_ids"]
            expected = score(model, prompt, whole[len(prompt) :])
            assert float(response[0][0]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["local-completions", "local-chat-completions"])
def test_generation(tasks: TaskManager, url: str, model_folder: Path, kind: str) -> None:
    path = "/v1/chat/completions" if kind == "local-chat-completions" else "/v1/completions"
    found = samples(tasks, "local_generate", kind, url + path, model_folder)
    assert len(found) == len(QUESTIONS)
    assert all(isinstance(sample["resps"][0][0], str) for sample in found)
    assert any(sample["resps"][0][0] for sample in found)
