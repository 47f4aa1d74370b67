"""Prompt -> completion -> controls -> trajectory -> reward -> advantage: one batch of experience.

No row is ever dropped: malformed text flows on as zero controls with reward 0, so a group keeps its
size. Groups are index ranges (row n = p * G + g), never equal texts, and the start of a prompt is
repeated by the same einops pattern as its tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import cast

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor
from torch.nn import functional as F

from minigrpo.config import GRPOConfig
from minigrpo.data import Prompts, Task, keyed_generator, token_uniforms
from minigrpo.distributed import gather_rows, gathered, sum_over_ranks
from minigrpo.double_integrator import Trajectories
from minigrpo.grpo import (
    AdvantageStd,
    constant_groups,
    group_advantages,
    variate_advantages,
    variate_sums,
)
from minigrpo.lora import adapters_off
from minigrpo.policy import ActingPolicy, completion_scores
from minigrpo.prompts import ParsedControls, parse_controls
from minigrpo.reward import Rewards
from minigrpo.sampling import Completions, StopRule, sample_completions
from minigrpo.shapes import check_shapes
from minigrpo.tokenizer import decode_completions, pad_id
from minigrpo.transformer import Transformer

CompletionRecord = dict[str, str | bool | float | dict[str, float]]
SampleRecord = dict[str, str | list[CompletionRecord]]


@dataclass(frozen=True)
class Experience:
    """Text side of a rollout: what was written, what it did, what it was worth."""

    completions: Completions
    texts: list[str]
    parsed: ParsedControls
    trajectories: Trajectories
    rewards: Rewards


@dataclass(frozen=True)
class Rollout:
    """Token side of a rollout: all that an update reads. Rows are this rank's, whole groups."""

    prompt_tokens: Tensor  # [N, L]
    prompt_mask: Tensor  # [N, L]
    completion_tokens: Tensor  # [N, C]
    completion_mask: Tensor  # [N, C]
    support: Tensor | None  # [N, C, S]
    sampling_logprobs: Tensor  # [N, C] the decoder's own, for a metric, never for the loss
    old_logprobs: Tensor | None  # [N, C]; None: the rollout feeds exactly one optimizer step
    ref_logprobs: Tensor | None  # [N, C]; None: no KL term
    rewards: Tensor  # [N] float64
    advantages: Tensor  # [N] float64, or [N, C] with a control variate
    prompt_places: Tensor  # [N / G] int64, of its prompts among all ranks' prompts of this step
    group_size: int

    def __post_init__(self) -> None:
        named = {"support": (self.support, "N C S"), "old_logprobs": (self.old_logprobs, "N C")}
        named["ref_logprobs"] = (self.ref_logprobs, "N C")
        check_shapes(
            prompt_tokens=(self.prompt_tokens, "N L"),
            prompt_mask=(self.prompt_mask, "N L"),
            completion_tokens=(self.completion_tokens, "N C"),
            completion_mask=(self.completion_mask, "N C"),
            sampling_logprobs=(self.sampling_logprobs, "N C"),
            rewards=(self.rewards, "N"),
            advantages=(self.advantages, "N" if self.advantages.ndim == 1 else "N C"),
            prompt_places=(self.prompt_places, str(len(self.rewards) // self.group_size)),
            **{name: (value, shape) for name, (value, shape) in named.items() if value is not None},
        )


def act(
    model: Transformer,
    prompts: Prompts,
    group_size: int,
    task: Task,
    acting: ActingPolicy,
    uniforms: Tensor | None,
    reward: Callable[[ParsedControls, Trajectories], Rewards],
    rows_per_batch: int,
) -> Experience:
    """Sample, parse, simulate and score G completions for each prompt; `uniforms` None is greedy.

    The plant runs on the CPU in float64: it is microseconds beside the model, and every device sees
    equal rewards (if not control variates, which are many more plans, to the last bit).
    """
    device = next(model.parameters()).device
    tokens, mask = prompts.tokens.to(device), prompts.mask.to(device)
    drawn = None if uniforms is None else uniforms.to(device)
    stop = StopRule(
        (int(task.tokenizer.eos_token_id),), pad_id(task.tokenizer), task.max_completion_length
    )
    completions = sample_completions(
        model, tokens, mask, group_size, acting, stop, drawn, rows_per_batch
    )
    texts = decode_completions(task.tokenizer, completions.tokens, completions.mask)
    parsed = parse_controls(texts, completions.ended.cpu(), task.plant, task.codec)
    starts = repeat(prompts.initial_states, "p two -> (p g) two", g=group_size)  # [N, 2]
    trajectories = task.plant.simulate(starts, parsed.controls)
    return Experience(completions, texts, parsed, trajectories, reward(parsed, trajectories))


@torch.no_grad()
def score_rows(
    model: Transformer,
    prompt_tokens: Tensor,
    prompt_mask: Tensor,
    completions: Completions,
    temperature: float,
    micro_batches: Iterable[Tensor],
) -> Tensor:
    """Log q of every sampled token [N, C] by the training forward, without gradient.

    `micro_batches` are those of the first epoch: other shapes, other rounding, and in bfloat16 a
    ratio that is not 1 on the first optimizer step.
    """
    support = completions.support
    pieces = [
        completion_scores(
            model,
            prompt_tokens[rows],
            prompt_mask[rows],
            completions.tokens[rows],
            None if support is None else support[rows],
            temperature,
        ).logprobs
        for rows in micro_batches
        if len(rows)
    ]
    return torch.cat(pieces)


def minibatches(prompt_places: Tensor, config: GRPOConfig, step: int) -> Iterator[Tensor]:
    """This rank's rows of each optimizer step: whole groups, dealt by a prompt's place.

    `prompt_places` are those of this rank's prompts among all ranks' prompts of the step. The first
    epoch keeps the order of the rollout, later ones shuffle the prompts.
    """
    for epoch in range(config.num_epochs):
        order = torch.arange(config.prompts_per_step)
        if epoch:
            generator = keyed_generator(config.seed, "shuffle", step, epoch)
            order = torch.from_numpy(generator.permutation(config.prompts_per_step))
        for chosen in order.tensor_split(config.num_minibatches):
            mine = torch.isin(prompt_places, chosen)  # [P]
            yield repeat(mine, "p -> (p g)", g=config.group_size).nonzero().flatten()


def make_rollout(
    model: Transformer,
    reference: Transformer | None,
    prompts: Prompts,
    prompt_places: Tensor,
    config: GRPOConfig,
    task: Task,
    reward: Callable[[ParsedControls, Trajectories], Rewards],
) -> tuple[Rollout, Experience, dict[str, float]]:
    """One rollout with the current weights, its text side, and the seconds of each phase."""
    began = time.perf_counter()
    acting = ActingPolicy(config.temperature, config.top_p, config.support_size)
    uniforms = token_uniforms(
        config.seed, prompts.indices, config.group_size, task.max_completion_length
    )
    device = next(model.parameters()).device
    tokens, mask = (
        repeat(t.to(device), "p l -> (p g) l", g=config.group_size)
        for t in (prompts.tokens, prompts.mask)
    )
    first_epoch = islice(minibatches(prompt_places, config, 0), config.num_minibatches)
    micro = [part for rows in first_epoch for part in torch.split(rows, config.micro_batch_size)]
    old = ref = None
    # Sampler and scorers round as the update does: same autocast, same micro-batches.
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        with gathered(model):
            experience = act(
                model,
                prompts,
                config.group_size,
                task,
                acting,
                uniforms,
                reward,
                config.rows_per_batch,
            )
            sampled, completions = time.perf_counter(), experience.completions
            if config.num_epochs * config.num_minibatches > 1:
                old = score_rows(model, tokens, mask, completions, config.temperature, micro)
        if reference is not None:
            # It may be the trained model itself.
            with gathered(reference), adapters_off(reference):
                ref = score_rows(reference, tokens, mask, completions, config.temperature, micro)
    total = experience.rewards.total
    everybodys = torch.cat([rewards[0] for rewards in gather_rows([total])])
    std = cast(AdvantageStd, config.advantage_std)
    if config.control_variate == "mean_plan":
        variates = control_variates(experience, config.group_size, task, reward)
        own = variate_sums(total, variates, config.group_size).sum(dim=1)  # [4, C]
        length = own.shape[1]  # of this rank's longest completion
        sums = sum_over_ranks(F.pad(own, (0, task.max_completion_length - length)))[:, :length]
        advantages = variate_advantages(
            total, variates, config.group_size, std, sums, everybodys
        )  # [N, C]
    else:
        advantages = group_advantages(total, config.group_size, std, everybodys)  # [N]
    rollout = Rollout(
        prompt_tokens=tokens,
        prompt_mask=mask,
        completion_tokens=completions.tokens,
        completion_mask=completions.mask,
        support=completions.support,
        sampling_logprobs=completions.sampling_logprobs,
        old_logprobs=old,
        ref_logprobs=ref,
        rewards=total,
        advantages=advantages,
        prompt_places=prompt_places,
        group_size=config.group_size,
    )
    seconds = {"time/sampling_s": sampled - began, "time/scoring_s": time.perf_counter() - sampled}
    return rollout, experience, seconds


def mean_plans(controls: Tensor) -> Tensor:
    """Plans [P, G, T, T]: number k of a row is its own up to k, then the mean of the others'.

    plan_gk = (u_g0 ... u_g,k-1, v_gk ... v_g,T-1),  v_g = mean of the u_h, h != g; [P, G, T]
    """
    horizon, size = controls.shape[2], controls.shape[1]
    others = (controls.sum(dim=1, keepdim=True) - controls) / (size - 1)
    time = torch.arange(horizon, device=controls.device)
    is_own = rearrange(time, "t -> 1 t") < rearrange(time, "k -> k 1")  # [T, T]
    own, rest = (rearrange(plan, "p g t -> p g 1 t") for plan in (controls, others))
    return torch.where(is_own, own, rest)


def control_variates(
    experience: Experience,
    group_size: int,
    task: Task,
    reward: Callable[[ParsedControls, Trajectories], Rewards],
) -> Tensor:
    """What the plan so far would be worth if it went on like the group's others: [N, C].

    b_k = R(`mean_plans` k), and R itself at EOS: a function of the start, the controls before k and
    the other rows. NaN, no variate, beyond EOS and in a group with malformed text: there the gap to
    valid text is the lesson. Whether a group is whole depends on later tokens too, so with
    malformed text the gradient is not exact, by slope (x - mean) grad P(well-formed). Needs one
    token a control.
    """
    parsed, flown = experience.parsed, experience.trajectories
    horizon, length = task.plant.horizon, experience.completions.tokens.shape[1]
    device = experience.completions.tokens.device
    variates = torch.full((len(parsed.is_valid), length), torch.nan, dtype=torch.float64)
    whole = reduce(parsed.is_valid, "(p g) -> p", "all", g=group_size)  # [P]
    groups = rearrange(torch.arange(len(variates)), "(p g) -> p g", g=group_size)[whole]
    # T plans a row: few fit the cache of a CPU, while a GPU wants many. In float64 on both.
    at_once = max(1, (4096 if device.type == "cuda" else 32) // group_size)
    for rows in torch.split(groups, at_once) if len(groups) else ():
        own = flown.controls[rows].to(device)
        plans = rearrange(mean_plans(own), "p g k t -> (p g k) t")
        starts = repeat(flown.states[rows, 0].to(device), "p g c -> (p g k) c", k=horizon)
        valid = torch.ones(len(plans), dtype=torch.bool, device=device)
        written = ParsedControls(plans, valid, torch.full_like(valid, horizon, dtype=torch.int64))
        total = reward(written, task.plant.simulate(starts, plans)).total
        rows, worth = rows.flatten(), rearrange(total.cpu(), "(n k) -> n k", k=horizon)
        variates[rows, :horizon] = worth
        variates[rows, horizon] = experience.rewards.total[rows]  # EOS: the plan is written
    return variates


def rollout_metrics(rollout: Rollout, experience: Experience) -> dict[str, float]:
    """Health of a rollout over all ranks: sums and counts first, one division at the end."""
    done, parsed = experience.completions, experience.parsed
    groups = rearrange(rollout.rewards, "(p g) -> p g", g=rollout.group_size)
    per_row = {
        **{f"reward/{name}": value for name, value in experience.rewards.components.items()},
        "reward/total": rollout.rewards,
        "rollout/final_error": experience.trajectories.states[:, -1].norm(dim=1),
        "rollout/frac_valid": parsed.is_valid,
        "rollout/frac_truncated": ~done.ended,
        "rollout/completion_length": done.mask.sum(dim=1),
    }
    per_group = {
        "rollout/frac_zero_std_groups": constant_groups(rollout.rewards, rollout.group_size),
        "rollout/group_reward_std": groups.std(dim=1),
    }
    advantages = rollout.advantages
    if advantages.ndim == 1:
        advantages = repeat(advantages, "n -> n c", c=done.mask.shape[1])
    per_token = {
        "rollout/abs_advantage": advantages.to(done.mask.device).abs(),
        "rollout/support_mass": done.kept_mass,
        "rollout/frac_capped_support": done.is_capped,
    }
    sums = [value.cpu().double().sum() for value in (*per_row.values(), *per_group.values())]
    sums += [value[done.mask].cpu().double().sum() for value in per_token.values()]
    counts = torch.tensor(
        [len(rollout.rewards), len(groups), int(done.mask.sum())], dtype=torch.float64
    )
    added = sum_over_ranks(torch.cat([torch.stack(sums), counts])).tolist()
    rows, num_groups, tokens = added[-3:]
    divisors = [rows] * len(per_row) + [num_groups] * len(per_group) + [tokens] * len(per_token)
    names = [*per_row, *per_group, *per_token]
    # strict=False: the three counts follow the sums
    metrics = {
        name: value / divisor for name, value, divisor in zip(names, added, divisors, strict=False)
    }
    return metrics | {"rollout/num_tokens": tokens}


def sample_records(
    prompts: Prompts, experience: Experience, rollout: Rollout, num_prompts: int = 2
) -> list[SampleRecord]:
    """The first prompts with all their completions, components, advantages: for samples.jsonl."""
    records: list[SampleRecord] = []
    for p in range(min(num_prompts, len(prompts.texts))):
        rows = range(p * rollout.group_size, (p + 1) * rollout.group_size)
        completions: list[CompletionRecord] = [
            {
                "text": experience.texts[n],
                "is_valid": bool(experience.parsed.is_valid[n]),
                "reward": float(rollout.rewards[n]),
                "components": {
                    name: float(v[n]) for name, v in experience.rewards.components.items()
                },
                "advantage": float(rollout.advantages[n].mean()),
            }
            for n in rows
        ]
        records.append({"prompt": prompts.texts[p], "completions": completions})
    return records
