"""Publish a plain torch model to a running server after every optimiser step.

    python -m rollout serve --model MODEL --port 30000 &
    python docs/examples/push_plain.py --model MODEL --url http://127.0.0.1:30000

Trainer and server need not share a GPU: the weights travel by NCCL (gloo on a CPU).
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM

from trainer_bridge.bridge import Publisher, PushOptions
from trainer_bridge.http_target import HttpTarget
from trainer_bridge.update_target import state_of

arguments = argparse.ArgumentParser()
arguments.add_argument("--model", required=True)
arguments.add_argument("--url", required=True)
arguments.add_argument("--steps", type=int, default=3)
options = arguments.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(options.model).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
target = HttpTarget(options.url)
version = state_of(target).version

# The process group is formed by the first push and kept for the others.
with Publisher(model, [target], PushOptions(transport="nccl")) as publisher:
    for step in range(options.steps):
        ids = torch.randint(0, model.config.vocab_size, (2, 16), device=device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        report = publisher.push(version + step + 1)
        print(f"step {step}: loss {loss.item():.3f}; {report}")
