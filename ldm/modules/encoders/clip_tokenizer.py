"""CLIP's byte-pair encoding, from the vocabulary file that open_clip packages, without importing open_clip."""

from __future__ import annotations

import gzip
import html
import importlib.util
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

CLEANINGS = ("ftfy", "ftfy+html", "nfc")
MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
WORD_END = "</w>"
START_TOKEN_ID, END_TOKEN_ID = 49406, 49407
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")

# Every byte is written as one visible character: itself where it is visible in Latin-1, else one from U+0100 on.
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
BYTE_CHARS: dict[int, str] = {b: chr(b) for b in _VISIBLE} | {b: chr(256 + i) for i, b in enumerate(_HIDDEN)}
BYTES_OF: dict[str, int] = {char: byte for byte, char in BYTE_CHARS.items()} | {" ": 0x20}


@lru_cache(maxsize=1)
def read_vocabulary() -> tuple[list[str], list[tuple[str, str]]]:
    """The text of each id (bytes, bytes that end a word, then one entry per merge), and the merges in order."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("open_clip, which packages CLIP's vocabulary, is missing: pip install open_clip_torch")
    path = Path(spec.submodule_search_locations[0]) / MERGES_FILE
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    singles = list(BYTE_CHARS.values())
    count = START_TOKEN_ID - 2 * len(singles)  # the file goes on with merges that CLIP does not use
    merges: list[tuple[str, str]] = [(left, right) for left, right in map(str.split, lines[1 : 1 + count])]
    symbols = [*singles, *(char + WORD_END for char in singles), *(left + right for left, right in merges)]
    return symbols, merges


@lru_cache(maxsize=1)
def _byte_pairs() -> tuple[Any, list[str]]:
    """The encoder of one word, and the text of each id."""
    from tokenizers.models import BPE

    symbols, merges = read_vocabulary()
    vocab = {symbol: token_id for token_id, symbol in enumerate(symbols)}
    return BPE(vocab, merges, end_of_word_suffix=WORD_END), symbols


class CLIPTokenizer:
    """CLIP's byte-pair encoding, from the file that open_clip packages.

    pad_token_id: 49407 (the end token) for SD 1.x, 0 for SD 2.x.
    cleaning: "ftfy" repairs broken encodings and HTML entities, as SD 1.x was trained; "ftfy+html" then resolves
        entities until none is left, as open_clip does; "nfc" only composes accents, as today's fast tokenizers do.
    special_tokens: how the start and the end token are written in a text.
    """

    unk_token_id: int | None = None

    def __init__(
        self,
        pad_token_id: int,
        cleaning: str = "ftfy",
        special_tokens: tuple[str, str] = SPECIAL_TOKENS,
    ) -> None:
        import regex

        if cleaning not in CLEANINGS:
            raise ValueError(f"text cleaning {cleaning!r} is unknown; known: {', '.join(CLEANINGS)}")
        self._pairs, self._symbols = _byte_pairs()
        self._cleaning = cleaning
        self.vocab_size = END_TOKEN_ID + 1
        self.start_token_id = START_TOKEN_ID
        self.end_token_id = END_TOKEN_ID
        self.pad_token_id = pad_token_id
        self._special = dict(zip(special_tokens, (self.start_token_id, self.end_token_id), strict=True))
        # The text is lower case by then; ignoring case only lets U+017F count as an s, in the slow tokenizers.
        flags = regex.IGNORECASE if cleaning != "nfc" else 0
        words = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\p{White_Space}\p{L}\p{N}]+"
        self._pattern = regex.compile("|".join([*map(regex.escape, special_tokens), words]), flags)
        self._space = regex.compile(r"\p{White_Space}+")

    def clean(self, text: str) -> str:
        """`text` repaired as `cleaning` says, white space collapsed."""
        if self._cleaning == "nfc":
            text = unicodedata.normalize("NFC", text)
        else:
            import ftfy

            text = ftfy.fix_text(text)
        if self._cleaning == "ftfy+html":
            text = html.unescape(html.unescape(text))
        return self._space.sub(" ", text).strip(" ")

    def encode(self, text: str) -> list[int]:
        """Byte-pair ids of cleaned `text`, in lower case."""
        # Fast tokenizers lower each character on its own, which differs for a Greek word's last sigma.
        text = "".join(map(str.lower, text)) if self._cleaning == "nfc" else text.lower()
        ids: list[int] = []
        for word in self._pattern.findall(text):
            if word in self._special:
                ids.append(self._special[word])
            else:
                ids.extend(token.id for token in self._pairs.tokenize("".join(BYTE_CHARS[b] for b in word.encode())))
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ids; special tokens as they are written."""
        special = {token_id: text for text, token_id in self._special.items()}
        symbols = "".join(special.get(i) or self._symbols[i] for i in token_ids)
        raw = bytes(BYTES_OF[char] for char in symbols.replace(WORD_END, " ") if char in BYTES_OF)
        return raw.decode("utf-8", "replace")
