"""Cells that need processes of their own: peak memory, loading a checkpoint, start-up, the README's main job."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from evaluation.speed.models import DTYPES, SIZES, build, model_config
from ldm.checkpoint import save_safetensors
from ldm.resources import config_path

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS = "--child"


def child(arguments: dict[str, Any]) -> dict[str, Any]:
    """Run `bench.py --child` in a fresh process; what it answers."""
    words = [sys.executable, str(ROOT / "scripts" / "bench.py"), ARGUMENTS, json.dumps(arguments)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"measuring {arguments} in a process of its own failed: {last}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def timed_process(words: Sequence[str], environment: dict[str, str] | None = None) -> dict[str, float]:
    """Wall-clock and processor seconds of a command; raises RuntimeError with its last line when it fails."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **(environment or {})}, cwd=ROOT)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{' '.join(words[1:4])} ... failed: {last}")
    return {"wall": wall, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


@contextmanager
def written_model(name: str, quick: bool, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Path, Path]]:
    """Random weights of model `name` in a temporary file, and a config that goes with them."""
    with tempfile.TemporaryDirectory() as folder:
        weights, config = Path(folder, "model.safetensors"), Path(folder, "config.yaml")
        state = build(name, dtype, torch.device("cpu"), quick).state_dict()
        save_safetensors({k: v for k, v in state.items() if not k.startswith("embedding_manager.")}, weights)
        whole = OmegaConf.load(config_path(SIZES[name].config))
        whole.model = {**OmegaConf.to_container(whole.model), **model_config(name, quick)}  # type: ignore[dict-item]
        OmegaConf.save(whole, config)
        yield weights, config


def load_cell(name: str, dtype: str, quick: bool) -> dict[str, Any]:
    """Seconds and peak memory of reading a checkpoint into a model, in a fresh process."""
    with written_model(name, quick) as (weights, config):
        answer = child({"kind": "load", "weights": str(weights), "config": str(config), "dtype": dtype})
        answer["file_gb"] = weights.stat().st_size / 1e9
    text = f"{answer['seconds']:.2f} s, peak {answer['peak_gb']:.2f} GB for a file of {answer['file_gb']:.2f} GB"
    return {"load": answer, "text": text}


def main_command(weights: Path, config: Path, logs: Path, steps: int) -> list[str]:
    """The README's command, with these weights."""
    return [
        *(sys.executable, str(ROOT / "main.py"), "--base", str(config), "-t", "--ckpt_path", str(weights)),
        *("--data_root", str(ROOT / "imgs"), "--logdir", str(logs), "--max_steps", str(steps)),
        *("--enable_progress_bar", "false"),
    ]


# What looks at the word before the first step and after the last is no part of the start.
WITHOUT_LOOKING = [f"lightning.callbacks.{name}.params.disabled=true" for name in ("sample_grids", "fixed_validation")]


def startup_cell(name: str, quick: bool) -> dict[str, Any]:
    """Seconds from the command to the end of a run of one step: imports, weights, caches, step, files."""
    with written_model(name, quick) as (weights, config), tempfile.TemporaryDirectory() as logs:
        times = timed_process([*main_command(weights, config, Path(logs), 1), *WITHOUT_LOOKING])
    return {
        "startup": times,
        "text": f"{times['wall']:.1f} s ({times['cpu']:.1f} s of processor) for a run of one step",
    }


def readme_cell(steps: int, quick: bool, clock: str) -> dict[str, Any]:
    """The README's main job by `main.py` and by `evaluation.speed.reference`, from command to end."""
    with written_model("emoji", quick) as (weights, config), tempfile.TemporaryDirectory() as logs:
        ours = timed_process(main_command(weights, config, Path(logs), steps))
        loop = {
            "kind": "reference",
            "weights": str(weights),
            "config": str(config),
            "steps": steps,
            "data_root": str(ROOT / "imgs"),
        }
        reference = timed_process([sys.executable, str(ROOT / "scripts" / "bench.py"), ARGUMENTS, json.dumps(loop)])
    speedup = reference[clock] / ours[clock]
    text = f"{ours[clock]:.1f} s, {speedup:.2f}x faster than the loop without caches ({reference[clock]:.1f} s)"
    return {"ours": ours, "reference": reference, "speedup": speedup, "steps": steps, "text": text}


def answer(arguments: dict[str, Any]) -> dict[str, Any]:
    """What a child process measures."""
    kind = arguments["kind"]
    if kind == "memory":
        return _memory(arguments)
    if kind == "load":
        return _load(arguments)
    if kind == "reference":
        from evaluation.speed.reference import run

        config = OmegaConf.load(arguments["config"])
        batch, size = int(config.data.params.batch_size), int(config.data.params.train.params.size)
        loss = run(config, arguments["weights"], arguments["data_root"], arguments["steps"], batch, size)
        return {"loss": loss}
    raise ValueError(f"unknown kind of measurement '{kind}'; known: memory, load, reference")


def _memory(arguments: dict[str, Any]) -> dict[str, Any]:
    from evaluation.speed.jobs import Ours, Setup
    from evaluation.speed.measure import peak_memory, reset_peak_memory
    from evaluation.speed.peers import Diffusers

    device = torch.device(arguments["setup"].pop("device"))
    setup = Setup(**arguments["setup"], device=device)
    ours = Ours(setup)
    contestant: Any = ours
    if arguments["who"] == "diffusers":
        contestant = Diffusers(ours)
        ours.model = None  # what they share stays
    else:
        ours.only_for(arguments["job"])
    del ours
    job = contestant.jobs()[arguments["job"]]
    reset_peak_memory(device)
    job.call()
    return {"peak_gb": peak_memory(device)}


def _load(arguments: dict[str, Any]) -> dict[str, Any]:
    from evaluation.speed.measure import peak_memory, reset_peak_memory
    from ldm.checkpoint import load_model_from_config

    reset_peak_memory(torch.device("cpu"))
    start = time.perf_counter()
    model = load_model_from_config(
        OmegaConf.load(arguments["config"]), arguments["weights"], dtype=DTYPES[arguments["dtype"]]
    )
    for tensor in model.state_dict().values():  # mapped weights take time and memory once they are read
        tensor.sum()
    return {"seconds": time.perf_counter() - start, "peak_gb": peak_memory(torch.device("cpu"))}
