"""The scorer: unit vectors, questions, saving, training, and what the shipped weights know."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.scorer import STYLES, Scorer, load_scorer, save_scorer
from evaluation.scorer_data import BACKGROUNDS, Pictures, cached_pictures, compose, compressed, disturb
from evaluation.scorer_figures import figure, pair_similarities, swap_object
from evaluation.scorer_training import Batches, TrainOptions, learning_rate, losses, pair_loss, train, vocabulary
from ldm.data.emoji import COLOURS, STYLE_PHRASES, Sprites
from ldm.modules.encoders.bert import WordPieceTokenizer
from tests.conftest import DATA

ROOT = DATA.parents[1]
SHIPPED = ROOT / "models" / "scorer" / "emoji64"
needs_weights = pytest.mark.skipif(not (SHIPPED / "model.safetensors").is_file(), reason="no scorer is shipped")
PARAMS = {"embed_dim": 32, "image_size": 16, "widths": [8, 16], "depths": [0, 1], "text_width": 16, "text_layers": 1,
          "text_heads": 2, "max_length": 24}  # fmt: skip
OPTIONS = TrainOptions(
    steps=14, name_steps=4, easy_steps=2, name_batch=16, objects=8, lr=3e-3, name_lr=3e-3, warmup=1, bf16=False
)


@pytest.fixture(scope="module")
def sprites() -> Sprites:
    with np.load(DATA / "sprites" / "sprites.npz") as file:
        return Sprites(file["pixels"], file["names"].tolist(), file["styles"].tolist())


@pytest.fixture(scope="module")
def pictures(sprites: Sprites) -> Pictures:
    return compose(sprites, 96, seed=3, size=16)


@pytest.fixture(scope="module")
def pieces(sprites: Sprites) -> torch.Tensor:
    return vocabulary(WordPieceTokenizer(), sprites.names)


@pytest.fixture
def scorer(pieces: torch.Tensor) -> Scorer:
    torch.manual_seed(0)
    tiny = Scorer(vocab_size=len(pieces), **PARAMS)
    tiny.pieces.copy_(pieces)
    return tiny.eval()


@pytest.fixture(scope="module")
def shipped() -> Scorer:
    return load_scorer()


def test_vectors_have_length_one(scorer: Scorer):
    vectors = [scorer.encode_image(torch.rand(3, 3, 20, 30) * 2 - 1), scorer.encode_text(["a cat", "", "qwxyz " * 99])]
    for part in vectors:
        assert part.shape == (3, 32)
        torch.testing.assert_close(part.norm(dim=-1), torch.ones(3))


def test_a_text_means_the_same_beside_longer_ones(scorer: Scorer):
    alone, beside = scorer.encode_text("a cat")[0], scorer.encode_text(["a cat", "a photo of two cats on grass"])[0]
    torch.testing.assert_close(alone, beside)


def test_captions_have_no_unknown_word_but_others_do(scorer: Scorer, pictures: Pictures):
    rows, keep = scorer.tokenize(pictures.captions)
    assert (rows[keep] > 0).all()
    rows, _ = scorer.tokenize(["a cat juggling"])
    assert (rows[0] > 0).tolist()[:2] == [True, True]
    assert (rows[0] == 0).any()


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 8, 8, 3)])
def test_pictures_of_another_layout_are_refused(scorer: Scorer, shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"expected pictures of shape \(B, 3, H, W\)"):
        scorer.encode_image(torch.zeros(shape))


def test_ranks_count_the_better_candidates(scorer: Scorer, monkeypatch: pytest.MonkeyPatch):
    known = {"cat": 0.9, "dog": 0.5, "pig": 0.7, "cow": 0.1}
    monkeypatch.setattr(
        Scorer, "object_scores", lambda self, x, names: torch.tensor([[known[n] for n in names]] * len(x))
    )
    images = torch.zeros(3, 3, 16, 16)
    assert scorer.rank_objects(images, ["cat", "dog", "cow"], ["dog", "pig", "cow"]).tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="3 pictures need as many objects, got 1"):
        scorer.rank_objects(images, ["cat"], ["dog"])


def test_answers_are_words_of_the_world(scorer: Scorer):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert set(scorer.name_background(images)) <= set(COLOURS)
    assert set(scorer.name_style(images)) <= set(STYLE_PHRASES)
    assert set(scorer.name_style(images, ["openmoji"])) == {"openmoji"}
    with pytest.raises(ValueError, match="'cubism' is none of fluent-3d"):
        scorer.name_style(images, ["cubism"])


def test_save_and_load(scorer: Scorer, pieces: torch.Tensor, tmp_path: Path):
    save_scorer(scorer, tmp_path, {**PARAMS, "vocab_size": len(pieces)})
    again = load_scorer(tmp_path)
    images, texts = torch.rand(2, 3, 16, 16) * 2 - 1, ["a photo of a cat", "a sticker of a red rocket at night"]
    assert (again.encode_image(images) * scorer.encode_image(images)).sum(1).min() > 0.999  # 16 bits on disk
    assert (again.encode_text(texts) * scorer.encode_text(texts)).sum(1).min() > 0.999
    assert not any(p.requires_grad for p in again.parameters())
    with pytest.raises(FileNotFoundError, match=r"scripts/train_scorer.py makes one"):
        load_scorer(tmp_path / "elsewhere")


def test_training_lowers_the_loss_and_resumes_exactly(
    scorer: Scorer, pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    start = {k: v.clone() for k, v in scorer.state_dict().items()}
    torch.manual_seed(0)
    history = train(scorer, pictures, OPTIONS, tmp_path / "whole")
    assert len(history) == 14
    assert np.mean(history[-3:]) < np.mean(history[4:7]) - 0.3
    whole = {k: v.clone() for k, v in scorer.state_dict().items()}

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    often = dataclasses.replace(OPTIONS, save_minutes=0.0)
    scorer.load_state_dict(start)
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr("evaluation.scorer_training.LOG_EVERY", 5)
        patch.setattr("evaluation.scorer_training.Run.log", killed)
        with pytest.raises(KeyboardInterrupt):
            train(scorer, pictures, often, tmp_path / "broken")
    scorer.load_state_dict(start)
    assert len(train(scorer, pictures, OPTIONS, tmp_path / "broken")) == 10  # the kill came before step 5 was saved
    for name, value in scorer.state_dict().items():
        torch.testing.assert_close(value, whole[name], rtol=0, atol=0)
    assert (tmp_path / "whole" / "log.csv").read_text().startswith("step,seconds,loss,heads,clip")


def test_learning_rate_rises_stays_and_falls():
    options = TrainOptions(steps=140, name_steps=40, name_lr=2.0, lr=1.0, warmup=10, decay=0.5)
    rates = [round(learning_rate(step, options), 2) for step in (0, 9, 39, 40, 49, 70, 90, 115, 139)]
    assert rates == [0.2, 2, 2, 0.1, 1, 1, 1, 0.5, 0.02]


def test_the_first_batches_are_small_pictures_of_large_single_objects(scorer: Scorer, pictures: Pictures):
    batches = Batches(scorer, pictures, OPTIONS)
    assert batches.draw(0)["images"].shape == (16, 3, 8, 8)
    assert set(batches.draw(3)) == {"images", "labels"}
    captions = [pictures.captions[i] for i in batches.easy]
    assert 0 < len(captions) < len(pictures)
    assert not any(word in caption.split() for caption in captions for word in ("two", "three", "small", "left"))


def test_batches_pair_objects_and_label_what_is_shown(scorer: Scorer, pictures: Pictures):
    batches = Batches(scorer, pictures, OPTIONS)
    batch, again = batches.draw(5), batches.draw(5)
    torch.testing.assert_close(batch["images"], again["images"], rtol=0, atol=0)
    assert batch["images"].shape == (16, 3, 16, 16)
    assert batch["prompt_labels"][:, 0].tolist() == [*range(8), *range(8)]
    assert torch.equal(batch["labels"][:8, 0], batch["labels"][8:, 0])
    assert torch.equal(batch["labels"][:, 1:3], batch["prompt_labels"][:, 1:])
    assert batch["counts"] == (8, len(STYLES), len(BACKGROUNDS))
    assert len(batch["prompts"][0]) == sum(batch["counts"])


def test_losses_are_least_for_vectors_that_match(scorer: Scorer, pictures: Pictures):
    eye = torch.eye(4)
    assert pair_loss(torch.cat([eye, eye])) < 1e-3 < 1 < pair_loss(torch.cat([eye, eye.roll(1, 0)]))
    batches = Batches(scorer, pictures, OPTIONS)
    heads = torch.nn.ModuleList(torch.nn.Linear(16, count) for count in batches.classes)
    parts = losses(scorer, heads, batches.draw(4), OPTIONS)
    total = parts["clip"] + 0.5 * (parts["heads"] + parts["label"] + parts["pair"])
    torch.testing.assert_close(parts["loss"], total)


def test_disturbed_pictures_stay_pictures_of_the_same():
    images = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(1)).mul(2).sub(1)
    images = torch.nn.functional.interpolate(images, (64, 64), mode="bilinear")
    changed = disturb(images, torch.Generator().manual_seed(0))
    assert changed.shape == images.shape
    assert changed.abs().max() <= 1
    assert not torch.equal(changed, images)
    assert (changed - images).abs().mean() < 0.3
    torch.testing.assert_close(disturb(images, torch.Generator().manual_seed(0)), changed)
    torch.testing.assert_close(compressed(images, torch.full((4, 1, 1, 1), 1e-6)), images, rtol=0, atol=1e-4)


def test_pictures_are_composed_once(sprites: Sprites, tmp_path: Path):
    for file in ("train", "held_out", "style"):
        np.save(tmp_path / f"{file}.npy", sprites.pixels[:2])
        index = {"names": sprites.names[:2], "styles": sprites.styles[:2]}
        (tmp_path / f"{file}.json").write_text(json.dumps(index))
    first = cached_pictures(tmp_path / "cache", tmp_path, 5, seed=1)
    (tmp_path / "train.npy").unlink()
    again = cached_pictures(tmp_path / "cache", tmp_path, 5, seed=1)
    assert again.captions == first.captions
    assert np.array_equal(again.pixels, first.pixels)
    assert first.images([0, 1]).shape == (2, 3, 64, 64)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a sticker of a red cat on grass", "a sticker of a red owl on grass"),
        ("a photo of a cat", "a photo of an owl"),
        ("three blue cats on a red background", "three blue owls on a red background"),
        ("a doodle of two cats", "a doodle of two owls"),
    ],
)
def test_swapped_objects_fit_the_sentence(caption: str, expected: str):
    assert swap_object(caption, "cat", "owl") == expected


def test_figures_come_with_intervals_over_objects():
    alone = figure("x", [1.0] * 50 + [0.0] * 50, [str(i) for i in range(100)])
    together = figure("x", [1.0] * 50 + [0.0] * 50, ["a"] * 50 + ["b"] * 50)
    assert alone.mean == together.mean == 0.5
    assert 0.35 < alone.low < 0.45 < 0.55 < alone.high < 0.65
    assert (together.low, together.high) == (0.0, 1.0)


def test_pair_similarities_keep_objects_and_settings_apart():
    vectors = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.6, 0.8]])
    shown = Pictures(np.zeros((4, 8, 8, 3), np.uint8), ["a"] * 4, ["cat", "cat", "owl", "owl"], [""] * 4,
                     ["noto", "fluent-3d"] * 2, ["plain:red", "plain:blue"] * 2)  # fmt: skip
    same, different, setting, above = pair_similarities(vectors, shown)
    np.testing.assert_allclose(same, [0.8] * 4, atol=1e-6)
    np.testing.assert_allclose(different, [0.3, 0.78, 0.3, 0.78], atol=1e-6)
    np.testing.assert_allclose(setting, [0.0, 0.96, 0.0, 0.96], atol=1e-6)
    assert above == [1.0, 0.5, 1.0, 0.5]
    alone = dataclasses.replace(shown, styles=["noto"] * 4)
    assert np.isnan(pair_similarities(vectors, alone)[0]).all()
    assert figure("x", [1.0, float("nan")], ["cat", "owl"]).count == 1


@needs_weights
def test_shipped_file_is_small_and_loads_fast():
    assert (SHIPPED / "model.safetensors").stat().st_size < 20e6
    load_scorer()
    begun = time.process_time()
    load_scorer()
    assert time.process_time() - begun < 1


@needs_weights
def test_shipped_scorer_knows_objects_backgrounds_and_styles(shipped: Scorer, sprites: Sprites):
    plain = {"p_scene": 0.0, "p_pattern": 0.0, "p_gradient": 0.0, "p_two_kinds": 0.0, "p_small": 0.0, "p_tint": 0.0}
    pictures = compose(sprites, 48, seed=77, grammar=plain)
    images = pictures.images(slice(None))
    ranks = shipped.rank_objects(images, pictures.names, sorted(set(sprites.names)))
    assert (ranks == 1).float().mean() >= 0.9
    grounds = [f"plain:{colour}" for colour in shipped.name_background(images)]
    assert np.mean([a == b for a, b in zip(grounds, pictures.backgrounds, strict=True)]) >= 0.9
    styles = shipped.name_style(images)
    assert np.mean([a == b for a, b in zip(styles, pictures.styles, strict=True)]) >= 0.8
    same, different, setting, _ = pair_similarities(shipped.encode_image(images), pictures)
    assert np.mean(same) > max(np.mean(setting), np.mean(different)) + 0.3


def test_help_is_quick_and_needs_no_data():
    command = [sys.executable, str(ROOT / "scripts" / "train_scorer.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "--evaluate" in result.stdout
