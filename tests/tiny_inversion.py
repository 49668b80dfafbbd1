"""Learning a word on the reference text-to-image model through main.py: config, command line, what was logged."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.modules.embedding_io import read_embeddings
from tests.conftest import END_TO_END
from tests.tiny_models import TEXT_WEIGHTS, text_config
from tests.tiny_run import only_run, run_main, write_config

STEPS = 5


def inversion_config(**params: Any) -> dict[str, Any]:
    """Config that learns '*' on the reference model; starts without -t. `params` are those of LatentDiffusion."""
    manager = {
        "target": "ldm.modules.embedding_manager.EmbeddingManager",
        "params": {"placeholder_strings": ["*"], "initializer_words": ["sculpture"]},
    }
    config = text_config()
    config["model"]["params"] |= {"personalization_config": manager, "ckpt_path": str(TEXT_WEIGHTS), **params}
    dataset = {"target": "ldm.data.personalized.PersonalizedBase", "params": {"size": 32, "repeats": 2}}
    config["train"] = True
    config["data"] = {
        "target": "main.DataModuleFromConfig",
        "params": {"batch_size": 2, "num_workers": 0, "train": dataset},
    }
    config["lightning"] = {
        "modelcheckpoint": {"params": {"every_n_train_steps": 2}},
        "callbacks": {"image_logger": {"params": {"disabled": True}}},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "max_steps": STEPS},
    }
    return config


def inversion(folder: Path, **params: Any) -> Path:
    """`inversion_config` as a file in `folder`."""
    return write_config(folder / "inversion.yaml", inversion_config(**params))


def words(config: Path, folder: Path) -> list[Any]:
    """Command line that learns from the reference pictures, with runs in `folder`/logs."""
    return ["--base", config, "--data_root", END_TO_END / "images", "-l", folder / "logs"]


def learn(config: Path, folder: Path, *more: Any) -> Path:
    """Learn from the reference pictures by main.py in this process; returns the run directory."""
    run_main(*words(config, folder), *more)
    return only_run(folder / "logs")


def learn_until(step: int, config: Path, folder: Path) -> Path:
    """The same with Ctrl-C in the middle of the step from `step` to `step` + 1."""
    send = {"target": "tests.tiny_run.SignalAt", "params": {"step": step, "name": "SIGINT"}}
    with pytest.raises(KeyboardInterrupt):
        run_main(*words(config, folder), f"+lightning.callbacks.send={send}")
    return only_run(folder / "logs")


def losses(run: Path) -> list[float]:
    """Training losses of all logged steps (set log_every_n_steps to 1 for all)."""
    found: dict[int, float] = {}
    for file in sorted(run.glob("csv/*/metrics.csv")):
        with file.open() as rows:
            found |= {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(rows) if row["train/loss"]}
    return [found[step] for step in sorted(found)]


def vectors(run: Path, name: str = "embeddings.pt") -> dict[str, torch.Tensor]:
    """Vectors by word, from a run's embedding file."""
    return read_embeddings(run / "checkpoints" / name).vectors
