"""common.py: coordinates, schedules, averages, solvers and random numbers against closed forms. Its JVP and
the rules of layers are in test_networks.py."""
import common
import kit
import scm

import math

import pytest
import scipy.stats
import torch


@pytest.mark.parametrize("alpha, sigma", [(1.0, 0.002), (1.0, 80.0), (0.8, 0.6), (0.0, 1.0)])
def test_edm_and_vp_are_trigflow_in_other_coordinates(alpha, sigma):
    """x = alpha x0 + sigma eps becomes cos(t) x0 + sin(t) sigma_d eps; tan t = sigma / (sigma_d alpha)."""
    x0, eps = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    a, s = torch.full((5,), alpha).double(), torch.full((5,), sigma).double()
    x_t, t = common.to_trigflow(alpha * x0 + sigma * eps, a, s, 0.5)
    assert torch.allclose(x_t, t.cos()[:, None] * x0 + t.sin()[:, None] * 0.5 * eps, atol=1e-12)
    assert torch.allclose(t.sin() * 0.5 * a, t.cos() * s, atol=1e-12)


def test_grid_values():
    """EDM's grid, against numbers published with the CM checkpoints; TrigFlow's largest angle."""
    for i, n, sigma in [(22, 40, 1.3824), (17, 40, 4.3656), (106, 201, 1.9128), (11, 18, 0.5853)]:
        assert common.karras(n)[i] == pytest.approx(sigma, abs=1e-4)
    assert common.karras(18)[0] == pytest.approx(80) and common.karras(18)[-1] == pytest.approx(0.002)
    assert common.ode_times(18, 0.5)[0] == pytest.approx(1.5645464, abs=1e-7)


def test_solver_order(ring):
    """Halving the step divides the error against a fine solution by 2^order."""
    cfg, _, teacher = ring
    x = cfg.sigma_d * torch.randn(64, 2, generator=torch.Generator().manual_seed(0)).double()

    def end(n, solver):
        return common.solve(teacher, x, torch.linspace(1.2, 0.5, n + 1, dtype=torch.float64), solver=solver)
    exact = end(4096, "heun")
    for solver, order in (("euler", 1), ("ddim", 1), ("heun", 2)):
        errors = [kit.metrics.rms(end(n, solver), exact) for n in (64, 128)]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2), solver


def test_heun_is_edms_sampler(ring):
    """The same steps in EDM's own coordinates: dx/dsigma = (x - D) / sigma, trapezoid, last step Euler."""
    cfg, _, teacher = ring
    noise = torch.randn(16, 2, generator=torch.Generator().manual_seed(0)).double()
    sigmas = torch.cat([common.karras(10), torch.zeros(1).double()])

    def slope(x, sigma):
        t = torch.atan(sigma / cfg.sigma_d).expand(len(x))
        return (x - scm.f(teacher, x * t.cos()[:, None], t, None, cfg)) / sigma
    x = noise / torch.atan(sigmas[0] / cfg.sigma_d).cos()
    for a, b in zip(sigmas[:-1], sigmas[1:]):
        d = slope(x, a)
        euler = x + (b - a) * d
        x = x + (b - a) * (d + slope(euler, b)) / 2 if b > 0 else euler
    ours = common.solve(teacher, noise, common.ode_times(10, cfg.sigma_d), None, cfg.sigma_d)
    assert torch.allclose(ours, x, atol=1e-9)


def test_draws_depend_on_seed_step_and_position_alone():
    """Any split of the batch, in any order, sees the same numbers; other seeds and steps see others."""
    def numbers(seed, step, lo, hi):
        gen = common.Draw(seed, step, lo, hi)
        return torch.cat([gen.normal(3), gen.uniform()[:, None], gen.index(1000)[:, None]], 1)
    whole = numbers(5, 7, 0, 300)
    for cuts in ([0, 150, 300], [0, 1, 64, 65, 128, 300], [0, 100, 200, 300]):
        parts = [numbers(5, 7, a, b) for a, b in zip(cuts, cuts[1:])]
        assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(numbers(6, 7, 0, 300), whole) and not torch.equal(numbers(5, 8, 0, 300), whole)
    gen = common.Draw(0, 0, 0, 20_000)
    assert scipy.stats.kstest(gen.normal(), "norm").pvalue > 1e-3
    assert scipy.stats.kstest(gen.uniform(), "uniform").pvalue > 1e-3


def test_learning_rate():
    """Linear rise, inverse square root beyond lr_ref, and linear fall, at points computed by hand."""
    cfg = scm.Config(lr=1.0, steps=1000, lr_warmup=10, lr_ref=100, lr_cooldown=0.2)
    rates = [common.learning_rate(step, cfg) for step in range(1000)]
    assert rates[4] == 0.5 and rates[99] == 1.0
    assert rates[400] == pytest.approx(0.5) and rates[900] == pytest.approx(0.5 / 3)
    assert rates[999] == pytest.approx(0.005 / math.sqrt(9.99))


def test_power_function_ema_is_the_weighted_mean():
    """The EMA after n steps weights them by the power function's mass, of relative width sigma_rel."""
    cfg, n = scm.Config(ema_sigma_rel=0.1), 2000
    net, ema = torch.nn.Linear(1, 1).double(), torch.nn.Linear(1, 1).double()
    values = []
    for power in (1, 2):  # first and second moment of time under the average
        for step in range(1, n + 1):
            net.weight.data.fill_((step / n) ** power)
            kit.lerp(ema, net, common.ema_beta(step, cfg))
        values.append(ema.weight.item())
    assert math.sqrt(values[1] - values[0] ** 2) == pytest.approx(0.1, rel=0.01)


def test_half_life_ema():
    """After one half-life of samples, half of the old weights is left."""
    net, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    cfg = scm.Config(ema_sigma_rel=0.0, batch=50, ema_halflife=500.0)
    net.weight.data.fill_(0.0), ema.weight.data.fill_(1.0)
    for step in range(1, 11):
        kit.lerp(ema, net, common.ema_beta(step, cfg))
    assert ema.weight.item() == pytest.approx(0.5)
