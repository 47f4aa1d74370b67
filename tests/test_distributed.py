"""Several ranks are one: the same sums, gradients, completions and metrics, and the same end.

Processes are real and talk over gloo. The gradients are compared in float64, where only the order
of additions differs; whole runs are float32.
"""

import contextlib
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from ranks import free_port, run_ranks, start_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

import evaluate
import train_grpo
import train_sft
from minigrpo import checkpoint, distributed, gradient_signal, scoring, training
from minigrpo.config import GRPOConfig, SFTConfig
from minigrpo.data import SFTBatch
from minigrpo.distributed import (
    any_rank,
    check_equal_weights,
    collected,
    gather_rows,
    gathered,
    gradient_norm,
    max_over_ranks,
    place_model,
    process_group,
    rank,
    reduce_gradients,
    scale_gradient,
    sum_over_ranks,
    whole,
    world_size,
)
from minigrpo.optim import adamw
from minigrpo.rollout import Rollout
from minigrpo.runs import run_command
from minigrpo.sft import smoothing_matrix, supervised_step
from minigrpo.transformer import Transformer, TransformerConfig, logits
from minigrpo.update import update_policy

ROOT = Path(__file__).parents[1]
PROMPTS, GROUP, LENGTH, VOCAB = 5, 2, 7, 13
SHAPE = TransformerConfig(
    model_type="qwen2", vocab_size=VOCAB, width=8, mlp_width=12, num_layers=2, num_heads=2,
    num_kv_heads=1, head_size=4,
)  # fmt: skip
SFT_FLAGS = (
    "--width 16 --mlp-width 32 --num-heads 2 --num-layers 1 --horizon 5 --num-demonstrations 23 "
    "--steps 3 --batch-size 5 --micro-batch-size 2 --eval-every 2 --eval-cases 8 --device cpu"
).split()
GRPO_FLAGS = (
    "--steps 3 --prompts-per-step 6 --group-size 3 --num-epochs 2 --num-minibatches 2 "
    "--micro-batch-size 2 --rows-per-batch 3 --eval-every 2 --eval-cases 8 --top-p 0.9 "
    "--learning-rate 1e-2 --advantage-std batch --device cpu"
).split()


def make_model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(SHAPE).double()


def agreements() -> dict[str, object]:
    with process_group("cpu"):
        me = rank()
        counted = torch.tensor([1.0, 10.0**me])
        mine = [torch.full((me,), float(i)) for i in range(2 - me % 2)]
        return {
            "sum": sum_over_ranks(counted).tolist(),
            "kept": counted.tolist(),
            "max": max_over_ranks(-me),
            "last says yes": any_rank(me == world_size() - 1),
            "all say no": any_rank(False),
            "rows": [[row.tolist() for row in rows] for rows in gather_rows(mine)],
        }


@pytest.mark.parametrize(("capability", "calls"), [((9, 0), []), ((10, 0), [False]), ((12, 0), [])])
def test_attention_that_is_wrong_on_a_gpu_is_switched_off_there(monkeypatch, capability, calls):
    called: list[bool] = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", called.append)
    with process_group("cuda") as device:
        assert device == torch.device("cuda") and called == calls


def test_a_rank_has_its_own_gpu_before_anything_is_asked_of_one(monkeypatch) -> None:
    """And leaves the group unless it failed; without a GPU `auto` is the CPU, and cuda refused."""
    calls: list[object] = []
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda gpu: calls.append(gpu) or (9, 0)
    )
    dist = distributed.dist
    monkeypatch.setattr(
        dist, "init_process_group", lambda *given, **named: calls.append((*given, named))
    )
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("left"))
    own = torch.device("cuda", 1)
    with process_group("auto") as device:
        assert device == own
    begun = [own, own, ("cuda:nccl,cpu:gloo", {"timeout": distributed.TIMEOUT})]
    assert calls == [*begun, "left"]
    calls.clear()
    with pytest.raises(ZeroDivisionError), process_group("cuda"):
        raise ZeroDivisionError
    assert calls == begun
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with process_group("auto") as device:
        assert device == torch.device("cpu")
    assert calls[3:] == [("gloo", {"timeout": distributed.TIMEOUT}), "left"]
    with pytest.raises(ValueError, match="got cuda: torch sees no GPU"), process_group("cuda"):
        pass


def test_ranks_that_do_not_reach_each_other_are_told_which_variable_names_the_network(
    monkeypatch,
) -> None:
    """As gloo says it where a host's own name stands for 127.0.1.1."""
    refused = "Gloo connectFullMesh failed with Connection refused, remote=[127.0.1.1]:26503"

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(refused)

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(torch.distributed, "init_process_group", fail)
    with pytest.raises(OSError) as caught, process_group("cpu"):
        pass
    assert refused in str(caught.value) and "export GLOO_SOCKET_IFNAME=" in str(caught.value)


def test_every_rank_hears_of_all() -> None:
    found = {world: run_ranks(world, agreements) for world in (1, 2, 3)}
    rows = [[[], []], [[0.0]], [[0.0, 0.0], [1.0, 1.0]]]
    for world, sums in {1: [1, 1], 2: [2, 11], 3: [3, 111]}.items():
        for me, got in enumerate(found[world]):
            assert got == {
                "sum": sums,
                "kept": [1, 10**me],
                "max": 0,
                "last says yes": True,
                "all say no": False,
                "rows": rows[:world],
            }


def gradients_of_ranks() -> dict[str, object]:
    """Parameter i has gradient i + 10 rank on the even ranks alone; one parameter is frozen."""
    with process_group("cpu"):
        model = make_model()
        model.norm.weight.requires_grad_(False)
        for i, parameter in enumerate(model.parameters()):
            if rank() % 2 == 0 and parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, i + 10.0 * rank())
        reduce_gradients(model)
        norm = gradient_norm(model)
        scale_gradient(model, 0.5)
        gradients = [parameter.grad for parameter in model.parameters()]
        values = [[] if grad is None else grad.unique().tolist() for grad in gradients]
        shapes = [
            grad is None or grad.shape == p.shape
            for grad, p in zip(gradients, model.parameters(), strict=True)
        ]
        return {"norm": norm, "values": values, "shapes": all(shapes)}


def test_one_rank_of_torchrun_copies_no_gradient(monkeypatch) -> None:
    """`memory.memory_estimate` counts a second copy for several ranks alone."""
    named = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": free_port()}
    for name, value in named.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    model = torch.nn.Linear(3, 2)
    with process_group("cpu"):
        model(torch.ones(1, 3)).sum().backward()
        before = [parameter.grad.data_ptr() for parameter in model.parameters()]
        reduce_gradients(model)
        assert [parameter.grad.data_ptr() for parameter in model.parameters()] == before


def test_gradients_are_added_and_a_rank_without_any_joins() -> None:
    model = make_model()
    sizes = [p.numel() for p in model.parameters()]
    frozen = [name for name, _ in model.named_parameters()].index("norm.weight")
    for world in (1, 2, 3):
        sums = [float(i) if world < 3 else 2 * i + 20.0 for i in range(len(sizes))]
        norm = math.sqrt(
            sum(n * s * s for i, (n, s) in enumerate(zip(sizes, sums, strict=True)) if i != frozen)
        )
        for got in run_ranks(world, gradients_of_ranks):
            assert got["norm"] == pytest.approx(norm, rel=1e-6)
            assert got["values"] == [[] if i == frozen else [s / 2] for i, s in enumerate(sums)]
            assert got["shapes"]


def make_rollout(places: Tensor) -> Rollout:
    """These prompts' rows of a made-up rollout of lengths 1 to C, padded to the share's longest."""
    generator = torch.Generator().manual_seed(1)
    shape = (PROMPTS * GROUP, LENGTH)
    tokens = torch.randint(VOCAB, shape, generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (shape[0], 1), generator=generator)
    others = torch.randint(VOCAB - 1, (*shape, 3), generator=generator)
    others += others >= tokens.unsqueeze(
        -1
    )  # a support has no token twice; here, not the taken one
    old, reference = (-3 * torch.rand(shape, generator=generator).double() for _ in range(2))
    prompts = torch.randint(VOCAB, (PROMPTS, 3), generator=generator)
    rows = torch.cat([torch.arange(GROUP) + place * GROUP for place in places.tolist()])
    width = int(lengths[rows].max())
    return Rollout(
        prompt_tokens=prompts[places],
        prompt_mask=(torch.arange(3) >= (places % 2).unsqueeze(-1)),
        completion_tokens=tokens[rows, :width],
        completion_mask=(torch.arange(LENGTH) < lengths)[rows, :width],
        support=torch.cat([tokens.unsqueeze(-1), others], dim=-1)[rows, :width].int(),
        sampling_logprobs=old[rows, :width],
        old_logprobs=old[rows, :width],
        ref_logprobs=reference[rows, :width],
        rewards=torch.arange(shape[0]).double()[rows],
        advantages=torch.randn(shape[0], generator=generator).double()[rows],
        prompt_places=places,
        group_size=GROUP,
        max_length=LENGTH,
    )


def grpo_gradients(
    variants: list[GRPOConfig], nodes: int = 1, is_padded: bool = True
) -> dict[str, object]:
    """The gradient of every optimizer step at the first weights, and what two updates then do."""
    found: dict[str, object] = {}
    with process_group("cpu") as device:
        os.environ["LOCAL_WORLD_SIZE"] = str(world_size() // nodes)
        for i, config in enumerate(variants):
            rollout, model = make_rollout(torch.arange(rank(), PROMPTS, world_size())), make_model()
            if not is_padded:
                rollout = replace(rollout, prompt_mask=torch.ones_like(rollout.prompt_mask))
            place_model(model, model.blocks, device, config.parallel)
            frozen, seen = torch.optim.SGD(model.parameters()), []

            def record(*_: object, model: Transformer = model, seen: list[Tensor] = seen) -> None:
                parts = [whole(p.grad).flatten() for p in model.parameters() if p.grad is not None]
                seen.append(torch.cat(parts))

            frozen.register_step_pre_hook(record)
            update_policy(model, frozen, rollout, replace(config, max_grad_norm=1e9), 0, 0.0)
            found[f"gradients {i}"] = torch.stack(seen)
            optimizer = adamw(model, 1e-2, (0.9, 0.99), 0.1)
            kernel = smoothing_matrix(torch.arange(VOCAB).double(), 0.7)
            for step in range(2):
                report, _ = update_policy(model, optimizer, rollout, config, step, 1e-2, kernel)
                found[f"metrics {i} {step}"] = torch.tensor([*report.values()]).double()
            weights = [whole(parameter.detach()).flatten() for parameter in model.parameters()]
            found[f"weights {i}"] = torch.cat(weights)
    return found


def assert_close(got: dict[str, object], expected: dict[str, object], tolerance: float) -> None:
    """Within the tolerance times the largest entry."""
    assert got.keys() == expected.keys()
    for name, wanted in expected.items():
        value = got[name]
        assert isinstance(value, Tensor) and isinstance(wanted, Tensor)
        error = float((value - wanted).abs().max() / wanted.abs().max())
        assert error <= tolerance, f"{name}: {error}"


def shared_gradients(variants: list[GRPOConfig]) -> dict[str, object]:
    """`grpo_gradients` where a prompt goes once through the model for its group."""
    scoring.SHARED_FROM = 1
    return grpo_gradients(variants, is_padded=False)


def test_shared_prompts_are_the_same_on_any_number_of_ranks() -> None:
    """And the drift that `target_kl` looks at, one of the metrics, is that of all ranks."""
    config = GRPOConfig(
        prompts_per_step=PROMPTS, group_size=GROUP, num_minibatches=3, micro_batch_size=GROUP,
        temperature=0.7, kl_beta=0.1, target_kl=1e9,
    )  # fmt: skip
    (alone,) = run_ranks(1, shared_gradients, [config])
    for parallel, world in (("ddp", 2), ("ddp", 3), ("fsdp", 2)):
        for got in run_ranks(world, shared_gradients, [replace(config, parallel=parallel)]):
            assert_close(got, alone, 1e-6)


def test_the_policy_update_is_the_same_on_any_number_of_ranks() -> None:
    """5 prompts, 2 minibatches of 3 and 2: of 3 ranks the last has no rows in the second."""
    config = GRPOConfig(
        prompts_per_step=PROMPTS, group_size=GROUP, num_epochs=2, num_minibatches=2,
        micro_batch_size=3, temperature=0.7, kl_beta=0.1,
    )  # fmt: skip
    variants = [replace(config, aggregation=kind) for kind in ("grpo", "dapo", "dr_grpo")]
    variants.append(replace(config, micro_batch_size=1))
    alone = run_ranks(1, grpo_gradients, variants)[0]
    first, other = alone["gradients 0"], alone["gradients 1"]
    assert isinstance(first, Tensor) and isinstance(other, Tensor)
    assert len(first) == 4 and not torch.allclose(first, other, rtol=0.1)
    for world in (2, 3):
        for got in run_ranks(world, grpo_gradients, variants):
            assert_close(got, alone, 1e-6)
    (alone,) = run_ranks(1, grpo_gradients, variants[-1:])
    sharded = [replace(variants[-1], parallel="fsdp")]  # the rank with more rows decides how often
    for world, nodes in ((3, 1), (4, 2)):  # 8 rows do not divide by 3
        for got in run_ranks(world, grpo_gradients, sharded, nodes):
            assert_close(got, alone, 1e-6)


def copies_that_part() -> list[str]:
    """What the check says of equal copies, and after the last rank's third weight moved a bit."""
    said = []
    with process_group("cpu"):
        model = make_model().float()
        name, weight = list(model.named_parameters())[2]
        for nudge in (0, 1):
            if rank() == world_size() - 1:
                weight.data.view(torch.int32).flatten()[0] += nudge
            try:
                check_equal_weights(model)
                said.append("equal")
            except RuntimeError as error:
                said.append(str(error).replace(name, "it"))
    return said


def test_copies_of_the_weights_that_differ_by_a_bit_are_an_error_on_every_rank() -> None:
    assert run_ranks(1, copies_that_part) == [["equal", "equal"]]
    found = zip(run_ranks(3, copies_that_part), ("0 and 2", "1 and 2", "2 and 0"), strict=True)
    for said, pair in found:
        assert said == ["equal", f"it differs between ranks {pair}"]


def held_numbers(nodes: int = 1) -> list[int]:
    """How many numbers of the model this rank holds: at first, while sampling, afterwards, and in
    the host's memory when the model is saved."""
    with process_group("cpu") as device:
        os.environ["LOCAL_WORLD_SIZE"] = str(world_size() // nodes)
        model = make_model()
        place_model(model, model.blocks, device, "fsdp")

        def count() -> int:
            local = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
            return sum(parameter.numel() for parameter in local)

        def in_a_step() -> int:
            """Between forward and backward."""
            outputs = model(torch.zeros(1, 2, dtype=torch.int64), None, None, logits)
            held = count()
            outputs.sum().backward()
            return held

        counts, usual = [count()], in_a_step()
        with contextlib.suppress(ZeroDivisionError), gathered(model):
            counts.append(count())
            _ = 1 / 0
        assert in_a_step() == usual
        saved = collected(model.state_dict().items()).values()
        shards = [p for p in model.parameters() if isinstance(p, DTensor)]
        assert all(shard.device_mesh.ndim == nodes for shard in shards)
        return [*counts, count(), sum(v.numel() for v in saved if not isinstance(v, DTensor))]


def test_a_sharded_model_is_whole_only_while_sampling() -> None:
    full = make_model().num_parameters()
    assert run_ranks(1, held_numbers) == [[full] * 4]  # nobody to share with
    held = run_ranks(2, held_numbers)
    assert [counts[1] for counts in held] == [full, full]
    assert sum(counts[0] for counts in held) == full and max(held)[0] < 0.6 * full
    assert [counts[2] for counts in held] == [counts[0] for counts in held]
    assert [counts[3] for counts in held] == [full, 0]
    held = run_ranks(4, held_numbers, 2)  # each of two nodes has a whole one
    assert sum(counts[0] for counts in held) == 2 * full and max(held)[0] < 0.6 * full


def supervised_steps(config: SFTConfig) -> dict[str, object]:
    """Three steps on uneven rows; in the last the third of three ranks has none."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (11, LENGTH), generator=generator)
    places = torch.arange(LENGTH).expand(11, LENGTH)
    ends = torch.randint(3, LENGTH + 1, (11, 1), generator=generator)
    data = SFTBatch(tokens, tokens, places < ends, (places >= 2) & (places < ends))
    smoothing = smoothing_matrix(torch.arange(VOCAB).double(), 1.5)
    found: dict[str, object] = {}
    with process_group("cpu") as device:
        model = make_model()
        place_model(model, model.blocks, device, config.parallel)
        optimizer = adamw(model, 1e-2, (0.9, 0.99), 0.1)
        kernel = smoothing_matrix(torch.arange(VOCAB).double(), 0.7)
        for step, rows in enumerate((range(5), range(5, 9), range(9, 11))):
            batch = data.rows(torch.tensor(rows[rank() :: world_size()], dtype=torch.int64))
            metrics = supervised_step(
                model, optimizer, batch, smoothing, config, step, 1e-2, kernel
            )
            found[f"metrics {step}"] = torch.tensor([*metrics.values()]).double()
        found["weights"] = torch.cat([whole(p.detach()).flatten() for p in model.parameters()])
    return found


def test_a_supervised_step_is_the_same_on_any_number_of_ranks() -> None:
    config = SFTConfig(micro_batch_size=2)
    alone = run_ranks(1, supervised_steps, config)[0]
    for world in (2, 3):
        for parallel in ("ddp", "fsdp"):
            for got in run_ranks(world, supervised_steps, replace(config, parallel=parallel)):
                assert_close(got, alone, 1e-6)


@pytest.fixture(scope="module")
def supervised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned to write five numbers and stop, for GRPO to start from."""
    folder = tmp_path_factory.mktemp("supervised") / "sft"
    flags = [*SFT_FLAGS, "--steps", "60", "--learning-rate", "3e-2", "--batch-size", "16"]
    flags += ["--eval-every", "60", "--weight-noise", "0"]
    run_ranks(1, train_sft.main, [*flags, "--save-dir", str(folder)])
    return folder


def completions_of_run(flags: list[str]) -> dict[tuple[int, int], list[str]]:
    """What this rank sampled: (step, place of the prompt) -> texts of the group."""
    found: dict[tuple[int, int], list[str]] = {}
    make_rollout, step = train_grpo.make_rollout, 0

    def spy(*arguments: object) -> object:
        nonlocal step
        model = arguments[0]
        assert isinstance(model, Transformer)
        is_sharded = all(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert is_sharded == (world_size() > 1 and "fsdp" in flags)
        rollout, experience, seconds = make_rollout(*arguments)  # type: ignore[arg-type]
        for i, place in enumerate(rollout.prompt_places.tolist()):
            group = slice(i * rollout.group_size, (i + 1) * rollout.group_size)
            found[step, place] = experience.texts[group]
        step += 1
        return rollout, experience, seconds

    train_grpo.make_rollout = spy  # type: ignore[assignment]
    train_grpo.main(flags)
    return found


def logged(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without the times."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def assert_same_logs(got: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """float32 rounds differently in batches of other shapes, and the updates carry that on.

    A ratio next to a clip bound may be on the other side of it: shares of tokens may differ by one.
    """
    assert [sorted(line) for line in got] == [sorted(line) for line in expected]
    for line, wanted in zip(got, expected, strict=True):
        near = {name: 1e-5 for name in wanted}
        one = 1.01 / wanted.get("rollout/num_tokens", 1e9)
        near |= {name: one for name in wanted if "clip_fraction" in name or "frac_far" in name}
        for name, value in wanted.items():
            assert line[name] == pytest.approx(value, rel=1e-3, abs=near[name], nan_ok=True), name


@pytest.mark.parametrize(
    ("ways", "more"),
    [
        (((2, "ddp"), (3, "ddp"), (2, "fsdp")), []),
        (((2, "fsdp"),), ["--lora-rank", "3", "--lora-targets", "q_proj,up_proj,down_proj"]),
    ],
)
def test_a_grpo_run_is_the_same_on_any_number_of_ranks(
    ways: tuple[tuple[int, str], ...], more: list[str], supervised: Path, tmp_path: Path
) -> None:
    """Sharded too: ranks then sample different numbers of tokens with gathered parameters."""
    found, logs = {}, {}
    for way in ((1, "ddp"), *ways):
        world, parallel = way
        folder = tmp_path / parallel / str(world)
        flags = [*GRPO_FLAGS, *more, "--init", str(supervised), "--parallel", parallel]
        texts = run_ranks(world, completions_of_run, [*flags, "--save-dir", str(folder)])
        found[way] = {place: group for share in texts for place, group in share.items()}
        assert [len(share) for share in texts] == [3 * 6 // world] * world
        logs[way] = logged(folder)
    alone, log = found.pop((1, "ddp")), logs.pop((1, "ddp"))
    assert len(alone) == 3 * 6 and [line["step"] for line in log] == [0, 1, 2, 3]
    assert len({text for group in alone.values() for text in group}) > 20
    assert 0 < log[1]["rollout/frac_valid"]
    for way in found:
        assert found[way] == alone
        assert_same_logs(logs[way], log)
    ended = Path("checkpoints/step-000003/trainer.safetensors")
    got, wanted = load_file(folder / ended), load_file(tmp_path / "ddp" / "1" / ended)
    assert got.keys() == wanted.keys()  # whole, adapters too if there are any
    assert any(name.startswith("adapter.") for name in got) == bool(more)
    bases = []
    for run in (folder, tmp_path / "ddp" / "1"):
        with safe_open(run / ended, framework="pt") as file:
            bases.append(file.metadata().get("base"))
    assert bases[0] == bases[1] and bases[0]  # the digest is of whole parameters
    for name, value in wanted.items():
        assert torch.allclose(got[name], value, rtol=1e-3, atol=1e-5), name


def measurement_of_run(flags: list[str]) -> tuple[list[Tensor], str]:
    """The gradients that this rank has measured, and what it prints."""
    measure, found = gradient_signal.rollout_gradient, []

    def spy(*arguments: object) -> Tensor:
        found.append(measure(*arguments))  # type: ignore[arg-type]
        return found[-1]

    gradient_signal.rollout_gradient = spy  # type: ignore[assignment]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train_grpo.main(flags)
    return found, printed.getvalue()


def test_a_measured_signal_is_the_same_on_any_number_of_ranks(supervised: Path) -> None:
    flags = [*GRPO_FLAGS, "--init", str(supervised), "--measure-signal", "3"]
    ((alone, table),) = run_ranks(1, measurement_of_run, flags)
    first, second = run_ranks(2, measurement_of_run, flags)
    assert len(alone) == 3 and "gradients of 3 rollouts of 18 completions" in table
    assert "gradients of 3 rollouts of 18 completions" in first[1] and not second[1]
    for gradients, _ in (first, second):
        for got, wanted in zip(gradients, alone, strict=True):
            assert torch.allclose(got, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


def sees_otherwise_on_one_rank(flags: list[str]) -> None:
    """Its last bit of the mean reward differs, as by other kernels, and it sees no model published,
    as on a file system that tells it late."""
    measure, times = training.validation_metrics, itertools.count()

    def measured(*arguments: object) -> dict[str, float]:
        metrics = measure(*arguments)  # type: ignore[arg-type]
        drift = next(times) if rank() == 1 else 0  # each time it looks a little better there
        for _ in range(drift):
            higher = math.nextafter(metrics["eval/greedy_reward"], math.inf)
            metrics["eval/greedy_reward"] = higher
        return metrics

    read = checkpoint.published
    checkpoint.published = lambda folder: read(folder) if rank() == 0 else None
    training.validation_metrics = measured
    train_grpo.main(flags)


def test_ranks_that_see_scores_and_models_in_other_ways_publish_and_stop_alike(
    supervised: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    usual = "--learning-rate 1e-12 --eval-every 1 --stop-patience 2 --steps 3"
    flags = [*GRPO_FLAGS, *usual.split(), "--init", str(supervised), "--save-dir", str(folder)]
    assert start_ranks(2, sees_otherwise_on_one_rank, flags, seconds=60) == [0, 0]
    scores = {line["eval/greedy_reward"] for line in logged(folder)}
    assert len(scores) == 1 and len(logged(folder)) == 3  # no new best one in two evaluations


def test_a_supervised_run_is_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    """5 rows a step, 2 in a micro-batch: 3 ranks have 2, 2 and 1 of them."""
    for world, parallel in ((1, "ddp"), (2, "ddp"), (3, "ddp"), (3, "fsdp")):
        folder = tmp_path / parallel / str(world)
        flags = [*SFT_FLAGS, "--parallel", parallel, "--save-dir", str(folder)]
        run_ranks(world, train_sft.main, flags)
        assert_same_logs(logged(folder), logged(tmp_path / "ddp" / "1"))


def evaluation_of_run(flags: list[str]) -> str:
    """What this rank prints; pictures, which take seconds, are left out."""
    evaluate.draw_plots = lambda *_: None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluate.main(flags)
    return printed.getvalue()


def test_an_evaluation_is_the_same_on_any_number_of_ranks(supervised: Path, tmp_path: Path) -> None:
    """Three ranks have 3, 2 and 2 of the seven plans, and of two MPC starts one each and none."""
    flags = ["--model-path", str(supervised), "--num-cases", "7", "--mpc-cases", "2"]
    flags += ["--best-of", "3"]
    reports = {}
    for world in (1, 2, 3):
        folder = tmp_path / str(world)
        own = [*flags, "--device", "cpu", "--save-dir", str(folder)]
        printed = run_ranks(world, evaluation_of_run, own)
        assert "evaluation.json" in printed[0] and printed[1:] == [""] * (world - 1)
        assert sorted(path.name for path in folder.iterdir()) == ["cases.csv", "evaluation.json"]
        report = json.loads((folder / "evaluation.json").read_text())
        assert report.pop("config")["save_dir"] == str(folder)
        reports[world] = report, (folder / "cases.csv").read_text()
    assert reports[2] == reports[1] and reports[3] == reports[1]


def waits_for_a_rank_that_hangs() -> None:
    distributed.TIMEOUT = timedelta(seconds=3)
    with process_group("cpu"):
        if rank() == 1:
            time.sleep(6)
        any_rank(False)


def test_a_rank_that_hangs_ends_the_others_after_the_timeout() -> None:
    exits = start_ranks(3, waits_for_a_rank_that_hangs)
    assert all(code is not None and code > 0 for code in exits)  # by itself, and not well


def test_kill_9_of_one_rank_ends_the_job_and_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    """By the connection that closes, long before the timeout of half an hour."""
    folder = tmp_path / "run"
    flags = [*SFT_FLAGS, "--save-every", "2", "--resume", "--save-dir", str(folder)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node=2", str(ROOT / "train_sft.py"), *flags]
    command += ["--steps", "1000000"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as job:
        while not list((folder / "checkpoints").glob("step-*[0-9]")):
            assert job.poll() is None
            time.sleep(0.05)
        owner = int(json.loads((folder / "LOCK").read_text())["pid"])
        workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        (other,) = {int(pid) for pid in workers} - {owner}
        os.kill(other, signal.SIGKILL)
        errors = job.communicate(timeout=100)[1]
    assert job.returncode != 0 and "Signal 9 (SIGKILL)" in errors
    assert not Path(f"/proc/{owner}").exists()
    reached = logged(folder)[-1]["step"]
    run_ranks(1, train_sft.main, [*flags, "--steps", str(reached + 2)])
    assert [line["step"] for line in logged(folder)] == list(range(reached + 3))


def raises_on_the_second_rank() -> None:
    def work() -> None:
        with process_group("cpu"):
            assert not any_rank(False)
            if rank() == 1:
                raise ValueError("the second rank has a mistake in it")
            any_rank(False)
            sys.exit("not reached")

    run_command(work)


def test_a_rank_that_raises_ends_the_others_without_the_help_of_torchrun(tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    assert start_ranks(3, raises_on_the_second_rank, errors=errors) == [1, 2, 1]
    assert "error on rank 1: the second rank has a mistake in it" in errors.read_text()
    assert "not reached" not in errors.read_text()
