import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: threads only get in each other's way

import common
import scm

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(common.__file__).parent
energy_distance = common.energy_distance


def quick_report(set):
    """A toy run ends with a report that takes four seconds, and few tests look at its figures. With 32 steps
    of the exact ODE in place of 256, and 500 points in place of 5,000, it takes half a second."""
    set(common, "EXACT_STEPS", 32)
    set(common, "energy_distance", lambda a, b: energy_distance(a[:500], b[:500]))


def torchrun(script, *words):
    """The command that runs a script by two processes, with the quick report."""
    code = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}\n" \
           f"import conftest, {script}; conftest.quick_report(setattr); {script}.main()"
    Path(f"run_{script}.py").write_text(code)
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            f"run_{script}.py", *map(str, words)]


def finish(command):
    """Run a command to its end, which must be a good one; returns what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-2000:]
    return done.stdout


def preset(script, dataset="gmm", **values):
    """The Config of a script's preset, as without a command line; `values` replace those of the preset."""
    known, found = script.Config.__dataclass_fields__, common.preset(script.PRESETS, dataset)
    return script.Config(**dict(dataset=dataset) | {k: v for k, v in found.items() if k in known} | values)


def one_line(capsys, function, *words):
    """Calls function(words), which must end in one line on stderr and exit code 2; returns that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        function([str(word) for word in words])
    lines = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2 and len(lines) == 1, lines
    return lines[0]


@pytest.fixture(autouse=True, scope="session")
def quick():
    quick_report(setattr)


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Every test works in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ring():
    """Toy config, dataset and exact teacher."""
    cfg = preset(scm, warmup=0)
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
        mean = data.mean + cos * s**2 / variance * delta
        return mean[k] + s * sin * cfg.sigma_d / variance.sqrt() * noise
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


def draw_pictures(root, count=24):
    """`count` pictures of 8 x 8 pixels in 3 class folders."""
    images, _ = common.draw_shapes(scm.Config(image_size=8), count)
    for i, image in enumerate(images):
        path = root / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(path)
    return root


@pytest.fixture
def folder(tmp_path):
    """24 small pictures in 3 class folders."""
    return draw_pictures(tmp_path / "pictures")


def run_here(*words, script=scm):
    """Train in this process from command-line words; returns the checkpoint."""
    cfg = common.parse_args(script.Config, script.PRESETS, script.LOSSES, [str(w) for w in words])
    script.train(cfg)
    return common.read_checkpoint(cfg.out)


@pytest.fixture
def train():
    return run_here
