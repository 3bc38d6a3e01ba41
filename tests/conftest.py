import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: threads only get in each other's way

import numpy as np
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
def nets():
    """A 2-D and an image network in float64, every parameter random (as trained: no gain is zero)."""
    def make(dropout=0.0, **options):
        toy = common.build(dict(shape=(2,), channels=16, blocks=2) | options)
        unet = common.build(dict(shape=(3, 8, 8), channels=8, blocks=1, attention=(4,), dropout=dropout) | options)
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
