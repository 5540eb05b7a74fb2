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

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl  # noqa: F401
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf

UNIT = 64  # inputs of one 16-byte load a lane
UNIT_BYTES = 512
UNITS = 8  # units of a chunk
CHUNK = UNIT * UNITS
# Keeps the eight rows of the activations in different banks of shared memory.
_ROW_PAD = 64  # bytes


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


def _i32():
    return ir.IntegerType.get_signless(32)


def _i64():
    return ir.IntegerType.get_signless(64)


def _f32():
    return ir.F32Type.get()


def _c(value: int) -> ir.Value:
    return arith.constant(_i32(), value)


def _add(a: ir.Value, b: ir.Value) -> ir.Value:
    return arith.addi(a, b)


def _mul(a: ir.Value, b: int) -> ir.Value:
    return arith.muli(a, arith.constant(a.type, b))


def _wide(a: ir.Value) -> ir.Value:
    return arith.extui(_i64(), a)


def _address(ref: ir.Value) -> ir.Value:
    pointer = mgpu.utils.memref_ptr(ref)
    kind = _i32() if pointer.type != llvm.PointerType.get() else _i64()
    return llvm.ptrtoint(kind, pointer)


def _asm(text: str, args, results=(), constraints: str = "", effects: bool = True):
    """Inline PTX with one or several results of one type."""
    code = {_f32(): "f", _i32(): "r", _i64(): "l"}
    outs = [f"={code[t]}" for t in results]
    ins = [code[a.type] for a in args]
    if not results:
        kind = ir.Type.parse("!llvm.void")
    elif len(results) == 1:
        kind = results[0]
    else:
        kind = llvm.StructType.get_literal(list(results))
    value = llvm.inline_asm(
        kind, list(args), text, ",".join(outs + ins), has_side_effects=effects
    )
    if len(results) <= 1:
        return value
    return [llvm.extractvalue(t, value, [i]) for i, t in enumerate(results)]


def _load_streamed(address: ir.Value, offset: int) -> list[ir.Value]:
    """16 bytes a lane that are read once: past L1, so that x and scales stay there."""
    text = f"ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {{$0,$1,$2,$3}}, [$4+{offset}];"
    return _asm(text, [address], [_i32()] * 4)


def _load_shared(address: ir.Value, offset: int) -> list[ir.Value]:
    return _asm(f"ld.shared.v4.u32 {{$0,$1,$2,$3}}, [$4+{offset}];", [address], [_i32()] * 4)


def _mma(sums: list[ir.Value], a: list[ir.Value], b: list[ir.Value]) -> list[ir.Value]:
    text = (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )
    return _asm(text, [*a, *b, *sums], [_f32()] * 4, effects=False)


def _int4_pairs(word: ir.Value) -> list[ir.Value]:
    """Eight codes of a word -> four bfloat16 pairs (code - 8).

    A code put into the mantissa of 128 reads 128 + code; subtracting 136 is exact.
    """
    pairs = []
    for shift in (0, 4, 8, 12):
        bits = arith.shrui(word, _c(shift)) if shift else word
        bits = arith.ori(arith.andi(bits, _c(0x000F000F)), _c(0x43004300))
        pairs.append(_asm("sub.rn.bf16x2 $0, $1, $2;", [bits, _c(0x43084308)], [_i32()], effects=False))
    return pairs


def _halves(word: ir.Value) -> list[ir.Value]:
    """Two float16 of a word -> two float32."""
    text = (
        "{.reg .b16 lo, hi; mov.b32 {lo, hi}, $2; cvt.f32.f16 $0, lo; cvt.f32.f16 $1, hi;}"
    )
    return _asm(text, [word], [_f32()] * 2, effects=False)


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
        thread = mgpu.utils.thread_idx()
        lane = arith.andi(thread, _c(31))
        warp = mgpu.utils.warp_idx(sync=True)
        block = arith.index_cast(_i32(), gpu.block_id(gpu.Dimension.x))
        split = arith.remui(block, _c(t.splits))
        row_block = _mul(_add(_mul(arith.divui(block, _c(t.splits)), t.warps), warp), t.blocks)
        layer = _wide(_asm("ld.global.nc.u32 $0, [$1];", [_address(layer_ref)], [_i32()]))

        # Byte addresses of this lane's first load in each of its row blocks.
        block_bytes = self.K // UNIT * UNIT_BYTES
        code_at = _add(_address(codes_ref), _mul(layer, self.N // 16 * block_bytes))
        code_at = _add(code_at, _mul(_wide(row_block), block_bytes))
        code_at = _add(code_at, _wide(_mul(split, self.split_k // UNIT * UNIT_BYTES)))
        code_at = _add(code_at, _wide(_mul(lane, 16)))
        scale_bytes = self.K // CHUNK * 128
        scale_at = _add(_address(scale_ref), _mul(layer, self.N // 16 * scale_bytes))
        scale_at = _add(scale_at, _mul(_wide(row_block), scale_bytes))
        scale_at = _add(scale_at, _wide(_mul(split, self.split_k // CHUNK * 128)))
        scale_at = _add(scale_at, _wide(_mul(arith.shrui(lane, _c(2)), 16)))

        # The first weights are on their way before anything waits.
        ring = [
            [_load_streamed(code_at, b * block_bytes + u * UNIT_BYTES) for b in range(t.blocks)]
            for u in range(t.ahead)
        ]
        scales = [_load_streamed(scale_at, b * scale_bytes) for b in range(t.blocks)]
        if t.pdl:
            _asm("griddepcontrol.wait;", [])
        self._copy_x(thread, split, x_ref, x_smem)
        gpu.barrier()

        # lane = 4 * row + part: a lane reads 8 neighbouring inputs of one row at a time.
        row, part = arith.shrui(lane, _c(2)), arith.andi(lane, _c(3))
        x_at = _add(_address(x_smem), _add(_mul(row, self.x_stride), _mul(part, 16)))
        zero = arith.constant(_f32(), 0.0)
        sums = [[[zero] * 4 for _ in range(self.tiles)] for _ in range(t.blocks)]

        state = (code_at, scale_at, x_at, ring, scales, sums)
        chunks = self.split_k // CHUNK
        if chunks > 1:
            state = self._loop(chunks - 1, state)
        *_, sums = self._chunk(state, last=True)
        self._store(out_ref, split, row_block, row, part, sums)

    def _copy_x(self, thread, split, x_ref, x_smem) -> None:
        """All threads copy this split of x, 16 bytes at a time; rows past M become zeros."""
        threads = self.tiling.warps * 32
        row_vectors = self.split_k // 8
        total = row_vectors * self.tiles * 8
        source, target = _address(x_ref), _address(x_smem)
        source = _add(source, _wide(_mul(split, self.split_k * 2)))
        loop = scf.ForOp(thread, _c(total), _c(threads))
        with ir.InsertionPoint(loop.body):
            index = loop.induction_variable
            m, v = arith.divui(index, _c(row_vectors)), arith.remui(index, _c(row_vectors))
            inside = arith.cmpi(arith.CmpIPredicate.ult, m, _c(self.M))
            safe = arith.select(inside, m, _c(0))
            at = _add(source, _wide(_add(_mul(safe, self.K * 2), _mul(v, 16))))
            data = _asm("ld.global.v4.u32 {$0,$1,$2,$3}, [$4];", [at], [_i32()] * 4)
            data = [arith.select(inside, d, _c(0)) for d in data]
            to = _add(target, _add(_mul(m, self.x_stride), _mul(v, 16)))
            _asm("st.shared.v4.u32 [$0], {$1,$2,$3,$4};", [to, *data])
            scf.yield_([])

    def _loop(self, count: int, state):
        """`count` chunks with loads ahead of each."""
        leaves, tree = jax.tree.flatten(state)
        loop = scf.ForOp(_c(0), _c(count), _c(1), leaves)
        with ir.InsertionPoint(loop.body):
            state = jax.tree.unflatten(tree, list(loop.inner_iter_args))
            scf.yield_(jax.tree.leaves(self._chunk(state, last=False)))
        return jax.tree.unflatten(tree, list(loop.results))

    def _chunk(self, state, last: bool):
        """Eight units: multiplies what is loaded and, unless it is the last, loads ahead."""
        t = self.tiling
        code_at, scale_at, x_at, ring, scales, sums = state
        ring, sums = list(ring), [[list(s) for s in block] for block in sums]
        block_bytes, scale_bytes = self.K // UNIT * UNIT_BYTES, self.K // CHUNK * 128
        next_scales = scales
        if not last:
            next_scales = [
                _load_streamed(scale_at, 128 + b * scale_bytes) for b in range(t.blocks)
            ]
        zero = arith.constant(_f32(), 0.0)
        for u in range(UNITS):
            if u % 2 == 0:
                partial = [[[zero] * 4 for _ in range(self.tiles)] for _ in range(t.blocks)]
            words = ring[u % t.ahead]
            if not last or u + t.ahead < UNITS:
                ring[u % t.ahead] = [
                    _load_streamed(code_at, (u + t.ahead) * UNIT_BYTES + b * block_bytes)
                    for b in range(t.blocks)
                ]
            for half in range(2):  # 32 inputs: two products
                xs = [
                    _load_shared(x_at, tile * 8 * self.x_stride + u * 128 + half * 64)
                    for tile in range(self.tiles)
                ]
                for p in range(2):
                    for b in range(t.blocks):
                        a = _int4_pairs(words[b][2 * half + p])
                        for tile in range(self.tiles):
                            pair = xs[tile][2 * p : 2 * p + 2]
                            partial[b][tile] = _mma(partial[b][tile], a, pair)
            if u % 2:
                for b in range(t.blocks):
                    low, high = _halves(scales[b][u // 2])
                    for tile in range(self.tiles):
                        sums[b][tile] = [
                            _asm(
                                "fma.rn.f32 $0, $1, $2, $3;",
                                [partial[b][tile][i], (low, low, high, high)[i], sums[b][tile][i]],
                                [_f32()],
                                effects=False,
                            )
                            for i in range(4)
                        ]
        if not last:
            code_at = _add(code_at, arith.constant(_i64(), UNITS * UNIT_BYTES))
            scale_at = _add(scale_at, arith.constant(_i64(), 128))
            x_at = _add(x_at, _c(CHUNK * 2))
        return code_at, scale_at, x_at, ring, next_scales, sums

    def _store(self, out_ref, split, row_block, row, part, sums) -> None:
        """sums[block][tile] = rows row, row + 8 x activations 2 part, 2 part + 1."""
        base = _address(out_ref)
        n = _add(_mul(row_block, 16), row)
        for tile in range(self.tiles):
            for j in range(2):
                m = _add(_mul(part, 2), _c(tile * 8 + j))
                at = _add(_mul(_add(_mul(split, self.M), m), self.N), n)
                at = _add(base, _mul(_wide(at), 4))
                inside = arith.cmpi(arith.CmpIPredicate.ult, m, _c(self.M))
                with mgpu.utils.when(inside):
                    for b in range(self.tiling.blocks):
                        for i in range(2):
                            text = f"st.global.f32 [$0+{(b * 16 + i * 8) * 4}], $1;"
                            _asm(text, [at, sums[b][tile][2 * i + j]])
