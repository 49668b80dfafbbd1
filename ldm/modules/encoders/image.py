"""CLIP's joint image-text space as conditioning: one vector for an image or a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.encoders.clip_tokenizer import CLIPTokenizer
from ldm.modules.encoders.text import frame, text_to_ids
from ldm.util import did_you_mean, freeze

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def build_openai_clip(name: str, weights: str | Path | None = None) -> nn.Module:
    """OpenAI's CLIP "ViT-B/32", "ViT-L/14", ... as open_clip builds it, frozen.

    weights: local state dict (`.safetensors`, `.pt`) in OpenAI's names. Without it the weights are random until a
    checkpoint is loaded; nothing is downloaded.
    """
    import open_clip

    arch = name.replace("/", "-").replace("@336px", "-336") + "-quickgelu"
    known = open_clip.list_models()
    if arch not in known:
        raise ValueError(f"there is no OpenAI CLIP model {name!r}{did_you_mean(arch, known)}")
    model = open_clip.CLIP(**open_clip.get_model_config(arch))
    if weights is not None:
        if not Path(weights).is_file():
            raise FileNotFoundError(f"no CLIP weights at {weights}: give a local .safetensors or .pt state dict")
        open_clip.load_checkpoint(model, str(weights), weights_only=True)
    return freeze(model)


class FrozenCLIPTextEmbedder(nn.Module):
    """A text as CLIP's joint-space vector, repeated `n_repeat` times along the sequence.

    version: OpenAI's model name.
    normalize: scale the vector to length 1.
    weights: local state dict; see `build_openai_clip`.
    device: accepted for old configs and ignored; the module runs where its weights are.
    """

    def __init__(
        self,
        version: str = "ViT-L/14",
        device: str | None = None,
        max_length: int = 77,
        n_repeat: int = 1,
        normalize: bool = True,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        del device
        self.model: Any = build_openai_clip(version, weights)
        self.max_length = max_length
        self.n_repeat = n_repeat
        self.normalize = normalize
        self._tokenizer: CLIPTokenizer | None = None

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids, int64 (B, max_length)."""
        if self._tokenizer is None:
            self._tokenizer = CLIPTokenizer(0, "ftfy+html")
        rows = [frame(self._tokenizer, text_to_ids(self._tokenizer, text), self.max_length) for text in texts]
        return torch.tensor(rows, dtype=torch.long)

    def forward(self, texts: str | Sequence[str]) -> Tensor:
        """Vectors (B, D) of texts."""
        ids = self.tokenize([texts] if isinstance(texts, str) else texts).to(self.model.token_embedding.weight.device)
        return self.model.encode_text(ids, normalize=self.normalize)  # (B, D)

    def encode(self, texts: str | Sequence[str]) -> Tensor:
        """Conditioning (B, n_repeat, D) of texts."""
        return self(texts)[:, None].repeat(1, self.n_repeat, 1)  # (B, n_repeat, D)


class FrozenClipImageEmbedder(nn.Module):
    """An image as CLIP's joint-space vector.

    model: OpenAI's model name.
    antialias: smooth before shrinking the image.
    weights: local state dict; see `build_openai_clip`.
    jit, device: accepted for old configs and ignored.
    """

    def __init__(
        self,
        model: str = "ViT-B/32",
        jit: bool = False,
        device: str | None = None,
        antialias: bool = False,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        del jit, device
        self.model: Any = build_openai_clip(model, weights)
        self.antialias = antialias

    def preprocess(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] at the model's size, normalised by CLIP's mean and deviation."""
        import kornia

        size = self.model.visual.image_size
        x = kornia.geometry.resize(x, size, interpolation="bicubic", align_corners=True, antialias=self.antialias)
        mean, std = (torch.tensor(v, device=x.device, dtype=x.dtype)[:, None, None] for v in (IMAGE_MEAN, IMAGE_STD))
        return ((x + 1) / 2 - mean) / std

    def forward(self, x: Tensor) -> Tensor:
        """Vectors (B, D) of images (B, 3, H, W) in [-1, 1]."""
        return self.model.encode_image(self.preprocess(x))
