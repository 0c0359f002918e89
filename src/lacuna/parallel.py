"""Ranks, meshes, sharding, and the collectives of a step."""

import itertools
import os
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lacuna.config import ConfigError, DistConfig, TrainConfig


class Ranks(NamedTuple):
    rank: int
    world: int
    device: torch.device
    # (dp_replicate, dp_shard): parameters are copied over the first, sharded over the second; None: one rank is alone
    mesh: DeviceMesh | None


def start(config: DistConfig, train: TrainConfig) -> Ranks:
    """Join the ranks that torchrun or configs/slurm.sh describe, in a mesh; or a ConfigError."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    shard, rest = divmod(world, config.dp_replicate)
    if rest or rank not in range(world):
        raise ConfigError(f"WORLD_SIZE {world}, RANK {rank}: dist.dp_replicate must divide it")
    device = torch.device("cpu")
    if torch.cuda.is_available():  # with srun --gpus-per-task, a task sees one
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    # there is nothing to shard, and FSDP's copies cost 28 of 433 ms of a 1.7B model (H200)
    if world == 1:
        return Ranks(rank, world, device, None)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=config.timeout))
    mesh = init_device_mesh(device.type, (config.dp_replicate, shard), mesh_dim_names=("dp_replicate", "dp_shard"))
    return Ranks(rank, world, device, mesh)


def shard_model(trainee: nn.Module, ranks: Ranks):
    """FSDP2 over every layer, then over the rest; reduces gradients in float32."""
    memory = torch.cuda.mem_get_info(ranks.device)[1] if ranks.device.type == "cuda" else 0
    size = sum(p.numel() for p in trainee.parameters()) * trainee.dtype.itemsize
    whole = {p for p in trainee.parameters() if not p.requires_grad and size < memory / 5}
    mesh = ranks.mesh if ranks.mesh["dp_replicate"].size() > 1 else ranks.mesh["dp_shard"]
    precision = MixedPrecisionPolicy(param_dtype=trainee.dtype, reduce_dtype=torch.float32)
    # A large model's layers are freed again after their forward. One that takes less than a twentieth of the GPU stays
    # till its backward, which is half as much to gather: 93 -> 95% of linear on two H200s, for 2.6 GiB (1.7B).
    for module in (*trainee.layers, trainee):
        reshard = size > memory / 20 and module is not trainee
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard, mp_policy=precision, ignored_params=whole)
        module.set_gradient_divide_factor(1.0)  # the loss is a mean over all ranks: gradients add up
        module.set_force_sum_reduction_for_comms(True)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_over_ranks(parts: list[dict], device: torch.device) -> dict[str, Tensor]:
    """Figures by name, numbers or scalar tensors, added over parts and ranks at once: float64."""
    totals = {}
    for name, figure in itertools.chain(*(part.items() for part in parts)):
        totals[name] = totals.get(name, 0) + figure
    zero = torch.zeros((), dtype=torch.float64, device=device)
    # a tensor made of a number would be copied from the host, and wait; adding one does not
    vector = torch.stack([zero + figure for figure in totals.values()])
    if dist.is_initialized():
        dist.all_reduce(vector)
    return dict(zip(totals, vector, strict=True))


def gradient_norm(parameters: list, mesh: DeviceMesh | None) -> Tensor:
    """The global L2 norm of gradients, sharded or not; nothing waits."""
    # float64: in float32 a CPU's norm of a million values is off by 1e-5; an H200 is as fast
    grads = [local(p.grad) for p in parameters if p.grad is not None]  # None: took no part
    square = torch.stack(torch._foreach_norm(grads, 2, torch.float64)).square().sum()
    if mesh is not None:
        dist.all_reduce(square, group=mesh.get_group("dp_shard"))
    return square.sqrt()
