"""Attention for one new token a row, from the product of the query/key/value weight on: bias,
rotation, writing the key and the value into one layer of a stacked cache, attention to what is
filled. One kernel instead of six small ones a layer; the cache is written in place.
"""

import functools
import logging

import jax
import jax.numpy as jnp

from qwen_jax.kernels.decode_attention import (
    decode_attention,
    decode_attention_xla,
    launch_shape,
)
from qwen_jax.quant import quantize_heads

Stacks = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]

_log = logging.getLogger(__name__)


def append_attention(
    parts: jax.Array,  # float32 [P, B, 3 * N * H]: their sum is query, key and value
    bias: jax.Array,  # [L, 3, N, H], its dtype is that of the computation
    cos: jax.Array,  # float32 [B, H/2]
    sin: jax.Array,  # float32 [B, H/2]
    query_factor: jax.Array,  # float32 [B]
    stacks: Stacks,  # k, v [L, B, S, N, H]; scales [L, B, S, N] if these are int8
    layer: jax.Array,  # int32 []
    filled: jax.Array,  # int32 [B]: slots before the new one; a full row (S) writes nothing
    *,
    implementation: str | None = None,  # "mosaic", "split" or "xla"; None chooses
) -> tuple[jax.Array, Stacks]:  # [B, N, H]
    """`split` is XLA up to the cache and then decode_attention; `xla` is the reference."""
    if parts.shape[1] != stacks[0].shape[1]:
        raise ValueError(f"parts {parts.shape} for a cache of {stacks[0].shape}")
    chosen = implementation or choose()
    if chosen == "mosaic":
        return _mosaic(parts, bias, cos, sin, query_factor, stacks, layer, filled)
    attend = {"split": decode_attention, "xla": decode_attention_xla}.get(chosen)
    if attend is None:
        raise ValueError(f"append_attention {chosen!r}: expected 'mosaic', 'split' or 'xla'")
    q, stacks = append_xla(parts, bias, cos, sin, query_factor, stacks, layer, filled)
    visible = jnp.minimum(filled + 1, stacks[0].shape[2])
    return attend(q, *stacks, layer, visible), stacks


def append_xla(
    parts, bias, cos, sin, query_factor, stacks: Stacks, layer, filled
) -> tuple[jax.Array, Stacks]:  # query [B, N, H]
    """The reference up to the cache; rounds where model.py does."""
    bias = jax.lax.dynamic_index_in_dim(bias, layer, 0, keepdims=False)
    x = parts.sum(0).astype(bias.dtype).reshape(-1, *bias.shape) + bias  # [B, 3, N, H]

    def rotate(x: jax.Array) -> jax.Array:  # [B, N, H]
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        c, s = cos[:, None], sin[:, None]
        y = jnp.concatenate([first * c - second * s, second * c + first * s], axis=-1)
        return y.astype(x.dtype)

    q = rotate(x[:, 0]) * query_factor[:, None, None].astype(x.dtype)
    new = [rotate(x[:, 1]), x[:, 2]]
    if stacks[2] is not None:
        (k, k_scale), (v, v_scale) = (quantize_heads(x) for x in new)
        new = [k, v, k_scale, v_scale]
    rows = jnp.arange(filled.shape[0])
    written = [
        stack.at[layer, rows, filled].set(x.astype(stack.dtype), mode="drop")
        for stack, x in zip(stacks, new, strict=False)
    ]
    return q, (*written, *(None,) * (4 - len(written)))


def _mosaic(parts, bias, cos, sin, query_factor, stacks, layer, filled):
    from qwen_jax.kernels import _pallas_append_attention

    present = tuple(stack for stack in stacks if stack is not None)
    pairs = stacks[0].shape[1] * stacks[0].shape[3]
    warps, splits = launch_shape(pairs, len(present) == 4)
    index = jnp.asarray(layer, jnp.int32).reshape(1)
    angles = jnp.concatenate([cos, sin], axis=-1)
    out, written = _pallas_append_attention.append_attention(
        index, filled + 1, parts, bias, angles, query_factor, present, warps=warps, splits=splits
    )
    return out, (*written, *(None,) * (4 - len(written)))


def choose() -> str:
    """XLA's small kernels and decode_attention.

    The kernel that does it all agrees with the reference when interpreted, but has not yet run on
    a card (tests/test_gpu_decode.py is its test there): it has to be named.
    """
    _say_once("split")
    return "split"


@functools.cache
def _say_once(chosen: str) -> None:
    _log.info("attention of one new token runs as %s", chosen)
