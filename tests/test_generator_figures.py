"""What the embedded model draws, judged: requests, shares, and the loss gap between captions."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from evaluation.generator_figures import CAPTIONS, TOLD, caption_gap, draw_requests, judge, real_pictures
from evaluation.scorer import Scorer, save_scorer
from evaluation.scorer_data import compose
from ldm.data.emoji import COLOURS, STYLE_PHRASES, Sprites
from tests.conftest import DATA
from tests.test_scorer import PARAMS
from tests.test_scripts_sampling import load
from tests.tiny_models import TEXT_WEIGHTS, text_config


@pytest.fixture(scope="module")
def sprites() -> Sprites:
    with np.load(DATA / "sprites" / "sprites.npz") as file:
        known = [i for i, style in enumerate(file["styles"].tolist()) if style in STYLE_PHRASES]
        names, styles = ([file[key].tolist()[i] for i in known] for key in ("names", "styles"))
        return Sprites(file["pixels"][known], names, styles)


def test_requests_ask_for_drawings_that_exist(sprites: Sprites):
    requests = draw_requests(sprites, 40, seed=1)
    assert requests == draw_requests(sprites, 40, seed=1) != draw_requests(sprites, 40, seed=2)
    for request in requests:
        assert sprites.names[request.row] == request.name
        assert sprites.styles[request.row] == request.style
        assert request.caption.startswith(STYLE_PHRASES[request.style])
        assert request.name in request.caption
        assert request.caption.endswith(f"{request.colour} background")
    real = real_pictures(requests, sprites)
    assert real.shape == (40, 3, 64, 64)
    for picture, request in zip(real, requests, strict=True):
        corner = (picture[:, 0, 0] + 1) * 127.5
        assert (corner - torch.tensor(COLOURS[request.colour])).abs().max() < 40


def test_shares_count_what_was_asked_for(sprites: Sprites):
    requests = draw_requests(sprites, 8, seed=0)
    names = sorted(set(sprites.names))
    right = torch.zeros(8, len(names))
    for i, request in enumerate(requests[:6]):
        right[i, names.index(request.name)] = 1.0
    colours, styles = [r.colour for r in requests], [r.style for r in requests]
    stub = SimpleNamespace(
        object_scores=lambda images, listed: right,
        name_background=lambda images: [*colours[:4], *["none"] * 4],
        name_style=lambda images: [*styles[:2], *["none"] * 6],
    )
    values = judge(stub, torch.zeros(8, 3, 4, 4), requests, names, "drawn")  # type: ignore[arg-type]
    assert [value.mean for value in values] == [0.75, 0.5, 0.25]


class Reader:
    """Stands for a model: its loss is 0 with the right caption and grows with every word that differs."""

    num_timesteps = 10
    device = torch.device("cpu")

    def __init__(self, captions: list[str]) -> None:
        self.captions, self.seen = captions, 0

    def encode_first_stage(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(mean=x[:, :1, :2, :2])

    def get_first_stage_encoding(self, posterior: SimpleNamespace, noise: torch.Tensor) -> torch.Tensor:
        return posterior.mean + noise

    def training_target(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.target = noise
        return noise

    def q_sample(self, x: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        assert ((t >= 0) & (t < self.num_timesteps)).all()
        return x + noise

    def get_learned_conditioning(self, texts: list[str]) -> torch.Tensor:
        first = self.seen // len(CAPTIONS) * 4
        self.seen += 1
        truth = self.captions[first : first + len(texts)]
        return torch.tensor([float(len(set(a.split()) ^ set(b.split()))) for a, b in zip(truth, texts, strict=True)])

    def apply_model(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return self.target + cond.view(-1, 1, 1, 1)


def test_gap_compares_captions_on_the_same_noise(sprites: Sprites):
    captions = compose(sprites, 10, 7, grammar=TOLD).captions
    losses = {f.name: f.mean for f in caption_gap(Reader(captions), sprites, count=10, batch=4)}
    right, background, other, none, wrong, *by_time = losses.values()
    assert right == 0 < other < background < none < wrong * 4
    assert wrong > other
    assert len(by_time) == 5  # of two pictures each
    assert sum(by_time) / 5 == pytest.approx(other)


def test_command_on_the_tiny_model(sprites: Sprites, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(text_config()))
    (folder / "model.safetensors").symlink_to(TEXT_WEIGHTS)
    np.save(tmp_path / "train.npy", sprites.pixels)
    (tmp_path / "train.json").write_text(json.dumps({"names": sprites.names, "styles": sprites.styles}))
    params = {"vocab_size": 3, **PARAMS}
    save_scorer(Scorer(**params), tmp_path / "scorer", params)
    words = [
        "--data", tmp_path, "--ckpt_path", folder, "--scorer", tmp_path / "scorer", "--out_dir", tmp_path / "out",
        "--count", 3, "--steps", 2, "--gap", 4, "--device", "cpu",
    ]  # fmt: skip
    load("evaluate_generator").main([str(word) for word in words])
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert len(figures) == len(CAPTIONS) + 4 + 6  # four pictures at four of the five ranges of time steps
    assert (tmp_path / "out" / "grid.png").is_file()
    assert "loss with the right caption" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--count=0", "--gap=1", "--gap=-3", "--batch_size=0", "--steps=0"])
def test_numbers_that_make_no_sense_are_refused(flag: str):
    with pytest.raises(ValueError, match=f"{flag.split('=')[0].replace('steps', 'ddim_steps')} must be at least"):
        load("evaluate_generator").main([flag])
