"""Pictures of a table for people: strips for the report, and all of them sorted into folders."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from evaluation.cells import Store
from evaluation.clean_pictures import clean_picture
from evaluation.export import LIST, export
from evaluation.plan import Cell, Request
from ldm.checkpoint import atomic_path
from ldm.generate_files import make_grid, slug

TILE = 96  # pixels of one picture in a strip
RECONSTRUCTIONS, EDITS = 4, 5
TRAINING = "training"
EXPORT_LIST = f"{TRAINING}/{LIST}"
Tiles = list[tuple[str, Path]]  # prompt and file of each picture of a strip


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

    kept: folder of the table, with the strips of an earlier run. Pictures that are gone are left out.
    """
    by_seed: dict[str, dict[int, list[tuple[Cell, Path | Tiles]]]] = {
        concept.label: {seed: [] for seed in request.seeds} for concept in request.concepts
    }
    for cell in cells:
        if source := find_strip(cell, store, kept):
            by_seed[cell.concept.label][cell.seed].append((cell, source))
    drawn = {label: max(seeds.values(), key=len) for label, seeds in by_seed.items()}
    exhibits = []
    for concept in sorted(request.concepts, key=lambda concept: -len(drawn[concept.label]))[:concepts]:
        pictures = concept.pictures[:RECONSTRUCTIONS]
        strips = [Strip("training pictures", strip_picture(pictures), ("",) * len(pictures))]
        strips += [make_strip(cell, source, store) for cell, source in drawn[concept.label]]
        exhibits.append(Exhibit(concept.label.replace("_", " "), tuple(strips)))
    return [exhibit for exhibit in exhibits if len(exhibit.strips) > 1]


def find_strip(cell: Cell, store: Store, kept: Path | None) -> Path | Tiles | None:
    """What a cell's strip is made of: its pictures, or where some are gone the strip that was kept, or what is left."""
    if cell.drawing is None:
        return None
    tiles = chosen_tiles(cell, store)
    there = [tile for tile in tiles if tile[1].is_file()] if store.is_done(cell.drawing.unit) else []
    earlier = strip_file(kept, cell.scoring.unit.key) if kept else None
    if len(there) < len(tiles) and earlier and earlier.is_file():
        return earlier
    return there or None


def make_strip(cell: Cell, source: Path | Tiles, store: Store) -> Strip:
    """A cell's strip; one that lacks tiles has no key, so that it is not kept for later runs as if it were whole."""
    tiles = chosen_tiles(cell, store)
    key = cell.scoring.unit.key
    if isinstance(source, Path):
        return Strip(cell.row.label, source.read_bytes(), tuple(text for text, _ in tiles), key)
    texts, files = zip(*source, strict=True)
    return Strip(cell.row.label, strip_picture(files), texts, key if len(source) == len(tiles) else None)


def chosen_tiles(cell: Cell, store: Store) -> Tiles:
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

    Each prompt's folder has its text, without the word, in `prompt.txt`. See `export` for what was there before.
    """
    files: dict[str, Path | str] = {}
    for concept in request.concepts:
        for number, picture in enumerate(concept.pictures):
            files[f"{TRAINING}/{concept.label}/{number:02}{picture.suffix.lower()}"] = picture
    for cell in cells:
        if cell.drawing is None or cell.seed != request.seeds[0] or not store.is_done(cell.drawing.unit):
            continue
        drawn = store.folder(cell.drawing.unit)
        for prompt, text in enumerate(cell.scoring.texts):
            target = f"{cell.row.name}/{cell.concept.label}/{prompt:02}-{slug(text)}"
            for k in range(cell.drawing.count):
                files[f"{target}/{k:03}.png"] = cell.drawing.file(drawn, prompt, k)
            files[f"{target}/prompt.txt"] = text
    return export(folder, files, listed_in=EXPORT_LIST)  # the folder itself holds rows and nothing else


def strip_picture(files: Iterable[Path]) -> bytes:
    """One picture of several, as training sees them, side by side, in JPEG."""
    tiles = [np.asarray(clean_picture(file).resize((TILE, TILE), Image.Resampling.BICUBIC)) for file in files]
    out = io.BytesIO()
    Image.fromarray(make_grid(np.stack(tiles), columns=len(tiles))).save(out, format="JPEG", quality=88)
    return out.getvalue()
