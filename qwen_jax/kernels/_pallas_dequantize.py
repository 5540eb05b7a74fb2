"""Mosaic GPU bodies that write one layer of a stack of 4-bit weights as bfloat16 or e4m3.

Both move little more than the packed bytes in and the values out, and at 5 instructions a value
(_pallas_codes.py) memory is what they wait for.

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
from qwen_jax.kernels._pallas_codes import (
    CODES,
    GROUPS,
    Codes,
    bfloat16s,
    bit,
    e4m3s,
    load_words,
    of_lane,
)
from qwen_jax.quant import DYNAMIC_CODE, QTensor

CHUNK = 2048  # codes that a warp turns into values at a time, 64 a lane
TILE_INPUTS = 256  # of a turned tile: 8 a lane
TILE_ROWS = 16  # of each warp of a turned tile: a 16-byte store of e4m3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the work is cut into thread blocks."""

    warps: int = 8  # of a thread block, a multiple of 4
    turns: int = 1  # chunks or tiles of a thread block, the next one loaded ahead
    side: int = 1  # turned: neighbouring tiles are so many along I, then go along O
    fetch: int = 128  # bytes that a miss brings into L2: 64, 128 or 256


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
    run = plgpu.kernel(
        ptx.of_threads(body),
        out_type=out,
        grid=(body.blocks,),
        grid_names=("block",),
        num_threads=body.tiling.warps // 4,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((body.smem_bytes // 4,), jnp.uint32)],
        compiler_params=ptx.LANE,
    )
    return run(*operands(layer, q, factor))


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
        layer = Codes.of(self, inputs, lane)
        chunk = ptx.add(ptx.mul(ptx.block(), t.warps * t.turns), warp)
        lane_bytes = ptx.mul(lane, 4 * words)
        code_at = ptx.add(layer.data, ptx.wide(ptx.add(ptx.mul(chunk, CHUNK // 2), lane_bytes)))
        group = ptx.add(ptx.mul(chunk, groups), bit("and.b32", lane, groups - 1))
        stored = ptx.add(ptx.mul(chunk, CHUNK * self.bytes), ptx.mul(lane, 16))
        out_at = ptx.add(ptx.address(out_ref), ptx.wide(stored))
        step = t.warps * CHUNK

        def load(turn):
            codes = []
            for offset in range(0, CHUNK // 2, 128 * words):
                at = turn * step // 2 + offset
                codes.append(load_words(words, code_at, at, t.fetch))
            return codes, layer.load_scale(ptx.add(group, turn * t.warps * groups))

        ahead = load(0)
        for turn in range(t.turns):
            codes, scale = ahead
            if turn + 1 < t.turns:
                ahead = load(turn + 1)
            scale = layer.finish_scale(scale)
            self._store(layer, lane, codes, scale, out_at, turn * step * self.bytes)

    def _store(self, layer: Codes, lane, codes, scale, out_at, start: int) -> None:
        """Values of a chunk; lane g holds the scale of its group g."""
        own = 16 // self.bytes  # codes of a lane
        first = bit("shr.u32", lane, (GROUPS[self.kind] // own).bit_length() - 1)
        for unit, words in enumerate(codes):
            of = ptx.add(first, unit * own * 32 // GROUPS[self.kind]) if unit else first
            group_scale = of_lane(scale, of)
            values = [layer.value(w, i, group_scale) for w in words for i in range(8)]
            packed = bfloat16s(values) if self.bytes == 2 else e4m3s(values)
            text = f"st.global.v4.b32 [$0+{start + unit * 512}], {{$1,$2,$3,$4}};"
            ptx.asm(text, [out_at, *packed])


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
        return self.O // self.line * (self.I // TILE_INPUTS) // self.tiling.turns

    def checked(self) -> "Turned":
        t = self.tiling
        tiles = self.O // self.line * (self.I // TILE_INPUTS)
        uneven = self.O % self.line or self.I % (TILE_INPUTS * t.side) or tiles % t.turns
        if uneven or t.warps not in (8, 16):
            raise NotImplementedError(
                f"a weight of {self.O} x {self.I} is not cut by tiles of {self.line} x "
                f"{TILE_INPUTS}, {t.side} side by side, {t.turns} a block, 8 or 16 warps"
            )
        return self

    def __call__(self, ctx, *refs) -> None:
        *inputs, out_ref, smem_ref = refs
        thread, lane, warp = ptx.thread()
        layer = Codes.of(self, inputs, lane)
        out, smem = ptx.address(out_ref), ptx.address(smem_ref)
        ahead = self._load(layer, lane, warp, 0)
        for turn in range(self.tiling.turns):
            now = ahead
            if turn + 1 < self.tiling.turns:
                ahead = self._load(layer, lane, warp, turn + 1)
            if turn:
                ptx.barrier()  # the tile before has been read
            self._gather(layer, lane, warp, *now, smem)
            ptx.barrier()
            row_tile, input_tile = self._tile(turn)
            at = ptx.wide(ptx.mul(row_tile, self.line))
            at = ptx.add(at, ptx.mul(ptx.wide(input_tile), TILE_INPUTS * self.O))
            self._store(thread, ptx.add(out, at), smem)

    def _tile(self, turn: int) -> tuple[ptx.Value, ptx.Value]:
        t = self.tiling
        number = ptx.add(ptx.mul(ptx.block(), t.turns), turn)
        rest, low = _divide(number, t.side)
        high, row_tile = _divide(rest, self.O // self.line)
        return row_tile, ptx.add(ptx.mul(high, t.side), low)

    def _load(self, layer: Codes, lane, warp, turn: int) -> tuple[list[ptx.Value], list]:
        """A word of each of 16 rows, and what is stored for their scales."""
        row_tile, input_tile = self._tile(turn)
        rows = ptx.add(ptx.mul(row_tile, self.line), ptx.mul(warp, TILE_ROWS))
        start = ptx.add(ptx.mul(rows, self.I // 2), ptx.mul(input_tile, TILE_INPUTS // 2))
        code_at = ptx.add(layer.data, ptx.wide(ptx.add(start, ptx.mul(lane, 4))))
        fetch = self.tiling.fetch
        words = [load_words(1, code_at, r * self.I // 2, fetch)[0] for r in range(TILE_ROWS)]
        columns = TILE_INPUTS // GROUPS[self.kind]  # groups of a row of the tile
        row = bit("shr.u32", lane, columns.bit_length() - 1)
        column = ptx.add(bit("and.b32", lane, columns - 1), ptx.mul(input_tile, columns))
        each = 32 // columns  # rows whose scales one load of a warp brings
        stored = []
        for first in range(0, TILE_ROWS, each):
            at = ptx.mul(ptx.add(ptx.add(rows, row), first), self.I // GROUPS[self.kind])
            stored.append(layer.load_scale(ptx.add(at, column)))
        return words, stored

    def _gather(self, layer: Codes, lane, warp, words, stored, smem) -> None:
        """16 rows x 8 inputs a lane: converts, writes eight 16-byte pieces."""
        columns = TILE_INPUTS // GROUPS[self.kind]
        each = 32 // columns
        scales = [layer.finish_scale(s) for s in stored]
        of = bit("shr.u32", lane, (32 // columns).bit_length() - 1)
        pieces = [[] for _ in range(8)]
        for r in range(0, TILE_ROWS, 4):
            four = []
            for i in range(r, r + 4):
                source = ptx.add(of, i % each * columns)
                four.append(of_lane(scales[i // each], source))
            for k in range(8):
                values = [layer.value(words[r + i], k, four[i]) for i in range(4)]
                pieces[k] += e4m3s(values)
        place = ptx.asm(
            "xor.b32 $0, $1, $2;", [warp, bit("and.b32", lane, 7)], [ptx.i32()], pure=True
        )
        to = ptx.add(smem, ptx.add(ptx.mul(lane, 8 * self.line), ptx.mul(place, 16)))
        for k, piece in enumerate(pieces):
            ptx.asm(f"st.shared.v4.b32 [$0+{k * self.line}], {{$1,$2,$3,$4}};", [to, *piece])

    def _store(self, thread, out_at, smem) -> None:
        """Whole lines of the tile to whole lines of the output, 32 lines at a time."""
        warps = self.tiling.warps
        line = bit("shr.u32", thread, warps.bit_length() - 1)
        piece = bit("and.b32", thread, warps - 1)
        # line / 8 mod 8 of line 32 s + line: the low two bits from here, the third from s.
        place = ptx.asm(
            "xor.b32 $0, $1, $2;", [piece, bit("shr.u32", line, 3)], [ptx.i32()], pure=True
        )
        at = ptx.add(out_at, ptx.add(ptx.wide(ptx.mul(line, self.O)), ptx.wide(ptx.mul(piece, 16))))
        for s in range(TILE_INPUTS // 32):
            there = bit("xor.b32", place, 4) if s % 2 else place
            source = ptx.add(smem, ptx.add(ptx.mul(line, self.line), ptx.mul(there, 16)))
            data = ptx.load_shared(source, s * 32 * self.line)
            text = f"st.global.v4.b32 [$0+{s * 32 * self.O}], {{$1,$2,$3,$4}};"
            ptx.asm(text, [at, *data])


def _divide(a: ptx.Value, number: int) -> tuple[ptx.Value, ptx.Value]:
    """Quotient and remainder."""
    return tuple(
        ptx.asm(f"{op}.u32 $0, $1, {number};", [a], [ptx.i32()], pure=True) for op in ("div", "rem")
    )
