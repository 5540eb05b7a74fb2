"""Mosaic GPU body of the few-row product: out[split, m, n] = sum over one split of k.

Each warp streams the weights of its own rows straight into registers with 16-byte loads and feeds
them to warp-level tensor-core products; nothing in the main loop waits for another warp. Weights
lie in the order of the loads (packing.py), so a warp reads 512 bytes in a row:

    unit   512 bytes, 16 a lane: 16 weight rows x 64 inputs of 4 bits, 32 of 8 or 16 of 16
    group  the units under one scale, applied to the sums of the group and not to the weights
    chunk  8 units: one turn of the main loop

How codes become the bfloat16 operand of a 16 x 8 x 16 product: int4 and int8 by putting bits into
the mantissa of 128 and subtracting, nf4 by a table in shared memory with a column for each lane,
so that no two lanes meet in a bank. bf16 is that operand as it is loaded.

Activations are copied to shared memory once. It knows only arrays in that order.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from qwen_jax.kernels import _pallas_ptx as ptx
from qwen_jax.kernels.tilings import (
    FORMATS,
    ROW_PAD,
    TABLE_BYTES,
    UNIT_BYTES,
    UNITS,
    Format,
    Tiling,
)
from qwen_jax.quant import NF4_CODE


def split_matmul(
    layer: jax.Array,  # int32 [1]
    x: jax.Array,  # bfloat16 [M, K], M a multiple of 8 or less than 8
    codes: jax.Array,  # 16 bytes a lane: uint32 [L, N/16, units, 32, 4]; see PackedWeight
    scale: jax.Array | None,  # float16 [L, N/16, chunks, ...]; of int8 and bf16 not read
    *,
    tiling: Tiling,
    kind: str = "int4",
) -> jax.Array:  # float32 [splits, M, N]
    """One layer's partial products over each split of k; int8's without the scale of the row."""
    M, K = x.shape
    N = codes.shape[1] * 16
    fmt = FORMATS[kind]
    tiling.check(N, K, fmt.chunk)
    body = _Body(M=M, N=N, K=K, tiling=tiling, fmt=fmt)
    inputs = [layer, x, codes]
    if fmt.scale_loads:
        inputs.append(scale)
    if kind == "nf4":
        inputs.append(jnp.asarray(_nf4_pairs()))

    def kernel(*refs):
        ptx.of_threads(body)(*refs)
        if tiling.pdl:
            # Marks the launch; the wait that matters stands in the body.
            plgpu.griddepcontrol_wait()

    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((tiling.splits, M, N), jnp.float32),
        grid=(N // tiling.rows * tiling.splits,),
        grid_names=("block",),
        num_threads=tiling.warps // 4,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((body.smem_bytes // 4,), jnp.uint32)],
        compiler_params=ptx.LANE,
    )
    return run(*inputs)


def _nf4_pairs() -> np.ndarray:
    """uint32 [256]: the two values of a byte as bfloat16, the low nibble's in the low half."""
    code = NF4_CODE.astype(jnp.bfloat16).view(np.uint16).astype(np.uint32)
    return (code[None, :] | code[:, None] << 16).reshape(256)


def _from_128(low: ptx.Value, high: int | ptx.Value) -> ptx.Value:
    """Two bfloat16: `low` has bits to put into the mantissa of 128, `high` is what to subtract."""
    bits = arith.ori(low, ptx.const(0x43004300))
    high = ptx.const(high) if isinstance(high, int) else high
    return ptx.asm("sub.rn.bf16x2 $0, $1, $2;", [bits, high], [ptx.i32()], pure=True)


def _int4_operand(words: list[ptx.Value]) -> list[ptx.Value]:
    """One word of eight codes -> four pairs of code - 8: 128 + code less 136, exactly."""
    pairs = []
    for shift in (0, 4, 8, 12):
        bits = arith.shrui(words[0], ptx.const(shift)) if shift else words[0]
        pairs.append(_from_128(arith.andi(bits, ptx.const(0x000F000F)), 0x43084308))
    return pairs


def _int8_operand(words: list[ptx.Value]) -> list[ptx.Value]:
    """Two words of four codes -> four pairs: low seven bits less 128 for the sign, exactly.

    The sign is the last bit of the exponent of what is subtracted: 128 or 256.
    """
    pairs = []
    for word in words:
        for shift in (0, 8):
            bits = arith.shrui(word, ptx.const(shift)) if shift else word
            sign = arith.ori(arith.andi(bits, ptx.const(0x00800080)), ptx.const(0x43004300))
            pairs.append(_from_128(arith.andi(bits, ptx.const(0x007F007F)), sign))
    return pairs


def _nf4_operand(words: list[ptx.Value], table: ptx.Value) -> list[ptx.Value]:
    """One word of four bytes -> four pairs from this lane's column of the table."""
    pairs = []
    for shift in (-7, 1, 9, 17):
        move = arith.shli if shift < 0 else arith.shrui
        row = arith.andi(move(words[0], ptx.const(abs(shift))), ptx.const(0xFF << 7))
        pairs.append(ptx.asm("ld.shared.u32 $0, [$1];", [ptx.add(table, row)], [ptx.i32()]))
    return pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Body:
    """Builds the code of one thread; sizes are those of the whole product."""

    M: int
    N: int
    K: int
    tiling: Tiling
    fmt: Format

    @property
    def tiles(self) -> int:
        """Columns of activations in tiles of 8."""
        return -(-self.M // 8)

    @property
    def split_k(self) -> int:
        return self.K // self.tiling.splits

    @property
    def block_bytes(self) -> int:
        """Codes of 16 rows."""
        return self.K // self.fmt.unit * UNIT_BYTES

    @property
    def block_scale_bytes(self) -> int:
        return self.K // self.fmt.chunk * self.fmt.chunk_scale_bytes

    @property
    def x_stride(self) -> int:
        """Bytes from one row of activations to the next in shared memory."""
        return self.split_k * 2 + ROW_PAD

    @property
    def smem_bytes(self) -> int:
        table = TABLE_BYTES if self.fmt.kind == "nf4" else 0
        return self.x_stride * self.tiles * 8 + table

    def __call__(self, ctx, layer_ref, x_ref, codes_ref, *rest):
        *more, out_ref, smem = rest
        t = self.tiling
        thread, lane, warp = ptx.thread()
        block = ptx.block()
        split = arith.remui(block, ptx.const(t.splits))
        group = arith.divui(block, ptx.const(t.splits))
        row_block = ptx.mul(ptx.add(ptx.mul(group, t.warps), warp), t.blocks)
        text = "ld.global.nc.u32 $0, [$1];"
        layer = ptx.wide(ptx.asm(text, [ptx.address(layer_ref)], [ptx.i32()]))

        def first(ref, block_bytes, lane_offset):
            """Address of this lane's first load: layer, row block, split, lane."""
            at = ptx.add(ptx.address(ref), ptx.mul(layer, self.N // 16 * block_bytes))
            at = ptx.add(at, ptx.mul(ptx.wide(row_block), block_bytes))
            at = ptx.add(at, ptx.wide(ptx.mul(split, block_bytes // t.splits)))
            return ptx.add(at, ptx.wide(lane_offset))

        # lane = 4 * row + part: a lane reads 8 neighbouring inputs of one row at a time.
        row, part = arith.shrui(lane, ptx.const(2)), arith.andi(lane, ptx.const(3))
        code_at = first(codes_ref, self.block_bytes, ptx.mul(lane, 16))
        scale_at = code_at
        if self.fmt.scale_loads:
            scale_at = first(more[0], self.block_scale_bytes, ptx.mul(row, 16))

        # The first weights are on their way before anything waits.
        ring = [self._load_unit(code_at, u) for u in range(t.ahead)]
        scales = self._load_scales(scale_at, 0)
        if t.pdl:
            ptx.asm("griddepcontrol.wait;", [])
        x_smem = ptx.address(smem)
        self._copy_x(thread, split, x_ref, x_smem)
        table = ptx.add(x_smem, self.x_stride * self.tiles * 8)
        if self.fmt.kind == "nf4":
            self._copy_table(thread, more[1], table)
        table = ptx.add(table, ptx.mul(lane, 4))
        ptx.barrier()

        x_at = ptx.add(x_smem, ptx.add(ptx.mul(row, self.x_stride), ptx.mul(part, 16)))
        zero = ptx.real(0.0)
        sums = [[[zero] * 4 for _ in range(self.tiles)] for _ in range(t.blocks)]
        state = (code_at, scale_at, x_at, ring, scales, sums)
        chunks = self.split_k // self.fmt.chunk
        if chunks > 1:
            body = lambda _, state: self._chunk(state, table, last=False)  # noqa: E731
            state = ptx.loop(ptx.const(0), ptx.const(chunks - 1), 1, state, body)
        *_, sums = self._chunk(state, table, last=True)
        self._store(out_ref, split, row_block, row, part, sums)

    def _load_unit(self, code_at, unit: int) -> list[list[ptx.Value]]:
        """Four words of every row block."""
        offsets = [unit * UNIT_BYTES + b * self.block_bytes for b in range(self.tiling.blocks)]
        return [ptx.load_streamed(code_at, offset) for offset in offsets]

    def _load_scales(self, scale_at, chunk: int) -> list[list[ptx.Value]]:
        """Of every row block, a word for each group: the scales of rows `row` and `row + 8`."""
        scales = []
        for b in range(self.tiling.blocks):
            start = chunk * self.fmt.chunk_scale_bytes + b * self.block_scale_bytes
            loads = [
                ptx.load_streamed(scale_at, start + 128 * i) for i in range(self.fmt.scale_loads)
            ]
            scales.append([word for load in loads for word in load])
        return scales

    def _copy_x(self, thread, split, x_ref, target) -> None:
        """All threads copy this split of x, 16 bytes at a time; rows past M become zeros."""
        row_vectors = self.split_k // 8
        total = row_vectors * self.tiles * 8
        source = ptx.add(ptx.address(x_ref), ptx.wide(ptx.mul(split, self.split_k * 2)))

        def copy(index, state):
            m = arith.divui(index, ptx.const(row_vectors))
            v = arith.remui(index, ptx.const(row_vectors))
            inside = ptx.less(m, self.M)
            safe = arith.select(inside, m, ptx.const(0))
            at = ptx.add(source, ptx.wide(ptx.add(ptx.mul(safe, self.K * 2), ptx.mul(v, 16))))
            data = ptx.asm("ld.global.v4.u32 {$0,$1,$2,$3}, [$4];", [at], [ptx.i32()] * 4)
            data = [arith.select(inside, word, ptx.const(0)) for word in data]
            to = ptx.add(target, ptx.add(ptx.mul(m, self.x_stride), ptx.mul(v, 16)))
            ptx.asm("st.shared.v4.u32 [$0], {$1,$2,$3,$4};", [to, *data])
            return state

        ptx.loop(thread, ptx.const(total), self.tiling.warps * 32, (), copy)

    def _copy_table(self, thread, table_ref, target) -> None:
        source = ptx.address(table_ref)

        def copy(index, state):
            at = ptx.add(source, ptx.wide(ptx.mul(arith.shrui(index, ptx.const(5)), 4)))
            entry = ptx.asm("ld.global.nc.u32 $0, [$1];", [at], [ptx.i32()])
            to = ptx.add(target, ptx.mul(index, 4))
            ptx.asm("st.shared.u32 [$0], $1;", [to, entry])
            return state

        ptx.loop(thread, ptx.const(256 * 32), self.tiling.warps * 32, (), copy)

    def _operand(self, words: list[ptx.Value], product: int, table) -> list[ptx.Value]:
        """The registers of the weights of one product of a unit."""
        if self.fmt.kind == "bf16":
            # Both pairs of row `row`, then both of `row + 8`; the product wants the rows in turns.
            return [words[0], words[2], words[1], words[3]]
        if self.fmt.kind == "int8":
            return _int8_operand(words[2 * product : 2 * product + 2])
        if self.fmt.kind == "nf4":
            return _nf4_operand(words[product : product + 1], table)
        return _int4_operand(words[product : product + 1])

    def _chunk(self, state, table, last: bool):
        """Eight units: multiplies what is loaded and, unless it is the last, loads ahead."""
        t, fmt = self.tiling, self.fmt
        code_at, scale_at, x_at, ring, scales, sums = state
        ring, sums = list(ring), [[list(s) for s in block] for block in sums]
        next_scales = scales if last else self._load_scales(scale_at, 1)
        zero = ptx.real(0.0)
        products = fmt.unit // 16  # of a unit
        for u in range(UNITS):
            if fmt.scale_loads and u % fmt.group_units == 0:
                partial = [[[zero] * 4 for _ in range(self.tiles)] for _ in range(t.blocks)]
            target = partial if fmt.scale_loads else sums
            words = ring[u % t.ahead]
            if not last or u + t.ahead < UNITS:
                ring[u % t.ahead] = self._load_unit(code_at, u + t.ahead)
            for p in range(products):
                index = u * products + p  # in the chunk
                if index % 2 == 0:  # a load has the activations of two products: 32 inputs
                    xs = [
                        ptx.load_shared(x_at, tile * 8 * self.x_stride + index * 32)
                        for tile in range(self.tiles)
                    ]
                for b in range(t.blocks):
                    a = self._operand(words[b], p, table)
                    for tile in range(self.tiles):
                        pair = xs[tile][2 * (index % 2) : 2 * (index % 2) + 2]
                        target[b][tile] = ptx.mma_16x8x16(target[b][tile], a, pair)
            if fmt.scale_loads and u % fmt.group_units == fmt.group_units - 1:
                self._scale_group([s[u // fmt.group_units] for s in scales], partial, sums)
        if not last:
            code_at = ptx.add(code_at, UNITS * UNIT_BYTES)
            scale_at = ptx.add(scale_at, fmt.chunk_scale_bytes)
            x_at = ptx.add(x_at, fmt.chunk * 2)
        return code_at, scale_at, x_at, ring, next_scales, sums

    def _scale_group(self, words: list[ptx.Value], partial, sums) -> None:
        """sums += scale of the row times partial, for the group that is complete."""
        for b, word in enumerate(words):
            low, high = ptx.halves(word)
            for tile in range(self.tiles):
                sums[b][tile] = [
                    ptx.fma(part, row_scale, total)
                    for part, row_scale, total in zip(
                        partial[b][tile], (low, low, high, high), sums[b][tile], strict=True
                    )
                ]

    def _store(self, out_ref, split, row_block, row, part, sums) -> None:
        """sums[block][tile] = rows row, row + 8 x activations 2 part, 2 part + 1."""
        base = ptx.address(out_ref)
        n = ptx.add(ptx.mul(row_block, 16), row)
        for tile in range(self.tiles):
            for j in range(2):
                m = ptx.add(ptx.mul(part, 2), tile * 8 + j)
                at = ptx.add(ptx.mul(ptx.add(ptx.mul(split, self.M), m), self.N), n)
                at = ptx.add(base, ptx.mul(ptx.wide(at), 4))
                with ptx.when(ptx.less(m, self.M)):
                    for b in range(self.tiling.blocks):
                        for i in range(2):
                            text = f"st.global.f32 [$0+{(b * 16 + i * 8) * 4}], $1;"
                            ptx.asm(text, [at, sums[b][tile][2 * i + j]])
