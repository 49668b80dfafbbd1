"""Ways of feeding a conditioning to the UNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.util import instantiate_from_config

CONDITIONING_KEYS = (None, "concat", "crossattn", "hybrid", "adm")


class DiffusionWrapper(nn.Module):
    """The UNet behind one of the published conditioning modes.

    `conditioning_key`: None (unconditional), "concat" (channels beside the noisy latent), "crossattn" (context
    sequence), "hybrid" (both) or "adm" (class label).
    """

    def __init__(self, unet_config: Any, conditioning_key: str | None):
        super().__init__()
        if conditioning_key not in CONDITIONING_KEYS:
            raise ValueError(f"conditioning_key '{conditioning_key}' is none of {CONDITIONING_KEYS}")
        self.diffusion_model = instantiate_from_config(unet_config)
        self.conditioning_key = conditioning_key

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Sequence[Tensor] | None = None,
        c_crossattn: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Network output (B, C_out, h, w) for noisy latents (B, C, h, w) at time steps (B,).

        `c_concat`: tensors (B, C_i, h, w); `c_crossattn`: contexts (B, L_i, D), joined along L, or labels (B,) for adm.
        """
        key = self.conditioning_key
        if key in ("concat", "hybrid"):
            if not c_concat:
                raise ValueError(f"conditioning_key '{key}' needs c_concat, got none")
            x = torch.cat([x, *c_concat], dim=1)  # (B, C + sum C_i, h, w)
        if key in ("crossattn", "hybrid", "adm") and not c_crossattn:
            raise ValueError(f"conditioning_key '{key}' needs c_crossattn, got none")
        if key in ("crossattn", "hybrid"):
            assert c_crossattn is not None
            context = c_crossattn[0] if len(c_crossattn) == 1 else torch.cat(list(c_crossattn), dim=1)  # (B, L, D)
            return self.diffusion_model(x, t, context=context)
        if key == "adm":
            assert c_crossattn is not None
            return self.diffusion_model(x, t, y=c_crossattn[0])
        return self.diffusion_model(x, t)


def conditioning_kwargs(cond: Any, conditioning_key: str | None) -> dict[str, list[Tensor]]:
    """Bring a conditioning (None, tensor, list of tensors or dict of lists) into the wrapper's keyword form."""
    if cond is None:
        return {}
    if isinstance(cond, Mapping):
        return {k: list(v) if isinstance(v, list | tuple) else [v] for k, v in cond.items() if v is not None}
    tensors = list(cond) if isinstance(cond, list | tuple) else [cond]
    return {"c_concat" if conditioning_key == "concat" else "c_crossattn": tensors}
