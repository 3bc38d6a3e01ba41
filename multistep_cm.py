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

f is the denoiser, and f^- is f under stop-gradient. At s = t_step the target is the teacher step itself.
pd is progressive distillation (Salimans & Ho, 2022): targets from two steps of the teacher, then of itself.
TRACT (Berthelot et al., 2023) has segments, too, but only distills, takes f^- from an average of the weights,
and halves the number of segments in stages down to one or two.

Differs from cm.py by: 1) VP and a grid in t, whose steps get smaller while training; 2) targets at the lower
end of t's segment, so f is no map to t = 0 but one DDIM step; 3) aDDIM; 4) sampling without noise.

    python multistep_cm.py                                      toy: 8 Gaussians, exact teacher, 4 steps, cd
    python multistep_cm.py --figure                             paths in 1-D of 1, 2, 4 steps and of the ODE
    python multistep_cm.py --dataset folder --data PATH --image_size 16 --mode diffusion
    python multistep_cm.py --dataset folder --data PATH         distills the teacher of the line above
    python multistep_cm.py --sample 64 --nfe 4 --dataset folder
    torchrun --nproc_per_node=8 multistep_cm.py --dataset imagenet64 --data PATH --teacher RUN
    torchrun --nproc_per_node=8 multistep_cm.py --pretrained stabilityai/stable-diffusion-xl-base-1.0 \\
        --vae madebyollin/sdxl-vae-fp16-fix --data FOLDER --dtype fp16 --out out/mcm-sdxl
    python multistep_cm.py --sample 4 --prompt "a red fox in the snow" --nfe 16 --out out/mcm-sdxl
"""
# ------------------------------------------------------------------------------------------------- imports
import common
from common import like

import copy
import math
import sys
from dataclasses import dataclass, replace
from typing import Literal

import torch


# -------------------------------------------------------------------------------------------------- Config
@dataclass
class Config(common.Config):
    mode: str = "cd"  # training objective
    student_steps: int = 4  # segments of the ODE, which is the number of sampling steps, too: 1, 2, 4, 8, 16
    teacher_steps: tuple = (64, 1280)  # T at the start and, growing log-linearly, from `anneal` on
    anneal: float = 0.5  # share of the steps in which T grows; 0 is off
    solver: Literal["addim", "ddim", "heun"] = "addim"  # the teacher's; of diffusion, the sampler's
    x_var_frac: float = 0.75  # aDDIM: Var[x | z_t] is this times (x* - x)^2; 0 is 0.1 / (2 + SNR)
    x_var_data: bool = False  # aDDIM as a sampler: measure (x* - x)^2 on the data; false is 0.1 / (2 + SNR)
    huber: float = 1e-4  # epsilon of the pseudo-Huber norm
    guidance: float = 1.0  # strength of the teacher's guidance in cd and pd, 1 + the paper's g; 1 is off
    noise_res: tuple = ()  # noise resolutions at t = 1 and t = 0, and the image's; none is the plain cosine
    pd_start: int = 64  # pd: steps of the first student, which are halved down to student_steps
    figure: bool = False  # train 1, 2 and 4 steps on two Gaussians in 1-D, and draw their paths

    def needs_steps(self):
        return super().needs_steps() or self.mode == "pd" or self.mode != "diffusion" and self.anneal > 0

    def distills(self):
        return self.mode in ("cd", "pd")


# ------------------------------------------------------------------------------------------------- PRESETS
PRESETS = {
    # The embedding of t is faster than elsewhere, as f jumps from segment to segment.
    "gmm": dict(steps=5000, emb_scale=4.0),
    "gmm1d": dict(teacher="exact", steps=2000, lr_cooldown=0.3, channels=64, blocks=4, c_noise="log",
                  emb_scale=8.0, sigma_d=1.0),
    "gmm64": dict(teacher="exact", steps=1000, lr=2e-3, lr_cooldown=0.7, channels=128, blocks=4,
                  emb_scale=4.0),
    "shapes": {},
    "folder": {},
    # FID of 1 / 2 / 4 / 8 / 16 steps, small: ct 7.2 / 2.7 / 1.8 / 1.5 / 1.5, cd 4.3 / 2.0 / 1.7 / 1.6 / 1.5;
    # L: ct 6.4 / 2.3 / 1.6 / 1.5 / 1.6, cd 3.2 / 1.9 / 1.6 / 1.4 / 1.4
    # DEPARTS: paper UViTs of 394 M and (L) 1.23 B; here EDM2's U-Nets of 280 M and 778 M
    # DEPARTS: paper names neither learning rate nor EMA; those here are ours, and EDM2's for teachers
    "imagenet64": dict(steps=200_000, lr=1e-4, noise_res=(32, 64, 64)),
    ("imagenet64", "S"): dict(dropout=0.2, dropout_res=16),
    ("imagenet64", "S", "diffusion"): dict(dropout=0.2),
    ("imagenet64", "L"): dict(dropout=0.1, dropout_res=32),
    # FID of 4 / 8 / 16 steps, text to image: 8.7 / 8.1 / 7.9 with guidance 1.5, 12.4 / 13.9 / 14.4 with 4
    # DEPARTS: paper trains all of its own pixel model, 512 x 512, noise resolutions 32 to 512; here LoRA on a
    # pipeline's latents, with the plain cosine, and the learning rate of LCM-LoRA, as the paper names none
    "text": dict(steps=30_000, batch=2048, micro=1, student_steps=16, teacher_steps=(256, 256), anneal=0.0,
                 huber=1.0, guidance=1.5, lr=1e-4, ema_sigma_rel=0.0, ema_halflife=0.0, save_every=500),
    # FID of 1 / 2 / 4 / 8 / 16 steps, cd with guidance of unknown strength: 8.5 / 3.1 / 2.4 / 2.1 / 2.0;
    # L 7.0 / 3.1 / 2.3 / 2.1 / 2.0
    # DEPARTS: paper UViTs of 397 M and (L) 1.25 B and a multiscale loss; here U-Nets of 184 M and 736 M
    "imagenet128": dict(common.EDM2_NET, image_size=128, conditional=True, batch=2048, steps=200_000, lr=1e-4,
                        channels=128, channel_mult=(1, 2, 3, 4, 4), dropout=0.1, dropout_res=16,
                        noise_res=(32, 128, 128), save_every=2500),
    ("imagenet128", "L"): dict(channels=256, dropout_res=64),
    ("imagenet128", "diffusion"): dict(lr=1e-2, lr_warmup=5000, lr_ref=35_000, steps=500_000,
                                       label_dropout=0.1),
}


# --------------------------------------------------------------------------------- process: times and noise
def alpha_sigma(t, cfg):
    """Cosine schedule, (B,) float64. sigma_0 = 0 and alpha_1 = 0, to rounding.

    noise_res moves the log-SNR by 2 log(noise resolution / the image's), with a noise resolution that is
    interpolated from t = 0 to 1 ("simple diffusion")."""
    low, high, size = cfg.noise_res or (1, 1, 1)
    shift = (t * math.log(low / size) + (1 - t) * math.log(high / size)).exp()
    angle = torch.atan2(torch.sin(math.pi / 2 * t), shift * torch.cos(math.pi / 2 * t))
    return angle.cos(), angle.sin()


def snr(t, cfg):
    alpha, sigma = alpha_sigma(t, cfg)
    return (alpha / sigma) ** 2


def times(gen, step, cfg):
    """t > s, neighbours of this step's grid, and the lower end t_step of their segment, (B,) float64. A t at
    the upper end of a segment belongs to it."""
    first, last = cfg.teacher_steps
    share = min(step / (cfg.anneal * cfg.steps), 1) if cfg.anneal else 1
    n = max(1, round(math.exp(math.log(first) + share * math.log(last / first)) / cfg.student_steps))
    start, n_rel = gen.index(cfg.student_steps) * n, 1 + gen.index(n)
    return [i.double() / (n * cfg.student_steps) for i in (start + n_rel, start + n_rel - 1, start)]


def ddim(x, z_t, t, s, cfg):
    """Eq. 4; the identity at s = t, also where both are 0."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t, cfg), alpha_sigma(s, cfg)
    ratio = torch.where(s == t, 1.0, sigma_s / sigma_t)
    return like(alpha_s - alpha_t * ratio, x) * x + like(ratio, x) * z_t


def inverse_ddim(z_s, z_t, t, s, cfg):
    """Eq. 5: the x for which DDIM_t->s(x, z_t) = z_s."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t, cfg), alpha_sigma(s, cfg)
    ratio = sigma_s / sigma_t
    return (z_s - like(ratio, z_s) * z_t) / like(alpha_s - alpha_t * ratio, z_s)


def addim(x, z_t, x_var, t, s, cfg):
    """Eq. 14, Alg. 3: DDIM with more of eps, such that ||z_s||^2 is right. x_var (B,) is tr Var[x | z_t] /
    D."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t, cfg), alpha_sigma(s, cfg)
    eps = (z_t - like(alpha_t, x) * x) / like(sigma_t, x)
    z_var = (alpha_s - alpha_t * sigma_s / sigma_t) ** 2 * x_var / eps.square().flatten(1).mean(1)
    return like(alpha_s, x) * x + like((sigma_s**2 + z_var).sqrt(), x) * eps


def analytic_variance(t, cfg):
    """A tenth of the variance that x given z_t would have if x had the variance 1/2."""
    return 0.1 / (2 + snr(t, cfg))


def measured_variance(net, t, cfg, n=512):
    """x_var_frac times the squared error of the denoiser on n samples of the data at t (B,), which is the
    same for all. It is measured once for each t and stays with the network (Alg. 3, "precompute")."""
    known = vars(net).setdefault("x_var", {})
    version = next((p._version for p in net.parameters()), 0)  # an average changes between reports
    if (key := (float(t[0]), cfg.x_var_frac, version)) not in known:
        draw = common.Draw(cfg.seed, 2**32, 0, n, t.device)
        x0, y = common.dataset(cfg, t.device).batch(draw)
        t = t[:1].expand(n)
        known[key] = cfg.x_var_frac * (f(net, noisy(x0, t, draw, cfg), t, y, cfg) - x0).square().mean()
    return known[key]


def noisy(x0, t, gen, cfg):
    """z_t in float64, because invDDIM divides by small differences."""
    x0, (alpha, sigma) = x0.double(), alpha_sigma(t, cfg)
    return like(alpha, x0) * x0 + like(sigma, x0) * gen.normal(*x0.shape[1:])


# ----------------------------------------------------------------------------------- consistency function f
def f(net, z_t, t, y, cfg):
    """The denoiser x(z_t, t): v-prediction, in TrigFlow's coordinates."""
    # DEPARTS: paper's network predicts alpha eps - sigma x; here that of x / sigma_d, which has unit variance
    x_t, angle = common.to_trigflow(z_t, *alpha_sigma(t, cfg), cfg.sigma_d)
    F = net(x_t / cfg.sigma_d, angle, y)
    return like(angle.cos(), x_t) * x_t - like(angle.sin(), x_t) * cfg.sigma_d * F


# ---------------------------------------------------------------------------------------------------- loss
def weighted(error, t, cfg):
    """(SNR + 1) || error ||."""
    # DEPARTS: the paper prints no formula for its pseudo-Huber; here that of the root mean square
    mse = error.square().flatten(1).mean(1)
    return ((snr(t, cfg) + 1) * ((mse + cfg.huber**2).sqrt() - cfg.huber)).mean()


def diffusion(net, target, teacher, x0, y, step, cfg, gen):
    """v-loss: (SNR + 1) times the squared error of x, with t uniform."""
    t = gen.uniform().clamp(min=1e-4)
    z_t = noisy(x0, t, gen, cfg)
    gen.same_dropout()
    mse = (f(net, z_t, t, y, cfg) - x0).square().flatten(1).mean(1)
    return ((snr(t, cfg) + 1) * mse).mean(), {}


def consistency(net, target, z_t, t, z_s, s, y, cfg, gen, t_step):
    """The distance of f at t from the x that leads where f^- leads from s, at t_step; the same dropout
    masks."""
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
    z_s = ddim(x0.double(), z_t, t, s, cfg)
    return consistency(net, target, z_t, t, z_s, s, y, cfg, gen, t_step)


@torch.no_grad()
def ode_step(teacher, z_t, t, s, y, cfg, x0):
    """One step of the teacher from t down to s. aDDIM's variance is measured on the output without guidance
    (App. A.1)."""
    x = x_star = f(teacher, z_t, t, y, cfg)
    if cfg.guidance != 1:
        x_uncond = f(teacher, z_t, t, torch.full_like(y, -1), cfg)
        x_star = x_uncond + cfg.guidance * (x - x_uncond)
    if cfg.solver == "ddim":
        return ddim(x_star, z_t, t, s, cfg)
    measured = cfg.x_var_frac * (x - x0).square().flatten(1).mean(1)
    return addim(x_star, z_t, measured if cfg.x_var_frac else analytic_variance(t, cfg), t, s, cfg)


def cd(net, target, teacher, x0, y, step, cfg, gen):
    """Consistency distillation."""
    t, s, t_step = times(gen, step, cfg)
    z_t = noisy(x0, t, gen, cfg)
    z_s = ode_step(teacher, z_t, t, s, y, cfg, x0)
    return consistency(net, target, z_t, t, z_s, s, y, cfg, gen, t_step)


def halvings(step, cfg):
    """How often the student of pd has halved its steps."""
    most = round(math.log2(cfg.pd_start / cfg.student_steps))
    return min(step * (most + 1) // cfg.steps, most)


def pd(net, target, teacher, x0, y, step, cfg, gen):
    """One step of the student is two of the target: at first the teacher's, with aDDIM, then the last
    student's."""
    # DEPARTS: paper starts each stage anew; here lr and Adam go on. Both teacher steps have one variance.
    n = cfg.pd_start // 2 ** halvings(step, cfg)
    i = 1 + gen.index(n).double()
    t, mid, s = i / n, (i - 0.5) / n, (i - 1) / n
    z_t = noisy(x0, t, gen, cfg)
    with torch.no_grad():
        if halvings(step, cfg):
            z_mid = ddim(f(target, z_t, t, y, cfg), z_t, t, mid, cfg)
            z_s = ddim(f(target, z_mid, mid, y, cfg), z_mid, mid, s, cfg)
        else:
            z_mid = ode_step(teacher, z_t, t, mid, y, cfg, x0)
            z_s = ode_step(teacher, z_mid, mid, s, y, cfg, x0)
    gen.same_dropout()
    error = f(net, z_t, t, y, cfg) - inverse_ddim(z_s, z_t, t, s, cfg)
    return weighted(error, t, cfg), dict(student_steps=n)


LOSSES = {"diffusion": diffusion, "ct": ct, "cd": cd, "pd": pd}


# ------------------------------------------------------------------------------------------------- sampler
@torch.no_grad()
def sample(net, noise, y, nfe, cfg, gen, path=None):
    """noise ~ N(0, sigma_d^2 I) (B, ...) -> x. Alg. 2: one DDIM step a segment. `path` collects the states.

    diffusion takes nfe steps of --solver: DDIM, aDDIM (Alg. 3), or Heun's on EDM's grid."""
    if cfg.mode == "diffusion" and cfg.solver == "heun":
        return common.solve(net, noise, common.ode_times((nfe + 1) // 2, cfg.sigma_d), y, cfg.sigma_d)
    if cfg.mode != "diffusion" and nfe != cfg.student_steps:
        common.fail(f"a run with --student_steps {cfg.student_steps} takes --nfe {cfg.student_steps}")
    z = noise.double() / cfg.sigma_d
    for i in range(nfe, 0, -1):
        t, s = (torch.full(z.shape[:1], j / nfe, dtype=torch.float64, device=z.device) for j in (i, i - 1))
        x = f(net, z, t, y, cfg)
        z_s = ddim(x, z, t, s, cfg)
        if cfg.mode == "diffusion" and cfg.solver == "addim":
            x_var = measured_variance(net, t, cfg) if cfg.x_var_data else analytic_variance(t, cfg)
            z_s = addim(x, z, x_var, t, s, cfg)
        if path is not None:
            path += [ddim(x, z, t, t + u * (s - t), cfg) for u in torch.arange(240 // nfe) * nfe / 240]
        z = z_s
    return z.to(noise.dtype)


# --------------------------------------------------------------------------------------------------- train
def train(cfg):
    run = common.Run(cfg)
    data = common.dataset(cfg, run.device)  # <- method
    teacher = common.load_teacher(cfg, data, run.device)  # <- method
    net = common.network(cfg, data, run.device, head=False)  # <- method
    target = copy.deepcopy(net).eval().requires_grad_(False) if cfg.mode == "pd" else net  # <- method
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = common.make_optimizer(net, cfg)
    scaler = torch.amp.GradScaler(run.device.type, enabled=cfg.dtype == "fp16")
    state = dict(net=net, target=target, ema=ema, optimizer=optimizer, scaler=scaler)
    start = run.resume(state) if cfg.resume else 0
    wrapped = run.wrap(net)  # takes the gradients; the bare net does everything else
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
        if done % cfg.log_every == 0 or done == cfg.steps:
            run.log(done, loss=total, lr=group["lr"], grad_norm=grad_norm, **info)
        if done % cfg.save_every == 0 or done in (1, cfg.steps):
            run.save(state, done)
        if done % cfg.sample_every == 0 or done == cfg.steps:
            common.report(cfg, run, done, sample, ema, data, teacher, (cfg.student_steps,))  # <- method
            if cfg.teacher == "exact" and cfg.mode != "diffusion" and common.RANK == 0:  # <- method
                compare(cfg, teacher)  # <- method


# -------------------------------------------------------------------------------------------------- extras
def compare(cfg, teacher):
    """The energy distance of the exact teacher's own samples at the student's number of evaluations, printed
    and as {name: distance}."""
    gen, nfe, rows = common.Draw(12345 + cfg.seed, 0, 0, 5000, teacher.mean.device), cfg.student_steps, {}
    noise = cfg.sigma_d * gen.normal(*teacher.shape)
    y = gen.index(teacher.classes) if cfg.conditional else None
    fresh, _ = teacher.batch(common.Draw(cfg.seed, 2**32, 0, 5000, teacher.mean.device))
    for solver, measured in (("ddim", False), ("addim", False), ("addim", True), ("heun", False)):
        used = nfe if solver != "heun" else 2 * ((nfe + 1) // 2) - 1
        if used > 1 or solver != "heun":
            way = replace(cfg, mode="diffusion", solver=solver, x_var_data=measured)
            x, name = sample(teacher, noise, y, nfe, way, gen), solver + ", x_var measured" * measured
            rows[name] = common.energy_distance(x, fresh)
            print(f"teacher, {name}, {used} NFE: {rows[name]:.5f}")
    return rows


def figure(cfg):
    """Fig. 1: densities of (t, z) along paths from the same noise, which is at the left; data is at the
    right."""
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


# ---------------------------------------------------------------------------------------------------- main
def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    picture = any(word.startswith("--figure") for word in words)
    cfg = common.parse_args(Config, PRESETS, LOSSES, ["--dataset", "gmm1d"] * picture + words)
    if cfg.figure and (cfg.dataset != "gmm1d" or common.WORLD > 1):
        common.fail("--figure is for --dataset gmm1d and one process")
    if cfg.mode == "pd" and cfg.pd_start / cfg.student_steps not in (2**i for i in range(20)):
        common.fail(f"--pd_start must be --student_steps {cfg.student_steps} times a power of 2")
    if cfg.x_var_data and not cfg.x_var_frac:
        common.fail("--x_var_data measures what --x_var_frac is a share of: give one above 0")
    if cfg.guidance != 1 and not cfg.conditional:
        common.fail("--guidance needs --conditional, and a teacher trained with --label_dropout")
    if cfg.solver == "heun" and cfg.mode != "diffusion":
        common.fail("--solver heun is a sampler of --mode diffusion; a teacher takes addim or ddim steps")
    steps = cfg.teacher_steps
    if len(steps) != 2 or not all(type(n) is int and cfg.student_steps <= n < 2**31 for n in steps):
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
