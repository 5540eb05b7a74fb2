"""Bandwidth of the few-row product on the layer shapes of Qwen-72B, beside the card's own.

    python -m benchmarks.qmatmul             the tilings in use, timed inside one program
    python -m benchmarks.qmatmul --sweep     candidate tilings, device time of the kernel alone
    python -m benchmarks.qmatmul --crossover --rows 8 16 24 32 48 64 128    where a GEMM on
                                             unpacked weights is as fast as the kernel
    python -m benchmarks.qmatmul --kinds int8 bf16    other formats than int4, for each of these

Weights are a random stack, larger than the card's cache. Bytes are those of codes and scales. One
program goes through the whole stack many times; its time includes the sum over the parts of k and
the loop's own small kernels.
"""

import dataclasses
import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.random_weights import packed_weight
from qwen_jax.cli import parse, run
from qwen_jax.kernels._pallas_qmatmul import split_matmul
from qwen_jax.kernels.decode_matmul import decode_parts
from qwen_jax.kernels.packing import PackedWeight, pack
from qwen_jax.kernels.tilings import Tiling, tiling_for
from qwen_jax.params import tree_bytes
from qwen_jax.quant import QuantFormat, dequantize, quantize

SHAPES = {
    "qkv": (24576, 8192),
    "wo": (8192, 8192),
    "up+gate": (49152, 8192),
    "down": (8192, 24576),
}
LAYERS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Times the few-row product."""

    rows: tuple[int, ...] = (1, 8, 16)  # rows of activations
    kinds: tuple[str, ...] = ("int4",)  # int4, nf4, int8, bf16
    shapes: tuple[str, ...] = tuple(SHAPES)
    tensor: int = 1  # one device's slice of the shapes on a mesh with tensor=N
    sweep: bool = False  # try candidate tilings instead of the tuned ones
    crossover: bool = False  # the kernel beside unpacking and a GEMM
    seconds: float = 150.0  # a sweep stops after this


# Candidates: blocks, warps, splits, ahead. The first are tried on every number of rows.
SWEEP = {
    "qkv": [
        (3, 16, 4, 4), (3, 16, 4, 2), (3, 8, 4, 4), (2, 12, 4, 4), (2, 8, 4, 4), (2, 8, 4, 8),
        (1, 12, 2, 8), (1, 24, 2, 8), (1, 24, 2, 4), (1, 16, 4, 8), (2, 16, 4, 2),
    ],
    "up+gate": [
        (3, 16, 4, 4), (3, 16, 2, 4), (3, 8, 4, 4), (2, 12, 4, 4), (2, 8, 2, 4), (1, 24, 1, 8),
        (1, 24, 2, 8),
    ],
    "down": [
        (2, 16, 8, 4), (2, 16, 8, 2), (1, 16, 4, 8), (2, 8, 8, 4), (2, 8, 8, 8), (4, 8, 8, 4),
        (1, 8, 8, 8), (2, 8, 12, 4), (1, 16, 8, 4),
    ],
    "wo": [
        (2, 16, 8, 4), (1, 16, 4, 8), (2, 8, 8, 4), (1, 8, 4, 8), (1, 16, 8, 8), (2, 8, 4, 8),
        (1, 4, 2, 8), (1, 8, 2, 8),
    ],
}  # fmt: skip


def cut_shape(name: str, tensor: int) -> tuple[int, int]:
    """What one device of a tensor axis has: a part of the outputs, or of the inputs."""
    N, K = SHAPES[name]
    return (N, K // tensor) if name in ("wo", "down") else (N // tensor, K)


def random_stack(N: int, K: int, kind: str) -> tuple[jax.Array, jax.Array | None, float]:
    """Codes and scales of all layers, and the bytes of one."""
    make = jax.jit(lambda key: packed_weight(kind, LAYERS, (N,), K, key))
    w = make(jax.random.key(1, impl="rbg"))
    return w.codes, w.scale, tree_bytes(w) / LAYERS


def activations(M: int, K: int) -> jax.Array:
    return jax.random.normal(jax.random.key(5), (M, K)).astype(jnp.bfloat16)


def ceiling() -> float:
    """Bytes a second of the simplest read: row sums of 4.3 GB."""
    data = jax.random.bits(jax.random.key(0, impl="rbg"), (1 << 14, 1 << 16), jnp.uint32)
    return data.nbytes / median_seconds(jax.jit(lambda d: jnp.sum(d, axis=1)), data)


def median_seconds(fn, *args) -> float:
    jax.block_until_ready(fn(*args))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def kernel_seconds(fn, *args: jax.Array) -> float:
    """Median device time of one call fn(layer, *args), each of another layer."""
    from jax._src.lib import mosaic_gpu

    cupti = mosaic_gpu._mosaic_gpu_ext
    indices = [jnp.array([i], jnp.int32) for i in range(LAYERS)]
    compiled = jax.jit(fn).lower(indices[0], *args).compile()
    jax.block_until_ready([compiled(i, *args) for i in indices])
    cupti._cupti_init()
    try:
        jax.block_until_ready([compiled(i, *args) for i in indices])
    finally:
        times = cupti._cupti_get_timings(True)
    return float(np.median([t for _, t in times])) / 1e3


def program_seconds(fn, x, codes, scale) -> float:
    """Time of one product with the sum over its parts, inside a program of many."""

    @jax.jit
    def program(x, codes, scale):
        def one(layer, total):
            return total + fn(jnp.reshape(layer, (1,)), x, codes, scale).sum(0)

        def stack(_, total):
            return jax.lax.fori_loop(0, LAYERS, one, total)

        N = codes.shape[1] * 16
        return jax.lax.fori_loop(0, 20, stack, jnp.zeros((x.shape[0], N), jnp.float32))

    return median_seconds(program, x, codes, scale) / (20 * LAYERS)


def relative_error(fn, M: int, N: int, K: int, kind: str) -> float:
    w = jax.random.normal(jax.random.key(3), (N, K)) * 0.02
    if kind == "bf16":
        w = w.astype(jnp.bfloat16)
        dense = w.astype(jnp.float32)
    else:
        w = quantize(w, QuantFormat.named(kind))
        dense = dequantize(w, jnp.float32)
    packed = jax.jit(pack)(jax.tree.map(lambda a: a[None], w))
    x = jax.random.normal(jax.random.key(4), (M, K)).astype(jnp.bfloat16)
    out = fn(jnp.zeros((1,), jnp.int32), x, packed.codes, packed.scale).sum(0)
    if kind == "int8":
        out = out * packed.scale[0]
    with jax.default_matmul_precision("highest"):
        want = x.astype(jnp.float32) @ dense.T
    return float(jnp.linalg.norm(out - want) / jnp.linalg.norm(want))


def sweep(args: Args) -> None:
    began = time.perf_counter()
    for kind, name in itertools.product(args.kinds, args.shapes):
        N, K = cut_shape(name, args.tensor)
        codes, scale, size = random_stack(N, K, kind)
        for candidate in SWEEP[name]:
            blocks, warps, splits, ahead = candidate
            tiling = Tiling(blocks=blocks, warps=warps, splits=splits, ahead=ahead)
            line = f"{kind} {name} {candidate}"
            for M in args.rows:
                x = activations(M, K)
                fn = functools.partial(split_matmul, tiling=tiling, kind=kind)
                try:
                    seconds = kernel_seconds(fn, x, codes, scale)
                    line += f" | M={M} {seconds * 1e6:.1f} us {size / seconds / 1e12:.2f}"
                except Exception as e:  # what does not compile must not end the sweep
                    line += f" | M={M} {type(e).__name__}: {str(e)[:150]}"
            print(line, flush=True)
            if time.perf_counter() - began > args.seconds:
                print("out of time", flush=True)
                return


def table(args: Args) -> None:
    print("format | shape | rows | tiling | us | TB/s | relative error")
    for kind, name in itertools.product(args.kinds, args.shapes):
        N, K = cut_shape(name, args.tensor)
        codes, scale, size = random_stack(N, K, kind)
        for M in args.rows:
            try:
                tiling = tiling_for(M, N, K, kind)
                fn = functools.partial(split_matmul, tiling=tiling, kind=kind)
                x = activations(M, K)
                seconds = program_seconds(fn, x, codes, scale)
                cut = dataclasses.astuple(tiling)[:4]
                line = f"{kind} | {name} | {M} | {cut} | {seconds * 1e6:.1f}"
                line += f" | {size / seconds / 1e12:.2f}"
                # The largest weight would need 1.6 GB of float32 for its reference.
                if args.rows[-1] == M and name != "up+gate":
                    line += f" | {relative_error(fn, M, N, K, kind):.1e}"
                print(line, flush=True)
            except Exception as e:  # one that does not compile must not end the table
                print(f"{kind} {name} {M}: {type(e).__name__}: {str(e)[:300]}", flush=True)


def as_decoded(layer, x, codes, scale, *, kind: str, implementation: str) -> jax.Array:
    """The product as the decoder calls it."""
    N, K = codes.shape[1] * 16, x.shape[1]
    w = PackedWeight(codes, scale, out_shape=(N,), in_size=K, kind=kind)
    return decode_parts(x, w, layer[0], implementation=implementation)


def crossover(args: Args) -> None:
    """Both implementations of the product for growing numbers of rows."""
    print("format | shape | rows | mosaic us | unpacked us | unpacked / mosaic")
    for kind, name in itertools.product(args.kinds, args.shapes):
        N, K = cut_shape(name, args.tensor)
        codes, scale, _ = random_stack(N, K, kind)
        for M in args.rows:
            x = activations(M, K)
            times = []
            for implementation in ("mosaic", "unpacked"):
                fn = functools.partial(as_decoded, kind=kind, implementation=implementation)
                times.append(program_seconds(fn, x, codes, scale) * 1e6)
            ours, theirs = times
            line = f"{kind} | {name} | {M} | {ours:.1f} | {theirs:.1f} | {theirs / ours:.2f}"
            print(line, flush=True)


def main(argv=None):
    args = parse(Args, argv)
    print(jax.devices()[0].device_kind, "jax", jax.__version__, flush=True)
    print(f"row sums of 4.3 GB: {ceiling() / 1e12:.2f} TB/s", flush=True)
    how = sweep if args.sweep else crossover if args.crossover else table
    how(args)


if __name__ == "__main__":
    run(main)
