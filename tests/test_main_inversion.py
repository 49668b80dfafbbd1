"""Learning a word by main.py: what trains, what is saved, and that it resumes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.modules.embedding_io import read_embeddings
from tests.conftest import END_TO_END
from tests.tiny_inversion import inversion, words
from tests.tiny_models import TEXT_WEIGHTS
from tests.tiny_run import assert_same_state, last_checkpoint, only_run, run_main

pytestmark = pytest.mark.usefixtures("one_thread")

SIGINT_BEFORE = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background


@pytest.fixture(scope="module")
def learned(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of an undisturbed inversion."""
    folder = tmp_path_factory.mktemp("learned")
    run_main(*words(inversion(folder), folder))
    return only_run(folder / "logs")


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
    send = {"target": "tests.tiny_run.SignalAt", "params": {"step": 2, "name": "SIGINT"}}
    with pytest.raises(KeyboardInterrupt):
        run_main(*words(inversion(tmp_path), tmp_path), f"+lightning.callbacks.send={send}")
    run = only_run(tmp_path / "logs").rename(tmp_path / "moved")
    assert last_checkpoint(run)["global_step"] == 3
    run_main("-r", run)
    assert_same_state(learned, run)
    ours, theirs = (read_embeddings(r / "checkpoints" / "embeddings.pt").vectors["*"] for r in (run, learned))
    assert torch.equal(ours, theirs)


def test_flags_of_an_inversion(tmp_path: Path):
    learned_before = END_TO_END / "embeddings_1vec.pt"
    run_main(
        *words(inversion(tmp_path), tmp_path), "--placeholder_string", "<thing>", "--init_word", "photo",
        "--max_steps", 1, "--scale_lr", "false", "model.base_learning_rate=0.01", "-n", "named",
    )  # fmt: skip
    run = only_run(tmp_path / "logs")
    file = read_embeddings(run / "checkpoints" / "embeddings.pt")
    assert list(file.vectors) == ["<thing>"]
    assert file.init_words == {"<thing>": "photo"}
    run_main(*words(inversion(tmp_path), tmp_path / "2"), "--embedding_manager_ckpt", learned_before, "--max_steps", 1)
    start = read_embeddings(learned_before).vectors["*"]
    after = read_embeddings(only_run(tmp_path / "2" / "logs") / "checkpoints" / "embeddings.pt").vectors["*"]
    assert 0 < float((after - start).abs().max()) < 0.05


def test_unfrozen_model_saves_its_weights(tmp_path: Path):
    config = inversion(tmp_path, unfreeze_model=True, model_lr=1e-4)
    run_main(*words(config, tmp_path), "--max_steps", 2, "lightning.callbacks.mode_swap_callback.params.swap_step=1")
    run = only_run(tmp_path / "logs")
    state = last_checkpoint(run)["state_dict"]
    assert any(key.startswith("model.diffusion_model.") for key in state)
    rates = [group["lr"] for group in last_checkpoint(run)["optimizer_states"][0]["param_groups"]]
    assert rates == [0.01, 1e-4]


def test_captions_without_the_word_are_noticed(tmp_path: Path):
    with pytest.raises(ValueError, match=r"(?i)placeholder"):
        run_main(
            *words(inversion(tmp_path), tmp_path), "+data.params.train.params.templates=['a photo']",
        )  # fmt: skip


def test_an_unknown_initial_word(tmp_path: Path):
    with pytest.raises(ValueError, match="initial word 'zyzzyva'"):
        run_main(*words(inversion(tmp_path), tmp_path), "--init_word", "zyzzyva")


def test_signals_are_given_back(learned: Path):
    del learned
    assert signal.getsignal(signal.SIGINT) is SIGINT_BEFORE
