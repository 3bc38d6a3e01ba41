"""Distances and scores, of points and of images."""
import numpy as np
import torch


def rms(a, b):
    """Root mean square of the differences, per element."""
    return float((a.double() - b.double()).square().mean().sqrt())


def distance(a, b):
    """Energy distance of points; of images, Frechet distance as vectors of pixels."""
    if a.ndim == 2:
        return energy_distance(a, b)
    a, b = (x.flatten(1).double().cpu().numpy() for x in (a, b))
    return frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))


# ------------------------------------------------------------------------------------------------- points

def energy_distance(a, b):
    """2 E|A - B| - E|A - A'| - E|B - B'| of points (N, d), over all pairs (V-statistic, never negative)."""
    def mean(a, b):  # a thousand rows at a time, so that memory grows with N and not with its square
        return sum(torch.cdist(rows, b).sum() for rows in a.split(1000)) / (len(a) * len(b))
    a, b = a.double().cpu(), b.double().cpu()
    return float(2 * mean(a, b) - mean(a, a) - mean(b, b))


def sliced_wasserstein(a, b, directions=128):
    """Root mean square over random directions of the 1-D Wasserstein-2 distance of points (N, d), equal N."""
    theta = torch.randn(a.shape[1], directions, generator=torch.Generator().manual_seed(0)).double()
    theta /= theta.norm(dim=0)
    a, b = ((x.double() @ theta).sort(0).values for x in (a, b))
    return rms(a, b)


def mode_shares(x, mixture):
    """Share of the points (N, D) that lie within 4 standard deviations of each mean, (K,); in D dimensions
    within 4 sqrt(D / 2)."""
    distance, nearest = torch.cdist(x.double(), mixture.mean).min(1)
    near = distance <= 4 * mixture.std * (x.shape[1] / 2) ** 0.5
    counts = torch.bincount(nearest[near], minlength=mixture.classes)
    return (counts / len(x)).tolist()


# ------------------------------------------------------------------------------------------------- images

def frechet_distance(mean1, cov1, mean2, cov2):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) between Gaussians (Heusel et al. 2017), in float64.

    The trace of the root is the sum of the roots of the eigenvalues of R C2 R, with R = C1^(1/2). That matrix
    is symmetric, so its eigenvalues are real; what rounding leaves below zero is cut off."""
    import scipy.linalg  # not needed for training
    values, vectors = scipy.linalg.eigh(cov1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(scipy.linalg.eigvalsh(root @ cov2 @ root), 0)).sum()
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)


class Moments:
    """Mean and covariance, float64, of features that arrive in batches. Memory is that of one covariance."""

    def __init__(self):
        self.n, self.sum, self.outer = 0, 0, 0

    def add(self, x):
        """x (B, d)."""
        x = x.double()
        self.n, self.sum, self.outer = self.n + len(x), self.sum + x.sum(0), self.outer + x.T @ x

    def merge(self, other):
        self.n, self.sum, self.outer = self.n + other.n, self.sum + other.sum, self.outer + other.outer

    def mean_and_covariance(self):
        """(d,) and (d, d), the covariance unbiased (divided by n - 1)."""
        mean = self.sum / self.n
        return mean.numpy(), ((self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)).numpy()


def kernel_sum(x, y):
    return sum(((rows @ y.T / y.shape[1] + 1) ** 3).sum() for rows in x.split(1000))


def own_kernel(x):
    """Mean of KID's kernel over the pairs of features (N, d), without the diagonal."""
    x = x.double()
    return (kernel_sum(x, x) - ((x.square().mean(1) + 1) ** 3).sum()) / (len(x) * (len(x) - 1))


def kid(a, b, own_b=None):
    """Kernel inception distance (Binkowski et al. 2018) of features (N, d) and (M, d)."""
    own_b = own_kernel(b) if own_b is None else own_b
    cross = kernel_sum(a.double(), b.double()) / (len(a) * len(b))
    return float(own_kernel(a) + own_b - 2 * cross)


def distances(x, y):
    return (torch.cdist(rows.double(), y.double()) for rows in x.split(1000))


def reach(x, k=3):
    """Distance of each of the features (N, d) to its k-th neighbour, (N,)."""
    nearest = (d.topk(min(k + 1, len(x)), largest=False).values for d in distances(x, x))  # itself among them
    return torch.cat([d.amax(1) for d in nearest])


def precision_recall(samples, real, reach_real=None):
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features (N, d) and (M, d): the share of
    samples within reach of a real image, and of real images within reach of a sample."""
    def covered(x, y, reach_y):
        return sum((d <= reach_y).any(1).sum().item() for d in distances(x, y)) / len(x)
    reach_real = reach(real) if reach_real is None else reach_real
    return dict(precision=covered(samples, real, reach_real), recall=covered(real, samples, reach(samples)))


def inception_score(p, splits=10):
    """exp of the mean KL divergence of class probabilities (N, K) from their mean (Salimans et al. 2016)."""
    parts = p.double().clamp(min=1e-16).chunk(min(splits, len(p)))
    return float(sum((q * (q / q.mean(0)).log()).sum(1).mean().exp() for q in parts) / len(parts))


class Reference:
    """What samples are compared with: the moments of features and, unless those are all that is known, some
    of the features, with their own share of KID and of precision, which is the same for all samples."""

    def __init__(self, mean, covariance, features=None, shape=None):
        self.mean, self.covariance, self.features = mean, covariance, features
        self.shape = shape and tuple(shape)  # of an image, if that is known
        self.own, self.reach = (None, None) if features is None else (own_kernel(features), reach(features))


def image_metrics(moments, features, probabilities, reference):
    """{name: value} of the Moments of samples' features, the first of the features, and class probabilities
    or None, against a Reference."""
    found = dict(frechet_distance=frechet_distance(
        *moments.mean_and_covariance(), reference.mean, reference.covariance))
    if reference.features is not None:
        found |= dict(kid=kid(features, reference.features, reference.own))
        found |= precision_recall(features, reference.features, reference.reach)
    return found | (dict(inception_score=inception_score(probabilities)) if probabilities is not None else {})
