"""Command to fill masked parts of pictures, with LDM's inpainting model or, by a text, with Stable Diffusion's."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

DEFAULT_FOLDER = "models/ldm/inpainting_big"
EXAMPLES = """\
examples:
  photos/dog.png with photos/dog_mask.png (white where to fill), and any further pairs of that form:
    python scripts/inpaint.py --indir photos --outdir outputs/inpainting
  what a text says, with the inpainting models of Stable Diffusion 1 and 2, and learned words:
    python scripts/inpaint.py --indir photos --outdir outputs/inpainting --ckpt_path sd-v1-5-inpainting.ckpt \\
        --embedding_path cat.pt --prompt "a photo of * on a bench"
"""


RECORDED = ("seed", "steps", "eta", "ckpt_path", "config", "precision")  # what a picture's metadata says
TEXT_FLAGS = ("prompt", "negative_prompt", "scale", "embedding_path", "rename", "strength", "embedding_sha256")


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    from ldm.cli import add_debug_flag
    from ldm.generate_command import add_word_flags

    parser = argparse.ArgumentParser(
        prog="inpaint.py",
        description="Fill the parts of pictures that a mask (NAME_mask.png beside NAME.png) shows white.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--indir", required=True, metavar="DIR", help="folder with pairs NAME.png (or .jpg ...) and NAME_mask.png")
    add("--outdir", required=True, metavar="DIR",
        help="where the filled pictures go, under the same names; one made with other settings is kept")  # fmt: skip
    add("--steps", type=int, default=50, help="ddim steps (default: 50)")
    add("--eta", type=float, default=0.0, help="ddim: 0 adds no noise, 1 much (default: 0)")
    add("--seed", type=int, default=42, help="of the noise, the same for each picture (default: 42)")
    add("--ckpt_path", metavar="FILE|DIR", default=DEFAULT_FOLDER, help=f"weights (default: in {DEFAULT_FOLDER})")
    add("--config", metavar="YAML", help="the model's config (default: found beside the weights or from them)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (default: auto)")
    add("--precision", default="full", choices=("full", "autocast", "half"),
        help="full: float32; autocast: 16 bits where it is safe; half: 16-bit weights (default: full)")  # fmt: skip
    group = parser.add_argument_group("text", "for Stable Diffusion's inpainting models")
    group.add_argument("--prompt", help="what to fill in (default: 'a photo of' the first learned word)")
    group.add_argument("--negative_prompt", default="", metavar="TEXT", help="what shall not be there")
    group.add_argument("--scale", type=float, default=7.5, help="guidance; 1 is none (default: 7.5)")
    add_debug_flag(parser)
    add_word_flags(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    from ldm.generate_checks import check_eta, check_seed, check_texts

    args = build_parser().parse_args(argv)
    check_seed(args.seed)
    check_eta("--eta", args.eta)
    check_texts(args, "prompt", "negative_prompt", "rename")
    return args


def find_pairs(folder: str | Path) -> list[tuple[Path, Path]]:
    """All (picture, mask) in `folder`; raises when there is none, or a mask has no picture.

    Masks are known as in training: by their names, whatever suffixes and capitals.
    """
    from ldm.data.image import IMAGE_SUFFIXES
    from ldm.data.masks import MASK_SUFFIX, find_masks, has_mask_name, visible_files

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}")
    files = visible_files(folder)
    masks = find_masks(files)
    pairs = []
    for mask in filter(has_mask_name, files):
        if mask.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        alike = masks.get(mask, [])
        picture = next((file for file in alike if file.suffix.lower() in IMAGE_SUFFIXES), None)
        if picture is None:
            found = f", not {alike[0].name}: convert that" if alike else ""
            expected = f"{mask.stem[: -len(MASK_SUFFIX)]}.png"
            raise FileNotFoundError(f"{mask} has no picture beside it: expected {expected}{found}")
        pairs.append((picture, mask))
    if not pairs:
        raise FileNotFoundError(f"no pair NAME.png and NAME_mask.png in {folder}")
    return pairs


def load_pair(picture: Path, mask: Path) -> tuple[np.ndarray, np.ndarray]:
    """Picture (H, W, 3) float32 in [-1, 1] and mask (H, W, 1) of 0 (keep) and 1 (fill)."""
    import numpy as np

    from ldm.data.image import ImageLoader, open_mask
    from ldm.generate_checks import check_size
    from ldm.generate_edit import white_part

    image = ImageLoader().load(picture)
    check_size(str(picture), image.shape[1], image.shape[0])
    plane = open_mask(mask)
    if plane.size != (image.shape[1], image.shape[0]):
        sizes = f"{plane.width} x {plane.height} pixels, its picture {image.shape[1]} x {image.shape[0]}"
        raise ValueError(f"{mask} has {sizes}; make them the same")
    return image, white_part(plane, mask)[..., None].astype(np.float32)


def takes_text(model: Any) -> bool:
    """Whether the model fills by a text; otherwise it goes by the picture alone."""
    from ldm.models.diffusion.ddpm import LatentInpaintDiffusion

    return isinstance(model, LatentInpaintDiffusion)


def read_words(model: Any, args: argparse.Namespace) -> None:
    """Load the learned words, and see that there is a prompt for a model that needs one."""
    from ldm.generate_command import check_words, load_words_of

    words = load_words_of(model, args)
    if args.prompt is None and not words:
        raise ValueError(f'{args.ckpt_path} fills by a text: say what, with --prompt "..."')
    args.embedding_sha256 = getattr(args, "embedding_sha256", [])
    args.prompt = f"a photo of {words[0]}" if args.prompt is None else args.prompt
    check_words([args.prompt], words, args.negative_prompt, args.words_of_files)


def fill(model: Any, image: np.ndarray, mask: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    """The picture (H, W, 3) in [-1, 1] with its masked part filled; the rest is returned as it was."""
    import numpy as np
    import torch

    from ldm.generate import decode, first_stage_factor, precision_context, require_finite
    from ldm.models.diffusion.ddim import DDIMSampler

    # sizes that the networks cannot halve often enough grow at the right and the bottom, and are cut again
    unit = first_stage_factor(model) * model.model.diffusion_model.downsampling
    height, width = image.shape[:2]
    margin = ((0, -height % unit), (0, -width % unit), (0, 0))
    large, large_mask = np.pad(image, margin, mode="edge"), np.pad(mask, margin, mode="edge")

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array)[None].to(model.device)  # (1, H, W, C)

    if takes_text(model):  # it was trained on grey where the mask is
        batch: dict[str, Any] = {"masked_image": tensor(large * (1 - large_mask)), "mask": tensor(large_mask)}
        batch[model.cond_stage_key] = [args.prompt]
    else:  # on black, and on masks scaled like pictures
        batch = {"masked_image": tensor((large + 1) * (1 - large_mask) - 1), "mask": tensor(2 * large_mask - 1)}
    options: dict[str, Any] = {"seeds": [args.seed], "eta": args.eta}
    with torch.no_grad(), model.ema_scope("Sampling"), precision_context(args.precision, model.device):
        with torch.random.fork_rng(devices=[]):  # the latents of what is kept are drawn, too
            torch.manual_seed(args.seed)
            cond = model.get_conditioning(batch)  # (1, C + 1, h, w), or a dict of that and the text
        if takes_text(model):
            options["unconditional_guidance_scale"] = args.scale
            options["unconditional_conditioning"] = {
                "c_crossattn": [model.get_learned_conditioning([args.negative_prompt])]
            }
        beside = cond["c_concat"][0] if takes_text(model) else cond
        shape = (model.channels, *beside.shape[2:])
        latent, _ = DDIMSampler(model).sample(args.steps, 1, shape, cond, **options)
        pictures = decode(model, latent)  # (1, 3, H, W)
        require_finite(pictures)
        filled = pictures[0].permute(1, 2, 0).cpu().numpy()  # (H, W, 3)
    return image * (1 - mask) + np.clip(filled[:height, :width], -1, 1) * mask


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`."""
    args = parse_args(argv)
    pairs = find_pairs(args.indir)
    if Path(args.outdir).resolve() == Path(args.indir).resolve():
        raise ValueError(f"--outdir {args.outdir} is --indir: the filled pictures would replace yours")
    from ldm.data.image import to_uint8
    from ldm.generate import load_model, save_png
    from ldm.generate_files import file_hash, free_path, require_folder

    require_folder(args.outdir)
    model = load_model(args.ckpt_path, args.config, device=args.device, precision=args.precision)
    if takes_text(model):
        read_words(model, args)
    elif getattr(model, "cond_stage_key", None) != "masked_image":
        raise ValueError(f"{args.ckpt_path} is no inpainting model: it is not conditioned on a masked picture")
    elif args.prompt is not None or args.embedding_path:
        raise ValueError(f"{args.ckpt_path} takes no text: it goes by the picture alone; leave --prompt and words out")
    model.first_stage_model.float()  # small, and it sees the picture itself
    recorded = [*RECORDED, *(TEXT_FLAGS if takes_text(model) else ())]
    for picture, mask in pairs:
        filled = fill(model, *load_pair(picture, mask), args)
        settings = {flag: getattr(args, flag) for flag in recorded} | {"picture": picture.name, "mask": mask.name}
        settings |= {"picture_sha256": file_hash(picture), "mask_sha256": file_hash(mask)}
        path = free_path(Path(args.outdir) / f"{picture.stem}.png", settings)
        print(save_png(to_uint8(filled), path, settings))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a clone runs without being installed
    from ldm.cli import run_command

    run_command(main)
