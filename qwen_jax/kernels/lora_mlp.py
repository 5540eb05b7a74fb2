"""The MLP with LoRA in it: down(up(x) * silu(gate(x))), as one differentiable function.

Its three products are those of lora_matmul.py. It is one function because the gradient of what
stands between them (swiglu.py) makes what the pairs on both sides need.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from qwen_jax.kernels.dequantize import FP8
from qwen_jax.kernels.lora_matmul import (
    Pair,
    Products,
    fused,
    gradient,
    narrow_gradients,
    product,
    products,
    slope_and_b,
)
from qwen_jax.kernels.qmatmul import Weight
from qwen_jax.kernels.swiglu import swiglu, swiglu_gradient, swiglu_narrow
from qwen_jax.quant import Layer, by_rows


@struct.dataclass
class Known:
    """What an earlier forward pass computed: nothing of it is computed again."""

    up: jax.Array | Layer  # [B, T, F], or a layer of a stack
    gate: jax.Array | Layer
    lows: tuple[jax.Array | None, ...]  # [B, T, R], narrow products of up, gate and down


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def lora_mlp(
    xs: tuple[jax.Array, jax.Array],  # [B, T, D]: the same for up and for gate
    weights: tuple[Weight, Weight, Weight],  # up [F, D], gate [F, D], down [D, F]
    pairs: tuple[Pair | None, ...],  # of them
    baton: jax.Array,  # float32 []
    compute: str = "bf16",
    lean: bool = False,
    kernels: bool = False,  # whether they may run: no compiler cuts them over devices
    again: bool = False,  # the result was computed before; only gradients are wanted, so zeros do
    known: Known | None = None,  # with `again`
) -> tuple[jax.Array, jax.Array]:  # [B, T, D], the baton
    """The weights get no gradient; x gets two, to be added by whoever reads them."""
    return _forward(xs, weights, pairs, baton, compute, lean, kernels, again, known)[0]


def _forward(
    xs, weights, pairs, baton, compute: str, lean: bool, kernels: bool, again: bool,
    known: Known | None,
):  # fmt: skip
    x, y, dense = xs[0], jnp.zeros_like(xs[0]), (None, None, None)
    if known is not None:
        up, gate, lows = known.up, known.gate, known.lows
    else:
        first = products(x, weights[:2], pairs[:2], baton, compute)
        (up, gate), baton = first.ys, first.baton
        if again:
            low = None if pairs[2] is None else _hidden(up, gate, pairs[2], None, kernels)[0]
            lows, dense = (*first.lows, low), (*first.dense, None)
        else:
            last = down_products(up, gate, weights[2], pairs[2], baton, compute, kernels)
            (y,), baton = last.ys, last.baton
            lows, dense = (*first.lows, *last.lows), (*first.dense, *last.dense)
    if lean:
        dense = (None, None, None)
    return (y, baton), (x, weights, pairs, up, gate, lows, dense, baton)


def down_products(
    up: jax.Array | Layer,  # [*rows, F], or a layer of a stack
    gate: jax.Array | Layer,
    w: Weight,  # [D, F]
    pair: Pair | None,
    baton: jax.Array,
    compute: str,
    kernels: bool,
) -> Products:
    """lora_matmul.products of up * silu(gate) with one weight."""
    if pair is None:
        up, gate = (x.cut() if isinstance(x, Layer) else x for x in (up, gate))
        return products(swiglu(up, gate), (w,), (None,), baton, compute)
    *rows, F = up.shape
    (D, _), rank, dtype = w.shape, *pair["a"].shape[:1], pair["a"].dtype
    # Whoever takes rounded rows must take them as they are.
    rounds = compute == "fp8" and fused(math.prod(rows), w, D, F, dtype, rank)
    low, h, unit = _hidden(up, gate, pair, FP8 if rounds else dtype, kernels)
    y, baton, dense = product(h, w, low, pair, baton, compute, unit=unit)
    return Products(ys=(y,), lows=(low,), baton=baton, dense=(dense,))


def _hidden(up, gate, pair: Pair, dtype: jnp.dtype | None, kernels: bool):
    """Of swiglu_narrow low [*rows, R], h [*rows, F] and its unit."""
    rows, how = up.shape[:-1], None if kernels else "xla"
    made = swiglu_narrow(by_rows(up), by_rows(gate), pair["a"], dtype, implementation=how)
    low, h = (None if x is None else x.reshape(*rows, -1) for x in (made.low, made.h))
    return low, h, made.unit


def _backward(compute: str, lean: bool, kernels: bool, again: bool, residuals: Any, given):
    x, weights, pairs, up, gate, lows, denses, passed_on = residuals
    g, baton = given
    # What the forward pass passed on is a zero as well: the weight of down then waits its turn.
    baton = baton + passed_on
    of_up, of_gate, of_down = pairs
    slope, down_b = slope_and_b(g, lows[2], of_down)
    h, baton = gradient(g, weights[2], slope, of_down, baton, compute, denses[2])

    bs = tuple(None if pair is None else pair["b"] for pair in pairs[:2])
    up, gate, h, *flat_lows = map(by_rows, (up, gate, h, *lows[:2]))
    made = swiglu_gradient(
        up, gate, h, bs, tuple(flat_lows), by_rows(slope), implementation=None if kernels else "xla"
    )
    slopes = [made.up_slope, made.gate_slope]
    slopes = [None if s is None else s.reshape(*x.shape[:-1], -1) for s in slopes]
    parts = []
    for i, g in enumerate((made.up, made.gate)):
        g = g.reshape(*x.shape[:-1], -1)
        part, baton = gradient(g, weights[i], slopes[i], pairs[i], baton, compute, denses[i])
        parts.append(part)
    up_a, gate_a = narrow_gradients(x, slopes)
    pair_gradients = (
        None if of_up is None else {"a": up_a, "b": made.up_b},
        None if of_gate is None else {"a": gate_a, "b": made.gate_b},
        None if of_down is None else {"a": made.down_a, "b": down_b},
    )
    return tuple(parts), None, pair_gradients, baton, None


lora_mlp.defvjp(_forward, _backward)
