"""The control variate: unbiased by enumeration, and known before the control it belongs to."""

import itertools

import pytest
import torch
from einops import repeat
from torch import Tensor

from minigrpo.checkpoint import make_task
from minigrpo.data import Task
from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.grpo import group_advantages, others_mean, variate_advantages, variate_sums
from minigrpo.lqr import QuadraticCost
from minigrpo.prompts import Codec, ParsedControls
from minigrpo.reward import RewardWeights, compute_rewards
from minigrpo.rollout import Experience, control_variates, mean_plans
from minigrpo.sampling import Completions
from minigrpo.tokenizer import number_tokenizer

PLANT = DoubleIntegrator(horizon=7)


def test_the_gradient_is_unbiased_by_enumeration_of_all_groups() -> None:
    # Two starts, each a group of two; two decisions between two tokens, softmax tables as policies.
    generator = torch.Generator().manual_seed(0)

    def table(*shape: int) -> Tensor:
        return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    first, second = table(2, 2).log_softmax(-1), table(2, 2, 2).log_softmax(-1)
    worth = 5 * table(2, 2, 2)  # reward of each sequence
    # Variates: of a row's start, of what it decided before, and of all that the other row did.
    at_first, at_second = 3 * table(2, 2, 2), 3 * table(2, 2, 2, 2)
    sequences = list(itertools.product(range(2), range(2)))

    def score(start: int, a: int, b: int) -> tuple[Tensor, Tensor]:
        """Gradients of log pi with respect to the logits of the decision just taken."""
        one = -first[start].exp()
        one[a] += 1
        two = torch.zeros(2, 2, dtype=torch.float64)
        two[a] = -second[start, a].exp()
        two[a, b] += 1
        return one, two

    truth = [torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 2, 2, dtype=torch.float64)]
    for start in range(2):
        for a, b in sequences:
            probability = (first[start, a] + second[start, a, b]).exp()
            for grad, part in zip(truth, score(start, a, b), strict=True):
                grad[start] += probability * worth[start, a, b] * part

    found = [torch.zeros_like(grad) for grad in truth]
    starts = (0, 0, 1, 1)
    for draws in itertools.product(sequences, repeat=4):
        rows = list(zip(starts, draws, strict=True))
        log_probability = sum(float(first[s, a] + second[s, a, b]) for s, (a, b) in rows)
        probability = torch.tensor(log_probability, dtype=torch.float64).exp()
        rewards = torch.stack([worth[s, a, b] for s, (a, b) in rows])
        variates = torch.stack(
            [
                torch.stack([at_first[(s, *draws[n ^ 1])], at_second[(s, a, *draws[n ^ 1])]])
                for n, (s, (a, _)) in enumerate(rows)
            ]
        )
        sums = variate_sums(rewards, variates, 2).sum(dim=1)
        advantages = variate_advantages(rewards, variates, 2, "none", sums)
        for n, (s, (a, b)) in enumerate(rows):
            for k, part in enumerate(score(s, a, b)):
                found[k][s] += probability * advantages[n, k] * part / 2
    for estimate, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(estimate, exact, rtol=0, atol=1e-11)


def test_advantages_are_the_residuals_of_a_regression_over_the_other_groups() -> None:
    generator = torch.Generator().manual_seed(1)
    num_groups, size, decisions = 5, 3, 7
    num_rows = num_groups * size
    rewards = 100 + 10 * torch.randn(num_rows, generator=generator, dtype=torch.float64)
    variates = 90 + 5 * torch.randn(num_rows, decisions, generator=generator, dtype=torch.float64)
    variates[3:6] = torch.nan  # a group without
    sums = variate_sums(rewards, variates, size).sum(dim=1)
    got = variate_advantages(rewards, variates, size, "group", sums)
    others = torch.stack(
        [
            rewards[[j for j in range(n // size * size, n // size * size + size) if j != n]].mean()
            for n in range(num_rows)
        ]
    )
    torch.testing.assert_close(others_mean(rewards, size), others)
    y = rewards - others
    for p in range(num_groups):
        own = torch.arange(p * size, (p + 1) * size)
        std = rewards[own].std()
        if p == 1:
            expected = repeat(y[own] / (std + 1e-4), "g -> g k", k=decisions)
            torch.testing.assert_close(got[own], expected, rtol=1e-12, atol=0)
            continue
        rest = torch.tensor([n for n in range(num_rows) if n // size not in (p, 1)])
        for k in range(decisions):
            x = variates[:, k] - others
            design = torch.stack([x[rest], torch.ones(len(rest), dtype=torch.float64)], dim=1)
            slope, shift = torch.linalg.lstsq(design, y[rest].reshape(-1, 1)).solution.flatten()
            expected = (y[own] - slope * x[own] - shift) / (std + 1e-4)
            torch.testing.assert_close(got[own, k], expected, rtol=1e-9, atol=1e-9)


def test_the_reward_itself_as_variate_leaves_nothing_and_no_variate_leaves_the_plain_form() -> None:
    rewards = torch.tensor([1.0, 2.0, 3.0, 6.0, 5.0, 5.5, 4.0, 9.0], dtype=torch.float64)
    variates = torch.stack([torch.full_like(rewards, torch.nan), rewards], dim=1)
    sums = variate_sums(rewards, variates, 4).sum(dim=1)
    for std in ("group", "batch", "none"):
        got = variate_advantages(rewards, variates, 4, std, sums)
        # the mean without oneself is the group's mean, a factor G / (G - 1) further away
        plain = group_advantages(rewards, 4, std) * 4 / 3
        torch.testing.assert_close(got[:, 0], plain, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            got[:, 1], torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-12
        )


def test_a_plan_keeps_its_own_controls_before_k_and_goes_on_as_the_others() -> None:
    controls = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 8.0, 12.0], [6.0, 0.0, 20.0]]])  # [1, 3, 3]
    others = torch.tensor([[5.0, 4.0, 16.0], [3.5, 1.0, 11.5], [2.5, 5.0, 7.5]])
    plans = mean_plans(controls)
    assert plans.shape == (1, 3, 3, 3)
    for g in range(3):
        for k in range(3):
            expected = torch.cat([controls[0, g, :k], others[g, k:]])
            assert torch.equal(plans[0, g, k], expected)


@pytest.mark.parametrize("k", range(7))
def test_what_a_row_decides_at_k_or_later_does_not_touch_its_variate_k(k: int) -> None:
    generator = torch.Generator().manual_seed(3)
    controls = torch.randn(2, 4, 7, generator=generator, dtype=torch.float64)
    changed = controls.clone()
    changed[:, 1, k:] = 1.5 - changed[:, 1, k:]
    before, after = mean_plans(controls)[:, 1], mean_plans(changed)[:, 1]
    torch.testing.assert_close(before[:, : k + 1], after[:, : k + 1], rtol=0, atol=1e-12)
    assert k == 6 or (before - after)[:, k + 1].abs().max() > 0.1


def a_task() -> Task:
    codec = Codec()
    return make_task(PLANT, QuadraticCost(), codec, number_tokenizer(PLANT, codec))


def test_variates_of_a_rollout_are_rewards_of_mean_plans_and_malformed_groups_have_none() -> None:
    task, cost, size, num_groups = a_task(), QuadraticCost(), 3, 14  # two splits and a rest
    generator = torch.Generator().manual_seed(4)
    num_rows = num_groups * size
    starts = torch.rand(num_groups, 2, generator=generator, dtype=torch.float64) - 0.5
    starts = repeat(starts, "p c -> (p g) c", g=size)
    controls = torch.randn(num_rows, 7, generator=generator, dtype=torch.float64)
    is_valid = torch.ones(num_rows, dtype=torch.bool)
    is_valid[4] = False
    controls[4] = 0

    def reward(parsed, flown):
        return compute_rewards("progress", parsed, flown, PLANT, cost, RewardWeights())

    parsed = ParsedControls(controls, is_valid, torch.full((num_rows,), 7))
    flown = PLANT.simulate(starts, controls)
    tokens = torch.zeros(num_rows, 9, dtype=torch.int64)  # EOS is the eighth; one wrote more
    filler = torch.zeros(num_rows, 9)
    completions = Completions(
        tokens, tokens == 0, None, filler, is_valid, filler, torch.zeros_like(tokens).bool()
    )
    experience = Experience(completions, [""] * num_rows, parsed, flown, reward(parsed, flown))
    variates = control_variates(experience, size, task, reward)
    assert variates.shape == (num_rows, 9)
    assert variates[3:6].isnan().all()
    assert variates[:, 8].isnan().all()
    for n in (0, 7, 41):
        mates = [j for j in range(n // size * size, n // size * size + size) if j != n]
        for k in range(8):
            plan = torch.cat([controls[n, :k], controls[mates, k:].mean(dim=0)]).reshape(1, 7)
            one = ParsedControls(plan, torch.tensor([True]), torch.tensor([7]))
            expected = reward(one, PLANT.simulate(starts[n : n + 1], plan)).total
            torch.testing.assert_close(variates[n, k], expected[0], rtol=1e-12, atol=0)
    assert torch.equal(variates[0, 7], experience.rewards.total[0])  # EOS: all is decided


def regressed(rewards: Tensor, variates: Tensor, size: int, std: str, *more: Tensor) -> Tensor:
    sums = variate_sums(rewards, variates, size).sum(dim=1)
    return variate_advantages(rewards, variates, size, std, sums, *more)


def test_one_group_alone_has_no_regression_and_keeps_the_plain_form() -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    got = regressed(rewards, torch.tensor([[4.0], [5.0], [9.0]]), 3, "none")
    torch.testing.assert_close(got[:, 0], rewards - others_mean(rewards, 3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [0.0, 7e-4])
def test_a_variate_with_hardly_any_spread_in_the_other_groups_explains_nothing(size) -> None:
    generator = torch.Generator().manual_seed(2)
    rewards = 100 + torch.randn(12, generator=generator, dtype=torch.float64)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(6)
    variates = (others_mean(rewards, 3) + 5.0 + size * sign).reshape(-1, 1)
    got = regressed(rewards, variates, 3, "none")
    torch.testing.assert_close(got[:, 0], rewards - others_mean(rewards, 3), rtol=0, atol=1e-12)


def test_the_standard_deviation_of_all_ranks_divides() -> None:
    generator = torch.Generator().manual_seed(2)
    rewards, more = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    everybodys = torch.cat([rewards, 5 * more])
    variates = torch.randn(8, 2, generator=generator, dtype=torch.float64)
    plain = regressed(rewards, variates, 4, "none")
    got = regressed(rewards, variates, 4, "batch", everybodys)
    torch.testing.assert_close(got, plain / (everybodys.std() + 1e-4), rtol=1e-12, atol=0)


def test_a_group_of_equal_rewards_divided_by_its_own_standard_deviation_gets_nothing() -> None:
    generator = torch.Generator().manual_seed(2)
    rewards = torch.randn(9, generator=generator, dtype=torch.float64)
    rewards[3:6] = 2.0
    variates = torch.randn(9, 2, generator=generator, dtype=torch.float64)
    got = regressed(rewards, variates, 3, "group")
    assert not got[3:6].any() and got[:3].abs().min() > 0


@pytest.mark.parametrize("length", [3, 7, 8])
def test_a_rollout_without_a_whole_group_has_no_variates_however_short(length: int) -> None:
    rows = torch.zeros(4, 7, dtype=torch.float64)
    starts, is_valid = torch.full((4, 2), 0.3, dtype=torch.float64), torch.zeros(4).bool()
    parsed = ParsedControls(rows, is_valid, torch.zeros(4, dtype=torch.int64))
    tokens, filler = torch.zeros(4, length, dtype=torch.int64), torch.zeros(4, length)
    completions = Completions(
        tokens, tokens == 0, None, filler, is_valid, filler, torch.zeros_like(tokens).bool()
    )
    flown = PLANT.simulate(starts, rows)
    rewards = compute_rewards("progress", parsed, flown, PLANT, QuadraticCost(), RewardWeights())
    experience = Experience(completions, [""] * 4, parsed, flown, rewards)
    variates = control_variates(experience, 2, a_task(), lambda *_: rewards)
    assert variates.shape == (4, length) and variates.isnan().all()


def test_a_group_of_more_rows_than_are_flown_at_once_has_its_variates() -> None:
    size = 33
    generator = torch.Generator().manual_seed(6)
    controls = torch.randn(size, 7, generator=generator, dtype=torch.float64)
    starts = torch.full((size, 2), 0.3, dtype=torch.float64)
    parsed = ParsedControls(controls, torch.ones(size).bool(), torch.full((size,), 7))
    flown, filler = PLANT.simulate(starts, controls), torch.zeros(size, 8)

    def reward(parsed, flown):
        return compute_rewards("progress", parsed, flown, PLANT, QuadraticCost(), RewardWeights())

    completions = Completions(
        filler.long(), filler == 0, None, filler, parsed.is_valid, filler, filler.bool()
    )
    experience = Experience(completions, [""] * size, parsed, flown, reward(parsed, flown))
    assert not control_variates(experience, size, a_task(), reward).isnan().any()
