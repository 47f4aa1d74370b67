"""Measures, intervals and receding horizon, against loops over floats and known distributions.

`Scripted` is a causal model whose next token is a written rule of all tokens before it, read from
the key-value cache; everything behind the logits (sampler, decoder, parser, plant) is the real one.
"""

import csv
import json
import math
import re
import shutil
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.linalg import solve_discrete_are
from tiny import untrained_checkpoint

import evaluate
import train_grpo
import train_sft
from minigrpo import rollout
from minigrpo.checkpoint import Manifest, publish_model
from minigrpo.data import make_task, split_starts
from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.evaluation import (
    MODES,
    CaseResults,
    Report,
    best_of,
    evaluate_policy,
    lqr_results,
    make_report,
    paired_difference,
    read_starts,
    receding_horizon,
    summarise,
    table,
    validation_metrics,
)
from minigrpo.lqr import QuadraticCost, lqr_controls
from minigrpo.policy import ActingPolicy
from minigrpo.prompts import Codec
from minigrpo.reward import Rewards
from minigrpo.sampling import sample_completions
from minigrpo.tokenizer import encode_completion, number_tokenizer
from minigrpo.transformer import Transformer, TransformerConfig

COST, CODEC = QuadraticCost(), Codec()
SHAPE = {"width": 2, "mlp_width": 1, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1}


def make(horizon=50, codec=CODEC, **plant):
    plant = DoubleIntegrator(horizon=horizon, **plant)
    return make_task(plant, COST, codec, number_tokenizer(plant, codec))


TASK = make()
SHORT = make(horizon=7)
STARTS = split_starts(TASK.plant).test


class Scripted(Transformer):
    """`rule` maps a start (position, velocity), as text has it, to equally likely texts."""

    def __init__(self, task, rule):
        vocabulary = task.tokenizer.get_vocab()
        super().__init__(TransformerConfig("llama", len(vocabulary), head_size=2, **SHAPE))
        self.rule, self.vocabulary = rule, vocabulary
        self.words = {index: token for token, index in vocabulary.items()}
        self.seen = set()

    def forward(self, tokens, mask, cache, output):
        assert mask is None  # all prompts have five words: nothing is padded
        ids = tokens.float()[:, None, :, None].expand(-1, 1, -1, 2)
        keys, _ = cache.append(0, ids, ids)
        cache.length += tokens.shape[1]
        history = keys[:, 0, : cache.length, 0].long().tolist()
        hidden = torch.full((len(history), tokens.shape[1], len(self.words)), -50.0)
        for row, sequence in enumerate(history):
            for token in self.next_tokens(sequence):
                hidden[row, -1, token] = 0.0
        return output(hidden, torch.eye(len(self.words)))

    def next_tokens(self, sequence):
        prompt = [self.words[token] for token in sequence[:5]]
        start = float(prompt[1]), float(prompt[3])
        self.seen.add(start)
        allowed = []
        for text in self.rule(start):
            plan = [self.vocabulary[word] for word in text.split()] + [self.vocabulary["<eos>"]]
            if len(sequence) - 5 < len(plan) and plan[: len(sequence) - 5] == sequence[5:]:
                allowed.append(plan[len(sequence) - 5])
        return allowed or [self.vocabulary["<eos>"]]


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def text_of(task, controls):
    ids = encode_completion(task.tokenizer, torch.as_tensor(controls, dtype=torch.float64), CODEC)
    return task.tokenizer.decode(ids[:-1])


def lqr_texts(task, starts, noise=0.0):
    """The plans of rounded LQR, with noise on each control, by start."""
    plans = lqr_controls(starts, task.plant, task.cost, decimals=2)
    plans = (
        plans + noise * torch.randn(plans.shape, generator=torch.Generator().manual_seed(1))
    ).clamp(-3, 3)
    return {tuple(s): [text_of(task, u)] for s, u in zip(starts.tolist(), plans, strict=True)}


def loop_cost(start, controls, dt=0.1):
    """Cost, final error and violations of one trajectory, in plain floats."""
    x, v = start
    cost = violations = 0.0
    for u in controls:
        cost += 10 * x * x + 10 * v * v + 0.1 * u * u
        x, v = x + dt * v + dt * dt / 2 * u, v + dt * u
        violations += max(abs(x), abs(v)) > 1 + 1e-6
    return cost + 50 * (x * x + v * v), math.hypot(x, v), violations


def results_of(reward, error=None, cost=None, starts=None, num_violations=None):
    """Results with given numbers; nobody flew them."""
    reward = torch.as_tensor(reward, dtype=torch.float64)
    states = torch.zeros(len(reward), 8, 2, dtype=torch.float64)
    states[:, 0] = STARTS[: len(reward)] if starts is None else starts
    ones, counts = torch.ones(len(reward), dtype=torch.float64), torch.zeros(len(reward)).long()
    return CaseResults(
        rewards=Rewards({"baseline": 0.25 * reward, "progress": 0.75 * reward}, reward),
        final_error=ones if error is None else error,
        cost=ones if cost is None else cost,
        num_texts=1,
        num_invalid_texts=counts,
        num_violations=counts if num_violations is None else num_violations,
        states=states,
        controls=states[:, 1:, 0],
    )


def test_lqr_itself_has_cost_ratio_one_and_the_costs_of_a_loop_over_floats():
    results = lqr_results(STARTS[:11], TASK)
    assert summarise(results, results)["cost_ratio"] == 1.0
    for k in range(11):
        cost, error, _ = loop_cost(STARTS[k].tolist(), results.controls[k].tolist())
        assert results.cost[k].item() == pytest.approx(cost, rel=1e-12)
        assert results.final_error[k].item() == pytest.approx(error, rel=1e-9)


def test_lqr_written_as_text_has_cost_ratio_one_and_noise_only_makes_it_worse():
    starts = STARTS[:13]
    expert = lqr_results(starts, TASK)
    ratios = []
    for noise in (0.0, 0.02, 0.2, 2.0):
        texts = lqr_texts(TASK, starts, noise)
        results = evaluate_policy(Scripted(TASK, texts.get), starts, TASK, None, seed=0)
        assert results.is_valid.all()
        # two decimals lose 0.001 % of the sum; below 1 - 1e-4 nobody can get (maths.md, section 2)
        assert (results.cost >= (1 - 1e-4) * expert.cost).all()
        ratios.append(summarise(results, expert)["cost_ratio"])
    assert ratios[0] == pytest.approx(1.0, abs=1e-4)
    assert ratios == sorted(ratios) and ratios[-1] > 2
    rounded = lqr_results(starts, TASK, decimals=2)
    written = evaluate_policy(Scripted(TASK, lqr_texts(TASK, starts).get), starts, TASK, None, 0)
    assert torch.equal(written.states, rounded.states)
    assert torch.equal(written.rewards.total, rounded.rewards.total)


def test_every_plan_flies_from_its_own_start_and_starts_can_be_permuted():
    starts = STARTS[:13]
    order = torch.randperm(13, generator=torch.Generator().manual_seed(3))
    model = Scripted(TASK, lqr_texts(TASK, starts, noise=0.3).get)
    for run in (
        lambda s: evaluate_policy(model, s, TASK, None, seed=0),
        lambda s: lqr_results(s, TASK, decimals=2),
    ):
        results, permuted = run(starts), run(starts[order])
        for name in ("cost", "final_error", "states", "controls", "num_violations"):
            assert torch.equal(getattr(permuted, name), getattr(results, name)[order])
        assert torch.equal(permuted.rewards.total, results.rewards.total[order])
        assert torch.equal(results.states[:, 0], starts)
    expert = lqr_results(starts, TASK)
    greedy = evaluate_policy(model, starts, TASK, None, seed=0)
    with pytest.raises(ValueError, match="LQR's starts"):
        summarise(greedy, lqr_results(starts[order], TASK))
    moved = lqr_results(starts[order], TASK)
    for pair in ((expert, moved), (moved, expert)):
        with pytest.raises(ValueError, match="LQR's starts"):
            paired_difference(*pair, expert)


def test_invalid_text_coasts_and_is_counted_and_nothing_is_dropped():
    starts = float64([[0.5, -0.2], [-0.7, 0.4], [0.1, 0.8], [-0.3, -0.6]])
    fine = lqr_texts(TASK, starts)
    broken = {
        tuple(starts[1].tolist()): [" ".join(["0.10"] * 49)],
        tuple(starts[3].tolist()): ["controls " + " ".join(["0.10"] * 50)],
    }
    model = Scripted(TASK, (fine | broken).get)
    results, expert = evaluate_policy(model, starts, TASK, None, 0), lqr_results(starts, TASK)
    assert results.is_valid.tolist() == [True, False, True, False]
    for k in (1, 3):
        cost, error, violations = loop_cost(starts[k].tolist(), [0.0] * 50)
        assert results.cost[k].item() == pytest.approx(cost, rel=1e-12)
        assert results.final_error[k].item() == pytest.approx(error, rel=1e-9)
        assert results.num_violations[k].item() == violations > 0
        assert results.rewards.total[k].item() == 0
    summary = summarise(results, expert)
    assert (summary["num_cases"], summary["frac_valid"], summary["num_invalid_texts"]) == (
        4,
        0.5,
        2,
    )
    assert summary["cost_ratio"] == pytest.approx(float(results.cost.sum() / expert.cost.sum()))
    assert summary["reward_baseline"] == 25.0
    assert summary["num_violations_mean"] == results.num_violations.sum().item() / 4


def test_summary_of_numbers_worked_by_hand():
    error = float64([0.02, 0.3, 0.05, 0.0999, 0.1])
    cost = float64([3.0, 1.0, 2.0, 5.0, 0.0])
    lqr = results_of([9.0] * 5, cost=float64([2.0, 1.0, 1.0, 1.0, 0.0]))
    counts = torch.tensor([0, 1, 0, 7, 0])
    results = results_of([100.0, 120, 110, 90, 130], error, cost, num_violations=counts)
    summary = summarise(results, lqr)
    assert summary["reward_mean"] == 110 and summary["reward_progress"] == 82.5
    assert summary["final_error_mean"] == pytest.approx(0.11398)
    assert summary["final_error_median"] == 0.0999
    assert summary["final_error_p95"] == pytest.approx(0.1 + 0.8 * 0.2)  # linear between the two
    assert summary["frac_final_error_below_0.1"] == 0.6
    assert summary["cost_ratio"] == 11 / 5  # not the mean of ratios, which has 0 / 0
    assert summary["num_violations_mean"] == 1.6 and summary["frac_violating"] == 0.4
    summary["reward_ci95"] = [95.5, 121.25]
    lines = table(Report({"sft": {"mpc": summary}}, {}, 5)).splitlines()
    titles, row = (re.split("  +", line) for line in lines)
    assert dict(zip(titles, row, strict=True)) == {
        "policy": "sft", "mode": "mpc", "cases": "5", "reward": "110.00",
        "95 % interval": "[95.50, 121.25]", "error mean": "0.1140", "median": "0.0999",
        "p95": "0.2600", "below 0.1": "60.0%", "cost ratio": "2.2000", "valid": "100.0%",
        "violations": "1.60",
    }  # fmt: skip
    at_rest = results_of([9.0] * 5, cost=torch.zeros(5).double())
    assert summarise(at_rest, at_rest)["cost_ratio"] is None


def test_bootstrap_interval_is_that_of_the_normal_and_covers_the_truth():
    rng = np.random.default_rng(0)
    values = rng.normal(100, 7, size=400)
    low, high = summarise(results_of(values), results_of(values))["reward_ci95"]
    half = 1.96 * values.std() / 20
    # end points of 2000 resamples scatter by 3 % of the half width; 10 % is three of these
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    covered = 0
    for seed in range(300):
        sample = results_of(rng.exponential(1.0, size=61))
        low, high = summarise(sample, sample, seed)["reward_ci95"]
        covered += low < 1.0 < high
    # the percentile interval of 61 exponentials covers about 93.5 %; 300 trials scatter by 1.4 %
    assert 0.89 < covered / 300 < 0.98


def test_bootstrap_is_keyed_by_the_seed():
    values = results_of(np.random.default_rng(1).normal(size=37))
    first, again, other = (summarise(values, values, seed)["reward_ci95"] for seed in (3, 3, 4))
    assert first == again != other
    starts = STARTS[:9]
    flown = {"lqr": lqr_results(starts, SHORT), "sft": lqr_results(starts, SHORT, 0)}
    results = {name: {"greedy": ran} for name, ran in (flown | {"grpo": flown["lqr"]}).items()}
    first, other = (make_report(results, SHORT, seed) for seed in (3, 4))
    for name in results:
        both = (report.policies[name]["greedy"]["reward_ci95"] for report in (first, other))
        assert next(both) != next(both)
    both = (report.comparison["greedy"]["reward_difference_ci95"] for report in (first, other))
    assert next(both) != next(both)


def test_paired_interval_is_tight_where_what_a_start_is_worth_cancels():
    rng = np.random.default_rng(2)
    worth = rng.normal(100, 10, size=200)
    b = results_of(worth + rng.normal(0, 0.5, 200))
    a = results_of(b.rewards.total.numpy() + rng.normal(1.0, 0.5, 200))
    lqr = results_of(worth + 20)
    low, high = paired_difference(a, b, lqr)["reward_difference_ci95"]
    assert low < 1.0 < high
    half = 1.96 * 0.5 / math.sqrt(200)
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)  # spread of the sample's own std: 5 %
    separate = np.ptp(summarise(a, lqr)["reward_ci95"]) + np.ptp(summarise(b, lqr)["reward_ci95"])
    assert high - low < separate / 10


def test_paired_difference_of_numbers_worked_by_hand():
    worth = float64([100.0, 80, 120, 90, 110])
    ones = torch.ones(5, dtype=torch.float64)
    lqr = results_of(worth + 8, cost=2 * ones, error=0 * ones)
    b = results_of(worth, cost=7 * ones, error=0.5 * ones)
    a = results_of(worth + 2, cost=4 * ones, error=0.25 * ones)
    assert paired_difference(a, b, lqr) == {
        "reward_difference": 2.0,
        "reward_difference_ci95": [2.0, 2.0],  # the same resample for both, or it would be wide
        "gap_closed": 0.25,
        "gap_closed_ci95": [0.25, 0.25],
        "final_error_difference": -0.25,
        "final_error_difference_ci95": [-0.25, -0.25],
        "cost_ratio_difference": -1.5,
        "cost_ratio_difference_ci95": [-1.5, -1.5],
    }
    found = {"sampled": paired_difference(a, b, lqr), "mpc": None}
    policies = {"lqr": {}, "lqr_rounded": {}, "sft": {}, "grpo": {}}
    assert table(Report(policies, found, 5)).splitlines()[1:] == [
        "grpo - sft, sampled: reward +2.00 [+2.00, +2.00], gap to LQR closed 25.0% [25.0%, 25.0%], "
        "final error -0.2500 [-0.2500, -0.2500], cost ratio -1.5000 [-1.5000, -1.5000]"
    ]
    uneven = results_of(worth + float64([1.0, 3, 2, 0, 9]))
    assert paired_difference(uneven, b, lqr)["gap_closed"] == pytest.approx(15 / 40)
    nothing_to_close = paired_difference(a, results_of(worth + 9), lqr)
    assert "gap to LQR closed - -, " in table(Report({}, {"greedy": nothing_to_close}, 5))
    assert nothing_to_close["gap_closed"] is None and nothing_to_close["gap_closed_ci95"] is None
    # a mean gap of 1 that could as well be 0 is no gap to divide by
    unsure = results_of(worth + float64([20.0, -10, 10, -15, 0]))
    assert paired_difference(a, b, unsure)["gap_closed"] is None
    # nor is one that is above 0 in 85 % of the resamples
    unsure = results_of(worth + float64([9.0, -4, 6, -3, 4]))
    assert paired_difference(a, b, unsure)["gap_closed"] is None
    # nor one that resamples without the first start have nothing of, but a small one is
    unsure = results_of(worth + float64([9.0, 0, 0, 0, 0]))
    assert paired_difference(a, b, unsure)["gap_closed"] is None
    assert paired_difference(a, b, results_of(worth + 0.5))["gap_closed"] == 4.0
    at_rest = results_of(worth, cost=0 * ones)
    assert paired_difference(a, b, at_rest)["cost_ratio_difference"] is None
    assert paired_difference(a, b, at_rest)["cost_ratio_difference_ci95"] is None
    but_one = paired_difference(a, b, results_of(worth, cost=float64([0.0, 0, 0, 0, 5])))
    assert but_one["cost_ratio_difference"] == -3.0  # and a third of the resamples lacks that one
    assert but_one["cost_ratio_difference_ci95"] is None


@cache
def gain():
    a, b = np.array([[1, 0.1], [0, 1]]), np.array([[0.005], [0.1]])
    p = solve_discrete_are(a, b, np.diag([10.0, 10.0]), [[0.1]])
    return np.linalg.solve(0.1 + b.T @ p @ b, b.T @ p @ a)[0].tolist()


def feedback(start):
    """Saturated -K x in two decimals."""
    u = -gain()[0] * start[0] - gain()[1] * start[1]
    return min(3.0, max(-3.0, round(u, 2)))


def test_receding_horizon_is_feedback_on_the_rounded_state_of_an_unrounded_plant():
    task = make(horizon=7, dt=0.123)  # with 0.1, states end in halves of the last digit

    def rule(start):
        if 0.2 < start[0] < 0.3:
            return ["controls"]  # no plan at all
        return [text_of(task, [feedback(start), 1, -1, 1, -1, 1, -1])]

    starts = float64([[0.5, -0.3], [-0.77, 0.31], [0.29, 0.13], [0.25, 0.8], [0, 0]])
    model = Scripted(task, rule)
    steps = []
    results = receding_horizon(
        model, starts, task, progress=lambda r: (steps.append(k) or k for k in r)
    )
    assert steps == list(range(7))
    num_invalid = defaultdict(int)
    for k, (x, v) in enumerate(starts.tolist()):
        for step in range(7):
            seen = round(x, 2), round(v, 2)
            assert seen in model.seen
            broken = 0.2 < seen[0] < 0.3
            u = 0.0 if broken else feedback(seen)
            num_invalid[k] += broken
            assert results.controls[k, step].item() == u
            x, v = x + 0.123 * v + 0.123**2 / 2 * u, v + 0.123 * u
            # the loop and the plant round differently in the last bits
            assert results.states[k, step + 1].tolist() == pytest.approx([x, v], abs=1e-12)
        assert results.num_invalid_texts[k].item() == num_invalid[k]
    assert min(num_invalid.values()) == 0 and max(num_invalid.values()) > 1
    assert results.is_valid.tolist() == [num_invalid[k] == 0 for k in range(5)]
    assert (results.rewards.components["baseline"] == 50).all()  # what was flown is what counts
    share = 1 - sum(num_invalid.values()) / 35
    assert summarise(results, lqr_results(starts, task))["frac_valid"] == pytest.approx(share)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(receding_horizon(model, starts[order], task).states, results.states[order])


def test_receding_horizon_of_an_expert_is_nearly_lqr():
    task = make(horizon=23)
    starts = STARTS[:3]
    model = Scripted(task, lambda start: [text_of(task, [feedback(start)] + [2.5] * 22)])
    ratio = summarise(receding_horizon(model, starts, task), lqr_results(starts, task))[
        "cost_ratio"
    ]
    assert 1 - 1e-4 <= ratio < 1.01  # measurements have two decimals


def test_receding_horizon_clamps_what_the_prompt_says_but_not_the_plant():
    long = make(horizon=17)
    model = Scripted(long, lambda start: [text_of(long, [3.0] * 17)])
    results = receding_horizon(model, float64([[0.8, 0.8], [0.5, 0.8]]), long)
    assert results.states[:, -1].min() > 3 and (results.controls == 3).all()
    assert results.is_valid.all() and max(max(state) for state in model.seen) == 3.0


def test_receding_horizon_plans_from_where_the_saturated_plant_is():
    """A model may write more than the bound, which is valid and applied as the bound."""
    wide = DoubleIntegrator(horizon=7, control_bound=5)
    plant = DoubleIntegrator(horizon=7, dt=0.1237)  # states never end in half of the last digit
    task = make_task(plant, COST, CODEC, number_tokenizer(wide, CODEC))
    model = Scripted(task, lambda start: [text_of(task, [4.5] * 7)])
    results = receding_horizon(model, float64([[-0.8, 0.1], [0.3, -0.2]]), task)
    assert (results.controls == 3).all() and results.is_valid.all()
    flown = results.states[:, :-1].flatten(0, 1).tolist()
    assert model.seen == {(round(x, 2), round(v, 2)) for x, v in flown}


def test_sampled_controls_depend_on_seed_and_place_alone():
    texts = [text_of(SHORT, [u] * 7) for u in (0.5, -0.5)]
    model = Scripted(SHORT, lambda start: texts)
    acting = ActingPolicy(temperature=1.0, top_p=1.0)
    starts = STARTS[:101]
    results = evaluate_policy(model, starts, SHORT, acting, seed=5)
    assert set(results.controls[:, 0].tolist()) == {0.5, -0.5}
    assert 30 < (results.controls[:, 0] > 0).sum() < 71  # a fair coin leaves that once in 10,000
    fewer = evaluate_policy(model, starts[:41], SHORT, acting, seed=5, rows_per_batch=7)
    assert torch.equal(fewer.controls, results.controls[:41])
    assert not torch.equal(
        evaluate_policy(model, starts, SHORT, acting, 6).controls, results.controls
    )
    metrics = validation_metrics(model, starts, SHORT, seed=5)
    greedy, expert = evaluate_policy(model, starts, SHORT, None, 0), lqr_results(starts, SHORT)
    assert metrics["eval/sampled_reward"] == results.rewards.total.mean()
    usual = evaluate.EvalConfig()  # whose sampled rows are of the same policy
    assert (usual.temperature, usual.top_p) == (acting.temperature, acting.top_p)
    assert metrics["eval/greedy_reward"] == greedy.rewards.total.mean()
    assert metrics["eval/lqr_reward"] == expert.rewards.total.mean()
    assert metrics["eval/cost_ratio"] == summarise(greedy, expert)["cost_ratio"]
    assert metrics["eval/final_error"] == greedy.final_error.mean() != results.final_error.mean()
    half = [text_of(SHORT, [0.5] * count) for count in (6, 7)]  # greedy takes one of the two
    mixed = validation_metrics(Scripted(SHORT, lambda start: half), starts, SHORT, seed=5)
    assert mixed["eval/frac_valid"] in (0, 1) and 0.3 < mixed["eval/sampled_frac_valid"] < 0.7


def test_tries_are_new_draws_for_every_seed_and_the_first_is_the_sampled_plan(monkeypatch):
    """Tries keyed by seed + i would be shared by neighbouring seeds, but for one."""
    texts = [text_of(SHORT, [u] * 7) for u in (0.5, -0.5)]
    model = Scripted(SHORT, lambda start: texts)
    groups = []

    def spy(tries):
        groups.append([ran.controls[:, 0] for ran in tries])
        return best_of(tries)

    monkeypatch.setattr(evaluate.evaluation, "best_of", spy)
    for seed in (1, 2):
        config = evaluate.EvalConfig(seed=seed, best_of=4, skip_mpc=True)
        evaluate.run_policies({"sft": (model, SHORT)}, STARTS[:64], config, torch.device("cpu"))
    _, sampled, tries, _, other, more = groups
    assert torch.equal(tries[0], sampled[0]) and torch.equal(more[0], other[0])
    drawn = tries + more  # 64 fair coins each: equal ones are one in 10^19
    assert len({tuple(controls.tolist()) for controls in drawn}) == len(drawn) == 8


def test_the_best_of_several_tries_is_chosen_start_by_start_with_all_that_belongs_to_it():
    tries = [
        results_of([1.0, 9.0, 5.0], error=float64([0.1, 0.2, 0.3]), cost=float64([1, 2, 3])),
        results_of([4.0, 2.0, 5.0], error=float64([0.4, 0.5, 0.6]), cost=float64([4, 5, 6])),
    ]
    chosen = best_of(tries)
    assert chosen.rewards.total.tolist() == [4.0, 9.0, 5.0]  # of equals the first
    assert chosen.final_error.tolist() == [0.4, 0.2, 0.3]
    assert chosen.cost.tolist() == [4.0, 2.0, 3.0]
    for name, value in chosen.rewards.components.items():
        columns = [ran.rewards.components[name].tolist() for ran in tries]
        assert value.tolist() == [columns[1][0], columns[0][1], columns[0][2]]
    again = best_of(tries[:1])
    assert all(torch.equal(getattr(again, n), getattr(tries[0], n)) for n in ("states", "controls"))


def test_results_of_other_starts_than_the_rewards_are_refused():
    with pytest.raises(ValueError, match=r"must have shape \[K\]"):
        results_of([1.0, 2.0], error=float64([0.1]))


def test_skipped_mpc_is_null_and_changes_no_other_number():
    starts = STARTS[:5]
    expert = lqr_results(starts, SHORT)
    sft = evaluate_policy(
        Scripted(SHORT, lqr_texts(SHORT, starts, 0.5).get), starts, SHORT, None, 0
    )
    grpo = evaluate_policy(
        Scripted(SHORT, lqr_texts(SHORT, starts, 0.1).get), starts, SHORT, None, 0
    )
    flown = receding_horizon(
        Scripted(SHORT, lambda s: [text_of(SHORT, [feedback(s)] * 7)]), starts[:3], SHORT
    )
    skipped = {"lqr": {"greedy": expert}, "sft": {"greedy": sft}, "grpo": {"greedy": grpo}}
    run = skipped | {"grpo": {"greedy": grpo, "mpc": flown}}
    without, with_mpc = make_report(skipped, SHORT, 0), make_report(run, SHORT, 0)
    assert without.policies["grpo"]["mpc"] is None and without.comparison["mpc"] is None
    assert with_mpc.comparison == without.comparison  # sft has no mpc to compare with
    assert with_mpc.num_cases == without.num_cases == 5
    assert with_mpc.policies["grpo"]["mpc"]["num_cases"] == 3
    with_mpc.policies["grpo"]["mpc"] = None
    assert with_mpc.policies == without.policies
    assert without.comparison["greedy"] == paired_difference(grpo, sft, expert)
    assert without.policies["lqr"]["greedy"]["cost_ratio"] == 1
    lines = table(without).splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [[n, "greedy"] for n in skipped]
    assert f"{grpo.rewards.total.mean():.2f}" in lines[3] and lines[4].startswith(
        "grpo - sft, greedy"
    )
    assert len(lines) == 5


def test_initial_states_are_read_as_written(tmp_path):
    path = tmp_path / "starts.json"
    path.write_text("[[0.5, -0.31], [0, 0], [-0.8, 0]]")
    assert read_starts(path, TASK.plant).tolist() == [[0.5, -0.31], [0.0, 0.0], [-0.8, 0.0]]
    assert read_starts(path, TASK.plant).dtype == torch.float64


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "readable JSON file"),
        ("[[0.1, 0.2], [0.3", "JSON list"),
        ("[" * 100_000, "JSON list"),
        ("{}", "at least 2 rows .* got dict"),
        ("[]", r"at least 2 rows .* got 0 row"),
        ("[[0.1, 0.2]]", "at least 2 rows"),
        ("[[0.1, 0.2], [0.1]]", r"row 1 .* got \[0.1\]"),
        ("[[0.1, 0.2], [0.1, 0.2, 0.3]]", "row 1"),
        ("[[0.1, 0.2], 7]", "row 1 .* got 7"),
        ('[["0.1", 0.2], [0.1, 0.2]]', "row 0"),
        ("[[0.1, true], [0.1, 0.2]]", "row 0"),
        ("[[0.1, false], [0.1, 0.2]]", "row 0"),
        ("[[0.1, null], [0.1, 0.2]]", "row 0"),
        ("[[0.1, 0.2], [0.81, 0.0]]", r"row 1 .* \+-0.8 .* got \[0.81, 0.0\]"),
        ("[[0.1, 0.2], [0.0, -0.9]]", "row 1"),
        ("[[0.1, 0.2], [0.125, 0.0]]", "at most 2 decimals"),
        ("[[0.1, NaN], [0.1, 0.2]]", "row 0 .* NaN"),
        ("[[0.1, 0.2], [1e999, 0.2]]", "row 1"),
    ],
)
def test_a_bad_initial_state_is_named_in_one_line(tmp_path, content, complaint):
    path = tmp_path / "starts.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        read_starts(path, TASK.plant)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def publish(folder, stage, control, task):
    """A model of one-step plans: after a word it prefers `control`, after a number EOS."""
    vocabulary = task.tokenizer.get_vocab()
    model = Transformer(
        TransformerConfig("llama", len(vocabulary), head_size=2, tied_head=False, **SHAPE)
    )
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    state["norm.weight"] += 1
    for token, index in vocabulary.items():
        state["embed.weight"][index] = torch.tensor([0.0, 1.0] if "." in token else [1.0, 0.0])
    state["head.weight"][vocabulary[control]] = torch.tensor([5.0, 0.0])
    state["head.weight"][vocabulary["<eos>"]] = torch.tensor([0.0, 5.0])
    # the prompt ends in a word; `blocks` add nothing, so the last token decides
    model.load_state_dict(state)
    manifest = Manifest(stage, "tiny", task.plant, task.cost, task.codec, {}, {})
    folder.mkdir()
    publish_model(folder, model, task, manifest, step=40 if stage == "sft" else 7, score=0.0)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, task = tmp_path_factory.mktemp("models"), make(horizon=1)
    controls = {"sft": "0.50", "grpo": "-0.25"}
    return {stage: publish(root / stage, stage, u, task) for stage, u in controls.items()}


def test_the_script_writes_what_the_issue_asks_for(folders, capsys, tmp_path, monkeypatch):
    flags = ["--model-path", folders["grpo"], "--baseline", folders["sft"], "--device", "cpu"]
    flags += ["--num-cases", "7", "--mpc-cases", "3", "--save-dir", str(tmp_path / "out")]
    flags += ["--best-of", "2"]
    evaluate.main(flags)
    assert "MPC runs from the first 3 starts" in capsys.readouterr().out
    report = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert list(report["policies"]) == ["lqr", "lqr_rounded", "sft", "grpo"]
    assert (report["num_cases"], report["config"]["num_cases"]) == (7, 7)
    assert report["steps"] == {"sft": 40, "grpo": 7}
    for name, modes in report["policies"].items():
        assert list(modes) == ["greedy", "sampled", "best_of", "mpc"]
        ran = [mode for mode, summary in modes.items() if summary is not None]
        assert ran == (["greedy"] if "lqr" in name else list(modes))
        if "lqr" not in name:
            assert modes["best_of"]["reward_mean"] >= modes["sampled"]["reward_mean"]
    assert report["policies"]["grpo"]["mpc"]["num_cases"] == 3
    assert report["comparison"]["sampled"]["reward_difference"] == pytest.approx(
        report["policies"]["grpo"]["sampled"]["reward_mean"]
        - report["policies"]["sft"]["sampled"]["reward_mean"]
    )
    greedy, sampled = (report["policies"]["grpo"][mode]["frac_valid"] for mode in MODES[:2])
    assert sampled < greedy == 1  # the right number and EOS have 64 % each
    cases = list(csv.DictReader((tmp_path / "out/cases.csv").read_text().splitlines()))
    assert len(cases) == 7 + 7 + 2 * (7 + 7 + 7 + 3)
    for name, modes in report["policies"].items():
        for mode, summary in modes.items():
            rows = [row for row in cases if (row["policy"], row["mode"]) == (name, mode)]
            if summary is not None:
                lqr = {(r["position"], r["velocity"]): float(r["cost"]) for r in cases[:7]}
                costs = sum(lqr[row["position"], row["velocity"]] for row in rows)
                reward, cost = (sum(float(r[key]) for r in rows) for key in ("reward", "cost"))
                assert reward / len(rows) == pytest.approx(summary["reward_mean"])
                assert cost / costs == pytest.approx(summary["cost_ratio"])
                for part in ("baseline", "terminal", "lqr", "validity"):
                    mean = sum(float(row[f"reward_{part}"]) for row in rows) / len(rows)
                    assert mean == pytest.approx(summary[f"reward_{part}"], abs=1e-12)
                names = ("is_valid", "num_violations", "num_invalid_texts")
                valid, violations, invalid = (sum(int(r[name]) for r in rows) for name in names)
                assert violations / len(rows) == pytest.approx(summary["num_violations_mean"])
                assert invalid == summary["num_invalid_texts"]
                assert mode == "mpc" or valid == len(rows) - invalid
    starts = [[float(row["position"]), float(row["velocity"])] for row in cases[:7]]
    assert starts == STARTS[:7].tolist()
    for name, u in (("sft", 0.5), ("grpo", -0.25)):
        rows = [r for r in cases if r["policy"] == name and r["mode"] in ("greedy", "mpc")]
        expected = [loop_cost(start, [u])[:2] for start in starts + starts[:3]]
        found = [(float(row["cost"]), float(row["final_error"])) for row in rows]
        assert found == [pytest.approx(pair) for pair in expected]
    with pytest.raises(ValueError, match="--overwrite"):
        evaluate.main(flags)
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)  # once is enough for the plots
    evaluate.main([*flags, "--skip-mcp", "--overwrite"])
    assert "MPC IS SKIPPED" in capsys.readouterr().out
    again = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert again["policies"]["sft"]["mpc"] is None and again["comparison"]["mpc"] is None
    assert again["policies"]["sft"]["greedy"] == report["policies"]["sft"]["greedy"]
    assert again["policies"]["grpo"]["sampled"] == report["policies"]["grpo"]["sampled"]


def test_one_model_alone_goes_by_its_stage_on_starts_from_a_file_without_matplotlib(
    folders, capsys, tmp_path, monkeypatch
):
    split = split_starts(TASK.plant)
    starts = [split.test[5].tolist(), *split.training[:2].tolist()]
    (tmp_path / "starts.json").write_text(json.dumps(starts))
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
    flags = ["--model-path", folders["sft"], "--skip-mpc", "--device", "cpu"]
    evaluate.main([*flags, "--initial-states", str(tmp_path / "starts.json")])
    shown = capsys.readouterr().out
    assert "2 of the 3 starts" in shown and "pip install -e '.[plots]'" in shown
    folder = Path(folders["sft"]) / "evaluation"
    assert sorted(path.name for path in folder.iterdir()) == ["cases.csv", "evaluation.json"]
    report = json.loads((folder / "evaluation.json").read_text())
    assert list(report["policies"]) == ["lqr", "lqr_rounded", "sft"]
    assert report["comparison"] == dict.fromkeys(MODES)
    cases = csv.reader((folder / "cases.csv").read_text().splitlines())
    assert [[float(x) for x in row[:2]] for row in [*cases][1:4]] == starts


def test_the_error_plot_compares_all_modes_on_the_same_starts(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    starts, drawn = STARTS[:5], {}
    for name in ("time_series", "phase_portrait", "error_by_step"):
        monkeypatch.setattr(
            evaluate.plots, f"plot_{name}", lambda *given, name=name: drawn.update({name: given})
        )
    expert, flown = lqr_results(starts, SHORT), lqr_results(starts[:3], SHORT)
    results = {"lqr": {"greedy": expert}, "lqr_rounded": {"greedy": expert}}
    results["grpo"] = {"greedy": expert, "sampled": lqr_results(starts, SHORT, 0), "mpc": flown}
    evaluate.draw_plots(tmp_path, results, SHORT.plant, tmp_path / "metrics.jsonl")
    path, states, dt = drawn["error_by_step"]
    assert (path, dt) == (tmp_path / "error_by_step.png", 0.1)
    assert list(states) == ["lqr", "grpo", "grpo mpc"]
    assert all(torch.equal(flown, expert.states[:3]) for flown in states.values())
    for name, bounds in (("time_series", [0.1, 1.0, 3.0]), ("phase_portrait", [1.0])):
        path, states, *more = drawn[name]
        assert path == tmp_path / f"{name}.png" and more[-len(bounds) :] == bounds
        assert list(states) == ["lqr", "grpo"]
        assert all(torch.equal(flown, expert.states) for flown in states.values())
    controls = drawn["time_series"][2]
    assert all(torch.equal(applied, expert.controls) for applied in controls.values())


def test_lqr_is_rounded_as_the_evaluated_model_writes_whatever_the_baseline(folders, tmp_path):
    coarse = publish(tmp_path / "coarse", "sft", "0.5", make(1, Codec("numbers", 1)))
    flags = ["--model-path", folders["grpo"], "--device=cpu", "--num-cases=9", "--skip-mpc"]
    rows = []
    for name, more in (("alone", []), ("beside", ["--baseline", coarse])):
        evaluate.main([*flags, *more, "--save-dir", str(tmp_path / name)])
        lines = (tmp_path / name / "cases.csv").read_text().splitlines()
        rows.append([line for line in lines if ",lqr_rounded," in line])
    assert rows[0] == rows[1] and len(rows[0]) == 9


def test_an_evaluation_of_a_checkpoint_outlives_it(folders, tmp_path, monkeypatch):
    model = tmp_path / "run/checkpoints/step-000020"
    shutil.copytree(folders["grpo"], model)
    monkeypatch.chdir(model.parent)
    evaluate.main(["--model-path", model.name, "--device=cpu", "--num-cases=9", "--skip-mpc"])
    assert not (model / "evaluation").exists()
    assert (tmp_path / "run/evaluation/step-000020/evaluation.json").is_file()
    named = tmp_path / "checkpoints/sft"  # a run that lies in a folder of that name
    assert evaluate.evaluation_folder(named) == named / "evaluation"


def test_pictures_of_an_evaluation_that_is_replaced_go_and_numbers_do_not_wait_for_new_ones(
    folders, capsys, tmp_path, monkeypatch
):
    for name in ("learning_curve.png", "mine.png"):
        (tmp_path / name).write_bytes(b"old")
    flags = ["--model-path", folders["grpo"], "--device=cpu", "--num-cases=9", "--skip-mpc"]

    def fail(*_):
        raise ValueError("metrics.jsonl, line 6: must have a step")

    monkeypatch.setattr(evaluate, "draw_plots", fail)
    with pytest.raises(ValueError, match="line 6"):
        evaluate.main([*flags, "--save-dir", str(tmp_path)])
    assert "lqr_rounded" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "cases.csv",
        "evaluation.json",
        "mine.png",
    ]


def test_a_baseline_for_another_plant_is_refused(folders, tmp_path):
    other = publish(tmp_path / "other", "sft", "0.50", make(horizon=1, dt=0.2))
    with pytest.raises(ValueError, match=r"baseline .* must be for .*: plant.dt .* 0.1, got 0.2$"):
        evaluate.main(["--model-path", folders["grpo"], "--baseline", other, "--device", "cpu"])
    task = make(horizon=1)
    dear = make_task(task.plant, QuadraticCost(control=0.2), CODEC, task.tokenizer)
    other = publish(tmp_path / "dear", "sft", "0.50", dear)
    with pytest.raises(ValueError, match=r"cost of .*grpo: cost.control must be 0.1, got 0.2$"):
        evaluate.main(["--model-path", folders["grpo"], "--baseline", other, "--device", "cpu"])


def test_a_baseline_that_is_the_grpo_model_of_the_two_is_refused(folders):
    flags = ["--model-path", folders["sft"], "--baseline", folders["grpo"], "--overwrite"]
    with pytest.raises(ValueError, match=r"baseline .*grpo is of stage grpo.*sft: exchange them"):
        evaluate.main(flags)


def test_two_models_of_one_stage_are_told_apart_by_their_places(folders, tmp_path, capsys):
    other = publish(tmp_path / "other", "grpo", "0.50", make(horizon=1))
    flags = ["--model-path", folders["grpo"], "--baseline", other, "--device", "cpu", "--skip-mpc"]
    evaluate.main([*flags, "--num-cases", "7", "--save-dir", str(tmp_path / "out")])
    report = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert list(report["policies"]) == ["lqr", "lqr_rounded", "baseline", "model"]
    model, baseline = (
        report["policies"][name]["greedy"]["reward_mean"] for name in ("model", "baseline")
    )
    gain = report["comparison"]["greedy"]["reward_difference"]
    assert gain == pytest.approx(model - baseline) and abs(gain) > 0.1
    assert f"model - baseline, greedy: reward {gain:+.2f}" in capsys.readouterr().out


def test_the_seed_of_an_evaluation_is_also_that_of_its_intervals(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
    flags = ["--model-path", folders["grpo"], "--device=cpu", "--num-cases=9", "--skip-mpc"]
    found = []
    for seed in ("3", "4"):
        evaluate.main([*flags, "--seed", seed, "--save-dir", str(tmp_path / seed)])
        report = json.loads((tmp_path / seed / "evaluation.json").read_text())
        found.append(report["policies"]["lqr"]["greedy"])
    assert found[0]["reward_mean"] == found[1]["reward_mean"]
    assert found[0]["reward_ci95"] != found[1]["reward_ci95"]


def test_a_number_that_is_none_is_not_written_as_one(folders, tmp_path, monkeypatch):
    """NaN would make evaluation.json a file that strict readers of JSON refuse."""
    monkeypatch.setattr(evaluate.evaluation, "make_report", lambda *_: Report({}, {}, math.nan))
    flags = ["--model-path", folders["grpo"], "--device=cpu", "--num-cases=9", "--skip-mpc"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        evaluate.main([*flags, "--save-dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_every_mode_runs_in_the_precision_that_was_asked_for(monkeypatch):
    seen = []

    def watched(model, starts, *_):
        seen.append(torch.is_autocast_enabled("cpu"))
        return lqr_results(starts, SHORT)

    for name in ("evaluate_policy", "receding_horizon"):
        monkeypatch.setattr(evaluate.evaluation, name, watched)
    models = {"sft": (torch.nn.Identity(), SHORT)}
    for precision in ("float32", "bfloat16"):
        config = evaluate.EvalConfig(precision=precision)
        evaluate.run_policies(models, STARTS[:2], config, torch.device("cpu"))
    assert seen == [False] * 3 + [True] * 3


@pytest.mark.parametrize("place", ["file", "file/below", "/proc"])  # where nobody can write
def test_a_save_dir_that_cannot_be_written_is_refused_before_the_work(
    place, folders, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(evaluate, "run_policies", None)
    flags = ["--model-path", folders["grpo"], "--device=cpu", "--save-dir", str(tmp_path / place)]
    expected = (
        "/proc" if place == "/proc" else "save_dir must be a folder or become one, got .*file"
    )
    with pytest.raises(OSError, match=expected):
        evaluate.main(flags)


def test_no_command_decodes_more_rows_together_than_it_was_told(tmp_path, monkeypatch):
    """Rollouts, validation of both trainers, and every mode of an evaluation."""
    folder, told = untrained_checkpoint(tmp_path / "sft"), []

    def watched(*arguments):
        told.append(arguments[-1])
        return sample_completions(*arguments)

    monkeypatch.setattr(rollout, "sample_completions", watched)
    every, sizes = "--device cpu --rows-per-batch 3 ", []
    tiny = "--horizon 2 --width 8 --mlp-width 8 --num-layers 1 --num-heads 2 --eval-cases 8 "
    train_sft.main([*(every + tiny + "--steps 1 --save-dir").split(), str(tmp_path / "other")])
    sizes.append(len(told))
    few = "--steps 1 --prompts-per-step 2 --group-size 2 --num-minibatches 1 --eval-cases 8 "
    start = ["--init", str(folder), "--save-dir", str(tmp_path / "grpo")]
    train_grpo.main([*(every + few).split(), *start])
    sizes.append(len(told))
    few = "--num-cases 5 --mpc-cases 2 --best-of 2 --model-path"
    evaluate.main([*(every + few).split(), str(folder)])
    sizes.append(len(told))
    # greedy and sampled before and after, and a rollout; greedy, sampled, twice, each of two steps
    assert sizes == [4, 9, 15] and set(told) == {3}


@pytest.mark.parametrize(("size", "is_cut"), [("2", True), ("999", False)])
def test_a_nucleus_that_support_size_cuts_is_told(folders, capsys, tmp_path, size, is_cut):
    """All nuclei are wide but those after a number, with which two of the four texts begin."""
    model = tmp_path / "sure"
    shutil.copytree(folders["grpo"], model)
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][TASK.tokenizer.eos_token_id] *= 100
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    flags = ["--model-path", str(model), "--device", "cpu", "--num-cases", "4", "--skip-mpc"]
    flags += ["--temperature", "50", "--top-p", "0.9", "--save-dir", str(tmp_path / "out")]
    evaluate.main([*flags, "--support-size", size])
    found = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert [line.startswith("WARNING: support_size cut 75%") for line in found] == [True] * is_cut
    report = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert report["config"]["support_size"] == int(size)
    assert report["steps"] == {"grpo": None}  # those weights are of no step
