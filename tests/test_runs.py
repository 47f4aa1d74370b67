"""The run folder: one owner, nothing of others deleted, no step twice, every line valid JSON."""

import functools
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType, SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import FORKED
from tiny import untrained_checkpoint

import evaluate
import train_grpo
import train_sft
from minigrpo import gradient_signal, optim, runs, training
from minigrpo.checkpoint import published
from minigrpo.data import split_starts
from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.runs import (
    HOST,
    RunFolder,
    StopSignal,
    console_line,
    on_rank_zero,
    open_run,
    run_command,
    set_matmul_precision,
    slow_bfloat16,
    to_json,
    write_text,
)
from minigrpo.transformer import Transformer

CPU = torch.device("cpu")


def finished_run(folder: Path, num_steps: int = 2) -> Path:
    with open_run(folder, overwrite=False, resume=False) as run:
        run.record_attempt("sft", {"seed": 3}, CPU)
        run.start(-1, num_steps)
        for step in range(num_steps + 1):
            run.log(step, {"loss/total": step / 4})
            run.log_sample(step, {"text": "1.00"})
        run.finish("finished")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def write_lock(folder: Path, pid: int, host: str = HOST, job: str = "") -> None:
    folder.mkdir(exist_ok=True)
    (folder / "LOCK").write_text(json.dumps({"job": job, "pid": pid, "host": host}))


def test_a_run_leaves_its_record(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "runs" / "new")
    assert (folder / "STATUS").read_text() == "finished\n"
    assert not (folder / "LOCK").exists()
    assert [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 0, "loss/total": 0.0},
        {"step": 1, "loss/total": 0.25},
        {"step": 2, "loss/total": 0.5},
    ]
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["config"] == {"seed": 3}
    assert provenance["argv"] == sys.argv
    assert provenance["world_size"] == 1
    assert provenance["device"] == "cpu"
    assert provenance["packages"]["torch"] == torch.__version__
    (attempt,) = (folder / "attempts").glob("*/attempt.json")
    assert json.loads(attempt.read_text()) == {**provenance, "environment": {}}


def test_the_status_is_running_until_the_run_says_otherwise(tmp_path: Path) -> None:
    with open_run(tmp_path, overwrite=False, resume=False) as run:
        run.record_attempt("sft", {}, CPU)
        assert (tmp_path / "STATUS").read_text() == "running\n"
        run.finish("stopped")
    assert (tmp_path / "STATUS").read_text() == "stopped\n"
    for status in ("stopped", "failed", "finished"):  # of an attempt that has not begun, and others
        with pytest.raises(ZeroDivisionError), open_run(tmp_path, False, True) as run:
            if status != "stopped":
                run.record_attempt("sft", {}, CPU)
                assert (tmp_path / "STATUS").read_text() == "running\n"
            if status == "finished":
                run.finish("finished")
            _ = 1 / 0
        assert (tmp_path / "STATUS").read_text() == f"{status}\n"
        assert not (tmp_path / "LOCK").exists()


def test_a_status_that_cannot_be_written_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, text: str) -> None:
        raise OSError("full")

    with pytest.raises(ValueError, match="the first"), open_run(tmp_path, False, False) as run:
        run.record_attempt("sft", {}, CPU)
        monkeypatch.setattr(runs, "write_text", fail)
        raise ValueError("the first")
    assert not (tmp_path / "LOCK").exists()


def test_a_commit_is_recorded_with_whether_it_was_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: dict[str, str | None] = {"rev-parse": "abc", "status": " M a.py"}
    monkeypatch.setattr(runs, "_git", lambda command, *rest: answers[command])
    assert (runs._provenance(CPU)["commit"], runs._provenance(CPU)["dirty"]) == ("abc", True)
    answers["status"] = ""
    assert runs._provenance(CPU)["dirty"] is False
    answers["status"] = answers["rev-parse"] = None
    assert (runs._provenance(CPU)["commit"], runs._provenance(CPU)["dirty"]) == (None, None)


def test_git_that_is_missing_or_has_nothing_to_say_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "copy"
    monkeypatch.setattr(runs, "__file__", str(inner / "minigrpo" / "runs.py"))
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "another project"], check=True)
    inner.mkdir()
    assert runs._git("rev-parse", "HEAD") is None  # of an archive that was unpacked there
    (inner / ".git").write_text("nothing that git understands")
    assert runs._git("rev-parse", "HEAD") is None
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "minigrpo" / "runs.py"))
    version = subprocess.check_output(["git", "version"], text=True).split()[2].split(".")
    if (int(version[0]), int(version[1])) >= (2, 38):
        monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own tests have it
    assert len(str(runs._git("rev-parse", "HEAD"))) == 40
    (tmp_path / "ckpt").write_text("a run's")
    assert runs._provenance(CPU)["dirty"] is False
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runs._git("rev-parse", "HEAD") is None


def test_a_folder_with_a_run_needs_a_decision(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run")
    before = contents(folder)
    with pytest.raises(ValueError) as caught:
        open_run(folder, overwrite=False, resume=False)
    expected = f"{folder} holds a run: --resume goes on with it, --overwrite deletes it"
    assert str(caught.value) == expected
    with pytest.raises(ValueError, match="must not both be given"):
        open_run(folder, overwrite=True, resume=True)
    assert contents(folder) == before
    with open_run(folder, overwrite=False, resume=True):
        assert contents(folder).keys() == before.keys() | {"LOCK"}


def test_overwrite_deletes_all_of_a_run(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run")
    names = (
        "checkpoints/step-000001/model.safetensors plots/a.png model.safetensors minigrpo.json "
        "config.json generation_config.json tokenizer.json tokenizer_config.json vocab.json "
        "merges.txt special_tokens_map.json added_tokens.json chat_template.jinja "
        "additional_chat_templates/other.jinja evaluation/cases.csv tensorboard/events "
        "skipped/step-000001-rank-0.safetensors publish.tmp/config.json"
    )
    for name in names.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    (folder / "STOP.17.0").write_text("")
    (folder / "provenance.json.tmp").write_text("")
    with open_run(folder, overwrite=True, resume=False):
        assert contents(folder).keys() == {"LOCK"}


def test_a_deletion_that_was_interrupted_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished_run(tmp_path / "run")

    def kill(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", kill)
        open_run(folder, overwrite=True, resume=False)
    with open_run(folder, overwrite=True, resume=False):
        assert contents(folder).keys() == {"LOCK"}


@pytest.mark.parametrize("stranger", ["notes.txt", "thesis/chapter.tex", "plots"])
def test_overwrite_deletes_nothing_where_there_is_a_file_of_others(
    tmp_path: Path, stranger: str
) -> None:
    folder = finished_run(tmp_path / "run")
    (folder / stranger).parent.mkdir(exist_ok=True)
    (folder / stranger).write_text("mine")  # plots is a folder of ours, as a file it is not
    before = contents(folder)
    name = stranger.partition("/")[0]
    with pytest.raises(ValueError, match=f"holds {name}, which no run wrote; nothing was deleted"):
        open_run(folder, overwrite=True, resume=False)
    assert contents(folder) == before


def test_overwrite_does_not_follow_links(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("mine")
    (folder / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with open_run(folder, overwrite=True, resume=False):
        assert not (folder / "checkpoints").exists()
    assert (tmp_path / "elsewhere" / "file").read_text() == "mine"


@pytest.mark.parametrize(("overwrite", "resume"), [(False, False), (True, False), (False, True)])
def test_a_folder_that_no_run_made_is_left_alone(
    tmp_path: Path, overwrite: bool, resume: bool
) -> None:
    for name in ("config.json", "model.safetensors"):  # a downloaded model: names that we use too
        (tmp_path / name).write_text("theirs")
    with pytest.raises(ValueError, match=r"holds files but no run"):
        open_run(tmp_path, overwrite, resume)
    assert contents(tmp_path) == {"config.json": b"theirs", "model.safetensors": b"theirs"}


@pytest.mark.parametrize(("overwrite", "resume"), [(False, False), (True, False), (False, True)])
def test_an_empty_folder_is_a_new_run_whatever_is_given(
    tmp_path: Path, overwrite: bool, resume: bool
) -> None:
    (tmp_path / "STOP.17.0").write_text("")  # what a batch script may have put there
    with open_run(tmp_path, overwrite, resume) as run:
        assert run.folder == tmp_path


def test_a_folder_in_use_is_refused_with_its_owner(tmp_path: Path) -> None:
    write_lock(tmp_path, os.getppid())
    with pytest.raises(ValueError) as caught:
        open_run(tmp_path, overwrite=False, resume=True)
    owner = f"process {os.getppid()} on {HOST}, job none"
    lock = tmp_path / "LOCK"
    assert str(caught.value) == f"{tmp_path} is in use by {owner}; delete {lock} if not"
    assert lock.exists()


@pytest.mark.parametrize(
    ("host", "job", "alive", "is_taken"),
    [
        (HOST, "", False, True),  # crashed here
        (HOST, "17", False, True),  # another job, crashed here
        (HOST, "18.0", True, True),  # our job before it was requeued; the id is in use again
        (HOST, "18.1", True, False),  # our job, and at work
        ("elsewhere", "", False, False),  # nobody here can tell
        ("elsewhere", "17", False, False),  # another job
        ("elsewhere", "18.0", False, True),  # our job before it was requeued
        ("elsewhere", "18.1", False, False),  # our job on another of its nodes, perhaps at work
    ],
)
def test_the_lock_of_a_dead_owner_or_of_this_job_is_taken_over(
    tmp_path: Path,
    host: str,
    job: str,
    alive: bool,
    is_taken: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    write_lock(tmp_path, os.getppid() if alive else dead_process(), host, job)
    if not is_taken:
        with pytest.raises(
            ValueError, match=f"in use by process .* on {host}, job {job or 'none'}"
        ):
            open_run(tmp_path, overwrite=False, resume=True)
        return
    with open_run(tmp_path, overwrite=False, resume=True):
        owner = json.loads((tmp_path / "LOCK").read_text())
        since = owner.pop("since")
        assert owner == {"job": "18.1", "pid": os.getpid(), "host": HOST}
        assert 0 <= time.time_ns() - since < 60e9


@pytest.mark.parametrize("text", [None, "", '{"job": "", "pid": 1, "host": "elsewhere"}', b"\xff"])
def test_a_run_whose_lock_is_not_its_own_any_more_leaves_everything_as_it_is(
    text: str | bytes | None, tmp_path: Path
) -> None:
    """Somebody deleted the lock, or another run took the folder: with a process of our number too,
    for what counts is the whole text of the lock."""
    lock = tmp_path / "LOCK"
    with pytest.raises(OSError, match=r"is not this run's any more"):
        with open_run(tmp_path, overwrite=False, resume=False) as run:
            run.record_attempt("sft", {}, CPU)
            run.check_lock()
            lock.unlink()
            if text is not None:
                lock.write_bytes(text if isinstance(text, bytes) else text.encode())
            run.check_lock()
    assert lock.exists() == (text is not None)
    assert (tmp_path / "STATUS").read_text() == "running\n"


def test_an_owner_that_was_taken_for_dead_finds_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_run(tmp_path, overwrite=False, resume=False) as first:
        first.record_attempt("sft", {}, CPU)
        monkeypatch.setattr(runs, "_is_alive", lambda pid: False)  # as from another container
        with open_run(tmp_path, overwrite=False, resume=True) as second:
            with pytest.raises(OSError, match=r"is not this run's any more"):
                first.check_lock()
            first.__exit__(OSError, OSError(), None)
            second.check_lock()
            assert (tmp_path / "STATUS").read_text() == "running\n"
        assert not (tmp_path / "LOCK").exists()


def test_a_lock_with_our_own_process_id_is_that_of_a_container_before_its_restart(
    tmp_path: Path,
) -> None:
    write_lock(tmp_path, os.getpid())
    with open_run(tmp_path, overwrite=False, resume=True) as run:
        assert run.folder == tmp_path


def test_without_a_job_an_empty_job_id_is_no_common_job(tmp_path: Path) -> None:
    write_lock(tmp_path, 1, "elsewhere")
    with pytest.raises(ValueError, match="in use"):
        open_run(tmp_path, overwrite=False, resume=True)


def test_a_link_in_place_of_a_draft_is_not_followed(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "STATUS"
    victim.write_text("mine")
    (tmp_path / "STATUS.tmp").symlink_to(victim)
    runs.write_text(path, "running")
    assert victim.read_text() == "mine"
    assert path.read_text() == "running" and not path.is_symlink()


def test_a_command_does_without_subnormal_numbers() -> None:
    """In threads that it makes as well; with them an Intel processor is slow."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    torch.set_flush_denormal(False)
    found: list[float] = []

    def multiply() -> None:
        found.append(float((torch.full((64,), 1e-30) * 1e-10).sum()))

    def main() -> None:
        multiply()
        thread = threading.Thread(target=multiply)
        thread.start()
        thread.join()

    multiply()
    run_command(main)
    assert found[0] == pytest.approx(64e-40) and found[1:] == [0.0, 0.0]


def test_an_error_cannot_command_a_terminal_or_fill_a_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise ValueError("config.json has unknown \x1b[2J\r\x07key" + "y" * 1_000_000)

    with pytest.raises(SystemExit):
        runs.run_command(fail)
    shown = capsys.readouterr().err
    assert shown.startswith("error: config.json has unknown \ufffd[2J \ufffdkeyyy")
    assert shown.count("\n") == 1 and len(shown) < 2100


def test_a_lock_of_a_number_that_no_process_has_is_taken_over(tmp_path: Path) -> None:
    write_lock(tmp_path, 10**30, HOST, "")
    with open_run(tmp_path, overwrite=False, resume=True):
        assert json.loads((tmp_path / "LOCK").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    "text", ["", "{}", '{"job": "", "pid": "me", "host": "here"}', '{"job": "", "pid": 1e400}']
)
def test_a_lock_without_an_owner_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "LOCK").write_text(text)
    with pytest.raises(ValueError, match="names no owner"):
        open_run(tmp_path, overwrite=False, resume=True)


@pytest.mark.parametrize("is_taken_over", [False, True])
def test_a_lock_names_its_owner_from_the_first_moment(
    is_taken_over: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before any line that takes the lock, a process leaves none, or one with an owner."""
    code = {f.__code__ for f in (runs._take_lock, runs._link, runs._replace_lock)}
    unlink = Path.unlink

    class Killed(BaseException):
        pass

    def is_killed_at(line: int) -> bool:
        left = iter(range(line, -1, -1))

        def trace(frame: FrameType, event: str, argument: object) -> object:
            if frame.f_code in code and event == "line" and next(left, -1) == 0:
                monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # nothing is tidied up
                raise Killed
            return trace if frame.f_code in code else None

        before = sys.gettrace()
        sys.settrace(trace)  # type: ignore[arg-type]
        try:
            runs._take_lock(folder / "LOCK")
        except Killed:
            return True
        finally:
            sys.settrace(before)
            monkeypatch.setattr(Path, "unlink", unlink)
        return False

    for line in range(100):
        folder = tmp_path / str(line)
        folder.mkdir()
        if is_taken_over:
            write_lock(folder, dead_process())
        if not is_killed_at(line):
            break
        if (folder / "LOCK").exists():
            assert runs._read_owner(folder / "LOCK")["host"] == HOST
        with open_run(folder, overwrite=False, resume=True):
            assert runs._read_owner(folder / "LOCK")["pid"] == str(os.getpid())
    assert line > 5  # so many instants were tried


def test_where_there_are_no_links_a_lock_is_made_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(path: Path, target: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "hardlink_to", unsupported)
    for dead in (False, True):
        if dead:
            write_lock(tmp_path, dead_process())
        with open_run(tmp_path, overwrite=False, resume=True):
            assert runs._read_owner(tmp_path / "LOCK")["pid"] == str(os.getpid())
            with pytest.raises(FileExistsError):
                runs._link(tmp_path / "LOCK", tmp_path / "STATUS")


def test_a_file_is_no_save_dir(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/below"):
        with pytest.raises(OSError, match=r"save_dir must be a folder or become one, got .*file"):
            open_run(tmp_path / place, overwrite=True, resume=False)
    assert (tmp_path / "file").read_text() == "mine"


def test_of_two_that_find_a_dead_owner_one_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quicker one has replaced the lock after we have read it, or holds it in its hand."""
    write_lock(tmp_path, dead_process())
    rename = Path.rename

    def is_late(path: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        write_lock(tmp_path, os.getppid())
        return rename(path, target)

    def is_too_late(path: Path, target: Path) -> Path:
        path.unlink()
        return rename(path, target)

    for quicker in (is_late, is_too_late):
        monkeypatch.setattr(Path, "rename", quicker)
        with pytest.raises(ValueError, match="in use: another process has just taken it"):
            open_run(tmp_path, overwrite=False, resume=True)
        if quicker is is_late:
            assert json.loads((tmp_path / "LOCK").read_text())["pid"] == os.getppid()
            write_lock(tmp_path, dead_process())
    assert [path.name for path in tmp_path.iterdir()] == []


def test_what_a_kill_in_the_first_moment_leaves_is_no_obstacle(tmp_path: Path) -> None:
    for name in ("STATUS.tmp", "provenance.json.tmp", f"LOCK.{HOST}.17.tmp", "STATUS"):
        (tmp_path / name).write_text("")
    (tmp_path / "attempts" / "17.0").mkdir(parents=True)
    for overwrite, resume in ((False, False), (True, False), (False, True)):
        with open_run(tmp_path, overwrite, resume):
            assert (tmp_path / "LOCK").exists()
        assert not (tmp_path / "LOCK").exists()
    with open_run(tmp_path, overwrite=False, resume=False) as run:
        run.record_attempt("sft", {}, CPU)
        assert (tmp_path / "STATUS").read_text() == "running\n"


def test_two_open_the_same_new_folder_and_one_wins(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from minigrpo.runs import open_run\n"
        "with open_run(Path(sys.argv[1]), False, True): print('in', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "in\n"
        with pytest.raises(ValueError, match=f"in use by process {first.pid}"):
            open_run(tmp_path, overwrite=False, resume=True)
        first.kill()
    with open_run(tmp_path, overwrite=False, resume=True):  # its lock outlived it
        pass


numbers = st.floats() | st.integers() | st.booleans() | st.none() | st.text()
nested = st.recursive(numbers, lambda x: st.lists(x) | st.dictionaries(st.text(), x))


@given(nested)
def test_every_line_is_json_that_a_strict_reader_takes(value: runs.Json) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    def expected(item: runs.Json) -> runs.Json:
        if isinstance(item, float) and not math.isfinite(item):
            return None
        if isinstance(item, dict):
            return {key: expected(inner) for key, inner in item.items()}
        return [expected(inner) for inner in item] if isinstance(item, list) else item

    line = to_json(value)
    assert "\n" not in line
    assert json.loads(line, parse_constant=refuse) == expected(value)


def test_resuming_at_a_step_leaves_each_step_once(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run", num_steps=5)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss/to')  # cut off by a kill
    with open_run(folder, overwrite=False, resume=True) as run:
        run.cut_logs(3)
        run.start(3, 5)
        for step in (4, 5):
            run.log(step, {"loss/total": -2.0})
            run.log_sample(step, {"text": "2.00"})
            run.log_again(step, {"loss/total": -1.0, "loss/ratio_max": math.nan})
        assert [row["loss/total"] for row in run.history()] == [0.0, 0.25, 0.5, 0.75, -1.0, -1.0]
        assert math.isnan(run.history()[-1]["loss/ratio_max"])  # null in the file
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert steps_of(folder / name) == [0, 1, 2, 3, 4, 5]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss/total"] for line in lines]
    assert losses == [0.0, 0.25, 0.5, 0.75, -1.0, -1.0]


def test_resuming_without_a_checkpoint_starts_the_logs_anew(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run")
    with open_run(folder, overwrite=False, resume=True) as run:
        run.cut_logs(-1)
        assert (folder / "metrics.jsonl").read_text() == ""


def test_a_run_is_not_resumed_without_the_metrics_of_its_steps(tmp_path: Path) -> None:
    """Plateau, adaptive terminal term and convergence would look back on another history."""
    folder = finished_run(tmp_path / "run", num_steps=5)
    path, samples = folder / "metrics.jsonl", (folder / "samples.jsonl").read_bytes()
    lines = path.read_text().splitlines(keepends=True)
    swapped = [lines[0], lines[2], lines[1], *lines[3:]]
    twice = [*lines[:2], *lines[1:2], *lines[3:]]
    for kept, whole in (
        (lines[:3], 3), (lines[:2] + lines[3:], 2), (swapped, 1), (twice, 2), ([], 0)
    ):  # fmt: skip
        path.write_text("".join(kept)) if kept else path.unlink()
        with open_run(folder, overwrite=False, resume=True) as run:
            message = f"metrics.jsonl must have a line .* from 0 to 4, .* got {whole} in order: "
            with pytest.raises(ValueError, match=message) as caught:
                run.cut_logs(4)
        advice = f"delete the checkpoints after step {whole - 1}, or --overwrite"
        assert (advice in str(caught.value)) == (whole > 0)
        assert not kept or path.read_text() == "".join(kept)
    assert (folder / "samples.jsonl").read_bytes() == samples


def test_a_broken_line_inside_a_log_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run")
    path, deep = folder / "metrics.jsonl", "[" * 100_000
    for wrong in (
        '{"stage": 1}', '{"step": 1.5}', '{"step": 1e400}', '{"step": "1"}', deep, "\xff"
    ):  # fmt: skip
        path.write_text('{"step": 0}\n' + wrong + "\n", encoding="latin-1")
        with open_run(folder, overwrite=False, resume=True) as run:
            with pytest.raises(
                ValueError, match=r"metrics.jsonl: line 2 must be an object with a step"
            ):
                run.cut_logs(1)


@pytest.mark.parametrize("wrong", ['"x"', "[1]", "{}", "true"])
def test_a_metric_that_is_no_number_is_an_error_that_names_it(wrong: str, tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run")
    text = '{"step": 0, "a": null}\n{"step": 1, "a": 0.5, "b": ' + wrong + "}\n"
    (folder / "metrics.jsonl").write_text(text)
    with open_run(folder, overwrite=False, resume=True) as run:
        with pytest.raises(ValueError, match=r"b of step 1 must be a number or null, got"):
            run.cut_logs(1)
    assert (folder / "metrics.jsonl").read_text() == text


def test_each_attempt_has_a_record_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {
        "SLURM_JOB_ID": "18", "SLURM_RESTART_COUNT": "2", "SLURM_NNODES": "4", "NCCL_DEBUG": "WARN",
        "MASTER_ADDR": "node9", "SLURM_JWT": "secret", "HF_TOKEN": "secret",
    }  # fmt: skip
    for attempt in range(2):
        with open_run(tmp_path, overwrite=False, resume=True) as run:
            run.record_attempt("sft", {"steps": attempt}, CPU)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
    with open_run(tmp_path, overwrite=False, resume=True) as run:
        run.record_attempt("sft", {"steps": 2}, CPU)
    assert json.loads((tmp_path / "provenance.json").read_text())["config"] == {"steps": 0}
    first, *of_job = sorted((tmp_path / "attempts").iterdir(), key=lambda path: len(path.name))[
        ::-1
    ]
    assert time.strptime(first.name, "%Y%m%d-%H%M%S")
    assert [path.name for path in of_job] == ["18.2+", "18.2"]
    again, requeued = (json.loads((path / "attempt.json").read_text()) for path in of_job)
    assert (requeued["config"], again["config"]) == ({"steps": 1}, {"steps": 2})
    shown = {"SLURM_JOB_ID": "18", "SLURM_NNODES": "4", "SLURM_RESTART_COUNT": "2"}
    assert requeued["environment"] == {**shown, "NCCL_DEBUG": "WARN", "MASTER_ADDR": "node9"}
    assert not any(b"secret" in text for text in contents(tmp_path).values())


def test_a_console_line_shows_the_headline_of_what_the_step_has() -> None:
    metrics = {"update/grad_norm": 0.5, "reward/total": 101.256, "rollout/frac_valid": 0.987}
    line = console_line(7, 200, {**metrics, "loss/ratio_max": 1.0})
    assert line == "step   7/200  reward  101.26  valid  99%  grad_norm  0.500"
    assert console_line(7, 10, {"loss/total": math.nan}) == "step  7/10  loss     nan"


def test_a_step_is_one_line_on_the_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished_run(tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 0/2", "step 1/2", "step 2/2"]


def test_only_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "rank", lambda: 1)
    finished_run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_fails_on_rank_0_fails_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    agreed: list[bool] = []

    def agree(answer: bool) -> Callable[[bool], bool]:
        def any_rank(flag: bool) -> bool:
            agreed.append(flag)
            return answer

        return any_rank

    def fail() -> None:
        raise OSError("full")

    monkeypatch.setattr(runs, "any_rank", agree(True))
    with pytest.raises(OSError, match="full"):
        on_rank_zero(fail)
    monkeypatch.setattr(runs, "rank", lambda: 1)
    with pytest.raises(OSError, match="rank 0 could not write"):
        on_rank_zero(fail)
    monkeypatch.setattr(runs, "any_rank", agree(False))
    on_rank_zero(fail)
    assert agreed == [True, False, False]


def test_tensorboard_that_is_missing_is_an_error_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--tensorboard needs an extra: pip install"):
        open_run(tmp_path / "run", overwrite=False, resume=False, tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_every_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with open_run(tmp_path, overwrite=False, resume=False, tensorboard=True) as run:
        run.start(-1, 2)
        for step in range(3):
            run.log(step, {"loss/total": step / 4, "eval/cost_ratio": 1.0})
    reader = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(reader.Tags()["scalars"]) == {"loss/total", "eval/cost_ratio"}
    assert [(e.step, e.value) for e in reader.Scalars("loss/total")] == [
        (0, 0),
        (1, 0.25),
        (2, 0.5),
    ]
    with RunFolder(tmp_path, tensorboard=True) as run:  # resumed after step 1
        run.start(1, 2)
        run.log(2, {"loss/total": 9.0})
        run.log_again(2, {"loss/total": 9.0, "eval/cost_ratio": 3.0})  # was evaluated at the end
    reader = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.value for e in reader.Scalars("eval/cost_ratio")] == [1.0, 1.0, 3.0]
    found = [(e.step, e.value) for e in reader.Scalars("loss/total")]
    assert found == [(0, 0), (1, 0.25), (2, 9.0), (2, 9.0)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_asks_for_a_stop_and_the_handlers_go_back(
    tmp_path: Path, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    with StopSignal(tmp_path, 0) as stop:
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.requested()
    assert signal.getsignal(number) is before


def test_signals_that_may_come_twice_do_and_a_second_ctrl_c_aborts(tmp_path: Path) -> None:
    with StopSignal(tmp_path, 0) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)


def test_a_run_in_the_background_of_a_script_is_not_stopped_by_ctrl_c(tmp_path: Path) -> None:
    """The shell has it ignore SIGINT, which is meant for the script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignal(tmp_path, 0) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.requested() and not stop.is_interrupted
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_stop_file_asks_for_a_stop_once(tmp_path: Path) -> None:
    with StopSignal(tmp_path, 0) as stop:
        assert not stop.requested()
        (tmp_path / "STOP").write_text("")
        assert stop.requested()
    assert not StopSignal(tmp_path, 0).requested()  # the next attempt starts


def test_the_stop_file_of_a_batch_script_is_obeyed_even_if_it_was_there_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOP_FILE", str(tmp_path / "STOP.18.0"))
    (tmp_path / "STOP").write_text("")
    assert not StopSignal(tmp_path, 0).requested()
    (tmp_path / "STOP.18.0").write_text("")
    assert StopSignal(tmp_path, 0).requested()


def test_the_stop_file_is_seen_by_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopSignal(tmp_path, 0)
    (tmp_path / "STOP").write_text("")
    monkeypatch.setattr(runs, "rank", lambda: 1)
    assert not stop.requested()


def test_the_deadline_is_in_minutes_and_0_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(runs.time, "monotonic", lambda: now)
    stop, never = StopSignal(tmp_path, 1.5), StopSignal(tmp_path, 0)
    now += 89.0
    assert not stop.requested()
    now += 1.0
    assert stop.requested()
    now += 1e9
    assert not never.requested()


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (ValueError("two\nlines"), 2, "two lines"),
        (FileNotFoundError(2, "No such file", "x.json"), 2, "[Errno 2] No such file: 'x.json'"),
        (FloatingPointError("lower learning_rate"), 1, "lower learning_rate"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB."),
            1,
            "CUDA out of memory. Tried to allocate 2.00 GiB. A smaller --rows-per-batch takes "
            "less, in training also --micro-batch-size, --gradient-checkpointing, --lora-rank or "
            "--parallel fsdp",
        ),
    ],
)
def test_a_users_mistake_is_one_line_and_its_status(
    error: Exception,
    status: int,
    shown: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == status
    printed = capsys.readouterr()
    assert printed.err == f"error: {shown}\n" and not printed.out
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        run_command(main)
    assert capsys.readouterr().err.startswith("error on rank 3: ")


def test_the_notes_of_a_users_mistake_keep_their_lines_and_are_told_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def main() -> None:
        error = ValueError("too\nlarge")
        error.add_note("  model  1.00\n  update 2.00")
        raise error

    for rank, shown in (("0", "error: too large\n  model  1.00\n  update 2.00\n"),
                        ("1", "error on rank 1: too large\n")):  # fmt: skip
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            run_command(main)
        assert capsys.readouterr().err == shown


def interrupted() -> None:
    raise KeyboardInterrupt


def test_after_ctrl_c_the_process_dies_of_it() -> None:
    """By its status alone a shell would go on with the next round of a loop."""
    process = FORKED.Process(target=run_command, args=(interrupted,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGINT


def test_a_mistake_of_ours_is_a_traceback() -> None:
    def main() -> None:
        raise TypeError("ours")

    with pytest.raises(TypeError, match="ours"):
        run_command(main)


def test_windows_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=r"^error: .* WSL$"):
        patch.setattr(runs.os, "name", "nt")
        run_command(lambda: None)
    run_command(lambda: None)


def test_dev_mode_shows_where_a_users_mistake_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        raise ValueError("theirs")

    monkeypatch.setattr(runs.sys, "flags", SimpleNamespace(dev_mode=True))
    with pytest.raises(ValueError, match="theirs"):
        run_command(main)


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(runs.os, "fsync", lambda descriptor: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_text(path, "new")
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"


def test_a_logged_step_is_on_the_disk_before_it_can_have_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut a checkpoint without the line of its step could not be resumed."""
    synced: list[tuple[int, int]] = []

    def watched(descriptor: int) -> None:
        found = os.fstat(descriptor)
        synced.append((found.st_ino, found.st_size))

    with open_run(tmp_path, overwrite=False, resume=False) as run:
        monkeypatch.setattr(runs.os, "fsync", watched)
        for step in range(2):
            run.log(step, {"loss/total": 1.0})
            found = (tmp_path / "metrics.jsonl").stat()
            assert synced[-1] == (found.st_ino, found.st_size)


def test_an_open_run_is_closed_once_and_then_free(tmp_path: Path) -> None:
    run: RunFolder = open_run(tmp_path, overwrite=False, resume=False)
    assert (tmp_path / "LOCK").exists()
    for _ in range(2):
        with run:
            pass
        assert not (tmp_path / "LOCK").exists()
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("is_intel", [False, True])
def test_a_cpu_computes_products_in_float32_unless_told_otherwise(
    is_intel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`medium`, the faster library but on Intel's, exactly where it does not mean bfloat16."""
    monkeypatch.setattr(runs, "_is_intel", lambda: is_intel)
    a, b = torch.randn(2, 768, 768, generator=torch.Generator().manual_seed(1))
    exact = a.double() @ b.double()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        is_exact = bool((a @ b - exact).abs().amax() < 1e-5 * exact.abs().amax())
        torch.set_float32_matmul_precision("high")
        set_matmul_precision("auto", torch.device("cpu"))
        is_medium = is_exact and not is_intel
        assert torch.get_float32_matmul_precision() == ("medium" if is_medium else "highest")
        assert (a @ b - exact).abs().amax() < 1e-5 * exact.abs().amax()
        assert runs._provenance(CPU)["matmul_precision"] == torch.get_float32_matmul_precision()
        set_matmul_precision("auto", torch.device("cuda"))
        assert torch.get_float32_matmul_precision() == "high"
        set_matmul_precision("medium", torch.device("cpu"))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_maker_of_a_processor_is_read_where_linux_says_it(tmp_path: Path) -> None:
    said = tmp_path / "cpuinfo"
    assert not runs._is_intel(said)
    for vendor, is_intel in (("GenuineIntel", True), ("AuthenticAMD", False)):
        said.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
        assert runs._is_intel(said) == is_intel


def test_a_run_computes_products_in_the_precision_that_it_was_told(tmp_path: Path) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for wanted in ("highest", "high"):
            few = "--steps=1 --eval-cases=8 --horizon=2 --num-demonstrations=8 --device=cpu".split()
            few += ["--save-dir", str(tmp_path / wanted), "--matmul-precision", wanted]
            train_sft.main(few)
            assert torch.get_float32_matmul_precision() == wanted
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("seconds", "said"), [(1.5, "bfloat16 take 1.5 times"), (1.4, None)])
def test_bfloat16_that_is_slow_is_warned_of(
    seconds: float, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the quickest of a few products of each, after one that may be slow."""
    taken = [5.0, 1.0, 2.0, 1.0, 9 * seconds, 2 * seconds, seconds, 3 * seconds]
    clock = itertools.accumulate(passed for product in taken for passed in (0.0, product))
    repeat = functools.partial(runs.timeit.repeat, timer=lambda: next(clock))
    monkeypatch.setattr(runs.timeit, "repeat", repeat)
    found = slow_bfloat16("bfloat16", CPU)
    assert [said in line for line in found] == ([] if said is None else [True])
    assert not [*clock]
    assert slow_bfloat16("float32", CPU) == slow_bfloat16("bfloat16", torch.device("cuda")) == []


def test_all_programs_warn_of_slow_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warning(precision: str, device: torch.device) -> list[str]:
        return [f"warning: {precision} on {device}"]

    for module in (training, evaluate):
        monkeypatch.setattr(module, "slow_bfloat16", warning)
    start, device = untrained_checkpoint(tmp_path / "start"), ["--device=cpu"]
    few = ["--save-dir", str(tmp_path / "run"), "--steps=1", "--warmup-steps=1", *device]
    few += ["--eval-cases=8"]
    train_grpo.main([*few, "--init", str(start), "--group-size=2", "--prompts-per-step=8"])
    few += ["--overwrite", "--horizon=2", "--num-demonstrations=8", "--batch-size=2", "--width=8"]
    train_sft.main([*few, "--precision=bfloat16", "--num-heads=1"])
    evaluate.main(["--model-path", str(start), "--num-cases=2", "--skip-mpc", *device])
    wanted = [f"warning: {precision} on cpu" for precision in ("float32", "bfloat16", "float32")]
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("warning: ")] == wanted


def test_a_run_that_is_refused_leaves_the_one_it_would_overwrite(tmp_path: Path) -> None:
    start, folder = untrained_checkpoint(tmp_path / "start"), finished_run(tmp_path / "run")
    before = contents(folder)
    flags = ["--save-dir", str(folder), "--overwrite", "--device=cpu"]
    grpo = [*flags, "--init", str(start), "--group-size=2"]
    with pytest.raises(ValueError, match="prompts_per_step must be at least"):
        train_grpo.main([*grpo, "--prompts-per-step=1", "--num-minibatches=2"])
    with pytest.raises(ValueError, match="must fit into memory"):
        train_grpo.main([*grpo, "--prompts-per-step=99999999999"])
    with pytest.raises(ValueError, match="must fit into memory"):
        train_sft.main([*flags, "--num-heads=1", "--width=99999998"])
    weights = start / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        train_grpo.main([*grpo, "--prompts-per-step=8"])
    assert contents(folder) == before


@pytest.mark.parametrize("place", ["run", "run/checkpoints/step-000002"])
def test_a_run_is_not_overwritten_by_one_that_starts_from_it(tmp_path: Path, place: str) -> None:
    folder = finished_run(tmp_path / "run")
    (folder / "checkpoints").mkdir()
    model = untrained_checkpoint(tmp_path / "model")
    shutil.copytree(model, tmp_path / place, dirs_exist_ok=True)
    before, start = contents(folder), str(tmp_path / place)
    flags = ["--save-dir", str(folder), "--overwrite", "--device=cpu"]
    with pytest.raises(ValueError, match="save_dir must not be or hold the folder of init"):
        train_grpo.main([*flags, "--init", start])
    with pytest.raises(ValueError, match="save_dir must not be or hold the folder of model"):
        train_sft.main([*flags, "--model", start, "--horizon=2"])
    assert contents(folder) == before


def test_only_a_folder_that_would_be_written_over_is_in_the_way_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not a model's name on the hub, which would be a path too, and not what is only looked at."""
    folder, parts = finished_run(tmp_path / "run"), "--group-size 2 --prompts-per-step 2 --init"
    (folder / "checkpoints").mkdir()
    start = untrained_checkpoint(folder / "checkpoints" / "step-000002")
    flags, before = ["--save-dir", str(folder), "--device=cpu"], contents(folder)
    train_grpo.main([*flags, "--measure-signal=3", *parts.split(), str(start)])
    assert "gradients of 3 rollouts" in capsys.readouterr().out and contents(folder) == before
    monkeypatch.chdir(tmp_path)
    for save_dir in (".", "somebody"):
        with pytest.raises(ValueError, match="model 'somebody/tiny' is no folder"):
            train_sft.main(["--save-dir", save_dir, "--model", "somebody/tiny"])


@pytest.mark.parametrize(
    ("first", "second", "is_told"), [(1.0, 1.0, True), (1.0, 1.5, False), (0.0, 0.0, True)]
)
def test_a_run_that_never_improved_says_that_it_publishes_its_start(
    first: float, second: float, is_told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    scores = iter([first, second])
    found = lambda *_: {"eval/greedy_reward": next(scores)}  # noqa: E731
    monkeypatch.setattr(training, "validation_metrics", found)
    flags = "--device cpu --steps 1 --prompts-per-step 2 --group-size 2 --num-minibatches 1"
    init = str(untrained_checkpoint(tmp_path / "init"))
    train_grpo.main([*flags.split(), "--init", init, "--save-dir", str(tmp_path / "run")])
    last = capsys.readouterr().out.splitlines()[-1]
    told = "that is the model it started from: no trained one was better in validation"
    told += "; 0 says that no plan was well-formed" if first == 0 else ""
    better = f"best validation reward 1.50 at step 1, published in {tmp_path / 'run'}"
    assert last == (told if is_told else better)


def test_a_run_that_is_stopped_says_after_which_step_and_how_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(StopSignal, "requested", lambda stop: True)
    flags = "--device cpu --steps 3 --prompts-per-step 2 --group-size 2 --num-minibatches 1"
    places = ["--init", str(untrained_checkpoint(tmp_path / "init")), "--save-dir"]
    train_grpo.main([*flags.split(), *places, str(tmp_path / "run")])
    assert "\nstopped after step 1 of 3, --resume goes on\n" in capsys.readouterr().out


def test_a_step_of_grpo_is_announced_warned_of_and_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_grpo, "warnings_of", lambda *_: ["WARNING step 1: look"])
    flags = "--device cpu --steps 1 --prompts-per-step 6 --group-size 4 --eval-cases 8"
    updates = "--num-epochs 3 --num-minibatches 2"
    init = str(untrained_checkpoint(tmp_path / "init"))
    places = ["--init", init, "--save-dir", str(tmp_path / "run")]
    train_grpo.main([*flags.split(), *updates.split(), *places])
    printed = capsys.readouterr().out
    assert "6 prompts x 4 = 24 completions a step -> 6 optimizer step(s) of 12: the" in printed
    assert "WARNING step 1: look\n" in printed
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    parts = (row[f"time/{part}_s"] for part in ("sampling", "scoring", "update"))
    assert 0 < sum(parts) <= row["time/step_s"]


FEW = "--device cpu --prompts-per-step 2 --group-size 2 --num-minibatches 1 --eval-every 1"


def test_a_refused_resume_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    init, folder = untrained_checkpoint(tmp_path / "init"), tmp_path / "run"
    train_grpo.main([*FEW.split(), "--init", str(init), "--save-dir", str(folder), "--steps=1"])
    before = contents(folder)
    with pytest.raises(ValueError, match="lora_rank"):
        train_grpo.main(["--save-dir", str(folder), "--resume", "--device=cpu", "--lora-rank=2"])
    with pytest.raises(ValueError, match=r"of stage sft to be resumed, .* holds one of grpo"):
        train_sft.main(["--save-dir", str(folder), "--resume", "--device=cpu"])
    assert contents(folder) == before and before["STATUS"] == b"finished\n"
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(lines[0])
    before = contents(folder)
    with pytest.raises(ValueError, match="must have a line for each step"):
        train_grpo.main(["--save-dir", str(folder), "--resume", "--device=cpu", "--steps=2"])
    assert contents(folder) == before
    with suppress(ValueError), open_run(folder, overwrite=False, resume=True) as run:
        run.record_attempt("sft", {}, CPU)
        raise ValueError("of a run that has begun")
    assert (folder / "STATUS").read_text() == "failed\n"


@pytest.mark.parametrize(
    ("steps", "first", "second", "best"),
    [
        # Killed after step 1, whose model is published, and before there was a checkpoint.
        ("3", [1.0, 5.0], [2.0, 1.0, 1.5, 1.75], (0, 2.0)),
        ("3", [1.0, 5.0], [2.0, 3.0, 1.5, 1.75], (1, 3.0)),
        # Finished, so that step 1 has a checkpoint.
        ("1", [1.0, 5.0], [4.0, 3.0], (1, 5.0)),
        ("1", [1.0, 5.0], [4.0, 6.0], (3, 6.0)),
    ],
)
def test_a_resumed_run_publishes_nothing_of_steps_that_it_does_again(
    steps: str, first: list[float], second: list[float], best: tuple[int, float],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    scores = iter(first)

    def validation(*_: object) -> dict[str, float]:
        score = next(scores, None)
        if score is None:
            raise KeyboardInterrupt
        return {"eval/greedy_reward": score}

    monkeypatch.setattr(training, "validation_metrics", validation)
    init, folder = untrained_checkpoint(tmp_path / "init"), tmp_path / "run"
    flags = [*FEW.split(), "--init", str(init), "--save-dir", str(folder)]
    with suppress(KeyboardInterrupt):
        train_grpo.main([*flags, "--steps", steps])
    assert published(folder) == (1, 5.0)
    scores = iter(second)
    train_grpo.main([*flags, "--resume", "--steps=3"])
    assert published(folder) == best and next(scores, None) is None


def test_a_resumed_run_keeps_a_model_that_is_better_than_what_it_does_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between publishing step 2 and its checkpoint, resumed with settings that do worse."""
    scores = iter([1.0, 3.0, 5.0, 2.0, 3.5, 6.0])
    found = lambda *_: {"eval/greedy_reward": next(scores)}  # noqa: E731
    monkeypatch.setattr(training, "validation_metrics", found)
    init, folder = untrained_checkpoint(tmp_path / "init"), tmp_path / "run"
    flags = [*FEW.split(), "--init", str(init), "--save-dir", str(folder), "--save-every=1"]
    train_grpo.main([*flags, "--steps=2"])
    shutil.rmtree(folder / "checkpoints" / "step-000002")
    for steps, best in ((2, (2, 5.0)), (3, (2, 5.0)), (4, (4, 6.0))):
        train_grpo.main([*flags, "--resume", f"--steps={steps}"])
        assert published(folder) == best


def test_a_resumed_run_says_what_changed_and_whether_anything_is_left_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init, folder = untrained_checkpoint(tmp_path / "init"), tmp_path / "run"
    flags = [*FEW.split(), "--init", str(init), "--save-dir", str(folder), "--resume"]
    train_grpo.main([*flags, "--steps=1", "--kl-beta=0.25"])
    first = capsys.readouterr().out
    train_grpo.main([*flags, "--steps=2", "--kl-beta=0.5", "--stop-after-minutes=60"])
    second = capsys.readouterr().out
    assert "\nchanged after step 1: steps 1 -> 2, kl_beta 0.25 -> 0.5\n" in second
    assert "\nwarning: warm-up takes 10 of 2 steps, so the rate stays lower\n" in second
    train_grpo.main([*flags, "--warmup-steps=2"])
    third = capsys.readouterr().out
    assert "warm-up" not in third.partition("device cpu")[2]
    assert "\nfinished at step 2 already, nothing is trained: more --steps?\n" in third
    assert "changed after step 2: warmup_steps 10 -> 2\n" in third
    assert "changed" not in first and "already" not in first + second


def test_what_ends_a_run_early_is_evaluated_before_it_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init, folder = untrained_checkpoint(tmp_path / "init"), tmp_path / "run"
    flags = [*FEW.split(), "--eval-every=9", "--init", str(init), "--save-dir", str(folder)]
    for last in (1, 2):  # the second time there are steps before it, and they were evaluated
        train_grpo.main([*flags, "--resume", "--steps=9", "--stop-after-minutes=1e-9"])
        if last == 1:
            told = "started from: no other was evaluated; 0 says that no plan was well-formed\n"
            assert capsys.readouterr().out.endswith(told)
        assert (folder / "STATUS").read_text() == "stopped\n"
        before = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert "eval/greedy_reward" not in before[last]
        samples = (folder / "samples.jsonl").read_bytes()
        train_grpo.main([*flags, "--resume", f"--steps={last}"])
        assert (folder / "STATUS").read_text() == "finished\n"
        after = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert after[:last] == before[:last] and len(after) == len(before) == last + 1
        assert "eval/greedy_reward" in after[last] and after[last] | before[last] == after[last]
        assert (folder / "samples.jsonl").read_bytes() == samples


def test_a_run_finds_its_start_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untrained_checkpoint(tmp_path / "init")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    train_grpo.main([*FEW.split(), "--init=init", "--save-dir=other/run", "--steps=1"])
    monkeypatch.chdir("other")
    resumed = ["--device=cpu", "--save-dir=run", "--resume", "--steps=2"]
    with pytest.raises(ValueError, match="run began from init, which is not here: --init says"):
        train_grpo.main(resumed)
    train_grpo.main([*resumed, "--init=../init"])
    assert steps_of(Path("run/metrics.jsonl")) == [0, 1, 2]
    assert sorted({*steps_of(Path("run/samples.jsonl"))}) == [1, 2]


def test_a_resumed_run_is_shown_from_the_step_where_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Progress bar and TensorBoard know it from `start`, which has -1 for a new run."""
    begun: list[tuple[int, int]] = []
    start = RunFolder.start

    def watched(run: RunFolder, step: int, num_steps: int) -> None:
        begun.append((step, num_steps))
        start(run, step, num_steps)

    monkeypatch.setattr(RunFolder, "start", watched)
    init = str(untrained_checkpoint(tmp_path / "init"))
    flags = [*FEW.split(), "--init", init, "--save-dir", str(tmp_path / "run"), "--resume"]
    for steps in ("1", "3"):
        train_grpo.main([*flags, "--steps", steps])
    assert begun == [(-1, 1), (1, 3)]
    shown = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    expected = ["step 0/1", "step 1/1", "step 2/3", "step 3/3"]
    assert [line for line in shown if line.startswith("step ")] == expected


@pytest.mark.parametrize(("every", "expected"), [("0", []), ("2", [2, 4])])
def test_weights_of_ranks_are_compared_as_often_as_was_told(
    every: str, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []

    def compare(model: object) -> None:
        compared.append(steps_of(tmp_path / "run" / "metrics.jsonl")[-1])

    monkeypatch.setattr(training, "check_equal_weights", compare)
    flags = "--device cpu --horizon 2 --width 8 --num-heads 1 --num-demonstrations 4 --eval-cases 8"
    told = ["--steps=5", "--sync-check", every, "--save-dir", str(tmp_path / "run")]
    train_sft.main([*flags.split(), *told])
    assert compared == expected


def test_the_optimizer_is_as_was_told_and_only_grpo_has_a_rate_for_the_final_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[object, ...]] = []

    def watched(model: Transformer, *arguments: object) -> object:
        made.append(arguments)
        return optim.adamw(model, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "adamw", watched)
    told = ["--steps=1", "--learning-rate=0.5", "--adam-beta2=0.75", "--weight-decay=0.25"]
    flags = "--device cpu --horizon 2 --width 8 --num-heads 1 --num-demonstrations 4 --eval-cases 8"
    train_sft.main([*flags.split(), *told, "--save-dir", str(tmp_path / "sft")])
    init = ["--init", str(untrained_checkpoint(tmp_path / "init")), "--final-norm-rate=7"]
    train_grpo.main([*FEW.split(), *told, *init, "--save-dir", str(tmp_path / "grpo")])
    assert made == [(0.5, (0.9, 0.75), 0.25, rate) for rate in (1.0, 7.0)]


def test_supervised_training_counts_the_demonstrations_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--device cpu --horizon 2 --width 8 --num-heads 1 --eval-cases 8 --steps 3"
    few = "--num-demonstrations 4 --batch-size 64"
    train_sft.main([*flags.split(), *few.split(), "--save-dir", str(tmp_path / "run")])
    assert "4 demonstrations, 3 steps of 4 = 3 epochs" in capsys.readouterr().out


def test_a_run_is_judged_on_validation_starts_and_keeps_as_many_checkpoints_as_it_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chosen on the starts that evaluate.py measures on, the best model would look too good."""
    judged: list[tuple[torch.Tensor, int, int]] = []

    def validation(
        model: object, starts: torch.Tensor, task: object, seed: int, rows: int
    ) -> dict[str, float]:
        judged.append((starts, seed, rows))
        return {"eval/greedy_reward": 2.0, "eval/sampled_reward": 1.0}

    monkeypatch.setattr(training, "validation_metrics", validation)
    flags = "--device cpu --horizon 2 --width 8 --num-heads 1 --num-demonstrations 4 --batch-size 2"
    told = "--steps 4 --eval-every 2 --eval-cases 9 --seed 5 --rows-per-batch 7 --save-every 1"
    folder = tmp_path / "run"
    train_sft.main([*flags.split(), *told.split(), "--keep-last", "3", "--save-dir", str(folder)])
    expected = split_starts(DoubleIntegrator(horizon=2)).validation[:9]
    assert len(judged) == 3 and all(torch.equal(starts, expected) for starts, _, _ in judged)
    assert {(seed, rows) for _, seed, rows in judged} == {(5, 7)}
    assert published(folder) == (0, 2.0)  # the greedy one
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == ["step-000002", "step-000003", "step-000004"]


def test_credit_for_each_control_needs_prompts_whose_numbers_are_controls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = untrained_checkpoint(tmp_path / "init")
    shape, task, origin = train_grpo.load_task(init)
    weak = replace(task, plant=replace(task.plant, control_bound=0.2))  # starts reach 0.3
    monkeypatch.setattr(train_grpo, "load_task", lambda folder: (shape, weak, origin))
    with pytest.raises(ValueError, match="where start_bound is above control_bound"):
        train_grpo.settings(["--init", str(init)])
    resolved, *_ = train_grpo.settings(["--init", str(init), "--credit", "completion"])
    assert resolved.config.credit == "completion"


def test_gradients_that_do_not_fit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_signal, "free_memory", lambda device: 2**20)
    init = str(untrained_checkpoint(tmp_path / "init"))
    with pytest.raises(ValueError, match=r"keeps 999 gradients, .* 0\.0 are free"):
        train_grpo.main([*FEW.split(), "--init", init, "--measure-signal=999"])


def test_torch_is_recorded_with_its_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metadata of PyPI's CUDA wheels lack it."""
    monkeypatch.setattr(runs, "version", lambda name: "1.0")
    folder = finished_run(tmp_path / "run")
    packages = json.loads((folder / "provenance.json").read_text())["packages"]
    assert packages["torch"] == torch.__version__ and packages["numpy"] == "1.0"
