"""Rewards against numbers worked by hand, a scalar loop, and the facts training relies on."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigrpo.data import split_starts
from minigrpo.double_integrator import DoubleIntegrator, Trajectories
from minigrpo.grpo import group_advantages
from minigrpo.lqr import QuadraticCost, lqr_controls
from minigrpo.prompts import Codec, parse_controls, render_controls
from minigrpo.reward import (
    Rewards,
    RewardWeights,
    breakdown_line,
    progress_rewards,
    punishment_rewards,
    tally_of,
    tally_rewards,
)

PLANT, COST, WEIGHTS = DoubleIntegrator(), QuadraticCost(), RewardWeights()
NAMES = ["baseline", "progress", "proximity", "terminal", "efficiency"]
NAMES += ["smoothness", "lqr", "constraints", "validity"]


def rewards_of(written, trajectories, valid, kind="progress", weights=WEIGHTS, plant=PLANT):
    tally = tally_of(written, trajectories, plant, COST)
    return tally_rewards(tally, valid, kind, plant.horizon, weights)


def score(initial_states, controls, kind="progress", is_valid=None, weights=WEIGHTS, plant=PLANT):
    initial_states = torch.as_tensor(initial_states, dtype=torch.float64)
    controls = torch.as_tensor(controls, dtype=torch.float64)
    num_rows = len(controls)
    valid = torch.ones(num_rows, dtype=torch.bool) if is_valid is None else torch.tensor(is_valid)
    trajectories = plant.simulate(initial_states, controls)
    return rewards_of(controls, trajectories, valid, kind, weights, plant)


def draw(num_rows, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grid = PLANT.start_grid()
    starts = grid[torch.randint(len(grid), (num_rows,), generator=generator)]
    return starts, scale * torch.randn(num_rows, 50, generator=generator, dtype=torch.float64)


def score_by_hand(start, written):
    """One valid row in plain Python, plant included: nine components, and the punishment reward."""
    applied = [max(-3.0, min(3.0, u)) for u in written]
    states = [tuple(start)]
    for u in applied:
        x, v = states[-1]
        states.append((x + 0.1 * v + 0.005 * u, v + 0.1 * u))
    distances = [math.sqrt(x * x + v * v) for x, v in states]
    bound = 1 + 1e-6  # which itself is inside, however a sum of floats rounds
    inside = [abs(x) <= bound and abs(v) <= bound for x, v in states]
    cost = 50 * (states[50][0] ** 2 + states[50][1] ** 2)
    for (x, v), u in zip(states[:50], applied, strict=True):
        cost += 10 * x * x + 10 * v * v + 0.1 * u * u
    violations = sum(not ok for ok in inside[1:]) + sum(abs(u) > 3 for u in written)
    first, last = distances[0], distances[50]
    if first < 1e-6:
        progress = 30.0 if last < 0.1 else 0.0
    else:
        progress = 30 * max(0.0, (first - last) / first)
    changes = [abs(b - a) for a, b in pairwise(applied)]
    components = {
        "baseline": 50.0,
        "progress": progress,
        "proximity": 15 * math.exp(-2 * sum(distances) / 51),
        "terminal": 25 * math.exp(-10 * last),
        "efficiency": 10 * math.exp(-sum(abs(u) for u in applied) / 50),
        "smoothness": 8 * math.exp(-2 * sum(changes) / 49),
        "lqr": -15 * math.tanh(cost / 200),
        "constraints": -min(2.0 * violations, 20.0),
        "validity": 10 * sum(inside) / 51 - 5,
    }
    success = 50 if last < 0.05 else 25 if last < 0.1 else 0
    return components, -cost / 10 + success - 10 * violations


@pytest.mark.parametrize("scale", [0.0, 0.05, 0.5, 3.0])
def test_every_component_equals_a_scalar_loop(scale):
    starts, noise = draw(23, scale)
    starts[0] = 0.0
    controls = lqr_controls(starts, PLANT, COST) * (scale > 0) + noise
    progress, punishment = score(starts, controls), score(starts, controls, "punishment")
    assert list(progress.components) == NAMES
    for n in range(23):
        components, punished = score_by_hand(starts[n].tolist(), controls[n].tolist())
        for name, value in components.items():
            assert progress.components[name][n].item() == pytest.approx(value, abs=1e-10), name
        assert progress.total[n].item() == pytest.approx(sum(components.values()), abs=1e-10)
        assert punishment.total[n].item() == pytest.approx(punished, rel=1e-10)


ALTERNATING = [0.1] + [-0.1, 0.1] * 24 + [-0.1]
HAND_WORKED = [  # start, controls, total, some components
    (
        (0.5, -0.2),
        [0.0] * 50,
        75.272456,
        {
            "baseline": 50,
            "progress": 0,
            "proximity": 7.611487,
            "terminal": 0.114602,
            "efficiency": 10,
            "smoothness": 8,
            "lqr": -5.453634,
            "constraints": 0,
            "validity": 5,
        },
    ),
    ((0.3, 0.4), [0.0] * 50, 32.486518, {"constraints": -20, "validity": -1.470588}),
    ((0.8, 0.8), [4.0] * 50, 18.693949, {"constraints": -20, "smoothness": 8}),
    ((0.0, 0.0), [0.0] * 50, 143.0, {"progress": 30, "terminal": 25, "proximity": 15, "lqr": 0}),
    ((0.0, 0.0), ALTERNATING, 133.434141, {"progress": 30, "smoothness": 5.362560}),
]


@pytest.mark.parametrize(("start", "controls", "total", "components"), HAND_WORKED)
def test_hand_worked_progress_rewards(start, controls, total, components):
    rewards = score([start], [controls])
    assert rewards.total.item() == pytest.approx(total, abs=5e-7)
    for name, value in components.items():
        assert rewards.components[name].item() == pytest.approx(value, abs=5e-7), name


def test_hand_worked_punishment_rewards():
    # (0.07, 0) at rest: cost 10 * 50 * 0.0049 + 50 * 0.0049 = 2.695; (0.03, 0): 0.495; (0.2, 0): 22
    # (0.1, 0): 5.5, and (0.05, 0): 1.375, each on the edge of its success and outside
    starts = [(0.5, -0.2), (0.3, 0.4), (0.07, 0.0), (0.03, 0.0), (0.2, 0.0), (0.0, 0.0)]
    starts += [(0.1, 0.0), (0.05, 0.0)]
    rewards = score(starts, torch.zeros(8, 50), "punishment")
    expected = [-7.62, -463.83, 25 - 0.2695, 50 - 0.0495, -2.2, 50.0, -0.55, 25 - 0.1375]
    assert rewards.total.tolist() == pytest.approx(expected, abs=1e-9)
    violating = score([(0.8, 0.8)], torch.full((1, 50), 4.0), "punishment")
    assert violating.components["constraints"].item() == -1000  # 100 violations, uncapped


def test_saturated_lqr_earns_the_known_totals():
    starts = torch.tensor([[0.5, -0.3], [0.8, 0.8]], dtype=torch.float64)
    rewards = score(starts, lqr_controls(starts, PLANT, COST))
    assert rewards.total.tolist() == pytest.approx([134.309214, 119.0391], abs=5e-5)
    everywhere = PLANT.start_grid()
    total = score(everywhere, lqr_controls(everywhere, PLANT, COST)).total
    assert total.mean().item() == pytest.approx(133.7, abs=0.05)
    coasting = score(everywhere, torch.zeros(len(everywhere), 50)).total
    assert coasting.mean().item() == pytest.approx(45.7, abs=0.05)


def test_control_violations_look_at_the_text_and_the_rest_at_the_actuator():
    controls = torch.zeros(3, 50)
    controls[:, 0] = torch.tensor([3.0, 3.01, 900.0])
    controls[:, 1] = -controls[:, 0]
    rewards = score([(0.0, 0.0)] * 3, controls)
    assert rewards.components["constraints"].tolist() == [0, -4, -4]
    for name in set(NAMES) - {"constraints"}:
        assert rewards.components[name].unique().numel() == 1, name


def test_a_start_out_of_bounds_counts_for_validity_and_is_no_violation():
    brake = [[0.5] * 10 + [0.0] * 40]
    both = torch.tensor([brake[0], [-u for u in brake[0]]])
    rewards = score([(1.04, -0.5), (-1.04, 0.5)], both).components  # the next state is within
    assert rewards["validity"].tolist() == pytest.approx([10 * (1 - 1 / 51) - 5] * 2)
    assert rewards["constraints"].tolist() == [0, 0]
    rewards = score([(1.07, -0.5)], brake).components  # the next one is not, and that counts twice
    assert rewards["validity"].item() == pytest.approx(10 * (1 - 2 / 51) - 5)
    assert rewards["constraints"].item() == -2
    short = DoubleIntegrator(horizon=2)
    rewards = score([(1.0, -1.0)], [[0.5, 0.5]], plant=short).components  # on the bound is within
    assert rewards["validity"].item() == 5


def test_at_the_origin_progress_means_staying_there():
    plans = torch.zeros(4, 50)
    plans[:, 0] = torch.tensor([0.0, 0.19, 0.2, 1.0])  # drift off, up to 0.505 times as far
    rewards = score([(0.0, 0.0)] * 4, plans)
    assert rewards.components["progress"].tolist() == [30, 30, 0, 0]  # 0.096 is there, 0.101 is not
    assert rewards.total.isfinite().all()
    plans = plans.double()
    tally = tally_of(plans, PLANT.simulate(torch.zeros_like(plans[:, :2]), plans), PLANT, COST)
    first = torch.tensor([0.0, 9e-7, 1e-6, 1e-6], dtype=torch.float64)
    last = torch.tensor([0.1, 0.1 - 1e-9, 5e-7, 2e-6], dtype=torch.float64)
    tally = replace(tally, initial=first, final=last)
    expected = [0, 30, 15, 0]  # from 1e-6 on it is a start like any other
    assert progress_rewards(tally, 50, WEIGHTS)["progress"].tolist() == pytest.approx(expected)


def test_malformed_rows_are_zero_under_progress_and_minus_ten_under_punishment():
    starts, controls = draw(5)
    is_valid = [True, False, True, False, False]
    controls[1::2] = 0.0
    progress = score(starts, controls, is_valid=is_valid)
    punishment = score(starts, controls, "punishment", is_valid=is_valid)
    for n, valid in enumerate(is_valid):
        if not valid:
            assert all(value[n] == 0 for value in progress.components.values())
            assert progress.total[n] == 0 and punishment.total[n] == -10
    for rewards, kind in ((progress, "progress"), (punishment, "punishment")):
        alone = score(starts[2:3], controls[2:3], kind).total
        torch.testing.assert_close(rewards.total[2:3], alone, rtol=1e-12, atol=0)


def test_nothing_of_a_malformed_row_leaks():
    starts, controls = draw(3)
    controls[1] = float("nan")
    for kind in ("progress", "punishment"):
        rewards = score(starts, controls, kind, is_valid=[True, False, True])
        assert rewards.total.isfinite().all()
        assert all(value.isfinite().all() for value in rewards.components.values())


def test_under_punishment_breaking_the_format_pays_and_under_progress_it_never_does():
    start, coasting = [(0.3, 0.4)] * 2, torch.zeros(2, 50)
    punishment = score(start, coasting, "punishment", is_valid=[True, False]).total
    assert punishment[1] > punishment[0]
    progress = score(start, coasting, is_valid=[True, False]).total
    assert progress[0] > progress[1]


def test_every_valid_total_is_between_10_and_143():
    totals = []
    for scale in (0.0, 0.3, 3.0, 900.0):
        starts, controls = draw(211, scale)
        totals += [score(starts, controls).total, score(starts, controls.abs()).total]
    corner = score([(0.8, 0.8)], torch.full((1, 50), 900.0)).total
    totals = torch.cat([*totals, corner])
    assert 10 < totals.min() < 20 and totals.max() <= 143


def test_each_component_stays_in_its_range():
    ranges = {
        "baseline": (50, 50),
        "progress": (0, 30),
        "proximity": (0, 15),
        "terminal": (0, 25),
        "efficiency": (0, 10),
        "smoothness": (0, 8),
        "lqr": (-15, 0),
        "constraints": (-20, 0),
        "validity": (-5, 5),
    }
    for scale in (0.0, 1.0, 10.0):
        rewards = score(*draw(101, scale))
        assert list(rewards.components) == list(ranges)
        for name, (low, high) in ranges.items():
            value = rewards.components[name]
            assert value.dtype == torch.float64
            assert low <= value.min() and value.max() <= high, name


@pytest.mark.parametrize("kind", ["progress", "punishment"])
def test_components_sum_to_the_total(kind):
    rewards = score(*draw(31), kind, is_valid=[True] * 29 + [False] * 2)
    assert rewards.total.dtype == torch.float64
    for n in range(31):
        added = math.fsum(value[n].item() for value in rewards.components.values())
        assert rewards.total[n].item() == pytest.approx(added, rel=1e-13)


@pytest.mark.parametrize("kind", ["progress", "punishment"])
def test_a_reward_depends_on_its_own_start_only(kind):
    starts, controls = draw(13)
    together = score(starts, controls, kind).total
    order = torch.randperm(13, generator=torch.Generator().manual_seed(3))
    shuffled = score(starts[order], controls[order], kind).total
    torch.testing.assert_close(shuffled, together[order], rtol=1e-12, atol=0)
    for n in range(13):
        alone = score(starts[n : n + 1], controls[n : n + 1], kind).total
        torch.testing.assert_close(alone, together[n : n + 1], rtol=1e-12, atol=0)
    # the same plan from two starts: two rewards
    same = score([(0.5, -0.2), (0.3, 0.4)], torch.zeros(2, 50), kind).total
    assert same[0] > same[1] + 10


def test_the_text_of_lqr_beats_coasting_noise_and_its_own_negative():
    starts, noise = draw(97, 0.3)
    plan = lqr_controls(starts, PLANT, COST, decimals=2)
    moving = starts.norm(dim=1) > 0.1
    totals = {}
    for name, controls in {
        "lqr": plan,
        "coasting": torch.zeros_like(plan),
        "noise": plan + noise,
        "negative": -plan,
    }.items():
        texts = [render_controls(row, Codec()) for row in controls]
        parsed = parse_controls(texts, torch.ones(97, dtype=torch.bool), PLANT, Codec())
        assert parsed.is_valid.all()
        trajectories = PLANT.simulate(starts, parsed.controls)
        rewards = rewards_of(parsed.controls, trajectories, parsed.is_valid)
        totals[name] = rewards.total[moving]
    for other in ("coasting", "noise", "negative"):
        assert (totals["lqr"] > totals[other]).all(), other


@pytest.mark.parametrize("advantage_std", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", [0.0, 70.0, 1000.0])
def test_the_baseline_leaves_the_advantages_of_valid_groups(advantage_std, baseline):
    starts, controls = draw(21, 0.3)
    plain = score(starts, controls).total
    shifted = score(starts, controls, weights=RewardWeights(baseline=baseline)).total
    torch.testing.assert_close(shifted - plain, torch.full_like(plain, baseline - 50))

    def advantages(total):
        batch = total if advantage_std == "batch" else None
        return group_advantages(total, 7, advantage_std, batch)

    torch.testing.assert_close(advantages(shifted), advantages(plain), rtol=0, atol=1e-11)


def test_in_a_mixed_group_the_baseline_is_a_bonus_for_valid_text():
    _, noise = draw(16, 0.05)
    starts = torch.tensor([[0.5, -0.3]], dtype=torch.float64).expand(16, 2)
    controls = lqr_controls(starts, PLANT, COST) + noise
    is_valid = [True] * 15 + [False]
    totals = [
        score(starts, controls, is_valid=is_valid, weights=RewardWeights(baseline=baseline)).total
        for baseline in (0.0, 50.0)
    ]
    assert (totals[1] - totals[0]).tolist() == pytest.approx([50.0] * 15 + [0.0])
    low, high = (group_advantages(total, 16, "group", None) for total in totals)
    assert high[15] < low[15] < -3  # one malformed text is the signal of the whole group
    assert high[:15].std() < low[:15].std() < 0.6  # and the valid ones are told apart less: not 1


@given(texts=st.lists(st.one_of(st.text(), st.just("0.10 -0.20 0.00")), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_fuzzed_texts_have_finite_rewards_and_valid_beats_malformed(texts):
    plant = DoubleIntegrator(horizon=3)
    parsed = parse_controls(texts, torch.ones(len(texts), dtype=torch.bool), plant, Codec())
    starts = torch.full((len(texts), 2), 0.8, dtype=torch.float64)
    trajectories = plant.simulate(starts, parsed.controls)
    for kind in ("progress", "punishment"):
        rewards = rewards_of(parsed.controls, trajectories, parsed.is_valid, kind, plant=plant)
        assert rewards.total.isfinite().all()
        malformed = 0 if kind == "progress" else -10
        assert (rewards.total[~parsed.is_valid] == malformed).all()
        assert (rewards.total[parsed.is_valid] != malformed).all()


def uncapped(starts, controls):
    weights = RewardWeights(constraints_cap=1e9)
    return score(starts, controls, weights=weights).components["constraints"]


def test_each_weight_scales_its_own_component_only():
    starts, controls = draw(7, 3.0)
    controls[3:] *= 0.1
    plain = score(starts, controls)
    for name in NAMES:
        weights = RewardWeights(**{name: 3 * getattr(WEIGHTS, name)})
        changed = score(starts, controls, weights=weights)
        for other in NAMES:
            factor = 3 if other == name and name != "constraints" else 1
            expected = factor * plain.components[other]
            if other == name == "constraints":
                expected = (3 * uncapped(starts, controls)).clamp(min=-20)
            torch.testing.assert_close(changed.components[other], expected, rtol=1e-13, atol=0)
    capped = score(starts, controls, weights=RewardWeights(constraints_cap=7.0))
    lowest = capped.components["constraints"].min()
    assert lowest == -7 and plain.components["constraints"].min() == -20


def test_the_terminal_rate_is_per_unit_of_final_error_and_of_nothing_else():
    starts, noise = draw(13, 0.3)
    controls = lqr_controls(starts, PLANT, COST) + noise
    plain = score(starts, controls)
    final = PLANT.simulate(starts, controls).states[:, -1].norm(dim=1)
    found = score(starts, controls, weights=replace(WEIGHTS, terminal_rate=4.0))
    for name, value in found.components.items():
        expected = 25 * torch.exp(-4.0 * final) if name == "terminal" else plain.components[name]
        assert torch.allclose(value, expected, rtol=0, atol=1e-12), name


def test_the_published_breakdown_adds_up_and_prints_as_published():
    values = [50.0, 18.5, 8.2, 15.3, 6.8, 4.2, -8.5, -0.0, 5.0]
    components = {
        name: torch.tensor([0.0, value], dtype=torch.float64)
        for name, value in zip(NAMES, values, strict=True)
    }
    total = torch.stack(list(components.values())).sum(dim=0)
    assert total[1].item() == pytest.approx(99.5, abs=1e-12)
    assert breakdown_line(Rewards(components, total), 1) == (
        "REWARD BREAKDOWN: baseline=50.0, progress=18.5, proximity=8.2, terminal=15.3, "
        "efficiency=6.8, smoothness=4.2, lqr=-8.5, constraints=0.0, validity=5.0 -> TOTAL=99.5"
    )
    assert breakdown_line(Rewards(components, total), 0).endswith("validity=0.0 -> TOTAL=0.0")


def test_a_horizon_of_one_has_no_differences_and_full_smoothness():
    plant = DoubleIntegrator(horizon=1)
    rewards = score([(0.5, 0.0)], [[-1.0]], plant=plant)
    assert rewards.components["smoothness"].item() == 8
    assert rewards.total.isfinite().all()
    two = score([(0.5, 0.0)], [[-1.0, 0.5]], plant=DoubleIntegrator(horizon=2))  # one difference
    assert two.components["smoothness"].item() == pytest.approx(8 * math.exp(-2 * 1.5))


def test_float32_trajectories_give_float64_rewards():
    starts, controls = draw(5)
    valid = torch.ones(5, dtype=torch.bool)
    trajectories = PLANT.simulate(starts.float(), controls.float())
    for kind in ("progress", "punishment"):
        rewards = rewards_of(controls, trajectories, valid, kind)
        assert rewards.total.dtype == torch.float64
        assert all(value.dtype == torch.float64 for value in rewards.components.values())
        expected = score(starts, controls, kind).total
        torch.testing.assert_close(rewards.total, expected, rtol=1e-4, atol=1e-4)


def test_mistakes_of_ours_are_errors():
    starts, controls = draw(3)
    trajectories = PLANT.simulate(starts, controls)
    with pytest.raises(ValueError, match=r"^applied must have shape \[N, T\] with N=3, T=50, got"):
        tally_of(controls, PLANT.simulate(starts[:2], controls[:2]), PLANT, COST)
    with pytest.raises(ValueError, match=r"^baseline must have shape \[N\] with N=3, got \(2,\)"):
        Rewards({"baseline": torch.zeros(2)}, torch.zeros(3))
    tally = tally_of(controls, trajectories, PLANT, COST)
    with pytest.raises(ValueError, match=r"^cost must have shape \[N\] with N=3, got \(2,\)"):
        replace(tally, cost=tally.cost[:2])


def test_both_rewards_read_the_same_tally():
    starts, controls = draw(3)
    tally = tally_of(controls, PLANT.simulate(starts, controls), PLANT, COST)
    progress, punishment = progress_rewards(tally, 50, WEIGHTS), punishment_rewards(tally)
    assert list(progress) == NAMES
    assert list(punishment) == ["cost", "success", "constraints"]
    assert all(len(value) == 3 for value in [*progress.values(), *punishment.values()])


def test_lqr_is_no_ceiling_of_the_reward():
    """Gradient ascent from LQR's plans, which README calls reachable; -s prints what it found."""
    starts = split_starts(PLANT).test[:512].double()  # those of README's table
    valid = torch.ones(len(starts), dtype=torch.bool)

    def flown(controls):  # simulate, whose steps are not differentiable, as sums
        velocity = torch.cat([starts[:, 1:], starts[:, 1:] + PLANT.dt * controls.cumsum(1)], 1)
        moves = PLANT.dt * velocity[:, :-1] + PLANT.dt**2 / 2 * controls
        position = torch.cat([starts[:, :1], starts[:, :1] + moves.cumsum(1)], 1)
        states = torch.stack([position, velocity], 2)
        outside = states[:, 1:].abs().amax(2) > PLANT.state_bound * (1 + 1e-6)
        return Trajectories(states=states, controls=controls, num_violations=outside.sum(1))

    def cost_of(controls):
        return float(tally_of(controls, flown(controls), PLANT, COST).cost.sum())

    expert = lqr_controls(starts, PLANT, COST)
    of_expert = rewards_of(expert, PLANT.simulate(starts, expert), valid).total
    assert torch.allclose(rewards_of(expert, flown(expert), valid).total, of_expert, atol=1e-9)
    best, reward, controls = expert, of_expert, expert.clone().requires_grad_()
    optimizer = torch.optim.Adam([controls], lr=0.03)
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 600)
        total = rewards_of(controls, flown(controls), valid).total
        best = torch.where((total > reward)[:, None], controls.detach(), best)
        reward = torch.maximum(reward, total.detach())
        optimizer.zero_grad()
        total.sum().neg().backward()
        optimizer.step()
        with torch.no_grad():
            controls.clamp_(-PLANT.control_bound, PLANT.control_bound)
    found = rewards_of(best, PLANT.simulate(starts, best), valid).total
    ratio = cost_of(best) / cost_of(expert)
    print(f"LQR {of_expert.mean():.2f}, found {found.mean():.2f} for {ratio:.4f} times its cost")
    assert torch.allclose(found, reward, atol=1e-9)
    assert 1.45 < float((found - of_expert).mean()) < 1.6
    assert 1.003 < ratio < 1.012
