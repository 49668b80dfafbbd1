"""Pictures that carry a learned word, as the web UI shares them: JSON in a text chunk or hidden in the pixels."""

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
CARD = (512, 512)  # size of the picture that is written


def read_png(data: bytes) -> dict[str, Any]:
    """The entries of a learned word in a PNG file, vectors as tensors: from its text chunk, else from its pixels."""
    text = next((body for kind, body in _chunks(data) if kind == b"tEXt" and body.startswith(KEYWORD + b"\0")), None)
    try:
        raw = base64.b64decode(text[len(KEYWORD) + 1 :], validate=True) if text is not None else _hidden(data)
        tree = json.loads(raw)
    except (binascii.Error, ValueError, RecursionError, zlib.error) as error:
        raise EmbeddingFileError("it is a picture whose learned word cannot be decoded") from error
    params = tree.get("string_to_param") if isinstance(tree, dict) else None
    if not isinstance(params, dict):
        raise EmbeddingFileError("it is a picture that carries something else than a learned word")
    return {**tree, "string_to_param": {word: _tensor(value) for word, value in params.items()}}


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


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = len(SIGNATURE)
    while position + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        yield kind, data[position + 8 : position + 8 + length]
        position += 12 + length


def _hidden(data: bytes) -> bytes:
    """JSON from the pixels: low and high halves of its compressed bytes stand left and right of the picture."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise EmbeddingFileError(
                    f"it is a picture of {picture.width} x {picture.height}, larger than any shared"
                )
            pixels = np.asarray(picture.convert("RGB"))  # (H, W, 3)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise EmbeddingFileError("it is a damaged picture") from error
    nibbles = _without_border(pixels) & 0x0F
    black = np.flatnonzero(nibbles.sum((0, 2)) == 0) if nibbles.size else np.array([])
    if len(black) < 2:
        raise EmbeddingFileError("it is a picture without a learned word")
    low, high = (_unscramble(part) for part in (nibbles[:, : black.min()], nibbles[:, black.max() + 1 :]))
    if low.shape != high.shape:
        raise EmbeddingFileError("it is a picture without a learned word")
    decompressor = zlib.decompressobj()
    raw = decompressor.decompress((high << 4 | low).tobytes(), MAX_JSON_BYTES)
    if not decompressor.eof:
        raise EmbeddingFileError("it is a picture whose learned word is cut off or far too large")
    return raw


def _without_border(pixels: np.ndarray) -> np.ndarray:
    """`pixels` (H, W, 3) without all-black rows and columns at the edges."""
    bright = pixels.max(-1) > 0
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    if not len(rows):
        return pixels[:0]
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _unscramble(block: np.ndarray) -> np.ndarray:
    """Undo the xor with a linear congruential generator's numbers."""
    state, keys = 0, np.empty(block.size, np.uint8)
    for i in range(block.size):
        state = (1664525 * state + 1013904223) % (1 << 32)
        keys[i] = state % 255
    return block ^ (keys.reshape(block.shape) & 0x0F)
