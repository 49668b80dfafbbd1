"""Files of learned words: the published layouts, every other format, hostile and broken files, merging."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import json
import logging
import pickle
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from ldm.modules import embedding_io_file
from ldm.modules.embedding_io import (
    FORMATS,
    EmbeddingFile,
    EmbeddingFileError,
    merge,
    read_embeddings,
    write_embeddings,
)
from tests.conftest import GOLDEN

SD = torch.linspace(-1, 1, 2 * 768).reshape(2, 768)


def same(a: EmbeddingFile, b: EmbeddingFile) -> bool:
    return list(a.vectors) == list(b.vectors) and all(torch.equal(a.vectors[k], b.vectors[k]) for k in a.vectors)


# --- the published layout -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["embeddings_new.pt", "embeddings_old_layout.pt"])
def test_published_files_are_read(name):
    folder = GOLDEN / "embedding_files"
    expected = json.loads((folder / "expected.json").read_text())
    words = read_embeddings(folder / name)
    assert words.token_ids == {word: row["token"] for word, row in expected.items()}
    for word, row in expected.items():
        assert torch.equal(words.vectors[word], torch.tensor(row["param"]))


def test_files_come_back_whole(tmp_path):
    words = EmbeddingFile(
        {"*": SD, "a.b": SD[:1], "keys": SD[1:], "%2E": SD, "🦄": SD},
        token_ids={"*": 265, "a.b": 50000},
        active={"*": 1},
        init_words={"🦄": "horse"},
        info={"step": 500, "lr": 0.5, "name": "x"},
    )
    path = tmp_path / "sub" / "embeddings.pt"
    write_embeddings(words, path)
    back = read_embeddings(path)
    assert same(words, back)
    for field in ("token_ids", "active", "init_words", "info"):
        assert getattr(back, field) == getattr(words, field)
    first = path.read_bytes()
    write_embeddings(words, path)
    assert path.read_bytes() == first  # no time stamps


def test_written_file_is_the_published_layout(tmp_path):
    """What the published code does with a file: `torch.load`, and dict access to ids and parameters."""
    write_embeddings(EmbeddingFile({"*": SD, "@": SD}, {"*": 265}), tmp_path / "e.pt")
    with torch.serialization.safe_globals([nn.ParameterDict]):
        loaded = torch.load(tmp_path / "e.pt", weights_only=True)
    assert set(loaded) == {"string_to_token", "string_to_param"}
    assert isinstance(loaded["string_to_param"], nn.ParameterDict)
    assert {k: tuple(v.shape) for k, v in loaded["string_to_param"].items()} == {"*": (2, 768), "@": (2, 768)}
    token = loaded["string_to_token"]["*"]
    assert (token.item(), token.ndim, token.dtype) == (265, 0, torch.int64)
    assert set(loaded["string_to_token"]) == {"*", "@"}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_plain_torch_saves_are_read(tmp_path, dtype, legacy):
    ids = torch.zeros(1, 77, dtype=torch.long)
    ids[0, 1] = 265
    tree = {
        "string_to_token": {"*": ids[0, 1]},  # a view of 77 ids, as the published code saves it
        "string_to_param": nn.ParameterDict({"*": nn.Parameter(SD.to(dtype).T.contiguous().T)}),
    }
    torch.save(tree, tmp_path / "e.pt", _use_new_zipfile_serialization=not legacy)
    words = read_embeddings(tmp_path / "e.pt")
    assert torch.equal(words.vectors["*"], SD.to(dtype).float())
    assert words.vectors["*"].dtype == torch.float32
    assert words.token_ids == {"*": 265}


def test_an_interrupted_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "e.pt"
    write_embeddings(EmbeddingFile({"*": SD}), path)
    with pytest.raises(EmbeddingFileError, match=r"e\.pt was not written: its vectors contain infinite"):
        write_embeddings(EmbeddingFile({"*": SD / 0}), path)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"e\.pt"):
        write_embeddings(EmbeddingFile({"*": SD * 2}), path)
    assert torch.equal(read_embeddings(path).vectors["*"], SD)
    assert [p.name for p in tmp_path.iterdir()] == ["e.pt"]


# --- other formats --------------------------------------------------------------------------------------------------

WRITABLE = [
    ("a1111", "word.pt"),
    ("a1111-png", "word.png"),
    ("original", "word.pt"),
    ("kohya", "word.safetensors"),
    ("kohya", "word.pt"),
    ("onetrainer", "word.safetensors"),
    ("diffusers", "word.safetensors"),
    ("diffusers", "word.bin"),
]


def test_every_format_is_tested():
    assert {name for name, row in FORMATS.items() if row.write} == {name for name, _ in WRITABLE}


@pytest.mark.parametrize(("name", "file"), WRITABLE)
@pytest.mark.parametrize("width", [768, 1024])
def test_formats_round_trip(tmp_path, name, file, width):
    words = EmbeddingFile({"word": torch.randn(3, width)}, info={"step": 7})
    write_embeddings(words, tmp_path / file, name)
    assert same(read_embeddings(tmp_path / file), words)


@pytest.mark.parametrize(("name", "file"), [row for row in WRITABLE if row[0] != "original"])
def test_clip_formats_hold_one_word_of_stable_diffusion(tmp_path, name, file):
    with pytest.raises(EmbeddingFileError, match=r"LDM \(BERT\)"):
        write_embeddings(EmbeddingFile({"*": torch.zeros(1, 1280)}), tmp_path / file, name)
    with pytest.raises(EmbeddingFileError, match="one file for each"):
        write_embeddings(EmbeddingFile({"*": SD, "@": SD}), tmp_path / file, name)
    assert not list(tmp_path.iterdir())


def test_progressive_words_are_exported_with_the_vectors_in_use(tmp_path):
    write_embeddings(EmbeddingFile({"w": SD}, active={"w": 1}), tmp_path / "w.bin", "diffusers")
    assert torch.equal(read_embeddings(tmp_path / "w.bin").vectors["w"], SD[:1])


def test_a1111_pt_has_its_layout_and_only_the_records_its_reader_allows(tmp_path):
    write_embeddings(EmbeddingFile({"my-cat": SD}, info={"step": 9}), tmp_path / "x.pt", "a1111")
    tree = torch.load(tmp_path / "x.pt", weights_only=True)
    assert {k: v for k, v in tree.items() if k != "string_to_param"} == {
        "string_to_token": {"*": 265},
        "name": "my-cat",
        "step": 9,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }
    assert torch.equal(tree["string_to_param"]["*"], SD)
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert set(archive.namelist()) == {"archive/data.pkl", "archive/data/0", "archive/version"}


def test_safetensors_layouts(tmp_path):
    words = EmbeddingFile({"<cat>": SD}, init_words={"<cat>": "cat"}, info={"step": 9})
    for name, key in (("kohya", "emb_params"), ("onetrainer", "emp_params"), ("diffusers", "<cat>")):
        write_embeddings(words, tmp_path / "x.safetensors", name)
        assert torch.equal(load_file(tmp_path / "x.safetensors")[key], SD)


@pytest.mark.parametrize("name", ["kohya", "onetrainer", "diffusers"])
def test_safetensors_keep_where_a_word_started(tmp_path, name):
    words = EmbeddingFile({"<cat>": SD}, init_words={"<cat>": "tabby cat"}, info={"step": 9, "base": "sd"})
    write_embeddings(words, tmp_path / "x.safetensors", name)
    back = read_embeddings(tmp_path / "x.safetensors")
    assert (back.init_words, back.info) == (words.init_words, words.info)


@pytest.mark.parametrize(("step", "found"), [("500", 500), ("1e3", "1e3"), ("²", "²"), ("9" * 5000, "9" * 5000)])
def test_steps_are_numbers_where_they_can_be(tmp_path, step, found):
    save_file({"emb_params": SD.clone()}, tmp_path / "x.safetensors", {"step": step, "init_word": " "})
    words = read_embeddings(tmp_path / "x.safetensors")
    assert (words.info, words.init_words) == ({"step": found}, {})


def test_words_with_numbers_and_texts_beside_them(tmp_path):
    torch.save({"<cat>": SD, "step": 500, "base": "sd"}, tmp_path / "x.bin")
    words = read_embeddings(tmp_path / "x.bin")
    assert same(words, EmbeddingFile({"<cat>": SD}))
    assert words.info == {"step": 500, "base": "sd"}


def test_files_without_words_are_told_by_their_entries(tmp_path):
    tree = {"<cat>": SD, "optimizer": {"lr": 1}, "a\n" * 400: 1, 7: 2, **{f"k{n}": n for n in range(9)}}
    torch.save(tree, tmp_path / "x.bin")
    with pytest.raises(EmbeddingFileError, match=r"its entries are '<cat>', 'optimizer', .* and 4 more") as caught:
        read_embeddings(tmp_path / "x.bin")
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def a1111_json(vectors: torch.Tensor) -> bytes:
    tree = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": {"TORCHTENSOR": vectors.tolist()}},
        "name": "my-cat",
        "step": 100,
        "sd_checkpoint": "abc",
        "sd_checkpoint_name": None,
    }
    return json.dumps(tree).encode()


def picture_with_hidden(data: bytes) -> bytes:
    """A picture whose pixels carry `data` as peers write it: nibble blocks, scrambled, beside the picture."""
    raw = np.frombuffer(zlib.compress(data, 9), np.uint8)
    height = 64
    raw = np.resize(raw, -(-len(raw) // (height * 3)) * height * 3)
    state, keys = 0, []
    for _ in range(len(raw)):
        state = (1664525 * state + 1013904223) % 2**32
        keys.append(state % 255 & 0x0F)
    decoration = np.full(len(raw), 0x50, np.uint8)
    low, high = ((half ^ np.array(keys, np.uint8) | decoration).reshape(height, -1, 3) for half in (raw & 15, raw >> 4))
    gap = np.zeros((height, 1, 3), np.uint8)
    middle = np.full((height, 40, 3), 200, np.uint8)
    whole = np.concatenate([low, gap, middle, gap, high], 1)
    out = io.BytesIO()
    Image.fromarray(np.pad(whole, ((3, 2), (0, 0), (0, 0)))).save(out, "PNG")
    return out.getvalue()


@functools.cache
def foreign_files() -> dict[str, bytes]:
    """{file name: bytes} as other programs write one word "my-cat" with the vectors SD."""

    def pt(tree, **options):
        out = io.BytesIO()
        torch.save(tree, out, **options)
        return out.getvalue()

    def safetensors(tensors, metadata=None):
        from safetensors.torch import save

        return save({k: v.clone() for k, v in tensors.items()}, metadata)

    a1111 = json.loads(a1111_json(SD)) | {"string_to_param": {"*": SD.clone().requires_grad_()}}
    second = torch.zeros(2, 1280)
    return {
        "a1111.pt": pt(a1111),
        "a1111-old.pt": pt(a1111, _use_new_zipfile_serialization=False),
        "a1111-hidden.png": picture_with_hidden(a1111_json(SD)),
        "diffusers.bin": pt({"my-cat": SD}),
        "diffusers.safetensors": safetensors({"my-cat": SD}, {"format": "pt"}),
        "my-cat.safetensors": safetensors({"emb_params": SD}),
        "my-cat.pt": pt({"emb_params": SD}),
        "my-cat.bin": pt(SD),
        "kohya-named.safetensors": safetensors({"emb_params": SD}, {"placeholder": "my-cat"}),
        "my-cat.onetrainer.safetensors": safetensors({"emp_params": SD, "emp_params_out": SD}, {"name": "my-cat"}),
        "my-cat.sdxl": safetensors({"clip_l": SD, "clip_g": second}),
        "my-cat.pti": safetensors({"text_encoders_0": SD, "text_encoders_1": second}),
        "my-cat.clip_l": safetensors({"clip_l": SD}),
        "my-cat.clip_h": safetensors({"clip_h": SD}),
        "bundle-2.x.safetensors": safetensors({"bundle_emb.my-cat.clip_h": SD}),
        "bundle.safetensors": safetensors({"bundle_emb.my-cat.clip_l": SD, "bundle_emb.my-cat.clip_g": second}),
        "comfy.safetensors": safetensors({"bundle_emb.my-cat.string_to_param.*": SD, "lora_up": second}),
        "lora.safetensors": safetensors({"my-cat": SD, "unet.up": second}, {"my-cat": "<embed>"}),
    }


@pytest.mark.parametrize("name", list(foreign_files()))
def test_other_programs_files_are_read(tmp_path, name, caplog):
    (tmp_path / name).write_bytes(foreign_files()[name])
    assert same(read_embeddings(tmp_path / name), EmbeddingFile({"my-cat": SD}))
    assert ("SDXL" in caplog.text) == ("sdxl" in name or name.endswith(".pti"))


def test_a_single_vector_without_its_dimension(tmp_path):
    torch.save({"<cat>": SD[0]}, tmp_path / "learned_embeds.bin")
    assert torch.equal(read_embeddings(tmp_path / "learned_embeds.bin").vectors["<cat>"], SD[:1])


def test_concepts_library_folder(tmp_path):
    torch.save({"<cat>": SD}, tmp_path / "learned_embeds.bin")
    assert list(read_embeddings(tmp_path).vectors) == ["<cat>"]
    save_file({"<dog>": SD}, tmp_path / "learned_embeds.safetensors")
    assert list(read_embeddings(tmp_path).vectors) == ["<dog>"]


def test_folders_without_the_known_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="no other file of that kind"):
        read_embeddings(tmp_path)
    for name in ("learned_embeds-steps-500.bin", "README.md", "x.SAFETENSORS"):
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=r"files there: 'learned_embeds-steps-500.bin', 'x.SAFETENSORS'$"):
        read_embeddings(tmp_path)


def test_png_text_chunk_wins_and_comes_anywhere(tmp_path):
    text = b"tEXt" + b"sd-ti-embedding\0" + base64.b64encode(a1111_json(SD))
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    plain = picture_with_hidden(a1111_json(SD * 2))
    (tmp_path / "x.png").write_bytes(plain[:-12] + chunk + plain[-12:])
    words = read_embeddings(tmp_path / "x.png")
    assert same(words, EmbeddingFile({"my-cat": SD}))
    assert words.info["step"] == 100


# --- files that are refused -----------------------------------------------------------------------------------------


class Attack:
    def __reduce__(self):
        return exec, ("raise SystemExit('a file was executed')",)


@functools.cache
def bad_files() -> dict[str, tuple[bytes, str]]:
    """{name: (bytes, what the message says)}."""

    def pt(tree, **options):
        out = io.BytesIO()
        torch.save(tree, out, **options)
        return out.getvalue()

    def layout(vectors):
        return {"string_to_token": {"*": torch.tensor(1)}, "string_to_param": nn.ParameterDict({"*": vectors})}

    def hidden_png(data):
        return picture_with_hidden(data)

    good = pt(layout(SD))
    nan = SD.clone()
    nan[0, 0] = float("nan")
    return {
        "empty": (b"", "is empty"),
        "pickle": (pickle.dumps(Attack()), "e.pt"),
        "hostile": (pt({"string_to_param": Attack()}), "would run code"),
        "hostile_legacy": (pt({"x": Attack()}, _use_new_zipfile_serialization=False), "would run code"),
        "cut": (good[: len(good) // 2], "cut off or damaged"),
        "nan": (pt(layout(nan)), "infinite or undefined"),
        "overflow": (pt(layout(SD.double() * 1e300)), "infinite or undefined"),
        "integers": (pt({"string_to_param": {"*": torch.ones(1, 768, dtype=torch.long)}}), "int64"),
        "complex": (pt({"string_to_param": {"*": torch.ones(1, 768, dtype=torch.complex64)}}), "complex64"),
        "three_dimensional": (pt(layout(SD[None])), r"shape \(1, 2, 768\)"),
        "no_vectors": (pt(layout(SD[:0])), r"shape \(0, 768\)"),
        "too_many": (pt(layout(torch.zeros(2000, 8))), r"shape \(2000, 8\)"),
        "no_words": (pt({"string_to_token": {}, "string_to_param": nn.ParameterDict()}), "no learned words"),
        "blank_word": (pt({" ": SD}), "no prompt can contain"),
        "nested": (pt({"string_to_param": {"*": {"*": SD}}}), "something else"),
        "two_widths": (
            pt({"string_to_param": {"*": SD, "@": torch.zeros(1, 1024)}}),
            r"different widths: \[768, 1024\]",
        ),
        "a_model": (pt({"state_dict": {"w": torch.zeros(3, 3, 3)}}), "no learned words in a known format"),
        "a_lora": (pt({"a": torch.zeros(4, 8), "b": torch.zeros(8, 4)}), "no learned words in a known format"),
        "xti": (pt(dict.fromkeys(("IN01", "MID", "OUT11", "OUT03"), SD)), "extended textual inversion"),
        "sdxl_second": (pt({"clip_g": torch.zeros(1, 1280)}), "second text encoder"),
        "sdxl_alone": (pt({"<cat>": torch.zeros(1, 1280)}), "second text encoder"),
        "preview": (hidden_png(b"")[:33] + b"\0\0\0\0IEND\xaeB`\x82", "picture"),
        "png_text": (hidden_png(b"no json"), "cannot be decoded"),
        "png_list": (hidden_png(b"[1, 2]"), "something else"),
        "png_ragged": (hidden_png(b'{"string_to_param": {"*": {"TORCHTENSOR": [[1], [1, 2]]}}}'), "no table"),
        "png_words": (hidden_png(b'{"string_to_param": {"*": {"TORCHTENSOR": "x"}}}'), "no table"),
        "png_deep": (hidden_png(b'{"string_to_param": ' + b"[" * 100000), "cannot be decoded"),
        "png_nan": (hidden_png(b'{"string_to_param": {"*": {"TORCHTENSOR": [[NaN]]}}}'), "infinite"),
        "text": (b"hello, this is no embedding\n" * 30, "text file"),
        "html": (b"<!DOCTYPE html><html>" + b" " * 600, "web page"),
    }


@pytest.mark.parametrize("name", list(bad_files()))
def test_bad_files_give_one_sentence_with_their_name(tmp_path, name):
    data, message = bad_files()[name]
    (tmp_path / "e.pt").write_bytes(data)
    with pytest.raises(EmbeddingFileError, match=message) as caught:
        read_embeddings(tmp_path / "e.pt")
    assert str(tmp_path / "e.pt") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_oversized_files(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no embedding file at"):
        read_embeddings(tmp_path / "e.pt")
    with pytest.raises(FileNotFoundError, match="learned_embeds"):
        read_embeddings(tmp_path)
    write_embeddings(EmbeddingFile({"*": SD}), tmp_path / "e.pt")
    monkeypatch.setattr("ldm.modules.embedding_io.MAX_FILE_BYTES", 100)
    with pytest.raises(EmbeddingFileError, match="model checkpoint"):
        read_embeddings(tmp_path / "e.pt")
    assert embedding_io_file.MAX_FILE_BYTES > 1 << 20


def test_words_in_a_large_lora_file(tmp_path, monkeypatch):
    """Only the header and the words of such a file are read, so it may be larger than a file of words alone."""
    path = tmp_path / "lora.safetensors"
    save_file({"lora_up": torch.zeros(64, 64), "bundle_emb.<cat>.emb_params": SD.clone()}, path)
    monkeypatch.setattr("ldm.modules.embedding_io.MAX_FILE_BYTES", 10_000)
    assert same(read_embeddings(path), EmbeddingFile({"<cat>": SD}))
    save_file({"lora_up": torch.zeros(64, 64)}, path)
    with pytest.raises(EmbeddingFileError, match="model checkpoint"):
        read_embeddings(path)


def test_plain_pictures_hold_no_word(tmp_path):
    """Also those with black columns, in which a hidden word's two halves would stand at their sides."""
    rng = np.random.default_rng(0)
    plain = rng.integers(1, 255, (700, 900, 3), dtype=np.uint8)
    framed = plain.copy()
    framed[:, 448:452] = 0
    for name, pixels in {"plain.png": plain, "framed.png": framed}.items():
        Image.fromarray(pixels).save(tmp_path / name)
        with pytest.raises(EmbeddingFileError, match="a picture without a learned word"):
            read_embeddings(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "format"),
    [("x.safetensors", "a1111"), ("x.png", "original"), ("x.pt", "a1111-png"), ("x.json", "kohya"), ("x", "diffusers")],
)
def test_endings_that_promise_something_else(tmp_path, name, format):
    with pytest.raises(EmbeddingFileError, match=r"ends in \.(pt|png|safetensors)"):
        write_embeddings(EmbeddingFile({"*": SD}), tmp_path / name, format)
    assert not list(tmp_path.iterdir())


def test_an_existing_picture_is_not_replaced(tmp_path):
    path = tmp_path / "cat.png"
    Image.new("RGB", (8, 8)).save(path)
    before = path.read_bytes()
    with pytest.raises(EmbeddingFileError, match="there is a picture of that name"):
        write_embeddings(EmbeddingFile({"*": SD}), path, "a1111-png")
    assert path.read_bytes() == before
    path.unlink()
    for vectors in (SD, -SD):  # one with a word may be
        write_embeddings(EmbeddingFile({"cat": vectors}), path, "a1111-png")
        assert same(read_embeddings(path), EmbeddingFile({"cat": vectors}))


def test_unknown_and_read_only_formats(tmp_path):
    words = EmbeddingFile({"*": SD})
    with pytest.raises(EmbeddingFileError, match="kohya"):
        write_embeddings(words, tmp_path / "e.pt", "koya")
    with pytest.raises(EmbeddingFileError, match="can only be read"):
        write_embeddings(words, tmp_path / "e.pt", "sdxl")


SAMPLES = {**foreign_files(), "original.pt": (GOLDEN / "embedding_files" / "embeddings_new.pt").read_bytes()}
SAMPLES["a1111.png"] = SAMPLES.pop("a1111-hidden.png")


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_never_do_anything_but_fail_clearly(tmp_path, data):
    name = data.draw(st.sampled_from(sorted(SAMPLES)))
    raw = bytearray(SAMPLES[name])
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    for _ in range(data.draw(st.integers(0, 4)) if raw else 0):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / name
    path.write_bytes(raw)
    words = EmbeddingFile({})
    with contextlib.suppress(EmbeddingFileError):
        words = read_embeddings(path)
    for vectors in words.vectors.values():
        assert vectors.dtype == torch.float32
        assert vectors.ndim == 2
        assert vectors.isfinite().all()


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x89PNG\r\n\x1a\n", b"\x10" + b"\0" * 7]),
)
def test_noise_is_refused(tmp_path, noise, head):
    path = tmp_path / "e.pt"
    path.write_bytes(head + noise)
    with pytest.raises(EmbeddingFileError):
        read_embeddings(path)


# --- merging --------------------------------------------------------------------------------------------------------


def test_merge_renames_words_that_occur_twice(caplog):
    one = EmbeddingFile({"*": SD, "*2": SD + 1}, {"*": 265}, init_words={"*": "cat"})
    two = EmbeddingFile({"*": SD + 2, "@": SD + 3}, {"*": 265, "@": 287}, active={"*": 1}, init_words={"*": "dog"})
    with caplog.at_level(logging.WARNING):
        merged = merge([("a.pt", one), ("b.pt", two)])
    assert list(merged.vectors) == ["*", "*2", "*3", "@"]
    assert torch.equal(merged.vectors["*3"], SD + 2)
    assert merged.token_ids == {"*": 265, "@": 287}
    assert merged.active == {"*3": 1}
    assert merged.init_words == {"*": "cat", "*3": "dog"}
    assert "'*3'" in caplog.text
    assert "b.pt" in caplog.text
    assert list(two.vectors) == ["*", "@"]
    assert merge([("a", one), ("b", two)], token_id=lambda word: 7).token_ids["*3"] == 7


def test_merge_refuses_other_models():
    with pytest.raises(EmbeddingFileError, match=r"a.pt has 768 .*Stable Diffusion 1.*b.pt has 1280 .*LDM"):
        merge([("a.pt", EmbeddingFile({"*": SD})), ("b.pt", EmbeddingFile({"@": torch.zeros(1, 1280)}))])


def test_renamed_refuses_what_cannot_be():
    words = EmbeddingFile({"*": SD, "@": SD})
    with pytest.raises(EmbeddingFileError, match="same name"):
        words.renamed({"*": "@"})
    assert list(words.renamed({"*": "@", "@": "*"}).vectors) == ["@", "*"]


def test_a_new_name_has_no_token_id():
    words = EmbeddingFile({"*": SD, "@": SD}, {"*": 265, "@": 287}, init_words={"*": "cat"})
    renamed = words.renamed({"*": "<cat>", "@": "@"})
    assert (renamed.token_ids, renamed.init_words) == ({"@": 287}, {"<cat>": "cat"})
