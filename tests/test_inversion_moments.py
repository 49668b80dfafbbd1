"""The first stage runs once per picture: the same numbers, and no first stage in memory afterwards."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from ldm.callbacks.moments import Dropped, MomentsCache
from ldm.data.concepts import ConceptMix
from ldm.data.datamodule import WrappedDataset
from ldm.data.moments_cache import cache_moments, concepts_of, obstacle
from ldm.data.personalized import PersonalizedBase
from ldm.util import instantiate_from_config
from tests.conftest import END_TO_END, assert_close
from tests.tiny_inversion import inversion, learn, losses, vectors
from tests.tiny_models import text_model, vq_stage

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = END_TO_END / "images"
CACHE = "lightning.callbacks.moments_cache.params"
VALIDATION = {"target": "ldm.data.personalized.PersonalizedBase", "params": {"size": 32, "set": "val"}}


class Watch(pl.Callback):
    """Keeps the module, to look at it after the run; `decodes` says whether it needs the decoder."""

    module: Any = None

    def __init__(self, decodes: bool = False) -> None:
        self.needs_decoder = decodes

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        Watch.module = pl_module


def run(folder: Path, *more: Any, decodes: bool = False, **params: Any) -> Path:
    watch = {"target": "tests.test_inversion_moments.Watch", "params": {"decodes": decodes}}
    return learn(inversion(folder, **params), folder, f"lightning.callbacks.watch={watch}",
                 f"data.params.validation={VALIDATION}", "lightning.trainer.log_every_n_steps=1", *more)  # fmt: skip


@pytest.fixture(scope="module")
def cached(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An inversion with the cache, and its module."""
    return run(tmp_path_factory.mktemp("cached")), Watch.module


def test_losses_and_vectors_are_those_without_the_cache(cached: tuple[Path, Any], tmp_path: Path):
    plain = run(tmp_path, f"{CACHE}.disabled=true")
    assert not any(isinstance(part, Dropped) for part in Watch.module.modules())
    assert len(losses(plain)) == 5
    assert_close(losses(cached[0]), torch.tensor(losses(plain)))
    assert_close(vectors(cached[0])["*"], vectors(plain)["*"])


def test_what_nothing_needs_is_dropped(cached: tuple[Path, Any], tmp_path: Path):
    stage = cached[1].first_stage_model
    assert not list(stage.parameters())
    assert isinstance(stage.decoder, Dropped)
    with pytest.raises(RuntimeError, match=r"moments_cache\.params\.drop=false"):
        stage.decode(torch.zeros(1, 4, 8, 8))
    run(tmp_path, "--max_steps", 1, decodes=True)
    stage = Watch.module.first_stage_model
    assert isinstance(stage.encoder, Dropped)
    assert stage.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 32, 32)


def test_a_model_that_trains_keeps_its_first_stage_for_the_checkpoint(tmp_path: Path):
    run(tmp_path, "--max_steps", 1, unfreeze_model=True, model_lr=1e-4)
    assert not any(isinstance(part, Dropped) for part in Watch.module.modules())


def test_random_crops_run_the_first_stage_in_every_step(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        run(tmp_path, "--max_steps", 1, "+data.params.train.params.crop=random")
    assert "runs in every step on the train pictures: crop 'random'" in caplog.text
    assert not any(isinstance(part, Dropped) for part in Watch.module.modules())


def test_moments_go_with_the_flip_and_the_picture():
    def encode(pictures: np.ndarray) -> np.ndarray:
        return pictures.transpose(0, 3, 1, 2)

    dataset = PersonalizedBase(IMAGES, size=8, repeats=5)
    assert cache_moments(dataset, encode, 10**6)
    items = [dataset[i] for i in range(len(dataset))]
    assert all(np.array_equal(item["moments"], item["image"].transpose(2, 0, 1)) for item in items)
    assert len({item["moments"].tobytes() for item in items}) == 8  # four pictures and their mirror images
    unflipped = PersonalizedBase(IMAGES, size=8, flip_p=0.0)
    calls: list[Any] = []
    cache_moments(unflipped, lambda p: calls.append(p) or encode(p), 10**6)  # type: ignore[func-returns-value]
    assert len(calls) == 4
    assert not cache_moments(PersonalizedBase(IMAGES, size=8), encode, 1000)
    assert not cache_moments(PersonalizedBase(IMAGES, size=8), lambda p: None, 10**6)


def test_which_data_can_be_cached():
    mix = ConceptMix(
        {"target": "ldm.data.personalized.PersonalizedBase", "params": {"size": 8}}, [IMAGES, IMAGES], ["<a>", "<b>"]
    )
    assert len(concepts_of(WrappedDataset(mix))) == 2
    assert concepts_of([1, 2]) == []
    assert obstacle(PersonalizedBase(IMAGES, size=8, crop="center")) is None
    assert "own sizes" in str(obstacle(PersonalizedBase(IMAGES)))


def test_first_stages_without_moments_are_left_alone():
    model = text_model()
    pictures = PersonalizedBase(IMAGES, size=32).version(0, False)[None]
    moments = MomentsCache()._encode(model, pictures)
    assert moments is not None
    assert moments.shape == (1, 8, 8, 8)
    model.first_stage_model = instantiate_from_config(vq_stage())
    assert MomentsCache()._encode(model, pictures) is None


def test_equal_captions_are_encoded_once():
    model = text_model()
    texts = ["a photo of a cat", "a cat", "a photo of a cat", "a photo of a cat"]
    one_by_one = torch.cat([model.cond_stage_model.encode([text]) for text in texts])
    seen: list[int] = []
    encode = model.cond_stage_model.encode
    model.cond_stage_model.encode = lambda t, **options: seen.append(len(t)) or encode(t, **options)
    assert_close(model.get_learned_conditioning(texts), one_by_one)
    model.cond_stage_model.train()
    model.get_learned_conditioning(texts)
    assert seen == [2, 4]  # dropout would tell equal captions apart


def test_masks_weight_the_loss():
    model = text_model()
    batch = {"moments": torch.zeros(1, 8, 8, 8), "caption": ["a cat"]}
    hidden = torch.zeros(1, 32, 32)
    hidden[:, :16] = 1
    latents, _, mask = model.prepare_batch({**batch, "loss_mask": hidden})
    assert latents.shape == (1, 4, 8, 8)
    assert mask.shape == (1, 1, 8, 8)
    assert mask[..., :4, :].min() == 1
    assert mask[..., 4:, :].max() == 0
    assert model.prepare_batch(batch)[2] is None
