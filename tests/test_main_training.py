"""Training runs by main.py: what the trainer is given, what a run writes, what bad input says."""

from __future__ import annotations

import csv
import logging
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

import main
from ldm import run, training
from ldm.cli import run_command
from ldm.util import ConfigError
from tests.tiny_run import GradientDump, last_checkpoint, only_run, run_main, spawn_main, tiny_config, write_config


def build(tmp_path: Path, config: dict[str, Any], *words: Any) -> tuple[run.RunPlan, pl.LightningModule, pl.Trainer]:
    """Plan, model and trainer of a command, without running it."""
    base = write_config(tmp_path / "tiny.yaml", config)
    args, overrides = main.parse_args(["--base", str(base), "-t", "-l", str(tmp_path / "logs"), *map(str, words)])
    plan = run.make_plan(args, overrides)
    model = training.instantiate_from_config(plan.config.model)
    return plan, model, training.build_trainer(plan, model)


def first_stage_config() -> dict[str, Any]:
    from tests.test_main_resume import first_stage

    return first_stage()


# ------------------------------------------------------------------------------------------------------ devices


@pytest.mark.parametrize(
    ("gpus", "count", "wanted"),
    [
        ("0,", 2, {"accelerator": "gpu", "devices": [0]}),
        ("0", 2, {"accelerator": "gpu", "devices": [0]}),
        ("0,1", 2, {"accelerator": "gpu", "devices": [0, 1]}),
        ("0,1", 0, {"accelerator": "auto"}),
        ("-1", 2, {"accelerator": "auto", "devices": "auto"}),
        ("cpu", 2, {"accelerator": "cpu"}),
        ("mps", 0, {"accelerator": "mps"}),
        ("auto", 0, {"accelerator": "auto"}),
    ],
)
def test_gpu_lists(monkeypatch: pytest.MonkeyPatch, gpus: str, count: int, wanted: dict[str, Any]):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert training.parse_gpus(gpus) == wanted


def test_bad_gpu_lists(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="has 2 GPUs, numbered from 0"):
        training.parse_gpus("2,")
    with pytest.raises(ValueError, match="one of cpu, mps, auto"):
        training.parse_gpus("first")


def test_published_accelerator_ddp_is_a_strategy():
    options: dict[str, Any] = {"accelerator": "ddp", "gpus": "cpu"}
    training.choose_devices(options)
    assert options == {"strategy": "ddp", "accelerator": "cpu", "devices": 1}


def test_unused_parameters_are_looked_for_where_there_are_some():
    def flags(strategy: Any) -> Any:
        return strategy._ddp_kwargs["find_unused_parameters"]

    plan: Any = SimpleNamespace(lightning=OmegaConf.create())
    plain: Any = SimpleNamespace(automatic_optimization=True, embedding_manager=None)
    manual: Any = SimpleNamespace(automatic_optimization=False)
    assert training.choose_strategy(plan, {"devices": 1}, plain) == "auto"
    assert flags(training.choose_strategy(plan, {"devices": 2}, plain)) is False
    assert flags(training.choose_strategy(plan, {"devices": 2}, manual)) is True
    plan.lightning.find_unused_parameters = True
    assert flags(training.choose_strategy(plan, {"devices": 1, "strategy": "ddp"}, plain)) is True
    plan.lightning.strategy = {"params": {"static_graph": True}}
    assert training.choose_strategy(plan, {"devices": 2}, plain)._ddp_kwargs == {"static_graph": True}


# ------------------------------------------------------------------------------------------------------ trainer


def test_learning_rate_is_scaled_and_explained(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        plan, model, trainer = build(tmp_path, tiny_config(), "--accumulate_grad_batches", 3)
        training.set_learning_rate(plan, model, trainer)
    assert model.learning_rate == pytest.approx(3 * 1 * 4 * 1e-3)
    assert "0.012 = 3 (accumulate_grad_batches) x 1 (devices) x 4 (batch size) x 0.001" in caplog.text
    plan, model, trainer = build(tmp_path, tiny_config(), "--scale_lr", "false")
    training.set_learning_rate(plan, model, trainer)
    assert model.learning_rate == 1e-3


def test_the_fused_optimiser_clips_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Clipped(pl.Callback):
        def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
            gradients = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
            if gradients:
                norms.append(torch.cat(gradients).norm().item())
            fused.append(optimizer.param_groups[0]["fused"])

    norms: list[float] = []
    fused: list[bool] = []
    monkeypatch.setattr("ldm.models.diffusion.ddpm_base.FUSED_FROM", 0)
    words = ("--gradient_clip_val", 1e-3, "--precision", "bf16-mixed", "--max_steps", 3)
    plan, model, trainer = build(tmp_path, tiny_config(), *words)
    training.set_learning_rate(plan, model, trainer)
    trainer.callbacks.append(Clipped())
    trainer.fit(model, training.instantiate_from_config(plan.config.data))
    assert norms == pytest.approx([1e-3] * len(norms), rel=1e-3)
    assert len(norms) > 1
    assert all(fused)


def test_first_stages_accumulate_and_clip_themselves(tmp_path: Path):
    words = ("--accumulate_grad_batches", 2, "--gradient_clip_val", 0.5)
    plan, model, trainer = build(tmp_path, first_stage_config(), *words)
    assert (model.accumulate_grad_batches, model.gradient_clip_val) == (2, 0.5)
    assert (trainer.accumulate_grad_batches, trainer.gradient_clip_val) == (1, None)
    training.set_learning_rate(plan, model, trainer)
    assert model.learning_rate == pytest.approx(2 * 4 * 1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lightning.trainer.max_step=3"], "did you mean 'max_steps'"),
        (["lightning.callbacks.image_loger.params.max_images=3"], "image_loger needs a target.*'image_logger'"),
        (["lightning.callbacks.image_logger.params.max_image=3"], "did you mean 'max_images'"),
        (["lightning.callbacks.image_logger.parms.max_images=3"], "unknown key 'parms'.*did you mean 'params'"),
        (
            ["lightning.modelcheckpoint.params.save_top=3", "lightning.modelcheckpoint.params.save_top_k=1"],
            "save_top_k",
        ),
        (["--precision", "17"], "(?i)precision"),
    ],
)
def test_misspelt_trainer_options(tmp_path: Path, words: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, tiny_config(), *words)


def test_published_callback_sections(tmp_path: Path):
    config = tiny_config(monitor="val/loss_simple_ema")
    config["data"]["params"]["validation"] = config["data"]["params"]["train"]
    config["lightning"]["modelcheckpoint"]["params"]["every_n_train_steps"] = 500
    config["lightning"]["callbacks"]["metrics_over_trainsteps_checkpoint"] = {"params": {"every_n_train_steps": 10}}
    config["lightning"]["trainer"]["benchmark"] = True
    _, _, trainer = build(tmp_path, config)
    kinds = [type(callback).__name__ for callback in trainer.callbacks]
    for name in ("SetupCallback", "StepSeed", "ImageLogger", "CUDACallback", "LearningRateMonitor", "LastCheckpoint"):
        assert name in kinds
    every_step, best = (c for c in trainer.callbacks if type(c).__name__ == "ModelCheckpoint")
    assert (every_step._every_n_train_steps, every_step.save_top_k, every_step.save_weights_only) == (10, -1, True)
    assert (best.monitor, best.save_top_k) == ("val/loss_simple_ema", 3)
    (last,) = (c for c in trainer.callbacks if type(c).__name__ == "LastCheckpoint")
    assert last.every_n_train_steps == 500
    assert trainer.num_sanity_val_steps == 0


def test_other_loggers(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = tiny_config()
    config["lightning"]["logger"] = {"target": "pytorch_lightning.loggers.CSVLogger", "params": {"name": "second"}}
    _, _, trainer = build(tmp_path, config)
    assert [logger.name for logger in trainer.loggers] == ["csv", "second"]
    config["lightning"]["logger"] = {"target": "pytorch_lightning.loggers.TestTubeLogger"}
    _, _, trainer = build(tmp_path, config)
    assert type(trainer.loggers[1]).__name__ == "TensorBoardLogger"
    assert "no longer exists" in caplog.text


# ---------------------------------------------------------------------------------------------------- whole runs


def test_what_a_run_writes(tmp_path: Path):
    config = tiny_config(monitor="val/loss_simple_ema")
    config["data"]["params"]["validation"] = {"target": "tests.tiny_run.Squares", "params": {"count": 4}}
    config["lightning"]["callbacks"]["image_logger"]["params"] = {
        "batch_frequency": 3,
        "increase_log_steps": False,
        "log_images_kwargs": {"sample": False},
    }
    config["lightning"]["trainer"]["log_every_n_steps"] = 1
    run_main("--base", write_config(tmp_path / "tiny.yaml", config), "-t", "-l", tmp_path / "logs", "-n", "name")
    folder = only_run(tmp_path / "logs")
    assert folder.name.endswith("_name")
    saved = sorted(p.name for p in (folder / "configs").iterdir())
    assert [name[20:] for name in saved] == ["lightning.yaml", "project.yaml"]
    assert "lightning" not in OmegaConf.load(folder / "configs" / saved[1])
    (metrics,) = training.find_metrics(folder)
    with metrics.open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train/loss_simple"]) for row in rows if row["train/loss_simple"]]
    assert len(losses) == 7
    assert any(row["val/loss_simple_ema"] for row in rows)
    assert any(row["lr-AdamW"] for row in rows)
    assert list((folder / "tensorboard").glob("events*"))
    pictures = {p.relative_to(folder / "images").as_posix() for p in (folder / "images").rglob("*.jpg")}
    assert "train/inputs_gs-000003_e-000000_b-000002.jpg" in pictures
    assert "val/inputs_gs-000006_e-000001_b-000000.jpg" in pictures
    best = [p for p in (folder / "checkpoints").iterdir() if p.name != "last.ckpt"]
    assert 1 <= len(best) <= 3
    assert last_checkpoint(folder)["global_step"] == 7


def test_mixed_precision_trains_and_keeps_float32_weights(tmp_path: Path):
    config = write_config(tmp_path / "tiny.yaml", tiny_config())
    run_main("--base", config, "-t", "-l", tmp_path / "logs", "--precision", "bf16-mixed", "--max_steps", 2)
    state = last_checkpoint(only_run(tmp_path / "logs"))["state_dict"]
    assert {v.dtype for k, v in state.items() if k.startswith("model.")} == {torch.float32}


def test_nothing_to_do(tmp_path: Path):
    config = tiny_config()
    with pytest.raises(ValueError, match="add -t"):
        run_main("--base", write_config(tmp_path / "tiny.yaml", config), "-l", tmp_path)
    del config["model"]["base_learning_rate"]
    with pytest.raises(ConfigError, match=r"no model\.base_learning_rate"):
        run_main("--base", write_config(tmp_path / "tiny.yaml", config), "-t", "-l", tmp_path)
    del config["data"]
    with pytest.raises(ConfigError, match="no 'data' section"):
        run_main("--base", write_config(tmp_path / "tiny.yaml", config), "-t", "-l", tmp_path)


def test_test_set_is_used_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = tiny_config()
    config["data"]["params"]["test"] = config["data"]["params"]["train"]
    base = write_config(tmp_path / "tiny.yaml", config)
    asked: list[str] = []
    monkeypatch.setattr(pl.Trainer, "validate", lambda self, *_: asked.append("test"))
    monkeypatch.setattr(pl.Trainer, "fit", lambda self, *_, **__: asked.append("fit"))
    run_main("--base", base, "-l", tmp_path)
    run_main("--base", base, "-l", tmp_path, "-t")
    run_main("--base", base, "-l", tmp_path, "-t", "--no-test")
    assert asked == ["test", "fit", "test", "fit"]


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs limits on the size of files")
def test_full_disk_while_saving(tmp_path: Path):
    import resource

    config = tiny_config()
    config["lightning"]["callbacks"]["full"] = {"target": "tests.test_main_training.FullDisk", "params": {"step": 3}}
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=r"could not write .*last\.ckpt: the disk is full.*earlier file is intact"):
            run_main("--base", write_config(tmp_path / "tiny.yaml", config), "-t", "-l", tmp_path / "logs")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    folder = only_run(tmp_path / "logs") / "checkpoints"
    assert last_checkpoint(folder.parent)["global_step"] == 3
    assert [p.name for p in folder.iterdir()] == ["last.ckpt"]


class FullDisk(pl.Callback):
    """From a step on, no file can grow beyond 100 kB."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        import resource

        if trainer.global_step == self.step:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = tiny_config()
    config["model"]["params"]["timestep"] = 5
    words = ["--base", write_config(tmp_path / "bad.yaml", config), "-t", "-l", tmp_path / "logs"]
    with pytest.raises(SystemExit) as stopped:
        run_command(main.main, [str(word) for word in words])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: 'timestep' is not a parameter of ldm.models")
    assert "did you mean 'timesteps'" in line
    with pytest.raises(ConfigError):
        run_command(main.main, [*map(str, words), "--debug"])


# ---------------------------------------------------------------------------------------------------- processes


def test_two_processes_have_the_gradients_of_the_doubled_batch(tmp_path: Path):
    config = tiny_config()
    config["data"]["params"]["train"]["params"]["count"] = 8
    config["lightning"]["trainer"]["max_steps"] = 1
    dump = {"target": f"tests.tiny_run.{GradientDump.__name__}", "params": {"path": str(tmp_path / "two.pt")}}
    config["lightning"]["callbacks"]["dump"] = dump
    base = write_config(tmp_path / "tiny.yaml", config)
    words = ("--base", base, "-t", "-l", tmp_path / "logs")
    answer = spawn_main(*words, "--devices", 2, "--accelerator", "cpu", "--strategy", "ddp")
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert "2 (devices) x 4 (batch size)" in answer.stderr
    run_main(*words, "data.params.batch_size=8", f"lightning.callbacks.dump.params.path={tmp_path / 'one.pt'}")
    two, one = torch.load(tmp_path / "two.pt"), torch.load(tmp_path / "one.pt")
    assert two.keys() == one.keys()
    scale = max(float(g.abs().max()) for g in one.values())
    for name, gradient in one.items():
        assert float((two[name] - gradient).abs().max()) <= 1e-5 * scale, name
    runs = [p for p in (tmp_path / "logs").iterdir() if (p / "checkpoints" / "last.ckpt").exists()]
    assert len(runs) == 2
    assert len(list((tmp_path / "logs").iterdir())) == 2  # the second process made no directory of its own
