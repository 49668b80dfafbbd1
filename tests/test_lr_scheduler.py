"""Learning-rate factors: reference values, and what lies past the last cycle."""

from __future__ import annotations

import ast
import logging
from typing import Any

import pytest

from ldm import lr_scheduler
from ldm.lr_scheduler import LambdaLinearScheduler, LambdaWarmUpCosineScheduler, LambdaWarmUpCosineScheduler2

COSINE_ORDER = ("warm_up_steps", "lr_min", "lr_max", "lr_start", "max_decay_steps")


def build(description: str) -> Any:
    """The schedule that a case of the reference file is named after."""
    name, _, arguments = description.removesuffix(")").partition("(")
    if arguments.startswith("{"):
        params = ast.literal_eval(arguments)
    elif "=" in arguments:
        params = {k: ast.literal_eval(v) for k, v in (item.split("=") for item in arguments.split(","))}
    else:  # "inpainting_big: 1000, 1e-4, ..."
        values = [ast.literal_eval(v.strip()) for v in arguments.partition(":")[2].split(",")]
        params = dict(zip(COSINE_ORDER, values, strict=True))
    return getattr(lr_scheduler, name)(**params)


def test_reference_values(golden: Any) -> None:
    cases = golden("lr_schedulers").meta["results"]
    assert len(cases) >= 5
    for description, case in cases.items():
        schedule = build(description)
        for step, value in zip(case["steps"], case["values"], strict=True):
            assert schedule(step) == pytest.approx(value, rel=1e-12), f"{description} at {step}"
            assert schedule.schedule(step) == schedule(step)


CYCLES = {"warm_up_steps": [2, 2], "f_min": [0.1, 0.05], "f_max": [1.0, 0.5], "f_start": [0.0, 0.1]}


@pytest.mark.parametrize("cls", [LambdaWarmUpCosineScheduler2, LambdaLinearScheduler])
def test_factor_stays_after_the_last_cycle(cls: Any) -> None:
    schedule = cls(**CYCLES, cycle_lengths=[10, 6])
    assert schedule(16) == pytest.approx(0.05)
    assert schedule(17) == schedule(1000) == schedule(16)


@pytest.mark.parametrize("cls", [LambdaWarmUpCosineScheduler2, LambdaLinearScheduler])
def test_lists_of_different_lengths_are_refused(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"warm_up_steps is \[2, 2\].*one value per cycle"):
        cls(**CYCLES, cycle_lengths=[10])


def test_factor_is_logged_at_the_interval(caplog: pytest.LogCaptureFixture) -> None:
    schedule = LambdaWarmUpCosineScheduler(4, 0.1, 1.0, 0.0, 10, verbosity_interval=5)
    with caplog.at_level(logging.INFO, logger="ldm.lr_scheduler"):
        for step in range(11):
            schedule(step)
    assert len(caplog.records) == 3
