"""From what a user names (a file, a folder, nothing) to a model on its device, in the precision asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint import load_model_from_config
from ldm.checkpoint_folder import is_diffusers_folder
from ldm.resources import resource_root
from ldm.util import SLOW_BFLOAT16, emulates_bfloat16

log = logging.getLogger(__name__)

DEFAULT_MODEL = "models/ldm/emoji64"
PRECISIONS = ("full", "autocast", "half")
WEIGHT_FILES = (
    *("model.safetensors", "model.ckpt"),
    *("checkpoints/model.safetensors", "checkpoints/last.ckpt", "last.ckpt"),  # of a run that trained a model
)


def select_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" takes CUDA, then MPS, then the CPU, whichever is there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device '{name}' is unknown; use auto, cpu, cuda, cuda:1 or mps") from error
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type, True):
        raise ValueError(f"device '{name}' is not there on this machine; use --device cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device '{name}' is not there: {torch.cuda.device_count()} CUDA devices were found")
    return device


def low_precision(device: torch.device) -> torch.dtype:
    """The 16-bit type that suits `device`: bfloat16 on the CPU, float16 elsewhere."""
    return torch.bfloat16 if device.type == "cpu" else torch.float16


def weight_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Type of the weights: float32 for "full" and "autocast", 16 bits for "half"."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision '{precision}' is unknown; choose one of {', '.join(PRECISIONS)}")
    return low_precision(device) if precision == "half" else torch.float32


def precision_context(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What to sample in: automatic mixed precision for "autocast", else nothing special."""
    if precision != "autocast":
        weight_dtype(precision, device)  # refuses an unknown word
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=low_precision(device))


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """Where a model's weights are, and its config; without one the weights' keys and shapes choose it."""

    checkpoint: Path
    config: Path | None = None


def find_model_files(path: str | Path | None = None, config: str | Path | None = None) -> ModelFiles:
    """Files of the model that `path` means: a checkpoint file, a model's folder (diffusers' too) or a run directory.

    Without `config`, the `config.yaml` beside the weights or the run directory's own config is taken, if there is
    one. Without `path`, the model that comes with the project. Raises `FileNotFoundError` that says what was sought.
    """
    if path is None:
        if config is not None:
            raise ValueError(f"--config {config} needs the weights too: name them with --ckpt_path")
        folder = resource_root() / DEFAULT_MODEL
        if not (folder / WEIGHT_FILES[0]).is_file():
            raise FileNotFoundError(
                f"the model that comes with the project is not at {DEFAULT_MODEL}; name another one with --ckpt_path"
            )
        path = folder
    path = Path(path)
    if config is not None and not Path(config).is_file():
        raise FileNotFoundError(f"no config at {config}")
    if is_diffusers_folder(path):
        return ModelFiles(path, Path(config) if config is not None else None)
    if path.is_dir():
        found = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"no weights in {path}: looked for {', '.join(WEIGHT_FILES)}")
        path = found
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    return ModelFiles(path, Path(config) if config is not None else _config_beside(path))


def _config_beside(checkpoint: Path) -> Path | None:
    """The config that lies with a checkpoint: `config.yaml` in its folder, or that of its run directory."""
    if (checkpoint.parent / "config.yaml").is_file():
        return checkpoint.parent / "config.yaml"
    folder = checkpoint.resolve().parent
    if folder.name != "checkpoints":
        return None
    runs = sorted((folder.parent / "configs").glob("*-project.yaml"))  # named by time: the last is the newest
    return runs[-1] if runs else None


def adjust_model(
    model: Any,
    parameterization: str | None = None,
    zero_terminal_snr: bool = False,
    clip_skip: int | None = None,
) -> None:
    """Use a loaded model otherwise than its config says; the defaults change nothing.

    `parameterization` is what it predicts ("eps", "v", "x0"); `zero_terminal_snr` rescales its schedule so that the
    last step is pure noise; `clip_skip` = n leaves out the last n - 1 layers of those that its text model runs.
    Raises `ValueError` where the model cannot do it.
    """
    if parameterization is not None:
        model.parameterization = parameterization
    if zero_terminal_snr:
        model.rescale_to_zero_terminal_snr()
    if (parameterization or zero_terminal_snr) and model.parameterization == "eps" and model.alphas_cumprod[-1] <= 0:
        raise ValueError(
            "a schedule of zero terminal SNR ends without a signal, from which eps says nothing: use v or x0"
        )
    if clip_skip is not None:
        stage = model.cond_stage_model
        if not hasattr(stage, "clip_skip"):
            raise ValueError(f"clip_skip is for Stable Diffusion's text models, not for {type(stage).__name__}")
        stage.clip_skip = clip_skip


def load_model(
    path: str | Path | None = None,
    config: str | Path | None = None,
    *,
    device: torch.device | str = "auto",
    precision: str = "full",
    size: int | None = None,
) -> Any:
    """The model that `path` means (see `find_model_files`), in eval mode on `device`.

    `size`, the pixels of the pictures asked for, chooses between published models that differ in it alone.
    """
    device = select_device(device) if isinstance(device, str) else device
    files = find_model_files(path, config)
    dtype = weight_dtype(precision, device)
    if precision != "full" and emulates_bfloat16(device):
        log.warning(SLOW_BFLOAT16, f"precision '{precision}'", "'full'")
    return load_model_from_config(
        files.config, files.checkpoint, device=device, dtype=None if precision == "autocast" else dtype, size=size
    )
