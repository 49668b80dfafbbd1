"""Noise schedules: reference numbers, and the relations that hold for any schedule."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.models.diffusion import schedule as S
from tests.conftest import assert_close

SCHEDULE_KEYS = ("timesteps", "beta_schedule", "linear_start", "linear_end", "cosine_s")


def buffers_for(**options):
    args = {"timesteps": 1000, "beta_schedule": "linear", "linear_start": 1e-4, "linear_end": 2e-2, "cosine_s": 8e-3}
    args |= {k: v for k, v in options.items() if k in SCHEDULE_KEYS}
    betas = S.make_beta_schedule(
        args["beta_schedule"], args["timesteps"], args["linear_start"], args["linear_end"], args["cosine_s"]
    )
    return betas, S.diffusion_buffers(betas, options.get("parameterization", "eps"), options.get("v_posterior", 0.0))


def test_published_schedules(golden):
    case = golden("schedules")
    for name, options in case.meta["init"].items():
        betas, buffers = buffers_for(**options)
        assert set(buffers) == {*options["persistent"], "lvlb_weights"}
        for key, value in case.tensors.items():
            prefix, _, leaf = key.partition(".")
            if prefix == name:
                actual = torch.from_numpy(betas) if leaf == "make_beta_schedule_f64" else buffers[leaf]
                assert actual.dtype == value.dtype
                assert_close(actual, value, 1e-6, key)


def test_published_ddim_parameters(golden):
    case = golden("ddim_parameters")
    for key, expected in case.tensors.items():
        parts = key.split(".")
        if len(parts) == 2 and parts[0] in ("uniform", "quad"):
            assert_close(S.make_ddim_timesteps(parts[0], int(parts[1][1:]), 1000), expected, name=key)
    for count in case.meta["uniform_index_error_for_S"]:
        steps = S.make_ddim_timesteps("uniform", count, 1000)
        stride = 1000 // count
        assert steps[-1] == 999
        assert np.array_equal(steps[:-1], np.arange(1, 1000, stride)[: len(steps) - 1])


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_published_ddim_function(golden, eta):
    case = golden("ddim_parameters")
    acp = buffers_for(linear_start=0.00085, linear_end=0.012)[1]["alphas_cumprod"]
    found = S.make_ddim_sampling_parameters(acp, S.make_ddim_timesteps("uniform", 10, 1000), eta)
    for actual, leaf in zip(found, ("sigmas", "alphas", "alphas_prev"), strict=True):
        matches = [k for k in case.tensors if k.startswith(f"fn.eta{eta}") and k.endswith("." + leaf)]
        assert matches
        assert_close(actual, case[matches[0]], 1e-6, matches[0])


schedules = st.fixed_dictionaries(
    {
        "beta_schedule": st.sampled_from(S.BETA_SCHEDULES),
        "timesteps": st.integers(2, 200),
        "linear_start": st.floats(1e-5, 1e-3),
        "linear_end": st.floats(2e-3, 0.1),
        "v_posterior": st.floats(0, 1),
        "parameterization": st.sampled_from(S.PARAMETERIZATIONS),
    }
)


@settings(deadline=None, max_examples=50)
@given(schedules)
def test_any_schedule_is_sound(options):
    betas, buffers = buffers_for(**options)
    assert betas.dtype == np.float64
    assert betas.shape == (options["timesteps"],)
    assert ((betas > 0) & (betas < 1)).all()
    assert (np.diff(np.cumprod(1 - betas)) < 0).all()
    for name, value in buffers.items():
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all(), name


@settings(deadline=None, max_examples=50)
@given(schedules, st.integers(0, 2**31))
def test_conversions_invert_each_other(options, seed):
    options["parameterization"] = "v"
    betas, tables = buffers_for(**options)
    # float64 keeps the test about the algebra, not about rounding
    acp = np.cumprod(1 - betas)
    fine = {
        "sqrt_alphas_cumprod": acp**0.5,
        "sqrt_one_minus_alphas_cumprod": (1 - acp) ** 0.5,
        "sqrt_recip_alphas_cumprod": acp**-0.5,
        "sqrt_recipm1_alphas_cumprod": (1 / acp - 1) ** 0.5,
    }
    b = SimpleNamespace(**{k: torch.from_numpy(v) for k, v in fine.items()})
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.randint(0, len(betas), (3,), generator=generator)
    x_t = S.q_sample(b, x0, t, eps)
    v = S.get_v(b, x0, eps, t)

    def close(a, e):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)

    close(S.predict_start_from_v(b, x_t, t, v), x0)
    close(S.predict_noise_from_v(b, x_t, t, v), eps)
    # x_0 from eps is ill conditioned where hardly any signal is left, so it is compared at the level of x_t
    signal = S.extract(b.sqrt_alphas_cumprod, t, x0.shape)
    close(S.predict_start_from_noise(b, x_t, t, eps) * signal, x0 * signal)
    close(S.predict_noise_from_start(b, x_t, t, x0), eps)


def test_posterior_is_the_conditional_gaussian():
    _, tables = buffers_for(timesteps=50)
    b = SimpleNamespace(**tables)
    t = torch.tensor([0, 1, 20, 49])
    x0, x_t = torch.randn(2, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    mean, variance, log_variance = S.q_posterior(b, x0, x_t, t)
    # precision form of the product of q(x_t | x_{t-1}) and q(x_{t-1} | x_0)
    beta, acp_prev = (S.extract(tables[k].double(), t, x0.shape) for k in ("betas", "alphas_cumprod_prev"))
    precision = (1 - beta) / beta + 1 / (1 - acp_prev)
    expected = ((1 - beta).sqrt() / beta * x_t + acp_prev.sqrt() / (1 - acp_prev) * x0) / precision
    torch.testing.assert_close(mean[1:], expected[1:].float(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(variance[1:], (1 / precision)[1:].float(), rtol=1e-3, atol=1e-8)
    assert torch.equal(mean[0], x0[0])
    assert log_variance.shape == variance.shape == (4, 1, 1, 1)


def test_zero_terminal_snr():
    betas = S.make_beta_schedule("linear", 1000, 0.00085, 0.012)
    rescaled = S.rescale_zero_terminal_snr(betas)
    acp = np.cumprod(1 - rescaled)
    assert acp[-1] == 0
    assert acp[0] == pytest.approx(1 - betas[0], rel=1e-12)
    assert (np.diff(acp) < 0).all()
    buffers = S.diffusion_buffers(rescaled, "v")
    assert torch.isfinite(buffers["posterior_mean_coef1"]).all()
    with pytest.raises(ValueError, match="'v' or 'x0'"):
        S.diffusion_buffers(rescaled, "eps")


@given(st.sampled_from(["uniform", "quad", "trailing"]), st.integers(1, 1000), st.integers(1, 1000))
def test_ddim_steps_stay_inside(method, count, total):
    if count > total:
        with pytest.raises(ValueError, match=f"from 1 to {total}"):
            S.make_ddim_timesteps(method, count, total)
        return
    steps = S.make_ddim_timesteps(method, count, total)
    assert len(steps) >= count
    assert (np.diff(steps) >= 0).all()
    if method == "trailing":
        assert len(steps) == count
        assert steps[-1] == total - 1
    assert 0 <= steps[0] <= steps[-1] <= total - 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: S.make_beta_schedule("linea", 10), "linear, cosine"),
        (lambda: S.make_beta_schedule("linear", 0), "at least 1"),
        (lambda: S.make_ddim_timesteps("even", 5, 10), "'uniform', 'quad' or 'trailing'"),
        (lambda: S.diffusion_buffers(np.full(5, 0.1), "epsilon"), "parameterization 'epsilon'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
