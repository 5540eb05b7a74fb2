"""Mosaic GPU body of the few-row 4-bit product: out[split, m, n] = sum over one split of k.

Each warp streams the weights of its own rows straight into registers with 16-byte loads and feeds
them to warp-level tensor-core products; nothing in the main loop waits for another warp. Weights
lie in the order of the loads (decode_matmul.pack_int4), so a warp reads 512 bytes in a row:

    unit   16 weight rows x 64 inputs = 32 lanes x 16 bytes = 4 products of 16 x 8 x 16
    group  2 units: 128 inputs under one scale, applied to the sums of the group, not to weights
    chunk  8 units: the scales of 4 groups and 2 x 8 rows are one 16-byte load

Activations are copied to shared memory once. It knows only arrays in that order.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from qwen_jax.kernels import _pallas_ptx as ptx

UNIT = 64  # inputs of one 16-byte load a lane
UNIT_BYTES = 512
UNITS = 8  # units of a chunk
CHUNK = UNIT * UNITS
# Keeps the eight rows of the activations in different banks of shared memory.
_ROW_PAD = 64  # bytes
_SMEM = 100 * 1024  # of a block, so that two fit a multiprocessor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a product is cut: rows are in blocks of 16."""

    blocks: int  # row blocks that a warp handles side by side
    warps: int  # warps of a thread block, a multiple of 4, each with its own rows
    splits: int  # parts of k, each by its own thread blocks
    ahead: int  # units loaded ahead, at most UNITS
    pdl: bool = False  # start while the kernel before still runs

    @property
    def rows(self) -> int:
        return 16 * self.blocks * self.warps

    def check(self, N: int, K: int) -> None:
        if N % self.rows or K % (CHUNK * self.splits) or self.warps % 4 or UNITS % self.ahead:
            raise NotImplementedError(f"{self} does not divide a {N} x {K} weight")


# (N, K) of a layer of Qwen-72B -> (rows of activations up to, tiling); benchmarks/qmatmul.py.
_TUNED: dict[tuple[int, int], list[tuple[int, Tiling]]] = {
    (24576, 8192): [
        (8, Tiling(blocks=3, warps=16, splits=4, ahead=4)),
        (16, Tiling(blocks=2, warps=12, splits=4, ahead=4)),
    ],
    (49152, 8192): [
        (8, Tiling(blocks=3, warps=16, splits=4, ahead=4)),
        (16, Tiling(blocks=2, warps=12, splits=4, ahead=4)),
    ],
    (8192, 24576): [
        (8, Tiling(blocks=2, warps=16, splits=8, ahead=4)),
        (16, Tiling(blocks=2, warps=8, splits=8, ahead=4)),
    ],
    (8192, 8192): [(16, Tiling(blocks=1, warps=16, splits=4, ahead=8))],
}


def tiling_for(M: int, N: int, K: int) -> Tiling:
    """The tuned tiling of a known shape, else one that divides it and fills the card."""
    for limit, tiling in _TUNED.get((N, K), []):
        if limit >= M:
            return tiling
    return min(_tilings(M, N, K), key=lambda t: _waste(t, N))


def _tilings(M: int, N: int, K: int) -> list[Tiling]:
    tilings = []
    for blocks, warps, splits in itertools.product((1, 2, 3), (4, 8, 12, 16), range(1, 17)):
        fits = (K // splits * 2 + _ROW_PAD) * -(-M // 8) * 8 <= _SMEM
        small = blocks * -(-M // 8) <= 4  # accumulators stay in registers
        if N % (16 * blocks * warps) == 0 and K % (CHUNK * splits) == 0 and fits and small:
            tilings.append(Tiling(blocks=blocks, warps=warps, splits=splits, ahead=4))
    if not tilings:
        raise NotImplementedError(f"no tiling divides a {N} x {K} weight for {M} rows")
    return tilings


def _waste(t: Tiling, N: int) -> float:
    """How far the warps are from the 16 that each of 132 multiprocessors should have."""
    return abs(N // t.rows * t.splits * t.warps / (132 * 16) - 1) + 0.02 * t.splits


def split_matmul(
    layer: jax.Array,  # int32 [1]
    x: jax.Array,  # bfloat16 [M, K], M a multiple of 8 or less than 8
    codes: jax.Array,  # uint32 [L, N/16, K/64, 32, 4]
    scale: jax.Array,  # float16 [L, N/16, K/512, 8, 8]
    *,
    tiling: Tiling,
) -> jax.Array:  # float32 [splits, M, N]
    """One layer's partial products over each split of k."""
    M, K = x.shape
    N = codes.shape[1] * 16
    tiling.check(N, K)
    body = _Body(M=M, N=N, K=K, tiling=tiling)

    def kernel(layer_ref, x_ref, codes_ref, scale_ref, out_ref, x_smem):
        args = (layer_ref, x_ref, codes_ref, scale_ref, out_ref, x_smem)
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(args))(body)(*args)
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
        scratch_types={"x_smem": plgpu.SMEM((body.smem_bytes // 4,), jnp.uint32)},
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return run(layer, x, codes, scale)


def _int4_pairs(word: ptx.Value) -> list[ptx.Value]:
    """Eight codes of a word -> four bfloat16 pairs (code - 8).

    A code put into the mantissa of 128 reads 128 + code; subtracting 136 is exact.
    """
    pairs = []
    for shift in (0, 4, 8, 12):
        bits = arith.shrui(word, ptx.const(shift)) if shift else word
        bits = arith.ori(arith.andi(bits, ptx.const(0x000F000F)), ptx.const(0x43004300))
        pairs.append(
            ptx.asm(
                "sub.rn.bf16x2 $0, $1, $2;", [bits, ptx.const(0x43084308)], [ptx.i32()], pure=True
            )
        )
    return pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Body:
    """Builds the code of one thread; sizes are those of the whole product."""

    M: int
    N: int
    K: int
    tiling: Tiling

    @property
    def tiles(self) -> int:
        """Columns of activations in tiles of 8."""
        return -(-self.M // 8)

    @property
    def split_k(self) -> int:
        return self.K // self.tiling.splits

    @property
    def x_stride(self) -> int:
        """Bytes from one row of activations to the next in shared memory."""
        return self.split_k * 2 + _ROW_PAD

    @property
    def smem_bytes(self) -> int:
        return self.x_stride * self.tiles * 8

    def __call__(self, ctx, layer_ref, x_ref, codes_ref, scale_ref, out_ref, x_smem):
        t = self.tiling
        thread, lane, warp = ptx.thread()
        block = ptx.block()
        split = arith.remui(block, ptx.const(t.splits))
        row_block = ptx.mul(
            ptx.add(ptx.mul(arith.divui(block, ptx.const(t.splits)), t.warps), warp), t.blocks
        )
        layer = ptx.wide(
            ptx.asm("ld.global.nc.u32 $0, [$1];", [ptx.address(layer_ref)], [ptx.i32()])
        )

        # Byte addresses of this lane's first load in each of its row blocks.
        block_bytes = self.K // UNIT * UNIT_BYTES
        code_at = ptx.add(ptx.address(codes_ref), ptx.mul(layer, self.N // 16 * block_bytes))
        code_at = ptx.add(code_at, ptx.mul(ptx.wide(row_block), block_bytes))
        code_at = ptx.add(code_at, ptx.wide(ptx.mul(split, self.split_k // UNIT * UNIT_BYTES)))
        code_at = ptx.add(code_at, ptx.wide(ptx.mul(lane, 16)))
        scale_bytes = self.K // CHUNK * 128
        scale_at = ptx.add(ptx.address(scale_ref), ptx.mul(layer, self.N // 16 * scale_bytes))
        scale_at = ptx.add(scale_at, ptx.mul(ptx.wide(row_block), scale_bytes))
        scale_at = ptx.add(scale_at, ptx.wide(ptx.mul(split, self.split_k // CHUNK * 128)))
        scale_at = ptx.add(scale_at, ptx.wide(ptx.mul(arith.shrui(lane, ptx.const(2)), 16)))

        # The first weights are on their way before anything waits.
        ring = [
            [ptx.load_streamed(code_at, b * block_bytes + u * UNIT_BYTES) for b in range(t.blocks)]
            for u in range(t.ahead)
        ]
        scales = [ptx.load_streamed(scale_at, b * scale_bytes) for b in range(t.blocks)]
        if t.pdl:
            ptx.asm("griddepcontrol.wait;", [])
        self._copy_x(thread, split, x_ref, x_smem)
        ptx.barrier()

        # lane = 4 * row + part: a lane reads 8 neighbouring inputs of one row at a time.
        row, part = arith.shrui(lane, ptx.const(2)), arith.andi(lane, ptx.const(3))
        x_at = ptx.add(ptx.address(x_smem), ptx.add(ptx.mul(row, self.x_stride), ptx.mul(part, 16)))
        zero = ptx.real(0.0)
        sums = [[[zero] * 4 for _ in range(self.tiles)] for _ in range(t.blocks)]

        state = (code_at, scale_at, x_at, ring, scales, sums)
        chunks = self.split_k // CHUNK
        if chunks > 1:
            body = lambda _, state: self._chunk(state, last=False)  # noqa: E731
            state = ptx.loop(ptx.const(0), ptx.const(chunks - 1), 1, state, body)
        *_, sums = self._chunk(state, last=True)
        self._store(out_ref, split, row_block, row, part, sums)

    def _copy_x(self, thread, split, x_ref, x_smem) -> None:
        """All threads copy this split of x, 16 bytes at a time; rows past M become zeros."""
        threads = self.tiling.warps * 32
        row_vectors = self.split_k // 8
        total = row_vectors * self.tiles * 8
        source, target = ptx.address(x_ref), ptx.address(x_smem)
        source = ptx.add(source, ptx.wide(ptx.mul(split, self.split_k * 2)))

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

        ptx.loop(thread, ptx.const(total), threads, (), copy)

    def _chunk(self, state, last: bool):
        """Eight units: multiplies what is loaded and, unless it is the last, loads ahead."""
        t = self.tiling
        code_at, scale_at, x_at, ring, scales, sums = state
        ring, sums = list(ring), [[list(s) for s in block] for block in sums]
        block_bytes, scale_bytes = self.K // UNIT * UNIT_BYTES, self.K // CHUNK * 128
        next_scales = scales
        if not last:
            next_scales = [
                ptx.load_streamed(scale_at, 128 + b * scale_bytes) for b in range(t.blocks)
            ]
        zero = ptx.real(0.0)
        for u in range(UNITS):
            if u % 2 == 0:
                partial = [[[zero] * 4 for _ in range(self.tiles)] for _ in range(t.blocks)]
            words = ring[u % t.ahead]
            if not last or u + t.ahead < UNITS:
                ring[u % t.ahead] = [
                    ptx.load_streamed(code_at, (u + t.ahead) * UNIT_BYTES + b * block_bytes)
                    for b in range(t.blocks)
                ]
            for half in range(2):  # 32 inputs: two products
                xs = [
                    ptx.load_shared(x_at, tile * 8 * self.x_stride + u * 128 + half * 64)
                    for tile in range(self.tiles)
                ]
                for p in range(2):
                    for b in range(t.blocks):
                        a = _int4_pairs(words[b][2 * half + p])
                        for tile in range(self.tiles):
                            pair = xs[tile][2 * p : 2 * p + 2]
                            partial[b][tile] = ptx.mma_16x8x16(partial[b][tile], a, pair)
            if u % 2:
                for b in range(t.blocks):
                    low, high = ptx.halves(scales[b][u // 2])
                    for tile in range(self.tiles):
                        sums[b][tile] = [
                            ptx.fma(partial[b][tile][i], row_scale, sums[b][tile][i])
                            for i, row_scale in enumerate((low, low, high, high))
                        ]
        if not last:
            code_at = ptx.add(code_at, UNITS * UNIT_BYTES)
            scale_at = ptx.add(scale_at, 128)
            x_at = ptx.add(x_at, CHUNK * 2)
        return code_at, scale_at, x_at, ring, next_scales, sums

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
