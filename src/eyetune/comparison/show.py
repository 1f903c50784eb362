"""A comparison as a table on the terminal, as CSV, and as one picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from eyetune.comparison.words import label
from eyetune.files import write_text
from eyetune.metrics.plots import COLOURS, FAINT, INK, finish_figure, folded, new_figure, plain_axes, save_figure
from eyetune.progress import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COSTS = ("trainable_parameters", "parameters", "seconds", "training_seconds", "images_per_second", "peak_memory")
_DRIFTS = ("cka", "cka_debiased", "cosine_distance")


def terminal_table(content: Mapping[str, Any]) -> Table:
    """A row an arm: the primary metric on every dataset, with its interval on the test split (validation, where there
    is none) and its spread over seeds; parameters, time, memory; how far the features moved."""
    primary, datasets = content["primary"]["metric"], content["datasets"]
    main = "test" if "test" in datasets else datasets[0]
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("")
    many = len(content["seeds"]) > 1
    others = [name for name in datasets if name != main]
    columns = [f"{label(primary)} {main}", "95% interval", *(["± seeds"] if many else [])]
    columns += [*(f"{name}" for name in others), "trained", "time", "images/s", "memory", "CKA", "moved"]
    for column in columns:
        table.add_column(column, justify="right")
    for arm in content["arms"]:
        entry, cost, drift = arm["scores"][main][primary], arm["cost"], arm["drift"] or {}
        spread = [_number(entry["sd"])] if many else []
        rest = [_number(arm["scores"].get(name, {}).get(primary, {}).get("value")) for name in others]
        table.add_row(
            arm["name"],
            _number(entry["value"]),
            _interval(entry["ci"]),
            *spread,
            *rest,
            "-" if cost["trainable_parameters"] is None else f"{cost['trainable_parameters']:,}",
            "-" if cost["training_seconds"] is None else duration(cost["training_seconds"]),
            _number(cost["images_per_second"], 1),
            _bytes(cost["peak_memory"]),
            _number(drift.get("cka_debiased")),
            _number(drift.get("cosine_distance")),
        )
    return table


def legend(content: Mapping[str, Any]) -> list[str]:
    """What the columns of the table are."""
    primary = content["primary"]["metric"]
    count = len(content["seeds"])
    mean = f"mean of {count} seeds; ± their standard deviation; " if count > 1 else ""
    drift = next((arm["drift"] for arm in content["arms"] if arm["drift"]), None)
    lines = [
        f"{label(primary)}: {mean}interval over patients, the trained models held fixed.",
        f"Budget {content['budget']['text']}.",
        "trained: parameters, at the end of training; time: training with its validation, mean of the runs; memory: "
        "the most in any run.",
    ]
    if drift:
        lines.append(
            f"CKA (debiased) and moved (mean cosine distance): features of {drift['images']} {drift['split']} images "
            "before and after training; 1 and 0 = as published."
        )
    return lines


def write_csv(path: Path, content: Mapping[str, Any]) -> None:
    """A row an arm: every metric of every dataset (value, interval, spread over seeds), costs, drift."""
    header = ["arm", "strategy", "backbone", "seeds"]
    fields = [(name, metric) for name in content["datasets"] for metric in content["metrics"]]
    for name, metric in fields:
        header += [f"{name}_{metric}{part}" for part in ("", "_low", "_high", "_sd")]
    header += [*_COSTS, *_DRIFTS]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for arm in content["arms"]:
        row = [arm["name"], arm["strategy"], arm["backbone"], " ".join(map(str, arm["seeds"]))]
        for name, metric in fields:
            entry = arm["scores"].get(name, {}).get(metric, {})
            low, high = entry.get("ci") or (None, None)
            row += [_cell(value) for value in (entry.get("value"), low, high, entry.get("sd"))]
        row += [_cell(arm["cost"][name]) for name in _COSTS]
        row += [_cell((arm["drift"] or {}).get(name)) for name in _DRIFTS]
        writer.writerow(row)
    write_text(path, text.getvalue())


def picture(path: Path, content: Mapping[str, Any]) -> None:
    """One row an arm. On the left the primary metric on each dataset: the mean with its interval, a ring a seed. To the
    right, what it cost and how far the features moved."""
    arms = content["arms"]
    names = [folded(arm["name"], 26, 2) for arm in arms]
    columns = [
        ("parameters trained", [arm["cost"]["trainable_parameters"] for arm in arms], _count),
        ("training time", [arm["cost"]["training_seconds"] for arm in arms], duration),
        ("peak memory", [arm["cost"]["peak_memory"] for arm in arms], _bytes),
        ("features moved\n(cosine distance)", [(arm["drift"] or {}).get("cosine_distance") for arm in arms], _number),
    ]
    columns = [one for one in columns if any(value is not None for value in one[1])]
    datasets = [name for name in ("test", "val") if name in content["datasets"]]
    datasets += [name for name in content["datasets"] if name not in datasets]
    figure = new_figure(5.4 + 1.75 * len(columns), 1.5 + max(1.0, 0.34 + 0.16 * len(datasets)) * len(arms))
    grid: Any = figure.subplots(1, 1 + len(columns), sharey=True, width_ratios=[3.2, *[1.0] * len(columns)])
    axes = list(grid) if columns else [grid]
    _scores(axes[0], content, datasets)
    axes[0].set_yticks(range(len(arms)), names)
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    for place, (title, values, text) in zip(axes[1:], columns, strict=True):
        _bars(place, title, values, text)
    finish_figure(figure, axes[0], "")
    save_figure(figure, path)


def _scores(axes: Axes, content: Mapping[str, Any], datasets: Sequence[str]) -> None:
    primary = content["primary"]["metric"]
    step = 0.62 / max(len(datasets), 1)
    for number, dataset in enumerate(datasets):
        colour = COLOURS[number % len(COLOURS)]
        shown = f"{dataset} (classes joined)" if dataset in content["joined"] else dataset
        for row, arm in enumerate(content["arms"]):
            entry = arm["scores"].get(dataset, {}).get(primary, {})
            if entry.get("value") is None:
                continue
            y = row + step * (number - (len(datasets) - 1) / 2)
            low, high = entry["ci"]
            if low is not None:
                axes.plot([low, high], [y, y], color=colour, linewidth=1.8, solid_capstyle="butt")
            seeds = list(entry["by_seed"].values())
            if len(seeds) > 1:
                axes.scatter(seeds, [y] * len(seeds), s=26, facecolors="none", edgecolors=colour, linewidths=0.9)
            axes.scatter([entry["value"]], [y], s=34, color=colour, zorder=3, label=shown)
            shown = "_nolegend_"
    axes.set_xlabel(f"{label(primary)}, 95% interval over patients")
    plain_axes(axes)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=min(4, len(datasets)), frameon=False, fontsize=9)


def _bars(axes: Axes, title: str, values: Sequence[float | None], text: Any) -> None:
    most = max((value for value in values if value is not None), default=0) or 1
    for row, value in enumerate(values):
        axes.barh(row, value or 0, height=0.5, color="#c9d6df")
        axes.text(most * 0.03, row, "-" if value is None else text(value), va="center", fontsize=8.5, color=INK)
    axes.set_xlim(0, most * 1.15)
    axes.set_xticks([])
    axes.set_xlabel(title, fontsize=9)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(FAINT)
    axes.tick_params(axis="y", length=0)


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _interval(ends: Sequence[float | None]) -> str:
    low, high = ends
    return "-" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _bytes(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def _count(value: float) -> str:
    for size, sign in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{sign}"
    return f"{value:.0f}"


def _cell(value: float | None) -> str:
    return "" if value is None else repr(value)
