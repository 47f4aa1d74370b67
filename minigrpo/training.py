"""What both trainers do around their steps: begin or resume, evaluate, publish, log, save, stop.

given, saved = given_and_saved(...)     the flags, and what they resume
with opened(...) as training:           the start of a run, or the state of its newest checkpoint
    for step in training.steps():
        metrics = ...                   the trainer's own work, the only thing that differs
        training.end_step(metrics)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from minigrpo.checkpoint import (
    Manifest,
    base_digest,
    base_of,
    check_tokens,
    is_best,
    latest_checkpoint,
    load_manifest,
    load_trainer,
    prune_checkpoints,
    publish_model,
    published,
    save_checkpoint,
    saved_config,
)
from minigrpo.config import (
    OF_ONE_PROCESS,
    GRPOConfig,
    SFTConfig,
    Value,
    check_saved,
    parse_flags,
)
from minigrpo.data import Task, split_starts
from minigrpo.distributed import (
    any_rank,
    check_equal_weights,
    from_rank_zero,
    gathered,
    place_model,
    rank,
    world_size,
)
from minigrpo.evaluation import validation_metrics
from minigrpo.lora import adapters, add_adapters
from minigrpo.optim import adamw, has_converged
from minigrpo.runs import RunFolder, StopSignal, open_run, set_matmul_precision, slow_bfloat16
from minigrpo.tokenizer import gradient_kernel
from minigrpo.transformer import Transformer


def given_and_saved(
    kind: type[SFTConfig] | type[GRPOConfig], arguments: Sequence[str] | None
) -> tuple[dict[str, Value], dict[str, Value]]:
    """The flags that were given and, with --resume, the settings of the run in save_dir, if any."""
    given = parse_flags(kind, arguments)
    save_dir = Path(str(given.get("save_dir", kind.save_dir)))
    stage = "sft" if kind is SFTConfig else "grpo"
    saved = saved_config(save_dir, stage) if given.get("resume") else None
    if saved is not None:
        check_saved(kind, saved, given)
    return given, saved or {}


def prepared(model: Transformer, config: SFTConfig | GRPOConfig) -> Transformer:
    """The model with adapters, if it gets any; its passes will be made as the settings say."""
    generator = torch.Generator().manual_seed(config.seed)
    add_adapters(model, config.lora_rank, config.lora_alpha, config.lora_targets, generator)
    model.gradient_checkpointing, model.is_fused = config.gradient_checkpointing, config.fuse
    return model


@contextmanager
def opened(
    config: SFTConfig | GRPOConfig,
    manifest: Manifest,
    task: Task,
    model: Transformer,
    device: torch.device,
    reference: Transformer | None = None,
) -> Iterator[Training]:
    """The run in its folder, begun or resumed; STATUS says how it ended.

    What may refuse a run comes before: --overwrite deletes the one that is there.
    KeyboardInterrupt: Ctrl-C stopped it, all is saved.
    """
    folder = Path(config.save_dir)
    with (
        open_run(folder, config.overwrite, config.resume, config.tensorboard) as run,
        StopSignal(folder, config.stop_after_minutes) as stop,
    ):
        set_matmul_precision(config.matmul_precision, device)
        training = Training(run, stop, config, manifest, task, model, device, reference)
        yield training
        training.finish()
    if stop.is_interrupted and world_size() == 1:  # torchrun fails by itself
        raise KeyboardInterrupt


@dataclass(eq=False)
class Training:
    """A run in progress. Every method is called on every rank, at the same step."""

    run: RunFolder
    stop: StopSignal
    config: SFTConfig | GRPOConfig
    manifest: Manifest
    task: Task
    model: Transformer
    device: torch.device
    reference: Transformer | None  # of the KL term

    def __post_init__(self) -> None:
        """Place the models and take the state of the newest checkpoint, if there is one to resume.

        ValueError: that is damaged, or of another task, model or KL reference.
        """
        run, model, config = self.run, self.model, self.config
        for placed in dict.fromkeys([model, self.reference or model]):
            place_model(placed, placed.blocks, self.device, config.parallel)
        rate, betas = config.learning_rate, (0.9, config.adam_beta2)
        norm_rate = config.final_norm_rate if isinstance(config, GRPOConfig) else 1.0
        self.optimizer = adamw(model, rate, betas, config.weight_decay, norm_rate)
        width, vocab_size = config.gradient_smoothing_width, model.config.vocab_size
        self.kernel = gradient_kernel(self.task.tokenizer, vocab_size, width, self.device)
        frozen = model if adapters(model) else self.reference
        self.base = None if frozen is None else base_digest(frozen)  # made once
        start = latest_checkpoint(run.folder) if config.resume else None
        self.changes: list[str] = []  # of settings, since the checkpoint
        self.is_stopped, self.done = False, -1  # finished steps; -1: nothing was evaluated yet
        if start is not None:
            check_tokens(start, self.task)
            self.done = load_trainer(start, model, self.optimizer, self.manifest, self.base)
            self.base = self.base or base_of(start)  # kept through steps without a reference
            saved = load_manifest(start).config
            self.changes = [
                f"{name} {saved[name]} -> {value}"
                for name, value in vars(config).items()
                if name not in OF_ONE_PROCESS and saved[name] != value
            ]
        run.cut_logs(self.done)
        self.history = [] if start is None else run.history()  # metrics of step 0, 1, ...
        if start is None and self.base is None and self.manifest.stage == "grpo":
            self.base = base_digest(model)  # what a reference would be, if it gets one later
        run.record_attempt(self.manifest.stage, vars(config), self.device, is_start=start is None)

    def describe(self, lines: Sequence[str]) -> None:
        """Print what will be done, before the first step."""
        if rank() == 0:
            model = self.model
            sizes = f"{model.num_parameters():,} parameters, {model.num_trained():,} trained"
            place = f"device {self.device}, {world_size()} rank(s), {sizes}"
            print(*lines, place, *slow_bfloat16(self.config.precision, self.device), sep="\n")
            warmup, steps = self.config.warmup_steps, self.config.steps
            if warmup > steps:
                print(f"warning: warm-up takes {warmup} of {steps} steps, so the rate stays lower")
            if self.config.resume and self.done < 0:
                print(f"nothing to resume in {self.run.folder}: the run starts with these settings")
            if self.changes:
                print(f"changed after step {self.done}: {', '.join(self.changes)}")
            if self.done >= 0 and self.is_finished():
                more = "more --steps" if self.done >= steps else "a larger --stop-patience"
                print(f"finished at step {self.done} already, nothing is trained: {more}?")

    def column(self, name: str) -> list[float]:
        """One metric of the steps so far that have it, in order."""
        return [row[name] for row in self.history if name in row]

    def steps(self) -> Iterator[int]:
        """The number of finished steps before each step, until the last, a stop or convergence."""
        self.run.start(self.done, self.config.steps)
        if self.done < 0:
            self.done = 0
            self.history.append(self._evaluate())
            self.run.log(0, self.history[0])
        elif self.is_finished() and "eval/greedy_reward" not in self.history[-1]:
            # It was stopped there, and --steps ends it there: no model goes out unseen.
            self.history[-1] |= self._evaluate()
            self.run.log_again(self.done, self.history[-1])
        while not (self.is_stopped or self.is_finished()):
            yield self.done

    def is_finished(self) -> bool:
        """Were all steps done, or did the evaluations converge?"""
        config = self.config
        patience = config.stop_patience if isinstance(config, GRPOConfig) else 0
        converged = has_converged(self.column("eval/greedy_reward"), patience)
        return self.done >= config.steps or converged

    def end_step(self, metrics: Mapping[str, float], failure: str = "") -> None:
        """Evaluate and log; save where it is due.

        `failure`, the same on all ranks, says why the step must end the run: it is logged, and
        nothing of it is evaluated or saved. FloatingPointError: there was one. RuntimeError: ranks
        hold other weights. OSError: a full disk, say, or the folder is another run's by now.
        """
        config, metrics = self.config, dict(metrics)
        self.run.check_lock()
        self.done += 1
        is_last = self.done == config.steps
        if not failure and (is_last or self.done % config.eval_every == 0):
            metrics |= self._evaluate()
        self.is_stopped = any_rank(self.stop.requested())
        self.run.log(self.done, metrics)
        self.history.append(metrics)
        if failure:
            raise FloatingPointError(failure)
        if config.sync_check and self.done % config.sync_check == 0:
            check_equal_weights(self.model)
        is_due = self.done % config.save_every == 0
        if is_due or self.is_stopped or self.is_finished():
            folder, task, manifest = self.run.folder, self.task, self.manifest
            save_checkpoint(
                folder, self.done, self.model, self.optimizer, task, manifest, self.base
            )
            prune_checkpoints(folder, config.keep_last)

    def finish(self) -> None:
        """Write STATUS and say what was published."""
        self.run.finish("finished" if self.is_finished() else "stopped")
        folder = self.run.folder
        if rank() == 0 and not self.is_finished():
            print(f"stopped after step {self.done} of {self.config.steps}, --resume goes on")
        if rank() == 0 and (best := published(folder)):
            print(f"best validation reward {best[1]:.2f} at step {best[0]}, published in {folder}")
            if best[0] == 0 and self.done > 0:
                seen = len(self.column("eval/greedy_reward")) > 1
                why = (
                    "no trained one was better in validation" if seen else "no other was evaluated"
                )
                no_plan = "; 0 says that no plan was well-formed" if best[1] == 0 else ""
                print(f"that is the model it started from: {why}{no_plan}")

    def _evaluate(self) -> dict[str, float]:
        """Validation metrics of the model as it is, which is published if it is the best so far."""
        config, folder, model = self.config, self.run.folder, self.model
        validation = split_starts(self.task.plant).validation[: config.eval_cases]
        with gathered(model):
            found = validation_metrics(
                model, validation, self.task, config.seed, config.rows_per_batch
            )
        # Nodes may round in other ways, and what follows from a score is done by all or by none.
        metrics = from_rank_zero(lambda: found)
        score = metrics["eval/greedy_reward"]
        if is_best(folder, self.done, score, self.column("eval/greedy_reward")):
            publish_model(folder, model, self.task, self.manifest, self.done, score)
        return metrics
