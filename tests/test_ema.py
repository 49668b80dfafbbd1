"""Moving averages: reference trajectories, swapping in and out, frozen models, state-dict names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ldm.modules.ema import LitEma
from tests.conftest import assert_close


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))


def test_reference_layout(golden: Any) -> None:
    """Names, types and counters; the file holds the last values only, so trajectories are computed below."""
    case = golden("lit_ema")
    model = small_model()
    model[1].bias.requires_grad_(False)
    for name, options in case.meta["init"].items():
        average = LitEma(model, **options)
        for _ in range(6):
            average(model)
        state = average.state_dict()
        expected = {k.split(".", 2)[2]: v for k, v in case.tensors.items() if k.startswith(f"step5.{name}.")}
        assert {k: (v.dtype, v.shape) for k, v in state.items()} == {k: (v.dtype, v.shape) for k, v in expected.items()}
        assert torch.equal(state["decay"], expected["decay"])
        assert torch.equal(state["num_updates"], expected["num_updates"])


@pytest.mark.parametrize(("decay", "counted"), [(0.9999, True), (0.3, True), (0.5, False)])
def test_trajectory(decay: float, counted: bool) -> None:
    model = small_model()
    average = LitEma(model, decay=decay, use_num_upates=counted)
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    for update in range(1, 7):
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn_like(p)
        average(model)
        used = min(decay, (1 + update) / (10 + update)) if counted else decay
        for name, p in model.named_parameters():
            expected[name] = used * expected[name] + (1 - used) * p.detach()
            assert_close(average.state_dict()[name.replace(".", "")], expected[name].float(), rel=1e-6)


def test_store_and_restore_give_the_weights_back() -> None:
    model = small_model()
    average = LitEma(model)
    first = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight += 1.0
    live = model[0].weight.detach().clone()
    average.store(model.parameters())
    average.copy_to(model)
    assert torch.equal(model[0].weight, first)
    average.restore(model.parameters())
    assert torch.equal(model[0].weight, live)


def test_applied_to_restores_after_an_error() -> None:
    model = small_model()
    average = LitEma(model)
    with torch.no_grad():
        model[0].weight += 1.0
    live = model[0].weight.detach().clone()
    parameter = model[0].weight

    def fail_inside() -> None:
        with average.applied_to(model):
            assert not torch.equal(model[0].weight, live)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_inside()
    assert model[0].weight is parameter
    assert torch.equal(model[0].weight, live)


def test_model_may_be_frozen_before_or_after() -> None:
    model = small_model()
    average = LitEma(model)
    model.requires_grad_(False)
    average(model)
    with average.applied_to(model):
        pass
    nothing = LitEma(model)
    nothing(model)
    nothing.copy_to(model)
    assert set(nothing.state_dict()) == {"decay", "num_updates"}


def test_fresh_average_follows_closely() -> None:
    model = small_model()
    average = LitEma(model, decay=0.9999)
    before = model[0].bias.detach().clone()
    with torch.no_grad():
        model[0].bias += 11.0
    average(model)  # decay of the first update: 2 / 11
    assert_close(average.state_dict()["0bias"], before + 9.0)


def test_decay_outside_0_1_is_refused() -> None:
    with pytest.raises(ValueError, match="1.5"):
        LitEma(small_model(), decay=1.5)


def test_names_that_clash_without_dots_are_refused() -> None:
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "ab": nn.ModuleDict({"ias": nn.Linear(1, 1, bias=False)})})
    model["ab"].register_parameter("x", nn.Parameter(torch.zeros(1)))
    model["a"].register_parameter("bx", nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match="without dots"):
        LitEma(model)


def test_state_survives_saving_and_loading() -> None:
    model = small_model()
    average = LitEma(model)
    average(model)
    other = LitEma(model)
    other.load_state_dict(average.state_dict())
    average(model)
    other(model)
    for key, value in average.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
