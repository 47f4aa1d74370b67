"""The composition prompt -> completion -> controls -> trajectory -> reward -> advantage: one batch of experience.

No row is ever dropped: malformed text flows on as zero controls with reward 0, so a group keeps its size. Groups are index
ranges (row n = p * G + g), never equal texts, and the start of a prompt is repeated by the same einops pattern as its tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from minigrpo.config import GRPOConfig
from minigrpo.data import Prompts, Task, token_uniforms
from minigrpo.distributed import gather_rows, sum_over_ranks
from minigrpo.double_integrator import Trajectories
from minigrpo.grpo import constant_groups, group_advantages
from minigrpo.policy import ActingPolicy, TokenScores, completion_scores
from minigrpo.prompts import ParsedControls, parse_controls
from minigrpo.reward import Rewards
from minigrpo.sampling import Completions, StopRule, sample_completions
from minigrpo.shapes import check_shapes
from minigrpo.tokenizer import decode_completions, pad_id
from minigrpo.transformer import Transformer

SampleRecord = dict[str, str | list[dict[str, str | bool | float | dict[str, float]]]]


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
    """Token side of a rollout: all that an update reads. Rows are this rank's share, whole groups."""

    prompt_tokens: Tensor  # [N, L]
    prompt_mask: Tensor  # [N, L]
    completion_tokens: Tensor  # [N, C]
    completion_mask: Tensor  # [N, C]
    support: Tensor | None  # [N, C, S]
    sampling_logprobs: Tensor  # [N, C] the decoder's own, for a metric, never for the loss
    old_logprobs: Tensor | None  # [N, C]; None: the rollout feeds exactly one optimizer step
    ref_logprobs: Tensor | None  # [N, C]; None: no KL term
    rewards: Tensor  # [N] float64
    advantages: Tensor  # [N] float64
    prompt_places: Tensor  # [N / G] int64, place of each prompt among all ranks' prompts of this step
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
            advantages=(self.advantages, "N"),
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

    The plant runs on the CPU in float64: it is microseconds beside the model, and every device sees equal rewards.
    """
    device = next(model.parameters()).device
    tokens, mask = prompts.tokens.to(device), prompts.mask.to(device)
    drawn = None if uniforms is None else uniforms.to(device)
    stop = StopRule((int(task.tokenizer.eos_token_id),), pad_id(task.tokenizer), task.max_completion_length)
    completions = sample_completions(model, tokens, mask, group_size, acting, stop, drawn, rows_per_batch)
    texts = decode_completions(task.tokenizer, completions.tokens, completions.mask)
    parsed = parse_controls(texts, completions.ended.cpu(), task.plant, task.codec)
    starts = repeat(prompts.initial_states, "p two -> (p g) two", g=group_size)  # [N, 2]
    trajectories = task.plant.simulate(starts, parsed.controls)
    return Experience(completions, texts, parsed, trajectories, reward(parsed, trajectories))


@torch.no_grad()
def score_rows(
    model: Transformer, prompts: tuple[Tensor, Tensor], completions: Completions, temperature: float, micro_batch_size: int
) -> TokenScores:
    """Log q of every sampled token by the training forward, in the micro-batches of the first epoch, without gradient."""
    pieces = []
    for start in range(0, len(completions.tokens), micro_batch_size):
        rows = slice(start, start + micro_batch_size)
        support = None if completions.support is None else completions.support[rows]
        scores = completion_scores(model, prompts[0][rows], prompts[1][rows], completions.tokens[rows], support, temperature)
        pieces.append((scores.logprobs, scores.entropy))
    return TokenScores(*(torch.cat(column) for column in zip(*pieces, strict=True)))


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
    uniforms = token_uniforms(config.seed, prompts.indices, config.group_size, task.max_completion_length)
    experience = act(model, prompts, config.group_size, task, acting, uniforms, reward, config.rows_per_batch)
    sampled = time.perf_counter()
    completions, device = experience.completions, experience.completions.tokens.device
    rows = tuple(repeat(t.to(device), "p l -> (p g) l", g=config.group_size) for t in (prompts.tokens, prompts.mask))
    old = ref = None
    if config.num_epochs * config.num_minibatches > 1:
        old = score_rows(model, (rows[0], rows[1]), completions, config.temperature, config.micro_batch_size).logprobs
    if reference is not None:
        ref = score_rows(reference, (rows[0], rows[1]), completions, config.temperature, config.micro_batch_size).logprobs
    total = experience.rewards.total
    everybodys = torch.cat([rewards[0] for rewards in gather_rows([total])])
    rollout = Rollout(
        prompt_tokens=rows[0],
        prompt_mask=rows[1],
        completion_tokens=completions.tokens,
        completion_mask=completions.mask,
        support=completions.support,
        sampling_logprobs=completions.sampling_logprobs,
        old_logprobs=old,
        ref_logprobs=ref,
        rewards=total,
        advantages=group_advantages(total, config.group_size, config.advantage_std, everybodys),
        prompt_places=prompt_places,
        group_size=config.group_size,
    )
    return rollout, experience, {"time/sampling_s": sampled - began, "time/scoring_s": time.perf_counter() - sampled}


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
        "rollout/abs_advantage": rollout.advantages.abs(),
    }
    per_group = {
        "rollout/frac_zero_std_groups": constant_groups(rollout.rewards, rollout.group_size),
        "rollout/group_reward_std": groups.std(dim=1),
    }
    per_token = {"rollout/support_mass": done.kept_mass, "rollout/frac_capped_support": done.is_capped}
    sums = [value.cpu().double().sum() for value in (*per_row.values(), *per_group.values())]
    sums += [value[done.mask].cpu().double().sum() for value in per_token.values()]
    counts = torch.tensor([len(rollout.rewards), len(groups), int(done.mask.sum())], dtype=torch.float64)
    added = sum_over_ranks(torch.cat([torch.stack(sums), counts])).tolist()
    rows, num_groups, tokens = added[-3:]
    divisors = [rows] * len(per_row) + [num_groups] * len(per_group) + [tokens] * len(per_token)
    names = [*per_row, *per_group, *per_token]
    metrics = {name: value / divisor for name, value, divisor in zip(names, added, divisors, strict=False)}
    return metrics | {"rollout/num_tokens": tokens}


def sample_records(prompts: Prompts, experience: Experience, rollout: Rollout, num_prompts: int = 2) -> list[SampleRecord]:
    """The first prompts with all their completions, components and advantages: what samples.jsonl holds."""
    records = []
    for p in range(min(num_prompts, len(prompts.texts))):
        rows = range(p * rollout.group_size, (p + 1) * rollout.group_size)
        completions = [
            {
                "text": experience.texts[n],
                "is_valid": bool(experience.parsed.is_valid[n]),
                "reward": float(rollout.rewards[n]),
                "components": {name: float(v[n]) for name, v in experience.rewards.components.items()},
                "advantage": float(rollout.advantages[n]),
            }
            for n in rows
        ]
        records.append({"prompt": prompts.texts[p], "completions": completions})
    return records
