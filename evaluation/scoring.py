"""From pictures to scores: one judge's view of one prompt's pictures."""

from __future__ import annotations

from torch import Tensor

from evaluation import metrics
from evaluation.judges import Judge

# Metrics that `score` returns, with what they say. Values are raw cosines unless stated.
METRICS: dict[str, str] = {
    "image": "mean cosine over all pairs of a generated and a training picture",
    "text": "cosine of the mean picture vector with the prompt without the word, as in the paper",
    "text_mean": "mean of the pictures' cosines with that prompt, as in the released code",
    "diversity": "mean cosine distance between two pictures of a prompt",
    "nearest": "mean over the pictures of the cosine with the nearest training picture",
    "nearest_max": "largest cosine of any picture with any training picture: 1 is a copy",
    "image_distinct": "mean cosine over all pairs of two different training pictures",
    "second_image": "mean cosine over all pairs with a picture of the second concept",
}


def score(judge: Judge, generated: Tensor, training: Tensor, text: str | None = None) -> dict[str, float]:
    """Scores of pictures (N, 3, H, W) against training pictures (M, 3, h, w), all in [-1, 1], and a text.

    `text`: the prompt without the learned word; None leaves the text metrics out, for judges that know no texts.
    """
    made = judge.encode_image(generated)
    return score_features(made, judge.encode_image(training), None if text is None else judge.encode_text([text]))


def score_features(generated: Tensor, training: Tensor, text: Tensor | None = None) -> dict[str, float]:
    """Scores of feature vectors: generated (N, D), training (M, D), and text (1, D) or None."""
    nearest = metrics.nearest_similarity(generated, training)
    values = {
        "image": metrics.image_similarity(generated, training),
        "diversity": metrics.diversity(generated),
        "nearest": nearest.mean(),
        "nearest_max": nearest.max(),
    }
    if text is not None:
        values["text"] = metrics.text_similarity(generated, text)
        values["text_mean"] = metrics.mean_text_similarity(generated, text)
    return {name: value.item() for name, value in values.items()}


def score_set(features: Tensor) -> dict[str, float]:
    """Scores of pictures (N, D) among themselves, none of them compared with itself."""
    nearest = metrics.nearest_other_similarity(features)
    values = {
        "image_distinct": metrics.self_similarity(features),
        "nearest": nearest.mean(),
        "nearest_max": nearest.max(),
    }
    return {name: value.item() for name, value in values.items()}
