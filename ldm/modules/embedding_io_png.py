"""Pictures that carry a learned word, as the web UI shares them: JSON in a PNG's text or hidden in the pixels."""

from __future__ import annotations

import base64
import binascii
import io
import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.modules.embedding_io_file import EmbeddingFile, EmbeddingFileError
from ldm.modules.embedding_io_formats import a1111_tree

SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEYWORD = b"sd-ti-embedding"
TENSOR_KEY = "TORCHTENSOR"
MAX_JSON_BYTES = 64 << 20
MAX_PIXELS = 16 << 20
ZLIB_FIRST_BYTE = b"\x78"  # deflate with a window of 32 kB, at whatever level
CARD = (512, 512)  # size of the picture that is written
NO_WORD = "it is a picture without a learned word (one that was saved again with loss has lost it)"
# Other pictures, by their first bytes, and why they are of no use.
LOST = "in which no learned word survives; ask for the original PNG, or WebP without loss"
OTHER_PICTURES = (
    (b"\xff\xd8\xff", f"a JPEG picture, {LOST}"),
    (b"GIF8", f"a GIF picture, {LOST}"),
    (b"\xff\x0a", "a JPEG XL picture, which is not read here; save it as PNG, without loss"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL picture, which is not read here; save it as PNG, without loss"),
)


def picture_kind(data: bytes) -> str | None:
    """Pillow's name for the kind of a picture that can carry a word; None for other files.

    Raises `EmbeddingFileError` for pictures of the kinds that cannot.
    """
    if data.startswith(SIGNATURE):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp" and b"avif" in data[8:32]:
        return "AVIF"
    for start, about in OTHER_PICTURES:
        if data.startswith(start) and data[8:9] != b"{":  # safetensors may begin with any length, but have that there
            raise EmbeddingFileError(f"it is {about}")
    return None


def read_picture(data: bytes, kind: str) -> dict[str, Any]:
    """The entries of a learned word in a picture, vectors as tensors: from a PNG's text, else from the pixels."""
    text = _text(data) if kind == "PNG" else None
    try:
        raw = base64.b64decode(_unpacked(*text), validate=True) if text is not None else _hidden(data, kind)
        tree = json.loads(raw)
    except EmbeddingFileError:
        raise
    except (binascii.Error, ValueError, RecursionError, zlib.error) as error:
        raise EmbeddingFileError("it is a picture whose learned word cannot be decoded") from error
    params = tree.get("string_to_param") if isinstance(tree, dict) else None
    if not isinstance(params, dict):
        raise EmbeddingFileError("it is a picture that carries something else than a learned word")
    return {**tree, "string_to_param": {word: _tensor(value) for word, value in params.items()}}


def carries_word(data: bytes) -> bool:
    """Whether a PNG file has a learned word in its text."""
    return _text(data) is not None


def write_png(words: EmbeddingFile, suffix: str) -> bytes:
    """A plain picture with the word in its text chunk."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    del suffix
    tree = a1111_tree(words)
    tree["string_to_param"] = {k: {TENSOR_KEY: v.tolist()} for k, v in tree["string_to_param"].items()}
    info = PngInfo()
    info.add_text(KEYWORD.decode(), base64.b64encode(json.dumps(tree).encode()).decode())
    out = io.BytesIO()
    Image.new("RGB", CARD, (96, 96, 112)).save(out, format="PNG", pnginfo=info)
    return out.getvalue()


def _tensor(value: Any) -> Tensor:
    try:
        return torch.tensor(value[TENSOR_KEY], dtype=torch.float32)
    except (TypeError, KeyError, ValueError, RuntimeError, OverflowError) as error:
        raise EmbeddingFileError("it is a picture whose learned word is no table of numbers") from error


def _text(data: bytes) -> tuple[bytes, bytes] | None:
    """Kind and contents of the chunk with the word's text, which programs that save a picture again may compress."""
    texts = ((k, b) for k, b in _chunks(data) if k in (b"tEXt", b"zTXt", b"iTXt") and b.startswith(KEYWORD + b"\0"))
    return next(((kind, body[len(KEYWORD) + 1 :]) for kind, body in texts), None)


def _unpacked(kind: bytes, body: bytes) -> bytes:
    """The text of a chunk, without what stands before it: a method (zTXt), or flag, method and two names (iTXt)."""
    if kind == b"tEXt":
        return body
    packed = kind == b"zTXt" or body[:1] == b"\1"
    body = body[1:] if kind == b"zTXt" else body[2:].partition(b"\0")[2].partition(b"\0")[2]
    return _inflated(body) if packed else body


def _inflated(packed: bytes) -> bytes:
    decompressor = zlib.decompressobj()
    raw = decompressor.decompress(packed, MAX_JSON_BYTES)
    if not decompressor.eof:
        raise EmbeddingFileError("it is a picture whose learned word is cut off or far too large")
    return raw


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = len(SIGNATURE)
    while position + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        yield kind, data[position + 8 : position + 8 + length]
        position += 12 + length


def _hidden(data: bytes, kind: str) -> bytes:
    """JSON from the pixels: low and high halves of its compressed bytes stand left and right of the picture."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise EmbeddingFileError(
                    f"it is a picture of {picture.width} x {picture.height}, larger than any shared"
                )
            pixels = np.asarray(picture.convert("RGB"))  # (H, W, 3)
    except EmbeddingFileError:
        raise
    except (OSError, SyntaxError, ValueError, RuntimeError, EOFError, Image.DecompressionBombError) as error:
        raise EmbeddingFileError("it is a damaged picture") from error
    except KeyError as error:
        raise EmbeddingFileError(
            f"it is a picture of kind {kind}, which this Pillow does not read; update it"
        ) from error
    nibbles = _without_border(pixels) & 0x0F
    black = np.flatnonzero(nibbles.sum((0, 2)) == 0) if nibbles.size else np.array([])
    if len(black) < 2:
        raise EmbeddingFileError(NO_WORD)
    low, high = (_unscramble(part) for part in (nibbles[:, : black.min()], nibbles[:, black.max() + 1 :]))
    packed = (high << 4 | low).tobytes() if low.shape == high.shape else b""
    if not packed.startswith(ZLIB_FIRST_BYTE):
        raise EmbeddingFileError(NO_WORD)
    return _inflated(packed)


def _without_border(pixels: np.ndarray) -> np.ndarray:
    """`pixels` (H, W, 3) without all-black rows and columns at the edges."""
    bright = pixels.max(-1) > 0
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    if not len(rows):
        return pixels[:0]
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _unscramble(block: np.ndarray) -> np.ndarray:
    """Undo the xor with the numbers of the linear congruential generator x <- a x + c (mod 2^32), from x = 0.

    Its k-th number is c (1 + a + ... + a^(k-1)), and 32-bit integers wrap around as the generator does.
    """
    powers = np.full(block.size, 1664525, np.uint32)
    powers[:1] = 1
    states = np.uint32(1013904223) * powers.cumprod(dtype=np.uint32).cumsum(dtype=np.uint32)
    return block ^ ((states % 255).astype(np.uint8).reshape(block.shape) & 0x0F)
