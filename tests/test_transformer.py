"""The decoder against transformers' models, in both directions of the files; cache and padding."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from minigrpo import transformer
from minigrpo.transformer import (
    KVCache,
    RopeStretch,
    SharedPrompts,
    Transformer,
    TransformerConfig,
    attend,
    find_pretrained,
    initialise,
    last_logits,
    load_transformer,
    logits,
    save_transformer,
)

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SHAPE = dict(
    vocab_size=23, hidden_size=30, intermediate_size=37, num_hidden_layers=3,
    num_attention_heads=6, num_key_value_heads=3, head_dim=14, rope_theta=5000.0,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500.0, factor=7.0, low_freq_factor=1.0, high_freq_factor=3.0,
    original_max_position_embeddings=19,
)  # fmt: skip
FAMILIES = {
    "llama, grouped queries, own head": ("llama", {"tie_word_embeddings": False}),
    "llama, tied (SmolLM2)": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "llama, one head for each query": ("llama", {"num_key_value_heads": 6, "head_dim": None,
                                                  "hidden_size": 36}),
    "llama 3.2, stretched rotary": ("llama", {"rope_parameters": LLAMA3}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True, "hidden_size": 31}),
    "qwen2, own head": ("qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3, own head": ("qwen3", {"tie_word_embeddings": False, "hidden_size": 31}),
}  # fmt: skip


def their_model(model_type: str, **changes: object) -> PreTrainedModel:
    """A random one in which no parameter is negligible: biases and norm weights too."""
    config_class, model_class = CLASSES[model_type]
    model = model_class(config_class(**(SHAPE | changes)))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            parameter.mul_(0.4).add_(parameter.ndim == 1)  # norms around 1
    return model.eval()


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


@torch.no_grad()
def greedy(model: Transformer, tokens: torch.Tensor, steps: int) -> torch.Tensor:
    for _ in range(steps):
        best = model(tokens, None, None, last_logits).argmax(dim=-1, keepdim=True)
        tokens = torch.cat([tokens, best], dim=1)
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_loads_here_with_equal_logits(family, tmp_path):
    model_type, changes = FAMILIES[family]
    theirs = their_model(model_type, **changes)
    theirs.save_pretrained(tmp_path)
    ours = load_transformer(tmp_path)
    tokens = some_tokens(2, 29, high=23)
    with torch.no_grad():
        assert largest_difference(ours(tokens, None, None, logits), theirs(tokens).logits) < 1e-5
    assert ours.num_parameters() == theirs.num_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_we_save_loads_in_transformers_completely_and_writes_the_same(family, tmp_path):
    model_type, changes = FAMILIES[family]
    their_model(model_type, **changes).save_pretrained(tmp_path / "source")
    ours = load_transformer(tmp_path / "source")
    save_transformer(ours, tmp_path / "ours")
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values()), report
    tokens = some_tokens(2, 13, high=23, seed=4)
    with torch.no_grad():
        assert largest_difference(ours(tokens, None, None, logits), theirs(tokens).logits) < 1e-5
    written = theirs.generate(
        tokens, max_new_tokens=17, do_sample=False, attention_mask=torch.ones_like(tokens)
    )
    assert written.tolist() == greedy(ours, tokens, 17).tolist()
    assert theirs.config.eos_token_id is None  # llama's default, 2, is an ordinary token here


def test_a_model_made_here_survives_both_directions_bit_for_bit(tmp_path):
    for model_type in CLASSES:
        ours = our_model(model_type, tied_head=model_type == "qwen3")
        save_transformer(ours, tmp_path / model_type)
        AutoModelForCausalLM.from_pretrained(tmp_path / model_type).save_pretrained(
            tmp_path / "back"
        )
        again = load_transformer(tmp_path / "back")
        assert again.config == ours.config
        for name, value in ours.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), name


def test_a_given_state_is_saved_instead_of_the_models_own(tmp_path):
    ours, other = our_model(seed=1), our_model(seed=2)
    save_transformer(ours, tmp_path, other.state_dict())
    assert torch.equal(load_transformer(tmp_path).embed.weight, other.embed.weight)


def test_half_precision_files_become_float32(tmp_path):
    theirs = their_model("llama").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours = load_transformer(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert torch.equal(ours.embed.weight, theirs.model.embed_tokens.weight.float())


@pytest.mark.parametrize(
    "model_type, changes, removed",
    [
        ("llama", {"rope_theta": 900.0}, ["rope_parameters"]),
        ("llama", {"rope_scaling": LLAMA3, "rope_theta": 900.0}, ["rope_parameters"]),
        (
            "llama",
            {
                "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
                "rope_theta": 900.0,
            },
            ["rope_parameters"],
        ),
        ("llama", {"rope_theta": 50.0}, []),  # contradicts rope_parameters
        ("llama", {"rope_scaling": None, "rope_interleaved": False}, []),
        ("llama", {}, ["rope_parameters", "rms_norm_eps", "tie_word_embeddings", "hidden_act"]),
        ("qwen2", {"attention_bias": False, "sliding_window": 3}, ["layer_types"]),
        ("qwen3", {"num_attention_heads": 6, "attention_bias": False}, ["rope_parameters"]),
    ],
)
def test_other_spellings_of_a_config_mean_what_they_mean_to_transformers(
    model_type, changes, removed, tmp_path
):
    their_model(model_type).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values = {k: v for k, v in (values | changes).items() if k not in removed}
    (tmp_path / "config.json").write_text(json.dumps(values))
    theirs, tokens = AutoModelForCausalLM.from_pretrained(tmp_path), some_tokens(2, 29, high=23)
    with torch.no_grad():
        ours = load_transformer(tmp_path)(tokens, None, None, logits)
        assert largest_difference(ours, theirs(tokens).logits) < 1e-5


@pytest.mark.parametrize("model_type", CLASSES)
def test_absent_config_keys_have_the_defaults_of_transformers(model_type):
    needed = {k: SHAPE[k] for k in SHAPE if k not in ("head_dim", "rope_theta")}
    needed["num_attention_heads"] = 3
    ours = TransformerConfig.from_json({"model_type": model_type, **needed})
    theirs = CLASSES[model_type][0](**needed)
    assert ours.head_size == getattr(theirs, "head_dim", 30 // 3)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tied_head == theirs.tie_word_embeddings


def config_of(base: str, **changes: object) -> dict[str, object]:
    values = CLASSES[base][0](**SHAPE).to_dict() | changes
    return {k: v for k, v in values.items() if v != "absent"}


@pytest.mark.parametrize(
    "model_type, changes, message",
    [
        ("llama", {"model_type": "gpt2"}, "got 'gpt2'"),
        ("llama", {"model_type": "gpt2"}, "llama, qwen2, qwen3"),
        ("llama", {"model_type": "absent"}, "got 'missing'"),
        ("llama", {"logit_scale": 2.0}, "logit_scale = 2.0"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4}, "use_sliding_window"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ("llama", {"rope_parameters": "absent", "rope_scaling": {"type": "linear", "factor": 2.0}},
         "linear"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
         "partial_rotary_factor"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ("llama", {"rope_parameters": [1]}, "expected dict"),
        ("llama", {"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta"),
        ("llama", {"num_hidden_layers": "absent"}, "lacks num_hidden_layers"),
        ("llama", {"vocab_size": 23.0}, "expected int, got 23.0"),
        ("llama", {"num_hidden_layers": True}, "expected int, got True"),
        ("llama", {"tie_word_embeddings": "false"}, "expected bool, got 'false'"),
        ("llama", {"num_attention_heads": 0}, "num_heads must be at least 1"),
        ("llama", {"num_key_value_heads": 4}, "multiple of num_kv_heads=4"),
        ("llama", {"head_dim": 7}, "head_size must be positive and even"),
        ("qwen3", {"head_dim": -2}, "head_size must be positive and even"),
        ("llama", {"hidden_size": 32}, "width must be a multiple of num_heads=6"),
    ],
)  # fmt: skip
def test_a_config_key_is_used_inert_or_an_error(model_type, changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_json(config_of(model_type, **changes))


@pytest.mark.parametrize("text", ["[1, 2]", "{", "null"])
def test_a_config_file_that_is_no_object_is_refused_with_its_path(text, tmp_path):
    save_transformer(our_model(), tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_transformer(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        load_transformer(tmp_path)


def test_a_pretrained_model_is_a_folder_or_the_hubs_and_the_error_says_what_to_do(tmp_path):
    save_transformer(our_model(), tmp_path / "model")
    assert find_pretrained(str(tmp_path / "model")) == tmp_path / "model"
    for name in ("nobody/no-such-model", "no such name!", str(tmp_path)):  # the suite is offline
        with pytest.raises(ValueError, match=r"no folder with a config\.json.*pass that folder"):
            find_pretrained(name)


def test_sharded_files_load_like_one(tmp_path):
    theirs = their_model("qwen3")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    tokens = some_tokens(1, 7, high=23)
    with torch.no_grad():
        ours = load_transformer(tmp_path)(tokens, None, None, logits)
        assert largest_difference(ours, theirs(tokens).logits) < 1e-5


def test_a_single_file_goes_before_a_stale_index_as_in_transformers(tmp_path):
    their_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    ours = our_model("llama")
    save_transformer(ours, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(theirs.model.embed_tokens.weight, ours.embed.weight)
    assert torch.equal(load_transformer(tmp_path).embed.weight, ours.embed.weight)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/secret.safetensors", "..", "a\\b.safetensors", "a/b"]
)
def test_an_index_cannot_name_files_outside_its_folder(name, tmp_path):
    folder = tmp_path / "model"
    save_transformer(our_model(), folder)
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"in the folder itself|is not a readable"):
        load_transformer(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_refused(text, tmp_path):
    save_transformer(our_model(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        load_transformer(tmp_path)


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def exchange_a_row(tensors: dict[str, torch.Tensor]) -> None:
    """q and k keep their joint size, so that only their own shapes give them away."""
    q, k = (f"model.layers.1.self_attn.{part}_proj.weight" for part in "qk")
    tensors[q], tensors[k] = tensors[q][:-1], torch.cat([tensors[k], tensors[q][-1:]])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "lack model.layers.1.mlp.up_proj"),
        (lambda t: t.pop("model.layers.0.self_attn.k_proj.bias"), "lack .*k_proj.bias"),
        (lambda t: t.pop("lm_head.weight"), "lack lm_head.weight"),
        (lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.ones(30)}),
         "have model.layers.2.input_layernorm.weight"),
        (lambda t: t.update({"model.norm.bias": torch.ones(30)}), "have model.norm.bias"),
        (lambda t: t.update({"model.norm.weight": torch.ones(1)}), r"shape \(30,\), .* \(1,\)"),
        (exchange_a_row, r"k_proj.weight must .* \(30, 30\), .* \(31, 30\)"),
        (lambda t: t.update({"model.norm.weight": torch.ones(30, dtype=torch.int8)}), "int8"),
    ],
)  # fmt: skip
def test_missing_surplus_and_misshapen_weights_are_named(change, message, tmp_path):
    save_transformer(our_model("qwen2", tied_head=False), tmp_path)
    change_weights(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_transformer(tmp_path)


def test_a_copy_of_the_tied_head_is_ignored_but_another_head_is_an_error(tmp_path):
    ours = our_model("llama", tied_head=True)
    save_transformer(ours, tmp_path)
    copy = {"lm_head.weight": ours.embed.weight.detach().clone()}
    copy["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)  # old Llama files
    change_weights(tmp_path, lambda tensors: tensors.update(copy))
    assert torch.equal(load_transformer(tmp_path).embed.weight, ours.embed.weight)
    copy["lm_head.weight"][3, 4] += 1
    change_weights(tmp_path, lambda tensors: tensors.update(copy))
    with pytest.raises(ValueError, match=r"lm_head.weight differs"):
        load_transformer(tmp_path)


def test_a_truncated_file_is_refused(tmp_path):
    save_transformer(our_model(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_transformer(tmp_path)


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickled_weights_are_refused_and_never_opened(tmp_path):
    save_transformer(our_model(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    bomb = pickle.dumps(Bomb(tmp_path / "executed"))
    (tmp_path / "pytorch_model.bin").write_bytes(bomb)
    with pytest.raises(ValueError, match=r"\.bin weights are refused"):
        load_transformer(tmp_path)
    index = {"weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_transformer(tmp_path)
    assert not (tmp_path / "executed").exists()


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
@pytest.mark.parametrize(("smallest_product", "kv_heads"), [(0, 6), (10**9, 3)])
@torch.no_grad()
def test_cached_equals_uncached_at_every_position(
    pieces, padded, smallest_product, kv_heads, monkeypatch
):
    """By products and by the kernel, between which `attend` chooses by the size of a product."""
    monkeypatch.setattr(transformer, "LIBRARY_PRODUCT", smallest_product)
    model = our_model("qwen2", num_kv_heads=kv_heads).double()
    tokens, mask = some_tokens(3, 11), None
    if padded:
        tokens, mask = left_padded([*ROWS, some_tokens(11, seed=6)], fill=0)
    full = model(tokens, mask, None, logits)
    cache = KVCache(model.config, len(tokens), 13, tokens.device, torch.float64)
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
    shared = SharedPrompts(num_prompts=2, prompt_length=4, num_rows=6)
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


def test_the_stretch_of_llama3_is_kept_in_the_config():
    stretch = RopeStretch(7.0, 1.0, 3.0, 19.0)
    config = our_model("llama", rope_theta=500.0, rope_stretch=stretch).config
    assert TransformerConfig.from_json(config.to_json()) == config


@torch.no_grad()
def test_autocast_keeps_the_answer_within_the_precision_of_bfloat16():
    model, tokens = our_model("qwen3"), some_tokens(2, 9)
    exact = model(tokens, None, None, logits)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(tokens, None, None, logits).float()
    assert 0 < largest_difference(rounded, exact) < 0.05  # 8 bits, a few layers deep
