"""Data sets that are lists of files: each reads its documented layout and names what it lacks."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.degradation import CHAINS, FILTERS, make_degradation
from ldm.data.folder import CaptionedImageFolder, ImageFolder, caption_from_name, scan_images
from ldm.data.image import to_uint8
from ldm.data.imagenet import ImageNetTrain, parse_indices
from ldm.data.landscapes import RFWTrain
from ldm.data.openimages import LayoutTokens, OpenImagesBBoxTrain, OpenImagesBBoxValidation
from ldm.util import ConfigError, instantiate_from_config


def picture(path: Path, size: tuple[int, int] = (24, 16), colour: object = (200, 40, 90)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def noise(path: Path, size: tuple[int, int] = (64, 48)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return path


def build(target: str, **params: object):
    return instantiate_from_config({"target": target, "params": params})


def check_image(item: dict, size: int) -> None:
    assert item["image"].shape == (size, size, 3)
    assert item["image"].dtype == np.float32
    assert -1 <= item["image"].min() <= item["image"].max() <= 1


def test_captions_from_side_car_metadata_and_name(tmp_path: Path) -> None:
    for name in ("a.png", "sub/red_cat-2.jpg", "c.webp", ".hidden/x.png", "notes.md.png"):
        picture(tmp_path / name)
    (tmp_path / "a.txt").write_text("from the side-car\n")
    dataset = CaptionedImageFolder(tmp_path, size=8)
    captions = {item["relative_file_path_"]: item["caption"] for item in (dataset[i] for i in range(len(dataset)))}
    assert captions == {
        "a.png": "from the side-car",
        "c.webp": "c",
        "notes.md.png": "notes.md",
        "sub/red_cat-2.jpg": "red cat 2",
    }
    check_image(dataset[0], 8)
    rows = [{"file_name": name, "text": text} for name, text in (("sub/red_cat-2.jpg", "one"), ("a.png", "two"))]
    rows.append({"file_name": "c.webp", "text": ""})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = CaptionedImageFolder(tmp_path)
    assert [dataset[i]["caption"] for i in range(len(dataset))] == ["one", "from the side-car", ""]
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text('file_name,text\nc.webp,"x, y"\n')
    assert CaptionedImageFolder(tmp_path)[0]["caption"] == "x, y"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"file_name": "gone.png", "text": "x"}', r"gone\.png"),
        ('{"file_name": "a.png"}', r"line 1.*'text'"),
        ('\n{"file_name": ', "line 2: not JSON"),
        ('["a.png"]', "JSON object"),
        ("", "no rows"),
    ],
)
def test_broken_metadata_is_named_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        CaptionedImageFolder(tmp_path)


def test_captions_are_dropped_for_guidance(tmp_path: Path) -> None:
    picture(tmp_path / "cat.png")
    random.seed(0)
    dataset = CaptionedImageFolder(tmp_path, size=4, caption_dropout=0.25)
    dropped = sum(dataset[0]["caption"] == "" for _ in range(400))
    assert 60 < dropped < 140
    with pytest.raises(ValueError, match="caption_dropout"):
        CaptionedImageFolder(tmp_path, caption_dropout=2)


def test_folders_are_classes(tmp_path: Path) -> None:
    for name in ("dog/1.png", "cat/2.png", "cat/deep/3.png", "top.png"):
        picture(tmp_path / name)
    dataset = ImageFolder(tmp_path, size=8, flip_p=0.5)
    assert dataset.classes == ["cat", "dog"]
    assert [(dataset[i]["class_label"], dataset[i]["human_label"]) for i in range(3)] == [
        (0, "cat"),
        (0, "cat"),
        (1, "dog"),
    ]
    check_image(dataset[0], 8)
    with pytest.raises(ValueError, match="sub-folders"):
        ImageFolder(tmp_path / "dog")


def test_scan_and_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="data_root"):
        scan_images(tmp_path / "absent")
    with pytest.raises(ValueError, match="no picture"):
        scan_images(tmp_path)
    assert caption_from_name("x/a_b--c.d.png") == "a b c.d"


LISTED = [
    ("ldm.data.lsun.LSUNChurchesTrain", "data/lsun/church_outdoor_train.txt", "data/lsun/churches"),
    ("ldm.data.lsun.LSUNChurchesValidation", "data/lsun/church_outdoor_val.txt", "data/lsun/churches"),
    ("ldm.data.lsun.LSUNBedroomsTrain", "data/lsun/bedrooms_train.txt", "data/lsun/bedrooms"),
    ("ldm.data.lsun.LSUNBedroomsValidation", "data/lsun/bedrooms_val.txt", "data/lsun/bedrooms"),
    ("ldm.data.lsun.LSUNCatsTrain", "data/lsun/cat_train.txt", "data/lsun/cats"),
    ("ldm.data.faceshq.CelebAHQTrain", "data/celebahqtrain.txt", "data/celebahq"),
    ("ldm.data.faceshq.CelebAHQValidation", "data/celebahqvalidation.txt", "data/celebahq"),
    ("ldm.data.faceshq.FFHQTrain", "data/ffhqtrain.txt", "data/ffhq"),
    ("ldm.data.faceshq.FFHQValidation", "data/ffhqvalidation.txt", "data/ffhq"),
    ("ldm.data.openimages.FullOpenImagesTrain", "data/openimages_train.txt", "data/openimages"),
    ("ldm.data.openimages.FullOpenImagesValidation", "data/openimages_validation.txt", "data/openimages"),
]


@pytest.mark.parametrize(("target", "list_file", "root"), LISTED)
def test_list_files_at_published_places(
    target: str, list_file: str, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{list_file}.*{root}"):
        build(target, size=16)
    picture(tmp_path / root / "x/1.jpg")
    Path(list_file).write_text("x/1.jpg\n")
    dataset = build(target, size=16)
    assert len(dataset) == 1
    assert dataset[0]["relative_file_path_"] == "x/1.jpg"
    check_image(dataset[0], 16)
    elsewhere = tmp_path / "elsewhere"
    for split in ("train", "val"):
        picture(elsewhere / split / "2.jpg")
    Path(list_file).unlink()
    dataset = build(target, size=16, data_root=str(elsewhere))
    assert dataset[0]["relative_file_path_"] in ("train/2.jpg", "val/2.jpg")
    with pytest.raises(ConfigError, match="sise"):
        build(target, sise=16)


def test_validation_is_not_flipped_and_train_is(tmp_path: Path) -> None:
    noise(tmp_path / "train/1.png")
    noise(tmp_path / "validation/1.png")
    train = build("ldm.data.lsun.LSUNChurchesTrain", size=8, data_root=str(tmp_path))
    validation = build("ldm.data.lsun.LSUNChurchesValidation", size=8, data_root=str(tmp_path))
    assert len({train[0]["image"].tobytes() for _ in range(20)}) == 2
    assert len({validation[0]["image"].tobytes() for _ in range(20)}) == 1


def test_size_then_crop_size(tmp_path: Path) -> None:
    noise(tmp_path / "train/1.png")
    dataset = build("ldm.data.openimages.FullOpenImagesTrain", size=24, crop_size=16, data_root=str(tmp_path))
    check_image(dataset[0], 16)
    assert len({dataset[0]["image"].tobytes() for _ in range(10)}) > 3  # cut at random places
    check_image(build("ldm.data.openimages.FullOpenImagesTrain", crop_size=16, data_root=str(tmp_path))[0], 16)
    with pytest.raises(ValueError, match="crop_size 32"):
        build("ldm.data.openimages.FullOpenImagesTrain", size=24, crop_size=32, data_root=str(tmp_path))


def test_faces_from_arrays(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    values = np.random.default_rng(0).integers(0, 256, (1, 3, 16, 16), dtype=np.uint8)
    np.save(tmp_path / "f/0.npy", values)
    np.save(tmp_path / "f/1.npy", values.astype(np.float32))
    (tmp_path / "list.txt").write_text("0.npy\n1.npy\n")
    dataset = build(
        "ldm.data.faceshq.CelebAHQTrain", txt_file=str(tmp_path / "list.txt"), data_root=str(tmp_path / "f")
    )
    assert np.array_equal(to_uint8(dataset[0]["image"]), values[0].transpose(1, 2, 0))
    with pytest.raises(ValueError, match=r"1\.npy holds float32"):
        dataset[1]


def test_imagenet_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for synset in ("n03", "n01", "n02"):
        picture(tmp_path / "data" / synset / f"{synset}_1.JPEG")
    (tmp_path / "synset_human.txt").write_text("n01 tench, Tinca tinca\n")
    train = build("ldm.data.imagenet.ImageNetTrain", config={"size": 16}, data_root=str(tmp_path))
    items = [train[i] for i in range(3)]
    assert [item["class_label"] for item in items] == [0, 1, 2]
    assert [item["human_label"] for item in items] == ["tench, Tinca tinca", "n02", "n03"]
    check_image(items[0], 16)
    some = ImageNetTrain({"sub_indices": "1-2"}, tmp_path, process_images=False)
    assert [some[i]["class_label"] for i in range(len(some))] == [0, 1]
    assert "image" not in some[0]
    same = ImageNetTrain({"sub_indices": "1-2", "keep_orig_class_label": True}, tmp_path, process_images=False)
    assert [same[i]["class_label"] for i in range(len(same))] == [1, 2]
    with pytest.raises(ValueError, match="did you mean 'size'"):
        ImageNetTrain({"siz": 3}, tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="ILSVRC2012_validation/data/<synset>"):
        build("ldm.data.imagenet.ImageNetValidation", config={"size": 16})


def test_index_lists() -> None:
    assert parse_indices("0-2, 5", 6) == [0, 1, 2, 5]
    assert parse_indices(None, 2) == [0, 1]
    for text in ("a", "3-", "0-9"):
        with pytest.raises(ValueError, match="sub_indices"):
            parse_indices(text if text != "3-" else "-3", 6)


@pytest.mark.parametrize("name", [*FILTERS, *CHAINS])
def test_degradations_shrink(name: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    small = make_degradation(name, 4)(image)
    assert (small.size, small.mode) == ((12, 8), "RGB")
    chain = name in CHAINS
    random.seed(1)
    np.random.seed(1)
    first = np.asarray(make_degradation(name, 4)(image))
    assert np.array_equal(first, np.asarray(make_degradation(name, 4)(image))) != chain
    random.seed(1)
    np.random.seed(1)
    assert np.array_equal(first, np.asarray(make_degradation(name, 4)(image)))


@pytest.mark.parametrize(
    ("target", "folder"),
    [
        ("ldm.data.imagenet.ImageNetSRTrain", "data/n01"),
        ("ldm.data.imagenet.ImageNetSRValidation", "n01"),
        ("ldm.data.openimages.SuperresOpenImagesAdvancedTrain", "train"),
        ("ldm.data.openimages.SuperresOpenImagesAdvancedValidation", "validation"),
    ],
)
def test_super_resolution_pairs(target: str, folder: str, tmp_path: Path) -> None:
    noise(tmp_path / folder / "1.png")
    options = {"downscale_f": 4, "min_crop_f": 0.5, "max_crop_f": 1.0, "random_crop": True, "data_root": str(tmp_path)}
    item = build(target, size=32, degradation="bsrgan_light", **options)[0]
    check_image(item, 32)
    assert item["LR_image"].shape == (8, 8, 3)
    assert item["LR_image"].dtype == np.float32
    with pytest.raises(ValueError, match="did you mean 'pil_nearest'"):
        build(target, size=32, degradation="pil_neares", **options)
    with pytest.raises(ValueError, match="multiple"):
        build(target, size=30, degradation="pil_nearest", **options)


def test_segmentation_follows_the_picture(tmp_path: Path) -> None:
    labels = np.zeros((16, 24), dtype=np.uint8)
    labels[:, 12:] = 181
    colours = np.repeat(np.where(labels[..., None] == 181, 255, 0).astype(np.uint8), 3, axis=2)
    (tmp_path / "train").mkdir()
    (tmp_path / "segmentations/train").mkdir(parents=True)
    Image.fromarray(colours).save(tmp_path / "train/a.png")
    Image.fromarray(labels).save(tmp_path / "segmentations/train/a.png")
    options = {"size": 12, "crop_size": 8, "interpolation": "nearest", "data_root": str(tmp_path)}
    dataset = build("ldm.data.landscapes.RFWTrain", segmentation_to_float32=True, **options)
    for _ in range(8):
        item = dataset[0]
        check_image(item, 8)
        assert item["segmentation"].shape == (8, 8, 182)
        assert item["segmentation"].dtype == np.float32
        assert np.array_equal(item["segmentation"][..., 181] == 1, item["image"][..., 0] == 1)
    assert RFWTrain(**options)[0]["segmentation"].dtype == np.int64
    with pytest.raises(ValueError, match="label 182, n_labels is 182"):
        RFWTrain(**options, shift_segmentation=True, crop="stretch")[0]
    (tmp_path / "segmentations/train/a.png").unlink()
    with pytest.raises(FileNotFoundError, match="label map"):
        dataset[0]


def test_layout_tokens() -> None:
    tokens = LayoutTokens(n_tokens=8192, max_objects=30)([(7, (0.0, 0.0, 1.0, 1.0))], (0.0, 0.5, 1.0, 1.0))
    assert tokens.shape == (92,)
    assert tokens.dtype == torch.int64
    assert tokens[:3].tolist() == [7, 0, 89 + 89 * 90]
    assert set(tokens[3:90].tolist()) == {8191}
    assert tokens[90:].tolist() == [round(0.5 * 89) * 90, 89 + 89 * 90]


def test_boxes_follow_cut_and_flip(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        picture(tmp_path / split / "abc.jpg", (32, 16))
        rows = ["abc,/m/dog,0.25,0.5,0.0,1.0", "abc,/m/cat,0.0,0.2,0.0,1.0"]
        text = "\n".join(["ImageID,LabelName,XMin,XMax,YMin,YMax", *rows])
        (tmp_path / f"{split}-annotations-bbox.csv").write_text(text)
    (tmp_path / "class-descriptions-boxable.csv").write_text("/m/cat,Cat\n/m/dog,Dog\n")
    item = OpenImagesBBoxValidation(size=16, data_root=tmp_path)[0]
    check_image(item, 16)
    # The centre cut is the middle half: the dog fills its left half, the cat lies outside.
    tokens = item["coordinates_bbox"].tolist()
    assert tokens[:4] == [1, 0, round(0.5 * 89) + 89 * 90, 8191]
    assert tokens[90] == round(0.25 * 89)
    flipped = OpenImagesBBoxValidation(size=16, flip_p=1.0, data_root=tmp_path)[0]["coordinates_bbox"].tolist()
    assert flipped[:3] == [1, round(0.5 * 89), 89 + 89 * 90]
    assert OpenImagesBBoxTrain(size=16, data_root=tmp_path)[0]["coordinates_bbox"].shape == (92,)
    (tmp_path / "train-annotations-bbox.csv").write_text("ImageID,LabelName\nabc,/m/cow\n")
    with pytest.raises(ValueError, match="line 2"):
        OpenImagesBBoxTrain(data_root=tmp_path)


def test_previews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    target = "ldm.data.previews.pytorch_dataset.Previews"
    with pytest.raises(FileNotFoundError, match=r"metadata\.jsonl"):
        build(target + "Train", size=8)
    picture(tmp_path / "data/previews/train/a_cat.png")
    picture(tmp_path / "elsewhere/a_dog.png")
    item = build(target + "Train", size=8)[0]
    assert item["caption"] == "a cat"
    check_image(item, 8)
    assert build(target + "Validation", size=8, data_root="elsewhere")[0]["caption"] == "a dog"
