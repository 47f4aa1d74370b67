"""Scores of whole completions: one forward of the model, and q in few passes over the vocabulary.

    completion_scores    the forward: a long prompt once for its rows, the head in chunks
    score_all            `policy.score_logits` with a basis, its gradient by hand
    score_untruncated    the same of a large vocabulary on a GPU, without a basis
    in_chunks            logits [M, C, V] that never exist all at once; for SFT as well

M rows, P prompts, L prompt tokens, C completion tokens, S support cap, V vocabulary, E width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from minigrpo.policy import TokenScores, score_logits, tempered
from minigrpo.transformer import SharedPrompts, Transformer, fused

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
    formula = fused(score_logits) if model.is_fused else score_logits

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


def score_untruncated(
    logits: Tensor, tokens: Tensor, has_entropy: bool, is_fused: bool
) -> TokenScores:
    """`score_logits` of q = p over a large vocabulary on a GPU, in as few passes as it takes."""
    places = rearrange(tokens, "m c -> m c 1")
    logq, norm = _TakenLogProbs.apply(logits, places, is_fused)  # type: ignore[no-untyped-call]
    entropy = None
    if has_entropy:
        with torch.no_grad():
            entropy = (fused(entropy_of) if is_fused else entropy_of)(logits, norm)
    return TokenScores(logq.sum(dim=-1), entropy)  # of one: fully_shard wants no view


def score_all(logits: Tensor, tokens: Tensor, basis: Tensor, has_entropy: bool) -> TokenScores:
    """`score_logits` of q = p with a basis, in fewer passes over V than autograd makes of it.

    3,264 positions of 640 tokens with their gradient take 14 instead of 20 ms of a CPU core.
    """
    places = rearrange(tokens, "m c -> m c 1")
    found = _AllChoices.apply(logits, places, basis, has_entropy)  # type: ignore[no-untyped-call]
    return TokenScores(*found)


class _AllChoices(torch.autograd.Function):
    """log q(a), entropy and m_k = sum_b q(b) basis[b, k] of q = softmax(z), logits z [M, C, V].

    d log q(a) / d z_b = [a = b] - q(b)      d m_k / d z_b = q(b) (basis[b, k] - m_k)

    So one product with the basis and three passes over V make the gradient, and q is all that is
    kept.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, places: Tensor, basis: Tensor, has_entropy: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        with torch.autocast(logits.device.type, enabled=False):
            inside = F.log_softmax(tempered(logits, 1.0), dim=-1)  # [M, C, V]
            q = inside.exp()
            logq = inside.gather(-1, places).sum(dim=-1)  # of one, as above
            entropy = None
            if has_entropy:
                finite = inside.clamp_(min=torch.finfo(inside.dtype).min)  # 0 * -inf is NaN
                entropy = -finite.mul_(q).sum(dim=-1)
            mass = q @ basis.to(q.dtype)
        ctx.save_for_backward(q, places, basis, mass)
        ctx.dtype = logits.dtype
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return logq, entropy, mass

    @staticmethod
    def backward(
        ctx: Any, of_logq: Tensor, _: Tensor | None, of_mass: Tensor
    ) -> tuple[Tensor, None, None, None]:
        q, places, basis, mass = ctx.saved_tensors
        taken = rearrange(of_logq, "m c -> m c 1")
        gradient = of_mass @ basis.to(q.dtype).T  # [M, C, V]
        gradient -= (of_mass * mass).sum(dim=-1, keepdim=True) + taken
        gradient *= q
        gradient.scatter_add_(-1, places, taken)
        return gradient.to(ctx.dtype), None, None, None


class _TakenLogProbs(torch.autograd.Function):
    """log q(a) = z_a - log sum_b exp(z_b) and that norm, [M, C, 1], of logits z [M, C, V].

    d log q(a) / d z_b = [a = b] - q(b)

    Autograd would keep log q of all tokens in float32, and fill another such table with the zeros
    around the one that was taken. Here the logits as they are and a number of each token are kept.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, places: Tensor, is_fused: bool) -> tuple[Tensor, Tensor]:
        formula = fused(taken_log_probs) if is_fused else taken_log_probs
        logq, norm = formula(logits, places)
        ctx.save_for_backward(logits, places, norm)
        ctx.mark_non_differentiable(norm)
        ctx.is_fused = is_fused
        return logq, norm

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        formula = fused(taken_gradient) if ctx.is_fused else taken_gradient
        logits, places, norm = ctx.saved_tensors
        return formula(logits, places, norm, gradient), None, None


def taken_log_probs(logits: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """log q and norm of `_TakenLogProbs`."""
    wide = tempered(logits, 1.0)
    norm = torch.logsumexp(wide, dim=-1, keepdim=True)
    return wide.gather(-1, places) - norm, norm


def taken_gradient(logits: Tensor, places: Tensor, norm: Tensor, gradient: Tensor) -> Tensor:
    """gradient times d log q / dz, in the dtype of the logits."""
    is_taken = torch.arange(logits.shape[-1], device=logits.device) == places
    q = (tempered(logits, 1.0) - norm).exp_()  # in place: one such table at a time
    return q.neg_().add_(is_taken).mul_(gradient).to(logits.dtype)


def entropy_of(logits: Tensor, norm: Tensor) -> Tensor:
    """sum_b q(b) (norm - z_b), [M, C] nats."""
    wide = tempered(logits, 1.0)
    below = (norm - wide).clamp_(max=torch.finfo(wide.dtype).max)  # 0 * inf is NaN
    return below.neg().exp_().mul_(below).sum(dim=-1)
