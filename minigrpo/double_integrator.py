"""The plant: a double integrator under piecewise constant acceleration, and its batched simulation.

x_{k+1} = A x_k + B u_k,   A = [[1, dt], [0, 1]],   B = [dt^2/2, dt]

with x = (position, velocity) in m and m/s, u in m/s^2. This zero-order hold is exact. The actuator
saturates; states are never clamped, since a clamped state is a free brake.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from einops import rearrange
from torch import Tensor

from minigrpo.shapes import check_record, check_shapes


@dataclass(frozen=True)
class Trajectories:
    """What the plant did: states k = 0..T, controls as applied, count of states out of bounds."""

    controls: Annotated[Tensor, "N T"]  # m/s^2, saturated
    states: Annotated[Tensor, "N T+1 D"]  # D = 2: m, m/s
    num_violations: Annotated[Tensor, "N"]  # int64, states k = 1..T out of bounds, one for each

    def __post_init__(self) -> None:
        check_record(self)


@dataclass(frozen=True)
class DoubleIntegrator:
    """Step, horizon, bounds and start grid: the home of every number about the plant."""

    dt: float = 0.1  # s
    horizon: int = 50  # steps
    state_bound: float = 1.0  # m and m/s; leaving it is counted, not prevented
    control_bound: float = 3.0  # m/s^2; the actuator saturates here
    start_bound: float = 0.8  # m and m/s
    start_decimals: int = 2  # starts are exact in text

    def __post_init__(self) -> None:
        ranges = (("dt", 0.001, 1000), ("horizon", 1, 1000), ("start_decimals", 0, 6))
        for name, low, high in ranges:
            if not low <= (got := getattr(self, name)) <= high:
                raise ValueError(f"{name} must be between {low} and {high}, got {got}")
        for name in ("state_bound", "control_bound", "start_bound"):
            if not 0 < (got := getattr(self, name)) <= 1e6:
                raise ValueError(f"{name} must be positive and at most 1e6, got {got}")
        bound, decimals = self.start_bound, self.start_decimals
        if bound > self.state_bound:
            raise ValueError(f"start_bound must be at most {self.state_bound}, got {bound}")
        if bound != round(bound, decimals):
            raise ValueError(f"start_bound must have {decimals} decimals, got {bound}")
        if bound * 10**decimals > 1000:  # 4 million starts
            raise ValueError(f"start_bound must be at most 1000 steps of a decimal, got {bound}")

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A [2, 2] and B [2] of the exact zero-order hold, float64."""
        transition = torch.tensor([[1.0, self.dt], [0.0, 1.0]], dtype=torch.float64)
        return transition, torch.tensor([self.dt**2 / 2, self.dt], dtype=torch.float64)

    def start_grid(self) -> Tensor:
        """All starts [K, 2] float64, position-major; each the float nearest to its text."""
        scale = 10**self.start_decimals
        limit = round(self.start_bound * scale)
        # a division of integers rounds correctly; adding up steps of 0.01 would not
        axis = torch.tensor([n / scale for n in range(-limit, limit + 1)], dtype=torch.float64)
        return torch.cartesian_prod(axis, axis)

    def advance(
        self, state: Sequence[Tensor], control: Tensor, following: Sequence[Tensor]
    ) -> None:
        """A x + B u, the only dynamics there are, written into `following`.

        (position [N], velocity [N]) and saturated controls [N]; unbound, since each look-up of a
        row costs as much as adding a few thousand numbers. `following` may be `state` itself: what
        the next velocity needs is not overwritten before it is made.
        """
        position, velocity = state
        torch.add(position, velocity, alpha=self.dt, out=following[0])
        following[0].add_(control, alpha=self.dt**2 / 2)
        torch.add(velocity, control, alpha=self.dt, out=following[1])

    def leaves_bounds_(self, position: Tensor, velocity: Tensor) -> Tensor:
        """1.0 where a state of these absolute values is out of bounds, else 0.0.

        The bound itself is inside, however it rounds in float32 or 64. Written into `position`, and
        floats, since to add bools to a count is slow.
        """
        bound = self.state_bound * (1 + 1e-6)
        return torch.maximum(position, velocity, out=position).gt_(bound)

    def step(self, state: Tensor, control: Tensor) -> Tensor:
        """The state after one step: [2, N] and saturated controls [N] -> [2, N]."""
        following = torch.empty_like(state)
        self.advance(state.unbind(0), control, following.unbind(0))
        return following

    def simulate(self, initial_states: Tensor, controls: Tensor) -> Trajectories:
        """Saturate controls [N, T] and apply them from initial_states [N, 2] of the same dtype.

        Time-major with the batch innermost, so each step streams over contiguous rows; the
        [N, T+1, 2] handed out is a view of that. Not differentiable: the steps write into it.
        """
        sizes = check_shapes(
            initial_states=(initial_states, "N 2"), controls=(controls, f"N {self.horizon}")
        )
        dtype, bound = initial_states.dtype, self.control_bound
        if controls.dtype != dtype:
            raise ValueError(f"controls must have dtype {dtype}, got {controls.dtype}")
        applied = rearrange(controls, "n t -> t n").clamp(-bound, bound).contiguous()  # [T, N]
        states = applied.new_empty(self.horizon + 1, 2, sizes["N"])  # [T+1, 2, N]
        states[0] = rearrange(initial_states, "n c -> c n")
        # One buffer for the sizes: 1.2 times as fast.
        outside, size = torch.zeros_like(applied[0]), torch.empty_like(states[0])  # [N], [2, N]
        rows = [state.unbind(0) for state in states.unbind(0)]
        larger, other = size.unbind(0)
        for k, control in enumerate(applied.unbind(0)):
            self.advance(rows[k], control, rows[k + 1])
            torch.abs(states[k + 1], out=size)
            outside += self.leaves_bounds_(larger, other)
        return Trajectories(
            states=rearrange(states, "t c n -> n t c"),
            controls=rearrange(applied, "t n -> n t"),
            num_violations=outside.long(),
        )
