"""sCM: simple, stable and scalable continuous-time consistency models.
Lu & Song, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models" (arXiv:2410.11081).

TrigFlow          x_t = cos(t) x_0 + sin(t) z,  z ~ N(0, sigma_d^2 I),  t in [0, pi/2]             Sec. 3
PF-ODE            dx_t/dt = sigma_d F(x_t / sigma_d, t)                                            Eq. 3
diffusion         || sigma_d F(x_t / sigma_d, t) - v_t ||^2,  v_t = cos(t) z - sin(t) x_0          Eq. 4
consistency       f(x_t, t) = cos(t) x_t - sin(t) sigma_d F(x_t / sigma_d, t)                      Eq. 5
tangent           df/dt = -cos(t) (sigma_d F - dx_t/dt) - sin(t) (x_t + sigma_d dF/dt)             Eq. 6
loss              e^w(t) / D || F - F^- - g ||^2 - w(t),  g = cos(t) df^-/dt, normalized           Eq. 8
vsd               e^w / D || sigma_d (F - F^-)(z) - (F_teacher - F_fake)(x_t) ||^2 - w               App. C

F^- is F under stop-gradient. dx_t/dt comes from the teacher (scd) or is v_t, which is right on average (sct).
One JVP gives dF/dt. In vsd, F_fake is a diffusion model of the student's own one-step samples, and x_t is
such a sample, noised. scd+vsd adds the two losses. Both go on from a finished scd student.

Absent: sCD in 2 to 16 segments, whose ends and loss the paper does not give (see multistep_cm.py).

Differs from cm.py by: 1) TrigFlow instead of EDM's process; 2) a tangent instead of a pair of times;
3) a square loss with a learned weight; 4) on ImageNet, a network whose derivative in t is bounded.

    python scm.py                                               toy: 8 Gaussians, exact teacher
    python scm.py --mode scd+vsd                                adds vsd to the student of the line above
    python scm.py --dataset folder --data PATH --image_size 16 --mode diffusion
    python scm.py --dataset folder --data PATH                  distills the teacher of the line above
    python scm.py --sample 64 --nfe 2 --dataset folder
    torchrun --nproc_per_node=8 scm.py --dataset imagenet512 --data IMAGENET/train --mode diffusion
    torchrun --nproc_per_node=8 scm.py --dataset imagenet512
"""
# ------------------------------------------------------------------------------------------------- imports
import common
import kit
from common import like

import copy
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch


# -------------------------------------------------------------------------------------------------- Config
@dataclass
class Config(kit.Config):
    distilling = ("scd", "dscd", "vsd", "scd+vsd")  # the modes that need a teacher
    mode: str = kit.fixed("scd")  # training objective
    P_mean: float = -1.0  # mean of log(sigma) in training, where sigma = sigma_d tan(t)
    P_std: float = 1.4  # standard deviation of log(sigma) in training
    tangent: Literal["normalize", "clip", "raw"] = "normalize"  # g over its RMS + c; df/dt clipped; neither
    tangent_c: float = 0.1  # c of the normalization; larger ones damp small tangents
    warmup: int = 10000  # steps in which the unstable half of the tangent fades in; 0 is off
    weighting: Literal["adaptive", "none"] = "adaptive"  # learn w(t), or leave it at 0
    mid_t: float = 1.1  # time of the second sampling step, in radians
    guidance_max: float = kit.flag(1.0, least=1)  # distillation: strengths of guidance up to this; 1 is off
    guidance: float = 1.0  # strength of guidance in sampling; 1 is off
    intervals: int = kit.flag(1024, least=1, most=2**20)  # dscd: N, intervals of EDM's grid
    fake_first: float = kit.flag(0.0, most=1)  # vsd: first share of the steps, of the fake score alone
    vsd_P_mean: float = kit.flag(0.4, least=-math.inf)  # vsd: mean of log(sigma) where scores are compared
    vsd_P_std: float = 2.0  # vsd: standard deviation of log(sigma) there

    def begins_from(self):
        return "scd" if "vsd" in self.mode else ""  # App. C adds vsd to a trained scd

    def guides_teacher(self):
        return self.guidance_max > 1

    def needs_steps(self):
        return super().needs_steps() or "vsd" in self.mode and self.fake_first > 0

    def trained(self):
        return 2 if "vsd" in self.mode else 1  # the fake score, too

    def check(self):
        if self.guidance == self.guidance_max == 1:
            return
        if not self.conditional:
            kit.fail("guidance compares with no label, so it needs --conditional")
        if self.mode == "sct":
            kit.fail("guidance of a student is its teacher's, and --mode sct has none")
        if self.distills() and self.guidance_max == 1:
            kit.fail("--guidance of a student needs one that was trained with --guidance_max")
        if self.mode == "diffusion" and not self.label_dropout:
            kit.fail("--guidance compares with no label, and this model was trained without --label_dropout")
        if self.mode == "diffusion" and self.guidance_max > 1:
            kit.fail("--guidance_max is for students; a diffusion model takes any --guidance in sampling")


# ------------------------------------------------------------------------------------------------- PRESETS
# DEPARTS: paper's double normalization scales and shifts; here it only scales (norm_shift), because the sizes
# that the paper prints for ImageNet leave no room for the shift
SCM_NET = dict(c_noise="t", emb="positional", double_norm=True, norm_shift=False, dtype="fp16", eps=1e-11,
            save_every=1000)
PRESETS = {
    # DEPARTS: paper adaptive weighting; here none, because an exact teacher's residual vanishes as t -> 0.
    # The best e^w, its inverse, has no bound there and drowns the large t.
    "gmm": dict(steps=4000, warmup=400, P_std=1.8, weighting="none"),
    **{f"gmm --mode {mode}": dict(lr=3e-3, lr_cooldown=0.8) for mode in ("scd", "dscd")},
    # DEPARTS: paper's fake score starts as the teacher; the exact one is no network, so here the fake score
    # starts from random weights, and learns alone at first.
    # DEPARTS: paper compares scores at P_mean = 0.4, P_std = 2; here at lower noise, because at high noise a
    # guided teacher points beyond the ring, and the student would follow.
    **{f"gmm --mode {mode}": dict(steps=1500, warmup=0, lr=5e-4, fake_first=2 / 3, vsd_P_mean=-1.7,
                                  vsd_P_std=0.4) for mode in ("vsd", "scd+vsd")},
    "shapes": dict(warmup=200),
    "folder": dict(warmup=200),
    # With 2e-3, shapes get noisier the longer it trains, and two steps on photographs are worse.
    **{key: dict(lr=5e-4) for key in ("shapes --mode scd", "folder --mode scd", "folder --mode sct")},
    "cifar10": dict(batch=512, steps=400_000, lr=1e-4),
    "cifar10 --mode sct": dict(dropout=0.2),
    "imagenet64": dict(SCM_NET, steps=400_000, lr_ref=35_000, P_std=1.6),
    "imagenet64 --mode sct": dict(dropout=0.45, dropout_res=16),
    "imagenet512": dict(SCM_NET, steps=200_000, lr_ref=70_000, P_mean=-0.8, P_std=1.6, guidance_max=2.0,
                        dropout_res=16),
    "imagenet512 --mode diffusion": dict(label_dropout=0.1, guidance_max=1.0, dropout_res=0),
    "imagenet512 --mode sct": dict(steps=100_000, guidance_max=1.0),
    "imagenet512 --mode scd+vsd": dict(steps=20_000, warmup=0),
}
for name, sizes in kit.EDM2_TEACHERS.items():  # a hundredth of the teachers' learning rates
    PRESETS |= {f"{name} --size {size}": dict(lr=lr / 100) for size, (lr, *_) in sizes.items()}
for size in kit.EDM2_TEACHERS["imagenet512"]:
    # DEPARTS: paper says "25 / 35 %" and "0 / 10 %"; here the lower ones for S, the higher for the others
    PRESETS[f"imagenet512 --size {size}"] |= dict(dropout=0.0 if size == "S" else 0.1)
    PRESETS[f"imagenet512 --size {size} --mode sct"] = dict(dropout=0.25 if size == "S" else 0.35)


# --------------------------------------------------------------------------------- process: times and noise
def times(gen, step, cfg):
    """Log-normal proposal: sigma_d tan(t) = e^tau, tau ~ N(P_mean, P_std^2); (B,) float64."""
    tau = cfg.P_mean + cfg.P_std * gen.normal(dtype=torch.float64)
    return torch.atan(tau.exp() / cfg.sigma_d)


def neighbours(gen, step, cfg):
    """Of dscd: t > s next to each other on EDM's grid of N intervals, with s = 0 at its end. Each interval is
    as frequent as the log-normal has mass in it (App. E)."""
    sigma = common.karras(cfg.intervals + 1).flip(0).to(gen.device)        # ascending, (N + 1,)
    i = common.lognormal_index(gen, sigma, cfg.P_mean, cfg.P_std)          # 0..N-1
    grid = torch.atan(sigma / cfg.sigma_d)
    grid[0] = 0
    return grid[i + 1], grid[i]


def noisy(x0, t, gen, cfg):
    """x_t, and the noise z in it."""
    z = cfg.sigma_d * gen.normal(*x0.shape[1:])
    return like(t.cos(), x0) * x0 + like(t.sin(), x0) * z, z


def path_velocity(x0, z, t):
    """v_t = cos(t) z - sin(t) x_0, the derivative of x_t with x_0 and z held."""
    return like(t.cos(), x0) * z - like(t.sin(), x0) * x0


@torch.no_grad()
def velocity(model, x_t, t, y, guidance, cfg):
    """dx_t/dt = sigma_d F of a diffusion model (Eq. 3), with guidance (B,) under classifier-free guidance."""
    F = model(x_t / cfg.sigma_d, t, y)
    if guidance is not None:
        F = common.guide(F, model(x_t / cfg.sigma_d, t, torch.full_like(y, -1)), guidance)
    return cfg.sigma_d * F


# ----------------------------------------------------------------------------------- consistency function f
def f(net, x_t, t, y, cfg, guidance=None):
    """Eq. 5. x_t (B, ...); t (B,); y (B,) or None; guidance (B,) or None."""
    F = net(x_t / cfg.sigma_d, t, y, guidance)
    return like(t.cos(), x_t) * x_t - like(t.sin(), x_t) * cfg.sigma_d * F


# ---------------------------------------------------------------------------------------------------- loss
def adaptive(error, w):
    """E[e^w / D ||error||^2 - w]. At the best w, every t contributes the same (App. D)."""
    mse = error.square().flatten(1).mean(1)
    return (w.exp() * mse - w).mean(), dict(mse=mse.detach().mean())


def diffusion(net, target, teacher, x0, y, step, cfg, gen):
    """Eq. 4 with adaptive weighting. F and v_t / sigma_d have unit variance, so there is no other weight."""
    t = times(gen, step, cfg)
    x_t, z = noisy(x0, t, gen, cfg)
    gen.same_dropout()
    F, w = net(x_t / cfg.sigma_d, t, y, return_w=True)
    return adaptive(F - path_velocity(x0, z, t) / cfg.sigma_d, w)


def warmup(step, cfg):
    """r, which fades in the unstable half of the tangent (Sec. 4.2)."""
    return min(1, step / cfg.warmup) if cfg.warmup else 1


def tangent(target, x_t, t, y, guidance, dxdt, step, cfg, gen):
    """F^- and g = cos(t) df^-/dt of Eq. 6, both from one JVP.

    Rearranged (Sec. 5.1): the tangent that enters the network already carries cos(t) sin(t), which keeps what
    flows through it bounded at both ends. The network's input is x_t / sigma_d, hence the division."""
    cos, sin, r = like(t.cos(), x_t), like(t.sin(), x_t), warmup(step, cfg)
    gen.same_dropout()
    F, cos_sin_dF = common.jvp(lambda x, t: target(x, t, y, guidance), (x_t / cfg.sigma_d, t),
                               (cos * sin * dxdt / cfg.sigma_d, t.cos() * t.sin()))
    return F, -cos**2 * (cfg.sigma_d * F - dxdt) - r * (cos * sin * x_t + cfg.sigma_d * cos_sin_dF)


@torch.no_grad()
def discrete_tangent(target, x_t, t, s, y, guidance, dxdt, step, cfg, gen):
    """The same with (f^-(x_t, t) - f^-(x_s, s)) / sin(t - s) in place of df^-/dt (App. E).

    With t = s + h, the sines and cosines of t in f(x_t, t) become those of s and h. What is left over sin(h)
    is Eq. 6 at s, with dF for dF/dt."""
    cos_h, sin_h = like((t - s).cos(), x_t), like((t - s).sin(), x_t)
    x_s = cos_h * x_t - sin_h * dxdt                                     # one DDIM step of the teacher
    gen.same_dropout()
    F = target(x_t / cfg.sigma_d, t, y, guidance)
    gen.same_dropout()
    dF = (cos_h * F - target(x_s / cfg.sigma_d, s, y, guidance)) / sin_h  # -> dF/dt as s -> t
    cos_s, sin_s, r = like(s.cos(), x_t), like(s.sin(), x_t), warmup(step, cfg)
    df = -cos_s * (cfg.sigma_d * F - dxdt) - r * sin_s * (x_t + cfg.sigma_d * dF)
    return F, like(t.cos(), x_t) * df                                    # g = cos(t) df/dt


def normalize(g, t, cfg):
    """g = cos(t) df/dt, normalized (Alg. 1), or with df/dt clipped to [-1, 1] (Sec. 4.2)."""
    # DEPARTS: paper g / (||g|| + c); here the root mean square, so that c means the same at every resolution.
    # Our c = 0.1 is 0.1 sqrt(D) of the paper's norm, 5.5 on CIFAR-10 and 12.8 on ImageNet-512. The factor
    # sqrt(D) of the whole is absorbed by w(t).
    rms, cos = like(g.square().flatten(1).mean(1).sqrt(), g), like(t.cos(), g)
    return {"normalize": g / (rms + cfg.tangent_c), "clip": g.clamp(-cos, cos), "raw": g}[cfg.tangent]


def match(net, x_t, t, y, guidance, F_minus, g, cfg, gen):
    """Eq. 8. The pass has a graph and the dropout masks of the first one, so F = F^- and the error is -g."""
    gen.same_dropout()
    F, w = net(x_t / cfg.sigma_d, t, y, guidance, return_w=True)
    loss, info = adaptive(F - F_minus - normalize(g, t, cfg), w)
    return loss, info | dict(tangent_rms=g.square().mean().sqrt())


def draw_guidance(gen, cfg):
    """A strength of guidance for each sample, uniform from 1 to guidance_max; None if that is off."""
    return 1 + (cfg.guidance_max - 1) * gen.uniform() if cfg.guidance_max > 1 else None


def scd(net, target, teacher, x0, y, step, cfg, gen):
    """Consistency distillation: dx_t/dt is the teacher's."""
    t = times(gen, step, cfg)
    x_t, _ = noisy(x0, t, gen, cfg)
    guidance = draw_guidance(gen, cfg)
    dxdt = velocity(teacher, x_t, t, y, guidance, cfg)
    F_minus, g = tangent(target, x_t, t, y, guidance, dxdt, step, cfg, gen)
    return match(net, x_t, t, y, guidance, F_minus, g, cfg, gen)


def sct(net, target, teacher, x0, y, step, cfg, gen):
    """Consistency training: dx_t/dt is v_t, whose mean given x_t is the PF-ODE's."""
    t = times(gen, step, cfg)
    x_t, z = noisy(x0, t, gen, cfg)
    F_minus, g = tangent(target, x_t, t, y, None, path_velocity(x0, z, t), step, cfg, gen)
    return match(net, x_t, t, y, None, F_minus, g, cfg, gen)


def dscd(net, target, teacher, x0, y, step, cfg, gen):
    """Consistency distillation between neighbours of a grid, the discrete-time twin of scd (App. E)."""
    t, s = neighbours(gen, step, cfg)
    x_t, _ = noisy(x0, t, gen, cfg)
    guidance = draw_guidance(gen, cfg)
    dxdt = velocity(teacher, x_t, t, y, guidance, cfg)
    F_minus, g = discrete_tangent(target, x_t, t, s, y, guidance, dxdt, step, cfg, gen)
    return match(net, x_t, t, y, guidance, F_minus, g, cfg, gen)


def vsd(net, target, teacher, x0, y, step, cfg, gen):
    """Variational score distillation (App. C), with one update of the fake score beside each of the student.

    Each of the two losses reaches its own weights alone: the samples are detached for the fake score, which
    the student's loss calls without gradient."""
    fake = target.extra["fake"]
    z = cfg.sigma_d * gen.normal(*x0.shape[1:])
    t_max = z.new_full(z.shape[:1], math.atan(80 / cfg.sigma_d), dtype=torch.float64)
    guidance = draw_guidance(gen, cfg)
    gen.same_dropout()
    F = net(z / cfg.sigma_d, t_max, y, guidance)
    x = (like(t_max.cos(), z) * z - like(t_max.sin(), z) * cfg.sigma_d * F).detach()  # f(z, t_max)
    t = times(gen, step, replace(cfg, P_mean=cfg.vsd_P_mean, P_std=cfg.vsd_P_std))
    x_t, _ = noisy(x, t, gen, cfg)
    gap = velocity(teacher, x_t, t, y, guidance, cfg) / cfg.sigma_d
    fake.eval()  # no dropout in what is compared with the teacher
    with torch.no_grad():
        gap = gap - fake(x_t / cfg.sigma_d, t, y, guidance)
    fake.train()
    w = target.extra["vsd_head"](t) if cfg.weighting == "adaptive" else 0 * t
    loss, info = adaptive(cfg.sigma_d * (F - F.detach()) - gap, w)
    loss = loss * (step >= cfg.fake_first * cfg.steps)
    t = times(gen, step, replace(cfg, P_mean=-0.8, P_std=1.6))  # as App. C trains the fake score
    x_t, z = noisy(x, t, gen, cfg)
    F_fake, w = fake(x_t / cfg.sigma_d, t, y, guidance, return_w=True)
    fake_loss, _ = adaptive(F_fake - path_velocity(x, z, t) / cfg.sigma_d, w)
    return loss + fake_loss, dict(vsd=info["mse"], fake=fake_loss.detach())


def scd_vsd(*inputs):
    """Their sum (Fig. 7)."""
    (a, one), (b, two) = scd(*inputs), vsd(*inputs)
    return a + b, one | two


LOSSES = {"diffusion": diffusion, "scd": scd, "sct": sct, "dscd": dscd, "vsd": vsd, "scd+vsd": scd_vsd}


# ------------------------------------------------------------------------------------------------- sampler
@torch.no_grad()
def sample(net, noise, y, nfe, cfg, gen):
    """noise ~ N(0, sigma_d^2 I) (B, ...) -> x_0. A second step starts from fresh noise at t = 1.1 (Sec.
    5.2)."""
    # DEPARTS: the paper names no times for further steps; here they are spread evenly below 1.1
    guided = cfg.guidance != 1 or cfg.guidance_max > 1
    guidance = noise.new_full(noise.shape[:1], cfg.guidance) if guided else None
    if cfg.mode == "diffusion":
        def F(x, t, y):
            return velocity(net, cfg.sigma_d * x, t, y, guidance, cfg) / cfg.sigma_d
        return common.solve(F, noise, common.ode_times((nfe + 1) // 2, cfg.sigma_d), y, cfg.sigma_d)
    x = noise
    angles = [math.atan(80 / cfg.sigma_d), *(cfg.mid_t * (nfe - i) / (nfe - 1) for i in range(1, nfe))]
    for i, angle in enumerate(angles):
        t = x.new_full(x.shape[:1], angle, dtype=torch.float64)
        if i:
            x = like(t.cos(), x) * x + like(t.sin(), x) * cfg.sigma_d * gen.normal(*x.shape[1:])
        x = f(net, x, t, y, cfg, guidance)
    return x


# --------------------------------------------------------------------------------------------------- train
def student(cfg, data, device):
    """The network. vsd adds the fake score, which starts as the teacher, and a head for its own w(t). Both
    are trained with the network."""
    head = cfg.weighting == "adaptive"
    options = dict(guidance=cfg.guidance_max > 1)
    net = kit.network(cfg, data, device, head=head and cfg.mode != "vsd", **options)
    if "vsd" in cfg.mode:
        fake = net.extra["fake"] = kit.network(replace(cfg, init=""), data, device, head=head, **options)
        if head:
            net.extra["vsd_head"] = copy.deepcopy(fake.head)
    return net


def train(cfg):
    run = kit.Run(cfg)
    data = kit.dataset(cfg, run.device)
    teacher = kit.load_teacher(cfg, data, run.device)  # <- method
    net = student(cfg, data, run.device)  # <- method
    target = net  # <- method: the live network itself is the branch without gradient
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    ema.extra.clear()  # <- method: the fake score is of the loss, and has no average
    optimizer = kit.make_optimizer(net, cfg)
    scaler = torch.amp.GradScaler(run.device.type, enabled=cfg.dtype == "fp16")
    state = dict(net=net, target=target, ema=ema, optimizer=optimizer, scaler=scaler)
    start = run.begin(state, data, teacher)
    wrapped = run.wrap(net)  # takes the gradients; the bare net does everything else

    def show(step):
        kit.report(cfg, run, step, sample, ema, data, teacher, (1, 2))  # <- method

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


# ---------------------------------------------------------------------------------------------------- main
def main(argv=None):
    cfg = kit.parse_args(Config, PRESETS, LOSSES, argv)
    if cfg.sample:
        return kit.write_samples(cfg, sample)
    if cfg.dry_run:
        return kit.dry_run(cfg)
    if cfg.export:
        return kit.export(cfg)
    train(cfg)


if __name__ == "__main__":
    main()
