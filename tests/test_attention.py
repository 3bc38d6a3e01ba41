"""kit/attention.py: output and tangent of one online pass against PyTorch's own math in float64."""
import kit
from conftest import ROOT

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


def oracle(q, k, v):
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v


def inputs(n=100, c=16, keys=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, n, c, generator=g, dtype=torch.float64) for _ in range(6)]


def error(a, b):
    return float((a.double() - b).norm() / b.norm())


def both(function, x, dtype):
    with torch.no_grad():
        return torch.func.jvp(function, *(tuple(v.to(dtype) for v in part) for part in (x[:3], x[3:])))


def test_where_the_kernel_cannot_start_the_blocks_take_over(monkeypatch, capsys):
    """As on a slim image, where Triton finds no C compiler: one line says so, once."""
    def launch(*duals):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")
    own = sys.modules["kit.attention"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(own, "triton_kernel", lambda: True)
    monkeypatch.setattr(own, "attention_triton", launch)
    own.triton_works.cache_clear()
    x = inputs(20)
    for _ in range(2):
        for found, expected in zip(both(own.attention, x, torch.float32), both(oracle, x, torch.float64)):
            assert error(found, expected) < 1e-5
    own.triton_works.cache_clear()
    shown = capsys.readouterr().out
    assert "C compiler" in shown and len(shown.splitlines()) == 1


@pytest.mark.parametrize("n, dtype, bound", [
    (100, torch.float32, 1e-5), (700, torch.float32, 1e-5), (1, torch.float32, 1e-5),
    (513, torch.float16, 2e-3), (513, torch.bfloat16, 2e-2)])
def test_output_and_tangent(n, dtype, bound):
    """Any number of tokens, also more than one block of keys; large logits, too."""
    x = [v.to(dtype).double() for v in inputs(n)]
    x[0] *= 4
    for found, expected in zip(both(kit.attention.attention, x, dtype), both(oracle, x, torch.float64)):
        assert found.dtype == dtype and error(found, expected) < bound


def test_missing_tangents():
    """q alone moves: the tangents of k and v count as zero."""
    q, k, v, tq, *_ = inputs()
    with torch.no_grad():
        found = torch.func.jvp(lambda q: kit.attention.attention(q, k, v), (q,), (tq,))
        expected = torch.func.jvp(lambda q: oracle(q, k, v), (q,), (tq,))
    assert all(error(a, b) < 1e-12 for a, b in zip(found, expected))


def test_ordinary_pass_has_gradients():
    """Without a tangent it is PyTorch's attention, with the gradient of the formula."""
    x = [v.requires_grad_() for v in inputs()[:3]]
    grads = [torch.autograd.grad(f(*x).sin().sum(), x) for f in (kit.attention.attention, oracle)]
    assert all(error(a, b) < 1e-10 for a, b in zip(*grads))


def test_memory_is_linear():
    """No tensor of the pass has N^2 elements: the largest grows with N."""
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            found = out if isinstance(out, (list, tuple)) else [out]
            self.size = max([self.size] + [v.numel() for v in found if isinstance(v, torch.Tensor)])
            return out
    sizes = []
    for n in (1024, 2048):
        with Largest() as largest:
            kit.attention.attention_blocks(*(v[:1, :1].float() for v in inputs(n)))
        sizes.append(largest.size)
    assert sizes[1] <= 2 * sizes[0] and sizes[1] < 2048**2


SCRIPT = """
import sys, torch
sys.path.insert(0, {root!r}); sys.path.insert(0, {root!r} + "/tests")
import kit, test_attention as t
assert kit.attention.triton_kernel() is not None
for n, c, dtype, bound in ((70, 16, torch.float32, 1e-5), (70, 64, torch.float32, 1e-5),
                           (70, 32, torch.float16, 2e-3)):
    x = [v[:, :2].to(dtype).double() for v in t.inputs(n, c)]
    kit.attention.attention_blocks = None  # the kernel, and nothing else
    for found, expected in zip(t.both(kit.attention.attention, x, dtype), t.both(t.oracle, x, torch.float64)):
        assert t.error(found, expected) < bound, (n, c, dtype, t.error(found, expected))
print("fine")
"""


def test_triton_kernel_in_the_interpreter():
    """The GPU's kernel, run by Triton's interpreter on the CPU."""
    pytest.importorskip("triton")
    env = os.environ | dict(TRITON_INTERPRET="1")
    code = SCRIPT.format(root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "fine" in done.stdout, done.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("n, dtype, bound", [(256, torch.float32, 1e-5), (1000, torch.float16, 2e-3)])
def test_triton_kernel_on_the_gpu(n, dtype, bound):
    """The same kernel, compiled."""
    x = [v.to("cuda", dtype).double() for v in inputs(n, 64)]
    for found, expected in zip(both(kit.attention.attention, x, dtype), both(oracle, x, torch.float64)):
        assert error(found, expected) < bound
