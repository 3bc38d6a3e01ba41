"""Images on disk, and latents of them, as memory-mapped rows."""
from common import Draw
from kit.process import RANK, download, fail, reading
from kit.store import open_store, positions

import functools
import hashlib
import io
import json
import math
import os
import re
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageOps


def keep_apart(flag, path, data):
    """Ends the program if what --flag names lies in the folder of a dataset, whose pictures it would join."""
    with reading(f"{flag} {path}"):
        here = Path(path).resolve()
        if path and data and Path(data).is_dir() and Path(data).resolve() in (here, *here.parents):
            fail(f"{flag} {path} lies in --data {data}, whose pictures it would join: choose another")


def check_data(data, cfg, device):
    """Ends the program if a dataset is not what Config.own_dataset describes."""
    shape, classes = getattr(data, "shape", None), getattr(data, "classes", None)
    whole = isinstance(shape, tuple) and len(shape) in (1, 3) and all(type(n) is int and n > 0 for n in shape)
    if not whole or type(classes) is not int:
        fail(f"the data's shape must be (D,) or (C, H, W), and classes a number: not {shape} and {classes}")
    halvings = len(cfg.channel_mult) - 1
    if any(n % 2**halvings for n in shape[1:]):
        fail(f"the data's {shape[1]} x {shape[2]} cannot be halved {halvings} times (--channel_mult)")
    with reading("the data's batch(gen) does not return the tensors x0 and y"):
        x0, y = data.batch(Draw(0, 0, 0, 3, device))
        form, labels = (x0.dtype, tuple(x0.shape)), None if y is None else (y.dtype, tuple(y.shape))
    if form != (torch.float32, (3, *shape)) or not x0.isfinite().all():
        fail(f"the data's x0 must be finite float32 of shape (B, *{shape}), not {form}")
    known = labels == (torch.int64, (3,)) and int(y.min()) >= -1 and int(y.max()) < max(classes, 1)
    if cfg.conditional and (classes < 2 or not known) or y is not None and not known:
        fail(f"the data's labels must be int64 (B,) from -1 to {classes - 1}, or without --conditional None")


class Stored:
    """Images as rows of one array, in memory or memory-mapped, each with a label. Rows are uint8 pixels
    (N, 3, H, W), and x0 = pixels / 127.5 - 1."""
    channels = 3  # of a row

    def __init__(self, cfg, rows, labels, names=(), about=None):
        self.cfg = cfg
        self.rows = rows
        self.names, self.about = list(names), about or {}  # of the classes, if known; what the rows come from
        self.fingerprint = self.about.get("sources", "")
        self.labels = torch.as_tensor(np.array(labels), dtype=torch.int64)
        self.following, self.ahead, self.reader = None, {}, ThreadPoolExecutor(1)
        self.classes = int(self.labels.max()) + 1
        self.shape = tuple(rows.shape[1:])
        if rows.shape[1] != self.channels:
            fail(f"--data {cfg.data}: rows of shape {self.shape} are neither pixels nor latents")
        halvings = len(cfg.channel_mult) - 1
        if self.shape[1] % 2**halvings:
            fail(f"images of {self.shape[1]} pixels cannot be halved {halvings} times (--channel_mult): "
                 f"--image_size must be a multiple of {2**halvings}")
        if cfg.conditional and self.classes < 2:
            fail(f"--conditional needs labels, and {cfg.data or cfg.dataset} has none")

    def batch(self, gen):
        """x0 (B, C, H, W) float32, and y (B,) int64 or, unless cfg.conditional, None."""
        index = gen.index(len(self.rows), "cpu")
        known = self.ahead.pop(gen.place, None)
        rows = known.result() if known else self.fetch(index.numpy(), gen.device)
        following = self.following and self.following(*gen.place)
        if following:  # a thread reads the next batch while this one is computed
            self.ahead = {following: self.reader.submit(self.fetch_at, following, gen.device)}
        x0 = self.x0(rows.to(gen.device, non_blocking=True).float(), gen)
        if self.cfg.flip:
            x0 = torch.where(gen.chance(0.5).to(gen.device).view(-1, 1, 1, 1), x0.flip(3), x0)
        y = gen.labels(self.labels[index], self.cfg)
        return x0, y if y is None else y.to(gen.device, non_blocking=True)

    def fetch(self, index, device="cpu"):
        """Rows (B, ...) as they are stored; for a GPU in pinned memory, so that nobody waits for the copy."""
        rows = torch.from_numpy(np.array(self.rows[index]))
        return rows.pin_memory() if torch.device(device).type == "cuda" else rows

    def fetch_at(self, place, device):
        """The rows that batch() takes at this place, the seed, step and positions of a Draw."""
        return self.fetch(Draw(*place).index(len(self.rows)).numpy(), device)

    @functools.cached_property
    def by_class(self):
        """Row numbers, sorted by class, and where each class begins among them."""
        order = torch.argsort(self.labels, stable=True)
        return order.numpy(), torch.searchsorted(self.labels[order], torch.arange(self.classes + 1)).tolist()

    @functools.cached_property
    def converted(self):
        """x0 of all rows, sorted by class, if they take less than 2 GiB; else None."""
        if 4 * math.prod(self.rows.shape) >= 2**31:
            return None
        return self.x0(self.fetch(self.by_class[0]).float())

    def members(self, c, device, size=4096, limit=0, seed=0):
        """x0 of class c, or of all classes for -1, `size` images at a time; of a latent, its mean. With a
        limit, so many neighbours on disk from a place that depends on `seed`."""
        order, begins = self.by_class
        lo, hi = (0, len(order)) if c < 0 else begins[c:c + 2]
        if limit and limit < hi - lo:
            start = np.random.default_rng(seed).integers(hi - lo)
            part = order[lo + (start + np.arange(limit)) % (hi - lo)]
            yield self.x0(self.fetch(part, device).to(device).float())
            return
        for first in range(lo, hi, size):
            part = slice(first, min(first + size, hi))
            if self.converted is None:
                yield self.x0(self.fetch(order[part], device).to(device).float())
            else:
                yield self.converted[part].to(device)

    def x0(self, rows, gen=None):
        """Rows (B, ...) float32 -> x0."""
        return rows / 127.5 - 1

    @staticmethod
    def pixels(x, cfg):
        """x0 (B, 3, H, W) -> uint8, rounded."""
        return to_uint8(x)

    def to_pixels(self, x):
        return self.pixels(x, self.cfg)


class Latents(Stored):
    """Rows are an autoencoder's mean and standard deviation of a latent, (N, 8, h, w). x0 (4, h, w) is drawn
    anew from N(mean, std^2) each time, and normalized to standard deviation sigma_d."""
    channels = 8

    def __init__(self, cfg, rows, labels, names, about):
        super().__init__(cfg, rows, labels, names, about)
        self.shape, self.space = (4, *rows.shape[2:]), about.get("space", "signed")
        if cfg.space not in ("", self.space):
            fail(f"--data {cfg.data} holds latents normalized as {self.space}, and the teacher or --init "
                 f"knows those as {cfg.space}: encode the images for it, with --data IMAGES")
        cfg.space = self.space  # from now on the run, and what comes of it, knows
        if cfg.flip:
            fail("--flip is for pixels: the latent of a mirrored image is not the mirrored latent")

    def x0(self, rows, gen=None):
        mean, std = rows.chunk(2, dim=1)
        _, shift, scale = latent_space(self.cfg, rows.device)
        return (mean + (std * gen.normal(*self.shape) if gen else 0) - shift) * (self.cfg.sigma_d / scale)

    @staticmethod
    @torch.no_grad()
    def pixels(x, cfg):
        """x0 (B, 4, h, w) -> pixels (B, 3, H, W) uint8. EDM2's latents come from pixels in [0, 1], and its
        decoder cuts off what is behind the point. So must whatever is compared with its statistics."""
        name, shift, scale = latent_space(cfg, x.device)
        pixels = decode_latents(x.float() * (scale / cfg.sigma_d) + shift, autoencoder(cfg, x.device))
        return (pixels * 255).clamp(0, 255).to(torch.uint8) if name == "edm2" else to_uint8(pixels)


LATENT_SPACES = dict(  # mean and standard deviation by channel
    signed=((1.56, -0.695, 0.483, 0.729), (5.27, 5.91, 4.21, 4.31)),  # of pixels in [-1, 1] (sCM, App. G)
    edm2=((5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)))


def latent_space(cfg, device):
    """The name of the latents' normalization, and its mean and standard deviation, (4, 1, 1)."""
    name = cfg.space or "signed"
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


def decode_latents(z, vae):
    """One by one, because an autoencoder's activations are large."""
    return torch.cat([vae.decode(one[None]).sample for one in z])


def to_uint8(x):
    """Pixels (B, 3, H, W) in [-1, 1] -> uint8, rounded."""
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def image_folder(cfg):
    """--data, or data/DATASET: class folders or a zip of images, kept as pixels in data/cache."""
    usual = Path("data", cfg.dataset)
    root = Path(cfg.data or (usual if usual.exists() else usual.with_suffix(".zip")))
    if not cfg.data and not root.exists():
        fail(f"--dataset {cfg.dataset} needs --data PATH: class folders, or a zip")
    names, labels, read, classes = list_images(root)
    about = dict(sources=fingerprint(root, names), image_size=cfg.image_size)
    side = cfg.image_size or decode(names[0], read, 0).shape[1]

    def encode(part):
        images = [decode(name, read, cfg.image_size) for name in part]
        for name, image in zip(part, images):
            if image.shape != (3, side, side):
                fail(f"{name} is not {side} x {side} pixels: give --image_size to crop and resize")
        return np.stack(images)
    if cfg.conditional and labels.max() < 1:
        fail(f"--data {root} has fewer than two classes to condition on: put the images into class folders "
             "(of a zip, dataset.json names the classes), or add --conditional false")
    folder = Path("data/cache", f"{root.stem[:40]}-{cfg.image_size}-{about['sources'][:16]}")
    return open_store(folder, lambda: (names, labels, encode, classes), about, dry=is_dry(cfg))


def is_dry(cfg):
    """Whether data are only looked at; not every namespace that stands for a Config has this flag."""
    return getattr(cfg, "dry_run", False)


CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()


def cifar10(cfg):
    """CIFAR-10's training images: --data or data/cifar10, class folders or the official binary archive, which
    is downloaded if there is neither."""
    url, md5 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
    usual = Path("data/cifar10")
    path = Path(cfg.data or (usual if usual.exists() else "data/cifar-10-binary.tar.gz"))
    if cfg.image_size not in (0, 32):
        fail("--dataset cifar10 is 32 x 32 pixels; for other sizes unpack it and use --dataset folder")
    if path.is_dir():
        return image_folder(SimpleNamespace(**vars(cfg) | dict(data=str(path))))
    if not cfg.data:
        download(url, path, md5)

    def prepare():
        with reading(f"{path} is not cifar-10-binary.tar.gz; for a zip of images give --dataset folder"), \
                tarfile.open(path) as archive:
            files = sorted(n for n in archive.getnames() if re.search(r"data_batch_\d\.bin$", n))
            rows = np.concatenate([np.frombuffer(archive.extractfile(n).read(), np.uint8) for n in files])
            rows = rows.reshape(-1, 1 + 3 * 32 * 32)  # a label, then the planes of R, G and B
            if rows[:, 0].max() > 9:
                raise ValueError("labels above 9")
        return np.arange(len(rows)), rows[:, 0], lambda part: rows[part, 1:].reshape(-1, 3, 32, 32), CIFAR10
    about = dict(sources=fingerprint(path.parent, [path.name]))
    return open_store(Path("data/cache", f"cifar10-{about['sources'][:16]}"), prepare, about, dry=is_dry(cfg))


def latents(cfg, device):
    """imagenet512: latents from --data, which is a folder that holds them, EDM2's zip of them (read in
    place), or images in class folders. Images are encoded once, into data/imagenet512; for a teacher or
    --init from EDM2 its way, from pixels in [0, 1], into data/imagenet512-edm2. Returns what open_store
    does."""
    folder = Path("data/imagenet512-edm2" if cfg.space == "edm2" else "data/imagenet512")
    root = Path(cfg.data or folder)
    if RANK == 0:
        autoencoder(cfg, torch.device("cpu"))  # pictures need it: better missed now than at the end
    if root.suffix == ".zip":
        names, labels, read, classes = list_images(root, (".npy",))
        about = dict(space="edm2", sources=fingerprint(root, names))
        return LatentZip(root, names, read), labels, classes, about
    if (root / "about.json").exists():
        return open_store(root, lambda: fail(f"--data {root} lacks latents: give the images with --data"))
    if not cfg.data:
        fail(f"--dataset imagenet512: there are no latents in {folder}; give the images with --data")
    names, labels, read, classes = list_images(root)
    size, space = cfg.image_size or 512, cfg.space or "signed"
    about = dict(vae=cfg.vae, image_size=size, space=space, sources=fingerprint(root, names))
    if cfg.conditional and labels.max() < 1:
        fail(f"--data {root} has no classes to condition on: put the images into class folders")
    cfg.data = str(folder)  # what the run's config names from now on

    def prepare():
        vae = autoencoder(cfg, device)
        if is_dry(cfg):  # nothing is encoded; an autoencoder halves images between its levels
            side = size // 2 ** (len(vae.config.block_out_channels) - 1)
            return names, labels, lambda part: np.zeros((len(part), 8, side, side), np.float16), classes

        @torch.no_grad()
        def encode(part):
            x = torch.from_numpy(np.stack([decode(name, read, size) for name in part])).to(device).float()
            latent = vae.encode(x / 255 if space == "edm2" else x / 127.5 - 1).latent_dist
            return torch.cat([latent.mean, latent.std], dim=1).half().cpu().numpy()
        return names, labels, encode, classes
    return open_store(folder, prepare, about, batch=16, dry=is_dry(cfg))


class LatentZip:
    """EDM2's zip of latents, float32 (8, h, w) .npy, as an array that is read in place."""

    def __init__(self, root, names, read):
        self.root, self.names, self.read = root, names, read
        self.shape = (len(names), *self[[0]].shape[1:])

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        with reading(f"--data {self.root}: not EDM2's latents, float32 (8, h, w) .npy"):
            files = [self.names[i] for i in positions(index, len(self.names))]
            return np.stack([np.load(io.BytesIO(self.read(f)), allow_pickle=False) for f in files])


LEFTOVERS = ("__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir")  # of operating systems
OTHER_IMAGES = (".tif", ".tiff", ".gif", ".avif", ".heic", ".jfif", ".jp2")


def list_images(root, suffixes=(".png", ".jpg", ".jpeg", ".bmp", ".webp")):
    """Names, labels, read(name) -> bytes, and names of classes, of the images in class folders, or in EDM's
    layout with a dataset.json, a zip or a folder."""
    with reading(f"--data {root}: neither a folder nor a zip file"):
        archive = None if root.is_dir() else zipfile.ZipFile(root)
        found = list(walk(root)) if archive is None else archive.namelist()
    read = archive.read if archive else lambda name: (root / name).read_bytes()
    hidden = {name for name in found if any(part[0] == "." or part in LEFTOVERS for part in Path(name).parts)}
    names = sorted(name for name in found if name.lower().endswith(suffixes) and name not in hidden)
    other = [name for name in found if name.lower().endswith(OTHER_IMAGES) and name not in hidden]
    if RANK == 0 and (hidden or other):
        kinds = ", ".join(sorted({Path(name).suffix for name in other}))
        print(f"--data {root}: passed over are {len(hidden)} hidden files and {len(other)} images of other "
              "kinds" + f" ({kinds}), which would have to be converted" * bool(other))
    if not names:
        fail(f"--data {root}: no images ({', '.join(suffixes)}) in it")
    if "dataset.json" in found:
        with reading(f"--data {root}: its dataset.json does not give every image a whole number"):
            table = dict(json.loads(read("dataset.json")).get("labels") or {})
            labels = [table[name] if table else 0 for name in names]
            if not all(type(v) is int and 0 <= v < len(names) for v in labels):
                raise ValueError(labels[:9])
        return names, np.array(labels), read, [str(i) for i in range(max(labels) + 1)]
    if archive:
        return names, np.zeros(len(names), int), read, []
    tops = [Path(name).parts[0] if len(Path(name).parts) > 1 else "" for name in names]
    classes = sorted(set(tops))
    if "" in classes and len(classes) > 1:
        fail(f"--data {root}: images in class folders and beside them, such as {names[tops.index('')]}")
    number = {name: i for i, name in enumerate(classes)}
    return names, np.array([number[top] for top in tops]), read, [] if "" in classes else classes


def fingerprint(root, names, *more):
    """A hash of names and sizes of files in a folder, and of 1,000 of the files whole, or of names and
    checksums in a zip, and of what else counts. It does not depend on where they are, so a copy has the
    same."""
    with reading(f"--data {root}"):
        if root.is_dir():
            found = [(name, (root / name).stat().st_size) for name in names]
            spread = names[::-(-len(names) // 1000)]
            found += [hashlib.sha1((root / name).read_bytes()).hexdigest() for name in spread]
        else:
            with zipfile.ZipFile(root) as archive:
                found = [(name, archive.getinfo(name).file_size, archive.getinfo(name).CRC) for name in names]
    return hashlib.sha1(repr([found, *more] if more else found).encode()).hexdigest()


def walk(root):
    """Names of the files below root, also through symbolic links to folders, but never back to one above."""
    def stop(error):
        raise error
    for folder, folders, files in os.walk(root, onerror=stop, followlinks=True):
        above = os.path.realpath(os.path.dirname(os.path.abspath(folder))) + os.sep
        if above.startswith(os.path.realpath(folder) + os.sep):
            folders.clear()
        else:
            yield from (os.path.relpath(os.path.join(folder, file), root) for file in files
                        if os.path.isfile(os.path.join(folder, file)))  # a pipe would be waited for


def decode(name, read, size):
    """The image as uint8 (3, H, W), cropped and resized to size pixels, or as it is if size is 0."""
    with reading(f"cannot read the image {name}: repair or remove it"):
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(read(name))))
        if image.mode[0] in "IF":
            raise ValueError(f"{image.mode} pixels, only 8-bit images are read")
        image = image.convert("RGB")
    return np.asarray(centre_crop(image, size) if size else image).transpose(2, 0, 1)


def read_image(path, shape):
    """Image file -> (1, C, H, W) in [-1, 1]; None for "". Ends the program unless it has the network's
    size."""
    if not path:
        return None
    with reading(f"cannot read the image {path}"):
        image = Image.open(path)
        image.load()
    if image.size != tuple(shape[2:0:-1]) or image.mode not in ("RGB", "L", "1"):
        found = f"{image.width}x{image.height} {image.mode}"
        fail(f"{path} is {found}; the network needs {shape[2]}x{shape[1]} RGB or L")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5 - 1


def centre_crop(image, size):
    """ADM's crop: halve while the image is twice too large, resize its shorter side, cut out the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
