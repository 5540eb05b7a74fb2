"""Mosaic GPU bodies of residual addition and RMS norm, and of their gradient: a thread block has
one row, in registers from the sums over it to the result.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from qwen_jax.kernels import _pallas_ptx as ptx
from qwen_jax.kernels._pallas_codes import bfloat16s
from qwen_jax.quant import Layer

_MOST_THREADS = 640


def check(D: int) -> int:
    """How many values a thread has, or NotImplementedError."""
    for values in (8, 16):
        if D % (128 * values) == 0 and D // values <= _MOST_THREADS:
            return values
    raise NotImplementedError(f"rows of {D}: expected a multiple of 1024, up to 10240")


def norm(
    x: Layer,  # bfloat16 stack [L, M, D]
    y: jax.Array | None,  # bfloat16 [M, D], to be added first
    weight: jax.Array,  # bfloat16 [D]
    eps: float,
) -> jax.Array:  # bfloat16 [M, D]
    """Rounds where rms_norm of x + y does."""
    M, D = x.shape
    return _call(Norm(M=M, D=D, values=check(D), eps=eps, added=y is not None), x, y, weight)


def gradient(
    x: Layer,  # bfloat16 stack [L, M, D]
    y: jax.Array | None,  # bfloat16 [M, D]: the norm was that of x + y
    of_total: jax.Array,  # bfloat16 [M, D]: gradient of x + y, but for that of the norm
    of_norms: tuple[jax.Array, ...],  # bfloat16 [M, D]: gradient of the norm is their sum
    weight: jax.Array,  # bfloat16 [D]
    eps: float,
) -> jax.Array:  # bfloat16 [M, D]
    """Gradient of x, which is that of y."""
    M, D = x.shape
    body = Gradient(
        M=M, D=D, values=check(D), eps=eps, added=y is not None, readers=len(of_norms)
    )  # fmt: skip
    return _call(body, x, y, of_total, *of_norms, weight)


def _call(body: "Norm", x: Layer, *others: jax.Array | None) -> jax.Array:
    M, D = x.shape
    run = plgpu.kernel(
        ptx.of_threads(body),
        out_type=jax.ShapeDtypeStruct((M, D), jnp.bfloat16),
        grid=(M,),
        grid_names=("row",),
        num_threads=body.threads // 128,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((2 * body.threads // 32,), jnp.float32)],
        compiler_params=ptx.LANE,
    )
    index = jnp.asarray(x.index, jnp.int32).reshape(1)
    return run(index, x.stack, *(a for a in others if a is not None))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm:
    """Builds the code of one thread."""

    M: int
    D: int
    values: int  # of a thread
    eps: float
    added: bool  # x comes in two parts

    @property
    def threads(self) -> int:
        return self.D // self.values

    def __call__(self, ctx, *refs) -> None:
        *refs, out_ref, smem = refs
        thread, *_ = ptx.thread()
        row, inputs = self._row(thread), self._inputs(refs, thread)
        results = self._results(
            *inputs, lambda *sums: ptx.over_block(arith.addf, sums, self.threads // 32, smem)
        )
        out = ptx.add(ptx.address(out_ref), row)
        for i in range(0, self.values, 8):
            text = f"st.global.v4.u32 [$0+{i // 8 * self.threads * 16}], {{$1,$2,$3,$4}};"
            ptx.asm(text, [out, *bfloat16s(results[i : i + 8])])

    def _results(self, x, weight, sums) -> list[ptx.Value]:
        (squares,) = sums(_dot(x, x))
        scale = self._scale(squares)
        normed = [ptx.rounded(arith.mulf(a, scale)) for a in x]
        return [arith.mulf(a, b) for a, b in zip(normed, weight, strict=True)]

    def _scale(self, squares) -> ptx.Value:
        mean = arith.mulf(squares, ptx.real(1 / self.D))
        return ptx.inverse_root(arith.addf(mean, ptx.real(self.eps)))

    def _row(self, thread) -> ptx.Value:
        """Bytes from the start of an array [M, D] to the first values of a thread."""
        row = ptx.mul(ptx.wide(ptx.block()), self.D * 2)
        return ptx.add(row, ptx.mul(ptx.wide(thread), 16))

    def _inputs(self, refs, thread) -> list[list[ptx.Value]]:
        """x + y, what else there is, and the weight, in float32."""
        index_ref, stack_ref, *others, weight_ref = refs
        row, column = self._row(thread), ptx.mul(ptx.wide(thread), 16)
        layer = ptx.wide(ptx.load_word(ptx.address(index_ref)))
        stack = ptx.add(ptx.address(stack_ref), ptx.mul(layer, self.M * self.D * 2))
        sources = [ptx.add(base, row) for base in (stack, *map(ptx.address, others))]
        sources.append(ptx.add(ptx.address(weight_ref), column))
        x, *loaded = [_floats(words) for words in map(self._load, sources)]
        if self.added:
            y, *loaded = loaded
            x = [ptx.rounded(arith.addf(a, b)) for a, b in zip(x, y, strict=True)]
        return [x, *loaded]

    def _load(self, at) -> list[ptx.Value]:
        """Words of this thread's values: eight neighbours, and eight further on in the row."""
        offsets = range(0, self.values // 8 * self.threads * 16, self.threads * 16)
        return [word for offset in offsets for word in ptx.load_words(at, offset)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradient(Norm):
    """The same, of the gradient."""

    readers: int  # the gradient of the norm comes in so many parts

    def _results(self, x, of_total, g, *others) -> list[ptx.Value]:
        *more, weight, sums = others
        for part in more:
            g = [arith.addf(a, b) for a, b in zip(g, part, strict=True)]
        g = [arith.mulf(a, b) for a, b in zip(g, weight, strict=True)]
        squares, dots = sums(_dot(x, x), _dot(x, g))
        scale = self._scale(squares)
        # scale (g - n mean(g n)) for n = scale x
        share = arith.mulf(arith.mulf(scale, scale), arith.mulf(dots, ptx.real(-1 / self.D)))
        return [
            ptx.fma(scale, ptx.fma(a, share, b), rest)
            for a, b, rest in zip(x, g, of_total, strict=True)
        ]


def _floats(words: list[ptx.Value]) -> list[ptx.Value]:
    return [value for word in words for value in ptx.bfloats(word)]


def _dot(x: list[ptx.Value], y: list[ptx.Value]) -> ptx.Value:
    total = ptx.real(0.0)
    for a, b in zip(x, y, strict=True):
        total = ptx.fma(a, b, total)
    return total
