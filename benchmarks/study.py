"""The study of README, Results: train arms over seeds, evaluate each on the held-out starts, print
one table.

    python benchmarks/study.py                                     every arm, seeds 0 1 2 (hours on
    two cores)
    python benchmarks/study.py --arms default --seeds 0 1 2        one arm
    python benchmarks/study.py --table                             the table of what
    benchmarks/results/ holds

An arm is a list of flags for train_sft.py and train_grpo.py; arms that share their SFT flags share
the SFT run of a seed. Runs
go to --work-dir and resume when the study is started again; each finished one leaves a small JSON
file in benchmarks/results/
with its flags, commit, seconds, learning curve and evaluation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
CURVE = (
    "reward/total",
    "eval/greedy_reward",
    "eval/sampled_reward",
    "rollout/frac_valid",
    "time/step_s",
)

# name -> (flags of train_sft.py, flags of train_grpo.py or None: the arm is supervised training
# alone)
ARMS: dict[str, tuple[list[str], list[str] | None]] = {
    "default": ([], []),
    "more_sft_2e-3": (["--steps", "6000", "--learning-rate", "2e-3"], None),
    "more_sft_4e-3": (["--steps", "6000"], None),
    "more_sft_8e-3": (["--steps", "6000", "--learning-rate", "8e-3"], None),
    "punishment": ([], ["--reward", "punishment"]),
    "uncapped_constraints": ([], ["--reward-constraints", "8", "--reward-constraints-cap", "1e9"]),
    "temperature_1_top_p_1": ([], ["--temperature", "1", "--top-p", "1"]),
    "temperature_1_top_p_0.9": ([], ["--temperature", "1"]),
    "temperature_1.5_top_p_1": ([], ["--top-p", "1"]),
    "std_batch": ([], ["--advantage-std", "batch"]),
    "std_none": ([], ["--advantage-std", "none", "--max-grad-norm", "10"]),
    "kl_0": ([], ["--kl-beta", "0"]),
    "kl_0.1": ([], ["--kl-beta", "0.1"]),
    "group_4": ([], ["--group-size", "4", "--prompts-per-step", "256"]),
    "group_8": ([], ["--group-size", "8", "--prompts-per-step", "128"]),
    "group_32": ([], ["--group-size", "32", "--prompts-per-step", "32"]),
    "lr_2.5e-4": ([], ["--learning-rate", "2.5e-4"]),
    "lr_1e-3": ([], ["--learning-rate", "1e-3"]),
    "minibatches_1": ([], ["--num-minibatches", "1"]),
    "minibatches_4": ([], ["--num-minibatches", "4"]),
    "minibatches_16": ([], ["--num-minibatches", "16"]),
}


def train(script: str, folder: Path, flags: list[str]) -> None:
    """Run a trainer to its end unless it got there before; progress goes to the terminal."""
    if (folder / "STATUS").is_file() and (folder / "STATUS").read_text().strip() == "finished":
        return
    command = [sys.executable, str(ROOT / script), "--save-dir", str(folder), "--resume", *flags]
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)


def run_arm(name: str, seed: int, work_dir: Path, num_cases: int) -> None:
    """One arm with one seed: train, evaluate on the test starts, leave the small file."""
    sft_flags, grpo_flags = ARMS[name]
    sft = work_dir / f"sft-{'-'.join(sft_flags).replace('--', '') or 'default'}-seed{seed}"
    train("train_sft.py", sft, [*sft_flags, "--seed", str(seed)])
    evaluate = [
        sys.executable,
        str(ROOT / "evaluate.py"),
        "--skip-mpc",
        "--overwrite",
        "--num-cases",
        str(num_cases),
    ]
    if grpo_flags is None:
        folder, trained = sft, sft
        evaluate += ["--model-path", str(sft)]
    else:
        folder = trained = work_dir / f"{name}-seed{seed}"
        train("train_grpo.py", folder, ["--init", str(sft), *grpo_flags, "--seed", str(seed)])
        evaluate += ["--model-path", str(folder), "--baseline", str(sft)]
    place = folder / "evaluation"
    subprocess.run([*evaluate, "--save-dir", str(place)], check=True)
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    curve = [
        {"step": row["step"], **{key: row[key] for key in CURVE if key in row}} for row in rows
    ]
    provenance = json.loads((trained / "provenance.json").read_text())
    report = json.loads((place / "evaluation.json").read_text())
    record = {
        "arm": name,
        "seed": seed,
        "sft_flags": sft_flags,
        "grpo_flags": grpo_flags,
        "commit": provenance["commit"],
        "dirty": provenance["dirty"],
        "threads": provenance["threads"],
        "seconds": sum(row.get("time/step_s", 0.0) for row in rows),
        "policies": report["policies"],
        "comparison": report["comparison"],
        "num_cases": report["num_cases"],
        "curve": curve if grpo_flags is not None else curve[:: max(1, len(curve) // 60)],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}-seed{seed}.json").write_text(json.dumps(record) + "\n")


def table() -> str:
    """Mean and range over seeds of each arm that has results."""
    lines = [
        "| arm | seeds | SFT greedy / sampled | after, greedy | sampled "
        "| gap closed greedy / sampled | final error | valid | s |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for name in ARMS:
        records = [
            json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{name}-seed*.json"))
        ]
        if not records:
            continue
        policy = "sft" if records[0]["grpo_flags"] is None else "grpo"

        def spread(policy: str, mode: str, key: str, form: str, records: list = records) -> str:  # type: ignore[type-arg]
            values = [record["policies"][policy][mode][key] for record in records]
            return f"{statistics.mean(values):{form}} ({min(values):{form}}..{max(values):{form}})"

        gaps = []
        for mode in ("greedy", "sampled"):
            found = [record["comparison"].get(mode) for record in records]
            shares = [one["gap_closed"] for one in found if one and one["gap_closed"] is not None]
            gaps.append(
                f"{statistics.mean(shares):.0%} ({min(shares):.0%}..{max(shares):.0%})"
                if shares
                else "-"
            )
        base = [spread("sft", mode, "reward_mean", ".1f") for mode in ("greedy", "sampled")]
        cells = [
            name,
            str(len(records)),
            " / ".join(base),
            spread(policy, "greedy", "reward_mean", ".1f"),
            spread(policy, "sampled", "reward_mean", ".1f"),
            " / ".join(gaps),
            spread(policy, "greedy", "final_error_mean", ".3f"),
            spread(policy, "greedy", "frac_valid", ".1%"),
            f"{statistics.mean(record['seconds'] for record in records):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=list(ARMS),
        default=list(ARMS),
        metavar="ARM",
        help=", ".join(ARMS),
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work-dir", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--num-cases", type=int, default=512)
    parser.add_argument("--table", action="store_true", help="print the table and train nothing")
    given = parser.parse_args()
    if not given.table:
        for seed in given.seeds:
            for name in given.arms:
                if not (RESULTS / f"{name}-seed{seed}.json").is_file():
                    run_arm(name, seed, given.work_dir, given.num_cases)
    print(table())


if __name__ == "__main__":
    main()
