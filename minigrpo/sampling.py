"""Batched decoding with a key-value cache: each prompt is prefilled once for its group.

A worked batch (tests/test_sampling.py holds it): P = 1, G = 3, C = 3, EOS = 1, pad = 0
    row 0   tokens [5 7 1]   mask [1 1 1]   ended True
    row 1   tokens [9 1 0]   mask [1 1 0]   ended True     EOS is inside the mask, pad is not
    row 2   tokens [5 7 7]   mask [1 1 1]   ended False    cut off
    support[1, 0] = [5 9 -1]: token 9 was drawn from two, its log-prob is log softmax over those two
Masks come from positions, never from token values, so pad may be EOS.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from minigrpo.policy import ActingPolicy, draw, nucleus
from minigrpo.shapes import check_shapes
from minigrpo.transformer import KVCache, Transformer, last_logits


@dataclass(frozen=True)
class Completions:
    """What was sampled, N = P * G rows, group-major: row p * G + g."""

    tokens: Tensor  # [N, C] int64, right-padded
    mask: Tensor  # [N, C] bool, True up to and including EOS
    support: Tensor | None  # [N, C, S] int32, -1 is filler; None: the whole vocabulary
    sampling_logprobs: Tensor  # [N, C] the decoder's own log q, a metric only
    ended: Tensor  # [N] bool, EOS was sampled
    kept_mass: Tensor  # [N, C] mass of p on the support
    is_capped: Tensor  # [N, C] bool, support_size cut the nucleus

    def __post_init__(self) -> None:
        check_shapes(
            tokens=(self.tokens, "N C"),
            mask=(self.mask, "N C"),
            sampling_logprobs=(self.sampling_logprobs, "N C"),
            ended=(self.ended, "N"),
            kept_mass=(self.kept_mass, "N C"),
            is_capped=(self.is_capped, "N C"),
            **({} if self.support is None else {"support": (self.support, "N C S")}),
        )


@dataclass(frozen=True)
class StopRule:
    """When a row ends and what fills it up afterwards."""

    eos_ids: tuple[int, ...]
    pad_id: int
    max_length: int

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}")


@torch.no_grad()
def sample_completions(
    model: Transformer,
    prompt_tokens: Tensor,
    prompt_mask: Tensor,
    group_size: int,
    acting: ActingPolicy,
    stop: StopRule,
    uniforms: Tensor | None,
    rows_per_batch: int = 512,
) -> Completions:
    """Draw `group_size` completions of at most `stop.max_length` tokens for each prompt [P, L].

    Prompts are left-padded. `uniforms` [N, C] in [0, 1) decide every draw (None: greedy), so equal
    uniforms give equal tokens however the rows are batched. Whole groups are decoded,
    `rows_per_batch` rows at a time, which bounds the cache.
    """
    num_rows, length = len(prompt_tokens) * group_size, stop.max_length
    if uniforms is not None:
        check_shapes(uniforms=(uniforms, f"{num_rows} {length}"))
    per_batch = max(1, rows_per_batch // group_size)
    batches = []
    for start in range(0, len(prompt_tokens), per_batch):
        end = start + per_batch
        tokens, mask = prompt_tokens[start:end], prompt_mask[start:end]
        drawn = None if uniforms is None else uniforms[start * group_size : end * group_size]
        batches.append(_decode(model, tokens, mask, group_size, acting, stop, drawn))
    joined = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    tokens, mask, logprobs, kept_mass, is_capped, ended, support = joined
    longest = int(mask.sum(dim=1).max())
    if acting.top_p == 1.0:
        stored = None
    else:
        # On padding the support is the pad token alone: a log-prob of 0, whoever computes it.
        support[:, :, 0] = torch.where(mask, support[:, :, 0], tokens.int())
        stored = support[:, :longest, : int((support >= 0).sum(dim=-1).max())].contiguous()
    cut = slice(0, longest)
    return Completions(
        tokens[:, cut],
        mask[:, cut],
        stored,
        logprobs[:, cut],
        ended,
        kept_mass[:, cut],
        is_capped[:, cut],
    )


def _decode(
    model: Transformer,
    prompt_tokens: Tensor,
    prompt_mask: Tensor,
    group_size: int,
    acting: ActingPolicy,
    stop: StopRule,
    uniforms: Tensor | None,
) -> tuple[Tensor, ...]:
    """One batch of rows in lock-step until all have ended; columns never reached keep filler."""
    (num_prompts, prompt_length), device = prompt_tokens.shape, prompt_tokens.device
    num_rows, length = num_prompts * group_size, stop.max_length
    tokens = torch.full((num_rows, length), stop.pad_id, device=device)  # [N, C]
    alive = torch.zeros(num_rows, length + 1, dtype=torch.bool, device=device)
    logprobs = torch.zeros(num_rows, length, device=device)
    kept_mass = torch.ones(num_rows, length, device=device)
    is_capped = torch.zeros(num_rows, length, dtype=torch.bool, device=device)
    width = 1 if acting.top_p == 1.0 else min(acting.support_size, model.config.vocab_size)
    support = torch.full((num_rows, length, width), -1, dtype=torch.int32, device=device)
    eos = torch.tensor(stop.eos_ids, device=device)

    padded = not bool(prompt_mask.all())
    is_mixed = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if is_mixed else model.embed.weight.dtype
    once = KVCache(model.config, num_prompts, prompt_length, device, dtype)
    logits = model(prompt_tokens, prompt_mask if padded else None, once, last_logits)  # [P, V]
    cache = KVCache(model.config, num_rows, prompt_length + length, device, dtype)
    cache.fill_from(once, group_size)
    logits = repeat(logits, "p v -> (p g) v", g=group_size)
    seen = torch.ones(num_rows, prompt_length + length, dtype=torch.bool, device=device)
    seen[:, :prompt_length] = repeat(prompt_mask, "p l -> (p g) l", g=group_size)

    alive[:, 0] = True
    for step in range(length):
        q = nucleus(logits, acting)
        drawn, logq = draw(q, None if uniforms is None else uniforms[:, step])
        now = alive[:, step]
        tokens[:, step] = torch.where(now, drawn, stop.pad_id)
        logprobs[:, step] = torch.where(now, logq, 0.0)
        kept_mass[:, step] = torch.where(now, q.kept_mass, 1.0)
        is_capped[:, step] = q.is_capped & now
        if q.support is not None:
            support[:, step] = torch.where(rearrange(now, "n -> n 1"), q.support.int(), -1)
        alive[:, step + 1] = now & ~torch.isin(drawn, eos)
        if step + 1 == length or not bool(alive[:, step + 1].any()):
            break
        mask = seen[:, : prompt_length + step + 1] if padded else None
        logits = model(tokens[:, step : step + 1], mask, cache, last_logits)
    return tokens, alive[:, :-1], logprobs, kept_mass, is_capped, ~alive[:, step + 1], support
