"""From nothing: both first stages and three diffusion models learn coloured squares, and draw them.

A few minutes on two processor cores. The five configs in `tests/data/configs` are the published ones in small.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.training import find_metrics
from tests.conftest import DATA
from tests.tiny_run import COLOURS, RGB, only_run, run_main

CONFIGS = DATA / "configs"
SIZE = 16
GREY = 110

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 64 pictures: one sub-folder for each colour, and captions in metadata.jsonl."""
    folder = tmp_path_factory.mktemp("squares")
    random = np.random.default_rng(0)
    rows = []
    for colour in COLOURS:
        (folder / colour).mkdir()
        for number in range(16):
            picture = np.full((SIZE, SIZE, 3), GREY, np.uint8)
            side = 2 * int(random.integers(3, 6))  # on the grid of the latents, which is quickly learnt
            x, y = 2 * random.integers(0, (SIZE - side) // 2 + 1, 2)
            picture[y : y + side, x : x + side] = as_bytes(colour)
            Image.fromarray(picture).save(folder / colour / f"{number}.png")
            rows.append({"file_name": f"{colour}/{number}.png", "text": f"a {colour} square"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def as_bytes(colour: str) -> np.ndarray:
    return np.round((np.array(RGB[colour]) + 1) * 127.5).astype(np.uint8)


@pytest.fixture(scope="module")
def trained(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run directory of a training with the named configs, run when first asked for."""
    made: dict[str, Path] = {}

    def run(*names: str, **overrides: Any) -> Path:
        if names[-1] not in made:
            logs = tmp_path_factory.mktemp(names[-1])
            configs = [CONFIGS / f"{name}.yaml" for name in names]
            words = [f"{key}={value}" for key, value in overrides.items()]
            bar = ("--enable_progress_bar", "false")
            run_main("--base", *configs, "-t", "--data_root", squares, "-l", logs, *bar, *words)
            made[names[-1]] = only_run(logs)
        return made[names[-1]]

    return run


def last_value(run: Path, key: str) -> float:
    """The last logged value of a metric."""
    lines = [line.split(",") for file in find_metrics(run) for line in file.read_text().splitlines()]
    column = lines[0].index(key)
    return float(next(line[column] for line in reversed(lines) if line[column]))


def diffusion_model(trained: Callable[..., Path], *names: str) -> Path:
    first_stage = trained("kl") / "checkpoints" / "last.ckpt"
    key = "model.params.first_stage_config.params.ckpt_path"
    return trained("ldm_unconditional", *names, **{key: first_stage})


def colour_of(path: Path) -> str:
    """The colour whose hue fills most of a picture, by its most saturated pixels."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float64).reshape(-1, 3)
    spread = np.ptp(pixels, axis=1)
    vivid = pixels[spread >= np.quantile(spread, 0.8)].mean(0)
    return min(COLOURS, key=lambda colour: float(np.abs(vivid - as_bytes(colour)).sum()))


def shows_a_square(path: Path) -> bool:
    """Whether a picture is grey but for a part in one of the colours, give or take 40 levels and a quarter."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
    known = np.array([(GREY,) * 3, *(as_bytes(colour) for colour in COLOURS)])
    grey, *colours = (np.abs(pixels - colour).max(-1) < 40 for colour in known)  # (H, W) each
    square = max(colours, key=np.mean)
    return bool(square.mean() > 0.08 and (grey | square).mean() > 0.75)


@pytest.mark.parametrize(("name", "psnr"), [("kl", 22.0), ("vq", 18.0)])
def test_first_stages_reconstruct(name: str, psnr: float, trained: Callable[..., Path]):
    run = trained(name)
    assert last_value(run, "val/psnr") > psnr
    assert list((run / "images" / "train").glob("reconstructions_gs-*.jpg"))


def test_unconditional_model_draws_squares(trained: Callable[..., Path], tmp_path: Path):
    from scripts.sample_diffusion import main as sample

    run = diffusion_model(trained)
    words = ["-r", str(run), "-n", "8", "-c", "20", "-e", "0", "--batch_size", "8", "-l", str(tmp_path)]
    sample([*words, "--device", "cpu"])
    pictures = sorted(tmp_path.rglob("*.png"))
    assert len(pictures) == 8
    (archive,) = tmp_path.rglob("*.npz")
    assert np.load(archive)["arr_0"].shape == (8, SIZE, SIZE, 3)
    assert sum(map(shows_a_square, pictures)) >= 6


def test_class_conditional_model_draws_the_class(trained: Callable[..., Path], tmp_path: Path):
    from scripts.sample_diffusion import main as sample

    run = diffusion_model(trained, "ldm_class")
    words = ["-r", str(run), "-n", "16", "-c", "20", "-e", "0", "--batch_size", "16", "-l", str(tmp_path)]
    sample([*words, "--classes", "0", "1", "2", "3", "--device", "cpu"])
    names = sorted(COLOURS)  # folders are numbered by name
    right = [colour_of(p) == names[i % 4] for i, p in enumerate(sorted(tmp_path.rglob("*.png")))]
    assert len(right) == 16
    assert sum(right) >= 12


def test_text_conditional_model_draws_the_text(trained: Callable[..., Path], tmp_path: Path):
    from scripts.txt2img import main as draw

    run = diffusion_model(trained, "ldm_text")
    right = []
    for colour in COLOURS:
        words = ["--prompt", f"a {colour} square", "--ckpt_path", str(run), "--outdir", str(tmp_path / colour)]
        size = ["--H", str(SIZE), "--W", str(SIZE), "--n_samples", "4", "--ddim_steps", "20", "--scale", "1"]
        draw([*words, *size, "--device", "cpu"])
        pictures = [p for p in (tmp_path / colour).rglob("*.png") if Image.open(p).size == (SIZE, SIZE)]
        assert len(pictures) == 4
        right += [colour_of(p) == colour for p in pictures]
    assert sum(right) >= 12
