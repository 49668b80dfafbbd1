"""FID, KID and IS by torchmetrics, on features of a local network file."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

# Takes pictures uint8 (B, 3, H, W), gives features (B, D) and class logits (B, K).
FeatureNetwork = Callable[[Tensor], tuple[Tensor, Tensor]]
WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"  # torch-fidelity's conversion of the network that FID is defined on


def check_inception(weights: str | Path | None) -> None:
    """Raise `FileNotFoundError` that names the network's file, or `ValueError` when torch-fidelity is not installed."""
    if weights is None or not Path(weights).is_file():
        where = "" if weights is None else f" at {weights}"
        raise FileNotFoundError(
            f"no feature network{where}: FID, KID and IS need {WEIGHTS} (name it with --inception_weights); nothing is "
            "downloaded"
        )
    if find_spec("torch_fidelity") is None:
        raise ValueError("FID, KID and IS need torch-fidelity: pip install -e '.[evaluation]'")


def load_inception(weights: str | Path | None, device: torch.device | str = "cpu") -> FeatureNetwork:
    """Inception-v3 as FID is defined on, with the weights of a local file; see `check_inception` for what it raises."""
    check_inception(weights)
    from torchmetrics.image.fid import NoTrainInceptionV3

    network = NoTrainInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(weights)).to(device)

    @torch.no_grad()
    def features(images: Tensor) -> tuple[Tensor, Tensor]:
        pooled, logits = network._torch_fidelity_forward(images.to(device))
        return pooled.flatten(1).cpu(), logits.flatten(1).cpu()

    return features


class _AsTheyAre(nn.Module):
    """Stands where torchmetrics expects a network: features go in already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """The features (B, D) unchanged."""
        return features


def features_of(batches: Iterable[Tensor], network: FeatureNetwork) -> tuple[Tensor, Tensor]:
    """Features (N, D) and logits (N, K) of pictures uint8 (B, 3, H, W) in batches."""
    pairs = [network(images) for images in batches]
    if not pairs:
        raise ValueError("there is no picture to compare")
    features, logits = zip(*pairs, strict=True)
    return torch.cat(features), torch.cat(logits)


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """FID between features (N, D) and (M, D)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(_AsTheyAre(real.shape[1]))
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric.compute().item()


def kernel_distance(real: Tensor, fake: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> float:
    """KID between features (N, D) and (M, D): mean over random subsets, which are smaller where there are few."""
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(subset_size, len(real), len(fake))
    with _quietly(seed):
        metric = KernelInceptionDistance(_AsTheyAre(real.shape[1]), subsets=subsets, subset_size=size)
        metric.update(real, real=True)
        metric.update(fake, real=False)
        return metric.compute()[0].item()


def inception_score(logits: Tensor, splits: int = 10, seed: int = 0) -> float:
    """IS of class logits (N, K): mean over `splits` parts of the pictures in random order."""
    from torchmetrics.image.inception import InceptionScore

    with _quietly(seed):
        metric = InceptionScore(_AsTheyAre(logits.shape[1]), splits=splits)
        metric.update(logits)
        return metric.compute()[0].item()


@contextlib.contextmanager
def _quietly(seed: int) -> Iterator[None]:
    """Seeded, without touching the caller's generator, and without torchmetrics' remarks on memory."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(seed)
        yield
