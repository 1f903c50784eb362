"""Small charts as inline SVG whose ink follows the page: light, dark and on paper; their legends are the page's text.

Drawn by hand and not by matplotlib because a chart of a page is read on a phone as well: the words stay at the size of
the page's text, the colours are the theme's, and a report with thirty charts is written in a fraction of a second.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markupsafe import Markup

WIDTH, HEIGHT = 360, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 24, 26, 40

#: How many colours style.css has (`--c0` …); further series repeat them, dashed.
COLOURS = 6

#: Radius of a dot in the units of the drawing, and of one that stands for everything.
DOT, LARGEST_DOT = 2.6, 9.0

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Args:
        name: in the legend.
        points: (x, y) in the units of the axes; a y that is not finite breaks the line.
        dots: mark every point.
        weights: of the points, 0..1: the area of their dots; without them all dots are alike.
        step: go to the next point level first, then upright.
        strong: thicker, in the colour of the text.
        faint: a thin dashed line, for what the others are held against.
        loose: no line between the points.
    """

    name: str
    points: Points
    dots: bool = False
    weights: Sequence[float] | None = None
    step: bool = False
    strong: bool = False
    faint: bool = False
    loose: bool = False


@dataclass(frozen=True)
class Axis:
    """One axis: its words, its ends, how its numbers are written, and whether there are but whole ones."""

    label: str
    low: float = 0.0
    high: float = 1.0
    number: Callable[[float], str] = "{:g}".format
    whole: bool = False


def plot(series: Sequence[Series], x: Axis, y: Axis, *, title: str, marks: Points = ()) -> Markup:
    """A chart of lines with its legend below, as a `figure`.

    Args:
        series: the lines; of those that are not faint or strong each has a colour of its own.
        x, y: the axes; what lies beyond their ends is cut off.
        title: above the chart, and what a screen reader says.
        marks: points drawn as rings, such as the best epoch.
    """
    from markupsafe import Markup, escape

    frame = _Frame(x, y)
    lines, legend, colour = [], [], 0
    for one in series:
        look = "faint-line" if one.faint else "strong-line" if one.strong else f"c{colour % COLOURS}"
        if not one.faint and not one.strong:
            look += " dashed" if colour >= COLOURS else ""
            colour += 1
        if not one.loose:
            lines.append(f'<path class="line {look}" d="{frame.path(one)}"/>')
        if one.dots:
            sizes = itertools.repeat(DOT) if one.weights is None else [_radius(weight) for weight in one.weights]
            drawn = zip(one.points, sizes, strict=False)
            lines += [
                f'<circle class="dot {look}" cx="{a}" cy="{b}" r="{size}"/>'
                for point, size in drawn
                for a, b in frame.dots([point])
            ]
        legend.append(f'<li><span class="key {look}"></span>{escape(one.name)}</li>')
    lines += [f'<circle class="ring" cx="{a}" cy="{b}" r="5.5"/>' for a, b in frame.dots(marks)]
    svg = (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{frame.grid()}{''.join(lines)}</svg>"
    )
    return Markup(  # noqa: S704 - every text in it is escaped above
        f'<figure class="plotted"><figcaption>{escape(title)}</figcaption>{svg}<ul class="legend">{"".join(legend)}'
        "</ul></figure>"
    )


def _radius(weight: float) -> float:
    return round(1.5 + (LARGEST_DOT - 1.5) * math.sqrt(min(max(weight, 0.0), 1.0)), 1)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, ends included where they are round, about so many."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * unit for unit in (1, 2, 2.5, 5, 10) if power * unit >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) + 0.0 for index in range(first, math.floor(high / step + 1e-9) + 1)]


class _Frame:
    """Where the numbers of two axes lie on the paper."""

    def __init__(self, x: Axis, y: Axis) -> None:
        self.x, self.y = x, y

    def across(self, value: float) -> float:
        span = (self.x.high - self.x.low) or 1.0
        share = min(max((value - self.x.low) / span, 0.0), 1.0)
        return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)

    def up(self, value: float) -> float:
        span = (self.y.high - self.y.low) or 1.0
        share = min(max((value - self.y.low) / span, 0.0), 1.0)
        return round(HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM), 1)

    def dots(self, points: Points) -> list[tuple[float, float]]:
        return [(self.across(a), self.up(b)) for a, b in points if math.isfinite(b)]

    def path(self, series: Series) -> str:
        """The line in tenths of a pixel: points that fall on the one before are left out, however many there are."""
        words: list[str] = []
        last: tuple[float, float] | None = None
        for a, b in series.points:
            if not math.isfinite(b):
                last = None
                continue
            here = self.across(a), self.up(b)
            if last is None:
                words.append(f"M{here[0]} {here[1]}")
            elif here == last:
                continue
            elif series.step and here[0] != last[0] and here[1] != last[1]:
                words.append(f"H{here[0]}V{here[1]}")
            else:
                words.append(f"L{here[0]} {here[1]}")
            last = here
        return "".join(words)

    def grid(self) -> str:
        from markupsafe import escape

        bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
        parts = []
        for value in ticks(self.x.low, self.x.high):
            if self.x.whole and value % 1:
                continue
            place = self.across(value)
            parts.append(f'<path class="grid-line" d="M{place} {_TOP}V{bottom}"/>')
            parts.append(f'<text x="{place}" y="{bottom + 14}" text-anchor="middle">{self.x.number(value)}</text>')
        for value in ticks(self.y.low, self.y.high):
            place = self.up(value)
            parts.append(f'<path class="grid-line" d="M{_LEFT} {place}H{right}"/>')
            parts.append(f'<text x="{_LEFT - 6}" y="{place + 4}" text-anchor="end">{self.y.number(value)}</text>')
        parts.append(f'<path class="axis-line" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
        parts.append(
            f'<text x="{(_LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(self.x.label)}</text>'
            f'<text x="2" y="12">{escape(self.y.label)}</text>'
        )
        return "".join(parts)
