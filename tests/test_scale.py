"""The paper-scale path at tiny size: presets, sizes, latents, half precision, several processes, a dry run."""
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

import cm
import common
import multistep_cm
import scm
import sct

PAPER = {  # sCM, App. G: dataset, mode, size -> what the paper's tables say
    ("imagenet64", "diffusion", "S"): dict(lr=1e-2, P_mean=-0.8, P_std=1.6, ema_sigma_rel=0.075, dropout=0.0),
    ("imagenet64", "diffusion", "XL"): dict(lr=7e-3, ema_sigma_rel=0.04, dropout=0.1, lr_ref=35_000),
    ("imagenet64", "scd", "M"): dict(lr=9e-5, P_mean=-1.0, P_std=1.6, steps=400_000, lr_ref=35_000, dropout=0.0),
    ("imagenet64", "sct", "L"): dict(lr=8e-5, dropout=0.45, eps=1e-11, beta2=0.99, ema_sigma_rel=0.05),
    ("imagenet512", "diffusion", "XXL"): dict(lr=6.5e-3, P_mean=-0.4, P_std=1.0, label_dropout=0.1, ema_sigma_rel=0.015),
    ("imagenet512", "scd", "XXL"): dict(lr=6.5e-5, P_mean=-0.8, P_std=1.6, steps=200_000, guidance_max=2.0, lr_ref=70_000),
    ("imagenet512", "sct", "S"): dict(lr=1e-4, steps=100_000, guidance_max=1.0, tangent_c=0.1, warmup=10_000),
}


def config(*words):
    return common.parse_args(scm.Config, scm.PRESETS, scm.LOSSES, [str(w) for w in words])


@pytest.mark.parametrize("run", PAPER, ids="-".join)
def test_presets_are_the_papers(run):
    """Learning rates, noise, dropout, EMA, iterations; batch 2048 in half precision throughout."""
    dataset, mode, size = run
    cfg = config("--dataset", dataset, "--mode", mode, "--size", size)
    expected = PAPER[run] | dict(batch=2048, dtype="fp16", blocks=3, optimizer="adam")
    assert {name: getattr(cfg, name) for name in expected} == pytest.approx(expected)
    assert cfg.channel_mult == (1, 2, 3, 4) and cfg.attention == (16, 8) and cfg.conditional


@pytest.mark.parametrize("size, millions", dict(S=280.2, M=497.8, L=777.6, XL=1119.4, XXL=1523.4).items())
def test_sizes_are_the_papers(size, millions):
    """Parameters of the U-Net, to within the heads, without memory (device meta)."""
    cfg = config("--dataset", "imagenet512", "--size", size)
    data = type("Data", (), dict(shape=(4, 64, 64), classes=1000))
    with torch.device("meta"):
        net = common.network(cfg, data, guidance=True)
    body = sum(p.numel() for name, p in net.named_parameters() if "head" not in name and "guidance" not in name)
    assert body / 1e6 == pytest.approx(millions, abs=0.3)


def test_cifar10_is_trained_on_ddpmpp():
    """The papers' network: 55.7 M parameters (EDM, Tab. 7: 56 M)."""
    with torch.device("meta"):
        net = common.network(config("--dataset", "cifar10", "--mode", "sct"), type("Data", (), dict(shape=(3, 32, 32))), head=False)
    assert isinstance(net, common.DDPMpp) and sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(55.7, abs=0.1)


@pytest.mark.parametrize("flags", [("--double_norm", "true"), ("--emb", "fourier"), ("--guidance_max", "2")])
def test_ddpmpp_refuses_what_it_has_not(flags):
    cfg = config("--dataset", "cifar10", "--mode", "sct", *flags)
    with pytest.raises(SystemExit):
        common.network(cfg, type("Data", (), dict(shape=(3, 32, 32))), guidance=cfg.guidance_max > 1)


@pytest.mark.parametrize("script, flags, millions", [
    (cm, "imagenet64", 280), (sct, "imagenet64 --size M", 498), (multistep_cm, "imagenet64", 280),
    (multistep_cm, "imagenet64 --size L", 778), (multistep_cm, "imagenet128", 184),
    (multistep_cm, "imagenet128 --size L", 736)])
def test_the_siblings_presets_are_edm2s_network(script, flags, millions):
    """EDM2's own modulation, and the sizes that the presets name."""
    cfg = common.parse_args(script.Config, script.PRESETS, script.LOSSES, ["--dataset", *flags.split()])
    data = type("Data", (), dict(shape=(3, cfg.image_size, cfg.image_size), classes=1000))
    with torch.device("meta"):
        net = common.network(cfg, data, head=False)
    assert not cfg.double_norm
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.6)


def test_label_dropout_rate():
    """A tenth of the labels become -1, within four standard deviations of the binomial."""
    n = 20_000
    y = common.Draw(0, 0, 0, n).labels(torch.ones(n, dtype=torch.int64), scm.Config(conditional=True, label_dropout=0.1))
    assert abs((y == -1).double().mean() - 0.1) < 4 * (0.09 / n) ** 0.5 and set(y.tolist()) == {-1, 1}


def test_guidance_scale_is_an_input_that_starts_silent(nets):
    """At the start the student is the teacher, which knows no scale; with any gain the scale moves the output."""
    _, net = nets(classes=3, guidance=True)
    x, t, y = torch.randn(2, 3, 8, 8).double(), torch.tensor([0.4, 1.3]).double(), torch.tensor([0, 2])
    low, high = torch.ones(2).double(), torch.full((2,), 2.0).double()
    assert not torch.allclose(net(x, t, y, low), net(x, t, y, high))
    net.cond.guidance_gain.data.zero_()
    assert torch.equal(net(x, t, y, low), net(x, t, y, high)) and torch.equal(net(x, t, y, low), net(x, t, y))


@pytest.fixture
def vae():
    """Folder of a tiny AutoencoderKL: 16 x 16 pixels <-> 4 x 8 x 8 latents."""
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=[32, 32], down_block_types=["DownEncoderBlock2D"] * 2, norm_num_groups=8,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, sample_size=16).save_pretrained("vae")
    return "vae"


def encode(folder, *flags):
    common.encode_latents(["--src", str(folder), "--vae", "vae", "--image_size", "16", "--batch", "5", *flags])


def latents(data, **kw):
    return common.Latents(scm.Config(dataset="imagenet512", data=str(data), vae="vae", conditional=True, **kw))


def test_latents_are_the_autoencoders(folder, vae):
    """Mean and deviation in float16, of pixels in [-1, 1]; samples are normalized by the paper's numbers."""
    encode(folder, "--out", "latents")
    data, net = latents("latents"), diffusers.AutoencoderKL.from_pretrained("vae")
    names, labels, read = common.list_images(folder)
    x = torch.from_numpy(np.stack([common.decode(name, read, 16) for name in names])).float() / 127.5 - 1
    with torch.no_grad():
        posterior = net.encode(x).latent_dist
    found = data.rows(np.arange(24))
    assert torch.allclose(found[:, :4], posterior.mean, atol=1e-2) and torch.allclose(found[:, 4:], posterior.std, rtol=1e-2)
    assert data.shape == (4, 8, 8) and data.labels.tolist() == list(labels)
    gen = common.Draw(0, 0, 0, 64)
    x0, y = data.batch(gen)
    gen = common.Draw(0, 0, 0, 64)
    mean, std = data.rows(gen.index(24).numpy()).chunk(2, 1)
    z = mean + std * gen.normal(4, 8, 8)
    shift, scale = (torch.tensor(v).view(4, 1, 1) for v in ([1.56, -.695, .483, .729], [5.27, 5.91, 4.21, 4.31]))
    assert torch.allclose(x0, (z - shift) * 0.5 / scale, atol=1e-6) and len(y) == 64


def test_decoding_undoes_the_normalization(vae):
    """x0 -> latent -> pixels, for this repository's latents (pixels in [-1, 1]) and for EDM2's (in [0, 1])."""
    z, net = 3 * torch.randn(2, 4, 8, 8), diffusers.AutoencoderKL.from_pretrained("vae")
    with torch.no_grad():
        pixels = net.decode(z).sample
    for data, (low, high) in (("latents", (-1, 1)), ("latents.zip", (0, 1))):
        cfg = scm.Config(dataset="imagenet512", data=data, vae="vae")
        _, _, shift, scale = common.latent_space(cfg, "cpu")
        found = common.to_uint8((z - shift) * 0.5 / scale, cfg)
        expected = ((pixels - low) / (high - low) * 255).clamp(0, 255)
        assert (found - expected).abs().max() <= 1


def test_edm2s_zip_of_latents(vae):
    """float32 (8, h, w) .npy and dataset.json; normalized by EDM2's own numbers."""
    rows = np.random.default_rng(0).normal(size=(6, 8, 4, 4)).astype(np.float32)
    with zipfile.ZipFile("edm2.zip", "w") as archive:
        names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(6)]
        for name, row in zip(names, rows):
            buffer = io.BytesIO()
            np.save(buffer, row)
            archive.writestr(name, buffer.getvalue())
        archive.writestr("dataset.json", json.dumps(dict(labels=[[name, i % 3] for i, name in enumerate(names)])))
    data = latents("edm2.zip")
    assert np.array_equal(data.rows([4, 1]), rows[[4, 1]]) and data.classes == 3
    assert common.latent_space(data.cfg, "cpu")[2].flatten().tolist() == pytest.approx([5.81, 3.25, 0.12, -2.15])


@pytest.mark.parametrize("flags, word", [
    (("--batch", "-1"), "--batch"), (("--image_size", "0"), "--image_size"), (("--src", "nowhere"), "--src nowhere"),
    (("--out", "/proc/latents"), "/proc/latents")])
def test_encoding_refuses_bad_flags(folder, vae, flags, word, capsys):
    with pytest.raises(SystemExit) as error:
        encode(folder, "--out", "bad", *flags)
    assert error.value.code == 2 and word in capsys.readouterr().err and not Path("bad").exists()


def test_damaged_latents_are_refused(folder, vae, capsys):
    """Truncated; of a size that the network cannot halve; without the labels that it is to know."""
    encode(folder, "--out", "latents")
    whole = Path("latents/moments.npy").read_bytes()
    Path("latents/moments.npy").write_bytes(whole[:-100])
    with zipfile.ZipFile("plain.zip", "w") as archive:
        buffer = io.BytesIO()
        np.save(buffer, np.zeros((8, 4, 4), np.float32))
        archive.writestr("0.npy", buffer.getvalue())
    for data, word in (("latents", "damaged"), ("plain.zip", "labels")):
        with pytest.raises(SystemExit):
            latents(data)
        assert word in capsys.readouterr().err
    Path("latents/moments.npy").write_bytes(whole)
    with pytest.raises(SystemExit):
        latents("latents", channel_mult=(1,) * 6)
    assert "halved" in capsys.readouterr().err


def test_encoding_goes_on_after_a_kill(folder, vae, monkeypatch, capsys):
    """What is done is not done again, also with two processes; unfinished latents are not read."""
    encode(folder, "--out", "whole")
    decode, count = common.decode, []

    def dies(name, *rest):
        count.append(name)
        if len(count) == 13:
            raise KeyboardInterrupt
        return decode(name, *rest)
    monkeypatch.setattr(common, "decode", dies)
    with pytest.raises(KeyboardInterrupt):
        encode(folder, "--out", "parts")
    with pytest.raises(SystemExit):
        latents("parts")
    assert "or not all" in capsys.readouterr().err
    monkeypatch.setattr(common, "decode", decode)
    done = np.load("parts/done.npy")
    assert 0 < done.sum() < 24
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", common.__file__]
    flags = ["latents", "--src", str(folder), "--vae", "vae", "--image_size", "16", "--batch", "5", "--out", "parts"]
    subprocess.run([*command, *flags], check=True, capture_output=True)
    assert np.array_equal(np.load("parts/moments.npy"), np.load("whole/moments.npy"))
    with pytest.raises(SystemExit):
        encode(folder, "--out", "parts", "--image_size", "8")
    assert "begun from other" in capsys.readouterr().err


@pytest.mark.parametrize("arch", ["edm2", "ddpmpp"])
def test_checkpointing_changes_no_gradient(arch):
    """Also with dropout: the second pass draws the masks of the first."""
    net = common.build(dict(arch=arch, shape=(3, 8, 8), channels=8, blocks=1, attention=(4,), dropout=0.3)).double()
    x, t = torch.randn(2, 3, 8, 8).double(), torch.tensor([0.3, 1.2]).double()
    grads = []
    for net.checkpointing in (False, True):
        torch.manual_seed(0)
        net.zero_grad()
        net(x, t).square().sum().backward()
        grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads)) and len(grads[0]) == len(grads[1]) > 10


def test_compiled_passes_are_the_eager_ones():
    """--compile: one graph, and output and gradient of the eager network, dropout masks included."""
    net = common.build(dict(shape=(3, 8, 8), classes=3, channels=8, channel_mult=(1,), blocks=1, dropout=0.3))
    torch.nn.init.ones_(net.out_gain)
    x, t, y, gen = torch.randn(4, 3, 8, 8), torch.rand(4), torch.arange(4) - 1, common.Draw(0, 0, 0, 4)
    assert torch._dynamo.explain(net)(x, t, y).graph_break_count == 0
    torch._dynamo.reset()
    results = []
    for f in (net, common.Run.wrap(SimpleNamespace(cfg=SimpleNamespace(compile=True)), net)):
        net.zero_grad()
        gen.same_dropout()
        F = f(x, t, y)
        F.square().mean().backward()
        results.append([F.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
    for eager, compiled in zip(*results):
        assert torch.allclose(eager, compiled, atol=1e-5 * eager.abs().max())


def test_a_compiled_run_starts_as_the_eager_one(train, folder):
    """Loss and gradient norm of the first step."""
    flags = ["--dataset", "folder", "--data", folder, "--channels", 8, "--blocks", 1, "--batch", 8, "--steps", 1,
             "--log_every", 1, "--mode", "sct", "--dropout", 0.3, "--channel_mult", "1"]
    train(*flags, "--out", "a"), train(*flags, "--out", "b", "--compile")
    a, b = (json.loads(Path(out, "log.jsonl").read_text()) for out in "ab")
    assert [a[k] for k in ("loss", "mse", "grad_norm")] == pytest.approx([b[k] for k in ("loss", "mse", "grad_norm")], rel=1e-4)


def test_dry_run_allocates_nothing_and_checks(folder, capsys):
    """Parameters, FLOPs and memory are printed; no file is written; a missing teacher is found."""
    flags = ["--dataset", "folder", "--data", str(folder), "--dry_run"]
    scm.main([*flags, "--mode", "sct"])
    text = capsys.readouterr().out
    net = common.network(config(*flags[:4]), common.dataset(config(*flags[:4])))
    assert f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters" in text and "GFLOP" in text
    assert not Path("out").exists()
    with pytest.raises(SystemExit):
        scm.main([*flags, "--teacher", "nowhere"])
    assert "no checkpoint" in capsys.readouterr().err


def test_flops_of_a_linear_layer(capsys):
    """2 x inputs x outputs for the MLP's matrices, by hand."""
    scm.main(["--dry_run", "--channels", "32", "--blocks", "1"])
    n = 32
    by_hand = 2 * (2 * n + n * 2 * n + n * n + n * n + n * 2 + 64 * n + 128)  # in, modulate, inner, outer, out, time, head
    printed = float(capsys.readouterr().out.split("parameters; ")[1].split(" GFLOP")[0])
    assert printed * 1e9 == pytest.approx(by_hand, rel=0.1)


LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", scm.__file__]
TOY = ["--channels", "16", "--batch", "64", "--out", "toy"]


def test_resume_with_another_number_of_processes(train, capsys):
    """Goes on, to float tolerance as the unbroken run, and says that it is not bit for bit."""
    whole = train(*TOY[:-1], "whole", "--steps", 6)
    subprocess.run([*LAUNCH, *TOY, "--steps", "3"], check=True, capture_output=True)
    capsys.readouterr()
    found = train(*TOY, "--steps", 6, "--resume")
    assert "not bit for bit" in capsys.readouterr().out and found["step"] == 6
    worst = max((found["net"][k] - whole["net"][k]).abs().max() for k in whole["net"])
    assert worst < 1e-2  # the learning rate falls towards the last step, which the first three took for 3


def children(pid):
    return [int(word) for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_text().split()]


def test_a_dying_process_ends_the_job():
    """Killed from outside, one of two takes the other with it, and torchrun names the signal."""
    job = subprocess.Popen([*LAUNCH, *TOY, "--steps", "100000"], stderr=subprocess.PIPE, text=True)
    while not Path("toy/log.jsonl").exists() or not Path("toy/log.jsonl").stat().st_size:
        time.sleep(0.1)
    os.kill(children(job.pid)[-1], signal.SIGKILL)
    _, text = job.communicate(timeout=60)
    assert job.returncode and "SIGKILL" in text or "-9" in text


def finish(command, ready):
    """Run a command, kill all its processes once ready() says so, and run it to its end with --resume."""
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not ready() and job.poll() is None:
        time.sleep(0.02)
    if job.poll() is None:
        for pid in [job.pid, *children(job.pid)]:
            os.kill(pid, signal.SIGKILL)
        job.wait()
        again = command + ["--resume"] * any(word.endswith("scm.py") for word in command)
        done = subprocess.run(again, capture_output=True, text=True)
        assert not done.returncode, done.stderr[:1500]


def test_the_whole_path_at_tiny_size(folder, vae):
    """Pictures -> latents -> diffusion -> scd with guidance -> two-step samples -> pixels -> eval, as on ImageNet-512:
    two processes, bfloat16, accumulation, every stage killed once and resumed."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    root = Path(common.__file__).parent
    finish([*torchrun, str(root / "common.py"), "latents", "--src", str(folder), "--vae", "vae", "--out", "latents",
            "--image_size", "16", "--batch", "2"], Path("latents/about.json").exists)
    shared = [*torchrun, str(root / "scm.py"), "--dataset", "imagenet512", "--data", "latents", "--vae", "vae", "--dtype",
              "bf16", "--batch", "16", "--micro", "4", "--steps", "30", "--save_every", "2", "--log_every", "2"]
    small = ["--channels", "16", "--channel_mult", "1,2", "--blocks", "1", "--attention", "4"]

    def begun(run):
        return lambda: Path(run, "log.jsonl").exists() and Path(run, "log.jsonl").read_text().count("\n") > 2
    finish([*shared, *small, "--mode", "diffusion", "--out", "teacher"], begun("teacher"))
    finish([*shared, "--mode", "scd", "--teacher", "teacher", "--out", "student", "--warmup", "10"], begun("student"))
    student = common.read_checkpoint("student")
    assert student["step"] == 30 and student["options"]["guidance"] and student["options"]["shape"] == (4, 8, 8)
    lines = [json.loads(line) for line in Path("student/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(2, 31, 2)) and all(np.isfinite(v["loss"]) for v in lines)
    scm.main(["--sample", "6", "--nfe", "2", "--guidance", "1.5", "--out", "student", "--save", "x.npz"])
    found = np.load("x.npz")
    assert found["arr_0"].shape == (6, 16, 16, 3) and found["arr_1"].tolist() == [0, 1, 2] * 2
    command = [*torchrun, str(root / "eval.py"), "student", "--nfe", "2", "--samples", "12", "--reference", str(folder),
               "--image_size", "16"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "frechet_distance" in done.stdout, done.stderr[:1500]


def test_tangent_in_half_precision():
    """EDM's c_noise = log(sigma) / 4 has a derivative without bound at both ends: in float16 the plain JVP overflows
    there, the rearranged one of Sec. 5.1 stays finite over (0, pi/2); and so does c_noise = t."""
    ends = 10.0 ** torch.linspace(-4, -1, 7)
    t = torch.cat([ends, torch.tensor([0.5, 1.0, 1.4]), np.pi / 2 - ends.flip(0)]).double()
    x_t, v_t = 0.5 * torch.randn(2, len(t), 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for options in (dict(c_noise="log", emb="fourier", double_norm=False), dict(c_noise="t")):
        net = common.build(dict(shape=(3, 16, 16), channels=32, blocks=1, attention=(8,), dtype="fp16") | options)
        for name, p in net.named_parameters():
            p.data = torch.ones_like(p) if "gain" in name else p.data
        F, g = scm.tangent(net, x_t, t, None, None, v_t, 0, scm.Config(warmup=0), common.Draw(0, 0, 0, len(t)))
        _, plain = common.jvp(net, (x_t / 0.5, t), (v_t / 0.5, torch.ones_like(t)))
        assert F.isfinite().all() and g.isfinite().all()
        assert plain.isfinite().all() == (options["c_noise"] == "t")


@pytest.mark.parametrize("mode", ["diffusion", "sct"])
def test_half_precision_trains(train, folder, mode):
    """float16 torso, float32 weights: loss scaling leaves gradients that move the weights and stay finite."""
    ckpt = train("--dataset", "folder", "--data", folder, "--mode", mode, "--dtype", "fp16", "--steps", 3, "--batch", 8,
                 "--channels", 8, "--blocks", 1, "--out", "half")
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in ckpt["net"].values())
    assert ckpt["scaler"]["scale"] > 0 and json.loads(Path("half/log.jsonl").read_text().splitlines()[-1])["skipped"] < 3


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
    dtype = pickle.dumps(np.dtype("O"), 4)[:-1]
    return dict(system=touch, code=Command(eval, "open('touched', 'w')"), array=np.array([touch], dtype=object),
                nested=dict(ema=[(touch,)]), storage=Command(torch.storage._load_from_bytes, legacy.getvalue()),
                getattr=Command(getattr, Command(__import__, "os"), "system"),
                dtype=dtype + b"(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb.",  # flags cleared
                build=b"\x80\x04" + layer + b"N}" + text("x") + b"K\x01s\x86b.",
                bounds=pickle.dumps(torch.ones(2), 4).replace(b"K\x02\x85", b"K\x63\x85"))[kind]


@pytest.mark.parametrize("kind", ["system", "code", "array", "nested", "storage", "getattr", "build", "bounds"])
def test_hostile_pickles_run_nothing(kind, capsys):
    """Whatever they name is not called, and no class is changed: one line and exit code 2. (A touched file would
    betray a call; a tensor larger than its storage would read foreign memory.)"""
    content = hostile(kind)
    Path("x.pkl").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    with pytest.raises(SystemExit) as error:
        common.read_pickle("x.pkl")
    assert error.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not Path("touched").exists() and not hasattr(common.Record, "x")


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
