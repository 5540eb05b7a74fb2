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
from qwen_jax.kernels.dequantize import FP8
from qwen_jax.kernels.quantize_rows import quantize_rows
from qwen_jax.kernels.rms_norm import residual_rms_norm
from qwen_jax.kernels.swiglu import swiglu_gradient, swiglu_narrow
from qwen_jax.quant import Layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Times SwiGLU and its gradient, with LoRA's narrow products, and the gradient of RMS norm."""

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
    print("what | how | us | GB/s | relative error")
    cases = {
        "SwiGLU": narrow_case(args, rounds=False),
        "SwiGLU in e4m3": narrow_case(args, rounds=True),
        "gradient of SwiGLU": swiglu_case(args),
        "gradient of RMS norm": norm_case(args),
    }
    for name, case in cases.items():
        measure(name, *case, args)


def narrow_case(args: Args, *, rounds: bool):
    """(function by implementation, arguments, bytes)."""
    M, F = args.rows, args.ffn
    arguments = normal(0, 2, M, F), normal(1, 2, M, F), normal(2, args.rank, F)

    def forward(up, gate, a, how: str):
        up, gate = (Layer(stack=stack, index=jnp.int32(1)) for stack in (up, gate))
        made = swiglu_narrow(up, gate, a, FP8 if rounds else a.dtype, implementation=how)
        if rounds and made.unit is None:
            return made.low, *quantize_rows(made.h)
        return made.low, made.h, made.unit

    by = lambda how: functools.partial(forward, how=how)  # noqa: E731
    return by, arguments, (5 if rounds else 6) * M * F


def swiglu_case(args: Args):
    """The same, of the gradient with LoRA's five narrow products."""
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
    """The same, of the gradient of RMS norm: behind a residual addition, with two readers."""
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
