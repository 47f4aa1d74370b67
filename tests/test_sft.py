"""The supervised loss against plain cross-entropy, slow loops and numerical gradients."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train_sft
from minigrpo.config import SFTConfig
from minigrpo.data import SFTBatch, keyed_generator
from minigrpo.scoring import completion_scores
from minigrpo.sft import perturbed, sft_loss, smoothing_matrix, supervised_step
from minigrpo.transformer import Transformer, TransformerConfig, initialise, logits

VOCAB = 13
VALUES = torch.tensor(  # three words and ten numbers, unevenly spaced
    [math.nan, math.nan, -1.0, -0.9, -0.7, math.nan, 0.0, 0.1, 0.2, 0.3, 0.5, 0.8, 1.3],
    dtype=torch.float64,
)


def a_model(seed: int = 1, tied: bool = False) -> Transformer:
    model = Transformer(TransformerConfig("qwen2", VOCAB, 12, 17, 2, 2, 1, 6, tied_head=tied))
    initialise(model, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        (model.embed if tied else model.head).weight.mul_(30.0)  # far from uniform
    return model.double()


def a_batch(fill: int = 0) -> SFTBatch:
    """Five rows: prompts of 1 to 4 tokens, completions of 1 to 6 (EOS is 1), right-padded to 9.

    The labels differ from the tokens wherever something is learned, except at EOS.
    """
    prompts, completions = torch.tensor([1, 4, 2, 3, 1]), torch.tensor([6, 5, 1, 3, 2])
    tokens = torch.randint(2, VOCAB, (5, 9), generator=torch.Generator().manual_seed(2))
    place = torch.arange(9).expand(5, 9)
    ends = (prompts + completions).view(5, 1)
    tokens[place == ends - 1] = 1
    mask = place < ends
    learned = mask & (place >= prompts.view(5, 1))
    labels = torch.where(learned & (tokens != 1), 2 + (tokens + 3) % (VOCAB - 2), tokens)
    assert ((labels != tokens) == (learned & (tokens != 1))).all()
    return SFTBatch(tokens.where(mask, fill), labels.where(mask, fill), mask, learned)


def slow_smoothing(width: float) -> torch.Tensor:
    rows = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    for i, a in enumerate(VALUES.tolist()):
        for j, b in enumerate(VALUES.tolist()):
            if math.isnan(a) or math.isnan(b):
                rows[i, j] = float(i == j)
            else:
                rows[i, j] = math.exp(-((a - b) ** 2) / (2 * width**2))
    return rows / rows.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("width", [0.02, 0.15, 2.0])
def test_the_smoothing_matrix_is_that_of_a_slow_loop(width):
    got = smoothing_matrix(VALUES, width)
    assert torch.allclose(got, slow_smoothing(width), rtol=0, atol=1e-12)
    assert torch.allclose(got.sum(dim=1), torch.ones(VOCAB).double(), rtol=0, atol=1e-12)
    words = VALUES.isnan()
    assert torch.equal(got[words], torch.eye(VOCAB).double()[words])  # they keep their mass
    assert not got[~words][:, words].any()  # and get none: no number is a bit of a stop
    assert (got.argmax(dim=1) == torch.arange(VOCAB)).all()


def test_width_zero_is_the_identity():
    assert torch.equal(smoothing_matrix(VALUES, 0.0), torch.eye(VOCAB).double())
    assert torch.allclose(smoothing_matrix(VALUES, 0.005), torch.eye(VOCAB).double(), atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_the_loss_is_cross_entropy_on_the_labelled_tokens(tied):
    model, batch = a_model(tied=tied), a_batch()
    labels = torch.where(batch.completion_mask, batch.labels, -100)
    z = model(batch.tokens, None, None, logits)
    expected = F.cross_entropy(
        z[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum"
    )
    assert math.isclose(sft_loss(model, batch, None), expected, rel_tol=1e-12)


@torch.no_grad()
def test_the_loss_is_minus_the_logprob_that_the_policy_gives_the_completions():
    """One row at a time through the scorer at temperature 1: first token and EOS included."""
    model, batch, total = a_model(), a_batch(), 0.0
    batch = replace(batch, labels=batch.tokens)
    for n in range(5):
        prompt = batch.tokens[n][batch.mask[n] & ~batch.completion_mask[n]].view(1, -1)
        completion = batch.tokens[n][batch.completion_mask[n]].view(1, -1)
        assert completion[0, -1] == 1
        mask = torch.ones_like(prompt).bool()
        total -= completion_scores(model, prompt, mask, completion, None, 1.0).logprobs.sum()
    assert math.isclose(sft_loss(model, batch, None), total, rel_tol=1e-12)


@pytest.mark.parametrize("width", [0.0, 0.15])
@torch.no_grad()
def test_the_smoothed_loss_is_that_of_a_slow_loop(width):
    model, batch = a_model(), a_batch()
    targets = torch.eye(VOCAB).double() if width == 0 else slow_smoothing(width)
    logp = F.log_softmax(model(batch.tokens, None, None, logits), dim=-1)
    expected = 0.0
    for n, k in batch.completion_mask.nonzero().tolist():
        expected -= float(targets[batch.labels[n, k]] @ logp[n, k - 1])
    loss = sft_loss(model, batch, smoothing_matrix(VALUES, width))
    assert math.isclose(loss, expected, rel_tol=1e-12)
    if width == 0:
        assert math.isclose(loss, sft_loss(model, batch, None), rel_tol=1e-12)


@torch.no_grad()
def test_only_labelled_tokens_have_a_loss():
    model, batch = a_model(), a_batch()
    loss = float(sft_loss(model, batch, None))
    assert math.isclose(loss, sft_loss(model, a_batch(fill=1), None), rel_tol=1e-12)  # pad is eos
    alone = [sft_loss(model, batch.rows(torch.tensor([n])), None) for n in range(5)]
    assert math.isclose(loss, sum(alone), rel_tol=1e-12)
    longer = SFTBatch(*(F.pad(t, (0, 4)) for t in vars(batch).values()))
    assert math.isclose(loss, sft_loss(model, longer, None), rel_tol=1e-12)
    unlabelled = replace(batch, completion_mask=torch.zeros_like(batch.mask))
    assert sft_loss(model, unlabelled, None) == 0


@pytest.mark.parametrize("width", [None, 0.15])
def test_the_gradient_is_the_slope_of_the_loss(width):
    model, batch = a_model(tied=True), a_batch()
    smoothing = None if width is None else smoothing_matrix(VALUES, width)
    sft_loss(model, batch, smoothing).backward()
    parameters = list(model.parameters())
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        directions = [torch.randn(p.shape, generator=generator).double() for p in parameters]
        slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, directions, strict=True))

        def loss_at(distance: float, directions=directions) -> float:
            with torch.no_grad():
                for p, d in zip(parameters, directions, strict=True):
                    p += distance * d
                value = float(sft_loss(model, batch, smoothing))
                for p, d in zip(parameters, directions, strict=True):
                    p -= distance * d
            return value

        numerical = [(loss_at(h) - loss_at(-h)) / (2 * h) for h in (2e-5, 1e-5)]
        assert math.isclose(slope, (4 * numerical[1] - numerical[0]) / 3, rel_tol=1e-6)


def step_of(model: Transformer, batch: SFTBatch, rate: float, **changes: object):
    usual = {"micro_batch_size": 128, "max_grad_norm": 1e9, "weight_noise": 0.0}
    config = SFTConfig(**(usual | changes))
    optimizer = torch.optim.SGD(model.parameters(), lr=99.0)
    return supervised_step(model, optimizer, batch, None, config, 0, rate)


def test_a_step_is_along_the_gradient_of_smoothed_rows():
    """The embedding and head of a step with plain gradient descent, all else as without."""
    batch, rate = a_batch(), 0.01
    kernel = torch.rand(VOCAB, VOCAB, generator=torch.Generator().manual_seed(5)).double()
    changes = []
    for used in (None, kernel):
        model = a_model()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        config = SFTConfig(weight_noise=0.0, max_grad_norm=1e9)
        optimizer = torch.optim.SGD(model.parameters())
        metrics = supervised_step(model, optimizer, batch, None, config, 0, rate, used)
        changes.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
        changes[-1]["norm"] = torch.tensor(metrics["update/grad_norm"])  # before the smoothing
    tables = {"embed.weight", "head.weight"} & changes[0].keys()
    assert tables
    for name, plain in changes[0].items():
        wanted = kernel @ plain if name in tables else plain
        assert torch.allclose(changes[1][name], wanted, rtol=0, atol=1e-12), name


def test_training_smooths_unless_its_flag_says_no(tmp_path):
    """Other weights after one step, or the flag reaches nothing."""
    usual = "--steps 1 --num-demonstrations 8 --batch-size 4 --micro-batch-size 4 --horizon 5 "
    usual += "--width 16 --num-heads 2 --eval-cases 8 --warmup-steps 0 --device cpu"
    found = []
    for name, more in (("on", ""), ("again", ""), ("off", "--gradient-smoothing-width 0")):
        folder = tmp_path / name
        train_sft.main([*usual.split(), "--save-dir", str(folder), *more.split()])
        found.append(load_file(folder / "checkpoints" / "step-000001" / "model.safetensors"))
    on, again, off = found
    assert all(torch.equal(on[key], again[key]) for key in on)
    changed = {key for key in on if not torch.equal(on[key], off[key])}
    assert changed == {"model.embed_tokens.weight", "lm_head.weight"}


def parameters_of(model: Transformer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5])
def test_one_step_follows_the_gradient_of_the_token_mean_for_every_micro_batch_size(
    micro_batch_size,
):
    """Plain gradient descent shows the gradient itself: change = -rate * gradient."""
    model, batch, rate = a_model(), a_batch(), 0.01
    before, num = parameters_of(model), int(batch.completion_mask.sum())
    loss = sft_loss(model, batch, None) / num
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # left over by somebody
    metrics = step_of(model, batch, rate, micro_batch_size=micro_batch_size)
    assert torch.allclose(parameters_of(model), before - rate * gradient, rtol=0, atol=1e-12)
    assert math.isclose(metrics["loss/total"], loss.item(), rel_tol=1e-12)
    assert math.isclose(metrics["update/grad_norm"], gradient.norm(), rel_tol=1e-5)
    assert metrics["update/learning_rate"] == rate


def test_a_long_gradient_is_scaled_down_to_the_limit():
    model, batch = a_model(), a_batch()
    before = parameters_of(model)
    metrics = step_of(model, batch, 0.01, max_grad_norm=0.05)
    assert metrics["update/grad_norm"] > 0.1
    assert math.isclose((parameters_of(model) - before).norm(), 0.01 * 0.05, rel_tol=1e-3)


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_reported():
    model, batch = a_model(), a_batch()
    with torch.no_grad():
        model.norm.weight[3] = torch.inf
    before = parameters_of(model)
    metrics = step_of(model, batch, 0.01)
    assert not math.isfinite(metrics["update/grad_norm"])
    assert torch.equal(parameters_of(model), before)


def test_bfloat16_autocast_is_close_and_the_weights_stay_float32():
    losses = []
    for precision in ("float32", "bfloat16"):
        model = a_model().float()
        losses.append(step_of(model, a_batch(), 0.0, precision=precision)["loss/total"])
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    exact = step_of(a_model(), a_batch(), 0.0)["loss/total"]
    full, half = (abs(loss / exact - 1) for loss in losses)
    assert full < 1e-6 < 1e-5 < half < 0.03  # 24 and 8 bits


def test_repeated_steps_learn_a_batch_by_heart():
    model, batch = a_model().float(), a_batch()
    config = SFTConfig(micro_batch_size=2)
    optimizer = torch.optim.AdamW(model.parameters())
    losses = [
        supervised_step(model, optimizer, batch, None, config, step, 0.01)["loss/total"]
        for step in range(60)
    ]
    assert losses[-1] < 0.05 < losses[0]


def test_inside_the_noise_matrices_move_by_its_share_of_their_size_and_after_it_they_are_back():
    model = a_model()
    with torch.no_grad():
        model.head.weight += 3.0  # its size is not its spread
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.embed.weight.requires_grad_(False)
    with pytest.raises(ZeroDivisionError), perturbed(model, 0.2, torch.Generator().manual_seed(0)):
        moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
        _ = 1 / 0  # back after an error too, for a caller who goes on
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for name, change in moved.items():
        if change.ndim < 2 or name == "embed.weight":
            assert not change.any(), name
            continue
        size = change.square().mean().sqrt() / before[name].square().mean().sqrt()
        assert abs(size / 0.2 - 1) < 4 / math.sqrt(2 * change.numel()), name
        assert change.abs().max() > 1.5 * change.square().mean().sqrt(), name  # normal, not +-
        assert abs(change.mean()) < 4 * 0.2 * before[name].square().mean().sqrt() / math.sqrt(
            change.numel()
        ), name


def test_the_gradient_of_a_noisy_step_is_the_one_at_the_perturbed_weights():
    model, batch, rate = a_model(), a_batch(), 0.01
    before = parameters_of(model)
    metrics = step_of(model, batch, rate, weight_noise=0.3, micro_batch_size=2)
    change = parameters_of(model) - before
    model = a_model()
    key = int(keyed_generator(0, "weight_noise", 0).integers(2**63))
    with perturbed(model, 0.3, torch.Generator().manual_seed(key)):
        loss = sft_loss(model, batch, None) / int(batch.completion_mask.sum())
        gradient = torch.autograd.grad(loss, list(model.parameters()))
    expected = -rate * torch.cat([part.flatten() for part in gradient])
    torch.testing.assert_close(change, expected, rtol=0, atol=1e-12)
    assert math.isclose(metrics["loss/total"], float(loss.detach()), rel_tol=1e-12)


def test_every_step_and_seed_has_its_own_weight_noise():
    losses = {
        supervised_step(
            a_model(),
            torch.optim.SGD(a_model().parameters(), lr=1.0),
            a_batch(),
            None,
            SFTConfig(seed=seed, weight_noise=0.3),
            step,
            0.0,
        )["loss/total"]
        for seed in (0, 1)
        for step in (0, 1)
    }
    assert len(losses) == 4


def test_every_epoch_shows_each_demonstration_once_in_an_order_of_its_own() -> None:
    config = SFTConfig(num_demonstrations=12, batch_size=4, seed=3)
    rows = torch.arange(12).expand(2, 12).T
    data = SFTBatch(rows, rows, rows >= 0, rows >= 0)
    batches = [train_sft.batch_of_step(data, config, step).tokens[:, 0] for step in range(6)]
    assert [len(batch) for batch in batches] == [4] * 6
    first, second = (torch.cat(epoch) for epoch in (batches[:3], batches[3:]))
    assert not torch.equal(first, second)
    assert all(torch.equal(epoch.sort().values, torch.arange(12)) for epoch in (first, second))
