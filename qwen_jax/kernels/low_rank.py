"""The two products of a low-rank (LoRA) correction, shaped so that they ride on other work.

    shrink   x [..., I], a [R, I]    -> [..., R]     a thin GEMM
    expand   low [..., R], b [R, *O] -> [..., *O]    R multiply-adds an element

As a GEMM, `expand` would write an O-wide array only to have it read and added: at rank 8 that costs
a layer of the 72B model as much memory traffic as its activations. Written out as multiply-adds it
disappears into whatever fusion reads the sum. The gradients are GEMMs, and the gradient of shrink's
input is again an `expand`.
"""

import jax
import jax.numpy as jnp

# Above this rank the multiply-adds cost more than the memory traffic of a GEMM.
MAX_UNROLLED_RANK = 16


def _unrolled(low: jax.Array, b: jax.Array) -> jax.Array:
    R = low.shape[-1]
    outs = b.ndim - 1
    if R > MAX_UNROLLED_RANK:
        return jax.lax.dot_general(low, b, (((low.ndim - 1,), (0,)), ((), ())))
    factors = low.astype(jnp.float32).reshape(*low.shape, *([1] * outs))
    axis = low.ndim - 1
    total = None
    for r in range(R):
        term = jax.lax.index_in_dim(factors, r, axis, keepdims=False) * b[r].astype(jnp.float32)
        total = term if total is None else total + term
    return total.astype(low.dtype)


@jax.custom_vjp
def expand(
    low: jax.Array,  # [..., R]
    b: jax.Array,  # [R, *O]
) -> jax.Array:  # [..., *O]
    """low @ b, summed in float32 and rounded once."""
    return _unrolled(low, b)


def _expand_forward(low, b):
    return _unrolled(low, b), (low, b)


def _expand_backward(kept, g):
    low, b = kept
    outs = b.ndim - 1
    out_axes, batch_axes = tuple(range(g.ndim - outs, g.ndim)), tuple(range(g.ndim - outs))
    d_low = jax.lax.dot_general(g, b, ((out_axes, tuple(range(1, b.ndim))), ((), ())))
    d_b = jax.lax.dot_general(low, g, ((batch_axes, batch_axes), ((), ())))
    return d_low, d_b


expand.defvjp(_expand_forward, _expand_backward)


@jax.custom_vjp
def shrink(
    x: jax.Array,  # [..., I]
    a: jax.Array,  # [R, I]
) -> jax.Array:  # [..., R]
    """x @ a^T."""
    return jax.lax.dot_general(x, a, (((x.ndim - 1,), (1,)), ((), ())))


def _shrink_forward(x, a):
    return shrink(x, a), (x, a)


def _shrink_backward(kept, g):
    x, a = kept
    batch_axes = tuple(range(x.ndim - 1))
    return _unrolled(g, a), jax.lax.dot_general(g, x, ((batch_axes, batch_axes), ((), ())))


shrink.defvjp(_shrink_forward, _shrink_backward)
