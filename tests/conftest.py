"""The suite runs offline, on one thread, as if outside of a batch job and in the foreground."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start: bits depend on it
for name in [name for name in os.environ if name.startswith(("SLURM_", "RUN_DIR", "STOP_FILE"))]:
    if name != "SLURM_CONF":  # not of a job: it says which cluster sbatch talks to
        del os.environ[name]
torch.set_num_threads(1)
# A shell has the programs in the background of a script ignore Ctrl-C, and so do our programs then.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def subnormal_numbers() -> Iterator[None]:
    """`run_command` does without them for the rest of its process."""
    yield
    torch.set_flush_denormal(False)
