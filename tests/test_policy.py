"""The acting policy against slow float64 loops, and its gradient against an enumerated one."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from minigrpo import policy, top_k
from minigrpo.policy import (
    ActingPolicy,
    Nucleus,
    draw,
    nucleus,
    score_logits,
)
from minigrpo.scoring import completion_scores
from minigrpo.top_k import largest_by_blocks
from minigrpo.transformer import Transformer, TransformerConfig, initialise, logits
from minigrpo.untruncated import draw_untruncated


def slow_nucleus(
    row: list[float], temperature: float, top_p: float, support_size: int
) -> tuple[list[int], list[float], float, bool]:
    """Support, log q, mass of p on the support, whether the cap cut; from the definition."""
    peak = max(row) / temperature
    weights = [math.exp(z / temperature - peak) for z in row]
    p = [w / math.fsum(weights) for w in weights]
    ranked = sorted(range(len(row)), key=lambda token: (-p[token], token))
    support: list[int] = []
    for token in ranked:
        support.append(token)
        if math.fsum(p[t] for t in support) >= top_p:
            break
    capped = len(support) > support_size
    support = support[:support_size]
    mass = math.fsum(p[t] for t in support)
    return support, [math.log(p[t] / mass) for t in support], mass, capped


def rows_of(seed: int, num_rows: int, vocab: int, kind: str) -> torch.Tensor:
    rows = (
        2.5 * torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)).double()
    )
    if kind == "tied":
        rows = rows.round()  # a few distinct values: ties at the boundary and at the cap
    if kind == "dominant":
        rows[:, 3] += 40.0
    return rows


@pytest.mark.parametrize("kind", ["distinct", "tied", "dominant"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("top_p, support_size", [(0.8, 128), (0.9, 5), (0.9, 1), (0.31, 7)])
@pytest.mark.parametrize("by_blocks", [False, True])
def test_the_nucleus_is_that_of_a_slow_loop(
    kind, temperature, top_p, support_size, by_blocks, monkeypatch
):
    """By blocks as on a GPU, where a support may be larger than the vocabulary too."""
    monkeypatch.setattr(top_k, "LARGE_VOCABULARY", 0 if by_blocks else 17)
    rows = rows_of(1, 31, 17, kind)
    q = nucleus(rows, ActingPolicy(temperature, top_p, support_size))
    for n, row in enumerate(rows.tolist()):
        support, logprobs, mass, capped = slow_nucleus(row, temperature, top_p, support_size)
        assert q.support[n, : len(support)].tolist() == support
        assert (q.support[n, len(support) :] == -1).all()
        assert torch.allclose(q.logprobs[n, : len(support)], torch.tensor(logprobs).double())
        assert (q.logprobs[n, len(support) :] == -torch.inf).all()
        assert math.isclose(q.kept_mass[n], mass, rel_tol=1e-12)
        assert bool(q.is_capped[n]) == capped
    if kind == "dominant":
        assert (q.support[:, 1:] == -1).all() and (q.logprobs[:, 0] == 0).all()


def test_the_token_that_crosses_is_kept_and_the_next_one_is_not():
    halves = torch.tensor([[0.25, 0.5, 0.125, 0.125]]).double().log()
    for top_p, expected in ((0.5, [1]), (0.5001, [1, 0]), (0.75, [1, 0]), (0.7501, [1, 0, 2])):
        support = nucleus(halves, ActingPolicy(1.0, top_p, 4)).support[0]
        assert support[support >= 0].tolist() == expected
        for size in (1, 2, 3):  # a nucleus that just fits was not cut
            is_cut = nucleus(halves, ActingPolicy(1.0, top_p, size)).is_capped
            assert is_cut.tolist() == [size < len(expected)]


def test_a_top_p_of_nothing_keeps_the_most_probable_token():
    q = nucleus(torch.tensor([[0.0, 3.0, 1.0]]), ActingPolicy(1.0, 1e-46, 2))  # 0 in float32
    assert q.support.tolist() == [[1, -1]] and q.logprobs[0, 0] == 0


def test_no_cap_cuts_a_whole_vocabulary_that_rounding_leaves_short_of_top_p():
    rows = rows_of(11, 31, 17, "distinct").float()
    assert (F.softmax(rows, dim=-1).sort(descending=True).values.cumsum(-1)[:, -1] < 1).any()
    q = nucleus(rows, ActingPolicy(1.0, 1 - 2**-53, 17))
    assert (q.support >= 0).all() and not q.is_capped.any()


def test_ties_at_the_cap_go_to_the_smaller_ids():
    q = nucleus(torch.zeros(2, 400), ActingPolicy(1.0, 0.9, 7))
    assert q.support.tolist() == [list(range(7))] * 2
    assert q.is_capped.all()


def test_without_truncation_q_is_the_plain_softmax_of_the_whole_vocabulary():
    rows = rows_of(2, 5, 300, "distinct")
    q = nucleus(rows, ActingPolicy(1.5, 1.0, 4))
    assert q.support is None
    assert torch.allclose(q.logprobs, torch.log_softmax(rows / 1.5, dim=-1))
    assert (q.kept_mass == 1).all() and not q.is_capped.any()


LARGEST_BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))


def policy_of(probabilities: list[list[float]]) -> Nucleus:
    p = torch.tensor(probabilities)
    ones = torch.ones(len(p))
    return Nucleus(None, p.log(), ones, ones.bool())


def test_draws_at_the_ends_and_next_to_impossible_tokens():
    q = policy_of([[0.0, 0.3, 0.0, 0.7, 0.0]] * 6)
    uniforms = torch.tensor([0.0, 0.2999, 0.3001, 0.5, 0.9999, LARGEST_BELOW_ONE])
    tokens, logq = draw(q, uniforms)
    assert tokens.tolist() == [1, 1, 3, 3, 3, 3]
    assert torch.equal(logq, q.logprobs[0, tokens])
    rounded_up = torch.full((6,), 1 - 1e-12).double()  # to 1 in float32
    assert draw(q, rounded_up)[0].tolist() == [3] * 6


def test_mass_lost_to_rounding_is_missed_by_every_token_alike():
    """A sum of 0.4 where 1 should be: rounding, exaggerated; uniforms cover what is there."""
    shares = (torch.arange(8).view(8, 1) + 0.5) / 8
    places = policy.first_above(torch.tensor([[0.1, 0.2, 0.4]] * 8), shares)
    assert places.flatten().tolist() == [0, 0, 1, 1, 2, 2, 2, 2]


def test_no_uniform_draws_a_token_of_probability_zero():
    generator = torch.Generator().manual_seed(4)
    rows = 6 * torch.randn(64, 101, generator=generator)
    rows[torch.rand(64, 101, generator=generator) < 0.6] = -torch.inf
    rows[:, 50] = 0.0
    steps = torch.linspace(0, LARGEST_BELOW_ONE, 997)
    for top_p in (0.9, 1.0):
        q = nucleus(rows, ActingPolicy(1.0, top_p, 16))
        for uniform in [0.0, LARGEST_BELOW_ONE, *steps[::10].tolist()]:
            tokens, logq = draw(q, torch.full((64,), uniform))
            assert (rows.gather(1, tokens.view(-1, 1)) > -torch.inf).all()
            assert logq.isfinite().all()


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_the_share_of_uniforms_that_draws_a_token_is_its_probability(top_p):
    """An even grid of n uniforms gives each token n q, up to one grid point at either end."""
    row, n = rows_of(6, 1, 23, "distinct").float(), 20_011
    q = nucleus(row.expand(n, -1), ActingPolicy(1.5, top_p, 9))
    tokens, logq = draw(q, (torch.arange(n) + 0.5) / n)
    expected = torch.zeros(23)
    places = torch.arange(23) if q.support is None else q.support[0]
    expected[places[places >= 0]] = q.logprobs[0].exp()[places >= 0]
    assert (tokens.bincount(minlength=23) - n * expected).abs().max() < 1.5
    assert torch.allclose(logq, expected.log()[tokens])


def test_greedy_takes_the_first_of_the_most_probable_tokens():
    rows = torch.tensor([[1.0, 4.0, 2.0, 4.0], [3.0, 3.0, 3.0, 3.0], [0.0, 1.0, 2.0, 9.0]])
    for top_p in (0.8, 1.0):
        tokens, logq = draw(nucleus(rows, ActingPolicy(0.7, top_p, 3)), None)
        assert tokens.tolist() == [1, 0, 3]
        assert (logq <= 0).all()


def random_supports(
    seed: int, num: int, vocab: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Supports [num, width] with filler in any place, and a token [num] out of each."""
    generator = torch.Generator().manual_seed(seed)
    supports = torch.stack([torch.randperm(vocab, generator=generator)[:width] for _ in range(num)])
    taken = torch.randint(width, (num, 1), generator=generator)
    filler = torch.rand(num, width, generator=generator) < 0.4
    filler.scatter_(1, taken, False)
    return supports.masked_fill(filler, -1), supports.gather(1, taken).view(num)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("truncated", [True, False])
def test_logprobs_and_entropy_are_those_of_a_slow_loop(temperature, truncated):
    rows = rows_of(3, 35, 13, "distinct")
    supports, tokens = random_supports(5, 35, 13, 6)
    scores = score_logits(
        rows.view(7, 5, 13) / temperature,
        tokens.view(7, 5),
        supports.view(7, 5, 6).int() if truncated else None,
    )
    for n, row in enumerate(rows.tolist()):
        kept = [t for t in supports[n].tolist() if t >= 0] if truncated else range(13)
        weights = {t: math.exp(row[t] / temperature) for t in kept}
        q = {t: w / math.fsum(weights.values()) for t, w in weights.items()}
        place = divmod(n, 5)
        assert math.isclose(scores.logprobs[place], math.log(q[int(tokens[n])]), abs_tol=1e-12)
        expected = -math.fsum(x * math.log(x) for x in q.values())
        assert math.isclose(scores.entropy[place], expected, abs_tol=1e-12)


def test_entropy_is_log_of_the_support_when_uniform_and_zero_for_one_token():
    support = torch.tensor([[[4, 2, 9, -1], [3, -1, -1, -1]]], dtype=torch.int32)
    scores = score_logits(torch.zeros(1, 2, 11), torch.tensor([[9, 3]]), support)
    assert torch.allclose(scores.entropy, torch.tensor([[math.log(3), 0.0]]))
    assert scores.logprobs[0, 1] == 0
    whole = score_logits(torch.zeros(1, 1, 11), torch.tensor([[5]]), None)
    assert torch.allclose(whole.entropy, torch.tensor(math.log(11)))
    sharp = score_logits(torch.tensor([[[0.0, 3e4, -torch.inf]]]), torch.tensor([[1]]), None)
    assert sharp.entropy == 0 and sharp.logprobs == 0


def test_filler_adds_nothing_to_value_or_gradient():
    rows = rows_of(7, 15, 13, "distinct").view(3, 5, 13)
    supports, tokens = random_supports(8, 15, 13, 4)
    supports, tokens = supports.view(3, 5, 4), tokens.view(3, 5)
    wider = torch.full((3, 5, 9), -1)
    wider[..., [1, 4, 5, 8]] = supports
    results = []
    for support in (supports, wider):
        z = rows.clone().requires_grad_()
        scores = score_logits(z, tokens, support)
        scores.logprobs.sum().backward()
        results.append((scores.logprobs.detach(), scores.entropy, z.grad))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-14)


def test_a_support_of_one_token_has_logprob_zero_and_no_gradient():
    z = rows_of(9, 1, 7, "distinct").view(1, 1, 7).requires_grad_()
    scores = score_logits(z, torch.tensor([[6]]), torch.tensor([[[6, -1]]]))
    scores.logprobs.sum().backward()
    assert scores.logprobs == 0 and not z.grad.any()


def test_half_precision_logits_are_scored_in_float32():
    z = rows_of(3, 6, 13, "distinct").view(2, 3, 13).bfloat16()
    tokens = torch.randint(13, (2, 3), generator=torch.Generator().manual_seed(0))
    scores = score_logits(z, tokens, None)
    assert scores.logprobs.dtype == torch.float32
    exact = torch.log_softmax(z.double(), dim=-1).gather(-1, tokens.view(2, 3, 1))
    assert torch.allclose(scores.logprobs.double(), exact.view(2, 3), atol=1e-6)
    assert nucleus(z[0], ActingPolicy()).logprobs.dtype == torch.float32


class PrefixTable(nn.Module):
    """A policy with free logits for every prefix; identity for a head, prompts of one token."""

    is_fused = False

    def __init__(self, vocab: int, num_steps: int, seed: int):
        super().__init__()
        self.vocab = vocab
        self.first = [sum(vocab**k for k in range(step)) for step in range(num_steps)]
        size = sum(vocab**k for k in range(num_steps))
        table = 1.5 * torch.randn(size, vocab, generator=torch.Generator().manual_seed(seed))
        self.table = nn.Parameter(table.double())

    def forward(self, tokens, mask, cache, output, shared=None):
        code, rows = torch.zeros(len(tokens), dtype=torch.int64), []
        for step, first in enumerate(self.first):
            if step:
                code = code * self.vocab + tokens[:, step]
            rows.append(first + code)
        return output(self.table[torch.stack(rows, dim=1)], torch.eye(self.vocab).double())


def enumerated(vocab: int, num_steps: int) -> tuple[torch.Tensor, np.ndarray]:
    sequences = torch.tensor(list(itertools.product(range(vocab), repeat=num_steps)))
    rewards = np.random.default_rng(3).normal(size=len(sequences)) + 2.0
    return sequences, rewards


def keep_mask(table: torch.Tensor, acting: ActingPolicy) -> np.ndarray:
    """Which tokens the truncated policy keeps after each prefix, [prefixes, V]; slow loop."""
    keep = np.zeros(table.shape, dtype=bool)
    for n, row in enumerate(table.tolist()):
        keep[n, slow_nucleus(row, acting.temperature, acting.top_p, acting.support_size)[0]] = True
    return keep


def expected_reward(
    table: np.ndarray, keep: np.ndarray, temperature: float, rewards: np.ndarray, num_steps: int
) -> float:
    """J = sum over all sequences of (product of q) * reward, the support held fixed, in numpy."""
    weights = np.where(keep, np.exp(table / temperature), 0.0)
    q = weights / weights.sum(axis=1, keepdims=True)
    vocab, total = table.shape[1], np.ones(1)
    first = 0
    for step in range(num_steps):  # probabilities of all prefixes of this length, in order
        total = (total[:, None] * q[first : first + vocab**step]).reshape(-1)
        first += vocab**step
    return float(total @ rewards)


def numerical_gradient(function, point: np.ndarray, step: float = 1e-4) -> np.ndarray:
    """Central differences with one Richardson extrapolation: error of order step^4."""
    gradient = np.zeros_like(point)
    for place in np.ndindex(*point.shape):
        slopes = []
        for h in (step, step / 2):
            up, down = point.copy(), point.copy()
            up[place] += h
            down[place] -= h
            slopes.append((function(up) - function(down)) / (2 * h))
        gradient[place] = (4 * slopes[1] - slopes[0]) / 3
    return gradient


@pytest.mark.parametrize("top_p", [0.8, 0.9])
@pytest.mark.parametrize("vocab, num_steps", [(5, 3), (6, 2)])
def test_the_gradient_is_that_of_the_truncated_policy_and_full_softmaxes_have_another(
    top_p, vocab, num_steps
):
    """E[R grad log q] over all sequences = grad J of the policy that acts; T = 1.5."""
    acting = ActingPolicy(1.5, top_p, support_size=4)
    model = PrefixTable(vocab, num_steps, seed=vocab)
    sequences, rewards = enumerated(vocab, num_steps)
    keep = keep_mask(model.table.detach(), acting)
    assert 1.5 < keep.sum(axis=1).mean() < vocab - 0.5  # truncation bites, and leaves a choice

    prompt = torch.zeros(len(sequences), 1, dtype=torch.int64)
    with torch.no_grad():  # the support that the sampler stores, from the code under test
        z = model(torch.cat([prompt, sequences[:, :-1]], dim=1), None, None, logits)
        q = nucleus(z.view(-1, vocab), acting)
        support = q.support.view(len(sequences), num_steps, -1)
        possible = (support == sequences.unsqueeze(-1)).any(dim=-1).all(dim=-1)
    sequences, support, prompt = sequences[possible], support[possible], prompt[possible]
    values = torch.from_numpy(rewards)[possible]

    def gradient(stored: torch.Tensor | None) -> np.ndarray:
        """Sequences come with the frequency of the acting policy, whatever scores them."""
        arguments = (model, prompt, torch.ones_like(prompt).bool(), sequences)
        acted = completion_scores(*arguments, support, 1.5).logprobs.sum(dim=1).detach().exp()
        assert math.isclose(acted.sum(), 1.0, rel_tol=1e-12)
        logprobs = completion_scores(*arguments, stored, 1.5).logprobs.sum(dim=1)
        model.zero_grad()
        (acted * values * logprobs).sum().backward()
        return model.table.grad.numpy().copy()

    truth = numerical_gradient(
        lambda table: expected_reward(table, keep, 1.5, rewards, num_steps),
        model.table.detach().numpy(),
    )
    assert np.abs(gradient(support) - truth).max() < 1e-8
    error = np.abs(gradient(None) - truth).max() / np.abs(truth).max()
    assert error > 0.05, error  # full softmaxes: not noise but another direction


def a_model(vocab: int = 17, seed: int = 1, model_type: str = "qwen3") -> Transformer:
    model = Transformer(TransformerConfig(model_type, vocab, 18, 23, 2, 6, 3, 6, tied_head=False))
    initialise(model, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.head.weight *= 40.0  # far from uniform
    return model.double().eval()


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_the_gradient_of_a_transformer_is_that_of_its_truncated_policy(model_type):
    """The same through a real model: slope of J along random directions in parameter space."""
    vocab, acting = 6, ActingPolicy(1.5, 0.8, 5)
    model = a_model(vocab, 3, model_type)
    sequences, rewards = enumerated(vocab, 2)
    prompt = torch.tensor([[0, 4, 1]]).expand(len(sequences), 3)
    mask = torch.tensor([[False, True, True]]).expand(len(sequences), 3)

    def table() -> torch.Tensor:
        """Logits [1 + V, V]: after the prompt, and after each first token; one row at a time."""
        rows = [model(torch.tensor([[4, 1]]), None, None, logits)[0, -1]]
        for token in range(vocab):
            rows.append(model(torch.tensor([[4, 1, token]]), None, None, logits)[0, -1])
        return torch.stack(rows)

    with torch.no_grad():
        keep = keep_mask(table(), acting)
        support = nucleus(table(), acting).support  # [1 + V, S]
    stored = torch.stack([support[:1].expand(36, -1), support[1 + sequences[:, 0]]], dim=1)
    possible = torch.tensor([keep[0, a] and keep[1 + a, b] for a, b in sequences.tolist()])
    arguments = (prompt[possible], mask[possible], sequences[possible], stored[possible], 1.5)
    logprobs = completion_scores(model, *arguments).logprobs.sum(dim=1)
    values = torch.from_numpy(rewards)[possible]
    (logprobs.detach().exp() * values * logprobs).sum().backward()

    parameters = list(model.parameters())
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        directions = [torch.randn(p.shape, generator=generator).double() for p in parameters]
        slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, directions, strict=True))

        def moved(distance: np.ndarray, directions=directions) -> float:
            with torch.no_grad():
                for p, d in zip(parameters, directions, strict=True):
                    p += float(distance[0]) * d
                value = expected_reward(table().numpy(), keep, 1.5, rewards, 2)
                for p, d in zip(parameters, directions, strict=True):
                    p -= float(distance[0]) * d
            return value

        numerical = numerical_gradient(moved, np.zeros(1), step=1e-5)[0]
        assert math.isclose(slope, numerical, rel_tol=1e-5, abs_tol=1e-7)


def test_the_mean_ratio_is_one_after_any_change_of_the_parameters():
    """E_old[q_new / q_old] = 1 on the stored support; a full softmax on top gives the kept mass."""
    acting, vocab = ActingPolicy(1.5, 0.8, 4), 5
    old, new = PrefixTable(vocab, 3, seed=1), PrefixTable(vocab, 3, seed=2)
    sequences, _ = enumerated(vocab, 3)
    prompt = torch.zeros(len(sequences), 1, dtype=torch.int64)
    with torch.no_grad():
        z = old(torch.cat([prompt, sequences[:, :-1]], dim=1), None, None, logits)
        support = nucleus(z.view(-1, vocab), acting).support.view(len(sequences), 3, -1)
        possible = (support == sequences.unsqueeze(-1)).any(dim=-1).all(dim=-1)
        rows = (prompt[possible], prompt[possible] == 0, sequences[possible])
        before = completion_scores(old, *rows, support[possible], 1.5).logprobs.sum(dim=1)
        after = completion_scores(new, *rows, support[possible], 1.5).logprobs.sum(dim=1)
        full = completion_scores(new, *rows, None, 1.5).logprobs.sum(dim=1)
    assert math.isclose((before.exp() * (after - before).exp()).sum(), 1.0, rel_tol=1e-12)
    assert (after - before).abs().max() > 1.0  # a real change
    assert (before.exp() * (full - before).exp()).sum() < 0.7


# Blocks are of 64: in the first three cases there are more of them than tokens, most left out.
@pytest.mark.parametrize(
    ("vocab", "count"), [(5001, 32), (607, 3), (300, 1), (5001, 128), (130, 128), (300, 7)]
)
@pytest.mark.parametrize("scale", [0.3, 2.0, 1e9])
def test_the_largest_by_blocks_are_those_of_a_stable_sort(vocab, count, scale):
    generator = torch.Generator().manual_seed(vocab)
    z = torch.randn(40, vocab, generator=generator)
    if scale < 1e9:
        z = (z * scale).round()  # many equal ones
    z[:, ::7] = -torch.inf
    z[0], z[1], z[1, ::2] = 0.0, -0.0, 0.0
    values, order = torch.sort(z, dim=-1, descending=True, stable=True)
    best, ids = largest_by_blocks(z, count)
    assert torch.equal(best, values[:, :count])
    assert torch.equal(ids, order[:, :count])


def test_the_largest_by_blocks_tell_neighbouring_floats_apart():
    """Of either sign, the smallest and others: each next to the one that follows it."""
    steps = torch.arange(-31, 32, dtype=torch.int32)
    near = torch.tensor([0x2000, 0x3F000000, 0x40490FDB, 0x7E000000], dtype=torch.int32)  # bits
    sizes = (near.view(-1, 1) + steps).flatten().view(torch.float32)
    values = torch.cat([sizes, -sizes])
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(13))
    best, ids = largest_by_blocks(values[order].view(1, -1), len(values))
    assert best[0].tolist() == sorted(values.tolist(), reverse=True)
    assert torch.equal(values[order][ids[0]], best[0])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_of_nans_are_places_of_the_vocabulary(sign):
    """A negative NaN is less than the -inf that fills the last block."""
    bad = torch.full((3, 67), math.nan).copysign(torch.tensor(sign))
    _, ids = largest_by_blocks(bad, 67)
    assert 0 <= ids.min() and ids.max() < 67


@pytest.mark.parametrize(("vocab", "temperature"), [(5001, 1.0), (5120, 1.7)])
def test_a_draw_by_blocks_is_the_inverse_of_the_whole_running_sum(vocab, temperature):
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(1, vocab, generator=generator)
    z[:, ::5] = z[:, 256:384] = -torch.inf  # tokens and a whole block that cannot be drawn
    p = F.softmax(z.double() / temperature, dim=-1)[0]
    n = 20_000
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens, logq = draw_untruncated(z.expand(n, -1), temperature, uniforms, False)
    wanted = torch.searchsorted(p.cumsum(0), uniforms, right=True)
    assert (tokens != wanted).double().mean() < 3e-4  # at the border of two tokens
    torch.testing.assert_close(logq.double(), p.log()[tokens], rtol=1e-5, atol=1e-5)
    ends = torch.tensor([0.0, 1 - 2**-53, 1.0], dtype=torch.float64)
    tokens, _ = draw_untruncated(z.expand(3, -1), temperature, ends, False)
    possible = (p > 0).nonzero()
    assert tokens.tolist() == [int(possible[0]), int(possible[-1]), int(possible[-1])]


@pytest.mark.parametrize("shift", [-1100.0, 1100.0])
def test_a_draw_by_blocks_knows_no_constant_in_the_logits(shift):
    """Its exponential would be 0 or infinite, in float64 too."""
    z = torch.randn(7, 300, generator=torch.Generator().manual_seed(14)).mul(64).round() / 64
    uniforms = (torch.arange(7, dtype=torch.float64) + 0.5) / 7
    tokens, logq = draw_untruncated(z, 1.0, uniforms, False)
    again, shifted = draw_untruncated(z + shift, 1.0, uniforms, False)  # exact: steps of 1 / 64
    assert torch.equal(again, tokens)
    assert torch.allclose(shifted, logq, rtol=0, atol=1e-3)


def test_a_draw_by_blocks_reaches_every_token_of_a_tail_that_float32_has_no_numbers_for():
    """Behind a token of probability 1 others of 1e-11 each, in its block and in the next ones."""
    z = torch.full((1, 200), math.log(1e-11))
    z[0, 0] = 0.0
    p = z[0].double().softmax(dim=0)
    middle = p.cumsum(0) - p / 2
    tokens, _ = draw_untruncated(z.expand(200, -1), 1.0, middle, False)
    assert tokens.tolist() == list(range(200))
