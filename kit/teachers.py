"""Checkpoints -> networks: our runs, snapshots of other projects, diffusers; --init and --teacher."""
from kit.edm import PUBLISHED, read_edm
from kit.layers import freeze
from kit.networks import build
from kit.process import download, fail, reading, start_processes
from kit.text import Epsilon, TextToImage

import dataclasses
import functools
import hashlib
import math
import re
import urllib.parse
import warnings
import zipfile
from pathlib import Path

import torch
from torch import nn


KNOWN_NAMES = f"the known names are {', '.join(PUBLISHED)}"


def find(source):
    """What --teacher, --init and --out may name, as a local path, or as a hub id for diffusers: a folder, a
    file, an http(s) URL, one of NVIDIA's names, or a hub id. Files are downloaded once, to data/teachers."""
    source = str(source)
    with reading(f"cannot read {source}"):
        there = Path(source).exists()
    if there:
        return Path(source)
    if source in PUBLISHED or re.match("https?://", source):
        url = PUBLISHED.get(source, source)
        with reading(f"{url} is no URL"):
            name = Path(urllib.parse.urlparse(url).path).name
        if source not in PUBLISHED:  # other files have the same name: each run's is ckpt.pt
            name = f"{hashlib.sha1(url.encode()).hexdigest()[:8]}-{name}"
        path = Path("data/teachers", name)
        start_processes()  # the others wait for rank 0
        download(url, path)
        return path
    if source == "help":
        fail(f"{KNOWN_NAMES}; a run's folder, a file, a URL and a hub id of diffusers will do as well")
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not source.startswith("out/")
    if hub_id and not Path(source).parent.exists():
        return source
    return Path(source)


def read_checkpoint(source):
    """The checkpoint in a run's folder or a file, or a dict in that form for whatever else `find` knows: its
    `script`, or the class of another project's network; `config`, with its mode and what a student takes
    over; `options` of the network; `ema`, its weights. Loads tensors and plain values only, never code."""
    path = find(source)
    if is_diffusers(path):
        return read_diffusers(path)
    with reading(f"cannot read {path}"):
        path = path if path.is_file() or path.suffix and not path.is_dir() else path / "ckpt.pt"
        if not path.exists():
            inside = [str(p.parent) for p in sorted(path.parent.glob("*/ckpt.pt"))]
            hint = "train it first" if path.parts[0] == "out" else KNOWN_NAMES
            fail(f"no checkpoint at {path}; {'there are runs in ' + ', '.join(inside) if inside else hint}")
    stamp = path.stat()
    return dict(read_file(path, stamp.st_mtime_ns, stamp.st_size))


MAPPED = 2**28  # bytes from which on a checkpoint is mapped into memory, where processes share what they use


@functools.lru_cache(maxsize=1)
def read_file(path, *stamp):
    """The last file is remembered, because config, network and teacher ask for it in turn. `stamp` is the
    file's time and size."""
    if path.suffix == ".pkl":
        return read_edm(path)
    anew = "; delete it to download it anew" if path.parent == Path("data/teachers") else ""
    with reading(f"{path} is truncated, or no checkpoint{anew}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about the protocol of what it then refuses
        mapped = stamp[1] >= MAPPED and zipfile.is_zipfile(path)
        ckpt = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    kinds = dict(script=str, config=dict, options=dict, net=dict, ema=dict, step=int, seconds=float,
                 made_from=dict, extra=dict, frames=dict, micro=int, world=int)
    ours = isinstance(ckpt, dict) and all(isinstance(ckpt.get(k), kind) for k, kind in kinds.items())
    if not ours or not (ckpt["step"] >= 0 and 0 <= ckpt["seconds"] < math.inf):
        fail(f"{path} was not written by one of these scripts")
    return ckpt


def network(cfg, data, device="cpu", **options):
    """The network for this config and dataset, started from --init or --teacher where that is a run. Further
    options go to its constructor; all of them stay with it as net.options. A dataset may bring a network of
    its own, as captions do."""
    if hasattr(data, "student"):
        net = data.student()
        if init_path(vars(cfg)) and not cfg.resume:
            with reading(f"--init {cfg.init} has other adapters"):
                net.load_state_dict(read_checkpoint(cfg.init)["ema"])
        return net
    own = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.metadata.get("net")}
    options = dict(shape=data.shape, classes=data.classes if cfg.conditional else 0, dropout=cfg.dropout,
                   dropout_res=cfg.dropout_res, dtype=cfg.dtype, **own, **options)
    net = build(options, cfg.seed)
    net.checkpointing = cfg.checkpointing
    if init_path(vars(cfg)) and not cfg.resume:  # a checkpoint has all that came of it
        load_init(net, cfg, data)
    return net.to(device)


def load_net(path, data=None, sigma_d=0.5, device="cpu"):
    """The EMA network of a run, or another project's, frozen, in eval mode, with the networks that its script
    has added (`extra`). Ends the program if it does not fit the data. Of a text-to-image run, it knows the
    data's captions. sigma_d is that of the caller's coordinates, for networks that have none of their own."""
    ckpt = read_checkpoint(path)
    options, pipeline = ckpt["options"], "pretrained" in ckpt["options"]
    with reading(f"{path} is damaged, or of another version: its weights do not fit its network"):
        if data and not pipeline:
            check_fit(path, ckpt, data, sigma_d)
        if "diffusers" in options:
            kind = DiffusersCM if ckpt["config"]["mode"] == "consistency" else Diffusers
            net = kind(**options, sigma_d=sigma_d)
        elif pipeline:
            net = TextToImage(**options)
            net.load_state_dict(ckpt["ema"])
        else:
            with torch.device("meta"):  # without memory; the weights go from the file to the device
                net = build(options)
                net.extra.update({name: build(own) for name, own in ckpt.get("extra", {}).items()})
            net.load_state_dict({k: v.to(device, copy=True) for k, v in ckpt["ema"].items()}, assign=True)
        if data and pipeline:
            net.text, net.options["classes"] = data.teacher.text, data.classes
    return net.to(device).eval().requires_grad_(False)


def check_fit(path, ckpt, data, sigma_d):
    """Ends the program if a checkpoint is for other samples, other classes, or latents or pixels of another
    scale than the data."""
    options, space = ckpt["options"], ckpt["config"].get("space")
    names = ckpt.get("made_from", {}).get("classes")
    if tuple(options["shape"]) != data.shape:
        fail(f"{path} is a network for shape {tuple(options['shape'])}; this data has {data.shape}")
    if options["classes"] not in (0, data.classes):
        fail(f"{path} is a network for {options['classes']} classes; this data has {data.classes}")
    if options["classes"] and names and getattr(data, "names", None) and names != data.names:
        fail(f"{path} was trained with the classes {shorten(names)}; this data has {shorten(data.names)}, so "
             "labels would mean something else")
    if options.get("sigma_d", sigma_d) != sigma_d:
        fail(f"{path} is a network for --sigma_d {options['sigma_d']}, not {sigma_d}")
    if space and getattr(data, "space", space) != space:
        fail(f"{path} knows latents normalized as {space}, and this data's are {data.space}: encode the "
             f"images for it, with --space {space} --data IMAGES")


def shorten(names):
    return ", ".join(names[:6]) + f", .. ({len(names)} in all)" * (len(names) > 6)


def load_teacher(cfg, data, device):
    """--teacher: whatever `find` knows, or exact, the one that comes with the data (the closed form of a
    mixture, the pipeline of captions); None if there is none."""
    if cfg.teacher == "exact":
        own = getattr(data, "teacher", None)
        if own is None and cfg.distills():
            fail("--teacher exact is for mixtures and pipelines, such as --dataset gmm, not for the data of "
                 f"--dataset {cfg.dataset}: give a run folder")
        return own
    if not cfg.teacher:
        return None
    ckpt = read_checkpoint(cfg.teacher)
    known, options = ckpt["config"], ckpt["options"]
    if "diffusers" in options and options["classes"] and not cfg.conditional:
        fail(f"--teacher {cfg.teacher} always takes a label: add --conditional")
    if cfg.distills() and known.get("mode", "diffusion") != "diffusion":
        fail(f"--teacher {cfg.teacher} is no diffusion model, but of --mode {known['mode']}: to go on from "
             "it, give it with --init")
    if cfg.distills() and (cfg.guides_teacher() or cfg.label_dropout) and not known.get("label_dropout"):
        fail(f"--teacher {cfg.teacher} was never trained without label, and guidance or --label_dropout asks "
             "it for that: make one with --mode diffusion --label_dropout 0.1, from this one by --init")
    net = freeze(load_net(cfg.teacher, data, cfg.sigma_d, device))
    if "diffusers" not in options and (cfg.compile or torch.device(device).type == "cuda"):
        with torch.no_grad():  # weights are laid out now, before anything is compiled and free memory counted
            net(torch.zeros(1, *options["shape"], device=device), torch.zeros(1, device=device))
    if cfg.compile and "diffusers" not in options:
        net.compile()
    return net


def load_init(net, cfg, data):
    """Start net from the EMA of --init or --teacher. The weighting head belongs to the loss and starts anew.
    So does guidance if the source knows none, and an embedding or a modulation whose form has changed."""
    path = init_path(vars(cfg))
    source = load_net(path, data, cfg.sigma_d)
    state, old = net.state_dict(), source.state_dict()
    names = {k for k in state.keys() | old.keys() if not k.startswith(("head.", "extra."))}
    anew = {k for k in names if ".guidance" in k and k not in old}
    for options, parts in ((("emb", "emb_scale", "c_noise"), "emb_fourier|emb_noise|map_layer0"),
                           (("double_norm", "norm_shift"), "emb_linear|emb_gain|modulate")):
        if any(source.options.get(k) not in (None, net.options.get(k)) for k in options):
            anew |= {k for k in names if re.search(parts, k)}
    for k in sorted(names - anew):
        if k not in state or k not in old or state[k].shape != old[k].shape:
            hint = ", which knows strengths of guidance: give its --guidance_max" * (".guidance" in k)
            fail(f"{path} has another architecture than the flags ask for (at {k}{hint})")
    if not next(net.parameters()).is_meta:  # as in --dry_run
        net.load_state_dict(state | {k: old[k] for k in names - anew})


def init_path(values):
    """The run that the network starts from: --init, or a teacher that is a run; "" if there is neither."""
    path = values.get("init") or values.get("teacher") or ""
    if path in ("", "none", "exact") or not is_diffusers(find(path)):
        return "" if path in ("none", "exact") else path
    if values.get("init"):
        fail(f"--init {path}: a UNet2DModel has another architecture, so it can only be a --teacher")
    return ""


def is_diffusers(path):
    """Whether this is a folder of diffusers' UNet2DModel, or of a pipeline with one in unet/, or a hub id."""
    if isinstance(path, str):
        return True
    with reading(f"cannot read {path}"):
        configs = Path(path, "config.json"), Path(path, "unet", "config.json")
        return any(file.is_file() and '"UNet2DModel"' in file.read_text() for file in configs)


def read_diffusers(path):
    """A UNet2DModel of a folder or the hub in the form of our checkpoints, but for the weights, which its own
    library loads. The name of its scheduler stands for the script."""
    from diffusers import DDPMScheduler, UNet2DModel
    from huggingface_hub.utils import logging
    logging.set_verbosity_error()  # without network, it would report each of its tries
    with reading(f"{path} is neither on the hub, nor in its cache, nor a complete folder of UNet2DModel and "
                 "its scheduler: download it from https://huggingface.co and give the folder"):
        try:
            net, parts = UNet2DModel.load_config(path, subfolder="unet"), ("unet", "scheduler")
        except OSError:
            net, parts = UNet2DModel.load_config(path), ("", "")
        scheduler = DDPMScheduler.load_config(path, subfolder=parts[1])
    classes, size = net.get("num_class_embeds") or 0, net["sample_size"]
    if net.get("class_embed_type") not in (None, "learned") or net["out_channels"] % net["in_channels"]:
        fail(f"{path} embeds labels, or has outputs, of a kind that is not known")
    kind = scheduler["_class_name"]
    options = dict(diffusers=str(path), parts=parts, shape=(net["in_channels"], size, size), classes=classes)
    config = dict(conditional=classes > 0, label_dropout=0.0, image_size=size)
    config["mode"] = "consistency" if kind == "CMStochasticIterativeScheduler" else "diffusion"
    return dict(script=kind, foreign=True, config=config, options=options, net={}, ema={}, step=0,
                seconds=0.0)


class Diffusers(Epsilon):
    """diffusers' UNet2DModel that predicts eps or v, such as google/ddpm-cifar10-32, as F = net(x, t, y). Of
    learned variances the mean is used."""

    def __init__(self, diffusers, parts, shape, classes, sigma_d):
        from diffusers import DDPMScheduler
        scheduler = DDPMScheduler.from_pretrained(diffusers, subfolder=parts[1])
        super().__init__(scheduler.betas, sigma_d, scheduler.config.prediction_type)
        self.net, self.options = load_unet(diffusers, parts[0]), dict(shape=shape, classes=classes)

    def eps(self, z, step, y):
        return self.net(z, step, y if self.options["classes"] else None).sample[:, :z.shape[1]]


class DiffusersCM(nn.Module):
    """One of OpenAI's consistency models, such as openai/diffusers-cd_imagenet64_l2, as F = net(x, t, y). Its
    input is EDM's, which is ours, and its F is EDM's, which has the other sign."""

    def __init__(self, diffusers, parts, shape, classes, sigma_d):
        super().__init__()
        self.net, self.sigma_d = load_unet(diffusers, parts[0]), sigma_d
        self.options = dict(shape=shape, classes=classes)

    def forward(self, x, t, y=None, guidance=None):
        time = 250 * torch.log(self.sigma_d * t.double().tan() + 1e-44)
        return -self.net(x.float(), time.float(), y if self.options["classes"] else None).sample.to(x.dtype)


def load_unet(path, part):
    from diffusers import UNet2DModel
    return UNet2DModel.from_pretrained(path, subfolder=part)
