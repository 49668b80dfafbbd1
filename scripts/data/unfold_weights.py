"""Start a network on unfolded latents from one that was trained on folded ones, as the embedded model's was.

The network of the new config has one more level around those of the old one. What fits is taken over: the step
embedding, the old levels on both ways, the middle, first stage and text encoder; the new outer level starts afresh.

Example:
    python scripts/data/unfold_weights.py data/emoji/folded.safetensors configs/emoji/ldm_text.yaml \\
        data/emoji/unfolded.safetensors
    python main.py --base configs/emoji/ldm_text.yaml -t --ckpt_path data/emoji/unfolded.safetensors
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from typing import TYPE_CHECKING, Any  # noqa: E402 (runs from any folder, installed or not)

from ldm.cli import add_debug_flag, run_command  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

NETWORK = "model.diffusion_model."


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="checkpoint of the network on folded latents")
    parser.add_argument("config", help="YAML of the model with one more level")
    parser.add_argument("out", type=Path, help="file to write (.safetensors)")
    add_debug_flag(parser)
    return parser


def grown(old: Mapping[str, Tensor], new: Mapping[str, Tensor], blocks_per_level: int) -> tuple[dict[str, Tensor], int]:
    """`new` with all that fits of `old`, both with `UNetModel`'s keys; how many tensors were taken over.

    A level takes `blocks_per_level` residual blocks and a downsampling on the way in; on the way out the numbers stay,
    since its new blocks come last. A convolution that reads fewer channels takes its first ones.
    """
    result, taken = dict(new), 0
    for key, value in old.items():
        there = re.sub(r"^input_blocks\.([1-9]\d*)", lambda m: f"input_blocks.{int(m[1]) + blocks_per_level + 1}", key)
        target = new.get(there)
        if target is None or target.ndim != value.ndim:
            continue
        narrower = [mine <= theirs for mine, theirs in zip(target.shape, value.shape, strict=True)]
        if target.shape != value.shape and not (key.startswith("output_blocks.") and all(narrower)):
            continue
        result[there] = value[tuple(slice(side) for side in target.shape)].to(target.dtype).clone()
        taken += 1
    return result, taken


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    options = build_parser().parse_args(argv)
    import logging

    from omegaconf import OmegaConf

    from ldm.checkpoint import read_state_dict, save_safetensors
    from ldm.util import ConfigError, instantiate_from_config, read_yaml

    config: Any = OmegaConf.select(read_yaml(options.config), "model.params.unet_config")
    if config is None:
        raise ConfigError(f"{options.config} has no model.params.unet_config")
    state = read_state_dict(options.weights)
    old = {key.removeprefix(NETWORK): value for key, value in state.items() if key.startswith(NETWORK)}
    network, taken = grown(old, instantiate_from_config(config).state_dict(), int(config.params.num_res_blocks))
    if not taken:
        raise ConfigError(f"{options.weights}: nothing in it fits the network of {options.config}")
    rest = {key: value for key, value in state.items() if not key.startswith(NETWORK)}
    save_safetensors({**rest, **{NETWORK + key: value for key, value in network.items()}}, options.out)
    logging.getLogger(__name__).info("%d of %d tensors taken over: %s", taken, len(network), options.out)


if __name__ == "__main__":
    run_command(main)
