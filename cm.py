"""CM: consistency models by distillation and from data, discrete and continuous in time; zero-shot editing.
Song, Dhariwal, Chen & Sutskever, "Consistency Models", 2023; iCT: Song & Dhariwal, "Improved Techniques for
Training Consistency Models", 2024.

process           x_t = x_0 + t z,  z ~ N(0, I),  t the noise level in [0.002, 80] (EDM's sigma)
PF-ODE            dx_t/dt = (x_t - D(x_t, t)) / t,  D the denoiser E[x_0 | x_t]
consistency       f(x_t, t) = c_skip(t) x_t + c_out(t) F(c_in(t) x_t, t),  f(x, 0.002) = x
loss              lambda(t) d(f(x_t, t), f^-(x_s, s)),  s < t neighbours of a grid with N points
  cd              x_s is one solver step of the teacher from x_t;   ct, ict: x_s = x_0 + s z, the same z
  ctcd, ctct      N -> infinity: f(x_t, t)^T sg(df^-/dt), with dx_t/dt the teacher's or (x_t - x_0) / t
f^- is f of the target: the average of the weights with decay mu, or, at mu = 0, the live network under
stop-gradient (CIFAR-10's cd, and ict).

    python cm.py                                                toy: 8 Gaussians, exact teacher, cd
    python cm.py --dataset folder --data PATH --image_size 16 --mode cd --teacher out/teacher --out out/cd
    python cm.py --sample 64 --nfe 2 --out out/cd --sigmas 80,1.4
    python cm.py --search --nfe 3 --out out/cd                  finds good levels
    python cm.py --edit inpaint --input a.png --mask m.png --out out/cd
    torchrun --nproc_per_node=8 cm.py --dataset cifar10 --mode ict
"""
# ------------------------------------------------------------------------------------------------- imports
import copy
import functools
import math
import sys
from dataclasses import dataclass, replace
from typing import Literal

import torch

import common
from common import like


# -------------------------------------------------------------------------------------------------- Config
@dataclass
class Config:
    dataset: str = "gmm"  # gmm (2-D), shapes, folder (--data), or another of PRESETS
    mode: str = "cd"  # training objective, see --help's first lines
    size: str = ""  # other size of the preset's network, such as M; "" = its own
    data: str = ""  # class folders or EDM-style zip; cifar-10-binary.tar.gz (cifar10); latents (imagenet512)
    vae: str = ""  # autoencoder of latents, a folder or hub id; "" = the dataset's own
    out: str = ""  # the run's folder; "" = out/<script>
    image_size: int = 0  # crop and resize images to this many pixels; 0 = as they are
    conditional: bool = False  # class-conditional network
    label_dropout: float = 0.0  # probability of training without the label, for guidance
    teacher: str = ""  # exact (gmm), a run's folder or checkpoint file; "" = none
    init: str = ""  # run to start from; "" = the teacher if it is a run, none = random weights
    steps: int = 4000  # optimizer steps
    batch: int = 256  # global batch, in samples
    micro: int = 0  # most samples a process takes at once (gradient accumulation); 0 = all
    optimizer: Literal["adam", "adamw", "radam"] = "adam"  # adamw: weight decay 0.01
    lr: float = 1e-3  # peak learning rate
    lr_warmup: int = 0  # steps of linear warm-up; 0 = off
    lr_ref: int = 0  # steps after which lr falls with the inverse square root; 0 = off
    lr_cooldown: float = 0.0  # last share of the steps, in which lr falls linearly to 0; 0 = off
    beta2: float = 0.99  # Adam's second moment; the first is 0.9
    eps: float = 1e-8  # Adam's epsilon
    clip: float = 0.0  # gradient norm clipping; 0 = off
    dropout: float = 0.0  # in residual blocks; of the U-Net above 32 pixels, at 16 and below; 0 = off
    ema_sigma_rel: float = 0.05  # width of the power-function EMA, relative to training; 0 = use ema_halflife
    ema_halflife: float = 5e5  # half-life of the EMA in samples
    arch: Literal["edm2", "ddpmpp"] = "edm2"  # the U-Net: EDM2's, or DDPM++ as in EDM's CIFAR-10 runs
    channels: int = 64  # width of the first level (of all blocks in 2-D)
    channel_mult: tuple = (1, 2)  # width of each level over channels; a level halves the image
    blocks: int = 2  # residual blocks a level (in all, in 2-D)
    attention: tuple = (8,)  # resolutions with self-attention
    emb: Literal["positional", "fourier"] = "positional"  # time embedding: positional or fourier
    emb_scale: float = 1.0  # highest frequency (positional), bandwidth (fourier)
    c_noise: Literal["t", "log"] = "t"  # what is embedded: t itself, or log(sigma)/4 as in EDM
    double_norm: bool = True  # adaptive double normalization; false = EDM2's modulation
    norm_shift: bool = True  # double normalization scales and shifts; false = scales, as EDM2's layers
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the U-Net's torso
    checkpointing: bool = False  # store no activations within blocks: less memory, a third more time
    compile: bool = False  # torch.compile the passes that have no JVP
    sigma_d: float = 0.5  # standard deviation of the data
    seed: int = 0  # of weights, data, times and noise
    log_every: int = 100  # steps between lines of log.jsonl
    save_every: int = 1000  # steps between checkpoints
    sample_every: int = 10**9  # steps between sample pictures while training
    resume: bool = False  # go on from the last checkpoint in --out
    overwrite: bool = False  # replace the run in --out
    dry_run: bool = False  # check data and teacher, print size, memory and cost; train nothing
    sample: int = 0  # draw this many samples from the run in --out, instead of training
    nfe: int = 1  # network evaluations a sample
    label: int = -1  # class to sample; -1 = all in turn
    save: str = ""  # .png or .npz to write samples to; "" = samples.png in --out
    # --- method
    P_mean: float = -1.1  # mean of log t: diffusion, and ict's distribution over the grid
    P_std: float = 2.0  # its standard deviation
    scales: int = 18  # N, the points of cd's grid; s1, the intervals of ct's and ict's at the end
    scales_start: int = 2  # s0: ct starts with s0 points, ict with s0 + 1
    mu: float = 0.0  # decay of the target's average (ct: at the start); 0 = the live network
    solver: Literal["heun", "euler", "ddim"] = "heun"  # of cd; euler = ddim in these coordinates
    metric: Literal["l1", "l2", "huber", "lpips"] = "l2"  # d(a, b)
    sigmas: tuple = (80.0, 0.8)  # noise levels of the sampler; beyond these, --nfe levels of EDM's grid
    search: bool = False  # find levels for --nfe steps of the run in --out, and print them
    edit: Literal["", "inpaint", "colorize", "superres", "stroke", "denoise", "interpolate"] = ""  # zero-shot
    input: str = ""  # image to edit
    mask: str = ""  # inpaint: image of the same size, white where the input is kept
    patch: int = 4  # superres: pixels a side of the patches whose mean is kept
    other: str = ""  # interpolate: the second image
    sigma: float = 0.0  # noise level where editing starts (denoise: the input's own); 0 = 80, last three: 1


# ------------------------------------------------------------------------------------------------- PRESETS
ICT = dict(scales_start=10, scales=1280, metric="huber", sigmas=(80.0, 0.821))
PRESETS = {
    "gmm": dict(teacher="exact", steps=6000, lr_cooldown=0.3, channels=128, blocks=4, c_noise="log",
                emb_scale=8.0, scales=40),
    "shapes": dict(image_size=16, conditional=True, channels=32, blocks=1, steps=1000, batch=64, lr=2e-3,
                   lr_cooldown=0.5),
    ("shapes", "diffusion"): dict(steps=2000, lr=1e-2, lr_warmup=100, P_mean=-1.2, P_std=1.2),
    "folder": dict(conditional=True, steps=1000, batch=128, lr=2e-3, lr_cooldown=0.5, blocks=1),
    ("folder", "diffusion"): dict(steps=3000, lr=1e-2, lr_warmup=100, label_dropout=0.1, P_mean=-1.2,
                                  P_std=1.2),
    # FID of 1 / 2 steps: cd (lpips) 3.55 / 2.93, ct 8.70 / 5.83, ict 2.83 / 2.46. # DEPARTS: no NCSN++
    "cifar10": dict(batch=512, steps=800_000, lr=4e-4, optimizer="radam", beta2=0.999, ema_sigma_rel=0.0,
                    ema_halflife=3.5e6, arch="ddpmpp", double_norm=False, channels=128,
                    channel_mult=(2, 2, 2), blocks=4, attention=(16,), save_every=2500, metric="lpips",
                    sigmas=(80.0, 0.585), c_noise="log"),
    ("cifar10", "diffusion"): dict(lr=1e-3, lr_warmup=19_531, steps=400_000, optimizer="adam",
                                   ema_halflife=5e5, dropout=0.13, P_mean=-1.2, P_std=1.2),
    ("cifar10", "ct"): dict(scales_start=2, scales=150, mu=0.9),
    ("cifar10", "ict"): ICT | dict(batch=1024, steps=400_000, lr=1e-4, dropout=0.3, ema_halflife=1e7),
    ("cifar10", "ctcd"): dict(lr=5e-6, steps=400_000, dropout=0.3, metric="l2"),
    ("cifar10", "ctct"): dict(lr=5e-6, steps=400_000, dropout=0.3, metric="l2"),  # give it --init RUN
    # cd 6.20 / 4.70, ct 13.0 / 11.1, ict 4.02 / 3.20. # DEPARTS: EDM2's U-Net, not ADM's, and its
    # recipe for the teacher; ctcd and ctct are of CIFAR-10 alone
    "imagenet64": dict(image_size=64, conditional=True, batch=2048, steps=600_000, lr=8e-6, optimizer="radam",
                       beta2=0.999, ema_sigma_rel=0.0, ema_halflife=25e6, channels=192, blocks=3,
                       channel_mult=(1, 2, 3, 4), attention=(16, 8), double_norm=False, save_every=2500,
                       c_noise="log", scales=40, mu=0.95, metric="lpips", sigmas=(80.0, 1.382)),
    ("imagenet64", "diffusion"): dict(batch=4096, lr=1e-2, lr_warmup=2500, lr_ref=35_000, optimizer="adam",
                                      mu=0.0, dropout=0.1, P_mean=-1.2, P_std=1.2),
    ("imagenet64", "ctcd"): dict(mu=0.0, lr=5e-6), ("imagenet64", "ctct"): dict(mu=0.0, lr=5e-6),
    ("imagenet64", "ct"): dict(steps=800_000, lr=1e-4, scales_start=2, scales=200, sigmas=(80.0, 1.913)),
    ("imagenet64", "ict"): ICT | dict(batch=4096, steps=800_000, lr=1e-4, mu=0.0, dropout=0.2,
                                      ema_halflife=9.5e7, sigmas=(80.0, 1.526)),
    ("gmm", "ict"): ICT, ("shapes", "ict"): ICT, ("folder", "ict"): ICT,
    ("gmm", "ct"): dict(mu=0.9, scales=150), ("shapes", "ct"): dict(mu=0.9, scales=150),
    ("folder", "ct"): dict(mu=0.9, scales=150),
}


# --------------------------------------------------------------------------------- process: times and noise
def schedule(step, cfg):
    """Grid points N(k) and target decay mu(k) at step k: fixed; CT's; iCT's (doubling, no average)."""
    s0, s1, k = cfg.scales_start, cfg.scales, min(step / cfg.steps, 1)
    if cfg.mode == "ct":
        n = max(1, math.ceil(math.sqrt(k * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1))
        return n + 1, math.exp(s0 * math.log(cfg.mu) / n) if cfg.mu else 0.0
    if cfg.mode == "ict":
        stage = max(1, int(cfg.steps / (math.log2(s1 // s0) + 1)))
        return min(s0 * 2 ** (min(step, cfg.steps) // stage), s1) + 1, 0.0
    return cfg.scales, cfg.mu


def neighbours(gen, n, cfg):
    """Levels t > s, (B,) float64, next to each other on EDM's grid of n points: uniform over the pairs, or by
    ict's log-normal mass between them."""
    grid = common.karras(n).to(gen.device)  # descending: pair i is (grid[i], grid[i + 1])
    i = gen.index(n - 1)
    if cfg.mode == "ict":
        mass = torch.erf((grid.log() - cfg.P_mean) / (math.sqrt(2) * cfg.P_std)).diff().neg().cumsum(0)
        i = torch.searchsorted(mass, gen.uniform() * mass[-1])
    return grid[i], grid[i + 1]


def ode_step(teacher, x_t, t, s, y, cfg):
    """One step of the PF-ODE from t down to s."""
    with torch.no_grad():
        slope = (x_t - denoise(teacher, x_t, t, y, cfg)) / like(t, x_t)
        x_s = x_t + like(s - t, x_t) * slope
        if cfg.solver == "heun":
            slope = (slope + (x_s - denoise(teacher, x_s, s, y, cfg)) / like(s, x_t)) / 2
            x_s = x_t + like(s - t, x_t) * slope
        return x_s


# ----------------------------------------------------------------------------------- consistency function f
def f(net, x_t, t, y, cfg, sigma_min=0.002):
    """EDM's preconditioning, shifted by sigma_min in c_skip's denominator and c_out's numerator: f = x there.

    The network sees unit variance and TrigFlow's angle, and its F has the other sign (common.py)."""
    sd = cfg.sigma_d
    F = -net(like((t**2 + sd**2).rsqrt(), x_t) * x_t, torch.atan(t / sd), y)
    c_skip = sd**2 / ((t - sigma_min) ** 2 + sd**2)
    c_out = (t - sigma_min) * sd * (t**2 + sd**2).rsqrt()
    return like(c_skip, x_t) * x_t + like(c_out, x_t) * F


def denoise(net, x_t, t, y, cfg):
    """D(x_t, t) of a diffusion model: the same without the shift."""
    return f(net, x_t, t, y, cfg, sigma_min=0.0)


# ---------------------------------------------------------------------------------------------------- loss
@functools.cache
def lpips(device):
    try:
        import lpips as package
    except ImportError:
        common.fail("--metric lpips needs a package that is not in requirements.txt: pip install lpips")
    return package.LPIPS(net="vgg", verbose=False).to(device).requires_grad_(False)


def enlarge(x):
    return torch.nn.functional.interpolate(x, 224, mode="bilinear") if x.shape[-1] < 256 else x


def huber(a, b):
    """Pseudo-Huber of the sample's norm, c = 0.00054 sqrt(D) (iCT)."""
    c = 0.00054 * math.sqrt(a[0].numel())
    return ((a - b).square().flatten(1).sum(1) + c**2).sqrt() - c


METRICS = {"l1": lambda a, b: (a - b).abs().flatten(1).mean(1),
           "l2": lambda a, b: (a - b).square().flatten(1).mean(1), "huber": huber,
           "lpips": lambda a, b: lpips(a.device)(enlarge(a), enlarge(b)).flatten()}


def diffusion(net, target, teacher, x0, y, step, cfg, gen):
    """EDM's loss: log-normal t and the weight that makes F's target of unit variance."""
    t = (cfg.P_mean + cfg.P_std * gen.normal(dtype=torch.float64)).exp()
    x_t = x0 + like(t, x0) * gen.normal(*x0.shape[1:])
    gen.same_dropout()
    weight = (t**2 + cfg.sigma_d**2) / (t * cfg.sigma_d) ** 2
    mse = (denoise(net, x_t, t, y, cfg) - x0).square().flatten(1).mean(1)
    return (weight * mse).mean(), {}


def consistency(net, target, x_t, t, x_s, s, y, weight, cfg, gen):
    gen.same_dropout()
    prediction = f(net, x_t, t, y, cfg)
    gen.same_dropout()
    with torch.no_grad():
        goal = f(target, x_s, s, y, cfg)
    return (weight * METRICS[cfg.metric](prediction, goal)).mean(), {}


def cd(net, target, teacher, x0, y, step, cfg, gen):
    """Consistency distillation."""
    t, s = neighbours(gen, schedule(step, cfg)[0], cfg)
    x_t = x0 + like(t, x0) * gen.normal(*x0.shape[1:])
    x_s = ode_step(teacher, x_t, t, s, y, cfg)
    return consistency(net, target, x_t, t, x_s, s, y, 1.0, cfg, gen)


def ct(net, target, teacher, x0, y, step, cfg, gen):
    """Consistency training, and iCT with its weight 1 / (t - s)."""
    n, _ = schedule(step, cfg)
    t, s = neighbours(gen, n, cfg)
    z = gen.normal(*x0.shape[1:])
    x_t, x_s = x0 + like(t, x0) * z, x0 + like(s, x0) * z
    weight = 1 / (t - s) if cfg.mode == "ict" else 1.0
    loss, info = consistency(net, target, x_t, t, x_s, s, y, weight, cfg, gen)
    return loss, info | dict(scales=n)


def continuous(net, target, teacher, x0, y, step, cfg, gen):
    """f^T sg(df^-/dt), for l2 (Remark 10). Its value means nothing, its gradient is the limit of the discrete
    one over 2 (t - s). t is uniform on EDM's grid."""
    t = common.karras(2**14).to(gen.device)[gen.index(2**14)]
    x_t = x0 + like(t, x0) * gen.normal(*x0.shape[1:])
    clean = x0
    if cfg.mode == "ctcd":
        with torch.no_grad():
            clean = denoise(teacher, x_t, t, y, cfg)
    gen.same_dropout()
    _, df = common.jvp(lambda x, t: f(target, x, t, y, cfg), (x_t, t),
                       ((x_t - clean) / like(t, x_t), torch.ones_like(t)))
    gen.same_dropout()
    return (f(net, x_t, t, y, cfg) * df).mean(), dict(tangent_rms=df.square().mean().sqrt())


LOSSES = {"diffusion": diffusion, "cd": cd, "ct": ct, "ict": ct, "ctcd": continuous, "ctct": continuous}


# ------------------------------------------------------------------------------------------------- sampler
@torch.no_grad()
def sample(net, noise, y, nfe, cfg, gen):
    """noise ~ N(0, sigma_d^2 I) (B, ...) -> x_0. Algorithm 1: f, fresh noise of the next level, f, and so on;
    images are clipped to [-1, 1] after each f."""
    if cfg.mode == "diffusion":
        return common.solve(net, noise, common.ode_times((nfe + 1) // 2, cfg.sigma_d), y, cfg.sigma_d)
    sigmas = cfg.sigmas[:nfe] if nfe <= len(cfg.sigmas) else common.karras(nfe + 1)[:-1].tolist()
    x = noise * (sigmas[0] / cfg.sigma_d)
    for i, sigma in enumerate(sigmas):
        if i:
            x = x + math.sqrt(sigma**2 - 0.002**2) * gen.normal(*x.shape[1:])
        x = f(net, x, torch.full(x.shape[:1], sigma, dtype=torch.float64, device=x.device), y, cfg)
        x = x.clamp(-1, 1) if x.ndim == 4 else x
    return x


@torch.no_grad()
def edit(net, cfg):
    """Algorithm 4: multistep sampling in which every x_0 takes over what the input knows, the coefficients
    `known` of an orthonormal A. stroke (SDEdit) knows none and starts from the noised input. denoise and
    interpolate are one step, from the input itself or from points on the sphere between two noised images."""
    x, other, mask = (common.read_image(p, net.options["shape"]) for p in (cfg.input, cfg.other, cfg.mask))
    first = cfg.sigma or (1.0 if cfg.edit in ("stroke", "denoise", "interpolate") else 80.0)
    y = torch.tensor([max(cfg.label, 0)]) if net.options["classes"] else None
    gen = common.Draw(cfg.seed, 0, 0, 1)

    def estimate(x_t, sigma):
        t = torch.full(x_t.shape[:1], sigma, dtype=torch.float64)
        return f(net, x_t, t, y if y is None else y.expand(len(t)), cfg).clamp(-1, 1)

    if cfg.edit == "denoise":
        return {"input": x, "result": estimate(x, first)}
    if cfg.edit == "interpolate":
        a, b = (v + first * gen.normal(*v.shape[1:]) for v in (x, other))
        angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
        u = torch.linspace(0, 1, 9).view(-1, 1, 1, 1)
        arc = (torch.sin((1 - u) * angle) * a + torch.sin(u * angle) * b) / torch.sin(angle)
        return {"input": x, "with": other, "result": estimate(arc, first)}
    A, inverse, known = common.operator(cfg.edit, net.options["shape"], mask, cfg.patch)
    columns, reference = {"input": x}, A(x)
    if known.any():
        x = columns["degraded"] = inverse(reference * known)
    if cfg.edit == "colorize":  # shown in gray; the part of x along luma is greenish
        columns["degraded"] = torch.einsum("bchw,c->bhw", columns["input"], common.LUMA)[:, None].expand_as(x)
    for sigma in [first, *(s for s in common.karras(40).tolist() if s < first)]:
        x = estimate(x + math.sqrt(sigma**2 - 0.002**2) * gen.normal(*x.shape[1:]), sigma)
        x = inverse(torch.where(known, reference, A(x)))
    return columns | {"result": x}


@torch.no_grad()
def search(net, cfg, data, n=2000):
    """--search: greedily, the level of each further step whose samples come nearest to the data."""
    real, sigmas = data.batch(common.Draw(0, 2**32, 0, n))[0], [80.0]

    def distance(sigma):
        noise, y, gen = common.noise_and_labels(cfg, net, 0, n, 0, "cpu")
        trial = replace(cfg, sigmas=(*sigmas, sigma))
        return common.distance(sample(net, noise, y, len(sigmas) + 1, trial, gen), real)
    while len(sigmas) < min(cfg.nfe, 17):
        sigmas.append(min((s for s in common.karras(18).tolist() if s < sigmas[-1]), key=distance))
    print("--sigmas " + ",".join(f"{sigma:.3g}" for sigma in sigmas))
    return tuple(sigmas)


# --------------------------------------------------------------------------------------------------- train
def train(cfg):
    run = common.Run(cfg)
    data = common.dataset(cfg, run.device)  # <- method
    teacher = common.load_teacher(cfg, data, run.device)  # <- method
    options = dict(head=False)  # <- method
    net = common.network(cfg, data, **options)  # <- method
    common.load_init(net, cfg, data)
    net.to(run.device)
    target = copy.deepcopy(net) if schedule(0, cfg)[1] else net  # <- method: an average, or the live network
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = common.make_optimizer(net, cfg)
    scaler = torch.amp.GradScaler(run.device.type, enabled=cfg.dtype == "fp16")
    state = dict(net=net, target=target, ema=ema, optimizer=optimizer, scaler=scaler)
    start = run.resume(state) if cfg.resume else 0
    wrapped = run.wrap(net)  # for gradients; the bare net for everything else
    for step in run.steps(start):
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, cfg)
        total = torch.zeros([], device=run.device)
        for rows in run.rows:  # of the global batch, a micro-batch at a time
            gen = common.Draw(cfg.seed, step, *rows, run.device)
            x0, y = data.batch(gen)
            with run.accumulate(wrapped, rows):
                loss, info = LOSSES[cfg.mode](wrapped, target, teacher, x0, y, step, cfg, gen)
                scaler.scale(loss / len(run.rows)).backward()
            total += loss.detach() / len(run.rows)
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.clip or math.inf)
        total = run.mean(total)
        if run.finite(total, grad_norm):
            scaler.step(optimizer)
            common.normalize_weights(net)
            common.update_ema(ema, net, step + 1, cfg)
            common.lerp(target, net, schedule(step, cfg)[1])  # <- method
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if done == 1:
            run.start()
        if done % cfg.log_every == 0 or done == cfg.steps:
            run.log(done, loss=total, lr=group["lr"], grad_norm=grad_norm, **info)
        if done % cfg.save_every == 0 or done in (1, cfg.steps):
            run.save(state, done)
        if done % cfg.sample_every == 0 or done == cfg.steps:
            nfes = (1, 2)  # <- method
            common.report(cfg, run, done, sample, ema, data, teacher, nfes)  # <- method


# ---------------------------------------------------------------------------------------------------- main
def main(argv=None):
    cfg = common.parse_args(Config, PRESETS, LOSSES, argv)
    if cfg.mode in ("cd", "ctcd") and not cfg.teacher:
        common.fail(f"--mode {cfg.mode} distills a teacher: give --teacher RUN (or exact, for gmm)")
    flags = {word.split("=")[0] for word in (sys.argv if argv is None else argv)}
    if "--sigmas" in flags and "--nfe" not in flags:
        cfg.nfe = len(cfg.sigmas)
    if cfg.scales < (2 if cfg.mode == "cd" else cfg.scales_start):
        common.fail(f"--scales must be at least 2, and at least --scales_start, not {cfg.scales}")
    if not cfg.sigmas or not all(a > b >= 0.002 for a, b in zip((1e6, *cfg.sigmas), cfg.sigmas)):
        common.fail("--sigmas must be noise levels that fall, none below 0.002, such as 80,1.4")
    if cfg.mode == "diffusion" and cfg.search:
        common.fail("--search is for consistency models: a diffusion model has no levels to choose")
    if cfg.edit:
        net, path = common.load_net(cfg.out), f"{cfg.out}/edit-{cfg.edit}.png"
        for flag in ("input", *{"inpaint": ["mask"], "interpolate": ["other"]}.get(cfg.edit, [])):
            if not getattr(cfg, flag):
                common.fail(f"--edit {cfg.edit} needs --{flag} IMAGE")
        if cfg.label >= max(net.options["classes"], 1):
            common.fail(f"--label {cfg.label}: the network has {net.options['classes']} classes")
        if len(net.options["shape"]) == 1 or net.options["shape"][1] % cfg.patch:
            common.fail("--edit needs a run on images, and --patch must divide their size")
        columns = edit(net, cfg)
        common.panels({title: common.Images.to_uint8(x) for title, x in columns.items()}, path)
        print(f"wrote {path}")
    elif cfg.search:
        search(common.load_net(cfg.out), cfg, common.dataset(cfg))
    elif cfg.sample:
        common.write_samples(cfg, sample)
    elif cfg.dry_run:
        common.dry_run(cfg)
    else:
        train(cfg)


if __name__ == "__main__":
    main()
