"""Hugging Face folders in both directions: config.json, safetensors, the names of the weights.

What is saved here `AutoModelForCausalLM` loads, and the other way round. A key of a config.json is
used, known to say nothing about the forward, or an error. No code in a folder is executed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import TypeVar, get_type_hints

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minigrpo.transformer import (
    ARCHITECTURES,
    RopeStretch,
    Transformer,
    TransformerConfig,
    check_model_type,
)

V = TypeVar("V")
# What a shape is called here and in a config.json.
JSON_NAMES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "mlp_width": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "norm_eps": "rms_norm_eps",
    "tied_head": "tie_word_embeddings",
}
# Keys of a config.json that say nothing about the forward, or only how transformers runs it.
INERT_KEYS = {
    "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype",
    "transformers_version", "use_cache", "initializer_range", "max_position_embeddings",
    "max_window_layers", "output_attentions", "output_hidden_states", "return_dict",
    "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "is_encoder_decoder",
    "_name_or_path", "pretraining_tp", "is_llama_config", "transformers.js_config",
    "attention_dropout", "unk_token_id", "_model_name_or_path", "_attn_implementation_autoset",
    "unsloth_fixed", "unsloth_version",
}  # fmt: skip
# Keys that would change the forward, and the one value of each that does not.
FIXED_KEYS: dict[str, object] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "rope_interleaved": False,
    "use_mrope": False,  # in the base models of Qwen2.5 and the distilled ones of DeepSeek-R1
}


def config_from_json(values: dict[str, object]) -> TransformerConfig:
    """Every key is used, known to be inert, or an error: a dropped option is another model."""
    left = {key: value for key, value in values.items() if key not in INERT_KEYS}
    model_type = check_model_type(str(left.pop("model_type", "missing")))
    needed = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    if missing := set(needed.split()) - set(left):
        raise ValueError(f"config.json lacks {', '.join(sorted(missing))}")
    left = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False} | left  # transformers' defaults
    width, heads = (typed(int, left[key], key) for key in ("hidden_size", "num_attention_heads"))
    head_size = left.get("head_dim", 128 if model_type == "qwen3" else None)
    left["head_dim"] = head_size or width // max(1, heads)
    left["num_key_value_heads"] = left.get("num_key_value_heads") or heads
    theta, stretch = _pop_rope(left)
    kinds = get_type_hints(TransformerConfig)
    sizes = {ours: typed(kinds[ours], left.pop(key), key) for ours, key in JSON_NAMES.items()}
    config = TransformerConfig(model_type, rope_theta=theta, rope_stretch=stretch, **sizes)
    fixed = FIXED_KEYS | {"layer_types": ["full_attention"] * config.num_layers}
    left.pop("sliding_window", None)  # read only if use_sliding_window, an error below
    if config.qkv_bias:
        left.pop("attention_bias", None)  # transformers' Qwen2 has the bias whatever it says
    for key, value in left.items():
        if key not in fixed or value != fixed[key]:
            raise ValueError(f"config.json key {key} = {value!r} is unsupported for {model_type}")
    return config


def config_to_json(config: TransformerConfig) -> dict[str, object]:
    """The config.json that transformers reads back as the same model.

    Its versions before 5 look for `rope_theta` and `rope_scaling`, and without them take defaults:
    another model.
    """
    stretch = config.rope_stretch
    scaling = {} if stretch is None else {"rope_type": "llama3"} | asdict(stretch)
    return {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        **{key: getattr(config, ours) for ours, key in JSON_NAMES.items()},
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta} | scaling,
        "rope_theta": config.rope_theta,
        **({"rope_scaling": scaling} if scaling else {}),
        "hidden_act": "silu",
        "max_position_embeddings": 32_768,
        "dtype": "float32",
        "bos_token_id": None,  # transformers' defaults for llama, 1 and 2, would be wrong here
        "eos_token_id": None,  # generation_config.json has it
    }


def _pop_rope(left: dict[str, object]) -> tuple[float, RopeStretch | None]:
    """Base and stretch of the rotary frequencies, as transformers 5 or 4 writes them."""
    outer, new = left.pop("rope_theta", 10_000.0), left.pop("rope_parameters", None)
    rope = typed(dict, left.pop("rope_scaling", None) or new or {}, "rope_parameters")
    rope = {"rope_type": rope.get("type", "default"), "rope_theta": outer} | rope
    rope.pop("type", None)
    kind, theta = rope.pop("rope_type"), typed(float, rope.pop("rope_theta"), "rope_theta")
    names = [item.name for item in fields(RopeStretch)]
    if kind == "default" and not rope:
        return theta, None
    if kind == "llama3" and set(rope) == set(names):
        factor, low, high, length = (typed(float, rope[name], name) for name in names)
        if length.is_integer():  # earlier versions wrote 8192.0
            return theta, RopeStretch(factor, low, high, int(length))
    raise ValueError(
        f"rope_type must be default, or llama3 with {', '.join(names)}; got {kind} with {rope}"
    )


def typed(kind: type[V], value: object, name: str) -> V:
    """The value if it has this type in JSON; a whole number is also a float."""
    if kind is float and type(value) is int:
        with suppress(OverflowError):  # it stays a whole number, of the wrong type
            value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
    return value


def save_transformer(
    model: Transformer,
    folder: Path,
    state: dict[str, Tensor] | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write config.json and model.safetensors; `state` replaces the model's own parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_to_json(model.config), indent=2) + "\n")
    tensors = dict(to_hugging_face(model.state_dict() if state is None else state, model.config))
    save_tensors(tensors, folder / "model.safetensors", metadata or {})


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A safetensors file with the permissions of config.json: else its owner alone could read it.

    Without tensors a file can only be read with some metadata.
    """
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    with suppress(PermissionError):  # of a file system that has one mode for all
        shutil.copymode(path.with_name("config.json"), path)


def find_pretrained(name: str) -> Path:
    """The folder of a pretrained model: a local one, or the hub's, from its cache or by download.

    Only configuration, tokenizer and safetensors are fetched, never code or pickles. ValueError
    says what is missing.
    """
    if (Path(name) / "config.json").is_file():
        return Path(name)
    if Path(name).is_absolute() or name.startswith("."):
        raise ValueError(f"model {name} must be a folder with a config.json, found none")
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model {name!r} is no folder with a config.json, and the hub did not give it "
            f"({reason}); download config.json, tokenizer files and *.safetensors into a folder "
            "and pass that folder as --model"
        ) from error


def load_shape(folder: Path) -> TransformerConfig:
    """What config.json says; ValueError: there is none, or it describes another architecture."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} must be a Hugging Face folder with a config.json, found none")
    try:
        return config_from_json(typed(dict, json.loads(path.read_text()), "config"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def load_transformer(folder: Path) -> Transformer:
    """Read a Hugging Face folder: config.json and safetensors (one file or shards), as float32.

    ValueError: not such a folder, another architecture, missing, surplus or misshapen weights,
    pickled weights only. Nothing in the folder is executed.
    """
    config = load_shape(folder)
    tensors = _own_tensors(_read_safetensors(folder), config, folder)
    with torch.device("meta"):  # no time spent on initial values that are replaced right away
        model = Transformer(config)
    expected = {name: value.shape for name, value in to_hugging_face(model.state_dict(), config)}
    for name in sorted(set(expected) | set(tensors)):
        if name not in tensors:
            raise ValueError(f"{folder}: the weights lack {name}")
        if name not in expected:
            raise ValueError(
                f"{folder}: the weights have {name}, no part of this {config.model_type}"
            )
        if tensors[name].shape != expected[name] or not tensors[name].is_floating_point():
            wanted, got = tuple(expected[name]), tuple(tensors[name].shape)
            raise ValueError(
                f"{folder}: {name} must be floating point of shape {wanted}, "
                f"got {tensors[name].dtype} of shape {got}"
            )
    model.to_empty(device="cpu").load_state_dict(from_hugging_face(tensors, config))  # casts
    return model


def _own_tensors(
    tensors: dict[str, Tensor], config: TransformerConfig, folder: Path
) -> dict[str, Tensor]:
    """Without what files may hold beside the parameters: rotary tables, a copy of a tied head."""
    own = {k: v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}
    head = own.pop("lm_head.weight", None) if config.tied_head else None
    if head is not None and not torch.equal(head, own.get("model.embed_tokens.weight", head)):
        raise ValueError(
            f"{folder}: lm_head.weight differs from the embedding it should be tied to"
        )
    return own


def _read_safetensors(folder: Path) -> dict[str, Tensor]:
    """Of model.safetensors or, without it, as in transformers, of all its shards.

    Their index is not read: it could only repeat what the shards hold, or name other files.
    """
    single, tensors = folder / "model.safetensors", dict[str, Tensor]()
    paths = [single] if single.is_file() else sorted(folder.glob("*-of-*.safetensors"))
    if not paths:
        raise ValueError(
            f"{folder} must hold model.safetensors or its shards, *-of-*.safetensors (pickled .bin "
            "weights are refused), found none"
        )
    for path in paths:
        try:
            found = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
        if twice := found.keys() & tensors.keys():
            raise ValueError(f"{path} holds {min(twice)}, which another file holds too")
        tensors |= found
    return tensors


def linear_parts(config: TransformerConfig) -> dict[str, dict[str, int]]:
    """A block's linear layers: of each the modules of transformers in it, with their rows."""
    q, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    return {
        "attention.qkv": {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv},
        "attention.out": {"self_attn.o_proj": config.width},
        "mlp.gate_up": {"mlp.gate_proj": config.mlp_width, "mlp.up_proj": config.mlp_width},
        "mlp.down": {"mlp.down_proj": config.width},
    }


def _parameter_names(config: TransformerConfig) -> dict[str, dict[str, int]]:
    """Our parameters: of each those of transformers that are joined in it, with their rows."""
    block = {
        "attention_norm.weight": {"input_layernorm.weight": config.width},
        "attention.q_norm.weight": {"self_attn.q_norm.weight": config.head_size},
        "attention.k_norm.weight": {"self_attn.k_norm.weight": config.head_size},
        "mlp_norm.weight": {"post_attention_layernorm.weight": config.width},
    }
    for module, parts in linear_parts(config).items():
        for kind in ("weight", "bias"):
            block[f"{module}.{kind}"] = {f"{part}.{kind}": rows for part, rows in parts.items()}
    names = {
        f"blocks.{layer}.{ours}": {f"model.layers.{layer}.{k}": rows for k, rows in theirs.items()}
        for layer in range(config.num_layers)
        for ours, theirs in block.items()
    }
    return names | {
        "embed.weight": {"model.embed_tokens.weight": config.vocab_size},
        "norm.weight": {"model.norm.weight": config.width},
        "head.weight": {"lm_head.weight": config.vocab_size},
    }


def to_hugging_face(
    state: dict[str, Tensor], config: TransformerConfig
) -> Iterator[tuple[str, Tensor]]:
    """Our parameters under transformers' names, fused ones split: views, which a file may hold."""
    names = _parameter_names(config)
    for ours, value in state.items():
        pieces = torch.split(value.contiguous(), list(names[ours].values()))
        yield from zip(names[ours], pieces, strict=True)


def from_hugging_face(tensors: dict[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """The inverse: transformers' names to ours, q, k, v and gate, up joined."""
    return {
        ours: torch.cat([tensors[name] for name in theirs])
        for ours, theirs in _parameter_names(config).items()
        if theirs.keys() <= tensors.keys()
    }
