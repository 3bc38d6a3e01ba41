"""Compare runs: python eval.py RUN [RUN ...] --nfe 1 2 4 [--reference PATH] [--features FILE] [--n 5000]

Each run is sampled by the script that its checkpoint names, from its EMA weights and from the same noise for
all runs, sample by sample, so that the batch does not change a figure. Prints a Markdown table and writes
eval.json and eval.png into the first run's folder (--out for elsewhere).

2-D: energy distance (V-statistic) to fresh data; ODE error E, the RMS per element between the samples and the
exact PF-ODE solution from the same noise. Images: Frechet distance between n samples and all reference
images, which falls with n as every FID does, in the features of a TorchScript module (uint8 NCHW in, features
out), or of the pixels with --features pixels.
"""
import argparse
import importlib
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common

SCRIPTS = ("cm", "direct_cm", "multistep_cm", "sct", "scm")


class Moments:
    """Mean and covariance of features that arrive in batches, float64."""

    def __init__(self):
        self.n, self.sum, self.outer = 0, 0, 0

    def add(self, x):
        """x (B, d)."""
        x = x.double().cpu()
        self.n, self.sum, self.outer = self.n + len(x), self.sum + x.sum(0), self.outer + x.T @ x

    def mean_and_covariance(self):
        """(d,) and (d, d), the covariance unbiased (divided by n - 1)."""
        mean = self.sum / self.n
        return mean.numpy(), ((self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)).numpy()


def feature_network(name, device):
    """uint8 (B, 3, H, W) -> features (B, d)."""
    if name == "pixels":
        return lambda x: x.flatten(1).float() / 255
    if not Path(name).exists():
        common.fail(f"--features {name}: no such file; give a TorchScript module, or pixels")
    try:
        return torch.jit.load(name, map_location=device).eval()
    except RuntimeError as error:
        common.fail(f"--features {name} is no TorchScript module ({str(error).splitlines()[0][:80]})")


@torch.no_grad()
def draw_samples(path, nfe, n, batch, device):
    """n samples of a run, their initial noise and labels; sample i is the same for every n and batch."""
    ckpt = common.read_checkpoint(path)
    if ckpt["script"] not in SCRIPTS:
        common.fail(f"{path} names an unknown script, {ckpt['script']!r}")
    script = importlib.import_module(ckpt["script"])
    known = script.Config.__dataclass_fields__
    cfg = script.Config(**{k: v for k, v in ckpt["config"].items() if k in known})
    net, samples, noises, labels = common.load_net(path).to(device), [], [], []
    for lo in tqdm(range(0, n, batch), desc=f"{path}, {nfe} NFE", leave=False, disable=None):
        noise, y, gen = common.noise_and_labels(cfg, net, lo, min(lo + batch, n), 0, device)
        noises.append(noise.cpu())
        labels.append(y if y is None else y.cpu())
        samples.append(script.sample(net, noise, y, nfe, cfg, gen).cpu())
    labels = None if labels[0] is None else torch.cat(labels)
    return torch.cat(samples), torch.cat(noises), labels, cfg, ckpt["step"] * cfg.batch


def main(argv=None):
    parser = argparse.ArgumentParser("eval.py", description=__doc__.splitlines()[0])
    parser.error = common.fail
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--nfe", type=int, nargs="+", default=[1, 2], help="network evaluations [1 2]")
    parser.add_argument("--n", type=int, default=5000, help="samples [5000]")
    parser.add_argument("--batch", type=int, default=250, help="samples at a time [250]")
    parser.add_argument("--reference", help="class folder or zip of images [the run's data]")
    parser.add_argument("--features", default="pixels", help="TorchScript file, or pixels [pixels]")
    parser.add_argument("--out", help="folder for eval.json and eval.png [the first run's]")
    args = parser.parse_args(argv)
    if min(args.nfe + [args.n, args.batch]) < 1:
        common.fail("--nfe, --n and --batch must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, columns, references = [], {}, {}
    for path in args.runs:
        for nfe in args.nfe:
            x, noise, y, cfg, seen = draw_samples(path, nfe, args.n, args.batch, device)
            row = dict(run=str(path), mode=cfg.mode, samples_seen=seen, nfe=nfe)
            if x.ndim == 2:
                data = common.dataset(cfg)
                fresh, _ = data.batch(common.Draw(cfg.seed, 2**32, 0, args.n))
                times = common.ode_times(512, cfg.sigma_d)
                exact = common.solve(data, noise.double(), times, y, cfg.sigma_d)
                row["energy_distance"] = common.energy_distance(x, fresh)
                if nfe == 1 or cfg.mode == "diffusion":  # more steps add fresh noise: other samples, no error
                    row["ode_error"] = float((x.double() - exact).square().mean().sqrt())
            else:
                x = common.Images.to_uint8(x)
                features = feature_network(args.features, device)
                key = args.reference or (cfg.dataset, cfg.data, cfg.image_size)
                if key not in references:
                    images = reference_images(args.reference, cfg)
                    references[key] = statistics(images, features, args.batch, device)
                ours = statistics(x, features, args.batch, device)
                row["frechet_distance"] = common.frechet_distance(*ours, *references[key])
            rows.append(row)
            columns[f"{Path(path).name}, {nfe} NFE"] = x[:36] if x.ndim > 2 else x
    names = list(dict.fromkeys(name for row in rows for name in row))
    print("| " + " | ".join(names) + " |\n|" + " --- |" * len(names))
    for row in rows:
        print("| " + " | ".join(f"{row.get(k):.5g}" if isinstance(row.get(k), float) else str(row.get(k, ""))
                                for k in names) + " |")
    out = Path(args.out or args.runs[0])
    common.atomic_write(out / "eval.json", lambda file: file.write(json.dumps(rows, indent=1).encode()))
    common.panels(columns, out / "eval.png")


def reference_images(path, cfg):
    """uint8 (N, 3, H, W): the images in path, or the run's own training data."""
    if path:
        cfg.dataset, cfg.data = "folder", path
    return common.dataset(cfg).images


def statistics(images, features, batch, device):
    """Mean and covariance of the features of uint8 images (N, 3, H, W)."""
    moments = Moments()
    with torch.no_grad():
        for lo in tqdm(range(0, len(images), batch), desc="features", leave=False, disable=None):
            moments.add(features(torch.tensor(np.asarray(images[lo:lo + batch])).to(device)))
    return moments.mean_and_covariance()


if __name__ == "__main__":
    main()
