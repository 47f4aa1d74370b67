"""Group relative policy optimisation: the whole mathematics, as pure functions of tensors.

    A_i   = (R_i - mean_g R) / (std_g R + 1e-4)         group_advantages, once per rollout
    r_it  = exp(logprobs - old_logprobs)                exactly 1 on the first update
    l_it  = -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)                policy_loss
    kl_it = r (exp(-d) + d - 1),  d = logprobs - ref_logprobs              reference_kl
    loss  = sum_it w_it (l_it - e_it + kl_beta kl_it) / denominator        grpo_loss
    e_it  = sum_a q(a) W(a) / (s + 1e-4) where r is within the clip bounds, 0 in value
            only with credit for each control (counterfactual.py); A in l_it is then of what
            came after the token, and 1 / (s + 1e-4) is `advantage_scale`, as in A

    dapo      w = mask             denominator = active tokens
    grpo      w = mask / length_i  denominator = rows
    dr_grpo   w = mask             denominator = rows * longest completion allowed

Denominators count the whole optimizer step, all micro-batches and all ranks, before the first
backward: the losses of the micro-batches then just add up, however the rows were split.

P prompts   G group size   N = P*G rows, group-major: n = p*G + g   M rows of one micro-batch
C completion length (right-padded); mask [M, C] is True up to and including EOS

Deviations from DeepSeekMath (2402.03300):
- Log-probs are those of the policy that acted: on the kept support, at the sampling temperature.
- KL is ratio times k3. The paper's plain k3 has the value of KL(current, ref), but the gradient
  of KL(ref, current); see `reference_kl`.
- The default is a token mean over the step (dapo), not a mean per sequence; `grpo` restores it.
  DAPO's equation divides by the tokens of each group, then averages over prompts; all tokens of the
  optimizer step at once is what widespread implementations do.
- The reference stays the model of --init; Algorithm 1 of the paper renews it in each of its outer
  iterations.
- Sample standard deviation (the paper does not say which) plus 1e-4; a group whose rewards span
  less than 1e-6 gets exactly 0.
- Two clip bounds instead of one, and a kl_beta of 0.01 by default (tiny model 0.001), where 0 loads
  no reference.
- With credit for each control a token's gradient is over all tokens that could have been written,
  and its own term stops where the ratio of the drawn one leaves the clip bounds, on either side and
  in either direction.
- The log ratio is clamped to +-20 before exp; a clamped token is counted, its policy gradient 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange, reduce
from torch import Tensor

AdvantageStd = Literal["group", "batch", "none"]
Aggregation = Literal["dapo", "grpo", "dr_grpo"]

STD_EPSILON = 1e-4
CONSTANT_SPAN = 1e-6
MAX_EXPONENT = 20.0  # far beyond any clip bound, far below what exp overflows at in float32


@dataclass(frozen=True)
class Objective:
    """The settings of the loss, under the names of the flags."""

    clip_eps_low: float
    clip_eps_high: float
    kl_beta: float
    aggregation: Aggregation


@dataclass(frozen=True)
class LossMetrics:
    """Float64 scalars that add up over micro-batches, ranks and optimizer steps; detached."""

    loss: Tensor  # already divided by the step's denominator, like policy_loss
    policy_loss: Tensor
    num_tokens: Tensor  # active ones, as in all that follows
    num_clip_low: Tensor  # the clip binds, A < 0
    num_clip_high: Tensor  # the clip binds, A > 0
    num_clamped: Tensor  # abs(log ratio) > 20
    num_far: Tensor  # the ratio is beyond a clip bound, whatever A
    ref_kl: Tensor  # sum of r k3, KL(current, ref): the penalty; 0 without a reference
    approx_kl: Tensor  # sum of k3, KL(old, current): the drift
    ratio_sum: Tensor
    ratio_min: Tensor  # the last two don't add: the lowest and the highest are kept
    ratio_max: Tensor

    def vector(self) -> Tensor:
        """The fields in order, [12]: one tensor to gather; `LossMetrics(*vector)` goes back."""
        return torch.stack(list(vars(self).values()))


def group_advantages(
    rewards: Tensor,
    group_size: int,
    advantage_std: AdvantageStd,
    batch_rewards: Tensor | None = None,
) -> Tensor:
    """Reward minus the group's mean, in units of a standard deviation; groups are index ranges.

    A_i = (R_i - mean_g R) / (s + 1e-4)    DeepSeekMath 4.1.2; [N] -> [N] float64, sum 0 per group
    s is the group's sample standard deviation (`group`), that of all raw rewards of the rollout
    (`batch`; `batch_rewards` holds those of all ranks, None: `rewards` are all), or A_i is not
    divided at all (`none`: Dr. GRPO, 2503.20783). A group of equal rewards gets exactly 0: the
    rounding of its mean, divided by 1e-4, would be a signal. ValueError if N is no multiple of
    group_size.
    """
    scale = advantage_scale(rewards, group_size, advantage_std, batch_rewards)  # [P]
    scale = torch.where(constant_groups(rewards, group_size), 0.0, scale)
    groups = rearrange(rewards.double(), "(p g) -> p g", g=group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return rearrange(centred * rearrange(scale, "p -> p 1"), "p g -> (p g)")


def advantage_scale(
    rewards: Tensor, group_size: int, advantage_std: AdvantageStd, batch_rewards: Tensor | None
) -> Tensor:
    """1 / (s + 1e-4) of each group, 0 for equal rewards; `none`: 1; [N] -> [P]."""
    constant = constant_groups(rewards, group_size)
    groups = rearrange(rewards.double(), "(p g) -> p g", g=group_size)
    match advantage_std:
        case "group":
            return torch.where(constant, 0.0, 1 / (groups.std(dim=1) + STD_EPSILON))
        case "batch":
            everything = (rewards if batch_rewards is None else batch_rewards).double()
            differs = everything.amax() - everything.amin() >= CONSTANT_SPAN
            scale = torch.where(differs, 1 / (everything.std() + STD_EPSILON), 0.0)
            return scale.expand(len(groups))
        case "none":
            return groups.new_ones(len(groups))


def constant_groups(rewards: Tensor, group_size: int) -> Tensor:
    """Groups whose rewards span less than 1e-6 and teach nothing: [N] -> [P] bool."""
    if group_size < 2 or rewards.ndim != 1 or len(rewards) % group_size:
        shape = tuple(rewards.shape)
        raise ValueError(f"rewards must be whole groups of {group_size} >= 2 rows, got {shape}")
    highest = reduce(rewards.double(), "(p g) -> p", "max", g=group_size)
    lowest = reduce(rewards.double(), "(p g) -> p", "min", g=group_size)
    return highest - lowest < CONSTANT_SPAN


def token_weights(mask: Tensor, aggregation: Aggregation, dtype: torch.dtype) -> Tensor:
    """Weight of each token's loss before the division by `loss_denominator`: [M, C] bool -> [M, C].

    1 on active tokens; `grpo` divides by the row's own length (a row without any gets 0).
    """
    weights = mask.to(dtype)
    match aggregation:
        case "dapo" | "dr_grpo":
            return weights
        case "grpo":
            return weights / weights.sum(dim=1, keepdim=True).clamp(min=1.0)


def loss_denominator(mask: Tensor, aggregation: Aggregation, max_length: int) -> Tensor:
    """What the loss over these rows is divided by: [rows, C] bool -> float64 scalar.

    Those of micro-batches and ranks add up; do that before the first backward.
    `max_length` is the longest completion allowed, not the width C of the mask at hand, which
    depends on what was sampled: only a constant leaves no length bias (Dr. GRPO, 2503.20783).
    """
    rows = mask.new_full((), len(mask), dtype=torch.float64)  # new_tensor would copy and wait
    match aggregation:
        case "dapo":
            return mask.sum().double()
        case "grpo":
            return rows
        case "dr_grpo":
            return rows * max_length


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    mask: Tensor,
    advantages: Tensor,
    denominator: Tensor,
    objective: Objective,
    expected_values: Tensor | None = None,
) -> tuple[Tensor, LossMetrics]:
    """One micro-batch's share of the step's loss, to be added up; a scalar with a graph.

    loss = sum_it w_it (l_it - e_it + kl_beta kl_it) / denominator
    logprobs, old_logprobs, ref_logprobs [M, C] nats; mask [M, C] bool; advantages [M], or [M, C]
    for per-token credit; denominator from `loss_denominator`, of the whole step.
    `old_logprobs` None: the rollout feeds exactly one optimizer step, old is `logprobs.detach()`.
    `ref_logprobs` None: no KL term. What lies outside the mask, NaN included, is never seen.
    `expected_values` [M, C], in units of the advantages: sum_a q(a) W(a) up to a constant, what a
    choice is worth in expectation over all tokens (`counterfactual`). Its gradient is subtracted
    where the ratio is within the clip bounds, 0 in value; there `advantages` are of what came after
    the choice.
    """
    names = ("logprobs", "old_logprobs", "ref_logprobs", "advantages", "expected_values")
    tensors = (logprobs, old_logprobs, ref_logprobs, advantages, expected_values)
    for name, tensor in zip(names, tensors, strict=True):
        allowed = (mask.shape[:1], mask.shape) if name == "advantages" else (mask.shape,)
        if tensor is not None and tensor.shape not in allowed:
            wanted = " or ".join(str(tuple(shape)) for shape in allowed)
            raise ValueError(f"{name} must have shape {wanted}, got {tuple(tensor.shape)}")
    if advantages.ndim == 1:
        advantages = rearrange(advantages, "m -> m 1")

    low, high = objective.clip_eps_low, objective.clip_eps_high
    # `where` here, once, and not "times mask" later: 0 * NaN is NaN, in value and in gradient.
    advantages = torch.where(mask, advantages.to(logprobs.dtype), 0.0)  # [M, C]
    logprobs = torch.where(mask, logprobs, 0.0)
    old = logprobs.detach() if old_logprobs is None else torch.where(mask, old_logprobs, 0.0)
    weights = token_weights(mask, objective.aggregation, logprobs.dtype)
    weights = weights / denominator.clamp(min=1.0)

    log_ratio = logprobs - old  # [M, C], 0 outside the mask
    ratio = log_ratio.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()
    per_token = policy_loss(ratio, advantages, low, high)
    is_near = (ratio >= 1.0 - low) & (ratio <= 1.0 + high)  # [M, C]
    if expected_values is not None:
        expected = torch.where(mask & is_near, expected_values, 0.0)
        per_token = per_token - (expected - expected.detach())
    policy_part = (weights * per_token).sum()
    kl = torch.zeros_like(ratio)
    if ref_logprobs is not None:
        kl = reference_kl(logprobs, torch.where(mask, ref_logprobs, 0.0), ratio)
    loss = policy_part + objective.kl_beta * (weights * kl).sum()

    with torch.no_grad():
        clip_low, clip_high = clip_binds(ratio, advantages, low, high)
        metrics = LossMetrics(
            loss=loss.detach().double(),
            policy_loss=policy_part.detach().double(),
            num_tokens=mask.sum().double(),
            num_clip_low=clip_low.sum().double(),
            num_clip_high=clip_high.sum().double(),
            num_clamped=(log_ratio.abs() > MAX_EXPONENT).sum().double(),
            num_far=(mask & ~is_near).sum().double(),
            ref_kl=kl.sum(dtype=torch.float64),
            approx_kl=k3_divergence(old, logprobs).sum(dtype=torch.float64),
            ratio_sum=torch.where(mask, ratio, 0.0).sum(dtype=torch.float64),
            ratio_min=torch.where(mask, ratio, torch.inf).amin().double(),
            ratio_max=torch.where(mask, ratio, -torch.inf).amax().double(),
        )
    return loss, metrics


def policy_loss(
    ratio: Tensor, advantages: Tensor, clip_eps_low: float, clip_eps_high: float
) -> Tensor:
    """Per-token clipped surrogate, a loss: the pessimistic one of two; [M, C], [M, C] -> [M, C].

    -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)    PPO, 1707.06347 eq. 7; DAPO's two bounds
    At r = 1 the branches tie and autograd takes half of each: the gradient is -A grad logprobs.
    """
    clipped = ratio.clamp(1.0 - clip_eps_low, 1.0 + clip_eps_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def clip_binds(
    ratio: Tensor, advantages: Tensor, clip_eps_low: float, clip_eps_high: float
) -> tuple[Tensor, Tensor]:
    """Where the clip takes the gradient away: low (A < 0) and high (A > 0), [M, C] bool each.

    A ratio beyond the *other* bound is not clipped: it is still pulled back.
    """
    low = (advantages < 0) & (ratio < 1.0 - clip_eps_low)
    high = (advantages > 0) & (ratio > 1.0 + clip_eps_high)
    return low, high


def reference_kl(logprobs: Tensor, ref_logprobs: Tensor, ratio: Tensor) -> Tensor:
    """Per-token penalty with the value r k3 and the gradient r d grad logprobs, [M, C] nats.

    d = logprobs - ref_logprobs. The expected gradient is that of KL(current, ref) at each
    prefix, on and off policy (DeepSeek-V3.2, 2512.02556 eq. 7, differentiates r k3 with r inside).
    Autograd through r k3 gives the same r d as r k3 + r (1 - exp(-d)), which cancels: at d = -50
    nothing is left of it. Here it comes from a product that is 0 in value.
    """
    held, weight = logprobs.detach(), ratio.detach()
    value = weight * k3_divergence(held, ref_logprobs)
    return value + weight * (held - ref_logprobs) * (logprobs - held)


def k3_divergence(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per-token estimate of KL(current, ref), never negative; its value is used, not its gradient.

    k3 = expm1(x) - x, x = ref - current    DeepSeekMath, eq. 4; [M, C] nats -> [M, C] nats
    Its on-policy gradient is that of KL(ref, current), the other direction: `reference_kl` has the
    right one. expm1, since exp(x) - x - 1 in float32 is 0 or negative for x = 1e-4.
    """
    x = ref_logprobs - logprobs
    return torch.expm1(x.clamp(max=MAX_EXPONENT)) - x


def merge_metrics(parts: Sequence[LossMetrics]) -> LossMetrics:
    """Those of several micro-batches, ranks or optimizer steps as one."""
    rows = torch.stack([part.vector() for part in parts])  # [parts, 12]
    extremes = [rows[:, -2].amin(), rows[:, -1].amax()]
    return LossMetrics(*rows[:, :-2].sum(dim=0).unbind(), *extremes)


def loss_report(metrics: LossMetrics, num_steps: int) -> dict[str, float]:
    """Metric names to numbers: losses are means over the optimizer steps, the rest over tokens."""
    total = {name: float(value) for name, value in vars(metrics).items()}
    tokens = max(total["num_tokens"], 1.0)
    low, high = total["num_clip_low"] / tokens, total["num_clip_high"] / tokens
    return {
        "loss/total": total["loss"] / num_steps,
        "loss/policy": total["policy_loss"] / num_steps,
        "loss/ref_kl": total["ref_kl"] / tokens,
        "loss/approx_kl": total["approx_kl"] / tokens,
        "loss/clip_fraction": low + high,
        "loss/clip_fraction_low": low,
        "loss/clip_fraction_high": high,
        "loss/num_clamped": total["num_clamped"],
        "loss/frac_far": total["num_far"] / tokens,
        "loss/ratio_mean": total["ratio_sum"] / tokens,
        "loss/ratio_min": total["ratio_min"],
        "loss/ratio_max": total["ratio_max"],
    }
