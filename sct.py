"""SCT: consistency tuning of a diffusion model, easy (ECT) and stable (SCT).
Wang, Geng & Li, "Stable Consistency Tuning: Understanding and Improving Consistency Models"
(arXiv:2410.18958); ECT: Geng, Pokle, Luo, Lin & Kolter, "Consistency Models Made Easy" (arXiv:2406.14548).

process           x_t = x_0 + t z,  z ~ N(0, I),  t the noise level (EDM's sigma)
pair              t log-normal,  s = ReLU(1 - n(t) / q^(a + floor(step / d))) (t - edge) + edge    Eq. 15, 17
                  n(t) = 1 + k sigmoid(-b t);  s = edge: the target is the point itself;  a = first_stage
target            x_s = x_t + (s - t) z*,  z* = (x_t - x*) / t
  ect             x* = x_0, the sample that x_t was made from
  sct             x* = sum_i W_i x_i, of a reference set,  W = softmax(-||x_t - x_i||^2 / 2 t^2)   Eq. 13, 14
consistency       D(x_t, t) = c_skip(t) x_t + c_out(t) F(c_in(t) x_t, t),  D(x, 0) = x
phases            f(x_t, t) = D + edge / t (x_t - D),  edge the lower end of t's segment; 0 if K = 1    Eq. 16
loss              ((||f(x_t, t) - f^-(x_s, s)||^2 + c^2)^(1/2) - c) / (t - s + delta)               Sec. 4.2

f^- is the live network under stop-gradient. The paper writes r for s, s for edge, and eps for z.

Differs from cm.py by: 1) a pair of times that closes in while t stays free, no grid; 2) the averaged
target; 3) segments, sampled without noise; 4) guidance by the average at half of training.

    python sct.py                                               toy: 8 Gaussians, no teacher
    python sct.py --dataset folder --data PATH --image_size 16 --mode diffusion
    python sct.py --dataset folder --data PATH                  tunes the model of the line above
    python sct.py --sample 64 --nfe 2 --guidance 1.2 --dataset folder
    torchrun --nproc_per_node=8 sct.py --dataset cifar10 --init RUN --reference dataset
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
    foreign = {"ECMPrecond": dict(dataset="cifar10", mode="ect", sigma_shift=0.003)}  # ECT's snapshots
    mode: str = kit.fixed("sct")  # training objective
    P_mean: float = -1.1  # mean of log(t) in training
    P_std: float = 2.0  # standard deviation of log(t) in training
    shrink: float = 2.0  # q: the gap t - s shrinks by this factor from stage to stage
    stage_steps: int = kit.flag(1000, least=1)  # d: steps of a stage
    # DEPARTS: paper q^floor(step / d), so training starts as diffusion; here at q^1, as in ECT's code
    first_stage: int = 1  # exponent of q at first; 0 starts as diffusion
    widening: float = 8.0  # k of n(t) = 1 + k sigmoid(-b t), by which the gap is wider at small t
    widening_rate: float = 1.0  # b of n(t)
    huber_c: float = 1e-8  # c, width of the pseudo-Huber norm; 1e-8 is all but the norm itself
    delta: float = 1e-4  # in the weight 1 / (t - s + delta); ECT has 0
    weighting: Literal["gap", "snr"] = "gap"  # 1 / (t - s + delta), or 1 / t^2 + 1 / sigma_d^2
    uncertainty: bool = kit.flag(False, unused="ect sct")  # diffusion: learn the loss's weight, as EDM2
    reference: Literal["batch", "dataset"] = kit.flag("batch", unused="diffusion ect")  # what sct averages
    class_size: int = 0  # images of a class that sct averages over, new ones each step; 0 is all
    phases: int = kit.fixed(1, least=1, most=1000, unused="diffusion")  # K, segments of the ODE; 1 is off
    eta: float = 1.0  # with phases: sampling stops at eta times the edges (Eq. 20); 1 is off
    sigmas: tuple = kit.flag((80.0, 0.821), implies=lambda v: dict(nfe=len(v)))  # levels of the sampler
    sigma_shift: float = 0.0  # in sampling, c_skip and c_out take the noise level less this
    guidance: float = 1.0  # strength of guidance in sampling; 1 is off
    guide: Literal["weak", "label"] = "weak"  # away from a weaker self, or from no label

    def needs_steps(self):
        return True  # the average at half of training

    def check(self):
        begins = self.init or kit.init_path(vars(self)) or self.sample or self.resume or self.export
        if self.mode != "diffusion" and self.dataset != "gmm" and not begins:
            kit.fail(f"--mode {self.mode} tunes a diffusion model: make one with --mode diffusion, or give "
                     "--init RUN, or none to start anew")
        if not self.sigmas or not all(a > b > 0 for a, b in zip((1e6, *self.sigmas), self.sigmas)):
            kit.fail("--sigmas must be noise levels that fall, such as 80,0.821")
        if self.eta != 1 and self.phases == 1:
            kit.fail("--eta goes with --phases")
        if self.shrink <= 1 or self.huber_c == 0:
            kit.fail("--shrink must be above 1, as t - s shrinks by it, and --huber_c above 0")
        if self.class_size and (self.reference != "dataset" or self.dataset == "gmm"):
            kit.fail("--class_size goes with --reference dataset, on images")
        if self.flip and self.mode not in ("diffusion", "ect") and self.reference == "dataset":
            kit.fail("--reference dataset holds no mirrored images: no --flip")
        if self.guidance != 1 and self.guide == "label" and not (self.conditional and self.label_dropout):
            kit.fail("--guide label needs a run with --conditional and --label_dropout")


# ------------------------------------------------------------------------------------------------- PRESETS
PRESETS = {  # DEPARTS: paper names no q, d and delta for SCT, and no edges; those below are ours
    # From random weights: in stage 0, s = 0, so the run begins as diffusion.
    # DEPARTS: ECT c = 0 and P_mean = -1.1; here a smoother distance and more of the large t, because the
    # targets have little noise. The embedding of t is faster than elsewhere, as f jumps from mode to mode.
    "gmm": dict(teacher="", init="none", steps=3000, first_stage=0, shrink=1.4, stage_steps=150, P_mean=0.0,
                huber_c=0.03, emb_scale=4.0),
    # DEPARTS: ECT P_mean = -1.1; here more of the large t, on which the first call depends
    "shapes": dict(steps=2000, stage_steps=250, lr=1e-3, P_mean=0.0),
    # The average over all of the data leaves little noise in the targets.
    "shapes --mode sct": dict(reference="dataset"),
    "folder": dict(stage_steps=100),
    # DEPARTS: ECT c = 0, where the root has no gradient at a distance of 0; here 1e-8
    # Fig. 4 has a fixed gap of t / 256: --steps 16000 --shrink 256 --widening 0 --stage_steps 16000
    "cifar10": dict(batch=128, steps=200_000, lr=1e-4, beta2=0.999, ema_halflife=8.9e5, dropout=0.2,
                    c_noise="log", shrink=2**0.5, stage_steps=12_500),
    # The shift is that of ECT's code (ECMPrecond in eval mode); its code for ImageNet has none.
    "cifar10 --mode ect": dict(shrink=2.0, stage_steps=25_000, delta=0.0, sigma_shift=0.003),
    # DEPARTS: paper names no reference set; here 256 images of each sample's class
    "imagenet64": dict(batch=128, steps=100_000, lr_ref=2000, dropout_res=16, P_mean=-0.8, P_std=1.6,
                       stage_steps=12_500, huber_c=0.06, sigmas=(80.0, 1.526), reference="dataset",
                       class_size=256),
    "imagenet64 --mode ect": dict(shrink=4.0, stage_steps=25_000, weighting="snr"),
    "imagenet64 --mode diffusion": dict(dropout_res=0),
}
for size, (lr, *_) in kit.EDM2_TEACHERS["imagenet64"].items():  # ECT's rates, a tenth of the teachers'
    PRESETS[f"imagenet64 --size {size}"] = dict(lr=lr / 10, dropout=0.4 if size == "S" else 0.5)


# --------------------------------------------------------------------------------- process: times and noise
def edges(cfg):
    """Lower ends of the K segments, ascending from 0."""
    # DEPARTS: paper names none; here EDM's grid
    return torch.cat([torch.zeros(1, dtype=torch.float64), common.karras(cfg.phases + 1)[1:-1].flip(0)])


def lower_edge(t, cfg):
    """The lower end of t's segment. A t on an edge belongs to the lower segment."""
    lower = edges(cfg).to(t.device)
    return lower[torch.searchsorted(lower, t) - 1]


def earlier(t, edge, step, cfg):
    """s < t (Eq. 15, 17), which closes in on t stage by stage. It stops at a gap of 2^-12, because float32
    must tell s from t."""
    stage = min(cfg.first_stage + step // cfg.stage_steps, 12 / math.log2(cfg.shrink))
    n = 1 + cfg.widening * torch.sigmoid(-cfg.widening_rate * t)
    return (1 - n / cfg.shrink**stage).clamp(min=0) * (t - edge) + edge


def times(gen, step, cfg):
    """Noise levels t > s, and the lower edge of t's segment, (B,) float64."""
    t = (cfg.P_mean + cfg.P_std * gen.normal(dtype=torch.float64)).exp()
    edge = lower_edge(t, cfg)
    return t, earlier(t, edge, step, cfg), edge


def noisy(x0, t, gen, cfg):
    """x_t, and the noise z in it."""
    z = gen.normal(*x0.shape[1:])
    return x0 + like(t, x0) * z, z


def ode_step(x_star, x_t, t, s):
    """x_s on the straight line from x_t to the denoised x*."""
    return x_t + like((s - t) / t, x_t) * (x_t - x_star)


# ----------------------------------------------------------------------------------- consistency function f
def f(net, x_t, t, y, cfg, edge=None, shift=0.0, return_w=False):
    """D in EDM's preconditioning; with an edge (B,), the point of the ODE there (Eq. 16), so f(x, edge) = x.
    With return_w also the weighting head's w(t). `shift` is that of ECT's sampler.

    Our network takes unit variance and TrigFlow's angle, and its F is minus EDM's (see common.py)."""
    sd = cfg.sigma_d
    inputs = like((t**2 + sd**2).rsqrt(), x_t) * x_t, torch.atan(t / sd), y
    F, w = net(*inputs, return_w=True) if return_w else (net(*inputs), None)
    c_skip = sd**2 / ((t - shift) ** 2 + sd**2)
    c_out = (t - shift) * sd * (t**2 + sd**2).rsqrt()
    D = like(c_skip, x_t) * x_t - like(c_out, x_t) * F
    if edge is not None:
        D = D + like(edge / t.clamp(min=1e-9), x_t) * (x_t - D)
    return (D, w) if return_w else D


# ---------------------------------------------------------------------------------------------------- loss
def diffusion(net, target, teacher, x0, y, step, cfg, gen):
    """EDM's loss: log-normal t, and the weight that gives F's target unit variance. With --uncertainty,
    EDM2's learned e^w on top of it."""
    t, _, _ = times(gen, step, cfg)
    x_t, _ = noisy(x0, t, gen, cfg)
    gen.same_dropout()
    weight = (t**2 + cfg.sigma_d**2) / (t * cfg.sigma_d) ** 2
    D, w = f(net, x_t, t, y, cfg, return_w=True)
    mse = (D - x0).square().flatten(1).mean(1)
    return (w.exp() * weight * mse - w).mean(), {}


class ReferenceSet:
    """What teaches sct: samples x_i, whose exact denoiser gives the targets. The set is the global batch or
    all of the data, or with --class_size the batch and so many images of each class, new ones in each step.
    (The ring can be sampled without end. For it, all of the data are the batch and 4,096 fixed points.)"""

    def __init__(self, data, cfg):
        self.data, self.cfg = data, cfg
        if cfg.reference == "dataset" and not hasattr(data, "members"):
            kit.fail("--reference dataset needs data with members(c, device), as kit.data.Stored has")
        self.with_batch = cfg.reference == "batch" or cfg.dataset == "gmm" or cfg.class_size > 0

    def members(self, c, batch, step):
        """Yields the x_i of class c, of all classes for c = -1. `batch` holds x_0 and y."""
        x0, y = batch
        if self.with_batch:
            yield x0 if c < 0 else x0[y == c]
        if self.cfg.reference == "dataset":
            some = dict(limit=self.cfg.class_size, seed=(self.cfg.seed, step, c + 1))
            yield from self.data.members(c, x0.device, **some if self.cfg.class_size else {})

    @torch.no_grad()
    def denoise(self, x_t, t, y, x0, step):
        """x* = E[x_i | x_t] (B, ...), over the class of y, or over all for y = -1 (Eq. 13, 14); and the
        effective number of x_i in it, 1 / sum_i W_i^2, (B,). As W sums to 1, Eq. 14's 1/n is left out."""
        batch = x0, y
        if self.with_batch:  # not this process's part of it alone
            batch = self.data.batch(common.Draw(self.cfg.seed, step, 0, self.cfg.batch, x0.device))
        classes = torch.full((len(x_t),), -1, device=x_t.device) if y is None else y
        x_star, averaged = torch.empty_like(x_t), x_t.new_empty(len(x_t))
        for c in classes.unique().tolist():
            rows = classes == c
            x_star[rows], averaged[rows] = posterior_mean(x_t[rows], t[rows], self.members(c, batch, step))
        return x_star, averaged


def posterior_mean(x_t, t, chunks):
    """sum_i W_i x_i, W = softmax(log P(x_t | x_i)), and 1 / sum_i W_i^2. One pass over the chunks of x_i, in
    log space, relative to the greatest log-weight so far. Float32 rounds a logit by some 1e-7 ||x||^2 / t^2,
    which at small t counts between near-duplicates alone."""
    x, top = x_t.flatten(1), x_t.new_full((len(x_t), 1), -1e30)
    total, square, mean = 0, 0, 0  # sums of W, W^2 and W x_i
    for x_i in chunks:
        x_i = x_i.flatten(1).to(x)
        norm = torch.linalg.vector_norm(x_i, dim=1, keepdim=True) ** 2
        logits = (x @ x_i.T - norm.T / 2) / like(t, x) ** 2  # log P(x_t | x_i), up to ||x_t||^2
        top, old = torch.maximum(top, logits.amax(1, keepdim=True)), top
        W, fade = (logits - top).exp(), (old - top).exp()
        total, square = total * fade + W.sum(1, keepdim=True), square * fade**2 + (W**2).sum(1, keepdim=True)
        mean = mean * fade + W @ x_i
    return (mean / total).view_as(x_t), (total**2 / square)[:, 0]


def consistency(net, target, x_t, t, x_s, s, y, cfg, gen, edge):
    """The weighted distance of f at t from f^- at s, with the same dropout masks."""
    gen.same_dropout()
    prediction = f(net, x_t, t, y, cfg, edge)
    gen.same_dropout()
    with torch.no_grad():
        goal = f(target, x_s, s, y, cfg, edge)  # at s = edge this is x_s itself
    square = (prediction - goal).square().flatten(1).sum(1)
    # (square + c^2)^(1/2) - c, rounded less
    distance = square / ((square + cfg.huber_c**2).sqrt() + cfg.huber_c)
    weight = 1 / (t - s + cfg.delta) if cfg.weighting == "gap" else 1 / t**2 + 1 / cfg.sigma_d**2
    return (weight * distance).mean(), dict(gap=((t - s) / t).mean())


def ect(net, target, teacher, x0, y, step, cfg, gen):
    """Easy consistency tuning: x_t and x_s share the noise."""
    t, s, edge = times(gen, step, cfg)
    x_t, _ = noisy(x0, t, gen, cfg)
    return consistency(net, target, x_t, t, ode_step(x0, x_t, t, s), s, y, cfg, gen, edge)


def sct(net, target, teacher, x0, y, step, cfg, gen):
    """Stable consistency tuning. Logs `averaged`, over how many samples a target really averages."""
    t, s, edge = times(gen, step, cfg)
    x_t, _ = noisy(x0, t, gen, cfg)
    x_star, averaged = teacher.denoise(x_t, t, y, x0, step)
    loss, info = consistency(net, target, x_t, t, ode_step(x_star, x_t, t, s), s, y, cfg, gen, edge)
    return loss, info | dict(averaged=averaged.mean())


LOSSES = {"diffusion": diffusion, "ect": ect, "sct": sct}


# ------------------------------------------------------------------------------------------------- sampler
def guided(net, cfg):
    """F* + guidance (F - F*), with F* of the weaker self or of no label (Eq. 18, where guidance is 1 + omega;
    the paper's "strength 1.2" is read as guidance 1.2). Doubles the network evaluations."""
    def F(x, t, y):
        weak = net.extra["weak"](x, t, y) if cfg.guide == "weak" else net(x, t, torch.full_like(y, -1))
        return common.guide(net(x, t, y), weak, cfg.guidance)
    if cfg.guidance != 1 and cfg.guide == "weak" and "weak" not in net.extra:
        kit.fail(f"{cfg.out} has no average at half of training yet, which --guide weak needs")
    return net if cfg.guidance == 1 else F


@torch.no_grad()
def sample(net, noise, y, nfe, cfg, gen):
    """noise ~ N(0, sigma_d^2 I) (B, ...) -> x_0. Without phases: f, fresh noise of the next level, f, and so
    on. With K phases: from edge to edge without noise (Eq. 19), or to eta times the edge (Eq. 20), in K
    steps."""
    net = guided(net, cfg)
    if cfg.mode == "diffusion":
        return common.solve(net, noise, common.ode_times((nfe + 1) // 2, cfg.sigma_d), y, cfg.sigma_d)
    if cfg.phases > 1 and nfe != cfg.phases:
        kit.fail(f"a run with --phases {cfg.phases} is sampled in as many steps: --nfe {cfg.phases}")
    sigmas = cfg.sigmas[:nfe] if nfe <= len(cfg.sigmas) else common.karras(nfe + 1)[:-1].tolist()
    stops = [None] * nfe
    if cfg.phases > 1:
        sigmas = [80.0, *(cfg.eta * edges(cfg)[1:].flip(0)).tolist()]
        stops = [noise.new_full(noise.shape[:1], s, dtype=torch.float64) for s in (*sigmas[1:], 0.0)]
    x = noise * (sigmas[0] / cfg.sigma_d)
    for i, (sigma, stop) in enumerate(zip(sigmas, stops)):
        if i and cfg.phases == 1:
            x = x + sigma * gen.normal(*x.shape[1:])
        t = x.new_full(x.shape[:1], sigma, dtype=torch.float64)
        x = f(net, x, t, y, cfg, stop, cfg.sigma_shift)
    return x


# --------------------------------------------------------------------------------------------------- train
def train(cfg):
    run = kit.Run(cfg)
    data = kit.dataset(cfg, run.device)
    teacher = ReferenceSet(data, cfg)  # <- method: no network, but samples that targets average over
    net = kit.network(cfg, data, run.device, head=cfg.uncertainty and cfg.mode == "diffusion")  # <- method
    target = net  # <- method: the live network itself is the branch without gradient
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = kit.make_optimizer(net, cfg)
    scaler = torch.amp.GradScaler(run.device.type, enabled=cfg.dtype == "fp16")
    state = dict(net=net, target=target, ema=ema, optimizer=optimizer, scaler=scaler)
    start = run.begin(state, data, teacher)
    wrapped = run.wrap(net)  # takes the gradients; the bare net does everything else

    def show(step):
        nfes = (cfg.phases,) if cfg.phases > 1 else (1, 2)  # <- method
        weak = cfg.guide == "label" or "weak" in ema.extra  # <- method
        shown = cfg if weak else replace(cfg, guidance=1.0)  # <- method: no weaker self yet
        kit.report(shown, run, step, sample, ema, data, None, nfes)  # <- method

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
        if done == cfg.steps // 2:  # <- method
            ema.extra["weak"] = copy.deepcopy(ema)  # <- method: the weaker self
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
