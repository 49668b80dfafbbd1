"""Pictures with captions for text-to-image training, under the name that the published text2img256 config uses."""

from __future__ import annotations

from pathlib import Path

from ldm.data.folder import CaptionedImageFolder


class PreviewsBase(CaptionedImageFolder):
    """`data/previews/<split>` as a captioned folder (see `CaptionedImageFolder` for the layout)."""

    split = "train"
    default_flip_p = 0.0

    def __init__(
        self,
        size: int | None = None,
        crop: str = "center",
        interpolation: str = "bicubic",
        flip_p: float | None = None,
        caption_dropout: float = 0.0,
        data_root: str | Path | None = None,
    ) -> None:
        root = Path(data_root) if data_root else Path("data/previews") / self.split
        if not root.is_dir():
            raise FileNotFoundError(
                f"{type(self).__name__} found no data: it expects pictures in {root}, with captions in "
                f"{root / 'metadata.jsonl'} (file_name, text) or in a .txt file beside each; or give `data_root`"
            )
        flip_p = self.default_flip_p if flip_p is None else flip_p
        super().__init__(root, size, crop, interpolation, flip_p, caption_dropout=caption_dropout)


class PreviewsTrain(PreviewsBase):
    """Training part, flipped at random."""

    default_flip_p = 0.5


class PreviewsValidation(PreviewsBase):
    """Validation part."""

    split = "validation"
