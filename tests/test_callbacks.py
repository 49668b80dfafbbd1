"""Pictures, guards, embedding files, stages: the callbacks one by one, on models of a few numbers."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ldm import callbacks as cb
from ldm.checkpoint import CheckpointError
from tests.test_autoencoder_training import Ramps, adversarial, kl_model


class Manager(nn.Module):
    """Stands for an embedding manager: one vector, a file format."""

    placeholders = ("*",)

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.ones(3))

    @property
    def string_to_param_dict(self) -> dict[str, nn.Parameter]:
        return {"*": self.vector}

    def embedding_parameters(self) -> Any:
        return self.parameters()

    def save(self, path: Path, info: dict[str, int]) -> None:
        torch.save({"vector": self.vector.detach().clone(), **info}, path)


class Inversion(pl.LightningModule):
    """loss = network(vector) on one number; `network` is frozen unless `unfreeze_model`."""

    def __init__(self, unfreeze_model: bool = False, rate: float = 0.1) -> None:
        super().__init__()
        self.network = nn.Linear(3, 1).requires_grad_(unfreeze_model)
        self.embedding_manager = Manager()
        self.unfreeze_model, self.inverts, self.rate = unfreeze_model, not unfreeze_model, rate
        self.scale = 1.0
        self.drawn: list[float] = []
        self.seen_modes: list[bool] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.drawn.append(torch.rand(()).item())
        return self.scale * self.network(self.embedding_manager.vector).square().sum()

    def configure_optimizers(self) -> Any:
        groups = [{"params": [self.embedding_manager.vector]}]
        if self.unfreeze_model:
            groups.append({"params": list(self.network.parameters())})
        return torch.optim.AdamW(groups, lr=self.rate)

    def log_images(self, batch: Tensor, N: int = 8, n_row: int = 2) -> dict[str, Tensor]:
        self.seen_modes.append(self.training or torch.is_grad_enabled())
        random.random(), np.random.rand()
        rows = torch.rand(4, 3, 8, 8)
        return {"samples": torch.rand(6, 3, 8, 8) * 4 - 2, "diffusion_row": rows[: 2 * len(batch["image"][:2])]}


def fit(model: pl.LightningModule, *callbacks: pl.Callback, steps: int = 4, folder: Path | None = None, **options: Any):
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), default_root_dir=folder, **options,
    )  # fmt: skip
    batches = [{"image": torch.zeros(1, 2)} for _ in range(4)]
    trainer.fit(model, DataLoader(batches, batch_size=2))
    return trainer


# ------------------------------------------------------------------------------------------------------- guards


def test_guard_is_silent_when_the_vectors_learn():
    model = Inversion()
    fit(model, cb.GradientGuard())
    assert not torch.equal(model.embedding_manager.vector, torch.ones(3))


def test_guard_names_frozen_weights_with_gradients():
    model = Inversion()
    model.network.requires_grad_(True)
    with pytest.raises(ValueError, match=r"frozen weights received gradients.*network"):
        fit(model, cb.GradientGuard())


def test_guard_notices_missing_placeholder():
    model = Inversion()
    model.scale = 0.0
    with pytest.raises(ValueError, match="placeholder string"):
        fit(model, cb.GradientGuard())


def test_guard_notices_vectors_that_do_not_move_or_explode():
    class Stuck(Inversion):
        def optimizer_step(self, epoch: Any, batch_idx: Any, optimizer: Any, optimizer_closure: Any = None) -> None:
            before = self.embedding_manager.vector.detach().clone()
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            self.embedding_manager.vector.data = before

    with pytest.raises(ValueError, match="did not move"):
        fit(Stuck(), cb.GradientGuard())
    model = Inversion()
    model.scale = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        fit(model, cb.GradientGuard())
    late = Inversion()
    with pytest.raises(ValueError, match="not finite after step 2"):
        fit(late, cb.GradientGuard(every_n_steps=2), SpoilAt(1))


class SpoilAt(pl.Callback):
    """Makes the vectors NaN at the beginning of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            pl_module.embedding_manager.vector.data.fill_(float("nan"))


# ---------------------------------------------------------------------------------------------- embedding files


def test_embedding_files_by_step(tmp_path: Path):
    model = Inversion()
    fit(model, cb.EmbeddingCheckpoint(tmp_path, every_n_train_steps=2), steps=5)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "embeddings.pt", "embeddings_gs-2.pt", "embeddings_gs-4.pt", "embeddings_gs-5.pt",
    ]  # fmt: skip
    assert torch.load(tmp_path / "embeddings_gs-4.pt")["step"] == 4
    newest = torch.load(tmp_path / "embeddings.pt")["vector"]
    assert torch.equal(newest, model.embedding_manager.vector)
    assert not torch.equal(newest, torch.load(tmp_path / "embeddings_gs-2.pt")["vector"])


def test_bad_vectors_never_replace_good_files(tmp_path: Path):
    with pytest.raises(ValueError, match="not finite"):
        fit(Inversion(), cb.EmbeddingCheckpoint(tmp_path, every_n_train_steps=1), SpoilAt(2))
    assert torch.isfinite(torch.load(tmp_path / "embeddings.pt")["vector"]).all()
    assert not (tmp_path / "embeddings_gs-3.pt").exists()


# ------------------------------------------------------------------------------------------------------- stages


def test_two_stages_train_one_half_each():
    model = Inversion(unfreeze_model=True)
    start = model.network.weight.detach().clone()
    states: dict[int, tuple[Tensor, Tensor]] = {}

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            weights = pl_module.network.weight.detach().clone(), pl_module.embedding_manager.vector.detach().clone()
            states[trainer.global_step] = weights

    fit(model, cb.ModeSwapCallback(swap_step=2), Record())
    assert torch.equal(states[2][0], start)
    assert not torch.equal(states[2][1], torch.ones(3))
    assert torch.equal(states[4][1], states[2][1])
    assert not torch.equal(states[4][0], start)


def test_stages_need_both_halves():
    with pytest.raises(ValueError, match="unfreeze_model"):
        fit(Inversion(), cb.ModeSwapCallback())
    with pytest.raises(ValueError, match="swap_step"):
        cb.ModeSwapCallback(-1)


def test_steps_draw_alike_whatever_happened_before():
    one, other = Inversion(), Inversion()
    fit(one, cb.StepSeed(5))
    torch.rand(7)
    fit(other, cb.StepSeed(5))
    assert one.drawn == other.drawn
    assert len(set(one.drawn)) == 4
    third = Inversion()
    fit(third, cb.StepSeed(6))
    assert third.drawn != one.drawn


# ----------------------------------------------------------------------------------------------------- pictures


def test_images_are_written_at_their_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model = Inversion()
    logger = cb.ImageLogger(batch_frequency=2, max_images=4, increase_log_steps=False)
    with caplog.at_level(logging.INFO):
        fit(model, logger, folder=tmp_path)
    names = sorted(p.name for p in (tmp_path / "images" / "train").iterdir())
    assert names == [
        "diffusion_row_gs-000002_e-000000_b-000001.jpg", "diffusion_row_gs-000004_e-000001_b-000001.jpg",
        "samples_gs-000002_e-000000_b-000001.jpg", "samples_gs-000004_e-000001_b-000001.jpg",
    ]  # fmt: skip
    with Image.open(tmp_path / "images" / "train" / names[2]) as grid:
        assert grid.size == (4 * 10 + 2, 10 + 2)  # 4 of 6 pictures of 8 pixels, 2 pixels between them
    with Image.open(tmp_path / "images" / "train" / names[0]) as grid:
        assert grid.size == (2 * 10 + 2, 2 * 10 + 2)  # two samples below one another
    assert model.seen_modes == [False, False]
    assert model.training
    assert "% of the training time" in caplog.text


def test_images_at_powers_of_two_and_before_the_first_step():
    logger = cb.ImageLogger(batch_frequency=100)
    assert [n for n in range(130) if logger.is_due(n)] == [1, 2, 4, 8, 16, 32, 64, 100]
    assert cb.ImageLogger(log_first_step=True).is_due(0)


def test_images_leave_training_undisturbed(tmp_path: Path):
    plain, drawing = Inversion(), Inversion()
    pl.seed_everything(1, verbose=False)
    plain.network.reset_parameters()
    drawing.network.load_state_dict(plain.network.state_dict())
    torch.manual_seed(3)
    fit(plain)
    torch.manual_seed(3)
    states = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    fit(drawing, cb.ImageLogger(batch_frequency=1, log_first_step=True), folder=tmp_path)
    assert plain.drawn == drawing.drawn
    assert torch.equal(plain.embedding_manager.vector, drawing.embedding_manager.vector)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]


def test_image_options_are_checked(tmp_path: Path):
    with pytest.raises(ValueError, match="'ddim_step' is not a parameter"):
        fit(Inversion(), cb.ImageLogger(log_images_kwargs={"ddim_step": 5}), folder=tmp_path)
    with pytest.raises(ValueError, match="batch_frequency 0"):
        cb.ImageLogger(batch_frequency=0)
    fit(Inversion(), cb.ImageLogger(batch_frequency=1, disabled=True), folder=tmp_path)
    assert not (tmp_path / "images").exists()


# ------------------------------------------------------------------------------------------------------ reports


def test_time_and_memory_per_epoch(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        fit(Inversion(), cb.CUDACallback(), steps=6)
        assert caplog.text.count("steps/s, peak resident memory") == 1
        fit(Inversion(), cb.CUDACallback(every_n_seconds=0), steps=6)
        assert caplog.text.count("steps/s, peak resident memory") == 4


def test_the_clock_of_a_run_that_goes_on_within_an_epoch_starts_with_it(caplog: pytest.LogCaptureFixture):
    trainer, model = SimpleNamespace(global_step=5, current_epoch=0, is_global_zero=True, loggers=[]), Inversion()
    clock = cb.CUDACallback()
    clock.on_train_start(trainer, model)  # Lightning starts no epoch here
    with caplog.at_level(logging.INFO):
        clock.on_train_epoch_end(trainer, model)
    assert "Epoch 0: 0.0 s" in caplog.text


# --------------------------------------------------------------------------------------------------- checkpoint io


def test_checkpoint_files_are_replaced_whole(tmp_path: Path):
    io = cb.SafeCheckpointIO()
    path = tmp_path / "last.ckpt"
    io.save_checkpoint({"loops": {}, "state_dict": {"a": torch.ones(1)}}, path)
    before = path.read_bytes()

    with pytest.raises(Exception, match=r"(?i)pickle"):
        io.save_checkpoint({"loops": lambda: 0}, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.equal(io.load_checkpoint(path)["state_dict"]["a"], torch.ones(1))


def test_checkpoint_files_are_read_without_running_them(tmp_path: Path):
    path = tmp_path / "last.ckpt"
    marker = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    torch.save({"loops": Bomb()}, path)
    with pytest.raises((CheckpointError, ValueError), match="last.ckpt"):
        cb.SafeCheckpointIO().load_checkpoint(path)
    assert not marker.exists()
    path.write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match="last.ckpt"):
        cb.SafeCheckpointIO().load_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        cb.SafeCheckpointIO().load_checkpoint(tmp_path / "none.ckpt")


# ---------------------------------------------------------------------------------------------- progress bar


class Look(pl.Callback):
    """Notes where the bar begins and ends, at each batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        bar = trainer.progress_bar_callback.train_progress_bar
        self.seen.append((bar.initial, bar.total))


def barred_trainer(steps: int, look: Look) -> pl.Trainer:
    return pl.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        callbacks=[cb.ProgressBar(), look],
    )  # fmt: skip


def test_bar_of_a_run_that_goes_on_counts_from_there(tmp_path: Path):
    look = Look()
    data = DataLoader([{"image": torch.zeros(1, 2)} for _ in range(8)], batch_size=1)
    first = barred_trainer(3, look)
    first.fit(Inversion(), data)
    first.save_checkpoint(tmp_path / "a.ckpt")
    barred_trainer(11, look).fit(Inversion(), data, ckpt_path=tmp_path / "a.ckpt", weights_only=False)
    assert look.seen == [(0, 3)] * 3 + [(3, 8)] * 5 + [(0, 3)] * 3


@pytest.mark.filterwarnings("ignore:You called `self.log")
def test_bar_of_two_optimisers_counts_batches():
    look, model = Look(), kl_model(adversarial(disc_start=0))
    model.accumulate_grad_batches = 2
    barred_trainer(5, look).fit(model, DataLoader(Ramps(8), batch_size=1))
    assert look.seen == [(0, 8)] * 8 + [(0, 2)] * 2  # four steps of both, then one
