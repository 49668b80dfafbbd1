"""Reading and writing files of learned words, safely, in one shape: `EmbeddingFile`.

Nothing in a file is ever executed: the pickle index is interpreted (`ldm.checkpoint_pickle`), not unpickled. Every
format is a row of `FORMATS`; a new one is a function or two and a row.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint_formats import CheckpointError, read_index
from ldm.checkpoint_pickle import ITEM_SIZES, BrokenPickleError, PickledObject, TensorMeta, UnsafePickleError
from ldm.checkpoint_save import atomic_path

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 64 << 20  # the largest sensible file, hundreds of words of many vectors, has a tenth of this
MAX_VECTORS = 1024  # per word
MAX_WIDTH = 16384

# What a vector's width says about the text encoder that it belongs to.
WIDTHS = {
    384: "MiniLM",
    768: "Stable Diffusion 1.x (CLIP)",
    1024: "Stable Diffusion 2.x (OpenCLIP)",
    1280: "LDM (BERT)",
}


class EmbeddingFileError(ValueError):
    """A file holds no usable embeddings; the message names the file and says why."""


@dataclasses.dataclass
class EmbeddingFile:
    """Learned words, whatever file format they come from.

    vectors: placeholder -> float32 (n, D), D the same for all.
    token_ids: placeholder -> the vocabulary entry that it stands for, where the file says so.
    active: placeholder -> how many of its vectors are in use, where that is not all of them.
    init_words: placeholder -> the word that it started from, where the file says so.
    info: further scalars (step, name, ...).
    """

    vectors: dict[str, Tensor]
    token_ids: dict[str, int] = dataclasses.field(default_factory=dict)
    active: dict[str, int] = dataclasses.field(default_factory=dict)
    init_words: dict[str, str] = dataclasses.field(default_factory=dict)
    info: dict[str, str | int | float] = dataclasses.field(default_factory=dict)

    @property
    def width(self) -> int:
        """D of the vectors."""
        return next(iter(self.vectors.values())).shape[1]

    def renamed(self, names: Mapping[str, str]) -> EmbeddingFile:
        """The same words with `names` {old: new} applied; raises `EmbeddingFileError` for unknown or doubled names."""
        unknown = [old for old in names if old not in self.vectors]
        if unknown:
            raise EmbeddingFileError(f"cannot rename {unknown[0]!r}: the file's words are {some_words(self.vectors)}")
        new = [names.get(old, old) for old in self.vectors]
        if len(set(new)) != len(new):
            raise EmbeddingFileError(f"two words would have the same name: {some_words(new)}")
        parts = {
            field: {names.get(k, k): v for k, v in getattr(self, field).items()}
            for field in ("vectors", "token_ids", "active", "init_words")
        }
        return EmbeddingFile(**parts, info=dict(self.info))


class Contents:
    """A file's nested `tree`, with a `TensorMeta` for each tensor, and its header's `metadata`."""

    def __init__(
        self,
        path: Path,
        tree: Any,
        data: bytes = b"",
        starts: Mapping[str, int] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.tree = tree
        self.metadata = dict(metadata or {})
        self._data = data
        self._starts = dict(starts or {})

    def tensor(self, meta: TensorMeta) -> Tensor:
        """Read one tensor."""
        if any(n > MAX_FILE_BYTES for n in meta.shape) or len(meta.shape) > 2:
            raise EmbeddingFileError(f"it holds a tensor of shape {meta.shape}")
        dtype: torch.dtype = getattr(torch, meta.dtype)
        if 0 in meta.shape:
            return torch.empty(meta.shape, dtype=dtype)
        items = 1 + sum((n - 1) * s for n, s in zip(meta.shape, meta.stride, strict=True))
        start = self._starts[meta.storage.key] + meta.offset * ITEM_SIZES[meta.dtype]
        raw = bytearray(self._data[start : start + items * ITEM_SIZES[meta.dtype]])
        if len(raw) < items * ITEM_SIZES[meta.dtype]:
            raise EmbeddingFileError("it is cut off")
        return torch.frombuffer(raw, dtype=dtype).as_strided(meta.shape, meta.stride).contiguous()

    def vectors(self, value: Any) -> Tensor:
        """A word's vectors, float32 (n, D), checked; (D,) counts as one vector."""
        if not isinstance(value, TensorMeta):
            raise EmbeddingFileError("it holds something else where a word's vectors should be")
        return check_vectors(self.tensor(value))


def check_vectors(value: Tensor) -> Tensor:
    """`value` as finite float32 (n, D); raises `EmbeddingFileError` when it is no set of vectors."""
    if not value.is_floating_point():
        raise EmbeddingFileError(f"its vectors have the type {value.dtype}, not a floating-point one")
    if value.ndim == 1:
        value = value[None]
    if value.ndim != 2 or not (0 < value.shape[0] <= MAX_VECTORS and 0 < value.shape[1] <= MAX_WIDTH):
        raise EmbeddingFileError(f"a word's vectors have the shape {tuple(value.shape)}")
    value = value.detach().to("cpu", torch.float32)
    if not value.isfinite().all():
        raise EmbeddingFileError("its vectors contain infinite or undefined numbers")
    return value.contiguous()


def some_words(words: Any, most: int = 8) -> str:
    """The first words in quotes, for messages."""
    names = [repr(word) for word in words]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _parameters(value: Any) -> dict[Any, Any]:
    """The entries of a pickled ParameterDict (torch of any age) or of a plain dict."""
    if isinstance(value, PickledObject) and isinstance(value.state, dict):
        value = value.state.get("_parameters")
    return value if isinstance(value, dict) else {}


def _scalars(tree: Mapping[Any, Any]) -> dict[str, str | int | float]:
    return {k: v for k, v in tree.items() if isinstance(k, str) and isinstance(v, (str, int, float))}


def _of_type(value: Any, kind: type) -> dict[str, Any]:
    entries = value.items() if isinstance(value, dict) else ()
    return {k: v for k, v in entries if isinstance(k, str) and type(v) is kind}


def read_original(contents: Contents) -> EmbeddingFile | None:
    """The layout of textual inversion's `embeddings.pt`: `string_to_token` and `string_to_param`."""
    tree = contents.tree
    if not isinstance(tree, dict) or "string_to_param" not in tree:
        return None
    params = {k: contents.vectors(v) for k, v in _parameters(tree["string_to_param"]).items() if isinstance(k, str)}
    token_ids: dict[str, int] = {}
    for word, value in _parameters(tree.get("string_to_token")).items():
        if isinstance(value, TensorMeta):
            token = contents.tensor(value)
            value = int(token) if token.numel() == 1 and not token.is_floating_point() else None
        if type(value) is int and value >= 0 and word in params:
            token_ids[word] = value
    active = {k: n for k, n in _of_type(tree.get("active"), int).items() if k in params}
    init_words = {k: w for k, w in _of_type(tree.get("init_words"), str).items() if k in params}
    return EmbeddingFile(params, token_ids, active, init_words, _scalars(tree))


def write_original(words: EmbeddingFile, suffix: str) -> bytes:
    """The layout of textual inversion's `embeddings.pt`; its readers ignore the further entries."""
    del suffix
    params = nn.ParameterDict()
    for word, vectors in words.vectors.items():
        param = nn.Parameter(check_vectors(vectors).clone())
        try:
            params[word] = param
        except KeyError:  # names such as "a.b" or "keys", which only readers of the raw entries can get back
            params._parameters[word] = param
    tree: dict[str, Any] = {
        **words.info,
        # -1 never occurs in a text; the published code needs an entry for each word.
        "string_to_token": {word: torch.tensor(words.token_ids.get(word, -1)) for word in words.vectors},
        "string_to_param": params,
    }
    tree.update({name: dict(getattr(words, name)) for name in ("active", "init_words") if getattr(words, name)})
    return archive_bytes(tree)


def archive_bytes(tree: Any) -> bytes:
    """`torch.save` with just the records that every reader accepts, and the same bytes for the same contents."""
    saved_bytes, result = io.BytesIO(), io.BytesIO()
    torch.save(tree, saved_bytes)
    with zipfile.ZipFile(saved_bytes) as saved, zipfile.ZipFile(result, "w") as archive:
        for name in saved.namelist():
            part = name.partition("/")[2]
            if re.fullmatch(r"data\.pkl|version|data/\d+", part):
                archive.writestr(zipfile.ZipInfo(f"archive/{part}"), saved.read(name))
    return result.getvalue()


@dataclasses.dataclass(frozen=True)
class Format:
    """How one file format is read and written.

    read: gives None for a file of another format.
    write: gives the file's bytes for the words and the file name's suffix; None for a format that is only read.
    """

    about: str
    suffixes: tuple[str, ...]
    read: Callable[[Contents], EmbeddingFile | None]
    write: Callable[[EmbeddingFile, str], bytes] | None = None


FORMATS: dict[str, Format] = {
    "original": Format("textual inversion's embeddings.pt", (".pt", ".bin"), read_original, write_original),
}


def read_embeddings(path: str | Path) -> EmbeddingFile:
    """Read the learned words of `path`, in any format of `FORMATS`.

    Raises `FileNotFoundError`, or `EmbeddingFileError` with one sentence when the file is damaged, hostile, too large
    or of another kind.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no embedding file at {path}")
    try:
        words = _read(path)
    except (CheckpointError, EmbeddingFileError) as error:
        raise EmbeddingFileError(f"{path}: {error}") from error
    except UnsafePickleError as error:
        raise EmbeddingFileError(f"{path} would run code: {error}; do not trust this file") from error
    except BrokenPickleError as error:
        raise EmbeddingFileError(f"{path} is damaged: {error}") from error
    return words


def _read(path: Path) -> EmbeddingFile:
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise EmbeddingFileError(f"it has {size:,} bytes, far more than learned words take; is it a model checkpoint?")
    data = path.read_bytes()
    tree, starts = read_index(io.BufferedReader(io.BytesIO(data)), len(data))
    contents = Contents(path, tree, data, starts)
    for known in FORMATS.values():
        words = known.read(contents)
        if words is not None:
            return _checked(words)
    raise EmbeddingFileError(f"it holds no learned words in a known format ({', '.join(FORMATS)})")


def _checked(words: EmbeddingFile) -> EmbeddingFile:
    if not words.vectors:
        raise EmbeddingFileError("it holds no learned words")
    widths = {tuple(v.shape)[1]: word for word, v in words.vectors.items()}
    if len(widths) > 1:
        raise EmbeddingFileError(f"its words have vectors of different widths: {sorted(widths)}")
    for word in words.vectors:
        if not word.strip():
            raise EmbeddingFileError(f"it names a word {word!r}, which no prompt can contain")
    words.active = {k: n for k, n in words.active.items() if 0 < n < len(words.vectors[k])}
    return words


def write_embeddings(words: EmbeddingFile, path: str | Path, format: str = "original") -> None:
    """Write learned words to `path`; an earlier file stays whole until the new one is complete.

    Raises `EmbeddingFileError` when the words cannot be written in that format, `OSError` when the disk refuses.
    """
    path = Path(path)
    if format not in FORMATS:
        raise EmbeddingFileError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    write = FORMATS[format].write
    if write is None:
        raise EmbeddingFileError(f"{FORMATS[format].about}: this format can only be read")
    try:
        data = write(_checked(words), path.suffix.lower())
    except EmbeddingFileError as error:
        raise EmbeddingFileError(f"{path} was not written: {error}") from error
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def merge(files: Sequence[tuple[str, EmbeddingFile]]) -> EmbeddingFile:
    """One `EmbeddingFile` with the words of all named `files`; a word that occurs twice gets a number as suffix.

    Raises `EmbeddingFileError` when the vectors' widths differ, that is, when the files belong to different models.
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
        renames: dict[str, str] = {}
        for word in words.vectors:
            new, count = word, 1
            while new in merged.vectors or (new != word and new in words.vectors) or new in renames.values():
                count += 1
                new = f"{word}{count}"
            if new != word:
                renames[word] = new
                logger.warning("%r of %s is already taken, it becomes %r", word, name, new)
        words = words.renamed(renames)
        # A renamed word is no longer the vocabulary entry that it was.
        words.token_ids = {k: v for k, v in words.token_ids.items() if k not in renames.values()}
        for field in ("vectors", "token_ids", "active", "init_words"):
            getattr(merged, field).update(getattr(words, field))
    return merged
