"""Weights in modules and models: what fits is loaded, the rest is reported, a wrong pairing is explained."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldm.checkpoint import (
    CheckpointError,
    load_model_from_config,
    load_weights,
    read_state_dict,
)
from ldm.modules.ema import LitEma
from tests.checkpoint_files import WRITERS, assert_same, make_net, write
from tests.conftest import END_TO_END


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_fills_real_and_meta_modules(tmp_path: Path, writer: str, device: str, dtype: torch.dtype | None):
    source = make_net().requires_grad_(False)
    source[0].weight.requires_grad_(True)
    path = write(tmp_path / "a.ckpt", source.state_dict(), writer)
    torch.manual_seed(1)
    with torch.device(device):
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Conv1d(8, 2, 1)).requires_grad_(False)
    net[0].weight.requires_grad_(True)
    report = load_weights(net, path, dtype=dtype, strict=True)
    assert len(report.loaded) == len(source.state_dict())
    assert not report.missing
    expected = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in source.state_dict().items()}
    assert_same(net.state_dict(), expected)
    assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in source.parameters()]
    assert (net[0].weight.data_ptr() % 2) == 0
    net[0].weight.data.zero_()
    assert_same(read_state_dict(path), source.state_dict())


def test_a_half_precision_file_fills_a_float32_module_in_float32(tmp_path: Path):
    path = write(tmp_path / "a.ckpt", {k: v.half() for k, v in nn.Linear(4, 4).state_dict().items()})
    with torch.device("meta"):
        net = nn.Linear(4, 4)
        holder = nn.Sequential(net)
    load_weights(holder, write(tmp_path / "b.ckpt", {f"0.{k}": v for k, v in read_state_dict(path).items()}))
    assert holder[0].weight.dtype == torch.float32


def test_report_says_what_was_missing_and_left_over(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    state = make_net().state_dict()
    state["extra.weight"] = state.pop("2.bias")
    state["0.position_ids"] = torch.arange(3)
    state["betas"] = torch.zeros(3)
    path = write(tmp_path / "a.ckpt", state)
    with caplog.at_level(logging.INFO):
        report = load_weights(make_net(), path)
    assert report.missing == ["2.bias"]
    assert report.unexpected == ["extra.weight"]
    assert report.ignored == ["0.position_ids", "betas"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == str(report)
    assert "a.ckpt" in line
    assert "1 missing from the file (2.bias)" in line
    with pytest.raises(CheckpointError, match=r"1 keys are missing \(2.bias\), 1 left over"):
        load_weights(make_net(), path, strict=True)


def test_prefix_and_ignored_keys(tmp_path: Path):
    state = {f"first_stage_model.{k}": v for k, v in make_net().state_dict().items()}
    path = write(tmp_path / "a.ckpt", {**state, "model.w": torch.ones(1)})
    with pytest.raises(CheckpointError, match="none of its keys fits"):
        load_weights(make_net(), path)
    net = make_net()
    before = net[0].weight.detach().clone()
    net[0].weight.data += 1
    report = load_weights(net, path, prefix="first_stage_model.", ignore_keys=["first_stage_model.0"])
    assert report.unexpected == []
    assert set(report.missing) == {"0.weight", "0.bias"}
    assert torch.equal(net[0].weight, before + 1)


def test_a_wrong_file_leaves_the_module_as_it_was(tmp_path: Path):
    state = make_net().state_dict()
    state["0.weight"] += 1
    state["2.weight"] = torch.ones(7, 7, 1)
    net = make_net()
    with pytest.raises(
        CheckpointError, match=r"does not fit Sequential: 1 tensors differ in shape.*\(7, 7, 1\) in the"
    ):
        load_weights(net, write(tmp_path / "a.ckpt", state))
    assert_same(net.state_dict(), make_net().state_dict())


def test_tensors_with_two_names_load_from_either(tmp_path: Path):
    def shared() -> nn.ModuleDict:
        part = nn.Linear(3, 3)
        return nn.ModuleDict({"first_stage_model": part, "cond_stage_model": part})

    source = shared()
    both = source.state_dict()
    one = {k: v for k, v in both.items() if k.startswith("first")}
    for state in (both, one):
        with torch.device("meta"):
            net = shared()
        report = load_weights(net, write(tmp_path / "a.ckpt", state))
        assert not report.missing
        assert not report.unexpected
        assert_same(net.state_dict(), both)
        assert net["first_stage_model"].weight is net["cond_stage_model"].weight


class Averaged(nn.Module):
    """A model with averaged weights, as published ones are laid out."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"diffusion_model": nn.Sequential(nn.Linear(3, 3))})
        self.model_ema = LitEma(self.model)


def test_averaged_weights(tmp_path: Path):
    source = Averaged()
    source.model_ema.diffusion_model0weight.fill_(5.0)
    path = write(tmp_path / "ema.ckpt", source.state_dict())
    net = Averaged()
    load_weights(net, path)
    assert_same(net.state_dict(), source.state_dict())
    load_weights(net, path, use_ema_weights=True)
    assert (net.model["diffusion_model"][0].weight == 5).all()

    plain = write(tmp_path / "plain.ckpt", {k: v for k, v in source.state_dict().items() if "ema" not in k})
    with torch.device("meta"):
        net = Averaged()
    load_weights(net, plain)
    assert torch.equal(net.model_ema.diffusion_model0weight, source.model["diffusion_model"][0].weight)
    assert net.model_ema.diffusion_model0weight is not net.model["diffusion_model"][0].weight
    with pytest.raises(CheckpointError, match=r"plain.ckpt holds no averaged weights"):
        load_weights(Averaged(), plain, use_ema_weights=True)


def test_files_without_a_state_dict_say_what_they_are(tmp_path: Path):
    torch.save(make_net(), tmp_path / "module.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    cases = {
        tmp_path / "module.pt": "is a pickled torch.nn.modules.container.Sequential; save its state_dict",
        tmp_path / "empty.pt": "holds none of the known models",
        END_TO_END / "embeddings_1vec.pt": "is an embedding file: --embedding_path",
    }
    for path, words in cases.items():
        with pytest.raises(CheckpointError, match=words):
            read_state_dict(path)
        with pytest.raises(CheckpointError, match=words):
            load_weights(make_net(), path)


def test_linear_layers_and_1x1_convolutions_exchange_weights(tmp_path: Path):
    source = nn.Sequential(nn.Linear(3, 5))
    net = nn.Sequential(nn.Conv2d(3, 5, 1))
    load_weights(net, write(tmp_path / "a.ckpt", source.state_dict()))
    assert torch.equal(net[0].weight[:, :, 0, 0], source[0].weight)


TINY = END_TO_END / "tiny_ldm.safetensors"


@pytest.fixture
def tiny() -> dict[str, Any]:
    """Config of the tiny latent diffusion model whose weights are among the tests' data."""
    config = json.loads((END_TO_END / "run_1vec.json").read_text())["config"]
    config["params"]["cond_stage_config"]["params"]["vocab_file"] = str(END_TO_END / "vocab.txt")
    config["params"]["first_stage_config"]["params"]["ckpt_path"] = "models/first_stage_models/kl-f8/model.ckpt"
    return config


@pytest.fixture(params=[1 << 17, 100])
def deferred(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model has no parameter that is large enough to wait for the file; lower the limit as well."""
    monkeypatch.setattr("ldm.checkpoint.DEFERRED_NUMEL", request.param)


@pytest.mark.usefixtures("deferred")
def test_builds_the_configured_model_around_the_files_weights(tiny: dict[str, Any]):
    model = load_model_from_config({"model": tiny}, TINY)
    assert not model.training
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    expected = read_state_dict(TINY)
    actual = model.state_dict()
    assert set(expected) - set(actual) <= {k for k in expected if k.endswith("position_ids")}
    for key, tensor in actual.items():
        if key in expected:
            assert torch.equal(tensor, expected[key]), key
    # The learned word starts from the loaded table, and what is computed was computed.
    word = next(iter(model.embedding_manager.parameters()))
    table = expected["cond_stage_model.transformer.token_emb.weight"]
    assert (word == table).all(-1).any()
    assert (model.lvlb_weights.isfinite() & (model.lvlb_weights > 0)).all()
    assert model.alphas_cumprod[0] == pytest.approx(1 - 0.00085, abs=1e-6)


@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_schedule_exact(tiny: dict[str, Any], dtype: torch.dtype):
    model = load_model_from_config(tiny, TINY, dtype=dtype)
    parts = (model.model, model.first_stage_model, model.cond_stage_model)
    assert {p.dtype for part in parts for p in part.parameters()} == {dtype}
    assert model.alphas_cumprod.dtype == torch.float32
    expected = read_state_dict(TINY)
    for key in ("model.diffusion_model.out.2.weight", "first_stage_model.quant_conv.bias"):
        assert torch.equal(model.state_dict()[key], expected[key].to(dtype))


@pytest.mark.usefixtures("deferred")
def test_configs_from_files_and_average_copies(tmp_path: Path, tiny: dict[str, Any]):
    from omegaconf import OmegaConf

    tiny["params"] |= {"use_ema": True, "personalization_config": None}
    OmegaConf.save({"model": tiny}, tmp_path / "model.yaml")
    model = load_model_from_config(tmp_path / "model.yaml", TINY)
    averages = dict(model.model_ema.named_buffers())
    for name, parameter in model.model.named_parameters():
        assert torch.equal(averages[name.replace(".", "")], parameter)
    with pytest.raises(FileNotFoundError, match="no config .*other.yaml"):
        load_model_from_config(tmp_path / "other.yaml", TINY)


@pytest.mark.usefixtures("deferred")
def test_wrong_pairings_name_both_models(tmp_path: Path, tiny: dict[str, Any]):
    tiny["params"]["unet_config"]["params"]["in_channels"] = 9
    with pytest.raises(CheckpointError) as caught:
        load_model_from_config(tiny, TINY)
    message = str(caught.value)
    assert "does not fit LatentDiffusion: 1 tensors differ in shape" in message
    assert "(32, 4, 3, 3) in the file, (32, 9, 3, 3) in the model" in message
    assert "The file holds a UNet (4 to 4 channels, width 32, context 64)" in message
    assert "The model that the config builds holds a UNet (9 to 4 channels, width 32, context 64)" in message


def test_a_file_without_some_weights_builds_no_model(
    tmp_path: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ldm.checkpoint.DEFERRED_NUMEL", 100)
    state = {k: v for k, v in read_state_dict(TINY).items() if not k.startswith("first_stage_model.decoder.")}
    path = write(tmp_path / "part.safetensors", state, "safetensors")
    with pytest.raises(
        CheckpointError, match=r"part.safetensors lacks \d+ tensors of the model \(first_stage_model.dec"
    ):
        load_model_from_config(tiny, path)


def test_the_file_alone_finds_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ldm.checkpoint_recognise._published", lambda: [])
    with pytest.raises(CheckpointError, match="no shipped config fits: the file holds a UNet"):
        load_model_from_config(None, TINY)
    with pytest.raises(ValueError, match="neither a config nor a checkpoint"):
        load_model_from_config()
