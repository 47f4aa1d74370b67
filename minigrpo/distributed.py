"""Several processes by torchrun; every function is the identity for one process, which has no
process group.

Rules: counts are summed over ranks before the first backward, gradients once per optimizer step
(with shards in every backward), decisions to stop or skip are agreed before anybody acts, and no
collective stands inside an `if` that ranks may answer differently.

With fully_shard (FSDP2) a rank keeps a part of each parameter and gathers a block when it computes
with it: all ranks run the same number of forward and backward passes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

V = TypeVar("V")

# A lost rank ends the job after this at the latest; long rollouts need minutes.
TIMEOUT = timedelta(minutes=30)


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """The device of this rank; under torchrun also the process group.

    It is NCCL beside gloo on CUDA, gloo on a CPU. OSError: ranks do not reach each other, for gloo
    listens at the address of the host's own name, which in Debian's /etc/hosts is 127.0.1.1.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be auto or cpu on this machine, got cuda: torch sees no GPU")
    place, is_launched = torch.device(kind), "RANK" in os.environ
    if kind == "cuda" and is_launched:
        place = torch.device(kind, int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    if kind == "cuda" and torch.cuda.get_device_capability(place)[0] == 10:
        # On a B200 cuDNN's attention of one new token is wrong with fewer than 8 key-value heads
        # (pytorch issue 193893): it would sample from another policy.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if not is_launched:
        yield place
        return
    backend = "cuda:nccl,cpu:gloo" if kind == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
    except RuntimeError as error:
        raise OSError(
            f"ranks do not reach each other: {error}. If a host's name stands for 127.0.1.1 there "
            "(getent hosts $(hostname)), name the network between the nodes (ip -br address lists "
            "them), in slurm/env.sh: export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0"
        ) from error
    yield place
    dist.destroy_process_group()  # not after an error: that could wait for lost ranks


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over ranks, a new tensor."""
    total = value.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def max_over_ranks(value: int) -> int:
    if not dist.is_initialized():
        return value
    largest = torch.tensor(value)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def any_rank(flag: bool) -> bool:
    """True on all ranks if it is on one: how stopping and skipping are agreed."""
    return bool(max_over_ranks(int(flag)))


def from_rank_zero(read: Callable[[], V]) -> V:
    """What rank 0 reads or found, on every rank: of a file each might see another state."""
    box = [read() if rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return cast(V, box[0])


def gather_rows(rows: list[Tensor]) -> list[list[Tensor]]:
    """Each rank's list of CPU tensors, in rank order, on every rank; lengths may differ."""
    if not dist.is_initialized():
        return [rows]
    gathered: list[list[Tensor]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, rows)
    return gathered


def place_model(
    model: nn.Module, blocks: Iterable[nn.Module], device: torch.device, parallel: str
) -> None:
    """Put a model where it trains: whole on every rank, or, with `fsdp`, sharded block by block.

    On several nodes each holds all shards, so that only gradients travel between nodes. One process
    without torchrun has nobody to share with.
    """
    if parallel != "fsdp" or not dist.is_initialized():
        model.to(device)
        return
    size = local_world_size()
    mesh = init_device_mesh(device.type, (world_size() // size, size), mesh_dim_names=("n", "r"))
    if size == world_size():  # one node has no other to add its gradients to
        mesh = mesh["r"]
    for part in (*blocks, model):  # a block is moved whole, then cut: no rank ever holds the model
        fully_shard(part, mesh=mesh)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Whole parameters on every rank, for sampling: gathered once, not for every token.

    Nothing communicates inside, so ranks may run different numbers of forward passes.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()


def whole(value: Tensor) -> Tensor:
    """A parameter or its moment in full, on every rank."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def collected(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in full, in the memory of rank 0's host; other ranks help and keep none.

    One after the other, so that no GPU holds all of them.
    """
    kept = {}
    for name, value in named:
        full = whole(value.detach())
        if rank() == 0:
            kept[name] = full.cpu()
    return kept


def cut_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a full tensor, cut as the parameter is; other shapes stay whole."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    mesh, value = parameter.device_mesh, value.to(parameter.device)
    return distribute_tensor(value, mesh, parameter.placements, src_data_rank=None)


def backward(model: nn.Module, loss: Tensor) -> None:
    """Back-propagate a local sum divided by a global count; fully_shard averages, we want sums."""
    torch.autograd.backward(loss * world_size() if isinstance(model, FSDPModule) else loss)


def reduce_gradients(model: nn.Module) -> None:
    """Sum the gradients over ranks, in place, in one flattened all-reduce (not shards, which are).

    No mean: losses carry global denominators.
    """
    if world_size() == 1 or isinstance(model, FSDPModule):
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:  # a rank without rows still joins
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = parameters_to_vector(gradients)
    dist.all_reduce(flat)
    vector_to_parameters(flat, gradients)


def gradient_norm(model: nn.Module) -> float:
    """The Euclidean norm of the whole gradient, in float32, the same number on every rank."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return float(whole(torch.nn.utils.get_total_norm(gradients)))


def scale_gradient(model: nn.Module, factor: float) -> None:
    """Multiply every gradient by the factor, in place: what clipping by the norm does."""
    if factor == 1.0:
        return
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def check_equal_weights(model: nn.Module) -> None:
    """RuntimeError on every rank if their copies differ by a bit: no sum over ranks would show it.

    Shards are no copies and not looked at.
    """
    copies = [(k, p.detach()) for k, p in model.named_parameters() if not isinstance(p, DTensor)]
    sums = [value.view(torch.int32).sum().cpu() for _, value in copies]  # of bits, so exact
    for other, found in enumerate(gather_rows(sums)):
        for (name, _), mine, theirs in zip(copies, sums, found, strict=True):
            if mine != theirs:
                raise RuntimeError(f"{name} differs between ranks {rank()} and {other}")
