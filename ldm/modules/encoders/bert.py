"""Latent diffusion's text conditioner: BERT word pieces into a transformer trained with the diffusion model."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.encoders.text import TextConditioner, frame, text_to_ids
from ldm.modules.x_transformer import TransformerWrapper

VOCAB_FILE = Path(__file__).parent / "data" / "bert-base-uncased-vocab.txt"
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class WordPieceTokenizer:
    """bert-base-uncased word pieces: lower case, accents stripped, CJK characters and punctuation on their own."""

    def __init__(self, vocab_file: str | Path | None = None) -> None:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

        path = Path(vocab_file) if vocab_file is not None else VOCAB_FILE
        if not path.is_file():
            raise FileNotFoundError(f"no BERT vocabulary at {path}: give a text file with one word piece per line")
        vocab = models.WordPiece.read_file(str(path))
        missing = [token for token in SPECIAL_TOKENS[:4] if token not in vocab]
        if missing:
            raise ValueError(f"{path} is no BERT vocabulary: it lacks {', '.join(missing)}")
        self._tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
        self._tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._tokenizer.add_special_tokens([token for token in SPECIAL_TOKENS if token in vocab])
        self._words = {token_id: word for word, token_id in vocab.items()}
        self.vocab_size = len(vocab)
        self.pad_token_id, self.unk_token_id, self.start_token_id, self.end_token_id = (
            vocab[token] for token in SPECIAL_TOKENS[:4]
        )

    def clean(self, text: str) -> str:
        """`text` with composed accents, so that equal-looking placeholders match."""
        return unicodedata.normalize("NFC", text)

    def encode(self, text: str) -> list[int]:
        """Word-piece ids of `text`, without [CLS] and [SEP]."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Words of ids, continuation pieces joined; special tokens in their brackets."""
        pieces = [self._words.get(token_id, "[UNK]") for token_id in token_ids]
        if len(pieces) == 1:
            return pieces[0]
        return " ".join(pieces).replace(" ##", "")


class BERTTokenizer(nn.Module):
    """Texts to bert-base-uncased ids (B, max_length): [CLS] ... [SEP] and zero padding.

    vocab_file: other vocabulary, one word piece per line (default: the packaged one).
    vq_interface: `encode` answers as a vector-quantised first stage would, `(None, None, (None, None, ids))`.
    device: accepted for old configs and ignored; move the ids to where the model is.
    """

    def __init__(
        self,
        device: str | None = None,
        vq_interface: bool = True,
        max_length: int = 77,
        vocab_file: str | Path | None = None,
    ) -> None:
        super().__init__()
        del device
        self.tokenizer = WordPieceTokenizer(vocab_file)
        self.vq_interface = vq_interface
        self.max_length = max_length

    def forward(self, texts: str | Sequence[str]) -> Tensor:
        """Token ids, int64 (B, max_length)."""
        texts = [texts] if isinstance(texts, str) else texts
        rows = [frame(self.tokenizer, text_to_ids(self.tokenizer, text), self.max_length) for text in texts]
        return torch.tensor(rows, dtype=torch.long).reshape(len(rows), self.max_length)

    def encode(self, texts: str | Sequence[str]) -> Any:
        """Token ids, in the form that `vq_interface` asks for."""
        ids = self(texts)
        return (None, None, (None, None, ids)) if self.vq_interface else ids

    def decode(self, texts: Any) -> Any:
        """The texts as they are: there is nothing to reconstruct."""
        return texts


class BERTEmbedder(TextConditioner):
    """Transformer over BERT word pieces, trained with the diffusion model; attends to padding as published.

    n_embed, n_layer: width and depth.
    use_tokenizer: False takes token ids (B, L) instead of texts.
    vocab_file: other word-piece vocabulary (default: bert-base-uncased, packaged).
    device: accepted for old configs and ignored; the module runs where its weights are.
    """

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int = 30522,
        max_seq_len: int = 77,
        device: str | None = None,
        use_tokenizer: bool = True,
        embedding_dropout: float = 0.0,
        vocab_file: str | Path | None = None,
    ) -> None:
        super().__init__()
        del device
        self.use_tokenizer = use_tokenizer
        self.max_length = max_seq_len
        self._vocab_file = vocab_file
        self.transformer = TransformerWrapper(vocab_size, max_seq_len, n_embed, n_layer, embedding_dropout)

    def _build_tokenizer(self) -> WordPieceTokenizer:
        if not self.use_tokenizer:
            raise ValueError("this BERTEmbedder takes token ids (use_tokenizer is false), not text")
        return WordPieceTokenizer(self._vocab_file)

    @property
    def end_token_id(self) -> int | None:
        """Id of [SEP]; None where token ids come from elsewhere."""
        return self.tokenizer.end_token_id if self.use_tokenizer else None

    def token_table(self) -> nn.Embedding:
        """The vocabulary's embedding layer."""
        return self.transformer.token_emb

    def transform(self, embedded: Tensor, token_ids: Tensor) -> Tensor:
        """Conditioning (B, L, D) of token embeddings (B, L, D)."""
        del token_ids
        return self.transformer.transform(embedded)


class TransformerEmbedder(nn.Module):
    """Transformer over token ids that some other model made; ids (B, L) in, embeddings (B, L, D) out."""

    def __init__(
        self, n_embed: int, n_layer: int, vocab_size: int, max_seq_len: int = 77, device: str | None = None
    ) -> None:
        super().__init__()
        del device  # accepted for old configs: the module runs where its weights are
        self.transformer = TransformerWrapper(vocab_size, max_seq_len, n_embed, n_layer)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, L, D) of token ids (B, L)."""
        return self.transformer(tokens.to(self.transformer.token_emb.weight.device), return_embeddings=True)

    def encode(self, x: Tensor) -> Tensor:
        """Same as `forward`."""
        return self(x)
