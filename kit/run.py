"""One training run: optimizer, averages, micro-batches, log, save, resume; and a forecast of memory."""
from kit.config import dataset, kind
from kit.networks import build
from kit.process import (HINTS, RANK, WORLD, atomic_write, barrier, end_at_sigterm, fail, lock_folder,
                         reading, start_processes, writing)
from kit.teachers import load_teacher, network, read_checkpoint, shorten
from kit.text import Captions, TextToImage
from kit.toys import Mixture

import contextlib
import dataclasses
import inspect
import io
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm


def dry_run(cfg):
    """--dry_run: open and check data and teacher, and build the network without memory (on the device meta).
    Prints its parameters, the FLOPs of a forward pass, and an estimate of the memory that a process needs."""
    if kind(cfg.dataset) is Captions:
        fail("--dry_run knows no text-to-image pipeline")
    start_processes()
    data = dataset(cfg)
    teacher = load_teacher(cfg, data, "cpu")
    with torch.device("meta"):
        options = network(dataclasses.replace(cfg, init="none"), data, "meta").options
    parameters, flops, fixed, sample = estimate(options, cfg.checkpointing)
    copies = 5 + (teacher is not None and not isinstance(teacher, Mixture))  # net, EMA, gradient, Adam's two
    weights = 4 * copies * parameters + fixed
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


def estimate(options, checkpointing):
    """Of the network with these options: parameters; FLOPs of a sample's forward pass; bytes held for the
    backward pass, those that do not grow with the batch (weights in other forms) and those of each sample."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"):
        net = build(options)
    net.checkpointing = checkpointing
    own, held = {p.untyped_storage()._cdata for p in net.parameters()}, []
    for n in (1, 2):
        x, t = torch.zeros(n, *options["shape"], device="meta"), torch.zeros(n, device="meta")
        y = torch.zeros(n, dtype=torch.int64, device="meta") if options.get("classes") else None
        kept = {}

        def keep(v):
            if v.untyped_storage()._cdata not in own:
                kept[v.untyped_storage()._cdata] = v  # stays alive, so that no two share an address
            return v
        with FlopCounterMode(display=False) as flops, torch.autograd.graph.saved_tensors_hooks(keep, keep):
            net(x, t, y)
        held.append(sum(v.untyped_storage().nbytes() for v in kept.values()))
    parameters, sample = sum(p.numel() for p in net.parameters()), held[1] - held[0]
    return parameters, flops.get_total_flops() / 2, held[0] - sample, sample


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


def largest_micro(net, share, free, extra=0):
    """The largest divisor of `share` samples for which gradients, Adam, and what a step holds by the estimate
    (and `extra` bytes a sample) take no more than `free` bytes; at least 1. Some is spared for a JVP and for
    fragments, more for a block that --checkpointing computes anew, or for the graphs of further networks."""
    _, _, fixed, sample = estimate(net.options, net.checkpointing)
    left = free - 4 * (3 + (WORLD > 1)) * sum(p.numel() for p in net.parameters()) - fixed
    margin = (1.8 if net.checkpointing else 1.33) * (3 if net.extra else 1)
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


class Run:
    """The mechanics of one training run: processes, device, output folder, log and checkpoints."""
    def __init__(self, cfg):
        self.cfg = cfg
        self.out = Path(cfg.out)
        self.bad = 0
        self.skipped = 0
        self.began = time.time()  # moved back by what earlier sittings of a resumed run took
        self.new_log = not cfg.resume
        self.micro = 0
        self.device = start_processes()
        if RANK == 0:
            self.lock = lock_folder(self.out)
        with reading(f"--out {self.out}"):
            if (self.out / "ckpt.pt").exists() and not cfg.resume and not cfg.overwrite:
                fail(f"{self.out} holds a run already: --resume it, --overwrite it, or choose another --out")
            sources = Path(cfg.teacher).resolve(), Path(cfg.init).resolve()
            if cfg.overwrite and self.out.resolve() in sources:
                fail(f"--overwrite would replace {self.out}, the --teacher or --init: choose another --out")
        barrier()  # all processes check --out before rank 0 writes to it
        end_at_sigterm()

    def split(self, net):
        """Cut this process's share of a batch into `rows` of --micro samples. On a GPU, 0 means as many as
        fit by the estimate, or as in the run that is resumed, because dropout masks depend on the number."""
        share = self.cfg.batch // WORLD
        micro = self.cfg.micro or self.micro or share
        choose = self.device.type == "cuda" and not (self.cfg.micro or self.micro)
        if choose and not isinstance(net, TextToImage):
            torch.cuda.empty_cache()  # what PyTorch only keeps for later is free, too
            free = torch.cuda.mem_get_info(self.device)[0]
            found = torch.tensor(largest_micro(net, share, free, self.cfg.loss_bytes()), device=self.device)
            if WORLD > 1:
                dist.all_reduce(found, dist.ReduceOp.MIN)
            micro = int(found)
            if RANK == 0:
                print(f"--micro {micro} of {share}, by an estimate for {free / 2**30:.1f} GiB")
        self.micro = micro = max(d for d in divisors(share) if d <= micro)
        lower = max((d for d in divisors(share) if d < micro), default=0)
        HINTS["memory"] = f"--micro {lower}, or --checkpointing" if lower else HINTS["memory"]
        self.rows = [(RANK * share + i, RANK * share + i + micro) for i in range(0, share, micro)]

    def wrap(self, net):
        """The network that takes gradients, compiled and in DistributedDataParallel as the flags want it."""
        self.split(net)
        if net.options["classes"] and getattr(net, "names", []) and RANK == 0:
            print(f"classes 0, 1, ..: {shorten(net.names)}")
        if self.cfg.compile:  # with eager random numbers: the JVP is never compiled and needs the same masks
            net = torch.compile(net, options=dict(fallback_random=True))
        return nn.parallel.DistributedDataParallel(net) if WORLD > 1 else net

    def accumulate(self, net, rows):
        """Lets gradients travel between processes after the last micro-batch only."""
        return net.no_sync() if WORLD > 1 and rows != self.rows[-1] else contextlib.nullcontext()

    def mean(self, value):
        """Mean over the processes of a scalar tensor that each has averaged over its rows."""
        if WORLD > 1:
            dist.all_reduce(value)
        return value / WORLD

    def finite(self, *values):
        """False if the step is to be skipped. Fifty such steps in a row end the run."""
        self.bad = 0 if all(math.isfinite(v) for v in values) else self.bad + 1
        self.skipped += bool(self.bad)
        if self.bad == 50:
            fail(f"stopped: 50 steps in a row had a non-finite loss or gradient; {self.out} keeps the last "
                 "checkpoint; try a lower --lr, or --dtype fp32")
        return not self.bad

    def resume(self, state):
        """Load everything in `state` from the checkpoint; returns the step to go on from."""
        ckpt = read_checkpoint(self.out)
        names = getattr(state["net"], "names", [])
        if ckpt.get("names") and names and ckpt["names"] != names:
            fail(f"{self.out} was trained with the classes {shorten(ckpt['names'])}; this data has "
                 f"{shorten(names)}: give the --data of before")
        for name, options in ckpt.get("extra", {}).items():  # what the script has added while training
            if name not in state["ema"].extra:
                state["ema"].extra[name] = build(options).eval().requires_grad_(False).to(self.device)
        with reading(f"{self.out} cannot be resumed: these flags change the network or the optimizer"):
            for name, part in state.items():
                part.load_state_dict(ckpt[name])
            self.began, self.micro = time.time() - ckpt["seconds"], ckpt.get("micro", 0)
        if ckpt.get("world", WORLD) != WORLD and RANK == 0:
            print(f"{self.out} was written by {ckpt['world']} processes and goes on with {WORLD}: data and "
                  "noise are the same, but sums are rounded in another order, so not bit for bit")
        if ckpt["step"] >= self.cfg.steps:
            print(f"{self.out} is finished, at step {ckpt['step']}; a higher --steps goes on")
        if RANK == 0:  # forget the lines that the checkpoint does not know, and what a crash has torn
            path = self.out / "log.jsonl"
            kept = []
            with reading(f"cannot read {path}"):
                lines = path.read_bytes().splitlines() if path.exists() else []
            for line in lines:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    kept += [line + b"\n"] if json.loads(line)["step"] <= ckpt["step"] else []
            atomic_write(path, lambda file: file.writelines(kept))
        return ckpt["step"]

    def save(self, state, step):
        """Write ckpt.pt and config.json. The first time is after the first step, so that a run whose first
        step fails overwrites nothing. All numbers are drawn from (seed, step, position), so seed and step are
        the whole state of the RNG."""
        if RANK:
            return
        text = json.dumps(vars(self.cfg), indent=1)
        atomic_write(self.out / "config.json", lambda file: file.write(text.encode()))
        if self.new_log:  # the log of an overwritten run
            (self.out / "log.jsonl").unlink(missing_ok=True)
            self.new_log = False
        ckpt = {name: part.state_dict() for name, part in state.items()}
        ckpt |= dict(script=Path(inspect.getfile(type(self.cfg))).stem, config=vars(self.cfg), step=step,
                     options=state["net"].options, rng=self.cfg.seed, world=WORLD, micro=self.micro)
        ckpt["names"] = getattr(state["net"], "names", [])  # of the classes
        ckpt["extra"] = {name: part.options for name, part in state["ema"].extra.items()}
        ckpt["seconds"] = time.time() - self.began
        atomic_write(self.out / "ckpt.pt", lambda file: torch.save(ckpt, file))
        if isinstance(state["ema"], TextToImage):
            state["ema"].export(self.out, self.cfg.inference())
        HINTS["stopped"] = f"; --resume goes on from the checkpoint in {self.out}"

    def steps(self, start):
        """The training steps, behind a progress bar, or with a line every 10 s if stderr is no terminal."""
        tty = sys.stderr.isatty()
        self.bar = tqdm(range(start, self.cfg.steps), initial=start, total=self.cfg.steps, disable=RANK > 0,
                        desc=f"{self.out} {self.cfg.mode}", unit="step", dynamic_ncols=True,
                        mininterval=0.5 if tty else 10, file=None if tty else Lines())
        return self.bar

    def log(self, step, **values):
        """Write one line of log.jsonl, and show its losses beside the progress bar. Loss and gradient are
        those of the global batch; what the method adds is of rank 0's last micro-batch."""
        if RANK:
            return
        values = {k: float(v) for k, v in values.items()}
        seconds = time.time() - self.began
        line = json.dumps(dict(step=step, **values, skipped=self.skipped, seconds=round(seconds, 2),
                               samples_per_s=round(step * self.cfg.batch / seconds, 1)))
        with writing(self.out / "log.jsonl"):
            self.out.mkdir(parents=True, exist_ok=True)
            with open(self.out / "log.jsonl", "w" if self.new_log else "a") as file:
                file.write(line + "\n")
        self.new_log = False
        shown = {k: f"{v:.3g}" for k, v in values.items() if k not in ("lr", "grad_norm")}
        self.bar.set_postfix(shown, refresh=False)


class Lines(io.TextIOBase):
    """stderr for a progress bar that is not on a terminal: each of its states on a line of its own."""

    def write(self, text):
        if text.strip():
            sys.stderr.write(text.strip() + "\n")
