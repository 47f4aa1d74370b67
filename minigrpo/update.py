"""One policy update: epochs, minibatches, micro-batches, backward, clip, step; no loss formulas.

An optimizer step covers one minibatch of whole groups on all ranks. Its denominator is counted
before the first backward, so neither the size of the micro-batches nor the number of ranks changes
the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from minigrpo.config import GRPOConfig
from minigrpo.distributed import backward, gather_rows, max_over_ranks, sum_over_ranks
from minigrpo.grpo import (
    LossMetrics,
    Objective,
    grpo_loss,
    loss_denominator,
    loss_report,
    merge_metrics,
)
from minigrpo.optim import apply_gradient, set_learning_rate
from minigrpo.rollout import Rollout, minibatches, prompts_of, rows_of
from minigrpo.scoring import completion_scores
from minigrpo.transformer import Transformer

MAX_SKIPPED_IN_A_ROW = 3


def update_policy(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    config: GRPOConfig,
    step: int,
    learning_rate: float,
    kernel: Tensor | None = None,
) -> tuple[dict[str, float], list[bool]]:
    """num_epochs x num_minibatches optimizer steps on one rollout, all at this learning rate.

    Where a minibatch finds the policy further than `target_kl` from the one that sampled, it and
    those after it are left out. `optim.smooth_gradients` spreads gradients by the kernel.

    Returned, the same on all ranks: metrics (loss/..., update/..., policy/entropy and
    rollout/logprob_gap_max), and of each optimizer step whether it was skipped, because its
    gradient norm was not finite.
    """
    set_learning_rate(optimizer, learning_rate)
    found: list[tuple[LossMetrics, Tensor, Tensor]] = []
    norms, drifts = [], []
    for rows in minibatches(rollout.prompt_places, config, step):
        optimizer.zero_grad(set_to_none=True)
        has_moved = bool(found)  # the first step is at the weights that sampled
        found.append(accumulate_gradient(model, rollout, rows, config, has_moved))
        drifts.append(drift_of(found[-1][0]))
        if config.target_kl and drifts[-1] > config.target_kl:
            break
        norms.append(apply_gradient(model, optimizer, config.max_grad_norm, kernel))
    optimizer.zero_grad(set_to_none=True)
    parts, entropies, gaps = zip(*found, strict=True)
    sums = [merge_metrics(parts).vector(), torch.stack(entropies).sum(), torch.stack(gaps).amax()]
    vectors, entropies, gaps = zip(*gather_rows([value.cpu() for value in sums]), strict=True)
    merged = merge_metrics([LossMetrics(*vector) for vector in vectors])
    entropy, gap = torch.stack(entropies).sum(), torch.stack(gaps).amax()
    report = loss_report(merged, len(parts))
    finite = [norm for norm in norms if math.isfinite(norm)]
    report |= {
        "policy/entropy": float(entropy) / max(1.0, float(merged.num_tokens)),
        "update/grad_norm": sum(finite) / len(finite) if finite else math.nan,
        "update/learning_rate": learning_rate,
        "update/num_steps": float(len(norms)),
        # Not max(), which can lose a NaN.
        "update/max_drift": float(torch.tensor(drifts, dtype=torch.float64).amax()),
        "update/num_skipped": float(len(norms) - len(finite)),
        "rollout/logprob_gap_max": float(gap),
    }
    return report, [not math.isfinite(norm) for norm in norms]


def skipped_in_a_row(before: int, is_skipped: Sequence[bool]) -> int:
    """Steps since the last one that was made, `before` of them before this update.

    One that was made later does not take MAX_SKIPPED_IN_A_ROW back once that was reached.
    """
    for skipped in is_skipped:
        if before < MAX_SKIPPED_IN_A_ROW:
            before = before + 1 if skipped else 0
    return before


def drift_of(metrics: LossMetrics) -> float:
    """KL(old, current) of one minibatch of all ranks, nats a token."""
    sums = sum_over_ranks(torch.stack([metrics.approx_kl, metrics.num_tokens]).cpu())
    return float(sums[0] / sums[1].clamp(min=1))


def accumulate_gradient(
    model: Transformer,
    rollout: Rollout,
    rows: Tensor,
    config: GRPOConfig,
    has_moved: bool = False,
) -> tuple[LossMetrics, Tensor, Tensor]:
    """Backward over the micro-batches of one optimizer step.

    With `has_moved` these are not the weights that sampled, and choices are simulated again if
    the config follows the policy.

    Returned, of this rank: sums for the metrics, the sum of the entropy, and the largest gap
    between the decoder's log-probs and those recomputed before the first optimizer step.
    All ranks run the same number of micro-batches, since sharded parameters are gathered in each;
    one that has no rows left repeats its first row with an empty mask, which weighs nothing.
    """
    device = rollout.completion_tokens.device
    rows = rows.to(device)
    mask = rollout.completion_mask[rows]
    denominator = sum_over_ranks(loss_denominator(mask, config.aggregation, rollout.max_length))
    objective = Objective(
        config.clip_eps_low, config.clip_eps_high, config.kl_beta, config.aggregation
    )
    num_micro = max_over_ranks(math.ceil(len(rows) / config.micro_batch_size))
    entropy = torch.zeros((), dtype=torch.float64, device=device)
    gap = torch.zeros((), device=device)
    credit, advantages = rollout.credit, rollout.advantages.to(device)
    parts, nobody = [], torch.zeros(1, dtype=torch.int64, device=device)
    for i in range(num_micro):
        chosen = rows[i * config.micro_batch_size : (i + 1) * config.micro_batch_size]
        is_real = len(chosen) > 0
        chosen = chosen if is_real else nobody
        tokens, mask = rollout.completion_tokens[chosen], rollout.completion_mask[chosen] & is_real
        prompts = prompts_of(chosen, config)
        old = rows_of(rollout.old_logprobs, chosen)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            scores = completion_scores(
                model,
                rollout.prompt_tokens[prompts],
                rows_of(rollout.prompt_mask, prompts),
                tokens,
                rows_of(rollout.support, chosen),
                config.temperature,
                None if credit is None else credit.choices.basis,
            )
        expected = None
        if credit is not None:
            again = has_moved and config.follow_policy
            mass = cast(Tensor, scores.mass)
            expected = credit.expected_values(chosen, mass, tokens, mask, again)
        loss, metrics = grpo_loss(
            scores.logprobs,
            old,
            rows_of(rollout.ref_logprobs, chosen),
            mask,
            advantages[chosen],
            denominator,
            objective,
            expected,
        )
        backward(model, loss)
        parts.append(metrics)
        # `where` and not an index, for which a GPU's host would have to wait.
        entropy += torch.where(mask, cast(Tensor, scores.entropy), 0.0).sum()
        # None: this is the only optimizer step, and the log-probs of now are the old ones.
        old = scores.logprobs.detach() if old is None else old
        difference = torch.where(mask, old - rollout.sampling_logprobs[chosen], 0.0)
        gap = torch.maximum(gap, difference.abs().amax())
    return merge_metrics(parts), entropy, gap


def warnings_of(
    metrics: dict[str, float], config: GRPOConfig, step: int, is_on_cuda: bool
) -> list[str]:
    """What a user should hear of when nothing can be learned, or not what was sampled.

    Sampler and scorer differ by rounding: 1e-5 nats in float32, below 0.1 with TF32, up to 0.4
    where products are made of bfloat16.
    """
    found, gap = [], metrics["rollout/logprob_gap_max"]
    truncated, valid = metrics["rollout/frac_truncated"], metrics["rollout/frac_valid"]
    if config.precision == "bfloat16" or config.matmul_precision == "medium":
        limit = 1.0
    else:
        limit = 0.1 if is_on_cuda and config.matmul_precision != "highest" else 1e-3
    if not gap <= limit:  # NaN is not
        differ = f"sampled and recomputed log-probs differ by {gap:.1e} nats"
        found.append(f"{differ}: these are two policies")
    if metrics["rollout/frac_zero_std_groups"] == 1 and config.credit == "completion":
        found.append(
            "every group has equal rewards: nothing to learn. Raise temperature or group_size"
        )
    if truncated > 0.05:
        found.append(f"{truncated:.0%} of the completions never stopped: train SFT longer")
    if valid < 0.5:
        found.append(
            f"only {valid:.0%} of the completions are valid: train SFT longer, or, if they were, "
            "see that valid text earns more than malformed"
        )
    if skipped := metrics["update/num_skipped"]:
        found.append(
            f"{skipped:.0f} of {metrics['update/num_steps']:.0f} optimizer steps had a gradient "
            "that is not finite and were left out; their batches are in skipped/"
        )
    if metrics["update/grad_norm"] == 0:
        found.append("the gradient is exactly 0: AdamW only goes on as before")
    return [f"WARNING step {step + 1}: {line}" for line in found]
