"""Supervised fine-tuning on LQR demonstrations: python train_sft.py [--help].

A fixed, seeded set of demonstrations, flown under noise with the answers of LQR as labels. The
checkpoint with the best greedy reward on validation starts is published in save_dir, so that GRPO
has to beat supervised training at its best.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minigrpo.checkpoint import (
    Manifest,
    is_best,
    latest_checkpoint,
    load_trainer,
    make_task,
    prune_checkpoints,
    publish_model,
    published,
    save_batch,
    save_checkpoint,
    saved_config,
)
from minigrpo.config import SFTConfig, Value, check_saved, parse_flags, resolve
from minigrpo.data import (
    SFTBatch,
    Task,
    demonstrations,
    disturbances,
    keyed_generator,
    prompt_length,
    split_starts,
)
from minigrpo.distributed import (
    any_rank,
    check_equal_weights,
    gathered,
    local_world_size,
    place_model,
    process_group,
    rank,
    world_size,
)
from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.evaluation import DECODED_ROWS, validation_metrics
from minigrpo.lora import add_adapters
from minigrpo.lqr import QuadraticCost
from minigrpo.memory import MemoryEstimate, Workload, check_memory, memory_estimate
from minigrpo.optim import adamw, cosine_learning_rate
from minigrpo.prompts import Codec
from minigrpo.runs import StopSignal, open_run, run_command
from minigrpo.sft import smoothing_matrix, supervised_step
from minigrpo.tokenizer import load_tokenizer, number_features, number_tokenizer, token_values
from minigrpo.transformer import (
    Transformer,
    TransformerConfig,
    find_pretrained,
    initialise,
    load_shape,
    load_transformer,
)

LESS_MEMORY: tuple[dict[str, Value], ...] = (  # changes, each of which may make a run fit
    {"micro_batch_size": 1},
    {"gradient_checkpointing": True},
    {"lora_rank": 16},
    {"parallel": "fsdp"},
    {"eval_cases": 16},
    {"micro_batch_size": 1, "gradient_checkpointing": True, "lora_rank": 16, "eval_cases": 16},
)


def describe(config: SFTConfig) -> tuple[TransformerConfig, Task, Path | None]:
    """Shape of the model to train, its task, and the folder of its weights; None: from scratch."""
    plant, cost = DoubleIntegrator(dt=config.dt, horizon=config.horizon), QuadraticCost()
    if config.preset == "pretrained":
        folder = find_pretrained(config.model)
        codec, shape = Codec(style="words", decimals=3), load_shape(folder)
        tokenizer = load_tokenizer(folder, shape.vocab_size)
        return shape, make_task(plant, cost, codec, tokenizer), folder
    codec = Codec(style="numbers", decimals=2)
    tokenizer = number_tokenizer(plant, codec)
    shape = TransformerConfig(
        model_type="llama",
        vocab_size=len(tokenizer),
        width=config.width,
        mlp_width=config.mlp_width,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_heads,
        head_size=config.width // config.num_heads,
        rope_theta=config.rope_theta,
        tied_head=config.tied_head,
    )
    return shape, make_task(plant, cost, codec, tokenizer), None


def build(
    shape: TransformerConfig, task: Task, folder: Path | None, config: SFTConfig
) -> Transformer:
    """The model to train: its own weights, or random ones, and adapters if it gets any."""
    generator = torch.Generator().manual_seed(config.seed)
    if folder is None:
        model = Transformer(shape)
        values = token_values(task.tokenizer, shape.vocab_size)
        initialise(model, generator, number_features(values, shape.width))
    else:
        model = load_transformer(folder)
    add_adapters(model, config.lora_rank, config.lora_alpha, config.lora_targets, generator)
    model.gradient_checkpointing, model.is_fused = config.gradient_checkpointing, config.fuse
    return model


def estimate_memory(
    shape: TransformerConfig, task: Task, config: SFTConfig, is_on_cuda: bool = False
) -> MemoryEstimate:
    """What a step and a validation of this run take on one rank."""
    decoded = min(config.eval_cases, DECODED_ROWS)
    work = Workload(
        prompt_length=prompt_length(task),
        completion_length=task.max_completion_length,
        micro_rows=min(config.micro_batch_size, math.ceil(config.batch_size / world_size())),
        num_decoded=decoded,
        num_prefilled=decoded,
        is_perturbed=config.weight_noise > 0,
        is_on_cuda=is_on_cuda,
    )
    return memory_estimate(shape, config, work, world_size(), local_world_size())


def batch_of_step(data: SFTBatch, config: SFTConfig, step: int, num_rows: int) -> SFTBatch:
    """This rank's rows of a step's batch: every epoch is its own permutation, cut into batches."""
    batches = max(1, num_rows // config.batch_size)
    epoch, place = divmod(step, batches)
    order = keyed_generator(config.seed, "batches", epoch).permutation(num_rows)
    chosen = order[place * config.batch_size : (place + 1) * config.batch_size]
    return data.rows(torch.from_numpy(chosen[rank() :: world_size()]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the flags say; see --help."""
    given = parse_flags(SFTConfig, arguments)
    save_dir = Path(str(given.get("save_dir", SFTConfig.save_dir)))
    saved = saved_config(save_dir) if given.get("resume") else None
    if saved is not None:
        check_saved(SFTConfig, saved)
    named = given.get("preset") or (saved or {}).get("preset")
    preset = str(named or ("pretrained" if given.get("model") else "tiny"))
    resolved = resolve(SFTConfig, {**given, "preset": preset}, preset, saved)
    config = resolved.config
    if config.preset == "pretrained" and not config.model:
        raise ValueError(
            "model must name a folder or hub model with preset pretrained, got nothing"
        )
    if config.lora_rank and config.preset == "tiny":
        raise ValueError("lora_rank must be 0 with preset tiny: random weights need training")
    for name in ("demonstration_noise", "weight_noise"):
        if getattr(config, name) > 0 and config.preset == "pretrained":
            raise ValueError(
                f"{name} must be 0 with preset pretrained, got {getattr(config, name)}"
            )
    if config.width % config.num_heads:
        raise ValueError(
            f"width must be a multiple of num_heads={config.num_heads}, got {config.width}"
        )
    torch.set_float32_matmul_precision(config.matmul_precision)
    folder = Path(config.save_dir)
    with (
        process_group(config.device) as device,
        open_run(folder, config.overwrite, config.resume, config.tensorboard) as run,
        StopSignal(folder, config.stop_after_minutes) as stop,
    ):
        shape, task, weights = describe(config)
        estimate = partial(estimate_memory, shape, task, is_on_cuda=device.type == "cuda")
        memory = check_memory(estimate, config, LESS_MEMORY, device)
        manifest = Manifest(
            "sft",
            config.preset,
            task.plant,
            task.cost,
            task.codec,
            vars(config).copy(),
            resolved.sources,
        )
        model = build(shape, task, weights, config)
        place_model(model, model.blocks, device, config.parallel)
        optimizer = adamw(
            model, config.learning_rate, (0.9, config.adam_beta2), config.weight_decay
        )
        start = latest_checkpoint(folder) if config.resume else None
        done = int(load_trainer(start, model, optimizer, manifest)["step"]) if start else 0
        run.record_attempt(vars(config), device)
        split = split_starts(task.plant)
        order = keyed_generator(config.seed, "demonstrations").permutation(len(split.training))
        starts = split.training[torch.from_numpy(order[: config.num_demonstrations])]
        scale, horizon = config.demonstration_noise, task.plant.horizon
        noise = disturbances(len(starts), horizon, scale, config.seed) if scale > 0 else None
        data = demonstrations(starts, task, noise)
        validation = split.validation[: config.eval_cases]
        smoothing: Tensor | None = None
        if config.smoothing_width > 0 and task.codec.style == "numbers":
            values = token_values(task.tokenizer, model.config.vocab_size)
            smoothing = smoothing_matrix(values, config.smoothing_width).float().to(device)
        if rank() == 0:
            print(resolved.table())
            print(memory)
            sizes = f"{model.num_parameters():,} parameters, {model.num_trained():,} trained"
            print(f"device {device}, {world_size()} rank(s), {sizes}")
            epochs = config.steps * config.batch_size / config.num_demonstrations
            print(
                f"{config.num_demonstrations} demonstrations, {config.steps} steps of "
                f"{config.batch_size} = {epochs:.0f} epochs"
            )

        def evaluate(step: int) -> dict[str, float]:
            with gathered(model):
                metrics = validation_metrics(model, validation, task, config.seed)
            if is_best(folder, metrics["eval/greedy_reward"]):
                publish_model(folder, model, task, manifest, step, metrics["eval/greedy_reward"])
            return metrics

        run.start(done if start else -1, config.steps)
        if not start:
            run.log(0, evaluate(0))
        stopped = False
        for step in range(done, config.steps):
            began = time.perf_counter()
            rate = cosine_learning_rate(
                step, config.steps, config.learning_rate, config.warmup_steps
            )
            batch = batch_of_step(data, config, step, config.num_demonstrations).to(device)
            metrics = supervised_step(model, optimizer, batch, smoothing, config, step, rate)
            metrics["time/step_s"] = time.perf_counter() - began
            if not math.isfinite(metrics["update/grad_norm"]):
                save_batch(folder, step + 1, batch)
                raise FloatingPointError(
                    f"the gradient of step {step + 1} is not finite and was not applied; its batch "
                    f"is in {folder / 'skipped'}; lower learning_rate, then --resume"
                )
            last = step + 1 == config.steps
            stopped = any_rank(stop.requested())
            if last or (step + 1) % config.eval_every == 0:
                metrics |= evaluate(step + 1)
            run.log(step + 1, metrics)
            if config.sync_check and (step + 1) % config.sync_check == 0:
                check_equal_weights(model)
            if last or stopped or (step + 1) % config.save_every == 0:
                save_checkpoint(
                    folder, step + 1, model, optimizer, task, manifest, {"step": step + 1}
                )
                prune_checkpoints(folder, config.keep_last)
            if stopped:
                break
        run.finish("stopped" if stopped and step + 1 < config.steps else "finished")
        if rank() == 0 and (best := published(folder)):
            print(f"best validation reward {best[1]:.2f} at step {best[0]}, published in {folder}")


if __name__ == "__main__":
    run_command(main)
