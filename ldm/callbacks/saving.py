"""Checkpoints that survive: written whole or not at all, small, and at a point from which a run resumes exactly."""

from __future__ import annotations

import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ldm.callbacks.steps import require_finite, trained_vectors
from ldm.checkpoint import open_checkpoint, save_safely
from ldm.data.templates import per_img_token_list

LAST = "last.ckpt"
STOPPING = b"\nStopping: a checkpoint is saved after this step (Ctrl-C again stops at once, without it)\n"
RESERVED = ("best",)  # embeddings_best.pt is another file


class RunStopped(Exception):  # noqa: N818 - not an error: the user asked for it
    """Training was stopped by Ctrl-C or SIGTERM, after a checkpoint had been saved."""


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, replaced only by complete ones and read without running code from them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint`; a full disk or a kill leaves the previous file as it was."""
        if storage_options is not None:
            raise TypeError(f"checkpoints are local files: storage_options {storage_options!r} are not supported")
        save_safely(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of plain data and tensors; anything else is a ValueError that names the file."""
        del weights_only
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no checkpoint '{path}'")
        with open_checkpoint(path):
            pass  # says in a sentence what is wrong with a damaged file or one that would run code
        try:
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"'{path}' is no checkpoint that a run of this code saved; -r takes a run directory or its last.ckpt, "
                "and --embedding_manager_ckpt a file of words"
            ) from error
        if not isinstance(checkpoint, dict) or "loops" not in checkpoint:
            raise ValueError(f"'{path}' holds weights but no state of a run; to start from it, pass it as --ckpt_path")
        return checkpoint


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt`: every `every_n_train_steps` steps, every few minutes, at the end, and when a signal asks.

    Ctrl-C and SIGTERM save after the current step and stop (`RunStopped`); a second Ctrl-C stops at once. SIGUSR1
    saves and goes on. Saving happens right after an optimiser step, never between accumulated batches, whose
    gradients no file keeps. Saving by the clock takes at most a twentieth of the time.
    """

    def __init__(
        self, dirpath: str | Path, every_n_train_steps: int | None = None, every_n_minutes: float | None = 5.0
    ) -> None:
        super().__init__()
        self.path = Path(dirpath) / LAST
        self.every_n_train_steps = every_n_train_steps
        self.every_n_minutes = every_n_minutes
        self.speaks = True
        self.save_requested = False
        self.stop_requested = False
        self.stopping = False
        self.stop_after_step = False  # something else than a signal, such as --max_time, stops the run
        self.saved_step = -1
        self.previous_step = 0
        self.saved_at = 0.0
        self.save_seconds = 0.0
        self._handlers: dict[int, tuple[Any, Any]] = {}  # ours, and the one before it

    # -- signals -------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock and listen for signals."""
        del pl_module
        self.previous_step = self.saved_step = trainer.global_step
        self.saved_at = time.monotonic()
        self.speaks = trainer.is_global_zero
        for unfinished in self.path.parent.glob(f".{LAST}.*.tmp") if trainer.is_global_zero else ():
            unfinished.unlink(missing_ok=True)  # of an earlier part of the run that was killed while saving
        if threading.current_thread() is not threading.main_thread():
            return
        self._listen(signal.SIGINT, self._stop)
        # Lightning's own handler waits for the other processes in the middle of a step: a deadlock of several.
        self._listen(signal.SIGTERM, self._stop)
        if hasattr(signal, "SIGUSR1"):  # not on Windows
            self._listen(signal.SIGUSR1, self._save)

    def _listen(self, number: int, handler: Any) -> None:
        self._handlers[number] = (handler, signal.signal(number, handler))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back."""
        del trainer, pl_module, stage
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        del trainer, pl_module, exception
        self._restore()

    def _restore(self) -> None:
        for number, (ours, before) in self._handlers.items():
            # Lightning may have given them back already; its own, put back after that, would keep its trainer alive
            if before is not None and signal.getsignal(number) == ours:
                signal.signal(number, before)
        self._handlers = {}

    def _save(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.save_requested = True

    def _stop(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.stop_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.save_requested = self.stop_requested = True
        if self.speaks:
            os.write(2, STOPPING)  # not by logging: the signal may have come in the middle of a line of the log

    # -- saving --------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time, and stop when asked to."""
        del pl_module, outputs, batch, batch_idx
        step = trainer.global_step
        if step == self.previous_step:  # gradients are still being accumulated
            self.stop_after_step |= trainer.should_stop
            trainer.should_stop = False
            return
        self.previous_step = step
        trainer.should_stop |= self.stop_after_step
        stop = self._agree(trainer, self.stop_requested)
        if stop or self._agree(trainer, self._is_due(trainer, step)):
            self.save(trainer)
        self.stopping = stop

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Stop when asked to: only now, since a step's validation and its line in the log come after its end."""
        del args
        if self.stopping:
            raise RunStopped(f"stopped after step {trainer.global_step}, saved as {self.path}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end of the run."""
        del pl_module
        if self.saved_step != trainer.global_step:
            self.save(trainer)
        self.on_train_batch_start(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Write `last.ckpt` now (all processes must call this together)."""
        began = time.monotonic()
        trained = [p for o in trainer.optimizers for group in o.param_groups for p in group["params"]]
        require_finite(trained, trainer.global_step, "weights")  # the last good checkpoint is worth more
        trainer.save_checkpoint(self.path)
        self.save_seconds = time.monotonic() - began
        self.saved_step, self.saved_at, self.save_requested = trainer.global_step, time.monotonic(), False

    def _is_due(self, trainer: pl.Trainer, step: int) -> bool:
        by_step = bool(self.every_n_train_steps) and step % self.every_n_train_steps == 0  # type: ignore[operator]
        seconds = time.monotonic() - self.saved_at
        by_time = self.every_n_minutes is not None and seconds >= max(60 * self.every_n_minutes, 20 * self.save_seconds)
        return self.save_requested or by_step or by_time or step == trainer.max_steps

    @staticmethod
    def _agree(trainer: pl.Trainer, decision: bool) -> bool:
        """Whether any process decided so: a signal and a clock belong to one process, saving to all."""
        return trainer.strategy.reduce_boolean_decision(decision, all=False) if trainer.world_size > 1 else decision


class EmbeddingCheckpoint(pl.Callback):
    """Saves the learned vectors: `embeddings_gs-N.pt` every N steps, `embeddings.pt` always the newest of them.

    N counts completed steps. Vectors that are not finite are never saved. Of several concepts each also has the newest
    of its own in `embeddings_<word>.pt`.
    """

    def __init__(self, dirpath: str | Path, every_n_train_steps: int = 500) -> None:
        super().__init__()
        if every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps is {every_n_train_steps}; it must be at least 1")
        self.dirpath = Path(dirpath)
        self.every_n_train_steps = every_n_train_steps
        self.saved_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do not save again what an earlier part of the run has saved."""
        del pl_module
        self.saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every n-th step."""
        del outputs, batch, batch_idx
        if trainer.global_step % self.every_n_train_steps == 0 and trainer.global_step != self.saved_step:
            self.save(trainer, pl_module, numbered=True)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """Keep `embeddings.pt` as new as `last.ckpt`."""
        del checkpoint
        if trainer.global_step != self.saved_step:
            self.save(trainer, pl_module, numbered=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the final vectors under their step."""
        if trainer.global_step:
            self.save(trainer, pl_module, numbered=True)

    def save(self, trainer: pl.Trainer, pl_module: pl.LightningModule, numbered: bool) -> None:
        """Write the files now."""
        step = trainer.global_step
        require_finite(list(trained_vectors(pl_module)), step)
        if numbered:
            self.saved_step = step
        if not trainer.is_global_zero:
            return
        manager: Any = pl_module.embedding_manager
        for name in (f"embeddings_gs-{step}.pt", "embeddings.pt")[0 if numbered else 1 :]:
            manager.save(self.dirpath / name, {"step": step})
        for word, name in concept_files(manager.placeholders).items():
            manager.save(self.dirpath / name, {"step": step}, [word])


def concept_files(words: Iterable[str]) -> dict[str, str]:
    """File name of each concept's word where there are several: "<my cat>" gives `embeddings_my-cat.pt`."""
    concepts = [word for word in words if word not in per_img_token_list]
    files: dict[str, str] = {}
    for number, word in enumerate(concepts if len(concepts) > 1 else (), start=1):
        name = re.sub(r"[^\w-]+", "-", word).strip("-") or "word"
        if name in RESERVED or name == "word" or name.startswith("gs-"):
            name = f"{name}-{number}"
        while f"embeddings_{name}.pt" in files.values():
            name = f"{name}-{number}"
        files[word] = f"embeddings_{name}.pt"
    return files
