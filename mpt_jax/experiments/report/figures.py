"""Figures as inline SVG, with text kept as text and colors taken from the page.

Matplotlib does not support CSS variables. Figures are therefore drawn in placeholder colors, which
are then replaced: the color of text becomes `currentColor`, that of series i `var(--series-i)`. The
same figure works on light and dark pages. A Matplotlib point is a pixel of the page.
"""

from __future__ import annotations

import dataclasses
import html
import io
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mpt_jax.experiments.report import analysis

INK, LINES, SERIES = "#0a0b0c", "#0d0e0f", "#00000{}"
COLORS = 7  # size of the page's palette; black is not in it
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("solid", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1, 1, 1)))
MOST_MARKERS = 10  # on a curve
WIDTH = 560  # pixels: two panels beside each other on a page of 1,200
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may hold dollar signs
    "svg.hashsalt": "report",  # makes the SVG text deterministic
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": LINES,
    "axes.axisbelow": True,
    **{f"{part}.color": INK for part in ("text", "xtick", "ytick")},
    **{f"axes.{part}" + "color": INK for part in ("label", "edge", "title")},
}
FONT = "'DejaVu Sans', Verdana, sans-serif"  # as wide as the font that Matplotlib measures with
# Red and blue are distinguishable with any color vision; the middle is a difference of zero.
DIVERGING = matplotlib.colormaps["RdBu_r"]


class Style(NamedTuple):
    """Color, marker and line style of a method in all figures."""

    color: str
    marker: str
    linestyle: str | tuple


def styles(results: analysis.ByLabel) -> dict[str, Style]:
    """Returns label -> style. Labels of one base method (`analysis.family`) share a color. Each of
    the first 28 labels has a distinct pair of marker and dashes, visible without color."""
    families: dict[str, list[str]] = {}
    for label, cells in results.items():
        families.setdefault(analysis.family(next(iter(cells.values())).method), []).append(label)
    by_label = {}
    for color, labels in enumerate(families.values()):
        for label in labels:
            number = len(by_label)
            # The numbers of markers and of dashes have no common divisor.
            marker, dashes = MARKERS[number % len(MARKERS)], DASHES[number % len(DASHES)]
            by_label[label] = Style(SERIES.format(color % COLORS + 1), marker, dashes)
    return by_label


class Line(NamedTuple):
    """A series. `spread` holds the distances of y from the lower and upper ends of its interval."""

    style: Style
    x: Sequence[float]
    y: Sequence[float]
    spread: Float[np.ndarray, "2 n"] | None = None


@dataclasses.dataclass(frozen=True)
class Panel:
    """Settings of a plot's axes.

    Attributes:
        title: The title of the panel.
        x, y: The axis labels.
        alt: The text alternative for screen readers.
        x_ticks: The positions of x ticks; () for Matplotlib's choice.
        log: The logarithmic axes: `''`, `'x'`, `'y'` or `'xy'`.
        connected: Whether lines connect the points.
        limits: The limits of x; None for the range of the data.
    """

    title: str
    x: str
    y: str
    alt: str
    x_ticks: Sequence[int | float] = ()
    log: str = ""
    connected: bool = True
    limits: tuple[float, float] | None = None


def lines(panel: Panel, series: Sequence[Line]) -> str:
    """Returns the SVG of a plot of series, drawn as curves or as points with intervals."""

    def draw(axes: Axes) -> None:
        for line in series:
            look = {
                "color": line.style.color,
                "marker": line.style.marker,
                "linestyle": line.style.linestyle if panel.connected else "",
                "markevery": max(1, len(line.x) // MOST_MARKERS),
            }
            spread = None if line.spread is None else np.nan_to_num(line.spread)
            axes.errorbar(line.x, line.y, spread, **look, markersize=6, elinewidth=1, capsize=2.5)
        axes.set(xlabel=panel.x, ylabel=panel.y)
        for axis in panel.log:
            values = [line.x if axis == "x" else line.y for line in series]
            _log_axis(axes, axis, np.concatenate(values))
        if panel.x_ticks:
            axes.xaxis.set_major_locator(ticker.FixedLocator(list(panel.x_ticks)))

    return _svg(WIDTH, 340, draw, panel)


def intervals(panel: Panel, rows: Sequence[str], series: Sequence[Line]) -> str:
    """Returns the SVG of values with intervals, in one horizontal band per row (`Line.y`)."""
    height = 15

    def draw(axes: Axes) -> None:
        for number, line in enumerate(series):
            shift = (number - (len(series) - 1) / 2) * 0.8 / len(series)
            y = np.add(line.y, shift)
            spread = None if line.spread is None else np.nan_to_num(line.spread)
            axes.errorbar(
                line.x, y, None, spread, color=line.style.color, marker=line.style.marker,
                linestyle="", markersize=5, elinewidth=1.2, capsize=2,
            )  # fmt: skip
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_xlim(panel.limits)
        axes.set_yticks(range(len(rows)), rows)
        axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel=panel.x, ylabel=panel.y)
        axes.grid(False, axis="y")
        for edge in np.arange(len(rows) - 1) + 0.5:
            axes.axhline(edge, color=LINES, linewidth=0.8)

    return _svg(WIDTH, 80 + len(rows) * max(24, height * len(series)), draw, panel)


def heat_map(
    panel: Panel,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Float[np.ndarray, "R C"],
    scale: float,
    form: str,
    beside: int = 0,
) -> str:
    """Returns the SVG of a matrix as colored cells with numbers. Cells with NaN are empty.

    Args:
        panel: The title, axis labels and text alternative.
        rows, columns: The names of the rows and columns.
        values: The values of the cells.
        scale: The value with the darkest color; -scale has the darkest opposite color.
        form: The format of the numbers.
        beside: The number of columns at the end that hold another quantity and are not colored.
    """

    def draw(axes: Axes) -> None:
        axes.grid(False)
        for (i, j), value in np.ndenumerate(values):
            if np.isnan(value):
                continue
            shade = INK
            if j < len(columns) - beside:
                color = DIVERGING(0.5 + 0.5 * np.clip(value / scale, -1, 1))
                axes.add_patch(Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, facecolor=color))
                light = np.dot(color[:3], (0.299, 0.587, 0.114)) > 0.5
                shade = "#101010" if light else "#fefefe"
            number = float(format(value, form)) + 0.0  # not a negative zero
            axes.text(
                j, i, format(number, form), ha="center", va="center", fontsize=11, color=shade
            )
        axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
        axes.set_yticks(range(len(rows)), rows)
        axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
        axes.set(xlabel=panel.x, ylabel=panel.y)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)

    margin = 8 * max(len(name) for name in [*rows, *columns]) + 50
    return _svg(margin + 42 * len(columns), margin + 30 * len(rows), draw, panel)


def pictures(
    panel: Panel, rows: Sequence[str], columns: Sequence[str], cells: UInt8[np.ndarray, "R C S S 3"]
) -> str:
    """Returns the SVG of a grid of square pictures of S pixels, which it contains as one PNG."""
    size, gap = cells.shape[2], 4
    step = size + gap
    grid = np.zeros((len(rows) * step - gap, len(columns) * step - gap, 4), np.uint8)
    for i, j in np.ndindex(len(rows), len(columns)):
        grid[i * step : i * step + size, j * step : j * step + size, :3] = cells[i, j]
        grid[i * step : i * step + size, j * step : j * step + size, 3] = 255  # gaps show the page

    def draw(axes: Axes) -> None:
        axes.grid(False)
        axes.imshow(grid, interpolation="none")
        axes.set_xticks([j * step + size / 2 for j in range(len(columns))], columns)
        axes.set_yticks([i * step + size / 2 for i in range(len(rows))], rows)
        axes.xaxis.tick_top()
        axes.set(xlabel=panel.x, ylabel=panel.y)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)

    margin = 8 * max(map(len, rows)) + 40
    return _svg(margin + grid.shape[1], 70 + grid.shape[0], draw, panel)


def swatch(style: Style, connected: bool = True) -> str:
    """Returns the SVG of a sample of a style, for a legend."""

    def draw(axes: Axes) -> None:
        line = style.linestyle if connected else ""
        axes.plot([0, 1], [0, 0], color=style.color, linestyle=line)
        axes.plot([0.5], [0], color=style.color, marker=style.marker)
        axes.set_axis_off()

    return _svg(30, 14, draw, None)


def _log_axis(axes: Axes, axis: str, values: np.ndarray) -> None:
    values = values[values > 0]
    if not len(values):
        return
    axes.set(**{f"{axis}scale": "log"})
    shown = axes.xaxis if axis == "x" else axes.yaxis
    decades = np.ptp(np.log10(values))
    shown.set_major_locator(ticker.LogLocator(subs=(1,) if decades > 1.5 else (1, 2, 5)))
    shown.set_major_formatter(ticker.FuncFormatter(lambda value, _: analysis.number(float(value))))
    shown.set_minor_locator(ticker.NullLocator())


def _svg(width: int, height: int, draw: Callable[[Axes], None], panel: Panel | None) -> str:
    """Returns an SVG of a size in pixels. With `panel=None`, screen readers skip it."""
    content = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        figure = Figure((width / 72, height / 72), layout="constrained")
        axes = figure.add_subplot()
        if panel is not None and panel.title:
            figure.suptitle(panel.title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        draw(axes)
        figure.savefig(content, format="svg", transparent=True)
    text = content.getvalue()
    text = text[text.index("<svg") :]
    for pattern, new in PAGE.items():
        text = re.sub(pattern, new, text, flags=re.DOTALL)
    words = 'aria-hidden="true"'
    if panel is not None:
        words = f'role="img" aria-label="{html.escape(panel.alt)}"'
    return text.replace("<svg", f"<svg {words}", 1)


# Replacements in Matplotlib's SVG. Its style sheet is removed, as it would apply to the whole page.
PAGE = {
    r"<metadata>.*?</metadata>": "",
    r'<style type="text/css">.*?</style>': "",
    r'(width|height)="([\d.]+)pt"': r'\1="\2"',
    r"<!--.*?-->": "",
    r"\n\s*": "\n",
    INK: "currentColor",
    LINES: "var(--line)",
    SERIES.format(r"(\d)"): r"var(--series-\1)",
    "'DejaVu Sans'": FONT,
}
