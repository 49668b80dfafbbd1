"""What the commands that draw refuse before they load a model, and damaged settings of pictures."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ldm.generate_checks import MAX_PIXELS, check_eta, check_seed, check_size
from ldm.generate_files import read_settings, save_png
from scripts import img2img, inpaint, stable_txt2img, txt2img

SETTINGS = {
    "prompt": "a cat", "seed": 3, "negative_prompt": "", "sampler": "ddim", "ddim_steps": 2, "ddim_eta": 0.0,
    "scale": 5, "guidance_rescale": 0.0, "H": None, "W": 64, "ckpt_path": None, "config": None, "precision": "full",
    "embedding_path": ["cat.pt"], "rename": ["*=<cat>"], "strength": [1.0], "prompt_weights": False,
    "long_prompts": True, "clip_skip": 2, "parameterization": None, "zero_terminal_snr": False,
}  # fmt: skip


def picture(path: Path, **changes: Any) -> Path:
    return save_png(np.zeros((4, 4, 3), np.uint8), path, SETTINGS | changes)


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [txt2img, stable_txt2img])
def test_sound_settings_become_the_flags(command: ModuleType, tmp_path: Path):
    args = command.parse_args(["--from-image", str(picture(tmp_path / "a.png"))])
    assert {flag: getattr(args, flag) for flag in SETTINGS} == SETTINGS
    assert command.parse_args(["--from-image", str(tmp_path / "a.png"), "--seed", "9"]).seed == 9


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("prompt", 5, "5, not a text"),
        ("negative_prompt", None, "None, not a text"),
        ("negative_prompt", ["a"], r"\['a'\], not a text"),
        ("seed", [1], r"\[1\], not a whole number"),
        ("seed", 1.5, "1.5, not a whole number"),
        ("seed", True, "True, not a whole number"),
        ("seed", None, "None, not a whole number"),
        ("ddim_steps", 2.5, "2.5, not a whole number"),
        ("ddim_steps", None, "None, not a whole number"),
        ("scale", "7", "'7', not a number"),
        pytest.param("scale", 10**400, "not a number", id="scale-huge"),
        ("guidance_rescale", float("nan"), "nan, not a number"),
        ("H", 64.0, "64.0, not a whole number"),
        ("ckpt_path", 5, "5, not a text"),
        ("config", ["x"], r"\['x'\], not a text"),
        ("sampler", "evil\x1b[31m", r"'evil\\x1b\[31m', not one of ddim, plms, dpm, ddpm"),
        ("sampler", None, "None, not one of"),
        ("precision", ["full"], "not one of full, autocast, half"),
        ("embedding_path", "crown.pt", "'crown.pt', not a list, each entry a text"),
        ("embedding_path", None, "None, not a list"),
        ("rename", [5], r"\[5\], not a list, each entry a text"),
        ("strength", ["x"], r"\['x'\], not a list, each entry a number"),
        ("strength", 5, "5, not a list"),
        ("prompt_weights", "yes", "'yes', not true or false"),
        ("clip_skip", "x", "'x', not a whole number"),
        ("parameterization", "foo", "'foo', not one of eps, v, x0"),
    ],
)
def test_edited_settings_are_named(flag: str, value: Any, expected: str, tmp_path: Path):
    path = picture(tmp_path / "a.png", **{flag: value})
    with pytest.raises(ValueError, match=rf"a\.png's settings are damaged: {flag} is .*{expected}"):
        txt2img.parse_args(["--from-image", str(path)])


@pytest.mark.parametrize("text", ["[" * 100_000, '{"seed": ' + "9" * 5000 + "}", "[1]", "{"])
def test_settings_that_cannot_be_read_are_none(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ldm.generate_files.json.dumps", lambda *_, **__: text)
    path = picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match="holds no settings"):
        read_settings(path)


def test_paths_that_are_no_unicode_survive_in_the_settings(tmp_path: Path):
    path = picture(tmp_path / "a.png", ckpt_path="caf\udce9.ckpt", prompt="Käthe")
    assert read_settings(path)["ckpt_path"] == "caf\udce9.ckpt"
    assert read_settings(path)["prompt"] == "Käthe"


# -- numbers and texts ---------------------------------------------------------------------------------------------


def test_seeds_of_all_pictures_have_64_bits():
    for seed, count in ((0, 1), (2**64 - 1, 1), (2**64 - 4, 4), (-(2**63), 2)):
        check_seed(seed, count)
    for seed, count, most in ((2**64, 1, 2**64 - 1), (2**64 - 3, 4, 2**64 - 4), (-(2**63) - 1, 1, 2**64 - 1)):
        with pytest.raises(ValueError, match=f"--seed {seed} takes more than 64 bits: give one from 0 to {most}"):
            check_seed(seed, count)


def test_sizes_and_noise_have_bounds_that_hinder_nobody():
    for width, height in ((None, None), (8192, 8192), (65536, None), (512, 2**17)):
        check_size("x", width, height)
    for width, height in ((10**8, None), (None, 10**8), (8192, 8200)):
        with pytest.raises(ValueError, match=f"x: .* pixels are too many; give at most {MAX_PIXELS}"):
            check_size("x", width, height)
    for eta in (0.0, 1.0, 1.5):
        check_eta("--eta", eta)
    for eta in (-0.1, 1e300, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="--eta must lie between 0"):
            check_eta("--eta", eta)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", 2**64], "--seed 18446744073709551616 takes more than 64 bits"),
        (["--prompt", "caf\udce9"], r"--prompt 'caf\\udce9' holds bytes that are no UTF-8"),
        (["--negative_prompt", "\udcff"], "--negative_prompt .* no UTF-8"),
        (["--rename", "*=\udcff"], "--rename .* no UTF-8"),
    ],
)
def test_every_command_that_takes_a_text_checks_it_first(flags: list[Any], message: str, tmp_path: Path):
    here = ["--ckpt_path", "nowhere.ckpt", "--outdir", tmp_path / "out", "--prompt", "x", *flags]
    commands = {txt2img: [], stable_txt2img: [], img2img: ["--init-img", picture(tmp_path / "a.png")],
                inpaint: ["--indir", tmp_path]}  # fmt: skip
    for command, words in commands.items():
        with pytest.raises(ValueError, match=message):
            command.main([str(word) for word in (*words, *here)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--W", 100_000_000], "--W and --H: 100000000 x .* pixels are too many"),
        (["--H", 100_000_000], "pixels are too many"),
        (["--W", 8192, "--H", 8256], "8192 x 8256 pixels are too many"),
        (["--ddim_eta", "1e300"], "--ddim_eta must lie between 0"),
        (["--ddim_eta", "nan"], "--ddim_eta must lie between 0"),
    ],
)
def test_absurd_sizes_and_noise_are_refused_before_a_model_is_loaded(flags: list[Any], message: str, tmp_path: Path):
    init = ["--init-img", picture(tmp_path / "a.png")]
    for command, words in ((txt2img, []), (stable_txt2img, []), (img2img, init)):
        with pytest.raises(ValueError, match=message):
            command.main([str(word) for word in (*words, "--prompt", "x", "--ckpt_path", "nowhere.ckpt", *flags)])


def test_inpainting_checks_its_noise_too(tmp_path: Path):
    with pytest.raises(ValueError, match="--eta must lie between 0"):
        inpaint.main(["--indir", str(tmp_path), "--outdir", str(tmp_path / "out"), "--eta", "1e300"])
