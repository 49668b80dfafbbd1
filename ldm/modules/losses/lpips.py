"""LPIPS, the learned perceptual distance (Zhang et al. 2018) on VGG16 features."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

# The ImageNet weights as torchvision publishes them, and the five linear layers as the LPIPS authors do.
DEFAULT_WEIGHTS = ("models/lpips/vgg16-397923af.pth", "models/lpips/vgg.pth")
# Output channels of each convolution; a new list starts after a max pooling.
VGG16_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class EmptyConv2d(nn.Conv2d):
    """Convolution that is zero until weights are loaded: makes lacking weights recognisable, and building fast."""

    def reset_parameters(self) -> None:
        """Fill with zeros."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class VGG16Features(nn.Module):
    """Convolutions of VGG16 in five slices, numbered as in torchvision's `features`."""

    def __init__(self) -> None:
        super().__init__()
        number, channels = 0, 3
        for index, widths in enumerate(VGG16_WIDTHS):
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            if index > 0:
                layers[str(number)] = nn.MaxPool2d(2)
                number += 1
            for width in widths:
                layers[str(number)] = EmptyConv2d(channels, width, 3, padding=1)
                layers[str(number + 1)] = nn.ReLU()
                number, channels = number + 2, width
            self.add_module(f"slice{index + 1}", nn.Sequential(layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> five feature maps (B, C_k, H / 2^k, W / 2^k)."""
        features = []
        for part in self.children():
            x = part(x)  # (B, C_k, H / 2^k, W / 2^k)
            features.append(x)
        return features


class ScalingLayer(nn.Module):
    """From pictures in [-1, 1] to the normalisation that VGG16 was trained with."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3, H, W)."""
        return (x - self.shift) / self.scale


class ChannelWeights(nn.Module):
    """Weighted sum over channels, after dropout in training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), EmptyConv2d(channels, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1, H, W)."""
        return self.model(x)


def unit_length(features: Tensor) -> Tensor:
    """`features` (B, C, H, W) scaled to length 1 over the channels; the tiny terms keep gradients at 0 finite."""
    features = features.float()
    length = torch.sqrt(features.square().sum(dim=1, keepdim=True) + 1e-20)  # (B, 1, H, W)
    return features / (length + 1e-10)


class LPIPS(nn.Module):
    """Perceptual distance of two batches of pictures.

    Building it reads and downloads nothing: the weights are zero until they come with the state dict of a first stage
    (all published first-stage checkpoints hold them), or until the first call reads `weights`. These are one or more
    local files: a first-stage checkpoint, an LPIPS state dict, torchvision's VGG16, in any mixture that is complete.
    """

    def __init__(self, weights: str | Sequence[str] | None = None) -> None:
        super().__init__()
        self.weights = DEFAULT_WEIGHTS if weights is None else (weights,) if isinstance(weights, str) else (*weights,)
        self.scaling_layer = ScalingLayer()
        self.net = VGG16Features()
        for index, widths in enumerate(VGG16_WIDTHS):
            self.add_module(f"lin{index}", ChannelWeights(widths[-1]))
        self._has_weights = False

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Distances (B, 1, 1, 1) of pictures (B, 3, H, W) in [-1, 1]."""
        self.ensure_weights()
        pairs = zip(self.net(self.scaling_layer(inputs)), self.net(self.scaling_layer(targets)), strict=True)
        distance = inputs.new_zeros(inputs.shape[0], 1, 1, 1)
        for index, (a, b) in enumerate(pairs):
            difference = (unit_length(a) - unit_length(b)).square()  # (B, C_k, h_k, w_k)
            distance = distance + self.get_submodule(f"lin{index}")(difference).mean(dim=(2, 3), keepdim=True)
        return distance  # (B, 1, 1, 1)

    def ensure_weights(self) -> None:
        """Load the weights if they did not come with a state dict.

        Raises `FileNotFoundError` that says where they are expected, `ValueError` if the files are incomplete.
        """
        if self._has_weights:
            return
        if not all(bool(p.any()) for p in self.parameters()):
            self.load_weights()
        self._has_weights = True

    def load_weights(self) -> None:
        """Read the files in `weights`."""
        from ldm.checkpoint import read_state_dict

        missing_files = [path for path in self.weights if not Path(path).is_file()]
        if missing_files:
            raise FileNotFoundError(
                f"the perceptual loss needs the file {missing_files[0]}: put LPIPS and VGG16 weights there, or pass "
                "perceptual_ckpt=FILE (any published first-stage checkpoint holds them), or set perceptual_weight to 0"
            )
        wanted = self.state_dict()
        found: dict[str, Tensor] = {}
        for path in self.weights:
            state = {own_name(key): value for key, value in read_state_dict(path).items()}
            found.update({key: value for key, value in state.items() if key in wanted})
        missing = [name for name, _ in self.named_parameters() if name not in found]
        if missing:
            raise ValueError(
                f"perceptual weights in {', '.join(self.weights)} are incomplete: '{missing[0]}' and "
                f"{len(missing) - 1} more are missing; give the VGG16 and the LPIPS file, or a first-stage checkpoint"
            )
        self.load_state_dict(found, strict=False)


def own_name(key: str) -> str:
    """The name in `LPIPS` of a key of a first-stage checkpoint, an LPIPS file or torchvision's VGG16."""
    key = key.removeprefix("first_stage_model.").removeprefix("loss.perceptual_loss.")
    kind, _, rest = key.partition(".")
    if kind != "features":
        return key
    number = int(rest.split(".")[0])
    starts = (0, 4, 9, 16, 23)
    return f"net.slice{sum(number >= start for start in starts)}.{rest}"
