"""Data sets from a config, served in an order that depends on the seed and the step only.

Sample i of epoch e is drawn with random generators seeded from (seed, e, i), and epoch e is ordered by a permutation
seeded from (seed, e). The train loader starts where the trainer's progress says. So a run that was killed in the middle
of an epoch continues with exactly the batches that it would have seen, whatever the number of workers.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
from collections.abc import Callable, Iterator, Sized
from typing import Any, Protocol, cast, runtime_checkable

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ldm.data.seeding import derive_seed, seeded
from ldm.util import instantiate_from_config

log = logging.getLogger(__name__)

LOADER_HOOKS = {
    "train": "train_dataloader",
    "validation": "val_dataloader",
    "test": "test_dataloader",
    "predict": "predict_dataloader",
}

# What a sample is asked for by: (epoch, index in the data set). It travels with the request, so that worker processes
# need no word of the epoch.
SampleKey = tuple[int, int]


class WrappedDataset(Dataset):
    """Makes a PyTorch data set of anything that has a length and items."""

    def __init__(self, dataset: Any) -> None:
        self.data = dataset

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, idx: int) -> Any:
        return self.data[idx]


class SeededDataset(Dataset):
    """Draws sample (epoch, index) of `dataset` with generators seeded from (seed, epoch, index)."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, key: SampleKey) -> Any:
        epoch, index = key
        with seeded(self.seed, epoch, index):
            return self.dataset[index]


class ResumableSampler(Sampler[list[SampleKey]]):
    """Yields the batches of one epoch as lists of (epoch, index), from wherever `batches_done` says.

    `batches_done()` counts the batches trained since the start of the run; None stands for always starting at the
    first batch of epoch 0. With several processes each batch of `world_size * batch_size` samples is cut in order, so
    that together they see the very batches of one process with the larger batch size. Where the last batch does
    not divide evenly, its first samples are taken twice.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        batches_done: Callable[[], int] | None = None,
        limit: int | None = None,  # batches per epoch, where the trainer takes fewer than all
    ) -> None:
        if length < 1:
            raise ValueError("the data set is empty; a batch needs at least one sample")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.batches_done = batches_done
        self.limit = limit

    def __len__(self) -> int:
        whole = -(-self.length // (self.batch_size * self.world_size))
        return whole if self.limit is None else max(1, min(whole, self.limit))

    def __iter__(self) -> Iterator[list[SampleKey]]:
        # Read now, not when the first batch is asked for: workers prefetch, and the trainer moves on meanwhile.
        epoch, first = divmod(self.batches_done() if self.batches_done else 0, len(self))
        return self._batches(epoch, first)

    def _batches(self, epoch: int, first: int) -> Iterator[list[SampleKey]]:
        order = self._order(epoch)
        total = self.batch_size * self.world_size
        for number in range(first, len(self)):
            batch = order[number * total : (number + 1) * total]
            share = -(-len(batch) // self.world_size)
            mine = range(self.rank * share, (self.rank + 1) * share)
            yield [(epoch, batch[i % len(batch)]) for i in mine]

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.length))
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        return torch.randperm(self.length, generator=generator).tolist()


class ResumableLoader(DataLoader):
    """A `DataLoader` over (epoch, index) samples that tells the trainer it resumes by itself.

    Its saved state is only a description, to notice data that changed between two parts of a run: the position comes
    from the trainer's progress, which counts the batches trained and not those fetched ahead.
    """

    def state_dict(self) -> dict[str, int]:
        """Describe what decides the order of batches."""
        sampler = cast(ResumableSampler, self.batch_sampler)
        total = sampler.batch_size * sampler.world_size
        return {"samples": sampler.length, "batch_size": total, "batches": len(sampler), "seed": sampler.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Warn where `state`, saved by an earlier part of the run, describes other data."""
        _warn_of_changes(state, self.state_dict())


def _warn_of_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [f"{key} {before[key]} -> {value}" for key, value in now.items() if before.get(key, value) != value]
    if changed:
        log.warning("the training data changed since the checkpoint (%s), so its order differs", ", ".join(changed))


@runtime_checkable
class ResumableStream(Protocol):
    """An iterable data set that can start later than at its beginning (see `ldm.data.webdata`)."""

    def start_at(self, batch: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        """Let the next iteration begin with batch number `batch` of the run."""


class StreamLoader(DataLoader):
    """A `DataLoader` over a `ResumableStream`: each iteration starts where the trainer's progress says."""

    def __init__(self, dataset: IterableDataset, place: Callable[[], None], **options: Any) -> None:
        super().__init__(dataset, **options)
        self.place = place

    def __iter__(self) -> Any:
        self.place()
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Describe what decides the order of batches."""
        return {"batch_size": self.batch_size, "num_workers": self.num_workers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Warn where `state`, saved by an earlier part of the run, describes another order."""
        _warn_of_changes(state, self.state_dict())


def batches_done(trainer: pl.Trainer | None) -> int:
    """Batches trained so far in the whole run; `processed` is the count that is right after any interruption."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed if trainer else 0  # type: ignore[attr-defined]


def stream_loader(
    dataset: IterableDataset, batch_size: int, trainer: pl.Trainer | None, follow: bool, options: dict[str, Any]
) -> DataLoader:
    """Return a loader over an iterable data set; with `follow` one that starts where the trainer's progress says."""
    if not isinstance(dataset, ResumableStream):
        return DataLoader(dataset, batch_size=batch_size, **options)

    def place() -> None:
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        dataset.start_at(batches_done(trainer) if follow else 0, batch_size, rank, world_size)

    # Workers hold a copy of the stream from when they started, so they start anew with each iteration.
    return StreamLoader(dataset, place, batch_size=batch_size, **{**options, "persistent_workers": False})


def leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C reaches the workers too, but the trainer needs them until it has finished its step and saved."""
    del worker
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):  # SIGUSR1 is not on Windows
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class DataModuleFromConfig(pl.LightningDataModule):
    """Builds train, validation, test and predict data sets from configs and serves them as loaders.

    `train` and the others are `{target, params}` configs of data sets. Without a config the loader is absent.
    """

    def __init__(
        self,
        batch_size: int,
        train: dict[str, Any] | None = None,
        validation: dict[str, Any] | None = None,
        test: dict[str, Any] | None = None,
        predict: dict[str, Any] | None = None,
        wrap: bool = False,  # for objects that are no PyTorch data sets
        num_workers: int | None = None,  # None: 2 * batch_size as published, but no more than there are processors
        shuffle_test_loader: bool = False,
        use_worker_init_fn: bool = False,  # kept for published configs: samples are seeded one by one in any case
        shuffle_val_dataloader: bool = False,
        seed: int = 23,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self.num_workers = min(batch_size * 2, os.cpu_count() or 1) if num_workers is None else num_workers
        self.dataset_configs = {
            split: config
            for split, config in zip(LOADER_HOOKS, (train, validation, test, predict), strict=True)
            if config is not None
        }
        for split, hook in LOADER_HOOKS.items():
            if split not in self.dataset_configs:
                # The parent's own method tells the trainer that there is no such loader.
                setattr(self, hook, getattr(super(), hook))
        self.wrap = wrap
        self.shuffle = {
            "train": True,
            "validation": shuffle_val_dataloader,
            "test": shuffle_test_loader,
            "predict": False,
        }
        self.use_worker_init_fn = use_worker_init_fn
        self.seed = seed
        self.datasets: dict[str, Any] = {}

    def setup(self, stage: str | None = None) -> None:
        """Build the data sets (once, however often the trainer asks)."""
        for split, config in self.dataset_configs.items():
            if split not in self.datasets:
                dataset = instantiate_from_config(config)
                wrap = self.wrap and not isinstance(dataset, IterableDataset)
                self.datasets[split] = WrappedDataset(dataset) if wrap else dataset

    def train_dataloader(self) -> DataLoader:
        """Return the loader that follows the trainer's progress, for a train config."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader:
        """Return the validation loader: each pass gives the same batches, drawn alike."""
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader:
        """Return the test loader: each pass gives the same batches, drawn alike."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Return the loader for prediction, in the order of the data set."""
        return self._loader("predict")

    def _loader(self, split: str) -> DataLoader:
        if split not in self.datasets:
            self.setup()
        dataset = self.datasets[split]
        options: dict[str, Any] = {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0 and split == "train",
            "pin_memory": self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            # A generator of its own: otherwise each new iterator takes a number from the global one.
            "generator": torch.Generator().manual_seed(self.seed),
            "worker_init_fn": leave_signals_to_the_trainer,
        }
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if isinstance(dataset, IterableDataset):
            return stream_loader(dataset, self.batch_size, self.trainer, follow=split == "train", options=options)
        sampler = ResumableSampler(
            len(dataset),
            self.batch_size,
            seed=self.seed,
            shuffle=self.shuffle[split],
            rank=rank,
            world_size=world_size,
            batches_done=functools.partial(batches_done, self.trainer) if split == "train" else None,
        )
        if split == "train":
            sampler.limit = self._limit(len(sampler))
        return ResumableLoader(SeededDataset(dataset, self.seed), batch_sampler=sampler, **options)

    def _limit(self, batches: int) -> int | None:
        """Batches per epoch under the trainer's `limit_train_batches` (a number or a share)."""
        limit = self.trainer.limit_train_batches if self.trainer else 1.0
        if limit is None or limit == 1.0 and isinstance(limit, float):
            return None
        return max(1, int(batches * limit)) if isinstance(limit, float) else limit
