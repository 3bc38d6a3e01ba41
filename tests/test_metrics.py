"""kit/metrics.py: each distance and score against a closed form, SciPy, torchmetrics or loops."""
import kit

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

RNG = np.random.default_rng(0)


def test_energy_distance_against_scipy():
    """SciPy's distance in 1-D is the square root of ours."""
    a, b = np.random.default_rng(0).normal(size=(2, 300))
    ours = kit.metrics.energy_distance(torch.tensor(a)[:, None], torch.tensor(b + 0.5)[:, None])
    assert ours == pytest.approx(scipy.stats.energy_distance(a, b + 0.5) ** 2)


def features(n, d=6, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_distance_of_commuting_gaussians():
    """For covariances A, B that commute: |m1 - m2|^2 + tr (A^(1/2) - B^(1/2))^2."""
    a, b = np.diag([1.0, 4.0, 9.0]), np.diag([4.0, 4.0, 0.0])
    assert kit.metrics.frechet_distance(np.zeros(3), a, np.ones(3), b) == pytest.approx(3 + 1 + 0 + 9)


def test_frechet_distance_against_scipys_matrix_root():
    x, y = RNG.normal(size=(50, 6)), RNG.normal(size=(50, 6)) @ RNG.normal(size=(6, 6))
    ca, cb = np.cov(x.T), np.cov(y.T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * scipy.linalg.sqrtm(ca @ cb).real)
    assert kit.metrics.frechet_distance(x.mean(0), ca, y.mean(0), cb) == pytest.approx(expected)


def test_frechet_distance_is_zero_for_singular_equals():
    x = RNG.normal(size=(5, 20))  # fewer samples than dimensions
    c = np.cov(x.T)
    assert kit.metrics.frechet_distance(x.mean(0), c, x.mean(0), c) == pytest.approx(0, abs=1e-6)


def test_moments_arrive_in_batches():
    x = features(101, 7)
    moments = kit.metrics.Moments()
    for part in x.split(17):
        moments.add(part)
    mean, covariance = moments.mean_and_covariance()
    assert np.allclose(mean, x.mean(0)) and np.allclose(covariance, np.cov(x.T))


def test_kid_is_the_double_sum():
    """The U-statistic written out in loops, as in Binkowski et al., Eq. 4."""
    a, b = features(7).numpy(), 0.5 * features(5, seed=1).numpy()

    def k(u, v):
        return (u @ v / 6 + 1) ** 3
    expected = (sum(k(u, v) for i, u in enumerate(a) for j, v in enumerate(a) if i != j) / 42
                + sum(k(u, v) for i, u in enumerate(b) for j, v in enumerate(b) if i != j) / 20
                - 2 * sum(k(u, v) for u in a for v in b) / 35)
    assert kit.metrics.kid(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected)


def test_kid_and_inception_score_against_torchmetrics():
    """An independent library's kernel distance, and its score from the same logits."""
    kernel = pytest.importorskip("torchmetrics.image.kid")
    a, b = features(40), 0.5 + features(40, seed=1)
    assert kit.metrics.kid(a, b) == pytest.approx(float(kernel.poly_mmd(a, b)), rel=1e-6)
    inception = pytest.importorskip("torchmetrics.image.inception")
    metric = inception.InceptionScore(feature=torch.nn.Identity(), splits=1)
    logits = 3 * features(60, 10)
    metric.features.append(logits)
    expected = float(metric.compute()[0])
    assert kit.metrics.inception_score(logits.softmax(1), 1) == pytest.approx(expected, rel=1e-5)


def test_inception_score_of_certain_and_of_uniform_classes():
    """K classes, each certain and equally often: K. The same guess for all: 1."""
    assert kit.metrics.inception_score(torch.eye(8).repeat(20, 1), splits=4) == pytest.approx(8)
    assert kit.metrics.inception_score(torch.full((50, 8), 1 / 8)) == pytest.approx(1)


def test_precision_and_recall_by_brute_force():
    """NumPy's loops over all pairs; and two clusters of which the samples know one: precision 1, recall
    1/2."""
    x, y = features(30).numpy(), 0.7 * features(25, seed=1).numpy()

    def share(points, support):
        reach = [np.sort([np.linalg.norm(u - v) for v in support])[3] for u in support]
        return np.mean([any(np.linalg.norm(p - v) <= r for v, r in zip(support, reach)) for p in points])
    found = kit.metrics.precision_recall(torch.tensor(x), torch.tensor(y))
    assert found == pytest.approx(dict(precision=share(x, y), recall=share(y, x)))
    half = torch.cat([features(50), 100 + features(50, seed=1)])
    found = kit.metrics.precision_recall(half[:50] + 1e-9, half)
    assert found["precision"] == 1 and found["recall"] == 0.5


def test_sliced_wasserstein_of_a_shift_and_in_one_dimension():
    """In 1-D: SciPy's quantiles, W_2^2 = mean of squared differences. A shift by s moves a direction by
    s.theta, on average |s| / sqrt(D)."""
    a, b = features(500, 1), 2 * features(500, 1, seed=1)
    q = np.linspace(0.5 / 500, 1 - 0.5 / 500, 500)
    ours = np.sqrt(np.mean((scipy.stats.mstats.mquantiles(a[:, 0], q, 0.5, 0.5)
                            - scipy.stats.mstats.mquantiles(b[:, 0], q, 0.5, 0.5)) ** 2))
    assert kit.metrics.sliced_wasserstein(a, b) == pytest.approx(ours, rel=1e-6)
    x = features(200, 2)
    moved = x + torch.tensor([3.0, 4.0])
    assert kit.metrics.sliced_wasserstein(x, moved) == pytest.approx(5 / 2**0.5, rel=0.2)


def test_mode_shares(ring):
    """All points of one mode, and none of a far point."""
    _, data, _ = ring
    x = data.mean[[0, 0, 3, 3]].clone()
    x[3] += 50 * data.std
    assert kit.metrics.mode_shares(x, data) == [0.5, 0, 0, 0.25, 0, 0, 0, 0]


def test_metrics_of_identical_sets_are_at_their_optimum():
    x = features(60)
    mean, covariance = x.mean(0).numpy(), np.cov(x.T)
    assert kit.metrics.frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-9)
    assert kit.metrics.kid(x, x) <= 0 and kit.metrics.sliced_wasserstein(x, x) == 0
    assert kit.metrics.precision_recall(x, x) == dict(precision=1, recall=1)
    assert kit.metrics.energy_distance(x, x) == pytest.approx(0, abs=1e-12)
