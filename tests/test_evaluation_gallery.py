"""Pictures for people: strips of what is there, and folders that hold one export and nothing of an earlier one."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from evaluation.export import LIST, export
from evaluation.gallery import TILE, Exhibit, export_pictures, make_gallery, save_strips, strip_picture
from evaluation.plan import Drawing
from ldm.generate_files import make_grid

HIDDEN = f"training/{LIST}"


@dataclasses.dataclass
class World:
    """One concept, one row with two pictures of each of two prompts; what the gallery looks at of a table's parts."""

    root: Path
    count: int = 2
    texts: tuple[str, ...] = ("a photo of", "on the beach")
    rows: tuple[str, ...] = ("word",)

    def __post_init__(self) -> None:
        self.drawn = self.root / "store"
        picture = self.root / "given.png"
        Image.new("RGB", (16, 16), "red").save(picture)
        concept = SimpleNamespace(label="a_cup", pictures=(picture,))
        self.request = SimpleNamespace(concepts=(concept,), seeds=(0,))
        prompts = tuple((f"{text} *",) for text in self.texts)
        drawing = Drawing(None, (), prompts, self.count, 0, None)  # type: ignore[arg-type]
        scoring = SimpleNamespace(unit=SimpleNamespace(key="key"), texts=self.texts)
        self.cells = [
            SimpleNamespace(row=SimpleNamespace(name=row, label=row), concept=concept, seed=0, drawing=drawing,
                            scoring=scoring)
            for row in self.rows
        ]  # fmt: skip
        self.store = SimpleNamespace(is_done=lambda unit: True, folder=lambda unit: self.drawn)
        self.files = [drawing.file(self.drawn, p, k) for p in range(len(self.texts)) for k in range(self.count)]
        for file in self.files:
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), "blue").save(file)

    def gallery(self, kept: Path | None = None) -> list[Exhibit]:
        return make_gallery(self.request, self.cells, self.store, kept)  # type: ignore[arg-type]

    def export(self, folder: Path) -> set[str]:
        """Export the pictures; returns what is in the folder then."""
        export_pictures(self.request, self.cells, self.store, folder)  # type: ignore[arg-type]
        return files_in(folder)


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# -- strips --------------------------------------------------------------------------------------------------------


def test_pictures_that_are_gone_are_left_out_of_a_strip(world: World, tmp_path: Path):
    ((_, whole),) = (exhibit.strips for exhibit in world.gallery())
    assert whole.tiles == ("a photo of *", "a photo of *", "on the beach *")
    world.files[0].unlink()
    ((_, strip),) = (exhibit.strips for exhibit in world.gallery())
    assert strip.tiles == ("a photo of *", "on the beach *")
    with Image.open(io.BytesIO(strip.picture)) as image, Image.open(io.BytesIO(whole.picture)) as before:
        assert image.width < before.width
    save_strips(world.gallery(), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.jpg"))  # a later run would take it for a whole one
    for file in world.files:
        file.unlink(missing_ok=True)
    assert world.gallery() == []


def test_a_strip_that_was_kept_stands_in_for_pictures_that_are_gone(world: World, tmp_path: Path):
    whole = world.gallery()
    save_strips(whole, tmp_path / "out")
    world.files[0].unlink()
    assert world.gallery(tmp_path / "out") == whole


def test_strips_show_what_training_saw(tmp_path: Path):
    """A photo that lies on its side is turned upright, a cut-out has a white background."""
    photo = Image.new("RGB", (64, 32), "red")
    photo.paste("blue", (0, 0, 32, 32))
    tags = photo.getexif()
    tags[0x0112] = 6
    photo.save(tmp_path / "photo.png", exif=tags)
    cut_out = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    cut_out.paste((255, 0, 0, 255), (8, 8, 24, 24))
    cut_out.save(tmp_path / "cut_out.png")
    strip = np.asarray(Image.open(io.BytesIO(strip_picture([tmp_path / "photo.png", tmp_path / "cut_out.png"]))))
    assert strip.shape == make_grid(np.zeros((2, TILE, TILE, 3), np.uint8), columns=2).shape
    upper, lower, corner = strip[10, 10], strip[TILE - 10, 10], strip[10, TILE + 10]
    assert upper[2] > 200 > upper[0]
    assert lower[0] > 200 > lower[2]
    assert corner.min() > 240


# -- exports -------------------------------------------------------------------------------------------------------


def test_pictures_of_an_earlier_export_go(world: World, tmp_path: Path):
    folder = tmp_path / "in"
    assert world.export(folder) == {
        HIDDEN, "training/a_cup/00.png", *(f"word/a_cup/00-a-photo-of/{k:03}.png" for k in range(2)),
        "word/a_cup/00-a-photo-of/prompt.txt", *(f"word/a_cup/01-on-the-beach/{k:03}.png" for k in range(2)),
        "word/a_cup/01-on-the-beach/prompt.txt",
    }  # fmt: skip
    (folder / ".DS_Store").write_bytes(b"what macOS leaves")
    fewer = World(tmp_path, count=1, texts=("a photo of", "in the snow")).export(folder)
    assert fewer == {
        HIDDEN, ".DS_Store", "training/a_cup/00.png", "word/a_cup/00-a-photo-of/000.png",
        "word/a_cup/00-a-photo-of/prompt.txt", "word/a_cup/01-in-the-snow/000.png",
        "word/a_cup/01-in-the-snow/prompt.txt",
    }  # fmt: skip
    assert not (folder / "word" / "a_cup" / "01-on-the-beach").exists()


def test_files_of_others_are_never_deleted(world: World, tmp_path: Path):
    folder = tmp_path / "in"
    world.export(folder)
    mine = folder / "word" / "a_cup" / "00-a-photo-of" / "007.png"
    mine.write_bytes(b"mine")
    before = files_in(folder)
    fewer = World(tmp_path, count=1)
    with pytest.raises(
        ValueError, match=r"in holds 'word/a_cup/00-a-photo-of/007\.png', which no export wrote: choose"
    ):
        fewer.export(folder)
    assert files_in(folder) == before
    other = tmp_path / "other"
    (other / "training").mkdir(parents=True)
    (other / "training" / "a.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match="which no export wrote"):
        world.export(other)
    assert files_in(other) == {"training/a.png"}


@pytest.mark.parametrize("names", [["../mine.png"], ["/mine.png"], ["a\\..\\..\\mine.png"], [3], "mine.png", None])
def test_a_list_of_exported_files_leads_nowhere_else(tmp_path: Path, names: object):
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "mine.png").write_bytes(b"mine")
    (folder / LIST).write_text(json.dumps({"files": names}))
    with pytest.raises(ValueError, match=r"json is no list of exported files"):
        export(folder, {"a.txt": "a"})
    assert (tmp_path / "mine.png").is_file()


def test_an_export_that_was_interrupted_can_be_repeated(tmp_path: Path):
    source = tmp_path / "a.png"
    source.write_bytes(b"a picture")
    wanted: dict[str, Path | str] = {"a.txt": "a", "b.png": tmp_path / "gone.png"}
    with pytest.raises(FileNotFoundError):
        export(tmp_path / "in", wanted)
    export(tmp_path / "in", {**wanted, "b.png": source})
    assert files_in(tmp_path / "in") == {LIST, "a.txt", "b.png"}
