"""4-bit codes of one layer of a stack -> float32 values, for bodies written one thread at a time.

A code becomes its value by one warp shuffle: lane l holds the value of code l mod 16, and a shuffle
looks at five bits of the lane's number, the fifth of which then does not matter. So a value costs a
shift, a shuffle and a multiplication. nf4 and int4 differ in that table and in how a scale is read.
"""

import dataclasses

import numpy as np

from qwen_jax.kernels import _pallas_ptx as ptx
from qwen_jax.quant import INT4_ZERO_POINT, NF4_CODE, NF4_SCALE_BLOCK

CODES = {"nf4": NF4_CODE, "int4": np.arange(16, dtype=np.float32) - INT4_ZERO_POINT}
GROUPS = {"nf4": 64, "int4": 128}


def load(kind: str, at: ptx.Value, offset: int = 0) -> ptx.Value:
    """One number that is read only: "u32", "f32", or "u8" widened."""
    result = ptx.f32() if kind == "f32" else ptx.i32()
    return ptx.asm(f"ld.global.nc.{kind} $0, [$1+{offset}];", [at], [result])


def bit(operation: str, a: ptx.Value, number: int) -> ptx.Value:
    """shr.u32, and.b32 or xor.b32 with a constant."""
    return ptx.asm(f"{operation} $0, $1, {number};", [a], [ptx.i32()], pure=True)


def times(a: ptx.Value, b: ptx.Value) -> ptx.Value:
    return ptx.asm("mul.rn.f32 $0, $1, $2;", [a, b], [ptx.f32()], pure=True)


def of_lane(value: ptx.Value, lane: ptx.Value) -> ptx.Value:
    """A float32 of another lane; only the low five bits of its number count."""
    text = "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;"
    return ptx.asm(text, [value, lane], [ptx.f32()], pure=True)


def bfloat16s(values: list[ptx.Value]) -> list[ptx.Value]:
    """Two values a word, the first in the low half."""
    text = "cvt.rn.bf16x2.f32 $0, $2, $1;"
    pairs = zip(values[::2], values[1::2], strict=True)
    return [ptx.asm(text, list(pair), [ptx.i32()], pure=True) for pair in pairs]


def e4m3s(values: list[ptx.Value]) -> list[ptx.Value]:
    """Four values a word, the first in the low byte; what is too large becomes 448."""
    text = (
        "{.reg .b16 lo, hi; cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1; "
        "cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3; mov.b32 $0, {lo, hi};}"
    )
    fours = [values[i : i + 4] for i in range(0, len(values), 4)]
    return [ptx.asm(text, four, [ptx.i32()], pure=True) for four in fours]


def load_words(count: int, at: ptx.Value, offset: int, fetch: int) -> list[ptx.Value]:
    """One or two neighbouring words of codes, which nobody reads again."""
    text = f"ld.global.nc.L1::no_allocate.L2::{fetch}B"
    if count == 1:
        return [ptx.asm(f"{text}.u32 $0, [$1+{offset}];", [at], [ptx.i32()])]
    return ptx.asm(f"{text}.v2.u32 {{$0,$1}}, [$2+{offset}];", [at], [ptx.i32()] * 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codes:
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
    def of(cls, body, refs, lane: ptx.Value) -> "Codes":
        layer_ref, data, table, scale, *rest = (ptx.address(ref) for ref in refs)
        layer = ptx.wide(load("u32", layer_ref))
        groups = body.O * body.I // GROUPS[body.kind]
        own = {}
        if body.kind == "nf4":
            absmax, offset, dynamic, *rest = rest
            blocks = -(-groups // NF4_SCALE_BLOCK)
            own = {
                "absmax": ptx.add(absmax, ptx.mul(layer, blocks * 4)),
                "offset": load("f32", ptx.add(offset, ptx.mul(layer, 4))),
                "dynamic": dynamic,
            }
        return cls(
            kind=body.kind,
            data=ptx.add(data, ptx.mul(layer, body.O * body.I // 2)),
            scale=ptx.add(scale, ptx.mul(layer, groups * (1 if own else 2))),
            code=load("f32", ptx.add(table, ptx.wide(ptx.mul(lane, 4)))),
            factor=load("f32", rest[0]) if rest else None,
            **own,
        )

    def load_scale(self, index: ptx.Value) -> list[ptx.Value]:
        """What is stored for the scale of a group, counted from the start of the layer."""
        if self.kind == "int4":
            text = "{.reg .b16 h; ld.global.nc.b16 h, [$1]; cvt.f32.f16 $0, h;}"
            at = ptx.add(self.scale, ptx.wide(ptx.mul(index, 2)))
            return [ptx.asm(text, [at], [ptx.f32()])]
        block = ptx.mul(bit("shr.u32", index, NF4_SCALE_BLOCK.bit_length() - 1), 4)
        code = load("u8", ptx.add(self.scale, ptx.wide(index)))
        return [code, load("f32", ptx.add(self.absmax, ptx.wide(block)))]

    def finish_scale(self, stored: list[ptx.Value]) -> ptx.Value:
        """The float32 scale, times the factor."""
        value = stored[0]
        if self.kind == "nf4":
            # Product and sum are rounded apart, as quant.group_scales says.
            code = load("f32", ptx.add(self.dynamic, ptx.wide(ptx.mul(stored[0], 4))))
            text = "add.rn.f32 $0, $1, $2;"
            args = [times(code, stored[1]), self.offset]
            value = ptx.asm(text, args, [ptx.f32()], pure=True)
        return value if self.factor is None else times(value, self.factor)

    def value(self, word: ptx.Value, position: int, scale: ptx.Value) -> ptx.Value:
        """Code number `position` of a word of eight, times its scale."""
        code = bit("shr.u32", word, 4 * position) if position else word
        return times(of_lane(self.code, code), scale)
