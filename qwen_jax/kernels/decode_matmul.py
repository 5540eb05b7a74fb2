"""x @ W^T for few rows of x and one layer of a stack of packed weights: what decode spends its time
on.

The weights are packed once at load into the order in which the kernel reads them (packing.py), and
stay stacked: the kernel takes the whole stack and a layer index, because a slice would be copied
before the call. It knows no model.
"""

import jax
import jax.numpy as jnp

from qwen_jax.kernels.hopper import on_hopper, say_once
from qwen_jax.kernels.packing import PackedWeight
from qwen_jax.kernels.tilings import tiling_for
from qwen_jax.kernels.unpack import unpack

# Above this a GEMM on unpacked weights is faster (benchmarks/qmatmul.py --crossover: it takes 1.1
# times the kernel's time at 128 rows of int4, 1.3 times at 64 and 0.7 times at 128 of bf16).
MAX_ROWS = 128
_MAX_ROWS_BF16 = 64
# Of one call: accumulators of more would not stay in registers.
MOST_ROWS = 32


def decode_matmul(
    x: jax.Array,  # [..., I]
    w: PackedWeight,
    layer: jax.Array,  # int32 []
    *,
    implementation: str | None = None,  # "mosaic", "unpacked" or "xla"; None chooses
) -> jax.Array:  # [..., *O], in x's dtype
    """Multiplies with one layer of a packed stack; sums in float32, rounded once."""
    flat = x.reshape(-1, x.shape[-1])
    y = decode_parts(flat, w, layer, implementation=implementation).sum(0)
    return y.astype(x.dtype).reshape(*x.shape[:-1], *w.out_shape)


def decode_parts(
    x: jax.Array,  # [M, I]
    w: PackedWeight,
    layer: jax.Array,  # int32 []
    *,
    implementation: str | None = None,
) -> jax.Array:  # float32 [P, M, N]
    """The same as P parts whose sum over the first axis is the product: the next operation adds
    them up as it reads.

    A named implementation never falls back; the automatic choice takes the kernel for few
    rows in bfloat16 on a Hopper card, else unpacks in front of a GEMM ("unpacked").
    """
    if x.ndim != 2 or x.shape[-1] != w.in_size:
        raise ValueError(f"x is {x.shape}, the packed weight expects [M, {w.in_size}]")
    chosen = implementation or choose(x, w)
    if chosen == "mosaic":
        return _mosaic(x, w, layer)
    if chosen == "unpacked":
        return _gemm(x, unpack(w, layer, x.dtype))[None]
    if chosen != "xla":
        raise ValueError(
            f"decode_matmul implementation {chosen!r}: expected 'mosaic', 'unpacked' or 'xla'"
        )
    return decode_matmul_xla(x, w, layer)[None]


def decode_matmul_xla(
    x: jax.Array,  # [M, I]
    w: PackedWeight,
    layer: jax.Array,  # int32 []
) -> jax.Array:  # float32 [M, N]
    """The reference: XLA unpacks the layer in x's dtype in front of a GEMM."""
    return _gemm(x, unpack(w, layer, x.dtype, implementation="xla"))


def _gemm(x: jax.Array, dense: jax.Array) -> jax.Array:
    last = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, dense, last, preferred_element_type=jnp.float32)


def _mosaic(x: jax.Array, w: PackedWeight, layer: jax.Array) -> jax.Array:
    from qwen_jax.kernels import _pallas_qmatmul

    M, rows = x.shape[0], _call_rows(x.shape[0])
    calls = -(-M // rows)
    x = jnp.pad(x, [(0, calls * rows - M), (0, w.padded_size - w.in_size)])
    tiling = tiling_for(rows, w.rows, w.padded_size, w.kind)
    index = jnp.asarray(layer, jnp.int32).reshape(1)
    parts = [
        _pallas_qmatmul.split_matmul(index, some, w.codes, w.scale, tiling=tiling, kind=w.kind)
        for some in jnp.split(x, calls)
    ]
    y = jnp.concatenate(parts, axis=1)[:, :M]
    if w.kind == "int8":
        y = y * jax.lax.dynamic_index_in_dim(w.scale, layer, 0, keepdims=False)
    return y


def choose(x: jax.Array, w: PackedWeight) -> str:
    """The kernel for few rows on a Hopper card, if a tiling divides the weight."""
    few = x.shape[0] <= (_MAX_ROWS_BF16 if w.kind == "bf16" else MAX_ROWS)
    chosen = "mosaic" if few and on_hopper(x.dtype) and _has_tiling(x.shape[0], w) else "unpacked"
    rows = f"{'few' if few else 'many'} rows with {w.rows} x {w.padded_size}"
    how = "on mosaic" if chosen == "mosaic" else "on xla, after unpacking"
    say_once(f"packed products of {rows} run {how}")
    return chosen


def _has_tiling(M: int, w: PackedWeight) -> bool:
    try:
        tiling_for(_call_rows(M), w.rows, w.padded_size, w.kind)
    except NotImplementedError:
        return False
    return True


def _call_rows(M: int) -> int:
    """Rows of each call: up to 8 are one tile whose rest the kernel fills; more come in whole
    tiles, and more than a call takes in several of one size, so that their parts match.
    """
    if M <= 8:
        return M
    calls = -(-M // MOST_ROWS)
    return -(-M // (8 * calls)) * 8
