"""Stable Diffusion 2.x's text conditioner: the text half of OpenCLIP ViT-H/14."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.encoders.clip_tokenizer import CLIPTokenizer
from ldm.modules.encoders.text import TextConditioner
from ldm.util import did_you_mean
from ldm.util import freeze as freeze_module  # the constructor has a published parameter `freeze`

# Transformer blocks to leave out at the end, by the published name of the layer that conditions the diffusion model.
LAYERS = {"last": 0, "penultimate": 1}
TEXT_KEYS = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "embed_dim", "quick_gelu")


def _text_sizes(arch: str, text_config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of `arch` from open_clip's table, with those in `text_config` replaced."""
    import open_clip

    config = open_clip.get_model_config(arch)
    if config is None or "hf_model_name" in config["text_cfg"]:
        known = [name for name in open_clip.list_models() if name.startswith("ViT")]
        raise ValueError(f"open_clip has no text transformer for arch {arch!r}{did_you_mean(arch, known)}")
    for key in text_config:
        if key not in TEXT_KEYS:
            raise ValueError(f"{key!r} is not a key of text_config; keys: {', '.join(TEXT_KEYS)}")
    sizes = {"embed_dim": config["embed_dim"], "quick_gelu": config.get("quick_gelu", False), **config["text_cfg"]}
    return {key: value for key, value in {**sizes, **text_config}.items() if key in TEXT_KEYS}


class FrozenOpenCLIPEmbedder(TextConditioner):
    """OpenCLIP text transformer of Stable Diffusion 2.x; gives all token states after the final norm.

    Its weights are random until a checkpoint is loaded: every Stable Diffusion checkpoint holds them, and nothing is
    downloaded.

    arch: open_clip's name of the architecture.
    version: published name of the weights; kept for old configs, since the weights come from the checkpoint.
    device: accepted for old configs and ignored; the module runs where its weights are.
    max_length: tokens per text, start and end token included.
    freeze: stop gradients to the weights.
    layer: "last" runs all blocks, "penultimate" leaves out the last one (as SD 2.x does).
    text_config: sizes that differ from `arch`: context_length, vocab_size, width, heads, layers, mlp_ratio, embed_dim,
        quick_gelu.
    """

    def __init__(
        self,
        arch: str = "ViT-H-14",
        version: str = "laion2b_s32b_b79k",
        device: str | None = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        text_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        from open_clip.transformer import QuickGELU, TextTransformer

        del version, device
        if layer not in LAYERS:
            raise ValueError(f"layer {layer!r} is unknown; known: {', '.join(LAYERS)}")
        sizes = _text_sizes(arch, text_config or {})
        quick, width = sizes.pop("quick_gelu"), sizes.pop("embed_dim")
        if not 2 <= max_length <= sizes.get("context_length", 77):
            raise ValueError(f"max_length {max_length} is not within 2 ... {sizes.get('context_length', 77)}")
        self.max_length = max_length
        self.layer = layer
        self.model = TextTransformer(**sizes, output_dim=width, act_layer=QuickGELU if quick else nn.GELU)
        # Built in `transform`: a buffer outside the state dict would stay empty when built on the meta device.
        self.model.attn_mask = None
        self.clip_skip = 1
        # Part of published checkpoints, unused here.
        self.model.logit_scale = nn.Parameter(torch.ones([]))
        if freeze:
            freeze_module(self)

    @property
    def _layers(self) -> int:
        """Blocks up to the one that `layer` names."""
        return len(self.model.transformer.resblocks) - LAYERS[self.layer]

    @property
    def clip_skip(self) -> int:
        """1 for the state that `layer` names, 2 for the one before it, and so on."""
        return self._clip_skip

    @clip_skip.setter
    def clip_skip(self, value: int) -> None:
        if not 1 <= value <= self._layers:
            raise ValueError(f"clip_skip {value} is not within 1 ... {self._layers}")
        self._clip_skip = value

    def _build_tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer(0, "ftfy+html", special_tokens=("<start_of_text>", "<end_of_text>"))

    def token_table(self) -> nn.Embedding:
        """The vocabulary's embedding layer."""
        return self.model.token_embedding

    def transform(self, embedded: Tensor, token_ids: Tensor) -> Tensor:
        """Conditioning (B, L, D) of token embeddings (B, L, D)."""
        del token_ids
        length = embedded.shape[1]
        x = embedded + self.model.positional_embedding[:length].to(embedded.dtype)
        mask = torch.full((length, length), float("-inf"), device=x.device, dtype=x.dtype).triu(1)  # (L, L)
        for block in self.model.transformer.resblocks[: self._layers + 1 - self.clip_skip]:
            x = block(x, attn_mask=mask)
        return self.model.ln_final(x)  # (B, L, D)
