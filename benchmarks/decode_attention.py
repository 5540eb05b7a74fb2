"""Decode attention on the card: error against the reference at many lengths, and its bandwidth.

    python -m benchmarks.decode_attention

Times are device times of the kernel alone; bytes are the filled keys, values and scales.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from benchmarks.decode import filled_cache
from benchmarks.qmatmul import kernel_seconds
from qwen_jax.cache import KVCache
from qwen_jax.cli import parse, run
from qwen_jax.config import ModelConfig
from qwen_jax.kernels import _pallas_decode_attention as mosaic
from qwen_jax.kernels.decode_attention import decode_attention, decode_attention_xla

LAYERS = 10
# (warps, thread blocks of a cluster)
TILINGS = ((8, 1), (8, 2), (8, 4), (8, 8), (4, 1), (4, 2), (4, 4), (4, 8), (16, 1), (16, 2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Checks and times decode attention at 64 heads of 128."""

    batch: tuple[int, ...] = (1, 4, 16)
    context: tuple[int, ...] = (1024, 8192)
    heads: int = 64


def make(heads: int, batch: int, capacity: int, dtype) -> tuple[jax.Array, KVCache]:
    cfg = ModelConfig(
        vocab_size=8, hidden_size=heads * 128, num_layers=LAYERS, num_heads=heads, head_dim=128,
        ffn_size=8,
    )  # fmt: skip
    q = jax.random.normal(jax.random.key(1), (batch, heads, 128)).astype(jnp.bfloat16)
    return q, filled_cache(cfg, batch, capacity, capacity, jnp.dtype(dtype))


def check(dtype: str) -> None:
    """Relative error at lengths around every boundary, up to 32,768."""
    q, cache = make(2, 2, 32768, dtype)
    q, cache = jnp.repeat(q, 2, axis=0), cache
    stacks = (cache.k, cache.v, cache.k_scale, cache.v_scale)
    kernel = jax.jit(functools.partial(decode_attention, implementation="mosaic"))
    reference = jax.jit(decode_attention_xla)
    worst = 0.0
    cases = [(1, 2, 3, 8), (9, 63, 64, 65), (127, 128, 129, 1000), (4095, 4096, 4097, 32768)]
    for case in cases:
        visible = jnp.array(case, jnp.int32)
        got = kernel(q, *stacks, jnp.int32(3), visible).astype(jnp.float32)
        with jax.default_matmul_precision("highest"):
            want = reference(q.astype(jnp.float32), *stacks, jnp.int32(3), visible)
        error = jnp.linalg.norm(got - want, axis=(1, 2)) / jnp.linalg.norm(want, axis=(1, 2))
        worst = max(worst, float(error.max()))
    print(f"{dtype} cache, 16 lengths up to 32,768: largest relative error {worst:.1e}", flush=True)


def measure(heads: int, batch: int, context: int, dtype: str) -> None:
    q, cache = make(heads, batch, context, dtype)
    scales = () if cache.k_scale is None else (cache.k_scale, cache.v_scale)
    visible = jnp.full((batch,), context, jnp.int32)
    item = 1 if scales else 2
    size = batch * context * heads * (2 * 128 * item + (4 if scales else 0))
    line = f"{dtype} batch {batch} context {context}:"
    for warps, splits in TILINGS:

        def fn(layer, visible, q, *stacks, warps=warps, splits=splits):
            return mosaic.decode_attention(layer, visible, q, *stacks, warps=warps, splits=splits)

        try:
            seconds = kernel_seconds(fn, visible, q, cache.k, cache.v, *scales)
            line += f" {warps}x{splits} {seconds * 1e6:.1f}us {size / seconds / 1e12:.2f}"
        except Exception as e:  # one that does not compile must not end the rest
            line += f" {warps}x{splits} {type(e).__name__}: {str(e)[:150]}"
    print(line, flush=True)


def main(argv=None):
    args = parse(Args, argv)
    for dtype in ("bfloat16", "int8"):
        try:
            check(dtype)
        except Exception as e:
            print(f"{dtype}: {type(e).__name__}: {str(e)[:500]}", flush=True)
    for dtype in ("bfloat16", "int8"):
        for batch in args.batch:
            for context in args.context:
                if batch * context <= 40000:
                    measure(args.heads, batch, context, dtype)


if __name__ == "__main__":
    run(main)
