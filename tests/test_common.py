"""common.py: data, networks, solvers, JVP, averages and metrics against closed forms and other libraries."""
import common
import scm

import io
import json
import math
import tarfile
import zipfile

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image


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
        errors = [common.rms(end(n, solver), exact) for n in (64, 128)]
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


def test_positional_embedding_is_sines_and_cosines():
    """Frequencies scale ... scale / 10000 in geometric steps, unit variance over the features."""
    t, dim = np.array([0.2, 1.3]), 8
    freq = 10.0 * 10000.0 ** (-np.arange(4) / 3)
    expected = math.sqrt(2) * np.concatenate([np.cos(t[:, None] * freq), np.sin(t[:, None] * freq)], axis=1)
    ours = common.Embedding("positional", dim, 10.0)(torch.tensor(t))
    assert np.allclose(ours, expected, atol=1e-6) and np.allclose((ours**2).mean(1), 1, atol=1e-6)


def test_double_normalization_bounds_the_embeddings_scale():
    """norm(x) pnorm(s) + pnorm(b), over sqrt 2: as written, and a hundredfold s and b change nothing."""
    block = common.EDM2Block(cin=5, cout=5, dim=6, encoder=True, attend=False, resample="", dropout=0.0,
                             double_norm=True, norm_shift=True).double()
    x, emb = torch.randn(2, 5, 4, 4).double(), torch.randn(2, 6).double()
    scale, shift = (v / v.square().mean(1, keepdim=True).sqrt() for v in block.emb_linear(emb).chunk(2, 1))
    norm = x / x.square().mean(1, keepdim=True).sqrt()
    expected = (norm * scale[:, :, None, None] + shift[:, :, None, None]) / math.sqrt(2)
    assert torch.allclose(block.modulate(x, emb), expected, atol=1e-3)
    assert torch.allclose(block.modulate(x, 100 * emb), expected, atol=1e-3)


def test_unet_preserves_magnitudes():
    """EDM2's principle: from input and weights of unit variance, every block gives about unit variance."""
    net = common.build(dict(shape=(3, 16, 16), channels=32, classes=4))
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
        common.normalize_weights(net)
        assert torch.allclose(net(x, t), before, atol=1e-2 * before.abs().max())
    weight = net.enc["8x8_conv"].weight
    assert torch.allclose(weight.square().mean((1, 2, 3)).sqrt(), torch.ones(8).double(), atol=1e-3)


def test_bf16_torso():
    """Half-precision torso: float32 output, close to the float32 network."""
    options = dict(shape=(3, 8, 8), channels=32, blocks=1, attention=(4,))
    full, half = common.build(options), common.build(options | dict(dtype="bf16"))
    for net in (full, half):
        net.out_gain.data.fill_(1.0)
    x, t = torch.randn(4, 3, 8, 8), torch.rand(4)
    with torch.no_grad():
        a, b = full(x, t), half(x, t)
    assert b.dtype == torch.float32 and 0 < (a - b).square().mean().sqrt() < 0.05


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


def test_power_function_ema_is_the_weighted_mean():
    """The EMA after n steps weights them by the power function's mass, of relative width sigma_rel."""
    cfg, n = scm.Config(ema_sigma_rel=0.1), 2000
    net, ema = torch.nn.Linear(1, 1).double(), torch.nn.Linear(1, 1).double()
    values = []
    for power in (1, 2):  # first and second moment of time under the average
        for step in range(1, n + 1):
            net.weight.data.fill_((step / n) ** power)
            common.update_ema(ema, net, step, cfg)
        values.append(ema.weight.item())
    assert math.sqrt(values[1] - values[0] ** 2) == pytest.approx(0.1, rel=0.01)


def test_half_life_ema():
    """After one half-life of samples, half of the old weights is left."""
    net, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    net.weight.data.fill_(0.0), ema.weight.data.fill_(1.0)
    for step in range(1, 11):
        common.update_ema(ema, net, step, scm.Config(ema_sigma_rel=0.0, batch=50, ema_halflife=500.0))
    assert ema.weight.item() == pytest.approx(0.5)


def test_learning_rate():
    """Linear rise, inverse square root beyond lr_ref, and linear fall, at points computed by hand."""
    cfg = scm.Config(lr=1.0, steps=1000, lr_warmup=10, lr_ref=100, lr_cooldown=0.2)
    rates = [common.learning_rate(step, cfg) for step in range(1000)]
    assert rates[4] == 0.5 and rates[99] == 1.0
    assert rates[400] == pytest.approx(0.5) and rates[900] == pytest.approx(0.5 / 3)
    assert rates[999] == pytest.approx(0.005 / math.sqrt(9.99))


def test_energy_distance_against_scipy():
    """SciPy's distance in 1-D is the square root of ours."""
    a, b = np.random.default_rng(0).normal(size=(2, 300))
    ours = common.energy_distance(torch.tensor(a)[:, None], torch.tensor(b + 0.5)[:, None])
    assert ours == pytest.approx(scipy.stats.energy_distance(a, b + 0.5) ** 2)


def test_folder_and_zip_are_the_same_images(folder):
    """Class subfolders, and EDM's zip with dataset.json, give the same pixels and labels."""
    with zipfile.ZipFile("edm.zip", "w") as archive:
        names = sorted(folder.rglob("*.png"), key=lambda p: str(p.relative_to(folder)))
        labels = []
        for i, path in enumerate(names):
            archive.write(path, f"00000/img{i:08d}.png")
            labels.append([f"00000/img{i:08d}.png", "abc".index(path.parent.name)])
        archive.writestr("dataset.json", json.dumps(dict(labels=labels)))
    a, la = common.image_folder(scm.Config(dataset="folder", data=str(folder)))
    b, lb = common.image_folder(scm.Config(dataset="folder", data="edm.zip"))
    assert a.shape == (24, 3, 8, 8) and np.array_equal(a, b) and np.array_equal(la, lb)
    assert np.array_equal(a[0], np.asarray(Image.open(names[0])).transpose(2, 0, 1))
    small, _ = common.image_folder(scm.Config(dataset="folder", data=str(folder), image_size=4))
    assert np.abs(small.mean((2, 3)) - a.mean((2, 3))).max() < 1  # box halving keeps the mean


def test_centre_crop_keeps_the_middle():
    """A bright square in the middle of a wide dark picture fills the crop."""
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[:, 32:96] = 200
    assert np.asarray(common.centre_crop(Image.fromarray(picture), 16)).min() > 150


def test_cifar10_binary_archive():
    """Records of 1 label byte and 3072 plane bytes, batches in order."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (6, 3073), dtype=np.uint8)
    rows[:, 0] = [3, 1, 4, 1, 5, 9]
    with tarfile.open("cifar.tar.gz", "w:gz") as archive:
        for i, name in [(1, "data_batch_2.bin"), (0, "data_batch_1.bin"), (2, "test_batch.bin")]:
            blob = rows[2 * i:2 * i + 2].tobytes()
            info = tarfile.TarInfo("cifar-10-batches-bin/" + name)
            info.size = len(blob)
            archive.addfile(info, io.BytesIO(blob))
    images, labels = common.cifar10(scm.Config(dataset="cifar10", data="cifar.tar.gz"))
    assert np.array_equal(images.reshape(4, -1), rows[:4, 1:]) and list(labels) == [3, 1, 4, 1]


def test_images_go_to_unit_range_and_back(folder):
    """x0 is in [-1, 1], to_uint8 gives the stored pixels, and labels are dropped at their rate."""
    cfg = scm.Config(dataset="folder", data=str(folder), conditional=True, label_dropout=0.25)
    data = common.dataset(cfg)
    x0, y = data.batch(common.Draw(0, 0, 0, 2000))
    assert x0.dtype == torch.float32 and x0.min() >= -1 and x0.max() <= 1
    stored = {row.tobytes() for row in data.rows}
    assert {image.tobytes() for image in common.to_uint8(x0[:50]).numpy()} <= stored
    assert (y == -1).float().mean() == pytest.approx(0.25, abs=0.05) and set(y.tolist()) == {-1, 0, 1, 2}


def test_shapes_are_distinct_classes():
    """Mean hue separates the four warm classes from the four cold ones."""
    images, labels = common.draw_shapes(scm.Config(image_size=16), 400)
    red, blue = images[:, 0].mean((1, 2)), images[:, 2].mean((1, 2))
    assert ((red > blue) == (labels < 4)).mean() > 0.95
