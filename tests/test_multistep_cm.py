"""multistep_cm.py: DDIM, its inverse and aDDIM; Algorithm 1; progressive distillation."""
import cm
import common
import conftest
import kit
import multistep_cm as mcm
from conftest import draw, full, gradient, one_line, preset

import functools
import math

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

config = functools.partial(preset, mcm)
toy_net = functools.partial(conftest.toy_net, emb_scale=8.0, c_noise="log")


def test_ddim_is_diffusers():
    """The same step as DDIMScheduler's, between levels of its schedule."""
    scheduler = diffusers.DDIMScheduler(prediction_type="sample", clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(20)
    x, z = torch.randn(4, 3, 8, 8).double(), torch.randn(4, 3, 8, 8).double()

    def time(level):  # of the cosine schedule, where alpha^2 is alphas_cumprod; beyond the last it is 1
        alpha2 = scheduler.alphas_cumprod[level].double() if level >= 0 else torch.tensor(1.0).double()
        return full(4, 2 / math.pi * torch.acos(alpha2.sqrt()).item())

    for level in (951, 501, 1):
        theirs = scheduler.step(x, level, z).prev_sample
        assert torch.allclose(mcm.ddim(x, z, time(level), time(level - 50), config()), theirs, atol=1e-6)


@pytest.mark.parametrize("noise_res", [(), (32, 64, 64), (32, 128, 128)])
def test_inverse_ddim(noise_res):
    """invDDIM(DDIM(x)) = x down to the smallest gap of the schedule; DDIM to its own time is the identity."""
    cfg, x, z = config(noise_res=noise_res), torch.randn(3, 2).double(), torch.randn(3, 2).double()
    t, s = torch.tensor([1.0, 0.5, 1 / 1280]).double(), torch.tensor([1 - 1 / 1280, 0.25, 0.0]).double()
    assert torch.allclose(mcm.inverse_ddim(mcm.ddim(x, z, t, s, cfg), z, t, s, cfg), x, atol=1e-9)
    for time in (0.0, 0.3, 1.0):
        assert torch.allclose(mcm.ddim(x, z, full(3, time), full(3, time), cfg), z, atol=1e-12)


def test_noise_schedule():
    """Variance preserving; the plain cosine; interpolated log-SNR as simple diffusion writes it."""
    t = torch.linspace(0.01, 0.99, 9).double()
    for noise_res in ((), (32, 128, 128)):
        alpha, sigma = mcm.alpha_sigma(t, config(noise_res=noise_res))
        assert torch.allclose(alpha**2 + sigma**2, torch.ones(9).double())
        plain = -2 * torch.log(torch.tan(math.pi * t / 2))
        low, high = plain + 2 * math.log(32 / 128), plain
        expected = t * low + (1 - t) * high if noise_res else plain
        assert torch.allclose(2 * torch.log(alpha / sigma), expected, atol=1e-9)


@pytest.mark.parametrize("noise_res", [(), (32, 64, 64)])
def test_exported_levels_are_the_samplers(noise_res, monkeypatch):
    """inference.json names sigma / alpha where the sampler calls the network."""
    seen, cfg = [], config(student_steps=4, noise_res=noise_res)

    def spy(net, z, t, y, cfg):
        seen.extend(t[:1].tolist())
        return z
    monkeypatch.setattr(mcm, "f", spy)
    mcm.sample(None, torch.ones(1, 2), None, 4, cfg, None)
    alpha, sigma = mcm.alpha_sigma(torch.tensor(seen).double(), cfg)
    assert cfg.inference()["ratios"][4] == pytest.approx((sigma / alpha).tolist())


def test_addim_corrects_the_norm():
    """DDIM's ||z_s||^2 falls short by tr Var[z_s | z_t] (Eq. 12); aDDIM makes it up. The data are a Gaussian
    with a mean, so x and eps are nearly orthogonal, as Eq. 14 assumes."""
    cfg, mean, std, t, s = config(), 1.0, 0.05, full(20_000, 0.7), full(20_000, 0.6)
    alpha, sigma = (v[0] for v in mcm.alpha_sigma(t, cfg))
    alpha_s, sigma_s = (v[0] for v in mcm.alpha_sigma(s, cfg))
    g = torch.Generator().manual_seed(0)
    signs = torch.randn(64, generator=g).double().sign() * mean
    x0 = signs + std * torch.randn(20_000, 64, generator=g).double()
    z = alpha * x0 + sigma * torch.randn(20_000, 64, generator=g).double()
    gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    x, x_var = signs + gain * (z - alpha * signs), full(20_000, (std**2 * (1 - gain * alpha)).item())
    plain, adjusted = mcm.ddim(x, z, t, s, cfg), mcm.addim(x, z, x_var, t, s, cfg)
    exact = alpha_s * x0 + sigma_s / sigma * (z - alpha * x0)                  # Eq. 10, x* = x0 ~ p(x | z_t)
    missing = (exact.square().sum(1) - plain.square().sum(1)).mean()
    made_up = (adjusted.square().sum(1) - plain.square().sum(1)).mean()
    trace = 64 * (alpha_s - alpha * sigma_s / sigma) ** 2 * x_var[0]
    assert made_up.item() == pytest.approx(trace.item(), rel=0.1)
    assert missing.item() == pytest.approx(trace.item(), rel=0.2)


def test_addim_tends_to_ddim():
    """Equal at no variance; otherwise the difference is of second order in the step."""
    cfg, x, z, t = config(), torch.randn(4, 2).double(), torch.randn(4, 2).double(), full(4, 0.5)
    s = full(4, 0.2)
    assert torch.allclose(mcm.addim(x, z, full(4, 0.0), t, s, cfg), mcm.ddim(x, z, t, s, cfg))
    gaps = [(mcm.addim(x, z, full(4, 0.1), t, t - h, cfg) - mcm.ddim(x, z, t, t - h, cfg)).norm()
            for h in (0.02, 0.01)]
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.15)


def test_segments_own_their_upper_ends():
    """t_step <= s < t <= t_step + 1/S on a grid of T; a boundary is of the lower segment; all are drawn."""
    cfg = config(student_steps=4, teacher_steps=(8, 8))
    t, s, t_step = mcm.times(draw(4000), 0, cfg)
    assert torch.allclose(t - s, full(4000, 1 / 8)) and (s >= t_step).all() and (t <= t_step + 0.25).all()
    for i in range(4):
        rows = t_step == i / 4
        assert set(t[rows].tolist()) == {i / 4 + 1 / 8, i / 4 + 2 / 8}


def test_teacher_steps_are_annealed():
    """64 -> 1280 over the first 100k of 200k steps, log-linearly: 286.22 half-way (App. A.1)."""
    cfg = config(steps=200_000, student_steps=2, teacher_steps=(64, 1280))
    for step, total in ((0, 64), (50_000, 286.22), (100_000, 1280), (10**6, 1280)):
        t, s, _ = mcm.times(draw(64), step, cfg)
        assert torch.allclose(1 / (t - s), full(64, 2.0 * round(total / 2)))


def test_as_many_steps_as_the_teacher_is_diffusion():
    """student_steps = T: ct's loss and gradient are those of (SNR + 1) || x - f(z_t, t) || (Eq. 9)."""
    cfg, net, x0 = config(student_steps=16, teacher_steps=(16, 16)), toy_net(), torch.randn(64, 2)
    loss = mcm.ct(net, net, None, x0, None, 0, cfg, draw())[0]
    gen = draw()
    t, s, t_step = mcm.times(gen, 0, cfg)
    assert torch.equal(s, t_step)
    diffusion = mcm.weighted(x0 - mcm.f(net, mcm.noisy(x0, t, gen, cfg)[0], t, None, cfg), t, cfg)
    assert loss.item() == pytest.approx(diffusion.item(), rel=1e-8)
    assert torch.allclose(gradient(loss, net), gradient(diffusion, net), rtol=1e-7, atol=1e-9)


def test_one_segment_is_cm(ring):
    """S = 1 with a DDIM teacher is cm.py's cd in other coordinates: the same two points, for any net."""
    _, _, teacher = ring
    cfg = config(student_steps=1, solver="ddim", huber_c=0.0, teacher_steps=(64, 64))
    x0 = torch.randn(1, 2)
    ratios = []
    for seed in (0, 1):
        net, gen = toy_net(seed), draw(1)
        ours = mcm.cd(net, net, teacher, x0, None, 0, cfg, gen)[0]
        gen = draw(1)
        t, s, _ = mcm.times(gen, 0, cfg)
        alpha, sigma = mcm.alpha_sigma(t, cfg)
        x_t = mcm.noisy(x0, t, gen, cfg)[0] / alpha                             # EDM's sample and levels
        level, lower = sigma / alpha, (lambda a, b: b / a)(*mcm.alpha_sigma(s, cfg))
        x_s = cm.ode_step(teacher, x_t, level, lower, None, cm.Config(solver="ddim"))
        points = [cm.denoise(net, x, v, None, cm.Config()) for x, v in ((x_t, level), (x_s, lower))]
        ratios.append(ours.item() / cm.METRICS["l2"](*points).sqrt().item())
    weight = (mcm.snr(t, cfg) + 1).item()
    assert ratios == pytest.approx([weight, weight], rel=1e-6)


@pytest.mark.parametrize("steps", [1, 4])
def test_perfect_f_has_no_loss(steps, monkeypatch):
    """On a Gaussian: teacher steps along the exact ODE, f the DDIM step that ends on it at t_step."""
    cfg, std = config(student_steps=steps, huber_c=0.0), 0.3

    def scale(t):
        alpha, sigma = mcm.alpha_sigma(t, cfg)
        return ((alpha * std) ** 2 + sigma**2).sqrt()[:, None]

    def exact(net, z, t, y, cfg):
        t_step = torch.ceil(t * steps - 1e-9).sub(1).clamp(min=0) / steps
        t = t.clamp(min=1e-6)
        return mcm.inverse_ddim(z * scale(t_step) / scale(t), z, t, t_step, cfg)
    monkeypatch.setattr(mcm, "f", exact)
    t, s, t_step = mcm.times(draw(), 10**6, cfg)
    z_t = scale(t) * torch.randn(64, 1).double()
    error = mcm.consistency(None, None, z_t, t, z_t * scale(s) / scale(t), s, None, cfg, draw(), t_step)[0]
    wrong = mcm.consistency(None, None, z_t, t, 0.9 * z_t, s, None, cfg, draw(), t_step)[0]
    assert error < 1e-6 * wrong
    noise = cfg.sigma_d * torch.randn(32, 1).double()                           # and it samples the exact ODE
    x = mcm.sample(None, noise, None, steps, cfg, None)
    assert torch.allclose(x, std * noise / cfg.sigma_d, atol=1e-9)


def test_progressive_distillation(ring):
    """The student's steps halve down to student_steps; the target matches two steps of the teacher."""
    cfg = config(mode="pd", pd_start=32, student_steps=4, steps=100, solver="ddim", huber_c=0.0)
    steps = [32 // 2 ** mcm.halvings(step, cfg) for step in (0, 24, 25, 50, 75, 99, 10**6)]
    assert steps == [32, 32, 16, 8, 4, 4, 4]
    _, _, teacher = ring
    net, x0, gen = toy_net(), torch.randn(64, 2), draw()
    for step, target in ((0, teacher), (80, toy_net(1))):                       # the teacher, then a student
        n = 32 if step == 0 else 4
        loss = mcm.pd(net, target, teacher, x0, None, step, cfg, draw())[0]
        gen = draw()
        i = 1 + gen.index(n).double()
        z = z_t = mcm.noisy(x0, i / n, gen, cfg)[0]
        for a, b in ((i, i - 0.5), (i - 0.5, i - 1)):
            z = mcm.ddim(mcm.f(target, z, a / n, None, cfg), z, a / n, b / n, cfg)
        one = mcm.ddim(mcm.f(net, z_t, i / n, None, cfg), z_t, i / n, (i - 1) / n, cfg)
        unit = mcm.ddim(torch.ones_like(z_t), 0 * z_t, i / n, (i - 1) / n, cfg)  # of z per unit of x
        expected = mcm.weighted((one - z) / unit, i / n, cfg)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_teacher_variance_is_of_the_unguided_output(ring):
    """With guidance, x* moves but x_var does not (App. A.1)."""
    _, data, teacher = ring
    cfg = config(conditional=True, guidance=3.0)
    y, t, s, x0 = torch.arange(8), full(8, 0.7), full(8, 0.5), data.mean
    z_t = mcm.noisy(x0, t, draw(8), cfg)[0]
    x, x_none = (mcm.f(teacher, z_t, t, v, cfg) for v in (y, torch.full_like(y, -1)))
    expected = mcm.addim(x_none + 3 * (x - x_none), z_t, 0.75 * (x - x0).square().mean(1), t, s, cfg)
    assert torch.allclose(mcm.ode_step(teacher, z_t, t, s, y, cfg, x0), expected)


def test_measured_variance_is_the_posteriors():
    """With the exact teacher and a share of 1, x_var at each time is the mean over the data of tr Var[x |
    z_t] / D: for one Gaussian s^2 sigma^2 / (alpha^2 s^2 + sigma^2). The sampler takes aDDIM's steps with
    it."""
    nfe, cfg = 4, config(mode="diffusion", solver="addim", x_var_data=True, x_var_frac=1.0)
    one = kit.toys.Mixture(cfg, torch.zeros(1, 2).double(), 0.3)
    sampler = mcm.measured(one, one, nfe, cfg, n=50_000)
    x_var = sampler.keywords["x_var"]
    alpha, sigma = mcm.alpha_sigma((torch.arange(nfe).double() + 1) / nfe, cfg)
    assert torch.allclose(x_var.double(), 0.09 * sigma**2 / (alpha**2 * 0.09 + sigma**2), rtol=0.02)
    noise = cfg.sigma_d * torch.randn(5, 2).double()
    z = noise / cfg.sigma_d
    for i in range(nfe, 0, -1):
        t, s = full(5, i / nfe), full(5, (i - 1) / nfe)
        z = mcm.addim(mcm.f(one, z, t, None, cfg), z, x_var[i - 1].expand(5), t, s, cfg)
    assert torch.allclose(sampler(one, noise, None, nfe, cfg, None), z)


def test_solvers_converge_to_the_ode(ring):
    """The exact teacher's samples near the exact solution with the steps, aDDIM's and DDIM's alike."""
    _, data, teacher = ring
    noise = config().sigma_d * torch.randn(200, 2, generator=torch.Generator().manual_seed(0)).double()
    exact = common.solve(data, noise, common.ode_times(512, config().sigma_d))
    for solver in ("ddim", "addim", "heun"):
        cfg = config(mode="diffusion", solver=solver)
        coarse, fine = (kit.metrics.rms(mcm.sample(teacher, noise, None, n, cfg, None), exact)
                        for n in (16, 256))
        assert fine < 0.3 * coarse and fine < 0.05, (solver, coarse, fine)


TOY = ["--channels", 16, "--blocks", 1, "--batch", 64, "--lr_cooldown", 0]


def test_pd_resumes_exactly(train, folder, monkeypatch, capsys):
    """The last student is part of the checkpoint: stopped in the third of three stages and resumed, with
    dropout. Another number of steps would have other stages, so it is refused."""
    images = ["--dataset", "folder", "--data", folder, "--batch", 8]
    train(*images, "--mode", "diffusion", "--channels", 8, "--attention", 4, "--steps", 1, "--out", "base",
          script=mcm)
    words = [*images, "--teacher", "base", "--mode", "pd", "--pd_start", 8, "--student_steps", 2,
             "--steps", 9, "--dropout", 0.3, "--save_every", 7]
    whole = train(*words, "--out", "whole", script=mcm)
    assert any(not torch.equal(whole["net"][k], whole["target"][k]) for k in whole["net"])

    def stop(*inputs):
        if inputs[5] == 8:
            raise KeyboardInterrupt
        return mcm.pd(*inputs)
    monkeypatch.setitem(mcm.LOSSES, "pd", stop)
    with pytest.raises(KeyboardInterrupt):
        train(*words, "--out", "parts", script=mcm)
    assert kit.read_checkpoint("parts")["step"] == 7
    monkeypatch.setitem(mcm.LOSSES, "pd", mcm.pd)
    parts = train("--resume", "--out", "parts", script=mcm)
    assert all(torch.equal(whole[p][k], parts[p][k]) for p in ("net", "target", "ema") for k in whole[p])
    assert "--steps" in one_line(capsys, mcm.main, "--resume", "--out", "parts", "--steps", 20)
    words = ["--sample", 2, "--out", "parts", "--student_steps", 4, "--nfe", 4]
    assert "--student_steps" in one_line(capsys, mcm.main, *words)


def test_only_pd_has_a_target_of_its_own(train):
    """In cd the target is the network itself."""
    live = train(*TOY, "--steps", 2, "--out", "live", script=mcm)
    assert all(torch.equal(live["net"][k], live["target"][k]) for k in live["net"])


def test_figure(capsys):
    """One flag draws the paths of 1, 2 and 4 steps and of the ODE in 1-D, coloured by where they end: half of
    the ODE's end in the mode above, half in the one below. It does not draw over another."""
    mcm.main(["--figure", *map(str, TOY), "--steps", "2"])
    path = "out/multistep_cm-gmm1d-cd/paths.png"
    assert path in one_line(capsys, mcm.main, "--figure", *TOY)
    picture = np.asarray(Image.open(path), dtype=int)
    ode = picture[-360:, -(480 + 4):-4]
    blue = ode[:, :, 2] - ode[:, :, 0] > 100
    orange = ode[:, :, 0] - ode[:, :, 2] > 100
    assert orange[:180].sum() > 4000 > 50 > orange[184:].sum()
    assert blue[180:].sum() > 4000 > 50 > blue[:176].sum()
