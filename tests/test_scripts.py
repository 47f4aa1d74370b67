"""What the batch scripts and the benchmark refuse before any work; Slurm is in test_slurm."""

import importlib
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import config_from_args, parse_args

ROOT = Path(__file__).resolve().parents[1]
SOURCE = f"set -euo pipefail; root={shlex.quote(str(ROOT))}; source slurm/common.sh"


def sourced(env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """common.sh as a batch script reads it; it ends at `scontrol`, which is not there."""
    return subprocess.run(
        ["/bin/bash", "-c", SOURCE], cwd=ROOT, env=env, capture_output=True, text=True
    )


def test_a_site_script_that_is_missing_or_fails_is_named(tmp_path: Path) -> None:
    missing = sourced({"MINIGRPO_ENV": str(tmp_path / "none.sh")})
    assert missing.returncode == 2
    assert (
        missing.stderr == f"error: MINIGRPO_ENV must be a readable script, got {tmp_path}/none.sh\n"
    )
    site = tmp_path / "env.sh"
    site.write_text("echo before\nfalse # a module that is not there\necho after\n")
    failing = sourced({"MINIGRPO_ENV": str(site)})
    assert failing.returncode == 1 and failing.stdout == "before\n"
    assert failing.stderr == f"error: {site} failed at: false\n"
    site.write_text("echo $NOWHERE_SET; hash nowhere || true; echo fine\n")
    fine = sourced({"MINIGRPO_ENV": str(site)})
    assert fine.stdout == "\nfine\n" and "env.sh failed" not in fine.stderr


GRACE = "   JobState=RUNNING Reason=None\n   PreemptTime=2026-01-31T08:00:00 SuspendTime=None"
NO_GRACE = GRACE.replace("2026-01-31T08:00:00", "None")
CANCELLED = GRACE.replace("RUNNING", "CANCELLED")


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script: $RANKS stands for srun, $SHOWN for what Slurm says.

    The first two requeues find no slurmctld. What srun is given lies in `given` and `environ`.
    """
    programs, run = tmp_path / "bin", tmp_path / "a run"
    programs.mkdir()
    run.mkdir()
    bodies = {
        "srun": 'printf "%s\\0" "$@" > given; env -0 > environ; eval "$RANKS"',
        "scontrol": """case "$1 $2" in
            "show hostnames") echo node0 ;;
            "show job") [[ $3 == "$ID" ]] && echo "$SHOWN" ;;
            "requeue $ID") echo >> requeues; (($(wc -l < requeues) > 2)) ;;
        esac""",
        "squeue": "",
        "sleep": "",
    }
    for name, body in bodies.items():
        (programs / name).write_text(f"#!/bin/bash\ncd {shlex.quote(str(tmp_path))}\n{body}\n")
        (programs / name).chmod(0o755)
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    return {
        "PATH": path, "RUN_DIR": str(run), "ID": "7", "SLURM_JOB_ID": "7", "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "node0", "SLURM_JOB_NAME": "grpo", "SLURM_CPUS_ON_NODE": "2",
        "MINIGRPO_ENV": "/dev/null", "MINIGRPO_ROOT": str(ROOT), "RANKS": "", "SHOWN": NO_GRACE,
    }  # fmt: skip


def submitted(stage: str, env: dict[str, str]) -> int:
    command = ["/bin/bash", f"slurm/{stage}.sbatch", "--model-path", "x"]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True).returncode


def requeues(tmp_path: Path) -> int:
    path = tmp_path / "requeues"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.parametrize(
    ("trainer", "shown", "code", "left", "tries"),
    [
        ("exit 2", NO_GRACE, 2, "finished", 0),  # it refused, and the run is as it was
        ("exit 0", NO_GRACE, 1, "finished", 0),  # nobody said that this attempt has finished
        ('echo finished > "$RUN_DIR/STATUS"', NO_GRACE, 0, "finished", 0),
        # SIGTERM came in the last step, as a scancel or in the grace of a preemption.
        ('echo finished > "$RUN_DIR/STATUS"; exit 1', NO_GRACE, 0, "finished", 0),
        ('echo finished > "$RUN_DIR/STATUS"; exit 1', GRACE, 0, "finished", 0),
        ('echo failed > "$RUN_DIR/STATUS"; exit 3', NO_GRACE, 3, "failed", 0),
        ('echo failed > "$RUN_DIR/STATUS"', NO_GRACE, 1, "failed", 0),
        ('echo stopped > "$RUN_DIR/STATUS"', NO_GRACE, 1, "stopped", 3),
        ('echo stopped > "$RUN_DIR/STATUS"; exit 1', NO_GRACE, 1, "stopped", 0),
        ('echo stopped > "$RUN_DIR/STATUS"; exit 1', GRACE, 1, "stopped", 3),
        ('echo stopped > "$RUN_DIR/STATUS"; exit 1', CANCELLED, 1, "stopped", 0),
        ("exit 143", GRACE, 143, "finished", 3),  # killed before it could save, even begin
    ],
)
def test_a_job_ends_as_its_own_attempt_did_or_is_requeued(
    trainer: str,
    shown: str,
    code: int,
    left: str,
    tries: int,
    job: dict[str, str],
    tmp_path: Path,
) -> None:
    status = Path(job["RUN_DIR"]) / "STATUS"
    status.write_text("finished\n")
    assert submitted("grpo", job | {"RANKS": trainer, "SHOWN": shown}) == code
    assert (status.read_text(), requeues(tmp_path)) == (f"{left}\n", tries)


@pytest.mark.parametrize("array", [{}, {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}])
@pytest.mark.parametrize(
    ("ended", "shown", "tries"),
    [(0, GRACE, 0), (1, GRACE, 3), (1, CANCELLED, 0), (3, NO_GRACE, 0)],
)
def test_an_evaluation_is_requeued_in_the_grace_of_a_preemption(
    ended: int, shown: str, tries: int, array: dict[str, str], job: dict[str, str], tmp_path: Path
) -> None:
    """In an array only that task: what Slurm says of the job's own id may be all of them."""
    env = job | array | {"RANKS": f"exit {ended}", "SHOWN": shown, "ID": "5_2" if array else "7"}
    assert submitted("evaluate", env) == ended
    assert requeues(tmp_path) == tries


def test_ranks_get_all_that_the_job_has_and_nothing_of_another_job(
    job: dict[str, str], tmp_path: Path
) -> None:
    of_this_job = {
        "SLURM_NNODES": "3", "SLURM_CPUS_ON_NODE": "64", "SLURM_JOB_CPUS_PER_NODE": "64(x2),48",
        "SLURM_GPUS_ON_NODE": "4", "SLURM_GPUS_PER_NODE": "1", "SLURM_EXPORT_ENV": "NONE",
    }  # fmt: skip
    of_another = (
        "CPU_BIND CPUS_PER_GPU CPUS_PER_TASK GPUS GPUS_PER_TASK MEM_PER_CPU MEM_PER_GPU "
        "MEM_PER_NODE NTASKS_PER_GPU TRES_PER_TASK"
    )
    names = [f"SLURM_{name}" for name in of_another.split()]
    submitted("grpo", job | of_this_job | dict.fromkeys(names, "9"))
    pairs = (tmp_path / "environ").read_text().split("\0")
    environ = dict(pair.split("=", 1) for pair in pairs if pair)
    assert not environ.keys() & {*names}
    expected = {
        "SLURM_EXPORT_ENV": "ALL", "SLURM_GPUS_PER_NODE": "4", "SRUN_CPUS_PER_TASK": "48",
        "OMP_NUM_THREADS": "12",
    }  # fmt: skip
    assert expected.items() <= environ.items()
    given = (tmp_path / "given").read_text().split("\0")
    assert {"--nodes=3", "--ntasks-per-node=1"} <= {*given}
    flags = given[given.index("torchrun") + 1 : -1]
    launch = config_from_args(parse_args(flags))[0]
    assert (launch.min_nodes, launch.max_nodes, launch.nproc_per_node) == (3, 3, 4)
    assert launch.rdzv_configs["read_timeout"] == "600"
    without = job | of_this_job | {"SLURM_GPUS_ON_NODE": "0"}
    submitted("grpo", without)
    assert "SLURM_GPUS_PER_NODE" not in (tmp_path / "environ").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sections nope", "--sections must be of correct, .*, got nope"),
        ("--arms ours,theirs", "--arms must be of ours, .*, got theirs"),
        ("--steps 0", "--steps and --loops must be at least 1"),
        ("--out /nowhere/x.json", "--out must be a file in a folder that is there"),
        ("--core 4096", "--core must be one of"),
    ],
)
def test_the_benchmark_refuses_before_it_measures(
    flags: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which it sets where nobody else has
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr("sys.argv", ["bench.py", *flags.split()])
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module("bench").main()
    message_line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, message_line), message_line
