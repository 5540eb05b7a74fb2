"""x @ W^T for a frozen weight, plain or quantized.

The weight never gets a gradient: the backward pass is one product with the same weight,
dequantized again, so that nothing but the packed bytes lives between the two passes.

`fp8` computes both products in e4m3 (4 exponent bits, 3 of mantissa, largest value 448), with one
scale for each row of the activations and one for the weight. Hopper does these at twice the rate
of bf16.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from qwen_jax.quant import QTensor, dequantize, largest

Weight = jax.Array | QTensor
COMPUTE = ("bf16", "fp8")
FP8 = jnp.float8_e4m3fn
FP8_MAX = 448.0


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def qmatmul(
    x: jax.Array,  # [..., I]
    w: Weight,  # [*O, I]
    compute: str = "bf16",  # "bf16": x's own dtype, whichever it is
) -> jax.Array:  # [..., *O], in x's dtype
    """Multiplies with a frozen weight; contracts the last axis of both."""
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(f"x has {x.shape[-1]} inputs, the weight expects {w.shape[-1]}")
    last = ((x.ndim - 1,), (len(w.shape) - 1,))
    if compute == "fp8":
        weight, unit = _fp8_weight(w)
        return _fp8_product(x, x.shape[:-1], weight, unit, last)
    return jax.lax.dot_general(x, _dense(w, x.dtype), (last, ((), ())))


def _forward(x: jax.Array, w: Weight, compute: str):
    return qmatmul(x, w, compute), w


def _backward(compute: str, w: Weight, g: jax.Array):  # g [..., *O]
    outs = len(w.shape) - 1
    rows = g.shape[: g.ndim - outs]
    dims = (tuple(range(g.ndim - outs, g.ndim)), tuple(range(1, outs + 1)))
    if compute == "fp8":
        weight, unit = _fp8_weight(w)
        return _fp8_product(g, rows, _turned(weight), unit, dims), None
    if isinstance(w, QTensor):
        return jax.lax.dot_general(g, _turned(_dense(w, g.dtype)), (dims, ((), ()))), None
    return jax.lax.dot_general(
        g, w.astype(g.dtype), ((dims[0], tuple(range(outs))), ((), ()))
    ), None


qmatmul.defvjp(_forward, _backward)


def _dense(w: Weight, dtype: jnp.dtype) -> jax.Array:
    return dequantize(w, dtype) if isinstance(w, QTensor) else w.astype(dtype)


def _turned(w: jax.Array) -> jax.Array:
    """[*O, I] -> [I, *O], in memory too.

    Hopper's fp8 GEMM takes operands that are contiguous along the summed axis only; dequantization
    can write the weight turned in the same pass. (bf16 gains nothing from it: the GEMM is a tenth
    faster alone, but the chip then lowers its clock.)
    """
    w = jnp.moveaxis(w, -1, 0)
    if jax.default_backend() != "gpu":
        return w
    return with_layout_constraint(w, Layout(tuple(range(w.ndim))))


def _fp8_weight(w: Weight) -> tuple[jax.Array, jax.Array]:
    """The weight in e4m3 and the float32 unit that its values are multiples of."""
    unit = largest(w) / FP8_MAX if isinstance(w, QTensor) else _absmax(w, None) / FP8_MAX
    return (_dense(w, jnp.float32) / unit).astype(FP8), unit


def _absmax(x: jax.Array, axes) -> jax.Array:
    # A row of zeros gets a harmless unit instead of a division by zero.
    biggest = jnp.max(jnp.abs(x), axis=axes, keepdims=axes is not None).astype(jnp.float32)
    return jnp.maximum(biggest, 1e-30)


def _fp8_product(
    x: jax.Array,  # [*rows, *inner]
    rows: tuple[int, ...],
    weight: jax.Array,  # e4m3
    unit: jax.Array,  # float32 []
    dims: tuple[tuple[int, ...], tuple[int, ...]],  # contracted axes of x and of the weight
) -> jax.Array:
    inner = tuple(range(len(rows), x.ndim))
    step = _absmax(x, inner) / FP8_MAX  # [*rows, 1...]
    small = (x.astype(jnp.float32) / step).astype(FP8)
    y = jax.lax.dot_general(small, weight, (dims, ((), ())), preferred_element_type=x.dtype)
    step = step.reshape(*rows, *([1] * (y.ndim - len(rows))))
    return (y.astype(jnp.float32) * (step * unit)).astype(x.dtype)
