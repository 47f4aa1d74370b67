"""Does the policy gradient have a direction? To be asked of a checkpoint before a long run.

g_1 ... g_K are the gradients of K independent rollouts at the same weights, of n completions each:
    cosine = mean over pairs of g_j . g_k / (|g_j| |g_k|)    about |g|^2 / (|g|^2 + trace / n)
    |g|^2  = mean over pairs of g_j . g_k                    unbiased; negative if there is none
    trace  = n (mean of |g_k|^2 - |g|^2)                     of the covariance of one completion
    needed = 0.49 / 0.51 trace / |g|^2                       n at which a rollout's cosine with the
                                                             mean gradient, sqrt(cosine), is 0.7
Completions of a group share prompt and mean, so the last two hold for the group size at hand. The
mean is the estimator's own: with credit for each control and lambda < 1 not quite that of E[R].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from minigrpo.config import GRPOConfig
from minigrpo.data import Task, split_starts
from minigrpo.distributed import process_group, rank, reduce_gradients
from minigrpo.memory import free_memory
from minigrpo.reward import RewardFunction
from minigrpo.rollout import Rollout, check_batch, make_rollout, prompts_of_step
from minigrpo.runs import set_matmul_precision
from minigrpo.transformer import Transformer
from minigrpo.update import accumulate_gradient

WANTED_COSINE = 0.7
ODDS = WANTED_COSINE**2 / (1 - WANTED_COSINE**2)


@dataclass(frozen=True)
class GradientSignal:
    """What K rollouts of n completions say about the gradient; the module's docstring has terms."""

    num_rollouts: int
    num_completions: int  # of one rollout
    cosine: float
    standard_error: float  # of the cosine, by jackknife over rollouts
    squared_norm: float  # |g|^2
    trace: float
    completions_needed: float  # inf without a positive |g|^2


def measure_signal(
    model: Transformer, config: GRPOConfig, task: Task, reward: RewardFunction
) -> None:
    """Print how far the gradients of the first rollouts agree, all at the weights of --init.

    Without the KL term, whose gradient is 0 there. Nothing is trained and nothing is written.
    """
    once = replace(config, num_epochs=1, num_minibatches=1)
    training = split_starts(task.plant).training
    needed, free = 4 * config.measure_signal * model.num_trained(), free_memory(torch.device("cpu"))
    if needed > free:
        raise ValueError(
            f"measure_signal keeps {config.measure_signal} gradients, {needed / 2**30:.1f} GiB, "
            f"and {free / 2**30:.1f} are free: fewer, or those of adapters alone, --lora-rank"
        )
    gradients = torch.empty(config.measure_signal, model.num_trained())  # [K, D], rank 0's
    with process_group(config.device) as device:
        check_batch(once)
        set_matmul_precision(config.matmul_precision, device)
        model.to(device)
        hidden = None if rank() == 0 else True  # None: unless it is a terminal
        for step in tqdm(range(config.measure_signal), unit="rollout", disable=hidden):
            prompts, places = prompts_of_step(training, once, task, step)
            rollout = make_rollout(model, None, prompts, places, once, task, reward)[0]
            gradient = rollout_gradient(model, rollout, once)
            if rank() == 0:
                gradients[step] = gradient
        if rank() == 0:
            rows = config.prompts_per_step * config.group_size
            print(signal_table(gradient_signal(gradients, rows)))


def rollout_gradient(model: Transformer, rollout: Rollout, config: GRPOConfig) -> Tensor:
    """The gradient of a whole rollout of all ranks as one vector [D], float32, on the CPU."""
    model.zero_grad(set_to_none=True)
    rows = torch.arange(len(rollout.rewards))
    accumulate_gradient(model, rollout, rows, config)
    reduce_gradients(model)
    gradients = [p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(gradients)


def gradient_signal(gradients: Tensor, num_completions: int) -> GradientSignal:
    """Gradients [K, D] of independent rollouts of n completions -> signal and noise.

    K is at least 3, as `measure_signal` is, for an error of the cosine.
    """
    products = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for part in torch.split(gradients, 2**20, dim=1):
        products += part.double() @ part.double().T
    norms = products.diagonal().sqrt()
    lengths = rearrange(norms, "k -> k 1") * rearrange(norms, "k -> 1 k")
    cosine, error = pair_mean(products / lengths.clamp(min=torch.finfo(torch.float64).tiny))
    squared_norm, _ = pair_mean(products)
    # Not max(), which can lose a NaN.
    trace = num_completions * float((products.diagonal().mean() - squared_norm).clamp(min=0.0))
    needed = ODDS * trace / squared_norm if squared_norm > 0 else math.inf
    return GradientSignal(
        len(gradients), num_completions, cosine, error, squared_norm, trace, needed
    )


def pair_mean(matrix: Tensor) -> tuple[float, float]:
    """Mean of a symmetric [K, K] off the diagonal, and its jackknife standard error over K.

    error^2 = (K - 1) / K sum_k (m_k - mean of m)^2,  m_k the mean without row and column k
    (Efron, Tibshirani 1993, eq. 11.5). The pairs share rollouts, so theirs would be too small. Of
    independent vectors without any common direction it is sqrt(2 (K - 1) / (K - 2)) times too large
    (1.5 for 8), which is safe.
    """
    k = len(matrix)
    of_row = matrix.sum(dim=1) - matrix.diagonal()  # [K]
    total = of_row.sum()
    without = (total - 2 * of_row) / ((k - 1) * (k - 2))  # [K]
    error = ((k - 1) / k * (without - without.mean()).square().sum()).sqrt()
    return float(total / (k * (k - 1))), float(error)


def signal_table(signal: GradientSignal) -> str:
    """The measurement in four lines, and how to read it."""
    cosine = f"{signal.cosine:.3f} +- {signal.standard_error:.3f}"
    what = f"gradients of {signal.num_rollouts} rollouts of {signal.num_completions} completions"
    rows = (
        (f"cosine between {what}", cosine),
        ("|gradient|^2", f"{signal.squared_norm:.2e}"),
        ("trace of the covariance of one completion", f"{signal.trace:.2e}"),
        (f"completions for {WANTED_COSINE} with their mean", f"{signal.completions_needed:,.0f}"),
    )
    table = "\n".join(f"  {name:60s} {value}" for name, value in rows)
    return (
        f"{table}\nCompare the last number with the completions of the whole run: many small steps "
        "average noise as one large batch does. If it is not far below, or the cosine within two "
        "errors of 0, change start or temperature before a long run. It is a gate, not a ruler."
    )
