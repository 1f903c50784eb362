"""Forest plots: a metric in each group of a column, with its interval, beside the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eyetune.metrics.plots import COLOURS, FAINT, INK, finish_figure, folded, new_figure, plain_axes, save_figure


def forest(
    found: Mapping[str, Any], whole: Mapping[str, Any], names: Sequence[str], path: Path, *, title: str = ""
) -> None:
    """Draw the groups of a column to the PNG file `path`: a panel a metric, a row a group, its 95% interval a line.

    Args:
        found: what :func:`eyetune.metrics.subgroups.subgroups` returned.
        whole: `metrics` of the whole dataset: drawn as a band behind, and its value as a line.
        names: the metrics to draw; those without a value in any group are left out.
        title: a line above.
    """
    groups: Mapping[str, Any] = found["groups"]
    shown = [name for name in names if any(_value(entry["metrics"], name) is not None for entry in groups.values())]
    height = 1.5 + 0.42 * len(groups)
    figure = new_figure(3.2 + 3.0 * max(1, len(shown)), height)
    grid = figure.subplots(1, max(1, len(shown)), sharey=True, squeeze=False)[0]
    labels = [_label(name, entry) for name, entry in groups.items()]
    for panel, name in zip(grid, shown, strict=False):
        low, high = (whole.get(name) or {}).get("ci") or (None, None)
        if low is not None and high is not None:
            panel.axvspan(low, high, color=COLOURS[0], alpha=0.12, linewidth=0)
        if (value := _value(whole, name)) is not None:
            panel.axvline(value, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)))
        for row, entry in enumerate(groups.values()):
            value = _value(entry["metrics"], name)
            if value is None:
                continue
            low, high = entry["metrics"][name]["ci"]
            if low is not None and high is not None:
                panel.plot([low, high], [row, row], color=COLOURS[0], linewidth=2.2, solid_capstyle="butt")
            panel.plot([value], [row], color=INK, marker="o", markersize=5.5, linestyle="")
        panel.set_xlabel(folded(name.replace("_", " "), 26))
        panel.grid(axis="x", color="#e6e6e6", linewidth=0.7)
        panel.set_axisbelow(True)
        plain_axes(panel)
        panel.tick_params(axis="y", length=0)
    grid[0].set_yticks(range(len(labels)), labels)
    grid[0].set_ylim(len(labels) - 0.4, -0.6)
    if not shown:
        grid[0].text(0.5, 0.5, "no group is large enough", ha="center", va="center", transform=grid[0].transAxes)
        grid[0].set_xticks([])
    finish_figure(figure, grid[0], title)
    save_figure(figure, path)


def _value(metrics: Mapping[str, Any], name: str) -> float | None:
    value: float | None = (metrics.get(name) or {}).get("value")
    return value


def _label(name: str, entry: Mapping[str, Any]) -> str:
    small = "\ntoo small" if "too_small" in entry else ""
    return f"{folded(name, 24)}\n(n = {entry['n']}){small}" if small else f"{folded(name, 24)} (n = {entry['n']})"
