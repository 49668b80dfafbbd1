"""Knowing when a word is good: the comparable loss, the best vectors, sample grids, the report of a run."""

from __future__ import annotations

import csv
import html
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.callbacks import FixedValidation, SampleGrids
from ldm.callbacks.report_page import curve, embed_images
from ldm.modules.embedding_io import read_embeddings
from scripts import txt2img
from tests.conftest import END_TO_END
from tests.tiny_inversion import inversion_config, learn, learn_until, vectors
from tests.tiny_run import last_checkpoint, run_main, write_config

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 4


def config_file(folder: Path, **callbacks: dict[str, Any]) -> Path:
    """Config of a run with everything in this file's subject, on two pictures and two time steps."""
    config = inversion_config()
    config["lightning"]["trainer"] |= {"max_steps": STEPS, "log_every_n_steps": 1}
    few = {"max_pictures": 2, "num_timesteps": 2, "every_n_train_steps": 1}
    # a share that no grid exceeds, however slow the machine: which grids there are must not depend on the time
    grids = {"every_n_train_steps": 2, "count": 2, "steps": 2, "disabled": False, "max_share": 1e9}
    config["lightning"]["callbacks"] |= {
        "fixed_validation": {"params": few | callbacks.get("fixed_validation", {})},
        "sample_grids": {"params": grids | callbacks.get("sample_grids", {})},
    }
    return write_config(folder / "report.yaml", config)


def fixed_losses(run: Path) -> dict[int, float]:
    """val/loss_fixed by step, of all parts of a run."""
    found = {}
    for file in sorted(run.glob("csv/*/metrics.csv")):
        with file.open() as rows:
            found |= {int(r["step"]): float(r["val/loss_fixed"]) for r in csv.DictReader(rows) if r["val/loss_fixed"]}
    return found


@pytest.fixture(scope="module")
def run(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of an undisturbed inversion with everything switched on."""
    folder = tmp_path_factory.mktemp("report")
    return learn(config_file(folder), folder)


def test_the_fixed_loss_changes_with_the_vectors_only(run: Path):
    losses = fixed_losses(run)
    assert list(losses) == list(range(STEPS + 1))
    assert len(set(losses.values())) == STEPS + 1


def test_the_fixed_loss_is_the_same_at_a_learning_rate_of_zero(tmp_path: Path):
    config = config_file(tmp_path, sample_grids={"disabled": True})
    run = learn(config, tmp_path, "--max_steps", 2, "model.base_learning_rate=0.0")
    assert len(set(fixed_losses(run).values())) == 1


def test_looking_does_not_change_what_is_learned(run: Path, tmp_path: Path):
    off = {"disabled": True}
    unwatched = learn(config_file(tmp_path, fixed_validation=off, sample_grids=off), tmp_path)
    assert torch.equal(vectors(run)["*"], vectors(unwatched)["*"])
    assert not (unwatched / "checkpoints" / "embeddings_best.pt").exists()


def test_the_best_vectors_are_those_of_the_smallest_loss(run: Path):
    losses = fixed_losses(run)
    best = read_embeddings(run / "checkpoints" / "embeddings_best.pt")
    assert best.info["step"] == min(losses, key=losses.__getitem__)
    assert best.info["value"] == pytest.approx(min(losses.values()))


def test_a_resumed_run_chooses_as_an_undisturbed_one(run: Path, tmp_path: Path):
    resumed = learn_until(1, config_file(tmp_path), tmp_path)
    run_main("-r", resumed)
    assert fixed_losses(resumed) == fixed_losses(run)
    states = [last_checkpoint(r)["callbacks"]["FixedValidation"] for r in (run, resumed)]
    assert states[0] == states[1]


def test_a_run_that_no_longer_improves_stops(tmp_path: Path):
    config = config_file(
        tmp_path, fixed_validation={"patience": 2, "min_delta": 100.0}, sample_grids={"disabled": True}
    )
    run = learn(config, tmp_path)
    assert last_checkpoint(run)["global_step"] == 2
    assert read_embeddings(run / "checkpoints" / "embeddings_best.pt").info["step"] == 0


def test_an_unknown_metric_is_named(tmp_path: Path):
    images = END_TO_END / "images"
    validation = (
        f"{{target: ldm.data.personalized.PersonalizedBase, params: {{size: 32, set: val, data_root: {images}}}}}"
    )
    config = config_file(tmp_path, fixed_validation={"monitor": "val/los"}, sample_grids={"disabled": True})
    with pytest.raises(ValueError, match=r"'val/los'.*val/loss_fixed.*val/loss_simple"):
        learn(config, tmp_path, f"data.params.validation={validation}", "--val_check_interval", 2)


def test_sample_grids_by_step(run: Path):
    names = {path.name for path in (run / "images" / "samples").iterdir()}
    assert names == {f"{kind}_gs-{step:06}.jpg" for kind in ("raw", "guided") for step in (0, 2, 4)}
    with Image.open(run / "images" / "samples" / "raw_gs-000004.jpg") as grid:
        assert grid.width > 2 * 32


def test_grids_that_take_too_much_of_the_time_are_left_out(tmp_path: Path):
    config = config_file(tmp_path, fixed_validation={"disabled": True}, sample_grids={"max_share": 0.0})
    samples = learn(config, tmp_path) / "images" / "samples"
    assert {path.name for path in samples.glob("raw_*")} == {"raw_gs-000000.jpg", f"raw_gs-{STEPS:06}.jpg"}


def report_of(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


def test_the_report_is_one_small_file(run: Path):
    text = report_of(run)
    assert len(text) < 1_500_000
    assert not re.findall(r"""(?:src|href)=["'](?!data:image/jpeg;base64,)""", text)
    assert "<script" not in text
    assert "url(" not in text
    assert "http" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL)
    HTMLParser().feed(text)


def test_what_the_report_shows(run: Path):
    text = report_of(run)
    assert text.count("data:image/jpeg") == 1 + 2 * 3  # contact sheet, two grids at three steps
    assert text.count("<svg") == 2
    for heading in ("Use it", "What it saw", "How it went", "What it draws", "What the word is", "What it cost"):
        assert f"<h2>{heading}</h2>" in text
    assert "sculpture" in text  # the initial word, near the learned one
    assert "sample grids" in text
    assert "base_learning_rate" in text


def test_the_command_of_the_report_runs(run: Path, tmp_path: Path):
    (command,) = re.findall(r"<h2>Use it</h2>\s*<pre>(.*?)</pre>", report_of(run), re.DOTALL)
    program, script, *arguments = shlex.split(html.unescape(command))
    assert (program, script) == ("python", "scripts/txt2img.py")
    fewer = ["--ddim_steps", "2", "--n_samples", "1", "--n_iter", "1", "--H", "32", "--W", "32", "--device", "cpu"]
    txt2img.main([*arguments, *fewer, "--outdir", str(tmp_path)])
    assert list(tmp_path.rglob("*.png"))


def test_text_in_the_report_is_escaped(tmp_path: Path):
    config = config_file(tmp_path, sample_grids={"disabled": True})
    evil = "<script>alert(1)</script>"
    text = report_of(learn(config, tmp_path, "--placeholder_string", evil, "--max_steps", 1))
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_pictures_are_made_to_fit(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 255, (900, 900, 3), dtype=np.uint8)
    paths = [tmp_path / f"{k}.png" for k in range(3)]
    for path in paths:
        Image.fromarray(noise).save(path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    found = embed_images([*paths, tmp_path / "broken.png"], 200_000)
    assert list(found) == paths
    assert sum(map(len, found.values())) <= 200_000


def test_curves_leave_out_what_is_not_finite():
    drawing = curve([(0, 1.0), (1, float("nan")), (2, 0.5)], "loss", mark=2)
    assert "nan" not in drawing
    assert drawing.count("<circle") == 2
    assert curve([(0, 1.0)], "loss") == ""


def test_wrong_options_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="patience"):
        FixedValidation(patience=0)
    with pytest.raises(ValueError, match="mode 'least'"):
        FixedValidation(mode="least")
    with pytest.raises(ValueError, match="a photo"):
        SampleGrids(tmp_path, prompts=["a photo"])
