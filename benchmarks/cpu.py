"""mlx_loop on a CPU, with PyTorch's attention: for studies of long prompts without a GPU.

    LD_PRELOAD=.../libmkl_rt.so python benchmarks/cpu.py evaluate --dtype float32 ...

MLX's CPU backend takes some 25 ns for an exponential, and a prompt of 4096 tokens has 8 million of
them in each head of each layer. PyTorch's attention and SiLU of float32 numbers are the same to
2e-6 and several times as fast; everything else stays MLX's. Needs torch, and a BLAS that both use:
with Intel's (`pip install mkl`) attention is five times as fast as with OpenBLAS.
"""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import mlx_lm.models.activations as activations
import numpy as np
import torch

from mlx_loop.screens.cli import main

# Below this many numbers handing them over takes longer than it saves.
MANY = 1 << 12

_attention = mx.fast.scaled_dot_product_attention
_swiglu = activations.swiglu


def tensor(array: mx.array) -> torch.Tensor:
    mx.eval(array)
    return torch.from_numpy(np.asarray(array))


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **rest: Any
) -> mx.array:
    """As `mx.fast.scaled_dot_product_attention`, of float32 and without sinks by PyTorch."""
    queries, keys = q.shape[2], k.shape[2]
    narrow = {q.dtype, k.dtype, v.dtype} != {mx.float32}
    if narrow or rest.get("sinks") is not None or queries * keys < MANY:
        return _attention(q, k, v, scale=scale, mask=mask, **rest)
    seen = None
    if isinstance(mask, str):
        seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    elif mask is not None:
        seen = tensor(mask)
    found = torch.nn.functional.scaled_dot_product_attention(
        tensor(q), tensor(k), tensor(v), attn_mask=seen, scale=scale, enable_gqa=True
    )
    return mx.array(found.numpy())


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    if {gate.dtype, x.dtype} != {mx.float32} or gate.size < MANY:
        return _swiglu(gate, x)
    return mx.array((torch.nn.functional.silu(tensor(gate)) * tensor(x)).numpy())


if __name__ == "__main__":
    # Before mlx-lm's models are imported, which take them by name.
    mx.fast.scaled_dot_product_attention = attention
    activations.swiglu = swiglu
    sys.exit(main())
