"""Batched decoding with a key-value cache: each prompt is prefilled once for its group.

A worked batch (tests/test_sampling.py holds it): P = 1, G = 3, C = 3, EOS = 1, pad = 0
    row 0   tokens [5 7 1]   mask [1 1 1]   ended True
    row 1   tokens [9 1 0]   mask [1 1 0]   ended True     EOS is inside the mask, pad is not
    row 2   tokens [5 7 7]   mask [1 1 1]   ended False    cut off
    support[1, 0] = [5 9 -1]: token 9 was drawn from two, its log-prob is log softmax over those two
Masks come from positions, never from token values, so pad may be EOS.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Annotated
from weakref import WeakKeyDictionary

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from minigrpo.policy import ActingPolicy, draw, nucleus, tempered
from minigrpo.shapes import check_record, check_shapes
from minigrpo.top_k import LARGE_VOCABULARY
from minigrpo.transformer import KVCache, Transformer, last_logits, product_dtype
from minigrpo.untruncated import draw_untruncated


@dataclass(frozen=True)
class Completions:
    """What was sampled, N = P * G rows, group-major: row p * G + g."""

    tokens: Annotated[Tensor, "N C"]  # int64, right-padded
    mask: Annotated[Tensor, "N C"]  # bool, True up to and including EOS
    support: Annotated[Tensor | None, "N C S"]  # int32, -1 is filler; None: the whole vocabulary
    sampling_logprobs: Annotated[Tensor, "N C"]  # the decoder's own log q, a metric only
    ended: Annotated[Tensor, "N"]  # bool, EOS was sampled
    kept_mass: Annotated[Tensor, "N C"]  # mass of p on the support
    is_capped: Annotated[Tensor, "N C"]  # bool, support_size cut the nucleus

    def __post_init__(self) -> None:
        check_record(self)


@dataclass(frozen=True)
class StopRule:
    """When a row ends and what fills it up afterwards."""

    eos_ids: tuple[int, ...]
    pad_id: int
    max_length: int


@torch.no_grad()
def sample_completions(
    model: Transformer,
    prompt_tokens: Tensor,
    prompt_mask: Tensor | None,
    group_size: int,
    acting: ActingPolicy,
    stop: StopRule,
    uniforms: Tensor | None,
    rows_per_batch: int = 512,
) -> Completions:
    """Draw `group_size` completions of at most `stop.max_length` tokens for each prompt [P, L].

    Prompts are left-padded; a mask of None: not at all. `uniforms` [N, max_length] in [0, 1) decide
    every draw (None: greedy), so equal ones give equal tokens however the rows are batched; C is
    the longest completion, or more on a GPU and where functions are compiled.
    Whole groups are decoded, at least one and else at most `rows_per_batch` rows at a time, which
    bounds the cache. All batches have equally many prompts, so that recorded graphs fit them all:
    the last may decode prompts of the one before again.
    """
    num_rows, length = len(prompt_tokens) * group_size, stop.max_length
    if uniforms is not None:
        check_shapes(uniforms=(uniforms, f"{num_rows} {length}"))
    num_batches = math.ceil(len(prompt_tokens) / max(1, rows_per_batch // group_size))
    size = math.ceil(len(prompt_tokens) / num_batches)
    if prompt_mask is not None and bool(prompt_mask.all()):
        prompt_mask = None
    batches = []
    for wanted in range(0, len(prompt_tokens), size):
        end = min(wanted + size, len(prompt_tokens))
        start = end - size
        tokens = prompt_tokens[start:end]
        mask = None if prompt_mask is None else prompt_mask[start:end]
        drawn = None if uniforms is None else uniforms[start * group_size : end * group_size]
        batch = _Batch(
            len(tokens), tokens.shape[1], group_size, replace(acting, temperature=1.0),
            acting.temperature != 1.0, stop, mask is not None, drawn is None, model.is_fused,
            product_dtype(model.embed.weight), tokens.device,
        )  # fmt: skip
        # Nobody keeps the decoder, so that its cache is gone before the next one is made.
        decoded = _decoder(model, batch).decode(model, tokens, mask, drawn, acting.temperature)
        batches.append([part[(wanted - start) * group_size :] for part in decoded])
    ended, *columns = (torch.cat(parts) for parts in zip(*batches, strict=True))
    longest = int(columns[0].sum(dim=1).max())
    if model.is_fused:  # functions are compiled for each shape
        longest = length
    elif prompt_tokens.is_cuda:  # cuDNN plans attention in bfloat16 for each: few shapes
        longest = min(length, math.ceil(longest / LENGTHS_ON_CUDA) * LENGTHS_ON_CUDA)
    mask, tokens, logprobs, kept_mass, is_capped, support = (x[:, :longest] for x in columns)
    if bool(logprobs.isnan().any()):
        raise FloatingPointError(
            "a log-prob is NaN: the model's weights or logits are not finite; in training lower "
            "learning_rate, then --resume, after deleting the newest checkpoint if it has them"
        )
    stored = None
    if acting.top_p < 1.0:
        widest = support.shape[2] if model.is_fused else int((support >= 0).sum(dim=-1).max())
        stored = support[:, :, :widest].contiguous()
    return Completions(tokens, mask, stored, logprobs, ended, kept_mass, is_capped)


@dataclass(frozen=True)
class _Batch:
    """What a recorded graph holds for: shapes and settings of rows that are decoded together."""

    num_prompts: int
    prompt_length: int
    group_size: int
    acting: ActingPolicy  # of logits that were divided by the temperature
    is_tempered: bool  # by one that is not 1, and may be another each time
    stop: StopRule
    is_padded: bool
    is_greedy: bool
    is_fused: bool
    dtype: torch.dtype  # of products, keys and values
    device: torch.device


@dataclass
class _Kept:
    """Of one model: copies of its weights by dtype and place and, on CUDA, its decoders."""

    seen: set[_Batch] = field(default_factory=set)
    decoders: dict[_Batch, _Decoder] = field(default_factory=dict)
    copies: dict[tuple[torch.dtype, torch.device], Transformer] = field(default_factory=dict)


LENGTHS_ON_CUDA = 32  # completions are as long as a multiple of it
MAX_DECODERS = 4  # training, greedy and sampled validation, one to spare
_KEPT: WeakKeyDictionary[Transformer, _Kept] = WeakKeyDictionary()


def _decoder(model: Transformer, batch: _Batch) -> _Decoder:
    """A new one, or, for a batch that comes again and again, one that has recorded its kernels.

    The first batch of its kind is not recorded: there may be no second.
    """
    kept = _KEPT.setdefault(model, _Kept())
    if batch not in kept.seen or not has_graphs(model, batch.device):
        kept.seen.add(batch)
        is_cast = batch.dtype != model.embed.weight.dtype and not _is_sharded(model)
        return _Decoder(_kept_copy(model, batch.dtype) if is_cast else model, batch)
    decoder = kept.decoders.pop(batch, None)
    if decoder is None:
        stream = None
        if len(kept.decoders) == MAX_DECODERS:
            # The one not used for longest goes and leaves its stream: of new ones, torch's 33rd is
            # its first again, which another decoder may still have (`_Decoder._replay`).
            stream = kept.decoders.pop(next(iter(kept.decoders))).stream
        decoder = _Decoder(_kept_copy(model, batch.dtype), batch, is_recorded=True)
        decoder.stream = stream
    kept.decoders[batch] = decoder
    return decoder


def has_graphs(model: Transformer, device: torch.device) -> bool:
    return device.type == "cuda" and not _is_sharded(model)


def _is_sharded(model: Transformer) -> bool:
    """Sharded parameters have an address of their own in every gathering: no graph reads them."""
    return any(isinstance(m, FSDPModule) for m in model.modules())


class _Decoder:
    """Rows in lock-step, `decode` by `decode`: the tensors that one batch fills column by column.

    Recorded, the kernels of a few tokens are a graph that is replayed: to launch them one by one
    takes the host several times as long as they run. A graph reads and writes fixed addresses, so
    the tensors stay for the next batch. Its weights, and under autocast those of any batch, are a
    copy in the precision of the products, which each batch renews.
    """

    TOKENS_PER_GRAPH = 16

    def __init__(self, model: Transformer, batch: _Batch, is_recorded: bool = False):
        self.model, self.batch, self.is_recorded = model, batch, is_recorded
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.stream: torch.cuda.Stream | None = None
        config, device, dtype = model.config, batch.device, batch.dtype
        rows, length = batch.num_prompts * batch.group_size, batch.stop.max_length
        in_all = batch.prompt_length + length
        self.once = KVCache(config, batch.num_prompts, batch.prompt_length, device, dtype)
        self.cache = KVCache(config, rows, in_all, device, dtype)
        self.temperature = torch.ones((), dtype=torch.float64, device=device)
        self.uniforms = torch.zeros(rows, length, dtype=torch.float64, device=device)
        self.seen = torch.ones(rows, in_all, dtype=torch.bool, device=device)
        self.eos = torch.tensor(batch.stop.eos_ids, device=device)
        # What stands where a row was not alive means nothing: `decode` leaves it out.
        self.tokens = torch.zeros(rows, length, dtype=torch.int64, device=device)  # [N, C]
        self.alive = torch.ones(rows, length + 1, dtype=torch.bool, device=device)
        self.logprobs = torch.zeros(rows, length, device=device)
        self.kept_mass = torch.ones(rows, length, device=device)
        self.is_capped = torch.zeros(rows, length, dtype=torch.bool, device=device)
        width = min(batch.acting.support_size, config.vocab_size)
        width = 1 if batch.acting.top_p == 1.0 else width
        self.support = torch.zeros(rows, length, width, dtype=torch.int32, device=device)
        # On padding the support is the pad token alone: a log-prob of 0, whoever computes it.
        self.filler = torch.full((width,), -1, dtype=torch.int32, device=device)
        self.filler[0] = batch.stop.pad_id

    def decode(
        self,
        model: Transformer,
        prompt_tokens: Tensor,
        prompt_mask: Tensor | None,
        uniforms: Tensor | None,
        temperature: float,
    ) -> tuple[Tensor, ...]:
        """Until all rows have ended: ended [N] and, [N, C] each, mask, tokens and what is known of
        them; new tensors, filled up outside of the mask.
        """
        if self.model is not model:
            _renew(self.model, model)
            self.model.is_fused = self.batch.is_fused
        self.alive[:, 1:] = False
        self.temperature.fill_(temperature)
        if uniforms is not None:
            self.uniforms.copy_(uniforms)
        if prompt_mask is not None:
            mask = repeat(prompt_mask, "p l -> (p g) l", g=self.batch.group_size)
            self.seen[:, : self.batch.prompt_length] = mask
        self.once.length = 0
        logits = self.model(prompt_tokens, prompt_mask, self.once, last_logits)  # [P, V]
        self.cache.fill_from(self.once, self.batch.group_size)
        self._write(repeat(logits, "p v -> (p g) v", g=self.batch.group_size), 0)
        length = self.batch.stop.max_length
        stride = self.TOKENS_PER_GRAPH if self.is_recorded else 1
        advance = self._replay if self.is_recorded else self._advance
        for first in range(1, length, stride):
            if not bool(self.alive[:, first].any()):
                break
            advance(range(first, min(first + stride, length)))
        mask = self.alive[:, :-1].clone()
        return (
            ~self.alive[:, -1],
            mask,
            torch.where(mask, self.tokens, self.batch.stop.pad_id),
            torch.where(mask, self.logprobs, 0.0),
            torch.where(mask, self.kept_mass, 1.0),
            self.is_capped & mask,
            torch.where(rearrange(mask, "n c -> n c 1"), self.support, self.filler),
        )

    def _advance(self, steps: range) -> None:
        for step in steps:
            self.cache.length = end = self.batch.prompt_length + step - 1
            mask = self.seen[:, : end + 1] if self.batch.is_padded else None
            last = self.tokens[:, step - 1 : step]
            self._write(self.model(last, mask, self.cache, last_logits), step)

    def _write(self, logits: Tensor, step: int) -> None:
        """Draw column `step` of every row."""
        uniforms = None if self.batch.is_greedy else self.uniforms[:, step]
        acting = self.batch.acting
        temperature = self.temperature if self.batch.is_tempered else 1.0
        if acting.top_p == 1.0 and uniforms is not None and logits.shape[1] > LARGE_VOCABULARY:
            drawn, logq = draw_untruncated(logits, temperature, uniforms, self.model.is_fused)
        else:
            q = nucleus(tempered(logits, temperature), acting)
            drawn, logq = draw(q, uniforms)
            self.kept_mass[:, step], self.is_capped[:, step] = q.kept_mass, q.is_capped
            if q.support is not None:
                self.support[:, step] = q.support
        self.tokens[:, step], self.logprobs[:, step] = drawn, logq
        self.alive[:, step + 1] = self.alive[:, step] & ~torch.isin(drawn, self.eos)

    def _replay(self, steps: range) -> None:
        if steps[0] not in self.graphs:
            # Kernels are chosen and compiled outside of a recording: cuDNN's attention, which torch
            # prefers on an H100, plans every length anew. What is written here is written again.
            self._advance(steps)
            pool = next(iter(self.graphs.values())).pool() if self.graphs else None
            # A stream of its own: with the graphs of a decoder that goes, torch from 2.12 on frees
            # what cuBLAS keeps for their stream, which graphs of another decoder would still use.
            self.stream = self.stream or torch.cuda.Stream(self.batch.device)  # type: ignore[no-untyped-call]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=self.stream):
                self._advance(steps)
            self.graphs[steps[0]] = graph
        self.graphs[steps[0]].replay()


def _kept_copy(model: Transformer, dtype: torch.dtype) -> Transformer:
    copies, kind = _KEPT.setdefault(model, _Kept()).copies, (dtype, model.embed.weight.device)
    if kind not in copies:
        copies[kind] = _copy_for_decoding(model, dtype)
    return copies[kind]


def _copy_for_decoding(model: Transformer, dtype: torch.dtype) -> Transformer:
    """A copy whose linear layers have the dtype that autocast would give them anew for every token.

    All else stays as it is: what is added, normed or looked up is not rounded in training either.
    """
    parameters = {}
    for name, own in model.named_parameters():
        is_linear = not name.startswith("embed") and (own.ndim == 2 or name.endswith("bias"))
        value = own.detach().to(dtype if is_linear else own.dtype, copy=True)
        parameters[id(own)] = nn.Parameter(value, requires_grad=False)
    copied = deepcopy(model, parameters)  # these in place of copies of the originals
    if copied.head is None and copied.embed.weight.dtype != dtype:
        vocab_size, width = copied.embed.weight.shape
        copied.head = nn.Linear(width, vocab_size, bias=False, device="meta")
        copied.head.weight = nn.Parameter(copied.embed.weight.to(dtype), requires_grad=False)
    return copied


@torch.no_grad()
def _renew(copied: Transformer, model: Transformer) -> None:
    """Give the copy the model's weights of now; a tied head that it has apart is the embedding."""
    own = dict(model.named_parameters())
    pairs = [(to, own.get(name, model.embed.weight)) for name, to in copied.named_parameters()]
    for dtype in {to.dtype for to, _ in pairs}:  # mixed ones would be copied one by one
        targets, sources = zip(*(pair for pair in pairs if pair[0].dtype == dtype), strict=True)
        torch._foreach_copy_(targets, sources)
