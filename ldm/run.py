"""From the command line to a plan: which configs, which run directory, what to resume.

Nothing is built or written here. `make_plan` merges the YAML files (those of the resumed run first, then `--base` from
left to right), the dotted overrides and the flags, and says where the run will live.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import math
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.run_flags import apply_flags, own_name, parameters_of
from ldm.util import ConfigError, did_you_mean, read_yaml

log = logging.getLogger(__name__)

TIME_FORMAT = "%Y-%m-%dT%H-%M-%S"
SECTIONS = {
    "": ("model", "data", "lightning", "train", "seed", "scale_lr"),
    "model": ("target", "params", "base_learning_rate"),
    "data": ("target", "params"),
    "lightning": (
        "trainer",
        "callbacks",
        "modelcheckpoint",
        "logger",
        "strategy",
        "find_unused_parameters",
        "compile",
        "keep_activations",
    ),
}


PARTS = ("trainer", "callbacks", "modelcheckpoint", "logger")  # of `lightning`, with keys and values of their own


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """Everything that a run needs to know before anything is built."""

    config: DictConfig  # `model`, `data` and the top-level values that a later resume needs
    lightning: DictConfig  # `trainer`, `callbacks`, `modelcheckpoint`, `logger`, ...
    run_dir: Path
    started: str  # YYYY-MM-DDTHH-MM-SS, names the config files of this start
    seed: int
    train: bool
    test: bool
    scale_lr: bool
    resume: Path | None  # checkpoint to continue from
    fresh: bool  # whether `run_dir` is to be made by this run

    @property
    def checkpoint_dir(self) -> Path:
        """Where `last.ckpt` and the embedding files go."""
        return self.run_dir / "checkpoints"

    @property
    def config_dir(self) -> Path:
        """Where the merged configs of every start of this run go."""
        return self.run_dir / "configs"


def make_plan(args: Namespace, overrides: Sequence[str] = (), now: datetime.datetime | None = None) -> RunPlan:
    """Merge configs, overrides and flags of `main.parse_args` into a plan.

    Raises `FileNotFoundError` for files that do not exist and `ConfigError`/`ValueError` for what they must not say.
    """
    resumed_dir, checkpoint = find_run(args.resume) if args.resume else (None, None)
    started = _start_time(resumed_dir, now or datetime.datetime.now())
    if resumed_dir and args.name:
        raise ValueError("-n/--name names a new run, -r/--resume goes on with an old one: give only one of them")
    saved = saved_configs(resumed_dir) if resumed_dir else []
    if not saved and not args.base:
        raise ValueError("no config: give --base CONFIG.yaml, or -r RUN_DIRECTORY to go on with a run")
    config = merge_configs([*saved, *(Path(base) for base in args.base)])
    apply_overrides(config, overrides)
    apply_flags(config, args)
    lightning = config.pop("lightning", None) or OmegaConf.create()
    lightning.trainer = OmegaConf.merge(lightning.get("trainer") or {}, args.trainer)
    if args.gpus is not None:
        lightning.trainer.gpus = args.gpus
    if args.compile is not None:
        lightning.compile = args.compile  # saved with the run's configs, so that a resumed run compiles, too
    check_numbers(config, lightning)
    train = bool(config.get("train", False)) if args.train is None else args.train
    config.train = train  # so that `-r DIR` alone goes on training
    run_dir = resumed_dir or new_run_dir(args, started)
    return RunPlan(
        config=config,
        lightning=lightning,
        run_dir=run_dir,
        started=started,
        seed=config.seed,
        train=train,
        test=not args.no_test,
        scale_lr=config.scale_lr,
        resume=checkpoint,
        fresh=resumed_dir is None,
    )


# ---------------------------------------------------------------------------------------------- run directories


def find_run(path: str | Path) -> tuple[Path, Path | None]:
    """Run directory and checkpoint that `-r PATH` means; the checkpoint is None when none was saved yet.

    `path` is a run directory, its `checkpoints` folder or a checkpoint file in it. The directory may have moved.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"cannot resume: there is no '{path}'")
    if path.is_file():
        folder = next((parent for parent in path.absolute().parents if parent.name == "checkpoints"), None)
        if folder is None:
            raise ValueError(
                f"cannot resume from '{path}': it is not in the checkpoints folder of a run; "
                "to start a new run from its weights, pass it as --ckpt_path"
            )
        return folder.parent, path
    run_dir = path.absolute().parent if path.name == "checkpoints" else path
    last = run_dir / "checkpoints" / "last.ckpt"
    if not last.is_file():
        log.info("%s does not exist: the run starts again at step 0", last)
        return run_dir, None
    return run_dir, last


def _start_time(resumed_dir: Path | None, now: datetime.datetime) -> str:
    """Name of this start; a second start within the same second gets the next one."""
    started = now.strftime(TIME_FORMAT)
    while resumed_dir is not None and (resumed_dir / "configs" / f"{started}-project.yaml").exists():
        now += datetime.timedelta(seconds=1)
        started = now.strftime(TIME_FORMAT)
    return started


def saved_configs(run_dir: Path) -> list[Path]:
    """Configs that earlier starts of the run saved, oldest first."""
    folder = run_dir / "configs"
    if not any(folder.glob("*.yaml")):
        raise FileNotFoundError(f"cannot resume: '{run_dir}' has no configs/*.yaml, so it is not a run directory")
    started = {path.name.removesuffix("-project.yaml") for path in folder.glob("*-project.yaml")}
    whole = sorted(name for name in started if (folder / f"{name}-lightning.yaml").is_file())
    if not whole:
        raise FileNotFoundError(f"cannot resume: the configs of '{run_dir}' are not all there; start the run anew")
    return [folder / f"{name}-{kind}.yaml" for name in whole for kind in ("lightning", "project")]


def new_run_dir(args: Namespace, started: str) -> Path:
    """`<logdir>/<data dir name><time>_<name or config><postfix>`, with a number when that is taken."""
    name = args.name or Path(args.base[0]).stem
    data = own_name(args.data_root[0]) if args.data_root and args.datadir_in_name else ""
    parent = Path(args.logdir) / args.project
    base = f"{data}{started}_{name}{args.postfix}"
    run_dir = parent / base
    number = 2
    while run_dir.exists():
        run_dir = parent / f"{base}-{number}"
        number += 1
    return run_dir


# ------------------------------------------------------------------------------------------------------ configs


def merge_configs(paths: Iterable[Path]) -> DictConfig:
    """Read YAML files and merge them from left to right; a misspelt section is an error."""
    merged: Any = OmegaConf.create()
    for path in paths:
        merged = OmegaConf.merge(merged, read_config(path))
    check_sections(merged)
    if merged.get("model") is None:
        raise ConfigError("the config has no 'model' section")
    return merged


def read_config(path: Path) -> DictConfig:
    """Read one YAML file whose top level is a mapping."""
    config = read_yaml(path)
    if not isinstance(config, DictConfig):
        raise ConfigError(f"'{path}' holds a list; a config starts with 'model:'")
    return config


def check_numbers(config: DictConfig, lightning: DictConfig) -> None:
    """Raise `ConfigError` for a seed, a learning rate or an accumulation that no run can have."""
    for where, name, low, high in (
        (config, "seed", 0, 2**32 - 1),
        (config, "model.base_learning_rate", 0, math.inf),
        (lightning, "trainer.accumulate_grad_batches", 1, math.inf),
    ):
        value = OmegaConf.select(where, name)
        if value is not None and not (isinstance(value, int | float) and low <= value <= high):
            limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ConfigError(f"{name} is {value!r}; it must be a number {limits}")
    for where, name, kind, what in (
        (config, "seed", int, "a whole number"),
        (config, "data.params.batch_size", int, "a whole number"),
        (lightning, "modelcheckpoint.params.every_n_train_steps", int, "a whole number"),
        (config, "train", bool, "true or false"),
        (config, "scale_lr", bool, "true or false"),
    ):
        value = OmegaConf.select(where, name)
        if value is not None and (not isinstance(value, kind) or kind is int and isinstance(value, bool)):
            raise ConfigError(f"{name} is {value!r}; it must be {what}")


def check_sections(config: DictConfig) -> None:
    """Raise `ConfigError` for a section name that nothing reads, at the top and in `model`, `data`, `lightning`."""
    callbacks = OmegaConf.select(config, "lightning.callbacks")
    own = [f"lightning.callbacks.{name!s}" for name in callbacks] if isinstance(callbacks, DictConfig) else []
    for section in (*filter(None, SECTIONS), *(f"lightning.{part}" for part in PARTS), *own):
        node = OmegaConf.select(config, section)
        if node is not None and not isinstance(node, DictConfig):
            raise ConfigError(f"{section} is {node!r}; it should have keys and values of its own")
    target = OmegaConf.select(config, "model.target")
    if target is not None and not isinstance(target, str):
        raise ConfigError(f"model.target is {target!r}; it should be a dotted path in quotes")
    for section, known in SECTIONS.items():
        node = OmegaConf.select(config, section) if section else config
        for key in map(str, node) if isinstance(node, DictConfig) else ():
            if key not in known:
                where = f"in section '{section}'" if section else "at the top level"
                hint = did_you_mean(key, known) or f"; known: {', '.join(known)}"
                raise ConfigError(f"unknown key '{key}' {where} of the config{hint}")


def apply_overrides(config: DictConfig, overrides: Iterable[str]) -> None:
    """Set `a.b.c=value` in `config`; the path must exist or be a parameter of the class it belongs to.

    `+a.b.c=value` adds a key without that check. Values are YAML: `1e-4`, `true`, `[1, 2]`, `null`.
    """
    for override in overrides:
        path, _, text = override.partition("=")
        if path.startswith("+"):
            path = path[1:]
        else:
            check_path(config, path)
        try:
            value = OmegaConf.from_dotlist([f"value={text}"])["value"]
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"'{override}': the value is not YAML ({' '.join(str(error).split())})") from error
        OmegaConf.update(config, path, value, merge=True, force_add=True)
    check_sections(config)


def check_path(config: DictConfig, path: str) -> None:
    """Raise `ConfigError` when `path` neither exists in `config` nor can be added to what it belongs to."""
    node: Any = config
    parts = path.replace("[", ".").replace("]", "").split(".")
    for depth, part in enumerate(parts):
        where = ".".join(parts[:depth])
        if isinstance(node, ListConfig) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, DictConfig) and part in node:
            node = OmegaConf.select(node, part)
        elif isinstance(node, DictConfig):
            known = _known_keys(config, where, node)
            if known is None or part in known:
                return
            hint = did_you_mean(part, known) or f"; known: {', '.join(known)}"
            raise ConfigError(
                f"override '{path}': there is no '{part}' in '{where or 'the config'}'{hint}; "
                f"to add it all the same, write +{path}=..."
            )
        elif node is None:
            return
        else:
            raise ConfigError(f"override '{path}': '{where}' is a value ({node!r}), it has no '{part}'")


def _known_keys(config: DictConfig, where: str, node: DictConfig) -> list[str] | None:
    """Keys that the section at `where` may have; None when only the object built from it can tell."""
    if where.startswith("lightning."):
        return None  # checked against the Trainer and the callbacks when they are built
    keys = [str(key) for key in node]
    if where in SECTIONS:
        return [*keys, *SECTIONS[where]]
    if "target" in node:
        return [*keys, "params"]
    owner, _, last = where.rpartition(".")
    target = OmegaConf.select(config, f"{owner}.target") if last == "params" else None
    if target is None:
        return keys
    accepted = parameters_of(target)
    return None if accepted is None else [*keys, *accepted]
