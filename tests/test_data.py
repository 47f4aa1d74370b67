"""Splits, streams and keys of randomness; which tokens supervised training learns."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from minigrpo import data
from minigrpo.data import (
    PURPOSES,
    Task,
    demonstrations,
    keyed_generator,
    make_prompts,
    split_starts,
    token_uniforms,
    training_starts,
)
from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.lqr import QuadraticCost, lqr_controls
from minigrpo.prompts import Codec, prompt_text, render_controls
from minigrpo.tokenizer import number_tokenizer

PLANT, COST, CODEC = DoubleIntegrator(horizon=7), QuadraticCost(), Codec()
TASK = Task(PLANT, COST, CODEC, number_tokenizer(PLANT, CODEC), 8)
SPLIT = split_starts(PLANT)


def as_set(starts: torch.Tensor) -> set[tuple[float, ...]]:
    return {tuple(start) for start in starts.tolist()}


def test_the_three_parts_are_disjoint_and_together_the_grid():
    parts = [as_set(part) for part in (SPLIT.test, SPLIT.validation, SPLIT.training)]
    assert [len(part) for part in parts] == [2048, 2048, 161**2 - 4096]
    for a, b in itertools.combinations(parts, 2):
        assert not a & b
    assert set().union(*parts) == {
        (n / 100, m / 100) for n in range(-80, 81) for m in range(-80, 81)
    }


def test_the_split_depends_on_nothing_but_the_grid():
    np.random.seed(5)  # global generators must not matter
    torch.manual_seed(5)
    again = split_starts(DoubleIntegrator(dt=0.2, horizon=3))
    for name in ("test", "validation", "training"):
        assert torch.equal(getattr(again, name), getattr(SPLIT, name))


def test_the_split_is_that_of_all_published_results():
    """Another one would evaluate models on starts that they were trained on."""
    assert SPLIT.test[:2].tolist() == [[0.14, 0.48], [-0.3, 0.32]]
    assert SPLIT.validation[:2].tolist() == [[-0.01, -0.53], [-0.04, -0.45]]


def test_a_prefix_of_each_part_is_spread_over_the_whole_square():
    for part in (SPLIT.test, SPLIT.validation, SPLIT.training):
        quadrants = (part[:512] > 0).int() @ torch.tensor([2, 1], dtype=torch.int32)
        assert quadrants.bincount(minlength=4).min() > 90  # 128 expected, sigma 10


def test_a_small_grid_is_split_too():
    split = split_starts(DoubleIntegrator(start_decimals=1, start_bound=0.3))
    assert [len(split.test), len(split.validation), len(split.training)] == [6, 6, 37]


def test_equal_keys_give_equal_bytes_and_others_different_ones():
    keys = [
        (0, "prompts", 1), (0, "prompts", 2), (1, "prompts", 1), (0, "tokens", 1),
        (0, "shuffle", 1, 2), (0, "shuffle", 2, 1), (0, "batches", 1), (2**32 - 1, "prompts", 1),
    ]  # fmt: skip
    draws = [keyed_generator(*key).bytes(32) for key in keys]
    assert draws == [keyed_generator(*key).bytes(32) for key in keys]
    assert len(set(draws)) == len(keys)


def test_neighbouring_keys_are_unrelated():
    rows = np.stack([keyed_generator(0, "tokens", n).random(400) for n in range(40)])
    correlation = np.corrcoef(rows) - np.eye(40)
    assert np.abs(correlation).max() < 5 / 20  # sigma is 1 / sqrt(400)


@pytest.mark.parametrize("key", [(2**32, "tokens", 1), (-1, "tokens", 1), (0, "tokens", 2**32)])
def test_a_key_that_would_meet_another_one_is_refused(key):
    """SeedSequence reads 2^32 + 5 as the two numbers 5 and 1."""
    with pytest.raises(ValueError, match=r"must be in \[0, 2\^32\)"):
        keyed_generator(*key)


def test_an_unknown_purpose_is_an_error_and_none_is_listed_twice():
    with pytest.raises(ValueError, match="tuple"):
        keyed_generator(0, "luck")
    assert len(set(PURPOSES)) == len(PURPOSES)


def test_the_order_of_purposes_is_frozen():
    """Their places are part of every key: a new one goes to the end, or all runs change."""
    assert PURPOSES[:5] == ("split", "demonstrations", "batches", "prompts", "tokens")
    assert keyed_generator(3, "prompts", 2).integers(10**6, size=3).tolist() == [
        int(n) for n in np.random.default_rng([3, 3, 2]).integers(10**6, size=3)
    ]


def test_training_prompts_come_from_the_training_part_and_the_grid():
    starts, places = training_starts(SPLIT.training, seed=0, step=3, num_prompts=64)
    assert as_set(starts) <= as_set(SPLIT.training)
    assert starts.dtype == torch.float64
    assert torch.equal((starts * 100).round() / 100, starts)
    assert places.tolist() == list(range(3 * 64, 4 * 64))


def test_steps_and_seeds_draw_fresh_starts_and_the_stream_repeats():
    def starts(seed: int, step: int) -> torch.Tensor:
        return training_starts(SPLIT.training, seed, step, 64)[0]

    assert torch.equal(starts(0, 3), starts(0, 3))
    for other in (starts(0, 4), starts(1, 3)):
        assert not torch.equal(starts(0, 3), other)
    places = torch.cat([training_starts(SPLIT.training, 0, step, 5)[1] for step in range(4)])
    assert places.tolist() == list(range(20))  # no key of randomness is used twice


def test_a_curriculum_draws_from_the_middle_of_the_square():
    starts = SPLIT.training
    for reach in (0.25, 0.6):
        drawn, places = training_starts(starts, 3, 5, 997, reach)
        size = drawn.abs().amax(dim=1)
        assert 0.97 * reach * 0.8 < float(size.max()) <= reach * 0.8 + 1e-9
        assert places.tolist() == list(range(5 * 997, 6 * 997))
    whole, _ = training_starts(starts, 3, 5, 997)
    assert torch.equal(whole, training_starts(starts, 3, 5, 997, 1.0)[0])
    assert float(whole.abs().max()) > 0.79


def test_uniforms_of_a_prompt_do_not_depend_on_the_other_prompts():
    places = torch.tensor([40, 7, 12, 3])
    whole = token_uniforms(0, places, 3, 11)
    assert whole.shape == (12, 11) and whole.dtype == torch.float64
    assert 0 <= whole.min() and whole.max() < 1
    for n, place in enumerate(places):  # group-major: rows 3 n to 3 n + 2
        assert torch.equal(token_uniforms(0, place.view(1), 3, 11), whole[3 * n : 3 * n + 3])
    assert len(whole.unique()) > 0.99 * whole.numel()  # no row, no column is a copy
    assert not torch.equal(token_uniforms(1, places, 3, 11), whole)
    assert not torch.equal(token_uniforms(0, places, 3, 11, "evaluation"), whole)
    assert token_uniforms(0, places[:0], 3, 11).shape == (0, 11)


def test_uniforms_are_uniform():
    values = token_uniforms(0, torch.arange(50), 16, 51).flatten().double().sort().values
    steps = (torch.arange(len(values)) + 0.5) / len(values)
    assert (values - steps).abs().max() < 2 / len(values) ** 0.5  # Kolmogorov-Smirnov


def test_prompts_are_left_padded_with_their_start_beside_them():
    starts = SPLIT.training[:5]
    prompts = make_prompts(starts, torch.arange(5), TASK)
    assert torch.equal(prompts.initial_states, starts)
    for n in range(5):
        assert prompts.texts[n] == prompt_text(starts[n], PLANT, CODEC)
        ids = prompts.tokens[n][prompts.mask[n]]
        assert TASK.tokenizer.decode(ids) == prompts.texts[n]
    mask = prompts.mask.clone()
    mask[3, 0] = False
    for changed, wanted in ((prompts, None), (replace(prompts, mask=mask), mask)):
        tokens, found = changed.placed(torch.device("cpu"))
        assert torch.equal(tokens, prompts.tokens)
        assert found is None if wanted is None else torch.equal(found, wanted)


def test_padding_is_on_the_left_for_prompts_and_on_the_right_for_demonstrations():
    rows = [[5, 6, 7], [8], [2, 2]]  # 2 is the pad, as EOS is where a tokenizer has no pad
    for side, tokens, mask in (
        ("left", [[5, 6, 7], [2, 2, 8], [2, 2, 2]], [[1, 1, 1], [0, 0, 1], [0, 1, 1]]),
        ("right", [[5, 6, 7], [8, 2, 2], [2, 2, 2]], [[1, 1, 1], [1, 0, 0], [1, 1, 0]]),
    ):
        padded = data._pad(rows, 2, side)
        assert padded[0].tolist() == tokens
        assert padded[1].int().tolist() == mask


def words_task(monkeypatch: pytest.MonkeyPatch) -> Task:
    """Prompts of different length, as a chat model has: one more word for each centimetre."""

    def encode(tokenizer, state, plant, codec):
        return TASK.tokenizer.encode("position " * (1 + round(100 * abs(state[0].item())) % 5))

    monkeypatch.setattr(data, "encode_prompt", encode)
    return TASK


@pytest.mark.parametrize("uneven", [False, True])
def test_what_is_learned_is_the_completion_and_eos_and_nothing_else(uneven, monkeypatch):
    task = words_task(monkeypatch) if uneven else TASK
    starts = SPLIT.training[:23]
    batch = demonstrations(starts, task)
    plans = lqr_controls(starts, PLANT, COST, decimals=2)
    eos, lengths = task.tokenizer.eos_token_id, set()
    for n in range(23):
        learned = batch.tokens[n][batch.completion_mask[n]].tolist()
        assert learned[-1] == eos and learned.count(eos) == 1
        assert task.tokenizer.decode(learned[:-1]) == render_controls(plans[n], CODEC)
        real = batch.tokens[n][batch.mask[n]].tolist()
        prompt = real[: -len(learned)]
        assert prompt + learned == real  # the completion is the end of the real tokens, unbroken
        expected = data.encode_prompt(task.tokenizer, starts[n], PLANT, CODEC)
        assert prompt == expected
        lengths.add(len(prompt))
    assert (len(lengths) > 1) == uneven
    assert not (batch.completion_mask & ~batch.mask).any()


def test_a_demonstration_has_seen_the_effect_of_its_own_rounding():
    """Simulating the written controls gives the states on which the next ones were based."""
    starts = SPLIT.training[:11]
    batch = demonstrations(starts, TASK)
    for n in range(11):
        words = TASK.tokenizer.decode(batch.tokens[n][batch.completion_mask[n]][:-1]).split()
        controls = torch.tensor([[float(word) for word in words]], dtype=torch.float64)
        states = PLANT.simulate(starts[n : n + 1], controls).states[0]
        for k in range(PLANT.horizon):
            again = lqr_controls(states[k : k + 1], PLANT, COST, decimals=2)[0, 0]
            assert abs(float(again) - float(words[k])) < 1e-9


def test_a_disturbed_demonstration_is_labelled_with_what_lqr_wants_where_the_noise_led():
    starts, size = SPLIT.training[:11], (11, PLANT.horizon)
    noise = torch.randn(size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    batch = demonstrations(starts, TASK, noise)
    for n in range(11):
        learned = batch.completion_mask[n]
        written, wanted = (
            [float(word) for word in TASK.tokenizer.decode(ids[learned][:-1]).split()]
            for ids in (batch.tokens[n], batch.labels[n])
        )
        assert batch.labels[n][learned][-1] == TASK.tokenizer.eos_token_id
        assert torch.equal(batch.labels[n][~learned], batch.tokens[n][~learned])
        flown = PLANT.simulate(starts[n : n + 1], torch.tensor([written]).double()).states[0]
        for k in range(PLANT.horizon):
            expert = float(lqr_controls(flown[k : k + 1], PLANT, COST, decimals=2)[0, 0])
            assert abs(expert - wanted[k]) < 1e-9
            assert abs(min(3.0, max(-3.0, wanted[k] + float(noise[n, k]))) - written[k]) < 0.00501
    assert (batch.tokens != batch.labels).sum() > 0.8 * noise.numel()


def test_without_noise_labels_are_the_tokens_and_words_cannot_be_disturbed(monkeypatch):
    batch = demonstrations(SPLIT.training[:3], TASK)
    assert torch.equal(batch.tokens, batch.labels)
    words = replace(TASK, codec=Codec(style="words", decimals=3))
    with pytest.raises(ValueError, match="noise needs the codec style numbers, got words"):
        demonstrations(SPLIT.training[:3], words, torch.zeros(3, PLANT.horizon))


def test_disturbances_are_gaussian_with_a_uniform_size_for_each_row():
    noise = data.disturbances(2003, 401, 0.5, seed=7)
    sizes = noise.std(dim=1)  # of 401 draws: within 10 %
    assert torch.equal(noise, data.disturbances(2003, 401, 0.5, seed=7))
    assert not torch.equal(noise, data.disturbances(2003, 401, 0.5, seed=8))
    assert abs(float(noise.mean())) < 0.002
    for share in (0.1, 0.5, 0.9):  # of a uniform: within 4 standard errors
        assert abs(float((sizes < 0.5 * share).double().mean()) - share) < 0.045
    scaled = noise / sizes.view(-1, 1)
    assert abs(float(scaled.pow(4).mean()) - 3) < 0.1  # a normal's kurtosis


def test_rows_picks_the_same_rows_of_every_tensor(monkeypatch):
    batch = demonstrations(SPLIT.training[:7], words_task(monkeypatch))
    chosen = torch.tensor([4, 0, 4])
    picked = batch.rows(chosen).to(torch.device("cpu"))
    for name in ("tokens", "labels", "mask", "completion_mask"):
        assert torch.equal(getattr(picked, name), getattr(batch, name)[chosen])
