"""Building objects from configs, and the few helpers that every floor of the code base shares."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# Published YAML files use these strings where a config is expected; the model decides what they mean.
FIRST_STAGE_ALIAS = "__is_first_stage__"
UNCONDITIONAL_ALIAS = "__is_unconditional__"

# Published YAML files also name these classes of taming-transformers, whose modules need packages that we do without.
_OWN_INSTEAD_OF_TAMING = {
    "taming.modules.losses.vqperceptual.": "ldm.modules.losses.",
    "taming.modules.losses.": "ldm.modules.losses.",
    "taming.data.faceshq.": "ldm.data.faceshq.",
}

# A config may come from a stranger, so its targets are classes, whose making does nothing but make them, of packages
# that build models and data. Users name packages of their own in the environment variable.
TRUSTED_PACKAGES = (
    "ldm",
    "main",
    "evaluation.alignment",
    "evaluation.scorer",
    "torch.nn",
    "torch.optim",
    "torchvision.transforms",
)
# Besides, where main.py builds the parts of a trainer: making a logger may write files.
TRAINER_PACKAGES = ("pytorch_lightning.callbacks", "pytorch_lightning.loggers", "pytorch_lightning.strategies")
TRUST_VARIABLE = "LDM_TRUSTED_PACKAGES"


class ConfigError(ValueError):
    """A config names something that does not exist or passes a parameter that its target does not take."""


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file as an OmegaConf container.

    Raises `FileNotFoundError` when there is none and `ConfigError`, in one line, when it is not YAML.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no config '{path}'")
    try:
        return OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"'{path}' is not a YAML file: {' '.join(str(error).split())}") from error


def to_plain(config: Any) -> Any:
    """Return `config` with every OmegaConf container replaced by a plain dict or list (interpolations resolved)."""
    if isinstance(config, (DictConfig, ListConfig)):
        return OmegaConf.to_container(config, resolve=True)
    return config


def get_obj_from_str(target: str, trainer_part: bool = False) -> Any:
    """Import `package.module.Name` and return the object; taming's losses and faces give the project's own classes.

    Raises `ConfigError` with the nearest existing name when the module or the attribute does not exist, and for
    anything but a class of `TRUSTED_PACKAGES` (with `trainer_part` also a callback, logger or strategy of Lightning's):
    a config must not be able to run a function.
    """
    for theirs, ours in _OWN_INSTEAD_OF_TAMING.items():
        target = target.replace(theirs, ours) if target.startswith(theirs) else target
    module_name, _, name = target.rpartition(".")
    if not module_name:
        raise ConfigError(f"target '{target}' is not a dotted path such as 'ldm.models.autoencoder.AutoencoderKL'")
    trusted = (*TRUSTED_PACKAGES, *_trusted_by_the_user(), *(TRAINER_PACKAGES if trainer_part else ()))
    _check_trusted(target, target, trusted)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A missing third-party dependency deserves its own message, not "no such target".
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise
        raise ConfigError(f"target '{target}': there is no module '{module_name}'") from error
    if not hasattr(module, name):
        raise ConfigError(f"target '{target}': module '{module_name}' has no '{name}'{did_you_mean(name, dir(module))}")
    found = getattr(module, name)
    # What a trusted module merely imported is not its own.
    path = f"{getattr(found, '__module__', module_name)}.{name}"
    _check_trusted(target, path, trusted)
    if trainer_part and _is_in(path, TRAINER_PACKAGES) and not _is_part_of_a_trainer(found):
        raise ConfigError(f"target '{target}' is neither a callback nor a logger nor a strategy")
    if not inspect.isclass(found) and not _is_in(path, _trusted_by_the_user()):
        raise ConfigError(f"target '{target}' is no class: of '{module_name}' configs may use classes only")
    return found


def _trusted_by_the_user() -> list[str]:
    return [name.strip() for name in os.environ.get(TRUST_VARIABLE, "").split(",") if name.strip()]


def _is_in(path: str, packages: Iterable[str]) -> bool:
    return any(path.startswith(f"{package}.") for package in packages)


def _is_part_of_a_trainer(found: Any) -> bool:
    from pytorch_lightning import Callback
    from pytorch_lightning.loggers import Logger
    from pytorch_lightning.strategies import Strategy

    return inspect.isclass(found) and issubclass(found, (Callback, Logger, Strategy))


def _check_trusted(target: str, path: str, trusted: Iterable[str]) -> None:
    if not _is_in(path, trusted):
        package = path.partition(".")[0]
        raise ConfigError(
            f"target '{target}' is in no package that configs may use; if you trust the config and the package, "
            f"set {TRUST_VARIABLE}={package}"
        )


def did_you_mean(word: str, known: Any) -> str:
    """Return ` (did you mean 'x'?)` for the known word closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


def check_params(target: str, factory: Callable[..., Any], params: Mapping[str, Any]) -> None:
    """Raise `ConfigError` when `params` has a key that `factory` does not take, or text where it takes a number.

    The message names the key and the remedy.
    """
    parameters = _parameters(factory)
    known = None if parameters is None else list(parameters)
    unknown = [key for key in params if known is not None and key not in known]
    if known is not None and unknown:
        key = unknown[0]
        raise ConfigError(
            f"'{key}' is not a parameter of {target}{did_you_mean(key, known)}; it takes: {', '.join(known)}"
        )
    for key, value in params.items():
        wanted = None if parameters is None else _numeric(parameters[key].annotation)
        if isinstance(value, str) and wanted:
            raise ConfigError(f"'{key}' of {target} is '{value}'; it takes {wanted}")


def _numeric(annotation: Any) -> str | None:
    """The words of an annotation that allows numbers and truth values only, such as "int or null"; else None."""
    words = {"int": "int", "float": "float", "bool": "true or false", "None": "null"}
    names = [name.strip() for name in getattr(annotation, "__name__", str(annotation)).split("|")]
    return " or ".join(words[name] for name in names) if set(names) <= set(words) else None


def parameter_names(factory: Callable[..., Any]) -> list[str] | None:
    """Names that `factory` takes; a class whose constructor passes `**options` on also takes those of its bases.

    None when everything is accepted or nothing can be known.
    """
    parameters = _parameters(factory)
    return None if parameters is None else list(parameters)


def _parameters(factory: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    constructors = (
        [c.__dict__["__init__"] for c in factory.__mro__ if "__init__" in c.__dict__]
        if isinstance(factory, type)
        else [factory]
    )
    found: dict[str, inspect.Parameter] = {}
    for constructor in constructors:
        try:
            parameters = inspect.signature(constructor).parameters.values()
        except (TypeError, ValueError):  # some C-implemented callables have no signature to check against
            return None
        own = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"]
        found.update({p.name: p for p in own if p.name not in found})
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return found
    return None


def instantiate_from_config(config: Any, *args: Any, **extra: Any) -> Any:
    """Build the object that a `{target: dotted.path, params: {...}}` config describes.

    `args` and `extra` are passed besides `params`; `extra` wins over `params`. The target sees plain dicts and lists,
    never OmegaConf containers. The strings `__is_first_stage__` and `__is_unconditional__` give None.
    Raises `ConfigError` for a missing or unknown target and for parameters that the target does not take.
    """
    config = to_plain(config)
    if config in (FIRST_STAGE_ALIAS, UNCONDITIONAL_ALIAS):
        return None
    if not isinstance(config, Mapping) or "target" not in config:
        raise ConfigError(f"expected a config with a 'target' key, got: {config!r}")
    target = config["target"]
    params = {**(config.get("params") or {}), **extra}
    factory = get_obj_from_str(target)
    if not callable(factory):
        raise ConfigError(f"target '{target}' is {type(factory).__name__}, not a class or function")
    check_params(target, factory, params)
    return factory(*args, **params)


def require_off(**options: Any) -> None:
    """Raise `ConfigError` for an option of published configs that nothing here reads, unless it is off.

    Off is null, false or an empty list.
    """
    for name, value in options.items():
        if value:
            raise ConfigError(f"{name}={value}: this published option is not supported, leave it out")


def freeze(module: ModuleT) -> ModuleT:
    """Put `module` in eval mode for good and stop gradients to its parameters; returns the module.

    Later calls of `.train()` on a parent do not switch it back (dropout and batch statistics stay off).
    """
    module.eval()
    module.requires_grad_(False)
    for part in module.modules():
        part.train = functools.partial(_stay_in_eval, part)  # type: ignore[method-assign]
    return module


def _stay_in_eval(self: nn.Module, mode: bool = True) -> nn.Module:
    del mode
    return self


def count_params(module: nn.Module) -> int:
    """Number of scalars in the parameters of `module`."""
    return sum(p.numel() for p in module.parameters())


SLOW_BFLOAT16 = "%s computes in bfloat16, which this processor can only emulate, very slowly: %s will be much faster"


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether `device` is a processor without instructions for products in bfloat16.

    There they take a hundred times as long as in float32 and more. False where torch does not say.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return device.type == "cpu" and supported is not None and not supported()
