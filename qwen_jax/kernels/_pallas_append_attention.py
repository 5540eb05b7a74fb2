"""Mosaic GPU body of everything between two products of an attention block, for one new token a
row: sum of the product's parts, bias, rotation, writing key and value into the cache, attention.

The block of a (row, head) makes that head's query from the parts, and its first warp the new key
and value, which it attends to from registers and writes behind the filled slots; nothing reads them
from memory in this launch. Rounding is that of model.py, step by step.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from qwen_jax.kernels import _pallas_ptx as ptx
from qwen_jax.kernels._pallas_decode_attention import HEAD, PART, Body, nothing, scaled


def append_attention(
    layer: jax.Array,  # int32 [1]
    visible: jax.Array,  # int32 [B]: filled slots and the new one; past S nothing is written
    parts: jax.Array,  # float32 [P, B, 3 * N * 128]
    bias: jax.Array,  # bfloat16 [L, 3, N, 128]
    angles: jax.Array,  # float32 [B, 128]: 64 cosines, 64 sines
    logn: jax.Array,  # float32 [B]: factor of the query
    stacks: tuple[jax.Array, ...],  # k, v [L, B, S, N, 128], and scales [L, B, S, N] with int8
    *,
    warps: int,
    splits: int,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:  # bfloat16 [B, N, 128]; the stacks, written in place
    _, B, S, N, H = stacks[0].shape
    if H != HEAD or parts.shape[1:] != (B, 3 * N * H):
        raise NotImplementedError(f"parts {parts.shape} for a cache of {stacks[0].shape}")
    quantized = len(stacks) == 4
    body = AppendBody(
        B=B, S=S, N=N, R=B, P=parts.shape[0], quantized=quantized, warps=warps, splits=splits
    )
    mesh = plgpu.Mesh(
        grid=(B * N,), grid_names=("head",), num_threads=warps // 4, thread_name="warpgroup",
        cluster=(splits,) if splits > 1 else (),
        cluster_names=("split",) if splits > 1 else (),
    )  # fmt: skip

    def kernel(*refs):
        def scoped(smem):
            every = (*refs, smem)
            plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(every))(body)(*every)

        memory = plgpu.SMEM(((warps + 1) * PART,), jnp.float32)
        pl.run_scoped(scoped, memory, collective_axes="warpgroup")

    run = pl.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct((B, N, H), jnp.bfloat16),),
        mesh=mesh,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    refs = [jax.new_ref(stack) for stack in stacks]  # aliased: written where they lie
    (out,) = run(layer, visible, parts, bias, angles, logn, *refs)
    return out, tuple(jax.freeze(ref) for ref in refs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AppendBody(Body):
    """Builds the code of one thread."""

    P: int

    def __call__(
        self, ctx, layer_ref, visible_ref, parts_ref, bias_ref, angles_ref, logn_ref, *rest
    ):
        *stack_refs, out_ref, smem = rest
        place = self.place(layer_ref, visible_ref, stack_refs[:2], stack_refs[2:])
        inputs = (place, parts_ref, bias_ref)
        q = self._rotate(place, self._vector(*inputs, 0), angles_ref)
        at = ptx.add(ptx.address(logn_ref), ptx.wide(ptx.mul(place.row, 4)))
        factor = ptx.rounded(ptx.asm("ld.global.f32 $0, [$1];", [at], [ptx.f32()]))
        q = scaled([ptx.rounded(arith.mulf(x, factor)) for x in q])
        filled = ptx.add(place.visible, -1)
        running = self.stream(place, q, filled, nothing())

        def own_slot(_, running):
            k = self._rotate(place, self._vector(*inputs, 1), angles_ref)
            v = self._vector(*inputs, 2)
            writes = arith.andi(ptx.less(place.slot_group, 1), ptx.less(filled, self.S))
            k, k_scale = self._write(place, 0, k, filled, writes)
            v, v_scale = self._write(place, 1, v, filled, writes)
            scales = [k_scale, v_scale] if self.quantized else []
            return self.attend(q, k, v, scales, ptx.less(place.slot_group, 1), running)

        # One warp of the cluster: a loop of one turn there and of none elsewhere.
        share = ptx.add(ptx.mul(place.rank, self.warps), place.warp)
        first = arith.minui(share, ptx.const(1))
        running = ptx.loop(first, ptx.const(1), 1, running, own_slot)
        self.join(smem, out_ref, place, running)

    def _channel(self, i: int) -> int:
        """Of load i; this lane's starts `part` loads later."""
        return 4 * i * self.per_load

    def _vector(self, place, parts_ref, bias_ref, which: int) -> list[ptx.Value]:
        """This lane's 32 channels of query, key or value (0, 1, 2): sum of parts, plus bias."""
        lane_channel = ptx.add(ptx.mul(place.n, HEAD), ptx.mul(place.part, self.per_load))
        column = ptx.add(lane_channel, which * self.N * HEAD)
        width = 3 * self.N * HEAD
        at = ptx.wide(ptx.add(ptx.mul(place.row, width), column))
        at = ptx.add(ptx.address(parts_ref), ptx.mul(at, 4))
        bias_at = ptx.wide(ptx.add(ptx.mul(place.layer, width), column))
        bias_at = ptx.add(ptx.address(bias_ref), ptx.mul(bias_at, 2))
        values = []
        for i in range(self.loads):
            for j in range(0, self.per_load, 4):
                channel = self._channel(i) + j
                loads = [
                    _load_floats(at, (p * self.B * width + channel) * 4) for p in range(self.P)
                ]
                text = f"ld.global.nc.v2.u32 {{$0,$1}}, [$2+{channel * 2}];"
                words = ptx.asm(text, [bias_at], [ptx.i32()] * 2)
                biases = [x for word in words for x in ptx.bfloats(word)]
                for e in range(4):
                    total = ptx.total([load[e] for load in loads])
                    values.append(ptx.rounded(arith.addf(ptx.rounded(total), biases[e])))
        return values

    def _rotate(self, place, x: list[ptx.Value], angles_ref) -> list[ptx.Value]:
        """First half of the head against the second: channels c and c + 64 are in one lane."""
        at = ptx.add(ptx.mul(place.row, HEAD), ptx.mul(place.part, self.per_load))
        at = ptx.add(ptx.address(angles_ref), ptx.mul(ptx.wide(at), 4))
        firsts, seconds = [], []
        for i in range(self.loads // 2):
            for j in range(0, self.per_load, 4):
                channel = self._channel(i) + j
                cos = _load_floats(at, channel * 4)
                sin = _load_floats(at, (channel + HEAD // 2) * 4)
                for e in range(4):
                    index = i * self.per_load + j + e
                    first, second = x[index], x[index + 16]
                    a = arith.subf(arith.mulf(first, cos[e]), arith.mulf(second, sin[e]))
                    b = arith.addf(arith.mulf(second, cos[e]), arith.mulf(first, sin[e]))
                    firsts.append(ptx.rounded(a))
                    seconds.append(ptx.rounded(b))
        return firsts + seconds

    def _write(self, place, which: int, x: list[ptx.Value], slot, writes):
        """Stores the new key or value; returns it as attention will read it, and its scale."""
        at = ptx.add(place.stacks[which], ptx.mul(ptx.wide(slot), self.slot_bytes))
        if not self.quantized:
            words = [
                ptx.asm("cvt.rn.bf16x2.f32 $0, $2, $1;", x[i : i + 2], [ptx.i32()], pure=True)
                for i in range(0, 32, 2)
            ]
            self._store_words(at, words, writes)
            return x, None
        most = ptx.real(0.0)
        for value in x:
            text = "{.reg .f32 a; abs.f32 a, $1; max.f32 $0, a, $2;}"
            most = ptx.asm(text, [value, most], [ptx.f32()], pure=True)
        for distance in (1, 2):
            most = arith.maximumf(most, ptx.swap(most, distance))
        scale = ptx.rounded(arith.divf(most, ptx.real(127.0)))
        empty = arith.cmpf(arith.CmpFPredicate.OEQ, scale, ptx.real(0.0))
        step = arith.select(empty, ptx.real(1.0), scale)
        codes = []
        for value in x:
            text = "cvt.rni.s32.f32 $0, $1;"
            code = ptx.asm(text, [arith.divf(value, step)], [ptx.i32()], pure=True)
            codes.append(arith.maxsi(arith.minsi(code, ptx.const(127)), ptx.const(-127)))
        words = []
        for i in range(0, 32, 4):
            word = arith.andi(codes[i], ptx.const(255))
            for e in range(1, 4):
                byte = arith.andi(codes[i + e], ptx.const(255))
                word = arith.ori(word, arith.shli(byte, ptx.const(8 * e)))
            words.append(word)
        self._store_words(at, words, writes)
        at = ptx.add(place.scales[which], ptx.mul(ptx.wide(slot), self.N * 2))
        with ptx.when(arith.andi(writes, ptx.less(place.part, 1))):
            text = "{.reg .b16 h; cvt.rn.bf16.f32 h, $1; st.global.b16 [$0], h;}"
            ptx.asm(text, [at, scale])
        return [arith.sitofp(ptx.f32(), code) for code in codes], scale

    def _store_words(self, at, words, writes) -> None:
        with ptx.when(writes):
            for i in range(self.loads):
                text = f"st.global.v4.u32 [$0+{64 * i}], {{$1,$2,$3,$4}};"
                ptx.asm(text, [at, *words[4 * i : 4 * i + 4]])


def _load_floats(at, offset: int):
    return ptx.asm(f"ld.global.nc.v4.f32 {{$0,$1,$2,$3}}, [$4+{offset}];", [at], [ptx.f32()] * 4)
