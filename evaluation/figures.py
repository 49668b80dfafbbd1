"""A table as a picture: rows as points between two metrics (Figure 10), or metrics along a sweep (Figure 12)."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.results import TableResult
from evaluation.stats import Interval
from ldm.checkpoint import atomic_path

log = logging.getLogger(__name__)

OURS, PUBLISHED = "#1f6f8b", "#b8572a"
GREY = "#888888"
LINE_HEIGHT = 0.035  # of names beside a panel, in parts of its height


def write_figure(result: TableResult, path: Path) -> Path | None:
    """Write the table's figure as PNG; None where it has none or matplotlib is not installed."""
    if not result.table.plot or not result.intervals:
        return None
    try:
        import matplotlib as mpl
    except ImportError:
        log.warning("no figure: matplotlib is not installed (pip install -e '.[evaluation]')")
        return None
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = draw_sweep(result) if result.table.plot["x"] == "at" else draw_points(result)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=160, metadata={"Software": None})
    return path


def new_figure(panels: int) -> tuple[Any, list[Any]]:
    """A figure with panels side by side, drawn without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * panels, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


# -------------------------------------------------------------------------------------------------------- points


def draw_points(result: TableResult) -> Any:
    """Rows as points: ours with intervals, and in a panel of its own what was published; one key for both."""
    x, y = result.table.plot["x"], result.table.plot["y"]
    rows = result.table.rows
    published = [row for row in rows if x in row.published and y in row.published]
    figure, axes = new_figure(2 if published else 1)
    looks = {row.name: look(number) for number, row in enumerate(rows)}
    handles = {}
    for row in published:
        handles[row.label] = axes[1].plot(row.published[x], row.published[y], **looks[row.name])[0]
    for row in rows:
        across, up = result.interval(x, row), result.interval(y, row)
        if across is not None and up is not None:
            draw_intervals(axes[0], across, up, looks[row.name]["color"])
            handles[row.label] = axes[0].plot(across.mean, up.mean, **looks[row.name])[0]
    axes[0].set_title("this run", color=OURS, fontweight="bold")
    if published:
        axes[1].set_title("published", color=PUBLISHED, fontweight="bold")
    for axis in axes:
        axis.set_xlabel(literal(result.label(x)))
        axis.set_ylabel(literal(result.label(y)))
        axis.grid(alpha=0.25)
        axis.margins(0.1)
        axis.locator_params(nbins=6)
    labels = [row.label for row in rows if row.label in handles]
    figure.legend(
        [handles[label] for label in labels],
        [literal(label) for label in labels],
        loc="outside right center",
        frameon=False,
    )
    return figure


def look(number: int) -> dict[str, Any]:
    """Colour and shape of row `number`: no two of the first 40 are alike."""
    from matplotlib import colormaps

    colour = colormaps["tab10"](number % 10)
    return {"color": colour, "marker": "osD^vP*X"[(number // 10 + number) % 8], "markersize": 7, "linestyle": "none"}


def literal(text: str) -> str:
    """Text for matplotlib, which would take what stands between dollar signs for a formula."""
    return text.replace("$", r"\$")


def draw_intervals(axis: Any, across: Interval, up: Interval, colour: Any) -> None:
    """The intervals of a point as a cross."""
    style = {"color": colour, "alpha": 0.4, "linewidth": 1.2}
    if not math.isnan(across.low):
        axis.plot([across.low, across.high], [up.mean, up.mean], **style)
    if not math.isnan(up.low):
        axis.plot([across.mean, across.mean], [up.low, up.high], **style)


# --------------------------------------------------------------------------------------------------------- sweep


def draw_sweep(result: TableResult) -> Any:
    """Metrics along the sweep, ours with a band, published dashed; rows without a position as dotted lines."""
    metrics = result.table.plot["y"]
    figure, axes = new_figure(len(metrics))
    rows = sorted((row for row in result.table.rows if row.at is not None), key=lambda row: row.at or 0.0)
    for axis, metric in zip(axes, metrics, strict=True):
        points = [(row.at, found) for row in rows if (found := result.interval(metric, row))]
        places = [at for at, _ in points]
        axis.plot(places, [found.mean for _, found in points], "o-", color=OURS, label="this run")
        axis.fill_between(
            places, [found.low for _, found in points], [found.high for _, found in points], color=OURS, alpha=0.15
        )
        known = [(row.at, row.published[metric]) for row in rows if metric in row.published]
        if known:
            axis.plot(*zip(*known, strict=True), "s--", color=PUBLISHED, label="published")
        draw_anchors(axis, result, metric)
        axis.set_xlabel(literal(result.table.plot.get("label", "")))
        axis.set_title(literal(result.label(metric)))
        if any((place or 0) > 0 for place in places):  # nothing can be put on a logarithmic scale before that
            axis.set_xscale(result.table.plot.get("scale", "linear"))
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    return figure


def draw_anchors(axis: Any, result: TableResult, metric: str) -> None:
    """Rows that are no part of the sweep as horizontal lines, named beside the panel."""
    anchors = [
        (found.mean, row.label)
        for row in result.table.rows
        if row.at is None and (found := result.interval(metric, row)) is not None
    ]
    for place, _ in anchors:
        axis.axhline(place, color=GREY, linestyle=":", linewidth=1)
    low, high = axis.get_ylim()
    axis.set_ylim(low, high)  # what is drawn later must not move the lines away from their names
    anchors.sort()
    heights = spread([(place - low) / (high - low) for place, _ in anchors], LINE_HEIGHT)
    for (_, label), height in zip(anchors, heights, strict=True):
        axis.annotate(
            literal(label), (1.01, height), xycoords="axes fraction", fontsize=7, color=GREY, ha="left", va="center"
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending `places` from 0 to 1, moved up until they lie `gap` apart, and down where that would pass 1."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    ceiling = 1.0
    for number in reversed(range(len(moved))):
        moved[number] = min(moved[number], ceiling)
        ceiling = moved[number] - gap
    return moved
