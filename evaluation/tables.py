"""A table as Markdown, CSV, JSON and LaTeX, published figures beside ours."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.claims import Finding
from evaluation.experiments import Row
from evaluation.results import TableResult, metric_notes
from evaluation.stats import LEVEL, Interval
from ldm.checkpoint import atomic_path

DASH = "–"
KEY = "key"  # the column of cells.csv with the hash of all that a score depends on
FEW = 5  # a bootstrap over fewer concepts says too little
PERCENT = round(100 * LEVEL)
METHOD = (
    f"Brackets: {PERCENT} % bootstrap intervals over concepts and, within them, seeds; differences are paired. A claim "
    "holds when the interval of its difference (the side that should be larger minus the other) lies above 0, does not "
    "when it lies below, and is undecided otherwise; the concepts are those for which the difference is positive by "
    "itself."
)


OF_EVERY = (
    " What is said of every concept rests on the one with the smallest difference: Student's t over the seeds, with "
    "one deviation between seeds for all concepts, the upper bound corrected for their number."
)


def number(value: float | None, digits: int = 3) -> str:
    """A figure, or a dash."""
    return DASH if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def with_interval(interval: Interval | None, digits: int = 3) -> str:
    """`0.788 [0.780, 0.795]`, without brackets where no interval is known, or a dash."""
    return DASH if interval is None or math.isnan(interval.mean) else interval.text(digits)


def method_note(result: TableResult) -> str:
    """How intervals and verdicts come about, with a warning where they rest on little."""
    concepts = {record["concept"] for record in result.cells}
    note = METHOD + OF_EVERY * any(claim.every for claim in result.table.claims)
    if 0 < len(concepts) < FEW:
        note += f" With {len(concepts)} concept{'s' * (len(concepts) > 1)} the intervals are too narrow."
    note = note.replace("concept", unit(result))
    return note.replace("seeds", "questions") if result.table.kind == "user_study" else note


def unit(result: TableResult) -> str:
    """What the intervals are over, in the singular."""
    return {"inversion": "concept", "user_study": "participant"}.get(result.table.kind, "part")


def progress_note(result: TableResult) -> str:
    """Says when some cells are missing, and which rows cannot be compared for it; else empty."""
    if result.done >= result.total:
        return ""
    without = ", without --rows," if "--rows" in result.facts.get("Command", "").split() else ""
    note = f"Not finished: {result.done} of {result.total} cells are there. The same command{without} goes on."
    counts = Counter(record["row"] for record in result.cells)
    most = max(counts.values(), default=0)
    few = [f"{row.label} {counts[row.name]}" for row in result.table.rows if 0 < counts[row.name] < most]
    if few:
        note += f" Of {most} cells that other rows have, there are so far: {', '.join(few)}. Compare these rows with "
        note += "others only by the claims, which take the same cells of both."
    return note


def source_note(result: TableResult) -> str:
    """Where the published figures come from, or what there is in their stead."""
    table = result.table
    published = any(row.published for row in table.rows)
    return f"Published figures: {table.source}." if published else f"No published figures: {table.source}."


def claims_title(result: TableResult) -> str:
    """Heading of the claims: a paper's, or what one may expect."""
    return "What the paper claims" if any(row.published for row in result.table.rows) else "What should hold"


# ------------------------------------------------------------------------------------------------------ markdown


def to_markdown(result: TableResult) -> str:
    """The table, the verdicts and what led to them."""
    table = result.table
    lines = [f"# {table.title}", "", source_note(result), ""]
    if note := progress_note(result):
        lines += [f"**{note}**", ""]
    lines += markdown_rows(result)
    if result.findings:
        lines += ["", f"## {claims_title(result)}", "", *markdown_claims(result)]
    if result.measures:
        lines += ["", *(f"- {says}: **{with_interval(found)}**" for says, found in result.measures.items())]
    lines += ["", method_note(result), ""]
    lines += [f"- {note}" for note in (*metric_notes(result), *table.notes)]
    if result.table.by_concept:
        lines += ["", "## By concept", "", *markdown_concepts(result)]
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
    return markdown_lines(header, rows)


def markdown_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table whose cells may hold any text."""
    lines = (header, ["---"] * len(header), *rows)
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


def is_published(result: TableResult, metric: str) -> bool:
    """Whether any row has a published figure of the metric."""
    return any(metric in row.published for row in result.table.rows)


def markdown_claims(result: TableResult) -> list[str]:
    """The lines of the list of claims."""
    rows = [
        [
            finding.claim.says,
            f"**{finding.verdict}**",
            with_interval(finding.difference, 4),
            share(finding),
            f"`{finding.claim.holds_if}`",
        ]
        for finding in result.findings
    ]
    return markdown_lines(["claim", "verdict", "difference", f"{unit(result)}s", "in our figures"], rows)


def share(finding: Finding) -> str:
    """For how many concepts a claim holds by itself: "17 of 20"."""
    if finding.concepts is None or finding.concepts[1] == 0:
        return DASH
    return f"{finding.concepts[0]} of {finding.concepts[1]}"


def markdown_concepts(result: TableResult) -> list[str]:
    """The lines of the table by concept."""
    lines = concept_lines(result)
    return markdown_lines(lines[0], lines[1:])


def concept_lines(result: TableResult) -> list[list[str]]:
    """Header and lines of the table by concept: means over the seeds, at the table's scale."""
    rows = {row.name: row.label for row in result.table.rows}
    header, keys = ["concept"], []
    for metric in result.table.columns:
        for row, label in rows.items():
            if (metric, row) in result.intervals:
                header.append(f"{result.label(metric)}: {label}")
                keys.append(f"{metric}({row})")
    header += list(result.measures)
    keys += list(result.measures)
    names = [record["concept"].replace("_", " ") for record in result.concepts]
    values = [[number(record[key]) for key in keys] for record in result.concepts]
    return [header, *([name, *line] for name, line in zip(names, values, strict=True))]


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
        line: list[Any] = [csv_cell(row.name), csv_cell(row.label)]
        for metric in result.metrics():
            found = result.interval(metric, row)
            bounds = (found.mean, found.low, found.high) if found else (None, None, None)
            line += ["" if value is None or math.isnan(value) else f"{value:.6g}" for value in bounds]
            line.append(row.published.get(metric, ""))
        writer.writerow(line)
    return out.getvalue()


def to_cells_csv(result: TableResult) -> str:
    """One line per finished cell with all its metrics."""
    return cells_csv(result.cells)


def cells_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """One line per record; the hash comes last, so that a line that was cut off has none."""
    out = io.StringIO()
    columns = list(dict.fromkeys(key for record in records for key in record if key != KEY))
    columns += [KEY] * any(KEY in record for record in records)
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({key: csv_cell(value) for key, value in record.items()})
    return out.getvalue()


def csv_cell(value: Any) -> Any:
    """A figure with six digits; text that a spreadsheet would take for a formula gets an apostrophe."""
    if isinstance(value, float):
        return f"{value:.6g}"
    is_formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@")) and not _is_number(value)
    return f"'{value}" if is_formula else value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


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
            "concepts": finding.concepts,
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
        "measures": {says: bounds(found) for says, found in result.measures.items()},
        "concepts": [{key: known(value) for key, value in record.items()} for record in result.concepts],
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def bounds(interval: Interval | None) -> dict[str, float | None] | None:
    """Mean and bounds; null for what is not known."""
    if interval is None:
        return None
    return {key: known(value) for key, value in dataclasses.asdict(interval).items()}


def known(value: Any) -> Any:
    """A figure with six digits behind the point, None where there is none; anything else as it is."""
    if not isinstance(value, float):
        return value
    return round(value, 6) if math.isfinite(value) else None


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
