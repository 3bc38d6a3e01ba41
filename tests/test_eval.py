"""eval.py: the whole command on points and images, formats of statistics, the cache."""
import common
import eval as evaluation
import kit
import scm

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

INCEPTION = ["--features", "inception", "--weights", "features.pt"]


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


def test_what_stops_a_later_run_leaves_the_rows_of_those_before(train, pictures):
    """Here the second run's data have gone."""
    train("--steps", 1, "--channels", 16, "--out", "toy")
    Path(pictures).rename("gone")
    with pytest.raises(SystemExit):
        rows("toy", "pictures-run", "--samples", 8, "--nfe", 1)
    row, = json.loads(Path("out.d/eval.json").read_text())
    assert row["run"] == "toy"


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
    images = kit.dataset(scm.Config(dataset="folder", data=pictures)).rows
    np.savez("adm.npz", arr_0=images[:12].transpose(0, 2, 3, 1), mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma)
    for name in ("edm.npz", "edm2.pkl", "adm.npz"):
        found, = rows(*flags, "--reference", name)
        assert found["frechet_distance"] == pytest.approx(expected["frechet_distance"], abs=1e-9)
        assert ("kid" in found) == (name == "adm.npz")


def test_teacher_as_reference(train):
    """Of points: the teacher has a row of its own, against its other samples, and E is the distance from what
    it makes of the same noise, by 35 evaluations of Heun's solver. Runs of one teacher share it."""
    for name in ("a", "b"):
        train("--steps", 1, "--channels", 16, "--out", name)
    found = rows("a", "b", "--samples", 200, "--nfe", 1, "--reference", "teacher")
    assert [(row["run"], row["nfe"]) for row in found] == [("a", "teacher"), ("a", 1), ("b", 1)]
    assert found[1]["ode_error"] == found[2]["ode_error"]
    net, data = kit.load_net("a"), kit.dataset(kit.parse_args(scm.Config, scm.PRESETS, scm.LOSSES, []))
    noise, y, gen = kit.noise_and_labels(data.cfg, net, 0, 200, 0, "cpu")
    solved = common.solve(data, noise, common.ode_times(18, 0.5))
    error = kit.metrics.rms(scm.sample(net, noise, None, 1, data.cfg, gen), solved)
    assert found[1]["ode_error"] == pytest.approx(error, rel=1e-5)
    other, _, _ = kit.noise_and_labels(data.cfg, net, 0, 200, 1, "cpu")
    distance = kit.metrics.energy_distance(solved, common.solve(data, other, common.ode_times(18, 0.5)))
    assert found[0]["energy_distance"] == pytest.approx(distance, rel=1e-4)
