"""A pretrained BERT as frozen text conditioner; the default sizes are all-MiniLM-L6-v2's.

The modules carry Hugging Face's names (`encoder.layer.0.attention.self.query`), so that published weights load as
they are.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.encoders.bert import WordPieceTokenizer
from ldm.modules.encoders.text import TextConditioner
from ldm.util import freeze

INIT_STD = 0.02
# Parts of published files that a token-wise conditioner has no use for.
UNUSED_KEYS = ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids")


@dataclasses.dataclass(frozen=True)
class _Sizes:
    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocab: int
    positions: int
    eps: float


class BertEmbeddings(nn.Module):
    """Word, position and segment vectors, summed and normed."""

    def __init__(self, sizes: _Sizes) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(sizes.vocab, sizes.hidden)
        self.position_embeddings = nn.Embedding(sizes.positions, sizes.hidden)
        self.token_type_embeddings = nn.Embedding(2, sizes.hidden)
        self.LayerNorm = nn.LayerNorm(sizes.hidden, eps=sizes.eps)
        for table in (self.word_embeddings, self.position_embeddings, self.token_type_embeddings):
            nn.init.normal_(table.weight, std=INIT_STD)

    def forward(self, embedded: Tensor) -> Tensor:
        """Normed sum (B, L, D) for word vectors (B, L, D) of one segment."""
        positions = self.position_embeddings.weight[: embedded.shape[1]]  # (L, D)
        return self.LayerNorm(embedded + positions + self.token_type_embeddings.weight[0])


class BertSelfAttention(nn.Module):
    """Multi-head self-attention over the tokens that are no padding."""

    def __init__(self, sizes: _Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.query = nn.Linear(sizes.hidden, sizes.hidden)
        self.key = nn.Linear(sizes.hidden, sizes.hidden)
        self.value = nn.Linear(sizes.hidden, sizes.hidden)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        """Attend over `x` (B, L, D); `keep` (B, L) is True where a token counts as key."""
        q, k, v = (to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.query, self.key, self.value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :])  # (B, heads, L, d)
        return out.transpose(1, 2).flatten(2)  # (B, L, D)


class BertOutput(nn.Module):
    """Linear layer, added to the residual and normed."""

    def __init__(self, inner: int, sizes: _Sizes) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, sizes.hidden)
        self.LayerNorm = nn.LayerNorm(sizes.hidden, eps=sizes.eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Normed sum (B, L, D) of the mapped `x` (B, L, inner) and `residual` (B, L, D)."""
        return self.LayerNorm(self.dense(x) + residual)


class BertLayer(nn.Module):
    """Post-norm attention and feed-forward."""

    def __init__(self, sizes: _Sizes) -> None:
        super().__init__()
        parts = {"self": BertSelfAttention(sizes), "output": BertOutput(sizes.hidden, sizes)}
        self.attention = nn.ModuleDict(parts)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(sizes.hidden, sizes.intermediate)})
        self.output = BertOutput(sizes.intermediate, sizes)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        """Transform `x` (B, L, D)."""
        x = self.attention["output"](self.attention["self"](x, keep), x)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class BertEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, sizes: _Sizes) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(sizes) for _ in range(sizes.layers))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        """Transform `x` (B, L, D)."""
        for layer in self.layer:
            x = layer(x, keep)
        return x


class FrozenBertEmbedder(TextConditioner):
    """Frozen BERT encoder; gives the last hidden state of every token.

    Its weights are random until a checkpoint is loaded. Padding is never attended to.

    hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, vocab_size, max_position_embeddings,
    layer_norm_eps: sizes under Hugging Face's names.
    max_length: tokens per text, [CLS] and [SEP] included.
    zero_padding: give zeros at padding positions instead of their hidden states.
    ckpt_path: weights to start from, such as a sentence encoder's `model.safetensors`; a model's own checkpoint, read
      later, wins over it.
    vocab_file: other word-piece vocabulary (default: bert-base-uncased, packaged).
    """

    def __init__(
        self,
        hidden_size: int = 384,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 12,
        intermediate_size: int = 1536,
        vocab_size: int = 30522,
        max_position_embeddings: int = 512,
        layer_norm_eps: float = 1e-12,
        max_length: int = 77,
        zero_padding: bool = False,
        ckpt_path: str | Path | None = None,
        vocab_file: str | Path | None = None,
    ) -> None:
        super().__init__()
        if hidden_size % num_attention_heads:
            raise ValueError(f"hidden_size {hidden_size} does not divide into {num_attention_heads} attention heads")
        if not 2 <= max_length <= max_position_embeddings:
            raise ValueError(f"max_length {max_length} is not within 2 ... {max_position_embeddings}")
        sizes = _Sizes(
            hidden_size,
            num_hidden_layers,
            num_attention_heads,
            intermediate_size,
            vocab_size,
            max_position_embeddings,
            layer_norm_eps,
        )
        self.max_length = max_length
        self.zero_padding = zero_padding
        self._vocab_file = vocab_file
        self.embeddings = BertEmbeddings(sizes)
        self.encoder = BertEncoder(sizes)
        if ckpt_path is not None:
            from ldm.checkpoint import load_weights

            load_weights(self, ckpt_path)
        freeze(self)

    def _build_tokenizer(self) -> WordPieceTokenizer:
        return WordPieceTokenizer(self._vocab_file)

    def token_table(self) -> nn.Embedding:
        """The vocabulary's embedding layer."""
        return self.embeddings.word_embeddings

    def transform(self, embedded: Tensor, token_ids: Tensor) -> Tensor:
        """Conditioning (B, L, D) of word vectors (B, L, D); `token_ids` (B, L) says where padding is."""
        keep = token_ids != self.tokenizer.pad_token_id  # (B, L)
        if not self.zero_padding:
            return self.encoder(self.embeddings(embedded), keep)
        # Nothing attends to padding and none of it is returned, so it is not computed: captions are mostly short.
        length = int(keep.sum(1).max())
        keep = keep[:, :length]
        x = self.encoder(self.embeddings(embedded[:, :length]), keep)  # (B, longest text, D)
        return F.pad(x * keep.unsqueeze(-1).to(x.dtype), (0, 0, 0, token_ids.shape[1] - length))  # (B, L, D)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in UNUSED_KEYS:
            state_dict.pop(prefix + key, None)
        super()._load_from_state_dict(state_dict, prefix, *args)
