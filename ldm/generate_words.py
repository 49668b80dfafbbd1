"""Loading files of learned words into a model that is to draw them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.generate_files import file_hash
from ldm.modules.embedding_io import file_of_words, read_embeddings, some_words
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.encoders.text import split_at_placeholders
from ldm.protocols import TextEncoder

logger = logging.getLogger(__name__)


def parse_renames(words: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs (old, new) of words of the form `old=new`, parted at the first "=" that leaves two words.

    One within <brackets> parts them only where no other does, so that `<a=b>` may be a word.
    """
    pairs = []
    for word in words:
        cuts = [(word[:i], word[i + 1 :]) for i, sign in enumerate(word) if sign == "="]
        cuts = [(old, new) for old, new in cuts if old.strip() and new.strip()]
        if not cuts:
            raise ValueError(f"--rename {word}: write OLD=NEW, for example '*=<my-cat>'")
        pairs.append(next((cut for cut in cuts if cut[0].count("<") == cut[0].count(">")), cuts[0]))
    return pairs


def load_words(
    model: Any,
    paths: Sequence[str | Path],
    renames: Sequence[tuple[str, str]] = (),
    strengths: Sequence[float] = (1.0,),
) -> list[str]:
    """Give `model` the learned words of all files; returns their names, see `load_files`."""
    return [word for names in load_files(model, paths, renames, strengths) for word in names]


def load_files(
    model: Any,
    paths: Sequence[str | Path],
    renames: Sequence[tuple[str, str]] = (),
    strengths: Sequence[float] = (1.0,),
) -> list[list[str]]:
    """Give `model` the learned words of all files; returns the names that each file's words have.

    Each of `renames` (old, new) applies once, to the first file in order that has the old name; a name that is then
    still taken gets a number, with a notice. `strengths`: one for all files or one for each, see
    `EmbeddingManager.load`. What words the model's config had declared is forgotten.
    """
    if not isinstance(model.cond_stage_model, TextEncoder):
        raise ValueError("learned words need a model with a text encoder, which this one does not have")
    if len(strengths) not in (1, len(paths)):
        raise ValueError(f"{len(strengths)} strengths for {len(paths)} embedding files: give one, or one for each")
    strengths = list(strengths) * (len(paths) if len(strengths) == 1 else 1)
    if model.embedding_manager is None:
        model.embedding_manager = EmbeddingManager(model.cond_stage_model)
    left = list(renames)
    loaded: list[str] = []
    of_files: list[list[str]] = []
    for path, strength in zip(paths, strengths, strict=True):
        words = list(read_embeddings(path).vectors)
        names = _names_for(path, words, left, loaded)
        of_files.append(model.embedding_manager.load(path, add=bool(loaded), rename=names, strength=strength))
        loaded += of_files[-1]
    if left:
        raise ValueError(f"--rename {left[0][0]}={left[0][1]}: no file has that word; there are {some_words(loaded)}")
    return of_files


def _names_for(
    path: str | Path, words: Sequence[str], renames: list[tuple[str, str]], taken: Sequence[str]
) -> dict[str, str]:
    """New names {old: new} of a file's words; uses up the `renames` that apply."""
    names: dict[str, str] = {}
    for word in words:
        new = word
        pair = next((pair for pair in renames if pair[0] == word), None)
        if pair is not None:
            renames.remove(pair)
            new = pair[1]
        number = 1
        while (number > 1 or pair is None) and new in (*taken, *names.values()):
            number += 1
            new = f"{word}{number}"
        if number > 1:
            logger.warning("%s: %r is taken by another file, so its word is written %r here", path, word, new)
        names[word] = new
    return {old: new for old, new in names.items() if old != new}


def prompts_without_words(prompts: Sequence[str], words: Sequence[str]) -> list[str]:
    """The prompts in which none of the learned words occurs."""
    return [text for text in prompts if all(piece.placeholder is None for piece in split_at_placeholders(text, words))]


def fingerprint(path: str | Path) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a file of words."""
    return file_hash(file_of_words(path))
