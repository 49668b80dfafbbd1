"""A run that is killed and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from tests.tiny_run import (
    ROOT,
    assert_same_state,
    last_checkpoint,
    only_run,
    run_main,
    spawn_main,
    tiny_config,
    write_config,
)

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 7  # with 10 samples in batches of 4: two epochs and a bit
STOP = "lightning.callbacks.stop"


def diffusion() -> dict[str, Any]:
    schedule = {"warm_up_steps": [3], "cycle_lengths": [100], "f_start": [0.1], "f_max": [1.0], "f_min": [1.0]}
    scheduler = {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": schedule}
    config = tiny_config(learn_logvar=True, scheduler_config=scheduler, monitor="val/loss_simple_ema")
    config["data"]["params"]["validation"] = {"target": "tests.tiny_run.Squares", "params": {"count": 3, "first": 10}}
    return config


def accumulating() -> dict[str, Any]:
    config = tiny_config()
    config["lightning"]["trainer"]["accumulate_grad_batches"] = 2
    config["data"]["params"]["num_workers"] = 1
    return config


def first_stage() -> dict[str, Any]:
    """A first stage with averages and a discriminator that joins at step 3."""
    config = tiny_config()
    layers = {"double_z": True, "z_channels": 2, "resolution": 8, "in_channels": 3, "out_ch": 3, "ch": 32,
              "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": []}  # fmt: skip
    loss = {"disc_start": 3, "disc_num_layers": 1, "disc_weight": 0.5, "perceptual_weight": 0.0}
    config["model"] = {
        "base_learning_rate": 1e-4,
        "target": "ldm.models.autoencoder.AutoencoderKL",
        "params": {
            "embed_dim": 2,
            "ddconfig": layers,
            "use_ema": True,
            "lossconfig": {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": loss},
        },
    }
    return config


CONFIGS: dict[str, Callable[[], dict[str, Any]]] = {
    "diffusion": diffusion,
    "accumulating": accumulating,
    "first_stage": first_stage,
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Run directory of an undisturbed run of `STEPS` steps."""
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            run_main("--base", write_config(folder / "full.yaml", CONFIGS[name]()), "-t", "-l", folder / "logs")
            made[name] = only_run(folder / "logs")
        return made[name]

    return run


def stop_before(name: str, batch: int, folder: Path, number: int = 0) -> Path:
    """A config whose run ends when batch `batch` begins."""
    config = CONFIGS[name]()
    stop = {"target": "tests.tiny_run.StopAt", "params": {"batch": batch, "number": number}}
    config["lightning"]["callbacks"]["stop"] = stop
    return write_config(folder / "stopping.yaml", config)


@pytest.mark.parametrize(
    ("name", "batch"),
    [("diffusion", 1), ("diffusion", 3), ("diffusion", 5), ("accumulating", 5), ("first_stage", 4)],
)
def test_resume_goes_on_bit_by_bit(name: str, batch: int, unbroken: Callable[[str], Path], tmp_path: Path):
    with pytest.raises(RuntimeError, match="stopped by the test"):
        run_main("--base", stop_before(name, batch, tmp_path), "-t", "-l", tmp_path / "logs")
    run = only_run(tmp_path / "logs")
    assert last_checkpoint(run)["global_step"] < STEPS
    run_main("-r", run, f"{STOP}.params.batch=-1")
    assert_same_state(unbroken(name), run)


def test_sigkill_and_resume_of_the_moved_directory(unbroken: Callable[[str], Path], tmp_path: Path):
    config = stop_before("diffusion", 4, tmp_path, number=int(signal.SIGKILL))
    killed = spawn_main("--base", config, "-t", "-l", tmp_path / "logs")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    run = only_run(tmp_path / "logs").rename(tmp_path / "moved")
    (run / "checkpoints" / ".last.ckpt.abc.tmp").write_bytes(b"left by a kill while saving")
    run_main("-r", run / "checkpoints" / "last.ckpt", f"{STOP}.params.batch=-1")
    assert_same_state(unbroken("diffusion"), run)
    assert not list((run / "checkpoints").glob(".*.tmp"))
    assert len(list((run / "csv").glob("*/metrics.csv"))) == 2  # the log of the first part is still there


@pytest.mark.parametrize("first_part", [["--max_steps", 4], ["--max_steps", -1, "--max_epochs", 1]])
def test_a_finished_run_can_be_made_longer(first_part: list[Any], unbroken: Callable[[str], Path], tmp_path: Path):
    config = write_config(tmp_path / "part.yaml", CONFIGS["diffusion"]())
    run_main("--base", config, "-t", "-l", tmp_path / "logs", *first_part)
    run = only_run(tmp_path / "logs")
    run_main("-r", run, "--max_steps", STEPS, "--max_epochs", -1)
    assert_same_state(unbroken("diffusion"), run)


def test_a_new_learning_rate_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Here with a schedule: its factor of the step stays, the rate that it multiplies is the new one."""
    caplog.set_level("INFO")
    with pytest.raises(RuntimeError, match="stopped by the test"):
        run_main("--base", stop_before("diffusion", 5, tmp_path), "-t", "-l", tmp_path / "logs")
    run = only_run(tmp_path / "logs")
    before = last_checkpoint(run)["optimizer_states"][0]["param_groups"][0]
    rate = before["initial_lr"] / 4
    run_main("-r", run, f"{STOP}.params.batch=-1", f"model.base_learning_rate={rate}", "--scale_lr", "false")
    assert f"{rate:.3g} from now on" in caplog.text
    state = last_checkpoint(run)
    assert state["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(rate)  # past the warm-up
    assert state["lr_schedulers"][0]["base_lrs"] == [rate]


def test_a_run_that_is_over_leaves_nothing_in_memory(tmp_path: Path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    gc.collect()
    alive = {id(item) for item in gc.get_objects() if type(item) is pl.Trainer}
    run_main("--base", write_config(tmp_path / "a.yaml", CONFIGS["diffusion"]()), "-t", "-l", tmp_path / "logs")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    gc.collect()
    assert {id(item) for item in gc.get_objects() if type(item) is pl.Trainer} <= alive


def test_ctrl_c_saves_and_stops(unbroken: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = CONFIGS["diffusion"]()
    del config["lightning"]["modelcheckpoint"]
    send = {"target": "tests.tiny_run.SignalAt", "params": {"step": 2, "name": "SIGINT"}}
    config["lightning"]["callbacks"]["send"] = send
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_main("--base", write_config(tmp_path / "a.yaml", config), "-t", "-l", tmp_path / "logs")
    assert signal.getsignal(signal.SIGINT) is before
    run = only_run(tmp_path / "logs")
    assert last_checkpoint(run)["global_step"] == 3
    assert f"python main.py -r {run}" in caplog.text
    run_main("-r", run)
    assert_same_state(unbroken("diffusion"), run)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="not on Windows")
def test_sigusr1_saves_and_goes_on(tmp_path: Path):
    config = tiny_config()
    config["lightning"]["callbacks"]["send"] = {
        "target": "tests.tiny_run.SignalAt",
        "params": {"step": 1, "name": "SIGUSR1"},
    }
    config["lightning"]["callbacks"]["stop"] = {"target": "tests.tiny_run.StopAt", "params": {"batch": 4}}
    config["lightning"]["modelcheckpoint"]["params"]["every_n_train_steps"] = 1000
    with pytest.raises(RuntimeError, match="stopped by the test"):
        run_main("--base", write_config(tmp_path / "a.yaml", config), "-t", "-l", tmp_path / "logs")
    assert last_checkpoint(only_run(tmp_path / "logs"))["global_step"] == 2


def test_resuming_from_other_files_is_refused(unbroken: Callable[[str], Path], tmp_path: Path):
    run = unbroken("diffusion")
    weights = run / "checkpoints" / "weights.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(2)}}, weights)
    with pytest.raises(ValueError, match="--ckpt_path"):
        run_main("-r", weights)
    whole = (run / "checkpoints" / "last.ckpt").read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="weights.ckpt"):
        run_main("-r", weights)
    weights.unlink()
    moved = shutil.copytree(run, tmp_path / "run")
    wider = "model.params.unet_config.params.model_channels=64"
    with pytest.raises(ValueError, match=r"last\.ckpt' is of another model than the config builds: .*size mismatch"):
        run_main("-r", moved, "--max_steps", STEPS + 1, wider)


@pytest.mark.slow
def test_kill_at_ten_random_moments(unbroken: Callable[[str], Path], tmp_path: Path):
    config = CONFIGS["diffusion"]()
    words: list[Any] = ["--base", write_config(tmp_path / "a.yaml", config), "-t", "-l", tmp_path / "logs"]
    steps = 400
    run_main(*words[:2], "-t", "-l", tmp_path / "whole", "--max_steps", steps)
    choose = random.Random(0)
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for _ in range(10):
        process = subprocess.Popen([sys.executable, "main.py", *map(str, words), "--max_steps", str(steps)],
                                   cwd=ROOT, env={**os.environ, **environment})  # fmt: skip
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("logs/*/checkpoints/last.ckpt")) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(choose.uniform(0, 10))
        process.kill()
        process.wait()
        words = ["-r", only_run(tmp_path / "logs")]
    run_main(*words, "--max_steps", steps)
    assert_same_state(only_run(tmp_path / "whole"), only_run(tmp_path / "logs"))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.parametrize(("number", "workers", "devices"), [("SIGINT", 2, 1), ("SIGINT", 0, 2), ("SIGTERM", 0, 2)])
def test_a_signal_that_reaches_all_processes_still_saves(number: str, workers: int, devices: int, tmp_path: Path):
    config = tiny_config()
    config["data"]["params"]["num_workers"] = workers
    config["lightning"]["trainer"] |= {"max_steps": 1_000_000, "log_every_n_steps": 1}
    del config["lightning"]["modelcheckpoint"]
    words = ["--base", write_config(tmp_path / "a.yaml", config), "-t", "-l", tmp_path / "logs", "--devices", devices]
    process = subprocess.Popen(
        [sys.executable, "main.py", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("logs/*/csv/*/metrics.csv")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.Signals[number])
    message = process.communicate(timeout=120)[1]
    assert process.returncode == 130, message[-2000:]
    assert message.count("go on with: python main.py -r") == 1  # said by one process for all
    assert last_checkpoint(only_run(tmp_path / "logs"))["global_step"] > 0
