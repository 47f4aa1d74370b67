"""README and docs/ against the code: commands parse, names and links exist, metrics are all there.

Prose goes stale in silence; here it fails.
"""

import doctest
import importlib
import json
import os
import re
import shlex
import subprocess
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import untrained_checkpoint

import train_grpo
import train_sft
from minigrpo.config import EvalConfig, GRPOConfig, Settings, SFTConfig, parse_flags, resolve
from minigrpo.optim import cosine_learning_rate

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text() for page in PAGES}
PROGRAMS: dict[str, type[Settings]] = {
    "train_sft.py": SFTConfig,
    "train_grpo.py": GRPOConfig,
    "evaluate.py": EvalConfig,
    "sft.sbatch": SFTConfig,
    "grpo.sbatch": GRPOConfig,
    "evaluate.sbatch": EvalConfig,
}
BENCHMARKS = ("bench.py", "study.py")
# Of other programs: torchrun, sbatch, pip.
FOREIGN_FLAGS = {
    "--nproc-per-node", "--standalone", "--account", "--nodes", "--gpus-per-node", "--array",
    "--cpus-per-gpu", "--cpus-per-task", "--index-url", "--output", "--signal", "--dry-run",
    "--exclusive", "--export", "--gres",
}  # fmt: skip


FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(text: str) -> Iterator[str]:
    """Lines of fenced blocks without a language, then code in running text."""
    for language, block in FENCE.findall(text):
        if not language:
            yield from block.splitlines()
    yield from re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """(file name of the program, its arguments) of every command line that names one."""
    for line in blocks(text):
        if not re.match(r"([A-Z_]+=\S+ )*(taskset .*)?(python|torchrun|sbatch) ", line):
            continue
        words = shlex.split(line, comments=True)
        names = [Path(word).name for word in words]
        for name in (*PROGRAMS, *BENCHMARKS):
            if name in names:
                given = words[names.index(name) + 1 :]
                yield name, ["default" if word == "ARM" else word for word in given]


def benchmark_flags(name: str, monkeypatch: pytest.MonkeyPatch) -> ArgumentParser:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which bench.py sets where nobody else has
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module(name.removesuffix(".py")).flags()


COMMANDS = [
    pytest.param(name, arguments, id=f"{page.name}-{' '.join([name, *arguments])}")
    for page, text in TEXTS.items()
    for name, arguments in commands(text)
]


@pytest.mark.parametrize(("name", "arguments"), COMMANDS)
def test_every_command_parses(
    name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in BENCHMARKS:
        benchmark_flags(name, monkeypatch).parse_args([a for a in arguments if a != "--help"])
        return
    given = parse_flags(PROGRAMS[name], arguments)
    preset = "pretrained" if {"model", "lora_rank"} & set(given) else "tiny"
    sources = resolve(PROGRAMS[name], given, preset).sources
    assert all(sources[setting] == "flag" for setting in given)


def test_commands_are_found_at_all() -> None:
    """Or a change of style would leave the test above with nothing to do."""
    found = {name for text in TEXTS.values() for name, _ in commands(text)}
    assert found == {*PROGRAMS, *BENCHMARKS}
    assert len(COMMANDS) > 25


def test_every_flag_in_the_text_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    known = set(FOREIGN_FLAGS)
    for kind in (SFTConfig, GRPOConfig, EvalConfig):
        known |= {f"--{name.replace('_', '-')}" for name in vars(kind())}
        known |= {f"--no-{name.replace('_', '-')}" for name, v in vars(kind()).items() if v is True}
    for name in BENCHMARKS:
        known |= set(benchmark_flags(name, monkeypatch)._option_string_actions)
    for page, text in TEXTS.items():
        code = "\n".join(blocks(text))
        flags = set(re.findall(r"(?<!\S)--[a-z][\w-]*", code))
        assert not flags - known, page.name


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        target
        for text in TEXTS.values()
        for code in blocks(text)
        for target in re.findall(r"^make ([a-z-]+)", code)
    }
    assert named and named <= targets


@pytest.mark.parametrize(
    ("has_gpu", "cpuinfo", "precision"),
    [
        (True, "GenuineIntel avx2", "bfloat16"),
        (False, "GenuineIntel avx512_bf16 amx_bf16", "bfloat16"),
        (False, "AuthenticAMD avx512_bf16", "bfloat16"),
        (False, "GenuineIntel avx512_bf16", "float32"),
        (False, "AuthenticAMD avx2", "float32"),
    ],
)
def test_make_smollm_takes_the_faster_precision(
    has_gpu: bool, cpuinfo: str, precision: str, tmp_path: Path
) -> None:
    gpus, info = tmp_path / "nvidia-smi", tmp_path / "cpuinfo"
    gpus.write_text(f"#!/bin/sh\nexit {int(not has_gpu)}\n")
    gpus.chmod(0o755)
    info.write_text(cpuinfo)
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = ["make", "-n", "-C", str(ROOT), "smollm", f"CPUINFO={info}"]
    found = subprocess.check_output(command, env={"PATH": path}, text=True)
    assert set(re.findall(r"--precision (\w+)", found)) == {precision}


def anchors(page: Path) -> set[str]:
    """The ids that a page's headings get on GitHub."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]) if "://" not in link]
    for link in links:
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


MODULES = {path.stem for path in (ROOT / "minigrpo").glob("*.py")} - {"__init__"}


def test_every_name_of_the_code_exists() -> None:
    """`module.name` and `module.Class.name`, also in the equations' blocks."""
    pattern = rf"(?<![\w./])({'|'.join(MODULES)})((?:\.\w+)+)"
    count = 0
    for page, text in TEXTS.items():
        code = "\n".join(blocks(text))
        for module, path in set(re.findall(pattern, code)):
            names = path.strip(".").split(".")
            if names[-1] in ("py", "sbatch", "md", "json"):
                continue
            found: object = importlib.import_module(f"minigrpo.{module}")
            for name in names:
                is_field = name in getattr(found, "__dataclass_fields__", {})
                found = None if is_field else getattr(found, name, NotImplemented)
                assert found is not NotImplemented, f"{page.name}: {module}{path}"
            count += 1
    assert count > 40


def documented_metrics() -> set[str]:
    """The names in the first column of README's table."""
    section = TEXTS[README].split("## Every metric")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_every_metric_is_documented_and_every_documented_one_is_logged(tmp_path: Path) -> None:
    run = "--device cpu --steps 1 --eval-cases 8 --save-dir".split()
    small = "--horizon 2 --num-demonstrations 4 --batch-size 2 --width 8 --mlp-width 8".split()
    train_sft.main([*small, *run, str(tmp_path / "sft")])
    init = untrained_checkpoint(tmp_path / "init")
    batch = "--prompts-per-step 4 --num-minibatches 2 --group-size 2".split()
    train_grpo.main(["--init", str(init), *batch, *run, str(tmp_path / "grpo")])
    logged: set[str] = set()
    for stage in ("sft", "grpo"):
        for line in (tmp_path / stage / "metrics.jsonl").read_text().splitlines():
            logged |= set(json.loads(line))
    documented = documented_metrics()
    assert "reward/<component>" in documented
    components = {name for name in logged if name.startswith("reward/")} - {"reward/total"}
    assert len(components) == 9
    assert logged - components - {"step"} == documented - {"reward/<component>"}


def test_one_step_of_grpo_has_the_numbers_that_its_page_says() -> None:
    page = ROOT / "docs" / "one_step.md"
    example = doctest.DocTestParser().get_doctest(
        re.sub(r"^```.*$", "", page.read_text(), flags=re.MULTILINE), {}, page.name, str(page), 0
    )
    assert len(example.examples) > 50
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    torch.set_printoptions(profile="default")
    assert not said, "".join(said)


def results_of(arm: str) -> list[dict]:
    folder = ROOT / "benchmarks" / "results"
    return [json.loads((folder / f"{arm}-seed{s}.json").read_text())["report"] for s in (4, 5, 6)]


@pytest.mark.parametrize(
    ("arm", "policy"),
    [
        ("default", "sft"),
        ("default", "grpo"),
        ("default_completion", "grpo"),
        ("strong", "sft"),
        ("strong", "grpo"),
    ],
)
@pytest.mark.parametrize("mode", ["greedy", "sampled"])
def test_the_headline_is_what_the_raw_files_hold(arm: str, policy: str, mode: str) -> None:
    rewards = [report["policies"][policy][mode]["reward_mean"] for report in results_of(arm)]
    seeds = ", ".join(f"{reward:.1f}" for reward in rewards)
    cell = re.search(rf"(\d+\.\d)(\*\*)? \({re.escape(seeds)}\)", TEXTS[README])
    assert cell, seeds
    assert abs(float(cell[1]) - sum(rewards) / 3) <= 0.05 + 1e-9
    if policy == "grpo":
        shares = [report["comparison"][mode]["gap_closed"] for report in results_of(arm)]
        assert f"({', '.join(f'{share:.0%}' for share in shares)})" in TEXTS[README]


@pytest.mark.parametrize("seed", [4, 5, 6])
def test_the_headline_was_measured_with_the_schedule_of_todays_defaults(seed: int) -> None:
    config = resolve(GRPOConfig, {}, "tiny").config
    file = ROOT / "benchmarks" / "results" / f"default-seed{seed}.json"
    curve = json.loads(file.read_text())["curve"]
    shape = config.steps, config.learning_rate, config.warmup_steps, config.decay_steps
    rates = [cosine_learning_rate(step, *shape) for step in range(config.steps)]
    assert [row["update/learning_rate"] for row in curve[1:]] == pytest.approx(rates)
    evaluated = [row["step"] for row in curve if "eval/greedy_reward" in row]
    assert evaluated == [*range(0, config.steps + 1, config.eval_every)]
    rows = config.prompts_per_step * config.group_size
    assert all((row["rollout/frac_valid"] * rows).is_integer() for row in curve[1:])


@pytest.mark.parametrize("mode", ["greedy", "sampled"])
def test_the_intervals_are_what_the_raw_files_hold(mode: str) -> None:
    for seed, report in zip((4, 5, 6), results_of("default"), strict=True):
        found = report["comparison"][mode]
        low, high = found["reward_difference_ci95"]
        least, most = found["gap_closed_ci95"]
        row = (
            f"| {mode} | {seed} | +{found['reward_difference']:.1f} [{low:.1f}, {high:.1f}] "
            f"| {found['gap_closed']:.0%} [{least:.0%}, {most:.0%}] |"
        )
        assert row in TEXTS[README]


def test_the_table_of_the_study_is_what_its_raw_files_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    table = importlib.import_module("study").main_table().splitlines()
    rows = [line for line in table if line.startswith("| ")]
    assert len(rows) > 25
    assert "\n".join(rows[1:]) in TEXTS[ROOT / "docs" / "results.md"]
