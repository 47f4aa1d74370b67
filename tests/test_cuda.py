"""What runs on CUDA alone: recorded graphs, the causal kernel, draws without the host.

The CPU is the oracle, in float32 with exact products. Skipped where there is no GPU.
"""

import pytest
import torch

from minigrpo.counterfactual import ChoiceSimulator, later_values
from minigrpo.distributed import process_group
from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.lqr import QuadraticCost
from minigrpo.optim import adamw, apply_gradient
from minigrpo.policy import ActingPolicy
from minigrpo.prompts import Codec
from minigrpo.reward import RewardWeights, tally_rewards
from minigrpo.sampling import StopRule, _Batch, _Decoder, _kept_copy, sample_completions
from minigrpo.scoring import completion_scores
from minigrpo.tokenizer import number_tokenizer, token_values
from minigrpo.transformer import Transformer, TransformerConfig, initialise

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHAPES = ["llama", "qwen2", "qwen3"]


@pytest.fixture(autouse=True)
def rules_of_a_run():
    with process_group("cuda"):  # what it switches off on some GPUs stays off
        torch.set_float32_matmul_precision("highest")
        yield


def work(model_type, padded, seed=0, num_prompts=6, group=4, length=37, vocab=61):
    tied = model_type == "qwen2"
    model = Transformer(TransformerConfig(model_type, vocab, 32, 48, 2, 4, 2, 8, tied_head=tied))
    generator = torch.Generator().manual_seed(seed)
    initialise(model, generator)
    with torch.no_grad():
        model.norm.weight *= 8 if tied else 50
    prompts = torch.randint(2, vocab, (num_prompts, 7), generator=generator)
    mask = torch.ones_like(prompts, dtype=torch.bool)
    if padded:
        mask[1, :3] = mask[4, :5] = False
    uniforms = torch.rand(num_prompts * group, length, generator=generator, dtype=torch.float64)
    return model, prompts, mask, uniforms, StopRule((1,), 0, length)


def sample(model, prompts, mask, uniforms, stop, acting, device, group=4, rows=512):
    drawn = None if uniforms is None else uniforms.to(device)
    prompts, mask = prompts.to(device), mask.to(device)
    return sample_completions(model.to(device), prompts, mask, group, acting, stop, drawn, rows)


def assert_same(ours, theirs):
    """Equal tokens; a draw within rounding of a border may differ, and then all after it.

    On a GPU there may be more columns, without a token of any row.
    """
    assert not any(done.mask[:, done.mask.sum(dim=1).max() :].any() for done in (ours, theirs))
    length = min(ours.tokens.shape[1], theirs.tokens.shape[1])
    rows = (ours.tokens.cpu()[:, :length] == theirs.tokens.cpu()[:, :length]).all(dim=1)
    assert rows.double().mean() > 0.9
    for name in ("sampling_logprobs", "kept_mass"):
        a, b = (getattr(done, name).cpu()[rows, :length] for done in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for name in ("mask", "is_capped"):
        a, b = (getattr(done, name).cpu()[rows, :length] for done in (ours, theirs))
        assert torch.equal(a, b)
    assert torch.equal(ours.ended.cpu()[rows], theirs.ended.cpu()[rows])
    assert (ours.support is None) == (theirs.support is None)
    if ours.support is not None:
        width = min(ours.support.shape[2], theirs.support.shape[2])
        one, other = (x.support.cpu()[rows, :length, :width] for x in (ours, theirs))
        assert (one == other).all(dim=2)[ours.mask.cpu()[rows, :length]].double().mean() > 0.99


@pytest.mark.parametrize("model_type", SHAPES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_a_replayed_graph_draws_what_the_cpu_draws(model_type, padded, top_p):
    model, prompts, mask, uniforms, stop = work(model_type, padded)
    acting = ActingPolicy(1.3, top_p, 9)
    expected = sample(model, prompts, mask, uniforms, stop, acting, "cpu")
    for _ in range(3):  # as it comes, recorded, then replayed over what the first left behind
        assert_same(sample(model, prompts, mask, uniforms, stop, acting, "cuda"), expected)
    other = torch.roll(uniforms, 1, 0)
    again = sample(model, prompts, mask, other, stop, acting, "cuda")
    assert_same(again, sample(model, prompts, mask, other, stop, acting, "cpu"))


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("vocab", [61, 4200])  # above 4096 draws and top-p go by blocks
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_a_graph_of_any_vocabulary_reads_the_temperature_of_now(top_p, vocab, is_fused):
    model, prompts, mask, uniforms, _ = work("qwen2", False, vocab=vocab)
    stop = StopRule((), 0, uniforms.shape[1])  # fused, a batch keeps its length in any case
    for temperature in (1.3, 1.3, 1.3, 0.9):  # as it comes, recorded, replayed
        acting = ActingPolicy(temperature, top_p, 9)
        model.is_fused = False
        expected = sample(model, prompts, mask, uniforms, stop, acting, "cpu")
        model.is_fused = is_fused
        found = sample(model, prompts, mask, uniforms, stop, acting, "cuda")
        assert_same(found, expected)


def test_greedy_and_batches_of_rows_are_the_same_on_both():
    model, prompts, mask, uniforms, stop = work("qwen2", True)
    acting = ActingPolicy(1.0, 1.0)
    for drawn in (None, uniforms):
        found = []
        for where in (("cpu", 4, 512), ("cuda", 4, 8), ("cuda", 4, 20)):
            for _ in range(2):
                done = sample(model, prompts, mask, drawn, stop, acting, *where)
            found.append(done)
        assert_same(found[1], found[0])
        assert_same(found[2], found[0])


def test_a_graph_sees_the_weights_of_now():
    model, prompts, mask, uniforms, stop = work("llama", False)
    acting = ActingPolicy(1.0, 1.0)
    for _ in range(3):
        first = sample(model, prompts, mask, uniforms, stop, acting, "cuda")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7)
    second = sample(model, prompts, mask, uniforms, stop, acting, "cuda")
    assert not torch.equal(first.tokens[:, :10], second.tokens[:, :10])
    assert_same(second, sample(model, prompts, mask, uniforms, stop, acting, "cpu"))


@pytest.mark.parametrize("model_type", SHAPES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("shared_from", [1, 99])
@pytest.mark.parametrize("kept", ["all", "all, with a basis", "a support"])
def test_scores_and_gradients_are_those_of_the_cpu(
    model_type, padded, is_fused, shared_from, kept, monkeypatch
):
    monkeypatch.setattr("minigrpo.scoring.SHARED_FROM", shared_from)
    model, prompts, mask, _, _ = work(model_type, padded)
    vocab, rows = model.config.vocab_size, 2 * len(prompts)
    tokens, support, basis = torch.randint(2, vocab, (rows, 11)), None, None
    if kept == "a support":
        order = torch.rand(rows, 11, vocab).scatter(-1, tokens[..., None], 2.0)
        support = order.topk(9, dim=-1).indices.int()
        support[3, :, 4:] = -1
    elif kept == "all, with a basis":
        basis = torch.rand(vocab, 5)
    found = []
    for device in ("cpu", "cuda"):
        model = model.to(device)
        model.is_fused = is_fused and device == "cuda"
        model.zero_grad(set_to_none=True)
        parts = (prompts, mask, tokens, support, basis)
        *args, basis_there = (None if part is None else part.to(device) for part in parts)
        scores = completion_scores(model, *args, 1.2, basis_there)
        weights = torch.linspace(-1, 1, 11, device=device)
        loss = (scores.logprobs * weights).sum()
        if scores.mass is not None:
            loss = loss + (scores.mass.square().sum(dim=-1) * weights).sum()
        loss.backward()
        gradients = [p.grad.cpu().clone() for p in model.parameters()]  # .to moves those too
        found.append([scores.logprobs.detach().cpu(), scores.entropy.cpu(), *gradients])
    for theirs, ours in zip(*found, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_in_bfloat16_the_sampler_and_the_scorer_are_one_policy_within_rounding():
    model, prompts, mask, uniforms, stop = work("qwen2", True)
    with torch.autocast("cuda", torch.bfloat16):
        for _ in range(2):  # the second is recorded, with weights that are cast once
            done = sample(model, prompts, mask, uniforms, stop, ActingPolicy(1.0, 1.0), "cuda")
        rows = torch.arange(len(prompts), device="cuda").repeat_interleave(4)
        args = (prompts.cuda()[rows], mask.cuda()[rows], done.tokens, None, 1.0)
        scores = completion_scores(model, *args)
    gap = (scores.logprobs - done.sampling_logprobs)[done.mask].detach().abs()
    assert gap.mean() < 0.01
    assert gap.quantile(0.99) < 0.06


@torch.no_grad()
def test_in_bfloat16_lengths_that_never_ran_can_be_recorded():
    """cuDNN, which torch prefers for attention on an H100, plans each length of the cache anew."""
    model, prompts, mask, uniforms, _ = work("qwen2", False)
    model, stop = model.to("cuda"), StopRule((), 0, uniforms.shape[1])
    acting, device = ActingPolicy(1.0, 1.0), torch.device("cuda", torch.cuda.current_device())
    batch = _Batch(6, 7, 4, acting, False, stop, False, False, False, torch.bfloat16, device)
    found = []
    with torch.autocast("cuda", torch.bfloat16):
        for is_recorded in (True, False):
            decoder = _Decoder(_kept_copy(model, torch.bfloat16), batch, is_recorded)
            parts = (part.to(device) for part in (prompts, mask, uniforms))
            found.append(decoder.decode(model, *parts, 1.0)[2])
    assert torch.equal(*found)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_in_bfloat16_is_one_in_float32_within_rounding(checkpointing):
    """Of a prompt long enough to be shared by its group, with heads as wide as real ones."""
    model = Transformer(TransformerConfig("qwen2", 61, 128, 192, 2, 4, 2, 64, tied_head=True))
    generator = torch.Generator().manual_seed(5)
    initialise(model, generator)
    prompts = torch.randint(2, 61, (3, 40), generator=generator)
    tokens = torch.randint(2, 61, (12, 17), generator=generator)
    weights = torch.randn(12, 17, generator=generator)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients, steps = [], []
    for device, is_mixed in (("cpu", False), ("cuda", False), ("cuda", True)):
        model.to(device).load_state_dict(before)
        model.train().gradient_checkpointing = checkpointing
        model.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=is_mixed):
            scores = completion_scores(
                model, prompts.to(device), None, tokens.to(device), None, 1.0
            )
        (scores.logprobs * weights.to(device)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters()]))
        optimizer = adamw(model, 1e-3, (0.9, 0.999), 0.01)
        apply_gradient(model, optimizer, 1.0, None)
        steps.append(torch.cat([p.detach().flatten().cpu() for p in model.parameters()]))
    exact, same, rounded = gradients
    assert (same - exact).norm() < 1e-4 * exact.norm()
    assert (rounded - exact).norm() < 0.05 * exact.norm()
    start = torch.cat([p.flatten() for p in before.values()])
    for step, off in zip(steps[1:], (1e-3, 0.2), strict=True):  # its size hardly depends on g
        assert (step - steps[0]).norm() < off * (steps[0] - start).norm()


def test_values_of_choices_are_those_of_the_cpu():
    plant, codec = DoubleIntegrator(horizon=7), Codec()
    tokenizer = number_tokenizer(plant, codec)
    numbers, eos = token_values(tokenizer, len(tokenizer)), int(tokenizer.eos_token_id)
    generator = torch.Generator().manual_seed(3)
    allowed = (~numbers.isnan()).nonzero().flatten()
    tokens = allowed[torch.randint(len(allowed), (300, 9), generator=generator)]
    tokens[:, 7:] = eos
    tokens[5, 2] = eos
    starts = torch.rand(300, 2, generator=generator, dtype=torch.float64) - 0.5

    def reward(tally, is_valid):
        return tally_rewards(tally, is_valid, "progress", plant.horizon, RewardWeights())

    found = []
    for device in ("cpu", "cuda"):
        rows = tokens.to(device)
        values = numbers.to(device)
        simulator = ChoiceSimulator(values, eos, plant, QuadraticCost(), reward)
        plans = simulator.plans_of(rows, starts.to(device), 3)
        choices = simulator.values_of(plans, 9)
        expected = choices.values.mean(dim=2)
        parts = [value for value in vars(choices).values() if isinstance(value, torch.Tensor)]
        parts += [*vars(plans).values(), later_values(choices, rows, expected, 0.7)]
        found.append([*parts, choices.mean_offset(choices.values.abs(), rows)])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-3)
