"""x @ W^T + (x @ a^T) @ b for frozen weights W that read the same x, and its gradients.

The narrow products go over x once for all weights. On a Hopper card by itself (alone, or with its
share of a mesh) a kernel adds the wide product to the sums of the large one, forward (low @ b) and
backward (slope @ a, where slope is the gradient of low): apart, each of these writes as much as the
large product itself and reads it again. For `fp8` it also multiplies by the units of rows and
weight. Elsewhere XLA does all that.

At 72B and up to 4,096 tokens that kernel leaves four multiprocessors idle, on which the next weight
can be dequantized. A program on one card runs at once what does not wait for each other
(train/overlap.py), so the order is made by data: the *baton* is a zero that each product makes of
the arrays its kernel reads, and that is added to the layer's number of the next weight. So the
dequantization of that one starts right after the product; before it, it would take all
multiprocessors. The gradient of the baton is such a zero, too, and goes from product to product
the other way.

A training step keeps some results between its two passes, and makes others again (layer_loop.py):
`products` writes what it makes to where it is kept, and `lora_matmul` takes what was kept instead
of computing it. What it does compute, right before it is needed for gradients, leaves the
dequantized weight for them as well.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from qwen_jax.kernels.dequantize import dequantize
from qwen_jax.kernels.hopper import on_hopper, served
from qwen_jax.kernels.qmatmul import Weight, fp8_weight, input_gradient, qmatmul
from qwen_jax.kernels.quantize_rows import quantize_rows
from qwen_jax.quant import Layer, written

Pair = dict[str, Any]  # a [R, I], b [R, *O]: as model.lora_layers gives it


@struct.dataclass
class Products:
    """What the products of some weights with one x give."""

    ys: tuple[jax.Array | Layer, ...]  # each [*rows, *O], or the stack into which it was written
    lows: tuple[jax.Array | None, ...]  # x @ a^T of each pair, [*rows, R]
    baton: jax.Array
    dense: tuple[jax.Array | None, ...]  # weights [*O, I] as the kernel read them: for gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def lora_matmul(
    x: jax.Array,  # [..., I]
    weights: tuple[Weight, ...],  # each [*O, I]
    pairs: tuple[Pair | None, ...],  # None: this weight has no low-rank correction
    baton: jax.Array,  # float32 []: that of the products before, or a zero
    compute: str = "bf16",  # or "fp8" for the products with the frozen weights
    lean: bool = False,  # dequantizes once more for gradients, rather than hold the weights
    known: tuple[tuple[jax.Array, ...], tuple[jax.Array | None, ...]] | None = None,
) -> tuple[tuple[jax.Array, ...], jax.Array]:  # each [..., *O]; the baton
    """All products; the weights get no gradient. `known`: ys and lows that were computed before."""
    return _forward(x, weights, pairs, baton, compute, lean, known)[0]


def _forward(x, weights, pairs, baton, compute: str, lean: bool, known):
    if known is None:
        made = products(x, weights, pairs, baton, compute)
    else:
        made = Products(ys=known[0], lows=known[1], baton=baton, dense=(None,) * len(weights))
    dense = (None,) * len(weights) if lean else made.dense
    return (made.ys, made.baton), (x, weights, pairs, made.lows, dense)


def _backward(compute: str, lean: bool, residuals, given: tuple[tuple[jax.Array, ...], jax.Array]):
    x, weights, pairs, lows, denses = residuals
    gs, baton = given  # each [..., *O]
    total, pair_gradients, slopes = None, [], []
    for g, w, low, pair, dense in zip(gs, weights, lows, pairs, denses, strict=True):
        slope, b = slope_and_b(g, low, pair)
        pair_gradients.append(None if pair is None else {"b": b})
        slopes.append(slope)
        part, baton = gradient(g, w, slope, pair, baton, compute, dense)
        total = part if total is None else total + part
    for own, a in zip(pair_gradients, narrow_gradients(x, slopes), strict=True):
        if own is not None:
            own["a"] = a
    return total, None, tuple(pair_gradients), baton, None


lora_matmul.defvjp(_forward, _backward)


def products(
    x: jax.Array,  # [*rows, I]
    weights: tuple[Weight, ...],  # each [*O, I]
    pairs: tuple[Pair | None, ...],
    baton: jax.Array,
    compute: str,
    into: tuple[Layer | None, ...] | None = None,  # stacks [L, *rows, *O] to write layers of
) -> Products:
    """lora_matmul without gradients."""
    lows, ys, denses = narrow(x, pairs), [], []
    into, unit = into or (None,) * len(weights), None
    if compute == "fp8" and all(
        pair is not None and _served(x, w, low)
        for w, low, pair in zip(weights, lows, pairs, strict=True)
    ):
        codes, unit = quantize_rows(x.reshape(-1, x.shape[-1]))  # once for all
        x = codes.reshape(x.shape)
    for w, low, pair, place in zip(weights, lows, pairs, into, strict=True):
        y, baton, dense = product(x, w, low, pair, baton, compute, place, unit)
        ys.append(y)
        denses.append(dense)
    return Products(ys=tuple(ys), lows=tuple(lows), baton=baton, dense=tuple(denses))


def narrow(x: jax.Array, pairs: tuple[Pair | None, ...]) -> list[jax.Array | None]:
    """x @ a^T for each pair, [..., R], as one product."""
    product = lambda a: jax.lax.dot_general(x, a, (((x.ndim - 1,), (1,)), ((), ())))  # noqa: E731
    lows = _as_one(product, [None if pair is None else pair["a"] for pair in pairs], 0, -1)
    # What waits for a part then waits for the copy of it as well. Else the baton is there before
    # the product of which it is, and the next weight takes all multiprocessors.
    return jax.lax.optimization_barrier(lows)


def slope_and_b(
    g: jax.Array,  # [*rows, *O]
    low: jax.Array | None,  # [*rows, R]
    pair: Pair | None,
) -> tuple[jax.Array | None, jax.Array | None]:  # [*rows, R], [R, *O]
    """Gradients of low and of b, given that of low @ b."""
    if pair is None:
        return None, None
    rows = tuple(range(low.ndim - 1))
    outs = tuple(range(low.ndim - 1, g.ndim))
    inner = tuple(range(1, pair["b"].ndim))
    slope = jax.lax.dot_general(g, pair["b"], ((outs, inner), ((), ())))
    return slope, jax.lax.dot_general(low, g, ((rows, rows), ((), ())))


def narrow_gradients(x: jax.Array, slopes: list[jax.Array | None]) -> list[jax.Array | None]:
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
    x: jax.Array,  # [*rows, I]
    w: Weight,  # [*O, I]
    low: jax.Array | None,  # [*rows, R]
    pair: Pair | None,
    baton: jax.Array,
    compute: str,
    into: Layer | None = None,  # a stack [L, *rows, *O]
    unit: jax.Array | None = None,  # float32 [M]: x is in e4m3, its rows are multiples of it
) -> tuple[jax.Array | Layer, jax.Array, jax.Array | None]:
    """x @ W^T + low @ b, [*rows, *O] or the stack; the baton; the weight as the kernel read it, if
    that of the gradient will read the same.
    """
    *out, _ = w.shape
    if pair is not None and _served(x, w, low):
        b, shape = pair["b"].reshape(len(pair["b"]), -1), (*x.shape[:-1], *out)
        flat, dense, low, scale, baton = _operands(
            x, w, low, baton, compute, backward=False, unit=unit
        )
        y = _gemm(flat, dense, low, b, scale, shape, into)
        return y, baton, dense if scale is None else None
    y = qmatmul(x, w, compute)
    if pair is not None:
        y += jax.lax.dot_general(low, pair["b"], (((low.ndim - 1,), (0,)), ((), ())))
    return (y if into is None else written(into, y)), baton, None


def gradient(
    g: jax.Array,  # [*rows, *O]
    w: Weight,  # [*O, I]
    slope: jax.Array | None,  # [*rows, R]
    pair: Pair | None,
    baton: jax.Array,
    compute: str,
    dense: jax.Array | None = None,  # the weight, if it is there already
) -> tuple[jax.Array, jax.Array]:  # [*rows, I], the baton
    """g @ W + slope @ a."""
    *out, I = w.shape
    K = math.prod(out)
    if pair is not None and fused(g.size // K, w, I, K, slope.dtype, slope.shape[-1]):
        rows = g.shape[: g.ndim - len(out)]
        flat, scale = g.reshape(-1, K), None
        if dense is None:
            flat, dense, slope, scale, baton = _operands(
                flat, w, slope, baton, compute, backward=True
            )
        slope = slope.reshape(len(flat), -1)
        y = _gemm(flat, dense, slope, pair["a"], scale, (*rows, I), turned=scale is None)
        return y, baton
    y = input_gradient(g, w, compute)
    if pair is not None:
        y += jax.lax.dot_general(slope, pair["a"], (((slope.ndim - 1,), (0,)), ((), ())))
    return y, baton


def _operands(
    x: jax.Array,  # [..., K]
    w: Layer,
    low: jax.Array,  # [..., R]
    baton: jax.Array,
    compute: str,
    *,
    backward: bool,  # K are the outputs of the weight, N its inputs
    unit: jax.Array | None = None,  # of x, if it is in e4m3 already
):
    """What the kernel reads: x [M, K], the weight, low [M, R], scale [M] or None; the baton."""
    # Never true, not of NaN either: a wrong number would be a read outside the stack.
    w = dataclasses.replace(w, index=w.index + (baton > 0).astype(jnp.int32))
    x = x.reshape(-1, x.shape[-1])
    low, scale = low.reshape(len(x), -1), None
    if compute == "fp8":
        if unit is None:
            x, unit = quantize_rows(x)
        dense, of_weight = fp8_weight(w, turned=backward)
        dense = dense.reshape(-1, x.shape[-1])
        scale = unit * of_weight
        # The kernel scales the whole sum, so the low-rank term comes divided by it. A row of zeros
        # has a scale that may be flushed to zero, and nothing to divide.
        divisor = jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)[:, None]
        low = (low.astype(jnp.float32) / divisor).astype(low.dtype)
        # Else the baton is computed from what low is made of, and is there before low is.
        low, scale = jax.lax.optimization_barrier((low, scale))
    else:
        dense = dequantize(w, x.dtype).reshape(-1, w.shape[-1])
    return x, dense, low, scale, _zero_after(x, dense, low)


def _gemm(x, dense, low, b, scale, shape, into: Layer | None = None, *, turned: bool = False):
    from qwen_jax.kernels import _pallas_gemm

    if into is None:
        return _pallas_gemm.gemm(x, dense, low, b, scale, turned=turned).reshape(shape)
    stack = into.stack.reshape(-1, len(x), b.shape[1])
    stack = _pallas_gemm.gemm(x, dense, low, b, scale, turned=turned, into=(stack, into.index))
    return into.replace(stack=stack.reshape(-1, *shape))


def _zero_after(*arrays: jax.Array) -> jax.Array:  # float32 []
    """A zero that is not known before the arrays are, and that XLA does not see to be one."""
    firsts = (x.reshape(-1)[0].astype(jnp.float32) for x in arrays)
    return sum(jnp.minimum(jnp.abs(first), 0) for first in firsts)


def _served(x: jax.Array, w: Weight, low: jax.Array) -> bool:
    *out, I = w.shape
    return fused(x.size // I, w, math.prod(out), I, low.dtype, low.shape[-1])


def fused(M: int, w: Weight, N: int, K: int, dtype: jnp.dtype, rank: int) -> bool:
    """Whether the kernel serves the product of M rows over K inputs with N columns; says so."""
    if not isinstance(w, Layer) or not on_hopper(dtype):
        return False
    from qwen_jax.kernels import _pallas_gemm

    use = f"products with LoRA over {N} x {K} run"
    return served(use, lambda: _pallas_gemm.check(M, N, K, rank))
