"""Speed of a GRPO step against its floor and against TRL 1.16.0, checked for equality first.

    python benchmarks/bench.py                                          tiny, about a minute
    python benchmarks/bench.py --peer-python .venv-trl/bin/python       the same with TRL
    python benchmarks/bench.py --item cpu-256 --loops 3 --core 0 --peer-python ... --out x.json
    python benchmarks/bench.py --sections parts,simulator,scaling       what each piece costs
    python benchmarks/bench.py --device cuda --sections ceilings,decode --budget-s 560

Sections, CPU: correct step parts simulator scaling; CUDA: ceilings decode rollout train correct step
simulator. Arms run in turn, a process each, from one folder of weights and prompts. On a CPU the
clock is that of the processor, one thread: it does not count other people's work. Equal in all arms:
weights, prompts, group, lengths (no end token), kl_beta 0.01, top_p 1, one update a rollout, no
gradient checkpointing. Ours has neither a tokenizer nor metrics in its step.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F

FAST = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
WARM_UP = 1


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
    micro_batch: int = 128

    @property
    def num_matrix_parameters(self) -> int:
        """Weights that multiply every token, the head included."""
        head = self.width // self.num_heads
        attention = self.width * head * (2 * self.num_heads + 2 * self.num_kv_heads)
        layer = attention + 3 * self.width * self.mlp_width
        return self.num_layers * layer + self.width * self.vocab_size

    def gflop(self) -> float:
        """Products of a step: prefill once a group, decode, reference, forward, backward (x2)."""
        rows = self.num_prompts * self.group_size
        decode, prefill = rows * self.length, self.num_prompts * self.prompt_length
        scored = rows * (self.prompt_length + self.length)
        return 2e-9 * self.num_matrix_parameters * (prefill + decode + 4 * scored)


ITEMS = {
    "tiny": Item(128, 512, 4, 4, 4, 700, 4, 8, 12, 51),
    "cpu-128": Item(128, 512, 4, 4, 4, 700, 8, 16, 12, 51),
    "cpu-256": Item(256, 1024, 4, 4, 4, 700, 8, 16, 12, 51),
    "gpu-ref": Item(896, 4864, 24, 14, 2, 151_936, 32, 16, 150, 350, 16),
}


def write_work(item: Item, folder: Path) -> None:
    """Weights (logits spread over 1 nat, not flat), prompts and a tokenizer of one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from minigrpo.transformer import Transformer, TransformerConfig, initialise, save_transformer

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


def our_arm(item: Item, folder: Path, steps: int, is_mixed: bool, device: str) -> dict[str, Any]:
    """GRPO steps out of minigrpo's own pieces: seconds of each, and by phase."""
    from minigrpo.grpo import group_advantages, grpo_loss, loss_denominator
    from minigrpo.optim import adamw
    from minigrpo.policy import ActingPolicy, completion_scores
    from minigrpo.runs import keep_freed_memory
    from minigrpo.sampling import StopRule, sample_completions
    from minigrpo.transformer import load_transformer

    keep_freed_memory()
    torch.set_float32_matmul_precision("medium" if device == "cpu" else "high")
    model, reference = (load_transformer(folder).to(device) for _ in range(2))
    prompts = torch.tensor(json.loads((folder / "prompts.json").read_text()), device=device)
    mask, acting = torch.ones_like(prompts, dtype=torch.bool), ActingPolicy(1.0, 1.0)
    optimizer = adamw(model, 1e-6, (0.9, 0.999), 0.0)
    tokens, masks = (x.repeat_interleave(item.group_size, 0) for x in (prompts, mask))
    rows = len(tokens)
    phases: dict[str, list[float]] = {"rollout": [], "reference": [], "update": [], "step": []}

    for step in range(WARM_UP + steps):
        generator = torch.Generator().manual_seed(step)
        uniforms = torch.rand(rows, item.length, generator=generator).to(device)
        stamps = [now(device)]
        with torch.autocast(device, torch.bfloat16, enabled=is_mixed):
            done = sample_completions(
                model, prompts, mask, item.group_size, acting, StopRule((), 0, item.length), uniforms
            )
        rewards = torch.tensor(reward_of(done.tokens.tolist()), dtype=torch.float64)
        advantages = group_advantages(rewards, item.group_size, "group").to(device)
        stamps.append(now(device))
        chunks = torch.split(torch.arange(rows, device=device), item.micro_batch)
        with torch.autocast(device, torch.bfloat16, enabled=is_mixed), torch.no_grad():
            kept = [
                completion_scores(reference, tokens[c], masks[c], done.tokens[c], None, 1.0).logprobs
                for c in chunks
            ]
        stamps.append(now(device))
        denominator = loss_denominator(done.mask, "dapo", item.length)
        for chosen, ref in zip(chunks, kept, strict=True):
            with torch.autocast(device, torch.bfloat16, enabled=is_mixed):
                scores = completion_scores(
                    model, tokens[chosen], masks[chosen], done.tokens[chosen], None, 1.0
                )
            loss, _ = grpo_loss(
                scores.logprobs, None, ref, done.mask[chosen], advantages[chosen], denominator,
                0.2, 0.2, 0.01, "dapo",
            )  # fmt: skip
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        stamps.append(now(device))
        if step >= WARM_UP:
            pieces = [b - a for a, b in zip(stamps, stamps[1:], strict=False)]
            for values, seconds in zip(phases.values(), [*pieces, stamps[-1] - stamps[0]], strict=True):
                values.append(seconds)
    return {"phases": phases, "peak_gb": peak_gb(device)}


def trl_arm(item: Item, folder: Path, steps: int, is_mixed: bool, is_tuned: bool, device: str) -> dict[str, Any]:
    """The same steps by TRL's GRPOTrainer."""
    datasets, trl, transformers = map(importlib.import_module, ("datasets", "trl", "transformers"))
    if is_tuned:
        torch.set_float32_matmul_precision("medium")
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
    config = trl.GRPOConfig(
        output_dir=str(folder / "trl"), use_cpu=device == "cpu", bf16=is_mixed, tf32=None,
        gradient_checkpointing=False, per_device_train_batch_size=min(rows, item.micro_batch),
        gradient_accumulation_steps=max(1, rows // item.micro_batch),
        num_generations=item.group_size, max_completion_length=item.length, beta=0.01,
        temperature=1.0, top_p=1.0, top_k=0, loss_type="dapo", learning_rate=1e-6,
        max_steps=WARM_UP + steps, max_grad_norm=1.0, save_strategy="no", report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False, logging_strategy="no", shuffle_dataset=False,
        generation_kwargs={"min_new_tokens": item.length},
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=str(folder), reward_funcs=reward, args=config, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict({"prompt": texts * (WARM_UP + steps)}),
        callbacks=[Watch()],
    )  # fmt: skip
    trainer.train()
    seconds = [b - a for a, b in zip(stamps[::2], stamps[1::2], strict=True)]
    assert len(seconds) == WARM_UP + steps
    return {"phases": {"step": seconds[WARM_UP:]}, "peak_gb": peak_gb(device)}


ARMS: dict[str, Callable[[Item, Path, int, str], dict[str, Any]]] = {
    "ours": lambda item, folder, steps, device: our_arm(item, folder, steps, False, device),
    "ours_bf16": lambda item, folder, steps, device: our_arm(item, folder, steps, True, device),
    "trl": lambda item, folder, steps, device: trl_arm(item, folder, steps, False, False, device),
    "trl_tuned": lambda item, folder, steps, device: trl_arm(item, folder, steps, False, True, device),
    "trl_bf16": lambda item, folder, steps, device: trl_arm(item, folder, steps, True, True, device),
}


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
    command += ["--device", given.device, "--steps", str(given.steps)]
    if given.core is not None:
        command = ["taskset", "-c", str(given.core), *command]
    env = dict(FAST if arm in ("trl_tuned", "trl_bf16") else os.environ)
    root = str(Path(__file__).resolve().parents[1])
    env |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"} | ({"PYTHONPATH": root} if is_ours else {})
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
    arms = ["ours", "ours_bf16"]
    if given.peer_python:
        arms += ["trl", "trl_tuned", "trl_bf16"]
    arms = [arm for arm in arms if not given.arms or arm in given.arms.split(",")]
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for loop in range(given.loops):
        for arm in arms if loop % 2 == 0 else arms[::-1]:
            found[arm].append(run_arm(arm, given, folder))
            report["arms"] = found
            save(report, given.out)
            print(f"loop {loop} {arm:10s} {json.dumps(found[arm][-1])[:150]}", flush=True)


def seconds_of(report: dict[str, Any], arm: str) -> list[float]:
    """The median step of each loop of an arm that worked."""
    loops = report.get("arms", {}).get(arm, [])
    return [statistics.median(loop["phases"]["step"]) for loop in loops if "phases" in loop]


def ratio(report: dict[str, Any], peer: str, ours: str) -> str:
    a, b = seconds_of(report, peer), seconds_of(report, ours)
    if not a or not b:
        return "not measured"
    return f"{statistics.median(a) / statistics.median(b):.2f} ({min(a) / max(b):.2f}-{max(a) / min(b):.2f})"


def last_lines(item: Item, report: dict[str, Any]) -> list[str]:
    """What the script is for: the distance to the floor and to TRL."""
    lines, ours = [], seconds_of(report, "ours")
    rate = report.get("ceilings", {}).get("float32_gflops" if report["device"] == "cpu" else "bfloat16_gflops")
    if ours and rate:
        floor, measured = item.gflop() / rate, statistics.median(ours)
        lines.append(f"RATIO step {measured / floor:.2f}  (floor {floor:.2f} s, measured {measured:.2f} s)")
    else:
        lines.append("RATIO not measured")
    lines.append(
        f"SPEEDUP vs TRL 1.16.0 as installed {ratio(report, 'trl', 'ours')}, tuned "
        f"{ratio(report, 'trl_tuned', 'ours')}, both bf16 {ratio(report, 'trl_bf16', 'ours_bf16')}"
        "  (same shapes, machine and run)"
    )
    return lines


def ceilings(item: Item, given: argparse.Namespace, folder: Path, report: dict[str, Any]) -> None:
    """The rates that floors are made of: large products, and a copy."""
    device, size = given.device, 1024 if given.device == "cpu" else 8192
    torch.set_float32_matmul_precision("medium")
    rates: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(size, size, device=device, dtype=dtype)
        seconds = quickest(lambda a=a: a @ a, device)  # type: ignore[misc]
        rates[f"{str(dtype).removeprefix('torch.')}_gflops"] = round(2e-9 * size**3 / seconds, 1)
    source = torch.empty(2**24 if device == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    rates["copy_gb_s"] = round(8e-9 * source.numel() / quickest(lambda: target.copy_(source), device), 1)
    if device == "cuda":
        for rows in (512, 1024):
            for n, k in ((item.width, item.mlp_width), (2 * item.mlp_width, item.width)):
                x = torch.randn(rows, k, device=device, dtype=torch.bfloat16)
                w = torch.randn(n, k, device=device, dtype=torch.bfloat16)
                rates[f"gemm_{rows}x{k}x{n}_us"] = round(1e6 * quickest(lambda x=x, w=w: F.linear(x, w), device), 1)  # type: ignore[misc]
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


def correct(item: Item, given: argparse.Namespace, folder: Path, report: dict[str, Any]) -> None:
    """Logits, log-probs and gradients equal transformers'; drawn tokens fit the softmax."""
    from transformers import AutoModelForCausalLM

    from minigrpo.policy import ActingPolicy, completion_scores
    from minigrpo.sampling import StopRule, sample_completions
    from minigrpo.transformer import load_transformer, logits, to_hugging_face

    torch.set_float32_matmul_precision("highest")
    ours = load_transformer(folder).to(given.device)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(given.device)
    prompts = torch.tensor(json.loads((folder / "prompts.json").read_text()), device=given.device)[:4]
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


SECTIONS: dict[str, Callable[[Item, argparse.Namespace, Path, dict[str, Any]], None]] = {
    "correct": correct,
    "ceilings": ceilings,
    "step": step,
    "simulator": simulator,
}
DEFAULT = {"cpu": "correct,ceilings,step,simulator", "cuda": "ceilings,correct,decode,rollout,train,step,simulator"}


def save(report: dict[str, Any], out: str) -> None:
    if out:
        Path(out).write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--item", choices=tuple(ITEMS), default=None)
    parser.add_argument("--sections", default="")
    parser.add_argument("--loops", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--core", type=int, default=None, help="pin every arm to this core")
    parser.add_argument("--peer-python", default="", help="an interpreter that has trl; empty: not measured")
    parser.add_argument("--arms", default="", help="only these, with commas")
    parser.add_argument("--budget-s", type=float, default=3600.0)
    parser.add_argument("--out", default="")
    parser.add_argument("--arm", choices=tuple(ARMS), help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.item = given.item or ("tiny" if given.device == "cpu" else "gpu-ref")
    item = ITEMS[given.item]
    if given.device == "cpu":
        torch.set_num_threads(1)
    if given.arm:
        print("RESULT", json.dumps(ARMS[given.arm](item, Path(given.work), given.steps, given.device)))
        return
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here")
    if given.core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {given.core})
    gpu = torch.cuda.get_device_name() if given.device == "cuda" else ""
    report: dict[str, Any] = {
        "item": given.item, "device": given.device, "hardware": gpu or platform.machine(),
        "torch": torch.__version__, "threads": torch.get_num_threads(), "steps": given.steps,
        "gflop_a_step": round(item.gflop(), 1),
    }  # fmt: skip
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        write_work(item, Path(name))
        for section in (given.sections or DEFAULT[given.device]).split(","):
            if time.perf_counter() - began > given.budget_s:
                report[section] = "skipped: --budget-s is spent"
                continue
            try:
                SECTIONS[section](item, given, Path(name), report)
            except (RuntimeError, ImportError) as error:  # one section must not cost the others
                report[section] = f"failed: {error}"
            print(section, json.dumps(report.get(section, "")), flush=True)
            save(report, given.out)
    report["last_lines"] = last_lines(item, report)
    save(report, given.out)
    print(*report["last_lines"], sep="\n")


if __name__ == "__main__":
    main()
