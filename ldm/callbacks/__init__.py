"""What happens beside the training loop: set-up of the run directory, saving, pictures, guards, reports."""

from pytorch_lightning.callbacks import LearningRateMonitor

from ldm.callbacks.images import ImageLogger
from ldm.callbacks.moments import MomentsCache
from ldm.callbacks.report import RunReport
from ldm.callbacks.samples import SampleGrids
from ldm.callbacks.saving import EmbeddingCheckpoint, LastCheckpoint, RunStopped, SafeCheckpointIO
from ldm.callbacks.setup import ContactSheet, CUDACallback, ProgressBar, SetupCallback
from ldm.callbacks.steps import ConfiguredRate, GradientGuard, ModeSwapCallback, StepSeed
from ldm.callbacks.validation import FixedValidation
from ldm.callbacks.weights import ModelWeights

__all__ = [
    "ConfiguredRate",
    "ContactSheet",
    "CUDACallback",
    "EmbeddingCheckpoint",
    "FixedValidation",
    "GradientGuard",
    "ImageLogger",
    "LastCheckpoint",
    "LearningRateMonitor",
    "ModeSwapCallback",
    "ModelWeights",
    "MomentsCache",
    "ProgressBar",
    "RunReport",
    "RunStopped",
    "SafeCheckpointIO",
    "SampleGrids",
    "SetupCallback",
    "StepSeed",
]
