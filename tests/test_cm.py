"""cm.py: the curricula, the boundary, the discrete and continuous losses, editing and the search."""
import cm
import common
import kit
import sct
from conftest import draw, gradient, preset, toy_net

import dataclasses
import functools
import math
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

config = functools.partial(preset, cm)


class Gaussian:
    """x0 ~ N(m, s^2): exact teacher and exact consistency function (to t = 0.002) as F = net(x, t, y)."""
    m, s, sd = 0.3, 0.2, 0.5

    def teacher(self, x, t, y=None):
        sigma = (self.sd * t.tan())[:, None]
        x_t = x * (sigma**2 + self.sd**2).sqrt()
        x_0 = self.m + self.s**2 / (self.s**2 + sigma**2) * (x_t - self.m)
        return (t.cos()[:, None] ** 2 * x_t - x_0) / (t.sin()[:, None] * self.sd)

    def map(self, x_t, t):
        return self.m + (x_t - self.m) * ((self.s**2 + 0.002**2) / (self.s**2 + t[:, None] ** 2)).sqrt()

    def consistency(self, x, t, y=None):  # solve f = c_skip x_t + c_out (-F) for F
        sigma = self.sd * t.tan()
        x_t = x * (sigma**2 + self.sd**2).sqrt()[:, None]
        c_skip = self.sd**2 / ((sigma - 0.002) ** 2 + self.sd**2)
        c_out = ((sigma - 0.002) * self.sd * (sigma**2 + self.sd**2).rsqrt()).clamp(min=1e-12)
        return (c_skip[:, None] * x_t - self.map(x_t, sigma)) / c_out[:, None]


def test_boundary_is_exact(nets):
    """f(x, 0.002) = x, whatever the network says."""
    for net, shape in zip(nets(), [(4, 2), (4, 3, 8, 8)]):
        x = torch.randn(shape).double()
        assert torch.equal(cm.f(net, x, torch.full((4,), 0.002, dtype=torch.float64), None, config()), x)


def test_denoiser_is_the_exact_teachers(ring):
    """D of cm.py in EDM's coordinates is the posterior mean of the mixture."""
    cfg, data, teacher = ring
    x_t, t = torch.randn(5, 2).double(), torch.tensor([0.01, 0.1, 1.0, 10.0, 80.0]).double()
    logits = -(x_t[:, None] - data.mean).square().sum(2) / (2 * (data.std**2 + t[:, None] ** 2))
    gain = (data.std**2 / (data.std**2 + t**2))[:, None, None]
    x_0 = (logits.softmax(1)[:, :, None] * (data.mean + gain * (x_t[:, None] - data.mean))).sum(1)
    assert torch.allclose(cm.denoise(teacher, x_t, t, None, config()), x_0, atol=1e-9)


def test_grid_runs_downward_and_pairs_are_neighbours():
    """s is the level below t on EDM's grid of 18 points, and every pair is drawn."""
    grid = common.karras(18)
    t, s = cm.times(draw(2000), 0, config(points=18))
    i = (t[:, None] - grid).abs().argmin(1)
    assert torch.equal(t, grid[i]) and torch.equal(s, grid[i + 1]) and (t > s).all()
    assert set(i.tolist()) == set(range(17))


def test_ct_curriculum():
    """N(k) and mu(k) of ImageNet-64's CT run (s0 = 2, s1 = 200, mu0 = 0.95, 800k steps)."""
    cfg = config(mode="ct", intervals_start=2, intervals=200, mu=0.95, steps=800_000)
    for step, n, mu in [(0, 2, 0.9025), (400_000, 143, 0.999278), (800_000, 201, 0.999487),
                        (10**7, 201, 0.999487)]:
        assert cm.grid_points(step, cfg) == n
        assert cm.target_decay(step, cfg) == pytest.approx(mu, abs=1e-6)


def test_ict_curriculum():
    """The number of intervals doubles from 10 to 1280 in eight equal stages."""
    cfg = config(mode="ict", intervals_start=10, intervals=1280, steps=400_000)
    found = [cm.grid_points(step, cfg) for step in (0, 50_000, 150_000, 399_999, 400_000, 10**7)]
    assert found == [11, 21, 81, 1281, 1281, 1281]
    assert cm.grid_points(0, config(mode="ict", intervals_start=10, intervals=1280, steps=3)) == 11


@pytest.mark.parametrize("mode", ["ct", "ict"])
def test_curricula_depend_on_the_share_of_the_run(mode):
    """N(k) is the same after the same share of a short run and of the paper's. So is the average's memory:
    mu(k)^n weighs what the average was n steps ago, and is the same for n a given share of the run. At the
    paper's own length, mu(k) is that of its formula to the last bit."""
    paper = config(mode=mode, intervals_start=2, intervals=200, mu=0.95, mu_steps=800_000, steps=800_000)
    short = dataclasses.replace(paper, steps=4000)
    for step in range(0, 4001, 100):
        assert cm.grid_points(step, short) == cm.grid_points(200 * step, paper)
        if mode == "ct":
            mu = cm.target_decay(200 * step, paper)
            assert cm.target_decay(step, short) == pytest.approx(mu**200)
            assert mu == cm.target_decay(200 * step, dataclasses.replace(paper, mu_steps=0))


@pytest.mark.parametrize("dataset, mu, s0, s1", [("cifar10", 0.9, 2, 150), ("imagenet64", 0.95, 2, 200)])
def test_presets_have_the_papers_curriculum(dataset, mu, s0, s1):
    """mu(k) = exp(s0 log(mu0) / (N(k) - 1)), with s0, s1 and mu0 of the paper's table, in its 800k steps."""
    cfg = cm.Config(**{k: v for k, v in kit.config.preset(cm.PRESETS, dataset, "ct").items()
                       if k in cm.Config.__dataclass_fields__}, dataset=dataset, mode="ct")
    for share in (0, 0.01, 0.3, 1):
        n = max(1, math.ceil(math.sqrt(share * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1))
        assert cm.grid_points(round(share * 800_000), cfg) == n + 1
        assert cm.target_decay(round(share * 800_000), cfg) == math.exp(s0 * math.log(mu) / n)


def test_ict_pairs_follow_the_log_normal():
    """A pair is as likely as the log-normal has mass between its levels."""
    cfg = config(mode="ict", P_mean=-1.1, P_std=2.0, intervals_start=8, intervals=8)
    grid = common.karras(9)
    t, _ = cm.times(draw(50_000), 0, cfg)
    normal = torch.distributions.Normal(-1.1, 2.0)
    mass = normal.cdf(grid.log()[:-1]) - normal.cdf(grid.log()[1:])
    share = torch.stack([(t == g).double().mean() for g in grid[:-1]])
    assert torch.allclose(share, mass / mass.sum(), atol=0.01)


def test_metrics():
    """l1, l2 and pseudo-Huber of a constant difference, by hand."""
    a, b = torch.zeros(1, 3, 32, 32), torch.full((1, 3, 32, 32), 0.1)
    assert cm.METRICS["l1"](a, b).item() == pytest.approx(0.1)
    assert cm.METRICS["l2"](a, b).item() == pytest.approx(0.01)
    norm, c = 0.1 * math.sqrt(3072), 0.02993  # of the whole sample, not elementwise
    assert cm.METRICS["huber"](a, b).item() == pytest.approx(math.sqrt(norm**2 + c**2) - c, rel=1e-4)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("ddim", 1), ("heun", 2)])
def test_exact_map_has_no_loss_up_to_the_solver(solver, order):
    """cd's error at the exact f is the solver's local error, h^(order + 1)."""
    exact = Gaussian()

    def rms(ratio):
        t = torch.linspace(0.3, 2.0, 16).double()
        s = t * (1 - ratio)
        z = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
        x_t = exact.m + (exact.s**2 + t[:, None] ** 2).sqrt() * z
        x_s = cm.ode_step(exact.teacher, x_t, t, s, None, config(solver=solver))
        f = exact.consistency
        loss, _ = cm.consistency(f, f, x_t, t, x_s, s, None, config(), draw(16))
        return loss.sqrt().item()
    assert math.log2(rms(0.02) / rms(0.01)) == pytest.approx(order + 1, abs=0.2)


def test_continuous_time_is_the_limit_of_discrete_time(ring):
    """The gradient of the l2 loss at (t, t - h), with the weight 1 / h and halved, summed over elements,
    tends to that of f^T sg(df/dt), first order in h."""
    cfg, net, teacher = config(mode="ctcd", solver="euler", weighting="gap"), toy_net(), ring[2]
    x0 = 0.5 * torch.randn(32, 2, generator=torch.Generator().manual_seed(0)).double()
    limit = gradient(cm.ctcd(net, net, teacher, x0, None, 0, cfg, draw(32))[0], net)
    gen = draw(32)
    t = common.karras(2**14)[gen.index(2**14)]
    x_t, error = x0 + t[:, None] * gen.normal(2), []
    for ratio in (1e-2, 1e-3):
        s = t * (1 - ratio) + 0.002 * ratio
        x_s = cm.ode_step(teacher, x_t, t, s, None, cfg)
        discrete = cm.consistency(net, net, x_t, t, x_s, s, None, cfg, gen)[0]  # halved, times D = 2
        error.append((gradient(discrete, net) - limit).norm() / limit.norm())
    assert error[1] < 0.15 * error[0] and error[1] < 0.02, error


def test_ct_gradient_tends_to_cds(ring, posterior):
    """Given x_t, ct's x_s averages to cd's Euler step, so the mean gradients meet as the gap closes."""
    cfg, net, teacher, n = config(solver="euler"), toy_net(1), ring[2], 20_000
    g = torch.Generator().manual_seed(1)
    for p in net.parameters():  # so that f bends as if trained, or the gap would not matter
        p.data = p.data + 0.2 * torch.randn(p.shape, generator=g)
    x_t, t = torch.tensor([[0.3, -0.2]]).double(), torch.tensor([0.4]).double()
    angle = torch.atan(t / cfg.sigma_d)
    x0 = posterior(x_t[0] * angle.cos(), angle[0], n, torch.Generator().manual_seed(0))
    difference = []
    for ratio in (0.95, 0.2):
        s = t * (1 - ratio)
        x_s = cm.ode_step(teacher, x_t, t, s, None, cfg)
        a = gradient(cm.consistency(net, net, x_t, t, x_s, s, None, cfg, draw())[0], net)
        x_s = x0 + s / t * (x_t - x0)
        wide = [v.expand(n, *v.shape[1:]) for v in (x_t, t)]
        b = gradient(cm.consistency(net, net, *wide, x_s, s.expand(n), None, cfg, draw())[0], net)
        difference.append((a - b).norm() / a.norm())
    assert difference[1] < 0.02 < difference[0], difference


def test_cd_learns_the_closed_form_map():
    """On a Gaussian, x_T -> m + s / sqrt(s^2 + T^2) (x_T - m)."""
    exact, cfg = Gaussian(), config(points=18, metric="l2")
    net = kit.networks.build(dict(shape=(1,), channels=32, blocks=4, emb_scale=4.0, head=False))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for step in range(1000):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 1000)
        gen = common.Draw(0, step, 0, 128)
        x0 = exact.m + exact.s * gen.normal(1)
        loss, _ = cm.cd(net, net, exact.teacher, x0, None, step, cfg, gen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noise = cfg.sigma_d * torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    x = cm.sample(net, noise, None, 1, cfg, draw(500))
    expected = exact.map(noise * 160, torch.full((500,), 80.0))
    assert (x - expected).square().mean().sqrt() < 0.1 * exact.s


def test_last_noise_has_zero_amplitude():
    """sqrt(s^2 - 0.002^2) z at s = 0.002 is nothing, and f there is the identity."""
    net, noise = toy_net(), torch.randn(8, 2).double()
    one = cm.sample(net, noise, None, 1, config(sigmas=(80.0,)), draw(8))
    assert torch.equal(cm.sample(net, noise, None, 2, config(sigmas=(80.0, 0.002)), draw(8)), one)


@pytest.mark.parametrize("name", ["inpaint", "colorize", "superres", "stroke"])
def test_editing_operators_are_orthonormal(name):
    """They keep inner products, and the inverse inverts."""
    a, b = torch.randn(2, 2, 3, 8, 8).unbind(0)
    A, inverse, known = cm.operator(name, (3, 8, 8), torch.ones(1, 3, 8, 8))
    assert torch.allclose((A(a) * A(b)).sum(), (a * b).sum(), rtol=1e-4)
    assert torch.allclose(inverse(A(a)), a, atol=1e-5)
    kept = inverse(A(a) * known)
    assert torch.allclose(inverse(A(kept) * known), kept, atol=1e-5)


def test_known_coefficients_are_luma_and_patch_means():
    """superres keeps the means of patches, colorize the luma."""
    x = torch.rand(1, 3, 8, 8)
    A, inverse, known = cm.operator("superres", (3, 8, 8), patch=4)
    means = torch.nn.functional.avg_pool2d(x, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.allclose(inverse(A(x) * known), means, atol=1e-5)
    A, inverse, known = cm.operator("colorize", (3, 8, 8))
    luma, gray = torch.tensor([0.2989, 0.5870, 0.1140]), inverse(A(x) * known)
    before, after = (torch.einsum("bchw,c->bhw", v, luma) for v in (x, gray))
    assert torch.allclose(before, after, atol=1e-5)


@pytest.fixture
def images_run(train, folder):
    train("--dataset", "folder", "--data", folder, "--channels", 8, "--blocks", 1, "--batch", 8, "--steps", 1,
          "--mode", "ct", "--out", "run", script=cm)
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = 255
    Image.fromarray(mask).save("mask.png")
    return str(folder / "a" / "0.png"), str(folder / "b" / "1.png")


@pytest.mark.parametrize("name", cm.EDITS)
def test_edits_keep_what_is_known(name, images_run):
    """The known coefficients of the result are the input's; a picture is written."""
    a, b = images_run
    words = ["--edit", name, "--input", a, "--mask", "mask.png", "--other", b, "--out", "run", "--sigma", "2",
             "--label", "1"]
    cm.main(words)
    assert Image.open(f"run/edit-{name}.png").size[0] > 24
    cfg = kit.parse_args(cm.Config, cm.PRESETS, cm.LOSSES, words)
    columns = cm.edit(kit.load_net("run"), cfg)
    mask = kit.read_image("mask.png", (3, 8, 8))
    A, _, known = cm.operator(name, (3, 8, 8), mask)
    if known.any():
        assert torch.allclose(A(columns["result"]) * known, A(columns["input"]) * known, atol=1e-4)
    if name in ("interpolate", "blend"):  # nine different pictures; between noises without an input
        assert len(columns["result"]) == 9 and columns["result"].std(0).mean() > 0.01
        assert ("input" in columns) == (name == "blend")


def test_interpolation_is_on_the_sphere(images_run, monkeypatch):
    """Slerp of two noises at level 80: unit variance all along, and each end is a one-step sample. Editing
    makes as many network calls as there are levels above 0.002."""
    seen = []
    monkeypatch.setattr(cm, "f", lambda net, x_t, t, y, cfg: seen.append((x_t, t)) or x_t.clamp(-1, 1))
    cfg = kit.parse_args(cm.Config, cm.PRESETS, cm.LOSSES, ["--edit", "interpolate", "--out", "run"])
    net = kit.load_net("run")
    cm.edit(net, cfg)
    (arc, t), gen = seen.pop(), common.Draw(cfg.seed, 0, 0, 1)
    ends = torch.cat([80 * gen.normal(3, 8, 8) for _ in range(2)])
    assert torch.allclose(arc[[0, 8]], ends, atol=1e-4) and set(t.tolist()) == {80.0}
    norms = arc.flatten(1).norm(dim=1)
    assert (norms >= norms[[0, 8]].min() - 1e-3).all() and (norms <= norms[[0, 8]].max() + 1e-3).all()
    words = ["--edit", "colorize", "--input", images_run[0], "--out", "run"]
    cm.edit(net, kit.parse_args(cm.Config, cm.PRESETS, cm.LOSSES, words))
    assert len(seen) == 39 and seen[-1][1] > 0.002


def test_lpips_pools_as_asked(monkeypatch):
    """`lpips` leaves the package's max pooling, `lpips_avg` has averages in its place; images of 224
    pixels."""
    class Package(torch.nn.Module):
        def __init__(self, **kw):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Sequential(torch.nn.MaxPool2d(2)))

        def forward(self, a, b):
            return (self.net(a) - self.net(b)).square().mean((1, 2, 3), keepdim=True)
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Package))
    a, b = torch.rand(2, 2, 3, 300, 300).unbind(0)
    kit.lpips_network.cache_clear()
    pools = dict(lpips=torch.nn.functional.max_pool2d, lpips_avg=torch.nn.functional.avg_pool2d)
    for name, pool in pools.items():
        expected = (pool(a, 2) - pool(b, 2)).square().mean((1, 2, 3))
        assert torch.allclose(cm.METRICS[name](a, b), expected)
        small = cm.METRICS[name](a[..., :32, :32], b[..., :32, :32])
        big = (torch.nn.functional.interpolate(v[..., :32, :32], 224, mode="bilinear") for v in (a, b))
        assert torch.allclose(small, cm.METRICS[name](*big))
    kit.lpips_network.cache_clear()


@pytest.mark.parametrize("script", [cm, sct])
def test_uncertainty_is_edm2s(script, nets):
    """Without a head the loss is EDM's; with one it is EDM2's, E[weight / e^u ||D - x||^2 + u] with u =
    -w."""
    _, net = nets(head=True)
    cfg, x0 = preset(script, "folder"), torch.randn(8, 3, 8, 8)
    loss, _ = script.diffusion(net, None, None, x0, None, 0, cfg, draw(8))
    gen = draw(8)
    t = (cfg.P_mean + cfg.P_std * gen.normal(dtype=torch.float64)).exp()
    x_t = x0 + t.view(-1, 1, 1, 1) * gen.normal(3, 8, 8)
    D = cm.denoise(net, x_t, t, None, preset(cm, "folder"))
    mse = (t**2 + 0.25) / (0.5 * t) ** 2 * (D - x0).square().mean((1, 2, 3))
    u = -net.head(torch.atan(t / 0.5))
    assert u.abs().max() > 0.01 and loss.item() == pytest.approx((mse / u.exp() + u).mean().item(), rel=1e-5)
    net.head = None
    plain, _ = script.diffusion(net, None, None, x0, None, 0, cfg, draw(8))
    assert plain.item() == pytest.approx(mse.mean().item(), rel=1e-5)


def test_search_finds_the_best_of_the_grid(train, capsys):
    """Greedy search returns nfe levels, falling, the second no worse than any other level of the grid."""
    train("--channels", 16, "--blocks", 1, "--batch", 128, "--steps", 40, "--out", "run", script=cm)
    cfg = kit.parse_args(cm.Config, cm.PRESETS, cm.LOSSES, ["--search", "--nfe", "2", "--out", "run"])
    found, net = cm.search(cfg, n=300), kit.load_net("run")
    real = kit.dataset(cfg).batch(common.Draw(0, 2**32, 0, 300))[0]

    def distance(sigma):
        noise, y, gen = kit.noise_and_labels(cfg, net, 0, 300, 0, "cpu")
        trial = dataclasses.replace(cfg, sigmas=(80.0, sigma))
        return kit.metrics.energy_distance(cm.sample(net, noise, y, 2, trial, gen), real)
    assert len(found) == 2 and found[0] == 80.0 > found[1]
    assert distance(found[1]) == min(distance(s) for s in common.karras(18).tolist()[1:])
    assert f"--sigmas 80,{found[1]:.3g}" in capsys.readouterr().out
