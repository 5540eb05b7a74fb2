"""Mosaic GPU bodies that write one layer of a stack of 4-bit weights as bfloat16 or e4m3.

Both move little more than the packed bytes in and the values out. What keeps them near the speed
of memory is few instructions a value: a code becomes its float32 value by one warp shuffle, because
lane l of each warp holds the value of code l mod 16 and a shuffle looks only at five bits of the
index, the fifth of which then does not matter: shift, shuffle, multiply, half a conversion. nf4 and
int4 differ in that table and in how a scale is read.

    straight   [O, I]: the layer as one flat run of codes, 2048 a warp at a time
    turned     [I, O]: tiles of 16 rows a warp x 256 inputs, through shared memory

Values are code times scale in float32, rounded once, as in quant.dequantize. This file knows only
arrays: no GEMM, no model.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from qwen_jax.kernels import _pallas_ptx as ptx
from qwen_jax.quant import DYNAMIC_CODE, INT4_ZERO_POINT, NF4_CODE, NF4_SCALE_BLOCK, QTensor

CODES = {"nf4": NF4_CODE, "int4": np.arange(16, dtype=np.float32) - INT4_ZERO_POINT}
GROUPS = {"nf4": 64, "int4": 128}
CHUNK = 2048  # codes that a warp turns into values at a time, 64 a lane
TILE_INPUTS = 256  # of a turned tile: 8 a lane
TILE_ROWS = 16  # of each warp of a turned tile: a 16-byte store of e4m3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the work is cut into thread blocks."""

    warps: int = 8  # of a thread block, a multiple of 4
    turns: int = 1  # straight: chunks of a warp, the next one loaded ahead
    along_inputs: bool = False  # turned: neighbouring blocks are neighbours along I, not O


def straight(
    layer: jax.Array,  # int32 []
    q: QTensor,  # stack [L, *O, I]
    dtype: jnp.dtype,  # bfloat16 or float8_e4m3fn
    factor: jax.Array | None = None,  # float32 []: every value is multiplied by it
    *,
    tiling: Tiling | None = None,
) -> jax.Array:  # [O, I]
    """One layer as it lies."""
    body = check(q, dtype, False, tiling)
    return _call(body, layer, q, factor, jax.ShapeDtypeStruct((body.O, body.I), dtype))


def turned(
    layer: jax.Array,  # int32 []
    q: QTensor,  # stack [L, *O, I]
    dtype: jnp.dtype,  # float8_e4m3fn
    factor: jax.Array | None = None,  # float32 []
    *,
    tiling: Tiling | None = None,
) -> jax.Array:  # [I, O]
    """One layer transposed in memory."""
    body = check(q, dtype, True, tiling)
    return _call(body, layer, q, factor, jax.ShapeDtypeStruct((body.I, body.O), dtype))


def check(
    q: QTensor, dtype: jnp.dtype, turned: bool, tiling: Tiling | None = None
) -> "Straight | Turned":
    """The body that serves, or NotImplementedError with the reason that none does."""
    dtype = jnp.dtype(dtype)
    if dtype not in ((jnp.float8_e4m3fn,) if turned else (jnp.bfloat16, jnp.float8_e4m3fn)):
        raise NotImplementedError(f"{dtype} {'turned' if turned else 'straight'} is not written")
    if turned:
        return Turned(**sizes(q), tiling=tiling or Tiling()).checked()
    return Straight(**sizes(q), tiling=tiling or Tiling(), bytes=dtype.itemsize).checked()


def sizes(q: QTensor) -> dict:
    if q.kind not in GROUPS:
        raise NotImplementedError(f"weights of kind {q.kind}: the kernel reads {list(GROUPS)}")
    out, I = q.shape[1:-1], q.shape[-1]
    if q.scale.shape[-1] * GROUPS[q.kind] != I:
        raise NotImplementedError(
            f"{q.kind} with {q.scale.shape[-1]} scales for {I} inputs: the kernel needs one for "
            f"each {GROUPS[q.kind]}"
        )
    return {"kind": q.kind, "O": int(np.prod(out)), "I": I}


def operands(layer: jax.Array, q: QTensor, factor: jax.Array | None) -> list[jax.Array]:
    """What a body reads, in its order."""
    table = np.tile(CODES[q.kind], 2)  # [32]: one for each lane
    inputs = [layer.astype(jnp.int32).reshape(1), q.data, jnp.asarray(table), q.scale]
    if q.kind == "nf4":
        inputs += [q.scale_absmax, q.scale_offset, jnp.asarray(DYNAMIC_CODE)]
    if factor is not None:
        inputs.append(factor.astype(jnp.float32).reshape(1))
    return inputs


def _call(body, layer, q: QTensor, factor, out: jax.ShapeDtypeStruct) -> jax.Array:
    def kernel(*refs):
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))(body)(*refs)

    run = plgpu.kernel(
        kernel,
        out_type=out,
        grid=(body.blocks,),
        grid_names=("block",),
        num_threads=body.tiling.warps // 4,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((body.smem_bytes // 4,), jnp.uint32)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    return run(*operands(layer, q, factor))


def _load(kind: str, at: ptx.Value, offset: int = 0) -> ptx.Value:
    """One number that is read only: "u32", "f32", or "u8" widened."""
    result = ptx.f32() if kind == "f32" else ptx.i32()
    return ptx.asm(f"ld.global.nc.{kind} $0, [$1+{offset}];", [at], [result])


def _bit(operation: str, a: ptx.Value, number: int) -> ptx.Value:
    """shr.u32, and.b32 or xor.b32 with a constant."""
    return ptx.asm(f"{operation} $0, $1, {number};", [a], [ptx.i32()], pure=True)


def _times(a: ptx.Value, b: ptx.Value) -> ptx.Value:
    return ptx.asm("mul.rn.f32 $0, $1, $2;", [a, b], [ptx.f32()], pure=True)


def _of_lane(value: ptx.Value, lane: ptx.Value) -> ptx.Value:
    """A float32 of another lane; only the low five bits of its number count."""
    text = "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;"
    return ptx.asm(text, [value, lane], [ptx.f32()], pure=True)


def _bfloat16s(values: list[ptx.Value]) -> list[ptx.Value]:
    """Two values a word, the first in the low half."""
    text = "cvt.rn.bf16x2.f32 $0, $2, $1;"
    pairs = zip(values[::2], values[1::2], strict=True)
    return [ptx.asm(text, list(pair), [ptx.i32()], pure=True) for pair in pairs]


def _e4m3s(values: list[ptx.Value]) -> list[ptx.Value]:
    """Four values a word, the first in the low byte; what is too large becomes 448."""
    text = (
        "{.reg .b16 lo, hi; cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1; "
        "cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3; mov.b32 $0, {lo, hi};}"
    )
    fours = [values[i : i + 4] for i in range(0, len(values), 4)]
    return [ptx.asm(text, four, [ptx.i32()], pure=True) for four in fours]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Layer:
    """Where the arrays of the layer start, and what each thread keeps in registers."""

    kind: str
    data: ptx.Value
    scale: ptx.Value
    code: ptx.Value  # float32: the value of code `lane % 16`
    factor: ptx.Value | None
    absmax: ptx.Value | None = None  # nf4 only, as the next two
    offset: ptx.Value | None = None  # float32
    dynamic: ptx.Value | None = None

    @classmethod
    def of(cls, body, refs, lane: ptx.Value) -> "_Layer":
        layer_ref, data, table, scale, *rest = (ptx.address(ref) for ref in refs)
        layer = ptx.wide(_load("u32", layer_ref))
        groups = body.O * body.I // GROUPS[body.kind]
        own = {}
        if body.kind == "nf4":
            absmax, offset, dynamic, *rest = rest
            blocks = -(-groups // NF4_SCALE_BLOCK)
            own = {
                "absmax": ptx.add(absmax, ptx.mul(layer, blocks * 4)),
                "offset": _load("f32", ptx.add(offset, ptx.mul(layer, 4))),
                "dynamic": dynamic,
            }
        return cls(
            kind=body.kind,
            data=ptx.add(data, ptx.mul(layer, body.O * body.I // 2)),
            scale=ptx.add(scale, ptx.mul(layer, groups * (1 if own else 2))),
            code=_load("f32", ptx.add(table, ptx.wide(ptx.mul(lane, 4)))),
            factor=_load("f32", rest[0]) if rest else None,
            **own,
        )

    def load_scale(self, index: ptx.Value) -> list[ptx.Value]:
        """What is stored for the scale of a group, counted from the start of the layer."""
        if self.kind == "int4":
            text = "{.reg .b16 h; ld.global.nc.b16 h, [$1]; cvt.f32.f16 $0, h;}"
            at = ptx.add(self.scale, ptx.wide(ptx.mul(index, 2)))
            return [ptx.asm(text, [at], [ptx.f32()])]
        block = ptx.mul(_bit("shr.u32", index, NF4_SCALE_BLOCK.bit_length() - 1), 4)
        code = _load("u8", ptx.add(self.scale, ptx.wide(index)))
        return [code, _load("f32", ptx.add(self.absmax, ptx.wide(block)))]

    def finish_scale(self, stored: list[ptx.Value]) -> ptx.Value:
        """The float32 scale, times the factor."""
        value = stored[0]
        if self.kind == "nf4":
            # Product and sum are rounded apart, as quant.group_scales says.
            code = _load("f32", ptx.add(self.dynamic, ptx.wide(ptx.mul(stored[0], 4))))
            text = "add.rn.f32 $0, $1, $2;"
            args = [_times(code, stored[1]), self.offset]
            value = ptx.asm(text, args, [ptx.f32()], pure=True)
        return value if self.factor is None else _times(value, self.factor)

    def value(self, word: ptx.Value, position: int, scale: ptx.Value) -> ptx.Value:
        """Code number `position` of a word of eight, times its scale."""
        code = _bit("shr.u32", word, 4 * position) if position else word
        return _times(_of_lane(self.code, code), scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Straight:
    """[O, I] to [O, I]: each lane reads 8 or 16 codes and stores 16 bytes, as its neighbours do."""

    kind: str
    O: int
    I: int
    tiling: Tiling
    bytes: int  # of a value: 1 or 2
    smem_bytes: int = 16  # none is used

    @property
    def blocks(self) -> int:
        return self.O * self.I // (CHUNK * self.tiling.warps * self.tiling.turns)

    def checked(self) -> "Straight":
        size, step = self.O * self.I, CHUNK * self.tiling.warps * self.tiling.turns
        if size % step or size * self.bytes >= 2**32:
            raise NotImplementedError(
                f"a weight of {self.O} x {self.I} is not a multiple of {step} values below 4 GiB"
            )
        return self

    def __call__(self, ctx, *refs) -> None:
        *inputs, out_ref, _ = refs
        t, words, groups = self.tiling, 2 // self.bytes, CHUNK // GROUPS[self.kind]
        _, lane, warp = ptx.thread()
        layer = _Layer.of(self, inputs, lane)
        chunk = ptx.add(ptx.mul(ptx.block(), t.warps * t.turns), warp)
        lane_bytes = ptx.mul(lane, 4 * words)
        code_at = ptx.add(layer.data, ptx.wide(ptx.add(ptx.mul(chunk, CHUNK // 2), lane_bytes)))
        group = ptx.add(ptx.mul(chunk, groups), _bit("and.b32", lane, groups - 1))
        stored = ptx.add(ptx.mul(chunk, CHUNK * self.bytes), ptx.mul(lane, 16))
        out_at = ptx.add(ptx.address(out_ref), ptx.wide(stored))
        step = t.warps * CHUNK

        def load(turn):
            codes = []
            for offset in range(0, CHUNK // 2, 128 * words):
                codes.append(_load_words(words, code_at, turn * step // 2 + offset))
            return codes, layer.load_scale(ptx.add(group, turn * t.warps * groups))

        ahead = load(0)
        for turn in range(t.turns):
            codes, scale = ahead
            if turn + 1 < t.turns:
                ahead = load(turn + 1)
            scale = layer.finish_scale(scale)
            self._store(layer, lane, codes, scale, out_at, turn * step * self.bytes)

    def _store(self, layer: _Layer, lane, codes, scale, out_at, start: int) -> None:
        """Values of a chunk; lane g holds the scale of its group g."""
        own = 16 // self.bytes  # codes of a lane
        first = _bit("shr.u32", lane, (GROUPS[self.kind] // own).bit_length() - 1)
        for unit, words in enumerate(codes):
            of = ptx.add(first, unit * own * 32 // GROUPS[self.kind]) if unit else first
            group_scale = _of_lane(scale, of)
            values = [layer.value(w, i, group_scale) for w in words for i in range(8)]
            packed = _bfloat16s(values) if self.bytes == 2 else _e4m3s(values)
            text = f"st.global.v4.b32 [$0+{start + unit * 512}], {{$1,$2,$3,$4}};"
            ptx.asm(text, [out_at, *packed])


def _load_words(count: int, at: ptx.Value, offset: int) -> list[ptx.Value]:
    """One or two neighbouring words of codes, which nobody reads again."""
    text = "ld.global.nc.L1::no_allocate.L2::128B"
    if count == 1:
        return [ptx.asm(f"{text}.u32 $0, [$1+{offset}];", [at], [ptx.i32()])]
    return ptx.asm(f"{text}.v2.u32 {{$0,$1}}, [$2+{offset}];", [at], [ptx.i32()] * 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turned:
    """[O, I] to e4m3 [I, O]: a warp packs along its 16 rows, a block swaps axes in shared memory.

    The tile in shared memory has a line for each input, 16 bytes of it from each warp. Lane l
    writes lines 8 l to 8 l + 7; piece c of a line lies at c xor (line / 8 mod 8), so that eight
    lanes meet in no bank.
    """

    kind: str
    O: int
    I: int
    tiling: Tiling

    @property
    def line(self) -> int:
        """Bytes, and rows of the weight, of a tile."""
        return TILE_ROWS * self.tiling.warps

    @property
    def smem_bytes(self) -> int:
        return TILE_INPUTS * self.line

    @property
    def blocks(self) -> int:
        return self.O // self.line * (self.I // TILE_INPUTS)

    def checked(self) -> "Turned":
        if self.O % self.line or self.I % TILE_INPUTS or self.tiling.warps not in (8, 16):
            raise NotImplementedError(
                f"a weight of {self.O} x {self.I} is not cut by tiles of {self.line} x "
                f"{TILE_INPUTS} (8 or 16 warps)"
            )
        return self

    def __call__(self, ctx, *refs) -> None:
        *inputs, out_ref, smem_ref = refs
        thread, lane, warp = ptx.thread()
        layer = _Layer.of(self, inputs, lane)
        row_tile, input_tile = self._tile()
        rows = ptx.add(ptx.mul(row_tile, self.line), ptx.mul(warp, TILE_ROWS))
        smem = ptx.address(smem_ref)
        self._gather(layer, lane, warp, rows, input_tile, smem)
        ptx.barrier()
        at = ptx.wide(ptx.mul(row_tile, self.line))
        at = ptx.add(at, ptx.mul(ptx.wide(input_tile), TILE_INPUTS * self.O))
        self._store(thread, ptx.add(ptx.address(out_ref), at), smem)

    def _tile(self) -> tuple[ptx.Value, ptx.Value]:
        block, along = ptx.block(), self.tiling.along_inputs
        inner = self.I // TILE_INPUTS if along else self.O // self.line
        args = [block]
        high = ptx.asm(f"div.u32 $0, $1, {inner};", args, [ptx.i32()], pure=True)
        low = ptx.asm(f"rem.u32 $0, $1, {inner};", args, [ptx.i32()], pure=True)
        return (high, low) if along else (low, high)

    def _gather(self, layer: _Layer, lane, warp, rows, input_tile, smem) -> None:
        """16 rows x 8 inputs a lane: loads, converts, writes eight 16-byte pieces."""
        start = ptx.add(ptx.mul(rows, self.I // 2), ptx.mul(input_tile, TILE_INPUTS // 2))
        code_at = ptx.add(layer.data, ptx.wide(ptx.add(start, ptx.mul(lane, 4))))
        words = [_load_words(1, code_at, r * self.I // 2)[0] for r in range(TILE_ROWS)]
        columns = TILE_INPUTS // GROUPS[self.kind]  # groups of a row of the tile
        row = _bit("shr.u32", lane, columns.bit_length() - 1)
        column = ptx.add(_bit("and.b32", lane, columns - 1), ptx.mul(input_tile, columns))
        each = 32 // columns  # rows whose scales one load of a warp brings
        stored = []
        for first in range(0, TILE_ROWS, each):
            at = ptx.mul(ptx.add(ptx.add(rows, row), first), self.I // GROUPS[self.kind])
            stored.append(layer.load_scale(ptx.add(at, column)))
        scales = [layer.finish_scale(s) for s in stored]
        of = _bit("shr.u32", lane, (32 // columns).bit_length() - 1)
        pieces = [[] for _ in range(8)]
        for r in range(0, TILE_ROWS, 4):
            four = []
            for i in range(r, r + 4):
                source = ptx.add(of, i % each * columns)
                four.append(_of_lane(scales[i // each], source))
            for k in range(8):
                values = [layer.value(words[r + i], k, four[i]) for i in range(4)]
                pieces[k] += _e4m3s(values)
        place = ptx.asm(
            "xor.b32 $0, $1, $2;", [warp, _bit("and.b32", lane, 7)], [ptx.i32()], pure=True
        )
        to = ptx.add(smem, ptx.add(ptx.mul(lane, 8 * self.line), ptx.mul(place, 16)))
        for k, piece in enumerate(pieces):
            ptx.asm(f"st.shared.v4.b32 [$0+{k * self.line}], {{$1,$2,$3,$4}};", [to, *piece])

    def _store(self, thread, out_at, smem) -> None:
        """Whole lines of the tile to whole lines of the output, 32 lines at a time."""
        warps = self.tiling.warps
        line = _bit("shr.u32", thread, warps.bit_length() - 1)
        piece = _bit("and.b32", thread, warps - 1)
        # line / 8 mod 8 of line 32 s + line: the low two bits from here, the third from s.
        place = ptx.asm(
            "xor.b32 $0, $1, $2;", [piece, _bit("shr.u32", line, 3)], [ptx.i32()], pure=True
        )
        at = ptx.add(out_at, ptx.add(ptx.wide(ptx.mul(line, self.O)), ptx.wide(ptx.mul(piece, 16))))
        for s in range(TILE_INPUTS // 32):
            there = _bit("xor.b32", place, 4) if s % 2 else place
            source = ptx.add(smem, ptx.add(ptx.mul(line, self.line), ptx.mul(there, 16)))
            data = ptx.load_shared(source, s * 32 * self.line)
            text = f"st.global.v4.b32 [$0+{s * 32 * self.O}], {{$1,$2,$3,$4}};"
            ptx.asm(text, [at, *data])
