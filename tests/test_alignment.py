"""Stopping in time: similarities while a word is learned, the best vectors by them, the stop when they fall."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evaluation.alignment import IMAGE, TEXT, Alignment
from ldm.modules.embedding_io import read_embeddings
from tests.tiny_inversion import inversion_config, learn, learn_until, vectors
from tests.tiny_run import last_checkpoint, run_main, write_config

pytestmark = pytest.mark.usefixtures("one_thread")


class Planned:
    """A judge that answers as planned: at each measurement the next cosine with the text and with the pictures."""

    def __init__(self, text: list[float], image: list[float]) -> None:
        self.plan = list(zip(text, image, strict=True))
        self.texts: list[str] = []
        self.calls = 0

    def encode_image(self, images: Tensor) -> Tensor:
        assert images.shape[1:] == (3, 32, 32)
        assert images.abs().max() <= 1
        number, what = divmod(self.calls, 3)  # the plain word, one edit, the training pictures
        self.calls += 1
        if what == 2:
            return self.row(1.0, len(images))
        return self.row(self.plan[min(number, len(self.plan) - 1)][what != 1], len(images))

    def encode_text(self, texts: list[str]) -> Tensor:
        self.texts += texts
        return self.row(1.0, len(texts))

    @staticmethod
    def row(cosine: float, count: int) -> Tensor:
        return torch.tensor([[cosine, (1 - cosine**2) ** 0.5]]).expand(count, -1)


def config(folder: Path, text: list[float], image: list[float], **validation: Any) -> Path:
    """Four steps, measured each, with planned similarities."""
    made = inversion_config()
    made["lightning"]["trainer"]["max_steps"] = 4
    judge = {"target": "tests.test_alignment.Planned", "params": {"text": text, "image": image}}
    params = {"judge": judge, "every_n_train_steps": 1, "prompts": ["{} with a cat"], "count": 1, "steps": 1}
    few = {"every_n_train_steps": 4, "max_pictures": 1, "num_timesteps": 1}
    made["lightning"]["callbacks"] |= {
        "alignment": {"params": params},
        "fixed_validation": {"params": few | validation},
        "sample_grids": {"params": {"disabled": True}},
    }
    return write_config(folder / "alignment.yaml", made)


def logged(run: Path) -> dict[int, tuple[float, float]]:
    found = {}
    for file in run.glob("csv/*/metrics.csv"):
        with file.open() as rows:
            found |= {int(r["step"]): (float(r[TEXT]), float(r[IMAGE])) for r in csv.DictReader(rows) if r[TEXT]}
    return found


def test_the_best_is_the_likest_before_texts_are_lost(tmp_path: Path):
    text, image = [0.50, 0.49, 0.46, 0.44, 0.3], [0.1, 0.3, 0.5, 0.9, 0.95]
    run = learn(config(tmp_path, text, image, monitor=IMAGE, mode="max"), tmp_path)
    best = read_embeddings(run / "checkpoints" / "embeddings_best.pt")
    assert best.info["step"] == 2
    assert best.info["monitor"] == IMAGE
    assert last_checkpoint(run)["global_step"] == 3  # where 0.44 < 0.9 * 0.5
    measured = logged(run)
    assert list(measured) == [0, 1, 2, 3]
    assert [values[0] for values in measured.values()] == pytest.approx(text[:4])
    assert [values[1] for values in measured.values()] == pytest.approx(image[:4])
    assert "val/text_similarity by step" in (run / "report.html").read_text()


def test_without_a_limit_it_only_watches(tmp_path: Path):
    file = config(tmp_path, [0.5, 0.1, 0.1, 0.1, 0.1], [0.1, 0.2, 0.3, 0.2, 0.1], monitor=TEXT, mode="max")
    watched = learn(file, tmp_path, "lightning.callbacks.alignment.params.max_drop=null")
    assert last_checkpoint(watched)["global_step"] == 4
    assert read_embeddings(watched / "checkpoints" / "embeddings_best.pt").info["step"] == 0
    other = learn(file, tmp_path / "2", "lightning.callbacks.alignment.params.max_drop=1.0",
                  "lightning.callbacks.alignment.params.every_n_train_steps=100")  # fmt: skip
    assert torch.equal(vectors(watched)["*"], vectors(other)["*"])


def test_a_resumed_run_remembers_the_initial_word(tmp_path: Path):
    run = learn_until(1, config(tmp_path, [0.5, 0.49, 0.48], [0.1, 0.1, 0.1]), tmp_path)
    state = last_checkpoint(run)["callbacks"]["Alignment"]
    assert state == {"initial": pytest.approx(0.5), "measured_step": 2}
    fallen = "lightning.callbacks.alignment.params.judge.params.text=[0.2,0.2,0.2]"
    run_main("-r", run, fallen)
    assert last_checkpoint(run)["global_step"] == 3


def test_wrong_options_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="max_drop"):
        Alignment(max_drop=2)
    with pytest.raises(ValueError, match="'a red thing'"):
        Alignment(prompts=["a red thing"])
    file = config(tmp_path, [0.5], [0.1])
    with pytest.raises(FileNotFoundError, match="ViT-B-32"):
        learn(file, tmp_path, "lightning.callbacks.alignment.params.judge=ViT-B/32",
              f"+lightning.callbacks.alignment.params.weights={tmp_path / 'ViT-B-32.pt'}")  # fmt: skip
