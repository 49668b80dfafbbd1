"""The callbacks of a run: the standing ones, those that fit the model, and those that the config names."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint

from ldm.run import RunPlan, parameters_of
from ldm.util import ConfigError, check_params, did_you_mean, get_obj_from_str, to_plain

# Callbacks of `lightning.callbacks` that need no `target:`.
CALLBACKS: dict[str, str] = {
    "setup_callback": "ldm.callbacks.SetupCallback",
    "image_logger": "ldm.callbacks.ImageLogger",
    "learning_rate_logger": "ldm.callbacks.LearningRateMonitor",
    "configured_rate": "ldm.callbacks.ConfiguredRate",
    "cuda_callback": "ldm.callbacks.CUDACallback",
    "contact_sheet": "ldm.callbacks.ContactSheet",
    "progress_bar": "ldm.callbacks.ProgressBar",
    "step_seed": "ldm.callbacks.StepSeed",
    "last_checkpoint": "ldm.callbacks.LastCheckpoint",
    "embedding_checkpoint": "ldm.callbacks.EmbeddingCheckpoint",
    "gradient_guard": "ldm.callbacks.GradientGuard",
    "fixed_validation": "ldm.callbacks.FixedValidation",
    "sample_grids": "ldm.callbacks.SampleGrids",
    "alignment": "evaluation.alignment.Alignment",
    "run_report": "ldm.callbacks.RunReport",
    "mode_swap_callback": "ldm.callbacks.ModeSwapCallback",
    "moments_cache": "ldm.callbacks.MomentsCache",
    "model_weights": "ldm.callbacks.ModelWeights",
    "metrics_over_trainsteps_checkpoint": "pytorch_lightning.callbacks.ModelCheckpoint",
}
PROGRESS = ("fixed_validation", "sample_grids", "run_report")  # what shows how learning a word goes


def build_callbacks(plan: RunPlan, model: pl.LightningModule, options: dict[str, Any]) -> list[pl.Callback]:
    """The standing callbacks with the parameters of `lightning.callbacks`, and those that it adds."""
    checkpoint = to_plain(plan.lightning.get("modelcheckpoint")) or {}
    every = (checkpoint.get("params") or {}).get("every_n_train_steps")
    defaults: dict[str, dict[str, Any]] = {
        "setup_callback": {
            "run_dir": plan.run_dir,
            "started": plan.started,
            "config": plan.config,
            "lightning_config": plan.lightning,
        },
        "configured_rate": {},
        "step_seed": {"seed": plan.seed},
        "image_logger": {"save_dir": plan.run_dir / "images"},
        "cuda_callback": {},
    }
    if getattr(model, "embedding_manager", None) is not None:
        defaults |= {"contact_sheet": {"run_dir": plan.run_dir}, "moments_cache": {}}
    if options.get("enable_progress_bar", True):
        defaults["progress_bar"] = {}
    if options.get("logger") is not False:
        defaults["learning_rate_logger"] = {"logging_interval": "step"}
    if options.get("enable_checkpointing", True) and not options.get("fast_dev_run"):
        defaults |= _saving_callbacks(plan, model, every)
    chosen: dict[str, Any] = to_plain(plan.lightning.get("callbacks")) or {}
    if getattr(model, "embedding_manager", None) is not None:
        defaults |= _progress_callbacks(plan, chosen, every or 500, "embedding_checkpoint" in defaults)
        # the sample grids show the same for less, so it draws only where a config asks for it
        defaults["image_logger"]["disabled"] = "image_logger" not in chosen
        if options.get("fast_dev_run"):
            chosen |= {name: {"params": {"disabled": True}} for name in PROGRESS}
    if "metrics_over_trainsteps_checkpoint" in chosen:
        defaults["metrics_over_trainsteps_checkpoint"] = {
            "dirpath": plan.checkpoint_dir / "trainstep_checkpoints",
            "filename": "{epoch:06}-{step:09}",
            "save_top_k": -1,
            "every_n_train_steps": 10000,
            "save_weights_only": True,
        }
    names = sorted({**defaults, **chosen}, key=lambda name: name == "run_report")  # it shows what the others left
    built = [_build_callback(name, chosen.get(name) or {}, defaults.get(name, {})) for name in names]
    if "last_checkpoint" in defaults:
        built += best_checkpoints(plan, model, checkpoint, options)
    return built


def _saving_callbacks(plan: RunPlan, model: pl.LightningModule, every: int | None) -> dict[str, dict[str, Any]]:
    saving: dict[str, dict[str, Any]] = {
        "last_checkpoint": {"dirpath": plan.checkpoint_dir, "every_n_train_steps": every},
    }
    if getattr(model, "embedding_manager", None) is not None:
        saving["embedding_checkpoint"] = {"dirpath": plan.checkpoint_dir, "every_n_train_steps": every or 500}
        if getattr(model, "inverts", False):
            saving["gradient_guard"] = {}
        else:
            saving["model_weights"] = {"dirpath": plan.checkpoint_dir, "config": plan.config}
    return saving


def _progress_callbacks(plan: RunPlan, chosen: dict[str, Any], every: int, saving: bool) -> dict[str, dict[str, Any]]:
    """What shows how an inversion goes; a config that draws no training pictures gets no sample grids either."""
    drawing = not (chosen.get("image_logger", {}).get("params") or {}).get("disabled", False)
    return {
        "fixed_validation": {
            "dirpath": plan.checkpoint_dir if saving else None,
            "every_n_train_steps": max(10, every // 5),
        },
        "sample_grids": {"run_dir": plan.run_dir, "every_n_train_steps": every, "disabled": not drawing},
        "run_report": {
            "run_dir": plan.run_dir,
            "started": plan.started,
            "config": plan.config,
            "lightning_config": plan.lightning,
        },
    }


def _build_callback(name: str, config: dict[str, Any], defaults: dict[str, Any]) -> pl.Callback:
    unknown = [key for key in config if key not in ("target", "params")]
    if unknown:
        hint = did_you_mean(unknown[0], ("target", "params"))
        raise ConfigError(f"unknown key '{unknown[0]}' in lightning.callbacks.{name}{hint}; it takes target and params")
    target = config.get("target") or CALLBACKS.get(name)
    if target is None:
        raise ConfigError(f"lightning.callbacks.{name} needs a target{did_you_mean(name, CALLBACKS)}")
    accepted = parameters_of(target, trainer_part=True) or ()
    params = {k: v for k, v in defaults.items() if k in accepted} | (config.get("params") or {})
    return _made(target, params)


def _made(target: str, params: dict[str, Any]) -> pl.Callback:
    factory = get_obj_from_str(target, trainer_part=True)
    check_params(target, factory, params)
    return factory(**params)


def best_checkpoints(
    plan: RunPlan, model: pl.LightningModule, config: dict[str, Any], options: dict[str, Any]
) -> list[pl.Callback]:
    """Lightning's ModelCheckpoint for the best `save_top_k` by the monitored metric, or as the config asks for.

    `last.ckpt` is `LastCheckpoint`'s; so without a metric there is nothing to do unless `save_top_k` is given.
    """
    params = dict(config.get("params") or {})
    if getattr(model, "inverts", False) and "save_top_k" not in params:
        return []  # FixedValidation keeps the best vectors
    params.pop("save_last", None)
    monitor = params.get("monitor", getattr(model, "monitor", None))
    has_set = (plan.config.data.get("params") or {}).get("validation") is not None
    validates = has_set and options.get("limit_val_batches") != 0
    if monitor and validates:
        params.pop("every_n_train_steps", None)  # the metric is known after a validation
        defaults: dict[str, Any] = {"monitor": monitor, "save_top_k": 3, "save_on_train_epoch_end": False}
    elif params.get("save_top_k"):
        params.pop("monitor", None)
        defaults = {}
    else:
        return []
    defaults |= {"dirpath": str(plan.checkpoint_dir), "filename": "{epoch:06}-{step:09}"}
    check_params("lightning.modelcheckpoint", ModelCheckpoint, params)
    target = config.get("target") or "pytorch_lightning.callbacks.ModelCheckpoint"
    return [_made(target, {**defaults, **params})]
