"""Token ids against transformers' tokenizers with the same vocabularies, on 5,000 generated texts."""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path

import pytest

from ldm.convert import write_tokenizer
from ldm.modules.encoders.bert import VOCAB_FILE, WordPieceTokenizer
from ldm.modules.encoders.clip_tokenizer import CLIPTokenizer
from ldm.modules.encoders.text import frame, text_to_ids

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.interop

COUNT = 5000
LENGTH = 77
SAMPLE = (
    "a photo of the cat's *, painting-style don't can't we'll I'd they've it's 3/4 1,000.50 (red:1.2) [x] {y} <my-cat> "
    "sks ANDRÉ Straße İSTANBUL ΟΔΟΣ ﬁne naïve Ünïcödé 東京 猫の写真 한국어 สวัสดี مرحبا שלום हिन्दी ไทย "
    "e\u0301 A\u030a ½ ² ™ … — “quoted” ‘x’ 🦄 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ☺️ ❤ &amp; &lt;b&gt; http://x.y/z?q=1 a@b.c #tag "
    "$5 50% x_y_z __init__ C++ ... !!! ?! ~ ` ^ | \\ \" '"
)
WORDS = SAMPLE.split()
ALPHABETS = (
    [chr(c) for c in range(0x20, 0x7F)],
    [chr(c) for c in range(0xA1, 0x250)],
    [chr(c) for c in range(0x370, 0x530)],
    [chr(c) for c in (*range(0x4E00, 0x4E80), *range(0x3041, 0x3100), *range(0xAC00, 0xAC80))],
    [chr(c) for c in (*range(0x1F300, 0x1F6FF), 0x200D, 0xFE0F, *range(0x1F3FB, 0x1F400))],
    [chr(c) for c in (*range(0x300, 0x370), *range(0x61, 0x7B))],  # letters with any combining marks
    list(" \t\n\r\u00a0\u2003\u3000\u200b\u00ad.,;a"),
)


def texts() -> list[str]:
    """Texts from words, from one alphabet each, from everything, empty and long."""
    rng = random.Random(0)
    assigned = [c for c in map(chr, range(0x20, 0x2FFFF)) if unicodedata.category(c) not in ("Cs", "Cn", "Co")]
    found = ["", " ", "\n\t ", "a" * 1000, "cat " * 500, "猫" * 300, "🦄" * 100]
    while len(found) < COUNT:
        kind = rng.randrange(4)
        size = rng.choice([1, 2, 3, 5, 8, 13, 40, 150])
        if kind < 2:
            separators = [" "] * 6 + ["", ", ", "  ", "\n", "-"]
            found.append("".join(rng.choice(WORDS) + rng.choice(separators) for _ in range(size)))
        else:
            pool = rng.choice(ALPHABETS) if kind == 2 else assigned
            found.append("".join(rng.choice(pool) for _ in range(size)))
    return found


def disagreements(ours: list[list[int]], theirs: list[list[int]], of: list[str]) -> list[str]:
    return [text for text, a, b in zip(of, ours, theirs, strict=True) if a != b]


def test_clip_ids_are_those_of_transformers(tmp_path: Path):
    write_tokenizer(tmp_path, "<|endoftext|>", LENGTH)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    ours = CLIPTokenizer(49407, "nfc" if theirs.is_fast else "ftfy")
    generated = texts()
    options = {"padding": "max_length", "max_length": LENGTH, "truncation": True}
    expected = theirs(generated, **options)["input_ids"]
    found = [frame(ours, text_to_ids(ours, text), LENGTH) for text in generated]
    assert disagreements(found, expected, generated) == []


def test_bert_ids_are_those_of_transformers(tmp_path: Path):
    (tmp_path / "vocab.txt").write_bytes(VOCAB_FILE.read_bytes())
    theirs = transformers.BertTokenizerFast.from_pretrained(tmp_path, local_files_only=True, do_lower_case=True)
    ours = WordPieceTokenizer()
    generated = texts()
    options = {"padding": "max_length", "max_length": LENGTH, "truncation": True}
    expected = theirs(generated, **options)["input_ids"]
    found = [frame(ours, text_to_ids(ours, text), LENGTH) for text in generated]
    assert disagreements(found, expected, generated) == []
