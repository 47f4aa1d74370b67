"""Policies against LQR on fixed starts: reward, final error, cost, bootstrap intervals over starts.

greedy, sampled   one text for each start, all its controls applied open loop
best_of           of several sampled plans the one with the highest reward: what selection can get
mpc               receding horizon: the model plans anew at each step, and the first control acts

Every policy is measured by the same simulator, the same cost and the progress reward with its
default weights, whatever it was trained on. Invalid text has reward 0 and coasts: its cost and
final error are those of zero controls, and no start is dropped.
    cost_ratio = sum of the policy's costs / sum of LQR's costs     (LQR's is 0 at the origin)
    gap_closed = (mean reward of a - that of b) / (LQR's - that of b)
Intervals are percentiles of RESAMPLES bootstrap draws of the starts. Two policies are compared
start by start (paired): what a start is worth cancels, which narrows the interval.

K starts, T horizon. Of several ranks each writes the plans of its share of the starts, and all get
all results; the rest is arithmetic that every rank repeats.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from minigrpo.config import Settings
from minigrpo.data import Task, keyed_generator, make_prompts, token_uniforms
from minigrpo.distributed import gather_rows, rank, world_size
from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.lqr import lqr_controls
from minigrpo.policy import ActingPolicy
from minigrpo.prompts import ParsedControls
from minigrpo.reward import Rewards, RewardWeights, tally_of, tally_rewards
from minigrpo.rollout import rows_of, write_plans
from minigrpo.shapes import check_record
from minigrpo.transformer import Transformer

RESAMPLES = 2000
UNTRUNCATED = ActingPolicy(temperature=1.0, top_p=1.0)
MODES = ("greedy", "sampled", "best_of", "mpc")
Summary = dict[str, float | list[float] | None]  # name_ci95 holds the two ends of an interval
COLUMNS = (  # of the table: key, title, format
    ("num_cases", "cases", "d"),
    ("reward_mean", "reward", ".2f"),
    ("reward_ci95", "95 % interval", ".2f"),
    ("final_error_mean", "error mean", ".4f"),
    ("final_error_median", "median", ".4f"),
    ("final_error_p95", "p95", ".4f"),
    ("frac_final_error_below_0.1", "below 0.1", ".1%"),
    ("cost_ratio", "cost ratio", ".4f"),
    ("frac_valid", "valid", ".1%"),
    ("num_violations_mean", "violations", ".2f"),
)
DIFFERENCES = (
    ("reward_difference", "reward", "+.2f"),
    ("gap_closed", "gap to LQR closed", ".1%"),
    ("final_error_difference", "final error", "+.4f"),
    ("cost_ratio_difference", "cost ratio", "+.4f"),
)


@dataclass(frozen=True)
class CaseResults:
    """What one policy did from each of K starts."""

    rewards: Rewards  # components and total [K], progress reward, default weights
    final_error: Annotated[Tensor, "K"]  # |x_T|, m and m/s together
    cost: Annotated[Tensor, "K"]
    num_texts: int  # written from each start: 1 open loop, T for mpc
    num_invalid_texts: Annotated[Tensor, "K"]  # int64
    num_violations: Annotated[Tensor, "K"]  # int64, states k = 1..T out of bounds
    states: Annotated[Tensor, "K T+1 D"]  # D = 2: m, m/s
    controls: Annotated[Tensor, "K T"]  # m/s^2, as applied

    def __post_init__(self) -> None:
        check_record(self, total=(self.rewards.total, "K"))

    @property
    def is_valid(self) -> Tensor:
        """[K] bool, every text of this start was valid."""
        return self.num_invalid_texts == 0


Results = dict[str, dict[str, CaseResults]]  # by policy and mode; LQR is greedy only


@dataclass(frozen=True)
class Report:
    """What evaluation.json holds; null stands for what did not run."""

    policies: dict[str, dict[str, Summary | None]]
    comparison: dict[str, Summary | None]  # by mode
    num_cases: int


def lqr_results(starts: Tensor, task: Task, decimals: int | None = None) -> CaseResults:
    """Saturated LQR from starts [K, 2]; `decimals` rounds each control inside the loop."""
    controls = lqr_controls(starts.double(), task.plant, task.cost, decimals)
    return _measure(starts, _all_valid(controls), task)


def evaluate_policy(
    model: Transformer,
    starts: Tensor,
    task: Task,
    acting: ActingPolicy | None,
    seed: int,
    attempt: int = 0,
    rows_per_batch: int = Settings.rows_per_batch,
) -> CaseResults:
    """One plan for each start [K, 2], applied open loop; `acting` None is greedy, without a seed.

    The draws are keyed by (seed, place in starts): two models meet equal uniforms, and a longer
    list of starts changes no case of a shorter one. `attempt` 0, 1, ... takes the next draws of the
    same key, so that those of two seeds have nothing in common.
    """
    uniforms = None
    if acting:
        tries, length = attempt + 1, task.max_completion_length
        places = torch.arange(len(starts))
        group = token_uniforms(seed, places, tries, length, "evaluation")  # [K * tries, C]
        uniforms = group[attempt::tries]
    parsed = _plan(model, starts, task, acting or UNTRUNCATED, uniforms, rows_per_batch)
    return _measure(starts, parsed, task)


def best_of(tries: Sequence[CaseResults]) -> CaseResults:
    """For each start the try with the highest reward, the first of equals; the simulator chose."""
    chosen = torch.stack([ran.rewards.total for ran in tries]).argmax(dim=0)  # [K]

    def pick(of_tries: Iterable[Tensor]) -> Tensor:
        return torch.stack([*of_tries])[chosen, torch.arange(len(chosen))]

    parts = [ran.rewards.components for ran in tries]
    components = {name: pick(part[name] for part in parts) for name in parts[0]}
    rewards = Rewards(components, pick(ran.rewards.total for ran in tries))
    names = ("final_error", "cost", "num_invalid_texts", "num_violations", "states", "controls")
    columns = {name: pick(getattr(ran, name) for ran in tries) for name in names}
    return CaseResults(rewards, num_texts=1, **columns)


def receding_horizon(
    model: Transformer,
    starts: Tensor,
    task: Task,
    progress: Callable[[range], Iterable[int]] = iter,
    rows_per_batch: int = Settings.rows_per_batch,
) -> CaseResults:
    """Greedy MPC from starts [K, 2]: at each of the T steps plan anew, apply one control.

    A prompt can only state numbers on the grid of the starts, so the model sees the state rounded
    to it (and clamped to +-control_bound, the largest number the number tokenizer has); the plant
    keeps the true state. An invalid text applies zero control at its step and is counted; the
    reward is that of the trajectory flown. Equal prompts are decoded once; on a GPU each is, for
    another number of rows would have its kernels launched one by one or recorded anew.
    """
    plant, bound = task.plant, task.plant.control_bound
    state = rearrange(starts.double(), "k c -> c k")  # [2, K]
    written, invalid = [], []
    for _ in progress(range(plant.horizon)):
        seen = state.clamp(-bound, bound).round(decimals=plant.start_decimals)
        distinct, place = rearrange(seen, "c k -> k c"), torch.arange(len(starts))
        if not model.embed.weight.is_cuda:
            distinct, place = torch.unique(distinct, dim=0, return_inverse=True)
        parsed = _plan(model, distinct, task, UNTRUNCATED, None, rows_per_batch)
        written.append(parsed.controls[place, 0])  # [K], zero where invalid
        invalid.append(~parsed.is_valid[place])
        state = plant.step(state, written[-1].clamp(-bound, bound))
    controls = rearrange(torch.stack(written), "t k -> k t")
    flown = _measure(starts, _all_valid(controls), task)
    num_invalid = torch.stack(invalid).sum(dim=0)
    return replace(flown, num_texts=plant.horizon, num_invalid_texts=num_invalid)


def _plan(
    model: Transformer,
    starts: Tensor,
    task: Task,
    acting: ActingPolicy,
    uniforms: Tensor | None,
    rows_per_batch: int,
) -> ParsedControls:
    """One plan for each start [K, 2], of which this rank writes every world-th.

    `uniforms` [K, C] decide the tokens; None is greedy.
    """
    # Where ranks outnumber starts, those without one repeat the first.
    share = torch.arange(rank() % len(starts), len(starts), world_size())
    prompts = make_prompts(starts[share].double(), share, task)
    drawn = rows_of(uniforms, share)
    done, _, written = write_plans(model, prompts, 1, task, acting, drawn, rows_per_batch)
    if rank() == 0 and bool(done.is_capped.any()):
        cut = done.is_capped[done.mask].double().mean()
        print(f"WARNING: support_size cut {cut:.0%} of the nuclei; a larger one is slower")
    columns = [share, written.controls, written.is_valid]
    places, *values = (torch.cat(parts) for parts in zip(*gather_rows(columns), strict=True))
    order = torch.empty(len(starts), dtype=torch.int64)
    order[places] = torch.arange(len(places))
    return ParsedControls(*(value[order] for value in values))


def _all_valid(controls: Tensor) -> ParsedControls:
    """Controls [K, T] that were really applied, whoever chose them."""
    return ParsedControls(controls, torch.ones(len(controls), dtype=torch.bool))


def _measure(starts: Tensor, parsed: ParsedControls, task: Task) -> CaseResults:
    """Fly the controls from starts [K, 2], each of one text."""
    flown = task.plant.simulate(starts.double(), parsed.controls)
    tally = tally_of(parsed.controls, flown, task.plant, task.cost)
    horizon, weights = task.plant.horizon, RewardWeights()
    return CaseResults(
        rewards=tally_rewards(tally, parsed.is_valid, "progress", horizon, weights),
        final_error=flown.states[:, -1].norm(dim=1),
        cost=tally.cost,
        num_texts=1,
        num_invalid_texts=(~parsed.is_valid).long(),
        num_violations=flown.num_violations,
        states=flown.states,
        controls=flown.controls,
    )


def summarise(results: CaseResults, lqr: CaseResults, seed: int = 0) -> Summary:
    """The numbers of one row of the table; `lqr` are LQR's results from the same starts."""
    _check_same_starts(results, lqr)
    reward, error = results.rewards.total, results.final_error
    return {
        "num_cases": len(reward),
        "reward_mean": float(reward.mean()),
        "reward_ci95": _interval(_resampled_means(seed, reward)[0]),
        "final_error_mean": float(error.mean()),
        "final_error_median": float(error.quantile(0.5)),
        "final_error_p95": float(error.quantile(0.95)),
        "frac_final_error_below_0.1": float((error < 0.1).double().mean()),
        "frac_valid": 1 - float(results.num_invalid_texts.double().mean()) / results.num_texts,
        "cost_ratio": _ratio(results.cost, lqr.cost),
        "num_violations_mean": float(results.num_violations.double().mean()),
        "frac_violating": float((results.num_violations > 0).double().mean()),
        "num_invalid_texts": int(results.num_invalid_texts.sum()),
        **{f"reward_{name}": float(v.mean()) for name, v in results.rewards.components.items()},
    }


def paired_difference(a: CaseResults, b: CaseResults, lqr: CaseResults, seed: int = 0) -> Summary:
    """a minus b start by start, paired intervals; `gap_closed` is None if b has no gap to LQR."""
    _check_same_starts(a, lqr)
    _check_same_starts(b, lqr)
    gain, gap = a.rewards.total - b.rewards.total, lqr.rewards.total - b.rewards.total
    columns = (gain, gap, a.final_error - b.final_error, a.cost - b.cost, lqr.cost)
    gains, gaps, errors, costs, lqr_costs = _resampled_means(seed, *columns)
    has_gap = np.percentile(gaps, 2.5) > 0
    with np.errstate(divide="ignore", invalid="ignore"):  # _interval answers None
        shares, cost_ratios = gains / gaps, costs / lqr_costs
    return {
        "reward_difference": float(gain.mean()),
        "reward_difference_ci95": _interval(gains),
        "gap_closed": _ratio(gain, gap) if has_gap else None,
        "gap_closed_ci95": _interval(shares) if has_gap else None,
        "final_error_difference": float(columns[2].mean()),
        "final_error_difference_ci95": _interval(errors),
        "cost_ratio_difference": _ratio(columns[3], lqr.cost),
        "cost_ratio_difference_ci95": _interval(cost_ratios),
    }


def validation_metrics(
    model: Transformer,
    starts: Tensor,
    task: Task,
    seed: int,
    rows_per_batch: int = Settings.rows_per_batch,
) -> dict[str, float]:
    """The eval/ metrics of training: a greedy and a sampled plan from each start.

    Sampled at temperature 1 from the whole vocabulary, whichever policy acts in training.
    """
    expert = lqr_results(starts, task)
    greedy, sampled = (
        evaluate_policy(model, starts, task, acting, seed, rows_per_batch=rows_per_batch)
        for acting in (None, UNTRUNCATED)
    )
    return {
        "eval/greedy_reward": float(greedy.rewards.total.mean()),
        "eval/sampled_reward": float(sampled.rewards.total.mean()),
        "eval/lqr_reward": float(expert.rewards.total.mean()),
        "eval/final_error": float(greedy.final_error.mean()),
        "eval/frac_valid": float(greedy.is_valid.double().mean()),
        "eval/sampled_frac_valid": float(sampled.is_valid.double().mean()),
        "eval/cost_ratio": float(greedy.cost.sum() / expert.cost.sum()),
    }


def _ratio(values: Tensor, unit: Tensor) -> float | None:
    """Ratio of sums; None for nothing to divide by, LQR's cost if every start is the origin."""
    return float(values.sum() / unit.sum()) if bool(unit.sum() > 0) else None


def _check_same_starts(results: CaseResults, lqr: CaseResults) -> None:
    if not torch.equal(results.states[:, 0], lqr.states[:, 0]):
        raise ValueError("results must come from LQR's starts, in the same order, got others")


def _resampled_means(seed: int, *columns: Tensor) -> list[np.ndarray]:
    """Means [RESAMPLES] of columns [K] over starts drawn with replacement, alike for all."""
    num_starts = len(columns[0])
    chosen = keyed_generator(seed, "bootstrap").integers(num_starts, size=(RESAMPLES, num_starts))
    return [column.numpy()[chosen].mean(axis=1) for column in columns]


def _interval(means: np.ndarray) -> list[float] | None:
    """The middle 95 %; None if some resample had nothing to divide by."""
    if not np.isfinite(means).all():
        return None
    return [float(bound) for bound in np.percentile(means, [2.5, 97.5])]


def make_report(results: Results, task: Task, seed: int) -> Report:
    """Summaries of all that ran, and the last model minus the one before it, where both ran."""
    pair = _models(results)[-2:]

    def summary(name: str, mode: str) -> Summary | None:
        ran = results[name].get(mode)
        return None if ran is None else summarise(ran, _expert(ran, task), seed)

    def difference(mode: str) -> Summary | None:
        ran = [results[name][mode] for name in pair if mode in results[name]]
        if len(ran) < 2:
            return None
        b, a = ran
        return paired_difference(a, b, _expert(a, task), seed)

    return Report(
        policies={name: {mode: summary(name, mode) for mode in MODES} for name in results},
        comparison={mode: difference(mode) for mode in MODES},
        num_cases=max(len(ran.cost) for modes in results.values() for ran in modes.values()),
    )


def _models(names: Iterable[str]) -> list[str]:
    """The policies that are not LQR, a baseline first."""
    return [name for name in names if not name.startswith("lqr")]


def _expert(ran: CaseResults, task: Task) -> CaseResults:
    return lqr_results(ran.states[:, 0], task)


def table(report: Report) -> str:
    """The report as text: a row for each policy and mode, then the paired differences."""
    rows = [["policy", "mode", *(title for _, title, _ in COLUMNS)]]
    for name, modes in report.policies.items():
        for mode, summary in modes.items():
            if summary is not None:
                cells = [_cell(summary[key], form) for key, _, form in COLUMNS]
                rows.append([name, mode, *cells])
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([*(c.ljust(w) for c, w in cells[:2]), *(c.rjust(w) for c, w in cells[2:])])
        for cells in ([*zip(row, widths, strict=True)] for row in rows)
    ]
    for mode, difference in report.comparison.items():
        if difference is not None:
            parts = [
                f"{title} {_cell(difference[key], form)} {_cell(difference[f'{key}_ci95'], form)}"
                for key, title, form in DIFFERENCES
            ]
            pair = " - ".join(reversed(_models(report.policies)))
            lines.append(f"{pair}, {mode}: {', '.join(parts)}")
    return "\n".join(lines)


def _cell(value: float | list[float] | None, form: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return f"[{', '.join(_cell(bound, form) for bound in value)}]"
    return f"{value:{form}}"


def cases_csv(results: Results) -> str:
    """One line a start, policy and mode: what every number of the report can be computed from."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = ["reward", *(f"reward_{part}" for part in results["lqr"]["greedy"].rewards.components)]
    names += ["final_error", "cost", "is_valid", "num_violations", "num_invalid_texts"]
    writer.writerow(("position", "velocity", "policy", "mode", *names))
    for name, modes in results.items():
        for mode, ran in modes.items():
            columns = [ran.rewards.total, *ran.rewards.components.values(), ran.final_error]
            columns += [ran.cost, ran.is_valid.long(), ran.num_violations, ran.num_invalid_texts]
            rows = zip(*(column.tolist() for column in columns), strict=True)
            for start, row in zip(ran.states[:, 0].tolist(), rows, strict=True):
                writer.writerow((*start, name, mode, *row))
    return file.getvalue()


def read_starts(path: Path, plant: DoubleIntegrator) -> Tensor:
    """The starts [K, 2] of a JSON file [[position, velocity], ...]; ValueError names the bad row.

    They lie on the plant's grid of starts, because the prompt states no more decimals than that.
    """
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            "initial_states must name a readable JSON file, a JSON list of [position, velocity], "
            f"got {path}: {error}"
        ) from error
    if not isinstance(rows, list) or len(rows) < 2:
        got = f"{len(rows)} row(s)" if isinstance(rows, list) else type(rows).__name__
        needed = "at least 2 rows [position, velocity]"
        raise ValueError(f"initial_states: {path} must list {needed}, got {got}")
    grid = set(map(tuple, plant.start_grid().tolist()))
    for place, row in enumerate(rows):
        is_pair = isinstance(row, list) and {type(value) for value in row} <= {int, float}
        if not (is_pair and tuple(row) in grid):
            raise ValueError(
                f"initial_states: row {place} of {path} must be two numbers within "
                f"+-{plant.start_bound:g} with at most {plant.start_decimals} decimals, "
                f"got {json.dumps(row)}"
            )
    return torch.tensor(rows, dtype=torch.float64)
