"""Memory that nobody has written to yet."""

import jax
import jax.numpy as jnp

from qwen_jax.kernels.hopper import is_hopper


def unfilled(shape: tuple[int, ...], dtype: jnp.dtype, *, kernels: bool = True) -> jax.Array:
    """An array with anything in it, to be written before it is read.

    XLA has no such thing, it fills with zeros: 10 ms for what 80 layers of 72B keep of 2,048
    tokens. A Hopper card (with `kernels`, which serve one device) runs a kernel that does nothing.
    """
    if kernels and is_hopper():
        from qwen_jax.kernels import _pallas_unfilled

        return _pallas_unfilled.unfilled(shape, dtype)
    return jnp.zeros(shape, dtype)
