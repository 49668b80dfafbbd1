"""Every published model is recognised by the keys and shapes of its file."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm.checkpoint import (
    CheckpointError,
    recognise,
)
from tests.conftest import END_TO_END
from tests.test_manifests import CASES, MANIFESTS


def shapes_of(manifest: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(map(int, row.split()[1:])) for key, row in MANIFESTS[manifest].items()}


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_every_published_model_finds_its_config(manifest: str):
    config = CASES[manifest][0]
    # These files hold the same models: which words are learned is no matter of the file.
    config = re.sub(r"txt2img-1p4B-\w+", "txt2img-1p4B-eval", config)
    config = re.sub(r"v1-(finetune\w*|inference-plain)", "v1-inference", config)
    info = recognise(shapes_of(manifest))
    assert config in (info.config, *info.others)
    assert info.require_config().is_file()
    if not info.others:
        return
    assert all(name in info.sentence for name in (info.config, *info.others))
    assert "as the first" in info.sentence


@pytest.mark.parametrize(
    ("manifest", "name", "size", "config"),
    [
        ("sd2_v2-inference", "512-base-ema.ckpt", None, "configs/stable-diffusion/v2-inference.yaml"),
        ("sd2_v2-inference", "v2-1_768-ema-pruned.ckpt", None, "configs/stable-diffusion/v2-inference-v.yaml"),
        ("sd2_v2-inference", "model.ckpt", 768, "configs/stable-diffusion/v2-inference-v.yaml"),
        ("ldm_celeba256", "ldm/ffhq256/model.ckpt", None, "models/ldm/ffhq256/config.yaml"),
        ("ldm_celeba256", "lsun_bedrooms.ckpt", None, "models/ldm/lsun_beds256/config.yaml"),
        (
            "ldm_semantic_synthesis256",
            "semantic_synthesis512/model.ckpt",
            None,
            "models/ldm/semantic_synthesis512/config.yaml",
        ),
    ],
)
def test_size_or_path_choose_among_models_of_one_shape(
    tmp_path: Path, manifest: str, name: str, size: int | None, config: str
):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {}
    end = 0
    for key, shape in shapes_of(manifest).items():
        begin, end = end, end + 4 * int(np.prod(shape, dtype=np.int64))
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)  # a sparse file: recognition reads the index alone
    info = recognise(path, size)
    assert info.config == config
    assert "alike" in info.sentence


def test_parts_and_other_files_are_named(tmp_path: Path):
    unet = {k: s for k, s in shapes_of("sd_v1-inference").items() if k.startswith("model.diffusion_model.")}
    assert recognise(unet).name == "sd1"
    assert recognise({k.removeprefix("model.diffusion_model."): s for k, s in unet.items()}).name == "sd1"
    vae = {k: s for k, s in shapes_of("sd_v1-inference").items() if k.startswith("first_stage_model.")}
    assert recognise({k.removeprefix("first_stage_model."): s for k, s in vae.items()}).name == "kl-f8"
    wide = dict(shapes_of("sd_v1-inference"))
    key = "model.diffusion_model.input_blocks.0.0.weight"
    wide[key] = (320, 9, 3, 3)
    assert recognise(wide).require_config().name == "v1-inpainting-inference.yaml"
    wide[key] = (320, 5, 3, 3)
    assert "which no published config has" in recognise(wide).sentence
    with pytest.raises(CheckpointError, match="no shipped config fits"):
        recognise(wide).require_config()
    for keys, word in [
        ({"string_to_param": ()}, "embedding"),
        ({"<cat>": (768,)}, "embedding"),
        ({"lora_unet_down.lora_up.weight": (4, 320)}, "LoRA"),
        ({"down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3)}, "diffusers"),
        ({"something.weight": (3, 3, 3)}, "none of the known models"),
        ({}, "no tensors"),
    ]:
        assert word in recognise(keys).sentence
    path = END_TO_END / "embeddings_1vec.pt"
    assert "embedding file" in recognise(path).sentence
