"""One view of every checkpoint file: names, dtypes and shapes from its index, and tensors read one at a time."""

from __future__ import annotations

import io
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from ldm.checkpoint_formats import AGAIN, CheckpointError, describe_folder, read_index
from ldm.checkpoint_pickle import ITEM_SIZES, BrokenPickleError, TensorMeta, UnsafePickleError

CHUNK_BYTES = 8 << 20  # converting piece by piece keeps the peak at the result plus this
_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "module", "params_ema", "params", "weights")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor's bytes lie: `start` counts bytes of the file, `stride` counts items."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    @classmethod
    def packed(cls, dtype: str, shape: tuple[int, ...], start: int) -> TensorInfo:
        """Where a tensor lies whose items follow one another in C order."""
        return cls(dtype, shape, tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))), start)

    @property
    def span(self) -> int:
        """Bytes from the first to the last item."""
        if 0 in self.shape:
            return 0
        last = sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        return (last + 1) * ITEM_SIZES[self.dtype]

    @property
    def contiguous(self) -> bool:
        """Whether the items lie in the file one after the other in C order."""
        dims = [(n, s) for n, s in zip(self.shape, self.stride, strict=True) if n != 1]
        return all(s == math.prod(n for n, _ in dims[i + 1 :]) for i, (_, s) in enumerate(dims))


class OpenCheckpoint:
    """What is closed at the end of a `with` block."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; tensors that were read stay valid."""
        raise NotImplementedError


class TensorFile(OpenCheckpoint):
    """An open checkpoint: `tensors` from its index (nothing else is read yet), `scalars` such as `global_step`.

    Use as a context manager. Mapped tensors stay valid after the file is closed.
    """

    def __init__(self, path: Path, file: BinaryIO, tree: Any, starts: Mapping[str, int]) -> None:
        self.path = path
        self._file = file
        self._starts = starts
        self._mapping: mmap.mmap | None = None
        self._staging: Tensor | None = None
        self.tree = tree
        self.tensors = {name: self._info(meta) for name, meta in _find_state_dict(tree).items()}
        top = tree if isinstance(tree, dict) else {}
        self.scalars = {k: v for k, v in top.items() if isinstance(k, str) and isinstance(v, (int, float, str))}

    def close(self) -> None:
        """Close the file; mapped tensors stay valid."""
        self._file.close()

    def read(self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Tensor:
        """Tensor `name`: mapped from the file if neither dtype nor device differs, else converted piece by piece."""
        info = self.tensors[name]
        stored: torch.dtype = getattr(torch, info.dtype)
        dtype = dtype or stored
        aligned = info.start % ITEM_SIZES[info.dtype] == 0
        if dtype == stored and torch.device(device).type == "cpu" and aligned and info.span:
            mapped = self._mapped(info)
            if mapped is not None:
                return mapped
        out = torch.empty(info.shape, dtype=dtype, device=device)
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: Tensor) -> None:
        """Copy tensor `name` into `out`, which has as many items, converting dtype and device on the way."""
        info = self.tensors[name]
        stored: torch.dtype = getattr(torch, info.dtype)
        with torch.no_grad():
            if not info.span:
                return
            if not (info.contiguous and out.is_contiguous()):
                raw = torch.empty(info.span, dtype=torch.uint8)
                self._fill(info.start, raw)
                out.copy_(raw.view(stored).as_strided(info.shape, info.stride).reshape(out.shape))
                return
            if self._staging is None:
                self._staging = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
            flat, item = out.view(-1), ITEM_SIZES[info.dtype]
            for begin in range(0, info.span, CHUNK_BYTES):
                piece = self._staging[: min(CHUNK_BYTES, info.span - begin)]
                self._fill(info.start + begin, piece)
                flat[begin // item : (begin + len(piece)) // item].copy_(piece.view(stored))

    def _info(self, meta: TensorMeta) -> TensorInfo:
        start = self._starts[meta.storage.key] + meta.offset * ITEM_SIZES[meta.dtype]
        return TensorInfo(meta.dtype, meta.shape, meta.stride, start)

    def _fill(self, start: int, out: Tensor) -> None:
        view = memoryview(out.numpy())  # type: ignore[arg-type]
        self._file.seek(start)
        while view:
            count = self._file.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(f"{self.path} became shorter while it was read; {AGAIN}")
            view = view[count:]

    def _mapped(self, info: TensorInfo) -> Tensor | None:
        if self._mapping is None:
            try:
                self._mapping = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
            except OSError:  # some network file systems and strict memory accounting refuse; plain reads still work
                return None
        raw = torch.frombuffer(self._mapping, dtype=torch.uint8, count=info.span, offset=info.start)
        return raw.view(getattr(torch, info.dtype)).as_strided(info.shape, info.stride)


def open_file(path: str | Path) -> TensorFile:
    """Open a `.ckpt`, `.pt`, `.pth`, `.bin` or `.safetensors` file and read its index; runs nothing that it contains.

    Raises `FileNotFoundError` when there is none, `CheckpointError` when it is no whole and harmless checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is {describe_folder(path)}")
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    file = path.open("rb", buffering=0)
    try:
        tree, starts = read_index(io.BufferedReader(file, 1 << 16), path.stat().st_size)
        return TensorFile(path, path.open("rb", buffering=0), tree, starts)
    except UnsafePickleError as error:
        raise CheckpointError(f"{path} is a pickle that would run code: {error}; do not trust this file") from error
    except BrokenPickleError as error:
        raise CheckpointError(f"{path} is damaged: {error}; {AGAIN}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error
    finally:
        file.close()


def _find_state_dict(tree: Any) -> dict[str, TensorMeta]:
    """The flat {name: tensor} part of a checkpoint: at the top, or under one of the usual keys."""
    for _ in range(4):
        if not isinstance(tree, dict):
            break
        if "state_dict" not in tree:
            flat = {k: v for k, v in tree.items() if isinstance(k, str) and isinstance(v, TensorMeta)}
            if flat:
                return flat
        tree = next((tree[k] for k in _STATE_DICT_KEYS if isinstance(tree.get(k), dict)), None)
    return {}
