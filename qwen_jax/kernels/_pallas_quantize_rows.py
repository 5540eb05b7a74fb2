"""Mosaic GPU body that rounds bfloat16 rows to e4m3: a thread block holds one row in registers
between the search for its largest value and the rounding.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from qwen_jax.kernels import _pallas_ptx as ptx
from qwen_jax.kernels._pallas_codes import e4m3s

_THREADS = 256
_PER_LOAD = 8  # values of 16 bytes


def quantize_rows(
    x: jax.Array,  # bfloat16 [R, K]
) -> tuple[jax.Array, jax.Array]:  # e4m3 [R, K], float32 [R]
    R, K = x.shape
    if x.dtype != jnp.bfloat16 or K % (_THREADS * _PER_LOAD) or K > 32768:
        raise NotImplementedError(f"quantize_rows of {x.dtype} rows of {K}")
    body = Body(K=K)

    run = plgpu.kernel(
        ptx.of_threads(body),
        out_type=(
            jax.ShapeDtypeStruct((R, K), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((R,), jnp.float32),
        ),
        grid=(R,),
        grid_names=("row",),
        num_threads=_THREADS // 128,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((_THREADS // 32,), jnp.float32)],
        compiler_params=ptx.LANE,
    )
    return run(x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Body:
    """Builds the code of one thread."""

    K: int

    def __call__(self, ctx, x_ref, codes_ref, unit_ref, smem):
        thread, *_ = ptx.thread()
        row = ptx.block()
        loads = self.K // (_THREADS * _PER_LOAD)
        first = ptx.add(ptx.mul(ptx.wide(row), self.K), ptx.wide(ptx.mul(thread, _PER_LOAD)))
        at = ptx.add(ptx.address(x_ref), ptx.mul(first, 2))
        stride = _THREADS * _PER_LOAD
        words = [ptx.load_streamed(at, i * stride * 2) for i in range(loads)]
        most = ptx.real(0.0)
        for load in words:
            for word in load:
                for value in ptx.bfloats(word):
                    most = ptx.larger(value, most)
        (most,) = ptx.over_block(arith.maximumf, [most], _THREADS // 32, smem)
        most = arith.maximumf(most, ptx.real(1e-30))
        unit = arith.divf(most, ptx.real(448.0))
        factor = arith.divf(ptx.real(448.0), most)
        out = ptx.add(ptx.address(codes_ref), first)
        for i, load in enumerate(words):
            values = [arith.mulf(x, factor) for word in load for x in ptx.bfloats(word)]
            text = f"st.global.v2.u32 [$0+{i * stride}], {{$1,$2}};"
            ptx.asm(text, [out, *e4m3s(values[:4]), *e4m3s(values[4:])])
        with ptx.when(ptx.less(thread, 1)):
            at = ptx.add(ptx.address(unit_ref), ptx.mul(ptx.wide(row), 4))
            ptx.asm("st.global.f32 [$0], $1;", [at, unit])
