"""Policies against LQR on fixed starts: reward, final error, cost, bootstrap intervals over starts.

greedy, sampled   one text for each start, all its controls applied open loop
mpc               receding horizon: the model plans anew at each step, and the first control acts

Every policy is measured by the same simulator, the same cost and the progress reward with its
default weights, whatever it was trained on. Invalid text has reward 0 and coasts: its cost and
final error are those of zero controls, and no start is dropped.
    cost_ratio = sum of the policy's costs / sum of LQR's costs     (LQR's is 0 at the origin)
    gap_closed = (mean reward of a - that of b) / (LQR's - that of b)
Intervals are percentiles of RESAMPLES bootstrap draws of the starts. Two policies are compared
start by start (paired): what a start is worth cancels, which narrows the interval.

K starts, T horizon. Nothing here communicates: of several ranks each computes, and gets, the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from minigrpo.data import Task, keyed_generator, make_prompts, token_uniforms
from minigrpo.double_integrator import DoubleIntegrator, Trajectories
from minigrpo.lqr import lqr_controls, trajectory_cost
from minigrpo.policy import ActingPolicy
from minigrpo.prompts import ParsedControls
from minigrpo.reward import Rewards, RewardWeights, compute_rewards
from minigrpo.rollout import Experience, act
from minigrpo.shapes import check_shapes
from minigrpo.transformer import Transformer

RESAMPLES = 2000
GREEDY = ActingPolicy(
    temperature=1.0, top_p=1.0
)  # no truncation: the most probable token, no support stored
Summary = dict[str, float | list[float] | None]


@dataclass(frozen=True)
class CaseResults:
    """What one policy did from each of K starts."""

    rewards: Rewards  # components and total [K], progress reward, default weights
    final_error: Tensor  # [K] |x_T|, m and m/s together
    cost: Tensor  # [K]
    is_valid: Tensor  # [K] bool, all texts of this start were valid
    num_invalid_texts: Tensor  # [K] int64, at most 1 open loop, at most T for mpc
    num_violations: Tensor  # [K] int64, states k = 1..T out of bounds
    states: Tensor  # [K, T+1, 2] m, m/s
    controls: Tensor  # [K, T] m/s^2, as applied

    def __post_init__(self) -> None:
        check_shapes(
            total=(self.rewards.total, "K"),
            final_error=(self.final_error, "K"),
            cost=(self.cost, "K"),
            is_valid=(self.is_valid, "K"),
            num_invalid_texts=(self.num_invalid_texts, "K"),
            num_violations=(self.num_violations, "K"),
            controls=(self.controls, "K T"),
            states=(self.states, "K T+1 2"),
        )


def lqr_results(starts: Tensor, task: Task, decimals: int | None = None) -> CaseResults:
    """Saturated LQR from starts [K, 2]; `decimals` rounds each control inside the loop."""
    controls = lqr_controls(starts.double(), task.plant, task.cost, decimals)
    return _measure(starts, controls, torch.zeros(len(starts), dtype=torch.int64), task)


def evaluate_policy(
    model: Transformer,
    starts: Tensor,
    task: Task,
    acting: ActingPolicy | None,
    seed: int,
    rows_per_batch: int = 512,
) -> CaseResults:
    """One plan for each start [K, 2], applied open loop; `acting` None is greedy, without a seed.

    The draws are keyed by (seed, place in starts): two models meet equal uniforms, and a longer
    list of starts changes no case of a shorter one.
    """
    experience = _plan(model, starts, task, acting, seed, rows_per_batch)
    parsed, trajectories, rewards = experience.parsed, experience.trajectories, experience.rewards
    return _collect(trajectories, rewards, (~parsed.is_valid).long(), task)


def receding_horizon(
    model: Transformer,
    starts: Tensor,
    task: Task,
    rows_per_batch: int = 512,
    progress: Callable[[range], Iterable[int]] = iter,
) -> CaseResults:
    """Greedy MPC from starts [K, 2]: at each of the T steps plan anew, apply one control.

    A prompt can only state numbers on the grid of the starts, so the model sees the state rounded
    to it (and clamped to +-control_bound, the largest number the number tokenizer has); the plant
    keeps the true state. An invalid text applies zero control at its step and is counted; the
    reward is that of the trajectory flown. Equal prompts are decoded once.
    """
    plant = task.plant
    state = rearrange(starts.double(), "k c -> c k")  # [2, K]
    written, invalid = [], []
    for _ in progress(range(plant.horizon)):
        seen = state.clamp(-plant.control_bound, plant.control_bound).round(
            decimals=plant.start_decimals
        )
        distinct, place = torch.unique(rearrange(seen, "c k -> k c"), dim=0, return_inverse=True)
        parsed = _plan(model, distinct, task, None, 0, rows_per_batch).parsed
        written.append(parsed.controls[place, 0])  # [K], zero where invalid
        invalid.append(~parsed.is_valid[place])
        state = plant.step(state, written[-1].clamp(-plant.control_bound, plant.control_bound))
    num_invalid = torch.stack(invalid).sum(dim=0)
    return _measure(starts, rearrange(torch.stack(written), "t k -> k t"), num_invalid, task)


def _plan(
    model: Transformer,
    starts: Tensor,
    task: Task,
    acting: ActingPolicy | None,
    seed: int,
    rows: int,
) -> Experience:
    prompts = make_prompts(starts.double(), torch.arange(len(starts)), task)
    uniforms = None
    if acting is not None:
        uniforms = token_uniforms(
            seed, prompts.indices, 1, task.max_completion_length, "evaluation"
        )

    def reward(parsed: ParsedControls, trajectories: Trajectories) -> Rewards:
        return _reward(parsed, trajectories, task)

    return act(model, prompts, 1, task, acting or GREEDY, uniforms, reward, rows)


def _reward(parsed: ParsedControls, trajectories: Trajectories, task: Task) -> Rewards:
    return compute_rewards("progress", parsed, trajectories, task.plant, task.cost, RewardWeights())


def _measure(
    starts: Tensor, controls: Tensor, num_invalid_texts: Tensor, task: Task
) -> CaseResults:
    """Results of controls [K, T] that were really applied, whoever chose them."""
    applied = torch.ones(len(starts), dtype=torch.bool)
    parsed = ParsedControls(controls, applied, torch.full((len(starts),), task.plant.horizon))
    trajectories = task.plant.simulate(starts.double(), controls)
    return _collect(trajectories, _reward(parsed, trajectories, task), num_invalid_texts, task)


def _collect(
    flown: Trajectories, rewards: Rewards, num_invalid_texts: Tensor, task: Task
) -> CaseResults:
    return CaseResults(
        rewards=rewards,
        final_error=flown.states[:, -1].norm(dim=1),
        cost=trajectory_cost(flown, task.cost),
        is_valid=num_invalid_texts == 0,
        num_invalid_texts=num_invalid_texts,
        num_violations=flown.num_violations,
        states=flown.states,
        controls=flown.controls,
    )


def summarise(results: CaseResults, lqr: CaseResults, seed: int = 0) -> Summary:
    """The numbers of one row of the table; `lqr` are LQR's results from the same starts."""
    _check_same_starts(results, lqr)
    reward, error = results.rewards.total, results.final_error
    summary: Summary = {
        "reward_mean": float(reward.mean()),
        "reward_ci95": _interval(_resampled_means(seed, reward)[0]),
        "final_error_mean": float(error.mean()),
        "final_error_median": float(error.quantile(0.5)),
        "final_error_p95": float(error.quantile(0.95)),
        "frac_final_error_below_0.1": float((error < 0.1).double().mean()),
        "frac_valid": float(results.is_valid.double().mean()),
        "cost_ratio": float(results.cost.sum() / lqr.cost.sum()),
        "num_violations_mean": float(results.num_violations.double().mean()),
        "frac_violating": float((results.num_violations > 0).double().mean()),
        "num_invalid_texts": float(results.num_invalid_texts.sum()),
    }
    return summary | {
        f"reward_{name}": float(v.mean()) for name, v in results.rewards.components.items()
    }


def paired_difference(a: CaseResults, b: CaseResults, lqr: CaseResults, seed: int = 0) -> Summary:
    """a minus b start by start, paired intervals; `gap_closed` is None if b has no gap to LQR."""
    _check_same_starts(a, lqr)
    _check_same_starts(b, lqr)
    gain, gap = a.rewards.total - b.rewards.total, lqr.rewards.total - b.rewards.total
    columns = (gain, gap, a.final_error - b.final_error, a.cost - b.cost, lqr.cost)
    gains, gaps, errors, costs, lqr_costs = _resampled_means(seed, *columns)
    has_gap = np.percentile(gaps, 2.5) > 0
    return {
        "reward_difference": float(gain.mean()),
        "reward_difference_ci95": _interval(gains),
        "gap_closed": float(gain.mean() / gap.mean()) if has_gap else None,
        "gap_closed_ci95": _interval(gains / gaps) if has_gap else None,
        "final_error_difference": float(columns[2].mean()),
        "final_error_difference_ci95": _interval(errors),
        "cost_ratio_difference": float(columns[3].sum() / lqr.cost.sum()),
        "cost_ratio_difference_ci95": _interval(costs / lqr_costs),
    }


def _check_same_starts(results: CaseResults, lqr: CaseResults) -> None:
    if not torch.equal(results.states[:, 0], lqr.states[:, 0]):
        raise ValueError("results must come from LQR's starts, in the same order, got others")


def _resampled_means(seed: int, *columns: Tensor) -> list[np.ndarray]:
    """Means [RESAMPLES] of columns [K] over starts drawn with replacement, alike for all."""
    num_starts = len(columns[0])
    chosen = keyed_generator(seed, "bootstrap").integers(num_starts, size=(RESAMPLES, num_starts))
    return [column.numpy()[chosen].mean(axis=1) for column in columns]


def _interval(means: np.ndarray) -> list[float]:
    return [float(bound) for bound in np.percentile(means, [2.5, 97.5])]


def read_starts(path: Path, plant: DoubleIntegrator) -> Tensor:
    """The starts [K, 2] of a JSON file [[position, velocity], ...]; ValueError names the bad row.

    They lie on the plant's grid of starts, because the prompt states no more decimals than that.
    """
    try:
        rows = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(
            f"initial_states must name a readable JSON file, got {path}: {error.strerror}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"initial_states: {path} must be a JSON list of [position, velocity], got {error}"
        ) from error
    if not isinstance(rows, list) or len(rows) < 2:
        got = f"{len(rows)} row(s)" if isinstance(rows, list) else type(rows).__name__
        raise ValueError(
            f"initial_states: {path} must list at least 2 rows [position, velocity], got {got}"
        )
    for place, row in enumerate(rows):
        if not _is_start(row, plant):
            raise ValueError(
                f"initial_states: row {place} of {path} must be two numbers within "
                f"+-{plant.start_bound:g} with at most {plant.start_decimals} decimals, "
                f"got {json.dumps(row)}"
            )
    starts = torch.tensor(rows, dtype=torch.float64)
    if not bool(starts.any()):
        raise ValueError(
            f"initial_states: {path} must hold a start other than the origin, got none"
        )
    return starts


def _is_start(row: object, plant: DoubleIntegrator) -> bool:
    if not isinstance(row, list) or len(row) != 2:
        return False
    for value in row:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        if not abs(value) <= plant.start_bound or value != round(value, plant.start_decimals):
            return False
    return True
