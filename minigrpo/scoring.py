"""Scores of whole completions: one forward of the model, then `policy.score_logits`.

    completion_scores    the forward: a long prompt once for its rows, the head in chunks
    in_chunks            logits [M, C, V] that never exist all at once; for SFT as well

M rows, P prompts, L prompt tokens, C completion tokens, S support cap, V vocabulary, E width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from minigrpo.policy import TokenScores, score_logits, tempered
from minigrpo.transformer import SharedPrompts, Transformer, fused
from minigrpo.untruncated import score_all, score_untruncated

T = TypeVar("T", bound=tuple[Tensor | None, ...])
# Logits [M, C, V] with more elements are made in chunks of positions (`in_chunks`); on a GPU, where
# a chunk must be large to be worth its own pass over the head's weight, four times as many.
CHUNK_ELEMENTS = 2**27
# Prompts of fewer tokens are fed once a row: to share them would cost more than it saves. On a GPU,
# where keys are copied for it, from four times as many.
SHARED_FROM = 8


def completion_scores(
    model: Transformer,
    prompt_tokens: Tensor,
    prompt_mask: Tensor | None,
    completion_tokens: Tensor,
    support: Tensor | None,
    temperature: float,
    basis: Tensor | None = None,
    has_entropy: bool = True,
) -> TokenScores:
    """Score completions [M, C] after left-padded prompts [P, L], for old, new and reference alike.

    A prompt is that of M / P rows that follow one another, and goes once through the model for all
    of them if it is long and nothing is padded. A mask of None says so without a look, for which a
    GPU's host would wait. The last completion token is never fed, and only completion positions
    reach the head, in chunks.
    """
    (num_prompts, length), fed = prompt_tokens.shape, completion_tokens[:, :-1]
    group = len(fed) // max(1, num_prompts)
    if prompt_mask is not None and bool(prompt_mask.all()):
        prompt_mask = None
    shared = None
    if group > 1 and prompt_mask is None and length >= shared_from(fed.is_cuda):
        shared = SharedPrompts(num_prompts, length, group, fed.shape[1])
        tokens = rearrange(torch.cat([prompt_tokens.flatten(), fed.flatten()]), "t -> 1 t")
    else:
        repeated = repeat(prompt_tokens, "p l -> (p g) l", g=group)
        tokens = torch.cat([repeated, fed], dim=1)  # [M, L + C - 1]
    if prompt_mask is not None:
        # Padding goes to the right, where it needs no mask: no real token comes after it, and what
        # is scored there is masked.
        pads = repeat((~prompt_mask).sum(dim=1), "p -> (p g) 1", g=group)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        tokens = tokens.gather(1, (places + pads).clamp(max=len(places) - 1))
    formula: Callable[..., TokenScores] = fused(score_logits, model.is_fused)

    def score(logits: Tensor, taken: Tensor, kept: Tensor | None) -> TokenScores:
        if kept is None and basis is None and logits.is_cuda:
            return score_untruncated(logits, taken, has_entropy, model.is_fused)
        if kept is None and basis is not None and not model.is_fused:
            return score_all(logits, taken, basis, has_entropy)
        return formula(logits, taken, kept, basis, has_entropy)

    def output(hidden: Tensor, head_weight: Tensor) -> TokenScores:
        if shared is not None:
            predicting = shared.last_of_prompts_and_rows(hidden)  # [M, C, E]
        elif prompt_mask is not None:
            index = repeat(places[length - 1 :] - pads, "m c -> m c e", e=hidden.shape[2])
            predicting = hidden.gather(1, index)
        else:
            predicting = hidden[:, length - 1 :]
        # Divided before the head, which is linear: E numbers of a token instead of V.
        scaled = tempered(predicting, temperature)
        return TokenScores(*in_chunks(score, scaled, head_weight, completion_tokens, support))

    scores: TokenScores = model(tokens, None, None, output, shared)
    return scores


def shared_from(is_on_cuda: bool) -> int:
    """Tokens of a prompt from which on it goes once through the model for its group."""
    return SHARED_FROM * (4 if is_on_cuda else 1)


def chunk_elements(is_on_cuda: bool) -> int:
    return CHUNK_ELEMENTS * (4 if is_on_cuda else 1)


def in_chunks(
    function: Callable[..., T], hidden: Tensor, head_weight: Tensor, *columns: Tensor | None
) -> T:
    """function(logits [M, c, V], *columns [M, c, ...]) -> tensors [M, c, ...], over all C.

    Beyond `chunk_elements` logits [M, C, V] never exist: c positions of hidden [M, C, E] at a time
    reach the head, and again in the backward pass, which keeps no logits either.
    """

    device = hidden.device.type
    is_mixed, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def piece(part: Tensor, weight: Tensor, *parts: Tensor | None) -> T:
        # A rounded weight of its own for each chunk: gradients of one that they share would be
        # added up in bfloat16.
        with torch.autocast(device, dtype, enabled=is_mixed, cache_enabled=False):
            logits = F.linear(part, weight)
        return function(logits, *parts)

    step = max(1, chunk_elements(hidden.is_cuda) // max(1, hidden.shape[0] * len(head_weight)))
    if step >= hidden.shape[1]:
        return piece(hidden, head_weight, *columns)
    step = math.ceil(hidden.shape[1] / math.ceil(hidden.shape[1] / step))  # of nearly equal size
    pieces = [
        checkpoint(
            piece,
            hidden[:, i : i + step],
            head_weight,
            *(None if column is None else column[:, i : i + step] for column in columns),
            use_reentrant=False,
            preserve_rng_state=False,  # nothing is drawn
        )
        for i in range(0, hidden.shape[1], step)
    ]
    columns_found = zip(*pieces, strict=True)
    return cast(T, tuple(None if c[0] is None else torch.cat(c, dim=1) for c in columns_found))
