"""Opening whatever a user names as a checkpoint: a file, or a diffusers folder, under the same view."""

from __future__ import annotations

from pathlib import Path

from ldm.checkpoint_file import TensorFile, open_file
from ldm.checkpoint_folder import DiffusersFolder, is_diffusers_folder

Checkpoint = TensorFile | DiffusersFolder


def open_checkpoint(path: str | Path, variant: str | None = None) -> Checkpoint:
    """Open a `.ckpt`, `.pt`, `.bin` or `.safetensors` file or a diffusers folder; runs nothing that it contains.

    `variant` chooses among the files of a folder, see `DiffusersFolder`. Only indices are read yet. Raises
    `FileNotFoundError` when there is none, `CheckpointError` when it is no whole and harmless checkpoint.
    """
    return DiffusersFolder(path, variant) if is_diffusers_folder(path) else open_file(path)
