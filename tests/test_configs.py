"""Every shipped YAML file: published values, targets that resolve, parameters that bind, models that build."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from torch import nn

from ldm.resources import config_path, shipped_configs
from ldm.util import ConfigError, check_params, get_obj_from_str
from tests.conftest import DATA
from tests.meta_models import build_on_meta, load_config
from tests.test_manifests import CASES

PUBLISHED: dict[str, dict[str, Any]] = json.loads((DATA / "published_configs.json").read_text())
CONFIGS = shipped_configs()
# Overlays for a base config, see test_inversion_variants.py: they build nothing alone.
VARIANTS = {name for name in CONFIGS if name.startswith("configs/variants/")}
ROOT = DATA.parents[1]

# Two published files have one name; Textual Inversion's keeps it.
RENAMED = {
    "stable-diffusion/configs/stable-diffusion/v1-inference.yaml": "configs/stable-diffusion/v1-inference-plain.yaml"
}
# Published values that cannot work, with ours. docs/configs.md lists the same.
FIRST_STAGE_CKPT = "model.params.first_stage_config.params.ckpt_path"
CHANGED = {
    ("configs/latent-diffusion/cin-ldm-vq-f8.yaml", FIRST_STAGE_CKPT): "models/first_stage_models/vq-f8/model.ckpt",
    ("configs/latent-diffusion/ffhq-ldm-vq-4.yaml", FIRST_STAGE_CKPT): "models/first_stage_models/vq-f4/model.ckpt",
    ("configs/latent-diffusion/lsun_bedrooms-ldm-vq-4.yaml", FIRST_STAGE_CKPT): (
        "models/first_stage_models/vq-f4/model.ckpt"
    ),
}


def shipped_name(published: str) -> str:
    return RENAMED.get(published, published.split("/", 1)[1])


def flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) pairs; lists of dicts are indexed as in `a[0].b`, other lists are values."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else key)
    elif isinstance(node, list) and node and isinstance(node[0], Mapping):
        for index, value in enumerate(node):
            yield from flatten(value, f"{prefix}[{index}]")
    else:
        yield prefix, node


def targets(node: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(target, params) of every config in the tree."""
    if isinstance(node, Mapping):
        if isinstance(node.get("target"), str):
            yield node["target"], node.get("params") or {}
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets(value)


@pytest.mark.parametrize("published", PUBLISHED, ids=shipped_name)
def test_values_are_the_published_ones(published: str):
    name = shipped_name(published)
    expected = {key: CHANGED.get((name, key), value) for key, value in PUBLISHED[published].items()}
    actual = dict(flatten(load_config(name)))
    assert actual == expected
    assert {k: type(v) for k, v in actual.items()} == {k: type(v) for k, v in expected.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_target_resolves_and_takes_its_parameters(name: str):
    for target, params in targets(load_config(name)):
        check_params(target, get_obj_from_str(target), params)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_misspelt_key_is_refused_by_every_class_of_ours(name: str):
    for target, params in targets(load_config(name)):
        if target.startswith(("ldm.", "main.")):
            with pytest.raises(ConfigError, match="'no_such_key' is not a parameter of"):
                check_params(target, get_obj_from_str(target), {**params, "no_such_key": 1})


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - VARIANTS - {name for name, _ in CASES.values()}))
def test_models_without_a_manifest_build_too(name: str):
    model = build_on_meta(name)
    assert isinstance(model, nn.Module)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_the_list_of_configs_is_complete():
    listed = (ROOT / "docs" / "configs.md").read_text()
    for name in CONFIGS:
        folder = name.split("/")[-2]
        file = name.rpartition("/")[2]
        names = [name, name.removeprefix("configs/"), f"`{file}`", f"| {folder}", f", {folder}", f"`configs/{folder}/`"]
        assert any(n in listed for n in names), f"docs/configs.md does not list {name}"


def test_a_comment_says_what_each_file_is():
    for name in CONFIGS:
        first = config_path(name).read_text().splitlines()[0]
        assert re.match(r"# \w", first), f"{name}: the first line should say in a comment what model this is"
