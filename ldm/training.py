"""From a plan to a run: build model, data and trainer, set the learning rate, fit."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy, Strategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from pytorch_lightning.utilities.warnings import PossibleUserWarning

from ldm import callbacks as cb
from ldm.data.datamodule import DataModuleFromConfig
from ldm.run import RunPlan, parameters_of
from ldm.run_flags import MANAGER, literal
from ldm.training_callbacks import build_callbacks
from ldm.training_precision import use_half_weights
from ldm.training_speed import speed_up
from ldm.util import (
    ConfigError,
    check_params,
    count_params,
    get_obj_from_str,
    instantiate_from_config,
    to_plain,
)

log = logging.getLogger(__name__)

# Lightning leaves these to the model when it steps its optimisers itself.
MANUAL_OPTIONS = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
WORDS_FOR_DEVICES = ("cpu", "mps", "auto")


def execute(plan: RunPlan) -> None:
    """Carry out `plan`: train, then test when the config has a test set."""
    _quieten()
    if not plan.train and not (plan.test and OmegaConf.select(plan.config, "data.params.test")):
        raise ValueError("nothing to do: add -t to train (or set `train: true` in the config)")
    if "data" not in plan.config:
        raise ConfigError("the config has no 'data' section, so there is nothing to train on")
    missing = [folder for folder in plan.run_dir.absolute().parents if not folder.exists()]
    plan = reserve(plan)
    try:
        _execute(plan)
    except BaseException:
        with contextlib.suppress(OSError):  # only what was made for the run, and if the run left nothing there
            for folder in (plan.run_dir, *missing):
                folder.rmdir()
        raise


def reserve(plan: RunPlan) -> RunPlan:
    """Make the directory of a new run, under the next number where one of the same second was faster.

    The other processes of a distributed run write nothing of their own.
    """
    if not plan.fresh or not plan.train or getattr(rank_zero_only, "rank", 0) != 0:
        return plan
    folder, number = plan.run_dir, 2
    while True:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            folder = plan.run_dir.with_name(f"{plan.run_dir.name}-{number}")
            number += 1
        else:
            return dataclasses.replace(plan, run_dir=folder)


def _start_from_own_words(plan: RunPlan) -> None:
    """Where the file that a resumed run started from is gone, its newest words have the same shapes."""
    path = "model.params.embedding_manager_ckpt"
    within = f"{MANAGER}.params.embedding_manager_ckpt"  # as published
    start = OmegaConf.select(plan.config, path) or OmegaConf.select(plan.config, within)
    own = plan.checkpoint_dir / "embeddings.pt"
    if plan.resume is not None and start and not Path(start).exists() and own.is_file():
        log.info("%s is gone: going on with the words of %s", start, own)
        OmegaConf.update(plan.config, path, literal(str(own)))


def _execute(plan: RunPlan) -> None:
    _start_from_own_words(plan)
    data = build_data(plan)
    pl.seed_everything(plan.seed, verbose=False)
    model = instantiate_from_config(plan.config.model)
    trainer = build_trainer(plan, model)
    set_learning_rate(plan, model, trainer)
    speed_up(model, plan, trainer.strategy.root_device)
    try:
        if plan.train:
            trainer.fit(model, data, ckpt_path=plan.resume)
            if not any(isinstance(c, cb.StepSeed) and c.batches for c in trainer.callbacks):  # type: ignore[attr-defined]
                log.warning(
                    "No step was trained: the run stands at step %d, and the config ends it at max_steps %s or "
                    "max_epochs %s; --max_steps sets another end", trainer.global_step, trainer.max_steps,
                    trainer.max_epochs,
                )  # fmt: skip
        if plan.test and OmegaConf.select(plan.config, "data.params.test"):
            run_test(trainer, model, data)
    except cb.RunStopped as stop:
        _say_how_to_go_on(stop, plan)
        raise KeyboardInterrupt from None
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except RuntimeError as error:
        if plan.resume is None or "loading state_dict" not in str(error):
            raise
        what = "".join(str(error).splitlines()[1:2]).strip()
        raise ValueError(f"'{plan.resume}' is of another model than the config builds: {what}") from error


@rank_zero_only
def _say_how_to_go_on(stop: cb.RunStopped, plan: RunPlan) -> None:
    """Said by the first process: the others' plans may name another directory, as they start a moment later."""
    log.warning("%s; go on with: python main.py -r %s", stop, plan.run_dir)


def _quieten() -> None:
    """One process speaks for all; of Lightning's remarks only the warnings that a user can act upon."""
    if getattr(rank_zero_only, "rank", 0) != 0:
        logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    for remark in (
        *(".*treespec.*", "Checkpoint directory .* exists and is not empty"),
        "The dirpath has changed",  # the run directory was moved; checkpoints are sought where it is now
    ):
        warnings.filterwarnings("ignore", message=remark)


def run_test(trainer: pl.Trainer, model: pl.LightningModule, data: pl.LightningDataModule) -> None:
    """Test on the test set; a model without a `test_step` computes its validation metrics there."""
    if type(model).test_step is pl.LightningModule.test_step:
        trainer.validate(model, data.test_dataloader())
    else:
        trainer.test(model, data)


def build_data(plan: RunPlan) -> Any:
    """The data module, seeded like the run where it takes a seed."""
    accepted = parameters_of(plan.config.data.target) or ()
    params = plan.config.data.get("params") or {}
    extra = {"seed": plan.seed} if "seed" in accepted and "seed" not in params else {}
    data = instantiate_from_config(plan.config.data, **extra)
    if isinstance(data, DataModuleFromConfig):
        data.setup()  # what is wrong with the data shows before a large model is loaded
    return data


# ------------------------------------------------------------------------------------------------------ trainer


def build_trainer(plan: RunPlan, model: pl.LightningModule) -> pl.Trainer:
    """The Trainer that `plan.lightning` describes, with this code base's defaults for the rest."""
    options: dict[str, Any] = to_plain(plan.lightning.get("trainer")) or {}
    if options.get("callbacks"):
        raise ConfigError("lightning.trainer.callbacks is not read: name them under lightning.callbacks")
    choose_devices(options)
    check_params("lightning.trainer", pl.Trainer, options)
    if not model.automatic_optimization:
        for name in MANUAL_OPTIONS:
            value = options.pop(name, None)
            if value is not None:
                setattr(model, name, value)
    options.setdefault("num_sanity_val_steps", 0)
    options.setdefault("enable_model_summary", False)
    options.setdefault("log_every_n_steps", 10)
    options.setdefault("default_root_dir", str(plan.run_dir))
    # the data module orders and shares out the samples itself
    options.setdefault("use_distributed_sampler", False)
    options["strategy"] = choose_strategy(plan, options, model)
    options["plugins"] = [cb.SafeCheckpointIO(), *_as_list(options.get("plugins"))]
    use_half_weights(options, model)
    if options.get("logger", True) is True:
        options["logger"] = build_loggers(plan)
    options["callbacks"] = build_callbacks(plan, model, options)
    try:
        trainer = pl.Trainer(**options)
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    device = trainer.strategy.root_device
    total, trained = count_params(model), sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info(
        "Training %s of %s parameters on %d x %s, precision %s",
        f"{trained:,}", f"{total:,}", trainer.world_size, device.type, trainer.precision,
    )  # fmt: skip
    return trainer


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def choose_devices(options: dict[str, Any]) -> None:
    """Turn the published `gpus` and `accelerator: ddp` into Lightning 2's words; one device unless told otherwise."""
    gpus = options.pop("gpus", None)
    if str(options.get("accelerator", "")).startswith("ddp"):
        options.setdefault("strategy", options.pop("accelerator"))
    if gpus is not None:
        options.update(parse_gpus(str(gpus)))
    options.setdefault("accelerator", "auto")
    options.setdefault("devices", 1)


def parse_gpus(gpus: str) -> dict[str, Any]:
    """`0,` or `0`: the first GPU; `0,1`: two of them; `-1`: all; `cpu`, `mps`, `auto` by name.

    Without any GPU in the machine the numbers mean whatever device there is, with a warning.
    """
    if gpus in WORDS_FOR_DEVICES:
        return {"accelerator": gpus}
    if gpus.strip(",") == "-1":
        return {"accelerator": "auto", "devices": "auto"}
    numbers = [word for word in gpus.replace(" ", "").split(",") if word]
    if not numbers or not all(re.fullmatch(r"\d+", word) for word in numbers):
        raise ValueError(f"--gpus {gpus}: give GPU numbers such as '0,' or '0,1', or one of cpu, mps, auto")
    available = torch.cuda.device_count()
    if available == 0:
        log.warning("--gpus %s: there is no CUDA device here, using what there is", gpus)
        return {"accelerator": "auto"}
    chosen = [int(word) for word in numbers]
    if max(chosen) >= available:
        raise ValueError(f"--gpus {gpus}: this machine has {available} GPUs, numbered from 0")
    return {"accelerator": "gpu", "devices": chosen}


def choose_strategy(plan: RunPlan, options: dict[str, Any], model: pl.LightningModule) -> str | Strategy:
    """DDP that copes with unused parameters where some steps leave any unused; else what the config says.

    Unused are, in a step, the parameters of the other optimiser (first stages) and those of the other stage where a
    model is tuned after its word. Words that no caption of a batch names get gradients of zero.
    """
    strategy = to_plain(plan.lightning.get("strategy")) or options.get("strategy", "auto")
    if isinstance(strategy, dict):
        target = strategy.get("target", "pytorch_lightning.strategies.DDPStrategy")
        return _build_foreign(target, strategy.get("params") or {})
    count = options["devices"]
    one = count in (1, "1") or isinstance(count, list) and len(count) == 1
    several = options.get("num_nodes", 1) > 1 or not one
    if strategy == "ddp" or strategy == "auto" and several:
        some_unused = not model.automatic_optimization or getattr(model, "unfreeze_model", False)
        return DDPStrategy(find_unused_parameters=bool(plan.lightning.get("find_unused_parameters", some_unused)))
    return strategy


def build_loggers(plan: RunPlan) -> list[Logger]:
    """CSV and TensorBoard, or CSV and what `lightning.logger` names."""
    csv = CSVLogger(plan.run_dir, name="csv", version=plan.started, flush_logs_every_n_steps=20)
    config = to_plain(plan.lightning.get("logger")) or {}
    target = config.get("target", "")
    if not target or target.endswith("TestTubeLogger"):
        if target:
            log.warning("%s no longer exists: logging for TensorBoard instead", target)
        return [csv, TensorBoardLogger(plan.run_dir, name="tensorboard", version="")]
    accepted = parameters_of(target, trainer_part=True) or ()
    defaults = {"save_dir": str(plan.run_dir), "name": plan.run_dir.name}
    params = {k: v for k, v in defaults.items() if k in accepted} | (config.get("params") or {})
    for name, value in params.items():
        if "://" in str(value) and name in ("save_dir", "root_dir", "log_dir"):
            raise ConfigError(f"lightning.logger: {name} {value} is no folder of this machine")
    return [csv, _build_foreign(target, params)]


def _build_foreign(target: str, params: dict[str, Any]) -> Any:
    """Build an object of another library, whose `**kwargs` may reach further than its base classes."""
    try:
        return get_obj_from_str(target, trainer_part=True)(**params)
    except TypeError as error:
        raise ConfigError(f"{target}: {error}") from error


# ------------------------------------------------------------------------------------------------ learning rate


def set_learning_rate(plan: RunPlan, model: pl.LightningModule, trainer: pl.Trainer) -> None:
    """Set `model.learning_rate`: base rate x accumulation x devices x batch size, or the base rate alone."""
    if not plan.train:
        return
    base = plan.config.model.get("base_learning_rate")
    if base is None:
        raise ConfigError("the config has no model.base_learning_rate: add model.base_learning_rate=1e-4 or the like")
    base = float(base)
    rate = base
    if plan.scale_lr:
        manual = not model.automatic_optimization
        accumulate = int((model if manual else trainer).accumulate_grad_batches)  # type: ignore[arg-type]
        batch_size = int(OmegaConf.select(plan.config, "data.params.batch_size") or 1)
        rate = accumulate * trainer.world_size * batch_size * base
        log.info(
            "Learning rate %.3g = %d (accumulate_grad_batches) x %d (devices) x %d (batch size) x %.3g (base rate)",
            rate, accumulate, trainer.world_size, batch_size, base,
        )  # fmt: skip
    else:
        log.info("Learning rate %.3g (base rate, not scaled)", rate)
    if getattr(model, "unfreeze_model", False):
        log.info("Learning rate of the model itself %.3g (model_lr, not scaled)", model.model_lr)
    model.learning_rate = rate  # type: ignore[assignment]


def find_metrics(run_dir: str | Path) -> list[Path]:
    """CSV files of every start of a run, oldest first."""
    return sorted(Path(run_dir).glob("csv/*/metrics.csv"))
