"""Flags about model, data and words to learn, written into the config, where a resumed run finds them again."""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from ldm.util import ConfigError, get_obj_from_str, parameter_names

log = logging.getLogger(__name__)

DEFAULT_SEED = 23
DEFAULT_PLACEHOLDER = "*"
SPLITS = ("train", "validation", "test", "predict")
CONCEPT_MIX = "ldm.data.concepts.ConceptMix"
MANAGER = "model.params.personalization_config"
PLACEHOLDERS = f"{MANAGER}.params.placeholder_strings"
INIT_WORDS = f"{MANAGER}.params.initializer_words"


def apply_flags(config: DictConfig, args: Namespace) -> None:
    """Write the flags of `main.parse_args` that belong to `config` into it.

    One folder of pictures teaches one word. Several (`--data_root` given again, or `--concepts`, which takes the
    folders inside) teach a word each, see `ldm.data.concepts.ConceptMix`.
    """
    config.seed = config.get("seed", DEFAULT_SEED) if args.seed is None else args.seed
    config.scale_lr = config.get("scale_lr", True) if args.scale_lr is None else args.scale_lr
    if args.ckpt_path:
        _set_model_param(config, "ckpt_path", args.ckpt_path, "--ckpt_path")
    if args.embedding_manager_ckpt:
        _set_model_param(config, "embedding_manager_ckpt", args.embedding_manager_ckpt, "--embedding_manager_ckpt")
    _lists_of_words(config)
    words, initial = list(args.placeholder_string or []), list(args.init_word or [])
    if any(not word.strip() for word in initial):
        raise ValueError("--init_word is empty: name a plain word to start from, such as dog")
    if OmegaConf.select(config, MANAGER) is None:
        for flag, given in (("placeholder_string", words), ("init_word", initial), ("concepts", args.concepts)):
            if given:
                raise ValueError(f"--{flag}: this config has no {MANAGER} to learn a word")
    roots = concept_folders(args.data_root or []) if args.concepts else list(args.data_root or [])
    if args.concepts or len(roots) > 1:
        _apply_concepts(config, roots, words, initial)
    else:
        if roots and not _set_data_param(config, "data_root", roots[0]):
            raise ValueError(f"--data_root {roots[0]}: no data set of this config takes a 'data_root'")
        _apply_word(config, words, initial)
    if OmegaConf.select(config, MANAGER) is not None:
        _check_words(config)


def _lists_of_words(config: DictConfig) -> None:
    """Make single words of the config lists; raise `ConfigError` for what are no words."""
    for path in (PLACEHOLDERS, INIT_WORDS):
        value = OmegaConf.select(config, path)
        if isinstance(value, str):
            OmegaConf.update(config, path, [literal(value)])
            continue
        for word in value if isinstance(value, ListConfig) else [] if value is None else [value]:
            if not (isinstance(word, str) or word is None and path == INIT_WORDS):
                raise ConfigError(f"{path} is {value}; it should be a list of words in quotes")


def literal(text: str) -> str:
    """Text as a value of a config, in which `${` would begin a reference to another value."""
    return text.replace("${", "\\${")


def parameters_of(target: str, trainer_part: bool = False) -> list[str] | None:
    """Names of the parameters that a `target:` takes; None when nothing is known about them."""
    return parameter_names(get_obj_from_str(target, trainer_part))


def _set_model_param(config: DictConfig, name: str, value: Any, flag: str) -> None:
    accepted = parameters_of(config.model.target)
    if accepted is not None and name not in accepted:
        raise ValueError(f"{flag}: {config.model.target} takes no '{name}'")
    OmegaConf.update(config, f"model.params.{name}", literal(str(value)), force_add=True)


def _splits_that_take(config: DictConfig, name: str) -> list[str]:
    """Splits whose data set has a parameter `name`."""
    found = []
    for split in SPLITS:
        target = OmegaConf.select(config, f"data.params.{split}.target")
        accepted = parameters_of(target) if target else []
        if accepted is None or name in accepted:
            found.append(split)
    return found


def _set_data_param(config: DictConfig, name: str, value: Any, overwrite: bool = True) -> bool:
    """Set a parameter of every data set that takes it; returns whether any did."""
    splits = _splits_that_take(config, name)
    for split in splits:
        path = f"data.params.{split}.params.{name}"
        if overwrite or OmegaConf.select(config, path) is None:
            OmegaConf.update(config, path, literal(value) if isinstance(value, str) else value, force_add=True)
    return bool(splits)


# ----------------------------------------------------------------------------------------------------- one concept


def _apply_word(config: DictConfig, words: Sequence[str], initial: Sequence[str]) -> None:
    """Give the word to learn to the embedding manager and to the captions from one source."""
    several = [s for s in SPLITS if OmegaConf.select(config, f"data.params.{s}.target") == CONCEPT_MIX]
    for flag, given in (("placeholder_string", words), ("init_word", initial)):
        if given and several:
            raise ValueError(f"--{flag}: this run learns several words; give all its --data_root folders again with it")
        if len(given) > 1:
            raise ValueError(
                f"--{flag} was given {len(given)} times ({', '.join(given)}), but there is one concept: "
                "give --data_root once for each word"
            )
    if words:
        _set_first_word(config, PLACEHOLDERS, words[0])
        _set_data_param(config, "placeholder_token", words[0])
    if initial:
        _set_first_word(config, INIT_WORDS, initial[0])
    if OmegaConf.select(config, MANAGER) is not None:
        known = OmegaConf.select(config, PLACEHOLDERS) or [DEFAULT_PLACEHOLDER]
        _set_data_param(config, "placeholder_token", known[0], overwrite=False)


def _set_first_word(config: DictConfig, path: str, word: str) -> None:
    """Put `word` first in a list of words, as published: words for further placeholders keep their places."""
    if OmegaConf.select(config, path):
        OmegaConf.update(config, f"{path}[0]", literal(word))
    else:
        OmegaConf.update(config, path, [literal(word)], force_add=True)


def _check_words(config: DictConfig) -> None:
    """Raise `ConfigError` when captions have a word that the model does not learn, or the reverse."""
    ours = bool(OmegaConf.select(config, f"{MANAGER}.params.per_image_tokens"))
    if "train" in _splits_that_take(config, "per_image_tokens"):
        theirs = bool(OmegaConf.select(config, "data.params.train.params.per_image_tokens"))
        if ours != theirs:
            raise ConfigError(
                f"per_image_tokens is {ours} in {MANAGER}.params, but {theirs} in data.params.train.params: set both "
                "alike (configs/variants/per_image.yaml does)"
            )
    words = OmegaConf.select(config, PLACEHOLDERS) or [DEFAULT_PLACEHOLDER]
    for split in SPLITS:
        params = OmegaConf.select(config, f"data.params.{split}.params") or {}
        for token in [params.get("placeholder_token"), *(params.get("placeholder_tokens") or [])]:
            if token is not None and token not in words:
                raise ConfigError(
                    f"data.params.{split} has captions with '{token}' but the model learns {list(words)}: "
                    "set one word for both with --placeholder_string"
                )


# ------------------------------------------------------------------------------------------------- several concepts


def concept_folders(parents: Sequence[str]) -> list[str]:
    """Folders inside `parents`, by name: each holds the pictures of one concept.

    Raises `FileNotFoundError` for a parent that is no folder, `ValueError` for one without folders.
    """
    if not parents:
        raise ValueError("--concepts: name the folder whose subfolders are the concepts with --data_root")
    folders: list[str] = []
    for parent in map(Path, parents):
        if not parent.is_dir():
            raise FileNotFoundError(f"--data_root {parent} is no folder")
        inside = sorted(p for p in parent.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))
        if not inside:
            raise ValueError(f"--concepts: {parent} has no subfolders; each concept is a folder of pictures in it")
        folders += map(str, inside)
    return folders


def own_name(folder: str) -> str:
    """Name of a folder as given, also where that is `.` or a symbolic link to one of another name."""
    return os.path.basename(os.path.abspath(folder))


def placeholder_of(folder: str) -> str:
    """The word for a folder's concept: `imgs/Red Teapot` gives `<Red-Teapot>`."""
    return f"<{'-'.join(own_name(folder).strip('<>').split())}>"


def _apply_concepts(config: DictConfig, roots: list[str], words: Sequence[str], initial: Sequence[str]) -> None:
    """Let every data set of single concepts serve all `roots`, each with its own word, and the manager learn these."""
    if OmegaConf.select(config, MANAGER) is None:
        raise ValueError(f"--data_root was given {len(roots)} times, but this config has no {MANAGER} to learn words")
    words = _one_for_each(words, roots, "placeholder_string") or [placeholder_of(root) for root in roots]
    doubled = [word for word in words if list(words).count(word) > 1]
    if doubled:
        raise ValueError(f"two concepts would have the word '{doubled[0]}': name them all with --placeholder_string")
    initial = initial or OmegaConf.select(config, INIT_WORDS) or []
    starts = list(initial) * len(roots) if len(initial) == 1 else _one_for_each(initial, roots, "init_word")
    for split in _splits_that_take(config, "placeholder_token"):
        section = config.data.params[split]
        inner = {k: v for k, v in (section.get("params") or {}).items() if k not in ("data_root", "placeholder_token")}
        mixed = {"dataset": {"target": section.target, "params": inner}}
        config.data.params[split] = {"target": CONCEPT_MIX, "params": mixed}
    if not _set_data_param(config, "data_roots", roots):
        raise ValueError(f"--data_root was given {len(roots)} times, but no data set of this config takes several")
    _set_data_param(config, "placeholder_tokens", list(words))
    OmegaConf.update(config, PLACEHOLDERS, list(words), force_add=True)
    OmegaConf.update(config, INIT_WORDS, starts, force_add=True)
    for root, word, start in zip(roots, words, starts or ["random"] * len(roots), strict=True):
        log.info("%s: %s, starting from %s", root, word, start)


def _one_for_each(given: Sequence[str], roots: Sequence[str], flag: str) -> list[str]:
    if given and len(given) != len(roots):
        raise ValueError(
            f"{len(given)} x --{flag} ({', '.join(map(str, given))}) for {len(roots)} concepts ({', '.join(roots)}): "
            "give one for each, in the same order" + (", or one for all" if flag == "init_word" else "")
        )
    return list(given)
