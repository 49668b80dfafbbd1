"""Pictures of one style: `PersonalizedBase` with the style templates."""

from __future__ import annotations

from ldm.data import personalized
from ldm.data.templates import imagenet_templates_smallest, per_img_token_list
from ldm.data.templates import style_dual_templates_small as imagenet_dual_templates_small
from ldm.data.templates import style_templates_small as imagenet_templates_small

__all__ = [
    "PersonalizedBase",
    "imagenet_dual_templates_small",
    "imagenet_templates_small",
    "imagenet_templates_smallest",
    "per_img_token_list",
]


class PersonalizedBase(personalized.PersonalizedBase):
    """As its parent, with captions such as "a painting in the style of *"."""

    template_set = "style"
