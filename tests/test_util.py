"""Building from configs: what resolves, what is refused and with which sentence."""

from __future__ import annotations

import copy
import datetime
import pickle
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from ldm.util import ConfigError, check_params, count_params, freeze, get_obj_from_str, instantiate_from_config


class Base:
    def __init__(self, width: int, name: str = "base"):
        self.width, self.name = width, name


class Child(Base):
    def __init__(self, depth: int = 1, rate: float | None = None, **options: Any):
        super().__init__(**options)
        self.depth = depth


HERE = f"{__name__}."


@pytest.fixture(autouse=True)
def _trust_the_targets_of_these_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_TRUSTED_PACKAGES", "tests, types, datetime, no, torch.no")


@pytest.mark.parametrize(
    "target", ["os.system", "subprocess.run", "builtins.exec", "torch.hub.load", "ldm.util.DictConfig"]
)
def test_a_config_cannot_call_any_function(target: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LDM_TRUSTED_PACKAGES")
    with pytest.raises(ConfigError, match="in no package that configs may use.*LDM_TRUSTED_PACKAGES"):
        instantiate_from_config({"target": target, "params": {"command": "true"}})


@pytest.mark.parametrize(
    "target",
    [
        "evaluation.speed.runs.timed_process",
        "evaluation.tables.write_text",
        "main.main",
        "ldm.checkpoint_save.save_safely",
        "torch.nn.functional.relu",
        "taming.data.imagenet.ImageNetTrain",
        "pytorch_lightning.cli.LightningCLI",
    ],
)
def test_a_config_cannot_call_our_functions_either(target: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LDM_TRUSTED_PACKAGES")
    with pytest.raises(ConfigError, match="is no class|in no package that configs may use"):
        get_obj_from_str(target)


def test_a_frozen_module_stays_in_eval_also_as_a_copy():
    copied = copy.deepcopy(freeze(nn.Sequential(nn.Dropout(), nn.Linear(2, 2))))
    pickled = pickle.loads(pickle.dumps(copied))
    for module in (copied, pickled):
        nn.Sequential(module).train()
        assert not any(part.training for part in module.modules())


def test_params_become_plain_containers_and_extra_wins():
    config = OmegaConf.create(
        {"root": 3, "built": {"target": "types.SimpleNamespace", "params": {"a": {"b": ["${root}"]}, "c": 1}}}
    )
    made = instantiate_from_config(config.built, c=2)
    assert made.a == {"b": [3]}
    assert type(made.a) is dict
    assert made.c == 2


def test_params_may_be_left_out():
    assert isinstance(instantiate_from_config({"target": "torch.nn.Identity"}), nn.Identity)
    assert isinstance(instantiate_from_config({"target": "torch.nn.Identity", "params": None}), nn.Identity)


def test_positional_arguments_come_first():
    assert instantiate_from_config({"target": "datetime.date", "params": {"day": 3}}, 2022, 8) == datetime.date(
        2022, 8, 3
    )


@pytest.mark.parametrize("alias", ["__is_first_stage__", "__is_unconditional__"])
def test_published_aliases_build_nothing(alias: str):
    assert instantiate_from_config(alias) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"params": {}}, "expected a config with a 'target' key"),
        ("resnet", "expected a config with a 'target' key, got: 'resnet'"),
        ({"target": "UNetModel"}, "'UNetModel' is not a dotted path"),
        ({"target": "ldm.modules.unet.UNetModel"}, "there is no module 'ldm.modules.unet'"),
        ({"target": "torch.nn.Liner"}, r"module 'torch.nn' has no 'Liner' \(did you mean 'Linear'\?\)"),
        ({"target": HERE + "Base", "params": {"widht": 1}}, r"'widht' is not a parameter of .*did you mean 'width'"),
        ({"target": HERE + "Child", "params": {"width": 1, "nmae": "x"}}, r"'nmae' is not a parameter of .*'name'"),
        ({"target": HERE + "Base", "params": {"width": "wide"}}, "'width' of .*Base is 'wide'; it takes int"),
        ({"target": HERE + "Child", "params": {"width": "x"}}, "'width' of .*Child is 'x'; it takes int"),
        ({"target": "torch.nn.Linear", "params": {"in_features": "a"}}, "'in_features' of .* is 'a'; it takes int"),
        ({"target": HERE + "Child", "params": {"rate": "x"}}, "'rate' of .* is 'x'; it takes float or null"),
    ],
)
def test_what_is_wrong_is_said(config: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        instantiate_from_config(config)


def test_parameters_of_the_bases_count_where_options_are_passed_on():
    made = instantiate_from_config({"target": HERE + "Child", "params": {"depth": 2, "width": 3}})
    assert (made.depth, made.width) == (2, 3)


def test_targets_of_taming_give_classes_of_ours():
    ours = get_obj_from_str("ldm.modules.losses.VQLPIPSWithDiscriminator")
    assert get_obj_from_str("taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator") is ours


def test_a_missing_dependency_is_not_called_a_missing_target(monkeypatch: pytest.MonkeyPatch):
    def fail(name: str) -> None:
        raise ModuleNotFoundError("No module named 'absent_package'", name="absent_package")

    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(ModuleNotFoundError, match="absent_package"):
        get_obj_from_str("ldm.modules.attention.CrossAttention")


def test_whatever_takes_everything_is_not_checked():
    check_params("types.SimpleNamespace", get_obj_from_str("types.SimpleNamespace"), {"anything": 1})


def test_freeze_lasts():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    parent = nn.Sequential(freeze(model), nn.Linear(2, 2))
    parent.train()
    assert not model.training
    assert not model[1].training
    assert not any(p.requires_grad for p in model.parameters())
    x = torch.ones(1, 2)
    torch.testing.assert_close(model(x), model(x))
    assert count_params(parent) == 12
