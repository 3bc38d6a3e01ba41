"""Compare runs: python eval.py out/scm out/cm --nfe 1 2 4 [--features inception] [--samples 50000]

Each run is sampled by the script that its checkpoint names, from its EMA weights, and from the same noise as
all others. Sample i depends on i alone, so neither --batch nor the number of processes (torchrun) changes it.
An .npz of samples in ADM's layout may stand for a run, too; --write writes one for each run and NFE, which
guided-diffusion's evaluator and dgm-eval read. Prints a Markdown table and writes eval.json and eval.png.

    python eval.py out/direct_cm/cm out/direct_cm/direct --reference teacher
    python eval.py out/sdxl --prompts FILE --reference teacher --features inception

compare with what the runs' teacher samples, by the script's own solver if it has one; that is Direct CM's
Table 1. Images start from the same noise, as in the paper. Points start from other noise, because from the
same noise whoever solves the ODE would have distance 0, whatever the samples look like.

points  energy_distance     V-statistic between n samples and n fresh points: biased, above 0 even for data
        sliced_wasserstein  root mean square W_2 over 128 directions, n samples and n fresh points: biased
        precision, recall   k = 3 nearest neighbours; at most 10,000 samples and fresh points
        mode_shares         share of the samples within 4 standard deviations of each mode
        ode_error           RMS per element between samples and the exact solution from the same noise, or
                            with --reference teacher (also of images) the teacher's
        exact_ode           the energy distance of that solution, below which no student is to come
images  frechet_distance    n samples, all reference images, covariances over n - 1: biased, falls with n;
                            the FID with --features inception and n = 50,000 (which resizes to 299 itself)
        inception_score     exp E KL(p(y|x) || p(y)), mean of 10 splits: biased; needs class probabilities
        kid                 MMD^2 with kernel (x.y / d + 1)^3, U-statistic: unbiased; at most 10,000 of each
        precision, recall   as of points
text    clip_score          mean cosine of CLIP ViT-L/14's image and prompt, resized to 224 by its processor
        aesthetic_score     mean of LAION's linear predictor on CLIP's normalized image features
"""
import common
import kit
from kit.config import foreign_values, make_config
from kit.data import keep_apart
from kit.features import feature_network, text_scores
from kit.metrics import (Moments, Reference, energy_distance, image_metrics, mode_shares, precision_recall,
                         rms, sliced_wasserstein)
from kit.process import RANK, atomic_write, fail, reading, start_processes
from kit.reference import KEEP, adm_samples, gather, load_reference, read_npz, rounds
from kit.report import density, grid, write_npz
from kit.toys import Mixture, exact_ode

import argparse
import functools
import importlib
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import torch

SHOWN = 16  # images of a run in the picture
# What a teacher's samples depend on.
TEACHING = ("teacher", "pretrained", "first_label", "solver", "intervals", "guidance", "sigma_d", "dataset",
            "conditional")
# Other projects' consistency models, and the scripts that sample them.
FOREIGN = dict(ECMPrecond="sct", CMStochasticIterativeScheduler="cm")


# ------------------------------------------------------------------------------------------------- samples
class Run:
    """A run folder or checkpoint: what the table says of it, and its samples.

    A part of the samples is a dict of x, (B, D) or uint8 (B, 3, H, W), x0 behind it, the noise, and y unless
    there are no labels."""

    def __init__(self, path, prompts, seed, device):
        ckpt = kit.read_checkpoint(path)
        name = FOREIGN.get(ckpt["script"], "scm" if ckpt.get("foreign") else str(ckpt["script"]))
        # a script beside this file, and nothing else, may be imported
        if not re.fullmatch(r"[\w -]+", name) or not Path(__file__).with_name(name + ".py").exists():
            fail(f"{path} names an unknown script, {name!r}")
        self.path, self.seed, self.device = path, seed, device
        self.script = importlib.import_module(name)
        if not all(hasattr(self.script, part) for part in ("Config", "LOSSES", "sample")):
            fail(f"{path} names {name}.py as its script, which is none")
        self.cfg = make_config(self.script.Config, ckpt["config"] | foreign_values(self.script.Config, ckpt))
        self.columns = dict(run=str(path), method=name, mode=self.cfg.mode, seconds=round(ckpt["seconds"]),
                            samples_seen=ckpt["step"] * self.cfg.batch)
        self.net = kit.load_net(path, device=device)
        self.images = len(self.net.options["shape"]) == 3
        if hasattr(self.net, "read"):
            self.net.read(prompts or fail(f"{path} draws from text: give --prompts FILE"))

    def draw(self, sample, nfe, lo, hi):
        noise, y, gen = self.start(lo, hi, self.seed)
        return self.part(sample(self.net, noise, y, nfe, self.cfg, gen), noise, y)

    def draw_teacher(self, lo, hi, seed):
        noise, y, _ = self.start(lo, hi, seed)
        return self.part(self.solution(noise, y), noise, y)

    def start(self, lo, hi, seed):
        return kit.noise_and_labels(self.cfg, self.net, lo, hi, seed, self.device)

    def part(self, x0, noise, y):
        x = kit.to_pixels(x0, self.cfg)
        found = dict(x=x.cpu(), x0=x0.cpu(), noise=noise.cpu())
        return found if y is None else found | dict(y=y.cpu())

    def sampler(self, nfe):
        """The script's. One that measures something on the data beforehand does that here."""
        if getattr(self.cfg, "x_var_data", False):
            return self.script.measured(self.net, self.data, nfe, self.cfg, self.device)
        return self.script.sample

    @functools.cached_property
    def data(self):
        return kit.dataset(self.cfg, self.device)

    @functools.cached_property
    def teacher(self):
        """Without the data, if it is no part of them."""
        data = self.data if len(self.net.options["shape"]) == 1 else SimpleNamespace(**self.net.options)
        if hasattr(self.net, "sibling"):
            data.teacher = self.net.sibling(adapted=False)
        return kit.load_teacher(self.cfg, data, self.device) or fail(f"{self.path} has no --teacher")

    def solution(self, noise, y):
        """The teacher's samples: by the script's own solver, or by 35 network evaluations of Heun's."""
        if hasattr(self.script, "solution"):
            return self.script.solution(self.teacher, noise, y, self.cfg)

        def guided(x, t, y):
            F, w = self.teacher(x, t, y), getattr(self.cfg, "guidance", 1)
            return F if w == 1 else common.guide(F, self.teacher(x, t, torch.full_like(y, -1)), w)
        return common.solve(guided, noise, common.ode_times(18, self.cfg.sigma_d), y, self.cfg.sigma_d)


class File:
    """An .npz of samples in ADM's layout, which stands for a run."""
    cfg = None

    def __init__(self, path):
        self.x = torch.from_numpy(adm_samples(read_npz(path), path))
        self.path, self.columns, self.images = path, dict(run=str(path)), self.x.ndim == 4

    def sampler(self, nfe):
        return None

    def draw(self, sample, nfe, lo, hi):
        return dict(x=self.x[lo:hi])


def collect(draw, n, args, tools, desc):
    """n samples, of draw(lo, hi), on rank 0: of points all of them, of images their moments, the first
    features, and the first images, or all that --write needs. Also their scores, by name. Each process
    measures its own."""
    moments, held = Moments(), {}
    for lo, hi in rounds(n, args.batch, desc):
        if lo == hi:
            continue
        part = held[lo] = draw(lo, hi)
        part.pop("x0", None)
        if part["x"].ndim == 4:
            part |= tools.features(part["x"])
            part |= tools.scores(part["x"], tools.prompts[lo:hi]) if tools.scores else {}
            moments.add(part["features"])
            part["features"] = part["features"][:max(KEEP - lo, 0)].clone()
            part["x"] = part["x"] if args.write else part["x"][:max(SHOWN - lo, 0)].clone()
            part.pop("noise", None)
    return gather(moments, held)


# ---------------------------------------------------------------------------------------------------- main
@torch.no_grad()
def evaluate(path, nfes, args, tools, device):
    """Rows of the table and pictures of a run, {(run, NFE): (row, picture)}; filled on rank 0 alone."""
    if str(path).endswith(".npz"):
        run, nfes = File(path), ("",)
    else:
        run = Run(path, tools.prompts, args.seed, device)
    n = min(args.samples, len(getattr(run, "x", range(args.samples))))
    n = min(n, len(tools.prompts or range(n)))
    if n < 2:
        fail(f"{path}: {n} samples have no spread to measure: at least 2 are needed")
    found, solved, reference = {}, {}, None
    if args.reference == "teacher":
        solved, reference, row = teacher_samples(run, n, args, tools)
        found |= row
    elif run.images:
        reference = image_reference(run, args, tools)  # before the sampling, in case it cannot be read
    for nfe in nfes:
        sample = run.sampler(nfe)

        def draw(lo, hi, nfe=nfe, sample=sample):
            part = run.draw(sample, nfe, lo, hi)
            if lo in solved:
                part["error"] = (part["x0"] - solved[lo]).double().square().flatten(1).mean(1)
            return part
        samples = collect(draw, n, args, tools, f"{path}, {nfe} NFE")
        found[str(path), nfe] = measure(run, samples, nfe, n, reference, args, tools)
    return {key: value for key, value in found.items() if value}


def teacher_samples(run, n, args, tools):
    """--reference teacher: the teacher's x0 of this process by its first row; the Reference for images, or
    points; and the teacher's own row of the table, unless an earlier run has the same teacher."""
    if not run.cfg:
        fail(f"--reference teacher: {run.path} holds samples and names no teacher")
    key = n, *(str(getattr(run.cfg, name, "")) for name in TEACHING)
    if key in tools.teachers:
        return *tools.teachers[key], {}
    solved = {}

    def draw(lo, hi):
        part = run.draw_teacher(lo, hi, args.seed)
        solved[lo] = part["x0"]
        return part | dict(error=torch.zeros(hi - lo, dtype=torch.float64))
    samples, reference = collect(draw, n, args, tools, f"{run.path}, teacher"), None
    if not run.images:
        other = collect(lambda lo, hi: run.draw_teacher(lo, hi, args.seed + 1), n, args, tools, "reference")
        reference = other.get("x")
    elif RANK == 0:
        reference = Reference(*samples["moments"].mean_and_covariance(), samples["features"])
    tools.teachers[key] = solved, reference
    row = measure(run, samples, "teacher", n, reference, args, tools)
    return solved, reference, {(str(run.path), "teacher"): row}


def measure(run, samples, nfe, n, reference, args, tools):
    """The row of the table and the picture of some samples; None but on rank 0."""
    if RANK:
        return None
    x, row = samples["x"], dict(run.columns, nfe=nfe, n=n)
    if args.write:
        name = f"{title(run.path, args.runs).replace('/', '-')}-{nfe}nfe.npz"
        write_npz(Path(args.out, name), x, samples.get("y"))
    if "error" in samples:
        row["ode_error"] = samples["error"].mean().sqrt().item()
    if x.ndim == 2:
        row |= point_metrics(run, samples, nfe, reference, args, tools)
    elif nfe != "teacher":
        row |= measure_images(samples, reference)
        if n <= len(reference.mean):
            row["note"] = f"{n} samples for {len(reference.mean)} features: the distance is biased upwards"
    if n < args.samples:
        row["note"] = "; ".join(filter(None, [row.get("note"), f"{n} samples instead of {args.samples}"]))
    row |= {name: samples[name].double().mean().item() for name in ("clip_score", "aesthetic_score")
            if name in samples}
    return row, density(x, 320) if x.ndim == 2 else grid(x[:SHOWN], SHOWN)


def measure_images(samples, reference):
    size = tuple(samples["x"].shape[1:])
    if reference.shape not in (None, size):
        way = f"give --image_size {size[1]}" if size[1] == size[2] else "give images of that shape"
        fail(f"samples have the shape {size} and the images of --reference {reference.shape}: {way}")
    if len(reference.mean) != samples["features"].shape[1]:
        fail(f"--reference has {len(reference.mean)} features an image, --features gives "
             f"{samples['features'].shape[1]}")
    return image_metrics(samples["moments"], samples["features"], samples.get("probabilities"), reference)


def point_metrics(run, samples, nfe, reference, args, tools):
    """Against fresh data and the exact ODE, or against the points that the teacher samples."""
    if not run.cfg:
        fail("points from a file say nothing of their data: give the run's folder")
    if reference is None and args.reference:
        fail(f"--reference {args.reference} is for images, and {run.path} samples points")
    x, data, cfg = samples["x"], kit.dataset(run.cfg), run.cfg
    fresh = data.batch(common.Draw(0, 2**32, 0, len(x)))[0] if reference is None else reference
    row = dict(energy_distance=energy_distance(x, fresh), sliced_wasserstein=sliced_wasserstein(x, fresh))
    row |= precision_recall(x[:KEEP], fresh[:KEEP])
    if not isinstance(data, Mixture):
        return row
    row["mode_shares"] = mode_shares(x, data)
    segments = getattr(cfg, "student_steps", 0) or getattr(cfg, "phases", 1) > 1
    if reference is None and (nfe == 1 or cfg.mode == "diffusion" or segments):
        # the others add noise, so they solve no ODE
        key = type(cfg).__module__, cfg.dataset, cfg.sigma_d, cfg.conditional, cfg.label, args.seed, len(x)
        if key not in tools.exact:  # what all runs from this noise share
            exact = exact_ode(data, samples["noise"], samples.get("y"), cfg.sigma_d)
            tools.exact[key] = exact, energy_distance(exact, fresh)
        exact, floor = tools.exact[key]
        row |= dict(ode_error=rms(x, exact), exact_ode=floor)
    return row


def image_reference(run, args, tools):
    """The Reference of --reference, or of the run's own data; loaded once for all runs that have the same."""
    size = args.image_size or getattr(run.cfg, "image_size", 0)
    key = args.reference or run.cfg and (type(run.cfg).__module__, run.cfg.dataset, run.cfg.data), size
    if key not in tools.references:
        tools.references[key] = load_reference(args, run.cfg, tools.features)
    return tools.references[key]


def read_prompts(path):
    """Lines of a text file; None without one."""
    if not path:
        return None
    with reading(f"cannot read --prompts {path}"):
        lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    return lines or fail(f"--prompts {path} is empty")


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


def parse_args(argv):
    parser = argparse.ArgumentParser("eval.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("runs", nargs="+", help="run folders, or .npz files of samples")
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
    parser.add_argument("--out", help="folder to write to [the first run's]")
    args = parser.parse_args(argv)
    least = args.samples - 1, args.batch, args.image_size + 1, args.seed + 1
    if args.samples > 10**8 or min(*args.nfe, *least) < 1:
        fail("--samples must be at least 2 and at most 10^8, --nfe and --batch at least 1, --image_size and "
             "--seed at least 0")
    with reading(f"cannot read --reference {args.reference}"):
        if args.reference not in (None, "teacher") and not Path(args.reference).exists():
            fail(f"there is no --reference {args.reference}")
    args.out = args.out or kit.place(args.runs[0])
    return args


def main(argv=None):
    args = parse_args(argv)
    device = start_processes("gloo")
    for path in args.runs:  # so that a typo is found before hours of sampling
        known = {} if path.endswith(".npz") and read_npz(path) else kit.read_checkpoint(path)["config"]
        for data in (args.reference, known.get("data")):  # pictures to be compared, or trained on
            keep_apart("--out", args.out, data)
    with reading(f"--out {args.out} is no folder to write to"):
        Path(args.out).mkdir(parents=True, exist_ok=True)
    tools, found = make_tools(args, device), {}
    try:
        for path in args.runs:
            found |= evaluate(path, args.nfe, args, tools, device)
    finally:  # whatever stops a later run leaves the table of those before
        if RANK == 0 and found:
            write_table(found, args)


def write_table(found, args):
    rows = [row for row, _ in found.values()]
    sheet = {f"{title(path, args.runs)}, {nfe} NFE": image for (path, nfe), (_, image) in found.items()}
    text = json.dumps(rows, indent=1).encode()
    atomic_write(Path(args.out, "eval.json"), lambda file: file.write(text))
    kit.panels(sheet, Path(args.out, "eval.png"), len(args.nfe) if "energy_distance" in rows[0] else 1)
    print(table(rows), flush=True)


def make_tools(args, device):
    """What all runs share: feature network, scores, prompts, and what the first of them has found."""
    features, prompts = feature_network(args.features, args.weights, device), read_prompts(args.prompts)
    return SimpleNamespace(features=features, prompts=prompts, references={}, teachers={}, exact={},
                           scores=text_scores(args.clip, args.aesthetic, device) if prompts else None)


if __name__ == "__main__":
    main()
