"""The decoder of the Llama / Qwen2 / Qwen3 / SmolLM2 family, one forward for training and decoding.

    h = embed(tokens)
    h = h + attention(rms_norm(h));  h = h + swiglu(rms_norm(h))      for every block
    output(rms_norm(h), head_weight)                                  logits are the caller's

RMSNorm (1910.07467), rotary positions (2104.09864, the half-rotation layout of transformers),
grouped queries (2305.13245), SwiGLU (2002.05202); optional bias on q, k and v (Qwen2), RMSNorm on
q and k (Qwen3), tied head.

B rows, Q new tokens, K keys (places of the cache or, without one, Q), H heads, J key-value heads,
D head size, E width, V vocabulary. Deviation from transformers: q, k, v and gate, up are one matrix
each (one product instead of three and two); files keep the usual names (`hugging_face`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minigrpo.elementwise import gated_silu, rms_norm, rotate

P = ParamSpec("P")
R = TypeVar("R")
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclass(frozen=True)
class RopeStretch:
    """Llama 3.1's slower rotary frequencies, rope_type llama3 of transformers, in its names."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of the model in our names."""

    model_type: str
    vocab_size: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    rope_theta: float = 10_000.0
    rope_stretch: RopeStretch | None = None
    norm_eps: float = 1e-6
    tied_head: bool = True

    def __post_init__(self) -> None:
        check_model_type(self.model_type)
        for name in ("vocab_size", "width", "mlp_width", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_layers > 1000:  # before anybody makes them, even without storage
            raise ValueError(f"num_layers must be at most 1000, got {self.num_layers}")
        for name in ("rope_theta", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        width, heads, kv = self.width, self.num_heads, self.num_kv_heads
        if heads % kv:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads={kv}, got {heads}")
        if self.model_type == "llama" and width % heads:  # or transformers refuses it
            raise ValueError(f"width must be a multiple of num_heads={heads}, got {width}")
        if self.head_size < 1 or self.head_size % 2:  # rotary positions turn pairs
            raise ValueError(f"head_size must be positive and even, got {self.head_size}")

    @property
    def qkv_bias(self) -> bool:
        return self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.model_type == "qwen3"


def check_model_type(name: str) -> str:
    """The name itself; ValueError: of no family that is supported."""
    if name not in ARCHITECTURES:
        supported = ", ".join(sorted(ARCHITECTURES))
        raise ValueError(f"model_type must be one of {supported} (SmolLM2 is llama), got {name!r}")
    return name


class KVCache:
    """Keys and values of the tokens so far; the one object written in place.

    A head's keys lie together in memory, although a step appends one to each: to attend reads them
    all, which is faster this way on a CPU with a small cache and no slower elsewhere. On a CPU room
    is made for GROWTH tokens at a time and all of it is read, the places beyond masked: with gaps
    between heads an EPYC reads at half to a third of the rate, most likely because its prefetching
    stops at them (docs/speed.md).
    """

    GROWTH = 32

    def __init__(
        self,
        config: TransformerConfig,
        num_rows: int,
        max_length: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.max_length, self.length = max_length, 0
        grows = device.type == "cpu"  # elsewhere recorded graphs keep their addresses
        self.growth, room = (self.GROWTH, 0) if grows else (1, max_length)
        shape = (2, num_rows, config.num_kv_heads, room, config.head_size)
        self.layers = [
            torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_layers)
        ]

    def num_read(self, length: int) -> int:
        """Places that attention reads when `length` are written.

        Those beyond are masked, yet never NaN, which a weight of 0 would not remove: they hold 0,
        or keys of an earlier batch. ValueError: the cache has no room for so many.
        """
        if length > self.max_length:
            raise ValueError(
                f"length must be at most {self.max_length} in this cache, got {length}"
            )
        return min(math.ceil(length / self.growth) * self.growth, self.max_length)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """[B, J, Q, D] each -> all keys and values that are read, [B, J, K, D] views.

        K is `num_read` of the tokens so far. The model moves `length` when all layers have
        appended.
        """
        end = self.length + keys.shape[2]
        all_keys, all_values = self._room(layer, end)
        all_keys[:, :, self.length : end] = keys
        all_values[:, :, self.length : end] = values
        return all_keys, all_values

    def fill_from(self, prompts: KVCache, group_size: int) -> None:
        """Copy a prompt's keys and values to each member of its group: one prefill, not G."""
        self.length = prompts.length
        for layer in range(len(self.layers)):
            own = self._room(layer, self.length)[..., : self.length, :]
            groups = rearrange(own, "two (p g) j k d -> two p g j k d", g=group_size)
            once = prompts._room(layer, self.length)[..., : self.length, :]  # at its full length
            groups[:] = rearrange(once, "two p j k d -> two p 1 j k d")

    def _room(self, layer: int, length: int) -> Tensor:
        """A layer's keys and values, [2, B, J, K, D], grown to the places that are read."""
        wanted, here = self.num_read(length), self.layers[layer]
        if here.shape[3] < wanted:
            here = self.layers[layer] = F.pad(here, (0, 0, 0, wanted - here.shape[3]))
        return here[..., :wanted, :]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 whatever the dtype of x."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]  # of q, k, v
        self.qkv = nn.Linear(config.width, sum(self.heads) * config.head_size, config.qkv_bias)
        self.out = nn.Linear(config.num_heads * config.head_size, config.width, bias=False)
        norm = config.qk_norm
        self.q_norm = RMSNorm(config.head_size, config.norm_eps) if norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_size, config.norm_eps) if norm else nn.Identity()


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool = False) -> Tensor:
    """softmax(q k' / sqrt(D) + bias) v.

    q [B, H, Q, D], k and v [B, J, K, D] -> [B, H, Q, D]; query head h reads key-value head
    h // (H / J). `bias` is 0 or -inf, [B or 1, 1, Q, K]; None allows all, or, with `is_causal`
    (CUDA), the keys up to the query's own place. On a CPU two plain products beat
    scaled_dot_product_attention, in training by up to a factor of 9 (docs/speed.md).
    The heads of a group are folded into the query length, or their keys repeated, where CUDA's only
    kernel for grouped heads would be the plain one, which keeps all weights.
    """
    group = q.shape[1] // k.shape[1]
    if q.is_cuda and q.shape[2] == 1 and (bias is not None or q.dtype == torch.float32):
        folded = rearrange(q, "b (j g) 1 d -> b j g d", g=group)
        mixed = F.scaled_dot_product_attention(folded, k, v, attn_mask=bias)
        return rearrange(mixed, "b j g d -> b (j g) 1 d")
    if q.is_cuda:
        if q.dtype == torch.float32:  # flash and cuDNN have bfloat16 alone
            k, v = (repeat(x, "b j k d -> b (j g) k d", g=group) for x in (k, v))
            group = 1
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=is_causal, enable_gqa=group > 1
        )
    queries = rearrange(q, "b (j g) q d -> (b j) (g q) d", g=group)
    keys, values = rearrange(k, "b j k d -> (b j) d k"), rearrange(v, "b j k d -> (b j) k d")
    if bias is None:
        bias = q.new_zeros(1, 1, 1, 1)
    heads = k.shape[1] if bias.shape[0] > 1 else 1
    biases = repeat(bias, "b 1 q k -> (b j) (g q) k", j=heads, g=group)
    with without_onednn() if queries.shape[1] == 1 else nullcontext():
        scores = torch.baddbmm(biases, queries, keys, alpha=q.shape[3] ** -0.5)  # [B * J, G * Q, K]
        mixed = F.softmax(scores, dim=-1) @ values
    return rearrange(mixed, "(b j) (g q) d -> b (j g) q d", j=k.shape[1], g=group)


@contextmanager
def without_onednn() -> Iterator[None]:
    """Products of float32 on a CPU by torch's default library, whatever was chosen.

    For one query of each key head, where memory is the bound, oneDNN takes 1.6 times as long on an
    EPYC (docs/speed.md). On Intel's processors it is not chosen (`runs.set_matmul_precision`).
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, mlp_width: int):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * mlp_width, bias=False)
        self.down = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(gated_silu(self.gate_up(x)))
        return out


class Block(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config.width, config.mlp_width)

    def forward(self, h: Tensor, tokens: NewTokens, cache: KVCache | None, layer: int) -> Tensor:
        # Attention and cache stay outside what is fused: their length changes with every token.
        q, k, v = fused(before_attention, tokens.is_fused)(self, h, tokens.cos, tokens.sin)
        if tokens.shared is not None:
            mixed = tokens.shared.attend(q, k, v, tokens.bias, tokens.is_causal)
        else:
            if cache is not None:
                k, v = cache.append(layer, k, v)
            mixed = attend(q, k.to(q.dtype), v.to(q.dtype), tokens.bias, tokens.is_causal)
        out: Tensor = fused(after_attention, tokens.is_fused)(self, h, mixed)
        return out


def before_attention(
    block: Block, h: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated q [B, H, Q, D] and k, and v [B, J, Q, D], of the residual stream h [B, Q, E].

    A function: blocks share what is compiled.
    """
    own = block.attention
    qkv = rearrange(own.qkv(block.attention_norm(h)), "b q (h d) -> b h q d", h=sum(own.heads))
    # One copy here spares rotation and products strided reads: 3 ms of 8 a layer in training.
    q, k, v = qkv.contiguous().split(own.heads, dim=1)
    return rotate(own.q_norm(q), cos, sin), rotate(own.k_norm(k), cos, sin), v


def after_attention(block: Block, h: Tensor, mixed: Tensor) -> Tensor:
    """The rest of the block, [B, Q, E], of the mixed values [B, H, Q, D]."""
    h = h + block.attention.out(rearrange(mixed, "b h q d -> b q (h d)"))
    out: Tensor = h + block.mlp(block.mlp_norm(h))
    return out


@functools.cache
def fused(function: Callable[P, R], is_fused: bool) -> Callable[P, R]:
    """The function with its element-wise operations in few kernels, compiled at its first call.

    For one shape: another length is compiled anew. Kernels for any length ended in an error inside
    the compiler of torch 2.11 when scores were taken in chunks. Unless `is_fused`: as it is.
    """
    if not is_fused:
        return function
    compiled: Callable[P, R] = torch.compile(function, dynamic=False)

    @functools.wraps(function)
    def limited(*args: P.args, **kwargs: P.kwargs) -> R:
        # Beyond it functions run as they are written. Set at each call: since torch 2.12 it holds
        # in one thread, and the backward pass on CUDA has threads of its own.
        torch._dynamo.config.recompile_limit = 64
        return compiled(*args, **kwargs)

    return limited


@dataclass(frozen=True)
class SharedPrompts:
    """P prompts of L tokens, each before G rows of Q tokens, packed into one sequence; M = P G.

    Its P L + M Q tokens are those of the prompts, then those of the rows: all that looks at single
    tokens does a prompt's once and not once a row. Attention alone sees M rows of L + Q. No padding
    in the prompts.
    """

    num_prompts: int
    prompt_length: int
    group_size: int
    num_new: int  # Q; 0: rows of one token, which is scored without feeding it

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool
    ) -> Tensor:
        """`attend` of packed q [1, H, P L + M Q, D], k and v [1, J, P L + M Q, D].

        A GPU's kernel reads the keys of a row in one piece, so there each row has its copy of the
        prompt. On a CPU a softmax joins two products: of the queries of a whole group with the keys
        of their prompt, and of each row's queries with its own keys.
        """
        if q.is_cuda or bias is None or self.num_new == 0:
            q, k, v = (self.spread(x) for x in (q, k, v))
            return self.pack(attend(q, k, v, bias, is_causal))
        length, group, scale = self.prompt_length, self.group_size, q.shape[3] ** -0.5
        sizes = {"p": self.num_prompts, "j": k.shape[1], "g": group, "s": self.num_new}
        parts = [self._parts(x, 2) for x in (q, k, v)]
        first_q, first_k, first_v = (
            rearrange(x, "1 h (p l) d -> p h l d", p=self.num_prompts) for x, _ in parts
        )
        of_prompts = attend(first_q, first_k, first_v, bias[:, :, :length, :length])  # [P, H, L, D]

        # A product each for prompt p and key head j, with r query heads of s tokens of g rows.
        queries, keys, values = (
            rearrange(x, "1 (j r) (p g s) d -> (p j g) (r s) d", **sizes) for _, x in parts
        )
        shared_keys, shared_values = (
            rearrange(x, "p j l d -> (p j) l d") for x in (first_k, first_v)
        )
        grouped = rearrange(queries, "(b g) s d -> b (g s) d", g=group)
        on_prompt = torch.baddbmm(q.new_zeros(1, 1, 1), grouped, shared_keys.mT, alpha=scale)
        on_prompt = rearrange(on_prompt, "b (g s) l -> (b g) s l", g=group)
        causal = bias[0, :, length:, length:].repeat(1, q.shape[1] // k.shape[1], 1)  # [1, R S, S]
        on_own = torch.baddbmm(causal, queries, keys.mT, alpha=scale)
        weights = F.softmax(torch.cat([on_prompt, on_own], dim=2), dim=2)
        of_prompt, of_own = torch.split(weights, [length, self.num_new], dim=2)
        of_prompt = rearrange(of_prompt, "(b g) s l -> b (g s) l", g=group)
        mixed = rearrange(of_prompt @ shared_values, "b (g s) d -> (b g) s d", g=group)
        mixed = torch.baddbmm(mixed, of_own, values)
        of_rows = rearrange(mixed, "(p j g) (r s) d -> 1 (j r) (p g s) d", **sizes)
        return torch.cat([rearrange(of_prompts, "p h l d -> 1 h (p l) d"), of_rows], dim=2)

    def _parts(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        size = self.num_prompts * self.prompt_length
        of_prompts, of_rows = torch.split(x, [size, x.shape[dim] - size], dim=dim)
        return of_prompts, of_rows

    def spread(self, x: Tensor) -> Tensor:
        """[1, H, P L + M Q, D] -> [M, H, L + Q, D]."""
        prompts, rows = self._parts(x, 2)
        prompts = rearrange(prompts, "1 h (p l) d -> p 1 h l d", p=self.num_prompts)
        rows = rearrange(rows, "1 h (p g q) d -> p g h q d", p=self.num_prompts, g=self.group_size)
        whole = torch.cat([prompts.expand(-1, self.group_size, -1, -1, -1), rows], dim=3)
        return rearrange(whole, "p g h s d -> (p g) h s d")

    def pack(self, x: Tensor) -> Tensor:
        """[M, H, L + Q, D] -> [1, H, P L + M Q, D]; of a prompt's copies the first is kept."""
        prompts, rows = x[:: self.group_size], x[:, :, self.prompt_length :]
        prompts = rearrange(prompts[:, :, : self.prompt_length], "p h l d -> 1 h (p l) d")
        return torch.cat([prompts, rearrange(rows, "m h q d -> 1 h (m q) d")], dim=2)

    def positions(self, of_row: Tensor) -> Tensor:
        """Those of all packed tokens, [1, P L + M Q], from those of one row [1, L + Q]."""
        prompt, rest = of_row[:, : self.prompt_length], of_row[:, self.prompt_length :]
        rows = rest.repeat(1, self.num_prompts * self.group_size)
        return torch.cat([prompt.repeat(1, self.num_prompts), rows], dim=1)

    def last_of_prompts_and_rows(self, hidden: Tensor) -> Tensor:
        """What predicts each token of the rows and one more: [1, P L + M Q, E] -> [M, 1 + Q, E]."""
        prompts, rows = self._parts(hidden, 1)
        last = rearrange(prompts, "1 (p l) e -> p l e", p=self.num_prompts)[:, -1]
        first = repeat(last, "p e -> (p g) 1 e", g=self.group_size)
        return torch.cat([first, rearrange(rows, "1 (m q) e -> m q e", m=len(first))], dim=1)


@dataclass(frozen=True)
class NewTokens:
    """What all blocks share of a forward pass: the places of the new tokens, and what they see."""

    cos: Tensor  # [B or 1, 1, Q, D] of the rotary positions
    sin: Tensor  # [B or 1, 1, Q, D], the sign of the half rotation folded in
    bias: Tensor | None  # [B or 1, 1, Q, K], 0 or -inf; None: `is_causal` decides
    is_causal: bool  # without a bias: each sees those before it; False: all keys
    is_fused: bool
    shared: SharedPrompts | None = None


def rotary(
    positions: Tensor, config: TransformerConfig, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of position * theta^(-2i/D), [B or 1, 1, Q, D] of [B or 1, Q]."""
    speed = rotary_frequencies(config, positions.device)  # [D/2] rad per token
    angles = rearrange(positions.float(), "b q -> b 1 q 1") * torch.cat([speed, speed])
    # The sign of the half rotation is folded into sin: no half is negated (`elementwise.rotate`).
    signs = torch.ones(config.head_size, device=positions.device)
    signs[: config.head_size // 2] = -1
    return angles.cos().to(dtype), (angles.sin() * signs).to(dtype)


def rotary_frequencies(config: TransformerConfig, device: torch.device) -> Tensor:
    """theta^(-2i/D), [D/2]; Llama 3.1 divides those of few turns in the old context by `factor`.

    turns = frequency * old context / 2 pi,  blend = clamp((turns - low) / (high - low), 0, 1)
    """
    exponents = torch.arange(0, config.head_size, 2, device=device, dtype=torch.float32)
    frequencies = config.rope_theta ** (-exponents / config.head_size)
    stretch = config.rope_stretch
    if stretch is None:
        return frequencies
    turns = frequencies * stretch.original_max_position_embeddings / (2 * math.pi)
    low, high = stretch.low_freq_factor, stretch.high_freq_factor
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (blend + (1 - blend) / stretch.factor)


class Transformer(nn.Module):
    """Causal language model; all parameters are read inside `forward`, the head by `output`."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.is_fused = False  # fused element-wise operations, here and in `completion_scores`
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = (
            None if config.tied_head else nn.Linear(config.width, config.vocab_size, bias=False)
        )

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        cache: KVCache | None,
        output: Callable[[Tensor, Tensor], R],
        shared: SharedPrompts | None = None,
    ) -> R:
        """output(hidden [B, Q, E], head_weight [V, E]) of the new tokens [B, Q].

        `mask` [B, cached + Q] is True on real tokens; None says that there is no padding. Positions
        count real tokens. `output` runs inside so that the head can go over chunks of positions,
        and sharded parameters are gathered when it does. With `shared` the tokens are its packed
        ones, B = 1, without mask and cache.
        """
        hidden, seen = self.embed(tokens), cache.length if cache else 0
        one = tokens if shared is None else tokens[:, : shared.prompt_length + shared.num_new]
        num_keys = cache.num_read(seen + tokens.shape[1]) if cache else one.shape[1]
        dtype = product_dtype(hidden)  # a bias of another one would be cast in every block
        positions, bias, is_causal = _positions_and_bias(one, mask, seen, num_keys, dtype)
        positions = positions if shared is None else shared.positions(positions)
        cos, sin = rotary(positions, self.config, hidden.dtype)
        new = NewTokens(cos, sin, bias, is_causal, self.is_fused, shared)
        for layer, block in enumerate(self.blocks):
            if self.gradient_checkpointing and self.training and cache is None:
                hidden = checkpoint(  # nothing is drawn
                    block, hidden, new, None, layer, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden = block(hidden, new, cache, layer)
        if cache is not None:
            cache.length += tokens.shape[1]
        table = self.embed if self.head is None else self.head
        return output(self.norm(hidden), table.weight)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def num_trained(self) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def product_dtype(x: Tensor) -> torch.dtype:
    """That of matrix products with x: under autocast its own, but for float64, which it leaves."""
    device = x.device.type
    is_cast = torch.is_autocast_enabled(device) and x.dtype == torch.float32
    return torch.get_autocast_dtype(device) if is_cast else x.dtype


def logits(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """The plain `output`: [B, Q, E] x [V, E] -> [B, Q, V]."""
    return F.linear(hidden, head_weight)


def last_logits(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """Logits of the last position alone, [B, V]: what decoding needs."""
    return F.linear(hidden[:, -1], head_weight)


def _positions_and_bias(
    tokens: Tensor, mask: Tensor | None, seen: int, num_keys: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, bool]:
    """Positions [B or 1, Q], the bias of attention, and whether its causal kernel needs none."""
    num_new = tokens.shape[1]
    steps = torch.arange(num_keys, device=tokens.device)
    own = steps[seen : seen + num_new]
    keys, queries = rearrange(steps, "k -> 1 1 1 k"), rearrange(own, "q -> 1 1 q 1")
    allowed = keys <= queries  # [1, 1, Q, K]
    if mask is None:
        positions = rearrange(own, "q -> 1 q")
        is_causal = tokens.is_cuda and seen == 0 and num_new > 1
        if (num_new == 1 and num_keys == seen + 1) or is_causal:
            return positions, None, is_causal
    else:
        if mask.shape != (len(tokens), seen + num_new):
            wanted, got = (len(tokens), seen + num_new), tuple(mask.shape)
            raise ValueError(f"mask must have shape {wanted}, got {got}")
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, seen:]
        known = F.pad(mask, (0, num_keys - seen - num_new))
        # A padded query has nothing to look at but itself; that way no row of a softmax is empty.
        allowed = (allowed & rearrange(known, "b k -> b 1 1 k")) | (keys == queries)
    bias = torch.zeros(allowed.shape, dtype=dtype, device=tokens.device)
    return positions, bias.masked_fill(~allowed, -torch.inf), False


def initialise(
    model: Transformer, generator: torch.Generator, features: Tensor | None = None
) -> None:
    """Normal weights of variance 1 / fan_in; those into the residual stream shrink with depth.

    The last rule is GPT-2's. Biases are 0 and norms 1: no generator but this one has a say.
    Rows of `features` [V, E] that are not 0 replace the embedding's and, scaled by 1 / sqrt(E), an
    untied head's: a start in which related tokens have related rows, without noise of their own,
    which `optim.smooth_gradients` could not take away again.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            into_residual = name.endswith(("out.weight", "down.weight"))
            depth = math.sqrt(2 * model.config.num_layers) if into_residual else 1.0
            std = 0.02 if name.startswith(("embed", "head")) else parameter.shape[1] ** -0.5 / depth
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        if features is not None:
            has_any = features.any(dim=1, keepdim=True)  # [V, 1]
            model.embed.weight.copy_(torch.where(has_any, features, model.embed.weight))
            if model.head is not None:
                scaled = features * model.config.width**-0.5
                model.head.weight.copy_(torch.where(has_any, scaled, model.head.weight))
