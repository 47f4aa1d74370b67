"""check_shapes: bindings by hand, and messages with expectation and got."""

import importlib
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated
from unittest import mock

import pytest
import torch

import minigrpo
from minigrpo.shapes import check_record, check_shapes


def test_letters_bind_to_sizes_across_tensors():
    sizes = check_shapes(
        states=(torch.zeros(3, 8, 2), "N T+1 2"),
        controls=(torch.zeros(3, 7), "N T"),
        scalar=(torch.zeros(()), ""),
        empty=(torch.zeros(0, 3), "M N"),
    )
    assert sizes == {"N": 3, "T": 7, "M": 0}


def test_a_sum_may_come_after_or_before_its_letter():
    check_shapes(controls=(torch.zeros(7), "T"), states=(torch.zeros(8), "T+1"))
    with pytest.raises(ValueError, match=r"^states must have shape \[T\+1\] with T=7, got \(7,\)$"):
        check_shapes(controls=(torch.zeros(7), "T"), states=(torch.zeros(7), "T+1"))
    with pytest.raises(ValueError, match=r"^controls must have shape \[T\] with T=7, got \(8,\)$"):
        check_shapes(states=(torch.zeros(8), "T+1"), controls=(torch.zeros(8), "T"))


def test_the_message_says_what_was_expected_and_what_came():
    message = r"^advantages must have shape \[N\] with N=8, got \(4,\)$"
    with pytest.raises(ValueError, match=message):
        check_shapes(mask=(torch.zeros(8, 5), "N C"), advantages=(torch.zeros(4), "N"))


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ((3,), "N 2"),  # a dimension too few
        ((3, 2, 1), "N 2"),  # and too many
        ((3, 3), "N 2"),  # a fixed size
        ((3, 5), "N N"),  # one letter, two sizes
        ((0,), "T+1"),  # no size of T fits
        ((1,), ""),
    ],
)
def test_a_misfit_in_a_single_tensor_raises(size, shape):
    with pytest.raises(ValueError, match=r"^x must have shape "):
        check_shapes(x=(torch.zeros(size), shape))


def test_bindings_of_one_call_do_not_reach_the_next():
    assert check_shapes(x=(torch.zeros(3), "N")) == {"N": 3}
    assert check_shapes(x=(torch.zeros(5), "N")) == {"N": 5}


@dataclass(frozen=True)
class Flight:
    states: Annotated[torch.Tensor, "N T+1 2"]
    controls: Annotated[torch.Tensor | None, "N T"]
    seconds: float = 0.1

    def __post_init__(self):
        check_record(self, costs=(torch.zeros(3), "N"))


def test_a_record_has_its_shapes_in_its_annotations():
    Flight(torch.zeros(3, 8, 2), torch.zeros(3, 7))
    Flight(torch.zeros(3, 8, 2), None)
    message = r"^Flight: controls must have shape \[N, T\] with N=3, T=7, got"
    with pytest.raises(ValueError, match=message):
        Flight(torch.zeros(3, 8, 2), torch.zeros(3, 8))
    with pytest.raises(
        ValueError, match=r"^Flight: costs must have shape \[N\] with N=4, got \(3,\)$"
    ):
        Flight(torch.zeros(4, 8, 2), torch.zeros(4, 7))


def records() -> list[type]:
    """All of the package that have shapes in their annotations."""
    paths = sorted(Path(minigrpo.__path__[0]).glob("*.py"))
    names = [path.stem for path in paths if "Annotated[Tensor" in path.read_text()]
    modules = [importlib.import_module(f"minigrpo.{name}") for name in names]
    here = [kind for m in modules for kind in vars(m).values() if is_dataclass(kind)]
    kinds = dict.fromkeys(kind for kind in here if "Annotated[" in str(kind.__annotations__))
    return list(kinds)


@pytest.mark.parametrize("kind", records(), ids=lambda kind: kind.__name__)
def test_no_record_of_the_package_takes_a_tensor_of_another_shape(kind):
    """Which has five dimensions; the other fields are 1 where they are numbers."""
    values = {}
    for field in fields(kind):
        has_shape, is_number = "Annotated[" in str(field.type), field.type in (int, "int")
        other = 1 if is_number else mock.Mock()
        values[field.name] = torch.zeros(1, 1, 1, 1, 1) if has_shape else other
    with pytest.raises(ValueError, match=f"^{kind.__name__}: [a-z_]+ must have shape"):
        kind(**values)


def test_the_records_of_the_package_are_found():
    names = {kind.__name__ for kind in records()}
    assert {"Plans", "ChoiceValues", "SFTBatch", "Completions", "Trajectories", "Rollout"} <= names
