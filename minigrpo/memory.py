"""How much memory a run will take: a function of shapes, known before anything is allocated.

    model      weights, gradients and AdamW's two moments of what is trained, reference; for
               rollouts under autocast a copy of the weights as it casts them
    sampling   KV cache 2 layers J D (rows (L + C) + prompts L), logits [rows, V], prompts' prefill;
               4 bytes each, since validation is in float32. On a CPU the rows' cache has one layer
               more, for one is there twice while it grows, and comes after the prefill, of which
               only what exceeds it counts
    update     what the backward pass of a micro-batch keeps, a block or a chunk of logits at work
    peak       model + the larger of sampling and update, or on CUDA both: recorded graphs keep
               their tensors, of training and of two validations, and a float32 copy of the weights

A block keeps for each of its tokens, E width, H heads, J key-value heads, D head size, F MLP width:
4 E (both residual states and normed inputs) in float32, 2 E + 3 H D + 3 J D + 4 F (inputs of
products, q, k, v, gate, up), and H K attention weights for K keys, in the autocast's dtype; with
gradient checkpointing E. Where rows share a prompt (`transformer.SharedPrompts`) its tokens count
once, and q, k and v a second time: attention has copies of them, on CUDA of each row's whole
sequence. In float32 with grouped heads a GPU also keeps keys and values as repeated, 2 H D. It is
an upper bound, measured on a CPU at 1.0 to 1.5 times the truth for an update and for sampling
(tests/test_memory.py). Fused attention kernels (CUDA) keep no attention weights, so it is higher
there.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from minigrpo.config import GRPOConfig, RunSettings, SFTConfig, Value
from minigrpo.counterfactual import NUM_COLUMNS, rows_at_once
from minigrpo.data import Task, prompt_lengths
from minigrpo.distributed import local_world_size, max_over_ranks, world_size
from minigrpo.lora import add_adapters
from minigrpo.rollout import rows_per_prompt
from minigrpo.scoring import chunk_elements, shared_from
from minigrpo.transformer import Transformer, TransformerConfig

C = TypeVar("C", bound=RunSettings)
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
UNKNOWN = sys.maxsize  # bytes free
# Changes, each of which may make a run fit; settings that a command lacks or may not change are
# left out of them.
LESS_MEMORY: tuple[dict[str, Value], ...] = (
    {"micro_batch_size": 1},
    {"rows_per_batch": 16},
    {"gradient_checkpointing": True},
    {"kl_beta": 0.0},
    {"lora_rank": 16},
    {"parallel": "fsdp"},
    {
        "micro_batch_size": 1, "rows_per_batch": 16, "gradient_checkpointing": True,
        "lora_rank": 16,
    },
)  # fmt: skip
LIMITS = {  # of a control group, by its controller's name in version 2 and 1: folder, files
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


@dataclass(frozen=True)
class Workload:
    """What a run does with a model, on one rank; the rest is in its settings."""

    prompt_length: int
    completion_length: int
    micro_rows: int  # of a training forward
    num_decoded: int  # rows decoded together
    num_prefilled: int  # prompts of them
    rows_per_prompt: int = 1  # rows that share one in a training forward, where it is fed once
    num_rows: int = 0  # completions kept for the update; 0 in supervised training
    support_size: int = 0  # 0: untruncated
    has_reference: bool = False  # as a second copy
    is_perturbed: bool = False  # SFT under weight noise holds the weights without it
    is_on_cuda: bool = False  # where sampling keeps its tensors, unless the weights are sharded
    num_nodes: int = 0  # of the values of choices; 0: credit for completions
    num_simulated: int = 0  # rows whose choices are simulated together


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what they are for."""

    model: dict[str, int]
    sampling: dict[str, int]
    update: dict[str, int]
    has_graphs: bool = False

    @property
    def peak(self) -> int:
        phases = sum(self.sampling.values()), sum(self.update.values())
        return sum(self.model.values()) + (sum(phases) if self.has_graphs else max(phases))

    def table(self) -> str:
        """GiB of each phase and of its parts, a line each, as the trainers print it."""

        def line(name: str, parts: dict[str, int]) -> str:
            shown = (f"{part} {size / 2**30:.2f}" for part, size in parts.items() if size)
            return f"  {name:9s} {sum(parts.values()) / 2**30:8.2f}  {', '.join(shown)}"

        phases = ("model", "sampling", "update")
        return "\n".join(line(name, getattr(self, name)) for name in phases)


def sft_memory(
    shape: TransformerConfig, task: Task, config: SFTConfig, is_on_cuda: bool = False
) -> MemoryEstimate:
    """What a step and a validation of this run take on one rank."""
    decoded = min(config.eval_cases, config.rows_per_batch)
    work = Workload(
        prompt_length=max(prompt_lengths(task)),
        completion_length=task.max_completion_length,
        micro_rows=min(config.micro_batch_size, math.ceil(config.batch_size / world_size())),
        num_decoded=decoded,
        num_prefilled=decoded,
        is_perturbed=config.weight_noise > 0,
        is_on_cuda=is_on_cuda,
    )
    return memory_estimate(shape, config, work, world_size(), local_world_size())


def grpo_memory(
    shape: TransformerConfig, task: Task, config: GRPOConfig, is_on_cuda: bool = False
) -> MemoryEstimate:
    """What a rollout, its update and a validation take on one rank."""
    prompts = math.ceil(config.prompts_per_step / world_size())
    of_minibatch = min(prompts, math.ceil(config.prompts_per_step / config.num_minibatches))
    together = min(prompts, max(1, config.rows_per_batch // config.group_size))
    validated = min(config.eval_cases, config.rows_per_batch)
    num_rows, lengths = prompts * config.group_size, prompt_lengths(task)
    is_shared = len(lengths) == 1 and max(lengths) >= shared_from(is_on_cuda)
    work = Workload(
        prompt_length=max(lengths),
        completion_length=task.max_completion_length,
        micro_rows=min(config.micro_batch_size, config.group_size * of_minibatch),
        rows_per_prompt=rows_per_prompt(config) if is_shared else 1,
        num_decoded=max(validated, together * config.group_size),
        num_prefilled=max(validated, together),
        num_rows=num_rows,
        support_size=config.support_size if config.top_p < 1 else 0,
        num_nodes=NUM_COLUMNS if config.credit == "choice" else 0,
        num_simulated=min(num_rows, rows_at_once(is_on_cuda)),
        has_reference=config.kl_beta > 0 and not config.lora_rank,
        is_on_cuda=is_on_cuda,
    )
    return memory_estimate(shape, config, work, world_size(), local_world_size())


def memory_estimate(
    shape: TransformerConfig,
    config: RunSettings,
    work: Workload,
    num_ranks: int = 1,
    ranks_here: int = 1,
) -> MemoryEstimate:
    """The estimate for one of num_ranks ranks, ranks_here of them on this machine.

    With fsdp these share the model, sampling has it whole, and an update two blocks and the tables.
    """
    shards = ranks_here if config.parallel == "fsdp" else 1
    is_sharded = config.parallel == "fsdp" and num_ranks > 1
    has_graphs = work.is_on_cuda and not is_sharded
    flat = 2 if num_ranks > 1 and shards == 1 else 1  # reduce_gradients makes one vector of them
    weights, trained = (4 * count for count in _num_parameters(shape, config))
    tables = 4 * shape.vocab_size * shape.width * (1 if shape.tied_head else 2)
    half = config.precision == "bfloat16"
    narrow = 2 if half else 4
    cast = (weights // 2 + tables) * (half and work.num_rows > 0)  # validation is in float32
    length = work.prompt_length + work.completion_length
    kv = 2 * shape.num_layers * shape.num_kv_heads * shape.head_size * 4  # of one token
    prefilled = work.num_prefilled * work.prompt_length
    prefill = prefilled * _bytes_of_a_block(shape, work.prompt_length, 4)
    cache = kv * work.num_decoded * length
    if not work.is_on_cuda:
        cache += cache // shape.num_layers  # one layer twice, while it grows
        prefill = max(0, prefill - cache)
    tokens, copied = _tokens_of_a_micro_batch(work)
    block = tokens * _bytes_of_a_block(shape, length - 1, narrow)
    block += copied * narrow * shape.head_size * (shape.num_heads + 2 * shape.num_kv_heads)
    if work.is_on_cuda and not half and shape.num_heads > shape.num_kv_heads:
        block += max(tokens, copied) * narrow * 2 * shape.num_heads * shape.head_size
    kept = 4 * tokens * shape.width if config.gradient_checkpointing else block
    # The gradient of the head's table waits for the embedding's, if they are tied, and their sum.
    table = 0 if config.lora_rank else 4 * shape.vocab_size * shape.width
    column = work.micro_rows * shape.vocab_size  # logits of one position
    chunk = min(max(chunk_elements(work.is_on_cuda), column), column * work.completion_length)
    # At once: logits and gradients of those gathered; without a support also log q, in float32.
    logit = 4 * (narrow if work.support_size else 4)
    if work.num_nodes and work.support_size:  # probabilities of all tokens and their gradient
        logit += 2 * 4
    # Of one completion token: support, values of choices, log-probs, masks.
    row = 4 * (work.support_size + work.num_nodes) + (60 if work.num_nodes else 32)
    return MemoryEstimate(
        model={
            "weights": weights // shards,
            "gradients": flat * trained // shards,
            "AdamW": 2 * trained // shards,
            "reference": weights // shards if work.has_reference else 0,
            "held weights": weights // shards if work.is_perturbed else 0,
            "bfloat16 weights": weights // 2 if half else 0,
            # In float32 with recorded graphs; rollouts as autocast would cast them.
            "copied weights": 0 if is_sharded else weights * has_graphs + cast,
        },
        sampling={
            "KV cache": (cache + kv * prefilled) * (3 if has_graphs else 1),
            "logits": 5 * 4 * work.num_decoded * shape.vocab_size,
            "prefill": prefill,
            "support": 2 * work.num_rows * work.completion_length * row,
            "gathered weights": weights if shards > 1 else 0,
        },
        update={
            "activations": shape.num_layers * kept,
            "at work": table + max(block + block // 4, logit * chunk, 2 * table * shape.tied_head),
            "support": work.num_rows * work.completion_length * row,
            # Ten tables of the size of what they are.
            "values": 10 * 4 * work.num_nodes * work.num_simulated * work.completion_length,
            "gathered weights": (tables + 2 * (weights - tables) // shape.num_layers)
            * (shards > 1),
        },
        has_graphs=has_graphs,
    )


def _tokens_of_a_micro_batch(work: Workload) -> tuple[int, int]:
    """Tokens that a block sees, and tokens whose q, k and v attention copies for shared prompts."""
    of_rows = work.micro_rows * (work.prompt_length + work.completion_length - 1)
    if work.rows_per_prompt == 1:
        return of_rows, 0
    num_prompts = math.ceil(work.micro_rows / work.rows_per_prompt)
    tokens = num_prompts * work.prompt_length + work.micro_rows * (work.completion_length - 1)
    return tokens, of_rows if work.is_on_cuda else tokens


def _num_parameters(shape: TransformerConfig, config: RunSettings) -> tuple[int, int]:
    """All parameters and the trained ones, counted on a model without storage for them."""
    with torch.device("meta"):
        model = Transformer(shape)
    add_adapters(model, config.lora_rank, config.lora_alpha, config.lora_targets, torch.Generator())
    return model.num_parameters(), model.num_trained()


def _bytes_of_a_block(shape: TransformerConfig, num_keys: int, narrow: int) -> int:
    """What one block keeps of one token for its backward pass; the module's docstring has it."""
    q, kv = shape.num_heads * shape.head_size, shape.num_kv_heads * shape.head_size
    normed = 4 * (q + kv) if shape.qk_norm else 0
    inner = 2 * shape.width + 3 * q + 3 * kv + 4 * shape.mlp_width + shape.num_heads * num_keys
    return 4 * 4 * shape.width + normed + narrow * inner


def check_memory(estimate: Callable[[C], MemoryEstimate], config: C, device: torch.device) -> str:
    """The lines to print; ValueError if it does not fit, with a note of what changes would need.

    Called on every rank: the one with the least free memory decides for all.
    """
    if config.memory_check == "off":
        return "memory estimate: off"
    estimated = estimate(config)
    peak, free = max_over_ranks(estimated.peak), -max_over_ranks(-free_memory(device))
    found = f"{peak / 2**30:.2f} of the {free / 2**30:.2f} GiB free on {device.type}"
    if free == UNKNOWN:
        found = f"{peak / 2**30:.2f} GiB, free memory unknown"
    parts = "sampling and update" if estimated.has_graphs else "the larger of sampling and update"
    lines = f"memory estimate: {found}, {parts} beside the model"
    if peak <= free:
        return f"{lines}\n{estimated.table()}"
    refusal, helpful = f"the run must fit into memory, got {found}", []
    may_change = set(vars(config))
    if config.resume or getattr(config, "preset", None) == "tiny":
        may_change.remove("lora_rank")  # a run keeps its adapters, and preset tiny refuses any
    for wanted in LESS_MEMORY:
        change = {name: value for name, value in wanted.items() if name in may_change}
        less = estimate(replace(config, **change)).peak  # type: ignore[arg-type]  # of its fields
        if less < 0.99 * estimated.peak:
            flags = " ".join(_flag(name, value) for name, value in change.items())
            helpful.append(f"  {less / 2**30:8.2f}  {flags}")
    advice = [estimated.table(), *(["GiB with", *helpful] if helpful else [])]
    if config.memory_check == "warn":
        return "\n".join(["warning: it may end without memory", refusal, *advice])
    advice.append("or, as the estimate is an upper bound, --memory-check warn")
    error = ValueError(refusal)
    error.add_note("\n".join(advice))
    raise error


def _flag(name: str, value: Value) -> str:
    return f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take: of the GPU, or its share of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not (PROC / "meminfo").exists():  # not Linux
        return UNKNOWN
    available = _entry(PROC / "meminfo", "MemAvailable:") * 1024
    return max(0, min([available, *_left_by_limits()])) // local_world_size()


def _left_by_limits() -> list[int]:
    """What each limit of this process's control groups leaves, page cache counted as free.

    A group's own files may be out of sight in a container, those of the root are its limit there.
    """
    left = []
    groups = PROC / "self" / "cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        for controller in LIMITS.keys() & set(controllers.split(",")):
            mount, limit, used, cache = LIMITS[controller]
            group = Path(path.lstrip("/"))
            for folder in (CGROUPS / mount / part for part in (group, *group.parents)):
                if (folder / limit).exists() and (most := (folder / limit).read_text()) != "max\n":
                    taken = int((folder / used).read_text()) - _entry(folder / "memory.stat", cache)
                    left.append(int(most) - taken)
    return left


def _entry(path: Path, name: str) -> int:
    lines = (line.split() for line in path.read_text().splitlines())
    return next(int(words[1]) for words in lines if words[0] == name)
