"""Low-rank adapters: y = W x + b + (alpha / rank) B A x with W and b frozen (LoRA, 2106.09685).

B starts at 0, so that step 0 is the base model; switched off, the adapters leave the base, which
is GRPO's reference without a second copy of the weights. A model on disk is merged, W + (alpha /
rank) B A, and knows nothing of adapters. Targets have the names of transformers: q_proj, k_proj and
v_proj are ranges of rows of one fused matrix here, and each range has its own A and B.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigrpo.distributed import whole
from minigrpo.hugging_face import linear_parts
from minigrpo.transformer import Transformer


class AdaptedLinear(nn.Module):
    """A linear layer in place of the one it takes weight and bias from, under the same names."""

    def __init__(
        self,
        linear: nn.Linear,
        parts: dict[str, int],
        targets: set[str],
        rank: int,
        scale: float,
        generator: torch.Generator,
    ):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.sizes, self.scale, self.is_on = list(parts.values()), scale, True
        self.names = [name if name in targets else None for name in parts]
        self.lora_a, self.lora_b = nn.ParameterDict(), nn.ParameterDict()
        for name, size in parts.items():
            if name in targets:  # A uniform in +-1 / sqrt(in), as in the authors' own code
                start = linear.weight.new_empty(rank, linear.in_features)
                if not start.is_meta:  # where memory is estimated
                    start = torch.rand(start.shape, generator=generator) * 2 - 1
                    start = (start * linear.in_features**-0.5).to(linear.weight)
                self.lora_a[name] = nn.Parameter(start)
                self.lora_b[name] = nn.Parameter(linear.weight.new_zeros(size, rank))

    def forward(self, x: Tensor) -> Tensor:
        """W x + bias, and (alpha / rank) B A x in each part that has adapters, if they are on."""
        y = F.linear(x, self.weight, self.bias)
        if not self.is_on:
            return y
        pieces = [
            piece
            if name is None
            else piece + self.scale * F.linear(F.linear(x, self.lora_a[name]), self.lora_b[name])
            for name, piece in zip(self.names, torch.split(y, self.sizes, dim=-1), strict=True)
        ]
        return torch.cat(pieces, dim=-1)

    def merged(self) -> Tensor:
        """W + (alpha / rank) B A, rounded once whatever the precision of products; a new tensor."""
        pieces, rows = [], torch.split(whole(self.weight), self.sizes)
        for name, piece in zip(self.names, rows, strict=True):
            if name is not None:
                a, b = whole(self.lora_a[name]).double(), whole(self.lora_b[name]).double()
                piece = (piece + self.scale * (b @ a)).to(piece)
            pieces.append(piece)
        return torch.cat(pieces)


def add_adapters(
    model: Transformer, rank: int, alpha: float, targets: str, generator: torch.Generator
) -> None:
    """Freeze the model and give the target modules (q_proj,v_proj,...) adapters; not at rank 0."""
    if rank == 0:
        return
    wanted = set(targets.split(","))
    model.requires_grad_(False)
    for block in model.blocks:
        for path, theirs in linear_parts(model.config).items():
            parts = {name.rpartition(".")[2]: rows for name, rows in theirs.items()}
            if wanted.isdisjoint(parts):
                continue
            linear = block.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            layer = AdaptedLinear(linear, parts, wanted, rank, alpha / rank, generator)
            block.set_submodule(path, layer)


def adapters(model: Transformer) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name; none in a plain model."""
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


@contextmanager
def adapters_off(model: Transformer) -> Iterator[None]:
    """The base model, for a while; a plain model is its own base."""
    layers = [layer for layer in model.modules() if isinstance(layer, AdaptedLinear)]
    for layer in layers:
        layer.is_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.is_on = True


@torch.no_grad()
def merged_weights(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The weights of a plain model that computes the same, one by one; a plain model's own."""
    layers = dict(model.named_modules())
    for name, value in model.state_dict().items():
        layer = layers[name.rpartition(".")[0]]
        if isinstance(layer, AdaptedLinear) and name.endswith(".weight"):
            yield name, layer.merged()
        elif ".lora_" not in name:
            yield name, value
