"""LatentDiffusion against reference numbers, and its training behaviour."""

from __future__ import annotations

import copy
import json
import types
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ldm.models.diffusion import schedule
from ldm.models.diffusion.ancestral import AncestralSampler
from ldm.models.diffusion.ddpm import DiffusionWrapper, LatentDiffusion
from ldm.models.diffusion.loss import min_snr_weights, per_sample_loss
from ldm.models.diffusion.patches import PatchOptions, blend_patches, blending_weights
from ldm.modules.embedding_io import read_embeddings
from ldm.util import ConfigError, instantiate_from_config
from tests.conftest import END_TO_END, assert_close

RUN = json.loads((END_TO_END / "run_1vec.json").read_text())


def tiny_config(**overrides: Any) -> dict[str, Any]:
    config = copy.deepcopy(RUN["config"])
    config["params"]["cond_stage_config"]["params"]["vocab_file"] = str(END_TO_END / "vocab.txt")
    config["params"].update(overrides)
    return config


def tiny_model(**overrides: Any) -> LatentDiffusion:
    overrides.setdefault("ckpt_path", str(END_TO_END / "tiny_ldm.safetensors"))
    return instantiate_from_config(tiny_config(**overrides))


@pytest.mark.parametrize("case", ["hybrid", "concat", "adm"])
def test_wrapper_feeds_each_kind_of_conditioning(golden, case):
    ref = golden("diffusion_wrapper")
    spec = ref.meta["cases"][case]
    unet = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": spec["unet"]}
    wrapper = DiffusionWrapper(unet, spec["conditioning_key"]).eval()
    prefix = f"{case}.sd."
    wrapper.load_state_dict({k[len(prefix) :]: v for k, v in ref.tensors.items() if k.startswith(prefix)})
    kwargs: dict[str, list[torch.Tensor]] = {}
    for key in ("c_concat", "c_crossattn"):
        names = sorted(k for k in ref.tensors if k.startswith(f"{case}.{key}."))
        if names:
            kwargs[key] = [ref[k] for k in names]
    assert_close(wrapper(ref[f"{case}.x"], torch.tensor([10, 900]), **kwargs), ref[f"{case}.out"])


def test_wrapper_names_a_missing_conditioning():
    unet = {"target": "torch.nn.Identity"}
    with pytest.raises(ValueError, match="needs c_crossattn"):
        DiffusionWrapper(unet, "crossattn")(torch.zeros(1, 1, 2, 2), torch.zeros(1))
    with pytest.raises(ValueError, match="'cross'"):
        DiffusionWrapper(unet, "cross")


LOSS_CASES = [
    "eps", "x0", "eps_elbo", "x0_elbo", "eps_logvar", "eps_logvar_set", "x0_logvar_elbo_l1", "eps_l1", "eps_lsimple",
]  # fmt: skip


@pytest.mark.parametrize("case", LOSS_CASES)
def test_losses_and_their_gradients(golden, case):
    ref = golden("ldm_losses_and_steps")
    model = tiny_model(unfreeze_model=True, **ref.meta["cases"][case]).eval()
    if case == "eps_logvar_set":
        model.logvar.data = ref["in.logvar"].clone()
    for t in ("t", "t2"):
        c = ref["in.c"].clone().requires_grad_(True)
        model.zero_grad()
        loss, logs = model.p_losses(ref["in.x_start"], c, ref[f"in.{t}"], noise=ref["in.noise"])
        loss.backward()
        assert_close(loss.detach(), ref[f"{case}.{t}.loss"])
        assert_close(c.grad, ref[f"{case}.{t}.grad_c"])
        prefix = f"{case}.{t}.dict."
        expected = {k[len(prefix) :]: v for k, v in ref.tensors.items() if k.startswith(prefix)}
        assert set(logs) == set(expected)
        for name, value in expected.items():
            assert_close(logs[name], value, name=name)
        if f"{case}.{t}.grad_logvar" in ref.tensors:
            assert_close(model.logvar.grad, ref[f"{case}.{t}.grad_logvar"])


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return tiny_model().eval()


def test_single_steps(golden, model):
    ref = golden("ldm_losses_and_steps")
    x, noise, t2 = ref["in.x_start"], ref["in.noise"], ref["in.t2"]
    x_t = model.q_sample(x, t2, noise)
    assert_close(x_t, ref["q_sample"])
    with torch.no_grad():
        eps = model.apply_model(x_t, t2, ref["in.c"])
    assert_close(eps, ref["apply_model"])
    for name, value in zip(("mean", "var", "logvar"), schedule.q_mean_variance(model, x, t2), strict=True):
        assert_close(value, ref[f"q_mean_variance.{name}"], name=name)
    x0 = schedule.predict_start_from_noise(model, x_t, t2, noise)
    assert_close(x0, ref["predict_start_from_noise"])
    assert_close(schedule.predict_noise_from_start(model, x_t, t2, x), ref["predict_eps_from_xstart"])
    for name, value in zip(("mean", "var", "logvar_clipped"), schedule.q_posterior(model, x, x_t, t2), strict=True):
        assert_close(value, ref[f"q_posterior.{name}"], name=name)


def test_first_stage_encoding_and_decoding(golden, model):
    ref = golden("ldm_losses_and_steps")
    posterior = model.encode_first_stage(ref["in.image"])
    z = model.get_first_stage_encoding(posterior, noise=ref["in.posterior_eps"])
    assert_close(z, ref["get_first_stage_encoding"])
    with torch.no_grad():
        assert_close(model.decode_first_stage(z), ref["decode_first_stage"])


def test_patchwise_application(golden):
    ref = golden("ldm_losses_and_steps")
    options = {k: v for k, v in ref.meta["cases"]["split"].items() if k != "tie_braker"}
    model = tiny_model().eval()
    x, t = ref["in.split_x"], torch.tensor([300])
    for name, tie in (("split.apply_model", False), ("split.apply_model_tie", True)):
        model.split_input_params = PatchOptions(**options, tie_braker=tie)
        with torch.no_grad():
            assert_close(model.apply_model(x, t, ref["in.c"][:1]), ref[name], name=name)
    model.split_input_params = PatchOptions(**options)
    with torch.no_grad():
        assert_close(model.decode_first_stage(x), ref["split.decode_first_stage"])


def test_blending_weights(golden):
    ref = golden("ldm_losses_and_steps")
    options = PatchOptions(ks=(8, 8), stride=(4, 4), tie_braker=True)
    for name, factor in (("plain", 1), ("uf4", 4)):
        expected = ref[f"split.{name}.weighting"]
        kernel = (8 * factor, 8 * factor)
        weights = blending_weights(kernel, (2, 3), options)  # a 12 x 16 latent in patches of 8, stride 4
        assert_close(weights.view(expected.shape), expected)


def test_blending_identity_gives_the_input_back():
    x = torch.randn(2, 3, 20, 16)
    options = PatchOptions(ks=(8, 8), stride=(4, 4), tie_braker=True)
    assert_close(blend_patches(x, lambda patch, _: patch, options), x)


def test_ancestral_sampling(golden, model):
    ref = golden("ldm_losses_and_steps")
    # The published loop also draws (and multiplies by 0) the noise of the last step; here it is not drawn.
    draws = [d for k, d in enumerate(ref["p_sample_loop_T5_mask.noise"]) if k != 8]
    out, _ = AncestralSampler(model).sample(
        S=1000, batch_size=2, shape=(4, 8, 8), conditioning=ref["in.c"], x_T=ref["in.x_T"], timesteps=5, verbose=False,
        mask=ref["in.mask"], x0=ref["in.x_start"], noise=draws,
    )  # fmt: skip
    assert_close(out, ref["p_sample_loop_T5_mask"], 1e-4)


def test_inversion_replays_the_published_run():
    inputs = load_file(END_TO_END / "inputs.safetensors")
    expected = load_file(END_TO_END / "run_1vec.safetensors")
    captions = json.loads((END_TO_END / "inputs.json").read_text())["captions"]
    model = tiny_model().train()
    model.learning_rate = RUN["learning_rate"]
    optimizer = model.configure_optimizers()
    (vector,) = model.embedding_manager.embedding_parameters()
    assert_close(vector.detach(), expected["initial_embedding"][0])
    posterior = model.encode_first_stage(inputs["images"].permute(0, 3, 1, 2))
    for step in range(RUN["steps"]):
        z = model.get_first_stage_encoding(posterior, noise=inputs["posterior_noise"][step])
        c = model.get_learned_conditioning(captions[step])
        if step == 0:
            assert_close(z, expected["z_step0"])
            assert_close(c.detach(), expected["c_step0"])
        loss, logs = model.p_losses(z, c, inputs["t"][step], noise=inputs["noise"][step])
        optimizer.zero_grad()
        loss.backward()
        assert_close(loss.detach(), expected["loss"][step], 1e-4)
        assert_close(logs["train/loss_vlb"], expected["loss_vlb"][step], 1e-4)
        assert_close(vector.grad, expected["grad"][step][0], 1e-4)
        optimizer.step()
        assert_close(vector.detach(), expected["embedding"][step][0], 1e-4)
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        name for name, p in model.named_parameters() if p is vector
    ]


def test_only_the_vectors_train_in_an_inversion_and_its_checkpoint_is_small():
    model = tiny_model()
    model.train()
    assert not model.model.training
    assert not model.first_stage_model.training
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all(name.startswith("embedding_manager.") for name in trainable)
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    assert all(key.startswith("embedding_manager.") for key in checkpoint["state_dict"])
    assert not model.strict_loading


def test_tuning_the_model_along_has_its_own_rate():
    model = tiny_model(unfreeze_model=True, model_lr=1e-7)
    model.learning_rate = 0.02
    optimizer = model.configure_optimizers()
    assert [g["lr"] for g in optimizer.param_groups] == [0.02, 1e-7]
    tuned = {id(p) for p in optimizer.param_groups[1]["params"]}
    assert all(id(p) in tuned for p in model.model.parameters())
    assert all(id(p) in tuned for p in model.cond_stage_model.parameters())
    assert not any(p.requires_grad for p in model.first_stage_model.parameters())


def test_words_are_learned_at_a_constant_rate(caplog):
    params = {"warm_up_steps": [10], "cycle_lengths": [100], "f_start": [0.1], "f_max": [1.0], "f_min": [1.0]}
    rates = {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": params}
    model = tiny_model(scheduler_config=rates)
    model.learning_rate = 0.02
    for _ in range(2):
        assert [g["lr"] for g in model.configure_optimizers().param_groups] == [0.02]
    assert caplog.text.count("scheduler_config is not used") == 1
    plain = tiny_model(scheduler_config=rates, personalization_config=None)
    plain.learning_rate = 0.02
    (optimizer,), (schedule_,) = plain.configure_optimizers()
    assert schedule_["interval"] == "step"
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.002)


def test_validation_has_the_pull_towards_the_initial_vectors(monkeypatch):
    model = tiny_model(embedding_reg_weight=0.5).eval()
    with torch.no_grad():
        next(model.embedding_manager.embedding_parameters()).add_(0.1)
    logged: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(model, "log_dict", lambda logs, **_: logged.update(logs))
    batch = {"image": torch.rand(2, 32, 32, 3) * 2 - 1, "caption": ["a photo of *", "a painting of *"]}
    model.validation_step(batch, 0)
    pull = model.embedding_manager.embedding_to_coarse_loss()
    assert pull > 0
    assert_close(logged["val/loss_emb_reg"], pull.detach())
    assert_close(logged["val/loss_simple_ema"], logged["val/loss_simple"])
    assert_close(logged["val/loss"], logged["val/loss_simple"] + 0.5 * pull.detach())


def test_plain_training_needs_no_embedding_manager():
    model = tiny_model(personalization_config=None, ckpt_path=None, learn_logvar=True, conditioning_dropout=0.5)
    model.learning_rate = 1e-4
    count = sum(p.numel() for g in model.configure_optimizers().param_groups for p in g["params"])
    parts = (model.model, model.cond_stage_model)
    assert count == sum(p.numel() for part in parts for p in part.parameters()) + 1000
    batch = {"image": torch.rand(2, 32, 32, 3) * 2 - 1, "caption": ["a photo of a cat", "a painting"]}
    model.train()
    loss, logs = model.shared_step(batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert {"train/loss", "train/loss_simple", "train/loss_vlb", "train/loss_gamma", "logvar"} == set(logs)


def test_cached_moments_stand_for_pictures(model):
    image = torch.rand(2, 32, 32, 3) * 2 - 1
    posterior = model.encode_first_stage(image.permute(0, 3, 1, 2))
    torch.manual_seed(0)
    direct = model.get_latents({"image": image})
    torch.manual_seed(0)
    assert_close(model.get_latents({"moments": posterior.parameters}), direct)


def test_scale_by_std_is_one_factor_for_all_processes(monkeypatch):
    model = tiny_model(scale_by_std=True, personalization_config=None)
    batch = {"moments": torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))}
    drawn = []
    latents = model.get_latents
    monkeypatch.setattr(model, "get_latents", lambda b: drawn.append(latents(b)) or drawn[-1])
    monkeypatch.setattr(model, "all_gather", lambda z: torch.stack([z, 3 * z]))
    for world, everything in ((1, lambda z: z), (2, lambda z: torch.stack([z, 3 * z]))):
        model._trainer = types.SimpleNamespace(world_size=world, global_rank=0, global_step=0, current_epoch=0)
        model.scale_factor.fill_(1.0)
        model.on_train_batch_start(batch, 0)
        torch.testing.assert_close(model.scale_factor, 1 / everything(drawn[-1]).std())


def test_a_mask_of_ones_changes_nothing_and_zeros_hide_errors():
    prediction, target = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    plain = per_sample_loss(prediction, target, "l2")
    assert_close(per_sample_loss(prediction, target, "l2", torch.ones(2, 1, 8, 8)), plain)
    mask = torch.ones(2, 1, 8, 8)
    mask[:, :, :4] = 0
    prediction[:, :, :4] = 1e3
    assert per_sample_loss(prediction, target, "l2", mask).max() < 10


def test_min_snr_weights():
    acp = torch.tensor([0.99, 0.5, 0.01])
    snr = acp / (1 - acp)
    assert_close(min_snr_weights(acp, 5.0, "eps"), torch.tensor([5 / 99.0, 1.0, 1.0]))
    assert_close(min_snr_weights(acp, 5.0, "x0"), snr.clamp(max=5))
    assert_close(min_snr_weights(acp, 5.0, "v"), snr.clamp(max=5) / (snr + 1))


def test_velocity_model_is_the_same_model_read_differently():
    torch.manual_seed(0)
    x, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    model = tiny_model(parameterization="v", ckpt_path=None)
    v = model.training_target(x, noise, t)
    x_t = model.q_sample(x, t, noise)
    assert_close(schedule.predict_start_from_v(model, x_t, t, v), x, 1e-4)
    assert_close(schedule.predict_noise_from_v(model, x_t, t, v), noise, 1e-4)


def test_timestep_shift_draws_noisier_steps_in_training_only():
    model = tiny_model(ckpt_path=None, timestep_shift=3.0)
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    torch.manual_seed(0)
    drawn = model.train().draw_timesteps(20_000)
    assert_close(drawn.float().quantile(quantiles), 1000 * 3 * quantiles / (1 + 2 * quantiles), 0.02)
    assert drawn.dtype == torch.int64
    assert drawn.max() < 1000
    assert_close(model.eval().draw_timesteps(20_000).float().quantile(quantiles), 1000 * quantiles, 0.02)
    with pytest.raises(ValueError, match="timestep_shift must be positive .*, got 0"):
        tiny_model(timestep_shift=0)


def test_published_options_may_be_off():
    off = {"use_positional_encodings": False, "ucg_training": None, "make_it_fit": False, "reset_ema": False,
           "reset_num_ema_updates": False, "cond_stage_forward": None, "num_timesteps_cond": 1}  # fmt: skip
    tiny_model(**off)
    for name in off:
        with pytest.raises(ConfigError, match=f"{name}=other"):
            LatentDiffusion(**{**tiny_config()["params"], name: "other"})


def test_words_to_start_from_may_be_named_where_published():
    params = tiny_config()["params"]["personalization_config"]

    def start(inner, **outer):
        config = {**params, "params": {**params["params"], "embedding_manager_ckpt": inner}}
        return tiny_model(personalization_config=config, **outer).embedding_manager.string_to_param_dict["*"]

    learned = str(END_TO_END / "embeddings_1vec.pt")
    vectors = read_embeddings(learned).vectors["*"]
    assert torch.equal(start(learned), vectors)
    assert torch.equal(start("gone.pt", embedding_manager_ckpt=learned), vectors)
    for nothing in ("", None):
        assert not torch.equal(start(nothing), vectors)
    with pytest.raises(FileNotFoundError, match="gone.pt"):
        start("gone.pt")


def test_config_mistakes_are_named():
    with pytest.raises(ConfigError, match="'chanels' is not a parameter.*did you mean 'channels'"):
        tiny_model(chanels=4)
    with pytest.raises(ConfigError, match="num_timesteps_cond=5"):
        tiny_model(num_timesteps_cond=5)
    with pytest.raises(ConfigError, match="ucg_training={'txt': 1}: this published option is not supported"):
        tiny_model(ucg_training={"txt": 1})
    with pytest.raises(ValueError, match="'velocity'"):
        tiny_model(parameterization="velocity")
    with pytest.raises(ConfigError, match="conditioning_dropout is a probability between 0 and 1, got 2"):
        tiny_model(conditioning_dropout=2)
    with pytest.raises(ValueError, match="the batch has no 'image'"):
        tiny_model().get_latents({"picture": torch.zeros(1)})
