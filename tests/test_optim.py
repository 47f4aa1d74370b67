"""Parameter groups, decay and schedule against the update rule of AdamW and values by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from minigrpo.optim import (
    adamw,
    apply_gradient,
    cosine_learning_rate,
    has_converged,
    linear,
    plateau_factor,
    set_learning_rate,
    smooth_gradients,
)
from minigrpo.transformer import Transformer, TransformerConfig


class Model(nn.Module):
    """A tied head, a norm, biases and something frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.norm = nn.LayerNorm(5)
        self.middle = nn.Linear(5, 5)
        self.frozen = nn.Linear(5, 3).requires_grad_(False)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def set_gradients(model: nn.Module, value: float) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, value)


def test_each_trained_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    model = Model()
    groups = adamw(model, 1e-3, (0.9, 0.99), 0.1, 7.0).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [
        (g["weight_decay"], g.get("rate"), [names[id(p)] for p in g["params"]]) for g in groups
    ]
    assert found == [
        (0.1, None, ["embedding.weight", "middle.weight"]),
        (0.0, None, ["norm.bias", "middle.bias"]),
        (0.0, 7.0, ["norm.weight"]),
    ]
    assert all(g["betas"] == (0.9, 0.99) and g["lr"] == 1e-3 for g in groups)


def test_each_group_steps_at_its_own_multiple_of_the_rate() -> None:
    model = Model()
    before = parameters(model)
    optimizer = adamw(model, 123.0, (0.9, 0.99), 0.0, 7.0)
    set_learning_rate(optimizer, 1e-3)
    set_gradients(model, 2.5)
    optimizer.step()  # the first step of Adam is the rate, whatever the gradient
    for name, value in parameters(model).items():
        moved = {"norm.weight": 7e-3}.get(name, 0.0 if name.startswith("frozen") else 1e-3)
        torch.testing.assert_close(value, before[name] - moved, rtol=1e-5, atol=1e-6)


def test_without_gradient_only_decay_moves_and_only_matrices() -> None:
    model = Model()
    before = parameters(model)
    optimizer = adamw(model, 0.5, (0.9, 0.99), 0.1)
    set_gradients(model, 0.0)
    optimizer.step()
    for name, value in parameters(model).items():
        decays = name in ("embedding.weight", "middle.weight")
        expected = before[name] * (1 - 0.5 * 0.1 if decays else 1.0)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)  # one float32 product


def test_with_gradient_moments_and_decay_0_nothing_moves() -> None:
    model = Model()
    before = parameters(model)
    optimizer = adamw(model, 1.0, (0.9, 0.95), 0.0)
    for _ in range(3):
        set_gradients(model, 0.0)
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in parameters(model).items())


def test_two_steps_follow_the_update_rule() -> None:
    """Loshchilov & Hutter, 1711.05101, algorithm 2, with torch's epsilon of 1e-8."""
    rate, beta1, beta2, decay = 0.01, 0.8, 0.95, 0.3
    model = Model().double()
    expected = {name: value.clone() for name, value in parameters(model).items()}
    optimizer = adamw(model, rate, (beta1, beta2), decay)
    first = second = 0.0
    for step, gradient in enumerate([0.5, -2.0], start=1):
        set_gradients(model, gradient)
        optimizer.step()
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        moved = first / (1 - beta1**step) / (math.sqrt(second / (1 - beta2**step)) + 1e-8)
        for name, value in expected.items():
            if not name.startswith("frozen"):
                shrink = decay if value.ndim == 2 else 0.0
                expected[name] = value - rate * shrink * value - rate * moved
    for name, value in parameters(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


def test_a_learning_rate_of_one_millionth_moves_float32_weights_in_one_step() -> None:
    model = Model()
    before = parameters(model)
    optimizer = adamw(model, 1e-6, (0.9, 0.99), 0.0)
    set_gradients(model, 0.3)
    optimizer.step()
    moved = parameters(model)["middle.weight"] != before["middle.weight"]
    assert moved.all()


def test_schedule_values_by_hand() -> None:
    warmup = [cosine_learning_rate(step, 14, 8.0, 4) for step in range(4)]
    assert warmup == [2.0, 4.0, 6.0, 8.0]
    # Ten steps of half a cosine after the warm-up: 0, 5 and 10 tenths of the way.
    for step, expected in (4, 8.0), (9, 4.0), (14, 0.0), (99, 0.0):
        assert cosine_learning_rate(step, 14, 8.0, 4) == pytest.approx(expected, abs=1e-12)
    third = 8.0 * (1 + math.sqrt(3) / 2) / 2  # cos 30 degrees at a sixth of the way
    assert cosine_learning_rate(2, 12, 8.0, 0) == pytest.approx(third, abs=1e-12)


def test_schedule_holds_its_peak_until_the_last_steps_begin() -> None:
    rates = [cosine_learning_rate(step, 12, 8.0, 2, 6) for step in range(14)]
    assert rates[:7] == [4.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0]
    assert rates[9] == pytest.approx(4.0, abs=1e-12)  # half of the way down
    assert rates[7] == pytest.approx(8.0 * (1 + math.sqrt(3) / 2) / 2, abs=1e-12)
    assert rates[12:] == pytest.approx([0.0, 0.0], abs=1e-12)
    plain = [cosine_learning_rate(step, 12, 8.0, 2) for step in range(14)]
    for as_long_as_there_is in (10, 11, 1000):
        got = [cosine_learning_rate(step, 12, 8.0, 2, as_long_as_there_is) for step in range(14)]
        assert got == plain


def test_schedule_never_updates_at_0() -> None:
    assert all(cosine_learning_rate(step, 13, 3.0, 0) > 0 for step in range(13))
    assert all(cosine_learning_rate(step, 13, 3.0, 0, 4) > 0 for step in range(13))


def test_schedule_without_steps_after_the_warm_up_is_defined() -> None:
    assert [cosine_learning_rate(step, 2, 1.0, 2) for step in range(3)] == [0.5, 1.0, 1.0]
    assert cosine_learning_rate(0, 1, 1.0, 0) == 1.0
    assert cosine_learning_rate(1, 1, 1.0, 0) == cosine_learning_rate(3, 2, 1.0, 2) == 0.0


def test_a_line_goes_from_end_to_end_and_stays_there() -> None:
    values = [linear(step, 4, 2.0, 1.0) for step in range(7)]
    assert values == [2.0, 1.75, 1.5, 1.25, 1.0, 1.0, 1.0]
    assert linear(0, 0, 2.0, 1.0) == 1.0  # the only step is the last


def test_a_plateau_halves_the_rate_once() -> None:
    rising, flat = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 3.0, 2.0, 2.0, 9.0]
    assert plateau_factor(rising, 2) == 1.0
    assert plateau_factor([], 2) == plateau_factor(flat[:3], 2) == 1.0  # no second window yet
    assert plateau_factor(flat, 2) == 0.5  # means 2 and 2; the fifth is in no window
    assert plateau_factor([*flat, 9.0], 2) == 0.5  # 2, 2, 9
    assert plateau_factor(rising[::-1], 1) == 0.5**5
    assert plateau_factor(rising[::-1], 0) == 1.0
    assert plateau_factor([8.0, 8.0, 0.0, 0.0, 2.0, 2.0], 2) == 0.5  # above the window before alone


def test_a_run_has_converged_when_its_best_is_old() -> None:
    scores = [1.0, 5.0, 4.0, 5.0, 3.0]
    found = [has_converged(scores[:n], 2) for n in range(6)]
    assert found == [False, False, False, False, True, True]  # an equal one is no new best
    assert not has_converged(scores, 0) and not has_converged([*scores, 6.0], 2)
    assert not has_converged([], 1) and has_converged([2.0, 2.0], 1)


def test_a_long_gradient_is_scaled_by_its_limit_over_norm_plus_1e_6() -> None:
    """Looked at where the 1e-6 counts, and a short gradient stays."""
    for limit, factor in (2e-6, 0.5), (5e-6, 1.0):
        model = Transformer(TransformerConfig("llama", 9, 6, 5, 1, 1, 1, 6))
        weight, before = model.norm.weight, parameters(model)
        weight.grad = torch.tensor([1e-6, 2e-6, -2e-6, 0.0, 0.0, 0.0])
        norm = apply_gradient(model, torch.optim.SGD(model.parameters(), lr=1e5), limit, None)
        assert norm == pytest.approx(3e-6)
        moved = torch.tensor([0.1, 0.2, -0.2, 0.0, 0.0, 0.0]) * factor
        for name, value in parameters(model).items():
            expected = before[name] - moved if name == "norm.weight" else before[name]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("is_tied", [False, True])
def test_gradients_of_tables_are_smoothed_once_and_others_not_at_all(is_tied: bool) -> None:
    model = Transformer(TransformerConfig("llama", 9, 6, 5, 1, 1, 1, 6, tied_head=is_tied))
    generator = torch.Generator().manual_seed(0)
    given = {}
    for name, parameter in model.named_parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        given[name] = parameter.grad.clone()
    kernel = torch.rand(9, 9, generator=generator)
    smooth_gradients(model, None)
    assert all(torch.equal(p.grad, given[name]) for name, p in model.named_parameters())
    smooth_gradients(model, kernel)
    tables = {"embed.weight"} if is_tied else {"embed.weight", "head.weight"}
    for name, parameter in model.named_parameters():
        wanted = given[name]
        if name in tables:
            wanted = torch.einsum("vw,we->ve", kernel, wanted)
        assert torch.allclose(parameter.grad, wanted), name
    wide = model.double().embed.weight  # whose gradients the kernel of float32 smooths as well
    wide.grad = given["embed.weight"].double()
    smooth_gradients(model, kernel)
    assert torch.equal(wide.grad, kernel.double() @ given["embed.weight"].double())
    model.embed.weight.grad = None  # frozen, as under adapters
    smooth_gradients(model, kernel)
    assert model.embed.weight.grad is None
