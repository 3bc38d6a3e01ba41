"""Checkpoints -> networks: our runs, snapshots of other projects, diffusers; --init and --teacher."""
from kit.edm import read_edm
from kit.networks import build
from kit.process import fail, reading
from kit.text import Epsilon, TextToImage

import dataclasses
import re
from pathlib import Path

import torch


def read_checkpoint(path):
    """The dict in a run folder's ckpt.pt, or in a file. Loads tensors and plain values only, never code."""
    path = Path(path)
    with reading(f"cannot read {path}"):
        path = path / "ckpt.pt" if path.is_dir() or not path.suffix else path
        if not path.exists():
            inside = [str(p.parent) for p in sorted(path.parent.glob("*/ckpt.pt"))]
            fail(f"no checkpoint at {path}" + (f"; there are runs in {', '.join(inside)}" if inside else ""))
    if path.suffix == ".pkl":
        return read_edm(path)
    with reading(f"{path} is truncated, or no checkpoint"):
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    kinds = dict(script=str, config=dict, options=dict, net=dict, ema=dict, step=int, seconds=float)
    if not isinstance(ckpt, dict) or not all(isinstance(ckpt.get(k), kind) for k, kind in kinds.items()):
        fail(f"{path} was not written by one of these scripts")
    return ckpt


def network(cfg, data, device="cpu", **options):
    """The network for this config and dataset, started from --init or --teacher where that is a run. Further
    options go to its constructor; all of them stay with it as net.options. A dataset may bring a network of
    its own, as captions do."""
    if hasattr(data, "student"):
        net = data.student()
        if init_path(vars(cfg)):
            with reading(f"--init {cfg.init} has other adapters"):
                net.load_state_dict(read_checkpoint(cfg.init)["ema"])
        return net
    own = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.metadata.get("net")}
    options = dict(shape=data.shape, classes=data.classes if cfg.conditional else 0, dropout=cfg.dropout,
                   dropout_res=cfg.dropout_res, dtype=cfg.dtype, **own, **options)
    net = build(options, cfg.seed)
    net.checkpointing = cfg.checkpointing
    if init_path(vars(cfg)):
        load_init(net, cfg, data)
    return net.to(device)


def load_net(path, data=None):
    """The EMA network of a run, frozen, in eval mode, with the networks that its script has added (`extra`).
    Ends the program if it does not fit the data. Of a text-to-image run, it knows the data's captions."""
    ckpt = read_checkpoint(path)
    options, pipeline = ckpt["options"], "pretrained" in ckpt["options"]
    with reading(f"{path} is damaged, or of another version: its weights do not fit its network"):
        if data and tuple(options["shape"]) != data.shape:
            fail(f"{path} is a network for shape {tuple(options['shape'])}; this data has {data.shape}")
        if data and options["classes"] not in (0, data.classes) and not pipeline:
            fail(f"{path} is a network for {options['classes']} classes; this data has {data.classes}")
        net = TextToImage(**options) if pipeline else build(options)
        for name, own in ckpt.get("extra", {}).items():
            net.extra[name] = build(own)
        net.load_state_dict(ckpt["ema"])
        if data and pipeline:
            net.text, net.options["classes"] = data.teacher.text, data.classes
    return net.eval().requires_grad_(False)


def load_teacher(cfg, data, device):
    """--teacher: a run, a checkpoint, EDM's snapshot, a UNet2DModel, or exact, the one that comes with the
    data (the closed form of a mixture, the pipeline of captions); None if there is none."""
    if cfg.teacher == "exact":
        own = getattr(data, "teacher", None)
        return own or fail(f"--teacher exact knows only --dataset gmm, not {cfg.dataset}: give a run folder")
    if not cfg.teacher:
        return None
    if not is_diffusers(cfg.teacher):
        return load_net(cfg.teacher, data).to(device)
    teacher = Diffusers(cfg.teacher, cfg.sigma_d).eval().requires_grad_(False).to(device)
    if teacher.options["shape"] != data.shape:
        fail(f"{cfg.teacher} is for {teacher.options['shape']}; this data has {data.shape}")
    return teacher


def load_init(net, cfg, data):
    """Start net from the EMA of --init or --teacher. The weighting head belongs to the loss and starts anew.
    So does guidance if the source knows none, and an embedding or a modulation whose form has changed."""
    path = init_path(vars(cfg))
    source = load_net(path, data)
    state, old = net.state_dict(), source.state_dict()
    names = {k for k in state.keys() | old.keys() if not k.startswith(("head.", "extra."))}
    anew = {k for k in names if ".guidance" in k and k not in old}
    for options, parts in ((("emb", "emb_scale", "c_noise"), "emb_fourier|emb_noise|map_layer0"),
                           (("double_norm", "norm_shift"), "emb_linear|emb_gain|modulate")):
        if any(source.options.get(k) not in (None, net.options.get(k)) for k in options):
            anew |= {k for k in names if re.search(parts, k)}
    for k in sorted(names - anew):
        if k not in state or k not in old or state[k].shape != old[k].shape:
            fail(f"{path} has another architecture than the flags ask for (at {k})")
    net.load_state_dict(state | {k: old[k] for k in names - anew})


def init_path(values):
    """The run that the network starts from: --init, or a teacher that is a run; "" if there is neither."""
    path = values.get("init") or values.get("teacher") or ""
    return "" if path in ("none", "exact") or is_diffusers(path) else path


def is_diffusers(path):
    """Whether path is a folder of diffusers' UNet2DModel, or of a pipeline with one in unet/."""
    with reading(f"cannot read {path}"):
        configs = Path(path, "config.json"), Path(path, "unet", "config.json")
        return any(file.is_file() and '"UNet2DModel"' in file.read_text() for file in configs)


class Diffusers(Epsilon):
    """diffusers' UNet2DModel that predicts eps, such as google/ddpm-cifar10-32, as a teacher without
    labels."""

    def __init__(self, path, sigma_d):
        from diffusers import DDPMScheduler, UNet2DModel
        folders = ("unet", "scheduler") if Path(path, "unet").is_dir() else ("", "")
        with reading(f"{path} is no complete folder of UNet2DModel and its scheduler"):
            net = UNet2DModel.from_pretrained(Path(path, folders[0]))
            scheduler = DDPMScheduler.from_pretrained(Path(path, folders[1]))
        super().__init__(scheduler.betas, sigma_d)
        self.net, config = net, net.config
        if config.num_class_embeds or config.class_embed_type or config.out_channels != config.in_channels:
            fail(f"{path} takes labels or predicts variances: only networks without are known")
        if scheduler.config.prediction_type != "epsilon":
            fail(f"{path} predicts {scheduler.config.prediction_type}: only epsilon is known")
        self.options = dict(shape=(config.in_channels, config.sample_size, config.sample_size), classes=0)

    def eps(self, z, step, y):
        return self.net(z, step).sample
