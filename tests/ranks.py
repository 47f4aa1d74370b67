"""Run a function on several ranks, as torchrun would, without paying for the imports each time."""

import faulthandler
import multiprocessing
import os
import socket
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

import torch

R = TypeVar("R")
# The server imports once, on first use, and forks; it has run no autograd, so a fork is safe.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["torch._dynamo", "train_sft", "train_grpo"])  # the first is slow


def run_ranks(world_size: int, work: Callable[..., R], *arguments: object) -> list[R]:
    """work(*arguments) on each rank -> the results in rank order; each rank must end well."""
    with tempfile.TemporaryDirectory() as folder:
        exits = start_ranks(world_size, work, *arguments, results=Path(folder))
        assert exits == [0] * world_size
        paths = [Path(folder) / str(rank) for rank in range(world_size)]
        return [torch.load(path, weights_only=False) for path in paths]


def start_ranks(
    world_size: int,
    work: Callable[..., object],
    *arguments: object,
    results: Path | None = None,
    errors: Path | None = None,
    seconds: float = 400,
) -> list[int | None]:
    """The exit codes of all ranks; one that is still there after that time is killed: -9.

    One rank has no RANK, thus no process group. What the ranks write to stderr goes to `errors`.
    """
    port = free_port()
    processes: list[BaseProcess] = [
        FORKED.Process(
            target=_rank, args=(rank, world_size, port, work, arguments, results, errors)
        )
        for rank in range(world_size)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank(
    rank: int,
    world_size: int,
    port: int,
    work: Callable[..., object],
    arguments: tuple[object, ...],
    results: Path | None,
    errors: Path | None,
) -> None:
    if errors is not None:  # capfd cannot see it: the server was started in another test
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    warnings.simplefilter("error")
    faulthandler.dump_traceback_later(300)  # a hanging collective shows where
    torch.set_num_threads(1)
    if world_size > 1:
        named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        named["LOCAL_WORLD_SIZE"] = world_size
        os.environ |= {name: str(value) for name, value in named.items()}
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    result = work(*arguments)
    if results is not None:
        torch.save(result, results / str(rank))
