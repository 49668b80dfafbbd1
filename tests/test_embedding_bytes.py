"""Files of learned words as every program writes them, byte by byte: read, written again, and damaged in every way."""

from __future__ import annotations

import base64
import contextlib
import io
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, features

from ldm.modules.embedding_io import EmbeddingFile, EmbeddingFileError, identify, read_embeddings, write_embeddings
from tests import embedding_bytes as B

QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
NAMES = list(B.makers("x", np.zeros((1, 768), np.float32)))
# the word is the file's name in some formats, so it is one that every file system takes
SENSIBLE = st.characters(exclude_characters="/\\\0", exclude_categories=["Cs", "Cc"])
TAKEN = {"string_to_param", "emb_params"}
words = st.text(SENSIBLE, min_size=1, max_size=12).filter(
    lambda word: bool(word.strip()) and word.strip(".") == word and word not in TAKEN
)


def vectors(seed: int, count: int, width: int, dtype: str) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(dtype)


def put(folder: Path, name: str, word: str, data: bytes) -> Path:
    file = name.rpartition("/")[2].replace("WORD", word)
    (folder / file).write_bytes(data)
    return folder / file


@settings(max_examples=60, deadline=None, suppress_health_check=QUIET)
@given(st.data())
def test_files_of_every_program_are_read_without_loss(tmp_path: Path, data: st.DataObject):
    name = data.draw(st.sampled_from(NAMES))
    word = data.draw(words)
    dtype = data.draw(st.sampled_from(["float32", "float16", "float64"])) if "torch 1.5" not in name else "float32"
    count = 1 if name.startswith("sd-concepts") else data.draw(st.integers(1, 5))
    array = vectors(data.draw(st.integers(0, 99)), count, data.draw(st.sampled_from([768, 1024])), dtype)
    if data.draw(st.booleans()):
        array[0, :5] = [0.0, -0.0, 1e-7, -65504.0, 1 / 3]
    path = put(tmp_path, name, word, B.makers(word, array)[name]())
    found = read_embeddings(path)
    assert list(found.vectors) == [word]
    assert torch.equal(found.vectors[word], torch.from_numpy(array).float())
    if name.startswith("textual inversion"):
        assert found.token_ids == {word: 265}
    if name.startswith("web UI"):
        assert found.info["step"] == 500


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_can_be_written_in_every_format_and_read_again(tmp_path: Path, name: str):
    array = vectors(1, 1, 768, "float32")
    first = read_embeddings(put(tmp_path, name, "my-cat", B.makers("my-cat", array)[name]()))
    for format, file in [
        ("original", "e.pt"),
        ("a1111", "my-cat.pt"),
        ("a1111-png", "e.png"),
        ("kohya", "my-cat.safetensors"),
        ("onetrainer", "my-cat.safetensors"),
        ("diffusers", "e.bin"),
    ]:
        write_embeddings(first, tmp_path / "out" / file, format)
        known, again = identify(tmp_path / "out" / file)
        assert known == format
        assert list(again.vectors) == ["my-cat"]
        assert torch.equal(again.vectors["my-cat"], torch.from_numpy(array))


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("textual inversion, torch 1.11/embeddings.pt", "original"),
        ("web UI/x.pt", "a1111"),
        ("web UI, pixels/x.png", "a1111-png"),
        ("diffusers/learned_embeds.safetensors", "diffusers"),
        ("kohya/WORD.pt", "kohya"),
        ("OneTrainer/WORD.safetensors", "onetrainer"),
        ("SDXL/WORD.safetensors", "sdxl"),
        ("ComfyUI bundle/x.safetensors", "bundle"),
    ],
)
def test_formats_are_named(tmp_path: Path, name: str, format: str):
    path = put(tmp_path, name, "my-cat", B.makers("my-cat", vectors(0, 2, 768, "float32"))[name]())
    assert identify(path)[0] == format


def chunk(kind: bytes, word: bytes) -> tuple[bytes, bytes]:
    """A text chunk of one of the three kinds; "iTXt+" is the packed one."""
    text = base64.b64encode(word)
    packed = zlib.compress(text)
    before = {b"tEXt": text, b"zTXt": b"\0" + packed, b"iTXt": b"\0\0en\0a name\0" + text}
    return kind[:4], b"sd-ti-embedding\0" + {**before, b"iTXt+": b"\1\0\0\0" + packed}[kind]


def read_bytes(folder: Path, data: bytes) -> EmbeddingFile:
    (folder / "x").write_bytes(data)
    return read_embeddings(folder / "x")


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"iTXt+"])
def test_pictures_that_were_saved_again_keep_their_text(tmp_path: Path, kind: bytes):
    array = vectors(1, 2, 768, "float32")
    found = read_bytes(tmp_path, B.png([chunk(kind, B.a1111_json("my-cat", array, 5))]))
    assert torch.equal(found.vectors["my-cat"], torch.from_numpy(array))


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt+"])
@pytest.mark.parametrize(
    "text", [b"", b"\x78", b"x" * 100, zlib.compress(b"A" * 5000)[:-9], zlib.compress(b"A" * 5000)]
)
def test_packed_texts_are_bounded_and_checked(
    tmp_path: Path, kind: bytes, text: bytes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ldm.modules.embedding_io_png.MAX_JSON_BYTES", 4000)
    name, body = chunk(kind, b"")
    cut = len(body) - len(zlib.compress(b""))
    with pytest.raises(EmbeddingFileError, match=r"cannot be decoded|cut off or far too large"):
        read_bytes(tmp_path, B.png([(name, body[:cut] + text)]))


def saved_as(data: bytes, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    with Image.open(io.BytesIO(data)) as picture:
        picture.save(out, format=format, **options)
    return out.getvalue()


def test_words_in_the_pixels_of_webp(tmp_path: Path):
    array = vectors(1, 2, 768, "float32")
    picture = B.pixel_picture(B.a1111_json("my-cat", array, 5))
    found = read_bytes(tmp_path, saved_as(picture, "WEBP", lossless=True))
    assert torch.equal(found.vectors["my-cat"], torch.from_numpy(array))
    assert identify(tmp_path / "x")[0] == "a1111-png"


@pytest.mark.parametrize(
    ("format", "message"),
    [("WEBP", "saved again with loss"), ("AVIF", "saved again with loss|update it"),
     ("JPEG", "no learned word survives; ask for the original"), ("GIF", "no learned word survives")],
)  # fmt: skip
def test_pictures_that_lost_their_word_say_what_to_do(tmp_path: Path, format: str, message: str):
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    picture = B.pixel_picture(B.a1111_json("my-cat", vectors(1, 2, 768, "float32"), 5))
    with pytest.raises(EmbeddingFileError, match=message):
        read_bytes(tmp_path, saved_as(picture, format))


def test_other_pictures_are_named(tmp_path: Path):
    for start in (b"\xff\x0a" + b"\0" * 20, b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0" * 20):
        with pytest.raises(EmbeddingFileError, match="JPEG XL picture.*save it as PNG"):
            read_bytes(tmp_path, start)
    header = b'{"<cat>": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}}'
    header += b" " * (0x0AFF - len(header))  # begins as such a picture does, and is none
    assert list(read_bytes(tmp_path, struct.pack("<Q", len(header)) + header + bytes(8)).vectors) == ["<cat>"]


def test_pictures_are_opened_as_one_kind_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What the first bytes promise is the only kind that Pillow may take the file for."""
    asked = []
    monkeypatch.setattr(Image, "open", lambda *_, formats: asked.append(formats) or (_ for _ in ()).throw(KeyError()))
    for data in (B.png([]), b"RIFF    WEBPVP8L", b"    ftypavif" + b"\0" * 20):
        with pytest.raises(EmbeddingFileError, match="does not read; update it"):
            read_bytes(tmp_path, data)
    assert asked == [["PNG"], ["WEBP"], ["AVIF"]]


# --- hostile files --------------------------------------------------------------------------------------------------

SAMPLES = {name: make() for name, make in B.makers("my-cat", vectors(2, 2, 768, "float32")).items()}
SAMPLES |= {
    f"web UI, {kind.decode()}/x.png": B.png([chunk(kind, B.a1111_json("my-cat", vectors(2, 2, 768, "float32"), 5))])
    for kind in (b"zTXt", b"iTXt", b"iTXt+")
}
SAMPLES["web UI/x.webp"] = saved_as(SAMPLES["web UI, pixels/x.png"], "WEBP", lossless=True)
if features.check("avif"):
    SAMPLES["web UI/x.avif"] = saved_as(SAMPLES["web UI, pixels/x.png"], "AVIF")


def read_or_refuse(path: Path) -> EmbeddingFile:
    """What is read; nothing but a refusal in one line that names the file may be raised."""
    refusal = str(path)
    found = EmbeddingFile({})
    try:
        found = read_embeddings(path)
    except EmbeddingFileError as error:
        refusal = str(error)
    assert str(path) in refusal
    assert "\n" not in refusal
    return found


def check(found: EmbeddingFile) -> None:
    for array in found.vectors.values():
        assert array.dtype == torch.float32
        assert array.ndim == 2
        assert array.isfinite().all()


@settings(max_examples=150, deadline=None, suppress_health_check=QUIET)
@given(st.data())
def test_damage_anywhere_is_refused_or_harmless(tmp_path: Path, data: st.DataObject):
    name = data.draw(st.sampled_from(sorted(SAMPLES)))
    raw = bytearray(SAMPLES[name])
    where = st.integers(0, max(len(raw) - 1, 0)) if data.draw(st.booleans()) else st.integers(0, min(len(raw) - 1, 400))
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(where)] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    kind = data.draw(st.sampled_from(["keep", "cut", "repeat", "insert"]))
    if kind == "cut":
        raw = raw[:cut]
    elif kind == "repeat":
        raw = raw + raw[:cut]
    elif kind == "insert":
        raw[cut:cut] = data.draw(st.binary(max_size=20))
    check(read_or_refuse(put(tmp_path, name, "my-cat", bytes(raw))))


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_every_shorter_file_is_refused_or_harmless(tmp_path: Path, name: str):
    raw = SAMPLES[name]
    for length in sorted({0, 1, 7, 8, 9, 100, *np.linspace(0, len(raw) - 1, 12).astype(int).tolist()}):
        check(read_or_refuse(put(tmp_path, name, "my-cat", raw[:length])))


def calls(module: str, name: str, argument: str) -> B.Raw:
    """What pickle runs as `module.name(argument)`."""
    return B.Raw(lambda p: B.glob(module, name) + b"(" + p.value(argument) + b"tR")


CALLABLES = ["os.system", "builtins.exec", "builtins.eval", "subprocess.Popen", "torch.load", "posix.system"]
PLACES = ["alone", "value", "vectors", "key", "in parameter dict", "state"]


def hostile(place: str, call: B.Raw) -> Any:
    good = vectors(0, 1, 768, "float32")
    return {
        "alone": call,
        "value": {"string_to_param": {"*": good}, "name": call},
        "vectors": {"string_to_param": {"*": call}},
        "key": B.Raw(lambda p: b"}(" + call.make(p) + p.value(good) + b"u"),
        "in parameter dict": {
            "string_to_param": B.Raw(
                lambda p: B.glob("torch.nn.modules.container", "ParameterDict") + b")\x81}(" + p.value("_parameters")
                + b"}(" + p.value("*") + call.make(p) + b"uub"
            )
        },
        "state": B.Raw(lambda p: call.make(p) + b"}(" + p.value("*") + p.value(good) + b"ub"),
    }[place]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("writer", [B.zip_archive, B.legacy_stream], ids=["zip", "legacy"])
def test_no_call_in_a_pickle_is_ever_made(tmp_path: Path, place: str, writer: Any):
    mark = tmp_path / "ran"
    for target in CALLABLES:
        module, _, name = target.rpartition(".")
        python = f"__import__('pathlib').Path({str(mark)!r}).touch()"
        argument = python if module == "builtins" else f"touch {mark}"
        (tmp_path / "e.pt").write_bytes(writer(hostile(place, calls(module, name, argument))))
        with pytest.raises(EmbeddingFileError, match=re.escape(str(tmp_path / "e.pt"))):
            read_embeddings(tmp_path / "e.pt")
        assert not mark.exists()


def deep(depth: int) -> B.Raw:
    return B.Raw(lambda p: (b"}(" + p.value("a")) * depth + b"N" + b"u" * depth)


def looped(_: B.Pickle) -> bytes:
    return b"}q\x00(X\x01\x00\x00\x00ah\x00u"  # a dict that holds itself


ODD = {
    "deep": deep(5000),
    "holds itself": B.Raw(looped),
    "deep vectors": {"string_to_param": {"*": deep(2000)}},
    "itself as vectors": {"string_to_param": B.Raw(looped)},
    "list of vectors": {"string_to_param": {"*": (np.zeros((1, 768), np.float32),) * 3}},
    "text as vectors": {"string_to_param": {"*": "1 2 3"}},
    "number as word": {"string_to_param": {5: np.zeros((1, 768), np.float32)}},
    "empty": {},
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("writer", [B.zip_archive, B.legacy_stream], ids=["zip", "legacy"])
def test_odd_structures_are_refused(tmp_path: Path, kind: str, writer: Any):
    (tmp_path / "e.pt").write_bytes(writer(ODD[kind]))
    with pytest.raises(EmbeddingFileError, match=re.escape(str(tmp_path / "e.pt"))):
        read_embeddings(tmp_path / "e.pt")


@settings(max_examples=60, deadline=None, suppress_health_check=QUIET)
@given(
    st.sampled_from(["nan", "inf", "-inf", "1e39"]),
    st.integers(0, 2 * 768 - 1),
    st.sampled_from([n for n in NAMES if "torch 1.5" not in n and "concepts" not in n]),
)
def test_numbers_that_are_none_are_refused_wherever_they_stand(tmp_path: Path, number: str, place: int, name: str):
    array = vectors(3, 2, 768, "float64")
    array.flat[place] = float(number)
    path = put(tmp_path, name, "my-cat", B.makers("my-cat", array)[name]())
    with pytest.raises(EmbeddingFileError, match="infinite or undefined"):
        read_embeddings(path)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 0), "float32"), ((0, 768), "float32"), ((1, 2, 768), "float32"), ((1, 768), "int64"),
                         ((5000, 8), "float32"), ((1, 20000), "float32")],
)  # fmt: skip
def test_shapes_and_types_that_are_no_vectors_are_refused(tmp_path: Path, shape: tuple[int, ...], dtype: str):
    array = np.zeros(shape, dtype)
    for name, data in {
        "e.pt": B.zip_archive({"string_to_param": B.parameter_dict({"*": array}, old=True), "string_to_token": {}}),
        "e.safetensors": B.safetensors({"emb_params": array}),
        "e.bin": B.zip_archive({"<x>": array}),
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(EmbeddingFileError, match=name):
            read_embeddings(tmp_path / name)


@settings(max_examples=80, deadline=None, suppress_health_check=QUIET)
@given(st.data())
def test_safetensors_that_lie_about_their_size_are_refused(tmp_path: Path, data: st.DataObject):
    array = vectors(0, 1, 768, "float32")
    huge = data.draw(st.sampled_from([2**31, 2**40, 2**62, 2**64 - 1]))
    good = B.safetensors({"emb_params": array})
    (length,) = struct.unpack("<Q", good[:8])
    header = good[8 : 8 + length]
    raw = {
        "header": struct.pack("<Q", huge) + good[8:],
        "shape": good.replace(b"[1, 768]", f"[{huge}, 768]".encode()),
        "offset": good.replace(b"3072]", f"{huge}]".encode()),
        "negative": good.replace(b"[0, 3072]", b"[-1, 3071]"),
        "type": header.replace(b"F32", b"F99"),
    }[data.draw(st.sampled_from(["header", "shape", "offset", "negative", "type"]))]
    path = tmp_path / "e.safetensors"
    path.write_bytes(raw)
    with contextlib.suppress(EmbeddingFileError):
        read_embeddings(path)
        pytest.fail("it was read")
