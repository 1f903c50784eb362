"""Pictures of how far probabilities can be believed: reliability diagrams, risk against coverage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eyetune.metrics.plots import COLOURS, FAINT, INK, finish_figure, new_figure, plain_axes, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKS = {"before": "before", "after": "after calibration"}


def reliability(found: Mapping[str, Any], path: Path, *, title: str = "") -> None:
    """Draw reliability diagrams, before and after calibration, to the PNG file `path`: in each bin of certainty the
    share that was right, with its 95% interval, and below how many images the bin has.

    Args:
        found: a dataset of metrics.json; its `reliability` has `before` and, where there is a calibration, `after`.
        title: a line above, for example the dataset's name.
    """
    shown = [name for name in _MARKS if name in found["reliability"]]
    figure = new_figure(0.6 + 4.4 * len(shown), 5.6)
    grid = figure.subplots(2, len(shown), sharex=True, squeeze=False, height_ratios=[4, 1])
    for place, name in enumerate(shown):
        upper, lower = grid[0, place], grid[1, place]
        rows = found["reliability"][name]
        _draw_diagram(upper, rows, COLOURS[place])
        ece = found["metrics" if name == "before" else "calibrated_metrics"]["ece"]["value"]
        upper.set_title(f"{_MARKS[name]}: ECE {ece:.3f}", fontsize=10, loc="left")
        _draw_counts(lower, rows, COLOURS[place])
        if place == 0:
            note = "dotted: what was said came true\nbars: 95% intervals"
            upper.text(0.03, 0.97, note, transform=upper.transAxes, va="top", fontsize=8, color=INK)
            upper.set_ylabel("Share that was right")
            lower.set_ylabel("Images")
        lower.set_xlabel("Probability of the most probable class")
    if title:
        figure.suptitle(title, x=0.02, ha="left", fontsize=12)
    figure.set_facecolor("white")
    save_figure(figure, path)


def _draw_diagram(axes: Axes, rows: Sequence[Mapping[str, Any]], colour: str) -> None:
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=(0, (2, 2)))
    x = np.array([row["confidence"] for row in rows])
    y = np.array([row["accuracy"] for row in rows])
    ends = np.array([row["ci"] for row in rows]).reshape(-1, 2)
    axes.vlines(x, ends[:, 0], ends[:, 1], color=colour, linewidth=1.6, alpha=0.6)
    axes.plot(x, y, color=colour, marker="o", markersize=5, linewidth=1.2)
    axes.set(xlim=(0, 1.02), ylim=(-0.02, 1.02))
    plain_axes(axes)


def _draw_counts(axes: Axes, rows: Sequence[Mapping[str, Any]], colour: str) -> None:
    for row in rows:
        width = row["high"] - row["low"]
        middle = row["low"] + width / 2
        axes.bar(middle, row["n"], 0.9 * width, color=colour, alpha=0.7)
        axes.annotate(
            f"{row['n']}",
            (middle, row["n"]),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=6.5,
            color=INK,
        )
    axes.margins(y=0.3)
    axes.set_yticks([])
    plain_axes(axes)
    axes.spines["left"].set_visible(False)


def risk_coverage(selective: Mapping[str, Any], path: Path, *, title: str = "") -> None:
    """Draw the risk-coverage curve to the PNG file `path`.

    Args:
        selective: `selective` of a dataset in metrics.json.
        title: a line above, for example the dataset's name.
    """
    figure = new_figure(6.4, 4.6)
    axes = figure.add_subplot()
    error = selective["aurc_of_chance"]
    axes.axhline(error, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)), label=f"keeping at random: {error:.1%}")
    x = [point["coverage"] for point in selective["curve"]]
    y = [point["risk"] for point in selective["curve"]]
    value, ends = selective["aurc"]["value"], selective["aurc"]["ci"]
    interval = "" if None in ends else f" ({ends[0]:.3f} to {ends[1]:.3f})"
    axes.plot(x, y, color=COLOURS[0], linewidth=2, label=f"keeping the surest first: AURC {value:.3f}{interval}")
    for place, (coverage, entry) in enumerate(selective["error_at"].items()):
        low, high = entry["ci"]
        colour = COLOURS[1 + place]
        if low is not None:
            axes.vlines(float(coverage), low, high, color=colour, linewidth=2)
        label = f"error at {float(coverage):.0%} coverage: {entry['value']:.1%}"
        axes.plot([float(coverage)], [entry["value"]], color=colour, marker="o", linestyle="", label=label)
    tops = [entry["ci"][1] for entry in selective["error_at"].values() if entry["ci"][1] is not None]
    axes.set(xlim=(0, 1.02), ylim=(0, max(0.02, 1.1 * max([*y, error, *tops]))))
    axes.set(xlabel="Coverage: share of images kept", ylabel="Risk: share of wrong calls among them")
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    plain_axes(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=9, frameon=False)
    finish_figure(figure, axes, title)
    save_figure(figure, path)
