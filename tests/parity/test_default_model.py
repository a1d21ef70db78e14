"""SmolLM2-135M-Instruct, the model `make setup` brings, against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rollout.launch import read_checkpoint
from rollout.offline import generate, load_tokenizer
from tests.helpers.engines import make_replica, request
from trainer_bridge import load_causal_lm

QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "What is 3 + 4?",
    "Name three colours.",
    "Who wrote Hamlet?",
    "Explain rain to a child.",
    "List the first five even numbers.",
    "Say hello in Spanish.",
]


@pytest.mark.parametrize(
    "questions,num_tokens",
    [
        pytest.param(QUESTIONS[:3], 24, marks=pytest.mark.slow),
        pytest.param(QUESTIONS, 64, marks=pytest.mark.long),
    ],
    ids=["some", "all"],
)
def test_greedy_text_and_logprobs_equal_transformers(
    default_model: str, questions: list[str], num_tokens: int
) -> None:
    tokenizer = load_tokenizer(default_model)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True
        )
        for question in questions
    ]
    checkpoint = read_checkpoint(default_model)
    model = load_causal_lm(checkpoint.hf_config, checkpoint.tensors).eval()
    with make_replica(default_model, page_size=16, context_length=1024) as replica:
        outputs = generate(
            replica,
            [
                request(str(i), ids, temperature=0.0, max_new_tokens=num_tokens)
                for i, ids in enumerate(prompts)
            ],
        )
    for prompt, output in zip(prompts, outputs, strict=True):
        # One forward over the whole reply: it is greedy if each token is the likeliest after
        # those before it.
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *output.token_ids]])).logits[0]
        logits = logits[len(prompt) - 1 : -1].float()
        assert output.token_ids.tolist() == logits.argmax(-1).tolist()
        exact = logits.log_softmax(-1).amax(-1).numpy()
        np.testing.assert_allclose(output.logprobs, exact, atol=1e-3)
        assert len(exact) == num_tokens
