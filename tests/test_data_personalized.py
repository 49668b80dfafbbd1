"""The personalised data sets: reference pictures and captions, folders of every kind, masks, own captions."""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import personalized, personalized_style
from ldm.data.contact_sheet import contact_sheet
from ldm.data.personalized import PersonalizedBase, find_images
from ldm.util import instantiate_from_config
from tests.conftest import GOLDEN, assert_close


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def picture(path: Path, size: tuple[int, int] = (20, 12), colour: object = (200, 40, 90), mode: str = "RGB") -> Path:
    Image.new(mode, size, colour).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "imgs"
    root.mkdir()
    for i in range(3):
        picture(root / f"{i}.png", colour=(60 * i, 10, 20))
    return root


def _cases() -> list[str]:
    return list(json.loads((GOLDEN / "personalized_data.json").read_text())["tensors"])


@pytest.mark.parametrize("case", _cases())
def test_pictures_equal_the_reference(golden, case: str, tmp_path: Path) -> None:
    name, *rest = case.split(".")
    shutil.copy(GOLDEN / "data_images" / f"{name}.png", tmp_path)
    options = {"size": 32, "interpolation": "bicubic", "flip_p": 0.0}
    if rest[0] == "size_none":
        options["size"] = None
        crop = rest[1]
    else:
        options["interpolation"], crop, flip = rest
        options["flip_p"] = float(flip.removeprefix("flip"))
    dataset = PersonalizedBase(str(tmp_path), center_crop=crop == "crop1", **options)
    image = dataset[0]["image"]
    assert image.dtype == np.float32
    assert_close(image, golden("personalized_data")[case], 1e-7, case)


def test_lengths_and_template_counts_equal_the_reference(golden) -> None:
    meta = golden("personalized_data").meta
    lengths = {}
    for options in ({"set": "train", "repeats": 100}, {"set": "train", "repeats": 7}, {"set": "val", "repeats": 10}):
        key = ",".join(f"{k}={v}" for k, v in options.items())
        lengths[key] = len(PersonalizedBase(str(GOLDEN / "data_images"), size=32, **options))
    assert lengths == meta["lengths_for_5_images"]
    for name, (total, unique) in meta["template_counts_total_unique"].items():
        module, _, attribute = name.rpartition(".")
        templates = getattr(personalized_style if module.endswith("style") else personalized, attribute)
        assert (len(templates), len(set(templates))) == (total, unique), name


@pytest.mark.parametrize(
    ("name", "module", "options"),
    [
        ("personalized", "personalized", {}),
        ("personalized_coarse", "personalized", {"coarse_class_text": "dog", "placeholder_token": "@"}),
        # The reference mixed with probability 0.5 here, with its default of 0.25 for the style twin.
        ("personalized_per_image", "personalized", {"per_image_tokens": True, "mixing_prob": 0.5}),
        ("style", "personalized_style", {}),
        ("style_per_image", "personalized_style", {"per_image_tokens": True}),
    ],
)
def test_seeded_captions_equal_the_reference(golden, tmp_path: Path, name: str, module: str, options: dict) -> None:
    shutil.copy(GOLDEN / "data_images" / "rgb.png", tmp_path)
    target = f"ldm.data.{module}.PersonalizedBase"
    dataset = instantiate_from_config({"target": target, "params": {"data_root": str(tmp_path), "size": 8, **options}})
    seed_all(123)
    expected = golden("personalized_data").meta["captions_after_seeding_random_numpy_torch_123"][name]
    assert [dataset[i]["caption"] for i in range(12)] == expected


def test_same_seed_same_items_whatever_was_drawn_before(folder: Path) -> None:
    dataset = PersonalizedBase(folder, size=8, seed=5, crop="random")
    first = [dataset[i] for i in range(6)]
    seed_all(0)
    state = random.getstate()
    again = [dataset[i] for i in reversed(range(6))][::-1]
    assert random.getstate() == state
    for a, b in zip(first, again, strict=True):
        assert a["caption"] == b["caption"]
        assert np.array_equal(a["image"], b["image"])
    assert len({item["caption"] for item in first}) > 1


def test_other_files_are_skipped_with_one_message(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "notes.doc").write_text("no picture")
    (folder / ".DS_Store").write_text("hidden")
    (folder / "0.txt").write_text("a caption of *")
    whole = (folder / "2.png").read_bytes()
    (folder / "3.png").write_bytes(whole[: len(whole) // 2])
    picture(folder / "1_mask.png", colour=255, mode="L")
    with caplog.at_level(logging.INFO):
        dataset = PersonalizedBase(folder, size=8)
    assert [path.name for path in dataset.image_paths] == ["0.png", "1.png", "2.png"]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "notes.doc" in message
    assert "3.png" in message
    assert "DS_Store" not in message


def test_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no picture.*no file"):
        find_images(tmp_path)
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(ValueError, match=r"only a\.png"):
        find_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="data_root"):
        PersonalizedBase(tmp_path / "absent")


def test_more_pictures_than_letters(tmp_path: Path) -> None:
    for i in range(23):
        picture(tmp_path / f"{i}.png", (4, 4))
    assert len(PersonalizedBase(tmp_path, repeats=1)) == 23
    with pytest.raises(ValueError, match="22 pictures"):
        PersonalizedBase(tmp_path, per_image_tokens=True)


def test_templates_by_name_list_and_file(folder: Path, tmp_path: Path) -> None:
    assert len(PersonalizedBase(folder, templates="paper").templates) == 27
    assert PersonalizedBase(folder, templates="style")[0]["caption"].endswith("in the style of *")
    file = tmp_path / "own.txt"
    file.write_text("one {} here\n\n")
    for templates in (["one {} here"], str(file), file):
        dataset = PersonalizedBase(folder, templates=templates, placeholder_token="<my-cat>")
        assert dataset[0]["caption"] == "one <my-cat> here"
    dataset = PersonalizedBase(folder, templates=["a {}"], per_image_tokens=True, mixing_prob=1.0)
    assert dataset[1]["caption"] == "a * with ב"
    with pytest.raises(ValueError, match="neither a file nor"):
        PersonalizedBase(folder, templates="papper")
    with pytest.raises(ValueError, match="exactly one"):
        PersonalizedBase(folder, templates=["no placeholder"])
    with pytest.raises(ValueError, match="no sentence"):
        PersonalizedBase(folder, templates=[])


def test_side_car_captions_need_the_placeholder(folder: Path) -> None:
    (folder / "0.txt").write_text("a * on a table\n")
    rows = [{"file_name": "1.png", "text": "{} in the rain"}, {"file_name": "2.png", "text": "my *"}]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    dataset = PersonalizedBase(folder, captions="sidecar")
    assert [dataset[i]["caption"] for i in range(4)] == ["a * on a table", "* in the rain", "my *", "a * on a table"]
    (folder / "0.txt").write_text("a cup on a table")
    with pytest.raises(ValueError, match=r"0\.png.*lacks the placeholder"):
        PersonalizedBase(folder, captions="sidecar")
    (folder / "0.txt").unlink()
    with pytest.raises(ValueError, match=r"no caption for 0\.png"):
        PersonalizedBase(folder, captions="sidecar")
    table = folder / "c.csv"
    table.write_text("file_name,text\n0.png,* a\n1.png,* b\n2.png,* c\n")
    assert PersonalizedBase(folder, captions=str(table))[2]["caption"] == "* c"


@pytest.mark.parametrize("kind", ["16 bits", "transparent"])
def test_masks_of_every_kind_mark_the_same_part(kind: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (8, 8))
    if kind == "16 bits":
        levels = np.full((8, 8), 1300, np.uint16)  # 2 % grey
        levels[:2] = 65535
        Image.fromarray(levels).save(tmp_path / "a_mask.png")
    else:
        mask = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
        mask.paste((255, 255, 255, 255), (0, 0, 8, 2))
        mask.save(tmp_path / "a_mask.png")
    found = PersonalizedBase(tmp_path, size=8, masks="file", interpolation="nearest", flip_p=0.0)[0]["loss_mask"]
    assert found[:2].min() == 1
    assert found[2:].max() < 0.03


def test_masks_from_alpha_and_file_follow_the_picture(tmp_path: Path) -> None:
    cut_out = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    cut_out.paste((250, 0, 0, 255), (0, 0, 4, 8))  # the left half is the subject
    cut_out.save(tmp_path / "a.png")
    picture(tmp_path / "b.png", (8, 8))
    mask = Image.new("L", (8, 8), 0)
    mask.paste(255, (0, 0, 8, 2))
    mask.save(tmp_path / "b_mask.png")
    picture(tmp_path / "c.png", (8, 8))
    plain, flipped = (
        PersonalizedBase(tmp_path, size=8, masks="auto", interpolation="nearest", flip_p=p) for p in (0.0, 1.0)
    )
    assert plain.num_images == 3
    a, b, c = (plain[i] for i in range(3))
    assert a["loss_mask"].shape == (8, 8)
    assert a["loss_mask"].dtype == np.float32
    assert a["loss_mask"][:, :4].min() == 1
    assert a["loss_mask"][:, 4:].max() == 0
    assert np.array_equal(flipped[0]["loss_mask"], a["loss_mask"][:, ::-1])
    assert np.array_equal(flipped[0]["image"], a["image"][:, ::-1])
    assert a["image"][:, 4:].min() == 1.0  # white instead of the colour hidden under transparency
    assert b["loss_mask"].mean() == 0.25
    assert c["loss_mask"].min() == 1
    assert "loss_mask" not in PersonalizedBase(tmp_path, size=8)[0]
    picture(tmp_path / "b_mask.png", (4, 4), 255, "L")
    with pytest.raises(ValueError, match="make them the same"):
        PersonalizedBase(tmp_path, size=8, masks="file")[1]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["cat.png", "cat_mask.jpg"], ["cat.png"]),
        (["cat.png", "cat_MASK.png"], ["cat.png"]),
        (["Cat.jpg", "cat_mask.png"], ["Cat.jpg"]),
        (["cat.tga", "cat_mask.png"], ["cat.tga"]),
        (["cat.png", "cat_mask.psd", "cat_mask.tga"], ["cat.png"]),
        (["cat.png", "Cat.png", "cat_mask.png"], ["cat.png"]),
    ],
)
def test_masks_are_known_whatever_their_names(names: list[str], expected: list[str], tmp_path: Path) -> None:
    white = Image.new("L", (8, 8))
    white.paste(255, (0, 0, 8, 2))
    for name in names:
        (white if "mask" in name.lower() else Image.new("RGB", (8, 8))).save(tmp_path / name, "PNG")
    dataset = PersonalizedBase(tmp_path, size=8, masks="file", interpolation="nearest", flip_p=0.0)
    paths = {path.name: dataset[i]["loss_mask"].mean() for i, path in enumerate(dataset.image_paths)}
    assert [name for name, share in paths.items() if share == 0.25] == expected
    assert sorted(paths) == sorted(name for name in names if "mask" not in name.lower())


def test_masks_of_unreadable_pictures_are_no_pictures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cat.heic").write_bytes(b"????")
    picture(tmp_path / "cat_mask.png", colour=255, mode="L")
    with pytest.raises(ValueError, match=r"no picture that can be read, only cat\.heic \(.*convert it"):
        find_images(tmp_path)
    picture(tmp_path / "dog.png")
    picture(tmp_path / "party_mask.png")  # no other file of that name: a picture of a mask
    (tmp_path / "party.txt").write_text("a * at a party")
    assert [path.name for path in find_images(tmp_path)] == ["dog.png", "party_mask.png"]
    assert "cat.heic" in caplog.text
    with pytest.raises(ValueError, match=r"masks=file, but no picture in .* has a mask.*dog_mask\.png"):
        PersonalizedBase(tmp_path, masks="file")
    assert PersonalizedBase(tmp_path, size=8, masks="auto")[0]["loss_mask"].min() == 1


def test_cuts_that_leave_nothing_of_the_subject_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(tmp_path / "a.png", (24, 8))
    mask = Image.new("L", (24, 8))
    mask.paste(255, (0, 0, 2, 8))  # at the left edge
    mask.save(tmp_path / "a_mask.png")
    with pytest.raises(ValueError, match=r"a\.png: crop=center at size=8 leaves nothing.*crop=pad"):
        PersonalizedBase(tmp_path, size=8, masks="auto", crop="center")[0]
    assert PersonalizedBase(tmp_path, size=8, masks="auto", crop="pad")[0]["loss_mask"].max() > 0
    caplog.clear()
    dataset = PersonalizedBase(tmp_path, size=8, masks="auto", crop="random", seed=0)
    assert {dataset[i]["loss_mask"].max() > 0 for i in range(40)} == {False, True}
    (message,) = [record.getMessage() for record in caplog.records]
    assert "a.png: crop=random at size=8 leaves nothing" in message


def test_contradicting_or_unknown_options(folder: Path) -> None:
    with pytest.raises(ValueError, match="contradicts"):
        PersonalizedBase(folder, center_crop=True, crop="pad")
    with pytest.raises(ValueError, match="masks 'yes'"):
        PersonalizedBase(folder, masks="yes")
    with pytest.raises(ValueError, match="repeats"):
        PersonalizedBase(folder, repeats=0)
    with pytest.raises(IndexError):
        PersonalizedBase(folder, repeats=2)[6]


def test_contact_sheet_shows_what_the_model_sees(folder: Path, tmp_path: Path) -> None:
    state = random.getstate()
    path = contact_sheet(PersonalizedBase(folder, size=16), tmp_path / "logs" / "sheet.png", count=6)
    assert random.getstate() == state
    with Image.open(path) as sheet:
        assert sheet.width >= 3 * 16
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(maxcolors=1 << 20)}
    assert {(0, 10, 20), (60, 10, 20), (120, 10, 20)} <= colours
