"""What was measured: one JSON file that grows cell by cell, its table and its plot."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ldm.checkpoint import atomic_path

Cell = dict[str, Any]


class Results:
    """The JSON file: `{"machine": ..., "cells": {"sd1/float32/inversion_step": {...}}}`.

    Cells are written as soon as they are measured; a run that is started again measures what is missing.
    """

    def __init__(self, path: Path, setting: dict[str, Any], fresh: bool = False) -> None:
        self.path = path
        self.data: dict[str, Any] = {"setting": setting, "cells": {}}
        if path.exists() and not fresh:
            known = json.loads(path.read_text())
            if known["setting"] != setting:
                changed = sorted(k for k in setting if known["setting"].get(k) != setting[k])
                raise ValueError(f"{path} was measured with other settings ({', '.join(changed)}): add --fresh")
            self.data = known

    @property
    def cells(self) -> dict[str, Cell]:
        """Everything measured, by name."""
        cells: dict[str, Cell] = self.data["cells"]
        return cells

    def add(self, name: str, cell: Cell) -> None:
        """Remember a cell and write the file."""
        self.cells[name] = cell
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.path) as temporary:
            temporary.write_text(json.dumps(self.data, indent=1))


def seconds(value: float | None) -> str:
    """A time with three digits."""
    if value is None:
        return ""
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


def table(cells: dict[str, Cell]) -> str:
    """Markdown table: a row for each contestant of each cell that times jobs."""
    rows = [("model", "precision", "work", "code", "time", "ratio", "peak GB", "TFLOP", "of matmul rate")]
    for name, cell in cells.items():
        for who, result in cell.get("contestants", {}).items():
            model, dtype, job = name.split("/")
            rows.append(
                (
                    *(model, dtype, job, who, seconds(result["time"])),
                    _number(result.get("ratio"), "{:.2f}"),
                    _number(result.get("peak_gb"), "{:.2f}"),
                    _number(result.get("tflop"), "{:.3g}"),
                    _number(result.get("matmul_fraction"), "{:.0%}"),
                )
            )
    notes = [f"{name}: {cell['text']}" for name, cell in cells.items() if "text" in cell]
    return markdown(rows) + "".join(f"\n- {note}" for note in [*notes, *precision_notes(cells)]) + "\n"


def precision_notes(cells: dict[str, Cell]) -> list[str]:
    """How our time in bfloat16 compares with that in float32, for work that was timed in both."""
    notes = []
    for name, cell in cells.items():
        model, dtype, job = name.split("/")
        half = cells.get(f"{model}/bfloat16/{job}", {})
        if dtype == "float32" and "contestants" in cell and "contestants" in half:
            ratio = half["contestants"]["ours"]["time"] / cell["contestants"]["ours"]["time"]
            notes.append(f"{model}/{job}: bfloat16 takes {ratio:.2f}x the time of float32")
    return notes


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table with aligned columns; the first row is the head."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def median(values: Iterable[float]) -> float:
    """Median, as a float."""
    return float(statistics.median(values))


def plot_growth(cells: dict[str, Cell], path: Path) -> bool:
    """Draw time and peak memory of a denoiser pass over batch and picture size; False when nothing was measured."""
    grown = {name: cell["growth"] for name, cell in cells.items() if cell.get("growth")}
    if not grown:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 7), layout="constrained")
    for name, points in grown.items():
        smallest = (min(p["batch"] for p in points), min(p["pixels"] for p in points))
        for column, (along, fixed) in enumerate((("pixels", "batch"), ("batch", "pixels"))):
            line = [p for p in points if p[fixed] == smallest[0 if fixed == "batch" else 1]]
            for row, (key, label) in enumerate((("time", "seconds"), ("peak_gb", "peak memory, GB"))):
                shown = [p for p in line if p.get(key) is not None]
                if shown:
                    xs = [p[along] ** 2 / 1e6 if along == "pixels" else p[along] for p in shown]
                    axes[row, column].plot(xs, [p[key] for p in shown], marker="o", label=name)
                axes[row, column].set_ylabel(label)
                axes[row, column].set_xlabel("megapixels" if along == "pixels" else "pictures per batch")
    for axis in axes.flat:
        axis.set_ylim(bottom=0)
    axes[0, 0].legend()
    figure.savefig(path)
    pyplot.close(figure)
    return True
