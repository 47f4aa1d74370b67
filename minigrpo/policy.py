"""From logits to the acting policy q, and the log-probs of what it did.

    p = softmax(z / temperature)
    support = the smallest set of most probable tokens with mass >= top_p (the token that crosses is
              in), cut to its support_size most probable; ties go to the smaller id. With top_p = 1
              nothing is cut, not even at support_size
    q = p on the support, renormalised:  log q = log_softmax over the support of z / temperature

Tokens are drawn from q, and the support is stored. Current, old and reference log-probs are log q
over the *stored* support (keep mask, DeepSeek-V3.2, 2512.02556), so the gradient is that of the
policy that acted, supports held: with log-probs over the whole vocabulary the mean ratio is not 1
and the gradient points elsewhere (tests/test_policy.py measures both).

B rows at one position or M of a micro-batch, C completion tokens, S support cap, V vocabulary,
K columns of a basis; support holds ids, -1 is filler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from minigrpo.top_k import largest


@dataclass(frozen=True)
class ActingPolicy:
    """How tokens are drawn: the same three numbers in sampler, old, new and reference log-probs."""

    temperature: float = 1.5
    top_p: float = 0.9
    support_size: int = 128


def tempered(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """z / temperature in float32 or wider; z are logits, or what a linear head makes them of."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    is_one = not isinstance(temperature, Tensor) and temperature == 1.0
    return wide if is_one else wide / temperature


@dataclass(frozen=True)
class Nucleus:
    """q at one position of each row, the most probable token first; untruncated, in id order."""

    support: Tensor | None  # [B, S] int64, None: the whole vocabulary
    logprobs: Tensor  # [B, S] (or [B, V]) log q, -inf on filler
    kept_mass: Tensor  # [B] mass of p on the support
    is_capped: Tensor  # [B] bool, support_size cut the nucleus


def nucleus(logits: Tensor, acting: ActingPolicy) -> Nucleus:
    """Temperature and top-p on logits [B, V]; the module's docstring has the definition."""
    scaled = tempered(logits, acting.temperature)  # [B, V]
    if acting.top_p == 1.0:
        logprobs, ones = F.log_softmax(scaled, dim=-1), torch.ones_like(scaled[:, 0])
        return Nucleus(None, logprobs, ones, torch.zeros_like(ones, dtype=torch.bool))
    best, ids = largest(scaled, min(acting.support_size, scaled.shape[-1]))  # [B, S]
    # One fused pass over V: on a CPU a third of the time of log-sum-exp.
    probs = F.softmax(scaled, dim=-1).gather(-1, ids)
    mass = probs.cumsum(dim=-1)  # [B, S]
    # A token is in if the mass above it is short of top_p; counted, so that it is a prefix even if
    # a parallel cumsum is not monotone.
    num_kept = (mass - probs < acting.top_p).sum(dim=-1, keepdim=True).clamp(min=1)  # [B, 1]
    kept = torch.arange(best.shape[1], device=best.device) < num_kept  # [B, S]
    inside = best.masked_fill(~kept, -torch.inf)
    kept_mass = (probs * kept).sum(dim=-1)  # [B]
    is_capped = (mass[:, -1] < acting.top_p) & (best.shape[1] < scaled.shape[1])
    return Nucleus(ids.masked_fill(~kept, -1), F.log_softmax(inside, dim=-1), kept_mass, is_capped)


def draw(q: Nucleus, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token a row and its log q, both [B]: inverse CDF of q at uniforms [B] in [0, 1).

    None takes the most probable one, of equals that with the smallest id.
    """
    if uniforms is None:
        place = q.logprobs.argmax(dim=-1, keepdim=True)  # the first of equals
    else:
        cdf = F.softmax(q.logprobs, dim=-1).cumsum(dim=-1)  # on a CPU faster than exp
        place = first_above(cdf, rearrange(uniforms, "b -> b 1"))
    # It is filler only for NaN, which the sampler finds in the log-probs.
    tokens = place if q.support is None else q.support.gather(-1, place).clamp(min=0)
    return rearrange(tokens, "b 1 -> b"), rearrange(q.logprobs.gather(-1, place), "b 1 -> b")


def first_above(cdf: Tensor, shares: Tensor) -> Tensor:
    """The first place [B, 1] at which the running sums [B, K] exceed a share [B, 1] of the last."""
    total = cdf[:, -1:].contiguous()
    # right=True steps over tokens of probability 0; the last possible one, the first that reaches
    # the total, catches a target that rounding lifted to it. The clamp is for NaN, which the
    # sampler finds in the log-probs.
    last = torch.searchsorted(cdf, total).clamp(max=cdf.shape[1] - 1)
    return torch.minimum(torch.searchsorted(cdf, shares.to(cdf) * total, right=True), last)


class TokenScores(NamedTuple):
    """Of the taken tokens, under one policy on the stored support."""

    logprobs: Tensor  # [M, C] log q, nats; its gradient is the policy gradient's
    entropy: Tensor | None = None  # [M, C] of q, nats, without gradient, if it was asked for
    mass: Tensor | None = None  # [M, C, K] of q on each column of a basis, if there is one


def score_logits(
    logits: Tensor,
    tokens: Tensor,
    support: Tensor | None,
    basis: Tensor | None = None,
    has_entropy: bool = True,
) -> TokenScores:
    """log q(token) and the entropy of q: logits [M, C, V], tokens [M, C], support [M, C, S].

    The logits are z / temperature. With a support, gathered before the log-sum-exp: work over S
    values, not V.
    With a basis [V, K], for credit for each control, also mass = sum_a q(a) basis[a]: a value
    W(a) = w . basis[a] has the mean w . mass, with its gradient. The entropy takes a tenth of the
    time with a basis and two thirds without.
    """
    places = rearrange(tokens, "m c -> m c 1")
    if support is None:
        # On a CPU log_softmax is vectorised and logsumexp is not: a third to a half of its time.
        inside = F.log_softmax(tempered(logits, 1.0), dim=-1)  # [M, C, V]
        logq = inside.gather(-1, places).sum(dim=-1)  # of one, as below
    else:
        # One gather for both: each has a backward pass that fills [M, C, V] with zeros.
        ids = torch.cat([places, support.long()], dim=-1)  # [M, C, 1 + S]
        both = tempered(logits.gather(-1, ids.clamp(min=0)), 1.0)
        taken, inside = torch.split(both, [1, support.shape[-1]], dim=-1)
        inside = inside.masked_fill(support < 0, -torch.inf)
        norm = torch.logsumexp(inside, dim=-1, keepdim=True)  # [M, C, 1]
        logq = (taken - norm).sum(dim=-1)  # of one: fully_shard wants no view
        inside = inside - norm  # log q on the support
    mass = entropy = None
    if has_entropy or basis is not None:
        q = inside.exp()  # 0 on filler
    if has_entropy:
        with torch.no_grad():
            finite = inside.clamp(min=torch.finfo(inside.dtype).min)  # 0 * -inf is NaN
            entropy = -finite.mul_(q).sum(dim=-1)  # no product, which autocast would round
    if basis is not None:
        if support is not None:
            everywhere = torch.zeros_like(logits, dtype=q.dtype)
            q = everywhere.scatter_add(-1, support.long().clamp(min=0), q)
        mass = q @ basis.to(q.dtype)
    return TokenScores(logq, entropy, mass)
