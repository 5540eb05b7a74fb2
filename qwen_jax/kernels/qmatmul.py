"""x @ W^T for a frozen weight, plain or quantized, and the product of its backward pass.

The weight never gets a gradient: the backward pass is one product with the same weight,
dequantized again, so that nothing but the packed bytes lives between the two passes. What makes
them one differentiable function is lora_matmul.py. A weight may come as a `Layer`, a stack and an
index; that is what the dequantization kernel reads.

`fp8` computes both products in e4m3 (4 exponent bits, 3 of mantissa, largest value 448), with one
scale for each row of the activations and one for the weight. Hopper does these at twice the rate
of bf16.
"""

import math

import jax
import jax.numpy as jnp

from qwen_jax.kernels.dequantize import FP8, dequantize, turn
from qwen_jax.kernels.quantize_rows import FP8_MAX, quantize_rows
from qwen_jax.quant import Layer, QTensor, largest

Weight = jax.Array | QTensor | Layer
COMPUTE = ("bf16", "fp8")


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
        return _fp8_product(x, x.shape[:-1], w, last)
    return jax.lax.dot_general(x, _dense(w, x.dtype), (last, ((), ())))


def input_gradient(
    g: jax.Array,  # [..., *O]
    w: Weight,  # [*O, I]
    compute: str = "bf16",
) -> jax.Array:  # [..., I]
    """g @ W: what the backward pass of the product hands on."""
    outs = len(w.shape) - 1
    rows = g.shape[: g.ndim - outs]
    dims = (tuple(range(g.ndim - outs, g.ndim)), tuple(range(1, outs + 1)))
    if compute == "fp8":
        return _fp8_product(g, rows, w, dims, turned=True)
    # bf16 gains nothing from a turned weight (docs/benchmarks.md).
    dims = (dims[0], tuple(range(outs)))
    return jax.lax.dot_general(g, _dense(w, g.dtype), (dims, ((), ())))


def _dense(w: Weight, dtype: jnp.dtype) -> jax.Array:
    return dequantize(w, dtype) if isinstance(w, QTensor | Layer) else w.astype(dtype)


def fp8_weight(w: Weight, turned: bool = False) -> tuple[jax.Array, jax.Array]:
    """The weight in e4m3, [*O, I] or [I, *O], and the unit that its values are multiples of."""
    if isinstance(w, QTensor | Layer):
        unit = largest(w) / FP8_MAX
        return dequantize(w, FP8, unit=unit, turned=turned), unit
    unit = jnp.maximum(jnp.max(jnp.abs(w)).astype(jnp.float32), 1e-30) / FP8_MAX
    weight = (w.astype(jnp.float32) / unit).astype(FP8)
    return turn(weight) if turned else weight, unit


def _fp8_product(
    x: jax.Array,  # [*rows, *inner]
    rows: tuple[int, ...],
    w: Weight,
    dims: tuple[tuple[int, ...], tuple[int, ...]],  # contracted axes of x and of the weight
    turned: bool = False,
) -> jax.Array:
    weight, unit = fp8_weight(w, turned)
    # A weight is a `Layer` where a device is by itself; no compiler cuts kernels over several.
    implementation = None if isinstance(w, Layer) else "xla"
    flat = x.reshape(math.prod(rows), -1)
    codes, step = quantize_rows(flat, implementation=implementation)
    codes = codes.reshape(x.shape)
    y = jax.lax.dot_general(codes, weight, (dims, ((), ())), preferred_element_type=x.dtype)
    step = step.reshape(*rows, *([1] * (y.ndim - len(rows))))
    return (y.astype(jnp.float32) * (step * unit)).astype(x.dtype)
