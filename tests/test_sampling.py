"""Decoding with a cache against transformers and scoring; masks, stopping, stored supports."""

import gc
import math
import weakref
from dataclasses import replace
from unittest import mock

import pytest
import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from minigrpo import sampling
from minigrpo.data import token_uniforms
from minigrpo.hugging_face import save_transformer
from minigrpo.policy import ActingPolicy, nucleus
from minigrpo.sampling import Completions, StopRule, sample_completions
from minigrpo.scoring import completion_scores
from minigrpo.transformer import KVCache, Transformer, TransformerConfig, initialise, logits

VOCAB, EOS, PAD = 29, 1, 0


def a_model(model_type: str = "qwen2", seed: int = 1) -> Transformer:
    model = Transformer(TransformerConfig(model_type, VOCAB, 36, 23, 2, 6, 3, 6, tied_head=False))
    initialise(model, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.head.weight *= 18.0  # neither uniform nor sure
    return model.eval()


def some_prompts(lengths: tuple[int, ...], seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded; the ids under the padding are arbitrary, since nobody may look at them."""
    longest = max(lengths)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB, (len(lengths), longest), generator=generator)
    return tokens, torch.arange(longest) >= longest - torch.tensor(lengths).view(-1, 1)


MODEL, PROMPTS = a_model(), some_prompts((5, 2, 7, 1))
STOP = StopRule((EOS,), PAD, 13)


def uniforms_of(num_rows: int, length: int, seed: int = 4) -> torch.Tensor:
    return torch.rand(num_rows, length, generator=torch.Generator().manual_seed(seed))


def sampled(
    acting: ActingPolicy = ActingPolicy(1.5, 0.9, 11),  # noqa: B008  a frozen record
    stop: StopRule = STOP,
    group_size: int = 3,
    **changes: object,
) -> Completions:
    uniforms = uniforms_of(4 * group_size, stop.max_length)
    arguments = {"model": MODEL, "uniforms": uniforms} | changes
    return sample_completions(
        prompt_tokens=PROMPTS[0],
        prompt_mask=PROMPTS[1],
        group_size=group_size,
        acting=acting,
        stop=stop,
        **arguments,
    )


class Chain(nn.Module):
    """A language model whose next token depends on the last one alone: logits [V, V] by hand."""

    is_fused = False

    def __init__(self, table: torch.Tensor):
        super().__init__()
        vocab = len(table)
        self.config = TransformerConfig("llama", vocab, 2, 1, 1, 1, 1, 2)
        self.embed = nn.Embedding(vocab, vocab, _weight=table)
        self.num_calls = 0

    def forward(self, tokens, mask, cache, output):
        cache.length += tokens.shape[1]
        self.num_calls += 1
        return output(self.embed(tokens), torch.eye(len(self.embed.weight)))


def chain(vocab: int, moves: dict[int, int]) -> Chain:
    """After token a comes moves[a], surely."""
    table = torch.zeros(vocab, vocab)
    for last, following in moves.items():
        table[last, following] = 1e4
    return Chain(table)


@pytest.mark.parametrize("prompt_mask", [torch.tensor([[True]]), None])
def test_the_worked_example_of_the_module(prompt_mask):
    """House example: two rows end, one is cut off; token 9 was drawn from {5, 9}."""
    p = torch.full((11, 11), 1e-6)
    p[2, [5, 9, 7]] = torch.tensor([0.6, 0.35, 0.05])  # the prompt is token 2
    p[5, [7]] = 1.0
    p[7, [1, 7]] = torch.tensor([0.5, 0.5])
    p[9, [1]] = 1.0
    temperature = 1.5
    model = Chain(temperature * p.log())
    uniforms = torch.tensor([[0.1, 0.5, 0.2], [0.9, 0.5, 0.0], [0.6, 0.5, 0.9]])
    got = sample_completions(
        model, torch.tensor([[2]]), prompt_mask, 3,
        ActingPolicy(temperature, 0.9, 4), StopRule((1,), 0, 3), uniforms,
    )  # fmt: skip
    assert got.tokens.tolist() == [[5, 7, 1], [9, 1, 0], [5, 7, 7]]
    assert got.mask.int().tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1]]
    assert got.ended.tolist() == [True, True, False]
    assert got.support[1].tolist() == [[5, 9], [1, -1], [0, -1]]
    expected = torch.tensor(
        [[0.6 / 0.95, 1.0, 0.5], [0.35 / 0.95, 1.0, 1.0], [0.6 / 0.95, 1.0, 0.5]]
    )
    assert torch.allclose(got.sampling_logprobs, expected.log(), atol=1e-4)  # 1e-6 elsewhere
    assert torch.allclose(got.kept_mass[:, 0], torch.tensor(0.95), atol=1e-4)


@pytest.mark.parametrize(
    "moves, eos_ids, tokens, mask, ended",
    [
        ({2: 1}, (1,), [1], [1], True),  # EOS at once
        ({2: 5, 5: 1}, (1,), [5, 1], [1, 1], True),
        ({2: 5, 5: 6, 6: 7, 7: 1}, (1,), [5, 6, 7, 1], [1, 1, 1, 1], True),  # in the last place
        ({2: 5, 5: 6, 6: 7, 7: 8}, (1,), [5, 6, 7, 8], [1, 1, 1, 1], False),  # never
        ({2: 5, 5: 8}, (1, 8), [5, 8], [1, 1], True),  # the second of two EOS ids
        ({2: 0, 0: 0}, (1,), [0, 0, 0, 0], [1, 1, 1, 1], False),  # pad is sampled: inside the mask
        ({2: 5, 5: 5}, (), [5, 5, 5, 5], [1, 1, 1, 1], False),  # nothing stops it
    ],
)
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_the_mask_covers_what_was_sampled_up_to_and_including_eos(
    moves, eos_ids, tokens, mask, ended, top_p
):
    got = sample_completions(
        chain(9, moves), torch.tensor([[2]]), torch.tensor([[True]]), 1,
        ActingPolicy(1.0, top_p, 3), StopRule(eos_ids, 0, 4), torch.full((1, 4), 0.5),
    )  # fmt: skip
    assert got.tokens.tolist() == [tokens]
    assert got.mask.int().tolist() == [mask]
    assert got.ended.tolist() == [ended]
    assert top_p == 1.0 or got.support.tolist() == [[[token] for token in tokens]]


@pytest.mark.parametrize("pad", [0, 1])
def test_rows_of_different_length_and_a_pad_that_is_eos(pad):
    """Prompts 2, 3, 4 end after 1, 2 and never; with pad = EOS the mask is the same."""
    moves = {2: 1, 3: 5, 5: 1, 4: 6, 6: 6, 1: 7, 0: 7}
    got = sample_completions(
        chain(9, moves), torch.tensor([[2], [3], [4]]), torch.ones(3, 1).bool(), 1,
        ActingPolicy(1.0, 0.9, 3), StopRule((1,), pad, 4), torch.full((3, 4), 0.5),
    )  # fmt: skip
    assert got.tokens.tolist() == [[1, pad, pad, pad], [5, 1, pad, pad], [6, 6, 6, 6]]
    assert got.mask.sum(dim=1).tolist() == [1, 2, 4]
    assert got.ended.tolist() == [True, True, False]
    assert got.support[0].tolist() == [[1], [pad], [pad], [pad]]


def test_decoding_stops_with_the_last_row():
    moves = {2: 1, 3: 5, 5: 1}
    model = chain(9, moves)
    got = sample_completions(
        model, torch.tensor([[2], [3]]), torch.ones(2, 1).bool(), 1,
        ActingPolicy(), StopRule((1,), 0, 400), torch.full((2, 400), 0.5),
    )  # fmt: skip
    assert got.tokens.shape == (2, 2)
    assert model.num_calls == 2  # the prompts, and token 5; EOS is never fed


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("num_eos", [1, 3])
def test_greedy_with_cache_is_generate_of_transformers(model_type, num_eos, tmp_path):
    ours = a_model(model_type, seed=3)
    save_transformer(ours, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens, mask = some_prompts((5, 2, 7, 1, 4, 6), seed=5)
    endless = sample_completions(
        ours, tokens, mask, 1, ActingPolicy(), StopRule((), PAD, 13), None
    ).tokens
    eos_ids = (EOS, int(endless[0, 4]), int(endless[3, 7]))[:num_eos]  # stops that will be met
    expected = theirs.generate(
        tokens, attention_mask=mask.long(), do_sample=False, max_new_tokens=13,
        eos_token_id=list(eos_ids), pad_token_id=PAD,
    )[:, 7:]  # fmt: skip
    for acting in (ActingPolicy(1.5, 0.9, 8), ActingPolicy(0.7, 1.0, 8)):
        got = sample_completions(
            ours, tokens, mask, 1, acting, StopRule(eos_ids, PAD, 13), None, rows_per_batch=4
        )
        assert got.tokens.tolist() == expected.tolist()
    lengths = got.mask.sum(dim=1)
    assert num_eos == 1 or (got.ended.any() and len(lengths.unique()) > 2)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_the_decoders_logprobs_are_those_of_the_scorer(temperature, top_p):
    got = sampled(ActingPolicy(temperature, top_p, 11))
    prompts = (t.repeat_interleave(3, dim=0) for t in PROMPTS)
    with torch.no_grad():
        scores = completion_scores(MODEL, *prompts, got.tokens, got.support, temperature)
    assert (got.sampling_logprobs[got.mask] < -1e-3).float().mean() > 0.3  # there was a choice
    gap = (scores.logprobs - got.sampling_logprobs)[got.mask].abs().max()
    assert gap < 2e-5  # float32, sums of a few dozen terms in another order
    if got.support is not None:
        padding = ~got.mask
        assert padding.any()
        assert (scores.logprobs[padding] == 0).all() and (scores.entropy[padding] == 0).all()
    assert (got.sampling_logprobs[~got.mask] == 0).all()


def test_the_decoders_logprobs_are_those_of_the_scorer_within_bfloat16():
    with torch.autocast("cpu", torch.bfloat16):
        got = sampled(ActingPolicy(1.0, 0.9, 11))
        prompts = (t.repeat_interleave(3, dim=0) for t in PROMPTS)
        with torch.no_grad():
            scores = completion_scores(MODEL, *prompts, got.tokens, got.support, 1.0)
    assert scores.logprobs.dtype == got.sampling_logprobs.dtype == torch.float32
    assert scores.entropy.dtype == torch.float32 and scores.entropy.isfinite().all()
    assert ((got.support < 0).any(dim=-1) & got.mask).any()  # log 0 among them
    assert (scores.logprobs - got.sampling_logprobs)[got.mask].abs().mean() < 0.05


@torch.no_grad()
@pytest.mark.parametrize("is_large", [False, True])
def test_every_stored_support_is_the_nucleus_of_its_prefix(is_large, monkeypatch):
    """Recomputed from one row at a time, without cache or padding."""
    monkeypatch.setattr(sampling, "LARGE_VOCABULARY", 0 if is_large else VOCAB)
    acting = ActingPolicy(1.5, 0.9, 11)
    got = sampled(acting)
    widest = 0
    for n in range(12):
        tokens, mask = PROMPTS[0][n // 3], PROMPTS[1][n // 3]
        length = int(got.mask[n].sum())
        row = torch.cat([tokens[mask], got.tokens[n, :length]])
        z = MODEL(row.view(1, -1), None, None, logits)[0, int(mask.sum()) - 1 : -1]
        q = nucleus(z, acting)
        for c in range(length):
            kept = q.support[c][q.support[c] >= 0].tolist()
            stored = got.support[n, c].tolist()
            assert stored[: len(kept)] == kept
            assert all(token == -1 for token in stored[len(kept) :])
            assert int(got.tokens[n, c]) in kept
            assert math.isclose(got.kept_mass[n, c], q.kept_mass[c], rel_tol=1e-5)
            assert bool(got.is_capped[n, c]) == bool(q.is_capped[c])
            widest = max(widest, len(kept))
        assert (got.support[n, length:, 0] == PAD).all()
        assert (got.support[n, length:, 1:] == -1).all()
        assert (got.kept_mass[n, length:] == 1).all() and not got.is_capped[n, length:].any()
    assert got.support.shape[2] == widest and got.support.dtype == torch.int32
    assert got.is_capped.dtype == torch.bool
    assert got.is_capped.any() and not got.is_capped[got.mask].all()


def test_without_truncation_no_support_is_stored():
    got = sampled(ActingPolicy(1.0, 1.0, 2))
    assert got.support is None
    assert (got.kept_mass == 1).all() and not got.is_capped.any()
    assert len(got.tokens[:, 0].unique()) > 2  # support_size does not bind


@pytest.mark.parametrize(
    ("rows_per_batch", "together"), [(1, 3), (3, 3), (5, 3), (7, 6), (512, 12)]
)
def test_the_rows_decoded_together_change_nothing(rows_per_batch, together, monkeypatch):
    """They are whole groups, one at least, and no more than they may be: this bounds the cache."""
    whole = sampled(rows_per_batch=12)
    decoder = mock.Mock(side_effect=sampling._decoder)
    monkeypatch.setattr(sampling, "_decoder", decoder)
    got = sampled(rows_per_batch=rows_per_batch)
    batches = [batch for (_, batch), _ in decoder.call_args_list]
    assert {batch.num_prompts * batch.group_size for batch in batches} == {together}
    for name in ("tokens", "mask", "support", "ended", "is_capped"):
        assert torch.equal(getattr(got, name), getattr(whole, name)), name
    assert torch.allclose(got.sampling_logprobs, whole.sampling_logprobs, atol=1e-5)


def test_a_prompts_completions_do_not_depend_on_the_other_prompts():
    got, order = sampled(), torch.tensor([2, 0, 3])
    rows = (3 * order.view(-1, 1) + torch.arange(3)).flatten()
    fewer = sample_completions(
        MODEL, PROMPTS[0][order], PROMPTS[1][order], 3, ActingPolicy(1.5, 0.9, 11), STOP,
        uniforms_of(12, 13)[rows],
    )  # fmt: skip
    width = fewer.tokens.shape[1]
    assert torch.equal(fewer.tokens, got.tokens[rows, :width])
    assert torch.equal(fewer.mask, got.mask[rows, :width])
    assert not got.mask[rows, width:].any()


def test_members_of_a_group_differ_but_equal_uniforms_give_equal_rows():
    apart = sampled()
    groups = apart.tokens.view(4, 3, -1)
    assert all(len(group.unique(dim=0)) > 1 for group in groups)
    assert len(apart.tokens.unique(dim=0)) > 9
    shared = uniforms_of(4, 13).repeat_interleave(3, dim=0)
    together = sampled(uniforms=shared).tokens.view(4, 3, -1)
    assert all(len(group.unique(dim=0)) == 1 for group in together)


def test_group_size_one_is_the_first_member_of_each_group():
    whole = sampled()
    alone = sampled(group_size=1, uniforms=uniforms_of(12, 13)[::3])
    width = min(alone.tokens.shape[1], whole.tokens.shape[1])
    assert torch.equal(alone.tokens[:, :width], whole.tokens[::3, :width])


def test_frequencies_fit_q():
    """Chi-square of the first token over a group of 4,000, with the uniforms that training uses."""
    acting, num = ActingPolicy(1.5, 0.9, 11), 4000
    tokens, mask = PROMPTS[0][:1], PROMPTS[1][:1]
    uniforms = token_uniforms(0, torch.tensor([7]), num, 1)
    stop = StopRule((EOS,), PAD, 1)
    got = sample_completions(MODEL, tokens, mask, num, acting, stop, uniforms, rows_per_batch=num)
    with torch.no_grad():
        q = nucleus(MODEL(tokens[:, 2:], None, None, logits)[:, -1], acting)
    kept = q.support[0] >= 0
    counts = got.tokens[:, 0].bincount(minlength=VOCAB)[q.support[0][kept]]
    assert counts.sum() == num
    expected = num * q.logprobs[0][kept].exp()
    freedom = int(kept.sum()) - 1
    assert freedom >= 4
    chi2 = float(((counts - expected).square() / expected).sum())
    assert abs(chi2 - freedom) < 4 * math.sqrt(2 * freedom)


def test_each_token_is_decided_by_its_own_uniform():
    """From seven equally likely tokens the uniform u takes number floor(7 u)."""
    uniforms = uniforms_of(6, 13)
    got = sample_completions(
        Chain(torch.zeros(7, 7)), torch.tensor([[2], [3]]), torch.ones(2, 1).bool(), 3,
        ActingPolicy(1.5, 1.0), StopRule((), 0, 13), uniforms,
    )  # fmt: skip
    assert torch.equal(got.tokens, (7 * uniforms).long())


@pytest.mark.parametrize("model", [MODEL, a_model().double()])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_cache_has_the_precision_of_the_computation(model, autocast, monkeypatch):
    dtypes = set()

    class Watched(KVCache):
        def __init__(self, config, num_rows, max_length, device, dtype):
            dtypes.add(dtype)
            super().__init__(config, num_rows, max_length, device, dtype)

    monkeypatch.setattr(sampling, "KVCache", Watched)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        sampled(model=model)
    own = model.embed.weight.dtype  # autocast leaves float64 alone
    assert dtypes == {torch.bfloat16 if autocast and own == torch.float32 else own}


def test_a_batch_has_given_its_cache_back_before_the_next_one_has_one(monkeypatch):
    alive, most = weakref.WeakSet(), []

    class Watched(KVCache):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr(sampling, "KVCache", Watched)
    sampled(rows_per_batch=3)
    assert most == [1, 2] * 4  # of its prompts and of its rows


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_tokens_do_not_depend_on_how_the_cache_grows(top_p, monkeypatch):
    """Padded prompts of seven and thirteen new tokens: room for all at once, or for three more."""
    acting = ActingPolicy(1.5, top_p, 11)
    at_once = sampled(acting)
    monkeypatch.setattr(KVCache, "GROWTH", 3)
    growing = sampled(acting)
    assert torch.equal(growing.tokens, at_once.tokens)
    assert torch.allclose(growing.sampling_logprobs, at_once.sampling_logprobs, atol=1e-5)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"uniforms must have shape \[12, 13\], got \(12, 12\)"):
        sampled(uniforms=torch.zeros(12, 12))
    with pytest.raises(ValueError, match=r"ended must have shape \[N\] with N=12"):
        replace(sampled(), ended=torch.zeros(11, dtype=torch.bool))


def test_sampling_leaves_its_arguments_and_the_model_as_they_were():
    uniforms = uniforms_of(12, 13)
    before = [t.clone() for t in (*PROMPTS, uniforms, *MODEL.parameters())]
    sampled(uniforms=uniforms)
    after = (*PROMPTS, uniforms, *MODEL.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in MODEL.parameters())


def as_if_recorded(monkeypatch):
    """The path of CUDA with its copy of the weights and kept tensors, kernels run one by one."""
    monkeypatch.setattr(sampling, "has_graphs", lambda model, device: True)
    monkeypatch.setattr(sampling._Decoder, "_replay", sampling._Decoder._advance)
    monkeypatch.setattr(sampling._Decoder, "TOKENS_PER_GRAPH", 3)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("is_mixed", [False, True])
def test_a_kept_decoder_draws_with_the_weights_of_now(monkeypatch, model_type, is_mixed):
    config = TransformerConfig(model_type, 31, 16, 24, 2, 4, 2, 4, tied_head=model_type == "qwen2")
    model = Transformer(config)
    initialise(model, torch.Generator().manual_seed(2))
    with torch.no_grad():
        model.norm.weight *= 30
    prompts, mask = torch.randint(2, 31, (3, 5)), torch.ones(3, 5, dtype=torch.bool)
    mask[1, :2] = False
    uniforms = torch.rand(6, 8)
    acting, stop = ActingPolicy(1.2, 0.9, 6), StopRule((1,), 0, 8)

    def found():
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            return sample_completions(model, prompts, mask, 2, acting, stop, uniforms)

    def equal(one, other):
        return all(
            torch.equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True)
        )

    first = found()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    second = found()
    assert not equal(first, second)
    as_if_recorded(monkeypatch)
    for _ in range(3):  # the first is not recorded, the third not new
        assert equal(found(), second)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    third = found()
    assert not equal(third, second)
    kind = torch.bfloat16 if is_mixed else torch.float32, torch.device("cpu")
    assert sampling._KEPT[model].copies.keys() == {kind}
    (kept,) = sampling._KEPT.pop(model).decoders.values()
    monkeypatch.undo()
    assert equal(found(), third)
    assert not any(parameter.requires_grad for parameter in kept.model.parameters())
    assert kept.model.blocks[0].mlp.down.weight.dtype == (
        torch.bfloat16 if is_mixed else torch.float32
    )
    assert kept.model.embed.weight.dtype == kept.model.norm.weight.dtype == torch.float32


@pytest.mark.parametrize("top_p", [0.8, 1.0])
def test_a_kept_decoder_leaves_nothing_of_a_longer_batch_in_a_shorter_one(monkeypatch, top_p):
    """Of one call, whose rows are cut to the longest of both."""
    acting, stop = ActingPolicy(1.5, top_p, 5), StopRule((1, 2, 3, 4), PAD, 13)
    uniforms, model = uniforms_of(12, 13, seed=39), a_model()

    def found():
        return sampled(acting, stop, model=model, uniforms=uniforms, rows_per_batch=6)

    expected = found()
    lengths = expected.mask.sum(dim=1)
    assert lengths[:6].max() > lengths[6:].max() + 3  # more than are decoded at once
    assert top_p == 1.0 or (expected.support[6:, -1, 1:] == -1).all()
    assert (expected.kept_mass[6:, -1] == 1).all()
    as_if_recorded(monkeypatch)
    for _ in range(2):  # in the first the second batch, then both are in the same tensors
        for one, other in zip(vars(found()).values(), vars(expected).values(), strict=True):
            assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("has_graphs", [False, True])
def test_under_autocast_weights_are_cast_once_and_tokens_are_those_of_casting_at_each(
    monkeypatch, has_graphs
):
    monkeypatch.setattr(sampling, "has_graphs", lambda model, device: has_graphs)
    model = Transformer(TransformerConfig("qwen2", 31, 16, 24, 2, 4, 2, 4))
    initialise(model, torch.Generator().manual_seed(2))
    prompts, mask, uniforms = torch.full((2, 3), 5), torch.ones(2, 3).bool(), torch.rand(6, 8)
    work = (prompts, mask, 3, ActingPolicy(1.2, 0.9, 6), StopRule((1,), 0, 8), uniforms)

    def found():
        with torch.autocast("cpu", torch.bfloat16):
            return sample_completions(model, *work)

    once = found()
    (copied,) = sampling._KEPT[model].copies.values()
    assert copied.head.weight.dtype == copied.blocks[1].attention.qkv.weight.dtype == torch.bfloat16
    assert copied.embed.weight.dtype == torch.float32
    monkeypatch.setattr(sampling, "_kept_copy", lambda model, dtype: model)
    sampling._KEPT[model].seen.clear()  # again the first of its kind, which is not recorded
    for one, other in zip(vars(once).values(), vars(found()).values(), strict=True):
        assert torch.equal(one, other)


def test_few_decoders_are_kept_and_none_of_a_model_that_is_gone(monkeypatch):
    as_if_recorded(monkeypatch)
    model = Transformer(TransformerConfig("llama", 31, 16, 24, 1, 2, 2, 8))
    initialise(model, torch.Generator().manual_seed(2))
    prompts, mask = torch.full((2, 3), 5), torch.ones(2, 3, dtype=torch.bool)
    for top_p in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4):
        acting = ActingPolicy(1.0, top_p)
        for _ in range(2):
            stop = StopRule((1,), 0, 4)
            sample_completions(model, prompts, mask, 1, acting, stop, torch.rand(2, 4))
    kept = sampling._KEPT[model]
    assert [batch.acting.top_p for batch in kept.decoders] == [0.7, 0.6, 0.5, 0.4]
    assert len(kept.copies) == 1
    (copied,) = kept.copies.values()
    assert all(decoder.model is copied for decoder in kept.decoders.values())
    kept = weakref.ref(kept)
    del model
    gc.collect()
    assert kept() is None


def test_a_large_vocabulary_is_drawn_from_by_blocks(monkeypatch):
    model = Transformer(TransformerConfig("llama", 5001, 8, 8, 1, 2, 2, 4, tied_head=False))
    initialise(model, torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.norm.weight *= 60
    prompts, mask = torch.full((1, 2), 7), torch.ones(1, 2, dtype=torch.bool)
    count = 20_000
    uniforms = rearrange((torch.arange(count, dtype=torch.float64) + 0.5) / count, "n -> n 1")
    acting, stop = ActingPolicy(1.3, 1.0), StopRule((), 0, 1)
    by_blocks = mock.Mock(side_effect=sampling.draw_untruncated)
    monkeypatch.setattr(sampling, "draw_untruncated", by_blocks)
    done = sample_completions(model, prompts, mask, count, acting, stop, uniforms, count)
    assert by_blocks.call_count == 1
    with torch.no_grad():
        q = F.softmax(model(prompts, None, None, logits)[0, -1].double() / 1.3, dim=-1)
    seen = torch.bincount(done.tokens[:, 0], minlength=5001) / count
    assert (seen.cumsum(0) - q.cumsum(0)).abs().max() < 1e-4
    torch.testing.assert_close(
        done.sampling_logprobs[:, 0].double(), q.log()[done.tokens[:, 0]], rtol=1e-5, atol=1e-5
    )


def test_the_sampler_hands_on_all_digits_of_a_uniform(monkeypatch):
    """In float32 those of a tail of 1e-11 each would all be 1."""
    monkeypatch.setattr(sampling, "LARGE_VOCABULARY", 200)
    table = torch.full((211, 211), math.log(1e-11))
    table[:, 0] = 0.0
    p = table[0].double().softmax(dim=0)
    middle = (p.cumsum(0) - p / 2)[17:]  # fewer rows than LARGE_VOCABULARY
    got = sample_completions(
        Chain(table), torch.tensor([[2]]), torch.tensor([[True]]), 194,
        ActingPolicy(1.0, 1.0), StopRule((), 0, 1), middle.view(-1, 1),
    )  # fmt: skip
    assert got.tokens[:, 0].tolist() == list(range(17, 211))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("is_greedy", [True, False])
@pytest.mark.parametrize("vocab", [VOCAB, 4200])  # by blocks, the last of them not full
def test_a_nan_is_an_error_whatever_draws(top_p, is_greedy, vocab):
    # Not an index out of range, by which a GPU would lose all that the process has on it.
    model = Transformer(TransformerConfig("llama", vocab, 8, 8, 1, 2, 2, 4))
    initialise(model, torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    prompts, mask = some_prompts((3, 3))
    uniforms = None if is_greedy else torch.rand(2, 3)
    acting = ActingPolicy(1.0, top_p, 5)
    with pytest.raises(FloatingPointError, match="not finite"):
        sample_completions(model, prompts, mask, 1, acting, StopRule((EOS,), PAD, 3), uniforms)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("is_greedy", [True, False])
def test_a_nan_of_one_token_of_one_row_is_an_error(top_p, is_greedy):
    table = torch.zeros(11, 11)
    table[2, 3] = 1e4  # the second row goes on with 3, after which nothing is finite
    table[3] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        sample_completions(
            Chain(table), torch.tensor([[5], [2], [7]]), torch.ones(3, 1).bool(), 1,
            ActingPolicy(1.0, top_p, 5), StopRule((EOS,), PAD, 2),
            None if is_greedy else torch.full((3, 2), 0.7),
        )  # fmt: skip


def test_kernels_are_recorded_on_cuda_alone():
    assert sampling.has_graphs(MODEL, torch.device("cuda"))
    assert not sampling.has_graphs(MODEL, torch.device("cpu"))
