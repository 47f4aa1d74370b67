"""The batch scripts as shipped, submitted to a Slurm cluster of two virtual nodes.

Real: Slurm, its signals, requeues, arrays and dependencies, torchrun and gloo between two nodes.
Not real: GPUs (names only) and separate machines.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ranks import run_ranks
from safetensors.torch import load_file

import train_sft

ROOT = Path(__file__).parents[1]
SFT = (
    "--device cpu --width 16 --mlp-width 32 --num-heads 2 --num-layers 1 --horizon 5 "
    "--num-demonstrations 23 --batch-size 4 --eval-every 1000000 --eval-cases 8"
).split()
GRPO = (
    "--device cpu --prompts-per-step 4 --group-size 2 --num-minibatches 1 --eval-every 1000000 "
    "--eval-cases 8"
).split()
ENDLESS = ["--steps", "1000000"]


def cluster_name() -> str:
    """The cluster that sbatch would submit to, empty if none answers."""
    if shutil.which("scontrol") is None:
        return ""
    done = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True)
    found = re.search(r"ClusterName\s*=\s*(\S+)", done.stdout)
    return found[1] if found else ""


pytestmark = pytest.mark.slurm


@pytest.fixture(autouse=True, scope="module")
def cluster() -> None:
    if not cluster_name().startswith("localtest"):
        pytest.skip("needs the local test cluster, which make test-slurm starts; that needs root")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """That of sbatch: the site's hook puts this python's torchrun on the path.

    In the place of a container it has a prefix that leaves a trace in the record of the attempt.
    """
    hook = tmp_path / "site" / "env.sh"
    hook.parent.mkdir()
    path = f'PATH="{Path(sys.executable).parent}:$PATH"'
    hook.write_text(f'{path}\nLAUNCH_PREFIX=(env NCCL_OF_THE_PREFIX="two words")\n')
    names = {"MINIGRPO_ENV": str(hook), "RUN_DIR": str(tmp_path / "run"), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **names}


@pytest.fixture(scope="module")
def supervised(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "sft"
    run_ranks(1, train_sft.main, [*SFT, "--steps", "2", "--save-dir", str(folder)])
    return folder


@pytest.fixture
def submit(environment: dict[str, str]) -> Iterator[Callable[..., str]]:
    """sbatch with a time limit and logs of its own; what is still there at the end is cancelled."""
    jobs = []

    def sbatch(*arguments: str, **more: str) -> str:
        logs = Path(environment["RUN_DIR"]).parent / "%A-%a-%j.out"
        command = ["sbatch", "--parsable", "--time=5", "--signal=B:USR1@60", f"--output={logs}"]
        environment_of_job = {**environment, **more}
        done = subprocess.run(
            [*command, *arguments], cwd=ROOT, env=environment_of_job, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        jobs.append(done.stdout.strip())
        return jobs[-1]

    yield sbatch
    for job in jobs:
        subprocess.run(["scancel", job], capture_output=True)


def wait(job: str, seconds: int = 600) -> None:
    subprocess.run([ROOT / "tests" / "local_slurm.sh", "wait", job, str(seconds)], check=False)


def about(job: str) -> dict[str, str]:
    """What Slurm says of a job: JobState, Restarts, ..."""
    command = ["scontrol", "show", "job", job, "--oneliner"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(part.split("=", 1) for part in shown.split() if "=" in part)


def until(condition: Callable[[], bool], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def steps_logged(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def training(folder: Path) -> Callable[[], bool]:
    return lambda: len(steps_logged(folder)) > 3


def ask_to_stop(job: str) -> None:
    """What Slurm does some minutes before the time limit."""
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)


def attempts(folder: Path) -> dict[str, dict[str, dict[str, str]]]:
    paths = sorted((folder / "attempts").glob("*/attempt.json"))
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").iterdir())


def test_two_nodes_stop_before_the_limit_and_go_on_after_a_requeue(
    submit: Callable[..., str], supervised: Path, tmp_path: Path
) -> None:
    folder, steps = tmp_path / "run", 100
    job = submit(
        "--nodes=2", "slurm/grpo.sbatch", "--init", str(supervised), "--steps", str(steps), *GRPO
    )
    until(training(folder))
    ask_to_stop(job)
    until(lambda: (folder / "STATUS").read_text() == "stopped\n")
    (saved,) = checkpoints(folder)
    assert 3 <= saved < steps
    wait(job)
    shown = about(job)
    assert (shown["JobState"], shown["Restarts"], shown["NumNodes"]) == ("COMPLETED", "1", "2")
    assert (folder / "STATUS").read_text() == "finished\n"
    assert steps_logged(folder) == list(range(steps + 1))
    first, second = attempts(folder).values()
    assert list(attempts(folder)) == [f"{job}.0", f"{job}.1"]
    for record in (first, second):
        assert record["world_size"] == 2 and record["environment"]["SLURM_NNODES"] == "2"
        assert record["environment"]["NCCL_OF_THE_PREFIX"] == "two words"
        # Ranks meet at a name of Slurm's, not at what the host calls itself, perhaps localhost.
        address = record["environment"]["MASTER_ADDR"]
        assert address == record["environment"]["PET_LOCAL_ADDR"]
        named = subprocess.check_output(["scontrol", "show", "hostnames", shown["NodeList"]])
        assert address in named.decode().split()
        assert record["config"]["init"] == str(supervised) and record["config"]["resume"] is True


def test_a_cancelled_job_is_saved_and_stays_cancelled(
    submit: Callable[..., str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    job = submit("--nodes=2", "slurm/sft.sbatch", *SFT, *ENDLESS)
    until(training(folder))
    subprocess.run(["scancel", job], check=True)
    wait(job)
    assert about(job)["JobState"] == "CANCELLED"
    assert (folder / "STATUS").read_text() == "stopped\n"
    assert checkpoints(folder) == [steps_logged(folder)[-1]]
    time.sleep(15)  # a requeued job is back after 10 s
    assert about(job)["JobState"] == "CANCELLED" and about(job)["Restarts"] == "0"


def test_a_batch_script_that_alone_gets_sigterm_saves_and_does_not_requeue(
    submit: Callable[..., str], tmp_path: Path
) -> None:
    """After scancel torchrun gets it too and fails; here the run ends well, and must stay ended."""
    folder = tmp_path / "run"
    job = submit("slurm/sft.sbatch", *SFT, *ENDLESS)
    until(training(folder))
    subprocess.run(["scancel", "--batch", "--signal=TERM", job], check=True)
    until(lambda: (folder / "STATUS").read_text() == "stopped\n")
    until(lambda: about(job)["JobState"] not in ("RUNNING", "COMPLETING"))
    assert (about(job)["JobState"], about(job)["Restarts"]) == ("FAILED", "0")


def test_a_preempted_job_is_saved_and_goes_on(submit: Callable[..., str], tmp_path: Path) -> None:
    """Without grace Slurm sends SIGTERM and requeues by itself; the script must not as well."""
    folder = tmp_path / "run"
    job = submit("slurm/sft.sbatch", *SFT, *ENDLESS)
    until(training(folder))
    subprocess.run(["scontrol", "requeue", job], check=True)
    goes_on(job, folder)


def goes_on(job: str, folder: Path) -> None:
    until(lambda: len(attempts(folder)) == 2)
    first = checkpoints(folder)[0]
    until(lambda: steps_logged(folder)[-1] > first)
    assert steps_logged(folder) == list(range(steps_logged(folder)[-1] + 1))
    assert about(job)["Restarts"] == "1"


def site_with(torchrun: str, tmp_path: Path) -> str:
    """A site's hook that puts a stand-in for torchrun on the path."""
    program, hook = tmp_path / "bin" / "torchrun", tmp_path / "bin" / "env.sh"
    program.parent.mkdir()
    program.write_text(f"#!/bin/bash\n{torchrun}\n")
    program.chmod(0o755)
    hook.write_text(f'PATH="{program.parent}:$PATH"\n')
    return str(hook)


def test_in_the_grace_of_a_preemption_jobs_are_requeued_but_not_one_that_is_cancelled(
    submit: Callable[..., str], tmp_path: Path
) -> None:
    """At its start the ranks alone get SIGTERM, and Slurm does not requeue a job that then ends."""
    folder, begun, go = tmp_path / "run", tmp_path / "begun", tmp_path / "go"
    begun.mkdir()
    slow = f"""trap 'until [[ -e "{go}" ]]; do sleep 0.1; done; exit 1' TERM
        [[ -z ${{SLURM_RESTART_COUNT:-}} ]] || exit 0
        touch "{begun}/$SLURM_JOB_ID"; sleep 600 & wait"""
    site = site_with(slow, tmp_path)
    trained = submit("slurm/sft.sbatch", *SFT, *ENDLESS)
    dates = {"SLURM_TIME_FORMAT": "%b %d"}  # as a user may want them
    evaluated = submit("slurm/evaluate.sbatch", MINIGRPO_ENV=site, **dates)
    cancelled = submit("slurm/sft.sbatch", MINIGRPO_ENV=site, RUN_DIR=str(tmp_path / "cancelled"))
    until(training(folder))
    until(lambda: {path.name for path in begun.iterdir()} == {evaluated, cancelled})
    submit("--partition=gpu", "--nodes=2", "--exclusive", "--wrap=sleep 1")
    until(lambda: all(about(job)["PreemptTime"] != "None" for job in (evaluated, cancelled)))
    subprocess.run(["scancel", cancelled], check=True)
    go.touch()
    wait(evaluated)
    assert (about(evaluated)["JobState"], about(evaluated)["Restarts"]) == ("COMPLETED", "1")
    goes_on(trained, folder)
    assert about(trained)["PreemptTime"] == "None"  # or a crash would requeue it for ever
    assert (about(cancelled)["JobState"], about(cancelled)["Restarts"]) == ("CANCELLED", "0")


def test_ranks_get_their_environment_and_all_of_the_job_whatever_sbatch_was_told(
    environment: dict[str, str], submit: Callable[..., str], tmp_path: Path
) -> None:
    """--export without PATH, GPUs beside those of the script, and what is left of another job."""
    tell = """echo finished > "$RUN_DIR/STATUS"
        said="$CUDA_VISIBLE_DEVICES of $SLURM_STEP_NUM_NODES, $SLURM_CPUS_PER_TASK CPUs"
        echo "$said" > "$RUN_DIR/$SLURMD_NODENAME"
    """
    site, run = site_with(tell, tmp_path), tmp_path / "run"
    told = [f"--export=MINIGRPO_ENV={site},RUN_DIR={run}", "--gres=gpu:4", "--cpus-per-task=8"]
    left = {"SLURM_MEM_PER_GPU": "9", "SLURM_MEM_PER_CPU": "9", "SLURM_NTASKS_PER_GPU": "1"}
    job = submit("--nodes=2", *told, "slurm/sft.sbatch", **left)
    wait(job)
    assert about(job)["JobState"] == "COMPLETED"
    said = {path.name: path.read_text() for path in run.iterdir() if path.name != "STATUS"}
    assert list(said.values()) == ["0,1,2,3 of 2, 8 CPUs\n"] * 2


def test_after_the_last_requeue_a_stopped_job_fails(
    submit: Callable[..., str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    job = submit("slurm/sft.sbatch", *SFT, *ENDLESS, MAX_REQUEUES="0")
    until(training(folder))
    ask_to_stop(job)
    wait(job)
    assert about(job)["JobState"] == "FAILED" and about(job)["Restarts"] == "0"
    assert (folder / "STATUS").read_text() == "stopped\n"


def test_an_array_has_a_seed_and_a_folder_for_each_task(
    submit: Callable[..., str], tmp_path: Path
) -> None:
    """One task is asked to stop and requeued; its neighbour does not notice."""
    folders = {seed: tmp_path / "run" / f"seed-{seed}" for seed in (3, 5)}
    job = submit("--array=3,5", "slurm/sft.sbatch", *SFT, "--steps", "400")
    until(training(folders[3]))
    ask_to_stop(f"{job}_3")
    wait(job)
    for seed, restarts in ((3, "1"), (5, "0")):
        shown = about(f"{job}_{seed}")
        assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", restarts)
        assert [record["config"]["seed"] for record in attempts(folders[seed]).values()] == [
            seed
        ] * (int(restarts) + 1)
        assert steps_logged(folders[seed]) == list(range(401))
    weights = [load_file(folder / "model.safetensors") for folder in folders.values()]
    assert not weights[0]["lm_head.weight"].equal(weights[1]["lm_head.weight"])


def pipeline(environment: dict[str, str], *arguments: str) -> list[str]:
    """The ids of its three jobs."""
    logs = Path(environment["RUN_DIR"]).parent / "%x.out"
    done = subprocess.run(
        ["slurm/pipeline.sh", "--time=5", f"--output={logs}", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["sft", "grpo", "evaluate", "in"]
    return [line[1] for line in lines[:3]]


def test_the_pipeline_runs_in_order_and_its_arguments_arrive_as_they_are(
    environment: dict[str, str], tmp_path: Path
) -> None:
    starts = tmp_path / "two words, $HOME" / "starts.json"
    starts.parent.mkdir()
    starts.write_text("[[0.5, -0.25], [0.1, 0.2], [-0.3, 0.0]]")
    evaluation = ["--device", "cpu", "--mpc-cases", "2", "--initial-states", str(starts)]
    jobs = pipeline(
        environment, "--", *SFT, "--steps", "3", "--", *GRPO, "--steps", "2", "--", *evaluation
    )
    wait(jobs[2])
    assert [about(job)["JobState"] for job in jobs] == ["COMPLETED"] * 3
    sft, grpo = tmp_path / "run" / "sft", tmp_path / "run" / "grpo"
    assert steps_logged(sft) == [0, 1, 2, 3] and steps_logged(grpo) == [0, 1, 2]
    report = json.loads((grpo / "evaluation" / "evaluation.json").read_text())
    assert report["num_cases"] == 3 and set(report["policies"]) >= {"sft", "grpo", "lqr"}
    assert report["config"]["initial_states"] == str(starts)


def test_a_dry_run_prints_the_commands_and_submits_nothing(environment: dict[str, str]) -> None:
    options, flags = ["--account=abc", "--comment=two words"], ["--model", "it's $HOME"]
    command = ["slurm/pipeline.sh", "--dry-run", *options, "--", *flags, "--", "--steps", "3"]
    queue = ["scontrol", "show", "jobs", "--oneliner"]
    before = subprocess.run(queue, capture_output=True, text=True).stdout.count("JobId=")
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert subprocess.run(queue, capture_output=True, text=True).stdout.count("JobId=") == before
    sft, grpo, evaluate = (shlex.split(line) for line in done.stdout.splitlines())
    assert set(options) <= set(sft) & set(grpo) & set(evaluate)
    assert sft[-3:] == ["slurm/sft.sbatch", *flags] and "--dependency" not in " ".join(sft)
    assert grpo[-3:] == ["slurm/grpo.sbatch", "--steps", "3"]
    assert "--dependency=afterok:<sft>" in grpo and "--dependency=afterok:<grpo>" in evaluate
    assert evaluate[-1] == "slurm/evaluate.sbatch"


def test_the_pipeline_refuses_a_save_dir_before_it_submits(environment: dict[str, str]) -> None:
    for words in ("--save-dir=x", "-- --save-dir x", "-- --steps 3 -- --save_dir x"):
        command = ["slurm/pipeline.sh", "--dry-run", *words.split()]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "") and "set RUN_DIR=" in done.stderr


def test_a_script_that_is_not_submitted_says_how_it_is(environment: dict[str, str]) -> None:
    alone = {k: v for k, v in environment.items() if k not in ("SLURM_SUBMIT_DIR", "MINIGRPO_ROOT")}
    for stage in ("sft", "grpo", "evaluate"):
        command = ["bash", f"slurm/{stage}.sbatch"]
        done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)
        assert done.returncode > 0 and f"submit it: sbatch slurm/{stage}.sbatch" in done.stderr


def test_a_job_without_gpus_has_one_rank_or_as_many_as_are_asked_for(
    submit: Callable[..., str], tmp_path: Path
) -> None:
    for ranks, more in ((1, {}), (2, {"NPROC_PER_NODE": "2"})):
        run = tmp_path / f"run-{ranks}"
        options = ["--gpus-per-node=0", "--cpus-per-task=2", "slurm/sft.sbatch"]
        job = submit(*options, *SFT, "--steps", "3", RUN_DIR=str(run), **more)
        wait(job)
        assert about(job)["JobState"] == "COMPLETED"
        assert attempts(run)[f"{job}.0"]["world_size"] == ranks


def test_a_crash_fails_the_job_and_cancels_its_dependents(
    environment: dict[str, str], tmp_path: Path
) -> None:
    jobs = pipeline(environment, "--", *SFT, "--steps", "3", "--width", "15")
    for job in jobs:
        wait(job)
    assert [about(job)["JobState"] for job in jobs] == ["FAILED", "CANCELLED", "CANCELLED"]
    assert about(jobs[0])["Restarts"] == "0"
    assert "width must be a multiple of num_heads=2, got 15" in (tmp_path / "sft.out").read_text()
    assert not (tmp_path / "run" / "grpo").exists()
