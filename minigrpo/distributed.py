"""Several processes by torchrun; every function is the identity for one process, which has no
process group.

Rules: counts are summed over ranks before the first backward, gradients are summed once per
optimizer step, decisions to stop or
skip are agreed before anybody acts, and no collective stands inside an `if` that ranks may answer
differently.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

TIMEOUT = timedelta(
    minutes=30
)  # a lost rank ends the job after this at the latest; long rollouts need minutes


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """The device of this rank; under torchrun also the process group.

    It is NCCL beside gloo on CUDA, gloo on a CPU.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be auto or cpu on this machine, got cuda: torch sees no GPU")
    if "RANK" not in os.environ:
        yield torch.device(kind)
        return
    place = (
        torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device("cpu")
    )
    if kind == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("cuda:nccl,cpu:gloo" if kind == "cuda" else "gloo", timeout=TIMEOUT)
    yield place
    dist.destroy_process_group()  # not after an error: that could wait for lost ranks


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


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


def gather_rows(rows: list[Tensor]) -> list[list[Tensor]]:
    """Each rank's list of CPU tensors, in rank order, on every rank; lengths may differ."""
    if not dist.is_initialized():
        return [rows]
    gathered: list[list[Tensor]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, rows)
    return gathered


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def reduce_gradients(model: nn.Module) -> None:
    """Sum the gradients over ranks, in place, in one flattened all-reduce.

    No mean: losses carry global denominators.
    """
    if not dist.is_initialized():
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:  # a rank without rows still joins
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    dist.all_reduce(flat)
    start = 0
    for parameter in parameters:
        parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()


def gradient_norm(model: nn.Module) -> float:
    """The Euclidean norm of the whole gradient, in float32, the same number on every rank."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def scale_gradient(model: nn.Module, factor: float) -> None:
    """Multiply every gradient by the factor, in place: what clipping by the norm does."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
