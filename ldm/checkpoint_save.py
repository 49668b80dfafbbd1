"""Writing files so that a crash, a kill or a full disk leaves the earlier file as it was."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ldm.checkpoint_formats import CheckpointError

_FULL = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG")}


class SaveError(CheckpointError, OSError):
    """A file could not be written; an earlier file of that name is intact."""


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give the block a temporary path beside `path`, and move what it wrote to `path` once it is safely on disk.

    If the block fails, the temporary file is removed and `path` stays as it was; a full disk, a missing permission
    and the like become a `SaveError`.
    """
    path = Path(path)
    target = path.resolve()  # a symbolic link stays one
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        name = target.name.encode(errors="ignore")[:200].decode(errors="ignore")  # file systems allow 255 bytes
        temporary = target.with_name(f".{name}.{uuid.uuid4().hex[:8]}.tmp")
        temporary.touch(exist_ok=False)
        mode = (target if target.exists() else temporary).stat().st_mode & 0o777  # some writers make private files
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(target)
        _sync_folder(target.parent)
    except OSError as error:
        raise _save_error(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def save_safely(obj: Any, path: str | Path) -> None:
    """`torch.save` that never leaves half a file: the new one replaces the old one when it is complete.

    Raises `SaveError` with one sentence when it cannot be written; the earlier file is then intact.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        guarded = _Guarded(file)
        try:
            torch.save(obj, guarded)  # type: ignore[arg-type]
        finally:
            if guarded.error is not None:  # torch's archive writer would hide the reason behind its own error
                raise guarded.error


def save_safetensors(
    tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as a `.safetensors` file, as safely as `save_safely`; tensors that share memory are copied."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        try:
            save_file(_unshared(tensors), temporary, metadata=dict(metadata) if metadata else {"format": "pt"})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        result[name] = tensor.detach() if whole else tensor.detach().clone(memory_format=torch.contiguous_format)
    return result


class _Guarded:
    """A file for `torch.save` that remembers why a write failed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is not None:  # the archive writer goes on to its table of contents; let it
            return len(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            return len(data)

    def flush(self) -> None:
        if self.error is None:
            self._file.flush()


def _save_error(path: Path, error: OSError) -> SaveError:
    if error.errno in _FULL:
        reason = "the disk is full (or its quota used up); free some space and save again"
    else:
        reason = error.strerror or str(error)
    kept = "the earlier file is intact" if path.exists() else "no file was left there"
    return SaveError(f"could not write {path}: {reason}; {kept}")


def _sync_folder(folder: Path) -> None:
    """Make the new name itself durable, where the system lets folders be opened (not on Windows)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
