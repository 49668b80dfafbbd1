"""Pictures for people and for raters: what training sees, and nothing that tells where it came from."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ldm.data.image import open_image, to_rgb


def clean_picture(path: str | Path) -> Image.Image:
    """A picture in RGB as training sees it: upright, white where it is transparent; without metadata.

    Errors as `open_image`.
    """
    picture = to_rgb(open_image(path))
    picture.info = {}  # Pillow writes comments and profiles of the source into copies
    return picture
