"""Learning a word on Stable Diffusion through main.py: from a file and from a diffusers folder, and drawing with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ldm.convert import convert
from ldm.generate import load_model
from ldm.generate_words import load_words
from tests.tiny_inversion import inversion_config, learn, vectors
from tests.tiny_run import write_config
from tests.tiny_sd import sd_config, write_sd

pytestmark = pytest.mark.usefixtures("one_thread")


def learn_on(folder: Path, model: dict[str, Any], weights: Path, *more: Any) -> Path:
    """Run two steps; returns the run directory."""
    config = inversion_config()
    manager = config["model"]["params"]["personalization_config"]
    data = {"first_stage_key": "image", "cond_stage_key": "caption", "cond_stage_trainable": True}
    config["model"] = {**model, "base_learning_rate": 0.005}
    config["model"]["params"] = {**model["params"], **data, "personalization_config": manager}
    config["lightning"]["trainer"]["max_steps"] = 2
    watching = ("sample_grids", "fixed_validation")
    config["lightning"]["callbacks"] |= {name: {"params": {"disabled": True}} for name in watching}
    path = write_config(folder / "config.yaml", config)
    return learn(path, folder, "--actual_resume", weights, "--init_word", "cat", *more)


@pytest.mark.parametrize(
    ("kind", "parameterization"), [("sd1", "eps"), pytest.param("sd2", "v", marks=pytest.mark.slow)]
)
def test_a_folder_teaches_the_same_word_as_a_file(tmp_path: Path, kind: str, parameterization: str):
    model = sd_config(kind, parameterization=parameterization)
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": model}))
    file = write_sd(tmp_path / "model.ckpt", kind)
    folder = convert(file, tmp_path / "diffusers", config=tmp_path / "model.yaml")
    from_file, from_folder = (learn_on(tmp_path / p.name.replace(".", "-"), model, p) for p in (file, folder))
    learned = vectors(from_folder)["*"]
    assert torch.equal(learned, vectors(from_file)["*"])
    pictures = load_model(folder, device="cpu")
    plain = pictures.get_learned_conditioning(["a photo of cat", "a photo of *"])
    load_words(pictures, [from_folder / "checkpoints" / "embeddings.pt"])
    with_word = pictures.get_learned_conditioning(["a photo of cat", "a photo of *"])
    assert torch.equal(with_word[0], plain[0])
    start = pictures.cond_stage_model.embed(torch.tensor([2368]))  # "cat"
    assert 0 < (learned - start).abs().max() < 0.1
    assert not torch.allclose(with_word[1], plain[1], atol=1e-3)
