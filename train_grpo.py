"""GRPO from an SFT checkpoint: python train_grpo.py --init ckpt/sft [--help].

    1  draw P starts and write their prompts               data.training_starts, data.make_prompts
    2  sample G completions of each                        sampling.sample_completions
    3  read the controls, simulate, score                  rollout.act
    4  compare each reward with its group's, or each       grpo.group_advantages
       control with all others there were                  rollout.choices_of
    5  log-probs of what was sampled: now, then, reference scoring.completion_scores
    6  clipped objective and KL, summed over a minibatch   grpo.grpo_loss
    7  one AdamW step for each minibatch                   update.update_policy

--measure-signal 16 trains nothing: it measures whether the gradient at --init has a direction.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

from torch import Tensor

from minigrpo.checkpoint import Manifest, load_task, save_batch
from minigrpo.config import GRPOConfig, Resolved, resolve
from minigrpo.data import Task, split_starts
from minigrpo.distributed import process_group
from minigrpo.gradient_signal import measure_signal
from minigrpo.hugging_face import load_transformer
from minigrpo.memory import check_memory, grpo_memory
from minigrpo.optim import cosine_learning_rate, linear, plateau_factor
from minigrpo.reward import RewardFunction, RewardWeights, breakdown_line, tally_rewards
from minigrpo.rollout import (
    check_batch,
    make_rollout,
    prompts_of_step,
    rollout_metrics,
    sample_records,
)
from minigrpo.runs import check_apart, run_command
from minigrpo.training import Training, given_and_saved, opened, prepared
from minigrpo.transformer import Transformer, TransformerConfig
from minigrpo.update import MAX_SKIPPED_IN_A_ROW, skipped_in_a_row, update_policy, warnings_of


def batch_arithmetic(config: GRPOConfig) -> str:
    """How prompts become optimizer steps, in one line; and why the loss looks like nothing."""
    rows = config.prompts_per_step * config.group_size
    updates = config.num_epochs * config.num_minibatches
    expect = "the ratio is 1 in the first of them, and the loss stays near 0"
    if updates == 1:
        expect = "the ratio is 1 and the loss near 0 by construction"
    return (
        f"{config.prompts_per_step} prompts x {config.group_size} = {rows} completions a step -> "
        f"{updates} optimizer step(s) of {rows // config.num_minibatches}: {expect}, "
        "watch grad_norm"
    )


def reward_function(
    config: GRPOConfig, task: Task, final_errors: Sequence[float] = ()
) -> RewardFunction:
    """The reward that the flags describe; `final_errors` of the steps so far, for its rate."""
    rate = RewardWeights.terminal_rate
    if config.adaptive_terminal and final_errors:
        rate = 1 / max(0.01, fmean(final_errors[-10:]))
    weights = RewardWeights(
        baseline=config.reward_baseline,
        progress=config.reward_progress,
        proximity=config.reward_proximity,
        terminal=config.reward_terminal,
        terminal_rate=rate,
        efficiency=config.reward_efficiency,
        smoothness=config.reward_smoothness,
        lqr=config.reward_lqr,
        constraints=config.reward_constraints,
        constraints_cap=config.reward_constraints_cap,
        validity=config.reward_validity,
    )
    horizon = task.plant.horizon
    return partial(tally_rewards, kind=config.reward, horizon=horizon, weights=weights)


def build(config: GRPOConfig) -> Transformer:
    """The model of --init, with adapters if it gets any."""
    return prepared(load_transformer(Path(config.init)), config)


def schedules(
    config: GRPOConfig, task: Task, step: int, training: Training
) -> tuple[GRPOConfig, float, RewardFunction]:
    """Settings of the acting policy, learning rate and reward of one step."""
    scheduled = config
    if config.final_temperature:
        ends = config.temperature, config.final_temperature
        scheduled = replace(config, temperature=linear(step, config.steps - 1, *ends))
    rate = cosine_learning_rate(
        step, config.steps, config.learning_rate, config.warmup_steps, config.decay_steps
    )
    rate *= plateau_factor(training.column("reward/total"), config.plateau_patience)
    return scheduled, rate, reward_function(config, task, training.column("rollout/final_error"))


def settings(
    arguments: Sequence[str] | None,
) -> tuple[Resolved[GRPOConfig], TransformerConfig, Task, Manifest]:
    """What the flags, the saved run and the folder of --init say; ValueError: they disagree."""
    given, saved = given_and_saved(GRPOConfig, arguments)
    asked = saved | given
    save_dir = Path(str(given.get("save_dir", GRPOConfig.save_dir)))
    init = Path(str(asked.get("init", GRPOConfig.init)))
    started = Path(str(saved.get("init", init)))
    if not given.get("measure_signal"):  # which writes nothing
        check_apart(save_dir, "init", init)
    if saved and "init" not in given and not started.exists():
        raise ValueError(f"{save_dir} began from {started}, which is not here: --init says where")
    # One that was moved since, or is relative to another folder, is known by its tokens and, as KL
    # reference or below adapters, by its weights.
    if started.exists() and started.resolve() != init.resolve():
        raise ValueError(f"init must be {started} to resume {save_dir}, got {init}")
    shape, task, origin = load_task(init)
    if asked.get("credit") == "choice" and task.codec.style != "numbers":
        raise ValueError(
            "credit must be completion with codec style words, where a control is many tokens"
        )
    resolved = resolve(GRPOConfig, given, origin.preset, saved)
    if resolved.config.credit == "choice" and task.plant.start_bound > task.plant.control_bound:
        raise ValueError(
            "credit must be completion where start_bound is above control_bound: an answer could "
            "hold numbers of prompts, which have no value as a control"
        )
    if resolved.config.gradient_smoothing_width > 0 and task.codec.style != "numbers":
        raise ValueError("gradient_smoothing_width must be 0 with codec style words")
    return resolved, shape, task, origin


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the flags say; see --help."""
    resolved, shape, task, origin = settings(arguments)
    config = resolved.config
    if config.measure_signal:
        measure_signal(build(config), config, task, reward_function(config, task))
        return
    with process_group(config.device) as device:
        # All that may refuse the run comes before --overwrite deletes the one that is there.
        check_batch(config)
        estimate = partial(grpo_memory, shape, task, is_on_cuda=device.type == "cuda")
        memory = check_memory(estimate, config, device)
        model, reference = build(config), None
        if config.kl_beta > 0:  # with adapters it is the same model, seen without them
            reference = model if config.lora_rank else build(config)
        manifest = Manifest.of_run("grpo", origin.preset, task, resolved)
        with opened(config, manifest, task, model, device, reference) as training:
            training.describe([resolved.table(), memory, batch_arithmetic(config)])
            starts, num_skipped = split_starts(task.plant).training, 0
            for step in training.steps():
                metrics, skipped = rollout_and_update(training, config, starts, step)
                num_skipped = skipped_in_a_row(num_skipped, skipped)
                failure = ""
                if num_skipped == MAX_SKIPPED_IN_A_ROW:
                    failure = (
                        f"{num_skipped} optimizer steps in a row had a gradient that is not "
                        f"finite; their batches are in {training.run.folder / 'skipped'}; lower "
                        "learning_rate, then --resume"
                    )
                training.end_step(metrics, failure)


def rollout_and_update(
    training: Training, config: GRPOConfig, starts: Tensor, step: int
) -> tuple[dict[str, float], list[bool]]:
    """One step: its metrics, and of each optimizer step whether it was skipped.

    Samples are logged, and a batch of which a step was skipped is kept.
    """
    began = time.perf_counter()
    model, task, run = training.model, training.task, training.run
    scheduled, rate, reward = schedules(config, task, step, training)
    prompts, places = prompts_of_step(starts, config, task, step)
    rollout, experience, seconds = make_rollout(
        model, training.reference, prompts, places, scheduled, task, reward
    )
    updating = time.perf_counter()
    updated, skipped = update_policy(
        model, training.optimizer, rollout, scheduled, step, rate, training.kernel
    )
    metrics = rollout_metrics(rollout, experience) | updated | seconds
    metrics["time/update_s"] = time.perf_counter() - updating
    metrics["time/step_s"] = time.perf_counter() - began
    warnings = warnings_of(metrics, config, step, training.device.type == "cuda")
    run.check_lock()  # here too, for samples are written before the step ends
    run.log_text(breakdown_line(experience.rewards, 0), *warnings)
    for record in sample_records(prompts, experience, rollout):
        run.log_sample(step + 1, record)
    if any(skipped):
        save_batch(run.folder, step + 1, rollout)
    return metrics, skipped


if __name__ == "__main__":
    run_command(main)
