"""Pieces of a web page that is one file: text, tables, curves and pictures, nothing from elsewhere."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

Points = Sequence[tuple[float, float]]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .2rem .9rem .2rem 0; vertical-align: top; }
th { font-weight: 600; } tr + tr td, tr + tr th { border-top: 1px solid #e4e4e4; }
pre { background: #f4f4f2; padding: .7rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
img, svg { max-width: 100%; height: auto; } td img { min-width: 20rem; }
figure { margin: 0; } .muted, figcaption { color: #666; }
svg text { font: 11px system-ui, sans-serif; fill: #666; }
"""
# Width in pixels and JPEG quality, tried in turn until the pictures fit.
SIZES = ((720, 88), (640, 78), (480, 70), (360, 60), (240, 45))
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 180, 52, 24, 10  # of a curve


def escape(text: object) -> str:
    """`text` as the content or attribute of an element."""
    return html.escape(str(text), quote=True)


def page(title: str, sections: Mapping[str, str]) -> str:
    """A whole page; the keys of `sections` are headings, their values HTML, and empty ones are left out."""
    body = "".join(f"<h2>{escape(name)}</h2>\n{content}\n" for name, content in sections.items() if content)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n{body}</body></html>\n"
    )


def table(rows: Sequence[Sequence[object]], head: Sequence[str] = ()) -> str:
    """A table; cells are plain text. Without `head` the first cell of each row is its heading."""
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"] if head else []
    for row in rows:
        tags = ["td" if head or number else "th" for number in range(len(row))]
        cells = zip(tags, row, strict=True)
        lines.append("<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for tag, cell in cells) + "</tr>")
    return f"<table>{''.join(lines)}</table>" if rows else ""


def embed_images(paths: Sequence[Path], budget: int) -> dict[Path, str]:
    """`data:` addresses of pictures, as JPEG, made smaller until all of them take at most `budget` characters.

    Files that are no pictures are left out.
    """
    found: dict[Path, str] = {}
    for width, quality in SIZES:
        found = {path: data for path in paths if (data := _data_uri(path, width, quality)) is not None}
        if sum(map(len, found.values())) <= budget:
            return found
    total, kept = 0, {}
    for path, data in found.items():  # even the smallest are too many: the first ones
        total += len(data)
        if total > budget:
            break
        kept[path] = data
    return kept


def _data_uri(path: Path, width: int, quality: int) -> str | None:
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as file:
            image = file.convert("RGB")
    except OSError:
        return None
    if image.width > width:
        image = image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def figure(source: str, caption: str) -> str:
    """A picture with a line below it."""
    text = escape(caption)
    return f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>'


def smooth(points: Points, weight: float = 0.9) -> list[tuple[float, float]]:
    """Running average of the values, `weight` of it the past; the start is not pulled to zero."""
    average, total, result = 0.0, 0.0, []
    for x, y in points:
        average, total = weight * average + (1 - weight) * y, weight * total + 1 - weight
        result.append((x, average / total))
    return result


def curve(points: Points, title: str, smoothed: bool = False, mark: float | None = None) -> str:
    """A line over steps as inline SVG; with `smoothed` a running average before the pale line of the values.

    `mark`: the step whose point stands out. Values that are not finite are left out.
    """
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if len(points) < 2:
        return ""
    line = smooth(points) if smoothed else points
    x0, x1 = points[0][0], points[-1][0]
    ordered = sorted(y for _, y in points)
    # a smoothed curve may leave a few outliers above its frame
    low, high = ordered[0], ordered[-1 - (len(ordered) // 50 if smoothed else 0)]
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - pad, high + pad
    # as many digits as tell the ends of the axis apart
    digits = max(3, 2 + math.ceil(math.log10(max(abs(low), abs(high)) / (high - low))))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x0) / ((x1 - x0) or 1)
        up = (min(y, high) - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - 8), HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP)

    def polyline(values: Points, colour: str, width: float) -> str:
        coordinates = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in values)
        return f'<polyline points="{coordinates}" fill="none" stroke="{colour}" stroke-width="{width}"/>'

    parts = []
    for y in (low + pad, (low + high) / 2, high - pad):
        height = place(x0, y)[1]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 8}" y1="{height:.1f}" y2="{height:.1f}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{y:.{digits}g}</text>')
    for x in (x0, (x0 + x1) // 2, x1):
        anchor = "start" if x == x0 else "end" if x == x1 else "middle"
        parts.append(f'<text x="{place(x, low)[0]:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{x:g}</text>')
    if smoothed:
        parts.append(polyline(points, "#c9d8ea", 1))
    parts.append(polyline(line, "#2b6cb0", 1.8))
    for x, y in points if not smoothed else ():
        colour, radius = ("#c05621", 5) if x == mark else ("#2b6cb0", 2.2)
        across, up = place(x, y)
        parts.append(f'<circle cx="{across:.1f}" cy="{up:.1f}" r="{radius}" fill="{colour}"/>')
    text = escape(title)
    drawing = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="{text}">{"".join(parts)}</svg>'
    )
    return f"<figure>{drawing}<figcaption>{text}</figcaption></figure>"
