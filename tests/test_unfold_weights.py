"""Weights of a network on folded latents as the start of one on unfolded latents."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import ConfigError

ROOT = Path(__file__).parents[1]
NETWORK = "model.diffusion_model."
OPTIONS = {
    "image_size": 4, "model_channels": 32, "num_res_blocks": 2, "num_head_channels": 32, "legacy": False,
    "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 8,
}  # fmt: skip
OLD = {"in_channels": 8, "out_channels": 8, "channel_mult": [2, 3], "attention_resolutions": [1, 2]}
NEW = {"in_channels": 2, "out_channels": 2, "channel_mult": [1, 2, 3], "attention_resolutions": [2, 4]}


@pytest.fixture
def command() -> ModuleType:
    spec = importlib.util.spec_from_file_location("unfold_weights", ROOT / "scripts/data/unfold_weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_old_levels_and_the_middle_are_taken_over(command: ModuleType, tmp_path: Path):
    old = UNetModel(**OPTIONS, **OLD).state_dict()
    save_file({**{NETWORK + key: value.half() for key, value in old.items()}, "scale_factor": torch.tensor(0.5)},
              tmp_path / "old.safetensors")  # fmt: skip
    params = "\n".join(f"        {key}: {value}" for key, value in {**OPTIONS, **NEW}.items())
    target = f"{UNetModel.__module__}.UNetModel"
    (tmp_path / "new.yaml").write_text(
        f"model:\n  params:\n    unet_config:\n      target: {target}\n      params:\n{params}\n"
    )
    command.main([str(tmp_path / name) for name in ("old.safetensors", "new.yaml", "new.safetensors")])
    written = load_file(tmp_path / "new.safetensors")
    assert written.pop("scale_factor") == 0.5
    network = UNetModel(**OPTIONS, **NEW)
    network.load_state_dict({key.removeprefix(NETWORK): value for key, value in written.items()})
    for ours, theirs in (("input_blocks.4.1.", "input_blocks.1.1."), ("input_blocks.8.0.", "input_blocks.5.0."),
                         ("middle_block.", "middle_block."), ("output_blocks.2.", "output_blocks.2."),
                         ("time_embed.", "time_embed.")):  # fmt: skip
        keys = [key for key in old if key.startswith(theirs)]
        assert keys
        for key in keys:
            assert torch.equal(written[NETWORK + ours + key.removeprefix(theirs)], old[key].half().float()), key
    cut = "output_blocks.5.0.in_layers.2.weight"  # reads fewer channels of the way in
    assert torch.equal(written[NETWORK + cut], old[cut].half().float()[:, : written[NETWORK + cut].shape[1]])


def test_a_config_of_something_else_is_refused(command: ModuleType, tmp_path: Path):
    save_file({NETWORK + "out.0.weight": torch.zeros(2)}, tmp_path / "old.safetensors")
    (tmp_path / "new.yaml").write_text("model:\n  params: {}\n")
    with pytest.raises(ConfigError, match="unet_config"):
        command.main([str(tmp_path / name) for name in ("old.safetensors", "new.yaml", "new.safetensors")])
    assert not (tmp_path / "new.safetensors").exists()
