"""scripts/evaluate_model.py on the tiny model, with a tiny judge."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from evaluation import judges
from ldm.cli import BAD_INPUT, run_command
from tests.conftest import END_TO_END
from tests.test_scripts_sampling import ROOT, load
from tests.tiny_judges import tiny_evaluator
from tests.tiny_models import TEXT_WEIGHTS, text_config

PUBLISHED = ("--embedding_path", str(END_TO_END / "embeddings_1vec.pt"), "--data_dir", str(END_TO_END / "images"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(text_config()))
    (tmp_path / "model.safetensors").symlink_to(TEXT_WEIGHTS)
    return tmp_path


def test_scores_of_a_word(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load_tiny(name: str, weights: object, device: torch.device) -> object:
        asked.append((name, weights))
        return tiny_evaluator()

    monkeypatch.setattr(judges, "load_judge", load_tiny)
    command = load("evaluate_model")
    words = [
        *PUBLISHED, "--ckpt_path", model, "--out_dir", model / "out", "--prompt", "a photo of *", "--n_samples", 3,
        "--steps", 2, "--batch_size", 2, "--device", "cpu", "--scorer", "ViT-B/32", "dino-vits16",
    ]  # fmt: skip
    command.main([str(word) for word in words])
    record = json.loads((model / "out" / "scores.json").read_text())
    assert asked == [("ViT-B/32", None), ("dino-vits16", None)]
    assert record["text"] == "a photo of"
    clip, dino = record["scores"]["ViT-B/32"], record["scores"]["dino-vits16"]
    assert set(clip) - set(dino) == {"text", "text_mean"}
    assert clip["image"] == pytest.approx(dino["image"])
    assert -1 <= clip["image"] <= clip["nearest"] <= clip["nearest_max"] <= 1
    assert len(list((model / "out").glob("a-photo-of_*.png"))) == 3
    assert f"{clip['image']:.4f}" in capsys.readouterr().out
    assert record["ckpt_path"] == str(model)
    assert len(record["embedding_sha256"]) == 1
    assert [(model / "out" / name).is_file() for name in record["pictures"]] == [True] * 3


def run(model: Path, *more: object) -> dict:
    words = [*PUBLISHED, "--ckpt_path", model, "--out_dir", model / "out", "--n_samples", 1, "--steps", 2,
             "--device", "cpu", "--scorer", "ViT-B/32", *more]  # fmt: skip
    load("evaluate_model").main([str(word) for word in words])
    return json.loads((model / "out" / "scores.json").read_text())


def test_what_is_not_known_and_what_is_not_asked(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(judges, "load_judge", lambda *args: tiny_evaluator())
    first = run(model, "--prompt", "a photo of a cat")
    assert first["scores"]["ViT-B/32"]["diversity"] is None  # of one picture: not-a-number is no JSON
    assert "no learned word occurs in 'a photo of a cat'" in caplog.text
    second = run(model, "--prompt", "a photo of a cat", "--scale", 2)
    assert not set(first["pictures"]) & set(second["pictures"])  # those of other settings are kept
    assert run(model, "--prompt", "")["prompt"] == ""
    with pytest.raises(ValueError, match="infinite or undefined numbers"):
        run(model, "--scale", 1e38)


def test_the_default_scorer_follows_the_model():
    command = load("evaluate_model")
    assert command.parse_args([*PUBLISHED]).scorer == ["emoji64"]
    shipped = str(ROOT / "models" / "ldm" / "emoji64")
    assert command.parse_args([*PUBLISHED, "--ckpt_path", shipped]).scorer == ["emoji64"]
    assert command.parse_args([*PUBLISHED, "--ckpt_path", "x.ckpt"]).scorer == ["ViT-B/32"]
    with pytest.raises(ValueError, match="give one each"):
        command.parse_args([*PUBLISHED, "--scorer", "a", "b", "--scorer_weights", "c"])
    with pytest.raises(ValueError, match="n_samples must be at least 1"):
        command.parse_args([*PUBLISHED, "--n_samples", "0"])


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        run_command(load("evaluate_model").main, [*PUBLISHED[:2], "--data_dir", "nowhere"])
    assert exit_info.value.code == BAD_INPUT
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: nowhere is no folder")
    assert list(tmp_path.iterdir()) == []


def test_help_needs_no_torch(tmp_path: Path):
    command = [sys.executable, "-X", "importtime", str(ROOT / "scripts" / "evaluate_model.py"), "--help"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert "python scripts/evaluate_model.py" in result.stdout
    assert " torch" not in result.stderr
