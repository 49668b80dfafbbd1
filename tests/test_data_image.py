"""From file to array: every mode, orientation, cut and kind of broken file."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image

from ldm.data import image as image_module
from ldm.data.image import (
    IMAGE_SUFFIXES,
    ImageLoader,
    alpha_plane,
    open_image,
    open_mask,
    parse_colour,
    to_array,
    to_rgb,
    to_uint8,
)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def level(value: int) -> float:
    return float(np.float32(value / 127.5 - 1.0))


def test_arrays_span_minus_one_to_one_and_round_trip() -> None:
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    array = to_array(ramp)
    assert array.dtype == np.float32
    assert (array.min(), array.max()) == (-1.0, 1.0)
    assert np.array_equal(to_uint8(array), np.asarray(ramp))


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (8, 4), "black")
    image.paste("white", (0, 0, 4, 4))  # white left half
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    array = ImageLoader().load(saved(image, exif=exif))
    assert array.shape == (8, 4, 3)
    assert array[:4].min() == 1.0  # what was left is now on top
    assert array[4:].max() == -1.0


def test_alpha_is_laid_over_the_background_or_dropped() -> None:
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    image.putpixel((1, 0), (200, 0, 0, 255))
    data = saved(image)
    assert ImageLoader().load(data)[0, 0].tolist() == [1.0, 1.0, 1.0]
    assert ImageLoader(background="#00ff00").load(data)[0, 0].tolist() == [-1.0, 1.0, -1.0]
    assert ImageLoader(background=[0, 0, 255]).load(data)[0, 1, 0] == level(200)
    assert ImageLoader(alpha="drop").load(data)[0, 0].tolist() == [level(200), -1.0, -1.0]
    half = Image.new("LA", (2, 1), (0, 51))
    half.putpixel((1, 0), (0, 255))
    assert ImageLoader().load(saved(half))[0, 0, 0] == level(204)


def test_alpha_without_an_opaque_pixel_marks_nothing() -> None:
    for opacity in (0, 128):
        data = saved(Image.new("RGBA", (2, 2), (200, 0, 0, opacity)))
        assert ImageLoader().load(data)[0, 0, 0] == level(200)


@pytest.mark.parametrize("highest", [128, 254])
def test_cut_outs_may_lack_an_opaque_pixel(highest: int) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (200, 0, 0, highest))
    assert ImageLoader().load(saved(image))[0, 0].tolist() == [1.0, 1.0, 1.0]
    plane = alpha_plane(image)
    assert plane is not None
    assert np.asarray(plane).tolist() == [[0, highest]]


def test_alpha_that_is_faint_or_never_gets_opaque_marks_nothing() -> None:
    image = Image.new("RGBA", (256, 1), (200, 0, 0))
    for levels in ([0, 127] * 128, [min(k, 250) for k in range(256)]):
        image.putalpha(Image.fromarray(np.array([levels], np.uint8)))
        assert alpha_plane(image) is None


def test_masks_of_16_bits_are_scaled_and_transparency_is_black() -> None:
    deep = np.full((2, 3), 1300, np.uint16)
    deep[0] = 65535
    assert np.asarray(open_mask(saved(Image.fromarray(deep)))).tolist() == [[255] * 3, [5] * 3]
    colours = np.full((1, 4, 4), 255, np.uint8)  # white, but for
    colours[0, :, 3] = 255, 0, 51, 255  # ... where it is transparent
    colours[0, 3, :3] = 0
    for mode in ("RGBA", "LA"):
        mask = open_mask(saved(Image.fromarray(colours).convert(mode)))
        assert (mask.mode, np.asarray(mask).tolist()) == ("L", [[255, 0, 51, 0]])
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([255, 255, 255, 254, 254, 254])
    palette.putpixel((1, 0), 1)
    assert np.asarray(open_mask(saved(palette, transparency=0))).tolist() == [[0, 254]]
    with pytest.raises(ValueError, match="the mask is not an image"):
        open_mask(b"x", name="the mask")


@pytest.mark.parametrize(("mode", "white"), [("1", 1), ("L", 255), ("RGB", (255, 255, 255))])
def test_plain_masks_stay_as_they_are(mode: str, white: int | tuple[int, ...]) -> None:
    mask = Image.new(mode, (2, 1))
    mask.putpixel((1, 0), white)
    assert np.asarray(open_mask(saved(mask))).tolist() == [[0, 255]]


def test_palette_with_a_transparent_colour() -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    array = ImageLoader(background="black").load(saved(image, transparency=0))
    assert array[0, 0].tolist() == [-1.0, -1.0, -1.0]
    assert array[0, 1].tolist() == [-1.0, -1.0, 1.0]


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("L", (3, 3), 100), "PNG", [100, 100, 100]),
        (Image.new("1", (3, 3), 1), "PNG", [255, 255, 255]),
        (Image.fromarray(np.full((3, 3), 25700, dtype=np.uint16)), "PNG", [100, 100, 100]),
        (Image.fromarray(np.full((3, 3), 25700, dtype=np.int32)), "TIFF", [100, 100, 100]),
        (Image.fromarray(np.full((3, 3), 0.4, dtype=np.float32)), "TIFF", [102, 102, 102]),
        (Image.new("CMYK", (3, 3), (0, 255, 255, 0)), "TIFF", [255, 0, 0]),
    ],
    ids=["gray", "bit", "gray16", "gray32", "float", "cmyk"],
)
def test_every_mode_becomes_rgb(image: Image.Image, kind: str, expected: list[int]) -> None:
    array = ImageLoader().load(saved(image, kind))
    assert array.shape == (3, 3, 3)
    assert array[1, 1].tolist() == [level(v) for v in expected]


def test_cuts() -> None:
    image = Image.new("RGB", (8, 4), "black")
    image.paste("white", (2, 0, 6, 4))
    data = saved(image)

    def load(**options: object) -> np.ndarray:
        return ImageLoader(interpolation="nearest", **options).load(data)[..., 0]

    assert load(crop="center").shape == (4, 4)
    assert load(crop="center").min() == 1.0
    assert load(crop="stretch", size=4).tolist() == [[-1, 1, 1, -1]] * 4
    padded = load(crop="pad", background="#ff0000")
    assert padded.shape == (8, 8)
    assert padded[:2].min() == 1.0
    assert padded[2:6].tolist() == [[-1, -1, 1, 1, 1, 1, -1, -1]] * 4
    torch.manual_seed(0)
    positions = {tuple(load(crop="random", size=4)[0]) for _ in range(40)}
    assert len(positions) == 5
    assert load(crop="center", crop_fraction=(0.5, 0.5)).shape == (2, 2)


def test_flip_draws_from_torch_and_turns_the_picture() -> None:
    data = saved(Image.fromarray(np.arange(12, dtype=np.uint8).reshape(1, 4, 3)))
    plain, flipped = ImageLoader().load(data), ImageLoader(flip_p=1.0).load(data)
    assert np.array_equal(flipped, plain[:, ::-1])
    torch.manual_seed(3)
    draws = (torch.rand(20) < 0.5).tolist()
    torch.manual_seed(3)
    half = ImageLoader(flip_p=0.5)
    assert [bool(np.array_equal(half.load(data), flipped)) for _ in range(20)] == draws


def test_broken_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    whole = saved(Image.effect_noise((64, 64), 90))
    for content in (b"", b"just text", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cat\.png"):
            open_image(path)
    with pytest.raises(ValueError, match=r"in shard\.tar is not an image"):
        open_image(b"text", name="7.jpg in shard.tar")
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "absent.png")
    (tmp_path / "a.heic").write_bytes(b"????")
    with pytest.raises(ValueError, match="convert it"):
        open_image(tmp_path / "a.heic")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n0 0 9 9 rectfill showpage\n%%EOF\n"


def test_programs_in_the_guise_of_pictures_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def run(*args: object, **_: object) -> object:
        runs.append(args)
        return Image.core.new("L", (9, 9))

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    path = tmp_path / "cat.jpg"
    path.write_bytes(POSTSCRIPT)
    for source in (path, POSTSCRIPT):
        with pytest.raises(ValueError, match=r"is not an image that can be read \(convert it to JPEG or PNG\)$"):
            open_image(source, name="cat.jpg")
    assert runs == []


@pytest.mark.parametrize(("suffix", "kind"), [(".avif", "AVIF"), (".jp2", "JPEG2000"), (".tga", "TGA")])
def test_rarer_kinds_are_pictures(suffix: str, kind: str) -> None:
    assert suffix in IMAGE_SUFFIXES
    try:
        data = saved(Image.new("RGB", (8, 8), (200, 40, 90)), kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow cannot write {kind}")
    assert np.allclose(np.asarray(to_rgb(open_image(data)))[4, 4], (200, 40, 90), atol=4)


def test_a_pillow_that_lacks_a_kind_reads_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(Image.new("RGB", (4, 4)), "TGA")
    jpeg_2000 = saved(Image.new("RGB", (4, 4)), "JPEG2000")
    monkeypatch.setattr(image_module, "_formats", image_module._formats.__wrapped__)
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    assert open_image(data).size == (4, 4)
    monkeypatch.delattr(Image.core, "jpeg2k_decoder")
    with pytest.raises(ValueError, match=r"^a\.jp2 needs another Pillow \(convert it to JPEG or PNG\): decoder jpeg2k"):
        open_image(jpeg_2000, name="a.jp2")


def test_colours_that_cannot_be_made_rgb_are_named() -> None:
    data = saved(Image.new("LAB", (4, 4)), "TIFF")
    for read in (open_mask, ImageLoader().load):
        with pytest.raises(ValueError, match=r"^a_mask\.tif is in LAB colours.*convert it to RGB$"):
            read(data, name="a_mask.tif")


def _png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(60_000, 60_000), (13_500, 13_500)])
def test_decompression_bombs_are_refused_before_decoding(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"bomb\.png.*shrink"):
        open_image(_png_claiming(*size), name="bomb.png")


def test_own_pixel_limit() -> None:
    data = saved(Image.new("RGB", (10, 10)))
    with pytest.raises(ValueError, match="limit of 99"):
        ImageLoader(max_pixels=99).load(data)
    assert ImageLoader(max_pixels=100).load(data).shape == (10, 10, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"crop": "centre"},
        {"interpolation": "cubic"},
        {"alpha": "keep"},
        {"size": 0},
        {"flip_p": 1.5},
        {"crop_fraction": (0.9, 0.5)},
        {"background": "sky"},
        {"background": [1, 2]},
    ],
)
def test_unknown_options_name_the_value(options: dict) -> None:
    with pytest.raises(ValueError, match=str(next(iter(options)) if "background" not in options else "colour")):
        ImageLoader(**options)


def test_colours() -> None:
    assert parse_colour("gray") == (128, 128, 128)
    assert parse_colour((1, 2, 3)) == (1, 2, 3)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"RIFF"]))
def test_no_bytes_give_anything_but_a_picture_or_a_value_error(data: bytes, head: bytes) -> None:
    try:
        image = open_image(head + data)
    except ValueError:
        return
    to_rgb(image)
