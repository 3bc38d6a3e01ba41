"""What the parts cost, as ratios within one run, in one process.

    python tests/bench.py [fp32|bf16]   steps of sCM's objectives over diffusion, on an image U-Net; a JVP
    python tests/bench.py reference     steps of SCT over the dataset over those of ECT; ImageNet-64's size
    python tests/bench.py direct        Direct CM's target: samples fed only under way, over all fed always
    python tests/bench.py --attention   attention and its tangent, over PyTorch's attention without a tangent
    python tests/bench.py gpu           everything that a GPU should be asked, in one call (see gpu.py)

The floor counts network passes: a forward pass 1, its backward 2, a JVP 2 (primal and tangent), the teacher
1. So diffusion = 3, sct = 1 + 2 + 2 = 5, scd = 6. What is compared takes turns, so that a busy machine slows
all alike; the median over the turns is reported.
"""
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.attention

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import direct_cm
import scm
import sct


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


def main():
    dtype = sys.argv[1] if len(sys.argv) > 1 else "fp32"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = dict(shape=(3, 32, 32), classes=10, channels=64, channel_mult=(1, 2), blocks=2, attention=(16,))
    net, teacher = (common.build(options | dict(dtype=dtype)).to(device) for _ in range(2))
    optimizer, cfg, batch = torch.optim.Adam(net.parameters()), scm.Config(), 16
    x0, y = torch.rand(batch, 3, 32, 32, device=device) * 2 - 1, torch.arange(batch, device=device) % 10

    def step(mode):
        loss, _ = scm.LOSSES[mode](net, net, teacher, x0, y, 0, cfg, common.Draw(0, 0, 0, batch, device))
        loss.backward()
        optimizer.step()
        common.normalize_weights(net)
        optimizer.zero_grad()
    floor = dict(diffusion=3, sct=5, scd=6)
    seconds = median({mode: lambda mode=mode: step(mode) for mode in floor})
    print(f"{device}, {dtype}, {torch.get_num_threads()} threads, batch {batch}, "
          f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters")
    print("mode        s/step   / diffusion   floor   over the floor")
    for mode, passes in floor.items():
        ratio = seconds[mode] / seconds["diffusion"]
        print(f"{mode:9} {seconds[mode]:8.3f} {ratio:12.2f} {passes / 3:9.2f} {ratio / (passes / 3):12.2f}")
    tiny = common.build(options | dict(shape=(3, 4, 4), channels=8, attention=(4,))).to(device)
    for name, model, size in (("4 x 4 pixels, 8 channels: host time", tiny, 4), ("32 x 32 pixels", net, 32)):
        at = torch.randn(4, 3, size, size, device=device), torch.rand(4, device=device).double()

        @torch.no_grad()
        def forward(model=model, at=at):
            return model(*at)

        def jvp(model=model, at=at):
            return common.jvp(model, at, tuple(torch.ones_like(v) for v in at))
        seconds = median(dict(forward=forward, jvp=jvp), 15)
        print(f"{name}: a JVP takes {seconds['jvp'] / seconds['forward']:.2f} forward passes, "
              f"{1000 * seconds['jvp']:.1f} ms; memory {peak(jvp) / max(peak(forward), 1):.2f} times")


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


def reference():
    """CIFAR-10 at 16 x 16, conditional, batch 128: a step of sct over the dataset over one of ect. Then the
    target of ImageNet-64's preset, on a sparse file of 1,000 classes x 1,300 images, without a network."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg = sct.Config(dataset="folder", conditional=True, batch=128, reference="dataset")
    rows = np.random.default_rng(0).integers(0, 256, (50_000, 3, 16, 16), np.uint8)
    data = common.Stored(cfg, rows, np.arange(50_000) // 5000)
    net = common.build(dict(shape=(3, 16, 16), classes=10, channels=32, blocks=1, head=False)).to(device)

    def step(mode):
        gen = common.Draw(0, 0, 0, cfg.batch, device)
        x0, y = data.batch(gen)
        sct.LOSSES[mode](net, net, data, x0, y, 0, cfg, gen)[0].backward()
    seconds = median(dict(ect=lambda: step("ect"), sct=lambda: step("sct")))
    print(f"{device}: ect {seconds['ect']:.2f} s, sct over 50,000 images {seconds['sct']:.2f} s, "
          f"{seconds['sct'] / seconds['ect']:.2f} times")
    with tempfile.TemporaryDirectory() as folder:
        shape = (1_300_000, 3, 64, 64)
        rows = np.lib.format.open_memmap(Path(folder, "rows.npy"), "w+", np.uint8, shape)
        data = common.Stored(cfg, rows, np.arange(len(rows)) // 1300)
        for size in (256, 0):
            cfg.class_size, steps = size, []
            for k in range(3):
                gen = common.Draw(0, k, 0, cfg.batch, device)
                x0, y = data.batch(gen)
                began = time.perf_counter()
                sct.stable_target(x0, torch.ones(len(x0)).to(x0), y, sct.reference(data, x0, y, k, cfg))
                steps.append(time.perf_counter() - began)
            read = len(set(y.tolist())) * (size or 1300) * 3 * 64 * 64 / 2**20
            held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"1,000 classes x 1,300 images of 64 x 64, {size or 'all'} of a class: {min(steps):.2f} s "
                  f"a step, {read:.0f} MiB read, {held:.1f} GiB resident at most ({os.cpu_count()} cores)")


def direct():
    """The target from uniform t, N = 20 DDIM steps: solve() against a loop that feeds the whole batch N
    times."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = common.build(dict(shape=(3, 32, 32), channels=64, blocks=2, attention=(16,))).to(device).eval()
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


def attention():
    """Output and tangent for 8 heads of 64 channels, over the plain forward pass, whose flops a JVP needs
    three times; memory is what a call allocates beside its result and arguments (GPU alone)."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.float16) if cuda else ("cpu", torch.float32)
    plain, math = torch.nn.functional.scaled_dot_product_attention, torch.nn.attention.SDPBackend.MATH

    def by_math(*x):
        with torch.nn.attention.sdpa_kernel(math):
            return plain(*x)
    jvps = {"common.attention": common.attention, "SDPA's math backend": by_math}
    try:
        from jvp_flash_attention.jvp_attention import JVPAttn
        jvps["jvp_flash_attention"] = JVPAttn.fwd_dual
    except ImportError:
        pass
    print(f"{device}, {dtype}\n| tokens | | ms | / plain | MiB |\n| --- | --- | --- | --- | --- |")
    for n in (256, 1024, 4096):
        x = [torch.randn(2 if cuda else 1, 8, n, 64, device=device, dtype=dtype) for _ in range(6)]
        calls = {"plain forward": lambda: plain(*x[:3])}
        calls |= {name: lambda f=f: torch.func.jvp(f, tuple(x[:3]), tuple(x[3:])) for name, f in jvps.items()}
        times, memory = {name: [] for name in calls}, {}
        for _ in range(7):  # the first is to warm up
            for name, call in calls.items():
                if cuda:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                began = time.perf_counter()
                with torch.no_grad():
                    call()
                if cuda:
                    torch.cuda.synchronize()
                    memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
                times[name].append(time.perf_counter() - began)
        median = {name: statistics.median(values[1:]) for name, values in times.items()}
        for name, seconds in median.items():
            size = f"{memory[name]:.1f}" if cuda else ""
            ratio = seconds / median["plain forward"]
            print(f"| {n} | {name} | {1000 * seconds:.2f} | {ratio:.1f} | {size} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["gpu"]:
        import gpu
        sys.exit(not gpu.main(sys.argv[2:]))
    parts = {"direct": direct, "reference": reference, "--attention": attention}
    parts.get(" ".join(sys.argv[1:]), main)()
