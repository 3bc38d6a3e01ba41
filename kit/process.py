"""Processes, errors of one line, files that are whole or not there, locks, downloads."""
import atexit
import contextlib
import ctypes
import datetime
import hashlib
import io
import os
import re
import shutil
import signal
import sys
import urllib.request
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

def launched(name, default):
    """A number that torchrun has set. Another launcher may have left anything; what is no number is none."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


WORLD = max(1, launched("WORLD_SIZE", 1))
RANK = launched("RANK", 0) if WORLD > 1 else 0
# The way on, which a run knows better than this file: after Ctrl-C or SIGTERM, and when memory ran out.
HINTS = dict(stopped="", memory="lower --batch, --micro or --channels")
OWN = {path.stem for path in Path(__file__).resolve().parents[1].iterdir()}  # what is not installed by pip
# Newer versions of torch say so at each JVP and each TorchScript file. Nobody who runs a script can mend it.
warnings.filterwarnings("ignore", message=r".*torch\.jit\..* is deprecated")


# ------------------------------------------------------------------------------------------------- errors

def last_words(kind, error, trace):
    """Ctrl-C, a lack of memory and a missing package end in one line, and a closed pipe, as after `| head`,
    in none. Every other exception is a bug and keeps its traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print(f"\nstopped{HINTS['stopped']}", file=sys.stderr)
    elif issubclass(kind, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
        print(f"\nout of memory: {HINTS['memory']}", file=sys.stderr, flush=True)
        os._exit(2)  # a hook has no other way to choose the exit code
    elif issubclass(kind, ModuleNotFoundError) and error.name and error.name.split(".")[0] not in OWN:
        print(f"the package {error.name} is missing: pip install {error.name}", file=sys.stderr, flush=True)
        os._exit(2)
    elif issubclass(kind, BrokenPipeError):
        os._exit(128 + signal.SIGPIPE)  # what a shell reports of other programs
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = last_words
sys.stdout = sys.stdout or open(os.devnull, "w")  # None if the caller has closed it
sys.stderr = sys.stderr or open(os.devnull, "w")
for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show is no reason to stop
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")


def fail(message):
    """End the program with one line on stderr and exit code 2, as every error does that a user can cause."""
    if RANK == 0 or dist.is_initialized():  # before there is a process group, all ranks find the same error
        tqdm.write(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def reading(what):
    """Whatever a decoder, a zip, numpy, torch or the file system raises inside ends in one line, `what`."""
    try:
        yield
    except Exception as error:
        said = re.sub(r" <\S+ object at \w+>", "", str(error)).split(". ")[0]
        fail(f"{what} ({type(error).__name__}: {said[:120]})")


@contextlib.contextmanager
def writing(path):
    """A full disk, or a missing permission, while something is written ends in one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save has a RuntimeError of its own for a full disk
        if isinstance(error.__context__, (KeyboardInterrupt, SystemExit)):  # and one for being interrupted
            raise error.__context__ from None
        full = shutil.disk_usage(Path(path).parent if Path(path).parent.exists() else ".").free < 2**20
        cause = "No space left on device" if full else str(error)
        fail(f"cannot write {path}: {cause}; what was there before is untouched")


# ---------------------------------------------------------------------------------------------- processes

def start_processes(backend=""):
    """Join the processes that torchrun has started; returns this one's device."""
    cuda, gpus = torch.cuda.is_available(), torch.cuda.device_count()
    if cuda and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > gpus:
        fail(f"every process needs a GPU, and there are {gpus}: lower --nproc_per_node")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
        use_expandable_segments()
    if WORLD > 1 and not dist.is_initialized():
        port = launched("MASTER_PORT", 0)
        if not ("RANK" in os.environ and RANK < WORLD and os.environ.get("MASTER_ADDR") and 0 < port < 2**16):
            tqdm.write("WORLD_SIZE is set, but not by torchrun: start with torchrun, or unset it",
                       file=sys.stderr)
            raise SystemExit(2)
        backend = backend or ("nccl" if cuda else "gloo")
        dist.init_process_group(backend)  # with the usual timeout, so that a lost process ends the training
        PATIENT["group"] = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=24))
        atexit.register(leave_processes, backend)
    return device


def leave_processes(backend):
    """Gloo's threads would abort a process that ends before them."""
    group, PATIENT["group"] = PATIENT["group"], None
    with contextlib.suppress(ValueError, AssertionError):  # somebody else has left already
        dist.destroy_process_group(None if backend == "gloo" else group)


# The group for preparations, such as downloading or encoding a dataset; of another backend than training's,
# it also waits long. `alone` counts the calls of rank 0 that the others do not take part in.
PATIENT = dict(group=None, alone=0)


@contextlib.contextmanager
def alone():
    """For what one process does without the others: inside, it waits for nobody and prepares all itself."""
    PATIENT["alone"] += 1
    try:
        yield
    finally:
        PATIENT["alone"] -= 1


def together():
    """Whether there are other processes that take part in what this one does."""
    return dist.is_initialized() and not PATIENT["alone"]


def share():
    """This process's number and how many there are, among those that do this together."""
    return (RANK, WORLD) if together() else (0, 1)


def keep_freed_memory():
    """glibc keeps what is freed. Otherwise it gives it back to the system, and gets it anew, at each step: a
    fifth of a step's time, where tensors are small."""
    with contextlib.suppress(OSError, AttributeError):  # another system, with rules of its own
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: what is freed at the end of the heap
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: larger tensors live outside it


def use_expandable_segments():
    """Let the allocator grow its blocks instead of leaving gaps, unless the user has told it what to do."""
    if not any(os.environ.get(name) for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        tell = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # torch 2.9 and later
        with contextlib.suppress(RuntimeError, AttributeError):  # an allocator, or a system, without them
            (tell or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")


def barrier():
    if together():
        dist.barrier(group=PATIENT["group"])


def agreed(value):
    """What rank 0 has found, on every process."""
    values = [value]
    if together():
        dist.broadcast_object_list(values, 0, group=PATIENT["group"])
    return values[0]


def gathered(value):
    """What each process has found, a list on rank 0; None on the others."""
    if not together():
        return [value]
    values = [None] * WORLD if RANK == 0 else None
    dist.gather_object(value, values, 0, group=PATIENT["group"])
    return values


def end_at_sigterm():
    """From now on SIGTERM ends this process like Ctrl-C, with exit code 143."""
    def terminated(*_):
        if RANK == 0:
            tqdm.write(f"stopped by SIGTERM{HINTS['stopped']}", file=sys.stderr)
        raise SystemExit(143)
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, terminated)


class Lines(io.TextIOBase):
    """stderr for a progress bar that is not on a terminal: each of its states on a line of its own."""

    def write(self, text):
        if text.strip():
            sys.stderr.write(text.strip() + "\n")


def progress(items=None, every=60, **about):
    """A progress bar (tqdm) on rank 0. Where stderr is no terminal it is a line every so many seconds, and
    none for what takes less."""
    form = dict(mininterval=every, delay=every, file=Lines())
    form = dict(mininterval=0.5) if sys.stderr.isatty() else form
    return tqdm(items, disable=RANK > 0, **form | about)


# -------------------------------------------------------------------------------------------------- files

UNFINISHED = ".unfinished-by-kit"  # ends the names of temporary files, which nobody else would choose


def atomic_write(path, write):
    """write(file) to a temporary file, then move it into place: the old file stays until the new is whole."""
    write_together({path: write})


def write_together(files):
    """{path: write}: several files, none of which is replaced before all of them are whole."""
    files = {Path(path): write for path, write in files.items()}
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}") for path in files}
    try:
        for path, write in files.items():
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(temporary[path], "wb") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
        for path in files:
            with writing(path):
                os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


HELD = {}  # device and inode of a lock: the open file, of this process


def lock_folder(folder, wait=False):
    """Keep other runs out of the folder for as long as the returned file is open: the operating system drops
    the lock with the process. Removes what killed writers have left there."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")
        file.seek(0)
        holder, place = file.read(), os.fstat(file.fileno())
    key = place.st_dev, place.st_ino
    if key in HELD and not HELD[key].closed:
        remove_unfinished(folder)
        return HELD[key]
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        fail(f"{folder} is in use by {holder or 'another run'}: wait for it, or choose another --out")
    except (ImportError, OSError) as error:
        print(f"{folder} cannot be locked here ({error}): take care that nobody else writes to it")
    with writing(folder / ".lock"):
        file.truncate(0)
        print(f"{MARK} {os.getpid()} on {os.uname().nodename}", end="", file=file, flush=True)
    remove_unfinished(folder)
    HELD[key] = file
    return file


def remove_unfinished(folder):
    for path in folder.glob(f".*{UNFINISHED}"):
        path.unlink(missing_ok=True)


MARK = "process"  # begins the text of a lock


def is_ours(folder):
    """Whether a folder is new, empty, or has the mark of a run of these scripts, its lock."""
    with reading(f"--out {folder}"):
        if not folder.exists() or not any(folder.iterdir()):
            return True
        lock = folder / ".lock"
        return lock.is_file() and lock.read_text(errors="replace").startswith(f"{MARK} ")


def download(url, path, md5=""):
    """Fetch url into path, unless it is there: whole or not at all. All processes call this; rank 0 does
    it."""
    path = Path(path)

    def fetch(file):
        with reading(f"cannot download {url}: fetch it yourself and put it at {path}"), \
                urllib.request.urlopen(url, timeout=60) as response:
            size, digest = int(response.headers.get("Content-Length", 0)), hashlib.md5()
            with progress(total=size or None, unit="B", unit_scale=True, desc=path.name) as bar:
                while chunk := response.read(2**20):
                    file.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
            if size > file.tell() or md5 not in ("", digest.hexdigest()):
                raise OSError(f"it arrived damaged: {file.tell()} of {size} bytes, MD5 {digest.hexdigest()}")

    if share()[0] == 0 and not path.exists():
        atomic_write(path, fetch)
    barrier()
