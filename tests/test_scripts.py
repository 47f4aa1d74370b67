"""What the batch scripts and the benchmark refuse before any work; Slurm is in test_slurm."""

import importlib
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("trainer", "code", "left"),
    [
        ("exit 2", 2, "finished"),  # it refused, and the run is as it was
        ("exit 0", 1, "finished"),  # nobody said that this attempt has finished
        ('echo finished > "$RUN_DIR/STATUS"', 0, "finished"),
        ('echo failed > "$RUN_DIR/STATUS"; exit 3', 3, "failed"),
        ('echo failed > "$RUN_DIR/STATUS"', 1, "failed"),
    ],
)
def test_a_job_ends_as_its_own_attempt_did(
    trainer: str, code: int, left: str, tmp_path: Path
) -> None:
    programs, run = tmp_path / "bin", tmp_path / "a run"
    programs.mkdir()
    run.mkdir()
    (run / "STATUS").write_text("finished\n")
    for name, body in (("scontrol", "echo node0"), ("srun", trainer), ("squeue", "")):
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    env = {
        "PATH": path, "RUN_DIR": str(run), "SLURM_JOB_ID": "7", "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "node0", "SLURM_JOB_NAME": "grpo", "SLURM_CPUS_ON_NODE": "2",
        "MINIGRPO_ENV": "/dev/null",
    }  # fmt: skip
    script = f"{SOURCE}; launch train_grpo.py"
    done = subprocess.run(
        ["/bin/bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert (run / "STATUS").read_text() == f"{left}\n"


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
