"""kit/toys.py: the mixture is its own exact teacher, and has the promised deviation; the drawn shapes."""
import common
import kit
import scm
from conftest import SCRIPTS

import json
import math
from pathlib import Path

import pytest
import torch


def test_exact_teacher_is_the_posterior_mean(ring):
    """F = E[cos z - sin x0 | x_t] / sigma_d: importance-weighted Monte Carlo over the data."""
    cfg, data, teacher = ring
    x0, _ = data.batch(common.Draw(0, 0, 0, 400_000))
    for t, x_t in [(0.3, (0.6, 0.1)), (1.0, (0.2, -0.4)), (1.4, (0.1, 0.3))]:
        z = (torch.tensor(x_t) - math.cos(t) * x0) / math.sin(t)
        weight = torch.softmax(-z.double().square().sum(1) / (2 * cfg.sigma_d**2), 0)
        value = (math.cos(t) * z - math.sin(t) * x0).double() / cfg.sigma_d
        mean = weight @ value
        error = ((weight**2) @ (value - mean) ** 2).sqrt()
        F = teacher(torch.tensor([x_t]) / cfg.sigma_d, torch.tensor([t]))[0]
        assert ((F - mean).abs() < 5 * error + 1e-4).all(), (t, F, mean, error)


def test_exact_teacher_with_a_label_is_that_gaussian(ring):
    """One Gaussian N(m, s^2): the posterior mean of x0 is linear in x_t."""
    cfg, data, teacher = ring
    x_t, t, s = torch.tensor([[0.3, 0.2]]).double(), torch.tensor([0.8]).double(), data.std
    x0 = scm.f(teacher, x_t, t, torch.tensor([3]), cfg)
    cos, sin, mean = t.cos(), t.sin(), data.mean[3]
    gain = cos * s**2 / (cos**2 * s**2 + sin**2 * cfg.sigma_d**2)
    assert torch.allclose(x0, mean + gain * (x_t - cos * mean), atol=1e-12)


def test_data_has_the_promised_deviation(ring):
    """Each coordinate of the ring has standard deviation sigma_d."""
    cfg, data, _ = ring
    x0, _ = data.batch(common.Draw(0, 0, 0, 100_000))
    assert torch.allclose(x0.std(0), torch.full((2,), cfg.sigma_d), rtol=0.01)


def test_shapes_are_distinct_classes():
    """Mean hue separates the four warm classes from the four cold ones."""
    images, labels = kit.toys.draw_shapes(scm.Config(image_size=16), 400)
    red, blue = images[:, 0].mean((1, 2)), images[:, 2].mean((1, 2))
    assert ((red > blue) == (labels < 4)).mean() > 0.95


MODES = [(script, mode) for script, module in SCRIPTS.items() for mode in module.LOSSES if mode != "both"]


@pytest.mark.parametrize("script, mode", MODES)
def test_every_mode_learns_the_ring(script, mode, train):
    """After 200 small steps by the preset the energy distance is below 0.15. An untrained network has 1 to 5.
    What a mode goes on from, it gets as the README says."""
    short = ["--steps", 200, "--batch", 64, "--channels", 64, "--blocks", 4]
    short += dict(scm=["--warmup", 0], sct=["--stage_steps", 10]).get(script, [])
    short += ["--intervals", 20] * (mode == "direct")
    if "vsd" in mode:
        train(*short, script=scm)
        short += ["--fake_first", 0.75, "--lr", 3e-4]
    train(*short, "--mode", mode, "--out", "run", script=SCRIPTS[script])
    found = json.loads(Path("run/metrics.json").read_text())["energy_distance"]
    first = next(found[nfe] for nfe in ("1", "4", "35") if nfe in found)
    assert first < 0.15, found
