"""Losses of the first stages: terms, schedules, lazy perceptual network."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses import DummyLoss, LPIPSWithDiscriminator, VQLPIPSWithDiscriminator, base, lpips
from ldm.modules.losses.vqperceptual import measure_perplexity
from ldm.util import ConfigError, instantiate_from_config
from tests.conftest import assert_close


class TinyPerception(nn.Module):
    """A stand-in for LPIPS: squared difference of one convolution's outputs, (B, 1, 1, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        nn.init.normal_(self.conv.weight, generator=torch.Generator().manual_seed(1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.conv(a) - self.conv(b)).square().mean(dim=(1, 2, 3), keepdim=True)


@pytest.fixture
def pictures() -> tuple[Tensor, Tensor, nn.Conv2d]:
    """Inputs, reconstructions made by a last layer, and that layer."""
    torch.manual_seed(0)
    last = nn.Conv2d(8, 3, 3, padding=1)
    return torch.rand(2, 3, 16, 16) * 2 - 1, last(torch.randn(2, 8, 16, 16)), last


@pytest.fixture
def posterior() -> DiagonalGaussianDistribution:
    return DiagonalGaussianDistribution(torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0)))


def tamings(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of taming's losses, imported without what it downloads with."""
    monkeypatch.setitem(sys.modules, "requests", ModuleType("requests"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        return importlib.import_module(f"taming.modules.losses.{name}")


PLAIN = {"disc_factor": 0.0, "perceptual_weight": 0.0}
SMALL_DISC = {"disc_num_layers": 1, "disc_ndf": 8}


# -- against taming's loss, which the published VQ models were trained with -------------------------------------------


@pytest.mark.parametrize("disc_loss", ["hinge", "vanilla"])
@pytest.mark.parametrize("step", [0, 7])
def test_vq_loss_equals_tamings(
    monkeypatch: pytest.MonkeyPatch, pictures: tuple[Tensor, Tensor, nn.Conv2d], disc_loss: str, step: int
) -> None:
    taming = tamings("vqperceptual", monkeypatch)
    monkeypatch.setattr(taming, "LPIPS", TinyPerception)
    options = {"disc_start": 5, "disc_weight": 0.8, "codebook_weight": 0.7, "disc_loss": disc_loss, **SMALL_DISC}
    theirs = taming.VQLPIPSWithDiscriminator(perceptual_weight=0.5, **options)
    ours = VQLPIPSWithDiscriminator(perceptual_weight=0.5, perceptual_loss=TinyPerception(), **options)
    ours.discriminator.load_state_dict(theirs.discriminator.state_dict())
    inputs, reconstructions, last = pictures
    codebook_loss = torch.tensor(0.3)
    for optimizer_idx in (0, 1):
        args = (codebook_loss, inputs, reconstructions, optimizer_idx, step)
        expected, expected_log = theirs(*args, last_layer=last.weight)
        actual, log = ours(*args, last_layer=last.weight)
        assert_close(actual.detach(), expected.detach())
        if step >= 5:
            assert_close(
                torch.autograd.grad(actual, last.weight, retain_graph=True)[0] if optimizer_idx == 0 else actual,
                torch.autograd.grad(expected, last.weight, retain_graph=True)[0] if optimizer_idx == 0 else expected,
            )
        names = expected_log if step >= 5 else expected_log.keys() - {"train/d_weight", "train/g_loss"}
        for name in names:
            assert_close(log[name], torch.as_tensor(expected_log[name]), name=name)


# -- the KL loss ------------------------------------------------------------------------------------------------------


def test_kl_loss_by_hand(pictures: Any, posterior: DiagonalGaussianDistribution) -> None:
    inputs, reconstructions, _ = pictures
    loss = LPIPSWithDiscriminator(
        logvar_init=0.5, kl_weight=0.01, disc_factor=0.0, perceptual_weight=2.0, perceptual_loss=TinyPerception()
    )
    error = (inputs - reconstructions).abs() + 2.0 * TinyPerception()(inputs, reconstructions)
    nll = (error / torch.exp(torch.tensor(0.5)) + 0.5).sum() / 2
    kl = posterior.kl().mean()
    value, log = loss(inputs, reconstructions, posterior, 0, 0)
    assert_close(value.detach(), (nll + 0.01 * kl).detach())
    assert_close(log["train/rec_loss"], error.mean().detach())
    assert_close(log["train/kl_loss"], kl)
    assert_close(log["train/nll_loss"], nll.detach())
    doubled, _ = loss(inputs, reconstructions, posterior, 0, 0, weights=2.0)
    assert_close(doubled.detach(), (2 * nll + 0.01 * kl).detach())


def test_adversarial_term_is_balanced_at_the_last_layer(pictures: Any, posterior: DiagonalGaussianDistribution) -> None:
    inputs, reconstructions, last = pictures
    loss = LPIPSWithDiscriminator(disc_start=3, disc_weight=0.5, perceptual_weight=0.0, kl_weight=0.0, **SMALL_DISC)
    nll, _ = loss(inputs, reconstructions, posterior, 0, 2, last_layer=last.weight)  # one step too early
    value, log = loss(inputs, reconstructions, posterior, 0, 3, last_layer=last.weight)
    nll_grad = torch.autograd.grad(nll, last.weight, retain_graph=True)[0]
    g_grad = torch.autograd.grad(value - nll, last.weight, retain_graph=True)[0]
    assert g_grad.norm().item() == pytest.approx(0.5 * nll_grad.norm().item(), rel=1e-2)
    assert log["train/disc_factor"] == 1.0
    assert_close((value - nll).detach(), log["train/d_weight"] * log["train/g_loss"], rel=1e-4)


def test_validation_needs_no_gradients(pictures: Any, posterior: DiagonalGaussianDistribution) -> None:
    inputs, reconstructions, last = pictures
    loss = LPIPSWithDiscriminator(disc_start=0, perceptual_weight=0.0, **SMALL_DISC).eval()
    with torch.no_grad():
        _, log = loss(inputs, reconstructions, posterior, 0, 0, last_layer=last.weight, split="val")
    assert log["val/d_weight"] == 0.0
    assert all(key.startswith("val/") for key in log)


def test_losses_are_computed_in_full_precision(pictures: Any, posterior: DiagonalGaussianDistribution) -> None:
    inputs, reconstructions, _ = pictures
    value, _ = LPIPSWithDiscriminator(**PLAIN)(inputs, reconstructions.bfloat16(), posterior, 0, 0)
    assert value.dtype == torch.float32


# -- what is not asked for is not built -------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [LPIPSWithDiscriminator, VQLPIPSWithDiscriminator])
def test_terms_of_weight_0_are_not_built(monkeypatch: pytest.MonkeyPatch, cls: Any) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("built although its weight is 0")

    monkeypatch.setattr(lpips, "LPIPS", forbidden)
    monkeypatch.setattr(base, "build_discriminator", forbidden)
    for off in ({"disc_factor": 0.0}, {"disc_weight": 0.0}):
        loss = cls(disc_start=0, perceptual_weight=0.0, **off)
        assert loss.discriminator is None
        assert loss.perceptual_loss is None
        assert [key for key in loss.state_dict() if key != "logvar"] == []
        zeros = torch.zeros(1, 3, 8, 8)
        with pytest.raises(ValueError, match="without a discriminator"):
            loss.discriminator_loss(zeros, zeros, 0, None, "train")


def test_injected_network_is_frozen_and_needs_no_lpips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lpips, "LPIPS", None)
    network = nn.Sequential(nn.Dropout(), TinyPerception())
    loss = VQLPIPSWithDiscriminator(disc_factor=0.0, perceptual_loss=network).train()
    assert loss.perceptual_loss is network
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    config = {"target": "tests.test_losses.TinyPerception"}
    loss = LPIPSWithDiscriminator(disc_factor=0.0, perceptual_loss=config)
    assert isinstance(loss.perceptual_loss, TinyPerception)


def test_published_targets_give_these_losses() -> None:
    for module in ("taming.modules.losses.vqperceptual", "ldm.modules.losses", "ldm.modules.losses.vqperceptual"):
        loss = instantiate_from_config(
            {"target": f"{module}.VQLPIPSWithDiscriminator", "params": {"disc_start": 1, **PLAIN}}
        )
        assert isinstance(loss, VQLPIPSWithDiscriminator)
    for module in ("ldm.modules.losses", "ldm.modules.losses.contperceptual"):
        loss = instantiate_from_config(
            {"target": f"{module}.LPIPSWithDiscriminator", "params": {"disc_start": 1, **PLAIN}}
        )
        assert isinstance(loss, LPIPSWithDiscriminator)
    assert isinstance(instantiate_from_config({"target": "ldm.modules.losses.contperceptual.DummyLoss"}), DummyLoss)
    assert isinstance(instantiate_from_config({"target": "torch.nn.Identity"}), nn.Identity)
    with pytest.raises(ConfigError, match="disc_strat.*disc_start"):
        instantiate_from_config({"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": {"disc_strat": 1}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"disc_loss": "wgan"}, "wgan.*hinge"),
        ({"perceptual_weight": 1.0, "perceptual_loss": "vgg"}, "vgg.*lpips"),
    ],
)
def test_unknown_choices_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LPIPSWithDiscriminator(**{**PLAIN, **options})
    with pytest.raises(ValueError, match="huber.*l1"):
        VQLPIPSWithDiscriminator(**PLAIN, pixel_loss="huber")


def test_conditional_discriminator_sees_the_condition(pictures: Any) -> None:
    inputs, reconstructions, last = pictures
    loss = VQLPIPSWithDiscriminator(
        disc_start=0, perceptual_weight=0.0, disc_conditional=True, disc_in_channels=5, **SMALL_DISC
    )
    args = (torch.tensor(0.0), inputs, reconstructions, 0, 0, last.weight)
    loss(*args, cond=torch.zeros(2, 2, 16, 16))
    with pytest.raises(ValueError, match="disc_conditional"):
        loss(*args)


def test_perplexity_counts_codes() -> None:
    perplexity, used = measure_perplexity(torch.arange(8).repeat(3).reshape(2, 3, 4), n_classes=16)
    assert perplexity.item() == pytest.approx(8.0, rel=1e-5)
    assert used.item() == 8
    perplexity, used = measure_perplexity(torch.full((5,), 3))
    assert perplexity.item() == pytest.approx(1.0)
    assert used.item() == 1


# -- LPIPS ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vgg_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Random weights under the names of torchvision's VGG16, of LPIPS, and of a first-stage checkpoint."""
    folder = tmp_path_factory.mktemp("lpips")
    generator = torch.Generator().manual_seed(0)
    full: dict[str, Tensor] = {}
    for name, value in lpips.LPIPS().state_dict().items():
        if name.startswith("scaling"):
            full[name] = value
        elif name.startswith("lin"):
            full[name] = torch.rand(value.shape, generator=generator)
        else:
            full[name] = torch.randn(value.shape, generator=generator) * (0.06 if value.dim() > 1 else 0.5)
    vgg = {f"features.{k.partition('.')[2].partition('.')[2]}": v for k, v in full.items() if k.startswith("net.")}
    vgg["classifier.0.bias"] = torch.zeros(3)
    torch.save(vgg, folder / "vgg16.pth")
    torch.save({k: v for k, v in full.items() if k.startswith("lin")}, folder / "vgg.pth")
    stage = {f"loss.perceptual_loss.{k}": v for k, v in full.items()} | {"encoder.conv_in.bias": torch.zeros(2)}
    torch.save({"state_dict": stage, "global_step": 3}, folder / "model.ckpt")
    return {"folder": folder, "full": full}


def test_lpips_builds_without_files_and_says_where_they_belong(tmp_path: Path) -> None:
    network = lpips.LPIPS(str(tmp_path / "nowhere.pth"))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth.*perceptual_ckpt.*perceptual_weight to 0"):
        network(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("names", [("vgg16.pth", "vgg.pth"), ("model.ckpt",)])
def test_lpips_reads_local_files_at_the_first_call(vgg_files: dict[str, Any], names: tuple[str, ...]) -> None:
    network = base.build_perceptual_loss("lpips", [str(vgg_files["folder"] / name) for name in names])
    assert not network.net.slice1[0].weight.any()
    a, b = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    distance = network(a, b)
    assert distance.shape == (2, 1, 1, 1)
    assert (distance > 0).all()
    assert not network(a, a).any()
    for name, value in vgg_files["full"].items():
        assert torch.equal(network.state_dict()[name], value)


def test_lpips_names_what_an_incomplete_file_lacks(vgg_files: dict[str, Any]) -> None:
    network = lpips.LPIPS(str(vgg_files["folder"] / "vgg16.pth"))
    with pytest.raises(ValueError, match=r"lin0\.model\.1\.weight.*4 more"):
        network.ensure_weights()


def test_lpips_takes_weights_from_a_state_dict(vgg_files: dict[str, Any]) -> None:
    network = lpips.LPIPS("/does/not/exist")
    network.load_state_dict(vgg_files["full"])
    network.ensure_weights()


def test_lpips_equals_tamings(monkeypatch: pytest.MonkeyPatch, vgg_files: dict[str, Any]) -> None:
    from torchvision.models import vgg

    taming = tamings("lpips", monkeypatch)
    features = vgg.make_layers(vgg.cfgs["D"])
    monkeypatch.setattr(taming.models, "vgg16", lambda **_: SimpleNamespace(features=features))
    monkeypatch.setattr(taming.LPIPS, "load_from_pretrained", lambda _: None)
    theirs = taming.LPIPS().eval()
    theirs.load_state_dict(vgg_files["full"])
    ours = lpips.LPIPS().eval()
    ours.load_state_dict(vgg_files["full"])
    a, b = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    b.requires_grad_(True)
    expected, actual = theirs(a, b), ours(a, b)
    assert_close(actual.detach(), expected.detach())
    assert_close(*(torch.autograd.grad(value.sum(), b)[0] for value in (actual, expected)), rel=1e-4)


def test_lpips_gradient_is_finite_on_flat_pictures(vgg_files: dict[str, Any]) -> None:
    network = lpips.LPIPS()
    network.load_state_dict({k: v.clamp(max=0) if "bias" in k else v for k, v in vgg_files["full"].items()})
    flat = (network.scaling_layer.shift + torch.zeros(1, 3, 32, 32)).requires_grad_(True)  # all features are 0
    network.eval()(flat, torch.rand(1, 3, 32, 32)).sum().backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()
