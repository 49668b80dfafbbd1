"""Metrics as pure functions of feature vectors (N, D) or pictures (N, C, H, W); no model, no file.

Similarities are raw cosines. Features need not be normed: every function norms them first. The names of the encoders
are the caller's matter: `image_similarity` is "CLIP-I" on CLIP's features and "DINO" on DINO's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

CLIPSCORE_WEIGHT = 2.5  # of CLIPScore (Hessel et al. 2021), which Custom Diffusion reports as "text alignment"


def _checked(features: Tensor, what: str) -> Tensor:
    if features.ndim != 2 or not len(features):
        raise ValueError(f"{what} must be features (N, D) with N >= 1, got shape {tuple(features.shape)}")
    return features.float()


def unit(features: Tensor) -> Tensor:
    """Vectors (N, D) scaled to length 1."""
    return F.normalize(_checked(features, "features"), dim=-1)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """All pairwise cosines (N, M) of vectors (N, D) and (M, D)."""
    return unit(a) @ unit(b).T


def image_similarity(generated: Tensor, training: Tensor) -> Tensor:
    """Mean cosine over all pairs of a generated (N, D) and a training picture (M, D); 0-d."""
    return cosines(generated, training).mean()


def self_similarity(features: Tensor) -> Tensor:
    """Mean cosine over all pairs of two different pictures (N, D) of one set; 0-d, not-a-number for a single one."""
    matrix = cosines(features, features)
    count = len(matrix)
    if count < 2:
        return matrix.new_tensor(float("nan"))
    return (matrix.sum() - matrix.diagonal().sum()) / (count * (count - 1))


def text_similarity(generated: Tensor, text: Tensor) -> Tensor:
    """Cosine of the mean of the pictures' unit vectors (N, D) with the text's vector (D,) or (1, D); 0-d.

    The measure of the Textual Inversion paper, Section 5.1.
    """
    return cosines(unit(generated).mean(0, keepdim=True), text.reshape(1, -1)).squeeze()


def mean_text_similarity(generated: Tensor, text: Tensor) -> Tensor:
    """Mean of the pictures' (N, D) cosines with the text's vector (D,) or (1, D); 0-d.

    The measure of the paper's released code, and of CLIP-T. It is `text_similarity` times the length of the mean of
    the unit vectors, so it is lower the more diverse the pictures are.
    """
    return cosines(generated, text.reshape(1, -1)).mean()


def diversity(features: Tensor) -> Tensor:
    """Mean cosine distance (1 - cosine) between two different pictures (N, D) of one prompt; 0-d."""
    return 1 - self_similarity(features)


def nearest_similarity(generated: Tensor, training: Tensor) -> Tensor:
    """Cosine (N,) of each generated picture (N, D) with the training picture (M, D) nearest to it.

    Values near 1 mean that a training picture was copied.
    """
    return cosines(generated, training).amax(1)


def nearest_other_similarity(features: Tensor) -> Tensor:
    """Cosine (N,) of each picture (N, D) of a set with the other one nearest to it; not-a-number for a single one."""
    matrix = cosines(features, features).fill_diagonal_(-torch.inf)
    return matrix.amax(1) if len(matrix) > 1 else matrix.new_full((1,), torch.nan)


def clip_score(cosine: Tensor, weight: float = CLIPSCORE_WEIGHT) -> Tensor:
    """CLIPScore `weight * max(cosine, 0)` of cosines of any shape."""
    return weight * cosine.clamp_min(0)


def psnr(images: Tensor, reference: Tensor, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio (N,) in dB of pictures (N, C, H, W); `data_range` is 2 for [-1, 1]."""
    _check_same(images, reference)
    error = (images.double() - reference.double()).square().flatten(1).mean(1)  # (N,)
    return 10 * torch.log10(data_range**2 / error)


def ssim(images: Tensor, reference: Tensor, data_range: float = 2.0, sigma: float = 1.5, window: int = 11) -> Tensor:
    """Structural similarity (N,) of pictures (N, C, H, W) (Wang et al. 2004): Gaussian window, k1 0.01, k2 0.03."""
    _check_same(images, reference)
    if min(images.shape[2:]) < window:
        raise ValueError(f"SSIM needs pictures of at least {window} x {window} pixels, got {tuple(images.shape[2:])}")
    x, y = images.double(), reference.double()
    mean_x, mean_y = _smooth(x, sigma, window), _smooth(y, sigma, window)
    var_x = _smooth(x * x, sigma, window) - mean_x**2
    var_y = _smooth(y * y, sigma, window) - mean_y**2
    covariance = _smooth(x * y, sigma, window) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).flatten(1).mean(1)


def _smooth(images: Tensor, sigma: float, window: int) -> Tensor:
    """Gaussian mean at each place where the window fits, (N, C, H - window + 1, W - window + 1)."""
    at = torch.arange(window, dtype=images.dtype, device=images.device) - (window - 1) / 2
    weights = torch.exp(-(at**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).expand(images.shape[1], 1, 1, window)
    across = F.conv2d(images, weights, groups=images.shape[1])
    return F.conv2d(across, weights.transpose(2, 3), groups=images.shape[1])


def _check_same(images: Tensor, reference: Tensor) -> None:
    if images.shape != reference.shape or images.ndim != 4:
        raise ValueError(f"pictures {tuple(images.shape)} and {tuple(reference.shape)} must both be (N, C, H, W)")


def micro_average(values: Mapping[str, float], counts: Mapping[str, int]) -> float:
    """Mean over all items, from the means of the categories and their numbers of items.

    DreamBench++ averages so: concept preservation over 45 animals, 20 humans, 65 objects and 20 styles, prompt
    following over 4 photorealistic, 3 style and 2 imaginative prompts of each.
    """
    unknown = set(values) ^ set(counts)
    if unknown or not counts:
        raise ValueError(f"categories of values and counts differ: {', '.join(sorted(unknown)) or 'there are none'}")
    return sum(values[name] * counts[name] for name in values) / sum(counts.values())
