"""Mosaic GPU body of what lies between the query/key/value product and attention, for few tokens:
sum of the product's parts, bias, rotation, logn, and keys and values written into the cache.

A vector is the query, the key or the value of one token and head. Sixteen lanes hold its 128
channels: lane l has 4 l .. 4 l + 3 and the four that are rotated against them, 64 further on.
Rounding is that of model.py and cache.py, step by step.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from qwen_jax.kernels import _pallas_ptx as ptx
from qwen_jax.kernels._pallas_codes import bfloat16s

HEAD = 128
_LANES = 16  # of a vector
_VECTORS = 128 // _LANES  # of a block


def append_tokens(
    layer: jax.Array,  # int32 [1]
    slots: jax.Array,  # int32 [R]: from S on nothing is written
    parts: jax.Array,  # float32 [P, R, 3 * N * 128]
    bias: jax.Array,  # bfloat16 [L, 3, N, 128]
    angles: jax.Array,  # float32 [R, 128]: 64 cosines, 64 sines
    factor: jax.Array,  # float32 [R], of the query
    stacks: tuple[jax.Array, ...],  # k, v [L, B, S, N, 128], and scales [L, B, S, N] with int8
) -> tuple[jax.Array, tuple[jax.Array, ...]]:  # bfloat16 [R, N, 128]; the stacks, in place
    _, B, S, N, H = stacks[0].shape
    P, R, width = parts.shape
    if H != HEAD or width != 3 * N * H or bias.dtype != jnp.bfloat16:
        raise NotImplementedError(f"parts {parts.shape} for a cache of {stacks[0].shape}")
    body = Body(B=B, S=S, N=N, R=R, P=P, quantized=len(stacks) == 4)
    mesh = plgpu.Mesh(
        grid=(body.blocks,), grid_names=("block",), num_threads=1, thread_name="warpgroup"
    )

    run = pl.kernel(
        ptx.of_threads(body),
        out_type=(jax.ShapeDtypeStruct((R, N, H), jnp.bfloat16),),
        mesh=mesh,
        compiler_params=ptx.LANE,
    )
    refs = [jax.new_ref(stack) for stack in stacks]  # aliased: written where they lie
    (q,) = run(layer, slots, parts, bias, angles, factor, *refs)
    return q, tuple(jax.freeze(ref) for ref in refs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Body:
    """Builds the code of one thread."""

    B: int
    S: int
    N: int
    R: int
    P: int
    quantized: bool

    @property
    def blocks(self) -> int:
        return -(-self.R * 3 * self.N // _VECTORS)

    def __call__(
        self, ctx, layer_ref, slots_ref, parts_ref, bias_ref, angles_ref, factor_ref, *rest
    ):
        *stack_refs, q_ref = rest
        thread, _, _ = ptx.thread()
        lane = arith.andi(thread, ptx.const(_LANES - 1))
        vector = arith.divui(thread, ptx.const(_LANES))
        vector = ptx.add(ptx.mul(ptx.block(), _VECTORS), vector)
        exists = ptx.less(vector, self.R * 3 * self.N)
        vector = arith.minui(vector, ptx.const(self.R * 3 * self.N - 1))
        row = arith.divui(vector, ptx.const(3 * self.N))
        inside = arith.remui(vector, ptx.const(3 * self.N))  # which * N + n
        which, n = arith.divui(inside, ptx.const(self.N)), arith.remui(inside, ptx.const(self.N))
        is_query, is_key = ptx.less(which, 1), ptx.less(which, 2)  # or query
        layer = ptx.load_word(ptx.address(layer_ref))
        slot = _load_row(slots_ref, row, "u32", ptx.i32())

        x = self._sums(parts_ref, bias_ref, layer, vector, inside, lane)
        turned = self._rotate(angles_ref, row, lane, x)
        x = [arith.select(is_key, a, b) for a, b in zip(turned, x, strict=True)]
        factor = ptx.rounded(_load_row(factor_ref, row, "f32", ptx.f32()))
        scaled = [ptx.rounded(arith.mulf(value, factor)) for value in x]
        x = [arith.select(is_query, a, b) for a, b in zip(scaled, x, strict=True)]

        head = ptx.add(ptx.mul(row, self.N), n)  # of the queries
        query_at = ptx.add(ptx.address(q_ref), ptx.mul(ptx.wide(head), HEAD * 2))
        cache_row = arith.divui(row, ptx.const(self.R // self.B))
        place = ptx.wide(ptx.add(ptx.mul(layer, self.B), cache_row))
        place = ptx.add(ptx.mul(place, self.S), ptx.wide(slot))
        place = ptx.add(ptx.mul(place, self.N), ptx.wide(n))  # of all heads of all slots
        keeps = arith.andi(exists, ptx.less(slot, self.S))

        def cache_at(refs, size: int):
            key, value = (ptx.add(ptx.address(ref), ptx.mul(place, size)) for ref in refs)
            return arith.select(is_key, key, value)

        if not self.quantized:
            at = arith.select(is_query, query_at, cache_at(stack_refs, HEAD * 2))
            writes = arith.andi(exists, arith.ori(is_query, keeps))
            self._store_bfloats(at, lane, x, writes)
            return
        self._store_bfloats(query_at, lane, x, arith.andi(exists, is_query))
        scale, words = self._quantize(x)
        keeps = arith.andi(keeps, ptx.less(ptx.const(0), which))
        at = ptx.add(cache_at(stack_refs[:2], HEAD), ptx.mul(ptx.wide(lane), 4))
        with ptx.when(keeps):
            ptx.asm("st.global.u32 [$0], $1;", [at, words[0]])
            ptx.asm(f"st.global.u32 [$0+{HEAD // 2}], $1;", [at, words[1]])
        with ptx.when(arith.andi(keeps, ptx.less(lane, 1))):
            ptx.store_bfloat(cache_at(stack_refs[2:], 2), scale)

    def _sums(self, parts_ref, bias_ref, layer, vector, inside, lane) -> list[ptx.Value]:
        """This lane's eight channels: sum of the parts, plus bias."""
        at = ptx.add(ptx.mul(ptx.wide(vector), HEAD * 4), ptx.wide(ptx.mul(lane, 16)))
        at = ptx.add(ptx.address(parts_ref), at)
        bias_at = ptx.wide(ptx.add(ptx.mul(layer, 3 * self.N), inside))
        bias_at = ptx.add(ptx.mul(bias_at, HEAD * 2), ptx.wide(ptx.mul(lane, 8)))
        bias_at = ptx.add(ptx.address(bias_ref), bias_at)
        part_bytes = self.R * 3 * self.N * HEAD * 4
        values = []
        for half in range(2):
            loads = [
                ptx.load_floats(ptx.add(at, p * part_bytes), half * HEAD * 2) for p in range(self.P)
            ]
            text = f"ld.global.nc.v2.u32 {{$0,$1}}, [$2+{half * HEAD}];"
            words = ptx.asm(text, [bias_at], [ptx.i32()] * 2)
            biases = [x for word in words for x in ptx.bfloats(word)]
            for e in range(4):
                total = ptx.rounded(ptx.total([load[e] for load in loads]))
                values.append(ptx.rounded(arith.addf(total, biases[e])))
        return values

    def _rotate(self, angles_ref, row, lane, x: list[ptx.Value]) -> list[ptx.Value]:
        at = ptx.add(ptx.mul(ptx.wide(row), HEAD * 4), ptx.wide(ptx.mul(lane, 16)))
        at = ptx.add(ptx.address(angles_ref), at)
        cos, sin = ptx.load_floats(at, 0), ptx.load_floats(at, HEAD * 2)
        firsts, seconds = [], []
        for first, second, c, s in zip(x[:4], x[4:], cos, sin, strict=True):
            firsts.append(arith.subf(arith.mulf(first, c), arith.mulf(second, s)))
            seconds.append(arith.addf(arith.mulf(second, c), arith.mulf(first, s)))
        return [ptx.rounded(value) for value in firsts + seconds]

    def _quantize(self, x: list[ptx.Value]) -> tuple[ptx.Value, list[ptx.Value]]:
        """quant.quantize_heads: the scale of the vector, and this lane's two words of codes."""
        most = ptx.real(0.0)
        for value in x:
            most = ptx.larger(value, most)
        for distance in (1, 2, 4, 8):
            most = arith.maximumf(most, ptx.swap(most, distance))
        scale = ptx.rounded(arith.divf(most, ptx.real(127.0)))
        empty = arith.cmpf(arith.CmpFPredicate.OEQ, scale, ptx.real(0.0))
        step = arith.select(empty, ptx.real(1.0), scale)
        words = []
        for half in (x[:4], x[4:]):
            word = None
            for e, value in enumerate(half):
                text = "cvt.rni.s32.f32 $0, $1;"
                code = ptx.asm(text, [arith.divf(value, step)], [ptx.i32()], pure=True)
                code = arith.maxsi(arith.minsi(code, ptx.const(127)), ptx.const(-127))
                byte = arith.shli(arith.andi(code, ptx.const(255)), ptx.const(8 * e))
                word = byte if word is None else arith.ori(word, byte)
            words.append(word)
        return scale, words

    def _store_bfloats(self, at, lane, x: list[ptx.Value], writes) -> None:
        at = ptx.add(at, ptx.mul(ptx.wide(lane), 8))
        with ptx.when(writes):
            for half in range(2):
                words = bfloat16s(x[4 * half : 4 * half + 4])
                ptx.asm(f"st.global.v2.u32 [$0+{half * HEAD}], {{$1,$2}};", [at, *words])


def _load_row(ref, row, kind: str, result):
    at = ptx.add(ptx.address(ref), ptx.wide(ptx.mul(row, 4)))
    return ptx.asm(f"ld.global.{kind} $0, [$1];", [at], [result])
