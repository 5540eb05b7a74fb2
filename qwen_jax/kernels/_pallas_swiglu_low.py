"""Mosaic GPU body of h = up * silu(gate) with LoRA's narrow product of h in the same pass.

A warp has 8 rows and 32 columns at a time, and a thread block goes along the columns. For e4m3 it
keeps h in shared memory (in registers, too few blocks would fit on a multiprocessor to load for one
while another rounds), finds the largest value of its rows together with the other blocks of its
cluster, and then rounds. The narrow product h @ a^T runs on tensor cores, of whose 16 rows it uses
8; its sums over the blocks are left to XLA.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from qwen_jax.kernels import _pallas_ptx as ptx
from qwen_jax.kernels._pallas_codes import bfloat16s, e4m3s
from qwen_jax.kernels._pallas_swiglu import sigmoid_of
from qwen_jax.quant import Layer

_ROWS = 8  # of a block
_COLUMNS = 32  # of a warp: eight for each of four lanes
_WARPS = (8, 4)  # of a block: whichever is the first to divide the columns
_MOST_STEPS = 12  # of a block along the columns
_AHEAD = 2  # steps that are loaded before they are needed
_MOST_BLOCKS = 8  # of a cluster
_RANKS = (8, 16)


def check(M: int, F: int, rank: int, rounds: bool) -> "Body":
    """The body that serves, or NotImplementedError with the reason that none does."""
    warps = next((w for w in _WARPS if F % (w * _COLUMNS) == 0), 0)
    if M % _ROWS or not warps or M * F >= 2**31:
        raise NotImplementedError(
            f"{M} x {F}: expected multiples of {_ROWS} x {_WARPS[-1] * _COLUMNS} below 2^31"
        )
    if rank not in _RANKS:
        raise NotImplementedError(f"rank {rank}: expected one of {_RANKS}")
    pieces = F // (warps * _COLUMNS)
    steps = next(n for n in range(_MOST_STEPS, 0, -1) if pieces % n == 0)
    if rounds and pieces // steps > _MOST_BLOCKS:
        raise NotImplementedError(
            f"rows of {F}: a cluster of {_MOST_BLOCKS} blocks cannot hold one"
        )
    return Body(M=M, F=F, R=rank, warps=warps, steps=steps)


def swiglu_low(
    up: Layer,  # bfloat16 stack [L, M, F]
    gate: Layer,
    a: jax.Array,  # bfloat16 [R, F]
    dtype: jnp.dtype | None,  # of h: bfloat16 or float8_e4m3fn; None: it is not wanted
) -> list[jax.Array]:
    """h @ a^T [M, R]; h [M, F] if it is wanted; in e4m3 the unit of each row, float32 [M]."""
    M, F = up.shape
    rounds = dtype == jnp.float8_e4m3fn
    body = dataclasses.replace(check(M, F, a.shape[0], rounds), dtype=dtype)
    outs = [jax.ShapeDtypeStruct((body.across, M, body.R), jnp.float32)]
    outs += [jax.ShapeDtypeStruct((M, F), dtype)] if dtype is not None else []
    outs += [jax.ShapeDtypeStruct((M,), jnp.float32)] if rounds else []
    cluster = {"cluster": (body.across,), "cluster_names": ("part",)}
    run = plgpu.kernel(
        ptx.of_threads(body),
        out_type=tuple(outs),
        grid=(M // _ROWS if rounds else M // _ROWS * body.across,),
        grid_names=("rows",),
        **(cluster if rounds else {}),
        num_threads=body.warps // 4,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((body.shared_floats,), jnp.float32)],
        compiler_params=ptx.LANE,
    )
    index = jnp.stack([up.index, gate.index]).astype(jnp.int32)
    low, *rest = run(index, up.stack, gate.stack, a)
    return [jnp.sum(low, axis=0).astype(a.dtype), *rest]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Body:
    """Builds the code of one thread."""

    M: int
    F: int
    R: int
    warps: int  # of a block
    steps: int  # of a block along the columns
    dtype: jnp.dtype | None = None  # of h

    @property
    def across(self) -> int:
        """Blocks along F; in e4m3 they are a cluster."""
        return self.F // (self.warps * _COLUMNS * self.steps)

    @property
    def shared_floats(self) -> int:
        """Of every warp what it adds to the narrow product, and its largest values; those of the
        block; and h, 16 bytes a thread and step.
        """
        held = self.steps * self.warps * 32 * 4 if self.rounds else 0
        return self.warps * _ROWS * self.R + self.warps * _ROWS + _ROWS + held

    @property
    def rounds(self) -> bool:
        return self.dtype == jnp.float8_e4m3fn

    def __call__(self, ctx, index_ref, up_ref, gate_ref, a_ref, low_ref, *rest) -> None:
        *outs, smem = rest
        thread, lane, warp = ptx.thread()
        row, part = arith.shrui(lane, ptx.const(2)), arith.andi(lane, ptx.const(3))
        block = ptx.block()
        group, rank = (
            op(block, ptx.const(self.across)) for op in (arith.divui, arith.remui)
        )  # fmt: skip
        first = ptx.mul(group, _ROWS)
        column = ptx.mul(rank, self.steps * self.warps * _COLUMNS)
        column = ptx.add(column, ptx.add(ptx.mul(warp, _COLUMNS), ptx.mul(part, 8)))
        at = ptx.add(ptx.mul(ptx.add(first, row), self.F), column)
        bytes_at = ptx.mul(ptx.wide(at), 2)
        sources = [self._layer(ref, index_ref, i) for i, ref in enumerate((up_ref, gate_ref))]
        sources = [ptx.add(base, bytes_at) for base in sources]
        of_a = ptx.wide(ptx.add(ptx.mul(row, self.F), column))
        of_a = ptx.add(ptx.address(a_ref), ptx.mul(of_a, 2))
        target = None
        if self.dtype is not None and not self.rounds:
            target = ptx.add(ptx.address(outs[0]), bytes_at)

        shared = ptx.address(smem)
        held = ptx.add(shared, (self.warps * _ROWS * (self.R + 1) + _ROWS) * 4)
        held = ptx.add(held, ptx.mul(thread, 16))
        sums, most = self._along(sources, of_a, target, held)
        self._store_low(sums, shared, thread, row, part, warp, low_ref, rank, first)
        if self.rounds:
            behind = ptx.add(shared, self.warps * _ROWS * self.R * 4)
            most = self._largest(most, behind, warp, row, part)
            self._store_rounded(held, most, ptx.add(ptx.address(outs[0]), ptx.wide(at)))
            there = ptx.mul(ptx.wide(ptx.add(first, row)), 4)
            with ptx.when(ptx.less(ptx.add(ptx.mul(ptx.add(rank, warp), 4), part), 1)):
                unit = arith.divf(most, ptx.real(448.0))
                ptx.asm("st.global.f32 [$0], $1;", [ptx.add(ptx.address(outs[1]), there), unit])
            ptx.cluster_barrier()  # nobody leaves while its shared memory is read

    def _layer(self, ref, index_ref, i: int):
        """Where a layer of a stack starts."""
        layer = ptx.load_word(ptx.add(ptx.address(index_ref), 4 * i))
        return ptx.add(ptx.address(ref), ptx.mul(ptx.wide(layer), self.M * self.F * 2))

    def _along(self, sources, of_a, target, held):
        """All columns of this thread, h stored or held: sums [R / 8] of the narrow product, and the
        largest magnitude.
        """
        stride = self.warps * _COLUMNS * 2  # bytes

        def load(step):
            """Words of up and gate, and of a [R / 8]."""
            of_h = [ptx.load_words(source, step * stride) for source in sources]
            ranks = range(0, self.R, 8)
            return of_h, [ptx.load_words(of_a, step * stride + n * self.F * 2) for n in ranks]

        ahead = [load(step) for step in range(min(_AHEAD, self.steps))]
        sums = [[ptx.real(0.0)] * 4 for _ in range(self.R // 8)]
        most, zero = ptx.const(0), ptx.const(0)
        for step in range(self.steps):
            (up, gate), bs = ahead.pop(0)
            if step + _AHEAD < self.steps:
                ahead.append(load(step + _AHEAD))
            values = [
                arith.mulf(of_up, arith.mulf(of_gate, sigmoid_of(of_gate)))
                for pair in zip(up, gate, strict=True)
                for of_up, of_gate in zip(*map(ptx.bfloats, pair), strict=True)
            ]
            words = bfloat16s(values)
            if target is not None:
                text = f"st.global.v4.u32 [$0+{step * stride}], {{$1,$2,$3,$4}};"
                ptx.asm(text, [target, *words])
            if self.rounds:
                text = f"st.shared.v4.u32 [$0+{step * self._held_stride}], {{$1,$2,$3,$4}};"
                ptx.asm(text, [held, *words])
                for word in words:
                    most = ptx.larger_pair(word, most)
            for n, b in enumerate(bs):
                for j in (0, 2):
                    rows = [words[j], zero, words[j + 1], zero]
                    sums[n] = ptx.mma_16x8x16(sums[n], rows, b[j : j + 2])
        return sums, functools.reduce(arith.maximumf, ptx.bfloats(most))

    @property
    def _held_stride(self) -> int:
        """Bytes of a step of all threads."""
        return self.warps * 32 * 16

    def _store_low(self, sums, shared, thread, row, part, warp, low_ref, rank, first) -> None:
        """Summed over the warps of the block, through shared memory."""
        size = _ROWS * self.R * 4  # bytes of a warp
        at = ptx.add(ptx.mul(row, self.R * 4), ptx.mul(part, 8))
        at = ptx.add(ptx.add(shared, ptx.mul(warp, size)), at)
        for n, (left, right, *_) in enumerate(sums):
            ptx.asm(f"st.shared.v2.f32 [$0+{32 * n}], {{$1,$2}};", [at, left, right])
        ptx.barrier()
        with ptx.when(ptx.less(thread, _ROWS * self.R)):
            source = ptx.add(shared, ptx.mul(thread, 4))
            loads = [
                ptx.asm(f"ld.shared.f32 $0, [$1+{w * size}];", [source], [ptx.f32()])
                for w in range(self.warps)
            ]
            place = ptx.add(ptx.mul(rank, self.M), first)
            place = ptx.wide(ptx.add(ptx.mul(place, self.R), thread))
            to = ptx.add(ptx.address(low_ref), ptx.mul(place, 4))
            ptx.asm("st.global.f32 [$0], $1;", [to, ptx.total(loads)])

    def _largest(self, most, shared, warp, row, part):
        """Of this thread's row: over the lanes, warps and blocks that have some of it."""
        for distance in (1, 2):
            most = arith.maximumf(most, ptx.swap(most, distance))
        own, all_warps = ptx.mul(row, 4), ptx.add(shared, self.warps * _ROWS * 4)
        with ptx.when(ptx.less(part, 1)):
            at = ptx.add(ptx.add(shared, own), ptx.mul(warp, _ROWS * 4))
            ptx.asm("st.shared.f32 [$0], $1;", [at, most])
        ptx.barrier()
        for w in range(self.warps):
            at = ptx.add(ptx.add(shared, own), w * _ROWS * 4)
            most = arith.maximumf(most, ptx.asm("ld.shared.f32 $0, [$1];", [at], [ptx.f32()]))
        with ptx.when(ptx.less(ptx.add(ptx.mul(warp, 4), part), 1)):
            ptx.asm("st.shared.f32 [$0], $1;", [ptx.add(all_warps, own), most])
        ptx.cluster_barrier()
        for r in range(self.across):
            there = ptx.load_remote(ptx.add(all_warps, own), ptx.const(r))
            most = arith.maximumf(most, there)
        return arith.maximumf(most, ptx.real(1e-30))

    def _store_rounded(self, held, most, at) -> None:
        factor = arith.divf(ptx.real(448.0), most)
        for step in range(self.steps):
            words = ptx.load_shared(held, step * self._held_stride)
            values = [arith.mulf(x, factor) for word in words for x in ptx.bfloats(word)]
            text = f"st.global.v2.u32 [$0+{step * self.warps * _COLUMNS}], {{$1,$2}};"
            ptx.asm(text, [at, *e4m3s(values[:4]), *e4m3s(values[4:])])
