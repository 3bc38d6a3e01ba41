"""Rows of images, latents or embeddings on disk: made once, by all processes together, then read in place."""
from kit.process import agreed, atomic_write, barrier, fail, lock_folder, progress, reading, share, together

import contextlib
import json
import time

import numpy as np

PART = 1024  # rows of a file


class Parts:
    """Rows (N, ...) that lie in files of PART rows each, read in place."""

    def __init__(self, files):
        self.files = [np.load(path, mmap_mode="r") for path in files]
        self.dtype = self.files[0].dtype
        self.shape = (sum(map(len, self.files)), *self.files[0].shape[1:])

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        """The rows of a slice, or of an array of numbers, or the row of one; -1 is the last."""
        if isinstance(index, int):
            return self[[index]][0]
        index = positions(index, len(self))
        rows = np.empty((len(index), *self.shape[1:]), self.dtype)
        for part in np.unique(index // PART):
            here = index // PART == part
            rows[here] = self.files[part][index[here] % PART]
        return rows

    def __array__(self, dtype=None, copy=None):
        return self[:].astype(dtype or self.dtype, copy=False)


def positions(index, n):
    """A slice, or numbers down to -n, as numbers from 0 to n - 1, (k,)."""
    if isinstance(index, slice):
        return np.arange(*index.indices(n))
    index = np.asarray(index)
    if len(index) and not -n <= index.min() <= index.max() < n:
        raise IndexError(f"one of {index} in {n} rows")
    return index % n


def open_store(folder, prepare, about=None, batch=256, dry=False):
    """Rows, labels, names of classes, and what they were made from, kept in `folder`. What is missing is
    written first.

    prepare() -> (names, labels, encode, classes), with encode(some names) -> their rows. Rows lie in files of
    PART rows; all processes write them in turn, each file whole or not at all. So a killed writer goes on
    where it stopped, with any number of processes, and two computers never write to one file. A folder made
    from something else than `about` is refused. With `dry`, one row is encoded and stands for all, and
    nothing is written."""
    def load():
        """What open_store returns; None if something is not there, or damaged and to be made anew."""
        if not (folder / "about.json").exists():
            return None
        with reading(f"{folder}/about.json is damaged: delete {folder}"):
            before = json.loads((folder / "about.json").read_text())
        if about and before != about:
            fail(f"{folder} was made from other images, --vae or --image_size: move it away first")
        with contextlib.suppress(OSError, ValueError, EOFError):
            labels = np.load(folder / "labels.npy")
            if len(labels) == 0 or labels.dtype.kind not in "iu" or labels.min() < 0:
                return None
            known = (folder / "classes.json").exists()  # not in stores of earlier versions
            classes = json.loads((folder / "classes.json").read_text()) if known else []
            return read_rows(folder, len(labels)), labels, classes, before or {}
        return None

    found = load()
    barrier()  # no process writes before all have looked
    if agreed(found is not None) != (found is not None):
        fail(f"{folder} is not the same for all processes: give them a common disk, or each node a copy")
    if found:
        return found
    names, labels, encode, classes = prepare()
    if dry:
        row = encode(names[:1])[0]
        return np.broadcast_to(row, (len(names), *row.shape)), np.asarray(labels), classes, about
    rank, world = share()
    with lock_folder(folder, wait=True) if rank == 0 else contextlib.nullcontext():
        if rank == 0 and not load():
            atomic_write(folder / "labels.npy", lambda file: np.save(file, np.asarray(labels, np.int64)))
            atomic_write(folder / "classes.json", lambda file: file.write(json.dumps(classes).encode()))
            atomic_write(folder / "about.json", lambda file: file.write(json.dumps(about).encode()))
        barrier()
        apart = f"{folder} is not seen by all processes: give them a common disk, or each node a copy"
        waited((folder / "about.json").exists) or fail(apart)
        mine = range(rank * PART, len(names), world * PART)
        count = sum(min(PART, len(names) - lo) for lo in mine)
        with progress(total=count, desc=f"write {folder.name}", unit="row") as bar:
            for lo in mine:
                hi, path, rows = min(lo + PART, len(names)), part_path(folder, lo), []
                if not is_whole(path, hi - lo):
                    for first in range(lo, hi, batch):
                        rows.append(encode(names[first:min(first + batch, hi)]))
                        bar.update(len(rows[-1]))
                    atomic_write(path, lambda file, rows=rows: np.save(file, np.concatenate(rows)))
        barrier()
    return waited(load) or fail(apart)


def part_path(folder, first):
    return folder / f"rows-{first // PART:05d}.npy"


def is_whole(path, n):
    with contextlib.suppress(OSError, ValueError, EOFError):
        return len(np.load(path, mmap_mode="r")) == n
    return False


def read_rows(folder, n):
    """The n rows of a store, (n, ...). Raises OSError or ValueError if some are missing or damaged."""
    old = folder / "rows.npy", folder / "done.npy"  # the one file of earlier versions, and what is done of it
    if all(path.exists() for path in old) and np.load(old[1]).all():
        return np.load(old[0], mmap_mode="r")
    rows = Parts([part_path(folder, lo) for lo in range(0, n, PART)])
    if len(rows) != n or not all(len(file) == PART for file in rows.files[:-1]):
        raise ValueError(f"{len(rows)} rows for {n} labels")
    return rows


def waited(find, seconds=60):
    """find() as soon as it finds something. A network disk shows other computers' files after a while."""
    for _ in range(seconds if together() else 0):
        if found := find():
            return found
        time.sleep(1)
    return find()
