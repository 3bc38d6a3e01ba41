"""The paper-scale path at tiny size: presets, latents, half precision, processes, dry run, foreign files."""
import cm
import common
import direct_cm
import eval as evaluation
import multistep_cm
import scm
import sct
from conftest import draw_pictures, finish, one_line, preset, torchrun

import contextlib
import dataclasses
import io
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

PAPER = {  # sCM, App. G: dataset, mode, size -> what the paper's tables say
    ("imagenet64", "diffusion", "S"): dict(lr=1e-2, P_mean=-0.8, P_std=1.6, ema_sigma_rel=0.075, dropout=0.0),
    ("imagenet64", "diffusion", "XL"): dict(lr=7e-3, ema_sigma_rel=0.04, dropout=0.1, lr_ref=35_000),
    ("imagenet64", "scd", "M"): dict(lr=9e-5, P_mean=-1.0, P_std=1.6, steps=400_000, lr_ref=35_000,
                                     dropout=0.0),
    ("imagenet64", "sct", "L"): dict(lr=8e-5, dropout=0.45, eps=1e-11, beta2=0.99, ema_sigma_rel=0.05),
    ("imagenet512", "diffusion", "XXL"): dict(lr=6.5e-3, P_mean=-0.4, P_std=1.0, label_dropout=0.1,
                                              ema_sigma_rel=0.015),
    ("imagenet512", "scd", "XXL"): dict(lr=6.5e-5, P_mean=-0.8, P_std=1.6, steps=200_000, guidance_max=2.0,
                                        lr_ref=70_000),
    ("imagenet512", "sct", "S"): dict(lr=1e-4, steps=100_000, guidance_max=1.0, tangent_c=0.1, warmup=10_000,
                                      dropout=0.25, dropout_res=16),
    ("imagenet512", "dscd", "M"): dict(lr=9e-5, dropout=0.1, dropout_res=16, guidance_max=2.0),
}
IMAGENET = dict(batch=2048, channel_mult=(1, 2, 3, 4), blocks=3, channels=192)
TABLES = [  # the other papers' tables, and those of their code
    (cm, "cifar10 cd", dict(batch=512, lr=4e-4, optimizer="radam", steps=800_000, points=18, mu=0.0,
        dropout=0.0, ema_halflife=512 * math.log(0.5) / math.log(0.9999), metric="lpips", flip=True)),
    (cm, "cifar10 ct", dict(batch=512, lr=4e-4, intervals_start=2, intervals=150, mu=0.9, steps=800_000)),
    (cm, "cifar10 ctct", dict(batch=512, lr=5e-6, dropout=0.3, metric="l2", steps=400_000)),
    (cm, "cifar10 ict", dict(batch=1024, lr=1e-4, dropout=0.3, steps=400_000, sigmas=(80.0, 0.821), mu=0.0,
        ema_halflife=1024 * math.log(0.5) / math.log(0.99993), metric="huber", P_std=2.0)),
    (cm, "cifar10 diffusion", dict(batch=512, lr=1e-3, optimizer="adam", dropout=0.13, P_mean=-1.2, P_std=1.2,
        ema_halflife=5e5, lr_warmup=19_531, beta2=0.999)),
    (cm, "imagenet64 cd", dict(IMAGENET, lr=8e-6, steps=600_000, points=40, mu=0.95, metric="lpips_avg",
        flip=True, sigmas=(80.0, 1.382), dropout=0.0, optimizer="radam", dtype="fp16")),
    (cm, "imagenet64 ct", dict(lr=1e-4, steps=800_000, intervals_start=2, intervals=200, mu=0.95)),
    (cm, "imagenet64 ict", dict(IMAGENET, batch=4096, lr=1e-4, steps=800_000, dropout=0.2, dropout_res=0,
        ema_halflife=4096 * math.log(0.5) / math.log(0.99997), sigmas=(80.0, 1.526))),
    (cm, "imagenet64 diffusion", dict(IMAGENET, lr=1e-2, lr_ref=35_000, P_mean=-0.8, P_std=1.6, dropout=0.0,
        ema_sigma_rel=0.075, uncertainty=True, dtype="fp16", steps=2**19, beta2=0.99, lr_warmup=4883,
        optimizer="adam", mu=0.0)),
    (sct, "cifar10 ect", dict(batch=128, lr=1e-4, optimizer="radam", dropout=0.2, shrink=2.0, widening=8.0,
        widening_rate=1.0, stage_steps=25_000, steps=200_000, P_mean=-1.1, P_std=2.0, ema_halflife=128 *
        math.log(0.5) / math.log(0.9999), sigmas=(80.0, 0.821), delta=0.0, sigma_shift=0.003)),
    (sct, "cifar10 sct", dict(batch=128, huber=1e-8, sigma_shift=0.0, P_mean=-1.1, flip=False)),
    (sct, "imagenet64 ect", dict(IMAGENET, batch=128, lr=1e-3, lr_ref=2000, dropout=0.4, dropout_res=16,
        shrink=4.0, huber=0.06, weighting="snr", P_mean=-0.8, P_std=1.6, sigmas=(80.0, 1.526), steps=100_000,
        beta2=0.99, optimizer="adam", sigma_shift=0.0, flip=False)),
    (sct, "imagenet64 ect --size XL", dict(channels=384, lr=7e-4, dropout=0.5)),
    (sct, "imagenet64 diffusion --size M", dict(lr=9e-3, dropout=0.1, dropout_res=0, ema_sigma_rel=0.06,
        batch=2048, uncertainty=True, steps=2**20)),
    (multistep_cm, "imagenet64 cd", dict(batch=2048, steps=200_000, teacher_steps=(64, 1280), anneal=0.5,
        x_var_frac=0.75, huber=1e-4, dropout=0.2, dropout_res=16, noise_res=(32, 64, 64))),
    (multistep_cm, "imagenet64 diffusion", dict(dropout=0.2, dropout_res=16, lr=1e-2, lr_ref=35_000)),
    (multistep_cm, "imagenet64 cd --size L", dict(dropout=0.1, dropout_res=32, channels=320)),
    (multistep_cm, "imagenet128 ct", dict(dropout=0.1, dropout_res=16, noise_res=(32, 128, 128))),
    (multistep_cm, "imagenet128 ct --size L", dict(dropout=0.1, dropout_res=64, channels=256)),
    (direct_cm, "text cm", dict(lr=1e-4, intervals=100, guidance=9.0, batch=16, steps=250, clip=1.0, seed=24,
        optimizer="adamw", lora_rank=64, ema_halflife=0.0, ema_sigma_rel=0.0, image_size=1024, metric="l2",
        solver="ddim", sigma_d=1.0, first_label=1)),
]


def config(*words, script=scm):
    words = [str(w) for w in words] + ["--teacher", "exact"] * ("--teacher" not in words)  # any will do
    return common.parse_args(script.Config, script.PRESETS, script.LOSSES, words)


def network(cfg, *shape, classes=1000, **options):
    """The config's network without memory (device meta), and its parameters in millions."""
    data = type("Data", (), dict(shape=shape, classes=classes))
    with torch.device("meta"):
        net = common.network(cfg, data, "meta", **options)
    return net, sum(p.numel() for p in net.parameters()) / 1e6


@pytest.mark.parametrize("run", PAPER, ids="-".join)
def test_presets_are_the_papers(run):
    """Learning rates, noise, dropout, EMA, iterations; batch 2048 in half precision throughout."""
    dataset, mode, size = run
    cfg = config("--dataset", dataset, "--mode", mode, "--size", size)
    expected = PAPER[run] | dict(batch=2048, dtype="fp16", blocks=3, optimizer="adam")
    assert {name: getattr(cfg, name) for name in expected} == pytest.approx(expected)
    assert cfg.channel_mult == (1, 2, 3, 4) and cfg.attention == (16, 8) and cfg.conditional


@pytest.mark.parametrize("script, words, expected", TABLES, ids=[f"{s.__name__} {w}" for s, w, _ in TABLES])
def test_presets_are_the_other_papers(script, words, expected):
    """What the papers and their published code say; an EMA's decay as its half-life, to the digits of
    both."""
    dataset, mode, *size = words.split()
    cfg = config("--dataset", dataset, "--mode", mode, *size, script=script)
    assert {name: getattr(cfg, name) for name in expected} == {
        k: pytest.approx(v, rel=0.02) if isinstance(v, float) else v for k, v in expected.items()}


def test_fig_4_of_sct_is_one_command():
    """dt = t / 256 at every t and step (Sec. 5), with the flags that the preset names."""
    flags = "--steps 16000 --shrink 256 --widening 0 --stage_steps 16000".split()
    cfg = config("--dataset", "cifar10", "--mode", "sct", *flags, script=sct)
    assert all(flag in Path(sct.__file__).read_text() for flag in (" ".join(flags[:4]), " ".join(flags[4:])))
    t = torch.tensor([0.01, 1.0, 80.0]).double()
    for step in (0, 8000, 15_999):
        assert torch.allclose(t - sct.earlier(t, torch.zeros(3).double(), step, cfg), t / 256)


@pytest.mark.parametrize("limit, expected", [(0, {8, 16, 32, 64}), (16, {8, 16}), (32, {8, 16, 32})])
def test_dropout_by_resolution(limit, expected):
    """Dropout acts in the blocks of at most dropout_res pixels, in all of them for 0."""
    cfg = config("--dataset", "imagenet64", "--mode", "sct", "--dropout_res", limit)
    net, _ = network(cfg, 3, 64, 64)
    blocks = {**net.enc, **net.dec}
    assert {int(k.split("x")[0]) for k, block in blocks.items() if getattr(block, "dropout", 0)} == expected
    assert {block.dropout for block in blocks.values() if hasattr(block, "dropout")} <= {0.0, 0.45}


def test_flips_are_half_and_follow_the_position(folder):
    """Each image comes as it is or mirrored, half the time; which one depends on (seed, step, position)."""
    cfg = scm.Config(dataset="folder", data=str(folder), flip=True)
    plain, flipped = (common.dataset(dataclasses.replace(cfg, flip=flip)) for flip in (False, True))
    def batch(data, lo, hi, step=3):
        return data.batch(common.Draw(0, step, lo, hi))[0]
    a, b = batch(plain, 0, 4096), batch(flipped, 0, 4096)
    same, mirrored = ((b == v).flatten(1).all(1) for v in (a, a.flip(3)))
    assert (same | mirrored).all() and abs(mirrored.double().mean() - 0.5) < 4 * 0.5 / 64
    assert torch.equal(batch(flipped, 100, 200), b[100:200])
    assert not torch.equal(batch(flipped, 0, 4096, 4), b)
    assert (b.mean(0) - b.flip(3).mean(0)).abs().max() < 0.1 * a.std()  # its own mirror image, on average


@pytest.mark.parametrize("size, millions", dict(S=280.2, M=497.8, L=777.6, XL=1119.4, XXL=1523.4).items())
def test_sizes_are_the_papers(size, millions):
    """Parameters of the U-Net, to within the heads."""
    net, _ = network(config("--dataset", "imagenet512", "--size", size), 4, 64, 64, guidance=True)
    body = [p.numel() for name, p in net.named_parameters() if "head" not in name and "guidance" not in name]
    assert sum(body) / 1e6 == pytest.approx(millions, abs=0.3)


def test_cifar10_is_trained_on_ddpmpp():
    """The papers' network: 55.7 M parameters (EDM, Tab. 7: 56 M)."""
    net, millions = network(config("--dataset", "cifar10", "--mode", "sct"), 3, 32, 32, head=False)
    assert net.options["arch"] == "ddpmpp" and millions == pytest.approx(55.7, abs=0.1)


@pytest.mark.parametrize("flags", [("--double_norm", "true"), ("--emb", "fourier"), ("--guidance_max", "2")])
def test_ddpmpp_refuses_what_it_has_not(flags):
    """EDM2's modulation and embedding, and guidance."""
    cfg = config("--dataset", "cifar10", "--mode", "sct", *flags)
    with pytest.raises(SystemExit):
        network(cfg, 3, 32, 32, guidance=cfg.guidance_max > 1)


@pytest.mark.parametrize("script, flags, expected", [
    (cm, "imagenet64", 280), (sct, "imagenet64 --size M", 498), (multistep_cm, "imagenet64", 280),
    (multistep_cm, "imagenet64 --size L", 778), (multistep_cm, "imagenet128", 184),
    (multistep_cm, "imagenet128 --size L", 736)])
def test_the_siblings_presets_are_edm2s_network(script, flags, expected):
    """EDM2's own modulation, and the sizes that the presets name."""
    cfg = config("--dataset", *flags.split(), script=script)
    _, millions = network(cfg, 3, cfg.image_size, cfg.image_size, head=False)
    assert not cfg.double_norm and millions == pytest.approx(expected, abs=0.6)


def test_label_dropout_rate():
    """A tenth of the labels become -1, within four standard deviations of the binomial."""
    n = 20_000
    cfg = scm.Config(conditional=True, label_dropout=0.1)
    y = common.Draw(0, 0, 0, n).labels(torch.ones(n, dtype=torch.int64), cfg)
    assert abs((y == -1).double().mean() - 0.1) < 4 * (0.09 / n) ** 0.5 and set(y.tolist()) == {-1, 1}


def test_guidance_is_an_input_that_starts_silent(nets):
    """At the start the student is the teacher, which knows no guidance; with any gain it moves the output."""
    _, net = nets(classes=3, guidance=True)
    x, t, y = torch.randn(2, 3, 8, 8).double(), torch.tensor([0.4, 1.3]).double(), torch.tensor([0, 2])
    low, high = torch.ones(2).double(), torch.full((2,), 2.0).double()
    assert not torch.allclose(net(x, t, y, low), net(x, t, y, high))
    net.embedding.guidance_gain.data.zero_()
    assert torch.equal(net(x, t, y, low), net(x, t, y, high))
    assert torch.equal(net(x, t, y, low), net(x, t, y))


@pytest.fixture
def vae():
    """Folder of a tiny AutoencoderKL: 16 x 16 pixels <-> 4 x 8 x 8 latents."""
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=[32, 32], down_block_types=["DownEncoderBlock2D"] * 2, norm_num_groups=8,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, sample_size=16).save_pretrained("vae")
    return "vae"


def latents(data="", **kw):
    """The dataset of latents; from a folder of images, it is encoded into data/imagenet512 first."""
    values = dict(vae="vae", image_size=16, conditional=True) | kw
    return common.dataset(scm.Config(dataset="imagenet512", data=str(data), **values))


def fails(capsys, function, *args, **kw):
    """The one line that a call ends in."""
    return one_line(capsys, lambda _: function(*args, **kw))


def test_latents_are_the_autoencoders(folder, vae):
    """Mean and deviation in float16, of pixels in [-1, 1]; samples are normalized by the paper's numbers."""
    data, net = latents(folder), diffusers.AutoencoderKL.from_pretrained("vae")
    names, labels, read = common.list_images(folder)
    x = torch.from_numpy(np.stack([common.decode(name, read, 16) for name in names])).float() / 127.5 - 1
    with torch.no_grad():
        posterior = net.encode(x).latent_dist
    found = torch.from_numpy(np.load("data/imagenet512/rows.npy")).float()
    assert torch.allclose(found[:, :4], posterior.mean, atol=1e-2)
    assert torch.allclose(found[:, 4:], posterior.std, rtol=1e-2)
    assert data.shape == (4, 8, 8) and data.labels.tolist() == list(labels)
    assert data.cfg.data == "data/imagenet512"
    x0, y = latents().batch(common.Draw(0, 0, 0, 64))  # without --data, what is there
    gen = common.Draw(0, 0, 0, 64)
    mean, std = found[gen.index(24)].chunk(2, 1)
    z = mean + std * gen.normal(4, 8, 8)
    shift, scale = (torch.tensor(v).view(4, 1, 1)
                    for v in ([1.56, -0.695, 0.483, 0.729], [5.27, 5.91, 4.21, 4.31]))
    assert torch.allclose(x0, (z - shift) * 0.5 / scale, atol=1e-6) and len(y) == 64
    means = data.x0(slice(None), "cpu")
    assert torch.allclose(means, (found[:, :4] - shift) * 0.5 / scale, atol=1e-6)


def test_decoding_undoes_the_normalization(vae):
    """x0 -> latent -> pixels, for our latents (pixels in [-1, 1], rounded) and for EDM2's (in [0, 1],
    cut)."""
    z, net = 3 * torch.randn(2, 4, 8, 8), diffusers.AutoencoderKL.from_pretrained("vae")
    with torch.no_grad():
        pixels = net.decode(z).sample
    for data, (low, high), half in (("latents", (-1, 1), 0.5), ("latents.zip", (0, 1), 0.0)):
        cfg = scm.Config(dataset="imagenet512", data=data, vae="vae")
        _, shift, scale = common.latent_space(cfg, "cpu")
        found = common.to_pixels((z - shift) * 0.5 / scale, cfg)
        expected = ((pixels - low) / (high - low) * 255 + half).clamp(0, 255).floor()
        assert (found != expected).double().mean() < 1e-3  # but for float32 at the steps


def test_edm2s_zip_of_latents(vae):
    """float32 (8, h, w) .npy and dataset.json, normalized by EDM2's numbers; read in place, not copied."""
    rows = np.random.default_rng(0).normal(size=(6, 8, 4, 4)).astype(np.float32)
    with zipfile.ZipFile("edm2.zip", "w") as archive:
        names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(6)]
        for name, row in zip(names, rows):
            buffer = io.BytesIO()
            np.save(buffer, row)
            archive.writestr(name, buffer.getvalue())
        table = [[name, i % 3] for i, name in enumerate(names)]
        archive.writestr("dataset.json", json.dumps(dict(labels=table)))
    data = latents("edm2.zip")
    assert np.array_equal(data.rows[[4, 1]], rows[[4, 1]]) and data.shape == (4, 4, 4) and data.classes == 3
    shift, scale = (torch.tensor(v).view(4, 1, 1)
                    for v in ([5.81, 3.25, 0.12, -2.15], [4.17, 4.62, 3.71, 3.28]))
    means, labels = data.x0(slice(None), "cpu"), data.labels
    assert torch.allclose(means, (torch.from_numpy(rows[:, :4]) - shift) * 0.5 / scale, atol=1e-6)
    assert labels.tolist() == [0, 1, 2] * 2 and not Path("data").exists()


def test_unfit_latents_are_refused(folder, vae, capsys):
    """No images or no latents; another size than before; a folder that cannot be written; latents without
    labels, or of a size that the network cannot halve."""
    for data, word in (("nowhere", "--data nowhere"), ("", "--data")):
        assert word in fails(capsys, latents, data)
    Path("data").write_text("in the way")
    assert "cannot write data" in fails(capsys, latents, folder)
    Path("data").unlink()
    latents(folder)
    assert "halved" in fails(capsys, latents, channel_mult=(1,) * 6)
    assert "other images" in fails(capsys, latents, folder, image_size=8)
    with zipfile.ZipFile("plain.zip", "w") as archive:
        buffer = io.BytesIO()
        np.save(buffer, np.zeros((8, 4, 4), np.float32))
        archive.writestr("0.npy", buffer.getvalue())
    assert "labels" in fails(capsys, latents, "plain.zip")


def dies(monkeypatch, count):
    """From now on, the program is interrupted when it decodes its count-th image."""
    real, seen = common.decode, []

    def decode(*args):
        seen.append(args[0])
        if len(seen) == count:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(common, "decode", decode)
    return seen


def test_encoding_goes_on_after_a_kill(folder, vae, monkeypatch, capsys):
    """Unfinished latents are not read; two processes go on with them, and do nothing twice; damaged ones are
    encoded anew where the images are given."""
    whole = np.array(latents(folder).rows)
    Path("data").rename("elsewhere")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        dies(patch, 20)
        latents(folder)
    assert np.load("data/imagenet512/done.npy").sum() == 16
    assert "--data data/imagenet512" in fails(capsys, latents)
    rows = np.load("data/imagenet512/rows.npy", mmap_mode="r+")
    rows[:8] = 7  # a mark: these count as done
    rows.flush()
    for rank in (0, 1):  # each takes every second batch
        with monkeypatch.context() as patch:
            patch.setattr(common, "RANK", rank), patch.setattr(common, "WORLD", 2)
            latents(folder)
    found = latents().rows
    assert np.array_equal(found[8:], whole[8:]) and (found[:8] == 7).all()
    path = Path("data/imagenet512/rows.npy")
    path.write_bytes(path.read_bytes()[:-100])
    assert "--data data/imagenet512" in fails(capsys, latents)
    assert np.array_equal(latents(folder).rows, whole)


def test_pixels_are_kept_by_all_processes(tmp_path, monkeypatch):
    """The cache of a folder: two processes write what one does. A killed writer goes on where it stopped, and
    a damaged cache is made anew."""
    root = draw_pictures(tmp_path / "many", 600)  # in batches of 256: two for one process, one for the other
    finish(torchrun("scm", "--dataset", "folder", "--data", root, "--mode", "sct", "--steps", 1, "--batch", 8,
                    "--channels", 8, "--channel_mult", "1,1", "--blocks", 1))
    cfg, (two,) = scm.Config(dataset="folder", data=str(root)), Path("data/cache").iterdir()
    seen = dies(monkeypatch, 10**9)
    rows, _ = common.image_folder(cfg)
    assert len(seen) < 5 and len(rows) == 600  # nothing is decoded again, but for a first look

    Path("one").mkdir()
    monkeypatch.chdir("one")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        dies(patch, 400)
        common.image_folder(cfg)
    (one,) = Path("data/cache").iterdir()
    assert one.name == two.name and np.load(one / "done.npy").sum() == 256
    seen.clear()
    common.image_folder(cfg)
    assert len(seen) < 600 - 256 + 5
    for name in ("rows.npy", "labels.npy", "done.npy"):
        assert (one / name).read_bytes() == (tmp_path / two / name).read_bytes()
    (one / "rows.npy").write_bytes((one / "rows.npy").read_bytes()[:-1000])
    again, labels = common.image_folder(cfg)
    assert np.array_equal(again, rows) and np.bincount(labels).tolist() == [200] * 3


@pytest.mark.parametrize("arch", ["edm2", "ddpmpp"])
def test_checkpointing_changes_no_gradient(arch):
    """Also with dropout: the second pass draws the masks of the first."""
    net = common.build(dict(arch=arch, shape=(3, 8, 8), channels=8, blocks=1, attention=(4,), dropout=0.3,
                            double_norm=arch == "edm2")).double()
    x, t = torch.randn(2, 3, 8, 8).double(), torch.tensor([0.3, 1.2]).double()
    grads = []
    for net.checkpointing in (False, True):
        torch.manual_seed(0)
        net.zero_grad()
        net(x, t).square().sum().backward()
        grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads)) and len(grads[0]) == len(grads[1]) > 10


def test_a_compiled_run_is_the_eager_one(folder, monkeypatch):
    """--compile: one graph; the loss and all gradients of the first step, dropout masks included. Each kernel
    takes a second to compile, so the network is smaller than a command line could make it."""
    monkeypatch.setattr("torch._inductor.config.cpp.simdlen", 1)  # plain loops: no search for vector units
    cfg = preset(scm, "folder", data=str(folder), mode="sct", channels=8, channel_mult=(1,), blocks=0,
                 dropout=0.3, batch=8, steps=1, warmup=0, out="init")
    scm.train(cfg)
    init = common.read_checkpoint("init")
    for name in ("net", "ema"):  # at first, the output is 0
        init[name]["out_gain"].fill_(1.0)
    torch.save(init, "init/ckpt.pt")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    logs, gradients = [], []
    for compiled in (False, True):
        cfg = dataclasses.replace(cfg, init="init", compile=compiled, out=f"compiled-{compiled}")
        scm.train(cfg)
        logs.append(json.loads(Path(cfg.out, "log.jsonl").read_text()))
        state = common.read_checkpoint(cfg.out)["optimizer"]["state"]
        gradients.append([v["exp_avg"] for v in state.values()])
    counts = torch._dynamo.utils.counters
    assert not counts["graph_break"] and counts["stats"]["unique_graphs"] == 1
    names = ("loss", "mse", "grad_norm")
    assert [logs[0][k] for k in names] == pytest.approx([logs[1][k] for k in names], rel=1e-4)
    assert len(gradients[0]) > 15
    for eager, found in zip(*gradients):
        assert torch.allclose(eager, found, atol=1e-5 * eager.abs().max())


def test_dry_run_allocates_nothing_and_checks(folder, capsys):
    """Parameters, FLOPs and memory are printed; no file is written; a missing teacher is found."""
    flags = ["--dataset", "folder", "--data", str(folder), "--dry_run"]
    scm.main([*flags, "--mode", "sct"])
    text = capsys.readouterr().out
    net = common.network(config(*flags[:4]), common.dataset(config(*flags[:4])))
    assert f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters" in text and "GFLOP" in text
    assert not Path("out").exists()
    assert "no checkpoint" in one_line(capsys, scm.main, *flags, "--teacher", "nowhere")


def test_flops_of_a_linear_layer(capsys):
    """2 x inputs x outputs for the MLP's matrices, by hand."""
    scm.main(["--dry_run", "--channels", "32", "--blocks", "1"])
    n = 32
    by_hand = 2 * sum(dict(first=2 * n, modulate=2 * n * n, inner=n * n, outer=n * n, last=2 * n,
                           time=64 * n, head=128).values())
    printed = float(capsys.readouterr().out.split("parameters; ")[1].split(" GFLOP")[0])
    assert printed * 1e9 == pytest.approx(by_hand, rel=0.1)


def children(pid):
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(word) for task in tasks for word in (task / "children").read_text().split()]


def test_the_whole_path_at_tiny_size(tmp_path, vae):
    """Pictures -> latents -> diffusion -> scd with guidance -> two-step samples -> pixels -> eval, as on
    ImageNet-512 by the README's two lines: torchrun, two processes, folders by convention, with bfloat16 and
    accumulation. A process is killed in the encoding and one in training, which ends the job and is said. The
    same line, and --resume, go on."""
    pictures = draw_pictures(tmp_path / "pictures", 800)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", scm.__file__,
           "--dataset", "imagenet512"]
    shared = ["--vae", "vae", "--dtype", "bf16", "--batch", "16", "--micro", "4", "--save_every", "2",
              "--log_every", "2"]
    small = ["--channels", "16", "--channel_mult", "1,2", "--blocks", "1", "--attention", "4"]
    teacher = [*run, "--data", str(pictures), "--mode", "diffusion", *shared, *small, "--image_size", "16",
               "--steps", "4"]
    job, done = subprocess.Popen(teacher, stderr=subprocess.DEVNULL), Path("data/imagenet512/done.npy")
    while job.poll() is None and not (done.exists() and done.stat().st_size > 800 and np.load(done).any()):
        time.sleep(0.002)
    os.kill(children(job.pid)[-1], signal.SIGKILL)
    job.wait()
    assert 0 < np.load(done).sum() < 800 and not Path("out/scm-imagenet512-diffusion/ckpt.pt").exists()
    finish(teacher)
    assert np.load(done).all()
    student = [*run, *shared, "--warmup", "10"]
    job = subprocess.Popen([*student, "--steps", "100000"], stderr=subprocess.PIPE, text=True)
    log = Path("out/scm-imagenet512-scd/log.jsonl")
    while job.poll() is None and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(0.02)
    os.kill(children(job.pid)[-1], signal.SIGKILL)
    _, text = job.communicate(timeout=60)
    assert job.returncode and "SIGKILL" in text or "-9" in text
    last = common.read_checkpoint(log.parent)["step"] + 4
    finish([*run, "--resume", "--steps", str(last)])
    ckpt = common.read_checkpoint(log.parent)
    assert ckpt["config"]["teacher"] == "out/scm-imagenet512-diffusion"
    assert ckpt["step"] == last and ckpt["options"]["guidance"] and ckpt["options"]["shape"] == (4, 8, 8)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(2, last + 1, 2))
    assert all(np.isfinite(line["loss"]) for line in lines)
    scm.main("--sample 6 --nfe 2 --guidance 1.5 --dataset imagenet512 --save x.npz".split())
    found = np.load("x.npz")
    assert found["arr_0"].shape == (6, 16, 16, 3) and found["arr_1"].tolist() == [0, 1, 2] * 2
    evaluation.main([str(log.parent), "--nfe", "2", "--samples", "12", "--reference", str(pictures),
                     "--out", "e"])
    assert json.loads(Path("e/eval.json").read_text())[0]["frechet_distance"] > 0


def test_tangent_in_half_precision():
    """EDM's c_noise = log(sigma) / 4 has a derivative without bound at both ends: in float16 the plain JVP
    overflows there, the rearranged one of Sec. 5.1 stays finite over (0, pi/2); and so does c_noise = t."""
    ends = 10.0 ** torch.linspace(-4, -1, 7)
    t = torch.cat([ends, torch.tensor([0.5, 1.0, 1.4]), np.pi / 2 - ends.flip(0)]).double()
    x_t, v_t = 0.5 * torch.randn(2, len(t), 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for options in (dict(c_noise="log", emb="fourier", double_norm=False), dict(c_noise="t")):
        small = dict(shape=(3, 16, 16), channels=32, blocks=1, attention=(8,), dtype="fp16")
        net = common.build(small | options)
        for name, p in net.named_parameters():
            p.data = torch.ones_like(p) if "gain" in name else p.data
        cfg, gen = scm.Config(warmup=0), common.Draw(0, 0, 0, len(t))
        F, g = scm.tangent(net, x_t, t, None, None, v_t, 0, cfg, gen)
        _, plain = common.jvp(net, (x_t / 0.5, t), (v_t / 0.5, torch.ones_like(t)))
        assert F.isfinite().all() and g.isfinite().all()
        assert plain.isfinite().all() == (options["c_noise"] == "t")


@pytest.mark.parametrize("mode", ["diffusion", "sct"])
def test_half_precision_trains(train, folder, mode):
    """float16 torso, float32 weights: loss scaling leaves gradients that move the weights and stay finite."""
    ckpt = train("--dataset", "folder", "--data", folder, "--mode", mode, "--dtype", "fp16", "--steps", 3,
                 "--batch", 8, "--channels", 8, "--blocks", 1, "--out", "half")
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in ckpt["net"].values())
    last = json.loads(Path("half/log.jsonl").read_text().splitlines()[-1])
    assert ckpt["scaler"]["scale"] > 0 and last["skipped"] < 3


class Command:
    """In a pickle: calls `function` on unpickling, unless nobody lets it."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def text(word):
    return b"\x8c" + bytes([len(word)]) + word.encode()


def hostile(kind):
    touch = Command(os.system, "touch touched")
    legacy = io.BytesIO()  # a pickle in torch's old format, inside a tensor's storage
    torch.save(touch, legacy, _use_new_zipfile_serialization=False)
    layer = text("torch.nn.modules.linear") + text("Identity") + b"\x93"
    flags = b"(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb."  # cleared
    return dict(
        system=touch, code=Command(eval, "open('touched', 'w')"), array=np.array([touch], dtype=object),
        nested=dict(ema=[(touch,)]), storage=Command(torch.storage._load_from_bytes, legacy.getvalue()),
        getattr=Command(getattr, Command(__import__, "os"), "system"),
        dtype=pickle.dumps(np.dtype("O"), 4)[:-1] + flags,
        build=b"\x80\x04" + layer + b"N}" + text("x") + b"K\x01s\x86b.",
        bounds=pickle.dumps(torch.ones(2), 4).replace(b"K\x02\x85", b"K\x63\x85"),
        stride=torch.ones(1).expand(2**20, 2**20))[kind]


KINDS = ["system", "code", "array", "nested", "storage", "getattr", "build", "bounds", "stride"]


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_pickles_run_nothing(kind, capsys):
    """Whatever they name is not called, and no class is changed: one line and exit code 2. A touched file
    would betray a call; a tensor larger than its storage would read foreign memory, or fill ours."""
    content = hostile(kind)
    Path("x.pkl").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    assert "x.pkl" in fails(capsys, common.read_edm, "x.pkl")
    with contextlib.suppress(SystemExit):  # what names a function alone is read, as something inert
        assert not callable(common.read_pickle("x.pkl"))
    assert not Path("touched").exists() and not hasattr(common.Record, "x")


class Slow(BaseException):
    """No Exception, so that no handler of the code takes it for a damaged file."""


def test_shared_modules_take_no_exponential_time(capsys, monkeypatch):
    """Forty levels, each of which holds the next one twice: 41 objects, but 2^40 paths to them."""
    net = torch.nn.Linear(2, 2)
    for _ in range(40):
        top = torch.nn.Module()
        top.a = top.b = net
        net = top
    with open("x.pkl", "wb") as file:
        pickle.dump(dict(ema=net), file)

    def late(*_):
        raise Slow
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 5)
    try:
        content = common.read_pickle("x.pkl")
        with pytest.raises(ValueError):
            common.module_tensors(content["ema"])
        content["ema"].class_name, content["ema"].state["_init_kwargs"] = "Precond", {}
        monkeypatch.setattr(common, "read_pickle", lambda path: content)
        assert "x.pkl" in fails(capsys, common.read_edm, "x.pkl")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_raw_bytes_are_never_pointers():
    """NumPy's dtype of objects with its flags cleared is a Record here, and no array can be made of it."""
    Path("x.pkl").write_bytes(hostile("dtype"))
    with pytest.raises(pickle.UnpicklingError):
        common.number_type(common.read_pickle("x.pkl"))


def test_harmless_pickles_load():
    """Tensors, half-precision parameters and arrays in every protocol; classes as Records."""
    x = dict(a=np.arange(6.0).reshape(2, 3), t=torch.arange(6.0).view(2, 3)[:, 1:],
             p=torch.nn.Parameter(torch.randn(3).half()), s=np.float64(2.5), net=torch.nn.Linear(2, 2))
    for protocol in (2, 4, 5):
        with open("x.pkl", "wb") as file:
            pickle.dump(x, file, protocol)
        found = common.read_pickle("x.pkl")
        assert np.array_equal(found["a"], x["a"]) and torch.equal(found["t"], x["t"]) and found["s"] == 2.5
        assert torch.equal(found["p"], x["p"].data) and isinstance(found["net"], common.Record)
        assert torch.equal(found["net"].state["_parameters"]["weight"], x["net"].weight.data)
