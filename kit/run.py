"""One training run: optimizer, averages, micro-batches, log, save, resume; and a forecast of memory."""
from kit.config import dataset, kind
from kit.data import Stored, keep_apart
from kit.layers import DTYPES
from kit.networks import build
from kit.process import (HINTS, RANK, WORLD, atomic_write, barrier, end_at_sigterm, fail, is_ours,
                         keep_freed_memory, lock_folder, progress, reading, start_processes, write_together,
                         writing)
from kit.teachers import init_path, load_init, load_teacher, network, read_checkpoint, shorten
from kit.text import Captions, TextToImage
from kit.toys import Mixture

import contextlib
import dataclasses
import hashlib
import inspect
import json
import math
import re
import signal
import sys
import time
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm


def dry_run(cfg):
    """--dry_run: open and check data and teacher, and build the network without memory (on the device meta).
    Prints its parameters, the FLOPs of a forward pass, and an estimate of the memory that a process needs."""
    if kind(cfg.dataset) is Captions:
        fail("--dry_run knows no text-to-image pipeline")
    start_processes()
    check_out(cfg)
    data = dataset(cfg)
    teacher = load_teacher(cfg, data, "cpu")
    with torch.device("meta"):
        strengths = getattr(cfg, "guidance_max", 1) > 1
        net = network(dataclasses.replace(cfg, init="none"), data, "meta", guidance=strengths)
    if init_path(vars(cfg)):
        load_init(net, cfg, data)
    options = net.options
    parameters, flops, fixed, sample = estimate(options, cfg.checkpointing)
    distills = teacher is not None and not isinstance(teacher, Mixture)
    copies = 1 + 4 * cfg.trained() + distills  # EMA; net, gradient and Adam's two; the teacher
    weights = 4 * copies * parameters + fixed
    weights += distills * parameters * DTYPES[cfg.dtype].itemsize  # as the teacher's passes take them
    micro = cfg.micro or cfg.batch // WORLD
    if RANK:
        return
    print(f"data       {cfg.dataset}, {data.shape}, {data.classes} classes, sigma_d {cfg.sigma_d}")
    print(f"network    {parameters / 1e6:.1f} M parameters; {flops / 1e9:.3g} GFLOP for a "
          "sample's forward pass (backward twice that, JVP twice)")
    print(f"memory     {weights / 2**30:.2f} GiB for the weights in {copies} copies, and "
          f"{sample / 2**20:.1f} MiB a sample for its backward pass")
    print(f"a process  {(weights + micro * sample) / 2**30:.2f} GiB with {micro} samples at once; --micro or "
          "--checkpointing lower it")
    hours = 3 * flops * cfg.steps * cfg.batch / 3600
    print(f"time       {hours / 5e13:,.0f} GPU hours in fp32, {hours / 4.5e14:,.0f} in fp16, at 50 and 450 "
          "TFLOP/s, for forward and backward passes alone")


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that come to life inside and are alive, and the most at any time."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        given = {id(v.untyped_storage()) for v in tree_leaves((args, kwargs)) if torch.is_tensor(v)}
        for v in tree_leaves(found):
            storage = v.untyped_storage() if torch.is_tensor(v) else None
            if storage is not None and id(storage) not in self.known and id(storage) not in given:
                self.known[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self.drop, id(storage))
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
        return found

    def drop(self, key):
        self.now -= self.known.pop(key)


def estimate(options, checkpointing):
    """Of the network with these options: parameters; FLOPs of a sample's forward pass; the most bytes that a
    forward and a backward pass hold beside weights and gradients, those that do not grow with the batch
    (weights in other forms) and those of each sample. Counted on tensors without memory."""
    from torch.utils.flop_counter import FlopCounterMode  # its import takes most of a second
    with torch.device("meta"):
        net = build(options)
    net.checkpointing = checkpointing
    for p in net.parameters():
        p.grad = torch.empty_like(p)  # of the micro-batches before
    most = []
    for n in (64, 128):
        x, t = torch.zeros(n, *options["shape"], device="meta"), torch.zeros(n, device="meta")
        y = torch.zeros(n, dtype=torch.int64, device="meta") if options.get("classes") else None
        with Alive() as alive:
            net(x, t, y).sum().backward()
        most.append(alive.most)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        net(x, t, y)
    parameters, sample = sum(p.numel() for p in net.parameters()), (most[1] - most[0]) // 64
    return parameters, flops.get_total_flops() / 128, most[0] - 64 * sample, sample


def divisors(n):
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def largest_micro(net, share, free, extra=0, checkpointing=False):
    """The largest divisor of `share` samples for which gradients, Adam, and what a step holds by the estimate
    (and `extra` bytes a sample) take no more than `free` bytes; at least 1. Some is spared for a JVP and for
    fragments, more for the graphs of further networks."""
    _, _, fixed, sample = estimate(net.options, checkpointing)
    left = free - 4 * 3 * sum(p.numel() for p in net.parameters()) - fixed
    margin = 1.33 * (3 if net.extra else 1)
    return max(n for n in divisors(share) if n == 1 or n * (margin * sample + extra) <= left)


def make_optimizer(net, cfg):
    kinds = dict(adam=torch.optim.Adam, adamw=torch.optim.AdamW, radam=torch.optim.RAdam)
    return kinds[cfg.optimizer](net.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), eps=cfg.eps)


@torch.no_grad()
def lerp(average, net, beta):
    """average <- beta average + (1 - beta) net. What the two share, such as frozen weights, is left alone,
    and so is what only one of them has in `extra`."""
    own = dict(net.named_parameters())
    pairs = [(a, own[name]) for name, a in average.named_parameters() if name in own and a is not own[name]]
    if pairs:
        torch._foreach_lerp_(*map(list, zip(*pairs)), 1 - beta)


def check_out(cfg):
    """Ends the program if a run must not write to --out."""
    out = Path(cfg.out)
    if "://" in cfg.out:
        fail(f"--out {out} is no folder to write to")
    keep_apart("--out", out, cfg.data)
    with reading(f"--out {out}"):
        kept = (out / "ckpt.pt").is_file()
    if not is_ours(out) and kept:
        read_checkpoint(out)  # a copied run may lack the mark; another project's file ends the program
    elif not is_ours(out):
        fail(f"{out} holds other files, and no run of these scripts: choose another --out")
    with reading(f"--out {out}"):
        if (out / "ckpt.pt").exists() and not cfg.resume and not cfg.overwrite:
            fail(f"{out} holds a run already: --resume it, --overwrite it, or choose another --out")
        sources = [Path(source).resolve() for source in (cfg.teacher, cfg.init) if Path(source).exists()]
        if cfg.overwrite and any(out.resolve() in (source, source.parent) for source in sources):
            fail(f"--overwrite would replace {out}, the --teacher or --init: choose another --out")


ENOUGH = 16  # samples at once that keep a GPU busy


class Run:
    """The mechanics of one training run: processes, device, output folder, log and checkpoints."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.out = Path(cfg.out)
        self.bad = 0  # steps in a row whose loss was not finite, or out of all proportion
        self.lost = 0  # steps in a row whose loss was not finite
        self.diverged = False  # whether weights have moved since the loss was out of all proportion
        self.usual = None  # size of the loss, on average
        self.skipped = 0
        self.stopped = self.stopping = 0  # the signal that has come; whether all processes know of one
        self.began = time.time()  # moved back by what earlier sittings of a resumed run took
        self.lines = None if cfg.resume else []  # of the log, until the run's first checkpoint
        self.frames = {}  # of samples.gif: points that the network sampled, by step
        self.exact = None  # of a mixture: the ODE's solutions from the report's noise
        self.micro = 0
        self.device = start_processes()
        check_out(cfg)
        barrier()  # all processes look before rank 0 leaves its mark
        if RANK == 0:
            self.lock = lock_folder(self.out)
        barrier()  # all processes check --out before rank 0 writes to it
        end_at_sigterm()

    def split(self, net):
        """Cut this process's share of a batch into `rows` of --micro samples. On a GPU, 0 means as many as
        fit by the estimate, or as in the run that is resumed, because dropout masks depend on the number.
        If fewer than ENOUGH fit, and --checkpointing makes room for more, it is turned on."""
        share = self.cfg.batch // WORLD
        micro = self.cfg.micro or self.micro or share
        choose = self.device.type == "cuda" and not self.cfg.micro
        if choose and not isinstance(net, TextToImage):
            torch.cuda.empty_cache()  # what PyTorch only keeps for later is free, too
            free = torch.cuda.mem_get_info(self.device)[0]
            wanted, extra = self.micro or min(ENOUGH, share), self.cfg.loss_bytes()
            plain = checkpointed = 0 if self.cfg.checkpointing else largest_micro(net, share, free, extra)
            if plain < wanted:
                checkpointed = largest_micro(net, share, free, extra, checkpointing=True)
            found = torch.tensor([plain, checkpointed], device=self.device)
            if WORLD > 1:
                dist.all_reduce(found, dist.ReduceOp.MIN)
            plain, checkpointed = found.tolist()
            checkpointing = plain < min(wanted, checkpointed)
            for part in (net, *net.extra.values()):
                part.checkpointing = checkpointing
            micro = self.micro or (checkpointed if checkpointing else plain)
            if RANK == 0:
                print(f"--micro {micro} of {share}" + ", with --checkpointing" * checkpointing
                      + f", by an estimate for {free / 2**30:.1f} GiB")
        self.micro = micro = max(d for d in divisors(share) if d <= micro)
        lower = max((d for d in divisors(share) if d < micro), default=0)
        HINTS["memory"] = f"--micro {lower}, or --checkpointing" if lower else HINTS["memory"]
        self.rows = [(RANK * share + i, RANK * share + i + micro) for i in range(0, share, micro)]

    def following(self, seed, step, lo, hi):
        """The place of the micro-batch after this one; None after the last, and where training draws none."""
        at = self.rows.index((lo, hi)) + 1 if (lo, hi) in self.rows else 0
        step += at == len(self.rows)
        return (seed, step, *self.rows[at % len(self.rows)]) if at and step < self.cfg.steps else None

    def wrap(self, net):
        """The network that takes gradients, compiled and in DistributedDataParallel as the flags want it."""
        self.split(net)
        if isinstance(self.data, Stored):
            self.data.following = self.following  # it reads the next batch while this one is computed
        if net.options["classes"] and self.made_from["classes"] and RANK == 0:
            print(f"classes 0, 1, ..: {shorten(self.made_from['classes'])}")
        if self.cfg.compile:  # with eager random numbers: the JVP is never compiled and needs the same masks
            net = torch.compile(net, options=dict(fallback_random=True))
        if WORLD == 1:
            return net
        return nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)  # no second gradient

    def accumulate(self, net, rows):
        """Lets gradients travel between processes after the last micro-batch only."""
        return net.no_sync() if WORLD > 1 and rows != self.rows[-1] else contextlib.nullcontext()

    def mean(self, value):
        """Mean over the processes of a scalar tensor that each has averaged over its rows. On the way, they
        tell each other of signals, so that all end after the same step."""
        stopped = torch.tensor(float(self.stopped > 0), device=value.device)
        both = torch.stack([value.float(), stopped])
        if WORLD > 1:
            dist.all_reduce(both)
        self.stopping = bool(both[1])
        return both[0] / WORLD

    def finite(self, loss, grad_norm):
        """False if the step is to be skipped, because loss or gradient is not finite. While the loss is a
        million times what it was, nothing is saved. After fifty steps of either kind the run ends."""
        good, size = math.isfinite(loss) and math.isfinite(grad_norm), abs(float(loss))
        wild = not good or self.usual is not None and size > 1e6 * max(self.usual, 1e-3)
        if not wild:
            self.usual = size if self.usual is None else 0.98 * self.usual + 0.02 * size
        self.bad = self.bad + 1 if wild else 0
        self.lost = 0 if math.isfinite(loss) else self.lost + 1
        self.diverged = wild and (good or self.diverged)
        self.skipped += not good
        if self.bad == 50:
            kind = "a loss a million times what it was" if good else "a non-finite loss or gradient"
            fail(f"stopped: 50 steps in a row had {kind}; {self.out} keeps the last checkpoint from before; "
                 "try a lower --lr, or --dtype fp32")
        return good

    def begin(self, state, data, teacher):
        """The step to begin with: 0, or of --resume that of the checkpoint, from which all of `state` is
        loaded. `data` and `teacher` must then be those of before, by content, wherever they are now."""
        if len(data.shape) == 1:
            # Points: a second thread gains little on matrices this small. Beside other busy programs, waiting
            # for it makes a step up to ten times slower. And the number of cores changes no weights.
            torch.set_num_threads(1)
            keep_freed_memory()
        self.state, self.data = state, data
        self.made_from = dict(classes=getattr(data, "names", []), data=getattr(data, "fingerprint", ""),
                              teacher=digest(teacher))
        if not self.cfg.resume:
            return 0
        ckpt = read_checkpoint(self.out)
        for name, before in ckpt["made_from"].items():
            now = self.made_from.get(name)
            if before and now and before != now:
                told = f" ({shorten(now)} instead of {shorten(before)})" if name == "classes" else ""
                fail(f"{self.out} was trained with other {name}{told}: give those of before with "
                     f"--{'teacher' if name == 'teacher' else 'data'}, or start anew with another --out")
        with reading(f"{self.out} cannot be resumed: these flags change the network or the optimizer"):
            for name, options in ckpt["extra"].items():  # what the script has added while training
                if name not in state["ema"].extra:
                    state["ema"].extra[name] = build(options).eval().requires_grad_(False).to(self.device)
            for name, part in state.items():
                part.load_state_dict(ckpt[name])
            self.began, self.micro = time.time() - ckpt["seconds"], ckpt["micro"]
            self.frames = ckpt["frames"]
        if ckpt["world"] != WORLD and RANK == 0:
            print(f"{self.out} was written by {ckpt['world']} processes and goes on with {WORLD}: data and "
                  "noise are the same, but sums are rounded in another order, so not bit for bit")
        if ckpt["step"] >= self.cfg.steps:
            print(f"{self.out} is finished, at step {ckpt['step']}"
                  + "; a higher --steps goes on" * (not self.cfg.needs_steps()))
        if RANK == 0:
            self.clean_log(ckpt["step"])
            if isinstance(state["ema"], TextToImage):  # the file of a killed run may be older
                state["ema"].export(self.out, self.cfg.inference())
        return ckpt["step"]

    def clean_log(self, step):
        """Forget the lines that the checkpoint of this step does not know, and what a crash has torn."""
        path, kept = self.out / "log.jsonl", []
        with reading(f"cannot read {path}"):
            lines = path.read_bytes().splitlines() if path.exists() else []
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                kept += [line + b"\n"] if json.loads(line)["step"] <= step else []
        atomic_write(path, lambda file: file.writelines(kept))

    def due(self, step):
        """Whether a checkpoint is to be written after this step."""
        cfg = self.cfg
        kept = cfg.keep_every and step % cfg.keep_every == 0
        return step % cfg.save_every == 0 or kept or step in (1, cfg.steps)

    def save(self, state, step):
        """Write ckpt.pt and config.json; a run that replaces another does so with its first checkpoint, after
        the first step, as a whole. All numbers are drawn from (seed, step, position), so seed and step are
        the whole state of the RNG."""
        finite = torch.stack([p.isfinite().all() for p in state["net"].parameters()]).all()
        broken = self.diverged or not finite or self.lost == step  # no step has learned anything
        if step == self.cfg.steps and (broken or self.lost > 1):
            fail("the run ended with a loss a million times what it was, or with losses or weights that are "
                 f"not finite; {self.out} keeps what it held before; try a lower --lr, or --dtype fp32")
        if RANK or broken:
            return
        cfg = self.cfg
        ckpt = {name: part.state_dict() for name, part in state.items()}
        ckpt |= dict(script=Path(inspect.getfile(type(cfg))).resolve().stem, config=vars(cfg), step=step,
                     options=state["net"].options, world=WORLD, micro=self.micro)
        ckpt |= dict(made_from=self.made_from, frames=self.frames)
        ckpt["extra"] = {name: part.options for name, part in state["ema"].extra.items()}
        ckpt["seconds"] = time.time() - self.began
        text = json.dumps(vars(cfg), indent=1)
        files = {self.out / "ckpt.pt": lambda file: torch.save(ckpt, file),
                 self.out / "config.json": lambda file: file.write(text.encode())}
        if self.lines is not None:
            files[self.out / "log.jsonl"] = lambda file: file.write("".join(self.lines).encode())
        write_together(files)
        if self.lines is not None:  # what is left of a replaced run
            for path in self.out.iterdir():
                if re.fullmatch(r"metrics\.json|samples-\d{6,}\.png|samples\.gif|ckpt-\d{6,}\.pt", path.name):
                    path.unlink(missing_ok=True)
            self.lines = None
        if cfg.keep_every and step % cfg.keep_every == 0:
            atomic_write(self.out / f"ckpt-{step:06d}.pt", lambda file: torch.save(ckpt, file))
        if isinstance(state["ema"], TextToImage):
            state["ema"].export(self.out, cfg.inference())
        HINTS["stopped"] = f"; --resume goes on from the checkpoint in {self.out}"

    def shows(self, step):
        """Whether to look at the network after so many steps: each tenth of the run, for samples.gif, and
        each --sample_every."""
        return self.tenth(step) or step > 0 and step % self.cfg.sample_every == 0

    def tenth(self, step):
        return step in [self.cfg.steps * i // 10 for i in range(11)]

    def steps(self, start):
        """The training steps, behind a progress bar, or with a line every 10 s if stderr is no terminal.
        SIGTERM and Ctrl-C let the step end and save it; a second one ends at once."""
        self.start = start
        self.bar = progress(range(start, self.cfg.steps), 10, initial=start, total=self.cfg.steps, delay=0,
                            desc=f"{self.out} {self.cfg.mode}", unit="step", dynamic_ncols=True)
        before = {}
        with contextlib.suppress(ValueError):  # not in the main thread
            before = {number: signal.signal(number, self.stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for step in self.bar:
                yield step
                if self.stopping:
                    self.save(self.state, step + 1)
                    self.bar.close()
                    end(self.stopped or signal.SIGTERM)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self, number, frame):
        if self.stopped:
            end(number)
        self.stopped = number
        if RANK == 0:
            tqdm.write("ending after this step, which is saved; once more ends at once", file=sys.stderr)

    def log(self, step, **values):
        """Write one line of log.jsonl, and show its losses beside the progress bar. Loss and gradient are
        those of the global batch; what the method adds is of rank 0's last micro-batch."""
        if RANK:
            return
        values = {k: float(v) for k, v in values.items()} | (dict(diverging=self.bad) if self.bad else {})
        seconds = time.time() - self.began
        line = json.dumps(dict(step=step, **values, skipped=self.skipped, seconds=round(seconds, 2),
                               samples_per_s=round(step * self.cfg.batch / seconds, 1))) + "\n"
        if self.lines is not None:
            self.lines.append(line)
        else:
            with writing(self.out / "log.jsonl"), open(self.out / "log.jsonl", "a") as file:
                file.write(line)
        shown = {k: f"{v:.3g}" for k, v in values.items() if k not in ("lr", "grad_norm")}
        self.bar.set_postfix(shown, refresh=False)


def end(number):
    """End as the signal asks: Ctrl-C by last_words' line, SIGTERM with its own and exit code 143."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    if RANK == 0:
        tqdm.write(f"stopped by SIGTERM{HINTS['stopped']}", file=sys.stderr)
    raise SystemExit(143)


def digest(net):
    """Which weights a frozen network has: a hash of some entries of each tensor. "" if it is no network."""
    found = hashlib.sha1()
    frozen = [p for p in net.parameters() if not p.requires_grad] if isinstance(net, nn.Module) else []
    for p in frozen:
        flat = p.detach().flatten()
        found.update(repr((tuple(p.shape), flat[::max(1, len(flat) // 64)].float().tolist())).encode())
    return found.hexdigest() if frozen else ""
