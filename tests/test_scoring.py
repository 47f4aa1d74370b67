"""Scores of completions against one row at a time, autograd and the whole vocabulary."""

import pytest
import torch
from test_policy import a_model, random_supports

from minigrpo import scoring
from minigrpo.policy import TokenScores, score_logits
from minigrpo.scoring import completion_scores
from minigrpo.transformer import Transformer, TransformerConfig, initialise, logits
from minigrpo.untruncated import score_all, score_untruncated


@pytest.mark.parametrize("is_banned", [False, True])
def test_scores_of_a_gpu_by_hand_are_those_of_autograd(is_banned):
    generator = torch.Generator().manual_seed(5)
    z = (3 * torch.randn(2, 5, 13, generator=generator)).double()
    tokens = torch.randint(6, (2, 5), generator=generator)
    if is_banned:
        z[:, :, 7] = -torch.inf
    weights = torch.randn(2, 5, generator=generator).double()
    found = []
    for way in (score_logits, score_untruncated):
        rest = (None,) if way is score_logits else (True, False)
        leaf = z.clone().requires_grad_()
        scores = way(leaf, tokens, *rest)
        (weights * scores.logprobs).sum().backward()
        assert not scores.entropy.requires_grad
        found.append((scores.logprobs.detach(), scores.entropy, leaf.grad))
    for theirs, ours in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)
    basis = torch.rand(13, 3, generator=generator)
    assert torch.equal(score_all(z, tokens, basis, True).entropy, found[0][1])
    assert score_untruncated(z, tokens, False, False).entropy is None
    for way in (
        lambda: score_all(z, tokens, basis, False),
        lambda: score_logits(z, tokens, None, basis, has_entropy=False),
    ):
        assert way().entropy is None and way().mass.shape == (2, 5, 3)
    half = z.bfloat16().requires_grad_()
    score_untruncated(half, tokens, False, False).logprobs.sum().backward()
    assert half.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("what", ["logprobs", "mass", "of a GPU"])
def test_gradients_by_hand_refuse_a_second_derivative(what):
    """It would take what was saved for a constant."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 3, 7, generator=generator).double().requires_grad_()
    tokens, basis = torch.full((2, 3), 4), torch.rand(7, 4, generator=generator)
    if what == "of a GPU":
        value = score_untruncated(z, tokens, False, False).logprobs
    else:
        value = getattr(score_all(z, tokens, basis, False), what)
    (first,) = torch.autograd.grad(value.square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


def test_choices_by_hand_are_as_exact_under_autocast_as_without():
    """Value, gradient and dtype, where products of float32 would be made of bfloat16."""
    generator = torch.Generator().manual_seed(7)
    z, basis = torch.randn(2, 5, 13, generator=generator), torch.randn(13, 3, generator=generator)
    tokens = torch.randint(13, (2, 5), generator=generator)
    found = []
    for is_mixed in (False, True):
        leaf = z.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            scores = score_all(leaf, tokens, basis, True)
        (scores.logprobs.sum() + scores.mass.square().sum()).backward()
        found.append((scores.logprobs.detach(), scores.entropy, scores.mass.detach(), leaf.grad))
    for plain, mixed in zip(*found, strict=True):
        assert torch.equal(mixed, plain)


def a_batch(vocab: int = 17) -> tuple[torch.Tensor, ...]:
    """Prompts [5, 7] of mixed length, completions [5, 11], supports [5, 11, 6]."""
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(vocab, (5, 7), generator=generator)
    lengths = torch.tensor([7, 3, 5, 1, 7]).view(5, 1)
    supports, tokens = random_supports(3, 55, vocab, 6)
    mask = torch.arange(7) >= 7 - lengths
    return prompts, mask, tokens.view(5, 11), supports.view(5, 11, 6).int()


@torch.no_grad()
@pytest.mark.parametrize("truncated", [True, False])
def test_completions_are_scored_as_one_row_at_a_time_without_padding(truncated):
    """The reference feeds each row alone and takes the logits before each completion token."""
    model, (prompts, mask, tokens, support) = a_model(), a_batch()
    support = support if truncated else None
    scores = completion_scores(model, prompts, mask, tokens, support, 1.5)
    for n in range(5):
        row = torch.cat([prompts[n][mask[n]], tokens[n]])
        z = model(row.view(1, -1), None, None, logits)[0, int(mask[n].sum()) - 1 : -1]
        alone = score_logits(
            z.view(1, 11, 17) / 1.5,
            tokens[n : n + 1],
            None if support is None else support[n : n + 1],
        )
        assert torch.allclose(scores.logprobs[n], alone.logprobs[0], atol=1e-9)
        assert torch.allclose(scores.entropy[n], alone.entropy[0], atol=1e-9)
        with torch.no_grad():
            first = model(prompts[n][mask[n]].view(1, -1), None, None, logits)[0, -1] / 1.5
        kept = range(17) if support is None else [t for t in support[n, 0].tolist() if t >= 0]
        expected = first[tokens[n, 0]] - first[list(kept)].logsumexp(dim=0)
        assert torch.allclose(scores.logprobs[n, 0], expected, atol=1e-9)


@torch.no_grad()
def test_what_follows_a_token_does_not_change_its_score():
    model, (prompts, mask, tokens, support) = a_model(), a_batch()
    whole = completion_scores(model, prompts, mask, tokens, None, 1.0).logprobs
    changed = tokens.clone()
    changed[:, 4:] = 0
    scores = completion_scores(model, prompts, mask, changed, None, 1.0).logprobs
    assert torch.allclose(scores[:, :4], whole[:, :4], atol=1e-12)
    shorter = completion_scores(model, prompts, mask, tokens[:, :1], support[:, :1], 1.0)
    assert shorter.logprobs.shape == (5, 1)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("has_checkpoints", [False, True])
def test_a_prompt_fed_once_for_its_rows_changes_neither_scores_nor_gradient(
    model_type, length, has_checkpoints, monkeypatch
):
    """Three prompts of seven tokens, two rows each: 21 + 6 Q tokens are fed, not 6 (7 + Q)."""
    generator = torch.Generator().manual_seed(4)
    prompts = torch.randint(17, (3, 7), generator=generator)
    tokens = torch.randint(17, (6, length), generator=generator)
    weights = torch.randn(6, length, generator=generator).double()
    model = a_model(model_type=model_type).train()
    model.gradient_checkpointing = has_checkpoints
    fed = []
    model.embed.register_forward_hook(lambda _, inputs, __: fed.append(inputs[0].numel()))
    found = []
    for each, least, mask in (
        (prompts.repeat_interleave(2, 0), 1, torch.ones(6, 7, dtype=torch.bool)),
        (prompts, 1, torch.ones(3, 7, dtype=torch.bool)),
        (prompts, 8, None),
        (prompts, 1, None),
    ):
        monkeypatch.setattr(scoring, "SHARED_FROM", least)
        model.zero_grad()
        scores = completion_scores(model, each, mask, tokens, None, 1.2)
        (weights * scores.logprobs).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append((scores.logprobs.detach(), scores.entropy, gradient))
    once_a_row, once = 6 * (6 + length), 21 + 6 * (length - 1)
    assert fed == [once_a_row, once, once_a_row, once]
    for apart, shared, short, unasked in zip(*found, strict=True):
        assert torch.allclose(shared, apart, rtol=1e-10, atol=1e-12)
        assert torch.equal(short, apart) and torch.equal(unasked, shared)


def test_prompts_with_padding_are_fed_once_a_row(monkeypatch):
    monkeypatch.setattr(scoring, "SHARED_FROM", 1)
    model, (prompts, mask, tokens, support) = a_model(), a_batch()
    twice = [x.repeat_interleave(2, 0) for x in (prompts, mask, tokens, support)]
    wanted = completion_scores(model, *twice, 1.5).logprobs
    assert torch.equal(completion_scores(model, prompts, mask, *twice[2:], 1.5).logprobs, wanted)


@pytest.mark.parametrize("truncated", [True, False])
@pytest.mark.parametrize("positions", [1, 3, 10, 11])
def test_chunks_of_positions_change_neither_value_nor_gradient(truncated, positions, monkeypatch):
    model, (prompts, mask, tokens, support) = a_model(), a_batch()
    weights = torch.randn(5, 11, generator=torch.Generator().manual_seed(6)).double()
    largest = [0]

    def watched(z: torch.Tensor, *rest: object) -> TokenScores:
        largest[0] = max(largest[0], z.numel())
        return score_logits(z, *rest)

    monkeypatch.setattr(scoring, "score_logits", watched)
    results = []
    for limit in (2**26, positions * 5 * 17 + 1):
        monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", limit)
        model.zero_grad()
        largest[0] = 0
        scores = completion_scores(
            model, prompts, mask, tokens, support if truncated else None, 1.5
        )
        (weights * scores.logprobs).sum().backward()
        assert largest[0] <= limit
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((scores.logprobs.detach(), scores.entropy, gradient))
    for whole, chunked in zip(*results, strict=True):
        assert torch.allclose(whole, chunked, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows, width", [(7, 3), (7, 31), (19, 3), (19, 31)])
@pytest.mark.parametrize(
    "most, expected", [(0, [1] * 13), (4, [4, 4, 4, 1]), (6, [5, 5, 3]), (13, [13])]
)
def test_chunks_are_as_few_and_as_equal_as_the_limit_allows(
    rows, width, most, expected, monkeypatch
):
    """Whether rows, positions or the width are most; one that is too large goes alone."""
    monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", rows * (most + 1) * 5 - 1)  # of 5 words
    found = []

    def watched(z: torch.Tensor) -> tuple[torch.Tensor]:
        found.append(z.shape[1])
        return (z.sum(dim=-1),)

    scoring.in_chunks(watched, torch.ones(rows, 13, width), torch.ones(5, width))
    assert found == expected


def test_gradients_of_chunks_add_up_in_float32(monkeypatch):
    """512 equal chunks in bfloat16: a sum that is rounded to 8 bits at every addend stops short."""
    hidden = torch.ones(1, 512, 4)
    head = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", 6)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = scoring.in_chunks(lambda z: (z.float().sum(dim=-1),), hidden, head)
    found.sum().backward()
    assert torch.allclose(head.grad, torch.full((6, 4), 512.0))


def test_a_rank_without_rows_has_scores_and_a_zero_gradient():
    model, (prompts, mask, tokens, support) = a_model(), a_batch()
    scores = completion_scores(model, prompts[:0], mask[:0], tokens[:0], support[:0], 1.5)
    assert scores.logprobs.shape == (0, 11)
    scores.logprobs.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.slow  # half a minute of compiling
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("has_support", [False, True])
def test_fused_scores_and_gradients_are_the_plain_ones(monkeypatch, has_support):
    model = Transformer(TransformerConfig("qwen2", 5000, 32, 48, 2, 4, 2, 8))
    initialise(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.norm.weight *= 20
    prompts, mask = torch.randint(2, 5000, (4, 6)), torch.ones(4, 6, dtype=torch.bool)
    mask[1, :3] = False
    tokens = torch.randint(2, 5000, (4, 23))
    support = torch.randint(0, 5000, (4, 23, 16), dtype=torch.int32) if has_support else None
    monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", 4 * 5000 * 6)  # in four chunks
    found = []
    for model.is_fused in (False, True):
        model.zero_grad()
        scores = completion_scores(model, prompts, mask, tokens, support, 1.2)
        (scores.logprobs * torch.linspace(-1, 1, 23)).sum().backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        found.append([scores.logprobs.detach(), scores.entropy, *gradients])
    for plain, fused in zip(*found, strict=True):
        assert (plain - fused).abs().max() <= 1e-5 * plain.abs().max()
