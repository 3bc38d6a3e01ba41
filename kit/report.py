"""Pictures, the report at the end of training, --sample and --export."""
from common import Draw, ode_times, solve
from kit.config import dataset, to_pixels
from kit.data import keep_apart
from kit.metrics import energy_distance, rms
from kit.process import HINTS, RANK, alone, atomic_write, fail, progress, reading
from kit.teachers import load_net, read_checkpoint
from kit.text import TextToImage
from kit.toys import Mixture, exact_ode

import contextlib
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from tqdm import tqdm


def panels(columns, path, across=0):
    """PNG of titled panels, all in one row, or `across` in each. A panel is points (N, 2), drawn as a
    density; images (N, 3, H, W) uint8, drawn as a grid; or a picture."""
    picture = side_by_side(columns, across)
    atomic_write(path, lambda file: picture.save(file, "PNG"))


def side_by_side(columns, across=0):
    """The picture of `panels`."""
    pictures = [v if isinstance(v, Image.Image) else density(v) if v.ndim == 2 else grid(v)
                for v in columns.values()]
    width, height = (max(sizes) for sizes in zip(*(picture.size for picture in pictures)))
    across = across or len(pictures)
    longest = max(ImageFont.load_default(14).getlength(title) for title in columns)
    font = ImageFont.load_default(max(14, min(28, width // 18, 14 * width / longest)))
    head, rows = round(1.7 * font.size), -(-len(pictures) // across)  # head: pixels for a title
    sheet = Image.new("RGB", (across * (width + 8), rows * (height + head + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (title, picture) in enumerate(zip(columns, pictures)):
        left, top = i % across * (width + 8) + 4, i // across * (height + head + 4)
        sheet.paste(picture, (left, top + head))
        pen.text((left + width / 2, top + head / 2), title, "black", font, anchor="mm")
    return sheet


def animation(frames, title, path):
    """GIF of points (N, d) at several steps, {step: points}, that stays at the last one for a while."""
    first, *others = [side_by_side({f"{title}, step {step:,}": x}).quantize(64, Image.Quantize.FASTOCTREE)
                      for step, x in sorted(frames.items())]
    show = dict(append_images=others, duration=[500] * len(others) + [2500], loop=0)
    atomic_write(path, lambda file: first.save(file, "GIF", save_all=True, **show))


def density(points, size=480, half=1.0):
    """Points (N, d) -> density of their first two coordinates on [-half, half]^2, from white to dark blue on
    a square-root scale. Points (N, 1) are spread out in the other direction, which draws stripes."""
    if points.shape[1] == 1:
        points = torch.cat([points.cpu(), torch.linspace(-half, half, len(points))[:, None]], dim=1)
    counts, _, _ = np.histogram2d(*points.cpu().double().numpy().T[:2], size // 2, [[-half, half]] * 2)
    i = np.arange(size // 2)
    blur = np.exp(-0.5 * (i[:, None] - i) ** 2)  # by a bin, so that a single point is a soft dot
    blur /= blur.sum(1)
    level = np.sqrt(blur @ counts @ blur.T / (20 * len(points) / (size // 2) ** 2))
    level = Image.fromarray((255 * level.clip(0, 1).T[::-1]).astype(np.uint8))
    return ImageOps.colorize(level.resize((size, size), Image.BICUBIC), "white", (20, 40, 110))


def lines(paths, colours, marks=(), width=480, height=360, half=1.0):
    """Paths (N, T), from noise at the left to data at the right, as thin lines on [-half, half], each in its
    colour. `marks` are vertical lines, at shares of the way. Drawn at four times the size and reduced."""
    picture = Image.new("RGB", (4 * width, 4 * height), "white")
    pen = ImageDraw.Draw(picture)
    for mark in marks:
        pen.line([(4 * width * mark, 0), (4 * width * mark, 4 * height)], (205, 205, 205), 5)
    across = np.linspace(0, 4 * width, paths.shape[1])
    for path, colour in zip(paths.tolist(), colours):
        up = 2 * height * (1 - np.array(path) / half)
        pen.line(list(zip(across.tolist(), up.tolist())), colour, 4, joint="curve")
    picture, font = picture.resize((width, height), Image.BOX), ImageFont.load_default(16)
    for text, x, anchor in (("noise", 6, "ls"), ("data", width - 6, "rs")):
        ImageDraw.Draw(picture).text((x, height - 6), text, (90, 90, 90), font, anchor)
    return picture


def grid(images, columns=0):
    """uint8 (N, 3, H, W) -> one picture, about square or with so many columns. Small images are enlarged."""
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].repeat(1, 3, 1, 1)
    n, c, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    sheet = np.full((-(-n // columns) * h, columns * w, c), 255, np.uint8)
    for i, image in enumerate(images.cpu().numpy()):
        top, left = i // columns * h, i % columns * w
        sheet[top:top + h, left:left + w] = image.transpose(1, 2, 0)
    zoom = max(1, 48 // h, 96 // sheet.shape[1])
    return Image.fromarray(sheet).resize((sheet.shape[1] * zoom, sheet.shape[0] * zoom), Image.NEAREST)


def noise_and_labels(cfg, net, lo, hi, seed, device):
    """Where the net's samples lo..hi start: noise ~ N(0, sigma_d^2 I), labels, and a Draw for what follows.

    Labels are --label, or 0, 1, 2, ... in turn; None if there are no classes. Sample i has numbers of its
    own, whatever lo and hi are."""
    gen, shape, classes = Draw(seed, 0, lo, hi, device), net.options["shape"], net.options["classes"]
    noise = cfg.sigma_d * gen.normal(*shape)
    labels = torch.arange(lo, hi, device=device) % max(classes, 1)
    labels = torch.full_like(labels, cfg.label) if cfg.label >= 0 else labels
    return noise, labels if classes else None, gen


def reported(run, step):
    """Whether an earlier sitting of a resumed run has come to the end of this report."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        there = step == run.start and (run.out / f"samples-{step:06d}.png").exists()
        return there and json.loads((run.out / "metrics.json").read_text())["steps"] >= step
    return False


@torch.no_grad()
@alone()
def report(cfg, run, step, sample, net, data, teacher, nfes):
    """Draw and measure what the EMA network samples, at each number of network evaluations (NFE) in nfes.

    Points: the energy distance to fresh data of the samples, of the exact ODE's samples, and of other data;
    and the ODE error E, the RMS between samples of nfes[0] evaluations and the exact solution from the same
    noise. Images: the samples beside the teacher's. Writes samples-*.png and metrics.json, and of points
    samples.gif. For that, each tenth of the run keeps fewer of the same samples."""
    nfes = (35,) if cfg.mode == "diffusion" else nfes
    points, toy = len(data.shape) == 1, isinstance(data, Mixture)
    if points and cfg.gif and run.tenth(step) and RANK == 0:
        n = 2000 if nfes[0] < 10 else 500
        noise, y, gen = noise_and_labels(cfg, net, 0, n, 12345, run.device)
        run.frames[step] = sample(net, noise, y, nfes[0], cfg, gen)[:, :2].float().cpu()
    due = step == cfg.steps or step > 0 and step % cfg.sample_every == 0
    if RANK or not due or reported(run, step):
        return
    n = 5000 if points else 36 if data.shape[0] == 3 and data.shape[1] <= 64 else 4
    noise, y, gen = noise_and_labels(cfg, net, 0, n, 12345, run.device)
    columns = {}
    metrics = dict(seconds=round(time.time() - run.began, 1), steps=step)
    if step == cfg.steps:
        run.bar.n = step  # tqdm itself lags behind, and would end below 100 %
        run.bar.close()
    solves = toy and run.exact is None
    tqdm.write("drawing samples" + " and solving the ODE exactly, about 4 s" * solves)
    if points:
        fresh, other = (data.batch(Draw(cfg.seed, 2**32 + i, 0, n, run.device))[0] for i in (0, 1))
        columns, distances = {"data": fresh}, {"data": energy_distance(other, fresh)}
    if toy:
        if solves:  # the same in all reports of a run
            run.exact = exact_ode(data, noise, y, cfg.sigma_d)
        exact = columns["exact ODE"] = run.exact
        distances = {"ode": energy_distance(exact, fresh)} | distances
    elif isinstance(teacher, nn.Module) and not isinstance(teacher, TextToImage):  # that one needs guidance
        solved = solve(teacher, noise, ode_times(18, cfg.sigma_d), y, cfg.sigma_d)
        columns["teacher, 35 NFE"] = to_pixels(solved, cfg)
    for nfe in nfes:
        x = sample(net, noise, y, nfe, cfg, gen)
        columns[f"{cfg.mode}, {nfe} NFE"] = to_pixels(x, cfg)
        if points:
            distances[str(nfe)] = energy_distance(x, fresh)
        if toy:
            metrics.setdefault("ode_error", rms(x, exact))
    panels(columns, run.out / f"samples-{step:06d}.png")
    if points and cfg.gif:
        animation(run.frames, f"{cfg.mode}, {nfes[0]} NFE", run.out / "samples.gif")
    if points:
        metrics["energy_distance"] = distances
        run.log(step, **{k: v for k, v in metrics.items() if k == "ode_error"},
                energy_distance=distances[str(nfes[0])])
    atomic_write(run.out / "metrics.json", lambda file: file.write(json.dumps(metrics, indent=1).encode()))
    if points:
        print("energy distance to fresh data:  " + "  ".join(
            f"{k + ' NFE' if k.isdigit() else k} {v:.5f}" for k, v in distances.items()))
    if toy:
        print(f"ODE error E = {metrics['ode_error']:.4f}   (RMS of {nfes[0]} NFE against the exact solution)")
    print(f"{step} steps, {metrics['seconds']:.0f} s; wrote {run.out}/samples-{step:06d}.png")


def export(cfg):
    """--export FOLDER: the averaged network as model.safetensors, and config.json with the arguments of
    kit.networks.build, the script's name and the mode. Of a text-to-image run, its adapters. To load a
    network, and to sample from it in one call, takes no script:

        import json, torch
        from safetensors.torch import load_file
        from kit.networks import build

        options = json.load(open("exported/config.json"))["options"]
        net = build(options).eval()
        net.load_state_dict(load_file("exported/model.safetensors"))
        noise, t = torch.randn(1000, 2), torch.full((1000, 1), 1.5645)  # TrigFlow's largest angle
        x_0 = options["sigma_d"] * (t.cos() * noise - t.sin() * net(noise, t[:, 0]))"""
    keep_apart("--export", cfg.export, cfg.data)
    net, folder = load_net(cfg.out), Path(cfg.export)
    ours = {"model.safetensors", "config.json"}, {"pytorch_lora_weights.safetensors", "inference.json"}
    with reading(f"cannot write {folder}"):
        found = {path.name for path in folder.iterdir()} if folder.exists() else set()
        if found not in (set(), *ours) or found == ours[0] and '"script"' not in (
                folder / "config.json").read_text():  # transformers writes files of these names, too
            fail(f"--export {folder} holds other files: choose a new folder")
    if isinstance(net, TextToImage):
        folder.mkdir(parents=True, exist_ok=True)
        return net.export(folder, cfg.inference())
    from safetensors.torch import save
    known = read_checkpoint(cfg.out)
    if "diffusers" in known["options"]:
        fail(f"{cfg.out} is diffusers' own already: use its from_pretrained")
    about = dict(options=known["options"], script=known["script"], mode=cfg.mode)
    weights = save({k: v.contiguous() for k, v in net.state_dict().items() if not k.startswith("extra.")})
    atomic_write(folder / "model.safetensors", lambda file: file.write(weights))
    atomic_write(folder / "config.json", lambda file: file.write(json.dumps(about, indent=1).encode()))
    print(f"wrote {folder}/model.safetensors and config.json")


def write_npz(path, x, labels):
    """ADM's .npz: arr_0 holds points (N, D) or uint8 (N, H, W, 3), arr_1 the labels (N,) if there are any."""
    labels = {} if labels is None else dict(arr_1=labels.cpu().numpy())
    array = x.numpy() if x.ndim == 2 else x.permute(0, 2, 3, 1).numpy()
    atomic_write(path, lambda file: np.savez(file, arr_0=array, **labels))


def place(out):
    """The folder for what is sampled from --out: the run's, the file's, or out/NAME for a hub id or URL."""
    path = Path(out)
    with reading(f"cannot read {out}"):
        return str(path if path.is_dir() else path.parent if path.is_file() else Path("out", path.stem))


@torch.no_grad()
@alone()
def write_samples(cfg, sample):
    """--sample N --nfe K: write a picture (.png), or ADM's .npz."""
    if RANK:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = load_net(cfg.out, device=device)
    if isinstance(net, TextToImage):
        net.read([cfg.prompt or fail("--sample of a text-to-image run needs --prompt TEXT")])
    shape, classes = net.options["shape"], net.options["classes"]
    if cfg.label >= 0 and cfg.label >= classes:
        valid = f"the classes are 0..{classes - 1}" if classes else "the network has no classes"
        fail(f"--label {cfg.label}: {valid}")
    HINTS["memory"] = "--sample fewer, with other seeds"
    at_once, parts, labels = max(1, min(1024, 2**22 // math.prod(shape))), [], []  # 341 of 64 x 64 pixels
    lo, bar = 0, progress(total=cfg.sample, desc="sample")
    while lo < cfg.sample:
        part = lo, min(lo + at_once, cfg.sample)
        noise, y, gen = noise_and_labels(cfg, net, *part, cfg.seed, device)
        try:
            x = sample(net, noise, y, cfg.nfe, cfg, gen)
            parts.append((x.cpu(), to_pixels(x, cfg).cpu()))
        except (MemoryError, RuntimeError) as error:
            if at_once == 1 or not isinstance(error, MemoryError) and "memory" not in str(error):
                raise
            at_once = (at_once + 1) // 2  # sample i is the same, however many are drawn at once
            continue
        labels.append(y)
        lo = part[1]
        bar.update(len(x))
    bar.close()
    x, values = (torch.cat(column) for column in zip(*parts))
    path = Path(cfg.save or f"{place(cfg.out)}/samples.png")
    if len(shape) == 1:
        fresh, _ = dataset(cfg).batch(Draw(cfg.seed, 2**32, 0, min(len(x), 5000)))
        print(f"energy distance to fresh data, {cfg.nfe} NFE: {energy_distance(x[:5000], fresh):.5f}")
    if path.suffix == ".png":
        panels({f"{cfg.sample} samples, {cfg.nfe} NFE": values}, path)
    else:
        write_npz(path, values, torch.cat(labels) if classes else None)
    print(f"wrote {path}")
