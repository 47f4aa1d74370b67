"""The study of README, Results: train arms, evaluate them, print the tables, draw the figures.

    python benchmarks/study.py                          everything, seeds 4 5 6: hours
    python benchmarks/study.py --arms default --seeds 4 one arm with one seed
    python benchmarks/study.py --table                  the tables of what benchmarks/results/ holds
    python benchmarks/study.py --figures docs           the pictures of it

benchmarks/results/mean_plan/ are results with an earlier estimator and its defaults: the study of
commit d6613b6 makes their tables, and only it can make them again. minibatches_32/ and
fixed_values/ are of credit for each control with earlier defaults, made again by the studies of
commits ea77fbb and 5930634: in both values of choices stayed those of the rollout and every row of
embedding and head learned alone, and in fixed_values/ the acting temperature was 1.25. steps_200/
is of the study of commit bbf4c81: 200 steps, the rate falling over the last 100, 607 tokens.
steps_160/ and seeds_1_2_3/ have today's defaults, the former but for its 160 steps; long/ is a run
of the arm steps_600 that was stopped before its end; finer_values/ are of commit 3d7b941, which had
a finer table of the values of choices (docs/tiny_model.md).

Long arms are evaluated on 512 held-out starts; each more_sft_* takes about GRPO's processor time;
strong starts from twenty times the data, stronger from that trained for as long as GRPO takes.
Short arms are runs of 40 steps of 1,024 completions from the same SFT model; each differs from the
arm `short` by the flags that the table shows (so the whole softmax is to be compared with the arm
of its temperature and top-p), on 256 validation starts: `short` with several seeds says how much of
a difference is noise.
Runs go to --work-dir and resume when the study is started again; each finished one leaves a small
JSON file in benchmarks/results/ with its flags, commit, seconds, learning curve and numbers.
An arm that has its file is not run again. Seed 0 is where settings were chosen; seeds 1 and 2 had a
say in two of them (README, Results). The headline there is of seeds 4 to 6.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minigrpo import evaluation, plots  # noqa: E402
from minigrpo.checkpoint import load_model  # noqa: E402
from minigrpo.config import EvalConfig  # noqa: E402
from minigrpo.data import split_starts  # noqa: E402
from minigrpo.double_integrator import DoubleIntegrator  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
CURVE = (
    "reward/total",
    "eval/greedy_reward",
    "eval/sampled_reward",
    "eval/final_error",
    "eval/lqr_reward",
    "rollout/frac_valid",
    "update/learning_rate",
    "update/num_steps",
    "update/max_drift",
    "loss/ref_kl",
)
SHORT = "--steps 40 --prompts-per-step 256 --save-every 40 --eval-every 20"
# The processor time of the 200 GRPO steps of `default`: 1,600 s of a Xeon with AVX-512.
MORE_SFT_STEPS = "--steps 16000 --eval-every 400 --save-every 4000"
MORE_SFT = {
    "1e-3": "--learning-rate 1e-3",
    "2e-3": "--learning-rate 2e-3",
    "4e-3": "--learning-rate 4e-3",
    "strong": "--num-demonstrations 20000",
}
# Supervised models that are evaluated alone: flags of train_sft.py.
SFT_ALONE = {"sft_clean": "--demonstration-noise 0"}

# Short arms: flags of train_grpo.py after SHORT; `sft` before a bar are flags of train_sft.py.
SHORT_ARMS = {
    "short": "",
    "completion": "--credit completion",
    "lambda_0": "--credit-lambda 0",
    "lambda_1": "--credit-lambda 1",
    "no_final_norm_rate": "--final-norm-rate 1",
    "clip_0.2": "--clip-eps-low 0.2 --clip-eps-high 0.2",
    "clip_higher": "--clip-eps-high 0.2",
    "punishment": "--reward punishment",
    "completion_punishment": "--credit completion --reward punishment",
    "published": "--credit completion --advantage-std group --temperature 1.5 --top-p 0.9 "
    "--learning-rate 1e-5 --kl-beta 0.01 --clip-eps-low 0.2 --clip-eps-high 0.2 "
    "--num-minibatches 1 --final-norm-rate 1 --max-grad-norm 1 --target-kl 0",
    "uncapped_constraints": "--reward-constraints 8 --reward-constraints-cap 1e9",
    "baseline_0": "--reward-baseline 0",
    "fixed_values": "--no-follow-policy",
    "rows_alone": "--gradient-smoothing-width 0",
    "rows_alone_throughout": "--gradient-smoothing-width 0 | --gradient-smoothing-width 0",
    "top_p_0.9": "--top-p 0.9",
    "temperature_1.25": "--temperature 1.25",
    "temperature_1.5": "--temperature 1.5",
    "temperature_1.5_top_p_0.9": "--temperature 1.5 --top-p 0.9",
    "full_softmax": "--temperature 1.5 --top-p 0.9",
    "full_softmax_temperature_1": "--top-p 0.9",
    "completion_std_group": "--credit completion --advantage-std group",
    "std_none": "--advantage-std none --max-grad-norm 10",
    "kl_0": "--kl-beta 0",
    "kl_0.01": "--kl-beta 0.01",
    "kl_0.1": "--kl-beta 0.1",
    "group_2": "--group-size 2 --prompts-per-step 512",
    "group_8": "--group-size 8 --prompts-per-step 128",
    "group_16": "--group-size 16 --prompts-per-step 64",
    "group_32": "--group-size 32 --prompts-per-step 32",
    "lr_2.5e-4": "--learning-rate 2.5e-4",
    "lr_1e-3": "--learning-rate 1e-3",
    "minibatches_2": "--num-minibatches 2",
    "minibatches_32": "--num-minibatches 32 --learning-rate 2.5e-4",
    "epochs_2": "--num-epochs 2",
    "curriculum": "--curriculum-steps 30",
    "annealed_temperature": "--temperature 1.25 --final-temperature 1",
    "plateau": "--plateau-patience 5",
    "adaptive_terminal": "--adaptive-terminal",
    "accuracy": "--reward-terminal 50 --reward-efficiency 5",
    "effort": "--reward-terminal 12.5 --reward-efficiency 20",
    "clean_demonstrations": "--demonstration-noise 0 |",
    "no_weight_noise": "--weight-noise 0 |",
    "narrow_labels": "--smoothing-width 0.01 |",
}
STRONG = "--num-demonstrations 20000 --steps 2400 --eval-every 50"
LONG_GRPO = {
    "default": "",
    "default_again": "--learning-rate 2.5e-4 --decay-steps 190",  # from what default published
    "default_completion": "--credit completion",
    "steps_600": "--steps 600 --decay-steps 500",
    "bfloat16": "--precision bfloat16",
    "clean": "--demonstration-noise 0 |",
    "strong": f"{STRONG} |",
    "stronger": f"{MORE_SFT_STEPS} {MORE_SFT['strong']} |",  # from what more_sft_strong published
    "strong_again": f"{STRONG} | --steps 140",  # from what strong published
}
LONG_ARMS = (*LONG_GRPO, *SFT_ALONE, *(f"more_sft_{rate}" for rate in MORE_SFT))


def train(script: str, folder: Path, flags: list[str]) -> None:
    """Run a trainer to its end unless it got there before; progress goes to the terminal."""
    if (folder / "STATUS").is_file() and (folder / "STATUS").read_text().strip() == "finished":
        return
    command = [sys.executable, str(ROOT / script), "--save-dir", str(folder), "--resume", *flags]
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def seconds_of(folder: Path) -> float:
    """Of the training steps, without evaluations and start-up."""
    return sum(row.get("time/step_s", 0.0) for row in metrics_of(folder))


def trained_sft(flags: list[str], seed: int, work_dir: Path) -> Path:
    """The SFT run with these flags and this seed; arms with equal flags share it."""
    folder = work_dir / f"sft-{'-'.join(flags).replace('--', '') or 'default'}-seed{seed}"
    train("train_sft.py", folder, [*flags, "--seed", str(seed)])
    return folder


def evaluated(folder: Path, baseline: Path | None, place: str, flags: list[str]) -> dict:  # type: ignore[type-arg]
    command = [sys.executable, str(ROOT / "evaluate.py"), "--skip-mpc", "--overwrite", *flags]
    command += ["--model-path", str(folder), "--save-dir", str(folder / place)]
    command += [] if baseline is None else ["--baseline", str(baseline)]
    subprocess.run(command, check=True)
    report: dict = json.loads((folder / place / "evaluation.json").read_text())  # type: ignore[type-arg]
    del report["config"]  # folders of one machine; what differs from the defaults is in `flags`
    return report


def errors_by_step(folders: dict[str, Path]) -> dict[str, list[float]]:
    """Mean distance from rest at each of the T + 1 states of greedy plans from held-out starts."""
    flown = {}
    for name, folder in folders.items():
        model, task, _ = load_model(folder)
        starts = split_starts(task.plant).test[: EvalConfig.num_cases]
        flown[name] = evaluation.evaluate_policy(model.eval(), starts, task, None, 0).states
        flown["lqr"] = evaluation.lqr_results(starts, task).states
    return {name: states.norm(dim=2).mean(dim=0).tolist() for name, states in flown.items()}


def run_arm(name: str, seed: int, work_dir: Path) -> None:
    """One arm with one seed: train, evaluate, leave the small file."""
    record: dict[str, object] = {"arm": name, "seed": seed}
    if name in SFT_ALONE or name.startswith("more_sft"):
        flags = SFT_ALONE.get(name, "").split()
        if name not in SFT_ALONE:
            flags = f"{MORE_SFT_STEPS} {MORE_SFT[name.removeprefix('more_sft_')]}".split()
        folder = trained_sft(flags, seed, work_dir)
        record["flags"] = " ".join(flags)
        record["report"] = evaluated(folder, None, "evaluation", [])
    elif name in LONG_GRPO:
        before, bar, after = LONG_GRPO[name].partition("|")
        sft_flags, flags = (before.split(), after.split()) if bar else ([], before.split())
        sft, folder = trained_sft(sft_flags, seed, work_dir), work_dir / f"{name}-seed{seed}"
        start = sft
        if name.endswith("_again"):  # from what that arm published, whose result may be old
            first = name.removesuffix("_again")
            own = LONG_GRPO[first].rpartition("|")[2].split()
            start = work_dir / f"{first}-seed{seed}"
            train("train_grpo.py", start, ["--init", str(sft), "--seed", str(seed), *own])
        train("train_grpo.py", folder, ["--init", str(start), "--seed", str(seed), *flags])
        record["flags"] = LONG_GRPO[name]
        record["report"] = evaluated(folder, sft, "evaluation", ["--best-of", "16"])
        record["sft_temperature_0.5"] = evaluated(sft, None, "cold", ["--temperature", "0.5"])
        record["sft_seconds"] = seconds_of(sft)
        record["error_by_step"] = errors_by_step({"sft": sft, "grpo": folder})
    else:
        before, bar, after = SHORT_ARMS[name].partition("|")
        sft_flags, grpo_flags = (before, after) if bar else ("", before)
        sft, folder = trained_sft(sft_flags.split(), seed, work_dir), work_dir / f"{name}-s{seed}"
        script = "benchmarks/full_softmax.py" if "full_softmax" in name else "train_grpo.py"
        flags = [*SHORT.split(), *grpo_flags.split(), "--init", str(sft), "--seed", str(seed)]
        train(script, folder, flags)
        command = " ".join([script, *flags]).replace(str(work_dir), "runs/study")
        record |= {"flags": SHORT_ARMS[name], "command": command}
    rows, provenance = metrics_of(folder), json.loads((folder / "provenance.json").read_text())
    curve = [{"step": row["step"], **{k: row[k] for k in CURVE if k in row}} for row in rows]
    curve = [row for row in curve if len(row) > 2 or name in LONG_GRPO]  # SFT: evaluations only
    record |= {
        key: provenance[key] for key in ("commit", "dirty", "device", "threads", "world_size")
    }
    processor_seconds = seconds_of(folder) * provenance["world_size"] * provenance["threads"]
    record |= {"seconds": processor_seconds, "curve": curve}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}-seed{seed}.json").write_text(json.dumps(record) + "\n")


def records_of(name: str) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{name}-seed*.json"))]


def spread(values: list[float], form: str) -> str:
    """Mean, and the values where there are several."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{statistics.mean(values):{form}} ({', '.join(f'{v:{form}}' for v in values)})"


def seeds_of(records: list[dict]) -> str:  # type: ignore[type-arg]
    """Which they are of, where not of all three."""
    seeds = [str(one["seed"]) for one in records]
    return "" if len(seeds) == 3 else f" (seed{'s' * (len(seeds) > 1)} {', '.join(seeds)})"


def main_table() -> str:
    """Policies on the held-out starts: mean over seeds, each seed in brackets."""
    found = records_of("default")
    if not found:
        return "no result of the arm default yet"
    rows: list[tuple[str, list[dict]]] = []  # type: ignore[type-arg]
    for policy, mode, title in (
        ("lqr", "greedy", "LQR"),
        ("lqr_rounded", "greedy", "LQR rounded to text"),
        ("sft", "greedy", "SFT, greedy"),
        ("grpo", "greedy", "GRPO, greedy"),
        ("sft", "sampled", "SFT, sampled"),
        ("grpo", "sampled", "GRPO, sampled"),
        ("sft", "best_of", "SFT, best of 16 by the simulator"),
        ("grpo", "best_of", "GRPO, best of 16 by the simulator"),
    ):
        rows.append((title, [one["report"]["policies"][policy][mode] for one in found]))
    cold = [one["sft_temperature_0.5"]["policies"]["sft"]["sampled"] for one in found]
    rows.append(("SFT, sampled at temperature 0.5", cold))
    more = [(f"more_sft_{key}", flags) for key, flags in MORE_SFT.items()]
    for name, policy, title in (
        ("default_again", "grpo", "GRPO, 200 more steps at half the rate"),
        ("default_completion", "grpo", "GRPO with one advantage a completion"),
        ("steps_600", "grpo", "GRPO in 600 steps, the rate falling over 500"),
        ("bfloat16", "grpo", "GRPO in bfloat16"),
        ("strong", "sft", "SFT on 20,000 demonstrations"),
        ("strong", "grpo", "GRPO from there"),
        ("strong_again", "grpo", "140 more steps of it"),
        ("stronger", "grpo", "GRPO from 16,000 steps of SFT on 20,000"),
        *((name, "sft", f"SFT, {flags.removeprefix('--')}") for name, flags in SFT_ALONE.items()),
        *((name, "sft", f"SFT, 16,000 steps, {flags.removeprefix('--')}") for name, flags in more),
    ):
        records = records_of(name)
        for mode in ("greedy", "sampled") if records else ():
            summaries = [one["report"]["policies"][policy][mode] for one in records]
            rows.append((f"{title}{seeds_of(records)}, {mode}", summaries))
    lines = [
        "| policy | reward | final error | cost / LQR's | valid |",
        "|---|---|---|---|---|",
    ]
    for title, summaries in rows:
        cells = [
            spread([float(one[key]) for one in summaries], form)
            for key, form in (
                ("reward_mean", ".1f"),
                ("final_error_mean", ".3f"),
                ("cost_ratio", ".3f"),
                ("frac_valid", ".1%"),
            )
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    for mode in ("greedy", "sampled"):
        for one in found:
            gain = one["report"]["comparison"][mode]
            low, high = gain["reward_difference_ci95"]
            share = f"{gain['gap_closed']:.0%} {[round(x, 2) for x in gain['gap_closed_ci95']]}"
            lines.append(
                f"seed {one['seed']}, {mode}: gain {gain['reward_difference']:+.1f} "
                f"[{low:.1f}, {high:.1f}], gap closed {share}, {one['seconds']:.0f} s"
            )
    return "\n".join(lines)


def component_table() -> str:
    """Reward components of the greedy plans before and after, mean over seeds."""
    found = [one["report"]["policies"] for one in records_of("default")]
    names = [key for key in found[0]["sft"]["greedy"] if key.startswith("reward_")] if found else []
    lines = ["| component | SFT | GRPO | LQR |", "|---|---|---|---|"]
    for key in names:
        if key not in ("reward_mean", "reward_ci95"):
            means = [
                statistics.mean(one[policy]["greedy"][key] for one in found)
                for policy in ("sft", "grpo", "lqr")
            ]
            lines.append(f"| {key[7:]} | {' | '.join(f'{value:.2f}' for value in means)} |")
    return "\n".join(lines)


def short_table() -> str:
    """Short arms: change over the run on the validation starts, and the rewards at its end."""
    lines = [
        "| arm | flags | seeds | greedy | sampled | final error | end | least valid |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in SHORT_ARMS:
        found = records_of(name)
        if not found:
            continue
        ends = [(one["curve"][0], one["curve"][-1]) for one in found]
        cells = [
            spread([last[key] - first[key] for first, last in ends], form)
            for key, form in (
                ("eval/greedy_reward", "+.1f"),
                ("eval/sampled_reward", "+.1f"),
                ("eval/final_error", "+.3f"),
            )
        ]
        least = min(row.get("rollout/frac_valid", 1.0) for one in found for row in one["curve"])
        keys = ("eval/greedy_reward", "eval/sampled_reward")
        end = [f"{statistics.mean(last[key] for _, last in ends):.1f}" for key in keys]
        before, bar, after = found[0]["flags"].partition("|")  # a bar would end the cell
        flags = f"`{before.strip()}` (SFT){after}" if bar else f"`{before}`" if before else ""
        seeds = " ".join(str(one["seed"]) for one in found)
        cells += [" / ".join(end), f"{least:.0%}"]
        lines.append(f"| {name} | {flags} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_figures(folder: Path) -> None:
    """Learning curves with the range over seeds, old against new reward, error by step."""
    found = records_of("default")
    more = {rate: records_of(f"more_sft_{rate}") for rate in MORE_SFT}
    more = {rate: records for rate, records in more.items() if records and rate != "strong"}
    arms = {"GRPO": found} | {f"longer SFT, {rate}": records for rate, records in more.items()}
    curves = {}
    for key, label in (("eval/greedy_reward", "greedy"), ("eval/sampled_reward", "sampled")):
        for arm, records in arms.items():
            if records:  # by the run that other work disturbed least
                seconds = min(one["seconds"] for one in records)
                curves[f"{arm}, {label}"] = [curve_of(one, key, seconds) for one in records]
    lqr = found[0]["curve"][0]["eval/lqr_reward"]
    plots.plot_seed_bands(folder / "learning_curves.png", curves, lqr, "processor time (s)")
    credits = {
        f"{credit}, {label}": [curve_of(one, f"eval/{label}_reward") for one in records_of(arm)]
        for label in ("greedy", "sampled")
        for arm, credit in (
            ("default", "credit for each control"),
            ("default_completion", "one advantage a completion"),
        )
    }
    if all(credits.values()):
        plots.plot_seed_bands(folder / "credit.png", credits, lqr, "step")
    strong = {
        f"GRPO, {label}": [curve_of(one, f"eval/{label}_reward") for one in records_of("strong")]
        for label in ("greedy", "sampled")
    }
    if all(strong.values()):
        plots.plot_seed_bands(folder / "strong_start.png", strong, lqr, "step")
    rewards = {
        f"{name}, greedy": [curve_of(one, "eval/greedy_reward") for one in records_of(name)]
        for name in ("short", "uncapped_constraints", "punishment")
        if records_of(name)
    }
    if rewards:
        plots.plot_seed_bands(folder / "old_and_new_reward.png", rewards, lqr, "step")
    lines = {
        policy: torch.tensor([one["error_by_step"][policy] for one in found]).mean(dim=0)
        for policy in ("lqr", "sft", "grpo")
    }
    distances = {name: torch.stack([line, 0 * line], dim=1)[None] for name, line in lines.items()}
    plots.plot_error_by_step(folder / "error_by_step.png", distances, DoubleIntegrator().dt)


def curve_of(record: dict, key: str, seconds: float | None = None) -> plots.Series:  # type: ignore[type-arg]
    """Steps (or, given the seconds of the whole run, seconds) and values of one metric."""
    rows = [row for row in record["curve"] if key in row]
    steps = np.array([row["step"] for row in rows], dtype=float)
    scale = 1.0 if seconds is None else seconds / steps[-1]
    return steps * scale, np.array([row[key] for row in rows])


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arms = [*LONG_ARMS, *SHORT_ARMS]
    parser.add_argument("--arms", nargs="+", choices=arms, metavar="ARM", help=", ".join(arms))
    parser.add_argument("--seeds", nargs="+", type=int, default=[4, 5, 6])
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--table", action="store_true", help="print the tables, train nothing")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw, train nothing")
    return parser


def main() -> None:
    given = flags().parse_args()
    if given.figures:
        draw_figures(given.figures)
        return
    for seed in [] if given.table else given.seeds:
        for name in given.arms or [*LONG_ARMS, *SHORT_ARMS]:
            if not (RESULTS / f"{name}-seed{seed}.json").is_file():
                run_arm(name, seed, given.work_dir)
    print(main_table(), component_table(), short_table(), sep="\n\n")


if __name__ == "__main__":
    main()
