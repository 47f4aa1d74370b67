"""The composition prompt -> completion -> controls -> trajectory -> reward -> advantage: one batch of experience.

No row is ever dropped: malformed text flows on as zero controls with reward 0, so a group keeps its size. Groups are index
ranges (row n = p * G + g), never equal texts, and the start of a prompt is repeated by the same einops pattern as its tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import repeat
from torch import Tensor

from minigrpo.config import GRPOConfig
from minigrpo.data import Prompts, Task, token_uniforms
from minigrpo.distributed import gather_rows
from minigrpo.double_integrator import Trajectories
from minigrpo.grpo import group_advantages
from minigrpo.policy import ActingPolicy, TokenScores, completion_scores
from minigrpo.prompts import ParsedControls, parse_controls
from minigrpo.reward import Rewards
from minigrpo.sampling import Completions, StopRule, sample_completions
from minigrpo.shapes import check_shapes
from minigrpo.tokenizer import decode_completions, pad_id
from minigrpo.transformer import Transformer


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
    rollout = Rollout(
        prompt_tokens=rows[0],
        prompt_mask=rows[1],
        completion_tokens=completions.tokens,
        completion_mask=completions.mask,
        support=completions.support,
        old_logprobs=old,
        ref_logprobs=ref,
        rewards=total,
        advantages=group_advantages(total, config.group_size, config.advantage_std, torch.cat([r[0] for r in gather_rows([total])])),
        prompt_places=prompt_places,
        group_size=config.group_size,
    )
    return rollout, experience, {"time/sampling_s": sampled - began, "time/scoring_s": time.perf_counter() - sampled}
