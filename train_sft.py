"""Supervised fine-tuning on LQR demonstrations: python train_sft.py [--help].

A fixed, seeded set of demonstrations, flown under noise with the answers of LQR as labels. The
checkpoint with the best greedy reward on validation starts is published in save_dir, so that GRPO
has to beat supervised training at its best.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from minigrpo.checkpoint import Manifest, load_manifest, save_batch
from minigrpo.config import Resolved, SFTConfig, Value, resolve
from minigrpo.data import (
    SFTBatch,
    Task,
    demonstrations,
    disturbances,
    keyed_generator,
    make_task,
    split_starts,
)
from minigrpo.distributed import process_group, rank, world_size
from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.hugging_face import find_pretrained, load_shape, load_transformer
from minigrpo.lqr import QuadraticCost
from minigrpo.memory import check_memory, sft_memory
from minigrpo.optim import cosine_learning_rate
from minigrpo.prompts import Codec
from minigrpo.runs import check_apart, run_command
from minigrpo.sft import smoothing_matrix, supervised_step
from minigrpo.tokenizer import (
    control_values,
    load_tokenizer,
    number_features,
    number_tokenizer,
    token_values,
)
from minigrpo.training import given_and_saved, opened, prepared
from minigrpo.transformer import Transformer, TransformerConfig, initialise

# What only a model that is made here has: tokens that are numbers, and a shape to choose.
OF_NUMBERS = ("demonstration_noise", "weight_noise", "smoothing_width", "gradient_smoothing_width")
OF_SHAPE = ("width", "mlp_width", "num_layers", "num_heads", "rope_theta", "tied_head")


def describe(config: SFTConfig) -> tuple[TransformerConfig, Task, Path | None]:
    """Shape of the model to train, its task, and the folder of its weights; None: from scratch."""
    plant, cost = DoubleIntegrator(dt=config.dt, horizon=config.horizon), QuadraticCost()
    if config.preset == "pretrained":
        folder = find_pretrained(config.model)
        if (folder / "minigrpo.json").exists() and load_manifest(folder).preset == "tiny":
            raise ValueError(
                f"model must be a pretrained one, {config.model} is a tiny model: --resume goes on "
                "with its run, train_grpo.py --init trains it by reward"
            )
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
    if folder is not None:
        return prepared(load_transformer(folder), config)
    model, generator = Transformer(shape), torch.Generator().manual_seed(config.seed)
    values = token_values(task.tokenizer, shape.vocab_size)
    initialise(model, generator, number_features(values, shape.width))
    return prepared(model, config)


def batch_of_step(data: SFTBatch, config: SFTConfig, step: int) -> SFTBatch:
    """This rank's rows of a step's batch: every epoch is its own permutation, cut into batches."""
    num_rows = config.num_demonstrations
    batches = max(1, num_rows // config.batch_size)
    epoch, place = divmod(step, batches)
    order = keyed_generator(config.seed, "batches", epoch).permutation(num_rows)
    chosen = order[place * config.batch_size : (place + 1) * config.batch_size]
    return data.rows(torch.from_numpy(chosen[rank() :: world_size()]))


def settings(arguments: Sequence[str] | None) -> Resolved[SFTConfig]:
    """What the flags and the saved run say; ValueError: it does not fit together."""
    given, saved = given_and_saved(SFTConfig, arguments)
    if given.get("model") and not saved:
        given.setdefault("preset", "pretrained")  # which that flag says
    preset = str((saved | given).get("preset", SFTConfig.preset))
    resolved = resolve(SFTConfig, given, preset, saved)
    check_preset(resolved.config, given)
    return resolved


def check_preset(config: SFTConfig, given: Mapping[str, Value]) -> None:
    """ValueError names what the preset lacks, or what it has no use for but was asked for."""
    if config.preset == "tiny":
        if config.model:
            raise ValueError(f"model must not be given with preset tiny, got {config.model}")
        if config.lora_rank:
            raise ValueError("lora_rank must be 0 with preset tiny: random weights need training")
        return
    if not config.model:
        raise ValueError(
            "model must name a folder or hub model with preset pretrained, got nothing"
        )
    for name in OF_NUMBERS:
        if (got := getattr(config, name)) > 0:
            raise ValueError(f"{name} must be 0 with preset pretrained, got {got}")
    for name in OF_SHAPE:  # every config has one, so a flag alone says that it was meant
        if name in given:
            raise ValueError(f"{name} must not be given with preset pretrained, got {given[name]}")


def training_data(config: SFTConfig, task: Task) -> SFTBatch:
    """The fixed demonstrations of this seed."""
    training = split_starts(task.plant).training
    order = keyed_generator(config.seed, "demonstrations").permutation(len(training))
    starts = training[torch.from_numpy(order[: config.num_demonstrations])]
    size, noise = config.demonstration_noise, None
    if size > 0:
        noise = disturbances(len(starts), task.plant.horizon, size, config.seed)
    return demonstrations(starts, task, noise)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the flags say; see --help."""
    resolved = settings(arguments)
    config = resolved.config
    if config.model:
        check_apart(Path(config.save_dir), "model", Path(config.model))
    shape, task, weights = describe(config)  # what it refuses leaves no folder behind
    with process_group(config.device) as device:
        # All that may refuse the run comes before --overwrite deletes the one that is there.
        estimate = partial(sft_memory, shape, task, is_on_cuda=device.type == "cuda")
        memory = check_memory(estimate, config, device)
        model = build(shape, task, weights, config)
        manifest = Manifest.of_run("sft", config.preset, task, resolved)
        with opened(config, manifest, task, model, device) as training:
            count = config.num_demonstrations
            size = min(config.batch_size, count)
            plan = f"{count} demonstrations, {config.steps} steps of {size}"
            epochs = f"{config.steps * size / count:.0f} epochs"
            training.describe([resolved.table(), memory, f"{plan} = {epochs}"])
            data = training_data(config, task)
            smoothing = None  # sharp labels
            if config.smoothing_width > 0:
                controls = control_values(task.tokenizer, shape.vocab_size, task.plant, task.codec)
                smoothing = smoothing_matrix(controls, config.smoothing_width).float().to(device)
            for step in training.steps():
                began = time.perf_counter()
                rate = cosine_learning_rate(
                    step, config.steps, config.learning_rate, config.warmup_steps
                )
                batch = batch_of_step(data, config, step).to(device)
                metrics = supervised_step(
                    model, training.optimizer, batch, smoothing, config, step, rate, training.kernel
                )
                metrics["time/step_s"] = time.perf_counter() - began
                failure = ""
                if not math.isfinite(metrics["update/grad_norm"]):
                    folder = training.run.folder
                    save_batch(folder, step + 1, batch)
                    failure = (
                        f"the gradient of step {step + 1} is not finite and was not applied; its "
                        f"batch is in {folder / 'skipped'}; lower learning_rate, then --resume"
                    )
                training.end_step(metrics, failure)


if __name__ == "__main__":
    run_command(main)
