"""Mosaic GPU body of attention for one query a row over the filled part of the cache.

A cluster of thread blocks shares one (row, head); every warp takes each so-many-th step of eight
slots. In a warp four lanes hold one slot, 32 of its 128 channels each, so a dot product needs two
exchanges between lanes and the weighted sum of values none: each group of four lanes keeps its own
running maximum, and all of them are joined once, at the end: lanes, then warps, then blocks.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from qwen_jax.kernels import _pallas_ptx as ptx

HEAD = 128
_SLOTS = 8  # of a step
_NEVER = -1e30  # below every score; finite, so that differences of it are too


def decode_attention(
    layer: jax.Array,  # int32 [1]
    visible: jax.Array,  # int32 [R]: slots from 0 on that each query sees, at least 1
    q: jax.Array,  # bfloat16 [R, N, 128]; query r reads cache row r // (R / B)
    k: jax.Array,  # bfloat16 or int8 [L, B, S, N, 128]
    v: jax.Array,  # as k
    k_scale: jax.Array | None = None,  # bfloat16 [L, B, S, N] with int8
    v_scale: jax.Array | None = None,
    *,
    warps: int = 8,
    splits: int = 2,  # thread blocks of a cluster, at most 8
) -> jax.Array:  # bfloat16 [R, N, 128]
    """softmax(q k^T / sqrt(128)) v over the visible slots, in float32."""
    _, B, S, N, H = k.shape
    if H != HEAD or q.shape[0] % B:
        raise NotImplementedError(f"heads of {H}, {q.shape[0]} queries over {B} rows")
    quantized = k_scale is not None
    body = Body(
        B=B, S=S, N=N, R=q.shape[0], quantized=quantized, warps=warps, splits=splits
    )  # fmt: skip
    scales = (k_scale, v_scale) if quantized else ()

    run = plgpu.kernel(
        ptx.of_threads(body),
        out_type=jax.ShapeDtypeStruct(q.shape, jnp.bfloat16),
        grid=(q.shape[0] * N,),
        grid_names=("head",),
        cluster=(splits,) if splits > 1 else (),
        cluster_names=("split",) if splits > 1 else (),
        num_threads=warps // 4,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM(((warps + 1) * PART,), jnp.float32)],
        compiler_params=ptx.LANE,
    )
    return run(layer, visible, q, k, v, *scales)


PART = HEAD + 2  # floats of a partial result: weighted sum, maximum, sum of weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Who a thread is, and where its data lie."""

    thread: ptx.Value
    lane: ptx.Value
    warp: ptx.Value
    rank: ptx.Value  # of the block in its cluster
    head: ptx.Value  # row * N + n
    row: ptx.Value
    n: ptx.Value
    layer: ptx.Value
    visible: ptx.Value  # slots that this row sees
    slot_group: ptx.Value  # 0..7: which slot of a step
    part: ptx.Value  # 0..3: which channels of it
    stacks: list[ptx.Value]  # addresses of this lane's channels of slot 0, of keys and values
    scales: list[ptx.Value]  # addresses of the scales of slot 0


def scaled(q: list[ptx.Value]) -> list[ptx.Value]:
    """Times log2(e) / sqrt(128), so that 2^score is the weight."""
    factor = ptx.real(math.log2(math.e) / math.sqrt(HEAD))
    return [arith.mulf(x, factor) for x in q]


def nothing():
    """Running maximum, sum of weights and weighted sum before the first slot."""
    zero = ptx.real(0.0)
    return ptx.real(_NEVER), zero, [zero] * 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Body:
    """Builds the code of one thread."""

    B: int
    S: int
    N: int
    R: int
    quantized: bool
    warps: int
    splits: int

    @property
    def loads(self) -> int:
        """16-byte loads a lane for one key or value."""
        return 2 if self.quantized else 4

    @property
    def slot_bytes(self) -> int:
        return self.N * HEAD * (1 if self.quantized else 2)

    @property
    def per_load(self) -> int:
        """Channels of one 16-byte load; load i of a lane starts at channel (4 i + part) of them."""
        return 16 if self.quantized else 8

    def __call__(self, ctx, layer_ref, visible_ref, q_ref, k_ref, v_ref, *rest):
        *scale_refs, out_ref, smem = rest
        place = self.place(layer_ref, visible_ref, (k_ref, v_ref), scale_refs)
        q = self._load_query(q_ref, place)
        running = self.stream(place, q, place.visible, nothing())
        self.join(smem, out_ref, place, running)

    def place(self, layer_ref, visible_ref, stack_refs, scale_refs) -> Place:
        thread, lane, warp = ptx.thread()
        block = ptx.block()
        rank = arith.remui(block, ptx.const(self.splits))
        head = arith.divui(block, ptx.const(self.splits))
        row, n = arith.divui(head, ptx.const(self.N)), arith.remui(head, ptx.const(self.N))
        layer = ptx.load_word(ptx.address(layer_ref))
        at = ptx.add(ptx.address(visible_ref), ptx.wide(ptx.mul(row, 4)))
        visible = ptx.load_word(at)
        part = arith.andi(lane, ptx.const(3))
        cache_row = arith.divui(row, ptx.const(self.R // self.B))
        first = ptx.add(ptx.mul(layer, self.B), cache_row)  # row of the stack [L * B]
        base = ptx.mul(ptx.wide(first), self.S * self.slot_bytes)
        inside = ptx.add(ptx.mul(n, HEAD * (1 if self.quantized else 2)), ptx.mul(part, 16))
        base = ptx.add(base, ptx.wide(inside))
        scale_base = ptx.add(ptx.mul(ptx.wide(first), self.S * self.N * 2), ptx.wide(ptx.mul(n, 2)))
        return Place(
            thread=thread, lane=lane, warp=warp, rank=rank, head=head, row=row, n=n, layer=layer,
            visible=visible, slot_group=arith.shrui(lane, ptx.const(2)), part=part,
            stacks=[ptx.add(ptx.address(ref), base) for ref in stack_refs],
            scales=[ptx.add(ptx.address(ref), scale_base) for ref in scale_refs],
        )  # fmt: skip

    def stream(self, place: Place, q, count, running):
        """Attends to the first `count` slots, each warp to its share of the steps."""
        steps = arith.divui(ptx.add(count, _SLOTS - 1), ptx.const(_SLOTS))
        stride = self.warps * self.splits
        start = ptx.add(ptx.mul(place.rank, self.warps), place.warp)
        last = arith.maxsi(ptx.add(count, -1), ptx.const(0))

        def load(step):
            """Keys, values and scales of this lane's slot; past the end, of the last one."""
            slot = ptx.add(ptx.mul(step, _SLOTS), place.slot_group)
            slot = arith.minui(slot, last)
            offset = ptx.mul(ptx.wide(slot), self.slot_bytes)
            data = [
                [ptx.load_streamed(at, 64 * i) for i in range(self.loads)]
                for at in (ptx.add(stack, offset) for stack in place.stacks)
            ]
            offset = ptx.mul(ptx.wide(slot), self.N * 2)
            return data, [_load_bfloat(ptx.add(scale, offset)) for scale in place.scales]

        def step(index, state):
            (data, scales), running = state
            ahead = load(ptx.add(index, stride))
            slot = ptx.add(ptx.mul(index, _SLOTS), place.slot_group)
            keys, values = (self._unpack(loads) for loads in data)
            running = self.attend(q, keys, values, scales, ptx.less(slot, count), running)
            return ahead, running

        _, running = ptx.loop(start, steps, stride, (load(start), running), step)
        return running

    def _load_query(self, q_ref, place: Place):
        at = ptx.add(
            ptx.mul(ptx.wide(place.head), HEAD * 2),
            ptx.wide(ptx.mul(place.part, self.per_load * 2)),
        )
        at = ptx.add(ptx.address(q_ref), at)
        values = []
        for i in range(self.loads):
            for j in range(self.per_load // 8):
                offset = i * self.per_load * 8 + j * 16
                text = f"ld.global.v4.u32 {{$0,$1,$2,$3}}, [$4+{offset}];"
                for word in ptx.asm(text, [at], [ptx.i32()] * 4):
                    values += ptx.bfloats(word)
        return scaled(values)

    def _unpack(self, loads):
        unpack = ptx.int8s if self.quantized else ptx.bfloats
        return [x for words in loads for word in words for x in unpack(word)]

    def attend(self, q, keys, values, scales, seen, running):
        """One slot a group of four lanes: score, then the online softmax."""
        most, total, sums = running
        parts = [ptx.real(0.0)] * 4  # four chains, so that one sum does not wait for the other
        for i, (a, b) in enumerate(zip(q, keys, strict=True)):
            parts[i % 4] = ptx.fma(a, b, parts[i % 4])
        score = arith.addf(arith.addf(parts[0], parts[1]), arith.addf(parts[2], parts[3]))
        for distance in (1, 2):
            score = arith.addf(score, ptx.swap(score, distance))
        if scales:
            score = arith.mulf(score, scales[0])
        score = arith.select(seen, score, ptx.real(_NEVER))
        new_most = arith.maximumf(most, score)
        shrink = ptx.exp2(arith.subf(most, new_most))
        weight = ptx.exp2(arith.subf(score, new_most))
        weight = arith.select(seen, weight, ptx.real(0.0))
        total = ptx.fma(total, shrink, weight)
        if scales:
            weight = arith.mulf(weight, scales[1])
        sums = [
            ptx.fma(weight, x, arith.mulf(s, shrink)) for x, s in zip(values, sums, strict=True)
        ]
        return new_most, total, sums

    def join(self, smem, out_ref, place: Place, running):
        """Lanes, warps and blocks each bring (maximum, total, sums); the last writes the result."""
        head, rank, thread, lane, warp = (
            place.head, place.rank, place.thread, place.lane, place.warp,
        )  # fmt: skip
        most, total, sums = running
        joined = most
        for distance in (4, 8, 16):
            joined = arith.maximumf(joined, ptx.swap(joined, distance))
        shrink = ptx.exp2(arith.subf(most, joined))
        values = [arith.mulf(x, shrink) for x in (total, *sums)]
        for distance in (4, 8, 16):
            values = [arith.addf(x, ptx.swap(x, distance)) for x in values]
        total, *sums = values

        base = ptx.address(smem)
        own = ptx.add(base, ptx.mul(warp, PART * 4))
        part = arith.andi(lane, ptx.const(3))
        per_load = self.per_load
        with ptx.when(ptx.less(lane, 4)):
            at = ptx.add(own, ptx.mul(part, per_load * 4))
            for i in range(0, 32, 2):
                channel = i // per_load * 4 * per_load + i % per_load
                text = f"st.shared.v2.f32 [$0+{channel * 4}], {{$1,$2}};"
                ptx.asm(text, [at, sums[i], sums[i + 1]])
        with ptx.when(arith.cmpi(arith.CmpIPredicate.eq, lane, ptx.const(0))):
            text = f"st.shared.v2.f32 [$0+{HEAD * 4}], {{$1,$2}};"
            ptx.asm(text, [own, joined, total])
        ptx.barrier()

        channel = arith.andi(thread, ptx.const(HEAD - 1))
        read = lambda at, i: ptx.asm(f"ld.shared.f32 $0, [$1+{i}];", [at], [ptx.f32()])  # noqa: E731
        here = ptx.add(base, ptx.mul(channel, 4))
        most, total, value = _merge(
            [
                (
                    read(base, (w * PART + HEAD) * 4),
                    read(base, (w * PART + HEAD + 1) * 4),
                    read(here, w * PART * 4),
                )
                for w in range(self.warps)
            ]
        )
        writes = ptx.less(thread, HEAD)
        if self.splits > 1:
            block = self.warps * PART * 4  # this block's own partial result
            with ptx.when(writes):
                ptx.asm(f"st.shared.f32 [$0+{block}], $1;", [here, value])
                # All threads of the block hold the same maximum and total.
                ptx.asm(
                    f"st.shared.v2.f32 [$0+{block + HEAD * 4}], {{$1,$2}};", [base, most, total]
                )
            ptx.cluster_barrier()
            ranks = [ptx.const(r) for r in range(self.splits)]
            at = [ptx.add(base, block + HEAD * 4), ptx.add(base, block + HEAD * 4 + 4)]
            at.append(ptx.add(here, block))
            most, total, value = _merge([[ptx.load_remote(a, r) for a in at] for r in ranks])
            writes = arith.andi(writes, arith.cmpi(arith.CmpIPredicate.eq, rank, ptx.const(0)))
        value = arith.divf(value, total)
        at = ptx.add(ptx.mul(ptx.wide(head), HEAD * 2), ptx.wide(ptx.mul(channel, 2)))
        at = ptx.add(ptx.address(out_ref), at)
        with ptx.when(writes):
            ptx.store_bfloat(at, value)
        if self.splits > 1:
            ptx.cluster_barrier()  # nobody leaves while its shared memory is read


def _load_bfloat(at):
    text = "{.reg .b16 h, z; mov.b16 z, 0; ld.global.nc.b16 h, [$1]; mov.b32 $0, {z, h};}"
    return ptx.asm(text, [at], [ptx.f32()])


def _merge(parts):
    """(maximum, total, value) of several parts -> of all of them."""
    most = parts[0][0]
    for other, _, _ in parts[1:]:
        most = arith.maximumf(most, other)
    total = value = ptx.real(0.0)
    for part_most, part_total, part_value in parts:
        shrink = ptx.exp2(arith.subf(part_most, most))
        total = ptx.fma(part_total, shrink, total)
        value = ptx.fma(part_value, shrink, value)
    return most, total, value
