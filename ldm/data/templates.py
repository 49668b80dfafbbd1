"""Caption templates: data only. `{}` stands for the placeholder, a second `{}` for the word of the single picture.

The lists under the published names keep their length, order and duplicates, since all three decide what a seeded
random choice gives.
"""

from __future__ import annotations

# The neutral context texts of the paper's Appendix D (there with a full stop at the end).
imagenet_templates_paper: list[str] = [
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
]

# As released: the 27 three times, the plain "a photo of" reworded. The 12 other sentences repeat and so weigh three
# times as much in the random choice.
imagenet_templates_small: list[str] = [
    f"{wording}{sentence.removeprefix('a photo of')}" if sentence.startswith("a photo of") else sentence
    for wording in ("a photo of", "an illustration of", "a depiction of")
    for sentence in imagenet_templates_paper
]

imagenet_templates_smallest: list[str] = ["a photo of a {}"]

imagenet_dual_templates_small: list[str] = [f"{sentence} with {{}}" for sentence in imagenet_templates_paper]

style_templates_small: list[str] = [
    f"{work} in the style of {{}}"
    for work in (
        "a painting",
        "a rendering",
        "a cropped painting",
        "the painting",
        "a clean painting",
        "a dirty painting",
        "a dark painting",
        "a picture",
        "a cool painting",
        "a close-up painting",
        "a bright painting",
        "a cropped painting",
        "a good painting",
        "a close-up painting",
        "a rendition",
        "a nice painting",
        "a small painting",
        "a weird painting",
        "a large painting",
    )
]

style_dual_templates_small: list[str] = [
    "a painting in the style of {} with {}",
    "a rendering in the style of {} with {}",
    "a cropped painting in the style of {} with {}",
    "the painting in the style of {} with {}",
    "a clean painting in the style of {} with {}",
    "a dirty painting in the style of {} with {}",
    "a dark painting in the style of {} with {}",
    "a cool painting in the style of {} with {}",
    "a close-up painting in the style of {} with {}",
    "a bright painting in the style of {} with {}",
    "a cropped painting in the style of {} with {}",
    "a good painting in the style of {} with {}",
    "a painting of one {} in the style of {}",
    "a nice painting in the style of {} with {}",
    "a small painting in the style of {} with {}",
    "a weird painting in the style of {} with {}",
    "a large painting in the style of {} with {}",
]

# In the words of the embedded model's captions (`ldm.data.emoji`), to which "cropped", "weird" or "the" are unknown.
emoji_templates: list[str] = [
    "a photo of {}",
    "a photo of a {}",
    "a picture of {}",
    "a picture of a {}",
    "an image of a {}",
    "a drawing of {}",
    "{}",
    "a {}",
]
emoji_style_templates: list[str] = [
    f"{work} in the style of {{}}" for work in ("a picture", "an image", "a photo", "something", "an object")
]

# One word for each single picture: the Hebrew letters, each one token of the BERT vocabulary.
per_img_token_list: list[str] = list("אבגדהוזחטיכלמנסעפצקרשת")

# Name -> (templates, templates with a second word). The names that a config's `templates:` may give.
TEMPLATE_SETS: dict[str, tuple[list[str], list[str]]] = {
    "object": (imagenet_templates_small, imagenet_dual_templates_small),
    "paper": (imagenet_templates_paper, imagenet_dual_templates_small),
    "smallest": (imagenet_templates_smallest, imagenet_dual_templates_small),
    "style": (style_templates_small, style_dual_templates_small),
    "emoji": (emoji_templates, [f"{sentence} with {{}}" for sentence in emoji_templates]),
    "emoji-style": (emoji_style_templates, [f"{sentence} with {{}}" for sentence in emoji_style_templates]),
}
