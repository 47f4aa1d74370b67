"""Credit for each control: the policy gradient over every choice there was, not the drawn one only.

One reward for fifty controls is a noisy teacher; a simulator can say what any other choice would
have done. With u the controls that a row wrote, v the mean plan of the group's other well-formed
rows (0 if there are none), and h_k what precedes choice k, of T + 1 choices:

    W_k(a) = R(u_0 ... u_{k-1}, a, v_{k+1} ... v_{T-1})    k < T, a a control
    W_T(EOS) = R(u_0 ... u_{T-1})                          to stop, once all controls are written
    W_k(a) = R(malformed text)                             any other token; the last that counts
    w_k = W_k(u_k), what was chosen      e_k = sum_a q(a | h_k) W_k(a), the choice still open
    F_k = sum_{j>k} lambda^(j-k) (e_j - w_{j-1})                       `later_values`

    gradient = sum_k  sum_a W_k(a) grad q(a | h_k)  +  F_k grad log q(u_k | h_k)

In other words: W is a Q-value, of the plan that goes on with v, e the value of a prefix, e_j -
w_{j-1} a temporal difference, F a lambda-return of those to come. The first term is exact in the
choice (all actions: Sutton et al. 2001; expected policy gradients, 1706.05374). One choice is
varied and the rest held in the manner of COMA (1705.08926), but the later ones at v, not as the row
took them, and the value is simulated, not learned. The second term says how much better than v the
policy's later choices are, in expectation, from where the row went. With lambda = 1, F_k is R - w_k
minus terms w_j - e_j of mean 0, and the gradient that of E[R], exactly, for any W that depends on
nothing which the row chose at k or later and is the reward itself for the choice that ends a row.
It is so at the weights that sampled, for fixed supports and before the division by s and by the
number of tokens, as for any policy gradient here. A smaller lambda forgets what lies far behind k,
bias for variance, since W takes later controls from v, which does not react to u_k; lambda = 0 is
the first term alone. (Q(lambda) and Retrace, 1606.02647, sum the same residuals with
lambda^(j-k-1).)

Values age. After an optimizer step the other controls of a row would no longer be those it was
simulated with, and since all controls of a plan are told the same, they correct one error fifty
times. So before every optimizer step but the first of a rollout W is simulated again, at plans in
which each control has moved as far as its mean has moved since (`Plans.moved`); F stays as it was:

    u_k + E_q a - E_old a,  v_k + E_q a - E_old a    means at h_k, of now and of when it was sampled

N rows = P groups of G   T horizon   C completion length   V vocabulary   K columns of the values
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Annotated

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.lqr import QuadraticCost, state_cost
from minigrpo.reward import RewardFunction, Tally, distance_from_rest, tally_of
from minigrpo.shapes import check_record, check_shapes

# W_k is simulated at v_k plus these shares of the control bound, 0 among them, and drawn linearly
# between; then stored on a grid over the control range, where it is drawn linearly again. Finer
# ones cost more than they gain (docs/tiny_model.md, "How finely values are known").
OFFSETS = (-2.0, -0.4, -0.1, -0.03, 0.0, 0.03, 0.1, 0.4, 2.0)
NUM_NODES = 61
# Of the basis: nodes, EOS, any other word, and zeros: a product of q and the basis is quicker with
# a multiple of 16 (docs/speed.md).
NUM_COLUMNS = 16 * math.ceil((NUM_NODES + 2) / 16)


@dataclass(frozen=True)
class Plans:
    """What choices are simulated with: the controls before a choice, and those after it."""

    initial_states: Annotated[Tensor, "N 2"]  # float64
    own: Annotated[Tensor, "N T"]  # float64, m/s^2, as written; 0 for words and what is missing
    others: Annotated[Tensor, "N T"]  # float64, the mean plan of the group's other well-formed rows
    num_written: Annotated[Tensor, "N"]  # int64, tokens that keep the format, T + 1: all do

    def __post_init__(self) -> None:
        check_record(self)

    def moved(self, rows: Tensor, shift: Tensor, bound: Tensor) -> Plans:
        """Those of some rows [M], each control moved by shift [M, T], m/s^2, within the bound."""
        own, others = ((p[rows] + shift).clamp(-bound, bound) for p in (self.own, self.others))
        return Plans(self.initial_states[rows], own, others, self.num_written[rows])


@dataclass(frozen=True)
class ChoiceValues:
    """What each token would have been worth at each position of each row.

    W_k(a) = level[n, k] + values[n, k] . basis[a]. The level is W_k(v_k), and R(u) at EOS; without
    it values are a few points, which products of low precision don't spoil. Columns of the basis:
    NUM_NODES nodes of the control, EOS, all other words, zeros. All 0 after the end of a row.
    """

    values: Annotated[Tensor, "N C K"]  # float32
    level: Annotated[Tensor, "N C"]  # float64
    basis: Annotated[Tensor, "V K"]  # float32
    grid: Tensor  # [NUM_NODES] float32, the nodes, m/s^2
    plans: Plans
    simulator: ChoiceSimulator  # makes those of plans that moved

    def __post_init__(self) -> None:
        check_record(self)

    def mean_offset(self, mass: Tensor, tokens: Tensor) -> Tensor:
        """E_q a - u_k of the numbers among the choices: mass [M, C, K], tokens [M, C] -> [M, C].

        By the distance of each node to what was written, so that rounding of the mass costs little.
        """
        nodes = len(self.grid)
        # No product of matrices, which autocast would round; 0 for words
        written = (self.basis[:, :nodes] * self.grid).sum(dim=-1)[tokens]  # [M, C]
        distance = self.grid - rearrange(written, "m c -> m c 1")
        # bfloat16 would be added up in float32 under CUDA's autocast, and nowhere else.
        on_numbers = mass[..., :nodes].to(torch.promote_types(mass.dtype, self.grid.dtype))
        return (on_numbers * distance).sum(dim=-1) / on_numbers.sum(dim=-1).clamp(min=1e-6)

    def of_tokens(self, tokens: Tensor) -> Tensor:
        """values . basis of one token a position: [N, C] -> [N, C]."""
        size = rows_at_once(tokens.is_cuda)  # not three tables [N, C, K] at once
        parts = zip(torch.split(self.values, size), torch.split(tokens, size), strict=True)
        return torch.cat([(values * self.basis[some]).sum(dim=-1) for values, some in parts])


@dataclass(frozen=True)
class ChoiceSimulator:
    """Makes `ChoiceValues` of plans: all that these depend on but the plans."""

    token_values: Annotated[Tensor, "V"]  # float64, m/s^2, what a token stands for; NaN: a word
    eos: int
    plant: DoubleIntegrator
    cost: QuadraticCost
    reward: RewardFunction

    def __post_init__(self) -> None:
        check_record(self)

    def plans_of(self, tokens: Tensor, initial_states: Tensor, group_size: int) -> Plans:
        """The plans of completions [N, C] from initial_states [N, 2]; one token a control."""
        horizon = self.plant.horizon
        written = num_written(tokens, self.token_values, self.eos, horizon)
        controls = self.token_values[tokens[:, :horizon]].nan_to_num(0.0)
        own = F.pad(controls, (0, horizon - controls.shape[1]))  # [N, T]
        return Plans(initial_states, own, others_plan(own, written > horizon, group_size), written)

    def values_of(self, plans: Plans, length: int) -> ChoiceValues:
        """Simulate every choice at the first `length` tokens of the plans."""
        horizon, bound = self.plant.horizon, self.plant.control_bound
        device, num_rows = plans.own.device, len(plans.own)
        flown = self.plant.simulate(plans.initial_states, plans.own)
        valid = torch.ones(num_rows, dtype=torch.bool, device=device)
        whole = tally_of(plans.own, flown, self.plant, self.cost)
        malformed = rearrange(self.reward(whole, ~valid).total, "n -> n 1")
        grid = torch.linspace(-bound, bound, NUM_NODES, dtype=torch.float64, device=device)
        offsets = bound * _kept_on(device, OFFSETS)
        width = max(length, horizon + 1)
        values = torch.zeros(num_rows, width, NUM_COLUMNS, device=device)
        level = plans.own.new_zeros(num_rows, width)
        every_row = torch.arange(num_rows, device=device)
        for rows in torch.split(every_row, rows_at_once(flown.states.is_cuda)):
            nodes = (rearrange(plans.others[rows], "n t -> n t 1") + offsets).clamp(-bound, bound)
            own = flown.states[rows], flown.controls[rows]
            tally = choice_tally(*own, plans.others[rows], nodes, self.plant, self.cost)
            worths = self.reward(tally, torch.ones_like(tally.final, dtype=torch.bool)).total
            worths = rearrange(worths, "(t a n) -> n t a", t=horizon, a=len(offsets))
            level[rows, :horizon] = worths[:, :, OFFSETS.index(0.0)]
            worths = worths - rearrange(level[rows, :horizon], "n t -> n t 1")
            on_grid = interpolated(nodes.float(), worths.float(), grid.float())
            values[rows, :horizon, :NUM_NODES] = on_grid
        level[:, horizon] = self.reward(whole, valid).total
        eos_column, word_column = NUM_NODES, NUM_NODES + 1
        of_malformed = rearrange(malformed - level, "n c -> n c 1").float()
        values[..., eos_column : word_column + 1] = of_malformed
        values[:, horizon, :NUM_NODES] = of_malformed[:, horizon]  # one control too many
        values[:, horizon, eos_column] = 0.0
        last = rearrange(plans.num_written.clamp(max=horizon), "n -> n 1")
        is_over = torch.arange(width, device=device) > last
        values[is_over], level[is_over] = 0.0, 0.0
        basis = token_basis(self.token_values, grid, self.eos)
        return ChoiceValues(values[:, :length], level[:, :length], basis, grid.float(), plans, self)


@dataclass(frozen=True)
class ChoiceCredit:
    """What an update reads of a rollout's choices."""

    choices: ChoiceValues
    unit: Annotated[Tensor, "N"]  # float32, `grpo.advantage_scale` of the row's group
    mean_offsets: Annotated[Tensor, "N C"]  # `ChoiceValues.mean_offset` of the policy that sampled

    def __post_init__(self) -> None:
        check_record(self, values=(self.choices.values, "N C K"))

    def expected_values(
        self, rows: Tensor, mass: Tensor, tokens: Tensor, mask: Tensor, is_simulated_again: bool
    ) -> Tensor:
        """sum_a q(a) (W(a) - level), in units of the advantages: mass [M, C, K] -> [M, C].

        The level, equal for all a, has no gradient. rows [M]; tokens and mask [M, C] are theirs.
        Simulated again, W is that of plans whose controls have moved as their means have.
        """
        choices, values = self.choices, self.choices.values[rows]
        if is_simulated_again:
            shift = choices.mean_offset(mass.detach(), tokens) - self.mean_offsets[rows]
            shift = torch.where(mask, shift, 0.0)
            horizon, length = choices.plans.own.shape[1], values.shape[1]
            shift = F.pad(shift, (0, horizon - length))  # cut, where completions are longer
            moved = choices.plans.moved(rows, shift, bound=choices.grid[-1])
            values = choices.simulator.values_of(moved, length).values
        return (mass * values).sum(dim=-1) * rearrange(self.unit[rows], "n -> n 1")


def num_written(tokens: Tensor, token_values: Tensor, eos: int, horizon: int) -> Tensor:
    """Tokens of each row that keep the format, T controls and EOS: [N, C] -> [N], 0 to T + 1."""
    places = torch.arange(tokens.shape[1], device=tokens.device)
    is_number = ~token_values.isnan()[tokens]
    fits = torch.where(places < horizon, is_number, tokens == eos)[:, : horizon + 1]
    return fits.long().cumprod(dim=1).sum(dim=1)


def others_plan(controls: Tensor, is_whole: Tensor, group_size: int) -> Tensor:
    """Mean plan of the group's other well-formed rows, 0 if there is none: [N, T] -> [N, T]."""
    kept = rearrange(is_whole.to(controls.dtype), "(p g) -> p g 1", g=group_size)
    plans = rearrange(controls, "(p g) t -> p g t", g=group_size) * kept
    total, count = (reduce(x, "p g t -> p 1 t", "sum") for x in (plans, kept))
    return rearrange((total - plans) / (count - kept).clamp(min=1), "p g t -> (p g) t")


@functools.cache
def _kept_on(device: torch.device, numbers: tuple[float, ...]) -> Tensor:
    """Float64, copied there once: for a copy the host waits for all that a GPU has yet to do."""
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def rows_at_once(is_on_cuda: bool) -> int:
    """Rows whose choices are simulated together: as many as fit into a CPU's cache."""
    return 1024 if is_on_cuda else 128


def choice_tally(
    states: Tensor,
    controls: Tensor,
    others: Tensor,
    nodes: Tensor,
    plant: DoubleIntegrator,
    cost: QuadraticCost,
) -> Tally:
    """Of own controls before k, one of A nodes at k, the others' plan after it: all k [T A n].

    states [n, T+1, 2] and controls [n, T] of the own plan, others [n, T], nodes [n, T, A]. Up to k
    a plan is its row's own, so those sums are made once; from there the plans of all k and nodes
    fly together, each joining at its k, so that half as many steps are made. In float32, for half
    the time: the error is 1e-4 of a reward point.
    """
    states = rearrange(states.float(), "n t c -> t c n").contiguous()
    own, rest = (rearrange(plan.float(), "n t -> t n").contiguous() for plan in (controls, others))
    nodes = rearrange(nodes.float(), "n t a -> t a n").contiguous()
    horizon, last = plant.horizon, plant.horizon - 1
    # Of the states after k: those of plan k stand in row k, which is reached at step k.
    position, velocity, distance, state_costs, outside = (torch.zeros_like(nodes) for _ in range(5))
    for t in range(horizon):
        position[t], velocity[t] = rearrange(states[t], "c n -> c 1 n")
        for rows, control in ((slice(0, t), rest[t]), (slice(t, t + 1), nodes[t])):
            now = position[rows], velocity[rows]
            plant.advance(now, control, now)
        now = position[: t + 1], velocity[: t + 1]
        distance[: t + 1] += distance_from_rest(*now)
        state_costs[: t + 1] += (cost.terminal if t == last else 1.0) * state_cost(*now, cost)
        outside[: t + 1] += plant.leaves_bounds_(*(part.abs() for part in now))

    def up_to_k(of_states: Tensor) -> Tensor:
        """Sum over the own states 0 to k: [T+1, n] -> [T, 1, n]."""
        return rearrange(of_states[:-1].cumsum(dim=0), "t n -> t 1 n")

    def around_k(before: Tensor, at: Tensor, after: Tensor) -> Tensor:
        """Sum of `before` over the steps before k, `at` k, `after` over those after it."""
        past = before.cumsum(dim=0) - before
        future = after.sum(dim=0) - after.cumsum(dim=0)
        return at + rearrange(past + future, "t n -> t 1 n")

    own_distances = distance_from_rest(states[:, 0], states[:, 1])
    own_outside = plant.leaves_bounds_(states[:, 0].abs(), states[:, 1].abs())
    changes = torch.zeros_like(nodes)  # into the node and out of it
    changes[1:] += (nodes[1:] - rearrange(own[:-1], "t n -> t 1 n")).abs()
    changes[:-1] += (rearrange(rest[1:], "t n -> t 1 n") - nodes[:-1]).abs()
    own_changes, rest_changes = (plan.diff(dim=0, prepend=plan[:1]).abs() for plan in (own, rest))
    changes[:-1] -= rearrange(rest_changes[1:], "t n -> t 1 n")  # from v_k, which the node replaced
    sums = {
        "initial": own_distances[0].expand_as(nodes),
        "final": distance_from_rest(position, velocity),
        "distance": distance + up_to_k(own_distances),
        "effort": around_k(own.abs(), nodes.abs(), rest.abs()),
        "change": around_k(own_changes, changes, rest_changes),
        "cost": state_costs
        + up_to_k(state_cost(states[:, 0], states[:, 1], cost))
        + cost.control * around_k(own.square(), nodes.square(), rest.square()),
        "num_outside": outside + up_to_k(own_outside) - own_outside[0],
        "starts_outside": own_outside[0].expand_as(nodes) > 0,
        "num_excessive": torch.zeros_like(nodes),  # no token stands for a control out of bounds
    }
    return Tally(**{name: rearrange(value, "t a n -> (t a n)") for name, value in sums.items()})


def interpolated(nodes: Tensor, values: Tensor, at: Tensor) -> Tensor:
    """Linear between values [..., A] at ascending nodes [..., A], constant beyond: [..., K].

    Values of equal nodes are equal. The sum over the pieces of each one's slope times the part of
    it that lies below: two thirds of the time of a search for the piece of each of K numbers.
    """
    gaps = nodes.diff(dim=-1)
    slopes = values.diff(dim=-1) / gaps.clamp(min=1e-9)
    found = values[..., :1].expand(*values.shape[:-1], len(at)).clone()
    for piece in range(nodes.shape[-1] - 1):
        low, gap, slope = (part[..., piece : piece + 1] for part in (nodes, gaps, slopes))
        found.addcmul_((at - low).clamp_(min=0).minimum(gap), slope)
    return found


def token_basis(token_values: Tensor, grid: Tensor, eos: int) -> Tensor:
    """Weights of the two nodes that a token's number lies between, of EOS, of a word: [V, K].

    Zeros fill it up to a multiple of 16 columns.
    """
    distance = (rearrange(token_values, "v -> v 1") - grid).abs() / (grid[1] - grid[0])
    hats = (1 - distance).clamp(min=0).nan_to_num(0.0).float()
    is_eos = torch.arange(len(token_values), device=token_values.device) == eos
    is_word = token_values.isnan() & ~is_eos
    basis = torch.cat([hats, torch.stack([is_eos, is_word], dim=1).float()], dim=1)
    return F.pad(basis, (0, -basis.shape[1] % 16))


def later_values(
    choices: ChoiceValues, tokens: Tensor, expected: Tensor, credit_lambda: float
) -> Tensor:
    """F_k = sum_{j>k} lambda^(j-k) (e_j - w_{j-1}): later choices of the policy, beyond v.

    tokens [N, C]; expected [N, C], the mean of values . basis under q, so e is level + expected;
    -> [N, C] float64. j ends at the choice that broke the format; after it F is 0. Nothing is
    subtracted: the mean over the group's other rows, whose values see this row's plan, would depend
    on what it chose.
    """
    sizes = check_shapes(tokens=(tokens, "N C"), expected=(expected, "N C"))
    place = torch.arange(sizes["C"], device=tokens.device)
    last = choices.plans.num_written.clamp(max=choices.plans.own.shape[1])  # EOS of a whole row
    exists = place <= rearrange(last, "n -> n 1")  # [N, C]
    chosen = choices.level + choices.of_tokens(tokens)
    change = torch.zeros_like(chosen)
    change[:, 1:] = (choices.level + expected)[:, 1:] - chosen[:, :-1]
    change = torch.where(exists, change, 0.0)
    later = torch.zeros_like(change)
    for k in range(sizes["C"] - 2, -1, -1):
        later[:, k] = credit_lambda * (change[:, k + 1] + later[:, k + 1])
    return torch.where(exists, later, 0.0)
