"""The mathematics of grpo.py against slow loops, exact enumeration and numbers worked by hand.

Distinct primes as sizes, float64 unless precision is the subject. Expectations over small
vocabularies are exact sums over all outcomes, so they are compared to rounding error.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from minigrpo.grpo import (
    AdvantageStd,
    Aggregation,
    LossMetrics,
    Objective,
    advantage_scale,
    clip_binds,
    constant_groups,
    group_advantages,
    grpo_loss,
    k3_divergence,
    loss_denominator,
    loss_report,
    merge_metrics,
    policy_loss,
    reference_kl,
    token_weights,
)

STDS: tuple[AdvantageStd, ...] = ("group", "batch", "none")
AGGREGATIONS: tuple[Aggregation, ...] = ("dapo", "grpo", "dr_grpo")
ROUNDING = 1e-12  # float64 sums of up to a few hundred terms of size 1


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mask_of(lengths: list[int], width: int) -> Tensor:
    return torch.tensor([[t < length for t in range(width)] for length in lengths])


# --- the batch most tests use, and the paper's formulas as loops over it ---


@dataclass(frozen=True)
class Batch:
    logprobs: Tensor
    old: Tensor | None
    ref: Tensor | None
    mask: Tensor
    advantages: Tensor

    def rows(self, chosen: slice) -> Batch:
        old = None if self.old is None else self.old[chosen]
        ref = None if self.ref is None else self.ref[chosen]
        return Batch(self.logprobs[chosen], old, ref, self.mask[chosen], self.advantages[chosen])


def logprobs_of(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Current, old and reference ones of a batch that has all three."""
    assert batch.old is not None and batch.ref is not None
    return batch.logprobs, batch.old, batch.ref


def uneven_batch(seed: int = 0, filler: float = math.nan) -> Batch:
    """Seven rows of 1 to 11 tokens; ratios from about 0.3 to 3, so both clips bind."""
    mask = mask_of([1, 11, 4, 7, 2, 10, 5], 11)
    logprobs = -1.0 + 0.5 * random(7, 11, seed=seed)
    old = logprobs + 0.5 * random(7, 11, seed=seed + 1)
    ref = logprobs - random(7, 11, seed=seed + 2)
    now, old, ref = (torch.where(mask, x, filler) for x in (logprobs, old, ref))
    return Batch(now, old, ref, mask, random(7, seed=seed + 3))


def loss_of(
    batch: Batch,
    aggregation: Aggregation = "dapo",
    denominator: Tensor | None = None,
    max_length: int = 13,
    kl_beta: float = 0.3,
    clip: tuple[float, float] = (0.2, 0.28),
) -> tuple[Tensor, Tensor, LossMetrics]:
    """Loss, its gradient with respect to the log-probs, and the metrics."""
    if denominator is None:
        denominator = loss_denominator(batch.mask, aggregation, max_length)
    leaf = batch.logprobs.clone().requires_grad_()
    loss, metrics = grpo_loss(
        leaf, batch.old, batch.ref, batch.mask, batch.advantages, denominator,
        Objective(*clip, kl_beta, aggregation),
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient, metrics


def active_tokens(batch: Batch) -> Iterator[tuple[int, int, float, float, float, float]]:
    """(i, t, log-prob, old, ref, advantage) of each active token, as Python floats."""
    current, before, reference = logprobs_of(batch)
    for i, t in itertools.product(range(batch.mask.shape[0]), range(batch.mask.shape[1])):
        if batch.mask[i, t]:
            a = batch.advantages[i] if batch.advantages.ndim == 1 else batch.advantages[i, t]
            now, old, ref = (x[i, t].item() for x in (current, before, reference))
            yield i, t, now, old, ref, a.item()


def clipped_side(r: float, a: float, low: float, high: float) -> str:
    if a > 0 and r > 1 + high:
        return "high"
    return "low" if a < 0 and r < 1 - low else ""


def slow_loss(
    batch: Batch, aggregation: Aggregation, max_length: int, kl_beta: float, low: float, high: float
) -> tuple[float, Tensor]:
    """Loss and gradient from the formulas of the papers, token by token, differentiated by hand."""
    lengths = [int(row.sum()) for row in batch.mask]
    loss, gradient = 0.0, torch.zeros_like(batch.logprobs)
    for i, t, now, old, ref, a in active_tokens(batch):
        scale = {
            "dapo": 1 / sum(lengths),
            "grpo": 1 / lengths[i] / len(lengths),
            "dr_grpo": 1 / (len(lengths) * max_length),
        }[aggregation]
        r, delta = math.exp(now - old), now - ref
        surrogate = min(r * a, min(max(r, 1 - low), 1 + high) * a)
        k3 = math.exp(-delta) - 1 + delta
        loss += scale * (-surrogate + kl_beta * r * k3)
        slope = 0.0 if clipped_side(r, a, low, high) else -r * a
        gradient[i, t] = scale * (slope + kl_beta * r * delta)
    return loss, gradient


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("seed", [0, 10, 20])
@pytest.mark.parametrize("per_token", [False, True])
def test_loss_and_gradient_are_those_of_the_paper_written_as_loops(
    aggregation: Aggregation, seed: int, per_token: bool
) -> None:
    batch = uneven_batch(seed)
    if per_token:
        credit = torch.where(batch.mask, random(7, 11, seed=seed + 4), math.nan)
        batch = Batch(batch.logprobs, batch.old, batch.ref, batch.mask, credit)
    loss, gradient, _ = loss_of(batch, aggregation)
    expected, slope = slow_loss(batch, aggregation, 13, 0.3, 0.2, 0.28)
    assert loss.item() == pytest.approx(expected, abs=ROUNDING)
    torch.testing.assert_close(gradient, slope, rtol=ROUNDING, atol=ROUNDING)


def test_worked_example_of_two_rows_and_two_tokens() -> None:
    now, old, ref = (
        torch.tensor(probabilities, dtype=torch.float64).log()
        for probabilities in (
            [[0.6, 0.2], [0.1, 0.8]],
            [[0.4, 0.4], [0.2, 0.4]],
            [[0.3, 0.4], [0.2, 0.4]],
        )
    )
    batch = Batch(now, old, ref, mask_of([2, 2], 2), torch.tensor([1.0, -1.0]))
    loss, gradient, metrics = loss_of(batch, kl_beta=0.1)
    # ratios 1.5, 0.5 / 0.5, 2; losses -1.28 (clipped), -0.5 / 0.8 (clipped), 2
    # k3 = 0.193147 where the policy doubled the reference, 0.306853 where it halved it
    kl = 1.5 * 0.193147 + 0.5 * 0.306853 + 0.5 * 0.306853 + 2 * 0.193147
    slopes = torch.tensor([[1.039721, -0.346574], [-0.346574, 1.386294]]).double()  # r log 2
    expected = (torch.tensor([[0.0, -0.5], [0.0, 2.0]]) + 0.1 * slopes) / 4
    assert loss.item() == pytest.approx((1.02 + 0.1 * kl) / 4, abs=1e-6)  # six digits by hand
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)
    assert (metrics.num_clip_low.item(), metrics.num_clip_high.item()) == (1, 1)


def test_worked_example_of_the_readme_from_rewards_to_loss() -> None:
    advantages = group_advantages(torch.tensor([120.0, 0.0, 0.0]), 3, "group")
    assert advantages.tolist() == pytest.approx([1.1547, -0.5774, -0.5774], abs=1e-4)  # 4 digits
    mask = mask_of([3, 2, 3], 3)
    batch = Batch(random(3, 3, seed=1), None, None, mask, advantages)
    expected = -(3 * 1.1547 - 2 * 0.5774 - 3 * 0.5774) / 8
    loss, gradient, _ = loss_of(batch, "dapo")
    assert loss.item() == pytest.approx(expected, abs=1e-4)
    assert loss_of(batch, "grpo")[0].item() == pytest.approx(0.0, abs=ROUNDING)
    assert gradient.abs().max().item() == pytest.approx(1.1547 / 8, abs=1e-4)  # small loss, no rest


# --- advantages ---


def slow_advantages(rewards: list[float], group_size: int, std: AdvantageStd) -> list[float]:
    result = []
    for row, reward in enumerate(rewards):
        first = row - row % group_size
        group = rewards[first : first + group_size]
        spread = statistics.stdev(group if std == "group" else rewards)
        scale = 1.0 if std == "none" else spread + 1e-4
        result.append((reward - statistics.fmean(group)) / scale)
    return result


def test_advantages_of_a_group_worked_by_hand() -> None:
    rewards = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert rewards.std().item() == pytest.approx(2.160247, abs=1e-6)
    expected = [-0.925777, -0.462889, 0.0, 1.388666]
    assert group_advantages(rewards, 4, "group").tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("std", STDS)
def test_advantages_are_those_of_a_loop_with_the_statistics_module(std: AdvantageStd) -> None:
    rewards = 100 + 7 * random(15, seed=3)
    expected = slow_advantages(rewards.tolist(), 5, std)
    assert group_advantages(rewards, 5, std).tolist() == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize("std", STDS)
def test_float32_rewards_on_a_large_offset_lose_nothing(std: AdvantageStd) -> None:
    rewards = (1e5 + random(15, seed=4)).float()  # spacing 1/128: their own values are the truth
    advantages = group_advantages(rewards, 5, std)
    expected = slow_advantages(rewards.double().tolist(), 5, std)
    assert advantages.dtype == torch.float64
    assert advantages.tolist() == pytest.approx(expected, abs=1e-9)  # 1e5 * 2^-53, divided by 0.5


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("shift", [50.0, 70.0, 1000.0])
def test_a_constant_baseline_changes_no_advantage_and_they_sum_to_0(
    std: AdvantageStd, shift: float
) -> None:
    rewards = random(15, seed=5)
    advantages = group_advantages(rewards, 5, std)
    shifted = group_advantages(rewards + shift, 5, std)
    torch.testing.assert_close(shifted, advantages, rtol=0, atol=ROUNDING)
    assert advantages.view(3, 5).sum(dim=1).abs().max() < ROUNDING


def test_scaling_the_rewards_scales_only_undivided_advantages() -> None:
    rewards = random(15, seed=6)
    for std in STDS:
        factor, tolerance = (7.0, ROUNDING) if std == "none" else (1.0, 1e-3)  # 1e-4 / std
        before, after = (group_advantages(a * rewards, 5, std) for a in (1.0, 7.0))
        torch.testing.assert_close(after, factor * before, rtol=tolerance, atol=ROUNDING)


@pytest.mark.parametrize("std", STDS)
def test_permuting_rows_or_groups_permutes_advantages(std: AdvantageStd) -> None:
    rewards = random(15, seed=7)
    advantages = group_advantages(rewards, 5, std)
    within = torch.tensor([3, 0, 4, 1, 2, 5, 6, 7, 8, 9, 14, 13, 12, 11, 10])
    groups = torch.tensor([10, 11, 12, 13, 14, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    for order in within, groups:
        permuted = group_advantages(rewards[order], 5, std)
        torch.testing.assert_close(permuted, advantages[order], rtol=0, atol=ROUNDING)


def test_another_groups_rewards_move_at_most_the_scale() -> None:
    rewards = random(10, seed=8)
    changed = torch.cat([rewards[:5], 30 + 9 * rewards[5:]])
    for std in "group", "none":
        before, after = (group_advantages(r, 5, std)[:5] for r in (rewards, changed))
        assert torch.equal(before, after)
    before, after = (group_advantages(r, 5, "batch")[:5] for r in (rewards, changed))
    scale = (rewards.std() + 1e-4) / (changed.std() + 1e-4)
    assert scale < 0.2
    torch.testing.assert_close(after, before * scale, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("group_size", [7, 8, 16])
def test_a_group_of_equal_rewards_gets_exactly_0(std: AdvantageStd, group_size: int) -> None:
    values = torch.linspace(0.1, 150.0, 101)  # float32, none of them a short binary fraction
    rewards = values.repeat_interleave(group_size)
    assert not group_advantages(rewards, group_size, std).any()
    jittered = rewards.double()
    jittered[::group_size] += 9e-7
    assert not group_advantages(jittered, group_size, std).any()
    jittered[::group_size] += 9e-7
    assert group_advantages(jittered, group_size, std).all()


def test_the_naive_float32_formula_turns_equal_rewards_into_a_signal() -> None:
    """Why there is a tolerance: the same groups, without it."""
    groups = torch.linspace(0.1, 150.0, 101).repeat_interleave(7).view(101, 7)
    centred = groups - groups.mean(dim=1, keepdim=True)
    naive = centred / (groups.std(dim=1, keepdim=True) + 1e-4)
    assert naive.abs().max() > 0.05


def test_constant_groups_are_counted_by_group_whatever_the_scale() -> None:
    rewards = torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 5.0, 5.0, 5.0 + 9e-7]).double()
    assert constant_groups(rewards, 3).tolist() == [True, False, True]
    edge = torch.tensor([0.0, 1e-6], dtype=torch.float64)  # not less than 1e-6
    assert not constant_groups(edge, 2).any()
    assert advantage_scale(edge, 2, "batch", None).all()


def test_two_rows_get_the_same_advantages_whatever_the_gap() -> None:
    for gap, expected in (1.0, 0.7070), (100.0, 0.7071), (1e-3, 0.6195):
        advantages = group_advantages(torch.tensor([0.0, gap]).double(), 2, "group")
        assert advantages.tolist() == pytest.approx([-expected, expected], abs=1e-4)


def test_one_malformed_row_decides_its_group() -> None:
    valid = random(15, seed=9)
    valid = 112 + 5 * (valid - valid.mean()) / valid.std()
    advantages = group_advantages(torch.cat([valid, torch.zeros(1)]), 16, "group")
    # mean 105, squares 14 * 25 + 15 * 49 + 105^2 = 12110, std 28.41
    assert advantages[-1].item() == pytest.approx(-105 / (12110 / 15) ** 0.5, abs=1e-4)
    alone = group_advantages(valid, 15, "group")
    shrink = (advantages[:-1].max() - advantages[:-1].min()) / (alone.max() - alone.min())
    assert shrink.item() == pytest.approx(5 / 28.41, abs=1e-3)


def test_a_rollout_of_equal_rewards_is_multiplied_by_0_and_not_by_10000() -> None:
    for std in ("group", "batch"):
        assert not advantage_scale(torch.full((6,), 0.1), 3, std, None).any()


def test_std_batch_counts_the_rewards_of_all_ranks() -> None:
    rewards = 20 * torch.arange(4).double().repeat_interleave(5) + random(20, seed=10)
    whole = group_advantages(rewards, 5, "batch")
    ranks = [group_advantages(part, 5, "batch", rewards) for part in (rewards[:5], rewards[5:])]
    assert torch.equal(torch.cat(ranks), whole)
    assert whole.abs().max() < 0.1  # the spread between the prompts hides the one within
    for std in "group", "none":
        assert torch.equal(
            group_advantages(rewards[:5], 5, std, rewards), group_advantages(rewards[:5], 5, std)
        )


def test_rewards_that_are_no_whole_groups_are_refused() -> None:
    for shape, group_size in ((7,), 3), ((6,), 1), ((2, 3), 3), ((3, 2), 3):
        with pytest.raises(ValueError, match=rf"whole groups of {group_size} >= 2 rows, got \("):
            group_advantages(torch.zeros(shape), group_size, "group")


# --- expectations, by enumeration of every outcome ---


def expected_update(logits: Tensor, rewards: Tensor, group_size: int, advantages: str) -> Tensor:
    """E[sum_i A_i grad log p(o_i) / G] over all G-tuples of one-token completions."""
    outcomes = torch.tensor(list(itertools.product(range(len(logits)), repeat=group_size)))
    flat = rewards[outcomes].flatten()
    if advantages == "leave one out":
        others = rewards[outcomes].sum(dim=1, keepdim=True) - rewards[outcomes]
        a = (rewards[outcomes] - others / (group_size - 1)).flatten()
    else:
        a = group_advantages(flat, group_size, "group" if advantages == "group" else "none")
    leaf = logits.clone().requires_grad_()
    log_p = leaf.log_softmax(dim=0)[outcomes]  # [tuples, G]
    chance = log_p.detach().sum(dim=1).exp()
    # On policy the loss is linear in A, so the probability of the tuple can travel with it.
    weighted = a * chance.repeat_interleave(group_size)
    column = log_p.reshape(-1, 1)
    denominator = torch.tensor(float(group_size))
    mask = torch.ones_like(column, dtype=torch.bool)
    objective = Objective(0.2, 0.2, 0.0, "dapo")
    loss, _ = grpo_loss(column, None, None, mask, weighted, denominator, objective)
    (gradient,) = torch.autograd.grad(-loss, leaf)
    return gradient


@pytest.mark.parametrize("group_size", [2, 3])
def test_the_expected_update_is_the_gradient_shrunk_by_the_baseline(group_size: int) -> None:
    logits, rewards = random(4, seed=11), random(4, seed=12)
    p = logits.softmax(dim=0)
    gradient = p * (rewards - p @ rewards)  # of J = sum p R with respect to the logits
    shrunk = (group_size - 1) / group_size * gradient
    for advantages, expected in ("none", shrunk), ("leave one out", gradient):
        found = expected_update(logits, rewards, group_size, advantages)
        torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
    tilted = expected_update(logits, rewards, group_size, "group")
    assert 0.8 < F.cosine_similarity(tilted, gradient, dim=0) < 0.9995  # std: another direction


# Completions over {0 = EOS, 1, 2}, at most two tokens: EOS, or one of 1, 2 and then any.
SEQUENCES = [(0,), *itertools.product((1, 2), (0, 1, 2))]


def sequence_logprobs(logits: Tensor) -> Tensor:
    """[7, 2] log-probs of all completions, NaN after EOS; row 0 of the logits is the first step."""
    tables = logits.log_softmax(dim=1)
    nothing = torch.full((), math.nan, dtype=logits.dtype)
    rows = [(tables[0, s[0]], tables[s[0], s[1]] if len(s) == 2 else nothing) for s in SEQUENCES]
    return torch.stack([torch.stack(row) for row in rows])


SEQUENCE_MASK = mask_of([len(s) for s in SEQUENCES], 2)


def test_only_a_constant_denominator_follows_the_gradient() -> None:
    logits, rewards = random(3, 3, seed=13).requires_grad_(), random(7, seed=14)
    log_p = sequence_logprobs(logits)
    chance = torch.where(SEQUENCE_MASK, log_p, 0.0).sum(dim=1).exp()
    assert chance.sum().item() == pytest.approx(1.0, abs=ROUNDING)
    (gradient,) = torch.autograd.grad(chance @ rewards, logits, retain_graph=True)

    updates = {}
    for aggregation in AGGREGATIONS:
        slopes = torch.zeros_like(log_p)
        for i, j in itertools.product(range(7), repeat=2):
            pair = [i, j]
            a = group_advantages(rewards[pair], 2, "none")
            both = Batch(log_p[pair].detach(), None, None, SEQUENCE_MASK[pair], a)
            slope = loss_of(both, aggregation, max_length=2)[1]
            slopes.index_add_(0, torch.tensor(pair), -(chance[i] * chance[j]).detach() * slope)
        active = torch.where(SEQUENCE_MASK, log_p, 0.0)
        (updates[aggregation],) = torch.autograd.grad(active, logits, slopes, retain_graph=True)
    # (1 / (n C_max)) sum_i: half of it is the mean over the pair, and the baseline halves it again
    torch.testing.assert_close(updates["dr_grpo"], gradient / 4, rtol=0, atol=ROUNDING)
    for aggregation in "dapo", "grpo":
        cosine = F.cosine_similarity(updates[aggregation].flatten(), gradient.flatten(), dim=0)
        assert 0.8 < cosine < 0.9999


# --- the first update ---


def tiny_transformer(tokens: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Two causal attention layers in float64; log-probs of each token given those before it."""
    hidden = weights["embedding"][tokens[:, :-1]]
    for layer in "01":
        q, k, v = (hidden @ weights[name + layer] for name in "qkv")
        hidden = hidden + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = hidden + torch.tanh(hidden @ weights["w" + layer])
    logits = hidden @ weights["embedding"].T
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_first_update_is_reinforce(aggregation: Aggregation) -> None:
    names = ["embedding", *(name + layer for name in "qkvw" for layer in "01")]
    shapes = [(17, 5), *([(5, 5)] * 8)]
    weights = {
        name: (0.5 * random(*shape, seed=30 + i)).requires_grad_()
        for i, (name, shape) in enumerate(zip(names, shapes, strict=True))
    }
    tokens = torch.randint(17, (3, 12), generator=torch.Generator().manual_seed(15))
    lengths, a = [11, 2, 7], group_advantages(torch.tensor([3.0, 1.0, 1.5]), 3, "group")
    mask, log_p = mask_of(lengths, 11), tiny_transformer(tokens, weights)
    scales = {"dapo": [1 / 20] * 3, "grpo": [1 / 33, 1 / 6, 1 / 21], "dr_grpo": [1 / 39] * 3}
    scale = scales[aggregation]
    rows = [a[i] * scale[i] * log_p[i, : lengths[i]].sum() for i in range(3)]
    total = -torch.stack(rows).sum()
    expected = torch.autograd.grad(total, list(weights.values()), retain_graph=True)

    denominator = loss_denominator(mask, aggregation, 13)
    for old in None, log_p.detach():
        objective = Objective(0.2, 0.2, 0.0, aggregation)
        loss, metrics = grpo_loss(log_p, old, None, mask, a, denominator, objective)
        found = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        assert max(g.abs().max() for g in found) > 0.01  # whatever the loss
        report = loss_report(metrics, 1)
        assert report["loss/clip_fraction"] == report["loss/approx_kl"] == 0.0
        assert {report[f"loss/ratio_{name}"] for name in ("min", "max", "mean")} == {1.0}


def test_no_old_logprobs_means_the_detached_current_ones_bit_for_bit() -> None:
    batch = uneven_batch()
    alone = Batch(batch.logprobs, None, batch.ref, batch.mask, batch.advantages)
    given = Batch(batch.logprobs, batch.logprobs, batch.ref, batch.mask, batch.advantages)
    (loss, gradient, metrics), (other, slope, same) = loss_of(alone), loss_of(given)
    assert torch.equal(loss, other) and torch.equal(gradient, slope)
    assert torch.equal(metrics.vector(), same.vector())


# --- clip ---

RATIOS = [0.5, 0.9, 1.1, 1.5, 4.0]
CLIP_TABLE = {  # loss and gradient with respect to the log-prob, bounds 0.2 and 0.28
    1.0: ([-0.5, -0.9, -1.1, -1.28, -1.28], [-0.5, -0.9, -1.1, 0.0, 0.0]),
    -1.0: ([0.8, 0.9, 1.1, 1.5, 4.0], [0.0, 0.9, 1.1, 1.5, 4.0]),
}


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_clip_table_by_sign_of_the_advantage(sign: float) -> None:
    values, slopes = CLIP_TABLE[sign]
    log_ratio = torch.tensor([RATIOS], dtype=torch.float64).log()
    old = random(1, 5, seed=16)
    a = torch.tensor([sign])
    batch = Batch(old + log_ratio, old, None, torch.ones(1, 5, dtype=torch.bool), a)
    loss, gradient, metrics = loss_of(batch, denominator=torch.tensor(1.0))
    per_token = policy_loss(log_ratio.exp(), a, 0.2, 0.28)
    assert per_token.flatten().tolist() == pytest.approx(values, abs=ROUNDING)
    assert loss.item() == pytest.approx(sum(values), abs=ROUNDING)
    assert gradient.flatten().tolist() == pytest.approx(slopes, abs=ROUNDING)
    low, high = clip_binds(log_ratio.exp(), a, 0.2, 0.28)
    flat = [slope == 0 for slope in slopes]
    assert (low | high).flatten().tolist() == flat
    assert (low if sign < 0 else high).flatten().tolist() == flat
    assert (metrics.num_clip_low + metrics.num_clip_high).item() == sum(flat)


def test_the_gradient_vanishes_exactly_where_the_clip_is_counted() -> None:
    ratios, a = torch.linspace(0.05, 3.0, 60).double(), torch.tensor([-2.0, -0.5, 0.5, 2.0])
    log_ratio = ratios.log().expand(4, 60).clone().requires_grad_()
    per_token = policy_loss(log_ratio.exp(), a.double().view(4, 1), 0.1, 0.4)
    (gradient,) = torch.autograd.grad(per_token.sum(), log_ratio)
    low, high = clip_binds(log_ratio.exp(), a.double().view(4, 1), 0.1, 0.4)
    assert torch.equal(gradient == 0, low | high)
    assert low.any() and high.any() and not (low & high).any()
    assert not low[2:].any() and not high[:2].any()


def test_without_an_advantage_nothing_is_clipped() -> None:
    ratio = torch.tensor([[0.1, 1.0, 9.0]])
    low, high = clip_binds(ratio, torch.zeros(1, 1), 0.2, 0.2)
    assert not low.any() and not high.any()


def test_a_ratio_on_its_bound_is_not_clipped() -> None:
    """With bounds of 0 that is every token of the first update."""
    batch = uneven_batch()
    expected = random(7, 11, seed=9).requires_grad_()
    denominator, found = loss_denominator(batch.mask, "dapo", 13), []
    for low, high in (0.2, 0.28), (0.0, 0.0), (0.0, 0.28), (0.2, 0.0):
        logprobs, expected.grad = batch.logprobs.clone().requires_grad_(), None
        loss, metrics = grpo_loss(
            logprobs, None, None, batch.mask, batch.advantages, denominator,
            Objective(low, high, 0.0, "dapo"), expected,
        )  # fmt: skip
        loss.backward()
        found.append([logprobs.grad, expected.grad, metrics.vector()])
        assert metrics.num_clip_low == metrics.num_clip_high == metrics.num_far == 0
    assert all(gradient.any() for gradient in found[0])
    for narrow in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(narrow, found[0], strict=True))


def test_log_ratios_beyond_20_are_clamped_and_counted() -> None:
    log_ratio = torch.tensor([[-500.0, -20.5, -20.0, 20.0, 20.5, 500.0]])
    old = torch.full((1, 6), -1.0)
    mask = torch.ones(1, 6, dtype=torch.bool)
    for a in -1.0, 1.0:
        batch = Batch(old + log_ratio, old, old, mask, torch.tensor([a]))
        loss, gradient, metrics = loss_of(batch)
        assert torch.isfinite(loss) and torch.isfinite(gradient).all()
        assert metrics.num_clamped.item() == 4
        assert metrics.ratio_max.item() == pytest.approx(math.exp(20), rel=1e-6)  # float32 exp
        assert metrics.ratio_min.item() == pytest.approx(math.exp(-20), rel=1e-6)


# --- aggregation ---


def test_aggregation_worked_by_hand() -> None:
    mask, a = mask_of([1, 3], 3), torch.tensor([1.0, -1.0])
    batch = Batch(random(2, 3, seed=17), None, None, mask, a)
    for aggregation, expected in zip(AGGREGATIONS, (0.5, 0.0, 0.25), strict=True):
        loss = loss_of(batch, aggregation, max_length=4)[0]
        assert loss.item() == pytest.approx(expected, abs=ROUNDING)
    means = [loss_of(batch.rows(slice(i, i + 1)), "dapo")[0].item() for i in range(2)]
    assert sum(means) / 2 == pytest.approx(0.0, abs=ROUNDING)  # the bug: a mean of means


def test_weights_and_denominators_of_a_mask_with_an_empty_row() -> None:
    mask = mask_of([1, 0, 3], 5)
    ones, grpo = mask.double(), torch.zeros(3, 5).double()
    grpo[0, 0], grpo[2, :3] = 1.0, 1 / 3
    expected = (ones, 4), (grpo, 3), (ones, 21)
    for aggregation, (weights, denominator) in zip(AGGREGATIONS, expected, strict=True):
        assert torch.equal(token_weights(mask, aggregation, torch.float64), weights)
        found = loss_denominator(mask, aggregation, 7)
        assert found.dtype == torch.float64 and found.ndim == 0 and found.item() == denominator


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_the_gradient_does_not_depend_on_the_split_into_micro_batches(
    aggregation: Aggregation, size: int
) -> None:
    batch = uneven_batch()
    whole, gradient, metrics = loss_of(batch, aggregation)
    parts = [batch.rows(slice(start, start + size)) for start in range(0, 7, size)]
    counts = [loss_denominator(part.mask, aggregation, 13) for part in parts]
    denominator = torch.stack(counts).sum()
    results = [loss_of(part, aggregation, denominator) for part in parts]
    assert sum(loss.item() for loss, _, _ in results) == pytest.approx(whole.item(), abs=ROUNDING)
    slopes = torch.cat([slope for _, slope, _ in results])
    torch.testing.assert_close(slopes, gradient, rtol=0, atol=ROUNDING)
    merged = merge_metrics([part for _, _, part in results])
    torch.testing.assert_close(merged.vector(), metrics.vector(), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_two_ranks_sum_to_one_and_a_mean_needs_the_factor_two(aggregation: Aggregation) -> None:
    """Shared parameters: the gradient of all rows lands in one vector, as in an all-reduce."""
    batch, direction = uneven_batch(), random(7, 11, seed=18)

    def gradient(rows: slice, denominator: Tensor) -> Tensor:
        part = batch.rows(rows)
        return (loss_of(part, aggregation, denominator)[1] * direction[rows]).sum()

    whole = gradient(slice(0, 7), loss_denominator(batch.mask, aggregation, 13))
    ranks = slice(0, 2), slice(2, 7)
    shared = sum(loss_denominator(batch.mask[rows], aggregation, 13) for rows in ranks)
    assert isinstance(shared, Tensor)
    gradients = torch.stack([gradient(rows, shared) for rows in ranks])
    assert gradients.sum().item() == pytest.approx(whole.item(), abs=ROUNDING)
    assert 2 * gradients.mean().item() == pytest.approx(whole.item(), abs=ROUNDING)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("filler", [math.nan, -math.inf, math.inf, 3.0])
def test_what_lies_outside_the_mask_changes_nothing(
    aggregation: Aggregation, filler: float
) -> None:
    batch = uneven_batch(filler=0.0)
    expected, slope, metrics = loss_of(batch, aggregation)
    credit = batch.advantages.view(7, 1).expand(7, 11)
    dirty = uneven_batch(filler=filler)
    now, old, ref = (F.pad(x, (0, 2), value=filler) for x in logprobs_of(dirty))
    wide_credit = F.pad(torch.where(batch.mask, credit, filler), (0, 2), value=filler)
    padded = Batch(now, old, ref, F.pad(batch.mask, (0, 2)), wide_credit)
    for version in dirty, padded:
        loss, gradient, same = loss_of(version, aggregation)
        assert loss.item() == pytest.approx(expected.item(), abs=ROUNDING)
        torch.testing.assert_close(gradient[:, :11], slope, rtol=0, atol=ROUNDING)
        assert not gradient[~version.mask].any()
        torch.testing.assert_close(same.vector(), metrics.vector(), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_fully_masked_row_counts_only_as_a_row(aggregation: Aggregation) -> None:
    batch = uneven_batch()
    empty = torch.full((1, 11), math.nan).double()
    mask = torch.cat([batch.mask, torch.zeros(1, 11, dtype=torch.bool)])
    now, old, ref = (torch.cat([x, empty]) for x in logprobs_of(batch))
    a = torch.cat([batch.advantages, torch.full((1,), math.nan)])
    factor = 1.0 if aggregation == "dapo" else 7 / 8
    loss, gradient, metrics = loss_of(batch, aggregation)
    found, slope, same = loss_of(Batch(now, old, ref, mask, a), aggregation)
    assert found.item() == pytest.approx(factor * loss.item(), abs=ROUNDING)
    torch.testing.assert_close(slope[:7], factor * gradient, rtol=0, atol=ROUNDING)
    assert not slope[7].any()
    assert torch.equal(same.vector()[2:], metrics.vector()[2:])  # all but the two losses


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_an_all_masked_batch_gives_a_finite_0(aggregation: Aggregation) -> None:
    nothing = torch.full((3, 5), math.nan)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    batch = Batch(nothing, nothing, nothing, mask, torch.ones(3))
    loss, gradient, metrics = loss_of(batch, aggregation)
    assert loss.item() == 0.0 and not gradient.any()
    assert loss_report(metrics, 1)["loss/ratio_mean"] == 0.0
    whole = loss_of(uneven_batch(), aggregation)[2]
    merged = merge_metrics([whole, metrics])  # a rank that had no rows
    assert torch.equal(merged.vector(), whole.vector())


def test_equal_lengths_make_the_aggregations_proportional() -> None:
    batch = uneven_batch(filler=0.5)
    full = Batch(batch.logprobs, batch.old, batch.ref, mask_of([11] * 7, 11), batch.advantages)
    dapo, grpo, dr_grpo = (loss_of(full, aggregation)[1] for aggregation in AGGREGATIONS)
    torch.testing.assert_close(grpo, dapo, rtol=ROUNDING, atol=0)
    torch.testing.assert_close(dr_grpo, dapo * 11 / 13, rtol=ROUNDING, atol=0)


# --- the KL to the reference ---

Term = Callable[[Tensor, Tensor, Tensor], Tensor]  # (log p, log ref, log old) -> per-token term


def six_tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the current, the reference and another sampling policy."""
    return random(6, seed=20), random(6, seed=21), random(6, seed=22)


def kl_gradient(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Of KL(p, ref) with respect to the logits of p: p_k (delta_k - KL)."""
    delta = logits.log_softmax(0) - ref_logits.log_softmax(0)
    p = logits.softmax(0)
    return p * (delta - p @ delta)


def expected_gradient(term: Term, logits: Tensor, ref: Tensor, old: Tensor) -> Tensor:
    """Of E_old[term], the tokens drawn from old, which does not depend on the logits."""
    leaf = logits.clone().requires_grad_()
    per_token = term(leaf.log_softmax(0), ref.log_softmax(0), old.log_softmax(0))
    (gradient,) = torch.autograd.grad((old.softmax(0) * per_token).sum(), leaf)
    return gradient


def penalty_in_the_loss(log_p: Tensor, log_ref: Tensor, log_old: Tensor) -> Tensor:
    """The KL term as `grpo_loss` has it, one token at a time."""
    terms = []
    for now, old, ref in zip(log_p, log_old, log_ref, strict=True):
        mask, one = torch.ones(1, 1, dtype=torch.bool), torch.ones(())
        loss, _ = grpo_loss(
            now.view(1, 1), old.detach().view(1, 1), ref.view(1, 1), mask, torch.zeros(1), one,
            Objective(0.2, 0.2, 1.0, "dapo"),
        )  # fmt: skip
        terms.append(loss)
    return torch.stack(terms)


def k1_in_the_reward(log_p: Tensor, log_ref: Tensor, log_old: Tensor) -> Tensor:
    return (log_p - log_old).exp() * (log_p - log_ref).detach()


def k2_in_the_reward(log_p: Tensor, log_ref: Tensor, log_old: Tensor) -> Tensor:
    return (log_p - log_old).exp() * (log_p - log_ref).square().detach() / 2


def k3_in_the_reward(log_p: Tensor, log_ref: Tensor, log_old: Tensor) -> Tensor:
    return (log_p - log_old).exp() * k3_divergence(log_p, log_ref).detach()


def ratio(log_p: Tensor, log_old: Tensor) -> Tensor:
    return (log_p - log_old).exp()


RIGHT_ON_AND_OFF_POLICY: dict[str, Term] = {
    "as in the loss": penalty_in_the_loss,
    "reference_kl": lambda p, ref, old: reference_kl(p, ref, ratio(p, old)),
    "r k3, r differentiable": lambda p, ref, old: ratio(p, old) * k3_divergence(p, ref),
    "sg(r) k2": lambda p, ref, old: ratio(p, old).detach() * (p - ref).square() / 2,
    "r k1, r differentiable": lambda p, ref, old: ratio(p, old) * (p - ref),
    "k1 in the reward": k1_in_the_reward,
}
WRONG: dict[str, Term] = {
    "k1": lambda p, ref, old: p - ref,
    "plain k3": lambda p, ref, old: k3_divergence(p, ref),
    "r k2, r differentiable": lambda p, ref, old: ratio(p, old) * (p - ref).square() / 2,
    "k2 in the reward": k2_in_the_reward,
    "k3 in the reward": k3_in_the_reward,
}


@pytest.mark.parametrize("name", RIGHT_ON_AND_OFF_POLICY)
@pytest.mark.parametrize("on_policy", [True, False])
def test_kl_terms_with_the_gradient_of_the_kl(name: str, on_policy: bool) -> None:
    logits, ref, other = six_tokens()
    old = logits if on_policy else other
    found = expected_gradient(RIGHT_ON_AND_OFF_POLICY[name], logits, ref, old)
    torch.testing.assert_close(found, kl_gradient(logits, ref), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("name", WRONG)
def test_kl_terms_with_another_gradient_even_on_policy(name: str) -> None:
    logits, ref, _ = six_tokens()
    found = expected_gradient(WRONG[name], logits, ref, logits)
    assert (found - kl_gradient(logits, ref)).abs().max() > 0.01
    if name == "k1":
        assert found.abs().max() < ROUNDING
    if name == "plain k3":  # the gradient of KL(ref, p): p - ref
        torch.testing.assert_close(found, logits.softmax(0) - ref.softmax(0), rtol=0, atol=ROUNDING)


def test_plain_k2_has_the_right_gradient_on_policy_only() -> None:
    logits, ref, other = six_tokens()

    def k2(log_p: Tensor, log_ref: Tensor, log_old: Tensor) -> Tensor:
        return (log_p - log_ref).square() / 2

    expected = kl_gradient(logits, ref)
    on, off = (expected_gradient(k2, logits, ref, old) for old in (logits, other))
    torch.testing.assert_close(on, expected, rtol=0, atol=ROUNDING)
    assert (off - expected).abs().max() > 0.01


def test_kl_values_in_expectation() -> None:
    logits, ref_logits, other = six_tokens()
    log_p, ref, old = (x.log_softmax(0) for x in (logits, ref_logits, other))
    p, delta = log_p.exp(), log_p - ref
    kl = (p @ delta).item()
    assert (p @ k3_divergence(log_p, ref)).item() == pytest.approx(kl, abs=ROUNDING)
    assert abs((p @ delta.square() / 2).item() - kl) > 0.01  # k2 is biased
    for sampler in log_p, old:  # with the ratio also off policy
        penalty = penalty_in_the_loss(log_p, ref, sampler)
        assert (sampler.exp() @ penalty).item() == pytest.approx(kl, abs=ROUNDING)


def test_approx_kl_is_the_drift_from_the_old_policy_in_expectation() -> None:
    logits, _, other = six_tokens()
    log_p, old = logits.log_softmax(0), other.log_softmax(0)
    one = torch.ones(1, 1, dtype=torch.bool)
    drift = []
    for now, before in zip(log_p, old, strict=True):
        batch = Batch(now.view(1, 1), before.view(1, 1), None, one, torch.ones(1))
        drift.append(loss_of(batch)[2].approx_kl)
    expected = (old.exp() @ (old - log_p)).item()
    assert (old.exp() @ torch.stack(drift)).item() == pytest.approx(expected, abs=ROUNDING)


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("on_policy", [True, False])
def test_a_step_on_the_kl_term_alone_lowers_the_kl(seed: int, on_policy: bool) -> None:
    logits, ref, other = (2 * random(6, seed=100 * seed + i) for i in range(3))
    old = logits if on_policy else other
    step = expected_gradient(penalty_in_the_loss, logits, ref, old)

    def kl(x: Tensor) -> float:
        return (x.softmax(0) @ (x.log_softmax(0) - ref.log_softmax(0))).item()

    assert kl(logits - 0.1 * step) < kl(logits) - 0.01 * step.square().sum().item()


def test_a_policy_equal_to_its_reference_pays_nothing() -> None:
    batch = uneven_batch()
    same = Batch(batch.logprobs, batch.old, batch.logprobs, batch.mask, torch.zeros(7))
    loss, gradient, metrics = loss_of(same, kl_beta=1.0)
    assert loss.item() == 0.0 and not gradient.any() and metrics.ref_kl.item() == 0.0


def test_per_token_kl_omits_only_the_kl_to_go() -> None:
    logits, ref_logits = random(3, 3, seed=23).requires_grad_(), random(3, 3, seed=24)
    log_p, log_ref = sequence_logprobs(logits), sequence_logprobs(ref_logits)
    active, ref = (torch.where(SEQUENCE_MASK, x, 0.0) for x in (log_p, log_ref))
    chance = active.sum(dim=1).exp()
    kl = (chance * (active - ref).sum(dim=1)).sum()
    (full,) = torch.autograd.grad(kl, logits, retain_graph=True)

    weight = chance.detach().view(7, 1)
    penalty = reference_kl(active, ref, (active - active.detach()).exp())
    (local,) = torch.autograd.grad((weight * penalty).sum(), logits, retain_graph=True)
    assert 0.8 < F.cosine_similarity(local.flatten(), full.flatten(), dim=0) < 0.9999
    # The first token also answers for the KL of the second step that follows it.
    second = (logits.softmax(1) * (logits.log_softmax(1) - ref_logits.log_softmax(1))).sum(1)
    to_go = torch.stack([second[s[0]] if len(s) == 2 else 0 * second[0] for s in SEQUENCES])
    first = (chance.detach() * to_go.detach() * active[:, 0]).sum()
    (rest,) = torch.autograd.grad(first, logits)
    torch.testing.assert_close(local + rest, full, rtol=0, atol=ROUNDING)


# --- precision and extremes ---

SIZES = [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 20.0, 50.0]
DELTAS = [-size for size in SIZES] + SIZES


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("log_ratio", [0.0, math.log(1.1)])
def test_the_kl_gradient_is_r_delta_to_float32_accuracy(delta: float, log_ratio: float) -> None:
    now = torch.tensor([[-1.5]])
    ref, old = now - delta, now - log_ratio
    exact = (now.double() - ref.double()).item() * math.exp((now.double() - old.double()).item())
    batch = Batch(now, old, ref, torch.ones(1, 1, dtype=torch.bool), torch.zeros(1))
    _, gradient, _ = loss_of(batch, kl_beta=1.0)
    assert gradient.item() == pytest.approx(exact, rel=1e-5)


def test_autograd_through_r_k3_loses_that_gradient() -> None:
    """Why the gradient is written by hand: r = 1.1, delta = -20 has the gradient -22."""
    now = torch.zeros(1, requires_grad=True)
    old, ref = torch.tensor([-math.log(1.1)]), torch.tensor([20.0])
    naive = (now - old).exp() * (torch.exp(ref - now) - 1 - (ref - now))
    assert abs(torch.autograd.grad(naive.sum(), now)[0].item() + 22) > 5


@pytest.mark.parametrize("delta", [d for d in DELTAS if d > -20])
def test_k3_keeps_its_digits_in_float32(delta: float) -> None:
    now, ref = torch.tensor([0.0]), torch.tensor([-delta])
    x = -ref.double().item()
    if abs(x) > 0.5:
        exact = math.exp(-x) + x - 1
    else:
        exact = sum((-x) ** n / math.factorial(n) for n in range(2, 20))
    # expm1 is right to 6e-8 of |x|, k3 is about x^2 / 2: relative error 1.2e-7 / |x| at most
    assert k3_divergence(now, ref).item() == pytest.approx(exact, rel=1e-6 + 2e-7 / abs(x))


def test_k3_is_never_negative_in_float32() -> None:
    x = torch.logspace(-9, 1.9, 5003)
    for sign in -1, 1:
        assert (k3_divergence(torch.zeros_like(x), sign * x) >= 0).all()


@pytest.mark.parametrize("delta", [-80.0, 80.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_far_reference_stays_finite(delta: float, dtype: torch.dtype) -> None:
    now = torch.tensor([[-1.0]], dtype=dtype)
    batch = Batch(now, now - 0.1, now - delta, torch.ones(1, 1, dtype=torch.bool), torch.ones(1))
    loss, gradient, metrics = loss_of(batch, kl_beta=1.0)
    assert torch.isfinite(loss) and torch.isfinite(metrics.vector()).all()
    assert gradient.item() == pytest.approx(math.exp(0.1) * (delta - 1), rel=1e-5)


def test_float64_advantages_leave_a_float32_loss_in_float32() -> None:
    batch = uneven_batch()
    now, old, ref = (x.float() for x in logprobs_of(batch))
    single = Batch(now, old, ref, batch.mask, batch.advantages)
    expected, slope, _ = loss_of(batch)
    loss, gradient, metrics = loss_of(single)
    assert loss.dtype == gradient.dtype == torch.float32
    assert {value.dtype for value in vars(metrics).values()} == {torch.float64}
    assert not metrics.vector().requires_grad
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)  # 40 terms of size 1 / 40
    torch.testing.assert_close(gradient, slope.float(), rtol=1e-5, atol=1e-7)


# --- metrics ---


def test_metrics_are_counted_as_in_a_loop() -> None:
    batch = uneven_batch()
    loss, _, metrics = loss_of(batch)
    ratios, ref_kl, drift, sides = [], 0.0, 0.0, []
    for _, _, now, old, ref, a in active_tokens(batch):
        u, delta = now - old, now - ref
        ratios.append(math.exp(u))
        drift += math.exp(u) - 1 - u
        ref_kl += math.exp(u) * (math.exp(-delta) - 1 + delta)
        sides.append(clipped_side(ratios[-1], a, 0.2, 0.28))
    assert len(ratios) == 40 and sides.count("low") > 1 and sides.count("high") > 1
    without = Batch(batch.logprobs, batch.old, None, batch.mask, batch.advantages)
    policy, _, no_kl = loss_of(without)
    assert no_kl.ref_kl.item() == 0.0
    expected = {
        "loss/total": loss.item(),
        "loss/policy": policy.item(),
        "loss/ref_kl": ref_kl / 40,
        "loss/approx_kl": drift / 40,
        "loss/clip_fraction": (sides.count("low") + sides.count("high")) / 40,
        "loss/clip_fraction_low": sides.count("low") / 40,
        "loss/clip_fraction_high": sides.count("high") / 40,
        "loss/num_clamped": 0.0,
        "loss/frac_far": sum(not 0.8 <= ratio <= 1.28 for ratio in ratios) / 40,
        "loss/ratio_mean": sum(ratios) / 40,
        "loss/ratio_min": min(ratios),
        "loss/ratio_max": max(ratios),
    }
    assert loss_report(metrics, 1) == pytest.approx(expected, abs=ROUNDING)


def test_ratio_extremes_ignore_the_padding() -> None:
    mask = mask_of([2, 1], 3)
    for shift in -0.1, 0.1:
        old = torch.zeros(2, 3)
        metrics = loss_of(Batch(old + shift, old, None, mask, torch.ones(2)))[2]
        for found in metrics.ratio_min, metrics.ratio_max:
            assert found.item() == pytest.approx(math.exp(shift), rel=1e-6)  # float32 exp


def test_a_report_of_two_steps_holds_their_means() -> None:
    first, second = uneven_batch(0), uneven_batch(10)
    (a, _, one), (b, _, two) = loss_of(first), loss_of(second)
    report = loss_report(merge_metrics([one, two]), num_steps=2)
    apart = [loss_report(one, 1), loss_report(two, 1)]
    assert report["loss/total"] == pytest.approx((a.item() + b.item()) / 2, abs=ROUNDING)
    for name in report.keys() - {"loss/num_clamped", "loss/ratio_min", "loss/ratio_max"}:
        mean = (apart[0][name] + apart[1][name]) / 2  # both steps have 40 tokens
        assert report[name] == pytest.approx(mean, abs=ROUNDING)
    assert report["loss/ratio_min"] == min(r["loss/ratio_min"] for r in apart)
    assert report["loss/ratio_max"] == max(r["loss/ratio_max"] for r in apart)


def test_a_report_of_one_token_divides_by_one() -> None:
    batch = Batch(random(1, 1, seed=27), None, None, mask_of([1], 1), torch.ones(1))
    assert loss_report(loss_of(batch)[2], 1)["loss/ratio_mean"] == 1.0


def test_metrics_survive_the_way_through_one_vector() -> None:
    metrics = loss_of(uneven_batch())[2]
    back = LossMetrics(*metrics.vector())
    assert loss_report(back, 1) == loss_report(metrics, 1)


# --- shapes and arguments ---


def test_advantages_go_along_the_rows_even_of_a_square_batch() -> None:
    a = torch.tensor([1.0, 0.0, -2.0])
    batch = Batch(random(3, 3, seed=25), None, None, mask_of([3, 3, 3], 3), a)
    gradient = loss_of(batch, denominator=torch.tensor(1.0))[1]
    torch.testing.assert_close(gradient, -a.double().view(3, 1).expand(3, 3))


def test_wrong_shapes_are_refused_with_expectation_and_got() -> None:
    good = uneven_batch()
    for changed, message in (
        (
            {"advantages": torch.zeros(4)},
            r"^advantages must have shape \(7,\) or \(7, 11\), got \(4,\)",
        ),
        ({"advantages": torch.zeros(11, 7)}, r"shape \(7,\) or \(7, 11\), got \(11, 7\)"),
        ({"advantages": torch.zeros(7, 1)}, r"advantages must .* got \(7, 1\)"),
        ({"logprobs": torch.zeros(7, 10)}, r"^logprobs must .* got \(7, 10\)"),
        ({"old": torch.zeros(1, 11)}, r"old_logprobs must .* got \(1, 11\)"),
        ({"ref": torch.zeros(7)}, r"ref_logprobs must .* got \(7,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            loss_of(Batch(**{**vars(good), **changed}))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_expected_values_have_a_gradient_within_the_clip_bounds_and_no_value(
    aggregation: Aggregation,
) -> None:
    batch = uneven_batch()
    logprobs, old, ref = logprobs_of(batch)
    expected = torch.where(batch.mask, 3 * random(7, 11, seed=9), math.nan).requires_grad_()
    denominator = loss_denominator(batch.mask, aggregation, 13)
    objective = Objective(0.2, 0.3, 0.1, aggregation)
    rest = (old, ref, batch.mask, batch.advantages, denominator, objective)
    plain, _ = grpo_loss(logprobs, *rest)
    loss, metrics = grpo_loss(logprobs, *rest, expected)
    assert loss.item() == pytest.approx(plain.item(), abs=ROUNDING)
    assert float(metrics.loss) == pytest.approx(plain.item(), abs=ROUNDING)
    loss.backward()
    assert expected.grad is not None
    num_near = 0
    for i, length in enumerate(batch.mask.sum(dim=1).tolist()):
        for t in range(11):
            ratio = math.exp(float(logprobs[i, t] - old[i, t])) if t < length else math.nan
            is_near = 0.8 <= ratio <= 1.3
            num_near += is_near
            weight = 1 / length if aggregation == "grpo" else 1.0
            wanted = -weight / float(denominator) if is_near else 0.0
            assert float(expected.grad[i, t]) == pytest.approx(wanted, abs=ROUNDING)
    assert 5 < num_near < int(batch.mask.sum()) - 5
    with pytest.raises(ValueError, match="expected_values must have shape"):
        grpo_loss(logprobs, *rest, expected[:, :-1])


def test_no_argument_is_written_in_place() -> None:
    batch = uneven_batch()
    copies = {name: tensor.clone() for name, tensor in vars(batch).items()}
    denominator, rewards = torch.tensor(40.0).double(), random(15, seed=26)
    kept = rewards.clone()
    for aggregation in AGGREGATIONS:
        loss_of(batch, aggregation, denominator)
        group_advantages(rewards, 5, "group", rewards)
    for name, tensor in vars(batch).items():
        torch.testing.assert_close(tensor, copies[name], rtol=0, atol=0, equal_nan=True)
    assert denominator.item() == 40.0 and torch.equal(rewards, kept)
