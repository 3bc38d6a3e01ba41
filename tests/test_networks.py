"""kit/networks.py: layers and networks against plain formulas, PyTorch's own derivatives and central
differences; the cost of a JVP, counted instead of timed; the papers' sizes."""
import cm
import common
import kit
import multistep_cm
import sct
from conftest import ROOT, fails, parsed
from kit import networks

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as tnf


def test_positional_embedding_is_sines_and_cosines():
    """Frequencies scale ... scale / 10000 in geometric steps, unit variance over the features."""
    t, dim = np.array([0.2, 1.3]), 8
    freq = 10.0 * 10000.0 ** (-np.arange(4) / 3)
    expected = math.sqrt(2) * np.concatenate([np.cos(t[:, None] * freq), np.sin(t[:, None] * freq)], axis=1)
    ours = networks.Embedding("positional", dim, 10.0)(torch.tensor(t))
    assert np.allclose(ours, expected, atol=1e-6) and np.allclose((ours**2).mean(1), 1, atol=1e-6)


def test_double_normalization_bounds_the_embeddings_scale():
    """norm(x) pnorm(s) + pnorm(b), over sqrt 2: as written, and a hundredfold s and b change nothing."""
    block = networks.EDM2Block(cin=5, cout=5, dim=6, encoder=True, attend=False, resample="", dropout=0.0,
                               double_norm=True, norm_shift=True).double()
    x, emb = torch.randn(2, 5, 4, 4).double(), torch.randn(2, 6).double()
    scale, shift = (v / v.square().mean(1, keepdim=True).sqrt() for v in block.emb_linear(emb).chunk(2, 1))
    norm = x / x.square().mean(1, keepdim=True).sqrt()
    expected = (norm * scale[:, :, None, None] + shift[:, :, None, None]) / math.sqrt(2)
    assert torch.allclose(block.modulate(x, emb), expected, atol=1e-3)
    assert torch.allclose(block.modulate(x, 100 * emb), expected, atol=1e-3)


def test_unet_preserves_magnitudes():
    """EDM2's principle: from input and weights of unit variance, every block gives about unit variance."""
    net = networks.build(dict(shape=(3, 16, 16), channels=32, classes=4))
    seen = []
    for block in [*net.enc.values(), *net.dec.values()]:
        block.register_forward_hook(lambda module, args, out: seen.append(out.std().item()))
    with torch.no_grad():
        F = net(torch.randn(8, 3, 16, 16), torch.rand(8), torch.arange(8) % 4)
    assert all(0.7 < std < 1.4 for std in seen), seen
    assert not F.any()  # out_gain starts at zero


def test_weight_normalization_leaves_the_function_alone(nets):
    """Weights are used normalized, so forcing their norm changes only Adam's view of them."""
    _, net = nets()
    x, t = torch.randn(2, 3, 8, 8).double(), torch.rand(2).double()
    with torch.no_grad():
        before = net(x, t)
        kit.normalize_weights(net)
        assert torch.allclose(net(x, t), before, atol=1e-2 * before.abs().max())
    weight = net.enc["8x8_conv"].weight
    assert torch.allclose(weight.square().mean((1, 2, 3)).sqrt(), torch.ones(8).double(), atol=1e-3)


def test_bf16_torso():
    """Half-precision torso: float32 output, close to the float32 network."""
    options = dict(shape=(3, 8, 8), channels=32, blocks=1, attention=(4,))
    full, half = networks.build(options), networks.build(options | dict(dtype="bf16"))
    for net in (full, half):
        net.out_gain.data.fill_(1.0)
    x, t = torch.randn(4, 3, 8, 8), torch.rand(4)
    with torch.no_grad():
        a, b = full(x, t), half(x, t)
    assert b.dtype == torch.float32 and 0 < (a - b).square().mean().sqrt() < 0.05


NETS = {"mlp": dict(shape=(2,), channels=16, blocks=2, classes=3, guidance=True),
        "edm2": dict(shape=(3, 8, 8), channels=8, channel_mult=(1, 2), blocks=1, attention=(4,), classes=3),
        "edm2, log": dict(shape=(3, 8, 8), channels=8, blocks=1, attention=(8,), c_noise="log", emb="fourier",
                          double_norm=False),
        "edm2, no shift": dict(shape=(3, 8, 8), channels=8, blocks=1, attention=(4,), norm_shift=False),
        "ddpmpp": dict(shape=(3, 8, 8), arch="ddpmpp", channels=8, channel_mult=(1, 2), blocks=1,
                       attention=(4,), double_norm=False, c_noise="log", classes=3)}


def network(name, **options):
    """A network in which no parameter is zero, as after training, and a place and a direction for its JVP."""
    net, g = networks.build(NETS[name] | options), torch.Generator().manual_seed(1)
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


torch.manual_seed(0)
A, B = torch.randn(2, 3, 8, 6, 6).double()
C = A[:, 0, 0, 0]
conv, mp, dense = networks.Conv2d(8, 4, 3, padding=1), networks.MPConv(8, 4, 3), networks.Linear(6, 5)
norm, wave = networks.GroupNorm(8), networks.Embedding("fourier", 8)
for layer in (conv, mp, dense, norm, wave):
    layer.double().requires_grad_(False)
norm.weight.normal_(), norm.bias.normal_()


def rms(x, dims):
    return x.square().mean(dims, keepdim=True).sqrt()


def normalized(x):
    weight = mp.weight / (1e-4 + rms(mp.weight, (1, 2, 3))) / math.sqrt(72)
    return tnf.conv2d(x, weight, padding=1)


RULES = {  # ours, the same in plain PyTorch, inputs
    "pnorm": (networks.pnorm, lambda x: x / (1e-4 + rms(x, 1)), [A]),
    "pnorm of all": (lambda x: networks.pnorm(x, (1, 2, 3)), lambda x: x / (1e-4 + rms(x, (1, 2, 3))), [A]),
    "silu": (common.silu, tnf.silu, [A]),
    "product": (common.product, torch.mul, [A, B]),
    "by channel": (lambda a, b: common.product(a, b[:, :, :1, :1]), lambda a, b: a * b[:, :, :1, :1], [A, B]),
    "mp_sum": (lambda a, b: networks.mp_sum(a, b, 0.3), lambda a, b: (0.7 * a + 0.3 * b) / 0.58**0.5, [A, B]),
    "mp_cat": (networks.mp_cat, lambda a, b: torch.cat([a, b], 1), [A, B]),
    "down": (lambda x: networks.resample(x, "down"), lambda x: tnf.avg_pool2d(x, 2), [A]),
    "up": (lambda x: networks.resample(x, "up"), lambda x: tnf.interpolate(x, scale_factor=2), [A]),
    "linear": (dense, lambda x: x @ dense.weight.T + dense.bias, [A]),
    "convolution": (conv, lambda x: tnf.conv2d(x, conv.weight, conv.bias, padding=1), [A]),
    "normalized": (mp, normalized, [A]),
    "group norm": (norm, lambda x: tnf.group_norm(x, norm.num_groups, norm.weight, norm.bias, 1e-6), [A]),
    "features": (wave, lambda c: 2**0.5 * torch.cos(c[:, None] * wave.freqs + wave.phases), [C]),
    "c_noise": (lambda t: networks.noise_input(t, "log", 0.5), lambda t: (t.tan() / 2).log() / 4,
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


@pytest.mark.parametrize("dims", [1, (1, 2, 3)])
def test_pnorms_backward_pass_is_its_derivative(dims):
    """gradcheck compares it with differences, gradgradcheck that of the second derivative."""
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: networks.pnorm(x, dims), x)
    assert torch.autograd.gradgradcheck(lambda x: networks.pnorm(x, dims), x)


def test_a_frozen_network_normalizes_its_weights_once(nets, monkeypatch):
    """And gives what it gave before, bit for bit."""
    _, net = nets()
    x, t, counted = torch.randn(2, 3, 8, 8).double(), torch.rand(2).double(), []
    before = net(x, t)
    kit.layers.freeze(net.requires_grad_(False))
    unit = kit.layers.MPConv.unit
    monkeypatch.setattr(kit.layers.MPConv, "unit", lambda *args: counted.append(1) or unit(*args))
    assert torch.equal(net(x, t), before) and torch.equal(net(x, t), before)
    assert len(counted) == sum(isinstance(m, kit.layers.MPConv) for m in net.modules()) - 1  # no head


@pytest.mark.parametrize("tangent", [False, True])
def test_edm2s_blocks_stay_channels_last(tangent):
    """Every convolution's input, with and without a JVP, so that none is laid out anew."""
    net, seen = kit.networks.build(dict(shape=(4, 8, 8), channels=16, blocks=1, attention=(8, 4))), []
    real = tnf.conv2d

    def conv(x, *args, **kw):
        seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return real(x, *args, **kw)
    at = torch.randn(2, 4, 8, 8), torch.rand(2)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(tnf, "conv2d", conv)
        common.jvp(net, at, at) if tangent else net(*at)
    assert len(seen) > 20 and all(seen)


def test_a_zero_has_a_tangent():
    """pnorm's slope at zero is 1 / eps, not 0 / 0."""
    _, tangent = common.jvp(networks.pnorm, (torch.zeros(1, 4),), (torch.ones(1, 4),))
    assert torch.allclose(tangent, torch.full((1, 4), 1e4))


COUNT = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch, common, test_networks as t
from torch.profiler import profile
heavy = ("aten::convolution", "aten::mm", "aten::addmm")
for name in t.NETS:
    plain = dict(classes=0, guidance=False)  # labels do not depend on t, so their layers run once
    net, _, at, along = t.network(name)
    net = t.networks.build(t.NETS[name] | plain).double()
    f = lambda x, t: net(x, t)
    counts = []
    for call in (lambda: f(*at), lambda: common.jvp(f, at, along)):
        with torch.no_grad(), profile() as seen:
            call()
        counts.append(sum(e.count for e in seen.key_averages() if e.key in heavy))
    assert counts[1] == 2 * counts[0] > 5, (name, counts)
print("fine")
"""


def test_a_jvp_costs_two_passes():
    """Each convolution and matrix product runs exactly twice as often as in a forward pass. (In a
    process of its own, because the profiler sees all of a process.)"""
    code = COUNT.format(root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "fine" in done.stdout, done.stderr[-2000:]


def on_meta(cfg, *shape, classes=1000, **options):
    """The config's network without memory (device meta), and its parameters in millions."""
    data = type("Data", (), dict(shape=shape, classes=classes))
    with torch.device("meta"):
        net = kit.network(cfg, data, "meta", **options)
    return net, sum(p.numel() for p in net.parameters()) / 1e6


@pytest.mark.parametrize("limit, expected", [(0, {8, 16, 32, 64}), (16, {8, 16}), (32, {8, 16, 32})])
def test_dropout_by_resolution(limit, expected):
    """Dropout acts in the blocks of at most dropout_res pixels, in all of them for 0."""
    cfg = parsed("--dataset", "imagenet64", "--mode", "sct", "--dropout_res", limit)
    net, _ = on_meta(cfg, 3, 64, 64)
    blocks = {**net.enc, **net.dec}
    assert {int(k.split("x")[0]) for k, block in blocks.items() if getattr(block, "dropout", 0)} == expected
    assert {block.dropout for block in blocks.values() if hasattr(block, "dropout")} <= {0.0, 0.45}


@pytest.mark.parametrize("size, millions", dict(S=280.2, M=497.8, L=777.6, XL=1119.4, XXL=1523.4).items())
def test_sizes_are_the_papers(size, millions):
    """Parameters of the U-Net, to within the heads."""
    net, _ = on_meta(parsed("--dataset", "imagenet512", "--size", size), 4, 64, 64, guidance=True)
    body = [p.numel() for name, p in net.named_parameters() if "head" not in name and "guidance" not in name]
    assert sum(body) / 1e6 == pytest.approx(millions, abs=0.3)


def test_cifar10_is_trained_on_ddpmpp():
    """The papers' network: 55.7 M parameters (EDM, Tab. 7: 56 M)."""
    net, millions = on_meta(parsed("--dataset", "cifar10", "--mode", "sct"), 3, 32, 32, head=False)
    assert net.options["arch"] == "ddpmpp" and millions == pytest.approx(55.7, abs=0.1)


@pytest.mark.parametrize("flags", [("--double_norm",), ("--emb", "fourier"),
                                   ("--guidance_max", 2, "--conditional")])
def test_ddpmpp_refuses_what_it_has_not(flags, capsys):
    """EDM2's modulation and embedding, and guidance."""
    cfg = parsed("--dataset", "cifar10", *flags)
    assert "--arch ddpmpp needs" in fails(capsys, on_meta, cfg, 3, 32, 32, guidance=cfg.guidance_max > 1)


@pytest.mark.parametrize("script, flags, expected", [
    (cm, "imagenet64", 280), (sct, "imagenet64 --size M", 498), (multistep_cm, "imagenet64", 280),
    (multistep_cm, "imagenet64 --size L", 778), (multistep_cm, "imagenet128", 184),
    (multistep_cm, "imagenet128 --size L", 736)])
def test_the_siblings_presets_are_edm2s_network(script, flags, expected):
    """EDM2's own modulation, and the sizes that the presets name."""
    cfg = parsed("--dataset", *flags.split(), script=script)
    _, millions = on_meta(cfg, 3, cfg.image_size, cfg.image_size, head=False)
    assert not cfg.double_norm and millions == pytest.approx(expected, abs=0.6)


def test_guidance_is_an_input_that_starts_silent(nets):
    """At the start the student is the teacher, which knows no guidance; with any gain it moves the output."""
    _, net = nets(classes=3, guidance=True)
    x, t, y = torch.randn(2, 3, 8, 8).double(), torch.tensor([0.4, 1.3]).double(), torch.tensor([0, 2])
    low, high = torch.ones(2).double(), torch.full((2,), 2.0).double()
    assert not torch.allclose(net(x, t, y, low), net(x, t, y, high))
    net.embedding.guidance_gain.data.zero_()
    assert torch.equal(net(x, t, y, low), net(x, t, y, high))
    assert torch.equal(net(x, t, y, low), net(x, t, y))


@pytest.mark.parametrize("arch", ["edm2", "ddpmpp"])
def test_checkpointing_changes_no_gradient(arch):
    """Also with dropout: the second pass draws the masks of the first."""
    net = networks.build(dict(arch=arch, shape=(3, 8, 8), channels=8, blocks=1, attention=(4,), dropout=0.3,
                              double_norm=arch == "edm2")).double()
    x, t = torch.randn(2, 3, 8, 8).double(), torch.tensor([0.3, 1.2]).double()
    grads = []
    for net.checkpointing in (False, True):
        torch.manual_seed(0)
        net.zero_grad()
        net(x, t).square().sum().backward()
        grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads)) and len(grads[0]) == len(grads[1]) > 10
