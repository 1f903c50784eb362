"""Pictures of checks: gradients by layer, memory by batch size, classes, and what the network gets to see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eyetune.metrics.plots import (
    COLOURS,
    FAINT,
    finish_figure,
    folded,
    new_figure,
    plain_axes,
    save_figure,
)

if TYPE_CHECKING:
    from eyetune.checks.gradients import Flow
    from eyetune.checks.rates import Rate
    from eyetune.checks.scale import Scale


def gradient_flow(flows: Sequence[Flow], path: Path, *, title: str = "") -> None:
    """Draw the size of the gradient in every layer, input side first, a line a phase; frozen layers stay empty, a
    trained layer that gets none is marked at the bottom."""
    names = [layer.name for layer in flows[0].layers]
    places = np.arange(len(names))
    figure = new_figure(max(6.0, 0.34 * len(names) + 2.4), 4.6)
    axes = figure.add_subplot()
    axes.set_yscale("log")
    sizes = [layer.rms for flow in flows for layer in flow.layers if layer.rms is not None and np.isfinite(layer.rms)]
    floor = min(sizes, default=1e-6) / 5
    trained = {layer.name for flow in flows for layer in flow.layers if layer.trained}
    for place, name in zip(places, names, strict=True):
        if name not in trained:
            axes.axvspan(place - 0.5, place + 0.5, color="#eeeeee", linewidth=0)
    for number, flow in enumerate(flows):
        colour = COLOURS[number % len(COLOURS)]
        values = [np.nan if layer.rms is None else layer.rms for layer in flow.layers]
        label = f"phase {flow.phase}" if len(flows) > 1 else "gradient"
        axes.plot(places, values, color=colour, marker="o", markersize=5, linewidth=1.6, label=label)
        lost = [place for place, layer in zip(places, flow.layers, strict=True) if layer.trained and layer.rms is None]
        if lost:
            axes.plot(
                lost,
                [floor] * len(lost),
                color="#C00000",
                linestyle="",
                marker="X",
                markersize=9,
                label="trained, gets none",
                clip_on=False,
                zorder=5,
            )
    if len(trained) < len(names):
        axes.fill_between([], [], color="#eeeeee", label="frozen")
    axes.set_ylim(bottom=floor)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_xticks(places, [folded(name, 28, 1) for name in names], rotation=90 if len(names) > 4 else 0)
    axes.set_ylabel("Root mean square of the gradient")
    axes.set_xlabel("Layer, input first")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    plain_axes(axes)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    finish_figure(figure, axes, title)
    save_figure(figure, path)


def memory(scales: Sequence[Scale], room: int, wanted: int, path: Path, *, title: str = "") -> None:
    """Draw peak memory by batch size: what was measured, the line it follows, the free memory, the wanted batch."""
    figure = new_figure(7.4, 5.2)
    axes = figure.add_subplot()
    gib = 2**30
    largest = max((point.batch for scale in scales for point in scale.points), default=1)
    right = max(largest, wanted, *(min(scale.largest, 4 * max(largest, wanted)) for scale in scales)) * 1.05
    for number, scale in enumerate(scales):
        if not scale.points:
            continue
        colour = COLOURS[number]
        label = "activations recomputed (train.grad_checkpointing)" if scale.checkpointing else "activations kept"
        batches = [point.batch for point in scale.points]
        axes.plot(batches, [p.needs / gib for p in scale.points], "o", color=colour, markersize=6, label=label)
        places = np.linspace(0.0, right, 200)
        axes.plot(
            places, [scale.peak(place) / gib for place in places], color=colour, linewidth=1.2, linestyle=(0, (4, 2))
        )
    top = max(max(scale.peak(right) for scale in scales if scale.points) / gib * 1.1, 1e-3)
    if room / gib < 2.5 * top:
        axes.axhline(room / gib, color="#C00000", linewidth=1.6, label=f"free: {room / gib:.1f} GiB")
        top = min(max(top, room / gib * 1.1), room / gib * 1.6)
    else:
        axes.plot([], [], color="#C00000", linewidth=1.6, label=f"free: {room / gib:.1f} GiB (above)")
    axes.axvline(wanted, color=FAINT, linewidth=1.2, linestyle=(0, (2, 2)), label=f"train.batch_size {wanted}")
    axes.set(xlabel="Images in a batch", ylabel="Peak memory (GiB)", xlim=(0, right), ylim=(0, top))
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    plain_axes(axes)
    axes.legend(loc="upper left", bbox_to_anchor=(0.0, -0.14), ncols=2, frameon=False, fontsize=9)
    finish_figure(figure, axes, title)
    save_figure(figure, path)


def class_histogram(
    counts: Mapping[str, Sequence[int]], classes: Sequence[str], path: Path, *, title: str = ""
) -> None:
    """Draw the number of images of each class in each split, with its share of the split."""
    places = np.arange(len(classes))
    figure = new_figure(max(6.0, 1.1 * len(classes) + 2.5), 4.4)
    axes = figure.add_subplot()
    width = 0.8 / len(counts)
    for number, (name, found) in enumerate(counts.items()):
        shift = (number - (len(counts) - 1) / 2) * width
        bars = axes.bar(places + shift, found, width, color=COLOURS[number], label=f"{name} ({sum(found)})")
        total = max(1, sum(found))
        if len(classes) <= 8:
            texts = [f"{count}\n{count / total:.0%}" for count in found]
            axes.bar_label(bars, texts, padding=2, fontsize=7.5, color="#444444")
    axes.margins(y=0.14)
    axes.set_xticks(places, [folded(name, 16) for name in classes], rotation=40 if len(classes) > 8 else 0)
    axes.set_ylabel("Images")
    plain_axes(axes)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    finish_figure(figure, axes, title)
    save_figure(figure, path)


def picture_grid(
    rows: Sequence[tuple[str, Sequence[Any]]], heads: Sequence[str], path: Path, *, title: str = ""
) -> None:
    """Draw pictures float[H, W, 3] in 0..1 in rows with a name each, under the `heads` of the columns."""
    figure = new_figure(1.7 * len(heads) + 1.6, 1.75 * len(rows) + 0.7)
    grid = figure.subplots(len(rows), len(heads), squeeze=False)
    for line, (name, pictures) in zip(grid, rows, strict=True):
        for axes, picture in zip(line, pictures, strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(folded(name, 22, 3), rotation=0, ha="right", va="center", fontsize=8)
    for axes, head in zip(grid[0], heads, strict=True):
        axes.set_title(head, fontsize=9)
    if title:
        figure.suptitle(folded(title, 100), fontsize=11)
    figure.set_facecolor("white")
    save_figure(figure, path)


def loader_rates(rates: Sequence[Rate], need: float, own: int, path: Path, *, title: str = "") -> None:
    """Draw images a second by worker count, from the cache and decoding, against what the training step takes."""
    counts = sorted({rate.workers for rate in rates})
    sources = list(dict.fromkeys(rate.source for rate in rates))
    figure = new_figure(max(6.4, 1.2 * len(counts) + 3.0), 4.6)
    axes = figure.add_subplot()
    width = 0.8 / len(sources)
    for number, source in enumerate(sources):
        found = {rate.workers: rate.images or 0.0 for rate in reversed(rates) if rate.source == source}
        shift = (number - (len(sources) - 1) / 2) * width
        places = [place + shift for place, count in enumerate(counts) if count in found]
        heights = [found[count] for count in counts if count in found]
        bars = axes.bar(places, heights, width * 0.94, color=COLOURS[number], label=source)
        axes.bar_label(bars, [f"{height:.0f}" for height in heights], padding=2, fontsize=8.5, color="#444444")
    axes.axhline(need, color="#C00000", linewidth=1.8, label=f"the step takes {need:.0f}")
    axes.margins(y=0.12)
    axes.set_xticks(range(len(counts)), [f"{count}{chr(10)}(set)" if count == own else str(count) for count in counts])
    axes.set(xlabel="Reading processes (workers)", ylabel="Images a second")
    plain_axes(axes)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    finish_figure(figure, axes, title)
    save_figure(figure, path)
