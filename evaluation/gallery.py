"""Pictures of a table for people: strips for the report, and all of them sorted into folders."""

from __future__ import annotations

import base64
import dataclasses
import io
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from evaluation.cells import Store
from evaluation.plan import Cell, Request
from ldm.generate_files import make_grid, slug

TILE = 96  # pixels of one picture in a strip
RECONSTRUCTIONS, EDITS = 4, 5
TRAINING = "training"


@dataclasses.dataclass(frozen=True)
class Strip:
    """A label, the address of a picture (`data:...`), and what its tiles show."""

    label: str
    picture: str
    tiles: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Exhibit:
    """The strips of one concept."""

    label: str
    strips: tuple[Strip, ...]


def make_gallery(request: Request, cells: Sequence[Cell], store: Store, concepts: int = 3) -> list[Exhibit]:
    """Strips of the first seed for the first concepts: training pictures, then each row that was drawn."""
    exhibits = []
    for concept in request.concepts[:concepts]:
        pictures = concept.pictures[:RECONSTRUCTIONS]
        strips = [Strip("training pictures", picture_address(pictures), ("",) * len(pictures))]
        for cell in cells:
            if cell.concept is not concept or cell.seed != request.seeds[0] or cell.drawing is None:
                continue
            chosen = chosen_tiles(cell, store)
            if chosen:
                texts, files = zip(*chosen, strict=True)
                strips.append(Strip(cell.row.label, picture_address(files), texts))
        exhibits.append(Exhibit(concept.label.replace("_", " "), tuple(strips)))
    return [exhibit for exhibit in exhibits if len(exhibit.strips) > 1]


def chosen_tiles(cell: Cell, store: Store) -> list[tuple[str, Path]]:
    """(prompt, file) of some reconstructions and one picture of each prompt for editing; none until all are drawn."""
    assert cell.drawing is not None
    if not store.is_done(cell.drawing.unit):
        return []
    folder = store.folder(cell.drawing.unit)
    texts = cell.drawing.prompts
    chosen = [(texts[0][0], cell.drawing.file(folder, 0, k)) for k in range(min(RECONSTRUCTIONS, cell.drawing.count))]
    edits = range(1, min(len(texts), EDITS + 1))
    return chosen + [(texts[p][0], cell.drawing.file(folder, p, 0)) for p in edits]


def export_pictures(request: Request, cells: Sequence[Cell], store: Store, folder: Path) -> Path:
    """Copy the first seed's pictures to `<folder>/<row>/<concept>/<prompt>/`, training pictures to `training/`.

    Each prompt's folder has its text, without the word, in `prompt.txt`.
    """
    for concept in request.concepts:
        for number, picture in enumerate(concept.pictures):
            copy(picture, folder / TRAINING / concept.label / f"{number:02}{picture.suffix.lower()}")
    for cell in cells:
        if cell.drawing is None or cell.seed != request.seeds[0] or not store.is_done(cell.drawing.unit):
            continue
        drawn = store.folder(cell.drawing.unit)
        for prompt, text in enumerate(cell.scoring.texts):
            target = folder / cell.row.name / cell.concept.label / f"{prompt:02}-{slug(text)}"
            for k in range(cell.drawing.count):
                copy(cell.drawing.file(drawn, prompt, k), target / f"{k:03}.png")
            (target / "prompt.txt").write_text(text, encoding="utf-8")
    return folder


def copy(source: Path, target: Path) -> None:
    """Copy a file into a folder that is made if need be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def picture_address(files: Iterable[Path]) -> str:
    """One picture of several side by side, as the text that HTML takes for a picture."""
    tiles = []
    for file in files:
        with Image.open(file) as image:
            tiles.append(np.asarray(image.convert("RGB").resize((TILE, TILE), Image.Resampling.BICUBIC)))
    out = io.BytesIO()
    Image.fromarray(make_grid(np.stack(tiles), columns=len(tiles))).save(out, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
