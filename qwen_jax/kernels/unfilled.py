"""Memory that nobody has written to yet."""

import jax
import jax.numpy as jnp


def unfilled(shape: tuple[int, ...], dtype: jnp.dtype, *, kernels: bool) -> jax.Array:
    """An array with anything in it, to be written before it is read.

    XLA has no such thing, it fills with zeros: 10 ms for what 80 layers of 72B keep of 2,048
    tokens. Where `kernels` may run, one does that does nothing.
    """
    if kernels:
        from qwen_jax.kernels import _pallas_unfilled

        return _pallas_unfilled.unfilled(shape, dtype)
    return jnp.zeros(shape, dtype)
