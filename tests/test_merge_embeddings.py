"""Merging embedding files by command: names, token ids, kinds of models, mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import merge_embeddings
from ldm.checkpoint import save_safetensors
from ldm.modules.embedding_io import EmbeddingFile, read_embeddings, write_embeddings
from tests.conftest import GOLDEN
from tests.tiny_run import ROOT

PUBLISHED = GOLDEN / "embedding_files" / "embeddings_new.pt"


def file(path: Path, width: int = 1280, **words: int) -> Path:
    """An embedding file; `words` are names with their numbers of vectors ("star" for "*")."""
    names = {name.replace("star", "*"): count for name, count in words.items()}
    vectors = {name: torch.randn(count, width) for name, count in names.items()}
    ids = {"*": 1008 if width == 1280 else 265}
    write_embeddings(EmbeddingFile(vectors, {k: v for k, v in ids.items() if k in vectors}), path)
    return path


def merge(tmp_path: Path, *words: Any) -> EmbeddingFile:
    out = tmp_path / "out" / "merged.pt"
    out.parent.mkdir(exist_ok=True)
    merge_embeddings.main(["--output_path", str(out), *map(str, words)])
    return read_embeddings(out)


def test_taken_names_get_a_number_with_a_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    a, b = file(tmp_path / "a.pt", star=1), file(tmp_path / "b.pt", star=3, cat=1)
    merged = merge(tmp_path, "--manager_ckpts", a, b)
    assert {k: len(v) for k, v in merged.vectors.items()} == {"*": 1, "*2": 3, "cat": 1}
    assert torch.equal(merged.vectors["*2"], read_embeddings(b).vectors["*"])
    assert "becomes '*2'" in caplog.text
    assert merged.token_ids == {"*": 1008, "cat": 4937}


def test_renames_apply_file_by_file(tmp_path: Path):
    a, b = file(tmp_path / "a.pt", star=1), file(tmp_path / "b.pt", star=2)
    merged = merge(tmp_path, "--manager_ckpts", a, b, "--rename", "*=<cat>", "*=dog")
    assert {k: len(v) for k, v in merged.vectors.items()} == {"<cat>": 1, "dog": 2}
    assert merged.token_ids == {"dog": 3899}  # "<cat>" is no vocabulary entry, and no longer "*"


@pytest.mark.parametrize(("width", "cat"), [(768, 2368), (1024, 2368), (384, 4937)])
def test_the_encoder_shows_in_the_file(tmp_path: Path, width: int, cat: int, caplog: pytest.LogCaptureFixture):
    merged = merge(tmp_path, "--manager_ckpts", file(tmp_path / "a.pt", width, star=1), "-sd", "--rename", "*=cat")
    assert merged.token_ids == {"cat": cat}
    assert ("going by the file" in caplog.text) == (width == 384)


def test_published_files_and_other_formats(tmp_path: Path):
    published = read_embeddings(PUBLISHED)
    other = tmp_path / "learned_embeds.safetensors"
    save_safetensors({"<toy>": torch.ones(2, published.width)}, other)
    merged = merge(tmp_path, "--manager_ckpts", PUBLISHED, other)
    assert set(merged.vectors) == {*published.vectors, "<toy>"}
    for word, vectors in published.vectors.items():
        assert torch.equal(merged.vectors[word], vectors)
        assert merged.token_ids.get(word) == published.token_ids.get(word, merged.token_ids.get(word))


@pytest.mark.parametrize("name", ["merged.bin", "merged.ckpt", "MERGED.PT"])
def test_endings_of_the_written_file(tmp_path: Path, name: str):
    a, b = file(tmp_path / "a.pt", star=1), file(tmp_path / "b.pt", cat=1)
    merge_embeddings.main(["--output_path", str(tmp_path / name), "--manager_ckpts", str(a), str(b)])
    assert set(read_embeddings(tmp_path / name).vectors) == {"*", "cat"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.pt", "sd.pt"], "files of different models cannot be merged"),
        (["a.pt", "--rename", "cat=dog"], "no file is left that has 'cat'; the words are '\\*'"),
        (["a.pt", "--rename", "*=x", "*=y"], "no file is left that has '\\*'"),
        (["a.pt", "--rename", "nonsense"], "write OLD=NEW"),
        (["absent.pt"], "no embedding file at"),
        (["a.pt", "--output_path", "x.safetensors"], "ends in .pt, .bin, .pth, .ckpt; give it such an ending"),
    ],
)
def test_mistakes_write_nothing(tmp_path: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    file(tmp_path / "a.pt", star=1)
    file(tmp_path / "sd.pt", 768, star=1)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        merge(tmp_path, "--manager_ckpts", *words)
    assert not list((tmp_path / "out").iterdir())


def test_as_a_command_without_loading_a_model(tmp_path: Path):
    a, b = file(tmp_path / "a.pt", star=1), file(tmp_path / "b.pt", star=2)
    words = ["--manager_ckpts", a, b, "--output_path", tmp_path / "c.pt"]
    answer = subprocess.run([sys.executable, ROOT / "merge_embeddings.py", *map(str, words)], cwd=tmp_path,
                            capture_output=True, text=True, check=True)  # fmt: skip
    assert answer.stdout.splitlines()[-1].endswith("c.pt: 2 words for LDM (BERT)")
    assert "becomes '*2'" in answer.stderr
    code = (
        "import sys, merge_embeddings; merge_embeddings.build_parser().format_help(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
