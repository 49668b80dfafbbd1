"""A table as Markdown, CSV, JSON and LaTeX, published figures beside ours."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evaluation.experiments import Row
from evaluation.results import TableResult, metric_notes
from evaluation.stats import LEVEL, Interval
from ldm.checkpoint import atomic_path

DASH = "–"
FEW = 5  # a bootstrap over fewer concepts says too little
PERCENT = round(100 * LEVEL)
METHOD = (
    f"Brackets: {PERCENT} % bootstrap intervals over concepts and, within them, seeds; differences are paired. A claim "
    "holds when the interval of its difference (left side minus right side) lies above 0, does not when it lies below, "
    "and is undecided otherwise."
)


def number(value: float | None, digits: int = 3) -> str:
    """A figure, or a dash."""
    return DASH if value is None or math.isnan(value) else f"{value:.{digits}f}"


def with_interval(interval: Interval | None, digits: int = 3) -> str:
    """`0.788 [0.780, 0.795]`, without brackets where no interval is known, or a dash."""
    return DASH if interval is None or math.isnan(interval.mean) else interval.text(digits)


def method_note(result: TableResult) -> str:
    """How intervals and verdicts come about, with a warning where they rest on little."""
    concepts = {record["concept"] for record in result.cells}
    if 0 < len(concepts) < FEW:
        return f"{METHOD} With {len(concepts)} concept{'s' * (len(concepts) > 1)} the intervals are too narrow."
    return METHOD


def progress_note(result: TableResult) -> str:
    """Says when some cells are missing; else empty."""
    if result.done == result.total:
        return ""
    return f"Not finished: {result.done} of {result.total} cells are there. The same command goes on."


# ------------------------------------------------------------------------------------------------------ markdown


def to_markdown(result: TableResult) -> str:
    """The table, the verdicts and what led to them."""
    table = result.table
    lines = [f"# {table.title}", "", f"Published figures: {table.source}.", ""]
    if note := progress_note(result):
        lines += [f"**{note}**", ""]
    lines += markdown_rows(result)
    if result.findings:
        lines += ["", "## What the paper claims", "", *markdown_claims(result)]
    lines += ["", method_note(result), ""]
    lines += [f"- {note}" for note in (*metric_notes(result), *table.notes)]
    lines += ["", "## How", ""]
    lines += [f"- {key}: {value}" for key, value in result.facts.items()]
    return "\n".join(lines) + "\n"


def markdown_rows(result: TableResult) -> list[str]:
    """The lines of the table itself."""
    header, rows = ["setup"], []
    for metric in result.metrics():
        header.append(result.label(metric))
        if is_published(result, metric):
            header.append("published")
    for row in result.table.rows:
        cells = [row.label]
        for metric in result.metrics():
            cells.append(with_interval(result.interval(metric, row)))
            if is_published(result, metric):
                cells.append(number(row.published.get(metric)))
        rows.append(cells)
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)]


def is_published(result: TableResult, metric: str) -> bool:
    """Whether any row has a published figure of the metric."""
    return any(metric in row.published for row in result.table.rows)


def markdown_claims(result: TableResult) -> list[str]:
    """The lines of the list of claims."""
    lines = ["| claim | verdict | difference | in our figures |", "| --- | --- | --- | --- |"]
    for finding in result.findings:
        lines.append(
            f"| {finding.claim.says} | **{finding.verdict}** | {with_interval(finding.difference, 4)} "
            f"| `{finding.claim.holds_if}` |"
        )
    return lines


# ----------------------------------------------------------------------------------------------------- csv, json


def to_csv(result: TableResult) -> str:
    """One line per row: name, label, and for each metric mean, bounds, published figure."""
    out = io.StringIO()
    header = ["row", "label"]
    for metric in result.metrics():
        header += [metric, f"{metric}_low", f"{metric}_high", f"{metric}_published"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for row in result.table.rows:
        line: list[Any] = [row.name, row.label]
        for metric in result.metrics():
            found = result.interval(metric, row)
            bounds = (found.mean, found.low, found.high) if found else (None, None, None)
            line += ["" if value is None or math.isnan(value) else f"{value:.6g}" for value in bounds]
            line.append(row.published.get(metric, ""))
        writer.writerow(line)
    return out.getvalue()


def to_cells_csv(result: TableResult) -> str:
    """One line per finished cell with all its metrics."""
    out = io.StringIO()
    columns = list(dict.fromkeys(key for record in result.cells for key in record))
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for record in result.cells:
        writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in record.items()})
    return out.getvalue()


def to_json(result: TableResult) -> str:
    """Everything that the other files show, for programs."""
    table = result.table
    rows = {
        row.name: {
            "label": row.label,
            "published": dict(row.published),
            "ours": {metric: bounds(result.interval(metric, row)) for metric in result.metrics()},
        }
        for row in table.rows
    }
    claims = [
        {
            "says": finding.claim.says,
            "holds_if": finding.claim.holds_if,
            "verdict": finding.verdict,
            "difference": bounds(finding.difference),
        }
        for finding in result.findings
    ]
    content = {
        "table": table.name,
        "title": table.title,
        "source": table.source,
        "done": result.done,
        "total": result.total,
        "facts": dict(result.facts),
        "rows": rows,
        "claims": claims,
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def bounds(interval: Interval | None) -> dict[str, float | None] | None:
    """Mean and bounds; null for what is not known."""
    if interval is None:
        return None
    values = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    return {key: None if math.isnan(value) else round(value, 6) for key, value in values.items()}


# --------------------------------------------------------------------------------------------------------- latex


def to_latex(result: TableResult) -> str:
    r"""A `tabular` for booktabs: our mean with half the interval's width, and the published figure."""
    metrics = result.metrics()
    columns = "l" + "".join("rr" if is_published(result, metric) else "r" for metric in metrics)
    header = ["Setup"]
    for metric in metrics:
        header.append(escape(result.label(metric)))
        if is_published(result, metric):
            header.append("published")
    lines = [f"\\begin{{tabular}}{{{columns}}}", "\\toprule", " & ".join(header) + " \\\\", "\\midrule"]
    for row in result.table.rows:
        lines.append(" & ".join(latex_cells(result, row)) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def latex_cells(result: TableResult, row: Row) -> list[str]:
    """The cells of one line."""
    cells = [escape(row.label)]
    for metric in result.metrics():
        found = result.interval(metric, row)
        if found is None:
            cells.append("--")
        elif math.isnan(found.low):
            cells.append(f"{found.mean:.3f}")
        else:
            cells.append(f"${found.mean:.3f} \\pm {(found.high - found.low) / 2:.3f}$")
        if is_published(result, metric):
            cells.append(number(row.published.get(metric)).replace(DASH, "--"))
    return cells


def escape(text: str) -> str:
    """Text for LaTeX."""
    special = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


# --------------------------------------------------------------------------------------------------------- files

WRITERS: dict[str, Callable[[TableResult], str]] = {
    "table.md": to_markdown,
    "table.csv": to_csv,
    "cells.csv": to_cells_csv,
    "table.json": to_json,
    "table.tex": to_latex,
}


def write_tables(result: TableResult, folder: Path) -> list[Path]:
    """Write the table in every format; returns the files."""
    return [write_text(folder / name, writer(result)) for name, writer in WRITERS.items()]


def write_text(path: Path, text: str) -> Path:
    """Write a text file at once."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
