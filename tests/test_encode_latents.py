"""scripts/encode_latents.py: the folder it writes is what the first stage makes of the pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ldm.data.emoji import EmojiCompositions
from ldm.data.latents import PrecomputedLatents
from ldm.models.autoencoder import AutoencoderKL
from ldm.util import ConfigError, instantiate_from_config
from tests.conftest import DATA
from tests.test_scripts_sampling import load
from tests.tiny_run import write_config

STAGE = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 2,
        "lossconfig": {"target": "torch.nn.Identity"},
        "ddconfig": {"double_z": True, "z_channels": 2, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32,
                     "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0, "norm_groups": 8},
    },
}  # fmt: skip


@pytest.fixture
def world(tmp_path: Path) -> dict[str, object]:
    with np.load(DATA / "sprites" / "sprites.npz") as file:
        known = [i for i, style in enumerate(file["styles"].tolist()) if style != "openmoji"]
        np.save(tmp_path / "train.npy", file["pixels"][known])
        index = {key: [file[key].tolist()[i] for i in known] for key in ("names", "styles")}
    (tmp_path / "train.json").write_text(json.dumps(index))
    return {"sprites": str(tmp_path / "train.npy"), "length": 9, "size": 16, "seed": 3}


def test_folder_holds_the_moments_of_the_pictures(world: dict[str, object], tmp_path: Path):
    data = {"target": "ldm.data.emoji.EmojiCompositions", "params": world}
    entry = {"target": "main.DataModuleFromConfig", "params": {"batch_size": 2, "train": data}}
    config = write_config(tmp_path / "stage.yaml", {"model": STAGE, "data": entry})
    stage: AutoencoderKL = instantiate_from_config(STAGE).eval()
    save_file(stage.state_dict(), tmp_path / "stage.safetensors")
    words = ["--config", config, "--ckpt_path", tmp_path / "stage.safetensors", "--out", tmp_path / "latents",
             "--count", 5, "--batch_size", 3, "--num_workers", 0, "--device", "cpu"]  # fmt: skip
    command = load("encode_latents")
    command.main([*map(str, words), "data.params.train.params.seed=4"])
    latents = PrecomputedLatents(tmp_path / "latents")
    pictures = EmojiCompositions(**{**world, "seed": 4})
    assert len(latents) == 5
    for item, picture in zip(latents, pictures, strict=False):
        assert item["caption"] == picture["caption"]
        with torch.no_grad():
            expected = stage.encode(torch.from_numpy(picture["image"]).permute(2, 0, 1)[None]).parameters[0]
        np.testing.assert_allclose(item["moments"], expected, atol=5e-3)  # stored in 16 bits
    with pytest.raises(ConfigError, match="sed"):
        command.main([*map(str, words), "data.params.train.params.sed=4"])
    with pytest.raises(FileExistsError, match="finished folder of latents"):
        command.main([*map(str, words)])
    assert len(PrecomputedLatents(tmp_path / "latents")) == 5
    words[words.index("--out") + 1] = tmp_path / "other"
    with pytest.raises(ValueError, match="no data set 'validation' under data.params, but train"):
        command.main([*map(str, words), "--data", "validation"])
    config = write_config(tmp_path / "no_data.yaml", {"model": STAGE})
    with pytest.raises(ValueError, match="no data set 'train' under data.params, but none at all"):
        command.main([*map(str, [words[0], config, *words[2:]])])
    assert not (tmp_path / "other").exists()


def test_a_first_stage_without_moments_is_refused(world: dict[str, object], tmp_path: Path):
    stage = {"target": "ldm.models.autoencoder.VQModel",
             "params": {**STAGE["params"], "n_embed": 8,
                        "ddconfig": {**STAGE["params"]["ddconfig"], "double_z": False}}}  # fmt: skip
    data = {"target": "ldm.data.emoji.EmojiCompositions", "params": world}
    entry = {"target": "main.DataModuleFromConfig", "params": {"batch_size": 2, "train": data}}
    config = write_config(tmp_path / "stage.yaml", {"model": stage, "data": entry})
    save_file(instantiate_from_config(stage).state_dict(), tmp_path / "stage.safetensors")
    words = ["--config", config, "--ckpt_path", tmp_path / "stage.safetensors", "--out", tmp_path / "latents"]
    with pytest.raises(ValueError, match="a VQModel gives no Gaussian"):
        load("encode_latents").main([*map(str, words), "--num_workers", "0", "--device", "cpu"])
    assert not (tmp_path / "latents").exists()
