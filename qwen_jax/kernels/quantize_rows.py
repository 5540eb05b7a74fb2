"""Activations and gradients to e4m3 with one scale a row, in one pass.

Left to XLA this is two reads of the row: one for its largest value, one to round, and whatever
elementwise work makes the row is done again in each. The kernel serves one device, or each of a
mesh by itself.
"""

import jax
import jax.numpy as jnp

from qwen_jax.kernels.dequantize import FP8
from qwen_jax.kernels.hopper import on_hopper, say_once

FP8_MAX = 448.0


def quantize_rows(
    x: jax.Array,  # [R, K]
    *,
    implementation: str | None = None,  # "mosaic" or "xla"; None chooses
) -> tuple[jax.Array, jax.Array]:  # e4m3 [R, K], float32 [R]: the unit of each row's codes
    """Each row in multiples of a unit, its largest magnitude / 448."""
    chosen = implementation or choose(x)
    if chosen == "mosaic":
        from qwen_jax.kernels import _pallas_quantize_rows

        return _pallas_quantize_rows.quantize_rows(x)
    if chosen != "xla":
        raise ValueError(f"quantize_rows implementation {chosen!r}: expected 'mosaic' or 'xla'")
    return quantize_rows_xla(x)


def quantize_rows_xla(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The reference."""
    most = jnp.max(jnp.abs(x), axis=1).astype(jnp.float32)
    # A row of zeros gets a harmless unit instead of a division by zero.
    unit = jnp.maximum(most, 1e-30) / FP8_MAX
    return (x.astype(jnp.float32) / unit[:, None]).astype(FP8), unit


def choose(x: jax.Array) -> str:
    """The kernel for many bfloat16 rows of a multiple of 2,048 on a Hopper card, else XLA."""
    R, K = x.shape
    fits = R >= 64 and K % 2048 == 0 and K <= 32768
    chosen = "mosaic" if fits and on_hopper(x.dtype) else "xla"
    say_once(f"rows are rounded to e4m3 by {chosen}")
    return chosen
