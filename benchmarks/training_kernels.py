"""What stands between the products of a training step: kernels beside XLA, at the widths of 72B.

    python -m benchmarks.training_kernels
    python -m benchmarks.training_kernels --toy --implementations xla      on a CPU

Each is one program, called many times; bytes are those that it must read and write.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp

from benchmarks.gemm import normal
from qwen_jax.cli import parse, run
from qwen_jax.kernels.rms_norm import residual_rms_norm
from qwen_jax.kernels.swiglu import swiglu_gradient
from qwen_jax.quant import Layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Times the gradients of SwiGLU (with LoRA's narrow products) and of RMS norm in bfloat16."""

    rows: int = 2048
    hidden: int = 8192
    ffn: int = 24576
    rank: int = 8
    calls: int = 50
    implementations: tuple[str, ...] = ("xla", "mosaic")
    toy: bool = False
    """few and narrow rows"""


def main(argv: list[str] | None = None) -> None:
    args = parse(Args, argv)
    if args.toy:
        args = dataclasses.replace(args, rows=128, hidden=64, ffn=128, calls=2)
    print(jax.devices()[0].device_kind, "jax", jax.__version__, flush=True)
    print("gradient | how | us | GB/s | relative error")
    for name, case in (("SwiGLU", swiglu_case(args)), ("RMS norm", norm_case(args))):
        measure(name, *case, args)


def swiglu_case(args: Args):
    """(function by implementation, arguments, bytes)."""
    M, F, R = args.rows, args.ffn, args.rank
    up, gate = (Layer(stack=normal(i, 2, M, F), index=jnp.int32(1)) for i in range(2))
    pairs = (normal(3, R, F), normal(4, R, F)), (normal(5, M, R), normal(6, M, R)), normal(7, M, R)
    arguments = (up, gate, normal(2, M, F), *pairs)
    return (
        lambda how: functools.partial(swiglu_gradient, implementation=how),
        arguments,
        2 * 5 * M * F,
    )


def norm_case(args: Args):
    """The same: behind a residual addition, with two readers."""
    M, D = args.rows, args.hidden
    x, y, *gradients = (normal(i, M, D) for i in range(5))
    weight = normal(5, D)

    def gradient(x, y, weight, of_total, of_norms, place):
        def norm(x, y):
            return residual_rms_norm(x, y, weight, 1e-6, readers=2, place=place)

        return jax.vjp(norm, x, y)[1]((of_total, of_norms))[0]

    def by(how: str):
        place = Layer(stack=x[None], index=jnp.int32(0)) if how == "mosaic" else None
        return functools.partial(gradient, place=place)

    return by, (x, y, weight, gradients[0], tuple(gradients[1:])), 2 * 6 * M * D


def measure(name: str, by, arguments, size: int, args: Args) -> None:
    reference = None
    for how in args.implementations:
        fn = jax.jit(by(how))
        result = jax.block_until_ready(fn(*arguments))
        reference = result if reference is None else reference
        began = time.perf_counter()
        for _ in range(args.calls):
            last = fn(*arguments)
        jax.block_until_ready(last)
        seconds = (time.perf_counter() - began) / args.calls
        error = max(
            map(relative_error, jax.tree.leaves(result), jax.tree.leaves(reference))
        )  # fmt: skip
        print(f"{name} | {how} | {seconds * 1e6:.1f} | {size / seconds / 1e9:.0f} | {error:.1e}")


def relative_error(a: jax.Array, b: jax.Array) -> float:
    a, b = (x.astype(jnp.float32) for x in (a, b))
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


if __name__ == "__main__":
    run(main)
