"""sCM: simple, stable and scalable continuous-time consistency models, in one file.
Lu & Song, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models", 2024.

TrigFlow          x_t = cos(t) x_0 + sin(t) z,  z ~ N(0, sigma_d^2 I),  t in [0, pi/2]             Sec. 3
PF-ODE            dx_t/dt = sigma_d F(x_t / sigma_d, t)                                            Eq. 3
diffusion         || sigma_d F(x_t / sigma_d, t) - v_t ||^2,  v_t = cos(t) z - sin(t) x_0          Eq. 4
consistency       f(x_t, t) = cos(t) x_t - sin(t) sigma_d F(x_t / sigma_d, t)                      Eq. 5
tangent           df/dt = -cos(t) (sigma_d F - dx_t/dt) - sin(t) (x_t + sigma_d dF/dt)             Eq. 6
loss              e^w(t) / D || F - F^- - g ||^2 - w(t),  g = cos(t) df^-/dt, normalized           Eq. 8
F^- is F under stop-gradient; dx_t/dt is the teacher's (scd) or, unbiased, v_t (sct); dF/dt is one JVP.
Normalized is g / (rms(g) + c). The paper prints a plain norm; with the root mean square, c = 0.1 means the
same at every resolution. The factor sqrt(D) in g is absorbed by w(t); a larger c damps small tangents.

    python scm.py                                               toy: 8 Gaussians, exact teacher
    python scm.py --dataset folder --data PATH --image_size 16 --mode diffusion --out out/teacher
    python scm.py --dataset folder --data PATH --image_size 16 --mode scd --teacher out/teacher --out out/scd
    python scm.py --sample 64 --nfe 2 --out out/scd
    torchrun --nproc_per_node=8 scm.py --dataset imagenet512 --data data/imagenet512 --teacher out/teacher512
"""
# ------------------------------------------------------------------------------------------------- imports
import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch

import common
from common import like


# -------------------------------------------------------------------------------------------------- Config
@dataclass
class Config:
    dataset: str = "gmm"  # gmm (2-D), shapes, folder (--data), or another of PRESETS
    mode: str = "scd"  # training objective, see --help's first lines
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
    P_mean: float = -1.0  # mean of log sigma in training, sigma = sigma_d tan(t)
    P_std: float = 1.4  # its standard deviation
    tangent: Literal["normalize", "clip", "raw"] = "normalize"  # g / (rms + c); df/dt in [-1, 1]; as it is
    tangent_c: float = 0.1  # c of the normalization
    warmup: int = 10000  # steps in which the unstable half of the tangent fades in; 0 = off
    weighting: Literal["adaptive", "none"] = "adaptive"  # learned w(t), or w = 0
    mid_t: float = 1.1  # second sampling time, radians; further steps are spread evenly below it
    guidance_max: float = 1.0  # scd: guidance scale ~ U[1, this] is an input of the net; 1 = off
    guidance: float = 1.0  # guidance scale when sampling
    intervals: int = 1024  # dscd: N intervals of EDM's grid


# ------------------------------------------------------------------------------------------------- PRESETS
EDM2 = dict(conditional=True, batch=2048, channels=192, channel_mult=(1, 2, 3, 4), blocks=3, eps=1e-11,
            attention=(16, 8), norm_shift=False, save_every=1000, dtype="fp16")  # sizes differ in width
PRESETS = {
    # DEPARTS: c = 1, no adaptive weighting. An exact teacher's residual vanishes as t -> 0; its inverse, the
    # optimal e^w, grows there without bound and drowns the large t. Data has a noise floor.
    "gmm": dict(teacher="exact", lr_cooldown=0.3, channels=128, blocks=4, emb_scale=10.0, warmup=1000,
                tangent_c=1.0, weighting="none"),
    "shapes": dict(image_size=16, conditional=True, channels=32, blocks=1, steps=1000, batch=64, lr=2e-3,
                   lr_cooldown=0.5, warmup=200),
    ("shapes", "diffusion"): dict(steps=2000, lr=1e-2, lr_warmup=100, P_mean=-1.2, P_std=1.2),
    "folder": dict(conditional=True, steps=1000, batch=128, lr=2e-3, lr_cooldown=0.5, blocks=1, warmup=200),
    ("folder", "diffusion"): dict(steps=3000, lr=1e-2, lr_warmup=100, label_dropout=0.1,
                                  P_mean=-1.2, P_std=1.2),
    # FID of 1 / 2 steps: sct 2.85 / 2.06, scd 3.66 / 2.52; teacher 2.15. # DEPARTS: no augmentation
    "cifar10": dict(batch=512, steps=400_000, lr=1e-4, optimizer="radam", ema_sigma_rel=0.0, arch="ddpmpp",
                    double_norm=False, channels=128, channel_mult=(2, 2, 2), blocks=4, attention=(16,),
                    save_every=2500),
    ("cifar10", "diffusion"): dict(lr=1e-3, lr_warmup=19_531, beta2=0.999, optimizer="adam", dropout=0.13,
                                   P_mean=-1.2, P_std=1.2),
    ("cifar10", "sct"): dict(dropout=0.2),
    # FID of 1 / 2 steps, S to XL: scd 2.97 / 2.07, 2.79 / 1.89, 2.43 / 1.70, 2.44 / 1.66; sct 3.23 / 2.93,
    # 2.25 / 1.81, 2.08 / 1.57, 2.04 / 1.48; teacher 1.70, 1.55, 1.44, 1.38
    "imagenet64": dict(EDM2, image_size=64, steps=400_000, lr_ref=35_000, P_std=1.6),
    ("imagenet64", "diffusion"): dict(lr_warmup=4883, P_mean=-0.8),  # EDM2's 10 million images
    ("imagenet64", "sct"): dict(dropout=0.45),
    # scd: S 3.07 / 2.50 to XXL 2.28 / 1.88 at --guidance 1.5 (S) or 1.3, in 2 steps 1.4 (S) or 1.2
    "imagenet512": dict(EDM2, steps=200_000, lr_ref=70_000, P_mean=-0.8, P_std=1.6, guidance_max=2.0),
    ("imagenet512", "diffusion"): dict(lr_warmup=4883, P_mean=-0.4, P_std=1.0, label_dropout=0.1,
                                       guidance_max=1.0),
    ("imagenet512", "sct"): dict(steps=100_000, guidance_max=1.0),
}
TEACHERS = {  # EDM2: learning rate, dropout, the teacher's EMA width, 2^20 images
    "imagenet64": dict(S=(1e-2, 0.0, 0.075, 1024), M=(9e-3, 0.1, 0.06, 2048), L=(8e-3, 0.1, 0.04, 1024),
                       XL=(7e-3, 0.1, 0.04, 640)),
    "imagenet512": dict(S=(1e-2, 0.0, 0.025, 2048), M=(9e-3, 0.1, 0.03, 2048), L=(8e-3, 0.1, 0.015, 1792),
                        XL=(7e-3, 0.1, 0.02, 1280), XXL=(6.5e-3, 0.1, 0.015, 896))}
for name, sizes in TEACHERS.items():
    for size, (lr, dropout, width, images) in sizes.items():
        PRESETS[name, size] = dict(channels=dict(S=192, M=256, L=320, XL=384, XXL=448)[size], lr=lr / 100,
                                   checkpointing=size in ("XL", "XXL"))
        PRESETS[name, size, "diffusion"] = dict(lr=lr, dropout=dropout, ema_sigma_rel=width,
                                                steps=images * 2**20 // 2048)
        if name == "imagenet512":  # "25 / 35 %" and "0 / 10 %" in the paper; here S has the lower ones
            PRESETS[name, size, "sct"] = dict(dropout=0.25 if size == "S" else 0.35)
            PRESETS[name, size, "scd"] = dict(dropout=0.0 if size == "S" else 0.1)


# --------------------------------------------------------------------------------- process: times and noise
def times(gen, cfg):
    """Log-normal proposal: sigma_d tan(t) = e^tau, tau ~ N(P_mean, P_std^2); (B,) float64."""
    tau = cfg.P_mean + cfg.P_std * gen.normal(dtype=torch.float64)
    return torch.atan(tau.exp() / cfg.sigma_d)


def warmup(step, cfg):
    return min(1, step / cfg.warmup) if cfg.warmup else 1  # r: fades in the unstable half of the tangent


def diffuse(x0, t, gen, cfg):
    """x_t and its velocity along the sample's own path, v_t = cos(t) z - sin(t) x_0."""
    z = cfg.sigma_d * gen.normal(*x0.shape[1:])
    cos, sin = like(t.cos(), x0), like(t.sin(), x0)
    return cos * x0 + sin * z, cos * z - sin * x0


def neighbours(gen, cfg):
    """Neighbours t > s on EDM's grid of N intervals, t_0 = 0, by the proposal's mass between (App. E)."""
    sigma = common.karras(cfg.intervals + 1).flip(0)                       # ascending, (N + 1,)
    mass = torch.erf((sigma.log() - cfg.P_mean) / (math.sqrt(2) * cfg.P_std)).diff().cumsum(0)
    i = torch.searchsorted(mass.to(gen.device), gen.uniform() * mass[-1])  # 0..N-1
    grid = torch.atan(sigma / cfg.sigma_d).to(gen.device)
    grid[0] = 0
    return grid[i + 1], grid[i]


# ----------------------------------------------------------------------------------- consistency function f
def f(net, x_t, t, y, cfg, scale=None):
    """Eq. 5. x_t (B, ...); t (B,); y (B,) or None; scale (B,) of guidance, or None."""
    F = net(x_t / cfg.sigma_d, t, y, scale)
    return like(t.cos(), x_t) * x_t - like(t.sin(), x_t) * cfg.sigma_d * F


# ---------------------------------------------------------------------------------------------------- loss
def weighted(error, w):
    """E[e^w / D ||error||^2 - w]: at the optimum of w every t contributes the same (App. D)."""
    mse = error.square().flatten(1).mean(1)
    return (w.exp() * mse - w).mean(), dict(mse=mse.detach().mean())


def diffusion(net, target, teacher, x0, y, step, cfg, gen):
    """Eq. 4 with adaptive weighting; F and v_t / sigma_d have unit variance, so the prior weight is 1."""
    t = times(gen, cfg)
    x_t, v_t = diffuse(x0, t, gen, cfg)
    gen.same_dropout()
    F, w = net(x_t / cfg.sigma_d, t, y, return_w=True)
    return weighted(F - v_t / cfg.sigma_d, w)


def velocity(model, x_t, t, y, scale, cfg):
    """dx_t/dt = sigma_d F of a diffusion model (Eq. 3); with a scale (B,), under classifier-free guidance."""
    with torch.no_grad():
        F = model(x_t / cfg.sigma_d, t, y)
        if scale is not None:
            F_uncond = model(x_t / cfg.sigma_d, t, torch.full_like(y, -1))
            F = F_uncond + like(scale, F) * (F - F_uncond)
    return cfg.sigma_d * F


def tangent(target, x_t, t, y, scale, dxdt, step, cfg, gen):
    """F^- and g = cos(t) df^-/dt of Eq. 6; one JVP gives both.

    Rearranged (Sec. 5.1): the tangent that enters the network already carries cos(t) sin(t), which keeps what
    flows through it bounded at both ends. The network's input is x_t / sigma_d, hence the division.
    """
    cos, sin, r = like(t.cos(), x_t), like(t.sin(), x_t), warmup(step, cfg)
    gen.same_dropout()
    F, cos_sin_dF = common.jvp(lambda x, t: target(x, t, y, scale), (x_t / cfg.sigma_d, t),
                               (cos * sin * dxdt / cfg.sigma_d, t.cos() * t.sin()))
    return F, -cos**2 * (cfg.sigma_d * F - dxdt) - r * (cos * sin * x_t + cfg.sigma_d * cos_sin_dF)


@torch.no_grad()
def discrete_tangent(target, x_t, t, s, y, scale, dxdt, step, cfg, gen):
    """The same with (f^-(x_t, t) - f^-(x_s, s)) / sin(t - s) for df^-/dt, s < t (App. E)."""
    cos_h, sin_h = like((t - s).cos(), x_t), like((t - s).sin(), x_t)
    x_s = cos_h * x_t - sin_h * dxdt                                    # one teacher step, DDIM
    gen.same_dropout()
    F = target(x_t / cfg.sigma_d, t, y, scale)
    gen.same_dropout()
    dF = (cos_h * F - target(x_s / cfg.sigma_d, s, y, scale)) / sin_h    # -> dF/dt as s -> t
    cos, sin, r = like(s.cos(), x_t), like(s.sin(), x_t), warmup(step, cfg)
    df = -cos * (cfg.sigma_d * F - dxdt) - r * sin * (x_t + cfg.sigma_d * dF)
    return F, like(t.cos(), x_t) * df


def normalize(g, t, cfg):
    """g = cos(t) df/dt, normalized (Alg. 1), or with df/dt clipped to [-1, 1] (Sec. 4.2)."""
    rms, cos = like(g.square().flatten(1).mean(1).sqrt(), g), like(t.cos(), g)
    return {"normalize": g / (rms + cfg.tangent_c), "clip": g.clamp(-cos, cos), "raw": g}[cfg.tangent]


def consistency(net, x_t, t, y, scale, F_minus, g, cfg, gen):
    """Eq. 8. A second, ordinary forward pass with the same dropout masks: F = F^-, so the error is -g."""
    gen.same_dropout()
    F, w = net(x_t / cfg.sigma_d, t, y, scale, return_w=True)
    loss, info = weighted(F - F_minus - normalize(g, t, cfg), w)
    return loss, info | dict(tangent_rms=g.square().mean().sqrt())


def scd(net, target, teacher, x0, y, step, cfg, gen):
    """Consistency distillation: dx_t/dt from the teacher."""
    t = times(gen, cfg)
    x_t, _ = diffuse(x0, t, gen, cfg)
    scale = 1 + (cfg.guidance_max - 1) * gen.uniform() if cfg.guidance_max > 1 else None
    dxdt = velocity(teacher, x_t, t, y, scale, cfg)
    F_minus, g = tangent(target, x_t, t, y, scale, dxdt, step, cfg, gen)
    return consistency(net, x_t, t, y, scale, F_minus, g, cfg, gen)


def sct(net, target, teacher, x0, y, step, cfg, gen):
    """Consistency training: dx_t/dt is v_t, whose mean given x_t is the PF-ODE's."""
    t = times(gen, cfg)
    x_t, v_t = diffuse(x0, t, gen, cfg)
    F_minus, g = tangent(target, x_t, t, y, None, v_t, step, cfg, gen)
    return consistency(net, x_t, t, y, None, F_minus, g, cfg, gen)


def dscd(net, target, teacher, x0, y, step, cfg, gen):
    """Distillation between neighbours of a grid of N intervals, the discrete-time twin of scd (App. E)."""
    t, s = neighbours(gen, cfg)
    x_t, _ = diffuse(x0, t, gen, cfg)
    scale = 1 + (cfg.guidance_max - 1) * gen.uniform() if cfg.guidance_max > 1 else None
    dxdt = velocity(teacher, x_t, t, y, scale, cfg)
    F_minus, g = discrete_tangent(target, x_t, t, s, y, scale, dxdt, step, cfg, gen)
    return consistency(net, x_t, t, y, scale, F_minus, g, cfg, gen)


LOSSES = {"diffusion": diffusion, "scd": scd, "sct": sct, "dscd": dscd}


# ------------------------------------------------------------------------------------------------- sampler
@torch.no_grad()
def sample(net, noise, y, nfe, cfg, gen):
    """noise ~ N(0, sigma_d^2 I) (B, ...) -> x_0. A second step starts from fresh noise at t = 1.1
    (Sec. 5.2). # DEPARTS: further ones are spread evenly below 1.1, the paper names none."""
    guided = cfg.guidance != 1 or cfg.guidance_max > 1
    x, scale = noise, noise.new_full(noise.shape[:1], cfg.guidance) if guided else None
    if cfg.mode == "diffusion":
        def F(x, t, y):
            return velocity(net, cfg.sigma_d * x, t, y, scale, cfg) / cfg.sigma_d
        return common.solve(F, noise, common.ode_times((nfe + 1) // 2, cfg.sigma_d), y, cfg.sigma_d)
    angles = [math.atan(80 / cfg.sigma_d), *(cfg.mid_t * (nfe - i) / (nfe - 1) for i in range(1, nfe))]
    for i, angle in enumerate(angles):
        t = torch.full(noise.shape[:1], angle, dtype=torch.float64, device=noise.device)
        if i:
            x = like(t.cos(), x) * x + like(t.sin(), x) * cfg.sigma_d * gen.normal(*x.shape[1:])
        x = f(net, x, t, y, cfg, scale)
    return x


# --------------------------------------------------------------------------------------------------- train
def train(cfg):
    run = common.Run(cfg)
    data = common.dataset(cfg, run.device)  # <- method
    teacher = common.load_teacher(cfg, data, run.device)  # <- method
    options = dict(head=cfg.weighting == "adaptive", guidance=cfg.guidance_max > 1)  # <- method
    net = common.network(cfg, data, **options)  # <- method
    common.load_init(net, cfg, data)
    net.to(run.device)
    target = net  # <- method: the live network itself is the stop-gradient branch
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
    if cfg.mode in ("scd", "dscd") and not cfg.teacher:
        common.fail(f"--mode {cfg.mode} distills a teacher: give --teacher RUN (or exact, for gmm)")
    able = cfg.conditional and (cfg.guidance_max == 1 if cfg.mode == "diffusion" else
                                cfg.mode != "sct" and cfg.guidance_max > 1)
    if (cfg.guidance != 1 or cfg.guidance_max > 1) and not able:
        common.fail("guidance needs --conditional, and scd or dscd trained with --guidance_max, or diffusion")
    if cfg.sample:
        common.write_samples(cfg, sample)
    elif cfg.dry_run:
        common.dry_run(cfg)
    else:
        train(cfg)


if __name__ == "__main__":
    main()
