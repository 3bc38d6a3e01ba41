"""SCT: consistency tuning of a diffusion model, easy (ECT) and stable (SCT), in one file.
Wang, Geng & Li, "Stable Consistency Tuning: Understanding and Improving Consistency Models", 2024;
ECT: Geng, Pokle, Luo, Lin & Kolter, "Consistency Models Made Easy", 2024.

process           x_t = x_0 + t eps,  eps ~ N(0, I),  t the noise level (EDM's sigma)
pair              t log-normal,  s = ReLU(1 - n(t) / q^floor(step / d)) (t - edge) + edge          Eq. 15, 17
                  n(t) = 1 + k sigmoid(-b t);  s = edge: the target is the point itself
target            x_s = x_t + (s - t) eps*,  eps* = (x_t - x*) / t
  ect             x* = x_0, the sample that x_t was made from
  sct             x* = sum_i W_i x_i, of a reference set,  W = softmax(-||x_t - x_i||^2 / 2 t^2)   Eq. 13, 14
consistency       D(x_t, t) = c_skip(t) x_t + c_out(t) F(c_in(t) x_t, t),  D(x, 0) = x
phases            f(x_t, t) = D + edge / t (x_t - D),  edge the lower end of t's segment; 0 if K = 1    Eq. 16
loss              (||f(x_t, t) - f^-(x_s, s)||^2 + c^2)^(1/2) / (t - s + delta)                     Sec. 4.2
f^- is the live network under stop-gradient. The paper's r is s here, and its s is edge.
Differs from cm.py by: 1) a pair of times that closes in while t stays free, without a grid; 2) the averaged
target; 3) segments, sampled without noise; 4) guidance by the average at half of training (Eq. 18).
The paper gives no q, d, delta and no edges: those below are ours.

    python sct.py                                               toy: 8 Gaussians, no teacher, sct
    python sct.py --dataset folder --data PATH --image_size 16 --init out/teacher --out out/sct
    python sct.py --sample 64 --nfe 2 --guidance 1.2 --out out/sct
    torchrun --nproc_per_node=8 sct.py --dataset cifar10 --init out/teacher32 --reference dataset
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
    mode: str = "sct"  # training objective, see --help's first lines
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
    P_mean: float = -1.1  # mean of log t
    P_std: float = 2.0  # its standard deviation
    q: float = 2.0  # factor by which t - s shrinks from stage to stage
    d: int = 1000  # steps of a stage
    stage: int = 1  # exponent of q in the first stage: 1 as in ECT's code; 0 (Eq. 15): starts as diffusion
    k: float = 8.0  # n(t) = 1 + k sigmoid(-b t)
    b: float = 1.0  # see k
    c: float = 1e-8  # width of the pseudo-Huber distance; this small, the plain norm with a finite gradient
    delta: float = 1e-4  # in the weight 1 / (t - s + delta); 0 = ECT's
    weighting: Literal["gap", "snr"] = "gap"  # 1 / (t - s + delta), or 1 / t^2 + 1 / sigma_d^2
    reference: Literal["batch", "dataset"] = "batch"  # sct: x_i are the global batch, or the training set
    phases: int = 1  # K, segments of the ODE = sampling steps; 1 = plain
    eta: float = 1.0  # sampling with K > 1 stops at eta times the edges (Eq. 20); 1 = at them
    sigmas: tuple = (80.0, 0.821)  # noise levels of the sampler, K = 1; beyond these, EDM's grid
    guidance: float = 1.0  # w of F* + w (F - F*) when sampling; 1 = off
    guide: Literal["weak", "label"] = "weak"  # F* is the average at half of training, or has no label


# ------------------------------------------------------------------------------------------------- PRESETS
PRESETS = {
    # From scratch: at stage 0 s = 0, so training begins as diffusion, inside the same run.
    # DEPARTS: c = 0.03 smooths the distance, whose targets have little noise here; more of the large t.
    "gmm": dict(steps=6000, lr_cooldown=0.3, channels=128, blocks=4, c_noise="log", emb_scale=8.0, stage=0,
                q=1.4, d=300, P_mean=0.0, c=0.03),
    "shapes": dict(image_size=16, conditional=True, channels=32, blocks=1, steps=1000, batch=64, lr=2e-3,
                   lr_cooldown=0.5, d=100),
    ("shapes", "diffusion"): dict(steps=2000, lr=1e-2, lr_warmup=100, P_mean=-1.2, P_std=1.2),
    "folder": dict(conditional=True, steps=1000, batch=128, lr=2e-3, lr_cooldown=0.5, blocks=1, d=100),
    ("folder", "diffusion"): dict(steps=3000, lr=1e-2, lr_warmup=100, label_dropout=0.1, P_mean=-1.2,
                                  P_std=1.2),
    # FID of 1 / 2 steps: ect 3.78 / 2.13, sct 3.11 / 2.05, phased 1.95 (4) 1.86 (8); conditional 3.03 / 1.88.
    # --batch 512 --steps 300000 --ema_halflife 3.5e6: 2.92 / 2.02; conditional 2.88 / 1.87.
    "cifar10": dict(batch=128, steps=200_000, lr=1e-4, optimizer="radam", beta2=0.999, ema_sigma_rel=0.0,
                    ema_halflife=8.9e5, dropout=0.2, arch="ddpmpp", double_norm=False, channels=128,
                    channel_mult=(2, 2, 2), blocks=4, attention=(16,), save_every=2500, c_noise="log",
                    q=2**0.5, d=12_500),
    ("cifar10", "ect"): dict(q=2.0, d=25_000, delta=0.0),
    ("cifar10", "diffusion"): dict(lr=1e-3, lr_warmup=19_531, steps=400_000, optimizer="adam", batch=512,
                                   ema_halflife=5e5, dropout=0.13, P_mean=-1.2, P_std=1.2),
    # ect S 5.51 / 3.18, M 3.67 / 2.35; sct S 5.10 / 3.05, M 3.30 / 2.13; --batch 1024: sct M 2.42 / 1.55.
    # The paper does not say its reference set here: a batch of 128 has hardly two images of one class.
    "imagenet64": dict(image_size=64, conditional=True, batch=128, steps=100_000, lr=1e-3, lr_ref=2000,
                       channels=192, channel_mult=(1, 2, 3, 4), blocks=3, attention=(16, 8), dropout=0.4,
                       emb="fourier", c_noise="log", double_norm=False, P_mean=-0.8, P_std=1.6, q=2.0,
                       d=12_500, c=0.06, sigmas=(80.0, 1.526), save_every=2500),
    ("imagenet64", "M"): dict(channels=256, lr=9e-4, dropout=0.5),
    ("imagenet64", "ect"): dict(q=4.0, d=25_000, weighting="snr"),
    ("imagenet64", "diffusion"): dict(batch=2048, steps=2**19, lr_warmup=4883, lr_ref=35_000),  # EDM2's
    ("imagenet64", "S", "diffusion"): dict(lr=1e-2, dropout=0.0, ema_sigma_rel=0.075),
    ("imagenet64", "M", "diffusion"): dict(lr=9e-3, dropout=0.1, ema_sigma_rel=0.06, steps=2**20),
}


# --------------------------------------------------------------------------------- process: times and noise
def edges(cfg):
    """Lower ends of the K segments, ascending from 0. # DEPARTS: the paper names none; EDM's grid."""
    return torch.cat([torch.zeros(1, dtype=torch.float64), common.karras(cfg.phases + 1)[1:-1].flip(0)])


def earlier(t, edge, step, cfg):
    """s < t (Eq. 15, 17), closing in on t stage by stage, 2^12 times at most: float32 must tell s from t."""
    stage = min(cfg.stage + step // cfg.d, 12 / math.log2(cfg.q))
    n = 1 + cfg.k * torch.sigmoid(-cfg.b * t)
    return (1 - n / cfg.q**stage).clamp(min=0) * (t - edge) + edge


def lower_edge(t, cfg):
    """The lower end of t's segment; t on an edge is of the lower one."""
    lower = edges(cfg).to(t.device)
    return lower[torch.searchsorted(lower, t) - 1]


def times(gen, step, cfg):
    """Noise levels t > s, and the lower edge of t's segment, (B,) float64."""
    t = (cfg.P_mean + cfg.P_std * gen.normal(dtype=torch.float64)).exp()
    edge = lower_edge(t, cfg)
    return t, earlier(t, edge, step, cfg), edge


# ----------------------------------------------------------------------------------- consistency function f
def f(net, x_t, t, y, cfg, edge=None):
    """D in EDM's preconditioning and, with an edge (B,), the point of the ODE there (Eq. 16): f(x, edge) = x.

    The network sees unit variance and TrigFlow's angle, and its F has the other sign (common.py)."""
    sd = cfg.sigma_d
    F = -net(like((t**2 + sd**2).rsqrt(), x_t) * x_t, torch.atan(t / sd), y)
    D = like(sd**2 / (t**2 + sd**2), x_t) * x_t + like(t * sd * (t**2 + sd**2).rsqrt(), x_t) * F
    return D if edge is None else D + like(edge / t.clamp(min=1e-9), x_t) * (x_t - D)


# ---------------------------------------------------------------------------------------------------- loss
def diffusion(net, target, data, x0, y, step, cfg, gen):
    """EDM's loss: log-normal t and the weight that makes F's target of unit variance."""
    t, _, _ = times(gen, step, cfg)
    x_t = x0 + like(t, x0) * gen.normal(*x0.shape[1:])
    gen.same_dropout()
    weight = (t**2 + cfg.sigma_d**2) / (t * cfg.sigma_d) ** 2
    mse = (f(net, x_t, t, y, cfg) - x0).square().flatten(1).mean(1)
    return (weight * mse).mean(), {}


def reference(data, step, cfg, device):
    """Chunks (x_i, y_i) of the reference set. The anchor x_0 is a member of the batch and of the data; the
    ring, which has no end, counts as the batch and 4,096 fixed points."""
    if cfg.reference == "batch" or cfg.dataset == "gmm":  # the global batch, on every process
        yield data.batch(common.Draw(cfg.seed, step, 0, cfg.batch, device))
    if cfg.reference == "dataset":
        yield from data.chunks(device)


def stable_target(x_t, t, y, chunks):
    """x* = sum_i W_i x_i (Eq. 14; W sums to 1, so the paper's further 1/n is left out), within y's class
    (Eq. 13), y = -1 for all. Also the variances, per sample, of x* and of a single x_i given x_t: W^2 and W
    times the squared distances from x*, the self-normalized estimator's.

    One pass over the chunks, in log space, relative to the greatest log-weight so far."""
    x, top = x_t.flatten(1), x_t.new_full((len(x_t), 1), -1e30)
    sum1, sum2 = 0, 0  # of W and W^2, times (x_i, ||x_i||^2, 1)
    for x_i, y_i in chunks:
        x_i = x_i.flatten(1).to(x)
        norm = x_i.square().sum(1, keepdim=True)
        logits = (x @ x_i.T - norm.T / 2) / like(t, x) ** 2  # log P(x_t | x_i); ||x_t||^2 is the same for all
        if y is not None:
            logits = logits.masked_fill((y_i != y[:, None]) & (y[:, None] >= 0), -math.inf)
        top, old = torch.maximum(top, logits.amax(1, keepdim=True)), top
        W, moments = (logits - top).exp(), torch.cat([x_i, norm, torch.ones_like(norm)], 1)
        sum1 = sum1 * (old - top).exp() + W @ moments
        sum2 = sum2 * (2 * (old - top)).exp() + W**2 @ moments
    sum1, sum2 = sum1 / sum1[:, -1:], sum2 / sum1[:, -1:] ** 2
    mean = sum1[:, :-2]

    def spread(a):  # sum of weight ||x_i - mean||^2
        return (a[:, -2] - 2 * (a[:, :-2] * mean).sum(1) + a[:, -1] * mean.square().sum(1)).clamp(min=0)
    return mean.view_as(x_t), spread(sum2), spread(sum1)


def consistency(net, target, x_t, t, x_star, s, edge, y, cfg, gen):
    """The distance of f at t from f^- at s, weighted, with the same dropout masks."""
    x_s = x_t + like((s - t) / t, x_t) * (x_t - x_star)
    gen.same_dropout()
    prediction = f(net, x_t, t, y, cfg, edge)
    gen.same_dropout()
    with torch.no_grad():
        goal = f(target, x_s, s, y, cfg, edge)  # s = edge: x_s itself
    square = (prediction - goal).square().flatten(1).sum(1)
    distance = square / ((square + cfg.c**2).sqrt() + cfg.c)  # = (square + c^2)^(1/2) - c, but for rounding
    weight = 1 / (t - s + cfg.delta) if cfg.weighting == "gap" else 1 / t**2 + 1 / cfg.sigma_d**2
    return (weight * distance).mean(), dict(gap=((t - s) / t).mean())


def ect(net, target, data, x0, y, step, cfg, gen):
    """Easy consistency tuning: x_t and x_s share the noise."""
    t, s, edge = times(gen, step, cfg)
    x_t = x0 + like(t, x0) * gen.normal(*x0.shape[1:])
    return consistency(net, target, x_t, t, x0, s, edge, y, cfg, gen)


def sct(net, target, data, x0, y, step, cfg, gen):
    """Stable consistency tuning. `variance`: the target's over that of ect's."""
    t, s, edge = times(gen, step, cfg)
    x_t = x0 + like(t, x0) * gen.normal(*x0.shape[1:])
    x_star, ours, single = stable_target(x_t, t, y, reference(data, step, cfg, x0.device))
    loss, info = consistency(net, target, x_t, t, x_star, s, edge, y, cfg, gen)
    return loss, info | dict(variance=(ours.sum() + 1e-12) / (single.sum() + 1e-12))


LOSSES = {"diffusion": diffusion, "ect": ect, "sct": sct}


# ------------------------------------------------------------------------------------------------- sampler
def guided(net, cfg):
    """F* + w (F - F*), w = 1 + omega of Eq. 18 (the paper's "strength 1.2" is read as w): F* of the weaker
    self, or of no label. Doubles the network evaluations."""
    def F(x, t, y):
        if cfg.guide == "weak":
            star = net.weak[0].to(x.device)(x, t, y)
        else:
            star = net(x, t, torch.full_like(y, -1))
        return star + cfg.guidance * (net(x, t, y) - star)
    return net if cfg.guidance == 1 else F


@torch.no_grad()
def sample(net, noise, y, nfe, cfg, gen):
    """noise ~ N(0, sigma_d^2 I) (B, ...) -> x_0. K = 1: f, fresh noise of the next level, f, and so on.
    K > 1: from edge to edge without noise (Eq. 19), or to eta times the edge (Eq. 20), in K steps."""
    net = guided(net, cfg)
    if cfg.mode == "diffusion":
        return common.solve(net, noise, common.ode_times((nfe + 1) // 2, cfg.sigma_d), y, cfg.sigma_d)
    if cfg.phases > 1 and nfe != cfg.phases:
        common.fail(f"a run with --phases {cfg.phases} is sampled in as many steps: --nfe {cfg.phases}")
    sigmas = cfg.sigmas[:nfe] if nfe <= len(cfg.sigmas) else common.karras(nfe + 1)[:-1].tolist()
    stops = [None] * nfe
    if cfg.phases > 1:
        sigmas = [80.0, *(cfg.eta * edges(cfg)[1:].flip(0)).tolist()]
        stops = [noise.new_full(noise.shape[:1], s, dtype=torch.float64) for s in (*sigmas[1:], 0.0)]
    x = noise * (sigmas[0] / cfg.sigma_d)
    for i, (sigma, stop) in enumerate(zip(sigmas, stops)):
        if i and cfg.phases == 1:
            x = x + sigma * gen.normal(*x.shape[1:])
        x = f(net, x, noise.new_full(noise.shape[:1], sigma, dtype=torch.float64), y, cfg, stop)
    return x


# --------------------------------------------------------------------------------------------------- train
def train(cfg):
    run = common.Run(cfg)
    data = common.dataset(cfg, run.device)  # <- method
    teacher = data  # <- method: none, but the samples that targets are averaged over
    options = dict(head=False)  # <- method
    net = common.network(cfg, data, **options)  # <- method
    common.load_init(net, cfg, data)
    net.to(run.device)
    target = net  # <- method: the live network itself is the stop-gradient branch
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    ema.weak = (copy.deepcopy(ema),)  # <- method: its past self; in a tuple, so that it is no part of it
    optimizer = common.make_optimizer(net, cfg)
    scaler = torch.amp.GradScaler(run.device.type, enabled=cfg.dtype == "fp16")
    state = dict(net=net, target=target, ema=ema, optimizer=optimizer, scaler=scaler)
    state["weak"] = ema.weak[0]  # <- method
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
        if done == cfg.steps // 2:  # <- method
            ema.weak[0].load_state_dict(ema.state_dict())  # <- method
        if done == 1:
            run.start()
        if done % cfg.log_every == 0 or done == cfg.steps:
            run.log(done, loss=total, lr=group["lr"], grad_norm=grad_norm, **info)
        if done % cfg.save_every == 0 or done in (1, cfg.steps):
            run.save(state, done)
        if done % cfg.sample_every == 0 or done == cfg.steps:
            nfes = (cfg.phases,) if cfg.phases > 1 else (1, 2)  # <- method
            common.report(cfg, run, done, sample, ema, data, None, nfes)  # <- method


# ---------------------------------------------------------------------------------------------------- main
def main(argv=None):
    cfg = common.parse_args(Config, PRESETS, LOSSES, argv)
    if cfg.sample:
        step = common.read_checkpoint(cfg.out)["step"]
        if cfg.guidance != 1 and cfg.guide == "weak" and step < cfg.steps // 2:
            common.fail(f"{cfg.out} has no average at half of training yet, which --guide weak needs")
    fresh = not (cfg.sample or cfg.resume or cfg.init or common.init_path(vars(cfg)))
    if fresh and cfg.mode != "diffusion" and cfg.dataset != "gmm":
        common.fail(f"--mode {cfg.mode} tunes a diffusion model: give --init RUN, or none to start anew")
    if not cfg.sigmas or not all(a > b > 0 for a, b in zip((1e6, *cfg.sigmas), cfg.sigmas)):
        common.fail("--sigmas must be noise levels that fall, such as 80,0.821")
    if cfg.q <= 1 or cfg.c == 0:
        common.fail("--q must be above 1, as t - s shrinks by it, and --c above 0")
    if cfg.guidance != 1 and cfg.guide == "label" and not (cfg.conditional and cfg.label_dropout):
        common.fail("--guide label needs a run with --conditional and --label_dropout")
    if cfg.sample:
        common.write_samples(cfg, sample)
    elif cfg.dry_run:
        common.dry_run(cfg)
    else:
        train(cfg)


if __name__ == "__main__":
    main()
