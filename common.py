"""The mathematics that the five methods share. To read a method, read its script, and what it calls here.

    coordinates     like, to_trigflow
    schedules       karras, ode_times, lognormal_index; learning_rate, ema_beta
    solvers         solve, guide
    JVP             jvp, and how a layer says what its derivative is: with_rule, linear, affine, product, silu
    random numbers  Draw

`common.x` means "read this, it is the paper"; `kit.x` means "skip this, it is machinery".

One convention holds for every network and every teacher, that of TrigFlow (sCM, Sec. 3):

    F = net(x, t, y)     x = x_t / sigma_d  (B, ...)   the noisy sample, scaled to unit variance
                         t                  (B,)       an angle in radians: 0 is data, pi/2 is noise
                         y                  (B,)       int64 class labels, -1 for no label; or None
    x_t = cos(t) x_0 + sin(t) z,  z ~ N(0, sigma_d^2 I)       F predicts (cos(t) z - sin(t) x_0) / sigma_d

Other papers use the same curve in other coordinates, which `to_trigflow` converts. So a teacher is anything
that can be called like this: a run of ours, another project's network, or the exact teacher of a mixture.
"""
import math

import numpy as np
import torch
from torch.autograd import forward_ad

# ------------------------------------------------------------------------------------------- coordinates

def like(v, x):
    """Reshape v (B,) to (B, 1, ...) in x's dtype, so that it multiplies x (B, ...)."""
    return v.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def to_trigflow(x, alpha, sigma, sigma_d):
    """Convert x = alpha x_0 + sigma eps, eps ~ N(0, I), to TrigFlow's (x_t, t) (sCM, App. B).

    alpha and sigma are (B,); EDM's process has alpha = 1. Nothing is divided by alpha, because it vanishes at
    the noisy end of a variance-preserving process."""
    scale = sigma_d / torch.sqrt((alpha * sigma_d) ** 2 + sigma**2)
    return like(scale, x) * x, torch.atan2(sigma, alpha * sigma_d)


# --------------------------------------------------------------------------------------------- schedules

def karras(n, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """EDM's n noise levels, from the highest down, (n,) float64 (EDM, Eq. 5)."""
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    return (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


def ode_times(n, sigma_d):
    """Angles of EDM's grid for n solver steps, from arctan(80 / sigma_d) down to 0, (n + 1,) float64."""
    return torch.cat([torch.atan(karras(n) / sigma_d), torch.zeros(1, dtype=torch.float64)])


def lognormal_index(gen, grid, P_mean, P_std):
    """Intervals i (B,) int64 of a grid (n,) of noise levels that rise or fall, from grid[i] to grid[i + 1].
    Each is as likely as the log-normal has mass in it (iCT)."""
    mass = torch.erf((grid.log() - P_mean) / (math.sqrt(2) * P_std)).diff().abs().cumsum(0)
    return torch.searchsorted(mass, gen.uniform() * mass[-1])


def learning_rate(step, cfg):
    """Linear rise, EDM2's inverse square root beyond lr_ref, linear fall over the last share, lr_cooldown."""
    lr = cfg.lr / math.sqrt(max(step / cfg.lr_ref, 1)) if cfg.lr_ref else cfg.lr
    lr *= min(1, (step + 1) / cfg.lr_warmup) if cfg.lr_warmup else 1
    left = (1 - step / cfg.steps) / cfg.lr_cooldown if cfg.lr_cooldown else 1
    return lr * min(1, left)


def ema_beta(step, cfg):
    """Decay of the averaged weights at step 1, 2, ..: with a half-life of ema_halflife samples (at most the
    share ema_rampup of those seen, EDM), or EDM2's power function of relative width s (Sec. 3.1): beta =
    (1 - 1 / step)^(gamma + 1), gamma the largest root of g^3 + 7 g^2 + (16 - s^-2) g + (12 - s^-2) = 0."""
    if cfg.ema_sigma_rel:
        gamma = np.roots([1, 7, 16 - cfg.ema_sigma_rel**-2, 12 - cfg.ema_sigma_rel**-2]).real.max()
        return (1 - 1 / step) ** (gamma + 1)
    halflife = cfg.ema_halflife
    if cfg.ema_rampup:
        halflife = min(halflife, cfg.ema_rampup * (step - 1) * cfg.batch)
    return 0.5 ** (cfg.batch / halflife) if halflife else 0.0


# ------------------------------------------------------------------------------------------------ solvers

def solve(net, x, times, y=None, sigma_d=0.5, solver="heun"):
    """Integrate the PF-ODE dx/dt = sigma_d F(x / sigma_d, t) (sCM, Eq. 3) along falling angles, `times` (n,).

    x (B, ...) is the state at times[0]; the result is the state at times[-1].
    euler   a step along the slope; first order.
    ddim    exact as long as the predicted x_0 stays the same; first order. It is Euler's step in EDM.
    heun    EDM's sampler: second order, two network calls a step. The last step, to t = 0, is a ddim step."""
    def velocity(x, t):
        return sigma_d * net(x / sigma_d, t.expand(len(x)), y).to(x.dtype)

    ends = (times[1:] == 0).tolist()  # asked once, not in every step, which a GPU would wait for
    times = times.to(x.device)
    for t, s, at_end in zip(times[:-1], times[1:], ends):  # from t down to s
        v_t = velocity(x, t)
        if solver == "euler":
            x = x + (s - t) * v_t
            continue
        x_s = torch.cos(t - s) * x - torch.sin(t - s) * v_t
        if solver == "heun" and not at_end:
            z_t = torch.sin(t) * x + torch.cos(t) * v_t
            z_s = torch.sin(s) * x_s + torch.cos(s) * velocity(x_s, s)
            x_s = x_s + torch.sin(s - t) / (2 * torch.cos(t)) * (z_s - z_t)
        x = x_s
    return x


def guide(strong, weak, guidance):
    """Guidance away from a weaker prediction: weak + guidance (strong - weak), so 1 is off. `guidance` is a
    number, or (B,). The weaker one is without label (Ho & Salimans 2022), or of a worse network (Karras et
    al. 2024)."""
    if torch.is_tensor(guidance):
        guidance = like(guidance, strong)
    return weak + guidance * (strong - weak)


# ---------------------------------------------------------------------------------------------------- JVP

@torch.no_grad()
def jvp(net, primals, tangents):
    """net(*primals) and its derivative along the tangents, in one pass and without a graph. Takes the bare
    module, because function transforms do not cross DistributedDataParallel."""
    return torch.func.jvp(net, primals, tangents)


def with_rule(f, rule, *xs):
    """f(*xs). Under jvp, output and tangent are rule(*xs, *their tangents).

    PyTorch's own forward mode also differentiates by weights and numbers, along tangents of zeros. With it,
    each convolution and matrix product would run three times instead of twice."""
    primals, tangents = zip(*(forward_ad.unpack_dual(x) for x in xs))
    if all(tangent is None for tangent in tangents):  # no jvp
        return f(*xs)
    tangents = [torch.zeros_like(x) if tx is None else tx for x, tx in zip(primals, tangents)]
    return forward_ad.make_dual(*rule(*primals, *tangents))


def linear(f, *xs):
    """f(*xs) for an f that is linear in its inputs: J v = f(v)."""
    n = len(xs)
    return with_rule(f, lambda *duals: (f(*duals[:n]), f(*duals[n:])), *xs)


def affine(f, derivative, x):
    """f(x) for an f that is linear but for a constant, such as a bias: J v = derivative(v)."""
    return with_rule(f, lambda x, tx: (f(x), derivative(tx)), x)


def product(a, b):
    return with_rule(torch.mul, lambda a, b, ta, tb: (a * b, torch.addcmul(ta * b, a, tb)), a, b)


def silu(x):
    f, backward = torch.nn.functional.silu, torch.ops.aten.silu_backward  # elementwise, so also the JVP
    return with_rule(f, lambda x, tx: (f(x), backward(tx, x)), x)


# ----------------------------------------------------------------------------------------- random numbers

class Draw:
    """Random numbers as a function of (seed, step, position in the global batch).

    Positions lo..hi come from blocks of 64, each with a generator of its own. So a resumed run, another
    number of processes and another size of micro-batch all see the numbers that one unbroken process would
    see. Dropout masks alone depend on the micro-batch as a whole. Indices and labels are drawn on the CPU,
    which makes the data the same on every machine; noise differs from one kind of GPU to the next."""
    BLOCK = 64

    def __init__(self, seed, step, lo, hi, device="cpu"):
        first, last = lo // self.BLOCK, (hi - 1) // self.BLOCK
        self.rows = slice(lo - first * self.BLOCK, hi - first * self.BLOCK)
        self.place, self.device = (seed, step, lo, hi), torch.device(device)
        self.dropout_seed = self._mix(seed, step, lo, 1)
        seeds = [self._mix(seed, step, block, 0) for block in range(first, last + 1)]
        self.generators = [torch.Generator(device).manual_seed(number) for number in seeds]
        self.host = self.generators  # the CPU's
        if self.device.type != "cpu":
            self.host = [torch.Generator().manual_seed(number) for number in seeds]

    @staticmethod
    def _mix(*numbers):
        return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)

    def _draw(self, function, *shape, host=False, **kw):
        generators, device = (self.host, "cpu") if host else (self.generators, self.device)
        rows = [function(*shape, generator=g, device=device, **kw) for g in generators]
        return torch.cat(rows)[self.rows]

    def normal(self, *shape, dtype=torch.float32):
        """Standard normal, (B, *shape)."""
        return self._draw(torch.randn, self.BLOCK, *shape, dtype=dtype)

    def uniform(self):
        """Uniform on [0, 1), (B,) float64."""
        return self._draw(torch.rand, self.BLOCK, dtype=torch.float64)

    def index(self, high, device=None):
        """Integers from 0 to high - 1, (B,) int64, on this device or another."""
        return self._draw(torch.randint, high, (self.BLOCK,), host=True).to(device or self.device)

    def chance(self, rate):
        """True at this rate, (B,) bool, on the CPU."""
        return self._draw(torch.rand, self.BLOCK, host=True, dtype=torch.float64) < rate

    def labels(self, y, cfg):
        """The labels as cfg wants them: None unless conditional; each becomes -1 with rate label_dropout."""
        return torch.where(self.chance(cfg.label_dropout).to(y.device), -1, y) if cfg.conditional else None

    def same_dropout(self):
        """Call this before each pass that must use the same dropout masks."""
        torch.manual_seed(self.dropout_seed)
