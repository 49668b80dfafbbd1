"""The conditioners under the import path that published configs name."""

from ldm.modules.encoders.bert import BERTEmbedder, BERTTokenizer, TransformerEmbedder

__all__ = ["BERTEmbedder", "BERTTokenizer", "TransformerEmbedder"]
