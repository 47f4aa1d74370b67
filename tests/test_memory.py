"""The estimate against hand-worked numbers and real allocations; no tensor of all logits."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from ranks import run_ranks
from tiny import untrained_checkpoint
from torch import Tensor
from watch import Watch

import train_grpo
import train_sft
from minigrpo import memory, scoring
from minigrpo.config import GRPOConfig, SFTConfig
from minigrpo.counterfactual import NUM_COLUMNS, ChoiceSimulator, Plans, rows_at_once
from minigrpo.data import SFTBatch, Task
from minigrpo.distributed import process_group, rank
from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.lora import add_adapters
from minigrpo.lqr import QuadraticCost
from minigrpo.memory import MemoryEstimate, Workload, check_memory, free_memory, memory_estimate
from minigrpo.policy import ActingPolicy
from minigrpo.reward import RewardWeights, tally_rewards
from minigrpo.rollout import minibatches as rollout_minibatches
from minigrpo.sampling import StopRule, sample_completions
from minigrpo.scoring import completion_scores
from minigrpo.sft import sft_loss
from minigrpo.transformer import Transformer, TransformerConfig, initialise, logits

LLAMA = TransformerConfig("llama", 3001, 96, 256, 6, 6, 2, 16)
QWEN3 = TransformerConfig("qwen3", 211, 96, 256, 6, 6, 2, 16)
MANY_HEADS = TransformerConfig("qwen3", 211, 64, 64, 4, 6, 6, 32)  # q, k and v outweigh the rest
WIDE = TransformerConfig("qwen2", 20_011, 96, 256, 2, 6, 2, 16)  # its logits outweigh the rest
FEW_LAYERS = TransformerConfig("llama", 640, 64, 128, 2, 8, 8, 64)


def a_model(shape: TransformerConfig, config: SFTConfig = SFTConfig()) -> Transformer:  # noqa: B008
    model = Transformer(shape)
    initialise(model, torch.Generator().manual_seed(1))
    add_adapters(model, config.lora_rank, 8.0, config.lora_targets, torch.Generator())
    model.gradient_checkpointing = config.gradient_checkpointing
    return model


def some_tokens(*shape: int, high: int) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(2))


def loss_of(model: Transformer, prompts: Tensor, completions: Tensor, kind: str) -> Tensor:
    """Supervised, or the scores of GRPO with the stored support or without."""
    if kind == "sft":
        tokens = torch.cat([prompts, completions], dim=1)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        learned = mask & (torch.arange(tokens.shape[1]) >= prompts.shape[1])
        return sft_loss(model, SFTBatch(tokens, tokens, mask, learned), None)
    support = some_tokens(*completions.shape, 16, high=model.config.vocab_size)
    support[:, :, 0] = completions
    mask = torch.ones_like(prompts, dtype=torch.bool)
    if kind == "values":  # of choices
        values = torch.ones(*completions.shape, NUM_COLUMNS)
        basis = torch.ones(model.config.vocab_size, NUM_COLUMNS)
        scores = completion_scores(model, prompts, mask, completions, None, 1.5, basis)
        assert scores.mass is not None
        return scores.logprobs.sum() + (scores.mass * values).sum()
    kept = support if kind == "support" else None
    return completion_scores(model, prompts, mask, completions, kept, 1.5).logprobs.sum()


def test_the_estimate_is_that_worked_out_by_hand() -> None:
    """Qwen2 shape, width 8, MLP 12, 2 blocks, 4 heads over 2, head size 2, V = 50, own head."""
    shape = TransformerConfig("qwen2", 50, 8, 12, 2, 4, 2, 2, tied_head=False)
    # qkv 16 x 8 + 16, out 8 x 8, gate and up 24 x 8, down 8 x 12, two norms of 8
    block = (128 + 16) + 64 + 192 + 96 + 16
    parameters = 2 * 50 * 8 + 2 * block + 8
    work = Workload(
        prompt_length=7, completion_length=5, micro_rows=3, num_decoded=20, num_prefilled=4,
        num_rows=40, support_size=6, has_reference=True,
    )  # fmt: skip
    got = memory_estimate(shape, GRPOConfig(), work, num_ranks=2)
    assert got.model == {
        "weights": 4 * parameters, "gradients": 8 * parameters, "AdamW": 8 * parameters,
        "reference": 4 * parameters, "held weights": 0, "bfloat16 weights": 0, "copied weights": 0,
    }  # fmt: skip
    # of a token: 4 x 8 in float32, then 2 x 8 + 3 x 8 + 3 x 4 + 4 x 12 = 100 and 4 weights a key
    row = 4 * 6 + 32
    # Keys and values of one layer and token; the rows' cache moves a layer at a time.
    pair, prefill = 2 * 2 * 2 * 4, 4 * 7 * 4 * (32 + 100 + 4 * 7)
    assert got.sampling == {
        "KV cache": pair * ((2 + 1) * 20 * 12 + 2 * 4 * 7),
        "logits": 5 * 4 * 20 * 50,
        "prefill": 0,  # less than what comes after it
        "support": 2 * 40 * 5 * row,
        "gathered weights": 0,
    }
    kept = 3 * 11 * 4 * (32 + 100 + 4 * 11)
    assert got.update == {
        "activations": 2 * kept, "at work": 4 * 50 * 8 + kept * 5 // 4, "support": 40 * 5 * row,
        "values": 0, "gathered weights": 0,
    }  # fmt: skip
    assert got.peak == sum(got.model.values()) + max(
        sum(got.sampling.values()), sum(got.update.values())
    )

    noisy = replace(work, is_perturbed=True)
    cut = memory_estimate(shape, GRPOConfig(parallel="fsdp"), noisy, num_ranks=8, ranks_here=4)
    assert cut.model == {
        "weights": parameters, "gradients": parameters, "AdamW": 2 * parameters,
        "reference": parameters, "held weights": parameters, "bfloat16 weights": 0,
        "copied weights": 0,
    }  # fmt: skip
    assert cut.sampling == {**got.sampling, "gathered weights": 4 * parameters}
    halves = memory_estimate(shape, GRPOConfig(parallel="fsdp"), work, num_ranks=2, ranks_here=2)
    assert halves.sampling == cut.sampling and halves.update == cut.update
    alone = memory_estimate(shape, GRPOConfig(), replace(work, num_decoded=4)).sampling
    assert alone["prefill"] == prefill - pair * 3 * 4 * 12 > 0
    whole = memory_estimate(shape, GRPOConfig(), replace(work, is_on_cuda=True)).sampling
    assert whole["KV cache"] == 3 * pair * 2 * (20 * 12 + 4 * 7) and whole["prefill"] == prefill
    assert cut.update["gathered weights"] == 4 * 2 * 50 * 8 + 2 * 4 * (2 * block + 8) // 2

    config = GRPOConfig(
        precision="bfloat16", gradient_checkpointing=True, lora_rank=3, lora_targets="q_proj,o_proj"
    )
    less = memory_estimate(shape, config, replace(work, has_reference=False))
    trained = 2 * (3 * (8 + 8) + 3 * (8 + 8))
    assert less.model == {
        "weights": 4 * (parameters + trained), "gradients": 4 * trained, "AdamW": 8 * trained,
        "reference": 0, "held weights": 0, "bfloat16 weights": 2 * (parameters + trained),
        "copied weights": 2 * (parameters + trained) + 4 * 2 * 50 * 8,
    }  # fmt: skip
    assert less.update["activations"] == 2 * 3 * 11 * 4 * 8
    assert less.update["at work"] == 3 * 11 * (4 * 32 + 2 * (100 + 4 * 11)) * 5 // 4
    assert less.sampling == got.sampling

    valued = replace(work, num_nodes=9, num_simulated=32)
    valued = memory_estimate(shape, GRPOConfig(), valued, num_ranks=2)
    assert valued.update["support"] == got.update["support"] + 40 * 5 * (4 * 9 + 28)
    assert valued.sampling["support"] == got.sampling["support"] + 2 * 40 * 5 * (4 * 9 + 28)
    assert valued.update["values"] == 10 * 4 * 9 * 32 * 5

    tied = replace(shape, tied_head=True)  # its table has three gradients, more than its blocks
    small = replace(work, micro_rows=1, prompt_length=1, completion_length=2, support_size=1)
    tables = memory_estimate(tied, GRPOConfig(), small).update["at work"]
    assert tables == 3 * 4 * 50 * 8 > 2 * 4 * (32 + 100 + 4 * 2) * 5 // 4 + 4 * 50 * 8
    assert memory_estimate(shape, GRPOConfig(), small).update["at work"] < tables

    # Shared prompts: q, k and v of so many tokens a second time.
    half = GRPOConfig(precision="bfloat16")
    for is_on_cuda, copied in ((False, 7 + 3 * 4), (True, 3 * 11)):
        alike = replace(work, rows_per_prompt=3, is_on_cuda=is_on_cuda)
        shared = memory_estimate(shape, half, alike).update
        block = (7 + 3 * 4) * (4 * 32 + 2 * (100 + 4 * 11)) + copied * 2 * 2 * (4 + 2 * 2)
        assert shared["activations"] == 2 * block
        assert shared["at work"] == 4 * 50 * 8 + block * 5 // 4
    # A GPU in float32 keeps keys and values as repeated for each of a group's heads.
    for rows_per_prompt, tokens, copied in ((3, 7 + 3 * 4, 3 * 11), (1, 3 * 11, 0)):
        wide = replace(alike, rows_per_prompt=rows_per_prompt)
        block = tokens * (4 * 32 + 4 * (100 + 4 * 11)) + copied * 4 * 2 * (4 + 2 * 2)
        repeated = 3 * 11 * 4 * 2 * (4 * 2)
        grouped = memory_estimate(shape, GRPOConfig(), wide).update["activations"]
        assert grouped == 2 * (block + repeated)
    # Qwen3 keeps q and k before their norms too, in float32.
    normed = memory_estimate(replace(shape, model_type="qwen3"), half, work).update
    more = normed["activations"] - memory_estimate(shape, half, work).update["activations"]
    assert more == 2 * 3 * 11 * 4 * (8 + 4)
    full = replace(shape, num_kv_heads=4)
    plain = memory_estimate(full, GRPOConfig(), replace(alike, rows_per_prompt=1)).update
    assert memory_estimate(full, GRPOConfig(), alike).update["activations"] < plain["activations"]
    alike = replace(work, rows_per_prompt=3)
    two = memory_estimate(shape, GRPOConfig(), replace(alike, rows_per_prompt=2)).update
    more = two["activations"] - memory_estimate(shape, GRPOConfig(), alike).update["activations"]
    assert more == 2 * 7 * 4 * (32 + 100 + 4 * 11 + 2 * (4 + 2 * 2))  # a second prompt


@pytest.mark.parametrize(
    ("lengths", "is_on_cuda", "micro_batch_size", "shared_by"),
    [
        ({8}, False, 32, 16), ({8}, False, 24, 8), ({7}, False, 32, 1), ({8, 9}, False, 32, 1),
        ({31}, True, 32, 1), ({32}, True, 32, 16),
    ],
)  # fmt: skip
def test_prompts_are_counted_as_they_are_fed(
    lengths: set[int],
    is_on_cuda: bool,
    micro_batch_size: int,
    shared_by: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once for the rows of a micro-batch that share one, if no prompt is ever padded."""
    counted: list[Workload] = []

    def keep(shape: object, config: object, work: Workload, *_: object) -> None:
        counted.append(work)

    monkeypatch.setattr(memory, "memory_estimate", keep)
    monkeypatch.setattr(memory, "prompt_lengths", lambda task: lengths)
    config = GRPOConfig(micro_batch_size=micro_batch_size, group_size=16)
    task = cast(Task, SimpleNamespace(max_completion_length=51))
    memory.grpo_memory(LLAMA, task, config, is_on_cuda)
    assert (counted[0].rows_per_prompt, counted[0].prompt_length) == (shared_by, max(lengths))


@pytest.mark.parametrize(
    ("prompts", "group", "minibatches", "micro"),
    [(9, 64, 8, 128), (3, 16, 2, 32), (5, 8, 4, 16), (8, 16, 3, 64), (4, 4, 2, 5), (2, 8, 1, 99)],
)
def test_the_largest_micro_batch_is_counted(
    prompts: int, group: int, minibatches: int, micro: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minibatches are whole groups, so one may be larger than its share of the rows."""
    counted: list[Workload] = []
    monkeypatch.setattr(memory, "memory_estimate", lambda _, __, work, *___: counted.append(work))
    monkeypatch.setattr(memory, "prompt_lengths", lambda task: {5})
    config = GRPOConfig(
        prompts_per_step=prompts, group_size=group, num_minibatches=minibatches,
        micro_batch_size=micro,
    )  # fmt: skip
    task = cast(Task, SimpleNamespace(max_completion_length=51))
    memory.grpo_memory(LLAMA, task, config)
    cut = [len(rows) for rows in rollout_minibatches(torch.arange(prompts), config, 0)]
    assert counted[0].micro_rows == min(micro, max(cut))


def test_each_trainer_counts_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the first of three ranks, which has the most of a step."""
    monkeypatch.setattr(memory, "memory_estimate", lambda _, __, work, *___: work)
    monkeypatch.setattr(memory, "prompt_lengths", lambda task: {5, 9})
    monkeypatch.setattr(memory, "world_size", lambda: 3)
    task = cast(Task, SimpleNamespace(max_completion_length=51))

    def counted(config: GRPOConfig | SFTConfig) -> Workload:
        if isinstance(config, GRPOConfig):
            return cast(Workload, memory.grpo_memory(LLAMA, task, config))
        return cast(Workload, memory.sft_memory(LLAMA, task, config))

    config = GRPOConfig(
        prompts_per_step=28, group_size=4, micro_batch_size=8, eval_cases=50, rows_per_batch=30,
        support_size=16,
    )  # fmt: skip
    rows = 10 * 4
    work = Workload(
        prompt_length=9, completion_length=51, micro_rows=8, num_decoded=30, num_prefilled=30,
        num_rows=rows, support_size=16, has_reference=True,
        num_simulated=min(rows, rows_at_once(False)),
    )  # fmt: skip
    assert counted(config) == work  # validation decodes more than a rollout
    fewer = replace(config, eval_cases=8, rows_per_batch=37)
    assert counted(fewer) == replace(work, num_decoded=9 * 4, num_prefilled=9)
    assert counted(replace(config, top_p=1.0)) == replace(work, support_size=0)
    for without in ({"kl_beta": 0.0}, {"lora_rank": 2}):  # adapters are taken off for it
        assert counted(replace(config, **without)) == replace(work, has_reference=False)
    choices = replace(config, credit="choice", advantage_std="batch")
    assert counted(choices) == replace(work, num_nodes=NUM_COLUMNS)
    supervised = SFTConfig(batch_size=20, eval_cases=50, rows_per_batch=30)
    work = Workload(9, 51, micro_rows=7, num_decoded=30, num_prefilled=30, is_perturbed=True)
    assert counted(supervised) == work
    plain = replace(supervised, weight_noise=0.0, micro_batch_size=2, eval_cases=8)
    assert counted(plain) == Workload(9, 51, micro_rows=2, num_decoded=8, num_prefilled=8)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_on_cuda_kept_graphs_are_counted_beside_the_update(precision: str) -> None:
    """Three caches, the weights in float32 and, for autocast, in bfloat16; not of shards."""
    shape = TransformerConfig("qwen2", 50, 8, 12, 2, 4, 2, 2, tied_head=False)
    work = Workload(7, 5, 3, 20, 4, num_rows=40)
    config = GRPOConfig(precision=precision)
    plain = memory_estimate(shape, config, work)
    kept = memory_estimate(shape, config, replace(work, is_on_cuda=True))
    weights, tables = plain.model["weights"], 4 * 2 * 50 * 8
    cast = weights // 2 + tables if precision == "bfloat16" else 0
    assert plain.model["copied weights"] == cast
    supervised = memory_estimate(shape, config, replace(work, num_rows=0))
    assert supervised.model["copied weights"] == 0
    assert kept.model["copied weights"] == weights + cast
    phases = sum(kept.sampling.values()) + sum(kept.update.values())
    assert kept.peak == sum(kept.model.values()) + phases
    sharded = replace(config, parallel="fsdp")
    cut = memory_estimate(shape, sharded, replace(work, is_on_cuda=True), 2, 2)
    on_cpu = memory_estimate(shape, sharded, work, 2, 2)
    assert (cut.model, cut.has_graphs) == (on_cpu.model, False)
    assert 3 * cut.sampling["KV cache"] == kept.sampling["KV cache"]


@pytest.mark.parametrize("shape", [LLAMA, QWEN3, WIDE, replace(QWEN3, tied_head=False)])
@pytest.mark.parametrize("targets", ["", "q_proj", "v_proj,o_proj,up_proj", "down_proj,gate_proj"])
def test_parameters_are_counted_without_making_them(shape: TransformerConfig, targets: str) -> None:
    config = SFTConfig(lora_rank=3, lora_targets=targets) if targets else SFTConfig()
    model, got = a_model(shape, config), memory_estimate(shape, config, Workload(1, 1, 1, 1, 1))
    assert got.model["weights"] == 4 * model.num_parameters()
    assert got.model["gradients"] == 4 * model.num_trained()


@pytest.mark.parametrize(
    ("shape", "kind", "rows", "shared_by", "changes"),
    [
        (LLAMA, "support", 8, 1, {}),
        (LLAMA, "support", 8, 4, {}),
        (LLAMA, "support", 8, 1, {"gradient_checkpointing": True}),
        (LLAMA, "support", 8, 4, {"gradient_checkpointing": True}),
        (MANY_HEADS, "support", 16, 2, {"gradient_checkpointing": True, "lora_rank": 4}),
        (MANY_HEADS, "whole", 16, 4, {"gradient_checkpointing": True, "lora_rank": 4}),
        (LLAMA, "sft", 4, 1, {"precision": "bfloat16"}),
        (LLAMA, "sft", 8, 1, {"lora_rank": 4}),
        (LLAMA, "whole", 2, 1, {"gradient_checkpointing": True, "precision": "bfloat16"}),
        (LLAMA, "whole", 16, 16, {"precision": "bfloat16"}),
        (QWEN3, "support", 4, 1, {}),
        (QWEN3, "support", 8, 2, {}),
        (QWEN3, "sft", 4, 1, {"gradient_checkpointing": True, "lora_rank": 4}),
        (QWEN3, "support", 4, 1, {"precision": "bfloat16", "lora_rank": 4}),
        (QWEN3, "support", 16, 8, {"precision": "bfloat16", "lora_rank": 4}),
        (WIDE, "support", 4, 1, {}),
        (LLAMA, "values", 4, 1, {}),
        (LLAMA, "values", 8, 8, {}),
        (WIDE, "values", 4, 1, {}),
        (WIDE, "sft", 4, 1, {"lora_rank": 4, "precision": "bfloat16"}),
    ],
)
def test_an_update_takes_what_is_estimated(
    shape: TransformerConfig, kind: str, rows: int, shared_by: int, changes: dict[str, object]
) -> None:
    config = SFTConfig(**changes)
    model, length = a_model(shape, config), (60, 20) if shape is LLAMA else (30, 40)
    prompts = some_tokens(rows // shared_by, length[0], high=shape.vocab_size)
    completions = some_tokens(rows, length[1], high=shape.vocab_size)
    work = Workload(
        *length, rows, 0, 0, shared_by, num_rows=rows * (kind == "values"),
        support_size=16 * (kind == "support"), num_nodes=NUM_COLUMNS * (kind == "values"),
    )  # fmt: skip
    estimate = memory_estimate(shape, config, work)
    with Watch(*model.parameters(), prompts, completions) as watch:
        half = config.precision == "bfloat16"
        for _ in range(2):  # micro-batches: the second one beside the gradients of the first
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = loss_of(model, prompts, completions, kind)
            loss.backward()
            del loss
    expected = sum(estimate.update.values()) + estimate.model["gradients"]
    expected += estimate.model["bfloat16 weights"]
    assert 1.0 <= expected / watch.peak <= 1.6


@pytest.mark.parametrize("rows", [40, 300])
def test_choices_take_what_is_estimated(rows: int) -> None:
    plant, numbers = DoubleIntegrator(), torch.linspace(-3, 3, 601, dtype=torch.float64)
    draw = torch.Generator().manual_seed(1)
    own = torch.randn(rows, 50, generator=draw, dtype=torch.float64)
    plans = Plans(own[:, :2], own, own.flip(0), torch.full((rows,), 51))
    reward = partial(tally_rewards, kind="progress", horizon=50, weights=RewardWeights())
    simulator = ChoiceSimulator(numbers, 0, plant, QuadraticCost(), reward)
    with Watch(own, numbers) as watch:
        got = simulator.values_of(plans, 51)
    together = min(rows, rows_at_once(False))
    work = Workload(
        5, 51, rows, rows, 1, num_rows=rows, num_nodes=NUM_COLUMNS, num_simulated=together
    )
    estimate = memory_estimate(LLAMA, GRPOConfig(), work).update
    kept = got.values.nbytes + got.level.nbytes
    assert kept < estimate["support"]
    assert 1.0 <= (estimate["values"] + 2 * kept) / watch.peak <= 1.6


@pytest.mark.parametrize("top_p", [0.9, 1.0])
@pytest.mark.parametrize(
    ("shape", "group_size", "lengths"),
    [(LLAMA, 4, (60, 20)), (QWEN3, 1, (60, 20)), (FEW_LAYERS, 4, (32, 100))],
)
def test_sampling_takes_what_is_estimated(
    shape: TransformerConfig, group_size: int, lengths: tuple[int, int], top_p: float
) -> None:
    """Where the cache is the most, where the prefill is, and where a layer that grows tells."""
    model, prompts = a_model(shape), some_tokens(4, lengths[0], high=shape.vocab_size)
    mask, rows = torch.ones_like(prompts, dtype=torch.bool), 4 * group_size
    uniforms = torch.rand(rows, lengths[1], generator=torch.Generator().manual_seed(1))
    with Watch(*model.parameters(), prompts, mask, uniforms) as watch:
        acting, stop = ActingPolicy(1.5, top_p, 16), StopRule((shape.vocab_size,), 0, lengths[1])
        sample_completions(model, prompts, mask, group_size, acting, stop, uniforms)
    support = 16 if top_p < 1 else 0
    work = Workload(*lengths, 1, rows, 4, num_rows=rows, support_size=support)
    expected = sum(memory_estimate(shape, SFTConfig(), work).sampling.values())
    assert 1.0 <= expected / watch.peak <= 1.6


def naive_loss(model: Transformer, prompts: Tensor, completions: Tensor, kind: str) -> Tensor:
    z = model(torch.cat([prompts, completions], dim=1)[:, :-1], None, None, logits)
    z = z[:, prompts.shape[1] - 1 :]  # [M, C, V]
    if kind == "sft":
        return torch.nn.functional.cross_entropy(
            z.flatten(0, 1), completions.flatten(), reduction="sum"
        )
    z = z / 1.5
    if kind == "support":
        support = some_tokens(*completions.shape, 16, high=model.config.vocab_size)
        support[:, :, 0] = completions
        return (z.gather(-1, support[:, :, :1])[..., 0] - z.gather(-1, support).logsumexp(-1)).sum()
    return z.log_softmax(-1).gather(-1, completions[:, :, None]).sum()


@pytest.mark.parametrize("kind", ["sft", "support", "whole"])
def test_no_tensor_of_all_logits_exists_and_value_and_gradient_are_the_naive_ones(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = TransformerConfig("llama", 5003, 8, 12, 1, 2, 1, 4)
    model, limit = a_model(shape).double(), 2**17
    prompts, completions = some_tokens(3, 5, high=5003), some_tokens(3, 37, high=5003)
    results = []
    for function in (loss_of, naive_loss):
        monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", limit)
        model.zero_grad()
        with Watch(*model.parameters(), prompts, completions) as watch:
            loss = function(model, prompts, completions, kind)
            loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((float(loss.detach()), gradient, watch.largest))
    (value, gradient, largest), (naive_value, naive_gradient, naive_largest) = results
    assert largest <= 8 * limit < 8 * 3 * 37 * 5003 <= naive_largest
    assert abs(value - naive_value) < 1e-9 * abs(naive_value)
    assert torch.allclose(gradient, naive_gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_sampling_makes_logits_of_one_position_alone(top_p: float) -> None:
    shape = TransformerConfig("llama", 5003, 8, 12, 1, 2, 1, 4)
    model, prompts = a_model(shape), some_tokens(2, 9, high=5003)
    mask = torch.ones_like(prompts, dtype=torch.bool)
    uniforms = torch.rand(6, 11, generator=torch.Generator().manual_seed(1))
    with Watch(*model.parameters(), prompts, mask, uniforms) as watch:
        stop = StopRule((5003,), 0, 11)
        sample_completions(model, prompts, mask, 3, ActingPolicy(1.5, top_p, 16), stop, uniforms)
    assert watch.largest <= 8 * 6 * 5003  # int64 ids of a sort at most


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("kind", ["sft", "support"])
def test_gradient_checkpointing_changes_memory_and_no_gradient(kind: str, rank: int) -> None:
    results = []
    for on in (False, True):
        config = SFTConfig(gradient_checkpointing=on, lora_rank=rank)
        model = a_model(QWEN3, config)
        prompts, completions = some_tokens(4, 30, high=211), some_tokens(4, 40, high=211)
        with Watch(*model.parameters()) as watch:
            loss_of(model, prompts, completions, kind).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results.append((watch.peak, grads))
    (peak, grads), (peak_on, grads_on) = results
    assert peak_on < 0.4 * peak
    assert grads.keys() == grads_on.keys()
    assert all(torch.equal(grads[name], grads_on[name]) for name in grads)


def test_both_trainers_take_the_flags(tmp_path: Path) -> None:
    folder = untrained_checkpoint(tmp_path / "sft")
    config = GRPOConfig(init=str(folder), gradient_checkpointing=True, lora_rank=2)
    model = train_grpo.build(config)
    assert model.gradient_checkpointing and 0 < model.num_trained() < model.num_parameters()
    assert not model.is_fused
    fused = train_grpo.build(GRPOConfig(init=str(folder), fuse=True))
    assert fused.is_fused and not fused.gradient_checkpointing
    supervised = SFTConfig(gradient_checkpointing=True, fuse=True, horizon=2)
    shape, task, weights = train_sft.describe(supervised)
    model = train_sft.build(shape, task, weights, supervised)
    assert model.gradient_checkpointing and model.is_fused


def gib(size: float) -> Callable[[torch.device], int]:
    return lambda device: round(size * 2**30)


def test_a_run_that_does_not_fit_is_refused_before_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = untrained_checkpoint(tmp_path / "sft")

    def loaded(folder: Path) -> Transformer:
        raise AssertionError

    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    monkeypatch.setattr(train_grpo, "load_transformer", loaded)
    monkeypatch.setattr(train_sft, "Transformer", loaded)
    with pytest.raises(ValueError, match=r"must fit into memory, got .* GiB free on cpu") as caught:
        train_grpo.main(["--init", str(folder), "--save-dir", str(tmp_path / "g"), "--device=cpu"])
    *advice, last = caught.value.__notes__[0].partition("GiB with\n")[2].splitlines()
    assert last == "or, as the estimate is an upper bound, --memory-check warn"
    known = [" ".join(f"--{name.replace('_', '-')}" for name in change)
             for change in memory.LESS_MEMORY]  # fmt: skip
    flags = [" ".join(w for w in line.split() if w.startswith("--")) for line in advice]
    assert len(flags) > 1 and set(flags) <= set(known)
    with pytest.raises(ValueError, match=r"must fit into memory") as caught:
        train_sft.main(["--save-dir", str(tmp_path / "s"), "--device=cpu", "--horizon=2"])
    *advice, _ = caught.value.__notes__[0].partition("GiB with\n")[2].splitlines()
    for line in advice:  # the tiny model can follow all of it
        train_sft.settings(line.split()[1:])
    assert advice[-1].endswith("--micro-batch-size 1 --rows-per-batch 16 --gradient-checkpointing")


def test_advice_is_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = TransformerConfig("qwen2", 151_936, 896, 4864, 24, 14, 2, 64)  # Qwen2.5-0.5B

    def estimate(config: GRPOConfig) -> MemoryEstimate:
        work = Workload(
            150, 350, config.micro_batch_size, config.rows_per_batch, 32, num_rows=512,
            support_size=128, has_reference=config.kl_beta > 0 and not config.lora_rank,
        )  # fmt: skip
        return memory_estimate(shape, config, work, num_ranks=4, ranks_here=4)

    monkeypatch.setattr(memory, "free_memory", gib(8))
    with pytest.raises(ValueError) as caught:
        device, config = torch.device("cpu"), GRPOConfig(micro_batch_size=64)
        check_memory(estimate, config, device)
    lines = caught.value.__notes__[0].partition("GiB with\n")[2].splitlines()[:-1]
    advice = [(line.split()[1], float(line.split()[0])) for line in lines]
    assert [name for name, _ in advice] == [  # fewer rows decoded would not help: the update would
        "--micro-batch-size", "--gradient-checkpointing", "--kl-beta", "--lora-rank", "--parallel",
        "--micro-batch-size",
    ]  # fmt: skip
    whole = estimate(config).peak / 2**30
    assert all(less < whole - 1 for _, less in advice)
    assert advice[2][1] == pytest.approx(
        estimate(replace(config, kl_beta=0.0)).peak / 2**30, abs=0.01
    )


def test_advice_that_saves_less_than_a_hundredth_is_not_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "free_memory", gib(1))

    def estimate(config: SFTConfig) -> MemoryEstimate:
        return MemoryEstimate({"weights": 2**31}, {}, {"rows": config.micro_batch_size * 2**20})

    config = SFTConfig(micro_batch_size=100)
    changes = tuple({"micro_batch_size": size} for size in (90, 70))
    monkeypatch.setattr(memory, "LESS_MEMORY", changes)
    with pytest.raises(ValueError) as caught:
        check_memory(estimate, config, torch.device("cpu"))
    assert caught.value.__notes__[0].splitlines()[-3:-1] == [
        "GiB with", "      2.07  --micro-batch-size 70",
    ]  # fmt: skip
    monkeypatch.setattr(memory, "LESS_MEMORY", changes[:1])
    with pytest.raises(ValueError) as caught:
        check_memory(estimate, config, torch.device("cpu"))
    assert "GiB with" not in caught.value.__notes__[0]


def test_advice_for_a_resumed_run_can_be_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps its adapters: another rank would be refused next."""
    monkeypatch.setattr(memory, "free_memory", gib(1))

    def estimate(config: GRPOConfig) -> MemoryEstimate:
        rows = config.micro_batch_size + config.rows_per_batch
        return MemoryEstimate({"weights": 2**40 >> config.lora_rank}, {"rows": rows * 2**32}, {})

    found = []
    for resume in (False, True):
        with pytest.raises(ValueError) as caught:
            config = GRPOConfig(resume=resume)
            check_memory(estimate, config, torch.device("cpu"))
        found.append(caught.value.__notes__[0].count)
    assert found[0]("--lora-rank") > 0 == found[1]("--lora-rank")
    assert all(found[1](flag) > 0 for flag in ("--rows-per-batch 16\n", "--micro-batch-size 1 "))


def test_what_fits_is_a_table_of_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = MemoryEstimate({"weights": 2**30, "reference": 0}, {"KV cache": 2**31}, {"a": 2**29})
    monkeypatch.setattr(memory, "free_memory", gib(3.5))
    text = check_memory(lambda config: estimate, SFTConfig(), torch.device("cpu"))
    assert text.splitlines() == [
        "memory estimate: 3.00 of the 3.50 GiB free on cpu, the larger of sampling and update "
        "beside the model",
        "  model         1.00  weights 1.00",
        "  sampling      2.00  KV cache 2.00",
        "  update        0.50  a 0.50",
    ]
    monkeypatch.setattr(memory, "free_memory", gib(2.99))
    with pytest.raises(ValueError, match=r"got 3\.00 of the 2\.99 GiB"):
        check_memory(partial(lambda config: estimate), SFTConfig(), torch.device("cpu"))


def test_one_flag_gets_past_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = MemoryEstimate({"weights": 2**31}, {}, {})

    def checked(kind: str) -> str:
        config = SFTConfig(memory_check=kind)
        return check_memory(lambda config: estimate, config, torch.device("cpu"))

    monkeypatch.setattr(memory, "free_memory", gib(1))
    warned = checked("warn").splitlines()
    assert warned[0] == "warning: it may end without memory"
    assert warned[1] == "the run must fit into memory, got 2.00 of the 1.00 GiB free on cpu"
    monkeypatch.setattr(memory, "free_memory", gib(3))
    assert checked("warn") == checked("refuse")
    monkeypatch.setattr(memory, "free_memory", None)  # not even looked at
    assert checked("off") == "memory estimate: off"


def refused_with(free: tuple[float, float]) -> str:
    """What a rank is told, where ranks have so many GiB free."""
    with process_group("cpu") as device:
        memory.free_memory = gib(free[rank()])
        estimate = MemoryEstimate({"weights": 2**31}, {}, {})
        try:
            return check_memory(lambda config: estimate, SFTConfig(), device)
        except ValueError as error:
            return f"refused: {error}"


def test_the_rank_with_the_least_memory_decides_for_all() -> None:
    """A rank that went on alone would wait for the others until the time is out."""
    first, second = run_ranks(2, refused_with, (3.0, 1.0))
    assert first == second
    assert first.startswith("refused: the run must fit into memory, got 2.00 of the 1.00 GiB free")
    both = run_ranks(2, refused_with, (3.0, 4.0))
    assert all("2.00 of the 3.00 GiB free" in told for told in both)


def write(files: dict[Path, object]) -> None:
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_control_group_limits_the_free_memory(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1000 KiB available; the group has 700 left, its parent 500, of which 80 are page cache."""
    proc, groups, kib = tmp_path / "proc", tmp_path / "cgroup", 1024
    monkeypatch.setattr(memory, "PROC", proc)
    monkeypatch.setattr(memory, "CGROUPS", groups)
    write({proc / "meminfo": "MemTotal: 9999 kB\nMemAvailable: 1000 kB"})
    device = torch.device("cpu")
    assert free_memory(device) == 1000 * kib  # a kernel without control groups
    if version == 2:
        group, limit, used, cache = groups / "job/step", "memory.max", "memory.current", ""
        write({proc / "self/cgroup": "0::/job/step", groups / "memory.stat": "inactive_file 0"})
    else:
        group, cache = groups / "memory/job/step", "total_"
        limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        lines = "9:name=systemd:/\n4:cpu,memory:/job/step\n0::/"
        write({proc / "self/cgroup": lines, groups / "memory" / limit: 2**63 - 4096})
        write({groups / "memory" / used: 5, groups / "memory/memory.stat": "total_inactive_file 0"})
    for folder, most, inactive in ((group, 900 * kib, 0), (group.parent, 620 * kib, 80 * kib)):
        write({folder / limit: most, folder / used: 200 * kib})
        write({folder / "memory.stat": f"anon 7\n{cache}inactive_file {inactive}"})
    assert free_memory(device) == 500 * kib
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    assert free_memory(device) == 100 * kib
    if version == 2:
        monkeypatch.delenv("LOCAL_WORLD_SIZE")
        write({group.parent / limit: "max"})
        assert free_memory(device) == 700 * kib


def test_a_group_out_of_sight_is_limited_by_the_root_of_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    monkeypatch.setattr(memory, "PROC", proc)
    monkeypatch.setattr(memory, "CGROUPS", root)
    write({proc / "meminfo": "MemAvailable: 1000 kB", proc / "self/cgroup": "0::/of/the/host"})
    write({root / "memory.max": 4096, root / "memory.current": 96})
    write({root / "memory.stat": "inactive_file 0"})
    assert free_memory(torch.device("cpu")) == 4000


def test_a_machine_that_does_not_tell_its_free_memory_runs_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "PROC", tmp_path / "none")
    estimate = MemoryEstimate({"weights": 2**50}, {}, {})
    told = check_memory(lambda config: estimate, SFTConfig(), torch.device("cpu"))
    assert told.startswith("memory estimate: 1048576.00 GiB, free memory unknown, the larger of")


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = free_memory(torch.device("cpu"))
    assert 2**28 < alone < 2**50
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0.5 < 4 * free_memory(torch.device("cpu")) / alone < 2
