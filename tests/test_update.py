"""The policy update against REINFORCE written as a loop, and what must not change its gradient."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import untrained_checkpoint
from torch import Tensor

import train_grpo
from benchmarks.study import CURVE
from minigrpo import optim, scoring, update
from minigrpo.config import GRPOConfig
from minigrpo.counterfactual import ChoiceCredit, ChoiceValues, Plans
from minigrpo.grpo import group_advantages
from minigrpo.optim import adamw
from minigrpo.policy import ActingPolicy
from minigrpo.rollout import Rollout
from minigrpo.sampling import StopRule, sample_completions
from minigrpo.scoring import completion_scores
from minigrpo.transformer import Transformer, TransformerConfig, initialise, logits
from minigrpo.update import accumulate_gradient, update_policy, warnings_of

VOCAB, PROMPTS, GROUP, LONGEST, ALLOWED = 13, 5, 3, 7, 11
AGGREGATIONS = ("dapo", "grpo", "dr_grpo")
CONFIG = GRPOConfig(
    prompts_per_step=PROMPTS, group_size=GROUP, micro_batch_size=4, temperature=0.7, kl_beta=0.0,
    clip_eps_high=0.3,  # unlike the lower one: exchanged, they would show
)  # fmt: skip


def a_model(vocab: int = VOCAB, seed: int = 1) -> Transformer:
    shape = TransformerConfig("qwen3", vocab, 12, 10, 2, 2, 1, 4, tied_head=False)
    model = Transformer(shape)
    initialise(model, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.head.weight *= 30.0  # far from uniform
    return model


def a_rollout(
    dtype: torch.dtype = torch.float64,
    credit: ChoiceCredit | None = None,
    **changes: Tensor | None,
) -> Rollout:
    """Prompts and completions of mixed length; what lies outside of the masks is garbage."""
    generator, num_rows = torch.Generator().manual_seed(2), PROMPTS * GROUP
    shape = (num_rows, LONGEST)
    starts = torch.randint(4, (PROMPTS, 1), generator=generator)
    lengths = torch.randint(1, LONGEST + 1, (num_rows, 1), generator=generator)
    lengths[3] = LONGEST
    order = torch.rand(*shape, VOCAB, generator=generator).argsort(dim=-1)
    support = order[..., :5].masked_fill(torch.rand(*shape, 5, generator=generator) < 0.3, -1)
    support[..., 2] = order[..., 2]
    prompts = torch.randint(VOCAB, (PROMPTS, 4), generator=generator)
    mask = torch.arange(LONGEST) < lengths
    garbage = torch.where(mask, 0.0, torch.nan)
    rewards = torch.randn(num_rows, generator=generator, dtype=torch.float64)
    rewards[6:9] = 1.0  # a group that teaches nothing
    parts = {
        "prompt_tokens": prompts,
        "prompt_mask": torch.arange(4) >= starts,
        "completion_tokens": order[..., 2],
        "completion_mask": mask,
        "support": support.int(),
        "sampling_logprobs": torch.randn(shape, generator=generator).to(dtype) + garbage,
        "old_logprobs": None,
        "ref_logprobs": None,
        "rewards": rewards,
        "advantages": group_advantages(rewards, GROUP, "group"),
        "prompt_places": torch.arange(PROMPTS),
    }
    return Rollout(**parts | changes, group_size=GROUP, max_length=ALLOWED, credit=credit)


def some_plans() -> Plans:
    generator = torch.Generator().manual_seed(8)
    starts, plans = torch.randn(15, 2, generator=generator), torch.randn(15, 6, generator=generator)
    written = torch.full((15,), LONGEST)
    return Plans(starts.double(), plans.double(), plans.double().flip(0), written)


def slow_logprobs(model: Transformer, rollout: Rollout, temperature: float) -> list[list[Tensor]]:
    """log q of each active token, one row at a time, without padding, over its own support."""
    found = []
    for n, length in enumerate(rollout.completion_mask.sum(dim=1).tolist()):
        prompt = rollout.prompt_tokens[n // GROUP][rollout.prompt_mask[n // GROUP]]
        completion = rollout.completion_tokens[n, :length]
        z = model(torch.cat([prompt, completion])[None], None, None, logits)[0] / temperature
        row = []
        for t, token in enumerate(completion.tolist()):
            ids = [i for i in rollout.support[n, t].tolist() if i >= 0]
            here = z[len(prompt) + t - 1]
            row.append(here[token] - torch.stack([here[i] for i in ids]).exp().sum().log())
        found.append(row)
    return found


def as_matrix(rows: list[list[Tensor]]) -> Tensor:
    """[N, C] with garbage outside of the mask."""
    matrix = torch.full((len(rows), LONGEST), torch.nan, dtype=torch.float64)
    for n, row in enumerate(rows):
        matrix[n, : len(row)] = torch.stack(row).detach()
    return matrix


def gradient_of(model: Transformer) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def weights_of(model: Transformer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def gradient_by(rollout: Rollout, config: GRPOConfig, rows: Tensor | None = None) -> Tensor:
    model = a_model().double()
    chosen = torch.arange(len(rollout.rewards)) if rows is None else rows
    accumulate_gradient(model, rollout, chosen, config)
    return gradient_of(model)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("with_reference", [False, True])
def test_the_first_gradient_is_that_of_reinforce(aggregation: str, with_reference: bool) -> None:
    """grad loss = - sum w (A - kl_beta (log q - ref)) grad log q / denominator, as r = 1.

    Both sides in float64, so all that differs is the order of sums.
    """
    rollout, model, kl_beta = a_rollout(), a_model().double(), 0.3
    reference = -3 * torch.rand(rollout.completion_mask.shape).double()
    rows = slow_logprobs(model, rollout, CONFIG.temperature)
    lengths = [len(row) for row in rows]
    denominator = {"dapo": sum(lengths), "grpo": len(rows), "dr_grpo": len(rows) * ALLOWED}
    loss = torch.zeros(())
    for n, row in enumerate(rows):
        weight = 1 / lengths[n] if aggregation == "grpo" else 1.0
        for t, logq in enumerate(row):
            signal = rollout.advantages[n]
            if with_reference:
                signal = signal - kl_beta * (logq.detach() - reference[n, t])
            loss = loss - weight * signal * logq / denominator[aggregation]
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    config = replace(CONFIG, aggregation=aggregation, kl_beta=kl_beta)
    for old in (None, as_matrix(rows)):  # a scoring pass changes nothing
        changed = replace(
            rollout, ref_logprobs=reference if with_reference else None, old_logprobs=old
        )
        got = gradient_by(changed, config)
        assert (got - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize("is_truncated", [False, True])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_gradient_with_choices_is_that_of_a_loop_over_all_tokens(
    aggregation: str, is_truncated: bool
) -> None:
    """grad = - sum w (grad sum_a q(a) values . basis[a] near the old policy + A r grad log q)."""
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(15, LONGEST, 4, generator=generator, dtype=torch.float64)
    basis = torch.randn(VOCAB, 4, generator=generator, dtype=torch.float64)
    level, advantages = torch.randn(2, 15, LONGEST, generator=generator, dtype=torch.float64)
    unit = torch.rand(15, generator=generator, dtype=torch.float64) + 0.5
    choices = ChoiceValues(values, level, basis, torch.zeros(2).double(), some_plans(), None)
    credit = ChoiceCredit(choices, unit, mean_offsets=torch.zeros(15, LONGEST).double())
    rollout = a_rollout(advantages=advantages, credit=credit)
    if not is_truncated:
        rollout = replace(rollout, support=None)
    every = [list(range(VOCAB))] * LONGEST
    model, scale = a_model().double(), {"dapo": int(rollout.completion_mask.sum()), "grpo": 15}
    drift = 0.3 * torch.randn(15, LONGEST, generator=generator, dtype=torch.float64)
    loss, old, num_near = torch.zeros(()).double(), torch.full((15, LONGEST), math.nan).double(), 0
    for n, length in enumerate(rollout.completion_mask.sum(dim=1).tolist()):
        prompt = rollout.prompt_tokens[n // GROUP][rollout.prompt_mask[n // GROUP]]
        taken = rollout.completion_tokens[n, :length]
        z = model(torch.cat([prompt, taken])[None], None, None, logits)[0] / CONFIG.temperature
        supports = every if rollout.support is None else rollout.support[n].tolist()
        for t, token in enumerate(taken.tolist()):
            ids = [i for i in supports[t] if i >= 0]
            q = z[len(prompt) + t - 1][ids].softmax(dim=0)
            logq = q[ids.index(token)].log()
            old[n, t] = logq.detach() + drift[n, t]
            ratio = (logq - old[n, t]).exp()
            a = advantages[n, t]
            gain = torch.minimum(ratio * a, ratio.clamp(0.8, 1.3) * a)
            if 0.8 <= float(ratio.detach()) <= 1.3:
                gain += unit[n] * (q * (basis[ids] @ values[n, t])).sum()
                num_near += 1
            weight = 1 / length if aggregation == "grpo" else 1.0
            loss = loss - weight * gain / scale.get(aggregation, 15 * ALLOWED)
    assert 10 < num_near < int(rollout.completion_mask.sum()) - 10
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    got = gradient_by(replace(rollout, old_logprobs=old), replace(CONFIG, aggregation=aggregation))
    assert (got - wanted).abs().max() < 1e-10 * wanted.abs().max()


def test_the_tables_step_along_smoothed_gradients() -> None:
    kernel = torch.rand(VOCAB, VOCAB, generator=torch.Generator().manual_seed(4)).double()
    config, found = replace(CONFIG, max_grad_norm=1e9), []
    for used in (None, kernel):
        model = a_model().double()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        descent = torch.optim.SGD(model.parameters())
        report, _ = update_policy(model, descent, a_rollout(), config, 0, 0.1, used)
        found.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
        found[-1]["norm"] = torch.tensor(report["update/grad_norm"])  # before the smoothing
    for name, plain in found[0].items():
        wanted = kernel @ plain if name in ("embed.weight", "head.weight") else plain
        assert torch.allclose(found[1][name], wanted, rtol=0, atol=1e-12), name
        assert plain.any()


@pytest.mark.parametrize("flag", ["--no-follow-policy", "--gradient-smoothing-width 0"])
def test_what_a_flag_switches_off_is_on_in_training(flag: str, tmp_path: Path) -> None:
    """Other weights after two optimizer steps of one rollout, or the flag reaches nothing."""
    found = []
    for name, more in (("on", ""), ("again", ""), ("off", flag)):
        usual = (
            f"--init {tmp_path / 'sft'} --save-dir {tmp_path / name} --steps 1 --eval-every 99 "
            "--prompts-per-step 4 --group-size 2 --num-minibatches 2 --eval-cases 8 --device cpu "
            "--learning-rate 0.01 --warmup-steps 0"
        )
        if not found:
            untrained_checkpoint(tmp_path / "sft")
        train_grpo.main([*usual.split(), *more.split()])
        folder = tmp_path / name / "checkpoints" / "step-000001"
        found.append(load_file(folder / "model.safetensors"))
    on, again, off = found
    assert all(torch.equal(on[key], again[key]) for key in on)
    assert any(not torch.equal(on[key], off[key]) for key in on)


def test_the_study_keeps_metrics_that_there_are(tmp_path: Path) -> None:
    """Among them what target_kl did, which no result can be asked for afterwards."""
    init, folder = untrained_checkpoint(tmp_path / "sft"), tmp_path / "grpo"
    flags = "--steps 1 --prompts-per-step 2 --group-size 2 --num-minibatches 2 --device cpu"
    train_grpo.main([*flags.split(), "--init", str(init), "--save-dir", str(folder)])
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"update/num_steps", "update/max_drift"} <= set(CURVE) <= set(last)


def test_choices_are_simulated_again_where_the_policy_has_moved_to() -> None:
    """From the second optimizer step on, at controls moved by what their mean has moved since."""
    generator = torch.Generator().manual_seed(9)
    values, again = torch.randn(2, 15, LONGEST, 5, generator=generator, dtype=torch.float64)
    grid, plans = torch.tensor([-1.0, 0.0, 1.0]).double(), some_plans()
    basis = torch.rand(VOCAB, 5, generator=generator, dtype=torch.float64)
    level, before = torch.randn(2, 15, LONGEST, generator=generator, dtype=torch.float64)
    unit = torch.rand(15, generator=generator, dtype=torch.float64) + 0.5
    seen: list[Plans] = []

    class Simulator:
        def values_of(self, moved: Plans, length: int) -> ChoiceValues:
            seen.append(moved)
            same = plans.initial_states == moved.initial_states[:, None]
            rows = same.all(dim=2).nonzero()[:, 1]
            return ChoiceValues(
                again[rows, :length], level[rows, :length], basis, grid, moved, self
            )

    choices = ChoiceValues(values, level, basis, grid, plans, Simulator())
    credit = ChoiceCredit(choices, unit, mean_offsets=0.1 * before)
    old = as_matrix(slow_logprobs(a_model().double(), a_rollout(), 0.7))
    rollout = a_rollout(advantages=level, credit=credit, old_logprobs=old)
    config = replace(CONFIG, num_minibatches=2, max_grad_norm=1e9)
    model = a_model().double()
    gradients: list[Tensor] = []
    descent = torch.optim.SGD(model.parameters())
    descent.register_step_pre_hook(lambda *_: gradients.append(gradient_of(model).clone()))
    update_policy(model, descent, rollout, config, 0, 0.0)  # rate 0
    first, second = torch.arange(9), torch.arange(9, 15)  # 3 and 2 groups
    settings = replace(config, num_minibatches=1)
    assert torch.allclose(gradients[0], gradient_by(rollout, settings, first), atol=1e-12)
    changed = replace(rollout, credit=replace(credit, choices=replace(choices, values=again)))
    assert torch.allclose(gradients[1], gradient_by(changed, settings, second), atol=1e-12)
    assert not torch.allclose(gradients[1], gradient_by(rollout, settings, second), rtol=0.1)

    moved = torch.cat([part.own for part in seen])
    others = torch.cat([part.others for part in seen])
    assert torch.equal(torch.cat([part.initial_states for part in seen]), plans.initial_states[9:])
    for i, n in enumerate(second.tolist()):
        length = int(rollout.completion_mask[n].sum())
        prompt = rollout.prompt_tokens[n // GROUP][rollout.prompt_mask[n // GROUP]]
        taken = rollout.completion_tokens[n, :length]
        with torch.no_grad():
            z = model(torch.cat([prompt, taken])[None], None, None, logits)[0] / 0.7
        for t in range(6):
            shift = 0.0
            if t < length:
                ids = [a for a in rollout.support[n, t].tolist() if a >= 0]
                mass = z[len(prompt) + t - 1][ids].softmax(dim=0) @ basis[ids, :3]
                mean, written = mass @ grid / mass.sum(), basis[taken[t], :3] @ grid
                shift = float(mean - written - 0.1 * before[n, t])
            assert moved[i, t].item() == pytest.approx(
                min(1.0, max(-1.0, float(plans.own[n, t]) + shift)), abs=1e-9
            )
            assert others[i, t].item() == pytest.approx(
                min(1.0, max(-1.0, float(plans.others[n, t]) + shift)), abs=1e-9
            )


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("is_padded", [True, False])
def test_neither_gradient_nor_metrics_depend_on_the_micro_batch_size(
    aggregation: str, is_padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off policy, clipped tokens and KL included; the rows have 1 to 7 tokens.

    Nor on how many rows of one prompt that leaves together, which share it where it is not padded.
    """
    monkeypatch.setattr(scoring, "SHARED_FROM", 1)
    old = as_matrix(slow_logprobs(a_model().double(), a_rollout(), CONFIG.temperature))
    drift = 0.6 * torch.randn(old.shape, generator=torch.Generator().manual_seed(5)).double()
    rollout = a_rollout(old_logprobs=old + drift, ref_logprobs=old - 2 * drift)
    if not is_padded:
        rollout = replace(rollout, prompt_mask=torch.ones_like(rollout.prompt_mask))
    config = replace(CONFIG, aggregation=aggregation, kl_beta=0.1)
    whole, model = replace(config, micro_batch_size=PROMPTS * GROUP), a_model().double()
    rows = torch.arange(PROMPTS * GROUP)
    sums, *others = accumulate_gradient(model, rollout, rows, whole)
    assert sums.num_clip_low > 2 and sums.num_clip_high > 2
    expected = gradient_of(model)
    rounding = 1e-14 * float(expected.abs().max())  # the same sums in another order
    for size in (1, 2, 3, 4, 7):
        again = a_model().double()
        smaller = replace(config, micro_batch_size=size)
        parts, *rest = accumulate_gradient(again, rollout, rows, smaller)
        assert torch.allclose(gradient_of(again), expected, rtol=0, atol=rounding)
        assert torch.allclose(parts.vector(), sums.vector(), rtol=1e-12)
        assert torch.allclose(torch.stack(rest), torch.stack(others), rtol=1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradients_of_minibatches_count_their_own_tokens(aggregation: str) -> None:
    """dapo: the whole gradient is the token-weighted mean of the parts', not their mean."""
    rollout, config = a_rollout(), replace(CONFIG, aggregation=aggregation)
    parts = [torch.arange(6), torch.arange(6, 15)]
    weight = [float(rollout.completion_mask[rows].sum()) for rows in parts]
    if aggregation != "dapo":
        weight = [6.0, 9.0]
    gradients = [gradient_by(rollout, config, rows) for rows in parts]
    mean = (weight[0] * gradients[0] + weight[1] * gradients[1]) / sum(weight)
    assert torch.allclose(gradient_by(rollout, config), mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_rank_without_rows_adds_exactly_nothing(
    aggregation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, aggregation=aggregation)
    rollout, rows = a_rollout(), torch.arange(PROMPTS * GROUP)
    expected = gradient_by(rollout, config)
    monkeypatch.setattr(update, "max_over_ranks", lambda value: value + 2)  # a rank with more
    assert torch.equal(gradient_by(rollout, config), expected)
    model = a_model().double()
    metrics, entropy, gap = accumulate_gradient(model, rollout, rows[:0], config)
    assert (gradient_of(model) == 0).all()
    assert metrics.num_tokens == 0 and metrics.loss == 0 and entropy == 0 and gap == 0


def steps_of(rollout: Rollout, config: GRPOConfig, step: int = 0) -> tuple[list[Tensor], Tensor]:
    """The gradients that reach the optimizer, and the weights after plain descent by them."""
    model, seen = a_model().double(), []
    descent = torch.optim.SGD(model.parameters())
    descent.register_step_pre_hook(lambda *_: seen.append(gradient_of(model)))
    update_policy(model, descent, rollout, config, step, 0.1)
    assert all(parameter.grad is None for parameter in model.parameters())
    return seen, weights_of(model)


def test_every_minibatch_is_one_step_from_the_weights_before() -> None:
    """Plain descent by hand: 2 epochs of 5 prompts in minibatches of 3 and 2."""
    config = replace(CONFIG, num_epochs=2, num_minibatches=2, max_grad_norm=1e9)
    old = as_matrix(slow_logprobs(a_model().double(), a_rollout(), CONFIG.temperature))
    rollout, model = a_rollout(old_logprobs=old), a_model().double()
    seen, weights = steps_of(rollout, config, step=3)
    expected = list(update.minibatches(rollout.prompt_places, config, 3))
    assert len(seen) == len(expected) == 4
    for rows, gradient in zip(expected, seen, strict=True):
        model.zero_grad()
        accumulate_gradient(model, rollout, rows, config)
        assert torch.allclose(gradient, gradient_of(model), rtol=0, atol=1e-12)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    assert torch.allclose(weights, weights_of(model), rtol=0, atol=1e-12)


def test_a_long_gradient_is_cut_to_the_norm_and_a_short_one_left_alone() -> None:
    rollout = a_rollout()
    plain = gradient_by(rollout, CONFIG)
    norm = float(plain.norm())
    for limit in (norm / 3, norm * 1.1):
        (got,), _ = steps_of(rollout, replace(CONFIG, max_grad_norm=limit))
        # 1e-5: the 1e-6 beside the norm, and the norm's own float32
        assert torch.allclose(got, plain * min(1.0, limit / norm), rtol=1e-5, atol=0)


def test_an_update_changes_nothing_but_the_model_and_its_optimizer() -> None:
    old = as_matrix(slow_logprobs(a_model().double(), a_rollout(), CONFIG.temperature))
    rollout = a_rollout(old_logprobs=old, ref_logprobs=old - 0.5)
    before = {k: v.clone() for k, v in vars(rollout).items() if isinstance(v, Tensor)}
    config = replace(CONFIG, num_epochs=2, num_minibatches=3, kl_beta=0.1)
    model = a_model().double()
    update_policy(model, adamw(model, 1.0, (0.9, 0.99), 0.1), rollout, config, 0, 0.01)
    assert not torch.equal(weights_of(model), weights_of(a_model().double()))
    for name, value in before.items():
        assert torch.equal(vars(rollout)[name].nan_to_num(7.0), value.nan_to_num(7.0)), name


def test_a_rollout_from_which_the_policy_has_drifted_makes_no_further_steps() -> None:
    """The drift of each minibatch by hand; a bound between the second's and the third's stops at 2.

    What is left is as if the rollout had no more minibatches.
    """
    old = as_matrix(slow_logprobs(a_model().double(), a_rollout(), CONFIG.temperature))
    rollout = a_rollout(old_logprobs=old)
    config = replace(CONFIG, num_minibatches=5, max_grad_norm=1e9)
    alone = a_model().double()
    descent, drifts, halfway = torch.optim.SGD(alone.parameters(), lr=1e-3), [], []
    for p in range(5):
        rows = torch.arange(3 * p, 3 * p + 3)
        now = as_matrix(slow_logprobs(alone, rollout, CONFIG.temperature))
        x = (now - old)[rows][rollout.completion_mask[rows]]
        drifts.append(float((x.exp() - x - 1).mean()))  # k3 of KL(old, now)
        halfway.append(weights_of(alone))
        alone.zero_grad()
        accumulate_gradient(alone, rollout, rows, config)
        descent.step()
    assert 0 == drifts[0] < drifts[1] < drifts[2]
    bound = (drifts[1] + drifts[2]) / 2
    for target, steps in ((0.0, 5), (bound, 2), (10 * max(drifts), 5)):
        model = a_model().double()
        report, _ = update_policy(
            model, torch.optim.SGD(model.parameters()), rollout,
            replace(config, target_kl=target), 0, 1e-3,
        )  # fmt: skip
        assert report["update/num_steps"] == steps
        seen = drifts[: min(5, steps + 1)]
        assert report["update/max_drift"] == pytest.approx(max(seen), rel=1e-9)
        wanted = weights_of(alone) if steps == 5 else halfway[steps]
        assert torch.allclose(weights_of(model), wanted, rtol=0, atol=1e-12)


def test_after_an_early_stop_means_are_over_what_was_looked_at() -> None:
    """The minibatch that ends it counts, those left out do not."""
    old = as_matrix(slow_logprobs(a_model().double(), a_rollout(), CONFIG.temperature))
    drift = 0.3 * torch.randn(old.shape, generator=torch.Generator().manual_seed(5)).double()
    drift[:GROUP] = 0.0  # the first minibatch is let through, and at a rate of 0 moves nothing
    rollout = a_rollout(old_logprobs=old + drift)
    config, model = replace(CONFIG, num_minibatches=5, target_kl=1e-9), a_model().double()
    report, _ = update_policy(model, torch.optim.SGD(model.parameters()), rollout, config, 0, 0.0)
    both = [torch.arange(GROUP), torch.arange(GROUP, 2 * GROUP)]
    found = [accumulate_gradient(model, rollout, rows, config) for rows in both]
    loss = sum(float(metrics.loss) for metrics, _, _ in found) / 2
    num_tokens = sum(float(metrics.num_tokens) for metrics, _, _ in found)
    per_token = sum(float(entropy) for _, entropy, _ in found) / num_tokens
    assert report["update/num_steps"] == 1
    assert report["loss/total"] == pytest.approx(loss, rel=1e-12)
    assert report["policy/entropy"] == pytest.approx(per_token, rel=1e-12)


def test_float32_weights_move_at_a_rate_of_1e_6() -> None:
    """Adam's first step has the size of the rate; lr of the optimizer is replaced by ours."""
    model, rollout = a_model(), a_rollout(torch.float32)
    before = weights_of(model)
    optimizer = adamw(model, 123.0, (0.9, 0.99), 0.0)
    update_policy(model, optimizer, rollout, CONFIG, 0, 1e-6)
    moved = (weights_of(model) - before).abs()
    assert (moved > 0).float().mean() > 0.5 and moved.max() < 2e-6


def test_a_drift_that_is_not_a_number_is_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    drifts = iter((0.1, math.nan, 0.2))
    monkeypatch.setattr(update, "drift_of", lambda metrics: next(drifts))
    model, config = a_model(), replace(CONFIG, num_minibatches=3)
    rollout = a_rollout(torch.float32, old_logprobs=torch.zeros(15, LONGEST))
    report, _ = update_policy(model, torch.optim.SGD(model.parameters()), rollout, config, 0, 0.0)
    assert math.isnan(report["update/max_drift"])


def test_nothing_moves_without_advantages_kl_and_decay() -> None:
    model, zeros = a_model(), torch.zeros(PROMPTS * GROUP).double()
    before, optimizer = weights_of(model), adamw(model, 1e-2, (0.9, 0.99), 0.0)
    config = replace(CONFIG, num_minibatches=2, num_epochs=3)
    for step in range(2):
        rollout = a_rollout(torch.float32, advantages=zeros, old_logprobs=torch.zeros(15, LONGEST))
        report, skipped = update_policy(model, optimizer, rollout, config, step, 1e-2)
        assert report["update/grad_norm"] == 0 and skipped == [False] * 6
    assert torch.equal(weights_of(model), before)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_step_without_a_finite_gradient_is_not_made(poison: float) -> None:
    """Of 5 minibatches the second and the fourth are poisoned: the rest are as if alone."""
    config, clean = replace(CONFIG, num_minibatches=5), a_rollout()
    advantages = clean.advantages.clone()
    advantages[[3, 11]] = poison
    model, alone = a_model().double(), a_model().double()
    optimizer = torch.optim.SGD(model.parameters())
    report, skipped = update_policy(
        model, optimizer, replace(clean, advantages=advantages), config, 0, 0.1
    )
    norms = []
    for rows in (torch.arange(0, 3), torch.arange(6, 9), torch.arange(12, 15)):
        alone.zero_grad()
        accumulate_gradient(alone, clean, rows, config)
        norms.append(float(gradient_of(alone).norm()))
        with torch.no_grad():
            for parameter in alone.parameters():
                parameter -= 0.1 * min(1.0, 1 / (norms[-1] + 1e-6)) * parameter.grad
    assert skipped == [False, True, False, True, False] and report["update/num_skipped"] == 2
    assert report["update/grad_norm"] == pytest.approx(sum(norms) / 3, rel=1e-5)
    assert torch.allclose(weights_of(model), weights_of(alone), rtol=0, atol=1e-6)


def test_a_skipped_step_leaves_adams_moments_alone() -> None:
    model = a_model()
    optimizer = adamw(model, 1e-2, (0.9, 0.99), 0.1)
    update_policy(model, optimizer, a_rollout(torch.float32), CONFIG, 0, 1e-2)
    weights = weights_of(model)
    state = [v.clone() for one in optimizer.state.values() for v in one.values()]
    bad = a_rollout(torch.float32, advantages=torch.full((PROMPTS * GROUP,), torch.nan).double())
    report, skipped = update_policy(model, optimizer, bad, CONFIG, 1, 1e-2)
    assert skipped == [True] and math.isnan(report["update/grad_norm"])
    assert torch.equal(weights_of(model), weights)
    after = [v for one in optimizer.state.values() for v in one.values()]
    assert all(torch.equal(a, b) for a, b in zip(after, state, strict=True))


def test_entropy_and_the_log_prob_gap_are_those_of_a_slow_loop() -> None:
    """A mean and a maximum over active tokens; garbage lies outside of the mask."""
    model, rollout = a_model().double(), a_rollout()
    rows = as_matrix(slow_logprobs(model, rollout, CONFIG.temperature))
    sampled = rollout.sampling_logprobs
    active = [(n, t) for n, t in rollout.completion_mask.nonzero().tolist()]
    now = max(abs(float(rows[n, t] - sampled[n, t])) for n, t in active)
    entropies = []
    for n, t in active:
        prompt = rollout.prompt_tokens[n // GROUP][rollout.prompt_mask[n // GROUP]]
        tokens = torch.cat([prompt, rollout.completion_tokens[n, :t]])
        with torch.no_grad():
            z = model(tokens[None], None, None, logits)[0, -1] / CONFIG.temperature
        weights = [math.exp(z[i]) for i in rollout.support[n, t].tolist() if i >= 0]
        q = [weight / sum(weights) for weight in weights]
        entropies.append(-sum(x * math.log(x) for x in q))
    frozen = torch.optim.SGD(model.parameters())
    done, _ = update_policy(model, frozen, rollout, CONFIG, 0, 0.0)
    assert done["policy/entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-9)
    assert done["rollout/logprob_gap_max"] == pytest.approx(now, rel=1e-9)

    old = sampled + 0.25 * torch.where(rollout.completion_mask, 1.0, 9.0)
    config = replace(CONFIG, num_minibatches=3, num_epochs=2)
    for row, largest in ((0, -0.5), (14, 0.5)):  # of the first minibatch and of the last
        there = old.clone()
        there[row, 0] = sampled[row, 0] + largest
        moved = replace(rollout, old_logprobs=there)
        done, _ = update_policy(model, frozen, moved, config, 0, 0.0)
        assert done["rollout/logprob_gap_max"] == pytest.approx(0.5, rel=1e-9)
        assert done["policy/entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-9)


@pytest.mark.parametrize("order", [1, -1])
def test_entropy_and_gap_are_those_of_all_ranks(
    order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank with as many tokens, thrice the entropy and a larger gap."""
    model, rollout = a_model().double(), a_rollout()
    frozen = torch.optim.SGD(model.parameters())
    alone, _ = update_policy(model, frozen, rollout, CONFIG, 0, 0.0)

    def gathered(rows: list[Tensor]) -> list[list[Tensor]]:
        return [rows, [rows[0], 3 * rows[1], rows[2] + 2]][::order]

    monkeypatch.setattr(update, "gather_rows", gathered)
    both, _ = update_policy(model, frozen, rollout, CONFIG, 0, 0.0)
    assert both["policy/entropy"] == pytest.approx(2 * alone["policy/entropy"])
    gap = alone["rollout/logprob_gap_max"]
    assert both["rollout/logprob_gap_max"] == pytest.approx(gap + 2)


def test_losses_are_means_over_steps_and_shares_are_over_tokens() -> None:
    old = as_matrix(slow_logprobs(a_model().double(), a_rollout(), CONFIG.temperature))
    drift = 0.6 * torch.randn(old.shape, generator=torch.Generator().manual_seed(5)).double()
    rollout = a_rollout(old_logprobs=old + drift, ref_logprobs=old - drift)
    config, model = replace(CONFIG, num_minibatches=2, kl_beta=0.1), a_model().double()
    frozen = torch.optim.SGD(model.parameters())
    got, _ = update_policy(model, frozen, rollout, config, 0, 0.0)
    parts = [
        accumulate_gradient(model, rollout, rows, config)[0]
        for rows in (torch.arange(9), torch.arange(9, 15))
    ]
    assert got["loss/total"] == pytest.approx(float(sum(p.loss for p in parts)) / 2, rel=1e-12)
    tokens = float(rollout.completion_mask.sum())
    clipped = float(sum(p.num_clip_low + p.num_clip_high for p in parts))
    assert clipped > 5 and got["loss/clip_fraction"] == pytest.approx(clipped / tokens, rel=1e-12)
    assert got["update/learning_rate"] == 0.0


HEALTHY = {
    "rollout/frac_zero_std_groups": 0.9,
    "rollout/frac_truncated": 0.04,
    "rollout/frac_valid": 0.6,
    "rollout/logprob_gap_max": 5e-4,
    "update/grad_norm": 1e-9,
    "update/num_skipped": 0.0,
    "update/num_steps": 4.0,
}


@pytest.mark.parametrize(
    "metric, value, told",
    [
        ("rollout/frac_zero_std_groups", 1.0, "every group has equal rewards"),
        ("rollout/frac_truncated", 0.06, "6% of the completions never stopped"),
        ("rollout/frac_valid", 0.4, "only 40% of the completions are valid"),
        ("rollout/logprob_gap_max", 2e-3, "differ by 2.0e-03 nats"),
        ("rollout/logprob_gap_max", math.nan, "differ by nan nats"),
        ("update/grad_norm", 0.0, "exactly 0"),
        ("update/num_skipped", 1.0, "1 of 4 optimizer steps had a gradient that is not finite"),
    ],
)
def test_each_sign_of_failure_is_told_alone(metric: str, value: float, told: str) -> None:
    config = GRPOConfig(matmul_precision="highest")
    assert warnings_of(HEALTHY, config, 4, is_on_cuda=True) == []
    (line,) = warnings_of(HEALTHY | {metric: value}, config, 4, is_on_cuda=True)
    assert line.startswith("WARNING step 5: ") and told in line


def test_equal_rewards_teach_where_every_choice_has_a_value_of_its_own() -> None:
    metrics = HEALTHY | {"rollout/frac_zero_std_groups": 1.0}
    for credit, num_lines in (("choice", 0), ("completion", 1)):
        config = GRPOConfig(credit=credit, advantage_std="batch")  # type: ignore[arg-type]
        assert len(warnings_of(metrics, config, 0, is_on_cuda=False)) == num_lines


@pytest.mark.parametrize(
    ("flags", "is_on_cuda", "limit"),
    [
        ({}, False, 1e-3),
        ({"matmul_precision": "high"}, False, 1e-3),
        ({"matmul_precision": "highest"}, True, 1e-3),
        ({}, True, 0.1),
        ({"matmul_precision": "high"}, True, 0.1),
        ({"matmul_precision": "medium"}, False, 1.0),
        ({"matmul_precision": "highest", "precision": "bfloat16"}, False, 1.0),
    ],
)
def test_a_gap_beyond_the_rounding_of_the_products_is_told(
    flags: dict[str, str], is_on_cuda: bool, limit: float
) -> None:
    config = GRPOConfig(**flags)  # type: ignore[arg-type]
    for gap, is_told in (0.9 * limit, False), (1.1 * limit, True), (math.nan, True):
        metrics = HEALTHY | {"rollout/logprob_gap_max": gap}
        assert bool(warnings_of(metrics, config, 0, is_on_cuda)) == is_told


def play(model: Transformer, worth: Callable[[Tensor], Tensor], num_steps: int) -> float:
    """A bandit: two prompts, one token, `worth` of it is the reward -> probability of token 3."""
    prompts, mask = torch.tensor([[7, 5], [2, 6]]), torch.tensor([[False, True], [True, True]])
    config = replace(CONFIG, prompts_per_step=2, group_size=16, temperature=1.5)
    optimizer = adamw(model, 1.0, (0.9, 0.99), 0.0)
    acting, stop = ActingPolicy(1.5, 0.95, VOCAB), StopRule((0,), 0, 1)
    for step in range(num_steps):
        uniforms = torch.rand(32, 1, generator=torch.Generator().manual_seed(step))
        done = sample_completions(model, prompts, mask, 16, acting, stop, uniforms)
        rewards = worth(done.tokens[:, 0]).double()
        rollout = Rollout(
            prompt_tokens=prompts,
            prompt_mask=mask,
            completion_tokens=done.tokens,
            completion_mask=done.mask,
            support=done.support,
            sampling_logprobs=done.sampling_logprobs,
            old_logprobs=None,
            ref_logprobs=None,
            rewards=rewards,
            advantages=group_advantages(rewards, 16, "group"),
            prompt_places=torch.arange(2),
            group_size=16,
            max_length=1,
        )
        update_policy(model, optimizer, rollout, config, step, 0.1)
    with torch.no_grad():
        tokens = torch.full((2, 1), 3)
        scores = completion_scores(model, prompts, mask, tokens, None, 1.5)
    return float(scores.logprobs.exp().mean())


def test_a_bandit_learns_the_rewarded_token_and_unlearns_the_punished_one() -> None:
    def likes_three(tokens: Tensor) -> Tensor:
        return (tokens == 3).double()

    def near_uniform() -> Transformer:
        model = a_model()
        with torch.no_grad():
            model.head.weight /= 15.0
        return model

    before = play(near_uniform(), likes_three, 0)
    assert 0.02 < before < 0.3
    assert play(near_uniform(), likes_three, 20) > 0.9
    assert play(near_uniform(), lambda tokens: -likes_three(tokens), 20) < 0.02
    model = near_uniform()
    play(model, lambda tokens: torch.full(tokens.shape, 0.1), 3)
    assert torch.equal(weights_of(model), weights_of(near_uniform()))


@pytest.mark.parametrize(
    "bad, ended",
    [
        ((2, 3, 4), 2),
        ((1, 2, 3), 2),  # the fourth, of the same rollout, is good
        ((1, 2, 4, 5), None),
        ((2, 4, 6), None),
        ((4, 5, 6), 3),
    ],
)
def test_training_ends_at_the_third_step_in_a_row_that_is_skipped(
    bad: tuple[int, ...], ended: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollouts of two optimizer steps: those in a row may belong to two rollouts."""
    count, norm = 0, optim.gradient_norm

    def sometimes_nan(model: Transformer) -> float:
        nonlocal count
        count += 1
        return math.nan if count in bad else norm(model)

    monkeypatch.setattr(optim, "gradient_norm", sometimes_nan)
    flags = (
        f"--init {untrained_checkpoint(tmp_path / 'sft')} --save-dir {tmp_path / 'grpo'} --steps 3 "
        "--prompts-per-step 2 --group-size 2 --num-minibatches 2 --eval-cases 8 --eval-every 99 "
        "--device cpu --micro-batch-size 4"
    ).split()
    if ended:
        with pytest.raises(FloatingPointError, match=r"^3 optimizer steps in a row"):
            train_grpo.main(flags)
    else:
        train_grpo.main(flags)
    lines = map(json.loads, (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines())
    skipped = [int(line["update/num_skipped"]) for line in lines if line["step"] > 0]
    assert skipped == [
        sum(2 * i - 1 <= n <= 2 * i for n in bad) for i in range(1, (ended or 3) + 1)
    ]
    kept = sorted(path.name for path in (tmp_path / "grpo" / "skipped").iterdir())
    assert kept == [
        f"step-{step:06d}-rank-0.safetensors" for step in sorted({(n + 1) // 2 for n in bad})
    ]
