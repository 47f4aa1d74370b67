"""Where the data come from: split of the start grid, LQR demonstrations, prompts, keyed randomness.

Every draw is a pure function of (seed, purpose, step, prompt index): it does not depend on the
number of ranks, and resuming needs no generator state.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.lqr import QuadraticCost, disturbed_lqr_controls
from minigrpo.prompts import Codec, prompt_text, render_controls
from minigrpo.shapes import check_record
from minigrpo.tokenizer import decode_completions, encode_completion, encode_prompt, pad_id

PURPOSES = (  # a purpose's place is part of its keys, so one without a use keeps it
    "split", "demonstrations", "batches", "prompts", "tokens", "shuffle", "evaluation", "bootstrap",
    "initialise", "disturbance", "weight_noise",
)  # fmt: skip
# One split for all: a run's own seed must not move a start from test to training.
SPLIT_SEED = 20_260_101
HELD_OUT_STARTS = 2048  # of each of test and validation, out of 25,921


def keyed_generator(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """Independent random numbers for each key; SeedSequence hashes it, neighbours share nothing.

    Keys of one purpose have one length, since SeedSequence reads (1, 2) as (1, 2, 0), and no part
    reaches 2^32, since it reads that as two parts.
    """
    if not all(0 <= part < 2**32 for part in (seed, *key)):
        raise ValueError(f"seed and key must be in [0, 2^32), got {(seed, *key)}")
    return np.random.default_rng([seed, PURPOSES.index(purpose), *key])


@dataclass(frozen=True)
class StartSplit:
    """Disjoint rows of the start grid."""

    test: Tensor  # [2048, 2]
    validation: Tensor  # [2048, 2]
    training: Tensor  # [rest, 2] demonstrations and prompts


def split_starts(plant: DoubleIntegrator) -> StartSplit:
    """Divide the start grid once and for all; the prefix of each part is a uniform sample of it."""
    grid = plant.start_grid()
    held_out = min(HELD_OUT_STARTS, len(grid) // 8)
    order = torch.from_numpy(keyed_generator(SPLIT_SEED, "split").permutation(len(grid)))
    sizes = [held_out, held_out, len(grid) - 2 * held_out]
    test, validation, training = torch.split(order, sizes)
    return StartSplit(grid[test], grid[validation], grid[training])


@dataclass(frozen=True)
class Task:
    """What a checkpoint fixes about the problem; one object, so that no two stages can disagree."""

    plant: DoubleIntegrator
    cost: QuadraticCost
    codec: Codec
    tokenizer: PreTrainedTokenizerFast
    max_completion_length: int


def make_task(
    plant: DoubleIntegrator, cost: QuadraticCost, codec: Codec, tokenizer: PreTrainedTokenizerFast
) -> Task:
    """The task with its longest completion: that of a plan of negative numbers, EOS included.

    Where a number is several tokens a tenth is added, since other digits may merge differently.
    ValueError: the tokenizer loses some of the codec's text.
    """
    plan = torch.linspace(-plant.control_bound, -plant.control_bound / 3, plant.horizon)
    longest = encode_completion(tokenizer, plan, codec)
    tokens = torch.tensor([longest])
    read, text = decode_completions(tokenizer, tokens, tokens >= 0)[0], render_controls(plan, codec)
    if read != text:
        raise ValueError(f"the tokenizer must keep {text[:30]!r}... as it is, got {read[:30]!r}")
    slack = len(longest) // 10 if codec.style == "words" else 0
    return Task(plant, cost, codec, tokenizer, len(longest) + slack)


@dataclass(frozen=True)
class Prompts:
    """The prompts of one step; a start travels with its prompt and is never read back from text."""

    initial_states: Annotated[Tensor, "P D"]  # D = 2: m, m/s; float64
    indices: Annotated[Tensor, "P"]  # int64, place in the run's stream of prompts, key of its draws
    texts: tuple[str, ...]  # P strings
    tokens: Annotated[Tensor, "P L"]  # int64, left-padded
    mask: Annotated[Tensor, "P L"]  # bool

    def __post_init__(self) -> None:
        check_record(self)

    def placed(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Tokens and mask there. None: nothing is padded, which a GPU need not be asked later."""
        mask = None if bool(self.mask.all()) else self.mask.to(device)
        return self.tokens.to(device), mask


def make_prompts(initial_states: Tensor, indices: Tensor, task: Task) -> Prompts:
    """Prompts for given starts [P, 2]."""
    rows = [
        encode_prompt(task.tokenizer, state, task.plant, task.codec) for state in initial_states
    ]
    tokens, mask = _pad(rows, pad_id(task.tokenizer), "left")
    texts = tuple(prompt_text(state, task.plant, task.codec) for state in initial_states)
    return Prompts(initial_states, indices, texts, tokens, mask)


def prompt_lengths(task: Task) -> set[int]:
    """The lengths of prompts in tokens, looked up at starts whose two numbers are equal."""
    grid = task.plant.start_grid()
    starts = grid[grid[:, 0] == grid[:, 1]]
    return {len(encode_prompt(task.tokenizer, s, task.plant, task.codec)) for s in starts}


def training_starts(
    starts: Tensor, seed: int, step: int, num_prompts: int, reach: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Fresh random starts [P, 2] of one step and their indices [P] in the run's prompt stream.

    `reach` in (0, 1] is the share of the square they come from, by side: a curriculum's stage.
    """
    if reach < 1.0:
        size = starts.abs().amax(dim=1)  # [K]
        starts = starts[size <= reach * size.max()]
    chosen = keyed_generator(seed, "prompts", step).integers(len(starts), size=num_prompts)
    indices = torch.arange(step * num_prompts, (step + 1) * num_prompts)
    return starts[torch.from_numpy(chosen)], indices


def token_uniforms(
    seed: int, indices: Tensor, group_size: int, length: int, purpose: str = "tokens"
) -> Tensor:
    """The uniforms [P * G, length] that decide all tokens; a prompt's depend on its index alone."""
    uniforms = torch.zeros(len(indices), group_size, length, dtype=torch.float64)
    for row, index in zip(uniforms.numpy(), indices.tolist(), strict=True):
        keyed_generator(seed, purpose, index).random(out=row)
    return rearrange(uniforms, "p g c -> (p g) c")


@dataclass(frozen=True)
class SFTBatch:
    """Demonstrations as token rows: prompt, completion, EOS, right-padded."""

    tokens: Annotated[Tensor, "B K"]  # int64, what the model reads: the controls as applied
    labels: Annotated[Tensor, "B K"]  # int64, what it shall have said there: those LQR wanted
    mask: Annotated[Tensor, "B K"]  # bool, real tokens
    completion_mask: Annotated[Tensor, "B K"]  # bool, the tokens to learn: completion and EOS

    def __post_init__(self) -> None:
        check_record(self)

    def rows(self, chosen: Tensor | slice) -> SFTBatch:
        return SFTBatch(*(column[chosen] for column in vars(self).values()))

    def to(self, device: torch.device) -> SFTBatch:
        return SFTBatch(*(column.to(device) for column in vars(self).values()))


def disturbances(num_rows: int, horizon: int, scale: float, seed: int) -> Tensor:
    """Noise [B, T] on the controls of demonstrations, m/s^2: Gaussian, each row of its own size.

    noise_bk = scale w_b e_bk,  w_b uniform in [0, 1), e_bk standard normal
    From nearly none to `scale`: the model is to follow the expert's own path as well as to return
    to it from wherever its own sampling may lead.
    """
    generator = keyed_generator(seed, "disturbance")
    sizes = generator.random((num_rows, 1))
    return torch.from_numpy(scale * sizes * generator.standard_normal((num_rows, horizon)))


def demonstrations(starts: Tensor, task: Task, noise: Tensor | None = None) -> SFTBatch:
    """Saturated LQR from starts [B, 2], rounded in the loop: a control sees earlier rounding.

    With `noise` [B, T] the rows hold the disturbed controls, and their labels those LQR wanted;
    ValueError if a control is not one token, for then label and token would not stand in line.
    """
    if noise is not None and task.codec.style != "numbers":
        raise ValueError(f"noise needs the codec style numbers, got {task.codec.style}")
    wanted, applied = disturbed_lqr_controls(
        starts, task.plant, task.cost, task.codec.decimals, noise
    )
    prompts = [encode_prompt(task.tokenizer, state, task.plant, task.codec) for state in starts]
    tokens, mask = _demonstration_rows(prompts, applied, task)
    labels = tokens if noise is None else _demonstration_rows(prompts, wanted, task)[0]
    prompt_length = rearrange(torch.tensor([len(prompt) for prompt in prompts]), "b -> b 1")
    learned = mask & (torch.arange(tokens.shape[1]) >= prompt_length)  # [B, K]
    return SFTBatch(tokens, labels, mask, learned)


def _demonstration_rows(
    prompts: list[list[int]], plans: Tensor, task: Task
) -> tuple[Tensor, Tensor]:
    completions = [encode_completion(task.tokenizer, plan, task.codec) for plan in plans]
    rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    return _pad(rows, pad_id(task.tokenizer), "right")


def _pad(rows: list[list[int]], fill: int, side: str) -> tuple[Tensor, Tensor]:
    pad = partial(pad_sequence, batch_first=True, padding_side=side)
    tokens = pad([torch.tensor(row) for row in rows], padding_value=fill)
    return tokens, pad([torch.ones(len(row), dtype=torch.bool) for row in rows])
