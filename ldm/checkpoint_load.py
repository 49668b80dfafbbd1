"""Filling a module from a checkpoint file, one tensor at a time, with a report of what fitted and what did not."""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoint_formats import CheckpointError
from ldm.checkpoint_open import Checkpoint, open_checkpoint
from ldm.checkpoint_recognise import Traits, recognise_file, recognise_shapes

logger = logging.getLogger(__name__)

# Part of some models only: their absence or presence says nothing about whether file and model belong together.
_OPTIONAL_PREFIXES = (
    *("model_ema.", "embedding_manager.", "loss."),
    "cond_stage_model.model.transformer.resblocks.23.",  # the block that Stable Diffusion 2.x does not run
)
_OPTIONAL_SUFFIXES = (".position_ids", ".num_batches_tracked", ".attn_mask", ".logit_scale", ".text_projection")


@dataclass
class LoadReport:
    """What `load_weights` did; keys are the module's (`missing`, `kept`) or the file's (`unexpected`, `ignored`)."""

    path: Path
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # in the module, not in the file: still as initialised
    unexpected: list[str] = field(default_factory=list)  # in the file, not in the module
    mismatched: list[str] = field(default_factory=list)  # "key: (2, 3) in the file, (4, 3) in the model"
    kept: list[str] = field(default_factory=list)  # computed or optional tensors that the file need not have
    ignored: list[str] = field(default_factory=list)  # optional in the file, or named by `ignore_keys`
    global_step: int | None = None

    def __str__(self) -> str:
        words = {
            "missing": "missing from the file",
            "unexpected": "left over in the file",
            "mismatched": "of another shape",
            "kept": "optional and kept as they were",
            "ignored": "optional and left in the file",
        }
        counts = [f"{len(keys)} {text}{some(keys)}" for name, text in words.items() if (keys := getattr(self, name))]
        return "; ".join([f"{self.path.name}: {len(self.loaded)} tensors loaded", *counts])


@dataclass(frozen=True)
class BuildOptions:
    """What `load_model_from_config` asks of the `load_weights` call in the constructor of the model that it builds."""

    dtype: torch.dtype | None = None
    device: str | torch.device = "cpu"
    use_ema_weights: bool = False


BUILD: contextvars.ContextVar[BuildOptions | None] = contextvars.ContextVar("checkpoint_build", default=None)


@dataclass(frozen=True)
class _Slot:
    """A parameter or buffer of a module: where a loaded tensor goes."""

    owner: nn.Module
    attribute: str
    tensor: Tensor

    @property
    def place(self) -> tuple[int, str]:
        """The same for all keys of one tensor."""
        return id(self.owner), self.attribute

    def load(self, file: Checkpoint, name: str, dtype: torch.dtype | None, device: str | torch.device) -> None:
        """Fill from the file: in place if the tensor exists in the wanted type, else by putting a new one there."""
        old = self.tensor
        keep_type = not old.is_floating_point() or old.dim() == 0 or dtype is None
        wanted = old.dtype if keep_type else dtype
        if not old.is_meta and old.dtype == wanted:
            file.read_into(name, old.detach())
            return
        new = file.read(name, wanted, device if old.is_meta else old.device).reshape(old.shape)
        self.put(new)

    def put(self, new: Tensor) -> None:
        """Replace the tensor, keeping what it was: a parameter (the same object where possible) or a buffer."""
        if not isinstance(self.tensor, nn.Parameter):
            self.owner._buffers[self.attribute] = new
        elif self.tensor.is_meta:
            self.owner._parameters[self.attribute] = nn.Parameter(new, requires_grad=self.tensor.requires_grad)
        else:
            self.tensor.data = new


def load_weights(
    module: nn.Module,
    path: str | Path,
    *,
    ignore_keys: Sequence[str] = (),
    prefix: str = "",
    strict: bool = False,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    use_ema_weights: bool = False,
) -> LoadReport:
    """Load a checkpoint file into `module`, one tensor at a time, and log what was missing and what was left over.

    | option | meaning |
    |---|---|
    | `ignore_keys` | skip keys of the file that start with one of these |
    | `prefix` | the module's place in the file, such as "first_stage_model." |
    | `strict` | raise when anything is missing or left over |
    | `dtype`, `device` | type of the floating-point parameters (default: the module's); device of tensors on meta |
    | `use_ema_weights` | take the averaged weights (`model_ema.*`) instead of the last ones |

    A tensor on the meta device is replaced by the file's, mapped where nothing is converted. Raises `CheckpointError`,
    and leaves the module as it was, when shapes differ or nothing fits; the message says which model the file holds.
    """
    build = BUILD.get() or BuildOptions()
    dtype, device = dtype or build.dtype, device or build.device
    with open_checkpoint(path) as file:
        slots = _slots(module)
        shapes = {key: tuple(slot.tensor.shape) for key, slot in slots.items()}
        names = _names(file, shapes, prefix, tuple(ignore_keys), use_ema_weights or build.use_ema_weights)
        report = _compare(file, shapes, names, prefix, tuple(ignore_keys))
        _drop_aliases(report, slots)
        _check_fit(file, module, shapes, report, strict)
        _fill(file, slots, {key: names[key] for key in report.loaded}, dtype, device)
        _fill_averages(report, slots)
    level = logging.WARNING if report.missing or report.unexpected else logging.INFO
    logger.log(level, "%s", report)
    return report


def as_floating(stored: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """`dtype` for a tensor stored as a floating-point type, None (as stored) for integers."""
    return dtype if getattr(torch, stored).is_floating_point else None


def some(keys: Sequence[str]) -> str:
    """The first few keys in brackets, for messages."""
    return f" ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else ""


def _slots(module: nn.Module) -> dict[str, _Slot]:
    """Persistent tensors of `module` by state-dict key; one tensor may have several keys."""
    slots: dict[str, _Slot] = {}
    for name, owner in module.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        for attribute, parameter in owner._parameters.items():
            if parameter is not None:
                slots[prefix + attribute] = _Slot(owner, attribute, parameter)
        for attribute, buffer in owner._buffers.items():
            if buffer is not None and attribute not in owner._non_persistent_buffers_set:
                slots[prefix + attribute] = _Slot(owner, attribute, buffer)
    return slots


def _names(
    file: Checkpoint, shapes: Mapping[str, tuple[int, ...]], prefix: str, ignore_keys: tuple[str, ...], ema: bool
) -> dict[str, str]:
    """For each key of the module the name of its tensor in the file, where the file has one."""
    names = {key: prefix + key for key in shapes if prefix + key in file.tensors}
    if ema:
        averages = {key: "model_ema." + (prefix + key).removeprefix("model.").replace(".", "") for key in shapes}
        averages = {key: name for key, name in averages.items() if name in file.tensors}
        if not averages:
            raise CheckpointError(f"{file.path} holds no averaged weights (model_ema.*); load it without EMA")
        names |= averages
    return {key: name for key, name in names.items() if not (prefix + key).startswith(ignore_keys or ("\0",))}


def is_optional(key: str) -> bool:
    """Whether a model or file may lack this key: schedule buffers (no dot), averages, learned words, losses."""
    return "." not in key or key.startswith(_OPTIONAL_PREFIXES) or key.endswith(_OPTIONAL_SUFFIXES)


def _same_but_ones(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two shapes differ in dimensions of size 1 only: a 1x1 convolution is a linear layer."""
    return [n for n in a if n != 1] == [n for n in b if n != 1]


def _compare(
    file: Checkpoint,
    shapes: Mapping[str, tuple[int, ...]],
    names: Mapping[str, str],
    prefix: str,
    ignore_keys: tuple[str, ...],
) -> LoadReport:
    step = file.scalars.get("global_step")
    report = LoadReport(file.path, global_step=step if isinstance(step, int) else None)
    for key, shape in shapes.items():
        if key not in names:
            (report.kept if is_optional(key) else report.missing).append(key)
        elif _same_but_ones(file.tensors[names[key]].shape, shape):
            report.loaded.append(key)
        else:
            report.mismatched.append(f"{key}: {file.tensors[names[key]].shape} in the file, {shape} in the model")
    used = set(names.values())
    for name in file.tensors:
        if name in used or not name.startswith(prefix):
            continue
        optional = is_optional(name.removeprefix(prefix)) or name.startswith(ignore_keys or ("\0",))
        (report.ignored if optional else report.unexpected).append(name)
    return report


def _drop_aliases(report: LoadReport, slots: Mapping[str, _Slot]) -> None:
    """A tensor that the module has under two names is not missing when the file has one of them (inpainting_big)."""
    filled = {slots[key].place for key in report.loaded}
    report.kept += [key for key in report.missing if slots[key].place in filled]
    report.missing = [key for key in report.missing if slots[key].place not in filled]


def _check_fit(
    file: Checkpoint, module: nn.Module, shapes: Mapping[str, tuple[int, ...]], report: LoadReport, strict: bool
) -> None:
    weights = [key for key in report.loaded if not is_optional(key)]
    strict_fault = strict and (report.missing or report.unexpected)
    if weights and not report.mismatched and not strict_fault:
        return
    holds = recognise_file(file).sentence
    expected = recognise_shapes(shapes)
    if report.mismatched:
        fault = f"{len(report.mismatched)} tensors differ in shape, such as {report.mismatched[0]}"
    elif strict_fault:
        fault = f"{len(report.missing)} keys are missing{some(report.missing)}"
        fault += f", {len(report.unexpected)} left over{some(report.unexpected)}"
    else:
        fault = "none of its keys fits"
    sentence = f"{file.path} does not fit {type(module).__name__}: {fault}. The file {holds}."
    if expected.traits != Traits():
        sentence += f" The model that the config builds {expected.sentence}."
    raise CheckpointError(sentence)


def _fill(
    file: Checkpoint,
    slots: Mapping[str, _Slot],
    names: Mapping[str, str],
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> None:
    done: set[tuple[int, str]] = set()
    for key in sorted(names, key=lambda key: file.tensors[names[key]].start):  # in the order of the file
        slot = slots[key]
        if slot.place in done:
            continue
        done.add(slot.place)
        # Schedules stay exact: they are buffers of the model itself.
        exact = "." not in key and not isinstance(slot.tensor, nn.Parameter)
        slot.load(file, names[key], None if exact else dtype, device)


def _fill_averages(report: LoadReport, slots: Mapping[str, _Slot]) -> None:
    """Start the averages from the weights when the file has none."""
    shadows = [key for key in report.kept if key.startswith("model_ema.") and slots[key].tensor.dim() > 0]
    if not shadows:
        return
    weights = {key.removeprefix("model.").replace(".", ""): key for key in slots if not key.startswith("model_ema.")}
    for key in shadows:
        weight = slots.get(weights.get(key.removeprefix("model_ema."), ""))
        if weight is not None:
            slots[key].put(getattr(weight.owner, weight.attribute).detach().clone())
