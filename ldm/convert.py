"""Stable Diffusion checkpoints from one layout to another: original files and diffusers folders."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint import CheckpointError, atomic_path, model_config_for, save_safely, save_safetensors
from ldm.checkpoint_folder import WEIGHT_STEMS
from ldm.checkpoint_folder_config import folder_configs, text_layers
from ldm.checkpoint_load import as_floating
from ldm.checkpoint_names import Place, original_layout, to_folder
from ldm.checkpoint_open import Checkpoint, open_checkpoint
from ldm.modules.encoders.clip_tokenizer import END_TOKEN_ID, SPECIAL_TOKENS, START_TOKEN_ID, read_vocabulary

logger = logging.getLogger(__name__)

WEIGHTS = ("live", "ema", "both")
FILE_SUFFIXES = (".ckpt", ".safetensors")
LAYOUT_VERSION = "0.20.0"  # of diffusers, whose layout this is; its inpainting pipeline asks
INPAINTING = "LatentInpaintDiffusion"


def convert(
    source: str | Path,
    target: str | Path,
    *,
    weights: str = "live",
    dtype: torch.dtype | None = None,
    config: str | Path | None = None,
    size: int | None = None,
    variant: str | None = None,
) -> Path:
    """Write the model `source` (file or diffusers folder) to `target`: `.ckpt`, `.safetensors`, or else a folder.

    | option | meaning |
    |---|---|
    | `weights` | of a file with averages: "live" writes the last ones, "ema" the averages in their place, "both" both |
    | `dtype` | type of the floating-point weights (default: as they are) |
    | `config` | the model's YAML, for a folder (default: found from the keys and shapes) |
    | `size` | side of the pictures in pixels, which can decide between configs and is a folder's default size |
    | `variant` | which files of a source folder to take, such as "fp16" |

    Tensors are read one at a time; with `dtype` they are all in memory once, converted. What has no place in a folder
    (schedule buffers, discriminators, averages) is left out, with a notice. Raises `CheckpointError`.
    """
    source, target = Path(source), Path(target)
    if weights not in WEIGHTS:
        raise CheckpointError(f"weights '{weights}' is unknown; choose one of {', '.join(WEIGHTS)}")
    to_file = target.suffix in FILE_SUFFIXES
    if target.exists():
        raise CheckpointError(f"{target} is already there: name a new {'file' if to_file else 'folder'}")
    if weights == "both" and not to_file:
        raise CheckpointError("a diffusers folder holds one set of weights: choose live or ema")
    with open_checkpoint(source, variant) as file:
        names = chosen_names(file, weights)
        if not names:
            raise CheckpointError(f"{source} holds no weights of a model, so there is nothing to convert")
        if to_file:
            _write_file(file, names, dtype, target)
        else:
            model = model_config_for(config, source, size)
            _write_folder(file, names, dtype, target, model, size)
    return target


def chosen_names(file: Checkpoint, weights: str) -> dict[str, str]:
    """{name to write: name to read} for a choice of `WEIGHTS`."""
    averages = {name for name in file.tensors if name.startswith("model_ema.")}
    if weights == "both":
        return {name: name for name in file.tensors}
    names = {name: name for name in file.tensors if name not in averages}
    if weights == "live":
        return names
    found = {name: "model_ema." + name.removeprefix("model.").replace(".", "") for name in names}
    found = {name: average for name, average in found.items() if average in averages}
    if not found:
        raise CheckpointError(f"{file.path} holds no averaged weights (model_ema.*): convert its live ones")
    return names | found


def _read(file: Checkpoint, name: str, dtype: torch.dtype | None) -> Tensor:
    return file.read(name, as_floating(file.tensors[name].dtype, dtype))


def _write_file(file: Checkpoint, names: Mapping[str, str], dtype: torch.dtype | None, target: Path) -> None:
    schedule = {name for name in names if "." not in name}  # betas and the like stay exact
    tensors = {name: _read(file, stored, None if name in schedule else dtype) for name, stored in names.items()}
    kind = file.scalars.get("prediction_type")
    said = {"prediction_type": kind} if isinstance(kind, str) else {}  # without it a reader takes eps
    if target.suffix == ".safetensors":
        save_safetensors(tensors, target, {"format": "pt", **said})
        return
    step = file.scalars.get("global_step")
    save_safely({"state_dict": tensors, **({"global_step": step} if isinstance(step, int) else {}), **said}, target)


def _write_folder(
    file: Checkpoint,
    names: Mapping[str, str],
    dtype: torch.dtype | None,
    target: Path,
    model: Mapping[str, Any],
    size: int | None,
) -> None:
    configs = folder_configs(dict(model), size)
    places = to_folder(names, original_layout(names, text_layers(dict(model))))
    left_out = sorted(name for name in names if name not in places)
    if left_out:
        logger.info("%d tensors have no place in a folder (%s, ...)", len(left_out), ", ".join(left_out[:3]))
    lacking = {"unet", "vae", "text_encoder"} - {component for component, _ in places.values()}
    if lacking:
        raise CheckpointError(f"{file.path} has no weights for {', '.join(sorted(lacking))}: is it a whole model?")
    with _new_folder(target) as folder:
        for component, stem in WEIGHT_STEMS.items():
            tensors = _component(file, names, places, component, dtype)
            save_safetensors(tensors, folder / component / f"{stem}.safetensors")
            _write_json(folder / component / "config.json", configs[component])
        _write_json(folder / "scheduler" / "scheduler_config.json", configs["scheduler"])
        openclip = configs["text_encoder"]["hidden_act"] == "gelu"
        length = configs["text_encoder"]["max_position_embeddings"]
        write_tokenizer(folder / "tokenizer", "!" if openclip else SPECIAL_TOKENS[1], length)
        inpaints = str(model["target"]).endswith(INPAINTING)
        _write_json(folder / "model_index.json", _model_index(inpaints, configs["scheduler"]["_class_name"]))


def _component(
    file: Checkpoint, names: Mapping[str, str], places: Mapping[str, Place], component: str, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The tensors of one component under diffusers' names."""
    tensors: dict[str, Tensor] = {}
    for name, (owner, there) in places.items():
        if owner != component:
            continue
        tensor = _read(file, names[name], dtype)
        if ".mid.attn_1." in name and tensor.dim() == 4:
            tensor = tensor[:, :, 0, 0]  # 1 x 1 convolutions are linear layers there
        tensors |= dict(zip(there, tensor.chunk(len(there)), strict=True))
    return tensors


def write_tokenizer(folder: Path, pad_token: str, length: int) -> None:
    """Write CLIP's vocabulary and merges as transformers' CLIPTokenizer reads them."""
    symbols, merges = read_vocabulary()
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    vocab |= dict(zip(SPECIAL_TOKENS, (START_TOKEN_ID, END_TOKEN_ID), strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    start, end = SPECIAL_TOKENS
    special = {"bos_token": start, "eos_token": end, "pad_token": pad_token, "unk_token": end}
    _write_json(folder / "special_tokens_map.json", special)
    options = {"do_lower_case": True, "model_max_length": length, "tokenizer_class": "CLIPTokenizer"}
    _write_json(folder / "tokenizer_config.json", {"add_prefix_space": False, **options, **special})


def _model_index(inpaints: bool, scheduler: str) -> dict[str, Any]:
    return {
        "_diffusers_version": LAYOUT_VERSION,
        "_class_name": f"StableDiffusion{'Inpaint' if inpaints else ''}Pipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(dict(content), indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Give the block a temporary folder beside `target`, which takes its name once the block is done."""
    temporary = target.with_name(f".{target.name[:200]}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
