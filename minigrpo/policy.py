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
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from minigrpo.transformer import fused

# Tokens of a block of the vocabulary, where draws and top-p go over it in two levels.
BLOCK = 64
LARGE_VOCABULARY = 64 * BLOCK


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
    best, ids = _largest(scaled, min(acting.support_size, scaled.shape[-1]))  # [B, S]
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


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row, descending, equal ones by id, which topk leaves open."""
    if values.is_cuda or values.shape[1] > LARGE_VOCABULARY:
        return _largest_by_blocks(values, count)
    best, ids = values.topk(min(count + 1, values.shape[1]), dim=-1)
    tied = (best[:, 1:] == best[:, :-1]).any(dim=-1)  # also looks one past the cap
    if tied.any():
        again, order = torch.sort(values[tied], dim=-1, descending=True, stable=True)
        best[tied], ids[tied] = again[:, : best.shape[1]], order[:, : best.shape[1]]
    return best[:, :count], ids[:, :count]


def _blocks(logits: Tensor) -> Tensor:
    """[B, V] -> [B, V / BLOCK, BLOCK], filled up with -inf."""
    missing = -logits.shape[-1] % BLOCK
    filled = F.pad(logits, (0, missing), value=-torch.inf) if missing else logits
    return rearrange(filled, "b (n k) -> b n k", k=BLOCK)


def _largest_by_blocks(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The same without a look from the host, which a CUDA graph cannot wait for, and without a sort
    of whole rows, of which most have ties where logits are bfloat16 (CPU, 32 rows of 49,152: 9
    instead of 273 ms).

    The `count` blocks with the largest maxima hold the `count` best tokens: every other block has
    its best token below `count` others. So 8,192 values are sorted rather than 152,000.
    """
    blocks = _blocks(values)
    chosen = _places_of_best(blocks.amax(dim=-1), min(count, blocks.shape[1]))
    chosen = chosen.sort(dim=-1).values  # so that a place is smaller if and only if the id is
    inside = blocks.gather(1, repeat(chosen, "b s -> b s k", k=BLOCK)).flatten(1)
    places = _places_of_best(inside, count)  # [B, count]
    ids = chosen.gather(-1, places // BLOCK) * BLOCK + places % BLOCK
    ids = ids.clamp(max=values.shape[-1] - 1)  # a negative NaN is below the -inf of the last block
    return values.gather(-1, ids), ids


def _places_of_best(values: Tensor, count: int) -> Tensor:
    """Places [B, count] of the largest in float32, descending, the smaller place first if equal.

    Bits of a float, those of a negative one turned round, are ordered as the floats are; times the
    row's length, with the place behind, no two keys are equal.
    """
    bits = (values.float() + 0.0).view(torch.int32)  # -0 + 0 = 0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    behind = torch.arange(values.shape[-1] - 1, -1, -1, device=values.device)
    keys = (ordered * values.shape[-1] + behind).topk(count, dim=-1).values
    return values.shape[-1] - 1 - keys % values.shape[-1]


def draw(q: Nucleus, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token a row and its log q, both [B]: inverse CDF of q at uniforms [B] in [0, 1).

    None takes the most probable one, of equals that with the smallest id.
    """
    if uniforms is None:
        place = q.logprobs.argmax(dim=-1, keepdim=True)  # the first of equals
    else:
        cdf = F.softmax(q.logprobs, dim=-1).cumsum(dim=-1)  # on a CPU faster than exp
        place = _first_above(cdf, rearrange(uniforms, "b -> b 1"))
    # It is filler only for NaN, which the sampler finds in the log-probs.
    tokens = place if q.support is None else q.support.gather(-1, place).clamp(min=0)
    return rearrange(tokens, "b 1 -> b"), rearrange(q.logprobs.gather(-1, place), "b 1 -> b")


def draw_untruncated(
    logits: Tensor, temperature: float | Tensor, uniforms: Tensor, is_fused: bool
) -> tuple[Tensor, Tensor]:
    """`draw` of q = p over a large vocabulary, which is read once: a block, then a token in it.

    Sums are in float64 and so may the uniforms [B] be: in float32 most of the tail cannot be drawn.
    """
    norms = (fused(block_norms) if is_fused else block_norms)(logits, temperature)  # [B, n]
    total = torch.logsumexp(norms, dim=-1, keepdim=True)  # [B, 1]
    cdf = torch.exp((norms - total).double()).cumsum(dim=-1)
    shares = rearrange(uniforms.double(), "b -> b 1")
    chosen = _first_above(cdf, shares)  # [B, 1]
    before, after = F.pad(cdf, (1, 0)).gather(-1, chosen), cdf.gather(-1, chosen)
    inside = _blocks(logits).gather(1, repeat(chosen, "b 1 -> b 1 k", k=BLOCK))
    scaled = tempered(rearrange(inside, "b 1 k -> b k"), temperature)
    within = (shares * cdf[:, -1:] - before) / (after - before)  # what is left of the uniform
    place = _first_above(F.softmax(scaled.double(), dim=-1).cumsum(dim=-1), within)
    logq = scaled.gather(-1, place) - total
    tokens = (chosen * BLOCK + place).clamp(max=logits.shape[-1] - 1)  # beyond it only for NaN
    return rearrange(tokens, "b 1 -> b"), rearrange(logq, "b 1 -> b")


def block_norms(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """log sum exp(z / temperature) over each block of the vocabulary, [B, V / BLOCK]."""
    return torch.logsumexp(tempered(_blocks(logits), temperature), dim=-1)


def _first_above(cdf: Tensor, shares: Tensor) -> Tensor:
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
