"""Pictures of trajectories and of a run's learning curve, each a PNG; matplotlib is optional.

Policies come as mappings from a name to states [K, T+1, 2] (m, m/s) or controls [K, T] (m/s^2), all
from the same starts in the same order. A name is a policy, or a policy and a mode: "lqr", "sft",
"grpo mpc". Colours are Okabe and Ito's, which colour-blind readers tell apart.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"lqr": "#000000", "sft": "#D55E00", "grpo": "#0072B2"}
COLOURS |= {"baseline": COLOURS["sft"], "model": COLOURS["grpo"]}  # two of one stage
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
Series = tuple[np.ndarray, np.ndarray]  # steps and values of one metric


def plot_time_series(
    path: Path,
    states: Mapping[str, Tensor],
    controls: Mapping[str, Tensor],
    dt: float,
    state_bound: float,
    control_bound: float,
    num_starts: int = 3,
) -> None:
    """Position, velocity and control against time from the first starts, one column a start."""
    first = next(iter(states.values()))
    columns = min(num_starts, len(first))
    times = dt * np.arange(first.shape[1])  # [T+1] s
    labels = ("position (m)", "velocity (m/s)", "control (m/s$^2$)")
    bounds = (state_bound, state_bound, control_bound)
    with _picture(path, 3, columns, (3.3 * columns + 0.8, 6.8)) as (figure, axes):
        for row, label, bound in zip(axes, labels, bounds, strict=True):
            row[0].set_ylabel(label)
            for axis in row:
                _mark(axis.axhline, bound)
        for column in range(columns):
            for name, policy in states.items():
                _draw(axes[0][column], name, times, policy[column, :, 0].numpy())
                _draw(axes[1][column], name, times, policy[column, :, 1].numpy())
                held = controls[name][column].numpy()  # a control holds until the next one
                _draw(axes[2][column], name, times, np.append(held, held[-1]), "steps-post")
            position, velocity = first[column, 0].tolist()
            axes[0][column].set_title(f"from {position:z.2f} m, {velocity:z.2f} m/s")
            axes[2][column].set_xlabel("time (s)")
        handles, names = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=len(names))


def plot_phase_portrait(
    path: Path, states: Mapping[str, Tensor], state_bound: float, num_starts: int = 16
) -> None:
    """Velocity against position, one panel a policy, LQR's paths in grey behind each."""
    names = [name for name in states if name != "lqr"] or ["lqr"]
    with _picture(path, 1, len(names), (4.2 * len(names) + 0.3, 4.3)) as (_, axes):
        for axis, name in zip(axes[0], names, strict=True):
            _mark(axis.axhline, state_bound)
            _mark(axis.axvline, state_bound)
            if "lqr" in states:
                for flown in states["lqr"][:num_starts]:
                    axis.plot(flown[:, 0], flown[:, 1], color="#c8c8c8", linewidth=3.0)
            for flown in states[name][:num_starts]:
                axis.plot(flown[:, 0], flown[:, 1], color=_colour(name), linewidth=1.2)
                axis.plot(*flown[0].tolist(), marker="o", markersize=3.5, color=_colour(name))
            axis.set_title(name.upper() + (", LQR in grey" if "lqr" in states else ""))
            axis.set_xlabel("position (m)")
            axis.locator_params(axis="x", nbins=6)
        axes[0][0].set_ylabel("velocity (m/s)")


def plot_error_by_step(path: Path, states: Mapping[str, Tensor], dt: float) -> None:
    """Mean distance from rest over all starts at each step, on a log scale."""
    with _picture(path, 1, 1, (6.4, 4.2)) as (_, [[axis]]):
        for name, policy in states.items():
            distances = policy.norm(dim=2).mean(dim=0)  # [T+1]
            _draw(axis, name, dt * np.arange(len(distances)), distances.numpy())
        axis.set_yscale("log")
        axis.set_xlabel("time (s)")
        axis.set_ylabel("mean distance from rest, $|(x, v)|$ (m, m/s)")
        axis.legend()


def plot_learning_curve(path: Path, metrics: Path) -> None:
    """Reward against step from a run's metrics.jsonl and, where logged, each component's gain."""
    series = read_metrics(metrics)
    components = [k for k in series if k.startswith("reward/") and k != "reward/total"]
    panels = 2 if components else 1
    with _picture(path, 1, panels, (6.0 * panels, 4.2), share_rows=False) as (_, [axes]):
        _draw_rewards(axes[0], series)
        if components:
            _draw_gains(axes[1], {name: series[name] for name in components})
        for axis in axes:
            axis.set_xlabel("step")


def plot_seed_bands(
    path: Path, curves: Mapping[str, Sequence[Series]], lqr_reward: float, horizontal: str
) -> None:
    """Reward curves: the mean over the seeds of each name, and the range between them shaded.

    From 50 points below LQR on.
    """
    with _picture(path, 1, 1, (7.2, 4.4)) as (figure, [[axis]]):
        for place, (name, seeds) in enumerate(curves.items()):
            length = min(len(values) for _, values in seeds)
            steps = np.mean([steps[:length] for steps, _ in seeds], axis=0)
            values = np.stack([values[:length] for _, values in seeds])  # [seeds, length]
            colour = PALETTE[place % len(PALETTE)]
            axis.plot(steps, values.mean(axis=0), color=colour, label=name)
            lowest, highest = values.min(axis=0), values.max(axis=0)
            axis.fill_between(steps, lowest, highest, color=colour, alpha=0.2)
        label = f"LQR, {lqr_reward:.1f}"  # of these starts: another number on others
        axis.axhline(lqr_reward, color="#000000", linewidth=1.2, linestyle="--", label=label)
        # A model that is not yet well-formed has a reward near 0: that rise would fill the picture.
        axis.set_ylim(bottom=max(axis.get_ylim()[0], lqr_reward - 50))
        axis.set_xlabel(horizontal)
        axis.set_ylabel("reward (points)")
        figure.legend(loc="outside upper center", ncols=2)


def read_metrics(path: Path) -> dict[str, Series]:
    """Each metric's steps and values, without those that were not finite (null)."""
    steps, values = defaultdict[str, list[int]](list), defaultdict[str, list[float]](list)
    # The rest of the text is a line being written.
    whole_lines = path.read_text(errors="replace").split("\n")[:-1]
    for place, text in enumerate(whole_lines, start=1):
        try:
            row = json.loads(text)
            step = int(row.pop("step"))
            numbers = {name: float(value) for name, value in row.items() if value is not None}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            found = f"{path}, line {place}: must have a step and numbers, got {text[:200]!r}"
            raise ValueError(found) from None
        for name, value in numbers.items():
            steps[name].append(step)
            values[name].append(value)
    return {name: (np.array(steps[name]), np.array(values[name])) for name in steps}


def _draw_rewards(axis: Axes, series: dict[str, Series]) -> None:
    if "reward/total" in series:
        raw = series["reward/total"]
        axis.plot(*raw, color="#c5c5c5", linewidth=0.8)
        label = f"training, mean of {_window(raw)} steps"
        axis.plot(*_smooth(raw), color="#666666", label=label)
    for key, colour, label in (
        ("eval/sampled_reward", "#D55E00", "validation, sampled"),
        ("eval/greedy_reward", "#0072B2", "validation, greedy"),
    ):
        if key in series:
            axis.plot(*series[key], color=colour, marker="o", markersize=3.5, label=label)
    if "eval/lqr_reward" in series:
        height = float(series["eval/lqr_reward"][1][-1])
        label = f"LQR, {height:.1f}"
        axis.axhline(height, color="#000000", linewidth=1.2, linestyle="--", label=label)
    axis.set_ylabel("reward (points)")
    axis.legend(loc="best")


def _draw_gains(axis: Axes, components: dict[str, Series]) -> None:
    """Moving averages minus their first value: the lines add up to the gain of the total."""
    smooth = {name: _smooth(series) for name, series in components.items()}
    order = sorted(smooth, key=lambda name: smooth[name][1][0] - smooth[name][1][-1])
    for place, name in enumerate(order):
        steps, values = smooth[name]
        label = f"{name.removeprefix('reward/')}  {values[0]:z.1f} to {values[-1]:z.1f}"
        colour, dashes = PALETTE[place % len(PALETTE)], "-" if place < len(order) / 2 else "--"
        axis.plot(steps, values - values[0], color=colour, linestyle=dashes, label=label)
    axis.set_ylabel("gain since the start of the run (points)")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title="first to last mean")


def _window(series: Series) -> int:
    return 2 * min(5, len(series[1]) // 20) + 1


def _smooth(series: Series) -> Series:
    """Centred moving average, which does not lag behind the validation points; without ends."""
    steps, values = series
    window = _window(series)
    side = window // 2
    mean = np.convolve(values, np.full(window, 1 / window), mode="valid")
    return steps[side : len(steps) - side], mean


def _colour(name: str) -> str:
    return COLOURS.get(name.partition(" ")[0], "#009E73")


def _draw(
    axis: Axes, name: str, times: np.ndarray, values: np.ndarray, drawstyle: str = "default"
) -> None:
    """One policy's line; the expert is thin, dashed and on top, so that it stays visible."""
    axis.plot(
        times,
        values,
        label=name.upper(),
        color=_colour(name),
        linestyle="--" if name == "lqr" else ":" if " " in name else "-",
        linewidth=1.3 if name == "lqr" else 1.7,
        zorder=3 if name == "lqr" else 2,
        drawstyle=drawstyle,
    )


def _mark(draw: Callable[..., object], bound: float) -> None:
    for side in (-bound, bound):
        draw(side, color="#888888", linewidth=0.8, linestyle=":")


@contextmanager
def _picture(
    path: Path, rows: int, columns: int, size: tuple[float, float], share_rows: bool = True
) -> Iterator[tuple[Figure, list[list[Axes]]]]:
    """A figure and its grid of axes, saved as PNG afterwards; no pyplot, so no global state."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {
            "font.size": 10,
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#ebebeb",
            "legend.frameon": False,
        }
    ):
        figure = Figure(figsize=size, layout="constrained")
        sharey: Literal["row", "none"] = "row" if share_rows else "none"
        axes = figure.subplots(rows, columns, squeeze=False, sharex="all", sharey=sharey)
        yield figure, axes.tolist()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
