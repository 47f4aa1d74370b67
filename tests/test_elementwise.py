"""Each formula against a slow one, each gradient against differences of the formula."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from minigrpo.elementwise import gated_silu, rms_norm, rotate


def numbers(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def rotation(num_tokens: int, size: int) -> tuple[Tensor, Tensor]:
    """cos and signed sin of an angle of each token and pair, [1, 1, Q, D]."""
    angles = numbers(1, 1, num_tokens, size // 2, seed=3)
    sin = torch.cat([-angles.sin(), angles.sin()], dim=-1)
    return torch.cat([angles, angles], dim=-1).cos(), sin


def test_rms_norm_is_the_formula_written_out() -> None:
    x, weight, eps = numbers(2, 3, 4), numbers(4, seed=1), 0.3
    got = rms_norm(x.clone().requires_grad_(), weight, eps).detach()
    for i, j, k in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        mean = sum(float(v) ** 2 for v in x[i, j]) / 4
        wanted = float(x[i, j, k]) / math.sqrt(mean + eps) * float(weight[k])
        assert float(got[i, j, k]) == pytest.approx(wanted, rel=1e-13)


def test_a_rotation_multiplies_pairs_as_complex_numbers() -> None:
    x, (cos, sin) = numbers(2, 3, 5, 8), rotation(5, 8)
    turn = torch.complex(cos, sin.abs() * sin.sign())[..., 4:]  # e^(i angle)
    wanted = torch.complex(x[..., :4], x[..., 4:]) * turn
    got = rotate(x.clone().requires_grad_(), cos, sin)
    assert torch.allclose(got, torch.cat([wanted.real, wanted.imag], dim=-1), atol=1e-14)


def test_the_first_half_is_the_gate() -> None:
    x = numbers(2, 3, 8)
    got = gated_silu(x.clone().requires_grad_()).detach()
    for i, j, k in torch.cartesian_prod(*map(torch.arange, (2, 3, 4))).tolist():
        gate, up = float(x[i, j, k]), float(x[i, j, k + 4])
        assert float(got[i, j, k]) == pytest.approx(gate / (1 + math.exp(-gate)) * up, rel=1e-13)


def test_gradients_are_the_differences_of_the_formulas() -> None:
    x, weight, (cos, sin) = numbers(2, 3, 5, 8), numbers(8, seed=1), rotation(5, 8)
    across = x.transpose(1, 2).contiguous().transpose(1, 2)  # as in a split of heads
    for value in (x.requires_grad_(), across.requires_grad_()):
        assert gradcheck(lambda a, b: rms_norm(a, b, 0.3), (value, weight.requires_grad_()))
        assert gradcheck(lambda a: rotate(a, cos, sin), (value,))
        assert gradcheck(gated_silu, (value,))
    assert gradcheck(lambda a: rms_norm(a, weight.detach(), 0.3), (x,))
    assert gradcheck(lambda b: rms_norm(x.detach(), b, 0.3), (weight,))


def test_a_second_derivative_is_refused() -> None:
    """What is written by hand is differentiated once."""
    weight, (cos, sin) = numbers(8, seed=1), rotation(5, 8)
    for function in (lambda a: rms_norm(a, weight, 0.3), lambda a: rotate(a, cos, sin), gated_silu):
        x = numbers(2, 3, 5, 8).requires_grad_()
        value = function(x).square().sum()
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            first.sum().backward()


@pytest.mark.parametrize(
    ("dtype", "of_weight"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_gradient_by_hand_is_that_of_autograd_and_keeps_the_dtype(
    dtype: torch.dtype, of_weight: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 as a head's norm sees it: narrow values, float32 weights, angles and arithmetic.

    And as all of a model in bfloat16 sees it.
    """
    cos, sin = (value.float() for value in rotation(5, 8))
    weight, found = numbers(8, seed=1).to(of_weight).requires_grad_(), []
    for is_by_hand in (True, False):  # the compiler is given the formulas alone
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda by_hand=is_by_hand: not by_hand)
        x = numbers(2, 3, 5, 8).to(dtype).requires_grad_()
        weight.grad = None
        outputs = [rms_norm(x, weight, 1e-6), rotate(x, cos, sin), gated_silu(x)]
        classes = ["_RMSNormBackward", "_RotationBackward", "_GatedSiluBackward"]
        for value, name in zip(outputs, classes, strict=True):
            assert (type(value.grad_fn).__name__ == name) == is_by_hand
        assert all(value.dtype == dtype for value in outputs)
        sum((value.float() * numbers(*value.shape, seed=9)).sum() for value in outputs).backward()
        assert x.grad is not None and x.grad.dtype == dtype
        assert weight.grad is not None and weight.grad.dtype == of_weight
        found.append([*outputs, x.grad, weight.grad])
    step = torch.finfo(dtype).eps
    for ours, plain in zip(*found, strict=True):
        assert torch.allclose(ours.float(), plain.float(), rtol=4 * step, atol=8 * step)


def test_a_norm_of_bfloat16_rounds_its_result_alone() -> None:
    x, weight = numbers(7, 61).bfloat16(), numbers(61, seed=1).bfloat16()
    wide = x.double()
    exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    with torch.no_grad():
        got = rms_norm(x, weight, 1e-6)
    assert got.dtype == torch.bfloat16 and torch.equal(got, exact.bfloat16())


def test_without_gradients_the_formulas_are_the_same() -> None:
    x, weight, (cos, sin) = numbers(2, 3, 5, 8), numbers(8, seed=1), rotation(5, 8)
    x.requires_grad_()
    of_training = rms_norm(x, weight, 0.3), rotate(x, cos, sin), gated_silu(x)
    with torch.no_grad():
        of_sampling = rms_norm(x, weight, 0.3), rotate(x, cos, sin), gated_silu(x)
    for one, other in zip(of_training, of_sampling, strict=True):
        assert torch.equal(one, other)
