"""Tables of whole models: first stages and text to picture on tiny models, without Inception."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import yaml
from PIL import Image
from torch import Tensor

from evaluation import model_tables
from evaluation.fidelity import frechet_distance, inception_score, kernel_distance, load_inception
from evaluation.model_tables import split_evenly
from evaluation.reproduce import Options, reproduce
from ldm.generate_files import read_settings
from tests.tiny_evaluation import write_models_file
from tests.tiny_models import vq_stage, write_model
from tests.tiny_run import write_config

FIRST_STAGES = {
    "title": "First stages in small",
    "source": "nobody",
    "kind": "first_stages",
    "columns": ["fid", "inception_score", "psnr", "ssim"],
    "claims": [{"says": "The codebook reconstructs better", "holds_if": "psnr(vq) > psnr(kl)"}],
    "options": {"size": 16, "batch_size": 4},
}
TEXT_TO_IMAGE = {
    "title": "Captions in small",
    "source": "nobody",
    "kind": "text_to_image",
    "columns": ["fid", "inception_score", "kid"],
    "rows": {
        "plain": {"sampling": {"scale": 1.0}, "published": {"fid": 20.0}},
        "guided": {"sampling": {"scale": 1.5}},
        "theirs": {"source": "published", "published": {"fid": 10.0}},
    },
    "claims": [{"says": "Guidance lowers FID", "holds_if": "fid(guided) < fid(plain)"}],
    "options": {"limit": 5, "chunk": 2},
}


def refuse(words: list[str]) -> None:
    raise AssertionError(f"trained: {words}")


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A random linear map of 4 x 4 pixels for the feature network; the list counts its calls."""
    projection = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
    calls: list[int] = []

    def features(images: Tensor) -> tuple[Tensor, Tensor]:
        assert images.dtype == torch.uint8
        calls.append(len(images))
        small = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)
        return small @ projection, small @ projection.flip(0)

    monkeypatch.setattr(model_tables, "load_inception", lambda weights, device: features)
    monkeypatch.setattr(model_tables, "check_inception", lambda weights: None)
    return calls


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six pictures with captions; one without."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(7):
        levels = rng.integers(0, 255, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(levels).resize((40, 30), Image.Resampling.BILINEAR).save(folder / f"{k}.png")
        if k < 6:
            (folder / f"{k}.txt").write_text("a photo of a sculpture")
    return folder


def options_for(table: dict, root: Path, pictures: Path) -> Options:
    (root / "network.pth").write_bytes(b"network")
    return Options(
        table=str(write_config(root / "small.yaml", table)), model="tiny",
        models_file=str(write_models_file(root)), data=str(pictures), store=str(root / "store"),
        out=str(root / "out"), device="cpu", inception_weights=str(root / "network.pth"),
    )  # fmt: skip


# -- tables --------------------------------------------------------------------------------------------------------


def test_first_stages(network: list[int], pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    kl = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": dict(vq_stage()["params"])}
    del kl["params"]["n_embed"]
    kl["params"]["ddconfig"] = {**kl["params"]["ddconfig"], "double_z": True}
    stages = {
        "kl": write_model(tmp_path / "kl", {"model": kl}),
        "vq": write_model(tmp_path / "vq", {"model": vq_stage()}),
    }
    rows = {name: {"options": {"name": str(folder)}} for name, folder in stages.items()}
    rows |= {
        "lost": {"options": {"name": "no-such-stage"}},
        "theirs": {"source": "published", "published": {"psnr": 9.0}},
    }
    options = options_for({**FIRST_STAGES, "rows": rows}, tmp_path, pictures)
    result = reproduce(options, refuse)
    assert "lost is left out" in caplog.text
    assert result.done == result.total
    for name in stages:
        found = {metric: result.intervals[metric, name] for metric in FIRST_STAGES["columns"]}
        assert found["psnr"].low < found["psnr"].mean < found["psnr"].high
        assert -1 <= found["ssim"].mean <= 1
        assert found["fid"].mean > 0
        assert np.isnan(found["fid"].low)  # one figure of all pictures: it has no interval
        assert np.isnan(found["fid"].high)
        assert found["inception_score"].mean >= 1
    record = json.loads((tmp_path / "out" / "table.json").read_text())
    assert record["rows"]["theirs"]["published"]["psnr"] == 9.0
    assert record["claims"][0]["verdict"] in ("holds", "does not", "undecided")
    before = len(network)
    again = reproduce(options, refuse)
    assert len(network) == before
    assert again.intervals == result.intervals
    blind = reproduce(dataclasses.replace(options, inception_weights=None), refuse)
    assert "R-FID and R-IS are left out" in caplog.text
    assert ("fid", "kl") not in blind.intervals
    assert blind.intervals["psnr", "kl"].mean == result.intervals["psnr", "kl"].mean


def test_pictures_from_captions_in_shards(network: list[int], pictures: Path, tmp_path: Path):
    options = options_for(TEXT_TO_IMAGE, tmp_path, pictures)
    half = reproduce(dataclasses.replace(options, part=(1, 2)), refuse)
    assert not half.intervals  # no row has all its pictures
    assert not network
    result = reproduce(dataclasses.replace(options, part=(2, 2)), refuse)
    drawn = list((tmp_path / "store").rglob("*.png"))
    assert len(drawn) == 2 * 5
    assert sum(network) == 2 * 2 * 5  # two rows, drawn and real
    for metric in TEXT_TO_IMAGE["columns"]:
        assert np.isfinite(result.intervals[metric, "guided"].mean)
    assert (result.done, result.total) == (2, 2)
    assert result.findings[0].verdict == "undecided"  # single figures have no intervals
    assert read_settings(drawn[0])["prompt"] == "a photo of a sculpture"


def test_rows_choose_what_is_done_and_not_what_is_shown(
    network: list[int], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn: list[float] = []
    draw = model_tables.draw_captions
    monkeypatch.setattr(model_tables, "draw_captions", lambda m, s, *rest: (drawn.append(s.scale), draw(m, s, *rest)))
    options = options_for(TEXT_TO_IMAGE, tmp_path, pictures)
    first = reproduce(dataclasses.replace(options, rows=["plain"]), refuse)
    assert (set(drawn), first.done, first.total) == ({1.0}, 1, 2)
    both = reproduce(dataclasses.replace(options, rows=["guided"]), refuse)
    assert (set(drawn), both.done, both.total) == ({1.0, 1.5}, 2, 2)
    assert both.intervals["fid", "plain"] == first.intervals["fid", "plain"]
    assert sum(network) == 2 * 2 * 5
    for score in (tmp_path / "store" / "fidelity").glob("*/result.json"):
        score.unlink()
    reproduce(dataclasses.replace(options, rows=["guided"]), refuse)
    assert sum(network) == 3 * 2 * 5  # the other row is not scored again


def test_rows_of_first_stages(network: list[int], pictures: Path, tmp_path: Path):
    rows = {"lost": {"options": {"name": "no-such-stage"}}}
    for seed, name in enumerate(("vq", "other")):
        rows[name] = {"options": {"name": str(write_model(tmp_path / name, {"model": vq_stage()}, seed))}}
    options = options_for({**FIRST_STAGES, "rows": rows, "claims": []}, tmp_path, pictures)
    first = reproduce(dataclasses.replace(options, rows=["vq"]), refuse)
    done = len(network)
    both = reproduce(dataclasses.replace(options, rows=["other"]), refuse)
    assert len(network) == 2 * done
    assert (first.done, both.done) == (7, 14)
    assert both.intervals["psnr", "vq"].mean == first.intervals["psnr", "vq"].mean
    with pytest.raises(FileNotFoundError, match="the weights of no row that is asked for are there"):
        reproduce(dataclasses.replace(options, rows=["lost"]), refuse)


def test_another_size_of_the_pictures_makes_other_figures(network: list[int], pictures: Path, tmp_path: Path):
    """The model's size is that of the crops, although the pictures are drawn in a size of their own."""
    table = yaml.safe_load(yaml.safe_dump(TEXT_TO_IMAGE))
    for name in ("plain", "guided"):
        table["rows"][name]["sampling"] |= {"height": 32, "width": 32}
    options = options_for(table, tmp_path, pictures)
    large = reproduce(options, refuse)
    models = yaml.safe_load(Path(options.models_file).read_text())
    models["tiny"]["size"] = 16
    write_config(Path(options.models_file), models)
    small = reproduce(options, refuse)
    assert len(list((tmp_path / "store" / "captions").glob("*/result.json"))) == 2 * 3
    assert sum(network) == 2 * 2 * 2 * 5
    assert large.intervals["fid", "plain"] != small.intervals["fid", "plain"]


def test_parts_weigh_the_same():
    for count in (1, 7, 23, 50):
        parts = split_evenly(torch.arange(count, dtype=torch.float64))
        assert len(parts) == min(20, count)
        assert torch.equal(torch.cat(list(parts)), torch.arange(count, dtype=torch.float64))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_fid_needs_is_missed_before_anything_is_drawn(pictures: Path, tmp_path: Path):
    options = options_for(TEXT_TO_IMAGE, tmp_path, pictures)
    with pytest.raises(FileNotFoundError, match="no feature network at nowhere.pth"):
        reproduce(dataclasses.replace(options, inception_weights="nowhere.pth"), refuse)
    assert not list((tmp_path / "store").rglob("*.png"))


def test_a_table_without_any_first_stage_says_so(pictures: Path, tmp_path: Path):
    rows = {"lost": {"options": {"name": "no-such-stage"}}}
    options = options_for({**FIRST_STAGES, "rows": rows, "claims": []}, tmp_path, pictures)
    with pytest.raises(FileNotFoundError, match="the weights of no row that is asked for are there"):
        reproduce(options, refuse)


def test_what_a_table_of_models_needs(pictures: Path, tmp_path: Path):
    options = options_for(TEXT_TO_IMAGE, tmp_path, pictures)
    with pytest.raises(ValueError, match="name their folder with --data"):
        reproduce(dataclasses.replace(options, data=None), refuse)
    for file in pictures.glob("*.txt"):
        file.unlink()
    with pytest.raises(ValueError, match="holds no captions"):
        reproduce(options, refuse)
    for wrong in (None, "nowhere.pth"):
        with pytest.raises(FileNotFoundError, match="--inception_weights.*nothing is downloaded"):
            load_inception(wrong)


def test_the_quick_form_draws_quickly(network: list[int], pictures: Path, tmp_path: Path, monkeypatch):
    del network
    steps: list[int] = []
    draw = model_tables.draw_captions
    monkeypatch.setattr(model_tables, "draw_captions", lambda m, s, *rest: (steps.append(s.steps), draw(m, s, *rest)))
    table = yaml.safe_load(yaml.safe_dump(TEXT_TO_IMAGE))
    table["rows"]["plain"]["sampling"]["steps"] = 7
    del table["rows"]["guided"], table["claims"]
    options = options_for(table, tmp_path, pictures)
    models = yaml.safe_load(Path(options.models_file).read_text())
    models["tiny"]["quick"]["sampling"] = {"steps": 1}
    write_config(Path(options.models_file), models)
    reproduce(dataclasses.replace(options, quick=True), refuse)
    assert set(steps) == {1}


# -- figures against other computations -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    return real, 0.5 + 1.5 * torch.randn(150, 6, generator=generator, dtype=torch.float64)


def test_frechet_distance_against_scipy(features: tuple[Tensor, Tensor]):
    a, b = (part.numpy() for part in features)
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet_distance(*features) == pytest.approx(expected, rel=1e-4)


def test_kernel_distance_against_its_definition(features: tuple[Tensor, Tensor]):
    a, b = (part.numpy()[:100] for part in features)  # one subset of everything
    kernel = {name: (x @ y.T / 6 + 1) ** 3 for name, (x, y) in {"aa": (a, a), "bb": (b, b), "ab": (a, b)}.items()}
    own = sum((kernel[k].sum() - np.trace(kernel[k])) / (100 * 99) for k in ("aa", "bb"))
    expected = own - 2 * kernel["ab"].mean()
    found = kernel_distance(torch.as_tensor(a), torch.as_tensor(b), subsets=2, subset_size=100)
    assert found == pytest.approx(expected, rel=1e-4)


def test_inception_score_against_its_definition():
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    p = logits.softmax(1)
    expected = (p * (p.log() - p.mean(0).log())).sum(1).mean().exp().item()
    assert inception_score(logits, splits=1) == pytest.approx(expected, rel=1e-4)


def test_figures_leave_the_random_state_alone(features: tuple[Tensor, Tensor]):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = kernel_distance(*features, subsets=3, subset_size=20)
    assert torch.equal(torch.get_rng_state(), before)
    assert kernel_distance(*features, subsets=3, subset_size=20) == first
