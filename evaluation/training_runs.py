"""Learning one word through main.py: its arguments, going on after an interruption, what is kept."""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from evaluation.cells import digest, fingerprint
from evaluation.concepts import WORD
from evaluation.experiments import ModelSpec, TrainingOptions
from evaluation.plan import Training
from ldm.generate_model import find_model_files

TrainCommand = Callable[[list[str]], None]
MANAGER = "model.params.personalization_config.params"
DATA = "data.params.train.params"
SECOND_VECTOR_AT = 0.4  # of the training: the paper's 2000 of 5000 steps
RUN_NAME = "inversion"
NOT_WATCHED = ("image_logger", "fixed_validation", "run_report")  # nobody looks at these runs while they last


def learn(job: Training, folder: Path, model: ModelSpec, train: TrainCommand, device: str) -> dict[str, Any]:
    """Learn a word; leaves `embeddings_gs-N.pt` in `folder` and returns the steps that are kept.

    `train` is main.py's command. A run that was interrupted goes on.
    """
    pictures = copy_pictures(job, folder / "pictures")
    run = unfinished_run(folder)
    arguments = new_run(job, model, folder) if run is None else ["-r", str(run), "-t"]
    # Where things lie and what computes may be others than when the run was begun.
    arguments += ["--data_root", str(pictures)]
    arguments += ["--ckpt_path", str(find_model_files(model.checkpoint_path).checkpoint)]
    with quiet("ldm", "main"):
        train([*arguments, *device_flags(device)])
    gc.collect()  # a run's trainer and model point at each other: without this, several would be in memory
    finished = unfinished_run(folder)
    assert finished is not None
    files = sorted((finished / "checkpoints").glob("embeddings_gs-*.pt"))
    if not files:
        shutil.rmtree(folder / "run")
        raise ValueError(f"{finished} ended without a learned word; the same command learns it again")
    for file in files:
        shutil.copyfile(file, folder / file.name)
    shutil.rmtree(folder / "run")
    return {"steps": sorted(int(file.stem.rpartition("-")[2]) for file in files)}


def unfinished_run(folder: Path) -> Path | None:
    """The run directory that an earlier start left; what cannot be resumed is removed."""
    for run in sorted((folder / "run").glob("*")):
        if any((run / "configs").glob("*-project.yaml")) and any((run / "configs").glob("*-lightning.yaml")):
            return run
        shutil.rmtree(run) if run.is_dir() else run.unlink()
    return None


def copy_pictures(job: Training, folder: Path) -> Path:
    """The pictures to learn from, numbered in the concept's order.

    Raises `ValueError` when they are no longer those that the training was planned with, hours ago perhaps.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    copies = []
    for number, path in enumerate(job.concept.pictures[: job.options.pictures]):
        copies.append(folder / f"{number:03}{path.suffix.lower()}")
        shutil.copyfile(path, copies[-1])
    if digest([fingerprint(path) for path in copies]) != job.unit.settings["pictures"]:
        raise ValueError(f"the pictures of '{job.concept.label}' have changed meanwhile: start the command again")
    return folder


def new_run(job: Training, model: ModelSpec, folder: Path) -> list[str]:
    """Arguments of main.py for a training from the start; where pictures and weights lie comes besides."""
    options = job.options
    init_word = job.concept.init_word if options.init_word is None else options.init_word
    words = [
        "--base", str(model.config_file), "-t", "--no-test",
        "--logdir", str(folder / "run"), "--name", RUN_NAME, "--datadir_in_name", "false",
        "--placeholder_string", WORD,
        "--seed", str(job.seed),
        "--max_steps", str(options.steps),
        "--limit_val_batches", "0",
        "--enable_progress_bar", "false",
    ]  # fmt: skip
    words += ["--init_word", init_word] if init_word else []
    words += ["--precision", options.precision] if options.precision else []
    return words + [f"{key}={to_text(value)}" for key, value in overrides(options, job.concept.kind).items()]


def overrides(options: TrainingOptions, kind: str) -> dict[str, Any]:
    """Values of the training config, by dotted key, that say the options."""
    values: dict[str, Any] = {
        "model.base_learning_rate": options.learning_rate * options.learning_rate_factor,
        "data.params.batch_size": options.batch_size,
        f"{MANAGER}.num_vectors_per_token": options.vectors,
        "lightning.modelcheckpoint.params.every_n_train_steps": options.save_every or options.steps,
        **{f"lightning.callbacks.{name}.params.disabled": True for name in NOT_WATCHED},
    }
    if options.progressive:
        values[f"{MANAGER}.progressive_words"] = True
        values[f"{MANAGER}.progressive_every"] = max(1, round(SECOND_VECTOR_AT * options.steps))
    if options.per_image_tokens:
        values[f"{MANAGER}.per_image_tokens"] = True
        values[f"{DATA}.per_image_tokens"] = True
    if options.init_word == "":
        values[f"{MANAGER}.initializer_words"] = []
    if options.regularised:
        values["model.params.embedding_reg_weight"] = options.regularisation
    templates = options.style_templates if kind == "style" else options.templates
    if templates:
        values[f"{DATA}.templates"] = templates
    return values | dict(options.overrides)


def to_text(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.strip().removesuffix("...").strip()


def device_flags(device: str) -> list[str]:
    """main.py's flags for a device as sampling names it: auto, cpu, mps, cuda, cuda:1."""
    kind, _, index = device.partition(":")
    return ["--gpus", f"{index or 0}," if kind == "cuda" else kind]


def word_file(folder: Path, step: int, result: Mapping[str, Any]) -> Path:
    """The file of a word at a step; raises `ValueError` that names the steps that were kept."""
    path = folder / f"embeddings_gs-{step}.pt"
    if not path.is_file():
        raise ValueError(f"{folder}: no word was kept at step {step}, only at {result['steps']}; set save_every")
    return path


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Let only warnings of some loggers through: hundreds of trainings need not introduce themselves."""
    chosen: Sequence[logging.Logger] = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in chosen]
    for logger in chosen:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(chosen, levels, strict=True):
            logger.setLevel(level)
