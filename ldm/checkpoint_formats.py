"""What the bytes of a checkpoint file mean: where each tensor lies in safetensors, torch.save zips and older streams.

A file's format follows from its bytes, not from its suffix; anything else gets a `CheckpointError` that says what the
file seems to be instead. Every size that a file claims is checked against what it has.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from ldm.checkpoint_pickle import (
    ITEM_SIZES,
    MAX_PICKLE_BYTES,
    BrokenPickleError,
    PickledObject,
    StorageRef,
    TensorMeta,
    read_pickle,
)

MAX_HEADER_BYTES = 100 << 20  # the same limit as the safetensors library's
MAX_NAME = 1000  # characters of a weight's name, about
_SAFETENSORS_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "BOOL": "bool"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
}
_LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa85019")
_OTHER_KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with 'git lfs pull'"),
    (b"\x89PNG", "a PNG picture, not a checkpoint"),
    (b"\xff\xd8\xff", "a JPEG picture, not a checkpoint"),
    (b"\x1f\x8b", "compressed with gzip; unpack it first"),
    (b"7z\xbc\xaf", "compressed with 7-Zip; unpack it first"),
    (b"GGUF", "a GGUF file, which only llama.cpp and its relatives read; use .ckpt or .safetensors"),
    (b"\x89HDF", "an HDF5 file (Keras?); use .ckpt or .safetensors"),
    (b"%PDF", "a PDF document, not a checkpoint"),
)
AGAIN = "download or copy it again"


class CheckpointError(ValueError):
    """A file is no usable checkpoint, or not one for this model; the message names the file and the remedy."""


def read_index(file: io.BufferedReader, size: int) -> tuple[Any, dict[str, int]]:
    """The file's nested contents with a `TensorMeta` for each tensor, and the first byte of each storage."""
    head = file.read(512)
    file.seek(0)
    if not head:
        raise CheckpointError(f"is empty (0 bytes); {AGAIN}")
    for magic, kind in _OTHER_KINDS:
        if head.startswith(magic):
            raise CheckpointError(f"is {kind}")
    if head.startswith(b"PK"):
        return _read_zip(file, size)
    if head[2:14] == _LEGACY_MAGIC:
        return _read_legacy(file, size)
    if head[8:9] == b"{" and not _is_text(head):
        return _read_safetensors(file, size)
    raise CheckpointError(_describe_stranger(file, head, size))


def _read_safetensors(file: io.BufferedReader, size: int) -> tuple[Any, dict[str, int]]:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"is no safetensors file, or a damaged one: it claims a header of {length:,} bytes; {AGAIN}"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"is cut off: its header should take {length:,} bytes, the file has {size:,} in all; {AGAIN}"
        )
    try:
        header = json.loads(file.read(length))
        rows = {k: v for k, v in header.items() if k != "__metadata__"}
        tree: dict[str, Any] = {}
        starts: dict[str, int] = {}
        for name, row in rows.items():
            tree[name], starts[name] = _safetensors_row(name, row, 8 + length)
        kind = (header.get("__metadata__") or {}).get("prediction_type")
        if isinstance(kind, str):
            tree.setdefault("prediction_type", kind)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"is a damaged safetensors file: its header cannot be read; {AGAIN}") from error
    end = max((starts[name] + row["data_offsets"][1] - row["data_offsets"][0] for name, row in rows.items()), default=0)
    if end > size:
        raise CheckpointError(f"is cut off: its header promises {end:,} bytes, the file has {size:,}; {AGAIN}")
    return tree, starts


def _safetensors_row(name: str, row: dict[str, Any], data: int) -> tuple[TensorMeta, int]:
    dtype = _SAFETENSORS_DTYPES[row["dtype"]]
    shape, (begin, end) = tuple(row["shape"]), row["data_offsets"]
    numbers = (*shape, begin, end)
    if any(type(n) is not int or not 0 <= n < 1 << 62 for n in numbers) or len(shape) > 64:
        raise ValueError(name)
    if end - begin != math.prod(shape) * ITEM_SIZES[dtype]:
        raise ValueError(name)
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return TensorMeta(StorageRef(dtype, name, math.prod(shape)), dtype, 0, shape, stride), data + begin


def _read_zip(file: io.BufferedReader, size: int) -> tuple[Any, dict[str, int]]:
    try:
        with zipfile.ZipFile(file) as archive:
            records = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, struct.error) as error:
        raise CheckpointError(f"is cut off or damaged: the archive's table of contents is missing; {AGAIN}") from error
    index = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1] or [""]
    root = index[0].removesuffix("data.pkl")
    if not index[0] or len(index) > 1:
        raise CheckpointError("is a zip archive that torch.save did not write")
    if _record(file, records, f"{root}byteorder", size, limit=16) == b"big":
        raise CheckpointError("was written on a big-endian machine; convert it to safetensors there")
    pickled = _record(file, records, index[0], size, limit=MAX_PICKLE_BYTES)
    tree = read_pickle(_Window(io.BytesIO(pickled), len(pickled)))
    starts = {}
    for ref in _storages(tree):
        name = f"{root}data/{ref.key}"
        start, length = _locate(file, records.get(name), size)
        if length < ref.numel * ITEM_SIZES[ref.dtype]:
            raise CheckpointError(f"is damaged: record {name} is missing or too short; {AGAIN}")
        starts[ref.key] = start
    is_program = isinstance(tree, PickledObject) and tree.type.startswith("__torch__.")
    return _weights_of_program(tree) if is_program else tree, starts


def _weights_of_program(tree: PickledObject) -> dict[str, TensorMeta]:
    """{dotted name: tensor} of the modules of a TorchScript program."""
    weights: dict[str, TensorMeta] = {}
    todo: list[tuple[str, Any]] = [("", tree)]
    seen: set[int] = set()
    while todo:
        prefix, node = todo.pop()
        if not isinstance(node.state, dict) or id(node) in seen:
            continue
        seen.add(id(node))
        for name, value in node.state.items():
            if isinstance(value, TensorMeta):
                weights[f"{prefix}{name}"] = value
            elif isinstance(value, PickledObject) and len(prefix) < MAX_NAME:
                todo.append((f"{prefix}{name}.", value))
    return weights


def _locate(file: io.BufferedReader, record: zipfile.ZipInfo | None, size: int) -> tuple[int, int]:
    """First byte and length of a record of the archive; length -1 if it is missing."""
    if record is None:
        return 0, -1
    if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
        raise CheckpointError("was packed again by another program (compressed or encrypted records); unpack it first")
    file.seek(min(max(record.header_offset, 0), size))
    local = file.read(30)
    if record.header_offset < 0 or len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise CheckpointError(f"is damaged: record {record.filename} is not where it should be; {AGAIN}")
    start = record.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
    if start + record.file_size > size:
        raise CheckpointError(f"is cut off in record {record.filename}; {AGAIN}")
    return start, record.file_size


def _record(file: io.BufferedReader, records: dict[str, zipfile.ZipInfo], name: str, size: int, *, limit: int) -> bytes:
    start, length = _locate(file, records.get(name), size)
    if length > limit:
        raise CheckpointError(f"is no checkpoint, or a damaged one: its record {name} takes {length:,} bytes")
    file.seek(start)
    return file.read(max(length, 0))


def _read_legacy(file: io.BufferedReader, size: int) -> tuple[Any, dict[str, int]]:
    """The stream of torch before 1.6: magic, version, system, contents, storage keys (pickles), then the storages."""
    window = _Window(file, MAX_PICKLE_BYTES)
    _, version, system, tree, keys = (read_pickle(window) for _ in range(5))
    if version != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError("was written by an unknown version of torch or on a big-endian machine")
    by_key = {ref.key: ref for ref in _storages(tree)}
    starts: dict[str, int] = {}
    position = file.tell()
    for key in keys if isinstance(keys, list) else ():
        file.seek(position)
        head = file.read(8)
        if len(head) < 8 or not isinstance(key, str) or key not in by_key:
            raise CheckpointError(f"is cut off or damaged before storage {key}; {AGAIN}")
        (numel,) = struct.unpack("<q", head)
        starts[key] = position + 8
        position += 8 + numel * ITEM_SIZES[by_key[key].dtype]
        if numel < by_key[key].numel or position > size:
            raise CheckpointError(
                f"is cut off: its storages end after byte {position:,}, the file has {size:,}; {AGAIN}"
            )
    if set(starts) != set(by_key):
        raise CheckpointError(f"is damaged: {len(by_key) - len(starts)} of its storages are missing; {AGAIN}")
    return tree, starts


def _storages(tree: Any) -> list[StorageRef]:
    """Every storage that a tensor of `tree` lies in."""
    found: dict[str, StorageRef] = {}
    seen: set[int] = set()
    todo = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, TensorMeta):
            other = found.setdefault(node.storage.key, node.storage)
            if other != node.storage:
                raise BrokenPickleError(f"its tensors disagree about storage {node.storage.key}")
        if id(node) in seen:
            continue
        seen.add(id(node))
        todo.extend(_children(node))
    return list(found.values())


def _children(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return list(node.values())
    if isinstance(node, (list, tuple)):
        return list(node)
    if isinstance(node, PickledObject):
        return [node.args, node.state, node.items]
    return []


def _is_text(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the head may end within a character
    except UnicodeDecodeError:
        return False
    return not set(head) & (set(range(32)) - set(b"\t\n\r\f\x1b"))


def _describe_stranger(file: io.BufferedReader, head: bytes, size: int) -> str:
    lowered = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if lowered.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page, not a checkpoint: the link led to a log-in or licence page; download the file itself"
    try:
        read_pickle(_Window(file, min(size, MAX_PICKLE_BYTES)))
        return "is a plain Python pickle without tensors, not a checkpoint"
    except BrokenPickleError:
        pass
    if _is_text(head):
        start = head[:40].decode("utf-8", "replace").splitlines()[:1]
        return f"is a text file (it begins {(start or [''])[0]!r}), not a checkpoint"
    if head[:1] == b"\x80":
        return f"is a damaged or cut-off pickle; {AGAIN}"
    return f"is neither a torch.save file nor safetensors, or it is damaged; {AGAIN}"


def describe_folder(path: Path) -> str:
    """What a folder given in place of a file is, and what to name instead."""
    if (path / "model_index.json").exists():
        return "a diffusers folder without unet/config.json, so none of Stable Diffusion; name a checkpoint file"
    files = sorted(p.name for p in path.glob("*") if p.suffix in (".ckpt", ".pt", ".pth", ".bin", ".safetensors"))
    return f"a folder; name the file{': ' + ', '.join(files[:5]) if files else ''}"


class _Window:
    """A stream that refuses to read past `limit` bytes, whatever sizes the file claims."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file = file
        self._left = limit

    def read(self, size: int, /) -> bytes:
        if size < 0 or size > self._left:
            raise BrokenPickleError("its index claims more bytes than it has")
        return self._count(self._file.read(size))

    def readline(self) -> bytes:
        return self._count(self._file.readline(self._left + 1))

    def _count(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise BrokenPickleError(f"its index is larger than {MAX_PICKLE_BYTES:,} bytes")
        return data
