"""Activations are kept where they fit, and a compiled network keeps its names in checkpoints."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

import main
from evaluation.speed.models import build
from ldm import training_speed as speed
from ldm.generate import load_model
from ldm.run import make_plan
from ldm.util import ConfigError, emulates_bfloat16
from tests.conftest import assert_close

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Any:
    return build("emoji", torch.float32, CPU, quick=True)


def ask_for_checkpointing(model: Any) -> list[tuple[torch.nn.Module, str]]:
    for module in model.model.modules():
        for name in ("use_checkpoint", "checkpoint"):
            if hasattr(module, name):
                setattr(module, name, True)
    return speed.checkpointed_layers(model)


def test_kept_activations_are_estimated_without_computing(model: Any):
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    weights = {p.untyped_storage()._cdata for p in model.model.parameters()}
    context = torch.randn(2, 32, 384, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.apply_model(torch.randn(2, 4, 16, 16), torch.tensor([1, 2]), context)
    actual = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)
    assert 0.5 * actual < speed.activation_bytes(model, 2) < 2 * actual
    assert speed.activation_bytes(model, 4) > 1.8 * speed.activation_bytes(model, 2)


@pytest.mark.parametrize(("free", "kept"), [(10**12, True), (1000, False), (None, False)])
def test_checkpointing_gives_way_to_memory(
    model: Any, free: int | None, kept: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    layers = ask_for_checkpointing(model)
    assert layers
    monkeypatch.setattr(speed, "free_bytes", lambda device: free)
    with caplog.at_level(logging.INFO):
        speed.keep_activations(model, 4, CPU)
    assert len(speed.checkpointed_layers(model)) == (0 if kept else len(layers))
    assert ("fit in memory" in caplog.text) == kept


def test_a_failed_estimate_leaves_the_config_as_it_was(model: Any, monkeypatch: pytest.MonkeyPatch):
    layers = ask_for_checkpointing(model)
    monkeypatch.setattr(speed, "free_bytes", lambda device: 10**12)
    monkeypatch.setattr(model, "image_size", 7)  # not what the network can halve
    with pytest.raises(ValueError, match="not multiples"):
        speed.keep_activations(model, 4, CPU)
    assert speed.checkpointed_layers(model) == layers


def test_a_compiled_network_has_the_same_names(model: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model.model.diffusion_model, "forward", model.model.diffusion_model.forward)
    names = list(model.state_dict())
    speed.compile_network(model)
    assert list(model.state_dict()) == names
    with pytest.raises(ConfigError, match="no denoising network"):
        speed.compile_network(torch.nn.Linear(1, 1))


def test_only_passes_with_gradients_of_one_shape_are_compiled(model: Any, monkeypatch: pytest.MonkeyPatch):
    calls: list[bool] = []

    def compile_it(forward: Any, dynamic: bool) -> Any:
        assert not dynamic

        def compiled(*args: Any, **kwargs: Any) -> Any:
            calls.append(torch.is_grad_enabled())
            return forward(*args, **kwargs)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_it)
    network = model.model.diffusion_model
    monkeypatch.setattr(network, "forward", network.forward)
    x, t = torch.randn(2, network.in_channels, 8, 8), torch.tensor([1, 5])
    context = torch.randn(2, 4, network.context_dim)
    plain = network(x, t, context=context)
    speed.compile_network(model)
    with torch.no_grad():
        assert torch.equal(network(x, t, context=context), plain)
    assert calls == []
    assert_close(network(x, t, context=context), plain)
    assert calls == [True]
    assert_close(network(x[:1], t[:1], context=context[:1]), plain[:1])  # an epoch's last batch
    assert calls == [True]


def test_a_resumed_run_finds_the_flag_in_its_config():
    args, overrides = main.parse_args(["--base", "configs/finetune.yaml", "--data_root", "imgs", "--compile"])
    assert make_plan(args, overrides).lightning.compile is True


def test_checkpointing_stays_where_the_config_says_so(model: Any, monkeypatch: pytest.MonkeyPatch):
    layers = ask_for_checkpointing(model)
    monkeypatch.setattr(speed, "free_bytes", lambda device: 10**12)
    plan: Any = SimpleNamespace(train=True, config=OmegaConf.create(), lightning={"keep_activations": False})
    speed.speed_up(model, plan, CPU)
    assert speed.checkpointed_layers(model) == layers
    plan.lightning["keep_activations"] = True
    speed.speed_up(model, plan, CPU)
    assert speed.checkpointed_layers(model) == []


@pytest.mark.parametrize(("precision", "emulated"), [("bf16-mixed", True), ("bf16-mixed", False), ("32-true", True)])
def test_warns_of_a_precision_that_the_processor_emulates(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, precision: str, emulated: bool
):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: not emulated, raising=False)
    plan: Any = SimpleNamespace(train=False, config=OmegaConf.create(), lightning={"trainer": {"precision": precision}})
    speed.speed_up(None, plan, CPU)
    assert ("--precision bf16-mixed" in caplog.text) == (precision == "bf16-mixed" and emulated)
    assert not emulates_bfloat16(torch.device("cuda"))


def test_warns_of_sampling_in_a_precision_that_the_processor_emulates(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False)
    load_model(device="cpu")
    assert "emulate" not in caplog.text
    load_model(device="cpu", precision="half")
    assert "precision 'half' computes in bfloat16" in caplog.text
