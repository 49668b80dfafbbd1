"""An inversion that is killed without warning, and resumed, ends with the very same vectors."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_inversion import inversion_config, vectors, words
from tests.tiny_run import ROOT, assert_same_state, last_checkpoint, only_run, run_main, spawn_main, write_config

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="not on Windows"),
]
STOP = "lightning.callbacks.stop"
VALIDATION = {"target": "ldm.data.personalized.PersonalizedBase", "params": {"size": 32, "set": "val"}}


def config(folder: Path, repeats: int = 4, **trainer: Any) -> Path:
    """Draws of every kind: flips, templates, words of single pictures, noise; saves after every step."""
    made = inversion_config()
    manager = made["model"]["params"]["personalization_config"]["params"]
    manager |= {"per_image_tokens": True, "num_vectors_per_token": 2}
    data = made["data"]["params"]
    data["train"]["params"] |= {"per_image_tokens": True, "mixing_prob": 0.5, "repeats": repeats}
    data |= {"validation": VALIDATION, "num_workers": 1}
    made["lightning"]["callbacks"]["fixed_validation"] = {"params": {"every_n_train_steps": 50}}
    made["lightning"]["modelcheckpoint"]["params"]["every_n_train_steps"] = 1
    made["lightning"]["trainer"] |= {"accumulate_grad_batches": 2, **trainer}
    return write_config(folder / "killed.yaml", made)


def assert_same_end(one: Path, other: Path) -> None:
    assert_same_state(one, other)
    a, b = vectors(one), vectors(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[word], b[word]) for word in a)


def test_killed_and_resumed_from_the_moved_directory(tmp_path: Path):
    command = words(config(tmp_path), tmp_path / "whole")
    run_main(*command)
    stop = {"target": "tests.tiny_run.StopAt", "params": {"batch": 5, "number": int(signal.SIGKILL)}}
    killed = spawn_main(*words(config(tmp_path), tmp_path), f"{STOP}={stop}")  # between accumulated batches
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    run = only_run(tmp_path / "logs").rename(tmp_path / "moved")
    assert last_checkpoint(run)["global_step"] == 2
    run_main("-r", run, f"{STOP}.params.batch=-1")
    assert_same_end(only_run(tmp_path / "whole" / "logs"), run)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_kills_at_random_moments(tmp_path: Path):
    steps, kills = 500, 10
    file = config(tmp_path, repeats=60, max_steps=steps, log_every_n_steps=1)
    run_main(*words(file, tmp_path / "whole"))
    choose = random.Random(0)
    command, run = words(file, tmp_path), tmp_path / "logs"
    reached = []
    for number in range(kills):
        before = len(list(run.rglob("metrics.csv")))
        process = subprocess.Popen([sys.executable, "main.py", *map(str, command)], cwd=ROOT, start_new_session=True,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        deadline = time.monotonic() + 300
        # every third time at a moment of the start-up, else once steps are being logged
        while number % 3 and len(list(run.rglob("metrics.csv"))) == before and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(choose.uniform(0, 4 if number % 3 else 8))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        found = list(run.rglob("checkpoints/last.ckpt"))
        if run.name == "logs":
            run = only_run(run) if list(run.glob("*/configs/*project.yaml")) else run
        if run.name != "logs":
            run = run.rename(tmp_path / f"moved-{number}")
            last = run / "checkpoints" / "last.ckpt"
            command = ["-r", last if found and number % 2 else run]
        reached.append(last_checkpoint(run)["global_step"] if found else 0)
    assert reached == sorted(reached)
    assert 0 < reached[-1] < steps, f"the kills came at steps {reached}"
    run_main(*command)
    assert_same_end(only_run(tmp_path / "whole" / "logs"), run)
