"""Causal multi-head attention, for training, prefill and decode.

One rule covers all three: query t of row b sees key s if s <= q_index[b, t] (key slots are
positions) and, where sequences are packed, if both belong to the same segment.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.kernels.hopper import on_gpu, say_once

# Queries handled at once by the reference: bounds the [T, S] scores at 128 * S a head.
QUERY_CHUNK = 128
# From so many queries on cuDNN serves them against a longer cache too; a step of decode has fewer.
_CUDNN_QUERIES = 64


def attention(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [B, S, N, H]
    v: jax.Array,  # [B, S, N, H]
    *,
    q_index: jax.Array,  # int32 [B, T]: the last key slot that each query sees
    segments: jax.Array | None = None,  # int32 [B, T], with S = T: packed sequences
    causal_square: bool = False,  # promises S = T and q_index = arange(T): no mask is needed
    implementation: str | None = None,  # "xla" or "cudnn"; None chooses
) -> jax.Array:  # [B, T, N, H]
    """Softmax(q k^T / sqrt(H)) v under the causal rule; softmax in float32."""
    chosen = implementation or _choose(q, causal_square, segments is not None)
    if chosen == "cudnn":
        if causal_square:
            return _attention_cudnn(q, k, v, segments)
        if segments is not None:
            raise NotImplementedError("cudnn attention here packs sequences in causal squares only")
        return _attention_cudnn_cached(q, k, v, q_index)
    if chosen != "xla":
        raise ValueError(f"attention implementation {chosen!r}: expected 'xla' or 'cudnn'")
    return attention_xla(q, k, v, q_index, segments)


def attention_and_statistics(
    q: jax.Array, k: jax.Array, v: jax.Array, **rule: Any
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """attention, and what it would otherwise compute once more for its gradient.

    Of cuDNN that is the float32 logarithm of each softmax's sum; the reference has nothing.
    """
    y, pullback = jax.vjp(lambda q, k, v: attention(q, k, v, **rule), q, k, v)
    statistics = (x for x in jax.tree.leaves(pullback) if _is_statistics(x, q))
    return y, tuple(statistics)


def attention_again(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    y: jax.Array,
    statistics: tuple[jax.Array, ...],
    **rule: Any,
) -> jax.Array:
    """What attention_and_statistics gave as y, with the gradient of attention."""

    @jax.custom_vjp
    def again(q, k, v):
        return y

    def backward(operands, g):
        computed, pullback = jax.vjp(lambda *qkv: attention(*qkv, **rule), *operands)
        # The pullback holds arrays of the forward pass. With the kept ones in place of its own,
        # nothing is left of that pass that anybody reads.
        leaves, tree = jax.tree.flatten(pullback)
        given = iter(statistics)
        for i, leaf in enumerate(leaves):
            if leaf is computed:
                leaves[i] = y
            elif statistics and _is_statistics(leaf, q):
                leaves[i] = next(given)
        return jax.tree.unflatten(tree, leaves)(g)

    again.defvjp(lambda *qkv: (y, qkv), backward)
    return again(q, k, v)


def _is_statistics(x: jax.Array, q: jax.Array) -> bool:
    """cuDNN computes in 16 bits and keeps one float32 [B, N, T] besides."""
    B, T, N, _ = q.shape
    return q.dtype != jnp.float32 and x.dtype == jnp.float32 and x.shape == (B, N, T)


def _attention_cudnn(q, k, v, segments: jax.Array | None) -> jax.Array:
    mask = None
    if segments is not None:
        mask = (segments[:, :, None] == segments[:, None, :])[:, None]  # [B, 1, T, T]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")


def _attention_cudnn_cached(q, k, v, q_index: jax.Array) -> jax.Array:
    """A chunk of a prompt against all that the cache holds of it, itself included.

    cuDNN's causal mask puts the first query at the first key, so the rule comes as a mask: 2 bytes
    a query and key, one for all heads, and no scores in memory. Keys past the last one that a row
    sees are skipped.
    """
    S = k.shape[1]
    mask = (jnp.arange(S) <= q_index[:, :, None])[:, None]  # [B, 1, T, S]
    filled = jnp.minimum(q_index[:, -1] + 1, S)
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, key_value_seq_lengths=filled, implementation="cudnn"
    )


def _choose(q: jax.Array, causal_square: bool, segmented: bool) -> str:
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    # cuDNN's flash kernel takes 16-bit inputs and head sizes up to 128 in steps of 8.
    chosen = "xla"
    enough = causal_square or (q.shape[1] >= _CUDNN_QUERIES and not segmented)
    if on_gpu() and enough and half:
        chosen = "cudnn" if q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 else "xla"
    use = "decode" if q.shape[1] == 1 else "prefill or training"
    say_once(f"attention for {use} runs on {chosen}")
    return chosen


def attention_xla(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [B, S, N, H]
    v: jax.Array,  # [B, S, N, H]
    q_index: jax.Array,  # [B, T]
    segments: jax.Array | None,
) -> jax.Array:
    """The reference: chunked over queries, each chunk recomputed in the backward pass."""
    T = q.shape[1]
    if T <= QUERY_CHUNK:
        return _attend(q, k, v, q_index, segments, segments)
    rest = -T % QUERY_CHUNK

    def chunks(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [T/chunk, B, chunk, ...]
        x = jnp.pad(x, [(0, 0), (0, rest)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(x.shape[0], -1, QUERY_CHUNK, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    @jax.checkpoint
    def one(part):
        q_part, index, seg = part
        return _attend(q_part, k, v, index, seg, segments)

    parts = (chunks(q), chunks(q_index), None if segments is None else chunks(segments))
    out = jnp.moveaxis(jax.lax.map(one, parts), 0, 1)  # [B, T/chunk, chunk, N, H]
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :T]


def _attend(q, k, v, q_index, q_segments, k_segments) -> jax.Array:
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)
    scores = scores / math.sqrt(q.shape[-1])
    visible = jnp.arange(k.shape[1]) <= q_index[:, :, None]  # [B, T, S]
    if q_segments is not None:
        visible &= q_segments[:, :, None] == k_segments[:, None, :]
    scores = jnp.where(visible[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)
