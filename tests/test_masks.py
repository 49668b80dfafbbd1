"""Masks and pictures that the drawing commands start from: every kind of file, and files that changed in between."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ldm.data.personalized import find_images
from ldm.generate import SamplingOptions
from ldm.generate_edit import read_pictures
from ldm.generate_files import read_settings
from scripts import img2img, inpaint
from tests.tiny_models import TEXT_WEIGHTS, inpainting_config, text_config, text_model, write_model

WHITE = np.zeros((32, 32), bool)
WHITE[8:24, :16] = True


def grey_16(path: Path) -> None:
    """The mask as grey of 16 bits, whose black is not quite black."""
    Image.fromarray(np.where(WHITE, 65535, 1300).astype(np.uint16)).save(path)


def transparent(path: Path) -> None:
    """The mask as white that is transparent elsewhere."""
    Image.fromarray(np.dstack([np.full((32, 32, 3), 255, np.uint8), WHITE * np.uint8(255)])).save(path)


def plain(path: Path, white: np.ndarray = WHITE) -> None:
    Image.fromarray(white * np.uint8(255)).save(path)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A folder with the picture a.png."""
    levels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(levels).save(tmp_path / "in" / "a.png")
    return tmp_path / "in"


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "config.yaml").write_text(yaml.safe_dump(text_config()))
    (folder / "model.safetensors").symlink_to(TEXT_WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def inpainting_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("inpainting"), inpainting_config())


def edit(*words: object) -> None:
    common = ("--device", "cpu", "--steps", 2, "--n_samples", 1)
    img2img.main([str(word) for word in (*words, *common)])


def fill(folder: Path, model: Path, out: Path) -> None:
    where = ["--indir", folder, "--outdir", out, "--ckpt_path", model, "--steps", 2, "--device", "cpu"]
    inpaint.main([str(word) for word in where])


@pytest.mark.parametrize("write", [grey_16, transparent, plain])
def test_both_commands_read_a_mask_alike(photo: Path, write):
    write(photo / "a_mask.png")
    _, mask = read_pictures(photo / "a.png", photo / "a_mask.png", text_model(), SamplingOptions())
    assert torch.equal(mask, torch.from_numpy(WHITE)[None].float())
    assert np.array_equal(inpaint.load_pair(photo / "a.png", photo / "a_mask.png")[1][..., 0], WHITE)


@pytest.mark.parametrize("name", ["a_mask.jpg", "a_MASK.png", "A_mask.tga"])
def test_inpainting_knows_the_masks_that_training_knows(photo: Path, name: str):
    plain(photo / name)
    (photo / "._a_mask.png").write_bytes(b"what a Mac puts beside a file")
    assert inpaint.find_pairs(photo) == [(photo / "a.png", photo / name)]
    assert find_images(photo) == [photo / "a.png"]


def test_inpainting_names_the_picture_that_it_cannot_read(photo: Path):
    (photo / "b.heic").write_bytes(b"????")
    plain(photo / "b_mask.png")
    with pytest.raises(FileNotFoundError, match=r"b_mask\.png has no picture.*b\.png, not b\.heic: convert that"):
        inpaint.find_pairs(photo)


def test_inpainting_refuses_a_mask_without_white(photo: Path, inpainting_folder: Path, tmp_path: Path):
    plain(photo / "a_mask.png", np.zeros_like(WHITE))
    with pytest.raises(ValueError, match=r"a_mask\.png is black everywhere: paint white"):
        fill(photo, inpainting_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inpainting_refuses_pictures_that_no_memory_holds(photo: Path, monkeypatch: pytest.MonkeyPatch):
    plain(photo / "a_mask.png")
    monkeypatch.setattr("ldm.generate_checks.MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"a\.png: 32 x 32 pixels are too many"):
        inpaint.load_pair(photo / "a.png", photo / "a_mask.png")


def test_what_was_filled_with_another_mask_or_picture_is_kept(photo: Path, inpainting_folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    plain(photo / "a_mask.png")
    fill(photo, inpainting_folder, out)
    first = (out / "a.png").read_bytes()
    plain(photo / "a_mask.png", ~WHITE)
    fill(photo, inpainting_folder, out)
    Image.open(photo / "a.png").rotate(90).save(photo / "a.png")
    for _ in range(2):  # the second time nothing is new
        fill(photo, inpainting_folder, out)
        assert sorted(path.name for path in out.iterdir()) == ["a-2.png", "a-3.png", "a.png"]
    assert (out / "a.png").read_bytes() == first


def test_what_was_drawn_with_another_mask_is_kept(photo: Path, text_folder: Path, tmp_path: Path, caplog):
    words = ("--init-img", photo / "a.png", "--mask", photo / "mask.png", "--prompt", "a cat", "--outdir", tmp_path,
             "--ckpt_path", text_folder)  # fmt: skip
    plain(photo / "mask.png")
    edit(*words)
    first = tmp_path / "samples" / "a-cat_42.png"
    drawn = first.read_bytes()
    edit("--from-image", first, "--outdir", tmp_path)
    assert "has changed" not in caplog.text
    plain(photo / "mask.png", ~WHITE)
    edit(*words)
    assert sorted(path.name for path in first.parent.iterdir()) == ["a-cat_42-2.png", "a-cat_42.png"]
    assert first.read_bytes() == drawn
    caplog.clear()
    edit("--from-image", first, "--outdir", tmp_path)
    assert f"mask.png has changed since {first} was made from it" in caplog.text
    caplog.clear()
    plain(photo / "other.png")
    edit("--from-image", first, "--outdir", tmp_path, "--mask", photo / "other.png")  # another one, on purpose
    assert "has changed" not in caplog.text
    assert len(read_settings(first)["init_img_sha256"]) == 16
