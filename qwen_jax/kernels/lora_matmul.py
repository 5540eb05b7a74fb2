"""x @ W^T + (x @ a^T) @ b for frozen weights W that read the same x, and its gradients.

The narrow products go over x once for all weights. Their results are kept for the backward pass by
name; a token has a few hundred bytes of them. On one Hopper card a kernel adds the wide product to
the sums of the large one, forward (low @ b) and backward (slope @ a, where slope is the gradient of
low): apart, each of these writes as much as the large product itself and reads it again. For `fp8`
it also multiplies by the units of rows and weight. Elsewhere XLA does all that.
"""

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def lora_matmul(
    x: jax.Array,  # [..., I]
    weights: tuple[Weight, ...],  # each [*O, I]
    pairs: tuple[Pair | None, ...],  # None: this weight has no low-rank correction
    compute: str = "bf16",  # or "fp8" for the products with the frozen weights
) -> tuple[jax.Array, ...]:  # each [..., *O]
    """All products; the weights get no gradient."""
    return _forward(x, weights, pairs, compute)[0]


def _forward(x, weights, pairs, compute: str):
    lows = narrow(x, pairs)
    ys = tuple(
        product(x, w, low, pair, compute) for w, low, pair in zip(weights, lows, pairs, strict=True)
    )
    return ys, (x, weights, pairs, lows)


def _backward(compute: str, kept, gs: tuple[jax.Array, ...]):  # each [..., *O]
    x, weights, pairs, lows = kept
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
        part = gradient(g, w, slope, pair, compute)
        total = part if total is None else total + part
    for own, a in zip(pair_gradients, _narrow_gradients(x, slopes), strict=True):
        if own is not None:
            own["a"] = a
    return total, None, tuple(pair_gradients)


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
    compute: str,
) -> jax.Array:  # [..., *O]
    """x @ W^T + low @ b."""
    if pair is None:
        return qmatmul(x, w, compute)
    *out, I = w.shape
    if _fused(x, w, math.prod(out), I, low):
        b = pair["b"].reshape(len(pair["b"]), -1)
        y = _gemm(x.reshape(-1, I), w, low, b, compute, backward=False)
        return y.reshape(*x.shape[:-1], *out)
    wide = jax.lax.dot_general(low, pair["b"], (((low.ndim - 1,), (0,)), ((), ())))
    return qmatmul(x, w, compute) + wide


def gradient(
    g: jax.Array,  # [..., *O]
    w: Weight,  # [*O, I]
    slope: jax.Array | None,  # [..., R]
    pair: Pair | None,
    compute: str,
) -> jax.Array:  # [..., I]
    """g @ W + slope @ a."""
    if pair is None:
        return input_gradient(g, w, compute)
    *out, I = w.shape
    if _fused(g, w, I, math.prod(out), slope):
        flat = g.reshape(-1, math.prod(out))
        y = _gemm(flat, w, slope, pair["a"], compute, backward=True)
        return y.reshape(*g.shape[: g.ndim - len(out)], I)
    wide = jax.lax.dot_general(slope, pair["a"], (((slope.ndim - 1,), (0,)), ((), ())))
    return input_gradient(g, w, compute) + wide


def _gemm(
    x: jax.Array,  # [M, K]
    w: Layer,
    low: jax.Array,  # [..., R]
    b: jax.Array,  # [R, N]
    compute: str,
    *,
    backward: bool,  # K are the outputs of the weight, N its inputs
) -> jax.Array:  # [M, N]
    from qwen_jax.kernels import _pallas_gemm

    low = low.reshape(len(x), -1)
    if compute == "fp8":
        codes, step = quantize_rows(x)
        weight, unit = fp8_weight(w, turned=backward)
        scale = step * unit
        # The kernel scales the whole sum, so the low-rank term comes divided by it. A row of zeros
        # has a scale that may be flushed to zero, and nothing to divide.
        divisor = jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)[:, None]
        low = (low.astype(jnp.float32) / divisor).astype(x.dtype)
        return _pallas_gemm.gemm(codes, weight.reshape(b.shape[1], -1), low, b, scale)
    dense = dequantize(w, x.dtype).reshape(-1, w.shape[-1])
    return _pallas_gemm.gemm(x, dense, low, b, turned=backward)


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
