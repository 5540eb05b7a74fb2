"""Mosaic GPU body that brings one layer of packed bfloat16 weights back into rows.

Of a block of 16 rows and 32 inputs, two units as packing.py has them, lane (row, part) holds 16
bytes each: in both, four inputs of `row` and the same four of `row + 8`. Together these are eight
neighbours of each row, which it stores as they are, so nothing moves between lanes. It knows only
arrays.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from qwen_jax.kernels import _pallas_ptx as ptx
from qwen_jax.kernels.tilings import UNIT_BYTES

_WARPS = 8  # of a thread block
_TURNS = 4  # blocks of 16 x 32 of each warp, all loaded before the first is stored


def unpack(
    layer: jax.Array,  # int32 []
    codes: jax.Array,  # bfloat16 [L, N/16, K/16, 32, 8]
    in_size: int,  # I, of the K that it was padded to
) -> jax.Array:  # bfloat16 [N, I]
    """One layer; NotImplementedError for sizes that the thread blocks do not divide."""
    body = Body(N=codes.shape[1] * 16, K=codes.shape[2] * 16, I=in_size).checked()
    run = plgpu.kernel(
        ptx.of_threads(body),
        out_type=jax.ShapeDtypeStruct((body.N, body.I), jnp.bfloat16),
        grid=(body.blocks,),
        grid_names=("block",),
        num_threads=_WARPS // 4,
        thread_name="warpgroup",
        compiler_params=ptx.LANE,
    )
    return run(jnp.asarray(layer, jnp.int32).reshape(1), codes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Body:
    """Builds the code of one thread."""

    N: int
    K: int
    I: int

    @property
    def blocks(self) -> int:
        return self.N // 16 * (self.I // 32) // (_WARPS * _TURNS)

    def checked(self) -> "Body":
        if self.I > self.K or self.I % 32 or self.N // 16 * (self.I // 32) % (_WARPS * _TURNS):
            raise NotImplementedError(
                f"unpacking {self.N} x {self.I}: expected a multiple of {_WARPS * _TURNS} blocks "
                "of 16 x 32"
            )
        return self

    def __call__(self, ctx, layer_ref, codes_ref, out_ref) -> None:
        _, lane, warp = ptx.thread()
        layer = ptx.wide(ptx.load_word(ptx.address(layer_ref)))
        source = ptx.add(ptx.address(codes_ref), ptx.mul(layer, self.N * self.K * 2))
        source = ptx.add(source, ptx.wide(ptx.mul(lane, 16)))
        row, part = arith.shrui(lane, ptx.const(2)), arith.andi(lane, ptx.const(3))
        of_lane = ptx.add(ptx.mul(row, self.I * 2), ptx.mul(part, 16))
        target = ptx.add(ptx.address(out_ref), ptx.wide(of_lane))

        first = ptx.add(ptx.mul(ptx.block(), _WARPS * _TURNS), ptx.mul(warp, _TURNS))
        loaded = []
        for turn in range(_TURNS):
            number, across = ptx.add(first, turn), ptx.const(self.I // 32)
            n, b = arith.divui(number, across), arith.remui(number, across)
            at = ptx.add(
                ptx.mul(ptx.wide(n), self.K // 16 * UNIT_BYTES),
                ptx.wide(ptx.mul(b, 2 * UNIT_BYTES)),
            )
            at = ptx.add(source, at)
            units = [ptx.load_streamed(at, unit * UNIT_BYTES) for unit in range(2)]
            to = ptx.add(ptx.mul(ptx.wide(n), 16 * self.I * 2), ptx.wide(ptx.mul(b, 64)))
            loaded.append((units, ptx.add(target, to)))
        for units, to in loaded:
            for half in range(2):
                words = [word for unit in units for word in unit[2 * half : 2 * half + 2]]
                offset = half * 8 * self.I * 2
                ptx.asm(f"st.global.v4.u32 [$0+{offset}], {{$1,$2,$3,$4}};", [to, *words])
