"""Files of learned words made byte by byte, as the programs that write them lay them out: no torch.save, no library.

Pickles are put together from opcodes (protocol 2), so that what the readers are given does not depend on any writer
of this project or of torch.
"""

from __future__ import annotations

import base64
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "float64": "DoubleStorage", "int64": "LongStorage"}
CODES = {"float32": "F32", "float16": "F16", "float64": "F64", "int64": "I64"}


class Pickle:
    """The contents of `data.pkl` of torch's archives, and the storages that its tensors lie in."""

    def __init__(self) -> None:
        self.storages: list[tuple[bytes, int]] = []  # bytes, and bytes of one item

    def close(self, body: bytes) -> bytes:
        """A whole pickle."""
        return b"\x80\x02" + body + b"."

    def value(self, value: Any) -> bytes:
        """Opcodes of plain values, arrays (as tensors) and `Raw` ones."""
        if isinstance(value, Raw):
            return value.make(self)
        if isinstance(value, np.ndarray):
            return self.tensor(value)
        if isinstance(value, Mapping):
            return b"}(" + b"".join(self.value(k) + self.value(v) for k, v in value.items()) + b"u"
        if isinstance(value, tuple):
            return b"(" + b"".join(map(self.value, value)) + b"t"
        if isinstance(value, bool):
            return b"\x88" if value else b"\x89"
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, str):
            encoded = value.encode()
            return b"X" + struct.pack("<I", len(encoded)) + encoded
        assert value is None
        return b"N"

    def tensor(self, array: np.ndarray, storage: bytes | None = None, offset: int = 0) -> bytes:
        """A tensor; `storage` is what it is a part of, from item `offset` on."""
        key, raw = str(len(self.storages)), array.tobytes() if storage is None else storage
        self.storages.append((raw, array.itemsize))
        kind = glob("torch", STORAGES[array.dtype.name])
        place = b"(" + self.value("storage") + kind + self.value(key) + self.value("cpu")
        place += self.value(len(raw) // array.itemsize) + b"tQ"
        stride = tuple(int(np.prod(array.shape[i + 1 :])) for i in range(array.ndim))
        rest = self.value(offset) + self.value(array.shape) + self.value(stride) + self.value(False) + ordered()
        return glob("torch._utils", "_rebuild_tensor_v2") + b"(" + place + rest + b"tR"


class Raw:
    """A value that is made by its own opcodes."""

    def __init__(self, make: Callable[[Pickle], bytes]) -> None:
        self.make = make


def glob(module: str, name: str) -> bytes:
    """Opcode that names a class or function."""
    return f"c{module}\n{name}\n".encode()


def ordered(items: bytes = b"") -> bytes:
    """An OrderedDict with the opcodes of its keys and values."""
    return glob("collections", "OrderedDict") + b")R" + (b"(" + items + b"u" if items else b"")


def parameter(array: np.ndarray) -> Raw:
    """An nn.Parameter."""
    return Raw(
        lambda p: glob("torch._utils", "_rebuild_parameter") + b"(" + p.tensor(array) + b"\x88" + ordered() + b"tR"
    )


def parameter_dict(vectors: Mapping[str, np.ndarray], old: bool) -> Raw:
    """An nn.ParameterDict, as torch up to 1.11 (`old`) or later pickles it."""

    def make(p: Pickle) -> bytes:
        items = b"".join(p.value(word) + parameter(array).make(p) for word, array in vectors.items())
        state = p.value("training") + b"\x88" + p.value("_parameters") + ordered(items)
        for name in ("_buffers", "_non_persistent_buffers_set", "_modules"):
            state += p.value(name) + ordered()
        if not old:
            state += p.value("_keys") + p.value(dict.fromkeys(vectors))
        return glob("torch.nn.modules.container", "ParameterDict") + b")\x81}(" + state + b"ub"

    return Raw(make)


def zip_archive(tree: Any, root: str = "archive", newer: bool = False) -> bytes:
    """The archive of torch 1.6 and later; `newer` adds the records that today's torch writes beside."""
    pickle = Pickle()
    index = pickle.close(pickle.value(tree))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{root}/data.pkl", index)
        if newer:
            for name, content in ((".format_version", b"1"), (".storage_alignment", b"64"), ("byteorder", b"little")):
                archive.writestr(f"{root}/{name}", content)
        for key, (raw, _) in enumerate(pickle.storages):
            archive.writestr(f"{root}/data/{key}", raw)
        archive.writestr(f"{root}/version", b"3\n")
    return out.getvalue()


def legacy_stream(tree: Any) -> bytes:
    """The stream of torch before 1.6: five pickles, then the storages."""
    pickle = Pickle()
    body = pickle.value(tree)
    # here a storage's place also says of what it is a view
    body = body.replace(b"tQ", b"NtQ")
    magic = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [magic, pickle.close(pickle.value(1001)), pickle.close(pickle.value(system)), pickle.close(body)]
    keys = b"](" + b"".join(pickle.value(str(key)) for key in range(len(pickle.storages))) + b"e"
    parts.append(pickle.close(keys))
    parts += [struct.pack("<q", len(raw) // item) + raw for raw, item in pickle.storages]
    return b"".join(parts)


def safetensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """A .safetensors file."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    data = b""
    for name, array in tensors.items():
        begin, data = len(data), data + array.tobytes()
        header[name] = {
            "dtype": CODES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [begin, len(data)],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded + data


def png(chunks: Sequence[tuple[bytes, bytes]], pixels: np.ndarray | None = None) -> bytes:
    """A PNG picture of `pixels` (H, W, 3) with further `chunks` before its data."""
    pixels = np.full((4, 4, 3), 90, np.uint8) if pixels is None else pixels
    height, width = pixels.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)  # filter 0: as they are
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + body


def a1111_tree(word: str, vectors: Any, step: int | None) -> dict[str, Any]:
    """What AUTOMATIC1111's web UI stores."""
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vectors},
        "name": word,
        "step": step,
        "sd_checkpoint": "4bdfc29c",
        "sd_checkpoint_name": "SD2.1-768",
    }


def a1111_json(word: str, vectors: np.ndarray, step: int | None) -> bytes:
    """The same as in its pictures."""
    return json.dumps(a1111_tree(word, {"TORCHTENSOR": vectors.tolist()}, step)).encode()


def text_picture(data: bytes) -> bytes:
    """A picture with a learned word in its text chunk."""
    return png([(b"tEXt", b"sd-ti-embedding\0" + base64.b64encode(data))])


def pixel_picture(data: bytes, height: int = 32) -> bytes:
    """A picture with a learned word hidden in its pixels, left and right of the motif."""
    packed = zlib.compress(data, 9)
    raw = np.frombuffer(packed + b"\0" * (-len(packed) % (height * 3)), np.uint8)
    state, key = 0, np.empty(len(raw), np.uint8)
    for i in range(len(raw)):
        state = (1664525 * state + 1013904223) % 2**32
        key[i] = state % 255 & 0x0F
    halves = [((half ^ key) | 0x50).reshape(height, -1, 3) for half in (raw & 0x0F, raw >> 4)]
    gap, motif = np.zeros((height, 1, 3), np.uint8), np.full((height, 9, 3), 200, np.uint8)
    return png([], np.concatenate([halves[0], gap, motif, gap, halves[1]], axis=1))


def makers(word: str, vectors: np.ndarray, step: int | None = 500) -> dict[str, Callable[[], bytes]]:
    """{"program/file name": its bytes} of one word (n, D) in every layout in use.

    The file name follows the last "/"; WORD in it is the word, where the file itself does not say it.
    """
    second = np.zeros((len(vectors), 1280), np.float32)
    ids = np.zeros(77, np.int64)
    ids[1] = 265
    token = Raw(lambda p: p.tensor(ids[1:2].reshape(()), ids.tobytes(), 1))
    original = {"string_to_token": {word: token}, "string_to_param": parameter_dict({word: vectors}, old=False)}
    older = {"string_to_token": {word: token}, "string_to_param": parameter_dict({word: vectors}, old=True)}
    web = a1111_tree(word, vectors, step)
    leaf = a1111_tree(word, parameter(vectors), step)
    row = vectors[0] if len(vectors) == 1 else vectors
    return {
        "textual inversion/embeddings.pt": lambda: zip_archive(original),
        "textual inversion, newest torch/embeddings.pt": lambda: zip_archive(original, "embeddings", newer=True),
        "textual inversion, torch 1.11/embeddings.pt": lambda: zip_archive(older),
        "textual inversion, torch 1.5/embeddings.pt": lambda: legacy_stream(older),
        "web UI/x.pt": lambda: zip_archive(web),
        "web UI, trained leaf/x.pt": lambda: zip_archive(leaf),
        "web UI, torch 1.5/x.pt": lambda: legacy_stream(web),
        "web UI, text/x.png": lambda: text_picture(a1111_json(word, vectors, step)),
        "web UI, pixels/x.png": lambda: pixel_picture(a1111_json(word, vectors, step)),
        "diffusers/learned_embeds.bin": lambda: zip_archive({word: vectors}),
        "diffusers/learned_embeds.safetensors": lambda: safetensors({word: vectors}, {"format": "pt"}),
        "sd-concepts-library/learned_embeds.bin": lambda: zip_archive({word: row}),
        "kohya/WORD.safetensors": lambda: safetensors({"emb_params": vectors}, {"modelspec.title": "x"}),
        "kohya/WORD.pt": lambda: zip_archive({"emb_params": vectors}),
        "kohya, named/x.safetensors": lambda: safetensors({"emb_params": vectors}, {"placeholder": word}),
        "OneTrainer/WORD.safetensors": lambda: safetensors({"emp_params": vectors}),
        "OneTrainer, output/WORD.safetensors": lambda: safetensors({"emp_params": vectors, "emp_params_out": vectors}),
        "SDXL/WORD.safetensors": lambda: safetensors({"clip_l": vectors, "clip_g": second}),
        "Replicate/WORD.pti": lambda: safetensors({"text_encoders_0": vectors, "text_encoders_1": second}),
        "LoRA bundle/x.safetensors": lambda: safetensors({f"bundle_emb.{word}.clip_l": vectors, "lora_up": second}),
        "ComfyUI bundle/x.safetensors": lambda: safetensors({f"bundle_emb.{word}.string_to_param.*": vectors}),
        "cloneofsimo LoRA/x.safetensors": lambda: safetensors({word: vectors, "up": second}, {word: "<embed>"}),
        "bare tensor/WORD.bin": lambda: zip_archive(vectors),
    }
