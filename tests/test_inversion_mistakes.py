"""What a user may ask for by mistake when learning a word: refused or said in a sentence, nothing lost."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import main
from ldm.data.captions import read_captions
from ldm.data.personalized import PersonalizedBase, find_images, resolve_templates
from ldm.run import make_plan
from ldm.training import reserve
from tests.conftest import END_TO_END
from tests.tiny_inversion import inversion, inversion_config, learn, words
from tests.tiny_run import only_run, run_main, write_config

pytestmark = pytest.mark.usefixtures("one_thread")
MANAGER = "model.params.personalization_config.params"
DATA = "data.params.train.params"
MONITOR = "lightning.callbacks.fixed_validation.params"
IMAGES = END_TO_END / "images"


@pytest.fixture(scope="module")
def run(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    return learn(inversion(folder), folder, "--max_steps", 2)


def pictures(folder: Path) -> Path:
    shutil.copytree(IMAGES, folder)
    return folder


# -- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--placeholder_string", "<y>"], "a resumed run keeps its words"),
        (["--init_word", "photo"], "the initial word of a resumed run cannot change"),
    ],
)
def test_a_resumed_run_keeps_its_words(flags: list[str], message: str, run: Path):
    before = {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    with pytest.raises(ValueError, match=message):
        run_main("-r", run, *flags, "--max_steps", 3)
    assert {path.name: path.read_bytes() for path in (run / "checkpoints").iterdir()} == before


def test_a_file_of_words_is_no_run_to_resume(run: Path):
    with pytest.raises(ValueError, match="--embedding_manager_ckpt a file of words"):
        run_main("-r", run / "checkpoints" / "embeddings.pt")


def test_a_run_that_stopped_early_goes_on(tmp_path: Path):
    fixed = [f"{MONITOR}.patience=2", f"{MONITOR}.every_n_train_steps=1", f"{MONITOR}.min_delta=100"]
    learn(inversion(tmp_path), tmp_path, *fixed, "--max_steps", 9)
    stopped = only_run(tmp_path / "logs")
    assert (stopped / "checkpoints" / "embeddings_gs-2.pt").is_file()
    run_main("-r", stopped, "--max_steps", 9)
    assert (stopped / "checkpoints" / "embeddings_gs-4.pt").is_file()  # two more evaluations, not one


# -- settings that contradict one another --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([f"+{DATA}.per_image_tokens=true"], "per_image_tokens is False in .*but True in"),
        ([f"+{MANAGER}.per_image_tokens=true"], "per_image_tokens is True in .*but False in"),
        ([f"{MONITOR}.monitor=val/typo"], "'val/typo' is never measured"),
        ([f"+{MANAGER}.num_vectors_per_token=80"], "a prompt has room for"),
        (["--init_word", " "], "--init_word is empty"),
        ([f"{DATA}.size=30"], "height 30 is no multiple of"),
    ],
)
def test_contradictions_are_refused_before_the_first_step(more: list[str], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        run_main(*words(inversion(tmp_path), tmp_path), *more)
    assert not list(tmp_path.glob("logs/*/checkpoints/*"))


def test_a_word_that_no_caption_has_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = inversion_config()
    manager = config["model"]["params"]["personalization_config"]["params"]
    manager |= {"placeholder_strings": ["*", "<x>"], "initializer_words": ["sculpture", "sculpture"]}
    learn(write_config(tmp_path / "two.yaml", config), tmp_path, "--max_steps", 2)
    assert "'<x>' got no gradient in 2 steps" in caplog.text
    assert "'*'" not in caplog.text


# -- pictures, masks and captions ----------------------------------------------------------------------------------


def test_a_black_mask_is_named(tmp_path: Path):
    folder = pictures(tmp_path / "masked")
    first = find_images(folder)[0]
    with Image.open(first) as image:
        Image.new("L", image.size).save(folder / f"{first.stem}_mask.png")
    dataset = PersonalizedBase(folder, size=32, masks="auto")
    with pytest.raises(ValueError, match=f"{first.stem}_mask.png: the mask is black all over"):
        dataset[0]


def test_folders_in_the_place_of_pictures_are_named(tmp_path: Path):
    pictures(tmp_path / "all" / "cat")
    with pytest.raises(ValueError, match=r"has folders \(cat\): --concepts learns a word for each"):
        find_images(tmp_path / "all")


def test_a_caption_with_the_word_inside_another_is_refused(tmp_path: Path):
    folder = pictures(tmp_path / "captioned")
    for path in find_images(folder):
        path.with_suffix(".txt").write_text("concatenated things")
    with pytest.raises(ValueError, match="has 'cat' only as a part of another word"):
        run_main("--base", inversion(tmp_path), "--data_root", folder, "-l", tmp_path / "logs",
                 "--placeholder_string", "cat", f"+{DATA}.captions=sidecar")  # fmt: skip


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "a.txt"])
def test_caption_files_from_windows(name: str, tmp_path: Path):
    text = {
        "metadata.csv": "file_name,text\na.png,a cat é\n",
        "metadata.jsonl": '{"file_name": "a.png", "text": "a cat é"}',
        "a.txt": "a cat é",
    }[name]
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert read_captions(tmp_path, [tmp_path / "a.png"]) == {"a.png": "a cat é"}
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=f"{name} is no UTF-8 text"):
        read_captions(tmp_path, [tmp_path / "a.png"])


def test_templates_are_sentences():
    with pytest.raises(ValueError, match="not 1"):
        resolve_templates([1, 2], "object")  # type: ignore[list-item]


# -- more than the word trains -------------------------------------------------------------------------------------


def test_a_model_that_explodes_replaces_no_checkpoint(tmp_path: Path):
    config = inversion(tmp_path, unfreeze_model=True, model_lr=1e30)
    with pytest.raises(ValueError, match="are not finite after step"):
        learn(config, tmp_path, "lightning.modelcheckpoint.params.every_n_train_steps=1")
    (folder,) = tmp_path.glob("logs/*/checkpoints")
    assert not (folder / "model.safetensors").exists()
    for file in folder.glob("last.ckpt"):
        state = torch.load(file, weights_only=True)["state_dict"]
        assert all(tensor.isfinite().all() for tensor in state.values())


def test_a_tuned_model_is_watched_and_reported_like_a_word(tmp_path: Path):
    run = learn(inversion(tmp_path, unfreeze_model=True, model_lr=1e-5), tmp_path, "--max_steps", 2)
    for name in ("report.html", "checkpoints/embeddings_best.pt", "checkpoints/model.safetensors"):
        assert (run / name).is_file()


def test_a_short_try_of_a_shipped_config(tmp_path: Path):
    run_main("--base", "configs/finetune.yaml", "--data_root", IMAGES, "-l", tmp_path / "logs", "--fast_dev_run", 1)
    assert not list(tmp_path.glob("logs/*/checkpoints/*"))


# -- run directories -----------------------------------------------------------------------------------------------


def test_two_runs_of_one_second_get_a_directory_each(tmp_path: Path):
    now = datetime.datetime(2026, 1, 1)
    plans = [make_plan(*main.parse_args([str(word) for word in words(inversion(tmp_path), tmp_path)]), now=now)
             for _ in range(2)]  # fmt: skip
    assert plans[0].run_dir == plans[1].run_dir  # neither is there yet
    folders = [reserve(plan).run_dir for plan in plans]
    assert folders[1].name == f"{folders[0].name}-2"
    assert all(folder.is_dir() for folder in folders)


def test_a_run_that_cannot_start_leaves_no_directory(tmp_path: Path):
    with pytest.raises(ValueError, match="not in the text encoder's vocabulary"):
        run_main(*words(inversion(tmp_path), tmp_path), "--init_word", "☃☃")
    assert not (tmp_path / "logs").exists()
