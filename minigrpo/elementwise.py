"""RMSNorm, rotary positions and SwiGLU's product, each with its gradient by hand.

On a CPU a tiny model spends as long on passes over memory as on matrix products. The formulas are
the plain ones; by hand their gradients take half the passes of autograd's, and keep less for them.
Where the compiler fuses operations (`transformer.fused`) it differentiates the formulas itself.

E numbers of a token, B rows, H heads, Q tokens, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, float32 inside (1910.07467)."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _normed(x, weight, eps)[0]
    out: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (2104.09864): the pair (x_i, x_{i + D/2}) turns by an angle of its token.

    x_i cos - x_{i + D/2} sin,  x_{i + D/2} cos + x_i sin:  x [B, H, Q, D], cos and sin
    [B or 1, 1, Q, D], the minus of the first half in `sin`.
    """
    if torch.compiler.is_compiling():  # which makes of halves written in place a clumsier kernel
        return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)
    if not torch.is_grad_enabled():
        return _turned(x, cos, sin)
    out: Tensor = _Rotation.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return out


def gated_silu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the halves of the last dimension (2002.05202)."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _gated(gate_up)
    out: Tensor = _GatedSilu.apply(gate_up)  # type: ignore[no-untyped-call]
    return out


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype), scale


class _RMSNorm(torch.autograd.Function):
    """y = n w with n = x r and r = 1 / sqrt(mean(x^2) + eps); g = dL/dy.

    dL/dw = sum over tokens of g n        dL/dx = r (g w - n mean(g n w))
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scale = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        g, n = _wide(gradient), _wide(x) * scale
        products = (g * n).flatten(0, -2)  # [tokens, E]
        mean = torch.mv(products, weight.to(g.dtype)).div_(x.shape[-1]).view(scale.shape)
        of_x = (g * weight).addcmul_(n, mean, value=-1).mul_(scale)
        of_weight = products.sum(dim=0) if ctx.needs_input_grad[1] else None
        return of_x.to(x.dtype), of_weight, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half])
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out.to(x.dtype)


class _Rotation(torch.autograd.Function):
    """A rotation's gradient is that of the output turned back, by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, -sin), None, None


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _GatedSilu(torch.autograd.Function):
    """y = silu(a) b, a and b halves of one tensor, as is the gradient: no copy joins its halves.

    dL/da = g b silu'(a)        dL/db = g silu(a)        silu(a) is made again, not kept
    """

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _gated(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        of_gate, of_up = out.chunk(2, dim=-1)
        torch.mul(gradient, F.silu(gate), out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return out
