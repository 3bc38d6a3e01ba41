"""scm.py: the equations of the paper as identities."""
import common
import kit
import scm
from conftest import draw, one_line, preset, toy_net

import dataclasses
import functools
import math

import pytest
import torch

config = functools.partial(preset, scm, warmup=0)


@pytest.mark.parametrize("options", [{}, dict(c_noise="log"), dict(emb="fourier", emb_scale=16.0)])
def test_f_is_the_identity_at_zero(nets, options):
    """f(x, 0) = x, whatever the network says."""
    for net, shape in zip(nets(**options), [(4, 2), (4, 3, 8, 8)]):
        x = torch.randn(shape).double()
        assert torch.equal(scm.f(net, x, torch.zeros(4).double(), None, config()), x)


def test_proposal_is_log_normal():
    """log(sigma_d tan t) has the mean and the deviation of the config."""
    cfg = config()
    log_sigma = (cfg.sigma_d * scm.times(draw(100_000), 0, cfg).tan()).log()
    assert log_sigma.mean() == pytest.approx(cfg.P_mean, abs=0.02)
    assert log_sigma.std() == pytest.approx(cfg.P_std, abs=0.02)


def test_rearranged_jvp_is_the_plain_tangent(ring):
    """cos(t) df/dt with f differentiated as a whole along (dx/dt, 1), no rearrangement, in float64."""
    cfg, _, teacher = ring
    net, t = toy_net(), torch.linspace(0.01, 1.55, 16).double()
    x_t = 0.5 * torch.randn(16, 2).double()
    dxdt = scm.velocity(teacher, x_t, t, None, None, cfg)
    _, df = common.jvp(lambda x, t: scm.f(net, x, t, None, cfg), (x_t, t), (dxdt, torch.ones_like(t)))
    _, g = scm.tangent(net, x_t, t, None, None, dxdt, 0, cfg, draw())
    assert torch.allclose(g, t.cos()[:, None] * df, atol=1e-10)


def test_tangent_in_half_precision():
    """EDM's c_noise = log(sigma) / 4 has a derivative without bound at both ends: in float16 the plain JVP
    overflows there, the rearranged one of Sec. 5.1 stays finite over (0, pi/2); and so does c_noise = t."""
    ends = 10.0 ** torch.linspace(-4, -1, 7)
    t = torch.cat([ends, torch.tensor([0.5, 1.0, 1.4]), math.pi / 2 - ends.flip(0)]).double()
    x_t, v_t = 0.5 * torch.randn(2, len(t), 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for options in (dict(c_noise="log", emb="fourier", double_norm=False), dict(c_noise="t")):
        small = dict(shape=(3, 16, 16), channels=32, blocks=1, attention=(8,), dtype="fp16")
        net = kit.networks.build(small | options)
        for name, p in net.named_parameters():
            p.data = torch.ones_like(p) if "gain" in name else p.data
        cfg, gen = scm.Config(warmup=0), common.Draw(0, 0, 0, len(t))
        F, g = scm.tangent(net, x_t, t, None, None, v_t, 0, cfg, gen)
        _, plain = common.jvp(net, (x_t / 0.5, t), (v_t / 0.5, torch.ones_like(t)))
        assert F.isfinite().all() and g.isfinite().all()
        assert plain.isfinite().all() == (options["c_noise"] == "t")


def test_discrete_tangent_tends_to_the_continuous(ring):
    """dscd's difference quotient meets the JVP as s -> t, with first-order error."""
    cfg, _, teacher = ring
    net, t = toy_net(), torch.linspace(0.1, 1.5, 16).double()
    x_t = 0.5 * torch.randn(16, 2).double()
    for step in (0, 40, 100):  # r = 0, 0.4, 1
        cfg = config(warmup=100)
        dxdt = scm.velocity(teacher, x_t, t, None, None, cfg)
        F, g = scm.tangent(net, x_t, t, None, None, dxdt, step, cfg, draw())
        error = []
        for h in (1e-3, 1e-4):
            F_d, g_d = scm.discrete_tangent(net, x_t, t, t - h, None, None, dxdt, step, cfg, draw())
            assert torch.equal(F, F_d)
            error.append((g_d - g).abs().max().item())
        assert error[1] < 0.15 * error[0] and error[1] < 1e-2


def test_discrete_tangent_is_the_difference_of_f(ring):
    """At r = 1: (f(x_t, t) - f(x_s, s)) / sin(t - s) with x_s one DDIM step of the teacher below."""
    cfg, _, teacher = ring
    net, t, s = toy_net(), torch.tensor([0.4, 1.2]).double(), torch.tensor([0.0, 1.0]).double()
    x_t = 0.5 * torch.randn(2, 2).double()
    dxdt = scm.velocity(teacher, x_t, t, None, None, cfg)
    _, g = scm.discrete_tangent(net, x_t, t, s, None, None, dxdt, 0, cfg, draw())
    x_s = torch.cat([common.solve(teacher, x_t[i:i + 1], torch.stack([t[i], s[i]]), solver="ddim")
                     for i in (0, 1)])
    df = (scm.f(net, x_t, t, None, cfg) - scm.f(net, x_s, s, None, cfg)) / torch.sin(t - s)[:, None]
    assert torch.allclose(g, t.cos()[:, None] * df, atol=1e-10)


def test_neighbours_follow_the_proposal():
    """t, s are neighbours on EDM's grid, the last s is 0, and t's frequencies match the log-normal's mass."""
    cfg = config(intervals=8)
    t, s = scm.neighbours(draw(50_000), 0, cfg)
    grid = [0.0] + [math.atan(v / cfg.sigma_d) for v in common.karras(9).flip(0)[1:].tolist()]
    below = {round(b, 9): round(a, 9) for a, b in zip(grid, grid[1:])}
    assert all(below[round(a, 9)] == round(b, 9) for a, b in zip(t.tolist()[:500], s.tolist()[:500]))
    tau = torch.distributions.Normal(cfg.P_mean, cfg.P_std)
    edges = common.karras(9).flip(0)
    mass = (tau.cdf(edges.log()[1:]) - tau.cdf(edges.log()[:-1]))
    share = torch.tensor([(t - g).abs().lt(1e-9).double().mean() for g in grid[1:]])
    assert torch.allclose(share, mass / mass.sum(), atol=0.01)


def test_exact_consistency_function_has_no_tangent():
    """For one Gaussian the exact f is known; its tangent along the exact ODE vanishes."""
    m, s, cfg = torch.tensor([0.3, -0.2]).double(), 0.2, config()

    def std(t):  # of x_t, per coordinate
        return torch.sqrt((t.cos() * s) ** 2 + (t.sin() * cfg.sigma_d) ** 2)[:, None]

    def exact(x, t, y=None, guidance=None):  # f = m + s (x_t - cos(t) m) / std(t), as the F that gives it
        x_t, cos, sin = x * cfg.sigma_d, t.cos()[:, None], t.sin()[:, None]
        return (cos * x_t - (m + s * (x_t - cos * m) / std(t))) / (sin * cfg.sigma_d)
    t, x_t = torch.linspace(0.1, 1.5, 8).double(), torch.randn(8, 2).double()
    cos, sin = t.cos()[:, None], t.sin()[:, None]
    slope = cos * sin * (cfg.sigma_d**2 - s**2) / std(t) ** 2
    dxdt = -sin * m + slope * (x_t - cos * m)
    _, g = scm.tangent(exact, x_t, t, None, None, dxdt, 0, cfg, draw())
    assert g.abs().max() < 1e-10


def test_sct_gradient_is_an_unbiased_scd_gradient(ring, posterior):
    """With v_t in place of the teacher, the mean parameter gradient is scd's, within its standard error."""
    cfg, data, teacher = ring
    cfg, net = dataclasses.replace(cfg, tangent="raw"), toy_net()
    t, n, m = torch.tensor([0.5, 1.0, 1.3]).double(), 1500, 30
    x_t = 0.4 * torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).double()

    def gradient(x_t, t, dxdt):
        F, g = scm.tangent(net, x_t, t, None, None, dxdt, 0, cfg, draw())
        loss, _ = scm.match(net, x_t, t, None, None, F, g, cfg, draw())
        grads = torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad], allow_unused=True)
        return torch.cat([g.flatten() for g in grads if g is not None])
    exact = gradient(x_t, t, scm.velocity(teacher, x_t, t, None, None, cfg))
    rounds = []
    for i in range(m):
        x0 = torch.cat([posterior(*pair, n, torch.Generator().manual_seed(i)) for pair in zip(x_t, t)])
        x, angle = x_t.repeat_interleave(n, 0), t.repeat_interleave(n)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        v_t = cos * (x - cos * x0) / sin - sin * x0
        rounds.append(gradient(x, angle, v_t))
    rounds = torch.stack(rounds)
    mean, error = rounds.mean(0), rounds.std(0) / math.sqrt(m)
    score = ((mean - exact) / (error + 1e-9))[exact.abs() > 1e-8]
    assert score.square().mean() < 2.0, score.square().mean()  # about 1 if unbiased
    assert (mean - exact).norm() < 0.05 * exact.norm()


def test_normalized_clipped_and_raw_tangents():
    """g / (rms + c); cos(t) times df/dt clipped to [-1, 1]; and g itself."""
    rms = torch.tensor([[math.sqrt(12.5)], [0.0], [1e-3 / math.sqrt(2)]])
    df, t = torch.tensor([[3.0, -4.0], [0.0, 0.0], [1e-3, 0.0]]), torch.tensor([0.0, 0.7, 1.4])
    cos = t.cos()[:, None]
    g = cos * df
    found = scm.normalize(g, t, config(tangent="normalize", tangent_c=0.1))
    assert torch.allclose(found, g / (cos * rms + 0.1))
    assert torch.allclose(scm.normalize(g, t, config(tangent="clip")), cos * df.clamp(-1, 1))
    assert torch.equal(scm.normalize(g, t, config(tangent="raw")), g)


def test_warmup_fades_in_the_unstable_half():
    """r = 0 leaves -cos^2 (sigma_d F - dx/dt) alone; r runs linearly to 1."""
    cfg = config(warmup=100)
    net, t, (x_t, dxdt) = toy_net(), torch.rand(4).double(), torch.randn(2, 4, 2).double()
    F, g = scm.tangent(net, x_t, t, None, None, dxdt, 0, cfg, draw())
    assert torch.allclose(g, -t.cos()[:, None] ** 2 * (cfg.sigma_d * F - dxdt))
    assert [scm.warmup(k, cfg) for k in (0, 50, 100, 200)] == [0, 0.5, 1, 1]
    assert scm.warmup(0, config(warmup=0)) == 1


@pytest.mark.parametrize("mode", ["scd", "sct", "dscd"])
def test_both_passes_share_the_dropout_mask(mode, nets):
    """With equal masks F - F^- = 0, so the raw loss is exactly the mean square of the raw tangent."""
    _, net = nets(dropout=0.5, head=False)
    net.train()
    x0, cfg = torch.randn(8, 3, 8, 8).double().clamp(-1, 1), config(tangent="raw", intervals=32)
    teacher = nets()[1].eval()
    loss, info = scm.LOSSES[mode](net, net, teacher, x0, None, 10**6, cfg, draw(8))
    assert loss.item() == pytest.approx(info["tangent_rms"].item() ** 2, rel=1e-9)


def test_adaptive_weight_settles_at_the_inverse_loss():
    """Minimizing e^w / D ||error||^2 - w over w gives e^w = 1 / mse, and the weighted term is then 1."""
    error, w = torch.tensor([[2.0, 1.0]]), torch.zeros(1, requires_grad=True)
    for _ in range(500):
        loss, info = scm.adaptive(error, w)
        w.grad = None
        loss.backward()
        w.data -= 0.1 * w.grad
    assert w.exp().item() == pytest.approx(1 / 2.5, rel=1e-4) and info["mse"] == 2.5


def test_guidance_moves_the_teacher_and_one_is_plain(ring):
    """F_uncond + guidance (F_cond - F_uncond): 1 is the conditional teacher; the network sees guidance."""
    cfg, _, teacher = ring
    x_t, t, y = torch.randn(4, 2), torch.rand(4).double(), torch.arange(4)
    plain = scm.velocity(teacher, x_t, t, y, None, cfg)
    assert torch.allclose(scm.velocity(teacher, x_t, t, y, torch.ones(4), cfg), plain, atol=1e-6)
    assert not torch.allclose(scm.velocity(teacher, x_t, t, y, torch.full((4,), 2.0), cfg), plain, atol=1e-2)
    net = toy_net(classes=8, guidance=True)
    net.embedding.guidance_gain.data.fill_(1.0)
    a, b = (net(x_t.double(), t, y, torch.full((4,), s).double()) for s in (1.0, 2.0))
    assert not torch.allclose(a, b, atol=1e-3)


def test_diffusion_loss_is_least_at_the_exact_teacher(ring):
    """Eq. 4 is minimized by the posterior mean: any perturbation of the exact F raises the loss."""
    cfg, data, teacher = ring

    def loss(shift):
        def net(x, t, y, return_w):
            return teacher(x, t, y) + shift, torch.zeros(len(x))
        gen = draw(20_000)
        return scm.diffusion(net, net, None, data.batch(gen)[0], None, 0, cfg, gen)[0].item()
    assert loss(0.0) < min(loss(0.1), loss(-0.1))


def student(cfg, teacher):
    """What scm.py trains in a mode of vsd, small and in float64, every parameter random."""
    cfg = dataclasses.replace(cfg, mode="scd+vsd", channels=16, blocks=1, teacher="exact")
    net = scm.student(cfg, teacher, "cpu").double()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return cfg, net


def test_each_score_is_trained_by_its_own_loss(ring, monkeypatch):
    """Of vsd's two losses, the student's reaches no weight of the fake score, and the fake score's none of
    the student."""
    (cfg, net), parts = student(dataclasses.replace(ring[0], weighting="adaptive"), ring[2]), []
    adaptive = scm.adaptive
    monkeypatch.setattr(scm, "adaptive", lambda *inputs: parts.append(adaptive(*inputs)) or parts[-1])
    x0, y = ring[1].batch(draw())
    total, _ = scm.vsd(net, net, ring[2], x0.double(), y, 0, cfg, draw())
    names = [name for name, _ in net.named_parameters()]
    for (loss, _), own in zip(parts, (lambda n: "extra.fake." not in n, lambda n: "extra.fake." in n)):
        grads = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True, allow_unused=True)
        reached = {name for name, g in zip(names, grads) if g is not None and g.abs().max() > 0}
        assert reached and all(own(name) for name in reached)
    assert total == parts[0][0] + parts[1][0] and any(name.startswith("extra.vsd_head.") for name in names)


def test_the_average_knows_no_fake_score(train):
    """A checkpoint holds the fake score and its head with the network, and the average has neither."""
    ckpt = train("--mode", "vsd", "--init", "none", "--weighting", "adaptive", "--steps", 1, "--batch", 8,
                 "--channels", 16, "--blocks", 1, "--out", "run")
    held = {name.split(".")[1] for name in ckpt["net"] if name.startswith("extra.")}
    assert held == {"fake", "vsd_head"} and not any(name.startswith("extra.") for name in ckpt["ema"])
    assert not kit.load_net("run").extra


def test_vsd_goes_on_from_the_usual_student(train, capsys):
    """Without --init, from out/scm, which it says; or it says which command makes that. While the fake score
    learns alone, the student stays what it was."""
    small = ["--steps", 1, "--batch", 8, "--channels", 16, "--blocks", 1, "--lr_cooldown", 0]
    line = one_line(capsys, scm.main, "--mode", "vsd", *small)
    assert "out/scm" in line and "python scm.py," in line
    before = {k: v for k, v in train(*small)["ema"].items() if k.startswith(("first", "inner", "last"))}
    capsys.readouterr()
    alone = train(*small, "--mode", "vsd", "--fake_first", 1.0)
    assert "--init out/scm, as none was given" in capsys.readouterr().out
    assert all(torch.equal(before[name], alone["net"][name]) for name in before)
    moved = train(*small, "--mode", "vsd", "--fake_first", 0, "--overwrite", "true")
    assert not all(torch.equal(before[name], moved["net"][name]) for name in before)


def test_vsd_stops_where_the_scores_agree(ring):
    """With the fake score in the teacher's place, too, the student's gradient is zero; otherwise it is
    not."""
    cfg, net = student(ring[0], ring[2])
    x0, y = ring[1].batch(draw())
    own = [p for name, p in net.named_parameters() if not name.startswith(("extra.", "head."))]
    for teacher, agree in ((net.extra["fake"], True), (ring[2], False)):
        loss, _ = scm.vsd(net, net, teacher, x0.double(), y, 0, cfg, draw())
        grads = torch.autograd.grad(loss, own)
        assert all(g.abs().max() == 0 for g in grads) == agree


def test_vsds_fixed_point_is_the_data(ring):
    """A student x = m + s z, with the exact scores of its samples and of the data, a Gaussian: it ends at the
    data's mean and standard deviation."""
    cfg, teacher = ring[0], kit.toys.Mixture(ring[0], torch.tensor([[0.4]]).double(), 0.3)

    class Student(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.m, self.s = (torch.nn.Parameter(torch.tensor(v).double()) for v in (-0.3, 0.8))
            self.extra = torch.nn.ModuleDict(dict(fake=Fake()))

        def forward(self, x, t, y, guidance):  # F for which f(x_t, t) is m + s z
            return (t.cos()[:, None] * x * 0.5 - self.m - self.s * x) / (t.sin()[:, None] * 0.5)

    class Fake(torch.nn.Module):
        def forward(self, x, t, y, guidance, return_w=False):
            F = kit.toys.Mixture(cfg, net.m.detach().view(1, 1), net.s.detach() * 0.5)(x, t)
            return (F, torch.zeros_like(t)) if return_w else F
    cfg, net = dataclasses.replace(cfg, weighting="none"), Student()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 400)
        loss, _ = scm.vsd(net, net, teacher, torch.zeros(256, 1).double(), None, step, cfg, draw(256, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert net.m.item() == pytest.approx(0.4, abs=0.01) and net.s.item() * 0.5 == pytest.approx(0.3, abs=0.01)


def test_sampler_with_the_exact_map():
    """If every data point is the same, f is constant, and any number of steps returns it."""
    cfg, point = config(), torch.tensor([0.4, -0.1])

    def net(x, t, y, guidance):  # F that makes f(x_t, t) = point
        return (t.cos()[:, None] * x * cfg.sigma_d - point) / (t.sin()[:, None] * cfg.sigma_d)
    for nfe in (1, 2, 4):
        x = scm.sample(net, cfg.sigma_d * torch.randn(5, 2), None, nfe, cfg, draw(5))
        assert torch.allclose(x, point.expand(5, 2).to(x.dtype), atol=1e-5)


def test_sampling_times():
    """One step starts at arctan(80 / sigma_d); two at that and 1.1; further ones spread evenly below."""
    cfg, seen = config(), []

    def net(x, t, y, guidance):
        seen.append(round(t[0].item(), 4))
        return torch.zeros_like(x)
    for nfe in (1, 2, 4):
        scm.sample(net, torch.randn(3, 2), None, nfe, cfg, draw(3))
    assert seen == [1.5645, 1.5645, 1.1, 1.5645, 1.1, 0.7333, 0.3667]
