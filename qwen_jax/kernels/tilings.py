"""How the few-row product is cut into thread blocks, for each format and shape.

Sizes of the formats, the tilings that were measured, and a rule for shapes that were not. It knows
no kernel.
"""

import dataclasses
import itertools

from qwen_jax.kernels.hopper import multiprocessors

UNIT_BYTES = 512
UNITS = 8  # of a chunk


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """Sizes that follow from the number of bits and the group."""

    kind: str
    unit: int  # inputs of a unit
    scale_loads: int  # 16-byte loads of scales a lane and chunk; 0: no group has one

    @property
    def chunk(self) -> int:
        return self.unit * UNITS

    @property
    def group_units(self) -> int:
        """A load has the scales of 4 groups for 2 rows."""
        return UNITS // (4 * self.scale_loads) if self.scale_loads else UNITS

    @property
    def chunk_scale_bytes(self) -> int:
        return 128 * self.scale_loads


FORMATS = {
    "int4": Format(kind="int4", unit=64, scale_loads=1),
    "nf4": Format(kind="nf4", unit=64, scale_loads=2),
    "int8": Format(kind="int8", unit=32, scale_loads=0),
    "bf16": Format(kind="bf16", unit=16, scale_loads=0),
}
TABLE_BYTES = 256 * 32 * 4  # nf4: two values a byte, for each lane
# Keeps the eight rows of the activations in different banks of shared memory.
ROW_PAD = 64  # bytes
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

    def check(self, N: int, K: int, chunk: int) -> None:
        if N % self.rows or K % (chunk * self.splits) or self.warps % 4 or UNITS % self.ahead:
            raise NotImplementedError(f"{self} does not divide a {N} x {K} weight")


# Format, N, K of Qwen-72B -> (rows of activations up to, tiling), from benchmarks/qmatmul.py.
_BIG = Tiling(blocks=3, warps=16, splits=2, ahead=4)
_TUNED: dict[tuple[str, int, int], list[tuple[int, Tiling]]] = {
    ("int4", 24576, 8192): [
        (8, Tiling(blocks=1, warps=24, splits=2, ahead=4)),
        (16, Tiling(blocks=1, warps=12, splits=2, ahead=8)),
    ],
    ("int4", 49152, 8192): [(16, _BIG)],
    ("int4", 8192, 24576): [(16, Tiling(blocks=2, warps=16, splits=8, ahead=2))],
    ("int4", 8192, 8192): [
        (8, Tiling(blocks=2, warps=8, splits=8, ahead=4)),
        (16, Tiling(blocks=1, warps=16, splits=4, ahead=8)),
    ],
}
# Not swept: those of int4. Units of all formats have the same bytes, so the same tiling keeps as
# many of them on their way.
for _kind in ("nf4", "int8", "bf16"):
    _TUNED[_kind, 24576, 8192] = [(16, Tiling(blocks=1, warps=24, splits=2, ahead=4))]
    for _shape in ((49152, 8192), (8192, 24576), (8192, 8192)):
        _TUNED[_kind, *_shape] = _TUNED["int4", *_shape]


def tiling_for(M: int, N: int, K: int, kind: str = "int4") -> Tiling:
    """The tuned tiling of a known shape, else one that divides it and fills the card."""
    for limit, tiling in _TUNED.get((kind, N, K), []):
        if limit >= M:
            return tiling
    return min(_tilings(M, N, K, FORMATS[kind]), key=lambda t: _waste(t, N))


def _tilings(M: int, N: int, K: int, fmt: Format) -> list[Tiling]:
    tiles = -(-M // 8)
    table = TABLE_BYTES if fmt.kind == "nf4" else 0
    for most in (_SMEM, 2 * _SMEM):  # K of few divisors: rather one large block than none
        tilings = []
        for blocks, warps, splits in itertools.product((1, 2, 3), (8, 12, 16, 4), range(1, 17)):
            fits = (K // splits * 2 + ROW_PAD) * tiles * 8 + table <= most
            small = blocks * tiles <= 4  # accumulators stay in registers
            divides = N % (16 * blocks * warps) == 0 and K % (fmt.chunk * splits) == 0
            if divides and fits and small:
                tilings.append(Tiling(blocks=blocks, warps=warps, splits=splits, ahead=4))
        if tilings:
            return tilings
    raise NotImplementedError(f"no tiling divides a {N} x {K} weight for {M} rows")


def _waste(t: Tiling, N: int) -> float:
    """How far the warps are from the 16 that each multiprocessor should have."""
    warps = N // t.rows * t.splits * t.warps
    return abs(warps / (16 * multiprocessors()) - 1) + 0.02 * t.splits
