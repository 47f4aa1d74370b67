"""Rewards from parsed text and trajectories: `progress` for training, `punishment` to compare with.

d_k = sqrt(position_k^2 + velocity_k^2), k = 0..T; u = controls as applied; default weights:
baseline      50                                                                         50
progress      30 max(0, (d_0 - d_T) / d_0); if d_0 < 1e-6: 30 if d_T < 0.1, else 0       0..30
proximity     15 exp(-2 mean_k d_k), all T+1 states                                      0..15
terminal      25 exp(-10 d_T)                                                            0..25
efficiency    10 exp(-mean_k abs(u_k))                                                   0..10
smoothness    8 exp(-2 mean_k abs(u_k - u_{k-1})), k = 1..T-1                            0..8
lqr           -15 tanh(cost / 200)                                                       -15..0
constraints   -min(2 violations, 20); violations = controls written out of bounds
              + states k = 1..T with either part out of bounds                           -20..0
validity      10 (share of the T+1 states within both bounds) - 5                        -5..5

So valid text has more than 10, and malformed text has 0 in every component. The baseline cancels in
the advantages where no token that breaks the format has probability; in a mixed group it is the
margin of valid over malformed, and with any malformed text it is in the standard deviation that
advantages are divided by.

The 10 of `terminal` is `terminal_rate`, which --adaptive-terminal sets to 1 / (mean final error of
the last ten rollouts), at most 100: the term then resolves errors of the size that the policy
makes.

Punishment: -cost / 10, + 50 for d_T < 0.05 or 25 for d_T < 0.1, -10 for each violation, uncapped;
malformed text has -10. Unbounded and stepped, it pays for breaking the format: without any control
88 % of the starts are below -10.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minigrpo.double_integrator import DoubleIntegrator, Trajectories
from minigrpo.lqr import QuadraticCost, trajectory_cost
from minigrpo.shapes import check_shapes

RewardKind = Literal["progress", "punishment"]


@dataclass(frozen=True)
class RewardWeights:
    """The largest size of each component of the progress reward, and the terminal one's rate.

    `GRPOConfig` has their ranges.
    """

    baseline: float = 50.0
    progress: float = 30.0
    proximity: float = 15.0
    terminal: float = 25.0
    terminal_rate: float = 10.0  # per unit of final error; not a size
    efficiency: float = 10.0
    smoothness: float = 8.0
    lqr: float = 15.0
    constraints: float = 2.0  # per violation
    constraints_cap: float = 20.0
    validity: float = 10.0  # from -5 to 5


@dataclass(frozen=True)
class Rewards:
    """The components [N] by name, and their sum."""

    components: dict[str, Tensor]
    total: Tensor  # [N] float64

    def __post_init__(self) -> None:
        columns = {"total": self.total, **self.components}
        check_shapes(**{name: (value, "N") for name, value in columns.items()})


@dataclass(frozen=True)
class Tally:
    """Sums over a trajectory and its two ends: all that a reward reads of it. [N] each."""

    initial: Tensor  # d_0
    final: Tensor  # d_T
    distance: Tensor  # sum of d_k, k = 0..T
    effort: Tensor  # sum of abs(u_k), as applied, m/s^2
    change: Tensor  # sum of abs(u_k - u_{k-1}), m/s^2
    cost: Tensor  # `lqr.trajectory_cost`
    num_outside: Tensor  # states k = 1..T out of bounds
    starts_outside: Tensor  # bool, state 0 is
    num_excessive: Tensor  # controls written out of bounds

    def __post_init__(self) -> None:
        check_shapes(**{name: (value, "N") for name, value in vars(self).items()})


# Of tallies and which of them are of valid text, [N] bool.
RewardFunction = Callable[[Tally, Tensor], Rewards]


def tally_of(
    written: Tensor, trajectories: Trajectories, plant: DoubleIntegrator, cost: QuadraticCost
) -> Tally:
    """The sums of N texts with the controls written [N, T], each over its own trajectory."""
    check_shapes(written=(written, "N T"), applied=(trajectories.controls, "N T"))
    controls = trajectories.controls
    distances = distance_from_rest(*trajectories.states.unbind(dim=2))  # [N, T+1]
    return Tally(
        initial=distances[:, 0],
        final=distances[:, -1],
        distance=distances.sum(dim=1),
        effort=controls.abs().sum(dim=1),
        change=controls.diff(dim=1).abs().sum(dim=1),
        cost=trajectory_cost(trajectories, cost),
        num_outside=trajectories.num_violations,
        starts_outside=trajectories.states[:, 0].abs().amax(dim=1) > plant.state_bound,
        num_excessive=(written.abs() > plant.control_bound).sum(dim=1),
    )


def distance_from_rest(position: Tensor, velocity: Tensor) -> Tensor:
    """d of the module's docstring; six times faster than norm(dim=2) on time-major memory."""
    return (position.square() + velocity.square()).sqrt()


def tally_rewards(
    tally: Tally, is_valid: Tensor, kind: RewardKind, horizon: int, weights: RewardWeights
) -> Rewards:
    """Rewards of tallies, whichever way they were made; is_valid [N] bool."""
    tally = Tally(**{name: sums.double() for name, sums in vars(tally).items()})
    match kind:
        case "progress":
            components = progress_rewards(tally, horizon, weights)
        case "punishment":
            components = punishment_rewards(tally)
    # where, not times 0: nothing of an invalid row may leak
    components = {k: torch.where(is_valid, v, 0.0) for k, v in components.items()}
    if kind == "punishment":
        components["malformed"] = torch.where(is_valid, 0.0, -10.0).double()
    return Rewards(components, torch.stack(list(components.values())).sum(dim=0))


def progress_rewards(tally: Tally, horizon: int, weights: RewardWeights) -> dict[str, Tensor]:
    """The nine components [N] of the progress reward of valid text, from float64 sums."""
    initial, final = tally.initial, tally.final
    covered = ((initial - final) / initial).clamp(min=0)
    progress = torch.where(initial < 1e-6, (final < 0.1).double(), covered)
    num_changes = max(1, horizon - 1)  # horizon 1 has none, and its sum is 0
    share_inside = 1 - (tally.num_outside + tally.starts_outside) / (horizon + 1)
    violations = tally.num_excessive + tally.num_outside
    return {
        "baseline": torch.full_like(final, weights.baseline),
        "progress": weights.progress * progress,
        "proximity": weights.proximity * torch.exp(-2 * tally.distance / (horizon + 1)),
        "terminal": weights.terminal * torch.exp(-weights.terminal_rate * final),
        "efficiency": weights.efficiency * torch.exp(-tally.effort / horizon),
        "smoothness": weights.smoothness * torch.exp(-2 * tally.change / num_changes),
        "lqr": -weights.lqr * torch.tanh(tally.cost / 200),
        "constraints": -(weights.constraints * violations).clamp(max=weights.constraints_cap),
        "validity": weights.validity * (share_inside - 0.5),
    }


def punishment_rewards(tally: Tally) -> dict[str, Tensor]:
    """The components [N] of the punishment reward of valid text; malformed text can beat it."""
    return {
        "cost": -tally.cost / 10,
        "success": 25.0 * (tally.final < 0.1).double() + 25.0 * (tally.final < 0.05).double(),
        "constraints": -10 * (tally.num_excessive + tally.num_outside),
    }


def breakdown_line(rewards: Rewards, row: int) -> str:
    """One row on one line: `REWARD BREAKDOWN: baseline=50.0, progress=18.5, ... -> TOTAL=99.5`."""
    parts = [f"{name}={value[row].item():z.1f}" for name, value in rewards.components.items()]
    return f"REWARD BREAKDOWN: {', '.join(parts)} -> TOTAL={rewards.total[row].item():z.1f}"
