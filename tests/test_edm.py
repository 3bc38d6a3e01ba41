"""kit/edm.py: snapshots in the published layout, read without their code, give their denoiser; hostile ones
run nothing."""
import kit
import scm
import sct
from conftest import fails, one_line
from kit.reference import load_reference

import contextlib
import io
import math
import os
import pickle
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as tnf

KINDS = ["system", "code", "array", "nested", "storage", "getattr", "build", "bounds", "stride",
         "fid"]


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
        fid=dict(fid=touch), dtype=pickle.dumps(np.dtype("O"), 4)[:-1] + flags,
        build=b"\x80\x04" + layer + b"N}" + text("x") + b"K\x01s\x86b.",
        bounds=pickle.dumps(torch.ones(2), 4).replace(b"K\x02\x85", b"K\x63\x85"),
        stride=torch.ones(1).expand(2**20, 2**20))[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_pickles_run_nothing(kind, capsys):
    """As a network, and as eval.py's --reference: whatever they name is not called, and no class is changed;
    one line and exit code 2. A touched file would betray a call; a tensor larger than its storage would read
    foreign memory, or fill ours."""
    content = hostile(kind)
    Path("x.pkl").write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    assert "x.pkl" in fails(capsys, kit.edm.read_edm, "x.pkl")
    args = types.SimpleNamespace(reference="x.pkl", features="inception")
    assert "x.pkl" in fails(capsys, load_reference, args, None, None)
    with contextlib.suppress(SystemExit):  # what names a function alone is read, as something inert
        assert not callable(kit.edm.read_pickle("x.pkl"))
    assert not Path("touched").exists() and not hasattr(kit.edm.Record, "x")


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
        content = kit.edm.read_pickle("x.pkl")
        with pytest.raises(ValueError):
            kit.edm.module_tensors(content["ema"])
        content["ema"].class_name, content["ema"].state["_init_kwargs"] = "Precond", {}
        monkeypatch.setattr(kit.edm, "read_pickle", lambda path: content)
        assert "x.pkl" in fails(capsys, kit.edm.read_edm, "x.pkl")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_raw_bytes_are_never_pointers():
    """NumPy's dtype of objects with its flags cleared is a Record here, and no array can be made of it."""
    Path("x.pkl").write_bytes(hostile("dtype"))
    with pytest.raises(pickle.UnpicklingError):
        kit.edm.number_type(kit.edm.read_pickle("x.pkl"))


def test_harmless_pickles_load():
    """Tensors, half-precision parameters and arrays in every protocol; classes as Records."""
    x = dict(a=np.arange(6.0).reshape(2, 3), t=torch.arange(6.0).view(2, 3)[:, 1:],
             p=torch.nn.Parameter(torch.randn(3).half()), s=np.float64(2.5), net=torch.nn.Linear(2, 2))
    for protocol in (2, 4, 5):
        with open("x.pkl", "wb") as file:
            pickle.dump(x, file, protocol)
        found = kit.edm.read_pickle("x.pkl")
        assert np.array_equal(found["a"], x["a"]) and torch.equal(found["t"], x["t"]) and found["s"] == 2.5
        assert torch.equal(found["p"], x["p"].data) and isinstance(found["net"], kit.edm.Record)
        assert torch.equal(found["net"].state["_parameters"]["weight"], x["net"].weight.data)


# ---- EDM2's network, from the paper's formulas (Karras et al. 2024, App. A and B), with its own names
def normalize(x, dims):
    norm = x.square().sum(dims, keepdim=True).sqrt()
    return x / (1e-4 + norm * math.sqrt(norm.numel() / x.numel()))


def mp_sum(a, b, t):
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)


def mp_silu(x):
    return tnf.silu(x) / 0.596


class Conv(torch.nn.Module):
    def __init__(self, cin, cout, *kernel):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(cout, cin, *kernel))

    def forward(self, x, gain=1):
        w = normalize(self.weight, list(range(1, self.weight.ndim)))
        w = w * gain / math.sqrt(self.weight[0].numel())
        return x @ w.t() if w.ndim == 2 else tnf.conv2d(x, w, padding=w.shape[-1] // 2)


class Fourier(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, x):
        return math.sqrt(2) * torch.cos(x[:, None] * self.freqs + self.phases)


class Block(torch.nn.Module):
    def __init__(self, cin, cout, emb, flavor, resample="keep", attention=False):
        super().__init__()
        self.flavor, self.resample, self.heads = flavor, resample, max(cout // 64, 1)
        self.emb_gain = torch.nn.Parameter(torch.tensor(0.7))
        self.conv_res0 = Conv(cout if flavor == "enc" else cin, cout, 3, 3)
        self.emb_linear = Conv(emb, cout)
        self.conv_res1 = Conv(cout, cout, 3, 3)
        self.conv_skip = Conv(cin, cout, 1, 1) if cin != cout else None
        self.attn_qkv = Conv(cout, 3 * cout, 1, 1) if attention else None
        self.attn_proj = Conv(cout, cout, 1, 1) if attention else None

    def forward(self, x, emb):
        x = tnf.avg_pool2d(x, 2) if self.resample == "down" else x
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3) if self.resample == "up" else x
        if self.flavor == "enc":
            x = normalize(self.conv_skip(x) if self.conv_skip else x, 1)
        y = self.conv_res0(mp_silu(x))
        y = mp_silu(y * (self.emb_linear(emb, self.emb_gain) + 1)[:, :, None, None])
        y = self.conv_res1(y)
        if self.flavor == "dec" and self.conv_skip:
            x = self.conv_skip(x)
        x = mp_sum(x, y, 0.3)
        if self.attn_qkv:
            y = self.attn_qkv(x).reshape(len(x), self.heads, -1, 3, x.shape[2] * x.shape[3])
            q, k, v = normalize(y, 2).unbind(3)
            w = torch.einsum("nhcq,nhck->nhqk", q, k / math.sqrt(q.shape[2])).softmax(3)
            x = mp_sum(x, self.attn_proj(torch.einsum("nhqk,nhck->nhcq", w, v).reshape(x.shape)), 0.3)
        return x.clamp(-256, 256)


class UNet(torch.nn.Module):
    def __init__(self, res, channels, label_dim, model_channels, channel_mult, num_blocks, attn):
        super().__init__()
        widths, emb = [model_channels * m for m in channel_mult], model_channels * max(channel_mult)
        self.label_dim = label_dim
        self.out_gain = torch.nn.Parameter(torch.tensor(0.9))
        self.emb_fourier, self.emb_noise = Fourier(widths[0]), Conv(widths[0], emb)
        self.emb_label = Conv(label_dim, emb) if label_dim else None
        self.enc, cout, skips = torch.nn.ModuleDict(), channels + 1, []
        for level, width in enumerate(widths):
            r = res >> level
            if level == 0:
                self.enc[f"{r}x{r}_conv"] = Conv(cout, width, 3, 3)
                cout = width
            else:
                self.enc[f"{r}x{r}_down"] = Block(cout, cout, emb, "enc", "down")
            skips.append(cout)
            for i in range(num_blocks):
                self.enc[f"{r}x{r}_block{i}"] = Block(cout, width, emb, "enc", attention=r in attn)
                cout = width
                skips.append(cout)
        self.dec = torch.nn.ModuleDict()
        for level, width in reversed(list(enumerate(widths))):
            r = res >> level
            if level == len(widths) - 1:
                self.dec[f"{r}x{r}_in0"] = Block(cout, cout, emb, "dec", attention=True)
                self.dec[f"{r}x{r}_in1"] = Block(cout, cout, emb, "dec")
            else:
                self.dec[f"{r}x{r}_up"] = Block(cout, cout, emb, "dec", "up")
            for i in range(num_blocks + 1):
                cin = cout + skips.pop()
                self.dec[f"{r}x{r}_block{i}"] = Block(cin, width, emb, "dec", attention=r in attn)
                cout = width
        self.out_conv = Conv(cout, channels, 3, 3)

    def forward(self, x, c_noise, labels):
        emb = self.emb_noise(self.emb_fourier(c_noise))
        if self.emb_label:
            emb = mp_sum(emb, self.emb_label(labels * math.sqrt(self.label_dim)), 0.5)
        emb = mp_silu(emb)
        x, skips = torch.cat([x, torch.ones_like(x[:, :1])], 1), []
        for name, block in self.enc.items():
            x = block(x) if "conv" in name else block(x, emb)
            skips.append(x)
        for name, block in self.dec.items():
            if "block" in name:
                y = skips.pop()
                na, nb = x.shape[1], y.shape[1]
                scale = math.sqrt((na + nb) / 0.5)
                x = torch.cat([x * scale * 0.5 / math.sqrt(na), y * scale * 0.5 / math.sqrt(nb)], 1)
            x = block(x, emb)
        return self.out_conv(x, self.out_gain)


class Precond(torch.nn.Module):
    def __init__(self, img_resolution, img_channels, label_dim, sigma_data=0.5, **kw):
        super().__init__()
        self._init_args = ()
        self._init_kwargs = kw | dict(img_resolution=img_resolution, img_channels=img_channels,
                                      label_dim=label_dim)
        self.sigma_data = sigma_data
        self.unet = UNet(img_resolution, img_channels, label_dim, kw["model_channels"], kw["channel_mult"],
                         kw["num_blocks"], kw["attn_resolutions"])
        self.logvar_fourier, self.logvar_linear = Fourier(128), Conv(128, 1)

    def forward(self, x, sigma, labels):
        s, sd = sigma[:, None, None, None], self.sigma_data
        F = self.unet(x / (sd**2 + s**2).sqrt(), sigma.log() / 4, labels)
        return sd**2 / (s**2 + sd**2) * x + s * sd / (s**2 + sd**2).sqrt() * F


# ---- EDM's DDPM++ (Song et al. 2021; EDM, App. F): formulas written out, parameters by EDM's names
def ddpmpp_block(P, x, emb, resample=""):
    def conv(name, x):
        weight = P[name + ".weight"]
        return tnf.conv2d(x, weight, P[name + ".bias"], padding=weight.shape[-1] // 2)

    def norm(name, x):
        b, c, h, w = x.shape
        x = x.reshape(b, min(32, c // 4), -1)
        x = (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True, unbiased=False) + 1e-6).sqrt()
        x = x.reshape(b, c, h, w)
        return x * P[name + ".weight"].view(-1, 1, 1) + P[name + ".bias"].view(-1, 1, 1)

    def scale(x):
        b, c, h, w = x.shape
        if resample == "down":
            return x.reshape(b, c, h // 2, 2, w // 2, 2).mean((3, 5))
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3) if resample == "up" else x
    y = conv("conv0", scale(tnf.silu(norm("norm0", x))))
    y = y + (emb @ P["affine.weight"].T + P["affine.bias"])[:, :, None, None]
    y = conv("conv1", tnf.silu(norm("norm1", y)))
    x = (y + (conv("skip", scale(x)) if "skip.weight" in P else x)) / math.sqrt(2)
    if "qkv.weight" in P:
        q, k, v = conv("qkv", norm("norm2", x)).reshape(len(x), x.shape[1], 3, -1).unbind(2)
        w = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(x.shape[1])).softmax(2)
        x = (x + conv("proj", torch.einsum("nqk,nck->ncq", w, v).reshape(x.shape))) / math.sqrt(2)
    return x


def ddpmpp_denoiser(P, x, sigma, onehot, sd=0.5):
    """D(x; sigma) from a flat dict of EDM's names, in the order of its enc and dec."""
    s = sigma[:, None, None, None]
    freqs = (1 / 10000) ** (torch.arange(8).double() / 7)
    angle = (sigma.log() / 4)[:, None] * freqs
    emb = torch.cat([angle.sin(), angle.cos()], 1)
    emb = emb + (onehot * 2) @ P["map_label.weight"].T + P["map_label.bias"]
    for layer in ("map_layer0", "map_layer1"):
        emb = tnf.silu(emb @ P[layer + ".weight"].T + P[layer + ".bias"])
    blocks = {}
    for name, value in P.items():
        if name[:4] in ("enc.", "dec."):
            part, block, rest = name.split(".", 2)
            blocks.setdefault((part, block), {})[rest] = value
    h, skips = x / (s**2 + sd**2).sqrt(), []
    for (part, name), own in blocks.items():
        if "aux" in name:
            continue
        if name.endswith("conv"):
            h = tnf.conv2d(h, own["weight"], own["bias"], padding=1)
        else:
            h = torch.cat([h, skips.pop()], 1) if part == "dec" and "block" in name else h
            h = ddpmpp_block(own, h, emb, {"down": "down", "up": "up"}.get(name.split("_")[1], ""))
        if part == "enc":
            skips.append(h)
    g, c = blocks["dec", "8x8_aux_norm"], blocks["dec", "8x8_aux_conv"]
    h = tnf.group_norm(h, min(32, h.shape[1] // 4), g["weight"], g["bias"], 1e-6)
    F = tnf.conv2d(tnf.silu(h), c["weight"], c["bias"], padding=1)
    return sd**2 / (s**2 + sd**2) * x + s * sd / (s**2 + sd**2).sqrt() * F


def alarm(meta):
    raise AssertionError("code from the snapshot was called")


def snapshot(net, path, extra=None):
    """The layout of EDM2's files: every object of its own classes goes through torch_utils.persistence."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    alarm.__module__, alarm.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    persistence._reconstruct_persistent_obj = alarm
    util.EasyDict = type("EasyDict", (dict,), dict(__module__="dnnlib.util"))

    class Pickler(pickle.Pickler):
        def reducer_override(self, obj):
            if type(obj).__module__ != __name__:
                return NotImplemented
            meta = util.EasyDict(type="class", version=6, module_src="raise SystemError",
                                 class_name=type(obj).__name__, state=obj.__dict__)
            return alarm, (meta,)
    fakes = {"torch_utils": types.ModuleType("torch_utils"), "torch_utils.persistence": persistence,
             "dnnlib": types.ModuleType("dnnlib"), "dnnlib.util": util}
    sys.modules.update(fakes)
    try:
        with open(path, "wb") as file:
            Pickler(file).dump(util.EasyDict(dict(ema=net) | (extra or {})))
    finally:
        for name in fakes:
            del sys.modules[name]


def denoiser(net, x, sigma, y):
    """D(x; sigma) from F in TrigFlow's coordinates (common.py)."""
    t = torch.atan(sigma / 0.5)
    cos, sin = (v[:, None, None, None] for v in (t.cos(), t.sin()))
    return cos * (cos * x) - sin * 0.5 * net(cos * x / 0.5, t, y)


SMALL = dict(img_resolution=8, img_channels=3, label_dim=4, model_channels=16, channel_mult=[1, 2],
             num_blocks=2, attn_resolutions=[4])


@pytest.fixture
def edm2():
    """A small network of EDM2's layout, and the folder's snapshot of it."""
    torch.manual_seed(0)
    net = Precond(**SMALL)
    snapshot(net, "edm2-tiny.pkl", dict(dataset_kwargs=dict(class_name="training.dataset")))
    return net


def test_edm2s_snapshot_is_the_same_denoiser(edm2):
    """D(x; sigma) over EDM's noise levels, with and without labels, to float tolerance; in half, too."""
    net = kit.load_net("edm2-tiny.pkl").double()
    sigma = torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0]).double()
    x = sigma[:, None, None, None] * torch.randn(5, 3, 8, 8).double() + 0.5 * torch.randn(5, 3, 8, 8).double()
    y = torch.tensor([0, 1, 2, 3, 0])
    with torch.no_grad():
        expected = edm2.double()(x, sigma, tnf.one_hot(y, 4).double())
        assert torch.allclose(denoiser(net, x, sigma, y), expected, atol=1e-6, rtol=1e-6)
        no_label = edm2(x, sigma, torch.zeros(5, 4).double())
        assert torch.allclose(denoiser(net, x, sigma, None), no_label, atol=1e-6, rtol=1e-6)
    snapshot(edm2.half(), "half.pkl")
    rounded = kit.load_net("half.pkl").double()
    assert (denoiser(rounded, x, sigma, y) - expected).abs().max() < 0.05 * expected.abs().max()


class EDMPrecond(torch.nn.Module):
    """Only the tree of EDM's parameters: it holds `model`, whose blocks have EDM's names and sizes."""


class ECMPrecond(EDMPrecond):
    """The same by ECT's code."""


class ECMLoss:
    """As in ECT's snapshots: a plain object, which holds a method of its own."""
    __module__ = "training.loss"

    def __init__(self):
        self.t_to_r = self.sigmoid

    def sigmoid(self, t):
        return t


def ddpmpp_tree(kind):
    """A small DDPM++ of a kind of preconditioning, with random weights, and these by their names."""
    ours = kit.networks.build(dict(arch="ddpmpp", shape=(3, 8, 8), classes=4, channels=16,
                                   channel_mult=(1, 2), blocks=2, attention=(4,), double_norm=False,
                                   head=False))
    top, P = kind(), {}
    top._init_kwargs = dict(img_resolution=8, img_channels=3, label_dim=4, model_type="SongUNet",
                            model_channels=16, channel_mult=[1, 2], num_blocks=2, attn_resolutions=[4],
                            augment_dim=9)
    for name, value in ours.state_dict().items():
        name = name.replace("embedding.", "").replace("out_", "dec.8x8_aux_")
        P[name] = 0.2 * torch.randn(value.shape) + ("norm" in name)
    P |= {"map_augment.weight": torch.randn(16, 9), "dec.8x8_up.skip.resample_filter": torch.ones(1, 1, 2, 2)}
    for name, value in P.items():
        node = top
        for part in ["model", *name.split(".")[:-1]]:
            if part not in node._modules:
                node.add_module(part, EDMPrecond())
            node = node._modules[part]
        node.register_parameter(name.split(".")[-1], torch.nn.Parameter(value))
    return top, P


def test_ects_snapshot_is_a_consistency_model(monkeypatch):
    """As ECT writes it: ECMPrecond, and a loss_fn that names functions, which are never called. It tunes, and
    it samples with ECT's shift."""
    torch.manual_seed(0)
    top, P = ddpmpp_tree(ECMPrecond)
    monkeypatch.setitem(sys.modules, "training", types.ModuleType("training"))
    monkeypatch.setitem(sys.modules, "training.loss", types.SimpleNamespace(ECMLoss=ECMLoss))
    snapshot(top, "ecm.pkl", dict(loss_fn=ECMLoss(), augment_pipe=None))
    monkeypatch.delitem(sys.modules, "training.loss")
    raw = Path("ecm.pkl").read_bytes()
    assert b"getattr" in raw and b"ECMLoss" in raw
    net, z = kit.load_net("ecm.pkl").double(), torch.randn(2, 3, 8, 8)
    cfg = kit.parse_args(sct.Config, sct.PRESETS, sct.LOSSES, ["--sample", "2", "--out", "ecm.pkl"])
    assert cfg.sigma_shift == 0.003 and cfg.mode == "ect" and cfg.conditional
    y = torch.tensor([1, 3])
    with torch.no_grad():
        x, sigma = sct.sample(net, 0.5 * z.double(), y, 1, cfg, None), torch.full((2,), 80.0).double()
        D = ddpmpp_denoiser({k: v.double() for k, v in P.items()}, 80 * z.double(), sigma,
                            tnf.one_hot(y, 4).double())
    assert torch.allclose(x, D, atol=1e-3) and not torch.allclose(x, D, atol=1e-7)  # but for the shift
    sct.main(["--sample", "2", "--nfe", "2", "--out", "ecm.pkl", "--save", "x.png"])
    assert Path("x.png").exists()


def test_edms_ddpmpp_snapshot_is_the_same_denoiser(train, folder):
    """EDM's CIFAR-10 networks as published, to float tolerance; and it starts and teaches a student."""
    torch.manual_seed(0)
    top, P = ddpmpp_tree(EDMPrecond)
    snapshot(top, "edm.pkl")
    net, sigma = kit.load_net("edm.pkl").double(), torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0]).double()
    x = (sigma + 0.5)[:, None, None, None] * torch.randn(5, 3, 8, 8).double()
    y = torch.tensor([0, 1, 2, 3, -1])
    onehot = tnf.one_hot(y.clamp(min=0), 4).double() * (y >= 0)[:, None]
    with torch.no_grad():
        expected = ddpmpp_denoiser({k: v.double() for k, v in P.items()}, x, sigma, onehot)
        assert torch.allclose(denoiser(net, x, sigma, y), expected, atol=1e-6, rtol=1e-6)
    (folder / "d").mkdir()
    (folder / "a" / "0.png").rename(folder / "d" / "0.png")
    for mode, dtype in (("scd", "fp32"), ("sct", "bf16")):
        ckpt = train("--dataset", "folder", "--data", folder, "--batch", 8, "--steps", 2, "--mode", mode,
                     "--teacher", "edm.pkl", "--dropout", 0.1, "--dtype", dtype, "--out", mode)
        assert ckpt["options"]["arch"] == "ddpmpp" and ckpt["options"]["channel_mult"] == (1, 2)


def test_edm2s_snapshot_teaches(edm2, train, folder):
    """As --teacher it hands on its architecture; as --init, what has another form in TrigFlow starts anew."""
    flags = ["--dataset", "folder", "--data", folder, "--batch", 8, "--steps", 2, "--label_dropout", 0]
    with pytest.raises(SystemExit):  # the pictures have three classes, the network four
        train(*flags, "--mode", "scd", "--teacher", "edm2-tiny.pkl")
    (folder / "d").mkdir()
    (folder / "a" / "0.png").rename(folder / "d" / "0.png")
    student = train(*flags, "--mode", "scd", "--teacher", "edm2-tiny.pkl", "--out", "student")
    assert student["options"]["emb"] == "fourier" and student["options"]["channels"] == 16
    tuned = train(*flags, "--mode", "diffusion", "--init", "edm2-tiny.pkl", "--emb", "positional",
                  "--c_noise", "t", "--double_norm", "true", "--norm_shift", "false", "--lr", "0",
                  "--out", "tuned")
    name = "enc.8x8_block0.conv_res0.weight"
    kept = kit.networks.pnorm(kit.edm.read_edm("edm2-tiny.pkl")["net"][name], (1, 2, 3))
    assert torch.allclose(tuned["net"][name], kept, atol=1e-3)
    train(*flags, "--mode", "scd", "--teacher", "tuned", "--out", "scd")


def test_foreign_pickles_are_refused_in_one_line(capsys):
    """No snapshot, an unknown network, or no pickle."""
    for value in (dict(a=1), dict(ema=torch.nn.Linear(2, 2)), [1, 2]):
        Path("x.pkl").write_bytes(pickle.dumps(value))
        assert "x.pkl is no snapshot" in fails(capsys, kit.load_net, "x.pkl")
    odd = Precond(**SMALL)
    odd._init_kwargs["res_balance"] = 0.4
    snapshot(odd, "odd.pkl")
    assert "res_balance 0.4" in fails(capsys, kit.load_net, "odd.pkl")
    Path("x.pkl").write_bytes(b"\x80\x04 nothing")
    assert "cannot read x.pkl" in fails(capsys, scm.main, ["--mode", "scd", "--teacher", "x.pkl"])


def test_edm2s_network_is_finetuned_in_one_flag(folder, vae, train):
    """From images and a snapshot for latents to a TrigFlow teacher and its student: latents in EDM2's space,
    sizes and weights of the snapshot, the preset's form of the network, label dropout and length."""
    torch.manual_seed(0)
    snapshot(Precond(**SMALL | dict(img_channels=4, label_dim=3)), "edm2-img512-tiny.pkl", {})
    flags = ["--dataset", "imagenet512", "--vae", vae, "--image_size", 16, "--dtype", "fp32", "--batch", 8]
    words = [str(w) for w in [*flags, "--mode", "diffusion", "--init", "edm2-img512-tiny.pkl"]]
    cfg = kit.parse_args(scm.Config, scm.PRESETS, scm.LOSSES, words)
    preset = kit.config.preset(scm.PRESETS, "imagenet512", "diffusion")
    form = ("c_noise", "emb", "double_norm", "norm_shift", "label_dropout")
    assert all(getattr(cfg, name) == preset[name] for name in form) and cfg.steps == 20_000
    assert (cfg.channels, cfg.attention, cfg.space) == (SMALL["model_channels"], (4,), "edm2")
    tuned = train(*words, "--data", folder, "--steps", 1, "--lr", 0)
    name = "enc.8x8_block0.conv_res0.weight"
    kept = kit.networks.pnorm(kit.edm.read_edm("edm2-img512-tiny.pkl")["net"][name], (1, 2, 3))
    assert torch.allclose(tuned["net"][name], kept, atol=1e-3)
    assert tuned["options"]["c_noise"] == "t" and tuned["config"]["space"] == "edm2"
    student = train(*flags, "--steps", 1)
    assert student["config"]["teacher"] == "out/scm-imagenet512-diffusion"
    assert student["config"]["space"] == "edm2" and Path("data/imagenet512-edm2").exists()


def test_edm2s_network_is_refused_on_other_latents(folder, vae, capsys):
    """A snapshot of EDM2 and latents of pixels in [-1, 1] do not go together; the line says what does."""
    snapshot(Precond(**SMALL | dict(img_channels=4, label_dim=3)), "edm2-img512-tiny.pkl", {})
    words = f"--dataset imagenet512 --vae {vae} --image_size 16 --dtype fp32 --batch 8".split()
    kit.dataset(scm.Config(dataset="imagenet512", data=str(folder), vae=vae, image_size=16))
    for flags in (["--teacher"], ["--mode", "sct", "--init"]):
        flags = ["--guidance_max", "1", *flags, "edm2-img512-tiny.pkl"]
        line = one_line(capsys, scm.main, *words, "--data", "data/imagenet512", *flags)
        assert "signed" in line and "edm2" in line and "--data IMAGES" in line
        line = one_line(capsys, scm.main, *words, *flags)
        assert "data/imagenet512-edm2" in line and "--data" in line
