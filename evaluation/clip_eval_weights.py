"""Weights of encoders from local files, in every layout that CLIP's are published in; nothing is ever downloaded."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint import read_state_dict
from ldm.resources import resource_root
from ldm.util import ConfigError

SUFFIXES = (".safetensors", ".pt", ".bin", ".pth")
FOLDER_FILES = (  # what a downloaded model folder holds
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # further entries of OpenAI's files
# Names of a transformer block: Hugging Face's, open_clip's. q, k and v are stacked separately.
BLOCK_NAMES = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
OUTER_NAMES = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "logit_scale": "logit_scale",
}
NORM_NAMES = {
    "text_model.final_layer_norm": "ln_final",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
}
TOWERS = {"text_model": "transformer", "vision_model": "visual.transformer"}


def find_weights(folder: str, name: str, path: str | Path | None = None) -> Path:
    """The local file of an encoder's weights: `path` (a file or a model's folder), else `models/<folder>/<name>.*`.

    Raises `FileNotFoundError` that names the file to put there.
    """
    if path is not None:
        path = Path(path)
        candidates = [path / file for file in FOLDER_FILES] if path.is_dir() else [path]
        found = next((file for file in candidates if file.is_file()), None)
        if found is None:
            looked = f"; looked for {', '.join(FOLDER_FILES)}" if path.is_dir() else ""
            raise FileNotFoundError(f"no weights of {name} at {path}{looked}")
        return found
    places = [root / "models" / folder / f"{name}{suffix}" for root in _roots() for suffix in SUFFIXES]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(
        f"the weights of {name} are not at models/{folder}/{name}{SUFFIXES[0]} (nor {', '.join(SUFFIXES[1:])}): put "
        "them there or name their file; nothing is downloaded"
    )


def weights_name(model: str) -> str:
    """File name, without suffix, of a model's weights: "ViT-L/14@336px" gives "ViT-L-14-336px"."""
    return model.replace("/", "-").replace("@", "-")


def _roots() -> list[Path]:
    return list(dict.fromkeys([Path.cwd(), resource_root()]))


def read_clip_weights(path: str | Path) -> dict[str, Tensor]:
    """Float32 state dict of a CLIP model in open_clip's names.

    Reads open_clip's own files, OpenAI's (a state dict, or a TorchScript program, whose code is not even parsed) and
    Hugging Face's `CLIPModel`.
    """
    state = read_state_dict(path, dtype=torch.float32)
    state = {key: value for key, value in state.items() if key not in NO_WEIGHTS}
    if any(key.startswith("vision_model.") for key in state):
        return from_hugging_face(state)
    return state


def from_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `CLIPModel` in open_clip's names; raises `ConfigError` for a key that it does not know."""
    out: dict[str, Tensor] = {}
    stacked: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        owner, _, kind = key.rpartition(".")
        block = re.fullmatch(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\.(.+)", owner)
        if key.endswith("position_ids"):
            continue
        if key in OUTER_NAMES:
            out[OUTER_NAMES[key]] = value
        elif owner in NORM_NAMES:
            out[f"{NORM_NAMES[owner]}.{kind}"] = value
        elif owner in ("text_projection", "visual_projection"):
            out["text_projection" if owner == "text_projection" else "visual.proj"] = value.T.contiguous()
        elif block and block[3] in BLOCK_NAMES:
            out[f"{TOWERS[block[1]]}.resblocks.{block[2]}.{BLOCK_NAMES[block[3]]}.{kind}"] = value
        elif block and re.fullmatch(r"self_attn\.[qkv]_proj", block[3]):
            name = f"{TOWERS[block[1]]}.resblocks.{block[2]}.attn.in_proj_{kind}"
            stacked.setdefault(name, {})[block[3][10]] = value
        else:
            raise ConfigError(f"'{key}' is no weight of a CLIP model in Hugging Face's names")
    for name, parts in stacked.items():
        if missing := set("qkv") - set(parts):
            raise ConfigError(f"a CLIP model in Hugging Face's names lacks {min(missing)}_proj of '{name}'")
    return out | {name: torch.cat([parts[k] for k in "qkv"]) for name, parts in stacked.items()}
