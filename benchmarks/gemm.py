"""The product with LoRA in it, as training does it, beside cuBLAS: one dense weight, many calls.

    python -m benchmarks.gemm                      forward and backward shapes of Qwen-72B
    python -m benchmarks.gemm --tilings rows=64 rows=128,columns=128,share_x=1 cluster=4

Candidates take turns, several rounds of them, because a card at its power limit is slower for
whoever comes later; and a turn is long enough for that limit to show. So what is compared is the
energy of a product. The error is relative to float32, over the whole result.
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.cli import parse, run
from qwen_jax.errors import InputError, did_you_mean
from qwen_jax.kernels import _pallas_gemm
from qwen_jax.kernels._pallas_gemm import Tiling

# N, K, and whether the weight lies as [K, N]: as the backward pass reads it.
SHAPES = {
    "qkv": (24576, 8192, False),
    "down": (8192, 24576, False),
    "qkv backward": (8192, 24576, True),
    "down backward": (24576, 8192, True),
}
CALLS = 200  # in one program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Times y = x w^T + low b in bfloat16."""

    rows: int = 2048  # of x
    rank: int = 8
    shapes: tuple[str, ...] = tuple(SHAPES)
    tilings: tuple[str, ...] = ("rows=64",)  # fields of _pallas_gemm.Tiling, the rest by default
    rounds: int = 5


def changes_of(text: str) -> dict[str, str]:
    """What `wide=4,cluster=2` names; InputError if it is not of that form."""
    changes = {}
    for part in text.split(","):
        name, sign, value = part.partition("=")
        if not sign:
            raise InputError(f"{text!r}: expected name=value, apart by commas, got {part!r}")
        changes[name] = value
    return changes


def tiling_of(changes: dict[str, str]) -> Tiling:
    """The kernel's tiling with other values in some fields; InputError for what it has not."""
    known = [field.name for field in dataclasses.fields(Tiling)]
    for name, value in changes.items():
        if name not in known:
            raise InputError(
                f"no {name!r} to change{did_you_mean(name, known)}: {', '.join(known)}"
            )
        if not value.isdecimal():
            raise InputError(f"{name}={value}: expected a whole number")
    return Tiling(**{name: int(value) for name, value in changes.items()})


def normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) * scale


def cublas(x, w, low, b, *, turned: bool, lora: bool) -> jax.Array:
    y = jax.lax.dot_general(x, w, (((1,), (0 if turned else 1,)), ((), ())))
    return y + low @ b if lora else y


def repeated(fn):
    """CALLS of fn(x, ...) in one program, each of which waits for the one before."""

    @jax.jit
    def program(x, *rest):
        def one(_, total):
            y = fn(x.at[0, 0].add((total * 0).astype(x.dtype)), *rest)
            return total + y[0, 0].astype(jnp.float32)

        return jax.lax.fori_loop(0, CALLS, one, jnp.zeros(()))

    return program


def relative_error(y, x, w, low, b, turned: bool) -> float:
    x, w, low, b = (a.astype(jnp.float32) for a in (x, w, low, b))
    with jax.default_matmul_precision("highest"):
        want = x @ (w if turned else w.T) + low @ b
    return float(jnp.linalg.norm(y - want) / jnp.linalg.norm(want))


def measure(name: str, args: Args) -> None:
    N, K, turned = SHAPES[name]
    w = normal(1, *((K, N) if turned else (N, K)), scale=0.02)
    operands = (
        normal(0, args.rows, K),
        w,
        normal(2, args.rows, args.rank),
        normal(3, args.rank, N),
    )
    candidates = {
        "cuBLAS": functools.partial(cublas, turned=turned, lora=False),
        "cuBLAS, LoRA apart": functools.partial(cublas, turned=turned, lora=True),
    }
    for text in args.tilings:
        tiling = tiling_of(changes_of(text))
        fn = functools.partial(_pallas_gemm.gemm, turned=turned, tiling=tiling)
        candidates[f"kernel {text}"] = fn
    errors, programs, times = {}, {}, {}
    for label, fn in candidates.items():
        try:
            if label != "cuBLAS":
                errors[label] = relative_error(jax.jit(fn)(*operands), *operands, turned)
            program = repeated(fn)
            jax.block_until_ready(program(*operands))
            programs[label], times[label] = program, []
        except Exception as e:  # what does not compile must not end the table
            print(f"{name} | {label} | {type(e).__name__}: {str(e)[:200]}", flush=True)
    for _ in range(args.rounds):
        for label, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(*operands))
            times[label].append((time.perf_counter() - began) / CALLS)
    for label, spent in times.items():
        seconds = float(np.median(spent))
        rate = 2 * args.rows * N * K / seconds / 1e12
        error = f"{errors[label]:.1e}" if label in errors else ""
        print(f"{name} | {label} | {seconds * 1e6:.1f} | {rate:.0f} | {error}", flush=True)


def main(argv=None):
    args = parse(Args, argv)
    print(jax.devices()[0].device_kind, "jax", jax.__version__, flush=True)
    print("shape | how | us | TFLOP/s | relative error")
    for name in args.shapes:
        measure(name, args)


if __name__ == "__main__":
    run(main)
