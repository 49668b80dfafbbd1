"""Shipped configs are found by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm import resources


def test_config_path_takes_names_with_and_without_folder():
    path = resources.config_path("latent-diffusion/cin256-v2.yaml")
    assert path == resources.config_path("configs/latent-diffusion/cin256-v2.yaml")
    assert path.is_file()
    assert resources.config_path("models/ldm/cin256/config.yaml").is_file()


def test_unknown_config_names_the_closest():
    with pytest.raises(FileNotFoundError, match=r"no shipped config.*did you mean 'configs/latent-diffusion/cin256-v2"):
        resources.config_path("latent-diffusion/cin256_v2.yaml")


def test_installed_copy_serves_where_there_is_no_source_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "site-packages" / "ldm"
    config = package / "_resources" / "configs" / "latent-diffusion" / "x.yaml"
    config.parent.mkdir(parents=True)
    config.write_text("model: {}\n")
    monkeypatch.setattr(resources, "PACKAGE", package)
    assert resources.config_path("latent-diffusion/x.yaml") == config
    assert resources.shipped_configs() == ["configs/latent-diffusion/x.yaml"]


def test_missing_installation_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resources, "PACKAGE", tmp_path / "ldm")
    with pytest.raises(FileNotFoundError, match="install the project again"):
        resources.resource_root()
