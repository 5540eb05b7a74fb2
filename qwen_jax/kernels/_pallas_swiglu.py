"""Mosaic GPU body of the gradient of SwiGLU, with the narrow products of LoRA in the same pass.

A warp has 32 columns, and goes down a block of rows 16 at a time. Of each tile [16, 32] it makes
the gradients of up and gate and h again, stores the first two, and multiplies on tensor cores

    slopes   tile [16, 32] @ b^T [32, R]       summed over the columns: of a block here, then by XLA
    pairs    tile^T [32, 16] @ low [16, R]     summed over the rows: of a block here, then by XLA

The next tile is on its way while one is worked on. A block has 16 warps where it can: the compiler
then keeps to the 128 registers with which so many fit on a multiprocessor.

A lane loads 16 bytes, 8 neighbours of a row, where a multiplication wants pairs from here and
there: so the columns go by another order (a sum has none), the same for b. For the second product
an 8 x 8 piece is turned between lanes by movmatrix.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from qwen_jax.kernels import _pallas_ptx as ptx
from qwen_jax.kernels._pallas_codes import bfloat16s
from qwen_jax.quant import Layer

_WARPS = (16, 8, 4)  # of a block: whichever is the first to divide the columns
_COLUMNS = 32  # of a warp: eight for each of four lanes
_ROWS = (256, 128)  # of a block
_RANKS = (8, 16)


def check(M: int, F: int, ranks: set[int]) -> "Body":
    """The body that serves, or NotImplementedError with the reason that none does."""
    rows = next((r for r in _ROWS if M % r == 0), 0)
    warps = next((w for w in _WARPS if F % (w * _COLUMNS) == 0), 0)
    if not rows or not warps or M * F >= 2**31:
        raise NotImplementedError(
            f"{M} x {F}: expected multiples of {_ROWS[-1]} x {_WARPS[-1] * _COLUMNS} below 2^31"
        )
    if len(ranks) > 1 or not ranks <= set(_RANKS):
        raise NotImplementedError(f"ranks {sorted(ranks)}: expected one of {_RANKS} for all pairs")
    (rank,) = ranks
    return Body(M=M, F=F, R=rank, rows=rows, warps=warps)


def gradient(
    up: Layer,  # bfloat16 stack [L, M, F]
    gate: Layer,
    g: jax.Array,  # bfloat16 [M, F]
    bs: tuple[jax.Array, jax.Array],  # bfloat16 [R, F]
    lows: tuple[jax.Array, jax.Array],  # bfloat16 [M, R]
    slope: jax.Array,  # bfloat16 [M, R]
) -> list[jax.Array]:
    """The fields of swiglu.Gradient."""
    M, F = g.shape
    body = check(M, F, {slope.shape[1]})
    wide = jax.ShapeDtypeStruct((M, F), jnp.bfloat16)
    run = plgpu.kernel(
        ptx.of_threads(body),
        out_type=(
            wide,
            wide,
            jax.ShapeDtypeStruct((body.across, 2, M, body.R), jnp.float32),
            jax.ShapeDtypeStruct((body.down, 3, F, body.R), jnp.float32),
        ),
        grid=(body.across * body.down,),
        grid_names=("block",),
        num_threads=body.warps // 4,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((body.shared_floats,), jnp.float32)],
        compiler_params=ptx.LANE,
    )
    index = jnp.stack([up.index, gate.index]).astype(jnp.int32)
    # Neighbouring rows lie side by side: a lane takes two at once.
    narrow = jnp.stack([low.T for low in (*lows, slope)])  # [3, R, M]
    of_up, of_gate, slopes, pairs = run(index, up.stack, gate.stack, g, *bs, narrow)
    slopes = jnp.sum(slopes, axis=0).astype(g.dtype)  # [2, M, R]
    pairs = jnp.swapaxes(jnp.sum(pairs, axis=0), 1, 2).astype(g.dtype)  # [3, R, F]
    return [of_up, of_gate, *slopes, *pairs]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Body:
    """Builds the code of one thread."""

    M: int
    F: int
    R: int
    rows: int  # of a block
    warps: int  # of a block

    @property
    def across(self) -> int:
        """Blocks along F."""
        return self.F // (self.warps * _COLUMNS)

    @property
    def down(self) -> int:
        """Blocks along M."""
        return self.M // self.rows

    @property
    def shared_floats(self) -> int:
        """Two rounds of what every warp adds to the slopes of 16 rows."""
        return 2 * self.warps * 2 * 16 * self.R

    def __call__(
        self, ctx, index_ref, up_ref, gate_ref, g_ref, up_b, gate_b, narrow_ref,
        up_out, gate_out, slopes_ref, pairs_ref, smem,
    ) -> None:  # fmt: skip
        thread, lane, warp = ptx.thread()
        row, part = arith.shrui(lane, ptx.const(2)), arith.andi(lane, ptx.const(3))
        block = ptx.block()
        across, down = (op(block, ptx.const(self.across)) for op in (arith.remui, arith.divui))
        first_row = ptx.mul(down, self.rows)
        column = ptx.add(ptx.mul(across, self.warps * _COLUMNS), ptx.mul(warp, _COLUMNS))
        at = ptx.add(ptx.mul(ptx.add(first_row, row), self.F), ptx.add(column, ptx.mul(part, 8)))
        at = ptx.mul(ptx.wide(at), 2)  # bytes from the start of an array [M, F] to this lane's
        sources = [self._layer(ref, index_ref, i) for i, ref in enumerate((up_ref, gate_ref))]
        sources = [ptx.add(base, at) for base in (*sources, ptx.address(g_ref))]
        targets = [ptx.add(ptx.address(ref), at) for ref in (up_out, gate_out)]
        bs = [self._load_b(ref, row, part, column) for ref in (up_b, gate_b)]
        narrow = ptx.add(first_row, ptx.add(ptx.mul(row, self.M), ptx.mul(part, 2)))
        narrow = ptx.add(ptx.address(narrow_ref), ptx.mul(ptx.wide(narrow), 2))
        slopes_at = ptx.mul(ptx.add(ptx.mul(across, 2 * self.M), first_row), self.R * 4)
        slopes_at = ptx.add(ptx.address(slopes_ref), ptx.wide(slopes_at))
        shared = ptx.address(smem)

        last = self.rows // 16 - 1

        def load(i):
            """What a tile is made of: 6 x 16 bytes a lane."""
            rows = ptx.mul(ptx.wide(i), 16 * 2 * self.F)
            at = [ptx.add(source, rows) for source in sources]
            return [[ptx.load_words(a, below) for a in at] for below in (0, 8 * self.F * 2)]

        def tile(i, state):
            sums, loaded = state
            ahead = load(arith.minui(ptx.add(i, 1), ptx.const(last)))
            rows = ptx.mul(ptx.wide(i), 16)
            lows = self._load_lows(ptx.add(narrow, ptx.mul(rows, 2)))
            made = self._make(loaded, [ptx.add(t, ptx.mul(rows, 2 * self.F)) for t in targets])
            slopes = [[_slope(tile, b) for b in of] for tile, of in zip(made, bs, strict=False)]
            sums = [
                _add_pairs(of, tile, low) for of, tile, low in zip(sums, made, lows, strict=True)
            ]
            parity = arith.andi(i, ptx.const(1))
            buffer = ptx.add(shared, ptx.mul(parity, self.shared_floats * 2))
            target = ptx.add(slopes_at, ptx.mul(rows, self.R * 4))
            self._sum_slopes(slopes, buffer, thread, warp, row, part, target)
            return sums, ahead

        zeros = [
            [[[ptx.real(0.0)] * 4 for _ in range(_COLUMNS // 16)] for _ in range(self.R // 8)]
            for _ in range(3)
        ]
        state = zeros, load(ptx.const(0))
        sums, _ = ptx.loop(ptx.const(0), ptx.const(last + 1), 1, state, tile)
        self._store_pairs(sums, ptx.address(pairs_ref), down, column, row, part)

    def _layer(self, ref, index_ref, i: int):
        """Where a layer of a stack starts."""
        layer = ptx.load_word(ptx.add(ptx.address(index_ref), 4 * i))
        return ptx.add(ptx.address(ref), ptx.mul(ptx.wide(layer), self.M * self.F * 2))

    def _load_b(self, ref, row, part, column):
        """[R / 8] four words: of row 8 n + row of b the columns that this lane has."""
        at = ptx.add(ptx.mul(row, self.F), ptx.add(column, ptx.mul(part, 8)))
        at = ptx.add(ptx.address(ref), ptx.mul(ptx.wide(at), 2))
        return [ptx.load_words(at, n * 8 * self.F * 2) for n in range(self.R // 8)]

    def _load_lows(self, at):
        """[which][R / 8] two words: rows 2 part, 2 part + 1 and 8 further of one rank."""
        return [
            [
                [ptx.load_word(ptx.add(at, ((which * self.R + n * 8) * self.M + k) * 2))
                 for k in (0, 8)]
                for n in range(self.R // 8)
            ]
            for which in range(3)
        ]  # fmt: skip

    def _make(self, loaded, targets):
        """[which][row, row + 8] four words: gradients of up and gate, which are stored, and h."""
        made = [[], [], []]
        for (up, gate, g), down in zip(loaded, (0, 8 * self.F * 2), strict=True):
            values = [[], [], []]
            for words in zip(up, gate, g, strict=True):
                for of_up, of_gate, of_g in zip(*map(ptx.bfloats, words), strict=True):
                    for to, value in zip(values, _gradients(of_up, of_gate, of_g), strict=True):
                        to.append(value)
            for which, eight in enumerate(values):
                words = bfloat16s(eight)
                made[which].append(words)
                if which < 2:
                    text = f"st.global.v4.u32 [$0+{down}], {{$1,$2,$3,$4}};"
                    ptx.asm(text, [targets[which], *words])
        return made

    def _sum_slopes(self, slopes, buffer, thread, warp, row, part, target) -> None:
        """Over the warps of the block, through shared memory."""
        size = 2 * 16 * self.R * 4  # bytes of a warp: [2, 16, R]
        at = ptx.add(buffer, ptx.mul(warp, size))
        at = ptx.add(at, ptx.add(ptx.mul(row, self.R * 4), ptx.mul(part, 8)))
        for which in range(2):
            for n in range(self.R // 8):
                for half in range(2):
                    offset = ((which * 16 + 8 * half) * self.R + 8 * n) * 4
                    text = f"st.shared.v2.f32 [$0+{offset}], {{$1,$2}};"
                    ptx.asm(text, [at, *slopes[which][n][2 * half : 2 * half + 2]])
        # One barrier a tile: the next one goes to the other buffer.
        ptx.barrier()
        count = 2 * 16 * self.R
        for start in range(0, count, 32 * self.warps):
            index = ptx.add(thread, start)
            with ptx.when(ptx.less(index, count)):
                self._sum_slope(index, buffer, size, target)

    def _sum_slope(self, index, buffer, size: int, target) -> None:
        which = arith.shrui(index, ptx.const((16 * self.R).bit_length() - 1))
        source = ptx.add(buffer, ptx.mul(index, 4))
        loads = [
            ptx.asm(f"ld.shared.f32 $0, [$1+{w * size}];", [source], [ptx.f32()])
            for w in range(self.warps)
        ]
        # The rows of gate are all of M further, not 16.
        place = ptx.add(index, ptx.mul(which, (self.M - 16) * self.R))
        to = ptx.add(target, ptx.wide(ptx.mul(place, 4)))
        ptx.asm("st.global.f32 [$0], $1;", [to, ptx.total(loads)])

    def _store_pairs(self, sums, base, down, column, row, part) -> None:
        """[which, column, rank] of this block of rows."""
        # Turned, line c of a piece is column 8 (c / 2) + c mod 2 of the order above.
        line = ptx.add(ptx.mul(arith.shrui(row, ptx.const(1)), 8), arith.andi(row, ptx.const(1)))
        at = ptx.add(ptx.mul(down, 3 * self.F), ptx.add(column, line))
        at = ptx.add(ptx.mul(at, self.R), ptx.mul(part, 2))
        at = ptx.add(base, ptx.mul(ptx.wide(at), 4))
        for which in range(3):
            for n in range(self.R // 8):
                for piece in range(_COLUMNS // 16):
                    for k in range(2):
                        there = (which * self.F + 2 * (2 * piece + k)) * self.R + 8 * n
                        text = f"st.global.v2.f32 [$0+{there * 4}], {{$1,$2}};"
                        ptx.asm(text, [at, *sums[which][n][piece][2 * k : 2 * k + 2]])


def _slope(tile, b):
    """tile [16, 32] @ b^T [32, 8], 16 columns at a time."""
    (above, below), sums = tile, [ptx.real(0.0)] * 4
    for j in (0, 2):
        a = [above[j], below[j], above[j + 1], below[j + 1]]
        sums = ptx.mma_16x8x16(sums, a, b[j : j + 2])
    return sums


def _add_pairs(sums, tile, lows):
    """tile^T [32, 16] @ low [16, R], 16 columns at a time."""
    above, below = ([ptx.turn_8x8(word) for word in words] for words in tile)
    added = []
    for of_ranks, low in zip(sums, lows, strict=True):
        pieces = zip(of_ranks, (0, 2), strict=True)
        added.append([
            ptx.mma_16x8x16(piece, [above[j], above[j + 1], below[j], below[j + 1]], low)
            for piece, j in pieces
        ])  # fmt: skip
    return added


def _gradients(up, gate, g):
    """Of up and of gate, and up * silu(gate)."""
    sigmoid = sigmoid_of(gate)
    silu = arith.mulf(gate, sigmoid)
    # sigmoid + silu (1 - sigmoid)
    slope = ptx.fma(silu, arith.subf(ptx.real(1.0), sigmoid), sigmoid)
    return arith.mulf(g, silu), arith.mulf(arith.mulf(g, up), slope), arith.mulf(up, silu)


def sigmoid_of(x: ptx.Value) -> ptx.Value:
    power = ptx.exp2(arith.mulf(x, ptx.real(-math.log2(math.e))))
    return ptx.inverse(arith.addf(power, ptx.real(1.0)))
