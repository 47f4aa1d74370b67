"""Measure a model, and a baseline beside it, against LQR on starts that no training has seen.

    python evaluate.py --model-path ckpt/grpo --baseline ckpt/sft

save_dir gets evaluation.json (every number, and which step's weights they are of), cases.csv (every
start, to compute them again), PNGs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from minigrpo import evaluation, plots
from minigrpo.checkpoint import differing, load_model, step_of
from minigrpo.config import EvalConfig, parse_flags, resolve
from minigrpo.data import Task, split_starts
from minigrpo.distributed import process_group, rank
from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.evaluation import Results
from minigrpo.policy import ActingPolicy
from minigrpo.runs import make_folder, on_rank_zero, run_command, slow_bfloat16, write_text
from minigrpo.transformer import Transformer

PICTURES = ("time_series.png", "phase_portrait.png", "error_by_step.png", "learning_curve.png")


def main(arguments: Sequence[str] | None = None) -> None:
    resolved = resolve(EvalConfig, parse_flags(EvalConfig, arguments), preset="")
    config = resolved.config
    folder = Path(config.save_dir or evaluation_folder(Path(config.model_path)))
    if (folder / "evaluation.json").exists() and not config.overwrite:
        raise ValueError(f"save_dir {folder} already holds an evaluation; --overwrite replaces it")
    models = load_policies(config)
    paths = [Path(path) for path in (config.baseline, config.model_path) if path]
    steps = dict(zip(models, map(step_of, paths), strict=True))
    task = list(models.values())[-1][1]  # of model_path, whose codec rounds LQR's controls too
    with process_group(config.device) as device:
        starts = choose_starts(config, task.plant)
        on_rank_zero(partial(check_writable, folder))  # before an hour of work, not after it
        if rank() == 0:
            print(resolved.table())
            named = ", ".join(f"{name} (step {step})" for name, step in steps.items())
            what = f"{named} against LQR from {len(starts)} starts, on {device}"
            print(what, *slow_bfloat16(config.precision, device), sep="\n")
            if config.skip_mpc:
                print("MPC IS SKIPPED: null in evaluation.json, in no statistic")
            else:
                count, horizon = len(starts[: config.mpc_cases]), task.plant.horizon
                print(
                    f"MPC runs from the first {count} starts, {horizon} plans each; "
                    "--skip-mpc omits it"
                )
        policies = run_policies(models, starts, config, device)
        if rank() > 0:  # every rank has all results, one writes them
            return
    results = {
        "lqr": {"greedy": evaluation.lqr_results(starts, task)},
        "lqr_rounded": {"greedy": evaluation.lqr_results(starts, task, task.codec.decimals)},
        **policies,
    }
    report = evaluation.make_report(results, task, config.seed)
    measured = asdict(report) | {"steps": steps, "config": asdict(config)}
    content = json.dumps(measured, indent=2, allow_nan=False)  # before a file is written
    write_text(folder / "cases.csv", evaluation.cases_csv(results))
    write_text(folder / "evaluation.json", content + "\n")
    print(evaluation.table(report))
    for name in PICTURES:  # of the evaluation that was here before
        (folder / name).unlink(missing_ok=True)
    if find_spec("matplotlib") is None:
        print("no plots: they need an extra, pip install -e '.[plots]'")
    else:
        draw_plots(folder, results, task.plant, Path(config.model_path) / "metrics.jsonl")
    print(*sorted(str(path) for path in folder.iterdir() if path.is_file()), sep="\n")


def evaluation_folder(model_path: Path) -> Path:
    """Of a checkpoint, which its run will delete, that is in the folder of the run."""
    model = model_path.resolve()
    if model.parent.name == "checkpoints" and re.fullmatch(r"step-\d+", model.name):
        return model.parents[1] / "evaluation" / model.name
    return model_path / "evaluation"


def load_policies(config: EvalConfig) -> dict[str, tuple[Transformer, Task]]:
    """Baseline, if there is one, and model by the names of their rows.

    Those are their stages, sft and grpo, or baseline and model if both are of one. ValueError: a
    baseline of another plant or cost, or one that is the GRPO model of the two.
    """
    model, task, manifest = load_model(Path(config.model_path))
    if not config.baseline:
        return {manifest.stage: (model, task)}
    base, base_task, base_manifest = load_model(Path(config.baseline))
    if differ := differing(manifest, base_manifest, ("plant", "cost")):
        raise ValueError(
            f"baseline {config.baseline} must be for the plant and cost of {config.model_path}: "
            f"{differ}"
        )
    names = base_manifest.stage, manifest.stage
    if names == ("grpo", "sft"):
        raise ValueError(
            f"baseline {config.baseline} is of stage grpo and model_path {config.model_path} of "
            "stage sft: exchange them"
        )
    if names[0] == names[1]:
        names = "baseline", "model"
    return {names[0]: (base, base_task), names[1]: (model, task)}


def check_writable(folder: Path) -> None:
    """Make the folder, and a file in it that leaves no trace; OSError: that is impossible."""
    make_folder(folder)
    with TemporaryFile(dir=folder):
        pass


def choose_starts(config: EvalConfig, plant: DoubleIntegrator) -> Tensor:
    """The first held-out starts [K, 2], or those of a file."""
    split = split_starts(plant)
    if not config.initial_states:
        return split.test[: config.num_cases]
    starts = evaluation.read_starts(Path(config.initial_states), plant)
    trained = set(map(tuple, split.training.tolist()))
    num_trained = sum(start in trained for start in map(tuple, starts.tolist()))
    if rank() == 0:
        print(
            f"{num_trained} of the {len(starts)} starts in {config.initial_states} "
            "are training starts"
        )
    return starts


def run_policies(
    models: dict[str, tuple[Transformer, Task]],
    starts: Tensor,
    config: EvalConfig,
    device: torch.device,
) -> Results:
    """Every model in every mode; a skipped mode is absent."""
    acting = ActingPolicy(config.temperature, config.top_p, config.support_size)
    wanted = {"best_of": config.best_of > 1, "mpc": not config.skip_mpc}
    modes = [mode for mode in evaluation.MODES if wanted.get(mode, True)]
    results: Results = {name: {} for name in models}
    hidden = None if rank() == 0 else True  # None: unless it is a terminal
    for name, mode in tqdm([(name, mode) for name in models for mode in modes], disable=hidden):
        model, task = models[name][0].to(device).eval(), models[name][1]
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            if mode == "mpc":
                steps = partial(tqdm, desc=f"{name} mpc", unit="step", leave=False, disable=hidden)
                results[name][mode] = evaluation.receding_horizon(
                    model, starts[: config.mpc_cases], task, steps, config.rows_per_batch
                )
            else:
                tries = range(config.best_of if mode == "best_of" else 1)
                chosen = None if mode == "greedy" else acting
                flown = [
                    evaluation.evaluate_policy(
                        model, starts, task, chosen, config.seed, i, config.rows_per_batch
                    )
                    for i in tries
                ]
                results[name][mode] = evaluation.best_of(flown)
    return results


def draw_plots(folder: Path, results: Results, plant: DoubleIntegrator, metrics: Path) -> None:
    greedy = {name: modes["greedy"] for name, modes in results.items() if name != "lqr_rounded"}
    states = {name: result.states for name, result in greedy.items()}
    controls = {name: result.controls for name, result in greedy.items()}
    bounds = plant.state_bound, plant.control_bound
    time_series, phase_portrait, error_by_step, learning_curve = (folder / n for n in PICTURES)
    plots.plot_time_series(time_series, states, controls, plant.dt, *bounds)
    plots.plot_phase_portrait(phase_portrait, states, plant.state_bound)
    mpc = {f"{name} mpc": modes["mpc"].states for name, modes in results.items() if "mpc" in modes}
    shared = min(len(flown) for flown in (*states.values(), *mpc.values()))  # starts of every line
    lines = {name: flown[:shared] for name, flown in (states | mpc).items()}
    plots.plot_error_by_step(error_by_step, lines, plant.dt)
    if metrics.is_file():
        plots.plot_learning_curve(learning_curve, metrics)


if __name__ == "__main__":
    run_command(main)
