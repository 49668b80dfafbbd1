"""Metrics, intervals and verdicts against independent references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.functional.pairwise import pairwise_cosine_similarity

from evaluation import metrics
from evaluation.claims import Claim, check_claim
from evaluation.stats import FAILS, HOLDS, UNDECIDED, Bootstrap, Interval, group_intervals, interval, smallest
from ldm.util import ConfigError


def features(count: int, seed: int, offset: float = 0.3) -> torch.Tensor:
    """Random vectors that have a direction in common, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = 1 + 4 * torch.rand(count, 1, generator=generator)
    return (torch.randn(count, 24, generator=generator) + offset) * lengths


def images(seed: int, size: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(3, 3, 8, 8, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear").clamp(-1, 1)


def test_similarities_agree_with_scipy_and_torchmetrics():
    generated, training, text = features(7, 0), features(5, 1), features(1, 2)[0]
    distances = scipy.spatial.distance.cdist(generated, training, "cosine")
    assert metrics.image_similarity(generated, training).item() == pytest.approx(1 - distances.mean(), abs=1e-6)
    pairs = pairwise_cosine_similarity(generated, training)
    torch.testing.assert_close(metrics.cosines(generated, training), pairs)
    torch.testing.assert_close(metrics.nearest_similarity(generated, training), pairs.max(1).values)
    among = scipy.spatial.distance.pdist(generated, "cosine")
    assert metrics.diversity(generated).item() == pytest.approx(among.mean(), abs=1e-6)
    assert metrics.self_similarity(generated).item() == pytest.approx(1 - among.mean(), abs=1e-6)
    to_text = scipy.spatial.distance.cdist(generated, text[None], "cosine")
    assert metrics.mean_text_similarity(generated, text).item() == pytest.approx(1 - to_text.mean(), abs=1e-6)


def test_the_papers_text_similarity_is_the_codes_over_the_length_of_the_mean():
    generated, text = features(16, 3), features(1, 4)
    mean = np.mean([v / np.linalg.norm(v) for v in generated.numpy()], axis=0)
    paper = metrics.text_similarity(generated, text).item()
    assert paper == pytest.approx(1 - scipy.spatial.distance.cosine(mean, text[0]), abs=1e-6)
    code = metrics.mean_text_similarity(generated, text).item()
    assert code == pytest.approx(paper * np.linalg.norm(mean), abs=1e-6)
    assert abs(code) < abs(paper)


def test_a_single_picture_has_no_diversity():
    assert math.isnan(metrics.diversity(features(1, 0)))
    with pytest.raises(ValueError, match="N >= 1"):
        metrics.image_similarity(torch.zeros(0, 4), features(2, 0))


def test_first_stage_metrics_agree_with_torchmetrics():
    clean = images(0)
    noisy = (clean + 0.2 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    ours_psnr, ours_ssim = metrics.psnr(noisy, clean), metrics.ssim(noisy, clean)
    for k in range(len(clean)):
        pair = noisy[k : k + 1], clean[k : k + 1]
        assert ours_psnr[k].item() == pytest.approx(peak_signal_noise_ratio(*pair, data_range=2.0).item(), rel=1e-5)
        _, theirs = structural_similarity_index_measure(*pair, data_range=2.0, return_full_image=True)
        assert ours_ssim[k].item() == pytest.approx(theirs[..., 5:-5, 5:-5].mean().item(), abs=1e-5)  # no padding
    torch.testing.assert_close(metrics.ssim(clean, clean), torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="11 x 11"):
        metrics.ssim(clean[..., :8], clean[..., :8])


def test_clip_score():
    assert metrics.clip_score(torch.tensor([0.268, -0.1])).tolist() == pytest.approx([0.67, 0.0])


def test_dreambench_averages_from_the_published_category_figures():
    preservation = {"animal": 0.502, "human": 0.358, "object": 0.305, "style": 0.358}
    following = {"photorealistic": 0.671, "style": 0.686, "imaginative": 0.437}
    overall = metrics.micro_average(preservation, {"animal": 45, "human": 20, "object": 65, "style": 20})
    assert round(overall, 3) == 0.378
    followed = metrics.micro_average(following, {"photorealistic": 4, "style": 3, "imaginative": 2})
    assert round(followed, 3) == 0.624
    assert round(overall * followed, 3) == 0.236
    with pytest.raises(ValueError, match="human"):
        metrics.micro_average({"animal": 1.0}, {"animal": 1, "human": 2})


# -- intervals -----------------------------------------------------------------------------------------------------


def test_the_interval_agrees_with_scipys_bootstrap():
    sample = np.random.default_rng(0).gamma(2.0, size=30)
    theirs = scipy.stats.bootstrap((sample,), np.mean, method="percentile", n_resamples=4000, rng=0)
    ours = Bootstrap(30, 1, resamples=4000).interval(sample[:, None])
    assert ours.mean == pytest.approx(sample.mean())
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.05 * width)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.05 * width)


def test_both_levels_count():
    rng = np.random.default_rng(1)
    between, within = rng.normal(size=(20, 1)), rng.normal(size=(20, 3))
    both = Bootstrap(20, 3).interval(between + within)
    concepts_only = Bootstrap(20, 3).interval(between + within.mean(1, keepdims=True))
    assert both.high - both.low > concepts_only.high - concepts_only.low
    seeds_only = Bootstrap(20, 3).interval(np.ones((20, 1)) + within)
    expected = scipy.stats.norm.ppf(0.975) * 2 * math.sqrt(1 / 60)
    assert seeds_only.high - seeds_only.low == pytest.approx(expected, rel=0.8)


def test_missing_results_are_left_out():
    values = np.array([[1.0, 2.0], [math.nan, 4.0], [math.nan, math.nan]])
    sampler = Bootstrap(3, 2)
    assert sampler.mean(values) == pytest.approx(2.75)
    assert sampler.interval(values).low >= 1.0
    assert sampler.mean(np.array([[1.0], [2.0], [3.0]])) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="do not fit"):
        sampler.mean(np.zeros((2, 2)))


def test_verdicts():
    assert Interval(0.5, 0.1, 0.9).verdict == HOLDS
    assert Interval(-0.5, -0.9, -0.1).verdict == FAILS
    assert Interval(0.5, -0.1, 0.9).verdict == UNDECIDED
    assert interval(0.5, np.full(10, 0.5), results=1).verdict == UNDECIDED  # nothing is known of the spread
    assert interval(0.5, np.full(10, 0.5), results=12).verdict == HOLDS  # all twelve agree
    assert str(Interval(0.5)) == "0.500"
    assert group_intervals({"a": np.array([1.0, 2.0, 3.0])})["a"].mean == 2.0


# -- claims --------------------------------------------------------------------------------------------------------


def results(rows: dict[str, float], spread: float = 0.05) -> tuple[dict, Bootstrap]:
    rng = np.random.default_rng(0)
    return {("image", row): value + spread * rng.normal(size=(25, 1)) for row, value in rows.items()}, Bootstrap(25, 1)


@pytest.mark.parametrize(
    ("inequality", "verdict"),
    [
        ("image(ours) > image(prompt)", HOLDS),
        ("image(prompt) > image(ours)", FAILS),
        ("image(prompt) < image(ours)", HOLDS),
        ("image(ours) > image(set)", UNDECIDED),
        ("abs(image(ours) - image(set)) < 0.2 * (image(set) - image(prompt))", HOLDS),
        ("abs(image(ours) - image(prompt)) < 0.1 / 2", FAILS),
        ("-image(ours) > -0.7", FAILS),
    ],
)
def test_claims_are_inequalities_of_cells(inequality: str, verdict: str):
    tables = results({"ours": 0.79, "set": 0.78, "prompt": 0.45})
    assert check_claim(Claim("", inequality), *tables).verdict == verdict


def test_paired_differences_are_sharper_than_the_rows():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=(20, 1))
    rows = {"a": hard + 0.1 + 0.01 * rng.normal(size=(20, 3)), "b": hard + 0.01 * rng.normal(size=(20, 3))}
    finding = check_claim(
        Claim("", "m(a) > m(b)"), {("m", row): values for row, values in rows.items()}, Bootstrap(20, 3)
    )
    assert finding.verdict == HOLDS
    assert finding.difference.mean == pytest.approx(0.1, abs=0.01)


def test_a_claim_of_every_concept_is_decided_by_each_ones_own_seeds():
    rng = np.random.default_rng(3)

    def verdict(effects: np.ndarray, noise: float) -> str:
        values = {("m", "a"): effects[:, None] + noise * rng.normal(size=(20, 3)), ("m", "b"): np.zeros((20, 3))}
        return check_claim(Claim("", "m(a) > m(b)", every=True), values, Bootstrap(20, 3)).verdict

    small = np.full(20, 0.02)
    found = [verdict(small, 0.015) for _ in range(20)]
    assert found.count(FAILS) <= 1  # true for every concept, though some seeds say otherwise
    assert UNDECIDED in found
    assert verdict(small, 0.001) == HOLDS
    assert verdict(np.where(np.arange(20) == 7, -0.1, small), 0.02) == FAILS


def test_the_smallest_difference_of_one_concept_has_students_interval():
    values = np.array([[0.3, 0.1, 0.5, 0.2]])
    low, high = scipy.stats.t.interval(0.95, 3, values.mean(), scipy.stats.sem(values[0]))
    found = smallest(values)
    assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), low, high))
    assert math.isnan(smallest(np.array([[0.3], [0.2]])).low)  # one seed each says nothing
    partly = smallest(np.array([[0.3, 0.31, math.nan], [math.nan] * 3]))
    assert math.isnan(partly.low)
    assert partly.high > 0.305


@pytest.mark.parametrize("concepts", [2, 20])
def test_bounds_of_the_smallest_difference_are_seldom_wrong(concepts: int):
    rng = np.random.default_rng(concepts)
    equal = [smallest(rng.normal(size=(concepts, 3))) for _ in range(400)]
    assert np.mean([found.high < 0 for found in equal]) < 0.05
    one = np.zeros((concepts, 1))
    one[1:] = 100.0
    found = [smallest(one + rng.normal(size=(concepts, 3))) for _ in range(400)]
    assert 0.005 < np.mean([bounds.low > 0 for bounds in found]) < 0.05
    assert np.mean([bounds.high < 0 for bounds in found]) < 0.05


@pytest.mark.parametrize(
    ("inequality", "message"),
    [
        ("image(ours)", "no inequality"),
        ("image(ours", "no inequality"),
        ("image(ours) > image(sett)", r"did you mean 'image\(set\)'"),
        ("__import__('os') > 1", "neither metric"),
        ("image(ours) ** 2 > 1", "neither metric"),
    ],
)
def test_what_is_no_claim_is_refused(inequality: str, message: str):
    tables = results({"ours": 0.79, "set": 0.78})
    with pytest.raises(ConfigError, match=message):
        check_claim(Claim("", inequality), *tables)


def test_the_rows_of_a_claim():
    assert Claim("", "image(a) - 0.5 * text(b) > abs(image(c))").rows() == {
        ("image", "a"),
        ("text", "b"),
        ("image", "c"),
    }
