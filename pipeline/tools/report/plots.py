"""The report's curves: matplotlib figures as inline SVG, no display and no network needed."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

INK, GRID = "#1f2933", "#e4e7eb"
CHARACTER = 0.075  # inches that a character of a tick's label takes
COLOURS = ("#2563eb", "#ea580c", "#059669", "#7c3aed", "#db2777", "#0891b2", "#ca8a04", "#64748b")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve: x (steps), y, and optionally an error per point (band, or bars when `bars`). `colour`: its number in
    `COLOURS`, for a curve that has the same one in several plots; else by its place."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    bars: bool = False
    colour: int | None = None


def plot(
    title: str,
    lines: list[Line],
    *,
    size: tuple[float, float] = (4.4, 2.5),
    log: bool = False,
    zero: bool = False,
    marked: tuple[float, float] | None = None,
) -> Markup:
    """Curves over the optimisation step. Curves without points are left out. `marked`: a point with a star."""
    figure, axes = _axes(title, size)
    for number, line in enumerate(line for line in lines if len(line.x)):
        colour = COLOURS[(number if line.colour is None else line.colour) % len(COLOURS)]
        marker = "o" if line.bars or len(line.x) < 3 else None
        if line.bars:
            axes.errorbar(
                line.x,
                line.y,
                yerr=line.error,
                color=colour,
                marker="o",
                ms=4,
                lw=1.8,
                capsize=3,
                label=line.label,
                zorder=3,
            )
            continue
        axes.plot(line.x, line.y, color=colour, lw=1.4, marker=marker, ms=3, label=line.label)
        if line.error is not None:
            low = [y - e for y, e in zip(line.y, line.error, strict=True)]
            high = [y + e for y, e in zip(line.y, line.error, strict=True)]
            axes.fill_between(line.x, low, high, color=colour, alpha=0.18, lw=0)
    if marked is not None:
        axes.plot(*marked, marker="*", ms=14, color=COLOURS[6], zorder=4)
    values = [y for line in lines for y in line.y]
    if log and values and min(values) > 0 and max(values) / min(values) > 20:
        axes.set_yscale("log")
    elif zero and values and min(values) >= 0:
        axes.set_ylim(bottom=0, top=max(values) * 1.08 or 1)
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8.5, loc="best", handlelength=1.4)
    return _svg(figure)


def stacked(
    title: str, x: Sequence[float], series: dict[str, Sequence[float]], *, size: tuple[float, float] = (9.0, 2.5)
) -> Markup:
    """Stacked areas, such as seconds per role."""
    figure, axes = _axes(title, size)
    colours = COLOURS[: len(series)]
    if len(x) == 1:
        bottom = 0.0
        for (label, values), colour in zip(series.items(), colours, strict=False):
            axes.bar(x, values, bottom=bottom, width=0.4, color=colour, label=label)
            bottom += values[0]
    else:
        axes.stackplot(x, *series.values(), labels=list(series), colors=colours, alpha=0.85, lw=0)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    longest = max(len(label) for label in series)
    return _svg(figure, right=0.7 + CHARACTER * longest, y_label="seconds")


def _axes(title: str, size: tuple[float, float]):
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=size)
    axes = figure.subplots()
    axes.set_title(title, fontsize=11, color=INK, loc="left", fontweight="bold")
    axes.set_xlabel("optimisation step", fontsize=9, color=INK)
    axes.tick_params(labelsize=8.5, colors=INK, length=2)
    axes.grid(True, color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9aa5b1")
    return figure, axes


def _fit(figure, right: float, y_label: str) -> None:
    """Leaves room for the title and the labels. `right`: inches on the right.

    Matplotlib's own layouts draw every figure twice to measure its texts, which is most of a report's time.
    """
    (axes,) = figure.axes
    width, height = figure.get_size_inches()
    low, high = sorted(axes.get_ylim())
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    labels = axes.yaxis.get_major_formatter().format_ticks(ticks)
    longest = max((6 if "$" in label else len(label) for label in labels), default=0)  # $: a power of ten
    left = 0.17 + CHARACTER * longest
    if y_label:
        left += 0.2
        axes.set_ylabel(y_label, fontsize=9, color=INK)
    figure.subplots_adjust(left=left / width, right=1 - right / width, bottom=0.46 / height, top=1 - 0.31 / height)


def _svg(figure, right: float = 0.1, y_label: str = "") -> Markup:
    import matplotlib

    _fit(figure, right, y_label)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "rushes"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return Markup(re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2))


def finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
