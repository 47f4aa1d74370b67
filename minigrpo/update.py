"""One policy update: epochs, minibatches, micro-batches, backward, clip, step. No formula of the loss lives here.

An optimizer step covers one minibatch of whole groups on all ranks. Its denominator is counted before the first backward, so
neither the size of the micro-batches nor the number of ranks changes the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from einops import repeat
from torch import Tensor

from minigrpo.config import GRPOConfig
from minigrpo.data import keyed_generator
from minigrpo.distributed import (
    gather_rows,
    gradient_norm,
    max_over_ranks,
    reduce_gradients,
    scale_gradient,
    sum_over_ranks,
)
from minigrpo.grpo import LossMetrics, grpo_loss, loss_denominator, loss_report, merge_metrics
from minigrpo.policy import completion_scores
from minigrpo.rollout import Rollout
from minigrpo.transformer import Transformer

MAX_SKIPPED_IN_A_ROW = 3


@dataclass(frozen=True)
class PolicyUpdate:
    """What an update did, over all ranks."""

    metrics: dict[str, float]  # loss/..., update/..., policy/...
    num_skipped: int  # optimizer steps not applied, because the gradient norm was not finite


def update_policy(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    config: GRPOConfig,
    step: int,
    learning_rate: float,
    max_length: int,
) -> PolicyUpdate:
    """num_epochs x num_minibatches optimizer steps on one rollout; the learning rate is that of all of them."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    parts, norms, entropies, skipped = [], [], [], 0
    for rows in minibatches(rollout, config, step):
        optimizer.zero_grad(set_to_none=True)
        metrics, entropy = accumulate_gradient(model, rollout, rows, config, max_length)
        reduce_gradients(model)
        norm = gradient_norm(model)
        parts.append(metrics)
        entropies.append(entropy)
        norms.append(norm)
        if not math.isfinite(norm):  # the norm is that of all ranks, so all skip together
            skipped += 1
            continue
        scale_gradient(model, min(1.0, config.max_grad_norm / (norm + 1e-6)))
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    merged = _over_ranks(merge_metrics(parts))
    report = loss_report(merged, len(parts))
    entropy = sum_over_ranks(torch.stack(entropies).sum())
    finite = [norm for norm in norms if math.isfinite(norm)]
    report |= {
        "policy/entropy": float(entropy) / max(1.0, float(merged.num_tokens)),
        "update/grad_norm": sum(finite) / len(finite) if finite else math.nan,
        "update/learning_rate": learning_rate,
        "update/num_skipped": float(skipped),
    }
    return PolicyUpdate(report, skipped)


def minibatches(rollout: Rollout, config: GRPOConfig, step: int) -> Iterator[Tensor]:
    """This rank's rows of each optimizer step: whole groups, dealt by a prompt's place among those of all ranks.

    The first epoch keeps the order of the rollout (that of its scoring pass); later epochs shuffle the prompts.
    """
    for epoch in range(config.num_epochs):
        order = np.arange(config.prompts_per_step)
        if epoch:
            order = keyed_generator(config.seed, "shuffle", step, epoch).permutation(config.prompts_per_step)
        for chosen in np.array_split(order, config.num_minibatches):
            mine = torch.isin(rollout.prompt_places, torch.from_numpy(chosen))  # [P]
            yield repeat(mine, "p -> (p g)", g=rollout.group_size).nonzero().flatten()


def accumulate_gradient(
    model: Transformer, rollout: Rollout, rows: Tensor, config: GRPOConfig, max_length: int
) -> tuple[LossMetrics, Tensor]:
    """Backward over the micro-batches of one optimizer step -> this rank's sums, and that of the entropy.

    All ranks run the same number of micro-batches, since sharded parameters are gathered in each; one who has no rows
    left repeats its first row with an empty mask, which weighs nothing.
    """
    device = rollout.completion_tokens.device
    rows = rows.to(device)
    denominator = sum_over_ranks(loss_denominator(rollout.completion_mask[rows], config.aggregation, max_length))
    num_micro = max_over_ranks(math.ceil(len(rows) / config.micro_batch_size))
    entropy = torch.zeros((), dtype=torch.float64, device=device)
    parts, nobody = [], torch.zeros(1, dtype=torch.int64, device=device)
    for i in range(num_micro):
        chosen = rows[i * config.micro_batch_size : (i + 1) * config.micro_batch_size]
        is_real = len(chosen) > 0
        chosen = chosen if is_real else nobody
        mask = rollout.completion_mask[chosen] & is_real
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            scores = completion_scores(
                model,
                rollout.prompt_tokens[chosen],
                rollout.prompt_mask[chosen],
                rollout.completion_tokens[chosen],
                None if rollout.support is None else rollout.support[chosen],
                config.temperature,
            )
        loss, metrics = grpo_loss(
            scores.logprobs,
            None if rollout.old_logprobs is None else rollout.old_logprobs[chosen],
            None if rollout.ref_logprobs is None else rollout.ref_logprobs[chosen],
            mask,
            rollout.advantages.to(device)[chosen],
            denominator,
            config.clip_eps_low,
            config.clip_eps_high,
            config.kl_beta,
            config.aggregation,
        )
        loss.backward()
        parts.append(metrics)
        entropy += scores.entropy[mask].sum()
    return merge_metrics(parts), entropy


def _over_ranks(metrics: LossMetrics) -> LossMetrics:
    per_rank = gather_rows([metrics.vector().cpu()])
    return merge_metrics([LossMetrics(*rows[0]) for rows in per_rank])


def warnings_of(metrics: dict[str, float], step: int) -> list[str]:
    """What a user should hear of when nothing can be learned."""
    found = []
    if metrics["rollout/frac_zero_std_groups"] == 1:
        found.append("every group has equal rewards: no gradient. Raise temperature or group_size")
    if metrics["rollout/frac_truncated"] > 0.05:
        found.append(
            f"{metrics['rollout/frac_truncated']:.0%} of the completions never stopped: train SFT longer"
        )
    if metrics["rollout/frac_valid"] < 0.5:
        found.append(f"only {metrics['rollout/frac_valid']:.0%} of the completions are valid: train SFT longer")
    if metrics["update/grad_norm"] == 0:
        found.append("the gradient is exactly 0: the parameters do not change")
    return [f"WARNING step {step + 1}: {line}" for line in found]
