"""The derivative along a direction: each rule against PyTorch's own, whole networks against central
differences, and its cost, counted instead of timed."""
import common

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as tnf

NETS = {"mlp": dict(shape=(2,), channels=16, blocks=2, classes=3, guidance=True),
        "edm2": dict(shape=(3, 8, 8), channels=8, channel_mult=(1, 2), blocks=1, attention=(4,), classes=3),
        "edm2, log": dict(shape=(3, 8, 8), channels=8, blocks=1, attention=(8,), c_noise="log", emb="fourier",
                          double_norm=False),
        "edm2, no shift": dict(shape=(3, 8, 8), channels=8, blocks=1, attention=(4,), norm_shift=False),
        "ddpmpp": dict(shape=(3, 8, 8), arch="ddpmpp", channels=8, channel_mult=(1, 2), blocks=1,
                       attention=(4,), double_norm=False, c_noise="log", classes=3)}


def network(name, **options):
    """A network in which no parameter is zero, as after training, and a place and a direction for its JVP."""
    net, g = common.build(NETS[name] | options), torch.Generator().manual_seed(1)
    for p in net.parameters():
        p.data = p.data + 0.3 * torch.randn(p.shape, generator=g)
    x, vx = torch.randn(2, 4, *NETS[name]["shape"], generator=g).double()
    t, vt = torch.tensor([0.1, 0.7, 1.2, 1.5]).double(), torch.tensor([0.5, -1.0, 0.2, 1.0]).double()
    y = torch.tensor([0, 1, 2, -1]) if "classes" in NETS[name] else None
    s = torch.tensor([1.0, 1.2, 1.5, 2.0]).double() if "guidance" in NETS[name] else None
    return net, lambda x, t: net(x, t, y, s), (x, t), (vx, vt)


@pytest.mark.parametrize("name", NETS)
def test_against_central_differences(name):
    """In float64 to 1e-6 of the tangent's size; the output is that of the ordinary pass."""
    net, f, at, along = network(name)
    net.double()
    F, dF = common.jvp(f, at, along)
    h = 1e-5
    with torch.no_grad():
        up, down = (f(*(v + sign * h * tv for v, tv in zip(at, along))) for sign in (1, -1))
        assert torch.allclose(F, f(*at), atol=1e-12)
    assert (dF - (up - down) / (2 * h)).abs().max() < 1e-6 * dF.abs().max()


@pytest.mark.parametrize("name", ["edm2", "ddpmpp"])
@pytest.mark.parametrize("dtype, bound", [("fp32", 1e-5), ("bf16", 5e-2), ("fp16", 1e-2)])
def test_in_lower_precision(name, dtype, bound):
    """The same tangent as in float64, up to the precision of the torso."""
    net, f, at, along = network(name)
    net.double()
    expected = common.jvp(f, at, along)[1]
    _, f, at, along = network(name, dtype=dtype)
    found = common.jvp(f, (at[0].float(), at[1]), (along[0].float(), along[1]))[1]
    assert found.dtype == torch.float32 and (found - expected).norm() < bound * expected.norm()


def rms(x, dims):
    return x.square().mean(dims, keepdim=True).sqrt()


torch.manual_seed(0)
A, B = torch.randn(2, 3, 8, 6, 6).double()
conv, mp, dense = common.Conv2d(8, 4, 3, padding=1), common.MPConv(8, 4, 3), common.Linear(6, 5)
norm, wave = common.GroupNorm(8), common.Embedding("fourier", 8)
for layer in (conv, mp, dense, norm, wave):
    layer.double().requires_grad_(False)
norm.weight.normal_(), norm.bias.normal_()
def normalized(x):
    weight = mp.weight / (1e-4 + rms(mp.weight, (1, 2, 3))) / math.sqrt(72)
    return tnf.conv2d(x, weight, padding=1)


C = A[:, 0, 0, 0]
RULES = {  # ours, the same in plain PyTorch, inputs
    "pnorm": (common.pnorm, lambda x: x / (1e-4 + rms(x, 1)), [A]),
    "pnorm of all": (lambda x: common.pnorm(x, (1, 2, 3)), lambda x: x / (1e-4 + rms(x, (1, 2, 3))), [A]),
    "silu": (common.silu, tnf.silu, [A]),
    "product": (common.product, torch.mul, [A, B]),
    "by channel": (lambda a, b: common.product(a, b[:, :, :1, :1]), lambda a, b: a * b[:, :, :1, :1], [A, B]),
    "mp_sum": (lambda a, b: common.mp_sum(a, b, 0.3), lambda a, b: (0.7 * a + 0.3 * b) / 0.58**0.5, [A, B]),
    "mp_cat": (common.mp_cat, lambda a, b: torch.cat([a, b], 1), [A, B]),
    "down": (lambda x: common.resample(x, "down"), lambda x: tnf.avg_pool2d(x, 2), [A]),
    "up": (lambda x: common.resample(x, "up"), lambda x: tnf.interpolate(x, scale_factor=2), [A]),
    "linear": (dense, lambda x: x @ dense.weight.T + dense.bias, [A]),
    "convolution": (conv, lambda x: tnf.conv2d(x, conv.weight, conv.bias, padding=1), [A]),
    "normalized": (mp, normalized, [A]),
    "group norm": (norm, lambda x: tnf.group_norm(x, norm.num_groups, norm.weight, norm.bias, 1e-6), [A]),
    "features": (wave, lambda c: 2**0.5 * torch.cos(c[:, None] * wave.freqs + wave.phases), [C]),
    "c_noise": (lambda t: common.noise_input(t, "log", 0.5), lambda t: (t.tan() / 2).log() / 4,
                [C.sigmoid()])}


@pytest.mark.parametrize("name", RULES)
def test_rules_are_pytorchs_own(name):
    """Output and tangent of each rule, and its first and second derivative in reverse mode."""
    ours, plain, at = RULES[name]
    along = tuple(torch.randn_like(x) for x in at)
    for found, expected in zip(common.jvp(ours, tuple(at), along), torch.func.jvp(plain, tuple(at), along)):
        assert torch.allclose(found, expected, atol=1e-10)
    at = [x.detach().clone().requires_grad_() for x in at]
    grads = [torch.autograd.grad(f(*at).sin().sum(), at, create_graph=True) for f in (ours, plain)]
    second = [torch.autograd.grad(sum(g.square().sum() for g in own), at) for own in grads]
    assert all(torch.allclose(a, b, atol=1e-9) for pair in (grads, second) for a, b in zip(*pair))


def test_a_zero_has_a_tangent():
    """pnorm's slope at zero is 1 / eps, not 0 / 0."""
    _, tangent = common.jvp(common.pnorm, (torch.zeros(1, 4),), (torch.ones(1, 4),))
    assert torch.allclose(tangent, torch.full((1, 4), 1e4))


COUNT = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch, common, test_jvp
from torch.profiler import profile
heavy = ("aten::convolution", "aten::mm", "aten::addmm")
for name in test_jvp.NETS:
    plain = dict(classes=0, guidance=False)  # labels do not depend on t, so their layers run once
    net, _, at, along = test_jvp.network(name)
    net = common.build(test_jvp.NETS[name] | plain).double()
    f = lambda x, t: net(x, t)
    counts = []
    for call in (lambda: f(*at), lambda: common.jvp(f, at, along)):
        with torch.no_grad(), profile() as seen:
            call()
        counts.append(sum(e.count for e in seen.key_averages() if e.key in heavy))
    assert counts[1] == 2 * counts[0] > 5, (name, counts)
assert "torch._decomp.decompositions_for_jvp" not in sys.modules
print("fine")
"""


def test_a_jvp_costs_two_passes():
    """Each convolution and matrix product runs exactly twice as often as in a forward pass, and functorch
    loads none of its decompositions. (In a process of its own, because other tests load them.)"""
    code = COUNT.format(root=str(Path(common.__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "fine" in done.stdout, done.stderr[-2000:]
