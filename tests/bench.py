"""What the parts cost, as ratios within one run in one process, and everything that a GPU should be asked.

    python tests/bench.py steps [bf16]   steps of sCM's objectives over diffusion's, on an image U-Net
    python tests/bench.py jvp            a JVP over forward passes, in time and in memory
    python tests/bench.py attention      attention and its tangent over PyTorch's attention without a tangent
    python tests/bench.py reference      a step of SCT over the dataset over one of ECT; ImageNet-64's size
    python tests/bench.py direct         Direct CM's target: samples fed only under way, over all fed always
    python tests/bench.py busy           a step of the toy, and of shapes, alone and beside busy programs
    python tests/bench.py gpu [--minutes 9] [--data CIFAR10] [--features FILE] [--out out/gpu]

gpu makes a list of checks and measurements, a line each, and writes gpu.json and gpu.md; without a GPU it is
the same list at tiny size. CIFAR10 is the archive or class folders.

The floor counts network passes: a forward pass 1, its backward 2, a JVP 2 (primal and tangent), the teacher
1. So diffusion = 3, sct = 1 + 2 + 2 = 5, scd = 6. What is compared takes turns, so that a busy machine slows
all alike; the median over the turns is reported.
"""
import argparse
import json
import math
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.attention
from torch.nn.functional import scaled_dot_product_attention as by_default

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common
import direct_cm
import eval as evaluation
import kit
import scm
import sct
from kit.attention import attention, triton_kernel
from kit.config import preset
from kit.data import Stored
from kit.layers import DTYPES, freeze
from kit.networks import build
from kit.process import atomic_write
from kit.run import ENOUGH, estimate, largest_micro

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TINY = not CUDA and sys.argv[1:2] == ["gpu"] or "pytest" in sys.modules  # the list, where there is no GPU
FLOOR = dict(diffusion=3, sct=5, scd=6)
# Attention's (heads, tokens) in the U-Nets of size S to XXL at 16 and 8 pixels, with 64 channels a head.
SHAPES = [(9, 256), (12, 64), (12, 256), (21, 256), (28, 64)] if CUDA else [(8, 256), (8, 1024), (8, 4096)]
SHAPES = [(2, 64), (3, 16)] if TINY else SHAPES


def network(dtype="fp16" if CUDA else "fp32", size="S", **options):
    """sCM's network of this size on 64 x 64 x 4 latents, as if trained: no gain is zero. On a CPU one of its
    kind on 32 x 32, or a tiny one."""
    own = {k: v for k, v in preset(scm.PRESETS, "imagenet512", "scd", size).items()
           if scm.Config.__dataclass_fields__[k].metadata.get("net")}
    side = 64 if CUDA else 8 if TINY else 32
    if not CUDA:
        own |= dict(channels=16 if TINY else 64, channel_mult=(1, 2), blocks=1 if TINY else 2,
                    attention=(4,) if TINY else (16,))
    net = build(dict(shape=(4, side, side), classes=1000) | own | dict(dtype=dtype) | options).to(DEVICE)
    for name, p in net.named_parameters():
        p.data = torch.full_like(p, 0.5) if "gain" in name else p.data
    return net


def median(calls, turns=7):
    """Seconds of each of the named calls, which take turns; the first turn is to warm up."""
    seconds = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            began = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def peak(call):
    """Most bytes that a call holds at once beside what was there before; what the profiler counts."""
    with torch.profiler.profile(profile_memory=True) as seen:
        call()
    held, most = 0, 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


# -------------------------------------------------------------------------- what is asked of any machine

def plain_attention(q, k, v):
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(3) @ v


def by_math(q, k, v):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return by_default(q, k, v)


def check_attention(dtype="fp16" if CUDA else "fp32"):
    """Output and tangent against float64, at most 1 % of the largest entry off in float16 and 5 % in
    bfloat16; the time of PyTorch's forward pass, of both by ours, and of both by its math backend."""
    worst, report = {}, []
    for heads, tokens in SHAPES:
        x = [torch.randn(4 if CUDA else 1, heads, tokens, 64, device=DEVICE) for _ in range(6)]
        exact = torch.func.jvp(plain_attention, *(tuple(v.double() for v in part) for part in (x[:3], x[3:])))
        for kind in ("fp32", "bf16", "fp16"):
            y = [v.to(DTYPES[kind]) for v in x]
            with torch.no_grad():
                found = torch.func.jvp(attention, tuple(y[:3]), tuple(y[3:]))
            error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact))
            worst[kind] = max(error, worst.get(kind, 0))
        y = [v.to(DTYPES[dtype]) for v in x]
        calls = {f.__name__: lambda f=f, y=y: torch.func.jvp(f, tuple(y[:3]), tuple(y[3:]))
                 for f in (attention, by_math)}
        with torch.no_grad():
            seconds = median(dict(plain=lambda y=y: by_default(*y[:3])) | calls, 5)
        times = ", ".join(f"{1000 * s:.3g}" for s in seconds.values())
        report.append(f"{heads} x {tokens}: {times} ms")
    kernel = CUDA and torch.cuda.get_device_capability() >= (8, 0) and triton_kernel() is not None
    good = worst["fp32"] < 1e-4 and worst["fp16"] < 1e-2 and worst["bf16"] < 5e-2 and kernel == CUDA
    errors = ", ".join(f"{k} {v:.1e}" for k, v in worst.items())
    return good, (f"largest error {errors}; heads x tokens: PyTorch's forward, ours with tangent "
                  f"({'kernel' if kernel else 'blocks'}), its math backend's: " + "; ".join(report))


def check_tangent():
    """g of Eq. 6 in float16 over (0, pi/2), from the rearranged JVP, is finite; how much of the plain one
    is."""
    ends = 10.0 ** torch.linspace(-4, -1, 7)
    t = torch.cat([ends, torch.linspace(0.2, 1.4, 9), math.pi / 2 - ends.flip(0)]).double().to(DEVICE)
    report, good = [], True
    for options in (dict(c_noise="log", emb="fourier", double_norm=False), {}):
        net = network("fp16", **options)
        x_t, v_t = 0.5 * torch.randn(2, len(t), *net.options["shape"], device=DEVICE)
        gen, cfg = common.Draw(0, 0, 0, len(t)), scm.Config(warmup=0)
        _, g = scm.tangent(net, x_t, t, None, None, v_t, 0, cfg, gen)
        _, plain = common.jvp(net, (x_t / 0.5, t), (v_t / 0.5, torch.ones_like(t)))
        finite = [v.isfinite().flatten(1).all(1).double().mean().item() for v in (g, plain)]
        good = good and finite[0] == 1
        report.append(f"{options.get('c_noise', 't')}: {finite[0]:.0%}, plain {finite[1]:.0%}")
    return good, "finite with c_noise " + "; ".join(report)


def steps(modes, wrap=lambda net: net, checkpointing=False, turns=5, batch=32 if CUDA else 4 if TINY else 16,
          **options):
    """Seconds, first loss and peak memory in GiB of a training step in each mode, with the batch they
    take."""
    net, teacher = network(**options), network(**options).eval().requires_grad_(False)
    net.checkpointing, wrapped, results = checkpointing, wrap(net), {}
    scaler = torch.amp.GradScaler(DEVICE, enabled=CUDA)
    optimizer = torch.optim.Adam(net.parameters())
    gen = common.Draw(0, 0, 0, batch, DEVICE)
    x0, y = 0.5 * gen.normal(*net.options["shape"]), gen.index(1000)

    def step(mode):
        optimizer.zero_grad()
        gen = common.Draw(0, 1, 0, batch, DEVICE)
        loss, _ = scm.LOSSES[mode](wrapped, net, teacher, x0, y, 0, scm.Config(), gen)
        scaler.scale(loss).backward()
        results.setdefault(mode, dict(loss=loss.item()))
        scaler.step(optimizer)
        scaler.update()
        kit.normalize_weights(net)
    start = {name: p.clone() for name, p in net.state_dict().items()}
    for mode in modes:  # from the same weights, so that the first losses can be compared
        net.load_state_dict(start)
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        step(mode)
        results[mode]["peak"] = torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0
    seconds = median({mode: lambda mode=mode: step(mode) for mode in modes}, turns)
    for mode in modes:
        results[mode] |= dict(seconds=seconds[mode], batch=batch)
    return results


def check_steps(**options):
    """Steps of diffusion, sct and scd: throughput, ratio (and that of the floor), on a GPU memory beside the
    estimate, and the largest --micro, which must run."""
    found = steps(FLOOR, **options)
    base, lines = found["diffusion"]["seconds"], []
    parameters, _, fixed, sample = estimate(network(**options).options, False)
    for mode, row in found.items():
        row["ratio"] = row["seconds"] / base
        copies = 4 + (mode == "scd" or CUDA)  # the teacher is there in all; no EMA here
        row["estimate"] = (4 * copies * parameters + fixed + row["batch"] * sample) / 2**30
        lines.append(f"{mode} {row['batch'] / row['seconds']:.3g}/s, {row['ratio']:.2f} (floor "
                     f"{FLOOR[mode] / 3:.2f})" + f", {row['peak']:.1f} GiB ({row['estimate']:.1f})" * CUDA)
    free = torch.cuda.mem_get_info()[0] if CUDA else 2**30
    micro = largest_micro(network(**options), 256, free)
    if CUDA:
        found["largest"] = steps(("scd",), turns=2, batch=micro)["scd"] | dict(estimate=math.inf)
    good = all(math.isfinite(row["loss"]) for row in found.values())
    good = good and (not CUDA or all(row["peak"] < 1.33 * row["estimate"] for row in found.values()))
    return good, "; ".join(lines) + f"; --micro {micro} of 256", found


def check_jvp():
    """A JVP over forward passes: where the host's time is all there is (4 x 4 pixels, 8 channels), and on the
    network; and its memory."""
    tiny = build(dict(shape=(4, 4, 4), channels=8, blocks=2, attention=(4,))).to(DEVICE)
    report, ratios = [], []
    for name, net in (("host", tiny), ("network", network("fp32"))):
        at = torch.randn(4, *net.options["shape"], device=DEVICE), torch.rand(4, device=DEVICE).double()
        ones = tuple(torch.ones_like(v) for v in at)

        @torch.no_grad()
        def forward(net=net, at=at):
            return net(*at)

        def jvp(net=net, at=at, ones=ones):
            return common.jvp(net, at, ones)
        seconds = median(dict(forward=forward, jvp=jvp), 15)
        ratios.append(seconds["jvp"] / seconds["forward"])
        report.append(f"{name} {ratios[-1]:.1f} forward passes, {1000 * seconds['jvp']:.1f} ms")
    return ratios[0] < 8, "; ".join(report) + f"; memory {peak(jvp) / max(peak(forward), 1):.2f} times"


def reference():
    """CIFAR-10 at 16 x 16, conditional, batch 128: a step of sct over the dataset over one of ect. Then the
    target of ImageNet-64's preset, on a sparse file of 1,000 classes x 1,300 images, without a network."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg = sct.Config(dataset="folder", conditional=True, batch=128, reference="dataset")
    rows = np.random.default_rng(0).integers(0, 256, (50_000, 3, 16, 16), np.uint8)
    data = Stored(cfg, rows, np.arange(50_000) // 5000)
    net = build(dict(shape=(3, 16, 16), classes=10, channels=32, blocks=1, head=False)).to(device)

    def step(mode):
        gen = common.Draw(0, 0, 0, cfg.batch, device)
        x0, y = data.batch(gen)
        sct.LOSSES[mode](net, net, sct.ReferenceSet(data, cfg), x0, y, 0, cfg, gen)[0].backward()
    seconds = median(dict(ect=lambda: step("ect"), sct=lambda: step("sct")))
    print(f"{device}: ect {seconds['ect']:.2f} s, sct over 50,000 images {seconds['sct']:.2f} s, "
          f"{seconds['sct'] / seconds['ect']:.2f} times")
    with tempfile.TemporaryDirectory() as folder:
        shape = (1_300_000, 3, 64, 64)
        rows = np.lib.format.open_memmap(Path(folder, "rows.npy"), "w+", np.uint8, shape)
        data = Stored(cfg, rows, np.arange(len(rows)) // 1300)
        for size in (256, 0):
            cfg.class_size, steps = size, []
            for k in range(3):
                gen = common.Draw(0, k, 0, cfg.batch, device)
                x0, y = data.batch(gen)
                began = time.perf_counter()
                sct.ReferenceSet(data, cfg).denoise(x0, torch.ones(len(x0)).to(x0), y, x0, k)
                steps.append(time.perf_counter() - began)
            read = len(set(y.tolist())) * (size or 1300) * 3 * 64 * 64 / 2**20
            held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"1,000 classes x 1,300 images of 64 x 64, {size or 'all'} of a class: {min(steps):.2f} s "
                  f"a step, {read:.0f} MiB read, {held:.1f} GiB resident at most ({os.cpu_count()} cores)")


def direct():
    """The target from uniform t, N = 20 DDIM steps: solve() against a loop that feeds the whole batch N
    times."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = build(dict(shape=(3, 32, 32), channels=64, blocks=2, attention=(16,))).to(device).eval()
    cfg, z = direct_cm.Config(intervals=20), torch.randn(32, 3, 32, 32, device=device)
    t = 50 * common.Draw(0, 0, 0, 32, device).index(20) + 50

    def solve():
        return direct_cm.solve(teacher, z, t, torch.zeros_like(t), None, cfg)

    @torch.no_grad()
    def whole():  # from the noisiest label down; a sample that has not started keeps its value
        x = z.clone()
        for label in range(1000, 0, -50):
            now = torch.full_like(t, label)
            x_s = direct_cm.ode_step(teacher, x, now, now - 50, None, cfg)
            x = torch.where((t >= label).view(-1, 1, 1, 1), x_s, x)
        return x
    assert torch.allclose(solve(), whole(), atol=1e-3)
    seconds = median(dict(solve=solve, whole=whole), 5)
    print(f"{device}: {seconds['solve'] / seconds['whole']:.2f} of the time; "
          f"{t.sum().item() / 50 / (32 * 20):.2f} of the samples fed")


def busy():
    """Milliseconds of a step of `python scm.py`, the toy, over 100 steps, and of the README's diffusion of
    shapes, over 10, beside programs that do nothing but count. With fewer cores than programs, it cannot be
    faster than its fair share of them."""
    shapes = "--dataset shapes --mode diffusion --image_size 32 --channels 16 --channel_mult 1,2,4".split()
    for name, words, every in (("scm.py", [], 20), ("shapes", shapes, 2)):
        lines = []
        for others in (0, 1, 2, 4):
            crowd = [subprocess.Popen([sys.executable, "-c", "while 1: pass"]) for _ in range(others)]
            with tempfile.TemporaryDirectory() as out:
                command = [sys.executable, ROOT / "scm.py", *words, "--log_every", str(every), "--out", out]
                crowd.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
                log = {}
                try:
                    while 6 * every not in log:
                        time.sleep(0.1)
                        text = Path(out, "log.jsonl").read_text() if Path(out, "log.jsonl").exists() else ""
                        log = {row["step"]: row["seconds"] for row in map(json.loads, text.splitlines())}
                finally:
                    for program in crowd:
                        program.kill()
                        program.wait()
            lines.append(f"{200 / every * (log[6 * every] - log[every]):.0f} ms beside {others}")
        print(f"a step of {name} on {os.cpu_count()} cores: {', '.join(lines)} busy programs")


# ------------------------------------------------------------------------------------- the list for a GPU

def check_run():
    """scd of size S, with as many samples at once as Run takes for a batch of 256, for five steps."""
    net, teacher = network(), freeze(network().eval().requires_grad_(False))
    free = torch.cuda.mem_get_info()[0] if CUDA else 2**30
    micro = largest_micro(net, 256 if CUDA else 4, free)
    parameters, _, fixed, sample = estimate(net.options, False)
    forecast = 4 * 4 * parameters + fixed + micro * sample  # net, gradient, Adam's two
    cfg, scaler = scm.Config(warmup=0), torch.amp.GradScaler(DEVICE, enabled=CUDA)
    optimizer, norms, finite, seconds, far = torch.optim.Adam(net.parameters()), [], True, [], 0.0
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() - 4 * parameters
    with warnings.catch_warnings(record=True) as syncs:
        warnings.simplefilter("always")
        for step in range(5):
            began = time.perf_counter()
            gen = common.Draw(0, step, 0, micro, DEVICE)
            x0, y = 0.5 * gen.normal(*net.options["shape"]), gen.index(1000)
            if CUDA and step == 4:
                torch.cuda.set_sync_debug_mode("warn")  # of the loss; the optimizer's step has its own
            loss, info = scm.scd(net, net, teacher, x0, y, step, cfg, gen)
            scaler.scale(loss).backward()
            if CUDA:
                torch.cuda.set_sync_debug_mode("default")
            scaler.unscale_(optimizer)
            norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), math.inf)))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            kit.normalize_weights(net)
            finite = finite and math.isfinite(info["tangent_rms"])
            seconds.append(time.perf_counter() - began)
    most = (torch.cuda.max_memory_allocated() - before) / 2**30 if CUDA else 0.0
    with torch.no_grad():  # the kernel's F^- against the F of PyTorch's attention, which has the gradient
        t = torch.linspace(0.01, 1.56, micro, dtype=torch.float64, device=DEVICE)
        F_minus, _ = scm.tangent(net, x0, t, y, None, x0, 0, cfg, gen)
        far = (net(x0 / cfg.sigma_d, t, y) - F_minus).square().mean().sqrt().item()
    skipped = sum(not math.isfinite(v) for v in norms)
    waits = sum("synchroniz" in str(w.message) for w in syncs)
    found = dict(micro=micro, peak=most, forecast=forecast / 2**30, skipped=skipped, rms=far, syncs=waits,
                 samples_per_s=micro / statistics.median(seconds[1:]))
    good = finite and skipped < 5 and far < 0.05 and not (CUDA and most > 1.33 * forecast / 2**30)
    return good, (f"{micro} samples at once; {most:.1f} GiB, forecast {forecast / 2**30:.1f}; {skipped} of 5 "
                  f"steps skipped; tangents{' not' * (not finite)} finite; F and F^- {far:.1e} apart; "
                  f"{waits} waits for the GPU in a loss; {found['samples_per_s']:.3g} samples/s"), found


KINDS = dict(attention="flash|fmha|^kernel", convolution="conv|implicit|cutlass|xmma|wgrad|dgrad|gemm|mm",
             elementwise="elementwise|vectorized|reduce|fused|copy|[cC]at|pad|foreach|mul|add|native")


def check_profile():
    """Where a micro-batch of scd's time on the GPU goes, by the names of kernels, and how much of it is idle;
    the time with cudnn's benchmark mode, which tries algorithms."""
    from torch.profiler import ProfilerActivity, profile
    step = one_step(batch=32 if CUDA else 2)
    step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * CUDA
    began = time.perf_counter()
    with profile(activities=activities) as seen:
        step()
        if CUDA:
            torch.cuda.synchronize()
    total, shares, busy = time.perf_counter() - began, {}, 0.0
    for event in seen.key_averages():
        spent = getattr(event, "self_device_time_total" if CUDA else "self_cpu_time_total") / 1e6
        kind = next((kind for kind, names in KINDS.items() if re.search(names, event.key)), "other")
        shares[kind], busy = shares.get(kind, 0) + spent, busy + spent
    plain = median(dict(step=step), 4)["step"]
    torch.backends.cudnn.benchmark = True
    tried = median(dict(step=step), 4)["step"]
    torch.backends.cudnn.benchmark = False
    text = ", ".join(f"{kind} {v / busy:.0%}" for kind, v in sorted(shares.items(), key=lambda kv: -kv[1]))
    return True, (f"{text}; idle {max(0, 1 - busy / total):.0%}; with cudnn.benchmark {tried / plain:.2f} of "
                  "the time"), shares


def one_step(batch, dropout=0.0, checkpointing=False, wrap=lambda net: net, **options):
    """A function: one step of scd, of a network that starts with the same weights each time, without the
    optimizer; returns the loss."""
    net, teacher = network(dropout=dropout, **options), network(**options).eval().requires_grad_(False)
    net.checkpointing, wrapped = checkpointing, wrap(net)
    gen = common.Draw(0, 0, 0, batch, DEVICE)
    x0, y = 0.5 * gen.normal(*net.options["shape"]), gen.index(1000)

    def step():
        for p in net.parameters():
            p.grad = None
        gen = common.Draw(0, 1, 0, batch, DEVICE)
        loss, _ = scm.scd(wrapped, net, teacher, x0, y, 0, scm.Config(), gen)
        loss.backward()
        return loss.item()
    return step


def check_xxl():
    """Two steps of scd of size XXL as on a GPU of 80 GB: net, average, teacher, gradient and Adam's two."""
    whole = torch.cuda.get_device_properties(0).total_memory if CUDA else 0
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, 80e9 / whole))
    try:
        net, ema, teacher = (network(size="XXL") for _ in range(3))
        freeze(teacher.eval().requires_grad_(False))
        ema.requires_grad_(False)
        free = 80e9 - torch.cuda.memory_allocated() if CUDA else 2**30
        share = 256 if CUDA else 4
        micro = largest_micro(net, share, free)
        net.checkpointing = micro < min(ENOUGH, share)
        micro = largest_micro(net, share, free, checkpointing=True) if net.checkpointing else micro
        optimizer, scaler = torch.optim.Adam(net.parameters()), torch.amp.GradScaler(DEVICE, enabled=CUDA)
        began = time.perf_counter()
        for step in range(2):
            gen = common.Draw(0, step, 0, micro, DEVICE)
            x0, y = 0.5 * gen.normal(*net.options["shape"]), gen.index(1000)
            loss, _ = scm.scd(net, net, teacher, x0, y, step, scm.Config(), gen)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            kit.lerp(ema, net, 0.99)
        seconds, most = time.perf_counter() - began, torch.cuda.max_memory_reserved() / 1e9 if CUDA else 0
    finally:
        if CUDA:
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.empty_cache()
    way = f"{micro} samples at once" + ", with checkpointing" * net.checkpointing
    return math.isfinite(loss.item()), f"{way}; {most:.1f} of 80 GB; {2 * micro / seconds:.3g} samples/s"


def check_compile():
    """--compile with checkpointing and dropout: no graph breaks, the loss of the plain network."""
    import torch._dynamo
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    how = dict(options=dict(fallback_random=True)) if CUDA else dict(backend="aot_eager")
    options = dict(batch=32 if CUDA else 2, dropout=0.1, checkpointing=True)
    plain, compiled = one_step(**options), one_step(**options, wrap=lambda net: torch.compile(net, **how))
    expected, began = plain(), time.perf_counter()
    loss, spent = compiled(), time.perf_counter() - began
    seconds = median(dict(plain=plain, compiled=compiled), 4)
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    good = math.isclose(loss, expected, rel_tol=2e-2 if CUDA else 1e-3) and not breaks
    ratio = seconds["compiled"] / seconds["plain"]
    return good, (f"loss {loss:.5f}, plain {expected:.5f}; {breaks} graph breaks; {spent:.0f} s to compile; "
                  f"{ratio:.2f} of the time")


SMALL = ["--channels", "16", "--blocks", "1", "--batch", "64", "--save_every", "5"]
TOY = ["--mode", "sct", *SMALL]


def run(words, out, processes=1, **kw):
    """Start a script of the root, by torchrun if there is more than one process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launcher * (processes > 1), ROOT / words[0], *words[1:], "--out", out]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(list(map(str, command)), **quiet)


def finish(*started):
    for child in started:
        _, text = child.communicate()
        if child.returncode:
            raise RuntimeError(text.strip().splitlines()[-1])


def weights(out, part="net"):
    return kit.read_checkpoint(out)[part]


def check_two_processes(out):
    """Two processes, over NCCL or gloo, take the steps of one on the global batch."""
    if CUDA and torch.cuda.device_count() < 2:
        return True, "skipped: one GPU"
    words = ["scm.py", *TOY, "--steps", 10, "--overwrite"]
    finish(run(words, out / "one"))
    finish(run(words, out / "two", 2))
    a, b = weights(out / "one"), weights(out / "two")
    off = max((a[k] - b[k]).abs().max().item() for k in a)
    return off < 1e-3, f"{'NCCL' if CUDA else 'gloo'}; weights at most {off:.1e} apart after 10 steps"


def check_resume(out):
    """kill -9, then --resume, of an image network: on a CPU bit for bit the unbroken run; on a GPU sums are
    rounded in another order each time."""
    words = ["scm.py", "--dataset", "shapes", "--mode", "diffusion", *SMALL, "--lr_cooldown", "0",
             "--image_size", 16 if CUDA else 8, "--overwrite", "--steps"]
    (out / "broken/ckpt.pt").unlink(missing_ok=True)  # of an earlier call
    child = run([*words, 10**6], out / "broken")
    deadline = time.time() + 120
    while not (out / "broken/ckpt.pt").exists() or kit.read_checkpoint(out / "broken")["step"] < 10:
        if child.poll() is not None or time.time() > deadline:
            raise RuntimeError("no checkpoint of step 10")
        time.sleep(0.1)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    step = weights(out / "broken", "step")
    finish(run(["scm.py", "--resume", "--steps", step + 10], out / "broken"))
    finish(run([*words, step + 10], out / "whole"))
    a, b = weights(out / "broken"), weights(out / "whole")
    off = max((a[k] - b[k]).abs().max().item() for k in a)
    return off == 0 or CUDA and off < 1e-2, (
        f"killed after step {step}, at {step + 10} weights at most {off:.1e} apart")


def check_cifar10(out, data, features, seconds):
    """DDPM++ on CIFAR-10 at 32 x 32: diffusion, then sct from it, each for as many steps as half of the time
    takes; samples, and their Frechet distance to the training images."""
    shared = ["--batch", "256" if CUDA else "8", "--dtype", "bf16" if CUDA else "fp32", "--log_every", "10"]
    small = [] if CUDA else ["--channels", "16", "--channel_mult", "1,1", "--blocks", "1", "--attention", "8"]
    report, finite = [], True
    for mode, extra in (("diffusion", ["--lr_warmup", "100", "--ema_halflife", "5e4", *small]),
                        ("sct", ["--init", out / "diffusion", "--warmup", "200"])):
        words = ["scm.py", "--dataset", "cifar10", "--data", data, "--mode", mode, *shared, *extra]
        words += ["--overwrite"]
        began = time.time()
        finish(run([*words, "--steps", 20], out / mode))
        rate = json.loads((out / mode / "log.jsonl").read_text().splitlines()[-1])["seconds"] / 20
        count = int(max(20, (0.4 * seconds - (time.time() - began)) / rate)) if CUDA else 20
        finish(run([*words, "--steps", count], out / mode))
        nfes = ["35"] if mode == "diffusion" else ["1", "2"]
        evaluation.main([str(out / mode), "--nfe", *nfes, "--samples", "5000" if CUDA else "20", "--features",
                         features, "--write"])
        for row in json.loads((out / mode / "eval.json").read_text()):
            report.append(f"{mode} after {count} steps, {row['nfe']} NFE: {row['frechet_distance']:.3f}")
            finite = finite and math.isfinite(row["frechet_distance"])
    return finite, "Frechet distance of " + "; ".join(report)


def gpu(argv):
    parser = argparse.ArgumentParser("bench.py gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9, help="that the whole may take [9]")
    parser.add_argument("--data", default="", help="CIFAR-10's archive or class folders; none skips it")
    parser.add_argument("--features", default="pixels", help="as in eval.py, for CIFAR-10 [pixels]")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder to write to [out/gpu]")
    args = parser.parse_args(argv)
    began, rows = time.time(), []
    place = torch.cuda.get_device_name() if CUDA else "no CUDA: the CPU, at tiny size"
    print(f"{place}, torch {torch.__version__}")
    checks = dict(attention=check_attention, run=check_run, profile=check_profile, xxl=check_xxl,
                  compile=check_compile, resume=lambda: check_resume(args.out), tangent=check_tangent,
                  jvp=check_jvp, two_processes=lambda: check_two_processes(args.out))
    end = began + 60 * args.minutes
    if args.data:
        checks["cifar10"] = lambda: check_cifar10(args.out / "cifar10", args.data, args.features,
                                                  end - time.time())
    for name, check in checks.items():
        start, values = time.time(), None
        if CUDA:
            torch.cuda.empty_cache()
        try:
            good, figure, *values = check() if start < end else (True, "skipped: no time left")
        except (Exception, SystemExit) as error:  # one check must not keep the others from running
            good, figure = False, f"{type(error).__name__}: {str(error)[:300]}"
        rows.append(dict(check=name, passed=bool(good), figure=figure, seconds=round(time.time() - start, 1),
                         values=values))
        print(f"{'pass' if good else 'FAIL'}  {name}: {figure}", flush=True)
        text = json.dumps(dict(device=place, torch=torch.__version__, checks=rows), indent=1)
        atomic_write(args.out / "gpu.json", lambda file, text=text: file.write(text.encode()))
    table = ["| check | | figure | seconds |", "| --- | --- | --- | --- |"]
    for row in rows:
        good = "pass" if row["passed"] else "FAIL"
        table.append(f"| {row['check']} | {good} | {row['figure']} | {row['seconds']} |")
    atomic_write(args.out / "gpu.md", lambda file: file.write("\n".join(table).encode()))
    print(f"wrote {args.out}/gpu.json and gpu.md")
    return all(row["passed"] for row in rows)


PARTS = dict(steps=check_steps, jvp=check_jvp, attention=check_attention, reference=reference, direct=direct,
             busy=busy)


def main(argv):
    if argv[:1] == ["gpu"]:
        return gpu(argv[1:])
    if not argv or argv[0] not in PARTS or argv[1:] not in ([], ["fp32"], ["bf16"], ["fp16"]):
        kit.fail(f"the parts are {', '.join(PARTS)} and gpu, such as: python tests/bench.py steps bf16")
    print(f"{DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    found = PARTS[argv[0]](**dict(dtype=argv[1]) if argv[1:] else {})
    if found:
        print(found[1])
    return True


if __name__ == "__main__":
    sys.exit(not main(sys.argv[1:]))
