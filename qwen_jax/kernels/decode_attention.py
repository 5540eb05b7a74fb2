"""Attention of one new query a row over the filled part of one layer of a stacked cache.

The kernel takes the whole stack and a layer index and reads only the slots that are filled; the XLA
reference, which is its specification, reads the whole layer. The cache is bfloat16, or int8 with
one scale a token and head.
"""

import math

import jax
import jax.numpy as jnp

from qwen_jax.kernels.hopper import on_hopper, say_once


def decode_attention(
    q: jax.Array,  # [R, N, H]; query r reads cache row r // (R / B)
    k: jax.Array,  # [L, B, S, N, H]
    v: jax.Array,  # [L, B, S, N, H]
    k_scale: jax.Array | None,  # [L, B, S, N] if k and v are int8
    v_scale: jax.Array | None,
    layer: jax.Array,  # int32 []
    visible: jax.Array,  # int32 [R]: slots from 0 on that each query sees, at least 1
    *,
    implementation: str | None = None,  # "mosaic" or "xla"; None chooses
) -> jax.Array:  # [R, N, H], in q's dtype
    """softmax(q k^T / sqrt(H)) v over slots below `visible`; softmax in float32."""
    if k.shape != v.shape or q.shape[1:] != k.shape[3:] or q.shape[0] % k.shape[1]:
        raise ValueError(f"queries {q.shape}, keys {k.shape}, values {v.shape} do not fit")
    chosen = implementation or choose(q, k)
    if chosen == "mosaic":
        return _mosaic(q, k, v, k_scale, v_scale, layer, visible)
    if chosen != "xla":
        raise ValueError(f"decode_attention implementation {chosen!r}: expected 'mosaic' or 'xla'")
    return decode_attention_xla(q, k, v, k_scale, v_scale, layer, visible)


def decode_attention_xla(q, k, v, k_scale, v_scale, layer, visible) -> jax.Array:
    """The reference: one layer as floats, masked scores, softmax."""
    R, N, H = q.shape
    B, S = k.shape[1:3]
    keys = _floats(k, k_scale, layer)
    values = _floats(v, v_scale, layer)
    queries = q.astype(jnp.float32).reshape(B, R // B, N, H)
    scores = jnp.einsum("btnh,bsnh->bnts", queries, keys) / math.sqrt(H)
    seen = jnp.arange(S) < visible.reshape(B, 1, R // B, 1)
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, values).reshape(R, N, H).astype(q.dtype)


def _floats(x: jax.Array, scale: jax.Array | None, layer: jax.Array) -> jax.Array:
    x = jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False).astype(jnp.float32)
    if scale is None:
        return x
    scale = jax.lax.dynamic_index_in_dim(scale, layer, 0, keepdims=False)
    return x * scale.astype(jnp.float32)[..., None]


def _mosaic(q, k, v, k_scale, v_scale, layer, visible) -> jax.Array:
    from qwen_jax.kernels import _pallas_decode_attention

    warps, splits = launch_shape(q.shape[0] * q.shape[1], k_scale is not None)
    index = jnp.asarray(layer, jnp.int32).reshape(1)
    return _pallas_decode_attention.decode_attention(
        index, visible, q, k, v, k_scale, v_scale, warps=warps, splits=splits
    )


def launch_shape(pairs: int, quantized: bool) -> tuple[int, int]:
    """Warps of a thread block and blocks of a cluster, for so many pairs of row and head.

    Measured at 64 heads (benchmarks/decode_attention.py): few large blocks while there are few
    pairs, small ones when there are many, and clusters only where blocks are lacking.
    """
    splits = 1
    while splits < 8 and pairs * splits < (128 if quantized else 64):
        splits *= 2
    return (16 if pairs * splits <= 128 else 4), splits


def choose(q: jax.Array, k: jax.Array) -> str:
    """The kernel for bfloat16 heads of 128 on a Hopper card, XLA otherwise."""
    fits = q.shape[-1] == 128 and k.dtype in (jnp.bfloat16, jnp.int8)
    chosen = "mosaic" if fits and on_hopper(q.dtype) else "xla"
    say_once(f"decode attention runs on {chosen}")
    return chosen
