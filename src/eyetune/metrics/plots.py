"""Pictures of scores: PNG through matplotlib's objects, without pyplot and its global state (safe in any thread)."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eyetune import files
from eyetune.metrics.labels import LabelOutcomes
from eyetune.metrics.outcomes import Curve, Outcomes, ratio
from eyetune.metrics.predictions import LabelPredictions, Predictions
from eyetune.metrics.scores import METRICS, better, is_graded_dr, referable_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 200

# Okabe & Ito (2008), told apart with every common colour blindness; without its yellow, which is lost on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)))
MAX_CURVES = len(COLOURS) * len(DASHES)
INK, FAINT = "#222222", "#8a8a8a"

# Tried in turn for signs the font that comes with matplotlib lacks, where the machine has them.
FALLBACK_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei")

# Drawn beside the metric that chooses the best epoch, when the history has them.
COMPANIONS = ("qwk", "auroc_macro", "f1_macro", "balanced_accuracy", "accuracy", "r2", "pearson", "ccc")


def confusion_matrix(matrix: Any, classes: Sequence[str], path: Path, *, title: str = "") -> None:
    """Draw a confusion matrix to the PNG file `path`: in every cell the count and its share of the row.

    Args:
        matrix: int[K, K], rows = truth, columns = prediction (`confusion_matrix` of metrics.json).
        classes: K names.
        title: a line above, for example the dataset's name.
    """
    counts = np.asarray(matrix, dtype=np.int64)
    k, totals = len(classes), counts.sum(axis=1)
    shares = ratio(counts, np.repeat(totals[:, None], k, axis=1))
    written = k <= 24  # more classes than that: the colours alone
    cell = float(np.clip(9.0 / k, 0.62, 1.25 if k > 2 else 1.7)) if written else 0.32
    figure = new_figure(cell * k + 2.8, cell * k + 1.9)
    axes = figure.add_subplot()
    image = axes.imshow(np.ma.masked_invalid(shares), cmap="Blues", vmin=0, vmax=1)
    axes.set_facecolor("#eeeeee")  # rows without examples
    if written:
        size = float(np.clip(9.5 * cell, 5.5, 11))
        for row, column in np.ndindex(k, k):
            text = f"{counts[row, column]}\n{_percent(float(shares[row, column]))}" if totals[row] else "–"
            # 0.55: where white and dark ink read equally well on these blues.
            ink = "white" if shares[row, column] > 0.55 else INK
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=ink, linespacing=1.3)
    width, lines = (20, 4) if k == 2 else (18, 3) if k <= 5 else (18, 2) if written else (18, 1)
    # Upright below wide cells; slanted where neighbours would run into each other.
    slanted = k > 6 or (k > 2 and max(map(len, classes)) > 9)
    axes.set_xticks(range(k), [folded(name, width, lines) for name in classes])
    axes.tick_params(axis="x", rotation=40 if slanted else 0)
    if slanted:
        for tick in axes.get_xticklabels():
            tick.set(ha="right", rotation_mode="anchor")
    gap = "\n" if written else " "
    rows = [f"{folded(name, width, lines)}{gap}(n = {n})" for name, n in zip(classes, totals, strict=True)]
    axes.set_yticks(range(k), rows)
    axes.set(xlabel="Predicted", ylabel="True")
    axes.set_xticks(np.arange(k + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(k + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=28, label="Share of the true class")
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    bar.outline.set_visible(False)
    finish_figure(figure, axes, title)
    save_figure(figure, path)


def roc(predictions: Predictions, path: Path, *, title: str = "", graded: bool | None = None) -> None:
    """Draw ROC curves to the PNG file `path`: each class against the rest (of two classes, the second one), and for
    the grades of diabetic retinopathy referable (grade >= 2) against less.

    Args:
        predictions: rows with an unknown target are left out; a class without examples is named as such.
        title: a line above, for example the dataset's name.
        graded: the classes are the five grades; None = by is_graded_dr.
    """
    classes = predictions.classes
    outcomes = Outcomes.of_table(predictions)
    shown = [1] if len(classes) == 2 else list(range(len(classes)))
    if len(shown) > MAX_CURVES:
        shown = sorted(np.argsort(-outcomes.support, kind="stable")[:MAX_CURVES].tolist())
    figure = new_figure(*((6.2, 5.6) if len(shown) == 1 else (8.6, 5.6)))
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=(0, (2, 2)), label="chance")
    for position, k in enumerate(shown):
        _draw_curve(
            axes,
            outcomes.curves[k],
            folded(classes[k], 26),
            color=COLOURS[position % len(COLOURS)],
            linestyle=DASHES[position // len(COLOURS)],
            linewidth=1.8,
        )
    if is_graded_dr(classes) if graded is None else graded:
        _draw_curve(axes, referable_curve(outcomes), "referable (grade ≥ 2)", color=INK, linewidth=2.8)
    axes.set(xlabel="1 − specificity", ylabel="Sensitivity", xlim=(-0.015, 1.015), ylim=(-0.015, 1.015), aspect="equal")
    plain_axes(axes)
    handles, labels = axes.get_legend_handles_labels()
    handles, labels = [*handles[1:], handles[0]], [*labels[1:], labels[0]]
    if len(shown) == 1:
        axes.legend(handles, labels, loc="lower right", fontsize=9, framealpha=0.9, title="AUROC", alignment="left")
    else:
        which = "each class" if len(shown) == len(classes) else f"the {MAX_CURVES} most frequent classes"
        axes.legend(
            handles,
            labels,
            loc="center left",
            bbox_to_anchor=(1.02, 0.5),
            fontsize=9 if len(shown) <= 8 else 7.5,
            frameon=False,
            title=f"AUROC, {which} against the rest",
            alignment="left",
            handlelength=2.6,
        )
    finish_figure(figure, axes, title)
    save_figure(figure, path)


def roc_of_labels(table: LabelPredictions, path: Path, *, title: str = "") -> None:
    """Draw the ROC curve of every label, having it against not, to the PNG file `path`; of very many the most frequent.

    Args:
        table: cells that are not known are left out; a label that has only one side is named as such.
        title: a line above, for example the dataset's name.
    """
    outcomes = LabelOutcomes.of_table(table)
    names = table.labels
    shown = sorted(np.argsort(-outcomes.support, kind="stable")[:MAX_CURVES].tolist())
    curves = {folded(names[k], 26): outcomes.curves[k] for k in shown}
    which = "each label" if len(shown) == len(names) else f"the {MAX_CURVES} most frequent labels"
    _roc_picture(curves, path, f"AUROC, {which}", title)


def _roc_picture(curves: Mapping[str, Curve], path: Path, heading: str, title: str) -> None:
    """Curves by name, their legend at the side."""
    figure = new_figure(8.6, 5.6)
    axes = figure.add_subplot()
    for position, (name, curve) in enumerate(curves.items()):
        colour, dashes = COLOURS[position % len(COLOURS)], DASHES[position // len(COLOURS)]
        _draw_curve(axes, curve, name, color=colour, linestyle=dashes, linewidth=1.8)
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=(0, (2, 2)), label="chance")
    axes.set(xlabel="1 − specificity", ylabel="Sensitivity", xlim=(-0.015, 1.015), ylim=(-0.015, 1.015), aspect="equal")
    plain_axes(axes)
    axes.legend(
        loc="center left",
        bbox_to_anchor=(1.02, 0.5),
        fontsize=9 if len(curves) <= 8 else 7.5,
        frameon=False,
        title=heading,
        alignment="left",
        handlelength=2.6,
    )
    finish_figure(figure, axes, title)
    save_figure(figure, path)


def learning_curves(
    rows: Sequence[Mapping[str, Any]], path: Path, *, metric: str | None = None, title: str = ""
) -> None:
    """Draw a run's history to the PNG file `path`: losses, validation metrics, learning rates; phases marked.

    Args:
        rows: a mapping an epoch, as in history.csv; a missing or empty value leaves a gap. Read are `epoch` (else
            counted from 1); losses: names that end in "loss"; metrics: registered names, with or without `val_` in
            front; rates: `lr`, and names that begin with `lr_`, `lr/` or `lr.`; `phase`: a line is drawn where it
            changes. A panel nothing is known for is left out.
        metric: the one that chooses the best epoch: drawn strongest, its best epoch marked. None = the first known.
        title: a line above.

    Raises:
        ValueError: `rows` is empty.
    """
    if not rows:
        raise ValueError("there is no epoch to draw")
    names = list(dict.fromkeys(name for row in rows for name in row))
    epochs = _column(rows, "epoch") if "epoch" in names else np.arange(1.0, len(rows) + 1)
    losses = [name for name in names if name.endswith("loss")]
    scores = _scores_shown(names, metric)
    rates = [name for name in names if re.match(r"lr(?:[_/.]|$)", name)]
    panels = [kind for kind, found in (("loss", losses), ("score", scores), ("rate", rates)) if found]
    figure = new_figure(8.0, 1.2 + 2.3 * max(len(panels), 1))
    grid: list[Axes] = list(figure.subplots(max(len(panels), 1), 1, sharex=True, squeeze=False)[:, 0])
    for axes, kind in zip(grid, panels, strict=False):
        if kind == "loss":
            _draw_series(axes, epochs, {name.replace("_", " "): _column(rows, name) for name in losses})
            axes.set_ylabel("Loss")
        elif kind == "score":
            _draw_series(axes, epochs, {label: _column(rows, name) for label, name in scores.items()})
            axes.set_ylabel("Validation")
            _mark_best(axes, epochs, rows, *next(iter(scores.items())))
        else:
            _draw_rates(axes, epochs, {name[3:] or "all": _column(rows, name) for name in rates})
    for axes in grid:
        plain_axes(axes)
        axes.grid(color="#e6e6e6", linewidth=0.7)
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8.5, frameon=False)
    _mark_phases(grid, epochs, rows)
    _epoch_axis(grid[-1], epochs)
    finish_figure(figure, grid[0], title)
    save_figure(figure, path)


# --- pieces of the learning curves --------------------------------------------------------------------------------


def _scores_shown(names: Sequence[str], metric: str | None) -> dict[str, str]:
    """Label -> column of the metrics to draw, the choosing one first."""
    columns: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"^val[_/.]", "", name)
        if plain in METRICS and (plain == metric or math.isfinite(METRICS.get(plain).high)):
            columns.setdefault(plain, name)
    wanted = [metric, *COMPANIONS, *columns] if metric else [*COMPANIONS, *columns]
    ordered = list(dict.fromkeys(name for name in wanted if name in columns))
    companions = [name for name in ordered if name in COMPANIONS or name == metric] or ordered
    return {name: columns[name] for name in companions[: len(COLOURS) - 1]}


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> NDArray[np.float64]:
    values = [row.get(name) for row in rows]
    return np.array([float(value) if value not in {None, ""} else math.nan for value in values])


def _draw_series(axes: Axes, epochs: NDArray[np.float64], series: Mapping[str, NDArray[np.float64]]) -> None:
    marker = "o" if len(epochs) <= 40 else ""
    known = {label: values for label, values in series.items() if np.isfinite(values).any()}
    for position, (label, values) in enumerate(known.items()):
        axes.plot(
            epochs,
            values,
            label=folded(label, 24),
            color=COLOURS[position % len(COLOURS)],
            linestyle=DASHES[position // len(COLOURS) % len(DASHES)],
            linewidth=2.2 if position == 0 else 1.5,
            marker=marker,
            markersize=3.5,
        )


def _draw_rates(axes: Axes, epochs: NDArray[np.float64], rates: Mapping[str, NDArray[np.float64]]) -> None:
    """Few groups by name; many (a rate a layer) in one range of shades, the lowest and the highest named."""
    positive = {name: np.where(values > 0, values, np.nan) for name, values in rates.items()}
    marker = "o" if len(epochs) <= 40 else ""
    if any(np.isfinite(values).any() for values in positive.values()):
        axes.set_yscale("log")
    if len(positive) <= 4:
        _draw_series(axes, epochs, positive)
    else:
        from matplotlib import colormaps

        # No -inf for a group that never had a rate: it sorts below all.
        height = {name: float(np.nanmax(values, initial=0.0)) for name, values in positive.items()}
        ranked = sorted(positive, key=lambda name: height[name])
        for position, name in enumerate(ranked):
            ends = {0: f"lowest: {name}", len(ranked) - 1: f"highest: {name}"}
            label = folded(ends[position], 24) if position in ends else None
            shade = colormaps["viridis"](0.9 * (1 - position / (len(ranked) - 1)))
            axes.plot(epochs, positive[name], color=shade, linewidth=1.3, label=label, marker=marker, markersize=2.5)
    axes.set_ylabel("Learning rate")


def _mark_best(
    axes: Axes, epochs: NDArray[np.float64], rows: Sequence[Mapping[str, Any]], metric: str, column: str
) -> None:
    values = _column(rows, column)
    best: int | None = None
    for row, value in enumerate(values):
        if better(metric, value, None if best is None else values[best]):
            best = row
    if best is not None:
        label = f"best: {values[best]:.3f}\n(epoch {epochs[best]:g})"
        star = axes.plot([epochs[best]], [values[best]], label=label, color=INK, linestyle="", marker="*")[0]
        star.set(markersize=13, zorder=5, clip_on=False)


def _mark_phases(grid: Sequence[Axes], epochs: NDArray[np.float64], rows: Sequence[Mapping[str, Any]]) -> None:
    """Where `phase` changes, a line through all panels; each phase named at the top of the first."""
    phases = ["" if row.get("phase") is None else str(row["phase"]) for row in rows]
    if len(set(phases)) == 1:
        return
    for row, phase in enumerate(phases):
        if row and phase == phases[row - 1]:
            continue
        border = (epochs[row] + epochs[row - 1]) / 2 if row else epochs[0]
        for axes in grid if row else ():
            axes.axvline(border, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        grid[0].annotate(
            folded(f"phase {phase}" if phase.isdigit() else phase, 22, 1),
            xy=(border, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(3, 3),
            textcoords="offset points",
            fontsize=8,
            color="#555555",
            va="bottom",
        )


def _epoch_axis(axes: Axes, epochs: NDArray[np.float64]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("Epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    margin = max(0.5, 0.02 * (epochs[-1] - epochs[0]))
    axes.set_xlim(epochs[0] - margin, epochs[-1] + margin)


# --- pieces of all ------------------------------------------------------------------------------------------------


def _draw_curve(axes: Axes, curve: Curve, name: str, **style: Any) -> None:
    if not curve.defined:
        what = "no examples" if not curve.hits[-1] else "no other examples"
        axes.plot([], [], label=f"{name}: {what}", **(style | {"alpha": 0.35}))
        return
    # Only the corners: a hundred thousand points on straight lines are drawn slowly, to the same effect.
    turns = np.diff(curve.hits[:-1]) * np.diff(curve.alarms[1:]) != np.diff(curve.hits[1:]) * np.diff(curve.alarms[:-1])
    corners = np.concatenate([[True], turns, [True]])
    label = f"{name}: {curve.auroc:.3f} (n = {curve.hits[-1]})"
    axes.plot(1 - curve.specificity[corners], curve.sensitivity[corners], label=label, **style)


def _percent(share: float) -> str:
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"


def folded(name: str, width: int, max_lines: int = 2) -> str:
    """`name` on at most so many lines of `width`, broken at spaces and signs; no `$`, which would begin a formula."""
    lines = [""]
    # Names of classes often come without spaces: they may break behind a sign too, and at worst anywhere.
    for part in re.findall(rf"[^\s_/\-]{{1,{width}}}[_/\-]*\s*|[_/\-\s]+", str(name)):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    lines = [line.strip() for line in lines]
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], lines[max_lines - 1][: width - 1].rstrip() + "…"]
    return "\n".join(lines).replace("$", r"\$")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, its parts kept from overlapping."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plain_axes(axes: Axes) -> None:
    """Left and bottom line only, faint."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)


def finish_figure(figure: Figure, axes: Axes, title: str) -> None:
    """White background, and `title` (if any) above `axes`, on the left."""
    if title:
        axes.set_title(folded(title, 70), fontsize=12, loc="left", pad=16)
    figure.set_facecolor("white")


def save_figure(figure: Figure, path: Path) -> None:
    """Write `figure` to `path` as PNG, atomically."""
    from matplotlib import font_manager
    from matplotlib.text import Text

    installed = set(font_manager.get_font_names())
    families = ["DejaVu Sans", *(name for name in FALLBACK_FONTS if name in installed)]
    for item in figure.findobj(Text):
        item.set_fontfamily(families)
    with files.atomic(Path(path)) as temporary, warnings.catch_warnings():
        # A sign no font has is drawn as a box, which says enough.
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        # tight: a long legend widens the picture instead of being cut off.
        figure.savefig(temporary, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.15)
