"""What all text conditioners share: placeholders matched in the text, framing, truncation, and the base class.

A placeholder is any string ("*", "<my-cat>", "sks"). It is found in the cleaned text before tokenising, so no
tokenizer ever changes, and stands in the token ids as the id that the embedding manager gave it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# Letters of scripts that put no spaces between words: Thai, Lao, Myanmar, Khmer, Hiragana and Katakana, Han.
UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff"
    r"\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f\u3005-\u3007\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
SPACED = rf"[^\W{UNSPACED}]"  # a letter, digit or underscore that may be a part of a longer word


class Tokenizer(Protocol):
    """A fixed vocabulary and the way from text to its ids, without start, end and padding tokens."""

    vocab_size: int
    start_token_id: int
    end_token_id: int
    pad_token_id: int

    @property
    def unk_token_id(self) -> int | None:
        """Id that stands for text outside the vocabulary, if there is one."""
        ...

    def clean(self, text: str) -> str:
        """Text as the vocabulary's authors normalise it, case and placeholders kept."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of cleaned text."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids."""
        ...


@runtime_checkable
class PlaceholderEditor(Protocol):
    """What a conditioner needs of an embedding manager besides calling it."""

    @property
    def placeholders(self) -> Mapping[str, int]:
        """Placeholder strings and the ids that stand for them."""
        ...

    def expand(self, token_ids: Tensor) -> Tensor:
        """Token ids (B, L) with each placeholder repeated once per vector."""
        ...


class Piece(NamedTuple):
    """A stretch of text; `placeholder` is set where it is one."""

    text: str
    placeholder: str | None = None


@lru_cache(maxsize=256)
def _placeholder_pattern(placeholders: tuple[str, ...]) -> tuple[re.Pattern[str], list[str]]:
    """A pattern with one group per alternative, and the placeholder that each group stands for.

    Longer placeholders come first; among equally long ones exact spellings come before any-case ones.
    """
    alternatives = []
    for placeholder in placeholders:
        words = placeholder.split()
        if not words:
            raise ValueError(f"{placeholder!r} cannot be a placeholder: it has no visible character")
        body = r"\s+".join(re.escape(word) for word in words)
        before = rf"(?<!{SPACED})" if re.match(SPACED, words[0]) else ""
        after = rf"(?!{SPACED})" if re.search(rf"{SPACED}$", words[-1]) else ""
        for any_case, flags in enumerate(("", "i")):
            alternatives.append((-len(placeholder), any_case, placeholder, f"((?{flags}:{before}{body}{after}))"))
    alternatives.sort(key=lambda a: a[:2])
    return re.compile("|".join(a[3] for a in alternatives)), [a[2] for a in alternatives]


def split_at_placeholders(text: str, placeholders: Iterable[str]) -> list[Piece]:
    """Cut `text` at every placeholder it contains.

    The longest placeholder wins; one that begins or ends with a letter, digit or underscore matches whole words only,
    as far as its script and its neighbour's put spaces between words (Chinese, Japanese, Thai and others do not); case
    is ignored (tokenizers lower-case anyway) unless an exactly written one fits.
    """
    names = tuple(placeholders)
    if not names:
        return [Piece(text)] if text else []
    pattern, groups = _placeholder_pattern(names)
    pieces, end = [], 0
    for match in pattern.finditer(text):
        if match.start() > end:
            pieces.append(Piece(text[end : match.start()]))
        assert match.lastindex is not None
        pieces.append(Piece(match.group(), groups[match.lastindex - 1]))
        end = match.end()
    if end < len(text):
        pieces.append(Piece(text[end:]))
    return pieces


def text_to_ids(tokenizer: Tokenizer, text: str, placeholders: Mapping[str, int] | None = None) -> list[int]:
    """Token ids of `text`, unframed and of any length, placeholders as the ids they map to."""
    names: dict[str, int] = {}
    for placeholder, token_id in (placeholders or {}).items():
        names.setdefault(tokenizer.clean(placeholder), token_id)
    text = text.encode("utf-8", "replace").decode()  # halves of surrogate pairs, which no tokenizer takes
    ids: list[int] = []
    for piece in split_at_placeholders(tokenizer.clean(text), names):
        if piece.placeholder is None:
            ids.extend(tokenizer.encode(piece.text))
        else:
            ids.append(names[piece.placeholder])
    return ids


def frame(tokenizer: Tokenizer, ids: Sequence[int], max_length: int) -> list[int]:
    """`ids` between start and end token, cut or padded to `max_length`; the end token is always there."""
    framed = [tokenizer.start_token_id, *ids[: max_length - 2], tokenizer.end_token_id]
    return framed + [tokenizer.pad_token_id] * (max_length - len(framed))


def describe_ids(tokenizer: Tokenizer, ids: Iterable[int], placeholders: Mapping[str, int]) -> str:
    """Readable text of token ids, placeholders under their names."""
    names = {token_id: name for name, token_id in placeholders.items()}
    words, run = [], []
    for token_id in [*ids, None]:
        if token_id is not None and token_id not in names:
            run.append(token_id)
            continue
        words.append(tokenizer.decode([i for i in run if i < tokenizer.vocab_size]).strip())
        words.append(names.get(token_id, "") if token_id is not None else "")
        run = []
    return " ".join(word for word in words if word)


class TextConditioner(nn.Module):
    """Base of the text conditioners: text -> token ids -> vocabulary rows -> (embedding manager) -> transformer.

    A subclass sets `max_length`, gives its vocabulary table by `token_table()` and its transformer by
    `transform(embedded, token_ids)`, and builds its tokenizer in `_build_tokenizer()` on first use.
    Meets `ldm.protocols.TextEncoder`.
    """

    max_length: int

    def __init__(self) -> None:
        super().__init__()
        self._tokenizer: Tokenizer | None = None
        self._truncated: set[str] = set()

    def token_table(self) -> nn.Embedding:
        """The vocabulary's embedding layer."""
        raise NotImplementedError

    def transform(self, embedded: Tensor, token_ids: Tensor) -> Tensor:
        """Conditioning (B, L, D_context) of token embeddings (B, L, D) without positions."""
        raise NotImplementedError

    def _build_tokenizer(self) -> Tokenizer:
        raise NotImplementedError

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, built when first needed."""
        if self._tokenizer is None:
            self._tokenizer = self._build_tokenizer()
        return self._tokenizer

    @property
    def embedding_dim(self) -> int:
        """Width of the vocabulary table, and so of a pseudo-word vector."""
        return self.token_table().embedding_dim

    @property
    def vocab_size(self) -> int:
        """Rows of the vocabulary table."""
        return self.token_table().num_embeddings

    @property
    def end_token_id(self) -> int | None:
        """Id of the token that ends every text."""
        return self.tokenizer.end_token_id

    @property
    def unk_token_id(self) -> int | None:
        """Id that stands for text outside the vocabulary, if there is one."""
        return self.tokenizer.unk_token_id

    def tokenize(self, texts: Sequence[str], placeholders: Mapping[str, int] | None = None) -> Tensor:
        """Token ids, int64 (B, max_length), of texts, with start, end and padding tokens.

        Text that does not fit is cut before the end token, with one warning per text that names what was dropped.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        placeholders = placeholders or {}
        rows = []
        for text in texts:
            ids = text_to_ids(self.tokenizer, text, placeholders)
            self.check_ids(ids, placeholders, text)
            self.warn_if_long(ids, placeholders, text)
            rows.append(frame(self.tokenizer, ids, self.max_length))
        return torch.tensor(rows, dtype=torch.long).reshape(len(rows), self.max_length)

    def check_ids(self, ids: Sequence[int], placeholders: Mapping[str, int], text: str) -> None:
        """Raise ValueError for ids outside the table: a wrong vocabulary file would otherwise pass unnoticed."""
        known = set(placeholders.values())
        outside = next((i for i in ids if i >= self.vocab_size and i not in known), None)
        if outside is not None:
            raise ValueError(
                f"token id {outside} in {text!r} is outside the model's {self.vocab_size} vocabulary rows: "
                "use the vocabulary that the model was trained with"
            )

    def warn_if_long(self, ids: Sequence[int], placeholders: Mapping[str, int], text: str) -> None:
        """Say once for each text which words `frame` will cut off."""
        room = self.max_length - 2
        if len(ids) > room and text not in self._truncated:
            self._truncated.add(text)
            dropped = describe_ids(self.tokenizer, ids[room:], placeholders)
            logger.warning("text is longer than %d tokens, dropped its end: %r", self.max_length, dropped)

    def word_ids(self, word: str) -> list[int]:
        """Token ids of `word` alone, without start, end and padding tokens."""
        return text_to_ids(self.tokenizer, word)

    def id_to_word(self, token_id: int) -> str:
        """Text of one vocabulary entry."""
        return self.tokenizer.decode([token_id]).strip()

    def embed(self, token_ids: Tensor) -> Tensor:
        """Vocabulary rows (..., D) of token ids (...), without positions; ids outside the vocabulary give zeros."""
        table = self.token_table()
        token_ids = token_ids.to(table.weight.device)
        inside = token_ids < self.vocab_size
        rows = table(token_ids.clamp(max=self.vocab_size - 1))  # (..., D)
        return rows * inside.unsqueeze(-1).to(rows.dtype)

    def encode(
        self, texts: Sequence[str] | Tensor, embedding_manager: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> Tensor:
        """Conditioning sequence (B, L, D_context) of texts, or of token ids (B, L).

        `embedding_manager(token_ids, embedded)` replaces the rows of its `placeholders`.
        """
        editor = embedding_manager if isinstance(embedding_manager, PlaceholderEditor) else None
        ids = texts if isinstance(texts, Tensor) else self.tokenize(texts, editor.placeholders if editor else None)
        ids = ids.to(self.token_table().weight.device)  # (B, L)
        embedded = self.embed(ids)  # (B, L, D)
        if embedding_manager is not None:
            embedded = embedding_manager(ids, embedded)
        return self.transform(embedded, editor.expand(ids) if editor else ids)

    def forward(
        self, texts: Sequence[str] | Tensor, embedding_manager: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> Tensor:
        """Same as `encode`."""
        return self.encode(texts, embedding_manager)
