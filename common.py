"""What the five scripts share.

    1. TrigFlow, schedules, solvers     the coordinates of every network, noise levels, steps of the ODE
    2. JVP and attention                the derivative of a network along a direction, in one pass
    3. networks                         an MLP for points; for images one U-Net with EDM2's or DDPM++'s blocks
    4. data                             random numbers, mixtures of Gaussians, images and latents on disk
    5. config                           the shared flags, the presets of the datasets, the command line
    6. run                              processes, checkpoints, teachers, optimizer, averages, the log
    7. samples                          pictures, distances, the report at the end of training
    8. other projects' files            teachers from EDM, EDM2 and diffusers; text-to-image pipelines

Whoever reads a method needs sections 1 and 2 alone, the first 300 lines. The rest is machinery.

One convention holds for every network and every teacher, that of TrigFlow (sCM, Sec. 3):

    F = net(x, t, y)     x = x_t / sigma_d  (B, ...)   the noisy sample, scaled to unit variance
                         t                  (B,)       an angle in radians: 0 is data, pi/2 is noise
                         y                  (B,)       int64 class labels, -1 for no label; or None
    x_t = cos(t) x_0 + sin(t) z,  z ~ N(0, sigma_d^2 I)       F predicts (cos(t) z - sin(t) x_0) / sigma_d

Other papers use the same curve in other coordinates, which `to_trigflow` converts. So a teacher is anything
that can be called like this: a run of ours, another project's network, or the exact teacher of a `Mixture`.
"""
import argparse
import contextlib
import copy
import csv
import dataclasses
import datetime
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import tarfile
import time
import urllib.request
import zipfile
from pathlib import Path
from typing import Literal, get_args


def last_words(kind, error, trace):
    """Ctrl-C and a lack of memory end in one line. Every other exception is a bug and keeps its traceback."""
    if issubclass(kind, KeyboardInterrupt):
        saved = "Run" in globals() and Run.saved
        hint = f"; --resume goes on from the checkpoint in {saved}" if saved else ""
        print(f"\nstopped{hint}", file=sys.stderr)
    elif issubclass(kind, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
        micro = "Run" in globals() and Run.lower_micro
        hint = f"--micro {micro}, or --checkpointing" if micro else "lower --batch, --micro or --channels"
        print(f"\nout of memory: {hint}", file=sys.stderr, flush=True)
        os._exit(2)  # a hook has no other way to choose the exit code
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = last_words  # before torch is imported, which takes seconds

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as tnf
import torch.utils.checkpoint
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.autograd import forward_ad
from tqdm import tqdm

# TF32 keeps 10 bits of each factor. Tangents, and differences between neighbours, need float32's 23. For the
# same reason --compile is off unless asked for (fused sums round in another order). cudnn's benchmark mode is
# off, because the next run may choose another algorithm. channels_last, which EDM2's blocks use, is harmless.
torch.backends.cudnn.allow_tf32 = False


# ---------------------------------------------------------------------- 1. TrigFlow, schedules, solvers

def like(v, x):
    """Reshape v (B,) to (B, 1, ...) in x's dtype, so that it multiplies x (B, ...)."""
    return v.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def to_trigflow(x, alpha, sigma, sigma_d):
    """Convert x = alpha x_0 + sigma eps, eps ~ N(0, I), to TrigFlow's (x_t, t) (sCM, App. B).

    alpha and sigma are (B,); EDM's process has alpha = 1. Nothing is divided by alpha, because it vanishes at
    the noisy end of a variance-preserving process."""
    scale = sigma_d / torch.sqrt((alpha * sigma_d) ** 2 + sigma**2)
    return like(scale, x) * x, torch.atan2(sigma, alpha * sigma_d)


def karras(n, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """EDM's n noise levels, from the highest down, (n,) float64 (EDM, Eq. 5)."""
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    return (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho


def ode_times(n, sigma_d):
    """Angles of EDM's grid for n solver steps, from arctan(80 / sigma_d) down to 0, (n + 1,) float64."""
    return torch.cat([torch.atan(karras(n) / sigma_d), torch.zeros(1, dtype=torch.float64)])


def solve(net, x, times, y=None, sigma_d=0.5, solver="heun"):
    """Integrate the PF-ODE dx/dt = sigma_d F(x / sigma_d, t) (sCM, Eq. 3) along falling angles, `times` (n,).

    x (B, ...) is the state at times[0]; the result is the state at times[-1].
    euler   a step along the slope; first order.
    ddim    exact as long as the predicted x_0 stays the same; first order. It is Euler's step in EDM.
    heun    EDM's sampler: second order, two network calls a step. The last step, to t = 0, is a ddim step."""
    def velocity(x, t):
        return sigma_d * net(x / sigma_d, t.expand(len(x)), y).to(x.dtype)

    times = times.to(x.device)
    for t, s in zip(times[:-1], times[1:]):  # from t down to s
        v_t = velocity(x, t)
        if solver == "euler":
            x = x + (s - t) * v_t
            continue
        x_s = torch.cos(t - s) * x - torch.sin(t - s) * v_t
        if solver == "heun" and s > 0:
            z_t = torch.sin(t) * x + torch.cos(t) * v_t
            z_s = torch.sin(s) * x_s + torch.cos(s) * velocity(x_s, s)
            x_s = x_s + torch.sin(s - t) / (2 * torch.cos(t)) * (z_s - z_t)
        x = x_s
    return x


# ----------------------------------------------------------------------------------- 2. JVP and attention

@torch.no_grad()
def jvp(net, primals, tangents):
    """net(*primals) and its derivative along the tangents, in one pass and without a graph. Takes the bare
    module, because function transforms do not cross DistributedDataParallel."""
    jit = os.environ.get("PYTORCH_JIT", "1")
    os.environ["PYTORCH_JIT"] = "0"
    try:  # without the decompositions that functorch would compile otherwise: no layer here needs them
        return torch.func.jvp(net, primals, tangents)
    finally:
        os.environ["PYTORCH_JIT"] = jit


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
    return with_rule(tnf.silu, lambda x, tx: (tnf.silu(x), torch.ops.aten.silu_backward(tx, x)), x)


def attention(q, k, v):
    """softmax(q k^T / sqrt(c)) v, all (B, heads, N, c).

    PyTorch's fused attention has no JVP. Under jvp, output and tangent therefore come from a pass of our own,
    in memory that is linear in N (sCM, App. F)."""
    primals, tangents = zip(*(forward_ad.unpack_dual(x) for x in (q, k, v)))
    if all(tangent is None for tangent in tangents):  # no jvp; strided inputs would not be fused
        return tnf.scaled_dot_product_attention(*(x.contiguous() for x in primals))
    tangents = (torch.zeros_like(x) if tx is None else tx for x, tx in zip(primals, tangents))
    return forward_ad.make_dual(*DualAttention.apply(*primals, *tangents))


class DualAttention(torch.autograd.Function):
    """(q, k, v, tq, tk, tv) -> (o, to), output and tangent. It is an autograd.Function because functorch
    gives these plain tensors; its wrapped ones have no memory that a kernel could read. It has no
    backward."""

    @staticmethod
    def forward(q, k, v, tq, tk, tv):
        gpu = q.is_cuda and torch.cuda.get_device_capability(q.device) >= (8, 0)  # Ampere and later
        interpreter = os.environ.get("TRITON_INTERPRET") == "1" and q.dtype != torch.bfloat16
        fits = q.element_size() <= 4 and q.shape[-1] in (16, 32, 64, 128) and q.shape == k.shape == v.shape
        fused = (gpu or interpreter) and fits and triton_kernel()
        return (attention_triton if fused else attention_blocks)(q, k, v, tq, tk, tv)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


def attention_blocks(q, k, v, tq, tk, tv, size=256):
    """Attention and its tangent, (B, heads, N, c) each, over blocks of keys, on any device and in any dtype.

    With S = q k^T / sqrt(c) and P = softmax S:  o = P v,  to = P tv + (P * tS) v - rowsum(P * tS) o.
    The blocks are summed as in FlashAttention. With m the largest score so far and p = exp(S - m), the sums
    are l of p, mu of p * tS, o of p v, and a of p tv + (p * tS) v. All of them fade whenever m grows."""
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    scale = 1 / math.sqrt(q.shape[-1])
    q, tq = q.to(wide) * scale, tq.to(wide) * scale
    both = torch.cat([tq, q], dim=3)
    m = torch.full_like(q[..., :1], -math.inf)
    l, mu, o, a = 0, 0, 0, 0
    for block in zip(*(x.split(size, dim=2) for x in (k, v, tk, tv))):
        k, v, tk, tv = (x.to(wide) for x in block)
        s, ts = q @ k.mT, both @ torch.cat([k, tk], dim=3).mT                    # (B, heads, N, size)
        before, m = m, torch.maximum(m, s.amax(3, keepdim=True))
        p, fade = (s - m).exp(), (before - m).exp()
        pts = p * ts
        l = l * fade + p.sum(3, keepdim=True)
        mu = mu * fade + pts.sum(3, keepdim=True)
        o = o * fade + p @ v
        a = a * fade + p @ tv + pts @ v
    o = o / l
    return o.to(dtype), ((a - mu * o) / l).to(dtype)


@functools.cache
def triton_kernel():
    """attention_blocks as a Triton kernel, or None where Triton is missing.

    Each program takes `rows` queries of one image and head over all keys, `cols` keys at a time. Tensors are
    contiguous (B, heads, n, c). Sums are float32, and "ieee" keeps TF32 out of products of float32."""
    global triton, tl  # a kernel looks for these among the module's names
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    @triton.jit
    def kernel(Q, K, V, TQ, TK, TV, O, TO, n, scale, c: tl.constexpr, rows: tl.constexpr, cols: tl.constexpr):
        blocks = tl.cdiv(n, rows)
        start = (tl.program_id(0) // blocks).to(tl.int64) * n * c             # of this image and head
        i = tl.program_id(0) % blocks * rows + tl.arange(0, rows)
        d = tl.arange(0, c)
        query, is_query = start + i[:, None] * c + d[None, :], i[:, None] < n
        q, tq = tl.load(Q + query, is_query, 0.0), tl.load(TQ + query, is_query, 0.0)
        m, l = tl.full((rows,), float("-inf"), tl.float32), tl.zeros((rows,), tl.float32)
        mu = tl.zeros((rows,), tl.float32)
        o, a = tl.zeros((rows, c), tl.float32), tl.zeros((rows, c), tl.float32)
        for first in range(0, n, cols):
            j = first + tl.arange(0, cols)
            key, is_key = start + j[:, None] * c + d[None, :], j[:, None] < n
            k, tk = tl.load(K + key, is_key, 0.0), tl.load(TK + key, is_key, 0.0)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale           # (rows, cols)
            s = tl.where(j[None, :] < n, s, float("-inf"))
            ts = tl.dot(tq, tl.trans(k), input_precision="ieee")
            ts = tl.dot(q, tl.trans(tk), ts, input_precision="ieee") * scale      # 0 past the last key
            m_new = tl.maximum(m, tl.max(s, 1))
            p, fade = tl.exp(s - m_new[:, None]), tl.exp(m - m_new)
            pts, m = p * ts, m_new
            l, mu = l * fade + tl.sum(p, 1), mu * fade + tl.sum(pts, 1)
            v, tv = tl.load(V + key, is_key, 0.0), tl.load(TV + key, is_key, 0.0)
            p, pts = p.to(v.dtype), pts.to(v.dtype)
            o = tl.dot(p, v, o * fade[:, None], input_precision="ieee")
            a = tl.dot(p, tv, a * fade[:, None], input_precision="ieee")
            a = tl.dot(pts, v, a, input_precision="ieee")
        o = o / l[:, None]
        a = (a - mu[:, None] * o) / l[:, None]
        tl.store(O + query, o.to(O.dtype.element_ty), is_query)
        tl.store(TO + query, a.to(TO.dtype.element_ty), is_query)
    return kernel


def attention_triton(*duals):
    """Launch the kernel on (q, k, v, tq, tk, tv), each (B, heads, N, c); returns (o, to).

    The sizes are such that the compiler spills no registers on Hopper, nor on Ampere up to 64 channels. They
    were found by compiling alone: the kernel has not run on a GPU yet."""
    duals = [x.contiguous() for x in duals]
    out = [torch.empty_like(duals[0]) for _ in range(2)]
    b, heads, n, c = duals[0].shape
    device = torch.cuda.get_device_properties(duals[0].device) if duals[0].is_cuda else None
    roomy = device is None or device.shared_memory_per_block_optin >= 160 * 1024  # A100, H100; not RTX
    if duals[0].dtype == torch.float32:  # no tensor cores without TF32, so smaller blocks
        rows, cols, warps, stages = 32, 32, 4 if c <= 32 else 8, 1
    elif c <= 64:
        rows, cols, warps, stages = 64, 64, 4, 3 if roomy else 2
    else:
        hopper = device is None or device.major == 9
        rows, cols, warps, stages = 64, 32, 4 if hopper else 8, 2 if roomy else 1
    with torch.cuda.device_of(duals[0]):
        triton_kernel()[(b * heads * triton.cdiv(n, rows),)](
            *duals, *out, n, 1 / math.sqrt(c), c, rows, cols, num_warps=warps, num_stages=stages)
    return tuple(out)


# --------------------------------------------------------------------------------------------- 3. networks

DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)  # what --dtype may be
SILU_GAIN = 1 / 0.596  # restores unit variance after a SiLU (EDM2, Eq. 81)


def pnorm(x, dim=1, eps=1e-4):
    """Pixel normalization: divide x by its root mean square along dim, taken in float32 or wider."""
    dims = [dim] if isinstance(dim, int) else dim
    size = math.prod([x.shape[d] for d in dims])  # torch.compile wants a list here
    wide = torch.promote_types(x.dtype, torch.float32)

    def gain(x):  # g = 1 / (eps + n), with n the root mean square
        n = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide) / math.sqrt(size)
        return (1 / (eps + n)).to(x.dtype)

    def rule(x, tx):  # dy = g (dx - y <y, dx> / (size n g)): less of what points along x
        g = gain(x)
        y = x * g
        share = (y * tx).sum(dim, keepdim=True, dtype=wide) / size / (1 - eps * g.to(wide)).clamp(min=1e-6)
        return y, g * torch.addcmul(tx, y, share.to(x.dtype), value=-1)
    return with_rule(lambda x: x * gain(x), rule, x)


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

    def forward(self, x, gain=1.0):
        dims = tuple(range(1, self.weight.ndim))
        weight = pnorm(self.weight, dims) * (gain / math.sqrt(self.weight[0].numel()))
        weight = weight.to(x.dtype)
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
    return attention(q, k, v).transpose(2, 3).reshape(b, c // 3, height, width)


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


class EDM2Embedding(nn.Module):
    """Time t (B,), label y (B,) or None, and guidance (B,) or None -> one embedding (B, dim), as in EDM2."""

    def __init__(self, dim, channels, classes, sigma_d, emb, emb_scale, c_noise, guidance):
        super().__init__()
        self.sigma_d, self.c_noise, self.classes = sigma_d, c_noise, classes
        self.emb_fourier, self.emb_noise = Embedding(emb, channels, emb_scale), MPConv(channels, dim)
        self.emb_label = MPConv(classes, dim) if classes else None
        if guidance:
            self.guidance_embed = Embedding("positional", channels, 10.0)
            self.guidance_linear = MPConv(channels, dim)
            self.guidance_gain = nn.Parameter(torch.zeros([]))  # 0: starts as the teacher, which knows none

    def forward(self, t, y, guidance):
        emb = self.emb_noise(self.emb_fourier(noise_input(t, self.c_noise, self.sigma_d)))
        if self.emb_label is not None:
            emb = mp_sum(emb, self.emb_label(one_hot(y, t, self.classes, emb.dtype)), 0.5)
        if guidance is not None:
            emb = emb + self.guidance_linear(self.guidance_embed(guidance)) * self.guidance_gain
        return linear(lambda v: v * SILU_GAIN, silu(emb))


class DDPMppEmbedding(nn.Module):
    """The same as in DDPM++, without guidance; its features are sines first, then cosines."""

    def __init__(self, channels, classes, sigma_d, emb_scale, c_noise):
        super().__init__()
        self.sigma_d, self.c_noise, self.classes = sigma_d, c_noise, classes
        self.half, self.emb_scale = channels // 2, emb_scale
        self.map_label = Linear(classes, channels) if classes else None
        self.map_layer0 = Linear(channels, 4 * channels)
        self.map_layer1 = Linear(4 * channels, 4 * channels)

    def forward(self, t, y, guidance):
        dtype = self.map_layer0.weight.dtype
        freqs = self.emb_scale * 1e-4 ** (torch.arange(self.half, device=t.device) / (self.half - 1))
        c = noise_input(t, self.c_noise, self.sigma_d)
        angle = linear(lambda c: c[:, None].to(dtype) * freqs.to(dtype), c)
        emb = torch.cat([angle.sin(), angle.cos()], dim=1)
        if self.map_label is not None:
            emb = emb + self.map_label(one_hot(y, t, self.classes, dtype))
        return silu(self.map_layer1(silu(self.map_layer0(emb))))


class MLP(nn.Module):
    """Residual MLP for points: F (B, D) = net(x (B, D), t (B,), y (B,)). As with UNet, guidance (B,) is the
    strength of guidance to imitate, and with return_w, F comes with the weighting head's w(t) (B,)."""

    def __init__(self, shape, classes=0, channels=128, blocks=4, sigma_d=0.5, emb="positional",
                 emb_scale=1.0, c_noise="t", double_norm=True, norm_shift=True, guidance=False, head=True,
                 **of_images):
        super().__init__()
        self.embedding = EDM2Embedding(channels, 64, classes, sigma_d, emb, emb_scale, c_noise, guidance)
        self.head = WeightHead(sigma_d) if head else None
        self.double_norm, self.norm_shift, self.blocks = double_norm, norm_shift, blocks
        self.first, self.last = Linear(shape[0], channels), Linear(channels, shape[0])
        self.inner = nn.ModuleList(Linear(channels, channels) for _ in range(blocks))
        self.modulate = Linear(channels, (1 + norm_shift) * blocks * channels)
        self.outer = nn.ModuleList(Linear(channels, channels) for _ in range(blocks))

    def forward(self, x, t, y=None, guidance=None, return_w=False):
        emb = self.embedding(t, y, guidance)
        h = self.first(x.to(emb.dtype))
        # scales, and then shifts, (B, channels) each
        parts = self.modulate(emb).chunk((1 + self.norm_shift) * self.blocks, 1)
        for i, (inner, outer) in enumerate(zip(self.inner, self.outer)):
            scale = pnorm(parts[i]) if self.double_norm else 1 + parts[i]
            shift = parts[i + self.blocks] if self.norm_shift else 0
            shift = pnorm(shift) if self.double_norm and self.norm_shift else shift
            h = h + outer(silu(product(pnorm(inner(h)), scale) + shift))
        F = self.last(h)
        return (F, self.head(t) if self.head else F.new_zeros(len(t))) if return_w else F


class EDM2Block(nn.Module):
    """EDM2's residual block (config G). Encoder blocks normalize their input, decoder blocks do not."""

    def __init__(self, cin, cout, dim, encoder, attend, resample, dropout, double_norm, norm_shift):
        super().__init__()
        self.encoder, self.resample, self.dropout = encoder, resample, dropout
        self.double_norm = double_norm
        self.shift = double_norm and norm_shift
        self.heads = max(cout // 64, 1)
        if attend and cout % self.heads:
            fail(f"attention at {cout} channels: above 64 they must be a multiple of 64 (--channels)")
        self.conv_skip = MPConv(cin, cout, 1) if cin != cout else None
        self.conv_res0, self.conv_res1 = MPConv(cout if encoder else cin, cout, 3), MPConv(cout, cout, 3)
        self.emb_linear = MPConv(dim, 2 * cout if self.shift else cout)
        if not double_norm:
            self.emb_gain = nn.Parameter(torch.zeros([]))
        self.attn_qkv, self.attn_proj = (MPConv(cout, n * cout, 1) if attend else None for n in (3, 1))

    def modulate(self, x, emb):
        """The embedding acts on the channels of x (B, C, H, W): x (1 + s(t)) in EDM2; norm(x) pnorm(s(t)) +
        pnorm(b(t)) with adaptive double normalization (sCM, Sec. 4.1). The sizes that sCM prints for ImageNet
        leave no room for b(t), hence norm_shift."""
        # DEPARTS: sCM adds the two; here the sum is over sqrt(2), because EDM2's layers rely on unit variance
        shape = (len(x), -1, 1, 1)
        if not self.double_norm:
            scale = affine(lambda s: 1 + s, lambda v: v, self.emb_linear(emb, self.emb_gain))
            return product(x, scale.view(shape).to(x.dtype))
        if not self.shift:
            return product(pnorm(x), pnorm(self.emb_linear(emb)).view(shape).to(x.dtype))
        scale, shift = (linear(lambda v: v / math.sqrt(2), pnorm(v)).view(shape).to(x.dtype)
                        for v in self.emb_linear(emb).chunk(2, dim=1))
        return product(pnorm(x), scale) + shift

    def forward(self, x, emb):
        x = resample(x, self.resample)
        if self.encoder:
            x = pnorm(self.conv_skip(x) if self.conv_skip else x)
        y = self.modulate(self.conv_res0(silu(x), SILU_GAIN), emb)
        y = self.conv_res1(dropout(silu(y), self.dropout, self.training), SILU_GAIN)
        if not self.encoder and self.conv_skip:
            x = self.conv_skip(x)
        x = mp_sum(x, y, 0.3)
        if self.attn_qkv:
            x = mp_sum(x, self.attn_proj(self_attention(self.attn_qkv(x), self.heads, normalize=True)), 0.3)
        # DEPARTS: EDM2 clips in float32, too; here only in float16, because a clip has no tangent beyond it
        return x.clamp(-256, 256) if x.dtype == torch.float16 else x


class DDPMppBlock(nn.Module):
    """DDPM++'s residual block, with GroupNorm, one attention head, and sums over sqrt(2)."""

    def __init__(self, cin, cout, dim, encoder, attend, resample, dropout, double_norm, norm_shift):
        super().__init__()
        self.resample, self.dropout = resample, dropout
        self.norm0, self.norm1 = GroupNorm(cin), GroupNorm(cout)
        self.conv0, self.conv1 = Conv2d(cin, cout, 3, padding=1), Conv2d(cout, cout, 3, padding=1)
        self.affine = Linear(dim, cout)
        self.skip = Conv2d(cin, cout, 1) if cin != cout or resample else None
        self.norm2 = GroupNorm(cout) if attend else None
        self.qkv, self.proj = (Conv2d(cout, n * cout, 1) if attend else None for n in (3, 1))

    def forward(self, x, emb):
        y = self.conv0(resample(silu(self.norm0(x)), self.resample))
        y = self.norm1(y + self.affine(emb)[:, :, None, None].to(y.dtype))
        y = self.conv1(dropout(silu(y), self.dropout, self.training))
        x = self.skip(resample(x, self.resample)) if self.skip else x
        x = linear(lambda a, b: (a + b) * math.sqrt(0.5), y, x)
        if self.qkv:
            y = self_attention(self.qkv(self.norm2(x)), 1, normalize=False)
            x = linear(lambda a, b: (a + b) * math.sqrt(0.5), x, self.proj(y))
        return x


class UNet(nn.Module):
    """The U-Net of EDM: F (B, C, H, W) = net(x (B, C, H, W), t (B,), y (B,)).

    arch "edm2" has EDM2's magnitude-preserving blocks (Karras et al. 2024), "ddpmpp" those of DDPM++, which
    EDM trains on CIFAR-10 (EDM, App. F). Parameters have EDM's names.

    The torso runs in `dtype`; parameters, embeddings and the output are float32 (float64 after .double()).
    `attention` lists the resolutions with self-attention. Dropout acts at `dropout_res` pixels a side and
    below, as in sCM's and ECT's ImageNet runs, or everywhere if that is 0."""

    def __init__(self, shape, classes=0, arch="edm2", channels=64, channel_mult=(1, 2), blocks=2,
                 attention=(8,), dropout=0.0, dropout_res=0, sigma_d=0.5, emb="positional", emb_scale=1.0,
                 c_noise="t", double_norm=True, norm_shift=True, guidance=False, head=True, dtype="fp32"):
        super().__init__()
        self.edm2 = arch == "edm2"
        self.checkpointing = False
        self.dtype = DTYPES[dtype] if dtype != "fp32" else None
        levels = [(shape[1] >> i, channels * m) for i, m in enumerate(channel_mult)]  # resolution, width
        if self.edm2:
            Block, dim, width = EDM2Block, channels * max(channel_mult), levels[0][1]
            self.embedding = EDM2Embedding(dim, channels, classes, sigma_d, emb, emb_scale, c_noise, guidance)
        else:
            if guidance or double_norm or emb == "fourier":
                fail("--arch ddpmpp needs --double_norm false, --emb positional, and no --guidance_max")
            Block, dim, width = DDPMppBlock, 4 * channels, channels
            self.embedding = DDPMppEmbedding(channels, classes, sigma_d, emb_scale, c_noise)
        self.head = WeightHead(sigma_d) if head else None
        self.enc = nn.ModuleDict()
        self.dec = nn.ModuleDict()
        skips = [width]

        def add(part, name, cin, cout, attend=False):
            kind = name if name in ("down", "up") else ""
            rate = dropout if res <= (dropout_res or res) else 0.0
            part[f"{res}x{res}_{name}"] = Block(
                cin, cout, dim, part is self.enc, attend, kind, rate, double_norm, norm_shift)

        for level, (res, cout) in enumerate(levels):
            if level:
                add(self.enc, "down", width, width)
                skips.append(width)
            else:  # EDM2's input has a further channel of ones, in place of biases
                self.enc[f"{res}x{res}_conv"] = (MPConv(shape[0] + 1, width, 3) if self.edm2 else
                                                 Conv2d(shape[0], width, 3, padding=1))
            for i in range(blocks):
                add(self.enc, f"block{i}", width, cout, res in attention)
                width = cout
                skips.append(width)
        for level, (res, cout) in reversed(list(enumerate(levels))):
            if level == len(levels) - 1:
                add(self.dec, "in0", width, width, True)
                add(self.dec, "in1", width, width)
            else:
                add(self.dec, "up", width, width)
            for i in range(blocks + 1):
                attend = res in attention and (self.edm2 or i == blocks)
                add(self.dec, f"block{i}", width + skips.pop(), cout, attend)
                width = cout
        if self.edm2:
            self.out_conv, self.out_gain = MPConv(width, shape[0], 3), nn.Parameter(torch.zeros([]))
        else:
            self.out_norm, self.out_conv = GroupNorm(width), Conv2d(width, shape[0], 3, padding=1)
            init_ddpmpp(self)

    def run(self, block, x, emb):
        """With --checkpointing, the backward pass computes the inside of a block once more."""
        if self.checkpointing and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(block, x, emb, use_reentrant=False)
        return block(x, emb)

    def forward(self, x, t, y=None, guidance=None, return_w=False):
        emb = self.embedding(t, y, guidance)
        x = x.to(self.dtype or emb.dtype)
        if self.edm2:
            x = x.to(memory_format=torch.channels_last)
            x = affine(lambda x: tnf.pad(x, (0, 0, 0, 0, 0, 1), value=1.0),
                       lambda v: tnf.pad(v, (0, 0, 0, 0, 0, 1)), x)
        skips = []
        for name, block in self.enc.items():
            x = block(x) if name.endswith("conv") else self.run(block, x, emb)
            skips.append(x)
        for name, block in self.dec.items():
            if "block" in name:
                x = mp_cat(x, skips.pop()) if self.edm2 else torch.cat([x, skips.pop()], dim=1)
            x = self.run(block, x, emb)
        x = self.out_conv(x, self.out_gain) if self.edm2 else self.out_conv(silu(self.out_norm(x)))
        F = -x.to(emb.dtype)  # EDM's F has the other sign
        return (F, self.head(t) if self.head else F.new_zeros(len(t))) if return_w else F


def init_ddpmpp(net):
    """EDM's initial weights: uniform, and close to zero where a residual branch ends."""
    small = dict(conv1=1e-5, proj=1e-5, out_conv=1e-5, qkv=0.2**0.5)
    for name, layer in net.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight, small.get(name.split(".")[-1], 1))
            nn.init.zeros_(layer.bias)


def build(options, seed=0):
    """The network from its constructor's arguments; its weights depend on the seed alone."""
    kind = TextToImage if "pretrained" in options else MLP if len(options["shape"]) == 1 else UNet
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = kind(**options)
    net.options = options
    return net


def network(cfg, data, device="cpu", **options):
    """The network for this config and dataset, started from --init or --teacher where that is a run. Further
    options go to its constructor; all of them stay with it as net.options. A text-to-image pipeline is the
    teacher with adapters."""
    if cfg.dataset == "text":
        net = data.teacher.sibling(adapted=True).train()
        if cfg.init not in ("", "none"):
            with reading(f"--init {cfg.init} has other adapters"):
                net.load_state_dict(read_checkpoint(cfg.init)["ema"])
        return net
    options = dict(shape=data.shape, classes=data.classes if cfg.conditional else 0, dropout=cfg.dropout,
                   dropout_res=cfg.dropout_res, dtype=cfg.dtype, **{k: getattr(cfg, k) for k in NET_FIELDS},
                   **options)
    net = build(options, cfg.seed)
    net.checkpointing = cfg.checkpointing
    if init_path(vars(cfg)):
        load_init(net, cfg, data)
    return net.to(device)


# ------------------------------------------------------------------------------------------------- 4. data

class Draw:
    """Random numbers as a function of (seed, step, position in the global batch).

    Positions lo..hi come from blocks of 64, each with a generator of its own. So a resumed run, another
    number of processes and another size of micro-batch all see the numbers that one unbroken process would
    see. Dropout masks alone depend on the micro-batch as a whole."""
    BLOCK = 64

    def __init__(self, seed, step, lo, hi, device="cpu"):
        first, last = lo // self.BLOCK, (hi - 1) // self.BLOCK
        self.rows = slice(lo - first * self.BLOCK, hi - first * self.BLOCK)
        self.device = device
        self.dropout_seed = self._mix(seed, step, lo, 1)
        self.generators = [torch.Generator(device).manual_seed(self._mix(seed, step, block, 0))
                           for block in range(first, last + 1)]

    @staticmethod
    def _mix(*numbers):
        return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)

    def _draw(self, function, *shape, **kw):
        rows = [function(*shape, generator=g, device=self.device, **kw) for g in self.generators]
        return torch.cat(rows)[self.rows]

    def normal(self, *shape, dtype=torch.float32):
        """Standard normal, (B, *shape)."""
        return self._draw(torch.randn, self.BLOCK, *shape, dtype=dtype)

    def uniform(self):
        """Uniform on [0, 1), (B,) float64."""
        return self._draw(torch.rand, self.BLOCK, dtype=torch.float64)

    def index(self, high):
        """Integers from 0 to high - 1, (B,) int64."""
        return self._draw(torch.randint, high, (self.BLOCK,))

    def labels(self, y, cfg):
        """The labels as cfg wants them: None unless conditional; each becomes -1 with rate label_dropout."""
        return torch.where(self.uniform() < cfg.label_dropout, -1, y) if cfg.conditional else None

    def same_dropout(self):
        """Call this before each pass that must use the same dropout masks."""
        torch.manual_seed(self.dropout_seed)


def dataset(cfg, device="cpu"):
    """The dataset that cfg names: an object with shape, classes and batch(gen)."""
    if cfg.dataset in MIXTURES:
        return MIXTURES[cfg.dataset](cfg).to(device)
    if cfg.dataset == "text":
        return Captions(cfg, device)
    if cfg.dataset == "imagenet512":
        return Stored(cfg, *latents(cfg, device))
    kinds = dict(shapes=draw_shapes, cifar10=cifar10)
    return Stored(cfg, *kinds.get(cfg.dataset, image_folder)(cfg))


class Mixture(nn.Module):
    """Gaussians around given means (K, D). The class of a point is its component.

    As a module it is its own exact teacher: F = E[cos(t) z - sin(t) x_0 | x_t] / sigma_d in closed form."""

    def __init__(self, cfg, mean, std):
        super().__init__()
        self.cfg, self.sigma_d, self.std = cfg, cfg.sigma_d, std  # std is that of a component
        self.shape, self.classes = tuple(mean.shape[1:]), len(mean)
        self.register_buffer("mean", mean)

    def batch(self, gen):
        """x0 (B, D) float32, and y (B,) int64 or, unless cfg.conditional, None."""
        y = gen.index(self.classes)
        return self.mean[y].float() + self.std * gen.normal(*self.shape), gen.labels(y, self.cfg)

    def members(self, c, device):
        """Points of class c, or of all for -1, out of 4,096 that are the same at every call. They stand for
        the training set that a mixture does not have."""
        x, y = self.batch(Draw(self.cfg.seed, 2**33, 0, 4096, device))
        yield x if c < 0 else x[y == c]

    def forward(self, x, t, y=None, guidance=None):
        cos, sin = t.to(x.dtype).cos()[:, None], t.to(x.dtype).sin()[:, None]
        x_t, mean = x * self.sigma_d, self.mean.to(x.dtype)
        variance = (cos * self.std) ** 2 + (sin * self.sigma_d) ** 2  # of x_t within a component, (B, 1)
        logits = (cos * x_t @ mean.T - cos**2 * mean.square().sum(1) / 2) / variance  # (B, K), shifted
        if y is not None:                                             # y = -1 keeps all components
            other = torch.arange(self.classes, device=x.device) != y[:, None]
            logits = logits.masked_fill(other & (y >= 0)[:, None], -math.inf)
        mean = logits.softmax(1) @ mean                               # E[mean of the component | x_t], (B, D)
        x_0 = mean + cos * self.std**2 / variance * (x_t - cos * mean)
        z = sin * self.sigma_d**2 / variance * (x_t - cos * mean)
        return (cos * z - sin * x_0) / self.sigma_d


def ring(cfg):
    """gmm: eight Gaussians on a ring in 2-D, such that each coordinate has standard deviation sigma_d."""
    angle, std = torch.arange(8, dtype=torch.float64) * math.pi / 4, 0.1 * cfg.sigma_d
    radius = math.sqrt(2 * (cfg.sigma_d**2 - std**2))
    return Mixture(cfg, radius * torch.stack([angle.cos(), angle.sin()], dim=1), std)


def pair(cfg):
    """gmm1d: two Gaussians in 1-D, with standard deviation sigma_d in all."""
    std = 0.2 * cfg.sigma_d
    return Mixture(cfg, math.sqrt(cfg.sigma_d**2 - std**2) * torch.tensor([[-1.0], [1.0]]).double(), std)


def cloud(cfg):
    """gmm64: 16 Gaussians in 64-D, whose means were drawn once. The coordinates' RMS deviation is sigma_d."""
    std, mean = 0.3 * cfg.sigma_d, Draw(0, 0, 0, 16).normal(64, dtype=torch.float64)
    mean = mean - mean.mean(0)
    return Mixture(cfg, math.sqrt(cfg.sigma_d**2 - std**2) * mean / mean.square().mean().sqrt(), std)


MIXTURES = {"gmm": ring, "gmm1d": pair, "gmm64": cloud}


class Stored:
    """Images as rows of one array, in memory or memory-mapped, each with a label.

    Rows are uint8 pixels (N, 3, H, W), with x0 = pixels / 127.5 - 1. For imagenet512 they are an
    autoencoder's mean and standard deviation of a latent (N, 8, h, w). There x0 (4, h, w) is drawn anew from
    N(mean, std^2) each time, and normalized to standard deviation sigma_d."""

    def __init__(self, cfg, rows, labels):
        self.cfg = cfg
        self.rows = rows
        self.latent = cfg.dataset == "imagenet512"
        self.labels = torch.as_tensor(np.array(labels), dtype=torch.int64)
        self.classes = int(self.labels.max()) + 1
        self.shape = (rows.shape[1] // 2 if self.latent else rows.shape[1], *rows.shape[2:])
        if rows.shape[1] != (8 if self.latent else 3):
            fail(f"--data {cfg.data}: rows of shape {tuple(rows.shape[1:])} are neither pixels nor latents")
        halvings = len(cfg.channel_mult) - 1
        if self.shape[1] % 2**halvings:
            fail(f"images of {self.shape[1]} pixels cannot be halved {halvings} times (--channel_mult): "
                 f"--image_size must be a multiple of {2**halvings}")
        if cfg.flip and self.latent:
            fail("--flip is for pixels: the latent of a mirrored image is not the mirrored latent")
        if cfg.conditional and self.classes < 2:
            fail(f"--conditional needs labels, and {cfg.data or cfg.dataset} has none")

    def batch(self, gen):
        """x0 (B, C, H, W) float32, and y (B,) int64 or, unless cfg.conditional, None."""
        index = gen.index(len(self.rows)).cpu()
        x0 = self.x0(index.numpy(), gen.device, gen)
        if self.cfg.flip:
            x0 = torch.where((gen.uniform() < 0.5).view(-1, 1, 1, 1), x0.flip(3), x0)
        return x0, gen.labels(self.labels[index].to(gen.device), self.cfg)

    @functools.cached_property
    def by_class(self):
        """Row numbers, sorted by class, and where each class begins among them."""
        order = torch.argsort(self.labels, stable=True)
        return order.numpy(), torch.searchsorted(self.labels[order], torch.arange(self.classes + 1)).tolist()

    @functools.cached_property
    def converted(self):
        """x0 of all rows, sorted by class, if they take less than 2 GiB; else None."""
        return self.x0(self.by_class[0], "cpu") if 4 * math.prod(self.rows.shape) < 2**31 else None

    def members(self, c, device, size=4096, limit=0, seed=0):
        """x0 of class c, or of all classes for -1, `size` images at a time; of a latent, its mean. With a
        limit, so many neighbours on disk from a place that depends on `seed`."""
        order, begins = self.by_class
        lo, hi = (0, len(order)) if c < 0 else begins[c:c + 2]
        if limit and limit < hi - lo:
            start = np.random.default_rng(seed).integers(hi - lo)
            yield self.x0(order[lo + (start + np.arange(limit)) % (hi - lo)], device)
            return
        for first in range(lo, hi, size):
            part = slice(first, min(first + size, hi))
            yield self.x0(order[part], device) if self.converted is None else self.converted[part].to(device)

    def x0(self, index, device, gen=None):
        rows = torch.from_numpy(np.array(self.rows[index]))
        if torch.device(device).type == "cuda":  # from pinned memory the host need not wait for the copy
            rows = rows.pin_memory()
        rows = rows.to(device, non_blocking=True).float()
        if not self.latent:
            return rows / 127.5 - 1
        mean, std = rows.chunk(2, dim=1)
        _, shift, scale = latent_space(self.cfg, device)
        return (mean + (std * gen.normal(*self.shape) if gen else 0) - shift) * (self.cfg.sigma_d / scale)

    def to_pixels(self, x):
        return to_pixels(x, self.cfg)


LATENT_SPACES = dict(  # mean and standard deviation by channel
    scm=((1.56, -0.695, 0.483, 0.729), (5.27, 5.91, 4.21, 4.31)),  # sCM, App. G
    edm2=((5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)))


def latent_space(cfg, device):
    """The name of the latents' normalization, EDM2's for its zip and sCM's otherwise, and its mean and
    standard deviation, (4, 1, 1)."""
    name = "edm2" if str(cfg.data).endswith(".zip") else "scm"
    return name, *(torch.tensor(moment, device=device).view(4, 1, 1) for moment in LATENT_SPACES[name])


def autoencoder(cfg, device):
    """The one of --vae, else of the pipeline, else of imagenet512."""
    part = "vae" if cfg.pretrained and not cfg.vae else ""
    return load_autoencoder(cfg.vae or cfg.pretrained or "stabilityai/sd-vae-ft-mse", part, device)


@functools.cache
def load_autoencoder(path, part, device):
    from diffusers import AutoencoderKL
    with reading(f"no autoencoder at {path}: give one with --vae, such as the folder of "
                 "https://huggingface.co/stabilityai/sd-vae-ft-mse for imagenet512"):
        return AutoencoderKL.from_pretrained(path, subfolder=part).to(device).requires_grad_(False)


def to_uint8(x):
    """Pixels (B, 3, H, W) in [-1, 1] -> uint8, rounded."""
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def to_pixels(x, cfg):
    """x0 (B, C, h, w) -> pixels (B, 3, H, W) uint8. Latents are decoded one by one.

    EDM2's latents come from pixels in [0, 1], and its decoder cuts off what is behind the point. So must
    whatever is compared with its statistics."""
    if cfg.dataset not in ("imagenet512", "text"):
        return to_uint8(x)
    vae = autoencoder(cfg, x.device)
    text = "text", 0, 1 / vae.config.get("scaling_factor", 1)
    name, shift, scale = text if cfg.dataset == "text" else latent_space(cfg, x.device)
    z = x.float() * (scale / cfg.sigma_d) + shift
    pixels = torch.cat([vae.decode(one[None]).sample for one in z])
    return (pixels * 255).clamp(0, 255).to(torch.uint8) if name == "edm2" else to_uint8(pixels)


def draw_shapes(cfg, count=8000):
    """A disc, triangle, square or pentagon, warm or cold (8 classes), drawn by Pillow at 4x and reduced."""
    size = cfg.image_size or 16
    rng = np.random.default_rng(0)
    images, labels = np.empty((count, 3, size, size), np.uint8), rng.integers(8, size=count)
    for i, label in enumerate(labels):
        x, y, r = np.array([*rng.uniform(0.35, 0.65, 2), rng.uniform(0.15, 0.3)]) * 4 * size
        hue = rng.integers(0, 35) if label < 4 else rng.integers(120, 180)
        picture = Image.new("HSV", (4 * size, 4 * size), (0, 0, int(rng.integers(15, 60))))
        pen, ink = ImageDraw.Draw(picture), (int(hue), 220, int(rng.integers(160, 256)))
        if label % 4 == 0:
            pen.ellipse((x - r, y - r, x + r, y + r), fill=ink)
        else:
            pen.regular_polygon((x, y, r), n_sides=int(label % 4) + 2, fill=ink)
        images[i] = np.asarray(picture.convert("RGB").resize((size, size), Image.BOX)).transpose(2, 0, 1)
    return images, labels


def image_folder(cfg):
    """--data, or data/DATASET: class folders or a zip of images, kept as pixels in data/cache."""
    usual = Path("data", cfg.dataset)
    root = Path(cfg.data or (usual if usual.exists() else usual.with_suffix(".zip")))
    if not cfg.data and not root.exists():
        fail(f"--dataset {cfg.dataset} needs --data PATH: class folders, or a zip")
    names, labels, read = list_images(root)
    with reading(f"--data {root}"):
        files = [(n, (root / n if root.is_dir() else root).stat().st_mtime_ns) for n in names]
    key = hashlib.sha1(repr((str(root.resolve()), files, cfg.image_size)).encode()).hexdigest()[:16]
    side = cfg.image_size or decode(names[0], read, 0).shape[1]

    def encode(part):
        images = [decode(name, read, cfg.image_size) for name in part]
        for name, image in zip(part, images):
            if image.shape != (3, side, side):
                fail(f"{name} is not {side} x {side} pixels: give --image_size to crop and resize")
        return np.stack(images)
    folder = Path("data/cache", f"{root.stem[:40]}-{cfg.image_size}-{key}")
    return open_store(folder, lambda: (names, labels, encode))


def cifar10(cfg):
    """CIFAR-10's training images: --data or data/cifar10, class folders or the official binary archive, which
    is downloaded if there is neither."""
    url, md5 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
    usual = Path("data/cifar10")
    path = Path(cfg.data or (usual if usual.exists() else "data/cifar-10-binary.tar.gz"))
    if cfg.image_size not in (0, 32):
        fail("--dataset cifar10 is 32 x 32 pixels; for other sizes unpack it and use --dataset folder")
    if path.is_dir():
        return image_folder(argparse.Namespace(**vars(cfg) | dict(data=str(path))))
    if not cfg.data:
        download(url, path, md5)

    def prepare():
        with reading(f"{path} is not cifar-10-binary.tar.gz"), tarfile.open(path) as archive:
            files = sorted(n for n in archive.getnames() if re.search(r"data_batch_\d\.bin$", n))
            rows = np.concatenate([np.frombuffer(archive.extractfile(n).read(), np.uint8) for n in files])
            rows = rows.reshape(-1, 1 + 3 * 32 * 32)  # a label, then the planes of R, G and B
            assert rows[:, 0].max() < 10, "labels above 9"
        return np.arange(len(rows)), rows[:, 0], lambda part: rows[part, 1:].reshape(-1, 3, 32, 32)
    with reading(f"--data {path}"):
        key = hashlib.sha1(f"{path.resolve()} {path.stat().st_mtime_ns}".encode()).hexdigest()[:16]
    return open_store(Path("data/cache", f"cifar10-{key}"), prepare)


def latents(cfg, device):
    """imagenet512: latents from --data, which is a folder that holds them, EDM2's zip of them (read in
    place), or images in class folders. Images are encoded once, into data/imagenet512."""
    root = Path(cfg.data or "data/imagenet512")
    folder = Path("data/imagenet512")
    if RANK == 0:
        autoencoder(cfg, torch.device("cpu"))  # pictures need it: better missed now than at the end
    if root.suffix == ".zip":
        names, labels, read = list_images(root, (".npy",))
        return LatentZip(root, names, read), labels
    if (root / "about.json").exists():
        return open_store(root, lambda: fail(f"--data {root} lacks latents: give the images with --data"))
    if not cfg.data:
        fail("--dataset imagenet512: there are no latents in data/imagenet512; give the images with --data")
    names, labels, read = list_images(root)
    size = cfg.image_size or 512
    about = dict(vae=cfg.vae, image_size=size, sources=hashlib.sha1("\n".join(names).encode()).hexdigest())
    cfg.data = str(folder)  # what the run's config names from now on

    def prepare():
        vae = autoencoder(cfg, device)

        @torch.no_grad()
        def encode(part):
            x = np.stack([decode(name, read, size) for name in part])
            latent = vae.encode(torch.from_numpy(x).to(device).float() / 127.5 - 1).latent_dist
            return torch.cat([latent.mean, latent.std], dim=1).half().cpu().numpy()
        return names, labels, encode
    return open_store(folder, prepare, about, batch=16)


class LatentZip:
    """EDM2's zip of latents, float32 (8, h, w) .npy, as an array that is read in place."""

    def __init__(self, root, names, read):
        self.root, self.names, self.read = root, names, read
        self.shape = (len(names), *self[[0]].shape[1:])

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        with reading(f"--data {self.root}: not EDM2's latents, float32 (8, h, w) .npy"):
            files = [self.names[i] for i in np.arange(len(self.names))[index]]
            return np.stack([np.load(io.BytesIO(self.read(f)), allow_pickle=False) for f in files])


def open_store(folder, prepare, about=None, batch=256):
    """Rows, memory-mapped, and labels that are kept in `folder`. What is missing there is written first.

    prepare() -> (names, labels, encode), with encode(some names) -> their rows. All processes write, each
    every WORLD-th batch, and mark in done.npy what is written. So a killed writer goes on where it stopped,
    with any number of processes. A folder that was made from something else than `about` is refused."""
    paths = {name: folder / f"{name}.npy" for name in ("rows", "done", "labels")}

    def load(mode="r"):
        """Rows, what is done of them, and labels; None if they are not there, or damaged and to be made
        anew."""
        if not (folder / "about.json").exists():
            return None
        with reading(f"{folder}/about.json is damaged: delete {folder}"):
            before = json.loads((folder / "about.json").read_text())
        if about and before != about:
            fail(f"{folder} was made from other images, --vae or --image_size: move it away first")
        with contextlib.suppress(OSError, ValueError):
            rows, done = (np.load(paths[name], mmap_mode=mode) for name in ("rows", "done"))
            labels = np.load(paths["labels"])
            whole = rows.ndim == 4 and len(rows) == len(done) == len(labels) > 0
            return (rows, done, labels) if whole and labels.dtype.kind in "iu" and labels.min() >= 0 else None

    found = load()
    barrier()  # no process writes before all have looked
    if found and found[1].all():
        return found[0], found[2]
    names, labels, encode = prepare()
    with lock_folder(folder, wait=True) if RANK == 0 else contextlib.nullcontext():
        if RANK == 0 and not load():
            first = encode(names[:1])
            with writing(folder):
                for name, dtype, shape in (("rows", first.dtype, first.shape[1:]), ("done", np.uint8, ())):
                    np.lib.format.open_memmap(paths[name], "w+", dtype, (len(names), *shape)).flush()
                    with open(paths[name], "r+b") as file:  # a full disk would kill a memory map later
                        getattr(os, "posix_fallocate", lambda *_: None)(file.fileno(), 0, file.seek(0, 2))
            atomic_write(paths["labels"], lambda file: np.save(file, np.asarray(labels, np.int64)))
            atomic_write(folder / "about.json", lambda file: file.write(json.dumps(about).encode()))
        barrier()
        rows, done, labels = load("r+")
        todo = tqdm(range(RANK * batch, len(names), WORLD * batch), desc=f"write {folder.name}", unit="batch",
                    disable=None if RANK == 0 else True)
        for part in (slice(lo, lo + batch) for lo in todo):
            if not done[part].all():
                rows[part] = encode(names[part])
                rows.flush()  # before it counts as done
                done[part] = 1
                done.flush()
        barrier()
    return load()[::2]


def list_images(root, suffixes=(".png", ".jpg", ".jpeg", ".bmp", ".webp")):
    """Names, labels and read(name) -> bytes of the images in class folders, or in EDM's zip with
    dataset.json."""
    with reading(f"--data {root}"):
        names = sorted(n for n in walk(root) if n.lower().endswith(suffixes)) if root.is_dir() else None
    if names is not None:
        tops = [Path(n).parts[0] if len(Path(n).parts) > 1 else "" for n in names]
        classes = sorted(set(tops))
        if "" in classes and len(classes) > 1:
            fail(f"--data {root}: images in class folders and beside them, such as {names[tops.index('')]}")
        labels = [classes.index(top) for top in tops]

        def read(name):
            return (root / name).read_bytes()
    else:
        with reading(f"--data {root}: neither a folder nor a zip file"):
            archive = zipfile.ZipFile(root)
        names = sorted(n for n in archive.namelist() if n.lower().endswith(suffixes))
        read = archive.read
        with reading(f"--data {root}: its dataset.json does not give every image a whole number"):
            table = json.loads(read("dataset.json")) if "dataset.json" in archive.namelist() else {}
            table = dict(table.get("labels") or {})
            labels = [table[n] if table else 0 for n in names]
            assert all(type(v) is int and 0 <= v < len(names) for v in labels), labels[:9]
    if not names:
        fail(f"--data {root}: no images ({', '.join(suffixes)}) in it")
    return names, np.array(labels), read


def walk(root):
    """Names of the files below root, also through symbolic links to folders, but never back to one above."""
    def stop(error):
        raise error
    for folder, folders, files in os.walk(root, onerror=stop, followlinks=True):
        above = os.path.realpath(os.path.dirname(os.path.abspath(folder))) + os.sep
        if above.startswith(os.path.realpath(folder) + os.sep):
            folders.clear()
        else:
            yield from (os.path.relpath(os.path.join(folder, file), root) for file in files)


def decode(name, read, size):
    """The image as uint8 (3, H, W), cropped and resized to size pixels, or as it is if size is 0."""
    with reading(f"cannot read the image {name}"):
        image = Image.open(io.BytesIO(read(name)))
        assert image.mode[0] not in "IF", f"{image.mode} pixels, only 8-bit images are read"
        image = image.convert("RGB")
    return np.asarray(centre_crop(image, size) if size else image).transpose(2, 0, 1)


def centre_crop(image, size):
    """ADM's crop: halve while the image is twice too large, resize its shorter side, cut out the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def download(url, path, md5=""):
    """Fetch url into path, unless it is there, and check it. All processes call this; rank 0 does it."""
    if RANK == 0 and not Path(path).exists():
        with reading(f"cannot download {url}: fetch it yourself and put it at {path}"):
            with urllib.request.urlopen(url, timeout=60) as response:
                blob = response.read()
        if md5 and hashlib.md5(blob).hexdigest() != md5:
            fail(f"{url} arrived damaged (its MD5 is not {md5}): try again")
        atomic_write(path, lambda file: file.write(blob))
    barrier()


# ----------------------------------------------------------------------------------------------- 5. config

@dataclasses.dataclass
class Config:
    """The flags that all scripts share. Each script adds `mode` and the fields of its method."""
    dataset: str = "gmm"  # gmm (points in 2-D), shapes (drawn), folder (see --data), or another preset
    size: str = ""  # another size of the preset's network, such as M; "" is its own
    data: str = ""  # class folders or a zip of images; cifar10: its archive; imagenet512: images or latents
    vae: str = ""  # autoencoder of latents, a folder or hub id; "" is the dataset's own
    pretrained: str = ""  # text to image: folder or hub id of diffusers' pipeline; --data has captions, too
    lora_rank: int = 64  # text to image: rank of the adapters that are trained, and their alpha
    first_label: int = 0  # text to image: label of the first noise level; 1 in Direct CM's code
    prompt: str = ""  # text to image: what to --sample
    out: str = ""  # the run's folder; "" is out/SCRIPT on the toy, otherwise out/SCRIPT-DATASET-MODE
    image_size: int = 0  # crop and resize images to this many pixels; 0 leaves them as they are
    flip: bool = False  # mirror half of the training images, at random
    conditional: bool = False  # train a class-conditional network
    label_dropout: float = 0.0  # how often a label is dropped in training, for guidance; 0 is off
    teacher: str = ""  # a run's folder, a checkpoint, or exact (gmm); "" is out/SCRIPT-DATASET-diffusion
    init: str = ""  # the run to start from; "" is the teacher, or where it would be; none is random weights
    steps: int = 4000  # optimizer steps
    batch: int = 256  # samples a step, over all processes
    micro: int = 0  # samples that a process takes at once, accumulating gradients; 0 is all that fit on a GPU
    optimizer: Literal["adam", "adamw", "radam"] = "adam"  # adamw has weight decay 0.01
    lr: float = 1e-3  # highest learning rate
    lr_warmup: int = 0  # steps in which the learning rate rises linearly; 0 is off
    lr_ref: int = 0  # steps after which the learning rate falls with their inverse square root; 0 is off
    lr_cooldown: float = 0.0  # last share of the steps, in which it falls linearly to 0; 0 is off
    beta2: float = 0.99  # Adam's decay of the second moment; that of the first is 0.9
    eps: float = 1e-8  # Adam's epsilon
    clip: float = 0.0  # largest norm of the gradient; 0 is off
    dropout: float = 0.0  # dropout rate of the U-Net
    dropout_res: int = 0  # dropout acts only in layers of at most so many pixels a side; 0 is all layers
    ema_sigma_rel: float = 0.05  # width of the power-function EMA, relative to training; 0 uses ema_halflife
    ema_halflife: float = 5e5  # half-life of the EMA in samples; 0 too is no EMA
    arch: Literal["edm2", "ddpmpp"] = "edm2"  # blocks of the U-Net: EDM2's, or those of EDM's CIFAR-10 runs
    channels: int = 64  # channels of the first level; for points, of all layers
    channel_mult: tuple = (1, 2)  # channels of each level over --channels; each level halves the image
    blocks: int = 2  # residual blocks a level; for points, in all
    attention: tuple = (8,)  # resolutions with self-attention
    emb: Literal["positional", "fourier"] = "positional"  # embedding of the time
    emb_scale: float = 1.0  # highest frequency (positional) or bandwidth (fourier) of that embedding
    c_noise: Literal["t", "log"] = "t"  # what is embedded: t itself, or log(sigma) / 4 as in EDM
    double_norm: bool = True  # adaptive double normalization (sCM); false is EDM2's modulation
    norm_shift: bool = True  # double normalization scales and shifts; false only scales
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # precision of the U-Net's torso
    checkpointing: bool = False  # store no activations within blocks: less memory, a third more time
    compile: bool = False  # apply torch.compile to the passes that have no JVP
    sigma_d: float = 0.5  # standard deviation of the data
    seed: int = 0  # of weights, data, times and noise
    log_every: int = 100  # steps between lines of log.jsonl
    save_every: int = 1000  # steps between checkpoints
    sample_every: int = 10**9  # steps between sample pictures while training
    resume: bool = False  # go on from the last checkpoint in --out
    overwrite: bool = False  # replace the run in --out
    dry_run: bool = False  # check data and teacher, print size, memory and cost, and train nothing
    sample: int = 0  # draw this many samples from the run in --out, instead of training
    nfe: int = 1  # network evaluations a sample
    label: int = -1  # class to sample; -1 takes all in turn
    save: str = ""  # where samples go, a .png or an .npz; "" is samples.png in --out

    def needs_steps(self):
        """Whether a schedule depends on the number of steps, so that --resume cannot change it."""
        return self.lr_cooldown > 0

    def distills(self):
        """Whether the mode needs a teacher; the others may start from one."""
        return False


EDM2_NET = dict(channels=192, channel_mult=(1, 2, 3, 4), blocks=3, attention=(16, 8), c_noise="log",
                double_norm=False)
# The learning rate rises over 10 million images. In cm.py and sct.py, the loss's weight is learned.
EDM2_RECIPE = dict(batch=2048, optimizer="adam", beta2=0.99, lr_warmup=4883, dtype="fp16", uncertainty=True)
PRESETS = {  # what belongs to a dataset, whatever the method: its toy defaults, its network, its teachers
    "gmm": dict(teacher="exact", lr=2e-3, lr_cooldown=0.7, channels=128, blocks=4),
    "shapes": dict(image_size=16, conditional=True, channels=32, blocks=1, steps=1000, batch=64, lr=2e-3,
                   lr_cooldown=0.5),
    ("shapes", "diffusion"): dict(steps=2000, lr=1e-2, lr_warmup=100, P_mean=-1.2, P_std=1.2),
    "folder": dict(conditional=True, steps=500, batch=128, lr=2e-3, lr_cooldown=0.5, channels=32, blocks=1),
    ("folder", "diffusion"): dict(steps=3000, lr=1e-2, lr_warmup=100, P_mean=-1.2, P_std=1.2,
                                  label_dropout=0.1),
    # EDM's CIFAR-10 recipe.
    # DEPARTS: EDM augments (p = 0.12, nine labels); here --flip at most, as the students are not augmented
    "cifar10": dict(arch="ddpmpp", double_norm=False, channels=128, channel_mult=(2, 2, 2), blocks=4,
                    attention=(16,), optimizer="radam", ema_sigma_rel=0.0, save_every=2500),
    ("cifar10", "diffusion"): dict(batch=512, steps=400_000, lr=1e-3, lr_warmup=19_531, optimizer="adam",
                                   beta2=0.999, ema_halflife=5e5, dropout=0.13, P_mean=-1.2, P_std=1.2),
    "text": dict(conditional=True, image_size=1024, sigma_d=1.0, optimizer="adamw", beta2=0.999),
    "imagenet64": dict(EDM2_NET, image_size=64, conditional=True, batch=2048, save_every=2500),
    ("imagenet64", "diffusion"): dict(EDM2_RECIPE, lr_ref=35_000, P_mean=-0.8, P_std=1.6),
    "imagenet512": dict(EDM2_NET, conditional=True, batch=2048),
    ("imagenet512", "diffusion"): dict(EDM2_RECIPE, lr_ref=70_000, P_mean=-0.4, P_std=1.0),
}
EDM2_TEACHERS = {  # by size: learning rate, dropout, width of the EMA, training in 2^20 images
    "imagenet64": dict(S=(1e-2, 0.0, 0.075, 1024), M=(9e-3, 0.1, 0.06, 2048), L=(8e-3, 0.1, 0.04, 1024),
                       XL=(7e-3, 0.1, 0.04, 640)),
    "imagenet512": dict(S=(1e-2, 0.0, 0.025, 2048), M=(9e-3, 0.1, 0.03, 2048), L=(8e-3, 0.1, 0.015, 1792),
                        XL=(7e-3, 0.1, 0.02, 1280), XXL=(6.5e-3, 0.1, 0.015, 896))}
for name, sizes in EDM2_TEACHERS.items():
    for size, (lr, rate, width, images) in sizes.items():
        PRESETS[name, size] = dict(channels=dict(S=192, M=256, L=320, XL=384, XXL=448)[size],
                                   checkpointing=size in ("XL", "XXL"))
        PRESETS[name, size, "diffusion"] = dict(lr=lr, dropout=rate, ema_sigma_rel=width,
                                                steps=images * 2**20 // 2048)
NET_FIELDS = ("arch", "channels", "channel_mult", "blocks", "attention", "emb", "emb_scale", "c_noise",
              "double_norm", "norm_shift", "sigma_d")  # arguments of the network's constructor
FROM_TEACHER = (*NET_FIELDS, "image_size", "conditional")  # what a student takes over
# What a run does not keep.
ONE_CALL = ("resume", "overwrite", "dry_run", "sample", "nfe", "label", "prompt", "save")
# What may differ from the stored run: with --resume, what cannot change the result (--micro changes dropout).
RESUMABLE = (*ONE_CALL, "out", "steps", "data", "log_every", "save_every", "sample_every", "micro", "compile",
             "checkpointing")
# What may not differ even with --sample and the like.
FIXED = ("dataset", "mode", "label_dropout", "phases", "student_steps", "pd_start", "pretrained", "lora_rank",
         "first_label", *FROM_TEACHER)
AT_LEAST_1 = ("steps", "batch", "nfe", "log_every", "save_every", "sample_every", "channels", "blocks",
              "intervals", "lora_rank", "patch", "intervals_start", "stage_steps", "phases", "student_steps",
              "pd_start")
AT_MOST = dict(dropout=0.99, label_dropout=1, lr_cooldown=1, ema_sigma_rel=0.28, beta2=0.99999,
               seed=2**63 - 1, mu=1)


def preset(presets, dataset, mode="", size=""):
    """The values of a preset. Later ones count: those of the dataset, its size, its mode, its size and mode,
    and for each of these what PRESETS says, then what the script says."""
    keys = (dataset, (dataset, size or "S"), (dataset, mode), (dataset, size or "S", mode))
    return {k: v for key in keys for table in (PRESETS, presets) for k, v in table.get(key, {}).items()}


def parse_args(Config, presets, modes, argv=None):
    """Command line -> Config. For each field the last of these counts: the default, the preset, the usual
    teacher, the network of --init or --teacher, the stored run (--resume, --sample), the flag."""
    script = Path(inspect.getfile(Config)).stem
    fields = {f.name: f for f in dataclasses.fields(Config)}
    flags, unknown = make_parser(Config, script, modes).parse_known_args(argv)
    flags = vars(flags)
    if unknown:
        fail(f"unknown argument {unknown[0]}; the flags are --{', --'.join(fields)}")
    if flags.get("pretrained"):
        flags["dataset"] = "text"
    name = flags.get("dataset", Config.dataset)
    names = name, flags.get("mode", preset(presets, name).get("mode", Config.mode))
    usual = f"out/{script}" if names == (Config.dataset, Config.mode) else f"out/{script}-{'-'.join(names)}"
    flags["out"] = flags.get("out") or usual
    stored = {}
    if any(flags.get(name) for name in ("resume", "sample", "edit", "search")):
        ckpt = read_checkpoint(flags["out"])
        if ckpt["script"] != script:
            fail(f"{flags['out']} was written by {ckpt['script']}.py: run that script with it")
        stored = {k: v for k, v in ckpt["config"].items() if k in fields and k not in ONE_CALL}
        for name, value in flags.items():
            free = name in RESUMABLE if flags.get("resume") else name not in FIXED
            if name == "steps" and make_config(Config, stored).needs_steps():
                free = False
            if not free and value != stored.get(name, value):
                fail(f"{flags['out']} was trained with --{name} {stored[name]}: it cannot become {value}")
    choice = {name: (stored | flags).get(name, fields[name].default) for name in ("dataset", "mode", "size")}
    sizes = {k[1]: 1 for k in presets if type(k) is tuple and k[0] == choice["dataset"] and k[1] not in modes}
    for name, valid in (("dataset", [d for d in presets if isinstance(d, str)]), ("mode", list(modes)),
                        ("size", ["", *sizes])):
        if choice[name] not in valid:
            known = ", ".join(filter(None, valid)) or "the default"
            fail(f"unknown {name} {choice[name]!r}; the {name}s are {known}")
    values = preset(presets, **choice)
    if not stored:
        values |= usual_teacher(script, make_config(Config, values | flags))
    source = init_path(values | flags)
    if source and not stored:
        values |= {k: v for k, v in read_checkpoint(source)["config"].items() if k in FROM_TEACHER}
    cfg = make_config(Config, values | stored | flags)
    check_ranges(cfg, fields)
    return cfg


def usual_teacher(script, cfg):
    """The teacher, or what a mode without one starts from, if no flag and no preset names it: the run in
    out/SCRIPT-DATASET-diffusion, or in another script's folder of that kind if there is just one."""
    name = "teacher" if cfg.distills() else "init"
    if cfg.mode == "diffusion" or cfg.teacher or name == "init" and cfg.init or cfg.dataset == "text":
        return {}
    runs = sorted(Path("out").glob(f"*-{cfg.dataset}-diffusion/ckpt.pt"))
    own = Path(f"out/{script}-{cfg.dataset}-diffusion/ckpt.pt")
    if own in runs or len(runs) == 1:
        found = (own if own in runs else runs[0]).parent
        if RANK == 0 and not cfg.dry_run:
            print(f"--{name} {found}, as none was given")
        return {name: str(found)}
    if name == "teacher":
        maker = "scm" if script == "direct_cm" else script
        data = "" if cfg.dataset in ("gmm", "shapes", "cifar10") else " --data PATH"
        fail(f"--mode {cfg.mode} distills a teacher, and there is none in {own.parent}: make it with "
             f"python {maker}.py --dataset {cfg.dataset} --mode diffusion{data}, or give --teacher RUN")
    return {}


def make_config(Config, values):
    """Config from those of the values that it knows. Ends the program if one has the wrong type, as it may
    have in a damaged checkpoint."""
    for field in dataclasses.fields(Config):
        kinds = (float, int) if field.type is float else field.type
        value = values.get(field.name, field.default)
        if not (value in get_args(kinds) if get_args(kinds) else isinstance(value, kinds)):
            fail(f"--{field.name} cannot be {value!r}")
    return Config(**{f.name: values[f.name] for f in dataclasses.fields(Config) if f.name in values})


def make_parser(Config, script, modes):
    """A parser with a flag for each field. Its help is the comment beside the field, the method's first."""
    parser = argparse.ArgumentParser(script + ".py", usage=argparse.SUPPRESS, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS,
                                     description="--mode is one of " + ", ".join(modes))
    parser.error = fail
    own = parser.add_argument_group(f"flags of {script}.py")
    groups = {own: Config, parser.add_argument_group("flags of all scripts"): Config.__base__}
    known = set()
    for group, owner in reversed(groups.items()):
        comment = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(owner), re.M))
        for field in dataclasses.fields(owner):
            if field.name in known:
                continue
            known.add(field.name)
            default = ",".join(map(str, field.default)) if field.type is tuple else field.default
            choices = get_args(field.type) or None
            reader = {bool: read_bool, tuple: read_numbers}.get(field.type, field.type)
            group.add_argument("--" + field.name, choices=choices, metavar=field.name.upper(),
                               help=f"{comment[field.name]} [{default}]".replace("%", "%%"),
                               type=str if choices else reader,
                               **(dict(nargs="?", const=True) if field.type is bool else {}))
    return parser


def read_bool(text):
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return text.lower() in ("true", "1", "yes")


def read_numbers(text):
    return tuple(int(part) if part.isdigit() else float(part) for part in text.split(",") if part)


def check_ranges(cfg, fields):
    """Ends the program on values that no run can use."""
    for name, field in fields.items():
        value = getattr(cfg, name)
        least = int(name in AT_LEAST_1)
        least = -math.inf if name in ("P_mean", "label") else least
        if field.type in (int, float) and not (math.isfinite(value) and least <= value):
            fail(f"--{name} must be a number, at least {least}, not {value}")
        if field.type is tuple and not all(math.isfinite(v) for v in value):
            fail(f"--{name} takes finite numbers, not {value}")
        if name in AT_MOST and value > AT_MOST[name]:
            fail(f"--{name} must be at most {AT_MOST[name]}, not {value}")
    if cfg.channels % 2:
        fail(f"--channels must be even, not {cfg.channels}")
    if not cfg.channel_mult or not all(type(m) is int and m > 0 for m in cfg.channel_mult):
        fail("--channel_mult takes whole numbers above 0, such as 1,2,2")
    if not cfg.sigma_d:
        fail("--sigma_d must be above 0")
    if cfg.flip and cfg.dataset in MIXTURES:
        fail("--flip mirrors images, and --dataset gmm has points")
    if cfg.batch % (WORLD * (cfg.micro or 1)):
        fail(f"--batch {cfg.batch} must be a multiple of processes x --micro, {WORLD} x {cfg.micro or 1}")
    if cfg.label >= 0 and not (cfg.sample or getattr(cfg, "edit", "")):
        fail("--label chooses what to --sample; training takes all classes")
    if cfg.resume and cfg.overwrite:
        fail("--resume goes on with the run in --out, --overwrite replaces it: give one of them")
    if cfg.save and Path(cfg.save).suffix not in (".png", ".npz"):
        fail(f"--save takes a .png or a .npz file, not {cfg.save}")


def init_path(values):
    """The run that the network starts from: --init, or a teacher that is a run; "" if there is neither."""
    path = values.get("init") or values.get("teacher") or ""
    return "" if path in ("none", "exact") or is_diffusers(path) else path


# -------------------------------------------------------------------------------------------------- 6. run

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


def fail(message):
    """End the program with one line on stderr and exit code 2, as every error does that a user can cause."""
    if RANK == 0 or dist.is_initialized():  # before there is a process group, all ranks find the same error
        tqdm.write(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def reading(what):
    """Whatever a decoder, a zip, numpy, torch or the file system raises inside ends in one line, `what`."""
    try:
        yield
    except Exception as error:
        fail(f"{what} ({type(error).__name__}: {str(error)[:120]})")


@contextlib.contextmanager
def writing(path):
    """The same for what a full disk, or a folder without permission, raises while something is written."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save has a RuntimeError of its own for a full disk
        full = shutil.disk_usage(Path(path).parent if Path(path).parent.exists() else ".").free < 2**20
        cause = "No space left on device" if full else str(error)
        fail(f"cannot write {path}: {cause}; what was there before is untouched")


def start_processes(backend=""):
    """Join the processes that torchrun has started; returns this one's device."""
    cuda, gpus = torch.cuda.is_available(), torch.cuda.device_count()
    if cuda and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > gpus:
        fail(f"every process needs a GPU, and there are {gpus}: lower --nproc_per_node")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
    if WORLD > 1 and not dist.is_initialized():
        hours = datetime.timedelta(hours=24)  # the others wait while rank 0 downloads a dataset
        dist.init_process_group(backend or ("nccl" if cuda else "gloo"), timeout=hours)
    return device


def barrier():
    if dist.is_initialized():
        dist.barrier()


def atomic_write(path, write):
    """write(file) to a temporary file, then move it into place: the old file stays until the new is whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_checkpoint(path):
    """The dict in a run folder's ckpt.pt, or in a file. Loads tensors and plain values only, never code."""
    path = Path(path)
    with reading(f"cannot read {path}"):
        path = path / "ckpt.pt" if path.is_dir() or not path.suffix else path
        if not path.exists():
            inside = [str(p.parent) for p in sorted(path.parent.glob("*/ckpt.pt"))]
            fail(f"no checkpoint at {path}" + (f"; there are runs in {', '.join(inside)}" if inside else ""))
    if path.suffix == ".pkl":
        return read_edm(path)
    with reading(f"{path} is truncated, or no checkpoint"):
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    kinds = dict(script=str, config=dict, options=dict, net=dict, ema=dict, step=int, seconds=float)
    if not isinstance(ckpt, dict) or not all(isinstance(ckpt.get(k), kind) for k, kind in kinds.items()):
        fail(f"{path} was not written by one of these scripts")
    return ckpt


def load_net(path, data=None):
    """The EMA network of a run, frozen, in eval mode. Ends the program if it does not fit the data. Of a
    text-to-image run, it knows the data's captions."""
    ckpt = read_checkpoint(path)
    options = ckpt["options"]
    with reading(f"{path} is damaged, or of another version: its weights do not fit its network"):
        if data and tuple(options["shape"]) != data.shape:
            fail(f"{path} is a network for shape {tuple(options['shape'])}; this data has {data.shape}")
        if data and options["classes"] not in (0, data.classes) and "pretrained" not in options:
            fail(f"{path} is a network for {options['classes']} classes; this data has {data.classes}")
        net = build(options)
        net.load_state_dict(ckpt["ema"])
        if data and "pretrained" in options:
            net.text, net.options["classes"] = data.teacher.text, data.classes
        if "weak" in ckpt:  # for sct.py's guidance; the tuple keeps it out of net's own modules
            net.weak = (build(options).eval().requires_grad_(False),)
            net.weak[0].load_state_dict(ckpt["weak"])
    return net.eval().requires_grad_(False)


def load_teacher(cfg, data, device):
    """--teacher: exact (for mixtures), a run, a checkpoint, EDM's snapshot, a UNet2DModel; None if there is
    none. Of --dataset text, it is the pipeline."""
    if cfg.teacher == "exact" and not isinstance(data, Mixture):
        fail(f"--teacher exact knows only --dataset gmm, not {cfg.dataset}: give a run folder")
    if cfg.dataset == "text":
        return data.teacher
    if cfg.teacher in ("", "exact"):
        return data if cfg.teacher else None
    if not is_diffusers(cfg.teacher):
        return load_net(cfg.teacher, data).to(device)
    teacher = Diffusers(cfg.teacher, cfg.sigma_d).eval().requires_grad_(False).to(device)
    if teacher.options["shape"] != data.shape:
        fail(f"{cfg.teacher} is for {teacher.options['shape']}; this data has {data.shape}")
    return teacher


def load_init(net, cfg, data):
    """Start net from the EMA of --init or --teacher. The weighting head belongs to the loss and starts anew.
    So does guidance if the source knows none, and an embedding or a modulation whose form has changed."""
    path = init_path(vars(cfg))
    source = load_net(path, data)
    state, old = net.state_dict(), source.state_dict()
    names = {k for k in state.keys() | old.keys() if not k.startswith("head.")}
    anew = {k for k in names if ".guidance" in k and k not in old}
    for options, parts in ((("emb", "emb_scale", "c_noise"), "emb_fourier|emb_noise|map_layer0"),
                           (("double_norm", "norm_shift"), "emb_linear|emb_gain|modulate")):
        if any(source.options.get(k) not in (None, net.options.get(k)) for k in options):
            anew |= {k for k in names if re.search(parts, k)}
    for k in sorted(names - anew):
        if k not in state or k not in old or state[k].shape != old[k].shape:
            fail(f"{path} has another architecture than the flags ask for (at {k})")
    net.load_state_dict(state | {k: old[k] for k in names - anew})


def dry_run(cfg):
    """--dry_run: open and check data and teacher, and build the network without memory (on the device meta).
    Prints its parameters, the FLOPs of a forward pass, and an estimate of the memory that a process needs."""
    if cfg.dataset == "text":
        fail("--dry_run knows no text-to-image pipeline")
    start_processes()
    data = dataset(cfg)
    teacher = load_teacher(cfg, data, "cpu")
    with torch.device("meta"):
        options = network(dataclasses.replace(cfg, init="none"), data, "meta").options
    parameters, flops, fixed, sample = estimate(options, cfg.checkpointing)
    copies = 5 + (teacher is not None and not isinstance(teacher, Mixture))  # net, EMA, gradient, Adam's two
    weights = 4 * copies * parameters + fixed
    micro = cfg.micro or cfg.batch // WORLD
    if RANK:
        return
    print(f"data       {cfg.dataset}, {data.shape}, {data.classes} classes, sigma_d {cfg.sigma_d}")
    print(f"network    {parameters / 1e6:.1f} M parameters; {flops / 1e9:.3g} GFLOP for a "
          "sample's forward pass (backward twice that, JVP twice)")
    print(f"memory     {weights / 2**30:.2f} GiB for the weights in {copies} copies, and "
          f"{sample / 2**20:.1f} MiB a sample for its backward pass")
    print(f"a process  {(weights + micro * sample) / 2**30:.2f} GiB with {micro} samples at once; --micro or "
          "--checkpointing lower it")


def estimate(options, checkpointing):
    """Of the network with these options: parameters; FLOPs of a sample's forward pass; bytes held for the
    backward pass, those that do not grow with the batch (weights in other forms) and those of each sample."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"):
        net = build(options)
    net.checkpointing = checkpointing
    own, held = {p.untyped_storage()._cdata for p in net.parameters()}, []
    for n in (1, 2):
        x, t = torch.zeros(n, *options["shape"], device="meta"), torch.zeros(n, device="meta")
        y = torch.zeros(n, dtype=torch.int64, device="meta") if options.get("classes") else None
        kept = {}

        def keep(v):
            if v.untyped_storage()._cdata not in own:
                kept[v.untyped_storage()._cdata] = v  # stays alive, so that no two share an address
            return v
        with FlopCounterMode(display=False) as flops, torch.autograd.graph.saved_tensors_hooks(keep, keep):
            net(x, t, y)
        held.append(sum(v.untyped_storage().nbytes() for v in kept.values()))
    parameters, sample = sum(p.numel() for p in net.parameters()), held[1] - held[0]
    return parameters, flops.get_total_flops() / 2, held[0] - sample, sample


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


def largest_micro(net, share, free, extra=0):
    """The largest divisor of `share` samples for which gradients, Adam, and what a step holds by the estimate
    (and `extra` bytes a sample) take no more than `free` bytes; at least 1. Some is spared for a JVP and for
    fragments, more for a block that --checkpointing computes anew, or for the further graphs of vsd."""
    _, _, fixed, sample = estimate(net.options, net.checkpointing)
    left = free - 4 * (3 + (WORLD > 1)) * sum(p.numel() for p in net.parameters()) - fixed
    margin = (1.8 if net.checkpointing else 1.33) * (3 if getattr(net, "fake", None) else 1)
    return max(n for n in divisors(share) if n == 1 or n * (margin * sample + extra) <= left)


def make_optimizer(net, cfg):
    kinds = dict(adam=torch.optim.Adam, adamw=torch.optim.AdamW, radam=torch.optim.RAdam)
    return kinds[cfg.optimizer](net.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), eps=cfg.eps)


def learning_rate(step, cfg):
    """Linear rise, EDM2's inverse square root beyond lr_ref, linear fall over the last share, lr_cooldown."""
    lr = cfg.lr / math.sqrt(max(step / cfg.lr_ref, 1)) if cfg.lr_ref else cfg.lr
    lr *= min(1, (step + 1) / cfg.lr_warmup) if cfg.lr_warmup else 1
    left = (1 - step / cfg.steps) / cfg.lr_cooldown if cfg.lr_cooldown else 1
    return lr * min(1, left)


@torch.no_grad()
def lerp(average, net, beta):
    """average <- beta average + (1 - beta) net. What the two share, such as frozen weights, is left alone."""
    pairs = [(a, b) for a, b in zip(average.parameters(), net.parameters()) if a is not b]
    if pairs:
        torch._foreach_lerp_(*map(list, zip(*pairs)), 1 - beta)


def update_ema(ema, net, step, cfg):
    """The average after `step` (from 1): of half-life ema_halflife, or EDM2's power function. With relative
    width s that has beta = (1 - 1 / step)^(gamma + 1), gamma the largest root of
    g^3 + 7 g^2 + (16 - s^-2) g + (12 - s^-2) = 0."""
    beta = 0.5 ** (cfg.batch / cfg.ema_halflife) if cfg.ema_halflife else 0.0
    if cfg.ema_sigma_rel:
        gamma = np.roots([1, 7, 16 - cfg.ema_sigma_rel**-2, 12 - cfg.ema_sigma_rel**-2]).real.max()
        beta = (1 - 1 / step) ** (gamma + 1)
    lerp(ema, net, beta)


def lock_folder(folder, wait=False):
    """Keep other runs out of the folder for as long as the returned file is open: the operating system drops
    the lock with the process. Removes what killed writers have left there."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")
    try:
        import fcntl
    except ImportError:  # this platform has no such lock
        return file
    file.seek(0)
    holder = file.read()
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        if not holder.startswith(f"process {os.getpid()} "):  # a run that this very process has left
            fail(f"{folder} is in use by {holder or 'another run'}: wait for it, or choose another --out")
        return file
    file.truncate(0)
    print(f"process {os.getpid()} on {os.uname().nodename}", end="", file=file, flush=True)
    for path in folder.glob(".*.[0-9]*"):  # see atomic_write
        path.unlink(missing_ok=True)
    return file


def terminated(*_):
    """SIGTERM ends a run like Ctrl-C; the last checkpoint stays whole."""
    if RANK == 0:
        tqdm.write("stopped by SIGTERM; --resume goes on from the last checkpoint", file=sys.stderr)
    raise SystemExit(143)


class Run:
    """The mechanics of one training run: processes, device, output folder, log and checkpoints."""
    saved = ""  # where this process has last written a checkpoint
    lower_micro = 0  # what to try if memory does not suffice

    def __init__(self, cfg):
        self.cfg = cfg
        self.out = Path(cfg.out)
        self.bad = 0
        self.skipped = 0
        self.began = time.time()  # moved back by what earlier sittings of a resumed run took
        self.new_log = not cfg.resume
        self.micro = 0
        self.device = start_processes()
        if RANK == 0:
            self.lock = lock_folder(self.out)
        with reading(f"--out {self.out}"):
            if (self.out / "ckpt.pt").exists() and not cfg.resume and not cfg.overwrite:
                fail(f"{self.out} holds a run already: --resume it, --overwrite it, or choose another --out")
            sources = Path(cfg.teacher).resolve(), Path(cfg.init).resolve()
            if cfg.overwrite and self.out.resolve() in sources:
                fail(f"--overwrite would replace {self.out}, the --teacher or --init: choose another --out")
        barrier()  # all processes check --out before rank 0 writes to it
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, terminated)

    def split(self, net):
        """Cut this process's share of a batch into `rows` of --micro samples. On a GPU, 0 means as many as
        fit by the estimate, or as in the run that is resumed, because dropout masks depend on the number."""
        share = self.cfg.batch // WORLD
        micro = self.cfg.micro or self.micro or share
        choose = self.device.type == "cuda" and not (self.cfg.micro or self.micro)
        if choose and "pretrained" not in net.options:
            torch.cuda.empty_cache()  # what PyTorch only keeps for later is free, too
            free = torch.cuda.mem_get_info(self.device)[0]
            extra = 2**26 * getattr(self.cfg, "metric", "").startswith("lpips")  # VGG's activations
            found = torch.tensor(largest_micro(net, share, free, extra), device=self.device)
            if WORLD > 1:
                dist.all_reduce(found, dist.ReduceOp.MIN)
            micro = int(found)
            if RANK == 0:
                print(f"--micro {micro} of {share}, by an estimate for {free / 2**30:.1f} GiB")
        self.micro = micro = max(d for d in divisors(share) if d <= micro)
        Run.lower_micro = max((d for d in divisors(share) if d < micro), default=0)
        self.rows = [(RANK * share + i, RANK * share + i + micro) for i in range(0, share, micro)]

    def wrap(self, net):
        """The network that takes gradients, compiled and in DistributedDataParallel as the flags want it."""
        self.split(net)
        if self.cfg.compile:  # with eager random numbers: the JVP is never compiled and needs the same masks
            net = torch.compile(net, options=dict(fallback_random=True))
        return nn.parallel.DistributedDataParallel(net) if WORLD > 1 else net

    def accumulate(self, net, rows):
        """Lets gradients travel between processes after the last micro-batch only."""
        return net.no_sync() if WORLD > 1 and rows != self.rows[-1] else contextlib.nullcontext()

    def mean(self, value):
        """Mean over the processes of a scalar tensor that each has averaged over its rows."""
        if WORLD > 1:
            dist.all_reduce(value)
        return value / WORLD

    def finite(self, *values):
        """False if the step is to be skipped. Fifty such steps in a row end the run."""
        self.bad = 0 if all(math.isfinite(v) for v in values) else self.bad + 1
        self.skipped += bool(self.bad)
        if self.bad == 50:
            fail(f"stopped: 50 steps in a row had a non-finite loss or gradient; {self.out} keeps the last "
                 "checkpoint; try a lower --lr, or --dtype fp32")
        return not self.bad

    def resume(self, state):
        """Load everything in `state` from the checkpoint; returns the step to go on from."""
        ckpt = read_checkpoint(self.out)
        with reading(f"{self.out} cannot be resumed: these flags change the network or the optimizer"):
            for name, part in state.items():
                part.load_state_dict(ckpt[name])
            self.began, self.micro = time.time() - ckpt["seconds"], ckpt.get("micro", 0)
        if ckpt.get("world", WORLD) != WORLD and RANK == 0:
            print(f"{self.out} was written by {ckpt['world']} processes and goes on with {WORLD}: data and "
                  "noise are the same, but sums are rounded in another order, so not bit for bit")
        if ckpt["step"] >= self.cfg.steps:
            print(f"{self.out} is finished, at step {ckpt['step']}; a higher --steps goes on")
        if RANK == 0:  # forget the lines that the checkpoint does not know, and what a crash has torn
            path = self.out / "log.jsonl"
            kept = []
            with reading(f"cannot read {path}"):
                lines = path.read_bytes().splitlines() if path.exists() else []
            for line in lines:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    kept += [line + b"\n"] if json.loads(line)["step"] <= ckpt["step"] else []
            atomic_write(path, lambda file: file.writelines(kept))
        return ckpt["step"]

    def save(self, state, step):
        """Write ckpt.pt and config.json. The first time is after the first step, so that a run whose first
        step fails overwrites nothing. All numbers are drawn from (seed, step, position), so seed and step are
        the whole state of the RNG."""
        if RANK:
            return
        text = json.dumps(vars(self.cfg), indent=1)
        atomic_write(self.out / "config.json", lambda file: file.write(text.encode()))
        if self.new_log:  # the log of an overwritten run
            (self.out / "log.jsonl").unlink(missing_ok=True)
            self.new_log = False
        ckpt = {name: part.state_dict() for name, part in state.items()}
        ckpt |= dict(script=Path(inspect.getfile(type(self.cfg))).stem, config=vars(self.cfg), step=step,
                     options=state["net"].options, rng=self.cfg.seed, world=WORLD, micro=self.micro)
        ckpt["seconds"] = time.time() - self.began
        atomic_write(self.out / "ckpt.pt", lambda file: torch.save(ckpt, file))
        if self.cfg.dataset == "text":
            export(self.out, ckpt["ema"])
        Run.saved = self.out

    def steps(self, start):
        """The training steps, behind a progress bar, or with a line every 10 s if stderr is no terminal."""
        tty = sys.stderr.isatty()
        self.bar = tqdm(range(start, self.cfg.steps), initial=start, total=self.cfg.steps, disable=RANK > 0,
                        desc=f"{self.out} {self.cfg.mode}", unit="step", dynamic_ncols=True,
                        mininterval=0.5 if tty else 10, file=None if tty else Lines())
        return self.bar

    def log(self, step, **values):
        """Write one line of log.jsonl, and show its losses beside the progress bar. Loss and gradient are
        those of the global batch; what the method adds is of rank 0's last micro-batch."""
        if RANK:
            return
        values = {k: float(v) for k, v in values.items()}
        seconds = time.time() - self.began
        line = json.dumps(dict(step=step, **values, skipped=self.skipped, seconds=round(seconds, 2),
                               samples_per_s=round(step * self.cfg.batch / seconds, 1)))
        with writing(self.out / "log.jsonl"):
            self.out.mkdir(parents=True, exist_ok=True)
            with open(self.out / "log.jsonl", "w" if self.new_log else "a") as file:
                file.write(line + "\n")
        self.new_log = False
        shown = {k: f"{v:.3g}" for k, v in values.items() if k in ("loss", "mse", "variance")}
        self.bar.set_postfix(shown, refresh=False)


class Lines(io.TextIOBase):
    """stderr for a progress bar that is not on a terminal: each of its states on a line of its own."""

    def write(self, text):
        if text.strip():
            sys.stderr.write(text.strip() + "\n")


# ---------------------------------------------------------------------------------------------- 7. samples

def panels(columns, path, across=0):
    """PNG of titled panels, all in one row, or `across` in each. A panel is points (N, 2), drawn as a
    density; images (N, 3, H, W) uint8, drawn as a grid; or a picture."""
    pictures = [v if isinstance(v, Image.Image) else density(v) if v.ndim == 2 else grid(v)
                for v in columns.values()]
    width, height = (max(sizes) for sizes in zip(*(picture.size for picture in pictures)))
    across = across or len(pictures)
    sheet = Image.new("RGB", (across * (width + 8), -(-len(pictures) // across) * (height + 28)), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for i, (title, picture) in enumerate(zip(columns, pictures)):
        left, top = i % across * (width + 8) + 4, i // across * (height + 28)
        sheet.paste(picture, (left, top + 24))
        pen.text((left + width / 2, top + 12), title, "black", font, anchor="mm")
    atomic_write(path, lambda file: sheet.save(file, "PNG"))


def ticks(low, high, log):
    """Round numbers between low and high, for an axis."""
    if (log and high > 3 * low) or high == low:
        leading = (1, 2, 5) if high < 100 * low else (1,)
        return [m * 10.0**k for k in range(-12, 13) for m in leading if low <= m * 10.0**k <= high]
    step = 10.0 ** math.floor(math.log10(high - low))
    step = step if high - low > 3 * step else step / 2
    return np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step


def chart(lines, log="y", size=(440, 280)):
    """Picture of a line chart. `lines` holds for each name rows of (x, y, lowest y, highest y), whose range
    is shaded. `log` names those of the axes x and y that are logarithmic."""
    picture = Image.new("RGB", (2 * size[0], 2 * size[1]), "white")  # twice as large, for smooth lines
    pen, font = ImageDraw.Draw(picture, "RGBA"), ImageFont.load_default(26)
    left, top, right, bottom = 110, 20, 2 * size[0] - 40, 2 * size[1] - 50
    right -= max(pen.textlength(name, font) for name in lines)  # the names stand at the right
    x, y = np.split(np.array([row for line in lines.values() for row in line], float), [1], axis=1)
    axes = dict(x=(x.min(), x.max(), left, right), y=(y.min(), y.max(), bottom, top))

    def place(axis, value):
        low, high, begin, end = axes[axis]
        low, high, value = np.log([low, high, value]) if axis in log else (low, high, value)
        return begin + (end - begin) * (value - low) / ((high - low) or 1)

    for axis, (low, high, _, _) in axes.items():
        for value in ticks(low, high, axis in log):
            at = place(axis, value)
            pen.line((at, top, at, bottom) if axis == "x" else (left, at, right, at), "#dddddd", 2)
            where, anchor = ((at, bottom + 8), "ma") if axis == "x" else ((left - 10, at), "rm")
            pen.text(where, f"{value:,.6g}", "black", font, anchor)
    colors = itertools.cycle(["#1f4e9c", "#d1495b", "#2e8b57", "#e08e0b", "#7b5ea7", "#666666", "#00a0b0",
                              "#8b4513", "#c71585", "#6b8e23"])
    for i, (color, (name, line)) in enumerate(zip(colors, lines.items())):
        center, lowest, highest = ([(place("x", row[0]), place("y", row[k])) for row in line]
                                   for k in (1, 2, 3))
        pen.polygon(lowest + highest[::-1], color + "30")
        pen.line(center, color, 5, joint="curve")
        pen.text((right + 20, top + 36 * i), name, color, font)
    return picture.resize(size, Image.LANCZOS)


def density(points, size=240, half=1.0):
    """Points (N, d) -> density of their first two coordinates on [-half, half]^2, from white to dark blue on
    a square-root scale. Points (N, 1) are spread out in the other direction, which draws stripes."""
    if points.shape[1] == 1:
        points = torch.cat([points.cpu(), torch.linspace(-half, half, len(points))[:, None]], dim=1)
    counts, _, _ = np.histogram2d(*points.cpu().double().numpy().T[:2], size // 2, [[-half, half]] * 2)
    level = np.sqrt(np.minimum(counts / (20 * len(points) / (size / 2) ** 2), 1)).T[::-1, :, None]
    shade = 255 * (1 - level) + np.array([20, 40, 110]) * level
    return Image.fromarray(shade.astype(np.uint8)).resize((size, size), Image.NEAREST)


def grid(images, columns=0):
    """uint8 (N, 3, H, W) -> one picture, about square or with so many columns. Small images are enlarged."""
    n, c, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    sheet = np.full((-(-n // columns) * h, columns * w, c), 255, np.uint8)
    for i, image in enumerate(images.cpu().numpy()):
        top, left = i // columns * h, i % columns * w
        sheet[top:top + h, left:left + w] = image.transpose(1, 2, 0)
    zoom = max(1, 48 // h, 96 // sheet.shape[1])
    return Image.fromarray(sheet).resize((sheet.shape[1] * zoom, sheet.shape[0] * zoom), Image.NEAREST)


def energy_distance(a, b):
    """2 E|A - B| - E|A - A'| - E|B - B'| of points (N, d), over all pairs (V-statistic, never negative)."""
    def mean(a, b):  # a thousand rows at a time, so that memory grows with N and not with its square
        return sum(torch.cdist(rows, b).sum() for rows in a.split(1000)) / (len(a) * len(b))
    a, b = a.double().cpu(), b.double().cpu()
    return float(2 * mean(a, b) - mean(a, a) - mean(b, b))


def frechet_distance(mean1, cov1, mean2, cov2):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) between Gaussians (Heusel et al. 2017), in float64.

    The trace of the root is the sum of the roots of the eigenvalues of R C2 R, with R = C1^(1/2). That matrix
    is symmetric, so its eigenvalues are real; what rounding leaves below zero is cut off."""
    import scipy.linalg  # not needed for training
    values, vectors = scipy.linalg.eigh(cov1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(scipy.linalg.eigvalsh(root @ cov2 @ root), 0)).sum()
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def distance(a, b):
    """Energy distance of points; of images, Frechet distance as vectors of pixels."""
    if a.ndim == 2:
        return energy_distance(a, b)
    a, b = (x.flatten(1).double().cpu().numpy() for x in (a, b))
    return frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))


def noise_and_labels(cfg, net, lo, hi, seed, device):
    """Where samples lo..hi start: noise ~ N(0, sigma_d^2 I) (n, *shape), labels, and a Draw for what follows.

    Labels are --label, or 0, 1, 2, ... in turn; None if the net takes none. Sample i has numbers of its own,
    whatever lo and hi are."""
    gen = Draw(seed, 0, lo, hi, device)
    classes = net.options["classes"]
    noise = cfg.sigma_d * gen.normal(*net.options["shape"])
    labels = torch.arange(lo, hi, device=device) % max(classes, 1)
    labels = torch.full_like(labels, cfg.label) if cfg.label >= 0 else labels
    return noise, labels if classes else None, gen


EXACT_STEPS = 256  # Heun steps that count as the exact solution: on the toy, within an RMS of 4e-5 of it


def exact_ode(data, noise, y, sigma_d):
    """The solution of the PF-ODE of a Mixture from noise (n, D), float64."""
    return solve(data, noise.double(), ode_times(EXACT_STEPS, sigma_d), y, sigma_d)


def rms(a, b):
    """Root mean square of the differences, per element."""
    return float((a.double() - b.double()).square().mean().sqrt())


@torch.no_grad()
def report(cfg, run, step, sample, net, data, teacher, nfes):
    """Draw and measure what the EMA network samples, at each number of network evaluations (NFE) in nfes.

    Points: the energy distance to fresh data of the samples, of the exact ODE's samples, and of other data;
    and the ODE error E, the RMS between samples of nfes[0] evaluations and the exact solution from the same
    noise. Images: the samples beside the teacher's. Writes samples-*.png and metrics.json."""
    if RANK:
        return
    nfes = (35,) if cfg.mode == "diffusion" else nfes
    toy = len(data.shape) == 1
    n = 5000 if toy else 36 if data.shape[0] == 3 and data.shape[1] <= 64 else 4
    noise, y, gen = noise_and_labels(cfg, net, 0, n, 12345, run.device)
    columns = {}
    metrics = dict(seconds=round(time.time() - run.began, 1), steps=step)
    if step == cfg.steps:
        run.bar.n = step  # tqdm itself lags behind, and would end below 100 %
        run.bar.close()
    tqdm.write("drawing samples" + (" and solving the ODE exactly, about 4 s" if toy else ""))
    if toy:
        fresh, other = (data.batch(Draw(cfg.seed, 2**32 + i, 0, n, run.device))[0] for i in (0, 1))
        exact = exact_ode(data, noise, y, cfg.sigma_d)
        columns = {"data": fresh, "exact ODE": exact}
        distances = {"ode": energy_distance(exact, fresh), "data": energy_distance(other, fresh)}
    elif teacher is not None and cfg.dataset != "text":  # a pipeline is of use with guidance alone
        solved = solve(teacher, noise, ode_times(18, cfg.sigma_d), y, cfg.sigma_d)
        columns = {"teacher, 35 NFE": data.to_pixels(solved)}
    for nfe in nfes:
        x = sample(net, noise, y, nfe, cfg, gen)
        columns[f"{cfg.mode}, {nfe} NFE"] = x if toy else data.to_pixels(x)
        if toy:
            distances[str(nfe)] = energy_distance(x, fresh)
            metrics.setdefault("ode_error", rms(x, exact))
    panels(columns, run.out / f"samples-{step:06d}.png")
    if toy:
        metrics["energy_distance"] = distances
        run.log(step, ode_error=metrics["ode_error"], energy_distance=distances[str(nfes[0])])
        print("energy distance to fresh data:  " + "  ".join(
            f"{k + ' NFE' if k.isdigit() else k} {v:.5f}" for k, v in distances.items()))
        print(f"ODE error E = {metrics['ode_error']:.4f}   (RMS of {nfes[0]} NFE against the exact solution)")
    atomic_write(run.out / "metrics.json", lambda file: file.write(json.dumps(metrics, indent=1).encode()))
    print(f"{step} steps, {metrics['seconds']:.0f} s; wrote {run.out}/samples-{step:06d}.png")


def write_npz(path, x, labels):
    """ADM's .npz: arr_0 holds points (N, D) or uint8 (N, H, W, 3), arr_1 the labels (N,) if there are any."""
    labels = {} if labels is None else dict(arr_1=labels.cpu().numpy())
    array = x.numpy() if x.ndim == 2 else x.permute(0, 2, 3, 1).numpy()
    atomic_write(path, lambda file: np.savez(file, arr_0=array, **labels))


@torch.no_grad()
def write_samples(cfg, sample):
    """--sample N --nfe K: write a picture (.png), or ADM's .npz."""
    if RANK:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = load_net(cfg.out).to(device)
    if cfg.dataset == "text":
        net.read([cfg.prompt or fail("--sample of a text-to-image run needs --prompt TEXT")])
    toy = len(net.options["shape"]) == 1
    classes = net.options["classes"]
    if cfg.label >= 0 and cfg.label >= classes:
        valid = f"the classes are 0..{classes - 1}" if classes else "the network has no classes"
        fail(f"--label {cfg.label}: {valid}")
    parts, labels = [], []
    for lo in tqdm(range(0, cfg.sample, 1024), desc="sample", disable=None):
        noise, y, gen = noise_and_labels(cfg, net, lo, min(lo + 1024, cfg.sample), cfg.seed, device)
        parts.append(sample(net, noise, y, cfg.nfe, cfg, gen).cpu())
        labels.append(y)
    x = torch.cat(parts)
    path = Path(cfg.save or f"{cfg.out}/samples.png")
    values = x if toy else torch.cat([to_pixels(part.to(device), cfg).cpu() for part in parts])
    if toy:
        fresh, _ = dataset(cfg).batch(Draw(cfg.seed, 2**32, 0, min(len(x), 5000)))
        print(f"energy distance to fresh data, {cfg.nfe} NFE: {energy_distance(x[:5000], fresh):.5f}")
    if path.suffix == ".png":
        panels({f"{cfg.sample} samples, {cfg.nfe} NFE": values}, path)
    else:
        write_npz(path, values, torch.cat(labels) if classes else None)
    print(f"wrote {path}")


# -------------------------------------------------------------------------------- 8. other projects' files

class Record:
    """What an object in a foreign pickle was: the name of its class, and its state. It has no behaviour."""

    def __init__(self, class_name="", state=None):
        self.class_name, self.state = class_name, state

    def __setstate__(self, state):
        self.state = state


class Unread(Record):
    """What a pickle makes with a name that is not read: nothing is imported or called, and the arguments are
    dropped. ECT's snapshots hold such objects beside the network, in loss_fn."""

    def __init__(self, *args, **kw):
        super().__init__(type(self).__name__)


class Array(np.ndarray):
    def __setstate__(self, state):
        _, shape, dtype, fortran, raw = state
        super().__setstate__((1, shape, number_type(dtype), fortran, raw))


def number_type(record):
    """NumPy's dtype from the Record of one. A pickle could set the flags of a true dtype, and then have raw
    bytes taken for an array of objects, that is, for pointers."""
    if not re.fullmatch(r"[biufc]\d+", record.class_name):
        raise pickle.UnpicklingError(f"it holds an array of {record.class_name}, not of numbers")
    return np.dtype((">" if record.state and record.state[1] == ">" else "<") + record.class_name)


def torch_storage(blob):
    """A tensor's flat storage. torch's own function would unpickle the blob without limits."""
    found = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    return torch.empty(0, dtype=found.dtype).set_(found)


def torch_tensor(flat, offset, size, stride, *_):
    """A tensor on that storage. Strides of 0 could make terabytes of a small file; as_strided checks
    bounds."""
    if math.prod(size) > flat.numel():
        raise pickle.UnpicklingError("it holds a tensor larger than its storage")
    return flat.as_strided(size, stride, offset)


# All that a foreign pickle may name. A persistent object brings its own code, which is dropped.
PICKLE_NAMES = {
    "torch_utils.persistence._reconstruct_persistent_obj":
        lambda meta: Record(meta["class_name"], meta["state"]),
    "dnnlib.util.EasyDict": dict, "collections.OrderedDict": dict,
    "builtins.set": set, "__builtin__.set": set,
    "torch.device": lambda *place: place,
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # bytes, in protocol 2
    "numpy.ndarray": Record, "numpy.dtype": lambda code, *_: Record(code),
    "numpy.multiarray._reconstruct": lambda *_: Array(0),
    "numpy.multiarray.scalar": lambda dtype, raw: np.frombuffer(raw, number_type(dtype))[0],
    "numpy.numeric._frombuffer": lambda raw, dtype, shape, order:
        np.frombuffer(raw, number_type(dtype)).reshape(shape, order=order),
    "torch.storage._load_from_bytes": torch_storage,
    "torch._utils._rebuild_tensor_v2": torch_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    **{str(dtype): dtype for dtype in DTYPES.values()}}


class Unpickler(pickle._Unpickler):
    """Reads PICKLE_NAMES and Records, makes everything else Unread, and sets the state of Records and Arrays
    alone. It extends the unpickler written in Python, because C's cannot be kept from setting the state of
    anything."""
    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module, name):
        full = re.sub(r"^numpy\._?core\.", "numpy.", f"{module}.{name}")  # numpy 1 and 2
        if full in PICKLE_NAMES or module.startswith("torch.nn.modules."):
            return PICKLE_NAMES.get(full, Record)
        return type(full, (Unread,), {})

    def load_build(self):
        if not isinstance(self.stack[-2], (Record, Array)):
            raise pickle.UnpicklingError(f"it sets the state of a {type(self.stack[-2]).__name__}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def read_pickle(path):
    """What a foreign pickle (networks, statistics of EDM and EDM2) holds, without running code of its own."""
    with reading(f"cannot read {path}"), open(path, "rb") as file:
        return Unpickler(file).load()


def module_tensors(record, prefix="", seen=None):
    """The Record of a module -> {name: float32 tensor}, in the order in which they were defined. No module
    may occur twice: forty that each hold the next one twice would have 2^40 names."""
    seen = set() if seen is None else seen
    if id(record) in seen:
        raise ValueError(f"the module {prefix} occurs twice")
    seen.add(id(record))
    own = {**record.state["_parameters"], **record.state["_buffers"]}
    found = {prefix + k: v.float() for k, v in own.items() if v is not None}
    for name, child in record.state["_modules"].items():
        if child is not None:
            found |= module_tensors(child, f"{prefix}{name}.", seen)
    return found


EDM_FIXED = dict(  # what these networks could do otherwise and ours cannot
    edm2=dict(channel_mult_noise=None, channel_mult_emb=None, channels_per_head=64, label_balance=0.5,
              concat_balance=0.5, res_balance=0.3, attn_balance=0.3, clip_act=256, resample_filter=[1, 1]),
    ddpmpp=dict(model_type="SongUNet", embedding_type="positional", encoder_type="standard",
                decoder_type="standard", channel_mult_noise=1, channel_mult_emb=4, resample_filter=[1, 1]))
EDM_DEFAULTS = dict(
    edm2=dict(model_channels=192, num_blocks=3, channel_mult=(1, 2, 3, 4), attn_resolutions=(16, 8)),
    ddpmpp=dict(model_channels=128, num_blocks=4, channel_mult=(1, 2, 2, 2), attn_resolutions=(16,)))
EDM_NAMES = ((r"^(unet|model)\.", ""), (r"^(emb|map)_", r"embedding.\1_"),
             (r"^dec\.\d+x\d+_aux_(norm|conv)", r"out_\1"))  # theirs -> ours
EDM_DROPPED = "logvar|map_augment|resample_filter"  # the loss's head; augmentation labels, which are zero


def read_edm(path):
    """A snapshot of EDM2's U-Net, or of DDPM++ by EDM or ECT (a dict with `ema`), in the form of our
    checkpoints. ECT's is a consistency model, which sct.py and eval.py can sample."""
    content = read_pickle(path)
    with reading(f"{path} is no snapshot of EDM2's U-Net, or of DDPM++ by EDM or ECT"):
        kind = content["ema"].class_name
        arch = dict(Precond="edm2", EDMPrecond="ddpmpp", ECMPrecond="ddpmpp")[kind]
        kw = EDM_DEFAULTS[arch] | content["ema"].state["_init_kwargs"]
        for name, value in EDM_FIXED[arch].items():
            if kw.get(name, value) != value:
                raise ValueError(f"{name} {kw[name]}")
        weights = {}
        for name, value in module_tensors(content["ema"]).items():
            if not re.search(EDM_DROPPED, name):
                for theirs, ours in EDM_NAMES:
                    name = re.sub(theirs, ours, name)
                weights[name] = value
        classes = kw.get("label_dim", 0)
        options = dict(arch=arch, channels=kw["model_channels"], blocks=kw["num_blocks"], double_norm=False,
                       channel_mult=tuple(kw["channel_mult"]), attention=tuple(kw["attn_resolutions"]),
                       emb="fourier" if arch == "edm2" else "positional", c_noise="log")
        shape = (kw["img_channels"], kw["img_resolution"], kw["img_resolution"])
    config, script = options | dict(conditional=classes > 0), "edm"
    if kind == "ECMPrecond":
        config, script = config | dict(dataset="cifar10", mode="ect", sigma_shift=0.003), "sct"
    options |= dict(shape=shape, classes=classes, sigma_d=kw.get("sigma_data", 0.5), head=False)
    return dict(script=script, config=config, options=options, net=weights, ema=weights, step=0, seconds=0.0)


def is_diffusers(path):
    """Whether path is a folder of diffusers' UNet2DModel, or of a pipeline with one in unet/."""
    with reading(f"cannot read {path}"):
        configs = Path(path, "config.json"), Path(path, "unet", "config.json")
        return any(file.is_file() and '"UNet2DModel"' in file.read_text() for file in configs)


class Epsilon(nn.Module):
    """A network that predicts eps at the steps 0, 1, .. of a variance-preserving schedule, as F = net(x, t,
    y).

    Angles become steps along log(sigma / alpha). Beyond the first and last step it is called with those. What
    extends this says what eps(z, step, y) is, for z of the variance-preserving process."""

    def __init__(self, betas, sigma_d):
        super().__init__()
        self.sigma_d = sigma_d
        abar = (1 - betas.double()).cumprod(0)
        self.register_buffer("log_ratio", (1 / abar - 1).log() / 2, persistent=False)  # log(sigma / alpha)

    def forward(self, x, t, y=None, guidance=None):
        t = torch.minimum(t.double(), torch.atan(self.log_ratio[-1].exp() / self.sigma_d))
        ratio = self.sigma_d * t.tan()
        log = ratio.log().clamp(self.log_ratio[0], self.log_ratio[-1])
        i = torch.searchsorted(self.log_ratio, log).clamp(1, len(self.log_ratio) - 1)
        below, above = self.log_ratio[i - 1], self.log_ratio[i]
        step = (i - 1 + (log - below) / (above - below)).float()
        noisy = self.sigma_d * x / like(t.cos(), x)                                  # x_0 + ratio eps
        eps = self.eps((noisy * like((1 + ratio**2).rsqrt(), x)).float(), step, y).to(x.dtype)
        return like(t.cos(), x) * eps - like(t.sin() / self.sigma_d, x) * (noisy - like(ratio, x) * eps)


class Diffusers(Epsilon):
    """diffusers' UNet2DModel that predicts eps, such as google/ddpm-cifar10-32, as a teacher without
    labels."""

    def __init__(self, path, sigma_d):
        from diffusers import DDPMScheduler, UNet2DModel
        folders = ("unet", "scheduler") if Path(path, "unet").is_dir() else ("", "")
        with reading(f"{path} is no complete folder of UNet2DModel and its scheduler"):
            net = UNet2DModel.from_pretrained(Path(path, folders[0]))
            scheduler = DDPMScheduler.from_pretrained(Path(path, folders[1]))
        super().__init__(scheduler.betas, sigma_d)
        self.net, config = net, net.config
        if config.num_class_embeds or config.class_embed_type or config.out_channels != config.in_channels:
            fail(f"{path} takes labels or predicts variances: only networks without are known")
        if scheduler.config.prediction_type != "epsilon":
            fail(f"{path} predicts {scheduler.config.prediction_type}: only epsilon is known")
        self.options = dict(shape=(config.in_channels, config.sample_size, config.sample_size), classes=0)

    def eps(self, z, step, y):
        return self.net(z, step).sample


LORA = ("to_q,to_k,to_v,to_out.0,proj_in,proj_out,ff.net.0.proj,ff.net.2,conv1,conv2,conv_shortcut,"
        "downsamplers.0.conv,upsamplers.0.conv,time_emb_proj").split(",")


class TextToImage(Epsilon):
    """The U-Net of a text-to-image pipeline of diffusers, SDXL or Stable Diffusion 1.5, on its latents.
    Labels are indices of captions (see `text`), -1 for none.

    The U-Net is frozen but for LoRA adapters, which are what is trained and all that state_dict() holds. The
    teacher is the same U-Net without them."""

    def __init__(self, shape, pretrained, image_size, lora_rank, first_label, dtype, sigma_d, micro,
                 classes=0, text=None, unet=None, adapted=True):
        from diffusers import DDPMScheduler, UNet2DConditionModel
        from peft import LoraConfig
        with reading(f"--pretrained {pretrained} is not a readable SDXL pipeline or SD 1.5"):
            scheduler = DDPMScheduler.from_pretrained(pretrained, subfolder="scheduler")
            if not unet:
                unet = UNet2DConditionModel.from_pretrained(
                    pretrained, subfolder="unet", torch_dtype=DTYPES[dtype])
                unet.requires_grad_(False).enable_gradient_checkpointing()
                unet.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=LORA))
        if scheduler.config.prediction_type != "epsilon":
            fail(f"{pretrained} predicts {scheduler.config.prediction_type}: only epsilon is known")
        super().__init__(scheduler.betas, sigma_d)
        for p in unet.parameters():
            p.data = p.data.float() if p.requires_grad else p.data
        self.unet, self.adapted, self.text, self.half = unet, adapted, text, DTYPES[dtype]
        self.options = dict(
            shape=shape, pretrained=pretrained, image_size=image_size, lora_rank=lora_rank,
            first_label=first_label, dtype=dtype, sigma_d=sigma_d, micro=micro, classes=classes)

    def sibling(self, adapted, unet=None):
        """The student (adapted) or the teacher on the same U-Net, or on a copy of it."""
        twin = TextToImage(**self.options, text=self.text, unet=unet or self.unet, adapted=adapted)
        return twin.to(self.log_ratio.device)

    def __deepcopy__(self, memo):
        """A copy with its own LoRA on the same frozen weights."""
        memo |= {id(p): p for p in self.unet.parameters() if not p.requires_grad}
        return self.sibling(self.adapted, copy.deepcopy(self.unet, memo))

    def read(self, captions):
        """Take these captions, [str], as labels 0, 1, .."""
        self.text = read_text(self.options["pretrained"], captions, self.log_ratio.device)
        self.options["classes"] = len(captions)

    def forward(self, x, t, y=None, guidance=None):
        n = self.options["micro"] or len(x)  # sampling takes no more at once than training
        y = torch.full_like(t, -1, dtype=torch.int64) if y is None else y
        parts = zip(x.split(n), t.split(n), y.split(n))
        return torch.cat([super(TextToImage, self).forward(*part) for part in parts])

    def eps(self, z, step, y):
        # DEPARTS: the authors of Direct CM resize bilinearly, crop at random, and tell SDXL each image's own
        # size and corner; here the crop is the centre, and SDXL is told of an image of just this size, with
        # and without a caption alike
        known, row, side = (y >= 0).float().cpu(), y.clamp(min=0).cpu(), self.options["image_size"]
        prompts, pooled = ((table[row] * like(known, table)).to(z) for table in self.text)
        size = z.new_tensor([side, side, 0, 0, side, side]).expand(len(z), 6)
        added = dict(text_embeds=pooled, time_ids=size) if pooled.numel() else None  # SD 1.5 takes none
        self.unet.enable_adapters() if self.adapted else self.unet.disable_adapters()
        with torch.autocast(z.device.type, self.half, enabled=self.half != torch.float32):
            eps = self.unet(z, step + self.options["first_label"], prompts, added_cond_kwargs=added).sample
        self.unet.enable_adapters()
        return eps.float()

    def state_dict(self, **kw):
        from peft import get_peft_model_state_dict
        return get_peft_model_state_dict(self.unet)

    def load_state_dict(self, state):
        from peft import set_peft_model_state_dict
        set_peft_model_state_dict(self.unet, state)


def read_text(pretrained, captions, device):
    """Embeddings of captions by a pipeline's text encoders, (N, L, C), and its pooled ones, (N, P); P is 0
    for SD 1.5."""
    from diffusers import DiffusionPipeline
    with reading(f"--pretrained {pretrained} is not a readable SDXL pipeline or SD 1.5"):
        pipe = DiffusionPipeline.from_pretrained(pretrained, unet=None, vae=None).to(device)
        assert type(pipe).__name__ in ("StableDiffusionXLPipeline", "StableDiffusionPipeline"), type(pipe)
    rows = []
    for caption in tqdm(captions, desc="read captions", leave=False, disable=None):
        with torch.no_grad():
            embedding, _, *pooled = pipe.encode_prompt(caption, device=device, num_images_per_prompt=1,
                                                       do_classifier_free_guidance=False)
        rows.append((embedding.cpu(), pooled[0].cpu() if pooled else torch.zeros(1, 0)))
    return tuple(torch.cat(column) for column in zip(*rows))


class Captions:
    """The images of --data as latents of --pretrained's autoencoder, with their captions. x0 has the scale of
    the pipeline's latents, so sigma_d is 1."""
    # DEPARTS: Direct CM samples latents anew each time; here they are the posterior's means, computed once

    def __init__(self, cfg, device):
        if not (cfg.pretrained and cfg.data):
            fail("--dataset text needs --pretrained PATH_OR_HUB_ID and --data FOLDER")
        if cfg.teacher or cfg.flip or not cfg.image_size:
            fail("--pretrained is the teacher and needs an --image_size: give no --teacher, and no --flip")
        pairs, self.cfg, latents = read_captions(cfg), cfg, []
        text = read_text(cfg.pretrained, [caption for _, caption in pairs], device)
        vae = autoencoder(cfg, device)
        for path, _ in tqdm(pairs, desc="encode", leave=False, disable=None):
            x = torch.from_numpy(decode(path, Path.read_bytes, cfg.image_size).copy())[None].to(device)
            with torch.no_grad():
                latent = vae.encode(x.float() / 127.5 - 1).latent_dist.mean
            latents.append(latent.cpu() * vae.config.scaling_factor)
        self.latents, self.classes = torch.cat(latents), len(pairs)
        self.shape = tuple(self.latents.shape[1:])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            self.teacher = TextToImage(
                self.shape, cfg.pretrained, cfg.image_size, cfg.lora_rank, cfg.first_label, cfg.dtype,
                cfg.sigma_d, cfg.micro, self.classes, text, adapted=False).to(device)

    def batch(self, gen):
        """x0 (B, 4, h, w), and y (B,), the index of the caption."""
        y = gen.index(self.classes)
        return self.latents[y.cpu()].to(gen.device), gen.labels(y, self.cfg)

    def to_pixels(self, x):
        return to_pixels(x, self.cfg)


def export(folder, adapters):
    """Write them as pytorch_lora_weights.safetensors, for diffusers' load_lora_weights."""
    from diffusers import StableDiffusionXLPipeline
    with writing(folder):
        StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=adapters)


def read_captions(cfg):
    """[(image path, caption)] of --data: metadata.jsonl or .csv (file_name, text), or a .txt beside each
    image."""
    root = Path(cfg.data)
    with reading(f"--data {root}: every image needs a caption, in metadata.jsonl or metadata.csv "
                 "(file_name, text), or in a .txt of its name"):
        if (root / "metadata.jsonl").exists():
            rows = map(json.loads, (root / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
        elif (root / "metadata.csv").exists():
            rows = csv.DictReader((root / "metadata.csv").read_text(encoding="utf-8").splitlines())
        else:
            images = (p for p in root.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
            rows = (dict(file_name=path.relative_to(root), text=path.with_suffix(".txt").read_text("utf-8"))
                    for path in sorted(images))
        pairs = [(root / row["file_name"], row["text"].strip()) for row in rows]
    return pairs or fail(f"--data {root}: no images with captions in it")
