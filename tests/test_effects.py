"""Each setting of a trainer reaches what it is for: other weights, or the very same ones.

A flag that is parsed, checked, saved and then dropped would pass every other test.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import untrained_checkpoint
from torch import Tensor

import train_grpo
import train_sft
from minigrpo.config import GRPOConfig, RunSettings, SFTConfig
from minigrpo.data import Task, make_task
from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.lqr import QuadraticCost
from minigrpo.prompts import Codec
from minigrpo.rollout import prompts_of_step
from minigrpo.tokenizer import number_tokenizer
from minigrpo.training import Training

Weights = dict[str, Tensor]


class Past(Training):
    """A run of which nothing is known yet."""

    def __init__(self) -> None:
        pass

    def column(self, name: str) -> list[float]:
        return []


GRPO = (
    "--steps 3 --prompts-per-step 6 --group-size 4 --num-minibatches 2 --num-epochs 2 "
    "--learning-rate 0.003 --warmup-steps 1 --decay-steps 2 --eval-cases 8 --eval-every 3 "
    "--device cpu"
)
# Given beside a flag that has no effect without.
NEEDS = {
    "lora_alpha": "--lora-rank 2", "lora_targets": "--lora-rank 2", "support_size": "--top-p 0.9",
    "reward_constraints_cap": "--reward-constraints 50", "plateau_patience": "--steps 5",
}  # fmt: skip
GRPO_CHANGES = {
    "seed": "1", "precision": "bfloat16", "lora_rank": "2", "lora_alpha": "5",
    "lora_targets": "v_proj",
    "adam_beta2": "0.9", "max_grad_norm": "0.01", "gradient_smoothing_width": "0", "steps": "4",
    "prompts_per_step": "7", "group_size": "3", "num_epochs": "1", "num_minibatches": "3",
    "temperature": "1.3", "final_temperature": "0.7", "top_p": "0.9", "support_size": "2",
    "learning_rate": "0.04", "final_norm_rate": "3", "warmup_steps": "2",
    "decay_steps": "1", "plateau_patience": "1", "weight_decay": "0.3", "target_kl": "1e-9",
    "kl_beta": "0.1", "clip_eps_low": "0.3", "clip_eps_high": "0.3", "aggregation": "grpo",
    "advantage_std": "none", "credit": "completion", "credit_lambda": "0.3",
    "follow_policy": None, "reward": "punishment", "reward_baseline": "40", "reward_progress": "20",
    "reward_proximity": "20", "reward_terminal": "20", "adaptive_terminal": None,
    "reward_efficiency": "20", "reward_smoothness": "20", "reward_lqr": "20",
    "reward_constraints": "20", "reward_constraints_cap": "7", "reward_validity": "20",
}  # fmt: skip
SFT = (
    "--steps 3 --num-demonstrations 8 --batch-size 4 --horizon 5 --width 16 --mlp-width 16 "
    "--num-heads 2 --warmup-steps 1 --eval-cases 8 --eval-every 3 --device cpu"
)
SFT_CHANGES = {
    "seed": "1", "precision": "bfloat16", "adam_beta2": "0.9", "max_grad_norm": "0.01",
    "gradient_smoothing_width": "0", "steps": "4",
    "num_demonstrations": "7", "demonstration_noise": "0.1", "weight_noise": "0.1",
    "batch_size": "3", "learning_rate": "1e-3", "warmup_steps": "2", "weight_decay": "0.3",
    "smoothing_width": "0.1", "dt": "0.2", "horizon": "6", "width": "20", "mlp_width": "24",
    "num_layers": "1", "num_heads": "4", "rope_theta": "10", "tied_head": None,
}  # fmt: skip
# Nothing that is learned depends on these, but for rounding.
SAME = {
    "rows_per_batch": "5", "micro_batch_size": "3", "gradient_checkpointing": None,
    "eval_every": "1", "save_every": "1", "keep_last": "3", "sync_check": "1",
    "memory_check": "off", "matmul_precision": "highest", "stop_after_minutes": "9",
}  # fmt: skip
# Where the run goes and how it is started, and what this small plant has no room for; each has a
# test of its own.
ELSEWHERE = {
    "device", "fuse", "parallel", "tensorboard", "overwrite", "resume", "save_dir", "eval_cases",
    "init", "measure_signal", "stop_patience", "preset", "model", "curriculum_steps",
}  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_checkpoint(tmp_path_factory.mktemp("start") / "sft")


def weights_after(kind: type[RunSettings], start: Path, folder: Path, more: list[str]) -> Weights:
    """A short run's last weights, adapters included."""
    if kind is GRPOConfig:
        train_grpo.main([*GRPO.split(), "--init", str(start), *more, "--save-dir", str(folder)])
    else:
        train_sft.main([*SFT.split(), *more, "--save-dir", str(folder)])
    return load_file(max((folder / "checkpoints").iterdir()) / "model.safetensors")


@pytest.fixture(scope="module")
def usual(
    start: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[type[RunSettings], str], Weights]:
    """What a trainer learns with nothing changed but what a flag needs to have an effect."""

    @cache
    def found(kind: type[RunSettings], needed: str) -> Weights:
        folder = tmp_path_factory.mktemp("usual") / "run"
        return weights_after(kind, start, folder, needed.split())

    return found


def flag(kind: type[RunSettings], name: str, value: str | None) -> list[str]:
    """None: the other one of yes and no."""
    dashed = name.replace("_", "-")
    if value is None:
        return [f"--no-{dashed}" if getattr(kind, name) else f"--{dashed}"]
    return [f"--{dashed}", value]


# Adapters of random weights would learn little: the tiny preset of SFT refuses them
# (tests/test_lora.py, tests/test_pretrained.py).
OF_PRETRAINED = {"lora_rank", "lora_alpha", "lora_targets"}
CHANGES = {GRPOConfig: GRPO_CHANGES, SFTConfig: SFT_CHANGES}


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [(kind, *change) for kind, changes in CHANGES.items() for change in changes.items()],
)
def test_a_setting_changes_what_is_learned(
    kind: type[RunSettings],
    name: str,
    value: str | None,
    start: Path,
    usual: Callable[[type[RunSettings], str], Weights],
    tmp_path: Path,
) -> None:
    needed = NEEDS.get(name, "")
    more = [*needed.split(), *flag(kind, name, value)]
    changed = weights_after(kind, start, tmp_path / "run", more)
    before = usual(kind, needed)
    assert changed.keys() != before.keys() or any(
        changed[key].shape != before[key].shape or not torch.equal(changed[key], before[key])
        for key in before
    )


@pytest.mark.parametrize("kind", CHANGES)
def test_what_only_concerns_the_machine_changes_nothing_that_is_learned(
    kind: type[RunSettings],
    start: Path,
    usual: Callable[[type[RunSettings], str], Weights],
    tmp_path: Path,
) -> None:
    more = [word for name, value in SAME.items() for word in flag(kind, name, value)]
    same, before = weights_after(kind, start, tmp_path / "run", more), usual(kind, "")
    assert same.keys() == before.keys()
    # AdamW's first steps are as long as the rate whatever the gradient: there rounding shows.
    assert all(torch.allclose(same[key], before[key], rtol=0, atol=5e-5) for key in before)


@pytest.mark.parametrize("kind", CHANGES)
def test_no_setting_is_left_out_here(kind: type[RunSettings]) -> None:
    names = {item.name for item in dataclasses.fields(kind)}
    assert names <= set(CHANGES[kind]) | set(SAME) | ELSEWHERE | (OF_PRETRAINED & names)
    assert set(CHANGES[kind]) <= names


def task(horizon: int = 2) -> Task:
    plant, codec = DoubleIntegrator(horizon=horizon), Codec()
    return make_task(plant, QuadraticCost(), codec, number_tokenizer(plant, codec))


def test_each_weight_of_the_reward_is_its_own_flag() -> None:
    names = [n for n in vars(GRPOConfig()) if n.startswith("reward_")]
    config = GRPOConfig(**{n: 3.0 + i for i, n in enumerate(names)})  # type: ignore[arg-type]
    weights = train_grpo.reward_function(config, task()).keywords["weights"]
    found = {n: getattr(weights, n.removeprefix("reward_")) for n in names}
    assert found == {n: getattr(config, n) for n in names} and len(found) == 10


def test_the_terminal_rate_follows_the_last_ten_errors() -> None:
    def rate(config: GRPOConfig, errors: list[float]) -> float:
        return train_grpo.reward_function(config, task(), errors).keywords["weights"].terminal_rate

    follows = GRPOConfig(adaptive_terminal=True)
    assert rate(follows, [9.0] + [0.2] * 5 + [0.3] * 5) == pytest.approx(4.0)
    assert rate(follows, []) == rate(GRPOConfig(), [0.2] * 10) == 10.0
    assert rate(follows, [1e-9]) == 100.0


def test_the_acting_temperature_goes_to_the_final_one() -> None:
    config, training = GRPOConfig(temperature=1.5, final_temperature=0.5, steps=5), Past()
    found = [train_grpo.schedules(config, task(), k, training)[0].temperature for k in range(5)]
    assert found == pytest.approx([1.5, 1.25, 1.0, 0.75, 0.5])
    plain = replace(config, final_temperature=0.0)
    assert train_grpo.schedules(plain, task(), 4, training)[0].temperature == 1.5


def test_starts_come_from_a_square_that_grows_with_the_curriculum() -> None:
    config, grid = GRPOConfig(curriculum_steps=4, prompts_per_step=500), task().plant.start_grid()

    def furthest(config: GRPOConfig, step: int) -> float:
        prompts = prompts_of_step(grid, config, task(), step)[0]
        return float(prompts.initial_states.abs().max())

    assert [furthest(config, k) for k in (0, 2, 4)] == pytest.approx([0.2, 0.5, 0.8], abs=0.011)
    assert furthest(replace(config, curriculum_steps=0), 0) == pytest.approx(0.8, abs=0.011)
