"""A whole frozen weight written out in front of its GEMM, as training does it.

XLA's own pass is bound by instructions, about 39 a value: it moves 1.8 TB/s of codes and bfloat16,
0.95 of codes and e4m3, on a card that moves 2.8. The Mosaic GPU kernel needs 5. It reads a layer in
its stack, so a weight comes as a `Layer`; it serves one device, or each of a mesh by itself. Where
the compiler cuts layers over a mesh, weights come cut out of their stacks, as QTensor, and XLA's
pass shards with them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from qwen_jax import quant
from qwen_jax.kernels.hopper import is_hopper, on_gpu, served
from qwen_jax.quant import Layer, QTensor

FP8 = jnp.float8_e4m3fn


def dequantize(
    w: QTensor | Layer,  # [*O, I]
    dtype: jnp.dtype,
    *,
    unit: jax.Array | None = None,  # float32 []: values are written as multiples of it
    turned: bool = False,  # [I, *O], in memory too
    implementation: str | None = None,  # "mosaic" or "xla"; None chooses
) -> jax.Array:  # [*O, I] or [I, *O]
    """Code times scale in float32 (over the unit), rounded once to `dtype`.

    A named implementation never falls back. The automatic choice takes the kernel for a `Layer` of
    nf4 or int4 on a Hopper card, written as bfloat16, or as e4m3 straight or turned, if the kernel
    takes its shape.
    """
    chosen = implementation or _choose(w, jnp.dtype(dtype), turned)
    if chosen == "mosaic":
        return _mosaic(w, dtype, unit, turned)
    if chosen != "xla":
        raise ValueError(f"dequantize implementation {chosen!r}: expected 'mosaic' or 'xla'")
    return dequantize_xla(w, dtype, unit, turned)


def dequantize_xla(
    w: QTensor | Layer, dtype: jnp.dtype, unit: jax.Array | None, turned: bool
) -> jax.Array:
    """The reference: one elementwise pass."""
    if unit is None:
        values = quant.dequantize(w, dtype)
    else:
        values = (quant.dequantize(w, jnp.float32) / unit).astype(dtype)
    return turn(values) if turned else values


def turn(w: jax.Array) -> jax.Array:
    """[*O, I] -> [I, *O], in memory too: left to itself XLA folds the transpose into the product.

    Hopper's fp8 GEMM takes operands that are contiguous along the summed axis only.
    """
    w = jnp.moveaxis(w, -1, 0)
    if not on_gpu():
        return w
    return with_layout_constraint(w, Layout(tuple(range(w.ndim))))


def _mosaic(w: QTensor | Layer, dtype, unit: jax.Array | None, turned: bool) -> jax.Array:
    from qwen_jax.kernels import _pallas_dequantize as kernel

    if isinstance(w, QTensor):
        w = Layer(stack=jax.tree.map(lambda x: x[None], w), index=jnp.int32(0))
    *out, I = w.shape
    factor = None if unit is None else 1 / unit
    if turned:
        return kernel.turned(w.index, w.stack, dtype, factor).reshape(I, *out)
    return kernel.straight(w.index, w.stack, dtype, factor).reshape(*out, I)


def _choose(w: QTensor | Layer, dtype: jnp.dtype, turned: bool) -> str:
    if not isinstance(w, Layer) or not is_hopper():
        return "xla"
    from qwen_jax.kernels import _pallas_dequantize as kernel

    use = f"{w.stack.kind} {w.shape} to {dtype}{', turned' if turned else ''}"
    check = functools.partial(kernel.check, w.stack, dtype, turned)
    return "mosaic" if served(f"dequantization of {use} runs", check) else "xla"
