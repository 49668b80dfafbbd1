"""Learning a word by main.py: what trains, what is saved, and that it resumes."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

import main
from ldm.cli import BAD_INPUT, run_command
from ldm.modules.embedding_io import EmbeddingFile, read_embeddings, write_embeddings
from tests.conftest import END_TO_END
from tests.tiny_inversion import inversion, inversion_config, learn, learn_until
from tests.tiny_models import TEXT_WEIGHTS
from tests.tiny_run import assert_same_state, last_checkpoint, only_run, run_main, write_config

pytestmark = pytest.mark.usefixtures("one_thread")

SIGINT_BEFORE = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background


@pytest.fixture(scope="module")
def learned(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of an undisturbed inversion."""
    folder = tmp_path_factory.mktemp("learned")
    return learn(inversion(folder), folder)


def test_what_an_inversion_saves(learned: Path):
    assert learned.name.startswith("images2")
    names = {p.name for p in (learned / "checkpoints").iterdir()}
    assert {"last.ckpt", "embeddings.pt", "embeddings_gs-2.pt", "embeddings_gs-4.pt", "embeddings_gs-5.pt"} <= names
    files = [read_embeddings(learned / "checkpoints" / f"embeddings{n}.pt") for n in ("", "_gs-5", "_gs-2")]
    newest, last, early = (file.vectors["*"] for file in files)
    assert torch.equal(newest, last)
    assert not torch.equal(newest, early)
    with Image.open(learned / "images" / "contact_sheet.png") as sheet:
        assert sheet.width > 4 * 100


def test_the_checkpoint_of_a_frozen_model_is_small(learned: Path):
    checkpoint = last_checkpoint(learned)
    assert all(key.startswith("embedding_manager.") for key in checkpoint["state_dict"])
    assert (learned / "checkpoints" / "last.ckpt").stat().st_size < 100_000 < TEXT_WEIGHTS.stat().st_size
    (state,) = checkpoint["optimizer_states"][0]["state"].values()
    assert state["exp_avg"].dtype == torch.float32


def test_an_interrupted_inversion_goes_on_bit_by_bit(learned: Path, tmp_path: Path):
    run = learn_until(2, inversion(tmp_path), tmp_path).rename(tmp_path / "moved")
    assert last_checkpoint(run)["global_step"] == 3
    run_main("-r", run)
    assert_same_state(learned, run)
    ours, theirs = (read_embeddings(r / "checkpoints" / "embeddings.pt").vectors["*"] for r in (run, learned))
    assert torch.equal(ours, theirs)


def test_a_progressive_run_from_a_file_goes_on_bit_by_bit(tmp_path: Path):
    made = inversion_config(embedding_manager_ckpt=str(tmp_path / "start.pt"))
    growing = {"num_vectors_per_token": 3, "progressive_words": True, "progressive_every": 2}
    made["model"]["params"]["personalization_config"]["params"] |= growing
    config = write_config(tmp_path / "progressive.yaml", made)
    write_embeddings(EmbeddingFile({"*": torch.randn(3, 64)}, active={"*": 2}), tmp_path / "start.pt")
    whole, run = learn(config, tmp_path / "whole"), learn_until(2, config, tmp_path)
    assert read_embeddings(whole / "checkpoints" / "embeddings_gs-2.pt").active == {"*": 2}
    (tmp_path / "start.pt").unlink()
    run_main("-r", run)
    assert_same_state(whole, run)


def test_flags_of_an_inversion(tmp_path: Path):
    learned_before = END_TO_END / "embeddings_1vec.pt"
    run = learn(
        inversion(tmp_path), tmp_path, "--placeholder_string", "<thing>", "--init_word", "photo",
        "--max_steps", 1, "--scale_lr", "false", "model.base_learning_rate=0.01", "-n", "named",
    )  # fmt: skip
    file = read_embeddings(run / "checkpoints" / "embeddings.pt")
    assert list(file.vectors) == ["<thing>"]
    assert file.init_words == {"<thing>": "photo"}
    again = learn(inversion(tmp_path), tmp_path / "2", "--embedding_manager_ckpt", learned_before, "--max_steps", 1)
    start = read_embeddings(learned_before).vectors["*"]
    after = read_embeddings(again / "checkpoints" / "embeddings.pt").vectors["*"]
    assert 0 < float((after - start).abs().max()) < 0.05


def test_unfrozen_model_saves_its_weights(tmp_path: Path):
    config = inversion(tmp_path, unfreeze_model=True, model_lr=1e-4)
    run = learn(config, tmp_path, "--max_steps", 2, "lightning.callbacks.mode_swap_callback.params.swap_step=1")
    state = last_checkpoint(run)["state_dict"]
    assert any(key.startswith("model.diffusion_model.") for key in state)
    rates = [group["lr"] for group in last_checkpoint(run)["optimizer_states"][0]["param_groups"]]
    assert rates == [0.01, 1e-4]


def test_captions_without_the_word_are_noticed(tmp_path: Path):
    with pytest.raises(ValueError, match=r"(?i)placeholder"):
        learn(inversion(tmp_path), tmp_path, "+data.params.train.params.templates=['a photo']")


def test_a_run_without_steps_says_so(learned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    learn(inversion(tmp_path), tmp_path, "--max_steps", 0)
    assert "No step was trained: the run stands at step 0" in caplog.text
    caplog.clear()
    before = last_checkpoint(learned)["global_step"]
    run_main("-r", learned)  # it has reached its end
    assert f"No step was trained: the run stands at step {before}" in caplog.text


def test_an_unknown_initial_word(tmp_path: Path):
    with pytest.raises(ValueError, match="initial word 'zyzzyva'"):
        learn(inversion(tmp_path), tmp_path, "--init_word", "zyzzyva")


def test_five_pictures_one_of_them_broken(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = tmp_path / "pictures"
    shutil.copytree(END_TO_END / "images", folder)
    (folder / "4.png").write_bytes((folder / "0.png").read_bytes()[:300])
    (folder / "a.heic").write_bytes(b"no picture")
    run_main("--base", inversion(tmp_path), "--data_root", folder, "-l", tmp_path / "logs", "--max_steps", 1)
    (line,) = [line for line in caplog.text.splitlines() if "skipped" in line]
    assert "4.png (is truncated or damaged" in line
    assert "a.heic (is not an image that can be read (convert it to JPEG or PNG))" in line
    assert read_embeddings(only_run(tmp_path / "logs") / "checkpoints" / "embeddings.pt").info["step"] == 1


@pytest.mark.parametrize("case", ["empty", "captions", "other_model", "hostile"])
def test_broken_input_is_one_sentence_and_leaves_nothing_behind(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(END_TO_END / "images", tmp_path / "images")
    (tmp_path / "empty").mkdir()
    for picture in (tmp_path / "images").glob("*.png"):
        picture.with_suffix(".txt").write_text("a photo of a cat")
    write_embeddings(EmbeddingFile({"*": torch.ones(1, 768)}), tmp_path / "clip.pt")
    torch.save({"string_to_param": {"*": Hostile()}}, tmp_path / "hostile.pt")
    more, message = {
        "empty": (["--data_root", "empty"], "empty holds no picture"),
        "captions": (["data.params.train.params.captions=sidecar"], "lacks the placeholder '*'"),
        "other_model": (["--embedding_manager_ckpt", "clip.pt"], "width 768 (Stable Diffusion 1"),
        "hostile": (["--embedding_manager_ckpt", "hostile.pt"], "hostile.pt would run code"),
    }[case]
    command = ["--base", str(inversion(tmp_path)), "--data_root", "images", *more]
    with pytest.raises(SystemExit) as exit_info:
        run_command(main.main, command)
    assert exit_info.value.code == BAD_INPUT
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "logs").exists()
    assert not (tmp_path / "executed").exists()


class Hostile:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


def test_signals_are_given_back(learned: Path):
    del learned
    assert signal.getsignal(signal.SIGINT) is SIGINT_BEFORE
