"""x @ W^T for a frozen weight, plain or quantized.

The weight never gets a gradient: the backward pass is one product with the same weight,
dequantized again, so that nothing but the packed bytes lives between the two passes.
"""

import jax
import jax.numpy as jnp

from qwen_jax.quant import QTensor, dequantize

Weight = jax.Array | QTensor


def _dense(w: Weight, dtype: jnp.dtype) -> jax.Array:
    return dequantize(w, dtype) if isinstance(w, QTensor) else w.astype(dtype)


@jax.custom_vjp
def qmatmul(
    x: jax.Array,  # [..., I]
    w: Weight,  # [*O, I]
) -> jax.Array:  # [..., *O], in x's dtype
    """Multiplies with a frozen weight; contracts the last axis of both."""
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(f"x has {x.shape[-1]} inputs, the weight expects {w.shape[-1]}")
    last = ((x.ndim - 1,), (len(w.shape) - 1,))
    return jax.lax.dot_general(x, _dense(w, x.dtype), (last, ((), ())))


def _forward(x: jax.Array, w: Weight):
    return qmatmul(x, w), w


def _backward(w: Weight, g: jax.Array):
    outs = len(w.shape) - 1  # g [..., *O]
    dims = (tuple(range(g.ndim - outs, g.ndim)), tuple(range(outs)))
    if not isinstance(w, QTensor):
        return jax.lax.dot_general(g, w.astype(g.dtype), (dims, ((), ()))), None
    # Hopper's GEMM is a tenth faster when both operands are contiguous along the summed axis, and
    # dequantization can write the weight turned as cheaply as straight. The barrier keeps XLA from
    # folding the transpose back into the product.
    turned = jax.lax.optimization_barrier(jnp.moveaxis(dequantize(w, g.dtype), -1, 0))  # [I, *O]
    dims = (dims[0], tuple(range(1, outs + 1)))
    return jax.lax.dot_general(g, turned, (dims, ((), ()))), None


qmatmul.defvjp(_forward, _backward)
