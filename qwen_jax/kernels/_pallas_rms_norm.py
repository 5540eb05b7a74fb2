"""Mosaic GPU bodies of residual addition, of RMS norm behind one, and of its gradient: a thread
block has one row, in registers from the sums over it to the result.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
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
    y: Layer | None,  # the same, to be added first
    weight: jax.Array,  # bfloat16 [D]
    eps: float,
    *,
    total: bool = False,
) -> list[jax.Array]:  # bfloat16 [M, D]
    """The norm, and x + y if the `total` is wanted; rounds where rms_norm of x + y does."""
    M, D = x.shape
    body = Norm(
        M=M, D=D, values=check(D), eps=eps, added=y is not None, total=total and y is not None
    )  # fmt: skip
    return _call(body, x, y, weight, outs=1 + body.total)


def gradient(
    x: Layer,  # bfloat16 stack [L, M, D]
    y: Layer | None,  # the same: the norm was that of x + y
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
    (made,) = _call(body, x, y, of_total, *of_norms, weight)
    return made


def add_behind(
    place: Layer,  # bfloat16 stack [L, M, D]
    x: jax.Array,  # bfloat16 [M, D]
    y: jax.Array,  # bfloat16 [M, D]
) -> jax.Array:
    """The stack with x + y behind that place, in place."""
    M, D = x.shape
    body = Sum(M=M, D=D, values=check(D))
    mesh = plgpu.Mesh(
        grid=(M,), grid_names=("row",), num_threads=body.threads // 128, thread_name="warpgroup"
    )
    run = pl.kernel(
        ptx.of_threads(body), out_type=(), mesh=mesh, compiler_params=ptx.LANE, name="sum_behind"
    )
    ref = jax.new_ref(place.stack)
    run(jnp.asarray(place.index + 1, jnp.int32).reshape(1), x, y, ref)
    return jax.freeze(ref)


def _call(body: "Norm", x: Layer, y: Layer | None, *others: jax.Array, outs: int = 1):
    M, D = x.shape
    run = plgpu.kernel(
        ptx.of_threads(body),
        out_type=(jax.ShapeDtypeStruct((M, D), jnp.bfloat16),) * outs,
        grid=(M,),
        grid_names=("row",),
        num_threads=body.threads // 128,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((2 * body.threads // 32,), jnp.float32)],
        compiler_params=ptx.LANE,
    )
    layers = [layer for layer in (x, y) if layer is not None]
    index = jnp.stack([layer.index for layer in layers]).astype(jnp.int32)
    return run(index, *(layer.stack for layer in layers), *others)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Where a thread finds its values of a row."""

    M: int
    D: int
    values: int  # of a thread

    @property
    def threads(self) -> int:
        return self.D // self.values

    def _row(self, thread) -> ptx.Value:
        """Bytes from the start of an array [M, D] to the first values of a thread."""
        row = ptx.mul(ptx.wide(ptx.block()), self.D * 2)
        return ptx.add(row, ptx.mul(ptx.wide(thread), 16))

    def _layer(self, index_ref, which: int, stack_ref) -> ptx.Value:
        """Where a layer of a stack starts."""
        layer = ptx.wide(ptx.load_word(ptx.add(ptx.address(index_ref), 4 * which)))
        return ptx.add(ptx.address(stack_ref), ptx.mul(layer, self.M * self.D * 2))

    def _load(self, at) -> list[ptx.Value]:
        """This thread's values in float32: eight neighbours, and eight further on in the row."""
        words = [word for offset in self._offsets() for word in ptx.load_words(at, offset)]
        return [value for word in words for value in ptx.bfloats(word)]

    def _store(self, at, values: list[ptx.Value]) -> None:
        for i, offset in enumerate(self._offsets()):
            text = f"st.global.v4.u32 [$0+{offset}], {{$1,$2,$3,$4}};"
            ptx.asm(text, [at, *bfloat16s(values[8 * i : 8 * i + 8])])

    def _offsets(self) -> range:
        return range(0, self.values // 8 * self.threads * 16, self.threads * 16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sum(Rows):
    """Builds the code of one thread."""

    def __call__(self, ctx, index_ref, x_ref, y_ref, stack_ref) -> None:
        thread, *_ = ptx.thread()
        row = self._row(thread)
        x, y = (self._load(ptx.add(ptx.address(ref), row)) for ref in (x_ref, y_ref))
        out = ptx.add(self._layer(index_ref, 0, stack_ref), row)
        self._store(out, [arith.addf(a, b) for a, b in zip(x, y, strict=True)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm(Rows):
    """The same, of the norm."""

    eps: float
    added: bool  # x comes in two parts
    total: bool = False  # their sum is stored as well

    def __call__(self, ctx, index_ref, *refs) -> None:
        *refs, smem = refs
        thread, *_ = ptx.thread()
        row = self._row(thread)
        stacks, others = refs[: 1 + self.added], refs[1 + self.added :]
        outs = [ptx.add(ptx.address(ref), row) for ref in others[len(others) - 1 - self.total :]]
        *others, weight_ref = others[: len(others) - 1 - self.total]
        sources = [self._layer(index_ref, i, ref) for i, ref in enumerate(stacks)]
        sources = [ptx.add(base, row) for base in (*sources, *map(ptx.address, others))]
        sources.append(ptx.add(ptx.address(weight_ref), ptx.mul(ptx.wide(thread), 16)))
        x, *loaded = map(self._load, sources)
        if self.added:
            y, *loaded = loaded
            x = [ptx.rounded(arith.addf(a, b)) for a, b in zip(x, y, strict=True)]
        if self.total:
            self._store(outs[1], x)
        results = self._results(
            x,
            *loaded,
            lambda *sums: ptx.over_block(arith.addf, sums, self.threads // 32, smem),
        )
        self._store(outs[0], results)

    def _results(self, x, weight, sums) -> list[ptx.Value]:
        (squares,) = sums(_dot(x, x))
        scale = self._scale(squares)
        normed = [ptx.rounded(arith.mulf(a, scale)) for a in x]
        return [arith.mulf(a, b) for a, b in zip(normed, weight, strict=True)]

    def _scale(self, squares) -> ptx.Value:
        mean = arith.mulf(squares, ptx.real(1 / self.D))
        return ptx.inverse_root(arith.addf(mean, ptx.real(self.eps)))


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


def _dot(x: list[ptx.Value], y: list[ptx.Value]) -> ptx.Value:
    total = ptx.real(0.0)
    for a, b in zip(x, y, strict=True):
        total = ptx.fma(a, b, total)
    return total
