"""RMS norm behind a residual addition, as training computes and differentiates it.

    x + y -> its norm, times a weight

The kernels serve one Hopper card. They read a row once: for a gradient XLA reads it for two sums,
and again for what follows from them. And they read x where it is kept, in a stack of all layers:
XLA's norm wants a copy of it.
"""

import functools

import jax
import jax.numpy as jnp

from qwen_jax.kernels.hopper import on_hopper, served
from qwen_jax.quant import Layer, by_rows


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [..., D] -> [..., D]: float32 inside, cast back, then the weight, as the original does."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * weight


def residual_rms_norm(
    x: jax.Array,  # [..., D]
    y: jax.Array | None,  # the same, to be added first
    weight: jax.Array,  # [D], frozen
    eps: float,
    *,
    readers: int = 1,
    place: Layer | None = None,  # where x lies, on one device: there the kernels may read it
) -> tuple[jax.Array, tuple[jax.Array, ...]]:  # x + y; its norm, for each of the readers
    """Whoever reads the norm gets its own, so that their gradients are added where they are read:
    left to themselves, they are added in a pass over memory before that.
    """
    if place is not None and _kernels_serve(x):
        return _with_kernels(x, y, weight, eps, readers, place)
    total = x if y is None else x + y
    return total, (rms_norm(total, weight, eps),) * readers


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _with_kernels(x, y, weight, eps: float, readers: int, place: Layer):
    from qwen_jax.kernels import _pallas_rms_norm

    total = x if y is None else x + y
    norm = _pallas_rms_norm.norm(by_rows(place), by_rows(y), weight, eps).reshape(x.shape)
    return total, (norm,) * readers


def _forward(x, y, weight, eps: float, readers: int, place: Layer):
    return _with_kernels(x, y, weight, eps, readers, place), (y, weight, place)


def _backward(eps: float, readers: int, residuals, gradients):
    from qwen_jax.kernels import _pallas_rms_norm

    y, weight, place = residuals
    of_total, of_norms = gradients
    gradient = _pallas_rms_norm.gradient(
        by_rows(place), by_rows(y), by_rows(of_total), tuple(map(by_rows, of_norms)), weight, eps
    ).reshape(of_total.shape)
    return gradient, None if y is None else gradient, None, None


_with_kernels.defvjp(_forward, _backward)


def _kernels_serve(x: jax.Array) -> bool:
    from qwen_jax.kernels import _pallas_rms_norm

    if not on_hopper(x.dtype):
        return False
    return served("rms_norm in training runs", lambda: _pallas_rms_norm.check(x.shape[-1]))
