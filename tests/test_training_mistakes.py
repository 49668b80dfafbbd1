"""What may go wrong around a training: files in the way or gone, configs of the wrong types, stops at odd moments."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import main
from ldm.callbacks.saving import concept_files
from ldm.data.captions import read_metadata
from ldm.data.personalized import PersonalizedBase, find_images
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.run import make_plan
from ldm.util import ConfigError
from tests.tiny_inversion import inversion, inversion_config, learn, learn_until, vectors, words
from tests.tiny_models import text_model
from tests.tiny_run import assert_same_state, only_run, run_main, tiny_config, write_config

pytestmark = pytest.mark.usefixtures("one_thread")
MANAGER = "model.params.personalization_config.params"


def plan_of(config: Path, *more: str) -> Any:
    return make_plan(*main.parse_args(["--base", str(config), *more]))


# -- pictures and captions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("picture", "mask"), [("a.JPG", "a_mask.png"), ("a.png", "a_mask.PNG"), ("a.JPEG", "a_mask.Png")]
)
def test_masks_are_masks_whatever_their_capitals(picture: str, mask: str, tmp_path: Path):
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(tmp_path / picture)
    white = np.zeros((8, 8), np.uint8)
    white[:2] = 255
    Image.fromarray(white).save(tmp_path / mask)
    assert [path.name for path in find_images(tmp_path)] == [picture]
    data = PersonalizedBase(tmp_path, size=8, masks="file", interpolation="nearest", flip_p=0.0)
    assert data[0]["loss_mask"].mean() == 0.25


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", "file_name,text\na.png," + "x" * 200_000),
        ("metadata.jsonl", "[" * 100_000),
        ("m.jsonl", "9" * 5000),
    ],
)
def test_caption_files_that_cannot_be_read_are_named(name: str, text: str, tmp_path: Path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        list(read_metadata(tmp_path / name))


# -- words ---------------------------------------------------------------------------------------------------------


def test_a_word_without_a_list_is_one_word(tmp_path: Path):
    plan = plan_of(inversion(tmp_path), f"{MANAGER}.placeholder_strings=<cat>", f"{MANAGER}.initializer_words=cat")
    params = OmegaConf.select(plan.config, MANAGER)
    assert (params.placeholder_strings, params.initializer_words) == (["<cat>"], ["cat"])
    with pytest.raises(ConfigError, match=r"placeholder_strings is \[1\].*list of words"):
        plan_of(inversion(tmp_path), f"{MANAGER}.placeholder_strings=[1]")
    with pytest.raises(ValueError, match="lists of words, not one text"):
        EmbeddingManager(text_model().cond_stage_model, placeholder_strings="<cat>")


def test_words_with_dollar_signs(tmp_path: Path):
    plan = plan_of(inversion(tmp_path), "--placeholder_string", "${x}")
    assert OmegaConf.select(plan.config, f"{MANAGER}.placeholder_strings")[0] == "${x}"


def test_words_of_like_names_get_files_of_their_own():
    names = list(concept_files(["x-3", "x", "x!"]).values())
    assert len(set(names)) == 3
    assert names[1] == "embeddings_x.pt"


def test_the_initial_word_of_a_file_counts_whatever_the_shapes(tmp_path: Path):
    encoder = text_model().cond_stage_model
    EmbeddingManager(encoder, ["*"], ["sculpture"]).save(tmp_path / "words.pt")
    for vectors_each in (1, 2):
        manager = EmbeddingManager(encoder, ["*"], num_vectors_per_token=vectors_each)
        manager.load(tmp_path / "words.pt")
        assert manager.init_words == {"*": "sculpture"}
        assert manager.initial_embeddings["*"].shape == manager.string_to_param_dict["*"].shape


# -- configs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.target=5", "model.target is 5"),
        ("lightning.callbacks=3", "lightning.callbacks is 3"),
        ("lightning.callbacks.image_logger=3", "lightning.callbacks.image_logger is 3"),
        ("lightning.modelcheckpoint=3", "lightning.modelcheckpoint is 3"),
        ("lightning.logger=3", "lightning.logger is 3"),
        ("seed=1.5", "seed is 1.5; it must be a whole number"),
        ("train=maybe", "train is 'maybe'; it must be true or false"),
        ("scale_lr=maybe", "scale_lr is 'maybe'"),
        ("data.params.batch_size=2.5", "batch_size is 2.5"),
        ("lightning.modelcheckpoint.params.every_n_train_steps=x", "every_n_train_steps is 'x'"),
    ],
)
def test_values_of_the_wrong_type_are_named(change: str, message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        plan_of(inversion(tmp_path), change)


def test_an_empty_model_is_none(tmp_path: Path):
    with pytest.raises(ConfigError, match="no 'model' section"):
        plan_of(write_config(tmp_path / "c.yaml", {"model": None, "data": None}))


def test_callbacks_of_the_trainer_are_not_lost_silently(tmp_path: Path):
    config = inversion_config()
    config["lightning"]["trainer"]["callbacks"] = ["x"]
    with pytest.raises(ConfigError, match="name them under lightning.callbacks"):
        run_main(*words(write_config(tmp_path / "c.yaml", config), tmp_path))


# -- run directories -----------------------------------------------------------------------------------------------


def test_a_run_that_fails_takes_away_only_what_it_made(tmp_path: Path):
    mine = tmp_path / "mine" / "logs"
    mine.mkdir(parents=True)
    for logs in (mine, mine / "deeper" / "still"):
        with pytest.raises(OSError, match="nowhere"):
            run_main("--base", inversion(tmp_path), "--data_root", "/nowhere", "-l", logs)
    assert list(mine.parent.rglob("*")) == [mine]


@pytest.mark.parametrize("place", ["model", "manager"])
def test_a_run_goes_on_without_the_file_that_it_started_from(tmp_path: Path, place: str):
    start = learn(inversion(tmp_path / "a"), tmp_path / "a", "--max_steps", 1) / "checkpoints" / "embeddings.pt"
    shutil.copy(start, tmp_path / "old.pt")
    made = inversion_config()
    params = made["model"]["params"]
    params = params if place == "model" else params["personalization_config"]["params"]
    params["embedding_manager_ckpt"] = str(tmp_path / "old.pt")
    config = write_config(tmp_path / "b" / "inversion.yaml", made)
    whole = learn(config, tmp_path / "whole")
    run = learn_until(2, config, tmp_path / "cut")
    (tmp_path / "old.pt").unlink()
    run_main("-r", run)
    assert torch.equal(vectors(run)["*"], vectors(whole)["*"])


def test_a_run_without_all_of_its_configs_is_not_resumed(tmp_path: Path):
    run = learn(inversion(tmp_path), tmp_path, "--max_steps", 1)
    (file,) = (run / "configs").glob("*-lightning.yaml")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="are not all there; start the run anew"):
        run_main("-r", run)


def test_stopping_between_accumulated_batches_completes_the_step(tmp_path: Path):
    """A clock that ends the run may strike at any batch; gone on with, the run is the one that was not stopped."""
    config = tiny_config()
    config["lightning"]["modelcheckpoint"]["params"]["every_n_train_steps"] = 100
    config["lightning"]["trainer"] |= {"accumulate_grad_batches": 3, "max_steps": 4}
    config["data"]["params"]["train"]["params"]["count"] = 48  # 12 batches an epoch
    file = write_config(tmp_path / "c.yaml", config)
    run_main("-t", "--base", file, "-l", tmp_path / "whole")
    ask = {"target": "tests.tiny_run.AskToStop", "params": {"batch": 5}}
    run_main("-t", "--base", file, "-l", tmp_path / "cut", f"+lightning.callbacks.ask={json.dumps(ask)}")
    run = only_run(tmp_path / "cut")
    run_main("-t", "-r", run, "lightning.callbacks.ask.params.batch=100")
    assert_same_state(only_run(tmp_path / "whole"), run)


def logged_steps(run: Path, column: str) -> list[int]:
    """Steps with a value in a column of the log, over all starts of a run."""
    found = set()
    for path in run.glob("csv/*/metrics.csv"):
        with path.open() as file:
            found |= {int(row["step"]) for row in csv.DictReader(file) if row.get(column)}
    return sorted(found)


def test_a_validation_due_where_the_run_is_stopped_is_not_lost(tmp_path: Path):
    config = tiny_config()
    config["data"]["params"]["validation"] = {"target": "tests.tiny_run.Squares", "params": {"count": 4, "first": 90}}
    config["data"]["params"]["train"]["params"]["count"] = 40
    config["model"]["params"]["monitor"] = "val/loss_simple"
    config["lightning"]["modelcheckpoint"]["params"]["save_top_k"] = -1
    config["lightning"]["trainer"] |= {"val_check_interval": 2, "max_steps": 6, "log_every_n_steps": 1}
    file = write_config(tmp_path / "c.yaml", config)
    run_main("-t", "--base", file, "-l", tmp_path / "whole")
    send = {"target": "tests.tiny_run.SignalAt", "params": {"step": 3, "name": "SIGINT"}}
    with pytest.raises(KeyboardInterrupt):
        run_main("-t", "--base", file, "-l", tmp_path / "cut", f"+lightning.callbacks.send={json.dumps(send)}")
    whole, cut = only_run(tmp_path / "whole"), only_run(tmp_path / "cut")
    run_main("-r", cut)
    assert_same_state(whole, cut)
    for column in ("train/loss", "val/loss_simple"):
        assert logged_steps(cut, column) == logged_steps(whole, column) != []
    names = [sorted(path.name for path in (run / "checkpoints").glob("epoch*")) for run in (whole, cut)]
    assert names[0] == names[1]
    assert len(names[0]) == 3
