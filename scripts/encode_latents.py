"""Encode a data set with a first stage once, so that a latent diffusion model trains without running it.

Writes the folder that `ldm.data.latents.PrecomputedLatents` reads: posterior moments (the posterior is still sampled
at every step) and captions. Only 32-bit weights and eval mode are used; the same input gives the same folder.

Example:
    python scripts/encode_latents.py --config configs/emoji/autoencoder_kl_f4.yaml \\
        --ckpt_path data/emoji/autoencoder.safetensors --out data/emoji/latents
    python scripts/encode_latents.py --config configs/emoji/autoencoder_kl_f4.yaml \\
        --ckpt_path data/emoji/autoencoder.safetensors --out data/emoji/latents_validation --count 1024 \\
        data.params.train.params.seed=77
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.cli import add_debug_flag, run_command  # noqa: E402 (runs from any folder, installed or not)


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="YAML", help="first stage under `model`, data under `data`")
    parser.add_argument("--ckpt_path", required=True, metavar="FILE", help="weights of the first stage")
    parser.add_argument("--data", default="train", help="which data set of the config (default: %(default)s)")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--count", type=int, help="encode only the first N pictures")
    parser.add_argument("--batch_size", type=int, default=64, help="pictures at a time (default: %(default)s)")
    parser.add_argument(
        "--num_workers", type=int, default=1, help="processes that load pictures (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (default: auto)")
    parser.add_argument("--precision", choices=("full", "autocast"), default="full", help="autocast: bfloat16")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings in place of the config's")
    add_debug_flag(parser)
    return parser


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    encode(build_parser().parse_args(argv))


def encode(options: argparse.Namespace) -> None:
    """Encode the pictures and write moments and captions."""
    import torch
    from omegaconf import OmegaConf
    from torch.utils.data import DataLoader, Subset
    from tqdm import tqdm

    from ldm.checkpoint import load_model_from_config
    from ldm.data.latents import INFO, LatentWriter
    from ldm.generate import select_device
    from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
    from ldm.run import apply_overrides
    from ldm.util import instantiate_from_config, read_yaml

    config: Any = read_yaml(options.config)
    apply_overrides(config, options.overrides)
    entries = config.get("data", {}).get("params", {})
    if options.data not in entries:
        names = ", ".join(name for name in entries if OmegaConf.is_dict(entries[name])) or "none at all"
        raise ValueError(f"{options.config} describes no data set '{options.data}' under data.params, but {names}")
    if options.count is not None and options.count < 1:
        raise ValueError(f"--count must be at least 1, got {options.count}")
    if (options.out / INFO).exists():
        raise FileExistsError(f"{options.out} is a finished folder of latents: delete it, or name another one")
    device = select_device(options.device)
    model: Any = load_model_from_config(config, options.ckpt_path, device=device)
    data: Any = instantiate_from_config(entries[options.data])
    count = len(data) if options.count is None else min(options.count, len(data))
    loader = DataLoader(Subset(data, range(count)), options.batch_size, num_workers=options.num_workers)
    writer: LatentWriter | None = None
    with torch.inference_mode():
        for batch in tqdm(loader, unit="batch"):
            pictures = batch["image"].permute(0, 3, 1, 2).contiguous().to(device)  # (B, 3, H, W)
            with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "autocast"):
                posterior = model.encode(pictures)
            if not isinstance(posterior, DiagonalGaussianDistribution):
                raise ValueError(f"{options.config}: a {type(model).__name__} gives no Gaussian, so it has no moments")
            moments = posterior.parameters  # (B, 2C, h, w)
            if writer is None:
                writer = LatentWriter(options.out, count, moments.shape[1:]).__enter__()
            writer.add(moments, batch["caption"])
    if writer is None:
        raise ValueError(f"data set '{options.data}' of {options.config} is empty")
    writer.__exit__(None, None, None)


if __name__ == "__main__":
    run_command(main)
