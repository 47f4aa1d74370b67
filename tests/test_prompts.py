"""The codec: round trips, a table of hostile texts, fuzzed texts against a slow parser."""

import re
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.prompts import (
    Codec,
    ParsedControls,
    format_number,
    parse_controls,
    prompt_text,
    render_controls,
    system_text,
    wording,
)

PLANT = DoubleIntegrator()
SMALL = DoubleIntegrator(horizon=3)
NUMBERS, WORDS = Codec(), Codec("words", 3)
CODECS = [NUMBERS, WORDS, Codec("numbers", 1), Codec("words", 6)]


def parse_one(text, plant=SMALL, codec=NUMBERS, ended=True):
    return parse_controls([text], torch.tensor([ended]), plant, codec)


def read_slowly(text, horizon, codec):
    """The numbers of a valid answer or None, character by character and without a pattern."""
    if codec.style == "words":
        if not (text.startswith("<CONTROLS>") and text.endswith("</CONTROLS>")):
            return None
        text = text[len("<CONTROLS>") : -len("</CONTROLS>")]
    words = text.split(" " if codec.style == "numbers" else ", ")
    for word in words:
        whole, point, fraction = (word[1:] if word[:1] == "-" else word).partition(".")
        if not (point and len(fraction) == codec.decimals and 1 <= len(whole) <= 3):
            return None
        if any(digit not in "0123456789" for digit in whole + fraction):
            return None
        if len(whole) > 1 and whole[0] == "0":
            return None
    return [float(word) for word in words] if len(words) == horizon else None


def assert_invalid(parsed):
    assert not parsed.is_valid.any()
    assert torch.equal(parsed.controls, torch.zeros_like(parsed.controls))


@pytest.mark.parametrize("codec", CODECS)
@given(values=st.lists(st.floats(-998, 998), min_size=50, max_size=50))
@settings(max_examples=30, deadline=None)
def test_parse_of_render_is_within_half_a_unit(codec, values):
    controls = torch.tensor(values, dtype=torch.float64)
    parsed = parse_one(render_controls(controls, codec), PLANT, codec)
    assert parsed.is_valid.tolist() == [True]
    assert parsed.controls.dtype == torch.float64
    error = (parsed.controls[0] - controls).abs().max().item()
    assert error <= 0.5 * 10**-codec.decimals * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("codec", CODECS)
def test_rounded_controls_round_trip_to_the_last_bit(codec):
    scale = 10**codec.decimals
    generator = torch.Generator().manual_seed(0)
    units = torch.randint(-4 * scale, 4 * scale, (17, 50), generator=generator).tolist()
    controls = torch.tensor([[unit / scale for unit in row] for row in units], dtype=torch.float64)
    texts = [render_controls(row, codec) for row in controls]
    parsed = parse_controls(texts, torch.ones(17, dtype=torch.bool), PLANT, codec)
    assert parsed.is_valid.all() and torch.equal(parsed.controls, controls)
    assert [render_controls(row, codec) for row in parsed.controls] == texts


def test_the_exact_spelling_of_both_styles():
    controls = torch.tensor([1.2, -0.35, -0.001], dtype=torch.float64)
    assert render_controls(controls, NUMBERS) == "1.20 -0.35 0.00"
    words = "<CONTROLS>1.200, -0.350, -0.001</CONTROLS>"
    assert render_controls(controls, WORDS) == words
    assert parse_one(words, codec=WORDS).controls.tolist() == [[1.2, -0.35, -0.001]]
    assert parse_one("1.20 -0.35 999.99").controls.tolist() == [[1.2, -0.35, 999.99]]  # as written


@pytest.mark.parametrize("value", [-0.0, -0.004, -0.0049999])
def test_a_zero_is_never_written_with_a_sign(value):
    assert format_number(value, 2) == "0.00"
    assert render_controls(torch.tensor([value, value]), NUMBERS) == "0.00 0.00"
    assert prompt_text(torch.tensor([-0.0, -0.0]), PLANT, NUMBERS).count("-") == 0
    assert format_number(-0.0051, 2) == "-0.01"
    assert parse_one("-0.00 0.00 -0.00").controls.tolist() == [[0.0, 0.0, 0.0]]  # but it is read


HOSTILE = [
    "",
    " ",
    "nan nan nan",
    "inf -inf inf",
    "1.00 nan 1.00",
    "1.00 inf 1.00",
    "1.00 1e400 1.00",
    "1.00 1e0 1.00",
    "1.00 --3.00 1.00",
    "1.00 +3.00 1.00",
    "1.00 - 3.00 1.00",
    "1,,2",
    "1.00,,2.00",
    "1.00,2.00,3.00",
    "1.00, 2.00, 3.00",
    "1.00 2.00",
    "1.00 2.00 3.00 4.00",
    "1.00 2.00 3.00 ",
    " 1.00 2.00 3.00",
    "1.00 2.00 3.00\n",
    "1.00 2.00 3.00 \n",
    "1.00  2.00 3.00",
    "1.00\t2.00\n3.00",
    "1.00\u00a02.00 3.00",
    "1 2 3",
    "1.0 2.0 3.0",
    "1.000 2.000 3.000",
    "1. 2. 3.",
    ".50 .50 .50",
    "-.50 1.00 1.00",
    "01.00 2.00 3.00",
    "1000.00 2.00 3.00",
    "1_0.00 2.00 3.00",
    "0x1.00 2.00 3.00",
    "\u0661.\u0660\u0660 2.00 3.00",  # Arabic digits: float and \d take them
    "\uff11.00 2.00 3.00",  # full-width
    "1.\u00b2\u00b2 2.00 3.00",
    "\u22121.00 2.00 3.00",  # minus sign instead of hyphen
    "1.00 2.00 3.00\x00",
    "\ud800 1.00 2.00",
    "controls 1.00 2.00 3.00",
    "1.00 2.00 3.00.",
    "<CONTROLS>1.00 2.00 3.00</CONTROLS>",
    "[1.00 2.00 3.00]",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_invalid_and_zero(text):
    assert_invalid(parse_one(text))


@pytest.mark.parametrize(
    "text",
    [
        "1.000, 2.000, 3.000",
        "<CONTROLS>1.000, 2.000, 3.000",
        "1.000, 2.000, 3.000</CONTROLS>",
        "<CONTROLS></CONTROLS>",
        "<CONTROLS>1.000, 2.000</CONTROLS>",
        "<CONTROLS>1.000, 2.000, 3.000,</CONTROLS>",
        "<CONTROLS>1.000, 2.000, 3.000, 4.000</CONTROLS>",
        "<CONTROLS>1.000,2.000,3.000</CONTROLS>",
        "<CONTROLS>1.000 2.000 3.000</CONTROLS>",
        "<CONTROLS>1.000, , 3.000</CONTROLS>",
        "<CONTROLS>1.00, 2.00, 3.00</CONTROLS>",
        "<CONTROLS>nan, 2.000, 3.000</CONTROLS>",
        "<CONTROLS> 1.000, 2.000, 3.000</CONTROLS>",
        "<controls>1.000, 2.000, 3.000</controls>",
        "Sure! <CONTROLS>1.000, 2.000, 3.000</CONTROLS>",
        "<CONTROLS>1.000, 2.000, 3.000</CONTROLS>\n",
        "<CONTROLS><CONTROLS>1.000, 2.000, 3.000</CONTROLS></CONTROLS>",
    ],
)
def test_hostile_words_are_invalid_and_zero(text):
    assert_invalid(parse_one(text, codec=WORDS))


@pytest.mark.parametrize("codec", CODECS)
def test_only_the_exact_number_of_values_is_valid(codec):
    for num_values in (1, 49, 50, 51, 100):
        parsed = parse_one(render_controls(torch.ones(num_values), codec), PLANT, codec)
        assert parsed.is_valid.tolist() == [num_values == 50]
        assert parsed.controls.abs().sum().item() == 50 * (num_values == 50)


def test_horizon_one_needs_no_separator():
    plant = DoubleIntegrator(horizon=1)
    assert parse_one("0.50", plant).controls.tolist() == [[0.5]]
    assert_invalid(parse_one("0.50 ", plant))


def test_text_that_did_not_end_is_invalid_even_if_complete():
    assert_invalid(parse_one("1.00 2.00 3.00", ended=False))


def test_rows_do_not_mix():
    texts = [
        "1.00 2.00 3.00",
        "1.00 2.00",
        "4.00 5.00 6.00",
        "7.00 8.00 9.00",
        "",
        "0.10 0.20 0.30",
    ]
    ended = torch.tensor([True, True, False, True, True, True])
    parsed = parse_controls(texts, ended, SMALL, NUMBERS)
    assert parsed.is_valid.tolist() == [True, False, False, True, False, True]
    zeros = [0.0, 0.0, 0.0]
    expected = [[1.0, 2.0, 3.0], zeros, zeros, [7.0, 8.0, 9.0], zeros, [0.1, 0.2, 0.3]]
    assert parsed.controls.tolist() == expected


def test_an_empty_or_all_invalid_batch_is_fine():
    empty = parse_controls([], torch.zeros(0, dtype=torch.bool), SMALL, NUMBERS)
    assert empty.controls.shape == (0, 3) and empty.controls.dtype == torch.float64
    assert_invalid(parse_controls(["x", "y"], torch.ones(2, dtype=torch.bool), SMALL, NUMBERS))


def test_a_wrong_number_of_ended_flags_is_our_mistake():
    with pytest.raises(ValueError, match=r"ended must have shape \[2\], got \(3,\)"):
        parse_controls(["a", "b"], torch.ones(3, dtype=torch.bool), SMALL, NUMBERS)
    with pytest.raises(ValueError, match=r"is_valid must have shape \[N\] with N=2"):
        ParsedControls(torch.zeros(2, 3), torch.zeros(3))


# pieces of valid texts in random order come close to the grammar far more often than random text
PIECES = st.sampled_from(
    [
        " ",
        " ",
        " ",
        ", ",
        ", ",
        ",",
        "-",
        "1",
        ".",
        "0",
        "00",
        "\n",
        "\u0661",
        "nan",
        "inf",
        "1e400",
        "1.00",
        "-0.35",
        "0.00",
        "1.200",
        "-0.350",
        "<CONTROLS>",
        "</CONTROLS>",
    ]
)


@pytest.mark.parametrize("codec", [NUMBERS, WORDS])
@given(text=st.one_of(st.text(), st.lists(PIECES, max_size=9).map("".join)), ended=st.booleans())
@settings(max_examples=300, deadline=None)
def test_fuzzed_text_parses_as_the_slow_parser_does(codec, text, ended):
    parsed = parse_one(text, SMALL, codec, ended)
    expected = read_slowly(text, 3, codec) if ended else None
    assert parsed.is_valid.tolist() == [expected is not None]
    assert parsed.controls.tolist() == [expected or [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("codec", [NUMBERS, WORDS])
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_one_edit_of_a_valid_text_parses_as_the_slow_parser_does(codec, data):
    values = data.draw(st.lists(st.floats(-20, 20), min_size=3, max_size=3))
    text = render_controls(torch.tensor(values, dtype=torch.float64), codec)
    assert parse_one(text, SMALL, codec).is_valid.all()
    start = data.draw(st.integers(0, len(text)))
    removed, inserted = data.draw(st.integers(0, 2)), data.draw(st.sampled_from(" ,-.05e\n\u0661<"))
    text = text[:start] + inserted + text[start + removed :]
    expected = read_slowly(text, 3, codec)
    assert parse_one(text, SMALL, codec).controls.tolist() == [expected or [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("codec", [NUMBERS, WORDS])
def test_long_hostile_text_takes_linear_time(codec):
    opening, closing = codec.brackets
    number = format_number(1.0, codec.decimals)
    bodies = [
        "1" * 10**6,
        "-" * 10**6,
        "1." * 10**6,
        " " * 10**6,
        (number + codec.separator) * 10**5,
    ]
    bodies += [codec.separator.join([number] * 49 + ["x"]), number * 10**5]
    texts = [opening + body + closing for body in bodies]
    start = time.process_time()
    assert_invalid(parse_controls(texts, torch.ones(7, dtype=torch.bool), PLANT, codec))
    assert time.process_time() - start < 5  # 0.3 s measured; quadratic would be hours


def test_prompts_state_the_start_exactly():
    start = torch.tensor([0.5, -0.3], dtype=torch.float64)
    assert prompt_text(start, PLANT, NUMBERS) == "position 0.50 velocity -0.30 controls"
    assert prompt_text(start.float(), PLANT, NUMBERS) == "position 0.50 velocity -0.30 controls"
    assert system_text(PLANT, NUMBERS) == ""


def test_every_start_of_the_grid_has_its_own_prompt_and_can_be_read_back():
    grid, lengths = PLANT.start_grid()[:: 161 * 7 + 3], set()
    for start in torch.cat([grid, PLANT.start_grid()[-1:]]):
        _, position, _, velocity, _ = prompt_text(start, PLANT, NUMBERS).split(" ")
        assert [float(position), float(velocity)] == start.tolist()
        text = prompt_text(start, PLANT, WORDS)
        found = re.match(
            r"The position is ([+-][0-9.]+) m and the velocity is ([+-][0-9.]+) m/s", text
        )
        assert found is not None and [float(value) for value in found.groups()] == start.tolist()
        lengths.add(len(text))
    assert len(lengths) == 1  # a sign in any case


def test_words_name_the_facts_of_the_plant():
    plant = DoubleIntegrator(dt=0.25, horizon=37, state_bound=1.5, control_bound=2.5)
    text = prompt_text(torch.tensor([0.1, -0.2], dtype=torch.float64), plant, WORDS)
    for fact in ("0.10 m", "-0.20 m/s", "37", "0.25 s", "-2.5 and 2.5", "-1.5 and 1.5"):
        assert fact in text
    system = system_text(plant, WORDS)
    for fact in ("37 numbers", "3 decimals", "<CONTROLS>1.200, -0.350, ...</CONTROLS>"):
        assert fact in system
    assert text.isascii() and system.isascii()


def test_the_wording_is_what_is_read_at_rest_at_the_origin():
    assert wording(PLANT, NUMBERS) == "position 0.00 velocity 0.00 controls"
    prompt = prompt_text(torch.zeros(2, dtype=torch.float64), PLANT, WORDS)
    assert wording(PLANT, WORDS) == f"{system_text(PLANT, WORDS)}\n{prompt}"


@pytest.mark.parametrize(
    "start", [[0.505, 0.0], [0.0, 0.001], [float("nan"), 0.0], [0.1 + 1.5e-6, 0.0]]
)
def test_a_start_that_text_would_round_is_refused(start):
    with pytest.raises(ValueError, match=r"^initial_state must have 2 decimals, got"):
        prompt_text(torch.tensor(start, dtype=torch.float64), PLANT, NUMBERS)


@pytest.mark.parametrize("shape", [(1,), (3,), (1, 2)])
def test_a_start_that_is_not_two_numbers_is_refused(shape):
    with pytest.raises(ValueError, match=r"^initial_state must have shape \[2\], got \("):
        prompt_text(torch.zeros(shape), PLANT, NUMBERS)


def test_the_prompt_has_the_decimals_of_the_grid_not_of_the_controls():
    plant = DoubleIntegrator(start_bound=0.5, start_decimals=3)
    start = torch.tensor([0.125, -0.5], dtype=torch.float64)
    assert prompt_text(start, plant, NUMBERS) == "position 0.125 velocity -0.500 controls"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e3, 999.0])
def test_controls_that_no_number_can_say_are_refused(value):
    with pytest.raises(ValueError, match=r"^controls must be finite and below 999, got"):
        render_controls(torch.tensor([0.0, value]), NUMBERS)
    with pytest.raises(ValueError, match=r"^controls must have shape \[T\], got \(1, 3\)"):
        render_controls(torch.zeros(1, 3), NUMBERS)


def test_bad_codecs_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^style must be numbers or words, got json"):
        Codec("json")
    for decimals in (0, 7):
        with pytest.raises(ValueError, match=f"^decimals must be between 1 and 6, got {decimals}"):
            Codec(decimals=decimals)
