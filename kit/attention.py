"""Attention with a JVP: blocks of keys on any device, or a Triton kernel on a GPU (sCM, App. F)."""
from kit.process import RANK

import functools
import math
import os

import torch
from torch.autograd import forward_ad


def attention(q, k, v):
    """softmax(q k^T / sqrt(c)) v, all (B, heads, N, c).

    PyTorch's fused attention has no JVP. Under jvp, output and tangent therefore come from a pass of our own,
    in memory that is linear in N (sCM, App. F)."""
    primals, tangents = zip(*(forward_ad.unpack_dual(x) for x in (q, k, v)))
    if all(tangent is None for tangent in tangents):  # no jvp
        primals = [x.contiguous() for x in primals]  # strided inputs would not be fused
        if q.is_meta:  # a forecast counts what a GPU would hold
            return torch.ops.aten._scaled_dot_product_flash_attention(*primals)[0]
        return torch.nn.functional.scaled_dot_product_attention(*primals)
    tangents = (torch.zeros_like(x) if tx is None else tx for x, tx in zip(primals, tangents))
    return forward_ad.make_dual(*DualAttention.apply(*primals, *tangents))


class DualAttention(torch.autograd.Function):
    """(q, k, v, tq, tk, tv) -> (o, to), output and tangent. It is an autograd.Function because functorch
    gives these plain tensors; its wrapped ones have no memory that a kernel could read. It has no
    backward."""

    @staticmethod
    def forward(q, k, v, tq, tk, tv):
        gpu = q.is_cuda and torch.cuda.get_device_capability(q.device) >= (8, 0)  # Ampere and later
        interpreter = os.environ.get("TRITON_INTERPRET") == "1" and q.dtype != torch.bfloat16
        fits = q.element_size() <= 4 and q.shape[-1] in (16, 32, 64, 128) and q.shape == k.shape == v.shape
        fused = (gpu or interpreter) and fits and triton_works(q.device, q.dtype, q.shape[-1])
        return (attention_triton if fused else attention_blocks)(q, k, v, tq, tk, tv)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


def attention_blocks(q, k, v, tq, tk, tv, size=256):
    """Attention and its tangent, (B, heads, N, c) each, over blocks of keys, on any device and in any dtype.

    With S = q k^T / sqrt(c) and P = softmax S:  o = P v,  to = P tv + (P * tS) v - rowsum(P * tS) o.
    The blocks are summed as in FlashAttention. With m the largest score so far and p = exp(S - m), the sums
    are l of p, mu of p * tS, o of p v, and a of p tv + (p * tS) v. All of them fade whenever m grows."""
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    scale = 1 / math.sqrt(q.shape[-1])
    q, tq = q.to(wide) * scale, tq.to(wide) * scale
    both = torch.cat([tq, q], dim=3)
    m = torch.full_like(q[..., :1], -math.inf)
    l, mu, o, a = 0, 0, 0, 0
    for block in zip(*(x.split(size, dim=2) for x in (k, v, tk, tv))):
        k, v, tk, tv = (x.to(wide) for x in block)
        s, ts = q @ k.mT, both @ torch.cat([k, tk], dim=3).mT                    # (B, heads, N, size)
        before, m = m, torch.maximum(m, s.amax(3, keepdim=True))
        p, fade = (s - m).exp(), (before - m).exp()
        pts = p * ts
        l = l * fade + p.sum(3, keepdim=True)
        mu = mu * fade + pts.sum(3, keepdim=True)
        o = o * fade + p @ v
        a = a * fade + p @ tv + pts @ v
    o = o / l
    return o.to(dtype), ((a - mu * o) / l).to(dtype)


@functools.cache
def triton_kernel():
    """attention_blocks as a Triton kernel, or None where Triton is missing.

    Each program takes `rows` queries of one image and head over all keys, `cols` keys at a time. Tensors are
    contiguous (B, heads, n, c). Sums are float32, and "ieee" keeps TF32 out of products of float32."""
    global triton, tl  # a kernel looks for these among the module's names
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    @triton.jit
    def kernel(Q, K, V, TQ, TK, TV, O, TO, n, scale, c: tl.constexpr, rows: tl.constexpr, cols: tl.constexpr):
        blocks = tl.cdiv(n, rows)
        start = (tl.program_id(0) // blocks).to(tl.int64) * n * c             # of this image and head
        i = tl.program_id(0) % blocks * rows + tl.arange(0, rows)
        d = tl.arange(0, c)
        query, is_query = start + i[:, None] * c + d[None, :], i[:, None] < n
        q, tq = tl.load(Q + query, is_query, 0.0), tl.load(TQ + query, is_query, 0.0)
        m, l = tl.full((rows,), float("-inf"), tl.float32), tl.zeros((rows,), tl.float32)
        mu = tl.zeros((rows,), tl.float32)
        o, a = tl.zeros((rows, c), tl.float32), tl.zeros((rows, c), tl.float32)
        for first in range(0, n, cols):
            j = first + tl.arange(0, cols)
            key, is_key = start + j[:, None] * c + d[None, :], j[:, None] < n
            k, tk = tl.load(K + key, is_key, 0.0), tl.load(TK + key, is_key, 0.0)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale           # (rows, cols)
            s = tl.where(j[None, :] < n, s, float("-inf"))
            ts = tl.dot(tq, tl.trans(k), input_precision="ieee")
            ts = tl.dot(q, tl.trans(tk), ts, input_precision="ieee") * scale      # 0 past the last key
            m_new = tl.maximum(m, tl.max(s, 1))
            p, fade = tl.exp(s - m_new[:, None]), tl.exp(m - m_new)
            pts, m = p * ts, m_new
            l, mu = l * fade + tl.sum(p, 1), mu * fade + tl.sum(pts, 1)
            v, tv = tl.load(V + key, is_key, 0.0), tl.load(TV + key, is_key, 0.0)
            p, pts = p.to(v.dtype), pts.to(v.dtype)
            o = tl.dot(p, v, o * fade[:, None], input_precision="ieee")
            a = tl.dot(p, tv, a * fade[:, None], input_precision="ieee")
            a = tl.dot(pts, v, a, input_precision="ieee")
        o = o / l[:, None]
        a = (a - mu[:, None] * o) / l[:, None]
        tl.store(O + query, o.to(O.dtype.element_ty), is_query)
        tl.store(TO + query, a.to(TO.dtype.element_ty), is_query)
    return kernel


@functools.cache
def triton_works(device, dtype, c):
    """Whether the kernel runs here, found by a small launch. Triton's first one needs a C compiler, which
    slim images lack, and a GPU may lack the memory for a block."""
    if not triton_kernel():
        return False
    try:
        attention_triton(*torch.zeros(6, 1, 1, 16, c, device=device, dtype=dtype))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:
        if RANK == 0:
            print(f"attention's tangent without Triton, slower ({type(error).__name__}: "
                  f"{' '.join(str(error).split())[:120]})")
        return False
    return True


def attention_triton(*duals):
    """Launch the kernel on (q, k, v, tq, tk, tv), each (B, heads, N, c); returns (o, to).

    The sizes are such that the compiler spills no registers on Hopper, and up to 64 channels no more than 16
    bytes on Ampere. They were found by compiling alone: the kernel has not run on a GPU yet."""
    duals = [x.contiguous() for x in duals]
    out = [torch.empty_like(duals[0]) for _ in range(2)]
    b, heads, n, c = duals[0].shape
    device = torch.cuda.get_device_properties(duals[0].device) if duals[0].is_cuda else None
    roomy = device is None or device.shared_memory_per_block_optin >= 160 * 1024  # A100, H100; not RTX
    if duals[0].dtype == torch.float32:  # no tensor cores without TF32, so smaller blocks
        rows, cols, warps, stages = 32, 32, 4 if c <= 32 else 8, 1
    elif c <= 64:
        rows, cols, warps, stages = 64, 64, 4, 3 if roomy else 2
    else:
        hopper = device is None or device.major == 9
        rows, cols, warps, stages = 64, 32, 4 if hopper else 8, 2 if roomy else 1
    with torch.cuda.device_of(duals[0]):
        triton_kernel()[(b * heads * triton.cdiv(n, rows),)](
            *duals, *out, n, 1 / math.sqrt(c), c, rows, cols, num_warps=warps, num_stages=stages)
    return tuple(out)
