"""Reading, writing and merging files of learned words, safely, in every format that is in use.

Nothing in a file is ever executed: pickles are interpreted (`ldm.checkpoint_pickle`), not run. Every format is a row
of `FORMATS`; a new one is a reader, perhaps a writer, and a row.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import mmap
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.checkpoint_formats import CheckpointError, read_index
from ldm.checkpoint_pickle import BrokenPickleError, UnsafePickleError
from ldm.checkpoint_save import atomic_path
from ldm.modules import embedding_io_formats as formats
from ldm.modules import embedding_io_png as png
from ldm.modules.embedding_io_file import (
    MAX_FILE_BYTES,
    WIDTHS,
    Contents,
    EmbeddingFile,
    EmbeddingFileError,
    check_vectors,
    some_words,
)

__all__ = [
    "FORMATS",
    "WIDTHS",
    "EmbeddingFile",
    "EmbeddingFileError",
    "Format",
    "check_vectors",
    "identify",
    "merge",
    "read_embeddings",
    "some_words",
    "write_embeddings",
]

logger = logging.getLogger(__name__)

PICKLE_SUFFIXES = (".pt", ".bin", ".pth", ".ckpt")
NOT_CLIP = (384, 1280)  # widths of encoders whose vectors mean nothing to programs for Stable Diffusion
MAX_KEY = 60  # characters of an entry's name in messages
FOLDER_FILES = ("learned_embeds.safetensors", "learned_embeds.bin")  # of the concepts library, best first


@dataclasses.dataclass(frozen=True)
class Format:
    """How one file format is read and written.

    about: what it is.
    suffixes: usual ends of its files' names.
    read: gives None for a file of another format.
    write: gives the file's bytes for the words and the file name's suffix; None for a format that is only read.
    clip: the format is for Stable Diffusion's text encoders alone.
    """

    about: str
    suffixes: tuple[str, ...]
    read: Callable[[Contents], EmbeddingFile | None]
    write: Callable[[EmbeddingFile, str], bytes] | None = None
    clip: bool = True


# Readers are tried in this order.
FORMATS: dict[str, Format] = {
    "a1111": Format("AUTOMATIC1111's .pt", (".pt",), formats.read_a1111, formats.write_a1111),
    "a1111-png": Format("AUTOMATIC1111's picture", (".png",), formats.read_a1111, png.write_png),
    "original": Format(
        "textual inversion's embeddings.pt", (".pt",), formats.read_original, formats.write_original, clip=False
    ),
    "sdxl": Format("a word for SDXL", (".safetensors", ".pti"), formats.read_sdxl),
    "encoder": Format("a word under its encoder's name", (".safetensors", ".pt"), formats.read_encoder),
    "kohya": Format("kohya's emb_params", (".safetensors", ".pt"), formats.read_kohya, formats.write_kohya),
    "onetrainer": Format(
        "OneTrainer's emp_params", (".safetensors",), formats.read_onetrainer, formats.write_onetrainer
    ),
    "bundle": Format("words inside a LoRA file", (".safetensors",), formats.read_bundle),
    "diffusers": Format(
        "diffusers' learned_embeds", (".safetensors", ".bin"), formats.read_diffusers, formats.write_diffusers
    ),
}


def read_embeddings(path: str | Path) -> EmbeddingFile:
    """Read the learned words of `path`: a file in any format of `FORMATS`, or a concepts-library folder.

    Raises `FileNotFoundError`, or `EmbeddingFileError` with one sentence when the file is damaged, hostile, too large
    or of another kind.
    """
    return identify(path)[1]


def file_of_words(path: str | Path) -> Path:
    """The file that holds the words: `path` itself, or the one in a folder such as the concepts library's."""
    path = Path(path)
    if path.is_dir():
        return next((path / name for name in FOLDER_FILES if (path / name).is_file()), path / FOLDER_FILES[0])
    return path


def identify(path: str | Path) -> tuple[str, EmbeddingFile]:
    """As `read_embeddings`, with the name of the file's format before the words."""
    folder, path = Path(path), file_of_words(path)
    if not path.exists():
        raise FileNotFoundError(_no_known_file(folder) if folder.is_dir() else f"no embedding file at {path}")
    try:
        return _read(path)
    except EmbeddingFileError as error:
        raise EmbeddingFileError(f"{path}: {error}") from error
    except CheckpointError as error:
        raise EmbeddingFileError(f"{path} {error}") from error
    except UnsafePickleError as error:
        raise EmbeddingFileError(f"{path} would run code: {error}; do not trust this file") from error
    except BrokenPickleError as error:
        raise EmbeddingFileError(f"{path} is damaged: {error}") from error


def _no_known_file(folder: Path) -> str:
    """Message that a folder has none of the files looked for, and which of its files may hold words."""
    suffixes = {*PICKLE_SUFFIXES, *(suffix for row in FORMATS.values() for suffix in row.suffixes)}
    found = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in suffixes)
    remedy = f"name one of the files there: {some_words(found)}" if found else "it has no other file of that kind"
    return f"no embedding file {' or '.join(FOLDER_FILES)} in the folder {folder}; {remedy}"


def _read(path: Path) -> tuple[str, EmbeddingFile]:
    if path.stat().st_size > MAX_FILE_BYTES:
        return "bundle", _read_large(path)
    data = path.read_bytes()
    picture = png.picture_kind(data)
    if picture:
        contents = Contents(path, png.read_picture(data, picture))
    else:
        tree, starts = read_index(io.BufferedReader(io.BytesIO(data)), len(data))
        contents = Contents(path, tree, data, starts, _metadata(data))
    for name, known in FORMATS.items():
        words = known.read(contents)
        if words is None:
            continue
        _check(words)
        if known.clip and words.width == 1280 and known.read is not formats.read_a1111:
            raise EmbeddingFileError("its vectors are for SDXL's second text encoder, which no model here has")
        return "a1111-png" if picture else name, words
    raise EmbeddingFileError(
        f"it holds no learned words in a known format ({', '.join(FORMATS)}){_keys(contents.tree)}"
    )


def _keys(tree: Any) -> str:
    """The first entries of a file, shortened, for messages."""
    names = [key[:MAX_KEY] for key in tree if isinstance(key, str)] if isinstance(tree, dict) else []
    return f"; its entries are {some_words(names)}" if names else ""


def _read_large(path: Path) -> EmbeddingFile:
    """The words inside a LoRA file; nothing else that is so large holds any, and only its header and they are read."""
    size, words = path.stat().st_size, None
    with path.open("rb") as file:
        if file.read(9)[8:] == b"{":
            file.seek(0)
            tree, starts = read_index(file, size)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                words = formats.read_bundle(Contents(path, tree, data, starts, _metadata(data)))
    if words is None:
        raise EmbeddingFileError(f"it has {size:,} bytes, far more than learned words take; is it a model checkpoint?")
    _check(words)
    return words


def _metadata(data: bytes | mmap.mmap) -> dict[str, str]:
    """The free-form part of a safetensors header, which `read_index` has found to be sound; {} for other files."""
    if data[8:9] != b"{":
        return {}
    (length,) = struct.unpack("<Q", data[:8])
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__")
    entries = metadata.items() if isinstance(metadata, dict) else ()
    return {k: v for k, v in entries if isinstance(v, str)}


def _check(words: EmbeddingFile) -> None:
    """Raise `EmbeddingFileError` for words that no prompt or no encoder could use; drop impossible active counts."""
    if not words.vectors:
        raise EmbeddingFileError("it holds no learned words")
    widths = sorted({vectors.shape[1] for vectors in words.vectors.values()})
    if len(widths) > 1:
        raise EmbeddingFileError(f"its words have vectors of different widths: {widths}")
    blank = [word for word in words.vectors if not word.strip()]
    if blank:
        raise EmbeddingFileError(f"it names a word {blank[0]!r}, which no prompt can contain")
    words.active = {k: n for k, n in words.active.items() if 0 < n < len(words.vectors[k])}


def write_embeddings(words: EmbeddingFile, path: str | Path, format: str = "original") -> None:
    """Write learned words to `path`; an earlier file stays whole until the new one is complete.

    Raises `EmbeddingFileError` when the words cannot be written in that format, `OSError` when the disk refuses.
    """
    path = Path(path)
    if format not in FORMATS:
        raise EmbeddingFileError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    row = FORMATS[format]
    if row.write is None:
        raise EmbeddingFileError(f"{path} was not written: {row.about} can only be read")
    try:
        _check(words)
        _check_name(row, path)
        if row.clip and words.width in NOT_CLIP:
            raise EmbeddingFileError(
                f"these vectors are for {WIDTHS[words.width]}, and {row.about} is for Stable Diffusion alone"
            )
        data = row.write(words, path.suffix.lower())
    except EmbeddingFileError as error:
        raise EmbeddingFileError(f"{path} was not written: {error}") from error
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def _check_name(row: Format, path: Path) -> None:
    """Raise `EmbeddingFileError` where the name's ending promises another kind of file, or a picture would be lost."""
    allowed = row.suffixes if row.suffixes == (".png",) else tuple(dict.fromkeys((*row.suffixes, *PICKLE_SUFFIXES)))
    if path.suffix.lower() not in allowed:
        raise EmbeddingFileError(f"{row.about} is a file that ends in {', '.join(allowed)}, not in {path.suffix!r}")
    if path.suffix.lower() == ".png" and path.is_file() and not png.carries_word(path.read_bytes()):
        raise EmbeddingFileError("there is a picture of that name, which it would replace; choose another name")


def merge(
    files: Sequence[tuple[str, EmbeddingFile]], token_id: Callable[[str], int | None] | None = None
) -> EmbeddingFile:
    """One `EmbeddingFile` with the words of all named `files`; a word that occurs twice gets a number, with a notice.

    `token_id` gives the vocabulary entry of a renamed word, where it is one. Raises `EmbeddingFileError` when the
    vectors' widths differ, that is, when the files belong to different models.
    """
    merged = EmbeddingFile({})
    first_name, first = files[0]
    for name, words in files:
        if words.width != first.width:
            kinds = [
                f"{n} has {w.width} numbers per vector ({WIDTHS.get(w.width, 'unknown model')})"
                for n, w in ((first_name, first), (name, words))
            ]
            raise EmbeddingFileError(f"files of different models cannot be merged: {'; '.join(kinds)}")
        renames = _free_names(name, words, merged.vectors)
        words = words.renamed(renames)
        for new in renames.values():
            found = token_id(new) if token_id is not None else None
            words.token_ids.update({} if found is None else {new: found})
        for field in ("vectors", "token_ids", "active", "init_words"):
            getattr(merged, field).update(getattr(words, field))
    return merged


def _free_names(name: str, words: EmbeddingFile, taken: Mapping[str, object]) -> dict[str, str]:
    renames: dict[str, str] = {}
    for word in words.vectors:
        count = 2
        while word in taken and (f"{word}{count}" in {*taken, *words.vectors, *renames.values()}):
            count += 1
        if word in taken:
            renames[word] = f"{word}{count}"
            logger.warning("%r of %s is already taken, it becomes %r", word, name, renames[word])
    return renames
