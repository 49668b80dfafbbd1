"""Small encoders with random weights for tests of the evaluation."""

from __future__ import annotations

import open_clip
import torch

from evaluation.clip_eval import CLIPEvaluator

VISION = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


def tiny_clip(seed: int = 0) -> open_clip.CLIP:
    """A CLIP model with OpenAI's structure in small."""
    torch.manual_seed(seed)
    return open_clip.CLIP(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT, quick_gelu=True).eval()


def tiny_evaluator(kind: type[CLIPEvaluator] = CLIPEvaluator) -> CLIPEvaluator:
    """An evaluator with that model and CLIP's tokenizer."""
    return kind(model=tiny_clip())
