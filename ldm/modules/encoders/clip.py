"""Stable Diffusion 1.x's text conditioner: the text half of OpenAI's CLIP ViT-L/14.

The modules carry Hugging Face's names (`text_model.encoder.layers.0.self_attn.q_proj`), as the checkpoints do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.encoders.clip_tokenizer import CLEANINGS, END_TOKEN_ID, CLIPTokenizer
from ldm.modules.encoders.text import TextConditioner
from ldm.util import check_params, freeze

INIT_STD = 0.02


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of a CLIP text transformer under Hugging Face's names; the defaults are ViT-L/14."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


# What published configs may ask for by name.
VERSIONS: dict[str, CLIPTextConfig] = {
    "openai/clip-vit-large-patch14": CLIPTextConfig(),
    "openai/clip-vit-large-patch14-336": CLIPTextConfig(),
    "openai/clip-vit-base-patch16": CLIPTextConfig(512, 2048, num_attention_heads=8),
    "openai/clip-vit-base-patch32": CLIPTextConfig(512, 2048, num_attention_heads=8),
}


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class CLIPAttention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"hidden_size {dim} does not divide into {heads} attention heads")
        self.heads = heads
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.q_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over `x` (B, L, D), each position to itself and those before."""
        q, k, v = (
            to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, L, d)
        return self.out_proj(out.transpose(1, 2).flatten(2))  # (B, L, D)


class CLIPMLP(nn.Module):
    """Two linear layers with the configured activation between them."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token of `x` (B, L, D)."""
        return self.fc2(self.activation(self.fc1(x)))


class CLIPLayer(nn.Module):
    """Pre-norm attention and feed-forward, both residual."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.self_attn = CLIPAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Transform `x` (B, L, D)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPTextEmbeddings(nn.Module):
    """Tables of token and position vectors.

    `position_ids` is never read: it is in the state dict because SD 1.x checkpoints carry it, and a checkpoint
    without it loads as well.
    """

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        nn.init.normal_(self.token_embedding.weight, std=INIT_STD)
        nn.init.normal_(self.position_embedding.weight, std=INIT_STD)
        self.position_ids: Tensor
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings)[None])

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token plus position vectors (B, L, D) of ids (B, L)."""
        return self.add_positions(self.token_embedding(input_ids))

    def add_positions(self, embedded: Tensor) -> Tensor:
        """Token vectors (B, L, D) with their positions added."""
        length, room = embedded.shape[1], self.position_embedding.num_embeddings
        if length > room:
            raise ValueError(f"{length} tokens do not fit the text model's {room} positions")
        return embedded + self.position_embedding.weight[:length].to(embedded.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        positions = torch.arange(self.position_embedding.num_embeddings)[None]
        state_dict[prefix + "position_ids"] = positions  # newer files lack it, and its value is always this one
        super()._load_from_state_dict(state_dict, prefix, *args)


class CLIPEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CLIPLayer(config) for _ in range(config.num_hidden_layers))


class CLIPTextTransformer(nn.Module):
    """Embeddings, causal encoder and final norm."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def transform(self, embedded: Tensor, clip_skip: int = 1) -> Tensor:
        """Normed hidden states (B, L, D) of token vectors (B, L, D); the last `clip_skip` - 1 layers are left out."""
        x = self.embeddings.add_positions(embedded)
        for layer in self.encoder.layers[: len(self.encoder.layers) + 1 - clip_skip]:
            x = layer(x)
        return self.final_layer_norm(x)


class CLIPTextModel(nn.Module):
    """The text transformer under its published name `text_model`."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.text_model = CLIPTextTransformer(config)

    def forward(self, input_ids: Tensor, embedding_manager: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """Last hidden state after the final norm (B, L, D) of ids (B, L)."""
        embedded = self.text_model.embeddings.token_embedding(input_ids)  # (B, L, D)
        if embedding_manager is not None:
            embedded = embedding_manager(input_ids, embedded)
        return self.text_model.transform(embedded)


class FrozenCLIPEmbedder(TextConditioner):
    """Frozen CLIP text transformer of Stable Diffusion 1.x; gives the last hidden state after the final norm.

    Its weights are random until a checkpoint is loaded: every Stable Diffusion checkpoint holds them, and nothing is
    downloaded.

    version: the model whose sizes to use.
    device: accepted for old configs and ignored; the module runs where its weights are.
    max_length: tokens per text, start and end token included.
    text_config: sizes that differ from `version`, keys as in `CLIPTextConfig`.
    clip_skip: 1 uses all layers, 2 leaves out the last one, and so on.
    cleaning: how texts are cleaned, see `CLIPTokenizer`.
    """

    def __init__(
        self,
        version: str = "openai/clip-vit-large-patch14",
        device: str | None = None,
        max_length: int = 77,
        text_config: Mapping[str, Any] | None = None,
        clip_skip: int = 1,
        cleaning: str = "ftfy",
    ) -> None:
        super().__init__()
        del device
        if cleaning not in CLEANINGS:
            raise ValueError(f"text cleaning {cleaning!r} is unknown; known: {', '.join(CLEANINGS)}")
        if version not in VERSIONS:
            raise ValueError(f"CLIP version {version!r} is unknown; known: {', '.join(VERSIONS)}")
        check_params("CLIP text_config", CLIPTextConfig, text_config or {})
        config = dataclasses.replace(VERSIONS[version], **(text_config or {}))
        if config.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {config.hidden_act!r} is unknown; known: {', '.join(ACTIVATIONS)}")
        if not 2 <= max_length <= config.max_position_embeddings:
            raise ValueError(f"max_length {max_length} is not within 2 ... {config.max_position_embeddings}")
        self.max_length = max_length
        self._cleaning = cleaning
        self.transformer = CLIPTextModel(config)
        self.clip_skip = clip_skip
        freeze(self)

    @property
    def clip_skip(self) -> int:
        """1 when all layers are used, 2 without the last one, and so on."""
        return self._clip_skip

    @clip_skip.setter
    def clip_skip(self, value: int) -> None:
        layers = len(self.transformer.text_model.encoder.layers)
        if not 1 <= value <= layers:
            raise ValueError(f"clip_skip {value} is not within 1 ... {layers}")
        self._clip_skip = value

    def _build_tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer(END_TOKEN_ID, self._cleaning)

    def token_table(self) -> nn.Embedding:
        """The vocabulary's embedding layer."""
        return self.transformer.text_model.embeddings.token_embedding

    def transform(self, embedded: Tensor, token_ids: Tensor) -> Tensor:
        """Conditioning (B, L, D) of token embeddings (B, L, D)."""
        del token_ids
        return self.transformer.text_model.transform(embedded, self.clip_skip)

    def embed_at_start(self, token_ids: Tensor) -> Tensor:
        """Vocabulary rows (..., D) plus the first position's vector, where published inversions started from."""
        return self.embed(token_ids) + self.transformer.text_model.embeddings.position_embedding.weight[0]
