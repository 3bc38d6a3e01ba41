"""Multistep CM: consistency models in segments, between one step and diffusion; the aDDIM teacher.
Heek, Hoogeboom & Salimans, "Multistep Consistency Models" (arXiv:2403.06807).

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
import kit
from common import like

import copy
import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch


# -------------------------------------------------------------------------------------------------- Config
@dataclass
class Config(kit.Config):
    distilling = ("cd", "pd")  # the modes that need a teacher
    mode: str = kit.fixed("cd")  # training objective
    student_steps: int = kit.fixed(4, least=1)  # segments of the ODE, and so sampling steps: 1, 2, 4, 8, 16
    teacher_steps: tuple = (64, 1280)  # T at the start and, growing log-linearly, from `anneal` on
    anneal: float = 0.5  # share of the steps in which T grows; 0 is off
    solver: Literal["addim", "ddim", "heun"] = "addim"  # the teacher's; of diffusion, the sampler's
    x_var_frac: float = 0.75  # aDDIM: Var[x | z_t] is this times (x* - x)^2; 0 is 0.1 / (2 + SNR)
    x_var_data: bool = False  # aDDIM as a sampler: measure (x* - x)^2 on the data; false is 0.1 / (2 + SNR)
    huber_c: float = 1e-4  # epsilon of the pseudo-Huber norm, a root mean square
    guidance: float = kit.fixed(1.0, unused="diffusion ct")  # of the teacher, 1 + the paper's g; 1 is off
    noise_res: tuple = kit.fixed(())  # noise resolutions at t = 1 and 0, and the image's; none: plain cosine
    pd_start: int = kit.fixed(64, least=1, unused="diffusion ct cd")  # pd: steps of the first student
    figure: bool = kit.call(False, implies=lambda _: dict(dataset="gmm1d"))  # draw paths in 1-D

    def needs_steps(self):
        return super().needs_steps() or self.mode == "pd" or self.mode != "diffusion" and self.anneal > 0

    def guides_teacher(self):
        return self.distills() and self.guidance != 1

    def inference(self):
        n = self.student_steps
        alpha, sigma = alpha_sigma(torch.arange(n, 0, -1).double() / n, self)
        ratios = {n: (sigma / alpha).tolist()}
        return dict(scheduler="TCDScheduler", eta=0.0, guidance_scale=1.0, ratios=ratios)

    def check(self):
        if self.figure and (self.mode == "diffusion" or self.sample or self.export or self.resume
                            or self.dry_run or kit.WORLD > 1):
            kit.fail("--figure trains students of 1, 2 and 4 steps anew, in one process, and draws them")
        if self.mode == "pd" and self.pd_start / self.student_steps not in (2**i for i in range(20)):
            kit.fail(f"--pd_start must be --student_steps {self.student_steps} times a power of 2")
        if self.x_var_data and not self.x_var_frac:
            kit.fail("--x_var_data measures what --x_var_frac is a share of: give one above 0")
        if self.x_var_data and (self.mode, self.solver) != ("diffusion", "addim"):
            kit.fail("--x_var_data is for sampling by --solver addim, in --mode diffusion")
        if self.solver == "heun" and self.mode != "diffusion":
            kit.fail("--solver heun is a sampler of --mode diffusion; a teacher takes addim or ddim steps")
        steps = self.teacher_steps
        if len(steps) != 2 or not all(type(n) is int and self.student_steps <= n < 2**31 for n in steps):
            kit.fail("--teacher_steps takes two numbers, such as 64,1280, neither below --student_steps")
        if len(self.noise_res) not in (0, 3) or not all(0 < r < math.inf for r in self.noise_res):
            kit.fail("--noise_res takes three resolutions, such as 32,64,64, or none")


# ------------------------------------------------------------------------------------------------- PRESETS
PRESETS = {
    # The embedding of t is faster than elsewhere, as f jumps from segment to segment.
    # DEPARTS: paper 64 to 1,280 teacher steps; here to 320, as a run is short, and finer steps add noise.
    # cd stays at 32: f jumps at a segment's edge, and the nearest t above is 1 / T away.
    "gmm": dict(steps=4000, emb_scale=16.0, lr=3e-3, lr_cooldown=0.8, teacher_steps=(64, 320)),
    "gmm --mode cd": dict(teacher_steps=(32, 32)),
    # The last stage needs a learning rate, too.
    "gmm --mode pd": dict(pd_start=32, lr_cooldown=0.3, steps=7000),
    "gmm1d": dict(teacher="exact", steps=2000, lr_cooldown=0.3, channels=64, blocks=6, c_noise="log",
                  emb_scale=8.0, sigma_d=1.0),
    "gmm64": dict(teacher="exact", steps=1000, lr=2e-3, lr_cooldown=0.7, channels=128, blocks=6,
                  emb_scale=4.0),
    "shapes": {},
    "folder": {},
    # DEPARTS: paper UViTs of 394 M and (L) 1.23 B; here EDM2's U-Nets of 280 M and 778 M
    # DEPARTS: paper names neither learning rate nor EMA; those here are ours, and EDM2's for teachers
    "imagenet64": dict(steps=200_000, lr=1e-4, noise_res=(32, 64, 64)),
    "imagenet64 --size S": dict(dropout=0.2, dropout_res=16),
    "imagenet64 --size S --mode diffusion": dict(dropout=0.2),
    "imagenet64 --size L": dict(dropout=0.1, dropout_res=32),
    # DEPARTS: paper trains all of its own pixel model, 512 x 512, noise resolutions 32 to 512; here LoRA on a
    # pipeline's latents, with the plain cosine, and the learning rate of LCM-LoRA, as the paper names none
    "text": dict(steps=30_000, batch=2048, micro=1, student_steps=16, teacher_steps=(256, 256), anneal=0.0,
                 huber_c=1.0, guidance=1.5, lr=1e-4, ema_sigma_rel=0.0, ema_halflife=0.0, save_every=500),
    # DEPARTS: paper UViTs of 397 M and (L) 1.25 B and a multiscale loss; here U-Nets of 184 M and 736 M
    # DEPARTS: paper guides the smaller one's teacher, by a strength it does not name; here --guidance is off
    "imagenet128": dict(kit.EDM2_NET, image_size=128, conditional=True, batch=2048, steps=200_000, lr=1e-4,
                        channels=128, channel_mult=(1, 2, 3, 4, 4), dropout=0.1, dropout_res=16,
                        noise_res=(32, 128, 128), save_every=2500),
    "imagenet128 --size L": dict(channels=256, dropout_res=64),
    "imagenet128 --mode diffusion": dict(lr=1e-2, lr_warmup=5000, lr_ref=35_000, steps=500_000,
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


def noisy(x0, t, gen, cfg):
    """z_t, and the noise eps in it, in float64, because invDDIM divides by small differences."""
    x0, (alpha, sigma) = x0.double(), alpha_sigma(t, cfg)
    eps = gen.normal(*x0.shape[1:])
    return like(alpha, x0) * x0 + like(sigma, x0) * eps, eps


@torch.no_grad()
def ode_step(teacher, z_t, t, s, y, cfg, x0):
    """One step of the teacher from t down to s. aDDIM's variance is measured on the output without guidance
    (App. A.1)."""
    x = x_star = f(teacher, z_t, t, y, cfg)
    if cfg.guidance != 1:
        x_star = common.guide(x, f(teacher, z_t, t, torch.full_like(y, -1), cfg), cfg.guidance)
    if cfg.solver == "ddim":
        return ddim(x_star, z_t, t, s, cfg)
    x_var = analytic_variance(t, cfg)
    if cfg.x_var_frac:
        x_var = cfg.x_var_frac * (x - x0).square().flatten(1).mean(1)
    return addim(x_star, z_t, x_var, t, s, cfg)


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
    return ((snr(t, cfg) + 1) * ((mse + cfg.huber_c**2).sqrt() - cfg.huber_c)).mean()


def diffusion(net, target, teacher, x0, y, step, cfg, gen):
    """v-loss: (SNR + 1) times the squared error of x, with t uniform."""
    t = gen.uniform().clamp(min=1e-4)
    z_t, _ = noisy(x0, t, gen, cfg)
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
    z_t, _ = noisy(x0, t, gen, cfg)
    z_s = ddim(x0.double(), z_t, t, s, cfg)
    return consistency(net, target, z_t, t, z_s, s, y, cfg, gen, t_step)


def cd(net, target, teacher, x0, y, step, cfg, gen):
    """Consistency distillation."""
    t, s, t_step = times(gen, step, cfg)
    z_t, _ = noisy(x0, t, gen, cfg)
    z_s = ode_step(teacher, z_t, t, s, y, cfg, x0)
    return consistency(net, target, z_t, t, z_s, s, y, cfg, gen, t_step)


def halvings(step, cfg):
    """How often the student of pd has halved its steps."""
    most = round(math.log2(cfg.pd_start / cfg.student_steps))
    return min(step * (most + 1) // cfg.steps, most)


def pd(net, target, teacher, x0, y, step, cfg, gen):
    """One step of the student is two of the target: at first the teacher's, with aDDIM, then the average of
    the last student."""
    # DEPARTS: paper starts each stage anew; here the learning rate and Adam's moments go on
    n = cfg.pd_start // 2 ** halvings(step, cfg)
    i = 1 + gen.index(n).double()
    t, mid, s = i / n, (i - 0.5) / n, (i - 1) / n
    z_t, _ = noisy(x0, t, gen, cfg)
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
def sample(net, noise, y, nfe, cfg, gen, x_var=None, path=None):
    """noise ~ N(0, sigma_d^2 I) (B, ...) -> x. Alg. 2: one DDIM step a segment. `path` collects states.

    diffusion takes nfe steps of --solver: DDIM, aDDIM (Alg. 3) with the variances x_var (nfe,) or else the
    analytic ones, or Heun's on EDM's grid."""
    if cfg.mode == "diffusion" and cfg.solver == "heun":
        return common.solve(net, noise, common.ode_times((nfe + 1) // 2, cfg.sigma_d), y, cfg.sigma_d)
    if cfg.mode != "diffusion" and nfe != cfg.student_steps:
        kit.fail(f"a run with --student_steps {cfg.student_steps} takes --nfe {cfg.student_steps}")
    z = noise.double() / cfg.sigma_d
    for i in range(nfe, 0, -1):
        t, s = (z.new_full(z.shape[:1], j / nfe) for j in (i, i - 1))
        x = f(net, z, t, y, cfg)
        if path is not None:
            part = torch.arange(PATH_STATES // nfe) / (PATH_STATES // nfe)
            path += [ddim(x, z, t, t + u * (s - t), cfg) for u in part]
        if cfg.mode == "diffusion" and cfg.solver == "addim":
            z = addim(x, z, analytic_variance(t, cfg) if x_var is None else x_var[i - 1], t, s, cfg)
        else:
            z = ddim(x, z, t, s, cfg)
    return z.to(noise.dtype)


@torch.no_grad()
def measured(net, data, nfe, cfg, device="cpu", n=512):
    """`sample` for nfe steps, with x_var_frac times the squared error of the denoiser at each of their times,
    measured on n samples of the data before it starts (Alg. 3, "precompute")."""
    x_var = []
    for i in range(1, nfe + 1):
        gen = common.Draw(cfg.seed, 2**32, 0, n, device)
        x0, y = data.batch(gen)
        t = torch.full((n,), i / nfe, dtype=torch.float64, device=device)
        z_t, _ = noisy(x0, t, gen, cfg)
        x_var.append(cfg.x_var_frac * (f(net, z_t, t, y, cfg) - x0).square().mean())
    return functools.partial(sample, x_var=torch.stack(x_var))


# --------------------------------------------------------------------------------------------------- train
def train(cfg):
    run = kit.Run(cfg)
    data = kit.dataset(cfg, run.device)
    teacher = kit.load_teacher(cfg, data, run.device)  # <- method
    net = kit.network(cfg, data, run.device, head=False)  # <- method
    target = copy.deepcopy(net).eval().requires_grad_(False) if cfg.mode == "pd" else net  # <- method
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = kit.make_optimizer(net, cfg)
    scaler = torch.amp.GradScaler(run.device.type, enabled=cfg.dtype == "fp16")
    state = dict(net=net, target=target, ema=ema, optimizer=optimizer, scaler=scaler)
    start = run.begin(state, data, teacher)
    wrapped = run.wrap(net)  # takes the gradients; the bare net does everything else

    def show(step):
        kit.report(cfg, run, step, sample, ema, data, teacher, (cfg.student_steps,))  # <- method

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
        if cfg.mode == "pd" and halvings(done, cfg) > halvings(step, cfg):  # <- method
            target.load_state_dict(ema.state_dict())  # <- method
        if done % cfg.log_every == 0 or done == cfg.steps:
            run.log(done, loss=total, lr=group["lr"], grad_norm=grad_norm, **info)
        if run.due(done):
            run.save(state, done)
    show(cfg.steps)


# -------------------------------------------------------------------------------------------------- extras
PATH_STATES = 240  # states along a path of --figure, which is a multiple of each number of steps


def figure(cfg):
    """Fig. 1: paths from the same noise, evenly spread over its distribution, coloured by the mode that each
    ends in. Gray lines are the segments' ends."""
    noise = cfg.sigma_d * torch.special.ndtri((torch.arange(60) + 0.5) / 60)[:, None]
    data, columns = kit.dataset(cfg), {}
    if Path(cfg.out, "paths.png").exists() and not cfg.overwrite:
        kit.fail(f"{cfg.out}/paths.png is there already: --overwrite it, or choose another --out")
    parts = {n: replace(cfg, student_steps=n, out=f"{cfg.out}/{n}") for n in (1, 2, 4, PATH_STATES)}
    for part in list(parts.values())[:3]:  # all of them, before the first is trained
        part.check()
        kit.check_out(part)
    for title, part in zip(["1 step", "2 steps", "4 steps", "ODE"], parts.values()):
        steps, net, path, marks = part.student_steps, data, [], []  # ODE: many steps of the exact teacher
        if title != "ODE":
            train(part)
            net, marks = kit.load_net(part.out), [i / steps for i in range(1, steps)]
        path.append(sample(net, noise, None, steps, part, None, path=path))
        colours = [("#1f5aaa", "#d9660c")[k] for k in (path[-1] - data.mean.flatten()).abs().argmin(1)]
        columns[title] = kit.lines(torch.cat(path, 1), colours, marks, half=3.0)
    kit.panels(columns, f"{cfg.out}/paths.png")
    print(f"wrote {cfg.out}/paths.png")


# ---------------------------------------------------------------------------------------------------- main
def main(argv=None):
    cfg = kit.parse_args(Config, PRESETS, LOSSES, argv)
    if cfg.figure:  # <- method
        return figure(cfg)  # <- method
    if cfg.sample and cfg.x_var_data:  # <- method
        device = "cuda" if torch.cuda.is_available() else "cpu"  # <- method
        net, data = kit.load_net(cfg.out).to(device), kit.dataset(cfg, device)  # <- method
        return kit.write_samples(cfg, measured(net, data, cfg.nfe, cfg, device))  # <- method
    if cfg.sample:
        return kit.write_samples(cfg, sample)
    if cfg.dry_run:
        return kit.dry_run(cfg)
    if cfg.export:
        return kit.export(cfg)
    train(cfg)


if __name__ == "__main__":
    main()
