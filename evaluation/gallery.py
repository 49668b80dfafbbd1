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
from ldm.checkpoint import atomic_path
from ldm.generate_files import make_grid, slug

TILE = 96  # pixels of one picture in a strip
RECONSTRUCTIONS, EDITS = 4, 5
TRAINING = "training"


@dataclasses.dataclass(frozen=True)
class Strip:
    """A label, a picture in JPEG, what its tiles show, and the hash of the cell whose pictures they are."""

    label: str
    picture: bytes
    tiles: tuple[str, ...]
    key: str | None = None

    @property
    def address(self) -> str:
        """The picture as the text that HTML takes for one."""
        return "data:image/jpeg;base64," + base64.b64encode(self.picture).decode()


@dataclasses.dataclass(frozen=True)
class Exhibit:
    """The strips of one concept."""

    label: str
    strips: tuple[Strip, ...]


def make_gallery(
    request: Request, cells: Sequence[Cell], store: Store, kept: Path | None = None, concepts: int = 3
) -> list[Exhibit]:
    """Strips of the concepts that have most of them: training pictures, then each row that was drawn with one seed.

    kept: folder of the table, with the strips of an earlier run.
    """
    by_seed: dict[str, dict[int, list[tuple[Cell, Path | None]]]] = {
        concept.label: {seed: [] for seed in request.seeds} for concept in request.concepts
    }
    for cell in cells:
        if cell.drawing is None:
            continue
        earlier = strip_file(kept, cell.scoring.unit.key) if kept else None
        if store.is_done(cell.drawing.unit):
            by_seed[cell.concept.label][cell.seed].append((cell, None))
        elif earlier and earlier.is_file():
            by_seed[cell.concept.label][cell.seed].append((cell, earlier))
    drawn = {label: max(seeds.values(), key=len) for label, seeds in by_seed.items()}
    exhibits = []
    for concept in sorted(request.concepts, key=lambda concept: -len(drawn[concept.label]))[:concepts]:
        pictures = concept.pictures[:RECONSTRUCTIONS]
        strips = [Strip("training pictures", strip_picture(pictures), ("",) * len(pictures))]
        for cell, earlier in drawn[concept.label]:
            texts, files = zip(*chosen_tiles(cell, store), strict=True)
            picture = earlier.read_bytes() if earlier else strip_picture(files)
            strips.append(Strip(cell.row.label, picture, texts, cell.scoring.unit.key))
        exhibits.append(Exhibit(concept.label.replace("_", " "), tuple(strips)))
    return [exhibit for exhibit in exhibits if len(exhibit.strips) > 1]


def chosen_tiles(cell: Cell, store: Store) -> list[tuple[str, Path]]:
    """(prompt, file) of some reconstructions and one picture of each prompt for editing."""
    assert cell.drawing is not None
    folder = store.folder(cell.drawing.unit)
    texts = cell.drawing.prompts
    chosen = [(texts[0][0], cell.drawing.file(folder, 0, k)) for k in range(min(RECONSTRUCTIONS, cell.drawing.count))]
    edits = range(1, min(len(texts), EDITS + 1))
    return chosen + [(texts[p][0], cell.drawing.file(folder, p, 0)) for p in edits]


def strip_file(folder: Path, key: str) -> Path:
    """Where a cell's strip is kept beside its table."""
    return folder / "strips" / f"{key}.jpg"


def save_strips(gallery: Sequence[Exhibit], folder: Path) -> None:
    """Keep the strips beside the table, for reports that are written when the store is gone, and delete older ones."""
    files = {}
    for strip in (strip for exhibit in gallery for strip in exhibit.strips):
        if strip.key is not None:
            files[strip_file(folder, strip.key)] = strip.picture
    for path, picture in files.items():
        with atomic_path(path) as temporary:
            temporary.write_bytes(picture)
    for path in set((folder / "strips").glob("*.jpg")) - set(files):
        path.unlink(missing_ok=True)


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


def strip_picture(files: Iterable[Path]) -> bytes:
    """One picture of several side by side, in JPEG."""
    tiles = []
    for file in files:
        with Image.open(file) as image:
            tiles.append(np.asarray(image.convert("RGB").resize((TILE, TILE), Image.Resampling.BICUBIC)))
    out = io.BytesIO()
    Image.fromarray(make_grid(np.stack(tiles), columns=len(tiles))).save(out, format="JPEG", quality=88)
    return out.getvalue()
