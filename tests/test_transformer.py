"""The decoder: cache, padding, shared prompts, initial weights."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minigrpo import transformer
from minigrpo.transformer import (
    KVCache,
    SharedPrompts,
    Transformer,
    TransformerConfig,
    attend,
    initialise,
    last_logits,
    logits,
    product_dtype,
)


def our_model(model_type: str = "qwen2", seed: int = 5, **changes: object) -> Transformer:
    sizes = dict(
        vocab_size=19,
        width=30,
        mlp_width=23,
        num_layers=2,
        num_heads=6,
        num_kv_heads=3,
        head_size=10,
    )
    model = Transformer(TransformerConfig(model_type, **(sizes | changes)))
    initialise(model, torch.Generator().manual_seed(seed))
    with torch.no_grad():  # not the small ones of a fresh model, and no zero bias
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(7)
            )
    return model


def some_tokens(*shape: int, high: int = 19, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """In units of the largest logit: float32 keeps about 7 digits of it."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def left_padded(rows: list[torch.Tensor], fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(row) for row in rows)
    tokens = torch.full((len(rows), longest), fill)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, longest - len(row) :], mask[i, longest - len(row) :] = row, True
    return tokens, mask


ROWS = [some_tokens(7, seed=1), some_tokens(2, seed=2), some_tokens(5, seed=8)]


@torch.no_grad()
def test_left_padding_of_mixed_length_changes_nothing():
    model = our_model("qwen3")
    tokens, mask = left_padded(ROWS, fill=0)
    together = model(tokens, mask, None, logits)
    for row, alone in zip(together, ROWS, strict=True):
        expected = model(alone.view(1, -1), None, None, logits)[0]
        assert largest_difference(row[-len(alone) :], expected) < 1e-5
    refilled, _ = left_padded(ROWS, fill=13)
    assert torch.equal(model(refilled, mask, None, logits)[mask], together[mask])
    assert together.isfinite().all()  # padded positions too, so that a mask by zero can't meet nan


def test_the_gradient_of_a_padded_batch_is_that_of_its_rows():
    model = our_model("llama").double()
    tokens, mask = left_padded(ROWS, fill=4)
    model(tokens, mask, None, logits)[mask].square().sum().backward()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for alone in ROWS:
        model(alone.view(1, -1), None, None, logits).square().sum().backward()
    for got, parameter in zip(together, model.parameters(), strict=True):
        assert torch.allclose(got, parameter.grad, rtol=1e-9, atol=1e-9)  # float64 sums


@pytest.mark.parametrize("pieces", [[1] * 11, [4, 1, 1, 3, 2], [10, 1]])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("growth", "kv_heads"), [(32, 6), (2, 3), (4, 6), (None, 3)])
@torch.no_grad()
def test_cached_equals_uncached_at_every_position(pieces, padded, growth, kv_heads, monkeypatch):
    """However a cache grows, and where it has all its room at once, as on a GPU."""
    monkeypatch.setattr(KVCache, "GROWTH", growth)
    model = our_model("qwen2", num_kv_heads=kv_heads).double()
    tokens, mask = some_tokens(3, 11), None
    if padded:
        tokens, mask = left_padded([*ROWS, some_tokens(11, seed=6)], fill=0)
    full = model(tokens, mask, None, logits)
    place = torch.device("meta" if growth is None else "cpu")
    cache = KVCache(model.config, len(tokens), 13, place, torch.float64)
    cache.layers = [
        torch.full_like(layer, torch.nan if growth is None else 0.0, device="cpu")
        for layer in cache.layers
    ]
    done = []
    for size in pieces:
        start, end = cache.length, cache.length + size
        seen = None if mask is None else mask[:, :end]
        done.append(model(tokens[:, start:end], seen, cache, logits))
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    got = torch.cat(done, dim=1)
    assert cache.length == 11
    # The rotary angles are float32, hence alike; the sums over keys are float64.
    assert torch.allclose(got[real], full[real], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_prompt_prefilled_once_serves_each_member_of_its_group():
    model = our_model("llama")
    prompts, mask = left_padded(ROWS, fill=0)
    once = KVCache(model.config, 3, 7, prompts.device, torch.float32)
    model(prompts, mask, once, last_logits)
    cache = KVCache(model.config, 6, 8, prompts.device, torch.float32)
    cache.fill_from(once, group_size=2)
    new = some_tokens(6, 1, seed=9)
    rows = torch.tensor([0, 0, 1, 1, 2, 2])  # group-major: row p * G + g
    longer = torch.cat([mask[rows], torch.ones(6, 1, dtype=torch.bool)], dim=1)
    got = model(new, longer, cache, last_logits)
    expected = model(torch.cat([prompts[rows], new], dim=1), longer, None, last_logits)
    assert largest_difference(got, expected) < 1e-5


@pytest.mark.parametrize("key_heads", [1, 3, 6])
def test_rows_attend_to_a_shared_prompt_as_to_a_copy_of_their_own(key_heads, monkeypatch):
    """Two prompts of four tokens, three rows of five each: as on a CPU, and as on a GPU."""
    shared = SharedPrompts(num_prompts=2, prompt_length=4, group_size=3, num_new=5)
    draw = torch.Generator().manual_seed(1)
    found = []
    packed = [
        torch.randn(1, heads, 2 * 4 + 6 * 5, 8, generator=draw, dtype=torch.float64)
        for heads in (6, key_heads, key_heads)
    ]
    causal = torch.full((1, 1, 9, 9), -torch.inf, dtype=torch.float64).triu(1)
    weights = torch.randn(packed[0].shape, generator=draw, dtype=torch.float64)
    for is_joined in (True, False):
        q, k, v = inputs = [x.clone().requires_grad_() for x in packed]
        if is_joined:
            with monkeypatch.context() as without:
                without.setattr(SharedPrompts, "spread", None)
                mixed = shared.attend(q, k, v, causal, is_causal=False)
        else:
            mixed = shared.pack(attend(*(shared.spread(x) for x in inputs), causal))
        (mixed * weights).sum().backward()
        found.append([mixed.detach(), *(x.grad for x in inputs)])
    for joined, copied in zip(*found, strict=True):
        assert torch.allclose(joined, copied, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_no_token_sees_a_later_one():
    model, tokens = our_model("llama"), some_tokens(2, 9)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 19
    before, after = (model(t, None, None, logits) for t in (tokens, changed))
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.isclose(before[:, 5:], after[:, 5:]).all(dim=-1).any()


def test_gradient_checkpointing_computes_twice_and_changes_no_gradient():
    model, (tokens, mask) = our_model("qwen3"), left_padded(ROWS, fill=0)
    counts = [0]
    for block in model.blocks:
        block.attention_norm.register_forward_hook(lambda *_: counts.__setitem__(0, counts[0] + 1))
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        counts[0] = 0
        model.train()(tokens, mask, None, logits)[mask].logsumexp(dim=-1).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        assert counts[0] == len(model.blocks) * (1 + model.gradient_checkpointing)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@torch.no_grad()
def test_a_model_that_trains_with_checkpointing_still_reads_its_cache():
    model, tokens = our_model("llama").train(), some_tokens(3, 8)
    expected = model(tokens, None, None, last_logits)
    model.gradient_checkpointing = True
    cache = KVCache(model.config, 3, 8, tokens.device, torch.float32)
    model(tokens[:, :7], None, cache, last_logits)
    assert largest_difference(model(tokens[:, 7:], None, cache, last_logits), expected) < 1e-5


def test_initial_weights_depend_on_the_passed_generator_alone():
    first = Transformer(our_model("qwen2").config)
    torch.manual_seed(99)
    second = Transformer(first.config)
    for model in (first, second):
        initialise(model, torch.Generator().manual_seed(3))
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    initialise(second, torch.Generator().manual_seed(4))
    assert not torch.equal(first.embed.weight, second.embed.weight)
    assert not first.blocks[0].attention.qkv.bias.any()


def test_a_fresh_model_has_the_spreads_of_its_rule():
    model = Transformer(TransformerConfig("llama", 997, 64, 96, 8, 4, 2, 32, tied_head=False))
    initialise(model, torch.Generator().manual_seed(0))
    block = model.blocks[5]
    for weight, expected in (
        (model.embed.weight, 0.02),
        (model.head.weight, 0.02),
        (block.attention.qkv.weight, 64**-0.5),
        (block.attention.out.weight, (4 * 32) ** -0.5 / 4),  # 4 = sqrt(2 * 8 layers)
        (block.mlp.gate_up.weight, 64**-0.5),
        (block.mlp.down.weight, 96**-0.5 / 4),
    ):
        assert abs(weight.std().item() / expected - 1) < 0.04  # 6,144 numbers or more: 4 sigma


def test_token_features_replace_the_rows_of_embedding_and_head_and_words_keep_theirs():
    plain, featured = (Transformer(our_model("llama", tied_head=False).config) for _ in range(2))
    features = torch.randn(19, 30, generator=torch.Generator().manual_seed(2))
    features[:4], features[4, 1:] = 0.0, 0.0  # four words, and a number that is nearly one
    initialise(plain, torch.Generator().manual_seed(3))
    initialise(featured, torch.Generator().manual_seed(3), features)
    assert torch.equal(featured.embed.weight[4:], features[4:])
    assert torch.allclose(featured.head.weight[4:], features[4:] / 30**0.5)
    for name in ("embed", "head"):
        words, usual = (getattr(model, name).weight[:4] for model in (featured, plain))
        assert torch.equal(words, usual) and words.any()


@torch.no_grad()
def test_autocast_keeps_the_answer_within_the_precision_of_bfloat16():
    model, tokens = our_model("qwen3"), some_tokens(2, 9)
    exact = model(tokens, None, None, logits)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(tokens, None, None, logits).float()
    assert 0 < largest_difference(rounded, exact) < 0.05  # 8 bits, a few layers deep


@pytest.mark.parametrize("width", [1, 3, 11, 13])
@torch.no_grad()
def test_a_mask_of_other_tokens_than_the_cached_and_the_new_is_refused(width):
    """Seven are cached and one is new; 13 places are read."""
    model, tokens = our_model(num_kv_heads=6), some_tokens(3, 8)
    cache = KVCache(model.config, 3, 13, tokens.device, torch.float32)
    model(tokens[:, :7], None, cache, logits)
    with pytest.raises(ValueError, match=rf"mask must have shape \(3, 8\), got \(3, {width}\)"):
        model(tokens[:, 7:], torch.ones(3, width, dtype=torch.bool), cache, logits)


@torch.no_grad()
def test_a_cache_that_is_full_says_so():
    model, tokens = our_model(), some_tokens(3, 8)
    cache = KVCache(model.config, 3, 7, tokens.device, torch.float32)
    model(tokens[:, :7], None, cache, logits)
    with pytest.raises(ValueError, match="length must be at most 7 in this cache, got 8"):
        model(tokens[:, 7:], None, cache, logits)


@pytest.mark.parametrize("used_before", [False, True])
def test_a_cache_on_a_cpu_has_no_gaps_between_heads_until_it_is_used_again(used_before):
    keys, config = torch.ones(2, 3, 70, 10), our_model("llama").config
    cache = KVCache(config, 2, 70, torch.device("cpu"), torch.float32)
    if used_before:
        cache.append(0, keys, keys)  # grown to its end
    read = []
    for length in (0, 31, 32, 63, 64, 69):
        cache.length = length
        found, _ = cache.append(0, keys[:, :, :1], keys[:, :, :1])
        read.append(found.shape[2])
        assert found.is_contiguous() == (not used_before or found.shape[2] == 70)
    assert read == [32, 32, 64, 64, 70, 70]


@pytest.mark.parametrize(
    ("num_new", "key_heads", "inside"), [(1, 3, "highest"), (1, 1, "medium"), (2, 3, "medium")]
)
def test_one_query_of_a_head_goes_by_the_library_that_is_quicker_for_it(num_new, key_heads, inside):
    cache, seen = torch.randn(2, key_heads, 60, 8), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator.overloadpacket in (torch.ops.aten.baddbmm, torch.ops.aten.bmm):
                seen.append(torch.get_float32_matmul_precision())
            return operator(*args, **(kwargs or {}))

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with Watch():
            attend(torch.randn(2, 3, num_new, 8), cache, cache, None)
        assert seen == [inside, inside]
        assert torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(ZeroDivisionError), transformer.without_onednn():
            assert torch.get_float32_matmul_precision() == "highest"
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_products_have_autocasts_dtype_but_those_of_float64():
    x = torch.ones(2)
    assert product_dtype(x) == torch.float32 and product_dtype(x.double()) == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert product_dtype(x) == (x[None] @ x[:, None]).dtype == torch.bfloat16
        wide = x.double()
        assert product_dtype(wide) == (wide[None] @ wide[:, None]).dtype == torch.float64
