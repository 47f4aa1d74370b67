"""A run's folder: who owns it, where its numbers come from, what was measured, when it shall stop.

save_dir/   LOCK  STATUS  provenance.json  metrics.jsonl  samples.jsonl  attempts/  tensorboard/
            (checkpoint.py adds the published model and checkpoints/)

Rank 0 alone writes, and what fails there fails on every rank. STATUS is running (also after a
kill), stopped, finished or, after an error, failed: it tells a batch script what an exit status
can't, as torchrun's is 1 for everything.
"""

from __future__ import annotations

import ctypes
import json
import math
import operator
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Literal, TypeAlias

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from minigrpo.distributed import any_rank, from_rank_zero, rank, world_size

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
HOST = socket.gethostname()
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "einops")
# All that a run writes at the top level of its folder; --overwrite deletes nothing else.
RUN_FILES = frozenset(
    "LOCK STATUS STOP provenance.json metrics.jsonl samples.jsonl minigrpo.json config.json "
    "generation_config.json model.safetensors tokenizer.json tokenizer_config.json vocab.json "
    "merges.txt special_tokens_map.json added_tokens.json chat_template.jinja".split()
)
RUN_FOLDERS = frozenset(
    "attempts checkpoints evaluation plots skipped tensorboard publish.tmp "
    "additional_chat_templates".split()
)
# What a run that was killed before its provenance.json may leave.
OF_A_START = frozenset("STATUS STATUS.tmp attempts provenance.json.tmp".split())
TAKES_LESS_MEMORY = (
    "A smaller --rows-per-batch takes less, in training also --micro-batch-size, "
    "--gradient-checkpointing, --lora-rank or --parallel fsdp"
)
CONSOLE = (  # metric, label, format; a line shows those that the step has
    ("reward/total", "reward", "7.2f"),
    ("rollout/frac_valid", "valid", "4.0%"),
    ("loss/total", "loss", "7.4f"),
    ("eval/greedy_reward", "greedy", "7.2f"),
    ("eval/sampled_reward", "sampled", "7.2f"),
    ("eval/cost_ratio", "cost_ratio", "6.4f"),
    ("loss/clip_fraction", "clip", "5.3f"),
    ("loss/approx_kl", "approx_kl", "8.1e"),
    ("update/grad_norm", "grad_norm", "6.3f"),
    ("time/step_s", "seconds", "5.2f"),
)


def on_rank_zero(work: Callable[[], None]) -> None:
    """Do file work on rank 0 while the others wait; if it fails there, every rank raises."""
    failure: OSError | ValueError | None = None
    if rank() == 0:
        try:
            work()
        except (OSError, ValueError) as error:
            failure = error
    failed = any_rank(failure is not None)
    if failure is not None:
        raise failure
    if failed:
        raise OSError("rank 0 could not write the run folder; its own message says why")


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole: readers see the old text or the new one, after a power cut too."""
    draft = path.with_name(f"{path.name}.tmp")
    draft.unlink(missing_ok=True)  # of a kill, or a link of somebody else's out of the folder
    with draft.open("x") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def to_json(value: Json, indent: int | None = None) -> str:
    """JSON without NaN and infinities, which not every reader accepts: they become null.

    Written twice, for json can replace them only where it reads them.
    """
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None), indent=indent)


def check_apart(save_dir: Path, name: str, folder: Path) -> None:
    """ValueError if the run's folder is or holds the one it starts from: both would be lost.

    What is no folder, as a model's name on the hub, lies nowhere.
    """
    start = folder.resolve()
    if start.exists() and save_dir.resolve() in (start, *start.parents):
        raise ValueError(
            f"save_dir must not be or hold the folder of {name}, {folder}; got {save_dir}"
        )


def open_run(folder: Path, overwrite: bool, resume: bool, tensorboard: bool = False) -> RunFolder:
    """Take possession of a run folder; use it in a `with`, which gives it back.

    ValueError: it holds another run and neither flag is given, files that no run wrote, or another
    process works in it; or TensorBoard is asked for and missing.
    """
    if overwrite and resume:
        raise ValueError("overwrite and resume must not both be given")
    if tensorboard and find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs an extra: pip install -e '.[tensorboard]'")

    run = RunFolder(folder, tensorboard)

    def prepare() -> None:
        make_folder(folder)
        run.take()
        try:
            _make_room(folder, overwrite, resume)
        except (OSError, ValueError):
            run.give_back()
            raise

    on_rank_zero(prepare)
    return run


def make_folder(folder: Path) -> None:
    """Make a save_dir, which may be there already; OSError names the flag if it cannot be one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"save_dir must be a folder or become one, got {folder}: {error}") from error


def _take_lock(lock: Path) -> str:
    """Create the lock; take it over from a dead owner and from this Slurm job before a requeue.

    Not from the same attempt of the job: on another of its nodes that may be at work. An attempt
    before it is dead, even if a process has its id: Slurm ends all of one on its nodes before it
    starts the next. A node that Slurm could not reach may still be at work, and a process of
    another container may be taken for dead: such an owner finds another text in the lock before it
    writes again (`RunFolder.check_lock`). Returns the text, which no other lock has.
    """
    attempt = _slurm_attempt()
    owner = {"job": attempt, "pid": os.getpid(), "host": HOST, "since": time.time_ns()}
    text = json.dumps(owner)
    ours = lock.with_name(f"LOCK.{HOST}.{os.getpid()}")
    ours.unlink(missing_ok=True)  # of a process of this number before us, perhaps the lock itself
    ours.write_text(text)
    try:
        _link(lock, ours)
    except FileExistsError:
        other = _read_owner(lock)
        on_this_host = other["host"] == owner["host"]
        is_alive = on_this_host and _is_alive(int(other["pid"]))
        job = other["job"].partition(".")[0]
        is_requeued = bool(job) and attempt.startswith(f"{job}.") and attempt != other["job"]
        if not is_requeued and (is_alive or not on_this_host):
            name = f"process {other['pid']} on {other['host']}, job {other['job'] or 'none'}"
            raise ValueError(f"{lock.parent} is in use by {name}; delete {lock} if not") from None
        _replace_lock(lock, ours, other)
    finally:
        ours.unlink(missing_ok=True)
    return text


def _slurm_attempt() -> str:
    """JOB.RESTARTS, the name of this attempt of a Slurm job; empty without one."""
    job, restarts = (os.environ.get(f"SLURM_{name}") for name in ("JOB_ID", "RESTART_COUNT"))
    return f"{job}.{restarts or 0}" if job else ""


def _link(lock: Path, ours: Path) -> None:
    """The lock with its owner in it from the first moment; FileExistsError: there is one.

    A file that is created and then written would be empty if the process is killed in between, and
    an empty lock is nobody's to take over.
    """
    try:
        lock.hardlink_to(ours)
    except OSError:  # there is one, or the file system has no links
        with lock.open("x") as file:
            file.write(ours.read_text())


def _replace_lock(lock: Path, ours: Path, dead: dict[str, str]) -> None:
    """Our lock for that of a dead owner; of several processes that try, one succeeds."""
    aside = lock.with_name(f"LOCK.{HOST}.{os.getpid()}.tmp")
    try:
        lock.rename(aside)  # unlink could hit the lock of a process that was quicker
        if _read_owner(aside) == dead:
            aside.unlink()
            return _link(lock, ours)
        aside.rename(lock)
    except (FileNotFoundError, FileExistsError):
        pass
    raise ValueError(f"{lock.parent} is in use: another process has just taken it")


def _read_owner(lock: Path) -> dict[str, str]:
    try:
        owner = json.loads(lock.read_text())
        return {"job": str(owner["job"]), "pid": str(int(owner["pid"])), "host": str(owner["host"])}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise ValueError(f"{lock} names no owner; if no process works there, delete it") from None


def _is_alive(pid: int) -> bool:
    """Does another process have this id?"""
    if pid == os.getpid():  # the owner had our id before us: a container was restarted
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # no process has a number so large
        return False
    except PermissionError:  # it is somebody else's
        return True
    return True


def _make_room(folder: Path, overwrite: bool, resume: bool) -> None:
    found = {path.name: path for path in folder.iterdir() if path.name != "LOCK"}
    if all(name in OF_A_START or name.startswith(("STOP", "LOCK.")) for name in found):
        return
    if "provenance.json" not in found:
        raise ValueError(f"{folder} holds files but no run (provenance.json is missing)")
    if overwrite:
        if strangers := sorted(name for name, path in found.items() if not _is_ours(path)):
            names = ", ".join(strangers)
            raise ValueError(f"{folder} holds {names}, which no run wrote; nothing was deleted")
        # What marks the folder as a run goes last: an interrupted deletion can be repeated.
        for path in sorted(found.values(), key=lambda path: path.name == "provenance.json"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    elif not resume:
        raise ValueError(f"{folder} holds a run: --resume goes on with it, --overwrite deletes it")


def _is_ours(path: Path) -> bool:
    if path.is_dir():
        return path.name in RUN_FOLDERS
    return path.name.removesuffix(".tmp") in RUN_FILES or path.name.startswith(("STOP.", "LOCK."))


class RunFolder:
    """The open folder of a run; the methods are called on every rank."""

    def __init__(self, folder: Path, tensorboard: bool):
        self.folder = folder
        self._tensorboard = tensorboard
        self._open = ExitStack()  # what is to be closed
        self._scalar: Callable[[str, float, int], None] | None = None
        self._bar: tqdm[None] | None = None
        self._num_steps = 0
        self._is_running = False  # as STATUS says: a refusal to resume leaves the run as it was
        self._owner: str | None = None  # the text of the lock while it is ours, on rank 0

    def take(self) -> None:
        """On rank 0: take the lock. ValueError: another process has it."""
        self._owner = _take_lock(self.folder / "LOCK")

    def give_back(self) -> None:
        """On rank 0: remove the lock, unless it is somebody else's by now."""
        if self._has_lock():
            (self.folder / "LOCK").unlink()
        self._owner = None

    def _has_lock(self) -> bool:
        try:
            return (self.folder / "LOCK").read_text(errors="replace") == self._owner
        except FileNotFoundError:
            return False

    def check_lock(self) -> None:
        """OSError if what is at the folder's place is not this run's any more.

        Somebody moved the folder, or deleted the lock of a run that was at work; or Slurm gave up a
        node that went on, and started the job again.
        """

        def check() -> None:
            if not self._has_lock():
                raise OSError(
                    f"{self.folder} is not this run's any more (moved, or its LOCK is another's or "
                    "gone): nothing more is written, --resume goes on from its newest checkpoint"
                )

        on_rank_zero(check)

    def record_attempt(
        self,
        stage: str,
        config: Mapping[str, Json],
        device: torch.device,
        is_start: bool = False,
    ) -> None:
        """Write that this process runs, what it shall do, and with what.

        The record of the first attempt is the run's, provenance.json, or that of the last one which
        started at its beginning.
        """

        def write() -> None:
            record = {"stage": stage, "config": config, **_provenance(device)}
            name = _slurm_attempt() or time.strftime("%Y%m%d-%H%M%S")
            attempt, first = self.folder / "attempts" / name, self.folder / "provenance.json"
            while attempt.exists():  # twice within one job or second
                attempt = attempt.with_name(f"{attempt.name}+")
            attempt.mkdir(parents=True)
            described = record | {"environment": _cluster_variables()}
            write_text(attempt / "attempt.json", to_json(described, indent=2) + "\n")
            if is_start or not first.exists():
                write_text(first, to_json(record, indent=2) + "\n")
            self._is_running = True
            write_text(self.folder / "STATUS", "running\n")

        on_rank_zero(write)

    def cut_logs(self, step: int) -> None:
        """Keep what was logged until `step` (-1: nothing).

        ValueError: metrics.jsonl has not all of these steps in order, or what is no number in one;
        schedules look back on them.
        """

        def cut() -> None:
            for name in ("metrics.jsonl", "samples.jsonl"):
                path = self.folder / name
                lines = _lines_until(path, step) if path.exists() else []
                if name == "metrics.jsonl":
                    _check_history(path, lines, step)
                if path.exists():
                    write_text(path, "".join(lines))

        on_rank_zero(cut)

    def start(self, step: int, num_steps: int) -> None:
        """Go on after `step` finished steps: open the progress bar and TensorBoard."""
        self._num_steps = num_steps
        if rank() == 0:
            self._bar = tqdm(total=num_steps, initial=max(step, 0), unit="step", disable=None)
            self._open.callback(self._bar.close)
            if self._tensorboard:
                from torch.utils.tensorboard import SummaryWriter  # the extra is optional

                writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)
                self._scalar = writer.add_scalar
                self._open.callback(writer.close)

    def history(self) -> list[dict[str, float]]:
        """The metrics of the steps that a resumed run has done: what its schedules look back on.

        Rank 0 reads them for all; call it on every rank, after `cut_logs`. NaN stands for null.
        """

        def read() -> list[dict[str, float]]:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            return [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]

        return from_rank_zero(read)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and one of the console for a step."""
        if rank() != 0:
            return
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(to_json({"step": step, **metrics}) + "\n")
            file.flush()
            os.fsync(file.fileno())  # without it no checkpoint of this step can be resumed
        self._plot(step, metrics)
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        tqdm.write(console_line(step, self._num_steps, metrics))

    def log_again(self, step: int, metrics: Mapping[str, float]) -> None:
        """Another line of metrics.jsonl for the last step, in place of the one it has."""
        if rank() == 0:
            path, line = self.folder / "metrics.jsonl", to_json({"step": step, **metrics})
            write_text(path, "".join(_lines_until(path, step - 1)) + line + "\n")
            self._plot(step, metrics)
            tqdm.write(console_line(step, self._num_steps, metrics))

    def _plot(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._scalar is not None:  # with --tensorboard
            for name, value in metrics.items():
                self._scalar(name, value, step)

    def log_text(self, *lines: str) -> None:
        """Lines for the console alone."""
        if rank() == 0:
            for line in lines:
                tqdm.write(line)

    def log_sample(self, step: int, record: Mapping[str, Json]) -> None:
        """One line of samples.jsonl."""
        if rank() == 0:
            with (self.folder / "samples.jsonl").open("a") as file:
                file.write(to_json({"step": step, **record}) + "\n")

    def finish(self, status: Literal["stopped", "finished"]) -> None:
        """Write STATUS, after the last checkpoint; a batch script requeues what was stopped."""
        on_rank_zero(lambda: write_text(self.folder / "STATUS", f"{status}\n"))
        self._is_running = False

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        self._open.close()
        if rank() != 0:
            return
        if kind is not None and self._is_running:
            with suppress(OSError):  # of a full disk the error that is on its way tells
                if self._has_lock():
                    write_text(self.folder / "STATUS", "failed\n")
        with suppress(OSError):
            self.give_back()


def _check_history(path: Path, lines: Sequence[str], step: int) -> None:
    """ValueError unless these are the steps 0, 1, ..., `step`, and hold numbers."""
    rows = [json.loads(line) for line in lines]
    steps = [row["step"] for row in rows]
    if steps != list(range(step + 1)):
        whole = next((n for n, found in enumerate(steps) if found != n), len(steps))
        advice = f"delete the checkpoints after step {whole - 1}, " if whole else ""
        raise ValueError(
            f"{path} must have a line for each step from 0 to {step}, where the newest checkpoint "
            f"is, got {whole} in order: put back a whole one, {advice}or --overwrite"
        )
    for row in rows:
        for name, value in row.items():
            if value is not None and type(value) not in (int, float):
                place = f"{path}: {name} of step {row['step']}"
                raise ValueError(f"{place} must be a number or null, got {value!r}")


def _lines_until(path: Path, step: int) -> list[str]:
    """The lines of finished steps; a last line without an end was cut off by a kill."""
    kept, text = [], path.read_text(errors="replace")
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            continue
        try:
            if operator.index(json.loads(line)["step"]) <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: line {number} must be an object with a step") from error
    return kept


def console_line(step: int, num_steps: int, metrics: Mapping[str, float]) -> str:
    """The step's headline; all metrics are in metrics.jsonl."""
    shown = [f"{label} {metrics[name]:{form}}" for name, label, form in CONSOLE if name in metrics]
    return "  ".join([f"step {step:{len(str(num_steps))}d}/{num_steps}", *shown])


def _provenance(device: torch.device) -> dict[str, Json]:
    changes = _git("status", "--porcelain", "--untracked-files=no")  # a run's own folder is one
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "argv": sys.argv,
        "world_size": world_size(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "python": sys.version.split()[0],
        # Of torch with the build, which the package's own metadata need not tell.
        "packages": {name: version(name) for name in PACKAGES} | {"torch": torch.__version__},
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),  # what `auto` chose
        "host": HOST,
    }


def _git(*arguments: str) -> str | None:
    """What git says about the checkout; None without git or outside of one.

    Also (git 2.38 or later) if it is somebody else's, as on many clusters: its code runs already.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # an archive or an installed package, perhaps in another one
        return None
    command = ["git", "-c", "safe.directory=*", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cluster_variables() -> dict[str, str]:
    """Slurm's, NCCL's and torchrun's; never the whole environment: it holds tokens. SLURM_JWT is
    one."""
    wanted = ("SLURM_", "NCCL_", "MASTER_", "PET_")
    names = [name for name in sorted(os.environ) if name.startswith(wanted)]
    return {name: os.environ[name] for name in names if name != "SLURM_JWT"}


class StopSignal:
    """Asks a run to save and stop: SIGTERM, SIGUSR1, Ctrl-C, a stop file, or its own deadline.

    A handler only sets a flag; the trainer asks `any_rank(stop.requested())` between steps, and all
    ranks act on the answer. A second Ctrl-C aborts. The stop file is $STOP_FILE (a batch script's,
    one for each attempt) or save_dir/STOP, which is removed at start: it has done its work.
    """

    def __init__(self, folder: Path, minutes: float):
        named = os.environ.get("STOP_FILE")
        self._file = Path(named) if named else folder / "STOP"
        self._deadline = time.monotonic() + 60 * minutes if minutes > 0 else math.inf
        self._is_signalled = False
        self.is_interrupted = False  # by Ctrl-C
        self._restore = ExitStack()  # the handlers that were there before
        if rank() == 0 and not named:
            self._file.unlink(missing_ok=True)

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            if signal.getsignal(number) == signal.SIG_IGN:  # in the background of a script
                continue
            previous = signal.signal(number, self._on_signal)
            self._restore.callback(signal.signal, number, previous)
        return self

    def __exit__(self, *raised: object) -> None:
        self._restore.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._is_signalled = True
        if number == signal.SIGINT:
            self.is_interrupted = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.write(2, b"\nsaving after this step, Ctrl-C again aborts\n")

    def requested(self) -> bool:
        """This rank's view; combine it with `any_rank`."""
        is_asked = self._is_signalled or (rank() == 0 and self._file.exists())
        return is_asked or time.monotonic() >= self._deadline


def keep_freed_memory() -> None:
    """Have glibc reuse the memory of freed tensors instead of returning it to the kernel page by
    page.

    A training step on a CPU frees and asks for the same megabytes hundreds of times; without this a
    scored micro-batch of the tiny model takes 1.16 times as long (make bench). Elsewhere: nothing.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
            libc.mallopt(option, 2**30)


def set_matmul_precision(wanted: str, device: torch.device) -> None:
    """torch.set_float32_matmul_precision, where `auto` never gives a CPU less than float32.

    On a CPU `medium` chooses oneDNN instead of MKL: float32, and 2.2 times as fast on an AMD EPYC,
    but products of bfloat16 where the processor has them (AMX). There sampler and trainer differ
    by up to 0.4 nats and a step is no shorter. One product tells: 1e-6 off, or 3e-3; a large one,
    for torch 2.11 makes small ones in float32 in any case. On Intel's processors MKL is as fast
    (a step of GRPO 1.05 times). Nothing is timed: a run must choose again what it chose.
    """
    if wanted == "auto" and device.type == "cuda":
        wanted = "high"
    elif wanted == "auto" and _is_intel():
        wanted = "highest"
    elif wanted == "auto":
        a, b = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
        exact = a.double() @ b.double()
        torch.set_float32_matmul_precision("medium")
        error = (a @ b - exact).abs().amax() / exact.abs().amax()
        wanted = "medium" if error < 1e-5 else "highest"
    torch.set_float32_matmul_precision(wanted)


def _is_intel(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    try:
        return "GenuineIntel" in cpuinfo.read_text()
    except OSError:  # not Linux
        return False


def slow_bfloat16(precision: str, device: torch.device) -> list[str]:
    """A warning if bfloat16 was asked of a CPU that is slower with it.

    On an EPYC without AVX-512 products of bfloat16 take 60 to 90 times as long as of float32, on a
    Xeon with AMX a fifth, on one with AVX-512's alone twice as long (a step of SmolLM2 1.45 times),
    on an EPYC with these half as long; a few of each tell. Autocast moves half the bytes, so a
    little slower may be no loss.
    """
    if precision != "bfloat16" or device.type != "cpu":
        return []
    matrix = torch.ones(256, 256)
    wide, narrow = (
        min(timeit.repeat("a @ a", repeat=4, number=1, globals={"a": matrix.to(dtype)}))
        for dtype in (torch.float32, torch.bfloat16)
    )
    slower = narrow / wide
    if slower < 1.5:
        return []
    return [
        f"warning: on this processor products of bfloat16 take {slower:.1f} times as long as of "
        "float32: --precision float32 is most likely faster"
    ]


def printable(text: str) -> str:
    """One line for a terminal, 2,000 characters at most: a name in a foreign file may hold escape
    sequences, which would clear the screen or say what is not so."""
    line = " ".join(text.split())[:2000]
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def run_command(main: Callable[[], None]) -> None:
    """Run a script: a user's mistake is one line on stderr and exit status 2, the rest a traceback.

    Training that diverged and a GPU without memory are one line too, with its advice, and status 1.
    What a mistake carries as notes follows, on one rank. `python -X dev` shows its traceback too.
    After Ctrl-C the process dies of the signal: by that a shell knows not to go on, in loops too.
    """
    if os.name == "nt":  # it has no SIGUSR1 and syncs no folders
        raise SystemExit("error: minigrpo runs on Linux and macOS, on Windows inside WSL")
    keep_freed_memory()
    # A policy that is sure has probabilities below what float32 holds in full, and Intel's
    # processors are slow with such numbers: steps of 25 s instead of 12, late in a run from 20,000
    # demonstrations (docs/speed.md). Threads that are made later take the setting over.
    torch.set_flush_denormal(True)
    try:
        main()
    except KeyboardInterrupt:
        if sys.flags.dev_mode:
            raise
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        if sys.flags.dev_mode:
            raise
        place = os.environ.get("RANK", "0")
        message = printable(str(error))
        if isinstance(error, torch.OutOfMemoryError):
            message += f" {TAKES_LESS_MEMORY}"
        start = "error" if place == "0" else f"error on rank {place}"
        notes = getattr(error, "__notes__", []) if place == "0" else []
        print(f"{start}: {message}", *notes, sep="\n", file=sys.stderr)
        is_mistake = isinstance(error, (ValueError, OSError))
        raise SystemExit(2 if is_mistake else 1) from None
