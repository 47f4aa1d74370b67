"""--fuse: the branches that it takes with nothing compiled, and, slow, compiled for the CPU."""

import shutil
import threading

import pytest
import torch

from minigrpo import transformer
from minigrpo.policy import ActingPolicy
from minigrpo.sampling import StopRule, sample_completions
from minigrpo.scoring import completion_scores
from minigrpo.transformer import Transformer, TransformerConfig, initialise

MODULES = ("transformer", "untruncated", "scoring")
VOCAB, SUPPORT = 61, 9


@pytest.fixture
def nothing_is_compiled(monkeypatch):
    for module in MODULES:
        monkeypatch.setattr(f"minigrpo.{module}.fused", lambda function, is_fused: function)


def test_every_thread_compiles_as_many_shapes(monkeypatch):
    """Since torch 2.12 a setting holds in its thread; the backward pass on CUDA has its own."""
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    run = transformer.fused.__wrapped__(
        lambda: seen.append(torch._dynamo.config.recompile_limit), True
    )
    run()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [64, 64]


def work(model_type="qwen3", vocab=VOCAB):
    model = Transformer(TransformerConfig(model_type, vocab, 24, 40, 2, 4, 2, 6))
    generator = torch.Generator().manual_seed(5)
    initialise(model, generator)
    with torch.no_grad():
        model.norm.weight *= 15
    prompts = torch.randint(2, vocab, (3, 11), generator=generator)
    return model, prompts, torch.ones_like(prompts, dtype=torch.bool), generator


@pytest.mark.usefixtures("nothing_is_compiled")
@pytest.mark.parametrize("size", [SUPPORT, 19])  # fewer and more than there are tokens
def test_shapes_stay_the_same_from_rollout_to_rollout(size):
    """Each new one would be compiled: half a minute in the middle of a run."""
    model, prompts, mask, generator = work()
    acting, stop = ActingPolicy(1.1, 0.3, size), StopRule(tuple(range(2, 40)), 0, 17)
    for _ in range(3):
        uniforms = torch.rand(6, 17, generator=generator)
        model.is_fused = False
        plain = sample_completions(model, prompts, mask, 2, acting, stop, uniforms)
        model.is_fused = True
        fused = sample_completions(model, prompts, mask, 2, acting, stop, uniforms)
        assert fused.tokens.shape == (6, 17)
        assert fused.support.shape == (6, 17, size)
        length, width = plain.support.shape[1:]
        assert length < 17 and width < size  # or it would show nothing
        assert torch.equal(fused.tokens[:, :length], plain.tokens)
        assert torch.equal(fused.support[:, :length, :width], plain.support)
        assert bool((fused.support[:, :length, width:] == -1).all())


def scores_and_gradients(model, prompts, mask, tokens, support, basis):
    model.zero_grad(set_to_none=True)
    scores = completion_scores(model, prompts, mask, tokens, support, 1.1, basis)
    weights = torch.linspace(-1, 1, tokens.numel()).view_as(tokens)
    loss = (scores.logprobs * weights).sum()
    if basis is not None:
        loss = loss + (scores.mass * weights[..., None]).sum()
    loss.backward()
    found = [scores.logprobs.detach(), scores.entropy, loss.detach()]
    return found + [parameter.grad.clone() for parameter in model.parameters()]


def assert_fused_is_plain(model_type, has_support, has_basis):
    model, prompts, mask, generator = work(model_type)
    tokens = torch.randint(2, VOCAB, (6, 13), generator=generator)
    support = basis = None
    if has_support:
        logits = torch.rand(6, 13, VOCAB, generator=generator)
        support = logits.scatter(-1, tokens[..., None], 2.0).topk(SUPPORT, dim=-1).indices.int()
        support[2, :, 5:] = -1
    if has_basis:
        basis = torch.rand(VOCAB, 4, generator=generator)
    plain = scores_and_gradients(model, prompts, mask, tokens, support, basis)
    model.is_fused = True
    fused = scores_and_gradients(model, prompts, mask, tokens, support, basis)
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.usefixtures("nothing_is_compiled")
@pytest.mark.parametrize("has_basis", [False, True])
@pytest.mark.parametrize("has_support", [False, True])
def test_fused_branches_score_as_the_others(has_support, has_basis):
    assert_fused_is_plain("llama", has_support, has_basis)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(
    ("model_type", "has_support", "has_basis"),
    [("llama", False, False), ("qwen2", True, False), ("qwen3", False, True)],
)
def test_compiled_scores_and_gradients_are_those_of_the_plain_ones(
    model_type, has_support, has_basis
):
    assert_fused_is_plain(model_type, has_support, has_basis)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_compiled_decoding_draws_the_same_tokens():
    model, prompts, mask, generator = work("qwen2", vocab=67)
    uniforms = torch.rand(6, 9, generator=generator)
    arguments = (prompts, mask, 2, ActingPolicy(1.1, 0.7, SUPPORT), StopRule((1,), 0, 9), uniforms)
    plain = sample_completions(model, *arguments)
    model.is_fused = True
    fused = sample_completions(model, *arguments)
    length = plain.tokens.shape[1]
    assert torch.equal(fused.tokens[:, :length], plain.tokens)
    torch.testing.assert_close(
        fused.sampling_logprobs[:, :length], plain.sampling_logprobs, rtol=1e-4, atol=1e-5
    )
