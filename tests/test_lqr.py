"""LQR against dense least squares, a bounded solver, a Riccati recursion and published numbers."""

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear

from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.lqr import (
    QuadraticCost,
    _riccati_gain,
    disturbed_lqr_controls,
    lqr_controls,
    lqr_gain,
    trajectory_cost,
)

PLANT, COST = DoubleIntegrator(), QuadraticCost()


def riccati_recursion(transition, actuation, state_weights, control_weight, num_steps):
    """P after num_steps of dynamic programming, written from the Bellman equation."""
    value = state_weights
    for _ in range(num_steps):
        gain = actuation @ value @ transition / (control_weight + actuation @ value @ actuation)
        closed = transition - np.outer(actuation, gain)
        value = state_weights + control_weight * np.outer(gain, gain) + closed.T @ value @ closed
    return value


def stacked_problem(plant, cost, terminal):
    """Matrices M, m with cost(u) = |M u + m x0|^2 for the plan u [T], the start x0."""
    transition, actuation = (matrix.numpy() for matrix in plant.matrices())
    horizon = plant.horizon
    free, forced = np.eye(2), np.zeros((2, horizon))
    running = np.diag(np.sqrt([cost.position, cost.velocity]))
    rows_free, rows_forced = [], []
    for k in range(horizon):
        rows_free.append(running @ free)
        rows_forced.append(running @ forced)
        free, forced = transition @ free, transition @ forced
        forced[:, k] = actuation
    root = np.linalg.cholesky(terminal).T
    rows_free += [root @ free, np.zeros((horizon, 2))]
    rows_forced += [root @ forced, np.sqrt(cost.control) * np.eye(horizon)]
    return np.vstack(rows_forced), np.vstack(rows_free)


def cost_by_hand(states, controls, cost):
    total = 0.0
    for position, velocity in states[:-1]:
        total += cost.position * position**2 + cost.velocity * velocity**2
    for control in controls:
        total += cost.control * control**2
    position, velocity = states[-1]
    return total + cost.terminal * (cost.position * position**2 + cost.velocity * velocity**2)


def simulated_cost(initial_states, controls):
    return trajectory_cost(PLANT.simulate(initial_states, controls), COST)


def some_starts(num_rows, seed=0):
    grid = PLANT.start_grid()
    order = torch.randperm(len(grid), generator=torch.Generator().manual_seed(seed))
    return grid[order[:num_rows]]


def test_cost_equals_a_scalar_loop():
    plant = DoubleIntegrator(horizon=11)
    cost = QuadraticCost(position=2.0, velocity=3.0, control=0.7, terminal=5.5)
    generator = torch.Generator().manual_seed(1)
    initial_states = torch.randn(7, 2, generator=generator, dtype=torch.float64)
    controls = torch.randn(7, 11, generator=generator, dtype=torch.float64) * 4
    trajectories = plant.simulate(initial_states, controls)
    assert (controls.abs() > 3).any()  # the cost counts what was applied
    values = trajectory_cost(trajectories, cost)
    for n in range(7):
        applied = controls[n].clamp(-3, 3).tolist()
        expected = cost_by_hand(trajectories.states[n].tolist(), applied, cost)
        assert values[n].item() == pytest.approx(expected, rel=1e-13)


def test_cost_of_coasting_by_hand():
    # (0.5, -0.2): x_k = 0.5 - 0.02 k; sum of x_k^2 over k = 0..49 is 4.17, x_50 = -0.5
    # 10 * 4.17 + 10 * 50 * 0.04 + 50 * (0.25 + 0.04) = 76.2
    start = torch.tensor([[0.5, -0.2], [0.3, 0.4], [0.0, 0.0]], dtype=torch.float64)
    values = simulated_cost(start, torch.zeros(3, 50, dtype=torch.float64))
    assert values.tolist() == pytest.approx([76.2, 1338.3, 0.0], rel=1e-12)


def test_gain_equals_the_published_examples():
    # A = [[1, 1], [0, 1]], B = [0, 1], Q = I, R = 1
    transition = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    actuation = torch.tensor([0.0, 1.0], dtype=torch.float64)
    gain = _riccati_gain(transition, actuation, torch.ones(2, dtype=torch.float64), 1.0)
    assert gain.tolist() == pytest.approx([0.42208, 1.24393], abs=5e-6)
    assert lqr_gain(PLANT, COST).tolist() == pytest.approx([5.8939, 6.8209], abs=5e-5)
    assert lqr_gain(PLANT, COST).dtype == torch.float64


@pytest.mark.parametrize(
    ("plant", "cost"),
    [
        (PLANT, COST),
        (DoubleIntegrator(dt=0.3, horizon=17), QuadraticCost(0.3, 0.1, 0.2, 1.0)),
    ],
)
def test_gain_is_the_first_control_of_dense_least_squares(plant, cost):
    # with the infinite-horizon value at the end, the finite problem has the infinite one's solution
    transition, actuation = (matrix.numpy() for matrix in plant.matrices())
    weights = np.diag([cost.position, cost.velocity])
    value = riccati_recursion(transition, actuation, weights, cost.control, 2000)
    forced, free = stacked_problem(plant, cost, value)
    solution = -np.linalg.lstsq(forced, free, rcond=None)[0]  # u = solution @ x0
    np.testing.assert_allclose(-lqr_gain(plant, cost).numpy(), solution[0], rtol=0, atol=1e-10)


def test_value_function_is_the_simulated_cost():
    # x0' P x0 = cost of the unsaturated law with P instead of 5 Q at the end
    transition, actuation = (matrix.numpy() for matrix in PLANT.matrices())
    value = riccati_recursion(transition, actuation, np.diag([10.0, 10.0]), 0.1, 2000)
    starts = some_starts(40) * 0.3
    controls = lqr_controls(starts, PLANT, COST)
    inside = controls.abs().amax(dim=1) < 3
    trajectories = PLANT.simulate(starts[inside], controls[inside])
    final = trajectories.states[:, -1].numpy()
    values = trajectory_cost(trajectories, COST).numpy() - 50 * (final**2).sum(axis=1)
    values += np.einsum("ni,ij,nj->n", final, value, final)
    expected = np.einsum("ni,ij,nj->n", starts[inside].numpy(), value, starts[inside].numpy())
    assert inside.sum() > 20
    np.testing.assert_allclose(values, expected, rtol=1e-12)


def test_unsaturated_lqr_costs_what_dense_least_squares_costs():
    forced, free = stacked_problem(PLANT, COST, 5 * np.diag([10.0, 10.0]))
    starts = some_starts(40) * 0.3
    controls = lqr_controls(starts, PLANT, COST)
    inside = controls.abs().amax(dim=1) < 3
    values = simulated_cost(starts[inside], controls[inside])
    for start, value in zip(starts[inside].numpy(), values.tolist(), strict=True):
        plan, (optimum,) = np.linalg.lstsq(forced, -free @ start, rcond=None)[:2]
        assert np.abs(plan).max() < 3
        assert 1 - 1e-12 < value / optimum < 1 + 1e-4  # one gain instead of time-varying ones


def test_saturated_lqr_is_within_1e_4_of_the_bounded_optimum():
    forced, free = stacked_problem(PLANT, COST, 5 * np.diag([10.0, 10.0]))
    starts = torch.cat([some_starts(10), torch.tensor([[0.8, 0.8], [-0.8, 0.3]])])
    controls = lqr_controls(starts, PLANT, COST)
    assert (controls.abs() == 3).any(dim=1).sum() >= 5
    values = simulated_cost(starts, controls)
    for start, value in zip(starts.double().numpy(), values.tolist(), strict=True):
        optimum = 2 * lsq_linear(forced, -free @ start, bounds=(-3, 3), tol=1e-13).cost
        assert 1 - 1e-8 < value / optimum < 1 + 1e-4


def test_no_feasible_change_lowers_the_cost():
    starts = some_starts(53, seed=3)
    controls = lqr_controls(starts, PLANT, COST)
    best = simulated_cost(starts, controls)
    generator = torch.Generator().manual_seed(0)
    for scale in (0.01, 0.1, 1.0):
        noise = scale * torch.randn(controls.shape, generator=generator, dtype=torch.float64)
        assert (best <= (1 + 1e-4) * simulated_cost(starts, controls + noise)).all()
    assert (best < simulated_cost(starts, -controls)).all()


@pytest.mark.parametrize("decimals", [None, 1, 2])
def test_each_control_is_the_feedback_at_the_simulated_state_bit_for_bit(decimals):
    starts = some_starts(29)
    controls = lqr_controls(starts, PLANT, COST, decimals)
    trajectories = PLANT.simulate(starts, controls)
    gain = lqr_gain(PLANT, COST)
    for k in range(50):
        position, velocity = trajectories.states[:, k].unbind(dim=1)
        feedback = -(gain[0] * position + gain[1] * velocity)
        if decimals is not None:
            texts = [f"{u:.{decimals}f}" for u in feedback.tolist()]
            feedback = torch.tensor([float(text) for text in texts], dtype=torch.float64)
        assert torch.equal(controls[:, k], feedback.clamp(-3, 3))
    assert torch.equal(trajectories.controls, controls)


@pytest.mark.parametrize("decimals", [None, 2])
def test_the_expert_answers_where_the_noise_led_and_not_where_its_own_control_would_have(decimals):
    starts = some_starts(29)
    noise = torch.randn(29, 50, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    wanted, applied = disturbed_lqr_controls(starts, PLANT, COST, decimals, noise)
    states = PLANT.simulate(starts, applied).states
    for k in range(50):
        assert torch.equal(wanted[:, k], lqr_controls(states[:, k], PLANT, COST, decimals)[:, 0])
    moved = wanted + noise
    moved = moved if decimals is None else moved.round(decimals=decimals)
    assert torch.equal(applied, moved.clamp(-3, 3))
    still = disturbed_lqr_controls(starts, PLANT, COST, decimals, None)
    assert torch.equal(still[0], still[1])
    with pytest.raises(ValueError, match="noise must have shape"):
        disturbed_lqr_controls(starts, PLANT, COST, decimals, noise[:, :49])


def test_rounding_inside_the_loop_is_nearly_free_and_rounding_the_plan_is_not():
    starts = PLANT.start_grid()
    plan = lqr_controls(starts, PLANT, COST)
    exact = simulated_cost(starts, plan)
    inside = simulated_cost(starts, lqr_controls(starts, PLANT, COST, decimals=2))
    after = simulated_cost(starts, plan.round(decimals=2))
    assert (inside.sum() / exact.sum()).item() == pytest.approx(1.00001, abs=5e-6)
    moving = exact > 0  # the origin costs nothing
    assert (after[moving] / exact[moving]).max().item() == pytest.approx(3.2, abs=0.05)


def test_facts_over_all_starts():
    starts = PLANT.start_grid()
    trajectories = PLANT.simulate(starts, lqr_controls(starts, PLANT, COST))
    errors = trajectories.states[:, -1].norm(dim=1)
    assert trajectories.num_violations.sum() == 0
    assert trajectories.states.abs().amax(dim=(0, 1)).tolist() == pytest.approx(
        [0.905, 0.8], abs=5e-4
    )
    assert errors.median().item() == pytest.approx(0.0044, abs=5e-5)
    assert errors.max().item() == pytest.approx(0.0131, abs=5e-5)
    saturated = (trajectories.controls.abs() == 3).any(dim=1).double().mean().item()
    assert saturated == pytest.approx(0.502, abs=2e-3)


def test_known_costs_and_the_origin():
    starts = torch.tensor([[0.5, -0.3], [0.8, 0.8], [0.0, 0.0]], dtype=torch.float64)
    controls = lqr_controls(starts, PLANT, COST)
    expected = [27.142399, 127.7025, 0.0]
    assert simulated_cost(starts, controls).tolist() == pytest.approx(expected, abs=5e-5)
    assert controls[2].abs().max() == 0


def test_each_row_follows_its_own_start():
    starts = some_starts(13)
    together = lqr_controls(starts, PLANT, COST)
    for n in range(13):
        alone = lqr_controls(starts[n : n + 1], PLANT, COST)
        torch.testing.assert_close(together[n], alone[0], rtol=0, atol=1e-12)
    assert len({tuple(row) for row in together.tolist()}) == 13


def test_float32_starts_and_wrong_shapes():
    starts = some_starts(5)
    single = lqr_controls(starts.float(), PLANT, COST)
    assert single.dtype == torch.float32
    exact = lqr_controls(starts, PLANT, COST)
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"initial_states must have shape \[N, 2\], got \(5,\)"):
        lqr_controls(starts[:, 0], PLANT, COST)


@pytest.mark.parametrize("field", ["position", "velocity", "control", "terminal"])
@pytest.mark.parametrize("value", [-1.0, 0.0, 1000001, float("nan"), float("inf")])
def test_bad_weights_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be positive and at most 1e6, got {value}"):
        QuadraticCost(**{field: value})
    assert getattr(QuadraticCost(**{field: 1e6}), field) == 1e6


@pytest.mark.parametrize("dt", [1e-3, 1e3])
def test_every_dt_that_a_plant_may_have_has_a_gain(dt):
    plant = DoubleIntegrator(dt=dt)
    starts = plant.start_grid()[:100]
    costs = trajectory_cost(plant.simulate(starts, lqr_controls(starts, plant, COST)), COST)
    assert lqr_gain(plant, COST).isfinite().all() and costs.isfinite().all()
