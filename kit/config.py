"""The shared flags, the presets of the datasets, the command line."""
from kit.data import Latents, Stored, check_data, cifar10, image_folder, keep_apart, latents, to_uint8
from kit.process import RANK, WORLD, fail
from kit.teachers import init_path, read_checkpoint
from kit.text import Captions
from kit.toys import MIXTURES, SHAPES, Mixture, draw_shapes

import argparse
import dataclasses
import functools
import inspect
import re
from pathlib import Path
from typing import Literal, get_args


def flag(default, **rules):
    """A field of a Config with rules that stand nowhere else:

    least, most   bounds of a number; by default 0, or -10^9 where the default is negative, and 10^9
    change        when it may differ from the stored run's: in "sampling" (the default), on "resume" too,
                  "never", or it belongs to one "call" and is not stored
    implies       its value -> values of other flags, which may not be given others
    unused        the modes in which it has no effect, and is refused
    net           it is an argument of the network's constructor
    form          its value is the method's choice, which is kept when another project's network is finetuned
    inherited     a student takes it over from its teacher
    opens         this call works on the run in --out"""
    return dataclasses.field(default=default, metadata=rules)


fixed, free, call = (functools.partial(flag, change=change) for change in ("never", "resume", "call"))
opens = functools.partial(call, opens=True)
of_net = functools.partial(fixed, net=True, inherited=True)
form = functools.partial(of_net, form=True)
inherited = functools.partial(fixed, inherited=True)


@dataclasses.dataclass
class Config:
    """The flags that all scripts share. Each script adds `mode` and the fields of its method. The comment
    beside a field is its help."""
    foreign = {}  # other projects' consistency models that a script can sample: class -> values of fields
    maker = ""  # the script that makes this one's teachers; "" is itself
    distilling = ()  # the modes that need a teacher; the others may start from one

    dataset: str = fixed("gmm")  # gmm (points in 2-D), shapes (drawn), folder (see --data), or another preset
    size: str = ""  # another size of the preset's network, such as M; "" is its own
    data: str = free("")  # class folders or a zip of images; cifar10: its archive; imagenet512: also latents
    vae: str = ""  # autoencoder of latents, a folder or hub id; "" is the dataset's own
    space: Literal["", "signed", "edm2"] = inherited("")  # latents of pixels in [-1, 1] or (edm2) [0, 1]
    pretrained: str = fixed("", implies=lambda _: dict(dataset="text"))  # text to image: folder or hub id
    lora_rank: int = fixed(64, least=1)  # text to image: rank of the adapters, and their alpha
    first_label: int = fixed(0)  # text to image: label of the first noise level
    prompt: str = call("")  # text to image: what to --sample
    out: str = free("")  # the run's folder; "" is out/SCRIPT (gmm, default mode) or out/SCRIPT-DATASET-MODE
    image_size: int = inherited(0)  # crop and resize images to this many pixels; 0 leaves them as they are
    flip: bool = False  # mirror half of the training images, at random
    conditional: bool = inherited(False)  # train a class-conditional network
    label_dropout: float = fixed(0.0, most=1)  # how often training drops a label, for guidance; 0 is off
    teacher: str = free("")  # run, file, URL, hub id, name (see `help`), or exact; "" is the usual folder's
    init: str = ""  # the run to start from; "" is the teacher, or the usual one; none is random weights
    steps: int = free(4000, least=1)  # optimizer steps
    batch: int = flag(256, least=1, most=2**24)  # samples a step, over all processes
    micro: int = free(0)  # samples that a process takes at once, accumulating gradients; 0 is all that fit
    optimizer: Literal["adam", "adamw", "radam"] = "adam"  # adamw has weight decay 0.01
    lr: float = 1e-3  # highest learning rate
    lr_warmup: int = 0  # steps in which the learning rate rises linearly; 0 is off
    lr_ref: int = 0  # steps after which the learning rate falls with their inverse square root; 0 is off
    lr_cooldown: float = flag(0.0, most=1)  # last share of the steps, in which it falls linearly to 0
    beta2: float = flag(0.99, most=0.99999)  # Adam's decay of the second moment; that of the first is 0.9
    eps: float = 1e-8  # Adam's epsilon
    clip: float = 0.0  # largest norm of the gradient; 0 is off
    dropout: float = flag(0.0, most=0.99)  # dropout rate of the U-Net
    dropout_res: int = 0  # dropout acts only in layers of at most so many pixels a side; 0 is all layers
    ema_sigma_rel: float = flag(0.05, most=0.28)  # width of the power-function EMA; 0 uses ema_halflife
    ema_halflife: float = 5e5  # half-life of the EMA in samples; 0 too is no EMA
    ema_rampup: float = flag(0.0, most=1)  # longest half-life, as a share of the samples seen; 0 is off
    arch: Literal["edm2", "ddpmpp"] = of_net("edm2")  # blocks of the U-Net: EDM2's, or EDM's for CIFAR-10
    channels: int = of_net(64, least=2, most=2**16)  # channels of the first level; for points, of all layers
    channel_mult: tuple = of_net((1, 2))  # channels of each level over --channels; a level halves the image
    blocks: int = of_net(2, least=1, most=1000)  # residual blocks a level; for points, in all
    attention: tuple = of_net((8,))  # resolutions with self-attention
    emb: Literal["positional", "fourier"] = form("positional")  # embedding of the time
    emb_scale: float = form(1.0)  # highest frequency (positional) or bandwidth (fourier) of that embedding
    c_noise: Literal["t", "log"] = form("t")  # what is embedded: t itself, or log(sigma) / 4 as in EDM
    double_norm: bool = form(True)  # adaptive double normalization (sCM); false is EDM2's modulation
    norm_shift: bool = form(True)  # double normalization scales and shifts; false only scales
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # precision of the U-Net's torso
    checkpointing: bool = free(False)  # keep no activations within blocks; on a GPU, set if few samples fit
    compile: bool = free(False)  # apply torch.compile to the passes that have no JVP
    sigma_d: float = of_net(0.5, least=1e-6)  # standard deviation of the data
    seed: int = flag(0, most=2**63 - 1)  # of weights, data, times and noise
    log_every: int = free(100, least=1)  # steps between lines of log.jsonl
    save_every: int = free(1000, least=1)  # steps between checkpoints
    keep_every: int = free(0)  # keep each checkpoint of so many steps, as ckpt-STEP.pt; 0 is off
    sample_every: int = free(10**9, least=1)  # steps between sample pictures while training
    gif: bool = free(True)  # points: samples of each tenth of the training, as an animation
    resume: bool = opens(False)  # go on from the checkpoint in --out; auto: or start anew if there is none
    overwrite: bool = call(False)  # replace the run in --out
    dry_run: bool = call(False)  # check data and teacher, print size, memory and cost, and train nothing
    sample: int = opens(0)  # draw this many samples from the run in --out, instead of training
    nfe: int = call(1, least=1, most=2**20)  # network evaluations a sample
    label: int = call(-1, least=-1)  # class to sample; -1 takes all in turn
    save: str = call("")  # where samples go, a .png or an .npz; "" is samples.png in --out
    export: str = opens("")  # write the averaged network of the run in --out to this folder, as safetensors

    def needs_steps(self):
        """Whether a schedule depends on the number of steps, so that --resume cannot change it."""
        return self.lr_cooldown > 0

    def distills(self):
        """Whether the mode needs a teacher."""
        return self.mode in self.distilling

    def guides_teacher(self):
        """Whether training guides the teacher, which must then predict without label, too."""
        return False

    def begins_from(self):
        """The mode whose finished run this mode goes on from, without --init; "" if it does not need one."""
        return ""

    def trained(self):
        """How many networks of this size are trained."""
        return 1

    def inference(self):
        """What diffusers needs beside a text-to-image run's adapters: scheduler, timesteps, guidance."""
        return {}

    def own_dataset(self, device):
        """Your own data, in a copy of a script; None for those of --dataset. The object has

        shape       (D,) of points, or (C, H, W) of images or latents
        classes     how many; 0 or 1 without labels
        batch(gen)  for a common.Draw: x0 (B, *shape) float32 of standard deviation sigma_d, images in
                    [-1, 1]; and y (B,) int64, -1 for a dropped label, or None
        to_pixels   where x0 are no pixels in [-1, 1]: x0 -> uint8 (B, 3, H, W)
        members     where a loss averages over all of the data, as in kit.data.Stored"""
        return None

    def loss_bytes(self):
        """Bytes that a loss holds for each sample, beside the networks."""
        return 0

    def check(self):
        """Ends the program, by kit.fail, on values that do not go together in this script."""


# ------------------------------------------------------------------------------------------------- presets

EDM2_NET = dict(channels=192, channel_mult=(1, 2, 3, 4), blocks=3, attention=(16, 8), c_noise="log",
                emb="fourier", double_norm=False)
# The learning rate rises over 10 million images. Scripts with --uncertainty learn the loss's weight.
EDM2_RECIPE = dict(batch=2048, optimizer="adam", beta2=0.99, lr_warmup=4883, dtype="fp16", uncertainty=True)
PRESETS = {  # by dataset: its toy defaults, its network, its teachers; a script takes the fields that it has
    "gmm": dict(teacher="exact", lr=2e-3, lr_cooldown=0.7, channels=128, blocks=6),
    "shapes": dict(image_size=16, conditional=True, channels=32, blocks=1, steps=1000, batch=64, lr=2e-3,
                   lr_cooldown=0.5),
    "shapes --mode diffusion": dict(steps=2000, lr=1e-2, lr_warmup=100, P_mean=-1.2, P_std=1.2),
    "folder": dict(conditional=True, steps=500, batch=128, lr=2e-3, lr_cooldown=0.5, channels=32, blocks=1),
    "folder --mode diffusion": dict(steps=3000, lr=1e-2, lr_warmup=100, P_mean=-1.2, P_std=1.2,
                                    label_dropout=0.1),
    # EDM's recipe, in fp32 without TF32, as EDM, ECT and sCM train it. --dry_run prints fp16's time, too.
    # DEPARTS: EDM augments (p = 0.12, nine labels); here --flip at most, as the students are not augmented
    "cifar10": dict(arch="ddpmpp", double_norm=False, channels=128, channel_mult=(2, 2, 2), blocks=4,
                    attention=(16,), optimizer="radam", ema_sigma_rel=0.0, save_every=2500),
    "cifar10 --mode diffusion": dict(batch=512, steps=400_000, lr=1e-3, lr_warmup=19_531, optimizer="adam",
                                     beta2=0.999, ema_halflife=5e5, ema_rampup=0.05, dropout=0.13,
                                     P_mean=-1.2, P_std=1.2),
    "text": dict(teacher="exact", conditional=True, image_size=1024, sigma_d=1.0, optimizer="adamw",
                 beta2=0.999),
    "imagenet64": dict(EDM2_NET, image_size=64, conditional=True, batch=2048, save_every=2500),
    "imagenet64 --mode diffusion": dict(EDM2_RECIPE, lr_ref=35_000, P_mean=-0.8, P_std=1.6),
    "imagenet64 --mode diffusion --init": dict(steps=20_000),  # finetunes another project's network
    "imagenet512": dict(EDM2_NET, conditional=True, batch=2048),
    "imagenet512 --mode diffusion": dict(EDM2_RECIPE, lr_ref=70_000, P_mean=-0.4, P_std=1.0),
    "imagenet512 --mode diffusion --init": dict(steps=20_000),
}
EDM2_TEACHERS = {  # by size: learning rate, dropout, width of the EMA, training in 2^20 images
    "imagenet64": dict(S=(1e-2, 0.0, 0.075, 1024), M=(9e-3, 0.1, 0.06, 2048), L=(8e-3, 0.1, 0.04, 1024),
                       XL=(7e-3, 0.1, 0.04, 640)),
    "imagenet512": dict(S=(1e-2, 0.0, 0.025, 2048), M=(9e-3, 0.1, 0.03, 2048), L=(8e-3, 0.1, 0.015, 1792),
                        XL=(7e-3, 0.1, 0.02, 1280), XXL=(6.5e-3, 0.1, 0.015, 896))}
for name, sizes in EDM2_TEACHERS.items():
    for size, (lr, dropout, width, images) in sizes.items():
        PRESETS[f"{name} --size {size}"] = dict(
            channels=dict(S=192, M=256, L=320, XL=384, XXL=448)[size])
        PRESETS[f"{name} --size {size} --mode diffusion"] = dict(
            lr=lr, dropout=dropout, ema_sigma_rel=width, steps=images * 2**20 // 2048)

# -------------------------------------------------------------------------------------------- command line

def preset(presets, dataset, mode="", size=""):
    """The values of a preset. Later ones count: those of the dataset, its size, its mode, its size and mode,
    and for each of these what PRESETS says, then what the script says."""
    size = f"--size {size or 'S'}"
    keys = dataset, f"{dataset} {size}", f"{dataset} --mode {mode}", f"{dataset} {size} --mode {mode}"
    return {k: v for key in keys for table in (PRESETS, presets) for k, v in table.get(key, {}).items()}


def parse_args(Config, presets, modes, argv=None):
    """Command line -> Config. For each field the last of these counts: the default, the preset, the usual
    teacher, the network of --init or --teacher, the stored run (--resume, --sample), the flag."""
    script = Path(inspect.getfile(Config)).resolve().stem
    fields = {f.name: f for f in dataclasses.fields(Config)}
    flags, unknown = make_parser(Config, script, modes).parse_known_args(argv)
    flags = vars(flags)
    if unknown:
        fail(f"unknown argument {unknown[0]}; the flags are --{', --'.join(fields)}")
    for name, value in flags.items():
        if fields[name].metadata.get("opens") and not value and fields[name].type is not bool:
            fail(f"--{name} {value!r}: give it a value, or leave it out")
    for name in [name for name, value in flags.items() if value]:
        for other, value in fields[name].metadata.get("implies", lambda value: {})(flags[name]).items():
            if flags.setdefault(other, value) != value:
                fail(f"--{name} goes with --{other} {value}, not {flags[other]}")
    name = flags.get("dataset", Config.dataset)
    names = name, flags.get("mode", preset(presets, name).get("mode", Config.mode))
    flags["out"] = flags.get("out") or usual_out(Config, script, *names)
    several = modes.get(names[1], True) is None and any(Path(flags["out"]).glob("*/ckpt.pt"))  # runs in one
    if flags.get("resume") == "auto":
        flags["resume"] = several or Path(flags["out"], "ckpt.pt").exists()
    open_run = any(flags.get(name) for name, field in fields.items() if field.metadata.get("opens"))
    open_run = open_run and not (several and flags.get("resume"))  # the script resumes each of them
    stored = stored_values(Config, script, fields, flags) if open_run else {}
    choice = {name: (stored | flags).get(name, fields[name].default) for name in ("dataset", "mode", "size")}
    sizes = [key.split()[2] for key in presets if key.startswith(f"{choice['dataset']} --size ")]
    datasets = [key for key in presets if " " not in key]
    for name, valid in (("dataset", datasets), ("mode", list(modes)), ("size", ["", *dict.fromkeys(sizes)])):
        if choice[name] not in valid:
            valid = ", ".join(filter(None, valid)) or "the default"
            fail(f"unknown {name} {choice[name]!r}; the {name}s are {valid}")
    values = preset(presets, **choice)
    if not stored:
        values |= usual_teacher(script, make_config(Config, values | flags))
        values |= usual_init(Config, script, make_config(Config, values | flags))
    source = init_path(values | flags)
    if source and not stored:
        known = read_checkpoint(source)
        finetunes = choice["mode"] == "diffusion" and known.get("foreign")
        values |= PRESETS.get(f"{choice['dataset']} --mode diffusion --init", {}) if finetunes else {}
        values |= {name: value for name, value in known["config"].items() if name in fields
                   and fields[name].metadata.get("inherited")
                   and not (finetunes and fields[name].metadata.get("form"))}
    cfg = make_config(Config, values | stored | flags)
    for name, value in flags.items():
        if cfg.mode in fields[name].metadata.get("unused", "").split() and value != fields[name].default:
            fail(f"--{name} has no effect in --mode {cfg.mode}")
    anew = cfg.init == "none" and "init" not in flags and not (cfg.distills() or stored)
    if anew and flags.get("teacher", "exact") != "exact":
        fail(f"--mode {cfg.mode} has no --teacher here, but can start from a run: --init RUN")
    check_values(cfg, fields)
    cfg.check()
    return cfg


def stored_values(Config, script, fields, flags):
    """What the run in --out has kept. Ends the program if a flag would change what it may not."""
    ckpt = read_checkpoint(flags["out"])
    if ckpt["script"] != script and not foreign_values(Config, ckpt):
        maker = f"another project ({ckpt['script']})" if ckpt.get("foreign") else f"{ckpt['script']}.py"
        fail(f"{flags['out']} was written by {maker}: run the script that knows it")
    kept = ckpt["config"] | foreign_values(Config, ckpt)
    kept = {k: v for k, v in kept.items() if k in fields and fields[k].metadata.get("change") != "call"}
    for name, value in flags.items():
        change = fields[name].metadata.get("change", "sampling")
        may = change in ("call", "resume") if flags.get("resume") else change != "never"
        if name == "steps" and make_config(Config, kept).needs_steps():
            may = False
        if not may and value != kept.get(name, value):
            fail(f"{flags['out']} was trained with --{name} {kept[name]}: it cannot become {value}; a new "
                 "run that starts from it, with --init, may have other flags")
    return kept


def foreign_values(Config, ckpt):
    """What a script samples another project's network with; {} for its own runs, and if it cannot."""
    if ckpt.get("foreign") and ckpt["config"]["mode"] == "diffusion":  # of scripts that have this mode
        return dict(dataset="imagenet512" if ckpt["config"].get("space") else "folder")
    return Config.foreign.get(ckpt["script"], {})


def usual_out(Config, script, dataset, mode):
    """The folder of a run without --out."""
    short = (dataset, mode) == (Config.dataset, Config.mode)
    return f"out/{script}" if short else f"out/{script}-{dataset}-{mode}"


def usual_init(Config, script, cfg):
    """What a mode that goes on from another mode's run starts from, if no flag names it: that mode's usual
    folder."""
    mode = cfg.begins_from()
    if not mode or cfg.init:
        return {}
    folder = usual_out(Config, script, cfg.dataset, mode)
    if not Path(folder, "ckpt.pt").exists():
        flags = "" if folder == f"out/{script}" else f" --dataset {cfg.dataset} --mode {mode}{data_flag(cfg)}"
        fail(f"--mode {cfg.mode} goes on from a run of --mode {mode}, and there is none in {folder}: make it "
             f"with python {script}.py{flags}, or give --init RUN, or none to start anew")
    if RANK == 0 and not cfg.dry_run:
        print(f"--init {folder}, as none was given")
    return dict(init=folder)


def usual_teacher(script, cfg):
    """The teacher, or what a mode without one starts from, if no flag and no preset names it: the run in
    out/SCRIPT-DATASET-diffusion, or in another script's folder of that kind if there is just one."""
    name = "teacher" if cfg.distills() else "init"
    if cfg.mode == "diffusion" or cfg.teacher or name == "init" and cfg.init:
        return {}
    runs = sorted(Path("out").glob(f"*-{cfg.dataset}-diffusion/ckpt.pt"))
    own = Path(f"out/{script}-{cfg.dataset}-diffusion/ckpt.pt")
    if own in runs or len(runs) == 1:
        found = (own if own in runs else runs[0]).parent
        if RANK == 0 and not cfg.dry_run:
            print(f"--{name} {found}, as none was given")
        return {name: str(found)}
    if name == "teacher":
        make = f"python {cfg.maker or script}.py --dataset {cfg.dataset} --mode diffusion{data_flag(cfg)}"
        fail(f"--mode {cfg.mode} distills a teacher, and there is none in {own.parent}: make it with {make}, "
             "or give --teacher RUN")
    return {}


def data_flag(cfg):
    return "" if cfg.dataset in (*MIXTURES, "shapes", "cifar10") else f" --data {cfg.data or 'PATH'}"


def make_config(Config, values):
    """Config from those of the values that it knows. Ends the program if one has the wrong type, as it may
    have in a damaged checkpoint."""
    for field in dataclasses.fields(Config):
        kinds = (float, int) if field.type is float else field.type
        value = values.get(field.name, field.default)
        if not (value in get_args(kinds) if get_args(kinds) else isinstance(value, kinds)):
            fail(f"--{field.name} cannot be {value!r}")
    return Config(**{f.name: values[f.name] for f in dataclasses.fields(Config) if f.name in values})


def make_parser(Config, script, modes):
    """A parser with a flag for each field. Its help is the comment beside the field, the method's first."""
    parser = argparse.ArgumentParser(script + ".py", usage=argparse.SUPPRESS, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS,
                                     description="--mode is one of " + ", ".join(modes))
    parser.error = fail
    own = parser.add_argument_group(f"flags of {script}.py")
    shared = parser.add_argument_group("flags of all scripts")
    *_, base, _ = Config.__mro__  # kit.Config, object
    comment = {}
    for owner in reversed(Config.__mro__[:-1]):
        comment |= dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(owner), re.M))
    for field in dataclasses.fields(Config):
        group = shared if field.name in base.__dataclass_fields__ else own
        default = ",".join(map(str, field.default)) if field.type is tuple else field.default
        choices = get_args(field.type) or None
        reader = {bool: read_bool, tuple: read_numbers}.get(field.type, field.type)
        group.add_argument("--" + field.name, choices=choices,
                           metavar="|".join(filter(None, choices or [field.name.upper()])),
                           help=f"{comment.get(field.name, '')} [{default}]".replace("%", "%%"),
                           type=str if choices else reader,
                           **(dict(nargs="?", const=True) if field.type is bool else {}))
    return parser


def read_bool(text):
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "auto": "auto"}
    if text.lower() not in known:  # auto is of --resume alone
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return known[text.lower()]


def read_numbers(text):
    try:
        return tuple(int(part) if part.isdigit() else float(part) for part in text.split(",") if part)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes numbers such as 1,2,2, not {text!r}") from None


def check_values(cfg, fields):
    """Ends the program on values that no run can use, in any script."""
    for name, field in fields.items():
        value, number = getattr(cfg, name), field.type in (int, float)
        least = field.metadata.get("least", -10**9 if number and field.default < 0 else 0)
        most = field.metadata.get("most", 10**9)
        if number and not least <= value <= most:  # nan is not, either
            bound = f"at least {least}" if value < least else f"at most {most}"
            fail(f"--{name} must be {bound}, not {value}")
        if field.type is tuple and not all(abs(v) <= 10**9 for v in value):
            fail(f"--{name} takes numbers up to 10^9, not {value}")
    if cfg.channels % 2:
        fail(f"--channels must be even, not {cfg.channels}")
    if not cfg.channel_mult or not all(type(m) is int and m > 0 for m in cfg.channel_mult):
        fail("--channel_mult takes whole numbers above 0, such as 1,2,2")
    if cfg.init == "exact" or cfg.teacher == "none":
        fail("--init is a run, or none for random weights; --teacher is a run, or exact")
    if cfg.guides_teacher() and not cfg.conditional:
        fail("guidance compares with no label, so it needs --conditional")
    if cfg.prompt and not cfg.pretrained:
        fail("--prompt is what a run with --pretrained samples")
    if cfg.flip and cfg.dataset in MIXTURES:
        fail("--flip mirrors images, and --dataset gmm has points")
    if cfg.batch % (WORLD * (cfg.micro or 1)):
        fail(f"--batch {cfg.batch} must be a multiple of processes x --micro, {WORLD} x {cfg.micro or 1}")
    opened = {name for name, field in fields.items() if field.metadata.get("opens") and getattr(cfg, name)}
    if cfg.label >= 0 and not opened - {"resume"}:
        fail("--label chooses what to --sample; training takes all classes")
    opened = opened - {"resume"} | {"dry_run"} if cfg.dry_run else opened
    if len(opened) > 1:
        fail(f"--{' and --'.join(sorted(opened))} are different things to do with a run: one at a time")
    if cfg.resume and cfg.overwrite:
        fail("--resume goes on with the run in --out, --overwrite replaces it: give one of them")
    if cfg.save and Path(cfg.save).suffix not in (".png", ".npz"):
        fail(f"--save takes a .png or a .npz file, not {cfg.save}")
    keep_apart("--save", cfg.save, cfg.data)


# ------------------------------------------------------------------------------------------------ datasets

def kind(name):
    """The class of the dataset of this name."""
    return Mixture if name in MIXTURES else dict(text=Captions, imagenet512=Latents).get(name, Stored)


def dataset(cfg, device="cpu"):
    """The dataset that cfg names: an object with shape, classes, batch(gen) and, of images, to_pixels(x)."""
    own = cfg.own_dataset(device) if hasattr(cfg, "own_dataset") else None
    if own is not None:
        check_data(own, cfg, device)
        return own
    if kind(cfg.dataset) is Mixture:
        return MIXTURES[cfg.dataset](cfg).to(device)
    if kind(cfg.dataset) is Captions:
        return Captions(cfg, device)
    if kind(cfg.dataset) is Latents:
        return Latents(cfg, *latents(cfg, device))
    if cfg.dataset == "shapes":
        return Stored(cfg, *draw_shapes(cfg), SHAPES)
    return Stored(cfg, *(cifar10 if cfg.dataset == "cifar10" else image_folder)(cfg))


def to_pixels(x, cfg):
    """x0 as uint8 pixels (B, C, H, W), without the data if they are not your own; points stay points."""
    if not x.isfinite().all():
        fail("the samples are not finite numbers: the network, or a flag of the sampler, is out of bounds")
    own = cfg.own_dataset(x.device)
    if own is None:
        return kind(cfg.dataset).pixels(x, cfg)
    return own.to_pixels(x) if hasattr(own, "to_pixels") else x if x.ndim == 2 else to_uint8(x)
