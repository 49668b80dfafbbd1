"""scripts/stable_txt2img.py: the published flags, and using a model otherwise than its config says."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ldm.checkpoint import load_model_from_config, save_safetensors
from ldm.convert import convert
from ldm.generate import adjust_model
from ldm.generate_files import read_settings, save_png
from ldm.modules.embedding_io import EmbeddingFile, write_embeddings
from ldm.modules.encoders.modules import FrozenOpenCLIPEmbedder
from tests.tiny_models import text_model
from tests.tiny_sd import CONTEXT, sd_config, sd_model, write_sd

ROOT = Path(__file__).parents[1]


def command(name: str = "stable_txt2img") -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd")
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": sd_config("sd1")}))
    write_sd(folder / "model.safetensors", "sd1")
    convert(folder / "model.safetensors", folder / "diffusers", config=folder / "config.yaml")
    write_embeddings(EmbeddingFile({"<toy>": torch.randn(2, CONTEXT)}), folder / "toy.pt")
    return folder


SMALL = ("--H", 32, "--W", 32, "--ddim_steps", 2, "--device", "cpu")


def draw(out: Path, *words: object) -> dict[str, np.ndarray]:
    """Pictures by file name."""
    command().main([str(word) for word in (*words, "--outdir", out)])
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted((out / "samples").glob("*.png"))}


def test_flags_and_defaults_are_the_published_ones():
    args = command().parse_args(["--ckpt", "x.ckpt"])
    expected = {"ddim_steps": 50, "n_iter": 2, "n_samples": 3, "scale": 7.5, "H": 512, "W": 512, "C": 4, "f": 8}
    expected |= {"seed": 42, "precision": "autocast", "ddim_eta": 0.0, "n_rows": 0, "sampler": "ddim"}
    assert {key: getattr(args, key) for key in expected} == expected
    words = "--prompt x --skip_grid --skip_save --plms --fixed_code --C 4 --f 8 --n_rows 2 --precision full --seed 1"
    assert command().parse_args(words.split()).sampler == "plms"
    args = command().parse_args(["--dpm_solver", "--laion400m", "--from-file", "x.txt", "--config", "x.yaml"])
    assert args.sampler == "dpm"
    assert args.ckpt_path == "models/ldm/text2img-large/model.ckpt"


def test_without_weights_it_says_where_they_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"models/ldm/stable-diffusion-v1/model\.ckpt: put them there, or name"):
        command().main(["--prompt", "x"])


def test_draws_from_files_and_folders_alike(folder: Path, tmp_path: Path):
    words = ("--prompt", "a <toy>", "--embedding_path", folder / "toy.pt", "--n_iter", 1, "--n_samples", 2, *SMALL)
    from_file = draw(tmp_path / "a", "--ckpt", folder / "model.safetensors", *words)
    from_folder = draw(tmp_path / "b", "--ckpt", folder / "diffusers", *words)
    assert list(from_file) == ["a-toy_42.png", "a-toy_43.png"]
    for name, picture in from_file.items():
        assert picture.shape == (32, 32, 3)
        assert np.abs(from_folder[name] - picture).max() <= 1
    assert (tmp_path / "a" / "a-toy_42-grid.png").is_file()


def test_inpainting_fills_by_a_text_and_keeps_the_rest(folder: Path, tmp_path: Path):
    write_sd(tmp_path / "model.safetensors", "sd1-inpainting")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": sd_config("sd1-inpainting")}))
    picture = np.random.default_rng(0).integers(0, 255, (40, 36, 3), dtype=np.uint8)
    mask = np.zeros((40, 36), np.uint8)
    mask[10:20, 5:30] = 255
    (tmp_path / "in").mkdir()
    Image.fromarray(picture).save(tmp_path / "in" / "a.png")
    Image.fromarray(mask).save(tmp_path / "in" / "a_mask.png")

    def fill(*words: object) -> np.ndarray:
        where = ("--indir", tmp_path / "in", "--outdir", tmp_path / "out", "--steps", 2, "--device", "cpu")
        command("inpaint").main([str(word) for word in (*where, "--ckpt_path", tmp_path, *words)])
        newest = max((tmp_path / "out").glob("a*.png"), key=lambda path: path.stat().st_mtime_ns)
        return np.asarray(Image.open(newest))

    cat, words = fill("--prompt", "a cat"), ("--embedding_path", folder / "toy.pt")
    assert np.array_equal(cat[mask == 0], picture[mask == 0])
    assert not np.array_equal(cat[mask > 0], picture[mask > 0])
    assert np.array_equal(cat, fill("--prompt", "a cat"))
    assert read_settings(tmp_path / "out" / "a.png")["prompt"] == "a cat"
    for other in (("--prompt", "a <toy>", *words), words, ("--prompt", "a cat", "--scale", 1)):
        assert not np.array_equal(cat, fill(*other))
    with pytest.raises(ValueError, match="fills by a text: say what"):
        fill()
    with pytest.raises(ValueError, match=r"use scripts/inpaint\.py"):
        draw(tmp_path / "x", "--ckpt", tmp_path, "--prompt", "a cat", *SMALL)


def test_fixed_code_repeats_the_noise(folder: Path, tmp_path: Path):
    words = ("--ckpt", folder, "--prompt", "a cat", "--n_iter", 2, "--n_samples", 1, "--skip_grid", *SMALL)
    assert list(draw(tmp_path / "a", *words)) == ["a-cat_42.png", "a-cat_43.png"]
    assert list(draw(tmp_path / "b", *words, "--fixed_code")) == ["a-cat_42.png"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--clip_skip", "2"],
        ["--parameterization", "v"],
        ["--parameterization", "v", "--zero_terminal_snr"],
        ["--guidance_rescale", "0.7"],
        ["--prompt_weights"],
        ["--long_prompts"],
        ["--dpm_solver"],
    ],
    ids=lambda flags: flags[-1],
)
def test_each_option_changes_the_picture_and_is_recorded(folder: Path, tmp_path: Path, flags: list[str]):
    prompt = "a (red:1.4) cat " * 16
    words = ("--ckpt", folder, "--prompt", prompt, "--n_iter", 1, "--n_samples", 1, *SMALL)
    (plain,) = draw(tmp_path / "a", *words).values()
    ((name, changed),) = draw(tmp_path / "b", *words, *flags).items()
    assert np.abs(plain - changed).max() > 0
    again = draw(tmp_path / "c", "--from-image", tmp_path / "b" / "samples" / name, "--device", "cpu")
    assert np.array_equal(next(iter(again.values())), changed)


def test_pictures_made_before_an_option_existed_can_be_drawn_again(folder: Path, tmp_path: Path):
    words = ("--ckpt", folder, "--prompt", "a cat", "--n_iter", 1, "--n_samples", 1, *SMALL)
    ((name, plain),) = draw(tmp_path / "a", *words).items()
    settings = read_settings(tmp_path / "a" / "samples" / name)
    for flag in ("prompt_weights", "long_prompts", "clip_skip", "parameterization", "zero_terminal_snr"):
        del settings[flag]
    save_png(plain.astype(np.uint8), tmp_path / "old.png", settings)
    (again,) = draw(tmp_path / "b", "--from-image", tmp_path / "old.png", "--device", "cpu").values()
    assert np.array_equal(again, plain)


def test_clip_skip_of_both_text_models():
    model = sd_model("sd1")
    full = model.get_learned_conditioning(["a cat"])
    adjust_model(model, clip_skip=2)
    text = model.cond_stage_model.transformer.text_model
    ids = model.cond_stage_model.tokenize(["a cat"])
    expected = text.final_layer_norm(text.encoder.layers[0](text.embeddings(ids)))
    assert torch.allclose(model.get_learned_conditioning(["a cat"]), expected, atol=1e-6)
    adjust_model(model, clip_skip=1)
    assert torch.equal(model.get_learned_conditioning(["a cat"]), full)
    with pytest.raises(ValueError, match="clip_skip 3 is not within 1"):
        adjust_model(model, clip_skip=3)
    sizes = {"width": 16, "layers": 3, "heads": 2, "embed_dim": 16}
    torch.manual_seed(0)
    stage = FrozenOpenCLIPEmbedder(layer="last", text_config=sizes)
    torch.manual_seed(0)
    other = FrozenOpenCLIPEmbedder(layer="penultimate", text_config=sizes)
    stage.clip_skip = 2
    assert torch.equal(stage.encode(["a cat"]), other.encode(["a cat"]))
    with pytest.raises(ValueError, match="not within 1 ... 2"):
        other.clip_skip = 3
    with pytest.raises(ValueError, match="not for BERTEmbedder"):
        adjust_model(text_model(), clip_skip=2)


def test_zero_terminal_snr_counts_more_than_the_schedule_in_the_file(tmp_path: Path):
    """Files carry the schedule that they were trained with."""
    path = tmp_path / "model.safetensors"
    save_safetensors(sd_model("sd1").state_dict(), path)
    config = sd_config("sd1", parameterization="v", zero_terminal_snr=True)
    loaded = load_model_from_config(config, path)
    adjusted = load_model_from_config(sd_config("sd1", parameterization="v"), path)
    assert float(adjusted.alphas_cumprod[-1]) > 0
    adjust_model(adjusted, zero_terminal_snr=True)
    expected = sd_model("sd1", parameterization="v", zero_terminal_snr=True)
    for model in (loaded, adjusted):
        assert float(model.alphas_cumprod[-1]) == 0
        assert torch.allclose(model.alphas_cumprod, expected.alphas_cumprod, atol=1e-6)
        assert model.alphas_cumprod.dtype == torch.float32
    with pytest.raises(ValueError, match="needs parameterization 'v' or 'x0'"):
        adjust_model(load_model_from_config(sd_config("sd1"), path), zero_terminal_snr=True)


def test_channels_that_the_model_does_not_have_are_named(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        command().parse_args(["--C", "8"])
    assert "--C 8 --f 8" in caplog.text
