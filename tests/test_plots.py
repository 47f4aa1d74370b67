"""Pictures show the numbers they were given: the drawn lines are read back from the figure."""

import json
import math

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")

from matplotlib.figure import Figure

from minigrpo.plots import (
    plot_error_by_step,
    plot_learning_curve,
    plot_phase_portrait,
    plot_seed_bands,
    plot_time_series,
    read_metrics,
)

COMPONENTS = ["baseline", "progress", "proximity", "terminal", "efficiency"]
COMPONENTS += ["smoothness", "lqr", "constraints", "validity"]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures, save = [], Figure.savefig

    def spy(self, path, **options):
        figures.append(self)
        save(self, path, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    return figures


def flights(num_starts=5, horizon=7):
    generator = torch.Generator().manual_seed(0)
    names = ("lqr", "sft", "grpo")
    states = {n: torch.randn(num_starts, horizon + 1, 2, generator=generator) for n in names}
    controls = {n: torch.randn(num_starts, horizon, generator=generator) for n in names}
    return states, controls


def lines(axis):
    """Named lines of an axis as lists of (x, y)."""
    named = [line for line in axis.get_lines() if not line.get_label().startswith("_")]
    return {line.get_label(): torch.as_tensor(line.get_xydata()) for line in named}


def check_png(path):
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_time_series_draws_each_policy_from_the_same_start(tmp_path, drawn):
    states, controls = flights()
    plot_time_series(tmp_path / "deep/down/time.png", states, controls, 0.1, 1.0, 3.0, num_starts=3)
    check_png(tmp_path / "deep/down/time.png")
    axes = drawn[0].axes  # row by row
    assert len(axes) == 9
    assert [axis.get_ylabel() for axis in axes[::3]] == [
        "position (m)",
        "velocity (m/s)",
        "control (m/s$^2$)",
    ]
    for start in range(3):
        for row in range(2):
            for name, line in lines(axes[3 * row + start]).items():
                expected = states[name.lower()][start, :, row].double()
                assert torch.allclose(line[:, 0], 0.1 * torch.arange(8.0).double())
                assert torch.equal(line[:, 1], expected)
        for name, line in lines(axes[6 + start]).items():
            held = controls[name.lower()][start].double()
            assert torch.equal(line[:-1, 1], held) and line[-1, 1] == held[-1]
        assert axes[6 + start].get_xlabel() == "time (s)"
        assert {line.get_drawstyle() for line in axes[6 + start].get_lines()[2:]} == {"steps-post"}
        position, velocity = states["lqr"][start, 0].tolist()
        assert axes[start].get_title() == f"from {position:.2f} m, {velocity:.2f} m/s"
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["LQR", "SFT", "GRPO"]
    for axis, bound in zip(axes[::3], (1.0, 1.0, 3.0), strict=True):
        marks = [line for line in axis.get_lines() if line.get_linestyle() == ":"]
        assert [line.get_ydata()[0] for line in marks] == [-bound, bound]


def test_fewer_starts_than_columns_are_no_error(tmp_path, drawn):
    states, controls = flights(num_starts=1)
    plot_time_series(tmp_path / "time.png", states, controls, 0.1, 1.0, 3.0)
    assert len(drawn[0].axes) == 3


def test_phase_portrait_has_a_panel_for_each_policy_over_lqr(tmp_path, drawn):
    states, _ = flights()
    plot_phase_portrait(tmp_path / "phase.png", states, 1.0, num_starts=4)
    check_png(tmp_path / "phase.png")
    assert [axis.get_title() for axis in drawn[0].axes] == ["SFT, LQR in grey", "GRPO, LQR in grey"]
    for axis, name in zip(drawn[0].axes, ("sft", "grpo"), strict=True):
        paths = [torch.as_tensor(line.get_xydata()) for line in axis.get_lines()]
        paths = [path for path in paths if len(path) == 8]
        expected = [*states["lqr"][:4].double(), *states[name][:4].double()]
        assert len(paths) == 8
        assert all(torch.equal(*pair) for pair in zip(paths, expected, strict=True))
        marks = [line.get_xydata()[0] for line in axis.get_lines() if line.get_marker() == "o"]
        assert torch.equal(torch.as_tensor(np.stack(marks)), states[name][:4, 0].double())
        assert axis.get_xlabel() == "position (m)"
    assert drawn[0].axes[0].get_ylabel() == "velocity (m/s)"


def test_phase_portrait_of_lqr_alone(tmp_path, drawn):
    plot_phase_portrait(tmp_path / "phase.png", {"lqr": flights()[0]["lqr"]}, 1.0)
    assert len(drawn[0].axes) == 1


def test_error_by_step_is_the_mean_distance(tmp_path, drawn):
    states, _ = flights()
    plot_error_by_step(tmp_path / "error.png", states | {"grpo mpc": states["sft"] / 2}, dt=0.2)
    check_png(tmp_path / "error.png")
    (axis,) = drawn[0].axes
    assert axis.get_yscale() == "log"
    shown = lines(axis)
    looks = {
        line.get_label(): (line.get_color(), line.get_linestyle()) for line in axis.get_lines()
    }
    assert looks == {
        "LQR": ("#000000", "--"),
        "SFT": ("#D55E00", "-"),
        "GRPO": ("#0072B2", "-"),
        "GRPO MPC": ("#0072B2", ":"),  # a policy has its colour in every mode
    }
    assert list(shown) == list(looks)
    for k in range(8):
        mean = sum(math.hypot(*row) for row in states["sft"][:, k].tolist()) / 5
        assert shown["SFT"][k].tolist() == pytest.approx([0.2 * k, mean], rel=1e-6)
        assert shown["GRPO MPC"][k, 1].item() == pytest.approx(mean / 2, rel=1e-6)


def write_metrics(path, num_steps):
    rows = []
    for step in range(num_steps + 1):
        row = {"step": step}
        if step > 0:
            row |= {f"reward/{n}": place + step**2 / 10 for place, n in enumerate(COMPONENTS)}
            row["reward/total"] = sum(row[f"reward/{name}"] for name in COMPONENTS)
        if step % 10 == 0:
            row |= {"eval/greedy_reward": 100.0 + step, "eval/sampled_reward": 90.0 + step}
            row["eval/lqr_reward"] = 133.5
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_learning_curve_draws_what_the_run_logged(tmp_path, drawn):
    write_metrics(tmp_path / "metrics.jsonl", 60)
    plot_learning_curve(tmp_path / "curve.png", tmp_path / "metrics.jsonl")
    check_png(tmp_path / "curve.png")
    rewards, gains = (lines(axis) for axis in drawn[0].axes)
    total = [sum(place + step**2 / 10 for place in range(9)) for step in range(1, 61)]
    smooth = rewards["training, mean of 7 steps"]
    assert smooth[:, 0].tolist() == list(range(4, 58))  # centred
    for step, value in smooth.tolist():
        assert value == pytest.approx(sum(total[int(step) - 4 : int(step) + 3]) / 7)
    evaluated = [[float(step), 100.0 + step] for step in range(0, 61, 10)]
    assert rewards["validation, greedy"].tolist() == evaluated
    assert rewards["validation, sampled"][:, 1].tolist() == [value - 10 for _, value in evaluated]
    assert set(rewards["LQR, 133.5"][:, 1].tolist()) == {133.5}
    raw = [line for line in drawn[0].axes[0].get_lines() if len(line.get_xdata()) == 60]
    assert raw[0].get_ydata().tolist() == total
    assert len(gains) == 9 and all(line[0, 1] == 0 for line in gains.values())
    # lines that start at 0 add up to the gain of the total
    added = sum(line[:, 1] for line in gains.values())
    assert torch.allclose(added, smooth[:, 1] - smooth[0, 1])
    for place, name in enumerate(COMPONENTS):
        first, last = (place + sum(k * k for k in range(k, k + 7)) / 70 for k in (1, 54))
        assert f"{name}  {first:.1f} to {last:.1f}" in gains
    looks = {(line.get_color(), line.get_linestyle()) for line in drawn[0].axes[1].get_lines()}
    assert len(looks) == 9


def test_learning_curve_of_sft_has_no_components(tmp_path, drawn):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "eval/greedy_reward": 1.5, "loss/total": 3.0}\n')
    plot_learning_curve(tmp_path / "curve.png", path)
    (axis,) = drawn[0].axes
    assert lines(axis)["validation, greedy"].tolist() == [[0.0, 1.5]]


def test_seed_bands_are_mean_and_range_over_seeds_up_to_the_shortest(tmp_path, drawn):
    steps = np.array([0.0, 10.0, 20.0])
    seeds = [(steps, np.array([1.0, 5.0, 6.0])), (steps[:2], np.array([3.0, 2.0]))]
    plot_seed_bands(tmp_path / "bands.png", {"grpo": seeds}, 9.0, "step")
    check_png(tmp_path / "bands.png")
    (axis,) = drawn[0].axes
    shown = lines(axis)
    assert shown["grpo"].tolist() == [[0.0, 2.0], [10.0, 3.5]]
    assert set(shown["LQR, 9.0"][:, 1].tolist()) == {9.0}
    corners = {tuple(point) for point in axis.collections[0].get_paths()[0].vertices.tolist()}
    assert {(0.0, 1.0), (0.0, 3.0), (10.0, 2.0), (10.0, 5.0)} <= corners
    assert 0 < axis.get_ylim()[0] < 1  # all of it
    plot_seed_bands(tmp_path / "bands.png", {"grpo": seeds}, 53.0, "step")
    assert drawn[1].axes[0].get_ylim()[0] == 3.0  # what is more than 50 below LQR is cut off


def test_metrics_are_read_without_nulls_and_without_a_line_being_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = ['{"step": 0, "a": 1.0}', '{"step": 1, "a": null, "b": 2}', '{"step": 2, "a": 3.0}']
    path.write_text("\n".join([*whole, '{"ste']))
    series = read_metrics(path)
    assert {name: (s.tolist(), v.tolist()) for name, (s, v) in series.items()} == {
        "a": ([0, 2], [1.0, 3.0]),
        "b": ([1], [2.0]),
    }
    for wrong in (
        "[1]", '{"step": 1, "a": {}}', '{"step": 1, "a": "x"}', '{"step": 1e400}', "\xff"
    ):  # fmt: skip
        path.write_text('{"step": 0}\n' + wrong + "\n", encoding="latin-1")
        with pytest.raises(ValueError, match=r"line 2: must have a step and numbers, got '"):
            read_metrics(path)
