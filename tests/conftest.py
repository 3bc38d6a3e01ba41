"""What the tests share."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: threads only get in each other's way

import cm
import common
import direct_cm
import kit
import multistep_cm
import scm
import sct

import json
import multiprocessing
import socket
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image

ROOT = Path(common.__file__).parent
REPORT = sys.modules["kit.report"]  # kit.report is its function
SCRIPTS = dict(cm=cm, direct_cm=direct_cm, multistep_cm=multistep_cm, sct=sct, scm=scm)
energy_distance = kit.metrics.energy_distance


def quick_report(set):
    """A toy run ends with a report that takes four seconds, and few tests look at its figures. With 32 steps
    of the exact ODE in place of 256, and 500 points in place of 5,000, it takes half a second."""
    set(kit.toys, "EXACT_STEPS", 32)
    set(REPORT, "energy_distance", lambda a, b: energy_distance(a[:500], b[:500]))


FORKS = multiprocessing.get_context("forkserver")  # from a process that has loaded torch, and no more
FORKS.set_forkserver_preload(["torch.distributed", "diffusers"])


def forked(script, words, printed, **variables):
    """Starts a script in a process of its own, with these environment variables and the quick report. What it
    prints goes to a file. With `python SCRIPT.py` most of the time would go into loading torch."""
    code = f"""
import atexit, os, sys
os.environ |= {variables}
sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}
sys.stdout = sys.stderr = open({printed!r}, "w")
import conftest, {script}
conftest.quick_report(setattr)
try:
    {script}.main({[str(word) for word in words]})
finally:
    atexit._run_exitfuncs()  # which a fork leaves out
    sys.stdout.flush()
"""
    process = FORKS.Process(target=exec, args=(code, {}))
    process.start()
    return process


def two_processes(script, *words):
    """Runs a script in two processes, with torchrun's variables, to a good end; returns what rank 0
    printed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    ranks = [forked(script, words, f"rank-{i}.txt", **shared, RANK=i, LOCAL_RANK=i) for i in "01"]
    for rank in ranks:
        rank.join(200)
        rank.kill()
    printed = [Path(f"rank-{i}.txt").read_text() for i in "01"]
    assert [rank.exitcode for rank in ranks] == [0, 0], printed
    return printed[0]


def finish(command):
    """Run a command to its end, which must be a good one; returns what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-2000:]
    return done.stdout


def preset(script, dataset="gmm", **values):
    """The Config of a script's preset, as without a command line; `values` replace those of the preset."""
    known, found = script.Config.__dataclass_fields__, kit.config.preset(script.PRESETS, dataset)
    return script.Config(**dict(dataset=dataset) | {k: v for k, v in found.items() if k in known} | values)


def one_line(capsys, function, *words):
    """Calls function(words), which must end in one line on stderr and exit code 2; returns that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        function([str(word) for word in words])
    lines = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def parsed(*words, script=scm):
    """The Config of a command line that needs no teacher, nor a run to start from."""
    words = [str(w) for w in words] + ["--teacher", "exact"] * ("--teacher" not in words)  # any will do
    words += ["--init", "none"] * ("--init" not in words)
    return kit.parse_args(script.Config, script.PRESETS, script.LOSSES, words)


def fails(capsys, function, *args, **kw):
    """The one line that a call ends in."""
    return one_line(capsys, lambda _: function(*args, **kw))


def same(a, b, exact=True):
    """Two state dicts are equal, bit for bit or to float tolerance."""
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if exact else torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-6) for k in a)


def same_optimizer(a, b):
    pairs = zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values())
    return all(torch.equal(x[k], y[k]) for x, y in pairs for k in x)


def files(out):
    return {path.name: path.read_bytes() for path in Path(out).glob("[!.]*")}


def log(out):
    """The lines of training; a report on the toy adds one with E."""
    lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def draw(n=64, step=0):
    return common.Draw(0, step, 0, n)


def full(n, value):
    return torch.full((n,), value, dtype=torch.float64)


def toy_net(seed=0, **options):
    """A small network for 2-D points, in float64."""
    small = dict(shape=(2,), channels=32, blocks=2, emb_scale=10.0, head=False)
    return kit.networks.build(small | options, seed).double()


def gradient(loss, net):
    grads = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


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
    data = kit.dataset(cfg)
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
        toy = kit.networks.build(dict(shape=(2,), channels=16, blocks=2) | options)
        small = dict(shape=(3, 8, 8), channels=8, blocks=1, attention=(4,), dropout=dropout)
        unet = kit.networks.build(small | options)
        for net in (toy, unet):
            generator = torch.Generator().manual_seed(1)
            for p in net.parameters():
                p.data = p.data + 0.3 * torch.randn(p.shape, generator=generator)
        return toy.double(), unet.double()
    return make


def draw_pictures(root, count=24):
    """`count` pictures of 8 x 8 pixels in 3 class folders."""
    images, _ = kit.toys.draw_shapes(scm.Config(image_size=8), count)
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
    cfg = kit.parse_args(script.Config, script.PRESETS, script.LOSSES, [str(w) for w in words])
    script.train(cfg)
    return kit.read_checkpoint(cfg.out)


@pytest.fixture
def vae():
    """Folder of a tiny AutoencoderKL: 16 x 16 pixels <-> 4 x 8 x 8 latents."""
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=[32, 32], down_block_types=["DownEncoderBlock2D"] * 2, norm_num_groups=8,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, sample_size=16).save_pretrained("vae")
    return "vae"


@pytest.fixture
def train():
    return run_here
