"""One batch of experience against loops over single prompts, texts and rows."""

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks.full_softmax import scored_by_the_whole_softmax
from minigrpo import rollout as rollout_module
from minigrpo import update as update_module
from minigrpo.config import GRPOConfig
from minigrpo.counterfactual import ChoiceSimulator, later_values
from minigrpo.data import Prompts, Task, make_prompts, make_task, token_uniforms
from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.lqr import QuadraticCost, trajectory_cost
from minigrpo.optim import adamw
from minigrpo.policy import ActingPolicy
from minigrpo.prompts import Codec
from minigrpo.reward import Rewards, Tally
from minigrpo.rollout import (
    Experience,
    Rollout,
    choices_of,
    make_rollout,
    minibatches,
    rollout_metrics,
    sample_records,
    write_plans,
)
from minigrpo.sampling import StopRule, sample_completions
from minigrpo.scoring import completion_scores
from minigrpo.tokenizer import control_values, number_tokenizer
from minigrpo.transformer import Transformer, TransformerConfig, initialise, logits
from minigrpo.update import accumulate_gradient, update_policy

HORIZON, PROMPT_LENGTH = 3, 5
PLANT = DoubleIntegrator(horizon=HORIZON, control_bound=1.0, start_decimals=1)
CODEC = Codec("numbers", 1)
TOKENIZER = number_tokenizer(PLANT, CODEC)
TASK: Task = make_task(PLANT, QuadraticCost(), CODEC, TOKENIZER)
VOCAB, EOS = len(TOKENIZER), TOKENIZER.eos_token_id
STARTS = torch.tensor(
    [[0.5, -0.3], [-0.8, 0.1], [0.2, 0.2], [0.5, -0.3], [0.0, 0.7]], dtype=torch.float64
)
PROMPTS = make_prompts(STARTS, torch.tensor([3, 4, 5, 6, 7]), TASK)  # two are the same start
CONFIG = GRPOConfig(
    prompts_per_step=5, group_size=3, micro_batch_size=4, rows_per_batch=7, temperature=1.2,
    top_p=0.95, support_size=17, seed=2, kl_beta=0.0,
)  # fmt: skip


class Writer(Transformer):
    """A random model that writes numbers only, and EOS after the third: rarely malformed text."""

    def forward(self, tokens, mask, cache, output, shared=None):
        first = (cache.length if cache else 0) - (PROMPT_LENGTH - 1)  # place of the next token
        places = torch.arange(first, first + tokens.shape[1])
        allowed = torch.full((2, VOCAB), -30.0)
        numbers = [i for token, i in TOKENIZER.get_vocab().items() if token[-1].isdigit()]
        allowed[0, numbers] = 0.0
        allowed[0, EOS] = -2.0  # too early, sometimes
        allowed[1, EOS] = 7.0  # mostly, but not always in time
        allowed[1, numbers] = 0.0
        wanted = torch.nn.functional.one_hot((places >= HORIZON).long(), 2).float()  # [Q, 2]

        def restricted(hidden, head_weight):
            wider = torch.cat([hidden, wanted.expand(len(hidden), -1, -1).to(hidden)], dim=-1)
            return output(wider, torch.cat([head_weight, allowed.T.to(head_weight)], dim=1))

        return super().forward(tokens, mask, cache, restricted)


def a_model(seed: int = 1) -> Writer:
    model = Writer(TransformerConfig("llama", VOCAB, 16, 24, 2, 2, 2, 8, tied_head=False))
    initialise(model, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.head.weight *= 30.0
        model.embed.weight *= 20.0
    return model


def final_distance(tally: Tally, is_valid: Tensor) -> Rewards:
    """Depends on the start and on every control; 0 for malformed text."""
    valid = is_valid.double()
    parts = {"bonus": 10 * valid, "distance": valid * tally.final.double()}
    return Rewards(parts, parts["bonus"] + parts["distance"])


def rolled(
    config: GRPOConfig = CONFIG,
    prompts: Prompts = PROMPTS,
    places: Tensor | None = None,
    model: Transformer | None = None,
    reference: Transformer | None = None,
) -> tuple[Rollout, Experience]:
    where = torch.arange(len(prompts.texts)) if places is None else places
    rollout, experience, seconds = make_rollout(
        a_model() if model is None else model, reference, prompts, where, config, TASK,
        final_distance,
    )  # fmt: skip
    assert min(seconds.values()) > 0
    return rollout, experience


def chosen_prompts(places: list[int]) -> Prompts:
    return make_prompts(STARTS[places], PROMPTS.indices[places], TASK)


def reward_by_hand(prompt: str, text: str, ended: bool) -> float:
    """Start and controls are read from the texts, the plant is a scalar loop."""
    words = text.split()
    numbers = [word for word in words if word.removeprefix("-")[:1].isdigit()]
    if not ended or len(words) != HORIZON or numbers != words:
        return 0.0
    position, velocity = float(prompt.split()[1]), float(prompt.split()[3])
    for word in words:
        position += 0.1 * velocity + 0.005 * float(word)
        velocity += 0.1 * float(word)
    return 10 + math.hypot(position, velocity)


def test_each_completion_is_scored_on_its_own_start_and_compared_within_its_group() -> None:
    rollout, experience = rolled()
    assert len(rollout.rewards) == 15
    by_hand = []
    for n, text in enumerate(experience.texts):
        ended = bool(experience.completions.ended[n])
        by_hand.append(reward_by_hand(PROMPTS.texts[n // 3], text, ended))
        assert bool(experience.parsed.is_valid[n]) == (by_hand[-1] != 0)
        assert torch.equal(rollout.prompt_tokens[n // 3], PROMPTS.tokens[n // 3])
        assert torch.equal(experience.trajectories.states[n, 0], STARTS[n // 3])
    assert rollout.rewards.tolist() == pytest.approx(by_hand, abs=1e-12)
    assert by_hand.count(0.0) in range(1, 9)  # malformed rows exist, and they stay
    for p in range(5):
        group = by_hand[3 * p : 3 * p + 3]
        mean = sum(group) / 3
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / 2)
        for g, reward in enumerate(group):
            expected = (reward - mean) / (std + 1e-4)
            assert float(rollout.advantages[3 * p + g]) == pytest.approx(expected, abs=1e-9)


def test_a_row_holds_the_tokens_of_its_own_prompt_and_draw() -> None:
    """Row p * G + g alone: prompt p, with line g of the uniforms that its index gives."""
    rollout, experience = rolled()
    model, done = a_model(), experience.completions
    acting, stop = ActingPolicy(1.2, 0.95, 17), StopRule((EOS,), 0, TASK.max_completion_length)
    for p in range(5):
        uniforms = token_uniforms(2, PROMPTS.indices[p : p + 1], 3, TASK.max_completion_length)
        for g in range(3):
            tokens, mask = PROMPTS.tokens[p : p + 1], PROMPTS.mask[p : p + 1]
            one = sample_completions(model, tokens, mask, 1, acting, stop, uniforms[g : g + 1])
            n, length = 3 * p + g, int(one.mask.sum())
            assert torch.equal(done.tokens[n, :length], one.tokens[0])
            assert int(rollout.completion_mask[n].sum()) == length
            assert bool(done.ended[n]) == bool(one.ended[0])
    assert rollout.completion_tokens is done.tokens and rollout.support is done.support
    assert rollout.sampling_logprobs is done.sampling_logprobs
    # equal starts are two prompts: other draws, other groups
    assert PROMPTS.texts[0] == PROMPTS.texts[3]
    assert not torch.equal(done.tokens[0:3], done.tokens[9:12])


def test_a_plan_whose_end_was_not_sampled_is_malformed() -> None:
    task = replace(TASK, max_completion_length=HORIZON)  # all its controls, and no room for EOS
    uniforms = token_uniforms(2, PROMPTS.indices, 3, HORIZON)
    acting = ActingPolicy(1.2, 0.95, 17)
    done, texts, parsed = write_plans(a_model(), PROMPTS, 3, task, acting, uniforms, 7)
    is_written = torch.tensor([len(text.split()) == HORIZON for text in texts])
    assert is_written.sum() > 3 and not done.ended[is_written].any()
    assert not parsed.is_valid.any()


def rows_of(places: list[int]) -> list[int]:
    return [3 * p + g for p in places for g in range(3)]


@pytest.mark.parametrize("num_minibatches", [1, 2])
@pytest.mark.parametrize("places", [[4, 2, 0, 3, 1], [0, 2, 4], [1, 3]])
def test_permuting_or_leaving_out_prompts_permutes_or_leaves_out_groups(
    places: list[int], num_minibatches: int
) -> None:
    """The second case are the shares of two ranks. float32 rounds differently in other batches."""
    config = replace(CONFIG, num_epochs=2, num_minibatches=num_minibatches)
    rollout, experience = rolled(reference=a_model(7), config=config)
    part, text = rolled(config, chosen_prompts(places), torch.tensor(places), None, a_model(7))
    rows, width = rows_of(places), part.completion_tokens.shape[1]
    assert text.texts == [experience.texts[n] for n in rows]
    assert torch.equal(part.prompt_tokens, rollout.prompt_tokens[places])
    for name in ("rewards", "advantages"):
        assert torch.equal(getattr(part, name), getattr(rollout, name)[rows]), name
    for name in ("completion_tokens", "completion_mask"):
        assert torch.equal(getattr(part, name), getattr(rollout, name)[rows, :width]), name
    mask = part.completion_mask
    for name in ("sampling_logprobs", "old_logprobs", "ref_logprobs"):
        got, expected = getattr(part, name), getattr(rollout, name)[rows, :width]
        assert torch.allclose(got[mask], expected[mask], rtol=0, atol=1e-5), name


def test_padding_of_prompts_reaches_all_log_probs_and_no_mask_says_that_there_is_none() -> None:
    mask = PROMPTS.mask.clone()
    mask[[1, 3], :2] = False
    config = replace(CONFIG, num_minibatches=2)
    rollout, done = rolled(config, replace(PROMPTS, mask=mask), reference=a_model(7))
    assert torch.equal(rollout.prompt_mask, mask)
    parts = (rollout.completion_tokens, rollout.support, config.temperature)
    written = rollout.completion_mask
    for model, got in ((a_model(), rollout.old_logprobs), (a_model(7), rollout.ref_logprobs)):
        with torch.no_grad():
            wanted, unmasked = (
                completion_scores(model, rollout.prompt_tokens, seen, *parts).logprobs
                for seen in (rollout.prompt_mask, None)
            )
        assert torch.allclose(got[written], wanted[written], rtol=0, atol=1e-5)
        assert (got - unmasked)[written].abs().max() > 1e-2
    unpadded, other = rolled(config)
    assert unpadded.prompt_mask is None and other.texts != done.texts


def test_the_batch_std_is_that_of_the_raw_rewards_of_all_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others = torch.tensor([100.0, -20.0, 3.0]).double()
    monkeypatch.setattr(rollout_module, "gather_rows", lambda rows: [rows, [others]])
    rollout, _ = rolled(replace(CONFIG, advantage_std="batch"))
    std = torch.cat([rollout.rewards, others]).std()
    groups = rollout.rewards.view(5, 3)
    expected = (groups - groups.mean(dim=1, keepdim=True)) / (std + 1e-4)
    assert torch.allclose(rollout.advantages, expected.view(15), rtol=1e-12)


def test_old_log_probs_are_there_unless_the_rollout_feeds_one_step() -> None:
    assert rolled()[0].old_logprobs is None and rolled()[0].ref_logprobs is None
    for change in ({"num_epochs": 2}, {"num_minibatches": 2}):
        rollout, _ = rolled(replace(CONFIG, **change))
        gap = (rollout.old_logprobs - rollout.sampling_logprobs)[rollout.completion_mask]
        assert gap.abs().max() < 1e-4 and not rollout.old_logprobs.requires_grad


def test_the_reference_scores_with_its_own_weights_and_is_left_alone() -> None:
    reference, model = a_model(7), a_model()
    rollout, _ = rolled(replace(CONFIG, kl_beta=0.1), model=model, reference=reference)
    parts = (rollout.prompt_tokens, rollout.prompt_mask, rollout.completion_tokens, rollout.support)
    mask = rollout.completion_mask
    with torch.no_grad():
        expected = completion_scores(a_model(7), *parts, 1.2).logprobs
    assert torch.allclose(rollout.ref_logprobs[mask], expected[mask], rtol=0, atol=1e-5)
    assert (rollout.ref_logprobs - rollout.sampling_logprobs)[mask].abs().max() > 0.1
    before = [p.clone() for p in reference.parameters()]
    optimizer = adamw(model, 1e-2, (0.9, 0.99), 0.1)
    update_policy(model, optimizer, rollout, CONFIG, 0, 1e-2)
    for p, q in zip(reference.parameters(), before, strict=True):
        assert torch.equal(p, q) and p.grad is None


def test_every_rollout_comes_from_the_weights_of_its_time() -> None:
    """M18: a stale sampler or cache would be seen in the log-probs, as would a stale scorer."""
    model, config = a_model(), replace(CONFIG, num_minibatches=2)
    optimizer = adamw(model, 1e-2, (0.9, 0.99), 0.0)
    sampled = []
    for step in range(3):
        rollout, _ = rolled(config, model=model)
        mask = rollout.completion_mask
        gap = (rollout.sampling_logprobs - rollout.old_logprobs)[mask]
        assert gap.abs().max() < 1e-4
        sampled.append(rollout.sampling_logprobs[mask].sum())
        update_policy(model, optimizer, rollout, config, step, 1e-2)
        support = rollout.support
        parts = (rollout.prompt_tokens, rollout.prompt_mask, rollout.completion_tokens, support)
        with torch.no_grad():
            now = completion_scores(model, *parts, 1.2).logprobs
        assert (now - rollout.old_logprobs)[mask].abs().max() > 0.01
    assert len({round(float(value), 3) for value in sampled}) == 3


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_minibatches", [1, 2])
def test_the_ratio_is_exactly_1_before_the_first_step(precision: str, num_minibatches: int) -> None:
    """Minibatches of 9 and 6 rows, micro-batches of 4: the scoring pass has the same shapes.

    Each minibatch is taken at the first weights, where in bfloat16 another shape is another value.
    """
    config = replace(CONFIG, precision=precision, num_minibatches=num_minibatches, num_epochs=2)
    model = a_model()
    rollout, _ = rolled(config, model=model)
    for rows in list(minibatches(rollout.prompt_places, config, 0))[:num_minibatches]:
        sums, _, gap = accumulate_gradient(model, rollout, rows, config)
        assert sums.ratio_min == 1 and sums.ratio_max == 1 and sums.ratio_sum == sums.num_tokens
        assert sums.num_clip_low == 0 and sums.num_clip_high == 0 and sums.approx_kl == 0
        assert gap < (1e-4 if precision == "float32" else 0.5)
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert gradients.abs().max() > 1e-3


def test_the_scoring_pass_goes_over_the_rows_as_the_first_epoch_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """9 and 6 rows in micro-batches of 4: on a GPU, another shape is another value."""
    config, model, seen = replace(CONFIG, num_minibatches=2, num_epochs=2), a_model(), []

    def spy(*arguments: object, **named: bool) -> object:
        seen.append(arguments[3])
        return completion_scores(*arguments, **named)

    monkeypatch.setattr(rollout_module, "completion_scores", spy)
    monkeypatch.setattr(update_module, "completion_scores", spy)
    rollout, _ = rolled(config, model=model)
    scored = len(seen)
    frozen = torch.optim.SGD(model.parameters())
    update_policy(model, frozen, rollout, config, 0, 0.0)
    assert [len(rows) for rows in seen[:scored]] == [4, 4, 1, 4, 2]
    for then, now in zip(seen[:scored], seen[scored : 2 * scored], strict=True):
        assert torch.equal(then, now)


def test_the_whole_softmax_of_the_study_forgets_the_support(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sampler and support are the same; all log-probs lose what the nucleus renormalised."""
    config = replace(CONFIG, num_epochs=2, top_p=0.5)
    ours, experience = rolled(config, reference=a_model())
    for module in (rollout_module, update_module):
        monkeypatch.setattr(module, "completion_scores", scored_by_the_whole_softmax)
    model = a_model()
    whole, _ = rolled(config, model=model, reference=a_model())
    mask, kept = ours.completion_mask, experience.completions.kept_mass
    assert torch.equal(ours.completion_tokens, whole.completion_tokens) and kept[mask].min() < 0.9
    for name in ("old_logprobs", "ref_logprobs"):
        lost = getattr(whole, name) - getattr(ours, name)
        torch.testing.assert_close(lost[mask], kept[mask].log(), rtol=1e-4, atol=1e-5)
    update_policy(model, torch.optim.SGD(model.parameters()), whole, config, 0, 0.0)


def test_autocast_reaches_sampler_old_and_reference() -> None:
    """Rounding to bfloat16 is seen in all three log-probs, and sampling cannot be float32 alone."""
    plain, _ = rolled(replace(CONFIG, num_epochs=2), reference=a_model(7))
    half, _ = rolled(replace(CONFIG, num_epochs=2, precision="bfloat16"), reference=a_model(7))
    same = (plain.completion_tokens[:, :1] == half.completion_tokens[:, :1]).flatten()
    assert same.float().mean() > 0.7
    for name in ("sampling_logprobs", "old_logprobs", "ref_logprobs"):
        a, b = getattr(plain, name)[same, 0], getattr(half, name)[same, 0]
        assert a.dtype == b.dtype == torch.float32
        assert 1e-4 < (a - b).abs().max() < 0.3, name


def every_prompt(places: Tensor, config: GRPOConfig, step: int) -> Iterator[list[int]]:
    """The rows of each minibatch as prompts; groups must be whole."""
    for rows in minibatches(places, config, step):
        prompts = rows[:: config.group_size] // config.group_size
        whole = [3 * p + g for p in prompts.tolist() for g in range(3)]
        assert rows.tolist() == whole
        yield prompts.tolist()


@pytest.mark.parametrize("num_minibatches, sizes", [(1, [5]), (2, [3, 2]), (3, [2, 2, 1])])
def test_each_epoch_deals_every_prompt_once_the_first_in_order(
    num_minibatches: int, sizes: list[int]
) -> None:
    config = replace(CONFIG, num_epochs=4, num_minibatches=num_minibatches)
    dealt = list(every_prompt(torch.arange(5), config, 9))
    epochs = [dealt[i : i + num_minibatches] for i in range(0, len(dealt), num_minibatches)]
    assert len(epochs) == 4
    for epoch in epochs:
        assert [len(part) for part in epoch] == sizes
        assert sorted(p for part in epoch for p in part) == [0, 1, 2, 3, 4]
    assert [p for part in epochs[0] for p in part] == [0, 1, 2, 3, 4]
    if num_minibatches > 1:
        assert len({str(epoch) for epoch in epochs}) > 2
        assert dealt == list(every_prompt(torch.arange(5), config, 9))
        for change in ({"step": 10}, {"seed": 3}):
            step, other = change.get("step", 9), replace(config, seed=change.get("seed", 2))
            again = list(every_prompt(torch.arange(5), other, step))
            assert again[:num_minibatches] == dealt[:num_minibatches] and again != dealt


def test_ranks_share_the_minibatches_of_one_process() -> None:
    config = replace(CONFIG, num_epochs=3, num_minibatches=2)
    whole = list(every_prompt(torch.arange(5), config, 1))
    shares = [torch.arange(rank, 5, 2) for rank in range(2)]
    parts = [list(every_prompt(share, config, 1)) for share in shares]
    for expected, *got in zip(whole, *parts, strict=True):
        places = [int(share[p]) for share, part in zip(shares, got, strict=True) for p in part]
        assert sorted(places) == sorted(expected)


def test_metrics_are_those_of_slow_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Malformed, cut off and constant groups included; two equal ranks have the same means."""
    rollout, experience = rolled(replace(CONFIG, support_size=9, seed=6))
    rewards = rollout.rewards.clone()
    rewards[3:6] = 1.5 + torch.tensor([0.0, 1e-9, 0.0]).double()  # equal but for rounding
    rollout = replace(rollout, rewards=rewards)
    done = experience.completions
    rows = range(15)
    tokens = [(n, t) for n in rows for t in range(done.mask.shape[1]) if done.mask[n, t]]
    groups = [rewards[i : i + 3].tolist() for i in range(0, 15, 3)]
    std = [math.sqrt(sum((r - sum(g) / 3) ** 2 for r in g) / 2) for g in groups]
    states = experience.trajectories.states
    parts = experience.rewards.components
    expected = {
        "reward/total": sum(float(r) for r in rewards) / 15,
        "reward/bonus": sum(float(parts["bonus"][n]) for n in rows) / 15,
        "reward/distance": sum(float(parts["distance"][n]) for n in rows) / 15,
        "rollout/final_error": sum(math.hypot(*states[n, -1].tolist()) for n in rows) / 15,
        "rollout/frac_valid": sum(bool(experience.parsed.is_valid[n]) for n in rows) / 15,
        "rollout/frac_truncated": sum(not bool(done.ended[n]) for n in rows) / 15,
        "rollout/completion_length": len(tokens) / 15,
        "rollout/abs_advantage": sum(abs(float(rollout.advantages[n])) for n, _ in tokens)
        / len(tokens),
        "rollout/frac_zero_std_groups": sum(s < 1e-6 for s in std) / 5,
        "rollout/group_reward_std": sum(std) / 5,
        "rollout/support_mass": sum(float(done.kept_mass[i]) for i in tokens) / len(tokens),
        "rollout/frac_capped_support": sum(bool(done.is_capped[i]) for i in tokens) / len(tokens),
        "rollout/num_tokens": len(tokens),
    }
    assert 0 < expected["rollout/frac_truncated"] < 0.5 and 0 < expected["rollout/frac_valid"] < 1
    assert 0 < expected["rollout/frac_capped_support"] < 1 and len(tokens) < done.mask.numel()
    assert rollout_metrics(rollout, experience) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(rollout_module, "sum_over_ranks", lambda value: 2 * value)
    expected["rollout/num_tokens"] *= 2
    assert rollout_metrics(rollout, experience) == pytest.approx(expected, rel=1e-12)


def test_sample_records_show_whole_groups_with_their_own_numbers() -> None:
    rollout, experience = rolled()
    first, second = sample_records(PROMPTS, experience, rollout)
    assert [first["prompt"], second["prompt"]] == list(PROMPTS.texts[:2])
    assert len(first["completions"]) == len(second["completions"]) == 3
    for n, shown in enumerate([*first["completions"], *second["completions"]]):
        assert shown["text"] == experience.texts[n]
        assert shown["is_valid"] == bool(experience.parsed.is_valid[n])
        assert shown["reward"] == float(rollout.rewards[n]) == sum(shown["components"].values())
        assert shown["advantage"] == float(rollout.advantages[n])
    assert len(sample_records(chosen_prompts([2]), experience, rollout)) == 1


def test_the_seconds_of_a_rollout_end_sampling_where_scoring_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(perf_counter=iter([100.0, 103.0, 108.0]).__next__)
    monkeypatch.setattr(rollout_module, "time", clock)
    rest = (PROMPTS, torch.arange(5), CONFIG, TASK, final_distance)
    *_, seconds = make_rollout(a_model(), None, *rest)
    assert seconds == {"time/sampling_s": 3.0, "time/scoring_s": 5.0}


def test_a_rollout_changes_no_weight_and_leaves_no_gradient() -> None:
    model = a_model()
    rolled(replace(CONFIG, num_epochs=2), model=model)
    for p, q in zip(model.parameters(), a_model().parameters(), strict=True):
        assert torch.equal(p, q) and p.grad is None


@pytest.mark.parametrize(
    "field, value",
    [("advantages", torch.zeros(14)), ("ref_logprobs", torch.zeros(15, 9)),
     ("support", torch.zeros(15, 2, 4)), ("prompt_places", torch.arange(4))],
)  # fmt: skip
def test_a_rollout_with_parts_that_do_not_fit_is_refused(field: str, value: Tensor) -> None:
    with pytest.raises(ValueError, match=f"{field} must have shape"):
        replace(rolled()[0], **{field: value})
    with pytest.raises(ValueError, match="groups must have shape"):
        replace(rolled()[0], group_size=5)


def test_choices_are_of_what_an_answer_may_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def spy(*given: object) -> torch.Tensor:
        seen.extend(given)
        return control_values(*given)

    monkeypatch.setattr(rollout_module, "control_values", spy)
    rolled(replace(CONFIG, credit="choice", advantage_std="batch"))
    assert seen == [TOKENIZER, VOCAB, PLANT, CODEC]


@pytest.mark.parametrize("std", ["batch", "none"])
def test_credit_for_choices_reaches_the_rollout_in_units_of_the_rewards(std, monkeypatch) -> None:
    config = replace(CONFIG, credit="choice", credit_lambda=0.6, advantage_std=std)
    more = torch.tensor([3.0, -2.0, 5.0], dtype=torch.float64)  # another rank's rewards
    monkeypatch.setattr(rollout_module, "gather_rows", lambda rows: [rows, [more]])
    rollout, experience = rolled(config)
    raw = choices_of(experience, VOCAB, TASK, config, final_distance)
    # The mean over q of every sampled position, by a loop over the vocabulary.
    tokens, mask = rollout.completion_tokens, rollout.completion_mask
    of_rows = rollout.prompt_tokens.repeat_interleave(3, 0)
    everything = torch.cat([of_rows, tokens[:, :-1]], dim=1)
    z = a_model()(everything, None, None, logits)[:, PROMPT_LENGTH - 1 :] / config.temperature
    expected = torch.zeros(mask.shape)
    for n, c in mask.nonzero().tolist():
        ids = [i for i in rollout.support[n, c].tolist() if i >= 0]
        q = z[n, c, ids].softmax(dim=0)
        expected[n, c] = (q * (raw.values[n, c] * raw.basis[ids]).sum(dim=-1)).sum()
    later = later_values(raw, tokens, expected, 0.6)
    scale = {
        "batch": (1 / (torch.cat([rollout.rewards, more]).std() + 1e-4)).expand(5),
        "none": torch.ones(5),
    }[std].double().repeat_interleave(3)[:, None]  # fmt: skip
    wanted = torch.where(mask, later * scale, 0.0)
    got = torch.where(mask, rollout.advantages, 0.0)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=2e-4)
    assert got.abs().max() > 0.1
    assert rollout.credit is not None and rollout.old_logprobs is None
    assert torch.equal(rollout.credit.choices.values, raw.values)
    torch.testing.assert_close(rollout.credit.unit, scale[:, 0].float())
    assert rolled(CONFIG)[0].credit is None


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_no_plan_moves_at_the_weights_that_sampled_and_all_do_at_others(precision: str) -> None:
    """Simulated again before the second optimizer step, the values are those of the rollout."""
    config = replace(
        CONFIG, credit="choice", advantage_std="batch", num_minibatches=2, precision=precision
    )
    model = a_model()
    rollout, _ = rolled(config, model=model)
    assert rollout.credit is not None
    assert rollout.credit.mean_offsets[rollout.completion_mask].abs().max() > 0.3
    choices, seen = rollout.credit.choices, []

    class Watched(ChoiceSimulator):
        def values_of(self, plans, length):
            found = super().values_of(plans, length)
            seen.append((plans.own, found.values))
            return found

    watched = replace(choices, simulator=Watched(**vars(choices.simulator)))
    rollout = replace(rollout, credit=replace(rollout.credit, choices=watched))
    again = torch.arange(9, 15)  # the last two of five groups
    for rate, is_still in ((0.0, True), (0.3, False)):
        seen.clear()
        descent = torch.optim.SGD(model.parameters())
        update_policy(model, descent, rollout, config, 0, rate)
        own, values = (torch.cat(parts) for parts in zip(*seen, strict=True))
        distance = (own - choices.plans.own[again]).abs().max()
        assert distance < 1e-5 if is_still else distance > 1e-3
        if is_still:
            close = (values - choices.values[again]).abs().max()
            assert close < 1e-3 < choices.values[again].abs().max()


def test_dr_grpo_divides_by_what_the_task_allows_and_dapo_by_what_was_written() -> None:
    found, places = [], torch.arange(5)
    task = replace(TASK, max_completion_length=101)  # no completion is as long
    for aggregation in ("dapo", "dr_grpo"):
        model, config = a_model(), replace(CONFIG, aggregation=aggregation, temperature=4.0)
        rollout, *_ = make_rollout(model, None, PROMPTS, places, config, task, final_distance)
        accumulate_gradient(model, rollout, torch.arange(15), config)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert rollout.completion_tokens.shape[1] < 101
    written, allowed = int(rollout.completion_mask.sum()), 15 * 101
    assert found[0].abs().max() > 1e-3
    assert torch.allclose(found[0] * written, found[1] * allowed, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_choices_does_not_depend_on_micro_batches_or_minibatch_scoring() -> None:
    config = replace(CONFIG, credit="choice", advantage_std="batch", micro_batch_size=15)
    found = []
    for changed in (config, replace(config, micro_batch_size=2), replace(config, num_epochs=2)):
        model, rollout = a_model(), rolled(changed)[0]
        accumulate_gradient(model, rollout, torch.arange(15), changed)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    largest = found[0].abs().max()
    assert largest > 1e-3
    for other in found[1:]:
        assert (other - found[0]).abs().max() < 1e-4 * largest


def test_choices_without_credit_for_each_token_and_texts_of_other_tokens_are_refused() -> None:
    config = replace(CONFIG, credit="choice", advantage_std="batch")
    rollout, experience = rolled(config)
    with pytest.raises(ValueError, match=r"advantages must have shape \[N, C\] with N=15"):
        replace(rollout, advantages=rollout.rewards)
    with pytest.raises(ValueError, match=r"advantages must have shape \[N\] with N=15"):
        replace(rollout, credit=None)
    credit = rollout.credit
    for name in ("unit", "mean_offsets"):
        with pytest.raises(ValueError, match=r"must have shape \[N.* with .*N=(3|15).*, got"):
            replace(credit, **{name: getattr(credit, name)[:3]})
    parsed = replace(experience.parsed, is_valid=~experience.parsed.is_valid)
    with pytest.raises(ValueError, match="must agree on what is well-formed"):
        choices_of(replace(experience, parsed=parsed), VOCAB, TASK, config, final_distance)


def test_a_sample_with_choices_shows_the_advantage_of_each_token() -> None:
    rollout, experience = rolled(replace(CONFIG, credit="choice", advantage_std="batch"))
    (record,) = sample_records(chosen_prompts([0]), experience, rollout)
    shown = [one["advantage"] for one in record["completions"]]
    assert shown == rollout.advantages[:3].tolist() and rollout.advantages[:3].any()


def test_choices_are_refused_where_rewards_are_not_of_the_simulator() -> None:
    config = replace(CONFIG, credit="choice", advantage_std="batch")
    _, experience = rolled(config)
    choices_of(experience, VOCAB, TASK, config, final_distance)
    rewards = replace(experience.rewards, total=experience.rewards.total + 0.01)
    with pytest.raises(ValueError, match=r"^credit must be completion where rewards are not"):
        choices_of(replace(experience, rewards=rewards), VOCAB, TASK, config, final_distance)


def test_rewards_and_values_of_choices_are_of_the_cost_of_the_task() -> None:
    cost = QuadraticCost(2.0, 3.0, 0.7, 11.0)
    task = make_task(PLANT, cost, CODEC, TOKENIZER)

    def cheapness(tally: Tally, is_valid: Tensor) -> Rewards:
        worth = torch.where(is_valid, 100 - tally.cost.double(), 0.0)
        return Rewards({"cheapness": worth}, worth)

    config = replace(CONFIG, credit="choice", advantage_std="batch")
    places = torch.arange(5)
    model = a_model()
    rollout, done, _ = make_rollout(model, None, PROMPTS, places, config, task, cheapness)
    whole = done.parsed.is_valid
    wanted = 100 - trajectory_cost(done.trajectories, cost)[whole]
    assert torch.equal(rollout.rewards[whole], wanted)
    assert torch.allclose(rollout.credit.choices.level[whole, HORIZON], wanted, rtol=1e-9)


@pytest.mark.parametrize("scale", [0.1, -0.1, 1e4])
def test_rewards_are_of_the_simulator_if_most_are_within_the_rounding_of_their_size(scale) -> None:
    config = replace(CONFIG, credit="choice", advantage_std="batch")
    _, experience = rolled(config)
    plain = scale * experience.rewards.total
    limit = 1e-4 * (1 + plain.abs())
    first = int(experience.parsed.is_valid.nonzero()[0])

    def scaled(tally: Tally, is_valid: Tensor) -> Rewards:
        found = final_distance(tally, is_valid)
        return Rewards(found.components, scale * found.total)

    def check(total: Tensor) -> None:
        changed = replace(experience, rewards=replace(experience.rewards, total=total))
        choices_of(changed, VOCAB, TASK, config, scaled)

    one_far = plain.clone()
    one_far[first] += 1e3 * limit[first]  # as at a step of a reward, on the other side
    for total in (one_far, plain - 0.8 * limit, plain + 0.8 * limit):
        check(total)
    for total in (plain - 1.2 * limit, plain + 1.2 * limit):
        with pytest.raises(ValueError, match="credit must be completion"):
            check(total)
