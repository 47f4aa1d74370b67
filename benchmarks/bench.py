"""Speed of a GRPO step against its floor and against TRL 1.16.0, checked for equality first.

    python benchmarks/bench.py                                          tiny, about a minute
    python benchmarks/bench.py --peer-python .venv-trl/bin/python       the same with TRL
    python benchmarks/bench.py --item cpu-256 --loops 3 --core 0 --peer-python ... --out x.json
    python benchmarks/bench.py --sections parts,simulator,scaling       what each piece costs
    python benchmarks/bench.py --device cuda --sections ceilings,decode --budget-s 560

Sections, CPU: correct ceilings step parts simulator scaling; CUDA: also decode rollout train. Arms
run in turn, a process each, from one folder of weights and prompts. On a CPU the clock is that of
the processor, one thread: it does not count what others do. Equal in all arms:
weights, prompts, group, lengths (no end token), kl_beta 0.01, top_p 1, one update a rollout, no
gradient checkpointing. Ours has neither a tokenizer nor metrics in its step.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F

FAST = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
WARM_UP = {"cpu": 1, "cuda": 2}  # on CUDA the second rollout records its graphs


@dataclass(frozen=True)
class Item:
    """A model in the Qwen2 shape and the batch of one step."""

    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    num_prompts: int
    group_size: int
    prompt_length: int
    length: int
    micro_batch: int
    top_p: float = 1.0  # below 1 with support 32; TRL has no such policy

    @property
    def block_parameters(self) -> int:
        """Weights that multiply every token."""
        head = self.width // self.num_heads
        attention = self.width * head * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.width * self.mlp_width)

    @property
    def head_parameters(self) -> int:
        """Weights that multiply every token of a completion."""
        return self.width * self.vocab_size

    def scored_gflop(self, num_prompts: int, rows: int) -> float:
        """A forward over completions, each prompt once; the last token of a row is never fed."""
        fed = num_prompts * self.prompt_length + rows * (self.length - 1)
        return 2e-9 * (self.block_parameters * fed + self.head_parameters * rows * self.length)

    def floors(self, gflops: float, copy_gb_s: float, is_cuda: bool) -> dict[str, float]:
        """Least seconds of the phases: products at the rate of large ones; CUDA decodes by bytes.

        A prompt is fed once for its group; a decoded token reads all weights in bfloat16 and, for
        each row, the keys and values so far. Backward is two forwards.
        """
        rows, matrix = self.num_prompts * self.group_size, self.block_parameters
        prefill = 2e-9 * matrix * self.num_prompts * self.prompt_length / gflops
        matrix += self.head_parameters
        scored = self.scored_gflop(self.num_prompts, rows) / gflops
        decode = 2e-9 * matrix * rows * self.length / gflops
        if is_cuda:
            head = self.width // self.num_heads
            context = self.prompt_length + self.length / 2
            cached = 4 * self.num_layers * self.num_kv_heads * head * context * rows
            decode = max(decode, 1e-9 * self.length * (2 * matrix + cached) / copy_gb_s)
        floors = {"rollout": prefill + decode, "reference": scored, "update": 3 * scored}
        return floors | {"step": sum(floors.values())}


ITEMS = {
    "tiny": Item(128, 512, 4, 4, 4, 700, 4, 8, 12, 51, 32),
    "cpu-128": Item(128, 512, 4, 4, 4, 700, 8, 16, 12, 51, 32),
    "cpu-256": Item(256, 1024, 4, 4, 4, 700, 8, 16, 12, 51, 32),
    "scale": Item(64, 128, 2, 2, 2, 607, 8, 16, 5, 51, 128, 0.9),
    "gpu-ref": Item(896, 4864, 24, 14, 2, 151_936, 32, 16, 150, 350, 128),
}

# What the scaling table varies, one at a time: completions, length, width of the model.
SCALED = {
    "1": {},
    "completions x4": {"num_prompts": 32},
    "completions x16": {"num_prompts": 128},
    "length x2": {"length": 102},
    "length x4": {"length": 204},
    "width x2": {"width": 128, "mlp_width": 256},
    "width x4": {"width": 256, "mlp_width": 512},
}
ITEMS |= {f"scale {name}": replace(ITEMS["scale"], **change) for name, change in SCALED.items()}


def write_work(item: Item, folder: Path) -> None:
    """Weights (logits spread over 1 nat, not flat), prompts and a tokenizer of one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from minigrpo.hugging_face import save_transformer
    from minigrpo.transformer import Transformer, TransformerConfig, initialise

    config = TransformerConfig(
        "qwen2", item.vocab_size, item.width, item.mlp_width, item.num_layers, item.num_heads,
        item.num_kv_heads, item.width // item.num_heads,
    )  # fmt: skip
    model = Transformer(config)
    initialise(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.norm.weight *= 1.0 / (0.02 * item.width**0.5)
    save_transformer(model, folder)
    words = {f"w{i}": i for i in range(item.vocab_size)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="w1", pad_token="w0", unk_token="w0"
    ).save_pretrained(folder)
    shape = (item.num_prompts, item.prompt_length)
    prompts = torch.randint(2, item.vocab_size, shape, generator=torch.Generator().manual_seed(1))
    (folder / "prompts.json").write_text(json.dumps(prompts.tolist()))


def reward_of(rows: list[list[int]]) -> list[float]:
    """The same reward in every arm: the share of even token ids."""
    return [sum(token % 2 == 0 for token in row) / len(row) for row in rows]


def our_arm(
    item: Item, folder: Path, steps: int, device: str, is_mixed: bool, is_fused: bool
) -> dict[str, Any]:
    """GRPO steps out of minigrpo's own pieces: seconds of each, and by phase."""
    from minigrpo.grpo import Objective, group_advantages, grpo_loss, loss_denominator
    from minigrpo.hugging_face import load_transformer
    from minigrpo.optim import adamw
    from minigrpo.policy import ActingPolicy
    from minigrpo.rollout import rows_of
    from minigrpo.runs import keep_freed_memory, set_matmul_precision
    from minigrpo.sampling import Completions, StopRule, sample_completions
    from minigrpo.scoring import completion_scores
    from minigrpo.transformer import Transformer

    keep_freed_memory()
    set_matmul_precision("auto", torch.device(device))
    model, reference = (load_transformer(folder).to(device) for _ in range(2))
    model.is_fused = reference.is_fused = is_fused
    prompts = torch.tensor(json.loads((folder / "prompts.json").read_text()), device=device)
    acting = ActingPolicy(1.0, item.top_p, 32)
    stop, optimizer = StopRule((), 0, item.length), adamw(model, 1e-6, (0.9, 0.999), 0.0)
    rows, before = item.num_prompts * item.group_size, peak_gb(device)
    alike = math.gcd(item.group_size, item.micro_batch)
    phases: dict[str, list[float]] = {"rollout": [], "reference": [], "update": [], "step": []}

    def scored(
        scorer: Transformer, done: Completions, rows: torch.Tensor, has_entropy: bool
    ) -> torch.Tensor:
        whose = rows[::alike] // item.group_size
        support = rows_of(done.support, rows)
        return completion_scores(
            scorer, prompts[whose], None, done.tokens[rows], support, 1.0, None, has_entropy
        ).logprobs

    for step in range(WARM_UP[device] + steps):
        generator = torch.Generator().manual_seed(step)
        uniforms = torch.rand(rows, item.length, generator=generator).to(device)
        stamps = [now(device)]
        with torch.autocast(device, torch.bfloat16, enabled=is_mixed):
            done = sample_completions(model, prompts, None, item.group_size, acting, stop, uniforms)
        rewards = torch.tensor(reward_of(done.tokens.tolist()), dtype=torch.float64)
        advantages = group_advantages(rewards, item.group_size, "group").to(device)
        stamps.append(now(device))
        chunks = torch.split(torch.arange(rows, device=device), item.micro_batch)
        with torch.autocast(device, torch.bfloat16, enabled=is_mixed), torch.no_grad():
            kept = [scored(reference, done, chosen, False) for chosen in chunks]
        stamps.append(now(device))
        denominator = loss_denominator(done.mask, "dapo", item.length)
        for chosen, ref in zip(chunks, kept, strict=True):
            with torch.autocast(device, torch.bfloat16, enabled=is_mixed):
                logprobs = scored(model, done, chosen, True)
            loss, _ = grpo_loss(
                logprobs, None, ref, done.mask[chosen], advantages[chosen], denominator,
                Objective(0.2, 0.2, 0.01, "dapo"),
            )  # fmt: skip
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        stamps.append(now(device))
        if step >= WARM_UP[device]:
            pieces = [b - a for a, b in pairwise(stamps)]
            for values, seconds in zip(
                phases.values(), [*pieces, stamps[-1] - stamps[0]], strict=True
            ):
                values.append(seconds)
    return {"phases": phases, "peak_gb": peak_gb(device), "before_gb": before}


def trl_arm(
    item: Item,
    folder: Path,
    steps: int,
    device: str,
    is_mixed: bool,
    is_fused: bool,
    is_tuned: bool,
) -> dict[str, Any]:
    """The same steps by TRL's GRPOTrainer."""
    datasets, trl, transformers = map(importlib.import_module, ("datasets", "trl", "transformers"))
    if is_tuned:
        from minigrpo.runs import set_matmul_precision

        set_matmul_precision("auto", torch.device(device))
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    prompts = json.loads((folder / "prompts.json").read_text())
    texts = [" ".join(f"w{token}" for token in row) for row in prompts]
    stamps: list[float] = []

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            stamps.append(now(device))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            stamps.append(now(device))

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        assert all(len(row) == item.length for row in completion_ids), "a row ended early"
        return reward_of(completion_ids)

    rows = item.num_prompts * item.group_size
    # On a GPU its logits of a micro-batch in float32, several times over, must fit.
    micro_batch = min(rows, item.micro_batch, 32 if device == "cuda" else rows)
    config = trl.GRPOConfig(
        output_dir=str(folder / "trl"), use_cpu=device == "cpu", bf16=is_mixed, tf32=None,
        torch_compile=is_fused,
        gradient_checkpointing=False, per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=rows // micro_batch,
        num_generations=item.group_size, max_completion_length=item.length, beta=0.01,
        temperature=1.0, top_p=1.0, top_k=0, loss_type="dapo", learning_rate=1e-6,
        max_steps=1 + steps, max_grad_norm=1.0, save_strategy="no", report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False, logging_strategy="no",
        shuffle_dataset=False,
        generation_kwargs={"min_new_tokens": item.length},
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=str(folder), reward_funcs=reward, args=config, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict({"prompt": texts * (1 + steps)}),
        callbacks=[Watch()],
    )  # fmt: skip
    trainer.train()
    seconds = [b - a for a, b in zip(stamps[::2], stamps[1::2], strict=True)]
    assert len(seconds) == 1 + steps
    return {"phases": {"step": seconds[1:]}, "peak_gb": peak_gb(device)}


# bf16: autocast. fused: what is element-wise compiled, TRL's whole model. "trl" is TRL as it is
# installed; all its other arms are tuned: the products that ours picks, freed memory kept.
ARMS: dict[str, Callable[[Item, Path, int, str], dict[str, Any]]] = {
    "ours": partial(our_arm, is_mixed=False, is_fused=False),
    "ours_fused": partial(our_arm, is_mixed=False, is_fused=True),
    "ours_bf16": partial(our_arm, is_mixed=True, is_fused=False),
    "ours_bf16_fused": partial(our_arm, is_mixed=True, is_fused=True),
    "trl": partial(trl_arm, is_mixed=False, is_fused=False, is_tuned=False),
    "trl_tuned": partial(trl_arm, is_mixed=False, is_fused=False, is_tuned=True),
    "trl_fused": partial(trl_arm, is_mixed=False, is_fused=True, is_tuned=True),
    "trl_bf16": partial(trl_arm, is_mixed=True, is_fused=False, is_tuned=True),
    "trl_bf16_fused": partial(trl_arm, is_mixed=True, is_fused=True, is_tuned=True),
}
# Ours against its peers, as the last line prints them, on each device. The goal in bfloat16 is set
# against TRL as installed, in float32, which mixes two changes: like with like is beside it.
PAIRS = {
    "cpu": (
        ("trl", "ours"), ("trl_tuned", "ours"), ("trl", "ours_fused"), ("trl_tuned", "ours_fused"),
        ("trl_fused", "ours_fused"), ("trl", "ours_bf16"), ("trl", "ours_bf16_fused"),
        ("trl_bf16", "ours_bf16"), ("trl_bf16", "ours_bf16_fused"),
        ("trl_bf16_fused", "ours_bf16_fused"),
    ),
    "cuda": (
        ("trl_bf16", "ours_bf16"), ("trl_bf16", "ours_bf16_fused"),
        ("trl_bf16_fused", "ours_bf16_fused"),
    ),
}  # fmt: skip


def now(device: str) -> float:
    """Processor seconds on a CPU, wall seconds of finished work on CUDA."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_gb(device: str) -> float:
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return torch.cuda.max_memory_allocated() / 2**30


def run_arm(arm: str, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One arm in its own process; what went wrong is a result too."""
    is_ours = arm.startswith("ours")
    python = sys.executable if is_ours else given.peer_python
    command = [python, __file__, "--arm", arm, "--work", str(folder), "--item", given.item]
    steps = given.steps if is_ours or given.device == "cpu" else 1  # there one takes half a minute
    command += ["--device", given.device, "--steps", str(steps)]
    if given.core is not None:
        command = ["taskset", "-c", str(given.core), *command]
    env = dict(os.environ if is_ours or arm == "trl" else FAST)
    root = str(Path(__file__).resolve().parents[1])
    env |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    if arm != "trl":  # as it is installed: without our folder in its path
        env["PYTHONPATH"] = root
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"failed": last[:300]}
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return found | {"process_wall_s": round(time.perf_counter() - began, 2)}


def step(item: Item, given: argparse.Namespace, folder: Path, report: dict[str, Any]) -> None:
    """All arms in turn, `loops` times; ratios of medians with the worst and the best pairing."""
    arms = [arm for arm in given.arms if given.peer_python or arm.startswith("ours")]
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for loop in range(given.loops):
        for arm in arms if loop % 2 == 0 else arms[::-1]:
            found[arm].append(run_arm(arm, given, folder))
            report["arms"] = found
            save(report, given.out)
            print(f"loop {loop} {arm:15s} {json.dumps(found[arm][-1])[:150]}", flush=True)


def seconds_of(report: dict[str, Any], arm: str) -> list[float]:
    """The median step of each loop of an arm that worked."""
    loops = report.get("arms", {}).get(arm, [])
    return [statistics.median(loop["phases"]["step"]) for loop in loops if "phases" in loop]


def ratio(report: dict[str, Any], peer: str, ours: str) -> str:
    a, b = seconds_of(report, peer), seconds_of(report, ours)
    middle = statistics.median(a) / statistics.median(b)
    return f"{middle:.2f} ({min(a) / max(b):.2f}-{max(a) / min(b):.2f})"


def last_lines(item: Item, report: dict[str, Any]) -> list[str]:
    """What the script is for: the distance to the floor and to TRL."""
    is_cuda, rates = report["device"] == "cuda", report.get("ceilings")
    arm = "ours_bf16_fused" if is_cuda else "ours"
    loops = [loop["phases"] for loop in report.get("arms", {}).get(arm, []) if "phases" in loop]
    lines = ["RATIO not measured"]
    if loops and isinstance(rates, dict):
        gflops = rates["bfloat16_gflops" if is_cuda else "float32_gflops"]
        floors = item.floors(gflops, rates["copy_gb_s"], is_cuda)
        measured = {p: statistics.median(x for loop in loops for x in loop[p]) for p in floors}
        shares = "  ".join(f"{phase} {measured[phase] / floors[phase]:.2f}" for phase in floors)
        total = f"(floor {floors['step']:.2f} s, measured {measured['step']:.2f} s)"
        lines = [f"RATIO {shares}  {total}"]
    arms = {arm for arm in report.get("arms", {}) if seconds_of(report, arm)}
    pairs = [(peer, ours) for peer, ours in PAIRS[report["device"]] if {peer, ours} <= arms]
    found = "; ".join(f"{peer} over {ours} {ratio(report, peer, ours)}" for peer, ours in pairs)
    found = found or "not measured"
    return [*lines, f"SPEEDUP vs TRL 1.16.0, same shapes, machine and run: {found}"]


def ceilings(item: Item, given: argparse.Namespace, folder: Path, report: dict[str, Any]) -> None:
    """The rates that floors are made of: large products, and a copy."""
    from minigrpo.runs import set_matmul_precision, slow_bfloat16

    device, large = given.device, 1024 if given.device == "cpu" else 8192
    set_matmul_precision("auto", torch.device(device))
    rates: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        is_slow = dtype == torch.bfloat16 and slow_bfloat16("bfloat16", torch.device(device))
        size = 256 if is_slow else large  # or half a minute goes by
        a = torch.randn(size, size, device=device, dtype=dtype)
        seconds = quickest(lambda a=a: a @ a, device)  # type: ignore[misc]
        rates[f"{str(dtype).removeprefix('torch.')}_gflops"] = round(2e-9 * size**3 / seconds, 1)
    source = torch.empty(2**24 if device == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    rates["copy_gb_s"] = round(
        8e-9 * source.numel() / quickest(lambda: target.copy_(source), device), 1
    )
    if device == "cuda":
        for rows in (512, 1024):
            for n, k in ((item.width, item.mlp_width), (2 * item.mlp_width, item.width)):
                x = torch.randn(rows, k, device=device, dtype=torch.bfloat16)
                w = torch.randn(n, k, device=device, dtype=torch.bfloat16)
                seconds = replayed(lambda x=x, w=w: F.linear(x, w))  # type: ignore[misc]
                rates[f"gemm_{rows}x{k}x{n}_us"] = round(1e6 * seconds, 1)
    report["ceilings"] = rates


def quickest(work: Callable[[], object], device: str, rounds: int = 5, repeats: int = 3) -> float:
    """Least seconds of one call after a warm-up."""
    work()
    times = []
    for _ in range(rounds):
        began = now(device)
        for _ in range(repeats):
            work()
        times.append((now(device) - began) / repeats)
    return min(times)


def replayed(work: Callable[[], object]) -> float:
    """CUDA: seconds of one call in a recorded graph of ten, so without the host's launches."""
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            work()
    return quickest(graph.replay, "cuda") / 10


def correct(item: Item, given: argparse.Namespace, folder: Path, report: dict[str, Any]) -> None:
    """Logits, log-probs and gradients equal transformers'; drawn tokens fit the softmax."""
    from transformers import AutoModelForCausalLM

    from minigrpo.hugging_face import load_transformer, to_hugging_face
    from minigrpo.policy import ActingPolicy
    from minigrpo.sampling import StopRule, sample_completions
    from minigrpo.scoring import completion_scores
    from minigrpo.transformer import logits

    torch.set_float32_matmul_precision("highest")
    ours = load_transformer(folder).to(given.device)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(given.device)
    prompts = torch.tensor(json.loads((folder / "prompts.json").read_text()), device=given.device)[
        :4
    ]
    tokens = prompts.roll(1, 0)
    whole = torch.cat([prompts, tokens], dim=1)
    mask = torch.ones_like(prompts, dtype=torch.bool)
    found = {}
    with torch.no_grad():
        a, b = ours(whole, None, None, logits), theirs(whole).logits
    found["logits"] = float((a - b).abs().max() / b.abs().max())
    mine = completion_scores(ours, prompts, mask, tokens, None, 1.0).logprobs
    full = F.log_softmax(theirs(whole).logits[:, prompts.shape[1] - 1 : -1], dim=-1)
    other = full.gather(-1, tokens[..., None])[..., 0]
    found["logprobs"] = float((mine - other).detach().abs().max())
    mine.mean().backward()
    other.mean().backward()
    gradients = dict(to_hugging_face({n: p.grad for n, p in ours.named_parameters()}, ours.config))
    errors = [
        float((gradients[name] - p.grad).abs().max() / p.grad.abs().max().clamp(min=1e-12))
        for name, p in theirs.named_parameters()
        if name in gradients and p.grad.abs().max() > 1e-7
    ]
    found["gradients"] = max(errors)
    count = 4096
    done = sample_completions(
        ours, prompts[:1], mask[:1], count, ActingPolicy(1.0, 1.0), StopRule((), 0, 1),
        torch.rand(count, 1, generator=torch.Generator().manual_seed(3)).to(given.device),
    )  # fmt: skip
    with torch.no_grad():
        p = F.softmax(theirs(prompts[:1]).logits[0, -1].double(), dim=-1)
    seen = torch.bincount(done.tokens.flatten(), minlength=len(p)).double()
    freq = p * count >= 5  # the rest is one class, as the test asks
    joint = [torch.cat([x[freq], x[~freq].sum()[None]]) for x in (seen, p * count)]
    degrees = len(joint[0]) - 1
    statistic = float(((joint[0] - joint[1]) ** 2 / joint[1].clamp(min=1e-9)).sum())
    found["chi_square_z"] = (statistic - degrees) / (2 * max(1, degrees)) ** 0.5
    limits = {"logits": 1e-5, "logprobs": 1e-4, "gradients": 1e-3, "chi_square_z": 4.0}
    report["correct"] = found
    wrong = [name for name, limit in limits.items() if not found[name] <= limit]
    if wrong:
        raise SystemExit(f"not equal: {', '.join(wrong)} of {found}: nothing was timed")


def simulator(item: Item, given: argparse.Namespace, folder: Path, report: dict[str, Any]) -> None:
    """Environment steps a second: float32, violations counted, the trajectory written."""
    from minigrpo.double_integrator import DoubleIntegrator
    from minigrpo.runs import keep_freed_memory

    keep_freed_memory()
    plant, rates = DoubleIntegrator(), {}
    for rows in (512, 65_536) if given.device == "cpu" else (512, 65_536, 1_048_576, 4_194_304):
        starts = torch.rand(rows, 2, device=given.device) - 0.5
        controls = torch.randn(plant.horizon, rows, device=given.device)
        for name, u in (("time_major", controls.T), ("row_major", controls.T.contiguous())):
            seconds = quickest(lambda s=starts, u=u: plant.simulate(s, u), given.device)  # type: ignore[misc]
            rates[f"{rows}_{name}_steps_per_s"] = round(rows * plant.horizon / seconds)
    report["simulator"] = rates


def parts(item: Item, given: argparse.Namespace, folder: Path, report: dict[str, Any]) -> None:
    """Milliseconds of the pieces that are optimised, beside what they replaced."""
    from minigrpo.double_integrator import DoubleIntegrator
    from minigrpo.policy import ActingPolicy, nucleus
    from minigrpo.prompts import Codec, parse_controls, render_controls
    from minigrpo.runs import keep_freed_memory, set_matmul_precision
    from minigrpo.transformer import attend

    keep_freed_memory()
    set_matmul_precision("auto", torch.device(given.device))
    q, k, v = (torch.randn(128, 2, 54, 32, requires_grad=True) for _ in range(3))
    causal = torch.zeros(1, 1, 54, 54).masked_fill(~torch.ones(54, 54).tril().bool(), -torch.inf)
    fused = F.scaled_dot_product_attention
    torch.testing.assert_close(
        attend(q, k, v, causal), fused(q, k, v, is_causal=True), rtol=1e-4, atol=1e-4
    )
    one = torch.randn(512, 2, 1, 32)
    cache, beyond = torch.randn(2, 512, 2, 32, 32), torch.zeros(1, 1, 1, 32)  # as in `KVCache`
    beyond[..., 30:] = -torch.inf
    with_gaps = torch.randn(2, 512, 2, 56, 32)[:, :, :, :30]
    with_gaps[:] = cache[:, :, :, :30]
    torch.testing.assert_close(
        attend(one, *cache, beyond), fused(one, *with_gaps), rtol=1e-4, atol=1e-4
    )
    z, acting, sorted_z = torch.randn(512, 607), ActingPolicy(1.5, 0.9, 32), ActingPolicy(1.0, 1.0)
    plant, codec = DoubleIntegrator(), Codec()
    texts = [render_controls(3 * torch.rand(50) - 1.5, codec) for _ in range(1024)]
    ended = torch.ones(len(texts), dtype=torch.bool)
    arms: dict[str, Callable[[], object]] = {
        "attention, training, 128 x 54 tokens": lambda: attend(q, k, v, causal).sum().backward(),
        "  by scaled_dot_product_attention": lambda: (
            fused(q, k, v, is_causal=True).sum().backward()
        ),
        "attention, decoding, 512 rows, 30 tokens": lambda: attend(one, *cache, beyond),
        "  with room for 56 tokens in the cache": lambda: attend(one, *with_gaps, None),
        "  that by scaled_dot_product_attention": lambda: fused(one, *with_gaps),
        "nucleus of 512 rows, support 32": lambda: nucleus(z, acting),
        "  by a sort of the vocabulary": lambda: torch.sort(
            z, dim=-1, descending=True, stable=True
        ),
        "log-softmax of 512 rows, untruncated": lambda: nucleus(z, sorted_z),
        "reading 1024 texts of 50 numbers": lambda: parse_controls(texts, ended, plant, codec),
    }
    report["parts"] = {name: round(1e3 * quickest(work, "cpu"), 2) for name, work in arms.items()}


def scaling(item: Item, given: argparse.Namespace, folder: Path, report: dict[str, Any]) -> None:
    """Seconds and memory of a step, top-p 0.9, support stored, micro-batches of 128 rows."""
    table = {}
    for name in SCALED:
        with tempfile.TemporaryDirectory() as work:
            write_work(ITEMS[f"scale {name}"], Path(work))
            wanted = argparse.Namespace(**{**vars(given), "item": f"scale {name}", "steps": 2})
            found = run_arm("ours", wanted, Path(work))
        if "phases" in found:
            step_s = statistics.median(found["phases"]["step"])
            memory_mb = 1024 * (found["peak_gb"] - found["before_gb"])
            found = {"step_s": round(step_s, 3), "memory_mb": round(memory_mb)}
        table[name] = found
        print(f"  {name:18s} {found}", flush=True)
    report["scaling"] = table


def attend_by(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of one token in other ways than `attend`: q [B, H, 1, D], k and v [B, J, K, D]."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    folded = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # [B, J, G, D]
    if name == "products":
        return (folded @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(-1) @ v
    if name == "gqa":
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    with sdpa_kernel(getattr(SDPBackend, name)):
        return F.scaled_dot_product_attention(folded, k, v)


def decode(item: Item, given: argparse.Namespace, folder: Path, report: dict[str, Any]) -> None:
    """CUDA: attention of one new token a layer, and samplers: ms, share of the copy rate."""
    from minigrpo.policy import ActingPolicy, draw, nucleus
    from minigrpo.untruncated import draw_untruncated

    size, found = item.width // item.num_heads, {}
    copy = report.get("ceilings", {}).get("copy_gb_s", float("nan"))
    for rows in (512, 1024):
        for context in (64, 320, 600):
            q = torch.randn(rows, item.num_heads, 1, size, device="cuda", dtype=torch.bfloat16)
            shape = (2, context, rows, item.num_kv_heads, size)
            cache = torch.randn(shape, device="cuda", dtype=torch.bfloat16).permute(0, 2, 3, 1, 4)
            gb = 2e-9 * cache.numel()
            ways = ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "products", "gqa"]
            for name, kv in (("time-major", cache), ("batch-major", cache.contiguous())):
                for way in ways:
                    key = f"{rows} rows, context {context}, {name}, {way}"
                    try:
                        seconds = replayed(lambda q=q, kv=kv, way=way: attend_by(way, q, *kv))  # type: ignore[misc]
                    except RuntimeError as error:
                        found[key] = {"failed": str(error)[:80]}
                        continue
                    share = gb / seconds / copy
                    found[key] = {"ms": round(1e3 * seconds, 3), "of_copy_rate": round(share, 3)}
        z, u = torch.randn(rows, item.vocab_size, device="cuda"), torch.rand(rows, device="cuda")
        acting = ActingPolicy(1.0, 0.9, 128)
        samplers: dict[float, Callable[[], object]] = {  # those that `sampling` has for such a V
            1.0: lambda z=z, u=u: draw_untruncated(z, 1.0, u, False),  # type: ignore[misc]
            0.9: lambda z=z, u=u, acting=acting: draw(nucleus(z, acting), u),  # type: ignore[misc]
        }
        for top_p, sampler in samplers.items():
            found[f"{rows} rows, sampler, top_p {top_p}"] = {
                "ms": round(1e3 * replayed(sampler), 3)
            }
    report["decode"] = found


def rollout(item: Item, given: argparse.Namespace, folder: Path, report: dict[str, Any]) -> None:
    """CUDA: our rollout and that of transformers' generate, seconds and tokens a second."""
    from transformers import AutoModelForCausalLM

    from minigrpo import sampling
    from minigrpo.hugging_face import load_transformer
    from minigrpo.policy import ActingPolicy
    from minigrpo.sampling import Completions, StopRule, sample_completions

    prompts = torch.tensor(json.loads((folder / "prompts.json").read_text()), device="cuda")
    mask, rows = torch.ones_like(prompts, dtype=torch.bool), item.num_prompts * item.group_size
    uniforms, tokens = torch.rand(rows, item.length, device="cuda"), rows * item.length
    ours, stop = load_transformer(folder).cuda(), StopRule((), 0, item.length)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda()
    whole = prompts.repeat_interleave(item.group_size, 0)

    def sample(top_p: float, is_fused: bool = False) -> Completions:
        ours.is_fused = is_fused
        acting = ActingPolicy(1.0, top_p)
        with torch.autocast("cuda", torch.bfloat16):
            return sample_completions(ours, prompts, mask, item.group_size, acting, stop, uniforms)

    arms: dict[str, Callable[[], object]] = {
        "ours, graphs": lambda: sample(1.0),
        "ours, graphs, top_p 0.9": lambda: sample(0.9),
        "ours, graphs, fused": lambda: sample(1.0, True),
        "ours, eager": lambda: sample(1.0),
        "generate": lambda: theirs.generate(
            whole, attention_mask=torch.ones_like(whole), do_sample=True, top_k=0, top_p=1.0,
            min_new_tokens=item.length, max_new_tokens=item.length, pad_token_id=0,
        ),
    }  # fmt: skip
    found = {}
    tokens_of = {}
    for name, work in arms.items():
        sampling._KEPT.clear()
        has_graphs = sampling.has_graphs
        if "eager" in name:
            sampling.has_graphs = lambda *_: False
        torch.cuda.reset_peak_memory_stats()
        began = now("cuda")
        done = work()
        first = now("cuda") - began
        # Compiling is over after a first one, recording after the warm-up of `quickest`.
        seconds = quickest(work, "cuda", rounds=1, repeats=1) if "graphs" in name else first
        sampling.has_graphs = has_graphs
        if isinstance(done, Completions):
            tokens_of[name] = done.tokens
        found[name] = {
            "s": round(seconds, 3),
            "first_s": round(first, 1),
            "tokens_per_s": round(tokens / seconds),
            "peak_gb": round(peak_gb("cuda"), 2),
        }
    same = (tokens_of["ours, graphs"] == tokens_of["ours, eager"]).all(dim=1).double().mean()
    found["rows_equal_with_and_without_graphs"] = float(same)
    report["rollout"] = found


def train(item: Item, given: argparse.Namespace, folder: Path, report: dict[str, Any]) -> None:
    """CUDA: forward and backward by micro-batch, plain and compiled a block at a time."""
    from minigrpo.hugging_face import load_transformer
    from minigrpo.scoring import completion_scores

    rate = report.get("ceilings", {}).get("bfloat16_gflops", float("nan"))
    found = {}
    for is_compiled in (False, True):
        model = load_transformer(folder).cuda()
        model.is_fused = is_compiled
        for rows in (32, 64):
            shape = (rows // item.group_size, item.prompt_length)
            prompts = torch.randint(item.vocab_size, shape, device="cuda")
            tokens = torch.randint(item.vocab_size, (rows, item.length), device="cuda")
            mask = torch.ones_like(prompts, dtype=torch.bool)

            def work(p: Any = prompts, m: Any = mask, t: Any = tokens) -> None:
                with torch.autocast("cuda", torch.bfloat16):
                    scores = completion_scores(model, p, m, t, None, 1.0)  # noqa: B023
                scores.logprobs.sum().backward()

            name = f"{rows} rows, {'fused' if is_compiled else 'plain'}"
            try:
                torch.cuda.reset_peak_memory_stats()
                model.zero_grad(set_to_none=True)
                began = now("cuda")
                work()
                first = now("cuda") - began
                seconds = quickest(work, "cuda", rounds=3, repeats=1)
            except torch.cuda.OutOfMemoryError:
                found[name] = {"failed": "out of memory"}
                break
            gflop = 3 * item.scored_gflop(len(prompts), rows)
            found[name] = {
                "s": round(seconds, 3),
                "first_s": round(first, 1),
                "of_ceiling": round(gflop / seconds / rate, 3),
                "peak_gb": round(peak_gb("cuda"), 1),
            }
    report["train"] = found


SECTIONS: dict[str, Callable[[Item, argparse.Namespace, Path, dict[str, Any]], None]] = {
    "correct": correct, "ceilings": ceilings, "step": step, "simulator": simulator,
    "parts": parts, "scaling": scaling, "decode": decode, "rollout": rollout, "train": train,
}  # fmt: skip
DEFAULT_ARMS = {
    "cpu": "ours,ours_bf16,trl,trl_tuned,trl_bf16",
    "cuda": "ours_bf16,ours_bf16_fused,trl_bf16",
}
DEFAULT = {
    "cpu": "correct,ceilings,step,simulator",
    "cuda": "ceilings,correct,decode,rollout,train,step,simulator",
}


def save(report: dict[str, Any], out: str) -> None:
    if out:
        Path(out).write_text(json.dumps(report, indent=1) + "\n")


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--item", choices=tuple(ITEMS), default=None)
    parser.add_argument("--sections", default="")
    parser.add_argument("--loops", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--core", type=int, default=None, help="pin every arm to this core")
    parser.add_argument(
        "--peer-python", default="", help="an interpreter that has trl; empty: not measured"
    )
    parser.add_argument(
        "--arms",
        default="",
        help=f"only these, with commas, of {', '.join(ARMS)} (default on a CPU: "
        f"{DEFAULT_ARMS['cpu']}; on CUDA: {DEFAULT_ARMS['cuda']}); a fused one compiles first",
    )
    parser.add_argument("--budget-s", type=float, default=3600.0)
    parser.add_argument("--out", default="")
    parser.add_argument("--arm", choices=tuple(ARMS), help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    parser = flags()
    given = parser.parse_args()
    given.item = given.item or ("tiny" if given.device == "cpu" else "gpu-ref")
    item = ITEMS[given.item]
    are_chosen = bool(given.arms)
    given.arms = (given.arms or DEFAULT_ARMS[given.device]).split(",")
    if unknown := set(given.arms) - set(ARMS):
        parser.error(f"--arms must be of {', '.join(ARMS)}, got {', '.join(sorted(unknown))}")
    sections = (given.sections or DEFAULT[given.device]).split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"--sections must be of {', '.join(SECTIONS)}, got {', '.join(unknown)}")
    if min(given.steps, given.loops) < 1:
        parser.error("--steps and --loops must be at least 1")
    if not Path(given.out).resolve().parent.is_dir():
        parser.error(f"--out must be a file in a folder that is there, got {given.out}")
    if given.device == "cpu":
        torch.set_num_threads(1)
    if given.arm:
        print(
            "RESULT", json.dumps(ARMS[given.arm](item, Path(given.work), given.steps, given.device))
        )
        return
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here")
    from minigrpo.runs import slow_bfloat16

    if not are_chosen and slow_bfloat16("bfloat16", torch.device(given.device)):
        given.arms = [arm for arm in given.arms if "bf16" not in arm]
        print("bfloat16 is computed in software here: its arms are left out unless --arms has them")
    if given.core is not None and hasattr(os, "sched_setaffinity"):
        if given.core not in os.sched_getaffinity(0):
            parser.error(f"--core must be one of {sorted(os.sched_getaffinity(0))}")
        os.sched_setaffinity(0, {given.core})
    gpu = torch.cuda.get_device_name() if given.device == "cuda" else ""
    report: dict[str, Any] = {
        "item": given.item, "device": given.device, "hardware": gpu or platform.machine(),
        "torch": torch.__version__, "threads": torch.get_num_threads(), "steps": given.steps,
    }  # fmt: skip
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        write_work(item, Path(name))
        for section in sections:
            if time.perf_counter() - began > given.budget_s:
                report[section] = "skipped: --budget-s is spent"
                continue
            try:
                SECTIONS[section](item, given, Path(name), report)
            except (RuntimeError, ImportError) as error:  # one section must not cost the others
                report[section] = f"failed: {error}"
            if given.device == "cuda":
                torch.cuda.empty_cache()
            print(section, json.dumps(report.get(section, "")), flush=True)
            save(report, given.out)
    report["last_lines"] = last_lines(item, report)
    save(report, given.out)
    print(*report["last_lines"], sep="\n")


if __name__ == "__main__":
    main()
