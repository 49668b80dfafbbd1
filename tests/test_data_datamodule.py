"""The data module: order by seed, processes together as one, and runs killed mid-epoch that continue alike."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import Dataset, IterableDataset

from ldm.data.datamodule import DataModuleFromConfig, ResumableSampler, WrappedDataset
from ldm.util import ConfigError

SAMPLES = 11
BATCH = 2  # 6 batches an epoch, the last one short


class Draws(Dataset):
    """Sample i shows its index and one draw of each global generator."""

    def __init__(self, length: int = SAMPLES) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < self.length:
            raise IndexError(i)
        draws = torch.tensor([random.random(), np.random.uniform(), torch.rand(1).item()], dtype=torch.float64)
        return {"index": i, "draws": draws}


class Plain:
    """Anything with a length and items."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> int:
        return i


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(5))


class Recorder(pl.LightningModule):
    """Writes down each batch that it is trained on; optionally dies in the middle of a step."""

    def __init__(self, record: Path, die_after: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.record = record
        self.die_after = die_after
        self.validated: list[list[float]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        row = [self.trainer.fit_loop.epoch_loop.total_batch_idx, batch["index"].tolist(), batch["draws"].tolist()]
        with self.record.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self.die_after is not None and row[0] == self.die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return ((self.weight - batch["draws"].float().mean()) ** 2).sum()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validated.append(batch["draws"].flatten().tolist())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


TARGET = f"{__name__}.Draws"


def data_module(num_workers: int = 0, **options: Any) -> DataModuleFromConfig:
    options = {"train": {"target": TARGET}, "batch_size": BATCH, "seed": 7, **options}
    return DataModuleFromConfig(num_workers=num_workers, **options)


def fit(
    folder: Path,
    record: Path,
    steps: int,
    num_workers: int = 0,
    every: int = 4,
    die_after: int | None = None,
    ckpt: Path | None = None,
    accumulate: int = 1,
    validate: bool = False,
) -> Recorder:
    saver = pl.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=[saver],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        val_check_interval=2 if validate else 1.0,
    )
    model = Recorder(record, die_after)
    extra = {"validation": {"target": TARGET, "params": {"length": 4}}} if validate else {}
    trainer.fit(model, data_module(num_workers, **extra), ckpt_path=ckpt)
    return model


def rows(record: Path) -> list[Any]:
    return [json.loads(line) for line in record.read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], float]:
    folder = tmp_path_factory.mktemp("unbroken")
    model = fit(folder, folder / "record", steps=20)
    return rows(folder / "record"), model.weight.item()


def test_unbroken_run_sees_every_sample_once_an_epoch_in_changing_order(unbroken) -> None:
    seen, _ = unbroken
    epochs = [[i for _, batch, _ in seen[start : start + 6] for i in batch] for start in (0, 6, 12)]
    assert all(sorted(epoch) == list(range(SAMPLES)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    draws = [draw for _, _, batch in seen for sample in batch for draw in sample]
    assert len(set(draws)) == len(draws)  # no sample repeats another's randomness, nor its own of an earlier epoch


def continues(folder: Path, unbroken: tuple[list[Any], float], step: int, num_workers: int) -> None:
    """Resume from the checkpoint of `step`: batches and weight must be those of the unbroken run."""
    seen, weight = unbroken
    record = folder / f"resumed at {step} with {num_workers} workers"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable.*")
        model = fit(folder / "rest", record, 20, num_workers, ckpt=folder / f"step={step}.ckpt")
    assert rows(record) == seen[step:]
    assert model.weight.item() == weight


def test_killed_run_continues_with_the_batches_of_the_unbroken_one(tmp_path: Path, unbroken) -> None:
    record = tmp_path / "first"
    call = f"fit(Path({str(tmp_path)!r}), Path({str(record)!r}), 20, num_workers=2, every=1, die_after=9)"
    code = f"from pathlib import Path\nfrom {__name__} import fit\n{call}"
    command = [sys.executable, "-c", code]
    root = Path(__file__).parent.parent
    # No pipes: the orphaned workers would hold them open for seconds.
    killed = subprocess.run(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert rows(record) == unbroken[0][:10]
    continues(tmp_path, unbroken, 9, num_workers=2)
    continues(tmp_path, unbroken, 4, num_workers=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_from_every_place_in_an_epoch(tmp_path: Path, unbroken, num_workers: int) -> None:
    fit(tmp_path, tmp_path / "first", 13, num_workers, every=1)
    for step in (1, 5, 6, 7, 12) if num_workers == 0 else (5, 12):
        continues(tmp_path, unbroken, step, num_workers)


def test_resume_after_an_interrupt_inside_a_step(tmp_path: Path, unbroken) -> None:
    """A checkpoint written while a batch is under way holds a fetched batch that was not trained."""

    class Interrupted(Recorder):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            if self.global_step == 9:
                self.trainer.save_checkpoint(tmp_path / "mid.ckpt")
                raise RuntimeError("stop here")
            return loss

    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_steps=20, enable_model_summary=False, **options)
    with pytest.raises(RuntimeError, match="stop here"):
        trainer.fit(Interrupted(tmp_path / "first"), data_module())
    fit(tmp_path, tmp_path / "second", 12, ckpt=tmp_path / "mid.ckpt")
    # A second resume, from a checkpoint that the resumed run wrote.
    fit(tmp_path, tmp_path / "third", 20, ckpt=tmp_path / "step=12.ckpt")
    seen, _ = unbroken
    assert [row[1:] for row in rows(tmp_path / "second")] == [row[1:] for row in seen[9:12]]
    assert [row[1:] for row in rows(tmp_path / "third")] == [row[1:] for row in seen[12:]]


def test_resume_with_accumulation_and_validation_inside_the_epoch(tmp_path: Path, unbroken) -> None:
    fit(tmp_path / "a", tmp_path / "whole", steps=8, accumulate=2, every=3, validate=True)
    model = fit(tmp_path / "b", tmp_path / "rest", 8, accumulate=2, validate=True, ckpt=tmp_path / "a" / "step=3.ckpt")
    whole = rows(tmp_path / "whole")
    assert [row[1:] for row in whole] == [row[1:] for row in unbroken[0][: len(whole)]]
    assert rows(tmp_path / "rest") == whole[6:]
    passes = [model.validated[i : i + 2] for i in range(0, len(model.validated), 2)]
    assert all(one == passes[0] for one in passes)  # validation draws alike each time


def test_changed_data_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loader = data_module().train_dataloader()
    with caplog.at_level(logging.WARNING):
        loader.load_state_dict(loader.state_dict())
        assert not caplog.records
        data_module(batch_size=4).train_dataloader().load_state_dict(loader.state_dict())
    assert "batch_size 2 -> 4" in caplog.text


@pytest.mark.parametrize("length", [12, 16])
def test_processes_together_see_the_batches_of_one(length: int) -> None:
    one = list(ResumableSampler(length, 4, seed=3))
    two = [list(ResumableSampler(length, 2, seed=3, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*two, strict=True)] == one


def test_uneven_last_batch_is_filled_up_for_every_process() -> None:
    shares = [list(ResumableSampler(5, 2, seed=3, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [len(share) for share in shares] == [2, 2]
    assert [len(batch) for share in shares for batch in share] == [2, 1, 2, 1]
    assert {i for share in shares for batch in share for _, i in batch} == set(range(5))


@pytest.mark.parametrize("done", [0, 1, 5, 6, 7, 13])
def test_sampler_starts_anywhere(done: int) -> None:
    def batches(start: int, count: int) -> list[Any]:
        found: list[Any] = []
        while len(found) < count:
            at = start + len(found)
            found += list(ResumableSampler(SAMPLES, BATCH, seed=1, batches_done=lambda at=at: at))
        return found[:count]

    assert batches(done, 6) == batches(0, done + 6)[done:]


def test_fewer_batches_an_epoch_than_there_are() -> None:
    sampler = ResumableSampler(10, 2, limit=3, batches_done=lambda: 4)
    assert len(sampler) == 3
    assert [batch[0][0] for batch in sampler] == [1, 1]


def test_without_a_trainer_and_with_missing_splits() -> None:
    data = data_module(validation={"target": TARGET, "params": {"length": 3}})
    data.prepare_data()
    data.setup("fit")
    assert set(data.datasets) == {"train", "validation"}
    state = random.getstate(), torch.get_rng_state()
    order = [i for batch in data.train_dataloader() for i in batch["index"].tolist()]
    assert sorted(order) == list(range(SAMPLES))
    assert order != list(range(SAMPLES))
    assert [i for batch in data.val_dataloader() for i in batch["index"].tolist()] == [0, 1, 2]
    with pytest.raises(Exception, match="must be implemented"):
        data.test_dataloader()
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    shuffled = data_module(validation={"target": TARGET}, shuffle_val_dataloader=True)
    assert [i for batch in shuffled.val_dataloader() for i in batch["index"].tolist()] != list(range(SAMPLES))


def test_published_options_bind_and_wrap() -> None:
    data = DataModuleFromConfig(batch_size=2, train={"target": f"{__name__}.Plain"}, wrap=True, use_worker_init_fn=True)
    data.setup()
    assert isinstance(data.datasets["train"], WrappedDataset)
    assert 1 <= data.num_workers <= max(4, os.cpu_count() or 1)
    stream = data_module(train={"target": f"{__name__}.Stream"})
    assert [batch.tolist() for batch in stream.train_dataloader()] == [[0, 1], [2, 3], [4]]


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="batch_size"):
        DataModuleFromConfig(batch_size=0)
    with pytest.raises(ConfigError, match="lenght"):
        data_module(train={"target": TARGET, "params": {"lenght": 3}}).setup()
    with pytest.raises(ValueError, match="empty"):
        data_module(train={"target": TARGET, "params": {"length": 0}}).train_dataloader()
