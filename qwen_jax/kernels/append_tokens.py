"""From the product of the query/key/value weight to the cache: bias, rotation, and keys and values
written behind what each row holds. One kernel a layer instead of seven small ones; the cache is
written in place, whatever the number of rows.
"""

import jax
import jax.numpy as jnp

from qwen_jax.kernels.hopper import on_hopper, say_once
from qwen_jax.quant import quantize_heads

Stacks = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]


def append_tokens(
    parts: jax.Array,  # float32 [P, R, 3 * N * H]: their sum is query, key and value
    bias: jax.Array,  # [L, 3, N, H], its dtype is that of the computation
    cos: jax.Array,  # float32 [R, H/2]
    sin: jax.Array,  # float32 [R, H/2]
    query_factor: jax.Array,  # float32 [R]
    stacks: Stacks,  # k, v [L, B, S, N, H]; scales [L, B, S, N] if these are int8
    layer: jax.Array,  # int32 []
    slots: jax.Array,  # int32 [R]: where token r of cache row r // (R / B) goes; past S nowhere
    *,
    implementation: str | None = None,  # "mosaic" or "xla"; None chooses
) -> tuple[jax.Array, Stacks]:  # rotated queries [R, N, H] times their factor; the longer cache
    """Rounds where model.project_qkv and cache.write do."""
    R, B = parts.shape[1], stacks[0].shape[1]
    if R % B or parts.shape[2] != 3 * stacks[0].shape[3] * stacks[0].shape[4]:
        raise ValueError(f"parts {parts.shape} for a cache of {stacks[0].shape}")
    chosen = implementation or choose(bias)
    if chosen == "mosaic":
        return _mosaic(parts, bias, cos, sin, query_factor, stacks, layer, slots)
    if chosen != "xla":
        raise ValueError(f"append_tokens implementation {chosen!r}: expected 'mosaic' or 'xla'")
    return append_tokens_xla(parts, bias, cos, sin, query_factor, stacks, layer, slots)


def append_tokens_xla(
    parts, bias, cos, sin, query_factor, stacks: Stacks, layer, slots
) -> tuple[jax.Array, Stacks]:
    """The reference."""
    bias = jax.lax.dynamic_index_in_dim(bias, layer, 0, keepdims=False)
    x = parts.sum(0).astype(bias.dtype).reshape(-1, *bias.shape) + bias  # [R, 3, N, H]

    def rotate(x: jax.Array) -> jax.Array:  # [R, N, H]
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        c, s = cos[:, None], sin[:, None]
        y = jnp.concatenate([first * c - second * s, second * c + first * s], axis=-1)
        return y.astype(x.dtype)

    q = rotate(x[:, 0]) * query_factor[:, None, None].astype(x.dtype)
    new = [rotate(x[:, 1]), x[:, 2]]
    if stacks[2] is not None:
        (k, k_scale), (v, v_scale) = (quantize_heads(x) for x in new)
        new = [k, v, k_scale, v_scale]
    R, B = slots.shape[0], stacks[0].shape[1]
    rows = jnp.arange(R) // (R // B)
    written = [
        stack.at[layer, rows, slots].set(x.astype(stack.dtype), mode="drop")
        for stack, x in zip(stacks, new, strict=False)
    ]
    return q, (*written, *(None,) * (4 - len(written)))


def _mosaic(parts, bias, cos, sin, query_factor, stacks, layer, slots):
    from qwen_jax.kernels import _pallas_append_tokens

    present = tuple(stack for stack in stacks if stack is not None)
    index = jnp.asarray(layer, jnp.int32).reshape(1)
    angles = jnp.concatenate([cos, sin], axis=-1)
    q, written = _pallas_append_tokens.append_tokens(
        index, slots, parts, bias, angles, query_factor, present
    )
    return q, (*written, *(None,) * (4 - len(written)))


def choose(bias: jax.Array) -> str:
    """The kernel for bfloat16 heads of 128 on a Hopper card, XLA otherwise."""
    chosen = "mosaic" if bias.shape[-1] == 128 and on_hopper(bias.dtype) else "xla"
    say_once(f"new keys and values are written by {chosen}")
    return chosen
