"""What the tests of training share: small pictures, a small diffusion model, ways to stop a run, to run main.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import yaml
from torch.utils.data import Dataset

import main

ROOT = Path(__file__).parents[1]
COLOURS = ("red", "green", "blue", "yellow")
RGB = {"red": (0.9, -0.8, -0.8), "green": (-0.8, 0.8, -0.7), "blue": (-0.8, -0.7, 0.9), "yellow": (0.9, 0.8, -0.8)}


class Squares(Dataset):
    """Coloured squares on grey: `image` (H, W, 3), `class_label` 0..3, `caption`; some noise from torch's generator."""

    def __init__(self, size: int = 8, count: int = 10, first: int = 0) -> None:
        self.size, self.count, self.first = size, count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = index + self.first
        colour = COLOURS[number % 4]
        image = np.full((self.size, self.size, 3), -0.1, dtype=np.float32)
        half = self.size // 2
        x, y = (number * 7) % half, (number * 5) % half
        image[y : y + half, x : x + half] = RGB[colour]
        image += 0.05 * torch.randn(image.shape).numpy()
        return {"image": image, "class_label": number % 4, "human_label": colour, "caption": f"a {colour} square"}


class StopAt(pl.Callback):
    """Ends the process, or raises, when batch number `batch` of the run begins: the step before it is the last."""

    def __init__(self, batch: int, number: int = 0) -> None:
        self.batch, self.number = batch, number

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.batch:
            if self.number:
                os.kill(os.getpid(), self.number)
            else:
                raise RuntimeError("stopped by the test")


class SignalAt(pl.Callback):
    """Sends the own process a signal in the middle of the step from `step` to `step` + 1."""

    def __init__(self, step: int, name: str) -> None:
        self.step, self.name = step, name

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), getattr(signal, self.name))


class AskToStop(pl.Callback):
    """Ends the run after batch number `batch`, as Lightning's Timer does: whether or not a step is complete."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed + 1 == self.batch:
            trainer.should_stop = True


class GradientDump(pl.Callback):
    """Writes the gradients of the first optimiser step to a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == 0 and trainer.is_global_zero:
            torch.save({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}, self.path)


def tiny_config(**params: Any) -> dict[str, Any]:
    """A pixel-space DDPM of 8 x 8 pictures that trains in milliseconds per step."""
    unet = {"image_size": 8, "in_channels": 3, "out_channels": 3, "model_channels": 32, "attention_resolutions": [],
            "num_res_blocks": 1, "channel_mult": [1], "num_heads": 2}  # fmt: skip
    model = {"unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
             "timesteps": 20, "image_size": 8, "channels": 3}  # fmt: skip
    squares = {"target": "tests.tiny_run.Squares", "params": {"size": 8, "count": 10}}
    return {
        "model": {
            "base_learning_rate": 1e-3,
            "target": "ldm.models.diffusion.ddpm.DDPM",
            "params": {**model, **params},
        },
        "data": {
            "target": "main.DataModuleFromConfig",
            "params": {"batch_size": 4, "num_workers": 0, "train": squares},
        },
        "lightning": {
            "modelcheckpoint": {"params": {"every_n_train_steps": 1}},
            "callbacks": {"image_logger": {"params": {"disabled": True}}},
            "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "max_steps": 7},
        },
    }


def write_config(path: Path, config: dict[str, Any]) -> Path:
    """Save a config as YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    return path


def run_main(*words: Any) -> None:
    """Run main.py in this process."""
    main.main([str(word) for word in words])


def spawn_main(*words: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run main.py as a command."""
    command = [sys.executable, str(ROOT / "main.py"), *(str(word) for word in words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, **options)


def only_run(logdir: Path) -> Path:
    """The one run directory in `logdir`."""
    (run,) = (path for path in logdir.iterdir() if path.is_dir())
    return run


def last_checkpoint(run: Path) -> dict[str, Any]:
    """Contents of `last.ckpt`."""
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same_state(one: Path, other: Path) -> None:
    """Assert that two runs ended with the same weights, averages and moments, bit by bit."""
    a, b = last_checkpoint(one), last_checkpoint(other)
    assert a["global_step"] == b["global_step"]
    assert a["state_dict"].keys() == b["state_dict"].keys()
    different = [k for k, v in a["state_dict"].items() if not torch.equal(v, b["state_dict"][k])]
    assert not different, f"{len(different)} tensors differ: {different[:5]}"
    for x, y in zip(a["optimizer_states"], b["optimizer_states"], strict=True):
        for key, state in x["state"].items():
            assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(y["state"][key][n])) for n, v in state.items())
