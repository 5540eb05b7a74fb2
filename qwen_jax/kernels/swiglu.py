"""SwiGLU, h = up * silu(gate), and everything that LoRA reads of what it and its gradient make.

A forward pass multiplies h with a few columns, for the pair of the projection after it, and fp8
rounds its rows; apart, each reads 100 MB a layer again at 2,048 tokens of 72B. A backward pass
needs, of h and of the gradients of up and gate, not only themselves but products with a few columns
each, of the LoRA pairs before and after. Two kernels make all that in one pass each. They serve a
Hopper card by itself, alone or with its share of a mesh; XLA does it elsewhere.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from qwen_jax.kernels.dequantize import FP8
from qwen_jax.kernels.hopper import on_hopper, served
from qwen_jax.quant import Layer, as_layer


@struct.dataclass
class Hidden:
    """h, its unit if it is in e4m3, and its narrow product."""

    low: jax.Array  # [M, R]
    h: jax.Array | None  # [M, F], unless it was not wanted
    unit: jax.Array | None = None  # float32 [M]: rows of h are multiples of it


@struct.dataclass
class Gradient:
    """Of up and gate, and what follows for the LoRA pairs."""

    up: jax.Array  # [M, F]
    gate: jax.Array  # [M, F]
    up_slope: jax.Array | None  # [M, R]: gradient of the narrow product of up's pair
    gate_slope: jax.Array | None
    up_b: jax.Array | None  # [R, F]
    gate_b: jax.Array | None
    down_a: jax.Array | None  # [R, F]


def swiglu(up: jax.Array, gate: jax.Array) -> jax.Array:
    """up * silu(gate), [..., F], in float32 inside, rounded once."""
    wide = gate.astype(jnp.float32)
    return (up.astype(jnp.float32) * wide * jax.nn.sigmoid(wide)).astype(up.dtype)


def swiglu_narrow(
    up: jax.Array | Layer,  # [M, F], or a layer of a stack
    gate: jax.Array | Layer,
    a: jax.Array,  # [R, F], of the pair after it
    dtype: jnp.dtype | None,  # of h: a's, or e4m3 where the kernel runs; None: only low is wanted
    *,
    implementation: str | None = None,  # "mosaic" or "xla"; None chooses
) -> Hidden:
    """h and h @ a^T. XLA leaves h in a's dtype."""
    up, gate = as_layer(up), as_layer(gate)
    chosen = implementation or _choose_narrow(up, a, dtype)
    if chosen == "mosaic":
        from qwen_jax.kernels import _pallas_swiglu_low

        low, *rest = _pallas_swiglu_low.swiglu_low(up, gate, a, dtype)
        # What waits for low must not wait for its parts only: kernels/lora_matmul.py, narrow.
        return Hidden(jax.lax.optimization_barrier(low), *(rest or [None]))
    if chosen != "xla":
        raise ValueError(f"swiglu_narrow implementation {chosen!r}: expected 'mosaic' or 'xla'")
    h = swiglu(up.cut(), gate.cut())
    low = jax.lax.optimization_barrier(_product(h, a, 1, 1))
    return Hidden(low, None if dtype is None else h)


def swiglu_gradient(
    up: jax.Array | Layer,  # [M, F], or a layer of a stack
    gate: jax.Array | Layer,
    g: jax.Array,  # [M, F]: gradient of up * silu(gate)
    bs: tuple[jax.Array | None, jax.Array | None],  # [R, F], of the pairs of up and gate
    lows: tuple[jax.Array | None, jax.Array | None],  # [M, R], their narrow products
    slope: jax.Array | None,  # [M, R]: gradient of the narrow product of the pair after
    *,
    implementation: str | None = None,  # "mosaic" or "xla"; None chooses
) -> Gradient:
    """In float32 inside, each result rounded once to g's dtype."""
    chosen = implementation or _choose(g, bs, lows, slope)
    if chosen == "mosaic":
        if any(x is None for x in (*bs, *lows, slope)):
            raise NotImplementedError("the kernel multiplies with the pairs of up, gate and down")
        from qwen_jax.kernels import _pallas_swiglu

        return Gradient(*_pallas_swiglu.gradient(as_layer(up), as_layer(gate), g, bs, lows, slope))
    if chosen != "xla":
        raise ValueError(f"swiglu_gradient implementation {chosen!r}: expected 'mosaic' or 'xla'")
    up, gate = (x.cut() if isinstance(x, Layer) else x for x in (up, gate))
    return swiglu_gradient_xla(up, gate, g, bs, lows, slope)


def swiglu_gradient_xla(up, gate, g, bs, lows, slope) -> Gradient:
    """The reference; up and gate are [M, F]."""
    wide_up, wide_gate, wide_g = (x.astype(jnp.float32) for x in (up, gate, g))
    sigmoid = jax.nn.sigmoid(wide_gate)
    silu = wide_gate * sigmoid
    of_up = (wide_g * silu).astype(g.dtype)
    of_gate = (wide_g * wide_up * (sigmoid + silu * (1 - sigmoid))).astype(g.dtype)
    h = (wide_up * silu).astype(g.dtype)
    slopes = [_product(x, b, 1, 1) for x, b in zip((of_up, of_gate), bs, strict=True)]
    pairs = zip((*lows, slope), (of_up, of_gate, h), strict=True)
    return Gradient(of_up, of_gate, *slopes, *(_product(low, x, 0, 0) for low, x in pairs))


def _product(x: jax.Array | None, y: jax.Array | None, of_x: int, of_y: int) -> jax.Array | None:
    if x is None or y is None:
        return None
    return jax.lax.dot_general(x, y, (((of_x,), (of_y,)), ((), ())))


def _choose_narrow(up: Layer, a: jax.Array, dtype) -> str:
    if not on_hopper(a.dtype):
        return "xla"
    from qwen_jax.kernels import _pallas_swiglu_low

    rounds = dtype == FP8
    check = functools.partial(_pallas_swiglu_low.check, *up.shape, len(a), rounds)
    use = f"SwiGLU{', rounded to e4m3,' if rounds else ''} runs"
    return "mosaic" if served(use, check) else "xla"


def _choose(g: jax.Array, bs, lows, slope) -> str:
    if not on_hopper(g.dtype) or any(x is None for x in (*bs, *lows, slope)):
        return "xla"
    from qwen_jax.kernels import _pallas_swiglu

    ranks = {b.shape[0] for b in bs} | {slope.shape[1]}
    check = functools.partial(_pallas_swiglu.check, *g.shape, ranks)
    return "mosaic" if served("the gradient of SwiGLU runs", check) else "xla"
