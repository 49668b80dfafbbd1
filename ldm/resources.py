"""Where the shipped configs and models are, from a source tree and from an installed package alike."""

from __future__ import annotations

from pathlib import Path

from ldm.util import did_you_mean

KINDS = ("configs", "models")  # in a wheel these two folders lie under ldm/_resources
TABLES = "configs/evaluation"  # experiments of the evaluation, which are no models
PACKAGE = Path(__file__).resolve().parent


def resource_root() -> Path:
    """Folder that holds `configs/` and `models/`: the source tree if this is one, else the installed copy.

    Raises `FileNotFoundError` when neither is there.
    """
    for root in (PACKAGE.parent, PACKAGE / "_resources"):
        if (root / "configs" / "latent-diffusion").is_dir():
            return root
    raise FileNotFoundError(f"the shipped configs are missing beside {PACKAGE}; install the project again")


def config_path(name: str) -> Path:
    """Path of a shipped YAML file, named as in the source tree.

    `name` is "configs/latent-diffusion/cin256-v2.yaml" or "models/ldm/cin256/config.yaml"; a leading "configs/" may
    be left out. Raises `FileNotFoundError` with the closest name when there is no such file.
    """
    relative = name if name.startswith(tuple(f"{kind}/" for kind in KINDS)) else f"configs/{name}"
    path = resource_root() / relative
    if not path.is_file():
        raise FileNotFoundError(f"no shipped config '{name}'{did_you_mean(relative, shipped_configs())}")
    return path


def shipped_configs() -> list[str]:
    """Names of all shipped YAML files that describe models, sorted, in the form that `config_path` takes."""
    root = resource_root()
    names = sorted(p.relative_to(root).as_posix() for kind in KINDS for p in (root / kind).rglob("*.yaml"))
    return [name for name in names if not name.startswith(f"{TABLES}/")]
