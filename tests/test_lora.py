"""Adapters against merged weights, the chain rule, a second copy of the base, and transformers."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import untrained_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

import train_grpo
from minigrpo.checkpoint import (
    base_digest,
    load_model,
    load_trainer,
    publish_model,
    save_checkpoint,
)
from minigrpo.config import LORA_TARGETS, GRPOConfig
from minigrpo.hugging_face import linear_parts
from minigrpo.lora import AdaptedLinear, adapters, adapters_off, add_adapters, merged_weights
from minigrpo.optim import adamw
from minigrpo.rollout import make_rollout, prompts_of_step
from minigrpo.transformer import Transformer, TransformerConfig, initialise, logits

RANK, ALPHA, ALL = 3, 7.0, ",".join(LORA_TARGETS)
SHAPE = TransformerConfig("qwen2", 19, 30, 23, 2, 6, 3, 10)
SOME = ("q_proj", "q_proj,v_proj", "k_proj,up_proj", "o_proj,gate_proj,down_proj", ALL)
TOKENS = torch.randint(0, 19, (3, 11), generator=torch.Generator().manual_seed(3))


def a_model(shape: TransformerConfig = SHAPE, seed: int = 5) -> Transformer:
    model = Transformer(shape)
    initialise(model, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():  # biases too
            parameter += 0.3 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(seed)
            )
    return model.double()


def adapted(model: Transformer, targets: str = ALL, moved: float = 0.4) -> Transformer:
    """With adapters of which none is 0, unless `moved` is."""
    add_adapters(model, RANK, ALPHA, targets, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, parameter in adapters(model).items():
            if ".lora_b." in name:
                generator = torch.Generator().manual_seed(len(name))
                parameter += moved * torch.randn(parameter.shape, generator=generator)
    return model


def plain(weights: dict[str, Tensor], shape: TransformerConfig = SHAPE) -> Transformer:
    model = Transformer(shape).double()
    model.load_state_dict(weights)
    return model


def loss_of(model: Transformer) -> Tensor:
    z = model(TOKENS[:, :-1], None, None, logits)
    return torch.nn.functional.cross_entropy(z.flatten(0, 1), TOKENS[:, 1:].flatten())


def test_the_targets_are_all_linear_layers_of_a_block_by_their_usual_names() -> None:
    named = [name for parts in linear_parts(SHAPE).values() for name in parts]
    assert sorted(name.rpartition(".")[2] for name in named) == sorted(LORA_TARGETS)


@torch.no_grad()
def test_at_the_start_the_model_is_the_base_bit_for_bit() -> None:
    expected = a_model()(TOKENS, None, None, logits)
    assert torch.equal(adapted(a_model(), moved=0.0)(TOKENS, None, None, logits), expected)
    none = a_model()
    add_adapters(none, 0, ALPHA, ALL, torch.Generator())
    assert not adapters(none) and none.num_trained() == none.num_parameters()


@pytest.mark.parametrize("targets", SOME)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_adapters_compute_what_the_merged_weights_compute(kind: str, targets: str) -> None:
    shape = replace(SHAPE, model_type=kind, tied_head=kind == "llama")
    base, model = a_model(shape), adapted(a_model(shape), targets)
    weights = dict(merged_weights(model))
    assert weights.keys() == base.state_dict().keys()
    got = model(TOKENS, None, None, logits)
    assert torch.allclose(
        got, plain(weights, shape)(TOKENS, None, None, logits), rtol=0, atol=1e-10
    )
    assert (got - base(TOKENS, None, None, logits)).abs().max() > 0.1
    for layer in range(shape.num_layers):
        for path, parts in linear_parts(shape).items():
            rows = [w.split(list(parts.values())) for w in
                    (weights[f"blocks.{layer}.{path}.weight"],
                     base.state_dict()[f"blocks.{layer}.{path}.weight"])]  # fmt: skip
            for name, new, old in zip(parts, *rows, strict=True):
                assert torch.equal(new, old) != (name.rpartition(".")[2] in targets), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_the_exact_sum_rounded_once(dtype: torch.dtype) -> None:
    model = adapted(a_model().to(dtype), "q_proj,v_proj,down_proj")
    merged, num_moved = dict(merged_weights(model)), 0
    assert type(model.blocks[0].attention.out) is torch.nn.Linear  # no target, so left alone
    for path, layer in model.named_modules():
        if isinstance(layer, AdaptedLinear):
            new, old = (w.split(layer.sizes) for w in (merged[f"{path}.weight"], layer.weight))
            for name, got, expected in zip(layer.names, new, old, strict=True):
                if name is not None:
                    a, b = layer.lora_a[name].double(), layer.lora_b[name].double()
                    expected, num_moved = expected + ALPHA / RANK * (b @ a), num_moved + 1
                assert torch.equal(got, expected.to(dtype)) and got.dtype == dtype
                assert not got.requires_grad
    assert num_moved == 3 * SHAPE.num_layers


def test_gradients_are_those_of_the_full_weights_by_the_chain_rule() -> None:
    """W + s B A: dL/dA = s B' dL/dW, dL/dB = s dL/dW A'."""
    model = adapted(a_model())
    loss_of(model).backward()
    full = plain(dict(merged_weights(model)))
    loss_of(full).backward()
    scale, num_checked = ALPHA / RANK, 0
    for path, layer in model.named_modules():
        if isinstance(layer, AdaptedLinear):
            assert layer.weight.grad is None
            gradient = full.get_parameter(f"{path}.weight").grad
            for name, part in zip(layer.names, gradient.split(layer.sizes), strict=True):
                a, b = layer.lora_a[name], layer.lora_b[name]
                assert torch.allclose(a.grad, scale * b.T @ part, rtol=1e-9, atol=1e-12)
                assert torch.allclose(b.grad, scale * part @ a.T, rtol=1e-9, atol=1e-12)
                assert a.grad.abs().max() > 1e-5 and b.grad.abs().max() > 1e-5
                num_checked += 1
    assert num_checked == SHAPE.num_layers * len(LORA_TARGETS)


def test_adapters_alone_are_trained_and_the_base_stays_bit_for_bit() -> None:
    base, model = a_model(), adapted(a_model(), "q_proj,v_proj,down_proj", moved=0.0)
    per_block = [(60, 30), (30, 30), (30, 23)]  # rows and columns of q, v, down
    assert model.num_trained() == 2 * sum(RANK * (out + into) for out, into in per_block)
    optimizer = adamw(model, 1e-2, (0.9, 0.99), 0.1)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in adapters(model).values()}
    before, losses = {name: p.clone() for name, p in adapters(model).items()}, []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0] == float(loss_of(base).detach())
    assert not any(torch.equal(p, before[name]) for name, p in adapters(model).items())
    for name, value in base.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@torch.no_grad()
def test_switched_off_adapters_leave_the_base_and_come_back() -> None:
    base, model = a_model(), adapted(a_model())
    on = model(TOKENS, None, None, logits)
    with adapters_off(model):
        assert torch.equal(model(TOKENS, None, None, logits), base(TOKENS, None, None, logits))
    assert torch.equal(model(TOKENS, None, None, logits), on)
    with pytest.raises(RuntimeError), adapters_off(model):
        raise RuntimeError
    assert torch.equal(model(TOKENS, None, None, logits), on)
    with adapters_off(base):  # a plain model is its own base
        pass


def test_the_reference_of_a_rollout_is_a_second_copy_of_the_base(tmp_path: Path) -> None:
    folder = untrained_checkpoint(tmp_path / "sft")
    copy, (model, task, _) = load_model(folder)[0], load_model(folder)
    adapted(model)
    config = GRPOConfig(prompts_per_step=4, group_size=2, micro_batch_size=3, num_minibatches=2)
    starts = task.plant.start_grid()
    prompts, places = prompts_of_step(starts, config, task, 0)
    reward = train_grpo.reward_function(config, task)
    mine, other = (
        make_rollout(model, reference, prompts, places, config, task, reward)[0]
        for reference in (model, copy)
    )
    assert torch.equal(mine.completion_tokens, other.completion_tokens)
    # Within an ulp or two: the rounding of a product may depend on where its tensors lie.
    assert torch.allclose(mine.ref_logprobs, other.ref_logprobs, rtol=0, atol=1e-6)
    # old and sampled log-probs are the adapted model's
    assert torch.equal(mine.old_logprobs, other.old_logprobs)
    assert (mine.old_logprobs - mine.sampling_logprobs).abs().max() < 1e-4
    assert (mine.old_logprobs - mine.ref_logprobs).abs().max() > 0.1


def test_the_published_folder_is_plain_and_equal_in_transformers(tmp_path: Path) -> None:
    folder = untrained_checkpoint(tmp_path / "sft")
    model, task, manifest = load_model(folder)
    adapted(model)
    publish_model(tmp_path / "lora", model, task, manifest, 1, 2.0)
    names = set(load_file(folder / "model.safetensors"))
    assert set(load_file(tmp_path / "lora" / "model.safetensors")) == names
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "lora", output_loading_info=True
    )
    assert not any(report.values()), report
    again, tokens = load_model(tmp_path / "lora")[0], TOKENS % model.config.vocab_size
    with torch.no_grad():
        ours = model(tokens, None, None, logits)
        limit = 1e-5 * float(ours.abs().max())  # float32
        assert (ours - theirs(tokens).logits).abs().max() < limit
        assert (ours - again(tokens, None, None, logits)).abs().max() < limit
        with adapters_off(model):
            assert (ours - model(tokens, None, None, logits)).abs().max() > 100 * limit


def grpo(folder: Path, *flags: str) -> list[dict[str, float]]:
    alpha = [] if "--lora-rank=0" in flags else ["--lora-alpha=4"]
    train_grpo.main(
        ["--init", str(folder.parent / "sft"), "--save-dir", str(folder), "--device", "cpu",
         "--prompts-per-step", "3", "--num-minibatches", "1", "--group-size", "4",
         "--micro-batch-size", "5", "--eval-cases", "8", "--eval-every", "2", "--learning-rate",
         "1e-2", "--warmup-steps", "0", "--temperature", "1", *alpha, *flags]
    )  # fmt: skip
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith("time/")}
        for line in lines
    ]


def test_a_resumed_run_with_adapters_is_the_undisturbed_one_bit_for_bit(tmp_path: Path) -> None:
    untrained_checkpoint(tmp_path / "sft")
    flags = [
        "--steps",
        "4",
        "--save-every",
        "2",
        "--lora-rank",
        "2",
        "--lora-targets",
        "q_proj,up_proj",
    ]
    whole = grpo(tmp_path / "whole", *flags)
    assert whole[1]["loss/ref_kl"] == 0 and whole[4]["loss/ref_kl"] > 0
    assert whole[1]["update/grad_norm"] > 0
    part = tmp_path / "part"
    grpo(part, *flags, "--stop-after-minutes", "1e-9")  # stops after one step
    assert grpo(part, "--resume") == whole
    ended = Path("checkpoints/step-000004")
    for name in ("model.safetensors", "trainer.safetensors"):
        got, expected = (load_file(folder / ended / name) for folder in (part, tmp_path / "whole"))
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], expected[key]) for key in got)
    assert sum(key.startswith("adapter.") for key in expected) == 2 * 2 * 2  # A, B; targets; blocks


def test_a_checkpoints_adapters_fit_their_flags_and_their_base(tmp_path: Path) -> None:
    model, task, manifest = load_model(untrained_checkpoint(tmp_path / "sft"))
    adapted(model)
    optimizer = adamw(model, 1e-2, (0.9, 0.99), 0.1)
    base = base_digest(model)
    folder = save_checkpoint(tmp_path, 3, model, optimizer, task, manifest, base)

    def resumed(targets: str, change: str | None = None) -> Transformer:
        other = load_model(tmp_path / "sft")[0]
        if change:
            with torch.no_grad():
                other.get_parameter(change)[0] += 1e-6
        if targets:
            adapted(other, targets, moved=0.1)
        before = {name: value.clone() for name, value in other.state_dict().items()}
        try:
            own, fresh = base_digest(other), adamw(other, 1e-2, (0.9, 0.99), 0.1)
            load_trainer(folder, other, fresh, manifest, own)
        except ValueError:
            assert all(torch.equal(v, before[name]) for name, v in other.state_dict().items())
            raise
        return other

    again = resumed(ALL)
    assert all(torch.equal(v, again.state_dict()[name]) for name, v in model.state_dict().items())
    another = "base model or KL reference must be .* sha256 [0-9a-f]{64}, got [0-9a-f]{64};"
    cases = {
        ("q_proj", None): r"adapter\..* must have shape none, got \(",
        ("", None): r"adapter\..* must have shape none, got \(",
        (ALL, "embed.weight"): another,
        (ALL, "blocks.1.mlp_norm.weight"): another,
        (ALL, "blocks.0.attention.qkv.weight"): another,  # has adapters
    }
    for (targets, change), message in cases.items():
        with pytest.raises(ValueError, match=message):
            resumed(targets, change)
    bare = load_model(tmp_path / "sft")[0]
    plain_optimizer = adamw(bare, 1e-2, (0.9, 0.99), 0.1)
    plain_folder = save_checkpoint(tmp_path, 4, bare, plain_optimizer, task, manifest)
    with pytest.raises(ValueError, match=r"lora_a.o_proj must have shape \(3, 12\), got none;"):
        load_trainer(plain_folder, model, optimizer, manifest)


def test_a_resumed_run_keeps_its_alpha_and_its_start(tmp_path: Path) -> None:
    """Another alpha is another function of the same adapters, another start another reference."""
    untrained_checkpoint(tmp_path / "sft")
    folder, other = tmp_path / "grpo", untrained_checkpoint(tmp_path / "other")
    for rank in ("0", "2"):
        of_rank = f"--lora-rank={rank}"
        flags = ["--steps=1", "--save-every=1", of_rank, "--overwrite"]
        grpo(folder, *flags)
        before = (folder / "metrics.jsonl").read_text()
        with pytest.raises(ValueError, match=rf"init must be .*/sft to resume .*, got {other}$"):
            grpo(folder, "--resume", "--steps=2", "--init", str(other), of_rank)
        assert (folder / "metrics.jsonl").read_text() == before
    with pytest.raises(ValueError, match=r"step-000001: lora_alpha must be 8\.0, got 4\.0$"):
        grpo(folder, "--resume", "--steps=2", "--lora-alpha=8")
    assert len(grpo(folder, "--resume", "--steps=2")) == 3


def test_the_initial_a_is_uniform_with_the_usual_spread_and_depends_on_the_generator() -> None:
    model = a_model(replace(SHAPE, width=300, num_layers=1))
    add_adapters(model, 64, 1.0, "q_proj,o_proj", torch.Generator().manual_seed(0))
    again = a_model(replace(SHAPE, width=300, num_layers=1))
    add_adapters(again, 64, 1.0, "q_proj,o_proj", torch.Generator().manual_seed(1))
    for name, value in adapters(model).items():
        if ".lora_a." in name:
            bound = value.shape[1] ** -0.5
            assert 0.99 * bound < value.detach().abs().max() <= bound
            assert math.isclose(float(value.detach().std()), bound / math.sqrt(3), rel_tol=0.03)
            assert not torch.equal(value, adapters(again)[name])
        else:
            assert not value.any()


def test_adapters_of_a_model_without_storage_have_none_either() -> None:
    """A memory estimate counts a model that may be far too large to make."""
    with torch.device("meta"):
        model = Transformer(TransformerConfig("llama", 29, 24, 20, 1, 2, 1, 12))
    generator = torch.Generator()
    before = generator.get_state()
    add_adapters(model, 3, 6.0, ",".join(LORA_TARGETS), generator)
    assert torch.equal(generator.get_state(), before)  # nothing was drawn, not for a moment
    assert len(adapters(model)) == 14 and {p.device.type for p in model.parameters()} == {"meta"}


def test_the_initial_adapters_depend_on_the_runs_seed_alone(tmp_path: Path) -> None:
    folder = str(untrained_checkpoint(tmp_path / "sft"))
    made = [
        torch.cat([p.detach().flatten() for p in adapters(train_grpo.build(config)).values()])
        for config in (GRPOConfig(init=folder, lora_rank=2, seed=seed) for seed in (3, 3, 4))
    ]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_unknown_targets_are_refused() -> None:
    for targets, unknown in (("q_proj,o,lm_head", "'lm_head', 'o'"), ("q_proj,", "''")):
        with pytest.raises(ValueError, match=rf"some of q_proj,.*, got {unknown}$"):
            GRPOConfig(lora_targets=targets)
    with pytest.raises(ValueError, match="lora_targets must not be empty"):
        GRPOConfig(lora_targets="")
