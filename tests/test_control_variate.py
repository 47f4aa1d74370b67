"""The control variate: unbiased by enumeration, and known before the control it belongs to."""

import itertools

import pytest
import torch
from torch import Tensor

from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.grpo import group_advantages, variate_advantages, variate_products
from minigrpo.lqr import QuadraticCost, continued_by_lqr, lqr_controls, trajectory_cost

PLANT, COST = DoubleIntegrator(horizon=7), QuadraticCost()


def flown(seed: int, num_rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    starts = 1.2 * torch.rand(num_rows, 2, generator=generator, dtype=torch.float64) - 0.6
    controls = 2 * torch.randn(num_rows, PLANT.horizon, generator=generator, dtype=torch.float64)
    return starts, controls


def test_the_gradient_stays_unbiased_by_enumeration_of_all_groups() -> None:
    # Two starts, each a group of two; two decisions between two tokens, softmax tables as policies.
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2, 2, generator=generator, dtype=torch.float64).log_softmax(
        -1
    )  # [start, token]
    second = torch.randn(2, 2, 2, generator=generator, dtype=torch.float64).log_softmax(-1)
    worth = 5 * torch.randn(
        2, 2, 2, generator=generator, dtype=torch.float64
    )  # reward of each sequence
    before = torch.randn(2, 2, generator=generator, dtype=torch.float64)  # variate of decision 1
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
    for draws in itertools.product(sequences, repeat=4):
        rows = list(zip((0, 0, 1, 1), draws, strict=True))
        log_probability = sum(float(first[s, a] + second[s, a, b]) for s, (a, b) in rows)
        probability = torch.tensor(log_probability, dtype=torch.float64).exp()
        rewards = torch.stack([worth[s, a, b] for s, (a, b) in rows])
        # decision 0 knows the start alone; a constant per group, so any function of it is centred
        # away
        variates = torch.stack([torch.stack([before[s, 0], before[s, a]]) for s, (a, _) in rows])
        products = variate_products(rewards, variates, 2).sum(dim=1)
        advantages = variate_advantages(rewards, variates, 2, "none", products)
        for n, (s, (a, b)) in enumerate(rows):
            for k, part in enumerate(score(s, a, b)):
                found[k][s] += probability * advantages[n, k] * part / 2
    for estimate, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(estimate, exact / 2, rtol=0, atol=1e-12)  # (G - 1) / G = 1 / 2


def test_advantages_are_the_residuals_of_a_regression_over_the_other_groups() -> None:
    generator = torch.Generator().manual_seed(1)
    num_groups, size, decisions = 5, 3, 7
    rewards = 100 + 10 * torch.randn(num_groups * size, generator=generator, dtype=torch.float64)
    variates = torch.randn(num_groups * size, decisions, generator=generator, dtype=torch.float64)
    products = variate_products(rewards, variates, size).sum(dim=1)
    got = variate_advantages(rewards, variates, size, "group", products)
    for p in range(num_groups):
        for k in range(decisions):
            xs, ys = [], []
            for other in range(num_groups):
                rows = slice(other * size, (other + 1) * size)
                x = variates[rows, k] - variates[rows, k].mean()
                y = rewards[rows] - rewards[rows].mean()
                if other == p:
                    own_x, own_y, std = x, y, rewards[rows].std()
                else:
                    xs.append(x)
                    ys.append(y)
            slope = torch.linalg.lstsq(
                torch.cat(xs).reshape(-1, 1), torch.cat(ys).reshape(-1, 1)
            ).solution
            expected = (own_y - slope.item() * own_x) / (std + 1e-4)
            torch.testing.assert_close(
                got[p * size : (p + 1) * size, k], expected, rtol=1e-9, atol=1e-9
            )


def test_a_variate_without_spread_changes_nothing_and_the_reward_itself_leaves_nothing() -> None:
    rewards = torch.tensor([1.0, 2.0, 3.0, 6.0, 5.0, 5.5, 4.0, 9.0], dtype=torch.float64)
    variates = torch.stack([torch.full_like(rewards, 3.0), rewards], dim=1)
    products = variate_products(rewards, variates, 4).sum(dim=1)
    for std in ("group", "batch", "none"):
        got = variate_advantages(rewards, variates, 4, std, products)
        torch.testing.assert_close(
            got[:, 0], group_advantages(rewards, 4, std), rtol=1e-12, atol=1e-12
        )
        torch.testing.assert_close(
            got[:, 1], torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-12
        )


def test_row_k_of_a_continued_plan_keeps_the_controls_before_k_and_then_is_lqr() -> None:
    starts, controls = flown(2, 5)
    trajectories = PLANT.simulate(starts, controls)
    plans = continued_by_lqr(trajectories, PLANT, COST)
    assert plans.shape == (5, 7, 7)
    torch.testing.assert_close(plans[:, 0], lqr_controls(starts, PLANT, COST), rtol=0, atol=0)
    for k in range(7):
        assert torch.equal(plans[:, k, :k], trajectories.controls[:, :k])
        shorter = DoubleIntegrator(horizon=7 - k)
        rest = lqr_controls(trajectories.states[:, k], shorter, COST)
        torch.testing.assert_close(plans[:, k, k:], rest, rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", range(7))
def test_what_is_decided_at_k_or_later_does_not_touch_variate_k(k: int) -> None:
    starts, controls = flown(3, 5)
    other = controls.clone()
    other[:, k:] = 1.5 - other[:, k:]
    before, after = (
        continued_by_lqr(PLANT.simulate(starts, u), PLANT, COST) for u in (controls, other)
    )
    assert torch.equal(before[:, : k + 1], after[:, : k + 1])
    assert k == 6 or not torch.equal(before[:, k + 1], after[:, k + 1])


def test_continuing_by_lqr_costs_less_than_continuing_as_sampled() -> None:
    starts, controls = flown(4, 50)
    trajectories = PLANT.simulate(starts, controls)
    plans = continued_by_lqr(trajectories, PLANT, COST)
    costs = [trajectory_cost(PLANT.simulate(starts, plans[:, k]), COST).sum() for k in range(7)]
    costs.append(trajectory_cost(trajectories, COST).sum())
    assert all(early <= late for early, late in itertools.pairwise(costs))
