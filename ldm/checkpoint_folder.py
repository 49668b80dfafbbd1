"""A Stable Diffusion model in the folder layout of diffusers, seen as one checkpoint under the original names.

Nothing is converted on disk and nothing is copied until a tensor is asked for; the weights are read like any others,
and of the folder's JSON files only the numbers that describe the model are used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint_file import OpenCheckpoint, TensorFile, TensorInfo, open_file
from ldm.checkpoint_formats import AGAIN, CheckpointError, describe_folder
from ldm.checkpoint_names import Place, folder_layout, to_original

COMPONENTS = ("unet", "vae", "text_encoder")
WEIGHT_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
SUFFIXES = (".safetensors", ".bin")
VARIANTS = ("", "fp16", "non_ema")  # which of several files of one component is taken when none is asked for
MAX_JSON_BYTES = 16 << 20


def is_diffusers_folder(path: str | Path) -> bool:
    """Whether `path` is a folder that diffusers wrote for a whole model."""
    path = Path(path)
    return path.is_dir() and (path / "unet" / "config.json").is_file()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no file; raises `CheckpointError` for anything else."""
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes, far more than a config takes")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON file, or a damaged one; {AGAIN}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not a config")
    return found


class DiffusersFolder(OpenCheckpoint):
    """An open folder: `tensors` under their original names and shapes. Use as a context manager, like `TensorFile`.

    variant: which files to take where there are several ("fp16", "non_ema"); default: those without such a word.
    Raises `CheckpointError` when the folder is no Stable Diffusion model or lacks files.
    """

    def __init__(self, path: str | Path, variant: str | None = None) -> None:
        self.path = Path(path)
        self.tree: dict[str, Any] = {}
        self.scalars: dict[str, int | float | str] = {}
        if not is_diffusers_folder(self.path):
            raise CheckpointError(f"{path} is {describe_folder(self.path)}")
        self._files: dict[str, list[TensorFile]] = {}
        try:
            self._open(variant)
        except BaseException:
            self.close()
            raise

    def _open(self, variant: str | None) -> None:
        for component in COMPONENTS:
            self._files[component] = [open_file(p) for p in weight_files(self.path / component, variant)]
        self._source = {
            (component, name): file
            for component, files in self._files.items()
            for file in files
            for name in file.tensors
        }
        names = {component: [n for c, n in self._source if c == component] for component in COMPONENTS}
        text = read_json(self.path / "text_encoder" / "config.json")
        self._places, unknown = to_original(names, folder_layout(names), openclip=text.get("hidden_act") == "gelu")
        if unknown:
            raise CheckpointError(
                f"{self.path} is no Stable Diffusion 1 or 2 model: it has {len(unknown)} tensors that those lack "
                f"({', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''})"
            )
        starts = {id(file): index << 48 for index, file in enumerate(f for fs in self._files.values() for f in fs)}
        self.tensors = {name: self._info(name, place, starts) for name, place in self._places.items()}
        kind = read_json(self.path / "scheduler" / "scheduler_config.json").get("prediction_type")
        self.scalars = {"prediction_type": kind} if isinstance(kind, str) else {}

    def close(self) -> None:
        """Close the files; tensors that were read stay valid."""
        for files in self._files.values():
            for file in files:
                file.close()

    def read(self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Tensor:
        """Tensor `name` under its original shape: mapped from its file where nothing is converted or joined."""
        info, parts = self.tensors[name], self._parts(name)
        if len(parts) == 1:
            file, stored = parts[0]
            return file.read(stored, dtype, device).reshape(info.shape)
        out = torch.empty(info.shape, dtype=dtype or getattr(torch, info.dtype), device=device)
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: Tensor) -> None:
        """Copy tensor `name` into `out`, which has as many items, converting dtype and device on the way."""
        parts = self._parts(name)
        for piece, (file, stored) in zip(out.chunk(len(parts)), parts, strict=True):
            file.read_into(stored, piece)

    def _parts(self, name: str) -> list[tuple[TensorFile, str]]:
        component, stored = self._places[name]
        return [(self._source[component, part], part) for part in stored]

    def _info(self, name: str, place: Place, starts: dict[int, int]) -> TensorInfo:
        component, stored = place
        missing = [part for part in stored if (component, part) not in self._source]
        if missing:
            raise CheckpointError(f"{self.path / component} lacks {missing[0]}; {AGAIN}")
        parts = [(file := self._source[component, part]).tensors[part] for part in stored]
        first = parts[0]
        if any(p.shape != first.shape or p.dtype != first.dtype or not p.shape for p in parts[1:]):
            raise CheckpointError(f"{self.path / component} has different types or shapes in {', '.join(stored)}")
        shape = (len(parts) * first.shape[0], *first.shape[1:]) if len(parts) > 1 else first.shape
        if ".mid.attn_1." in name and len(shape) == 2:
            shape = (*shape, 1, 1)  # the original attention of the first stage is made of 1 x 1 convolutions
        return TensorInfo.packed(first.dtype, shape, starts[id(file)] + first.start)


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The files with the weights of one component, safetensors before pickles, one file or the parts of one."""
    stem = WEIGHT_STEMS[folder.name]
    for word in VARIANTS if variant is None else (variant,):
        for suffix in SUFFIXES:
            # transformers calls its pickles otherwise
            name = "pytorch_model" if (folder.name, suffix) == ("text_encoder", ".bin") else stem
            dotted = f".{word}" if word else ""
            if (folder / f"{name}{dotted}{suffix}").is_file():
                return [folder / f"{name}{dotted}{suffix}"]
            index = folder / f"{name}{suffix}.index{dotted}.json"
            if index.is_file():
                return _sharded(index)
    files = sorted(p.name for p in folder.glob("*") if p.suffix in SUFFIXES) if folder.is_dir() else []
    asked = f" of variant '{variant}'" if variant else ""
    raise CheckpointError(f"{folder} has no weights{asked}; found {', '.join(files) or 'no file of weights'}")


def _sharded(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    listed = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not listed or any(not isinstance(name, str) or Path(name).name != name for name in listed):
        raise CheckpointError(f"{index} does not list files beside it")
    names = set(listed)
    missing = sorted(name for name in names if not (index.parent / name).is_file())
    if missing:
        raise CheckpointError(f"{index.parent} lacks {missing[0]}, one of {len(names)} parts; {AGAIN}")
    return [index.parent / name for name in sorted(names)]
