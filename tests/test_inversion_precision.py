"""What an inversion trains and in which type: the checks of the first step, 16-bit weights, the learning rate."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from ldm.training_precision import LOSS_SCALE, HalfWeights
from tests.conftest import assert_close
from tests.tiny_inversion import inversion, learn, losses, vectors
from tests.tiny_run import only_run

pytestmark = pytest.mark.usefixtures("one_thread")


class Meddle(pl.Callback):
    """Does at the start of training what must not go unnoticed."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.how == "foreign gradient":
            pl_module.model.diffusion_model.out[2].bias.requires_grad_(True)
        if self.how == "nan":
            pl_module.model.diffusion_model.out[2].weight.fill_(float("nan"))


class Types(pl.Callback):
    """Remembers the types of weights, vectors, gradients and moments after the first step."""

    seen: dict[str, Any] = {}  # noqa: RUF012

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        (vector,) = pl_module.embedding_manager.embedding_parameters()
        if not Types.seen:
            Types.seen = {"vector": vector.dtype, "gradient": vector.grad.clone()}

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        (state,) = trainer.optimizers[0].state.values()
        Types.seen |= {
            "moment": state["exp_avg"].dtype,
            "weights": {p.dtype for p in pl_module.model.parameters()},
            "text": {p.dtype for p in pl_module.cond_stage_model.parameters()},
            "schedule": pl_module.alphas_cumprod.dtype,
        }


def run(folder: Path, *more: Any) -> Path:
    Types.seen = {}
    types = {"target": "tests.test_inversion_precision.Types", "params": {}}
    return learn(inversion(folder), folder, f"lightning.callbacks.types={types}",
                 "lightning.trainer.log_every_n_steps=1", *more)  # fmt: skip


@pytest.fixture(scope="module")
def full(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run in float32: losses, vectors, first gradient."""
    path = run(tmp_path_factory.mktemp("full"))
    return {"losses": losses(path), "vectors": vectors(path)["*"], **Types.seen}


@pytest.mark.parametrize(
    ("precision", "weights"),
    [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16), ("16-true", torch.float16)],
)
def test_vectors_and_optimiser_stay_in_float32(
    full: dict[str, Any], tmp_path: Path, precision: str, weights: torch.dtype
):
    path = run(tmp_path, "--precision", precision)
    seen = Types.seen
    assert seen["weights"] == seen["text"] == {weights}
    assert {seen["vector"], seen["gradient"].dtype, seen["moment"], seen["schedule"]} == {torch.float32}
    learned = vectors(path)["*"]
    assert learned.dtype == torch.float32
    coarse = 2e-3 if precision == "16-true" else 2e-2  # 11 and 8 bits
    assert_close(losses(path)[0], torch.tensor(full["losses"][0]), rel=coarse)  # the same noise and time steps
    cosine = torch.nn.functional.cosine_similarity(seen["gradient"], full["gradient"]).item()
    assert cosine > (0.999 if precision == "16-true" else 0.97)
    assert 0.9 < (seen["gradient"].norm() / full["gradient"].norm()).item() < 1.1  # the loss scale is undone
    assert not torch.equal(learned.bfloat16().float(), learned)


def test_the_loss_is_scaled_in_float16_alone():
    assert HalfWeights("16-true").loss_scale == LOSS_SCALE
    assert HalfWeights("bf16-true").loss_scale == 1


def test_a_model_that_trains_is_not_kept_in_16_bits(tmp_path: Path):
    with pytest.raises(ValueError, match=r"precision 'bf16-true' .* use 'bf16-mixed'"):
        learn(inversion(tmp_path, unfreeze_model=True), tmp_path, "--precision", "bf16-true")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "foreign gradient",
            r"1 frozen weights received gradients, the first is 'model\.diffusion_model\.out\.2\.bias'",
        ),
        ("nan", "gradients of the first step are not finite"),
    ],
)
def test_an_inversion_that_cannot_learn_stops_after_its_first_step(tmp_path: Path, how: str, message: str):
    meddle = {"target": "tests.test_inversion_precision.Meddle", "params": {"how": how}}
    with pytest.raises(ValueError, match=message):
        learn(inversion(tmp_path), tmp_path, f"lightning.callbacks.meddle={meddle}")
    saved = {path.name for path in only_run(tmp_path / "logs").glob("checkpoints/*")}
    assert saved <= {"embeddings_best.pt"}  # of the start


def test_the_learning_rate_is_printed_with_its_factors(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        run(tmp_path, "--max_steps", 1, "--accumulate_grad_batches", 3)
    line = "Learning rate 0.03 = 3 (accumulate_grad_batches) x 1 (devices) x 2 (batch size) x 0.005 (base rate)"
    assert line in caplog.text
