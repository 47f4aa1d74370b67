"""Folders against transformers, in both directions: configs, weights, and what is refused."""

import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from test_transformer import largest_difference, our_model, some_tokens
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

from minigrpo.hugging_face import (
    config_from_json,
    config_to_json,
    find_pretrained,
    load_transformer,
    save_transformer,
)
from minigrpo.transformer import (
    RopeStretch,
    Transformer,
    TransformerConfig,
    last_logits,
    logits,
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
    # llama's defaults, 1 and 2, are ordinary tokens here
    assert theirs.config.bos_token_id is theirs.config.eos_token_id is None


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


@pytest.mark.parametrize("num_heads", [3, 1])
@pytest.mark.parametrize("model_type", CLASSES)
def test_absent_config_keys_have_the_defaults_of_transformers(model_type, num_heads):
    needed = {k: SHAPE[k] for k in SHAPE if k not in ("head_dim", "rope_theta")}
    needed |= dict.fromkeys(("num_attention_heads", "num_key_value_heads"), num_heads)
    ours = config_from_json({"model_type": model_type, **needed})
    theirs = CLASSES[model_type][0](**needed)
    assert ours.head_size == getattr(theirs, "head_dim", 30 // num_heads)
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
        ("qwen2", {"use_mrope": True}, "use_mrope = True"),
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
        ("llama", {"rope_parameters": [1]}, "rope_parameters must be of type dict"),
        ("llama", {"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta"),
        ("llama", {"rope_parameters": {"rope_theta": 10**400}}, "rope_theta must be of type float"),
        ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps must be of type float, got 1000"),
        ("llama", {"rms_norm_eps": math.inf}, "norm_eps must be positive and finite, got inf"),
        ("llama", {"rms_norm_eps": 0.0}, "norm_eps must be positive and finite, got 0.0"),
        ("llama", {"num_hidden_layers": "absent"}, "lacks num_hidden_layers"),
        ("llama", {"vocab_size": 23.0}, "vocab_size must be of type int, got 23.0"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers must be of type int, got True"),
        ("llama", {"tie_word_embeddings": "false"}, "embeddings must be of type bool, got 'false'"),
        ("llama", {"num_attention_heads": 0}, "num_heads must be at least 1"),
        ("llama", {"num_hidden_layers": 1001}, "num_layers must be at most 1000, got 1001"),
        ("llama", {"num_key_value_heads": 4}, "multiple of num_kv_heads=4"),
        ("llama", {"head_dim": 7}, "head_size must be positive and even"),
        ("qwen3", {"head_dim": -2}, "head_size must be positive and even"),
        ("llama", {"hidden_size": 32}, "width must be a multiple of num_heads=6"),
    ],
)  # fmt: skip
def test_a_config_key_is_used_inert_or_an_error(model_type, changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_json(config_of(model_type, **changes))


@pytest.mark.parametrize(
    "model_type, values",
    [
        ("qwen2", {"use_mrope": False}),  # Qwen2.5-0.5B, DeepSeek-R1-Distill-Qwen
        ("llama", {"unsloth_fixed": True, "unsloth_version": "2025.1"}),
        ("qwen3", {"_attn_implementation_autoset": True}),
        ("llama", {"is_llama_config": True, "rope_interleaved": False}),  # SmolLM2
        ("llama", {"pretraining_tp": 1, "mlp_bias": False, "rope_scaling": None}),  # Llama 3
    ],
)
def test_keys_of_published_configs_that_say_nothing_are_accepted(model_type, values):
    assert config_from_json(config_of(model_type, **values)) == config_from_json(
        config_of(model_type)
    )


def test_a_model_may_have_a_thousand_layers():
    assert config_from_json(config_of("llama", num_hidden_layers=1000)).num_layers == 1000


@pytest.mark.parametrize("text", ["[1, 2]", "{", "null", pytest.param("[" * 200_000, id="deep")])
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
    for name in (str(tmp_path), "./no-such-folder"):
        with pytest.raises(ValueError, match=f"model {name} must be a folder with a config.json"):
            find_pretrained(name)
    for name in ("nobody/no-such-model", "no such name!"):  # the suite is offline
        with pytest.raises(ValueError, match=r"no folder with a config\.json.*pass that folder"):
            find_pretrained(name)


def test_no_code_and_no_pickles_are_fetched_from_the_hub(tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("minigrpo.hugging_face.snapshot_download", download)
    assert find_pretrained("somebody/model") == tmp_path
    ((name, patterns),) = asked
    needed = ["config.json", "tokenizer.json", "tokenizer.model", "merges.txt"]
    needed += ["chat_template.jinja", "model-00001-of-00002.safetensors"]
    needed += ["model.safetensors.index.json"]
    others = ["pytorch_model.bin", "modeling_own.py", "training_args.pt", "model.gguf"]
    found = filter_repo_objects([*needed, *others], allow_patterns=patterns)
    assert name == "somebody/model" and list(found) == needed


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
    with pytest.raises(ValueError, match=r"must hold model\.safetensors or its shards"):
        load_transformer(folder)


@pytest.mark.parametrize("text", ["{", '{"weight_map": {"model.norm.weight": "other"}}', None])
def test_all_shards_are_read_once_whatever_their_index_says(text, tmp_path):
    """A part that is missing or lies there twice, of another division say, is refused by name."""
    theirs = their_model("qwen3", tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    index.unlink() if text is None else index.write_text(text)
    assert torch.equal(load_transformer(tmp_path).head.weight, theirs.lm_head.weight)
    (part,) = (p for p in tmp_path.glob("*.safetensors") if "lm_head.weight" in load_file(p))
    part.rename(tmp_path / "model-00001-of-00099.safetensors")
    save_file({"lm_head.weight": torch.zeros(23, 30)}, part)
    with pytest.raises(ValueError, match=r"-of-.* holds lm_head.weight, which another file holds"):
        load_transformer(tmp_path)
    part.unlink()
    (tmp_path / "model-00001-of-00099.safetensors").unlink()
    with pytest.raises(ValueError, match=r"weights lack lm_head\.weight"):
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
    with pytest.raises(ValueError, match=r"\.bin weights are refused"):
        load_transformer(tmp_path)
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(bomb)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_transformer(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_the_stretch_of_llama3_is_kept_in_the_config():
    stretch = RopeStretch(7.0, 1.0, 3.0, 19.0)
    config = our_model("llama", rope_theta=500.0, rope_stretch=stretch).config
    assert config_from_json(config_to_json(config)) == config


@pytest.mark.parametrize("stretch", [None, RopeStretch(7.0, 1.0, 3.0, 19)])
def test_a_config_says_how_positions_turn_in_the_words_of_transformers_4_as_well(stretch):
    """It knows no rope_parameters and would turn at its default speed, without a word."""
    config = our_model("llama", rope_theta=500.0, rope_stretch=stretch).config
    both = config_to_json(config)
    assert both["rope_theta"] == 500.0
    assert both.get("rope_scaling") == (stretch and {"rope_type": "llama3"} | vars(stretch))
    for key in ("rope_parameters", "rope_scaling"):
        assert config_from_json({k: v for k, v in both.items() if k != key}) == config


def test_the_length_that_frequencies_are_stretched_from_is_a_whole_number():
    """transformers warns of 19.0 each time it loads a folder."""
    stretch = RopeStretch(7.0, 1.0, 3.0, 19)
    written = config_to_json(
        TransformerConfig("llama", 29, 16, 24, 2, 4, 2, 4, rope_stretch=stretch)
    )
    rope = written["rope_parameters"]
    assert type(rope["original_max_position_embeddings"]) is int
    assert type(written.pop("rope_scaling")["original_max_position_embeddings"]) is int
    rope["original_max_position_embeddings"] = 19.0  # as earlier versions wrote it
    read = config_from_json(written).rope_stretch
    assert read == stretch and type(read.original_max_position_embeddings) is int
    rope["original_max_position_embeddings"] = 19.5
    with pytest.raises(ValueError, match="rope_type must be default, or llama3"):
        config_from_json(written)
