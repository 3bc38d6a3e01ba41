"""CM: consistency models by distillation and from data, discrete and continuous in time; zero-shot editing.
Song, Dhariwal, Chen & Sutskever, "Consistency Models" (arXiv:2303.01469); iCT: Song & Dhariwal, "Improved
Techniques for Training Consistency Models" (arXiv:2310.14189).

process           x_t = x_0 + t z,  z ~ N(0, I),  t the noise level in [0.002, 80] (EDM's sigma)
PF-ODE            dx_t/dt = (x_t - D(x_t, t)) / t,  D the denoiser E[x_0 | x_t]
consistency       f(x_t, t) = c_skip(t) x_t + c_out(t) F(c_in(t) x_t, t),  f(x, 0.002) = x
loss              lambda(t) d(f(x_t, t), f^-(x_s, s)),  s < t neighbours of a grid with N points
  cd              x_s is one solver step of the teacher from x_t
  ct, ict         x_s = x_0 + s z, with the same z
  ctcd, ctct      N -> infinity: f(x_t, t)^T sg(df^-/dt), with dx_t/dt the teacher's or (x_t - x_0) / t

f^- is f of the target: the average of the weights with decay mu or, at mu = 0, the live network under
stop-gradient (as in CIFAR-10's cd, and in ict). ctcd and ctct are the paper's form with stop-gradient, for
the squared distance. Its other forms are absent: ||df/dt||^2, differentiated as a whole, and LPIPS.

    python cm.py                                                toy: 8 Gaussians, exact teacher, cd
    python cm.py --dataset folder --data PATH --image_size 16 --mode diffusion
    python cm.py --dataset folder --data PATH                   distills the teacher of the line above
    python cm.py --sample 64 --nfe 2 --dataset folder --sigmas 80,1.4
    python cm.py --search --nfe 3 --dataset folder              finds good noise levels
    python cm.py --edit inpaint --input a.png --mask m.png --dataset folder
    python cm.py --edit interpolate --dataset folder            between two noises
    torchrun --nproc_per_node=8 cm.py --dataset cifar10 --mode ict
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
EDITS = ("inpaint", "colorize", "superres", "stroke", "denoise", "interpolate", "blend")


@dataclass
class Config(kit.Config):
    foreign = {"CMStochasticIterativeScheduler": dict(dataset="folder", mode="cd")}  # OpenAI's, by diffusers
    distilling = ("cd", "ctcd")  # the modes that need a teacher
    mode: str = kit.fixed("cd")  # training objective
    P_mean: float = -1.1  # diffusion, ict: mean of log(t)
    P_std: float = 2.0  # standard deviation of log(t)
    points: int = kit.flag(18, least=2, most=2**20)  # cd: N, points of the grid
    intervals: int = kit.flag(1280, least=1, most=2**20)  # ct, ict: s1, intervals of the grid at the end
    intervals_start: int = kit.flag(10, least=1)  # s0: points (ct) or intervals (ict) at the start
    mu: float = kit.flag(0.0, most=1)  # decay of the target's average, of ct at first; 0 is the live network
    mu_steps: int = 0  # ct: run length that --mu is for; in others the average spans the same share; 0 is any
    solver: Literal["heun", "euler", "ddim"] = "heun"  # of cd; euler and ddim are the same here
    metric: Literal["l1", "l2", "huber", "lpips", "lpips_avg"] = "l2"  # distance d; lpips_avg pools by means
    weighting: Literal["one", "gap", "inverse"] = "one"  # lambda: 1, 1 / (t - s) as ict always, 1 / t
    uncertainty: bool = False  # diffusion: learn the loss's weight at each t, as EDM2 does
    sigmas: tuple = kit.flag((80.0, 0.8), implies=lambda v: dict(nfe=len(v)))  # levels of the sampler
    search: bool = kit.opens(False)  # find noise levels for --nfe steps of the run in --out, and print them
    edit: Literal[("", *EDITS)] = kit.opens("")  # zero-shot editing
    input: str = kit.call("")  # image to edit
    mask: str = kit.call("")  # inpaint: image of the same size, white where the input is kept
    patch: int = kit.call(4, least=1)  # superres: pixels a side of the patches whose mean is kept
    other: str = kit.call("")  # blend: the second image
    sigma: float = kit.call(0.0)  # noise level where editing starts; 0 is 80, or 1 (stroke, denoise, blend)

    def needs_steps(self):
        return super().needs_steps() or self.mode in ("ct", "ict")

    def loss_bytes(self):
        compares = self.mode in ("cd", "ct", "ict") and self.metric.startswith("lpips")
        return 2**26 if compares else 0  # VGG's activations

    def check(self):
        if self.intervals < self.intervals_start:
            kit.fail("--intervals must be at least --intervals_start")
        if not self.sigmas or not all(a > b >= 0.002 for a, b in zip((1e6, *self.sigmas), self.sigmas)):
            kit.fail("--sigmas must be noise levels that fall, none below 0.002, such as 80,1.4")
        if self.mode in ("ctcd", "ctct") and (self.weighting == "gap" or self.metric != "l2"):
            kit.fail(f"--mode {self.mode} has no pairs of times: no --weighting gap, no --metric but l2")
        if self.metric.startswith("lpips") and self.dataset == "gmm":
            kit.fail("--metric lpips compares images, and --dataset gmm has points")
        if self.mode == "diffusion" and self.search:
            kit.fail("--search is for consistency models: a diffusion model has no levels to choose")
        if 0 < self.sigma < 0.002 or self.edit and self.save.endswith(".npz"):
            kit.fail("--edit needs --sigma of at least 0.002, and writes a .png")
        needed = dict(inpaint=("input", "mask"), blend=("input", "other"), interpolate=()) | {"": ()}
        for flag in needed.get(self.edit, ("input",)):
            if not getattr(self, flag):
                kit.fail(f"--edit {self.edit} needs --{flag} IMAGE")


# ------------------------------------------------------------------------------------------------- PRESETS
CT = dict(init="none", mu=0.9, mu_steps=800_000, intervals_start=2, intervals=150)
ICT = dict(init="none", intervals_start=10, intervals=1280, metric="huber", sigmas=(80.0, 0.821))
PRESETS = {
    "gmm": dict(steps=3000, points=40),
    # DEPARTS: paper lambda = 1, and the squared distance or LPIPS; here 1 / (t - s) or 1 / t and, for targets
    # with noise, pseudo-Huber, because lambda = 1 leaves the small t so little that the modes stay blurred.
    # At lambda = 1 and with the live network as cd's target, samples spread along the ring; hence mu. Where
    # targets have noise, a faster embedding of t lets f jump from mode to mode.
    "gmm --mode cd": dict(mu=0.9, weighting="gap"),
    "gmm --mode ct": CT | dict(weighting="gap", metric="huber", emb_scale=4.0),
    "gmm --mode ict": ICT | dict(steps=4000, emb_scale=4.0),
    "gmm --mode ctct": dict(steps=7500, weighting="inverse", emb_scale=4.0),
    "shapes": {},
    "folder": {},
    "folder --mode cd": dict(lr=5e-4),  # two steps are better than with 2e-3
    **{f"{dataset} --mode ct": CT for dataset in ("shapes", "folder")},
    **{f"{dataset} --mode ict": ICT for dataset in ("shapes", "folder")},
    # DEPARTS: paper NCSN++ for all; here DDPM++
    "cifar10": dict(batch=512, steps=800_000, lr=4e-4, beta2=0.999, ema_halflife=3.5e6, metric="lpips",
                    sigmas=(80.0, 0.585), c_noise="log", flip=True),
    "cifar10 --mode ct": CT,
    "cifar10 --mode ict": ICT | dict(batch=1024, steps=400_000, lr=1e-4, dropout=0.3, ema_halflife=1e7),
    "cifar10 --mode ctcd": dict(lr=5e-6, steps=400_000, dropout=0.3, metric="l2"),
    "cifar10 --mode ctct": dict(lr=5e-6, steps=400_000, dropout=0.3, metric="l2"),
    # DEPARTS: paper ADM's U-Net and a teacher by EDM's recipe; here EDM2's, in size S (see kit/config.py)
    "imagenet64": dict(steps=600_000, lr=8e-6, optimizer="radam", beta2=0.999, ema_sigma_rel=0.0,
                       ema_halflife=25e6, points=40, mu=0.95, metric="lpips_avg", sigmas=(80.0, 1.382),
                       flip=True, dtype="fp16"),
    "imagenet64 --mode diffusion": dict(mu=0.0),
    # DEPARTS: paper trains these two on CIFAR-10 alone; here its learning rate stands for want of another
    **{f"imagenet64 --mode {mode}": dict(mu=0.0, lr=5e-6, metric="l2") for mode in ("ctcd", "ctct")},
    "imagenet64 --mode ct": CT | dict(mu=0.95, intervals=200, steps=800_000, lr=1e-4, sigmas=(80.0, 1.913)),
    "imagenet64 --mode ict": ICT | dict(batch=4096, steps=800_000, lr=1e-4, mu=0.0, dropout=0.2,
                                        ema_halflife=9.5e7, sigmas=(80.0, 1.526)),
}


# --------------------------------------------------------------------------------- process: times and noise
def grid_points(step, cfg):
    """N(k), points of the grid at step k. Of ct it grows with the square root, of ict it doubles."""
    s0, s1, k = cfg.intervals_start, cfg.intervals, min(step / cfg.steps, 1)
    if cfg.mode == "ct":
        return max(1, math.ceil(math.sqrt(k * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1)) + 1
    if cfg.mode == "ict":
        stage = max(1, int(cfg.steps / (math.log2(s1 // s0) + 1)))
        return min(s0 * 2 ** (min(step, cfg.steps) // stage), s1) + 1
    return cfg.points


def target_decay(step, cfg):
    """mu(k), decay of the target's average at step k; 0 is the live network. Of ct it approaches 1. In a run
    of another length than --mu_steps, the average remembers the same share of the run."""
    # DEPARTS: paper exp(s0 log(mu0) / N(k)); here N(k) - 1, as in OpenAI's code, which made its results
    if cfg.mode == "ct" and cfg.mu:
        mu = math.exp(cfg.intervals_start * math.log(cfg.mu) / (grid_points(step, cfg) - 1))
        return mu ** (cfg.mu_steps / cfg.steps if cfg.mu_steps else 1)
    return cfg.mu


def times(gen, step, cfg):
    """Levels t > s, (B,) float64, next to each other on EDM's grid of N(k) points. Each pair is equally
    likely or, for ict, as likely as the log-normal has mass in it."""
    grid = common.karras(grid_points(step, cfg)).to(gen.device)  # falling: pair i is (grid[i], grid[i + 1])
    if cfg.mode == "ict":
        i = common.lognormal_index(gen, grid, cfg.P_mean, cfg.P_std)
    else:
        i = gen.index(len(grid) - 1)
    return grid[i], grid[i + 1]


def continuous_times(gen, step, cfg):
    """Of ctcd and ctct: t (B,) float64, uniform on EDM's grid of 2^14 points, which stands for the limit."""
    return common.karras(2**14).to(gen.device)[gen.index(2**14)]


def noisy(x0, t, gen, cfg):
    """x_t, and the noise z in it."""
    z = gen.normal(*x0.shape[1:])
    return x0 + like(t, x0) * z, z


@torch.no_grad()
def ode_step(teacher, x_t, t, s, y, cfg):
    """One step of the PF-ODE from t down to s."""
    slope = (x_t - denoise(teacher, x_t, t, y, cfg)) / like(t, x_t)
    x_s = x_t + like(s - t, x_t) * slope
    if cfg.solver == "heun":
        slope = (slope + (x_s - denoise(teacher, x_s, s, y, cfg)) / like(s, x_t)) / 2
        x_s = x_t + like(s - t, x_t) * slope
    return x_s


# ----------------------------------------------------------------------------------- consistency function f
def f(net, x_t, t, y, cfg, shift=0.002, return_w=False):
    """EDM's preconditioning, with t less the shift in c_skip's denominator and in c_out, so that f = x there.
    With return_w also the weighting head's w(t).

    Our network takes unit variance and TrigFlow's angle, and its F is minus EDM's (see common.py)."""
    sd = cfg.sigma_d
    inputs = like((t**2 + sd**2).rsqrt(), x_t) * x_t, torch.atan(t / sd), y
    F, w = net(*inputs, return_w=True) if return_w else (net(*inputs), None)
    c_skip = sd**2 / ((t - shift) ** 2 + sd**2)
    c_out = (t - shift) * sd * (t**2 + sd**2).rsqrt()
    D = like(c_skip, x_t) * x_t - like(c_out, x_t) * F
    return (D, w) if return_w else D


def denoise(net, x_t, t, y, cfg, return_w=False):
    """D(x_t, t) of a diffusion model: the same without the shift."""
    return f(net, x_t, t, y, cfg, 0.0, return_w)


# ---------------------------------------------------------------------------------------------------- loss
def lpips(a, b, pool=torch.nn.MaxPool2d):
    """LPIPS of images enlarged to 224 pixels, as in OpenAI's code. lpips_avg has the average pooling of its
    ImageNet runs (piq's LPIPS with replace_pooling)."""
    if a.shape[-1] < 256:
        a, b = (torch.nn.functional.interpolate(x, 224, mode="bilinear") for x in (a, b))
    return kit.lpips_network(a.device, pool)(a, b).flatten()


def pseudo_huber(a, b):
    """Pseudo-Huber of the sample's norm, with c = 0.00054 sqrt(D) (iCT)."""
    c = 0.00054 * math.sqrt(a[0].numel())
    return ((a - b).square().flatten(1).sum(1) + c**2).sqrt() - c


METRICS = {"l1": lambda a, b: (a - b).abs().flatten(1).mean(1),
           "l2": lambda a, b: (a - b).square().flatten(1).mean(1),
           "huber": pseudo_huber, "lpips": lpips,
           "lpips_avg": lambda a, b: lpips(a, b, torch.nn.AvgPool2d)}


def diffusion(net, target, teacher, x0, y, step, cfg, gen):
    """EDM's loss: log-normal t, and the weight that gives F's target unit variance. With --uncertainty,
    EDM2's learned e^w on top of it."""
    t = (cfg.P_mean + cfg.P_std * gen.normal(dtype=torch.float64)).exp()
    x_t, _ = noisy(x0, t, gen, cfg)
    gen.same_dropout()
    weight = (t**2 + cfg.sigma_d**2) / (t * cfg.sigma_d) ** 2
    D, w = denoise(net, x_t, t, y, cfg, return_w=True)
    mse = (D - x0).square().flatten(1).mean(1)
    return (w.exp() * weight * mse - w).mean(), {}


def consistency(net, target, x_t, t, x_s, s, y, cfg, gen):
    """The weighted distance of f at t from f^- at s, with the same dropout masks."""
    weighting = "gap" if cfg.mode == "ict" else cfg.weighting
    weight = {"one": torch.ones_like(t), "gap": 1 / (t - s), "inverse": 1 / t}[weighting]
    gen.same_dropout()
    prediction = f(net, x_t, t, y, cfg)
    gen.same_dropout()
    with torch.no_grad():
        goal = f(target, x_s, s, y, cfg)
    return (weight * METRICS[cfg.metric](prediction, goal)).mean(), {}


def tangent_loss(net, target, x_t, t, clean, y, cfg, gen):
    """f^T sg(df^-/dt), for l2 (Remark 10), along dx_t/dt = (x_t - clean) / t. Its value means nothing.
    Its gradient is the limit, as s -> t, of D / (2 (t - s)) times that of l2, a mean over D elements."""
    gen.same_dropout()
    _, df = common.jvp(lambda x, t: f(target, x, t, y, cfg), (x_t, t),
                       ((x_t - clean) / like(t, x_t), torch.ones_like(t)))
    gen.same_dropout()
    weight = 1 / t if cfg.weighting == "inverse" else 1.0
    loss = (weight * (f(net, x_t, t, y, cfg) * df).flatten(1).sum(1)).mean()
    return loss, dict(tangent_rms=df.square().mean().sqrt())


def cd(net, target, teacher, x0, y, step, cfg, gen):
    """Consistency distillation."""
    t, s = times(gen, step, cfg)
    x_t, _ = noisy(x0, t, gen, cfg)
    x_s = ode_step(teacher, x_t, t, s, y, cfg)
    return consistency(net, target, x_t, t, x_s, s, y, cfg, gen)


def ct(net, target, teacher, x0, y, step, cfg, gen):
    """Consistency training: x_t and x_s share the noise."""
    t, s = times(gen, step, cfg)
    x_t, z = noisy(x0, t, gen, cfg)
    x_s = x0 + like(s, x0) * z
    loss, info = consistency(net, target, x_t, t, x_s, s, y, cfg, gen)
    return loss, info | dict(points=grid_points(step, cfg))


def ict(*inputs):
    """Improved consistency training: ct with the weight 1 / (t - s), on a grid and at times of its own."""
    return ct(*inputs)


def ctcd(net, target, teacher, x0, y, step, cfg, gen):
    """Continuous-time consistency distillation: the teacher's D gives the slope dx_t/dt."""
    t = continuous_times(gen, step, cfg)
    x_t, _ = noisy(x0, t, gen, cfg)
    with torch.no_grad():
        clean = denoise(teacher, x_t, t, y, cfg)
    return tangent_loss(net, target, x_t, t, clean, y, cfg, gen)


def ctct(net, target, teacher, x0, y, step, cfg, gen):
    """Continuous-time consistency training: the slope is the sample's own, from x_0."""
    t = continuous_times(gen, step, cfg)
    x_t, _ = noisy(x0, t, gen, cfg)
    return tangent_loss(net, target, x_t, t, x0, y, cfg, gen)


LOSSES = {"diffusion": diffusion, "cd": cd, "ct": ct, "ict": ict, "ctcd": ctcd, "ctct": ctct}


# ------------------------------------------------------------------------------------------------- sampler
@torch.no_grad()
def sample(net, noise, y, nfe, cfg, gen):
    """noise ~ N(0, sigma_d^2 I) (B, ...) -> x_0. Algorithm 1: f, fresh noise of the next level, f, and so on.
    Images are clipped to [-1, 1] after each f."""
    if cfg.mode == "diffusion":
        return common.solve(net, noise, common.ode_times((nfe + 1) // 2, cfg.sigma_d), y, cfg.sigma_d)
    sigmas = cfg.sigmas[:nfe] if nfe <= len(cfg.sigmas) else common.karras(nfe + 1)[:-1].tolist()
    x = noise * (sigmas[0] / cfg.sigma_d)
    for i, sigma in enumerate(sigmas):
        if i:
            x = x + math.sqrt(sigma**2 - 0.002**2) * gen.normal(*x.shape[1:])
        x = f(net, x, x.new_full(x.shape[:1], sigma, dtype=torch.float64), y, cfg)
        x = x.clamp(-1, 1) if x.ndim == 4 and not cfg.space else x  # pixels, neither points nor latents
    return x


# --------------------------------------------------------------------------------------------------- train
def train(cfg):
    run = kit.Run(cfg)
    data = kit.dataset(cfg, run.device)
    teacher = kit.load_teacher(cfg, data, run.device)  # <- method
    net = kit.network(cfg, data, run.device, head=cfg.uncertainty and cfg.mode == "diffusion")  # <- method
    target = copy.deepcopy(net) if cfg.mu else net  # <- method: an average, or the live network
    ema = copy.deepcopy(net).eval().requires_grad_(False)
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
            kit.lerp(target, net, target_decay(step, cfg))  # <- method
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.steps:
            run.log(done, loss=total, lr=group["lr"], grad_norm=grad_norm, **info)
        if run.due(done):
            run.save(state, done)
    show(cfg.steps)


# -------------------------------------------------------------------------------------------------- extras
LUMA = torch.tensor([0.2989, 0.5870, 0.1140])


def operator(name, shape, mask=None, patch=4):
    """An orthonormal A on images (B, C, H, W), its inverse, and which coefficients of A x the input knows.

    inpaint knows the pixels where mask (1, 3, H, W) > 0, colorize the luma, superres the means of patches."""
    def basis(first):  # orthonormal, with its first column along `first`
        columns = torch.eye(len(first))
        columns[:, 0] = first
        Q, R = torch.linalg.qr(columns)
        return Q * R[0, 0].sign()
    c, h, w = shape
    if name == "colorize":
        Q = basis(LUMA)
        return (lambda x: torch.einsum("bchw,cd->bdhw", x, Q), lambda x: torch.einsum("bdhw,cd->bchw", x, Q),
                torch.arange(3).view(3, 1, 1) == 0)
    if name == "superres":
        Q = basis(torch.ones(patch * patch))
        return (lambda x: x.view(-1, c, h // patch, patch, w // patch, patch).transpose(3, 4).flatten(4) @ Q,
                lambda x: (x @ Q.T).unflatten(4, (patch, patch)).transpose(3, 4).reshape(-1, c, h, w),
                torch.arange(patch * patch) == 0)
    known = mask > 0 if name == "inpaint" else torch.zeros(1, dtype=torch.bool)
    return (lambda x: x), (lambda x: x), known


@torch.no_grad()
def edit(net, cfg):
    """Algorithm 4: multistep sampling in which every x_0 takes over the coefficients of A that the input
    knows. stroke (SDEdit) knows none and starts from the noised input.

    The others are one step: denoise from the input itself, interpolate from points on the sphere between two
    noises at level 80, and blend, which is ours, from points between two noised images."""
    x, other, mask = (kit.read_image(path, net.options["shape"]) for path in (cfg.input, cfg.other, cfg.mask))
    first = cfg.sigma or (1.0 if cfg.edit in ("stroke", "denoise", "blend") else 80.0)
    gen = common.Draw(cfg.seed, 0, 0, 1)

    def estimate(x_t, sigma):
        t = torch.full(x_t.shape[:1], sigma, dtype=torch.float64)
        y = torch.full(t.shape, cfg.label) if net.options["classes"] else None
        return f(net, x_t, t, y, cfg).clamp(-1, 1)

    if cfg.edit == "denoise":
        return {"input": x, "result": estimate(x, first)}
    if cfg.edit in ("interpolate", "blend"):
        noises = [first * gen.normal(*net.options["shape"]) for _ in range(2)]
        a, b = noises if cfg.edit == "interpolate" else (x + noises[0], other + noises[1])
        angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
        u = torch.linspace(0, 1, 9).view(-1, 1, 1, 1)
        arc = (torch.sin((1 - u) * angle) * a + torch.sin(u * angle) * b) / torch.sin(angle)
        ends = {} if cfg.edit == "interpolate" else {"input": x, "with": other}
        return ends | {"result": estimate(arc, first)}
    A, inverse, known = operator(cfg.edit, net.options["shape"], mask, cfg.patch)
    columns, reference = {"input": x}, A(x)
    if known.any():
        x = columns["degraded"] = inverse(reference * known)
    if cfg.edit == "colorize":  # shown in gray, because the part of x along luma is greenish
        columns["degraded"] = torch.einsum("bchw,c->bhw", columns["input"], LUMA)[:, None].expand_as(x)
    for sigma in [first, *(s for s in common.karras(40)[:-1].tolist() if s < first)]:
        x = estimate(x + math.sqrt(sigma**2 - 0.002**2) * gen.normal(*x.shape[1:]), sigma)
        x = inverse(torch.where(known, reference, A(x)))
    return columns | {"result": x}


@torch.no_grad()
def search(cfg, n=2000):
    """--search: greedily, the level of each further step whose samples come closest to the data. Prints and
    returns them."""
    net, sigmas = kit.load_net(cfg.out), [80.0]
    real, _ = kit.dataset(cfg).batch(common.Draw(0, 2**32, 0, n))

    def distance(sigma):
        noise, y, gen = kit.noise_and_labels(cfg, net, 0, n, 0, "cpu")
        trial = replace(cfg, sigmas=(*sigmas, sigma))
        return kit.distance(sample(net, noise, y, len(sigmas) + 1, trial, gen), real)
    while len(sigmas) < cfg.nfe:
        lower = [s for s in common.karras(18).tolist() if s < sigmas[-1]]
        if not lower:
            print(f"no level is left below {sigmas[-1]:.3g}, so these are all")
            break
        sigmas.append(min(lower, key=distance))
    print("--sigmas " + ",".join(f"{sigma:.3g}" for sigma in sigmas))
    return tuple(sigmas)


def write_edit(cfg):
    """--edit: write a picture of the input, what the network is given of it, and the result."""
    net, path = kit.load_net(cfg.out), cfg.save or f"{kit.place(cfg.out)}/edit-{cfg.edit}.png"
    classes = net.options["classes"]
    if classes and not 0 <= cfg.label < classes:
        kit.fail(f"--edit needs --label 0..{classes - 1} for this network")
    if not classes and cfg.label not in (-1, 0):
        kit.fail(f"--label {cfg.label}: the network has no classes")
    if len(net.options["shape"]) == 1 or net.options["shape"][1] % cfg.patch:
        kit.fail("--edit needs a run on images, and --patch must divide their size")
    kit.panels({title: kit.to_pixels(x, cfg) for title, x in edit(net, cfg).items()}, path)
    print(f"wrote {path}")


# ---------------------------------------------------------------------------------------------------- main
def main(argv=None):
    cfg = kit.parse_args(Config, PRESETS, LOSSES, argv)
    if cfg.edit:  # <- method
        return write_edit(cfg)  # <- method
    if cfg.search:  # <- method
        return search(cfg)  # <- method
    if cfg.sample:
        return kit.write_samples(cfg, sample)
    if cfg.dry_run:
        return kit.dry_run(cfg)
    if cfg.export:
        return kit.export(cfg)
    train(cfg)


if __name__ == "__main__":
    main()
