"""The plant against the matrix exponential, closed forms, superposition and scalar loops."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import expm

from minigrpo.double_integrator import DoubleIntegrator, Trajectories


def draw(num_rows, horizon, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    initial_states = torch.rand(num_rows, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.8
    controls = torch.randn(num_rows, horizon, generator=generator, dtype=torch.float64) * scale
    return initial_states, controls


def simulate_by_hand(initial_state, controls, dt, control_bound, state_bound):
    """One row in plain Python: every number written out, nothing shared with the package."""
    position, velocity = initial_state
    states, num_violations = [(position, velocity)], 0
    for control in controls:
        control = min(max(control, -control_bound), control_bound)
        position = position + velocity * dt + 0.5 * control * dt * dt
        velocity = velocity + control * dt
        states.append((position, velocity))
        num_violations += max(abs(position), abs(velocity)) > state_bound * (1 + 1e-6)
    return states, num_violations


@pytest.mark.parametrize("dt", [0.1, 0.37, 1.0])
def test_matrices_are_the_matrix_exponential(dt):
    # exp of [[A_c, B_c], [0, 0]] dt holds A and B of the zero-order hold (Van Loan 1978)
    generator = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    exact = expm(generator * dt)
    transition, actuation = DoubleIntegrator(dt=dt).matrices()
    assert transition.dtype == actuation.dtype == torch.float64
    np.testing.assert_allclose(transition.numpy(), exact[:2, :2], rtol=0, atol=1e-15)
    np.testing.assert_allclose(actuation.numpy(), exact[:2, 2], rtol=1e-14, atol=0)


def test_step_and_simulate_apply_those_matrices():
    plant = DoubleIntegrator(dt=0.37, horizon=11)
    transition, actuation = plant.matrices()
    initial_states, controls = draw(7, 11)
    state = initial_states.T
    expected = transition @ state + actuation[:, None] * controls[:, 0]
    torch.testing.assert_close(plant.step(state, controls[:, 0]), expected, rtol=0, atol=1e-15)
    states = plant.simulate(initial_states, controls.clamp(-3, 3)).states
    # s_T = A^T s_0 + sum_k A^(T-1-k) B u_k
    final = initial_states @ torch.linalg.matrix_power(transition, 11).T
    for k in range(11):
        response = torch.linalg.matrix_power(transition, 10 - k) @ actuation
        final = final + controls[:, k : k + 1].clamp(-3, 3) * response
    torch.testing.assert_close(states[:, -1], final, rtol=0, atol=1e-13)  # 11 roundings of O(10)


def test_constant_control_gives_the_parabola():
    plant = DoubleIntegrator()
    initial_states = torch.tensor([[0.3, -0.7], [-0.11, 0.05], [0.0, 0.0]], dtype=torch.float64)
    control = torch.tensor([2.0, -0.4, 3.0], dtype=torch.float64)
    states = plant.simulate(initial_states, control[:, None].expand(3, 50)).states
    time = torch.arange(51, dtype=torch.float64) * 0.1
    position = initial_states[:, :1] + initial_states[:, 1:] * time + control[:, None] * time**2 / 2
    velocity = initial_states[:, 1:] + control[:, None] * time
    torch.testing.assert_close(states[..., 0], position, rtol=0, atol=1e-12)  # up to 37 m
    torch.testing.assert_close(states[..., 1], velocity, rtol=0, atol=1e-13)


def test_batched_rows_equal_a_scalar_loop_with_violations_and_saturation():
    plant = DoubleIntegrator(dt=0.2, horizon=13, state_bound=0.9, control_bound=2.0)
    initial_states, controls = draw(31, 13, scale=1.5)
    result = plant.simulate(initial_states, controls)
    for n in range(31):
        states, num_violations = simulate_by_hand(
            initial_states[n].tolist(), controls[n].tolist(), 0.2, 2.0, 0.9
        )
        expected = torch.tensor(states, dtype=torch.float64)
        torch.testing.assert_close(result.states[n], expected, rtol=0, atol=1e-14)
        assert result.num_violations[n] == num_violations
    assert len(set(result.num_violations.tolist())) > 5
    assert torch.equal(result.controls, controls.clamp(-2, 2))
    assert (controls.abs() > 2).any()


def test_superposition_holds_below_saturation():
    plant = DoubleIntegrator(horizon=23)
    first, second = draw(5, 23, 0.3, seed=1), draw(5, 23, 0.3, seed=2)
    assert max(first[1].abs().max(), second[1].abs().max()) < 1
    combined = plant.simulate(first[0] - 2 * second[0], first[1] - 2 * second[1]).states
    parts = plant.simulate(*first).states - 2 * plant.simulate(*second).states
    torch.testing.assert_close(combined, parts, rtol=0, atol=1e-13)


def test_saturated_controls_act_like_the_bound():
    plant = DoubleIntegrator()
    start = torch.tensor([[0.8, 0.8]], dtype=torch.float64)
    written, bound = (plant.simulate(start, torch.full((1, 50), u).double()) for u in (4.0, 3.0))
    assert torch.equal(written.states, bound.states)
    assert torch.equal(written.controls, torch.full((1, 50), 3.0).double())


def test_states_are_counted_but_never_clamped():
    # v = 0.8, no control: positions 0.8, 0.88, 0.96, 1.04, ... so the states k = 3..50 are outside
    plant = DoubleIntegrator()
    start = torch.tensor([[0.8, 0.8], [-0.8, -0.8], [0.5, -0.2]], dtype=torch.float64)
    result = plant.simulate(start, torch.zeros(3, 50, dtype=torch.float64))
    assert result.num_violations.tolist() == [48, 48, 0]
    assert result.num_violations.dtype == torch.int64
    assert result.states[0, -1].tolist() == pytest.approx([0.8 + 50 * 0.08, 0.8], abs=1e-12)


def test_a_state_outside_in_both_parts_counts_once_and_the_first_state_never():
    plant = DoubleIntegrator(horizon=2)
    start = torch.tensor([[5.0, 5.0], [5.0, -50.0], [0.0, 0.0]], dtype=torch.float64)
    controls = torch.zeros(3, 2, dtype=torch.float64)
    assert plant.simulate(start, controls).num_violations.tolist() == [2, 2, 0]
    back = torch.tensor([[1.05, -1.0]], dtype=torch.float64)  # x_0 outside, x_1 and x_2 inside
    assert plant.simulate(back, controls[:1]).num_violations.tolist() == [0]


def test_the_bound_itself_is_inside():
    plant = DoubleIntegrator(horizon=1)
    start = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    result = plant.simulate(start, torch.zeros(3, 1, dtype=torch.float64))
    assert result.num_violations.tolist() == [0, 0, 0]
    # 0.64 + 0.065 + 0.168 + 0.127 is 1, and more than 1 in float64
    controls = torch.tensor([[0.65, 1.68, 1.27]], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        reached = replace(plant, horizon=3).simulate(
            torch.tensor([[-0.5, 0.64]], dtype=dtype), controls.to(dtype)
        )
        assert float(reached.states[0, 3, 1]) == pytest.approx(1.0, abs=1e-6)
        assert int(reached.num_violations[0]) == 0


def test_permuting_the_batch_permutes_the_result():
    plant = DoubleIntegrator()
    initial_states, controls = draw(19, 50, 2.0)
    order = torch.randperm(19, generator=torch.Generator().manual_seed(5))
    plain, permuted = (
        plant.simulate(initial_states, controls),
        plant.simulate(initial_states[order], controls[order]),
    )
    # 1e-13: vector and scalar code may contract a multiply-add differently
    torch.testing.assert_close(permuted.states, plain.states[order], rtol=0, atol=1e-13)
    assert torch.equal(permuted.num_violations, plain.num_violations[order])
    assert torch.equal(permuted.controls, plain.controls[order])


def test_arguments_are_unchanged_and_results_own_their_memory():
    plant = DoubleIntegrator(horizon=7)
    initial_states, controls = draw(3, 7, 9.0)
    before = initial_states.clone(), controls.clone()
    result = plant.simulate(initial_states, controls)
    time_major = controls.T.contiguous().T  # no copy is needed for this layout: still no alias
    result.controls.zero_()
    second = plant.simulate(initial_states, time_major)
    second.controls.zero_()
    assert torch.equal(initial_states, before[0]) and torch.equal(controls, before[1])
    assert torch.equal(time_major, before[1])


def test_float32_stays_float32_and_agrees():
    plant = DoubleIntegrator()
    initial_states, controls = draw(5, 50)
    single = plant.simulate(initial_states.float(), controls.float())
    assert single.states.dtype == single.controls.dtype == torch.float32
    double = plant.simulate(initial_states, controls)
    torch.testing.assert_close(single.states.double(), double.states, rtol=0, atol=1e-4)
    with pytest.raises(
        ValueError, match=r"controls must have dtype torch.float64, got torch.float"
    ):
        plant.simulate(initial_states, controls.float())


def test_states_are_a_time_major_view():
    # each step of the loop must stream over contiguous rows: 20 times faster at 65k rows
    result = DoubleIntegrator(horizon=7).simulate(*draw(5, 7))
    assert result.states.stride(0) == result.controls.stride(0) == 1


def test_an_empty_batch_is_fine():
    result = DoubleIntegrator(horizon=7).simulate(*draw(0, 7))
    assert result.states.shape == (0, 8, 2) and result.num_violations.shape == (0,)


def test_wrong_shapes_are_refused():
    plant = DoubleIntegrator(horizon=7)
    with pytest.raises(
        ValueError, match=r"controls must have shape \[N, 7\] with N=3, got \(3, 8\)"
    ):
        plant.simulate(*draw(3, 8))
    start, controls = draw(3, 7)
    with pytest.raises(ValueError, match=r"initial_states must have shape \[N, 2\], got \(3, 1\)"):
        plant.simulate(start[:, :1], controls)  # which would be position and velocity both
    with pytest.raises(
        ValueError, match=r"^Trajectories: states must have shape \[N, T\+1, D\] with"
    ):
        Trajectories(torch.zeros(3, 7), torch.zeros(3, 7, 2), torch.zeros(3))


def test_the_grid_holds_every_two_decimal_start_as_the_float_of_its_text():
    grid = DoubleIntegrator().start_grid()
    assert grid.shape == (161**2, 2) and grid.dtype == torch.float64
    texts = [f"-0.{n:02d}" for n in range(80, 0, -1)] + [f"0.{n:02d}" for n in range(81)]
    values = [float(text) for text in texts]
    assert grid[::161, 0].tolist() == values and grid[:161, 1].tolist() == values
    assert len({tuple(row) for row in grid.tolist()}) == 161**2
    assert all(math.copysign(1, v) == 1 for v in grid.flatten().tolist() if v == 0)


def test_the_grid_follows_bound_and_decimals():
    grid = DoubleIntegrator(start_bound=0.3, start_decimals=1).start_grid()
    assert sorted(set(grid[:, 1].tolist())) == [-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3]
    assert DoubleIntegrator(start_bound=1.0, start_decimals=0).start_grid().shape == (9, 2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dt", 0.0),
        ("dt", 0.0009),
        ("dt", 1000.1),
        ("dt", float("nan")),
        ("horizon", 0),
        ("horizon", 1001),
        ("control_bound", 1000001.0),
        ("state_bound", float("inf")),
        ("control_bound", -3.0),
        ("control_bound", 0.0),
        ("start_bound", 1.1),  # outside the state bound
        ("start_bound", 0.805),  # not on the grid
        ("start_decimals", -1),
        ("start_decimals", 7),
    ],
)
def test_bad_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field} must .*, got {value}"):
        DoubleIntegrator(**{field: value})


def test_the_limits_themselves_are_allowed():
    assert DoubleIntegrator(0.001, 1, start_bound=1.0, start_decimals=0).dt == 0.001
    assert DoubleIntegrator(1000, 1000, 1e6, 1e6, 0.001, start_decimals=6).dt == 1000


@pytest.mark.parametrize(("decimals", "largest"), [(0, 1000.0), (1, 100.0), (2, 10.0), (4, 0.1)])
def test_a_grid_has_at_most_1000_steps_on_each_side(decimals, largest):
    plant = DoubleIntegrator(state_bound=2000.0, start_bound=largest, start_decimals=decimals)
    assert plant.start_bound == largest
    more = round(largest + 10**-decimals, decimals)
    with pytest.raises(ValueError, match=f"^start_bound must .* 1000 steps .*, got {more}"):
        DoubleIntegrator(state_bound=2000.0, start_bound=more, start_decimals=decimals)
