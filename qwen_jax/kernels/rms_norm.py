"""RMS norm behind a residual addition, as training computes and differentiates it.

    x + y -> its norm, times a weight

The kernels serve a Hopper card by itself. They read a row once: for a gradient XLA reads it for two
sums, and again for what follows from them. And they read x where it is kept, in a stack of all
layers: XLA's norm wants a copy of it.
"""

import functools

import jax
import jax.numpy as jnp

from qwen_jax.kernels.hopper import on_hopper, served
from qwen_jax.quant import Layer, as_layer, by_rows, written


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
    place: Layer | None = None,  # where x lies, if kernels may read it there
    y_place: Layer | None = None,  # the same of y
) -> tuple[jax.Array, tuple[jax.Array, ...]]:  # x + y; its norm, for each of the readers
    """Whoever reads the norm gets its own, so that their gradients are added where they are read:
    left to themselves, they are added in a pass over memory before that.
    """
    if place is not None and kernels_serve(x):
        return _with_kernels(x, y, weight, eps, readers, place, y_place)
    total = x if y is None else x + y
    return total, (rms_norm(total, weight, eps),) * readers


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _with_kernels(x, y, weight, eps: float, readers: int, place: Layer, y_place: Layer | None):
    return _norms(x, y, weight, eps, readers, place, y_place, total=True)


def _norms(x, y, weight, eps: float, readers: int, place: Layer, y_place, *, total: bool):
    from qwen_jax.kernels import _pallas_rms_norm

    y_layer = None if y is None else by_rows(y_place or as_layer(y))
    made = _pallas_rms_norm.norm(by_rows(place), y_layer, weight, eps, total=total)
    norm, *sums = (row.reshape(x.shape) for row in made)
    if not sums:
        sums = [x if y is None else x + y]
    return sums[0], (norm,) * readers


def _forward(x, y, weight, eps: float, readers: int, place: Layer, y_place):
    # The backward pass of a layer that runs again has no use for x + y.
    made = _norms(x, y, weight, eps, readers, place, y_place, total=False)
    # Nor for y, if it lies somewhere: as an array it would be copied from there.
    return made, (y if y_place is None else None, weight, place, y_place)


def _backward(eps: float, readers: int, residuals, gradients):
    from qwen_jax.kernels import _pallas_rms_norm

    y, weight, place, y_place = residuals
    of_total, of_norms = gradients
    if y_place is None and y is not None:
        y_place = as_layer(y)
    gradient = _pallas_rms_norm.gradient(
        by_rows(place), by_rows(y_place), by_rows(of_total), tuple(map(by_rows, of_norms)), weight,
        eps,
    ).reshape(of_total.shape)  # fmt: skip
    return gradient, None if y_place is None else gradient, None, None, None


_with_kernels.defvjp(_forward, _backward)


def add_behind(place: Layer, x: jax.Array, y: jax.Array) -> Layer:
    """x + y [..., D], written to the stack behind `place`: where it lies then.

    XLA adds first and copies then, because some of x may be read from the stack that is written.
    """
    there = place.replace(index=place.index + 1)
    if not kernels_serve(x):
        return written(there, x + y)
    from qwen_jax.kernels import _pallas_rms_norm

    stack = _pallas_rms_norm.add_behind(by_rows(place), by_rows(x), by_rows(y))
    return there.replace(stack=stack.reshape(place.stack.shape))


def kernels_serve(x: jax.Array) -> bool:
    from qwen_jax.kernels import _pallas_rms_norm

    if not on_hopper(x.dtype):
        return False
    return served("rms_norm in training runs", lambda: _pallas_rms_norm.check(x.shape[-1]))
