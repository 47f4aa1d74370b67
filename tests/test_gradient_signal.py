"""The measurement against gradients whose signal and noise are known."""

import math
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_update import CONFIG, a_model, a_rollout, gradient_by, weights_of
from tiny import untrained_checkpoint
from torch import Tensor
from watch import Watch

import train_grpo
from minigrpo import gradient_signal as signal_module
from minigrpo.gradient_signal import gradient_signal, pair_mean, rollout_gradient, signal_table

COMPLETIONS = 37


def made_up(num: int, signal: float, seed: int) -> tuple[Tensor, float, float]:
    """Gradients [num, 1009] of rollouts, |g|^2, and the trace of one completion's covariance.

    Entries have unlike variances, and there is a common direction of length `signal`.
    """
    generator = torch.Generator().manual_seed(seed)
    std = torch.linspace(0.1, 3.0, 1009, dtype=torch.float64)
    truth = torch.randn(1009, generator=generator, dtype=torch.float64)
    truth *= signal / truth.norm()
    noise = torch.randn(num, 1009, generator=generator, dtype=torch.float64) * std
    trace = COMPLETIONS * float(std.square().sum())
    return (truth + noise).float(), signal**2, trace


@pytest.mark.parametrize(
    "signal, too_large", [(0.0, 1.38), (12.0, 1.27), (60.0, 1.0), (200.0, 0.95)]
)
def test_known_signal_and_noise_are_found(signal: float, too_large: float) -> None:
    """Over 120 repeats: no bias, and 95 % lie within two errors.

    The error is the spread, but 1.4 times that where pairs are all there is: there the jackknife
    counts twice what two rollouts do together.

    The cosine is about |g|^2 / (|g|^2 + trace / n); 1 % of it is left for "about".
    """
    found, num = [], 11
    for seed in range(120):
        gradients, squared, trace = made_up(num, signal, seed)
        found.append(gradient_signal(gradients, COMPLETIONS))
    expected = squared / (squared + trace / COMPLETIONS)
    cosines = torch.tensor([one.cosine for one in found])
    errors = torch.tensor([one.standard_error for one in found])
    spread = float(cosines.std())
    assert abs(float(cosines.mean()) - expected) < 4 * spread / math.sqrt(120) + 0.01 * expected
    assert float(errors.mean()) == pytest.approx(too_large * spread, rel=0.15)
    assert ((cosines - expected).abs() < 2 * errors).float().mean() > 0.88
    norms = torch.tensor([one.squared_norm for one in found])
    assert abs(float(norms.mean()) - squared) < 4 * float(norms.std()) / math.sqrt(120)
    traces = torch.tensor([one.trace for one in found])
    assert float(traces.mean()) == pytest.approx(trace, rel=0.02)
    if signal == 0.0:
        needed = [one.completions_needed for one in found]
        assert 36 < sum(math.isinf(value) for value in needed) < 84  # half of the time
    if signal == 60.0:
        needed = torch.tensor([one.completions_needed for one in found])
        n = float(needed.median())  # so many completions have a cosine of 0.7 with the truth
        assert math.sqrt(squared / (squared + trace / n)) == pytest.approx(0.7, rel=0.02)


def test_equal_gradients_have_cosine_1_and_no_noise() -> None:
    one = torch.randn(1, 503, generator=torch.Generator().manual_seed(3))
    signal = gradient_signal(one.expand(5, -1), COMPLETIONS)
    assert signal.cosine == pytest.approx(1, abs=1e-12)
    assert signal.standard_error < 1e-12 and signal.completions_needed < 1e-9
    assert signal.squared_norm == pytest.approx(float(one.double().square().sum()), rel=1e-12)
    assert (signal.num_rollouts, signal.num_completions) == (5, COMPLETIONS)


def test_the_unit_of_the_reward_changes_neither_cosine_nor_completions() -> None:
    gradients, *_ = made_up(5, 60.0, seed=1)
    signal, small = (gradient_signal(g, COMPLETIONS) for g in (gradients, gradients / 1024))
    assert 0 < small.squared_norm < 1e-2 and small.completions_needed < math.inf
    for name in ("cosine", "standard_error", "completions_needed"):
        assert getattr(small, name) == pytest.approx(getattr(signal, name), rel=1e-9), name


def test_a_gradient_that_is_not_finite_is_seen_in_every_number() -> None:
    gradients, *_ = made_up(5, 60.0, seed=1)
    gradients[2, 3] = math.nan
    signal = gradient_signal(gradients, COMPLETIONS)
    assert all(map(math.isnan, (signal.cosine, signal.squared_norm, signal.trace)))
    assert math.isinf(signal.completions_needed)


def test_gradients_of_zero_have_no_signal() -> None:
    """Every group may have had equal rewards."""
    signal = gradient_signal(torch.zeros(4, 7), COMPLETIONS)
    assert signal.cosine == 0 and signal.trace == 0 and signal.completions_needed == math.inf


def test_the_jackknife_is_that_of_a_slow_loop() -> None:
    raw = torch.randn(7, 7, generator=torch.Generator().manual_seed(4)).double()
    matrix, k = raw + raw.T, 7

    def mean(kept: list[int]) -> float:
        pairs = [float(matrix[i, j]) for i in kept for j in kept if i < j]
        return sum(pairs) / len(pairs)

    without = [mean([i for i in range(k) if i != left_out]) for left_out in range(k)]
    centre = sum(without) / k
    error = math.sqrt((k - 1) / k * sum((value - centre) ** 2 for value in without))
    assert pair_mean(matrix) == pytest.approx((mean(list(range(k))), error), rel=1e-12)


def test_a_wide_gradient_is_taken_in_pieces() -> None:
    """So that float64, in which sums keep their third digit, takes no more than 2 copies of one."""
    wide = torch.ones(3, 2**21 + 5) * 1e-3
    wide[1] *= -1
    with Watch(wide) as watch:
        signal = gradient_signal(wide, 1)
    assert signal.cosine == pytest.approx(-1 / 3, abs=1e-12)
    assert signal.squared_norm == pytest.approx(-1e-6 * (2**21 + 5) / 3, rel=1e-6)
    assert watch.peak <= 2 * 3 * 2**20 * 8 + 1000


def test_a_rollouts_gradient_is_that_of_all_its_rows() -> None:
    rollout, config = a_rollout(), replace(CONFIG, num_minibatches=1)
    model = a_model().double()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # of somebody before
    first = rollout_gradient(model, rollout, config)
    assert torch.equal(rollout_gradient(model, rollout, config), first)  # adds to nothing
    assert first.dtype == torch.float32
    assert torch.allclose(first, gradient_by(rollout, config).float(), rtol=1e-6, atol=1e-12)
    assert torch.equal(weights_of(model), weights_of(a_model().double()))
    assert all(parameter.grad is None for parameter in model.parameters())
    model.norm.weight.requires_grad_(False)  # as all is below adapters
    trained = torch.cat([torch.full((p.numel(),), p.requires_grad) for p in model.parameters()])
    assert torch.allclose(rollout_gradient(model, rollout, config), first[trained], rtol=1e-6)


def test_the_command_measures_fresh_rollouts_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At fixed weights, whatever the number of minibatches: one gradient for each rollout."""
    monkeypatch.chdir(tmp_path)
    untrained_checkpoint(tmp_path / "sft")
    before = sorted(path for path in tmp_path.rglob("*"))
    seen: list[Tensor] = []

    def spy(gradients: Tensor, num_completions: int) -> object:
        assert num_completions == 40
        seen.append(gradients)
        return gradient_signal(gradients, num_completions)

    monkeypatch.setattr(signal_module, "gradient_signal", spy)
    flags = "--init sft --prompts-per-step 8 --group-size 5 --device cpu --micro-batch-size 7"
    train_grpo.main([*flags.split(), "--measure-signal", "4"])
    table = capsys.readouterr().out
    more = "--measure-signal 3 --num-minibatches 4 --num-epochs 2 --kl-beta 0.5 --learning-rate 1"
    train_grpo.main([*flags.split(), *more.split()])
    four, three = seen
    assert torch.equal(three, four[:3])
    assert torch.pdist(four).min() > 0.01 * four.norm(dim=1).max()
    assert sorted(path for path in tmp_path.rglob("*")) == before
    expected = gradient_signal(four, 40)
    assert signal_table(expected) in table
    assert f"{expected.cosine:.3f} +- {expected.standard_error:.3f}" in table
    assert "gradients of 4 rollouts of 40 completions" in table and "errors of 0" in table


def test_gradients_are_held_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K gradients are the largest thing that a measurement holds."""
    made: list[weakref.ref[Tensor]] = []

    def gradient(*arguments: object) -> Tensor:
        found = rollout_gradient(*arguments)  # type: ignore[arg-type]
        made.append(weakref.ref(found))
        return found

    def signal(gradients: Tensor, num_completions: int) -> object:
        assert len(made) == len(gradients) == 5
        assert sum(one() is not None for one in made) <= 1
        return gradient_signal(gradients, num_completions)

    monkeypatch.setattr(signal_module, "rollout_gradient", gradient)
    monkeypatch.setattr(signal_module, "gradient_signal", signal)
    init = ["--init", str(untrained_checkpoint(tmp_path / "sft")), "--device", "cpu"]
    batch = ["--prompts-per-step", "2", "--num-minibatches", "1", "--group-size", "2"]
    train_grpo.main([*init, *batch, "--measure-signal", "5"])


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--measure-signal 2", "measure_signal must be 0 or at least 3, got 2"),
        ("--measure-signal -1", "measure_signal must be at least 0, got -1"),
        ("--measure-signal 3 --resume", "measure_signal and resume must not both be given"),
        (
            "--measure-signal 3 --parallel fsdp",
            "parallel must be ddp with measure_signal, got fsdp",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(flags: str, message: str, tmp_path: Path) -> None:
    init = ["--init", str(untrained_checkpoint(tmp_path / "sft")), "--device", "cpu"]
    with pytest.raises(ValueError, match=message):
        train_grpo.main([*init, "--save-dir", str(tmp_path / "none"), *flags.split()])
