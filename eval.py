"""Compare runs: python eval.py out/scm out/cm --nfe 1 2 4 [--features inception] [--samples 50000]

Each run is sampled by the script that its checkpoint names, from its EMA weights, and from the same noise as
all others. Sample i depends on i alone, so neither --batch nor the number of processes (torchrun) changes it.
An .npz of samples in ADM's layout may stand for a run, too; --write writes one for each run and NFE, which
guided-diffusion's evaluator and dgm-eval read. Prints a Markdown table and writes eval.json and eval.png.

    python eval.py --toy 3000           trains every mode of every script on the 2-D ring, and compares them
    python eval.py out/sdxl --prompts FILE --reference teacher      against the teacher's images, and with E

points  energy_distance     V-statistic between n samples and n fresh points: biased, above 0 even for data
        sliced_wasserstein  root mean square W_2 over 128 directions, n samples and n fresh points: biased
        mode_shares         share of the samples within 4 standard deviations of each mode
        ode_error           RMS per element between samples and the exact solution from the same noise; of
                            images (latents) the teacher's, with --reference teacher
        exact_ode           the energy distance of that solution, below which no student is to come
images  frechet_distance    n samples, all reference images, covariances over n - 1: biased, falls with n;
                            the FID with --features inception and n = 50,000 (which resizes to 299 itself)
        inception_score     exp E KL(p(y|x) || p(y)), mean of 10 splits: biased; needs class probabilities
        kid                 MMD^2 with kernel (x.y / d + 1)^3, U-statistic: unbiased; at most 10,000 of each
        precision, recall   k = 3 nearest neighbours; at most 10,000 samples and reference images
text    clip_score          mean cosine of CLIP ViT-L/14's image and prompt, resized to 224 by its processor
        aesthetic_score     mean of LAION's linear predictor on CLIP's normalized image features
"""
import common
from common import RANK, WORLD, fail, reading

import argparse
import concurrent.futures
import functools
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as tnf
from tqdm import tqdm

INCEPTION = ("https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
             "inception-2015-12-05.pt")
AESTHETIC = ("https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
             "sac+logos+ava1-l14-linearMSE.pth")
KEEP, SHOWN = 10_000, 16  # features that kid, precision and recall compare; images of a run in the picture
# What the teacher's own samples depend on.
TEACHING = ("teacher", "pretrained", "first_label", "solver", "intervals", "guidance", "sigma_d")
TOY = dict(scm=("diffusion", "scd", "sct", "dscd"), cm=("cd", "ct", "ict", "ctcd", "ctct"),
           sct=("ect", "sct"), multistep_cm=("cd", "ct", "pd"), direct_cm=("cm", "direct"))


# ------------------------------------------------------------------------------------------------- samples
def open_run(path, prompts, seed, device):
    """A run folder, checkpoint or .npz as (its columns of the table, cfg, draw(nfe, lo, hi) -> x, x0, noise,
    y).

    x is (B, D) or uint8 (B, 3, H, W), x0 the sample behind it. Of nfe "teacher", they are the teacher's own:
    by the script's solver if it has one, else by 35 network evaluations of Heun's. A file has x alone."""
    if str(path).endswith(".npz"):
        x = torch.from_numpy(adm_samples(read_npz(path), path))
        return dict(run=str(path), n=len(x)), None, lambda nfe, lo, hi: (x[lo:hi], None, None, None)
    ckpt = common.read_checkpoint(path)
    name = str(ckpt["script"])  # a script beside this file, and nothing else, may be imported
    if not re.fullmatch(r"\w+", name) or not Path(__file__).with_name(name + ".py").exists():
        fail(f"{path} names an unknown script, {name!r}")
    script = importlib.import_module(name)
    cfg = common.make_config(script.Config, ckpt["config"])
    columns = dict(run=str(path), method=name, mode=cfg.mode, samples_seen=ckpt["step"] * cfg.batch,
                   seconds=round(ckpt["seconds"]))
    net = common.load_net(path).to(device)
    text = cfg.dataset == "text"
    if text:
        net.read(prompts or fail(f"{path} draws from text: give --prompts FILE"))

    @functools.cache
    def teacher():
        if len(net.options["shape"]) == 1:
            fail("--reference teacher is for images: points are compared with fresh data and the exact ODE")
        known = SimpleNamespace(**net.options, teacher=net.sibling(adapted=False) if text else None)
        return common.load_teacher(cfg, known, device) or fail(f"{path} has no --teacher")

    def guided(x, t, y):
        w, F = getattr(cfg, "guidance", 1), teacher()(x, t, y)
        F_uncond = F if w == 1 else teacher()(x, t, torch.full_like(y, -1))
        return F_uncond + w * (F - F_uncond)

    def solution(noise, y):
        if hasattr(script, "solution"):
            return script.solution(teacher(), noise, y, cfg)
        return common.solve(guided, noise, common.ode_times(18, cfg.sigma_d), y, cfg.sigma_d)

    def draw(nfe, lo, hi):
        noise, y, gen = common.noise_and_labels(cfg, net, lo, hi, seed, device)
        x0 = solution(noise, y) if nfe == "teacher" else script.sample(net, noise, y, nfe, cfg, gen)
        x = x0 if x0.ndim == 2 else common.to_pixels(x0, cfg)
        return x.cpu(), x0.cpu(), noise.cpu(), None if y is None else y.cpu()
    return columns, cfg, draw


def rounds(n, batch, desc):
    """(lo, hi) of the rows that this process takes, `batch` at a time; lo = hi where none is left."""
    for lo in tqdm(range(0, n, batch * WORLD), desc=desc, leave=False, disable=None if RANK == 0 else True):
        yield min(lo + RANK * batch, n), min(lo + (RANK + 1) * batch, n)


def gather(*tensors):
    """What the processes hold, row after row, on every process; None stays None."""
    parts = [tensors] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, tensors)
    return join(parts)


def join(parts):
    """[(a0, b0, ..), (a1, b1, ..)] -> [a0 over a1, b0 over b1, ..], leaving out what is None."""
    columns = [[part for part in column if part is not None] for column in zip(*parts)]
    return [torch.cat(column) if column else None for column in columns]


def read_npz(path):
    """The arrays in an .npz; never unpickles."""
    with reading(f"cannot read {path}"), np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def adm_samples(file, path):
    """Points (N, D), or images as uint8 (N, 3, H, W), from the arrays of an .npz in ADM's layout."""
    x = file.get("arr_0")
    images = x is not None and x.ndim == 4 and x.dtype == np.uint8 and x.shape[3] == 3
    points = x is not None and x.ndim == 2 and x.dtype.kind == "f" and np.isfinite(x).all()
    if not (images or points):
        fail(f"{path}: no samples, arr_0 of finite points or of uint8 (N, H, W, 3), in it")
    return x if x.ndim == 2 else x.transpose(0, 3, 1, 2)


# -------------------------------------------------------------------------------------- metrics of points
def sliced_wasserstein(a, b, directions=128):
    """Root mean square over random directions of the 1-D Wasserstein-2 distance of points (N, d), equal N."""
    theta = torch.randn(a.shape[1], directions, generator=torch.Generator().manual_seed(0)).double()
    theta /= theta.norm(dim=0)
    a, b = ((x.double() @ theta).sort(0).values for x in (a, b))
    return common.rms(a, b)


def mode_shares(x, mixture):
    """Share of the points (N, D) that lie within 4 standard deviations of each mean, (K,); in D dimensions
    within 4 sqrt(D / 2)."""
    distance, nearest = torch.cdist(x.double(), mixture.mean).min(1)
    near = distance <= 4 * mixture.std * (x.shape[1] / 2) ** 0.5
    counts = torch.bincount(nearest[near], minlength=mixture.classes)
    return (counts / len(x)).tolist()


def measure_points(x, noise, y, nfe, cfg):
    if not cfg:
        fail("points from a file say nothing of their data: give the run's folder")
    data = common.dataset(cfg)
    fresh, _ = data.batch(common.Draw(0, 2**32, 0, len(x)))
    row = dict(energy_distance=common.energy_distance(x, fresh), mode_shares=mode_shares(x, data),
               sliced_wasserstein=sliced_wasserstein(x, fresh))
    segments = getattr(cfg, "student_steps", 0) or getattr(cfg, "phases", 1) > 1
    if nfe == 1 or cfg.mode == "diffusion" or segments:  # the others add noise, so they solve no ODE
        exact = common.exact_ode(data, noise, y, cfg.sigma_d)
        row |= dict(ode_error=common.rms(x, exact), exact_ode=common.energy_distance(exact, fresh))
    return row


# -------------------------------------------------------------------------------------- metrics of images
class Moments:
    """Mean and covariance, float64, of features that arrive in batches. Memory is that of one covariance."""

    def __init__(self):
        self.n, self.sum, self.outer = 0, 0, 0

    def add(self, x):
        """x (B, d)."""
        x = x.double()
        self.n, self.sum, self.outer = self.n + len(x), self.sum + x.sum(0), self.outer + x.T @ x

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
    return torch.cat([d.kthvalue(min(k + 1, len(x))).values for d in distances(x, x)])  # the first is itself


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


def measure_images(moments, features, probabilities, ref):
    """The metrics of images: from the moments of their features, the first features, class probabilities."""
    if len(ref.mean) != features.shape[1]:
        fail(f"--reference has {len(ref.mean)} features an image, --features gives {features.shape[1]}")
    row = dict(frechet_distance=common.frechet_distance(
        *moments.mean_and_covariance(), ref.mean, ref.covariance))
    if ref.features is not None:
        row |= dict(kid=kid(features, ref.features, ref.own))
        row |= precision_recall(features, ref.features, ref.reach)
    return row | (dict(inception_score=inception_score(probabilities)) if probabilities is not None else {})


def feature_network(name, weights, device):
    """--features as a function: uint8 (B, 3, H, W) -> features (B, d), class probabilities (B, K) or None."""
    if name == "pixels":
        return lambda x: (x.flatten(1).float() / 255, None)
    if name == "dinov2":
        from transformers import AutoModel
        net = pretrained(AutoModel, weights, "facebook/dinov2-large", "--weights").to(device).eval()
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1).to(device)

        def dinov2(x):  # the class token after the last norm, of images resized to 224
            x = tnf.interpolate(x.to(device) / 255, (224, 224), mode="bicubic", antialias=True)
            return net((x - mean) / std).pooler_output.cpu(), None
        return dinov2
    path = Path(weights or "data/inception-2015-12-05.pt") if name == "inception" else Path(name)
    if name == "inception" and not weights:
        common.download(INCEPTION, path)
    with reading(f"{path} is no TorchScript module"):
        if not path.exists():
            fail(f"no feature network at {path}: give inception, dinov2, pixels or a TorchScript file")
        net = torch.jit.load(path, map_location=device).eval()

    def script(x):
        x, known = x.to(device), [argument.name for argument in net.forward.schema.arguments]
        if "return_features" not in known:
            return net(x).flatten(1).cpu(), None
        plain = dict(no_output_bias=True) if "no_output_bias" in known else {}  # as the score is defined
        return net(x, return_features=True).cpu(), net(x, **plain).cpu()        # NVIDIA's Inception-v3

    def checked(x):
        with reading(f"{path} does not turn uint8 images (B, 3, H, W) into features (B, d)"):
            features, probabilities = script(x)
            assert len(features) == len(x) and features.isfinite().all(), "its features are not all finite"
            return features, probabilities
    return checked


def pretrained(kind, given, hub, flag):
    """A network of transformers from the folder or hub id given with flag, else from the hub."""
    with reading(f"cannot load {given or hub}: download https://huggingface.co/{hub} and give its folder "
                 f"with {flag}"):
        return kind.from_pretrained(given or hub)


# ----------------------------------------------------------------------------------------------- reference
class Reference:
    """What samples are compared with: the moments of features and, unless a file holds moments alone, up to
    KEEP of the features, with their own share of KID and of precision, which is the same for all rows."""

    def __init__(self, mean, covariance, features=None):
        self.mean, self.covariance, self.features = mean, covariance, features
        self.own, self.reach = (None, None) if features is None else (own_kernel(features), reach(features))


def load_reference(args, cfg, features):
    """--reference. EDM's .npz (mu, sigma) and EDM2's .pkl (fid, fd_dinov2) hold moments alone; ADM's .npz
    holds images (arr_0) beside Inception's moments. Otherwise class folders, a zip, or the run's own data."""
    path, file = args.reference or "", {}
    if path.endswith(".pkl"):
        file, name = common.read_pickle(path), dict(inception="fid", dinov2="fd_dinov2").get(args.features)
        if not isinstance(file, dict) or name not in file:
            held = ", ".join(map(str, file)) if isinstance(file, dict) else "no table"
            fail(f"--reference {path} holds {held}: not for --features {args.features}")
        return Reference(*read_moments(file[name], path))
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
        if not path and (not cfg or cfg.dataset == "imagenet512"):
            fail("samples and latents need --reference: class folders, a zip, or a file of statistics")
        own = (vars(cfg) if cfg else {}) | dict(image_size=args.image_size or getattr(cfg, "image_size", 0))
        other = dict(dataset="folder", data=path) if path else {}
        other |= dict(dataset="folder") if own.get("dataset") == "text" else {}
        plain = dict(conditional=False, channel_mult=(1,), flip=False)  # no labels, no network to fit
        images = common.dataset(SimpleNamespace(**own | other | plain)).rows
    if len(images) < 2:
        fail("one reference image has no covariance: give --reference more")
    table = cached_statistics(images, features, args)
    moments = file if "mu" in file and args.features == "inception" else table
    return Reference(*read_moments(moments, path), torch.from_numpy(table["features"]))


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
        moments, some = Moments(), []
        for lo, hi in rounds(len(images), args.batch, "reference"):
            own = features(torch.from_numpy(np.array(images[lo:hi])))[0] if lo < hi else None
            both = gather(own, torch.from_numpy(kept[lo:hi]) if lo < hi else None)
            moments.add(both[0])
            some.append(both[0][both[1]])
        mu, sigma = moments.mean_and_covariance()
        if RANK == 0:
            arrays = dict(mu=mu, sigma=sigma, features=torch.cat(some).numpy())
            common.atomic_write(cache, lambda out: np.savez(out, **arrays))
        common.barrier()
    return read_npz(cache)


def read_moments(table, path):
    """mu (d,) and sigma (d, d) of a table of EDM, EDM2, ADM or our own."""
    with reading(f"--reference {path} holds no mean (mu) and covariance (sigma) of features"):
        mu, sigma = np.asarray(table["mu"], np.float64), np.asarray(table["sigma"], np.float64)
        assert sigma.shape == 2 * mu.shape, f"shapes {mu.shape} and {sigma.shape}"
    return mu, sigma


# ------------------------------------------------------------------------------------------- text to image
def text_scores(args, device):
    """A function: uint8 images (B, 3, H, W) and B prompts -> CLIP score and aesthetic score, (B, 2)."""
    from transformers import CLIPModel, CLIPProcessor
    clip, processor = (pretrained(kind, args.clip, "openai/clip-vit-large-patch14", "--clip")
                       for kind in (CLIPModel, CLIPProcessor))
    clip.to(device).eval()
    path = Path(args.aesthetic or "data/sac+logos+ava1-l14-linearMSE.pth")
    if not args.aesthetic:
        common.download(AESTHETIC, path)
    with reading(f"{path} is not LAION's aesthetic predictor, {AESTHETIC}"):
        state = torch.load(path, map_location=device, weights_only=True)
        layers = [(state[f"layers.{i}.weight"], state[f"layers.{i}.bias"]) for i in (0, 2, 4, 6, 7)]

    def scores(x, prompts):
        inputs = processor(text=prompts, images=list(x), return_tensors="pt", padding=True, truncation=True)
        out = clip(**inputs.to(device))
        h = out.image_embeds                      # (B, 768), like the text's of unit length
        for weight, bias in layers:               # no nonlinearity between them
            h = h @ weight.T + bias
        return torch.stack([(out.image_embeds * out.text_embeds).sum(1), h[:, 0]], dim=1).cpu()
    return scores


def read_prompts(path):
    """Lines of a text file; None without one."""
    if not path:
        return None
    with reading(f"cannot read --prompts {path}"):
        lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    return lines or fail(f"--prompts {path} is empty")


# ---------------------------------------------------------------------------------------------------- main
@torch.no_grad()
def evaluate(path, nfes, args, tools, device):
    """Rows of the table and pictures of a run, {(run, NFE): (row, picture)}; filled on rank 0 alone."""
    columns, cfg, draw = open_run(path, tools.prompts, args.seed, device)
    n, results = min(columns.pop("n", args.samples), len(tools.prompts or range(args.samples))), {}
    if n < 2:
        fail(f"{path}: {n} samples have no spread to measure: at least 2 are needed")
    key, nfes = args.reference or cfg and (cfg.dataset, cfg.data), nfes if cfg else ("",)
    if args.reference == "teacher":
        if not cfg:
            fail(f"--reference teacher: {path} holds samples and names no teacher")
        key = tuple(str(getattr(cfg, name, "")) for name in TEACHING)
        nfes = nfes if key in tools.references else ("teacher", *nfes)
    key = key, args.image_size or getattr(cfg, "image_size", 0)
    solved = tools.solved.setdefault(key, {})  # the teacher's x0 of this process, by the first row
    for nfe in nfes:
        moments, held, seen = Moments(), [], 0
        for lo, hi in rounds(n, args.batch, f"{path}, {nfe} NFE"):
            x, x0, noise, y = draw(nfe, lo, hi) if lo < hi else (None, None, None, None)
            image = x is not None and x.ndim == 4
            f, p = tools.features(x) if image else (None, None)
            score = tools.scores(x, tools.prompts[lo:hi]) if image and tools.scores else None
            if nfe == "teacher" and lo < hi:
                solved[lo] = x0
            error = (x0 - solved[lo]).double().square().flatten(1).mean(1) if lo in solved and image else None
            x, noise, y, f, p, score, error = gather(x, noise, y, f, p, score, error)
            if x.ndim == 4:  # of images no more is held than a metric or the picture needs
                moments.add(f)
                f, noise = f[:max(KEEP - seen, 0)].clone(), None
                x = x if args.write else x[:max(SHOWN - seen, 0)].clone()
            held.append((x, noise, y, f, p, score, error))
            seen += args.batch * WORLD
        x, noise, y, f, p, score, error = join(held)
        if args.write and RANK == 0:
            common.write_npz(Path(args.out, f"{title(path, args.runs).replace('/', '-')}-{nfe}nfe.npz"), x, y)
        if nfe == "teacher":
            tools.references[key] = Reference(*moments.mean_and_covariance(), f)
        elif x.ndim == 4 and key not in tools.references:
            tools.references[key] = load_reference(args, cfg, tools.features)
        if RANK:
            continue
        row = {} if error is None else dict(ode_error=error.mean().sqrt().item())
        row |= (measure_points(x, noise, y, nfe, cfg) if x.ndim == 2 else {} if nfe == "teacher" else
                measure_images(moments, f, p, tools.references[key]))
        if score is not None:
            row |= dict(zip(("clip_score", "aesthetic_score"), score.double().mean(0).tolist()))
        picture = common.density(x, 160) if x.ndim == 2 else common.grid(x[:SHOWN], SHOWN)
        row = columns | dict(nfe=nfe, n=n) | row
        results[str(path), nfe] = row, picture
    return results


def title(path, runs):
    """The path, without the folders that all runs share."""
    folders = [Path(run).resolve().parent for run in runs or [path]]
    return os.path.relpath(Path(path).resolve(), os.path.commonpath(folders))


def table(rows):
    """Markdown."""
    def cell(value):
        if isinstance(value, list):
            return f"{min(value):.3f}-{max(value):.3f}"
        return f"{value:.5g}" if isinstance(value, float) else str(value)
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([cell(row.get(name, "")) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values, digits):
    """Mean (lowest-highest)."""
    return f"{sum(values) / len(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def train_once(command, out):
    """Run `SCRIPT.py FLAGS --out OUT` in a process of its own, on one thread. OUT keeps the command, and is
    left alone if it is the same."""
    kept = Path(out, "command.txt")
    if not kept.exists() or kept.read_text() != command:
        kept.unlink(missing_ok=True)
        script, *flags = command.split()
        path = str(Path(__file__).with_name(script))
        command = [sys.executable, path, *flags, "--out", out, "--overwrite"]
        environment = os.environ | dict(OMP_NUM_THREADS="1")
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            fail(f"{' '.join(command)} stopped: {done.stderr.strip().splitlines()[-1]}")
        kept.write_text(" ".join([script, *flags]))
    return out


def toy(args, tools):
    """Every mode of every script on the ring, with equal steps, batch, network and seeds. A run of
    multistep_cm.py is made for one number of steps, so there is one for each. Finished runs are kept."""
    runs = [(script, mode, seed, k) for seed in range(args.seeds) for script in TOY for mode in TOY[script]
            for k in (args.nfe if script == "multistep_cm" else (0,))]

    def train(run):
        script, mode, seed, k = run
        out = f"{args.out}/{script}-{mode}{f'-{k}' if k else ''}-{seed}"
        extra = dict(multistep_cm=f" --student_steps {k}", sct=f" --stage_steps {args.toy // 20}")
        return train_once(f"{script}.py --mode {mode} --steps {args.toy} --batch 256 --seed {seed}"
                          + extra.get(script, ""), out)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        outs = list(tqdm(pool.map(train, runs), total=len(runs), desc="train", unit="run", disable=None))
    rows, sheet = {}, {}
    for (script, mode, _, k), out in tqdm(zip(runs, outs), total=len(runs), desc="sample", disable=None):
        for (_, nfe), (row, picture) in evaluate(out, (k,) if k else args.nfe, args, tools, "cpu").items():
            rows.setdefault((script, mode), []).append(row)
            sheet.setdefault(f"{script} {mode}, {nfe} NFE", picture)  # that of the first seed
    lines, fastest = [], min(row["seconds"] for row in rows["scm", "diffusion"])
    for (script, mode), mine in rows.items():
        line = {}
        for nfe in args.nfe:
            at_nfe = [row["energy_distance"] for row in mine if row["nfe"] == nfe]
            line[f"energy distance, {nfe} NFE"] = spread(at_nfe, 5)
        if 1 in args.nfe:
            line["E"] = spread([row["ode_error"] for row in mine if row["nfe"] == 1], 4)
        line["cost"] = f"{min(row['seconds'] for row in mine) / fastest:.1f}"  # of a step, over diffusion's
        lines.append(dict(method=script, mode=mode) | line)
    values = sum(rows.values(), [])
    floor = max(row.get("exact_ode", 0) for row in values)  # the same in all rows, as is the noise
    lines.append({"method": "exact ODE", f"energy distance, {args.nfe[0]} NFE": f"{floor:.5f}"})
    return lines, values, sheet


def parse_args(argv):
    parser = argparse.ArgumentParser("eval.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("runs", nargs="*", help="run folders, or .npz files of samples")
    parser.add_argument("--nfe", type=int, nargs="+", default=[1, 2, 4], help="network evaluations [1 2 4]")
    parser.add_argument("--samples", type=int, default=5000, help="samples of a run [5000]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise that samples start from [0]")
    parser.add_argument("--batch", type=int, default=250, help="samples that a process takes at once [250]")
    parser.add_argument("--reference", help="images, statistics, or teacher [each run's own data]")
    parser.add_argument("--image_size", type=int, default=0, help="size of --reference [the run's]")
    parser.add_argument("--features", default="pixels", help="inception, dinov2, pixels, or a file [pixels]")
    parser.add_argument("--weights", help="file or folder of inception's or dinov2's weights [download]")
    parser.add_argument("--prompts", help="text file, a prompt a line, for text-to-image runs")
    parser.add_argument("--clip", help="folder or hub id [openai/clip-vit-large-patch14]")
    parser.add_argument("--aesthetic", help="LAION's predictor, a .pth file [download]")
    parser.add_argument("--write", action="store_true", help="write the samples to --out, as ADM's .npz")
    parser.add_argument("--toy", type=int, default=0, metavar="STEPS", help="compare everything on the toy")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of --toy [3]")
    parser.add_argument("--jobs", type=int, default=1, help="runs of --toy at a time [1]")
    parser.add_argument("--out", help="folder to write to [the first run's, or out/toy]")
    args = parser.parse_args(argv)
    if min(args.nfe + [args.samples - 1, args.batch, args.seeds, args.jobs]) < 1:
        fail("--samples must be at least 2, --nfe, --batch, --seeds and --jobs at least 1")
    if bool(args.runs) == bool(args.toy) or args.toy and WORLD > 1:
        fail("give the run folders to compare, or --toy STEPS (with --jobs, not under torchrun)")
    with reading(f"cannot read --reference {args.reference}"):
        if args.reference not in (None, "teacher") and not Path(args.reference).exists():
            fail(f"there is no --reference {args.reference}")
    first = Path((args.runs or ["out/toy"])[0])
    args.out = args.out or str(first.parent if first.suffix else first)
    return args


def main(argv=None):
    args = parse_args(argv)
    device = common.start_processes("gloo")
    for path in args.runs:  # so that a typo is found before hours of sampling
        read_npz(path) if path.endswith(".npz") else common.read_checkpoint(path)
    tools = SimpleNamespace(features=feature_network(args.features, args.weights, device), references={},
                            solved={}, prompts=read_prompts(args.prompts), scores=None)
    tools.scores = text_scores(args, device) if tools.prompts else None
    if args.toy:
        rows, values, sheet = toy(args, tools)
    else:
        results = {}
        for path in args.runs:
            results |= evaluate(path, args.nfe, args, tools, device)
        rows = values = [row for row, _ in results.values()]
        sheet = {f"{title(path, args.runs)}, {nfe} NFE": image for (path, nfe), (_, image) in results.items()}
    if RANK == 0:
        print(table(rows))
        text = json.dumps(values, indent=1).encode()
        common.atomic_write(Path(args.out, "eval.json"), lambda file: file.write(text))
        across = 2 * len(args.nfe) if args.toy else len(args.nfe) if "energy_distance" in values[0] else 1
        common.panels(sheet, Path(args.out, "eval.png"), across)


if __name__ == "__main__":
    main()
