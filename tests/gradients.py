"""Not a test: run by test_train.py on several ranks. Saves the gradients of one global batch, gathered, from rank 0.

usage: torchrun --nproc-per-node N tests/gradients.py MODEL_FOLDER BATCHES.pt OUT.pt DP_REPLICATE
BATCHES.pt holds eight one-row batches; rank r takes rows r, r + N, … as micro-batches of one row.
"""

import os
import sys

import torch
import torch.distributed as dist
from conftest import vocabulary
from torch.distributed.tensor import DTensor

from lacuna import parallel
from lacuna.config import load_config
from lacuna.data.batch import PackedBatch
from lacuna.model import build_model
from lacuna.parallel import gradient_norm, start
from lacuna.train import accumulate_gradients

folder, source, target, replicate = sys.argv[1:]
if replicate == "1":  # layers that stay whole till their backward, as those of a small model on a GPU
    fully_shard = parallel.fully_shard
    parallel.fully_shard = lambda module, **options: fully_shard(module, **options | {"reshard_after_forward": False})
argv = ["--data.sources", '[{"path": "x"}]', "--train.steps", "1", "--model.name", folder]
argv += ["--train.micro_batch_size", "1", "--dist.dp_replicate", replicate]
config = load_config(None, argv)
ranks = start(config.dist, config.train)
trainee = build_model(config, ranks, vocabulary(4096))
batches = [PackedBatch(*fields) for fields in torch.load(source, weights_only=True)]
trained = torch.tensor(sum(batch.counts["trained_tokens"] for batch in batches))
parts = accumulate_gradients(trainee, batches[ranks.rank :: ranks.world], trained, ranks)
loss = sum(part["loss"] for part in parts)
dist.all_reduce(loss)
norm = gradient_norm(list(trainee.parameters()), ranks.mesh)
grads = {name: p.grad for name, p in trainee.model.named_parameters()}
gradients = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}
if ranks.rank == 0:
    torch.save({"loss": loss.item(), "norm": norm.item(), "gradients": gradients}, target)
dist.destroy_process_group()
os._exit(0)  # as in cli.leave: gloo's threads may abort an interpreter that ends in the ordinary way
