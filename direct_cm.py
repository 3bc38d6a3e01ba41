"""Direct CM: a student that solves the ODE directly, beside a consistency model. Which one samples better?
Vouitsis et al., "Inconsistencies In Consistency Models: Better ODE Solving Does Not Imply Better Samples"
(arXiv:2411.08954).

process           z_t = alpha_t x_0 + sigma_t eps,  alpha_t^2 = abar[t - 1],  SDXL's schedule of 1000 betas
labels            t = 1 .. 1000, and 0 for the data: alpha_0 = 1, sigma_0 = 0. diffusers counts 0 .. 999.
grid              N intervals: 1000, 1000 - 1000 / N, .., 1000 / N, 0
consistency       f(z_t, t) = c_skip x + c_out x_0(z_t, t),  c_skip = 0.25 / ((10 t)^2 + 0.25)      (LCM's)
CM                || f(z_t, t) - f^-(z_s, s) ||^2,  z_s one solver step of the teacher from z_t      Eq. 4
Direct CM         || f(z_t, t) - z_0 ||^2,  z_0 the solver's solution, all steps from t to 0         Eq. 5
between them      --hops n: z_s after n solver steps;  f^-(z_0, 0) = z_0, so Direct CM is n = N
ODE error         E = distance of f(z_T, T) from the solver's solution, from the same noise          Eq. 6

f^- is f under stop-gradient. The teacher is guided: eps = eps_u + w (eps_c - eps_u), Imagen's form.

Differs from cm.py by: 1) a discrete VP schedule; 2) hops; 3) guidance of the teacher; 4) two students trained
on the same draws (--mode both), and the paper's table of E beside sample quality.

    python direct_cm.py                                         toy: 8 Gaussians, exact teacher, both students
    python direct_cm.py --mode cm --hops 10 --out out/hops10    between CM and Direct CM
    python direct_cm.py --dataset folder --data PATH --teacher RUN
    python direct_cm.py --sample 64 --nfe 4 --out out/direct_cm/cm
    torchrun --nproc_per_node=8 direct_cm.py --pretrained stabilityai/stable-diffusion-xl-base-1.0 \\
        --vae madebyollin/sdxl-vae-fp16-fix --data FOLDER --mode cm --dtype fp16 --out out/sdxl
    python direct_cm.py --sample 4 --prompt "a red fox in the snow" --nfe 4 --out out/sdxl

With --pretrained the student is SDXL's U-Net with LoRA, the teacher the same without; x_0 is a latent and y a
caption. SD 1.5 works as well, with --image_size 512. The paper's Table 1, against the teacher's own images
from the same noise, is

    python eval.py out/sdxl --prompts CAPTIONS.txt --reference teacher --features inception --nfe 1 2 4
"""
# ------------------------------------------------------------------------------------------------- imports
import common
import kit
from common import like

import copy
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch


# -------------------------------------------------------------------------------------------------- Config
@dataclass
class Config(kit.Config):
    maker = "scm"  # makes this script's teachers
    distilling = ("cm", "direct", "both")  # the modes that need a teacher
    mode: str = kit.fixed("both")  # training objective; both trains the two students one after the other
    intervals: int = kit.fixed(100, least=1)  # N, solver steps from noise to data; divides 1000
    hops: int = kit.flag(0, unused="direct both")  # cm: solver steps before f^- takes over; 0 is one
    solver: Literal["ddim", "euler", "heun"] = "ddim"  # the teacher's
    guidance: float = kit.fixed(1.0)  # w, strength of the teacher's guidance (the paper has 9); 1 is off
    metric: Literal["l2", "huber"] = "l2"  # distance d; huber is elementwise with c = 0.001
    weighting: Literal["one", "snr"] = "one"  # weight of t: 1, or 1 + the SNR of x_0 of variance sigma_d^2

    def guides_teacher(self):
        return self.guidance != 1

    def inference(self):
        ratios = {n: (1 / ABAR[levels(n, self)] - 1).sqrt().tolist() for n in (1, 2, 4)}
        return dict(scheduler="LCMScheduler", guidance_scale=1.0, ratios=ratios)

    def check(self):
        if 1000 % self.intervals:
            kit.fail(f"--intervals must divide 1000, and {self.intervals} does not")
        if self.nfe > self.intervals or self.intervals < 4 and not self.sample:
            kit.fail(f"--intervals {self.intervals} are too few: a sample takes at most one step for each")
        if self.hops > self.intervals:
            kit.fail(f"--hops {self.hops} are more than --intervals {self.intervals}")


# ------------------------------------------------------------------------------------------------- PRESETS
PRESETS = {
    # DEPARTS: paper weighs all t alike; here by 1 + SNR, without which the small t are not learned and the
    # modes stay blurred. The embedding of t is faster than elsewhere, as f jumps from mode to mode.
    "gmm": dict(steps=3000, emb_scale=4.0, weighting="snr"),
    "shapes": {},
    "folder": {},
    # No EMA, as in the paper.
    # DEPARTS: paper 8-bit AdamW and fp16; here PyTorch's, and --dtype, as SDXL's own --vae overflows in fp16
    "text": dict(mode="cm", steps=250, batch=16, micro=1, lr=1e-4, guidance=9.0, clip=1.0, first_label=1,
                 ema_sigma_rel=0.0, ema_halflife=0.0, save_every=50, seed=24),
}


# --------------------------------------------------------------------------------- process: times and noise
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # "scaled linear"
ABAR = torch.cat([torch.ones(1, dtype=torch.float64), (1 - BETAS).cumprod(0)])  # by label, 0 .. 1000


def alpha_sigma(t):
    """Labels t (B,) int64 -> (B,) float64, (B,) float64; (1, 0) at t = 0."""
    abar = ABAR.to(t.device)[t]
    return abar.sqrt(), (1 - abar).sqrt()


def times(gen, step, cfg):
    """Labels t of the grid, uniform, and s, --hops solver steps below or 0; (B,) int64."""
    stride = 1000 // cfg.intervals
    t = (1 + gen.index(cfg.intervals)) * stride
    return t, (t - (cfg.hops or 1) * stride).clamp(min=0)


def noisy(x0, t, gen, cfg):
    """z_t, and the noise eps in it."""
    (alpha, sigma), eps = alpha_sigma(t), gen.normal(*x0.shape[1:])
    return like(alpha, x0) * x0 + like(sigma, x0) * eps, eps


def predict(net, z_t, t, y, cfg, guidance=1.0):
    """x_0 and eps of a network or a teacher, for t > 0, with a strength of guidance."""
    alpha, sigma = alpha_sigma(t)
    x_t, angle = common.to_trigflow(z_t, alpha, sigma, cfg.sigma_d)
    F = net(x_t / cfg.sigma_d, angle, y)
    if guidance != 1:
        F = common.guide(F, net(x_t / cfg.sigma_d, angle, torch.full_like(y, -1)), guidance)  # as of eps
    x_0 = like(angle.cos(), x_t) * x_t - like(angle.sin(), x_t) * cfg.sigma_d * F
    return x_0, (z_t - like(alpha, x_t) * x_0) / like(sigma, x_t)


def slope(teacher, z_t, t, y, cfg):
    """dz / d(t / 1000) along the PF-ODE, with beta(t) = 1000 betas[t - 1]."""
    # DEPARTS: at t = 0 the paper's code gives the network label 0; here it gets label 1, with the first beta
    t = t.clamp(min=1)
    beta, (_, sigma) = 1000 * BETAS.to(t.device)[t - 1], alpha_sigma(t)
    _, eps = predict(teacher, z_t, t, y, cfg, cfg.guidance)
    return like(beta / 2, z_t) * (eps / like(sigma, z_t) - z_t)


def ode_step(teacher, z_t, t, s, y, cfg):
    """One step of --solver from t down to s."""
    if cfg.solver == "ddim":
        x_0, eps = predict(teacher, z_t, t, y, cfg, cfg.guidance)
        alpha, sigma = alpha_sigma(s)
        return like(alpha, z_t) * x_0 + like(sigma, z_t) * eps
    dt, v_t = like((s - t) / 1000, z_t), slope(teacher, z_t, t, y, cfg)
    z_s = z_t + dt * v_t
    return z_t + dt * (v_t + slope(teacher, z_s, s, y, cfg)) / 2 if cfg.solver == "heun" else z_s


@torch.no_grad()
def solve(teacher, z_t, t, s, y, cfg):
    """z_s, by solver steps from each sample's own t down to its s. A sample that has arrived is not fed to
    the teacher again, which saves nearly half of the calls if s = 0."""
    z, now, stride = z_t.clone(), t.clone(), 1000 // cfg.intervals
    while (now > s).any():
        rows = (now > s).nonzero()[:, 0]
        y_rows = None if y is None else y[rows]
        z[rows] = ode_step(teacher, z[rows], now[rows], now[rows] - stride, y_rows, cfg)
        now[rows] -= stride
    return z


# ----------------------------------------------------------------------------------- consistency function f
def f(net, z_t, t, y, cfg):
    """LCM's boundary scalings; f(x, 0) = x. As t counts in labels, c_skip is all but 0 beyond t = 0."""
    scaled = 10.0 * t.double()
    c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
    x_0, _ = predict(net, z_t, t.clamp(min=1), y, cfg)
    return like(c_skip, z_t) * z_t + like(c_out, z_t) * x_0


# ---------------------------------------------------------------------------------------------------- loss
METRICS = {"l2": lambda a, b: (a - b).square().flatten(1).mean(1),
           "huber": lambda a, b: ((a - b).square() + 0.001**2).sqrt().flatten(1).mean(1) - 0.001}


def consistency(net, target, z_t, t, z_s, s, y, cfg, gen):
    """The weighted distance of f at t from f^- at s, with the same dropout masks; at s = 0 from z_s."""
    alpha, sigma = alpha_sigma(t)
    snr = (alpha * cfg.sigma_d / sigma) ** 2  # by 1 + SNR, the network's output counts the same at all t
    weight = {"one": torch.ones_like(snr), "snr": 1 + snr}[cfg.weighting]
    gen.same_dropout()
    prediction = f(net, z_t, t, y, cfg)
    if s.any():
        gen.same_dropout()
        with torch.no_grad():
            z_s = f(target, z_s, s, y, cfg)
    return (weight * METRICS[cfg.metric](prediction, z_s)).mean(), {}


def cm(net, target, teacher, x0, y, step, cfg, gen):
    """Consistency distillation (Eq. 4)."""
    t, s = times(gen, step, cfg)
    z_t, _ = noisy(x0, t, gen, cfg)
    z_s = solve(teacher, z_t, t, s, y, cfg)
    return consistency(net, target, z_t, t, z_s, s, y, cfg, gen)


def direct(net, target, teacher, x0, y, step, cfg, gen):
    """Direct CM (Eq. 5): the teacher's own solution at 0, without f^-."""
    t, _ = times(gen, step, cfg)
    s = torch.zeros_like(t)
    z_t, _ = noisy(x0, t, gen, cfg)
    z_0 = solve(teacher, z_t, t, s, y, cfg)
    return consistency(net, target, z_t, t, z_0, s, y, cfg, gen)


LOSSES = {"cm": cm, "direct": direct, "both": None}  # both: see extras


# ------------------------------------------------------------------------------------------------- sampler
def levels(nfe, cfg):
    """The nfe levels of the sampler, spread over the grid from label 1000 down; halves go to the even index,
    as in the authors' code."""
    return [1000 - 1000 // cfg.intervals * round(i * cfg.intervals / nfe) for i in range(nfe)]


@torch.no_grad()
def sample(net, noise, y, nfe, cfg, gen):
    """noise ~ N(0, sigma_d^2 I) (B, ...) -> x_0: f, noise of the next level, f, and so on."""
    z = noise / cfg.sigma_d
    for i, label in enumerate(levels(nfe, cfg)):
        t = z.new_full(z.shape[:1], label, dtype=torch.int64)
        if i:
            z, _ = noisy(z, t, gen, cfg)
        z = f(net, z, t, y, cfg)
    return z


# --------------------------------------------------------------------------------------------------- train
def train(cfg):
    run = kit.Run(cfg)
    data = kit.dataset(cfg, run.device)
    teacher = kit.load_teacher(cfg, data, run.device)  # <- method
    net = kit.network(cfg, data, run.device, head=False)  # <- method
    target = net  # <- method: the live network itself is the branch without gradient
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = kit.make_optimizer(net, cfg)
    scaler = torch.amp.GradScaler(run.device.type, enabled=cfg.dtype == "fp16")
    state = dict(net=net, target=target, ema=ema, optimizer=optimizer, scaler=scaler)
    start = run.begin(state, data, teacher)
    wrapped = run.wrap(net)  # takes the gradients; the bare net does everything else

    def show(step):
        kit.report(cfg, run, step, sample, ema, data, teacher, (1, 2, 4))  # <- method

    for step in run.steps(start):
        if run.shows(step):
            show(step)
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
            kit.normalize_weights(net)
            kit.lerp(ema, net, common.ema_beta(step + 1, cfg))
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.steps:
            run.log(done, loss=total, lr=group["lr"], grad_norm=grad_norm, **info)
        if run.due(done):
            run.save(state, done)
    show(cfg.steps)


# -------------------------------------------------------------------------------------------------- extras
@torch.no_grad()
def solution(teacher, noise, y, cfg):
    """The solver's x_0 from noise ~ N(0, sigma_d^2 I) (B, ...) at label 1000, under guidance."""
    top = noise.new_full(noise.shape[:1], 1000, dtype=torch.int64)
    return solve(teacher, noise / cfg.sigma_d, top, torch.zeros_like(top), y, cfg)


def both(cfg, argv):
    """Train the two students from the same weights, data, times and noise, and say how to compare them.
    --resume goes on with what is there, and gives a student that has not begun the flags of the other."""
    paths = {mode: f"{cfg.out}/{mode}" for mode in ("cm", "direct")}
    there = [path for path in paths.values() if Path(path, "ckpt.pt").exists()]
    if there and not (cfg.overwrite or cfg.resume):
        kit.fail(f"{cfg.out} holds students already: --overwrite or --resume both, or choose another --out")
    begun = {mode: kit.parse_args(Config, PRESETS, LOSSES, [*argv, "--resume", "--mode", mode, "--out", path])
             for mode, path in paths.items() if cfg.resume and path in there}
    flags = next(iter(begun.values()), cfg)
    parts = [begun.get(mode) or replace(flags, mode=mode, out=path, resume=False)
             for mode, path in paths.items()]
    for part in parts:  # both, before the first is trained
        kit.check_out(part)
    for part in parts:
        train(part)
    if kit.RANK == 0:
        print(f"the paper's table: python eval.py {' '.join(paths.values())} --reference teacher")


# ---------------------------------------------------------------------------------------------------- main
def main(argv=None):
    cfg = kit.parse_args(Config, PRESETS, LOSSES, argv)
    if cfg.sample:
        return kit.write_samples(cfg, sample)
    if cfg.dry_run and cfg.mode == "both":  # <- method
        cfg = replace(cfg, out=f"{cfg.out}/cm")  # <- method: the two are of one size
    if cfg.dry_run:
        return kit.dry_run(cfg)
    if cfg.export:
        return kit.export(cfg)
    if cfg.mode == "both":  # <- method
        return both(cfg, sys.argv[1:] if argv is None else argv)  # <- method
    train(cfg)


if __name__ == "__main__":
    main()
