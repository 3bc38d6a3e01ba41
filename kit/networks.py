"""Networks: an MLP for points; for images one U-Net with EDM2's or DDPM++'s blocks. Each is F = net(x, t, y).

Every layer has a rule for its JVP (see kit/layers.py).
"""
from common import affine, linear, product, silu
from kit.layers import (DTYPES, SILU_GAIN, Conv2d, Embedding, GroupNorm, Linear, MPConv, WeightHead, dropout,
                        mp_cat, mp_sum, noise_input, one_hot, pnorm, resample,
                        self_attention)
from kit.process import fail

import math

import torch
import torch.nn.functional as tnf
import torch.utils.checkpoint
from torch import nn


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
    strength of guidance to imitate, and with return_w, F comes with the weighting head's w(t) (B,).

    A block adds silu(norm(W h) scale(t) + shift(t)) to h. The scales and shifts of all blocks are one linear
    layer of a narrow embedding; from one as wide as h they would cost as much as all the rest."""

    def __init__(self, shape, classes=0, channels=128, blocks=6, sigma_d=0.5, emb="positional",
                 emb_scale=1.0, c_noise="t", double_norm=True, norm_shift=True, guidance=False, head=True,
                 **of_images):
        super().__init__()
        self.embedding = EDM2Embedding(32, 64, classes, sigma_d, emb, emb_scale, c_noise, guidance)
        self.head = WeightHead(sigma_d) if head else None
        self.double_norm, self.norm_shift, self.blocks = double_norm, norm_shift, blocks
        self.first, self.last = Linear(shape[0], channels), Linear(channels, shape[0])
        self.inner = nn.ModuleList(Linear(channels, channels) for _ in range(blocks))
        self.modulate = Linear(32, (1 + norm_shift) * blocks * channels)

    def forward(self, x, t, y=None, guidance=None, return_w=False):
        emb = self.embedding(t, y, guidance)
        h = self.first(x.to(emb.dtype))
        # The scales of all blocks, and then their shifts, (B, channels) each.
        parts = self.modulate(emb).unflatten(1, ((1 + self.norm_shift) * self.blocks, -1))
        parts = (pnorm(parts, dim=2) if self.double_norm else parts).unbind(1)
        for i, inner in enumerate(self.inner):
            scale = parts[i] if self.double_norm else 1 + parts[i]
            shift = parts[i + self.blocks] if self.norm_shift else 0
            h = h + silu(product(pnorm(inner(h)), scale) + shift)
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
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
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
    """The network from its constructor's arguments; its weights depend on the seed alone.

    `extra` takes the networks that a script adds by name. They are saved and loaded with this one, and what
    is added before the optimizer is made is trained with it, too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = (MLP if len(options["shape"]) == 1 else UNet)(**options)
    net.options, net.extra = options, nn.ModuleDict()
    return net
