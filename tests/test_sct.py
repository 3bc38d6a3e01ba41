"""sct.py: the pair of times, the averaged target, the segments, guidance."""
import common
import kit
import sct
from conftest import draw, fails, full, gradient, one_line, parsed, preset

import functools
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

config = functools.partial(preset, sct)


class Fixed:
    """A finite training set, as batch and as dataset."""
    def __init__(self, x, y=None):
        self.x, self.y = x, y

    def batch(self, gen):
        return self.x, self.y

    def members(self, c, device, size=7):
        yield from (self.x if c < 0 else self.x[self.y == c]).split(size)


def fixed(x, y=None, reference="dataset"):
    """The reference set of a finite training set."""
    return sct.ReferenceSet(Fixed(x, y), config(dataset="fixed", reference=reference))


class Gaussian:
    """x0 ~ N(0, s^2): the exact D for the phased ODE's loss, as F = net(x, t, y)."""
    s, sd = 0.2, 0.5

    def __init__(self, cfg):
        self.lower = sct.edges(cfg)

    def point(self, x_t, t, edge):
        return x_t * ((self.s**2 + edge**2) / (self.s**2 + t**2)).sqrt()[:, None]

    def __call__(self, x, t, y=None):
        t = self.sd * t.tan()
        x_t = x * (t**2 + self.sd**2).sqrt()[:, None]
        edge = self.lower[(self.lower < t[:, None] * (1 - 1e-12)).sum(1) - 1]
        share = (edge / t)[:, None]
        D = (self.point(x_t, t, edge) - share * x_t) / (1 - share)                  # Eq. 16, solved for D
        c_skip, c_out = self.sd**2 / (t**2 + self.sd**2), t * self.sd * (t**2 + self.sd**2).rsqrt()
        return -(D - c_skip[:, None] * x_t) / c_out[:, None]


def brute_force(x_t, t, y, x, labels):
    """Posterior mean over a finite set and 1 / sum W^2, in float64, one sample after the other."""
    means, averaged = [], []
    for i in range(len(x_t)):
        members = x if y is None or y[i] < 0 else x[labels == y[i]]
        logits = -(x_t[i] - members).double().square().flatten(1).sum(1) / (2 * t[i] ** 2)
        W = logits.softmax(0)
        means.append((W.view(-1, *[1] * (x.ndim - 1)) * members.double()).sum(0))
        averaged.append(1 / W.square().sum())
    return torch.stack(means), torch.stack(averaged)


@pytest.mark.parametrize("level", [0.002, 0.1, 1.0, 80.0])
@pytest.mark.parametrize("shape", [(2,), (3, 8, 8)])
def test_target_is_the_ideal_denoiser(level, shape):
    """Over the whole finite dataset x* is E[x_0 | x_t], with and without classes; in float32, in chunks. With
    it comes over how many samples it averages."""
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(40, *shape, generator=g) / 2, torch.arange(40) % 3
    x_t, t = x[:10] + level * torch.randn(10, *shape, generator=g), full(10, level)
    for y in (None, torch.tensor([0, 1, 2, -1] * 2 + [0, 1])):
        mean, averaged = fixed(x, labels).denoise(x_t, t, y, x[:10], 0)
        exact, number = brute_force(x_t, t, y, x, labels)
        assert torch.allclose(mean.double(), exact, atol=2e-5)
        assert torch.allclose(averaged.double(), number, rtol=1e-3)


def test_weights_vanish_outside_the_class():
    """Points of other classes, however near, change nothing; without a label they do."""
    x, y = torch.randn(20, 2), torch.arange(20) % 2
    moved = torch.where(y[:, None] == 1, torch.zeros(20, 2), x)

    def target(x, label):
        return fixed(x, y).denoise(torch.zeros(1, 2), full(1, 0.3), torch.tensor([label]), x[:1], 0)[0]
    assert torch.equal(target(x, 0), target(moved, 0))
    assert not torch.allclose(target(x, -1), target(moved, -1))


def test_the_set_holds_the_sample_itself(folder):
    """The batch, with or without the dataset's points; images have the dataset alone, or of each class the
    batch's own and class_size others, new ones in each step."""
    x, y = torch.randn(6, 2), torch.arange(6) % 2
    for dataset, reference, number in (("gmm", "batch", 3), ("gmm", "dataset", 6), ("fixed", "dataset", 3)):
        cfg = config(dataset=dataset, reference=reference)
        found = torch.cat(list(sct.ReferenceSet(Fixed(x, y), cfg).members(1, (x, y), 0)))
        assert len(found) == number and torch.equal(found[:3], x[y == 1])
    cfg = config(dataset="folder", data=str(folder), reference="dataset", class_size=5, conditional=True)
    data = kit.dataset(cfg)
    x0, labels = data.batch(draw(4))
    sets = [torch.cat(list(sct.ReferenceSet(data, cfg).members(1, (x0, labels), step))) for step in range(9)]
    own = x0[labels == 1]
    assert all(len(v) == len(own) + 5 and torch.equal(v[:len(own)], own) for v in sets)
    assert any(not torch.equal(v, sets[0]) for v in sets)
    known = {row.numpy().tobytes() for row in torch.cat(list(data.members(1, "cpu")))}
    assert all(row.numpy().tobytes() in known for row in torch.cat(sets))


def test_alone_in_the_class():
    """Anchors without company in their class: the target is x_0 itself, and the average goes over one."""
    x, y = torch.randn(4, 2), torch.arange(4)
    teacher = fixed(x, y, "batch")
    net = kit.networks.build(dict(shape=(2,), classes=4, channels=16, blocks=1, head=False))
    losses = [loss(net, net, teacher, x, y, 3000, teacher.cfg, draw(4)) for loss in (sct.ect, sct.sct)]
    assert losses[0][0].item() == pytest.approx(losses[1][0].item(), rel=1e-3)
    assert losses[1][1]["averaged"] == 1


def test_one_element_reference_is_ect():
    """The same loss and gradient when the reference set is the anchor alone."""
    x0 = torch.randn(1, 2)
    teacher = fixed(x0, reference="batch")
    net = kit.networks.build(dict(shape=(2,), channels=16, blocks=1, head=False))
    gradients = []
    for loss in (sct.ect, sct.sct):
        value, _ = loss(net, net, teacher, x0, None, 9000, teacher.cfg, draw(1))
        gradients.append(torch.cat([value.view(1), gradient(value, net)]))
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4)


def test_error_falls_with_the_reference(ring):
    """E||x* - E[x_0 | x_t]||^2 for the ring, whose posterior mean is known, over the same of one sample: it
    falls as the reference grows, and the number of samples that are averaged rises."""
    _, data, _ = ring
    measured, inverse = [], []
    for n in (1, 16, 128, 1024):
        errors, parts = torch.zeros(2, dtype=torch.float64), []
        for step in range(30):
            x0, _ = data.batch(common.Draw(0, step, 0, 1024))
            gen, x0, t = common.Draw(1, step, 0, 64), x0.double(), full(64, 0.5)
            x_t = x0[:64] + 0.5 * gen.normal(2)
            sigma = config().sigma_d
            x, angle = common.to_trigflow(x_t, torch.ones(64), t, sigma)
            exact = angle.cos()[:, None] * x - angle.sin()[:, None] * sigma * data(x / sigma, angle)
            for i in range(64):  # the anchor and n - 1 others
                chunk = torch.cat([x0[i:i + 1], x0[64:63 + n]])
                mean, averaged = sct.posterior_mean(x_t[i:i + 1], t[:1], [chunk])
                assert 1 - 1e-9 <= averaged <= n + 1e-9
                errors += torch.stack([(v - exact[i]).square().sum() for v in (mean, x0[i])])
                parts.append(1 / averaged.item())
        measured.append((errors[0] / errors[1]).item())
        inverse.append(sum(parts) / len(parts))
    assert measured[0] == inverse[0] == 1, (measured, inverse)
    assert all(b < 0.4 * a for v in (measured, inverse) for a, b in zip(v, v[1:])), (measured, inverse)


def test_schedule_is_ects():
    """s / t of ECT's code, q = 2 and q = 256 (k = 8, b = 1), by stage."""
    def ratio(t, n, **kw):
        cfg = config(**dict(shrink=2.0, stage_steps=100, first_stage=1) | kw)
        t = torch.tensor([t]).double()
        return (sct.earlier(t, torch.zeros(1), 100 * n, cfg) / t).item()
    assert ratio(80.0, 0) == pytest.approx(0.5) and ratio(0.01, 0) == 0
    for stage, expected in [(2, (0.3775, 0.606, 0.875)), (4, (0.844, 0.902, 0.969)),
                            (6, (0.961, 0.975, 0.992))]:
        assert [ratio(t, stage) for t in (0.01, 1.0, 80.0)] == pytest.approx(list(expected), abs=1e-3)
    found = [ratio(t, 0, shrink=256.0) for t in (0.01, 1.0, 80.0)]
    assert found == pytest.approx([0.9805, 0.9877, 0.9961], abs=1e-4)
    assert ratio(1.0, 0, shrink=256.0, widening=0.0) == 255 / 256          # the fixed partition, Fig. 4
    assert ratio(80.0, 0, first_stage=0) == 0                              # Eq. 15: diffusion first


def test_times_stay_in_their_segment():
    """edge <= s < t <= the next edge, in every segment; and an edge belongs to the segment below it."""
    cfg = config(phases=4, P_mean=0.0)
    t, s, edge = sct.times(draw(5000), 9000, cfg)
    assert (edge <= s).all() and (s < t).all() and set(edge.tolist()) == set(sct.edges(cfg).tolist())
    upper = torch.cat([sct.edges(cfg)[1:], full(1, math.inf)])
    assert (t <= upper[torch.searchsorted(sct.edges(cfg), edge)]).all()
    assert torch.equal(sct.lower_edge(sct.edges(cfg)[1:], cfg), sct.edges(cfg)[:-1])


def test_pairs_never_close():
    """Eq. 17 by hand; and however long the run, s stays below t, in float32 too."""
    cfg = config(shrink=2.0, stage_steps=10, first_stage=1, widening=8.0, widening_rate=1.0)
    n = 1 + 8 / (1 + math.exp(3.0))
    assert sct.earlier(full(1, 3.0), full(1, 1.0), 20, cfg).item() == pytest.approx((1 - n / 8) * 2 + 1)
    t, datasets = full(1, 0.5), [key for key in sct.PRESETS if " " not in key]
    for dataset, mode in itertools.product(datasets, ("ect", "sct")):
        cfg = parsed("--dataset", dataset, "--mode", mode, script=sct)
        for step in (10 * cfg.steps, 10**9):
            assert sct.earlier(t, 0 * t, step, cfg).float() < t.float() * (1 - 1e-4)


def test_s_at_the_edge_is_the_point_itself(nets):
    """f(x, edge) = x, and the loss at s = 0 has the clean x_0 as target: finite, no log(0) on the way."""
    cfg, x = config(), torch.randn(4, 2).double()
    net = nets(head=False, c_noise="log")[0]
    for edge in (0.0, 0.4):
        assert torch.allclose(sct.f(net, x, full(4, edge), None, cfg, full(4, edge)), x, atol=1e-12)
    t, zero = torch.tensor([1e-3, 0.1, 1.0, 200.0]).double(), full(4, 0.0)
    loss, info = sct.consistency(net, net, x, t, x / 2, zero, None, cfg, draw(4), zero)
    error = (sct.f(net, x, t, None, cfg) - x / 2).square().sum(1)
    expected = (((error + cfg.huber_c**2).sqrt() - cfg.huber_c) / (t + cfg.delta)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9) and info["gap"] == 1


@pytest.mark.parametrize("phases", [1, 4])
def test_exact_ode_has_no_loss(phases):
    """With the ideal target, the exact f of every segment has a loss of the Euler step's size only."""
    cfg, losses = config(phases=phases), []
    exact = Gaussian(cfg)
    for step in (15 * cfg.stage_steps, 19 * cfg.stage_steps):
        t, s, edge = sct.times(draw(512), step, cfg)
        z = torch.randn(512, 1, generator=torch.Generator().manual_seed(0))
        x_t = (exact.s**2 + t**2).sqrt()[:, None] * z
        ideal = x_t * (exact.s**2 / (exact.s**2 + t**2))[:, None]
        x_s = sct.ode_step(ideal, x_t, t, s)
        a, b = sct.f(exact, x_t, t, None, cfg, edge), sct.f(exact, x_s, s, None, cfg, edge)
        losses.append((a - b).abs().mean().item())
    assert losses[1] == pytest.approx(losses[0] / cfg.shrink**8, rel=0.1)  # second order in the gap
    assert losses[1] < 1e-3


@pytest.mark.parametrize("phases", [2, 4])
def test_phases_sample_the_exact_ode(phases):
    """With the exact f of every segment, K steps without noise end where the ODE ends."""
    cfg = config(phases=phases, mode="sct")
    exact, noise = Gaussian(cfg), cfg.sigma_d * torch.randn(100, 1).double()
    x = sct.sample(exact, noise, None, phases, cfg, draw(100))
    assert torch.allclose(x, exact.point(noise * 160, full(100, 80.0), full(100, 0.0)), atol=1e-9)


def test_edge_skipping(capsys):
    """eta = 1 is plain; eta moves the stops between the first and the last, and only those (Eq. 20)."""
    net, noise = kit.networks.build(dict(shape=(2,), channels=16, blocks=1)), torch.randn(8, 2)
    seen = []

    def spy(x, t, y):
        seen.append(config().sigma_d * t[0].tan().item())
        return net(x, t, y)
    for eta in (1.0, 0.9):
        cfg = config(phases=3, eta=eta)
        sct.sample(spy, noise, None, 3, cfg, draw(8))
    edges = sct.edges(cfg).flip(0).tolist()
    assert seen == pytest.approx([80, *edges[:2], 80, 0.9 * edges[0], 0.9 * edges[1]])
    assert "--nfe 3" in fails(capsys, sct.sample, net, noise, None, 2, cfg, draw(8))


def test_guidance(nets):
    """1 is plain; the mix is linear, away from the weaker self, or from the network without label."""
    net, noise, y = nets(classes=3, head=False)[0], torch.randn(6, 2).double(), torch.arange(6) % 3
    weak = nets(classes=3, head=False)[0]
    with torch.no_grad():
        for p in weak.parameters():
            p += 0.1
    net.extra["weak"] = weak

    def f(w, guide, net=net, y=y):
        cfg = config(guidance=w, guide=guide, conditional=True)
        return sct.sample(net, noise, y, 1, cfg, draw(6))
    assert torch.equal(f(1.0, "weak"), f(1.0, "label"))
    for guide, star in (("weak", f(1.0, "", weak)), ("label", f(1.0, "", net, torch.full_like(y, -1)))):
        assert torch.allclose(f(1.2, guide), star + 1.2 * (f(1.0, guide) - star), atol=1e-9)
        assert not torch.allclose(f(1.2, guide), f(1.0, guide))


def test_ects_shift(nets):
    """Shift 0 is today's sampler; 0.003 is ECMPrecond's in eval mode: c_skip and c_out of sigma - 0.003, with
    c_out's denominator and c_in of sigma. Training knows no shift."""
    net, noise = nets(head=False)[0], torch.randn(6, 2).double()
    assert config().sigma_shift == 0 and sct.PRESETS["cifar10 --mode ect"]["sigma_shift"] == 0.003
    plain, x = (sct.sample(net, noise, None, 1, config(sigma_shift=s), draw(6)) for s in (0.0, 0.003))
    x_t, sigma = 160 * noise, torch.full((6, 1), 80.0).double()
    F = -net(x_t / (sigma**2 + 0.25).sqrt(), torch.atan(sigma[:, 0] / 0.5), None)
    for found, s in ((plain, sigma), (x, sigma - 0.003)):
        expected = 0.25 / (s**2 + 0.25) * x_t + s * 0.5 / (sigma**2 + 0.25).sqrt() * F
        assert torch.allclose(found, expected, atol=1e-12)
    a, b = (sct.ect(net, net, None, noise, None, 0, config(sigma_shift=s), draw(6))[0] for s in (0.0, 0.003))
    assert a == b and not torch.equal(plain, x)


TOY = ["--channels", 16, "--blocks", 1, "--batch", 64, "--lr_cooldown", 0]


def test_past_self_is_the_average_at_half(train, capsys):
    """A run keeps its EMA of step steps // 2, and sampling with --guidance uses it."""
    short = ["--ema_sigma_rel", 0, "--stage_steps", 2]            # an EMA that does not depend on --steps
    half = train(*TOY, *short, "--steps", 3, "--out", "half", script=sct)
    whole = train(*TOY, *short, "--steps", 6, "--out", "whole", script=sct)
    names = [name for name in half["ema"] if not name.startswith("extra.")]
    assert all(torch.equal(half["ema"][name], whole["ema"][f"extra.weak.{name}"]) for name in names)
    assert any(not torch.equal(half["ema"][name], whole["ema"][name]) for name in names)
    images = [Path(f"whole/{w}.npz") for w in ("1.0", "1.5")]
    for path in images:
        sct.main(["--sample", "8", "--out", "whole", "--guidance", path.stem, "--save", str(path)])
    assert not np.array_equal(*(np.load(path)["arr_0"] for path in images))
    for flags in (["--phases", "4", "--nfe", "4"], ["--conditional", "--label_dropout", "0.1"]):
        line = one_line(capsys, sct.main, "--sample", 8, "--out", "whole", *flags)
        assert "was trained with" in line


def test_a_run_with_guidance_draws_before_half(train):
    """Pictures while training do not need the weaker self, which is not there before half of training."""
    train(*TOY, "--steps", 4, "--sample_every", 1, "--guidance", 1.2, "--out", "run", script=sct)
    assert len(list(Path("run").glob("samples-*.png"))) == 4


def test_batch_reference_ignores_micro_batches(train):
    """The reference is the global batch, however it is cut up."""
    whole = train(*TOY, "--steps", 3, "--out", "whole", script=sct)
    parts = train(*TOY, "--steps", 3, "--micro", 16, "--out", "parts", script=sct)
    assert all(torch.allclose(whole["net"][k], parts["net"][k], atol=1e-5) for k in whole["net"])


def test_class_members_do_not_depend_on_the_micro_batch(folder):
    """--class_size: x* of a sample is the same whether its part of the global batch is 16 or 4 at once."""
    cfg = config(dataset="folder", data=str(folder), conditional=True, reference="dataset", class_size=3,
                 batch=16)
    data = kit.dataset(cfg)
    teacher, t = sct.ReferenceSet(data, cfg), torch.full((16,), 0.7, dtype=torch.float64)

    def targets(lo, hi):
        gen = common.Draw(cfg.seed, 5, lo, hi)
        x0, y = data.batch(gen)
        x_t, _ = sct.noisy(x0, t[lo:hi], gen, cfg)
        return teacher.denoise(x_t, t[lo:hi], y, x0, 5)[0]
    parts = torch.cat([targets(lo, lo + 4) for lo in range(0, 16, 4)])
    assert torch.allclose(parts, targets(0, 16), atol=1e-6)
