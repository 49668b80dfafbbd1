"""Samplers: reference trajectories, exact solutions on Gaussian data, and what holds for any model."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ldm.models.diffusion import schedule
from ldm.models.diffusion.ancestral import AncestralSampler
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import SPACINGS, DPMSolverSampler
from ldm.models.diffusion.guidance import Guidance, join_conditioning
from ldm.models.diffusion.plms import PLMSSampler
from ldm.util import instantiate_from_config
from tests.conftest import END_TO_END, assert_close

ALL = (DDIMSampler, PLMSSampler, DPMSolverSampler, AncestralSampler)
SHAPE = (4, 8, 8)


class TinyModel:
    """Denoiser around the UNet of the reference runs."""

    parameterization = "eps"
    num_timesteps = 1000
    device = torch.device("cpu")

    def __init__(self):
        config = json.loads((END_TO_END / "run_1vec.json").read_text())["config"]["params"]
        weights = load_file(END_TO_END / "tiny_ldm.safetensors")
        self.unet = instantiate_from_config(config["unet_config"]).eval()
        prefix = "model.diffusion_model."
        self.unet.load_state_dict({k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)})
        betas = schedule.make_beta_schedule("linear", 1000, config["linear_start"], config["linear_end"])
        self.__dict__ |= schedule.diffusion_buffers(betas)

    def apply_model(self, x, t, cond):
        return self.unet(x, t, context=cond)


@pytest.fixture(scope="module")
def tiny():
    return TinyModel()


class Gaussian:
    """Exact denoiser of data N(mu, s^2) per entry: its probability flow has a closed form."""

    device = torch.device("cpu")

    def __init__(self, mu=0.7, s=0.3, parameterization="eps", timesteps=1000, rescaled=False):
        betas = schedule.make_beta_schedule("linear", timesteps, 0.00085 * 1000 / timesteps, 0.012 * 1000 / timesteps)
        if rescaled:
            betas = schedule.rescale_zero_terminal_snr(betas)
        self.__dict__ |= schedule.diffusion_buffers(betas, parameterization)
        self.num_timesteps, self.parameterization, self.mu, self.s = timesteps, parameterization, mu, s
        self.calls = 0

    def acp(self, t):
        log_acp = np.log(np.maximum(self.alphas_cumprod.double().numpy(), 1e-300))
        found = np.exp(np.interp(t.double().numpy(), np.arange(self.num_timesteps), log_acp))
        return torch.from_numpy(found).float().view(-1, 1, 1, 1)

    def apply_model(self, x, t, cond):
        self.calls += 1
        a = self.acp(t)
        mu = self.mu if cond is None else cond.view(-1, 1, 1, 1)
        x0 = mu + a.sqrt() * self.s**2 / (a * self.s**2 + 1 - a) * (x - a.sqrt() * mu)
        eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
        return {"x0": x0, "eps": eps, "v": a.sqrt() * eps - (1 - a).sqrt() * x0}[self.parameterization]

    def flow(self, x, a_from, a_to):
        """Exact solution of the probability flow from level a_from to a_to."""
        spread = [(a * self.s**2 + 1 - a) ** 0.5 for a in (a_from, a_to)]
        return a_to**0.5 * self.mu + (x - a_from**0.5 * self.mu) * spread[1] / spread[0]


# -- reference numbers ---------------------------------------------------------------------------------------------

RUNS = {
    "ddim_S10_cfg5": (DDIMSampler, {"S": 10}, 5),
    "ddim_S10_nocfg": (DDIMSampler, {"S": 10}, 1),
    "ddim_S10_eta1_cfg3": (DDIMSampler, {"S": 10, "eta": 1.0}, 3),
    "ddim_S7_eta05_temp07": (DDIMSampler, {"S": 7, "eta": 0.5, "temperature": 0.7}, 1),
    "plms_S10_cfg5": (PLMSSampler, {"S": 10}, 5),
    "plms_S5_nocfg": (PLMSSampler, {"S": 5}, 1),
}


@pytest.mark.parametrize("name", RUNS)
def test_published_trajectories(golden, tiny, name):
    case = golden("samplers_tiny_ldm")
    sampler, options, scale = RUNS[name]
    samples, log = sampler(tiny).sample(
        batch_size=2,
        shape=SHAPE,
        conditioning=case["in.c"],
        x_T=case["in.x_T"],
        noise=case.tensors.get(f"{name}.noise"),
        unconditional_guidance_scale=scale,
        unconditional_conditioning=case["in.uc"],
        log_every_t=1,
        verbose=False,
        **options,
    )
    assert_close(samples, case[f"{name}.samples"], 1e-4, name)
    for key in ("x_inter", "pred_x0"):
        assert_close(torch.stack(log[key]), case[f"{name}.{key}"], 1e-4, f"{name}.{key}")


@pytest.mark.parametrize(
    ("name", "sampler", "steps", "noise"),
    [
        # the published sampler drew a second time per step, for noise that it multiplied by 0
        ("ddim_S10_mask", DDIMSampler, 10, lambda case: case["ddim_S10_mask.noise"][::2]),
        ("plms_S5_mask", PLMSSampler, 5, lambda case: case["plms_S5_mask.q_noise"]),
    ],
)
def test_published_masks(golden, tiny, name, sampler, steps, noise):
    case = golden("samplers_tiny_ldm")
    common = {
        "S": steps,
        "batch_size": 2,
        "shape": SHAPE,
        "conditioning": case["in.c"],
        "x_T": case["in.x_T"],
        "mask": case["in.mask"],
        "x0": case["in.x0"],
        "log_every_t": 1,
        "verbose": False,
    }
    samples, log = sampler(tiny).sample(**common, noise=noise(case))
    assert_close(samples, case[f"{name}.samples"], 1e-4, name)
    assert_close(torch.stack(log["x_inter"]), case[f"{name}.x_inter"], 1e-4, name)


@pytest.mark.parametrize("t", [3, 7])
def test_published_encode_decode(golden, tiny, t):
    case = golden("samplers_tiny_ldm")
    sampler = DDIMSampler(tiny)
    sampler.make_schedule(10, ddim_eta=0.0, verbose=False)
    latent = sampler.stochastic_encode(case["in.x0"], torch.tensor([t, t]), noise=case["in.enc_noise"])
    assert_close(latent, case[f"stochastic_encode.t{t}"])
    assert_close(sampler.decode(latent, case["in.c"], t), case[f"decode.t{t}"], 1e-4)
    guided = sampler.decode(
        latent, case["in.c"], t, unconditional_guidance_scale=5.0, unconditional_conditioning=case["in.uc"]
    )
    assert_close(guided, case[f"decode_cfg5.t{t}"], 1e-4)


def test_published_encode_with_original_steps(golden, tiny):
    case = golden("samplers_tiny_ldm")
    sampler = DDIMSampler(tiny)
    sampler.make_schedule(10)
    latent = sampler.stochastic_encode(
        case["in.x0"], torch.tensor([300, 300]), use_original_steps=True, noise=case["in.enc_noise"]
    )
    assert_close(latent, case["stochastic_encode_orig.t300"])


@pytest.mark.parametrize("timesteps", [3, 10])
def test_published_partial_chain(golden, tiny, timesteps):
    case = golden("samplers_tiny_ldm")
    sampler = DDIMSampler(tiny)
    sampler.make_schedule(10)
    samples, _ = sampler.ddim_sampling(case["in.c"], (2, *SHAPE), x_T=case["in.x_T"], timesteps=timesteps)
    assert_close(samples, case[f"ddim_sampling_timesteps{timesteps}"], 1e-4)


@pytest.mark.parametrize(("chain", "timesteps", "steps"), [(50, 28, 27), (50, 29, 27), (50, 60, 49), (50, 1, 0)])
def test_published_count_of_a_partial_chain(chain, timesteps, steps):
    model = Gaussian()
    sampler = DDIMSampler(model)
    sampler.make_schedule(chain)
    sampler.ddim_sampling(None, (1, *SHAPE), timesteps=timesteps)
    assert model.calls == steps


def test_published_ddim_attributes(golden):
    case = golden("ddim_parameters")
    betas = schedule.make_beta_schedule("linear", 1000, 0.00085, 0.012)
    model = SimpleNamespace(num_timesteps=1000, **schedule.diffusion_buffers(betas))
    sampler = DDIMSampler(model)
    seen = set()
    for key, expected in case.tensors.items():
        parts = key.replace(".eta0.", ".eta0_").replace(".eta1.", ".eta1_").split(".")
        if len(parts) == 4:
            discretize, steps, eta, attribute = parts
            seen.add(attribute)
            sampler.make_schedule(int(steps[1:]), discretize, float(eta[3:].replace("_", ".")), verbose=False)
            value = getattr(sampler, attribute)
            kind = f"{type(value).__module__}.{type(value).__name__} {value.dtype}".removeprefix("torch.Tensor ")
            assert kind.split()[-1] == case.meta["attribute_types"][attribute].split()[-1]
            assert_close(value, expected, 1e-5, key)
    assert seen == set(case.meta["attribute_types"])


def test_published_ancestral_chain_with_mask(golden, tiny):
    case = golden("ldm_losses_and_steps")
    samples, _ = AncestralSampler(tiny).sample(
        S=1000,
        batch_size=2,
        shape=SHAPE,
        conditioning=case["in.c"],
        x_T=case["in.x_T"],
        timesteps=5,
        mask=case["in.mask"],
        x0=case["in.x_start"],
        noise=[n for k, n in enumerate(case["p_sample_loop_T5_mask.noise"]) if k != 8],  # the last step adds none
        verbose=False,
    )
    assert_close(samples, case["p_sample_loop_T5_mask"], 1e-4)


# -- exact solutions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
@pytest.mark.parametrize(
    ("sampler", "steps", "tolerance"),
    [(DDIMSampler, 500, 0.015), (PLMSSampler, 50, 0.01), (DPMSolverSampler, 50, 0.003)],
)
def test_converges_to_the_probability_flow(sampler, steps, tolerance, parameterization):
    model = Gaussian(parameterization=parameterization)
    x_T = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    solver = sampler(model)
    found, _ = solver.sample(steps, 3, SHAPE, x_T=x_T, verbose=False)
    exact = model.flow(x_T, float(solver.grid.alphas[-1]), float(solver.grid.alphas_prev[0]))
    assert (found - exact).abs().max() < tolerance


@pytest.mark.parametrize("spacing", SPACINGS)
def test_dpm_solver_ends_at_the_first_trained_step(spacing):
    model = Gaussian()
    x_T = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    exact = model.flow(x_T, float(model.alphas_cumprod[-1]), float(model.alphas_cumprod[0]))
    errors = []
    for steps in (16, 64, 256):
        solver = DPMSolverSampler(model, spacing)
        found, _ = solver.sample(steps, 2, SHAPE, x_T=x_T, verbose=False)
        assert float(solver.grid.alphas_prev[0]) == pytest.approx(float(model.alphas_cumprod[0]), rel=1e-9)
        errors.append((found - exact).abs().max().item())
    assert model.calls == 16 + 64 + 256
    assert errors[0] / errors[1] > (2 if spacing == "time_uniform" else 8), errors
    assert errors[2] < (0.02 if spacing == "time_uniform" else 1e-3)


def test_dpm_solver_agrees_with_ddim(tiny, golden):
    case = golden("samplers_tiny_ldm")
    common = {"batch_size": 2, "shape": SHAPE, "conditioning": case["in.c"], "x_T": case["in.x_T"], "verbose": False}
    fine, _ = DDIMSampler(tiny).sample(S=200, **common)
    coarse, _ = DPMSolverSampler(tiny).sample(S=25, **common)
    assert (fine - coarse).abs().mean() < 0.1 * fine.abs().mean()


@pytest.mark.parametrize("steps", [1000, 100])
def test_ancestral_draws_have_the_moments_of_the_data(steps):
    model = Gaussian(mu=0.7, s=0.3)
    found, _ = AncestralSampler(model).sample(steps, 16, (1, 16, 16), seeds=range(16), verbose=False)
    assert found.mean().item() == pytest.approx(0.7, abs=0.02)
    assert found.std().item() == pytest.approx(0.3, abs=0.03)


def test_ancestral_clips_only_when_asked():
    model = Gaussian(mu=2.0, s=0.1)
    common = {"S": 50, "batch_size": 1, "shape": SHAPE, "seeds": [0], "verbose": False}
    assert AncestralSampler(model).sample(**common)[0].mean() > 1.9
    assert AncestralSampler(model, clip_denoised=True).sample(**common)[0].max() <= 1.0


@pytest.mark.parametrize("sampler", [DDIMSampler, DPMSolverSampler])
def test_zero_terminal_snr_model(sampler):
    model = Gaussian(parameterization="v", rescaled=True)
    found, _ = sampler(model).sample(1000 if sampler is DDIMSampler else 40, 2, SHAPE, seeds=[0, 1], verbose=False)
    assert torch.isfinite(found).all()
    chain = sampler(model)
    chain.make_schedule(10)
    assert chain.current_grid().alphas[-1] == 0  # it begins where there is noise alone
    assert found.mean().item() == pytest.approx(0.7, abs=0.1)
    with pytest.raises(ValueError, match="use ddim"):
        PLMSSampler(model).sample(1000, 1, SHAPE, verbose=False)


@pytest.mark.parametrize("original", [False, True])
def test_inversion_leads_back(original):
    model = Gaussian(timesteps=1000)
    sampler = DDIMSampler(model)
    sampler.make_schedule(200)
    x0 = 0.7 + 0.3 * torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    count = 900 if original else 180
    latent, log = sampler.encode(x0, None, count, use_original_steps=original)
    assert len(log["x_inter"]) == count + 1
    assert abs(latent.std().item() - 1) < 0.2
    assert torch.equal(latent, sampler.encode(x0, None, count, use_original_steps=original)[0])
    back = sampler.decode(latent, None, count, use_original_steps=original)
    assert (back - x0).abs().max() < (0.03 if original else 0.08)


# -- properties ----------------------------------------------------------------------------------------------------


def quick(sampler, model, **options):
    defaults = {"S": 4, "batch_size": 2, "shape": SHAPE, "verbose": False}
    return sampler(model).sample(**{**defaults, **options})


@pytest.mark.parametrize("sampler", ALL)
def test_guidance_scale_one_is_no_guidance(sampler):
    model = Gaussian()
    cond, uncond = torch.tensor([[0.5], [0.1]]), torch.tensor([[-0.5], [0.4]])
    plain, _ = quick(sampler, model, conditioning=cond, seeds=[1, 2])
    calls = model.calls
    guided, _ = quick(
        sampler,
        model,
        conditioning=cond,
        unconditional_conditioning=uncond,
        unconditional_guidance_scale=1.0,
        seeds=[1, 2],
    )
    assert torch.equal(plain, guided)
    assert model.calls == 2 * calls


@pytest.mark.parametrize("sampler", ALL)
def test_equal_prompts_need_no_guidance(sampler):
    model = Gaussian()
    cond = torch.tensor([[0.5], [0.1]])
    plain, _ = quick(sampler, model, conditioning=cond, seeds=[1, 2])
    guided, _ = quick(
        sampler,
        model,
        conditioning=cond,
        unconditional_conditioning=cond,
        unconditional_guidance_scale=7.0,
        guidance_rescale=0.7,
        seeds=[1, 2],
    )
    torch.testing.assert_close(plain, guided, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", ALL)
def test_guidance_moves_towards_the_prompt(sampler):
    cond, uncond = torch.full((2, 1), 0.5), torch.full((2, 1), 0.0)
    means = [
        quick(
            sampler,
            Gaussian(),
            S=20,
            conditioning=cond,
            unconditional_conditioning=uncond,
            unconditional_guidance_scale=scale,
            seeds=[1, 2],
        )[0].mean()
        for scale in (0.0, 1.0, 2.0)
    ]
    assert means[0] < means[1] < means[2]


@pytest.mark.parametrize("sampler", ALL)
@settings(deadline=None, max_examples=10)
@given(sizes=st.permutations([1, 2, 3]), first=st.integers(0, 2**32))
def test_a_seed_means_one_picture_whatever_the_batch(sampler, sizes, first):
    options = {"eta": 1.0} if sampler is DDIMSampler else {}
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    seeds = list(range(first, first + 6))
    whole, _ = quick(sampler, Gaussian(), batch_size=6, seeds=seeds, mask=mask, x0=torch.ones(1, *SHAPE), **options)
    parts = []
    for size in sizes:
        part, seeds = seeds[:size], seeds[size:]
        parts.append(
            quick(sampler, Gaussian(), batch_size=size, seeds=part, mask=mask, x0=torch.ones(1, *SHAPE), **options)[0]
        )
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler", ALL)
def test_recorded_noise_replays(sampler):
    draws = []

    def record(shape):
        draws.append(torch.randn(tuple(shape)))
        return draws[-1]

    options = {"eta": 0.5} if sampler is DDIMSampler else {}
    first, _ = quick(sampler, Gaussian(), noise=record, **options)
    again, _ = quick(sampler, Gaussian(), noise=draws, **options)
    assert torch.equal(first, again)
    with pytest.raises(ValueError, match="ran out"):
        quick(sampler, Gaussian(), noise=draws[:-1], **options)
    generator = torch.Generator().manual_seed(3)
    once, _ = quick(sampler, Gaussian(), noise=generator, **options)
    assert torch.equal(once, quick(sampler, Gaussian(), noise=generator.manual_seed(3), **options)[0])


@pytest.mark.parametrize(
    ("sampler", "options", "draws"),
    [
        (DDIMSampler, {}, 1),
        (DDIMSampler, {"eta": 1.0}, 5),
        (DDIMSampler, {"eta": 1.0, "temperature": 0.0}, 1),
        (PLMSSampler, {}, 1),
        (DPMSolverSampler, {}, 1),
        (AncestralSampler, {}, 4),  # the last step adds none
        (DDIMSampler, {"mask": torch.ones(1, 1, 8, 8), "x0": torch.zeros(1, *SHAPE)}, 5),
    ],
)
def test_noise_is_drawn_only_where_used(sampler, options, draws):
    count = 0

    def counting(shape):
        nonlocal count
        count += 1
        return torch.randn(tuple(shape))

    quick(sampler, Gaussian(), noise=counting, **options)
    assert count == draws


@pytest.mark.parametrize("sampler", ALL)
def test_mask_keeps_what_it_covers(sampler):
    x0 = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(5))
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, :3] = 1
    pasted, _ = quick(sampler, Gaussian(), mask=mask, x0=x0, seeds=[0, 1], paste_x0=True)
    assert torch.equal(pasted[:, :, :3], x0[:, :, :3])
    free, _ = quick(sampler, Gaussian(), seeds=[0, 1])
    assert not torch.allclose(pasted[:, :, 3:], x0[:, :, 3:])
    assert torch.isfinite(free).all()


@pytest.mark.parametrize("sampler", ALL)
def test_callbacks_and_log(sampler):
    seen, pictures = [], []
    _, log = quick(
        sampler,
        Gaussian(),
        S=10,
        callback=seen.append,
        img_callback=lambda pred_x0, n: pictures.append((n, pred_x0)),
        log_every_t=4,
    )
    assert seen == list(range(10))
    assert [n for n, _ in pictures] == seen
    assert len(log["x_inter"]) == len(log["pred_x0"]) == 1 + 4  # the start and the indices 9, 8, 4, 0
    assert torch.equal(log["pred_x0"][-1], pictures[-1][1])


@pytest.mark.parametrize("sampler", ALL)
def test_no_gradients_and_global_state_untouched(sampler):
    state = torch.random.get_rng_state()
    cond = torch.zeros(2, 1, requires_grad=True)
    samples, _ = quick(sampler, Gaussian(), conditioning=cond, seeds=[0, 1])
    assert not samples.requires_grad
    assert torch.equal(state, torch.random.get_rng_state())


def test_quantized_estimates():
    model = Gaussian()
    with pytest.raises(ValueError, match="codebook"):
        quick(DDIMSampler, model, quantize_x0=True)
    model.first_stage_model = SimpleNamespace(quantize=lambda z: (z.round(), None, None))
    for sampler in (DDIMSampler, PLMSSampler):
        _, log = quick(sampler, model, quantize_x0=True, log_every_t=1)
        assert torch.equal(torch.stack(log["pred_x0"][1:]), torch.stack(log["pred_x0"][1:]).round())


def test_noise_dropout_keeps_the_mean_and_follows_the_seed():
    options = {"eta": 1.0, "seeds": [3, 4], "noise_dropout": 0.5}
    first, _ = quick(DDIMSampler, Gaussian(), **options)
    assert torch.equal(first, quick(DDIMSampler, Gaussian(), **options)[0])
    assert not torch.equal(first, quick(DDIMSampler, Gaussian(), **(options | {"noise_dropout": 0.0}))[0])


def test_conditioning_forms_are_joined():
    a, b = torch.zeros(2, 3, 5), torch.ones(2, 3, 5)
    image = torch.full((2, 1, 4, 4), 7.0)
    assert join_conditioning(None, None) is None
    assert torch.equal(join_conditioning(a, b), torch.cat([a, b]))
    assert torch.equal(join_conditioning([a], [b])[0], torch.cat([a, b]))
    joined = join_conditioning({"c_crossattn": [a]}, {"c_crossattn": [b], "c_concat": [image]})
    assert torch.equal(joined["c_crossattn"][0], torch.cat([a, b]))
    assert torch.equal(joined["c_concat"][0], torch.cat([image, image]))
    with pytest.raises(ValueError, match="same length"):
        join_conditioning(a, b[:, :2])
    with pytest.raises(TypeError, match="same form"):
        join_conditioning(a, {"c_crossattn": [b]})


def test_guidance_rescale_restores_the_spread():
    class Two(Gaussian):
        def apply_model(self, x, t, cond):
            return cond * torch.ones_like(x).cumsum(-1)

    cond, uncond = torch.full((2, 1, 1, 1), 2.0), torch.full((2, 1, 1, 1), 1.0)
    x, t = torch.zeros(2, *SHAPE), torch.zeros(2)
    plain = Guidance(cond)(Two(), x, t)
    rescaled = Guidance(cond, uncond, 7.0, 1.0)(Two(), x, t)
    torch.testing.assert_close(rescaled.std((1, 2, 3)), plain.std((1, 2, 3)))


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (PLMSSampler, {"eta": 1.0}, "ddim_eta must be 0 for PLMS"),
        (DPMSolverSampler, {"eta": 0.5}, "must be 0"),
        (AncestralSampler, {"eta": 0.5}, "use the ddim sampler"),
        (DDIMSampler, {"eta": -1.0}, "negative"),
        (DDIMSampler, {"S": 2000}, "from 1 to 1000"),
        (DPMSolverSampler, {"S": 0}, "1 to 999"),
        (DDIMSampler, {"seeds": [1]}, "one seed per sample"),
        (DDIMSampler, {"seeds": [1, 2], "noise": torch.randn}, "not both"),
        (DDIMSampler, {"x_T": torch.zeros(1, *SHAPE)}, "x_T has shape"),
        (DDIMSampler, {"conditioning": torch.zeros(3, 1)}, "batch size 3 for 2"),
        (DDIMSampler, {"mask": torch.ones(1, 1, 8, 8)}, "go together"),
        (DDIMSampler, {"noise": lambda shape: torch.zeros(1)}, "noise source gave"),
        (DDIMSampler, {"guidance_rescale": 2.0}, "guidance_rescale"),
        (DDIMSampler, {"ddim_discretize": "even"}, "'uniform', 'quad' or 'trailing'"),
    ],
)
def test_bad_input_is_named(sampler, options, message):
    with pytest.raises(ValueError, match=message):
        quick(sampler, Gaussian(), **options)


def test_chain_must_be_chosen_first():
    with pytest.raises(ValueError, match="make_schedule"):
        DDIMSampler(Gaussian()).decode(torch.zeros(1, *SHAPE), None, 3)
    with pytest.raises(ValueError, match="spacing"):
        DPMSolverSampler(Gaussian(), "sigma")
