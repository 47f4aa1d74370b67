"""Batched decoding with a key-value cache: each prompt is prefilled once for its group.

A worked batch (tests/test_sampling.py holds it): P = 1, G = 3, C = 3, EOS = 1, pad = 0
    row 0   tokens [5 7 1]   mask [1 1 1]   ended True
    row 1   tokens [9 1 0]   mask [1 1 0]   ended True     EOS is inside the mask, pad is not
    row 2   tokens [5 7 7]   mask [1 1 1]   ended False    cut off
    support[1, 0] = [5 9 -1]: token 9 was drawn from two, its log-prob is log softmax over those two
Masks come from positions, never from token values, so pad may be EOS.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from minigrpo.policy import LARGE_VOCABULARY, ActingPolicy, draw, draw_untruncated, nucleus
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
    is_padded = not bool(prompt_mask.all())
    batches = []
    for start in range(0, len(prompt_tokens), per_batch):
        end = start + per_batch
        tokens, mask = prompt_tokens[start:end], prompt_mask[start:end]
        drawn = None if uniforms is None else uniforms[start * group_size : end * group_size]
        decoder = _decoder(model, tokens, group_size, acting, stop, is_padded, drawn is None)
        batches.append(decoder.decode(model, tokens, mask, drawn))
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


# Of each model, on CUDA: recorded graphs by the shapes and settings that they hold for. Training
# and the two validations use three or four; more, as with final_temperature, push out the oldest.
MAX_DECODERS = 4
_DECODERS: WeakKeyDictionary[Transformer, dict[tuple[object, ...], _Decoder]] = WeakKeyDictionary()


def _decoder(
    model: Transformer,
    prompt_tokens: Tensor,
    group_size: int,
    acting: ActingPolicy,
    stop: StopRule,
    is_padded: bool,
    is_greedy: bool,
) -> _Decoder:
    device, weight = prompt_tokens.device, model.embed.weight
    is_mixed = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if is_mixed else weight.dtype
    num_prompts, length = prompt_tokens.shape
    key = (num_prompts, length, group_size, acting, stop, is_padded, is_greedy, dtype, device)
    kept = _DECODERS.setdefault(model, {})
    if key not in kept:
        decoder = _Decoder(model, *key)
        if not decoder.has_graphs:
            return decoder
        if len(kept) == MAX_DECODERS:
            del kept[next(iter(kept))]
        kept[key] = decoder
    return kept[key]


class _Decoder:
    """Rows in lock-step, `decode` by `decode`: the tensors that one batch fills column by column.

    On CUDA the kernels of a few tokens are recorded once as a graph and then replayed: to launch
    them one by one takes the host several times as long as they run. A graph reads and writes
    fixed addresses, so it has a copy of the weights, in the precision of its products, which each
    batch renews, and the tensors stay for the next batch of the same shape.
    """

    TOKENS_PER_GRAPH = 16

    def __init__(
        self,
        model: Transformer,
        num_prompts: int,
        prompt_length: int,
        group_size: int,
        acting: ActingPolicy,
        stop: StopRule,
        is_padded: bool,
        is_greedy: bool,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.has_graphs = has_graphs(model, device)
        self.model = _copy_for_decoding(model, dtype) if self.has_graphs else model
        self.group_size, self.acting, self.stop, self.is_padded = (
            group_size, acting, stop, is_padded
        )  # fmt: skip
        self.prompt_length, self.graphs = prompt_length, dict[int, torch.cuda.CUDAGraph]()
        rows, length = num_prompts * group_size, stop.max_length
        self.once = KVCache(model.config, num_prompts, prompt_length, device, dtype)
        self.cache = KVCache(model.config, rows, prompt_length + length, device, dtype)
        self.uniforms = None if is_greedy else torch.zeros(rows, length, device=device).double()
        self.seen = torch.ones(rows, prompt_length + length, dtype=torch.bool, device=device)
        self.eos = torch.tensor(stop.eos_ids, device=device)
        self.tokens = torch.full((rows, length), stop.pad_id, device=device)  # [N, C]
        self.alive = torch.ones(rows, length + 1, dtype=torch.bool, device=device)
        self.logprobs = torch.zeros(rows, length, device=device)
        self.kept_mass = torch.ones(rows, length, device=device)
        self.is_capped = torch.zeros(rows, length, dtype=torch.bool, device=device)
        width = 1 if acting.top_p == 1.0 else min(acting.support_size, model.config.vocab_size)
        self.support = torch.full((rows, length, width), -1, dtype=torch.int32, device=device)

    def decode(
        self,
        model: Transformer,
        prompt_tokens: Tensor,
        prompt_mask: Tensor,
        uniforms: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Until all rows have ended; columns never reached keep filler."""
        if self.has_graphs:
            _renew(self.model, model)
        for values, filler in (
            (self.tokens, self.stop.pad_id), (self.alive[:, 1:], False), (self.logprobs, 0),
            (self.kept_mass, 1), (self.is_capped, False), (self.support, -1),
        ):  # fmt: skip
            values.fill_(filler)
        if self.uniforms is not None and uniforms is not None:
            self.uniforms.copy_(uniforms)
        mask = repeat(prompt_mask, "p l -> (p g) l", g=self.group_size)
        self.seen[:, : self.prompt_length] = mask
        self.once.length = 0
        logits = self.model(
            prompt_tokens, prompt_mask if self.is_padded else None, self.once, last_logits
        )  # [P, V]
        self.cache.fill_from(self.once, self.group_size)
        self._write(repeat(logits, "p v -> (p g) v", g=self.group_size), 0)
        stride = self.TOKENS_PER_GRAPH if self.has_graphs else 1
        for first in range(1, self.stop.max_length, stride):
            if not bool(self.alive[:, first].any()):
                break
            steps = range(first, min(first + stride, self.stop.max_length))
            if self.has_graphs:
                self._replay(steps)
            else:
                self._advance(steps)
        found = (self.tokens, self.alive[:, :-1], self.logprobs, self.kept_mass, self.is_capped)
        # The next batch writes into these again.
        return *(value.clone() for value in found), ~self.alive[:, -1], self.support.clone()

    def _advance(self, steps: range) -> None:
        for step in steps:
            self.cache.length = end = self.prompt_length + step - 1
            mask = self.seen[:, : end + 1] if self.is_padded else None
            last = self.tokens[:, step - 1 : step]
            self._write(self.model(last, mask, self.cache, last_logits), step)

    def _write(self, logits: Tensor, step: int) -> None:
        """Draw column `step` of every row that is alive."""
        uniforms = None if self.uniforms is None else self.uniforms[:, step]
        now, acting = self.alive[:, step], self.acting
        if acting.top_p == 1.0 and uniforms is not None and logits.shape[1] > LARGE_VOCABULARY:
            is_fused = self.model.is_fused
            drawn, logq = draw_untruncated(logits, acting.temperature, uniforms, is_fused)
        else:
            q = nucleus(logits, acting)
            drawn, logq = draw(q, uniforms)
            self.kept_mass[:, step] = torch.where(now, q.kept_mass, 1.0)
            self.is_capped[:, step] = q.is_capped & now
            if q.support is not None:
                support = q.support.int()
                self.support[:, step] = torch.where(rearrange(now, "n -> n 1"), support, -1)
        self.tokens[:, step] = torch.where(now, drawn, self.stop.pad_id)
        self.logprobs[:, step] = torch.where(now, logq, 0.0)
        self.alive[:, step + 1] = now & ~torch.isin(drawn, self.eos)

    def _replay(self, steps: range) -> None:
        if steps[0] not in self.graphs:
            if not self.graphs:
                self._advance(steps)  # kernels are chosen and compiled outside of a recording
            pool = next(iter(self.graphs.values())).pool() if self.graphs else None
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._advance(steps)
            self.graphs[steps[0]] = graph
        self.graphs[steps[0]].replay()


def has_graphs(model: Transformer, device: torch.device) -> bool:
    """Sharded parameters change their address with every gathering, so no graph can read them."""
    return device.type == "cuda" and not any(isinstance(m, FSDPModule) for m in model.modules())


def _copy_for_decoding(model: Transformer, dtype: torch.dtype) -> Transformer:
    """A copy whose linear layers have the dtype that autocast would give them anew for every token.

    All else stays as it is: what is added, normed or looked up is not rounded in training either.
    """
    copied = deepcopy(model).requires_grad_(False)
    if copied.head is None and copied.embed.weight.dtype != dtype:
        vocab_size, width = copied.embed.weight.shape
        copied.head = nn.Linear(width, vocab_size, bias=False, device="meta")
        copied.head.weight = nn.Parameter(copied.embed.weight.clone(), requires_grad=False)
    for name, parameter in copied.named_parameters():
        if not name.startswith("embed") and (parameter.ndim == 2 or name.endswith("bias")):
            parameter.data = parameter.data.to(dtype)
    return copied


@torch.no_grad()
def _renew(copied: Transformer, model: Transformer) -> None:
    """Give the copy the model's weights of now; a tied head that it has apart is the embedding."""
    own = dict(model.named_parameters())
    targets = dict(copied.named_parameters())
    sources = [own.get(name, model.embed.weight) for name in targets]
    torch._foreach_copy_(list(targets.values()), sources)
