"""Weights in the order in which the few-row product loads them.

    QTensor or bfloat16 [L, *O, I] --pack--> PackedWeight [L, N/16, units, 32 lanes, 16 bytes]

A unit is 16 rows x 64 inputs of 4 bits, x 32 of 8 bits or x 16 of bfloat16. A lane of a warp is
(row, part) of 8 x 4; its 16 bytes of a unit hold, of rows `row` and `row + 8`, eight neighbours of
each 32 inputs, of which two units of bfloat16 have four each:

    input   = 32 b + 8 part + 4 h + 2 pair + second
    int4    word (b, h),       code (half, pair, second) at bit 4 half + 8 pair + 16 second
    nf4     word (b, h),       code (half, pair, second) at bit 8 half + 16 pair + 4 second
    int8    word (h, pair),    code (half, second)       at bit 8 half + 16 second
    bf16    word (half, pair), value (second)            at bit 16 second

where half says which of the two rows: these are the registers of one 16 x 16 tensor-core operand.
A unit of int8 is one b, a unit of bf16 one (b, h). Inputs are padded with scales, or values, of
zero to whole chunks of 8 units, and to a number of these that can be divided (`padded_inputs`).

On a mesh each device of the tensor axis packs its own slice of the outputs or of the inputs, and
the slices lie side by side in one array. It knows no kernel and no model.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_jax.quant import INT4_ZERO_POINT, NF4_CODE, QTensor, group_scales

UNITS = 8  # of a chunk
_UNIT = {"int4": 64, "nf4": 64, "int8": 32, "bf16": 16}
# group of inputs under one scale; 0: the whole row, or no scale at all
GROUPS = {"int4": 128, "nf4": 64, "int8": 0, "bf16": 0}

Stack = QTensor | jax.Array  # [L, *O, I]: quantized, or plain bfloat16


@struct.dataclass
class PackedWeight:
    """Weights [L, N, K] in the order of the kernel's loads.

    On a mesh `out_shape` and `in_size` are those of the slice that one device holds.
    """

    codes: jax.Array  # uint32 [L, N/16, K/unit, 32, 4]; bf16: bfloat16 [L, N/16, K/16, 32, 8]
    # int4 float16 [L, N/16, K/512, 8, 8]: row, then group and half; nf4 [L, N/16, K/512, 2, 8, 8]:
    # groups 0..3 and 4..7 apart; int8 float32 [L, N]; bf16 has none
    scale: jax.Array | None
    out_shape: tuple[int, ...] = struct.field(pytree_node=False)  # *O, their product is N
    in_size: int = struct.field(pytree_node=False)  # I, before it was padded to K
    kind: str = struct.field(pytree_node=False, default="int4")

    @property
    def rows(self) -> int:
        return self.codes.shape[1] * 16

    @property
    def padded_size(self) -> int:
        return self.codes.shape[2] * _UNIT[self.kind]


def padded_inputs(in_size: int, kind: str) -> int:
    """Inputs of the packed weight: whole chunks, and k can be cut into 4 to 16 parts of as many.

    The 107 chunks of the down projection of 14B in bf16 cannot be cut at all; 108 are 1 % more
    bytes. Four chunks or less are small enough for one part.
    """
    chunk = _UNIT[kind] * UNITS
    chunks = -(-in_size // chunk)
    while chunks > 4 and all(chunks % parts for parts in range(4, 17)):
        chunks += 1
    return chunks * chunk


def kind_of(w: Stack) -> str:
    """The format in which a stack is packed."""
    return w.kind if isinstance(w, QTensor) else "bf16"


def can_pack(w: Stack) -> bool:
    """Whether a stack [L, *O, I] has a format and a number of rows that pack takes."""
    *out, in_size = w.shape[1:]
    if isinstance(w, QTensor):
        group = GROUPS[w.kind] or in_size
        known = w.scale.shape[-1] == in_size // group
    else:
        known = w.dtype == jnp.bfloat16
    return known and math.prod(out) % 16 == 0 and in_size % 8 == 0


def pack(*weights: Stack, factor: jax.Array | None = None) -> PackedWeight:
    """Packs a stack of weights [L, *O, I], one layer at a time.

    Several of one shape become one weight [L, count, *O, I]: their products are then one. With
    `factor` [L, *O] a single one has its outputs multiplied, by way of its scales if it has any.
    """
    kind, (_, *out, in_size) = kind_of(weights[0]), weights[0].shape
    for w in weights:
        if not can_pack(w) or w.shape != weights[0].shape or kind_of(w) != kind:
            stored = jax.tree.leaves(jax.tree.map(lambda x: f"{x.dtype} {x.shape}", w))
            raise NotImplementedError(f"packing as {kind} of {w.shape}: {', '.join(stored)}")

    def one(given: tuple[list[Stack], jax.Array | None]) -> tuple[jax.Array, jax.Array | None]:
        layer, outputs = given
        rows = [_rows(w, outputs) for w in layer]
        data, scale = jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows)
        return pack_layer(data, scale, kind)

    codes, scale = jax.lax.map(one, (list(weights), factor))
    shape = tuple(out) if len(weights) == 1 else (len(weights), *out)
    return PackedWeight(codes=codes, scale=scale, out_shape=shape, in_size=in_size, kind=kind)


def _rows(
    w: Stack,  # one layer [*O, I]
    factor: jax.Array | None,  # [*O]
) -> tuple[jax.Array, jax.Array | None]:  # data [N, ...], scale [N, groups], as pack_layer has them
    """One layer with an axis for all outputs, which are multiplied by the factor."""

    def rows(x: jax.Array) -> jax.Array:
        return x.reshape(math.prod(w.shape[:-1]), -1)

    def multiplied(x: jax.Array) -> jax.Array:
        return x if factor is None else x * rows(factor).astype(x.dtype)

    if not isinstance(w, QTensor):
        return multiplied(rows(w)), None
    return rows(w.data), multiplied(rows(_scales(w)))


def pack_slices(
    *weights: Stack,  # [L, *O, I]
    mesh: Mesh,
    dim: int,  # counted from the end: the dimension that the tensor axis cuts; -1 is I
    size: int,  # that dimension is first padded to so many, with zeros
    factor: jax.Array | None = None,  # [L, *O], as `pack` takes it, for a cut of the outputs
) -> PackedWeight:
    """`pack`, each device of the tensor axis its own slice; to be jitted.

    A cut of the inputs leaves whole groups to each device; int8's one scale a row stays with all.
    """
    # A block of nf4's doubly quantized scales goes across slices: these are resolved before.
    weights = tuple(_pad(_plain_scales(q), dim, size) for q in weights)
    cut = PartitionSpec(*[None] * (len(weights[0].shape) + dim), "tensor")
    layouts = jax.tree.map(lambda x: PartitionSpec() if x.shape[dim] == 1 else cut, weights)

    def local(x: jax.Array, layout: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(NamedSharding(mesh, layout).shard_shape(x.shape), x.dtype)

    def run(weights, factor) -> PackedWeight:
        return pack(*weights, factor=factor)

    given, layouts = (weights, factor), (layouts, None if factor is None else cut)
    out = slice_layout(jax.eval_shape(run, *jax.tree.map(local, given, layouts)), dim)
    return jax.shard_map(run, mesh=mesh, in_specs=layouts, out_specs=out, check_vma=False)(*given)


def slice_layout(w: PackedWeight, dim: int) -> PackedWeight:
    """The PartitionSpec of each array of what `pack_slices` gives."""
    codes = scale = PartitionSpec(*[None] * (1 if dim < -1 else 2), "tensor")
    if w.kind == "int8" and dim == -1:  # one scale for all inputs
        scale = PartitionSpec()
    return w.replace(codes=codes, scale=None if w.scale is None else scale)


def _plain_scales(w: Stack) -> Stack:
    """A stack whose scales are numbers, float16 as they are packed; others than nf4 have such."""
    if not isinstance(w, QTensor) or w.scale_absmax is None:
        return w
    scale = jax.lax.map(lambda layer: group_scales(layer).astype(jnp.float16), w)
    return QTensor(data=w.data, scale=scale, kind=w.kind)


def _scales(q: QTensor) -> jax.Array:
    return group_scales(q) if q.scale_absmax is not None else q.scale


def _pad(w: Stack, dim: int, size: int) -> Stack:
    """Adds weights of zero: by scales of zero, or by codes where these do not grow or are none."""

    def pad(x: jax.Array) -> jax.Array:
        old = x.shape[dim]
        new = 1 if old == 1 else old * size // w.shape[dim]
        widths = [(0, 0)] * x.ndim
        widths[dim] = (0, new - old)
        return jnp.pad(x, widths)

    return w if w.shape[dim] == size else jax.tree.map(pad, w)


def pack_layer(
    data: jax.Array,  # bfloat16 or int8 [N, I], or uint8 [N, I/2] with two codes a byte
    scale: jax.Array | None,  # float [N, groups]
    kind: str,
) -> tuple[jax.Array, jax.Array | None]:  # codes, scale without the layer axis
    """Reorders one layer."""
    N, unit = data.shape[0], _UNIT[kind]
    I = data.shape[1] * (2 if kind in ("int4", "nf4") else 1)
    K = padded_inputs(I, kind)
    if kind == "bf16":
        data = data.view(jnp.uint16)  # XLA on a CPU may take the smallest numbers for zeros
    data = jnp.pad(data, [(0, 0), (0, (K - I) * data.shape[1] // I)])
    if kind == "bf16":
        # [n, half, row, b, part, h, pair and second]
        values = data.reshape(N // 16, 2, 8, K // 32, 4, 2, 4).transpose(0, 3, 5, 2, 4, 1, 6)
        return values.reshape(N // 16, K // unit, 32, 8).view(jnp.bfloat16), None
    if kind == "int8":
        # [n, half, row, unit, part, h, pair, second]
        codes = data.view(jnp.uint8).reshape(N // 16, 2, 8, K // 32, 4, 2, 2, 2)
        codes = codes.transpose(0, 3, 2, 4, 5, 6, 7, 1)
        words = _or(codes, [[0, 8], [16, 24]])  # [second, half]
        return words.reshape(N // 16, K // unit, 32, 4), scale.astype(jnp.float32)[:, 0]
    # [n, half, row, unit, b, part, h, pair] of bytes: the two codes of a byte are neighbours
    codes = data.reshape(N // 16, 2, 8, K // 64, 2, 4, 2, 2).transpose(0, 3, 2, 5, 4, 6, 7, 1)
    if kind == "nf4":
        words = _or(codes, [[0, 8], [16, 24]])  # [pair, half]
    else:
        words = _or(codes & 15, [[0, 4], [8, 12]]) | _or(codes >> 4, [[16, 20], [24, 28]])
    scale = jnp.pad(scale.astype(jnp.float16), [(0, 0), (0, K // GROUPS[kind] - scale.shape[1])])
    loads = 2 if kind == "nf4" else 1
    scale = scale.reshape(N // 16, 2, 8, K // 512, loads, 4).transpose(0, 3, 4, 2, 5, 1)
    shape = (N // 16, K // 512, 8, 8) if loads == 1 else (N // 16, K // 512, 2, 8, 8)
    return words.reshape(N // 16, K // unit, 32, 4), scale.reshape(shape)


def _or(codes: jax.Array, shifts: list[list[int]]) -> jax.Array:
    """uint8 [..., 2, 2] -> uint32 [...]: each shifted to its place."""
    placed = codes.astype(jnp.uint32) << jnp.array(shifts, jnp.uint32)
    return jnp.sum(placed, axis=(-2, -1), dtype=jnp.uint32)  # disjoint bits: a sum is an or


def unpack_layer(
    words: jax.Array,  # uint32 [N/16, K/unit, 32, 4]; bf16: bfloat16 [N/16, K/16, 32, 8]
    scale: jax.Array | None,
    kind: str,
    dtype: jnp.dtype,
) -> jax.Array:  # [N, K]
    """The weight that a packed layer stands for: code times scale in float32, rounded once."""
    n, units = words.shape[:2]
    if kind == "bf16":
        # [n, b, h, row, part, half, pair and second]
        values = words.reshape(n, units // 2, 2, 8, 4, 2, 4).transpose(0, 5, 3, 1, 4, 2, 6)
        return values.reshape(n * 16, units * 16).astype(dtype)
    shifts = {  # [second, pair, half]; of int8 the pair is in the word
        "int4": np.array([[[0, 4], [8, 12]], [[16, 20], [24, 28]]], np.uint32),
        "nf4": np.array([[[0, 8], [16, 24]], [[4, 12], [20, 28]]], np.uint32),
        "int8": np.array([[[0, 8]], [[16, 24]]], np.uint32),
    }[kind]
    if kind == "int8":
        parts = words.reshape(n, units, 8, 4, 1, 2, 2, 1, 1, 1)
    else:
        parts = words.reshape(n, units, 8, 4, 2, 2, 1, 1, 1, 1)
    # [n, unit, row, part, b, h, pair in word, second, pair in bits, half]
    codes = (parts >> jnp.asarray(shifts)) & (255 if kind == "int8" else 15)
    codes = codes.transpose(0, 9, 2, 1, 4, 3, 5, 6, 8, 7).reshape(n * 16, units * _UNIT[kind])
    if kind == "int8":
        values = codes.astype(jnp.uint8).view(jnp.int8).astype(jnp.float32)
        return (values * scale[:, None]).astype(dtype)
    if kind == "nf4":
        values = jnp.asarray(NF4_CODE)[codes]
    else:
        values = codes.astype(jnp.float32) - INT4_ZERO_POINT
    scales = scale.reshape(n, units // UNITS, -1, 8, 4, 2).transpose(0, 5, 3, 1, 2, 4)
    scales = scales.reshape(n * 16, -1, 1).astype(jnp.float32)
    return (values.reshape(n * 16, -1, GROUPS[kind]) * scales).reshape(n * 16, -1).astype(dtype)
