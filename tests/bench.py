"""Cost per training step of sCM's objectives over the diffusion loss, on one image U-Net in one process.

    python tests/bench.py [fp32|bf16]
    python tests/bench.py direct        Direct CM's target: samples fed only while under way, over all fed always
    python tests/bench.py --attention   attention and its tangent, over PyTorch's attention without a tangent

The floor counts network passes: a forward pass 1, its backward 2, a JVP 2 (primal and tangent), the teacher 1.
diffusion = 3, sct = 1 + 2 + 2 = 5, scd = 6. Objectives take turns, so that a busy machine slows all alike; the
median over the turns is reported.
"""
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.attention

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import direct_cm
import scm


def main():
    dtype = sys.argv[1] if len(sys.argv) > 1 else "fp32"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = dict(shape=(3, 32, 32), classes=10, channels=64, channel_mult=(1, 2), blocks=2, attention=(16,))
    net, teacher = (common.build(options | dict(dtype=dtype)).to(device) for _ in range(2))
    optimizer, cfg, batch = torch.optim.Adam(net.parameters()), scm.Config(), 16
    x0, y = torch.rand(batch, 3, 32, 32, device=device) * 2 - 1, torch.arange(batch, device=device) % 10

    def step(mode):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        loss, _ = scm.LOSSES[mode](net, net, teacher, x0, y, 0, cfg, common.Draw(0, 0, 0, batch, device))
        loss.backward()
        optimizer.step()
        common.normalize_weights(net)
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began
    floor = dict(diffusion=3, sct=5, scd=6)
    seconds = {mode: [] for mode in floor}
    for turn in range(8):
        for mode in floor:
            seconds[mode].append(step(mode))
    median = {mode: statistics.median(times[2:]) for mode, times in seconds.items()}
    print(f"{device}, {dtype}, {torch.get_num_threads()} threads, batch {batch}, "
          f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters")
    print("mode        s/step   / diffusion   floor   over the floor")
    for mode, passes in floor.items():
        ratio = median[mode] / median["diffusion"]
        print(f"{mode:9} {median[mode]:8.3f} {ratio:12.2f} {passes / 3:9.2f} {ratio / (passes / 3):12.2f}")


def direct():
    """The target from uniform t, N = 20 DDIM steps: hop() against a loop that feeds the whole batch N times."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = common.build(dict(shape=(3, 32, 32), channels=64, blocks=2, attention=(16,))).to(device).eval()
    cfg, z = direct_cm.Config(intervals=20), torch.randn(32, 3, 32, 32, device=device)
    t = 50 * common.Draw(0, 0, 0, 32, device).index(20) + 50

    def hop():
        return direct_cm.hop(teacher, z, t, 20, None, cfg)[0]

    @torch.no_grad()
    def whole():  # from the noisiest label down; a sample that has not started keeps its value
        x = z.clone()
        for label in range(1000, 0, -50):
            now = torch.full_like(t, label)
            x_s = direct_cm.solver_step(teacher, x, now, now - 50, None, cfg)
            x = torch.where((t >= label).view(-1, 1, 1, 1), x_s, x)
        return x
    assert torch.allclose(hop(), whole(), atol=1e-3)
    seconds = {function: [] for function in (hop, whole)}
    for _ in range(5):
        for function, times in seconds.items():
            began = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    ratio = statistics.median(seconds[hop]) / statistics.median(seconds[whole])
    print(f"{device}: {ratio:.2f} of the time; {t.sum().item() / 50 / (32 * 20):.2f} of the samples fed")


def attention():
    """Output and tangent for 8 heads of 64 channels, over the plain forward pass, whose flops a JVP needs three
    times; memory is what a call allocates beside its result and arguments (GPU alone)."""
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
            print(f"| {n} | {name} | {1000 * seconds:.2f} | {seconds / median['plain forward']:.1f} | {size} |")


if __name__ == "__main__":
    {("direct",): direct, ("--attention",): attention}.get(tuple(sys.argv[1:]), main)()
