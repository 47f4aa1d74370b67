"""Credit for each choice: exact by enumeration for any values, and the values a slow loop's."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from minigrpo import counterfactual
from minigrpo.counterfactual import (
    OFFSETS,
    ChoiceSimulator,
    ChoiceValues,
    Plans,
    choice_tally,
    interpolated,
    later_values,
    num_written,
    others_plan,
    token_basis,
)
from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.lqr import QuadraticCost, lqr_controls
from minigrpo.policy import score_logits
from minigrpo.prompts import Codec
from minigrpo.reward import Rewards, RewardWeights, Tally, tally_of, tally_rewards
from minigrpo.scoring import completion_scores
from minigrpo.tokenizer import number_tokenizer, token_values
from minigrpo.transformer import Transformer, TransformerConfig, initialise
from minigrpo.untruncated import score_all

PLANT = DoubleIntegrator(horizon=3, control_bound=1.0, start_decimals=1)
TOKENIZER = number_tokenizer(PLANT, Codec("numbers", 1))
VOCAB, EOS = len(TOKENIZER), int(TOKENIZER.eos_token_id)
NUMBERS = token_values(TOKENIZER, VOCAB)


def progress(tally: Tally, is_valid: Tensor) -> Rewards:
    return tally_rewards(tally, is_valid, "progress", PLANT.horizon, RewardWeights())


def punishment(tally: Tally, is_valid: Tensor) -> Rewards:
    """Whose malformed text is worth -10."""
    return tally_rewards(tally, is_valid, "punishment", PLANT.horizon, RewardWeights())


def plans_of(num_rows: int, written: Tensor) -> Plans:
    """Of zeros, where nothing is simulated."""
    zeros = torch.zeros(num_rows, 3, dtype=torch.float64)
    return Plans(zeros[:, :2], zeros, zeros, written)


def values_of(tokens: Tensor, starts: Tensor, size: int, reward) -> ChoiceValues:
    simulator = ChoiceSimulator(NUMBERS, EOS, PLANT, QuadraticCost(), reward)
    return simulator.values_of(simulator.plans_of(tokens, starts, size), tokens.shape[1])


def token(control: float) -> int:
    return int((NUMBERS - control).abs().nan_to_num(9.0).argmin())


def gradient_by_enumeration(credit_lambda: float) -> tuple[Tensor, Tensor]:
    """Of all groups of two: estimated and true gradient of E[R] of softmax tables.

    Tokens 0 and 1 are controls, 2 is EOS; two controls and EOS are an answer, all else ends the row
    malformed. Values are random numbers, of the row's past and of all that the other row did;
    only to stop is worth what the answer is worth.
    """
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return 2 * torch.randn(shape, generator=generator, dtype=torch.float64)

    logits = (numbers(1 + 3 + 9, 3) / 3).requires_grad_()  # of each history
    place = {(): 0, **{(a,): 1 + a for a in range(3)}}
    place |= {(a, b): 4 + 3 * a + b for a, b in itertools.product(range(3), repeat=2)}
    rows = [(2,), (0, 2), (1, 2)]
    rows += [(a, b, c) for a, b in itertools.product(range(2), repeat=2) for c in range(3)]
    worth = {row: 10 * float(numbers()) if len(row) == 3 and row[2] == 2 else 0.0 for row in rows}
    guess = {
        (history, other): numbers(2) for history in ((), (0,), (1,)) for other in range(len(rows))
    }
    logq = logits.log_softmax(dim=-1)

    def log_probability(row: tuple[int, ...]) -> Tensor:
        return torch.stack([logq[place[row[:k]], row[k]] for k in range(len(row))]).sum()

    truth = sum(log_probability(row).exp() * worth[row] for row in rows)
    (exact,) = torch.autograd.grad(truth, logits, retain_graph=True)

    surrogate = torch.zeros((), dtype=torch.float64)
    for drawn in itertools.product(range(len(rows)), repeat=2):
        group = [rows[i] for i in drawn]
        values = torch.zeros(2, 3, 3, dtype=torch.float64)  # the basis is one token each
        for n, row in enumerate(group):
            for k in range(len(row)):
                if k < 2:
                    values[n, k, :2] = guess[row[:k], drawn[1 - n]]
                else:
                    values[n, k, 2] = worth[(*row[:2], 2)]
        written = torch.tensor([3 if len(r) == 3 and r[2] == 2 else len(r) - 1 for r in group])
        level = torch.tensor([[5.0, -2.0, 3.0]] * 2).double() * (values != 0).any(dim=-1)
        values = values - level[..., None]
        basis, plans = torch.eye(3, dtype=torch.float64), plans_of(2, written)
        choices = ChoiceValues(values, level, basis, torch.zeros(2), plans, None)
        tokens = torch.tensor([[*row, *[2] * (3 - len(row))] for row in group])
        beyond = [torch.full((3,), 1 / 3, dtype=torch.float64)] * 3  # whatever: the row has ended
        q = [
            torch.stack([*(logq[place[row[:k]]].exp() for k in range(len(row))), *beyond])[:3]
            for row in group
        ]
        expected = (torch.stack(q) * values).sum(dim=-1)
        later = later_values(choices, tokens, expected.detach(), credit_lambda)
        probability = sum(log_probability(row) for row in group).exp().detach()
        for n, row in enumerate(group):
            for k in range(len(row)):
                own = expected[n, k] + later[n, k] * logq[place[row[:k]], row[k]]
                surrogate = surrogate + probability * own / 2
    (found,) = torch.autograd.grad(surrogate, logits)
    return found, exact


def test_the_gradient_is_that_of_the_expected_reward_by_enumeration_whatever_the_values() -> None:
    found, exact = gradient_by_enumeration(credit_lambda=1.0)
    assert exact.abs().max() > 0.1
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)


def test_a_smaller_lambda_is_biased_where_the_values_are_wrong() -> None:
    found, exact = gradient_by_enumeration(credit_lambda=0.7)
    assert (found - exact).abs().max() > 0.01


def test_tokens_that_keep_the_format_are_counted() -> None:
    one, word = token(0.1), TOKENIZER.convert_tokens_to_ids("velocity")
    table = [
        ([one, one, one, EOS, EOS], 4),
        ([one, one, one, EOS, one], 4),  # after EOS nothing counts
        ([one, one, one, one, EOS], 3),
        ([one, EOS, one, EOS, EOS], 1),
        ([word, one, one, EOS, EOS], 0),
        ([one, one, word, EOS, EOS], 2),
    ]
    rows = torch.tensor([row for row, _ in table])
    assert num_written(rows, NUMBERS, EOS, 3).tolist() == [count for _, count in table]
    assert num_written(rows[:, :3], NUMBERS, EOS, 3).tolist() == [3, 3, 3, 1, 0, 2]  # cut off


def test_the_plan_of_the_others_is_the_mean_of_the_well_formed_ones() -> None:
    controls = torch.tensor(
        [[1.0, 2.0], [3.0, 6.0], [5.0, 4.0], [7.0, 7.0], [8.0, 1.0], [2.0, 3.0]]
    )
    whole = torch.tensor([True, True, False, False, True, False])
    wanted = [[3, 6], [1, 2], [2, 4], [8, 1], [0, 0], [8, 1]]
    assert others_plan(controls, whole, 3).tolist() == wanted


def test_interpolation_and_hat_functions_are_those_of_numpy() -> None:
    generator = torch.Generator().manual_seed(1)
    nodes = torch.randn(5, 7, generator=generator, dtype=torch.float64).sort(dim=1).values
    nodes[1, :3] = nodes[1, 2]  # equal ones, as where the control range ends
    values = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    values[1, :3] = values[1, 2]
    at = torch.linspace(-3, 3, 41, dtype=torch.float64)
    got = interpolated(nodes, values, at)
    nodes_and_values = zip(nodes, values, strict=True)
    wanted = np.stack([np.interp(at, some, worth) for some, worth in nodes_and_values])
    torch.testing.assert_close(got, torch.from_numpy(wanted), rtol=1e-12, atol=1e-12)

    grid, heights = torch.linspace(-1, 1, 5, dtype=torch.float64), torch.randn(5).double()
    numbers = torch.tensor([-1.0, -0.3, 0.5, 0.99, torch.nan, torch.nan]).double()
    basis = token_basis(numbers, grid, eos=5)
    assert basis.shape == (6, 16) and not basis[4:, :5].any() and not basis[:, 7:].any()
    assert basis[:, 5].tolist() == [0, 0, 0, 0, 0, 1] and basis[:, 6].tolist() == [0, 0, 0, 0, 1, 0]
    wanted = np.interp([-1.0, -0.3, 0.5, 0.99], grid, heights)
    torch.testing.assert_close(
        basis[:4, :5].double() @ heights, torch.from_numpy(wanted), rtol=1e-6, atol=1e-6
    )


def a_batch(num_groups: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens [N, 5], the second and last rows malformed, and their starts [N, 2]."""
    generator = torch.Generator().manual_seed(seed)
    numbers = (~NUMBERS.isnan()).nonzero().flatten()
    num_rows = num_groups * size
    tokens = numbers[torch.randint(len(numbers), (num_rows, 5), generator=generator)]
    tokens[:, 3:] = EOS
    tokens[1, 1] = EOS
    tokens[-1, 3] = numbers[0]
    starts = torch.rand(num_groups, 2, generator=generator, dtype=torch.float64) - 0.5
    return tokens, starts.repeat_interleave(size, dim=0)


def worth_of(reward, start: Tensor, plan: Tensor) -> float:
    """Of the whole plan, simulated for itself."""
    flown = PLANT.simulate(start[None], plan[None])
    tally = tally_of(plan[None], flown, PLANT, QuadraticCost())
    valid, weights = torch.tensor([True]), RewardWeights()
    return float(tally_rewards(tally, valid, reward.__name__, PLANT.horizon, weights).total)


@pytest.mark.parametrize("reward, malformed", [(progress, 0.0), (punishment, -10.0)])
def test_values_are_rewards_of_plans_with_one_choice_changed(
    reward, malformed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 3
    monkeypatch.setattr("minigrpo.counterfactual.rows_at_once", lambda is_on_cuda: 7)
    tokens, starts = a_batch(11, size, seed=2)  # 33 rows: five splits
    choices = values_of(tokens, starts, size, reward)
    written = num_written(tokens, NUMBERS, EOS, 3)
    assert torch.equal(choices.plans.num_written, written) and written.tolist().count(4) == 31
    got = torch.einsum("nck,vk->ncv", choices.values, choices.basis).double()
    got += choices.level[:, :, None]  # W_k(a) of every token
    numbers = (~NUMBERS.isnan()).nonzero().flatten().tolist()
    controls = NUMBERS[tokens[:, :3]].nan_to_num(0.0)
    assert torch.equal(choices.plans.own, controls) and not controls[1, 1]  # 0 for a word
    for n in range(len(tokens)):
        group = range(n // size * size, n // size * size + size)
        mates = [j for j in group if j != n and written[j] == 4]
        others = controls[mates].mean(dim=0)
        for k in range(3):
            if k > written[n]:
                assert (got[n, k] == 0).all()
                continue
            nodes = (others[k] + torch.tensor(OFFSETS).double() * PLANT.control_bound).clamp(-1, 1)
            plans = [torch.cat([controls[n, :k], a[None], others[k + 1 :]]) for a in nodes]
            worths = [worth_of(reward, starts[n], plan) for plan in plans]
            assert float(choices.level[n, k]) == pytest.approx(worths[OFFSETS.index(0.0)], abs=1e-4)
            # The grid of the stored values has every token of this plant on it.
            wanted = np.interp(NUMBERS[numbers], nodes, worths)
            torch.testing.assert_close(
                got[n, k, numbers], torch.from_numpy(wanted), rtol=1e-5, atol=1e-4
            )
            words = [v for v in range(VOCAB) if v not in numbers]
            torch.testing.assert_close(
                got[n, k, words], torch.full((len(words),), malformed).double(), rtol=0, atol=1e-5
            )
        if written[n] >= 3:
            assert got[n, 3, EOS] == pytest.approx(
                worth_of(reward, starts[n], controls[n]), abs=1e-5
            )
            others = torch.tensor([v for v in range(VOCAB) if v != EOS])
            assert (got[n, 3, others] - malformed).abs().max() < 1e-5
        assert (got[n, 4] == 0).all()
    torch.testing.assert_close(
        choices.level + choices.of_tokens(tokens),
        got.gather(2, tokens[:, :, None])[:, :, 0],
        rtol=1e-6,
        atol=1e-4,
    )


@pytest.mark.parametrize("horizon", [1, 2, 7])
def test_a_tally_of_a_changed_plan_is_that_of_flying_it_whole(horizon: int) -> None:
    """Every sum of every plan, on a plant that is often driven out of bounds."""
    plant = DoubleIntegrator(dt=0.4, horizon=horizon, control_bound=2.0)
    cost = QuadraticCost(3.0, 5.0, 0.7, 11.0)
    generator = torch.Generator().manual_seed(15)

    def draw(*shape: int) -> Tensor:
        return (1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(-2, 2)

    starts, own, others, nodes = draw(5, 2) / 3, draw(5, horizon), draw(5, horizon), draw(35)
    nodes = nodes.view(5, 1, 7).expand(5, horizon, 7)
    starts[3, 1] = -1.2  # one starts out of bounds
    flown = plant.simulate(starts, own)
    got = choice_tally(flown.states, flown.controls, others, nodes, plant, cost)
    place = torch.arange(horizon)
    fields = {name: value.view(horizon, 7, 5) for name, value in vars(got).items()}
    for n, k, a in itertools.product(range(5), range(horizon), range(7)):
        plan = torch.where(place < k, own[n], others[n])
        plan[k] = nodes[n, k, a]
        whole = tally_of(plan[None], plant.simulate(starts[n : n + 1], plan[None]), plant, cost)
        for name, value in vars(whole).items():
            assert float(fields[name][k, a, n]) == pytest.approx(float(value), rel=1e-5, abs=1e-5)
    if horizon > 1:
        assert 0 < fields["num_outside"].mean() < horizon
    assert fields["starts_outside"].any() and not fields["starts_outside"].all()


@pytest.mark.parametrize("k", range(3))
def test_what_a_row_chose_at_k_or_later_does_not_touch_its_values_at_k(k: int) -> None:
    tokens, starts = a_batch(2, 4, seed=3)
    changed = tokens.clone()
    changed[5, k:3] = torch.where(tokens[5, k:3] == token(0.7), token(-0.2), token(0.7))
    before, after = (values_of(rows, starts, 4, progress).values for rows in (tokens, changed))
    torch.testing.assert_close(before[5, : k + 1], after[5, : k + 1], rtol=0, atol=1e-4)
    assert (before[5, k + 1] - after[5, k + 1]).abs().max() > 1e-3
    assert (before[4] - after[4]).abs().max() > 1e-3  # its neighbour's mean plan
    assert torch.equal(before[:4], after[:4])


def test_a_rollout_of_cut_off_rows_has_values_as_wide_as_it_is() -> None:
    tokens, starts = a_batch(2, 2, seed=4)
    choices = values_of(tokens[:, :2], starts, 2, progress)
    assert choices.values.shape[:2] == (4, 2) and choices.values[0, 0].any()


@pytest.mark.parametrize("credit_lambda", [0.0, 0.7, 1.0])
def test_later_values_are_a_slow_loops(credit_lambda: float) -> None:
    generator = torch.Generator().manual_seed(5)
    length = 5
    values = torch.randn(6, length, 4, generator=generator)
    basis = torch.randn(7, 4, generator=generator)
    written = torch.tensor([4, 2, 4, 0, 4, 3])
    tokens = torch.randint(7, (6, length), generator=generator)
    expected = torch.randn(6, length, generator=generator)
    level = torch.randn(6, length, generator=generator, dtype=torch.float64)
    choices = ChoiceValues(values, level, basis, torch.zeros(2), plans_of(6, written), None)
    got = later_values(choices, tokens, expected, credit_lambda)
    sums = torch.zeros(6, length, dtype=torch.float64)
    for n in range(6):
        for k in range(length):
            for j in range(k + 1, min(int(written[n]), 3) + 1):  # EOS at 3 is the last choice
                chosen = level[n, j - 1] + values[n, j - 1] @ basis[tokens[n, j - 1]]
                still_open = level[n, j] + expected[n, j]
                sums[n, k] += credit_lambda ** (j - k) * float(still_open - chosen)
    torch.testing.assert_close(got, sums, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"^expected must have shape \[N, C\] with N=6, C=5, got"):
        later_values(choices, tokens, expected[:, :1], credit_lambda)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("way", ["truncated", "formula", "by hand"])
def test_the_mean_value_is_over_the_acting_policy_with_its_gradient(
    temperature: float, way: str
) -> None:
    """`score_logits`, and `score_all`, whose gradient is written out."""
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64).requires_grad_()
    values = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    basis = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    tokens = torch.tensor([[1, 2, 0], [4, 5, 6]])
    support = None
    allowed = torch.ones(2, 3, 7).bool()
    if way == "truncated":
        support = torch.tensor([[1, 3, 6, -1], [2, 0, -1, -1], [0, 5, 4, 1]]).repeat(2, 1, 1)
        support[1] = torch.tensor([[4, 0, -1, -1], [5, -1, -1, -1], [6, 2, 3, 1]])
        allowed = torch.zeros(2, 3, 7).bool()
        for m, c, s in itertools.product(range(2), range(3), range(4)):
            if support[m, c, s] >= 0:
                allowed[m, c, support[m, c, s]] = True
    plain = score_logits(logits / temperature, tokens, support)
    if way == "by hand":
        got = score_all(logits / temperature, tokens, basis, True)
    else:
        got = score_logits(logits / temperature, tokens, support, basis)
    assert got.mass is not None and got.mass.shape == (2, 3, 4)
    assert got.entropy is not None and not got.entropy.requires_grad
    assert torch.equal(got.entropy, plain.entropy)
    expected = (got.mass * values).sum(dim=-1)
    weights = torch.tensor([[0.5, -1.0, 2.0], [0.0, 3.0, -0.7]]).double()  # of the taken tokens
    (gradient,) = torch.autograd.grad((expected + weights * got.logprobs).sum(), logits)
    for m, c in itertools.product(range(2), range(3)):
        odds = [
            math.exp(logits[m, c, a].item() / temperature) * bool(allowed[m, c, a])
            for a in range(7)
        ]
        q = [one / sum(odds) for one in odds]
        worth = [float(values[m, c] @ basis[a]) for a in range(7)]
        mean = sum(p * w for p, w in zip(q, worth, strict=True))
        assert expected[m, c].item() == pytest.approx(mean, rel=1e-10)
        for a in range(7):
            wanted = q[a] * (worth[a] - mean) / temperature
            is_taken = a == tokens[m, c].item()
            wanted += float(weights[m, c]) * (is_taken - q[a]) / temperature
            assert float(gradient[m, c, a]) == pytest.approx(wanted, abs=1e-12)
    assert plain.mass is None and torch.equal(plain.logprobs, got.logprobs)


@pytest.mark.parametrize("is_truncated", [False, True])
def test_neither_mean_values_nor_their_gradient_depend_on_chunks(
    is_truncated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Transformer(TransformerConfig("llama", 11, 16, 24, 2, 2, 2, 8, tied_head=False))
    initialise(model, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(11, (3, 9), generator=generator)
    values = torch.randn(3, 5, 4, generator=generator)
    basis = torch.randn(11, 4, generator=generator)
    support = torch.randint(11, (3, 5, 4), generator=generator) if is_truncated else None
    mask = torch.ones(3, 4).bool()
    found = []
    for elements in (2**27, 3 * 11 * 2):
        monkeypatch.setattr("minigrpo.scoring.CHUNK_ELEMENTS", elements)
        model.zero_grad()
        scores = completion_scores(model, tokens[:, :4], mask, tokens[:, 4:], support, 1.3, basis)
        assert scores.mass is not None
        expected = (scores.mass * values).sum(dim=-1)
        (expected * torch.arange(1, 6)).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((expected.detach(), gradient))
    torch.testing.assert_close(found[0], found[1])
    assert found[0][1].abs().max() > 1e-3


@pytest.mark.parametrize(("noise", "is_fine", "bound"), [(0.1, False, 0.1), (0.01, True, 0.12)])
def test_values_are_close_to_those_of_every_control_there_is(
    noise: float, is_fine: bool, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the plant of the demo, near plans as a policy draws them after SFT; a coarser grid fails.

    Near those of a policy that is sure, after GRPO, it takes the finer table of docs/tiny_model.md.
    """
    if is_fine:
        nearer = (-2, -0.4, -0.1, -0.03, -0.01, -0.003, 0.0, 0.003, 0.01, 0.03, 0.1, 0.4, 2)
        for name, value in {"OFFSETS": nearer, "NUM_NODES": 201, "NUM_COLUMNS": 208}.items():
            monkeypatch.setattr(counterfactual, name, value)
    plant, size = DoubleIntegrator(), 4
    codec = Codec()
    tokenizer = number_tokenizer(plant, codec)
    numbers = token_values(tokenizer, len(tokenizer))
    first = int((numbers == -3.0).nonzero()[0])  # the tokens of -3.00 ... 3.00 follow each other
    starts = torch.tensor([[0.5, -0.3], [-0.2, 0.6]], dtype=torch.float64).repeat_interleave(
        size, 0
    )
    drawn = noise * torch.randn(8, 50, generator=torch.Generator().manual_seed(8))
    plans = (lqr_controls(starts, plant, QuadraticCost()) + drawn).clamp(-3, 3)
    tokens = torch.cat([(plans * 100).round().long() + 300 + first, torch.zeros(8, 1).long()], 1)
    tokens[:, 50] = int(tokenizer.eos_token_id)

    def reward(tally: Tally, is_valid: Tensor) -> Rewards:
        return tally_rewards(tally, is_valid, "progress", 50, RewardWeights())

    eos = int(tokenizer.eos_token_id)
    simulator = ChoiceSimulator(numbers, eos, plant, QuadraticCost(), reward)
    choices = simulator.values_of(simulator.plans_of(tokens, starts, size), 51)
    got = choices.values @ choices.basis.T + choices.level[..., None]  # [8, 51, V]
    controls, errors, sizes = numbers[tokens[:, :50]], [], []
    around = torch.arange(-5, 6) * noise * 0.3  # m/s^2, one and a half standard deviations
    for n, k in itertools.product((0, 5), (0, 3, 10, 20, 40)):
        group = [j for j in range(n // size * size, n // size * size + size) if j != n]
        others = controls[group].mean(dim=0)
        near = others[k] + around
        places = (near.clamp(-3, 3) * 100).round().long() + 300 + first
        changed = torch.cat([controls[n, :k], others[k:]]).repeat(len(near), 1)
        changed[:, k] = numbers[places]
        flown = plant.simulate(starts[n].repeat(len(near), 1), changed)
        valid = torch.ones(len(near)).bool()
        exact = reward(tally_of(changed, flown, plant, QuadraticCost()), valid).total
        errors.append((got[n, k, places] - exact).abs().mean())
        sizes.append(exact.std())
    assert torch.stack(errors).mean() < bound * torch.stack(sizes).mean()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_products_of_low_precision_spoil_no_mean_value(precision: torch.dtype) -> None:
    """Without the level, which is a hundred points, bfloat16 errs by 0.1 points and more."""
    tokens, starts = a_batch(3, 4, seed=9)
    choices = values_of(tokens, starts, 4, progress)
    logits = 3 * torch.randn(12, 5, VOCAB, generator=torch.Generator().manual_seed(10))
    logits[..., NUMBERS.isnan()] -= 3.0
    exact = (logits.double().softmax(-1) @ choices.basis.double() * choices.values).sum(-1)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        mass = score_logits(logits, tokens, None, choices.basis).mass
    assert mass is not None
    got = (mass * choices.values).sum(dim=-1)
    assert (got - exact).abs().max() < (0.05 if precision == torch.bfloat16 else 1e-4) * 5


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_mean_control_is_that_of_the_numbers_among_the_choices(precision: torch.dtype) -> None:
    """Less what was written, so that a mass in bfloat16 errs by thousandths of the distance."""
    tokens, starts = a_batch(3, 4, seed=11)
    choices = values_of(tokens, starts, 4, progress)
    logits = 3 * torch.randn(12, 5, VOCAB, generator=torch.Generator().manual_seed(12))
    numbers = ~NUMBERS.isnan()
    q = logits[..., numbers].double().softmax(dim=-1)
    written = NUMBERS[tokens].nan_to_num(0.0)
    wanted = q @ NUMBERS[numbers] - written
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        mass = score_logits(logits, tokens, None, choices.basis).mass
    assert mass is not None
    got = choices.mean_offset(mass, tokens)
    assert (got - wanted).abs().max() < (0.01 if precision == torch.bfloat16 else 1e-5)
    assert wanted.abs().max() > 0.5
    # Sums of bfloat16 are float32 under CUDA's autocast alone: the same inside of it and outside.
    assert torch.equal(got, choices.mean_offset(mass.float(), tokens))
    none = torch.zeros(12, 5, choices.basis.shape[1])  # all mass on words
    none[..., -1] = 1.0
    assert torch.equal(choices.mean_offset(none, tokens), torch.zeros(12, 5))


def test_values_of_moved_plans_are_those_of_plans_written_so() -> None:
    """Each control moved by its own shift, before and after the choice, and held at the bound."""
    tokens, starts = a_batch(2, 4, seed=13)
    choices = values_of(tokens, starts, 4, progress)
    rows = torch.tensor([5, 0, 2])
    shift = 0.3 * torch.randn(3, 3, generator=torch.Generator().manual_seed(14)).double()
    shift[2, 1] = 5.0
    moved = choices.plans.moved(rows, shift, torch.tensor(PLANT.control_bound))
    got = choices.simulator.values_of(moved, 5)
    table = torch.einsum("nck,vk->ncv", got.values, got.basis).double() + got.level[..., None]
    assert moved.own[2, 1] == PLANT.control_bound
    for i, n in enumerate(rows.tolist()):
        group = [j for j in range(n // 4 * 4, n // 4 * 4 + 4) if j not in (n, 1, 7)]
        own = (NUMBERS[tokens[n, :3]] + shift[i]).clamp(-1, 1)
        others = (NUMBERS[tokens[group, :3]].mean(dim=0) + shift[i]).clamp(-1, 1)
        for k in range(3):
            near = (others[k] + torch.tensor(OFFSETS).double()).clamp(-1, 1)
            worths = [
                worth_of(progress, starts[n], torch.cat([own[:k], a[None], others[k + 1 :]]))
                for a in near
            ]
            numbers = (~NUMBERS.isnan()).nonzero().flatten()
            wanted = torch.from_numpy(np.interp(NUMBERS[numbers], near, worths))
            torch.testing.assert_close(table[i, k, numbers], wanted, rtol=1e-5, atol=1e-4)
        whole = worth_of(progress, starts[n], own)
        assert table[i, 3, EOS] == pytest.approx(whole, abs=1e-5)
