"""Mosaic GPU body of the gradient of residual addition and RMS norm: a thread block has one row, in
registers from the two sums over it to the result.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from qwen_jax.kernels import _pallas_ptx as ptx
from qwen_jax.kernels._pallas_codes import bfloat16s

_MOST_THREADS = 640


def check(D: int) -> int:
    """How many values a thread has, or NotImplementedError."""
    for values in (8, 16):
        if D % (128 * values) == 0 and D // values <= _MOST_THREADS:
            return values
    raise NotImplementedError(f"rows of {D}: expected a multiple of 1024, up to 10240")


def gradient(
    x: jax.Array,  # bfloat16 [M, D]
    y: jax.Array | None,  # the same: the norm was that of x + y
    of_total: jax.Array,  # bfloat16 [M, D]: gradient of x + y, but for that of the norm
    of_norms: tuple[jax.Array, ...],  # bfloat16 [M, D]: gradient of the norm is their sum
    weight: jax.Array,  # bfloat16 [D]
    eps: float,
) -> jax.Array:  # bfloat16 [M, D]
    """Gradient of x, which is that of y."""
    M, D = x.shape
    values = check(D)
    body = Body(D=D, values=values, eps=eps, added=y is not None, readers=len(of_norms))
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
    return run(*(a for a in (x, y, of_total, *of_norms, weight) if a is not None))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Body:
    """Builds the code of one thread."""

    D: int
    values: int  # of a thread
    eps: float
    added: bool  # x comes in two parts
    readers: int  # the gradient of the norm in so many

    @property
    def threads(self) -> int:
        return self.D // self.values

    def __call__(self, ctx, *refs) -> None:
        *inputs, weight_ref, out_ref, smem = refs
        thread, lane, warp = ptx.thread()
        column = ptx.mul(ptx.wide(thread), 16)
        row = ptx.add(ptx.mul(ptx.wide(ptx.block()), self.D * 2), column)
        loaded = [self._load(ptx.add(ptx.address(ref), row)) for ref in inputs]
        weight = _floats(self._load(ptx.add(ptx.address(weight_ref), column)))
        x, *others = map(_floats, loaded)
        if self.added:
            y, *others = others
            x = [ptx.rounded(arith.addf(a, b)) for a, b in zip(x, y, strict=True)]
        of_total, g, *more = others
        for part in more:
            g = [arith.addf(a, b) for a, b in zip(g, part, strict=True)]
        g = [arith.mulf(a, b) for a, b in zip(g, weight, strict=True)]

        squares, dots = ptx.real(0.0), ptx.real(0.0)
        for a, b in zip(x, g, strict=True):
            squares, dots = ptx.fma(a, a, squares), ptx.fma(a, b, dots)
        squares, dots = self._sums([squares, dots], lane, warp, smem)
        mean = arith.mulf(squares, ptx.real(1 / self.D))
        scale = ptx.inverse_root(arith.addf(mean, ptx.real(self.eps)))
        # scale (g - n mean(g n)) for n = scale x
        share = arith.mulf(arith.mulf(scale, scale), arith.mulf(dots, ptx.real(-1 / self.D)))
        result = []
        for a, b, rest in zip(x, g, of_total, strict=True):
            result.append(ptx.fma(scale, ptx.fma(a, share, b), rest))
        out = ptx.add(ptx.address(out_ref), row)
        for i in range(0, self.values, 8):
            text = f"st.global.v4.u32 [$0+{i // 8 * self.threads * 16}], {{$1,$2,$3,$4}};"
            ptx.asm(text, [out, *bfloat16s(result[i : i + 8])])

    def _load(self, at) -> list[ptx.Value]:
        """Words of this thread's values: eight neighbours, and eight further on in the row."""
        offsets = range(0, self.values // 8 * self.threads * 16, self.threads * 16)
        return [word for offset in offsets for word in ptx.load_words(at, offset)]

    def _sums(self, values, lane, warp, smem) -> list[ptx.Value]:
        """Each over all threads of the block, in each of them."""
        base, warps, sums = ptx.address(smem), self.threads // 32, []
        for i, value in enumerate(values):
            for distance in (1, 2, 4, 8, 16):
                value = arith.addf(value, ptx.swap(value, distance))
            with ptx.when(ptx.less(lane, 1)):
                at = ptx.add(base, ptx.mul(ptx.add(warp, i * warps), 4))
                ptx.asm("st.shared.f32 [$0], $1;", [at, value])
        ptx.barrier()
        for i in range(len(values)):
            ats = [ptx.add(base, 4 * (i * warps + other)) for other in range(warps)]
            sums.append(
                ptx.total([ptx.asm("ld.shared.f32 $0, [$1];", [at], [ptx.f32()]) for at in ats])
            )
        return sums


def _floats(words: list[ptx.Value]) -> list[ptx.Value]:
    return [value for word in words for value in ptx.bfloats(word)]
