"""eval.py: Frechet distance against closed forms, and the command end to end."""
import json

import numpy as np
import pytest
import scipy.linalg
import torch

import common
import eval as evaluation


def test_frechet_distance_of_commuting_gaussians():
    """For covariances A, B that commute: |m1 - m2|^2 + tr (A^(1/2) - B^(1/2))^2."""
    a, b = np.diag([1.0, 4.0, 9.0]), np.diag([4.0, 4.0, 0.0])
    assert common.frechet_distance(np.zeros(3), a, np.ones(3), b) == pytest.approx(3 + 1 + 0 + 9)


def test_frechet_distance_against_scipys_matrix_root():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 6)), rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6))
    ca, cb = np.cov(x.T), np.cov(y.T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * scipy.linalg.sqrtm(ca @ cb).real)
    assert common.frechet_distance(x.mean(0), ca, y.mean(0), cb) == pytest.approx(expected)


def test_frechet_distance_is_zero_for_singular_equals():
    x = np.random.default_rng(0).normal(size=(5, 20))  # fewer samples than dimensions
    c = np.cov(x.T)
    assert common.frechet_distance(x.mean(0), c, x.mean(0), c) == pytest.approx(0, abs=1e-6)


def test_moments_arrive_in_batches():
    x = torch.randn(101, 7, dtype=torch.float64)
    moments = evaluation.Moments()
    for part in x.split(17):
        moments.add(part)
    mean, covariance = moments.mean_and_covariance()
    assert np.allclose(mean, x.mean(0)) and np.allclose(covariance, np.cov(x.T))


def test_eval_compares_runs(train, folder, capsys):
    """Toy and image runs give their metrics; the batch changes nothing; TorchScript features work."""
    train("--steps", 1, "--channels", 16, "--out", "toy")
    images = ["--dataset", "folder", "--data", folder, "--channels", 8, "--blocks", 1, "--batch", 8, "--steps", 1]
    train(*images, "--mode", "sct", "--out", "pictures-run")
    evaluation.main(["toy", "--n", "300", "--nfe", "1", "2"])
    rows = json.loads(open("toy/eval.json").read())
    assert [row["nfe"] for row in rows] == [1, 2] and all(row["energy_distance"] > 0 for row in rows)

    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.to(torch.float32).mean([2, 3])
    torch.jit.script(Mean()).save("features.pt")
    distances = []
    for batch in (7, 64):
        evaluation.main(["pictures-run", "--n", "50", "--nfe", "1", "--features", "features.pt", "--batch", str(batch)])
        distances.append(json.loads(open("pictures-run/eval.json").read())[0]["frechet_distance"])
    assert distances[0] == pytest.approx(distances[1], rel=1e-3) and distances[0] > 0
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        evaluation.main(["toy", "--features", "nowhere.pt", "--nfe", "0"])
    assert error.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
