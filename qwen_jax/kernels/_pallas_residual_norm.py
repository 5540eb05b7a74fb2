"""Mosaic GPU body of residual addition and RMS norm: a cluster of thread blocks has one row.

A thread keeps four neighbours of the row in registers from the sum to the result; only the sums of
squares travel, through the shared memory of the cluster.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from qwen_jax.kernels import _pallas_ptx as ptx


def residual_norm(
    layer: jax.Array,  # int32 [1]
    x: jax.Array,  # bfloat16 [M, D]
    parts: jax.Array,  # float32 [P, M, D]
    weight: jax.Array,  # bfloat16 [L, D]
    eps: float,
) -> tuple[jax.Array, jax.Array]:  # bfloat16 [M, D] both
    P, M, D = parts.shape
    # Four elements a thread, whole warpgroups, at most 8 blocks a cluster.
    splits = next((s for s in (8, 4, 2, 1) if D % (512 * s) == 0), 0)
    if splits == 0 or D // (4 * splits) > 1024 or x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"residual_norm of {x.dtype} rows of {D}")
    threads = D // (4 * splits)
    body = _Body(P=P, M=M, D=D, splits=splits, threads=threads, eps=eps)

    row = jax.ShapeDtypeStruct((M, D), jnp.bfloat16)
    run = plgpu.kernel(
        ptx.of_threads(body),
        out_type=(row, row),
        grid=(M,),
        grid_names=("row",),
        cluster=(splits,) if splits > 1 else (),
        cluster_names=("split",) if splits > 1 else (),
        num_threads=threads // 128,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((64,), jnp.float32)],
        compiler_params=ptx.LANE,
    )
    return run(layer, x, parts, weight)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Body:
    """Builds the code of one thread."""

    P: int
    M: int
    D: int
    splits: int
    threads: int
    eps: float

    def __call__(self, ctx, layer_ref, x_ref, parts_ref, weight_ref, sum_ref, norm_ref, smem):
        thread, *_ = ptx.thread()
        block = ptx.block()
        row = arith.divui(block, ptx.const(self.splits))
        rank = arith.remui(block, ptx.const(self.splits))
        column = ptx.mul(ptx.add(ptx.mul(rank, self.threads), thread), 4)
        element = ptx.wide(ptx.add(ptx.mul(row, self.D), column))
        layer = ptx.load_word(ptx.address(layer_ref))
        at = ptx.wide(ptx.add(ptx.mul(layer, self.D), column))
        weight = _load_bfloats(ptx.add(ptx.address(weight_ref), ptx.mul(at, 2)))
        old = _load_bfloats(ptx.add(ptx.address(x_ref), ptx.mul(element, 2)))
        parts_at = ptx.add(ptx.address(parts_ref), ptx.mul(element, 4))
        loads = [ptx.load_floats(parts_at, p * self.M * self.D * 4) for p in range(self.P)]
        new = []
        for i in range(4):
            total = ptx.total([load[i] for load in loads])
            new.append(ptx.rounded(arith.addf(old[i], ptx.rounded(total))))

        square = ptx.real(0.0)
        for value in new:
            square = ptx.fma(value, value, square)
        total = self._sum(square, thread, smem)
        mean = arith.divf(total, ptx.real(float(self.D)))
        scale = ptx.inverse_root(arith.addf(mean, ptx.real(self.eps)))
        normed = [ptx.rounded(arith.mulf(value, scale)) for value in new]
        normed = [arith.mulf(value, w) for value, w in zip(normed, weight, strict=True)]
        for ref, values in ((sum_ref, new), (norm_ref, normed)):
            at = ptx.add(ptx.address(ref), ptx.mul(element, 2))
            text = (
                "{.reg .b32 a, b; cvt.rn.bf16x2.f32 a, $2, $1; cvt.rn.bf16x2.f32 b, $4, $3; "
                "st.global.v2.b32 [$0], {a, b};}"
            )
            ptx.asm(text, [at, *values])
        if self.splits > 1:
            ptx.cluster_barrier()  # nobody leaves while its shared memory is read

    def _sum(self, value, thread, smem):
        """The sum of `value` over all threads of the cluster, in each of them."""
        (total,) = ptx.over_block(arith.addf, [value], self.threads // 32, smem)
        if self.splits == 1:
            return total
        shared = ptx.add(ptx.address(smem), 128)  # behind the warps' sums
        with ptx.when(arith.cmpi(arith.CmpIPredicate.eq, thread, ptx.const(0))):
            ptx.asm("st.shared.f32 [$0], $1;", [shared, total])
        ptx.cluster_barrier()
        return ptx.total([ptx.load_remote(shared, ptx.const(r)) for r in range(self.splits)])


def _load_bfloats(at):
    words = ptx.asm("ld.global.v2.u32 {$0,$1}, [$2];", [at], [ptx.i32()] * 2)
    return [value for word in words for value in ptx.bfloats(word)]
