"""Quantized weights in the order in which the few-row product loads them.

    QTensor [L, *O, I] --pack--> PackedWeight [L, N/16, units, 32 lanes, 4 words]

A unit is 16 rows x 64 inputs of 4 bits, or x 32 of 8 bits. A lane of a warp is (row, part) of
8 x 4; its 16 bytes of a unit hold, of rows `row` and `row + 8`, eight neighbours of each 32 inputs:

    input   = 32 b + 8 part + 4 h + 2 pair + second       (b = 0 for 8 bits)
    int4    word (b, h),    code (half, pair, second) at bit 4 half + 8 pair + 16 second
    nf4     word (b, h),    code (half, pair, second) at bit 8 half + 16 pair + 4 second
    int8    word (h, pair), code (half, second)       at bit 8 half + 16 second

where half says which of the two rows: these are the registers of one 16 x 16 tensor-core operand.
Inputs are padded to whole chunks of 8 units with scales of zero.

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
_UNIT = {"int4": 64, "nf4": 64, "int8": 32}
# group of inputs under one scale; 0: the whole row
GROUPS = {"int4": 128, "nf4": 64, "int8": 0}


@struct.dataclass
class PackedWeight:
    """Quantized weights [L, N, K] in the order of the kernel's loads.

    On a mesh `out_shape` and `in_size` are those of the slice that one device holds.
    """

    codes: jax.Array  # uint32 [L, N/16, K/unit, 32, 4]
    # int4 float16 [L, N/16, K/512, 8, 8]: row, then group and half; nf4 [L, N/16, K/512, 2, 8, 8]:
    # groups 0..3 and 4..7 apart; int8 float32 [L, N]
    scale: jax.Array
    out_shape: tuple[int, ...] = struct.field(pytree_node=False)  # *O, their product is N
    in_size: int = struct.field(pytree_node=False)  # I, before it was padded to K
    kind: str = struct.field(pytree_node=False, default="int4")

    @property
    def rows(self) -> int:
        return self.codes.shape[1] * 16

    @property
    def padded_size(self) -> int:
        return self.codes.shape[2] * _UNIT[self.kind]


def can_pack(q: QTensor) -> bool:
    """Whether a stack [L, *O, I] has a format and a number of rows that pack takes."""
    rows = math.prod(q.data.shape[1:-1])
    groups = 1 if GROUPS[q.kind] == 0 else q.in_size // GROUPS[q.kind]
    return rows % 16 == 0 and q.in_size % 8 == 0 and q.scale.shape[-1] == groups


def pack(*weights: QTensor, factor: jax.Array | None = None) -> PackedWeight:
    """Packs a stack of weights [L, *O, I], one layer at a time.

    Several of one shape become one weight [L, count, *O, I]: their products are then one. With
    `factor` [L, *O] a single one has its outputs multiplied, by way of its scales.
    """
    kind, (_, *out, in_size) = weights[0].kind, weights[0].shape
    for q in weights:
        if not can_pack(q) or q.shape != weights[0].shape or q.kind != kind:
            raise NotImplementedError(f"packing of {q.kind} {q.shape} with scales {q.scale.shape}")

    def one(given: tuple[list[QTensor], jax.Array | None]) -> tuple[jax.Array, jax.Array]:
        layer, outputs = given
        N = math.prod(out)
        data = jnp.concatenate([q.data.reshape(N, -1) for q in layer])
        scale = jnp.concatenate([_scales(q).reshape(N, -1) for q in layer])
        if outputs is not None:
            scale = scale * outputs.reshape(N, 1).astype(scale.dtype)
        return pack_layer(data, scale, kind)

    codes, scale = jax.lax.map(one, (list(weights), factor))
    shape = tuple(out) if len(weights) == 1 else (len(weights), *out)
    return PackedWeight(codes=codes, scale=scale, out_shape=shape, in_size=in_size, kind=kind)


def pack_slices(
    *weights: QTensor,  # stacks [L, *O, I]
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
    cut = PartitionSpec(*[None] * (weights[0].data.ndim + dim), "tensor")
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
    if dim < -1:
        layout = PartitionSpec(None, "tensor")
        return w.replace(codes=layout, scale=layout)
    layout = PartitionSpec(None, None, "tensor")
    return w.replace(codes=layout, scale=PartitionSpec() if w.kind == "int8" else layout)


def _plain_scales(q: QTensor) -> QTensor:
    """A stack whose scales are numbers, float16 as they are packed; others than nf4 have such."""
    if q.scale_absmax is None:
        return q
    scale = jax.lax.map(lambda layer: group_scales(layer).astype(jnp.float16), q)
    return QTensor(data=q.data, scale=scale, kind=q.kind)


def _scales(q: QTensor) -> jax.Array:
    return group_scales(q) if q.scale_absmax is not None else q.scale


def _pad(q: QTensor, dim: int, size: int) -> QTensor:
    """Adds weights of zero: their scales are zero, or (a cut of int8's inputs) their codes."""

    def pad(x: jax.Array) -> jax.Array:
        old = x.shape[dim]
        new = 1 if old == 1 else old * size // q.shape[dim]
        widths = [(0, 0)] * x.ndim
        widths[dim] = (0, new - old)
        return jnp.pad(x, widths)

    return q if q.shape[dim] == size else jax.tree.map(pad, q)


def pack_layer(
    data: jax.Array,  # int8 [N, I], or uint8 [N, I/2] with two codes a byte
    scale: jax.Array,  # float [N, groups]
    kind: str,
) -> tuple[jax.Array, jax.Array]:  # codes, scale without the layer axis
    """Reorders one layer."""
    N, unit = data.shape[0], _UNIT[kind]
    I = data.shape[1] * (1 if kind == "int8" else 2)
    K = -(-I // (unit * UNITS)) * unit * UNITS
    data = jnp.pad(data, [(0, 0), (0, (K - I) * data.shape[1] // I)])
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
    words: jax.Array,  # uint32 [N/16, K/unit, 32, 4]
    scale: jax.Array,
    kind: str,
    dtype: jnp.dtype,
) -> jax.Array:  # [N, K]
    """The weight that a packed layer stands for: code times scale in float32, rounded once."""
    n, units = words.shape[:2]
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
