"""One layer of a packed stack as the dense weight in front of a GEMM: for prompts."""

import jax
import jax.numpy as jnp

from qwen_jax.kernels.hopper import on_hopper, served
from qwen_jax.kernels.packing import PackedWeight, unpack_layer


def unpack(
    w: PackedWeight,
    layer: jax.Array,  # int32 []
    dtype: jnp.dtype,
    *,
    implementation: str | None = None,  # "mosaic" or "xla"; None chooses
) -> jax.Array:  # [N, I]
    """Code times scale in float32, rounded once.

    The kernel serves bfloat16 weights, which XLA reorders at a twentieth of the memory's speed. The
    other kinds are a fraction of the bytes, and XLA's pass over them takes little of a prompt.
    """
    chosen = implementation or _choose(w, dtype)
    if chosen == "mosaic":
        from qwen_jax.kernels import _pallas_unpack

        if w.kind != "bf16" or dtype != jnp.bfloat16:
            raise NotImplementedError(f"unpacking {w.kind} to {dtype}: the kernel moves bfloat16")
        return _pallas_unpack.unpack(layer, w.codes, w.in_size)
    if chosen != "xla":
        raise ValueError(f"unpack implementation {chosen!r}: expected 'mosaic' or 'xla'")
    codes, scale = jax.tree.map(
        lambda a: jax.lax.dynamic_index_in_dim(a, layer, 0, keepdims=False), (w.codes, w.scale)
    )
    return unpack_layer(codes, scale, w.kind, dtype)[:, : w.in_size]


def _choose(w: PackedWeight, dtype: jnp.dtype) -> str:
    if w.kind != "bf16" or not on_hopper(dtype):
        return "xla"
    from qwen_jax.kernels import _pallas_unpack

    body = _pallas_unpack.Body(N=w.rows, K=w.padded_size, I=w.in_size)
    use = f"unpacking of bf16 {w.rows} x {w.in_size} runs"
    return "mosaic" if served(use, body.checked) else "xla"
