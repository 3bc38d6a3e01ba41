"""What images are compared with: class folders, a zip, or statistics in files of EDM, EDM2 and ADM. Several
processes share in measuring."""
from common import Draw
from kit.config import dataset, kind, to_pixels
from kit.data import Latents
from kit.edm import read_pickle
from kit.metrics import Moments, Reference
from kit.process import RANK, WORLD, atomic_write, barrier, fail, gathered, progress, reading
from kit.text import Captions

import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

KEEP = 10_000  # features that kid, precision and recall compare


def rounds(n, batch, desc):
    """(lo, hi) of the rows that this process takes, `batch` at a time; lo = hi where none is left."""
    for lo in progress(range(0, n, batch * WORLD), desc=desc, leave=False):
        yield min(lo + RANK * batch, n), min(lo + (RANK + 1) * batch, n)


def gather(moments, held):
    """What the processes hold, Moments and {lo: {a: rows, ..}}, as dict(moments, a=all rows, ..) on rank 0;
    on the others an empty one."""
    found = gathered((moments, held))
    if not found:
        return {}
    for other, more in found[1:]:
        moments.merge(other)
        held |= more
    parts = [held[lo] for lo in sorted(held)]
    names = dict.fromkeys(name for part in parts for name in part)
    return dict(moments=moments) | {
        name: torch.cat([part[name] for part in parts if name in part]) for name in names}


def read_npz(path):
    """The arrays in an .npz; never unpickles."""
    with reading(f"cannot read {path}"), np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def adm_samples(file, path):
    """Points (N, D), or images as uint8 (N, 3, H, W), from the arrays of an .npz in ADM's layout."""
    x = file.get("arr_0")
    x = x if isinstance(x, np.ndarray) else None
    images = x is not None and x.ndim == 4 and x.dtype == np.uint8 and x.shape[3] == 3
    points = x is not None and x.ndim == 2 and x.dtype.kind == "f" and np.isfinite(x).all()
    if not (images or points):
        fail(f"{path}: no samples, arr_0 of finite points or of uint8 (N, H, W, 3), in it")
    return x if x.ndim == 2 else x.transpose(0, 3, 1, 2)


def load_reference(args, cfg, features):
    """--reference. EDM's .npz (mu, sigma) and EDM2's .pkl (fid, fd_dinov2) hold moments alone; ADM's .npz
    holds images (arr_0) beside Inception's moments. Otherwise class folders, a zip, or the run's own data."""
    path, file = args.reference or "", {}
    if path.endswith(".pkl"):
        file, name = read_pickle(path), dict(inception="fid", dinov2="fd_dinov2").get(args.features)
        if not isinstance(file, dict) or name not in file:
            held = ", ".join(map(str, file)) if isinstance(file, dict) else "no table"
            fail(f"--reference {path} holds {held}: not for --features {args.features}")
        return Reference(*read_moments(file[name], path))
    if args.image_size and path.endswith((".npz", ".pkl")):
        fail(f"--image_size resizes the images of folders and zips, not what --reference {path} holds")
    if path.endswith(".npz"):
        file = read_npz(path)
        if "mu" in file and "arr_0" not in file and args.features == "inception":
            return Reference(*read_moments(file, path))
        if "arr_0" not in file:
            fail(f"--reference {path} holds no images, and moments are good for --features inception alone")
        images = adm_samples(file, path)
        if images.ndim == 2:
            fail(f"--reference {path} holds points, not images")
    else:
        mine = cfg.own_dataset("cpu") if cfg and not path else None
        if mine is None and not path and (not cfg or kind(cfg.dataset) is Latents):
            fail("samples and latents need --reference: class folders, a zip, or a file of statistics")
        own = (vars(cfg) if cfg else {}) | dict(image_size=args.image_size or getattr(cfg, "image_size", 0))
        other = dict(dataset="folder", data=path) if path else {}
        other |= dict(dataset="folder") if kind(own.get("dataset")) is Captions else {}
        plain = dict(conditional=False, channel_mult=(1,), flip=False)  # no labels, no network to fit
        if mine is None:
            images = dataset(SimpleNamespace(**own | other | plain)).rows
        else:
            x0, _ = mine.batch(Draw(0, 2**34, 0, KEEP))
            images = to_pixels(x0, cfg).numpy()
    if len(images) < 2:
        fail("one reference image has no covariance: give --reference more")
    table = cached_statistics(images, features, args)
    moments = file if "mu" in file and args.features == "inception" else table
    return Reference(*read_moments(moments, path), torch.from_numpy(table["features"]), images.shape[1:])


def cached_statistics(images, features, args):
    """Mean (mu) and covariance (sigma) of the features of uint8 images (N, 3, H, W), and KEEP of the
    features.

    They are kept in data/cache under a digest of the images and the feature network."""
    digest = hashlib.sha1(args.features.encode())
    for part in range(0, len(images), 1000):
        digest.update(np.ascontiguousarray(images[part:part + 1000]))
    for name in (args.features, args.weights or ""):
        digest.update(Path(name).read_bytes() if Path(name).is_file() else name.encode())
    cache = Path("data/cache", f"features-{digest.hexdigest()[:16]}.npz")
    if not cache.exists():
        kept = np.zeros(len(images), bool)
        kept[np.random.default_rng(0).permutation(len(images))[:KEEP]] = True
        moments, held = Moments(), {}
        for lo, hi in rounds(len(images), args.batch, "reference"):
            if lo < hi:
                found = features(torch.from_numpy(np.array(images[lo:hi])))["features"]
                moments.add(found)
                held[lo] = dict(features=found[torch.from_numpy(kept[lo:hi])])
        whole = gather(moments, held)
        if RANK == 0:
            mu, sigma = whole["moments"].mean_and_covariance()
            arrays = dict(mu=mu, sigma=sigma, features=whole["features"].numpy())
            atomic_write(cache, lambda out: np.savez(out, **arrays))
        barrier()
    return read_npz(cache)


def read_moments(table, path):
    """mu (d,) and sigma (d, d) of a table of EDM, EDM2, ADM or our own."""
    with reading(f"--reference {path} holds no mean (mu) and covariance (sigma) of features"):
        mu, sigma = np.asarray(table["mu"], np.float64), np.asarray(table["sigma"], np.float64)
        if sigma.shape != 2 * mu.shape:
            raise ValueError(f"shapes {mu.shape} and {sigma.shape}")
    return mu, sigma
