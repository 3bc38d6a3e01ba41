"""Multistep CM: consistency models in segments, between one step and diffusion; the aDDIM teacher.
Heek, Hoogeboom & Salimans, "Multistep Consistency Models", 2024.

process           z_t = alpha_t x + sigma_t eps,  eps ~ N(0, I),  alpha^2 + sigma^2 = 1,  t in [0, 1]
DDIM_t->s         z_s = alpha_s x + sigma_s / sigma_t (z_t - alpha_t x)                              Eq. 4
invDDIM_t->s      x = (z_s - sigma_s / sigma_t z_t) / (alpha_s - alpha_t sigma_s / sigma_t)          Eq. 5
aDDIM_t->s        z_s = alpha_s x + (sigma_s^2 + tr Var[z_s | z_t] / ||eps||^2)^(1/2) eps            Eq. 14
segments          t = t_step + n / T,  s = t - 1 / T,  n in 1 .. T / student_steps                   Alg. 1
teacher step      z_s = aDDIM_t->s(x*, z_t),  x* = x (ct), the teacher's denoiser (cd)
target            x_ref = invDDIM_t->t_step(DDIM_s->t_step(f^-(z_s, s), z_s), z_t)
loss              (SNR(t) + 1) || f(z_t, t) - x_ref ||                                               Eq. 7
f is the denoiser; f^- is f under stop-gradient. At s = t_step the target is the teacher step itself.
Differs from cm.py by: 1) VP and a grid in t, whose steps get smaller while training; 2) targets at the lower
end of t's segment, so f is no map to t = 0 but one DDIM step; 3) aDDIM; 4) sampling without noise.
pd is progressive distillation (Salimans & Ho, 2022): targets from two steps of the teacher, then of itself.

    python multistep_cm.py                                      toy: 8 Gaussians, exact teacher, 4 steps, cd
    python multistep_cm.py --figure                             paths in 1-D of 1, 2, 4 steps and of the ODE
    python multistep_cm.py --dataset folder --data PATH --image_size 16 --teacher out/teacher --out out/mcm
    python multistep_cm.py --sample 64 --nfe 4 --out out/mcm
    torchrun --nproc_per_node=8 multistep_cm.py --dataset imagenet64 --data PATH --teacher out/teacher64
"""
# ------------------------------------------------------------------------------------------------- imports
import copy
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
    student_steps: int = 4  # S, segments of the ODE = sampling steps: 1, 2, 4, 8, 16
    teacher_steps: tuple = (64, 1280)  # T at the start and, log-linearly, from `anneal` on
    anneal: float = 0.5  # share of the steps in which T grows
    solver: Literal["addim", "ddim", "heun"] = "addim"  # teacher's; diffusion: sampler (heun: EDM's grid)
    xvar: float = 0.75  # aDDIM: Var[x | z_t] = this times (x* - x)^2; 0 = the analytic 0.1 / (2 + SNR)
    huber: float = 1e-4  # epsilon of the norm
    teacher_guidance: float = 1.0  # of the teacher in cd and pd, classifier-free, 1 + the paper's g; 1 = off
    noise_res: tuple = ()  # noise resolutions at t = 1, t = 0 and the image's; none = plain cosine
    pd_start: int = 64  # pd: steps of the first student, which are halved down to student_steps
    figure: bool = False  # train 1, 2 and 4 steps on two modes in 1-D, and draw their paths


# ------------------------------------------------------------------------------------------------- PRESETS
PRESETS = {
    "gmm": dict(teacher="exact", steps=5000, lr_cooldown=0.3, channels=128, blocks=4, c_noise="log",
                emb_scale=8.0),
    "modes": dict(teacher="exact", steps=2000, lr_cooldown=0.3, channels=64, blocks=4, c_noise="log",
                  emb_scale=8.0, sigma_d=1.0),
    "shapes": dict(image_size=16, conditional=True, channels=32, blocks=1, steps=1000, batch=64, lr=2e-3,
                   lr_cooldown=0.5),
    ("shapes", "diffusion"): dict(steps=2000, lr=1e-2, lr_warmup=100),
    "folder": dict(conditional=True, steps=1000, batch=128, lr=2e-3, lr_cooldown=0.5, blocks=1),
    ("folder", "diffusion"): dict(steps=3000, lr=1e-2, lr_warmup=100, label_dropout=0.1),
    # FID of 1 / 2 / 4 / 8 / 16 steps, small: ct 7.2 / 2.7 / 1.8 / 1.5 / 1.5, cd 4.3 / 2.0 / 1.7 / 1.6 / 1.5;
    # L: ct 6.4 / 2.3 / 1.6 / 1.5 / 1.6, cd 3.2 / 1.9 / 1.6 / 1.4 / 1.4.
    # DEPARTS: EDM2's U-Nets (280 M; L 778 M) for UViTs (394 M; 1.23 B); lr and EMA are ours, it names none.
    "imagenet64": dict(image_size=64, conditional=True, batch=2048, steps=200_000, lr=1e-4, channels=192,
                       channel_mult=(1, 2, 3, 4), blocks=3, attention=(16, 8), dropout=0.2, c_noise="log",
                       double_norm=False, noise_res=(32, 64, 64), save_every=2500),
    ("imagenet64", "L"): dict(channels=320, dropout=0.1),
    ("imagenet64", "diffusion"): dict(lr=1e-2, lr_warmup=5000, lr_ref=35_000, steps=500_000),
    # cd small 8.5 / 3.1 / 2.4 / 2.1 / 2.0, with guidance of a strength that the paper does not print; L 7.0 /
    # 3.1 / 2.3 / 2.1 / 2.0. # DEPARTS: U-Nets as above (184 M; L 736 M, for 397 M and 1.25 B), and no
    # multiscale loss
    "imagenet128": dict(image_size=128, conditional=True, batch=2048, steps=200_000, lr=1e-4, channels=128,
                        channel_mult=(1, 2, 3, 4, 4), blocks=3, attention=(16, 8), dropout=0.1, c_noise="log",
                        double_norm=False, noise_res=(32, 128, 128), save_every=2500),
    ("imagenet128", "L"): dict(channels=256),
    ("imagenet128", "diffusion"): dict(lr=1e-2, lr_warmup=5000, lr_ref=35_000, steps=500_000,
                                       label_dropout=0.1),
}


# --------------------------------------------------------------------------------- process: times and noise
def alpha_sigma(t, cfg):
    """Cosine schedule, (B,) float64; with noise_res, the log-SNR moved by 2 log(noise resolution / image's),
    interpolated from t = 0 to 1 (simple diffusion). sigma_0 = 0 and alpha_1 = 0, to rounding."""
    low, high, size = cfg.noise_res or (1, 1, 1)
    shift = (t * math.log(low / size) + (1 - t) * math.log(high / size)).exp()
    angle = torch.atan2(torch.sin(math.pi / 2 * t), shift * torch.cos(math.pi / 2 * t))
    return angle.cos(), angle.sin()


def snr(t, cfg):
    alpha, sigma = alpha_sigma(t, cfg)
    return (alpha / sigma) ** 2


def times(gen, step, cfg):
    """t > s, neighbours of this step's grid, and the lower end t_step of their segment, (B,) float64."""
    first, last = cfg.teacher_steps
    share = min(step / (cfg.anneal * cfg.steps), 1) if cfg.anneal else 1
    n = max(1, round(math.exp(math.log(first) + share * math.log(last / first)) / cfg.student_steps))
    start, n_rel = gen.index(cfg.student_steps) * n, 1 + gen.index(n)  # t = t_step + 1 / S is of this segment
    return [i.double() / (n * cfg.student_steps) for i in (start + n_rel, start + n_rel - 1, start)]


def ddim(x, z_t, t, s, cfg):
    """Eq. 4; the identity at s = t, also where both are 0."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t, cfg), alpha_sigma(s, cfg)
    ratio = torch.where(s == t, 1.0, sigma_s / sigma_t)
    return like(alpha_s - alpha_t * ratio, x) * x + like(ratio, x) * z_t


def inverse_ddim(z_s, z_t, t, s, cfg):
    """Eq. 5: the x with DDIM_t->s(x, z_t) = z_s."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t, cfg), alpha_sigma(s, cfg)
    ratio = sigma_s / sigma_t
    return (z_s - like(ratio, z_s) * z_t) / like(alpha_s - alpha_t * ratio, z_s)


def addim(x, z_t, x_var, t, s, cfg):
    """Eq. 14, Alg. 3: DDIM with more of eps, so that ||z_s||^2 is right; x_var (B,): Var[x | z_t] / D."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t, cfg), alpha_sigma(s, cfg)
    eps = (z_t - like(alpha_t, x) * x) / like(sigma_t, x)
    z_var = (alpha_s - alpha_t * sigma_s / sigma_t) ** 2 * x_var / eps.square().flatten(1).mean(1)
    return like(alpha_s, x) * x + like((sigma_s**2 + z_var).sqrt(), x) * eps


def analytic_variance(t, cfg):
    return 0.1 / (2 + snr(t, cfg))  # a tenth of the posterior's variance, had x the variance 1/2


# ----------------------------------------------------------------------------------- consistency function f
def f(net, z_t, t, y, cfg):
    """Denoiser x(z_t, t): v-prediction, in TrigFlow's coordinates, where data has its own variance."""
    x_t, angle = common.to_trigflow(z_t, *alpha_sigma(t, cfg), cfg.sigma_d)
    F = net(x_t / cfg.sigma_d, angle, y)
    return like(angle.cos(), x_t) * x_t - like(angle.sin(), x_t) * cfg.sigma_d * F


# ---------------------------------------------------------------------------------------------------- loss
def weighted(error, t, cfg):
    """(SNR + 1) || error ||, a pseudo-Huber of the root mean square (the paper prints no formula)."""
    mse = error.square().flatten(1).mean(1)
    return ((snr(t, cfg) + 1) * ((mse + cfg.huber**2).sqrt() - cfg.huber)).mean()


def noisy(x0, t, gen, cfg):
    """z_t in float64: invDDIM divides small differences."""
    x0, (alpha, sigma) = x0.double(), alpha_sigma(t, cfg)
    return like(alpha, x0) * x0 + like(sigma, x0) * gen.normal(*x0.shape[1:])


def diffusion(net, target, teacher, x0, y, step, cfg, gen):
    """v-loss: (SNR + 1) times the squared error of x; t uniform."""
    t = gen.uniform().clamp(min=1e-4)
    z_t = noisy(x0, t, gen, cfg)
    gen.same_dropout()
    mse = (f(net, z_t, t, y, cfg) - x0).square().flatten(1).mean(1)
    return ((snr(t, cfg) + 1) * mse).mean(), {}


def consistency(net, target, z_t, t, z_s, s, t_step, y, cfg, gen):
    gen.same_dropout()
    x = f(net, z_t, t, y, cfg)
    gen.same_dropout()
    with torch.no_grad():
        z_ref = ddim(f(target, z_s, s, y, cfg), z_s, s, t_step, cfg)
        x_ref = inverse_ddim(z_ref, z_t, t, t_step, cfg)
    return weighted(x - x_ref, t, cfg), {}


def ct(net, target, teacher, x0, y, step, cfg, gen):
    """Consistency training: x* is the data, so aDDIM is DDIM."""
    t, s, t_step = times(gen, step, cfg)
    z_t = noisy(x0, t, gen, cfg)
    return consistency(net, target, z_t, t, ddim(x0.double(), z_t, t, s, cfg), s, t_step, y, cfg, gen)


@torch.no_grad()
def teacher_step(teacher, z_t, t, s, x0, y, cfg):
    """aDDIM with the teacher's x*. Its variance is measured on the output without guidance (App. A.1)."""
    x = x_star = f(teacher, z_t, t, y, cfg)
    if cfg.teacher_guidance != 1:
        x_uncond = f(teacher, z_t, t, torch.full_like(y, -1), cfg)
        x_star = x_uncond + cfg.teacher_guidance * (x - x_uncond)
    if cfg.solver == "ddim":
        return ddim(x_star, z_t, t, s, cfg)
    x_var = cfg.xvar * (x - x0).square().flatten(1).mean(1) if cfg.xvar else analytic_variance(t, cfg)
    return addim(x_star, z_t, x_var, t, s, cfg)


def cd(net, target, teacher, x0, y, step, cfg, gen):
    """Consistency distillation."""
    t, s, t_step = times(gen, step, cfg)
    z_t = noisy(x0, t, gen, cfg)
    z_s = teacher_step(teacher, z_t, t, s, x0, y, cfg)
    return consistency(net, target, z_t, t, z_s, s, t_step, y, cfg, gen)


def halvings(step, cfg):
    """pd: how often the student has halved its steps."""
    most = round(math.log2(cfg.pd_start / cfg.student_steps))
    return min(step * (most + 1) // cfg.steps, most)


def pd(net, target, teacher, x0, y, step, cfg, gen):
    """One step of the student is two of the target: first the teacher with aDDIM, then the last student.
    # DEPARTS: lr and Adam go on through the stages; one variance formula for both teacher steps."""
    n = cfg.pd_start // 2 ** halvings(step, cfg)
    i = 1 + gen.index(n).double()
    t, mid, s = i / n, (i - 0.5) / n, (i - 1) / n
    z_t = noisy(x0, t, gen, cfg)
    with torch.no_grad():
        if halvings(step, cfg):
            z_mid = ddim(f(target, z_t, t, y, cfg), z_t, t, mid, cfg)
            z_s = ddim(f(target, z_mid, mid, y, cfg), z_mid, mid, s, cfg)
        else:
            z_mid = teacher_step(teacher, z_t, t, mid, x0, y, cfg)
            z_s = teacher_step(teacher, z_mid, mid, s, x0, y, cfg)
    gen.same_dropout()
    error = f(net, z_t, t, y, cfg) - inverse_ddim(z_s, z_t, t, s, cfg)
    return weighted(error, t, cfg), dict(student_steps=n)


LOSSES = {"diffusion": diffusion, "ct": ct, "cd": cd, "pd": pd}


# ------------------------------------------------------------------------------------------------- sampler
@torch.no_grad()
def sample(net, noise, y, nfe, cfg, gen, path=None):
    """noise ~ N(0, sigma_d^2 I) (B, ...) -> x. Alg. 2: a DDIM step a segment; diffusion: nfe steps of
    --solver, aDDIM with the analytic variance (Alg. 3). path collects the states."""
    if cfg.mode == "diffusion" and cfg.solver == "heun":
        return common.solve(net, noise, common.ode_times((nfe + 1) // 2, cfg.sigma_d), y, cfg.sigma_d)
    if cfg.mode != "diffusion" and nfe != cfg.student_steps:
        common.fail(f"a run with --student_steps {cfg.student_steps} takes --nfe {cfg.student_steps}")
    z = noise.double() / cfg.sigma_d
    for i in range(nfe, 0, -1):
        t, s = (torch.full(z.shape[:1], j / nfe, dtype=torch.float64, device=z.device) for j in (i, i - 1))
        x = f(net, z, t, y, cfg)
        adjusted = cfg.mode == "diffusion" and cfg.solver == "addim"
        z_s = addim(x, z, analytic_variance(t, cfg), t, s, cfg) if adjusted else ddim(x, z, t, s, cfg)
        if path is not None:
            path += [ddim(x, z, t, t + u * (s - t), cfg) for u in torch.arange(240 // nfe) * nfe / 240]
        z = z_s
    return z.to(noise.dtype)


# --------------------------------------------------------------------------------------------------- train
def train(cfg):
    run = common.Run(cfg)
    data = common.dataset(cfg, run.device)  # <- method
    teacher = common.load_teacher(cfg, data, run.device)  # <- method
    options = dict(head=False)  # <- method
    net = common.network(cfg, data, **options)  # <- method
    common.load_init(net, cfg, data)
    net.to(run.device)
    target = copy.deepcopy(net).eval().requires_grad_(False) if cfg.mode == "pd" else net  # <- method
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
        if cfg.mode == "pd" and halvings(done, cfg) > halvings(step, cfg):  # <- method
            target.load_state_dict(net.state_dict())  # <- method
        if done == 1:
            run.start()
        if done % cfg.log_every == 0 or done == cfg.steps:
            run.log(done, loss=total, lr=group["lr"], grad_norm=grad_norm, **info)
        if done % cfg.save_every == 0 or done in (1, cfg.steps):
            run.save(state, done)
        if done % cfg.sample_every == 0 or done == cfg.steps:
            nfes = (cfg.student_steps,)  # <- method
            common.report(cfg, run, done, sample, ema, data, teacher, nfes)  # <- method
            if cfg.teacher == "exact" and cfg.mode != "diffusion" and common.RANK == 0:  # <- method
                compare(cfg, teacher)  # <- method


# ---------------------------------------------------------------------------------------------------- main
def compare(cfg, teacher):
    """Print the energy distance of the exact teacher's own samples at the student's number of evaluations."""
    gen, nfe = common.Draw(12345, 0, 0, 5000, teacher.mean.device), cfg.student_steps
    noise = cfg.sigma_d * gen.normal(*teacher.shape)
    y = gen.index(teacher.classes) if cfg.conditional else None
    fresh, _ = teacher.batch(common.Draw(cfg.seed, 2**32, 0, 5000, teacher.mean.device))
    for solver in ("ddim", "addim", "heun") if nfe > 2 else ("ddim", "addim"):
        x = sample(teacher, noise, y, nfe, replace(cfg, mode="diffusion", solver=solver), gen)
        used = nfe if solver != "heun" else 2 * ((nfe + 1) // 2) - 1
        print(f"teacher, {solver}, {used} NFE: {common.energy_distance(x, fresh):.5f}")


def figure(cfg):
    """Fig. 1: densities of (t, z) along paths from the same noise; noise at the left, data at the right."""
    noise, columns = cfg.sigma_d * common.Draw(0, 0, 0, 400).normal(1), {}
    for steps in (1, 2, 4, 0):
        part, path = replace(cfg, student_steps=steps or 240, out=f"{cfg.out}/{steps}"), []
        if steps:
            train(part)
            net = common.load_net(part.out)
        else:  # the ODE: many DDIM steps of the exact teacher
            net = common.dataset(cfg)
        sample(net, noise, None, part.student_steps, part, None, path)
        time = ((torch.arange(len(path)) + 0.5) / len(path) * 2 - 1).expand(len(noise), -1)
        points = torch.stack([time, torch.cat(path, 1).float() / 3], 2).flatten(0, 1)
        columns[f"{steps} step{'s' * (steps > 1)}" if steps else "ODE"] = points
    common.panels(columns, f"{cfg.out}/paths.png")
    print(f"wrote {cfg.out}/paths.png")


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    picture = any(word.startswith("--figure") for word in words)
    cfg = common.parse_args(Config, PRESETS, LOSSES, ["--dataset", "modes"] * picture + words)
    if cfg.mode in ("cd", "pd") and not cfg.teacher:
        common.fail(f"--mode {cfg.mode} distills a teacher: give --teacher RUN (or exact, for gmm)")
    if cfg.mode == "pd" and cfg.resume and common.read_checkpoint(cfg.out)["config"]["steps"] != cfg.steps:
        common.fail("the stages of pd depend on --steps: --resume cannot change it")
    if cfg.figure and (cfg.dataset != "modes" or common.WORLD > 1):
        common.fail("--figure is for --dataset modes and one process")
    if cfg.mode == "pd" and not (cfg.pd_start / cfg.student_steps) in (2**i for i in range(20)):
        common.fail(f"--pd_start must be --student_steps {cfg.student_steps} times a power of 2")
    if cfg.teacher_guidance != 1 and not cfg.conditional:
        common.fail("--teacher_guidance needs --conditional, and a teacher trained with --label_dropout")
    if cfg.solver == "heun" and cfg.mode != "diffusion":
        common.fail("--solver heun is a sampler of --mode diffusion; a teacher takes addim or ddim steps")
    steps = cfg.teacher_steps
    if len(steps) != 2 or not all(type(n) is int and n >= cfg.student_steps for n in steps):
        common.fail("--teacher_steps takes two numbers, such as 64,1280, neither below --student_steps")
    if len(cfg.noise_res) not in (0, 3) or not all(0 < r < math.inf for r in cfg.noise_res):
        common.fail("--noise_res takes three resolutions, such as 32,64,64, or none")
    if cfg.figure:
        figure(cfg)
    elif cfg.sample:
        common.write_samples(cfg, sample)
    elif cfg.dry_run:
        common.dry_run(cfg)
    else:
        train(cfg)


if __name__ == "__main__":
    main()
