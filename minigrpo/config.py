"""Settings: one frozen dataclass a command, each field with its help and its range.

Precedence: explicit flag, then (with --resume) the saved config, then the preset, then the field's
default. A value out of range is a ValueError before any weights load. `--help` is the reference;
nothing else describes a field.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import math
import operator
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar, get_args, get_type_hints

Value = bool | int | float | str
V = TypeVar("V", bound=Value)
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# How a field's value must compare with each kind of limit it has.
LIMITS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le}


def flag(default: V, help_text: str, **limits: float) -> V:
    """A dataclass field that carries its help and its range, by LIMITS (a Literal needs none)."""
    return field(default=default, metadata={"help": help_text, "limits": limits})


@dataclass(frozen=True)
class Settings:
    """What every command has; construction checks every field's range."""

    device: Literal["auto", "cpu", "cuda"] = flag("auto", "auto takes CUDA where there is one")
    precision: Literal["float32", "bfloat16"] = flag(
        "float32", "autocast of the forward passes; weights (and AdamW) stay float32"
    )
    rows_per_batch: int = flag(
        512,
        "rows decoded together, in evaluation too, which bounds the key-value cache; at least a "
        "whole group; changes a token only where rounding decides",
        at_least=1,
    )
    seed: int = flag(
        0, "seed of initial weights, data order, sampled tokens and an evaluation's bootstrap",
        at_least=0, at_most=2**32 - 1,
    )  # fmt: skip

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value, choices = getattr(self, item.name), get_args(hints[item.name])
            if choices and value not in choices:
                raise ValueError(f"{item.name} must be one of {', '.join(choices)}, got {value}")
            if value == "" != item.default:  # an unset variable of a script, say
                raise ValueError(f"{item.name} must not be empty")
            if type(value) is int and value > 2**53:  # beyond it floats do not count
                raise ValueError(f"{item.name} must be at most {2**53}, got {value}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{item.name} must be finite, got {value}")
            for words, limit in item.metadata["limits"].items():
                if not LIMITS[words](value, limit):
                    wanted = f"{words.replace('_', ' ')} {limit}"
                    raise ValueError(f"{item.name} must be {wanted}, got {value}")

    def _refuse_changed(self, names: Iterable[str], beside: str) -> None:
        """ValueError names those of these settings, without effect there, that are not default."""
        changed = [name for name in names if getattr(self, name) != getattr(type(self), name)]
        if changed:
            raise ValueError(f"{', '.join(changed)} must be left out with {beside}")


@dataclass(frozen=True)
class RunSettings(Settings):
    """What both trainers share."""

    matmul_precision: Literal["auto", "highest", "high", "medium"] = flag(
        "auto",
        "torch.set_float32_matmul_precision; auto: high (TF32) on a GPU, on a CPU the faster "
        "library where that rounds as float32 does; medium allows products of bfloat16",
    )
    lora_rank: int = flag(
        0, "rank of the LoRA adapters that are trained instead of the model; 0 trains the model",
        at_least=0, at_most=10**8,
    )  # fmt: skip
    lora_alpha: float = flag(32.0, "an adapter's product B A is weighted with this / rank", above=0)
    lora_targets: str = flag(
        ",".join(LORA_TARGETS), "modules that get an adapter, by transformers' names"
    )
    micro_batch_size: int = flag(
        128, "rows per forward pass; cannot change the gradient", at_least=1
    )
    adam_beta2: float = flag(0.99, "AdamW second-moment decay", above=0, at_most=0.99999)
    max_grad_norm: float = flag(
        1.0, "gradient norm above which the gradient is scaled down", above=0
    )
    gradient_smoothing_width: float = flag(
        0.0,
        "tiny model: gradients of the embedding's and the head's rows are spread over neighbouring "
        "numbers, m/s^2: Gaussian width; 0: each row learns alone",
        at_least=0,
    )
    gradient_checkpointing: bool = flag(
        False, "keep a block's input alone and compute it again in the backward pass"
    )
    fuse: bool = flag(
        False,
        "torch.compile of a block's element-wise operations and of the scores: on a GPU, and on a "
        "CPU with a wider model than tiny, faster steps after a first one that is half a minute "
        "to a minute longer",
    )
    overwrite: bool = flag(False, "delete the run that save_dir already holds")
    resume: bool = flag(
        False,
        "go on from the newest complete checkpoint in save_dir, or start there if it has none; "
        "`--resume auto` is the same",
    )
    eval_every: int = flag(
        20, "steps between evaluations on validation starts; the best one is published", at_least=1
    )
    eval_cases: int = flag(256, "validation starts of each evaluation", at_least=8, at_most=2048)
    save_every: int = flag(50, "steps between checkpoints", at_least=1)
    keep_last: int = flag(2, "checkpoints kept, the newest ones", at_least=2)
    tensorboard: bool = flag(False, "also write TensorBoard events (extra: tensorboard)")
    stop_after_minutes: float = flag(
        0.0, "save and stop cleanly that long after the model was loaded; 0 is never", at_least=0
    )
    parallel: Literal["ddp", "fsdp"] = flag(
        "ddp", "with torchrun: ddp keeps the whole model on each rank, fsdp shards it"
    )
    memory_check: Literal["refuse", "warn", "off"] = flag(
        "refuse",
        "what becomes of a run whose estimate, an upper bound, exceeds the free memory; off: "
        "nothing is estimated",
    )
    sync_check: int = flag(
        50, "with torchrun: steps between checks that all ranks hold equal weights; 0 is never",
        at_least=0,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := set(self.lora_targets.split(",")) - set(LORA_TARGETS):
            raise ValueError(
                f"lora_targets must be some of {','.join(LORA_TARGETS)}, "
                f"got {', '.join(map(repr, sorted(unknown)))}"
            )
        if not self.lora_rank:
            self._refuse_changed(("lora_alpha", "lora_targets"), "lora_rank 0")


@dataclass(frozen=True)
class SFTConfig(RunSettings):
    """Supervised fine-tuning on LQR demonstrations."""

    preset: Literal["tiny", "pretrained"] = flag(
        "tiny", "tiny: a small model from scratch with a number tokenizer; pretrained: --model"
    )
    model: str = flag(
        "", "folder or hub name of a pretrained model (Llama, Qwen2, Qwen3, SmolLM2 families)"
    )
    save_dir: str = flag(
        "ckpt/sft", "run folder, or $RUN_DIR; the best model lies at its top level"
    )
    num_demonstrations: int = flag(
        1000, "LQR plans to imitate, a fixed set for the seed", at_least=1, at_most=20_000
    )
    demonstration_noise: float = flag(
        0.2,
        "tiny model: largest size of the noise on a demonstration's controls, m/s^2; LQR's answers "
        "to where it leads are the labels",
        at_least=0,
    )
    weight_noise: float = flag(
        0.15,
        "tiny model: noise on every matrix in a step's forward and backward pass, in units of its "
        "root mean square; the result is less sensitive to changes of its weights",
        at_least=0,
    )
    steps: int = flag(1200, "optimizer steps", at_least=1)
    batch_size: int = flag(64, "demonstrations per optimizer step", at_least=1)
    learning_rate: float = flag(4e-3, "peak of the cosine schedule", above=0, at_most=1000)
    warmup_steps: int = flag(20, "steps of linear warm-up", at_least=0)
    weight_decay: float = flag(0.1, "AdamW decay of the matrices", at_least=0, at_most=1000)
    smoothing_width: float = flag(
        0.03,
        "tiny model: ordinal label smoothing, m/s^2: Gaussian width over neighbouring numbers",
        at_least=0,
    )
    # Of these two DoubleIntegrator has the ranges, for a checkpoint's are checked there as well.
    dt: float = flag(0.1, "seconds per control")
    horizon: int = flag(50, "controls per plan")
    width: int = flag(64, "tiny model: residual width", at_least=8, at_most=10**8)
    mlp_width: int = flag(128, "tiny model: width of the gated layer", at_least=8, at_most=10**8)
    num_layers: int = flag(2, "tiny model: blocks", at_least=1)
    num_heads: int = flag(4, "tiny model: attention heads", at_least=1)
    rope_theta: float = flag(1000.0, "tiny model: base of the rotary frequencies", above=1)
    tied_head: bool = flag(False, "tiny model: the head shares the embedding")


@dataclass(frozen=True)
class GRPOConfig(RunSettings):
    """Group relative policy optimization from an SFT checkpoint."""

    init: str = flag(
        "ckpt/sft", "folder of the SFT model to start from, also the reference of the KL term"
    )
    save_dir: str = flag(
        "ckpt/grpo", "run folder, or $RUN_DIR; the best model lies at its top level"
    )
    measure_signal: int = flag(
        0,
        "measure the cosine between the gradients of that many independent rollouts and exit; "
        "0 trains",
        at_least=0,
    )
    steps: int = flag(200, "rollouts", at_least=1)
    prompts_per_step: int = flag(32, "prompts of one rollout, over all ranks", at_least=1)
    group_size: int = flag(16, "completions per prompt", at_least=2)
    num_epochs: int = flag(1, "passes over a rollout", at_least=1)
    num_minibatches: int = flag(1, "optimizer steps per pass, each on whole groups", at_least=1)
    temperature: float = flag(
        1.5, "of the acting policy, in sampling and in every log-prob", above=0
    )
    final_temperature: float = flag(
        0.0, "temperature of the last step, reached linearly; 0 keeps temperature", at_least=0
    )
    curriculum_steps: int = flag(
        0,
        "steps in which the starts grow from a square of a quarter of the side to all; 0: all",
        at_least=0,
    )
    top_p: float = flag(
        0.9, "nucleus mass of the acting policy; 1 is no truncation", above=0, at_most=1
    )
    support_size: int = flag(
        128, "most tokens a nucleus may hold; without effect at top_p 1", at_least=1
    )
    learning_rate: float = flag(1e-5, "peak of the schedule", above=0, at_most=1000)
    final_norm_rate: float = flag(
        1.0,
        "multiple of the learning rate for the final norm's gains, which scale all logits and so "
        "say how sure the policy is; adapters leave them as they are",
        above=0,
        at_most=1000,
    )
    warmup_steps: int = flag(10, "steps of linear warm-up", at_least=0)
    decay_steps: int = flag(
        0,
        "last steps, in which the cosine takes the rate from its peak to 0; 0: all after warm-up",
        at_least=0,
    )
    plateau_patience: int = flag(
        0,
        "halve the rate when that many steps earn no more than those before; 0: never",
        at_least=0,
    )
    stop_patience: int = flag(
        0, "finish after that many evaluations without a new best one; 0: never", at_least=0
    )
    weight_decay: float = flag(0.0, "AdamW decay of the matrices", at_least=0, at_most=1000)
    target_kl: float = flag(
        0.0,
        "once KL(old, current) exceeds this, in nats a token, the optimizer steps that are left of "
        "a rollout are not made; 0: all are made",
        at_least=0,
    )
    kl_beta: float = flag(
        0.01, "weight of KL(current, reference); 0 loads no reference", at_least=0
    )
    clip_eps_low: float = flag(0.2, "the ratio is clipped below 1 - this", above=0, at_most=1)
    clip_eps_high: float = flag(0.2, "the ratio is clipped above 1 + this", above=0, at_most=1e6)
    aggregation: Literal["grpo", "dapo", "dr_grpo"] = flag(
        "dapo",
        "dapo: the loss is a mean over all tokens of the optimizer step; grpo: over rows, of each "
        "row's mean; dr_grpo: the sum over tokens, divided by rows times the longest allowed",
    )
    advantage_std: Literal["group", "batch", "none"] = flag(
        "group",
        "advantages are divided by the standard deviation of their group's rewards, of all rewards "
        "of the step, or by nothing",
    )
    credit: Literal["completion", "choice"] = flag(
        "completion",
        "completion: every token has the advantage of its completion; choice: the simulator says "
        "what each other control would have been worth, and the gradient is over all of them "
        "(needs one token a control)",
    )
    credit_lambda: float = flag(
        0.7,
        "with credit choice: how much of what a plan did later is laid to a control, less for each "
        "step between; 1 is unbiased",
        at_least=0,
        at_most=1,
    )
    follow_policy: bool = flag(
        True,
        "with credit choice: simulate choices again before each optimizer step but the first of a "
        "rollout, at plans that have moved as the policy has",
    )
    reward: Literal["progress", "punishment"] = flag(
        "progress", "punishment is kept for comparison"
    )
    reward_baseline: float = flag(
        50.0,
        "constant for valid text; cancels where no token that breaks the format has probability",
        at_least=0,
    )
    reward_progress: float = flag(
        30.0, "weight of the share of the initial distance covered", at_least=0
    )
    reward_proximity: float = flag(15.0, "weight of exp(-2 mean distance)", at_least=0)
    reward_terminal: float = flag(25.0, "weight of exp(-10 final error)", at_least=0)
    adaptive_terminal: bool = flag(
        False,
        "the terminal term's rate is 1 / (mean final error of the last 10 rollouts), at most 100",
    )
    reward_efficiency: float = flag(10.0, "weight of exp(-mean |u|)", at_least=0)
    reward_smoothness: float = flag(8.0, "weight of exp(-2 mean |u_k - u_{k-1}|)", at_least=0)
    reward_lqr: float = flag(15.0, "weight of -tanh(cost / 200)", at_least=0)
    reward_constraints: float = flag(2.0, "points lost per violation", at_least=0)
    reward_constraints_cap: float = flag(20.0, "most points lost by violations", at_least=0)
    reward_validity: float = flag(10.0, "weight of the share of states within bounds", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.measure_signal in (1, 2):
            raise ValueError(f"measure_signal must be 0 or at least 3, got {self.measure_signal}")
        if self.measure_signal and self.resume:
            raise ValueError("measure_signal and resume must not both be given: it looks at --init")
        if self.credit == "choice" and self.advantage_std == "group":
            # 1 / s bounds the deviations that s is made of, not what other choices are worth.
            raise ValueError(
                "advantage_std must be batch or none with credit choice, got group; or choose "
                "credit completion"
            )
        if self.reward == "punishment":
            weights = [name for name in vars(self) if name.startswith("reward_")]
            self._refuse_changed([*weights, "adaptive_terminal"], "reward punishment")
        if self.credit == "completion":
            self._refuse_changed(("credit_lambda", "follow_policy"), "credit completion")
        if self.measure_signal and self.parallel != "ddp":
            raise ValueError(f"parallel must be ddp with measure_signal, got {self.parallel}")


@dataclass(frozen=True)
class EvalConfig(Settings):
    """A model against LQR and, optionally, a baseline model on held-out starts."""

    model_path: str = flag("ckpt/grpo", "folder of the model to evaluate")
    baseline: str = flag(
        "", "folder of a second model for the paired comparison, usually the SFT one"
    )
    num_cases: int = flag(512, "held-out starts", at_least=2, at_most=2048)
    save_dir: str = flag(
        "",
        "where evaluation.json and plots go; empty: model_path/evaluation, of a checkpoint "
        "evaluation/step-... in the folder of its run",
    )
    initial_states: str = flag(
        "", "JSON file, a list of [position, velocity]; replaces the held-out starts"
    )
    best_of: int = flag(
        1, "also a row for the best of that many sampled plans a start; 1: none", at_least=1
    )
    skip_mpc: bool = flag(False, "leave out receding-horizon control (alias --skip-mcp)")
    mpc_cases: int = flag(
        64, "starts of the receding-horizon run, the first ones of the evaluation", at_least=2
    )
    temperature: float = flag(1.0, "of the sampled rows", above=0)
    top_p: float = flag(1.0, "nucleus mass of the sampled rows", above=0, at_most=1)
    support_size: int = flag(
        128, "most tokens a nucleus may hold; without effect at top_p 1", at_least=1
    )
    overwrite: bool = flag(False, "replace an evaluation.json that is already there")


# Defaults that go with a kind of model; chosen on validation starts (README, Results).
PRESETS: dict[tuple[str, type[Settings]], dict[str, Value]] = {
    ("tiny", SFTConfig): {"gradient_smoothing_width": 0.1},
    ("tiny", GRPOConfig): {
        "prompts_per_step": 512,
        "group_size": 4,
        "num_minibatches": 8,
        "rows_per_batch": 1024,
        "gradient_smoothing_width": 0.1,
        "temperature": 1.0,
        "top_p": 1.0,
        "support_size": 32,
        "credit": "choice",
        "advantage_std": "batch",
        "learning_rate": 5e-4,
        "decay_steps": 140,
        "max_grad_norm": 0.15,
        "target_kl": 0.02,
        "final_norm_rate": 20.0,
        "kl_beta": 0.001,
        "clip_eps_low": 0.1,
        "clip_eps_high": 0.1,
    },
    ("pretrained", SFTConfig): {
        "learning_rate": 2e-5,
        "steps": 300,
        "batch_size": 16,
        "micro_batch_size": 4,
        "smoothing_width": 0.0,
        "demonstration_noise": 0.0,
        "weight_noise": 0.0,
        "weight_decay": 0.0,
    },
    ("pretrained", GRPOConfig): {"micro_batch_size": 8},
}

COMMANDS = {"train_sft.py": SFTConfig, "train_grpo.py": GRPOConfig, "evaluate.py": EvalConfig}

# What belongs to a process rather than to the run: --resume doesn't take it from the saved config.
OF_ONE_PROCESS = ("overwrite", "resume", "save_dir", "stop_after_minutes")

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Resolved(Generic[S]):
    """A config and the source of each of its values: flag, environment, resume, preset, default."""

    config: S
    sources: dict[str, str]

    def table(self) -> str:
        """What is printed at start, a line for each value."""
        return "\n".join(
            f"  {name:24s} {value!s:22s} {self.sources[name]}"
            for name, value in vars(self.config).items()
        )


def parse_flags(kind: type[S], arguments: Sequence[str] | None = None) -> dict[str, Value]:
    """The flags that were given, nothing else; an unknown or abbreviated one ends with status 2.

    Plain argparse: HfArgumentParser takes a field's metadata for keywords, and ours has ranges.
    RUN_DIR stands for --save-dir in the batch scripts, where a requeued job must find its folder.
    """
    is_trainer = issubclass(kind, RunSettings)
    about = "Defaults of tiny or pretrained go with that kind of model." if is_trainer else ""
    parser = argparse.ArgumentParser(
        description=f"{kind.__doc__} {about}",
        usage="%(prog)s [--flag value ...]    (--help explains the flags)",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    items = {item.name: item for item in dataclasses.fields(kind)}
    hints, known = get_type_hints(kind), []
    for owner in kind.__mro__[:-1]:  # a command's own flags before those it shares
        title = "Flags of this command" if owner is kind else str(owner.__doc__).partition(";")[0]
        group = parser.add_argument_group(title.rstrip("."))
        for name in inspect.get_annotations(owner):
            default, wanted = items[name].default, f"--{name.replace('_', '-')}"
            known.append(wanted)
            defaults = [f"default: {default if default != '' else 'none'}"]
            for (preset, of_kind), values in PRESETS.items():
                if of_kind is kind and values.get(name, default) != default:
                    defaults.append(f"{preset}: {values[name]}")
            shown = f"{items[name].metadata['help']} ({'; '.join(defaults)})"
            if isinstance(default, bool):
                yes_no = argparse.BooleanOptionalAction
                switch = group.add_argument(wanted, action=yes_no, help=shown)
                if name == "resume":  # other tools want a word behind it
                    switch.nargs, switch.choices = "?", ("auto",)
            else:
                choices, word = get_args(hints[name]) or None, type(default).__name__.upper()
                metavar = None if choices else word
                group.add_argument(
                    wanted, type=type(default), choices=choices, metavar=metavar, help=shown
                )
    if kind is EvalConfig:
        hidden = argparse.SUPPRESS  # a usual misspelling
        parser.add_argument("--skip-mcp", dest="skip_mpc", action="store_true", help=hidden)
    if is_trainer and os.environ.get("RUN_DIR"):
        parser.set_defaults(save_dir=os.environ["RUN_DIR"])
    words = sys.argv[1:] if arguments is None else arguments
    given, unknown = parser.parse_known_args([_with_dashes(word) for word in words])
    if unknown:
        flags = [word.partition("=")[0] for word in unknown]
        meant = [m for u in flags for m in difflib.get_close_matches(u, known, n=2, cutoff=0.75)]
        ask = f" (did you mean {' or '.join(meant)}?)" if meant else ""
        for script, other in COMMANDS.items():
            if theirs := [u for u in flags if u.lstrip("-").replace("-", "_") in vars(other())]:
                ask = f" ({', '.join(theirs)}: of {script})"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{ask}")
    return vars(given)


def _with_dashes(word: str) -> str:
    """--group_size=4 as --group-size=4: a setting goes by its field's name as well."""
    name, equals, value = word.partition("=")
    return (name.replace("_", "-") if name.startswith("--") else name) + equals + value


def resolve(
    kind: type[S], given: dict[str, Value], preset: str, saved: dict[str, Value] | None = None
) -> Resolved[S]:
    """Apply the precedence of the module's docstring. ValueError: wrong type, value out of range.

    `given` is of `parse_flags` and `saved` has passed `check_saved`, so all names are known.
    """
    resumed = {name: value for name, value in (saved or {}).items() if name not in OF_ONE_PROCESS}
    layers = (
        ("default", vars(kind())),
        (f"preset {preset}", PRESETS.get((preset, kind), {})),
        ("resume", resumed),
        ("flag", given),
    )
    values: dict[str, Value] = {}
    sources: dict[str, str] = {}
    for source, layer in layers:  # a later one has the last word
        values.update(layer)
        sources.update(dict.fromkeys(layer, source))
    if given.get("save_dir", "") == os.environ.get("RUN_DIR"):
        sources["save_dir"] = "environment"
    _check_types(kind, values)
    return Resolved(kind(**values), sources)  # type: ignore[arg-type]  # checked above


def check_saved(kind: type[RunSettings], saved: dict[str, Value], given: dict[str, Value]) -> None:
    """ValueError if a run was saved by another version: today's defaults would change it.

    Or if it shall be validated on other starts: the best score so far is the old ones'.
    """
    names = {item.name for item in dataclasses.fields(kind)}
    lacking = sorted(names - set(saved) - set(OF_ONE_PROCESS))
    unknown = sorted(set(saved) - names)
    if lacking or unknown:
        raise ValueError(
            f"the saved run must have the settings of this version, it lacks {lacking or 'none'} "
            f"and has {unknown or 'none'} besides: resume it with the commit in its "
            "provenance.json, or start anew"
        )
    cases = given.get("eval_cases", saved["eval_cases"])
    if cases != saved["eval_cases"]:
        raise ValueError(
            f"eval_cases must be {saved['eval_cases']} to resume this run, whose best model was "
            f"chosen on these starts, got {cases}: leave the flag out, or start another run"
        )


def _check_types(kind: type[Settings], values: dict[str, Value]) -> None:
    for name, wanted in get_type_hints(kind).items():
        wanted = str if get_args(wanted) else wanted  # one of a few words
        got = values[name]
        if wanted is float and type(got) is int:
            values[name] = float(got)
        elif type(got) is not wanted:
            raise ValueError(f"{name} must be of type {wanted.__name__}, got {got!r}")
