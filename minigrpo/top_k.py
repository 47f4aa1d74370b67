"""The most probable tokens of a row, ties by id: `largest`, also of a large vocabulary on a GPU.

B rows, V vocabulary.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

# Tokens of a block of the vocabulary, where draws and top-p go over it in two levels.
BLOCK = 64
LARGE_VOCABULARY = 64 * BLOCK


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row, descending, equal ones by id, which topk leaves open."""
    if values.is_cuda or values.shape[1] > LARGE_VOCABULARY:
        return largest_by_blocks(values, count)
    best, ids = values.topk(min(count + 1, values.shape[1]), dim=-1)
    tied = (best[:, 1:] == best[:, :-1]).any(dim=-1)  # also looks one past the cap
    if tied.any():
        again, order = torch.sort(values[tied], dim=-1, descending=True, stable=True)
        best[tied], ids[tied] = again[:, : best.shape[1]], order[:, : best.shape[1]]
    return best[:, :count], ids[:, :count]


def largest_by_blocks(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The same without a look from the host, which a CUDA graph cannot wait for, and without a sort
    of whole rows, of which most have ties where logits are bfloat16 (CPU, 32 rows of 49,152: 9
    instead of 273 ms).

    The `count` blocks with the largest maxima hold the `count` best tokens: every other block has
    its best token below `count` others. So 8,192 values are sorted rather than 152,000.
    """
    blocks = in_blocks(values)
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


def in_blocks(logits: Tensor) -> Tensor:
    """[B, V] -> [B, V / BLOCK, BLOCK], filled up with -inf."""
    missing = -logits.shape[-1] % BLOCK
    filled = F.pad(logits, (0, missing), value=-torch.inf) if missing else logits
    return rearrange(filled, "b (n k) -> b n k", k=BLOCK)
