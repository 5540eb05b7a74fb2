"""Bandwidth of the few-row 4-bit product on the layer shapes of Qwen-72B, beside the card's own.

    python -m benchmarks.qmatmul [--sweep true]

Weights are a random stack, larger than the cache. Times are of one compiled program that goes
through the whole stack many times; bytes are those of codes and scales.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.kernels._pallas_qmatmul import Tiling, split_matmul
from qwen_jax.kernels.decode_matmul import pack_int4
from qwen_jax.quant import QuantFormat, dequantize, quantize

SHAPES = {"up": (24576, 8192), "down": (8192, 24576)}
LAYERS, REPEATS = 16, 10


def T(blocks, warps, splits, ahead, pdl=False):
    return Tiling(blocks=blocks, warps=warps, splits=splits, ahead=ahead, pdl=pdl)


SWEEP = {
    "up": [
        T(3, 16, 4, 4), T(3, 16, 4, 2), T(3, 8, 4, 4), T(3, 8, 4, 8), T(2, 8, 4, 8), T(2, 12, 4, 4),
        T(1, 12, 2, 8), T(1, 12, 1, 8), T(1, 24, 2, 8), T(1, 8, 4, 8), T(3, 16, 4, 4, True),
    ],
    "down": [
        T(2, 16, 8, 4), T(2, 16, 8, 8), T(1, 16, 4, 8), T(2, 8, 8, 8), T(4, 8, 8, 4), T(1, 8, 4, 8),
        T(1, 8, 8, 8), T(2, 8, 12, 8), T(2, 16, 8, 8, True),
    ],
}  # fmt: skip


def random_stack(N, K):
    codes = jax.random.bits(jax.random.key(1), (LAYERS, N // 16, K // 64, 32, 4), jnp.uint32)
    scale = jax.random.uniform(
        jax.random.key(2), (LAYERS, N // 16, K // 512, 8, 8), jnp.float32, 0.001, 0.002
    )
    return codes, scale.astype(jnp.float16)


def median_seconds(fn, *args) -> float:
    jax.block_until_ready(fn(*args))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def bandwidth(fn, x, codes, scale, chained: bool) -> float:
    """Bytes a second; `chained` adds the sum over splits and makes each product wait for it."""

    @jax.jit
    def program(x, codes, scale):
        def body(_, carry):
            x, total = carry
            for layer in range(LAYERS):
                out = fn(jnp.array([layer], jnp.int32), x, codes, scale)
                if chained:
                    y = out.sum(0)
                    x = x + 1e-30 * jnp.resize(y.astype(x.dtype), x.shape)
                else:
                    total = total + out
            return x, total

        shape = jax.eval_shape(fn, jnp.zeros((1,), jnp.int32), x, codes, scale)
        total = jnp.zeros(shape.shape, shape.dtype)
        return jax.lax.fori_loop(0, REPEATS, body, (x, total))

    seconds = median_seconds(program, x, codes, scale)
    return REPEATS * (codes.nbytes + scale.nbytes) / seconds


def relative_error(fn, M, N, K) -> float:
    w = jax.random.normal(jax.random.key(3), (N, K)) * 0.02
    q = quantize(w, QuantFormat(kind="int4", group=128))
    codes, scale = (a[None] for a in jax.jit(pack_int4)(q.data, q.scale))
    x = jax.random.normal(jax.random.key(4), (M, K)).astype(jnp.bfloat16)
    out = fn(jnp.zeros((1,), jnp.int32), x, codes, scale).sum(0)
    with jax.default_matmul_precision("highest"):
        want = x.astype(jnp.float32) @ dequantize(q, jnp.float32).T
    return float(jnp.linalg.norm(out - want) / jnp.linalg.norm(want))


def ceiling() -> float:
    data = jax.random.bits(jax.random.key(0), (1 << 14, 1 << 16), jnp.uint32)
    total = jax.jit(lambda d: jnp.sum(d, axis=1))
    return data.nbytes / median_seconds(total, data)


def main():
    print(jax.devices()[0].device_kind, jax.__version__, flush=True)
    print(f"row sums of 4.3 GB: {ceiling() / 1e12:.2f} TB/s", flush=True)
    for name, (N, K) in SHAPES.items():
        codes, scale = random_stack(N, K)
        for tiling in SWEEP[name]:
            line = f"{name} {dataclasses.astuple(tiling)}"
            for M in (1, 8, 16):
                try:
                    fn = functools.partial(split_matmul, tiling=tiling)
                    start = time.perf_counter()
                    x = jax.random.normal(jax.random.key(5), (M, K)).astype(jnp.bfloat16)
                    alone = bandwidth(fn, x, codes, scale, False) / 1e12
                    chain = bandwidth(fn, x, codes, scale, True) / 1e12
                    error = relative_error(fn, M, N, K)
                    line += f" | M={M} {alone:.2f} chained {chain:.2f} err {error:.1e}"
                    line += f" ({time.perf_counter() - start:.1f}s)"
                except Exception as e:  # a tiling that does not compile must not end the sweep
                    line += f" | M={M} {type(e).__name__}: {str(e)[:300]}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
