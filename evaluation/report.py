"""A table as one HTML page that needs nothing else: verdicts first, then figure, table and pictures."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from evaluation.claims import Finding
from evaluation.concepts import WORD
from evaluation.experiments import Row
from evaluation.gallery import Exhibit
from evaluation.results import TableResult, metric_notes
from evaluation.stats import FAILS, HOLDS, UNDECIDED
from evaluation.tables import (
    DASH,
    claims_title,
    concept_lines,
    is_published,
    method_note,
    number,
    progress_note,
    share,
    source_note,
    unit,
    with_interval,
    write_text,
)

SIGNS = {HOLDS: ("holds", "✓"), FAILS: ("fails", "✗"), UNDECIDED: ("open", "?")}
STYLE = """
:root { --ink: #1d2530; --soft: #5c6773; --line: #dfe4e8; --paper: #fff; --band: #f5f7f9;
  --ours: #1f6f8b; --published: #b8572a; --yes: #1c7c4a; --no: #b3261e; --open: #8a6d00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa5b1; --line: #333c46; --paper: #14191f;
  --band: #1c232b; --ours: #6cc3e0; --published: #f0a07a; --yes: #6fd09c; --no: #ff8a80; --open: #e8c547; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 1080px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.25rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .4rem; text-transform: capitalize; }
p { margin: .4rem 0; } .soft { color: var(--soft); } small, .small { font-size: .86rem; }
.summary { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: .6rem 1rem; min-width: 8rem; }
.tile b { display: block; font-size: 1.7rem; line-height: 1.2; }
.holds { color: var(--yes); } .fails { color: var(--no); } .open { color: var(--open); }
.note { border-left: 4px solid var(--open); background: var(--band); padding: .5rem .9rem; }
ul.claims { list-style: none; margin: 0; padding: 0; }
.claims li { display: grid; grid-template-columns: 6.5rem 1fr 13rem; gap: .75rem; padding: .5rem 0;
  border-top: 1px solid var(--line); align-items: start; }
.claims .verdict { font-weight: 650; } .claims code { color: var(--soft); font-size: .8rem; word-break: break-word; }
.claims .figure { text-align: right; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-top: 1px solid var(--line); text-align: right; white-space: nowrap; }
.wide th { white-space: normal; min-width: 5rem; }
th:first-child, td:first-child { text-align: left; } thead th { border-top: 0; vertical-align: bottom; }
tbody tr:hover { background: var(--band); } td .soft { font-size: .8rem; }
td.published, th.published { color: var(--published); } td.ours b { color: var(--ours); }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--soft); }
img.figure { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 8px; }
.strip { display: grid; grid-template-columns: 11rem 1fr; gap: .75rem; align-items: center; margin: .2rem 0; }
.strip img { max-width: 100%; height: auto; border-radius: 4px; display: block; }
dl { display: grid; grid-template-columns: 9rem 1fr; gap: .25rem .75rem; margin: 0; } dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; } footer { margin-top: 2.5rem; color: var(--soft); font-size: .86rem; }
@media (max-width: 700px) { .claims li { grid-template-columns: 1fr; gap: .1rem; } .claims .figure { text-align: left; }
  .strip { grid-template-columns: 1fr; } dl { grid-template-columns: 1fr; } }
"""


def to_html(result: TableResult, figure: bytes | None = None, gallery: Sequence[Exhibit] = ()) -> str:
    """The whole page."""
    table = result.table
    model_note = f" Model: {escape(result.facts['Model'])}." if "Model" in result.facts else ""
    parts = [
        f"<h1>{escape(table.title)}</h1>",
        f'<p class="soft">{escape(source_note(result))}{model_note}</p>',
        f'<p class="note">{escape(progress_note(result))}</p>' if progress_note(result) else "",
        html_summary(result),
        html_figure(figure),
        html_claims(result),
        html_table(result),
        html_concepts(result),
        html_gallery(gallery),
        html_facts(result),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(table.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def html_summary(result: TableResult) -> str:
    """How many claims hold, as large figures."""
    if not result.findings:
        return ""
    counts = result.verdicts()
    words = {HOLDS: "hold", FAILS: "do not", UNDECIDED: "undecided"}
    tiles = [
        f'<div class="tile"><b class="{SIGNS[verdict][0]}">{counts[verdict]}</b>{words[verdict]}</div>'
        for verdict in (HOLDS, FAILS, UNDECIDED)
    ]
    return f'<div class="summary">{"".join(tiles)}</div>'


def html_claims(result: TableResult) -> str:
    """Every claim with its verdict, in words and as it was decided."""
    if not result.findings:
        return ""
    items = []
    for finding in result.findings:
        kind, sign = SIGNS[finding.verdict]
        items.append(
            f'<li><span class="verdict {kind}">{sign} {finding.verdict}</span>'
            f"<span>{escape(finding.claim.says)}<br><code>{escape(finding.claim.holds_if)}</code></span>"
            f'<span class="figure">{escape(with_interval(finding.difference, 4))}'
            f"{html_share(result, finding)}</span></li>"
        )
    measures = "".join(
        f'<p class="measure">{escape(says)}: <b>{escape(with_interval(found))}</b></p>'
        for says, found in result.measures.items()
    )
    listed = f'<ul class="claims">{"".join(items)}</ul>'
    note = f'<p class="soft small">{escape(method_note(result))}</p>'
    return f"<h2>{claims_title(result)}</h2>\n{measures}{listed}\n{note}"


def html_share(result: TableResult, finding: Finding) -> str:
    """For how many concepts a claim holds by itself."""
    return "" if finding.concepts is None else f'<br><small class="soft">{share(finding)} {unit(result)}s</small>'


def html_figure(figure: bytes | None) -> str:
    """The figure, inside the page."""
    if figure is None:
        return ""
    address = base64.b64encode(figure).decode()
    return f'<h2>Figure</h2>\n<img class="figure" alt="the table as a figure" src="data:image/png;base64,{address}">'


def html_table(result: TableResult) -> str:
    """The table with the metrics that were published; further ones in a table to unfold."""
    main = list(result.table.columns)
    more = [metric for metric in result.metrics() if metric not in main]
    notes = "".join(f"<li>{escape(note)}</li>" for note in (*metric_notes(result), *result.table.notes))
    further = f"<details><summary>Further metrics</summary>{html_rows(result, more)}</details>" if more else ""
    return f'<h2>Table</h2>\n{html_rows(result, main)}\n{further}\n<ul class="soft small">{notes}</ul>'


def html_rows(result: TableResult, metrics: Sequence[str]) -> str:
    """One line per row of the table, with some metrics."""
    header = ["<th>setup</th>"]
    for metric in metrics:
        header.append(f"<th>{escape(result.label(metric))}</th>")
        if is_published(result, metric):
            header.append('<th class="published">published</th>')
    rows = [f"<tr>{''.join(html_cells(result, row, metrics))}</tr>" for row in result.table.rows]
    head, body = f"<thead><tr>{''.join(header)}</tr></thead>", f"<tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table>{head}{body}</table></div>'


def html_cells(result: TableResult, row: Row, metrics: Sequence[str]) -> list[str]:
    """The cells of one line."""
    cells = [f"<td>{escape(row.label)}</td>"]
    for metric in metrics:
        found = result.interval(metric, row)
        if found is None:
            cells.append(f'<td class="ours">{DASH}</td>')
        else:
            mean, _, rest = with_interval(found).partition(" ")
            cells.append(f'<td class="ours"><b>{mean}</b> <span class="soft">{rest}</span></td>')
        if is_published(result, metric):
            cells.append(f'<td class="published">{number(row.published.get(metric))}</td>')
    return cells


def html_concepts(result: TableResult) -> str:
    """The table by concept, where it is wanted."""
    if not result.table.by_concept or not result.concepts:
        return ""
    header, *lines = concept_lines(result)
    head = "".join(f"<th>{escape(word)}</th>" for word in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(word)}</td>' for word in line)}</tr>" for line in lines)
    table = f'<table class="wide"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<h2>By concept</h2>\n<div class="scroll">{table}</div>'


def html_gallery(gallery: Sequence[Exhibit]) -> str:
    """Strips of pictures, one line per row and concept."""
    if not gallery:
        return ""
    parts = ["<h2>Pictures</h2>"]
    for exhibit in gallery:
        parts.append(f"<h3>{escape(exhibit.label)}</h3>")
        drawn = [strip.tiles for strip in exhibit.strips[1:]]
        listed = dict.fromkeys(next((tiles for tiles in drawn if WORD in "".join(tiles)), drawn[0]))
        parts.append(f'<p class="soft small">From left to right: {escape("; ".join(listed))}</p>')
        parts += [
            f'<div class="strip"><span>{escape(strip.label)}</span>'
            f'<img alt="{escape(strip.label)}" title="{escape(" | ".join(strip.tiles))}" src="{strip.address}"></div>'
            for strip in exhibit.strips
        ]
    return "\n".join(parts)


def html_facts(result: TableResult) -> str:
    """What the figures were made with."""
    facts = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in result.facts.items())
    return f"<h2>How</h2>\n<dl>{facts}</dl>"


def write_report(result: TableResult, path: Path, figure: Path | None, gallery: Sequence[Exhibit]) -> Path:
    """Write the page; `figure` is the PNG to put into it."""
    return write_text(path, to_html(result, figure.read_bytes() if figure else None, gallery))
