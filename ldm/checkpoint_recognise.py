"""Telling which model a file holds from the names and shapes in its index.

The shape of a model is summed up in three short strings (`Traits`): its UNet, its first stage and its conditioner.
`checkpoint_models.json` has those of the published models; models that share all three are one row with several
configs.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.checkpoint_folder import is_diffusers_folder
from ldm.checkpoint_formats import CheckpointError, describe_folder
from ldm.checkpoint_open import Checkpoint, open_checkpoint
from ldm.checkpoint_pickle import PickledObject
from ldm.resources import config_path

Shapes = Mapping[str, tuple[int, ...]]

_UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
_FIRST_STAGE_PREFIXES = ("first_stage_model.", "")
_EMBEDDING_KEYS = {"string_to_param", "string_to_token", "emb_params", "emp_params", "clip_l", "clip_g"}


@dataclass(frozen=True)
class Traits:
    """Shape of a model: "" for a part that a file lacks."""

    unet: str = ""
    first_stage: str = ""
    cond_stage: str = ""


@dataclass(frozen=True)
class ModelInfo:
    """Which model a file holds: `config` is the shipped config's name, "" if none fits; `sentence` starts with a verb.

    `others` names configs of the same shape, among which keys and shapes cannot choose.
    """

    name: str
    config: str
    sentence: str
    traits: Traits = Traits()
    others: tuple[str, ...] = ()

    def require_config(self) -> Path:
        """Path of the shipped config, or a `CheckpointError` that says what the file is instead."""
        if not self.config:
            raise CheckpointError(f"no shipped config fits: the file {self.sentence}; name the config yourself")
        return config_path(self.config)


def recognise(source: str | Path | Shapes, size: int | None = None) -> ModelInfo:
    """Which model a checkpoint file (only its index is read), or a mapping of names to shapes, holds.

    Where several published models have the same shape, the picture size that is asked for (`size`, in pixels) or a
    word in the path decides, else the first is taken; the sentence then says so. Raises as `open_checkpoint` for files
    that are no checkpoints.
    """
    if isinstance(source, Mapping):
        return recognise_shapes(source, size=size)
    path = Path(source)
    if path.is_dir() and not is_diffusers_folder(path):
        return ModelInfo("folder", "", f"is {describe_folder(path)}")
    with open_checkpoint(path) as file:
        return recognise_file(file, size)


def recognise_file(file: Checkpoint, size: int | None = None) -> ModelInfo:
    """As `recognise`, for a file that is open already."""
    shapes: Shapes = {name: info.shape for name, info in file.tensors.items()}
    if isinstance(file.tree, PickledObject):
        return ModelInfo("object", "", f"is a pickled {file.tree.type}; save its state_dict() instead")
    if not shapes and isinstance(file.tree, dict):
        shapes = {key: () for key in file.tree if isinstance(key, str)}
    hints = [value for key, value in file.scalars.items() if key == "prediction_type" and isinstance(value, str)]
    return recognise_shapes(shapes, file.path, size, hints)


def recognise_shapes(
    shapes: Shapes, path: Path | None = None, size: int | None = None, hints: Sequence[str] = ()
) -> ModelInfo:
    """As `recognise`, for names and shapes at hand; the rest helps to choose among models of one shape."""
    traits = traits_of(shapes)
    if traits == Traits():
        return _recognise_small(shapes)
    rows = [row for row in _published() if _agrees(traits, row)]
    if not rows:
        return ModelInfo("unknown", "", f"holds {describe(traits)}, which no published config has", traits)
    row = max(rows, key=lambda row: _overlap(traits, row))
    configs: list[str] = row["configs"]
    config, why = _choose(configs, row.get("hints", {}), path, size, hints)
    sentence = f"holds {row['title']}: {describe(traits)}"
    others = tuple(name for name in configs if name != config)
    if others:
        sentence += f"; keys and shapes fit {', '.join(configs)} alike, {config} is taken {why}"
        if row.get("note"):
            sentence += f" ({row['note']})"
    elif config:
        sentence += f"; its config is {config}"
    return ModelInfo(row["name"], config, sentence, traits, others)


def traits_of(shapes: Shapes) -> Traits:
    """Sum up the names and shapes of a state dict."""
    unet = next((p for p in _UNET_PREFIXES if f"{p}input_blocks.0.0.weight" in shapes), None)
    first = next((p for p in _FIRST_STAGE_PREFIXES if f"{p}decoder.conv_in.weight" in shapes), None)
    return Traits(
        "" if unet is None else _unet_traits(_below(shapes, unet)),
        "" if first is None else _first_stage_traits(_below(shapes, first)),
        _cond_stage_traits(_below(shapes, "cond_stage_model.")),
    )


def describe(traits: Traits) -> str:
    """The traits in words."""
    parts = []
    if traits.unet:
        numbers = dict(re.findall(r"(\w+?)=(\d+)", traits.unet))
        words = f"{numbers['in']} to {numbers['out']} channels, width {numbers['width']}"
        words += f", context {numbers['context']}" if numbers["context"] != "0" else ", no cross-attention"
        words += f", {numbers['classes']} classes" if numbers["classes"] != "0" else ""
        parts.append(f"a UNet ({words})")
    if traits.first_stage:
        parts.append(f"a {traits.first_stage.split(' | ')[0]} first stage")
    if traits.cond_stage:
        parts.append(f"a {traits.cond_stage} conditioner")
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)


@functools.cache
def _published() -> list[dict[str, Any]]:
    return json.loads(Path(__file__).with_name("checkpoint_models.json").read_text(encoding="utf-8"))


def _below(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {key[len(prefix) :]: shape for key, shape in shapes.items() if key.startswith(prefix)}


def _dim(shapes: Shapes, key: str, axis: int) -> int:
    shape = shapes.get(key, ())
    return shape[axis] if len(shape) > axis else 0


def _unet_traits(shapes: Shapes) -> str:
    context = next((shape[1] for key, shape in sorted(shapes.items()) if key.endswith("attn2.to_k.weight")), 0)
    blocks = []
    for i in range(1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("input_blocks."))):
        block = _below(shapes, f"input_blocks.{i}.")
        width = next(
            (s[0] for k, s in block.items() if k.endswith(("0.weight", "out_layers.3.weight", "op.weight"))), 0
        )
        depth = len({key.split(".")[2] for key in block if ".transformer_blocks." in key})
        attention = f"t{depth}" if depth else "a" if any(key.startswith("1.") for key in block) else ""
        blocks.append(f"{width}{attention}")
    return (
        f"in={_dim(shapes, 'input_blocks.0.0.weight', 1)} out={_dim(shapes, 'out.2.weight', 0)} "
        f"width={_dim(shapes, 'input_blocks.0.0.weight', 0)} context={context} "
        f"classes={_dim(shapes, 'label_emb.weight', 0)} | {' '.join(blocks)}"
    )


def _first_stage_traits(shapes: Shapes) -> str:
    codes, width = (_dim(shapes, "quantize.embedding.weight", axis) for axis in (0, 1))
    kind = f"VQ ({codes} codes of {width})" if codes else f"KL ({_dim(shapes, 'post_quant_conv.weight', 1)} channels)"
    levels = []
    numbers = [int(key.split(".")[2]) for key in shapes if key.startswith("encoder.down.")]
    for i in range(1 + max(numbers, default=-1)):
        level = _below(shapes, f"encoder.down.{i}.")
        blocks = {key.split(".")[1] for key in level if key.startswith("block.")}
        attention = "a" if any(key.startswith("attn.") for key in level) else ""
        levels.append(f"{len(blocks)}x{_dim(level, 'block.0.conv2.weight', 0)}{attention}")
    middle = "a" if "decoder.mid.attn_1.q.weight" in shapes else "-"
    latent = _dim(shapes, "decoder.conv_in.weight", 1)
    return f"{kind} | latent={latent} levels={' '.join(levels)} middle={middle}"


def _cond_stage_traits(shapes: Shapes) -> str:
    def size(key: str) -> str:
        return "x".join(map(str, shapes[key]))

    kinds: dict[str, Callable[[str], str]] = {
        "transformer.token_emb.weight": lambda key: f"BERT-style text ({size(key)})",
        "transformer.text_model.embeddings.token_embedding.weight": lambda key: f"CLIP text ({size(key)})",
        "model.token_embedding.weight": lambda key: f"OpenCLIP text ({size(key)})",
        "embedding.weight": lambda key: f"class ({size(key)})",
        "channel_mapper.weight": lambda key: f"picture rescaling ({size(key)})",
        "encoder.conv_in.weight": lambda key: "first-stage",
    }
    return next((words(key) for key, words in kinds.items() if key in shapes), "")


def _agrees(traits: Traits, row: Mapping[str, Any]) -> bool:
    """Whether every part of the file is the row's; a file may lack parts, and a full model needs its UNet."""
    if not traits.unet:
        return bool(traits.first_stage) and not row["unet"] and traits.first_stage == row["first_stage"]
    parts = ("unet", "first_stage", "cond_stage")
    return all(getattr(traits, part) in ("", row[part]) for part in parts)


def _overlap(traits: Traits, row: Mapping[str, Any]) -> int:
    return sum(getattr(traits, part) == row[part] for part in ("unet", "first_stage", "cond_stage"))


def _choose(
    configs: list[str], hints: Mapping[str, str], path: Path | None, size: int | None, said: Sequence[str]
) -> tuple[str, str]:
    """The config for what the file says, the picture size or a word in the path hints at, else the first; and why."""
    if not configs:
        return "", ""
    for word in said:
        if word in hints:
            return hints[word], f"for its prediction_type '{word}'"
    words = [] if path is None else re.split(r"[^a-z0-9]+", "/".join(path.absolute().parts[-3:]).lower())
    for hint, config in hints.items():
        if hint == str(size):
            return config, f"for the picture size of {size}"
        if any(word.startswith(hint) for word in words):
            return config, f"for the '{hint}' in its path"
    return configs[0], "as the first; name another one if that is wrong"


def _recognise_small(shapes: Shapes) -> ModelInfo:
    """Files that are no whole models: say what they are and what to do with them."""
    tops = {key.split(".")[0] for key in shapes}
    if not shapes:
        return ModelInfo("empty", "", "holds no tensors")
    if tops == {"embedding_manager"}:
        return ModelInfo(
            "inversion",
            "",
            (
                "is an inversion's own checkpoint with the learned words alone; name the base model's file, "
                "and the words' embeddings.pt as --embedding_path"
            ),
        )
    if any(key.startswith("lora_") or ".lora_" in key or "lora_A" in key for key in shapes):
        return ModelInfo("lora", "", "is a LoRA, which changes a model and is none itself")
    if tops & _EMBEDDING_KEYS or all(len(shape) in (1, 2) for shape in shapes.values()) and len(shapes) <= 2:
        return ModelInfo(
            "embedding", "", "is an embedding file: --embedding_path (of main.py: --embedding_manager_ckpt) takes it"
        )
    if any(key.startswith(("down_blocks.", "conv_in.", "encoder.down_blocks.")) for key in shapes):
        return ModelInfo("diffusers", "", "has the key names of diffusers; use a file in the original layout")
    if "conditioner" in tops:
        return ModelInfo("sdxl", "", "is of the SDXL family, which is not supported")
    example = ", ".join(list(shapes)[:3])
    return ModelInfo("unknown", "", f"holds none of the known models (its first keys are {example})")
