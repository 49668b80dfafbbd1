"""Loading published and own checkpoints into models: safely, with little memory, and with a report of what fitted.

Reading never runs anything that a file contains (see `checkpoint_pickle`), touches one tensor at a time, and shares
memory with the file where no conversion is asked for. Saving is in `checkpoint_save`, recognition of the model from
keys and shapes in `checkpoint_recognise`; their public names are here too.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint_folder import is_diffusers_folder
from ldm.checkpoint_folder_config import config_of_folder
from ldm.checkpoint_formats import CheckpointError
from ldm.checkpoint_load import BUILD, BuildOptions, LoadReport, as_floating, is_optional, load_weights, some
from ldm.checkpoint_open import open_checkpoint
from ldm.checkpoint_recognise import ModelInfo, recognise, recognise_file, recognise_shapes
from ldm.checkpoint_save import atomic_path, save_safely, save_safetensors
from ldm.util import ConfigError, instantiate_from_config, read_yaml, to_plain

__all__ = [
    "CheckpointError",
    "LoadReport",
    "ModelInfo",
    "atomic_path",
    "load_model_from_config",
    "load_weights",
    "model_config_for",
    "open_checkpoint",
    "read_state_dict",
    "recognise",
    "recognise_shapes",
    "save_safely",
    "save_safetensors",
]

logger = logging.getLogger(__name__)

# Parameters of at least this many items wait for the file instead of being initialised: a learned word is smaller.
DEFERRED_NUMEL = 1 << 17


def read_state_dict(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Read the state dict of a checkpoint file, nested or flat; floating-point tensors as `dtype` if one is given.

    A diffusers folder's tensors come under their original names.
    Tensors that need no conversion are mapped from the file: they take memory only where they are used, and share it.
    Raises `FileNotFoundError`, or `CheckpointError` when the file is no whole and harmless checkpoint.
    """
    with open_checkpoint(path) as file:
        if not file.tensors:
            raise CheckpointError(f"{path} has no state dict: it {recognise_file(file).sentence}")
        return {name: file.read(name, as_floating(info.dtype, dtype), device) for name, info in file.tensors.items()}


def load_model_from_config(
    config: Any = None,
    ckpt_path: str | Path | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    use_ema_weights: bool = False,
    size: int | None = None,
) -> nn.Module:
    """Build the model of a config with the weights of a checkpoint file, in eval mode, near the file's size of memory.

    `config` is a YAML file's path, a config with a `model` key, or the model's own `{target, params}`; without one the
    checkpoint's keys and shapes, or a folder's own configs, choose it (`size`, in pixels, helps where they cannot).
    `dtype` converts floating-point weights; the noise schedule stays float32. Raises `CheckpointError` when the file
    does not belong to the config or lacks weights.
    """
    model_config = model_config_for(config, ckpt_path, size)
    params = model_config.setdefault("params", {})
    path = ckpt_path or params.get("ckpt_path")
    if path is None:
        logger.warning("%s is built with random weights: no checkpoint was given", model_config.get("target"))
        model = instantiate_from_config(model_config)
    else:
        # The one file has all the parts, so the configs' own files for the parts are not needed.
        params = _without_ckpt_paths(params)
        with _waiting_for_weights(BuildOptions(dtype, device, use_ema_weights)):
            model = instantiate_from_config({**model_config, "params": {**params, "ckpt_path": str(path)}})
        _check_complete(model, path)
    _convert_rest(model, dtype)
    return model.to(device).eval()


def model_config_for(config: Any, ckpt_path: str | Path | None, size: int | None) -> dict[str, Any]:
    """The model's `{target, params}` from any form of config, or from the checkpoint itself where there is none."""
    if config is None:
        if ckpt_path is None:
            raise ConfigError("neither a config nor a checkpoint is given")
        config = _config_for(ckpt_path, size)
    if isinstance(config, (str, Path)):
        config = read_yaml(config)
    config = to_plain(config)
    config = config.get("model", config) if isinstance(config, Mapping) else config
    if not isinstance(config, Mapping):
        raise ConfigError(f"expected a config with a 'model' key, got: {config!r}")
    return {**config, "params": dict(config.get("params") or {})}


def _config_for(ckpt_path: str | Path, size: int | None) -> Path | dict[str, Any]:
    """What a checkpoint says itself about its config: a folder all of it, a file its keys and shapes."""
    if is_diffusers_folder(ckpt_path):
        return config_of_folder(ckpt_path)
    info = recognise(ckpt_path, size)
    logger.info("%s %s", ckpt_path, info.sentence)
    return info.require_config()


def _without_ckpt_paths(config: Any) -> Any:
    if isinstance(config, Mapping):
        return {k: _without_ckpt_paths(v) for k, v in config.items() if k != "ckpt_path"}
    return config


@contextlib.contextmanager
def _waiting_for_weights(options: BuildOptions) -> Iterator[None]:
    """Leave large parameters of modules built inside unallocated (meta device); `load_weights` puts the file's there.

    Buffers and small parameters are built for real, so schedules, masks and learned words keep their values.
    """

    def defer(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        del module, name
        if parameter is None or parameter.is_meta or parameter.numel() < DEFERRED_NUMEL:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    token = BUILD.set(options)
    handle = nn.modules.module.register_module_parameter_registration_hook(defer)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
        BUILD.reset(token)


def _check_complete(model: nn.Module, path: str | Path) -> None:
    """Initialise optional parts that the file lacks (losses); refuse a model whose weights proper are missing."""
    lacking = [name for name, p in (*model.named_parameters(), *model.named_buffers()) if p.is_meta]
    weights = [name for name in lacking if not is_optional(name)]
    if weights:
        raise CheckpointError(
            f"{path} lacks {len(weights)} tensors of the model{some(weights)}; it {recognise(path).sentence}"
        )
    for name in lacking:
        _initialise(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])


def _initialise(owner: nn.Module, attribute: str) -> None:
    tensor = getattr(owner, attribute)
    new = torch.zeros(tensor.shape, dtype=tensor.dtype)
    if not isinstance(tensor, nn.Parameter):
        owner._buffers[attribute] = new
        return
    owner._parameters[attribute] = nn.Parameter(new, requires_grad=tensor.requires_grad)
    if isinstance(owner, (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)):
        owner.reset_parameters()


def _convert_rest(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Give buffers inside the parts, such as attention masks, the type of the weights beside them."""
    if dtype is None:
        return
    for owner in list(model.modules())[1:]:
        for name, buffer in owner._buffers.items():
            if buffer is not None and buffer.is_floating_point() and buffer.dim() > 0:
                owner._buffers[name] = buffer.to(dtype)
