"""The sampling commands, run as a user runs them, on tiny models."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ldm.cli import BAD_INPUT, INTERRUPTED, run_command
from ldm.generate_files import read_settings
from ldm.generate_words import fingerprint
from tests.test_generate import word_file
from tests.tiny_models import (
    TEXT_WEIGHTS,
    class_config,
    inpainting_config,
    text_config,
    text_model,
    unconditional_config,
    vq_stage,
    write_model,
)

ROOT = Path(__file__).parents[1]
SCRIPTS = ("txt2img", "stable_txt2img", "convert_checkpoint", "embedding", "img2img", "sample_diffusion", "inpaint")


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(name: str, *words: object) -> None:
    """Run a command within this process."""
    load(name).main([str(word) for word in words])


def run(name: str, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as its own process, in a folder that is not the source tree."""
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "config.yaml").write_text(yaml.safe_dump(text_config()))
    (folder / "model.safetensors").symlink_to(TEXT_WEIGHTS)
    return folder


QUICK = ("--sampler", "dpm", "--steps", 2, "--device", "cpu")


# -- all commands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_quick_and_has_an_example(name, tmp_path):
    command = [sys.executable, "-X", "importtime", str(ROOT / "scripts" / f"{name}.py"), "--help"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert f"python scripts/{name}.py" in result.stdout
    assert "argparse" in result.stderr
    assert " torch" not in result.stderr


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("txt2img", ["--prompt", "x", "--ckpt_path", "nowhere.ckpt"], "error: no checkpoint at nowhere.ckpt"),
        ("sample_diffusion", ["-r", "nowhere.ckpt"], "error: no checkpoint at nowhere.ckpt"),
        ("inpaint", ["--indir", "nowhere", "--outdir", "out"], "error: no folder at nowhere"),
    ],
)
def test_bad_input_is_one_line(name, words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        run_command(load(name).main, words)
    assert exit_info.value.code == BAD_INPUT
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_exit_codes(capsys):
    def fail(error):
        def main(argv):
            raise error

        return main

    for error, code, message in [
        (ValueError("two\nlines"), BAD_INPUT, "error: two lines"),
        (FileNotFoundError(2, "No such file or directory", "x.png"), BAD_INPUT, "No such file or directory: x.png"),
        (OSError(28, "No space left on device"), BAD_INPUT, "No space left on device"),
        (KeyboardInterrupt(), INTERRUPTED, ""),
    ]:
        with pytest.raises(SystemExit) as exit_info:
            run_command(fail(error), [])
        assert exit_info.value.code == code
        assert message in capsys.readouterr().err
    with pytest.raises(RuntimeError):
        run_command(fail(RuntimeError("a bug")), [])
    for lack in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")):
        with pytest.raises(SystemExit):
            run_command(fail(lack), [])
        assert capsys.readouterr().err.startswith("error: out of memory: ask for fewer or smaller pictures")
    with pytest.raises(ValueError, match="x"):
        run_command(fail(ValueError("x")), ["--debug"])
    with pytest.raises(SystemExit):
        run_command(fail(ValueError("x")), ["-d", "false"])
    assert run_command(lambda argv: None, []) is None


# -- txt2img -------------------------------------------------------------------------------------------------------


def test_txt2img_from_the_shell(text_folder, tmp_path):
    words = word_file(tmp_path / "cat.pt")
    result = run(
        "txt2img", *QUICK, "--ckpt_path", text_folder, "--embedding_path", words, "--n_samples", 2, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "outputs" / "txt2img-samples"
    assert sorted(p.name for p in (folder / "samples").iterdir()) == ["a-photo-of_42.png", "a-photo-of_43.png"]
    assert (folder / "a-photo-of_42-grid.png").is_file()
    assert result.stdout.count(".png") == 3
    settings = read_settings(folder / "samples" / "a-photo-of_43.png")
    assert settings["prompt"] == "a photo of *"
    assert settings["seed"] == 43
    assert settings["sampler"] == "dpm"
    assert len(settings["embedding_sha256"]) == 1


def test_txt2img_repeats_a_picture_from_its_file(text_folder, tmp_path):
    word_file(tmp_path / "cat.pt")
    common = [*QUICK, "--ckpt_path", text_folder, "--outdir", tmp_path / "a", "--seed", 7]
    words = ["--embedding_path", tmp_path / "cat.pt", "--rename", "*=<cat>", "--strength", 0.5]
    call("txt2img", *common, *words, "--prompt", "a photo of <cat>", "--negative_prompt", "dark", "--n_samples", 2)
    first = tmp_path / "a" / "samples" / "a-photo-of-cat_8.png"
    call("txt2img", "--from-image", first, "--outdir", tmp_path / "b", "--device", "cpu")
    again = tmp_path / "b" / "samples" / "a-photo-of-cat_8.png"
    difference = np.asarray(Image.open(first)).astype(int) - np.asarray(Image.open(again))
    assert np.abs(difference).max() <= 1  # the batch was of two before
    assert read_settings(again) == read_settings(first)
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["samples"]  # one picture needs no grid
    call("txt2img", "--from-image", first, "--outdir", tmp_path / "c", "--device", "cpu", "--scale", 9)
    assert read_settings(tmp_path / "c" / "samples" / "a-photo-of-cat_8.png")["scale"] == 9


def test_txt2img_batch_size_and_prompts_from_a_file(text_folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\ufeffa photo of a cat\n\n a painting of a cat \n", encoding="utf-8")
    common = [*QUICK, "--ckpt_path", text_folder, "--from-file", tmp_path / "prompts.txt", "--n_iter", 2]
    call("txt2img", *common, "--n_samples", 2, "--outdir", tmp_path / "a")
    call("txt2img", *common, "--n_samples", 2, "--batch_size", 3, "--outdir", tmp_path / "b")
    names = sorted(p.name for p in (tmp_path / "a" / "samples").iterdir())
    assert names == sorted(f"a-{kind}-of-a-cat_{42 + k}.png" for kind in ("photo", "painting") for k in range(4))
    for name in names:
        a, b = (np.asarray(Image.open(tmp_path / run / "samples" / name)).astype(int) for run in "ab")
        assert np.abs(a - b).max() <= 1
    grid = Image.open(tmp_path / "a" / "a-photo-of-a-cat_42-grid.png")
    assert grid.size == (2 * 34 + 2, 2 * 34 + 2)
    assert "prompts-grid" not in capsys.readouterr().out


def test_prompts_of_the_same_name_have_a_grid_each(text_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na cat!\na dog\n(a cat)\na cat\n")
    common = [*QUICK, "--ckpt_path", text_folder, "--from-file", tmp_path / "prompts.txt", "--n_samples", 2]
    call("txt2img", *common, "--outdir", tmp_path / "out")
    names = [f"{name}-grid.png" for name in ("a-cat_42", "a-cat_42-2", "a-cat_42-3", "a-dog_42")]
    assert sorted(grid.name for grid in (tmp_path / "out").glob("*.png")) == sorted(names)
    for name in names:  # each holds its own prompt's pictures
        stem, _, number = name.removesuffix("-grid.png").partition("42")
        sample = np.asarray(Image.open(tmp_path / "out" / "samples" / f"{stem}42{number}.png"))
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / name))[2:34, 2:34], sample)


def test_txt2img_flags_that_skip(text_folder, tmp_path):
    common = [*QUICK, "--ckpt_path", text_folder, "--prompt", "a cat", "--n_samples", 2]
    call("txt2img", *common, "--skip_grid", "--outdir", tmp_path / "a", "--H", 16, "--W", 40)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["samples"]
    assert Image.open(tmp_path / "a" / "samples" / "a-cat_42.png").size == (40, 16)
    call("txt2img", *common, "--skip_save", "--outdir", tmp_path / "b")
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["a-cat_42-grid.png"]


def test_txt2img_warns_when_no_word_occurs(text_folder, tmp_path, caplog):
    words = ["--embedding_path", word_file(tmp_path / "a.pt"), "--rename", "*=<mug>"]
    common = [*QUICK, "--ckpt_path", text_folder, "--n_samples", 1, "--outdir", tmp_path]
    call("txt2img", *common, *words, "--prompt", "a photo of a cat")
    (warning,) = [message for message in caplog.messages if "words" in message]
    assert warning.endswith("a.pt: none of its words occurs in a prompt or the negative one; it has '<mug>'")
    caplog.clear()
    call("txt2img", *common, *words, "--prompt", "a photo of a cat", "--negative_prompt", "a <mug>")
    assert "occurs" not in caplog.text


def test_inpaint_looks_for_words_in_the_negative_prompt_too(tmp_path, caplog):
    files = [word_file(tmp_path / "a.pt"), word_file(tmp_path / "b.pt", ["<mug>"])]
    words = ["--indir", tmp_path, "--outdir", tmp_path, "--embedding_path", *files, "--prompt", "a cat"]
    inpaint = load("inpaint")
    for negative, idle in (("a <mug>", ["a.pt"]), ("", ["a.pt", "b.pt"]), ("<mug> on *", [])):
        caplog.clear()
        inpaint.read_words(text_model(), inpaint.parse_args([*map(str, words), "--negative_prompt", negative]))
        assert [message.partition(": none")[0][-4:] for message in caplog.messages] == idle


def test_txt2img_plms_is_published(text_folder, tmp_path):
    args = load("txt2img").parse_args(["--prompt", "x"])
    published = {"ddim_steps": 200, "ddim_eta": 0.0, "n_iter": 1, "n_samples": 4, "scale": 5.0, "sampler": "ddim"}
    assert {key: getattr(args, key) for key in published} == published
    assert args.outdir == "outputs/txt2img-samples"
    assert load("txt2img").parse_args(["--plms"]).sampler == "plms"
    with pytest.raises(ValueError, match="ddim_eta must be 0"):
        call("txt2img", "--prompt", "x", "--plms", "--ddim_eta", 1, "--ckpt_path", text_folder, "--outdir", tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say what to draw"),
        (["--prompt", "x", "--rename", "*=y"], "needs --embedding_path"),
        (["--prompt", "x", "--n_samples", "0"], "--n_samples must be at least 1"),
        (["--from-image", "a.png"], "holds no settings"),
        (["--from-file", "empty.txt"], "holds no prompt"),
        (["--prompt", "x", "--embedding_path", "a.png"], "a.png"),
        (["--prompt", "x", "--H", "20"], "no multiple of 8"),
        (["--prompt", "x", "--ddim_steps", "-5"], "steps must be at least 1, got -5"),
        (["--prompt", "x", "--ddim_steps", "5000"], "give a number from 1 to 1000"),
        (["--prompt", "x", "--ddim_eta", "-1"], "must lie between 0"),
        (["--prompt", "x", "--scale", "nan"], "scale must be a finite number"),
        (["--prompt", "x", "--seed", "1" + "0" * 20], "more than 64 bits"),
        (["--from-file", "a.png"], "a.png is no text file"),
        (["--prompt", "x", "--config", "bad.yaml"], "'bad.yaml' is not a YAML file"),
        (["--prompt", "x", "--config", "a.png"], "'a.png' is not a YAML file"),
        (["--prompt", "x", "--config", "empty.txt"], "expected a config with a 'target' key"),
    ],
)
def test_txt2img_bad_input(words, message, text_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("a.png")
    Path("empty.txt").write_text("\n \n")
    Path("bad.yaml").write_text("model: [1")
    with pytest.raises(ValueError, match=message):
        call("txt2img", *words, "--ckpt_path", text_folder, "--device", "cpu")
    assert not Path("outputs").exists()


# -- sample_diffusion ----------------------------------------------------------------------------------------------


def test_sample_unconditional(tmp_path):
    folder = write_model(tmp_path / "model", unconditional_config())
    call("sample_diffusion", "-r", folder, "-n", 5, "-c", 2, "--batch_size", 2, "--device", "cpu")
    (samples,) = (folder / "samples").iterdir()
    pictures = sorted((samples / "img").iterdir())
    assert [p.name for p in pictures] == [f"sample_{k:06d}.png" for k in range(5)]
    array = np.load(samples / "numpy" / "5-samples.npz")["arr_0"]
    assert array.shape == (5, 32, 32, 3)
    assert array.dtype == np.uint8
    assert np.array_equal(array[3], np.asarray(Image.open(pictures[3])))
    assert len({a.tobytes() for a in array}) == 5
    assert read_settings(pictures[2])["seed"] == 44


def test_sample_classes(tmp_path):
    folder = write_model(tmp_path / "model", class_config())
    common = ["-r", folder, "-c", 2, "-e", 0, "--device", "cpu", "--batch_size", 3, "--no_npz"]
    call("sample_diffusion", *common, "-n", 4, "--classes", 1, 3, "--scale", 2, "-l", tmp_path / "a")
    (samples,) = (tmp_path / "a" / "samples").iterdir()
    labels = [read_settings(path)["class_label"] for path in sorted((samples / "img").iterdir())]
    assert labels == [1, 3, 1, 3]
    assert not (samples / "numpy").exists()
    # the class matters: the same seed with another class is another picture
    call("sample_diffusion", *common, "-n", 1, "--classes", 3, "--scale", 2, "-l", tmp_path / "b")
    (other,) = (tmp_path / "b" / "samples").iterdir()
    first, second = (np.asarray(Image.open(f / "img" / "sample_000000.png")) for f in (samples, other))
    assert not np.array_equal(first, second)
    with pytest.raises(ValueError, match="classes 0 to 4"):
        call("sample_diffusion", *common, "-n", 1, "--classes", 5, "-l", tmp_path / "c")


def test_sample_ancestral_and_averaged_weights(tmp_path):
    folder = write_model(tmp_path / "model", unconditional_config(timesteps=6, use_ema=True))
    call("sample_diffusion", "-r", folder / "model.safetensors", "-n", 2, "-v", "--device", "cpu", "-l", tmp_path / "a")
    (samples,) = (tmp_path / "a" / "samples").iterdir()
    assert read_settings(samples / "img" / "sample_000001.png")["sampler"] == "ddpm"


def test_sample_a_model_of_pixels(tmp_path):
    unet = unconditional_config()["model"]["params"]["unet_config"]
    params = {"unet_config": unet, "image_size": 8, "channels": 3, "timesteps": 20, "use_ema": False}
    folder = write_model(tmp_path / "model", {"model": {"target": "ldm.models.diffusion.ddpm.DDPM", "params": params}})
    call("sample_diffusion", "-r", folder, "-n", 2, "-c", 2, "--device", "cpu", "-l", tmp_path / "a")
    (samples,) = (tmp_path / "a" / "samples").iterdir()
    assert Image.open(samples / "img" / "sample_000001.png").size == (8, 8)


def test_sample_refuses_the_wrong_model(text_folder, tmp_path):
    with pytest.raises(ValueError, match="say which model to draw from: -r"):
        call("sample_diffusion", "-n", 1)
    stage = write_model(tmp_path / "stage", {"model": vq_stage()})
    with pytest.raises(ValueError, match="holds a VQModelInterface, which draws nothing"):
        call("sample_diffusion", "-r", stage, "-n", 1, "--device", "cpu")
    with pytest.raises(ValueError, match="this VQModelInterface draws no texts"):
        call("txt2img", "--ckpt_path", stage, "--prompt", "x", "--device", "cpu")
    with pytest.raises(ValueError, match="use scripts/txt2img.py"):
        call("sample_diffusion", "-r", text_folder, "-n", 1, "--device", "cpu")
    folder = write_model(tmp_path / "model", unconditional_config())
    with pytest.raises(ValueError, match="use scripts/sample_diffusion.py"):
        call("txt2img", "--ckpt_path", folder, "--prompt", "x", "--device", "cpu")
    with pytest.raises(ValueError, match="unconditional"):
        call("sample_diffusion", "-r", folder, "-n", 1, "--classes", 1, "--device", "cpu")
    pair(tmp_path / "in", "a")
    with pytest.raises(ValueError, match="no inpainting model"):
        call("inpaint", "--indir", tmp_path / "in", "--outdir", tmp_path, "--ckpt_path", folder, "--device", "cpu")


# -- inpaint -------------------------------------------------------------------------------------------------------


def pair(folder: Path, name: str, size: tuple[int, int] = (32, 32)) -> tuple[np.ndarray, np.ndarray]:
    """Write a random picture and a mask of its left half."""
    folder.mkdir(exist_ok=True)
    image = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    mask = np.zeros((size[1], size[0]), dtype=np.uint8)
    mask[:, : size[0] // 2] = 255
    Image.fromarray(image).save(folder / f"{name}.png")
    Image.fromarray(mask).save(folder / f"{name}_mask.png")
    return image, mask


@pytest.fixture(scope="module")
def inpainting_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("inpainting"), inpainting_config())


def test_inpaint_keeps_what_is_not_masked(inpainting_folder, tmp_path):
    image, mask = pair(tmp_path / "in", "odd", (45, 30))
    pair(tmp_path / "in", "even", (32, 40))
    where = ["--indir", tmp_path / "in", "--outdir", tmp_path / "out", "--device", "cpu"]
    call("inpaint", *where, "--steps", 2, "--ckpt_path", inpainting_folder)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["even.png", "odd.png"]
    filled = np.asarray(Image.open(tmp_path / "out" / "odd.png"))
    assert filled.shape == image.shape
    assert np.array_equal(filled[mask == 0], image[mask == 0])
    assert not np.array_equal(filled[mask == 255], image[mask == 255])
    settings = read_settings(tmp_path / "out" / "odd.png")
    assert settings["ckpt_path"] == str(inpainting_folder)
    assert (settings["picture"], settings["mask"], settings["seed"]) == ("odd.png", "odd_mask.png", 42)
    for seed in (42, 7):  # one with other settings is kept
        call("inpaint", *where, "--steps", 2, "--ckpt_path", inpainting_folder, "--seed", seed)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["even-2.png", "even.png", "odd-2.png", "odd.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "odd.png")), filled)


def test_inpaint_does_not_see_what_is_masked(inpainting_folder, tmp_path):
    _, mask = pair(tmp_path / "in", "a")
    args = ["--steps", 2, "--ckpt_path", inpainting_folder, "--device", "cpu"]
    call("inpaint", "--indir", tmp_path / "in", "--outdir", tmp_path / "out1", *args)
    image = np.asarray(Image.open(tmp_path / "in" / "a.png")).copy()
    image[mask == 255] = 77
    Image.fromarray(image).save(tmp_path / "in" / "a.png")
    call("inpaint", "--indir", tmp_path / "in", "--outdir", tmp_path / "out2", *args)
    one, two = (np.asarray(Image.open(tmp_path / out / "a.png")) for out in ("out1", "out2"))
    assert np.array_equal(one, two)


def test_inpaint_bad_pairs(inpainting_folder, tmp_path):
    def attempt(message, error=ValueError):
        with pytest.raises(error, match=message):
            call("inpaint", "--indir", tmp_path / "in", "--outdir", tmp_path / "out", "--ckpt_path", inpainting_folder)

    (tmp_path / "in").mkdir()
    attempt("no pair", FileNotFoundError)
    Image.new("L", (32, 32)).save(tmp_path / "in" / "a_mask.png")
    attempt("has no picture beside it", FileNotFoundError)
    Image.new("RGB", (30, 32)).save(tmp_path / "in" / "a.png")
    attempt("make them the same")
    (tmp_path / "in" / "a.png").write_text("no picture")
    attempt("is not an image")


def test_precisions_of_the_commands(inpainting_folder, text_folder, tmp_path):
    pair(tmp_path / "in", "a")
    for precision in ("half", "autocast"):
        where = ["--ckpt_path", inpainting_folder, "--device", "cpu", "--precision", precision]
        call("inpaint", "--indir", tmp_path / "in", "--outdir", tmp_path / precision, "--steps", 1, *where)
        assert torch.isfinite(torch.from_numpy(np.asarray(Image.open(tmp_path / precision / "a.png")).copy())).all()
        where[1] = text_folder
        call("txt2img", "--prompt", "a cat", "--steps", 1, "--n_samples", 1, "--outdir", tmp_path / precision, *where)
        assert (tmp_path / precision / "samples" / "a-cat_42.png").is_file()


def test_what_would_save_nothing_is_refused_before_anything_is_loaded(text_folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    where = ["--prompt", "a cat", *QUICK, "--ckpt_path", text_folder]
    for words, message in [
        (["--outdir", tmp_path / "file"], "file is no folder"),
        (["--outdir", tmp_path / "file" / "deeper"], "file is no folder"),
        (["--outdir", tmp_path / "out", "--skip_save", "--skip_grid"], "leave --skip_save or --skip_grid out"),
        (["--outdir", tmp_path / "out", "--skip_save", "--n_samples", 1], "leave --skip_save out"),
    ]:
        with pytest.raises((ValueError, OSError), match=message):
            call("txt2img", *where, "--ckpt_path", tmp_path / "missing.ckpt", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_pictures_that_are_no_numbers_are_not_saved(text_folder, tmp_path):
    where = ["--prompt", "a cat", *QUICK, "--ckpt_path", text_folder, "--outdir", tmp_path / "out"]
    with pytest.raises(ValueError, match="infinite or undefined numbers: take a lower --scale"):
        call("txt2img", *where, "--scale", "1e38")
    assert not (tmp_path / "out").exists()


def test_help_names_the_defaults_of_each_command(monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")  # no line breaks
    for name, weights, size in [
        ("txt2img", "(default: the model that comes along)", "(default: the model's own, 256 for LDM-1.4B)"),
        ("stable_txt2img", "(default: models/ldm/stable-diffusion-v1/model.ckpt)", "(default: 512)"),
    ]:
        text = " ".join(load(name).build_parser().format_help().split())
        assert weights in text
        assert f"height {size}" in text


def test_flags_of_words_given_again_add_to_one_another():
    command = load("txt2img")
    words = ["--embedding_path", "cat.pt", "--embedding_path", "dog.pt", "mug.pt", "--rename", "*=<cat>", "--rename",
             "*=<dog>", "--prompt", "a *"]  # fmt: skip
    args = command.parse_args(words)
    assert args.embedding_path == ["cat.pt", "dog.pt", "mug.pt"]
    assert args.rename == ["*=<cat>", "*=<dog>"]
    assert args.strength == [1.0]
    assert command.parse_args(words).embedding_path == args.embedding_path  # the default is not added to
    with pytest.raises(ValueError, match="--n_rows must be at least 0"):
        command.parse_args([*words, "--n_rows", "-1"])


def test_a_folder_of_the_concepts_library_has_a_fingerprint(tmp_path: Path):
    (tmp_path / "learned_embeds.bin").write_bytes(b"words")
    assert fingerprint(tmp_path) == fingerprint(tmp_path / "learned_embeds.bin")


def test_filled_pictures_never_replace_the_users(tmp_path: Path):
    for name in ("dog.png", "dog_mask.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    with pytest.raises(ValueError, match="is --indir: the filled pictures would replace yours"):
        load("inpaint").main(["--indir", str(tmp_path), "--outdir", str(tmp_path)])
