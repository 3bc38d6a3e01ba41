"""eval.py: each metric against a closed form, SciPy or torchmetrics; formats; cache; the whole command."""
import common
import eval as evaluation
import scm

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

RNG = np.random.default_rng(0)
INCEPTION = ["--features", "inception", "--weights", "features.pt"]


def features(n, d=6, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_distance_of_commuting_gaussians():
    """For covariances A, B that commute: |m1 - m2|^2 + tr (A^(1/2) - B^(1/2))^2."""
    a, b = np.diag([1.0, 4.0, 9.0]), np.diag([4.0, 4.0, 0.0])
    assert common.frechet_distance(np.zeros(3), a, np.ones(3), b) == pytest.approx(3 + 1 + 0 + 9)


def test_frechet_distance_against_scipys_matrix_root():
    x, y = RNG.normal(size=(50, 6)), RNG.normal(size=(50, 6)) @ RNG.normal(size=(6, 6))
    ca, cb = np.cov(x.T), np.cov(y.T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * scipy.linalg.sqrtm(ca @ cb).real)
    assert common.frechet_distance(x.mean(0), ca, y.mean(0), cb) == pytest.approx(expected)


def test_frechet_distance_is_zero_for_singular_equals():
    x = RNG.normal(size=(5, 20))  # fewer samples than dimensions
    c = np.cov(x.T)
    assert common.frechet_distance(x.mean(0), c, x.mean(0), c) == pytest.approx(0, abs=1e-6)


def test_moments_arrive_in_batches():
    x = features(101, 7)
    moments = evaluation.Moments()
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
    assert evaluation.kid(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected)


def test_kid_and_inception_score_against_torchmetrics():
    """An independent library's kernel distance, and its score from the same logits."""
    kernel = pytest.importorskip("torchmetrics.image.kid")
    a, b = features(40), 0.5 + features(40, seed=1)
    assert evaluation.kid(a, b) == pytest.approx(float(kernel.poly_mmd(a, b)), rel=1e-6)
    inception = pytest.importorskip("torchmetrics.image.inception")
    metric = inception.InceptionScore(feature=torch.nn.Identity(), splits=1)
    logits = 3 * features(60, 10)
    metric.features.append(logits)
    expected = float(metric.compute()[0])
    assert evaluation.inception_score(logits.softmax(1), 1) == pytest.approx(expected, rel=1e-5)


def test_inception_score_of_certain_and_of_uniform_classes():
    """K classes, each certain and equally often: K. The same guess for all: 1."""
    assert evaluation.inception_score(torch.eye(8).repeat(20, 1), splits=4) == pytest.approx(8)
    assert evaluation.inception_score(torch.full((50, 8), 1 / 8)) == pytest.approx(1)


def test_precision_and_recall_by_brute_force():
    """NumPy's loops over all pairs; and two clusters of which the samples know one: precision 1, recall
    1/2."""
    x, y = features(30).numpy(), 0.7 * features(25, seed=1).numpy()

    def share(points, support):
        reach = [np.sort([np.linalg.norm(u - v) for v in support])[3] for u in support]
        return np.mean([any(np.linalg.norm(p - v) <= r for v, r in zip(support, reach)) for p in points])
    found = evaluation.precision_recall(torch.tensor(x), torch.tensor(y))
    assert found == pytest.approx(dict(precision=share(x, y), recall=share(y, x)))
    half = torch.cat([features(50), 100 + features(50, seed=1)])
    found = evaluation.precision_recall(half[:50] + 1e-9, half)
    assert found["precision"] == 1 and found["recall"] == 0.5


def test_sliced_wasserstein_of_a_shift_and_in_one_dimension():
    """In 1-D: SciPy's quantiles, W_2^2 = mean of squared differences. A shift by s moves a direction by
    s.theta, on average |s| / sqrt(D)."""
    a, b = features(500, 1), 2 * features(500, 1, seed=1)
    q = np.linspace(0.5 / 500, 1 - 0.5 / 500, 500)
    ours = np.sqrt(np.mean((scipy.stats.mstats.mquantiles(a[:, 0], q, 0.5, 0.5)
                            - scipy.stats.mstats.mquantiles(b[:, 0], q, 0.5, 0.5)) ** 2))
    assert evaluation.sliced_wasserstein(a, b) == pytest.approx(ours, rel=1e-6)
    x = features(200, 2)
    moved = x + torch.tensor([3.0, 4.0])
    assert evaluation.sliced_wasserstein(x, moved) == pytest.approx(5 / 2**0.5, rel=0.2)


def test_mode_shares(ring):
    """All points of one mode, and none of a far point."""
    _, data, _ = ring
    x = data.mean[[0, 0, 3, 3]].clone()
    x[3] += 50 * data.std
    assert evaluation.mode_shares(x, data) == [0.5, 0, 0, 0.25, 0, 0, 0, 0]


def test_metrics_of_identical_sets_are_at_their_optimum():
    x = features(60)
    mean, covariance = x.mean(0).numpy(), np.cov(x.T)
    assert common.frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-9)
    assert evaluation.kid(x, x) <= 0 and evaluation.sliced_wasserstein(x, x) == 0
    assert evaluation.precision_recall(x, x) == dict(precision=1, recall=1)
    assert common.energy_distance(x, x) == pytest.approx(0, abs=1e-12)


class Inception(torch.nn.Module):
    """Small, with the signature of NVIDIA's TorchScript: class probabilities, or features."""

    def forward(self, x, return_features: bool = False):
        f = torch.nn.functional.adaptive_avg_pool2d(x.to(torch.float32) / 255, 2).flatten(1)
        return f if return_features else f.softmax(1)


@pytest.fixture
def pictures(train, folder):
    """A run on images, and a feature network."""
    train("--dataset", "folder", "--data", folder, "--channels", 8, "--blocks", 1, "--batch", 8, "--steps", 1,
          "--mode", "sct", "--out", "pictures-run")
    torch.jit.script(Inception()).save("features.pt")
    return str(folder)


def rows(*argv, out="out.d"):
    evaluation.main([*map(str, argv), "--out", out])
    return json.loads(Path(out, "eval.json").read_text())


def test_toy_runs(train):
    """A row for each NFE, with every metric of 2-D; the error E only where no noise is added."""
    train("--steps", 1, "--channels", 16, "--batch", 256, "--out", "toy")
    found = rows("toy", "--samples", 300, "--nfe", 1, 2)
    assert [row["nfe"] for row in found] == [1, 2] and "ode_error" in found[0] and "ode_error" not in found[1]
    for row in found:
        assert row["energy_distance"] > 0 and row["sliced_wasserstein"] > 0 and len(row["mode_shares"]) == 8
        assert row["samples_seen"] == 256 and row["method"] == "scm" and row["seconds"] >= 0
    assert Path("out.d/eval.png").exists()


def test_the_seed_is_that_of_the_noise(train):
    """Another seed draws other samples of the same run, and the same seed the same."""
    train("--steps", 1, "--channels", 16, "--out", "toy")
    a, b, c = (rows("toy", "--samples", 300, "--nfe", 1, "--seed", s)[0]["ode_error"] for s in (0, 1, 1))
    assert a != b == c


def test_runs_of_one_name_are_told_apart(train):
    """a/run and b/run: a row, a panel and a file of samples each."""
    for name in ("a/run", "b/run"):
        train("--steps", 1, "--channels", 16, "--out", name)
    assert len(rows("a/run", "b/run", "--samples", 20, "--nfe", 1, "--write")) == 2
    assert {path.name for path in Path("out.d").glob("*.npz")} == {"a-run-1nfe.npz", "b-run-1nfe.npz"}


def test_neither_batch_nor_processes_change_a_figure(pictures):
    """7 or 64 samples at a time, in one process or two, and the samples of an .npz instead of the run."""
    flags = ["--samples", 50, "--nfe", 1, "--features", "features.pt"]
    first, = rows("pictures-run", *flags, "--batch", 7, "--write")
    other, = rows("pictures-run", *flags, "--batch", 64)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, evaluation.__file__, "pictures-run", *map(str, flags), "--batch", "7",
               "--out", "two"]
    subprocess.run(command, check=True, capture_output=True)
    two, = json.loads(Path("two/eval.json").read_text())
    stored, = rows("out.d/pictures-run-1nfe.npz", "--features", "features.pt", "--reference", pictures,
                   "--image_size", 8)
    names = ("frechet_distance", "kid", "precision", "recall", "inception_score")
    assert all(first[name] == pytest.approx(row[name], rel=1e-3, abs=1e-6) for name in names
               for row in (other, two, stored))
    assert np.load("out.d/pictures-run-1nfe.npz")["arr_0"].shape == (50, 8, 8, 3)


def test_statistics_are_cached_by_content(pictures):
    """The same images and features: read from the cache. Another feature network: computed anew."""
    flags = ["pictures-run", "--samples", 30, "--nfe", 1, "--features", "features.pt"]
    before, = rows(*flags)
    cache, = Path("data/cache").glob("features-*.npz")
    table = evaluation.read_npz(cache)
    np.savez(cache, **table | dict(mu=2 * table["mu"]))
    after, = rows(*flags)
    assert after["frechet_distance"] != before["frechet_distance"] and after["kid"] == before["kid"]
    rows("pictures-run", "--samples", 30, "--nfe", 1)
    assert len(list(Path("data/cache").glob("features-*.npz"))) == 2


def test_a_reference_is_read_at_each_runs_size(pictures, train):
    """--reference is resized to the run's images: the figure of one run does not depend on the others."""
    train("--dataset", "folder", "--data", pictures, "--image_size", 16, "--channels", 8, "--blocks", 1,
          "--batch", 8, "--steps", 1, "--mode", "sct", "--out", "large")
    flags = ["--reference", pictures, "--features", "features.pt", "--samples", 20, "--nfe", 1]
    alone, (_, after) = rows("large", *flags), rows("pictures-run", "large", *flags)
    assert alone[0]["frechet_distance"] == after["frechet_distance"]


def test_reference_formats(pictures):
    """EDM's .npz, EDM2's .pkl and ADM's .npz (images and moments) give the distance that the images give."""
    flags = ["pictures-run", "--samples", 30, "--nfe", 1, *INCEPTION]
    expected, = rows(*flags)
    mu, sigma, _ = evaluation.read_npz(next(Path("data/cache").glob("features-*.npz"))).values()
    np.savez("edm.npz", mu=mu, sigma=sigma)
    table = dict(fid=dict(mu=mu, sigma=sigma), fd_dinov2=dict(mu=mu[:3], sigma=sigma[:3, :3]))
    Path("edm2.pkl").write_bytes(pickle.dumps(table))
    images = common.dataset(scm.Config(dataset="folder", data=pictures)).rows
    np.savez("adm.npz", arr_0=images[:12].transpose(0, 2, 3, 1), mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma)
    for name in ("edm.npz", "edm2.pkl", "adm.npz"):
        found, = rows(*flags, "--reference", name)
        assert found["frechet_distance"] == pytest.approx(expected["frechet_distance"], abs=1e-9)
        assert ("kid" in found) == (name == "adm.npz")


def test_hostile_pickle_runs_nothing(pictures, capsys):
    """A .pkl that calls functions ends in one line; a touched file would betray that it ran."""
    class Evil:
        def __reduce__(self):
            return Path("touched").touch, ()
    for i, value in enumerate((Evil(), dict(fid=Evil()), np.array([Evil()], dtype=object))):
        Path(f"{i}.pkl").write_bytes(pickle.dumps(value))
        with pytest.raises(SystemExit) as error:
            rows("pictures-run", "--samples", 8, "--nfe", 1, *INCEPTION, "--reference", f"{i}.pkl")
        assert error.value.code == 2 and not Path("touched").exists()


RUN = "pictures-run"
BAD = [  # words, and what their one line must say
    (["nowhere"], "no checkpoint"), ([RUN, "nowhere"], "nowhere"), ([], "--toy"),
    ([RUN, "--nfe", "0"], "at least 1"), ([RUN, "--samples", "1"], "at least 2"), (["one.npz"], "at least 2"),
    (["broken.npz"], "cannot read"), (["odd.npz"], "no samples"), (["points.npz"], "points from a file"),
    (["images.npz"], "--reference"), (["points.npz", "--prompts", "nowhere"], "--prompts"),
    ([RUN, "--features", "nowhere.pt"], "TorchScript"), ([RUN, "--features", "notes.txt"], "TorchScript"),
    ([RUN, "--features", "."], "TorchScript"),
    ([RUN, "--features", "inception", "--weights", "x.pt"], "no feature network at x.pt"),
    ([RUN, "--features", "dinov2", "--weights", "/no/such"], "huggingface.co"),
    ([RUN, "--reference", "broken.npz"], "cannot read"), ([RUN, "--reference", "odd.npz"], "no samples"),
    ([RUN, "--reference", "nowhere.npz"], "nowhere.npz"),
    ([RUN, *INCEPTION, "--reference", "mu.npz"], "sigma")]


@pytest.mark.parametrize("flags, word", BAD)
def test_bad_input_is_one_line(pictures, flags, word, capsys):
    """Exit code 2, and a line that says what is wrong."""
    Path("broken.npz").write_bytes(b"PK nothing")
    Path("notes.txt").write_text("no network")
    np.savez("odd.npz", arr_0=np.zeros((3, 4, 4)))
    np.savez("points.npz", arr_0=np.zeros((3, 2)))
    np.savez("one.npz", arr_0=np.zeros((1, 2)))
    np.savez("mu.npz", mu=np.zeros(3))
    np.savez("images.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        evaluation.main(["--samples", "8", *flags])
    lines = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2 and len(lines) == 1 and word in lines[0]


def test_toy_table(monkeypatch):
    """--toy trains what is missing, one run for each mode and seed, and does not train it again."""
    monkeypatch.setattr(evaluation, "TOY", dict(scm=("diffusion",), multistep_cm=("ct",)))
    flags = ["--toy", "1", "--seeds", "1", "--nfe", "2", "1", "--samples", "100", "--out", "t"]
    evaluation.main(flags)
    found = json.loads(Path("t/eval.json").read_text())
    assert [(row["method"], row["nfe"]) for row in found] == [
        ("scm", 2), ("scm", 1), ("multistep_cm", 2), ("multistep_cm", 1)]
    written = Path("t/scm-diffusion-0/ckpt.pt").stat().st_mtime_ns
    evaluation.main([*flags[:5], "1", *flags[7:]])
    assert Path("t/scm-diffusion-0/ckpt.pt").stat().st_mtime_ns == written
