"""Cost per training step of sCM's objectives over the diffusion loss, on one image U-Net in one process.

    python tests/bench.py [fp32|bf16]

The floor counts network passes: a forward pass 1, its backward 2, a JVP 2 (primal and tangent), the teacher 1.
diffusion = 3, sct = 1 + 2 + 2 = 5, scd = 6. Objectives take turns, so that a busy machine slows all alike; the
median over the turns is reported.
"""
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
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


if __name__ == "__main__":
    main()
