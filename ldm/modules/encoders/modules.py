"""The conditioners under the import path that published configs name."""

from ldm.modules.encoders.bert import BERTEmbedder, BERTTokenizer, TransformerEmbedder
from ldm.modules.encoders.clip import FrozenCLIPEmbedder
from ldm.modules.encoders.image import FrozenClipImageEmbedder, FrozenCLIPTextEmbedder
from ldm.modules.encoders.label import ClassEmbedder
from ldm.modules.encoders.minilm import FrozenBertEmbedder
from ldm.modules.encoders.openclip import FrozenOpenCLIPEmbedder
from ldm.modules.encoders.spatial import SpatialRescaler

__all__ = [
    "BERTEmbedder",
    "BERTTokenizer",
    "ClassEmbedder",
    "FrozenBertEmbedder",
    "FrozenCLIPEmbedder",
    "FrozenCLIPTextEmbedder",
    "FrozenClipImageEmbedder",
    "FrozenOpenCLIPEmbedder",
    "SpatialRescaler",
    "TransformerEmbedder",
]
