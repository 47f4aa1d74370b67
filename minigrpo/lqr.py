"""The expert: quadratic cost, infinite-horizon LQR gain, saturated LQR controls for a batch.

cost = sum_{k<T} (x_k' Q x_k + R u_k^2) + terminal x_T' Q x_T,   Q = diag(position, velocity)
u_k = -K x_k, saturated

No factor 1/2 and no factor dt. One gain for all steps: against the time-varying gains of the finite
horizon it costs at most 4e-5 more over the default 5 s; over 1 s 9 % more in all, at most 12 %.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from scipy.linalg import solve_discrete_are  # type: ignore[import-untyped]
from torch import Tensor

from minigrpo.double_integrator import DoubleIntegrator, Trajectories
from minigrpo.shapes import check_shapes


@dataclass(frozen=True)
class QuadraticCost:
    """Weights of the cost; `terminal` multiplies the state weights at the last state."""

    position: float = 10.0
    velocity: float = 10.0
    control: float = 0.1
    terminal: float = 5.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value <= 1e6:
                raise ValueError(f"{name} must be positive and at most 1e6, got {value}")


def trajectory_cost(trajectories: Trajectories, cost: QuadraticCost) -> Tensor:
    """The cost [N] of each trajectory, with the controls as applied."""
    position, velocity = trajectories.states.unbind(dim=2)
    state_costs = state_cost(position, velocity, cost)  # [N, T+1]
    control_costs = cost.control * trajectories.controls.square()  # [N, T]
    running = state_costs[:, :-1].sum(dim=1) + control_costs.sum(dim=1)
    return running + cost.terminal * state_costs[:, -1]


def state_cost(position: Tensor, velocity: Tensor, cost: QuadraticCost) -> Tensor:
    """x' Q x of each state."""
    return cost.position * position.square() + cost.velocity * velocity.square()


def lqr_gain(plant: DoubleIntegrator, cost: QuadraticCost) -> Tensor:
    """The gain K [2], float64, of the infinite-horizon problem; u = -K x.

    P = A'PA - A'PB (R + B'PB)^-1 B'PA + Q,   K = (R + B'PB)^-1 B'PA
    """
    state_weights = torch.tensor([cost.position, cost.velocity], dtype=torch.float64)
    return _riccati_gain(*plant.matrices(), state_weights, cost.control)


def _riccati_gain(
    transition: Tensor, actuation: Tensor, state_weights: Tensor, control_weight: float
) -> Tensor:
    matrices = (transition, rearrange(actuation, "c -> c 1"), state_weights.diag())
    solved = solve_discrete_are(*(matrix.numpy() for matrix in matrices), [[control_weight]])
    value = torch.from_numpy(solved)  # [2, 2] float64
    return actuation @ value @ transition / (control_weight + actuation @ value @ actuation)


def lqr_controls(
    initial_states: Tensor,
    plant: DoubleIntegrator,
    cost: QuadraticCost,
    decimals: int | None = None,
) -> Tensor:
    """Saturated LQR controls [N, T] from initial_states [N, 2].

    `decimals` rounds each control inside the loop, so the next sees the effect of the rounded one:
    the sum of costs grows by 0.0005 %. Rounding the finished plan instead adds 0.02 %, and from one
    of the held-out starts it costs 3.2 times what LQR does.
    """
    return disturbed_lqr_controls(initial_states, plant, cost, decimals, None)[0]


def disturbed_lqr_controls(
    initial_states: Tensor,
    plant: DoubleIntegrator,
    cost: QuadraticCost,
    decimals: int | None,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What saturated LQR wants, and what is applied instead: two [N, T] of initial_states [N, 2].

    wanted_k = sat(round(-K x_k)),  applied_k = sat(round(wanted_k + noise_k)),
    x_{k+1} = A x_k + B applied_k
    `noise` [N, T], m/s^2; None: both are the same. The expert answers the state that the noise led
    to, so its controls teach feedback, which an undisturbed plan never needs (DART, 1703.09327).
    """
    check_shapes(initial_states=(initial_states, "N 2"), noise=(noise, f"N {plant.horizon}"))

    def possible(control: Tensor) -> Tensor:
        control = control if decimals is None else control.round(decimals=decimals)
        return control.clamp(-plant.control_bound, plant.control_bound)

    gain = lqr_gain(plant, cost).to(initial_states)
    state = rearrange(initial_states, "n c -> c n")  # [2, N]
    wanted, applied = [], []
    for k in range(plant.horizon):
        wanted.append(possible(-(gain[0] * state[0] + gain[1] * state[1])))  # [N]
        applied.append(wanted[k] if noise is None else possible(wanted[k] + noise[:, k]))
        state = plant.step(state, applied[k])
    return torch.stack(wanted, dim=1), torch.stack(applied, dim=1)
