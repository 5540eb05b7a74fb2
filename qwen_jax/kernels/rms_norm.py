"""RMS norm behind a residual addition, as training differentiates it.

    x + y -> its norm, times a weight

The gradient reads every row once: XLA reads it for two sums, and again for what follows from them.
The kernel serves one Hopper card. Its forward pass is left to XLA, which needs one pass for it.
"""

import functools

import jax
import jax.numpy as jnp

from qwen_jax.kernels.hopper import on_hopper, say_once


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
    alone: bool = True,  # on one device, so that the kernel may run
) -> tuple[jax.Array, tuple[jax.Array, ...]]:  # x + y; its norm, for each of the readers
    """Whoever reads the norm gets its own, so that their gradients are added where they are read:
    left to themselves, they are added in a pass over memory before that.
    """
    if alone and _kernel_serves(x):
        return _with_kernel(x, y, weight, eps, readers)
    return _plain(x, y, weight, eps, readers)


def _plain(x, y, weight, eps: float, readers: int):
    total = x if y is None else x + y
    return total, (rms_norm(total, weight, eps),) * readers


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _with_kernel(x, y, weight, eps: float, readers: int):
    return _plain(x, y, weight, eps, readers)


def _forward(x, y, weight, eps: float, readers: int):
    return _plain(x, y, weight, eps, readers), (x, y, weight)


def _backward(eps: float, readers: int, residuals, gradients):
    from qwen_jax.kernels import _pallas_rms_norm

    x, y, weight = residuals
    flat = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), (x, y, *gradients))
    gradient = _pallas_rms_norm.gradient(*flat, weight, eps).reshape(x.shape)
    return gradient, None if y is None else gradient, None


_with_kernel.defvjp(_forward, _backward)


def _kernel_serves(x: jax.Array) -> bool:
    from qwen_jax.kernels import _pallas_rms_norm

    if not on_hopper(x.dtype):
        return False
    try:
        _pallas_rms_norm.check(x.shape[-1])
    except NotImplementedError as e:
        say_once(f"the gradient of rms_norm runs on xla ({e})")
        return False
    say_once("the gradient of rms_norm runs on mosaic")
    return True
