"""What the five scripts share: config, data, networks, schedules and solvers, JVP, and the run's mechanics.

One convention for every network and every teacher, TrigFlow's (sCM, Sec. 3):

    F = net(x, t, y)     x = x_t / sigma_d  (B, ...)   unit variance
                         t                  (B,)       angle in radians, 0 = data, pi/2 = noise
                         y                  (B,)       int64 class labels, -1 = no label; or None
    x_t = cos(t) x_0 + sin(t) z,  z ~ N(0, sigma_d^2 I)       F predicts (cos(t) z - sin(t) x_0) / sigma_d

The other processes are the same curve in other coordinates (`to_trigflow`), so a teacher is anything with
this signature: a checkpoint of ours, or the exact one of a `Mixture` of Gaussians.
"""
import argparse
import contextlib
import csv
import datetime
import dataclasses
import functools
import hashlib
import inspect
import io
import json
import math
import os
import pickle
import re
import sys
import tarfile
import time
import typing
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as tnf
import torch.utils.checkpoint
from torch.autograd import forward_ad
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm import tqdm

torch.backends.cudnn.allow_tf32 = False  # tangents and differences of neighbours need float32's digits
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)  # of --dtype
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


def fail(message):
    """End the program with one line on stderr and exit code 2: for every error that a user can cause."""
    if RANK == 0 or dist.is_initialized():  # before the process group exists all ranks find the same error
        tqdm.write(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def interrupted(kind, error, trace):
    if kind is not KeyboardInterrupt:
        return sys.__excepthook__(kind, error, trace)
    tqdm.write("stopped; --resume goes on from the last checkpoint", file=sys.stderr)


sys.excepthook = interrupted  # Ctrl-C ends in one line


# ----------------------------------------------------------------------------------------------- 1. config

NET_FIELDS = ("image_size", "conditional", "arch", "channels", "channel_mult", "blocks", "attention", "emb",
              "emb_scale", "c_noise", "double_norm", "norm_shift", "sigma_d")
FIXED = ("dataset", "mode", "label_dropout", "phases", "student_steps", "pd_start", *NET_FIELDS)  # of a run
ONE_CALL = ("resume", "overwrite", "dry_run", "sample", "nfe", "label", "save")  # a run forgets these
AT_LEAST_1 = ("steps", "batch", "nfe", "log_every", "save_every", "sample_every", "channels", "blocks",
              "intervals", "patch", "scales", "scales_start", "d", "phases", "student_steps", "pd_start")


def parse_args(Config, presets, modes, argv=None):
    """Command line -> Config. Later wins: defaults; presets[dataset], [dataset, size], [dataset, mode] and
    [dataset, size, mode]; the network of --init or --teacher; the stored run (--resume, --sample); flags.
    Ends the program on anything unknown."""
    fields = {f.name: f for f in dataclasses.fields(Config)}
    comment = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    script = Path(inspect.getfile(Config)).stem
    parser = argparse.ArgumentParser(script + ".py", argument_default=argparse.SUPPRESS, allow_abbrev=False,
                                     description="modes: " + ", ".join(modes))
    parser.error, read = fail, {bool: boolean, tuple: numbers}
    for name, field in fields.items():
        default = ",".join(map(str, field.default)) if field.type is tuple else field.default
        choices = typing.get_args(field.type) or None
        parser.add_argument("--" + name, choices=choices, metavar=name.upper(),
                            help=f"{comment[name]} [{default}]".replace("%", "%%"),
                            type=str if choices else read.get(field.type, field.type),
                            **(dict(nargs="?", const=True) if field.type is bool else {}))
    flags, unknown = parser.parse_known_args(argv)
    flags = vars(flags)
    if unknown:
        fail(f"unknown argument {unknown[0]}; the flags are --{', --'.join(fields)}")
    flags["out"] = flags.get("out") or f"out/{script}"

    stored = {}
    if any(flags.get(name) for name in ("resume", "sample", "edit", "search")):
        ckpt = read_checkpoint(flags["out"])
        if ckpt["script"] != script:
            fail(f"{flags['out']} was written by {ckpt['script']}.py: run that script with it")
        stored = {k: v for k, v in ckpt["config"].items() if k in fields and k not in ONE_CALL}
        for name in FIXED:
            if name in flags and flags[name] != stored.get(name, flags[name]):
                fail(f"{flags['out']} was trained with --{name} {stored[name]}: that cannot change")
    choice = {name: (stored | flags).get(name, fields[name].default) for name in ("dataset", "mode", "size")}
    sizes = {k[1]: 1 for k in presets if type(k) is tuple and k[0] == choice["dataset"] and k[1] not in modes}
    for name, valid in (("dataset", [d for d in presets if isinstance(d, str)]), ("mode", list(modes)),
                        ("size", ["", *sizes])):
        if choice[name] not in valid:
            known = ", ".join(filter(None, valid)) or "the default"
            fail(f"unknown {name} {choice[name]!r}; the {name}s are {known}")
    data, size, mode = choice["dataset"], choice["size"] or "S", choice["mode"]
    keys = (data, (data, size), (data, mode), (data, size, mode))
    values = {k: v for key in keys for k, v in presets.get(key, {}).items()}
    source = init_path(values | flags)
    if source and not stored:
        values |= {k: v for k, v in read_checkpoint(source)["config"].items() if k in NET_FIELDS}
    cfg = Config(**{k: v for k, v in (values | stored | flags).items() if k in fields})
    check_ranges(cfg, fields)
    return cfg


def check_ranges(cfg, fields):
    """Ends the program on values that no run can use."""
    for name, field in fields.items():
        value, least = getattr(cfg, name), int(name in AT_LEAST_1)
        if field.type in (int, float) and name not in ("P_mean", "label") and not least <= value < math.inf:
            fail(f"--{name} must be at least {least}, not {value}")
    for name, most in (("dropout", 0.99), ("label_dropout", 1), ("lr_cooldown", 1), ("ema_sigma_rel", 0.28),
                       ("beta2", 0.99999), ("seed", 2**63 - 1)):
        if getattr(cfg, name) > most:
            fail(f"--{name} must be at most {most}, not {getattr(cfg, name)}")
    whole = cfg.channel_mult and all(type(m) is int and m > 0 for m in cfg.channel_mult)
    if cfg.channels % 2 or not (whole and cfg.sigma_d and (cfg.ema_sigma_rel or cfg.ema_halflife)):
        fail("--channels must be even, --channel_mult whole numbers, --sigma_d and one of --ema_* above 0")
    if cfg.batch % (WORLD * (cfg.micro or 1)):
        fail(f"--batch {cfg.batch} must be a multiple of processes x --micro, {WORLD} x {cfg.micro or 1}")
    if cfg.save and Path(cfg.save).suffix not in (".png", ".npz"):
        fail(f"--save takes a .png or a .npz file, not {cfg.save}")


def boolean(text):
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return text.lower() in ("true", "1", "yes")


def numbers(text):
    return tuple(int(part) if part.isdigit() else float(part) for part in text.split(",") if part)


def init_path(values):
    """The run that the network starts from: --init, else a teacher that is a run ('' if neither)."""
    path = values.get("init") or values.get("teacher") or ""
    return "" if path in ("none", "exact") or is_diffusers(path) else path


# ------------------------------------------------------------------------------------------------- 2. data

class Draw:
    """Random numbers as a function of (seed, step, position in the global batch).

    Rows lo..hi come from blocks of 64 positions with a generator each, so a resumed run, another number of
    processes or another micro-batch size sees the numbers that the unbroken single process would. (Dropout
    masks alone depend on the micro-batch as a whole.)
    """
    BLOCK = 64

    def __init__(self, seed, step, lo, hi, device="cpu"):
        first, last = lo // self.BLOCK, (hi - 1) // self.BLOCK
        self.rows = slice(lo - first * self.BLOCK, hi - first * self.BLOCK)
        self.device, self.dropout_seed = device, self._mix(seed, step, lo, 1)
        self.generators = [torch.Generator(device).manual_seed(self._mix(seed, step, block, 0))
                           for block in range(first, last + 1)]

    @staticmethod
    def _mix(*numbers):
        return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)

    def _draw(self, function, *shape, **kw):
        rows = [function(*shape, generator=g, device=self.device, **kw) for g in self.generators]
        return torch.cat(rows)[self.rows]

    def normal(self, *shape, dtype=torch.float32):
        """Standard normal, (B, *shape)."""
        return self._draw(torch.randn, self.BLOCK, *shape, dtype=dtype)

    def uniform(self):
        """Uniform on [0, 1), (B,) float64."""
        return self._draw(torch.rand, self.BLOCK, dtype=torch.float64)

    def index(self, high):
        """Integers in 0..high-1, (B,) int64."""
        return self._draw(torch.randint, high, (self.BLOCK,))

    def labels(self, y, cfg):
        """Labels as cfg wants them: None unless conditional, each dropped to -1 with label_dropout."""
        return torch.where(self.uniform() < cfg.label_dropout, -1, y) if cfg.conditional else None

    def same_dropout(self):
        """Call before each pass that must use this step's dropout masks."""
        torch.manual_seed(self.dropout_seed)


def dataset(cfg, device="cpu"):
    """The dataset that cfg names: an object with shape, classes and batch(gen)."""
    if cfg.dataset in ("gmm", "modes"):
        return dict(gmm=ring, modes=modes)[cfg.dataset](cfg).to(device)
    if cfg.dataset == "imagenet512":
        return Latents(cfg)
    reader = {"shapes": draw_shapes, "cifar10": read_cifar10}.get(cfg.dataset, read_folder)
    return Images(cfg, *reader(cfg))


class Mixture(nn.Module):
    """Gaussians around given means, (K, D), in 2-D or 1-D; class = component.

    As a module it is its own exact teacher: F = E[cos(t) z - sin(t) x_0 | x_t] / sigma_d in closed form."""

    def __init__(self, cfg, mean, std):
        super().__init__()
        self.cfg, self.sigma_d, self.std = cfg, cfg.sigma_d, std  # std: of a component
        self.shape, self.classes = tuple(mean.shape[1:]), len(mean)
        self.register_buffer("mean", mean)

    def batch(self, gen):
        """x0 (B, D) float32; y (B,) int64, or None unless cfg.conditional."""
        y = gen.index(self.classes)
        return self.mean[y].float() + self.std * gen.normal(*self.shape), gen.labels(y, self.cfg)

    def chunks(self, device):
        """Stands for the training set, which a mixture has not: 4,096 points, the same at every call."""
        yield self.batch(Draw(self.cfg.seed, 2**33, 0, 4096, device))

    def forward(self, x, t, y=None, scale=None):
        cos, sin = t.to(x.dtype).cos()[:, None, None], t.to(x.dtype).sin()[:, None, None]
        variance = (cos * self.std) ** 2 + (sin * self.sigma_d) ** 2            # of x_t within a component
        delta = (x * self.sigma_d)[:, None] - cos * self.mean.to(x.dtype)       # (B, K, D)
        logits = -(delta**2).sum(2) / (2 * variance[:, :, 0])
        if y is not None:                                                       # y = -1 keeps all components
            other = torch.arange(self.classes, device=x.device) != y[:, None]
            logits = logits.masked_fill(other & (y >= 0)[:, None], -math.inf)
        x_0 = self.mean.to(x.dtype) + cos * self.std**2 / variance * delta      # posterior means by component
        z = sin * self.sigma_d**2 / variance * delta
        return (logits.softmax(1)[:, :, None] * (cos * z - sin * x_0)).sum(1) / self.sigma_d


def ring(cfg):
    """gmm: eight Gaussians on a ring in 2-D, every coordinate of standard deviation sigma_d."""
    angle, std = torch.arange(8, dtype=torch.float64) * math.pi / 4, 0.1 * cfg.sigma_d
    radius = math.sqrt(2 * (cfg.sigma_d**2 - std**2))
    return Mixture(cfg, radius * torch.stack([angle.cos(), angle.sin()], dim=1), std)


def modes(cfg):
    """modes: two Gaussians in 1-D, of standard deviation sigma_d in all."""
    std = 0.2 * cfg.sigma_d
    return Mixture(cfg, math.sqrt(cfg.sigma_d**2 - std**2) * torch.tensor([[-1.0], [1.0]]).double(), std)


class Images:
    """Square RGB images held as uint8 (N, 3, H, W), in memory or memory-mapped; x0 = pixels / 127.5 - 1."""

    def __init__(self, cfg, images, labels):
        self.cfg, self.images = cfg, images
        self.shape, self.classes = tuple(images.shape[1:]), int(labels.max()) + 1
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        check_fit(cfg, self)

    def batch(self, gen):
        """x0 (B, 3, H, W) float32; y (B,) int64, or None unless cfg.conditional."""
        index = gen.index(len(self.images)).cpu()
        return self.x0(index.numpy(), gen.device), gen.labels(self.labels[index].to(gen.device), self.cfg)

    def chunks(self, device, size=4096):
        """The whole training set, `size` images and their labels at a time."""
        for rows in (slice(lo, lo + size) for lo in range(0, len(self.images), size)):
            yield self.x0(rows, device), self.labels[rows].to(device)

    def x0(self, rows, device):
        return torch.from_numpy(np.array(self.images[rows])).to(device).float() / 127.5 - 1

    @staticmethod
    def to_uint8(x):
        """(B, 3, H, W) in [-1, 1] -> uint8, rounded."""
        return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def check_fit(cfg, data):
    """Ends the program if the network that cfg asks for cannot take the data."""
    halvings = 2 ** (len(cfg.channel_mult) - 1)
    if data.shape[1] % halvings:
        fail(f"images of {data.shape[1]} pixels cannot be halved {len(cfg.channel_mult) - 1} times "
             f"(--channel_mult): --image_size must be a multiple of {halvings}")
    if cfg.conditional and data.classes < 2:
        fail(f"--conditional needs labels, and {cfg.data or cfg.dataset} has none")


SPACES = dict(  # of latents: the autoencoder's pixels at 0 and 255, mean and standard deviation by channel
    scm=(-1, 1, (1.56, -0.695, 0.483, 0.729), (5.27, 5.91, 4.21, 4.31)),   # sCM, App. G
    edm2=(0, 1, (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)))      # EDM2 feeds [0, 1]


class Latents:
    """imagenet512: latents of --data, a folder by `python common.py latents` or EDM2's zip. x0 (4, h, w) is
    drawn anew from the autoencoder's N(mean, std^2), then normalized to standard deviation sigma_d."""

    def __init__(self, cfg):
        root = Path(cfg.data or fail("--dataset imagenet512 needs --data: python common.py latents makes it"))
        self.cfg = cfg
        if root.is_dir():
            if not (root / "latents.json").exists():
                fail(f"--data {root} holds no latents, or not all: run python common.py latents --out {root}")
            try:
                self.moments = np.load(root / "moments.npy", mmap_mode="r")
                labels = np.load(root / "labels.npy")
            except (OSError, ValueError) as error:
                fail(f"--data {root}: damaged latents ({error}): encode them anew, into another folder")
        else:
            names, labels, read = list_images(root, (".npy",))
            self.moments, self.names, self.read = None, names, read
        self.labels, self.classes = torch.as_tensor(labels, dtype=torch.int64), int(labels.max()) + 1
        self.shape = (4, *self.rows([0]).shape[2:])
        check_fit(cfg, self)
        if RANK == 0:
            autoencoder(cfg.vae, torch.device("cpu"))  # pictures need it: better missed now than at the end

    def rows(self, index):
        """Mean and standard deviation, (B, 8, h, w) float32."""
        if self.moments is not None:
            return torch.from_numpy(self.moments[index].astype(np.float32))
        try:
            arrays = [np.load(io.BytesIO(self.read(self.names[i])), allow_pickle=False) for i in index]
            return torch.from_numpy(np.stack(arrays).astype(np.float32))
        except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            fail(f"--data {self.cfg.data}: not EDM2's latents, float32 (8, h, w) .npy ({error})")

    def batch(self, gen):
        """x0 (B, 4, h, w) float32; y (B,) int64, or None unless cfg.conditional."""
        index = gen.index(len(self.labels)).cpu()
        mean, std = self.rows(index.numpy()).to(gen.device).chunk(2, dim=1)
        _, _, shift, scale = latent_space(self.cfg, gen.device)
        x0 = (mean + std * gen.normal(*self.shape) - shift) * (self.cfg.sigma_d / scale)
        return x0, gen.labels(self.labels[index].to(gen.device), self.cfg)

    def to_uint8(self, x):
        return to_uint8(x, self.cfg)


def latent_space(cfg, device):
    """The numbers of SPACES: EDM2's for its zip; mean and standard deviation as (4, 1, 1)."""
    black, white, *moments = SPACES["edm2" if str(cfg.data).endswith(".zip") else "scm"]
    return black, white, *(torch.tensor(m, device=device).view(4, 1, 1) for m in moments)


@functools.cache
def autoencoder(path, device):
    from diffusers import AutoencoderKL
    hub = "stabilityai/sd-vae-ft-mse"
    try:
        return AutoencoderKL.from_pretrained(path or hub).to(device).requires_grad_(False)
    except (OSError, ValueError) as error:
        fail(f"cannot load the autoencoder {path or hub}: {str(error)[:90]}; download "
             f"https://huggingface.co/{hub} and give its folder with --vae")


@torch.no_grad()
def to_uint8(x, cfg):
    """x0 (B, C, h, w) -> pixels (B, 3, H, W) uint8; latents are decoded one by one."""
    if cfg.dataset != "imagenet512":
        return Images.to_uint8(x)
    black, white, shift, scale = latent_space(cfg, x.device)
    vae, z = autoencoder(cfg.vae, x.device), x.float() * (scale / cfg.sigma_d) + shift
    pixels = torch.cat([vae.decode(one[None]).sample for one in z])
    return Images.to_uint8((pixels - black) * (2 / (white - black)) - 1)


@torch.no_grad()
def encode_latents(argv):
    """python common.py latents: mean and standard deviation of each image's latent as float16, and labels.

    Each process takes every WORLD-th batch; what is done is marked on disk, so a second call goes on, with
    any number of processes."""
    parser = argparse.ArgumentParser("common.py latents", description=encode_latents.__doc__.split(":")[0])
    parser.error = fail
    parser.add_argument("--src", required=True, help="class subfolders of images, or EDM's zip")
    parser.add_argument("--out", default="data/imagenet512", help="folder [data/imagenet512]")
    parser.add_argument("--vae", default="", help="folder or hub id [stabilityai/sd-vae-ft-mse]")
    parser.add_argument("--image_size", type=int, default=512, help="crop and resize to this [512]")
    parser.add_argument("--batch", type=int, default=16, help="images at a time [16]")
    args = parser.parse_args(argv)
    if args.batch < 1 or args.image_size < 8:
        fail("--batch must be at least 1, --image_size at least 8")
    names, labels, read = list_images(args.src, flag="--src")
    device = start_processes("gloo")
    vae, out = autoencoder(args.vae, device), Path(args.out)

    def encode(batch):
        x = np.stack([decode(name, read, args.image_size) for name in batch])
        latent = vae.encode(torch.from_numpy(x).to(device).float() / 127.5 - 1).latent_dist
        return torch.cat([latent.mean, latent.std], dim=1).half().cpu().numpy()
    shape, about = (len(names), *encode(names[:1]).shape[1:]), dict(vars(args), names=len(names))
    about["sources"] = hashlib.sha1("\n".join(names).encode()).hexdigest()
    if RANK == 0 and not (out / "about.json").exists():
        try:
            out.mkdir(parents=True, exist_ok=True)
            for name, dtype, size in (("moments", np.float16, shape), ("done", np.uint8, shape[:1])):
                np.lib.format.open_memmap(out / f"{name}.npy", "w+", dtype, size).flush()
                with open(out / f"{name}.npy", "r+b") as file:  # a full disk would kill a memory map later
                    getattr(os, "posix_fallocate", lambda *_: None)(file.fileno(), 0, file.seek(0, 2))
        except OSError as error:
            fail(f"cannot write {out}: {error}")
        atomic_write(out / "labels.npy", lambda file: np.save(file, labels))
        atomic_write(out / "about.json", lambda file: file.write(json.dumps(about).encode()))
    barrier()
    before = json.loads((out / "about.json").read_text())
    if any(before[k] != about[k] for k in ("sources", "vae", "image_size")):
        fail(f"{out} was begun from other images, --vae or --image_size: choose another --out")
    moments, done = (np.load(out / f"{name}.npy", mmap_mode="r+") for name in ("moments", "done"))
    rows = np.arange(len(names))
    batches = [rows[i:i + args.batch] for i in range(0, len(rows), args.batch)][RANK::WORLD]
    for batch in tqdm(batches, desc="encode", unit="batch", disable=None if RANK == 0 else True):
        if not done[batch].all():
            moments[batch] = encode([names[i] for i in batch])
            moments.flush()  # before it counts as done
            done[batch] = 1
            done.flush()
    barrier()
    if not np.load(out / "done.npy").all():
        fail(f"{out} lacks latents: run this once more")
    if RANK == 0:
        atomic_write(out / "latents.json", lambda file: file.write(json.dumps(about).encode()))
        print(f"wrote {len(names)} latents {shape[1:]} to {out}")


def draw_shapes(cfg, count=8000):
    """Disc, triangle, square or pentagon, warm or cold (8 classes), drawn by Pillow at 4x and reduced."""
    size, rng = cfg.image_size or 16, np.random.default_rng(0)
    images, labels = np.empty((count, 3, size, size), np.uint8), rng.integers(8, size=count)
    for i, label in enumerate(labels):
        x, y, r = np.array([*rng.uniform(0.35, 0.65, 2), rng.uniform(0.15, 0.3)]) * 4 * size
        hue = rng.integers(0, 35) if label < 4 else rng.integers(120, 180)
        picture = Image.new("HSV", (4 * size, 4 * size), (0, 0, int(rng.integers(15, 60))))
        pen, ink = ImageDraw.Draw(picture), (int(hue), 220, int(rng.integers(160, 256)))
        if label % 4 == 0:
            pen.ellipse((x - r, y - r, x + r, y + r), fill=ink)
        else:
            pen.regular_polygon((x, y, r), n_sides=int(label % 4) + 2, fill=ink)
        images[i] = np.asarray(picture.convert("RGB").resize((size, size), Image.BOX)).transpose(2, 0, 1)
    return images, labels


def list_images(root, suffixes=(".png", ".jpg", ".jpeg", ".bmp", ".webp"), flag="--data"):
    """Names, labels and read(name) -> bytes of class subfolders of images (torchvision's ImageFolder), or of
    EDM's zip with dataset.json."""
    root = Path(root)
    if root.is_dir():
        names = sorted(str(p.relative_to(root)) for p in root.rglob("*")
                       if p.suffix.lower() in suffixes and p.is_file())
        tops = [Path(n).parts[0] if len(Path(n).parts) > 1 else "" for n in names]
        classes = sorted(set(tops))
        if "" in classes and len(classes) > 1:
            fail(f"{flag} {root}: images in class folders and beside them, such as {names[tops.index('')]}")
        labels, archive = [classes.index(top) for top in tops], None
    elif zipfile.is_zipfile(root):
        archive = zipfile.ZipFile(root)
        names = sorted(n for n in archive.namelist() if n.lower().endswith(suffixes))
        try:
            table = json.loads(archive.read("dataset.json")) if "dataset.json" in archive.namelist() else {}
            table = dict(table.get("labels") or {})
            labels = [table[n] if table else 0 for n in names]
            assert all(type(v) is int and 0 <= v < len(names) for v in labels)
        except Exception as error:
            fail(f"{flag} {root}: its dataset.json does not give every image a whole number ({error!r})")
    else:
        fail(f"{flag} {root}: neither a folder nor a zip file")
    if not names:
        fail(f"{flag} {root}: no images ({', '.join(suffixes)}) in it")
    return names, np.array(labels), archive.read if archive else lambda name: (root / name).read_bytes()


def decode(name, read, size):
    """The image as uint8 (3, H, W), cropped and resized to size, or as it is if that is 0."""
    try:
        image = Image.open(io.BytesIO(read(name)))
        assert image.mode[0] not in "IF", f"{image.mode} pixels, only 8-bit images are read"
        image = image.convert("RGB")
    except Exception as error:  # decoders raise many kinds
        fail(f"cannot read the image {name}: {error}")
    return np.asarray(centre_crop(image, size) if size else image).transpose(2, 0, 1)


def read_folder(cfg):
    """--data, decoded once and memory-mapped afterwards: training reads rows of one array."""
    root = Path(cfg.data or fail(f"--dataset {cfg.dataset} needs --data PATH: class subfolders, or a zip"))
    names, labels, read = list_images(root)
    files = [(n, (root / n if root.is_dir() else root).stat().st_mtime_ns) for n in names]
    key = hashlib.sha1(repr((str(root.resolve()), files, cfg.image_size)).encode()).hexdigest()[:16]
    cache = Path("data/cache", f"{root.stem}-{cfg.image_size}-{key}.npy")
    if not cache.exists() and RANK == 0:
        first = decode(names[0], read, cfg.image_size)
        if first.shape[1] != first.shape[2]:
            fail(f"{names[0]} is not square: give --image_size to crop and resize")
        array = np.empty((len(names), *first.shape), np.uint8)
        for i, name in enumerate(tqdm(names, desc="decode", unit="img", leave=False, disable=None)):
            image = decode(name, read, cfg.image_size)
            if image.shape != first.shape:
                fail(f"{name} and {names[0]} differ in size: give --image_size to crop and resize")
            array[i] = image
        atomic_write(cache, lambda file: np.save(file, array))
    barrier()
    return np.load(cache, mmap_mode="r"), labels


def download(url, path, md5=""):
    """Rank 0 fetches url into path, unless it is there, and checks it; the others call, too, and wait."""
    if RANK == 0 and not Path(path).exists():
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                blob = response.read()
        except OSError as error:
            fail(f"cannot download {url} ({error}): fetch it yourself and put it at {path}")
        if md5 and hashlib.md5(blob).hexdigest() != md5:
            fail(f"{url} arrived damaged (its MD5 is not {md5}): try again")
        atomic_write(path, lambda file: file.write(blob))
    barrier()


def centre_crop(image, size):
    """ADM's crop: box-halve while at least twice too large, bicubic to the shorter side, cut the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_captions(cfg):
    """[(image path, caption)] of --data: metadata.jsonl or .csv (file_name, text), or .txt by image."""
    root = Path(cfg.data)
    try:
        if (root / "metadata.jsonl").exists():
            rows = map(json.loads, (root / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
        elif (root / "metadata.csv").exists():
            rows = csv.DictReader((root / "metadata.csv").read_text(encoding="utf-8").splitlines())
        else:
            images = (p for p in root.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
            rows = (dict(file_name=path.relative_to(root), text=path.with_suffix(".txt").read_text("utf-8"))
                    for path in sorted(images))
        pairs = [(root / row["file_name"], row["text"].strip()) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"--data {root}: every image needs a caption, in metadata.jsonl or metadata.csv (file_name, "
             f"text), or in a .txt of its name ({error!r})")
    return pairs or fail(f"--data {root}: no images with captions in it")


def read_image(path, shape, crop=False):
    """Image file -> (1, C, H, W) in [-1, 1], None for ''; ends the program unless it has the right size, or
    crops and resizes it."""
    if not path:
        return None
    try:
        image = Image.open(path)
        image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        fail(f"cannot read the image {path}: {error}")
    if crop:
        image = centre_crop(image.convert("RGB"), shape[1])
    if image.size != tuple(shape[2:0:-1]) or image.mode not in ("RGB", "L", "1"):
        found = f"{image.width}x{image.height} {image.mode}"
        fail(f"{path} is {found}; the network needs {shape[2]}x{shape[1]} RGB or L")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5 - 1


LUMA = torch.tensor([0.2989, 0.5870, 0.1140])


def operator(name, shape, mask=None, p=4):
    """Orthonormal A on images (B, C, H, W), its inverse, and which coefficients of A x the input knows: for
    inpaint where mask (1, 3, H, W) > 0, for colorize the luma, for superres the means of p x p patches."""
    def basis(first):  # orthonormal, its first column along `first`
        columns = torch.eye(len(first))
        columns[:, 0] = first
        Q, R = torch.linalg.qr(columns)
        return Q * R[0, 0].sign()
    c, h, w = shape
    if name == "colorize":
        Q = basis(LUMA)
        return (lambda x: torch.einsum("bchw,cd->bdhw", x, Q), lambda x: torch.einsum("bdhw,cd->bchw", x, Q),
                torch.arange(3).view(3, 1, 1) == 0)
    if name == "superres":
        Q = basis(torch.ones(p * p))
        return (lambda x: x.view(-1, c, h // p, p, w // p, p).transpose(3, 4).flatten(4) @ Q,
                lambda x: (x @ Q.T).unflatten(4, (p, p)).transpose(3, 4).reshape(-1, c, h, w),
                torch.arange(p * p) == 0)
    return (lambda x: x), (lambda x: x), mask > 0 if name == "inpaint" else torch.zeros(1, dtype=torch.bool)


def read_cifar10(cfg):
    """CIFAR-10's official binary archive (--data, or downloaded and checked): the 50,000 training images."""
    url, md5 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
    path = Path(cfg.data or "data/cifar-10-binary.tar.gz")
    if not cfg.data:
        download(url, path, md5)
    try:
        with tarfile.open(path) as archive:  # only read, never unpacked
            files = sorted(n for n in archive.getnames() if re.search(r"data_batch_\d\.bin$", n))
            rows = np.concatenate([np.frombuffer(archive.extractfile(n).read(), np.uint8) for n in files])
            rows = rows.reshape(-1, 1 + 3 * 32 * 32)  # label, then R, G, B planes
            assert rows[:, 0].max() < 10, "labels above 9"
    except Exception as error:  # damage shows in many ways
        fail(f"{path} is not CIFAR-10's binary archive, cifar-10-binary.tar.gz ({error})")
    if cfg.image_size not in (0, 32):
        fail("--dataset cifar10 is 32 x 32 pixels; for other sizes unpack it and use --dataset folder")
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].astype(np.int64)


# ------- 3. networks: a small MLP, and EDM2's magnitude-preserving U-Net (Karras et al. 2024) written anew

def pnorm(x, dim=1, eps=1e-4):
    """Pixel normalization: unit root mean square along dim. The norm is taken in float32 or wider."""
    size = math.prod([x.shape[d] for d in ([dim] if isinstance(dim, int) else dim)])  # a list: torch.compile
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide) / math.sqrt(size)
    return x * (1 / (eps + norm)).to(x.dtype)


SILU = 1 / 0.596  # gain of the layer after a SiLU, restores unit variance (EDM2, Eq. 81)


def mp_sum(a, b, t):
    """Blend of two unit-variance tensors at unit variance (EDM2, Eq. 88)."""
    return torch.lerp(a, b, t) / math.hypot(1 - t, t)


def mp_cat(a, b):
    """Concatenation of channels in which both halves weigh the same (EDM2, Eq. 103, t = 1/2)."""
    na, nb = a.shape[1], b.shape[1]
    return torch.cat([a * math.sqrt((na + nb) / (2 * na)), b * math.sqrt((na + nb) / (2 * nb))], dim=1)


class MPConv(nn.Module):
    """Convolution, or linear layer if kernel is None, whose weights have unit norm (EDM2, Eq. 47 and 66)."""

    def __init__(self, cin, cout, kernel=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cout, cin, *([kernel, kernel] if kernel else [])))

    def forward(self, x, gain=1.0):
        dims = tuple(range(1, self.weight.ndim))
        weight = pnorm(self.weight, dims) * (gain / math.sqrt(self.weight[0].numel()))
        weight = weight.to(x.dtype)
        return x @ weight.t() if weight.ndim == 2 else tnf.conv2d(x, weight, padding=weight.shape[-1] // 2)


@torch.no_grad()
def normalize_weights(net):
    """EDM2's forced weight normalization (Eq. 66), after each optimizer step: inside a pass it would change
    what the next pass of the same step computes."""
    for module in net.modules():
        if isinstance(module, MPConv):
            module.weight.copy_(pnorm(module.weight, tuple(range(1, module.weight.ndim))))


def dropout(x, p, training):
    """Dropout that draws the same mask with and without a JVP (see Draw.same_dropout)."""
    return x * (torch.rand(x.shape, device=x.device) >= p).to(x.dtype) / (1 - p) if training and p else x


class Embedding(nn.Module):
    """Scalar (B,) -> features of unit variance (B, dim), in the dtype of the network's parameters.

    positional: cos and sin at geometric frequencies scale ... scale / 10000. fourier: random frequencies of
    standard deviation 2 pi scale (EDM2: scale 1). sCM (Sec. 4.1) finds large scales unstable.
    """

    def __init__(self, kind, dim, scale=1.0):
        super().__init__()
        if kind == "positional":
            freq = (scale * 1e-4 ** (torch.arange(dim // 2) / (dim // 2 - 1))).repeat(2)
            phase = (torch.arange(dim) >= dim // 2) * math.pi / 2  # cos, then sin
        else:
            freq, phase = 2 * math.pi * scale * torch.randn(dim), 2 * math.pi * torch.rand(dim)
        self.register_buffer("freq", freq)
        self.register_buffer("phase", phase)

    def forward(self, c):
        return math.sqrt(2) * torch.cos(c.to(self.freq.dtype)[:, None] * self.freq - self.phase)


class Inputs(nn.Module):
    """What a network is told besides x: the angle t itself (c_noise 't'; sCM, Sec. 4.1), or log(sigma)/4 with
    sigma = sigma_d tan t, as in EDM ('log'); the label. And the head that learns w(t) (B,)."""

    def __init__(self, sigma_d, c_noise, classes):
        super().__init__()
        self.sigma_d, self.c_noise, self.classes = sigma_d, c_noise, classes

    def add_head(self, head):
        if head:
            self.head_embed, self.head_linear = Embedding("fourier", 128), MPConv(128, 1)
            self.head_gain = nn.Parameter(torch.zeros([]))      # 0: w(t) = 0 at the start

    def log_sigma(self, t):
        return torch.log(self.sigma_d * torch.tan(t.clamp(1e-4, math.pi / 2 - 1e-4))) / 4

    def noise(self, t):
        return t if self.c_noise == "t" else self.log_sigma(t)

    def onehot(self, t, y, dtype):
        """(B, classes) of unit variance; y = -1 or None: all zeros."""
        y = torch.full_like(t, -1, dtype=torch.int64) if y is None else y
        return tnf.one_hot(y + 1, self.classes + 1)[:, 1:].to(dtype) * math.sqrt(self.classes)

    def weight(self, t):
        if not hasattr(self, "head_linear"):
            return torch.zeros_like(t, dtype=next(self.parameters()).dtype)
        return self.head_linear(self.head_embed(self.log_sigma(t)), self.head_gain)[:, 0]


class Conditioning(Inputs):
    """Time t, label y and guidance scale -> one embedding (B, dim)."""

    def __init__(self, dim, noise_dim, classes, sigma_d, emb, emb_scale, c_noise, guidance, head):
        super().__init__(sigma_d, c_noise, classes)
        self.embed, self.linear = Embedding(emb, noise_dim, emb_scale), MPConv(noise_dim, dim)
        self.label = MPConv(classes, dim) if classes else None
        if guidance:
            self.guidance_embed = Embedding("positional", noise_dim, 10.0)
            self.guidance_linear = MPConv(noise_dim, dim)
            self.guidance_gain = nn.Parameter(torch.zeros([]))  # 0: starts as the teacher, which knows none
        self.add_head(head)

    def forward(self, t, y, scale):
        emb = self.linear(self.embed(self.noise(t)))
        if self.label is not None:
            emb = mp_sum(emb, self.label(self.onehot(t, y, emb.dtype)), 0.5)
        if scale is not None:
            emb = emb + self.guidance_linear(self.guidance_embed(scale)) * self.guidance_gain
        return tnf.silu(emb) * SILU


class Modulation(nn.Module):
    """The embedding acts on the channels of x (B, C, ...).

    double_norm: norm(x) * pnorm(s(t)) + pnorm(b(t)), adaptive double normalization (sCM, Sec. 4.1); otherwise
    EDM2's own x * (1 + s(t)). Without `shift` there is no b(t): EDM2 has none, and the sizes that the paper
    prints for ImageNet leave no room for one.
    # DEPARTS: with b(t), over sqrt(2), which keeps the unit variance that EDM2's layers rely on.
    """

    def __init__(self, dim, channels, double_norm, shift=True):
        super().__init__()
        self.double_norm, self.shift = double_norm, double_norm and shift
        self.linear = MPConv(dim, channels * (2 if self.shift else 1))
        if not double_norm:
            self.gain = nn.Parameter(torch.zeros([]))

    def forward(self, x, emb):
        shape = (len(x), -1) + (1,) * (x.ndim - 2)
        if not self.double_norm:
            return x * (1 + self.linear(emb, self.gain)).view(shape).to(x.dtype)
        if not self.shift:
            return pnorm(x) * pnorm(self.linear(emb)).view(shape).to(x.dtype)
        scale, shift = (pnorm(v) / math.sqrt(2) for v in self.linear(emb).chunk(2, dim=1))
        return pnorm(x) * scale.view(shape).to(x.dtype) + shift.view(shape).to(x.dtype)


class MLP(nn.Module):
    """Residual MLP for vectors: F (B, D) = net(x (B, D), t (B,), y (B,)); scale (B,) is that of guidance.

    With return_w it also returns the weighting head's w(t) (B,), as does UNet."""

    def __init__(self, shape, classes=0, channels=128, blocks=4, sigma_d=0.5, emb="positional",
                 emb_scale=10.0, c_noise="t", double_norm=True, guidance=False, head=True, **image_options):
        super().__init__()
        self.cond = Conditioning(channels, 64, classes, sigma_d, emb, emb_scale, c_noise, guidance, head)
        self.double_norm, self.blocks = double_norm, blocks
        self.first, self.last = nn.Linear(shape[0], channels), nn.Linear(channels, shape[0])
        self.inner = nn.ModuleList(nn.Linear(channels, channels) for _ in range(blocks))
        self.modulate = nn.Linear(channels, 2 * blocks * channels)
        self.outer = nn.ModuleList(nn.Linear(channels, channels) for _ in range(blocks))

    def forward(self, x, t, y=None, scale=None, return_w=False):
        emb = self.cond(t, y, scale)
        h = self.first(x.to(emb.dtype))
        scale, shift = self.modulate(emb).view(len(x), 2, self.blocks, -1).unbind(1)  # (B, blocks, channels)
        scale, shift = (pnorm(scale, 2), pnorm(shift, 2)) if self.double_norm else (1 + scale, shift)
        for i, (inner, outer) in enumerate(zip(self.inner, self.outer)):
            h = h + outer(tnf.silu(pnorm(inner(h)) * scale[:, i] + shift[:, i]))
        F = self.last(h)
        return (F, self.cond.weight(t)) if return_w else F


class Block(nn.Module):
    """EDM2's residual block (config G): encoder blocks normalize their input, decoder blocks do not."""

    def __init__(self, cin, cout, dim, encoder, attention, resample, dropout, double_norm, norm_shift):
        super().__init__()
        self.encoder, self.resample, self.dropout, self.heads = encoder, resample, dropout, max(cout // 64, 1)
        if attention and cout % self.heads:
            fail(f"attention at {cout} channels: above 64 they must be a multiple of 64 (--channels)")
        self.skip = MPConv(cin, cout, 1) if cin != cout else None
        self.conv0, self.conv1 = MPConv(cout if encoder else cin, cout, 3), MPConv(cout, cout, 3)
        self.modulate = Modulation(dim, cout, double_norm, norm_shift)
        if attention:
            self.qkv, self.proj = MPConv(cout, 3 * cout, 1), MPConv(cout, cout, 1)

    def forward(self, x, emb):
        if self.resample == "down":
            x = tnf.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = tnf.interpolate(x, scale_factor=2, mode="nearest")
        if self.encoder:
            x = pnorm(self.skip(x) if self.skip else x)
        y = self.modulate(self.conv0(tnf.silu(x), SILU), emb)
        y = self.conv1(dropout(tnf.silu(y), self.dropout, self.training), SILU)
        if not self.encoder and self.skip:
            x = self.skip(x)
        x = mp_sum(x, y, 0.3)
        if hasattr(self, "qkv"):
            b, c, height, width = x.shape
            qkv = self.qkv(x).view(b, self.heads, c // self.heads, 3, height * width).transpose(2, 4)
            q, k, v = pnorm(qkv, dim=4).unbind(3)                     # (B, heads, H W, channels)
            x = mp_sum(x, self.proj(attention(q, k, v).transpose(2, 3).reshape(b, c, height, width)), 0.3)
        return x.clamp(-256, 256) if x.dtype == torch.float16 else x  # DEPARTS: EDM2 clips in float32, too


def run_block(net, block, x, emb):
    """With --checkpointing the backward pass computes the inside of a block once more."""
    if net.checkpointing and torch.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(block, x, emb, use_reentrant=False)
    return block(x, emb)


class UNet(nn.Module):
    """EDM2's U-Net: F (B, C, H, W) = net(x (B, C, H, W), t (B,), y (B,)); scale (B,) is that of guidance.

    The torso runs in `dtype`; parameters, embeddings and the output are float32 (float64 after .double()).
    attention lists the resolutions with self-attention. Dropout acts at 16 pixels and below, as in sCM's
    ImageNet runs, and everywhere if the image has at most 32, as in the papers' CIFAR-10 runs.
    """

    def __init__(self, shape, classes=0, channels=64, channel_mult=(1, 2), blocks=2, attention=(8,),
                 dropout=0.0, sigma_d=0.5, emb="positional", emb_scale=1.0, c_noise="t", double_norm=True,
                 norm_shift=True, guidance=False, head=True, dtype="fp32"):
        super().__init__()
        self.dtype, self.checkpointing = DTYPES[dtype] if dtype != "fp32" else None, False
        widths, dim = [channels * m for m in channel_mult], channels * max(channel_mult)
        self.cond = Conditioning(dim, channels, classes, sigma_d, emb, emb_scale, c_noise, guidance, head)

        def block(res, cin, cout, encoder, attend, resample=""):
            rate = dropout if res <= 16 or shape[1] <= 32 else 0.0
            return Block(cin, cout, dim, encoder, attend, resample, rate, double_norm, norm_shift)

        res, width = shape[1], widths[0]
        self.first = MPConv(shape[0] + 1, width, 3)  # + a channel of ones, in place of biases
        self.enc, skips = nn.ModuleList(), [width]
        for level, next_width in enumerate(widths):
            if level:
                res //= 2
                self.enc.append(block(res, width, width, True, False, "down"))
                skips.append(width)
            for _ in range(blocks):
                self.enc.append(block(res, width, next_width, True, res in attention))
                width = next_width
                skips.append(width)
        self.mid = nn.ModuleList(block(res, width, width, False, attend) for attend in (True, False))
        self.dec = nn.ModuleList()
        for level, next_width in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.dec.append(block(res, width + skips.pop(), next_width, False, res in attention))
                width = next_width
            if level:
                res *= 2
                self.dec.append(block(res, width, width, False, False, "up"))
        self.last, self.out_gain = MPConv(width, shape[0], 3), nn.Parameter(torch.zeros([]))

    def forward(self, x, t, y=None, scale=None, return_w=False):
        emb = self.cond(t, y, scale)
        x = x.to(self.dtype or emb.dtype, memory_format=torch.channels_last)
        x = self.first(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))
        skips = [x]
        for block in self.enc:
            x = run_block(self, block, x, emb)
            skips.append(x)
        for block in self.mid:
            x = run_block(self, block, x, emb)
        for block in self.dec:
            x = run_block(self, block, x if block.resample else mp_cat(x, skips.pop()), emb)
        F = self.last(x, self.out_gain).to(emb.dtype)
        return (F, self.cond.weight(t)) if return_w else F


class DDPMppEmbedding(Inputs):
    """As Conditioning, for DDPM++; c_noise comes in sines first, then cosines."""

    def __init__(self, channels, classes, sigma_d, c_noise, emb_scale, head):
        super().__init__(sigma_d, c_noise, classes)
        self.half, self.scale = channels // 2, emb_scale
        self.map_label = nn.Linear(classes, channels) if classes else None
        self.map_layer0 = nn.Linear(channels, 4 * channels)
        self.map_layer1 = nn.Linear(4 * channels, 4 * channels)
        self.add_head(head)

    def forward(self, t, y):
        dtype = self.map_layer0.weight.dtype
        freq = self.scale * 1e-4 ** (torch.arange(self.half, device=t.device) / (self.half - 1))
        angle = self.noise(t)[:, None].to(dtype) * freq.to(dtype)
        emb = torch.cat([angle.sin(), angle.cos()], dim=1)
        if self.map_label is not None:
            emb = emb + self.map_label(self.onehot(t, y, dtype))
        return tnf.silu(self.map_layer1(tnf.silu(self.map_layer0(emb))))


class DDPMppBlock(nn.Module):
    """Residual block with GroupNorm; sums over sqrt(2)."""

    def __init__(self, cin, cout, emb, attend=False, resample="", dropout=0.0):
        super().__init__()
        self.resample, self.dropout = resample, dropout
        self.norm0, self.norm1 = group_norm(cin), group_norm(cout)
        self.conv0, self.conv1 = nn.Conv2d(cin, cout, 3, padding=1), nn.Conv2d(cout, cout, 3, padding=1)
        self.affine = nn.Linear(emb, cout)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout or resample else None
        if attend:
            self.norm2 = group_norm(cout)
            self.qkv, self.proj = nn.Conv2d(cout, 3 * cout, 1), nn.Conv2d(cout, cout, 1)

    def scale(self, x):
        if self.resample == "up":
            return tnf.interpolate(x, scale_factor=2, mode="nearest")
        return tnf.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x, emb):
        y = conv(self.conv0, self.scale(tnf.silu(norm(self.norm0, x))))
        y = norm(self.norm1, y + self.affine(emb)[:, :, None, None].to(y.dtype))
        y = conv(self.conv1, dropout(tnf.silu(y), self.dropout, self.training))
        x = (y + (conv(self.skip, self.scale(x)) if self.skip else x)) * math.sqrt(0.5)
        if hasattr(self, "qkv"):
            b, c, height, width = x.shape
            qkv = conv(self.qkv, norm(self.norm2, x)).view(b, 1, c, 3, height * width).transpose(2, 4)
            y = attention(*qkv.unbind(3)).transpose(2, 3).reshape(b, c, height, width)  # one head
            x = (x + conv(self.proj, y)) * math.sqrt(0.5)
        return x


def group_norm(channels):
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


def conv(layer, x):
    """In x's precision: autocast does not reach into a JVP."""
    return tnf.conv2d(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype), padding=layer.padding)


def norm(layer, x):
    """In float32 or wider, back in x's precision."""
    return layer(x.to(layer.weight.dtype)).to(x.dtype)


class DDPMpp(nn.Module):
    """DDPM++ as EDM trains it on CIFAR-10 (Song et al. 2021; EDM, App. F), called as UNet is; no augmentation
    labels, guidance scale or adaptive normalization. Parameters have EDM's names."""

    def __init__(self, shape, classes=0, channels=128, channel_mult=(2, 2, 2), blocks=4, attention=(16,),
                 dropout=0.0, sigma_d=0.5, emb_scale=1.0, c_noise="log", head=True, dtype="fp32", **of_edm2):
        super().__init__()
        if of_edm2.get("guidance") or of_edm2.get("double_norm") or of_edm2.get("emb") == "fourier":
            fail("--arch ddpmpp needs --double_norm false, --emb positional, and no --guidance_max")
        self.dtype, self.checkpointing = DTYPES[dtype] if dtype != "fp32" else None, False
        self.cond = DDPMppEmbedding(channels, classes, sigma_d, c_noise, emb_scale, head)
        width, skips, self.enc, self.dec = channels, [channels], nn.ModuleDict(), nn.ModuleDict()
        levels = [(shape[1] >> i, channels * m) for i, m in enumerate(channel_mult)]

        def block(name, cin, cout, attend=False, resample=""):
            return name, DDPMppBlock(cin, cout, 4 * channels, attend, resample, dropout)
        for i, (res, cout) in enumerate(levels):
            first = block(f"{res}x{res}_down", width, width, resample="down")
            self.enc.update([first if i else (f"{res}x{res}_conv", nn.Conv2d(shape[0], width, 3, padding=1))])
            skips += [width] * (i > 0)
            for j in range(blocks):
                self.enc.update([block(f"{res}x{res}_block{j}", width, cout, res in attention)])
                width = cout
                skips.append(width)
        for i, (res, cout) in reversed(list(enumerate(levels))):
            if i == len(levels) - 1:
                self.dec.update([block(f"{res}x{res}_in0", width, width, True),
                                 block(f"{res}x{res}_in1", width, width)])
            else:
                self.dec.update([block(f"{res}x{res}_up", width, width, resample="up")])
            for j in range(blocks + 1):
                attend = j == blocks and res in attention
                self.dec.update([block(f"{res}x{res}_block{j}", width + skips.pop(), cout, attend)])
                width = cout
        self.norm, self.last = group_norm(width), nn.Conv2d(width, shape[0], 3, padding=1)
        small = dict(conv1=1e-5, proj=1e-5, last=1e-5, qkv=0.2**0.5)  # residual branches start near zero
        for name, layer in self.named_modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(layer.weight, small.get(name.split(".")[-1], 1))
                nn.init.zeros_(layer.bias)

    def forward(self, x, t, y=None, scale=None, return_w=False):
        emb, skips = self.cond(t, y), []
        x = x.to(self.dtype or emb.dtype)
        for name, block in self.enc.items():
            x = conv(block, x) if name.endswith("conv") else run_block(self, block, x, emb)
            skips.append(x)
        for name, block in self.dec.items():
            x = run_block(self, block, torch.cat([x, skips.pop()], dim=1) if "block" in name else x, emb)
        F = -conv(self.last, tnf.silu(norm(self.norm, x))).to(emb.dtype)  # EDM's F has the other sign
        return (F, self.cond.weight(t)) if return_w else F


def network(cfg, data, **options):
    """The network for this config and dataset; its constructor's arguments stay with it as net.options."""
    options = dict(shape=data.shape, classes=data.classes if cfg.conditional else 0, dropout=cfg.dropout,
                   dtype=cfg.dtype) | {
        k: getattr(cfg, k) for k in NET_FIELDS if k not in ("image_size", "conditional")} | options
    net = build(options, cfg.seed)
    net.checkpointing = cfg.checkpointing
    return net


def build(options, seed=0):
    """Network from its constructor's arguments; the weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = DDPMpp if options.get("arch") == "ddpmpp" else UNet
        kind = MLP if len(options["shape"]) == 1 else unet
        net = kind(**{k: v for k, v in options.items() if k != "arch"})
    net.options = options
    return net


# -------------------------------------------------------------------------------- 4. schedules and solvers

def karras(n, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """n noise levels, descending, (n,) float64 (EDM, Eq. 5)."""
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    return (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


def to_trigflow(x, alpha, sigma, sigma_d):
    """x = alpha x_0 + sigma eps, eps ~ N(0, I) -> (x_t, t) (sCM, App. B); alpha, sigma (B,), EDM: alpha = 1.
    Nothing is divided by alpha, which vanishes at the noisy end of VP."""
    scale = sigma_d / torch.sqrt((alpha * sigma_d) ** 2 + sigma ** 2)
    return like(scale, x) * x, torch.atan2(sigma, alpha * sigma_d)


def like(v, x):
    """(B,) -> (B, 1, ...) with x's dtype and number of axes, to multiply x."""
    return v.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def solve(net, x, times, y=None, sigma_d=0.5, solver="heun"):
    """Integrate dx/dt = sigma_d F(x / sigma_d, t) (sCM, Eq. 3) along descending angles `times` (n,).

    x (B, ...) is the state at times[0], the result that at times[-1].
    euler: Eq. 3 as it stands, order 1. ddim: exact while the predicted x_0 stays put, order 1; EDM's Euler.
    heun: EDM's sampler, or DPM-Solver-2S with its inner point at the end of the step; order 2, two network
    calls a step; the step to t = 0 is a ddim step.
    """
    def F(x, t):
        return sigma_d * net(x / sigma_d, t.expand(len(x)), y).to(x.dtype)

    for t, s in zip(times[:-1].to(x.device), times[1:].to(x.device)):  # from t down to s
        v_t = F(x, t)
        if solver == "euler":
            x = x + (s - t) * v_t
            continue
        x_s = torch.cos(t - s) * x - torch.sin(t - s) * v_t
        if solver == "heun" and s > 0:
            z_t, z_s = torch.sin(t) * x + torch.cos(t) * v_t, torch.sin(s) * x_s + torch.cos(s) * F(x_s, s)
            x_s = x_s + torch.sin(s - t) / (2 * torch.cos(t)) * (z_s - z_t)
        x = x_s
    return x


def ode_times(n, sigma_d):
    """n + 1 angles from arctan(80 / sigma_d) to 0 on EDM's grid, (n + 1,) float64."""
    return torch.cat([torch.atan(karras(n) / sigma_d), torch.zeros(1, dtype=torch.float64)])


# -------------------------------------------------------------------------------------------------- 5. JVP

@torch.no_grad()
def jvp(net, primals, tangents):
    """net(*primals) and its derivative along tangents, in one pass, without a graph. Takes the bare module:
    function transforms do not cross DistributedDataParallel."""
    return torch.func.jvp(net, primals, tangents)


def attention(q, k, v):
    """softmax(q k^T / sqrt(c)) v, all (B, heads, N, c). Under jvp, output and tangent come from one pass in
    O(N) memory (sCM, App. F): PyTorch's fused kernels have no JVP."""
    primals, tangents = zip(*(forward_ad.unpack_dual(x) for x in (q, k, v)))  # None: no jvp, or a constant
    if all(tangent is None for tangent in tangents):
        return tnf.scaled_dot_product_attention(*(x.contiguous() for x in primals))  # strided ones go unfused
    tangents = (torch.zeros_like(x) if tx is None else tx for x, tx in zip(primals, tangents))
    return forward_ad.make_dual(*DualAttention.apply(*primals, *tangents))


class DualAttention(torch.autograd.Function):
    """(q, k, v, tq, tk, tv) -> (o, to). A Function because functorch hands its forward plain tensors, with
    storage, in place of wrapped ones. A second derivative, vmap or backward raises an error."""

    @staticmethod
    def forward(q, k, v, tq, tk, tv):
        gpu = q.is_cuda and torch.cuda.get_device_capability(q.device) >= (8, 0)  # Ampere and later
        fits = q.element_size() <= 4 and q.shape[-1] in (16, 32, 64, 128) and q.shape == k.shape == v.shape
        fused = (gpu or os.environ.get("TRITON_INTERPRET") == "1") and fits and triton_kernel()
        return (attention_triton if fused else attention_blocks)(q, k, v, tq, tk, tv)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


def attention_blocks(q, k, v, tq, tk, tv, size=256):
    """Attention and its tangent, (B, heads, N, c) each, over blocks of keys: any device, any dtype.

    S = q k^T / sqrt(c), P = softmax S, o = P v, to = P tv + (P * tS) v - rowsum(P * tS) o (sCM, App. F).
    With m the largest score so far and p = exp(S - m), sums over the keys so far, rescaled whenever m grows:
    l of p, mu of p * tS, o of p v, a of p tv + (p * tS) v.
    """
    wide, scale = torch.promote_types(q.dtype, torch.float32), 1 / math.sqrt(q.shape[-1])
    dtype, q, tq = q.dtype, q.to(wide) * scale, tq.to(wide) * scale
    m, l, mu, o, a = torch.full_like(q[..., :1], -math.inf), 0, 0, 0, 0
    for block in zip(*(x.split(size, dim=2) for x in (k, v, tk, tv))):
        k, v, tk, tv = (x.to(wide) for x in block)
        s, ts = q @ k.mT, tq @ k.mT + q @ tk.mT                                  # (B, heads, N, size)
        before, m = m, torch.maximum(m, s.amax(3, keepdim=True))
        p, fade = (s - m).exp(), (before - m).exp()
        pts = p * ts
        l, mu = l * fade + p.sum(3, keepdim=True), mu * fade + pts.sum(3, keepdim=True)
        o, a = o * fade + p @ v, a * fade + p @ tv + pts @ v
    o = o / l
    return o.to(dtype), ((a - mu * o) / l).to(dtype)


@functools.cache
def triton_kernel():
    """attention_blocks as a Triton kernel; None without Triton.

    A program takes `rows` queries of one image and head over all keys, `cols` at a time. Tensors: contiguous
    (B, heads, n, c). Sums are float32; "ieee" bars TF32 from float32 products (16-bit ones ignore it).
    """
    global triton, tl  # where a kernel looks for them
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    @triton.jit
    def kernel(Q, K, V, TQ, TK, TV, O, TO, n, scale, c: tl.constexpr, rows: tl.constexpr, cols: tl.constexpr):
        blocks = tl.cdiv(n, rows)
        start = (tl.program_id(0) // blocks).to(tl.int64) * n * c             # of this image and head
        i = tl.program_id(0) % blocks * rows + tl.arange(0, rows)
        d = tl.arange(0, c)
        query, is_query = start + i[:, None] * c + d[None, :], i[:, None] < n
        q, tq = tl.load(Q + query, is_query, 0.0), tl.load(TQ + query, is_query, 0.0)
        m, l = tl.full((rows,), float("-inf"), tl.float32), tl.zeros((rows,), tl.float32)
        mu = tl.zeros((rows,), tl.float32)
        o, a = tl.zeros((rows, c), tl.float32), tl.zeros((rows, c), tl.float32)
        for first in range(0, n, cols):
            j = first + tl.arange(0, cols)
            key, is_key = start + j[:, None] * c + d[None, :], j[:, None] < n
            k, tk = tl.load(K + key, is_key, 0.0), tl.load(TK + key, is_key, 0.0)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale           # (rows, cols)
            s = tl.where(j[None, :] < n, s, float("-inf"))
            ts = tl.dot(tq, tl.trans(k), input_precision="ieee")
            ts = tl.dot(q, tl.trans(tk), ts, input_precision="ieee") * scale      # 0 past the last key
            m_new = tl.maximum(m, tl.max(s, 1))
            p, fade = tl.exp(s - m_new[:, None]), tl.exp(m - m_new)
            pts, m = p * ts, m_new
            l, mu = l * fade + tl.sum(p, 1), mu * fade + tl.sum(pts, 1)
            v, tv = tl.load(V + key, is_key, 0.0), tl.load(TV + key, is_key, 0.0)
            p, pts = p.to(v.dtype), pts.to(v.dtype)
            o = tl.dot(p, v, o * fade[:, None], input_precision="ieee")
            a = tl.dot(p, tv, a * fade[:, None], input_precision="ieee")
            a = tl.dot(pts, v, a, input_precision="ieee")
        o = o / l[:, None]
        a = (a - mu[:, None] * o) / l[:, None]
        tl.store(O + query, o.to(O.dtype.element_ty), is_query)
        tl.store(TO + query, a.to(TO.dtype.element_ty), is_query)
    return kernel


def attention_triton(*duals):
    """Launch the kernel on (q, k, v, tq, tk, tv), (B, heads, N, c) each -> (o, to). Blocks are as large
    as an H100's registers hold at 64 channels; float32 has no tensor cores without TF32, so smaller ones."""
    duals = [x.contiguous() for x in duals]
    out = [torch.empty_like(duals[0]) for _ in range(2)]
    b, heads, n, c = duals[0].shape
    if duals[0].dtype == torch.float32:
        rows, cols, warps, stages = 32, 32, 4 if c <= 32 else 8, 1
    else:
        rows, cols, warps, stages = (64, 64, 4, 3) if c <= 64 else (64, 32, 4, 2)
    with torch.cuda.device_of(duals[0]):
        triton_kernel()[(b * heads * triton.cdiv(n, rows),)](
            *duals, *out, n, 1 / math.sqrt(c), c, rows, cols, num_warps=warps, num_stages=stages)
    return tuple(out)


# ---------------------------------- 6. run: processes, optimizer, EMA, checkpoints, log, pictures, metrics

def start_processes(backend=""):
    """Joins torchrun's processes; the device of this one."""
    cuda, gpus = torch.cuda.is_available(), torch.cuda.device_count()
    if cuda and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > gpus:
        fail(f"every process needs a GPU, and there are {gpus}: lower --nproc_per_node")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    if WORLD > 1 and not dist.is_initialized():
        hours = datetime.timedelta(hours=24)  # the others wait while rank 0 decodes a dataset
        dist.init_process_group(backend or ("nccl" if cuda else "gloo"), timeout=hours)
    return device


def barrier():
    if dist.is_initialized():
        dist.barrier()


def atomic_write(path, write):
    """write(file) to a temporary file, then move it into place: the old one stays until the new is whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        fail(f"cannot write {path}: {error}; what was there before is untouched")


def read_checkpoint(path):
    """The dict in a run folder's ckpt.pt, or in a file. Loads tensors and plain values only, never code."""
    path = Path(path) / "ckpt.pt" if Path(path).is_dir() or not Path(path).suffix else Path(path)
    if not path.exists():
        inside = [str(p.parent) for p in sorted(path.parent.glob("*/ckpt.pt"))]
        fail(f"no checkpoint at {path}" + (f"; there are runs in {', '.join(inside)}" if inside else ""))
    if path.suffix == ".pkl":
        return read_edm(path)
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, by where the damage is
        fail(f"{path} is truncated, or no checkpoint ({type(error).__name__})")
    if not isinstance(ckpt, dict) or not {"script", "config", "options", "net", "ema", "step"} <= ckpt.keys():
        fail(f"{path} was not written by one of these scripts")
    return ckpt


class Record:
    """What an object in a foreign pickle was: its class's name and its state. Has no behaviour."""

    def __init__(self, class_name="", state=None):
        self.class_name, self.state = class_name, state

    def __setstate__(self, state):
        self.state = state


def number_type(record):
    """NumPy's dtype from the Record of one. A pickle could set the flags of a true one, and then have raw
    bytes taken for an array of objects, that is, for pointers."""
    if not re.fullmatch(r"[biufc]\d+", record.class_name):
        raise pickle.UnpicklingError(f"it holds an array of {record.class_name}, not of numbers")
    return np.dtype((">" if record.state and record.state[1] == ">" else "<") + record.class_name)


class Array(np.ndarray):
    def __setstate__(self, state):
        _, shape, dtype, fortran, raw = state
        super().__setstate__((1, shape, number_type(dtype), fortran, raw))


def read_pickle(path):
    """What a foreign pickle holds (networks and statistics of EDM and EDM2), without running code of its own.

    It may name only what stands in `known`, and set the state only of Records and Arrays. An object of
    torch_utils.persistence brings its own source; that is dropped, and class name and state are kept."""
    def storage(blob):  # -> flat tensor; torch's own function would unpickle without limits
        found = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
        return torch.empty(0, dtype=found.dtype).set_(found)
    known = {"torch_utils.persistence._reconstruct_persistent_obj":
                 lambda meta: Record(meta["class_name"], meta["state"]),
             "dnnlib.util.EasyDict": dict, "collections.OrderedDict": dict,
             "builtins.set": set, "__builtin__.set": set,
             "torch.device": lambda *place: place,
             "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # bytes, in protocol 2
             "numpy.ndarray": Record, "numpy.dtype": lambda code, *_: Record(code),
             "numpy.multiarray._reconstruct": lambda *_: Array(0),
             "numpy.multiarray.scalar": lambda dtype, raw: np.frombuffer(raw, number_type(dtype))[0],
             "numpy.numeric._frombuffer": lambda raw, dtype, shape, order:
                 np.frombuffer(raw, number_type(dtype)).reshape(shape, order=order),
             "torch.storage._load_from_bytes": storage,
             "torch._utils._rebuild_tensor_v2":  # as_strided checks its bounds
                 lambda flat, offset, size, stride, *_: flat.as_strided(size, stride, offset),
             "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
             **{str(dtype): dtype for dtype in DTYPES.values()}}

    class Unpickler(pickle._Unpickler):  # the one in Python: in C's, BUILD cannot be restricted
        dispatch = dict(pickle._Unpickler.dispatch)

        def find_class(self, module, name):
            full = re.sub(r"^numpy\._?core\.", "numpy.", f"{module}.{name}")  # numpy 1 and 2
            if full not in known and not module.startswith("torch.nn.modules."):
                raise pickle.UnpicklingError(f"it names {module}.{name}, which is not read")
            return known.get(full, Record)

        def load_build(self):
            if not isinstance(self.stack[-2], (Record, Array)):
                raise pickle.UnpicklingError(f"it sets the state of a {type(self.stack[-2]).__name__}")
            super().load_build()
        dispatch[pickle.BUILD[0]] = load_build
    try:
        with open(path, "rb") as file:
            return Unpickler(file).load()
    except Exception as error:  # whatever damage or malice brings about
        fail(f"cannot read {path}: {type(error).__name__}: {str(error)[:100]}")


def module_tensors(record, prefix=""):
    """Record of a module -> {name: float32 tensor}, in the order in which they were defined."""
    own = {**record.state["_parameters"], **record.state["_buffers"]}
    found = {prefix + k: v.float() for k, v in own.items() if v is not None}
    for name, child in record.state["_modules"].items():
        found |= module_tensors(child, f"{prefix}{name}.") if child is not None else {}
    return found


EDM2_NAMES = {"emb_gain": "modulate.gain", "emb_linear": "modulate.linear", "conv_res0": "conv0",
              "conv_res1": "conv1", "conv_skip": "skip", "attn_qkv": "qkv", "attn_proj": "proj"}
EDM2_FIXED = dict(channel_mult_noise=None, channel_mult_emb=None, channels_per_head=64, label_balance=0.5,
                  concat_balance=0.5, res_balance=0.3, attn_balance=0.3, clip_act=256, resample_filter=[1, 1])
DDPMPP_FIXED = dict(model_type="SongUNet", embedding_type="positional", encoder_type="standard",
                    decoder_type="standard", channel_mult_noise=1, channel_mult_emb=4, resample_filter=[1, 1])


def read_edm(path):
    """A snapshot of EDM2's U-Net or EDM's DDPM++ (dict with `ema`) in the form of our checkpoints."""
    try:
        ema = read_pickle(path)["ema"]
        state, kw = module_tensors(ema), ema.state["_init_kwargs"]
        edm2 = {"Precond": True, "EDMPrecond": False}[ema.class_name]
        for name, value in (EDM2_FIXED if edm2 else DDPMPP_FIXED).items():
            if kw.get(name, value) != value:
                raise ValueError(f"{name} {kw[name]}")
        shape, classes = (kw["img_channels"], *[kw["img_resolution"]] * 2), kw.get("label_dim", 0)
        options, weights = (from_edm2 if edm2 else from_ddpmpp)(state, kw)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError) as error:
        fail(f"{path} is no snapshot of EDM2's U-Net or EDM's DDPM++ ({type(error).__name__}: {error})")
    config = {k: v for k, v in options.items() if k in NET_FIELDS} | dict(conditional=classes > 0)
    options |= dict(shape=shape, classes=classes, sigma_d=kw.get("sigma_data", 0.5), head=False)
    return dict(script="edm", config=config, options=options, net=weights, ema=weights, step=0)


def from_edm2(state, kw):
    """Options and weights of UNet: F has the other sign, phases are subtracted, and blocks are counted in the
    order in which they run."""
    options = dict(arch="edm2", channels=kw.get("model_channels", 192), blocks=kw.get("num_blocks", 3),
                   channel_mult=tuple(kw.get("channel_mult", (1, 2, 3, 4))), emb="fourier", c_noise="log",
                   attention=tuple(kw.get("attn_resolutions", (16, 8))), double_norm=False)
    weights = {"cond.embed.freq": state.pop("unet.emb_fourier.freqs"),
               "cond.embed.phase": -state.pop("unet.emb_fourier.phases"),
               "out_gain": -state.pop("unet.out_gain")}
    places = dict(enc=["first", *(f"enc.{i}" for i in range(99))],
                  dec=["mid.0", "mid.1", *(f"dec.{i}" for i in range(99))])
    place, single = {}, dict(emb_noise="cond.linear", emb_label="cond.label", out_conv="last")
    for name, value in state.items():
        part, *rest = name.removeprefix("unet.").split(".")
        if part in places:
            if (part, rest[0]) not in place:
                place[part, rest[0]] = places[part].pop(0)
            rest[0] = place[part, rest[0]]
            rest[1] = EDM2_NAMES.get(rest[1], rest[1])
            weights[".".join(rest)] = value
        elif not part.startswith("logvar"):  # the head of its loss
            weights[single[part] + ".weight"] = value
    return options, weights


def from_ddpmpp(state, kw):
    """Options and weights of DDPMpp, without the embedding of augmentations, whose labels are zero."""
    options = dict(arch="ddpmpp", channels=kw.get("model_channels", 128), blocks=kw.get("num_blocks", 4),
                   channel_mult=tuple(kw.get("channel_mult", (1, 2, 2, 2))), emb="positional", c_noise="log",
                   attention=tuple(kw.get("attn_resolutions", (16,))), double_norm=False)
    weights = {}
    for name, value in state.items():
        name = re.sub(r"^model\.(map_l)", r"cond.\1", name).removeprefix("model.")
        name = re.sub(r"^dec\.\d+x\d+_aux_(norm|conv)", lambda m: dict(norm="norm", conv="last")[m[1]], name)
        if "resample_filter" not in name and "map_augment" not in name:
            weights[name] = value
    return options, weights


def load_net(path, data=None):
    """EMA network of a run, frozen, in eval mode; ends the program if it does not fit the data."""
    ckpt = read_checkpoint(path)
    options = ckpt["options"]
    if data and tuple(options["shape"]) != data.shape:
        fail(f"{path} is a network for data of shape {tuple(options['shape'])}; this data has {data.shape}")
    if data and options["classes"] not in (0, data.classes):
        fail(f"{path} is a network for {options['classes']} classes; this data has {data.classes}")
    try:
        net = build(options)
        net.load_state_dict(ckpt["ema"])
        if "weak" in ckpt:  # sct.py's guidance; in a tuple, so that it is no part of net
            net.weak = (build(options).eval().requires_grad_(False),)
            net.weak[0].load_state_dict(ckpt["weak"])
    except (RuntimeError, TypeError, KeyError, AttributeError):
        fail(f"{path} is damaged, or of another version of this code: its weights do not fit its network")
    return net.eval().requires_grad_(False)


def is_diffusers(path):
    """A folder of diffusers' UNet2DModel, or of a pipeline with one in unet/."""
    configs = Path(path, "config.json"), Path(path, "unet", "config.json")
    return any(file.is_file() and '"UNet2DModel"' in file.read_text() for file in configs)


class Diffusers(nn.Module):
    """A folder of diffusers' UNet2DModel that predicts eps, such as google/ddpm-cifar10-32, as a teacher
    without labels. Angles are turned into its time steps along log(sigma / alpha); beyond its first and last
    it is called with those."""

    def __init__(self, path, sigma_d):
        super().__init__()
        from diffusers import DDPMScheduler, UNet2DModel
        folders = ("unet", "scheduler") if Path(path, "unet").is_dir() else ("", "")
        try:
            self.net, self.sigma_d = UNet2DModel.from_pretrained(Path(path, folders[0])), sigma_d
            scheduler = DDPMScheduler.from_pretrained(Path(path, folders[1]))
        except (OSError, ValueError) as error:
            fail(f"{path} is no complete folder of UNet2DModel and its scheduler: {str(error)[:100]}")
        config = self.net.config
        if config.num_class_embeds or config.class_embed_type or config.out_channels != config.in_channels:
            fail(f"{path} takes labels or predicts variances: only networks without are known")
        if scheduler.config.prediction_type != "epsilon":
            fail(f"{path} predicts {scheduler.config.prediction_type}: only epsilon is known")
        self.options = dict(shape=(config.in_channels, config.sample_size, config.sample_size), classes=0)
        abar = (1 - scheduler.betas.double()).cumprod(0)
        self.register_buffer("log_ratio", (1 / abar - 1).log() / 2)  # log(sigma / alpha), ascending

    def forward(self, x, t, y=None, scale=None):
        t = torch.minimum(t.double(), torch.atan(self.log_ratio[-1].exp() / self.sigma_d))
        ratio = self.sigma_d * t.tan()
        log = ratio.log().clamp(self.log_ratio[0], self.log_ratio[-1])
        i = torch.searchsorted(self.log_ratio, log).clamp(1, len(self.log_ratio) - 1)
        below, above = self.log_ratio[i - 1], self.log_ratio[i]
        time = (i - 1 + (log - below) / (above - below)).float()
        noisy = self.sigma_d * x / like(t.cos(), x)                                  # x_0 + ratio eps
        eps = self.net((noisy * like((1 + ratio**2).rsqrt(), x)).float(), time).sample.to(x.dtype)
        return like(t.cos(), x) * eps - like(t.sin() / self.sigma_d, x) * (noisy - like(ratio, x) * eps)


def load_teacher(cfg, data, device):
    """--teacher: 'exact' (mixtures), a run, a checkpoint, a snapshot of EDM, a UNet2DModel; None for none."""
    if cfg.teacher == "exact" and not isinstance(data, Mixture):
        fail(f"--teacher exact knows only --dataset gmm, not {cfg.dataset}: give a run folder")
    if cfg.teacher == "exact":
        return data
    if is_diffusers(cfg.teacher):
        teacher = Diffusers(cfg.teacher, cfg.sigma_d).eval().requires_grad_(False).to(device)
        if teacher.options["shape"] != data.shape:
            fail(f"{cfg.teacher} is for {teacher.options['shape']}; this data has {data.shape}")
        return teacher
    return load_net(cfg.teacher, data).to(device) if cfg.teacher else None


def load_init(net, cfg, data):
    """Start net from the EMA of --init or --teacher. The weighting head, part of the loss, starts anew."""
    path = init_path(vars(cfg))
    if path:
        source = load_net(path, data)
        state, old = net.state_dict(), source.state_dict()
        new = {k for k in state if ".head_" in k or ".guidance" in k and k not in old}
        for options, parts in ((("emb", "emb_scale", "c_noise"), "cond.embed. cond.linear. cond.map_layer0."),
                               (("double_norm", "norm_shift"), ".modulate.")):  # another form: learned anew
            if any(source.options.get(k) not in (None, net.options[k]) for k in options):
                new |= {k for k in state.keys() | old.keys() for part in parts.split() if part in k}
        keep = {k for k in state.keys() | old.keys() if k not in new and ".head_" not in k}
        for k in sorted(keep):
            if k not in state or k not in old or state[k].shape != old[k].shape:
                fail(f"{path} has another architecture than the flags ask for (at {k})")
        net.load_state_dict({k: old[k] if k in keep else state[k] for k in state})


def dry_run(cfg):
    """--dry_run: data and teacher are opened and checked, the network is built without memory (device meta);
    prints parameters, FLOPs of a forward pass and an estimate of the memory that a process needs."""
    from torch.utils.flop_counter import FlopCounterMode
    start_processes()
    data = dataset(cfg)
    teacher = load_teacher(cfg, data, "cpu")
    with torch.device("meta"):
        net = network(cfg, data)
    own, held = {p.untyped_storage()._cdata for p in net.parameters()}, []
    for n in (1, 2):  # samples; what does not grow with them are weights in other forms
        x, t = torch.zeros(n, *data.shape, device="meta"), torch.zeros(n, device="meta")
        y, stored = torch.zeros(n, dtype=torch.int64, device="meta") if net.options["classes"] else None, {}

        def store(v):
            if v.untyped_storage()._cdata not in own:
                stored[v.untyped_storage()._cdata] = v  # kept alive, so that no two share an address
            return v
        with FlopCounterMode(display=False) as flops, torch.autograd.graph.saved_tensors_hooks(store, store):
            net(x, t, y)
        held.append(sum(v.untyped_storage().nbytes() for v in stored.values()))
    parameters, sample = sum(p.numel() for p in net.parameters()), held[1] - held[0]
    copies = 5 + (teacher is not None and not isinstance(teacher, Mixture))  # net, EMA, gradient, Adam's two
    weights, micro = 4 * copies * parameters + held[0] - sample, cfg.micro or cfg.batch // WORLD
    if RANK:
        return
    print(f"data       {cfg.dataset}, {data.shape}, {data.classes} classes, sigma_d {cfg.sigma_d}")
    print(f"network    {parameters / 1e6:.1f} M parameters; {flops.get_total_flops() / 2e9:.3g} GFLOP for a "
          "sample's forward pass (backward twice that, JVP twice)")
    print(f"memory     {weights / 2**30:.2f} GiB for the weights in {copies} copies, and "
          f"{sample / 2**20:.1f} MiB a sample for its backward pass")
    print(f"a process  {(weights + micro * sample) / 2**30:.2f} GiB with {micro} samples at once; --micro or "
          "--checkpointing lower it")


def make_optimizer(net, cfg):
    kinds = dict(adam=torch.optim.Adam, adamw=torch.optim.AdamW, radam=torch.optim.RAdam)
    return kinds[cfg.optimizer](net.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), eps=cfg.eps)


def learning_rate(step, cfg):
    """Linear warm-up, EDM2's inverse square root beyond lr_ref, linear fall over the last lr_cooldown."""
    lr = cfg.lr / math.sqrt(max(step / cfg.lr_ref, 1)) if cfg.lr_ref else cfg.lr
    lr *= min(1, (step + 1) / cfg.lr_warmup) if cfg.lr_warmup else 1
    left = (1 - step / cfg.steps) / cfg.lr_cooldown if cfg.lr_cooldown else 1
    return lr * min(1, left)


@torch.no_grad()
def lerp(average, net, beta):
    """average <- beta average + (1 - beta) net."""
    pairs = [(a, b) for a, b in zip(average.parameters(), net.parameters()) if a is not b]
    if pairs:  # what the two share, such as SDXL's frozen weights, is its own average
        torch._foreach_lerp_(*map(list, zip(*pairs)), 1 - beta)


def update_ema(ema, net, step, cfg):
    """After step (from 1): the average of half-life ema_halflife, or EDM2's power function of relative width
    ema_sigma_rel, with gamma the largest root of g^3 + 7 g^2 + (16 - width^-2) g + (12 - width^-2) = 0."""
    beta = 0.5 ** (cfg.batch / cfg.ema_halflife)
    if cfg.ema_sigma_rel:
        gamma = np.roots([1, 7, 16 - cfg.ema_sigma_rel**-2, 12 - cfg.ema_sigma_rel**-2]).real.max()
        beta = (1 - 1 / step) ** (gamma + 1)
    lerp(ema, net, beta)


class Run:
    """The mechanics of one training run: processes, device, output folder, log and checkpoints."""

    def __init__(self, cfg):
        self.cfg, self.out, self.bad, self.skipped = cfg, Path(cfg.out), 0, 0
        self.began = time.time()  # moved back by what earlier sittings of a resumed run took
        self.device = start_processes()
        if (self.out / "ckpt.pt").exists() and not cfg.resume and not cfg.overwrite:
            fail(f"{self.out} holds a run already: --resume it, --overwrite it, or choose another --out")
        if cfg.overwrite and self.out.resolve() in (Path(cfg.teacher).resolve(), Path(cfg.init).resolve()):
            fail(f"--overwrite would replace {self.out}, the --teacher or --init: choose another --out")
        barrier()  # nobody writes before everybody has looked
        share, micro = cfg.batch // WORLD, cfg.micro or cfg.batch // WORLD
        self.rows = [(RANK * share + i, RANK * share + i + micro) for i in range(0, share, micro)]

    def wrap(self, net):
        if self.cfg.compile:  # with eager random numbers: the JVP, never compiled, needs the same masks
            net = torch.compile(net, options=dict(fallback_random=True))
        return nn.parallel.DistributedDataParallel(net, broadcast_buffers=False) if WORLD > 1 else net

    def accumulate(self, net, rows):
        """Gradients travel between processes only after the last micro-batch."""
        return net.no_sync() if WORLD > 1 and rows != self.rows[-1] else contextlib.nullcontext()

    def mean(self, value):
        """Mean over the processes of a scalar tensor that each has averaged over its rows."""
        if WORLD > 1:
            dist.all_reduce(value)
        return value / WORLD

    def finite(self, *values):
        """False if the step is to be skipped; 50 such steps running end the run."""
        self.bad = 0 if all(math.isfinite(v) for v in values) else self.bad + 1
        self.skipped += bool(self.bad)
        if self.bad == 50:
            fail(f"stopped: 50 steps running had a non-finite loss or gradient; {self.out} keeps the last "
                 "checkpoint; try a lower --lr, or --dtype fp32")
        return not self.bad

    def resume(self, state):
        """Load everything in `state` from the checkpoint; the step to go on from."""
        ckpt = read_checkpoint(self.out)
        try:
            for name, part in state.items():
                part.load_state_dict(ckpt[name])
            self.began = time.time() - ckpt["seconds"]
        except (RuntimeError, KeyError, ValueError):
            fail(f"{self.out} cannot be resumed with these flags: they change the network or the optimizer")
        if ckpt.get("world", WORLD) != WORLD and RANK == 0:
            print(f"{self.out} was written by {ckpt['world']} processes and goes on with {WORLD}: the same "
                  "data and noise, but sums are rounded in another order, so not bit for bit")
        if ckpt["step"] >= self.cfg.steps:
            print(f"{self.out} is finished, at step {ckpt['step']}; a higher --steps goes on")
        if RANK == 0:  # forget the lines that the checkpoint does not know
            path = self.out / "log.jsonl"
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            lines = [line for line in lines if line.endswith(b"\n")]  # a crash can tear the last
            kept = b"".join(line for line in lines if json.loads(line)["step"] <= ckpt["step"])
            atomic_write(path, lambda file: file.write(kept))
        return ckpt["step"]

    def start(self):
        """config.json and an empty log, once a first step has worked: so a bad flag overwrites nothing."""
        if RANK == 0:
            text = json.dumps(vars(self.cfg), indent=1)
            atomic_write(self.out / "config.json", lambda file: file.write(text.encode()))
            atomic_write(self.out / "log.jsonl", lambda file: None)

    def save(self, state, step):
        """All numbers are drawn from (seed, step, position), so seed and step are the whole RNG state."""
        if RANK:
            return
        ckpt = {name: part.state_dict() for name, part in state.items()}
        ckpt |= dict(script=Path(inspect.getfile(type(self.cfg))).stem, config=vars(self.cfg), step=step,
                     options=state["net"].options, rng=self.cfg.seed, world=WORLD)
        ckpt["seconds"] = time.time() - self.began
        atomic_write(self.out / "ckpt.pt", lambda file: torch.save(ckpt, file))

    def steps(self, start):
        """The training steps, behind a progress bar."""
        self.bar = tqdm(range(start, self.cfg.steps), initial=start, total=self.cfg.steps, disable=RANK > 0,
                        desc=f"{self.out} {self.cfg.mode}", unit="step", dynamic_ncols=True,
                        mininterval=0.5 if sys.stderr.isatty() else 30)
        return self.bar

    def log(self, step, **values):
        """One line of log.jsonl, and the progress bar's tail. Loss and gradient are the global batch's, what
        the method adds is rank 0's last micro-batch's."""
        if RANK:
            return
        values = {k: float(v) for k, v in values.items()}
        seconds = time.time() - self.began
        line = json.dumps(dict(step=step, **values, skipped=self.skipped, seconds=round(seconds, 2),
                               samples_per_s=round(step * self.cfg.batch / seconds, 1)))
        try:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(line + "\n")
        except OSError as error:
            fail(f"cannot write {self.out}/log.jsonl: {error}; the last checkpoint is untouched")
        self.bar.set_postfix({k: f"{v:.3g}" for k, v in values.items() if k in ("loss", "mse", "variance")})


def panels(columns, path, across=0):
    """PNG of titled panels, all side by side or `across` in a row: points (N, 2) as a density, images
    (N, 3, H, W) uint8 as a grid, pictures of Pillow as they are."""
    pictures = [v if isinstance(v, Image.Image) else density(v) if v.ndim == 2 else grid(v)
                for v in columns.values()]
    width, height = (max(sizes) for sizes in zip(*(picture.size for picture in pictures)))
    across = across or len(pictures)
    sheet = Image.new("RGB", (across * (width + 8), -(-len(pictures) // across) * (height + 28)), "white")
    for i, (title, picture) in enumerate(zip(columns, pictures)):
        left, top = i % across * (width + 8) + 4, i // across * (height + 28)
        sheet.paste(picture, (left, top + 24))
        pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
        pen.text((left + width / 2, top + 12), title, "black", font, anchor="mm")
    atomic_write(path, lambda file: sheet.save(file, "PNG"))


def density(points, size=240, half=1.0):
    """Points (N, 2), or (N, 1) as stripes -> their density on [-half, half]^2, white to dark blue on a
    square-root scale."""
    if points.shape[1] == 1:
        points = torch.cat([points.cpu(), torch.linspace(-half, half, len(points))[:, None]], dim=1)
    counts, _, _ = np.histogram2d(*points.cpu().double().numpy().T, bins=size // 2, range=[[-half, half]] * 2)
    level = np.sqrt(np.minimum(counts / (20 * len(points) / (size / 2) ** 2), 1)).T[::-1, :, None]
    shade = 255 * (1 - level) + np.array([20, 40, 110]) * level
    return Image.fromarray(shade.astype(np.uint8)).resize((size, size), Image.NEAREST)


def grid(images, columns=0):
    """uint8 (N, 3, H, W) -> one picture, near-square or of so many columns; small images are enlarged."""
    n, c, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    sheet = np.full((-(-n // columns) * h, columns * w, c), 255, np.uint8)
    for i, image in enumerate(images.cpu().numpy()):
        top, left = i // columns * h, i % columns * w
        sheet[top:top + h, left:left + w] = image.transpose(1, 2, 0)
    zoom = max(1, 48 // h, 96 // sheet.shape[1])
    return Image.fromarray(sheet).resize((sheet.shape[1] * zoom, sheet.shape[0] * zoom), Image.NEAREST)


def energy_distance(a, b):
    """2 E|A - B| - E|A - A'| - E|B - B'| of points (N, d) over all pairs: the V-statistic, never negative."""
    def mean(a, b):  # a thousand rows at a time: memory grows with N, not with its square
        return sum(torch.cdist(rows, b).sum() for rows in a.split(1000)) / (len(a) * len(b))
    a, b = a.double().cpu(), b.double().cpu()
    return float(2 * mean(a, b) - mean(a, a) - mean(b, b))


def frechet_distance(mean1, cov1, mean2, cov2):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) between Gaussians (Heusel et al. 2017), float64.

    The trace of the root is the sum of the roots of the eigenvalues of R C2 R, R = C1^(1/2): symmetric, so
    eigenvalues are real, and rounding below zero, as with singular covariances, is cut off.
    """
    import scipy.linalg  # not needed for training
    values, vectors = scipy.linalg.eigh(cov1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(scipy.linalg.eigvalsh(root @ cov2 @ root), 0)).sum()
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def distance(a, b):
    """Energy distance of points, Frechet distance of images as vectors of pixels."""
    if a.ndim == 2:
        return energy_distance(a, b)
    a, b = (x.flatten(1).double().cpu().numpy() for x in (a, b))
    return frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))


def noise_and_labels(cfg, net, lo, hi, seed, device):
    """For samples lo..hi: noise ~ N(0, sigma_d^2 I) (n, *shape); labels (--label, else 0, 1, 2, ... in turn;
    None if the net takes none); and the Draw that goes on with sample i's own numbers, whatever lo and hi."""
    gen, classes = Draw(seed, 0, lo, hi, device), net.options["classes"]
    noise = cfg.sigma_d * gen.normal(*net.options["shape"])
    labels = torch.arange(lo, hi, device=device) % max(classes, 1)
    labels = torch.full_like(labels, cfg.label) if cfg.label >= 0 else labels
    return noise, labels if classes else None, gen


@torch.no_grad()
def report(cfg, run, step, sample, net, data, teacher, nfes):
    """Pictures and metrics.json of the EMA network at the end of training, and the lines that are printed.

    2-D: energy distance to fresh data of the samples at each number of network evaluations (NFE), of the
    exact ODE's and of other data; ODE error E = RMS per element between the samples of nfes[0] evaluations
    and the exact solution from the same noise. Images: the teacher's Heun samples and those of each NFE.
    """
    if RANK:
        return
    nfes = (35,) if cfg.mode == "diffusion" else nfes
    toy = len(data.shape) == 1
    n = 5000 if toy else 36 if data.shape[0] == 3 and data.shape[1] <= 64 else 4
    noise, y, gen = noise_and_labels(cfg, net, 0, n, 12345, run.device)
    columns, metrics = {}, dict(seconds=round(time.time() - run.began, 1), steps=step)
    if toy:
        fresh = [data.batch(Draw(cfg.seed, 2**32 + i, 0, n, run.device))[0] for i in (0, 1)]  # past any step
        exact = solve(data, noise.double(), ode_times(512, cfg.sigma_d), y, cfg.sigma_d)
        columns = {"data": fresh[0], "exact ODE": exact}
        distance = {"ode": energy_distance(exact, fresh[0]), "data": energy_distance(fresh[1], fresh[0])}
    elif teacher is not None:
        ode = solve(teacher, noise, ode_times(18, cfg.sigma_d), y, cfg.sigma_d)
        columns = {"teacher, 35 NFE": data.to_uint8(ode)}
    for nfe in nfes:
        x = sample(net, noise, y, nfe, cfg, gen)
        columns[f"{cfg.mode}, {nfe} NFE"] = x if toy else data.to_uint8(x)
        if toy:
            distance[str(nfe)] = energy_distance(x, fresh[0])
            metrics.setdefault("ode_error", float((x.double() - exact).square().mean().sqrt()))
    panels(columns, run.out / f"samples-{step:06d}.png")
    if toy:
        metrics["energy_distance"] = distance
        print("energy distance to fresh data:  " + "  ".join(
            f"{k + ' NFE' if k.isdigit() else k} {v:.5f}" for k, v in distance.items()))
        print(f"ODE error E = {metrics['ode_error']:.4f}   (RMS of {nfes[0]} NFE against the exact solution)")
    atomic_write(run.out / "metrics.json", lambda file: file.write(json.dumps(metrics, indent=1).encode()))
    print(f"{step} steps, {metrics['seconds']:.0f} s; wrote {run.out}/samples-{step:06d}.png")


def write_npz(path, x, labels):
    """ADM's .npz: arr_0 points (N, D) or uint8 (N, H, W, 3), arr_1 labels (N,) if there are any."""
    labels = {} if labels is None else dict(arr_1=labels.cpu().numpy())
    array = x.numpy() if x.ndim == 2 else x.permute(0, 2, 3, 1).numpy()
    atomic_write(path, lambda file: np.savez(file, arr_0=array, **labels))


@torch.no_grad()
def write_samples(cfg, sample):
    """--sample N --nfe K: a grid (.png), or ADM's .npz."""
    if RANK:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = load_net(cfg.out).to(device)
    toy, classes = len(net.options["shape"]) == 1, net.options["classes"]
    if cfg.label >= 0 and cfg.label >= classes:
        valid = f"the classes are 0..{classes - 1}" if classes else "the network has no classes"
        fail(f"--label {cfg.label}: {valid}")
    parts, labels = [], []
    for lo in tqdm(range(0, cfg.sample, 1024), desc="sample", disable=None):
        noise, y, gen = noise_and_labels(cfg, net, lo, min(lo + 1024, cfg.sample), cfg.seed, device)
        parts.append(sample(net, noise, y, cfg.nfe, cfg, gen).cpu())
        labels.append(y)
    x = torch.cat(parts)
    path = Path(cfg.save or f"{cfg.out}/samples.png")
    values = x if toy else torch.cat([to_uint8(part.to(device), cfg).cpu() for part in parts])
    if toy:
        fresh, _ = dataset(cfg).batch(Draw(cfg.seed, 2**32, 0, min(len(x), 5000)))
        print(f"energy distance to fresh data, {cfg.nfe} NFE: {energy_distance(x[:5000], fresh):.5f}")
    if path.suffix == ".png":
        panels({f"{cfg.sample} samples, {cfg.nfe} NFE": values}, path)
    else:
        write_npz(path, values, torch.cat(labels) if classes else None)
    print(f"wrote {path}")


if __name__ == "__main__":
    if sys.argv[1:2] != ["latents"]:
        fail("python common.py latents --src IMAGES --out FOLDER encodes images; the rest is a library")
    encode_latents(sys.argv[2:])
