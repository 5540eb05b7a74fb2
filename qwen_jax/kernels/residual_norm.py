"""Residual addition and RMS norm in one pass: x + sum of parts, and its norm times a weight.

What stands between two products of a decode step. As XLA fusions it is three kernels of a
microsecond each and the gaps between them, 160 times a token at 80 layers.
"""

import jax
import jax.numpy as jnp

from qwen_jax.kernels.hopper import on_hopper, say_once


def residual_norm(
    x: jax.Array,  # [M, D]
    parts: jax.Array,  # float32 [P, M, D]: a product, as decode_parts gives it
    weight: jax.Array,  # [L, D]
    layer: jax.Array,  # int32 []
    eps: float,
    *,
    implementation: str | None = None,  # "mosaic" or "xla"; None chooses
) -> tuple[jax.Array, jax.Array]:  # x + sum(parts), its norm times weight[layer], both [M, D]
    """Rounds where rms_norm.rms_norm does: the sum, the residual, the norm before the weight."""
    if parts.shape[1:] != x.shape or weight.shape[-1] != x.shape[-1]:
        raise ValueError(f"x {x.shape}, parts {parts.shape}, weight {weight.shape} do not fit")
    chosen = implementation or choose(x)
    if chosen == "mosaic":
        from qwen_jax.kernels import _pallas_residual_norm

        index = jnp.asarray(layer, jnp.int32).reshape(1)
        return _pallas_residual_norm.residual_norm(index, x, parts, weight, eps)
    if chosen != "xla":
        raise ValueError(f"residual_norm implementation {chosen!r}: expected 'mosaic' or 'xla'")
    return residual_norm_xla(x, parts, weight, layer, eps)


def residual_norm_xla(x, parts, weight, layer, eps) -> tuple[jax.Array, jax.Array]:
    """The reference."""
    x = x + parts.sum(0).astype(x.dtype)
    y = x.astype(jnp.float32)
    y = (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)).astype(x.dtype)
    return x, y * jax.lax.dynamic_index_in_dim(weight, layer, 0, keepdims=False)


def choose(x: jax.Array) -> str:
    """The kernel for few rows of a multiple of 512 on a Hopper card, XLA otherwise."""
    M, D = x.shape
    chosen = "mosaic" if M <= 64 and D % 512 == 0 and on_hopper(x.dtype) else "xla"
    say_once(f"residual and norm run on {chosen}")
    return chosen
