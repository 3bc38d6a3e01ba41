"""Layers and operations, each with the rule for its JVP beside it (see common.with_rule)."""
from common import affine, linear, with_rule
from kit.attention import attention
from kit.process import fail

import math

import torch
import torch.nn.functional as tnf
from torch import nn

# TF32 keeps 10 bits of each factor. Tangents, and differences between neighbours, need float32's 23. For the
# same reason --compile is off unless asked for (fused sums round in another order). cudnn's benchmark mode is
# off, because the next run may choose another algorithm. channels_last, which EDM2's blocks use, is harmless.
torch.backends.cudnn.allow_tf32 = False

DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)  # what --dtype may be
SILU_GAIN = 1 / 0.596  # restores unit variance after a SiLU (EDM2, Eq. 81)


def pnorm(x, dim=1, eps=1e-4):
    """Pixel normalization: divide x by its root mean square along dim, taken in float32 or wider."""
    dims = [dim] if isinstance(dim, int) else list(dim)  # torch.compile wants a list
    return with_rule(lambda x: PNorm.apply(x, dims, eps), lambda x, tx: pnorm_derivative(x, tx, dims, eps), x)


def pnorm_gain(x, dims, eps):
    """g = 1 / (eps + n), with n the root mean square."""
    size = math.prod([x.shape[d] for d in dims])
    wide = torch.promote_types(x.dtype, torch.float32)
    n = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=wide) / math.sqrt(size)
    return (1 / (eps + n)).to(x.dtype)


def pnorm_derivative(x, tx, dims, eps):
    """y = x g and dy = g (dx - y <y, dx> / (size n g)), which is less of what points along x."""
    size = math.prod([x.shape[d] for d in dims])
    wide, g = torch.promote_types(x.dtype, torch.float32), pnorm_gain(x, dims, eps)
    y = x * g
    share = (y * tx).sum(dims, keepdim=True, dtype=wide) / size / (1 - eps * g.to(wide)).clamp(min=1e-6)
    return y, g * torch.addcmul(tx, y, share.to(x.dtype), value=-1)


class PNorm(torch.autograd.Function):
    """The Jacobian is symmetric, so the backward pass is the derivative along the gradient. It stays in x's
    precision but for two sums, where autograd would go through float32, and keeps x alone."""

    @staticmethod
    def forward(x, dims, eps):
        return x * pnorm_gain(x, dims, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *ctx.rest = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, gradient):
        return pnorm_derivative(*ctx.saved_tensors, gradient, *ctx.rest)[1], None, None


def mp_sum(a, b, t):
    """Blend two tensors of unit variance so that the result has unit variance, too (EDM2, Eq. 88)."""
    return linear(lambda a, b: torch.lerp(a, b, t) / math.hypot(1 - t, t), a, b)


def mp_cat(a, b):
    """Concatenate channels such that both halves weigh the same (EDM2, Eq. 103, t = 1/2)."""
    wa, wb = (math.sqrt((a.shape[1] + b.shape[1]) / (2 * n)) for n in (a.shape[1], b.shape[1]))
    return linear(lambda a, b: torch.cat([a * wa, b * wb], dim=1), a, b)


class MPConv(nn.Module):
    """Convolution, or linear layer if kernel is None, whose weights have unit norm (EDM2, Eq. 47 and 66)."""

    def __init__(self, cin, cout, kernel=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cout, cin, *([kernel, kernel] if kernel else [])))
        self.frozen, self.kept = False, None  # see freeze

    def unit(self, gain, dtype):
        dims = tuple(range(1, self.weight.ndim))
        return (pnorm(self.weight, dims) * (gain / math.sqrt(self.weight[0].numel()))).to(dtype)

    def forward(self, x, gain=1.0):
        if self.frozen and (self.kept is None or self.kept.dtype != x.dtype):
            self.kept = self.unit(gain, x.dtype)
            if self.kept.ndim == 4:
                self.kept = self.kept.contiguous(memory_format=torch.channels_last)
        weight = self.kept if self.frozen else self.unit(gain, x.dtype)
        if weight.ndim == 2:
            return linear(lambda x: x @ weight.t(), x)
        return linear(lambda x: tnf.conv2d(x, weight, padding=weight.shape[-1] // 2), x)


class Linear(nn.Linear):
    def forward(self, x):
        return affine(super().forward, lambda v: tnf.linear(v, self.weight), x)


class Conv2d(nn.Conv2d):
    """Convolves in x's precision. Autocast would do that, but it does not reach into a JVP."""

    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return affine(lambda x: self._conv_forward(x, weight, bias),
                      lambda v: self._conv_forward(v, weight, None), x)


class GroupNorm(nn.GroupNorm):
    """DDPM++'s. Normalizes in float32 or wider, and gives the result in x's precision."""

    def __init__(self, channels):
        groups = min(32, channels // 4)
        if not groups or channels % groups:
            fail(f"--arch ddpmpp cannot normalize {channels} channels in groups: try --channels 32, 64, 96")
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x):
        def rule(x, tx):  # the Jacobian of a normalization is symmetric, so its backward pass is the JVP
            size = len(x), x.shape[1], math.prod(x.shape[2:]), self.num_groups
            y, mean, rstd = torch.native_group_norm(x, self.weight, self.bias, *size, self.eps)
            back = torch.ops.aten.native_group_norm_backward
            t, _, _ = back(tx, x, mean, rstd, None, *size, [True, False, False])
            return y, t * self.weight[:, None, None]
        return with_rule(super().forward, rule, x.to(self.weight.dtype).contiguous()).to(x.dtype)


@torch.no_grad()
def normalize_weights(net):
    """EDM2's forced weight normalization (Eq. 66), called after each optimizer step. Inside the forward pass,
    as in EDM2, it would change what the next pass of the same step computes."""
    for module in net.modules():
        if isinstance(module, MPConv):
            module.weight.copy_(pnorm(module.weight, tuple(range(1, module.weight.ndim))))


def freeze(net):
    """From now on a network whose weights stay as they are normalizes and lays them out once, not in every
    pass. That takes memory, once more its weights in the precision of the pass."""
    for module in net.modules():
        if isinstance(module, MPConv):
            module.frozen = True
    return net


def dropout(x, p, training):
    """Dropout that draws the same mask with and without a JVP (see Draw.same_dropout)."""
    if not (training and p):
        return x
    mask = (torch.rand(x.shape, device=x.device) >= p).to(x.dtype)
    return linear(lambda x: x * mask / (1 - p), x)


def resample(x, kind):
    """Halve ("down") or double ("up") the image; "" leaves it as it is."""
    if kind == "down":
        return linear(lambda x: tnf.avg_pool2d(x, 2), x)
    return linear(lambda x: tnf.interpolate(x, scale_factor=2, mode="nearest"), x) if kind == "up" else x


def self_attention(qkv, heads, normalize):
    """Attention over the pixels of qkv (B, 3 C, H, W) -> (B, C, H, W). EDM2 normalizes each vector."""
    b, c, height, width = qkv.shape
    qkv = qkv.view(b, heads, c // 3 // heads, 3, height * width).transpose(2, 4)
    q, k, v = (pnorm(qkv, dim=4) if normalize else qkv).unbind(3)             # (B, heads, H W, channels)
    x = attention(q, k, v).transpose(1, 2).reshape(b, height, width, c // 3).permute(0, 3, 1, 2)
    return x if normalize else x.contiguous()  # EDM2's blocks are channels_last, DDPM++'s are not


def one_hot(y, t, classes, dtype):
    """Labels as (B, classes) of unit variance; a row of zeros for y = -1, and for all if y is None."""
    y = torch.full_like(t, -1, dtype=torch.int64) if y is None else y
    return tnf.one_hot(y + 1, classes + 1)[:, 1:].to(dtype) * math.sqrt(classes)


def noise_input(t, c_noise, sigma_d):
    """What is embedded: t itself (sCM, Sec. 4.1), or EDM's log(sigma) / 4 with sigma = sigma_d tan(t)."""
    # DEPARTS: EDM takes the logarithm of any sigma; here t stays 1e-4 away from 0 and pi/2, where it has no
    # bound. For sigma_d = 0.5 that cuts sigma to 5e-5 .. 5000, far outside of EDM's 0.002 .. 80.
    if c_noise == "t":
        return t
    low, high = 1e-4, math.pi / 2 - 1e-4

    def f(t):
        return torch.log(sigma_d * torch.tan(t.clamp(low, high))) / 4
    return with_rule(f, lambda t, tt: (f(t), tt * ((t > low) & (t < high)) / (2 * torch.sin(2 * t))), t)


class Embedding(nn.Module):
    """Numbers (B,) -> features of unit variance (B, dim), in the dtype of the network's parameters.

    positional: cosines and sines of frequencies that fall from `scale` to scale / 10000.
    fourier: random frequencies of standard deviation 2 pi scale. EDM2's scale is 1; sCM (Sec. 4.1) finds
    larger ones unstable."""

    def __init__(self, kind, dim, scale=1.0):
        super().__init__()
        if kind == "positional":
            freqs = (scale * 1e-4 ** (torch.arange(dim // 2) / (dim // 2 - 1))).repeat(2)
            phases = (torch.arange(dim) >= dim // 2) * -math.pi / 2  # cosines, then sines
        else:
            freqs = 2 * math.pi * scale * torch.randn(dim)
            phases = -2 * math.pi * torch.rand(dim)
        self.register_buffer("freqs", freqs)
        self.register_buffer("phases", phases)

    def forward(self, c):
        def features(c, wave=torch.cos):
            return math.sqrt(2) * wave(c.to(self.freqs.dtype)[:, None] * self.freqs + self.phases)

        def rule(c, tc):
            return features(c), -features(c, torch.sin) * self.freqs * tc.to(self.freqs.dtype)[:, None]
        return with_rule(features, rule, c)


class WeightHead(nn.Module):
    """Learns w(t) (B,), the logarithm of the loss's weight at t (EDM2, where it is -logvar; sCM, App. D)."""
    # DEPARTS: EDM2's head starts with random weights; here with a gain of 0, so w = 0 and the loss is plain

    def __init__(self, sigma_d):
        super().__init__()
        self.sigma_d = sigma_d
        self.embed = Embedding("fourier", 128)
        self.linear = MPConv(128, 1)
        self.gain = nn.Parameter(torch.zeros([]))

    def forward(self, t):
        return self.linear(self.embed(noise_input(t, "log", self.sigma_d)), self.gain)[:, 0]
