"""Tuning the model along with the word: stages, learning rates, and the tuned model as files that load."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ldm.generate import load_model
from ldm.generate_words import load_words
from tests.tiny_inversion import inversion, learn, vectors, words
from tests.tiny_models import TEXT_WEIGHTS
from tests.tiny_run import assert_same_state, last_checkpoint, only_run, run_main

pytestmark = pytest.mark.usefixtures("one_thread")
SWAP = "lightning.callbacks.mode_swap_callback.params.swap_step"
STOP = "lightning.callbacks.stop"
MODEL, WORD = "model.diffusion_model.", "embedding_manager."


def pivotal(folder: Path, *more: Any) -> list[Any]:
    """Command line of five steps: the word in steps 1 to 3, then the model in steps 4 and 5."""
    return [*words(inversion(folder, unfreeze_model=True, model_lr=1e-4), folder), f"{SWAP}=3", *more]


@pytest.fixture(scope="module")
def tuned(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run directory of pivotal tuning, and what it said."""
    folder = tmp_path_factory.mktemp("tuned")
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ldm")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        run_main(*pivotal(folder, "lightning.modelcheckpoint.params.every_n_train_steps=1"))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return only_run(folder / "logs"), "\n".join(said)


def test_first_the_word_then_the_model(tuned: tuple[Path, str]):
    run = tuned[0]
    by_step = [vectors(run, f"embeddings_gs-{step}.pt")["*"] for step in range(1, 6)]
    assert not torch.equal(by_step[1], by_step[2])
    assert torch.equal(by_step[2], by_step[4])
    before, after = load_file(TEXT_WEIGHTS), load_file(run / "checkpoints" / "model.safetensors")
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert {name for name in changed if name.startswith(MODEL)}
    assert not {name for name in changed if name.startswith("first_stage_model.")}
    moments = last_checkpoint(run)["optimizer_states"][0]["state"]
    assert moments[0]["step"] == 3
    assert {int(state["step"]) for number, state in moments.items() if number} == {2}


def test_both_learning_rates_are_printed(tuned: tuple[Path, str]):
    assert "Learning rate 0.01 = 1 (accumulate_grad_batches) x 1 (devices) x 2 (batch size) x 0.005" in tuned[1]
    assert "Learning rate of the model itself 0.0001 (model_lr, not scaled)" in tuned[1]
    rates = [group["lr"] for group in last_checkpoint(tuned[0])["optimizer_states"][0]["param_groups"]]
    assert rates == [0.01, 1e-4]


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/model.safetensors", "checkpoints/last.ckpt"])
def test_the_tuned_model_loads_like_any_other(tuned: tuple[Path, str], tmp_path: Path, place: str):
    run = tuned[0]
    model = load_model(run / place, device="cpu")
    trained = last_checkpoint(run)["state_dict"]
    state = model.state_dict()
    weights = [name for name in trained if not name.startswith(WORD)]
    assert set(weights) <= set(state)
    assert all(torch.equal(state[name], trained[name]) for name in weights)
    assert load_words(model, [run / "checkpoints" / "embeddings.pt"]) == ["*"]
    assert model.get_learned_conditioning(["a photo of *"]).isfinite().all()


@pytest.mark.parametrize("batch", [2, 4])
def test_either_stage_resumes_bit_by_bit(tuned: tuple[Path, str], tmp_path: Path, batch: int):
    stop = {"target": "tests.tiny_run.StopAt", "params": {"batch": batch}}
    steps = "lightning.modelcheckpoint.params.every_n_train_steps=1"
    with pytest.raises(RuntimeError, match="stopped by the test"):
        run_main(*pivotal(tmp_path, steps, f"{STOP}={stop}"))
    run = only_run(tmp_path / "logs")
    assert last_checkpoint(run)["global_step"] == batch
    assert not (run / "checkpoints" / "model.safetensors").exists()
    run_main("-r", run, f"{STOP}.params.batch=-1")
    assert_same_state(tuned[0], run)


def test_without_a_swap_both_train_from_the_start(tmp_path: Path):
    config = inversion(tmp_path, unfreeze_model=True, model_lr=1e-4)
    run = learn(config, tmp_path, "--max_steps", 1)
    before, after = load_file(TEXT_WEIGHTS), load_file(run / "checkpoints" / "model.safetensors")
    name = next(name for name in after if name.startswith(MODEL) and name.endswith("out.2.weight"))
    assert 0 < (after[name] - before[name]).abs().max() < 2e-4  # one step of AdamW at model_lr
    text = [n for n in after if n.startswith("cond_stage_model.") and not torch.equal(after[n], before[n])]
    assert text  # cond_stage_trainable: the text encoder is tuned along
    assert set(last_checkpoint(run)["state_dict"]) > set(after)


def test_swapping_needs_both_halves(tmp_path: Path):
    with pytest.raises(ValueError, match="unfreeze_model: true"):
        learn(inversion(tmp_path), tmp_path, f"{SWAP}=3")
