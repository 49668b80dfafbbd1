"""A sheet of what the model sees: pictures as they enter the model, each with its caption."""

from __future__ import annotations

import textwrap
import unicodedata
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ldm.data.image import to_uint8
from ldm.data.seeding import seeded

CELL = 160  # pixels a side, at least
GAP = 8
LINES = 3
FONT_SIZE = 12


def contact_sheet(dataset: Any, path: str | Path, count: int = 16, columns: int = 4, seed: int = 0) -> Path:
    """Write the first `count` items of `dataset` (`image`, and `caption` and `loss_mask` where present) as one PNG.

    The run's random generators are left as they were. Where an item has a mask, what it hides is shown darker.
    """
    count = min(count, len(dataset))
    if count < 1:
        raise ValueError("the data set is empty; there is nothing to show")
    with seeded(seed):
        items = [dataset[i] for i in range(count)]
    font = ImageFont.load_default(FONT_SIZE)
    line = FONT_SIZE + 3
    side = max(side for item in items for side in item["image"].shape[:2])
    cell = side * -(-CELL // side)  # small pictures are shown in whole multiples
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (columns * (cell + GAP) + GAP, rows * (cell + LINES * line + GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, item in enumerate(items):
        left = GAP + number % columns * (cell + GAP)
        top = GAP + number // columns * (cell + LINES * line + GAP)
        sheet.paste(_tile(item, cell), (left, top))
        words = textwrap.wrap(_drawable(str(item.get("caption", ""))), width=cell // (FONT_SIZE // 2), max_lines=LINES)
        draw.multiline_text((left, top + cell + 2), "\n".join(words), fill="black", font=font, spacing=2)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _drawable(text: str) -> str:
    """Name the characters that the built-in font lacks: the letter alef becomes "<alef>"."""
    return "".join(c if ord(c) < 0x250 else f"<{unicodedata.name(c, '?').split()[-1].lower()}>" for c in text)


def _tile(item: dict[str, Any], cell: int) -> Image.Image:
    tile = Image.fromarray(to_uint8(item["image"]))
    if "loss_mask" in item:
        shade = Image.fromarray((255 * (0.35 + 0.65 * item["loss_mask"])).astype("uint8"))
        tile = Image.composite(tile, Image.new("RGB", tile.size), shade)
    scale = cell // max(tile.size)
    return tile.resize((tile.width * scale, tile.height * scale), Image.Resampling.NEAREST)
