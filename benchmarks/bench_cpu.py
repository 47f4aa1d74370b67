"""What the CPU optimisations are worth: equality first, then interleaved timings, one JSON object.

    python benchmarks/bench_cpu.py            one thread, about half a minute

attention    two plain products against scaled_dot_product_attention, forward and backward
memory       scoring a micro-batch with freed memory kept (runs.keep_freed_memory) and without
sampler      512 rows of 51 tokens, untruncated and with top-p
simulator    environment steps a second
parse        4096 texts of 50 numbers
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.policy import ActingPolicy, completion_scores
from minigrpo.prompts import Codec, parse_controls, render_controls
from minigrpo.runs import keep_freed_memory
from minigrpo.sampling import StopRule, sample_completions
from minigrpo.transformer import Transformer, TransformerConfig, attend, initialise

SHAPE = TransformerConfig("llama", 607, 64, 128, 2, 2, 2, 32, rope_theta=1000.0, tied_head=False)
ROUNDS = 5


def interleaved(arms: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median processor milliseconds of each arm, taken in turn; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(ROUNDS + 1):
        for name, work in arms.items():
            began = time.process_time()
            for _ in range(repeats):
                work()
            times[name].append(1000 * (time.process_time() - began) / repeats)
    return {name: round(statistics.median(values[1:]), 3) for name, values in times.items()}


def attention() -> dict[str, float]:
    q, k, v = (torch.randn(128, 2, 54, 32, requires_grad=True) for _ in range(3))
    allowed = torch.ones(54, 54, dtype=torch.bool).tril()
    bias = torch.zeros(1, 1, 54, 54).masked_fill(~allowed, -torch.inf)

    def fused() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    torch.testing.assert_close(attend(q, k, v, bias), fused(), rtol=1e-4, atol=1e-4)
    arms = {
        "two_products_ms": lambda: attend(q, k, v, bias).sum().backward(),
        "sdpa_ms": lambda: fused().sum().backward(),
    }
    return interleaved(arms, 10)


def scoring() -> dict[str, float]:
    model = Transformer(SHAPE)
    initialise(model, torch.Generator().manual_seed(0))
    prompts, tokens = torch.randint(607, (128, 5)), torch.randint(607, (128, 51))
    support = torch.randint(607, (128, 51, 32), dtype=torch.int32)
    support[:, :, 0] = tokens
    mask = torch.ones_like(prompts, dtype=torch.bool)

    def work() -> None:
        scores = completion_scores(model, prompts, mask, tokens, support, 1.5)
        scores.logprobs.sum().backward()

    return interleaved({"forward_backward_ms": work}, 5)


def sampler() -> dict[str, float]:
    model = Transformer(SHAPE)
    initialise(model, torch.Generator().manual_seed(0))
    prompts = torch.randint(607, (32, 5))
    mask, uniforms = torch.ones_like(prompts, dtype=torch.bool), torch.rand(512, 51)

    def arm(acting: ActingPolicy) -> Callable[[], object]:
        stop = StopRule((1,), 0, 51)
        return lambda: sample_completions(model, prompts, mask, 16, acting, stop, uniforms)

    arms = {
        "untruncated_ms": arm(ActingPolicy(1.0, 1.0)),
        "top_p_support_32_ms": arm(ActingPolicy(1.5, 0.9, 32)),
        "top_p_support_128_ms": arm(ActingPolicy(1.5, 0.9, 128)),
    }
    return interleaved(arms, 1)


def simulator() -> dict[str, float]:
    plant, num_rows = DoubleIntegrator(), 65_536
    starts, controls = torch.rand(num_rows, 2) - 0.5, torch.randn(num_rows, 50)
    found = interleaved({"ms": lambda: plant.simulate(starts, controls)}, 3)
    return {"steps_per_second": round(num_rows * 50 / found["ms"] * 1000)}


def parse() -> dict[str, float]:
    plant, codec = DoubleIntegrator(), Codec()
    texts = [render_controls(3 * torch.rand(50) - 1.5, codec) for _ in range(4096)]
    ended = torch.ones(len(texts), dtype=torch.bool)
    return interleaved({"ms": lambda: parse_controls(texts, ended, plant, codec)}, 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scoring-only", choices=("kept", "returned"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")
    torch.manual_seed(0)
    if given.scoring_only != "returned":
        keep_freed_memory()
    if given.scoring_only:
        print(json.dumps(scoring()))
        return
    memory: dict[str, list[float]] = {"kept": [], "returned": []}
    for _ in range(3):  # a process each: the allocator's setting cannot be taken back
        for arm, found in memory.items():
            command = [sys.executable, __file__, "--scoring-only", arm]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout)["forward_backward_ms"])
    report = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "attention": attention(),
        "memory": {f"{arm}_ms": statistics.median(found) for arm, found in memory.items()},
        "sampler": sampler(),
        "simulator": simulator(),
        "parse": parse(),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
