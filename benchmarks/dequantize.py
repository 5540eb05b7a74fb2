"""Speed of writing one 4-bit weight of Qwen-72B out in bfloat16 or e4m3, beside XLA's own pass.

    python -m benchmarks.dequantize              both formats, every output, in the tiling in use
    python -m benchmarks.dequantize --sweep      candidate tilings as well

Times are of one weight inside a program that goes through a stack larger than the card's cache.
Bytes are those of codes, scales and values. The error is the largest difference from XLA's pass
over the largest value of it, and the share of values that differ at all.
"""

import dataclasses
import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.cli import parse, run
from qwen_jax.kernels import _pallas_dequantize as kernel
from qwen_jax.kernels.dequantize import FP8, dequantize
from qwen_jax.quant import Layer, QTensor, QuantFormat, largest

SHAPES = {"qkv": (24576, 8192), "wo": (8192, 8192), "down": (8192, 24576)}
LAYERS = 4
TURNS = 10  # through the stack in one program
OUTPUTS = {"bf16": (jnp.bfloat16, False), "e4m3": (FP8, False), "e4m3 turned": (FP8, True)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Times the dequantization of whole weights."""

    kinds: tuple[str, ...] = ("nf4", "int4")
    shapes: tuple[str, ...] = ("qkv",)
    outputs: tuple[str, ...] = tuple(OUTPUTS)
    sweep: bool = False  # candidate tilings as well as the one in use
    seconds: float = 60.0  # stop after this


STRAIGHT = [
    kernel.Tiling(warps=warps, turns=turns)
    for warps, turns in ((8, 1), (4, 1), (8, 2), (4, 4), (16, 1), (8, 4))
]
TURNED = [
    kernel.Tiling(warps=warps, turns=turns, side=side, fetch=fetch)
    for warps, turns, side, fetch in (
        (8, 1, 1, 128), (8, 1, 1, 256), (8, 1, 2, 128), (8, 1, 2, 256), (8, 1, 4, 128),
        (8, 1, 8, 128), (8, 2, 1, 128), (8, 2, 2, 128), (8, 4, 4, 128), (16, 1, 2, 128),
        (16, 2, 2, 128),
    )
]  # fmt: skip


def random_stack(kind: str, O: int, I: int) -> QTensor:
    """Random codes; scales like those of normal weights."""
    shapes = QuantFormat.named(kind).shapes((O,), I)
    keys = iter(jax.random.split(jax.random.key(1, impl="rbg"), 4))
    arrays = {}
    for name, (shape, dtype) in shapes.items():
        shape = (LAYERS, *shape)
        if dtype == np.uint8:
            arrays[name] = jax.random.bits(next(keys), shape, jnp.uint8)
        else:
            arrays[name] = jax.random.uniform(next(keys), shape, jnp.float32, 0.01, 0.02)
            arrays[name] = arrays[name].astype(dtype)
    return QTensor(**arrays, kind=kind)


def in_use(layer: Layer, dtype, turned: bool, implementation: str) -> jax.Array:
    unit = None if dtype == jnp.bfloat16 else largest(layer) / 448.0
    return dequantize(layer, dtype, unit=unit, turned=turned, implementation=implementation)


def tiled(layer: Layer, dtype, turned: bool, tiling: kernel.Tiling) -> jax.Array:
    factor = None if dtype == jnp.bfloat16 else 448.0 / largest(layer)
    write = kernel.turned if turned else kernel.straight
    return write(layer.index, layer.stack, dtype, factor, tiling=tiling)


def timed(fn, q: QTensor) -> tuple[float, jax.Array]:
    """Seconds of one weight, and the last layer's values."""

    @jax.jit
    def program(q, start):
        # The output rides in the carry, so that every turn must write it.
        def one(i, _):
            return fn(Layer(stack=q, index=i % LAYERS))

        return jax.lax.fori_loop(0, LAYERS * TURNS, one, start)

    shape = jax.eval_shape(fn, Layer(stack=q, index=jnp.int32(0)))
    start = jnp.zeros(shape.shape, shape.dtype)
    out = jax.block_until_ready(program(q, start))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(program(q, start))
        times.append(time.perf_counter() - began)
    return float(np.median(times)) / (LAYERS * TURNS), out


@jax.jit
def difference(out: jax.Array, want: jax.Array) -> tuple[jax.Array, jax.Array]:
    out, want = out.astype(jnp.float32), want.astype(jnp.float32)
    gap = jnp.abs(out - want)
    # A NaN is a difference too, and a maximum keeps it.
    return jnp.max(gap) / jnp.max(jnp.abs(want)), jnp.mean(~(gap == 0))


def ceiling() -> float:
    """Bytes a second of an elementwise pass over 0.8 GB of bfloat16."""
    x = jax.random.normal(jax.random.key(0, impl="rbg"), (1 << 28, 1), jnp.bfloat16)

    @jax.jit
    def program(x):
        return jax.lax.fori_loop(0, 20, lambda _, x: -x, x)

    jax.block_until_ready(program(x))
    began = time.perf_counter()
    jax.block_until_ready(program(x))
    return 2 * x.nbytes * 20 / (time.perf_counter() - began)


def candidates(sweep: bool, turned: bool) -> list[tuple[str, object]]:
    """What is measured: name -> function of (layer, dtype, turned)."""
    named = [(name, functools.partial(in_use, implementation=name)) for name in ("xla", "mosaic")]
    if not sweep:
        return named
    tilings = TURNED if turned else STRAIGHT
    return named[:1] + [
        (str(tuple(dataclasses.asdict(t).values())), functools.partial(tiled, tiling=t))
        for t in tilings
    ]


def main(argv=None):
    args = parse(Args, argv)
    began = time.perf_counter()
    print(jax.devices()[0].device_kind, "jax", jax.__version__, flush=True)
    print(f"elementwise pass over bfloat16: {ceiling() / 1e12:.2f} TB/s", flush=True)
    for kind, shape in itertools.product(args.kinds, args.shapes):
        q = random_stack(kind, *SHAPES[shape])
        for name in args.outputs:
            dtype, turned = OUTPUTS[name]
            want = None
            values = SHAPES[shape][0] * SHAPES[shape][1] * jnp.dtype(dtype).itemsize
            size = (q.data.nbytes + q.scale.nbytes) / LAYERS + values
            for how, fn in candidates(args.sweep, turned):
                if time.perf_counter() - began > args.seconds:
                    print("out of time", flush=True)
                    return
                line = f"{kind} {shape} -> {name} | {how}"
                try:
                    seconds, out = timed(functools.partial(fn, dtype=dtype, turned=turned), q)
                    line += f" | {seconds * 1e6:.1f} us {size / seconds / 1e12:.2f} TB/s"
                    want = out if want is None else want
                    error, share = difference(out.reshape(want.shape), want)
                    line += f" | largest {error:.1e}, different {share:.1e}"
                    line += f" | {time.perf_counter() - began:.0f} s"
                except Exception as e:  # what does not compile must not end the run
                    line += f" | {type(e).__name__}: {str(e)[:300]}"
                print(line, flush=True)


if __name__ == "__main__":
    run(main)
