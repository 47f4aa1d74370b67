"""Runs that are killed, stopped, starved of disk or started twice: nothing of a run is lost.

Every run here is train_grpo.py or train_sft.py in processes of their own. What is compared with an
undisturbed run is all that a run leaves: published model, last checkpoint and AdamW's moments bit
for bit, metrics.jsonl and samples.jsonl line for line (times aside).
"""

import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from ranks import FORKED, run_ranks, start_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import minigrpo.sft
import train_grpo
import train_sft
from minigrpo.distributed import rank
from minigrpo.optim import cosine_learning_rate
from minigrpo.transformer import Transformer

SFT = (
    "--device cpu --width 16 --mlp-width 32 --num-heads 2 --num-layers 1 --horizon 5 --steps 8 "
    "--num-demonstrations 23 --batch-size 5 --micro-batch-size 2 --learning-rate 3e-2 "
    "--eval-every 5 --eval-cases 8 --save-every 2"
).split()
GRPO = (
    "--device cpu --steps 8 --prompts-per-step 4 --group-size 3 --num-epochs 2 "
    "--num-minibatches 1 --micro-batch-size 5 --temperature 1 --learning-rate 1e-2 "
    "--eval-every 3 --eval-cases 8 --save-every 2"
).split()
RESUME = ["--resume"]
Action = Callable[[], object]


def train(stage: str, flags: Sequence[str], at: int = 0, action: Action = lambda: None) -> None:
    """The trainer's main; the action happens within the optimizer step with that number."""
    num_steps = 0

    def counted(work: Callable[..., object]) -> Callable[..., object]:
        def step(*arguments: object) -> object:
            nonlocal num_steps
            num_steps += 1
            if num_steps == at:
                action()
            return work(*arguments)

        return step

    train_grpo.update_policy = counted(train_grpo.update_policy)  # type: ignore[assignment]
    train_sft.supervised_step = counted(train_sft.supervised_step)  # type: ignore[assignment]
    (train_grpo if stage == "grpo" else train_sft).main(flags)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], list[str]]:
    """The flags of a run of either stage in a folder; GRPO starts from a model that can write."""
    supervised = tmp_path_factory.mktemp("supervised") / "sft"
    steps = ["--steps", "40", "--batch-size", "16", "--eval-every", "40"]
    run_ranks(1, train, "sft", [*SFT, *steps, "--save-dir", str(supervised)])

    def flags(stage: str, folder: Path) -> list[str]:
        own = [*GRPO, "--init", str(supervised)] if stage == "grpo" else SFT
        return [*own, "--save-dir", str(folder)]

    return flags


@pytest.fixture(scope="module")
def undisturbed(
    begun: Callable[[str, Path], list[str]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folders = {stage: tmp_path_factory.mktemp("undisturbed") / stage for stage in ("sft", "grpo")}
    for stage, folder in folders.items():
        run_ranks(1, train, stage, begun(stage, folder))
    return folders


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, float]]:
    found = map(json.loads, (folder / name).read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in found]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def status(folder: Path) -> str:
    return (folder / "STATUS").read_text().strip()


def tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return load_file(path), file.metadata()


def assert_same_run(folder: Path, expected: Path) -> None:
    assert status(folder) == "finished" and not (folder / "LOCK").exists()
    assert checkpoints(folder) == checkpoints(expected) and len(checkpoints(folder)) == 2
    newest = Path("checkpoints") / checkpoints(folder)[-1]
    for name in ("model.safetensors", newest / "model.safetensors", newest / "trainer.safetensors"):
        (got, described), (wanted, metadata) = tensors(folder / name), tensors(expected / name)
        assert described == metadata and got.keys() == wanted.keys()
        assert [key for key in got if not torch.equal(got[key], wanted[key])] == []
    assert lines(folder) == lines(expected)
    assert [line["step"] for line in lines(folder)] == list(range(len(lines(folder))))
    if (expected / "samples.jsonl").exists():
        assert lines(folder, "samples.jsonl") == lines(expected, "samples.jsonl")


def raise_signal(number: int, on_rank: int = 0) -> None:
    if rank() == on_rank:
        os.kill(os.getpid(), number)


def touch(path: Path) -> None:
    path.write_text("")


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_eight_steps_are_four_and_resume_and_four(
    stage: str,
    begun: Callable[[str, Path], list[str]],
    undisturbed: dict[str, Path],
    tmp_path: Path,
) -> None:
    flags = begun(stage, tmp_path / "run")
    run_ranks(1, train, stage, flags, 4, partial(raise_signal, signal.SIGTERM))
    assert status(tmp_path / "run") == "stopped" and len(lines(tmp_path / "run")) == 5
    run_ranks(1, train, stage, [*flags, *RESUME])
    assert_same_run(tmp_path / "run", undisturbed[stage])


LOOKING_BACK = (
    "--plateau-patience 1 --adaptive-terminal --final-temperature 0.5 --curriculum-steps 6 "
    "--stop-patience 3 --eval-every 2 --warmup-steps 1 --decay-steps 3 "
    "--learning-rate 1e-12"  # no score can become a new best
).split()


def test_schedules_that_look_back_go_on_where_they_were(
    begun: Callable[[str, Path], list[str]], tmp_path: Path
) -> None:
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    run_ranks(1, train, "grpo", [*begun("grpo", straight), *LOOKING_BACK])
    flags = [*begun("grpo", cut), *LOOKING_BACK]
    run_ranks(1, train, "grpo", flags, 2, partial(raise_signal, signal.SIGTERM))
    assert status(cut) == "stopped"
    run_ranks(1, train, "grpo", [*flags, *RESUME])
    assert_same_run(cut, straight)
    found = lines(straight)
    rewards = [line["reward/total"] for line in found[1:]]
    plain = [cosine_learning_rate(step, 8, 1e-12, 1, 3) for step in range(len(rewards))]
    for step, line in enumerate(found[1:]):  # of the steps before, each one that earned no more
        drops = sum(b <= a for a, b in pairwise(rewards[:step]))
        assert line["update/learning_rate"] == plain[step] * 0.5**drops
    assert plain != [line["update/learning_rate"] for line in found[1:]]
    assert (
        len(found) == 7
    )  # evaluated after 0, 2, 4 and 6 steps, and none was better than the first
    run_ranks(1, train, "grpo", [*flags, *RESUME])  # and is not resumed into more steps
    assert lines(cut) == found and status(cut) == "finished"
    two = tmp_path / "two"  # ranks look back on the same history, also on what a run resumes
    flags = [*begun("grpo", two), *LOOKING_BACK]
    run_ranks(2, train, "grpo", flags, 2, partial(raise_signal, signal.SIGTERM))
    run_ranks(2, train, "grpo", [*flags, *RESUME])
    rates = [line["update/learning_rate"] for line in lines(two)[1:]]
    assert status(two) == "finished" and rates[:2] == plain[:2]


def ways_to_stop(folder: Path) -> dict[str, tuple[int, Action, list[str]]]:
    """Ranks, what happens in the third step, more flags."""
    return {
        "SIGTERM": (1, partial(raise_signal, signal.SIGTERM), []),
        "SIGTERM on the second of two ranks": (2, partial(raise_signal, signal.SIGTERM, 1), []),
        "SIGUSR1": (1, partial(raise_signal, signal.SIGUSR1), []),
        "Ctrl-C": (1, partial(raise_signal, signal.SIGINT), []),
        "stop file": (1, partial(touch, folder / "STOP"), []),
        "stop file and two ranks": (2, partial(touch, folder / "STOP"), []),
        "deadline": (1, partial(time.sleep, 0.6), ["--stop-after-minutes", "0.01"]),
    }


@pytest.mark.parametrize("way", ways_to_stop(Path()))
def test_a_stop_is_saved_and_ends_well(
    way: str,
    begun: Callable[[str, Path], list[str]],
    undisturbed: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    num_ranks, action, more = ways_to_stop(folder)[way]
    exits = start_ranks(num_ranks, train, "grpo", [*begun("grpo", folder), *more], 3, action)
    assert exits == [int(way == "Ctrl-C")] * num_ranks  # of a KeyboardInterrupt, after all is saved
    assert status(folder) == "stopped" and not (folder / "LOCK").exists()
    last = int(lines(folder)[-1]["step"])
    assert 1 <= last <= 3 and (last == 3 or way == "deadline")  # which a slow machine meets sooner
    assert checkpoints(folder)[-1] == f"step-{last:06d}"
    if num_ranks == 1:
        assert lines(folder) == lines(undisturbed["grpo"])[: last + 1]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, "ddp"), [(1, "ddp"), (3, "ddp"), (2, "fsdp")]),
        ((2, "fsdp"), [(1, "fsdp"), (2, "ddp"), (3, "fsdp")]),
    ],
)
def test_a_checkpoint_resumes_on_other_numbers_of_ranks_sharded_or_not(
    before: tuple[int, str],
    after: list[tuple[int, str]],
    begun: Callable[[str, Path], list[str]],
    undisturbed: dict[str, Path],
    tmp_path: Path,
) -> None:
    stop = partial(raise_signal, signal.SIGTERM)
    num_ranks, parallel = before
    flags = [*begun("grpo", tmp_path / "run"), "--parallel", parallel]
    run_ranks(num_ranks, train, "grpo", flags, 4, stop)
    assert status(tmp_path / "run") == "stopped"
    for num_ranks, parallel in after:
        folder = tmp_path / f"{num_ranks}-{parallel}"
        shutil.copytree(tmp_path / "run", folder)
        flags = [*begun("grpo", folder), "--parallel", parallel, *RESUME]
        run_ranks(num_ranks, train, "grpo", flags)
        assert status(folder) == "finished"
        for got, expected in zip(lines(folder), lines(undisturbed["grpo"]), strict=True):
            # Other batch shapes round differently, and eight updates carry that on.
            assert got == pytest.approx(expected, rel=1e-2, abs=1e-4, nan_ok=True)


def move_away(folder: Path) -> None:
    """Somebody moves the folder of a run that is at work, and another one begins in its place."""
    if rank() == 0:
        folder.rename(folder.with_name("moved"))
        folder.mkdir()
        (folder / "LOCK").write_text('{"job": "", "pid": 1, "host": "elsewhere"}')


@pytest.mark.parametrize(("stage", "num_ranks"), [("sft", 1), ("grpo", 1), ("grpo", 2)])
def test_a_run_whose_folder_was_moved_writes_nothing_into_what_took_its_place(
    stage: str,
    num_ranks: int,
    begun: Callable[[str, Path], list[str]],
    undisturbed: dict[str, Path],
    tmp_path: Path,
) -> None:
    """In the sixth step, after which a checkpoint and in which an evaluation would be due."""
    folder, errors = tmp_path / "run", tmp_path / "errors"
    flags = begun(stage, folder)
    action = partial(move_away, folder)
    assert start_ranks(num_ranks, train, stage, flags, 6, action, errors=errors) == [1] * num_ranks
    assert f"{folder} is not this run's any more" in errors.read_text()
    assert [path.name for path in folder.iterdir()] == ["LOCK"]
    shutil.rmtree(folder)
    (tmp_path / "moved").rename(folder)
    assert status(folder) == "running" and len(lines(folder)) == 6
    run_ranks(num_ranks, train, stage, [*flags, *RESUME])
    if num_ranks == 1:
        assert_same_run(folder, undisturbed[stage])


def kill_at_random(flags: list[str], folder: Path, seconds: float, seed: int) -> int | None:
    """Resume, kill -9 within `seconds` of the start or in the middle of a save -> exit code."""
    instant = random.Random(seed)
    process = FORKED.Process(target=train, args=("grpo", [*flags, *RESUME]))
    process.start()
    end = time.monotonic() + instant.uniform(0, seconds)
    while time.monotonic() < end and process.is_alive():
        if seed % 3 == 2 and list((folder / "checkpoints").glob("*.tmp")):
            break
        time.sleep(0.0005)
    process.kill()
    process.join()
    return process.exitcode


@pytest.mark.parametrize(
    ("num_kills", "num_steps"), [(3, 8), pytest.param(20, 160, marks=pytest.mark.slow)]
)
def test_kill_9_at_any_instant_loses_nothing(
    num_kills: int, num_steps: int, begun: Callable[[str, Path], list[str]], tmp_path: Path
) -> None:
    """A kill may come as late as an undisturbed run of eight steps takes."""
    began = time.monotonic()
    run_ranks(1, train, "grpo", begun("grpo", tmp_path / "timed"))
    seconds = (time.monotonic() - began) * (0.6 if num_steps == 8 else 1.2)
    # A lower rate than the other tests': at 1e-2 nothing is left to learn after 140 steps.
    steps = ["--steps", str(num_steps), "--learning-rate", "1e-3"]
    run_ranks(1, train, "grpo", [*begun("grpo", tmp_path / "undisturbed"), *steps])
    folder = tmp_path / "run"
    flags = [*begun("grpo", folder), *steps]
    exits, reached = [], []
    for seed in range(num_kills):
        exits.append(kill_at_random(flags, folder, seconds, seed))
        log = folder / "metrics.jsonl"
        reached.append(log.read_bytes().count(b"\n") if log.exists() else 0)
    print("lines of metrics.jsonl at each kill:", reached)
    # The last of eight steps may be done before the last kill.
    wanted = 1 if num_steps == 8 else num_kills
    assert exits.count(-9) >= wanted, "too few steps, or too late"
    run_ranks(1, train, "grpo", [*flags, *RESUME])
    assert_same_run(folder, tmp_path / "undisturbed")


def test_a_cut_newest_checkpoint_is_not_used(
    begun: Callable[[str, Path], list[str]],
    undisturbed: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    flags = begun("grpo", folder)
    run_ranks(1, train, "grpo", flags, 4, partial(raise_signal, signal.SIGTERM))
    newest = folder / "checkpoints" / "step-000004"
    os.truncate(newest / "trainer.safetensors", 1000)
    errors = tmp_path / "errors"
    assert start_ranks(1, train, "grpo", [*flags, *RESUME], errors=errors) == [0]
    assert f"{newest} is damaged and not used" in errors.read_text()
    assert_same_run(folder, undisturbed["grpo"])


def fill_the_disk() -> None:
    """From now on no file grows beyond 20 kB, as if the disk were full; the logs still fit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_full_disk_during_a_save_ends_the_run_and_loses_nothing(
    begun: Callable[[str, Path], list[str]],
    undisturbed: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    flags = begun("sft", folder)
    errors = tmp_path / "errors"
    assert start_ranks(1, train, "sft", flags, 4, fill_the_disk, errors=errors) == [1]
    assert f"{folder}/checkpoints/step-000004.tmp could not be written" in errors.read_text()
    assert checkpoints(folder) == ["step-000002"]
    run_ranks(1, train, "sft", [*flags, *RESUME])
    assert_same_run(folder, undisturbed["sft"])


def test_a_full_disk_ends_every_rank(
    begun: Callable[[str, Path], list[str]], tmp_path: Path
) -> None:
    flags = begun("sft", tmp_path / "run")
    assert start_ranks(2, train, "sft", flags, 4, fill_the_disk) == [1, 1]
    assert checkpoints(tmp_path / "run") == ["step-000002"]


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_of_two_jobs_on_one_folder_the_second_stops_and_the_first_goes_on(
    flag: str,
    begun: Callable[[str, Path], list[str]],
    undisturbed: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder, go_on = tmp_path / "run", tmp_path / "go on"
    flags = begun("grpo", folder)
    first = FORKED.Process(target=train, args=("grpo", flags, 4, partial(wait_for, go_on)))
    first.start()
    try:
        wait_for(folder / "checkpoints" / "step-000002")
        errors = tmp_path / "errors"
        assert start_ranks(1, train, "grpo", [*flags, flag], errors=errors) == [1]
        assert f"{folder} is in use by process {first.pid}" in errors.read_text()
    finally:
        touch(go_on)
        first.join()
    assert first.exitcode == 0
    assert_same_run(folder, undisturbed["grpo"])


def spoil_rollouts(of_rank: int) -> None:
    make_rollout = train_grpo.make_rollout

    def spoiled(*arguments: object) -> object:
        rollout, experience, seconds = make_rollout(*arguments)  # type: ignore[arg-type]
        if rank() == of_rank:
            rollout.advantages.fill_(torch.nan)
        return rollout, experience, seconds

    train_grpo.make_rollout = spoiled  # type: ignore[assignment]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_gradient_that_is_not_finite_is_not_applied_and_the_third_in_a_row_ends_the_run(
    num_ranks: int,
    begun: Callable[[str, Path], list[str]],
    tmp_path: Path,
) -> None:
    """From the third step on the last rank's advantages are NaN: all ranks skip together."""
    folder = tmp_path / "run"
    flags = [*begun("grpo", folder), "--num-epochs", "1", "--num-minibatches", "1"]
    spoil = partial(spoil_rollouts, num_ranks - 1)
    flags += ["--save-every", "1"]
    errors = tmp_path / "errors"
    exits = start_ranks(num_ranks, train, "grpo", flags, 2, spoil, errors=errors)
    message = "3 optimizer steps in a row had a gradient that is not finite"
    assert exits == [1] * num_ranks and message in errors.read_text()
    assert [line["update/num_skipped"] for line in lines(folder)[1:]] == [0, 0, 1, 1, 1]
    before, after = (
        load_file(folder / "checkpoints" / f"step-00000{step}" / "model.safetensors")
        for step in (3, 4)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    saved = sorted((folder / "skipped").iterdir())
    assert len(saved) == 3 * num_ranks
    batch = load_file(saved[-1])
    assert batch["advantages"].isnan().all()
    assert batch["credit.choices.values"].shape[:2] == batch["advantages"].shape
    assert len(batch["credit.choices.plans.own"]) == len(batch["advantages"])


def spoil_loss(of_rank: int) -> None:
    loss = minigrpo.sft.sft_loss

    def spoiled(*arguments: object) -> Tensor:
        return loss(*arguments) * (torch.nan if rank() == of_rank else 1.0)  # type: ignore[arg-type]

    minigrpo.sft.sft_loss = spoiled


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_in_supervised_training_the_first_gradient_that_is_not_finite_ends_the_run(
    num_ranks: int, begun: Callable[[str, Path], list[str]], tmp_path: Path
) -> None:
    """It has no excuse there. In the third step the last rank's loss is NaN."""
    folder, errors = tmp_path / "run", tmp_path / "errors"
    spoil = partial(spoil_loss, num_ranks - 1)
    flags = [*begun("sft", folder), "--eval-every", "3"]
    exits = start_ranks(num_ranks, train, "sft", flags, 3, spoil, errors=errors)
    message = "the gradient of step 3 is not finite and was not applied; its batch is in"
    assert exits == [1] * num_ranks and message in errors.read_text()
    assert checkpoints(folder) == ["step-000002"]
    last = lines(folder)[-1]
    assert last["step"] == 3 and last["loss/total"] is None and "eval/greedy_reward" not in last
    saved = sorted(path.name for path in (folder / "skipped").iterdir())
    assert saved == [f"step-000003-rank-{place}.safetensors" for place in range(num_ranks)]


def nudge_the_second_rank(stage: str) -> None:
    """From the next step on its last weights are off by a little."""
    module = train_grpo if stage == "grpo" else train_sft
    name = "update_policy" if stage == "grpo" else "supervised_step"
    work = getattr(module, name)

    def nudged(model: Transformer, *arguments: object) -> object:
        done = work(model, *arguments)
        if rank() == 1:
            list(model.parameters())[-1].data += 1e-6
        return done

    setattr(module, name, nudged)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_ranks_whose_weights_part_end_the_run(
    stage: str, begun: Callable[[str, Path], list[str]], tmp_path: Path
) -> None:
    """The third step is the first to go wrong, the fourth is looked at before it is saved."""
    folder, errors = tmp_path / "run", tmp_path / "errors"
    nudge = partial(nudge_the_second_rank, stage)
    flags = [*begun(stage, folder), "--sync-check", "4"]
    assert start_ranks(2, train, stage, flags, 2, nudge, errors=errors) == [1, 1]
    assert "differs between ranks 0 and 1" in errors.read_text()
    assert checkpoints(folder) == ["step-000002"]
