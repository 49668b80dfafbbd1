"""Command to train every model of this code base: parse -> plan -> build -> fit.

`python main.py --help` lists the flags. YAML files name `main.DataModuleFromConfig`, `main.ImageLogger` and the other
objects of `YAML_TARGETS`; they are looked up here when asked for, so that `--help` need not wait for torch.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from ldm.cli import FALSE_WORDS, TRUE_WORDS, run_command

YAML_TARGETS = {
    "DataModuleFromConfig": "ldm.data.datamodule",
    "WrappedDataset": "ldm.data.datamodule",
    "ImageLogger": "ldm.callbacks",
    "SetupCallback": "ldm.callbacks",
    "CUDACallback": "ldm.callbacks",
    "ModeSwapCallback": "ldm.callbacks",
    "LearningRateMonitor": "ldm.callbacks",
}

EXAMPLES = """\
examples:
  learn a word from pictures:
    python main.py --base configs/finetune.yaml --data_root ./imgs
  train a first stage, then look at logs/:
    python main.py --base configs/autoencoder/autoencoder_kl_32x32x4.yaml -t -n my-autoencoder
  change any value of the config:
    python main.py --base CONFIG.yaml -t model.base_learning_rate=1e-4 data.params.batch_size=8
  go on with a run that was stopped (directory or checkpoint file):
    python main.py -r logs/imgs2025-01-31T12-00-00_finetune -t
  learn a word for each of several things in one run:
    python main.py --base configs/finetune.yaml --data_root ./cat --data_root ./clock --init_word cat --init_word clock
  two processes on the CPU:
    python main.py --base CONFIG.yaml -t --accelerator cpu --devices 2 --strategy ddp

An override names an existing value or a parameter of the class that its section builds; +a.b.c=value adds any other.
"""


def boolean(word: str) -> bool:
    """Parse `true`, `false`, `yes`, `no`, `1`, `0`."""
    if word.lower() in TRUE_WORDS:
        return True
    if word.lower() in FALSE_WORDS:
        return False
    raise argparse.ArgumentTypeError(f"'{word}' is neither true nor false")


def number(word: str) -> int | float:
    """Parse an int, or a float when the text has a point or an exponent: Lightning reads `1` and `1.0` differently."""
    return int(word) if re.fullmatch(r"[+-]?\d+", word) else float(word)


def devices(word: str) -> int | str:
    """Parse a count (`2`), a list of indices (`0,1`) or `auto`."""
    return int(word) if re.fullmatch(r"-?\d+", word) else word


# Flag of the Lightning Trainer, type, help. They go into `lightning.trainer` of the config and win over it.
TRAINER_FLAGS: tuple[tuple[str, Any, str], ...] = (
    ("accelerator", str, "cpu, gpu, mps or auto (default: auto)"),
    ("devices", devices, "how many devices (2), which ones (0,1), or auto (default: 1)"),
    ("num_nodes", int, "number of machines"),
    ("strategy", str, "ddp, ... (default: one process, or ddp for several devices)"),
    ("precision", str, "32-true, bf16-mixed or 16-mixed; to learn words also bf16-true, 16-true"),
    ("max_steps", int, "stop after this many optimiser steps"),
    ("min_steps", int, "do not stop earlier"),
    ("max_epochs", int, "stop after this many epochs"),
    ("min_epochs", int, "do not stop earlier"),
    ("max_time", str, "stop after DD:HH:MM:SS"),
    ("accumulate_grad_batches", int, "batches per optimiser step"),
    ("gradient_clip_val", float, "clip gradients to this norm"),
    ("gradient_clip_algorithm", str, "norm or value"),
    ("val_check_interval", number, "validate every N batches, or every fraction of an epoch"),
    ("check_val_every_n_epoch", int, "validate every N epochs"),
    ("num_sanity_val_steps", int, "validation batches before training (default: 0)"),
    ("limit_train_batches", number, "train batches per epoch"),
    ("limit_val_batches", number, "validation batches"),
    ("limit_test_batches", number, "test batches"),
    ("overfit_batches", number, "train on this many batches only"),
    ("log_every_n_steps", int, "steps between two rows of the log"),
    ("fast_dev_run", int, "run N batches of everything, save nothing"),
    ("profiler", str, "simple or advanced"),
    ("deterministic", boolean, "use deterministic kernels only"),
    ("benchmark", boolean, "let cuDNN search for the fastest kernels"),
    ("detect_anomaly", boolean, "find the operation that made a NaN gradient"),
    ("enable_progress_bar", boolean, "show a progress bar"),
    ("enable_model_summary", boolean, "print the table of layers"),
    ("sync_batchnorm", boolean, "synchronise batch norms between processes"),
)


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command line, without the dotted overrides."""
    parser = argparse.ArgumentParser(
        prog="main.py",
        usage="python main.py --base YAML... [-t] [flags] [a.b.c=value ...]",
        description="Train a model of this code base, or learn a new word, from a YAML config.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-b", "--base", nargs="*", default=[], metavar="YAML", help="configs, merged from left to right")
    add("-t", "--train", type=boolean, nargs="?", const=True, metavar="BOOL",
        help="train (default: false, unless the config says `train: true`)")  # fmt: skip
    add("--no-test", type=boolean, nargs="?", const=True, default=False, metavar="BOOL", help="skip the test set")
    add("-r", "--resume", metavar="DIR|FILE",
        help="go on with this run directory or checkpoint; settings given along replace its own")  # fmt: skip
    add("-n", "--name", default="", help="name of the run directory (default: that of the config)")
    add("-f", "--postfix", default="", help="added to the name of the run directory")
    add("-l", "--logdir", default="logs", help="where run directories are made (default: logs)")
    add("-p", "--project", default="", help="folder inside --logdir that groups runs")
    add("-s", "--seed", type=int, help="seed of weights, data order and noise (default: 23)")
    add("-d", "--debug", type=boolean, nargs="?", const=True, default=False, metavar="BOOL",
        help="show the whole traceback of an error")  # fmt: skip
    add("--scale_lr", type=boolean, nargs="?", const=True, metavar="BOOL",
        help="learning rate = accumulation x devices x batch size x base_learning_rate (default: true)")  # fmt: skip
    add("--datadir_in_name", type=boolean, nargs="?", const=True, default=True, metavar="BOOL",
        help="begin the run directory's name with that of --data_root (default: true)")  # fmt: skip
    _add_model_flags(parser)
    _add_trainer_flags(parser)
    return parser


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and data (they win over the config)")
    group.add_argument("--ckpt_path", "--actual_resume", dest="ckpt_path", metavar="CKPT",
                       help="base weights to start from (model.params.ckpt_path)")  # fmt: skip
    group.add_argument("--data_root", action="append", metavar="DIR",
                       help="folder of pictures; once for each concept, which gets its own word")  # fmt: skip
    group.add_argument("--concepts", action="store_true", help="each folder inside --data_root is a concept of its own")
    group.add_argument("--placeholder_string", action="append", metavar="WORD",
                       help="the word to learn, in model and captions (several concepts: one for each; "
                       "default: <folder name>)")  # fmt: skip
    group.add_argument("--init_word", action="append", metavar="WORD",
                       help="word that the new one starts from (several concepts: one for each or one)")  # fmt: skip
    group.add_argument("--embedding_manager_ckpt", metavar="PT", help="learned vectors to start from")


def _add_trainer_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("trainer")
    group.add_argument("--gpus", metavar="LIST",
                       help="GPU numbers (`0,` or `0` is the first, `0,1` two of them), or cpu, mps, auto")  # fmt: skip
    group.add_argument("--compile", type=boolean, nargs="?", const=True, metavar="BOOL",
                       help="compile the denoising network: starts later, steps faster (default: false)")  # fmt: skip
    for flag, kind, text in TRAINER_FLAGS:
        word = "BOOL" if kind is boolean else "N" if kind in (int, float, number) else "VALUE"
        optional: dict[str, Any] = {"nargs": "?", "const": True} if kind is boolean else {}
        group.add_argument(f"--{flag}", type=kind, metavar=word, help=text, **optional)


def parse_args(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line into (flags, dotted overrides); `flags.trainer` is a dict of the Trainer's flags."""
    parser = build_parser()
    words, overrides = _split_overrides(argv)
    args, rest = parser.parse_known_args(words)
    for word in rest:
        parser.error(_unknown_word(word, parser))
    args.trainer = {flag: getattr(args, flag) for flag, _, _ in TRAINER_FLAGS if getattr(args, flag) is not None}
    return args, overrides


def _split_overrides(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Set `a.b.c=value` apart before argparse sees it, so that `--base x.yaml a=1` and `-t a=1` mean what they say."""
    words: list[str] = []
    overrides: list[str] = []
    takes_text = False
    for word in sys.argv[1:] if argv is None else argv:
        is_override = re.match(r"\+?[A-Za-z_][\w.\[\]]*=", word) is not None and not os.path.exists(word)
        (overrides if is_override and not takes_text else words).append(word)
        takes_text = word in ("--placeholder_string", "--init_word", "-n", "--name", "-f", "--postfix")
    return words, overrides


def _unknown_word(word: str, parser: argparse.ArgumentParser) -> str:
    """What to answer to a word that is neither a flag nor an override."""
    flag, _, value = word.partition("=")
    if word.startswith("-"):
        if "." in flag:
            return f"'{word}': overrides are written without dashes: {flag.lstrip('-')}={value or 'VALUE'}"
        known = [option for action in parser._actions for option in action.option_strings]
        close = difflib.get_close_matches(flag, known, n=1)
        return f"there is no flag '{flag}'" + (f" (did you mean '{close[0]}'?)" if close else "; see --help")
    return f"'{word}' is neither a flag nor an override of the form a.b.c=value"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`; errors of the user are ValueError, TypeError or OSError."""
    args, overrides = parse_args(argv)
    # torch and Lightning take seconds to import: only once the flags are known to be sound
    from ldm.run import make_plan
    from ldm.training import execute

    execute(make_plan(args, overrides))


def __getattr__(name: str) -> Any:
    if name in YAML_TARGETS:
        return getattr(importlib.import_module(YAML_TARGETS[name]), name)
    raise AttributeError(f"module 'main' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*globals(), *YAML_TARGETS]


if __name__ == "__main__":
    run_command(main, ["--debug" if word == "-d" else word for word in sys.argv[1:]])
