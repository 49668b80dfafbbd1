"""CLIP's similarities of generated pictures to training pictures and to texts, as the published evaluation has them.

Any architecture of open_clip; OpenAI's ViT-B/32 is the published one and the default. All similarities are raw cosines.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from evaluation import metrics
from evaluation.clip_eval_weights import find_weights, read_clip_weights, weights_name
from ldm.modules.encoders.image import IMAGE_MEAN, IMAGE_STD
from ldm.util import did_you_mean, freeze

OPENAI_MODELS = ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px")
Tokenizer = Callable[[list[str]], Tensor]


def architecture(clip_model: str) -> str:
    """open_clip's name of a model: OpenAI's names ("ViT-B/32") mean the variants with OpenAI's activation."""
    import open_clip

    name = clip_model.replace("/", "-").replace("@336px", "-336")
    if clip_model in OPENAI_MODELS:
        name += "-quickgelu"
    if name not in open_clip.list_models():
        known = [*OPENAI_MODELS, *open_clip.list_models()]
        raise ValueError(f"there is no CLIP model '{clip_model}'{did_you_mean(clip_model, known)}")
    return name


def build_clip(clip_model: str, weights: str | Path | None = None) -> nn.Module:
    """A frozen CLIP model with the weights of a local file (default: `models/clip/<name>.safetensors`, `.pt`, ...).

    Raises `FileNotFoundError` that names the file when there is none.
    """
    import open_clip

    name = architecture(clip_model)
    file = find_weights("clip", weights_name(clip_model), weights)
    with _without_warnings():  # of open_clip's, that weights are random: they are about to be read
        model = open_clip.create_model(name, load_weights=False)
    try:
        missing = model.load_state_dict(read_clip_weights(file), strict=False)
    except RuntimeError as error:  # sizes
        raise ValueError(f"{file} does not fit {clip_model}: {str(error).splitlines()[-1].strip()}") from error
    lost = [key for key in missing.missing_keys if not key.endswith(("attn_mask", "logit_bias"))]
    if lost or missing.unexpected_keys:
        key = (lost or missing.unexpected_keys)[0]
        raise ValueError(f"{file} does not fit {clip_model}: '{key}' is {'missing' if lost else 'left over'}")
    return freeze(model)


@contextmanager
def _without_warnings() -> Iterator[None]:
    root, before = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)


def build_tokenizer(clip_model: str) -> Tokenizer:
    """open_clip's tokenizer of a model; only those that come with the package, since nothing is downloaded."""
    import open_clip

    name = architecture(clip_model)
    if "hf_tokenizer_name" in open_clip.get_model_config(name)["text_cfg"]:
        raise ValueError(f"the tokenizer of '{clip_model}' is not part of open_clip: pass one as `tokenizer`")
    return open_clip.get_tokenizer(name)


class CLIPEvaluator:
    """CLIP features and similarities.

    device: where the model runs.
    clip_model: OpenAI's name ("ViT-B/32") or open_clip's ("ViT-H-14").
    weights: local file or folder; default `models/clip/ViT-B-32.safetensors` and the like.
    model, tokenizer: use these instead of building them.
    antialias: smooth before shrinking; the published evaluation did not.
    batch_size: pictures or texts encoded at a time.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        clip_model: str = "ViT-B/32",
        weights: str | Path | None = None,
        model: nn.Module | None = None,
        tokenizer: Tokenizer | None = None,
        antialias: bool = False,
        batch_size: int = 64,
    ) -> None:
        self.name = clip_model
        self.device = torch.device(device)
        self.model: Any = (build_clip(clip_model, weights) if model is None else freeze(model)).to(self.device)
        self.tokenizer = tokenizer or build_tokenizer(clip_model)
        self.antialias = antialias
        self.batch_size = batch_size

    def preprocess(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1]: shorter side to the model's size, middle square, CLIP's mean and deviation.

        The resized picture is not clamped, as published.
        """
        size = self.model.visual.image_size
        size = size if isinstance(size, int) else size[0]
        images = (images.to(self.device, torch.float32) + 1) / 2
        images = TF.resize(images, [size], InterpolationMode.BICUBIC, antialias=self.antialias)
        images = TF.center_crop(images, [size, size])
        visual = self.model.visual  # open_clip notes mean and deviation there, where it builds from its own table
        mean, std = getattr(visual, "image_mean", None) or IMAGE_MEAN, getattr(visual, "image_std", None) or IMAGE_STD
        return TF.normalize(images, list(mean), list(std))

    def tokenize(self, strings: Sequence[str]) -> Tensor:
        """Token ids, int64 (B, L)."""
        return self.tokenizer(list(strings)).to(self.device)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Features (B, D) of pictures (B, 3, H, W) in [-1, 1], of any length."""
        if images.ndim != 4 or images.shape[1] != 3 or not len(images):
            raise ValueError(f"expected pictures (B, 3, H, W) in [-1, 1], got shape {tuple(images.shape)}")
        parts = images.split(self.batch_size)
        return torch.cat([self.model.encode_image(self.preprocess(part)).float() for part in parts])

    @torch.no_grad()
    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Features (B, D) of token ids (B, L), of any length."""
        return torch.cat([self.model.encode_text(part).float() for part in tokens.split(self.batch_size)])

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D) of pictures (B, 3, H, W) in [-1, 1]."""
        return self.get_image_features(images)

    def encode_text(self, texts: Sequence[str] | str) -> Tensor:
        """Unit vectors (B, D) of texts."""
        return self.get_text_features(texts)

    def get_image_features(self, img: Tensor, norm: bool = True) -> Tensor:
        """Features (B, D) of pictures (B, 3, H, W) in [-1, 1], of length 1 unless `norm` is False."""
        features = self.encode_images(img)
        return metrics.unit(features) if norm else features

    def get_text_features(self, text: str | Sequence[str], norm: bool = True) -> Tensor:
        """Features (B, D) of texts, of length 1 unless `norm` is False."""
        features = self.encode_tokens(self.tokenize([text] if isinstance(text, str) else text))
        return metrics.unit(features) if norm else features

    def img_to_img_similarity(self, src_images: Tensor, generated_images: Tensor) -> Tensor:
        """Mean cosine over all pairs of a source and a generated picture; 0-d."""
        return metrics.image_similarity(self.encode_images(generated_images), self.encode_images(src_images))

    def txt_to_img_similarity(self, text: str, generated_images: Tensor) -> Tensor:
        """Mean cosine of the pictures with the text, the released code's measure; 0-d."""
        return metrics.mean_text_similarity(self.encode_images(generated_images), self.get_text_features(text))


class LDMCLIPEvaluator(CLIPEvaluator):
    """Draws pictures of a prompt with a model, then scores them."""

    @torch.no_grad()
    def sample(
        self, ldm_model: Any, text: str, n_samples: int = 64, n_steps: int = 50, scale: float = 5.0, seed: int = 0
    ) -> Tensor:
        """Pictures (n_samples, 3, H, W) in [-1, 1] by DDIM without noise; picture k is drawn with `seed + k`."""
        from ldm.generate import SamplingOptions, iter_images

        options = SamplingOptions(steps=n_steps, scale=scale)
        batches = iter_images(ldm_model, [text] * n_samples, seeds=seed, options=options, batch_size=8)
        return torch.cat([batch.clamp(-1, 1).cpu() for batch in batches])

    @torch.no_grad()
    def evaluate(
        self,
        ldm_model: Any,
        src_images: Tensor,
        target_text: str,
        n_samples: int = 64,
        n_steps: int = 50,
        scale: float = 5.0,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Image and text similarity (0-d each) of pictures of `target_text`; the placeholder is left out of the text.

        src_images: training pictures (M, 3, H, W) in [-1, 1].
        """
        samples = self.sample(ldm_model, target_text, n_samples, n_steps, scale, seed)
        text = without_words(target_text, getattr(ldm_model.embedding_manager, "placeholders", ()) or ["*"])
        features = self.encode_images(samples)
        to_images = metrics.image_similarity(features, self.encode_images(src_images))
        return to_images, metrics.mean_text_similarity(features, self.get_text_features(text))


class ImageDirEvaluator(CLIPEvaluator):
    """Scores pictures that are there already."""

    def evaluate(self, gen_samples: Tensor, src_images: Tensor, target_text: str) -> tuple[Tensor, Tensor]:
        """Image and text similarity (0-d each) of pictures (N, 3, H, W) in [-1, 1]; `*` is left out of the text."""
        features = self.encode_images(gen_samples)
        to_images = metrics.image_similarity(features, self.encode_images(src_images))
        text = self.get_text_features(without_words(target_text, ["*"]))
        return to_images, metrics.mean_text_similarity(features, text)


def without_words(text: str, words: Sequence[str]) -> str:
    """`text` without the placeholders `words`: "a photo of * on the moon" becomes "a photo of on the moon"."""
    from ldm.modules.encoders.text import split_at_placeholders

    pieces = [piece.text for piece in split_at_placeholders(text, list(words)) if piece.placeholder is None]
    return " ".join(" ".join(pieces).split())
