"""x @ W^T + (x @ a^T) @ b for frozen weights W that read the same x, and its gradients.

The narrow products go over x once for all weights. Their results are kept for the backward pass by
name; a token has a few hundred bytes of them. On one Hopper card a kernel adds the wide product to
the sums of the large one, forward (low @ b) and backward (slope @ a, where slope is the gradient of
low): apart, each of these writes as much as the large product itself and reads it again. For `fp8`
it also multiplies by the units of rows and weight. Elsewhere XLA does all that.

At 72B and up to 4,096 tokens that kernel leaves four multiprocessors idle, on which the next weight
can be dequantized. A program on one card runs at once what does not wait for each other
(train/overlap.py), so the order is made by data: the *baton* is a zero that each product makes of
the arrays its kernel reads, and that is added to the layer's number of the next weight. So the
dequantization of that one starts right after the product; before it, it would take all
multiprocessors. The gradient of the baton is such a zero, too, and goes from product to product
the other way.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from qwen_jax.kernels.dequantize import dequantize
from qwen_jax.kernels.hopper import on_hopper, say_once
from qwen_jax.kernels.qmatmul import Weight, fp8_weight, input_gradient, qmatmul
from qwen_jax.kernels.quantize_rows import quantize_rows
from qwen_jax.quant import Layer
from qwen_jax.remat import LOW

Pair = dict[str, Any]  # a [R, I], b [R, *O]: as model.lora_layers gives it


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def lora_matmul(
    x: jax.Array,  # [..., I]
    weights: tuple[Weight, ...],  # each [*O, I]
    pairs: tuple[Pair | None, ...],  # None: this weight has no low-rank correction
    baton: jax.Array,  # float32 []: that of the products before, or a zero
    compute: str = "bf16",  # or "fp8" for the products with the frozen weights
) -> tuple[tuple[jax.Array, ...], jax.Array]:  # each [..., *O]; the baton
    """All products; the weights get no gradient."""
    return _forward(x, weights, pairs, baton, compute)[0]


def _forward(x, weights, pairs, baton, compute: str):
    lows, ys = narrow(x, pairs), []
    for w, low, pair in zip(weights, lows, pairs, strict=True):
        y, baton = product(x, w, low, pair, baton, compute)
        ys.append(y)
    return (tuple(ys), baton), (x, weights, pairs, lows)


def _backward(compute: str, kept, given: tuple[tuple[jax.Array, ...], jax.Array]):
    x, weights, pairs, lows = kept
    gs, baton = given  # each [..., *O]
    rows = tuple(range(x.ndim - 1))
    total, pair_gradients, slopes = None, [], []
    for g, w, low, pair in zip(gs, weights, lows, pairs, strict=True):
        slope = None
        if pair is None:
            pair_gradients.append(None)
        else:
            outs = tuple(range(x.ndim - 1, g.ndim))
            inner = tuple(range(1, pair["b"].ndim))
            slope = jax.lax.dot_general(g, pair["b"], ((outs, inner), ((), ())))  # [..., R]
            b = jax.lax.dot_general(low, g, ((rows, rows), ((), ())))
            pair_gradients.append({"b": b})
        slopes.append(slope)
        part, baton = gradient(g, w, slope, pair, baton, compute)
        total = part if total is None else total + part
    for own, a in zip(pair_gradients, _narrow_gradients(x, slopes), strict=True):
        if own is not None:
            own["a"] = a
    return total, None, tuple(pair_gradients), baton


lora_matmul.defvjp(_forward, _backward)


def narrow(x: jax.Array, pairs: tuple[Pair | None, ...]) -> list[jax.Array | None]:
    """x @ a^T for each pair, [..., R], as one product."""

    def product(a: jax.Array) -> jax.Array:
        low = jax.lax.dot_general(x, a, (((x.ndim - 1,), (1,)), ((), ())))
        return checkpoint_name(low, LOW)

    return _as_one(product, [None if pair is None else pair["a"] for pair in pairs], 0, -1)


def _narrow_gradients(x: jax.Array, slopes: list[jax.Array | None]) -> list[jax.Array | None]:
    """slope^T @ x for each, [R, I], as one product."""
    rows = tuple(range(x.ndim - 1))
    product = lambda slope: jax.lax.dot_general(slope, x, ((rows, rows), ((), ())))  # noqa: E731
    return _as_one(product, slopes, -1, 0)


def _as_one(
    product: Callable[[jax.Array], jax.Array],
    factors: list[jax.Array | None],
    axis: int,  # of the factors: their ranks
    out_axis: int,  # the same of the product
) -> list[jax.Array | None]:
    """product(factor) for each, computed at once; None stays None."""
    present = [factor for factor in factors if factor is not None]
    if not present:
        return factors
    ends = np.cumsum([factor.shape[axis] for factor in present])[:-1]
    parts = iter(jnp.split(product(jnp.concatenate(present, axis)), ends, out_axis))
    return [None if factor is None else next(parts) for factor in factors]


def product(
    x: jax.Array,  # [..., I]
    w: Weight,  # [*O, I]
    low: jax.Array | None,  # [..., R]
    pair: Pair | None,
    baton: jax.Array,
    compute: str,
) -> tuple[jax.Array, jax.Array]:  # [..., *O], the baton
    """x @ W^T + low @ b."""
    if pair is None:
        return qmatmul(x, w, compute), baton
    *out, I = w.shape
    if _fused(x, w, math.prod(out), I, low):
        b = pair["b"].reshape(len(pair["b"]), -1)
        y, baton = _gemm(x.reshape(-1, I), w, low, b, baton, compute, backward=False)
        return y.reshape(*x.shape[:-1], *out), baton
    wide = jax.lax.dot_general(low, pair["b"], (((low.ndim - 1,), (0,)), ((), ())))
    return qmatmul(x, w, compute) + wide, baton


def gradient(
    g: jax.Array,  # [..., *O]
    w: Weight,  # [*O, I]
    slope: jax.Array | None,  # [..., R]
    pair: Pair | None,
    baton: jax.Array,
    compute: str,
) -> tuple[jax.Array, jax.Array]:  # [..., I], the baton
    """g @ W + slope @ a."""
    if pair is None:
        return input_gradient(g, w, compute), baton
    *out, I = w.shape
    if _fused(g, w, I, math.prod(out), slope):
        flat = g.reshape(-1, math.prod(out))
        y, baton = _gemm(flat, w, slope, pair["a"], baton, compute, backward=True)
        return y.reshape(*g.shape[: g.ndim - len(out)], I), baton
    wide = jax.lax.dot_general(slope, pair["a"], (((slope.ndim - 1,), (0,)), ((), ())))
    return input_gradient(g, w, compute) + wide, baton


def _gemm(
    x: jax.Array,  # [M, K]
    w: Layer,
    low: jax.Array,  # [..., R]
    b: jax.Array,  # [R, N]
    baton: jax.Array,
    compute: str,
    *,
    backward: bool,  # K are the outputs of the weight, N its inputs
) -> tuple[jax.Array, jax.Array]:  # [M, N], the baton
    from qwen_jax.kernels import _pallas_gemm

    # Never true, not of NaN either: a wrong number would be a read outside the stack.
    w = dataclasses.replace(w, index=w.index + (baton > 0).astype(jnp.int32))
    low = low.reshape(len(x), -1)
    if compute == "fp8":
        x, step = quantize_rows(x)
        dense, unit = fp8_weight(w, turned=backward)
        dense = dense.reshape(b.shape[1], -1)
        scale = step * unit
        # The kernel scales the whole sum, so the low-rank term comes divided by it. A row of zeros
        # has a scale that may be flushed to zero, and nothing to divide.
        divisor = jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)[:, None]
        low = (low.astype(jnp.float32) / divisor).astype(b.dtype)
        return _pallas_gemm.gemm(x, dense, low, b, scale), _zero_after(x, dense, low)
    dense = dequantize(w, x.dtype).reshape(-1, w.shape[-1])
    return _pallas_gemm.gemm(x, dense, low, b, turned=backward), _zero_after(x, dense, low)


def _zero_after(*arrays: jax.Array) -> jax.Array:  # float32 []
    """A zero that is not known before the arrays are, and that XLA does not see to be one."""
    firsts = (x.reshape(-1)[0].astype(jnp.float32) for x in arrays)
    return sum(jnp.minimum(jnp.abs(first), 0) for first in firsts)


def _fused(x: jax.Array, w: Weight, N: int, K: int, low: jax.Array) -> bool:
    """Whether the kernel serves a product with N columns over K inputs; says so."""
    if not isinstance(w, Layer) or not on_hopper(x.dtype):
        return False
    from qwen_jax.kernels import _pallas_gemm

    try:
        _pallas_gemm.check(x.size // K, N, K, low.shape[-1])
    except NotImplementedError as e:
        say_once(f"products with LoRA over {N} x {K} run on xla ({e})")
        return False
    say_once(f"products with LoRA over {N} x {K} run on mosaic")
    return True
