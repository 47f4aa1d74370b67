"""The codec between numbers and text: wording of the prompt, format of the answer, strict parser.

style     prompt                                   answer
numbers   position 0.50 velocity -0.30 controls    1.20 -0.35 ... 0.00
words     a system and a user message              <CONTROLS>1.200, -0.350, ..., 0.000</CONTROLS>

number = -?(0|[1-9][0-9]{0,2})[.][0-9]{decimals}    ASCII digits; so it is finite and below 1000

A valid answer is exactly `horizon` numbers with exactly these separators, nothing before or after,
and it ended by itself. Wrong text is data, never an exception. The negative zero -0.00 is the one
spelling that is read but never written.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress
from typing import Annotated, Literal

import torch
from torch import Tensor

from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.shapes import check_record, check_shapes

NUMBER_LIMIT = 999  # three digits before the point


@dataclass(frozen=True)
class Codec:
    """How controls become text and back: `numbers` for the tiny model, `words` for chat models."""

    style: Literal["numbers", "words"] = "numbers"
    decimals: int = 2  # of a control

    def __post_init__(self) -> None:
        if self.style not in ("numbers", "words"):
            raise ValueError(f"style must be numbers or words, got {self.style}")
        if not 1 <= self.decimals <= 6:
            raise ValueError(f"decimals must be between 1 and 6, got {self.decimals}")

    @property
    def brackets(self) -> tuple[str, str]:
        """What opens and closes an answer."""
        return ("", "") if self.style == "numbers" else ("<CONTROLS>", "</CONTROLS>")

    @property
    def separator(self) -> str:
        """What stands between two numbers."""
        return " " if self.style == "numbers" else ", "


@dataclass(frozen=True)
class ParsedControls:
    """Controls read from N texts, on the CPU; an invalid row has zeros and stays in its group."""

    controls: Annotated[Tensor, "N T"]  # float64, m/s^2, as written (not saturated)
    is_valid: Annotated[Tensor, "N"]  # bool

    def __post_init__(self) -> None:
        check_record(self)


def format_number(value: float, decimals: int) -> str:
    """The one spelling of a number, in prompts, answers and the tiny model's vocabulary."""
    return f"{value:z.{decimals}f}"  # z: a negative number that rounds to zero loses its sign


def system_text(plant: DoubleIntegrator, codec: Codec) -> str:
    """The system message; empty for the style `numbers`."""
    if codec.style == "numbers":
        return ""
    opening, closing = codec.brackets
    example = codec.separator.join(format_number(u, codec.decimals) for u in (1.2, -0.35))
    return (
        "You steer a double integrator to rest at the origin: in each step you choose its "
        f"acceleration. Answer with {plant.horizon} numbers and nothing else, each with "
        f"{codec.decimals} decimals, in this format: "
        f"{opening}{example}{codec.separator}...{closing}"
    )


def prompt_text(initial_state: Tensor, plant: DoubleIntegrator, codec: Codec) -> str:
    """The prompt (the user message) stating the start [2]; ValueError if text would round it."""
    check_shapes(initial_state=(initial_state, "2"))
    values, decimals = initial_state.tolist(), plant.start_decimals
    if not all(abs(value - round(value, decimals)) < 1e-6 for value in values):  # float32 passes
        raise ValueError(f"initial_state must have {decimals} decimals, got {values}")
    position, velocity = (format_number(value, decimals) for value in values)
    if codec.style == "numbers":
        return f"position {position} velocity {velocity} controls"
    # A sign in any case: prompts of equally many tokens need no padding, and so go once through the
    # model for all rows of a group (`scoring.completion_scores`).
    position, velocity = (f"{value:+z.{decimals}f}" for value in values)
    return (
        f"The position is {position} m and the velocity is {velocity} m/s. Write {plant.horizon} "
        f"accelerations, one for each step of {plant.dt:g} s, that bring both to 0. Each must lie "
        f"between {-plant.control_bound:g} and {plant.control_bound:g} m/s^2, and position and "
        f"velocity must stay between {-plant.state_bound:g} and {plant.state_bound:g}."
    )


def wording(plant: DoubleIntegrator, codec: Codec) -> str:
    """All that a model reads when it starts at rest at the origin: what a checkpoint remembers."""
    origin = torch.zeros(2, dtype=torch.float64)
    return f"{system_text(plant, codec)}\n{prompt_text(origin, plant, codec)}".strip()


def render_controls(controls: Tensor, codec: Codec) -> str:
    """The answer that says controls [T], rounded; ValueError for what no number can say."""
    check_shapes(controls=(controls, "T"))
    values = controls.tolist()
    if not all(abs(value) < NUMBER_LIMIT for value in values):
        raise ValueError(f"controls must be finite and below {NUMBER_LIMIT}, got {values}")
    opening, closing = codec.brackets
    numbers = [format_number(u, codec.decimals) for u in values]
    return opening + codec.separator.join(numbers) + closing


def parse_controls(
    texts: Sequence[str], ended: Tensor, plant: DoubleIntegrator, codec: Codec
) -> ParsedControls:
    """Read N answers; `ended` [N] says which stopped by themselves. Any text is accepted."""
    check_shapes(ended=(ended, str(len(texts))))
    (opening, closing), separator = codec.brackets, codec.separator
    answer = _answer_pattern(codec, plant.horizon)
    matches = [answer.fullmatch(text) is not None for text in texts]
    is_valid = torch.tensor(matches, dtype=torch.bool) & ended.cpu()
    values = [  # of all valid rows; their numbers are well formed, so float can't fail
        [float(u) for u in text.removeprefix(opening).removesuffix(closing).split(separator)]
        for text in compress(texts, is_valid.tolist())
    ]
    controls = torch.zeros(len(texts), plant.horizon, dtype=torch.float64)
    controls[is_valid] = torch.tensor(values, dtype=torch.float64).view(-1, plant.horizon)
    return ParsedControls(controls, is_valid)


@lru_cache
def _answer_pattern(codec: Codec, horizon: int) -> re.Pattern[str]:
    """The whole answer; possessive (+), so linear in the text."""
    number = rf"-?+(?:0|[1-9][0-9]{{0,2}}+)\.[0-9]{{{codec.decimals}}}"
    opening, closing = map(re.escape, codec.brackets)
    return re.compile(f"{opening}(?:{number}{codec.separator}){{{horizon - 1}}}+{number}{closing}")
