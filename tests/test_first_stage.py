"""First stages compute what the published ones do, whatever their options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage, VQModel, VQModelInterface
from ldm.models.first_stage import psnr
from ldm.modules.diffusionmodules.model import (
    Decoder,
    Downsample,
    Encoder,
    ResnetBlock,
    Upsample,
    get_timestep_embedding,
    make_attn,
)
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution, normal_kl
from ldm.util import ConfigError, freeze, instantiate_from_config
from tests.conftest import Golden, assert_close

DDCONFIG: dict[str, Any] = {
    "ch": 32,
    "out_ch": 3,
    "ch_mult": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "in_channels": 3,
    "resolution": 16,
    "z_channels": 4,
    "dropout": 0.0,
}
NO_LOSS = {"target": "torch.nn.Identity"}


def loaded(module: nn.Module, case: Golden) -> nn.Module:
    module.load_state_dict(case.sd)
    return freeze(module)


def small_kl(**options: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL({**DDCONFIG, "double_z": True}, NO_LOSS, embed_dim=4, **options)


def small_vq(cls: type[VQModel] = VQModel, **options: Any) -> VQModel:
    torch.manual_seed(0)
    return cls({**DDCONFIG, "double_z": False}, NO_LOSS, n_embed=16, embed_dim=4, **options)


# -- encoder and decoder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["encoder_doublez", "encoder_attnnone", "encoder_linattn_noresampconv"])
def test_encoder_reference(golden: Any, name: str) -> None:
    case = golden(name)
    assert_close(loaded(Encoder(**case.meta["init"]), case)(case["in.x"]), case["out"])


@pytest.mark.parametrize("name", ["decoder_plain", "decoder_preend", "decoder_linattn_noresampconv"])
def test_decoder_reference(golden: Any, name: str) -> None:
    case = golden(name)
    assert_close(loaded(Decoder(**case.meta["init"]), case)(case["in.z"]), case["out"])


def test_timestep_embedding_reference(golden: Any) -> None:
    case = golden("timestep_embedding")
    names = [name for name in case.tensors if name.startswith("out.get_timestep_embedding_")]
    assert len(names) >= 3
    for name in names:
        width = int(name.rsplit("_", 1)[1])
        assert_close(get_timestep_embedding(case["in.timesteps"], width), case[name], name=name)


def test_linear_attention_has_a_second_spelling() -> None:
    a = Encoder(**DDCONFIG, use_linear_attn=True).state_dict()
    b = Encoder(**DDCONFIG, attn_type="linear").state_dict()
    assert a.keys() == b.keys()
    assert "mid.attn_1.to_qkv.weight" in a


def test_unknown_attention_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'local'.*vanilla, linear, none"):
        make_attn(32, "local")


def test_tanh_out_stays_within_range() -> None:
    decoder = Decoder(**DDCONFIG, tanh_out=True)
    nn.init.constant_(decoder.conv_out.bias, 9.0)
    assert decoder(torch.randn(1, 4, 8, 8)).abs().max() <= 1.0


@pytest.mark.parametrize("conv_shortcut", [False, True])
def test_residual_block_adds_time_and_shortcut(conv_shortcut: bool) -> None:
    block = ResnetBlock(in_channels=32, out_channels=64, conv_shortcut=conv_shortcut, temb_channels=16)
    x, temb = torch.randn(2, 32, 4, 4), torch.randn(2, 16)
    assert block(x, temb).shape == (2, 64, 4, 4)
    assert not torch.equal(block(x, temb), block(x, 2 * temb))
    names = {name.split(".")[0] for name in block.state_dict()}
    assert ("conv_shortcut" in names, "nin_shortcut" in names) == (conv_shortcut, not conv_shortcut)
    for convolution in (block.conv2, block.conv_shortcut or block.nin_shortcut):
        nn.init.zeros_(convolution.weight)
        nn.init.zeros_(convolution.bias)
    assert not block(x, temb).any()


@pytest.mark.parametrize("with_conv", [False, True])
def test_resampling_sizes(with_conv: bool) -> None:
    x = torch.randn(1, 4, 6, 8)
    assert Downsample(4, with_conv)(x).shape == (1, 4, 3, 4)
    assert Upsample(4, with_conv)(x).shape == (1, 4, 12, 16)


# -- the KL model -----------------------------------------------------------------------------------------------------


def test_autoencoder_kl_reference(golden: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = golden("autoencoder_kl")
    model = loaded(AutoencoderKL(**case.meta["init"]), case)
    posterior = model.encode(case["in.x"])
    actual = {
        "moments": posterior.parameters,
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "mode": posterior.mode(),
        "kl": posterior.kl(),
        "sample": posterior.sample(noise=case["in.eps"]),
        "decode_mode": model.decode(posterior.mode()),
        "forward_mode": model(case["in.x"], sample_posterior=False)[0],
    }
    monkeypatch.setattr(torch, "randn", lambda *_, **__: case["in.eps"])
    actual["forward"] = model(case["in.x"])[0]
    assert set(actual) == {name.removeprefix("out.") for name in case.tensors if name.startswith("out.")}
    for name, value in actual.items():
        assert_close(value, case[f"out.{name}"], name=name)


def test_kl_model_needs_log_variances() -> None:
    with pytest.raises(ValueError, match="double_z: true"):
        AutoencoderKL({**DDCONFIG, "double_z": False}, NO_LOSS, embed_dim=4)


def test_misspelt_ddconfig_key_is_named() -> None:
    with pytest.raises(ConfigError, match="atn_type.*attn_type"):
        AutoencoderKL({**DDCONFIG, "atn_type": "none"}, NO_LOSS, embed_dim=4)


def test_other_sizes_than_the_training_resolution() -> None:
    model = freeze(small_kl())
    latent = model.encode(torch.randn(1, 3, 24, 40)).mode()
    assert latent.shape == (1, 4, 12, 20)
    assert model.decode(latent).shape == (1, 3, 24, 40)


def test_channels_last_changes_nothing() -> None:
    x = torch.randn(2, 3, 16, 16)
    expected = freeze(small_kl())(x, sample_posterior=False)[0]
    model = freeze(small_kl()).to(memory_format=torch.channels_last)
    actual = model(x.to(memory_format=torch.channels_last), sample_posterior=False)[0]
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert_close(actual, expected)


def test_autocast_keeps_the_posterior_in_full_precision() -> None:
    model = freeze(small_kl())
    x = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reconstruction, posterior = model(x, sample_posterior=False)
    assert posterior.mean.dtype == torch.float32
    assert_close(reconstruction.float(), model(x, sample_posterior=False)[0], rel=0.05)


def test_model_cast_to_half_stays_half() -> None:
    for model in (small_kl(), small_vq(VQModelInterface)):
        model = freeze(model).to(torch.bfloat16)
        encoded = model.encode(torch.randn(1, 3, 16, 16, dtype=torch.bfloat16))
        latent = encoded if isinstance(encoded, Tensor) else encoded.sample()
        assert latent.dtype == torch.bfloat16
        assert model.decode(latent).dtype == torch.bfloat16


def test_meta_device_build_allocates_nothing() -> None:
    with torch.device("meta"):
        for model in (small_kl(use_ema=True), small_vq(use_ema=True)):
            assert all(t.is_meta for t in model.state_dict().values())


# -- the Gaussian -----------------------------------------------------------------------------------------------------


def test_diagonal_gaussian_reference(golden: Any) -> None:
    case = golden("diagonal_gaussian")
    gaussian = DiagonalGaussianDistribution(case["in.parameters"])
    other = DiagonalGaussianDistribution(case["in.other_parameters"])
    point = DiagonalGaussianDistribution(case["in.parameters"], deterministic=True)
    kl_arguments = [case[f"in.nk{i}"] for i in range(4)]
    actual = {
        "sample": gaussian.sample(noise=case["in.eps"]),
        "mean": gaussian.mean,
        "logvar": gaussian.logvar,
        "std": gaussian.std,
        "var": gaussian.var,
        "mode": gaussian.mode(),
        "kl": gaussian.kl(),
        "kl_other": gaussian.kl(DiagonalGaussianDistribution(case["in.parameters"])),  # to an equal one: 0
        "kl_p2_p": other.kl(gaussian),
        "nll": other.nll(case["in.sample"]),
        "nll_dims12": other.nll(case["in.sample"], dims=[1, 2]),
        "det_std": point.std,
        "det_logvar": point.logvar,
        "det_kl": point.kl(),
        "det_nll": point.nll(case["in.sample"]),
        "normal_kl": normal_kl(*kl_arguments),
        "normal_kl_scalar": normal_kl(*kl_arguments[:2], 0.0, 0.0),
    }
    assert set(actual) == {name.removeprefix("out.") for name in case.tensors if name.startswith("out.")}
    for name, value in actual.items():
        assert_close(value, case[f"out.{name}"], name=name)


def test_gaussian_draws() -> None:
    gaussian = DiagonalGaussianDistribution(torch.zeros(1, 2, 40, 40))
    draws = [gaussian.sample(generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].std().item() == pytest.approx(1.0, abs=0.1)
    point = DiagonalGaussianDistribution(torch.ones(1, 2, 4, 4), deterministic=True)
    assert torch.equal(point.sample(), point.mean)


def test_normal_kl_needs_a_tensor() -> None:
    with pytest.raises(TypeError, match="at least one tensor"):
        normal_kl(0.0, 0.0, 1.0, 0.0)


# -- vector quantisation ----------------------------------------------------------------------------------------------


def test_vqmodel_reference(golden: Any) -> None:
    case = golden("vqmodel")
    model = loaded(VQModel(**case.meta["init"]), case)
    interface = loaded(VQModelInterface(**case.meta["init"]), case)
    x = case["in.x"]
    quant, loss, (nothing, nothing_too, indices) = model.encode(x)
    assert nothing is None
    assert nothing_too is None
    reconstruction, diff, predicted = model(x, return_pred_indices=True)
    latent = interface.encode(x)
    actual = {
        "encode.quant": quant,
        "encode.loss": loss,
        "encode.indices": indices,
        "prequant": model.encode_to_prequant(x),
        "forward.dec": reconstruction,
        "forward.diff": diff,
        "interface.encode": latent,
        "interface.decode": interface.decode(latent),
        "interface.decode_force_not_quantize": interface.decode(latent, force_not_quantize=True),
        "codebook_entry": model.quantize.get_codebook_entry(indices, shape=(2, 8, 8, 5)),
    }
    assert set(actual) == {name.removeprefix("out.") for name in case.tensors if name.startswith("out.")}
    for name, value in actual.items():
        assert_close(value, case[f"out.{name}"], name=name)
    assert torch.equal(predicted, indices)
    assert len(model(x)) == 2
    assert_close(model.decode_code(indices, shape=(2, 8, 8)), case["out.forward.dec"])
    assert_close(model.decode_code(indices.view(2, 8, 8)), case["out.forward.dec"])


VQ_CASES = ("legacy", "fixed_beta", "sane", "remap_extra", "remap_0", "remap_extra_sane")


@pytest.mark.parametrize("name", VQ_CASES)
def test_vector_quantizer_reference(golden: Any, name: str, tmp_path: Path) -> None:
    from taming.modules.vqvae.quantize import VectorQuantizer2

    case = golden("vector_quantizer")
    options = dict(case.meta["init"][name])
    if "remap" in options:
        np.save(tmp_path / "used.npy", case["in.used"].numpy())
        options["remap"] = str(tmp_path / "used.npy")
    quantize = VectorQuantizer2(**options)
    with torch.no_grad():
        quantize.embedding.weight.copy_(case["in.codebook"])
    z = case["in.z"].clone().requires_grad_(True)
    z_q, loss, (_, _, indices) = quantize(z)
    total = (z_q * case["in.cotangent"]).sum() + 3 * loss
    grad_z, grad_codebook = torch.autograd.grad(total, [z, quantize.embedding.weight])
    actual = {
        "z_q": z_q.detach(),
        "loss": loss.detach(),
        "indices": indices,
        "grad_z": grad_z,
        "grad_codebook": grad_codebook,
        "re_embed": torch.tensor(quantize.re_embed),
    }
    if "remap" in options:  # this sets unknown indices to 0 in place; the file holds the indices after it
        actual["codebook_entry"] = quantize.get_codebook_entry(indices, (2, 3, 5, 4)).detach()
    for key, value in actual.items():
        assert_close(value, case[f"{name}.{key}"], name=key)


def test_old_vector_quantizer_reference(golden: Any) -> None:
    from taming.modules.vqvae.quantize import VectorQuantizer

    case = golden("vector_quantizer")
    quantize = VectorQuantizer(16, 4, beta=0.25)
    with torch.no_grad():
        quantize.embedding.weight.copy_(case["in.codebook"])
        z_q, loss, (perplexity, encodings, indices) = quantize(case["in.z"])
    actual = {"z_q": z_q, "loss": loss, "perplexity": perplexity, "indices": indices, "min_encodings": encodings}
    for key, value in actual.items():
        assert_close(value, case[f"old.{key}"], name=key)


def test_vq_model_needs_single_channels() -> None:
    with pytest.raises(ValueError, match="double_z: false"):
        VQModel({**DDCONFIG, "double_z": True}, NO_LOSS, n_embed=16, embed_dim=4)


def test_remapped_codes_decode_and_stay_untouched(tmp_path: Path) -> None:
    np.save(tmp_path / "used.npy", np.array([3, 5, 9]))
    model = freeze(small_vq(remap=str(tmp_path / "used.npy"), sane_index_shape=True))
    x = torch.randn(2, 3, 16, 16)
    indices = model.encode(x)[2][2]
    assert indices.shape == (2, 8, 8)
    assert indices.max() < 3
    kept = indices.clone()
    assert model.decode_code(indices).shape == (2, 3, 16, 16)
    assert torch.equal(indices, kept)


def test_flat_codes_need_their_shape() -> None:
    with pytest.raises(ValueError, match=r"\(128,\).*shape=\(batch, height, width\)"):
        small_vq().decode_code(torch.zeros(128, dtype=torch.long))


def test_codes_do_not_depend_on_autocast() -> None:
    model = freeze(small_vq())
    h = torch.randn(2, 4, 8, 8)
    expected = model.quantize_latent(h)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = model.quantize_latent(h)
        quant, loss, _ = model.encode(torch.randn(2, 3, 16, 16))
    assert torch.equal(actual[2][2], expected[2][2])
    assert quant.dtype == loss.dtype == torch.float32


# -- the shell --------------------------------------------------------------------------------------------------------


def test_published_keys_bind() -> None:
    shared = {
        "ddconfig": {**DDCONFIG, "double_z": False},
        "lossconfig": NO_LOSS,
        "embed_dim": 4,
        "ckpt_path": None,
        "ignore_keys": [],
        "image_key": "image",
        "colorize_nlabels": 5,
        "monitor": "val/rec_loss",
    }
    vq = {
        "n_embed": 16,
        "batch_resize_range": None,
        "scheduler_config": None,
        "lr_g_factor": 1.0,
        "remap": None,
        "sane_index_shape": False,
        "use_ema": False,
    }
    kl = {**shared, "ddconfig": {**DDCONFIG, "double_z": True}}
    for name, params in (("AutoencoderKL", kl), ("VQModel", shared | vq), ("VQModelInterface", shared | vq)):
        model = instantiate_from_config({"target": f"ldm.models.autoencoder.{name}", "params": params})
        assert model.monitor == "val/rec_loss"
        assert model.learning_rate > 0
        assert model.colorize.shape == (3, 5, 1, 1)
    identity = instantiate_from_config({"target": "ldm.models.autoencoder.IdentityFirstStage"})
    x = torch.randn(1, 3, 4, 4)
    assert identity.encode(x) is identity.decode(x) is identity.quantize(x) is identity(x) is x
    assert IdentityFirstStage(vq_interface=True).quantize(x)[0] is x


@pytest.mark.parametrize("build", [small_kl, small_vq])
def test_weights_come_from_ckpt_path(build: Any, tmp_path: Path) -> None:
    source = build()
    with torch.no_grad():
        for p in source.parameters():
            p += 1.0
    torch.save({"state_dict": source.state_dict()}, tmp_path / "model.ckpt")
    model = build(ckpt_path=str(tmp_path / "model.ckpt"), ignore_keys=["decoder.conv_out"], use_ema=True)
    assert torch.equal(model.encoder.conv_in.weight, source.encoder.conv_in.weight)
    assert not torch.equal(model.decoder.conv_out.weight, source.decoder.conv_out.weight)
    with model.ema_scope():  # the averages start from what was loaded
        assert torch.equal(model.encoder.conv_in.weight, source.encoder.conv_in.weight)


def test_input_comes_from_the_image_key() -> None:
    model = small_kl(image_key="picture")
    x = model.get_input({"picture": torch.rand(2, 8, 6, 3, dtype=torch.float64)}, "picture")
    assert x.shape == (2, 3, 8, 6)
    assert x.dtype == torch.float32
    assert model.get_input({"picture": torch.rand(2, 8, 6)}, "picture").shape == (2, 1, 8, 6)
    with pytest.raises(ValueError, match="'picture'.*image, caption"):
        model.get_input({"image": x, "caption": x}, "picture")


def test_label_maps_are_coloured() -> None:
    labels = nn.functional.one_hot(torch.randint(0, 5, (2, 8, 8)), 5).permute(0, 3, 1, 2).float()
    picture = small_kl(colorize_nlabels=5).to_rgb(labels)
    assert picture.shape == (2, 3, 8, 8)
    assert picture.min() == -1.0
    assert picture.max() == 1.0
    with pytest.raises(ValueError, match="colorize_nlabels: 5"):
        small_kl().to_rgb(labels)
    assert small_kl().to_rgb(labels[:, :1]).shape == (2, 3, 8, 8)


def test_psnr_in_decibels() -> None:
    x = torch.zeros(2, 3, 4, 4)
    assert psnr(x, x + 0.2).item() == pytest.approx(20.0, abs=1e-3)
    assert psnr(x + 1.0, x + 3.0).item() == pytest.approx(100.0 + 10 * np.log10(4), abs=1e-3)


def test_folding_only_rearranges_the_latent():
    ddconfig = {"ch": 32, "num_res_blocks": 1, "ch_mult": [1, 1], "in_channels": 3, "resolution": 16, "z_channels": 4}
    config = {"ddconfig": ddconfig, "lossconfig": {"target": "torch.nn.Identity"}, "embed_dim": 4}
    plain, folded = AutoencoderKL(**config), AutoencoderKL(**config, fold=2)
    folded.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        posterior = folded.encode(x)
        assert posterior.mean.shape == (2, 16, 4, 4)
        expected = torch.nn.functional.pixel_unshuffle(plain.encode(x).mean, 2)
        assert_close(posterior.mean, expected)
        assert_close(folded.decode(posterior.mean), plain.decode(plain.encode(x).mean))
