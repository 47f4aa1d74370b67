"""Prompt -> completion -> controls -> trajectory -> reward -> advantage: one batch of experience.

No row is ever dropped: malformed text flows on as zero controls with one defined reward, so a group
keeps its size. Groups are index ranges (row n = p * G + g), never equal texts: starts are repeated
by that pattern, and the prompt of row n is n // G (`prompts_of`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated

import torch
from einops import rearrange, repeat
from torch import Tensor

from minigrpo.config import GRPOConfig
from minigrpo.counterfactual import ChoiceCredit, ChoiceSimulator, ChoiceValues, later_values
from minigrpo.data import (
    Prompts,
    Task,
    keyed_generator,
    make_prompts,
    token_uniforms,
    training_starts,
)
from minigrpo.distributed import gather_rows, gathered, rank, sum_over_ranks, world_size
from minigrpo.double_integrator import Trajectories
from minigrpo.grpo import advantage_scale, constant_groups, group_advantages
from minigrpo.lora import adapters_off
from minigrpo.optim import linear
from minigrpo.policy import ActingPolicy
from minigrpo.prompts import ParsedControls, parse_controls
from minigrpo.reward import RewardFunction, Rewards, tally_of
from minigrpo.sampling import Completions, StopRule, sample_completions
from minigrpo.scoring import completion_scores
from minigrpo.shapes import check_record
from minigrpo.tokenizer import control_values, decode_completions, pad_id
from minigrpo.transformer import Transformer

CompletionRecord = dict[str, str | bool | float | list[float] | dict[str, float]]
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

    prompt_tokens: Annotated[Tensor, "P L"]  # once for each group
    prompt_mask: Annotated[Tensor | None, "P L"]  # None: nothing is padded
    completion_tokens: Annotated[Tensor, "N C"]
    completion_mask: Annotated[Tensor, "N C"]
    support: Annotated[Tensor | None, "N C S"]
    sampling_logprobs: Annotated[Tensor, "N C"]  # the decoder's own, a metric, never for the loss
    old_logprobs: Annotated[Tensor | None, "N C"]  # None: it feeds exactly one optimizer step
    ref_logprobs: Annotated[Tensor | None, "N C"]  # None: no KL term
    rewards: Annotated[Tensor, "N"]  # float64
    advantages: Tensor  # [N] float64; [N, C] with `credit`, then of what came after each token
    prompt_places: Annotated[Tensor, "P"]  # int64, among all ranks' prompts of this step
    group_size: int
    max_length: int  # tokens of the longest completion allowed
    credit: ChoiceCredit | None = None  # None: one advantage a completion

    def __post_init__(self) -> None:
        check_record(
            self,
            advantages=(self.advantages, "N" if self.credit is None else "N C"),
            groups=(self.prompt_places, str(len(self.rewards) // self.group_size)),
            values=(None if self.credit is None else self.credit.choices.values, "N C K"),
        )


def rows_of(tensor: Tensor | None, rows: Tensor) -> Tensor | None:
    """Some rows of what a rollout may lack."""
    return None if tensor is None else tensor[rows]


def write_plans(
    model: Transformer,
    prompts: Prompts,
    group_size: int,
    task: Task,
    acting: ActingPolicy,
    uniforms: Tensor | None,
    rows_per_batch: int,
) -> tuple[Completions, list[str], ParsedControls]:
    """Sample and parse G completions for each prompt; `uniforms` None is greedy."""
    device = next(model.parameters()).device
    tokens, mask = prompts.placed(device)
    drawn = None if uniforms is None else uniforms.to(device)
    stop = StopRule(
        (int(task.tokenizer.eos_token_id),), pad_id(task.tokenizer), task.max_completion_length
    )
    completions = sample_completions(
        model, tokens, mask, group_size, acting, stop, drawn, rows_per_batch
    )
    texts = decode_completions(task.tokenizer, completions.tokens, completions.mask)
    parsed = parse_controls(texts, completions.ended, task.plant, task.codec)
    return completions, texts, parsed


def act(
    model: Transformer, prompts: Prompts, config: GRPOConfig, task: Task, reward: RewardFunction
) -> Experience:
    """Sample, parse, simulate and score G completions for each prompt.

    The plant runs on the CPU in float64: it is microseconds beside the model, and every device sees
    equal rewards. Values of choices, many more plans, are simulated on the model's device and may
    differ in the last bits.
    """
    acting = ActingPolicy(config.temperature, config.top_p, config.support_size)
    group_size, length = config.group_size, task.max_completion_length
    uniforms = token_uniforms(config.seed, prompts.indices, group_size, length)
    completions, texts, parsed = write_plans(
        model, prompts, group_size, task, acting, uniforms, config.rows_per_batch
    )
    starts = repeat(prompts.initial_states, "p two -> (p g) two", g=group_size)  # [N, 2]
    trajectories = task.plant.simulate(starts, parsed.controls)
    tally = tally_of(parsed.controls, trajectories, task.plant, task.cost)
    rewards = reward(tally, parsed.is_valid)
    return Experience(completions, texts, parsed, trajectories, rewards)


@torch.no_grad()
def score_rows(
    model: Transformer,
    prompt_tokens: Tensor,
    prompt_mask: Tensor | None,
    completions: Completions,
    config: GRPOConfig,
    micro_batches: Iterable[Tensor],
    choices: ChoiceValues | None = None,
) -> list[Tensor]:
    """Of every sampled token, by the training forward without gradient: log q [N, C] and, with
    choices, the mean over q of their values and `ChoiceValues.mean_offset`, [N, C] each.

    `micro_batches` are the update's own of the first epoch: with other shapes logits would round
    otherwise, and in bfloat16 the first ratio would not be 1.
    """
    parts, kept = [], [rows for rows in micro_batches if len(rows)]
    for rows in kept:
        tokens, prompts = completions.tokens[rows], prompts_of(rows, config)
        scores = completion_scores(
            model,
            prompt_tokens[prompts],
            rows_of(prompt_mask, prompts),
            tokens,
            rows_of(completions.support, rows),
            config.temperature,
            None if choices is None else choices.basis,
            has_entropy=False,
        )
        part = [scores.logprobs]
        if choices is not None and scores.mass is not None:
            part.append((scores.mass * choices.values[rows]).sum(dim=-1))
            part.append(choices.mean_offset(scores.mass, tokens))
        parts.append(part)
    order = torch.cat(kept).argsort()  # minibatches go by prompt_places, in whatever order they are
    return [torch.cat(column)[order] for column in zip(*parts, strict=True)]


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


def rows_per_prompt(config: GRPOConfig) -> int:
    """Rows of one prompt that follow one another in every micro-batch, however groups are cut."""
    return math.gcd(config.micro_batch_size, config.group_size)


def prompts_of(rows: Tensor, config: GRPOConfig) -> Tensor:
    """The prompt of each `rows_per_prompt` rows of a micro-batch: [M] -> [M / that]."""
    return rows[:: rows_per_prompt(config)] // config.group_size


def prompts_of_step(
    training_grid: Tensor, config: GRPOConfig, task: Task, step: int
) -> tuple[Prompts, Tensor]:
    """This rank's prompts of one step, and their places among those of all ranks."""
    reach = linear(step, config.curriculum_steps, 0.25, 1.0) if config.curriculum_steps else 1.0
    starts, indices = training_starts(
        training_grid, config.seed, step, config.prompts_per_step, reach
    )
    places = torch.arange(rank(), config.prompts_per_step, world_size())
    return make_prompts(starts[places], indices[places], task), places


def check_batch(config: GRPOConfig) -> None:
    """ValueError unless every rank has a prompt in every minibatch."""
    needed = config.num_minibatches * world_size()
    if config.prompts_per_step < needed:
        raise ValueError(
            f"prompts_per_step must be at least num_minibatches x ranks = {needed}, "
            f"got {config.prompts_per_step}: more of them, or a smaller num_minibatches"
        )


def make_rollout(
    model: Transformer,
    reference: Transformer | None,
    prompts: Prompts,
    prompt_places: Tensor,
    config: GRPOConfig,
    task: Task,
    reward: RewardFunction,
) -> tuple[Rollout, Experience, dict[str, float]]:
    """One rollout with the current weights, its text side, and the seconds of each phase."""
    began = time.perf_counter()
    device = next(model.parameters()).device
    prompt_tokens, prompt_mask = prompts.placed(device)
    # Of any step: only later epochs are shuffled by it.
    first_epoch = islice(minibatches(prompt_places, config, 0), config.num_minibatches)
    size = config.micro_batch_size
    micro = [part for rows in first_epoch for part in torch.split(rows.to(device), size)]
    old, ref, choice_means = None, None, list[Tensor]()
    # Sampler and scorers round as the update does: same autocast, same micro-batches.
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        with gathered(model):
            experience = act(model, prompts, config, task, reward)
            sampled, completions = time.perf_counter(), experience.completions
            choices = None
            if config.credit == "choice":
                choices = choices_of(experience, model.config.vocab_size, task, config, reward)
            needs_old = config.num_epochs * config.num_minibatches > 1  # after the first step
            if needs_old or choices is not None:
                scored = score_rows(
                    model, prompt_tokens, prompt_mask, completions, config, micro, choices
                )
                old, choice_means = scored[0] if needs_old else None, scored[1:]
        if reference is not None:
            # It may be the trained model itself.
            with gathered(reference), adapters_off(reference):
                (ref,) = score_rows(
                    reference, prompt_tokens, prompt_mask, completions, config, micro
                )
    advantages, credit = credited(experience, choices, choice_means, config)
    rollout = Rollout(
        prompt_tokens=prompt_tokens,
        prompt_mask=prompt_mask,
        completion_tokens=completions.tokens,
        completion_mask=completions.mask,
        support=completions.support,
        sampling_logprobs=completions.sampling_logprobs,
        old_logprobs=old,
        ref_logprobs=ref,
        rewards=experience.rewards.total,
        advantages=advantages,
        prompt_places=prompt_places,
        group_size=config.group_size,
        max_length=task.max_completion_length,
        credit=credit,
    )
    seconds = {"time/sampling_s": sampled - began, "time/scoring_s": time.perf_counter() - sampled}
    return rollout, experience, seconds


def credited(
    acted: Experience,
    choices: ChoiceValues | None,
    choice_means: Sequence[Tensor],
    config: GRPOConfig,
) -> tuple[Tensor, ChoiceCredit | None]:
    """Advantages [N]; with choices and what `score_rows` found of them [N, C], and the credit.

    The rewards of all ranks count for the unit.
    """
    rewards, tokens = acted.rewards.total, acted.completions.tokens
    everybodys = torch.cat([rows[0] for rows in gather_rows([rewards])])
    if choices is None:
        return group_advantages(rewards, config.group_size, config.advantage_std, everybodys), None
    scale = advantage_scale(rewards, config.group_size, config.advantage_std, everybodys)
    unit = repeat(scale, "p -> (p g)", g=config.group_size).to(tokens.device)
    expected, mean_offsets = choice_means
    later = later_values(choices, tokens, expected, config.credit_lambda)
    advantages = rearrange(unit, "n -> n 1") * later
    return advantages, ChoiceCredit(choices, unit.float(), mean_offsets)


def choices_of(
    experience: Experience, vocab_size: int, task: Task, config: GRPOConfig, reward: RewardFunction
) -> ChoiceValues:
    """What choices of an experience would have been worth, on the model's device."""
    tokens = experience.completions.tokens
    controls = control_values(task.tokenizer, vocab_size, task.plant, task.codec).to(tokens.device)
    eos = int(task.tokenizer.eos_token_id)
    simulator = ChoiceSimulator(controls, eos, task.plant, task.cost, reward)
    starts = experience.trajectories.states[:, 0].to(tokens.device)
    plans = simulator.plans_of(tokens, starts, config.group_size)
    is_whole = plans.num_written.cpu() > task.plant.horizon
    if not torch.equal(is_whole, experience.parsed.is_valid):
        raise ValueError("tokens and text must agree on what is well-formed: one token a control")
    choices = simulator.values_of(plans, tokens.shape[1])
    if bool(is_whole.any()):
        # The median, since steps of a reward may fall otherwise where a device rounds otherwise.
        at_end = choices.level.cpu()[is_whole, task.plant.horizon]
        rewards = experience.rewards.total[is_whole]
        if ((at_end - rewards) / (1 + rewards.abs())).abs().median() > 1e-4:
            raise ValueError("credit must be completion where rewards are not the simulator's")
    return choices


def rollout_metrics(rollout: Rollout, experience: Experience) -> dict[str, float]:
    """Health of a rollout over all ranks: sums and counts first, one division at the end."""
    done, parsed = experience.completions, experience.parsed
    groups = rearrange(rollout.rewards, "(p g) -> p g", g=rollout.group_size)
    advantages = rollout.advantages
    if advantages.ndim == 1:
        advantages = repeat(advantages, "n -> n c", c=done.mask.shape[1])
    measured = {  # of each row, group or token
        **{f"reward/{name}": value for name, value in experience.rewards.components.items()},
        "reward/total": rollout.rewards,
        "rollout/final_error": experience.trajectories.states[:, -1].norm(dim=1),
        "rollout/frac_valid": parsed.is_valid,
        "rollout/frac_truncated": ~done.ended,
        "rollout/completion_length": done.mask.sum(dim=1),
        "rollout/frac_zero_std_groups": constant_groups(rollout.rewards, rollout.group_size),
        "rollout/group_reward_std": groups.std(dim=1),
        "rollout/abs_advantage": advantages.to(done.mask.device).abs()[done.mask],
        "rollout/support_mass": done.kept_mass[done.mask],
        "rollout/frac_capped_support": done.is_capped[done.mask],
    }
    sums = [(float(values.cpu().double().sum()), len(values)) for values in measured.values()]
    totals, counts = sum_over_ranks(torch.tensor(sums, dtype=torch.float64)).unbind(dim=1)
    means = dict(zip(measured, (totals / counts).tolist(), strict=True))
    return means | {"rollout/num_tokens": float(counts[-1])}  # the last of them are of tokens


def sample_records(
    prompts: Prompts, experience: Experience, rollout: Rollout
) -> list[SampleRecord]:
    """This rank's first two prompts with all that was made of them: for samples.jsonl.

    With credit for each control a row has an advantage for each token, of what came after it.
    """
    size, components = rollout.group_size, experience.rewards.components

    def shown(n: int) -> CompletionRecord:
        return {
            "text": experience.texts[n],
            "is_valid": bool(experience.parsed.is_valid[n]),
            "reward": float(rollout.rewards[n]),
            "components": {name: float(value[n]) for name, value in components.items()},
            "advantage": rollout.advantages[n].tolist(),
        }

    return [
        {"prompt": text, "completions": [shown(n) for n in range(p * size, (p + 1) * size)]}
        for p, text in enumerate(prompts.texts[:2])
    ]
