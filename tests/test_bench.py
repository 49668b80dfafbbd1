"""The benchmark at tiny sizes: what it counts, that it resumes, and the command as a user runs it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from evaluation.speed import runs, session
from evaluation.speed.jobs import Ours, Setup
from evaluation.speed.measure import Times, count_flops, interleaved, median_ratio
from evaluation.speed.models import SIZES
from evaluation.speed.results import Results, plot_growth, table
from scripts import bench

CPU = torch.device("cpu")


def run_bench(tmp_path: Path, *words: str) -> dict[str, Any]:
    out = tmp_path / "bench.json"
    bench.main(["--quick", "--device", "cpu", "--rounds", "1", "--out", str(out), *words])
    loaded: dict[str, Any] = json.loads(out.read_text())
    return loaded


def test_flops_count_each_multiply_add_twice():
    x, weight = torch.randn(1, 3, 8, 8), torch.randn(5, 3, 3, 3)
    assert count_flops(lambda: F.conv2d(x, weight, padding=1)) == 2 * 5 * 3 * 9 * 64
    q = torch.randn(1, 2, 16, 4)
    forward = 2 * 2 * 2 * 16 * 16 * 4
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q)) == forward
    leaf = q.clone().requires_grad_()
    both = count_flops(lambda: F.scaled_dot_product_attention(leaf, q, q).sum().backward())
    assert both == forward + 5 * forward // 2  # the backward pass computes the scores again


def test_rounds_are_interleaved_and_reverse():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = interleaved(calls, 2, CPU)  # type: ignore[arg-type]
    assert order == list("abccba")
    assert all(len(t.wall) == len(t.cpu) == 2 for t in times.values())


def test_ratio_compares_calls_of_the_same_round():
    slow_machine = Times(wall=[1.0, 10.0, 1.0]), Times(wall=[2.0, 20.0, 2.0])
    assert median_ratio(*slow_machine, "wall") == 0.5


def test_every_cell_has_its_work():
    assert set(bench.MODELS) == set(SIZES)
    assert set(bench.JOBS) == {*Ours(Setup("sd1", quick=True)).jobs(), *session.IN_PROCESSES}


@pytest.mark.parametrize("model", ["sd1", pytest.param("ldm", marks=pytest.mark.slow), "emoji"])
def test_jobs_run_in_16_bits(model: str):
    ours = Ours(Setup(model, "bfloat16", quick=True))
    for job in (ours.unet_training, ours.inversion_step, ours.encode, ours.decode):
        assert job().isfinite().all()
    assert all(p.dtype == torch.float32 for p in ours.model.embedding_manager.embedding_parameters())


def test_an_inversion_step_moves_the_vector_and_nothing_else():
    ours = Ours(Setup("sd1", quick=True))
    ours.only_for("inversion_step")
    (vector,) = ours.model.embedding_manager.embedding_parameters()
    before = vector.detach().clone()
    ours.inversion_step()
    assert not torch.equal(vector, before)
    assert [p for p in ours.model.parameters() if p.grad is not None] == [vector]


def test_command_measures_writes_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = run_bench(tmp_path, "--only", "sd1/float32/unet_*", "--no-memory", "--channels-last")
    cell = data["cells"]["sd1/float32/unet_training"]
    ours, other = cell["contestants"]["ours"], cell["contestants"]["ours channels_last"]
    assert ours["tflop"] > 0
    assert ours["matmul_fraction"] > 0
    assert other["ratio"] > 0
    assert "| sd1" in capsys.readouterr().out
    again = run_bench(tmp_path, "--only", "sd1/float32/unet_*", "sd1/float32/text", "--no-memory", "--channels-last")
    assert again["cells"]["sd1/float32/unet_training"] == cell  # not measured anew
    assert "sd1/float32/text" in again["cells"]
    with pytest.raises(ValueError, match=r"other settings \(clock, switches\).*--fresh"):
        run_bench(tmp_path, "--only", "sd1/float32/text", "--clock", "cpu")


def test_growth_is_measured_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(session, "GROWTH", ((1, 1), (1, 2), (2, 1), (2, 2)))
    data = run_bench(tmp_path, "--only", "sd1/float32/growth")
    points = data["cells"]["sd1/float32/growth"]["growth"]
    assert [(p["batch"], p["pixels"]) for p in points] == [(1, 64), (1, 128), (2, 64), (2, 128)]
    assert all(p["time"] > 0 and p["peak_gb"] > 0 for p in points)
    assert (tmp_path / "bench.png").stat().st_size > 1000
    assert not plot_growth({}, tmp_path / "none.png")


def test_convergence_is_that_of_the_shipped_weights(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(session, "CONVERGENCE", (("dpm", 12), ("ddim", 2), ("dpm", 8)))
    monkeypatch.setattr(session, "CONVERGENCE_PICTURES", 4)
    found = session.convergence_cell(Setup("emoji"))["convergence"]
    assert found["trained"]
    for values in (found["guidance_5"], found["guidance_7.5"]):
        assert values["pictures"] == 4
        assert values["standard_error_db"] > 0
        assert values["dpm20_db"] > values["ddim50_db"] + 3  # of which only the first has steps enough here


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("diffusers", "transformers")),
    reason="needs diffusers and transformers",
)
def test_diffusers_computes_the_same(tmp_path: Path):
    cells = run_bench(tmp_path, "--only", "sd1/float32/*", "--against", "diffusers", "--no-memory")["cells"]
    for job in ("unet_forward", "encode", "decode", "text"):
        assert cells[f"sd1/float32/{job}"]["difference"] < 1e-5
    assert "ratio" in cells["sd1/float32/inversion_step"]["contestants"]["diffusers"]


def test_peak_memory_and_loading_as_a_child_measures_them():
    described = {"model": "sd1", "dtype": "float32", "device": "cpu", "quick": True}
    answer = runs.answer({"kind": "memory", "setup": described, "job": "inversion_step", "who": "ours"})
    assert 0.05 < answer["peak_gb"] < 64
    with runs.written_model("sd1", quick=True) as (weights, config):
        words = {"weights": str(weights), "config": str(config), "dtype": "bfloat16"}
        assert runs.answer({"kind": "load", **words})["seconds"] > 0


def test_the_loop_without_caches_learns_a_word():
    with runs.written_model("emoji", quick=True) as (weights, config):
        words = {"weights": str(weights), "config": str(config), "data_root": str(runs.ROOT / "imgs"), "steps": 1}
        assert runs.answer({"kind": "reference", **words})["loss"] > 0


def test_table_compares_precisions(tmp_path: Path):
    results = Results(tmp_path / "x.json", {})
    for dtype, time in (("float32", 2.0), ("bfloat16", 0.5)):
        results.add(f"sd1/{dtype}/encode", {"contestants": {"ours": {"time": time}}})
    assert "sd1/encode: bfloat16 takes 0.25x the time of float32" in table(Results(tmp_path / "x.json", {}).cells)


@pytest.mark.parametrize("words", [["--only", "sd3/*/text"], ["--rounds", "0"], ["--only", "emoji/float32/readme_job"]])
def test_bad_words_are_refused(words: list[str]):
    with pytest.raises(ValueError, match="--"):
        bench.parse_args(words)
