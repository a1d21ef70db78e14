"""Publish a DeepSpeed ZeRO-3 model: every rank sends the shards that it holds.

    python -m rollout serve --model MODEL --port 30000 &
    torchrun --nproc-per-node 2 docs/examples/push_zero3.py --model MODEL --url http://127.0.0.1:30000

No rank gathers the model, and no tensor passes through rank 0.
"""

from __future__ import annotations

import argparse
import os

import deepspeed
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from engine.protocol import BeginUpdate
from trainer_bridge.adapters.deepspeed import DeepSpeedSource
from trainer_bridge.http_target import HttpTarget
from trainer_bridge.transports.sharded import ShardedCarrier
from trainer_bridge.update_target import state_of

arguments = argparse.ArgumentParser()
arguments.add_argument("--model", required=True)
arguments.add_argument("--url", required=True)
options = arguments.parse_args()

on_gpu = torch.cuda.is_available()
deepspeed.init_distributed("nccl" if on_gpu else "gloo")
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
config = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
}
model = AutoModelForCausalLM.from_pretrained(options.model)
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

ids = torch.randint(0, model.config.vocab_size, (1, 16), device=device)
engine.backward(engine(input_ids=ids, labels=ids).loss)
engine.step()

source = DeepSpeedSource(engine)
targets = [HttpTarget(options.url)] if dist.get_rank() == 0 else []
version = state_of(targets[0]).version + 1 if targets else 0
box = [version]
dist.broadcast_object_list(box, src=0)
carrier = ShardedCarrier(targets, device=device, trainer_group=dist.new_group(backend="gloo"))
report = carrier.publish(BeginUpdate(version=box[0], manifest=source.specs()), source)
print(f"rank {dist.get_rank()}: version {report.version}, {report.num_tensors} tensors")
carrier.close()
