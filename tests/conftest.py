import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: threads only get in each other's way

import pytest
import torch
from PIL import Image

import common
import scm


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Every test works in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ring():
    """Toy config, dataset and exact teacher."""
    cfg = scm.Config(**scm.PRESETS["gmm"] | dict(warmup=0))
    data = common.dataset(cfg)
    return cfg, data, data


@pytest.fixture
def posterior(ring):
    """Samples (n, 2) of p(x0 | x_t) for the ring: a component, then its Gaussian."""
    cfg, data, _ = ring

    def draw(x_t, t, n, generator):
        cos, sin, s = t.cos(), t.sin(), data.std
        variance, delta = (cos * s) ** 2 + (sin * cfg.sigma_d) ** 2, x_t - t.cos() * data.mean
        weight = torch.softmax(-delta.square().sum(1) / (2 * variance), 0)
        k = torch.multinomial(weight, n, True, generator=generator)
        noise = torch.randn(n, 2, generator=generator).double()
        return (data.mean + cos * s**2 / variance * delta)[k] + s * sin * cfg.sigma_d / variance.sqrt() * noise
    return draw


@pytest.fixture
def nets():
    """A 2-D and an image network in float64, every parameter random (as trained: no gain is zero)."""
    def make(dropout=0.0, **options):
        toy = common.build(dict(shape=(2,), channels=16, blocks=2) | options)
        small = dict(shape=(3, 8, 8), channels=8, blocks=1, attention=(4,), dropout=dropout)
        unet = common.build(small | options)
        for net in (toy, unet):
            generator = torch.Generator().manual_seed(1)
            for p in net.parameters():
                p.data = p.data + 0.3 * torch.randn(p.shape, generator=generator)
        return toy.double(), unet.double()
    return make


@pytest.fixture
def folder(tmp_path):
    """24 small pictures in 3 class folders."""
    images, _ = common.draw_shapes(scm.Config(image_size=8), 24)
    for i, image in enumerate(images):
        path = tmp_path / "pictures" / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(path)
    return tmp_path / "pictures"


@pytest.fixture
def train():
    """Train in this process from command-line words; returns the checkpoint."""
    def run(*words, script=scm):
        cfg = common.parse_args(script.Config, script.PRESETS, script.LOSSES, [str(w) for w in words])
        script.train(cfg)
        return common.read_checkpoint(cfg.out)
    return run
