"""Toy data: mixtures of Gaussians, each its own exact teacher, and drawn shapes."""
from common import Draw, ode_times, solve
from kit.process import progress

import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

EXACT_STEPS = 256  # Heun steps that count as the exact solution: on the toy, within an RMS of 4e-5 of it


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

    @property
    def teacher(self):
        return self

    @staticmethod
    def pixels(x, cfg):
        """Points have none, and stay as they are."""
        return x

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


def exact_ode(data, noise, y, sigma_d):
    """The solution of the PF-ODE of a Mixture from noise (n, D), float64."""
    return solve(data, noise.double(), ode_times(EXACT_STEPS, sigma_d), y, sigma_d)


SHAPES = [f"{hue} {shape}" for hue in ("warm", "cold") for shape in "disc triangle square pentagon".split()]


def draw_shapes(cfg, count=8000):
    """A disc, triangle, square or pentagon, warm or cold (8 classes), drawn by Pillow at 4x and reduced."""
    size = cfg.image_size or 16
    rng = np.random.default_rng(0)
    images, labels = np.empty((count, 3, size, size), np.uint8), rng.integers(8, size=count)
    for i, label in enumerate(progress(labels, desc="drawing shapes", leave=False)):
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
