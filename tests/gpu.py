"""One call that checks and measures everything on a GPU; without one, the same list at tiny size on the CPU.

    python tests/bench.py gpu [--minutes 9] [--data CIFAR10] [--features FILE] [--out out/gpu]

CIFAR10 is the archive or class folders. Prints a line for each check, and writes gpu.json and gpu.md."""
import common
import eval as evaluation
import scm

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from bench import median

ROOT = Path(common.__file__).parent
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# Attention's (heads, tokens) in the U-Nets of size S to XXL at 16 and 8 pixels, with 64 channels a head.
SHAPES = [(9, 256), (12, 64), (12, 256), (21, 256), (28, 64)] if CUDA else [(2, 64), (3, 16)]


def network(dtype="fp16" if CUDA else "fp32", **options):
    """sCM's network of size S on 64 x 64 x 4 latents; on a CPU a tiny one of its kind."""
    preset = common.preset(scm.PRESETS, "imagenet512", "scd", "S")
    small = {} if CUDA else dict(channels=16, channel_mult=(1, 2), blocks=1, attention=(4,))
    names = common.NET_FIELDS[:-1]
    options = {k: v for k, v in preset.items() if k in names} | small | dict(dtype=dtype) | options
    size = 64 if CUDA else 8
    net = common.build(dict(shape=(4, size, size), classes=1000) | options).to(DEVICE)
    for name, p in net.named_parameters():  # as if trained: no gain is zero
        p.data = torch.full_like(p, 0.5) if "gain" in name else p.data
    return net


def plain_attention(q, k, v):
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(3) @ v


def check_attention():
    """Output and tangent against float64, at most 1 % of the largest entry off in float16 and 5 % in
    bfloat16; the time of both over that of PyTorch's forward pass."""
    worst, ratios = {}, []
    for heads, tokens in SHAPES:
        x = [torch.randn(4, heads, tokens, 64, device=DEVICE) for _ in range(6)]
        exact = torch.func.jvp(plain_attention, *(tuple(v.double() for v in part) for part in (x[:3], x[3:])))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            y = [v.to(dtype) for v in x]
            with torch.no_grad():
                found = torch.func.jvp(common.attention, tuple(y[:3]), tuple(y[3:]))
            error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact))
            worst[str(dtype)[6:]] = max(error, worst.get(str(dtype)[6:], 0))
        calls = dict(ours=lambda y=y: torch.func.jvp(common.attention, tuple(y[:3]), tuple(y[3:])),
                     plain=lambda y=y: torch.nn.functional.scaled_dot_product_attention(*y[:3]))
        with torch.no_grad():
            seconds = median(calls, 9)
        ratios.append(seconds["ours"] / seconds["plain"])
    kernel = CUDA and torch.cuda.get_device_capability() >= (8, 0) and common.triton_kernel() is not None
    figure = ", ".join(f"{k} {v:.1e}" for k, v in worst.items())
    good = worst["float32"] < 1e-4 and worst["float16"] < 1e-2 and worst["bfloat16"] < 5e-2 and kernel == CUDA
    return good, f"largest error {figure}; {min(ratios):.1f} to {max(ratios):.1f} times SDPA's forward; " \
                 f"{'Triton kernel' if kernel else 'blocks'}"


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


def steps(modes, wrap=lambda net: net, checkpointing=False, turns=5, batch=32 if CUDA else 4):
    """Seconds, first loss and peak memory in GiB of a training step in each mode, with the batch they
    take."""
    net, teacher = network(), network().eval().requires_grad_(False)
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
        common.normalize_weights(net)
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


def check_steps():
    """Steps of diffusion, sct and scd: throughput, ratio, memory beside the estimate, the largest --micro."""
    found = steps(("diffusion", "sct", "scd"))
    base, lines = found["diffusion"]["seconds"], []
    parameters, _, fixed, sample = common.estimate(network().options, False)
    for mode, row in found.items():
        row["ratio"] = row["seconds"] / base
        copies = 4 + (mode == "scd" or CUDA)  # the teacher is there in all; no EMA here
        row["estimate"] = (4 * copies * parameters + fixed + row["batch"] * sample) / 2**30
        lines.append(f"{mode} {row['batch'] / row['seconds']:.3g}/s ({row['ratio']:.2f})"
                     + f", {row['peak']:.1f} GiB (estimate {row['estimate']:.1f})" * CUDA)
    free = torch.cuda.mem_get_info()[0] if CUDA else 2**30
    micro = common.largest_micro(network(), 256, free)
    if CUDA:  # the largest must run
        found["largest"] = steps(("scd",), turns=2, batch=micro)["scd"] | dict(estimate=math.inf)
    good = all(math.isfinite(row["loss"]) for row in found.values())
    good = good and (not CUDA or all(row["peak"] < 1.33 * row["estimate"] for row in found.values()))
    return good, "; ".join(lines) + f"; --micro {micro} of 256", found


def check_compile():
    """--compile: no graph breaks, and the loss of the plain network."""
    import torch._dynamo
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = dict(options=dict(fallback_random=True)) if CUDA else dict(backend="aot_eager")
    plain, found = (steps(("diffusion", "scd"), wrap, turns=4) for wrap in (
        lambda net: net, lambda net: torch.compile(net, **options)))
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    return same_loss(plain, found) and not breaks, f"{breaks} graph breaks; " + speed(plain, found), found


def check_checkpointing():
    """--checkpointing: the same loss in less memory."""
    plain, found = (steps(("diffusion", "scd"), checkpointing=flag, turns=4) for flag in (False, True))
    less = not CUDA or all(found[m]["peak"] < plain[m]["peak"] for m in found)
    text = "".join(f"; {m} {found[m]['peak']:.1f} of {plain[m]['peak']:.1f} GiB" for m in found) * CUDA
    return same_loss(plain, found) and less, speed(plain, found) + text, found


def same_loss(a, b):
    return all(math.isclose(a[m]["loss"], b[m]["loss"], rel_tol=2e-2 if CUDA else 1e-3) for m in a)


def speed(plain, found):
    return "; ".join(f"{m} takes {found[m]['seconds'] / plain[m]['seconds']:.2f} of the time" for m in found)


def check_host_time():
    """A JVP over forward passes where the host's time is all there is: 4 x 4 pixels, 8 channels."""
    net = common.build(dict(shape=(3, 4, 4), channels=8, blocks=2, attention=(4,))).to(DEVICE)
    at = torch.randn(4, 3, 4, 4, device=DEVICE), torch.rand(4, device=DEVICE).double()
    ones = tuple(torch.ones_like(v) for v in at)
    with torch.no_grad():
        seconds = median(dict(forward=lambda: net(*at), jvp=lambda: common.jvp(net, at, ones)), 15)
    ratio = seconds["jvp"] / seconds["forward"]
    return ratio < 8, f"{ratio:.1f} forward passes, {1000 * seconds['jvp']:.1f} ms"


TOY = ["--mode", "sct", "--channels", "16", "--blocks", "1", "--batch", "64", "--save_every", "5"]


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
    return common.read_checkpoint(out)[part]


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
    """kill -9, then --resume: bit for bit the unbroken run."""
    words = ["scm.py", *TOY, "--lr_cooldown", "0", "--overwrite", "--steps"]
    (out / "broken/ckpt.pt").unlink(missing_ok=True)  # of an earlier call
    child = run([*words, 10**6], out / "broken")
    deadline = time.time() + 120
    while not (out / "broken/ckpt.pt").exists() or common.read_checkpoint(out / "broken")["step"] < 10:
        if child.poll() is not None or time.time() > deadline:
            raise RuntimeError("no checkpoint of step 10")
        time.sleep(0.1)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    step = weights(out / "broken", "step")
    finish(run(["scm.py", "--resume", "--steps", step + 10], out / "broken"))
    finish(run([*words, step + 10], out / "whole"))
    a, b = weights(out / "broken"), weights(out / "whole")
    return all(torch.equal(a[k], b[k]) for k in a), f"killed after step {step}, compared at {step + 10}"


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


def main(argv):
    parser = argparse.ArgumentParser("bench.py gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9, help="that the whole may take [9]")
    parser.add_argument("--data", default="", help="CIFAR-10's archive or class folders; none skips it")
    parser.add_argument("--features", default="pixels", help="as in eval.py, for CIFAR-10 [pixels]")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder to write to [out/gpu]")
    args = parser.parse_args(argv)
    began, rows = time.time(), []
    place = torch.cuda.get_device_name() if CUDA else "no CUDA: the CPU, at tiny size"
    print(f"{place}, torch {torch.__version__}")
    checks = dict(attention=check_attention, tangent=check_tangent, steps=check_steps, compile=check_compile,
                  checkpointing=check_checkpointing, host_time=check_host_time,
                  two_processes=lambda: check_two_processes(args.out), resume=lambda: check_resume(args.out))
    if args.data:
        end = began + 60 * args.minutes
        checks["cifar10"] = lambda: check_cifar10(args.out / "cifar10", args.data, args.features,
                                                  end - time.time())
    for name, check in checks.items():
        start, values = time.time(), None
        try:
            good, figure, *values = check()
        except (Exception, SystemExit) as error:  # one check must not keep the others from running
            good, figure = False, f"{type(error).__name__}: {str(error)[:300]}"
        rows.append(dict(check=name, passed=bool(good), figure=figure, seconds=round(time.time() - start, 1),
                         values=values))
        print(f"{'pass' if good else 'FAIL'}  {name}: {figure}", flush=True)
        text = json.dumps(dict(device=place, torch=torch.__version__, checks=rows), indent=1)
        common.atomic_write(args.out / "gpu.json", lambda file, text=text: file.write(text.encode()))
    table = ["| check | | figure | seconds |", "| --- | --- | --- | --- |"]
    for row in rows:
        good = "pass" if row["passed"] else "FAIL"
        table.append(f"| {row['check']} | {good} | {row['figure']} | {row['seconds']} |")
    common.atomic_write(args.out / "gpu.md", lambda file: file.write("\n".join(table).encode()))
    print(f"wrote {args.out}/gpu.json and gpu.md")
    return all(row["passed"] for row in rows)
