"""The decoder of the Llama / Qwen2 / Qwen3 / SmolLM2 family, one forward for training and decoding.

    h = embed(tokens)
    h = h + attention(rms_norm(h));  h = h + swiglu(rms_norm(h))      for every block
    output(rms_norm(h), head_weight)                                  logits are the caller's

RMSNorm (1910.07467), rotary positions (2104.09864, the half-rotation layout of transformers), grouped
queries (2305.13245), SwiGLU (2002.05202); optional bias on q, k and v (Qwen2), RMSNorm on q and k (Qwen3),
tied head. Files are Hugging Face folders in both directions.

B rows, Q new tokens, K cached and new tokens, H heads, J key-value heads, D head size, E width, V vocabulary.
Deviation from transformers: q, k, v and gate, up are one matrix each (one product instead of three and
two); the files keep the usual names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

R = TypeVar("R")
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# Keys of a config.json that say nothing about the forward computed here, or only how transformers runs it.
INERT_KEYS = frozenset(
    "architectures bos_token_id eos_token_id pad_token_id torch_dtype dtype transformers_version use_cache "
    "initializer_range max_position_embeddings max_window_layers output_attentions output_hidden_states "
    "return_dict chunk_size_feed_forward id2label label2id problem_type is_encoder_decoder _name_or_path "
    "pretraining_tp is_llama_config rope_interleaved transformers.js_config attention_dropout".split()
)


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of the model, in our names; `from_json` and `to_json` translate a Hugging Face config.json."""

    model_type: str
    vocab_size: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = True

    def __post_init__(self) -> None:
        if self.model_type not in ARCHITECTURES:
            supported = ", ".join(sorted(ARCHITECTURES))
            raise ValueError(f"model_type must be one of {supported} (SmolLM2 is llama), got {self.model_type!r}")
        for name in ("vocab_size", "width", "mlp_width", "num_layers", "num_heads", "num_kv_heads", "head_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads={self.num_kv_heads}, got {self.num_heads}")
        if self.head_size % 2:
            raise ValueError(f"head_size must be even for rotary positions, got {self.head_size}")

    @classmethod
    def from_json(cls, values: dict[str, object]) -> TransformerConfig:
        """Every key is used, known to be inert, or an error: a silently dropped option is another model."""
        left = {key: value for key, value in values.items() if key not in INERT_KEYS}
        model_type = str(left.pop("model_type", "missing"))
        if model_type not in ARCHITECTURES:
            supported = ", ".join(sorted(ARCHITECTURES))
            raise ValueError(f"model_type must be one of {supported} (SmolLM2 is llama), got {model_type!r}")
        missing = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"} - set(left)
        if missing:
            raise ValueError(f"config.json lacks {', '.join(sorted(missing))}")
        heads, width = _integer(left.pop("num_attention_heads")), _integer(left.pop("hidden_size"))
        rope = left.pop("rope_parameters", None) or left.pop("rope_scaling", None) or {}
        assert isinstance(rope, dict)
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError(f"rope_type must be default, got {rope}")
        bias = left.pop("attention_bias", False)
        if bias and model_type == "llama":
            raise ValueError("attention_bias must be false for llama, got true")
        theta = left.pop("rope_theta", None) or rope.get("rope_theta", 10_000.0)
        config = cls(
            model_type=model_type,
            vocab_size=_integer(left.pop("vocab_size")),
            width=width,
            mlp_width=_integer(left.pop("intermediate_size")),
            num_layers=_integer(left.pop("num_hidden_layers")),
            num_heads=heads,
            num_kv_heads=_integer(left.pop("num_key_value_heads", None) or heads),
            head_size=_integer(left.pop("head_dim", None) or width // heads),
            rope_theta=float(str(theta)),
            norm_eps=float(str(left.pop("rms_norm_eps", 1e-6))),
            qkv_bias=model_type == "qwen2",
            qk_norm=model_type == "qwen3",
            tied_head=bool(left.pop("tie_word_embeddings", False)),
        )
        expected = {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False, "sliding_window": None}
        for key, value in left.items():
            if key == "sliding_window" and not values.get("use_sliding_window", False):
                continue
            if key == "layer_types" and isinstance(value, list) and set(value) == {"full_attention"}:
                continue
            if key not in expected or value != expected[key]:
                raise ValueError(f"config.json key {key} = {value!r} is not supported by the {model_type} forward")
        return config

    def to_json(self) -> dict[str, object]:
        """The config.json that transformers reads back as the same model."""
        values: dict[str, object] = {
            "architectures": [ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "intermediate_size": self.mlp_width,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_size,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied_head,
            "hidden_act": "silu",
            "max_position_embeddings": 32_768,
            "dtype": "float32",
        }
        return values


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"config.json: expected a whole number, got {value!r}")
    return value


class KVCache:
    """Keys and values of the tokens seen so far, preallocated; the one object written in place, by its sampler."""

    def __init__(self, config: TransformerConfig, num_rows: int, max_length: int, device: torch.device, dtype: torch.dtype):
        shape = (config.num_layers, 2, num_rows, config.num_kv_heads, max_length, config.head_size)
        self.blocks = torch.empty(shape, device=device, dtype=dtype)  # [layers, 2, B, J, K, D]
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """[B, J, Q, D] each -> all keys and values so far, [B, J, K, D] views; the model moves `length` at its end."""
        end = self.length + keys.shape[2]
        block = self.blocks[layer]
        block[0, :, :, self.length : end] = keys
        block[1, :, :, self.length : end] = values
        return block[0, :, :, :end], block[1, :, :, :end]

    def fill_from(self, prompts: KVCache, group_size: int) -> None:
        """Take over a prompt's keys and values for each member of its group: prefilled once, not G times."""
        self.length = prompts.length
        seen = prompts.blocks[:, :, :, :, : prompts.length]
        self.blocks[:, :, :, :, : self.length] = repeat(seen, "l two p j k d -> l two (p g) j k d", g=group_size)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 whatever the dtype of x."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        size = (config.num_heads + 2 * config.num_kv_heads) * config.head_size
        self.qkv = nn.Linear(config.width, size, bias=config.qkv_bias)
        self.out = nn.Linear(config.num_heads * config.head_size, config.width, bias=False)
        norm = config.qk_norm
        self.q_norm = RMSNorm(config.head_size, config.norm_eps) if norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_size, config.norm_eps) if norm else nn.Identity()

    def forward(self, x: Tensor, rotation: Rotation, allowed: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        heads = self.num_heads + 2 * self.num_kv_heads
        qkv = rearrange(self.qkv(x), "b q (h d) -> b h q d", h=heads)  # [B, H + 2J, Q, D]
        q, k, v = qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        q, k = rotation.apply(self.q_norm(q)), rotation.apply(self.k_norm(k))
        if cache is not None:
            k, v = cache.append(layer, k, v)
        return self.out(rearrange(attend(q, k.to(q.dtype), v.to(q.dtype), allowed), "b h q d -> b q (h d)"))


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    """softmax(q k' / sqrt(D)) v over the allowed keys; q [B, H, Q, D], k and v [B, J, K, D] -> [B, H, Q, D].

    Query head h reads key-value head h // (H / J). `allowed` is boolean, [B or 1, 1, Q, K]; None allows all.
    On a CPU two plain products beat scaled_dot_product_attention at these lengths (README, Speed). On
    both paths the heads of a group are folded into the query length, so keys are never repeated.
    """
    if q.is_cuda and q.shape[2] > 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=q.shape[1] != k.shape[1])
    group = q.shape[1] // k.shape[1]
    folded = rearrange(q, "b (j g) q d -> b j (g q) d", g=group) if group > 1 else q
    scores = (folded / math.sqrt(q.shape[3])) @ k.transpose(2, 3)  # [B, J, G * Q, K]
    if allowed is not None:
        scores = scores.masked_fill(~allowed.repeat(1, 1, group, 1), -torch.inf)
    mixed = F.softmax(scores, dim=-1) @ v
    return rearrange(mixed, "b j (g q) d -> b (j g) q d", g=group) if group > 1 else mixed


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, mlp_width: int):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * mlp_width, bias=False)
        self.down = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config.width, config.mlp_width)

    def forward(self, h: Tensor, rotation: Rotation, allowed: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        h = h + self.attention(self.attention_norm(h), rotation, allowed, cache, layer)
        return h + self.mlp(self.mlp_norm(h))


class Rotation:
    """Rotary position embedding: the pair (x_i, x_{i + D/2}) turns by position * theta^(-2i/D)."""

    def __init__(self, positions: Tensor, head_size: int, theta: float, dtype: torch.dtype):
        exponents = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32) / head_size
        angles = positions.float().unsqueeze(-1) * theta**-exponents  # [B or 1, Q, D/2]
        angles = rearrange(torch.cat([angles, angles], dim=-1), "b q d -> b 1 q d")
        # The sign of the half rotation is folded into sin: one roll instead of a split, a negation and a join.
        signs = torch.ones(head_size, device=positions.device)
        signs[: head_size // 2] = -1
        self.cos, self.sin = angles.cos().to(dtype), (angles.sin() * signs).to(dtype)

    def apply(self, x: Tensor) -> Tensor:
        return x * self.cos + torch.roll(x, x.shape[-1] // 2, dims=-1) * self.sin


class Transformer(nn.Module):
    """Causal language model; all parameters are read inside `forward`, the head by `output`."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tied_head else nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(
        self, tokens: Tensor, mask: Tensor | None, cache: KVCache | None, output: Callable[[Tensor, Tensor], R]
    ) -> R:
        """output(hidden [B, Q, E], head_weight [V, E]) of the new tokens [B, Q].

        `mask` [B, K] is True on real tokens, cached ones included; None says that there is no padding. Positions
        count real tokens. `output` runs inside so that the head can go over chunks of positions, and
        sharded parameters are gathered when it does.
        """
        hidden, seen = self.embed(tokens), cache.length if cache else 0
        positions, allowed = _positions_and_allowed(tokens, mask, seen)
        rotation = Rotation(positions, self.config.head_size, self.config.rope_theta, hidden.dtype)
        for layer, block in enumerate(self.blocks):
            if self.gradient_checkpointing and self.training and cache is None:
                hidden = checkpoint(block, hidden, rotation, allowed, None, layer, use_reentrant=False)
            else:
                hidden = block(hidden, rotation, allowed, cache, layer)
        if cache is not None:
            cache.length += tokens.shape[1]
        return output(self.norm(hidden), self.embed.weight if self.head is None else self.head.weight)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def logits(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """The plain `output`: [B, Q, E] x [V, E] -> [B, Q, V]."""
    return F.linear(hidden, head_weight)


def last_logits(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """Logits of the last position alone, [B, V]: what decoding needs."""
    return F.linear(hidden[:, -1], head_weight)


def _positions_and_allowed(tokens: Tensor, mask: Tensor | None, seen: int) -> tuple[Tensor, Tensor | None]:
    num_new = tokens.shape[1]
    steps = torch.arange(seen + num_new, device=tokens.device)
    causal = rearrange(steps, "k -> 1 1 1 k") <= rearrange(steps[seen:], "q -> 1 1 q 1")  # [1, 1, Q, K]
    if mask is None:
        return rearrange(steps[seen:], "q -> 1 q"), causal if num_new > 1 else None
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, seen:]
    # A padded query has no key of its own to look at; it may look at itself, so that no row of a softmax is empty.
    own = rearrange(steps, "k -> 1 1 1 k") == rearrange(steps[seen:], "q -> 1 1 q 1")
    return positions, (causal & rearrange(mask, "b k -> b 1 1 k")) | own


def initialise(model: Transformer, generator: torch.Generator) -> None:
    """Normal weights of variance 1 / fan_in; what writes into the residual stream shrinks with the depth (GPT-2)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                continue
            depth = math.sqrt(2 * model.config.num_layers) if name.endswith(("out.weight", "down.weight")) else 1.0
            std = 0.02 if name.startswith(("embed", "head")) else parameter.shape[1] ** -0.5 / depth
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def save_transformer(model: Transformer, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write config.json and model.safetensors; `state` replaces the model's own (gathered) parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_json(), indent=2) + "\n")
    tensors = dict(to_hugging_face(state or model.state_dict(), model.config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load_transformer(folder: Path) -> Transformer:
    """Read a Hugging Face folder: config.json and safetensors (one file or an index), as float32.

    ValueError: not such a folder, another architecture, missing, surplus or misshapen weights, pickled weights only.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} must be a Hugging Face folder with a config.json, found none")
    try:
        config = TransformerConfig.from_json(json.loads(path.read_text()))
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{path}: {error}") from error
    model = Transformer(config)
    state = from_hugging_face(_read_safetensors(folder), config)
    expected = model.state_dict()
    for name in sorted(set(expected) | set(state)):
        if name not in state:
            raise ValueError(f"{folder}: the weights lack {name}")
        if name not in expected:
            raise ValueError(f"{folder}: the weights have {name}, which this {config.model_type} model has not")
        if state[name].shape != expected[name].shape:
            wanted, got = tuple(expected[name].shape), tuple(state[name].shape)
            raise ValueError(f"{folder}: {name} must have shape {wanted}, got {got}")
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model


def _read_safetensors(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if any("/" in name or "\\" in name for name in names):
            raise ValueError(f"{index}: weight files must lie in the folder itself, got {names}")
    elif (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    else:
        raise ValueError(f"{folder} must hold model.safetensors (pickled .bin weights are refused), found none")
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            tensors.update(load_file(folder / name))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / name} is not a readable safetensors file: {error}") from error
    return tensors


PLAIN_NAMES = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
BLOCK_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}


def _fused_parts(name: str, config: TransformerConfig) -> tuple[list[str], list[int]] | None:
    """Hugging Face names and row counts of a fused parameter, or None if it is not one."""
    kind = name.rpartition(".")[2]
    if name.startswith("attention.qkv."):
        q, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        return [f"self_attn.{part}_proj.{kind}" for part in "qkv"], [q, kv, kv]
    if name.startswith("mlp.gate_up."):
        return [f"mlp.{part}_proj.{kind}" for part in ("gate", "up")], [config.mlp_width] * 2
    return None


def to_hugging_face(state: dict[str, Tensor], config: TransformerConfig) -> Iterator[tuple[str, Tensor]]:
    """Our parameters under transformers' names, fused ones split."""
    for name, value in state.items():
        if name in PLAIN_NAMES:
            yield PLAIN_NAMES[name], value.contiguous()
            continue
        _, layer, rest = name.split(".", 2)
        parts = _fused_parts(rest, config)
        names, sizes = ([BLOCK_NAMES[rest]], [value.shape[0]]) if parts is None else parts
        for part, piece in zip(names, value.split(sizes), strict=True):
            yield f"model.layers.{layer}.{part}", piece.clone().contiguous()


def from_hugging_face(tensors: dict[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """The inverse: transformers' names to ours, q, k, v and gate, up joined."""
    left = {k: v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}
    if config.tied_head:
        left.pop("lm_head.weight", None)
    state = {ours: left.pop(theirs) for ours, theirs in PLAIN_NAMES.items() if theirs in left}
    kinds = [*BLOCK_NAMES, "attention.qkv.weight", "attention.qkv.bias", "mlp.gate_up.weight"]
    for layer in range(config.num_layers):
        for rest in kinds:
            parts = _fused_parts(rest, config)
            names = [f"model.layers.{layer}.{part}" for part in (parts[0] if parts else [BLOCK_NAMES[rest]])]
            if all(name in left for name in names):
                state[f"blocks.{layer}.{rest}"] = torch.cat([left.pop(name) for name in names])
    return state | left  # what is left has a foreign name, and the caller says so


def shape_record(config: TransformerConfig) -> dict[str, object]:
    return asdict(config)
