"""Quantized weights: three formats, each with the numbers of a published one.

    kind   stored as                 group along the input      numbers of
    int8   int8   [*O, I]            whole row (or 128)         symmetric, scale = absmax / 127
    int4   uint8  [*O, I/2]          128                        GPTQ symmetric: (q - 8) * scale
    nf4    uint8  [*O, I/2]          64, scales quantized too   bitsandbytes NF4, double quantized

`*O` are the output dimensions of a linear layer, `I` its input, the last axis as in torch. Two
4-bit codes share a byte, the even input in the low nibble. Packed uint8 rather than jnp.int4:
its size is honest, and it survives sums, Orbax and DLPack, which int4 does not.

This file knows nothing of the model. `dequantize` here is the specification that every kernel is
tested against.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from qwen_jax.errors import InputError

# Quantiles of a normal distribution (Dettmers et al. 2023, arXiv:2305.14314, appendix E), as
# bitsandbytes rounds them.
NF4_CODE = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)

INT4_ZERO_POINT = 8
# bitsandbytes quantizes the NF4 block scales again, in blocks of this many.
NF4_SCALE_BLOCK = 256
# Guards a block of zeros, as bitsandbytes' 1e-38 does; that is subnormal, so XLA takes it for zero
# and every code of the block became -1 by way of a NaN.
TINY = np.finfo(np.float32).tiny


def _linspace_float32(start: float, stop: float, count: int) -> np.ndarray:
    """A linspace in float32 from both ends to the middle, as torch does it (to the last bit)."""
    step = np.float32((np.float32(stop) - np.float32(start)) / np.float32(count - 1))
    index = np.arange(count)
    # float64 in between stands for the fused multiply-add: one rounding.
    low = np.float64(np.float32(start)) + np.float64(step) * index
    high = np.float64(np.float32(stop)) - np.float64(step) * (count - 1 - index)
    return np.where(index < count // 2, low, high).astype(np.float32)


def _dynamic_code() -> np.ndarray:
    """The 256 values of the signed 8-bit "dynamic" type (Dettmers 2016, arXiv:1511.04561).

    A value has a sign, a decimal exponent 10^-6..10^0 given by leading zero bits, and a linear
    fraction in what bits are left: 2^i midpoints between 0.1 and 1 for exponent 10^(i-6).
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = _linspace_float32(0.1, 1.0, 2**exponent + 1)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        # bitsandbytes multiplies in float32 here; in float64 some codes come out an ulp away.
        positive = np.float32(10.0 ** (exponent - 6)) * middles
        values += [*positive, *-positive]
    return np.sort(np.array(values, np.float32))


DYNAMIC_CODE = _dynamic_code()


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantFormat:
    """A kind and its group: what a checkpoint's manifest records and a parameter table needs."""

    kind: str  # "int8", "int4" or "nf4"
    group: int  # inputs that share a scale; 0: the whole row (int8 only)

    def __post_init__(self):
        if self.kind not in FORMAT_GROUPS:
            raise InputError(f"quantization {self.kind!r}: expected one of {list(FORMAT_GROUPS)}")
        if self.group not in FORMAT_GROUPS[self.kind]:
            raise InputError(
                f"{self.kind} in groups of {self.group}: expected {FORMAT_GROUPS[self.kind]}"
            )

    @classmethod
    def named(cls, kind: str) -> "QuantFormat | None":
        """The usual format of a kind; `none` gives None."""
        if kind == "none":
            return None
        if kind not in FORMAT_GROUPS:
            raise InputError(f"quantization {kind!r}: expected none or {list(FORMAT_GROUPS)}")
        return cls(kind=kind, group=FORMAT_GROUPS[kind][0])

    def groups(self, size: int) -> int:
        """How many groups an input of `size` has; InputError if it does not divide."""
        if self.group == 0:
            return 1
        if size % self.group:
            raise InputError(
                f"{self.kind} needs inputs in groups of {self.group}, and {size} is not a multiple "
                f"of it ({size % self.group} left over); use --quantize int8 or none"
            )
        return size // self.group

    def shapes(
        self, out_shape: tuple[int, ...], size: int
    ) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of each array of the QTensor of one [*O, I] matrix."""
        groups = self.groups(size)
        packed = size if self.kind == "int8" else size // 2
        if self.kind == "nf4":
            blocks = -(-int(np.prod(out_shape)) * groups // NF4_SCALE_BLOCK)
            return {
                "data": ((*out_shape, packed), np.dtype(np.uint8)),
                "scale": ((*out_shape, groups), np.dtype(np.uint8)),
                "scale_absmax": ((blocks,), np.dtype(np.float32)),
                "scale_offset": ((), np.dtype(np.float32)),
            }
        data = np.int8 if self.kind == "int8" else np.uint8
        # fp16 scales are what GPTQ files hold; one scale a row costs nothing in float32.
        scale = np.float32 if self.group == 0 else np.float16
        return {
            "data": ((*out_shape, packed), np.dtype(data)),
            "scale": ((*out_shape, groups), np.dtype(scale)),
        }


# kind -> groups that are stored; the first is what --quantize makes. int8 in groups of 128 is
# what GPTQ Int8 files hold.
FORMAT_GROUPS: dict[str, tuple[int, ...]] = {"int8": (0, 128), "int4": (128,), "nf4": (64,)}


@struct.dataclass
class QTensor:
    """One quantized weight [*O, I], or a stack of them [L, *O, I] (then every array has the L)."""

    data: jax.Array  # int8 [*O, I] or two codes a byte, uint8 [*O, I/2]
    scale: jax.Array  # float [*O, I/G]; nf4: codes of the dynamic type, uint8 [*O, I/64]
    scale_absmax: jax.Array | None = None  # nf4: float32 [blocks of 256 scales]
    scale_offset: jax.Array | None = None  # nf4: float32 []
    bound: jax.Array | None = None  # float32 []: what largest() gives, where that is asked often
    kind: str = struct.field(pytree_node=False, default="int8")

    @property
    def in_size(self) -> int:
        return self.data.shape[-1] * (1 if self.kind == "int8" else 2)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that this stands for."""
        return (*self.data.shape[:-1], self.in_size)


@struct.dataclass
class Layer:
    """One layer of a stack, not cut out of it: kernels read it, or write it, where it lies."""

    stack: QTensor | jax.Array  # [L, *O, I]; of activations [L, ...]
    index: jax.Array  # int32 []

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what this stands for."""
        return self.stack.shape[1:]

    def cut(self) -> QTensor | jax.Array:
        """The layer by itself; XLA makes the slice part of whatever reads it."""
        index = self.index
        return jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False), self.stack
        )


def as_layer(x: jax.Array | Layer) -> Layer:
    """An array as the only layer of a stack, for who reads layers."""
    return x if isinstance(x, Layer) else Layer(stack=x[None], index=jnp.int32(0))


def written(into: Layer, y: jax.Array) -> Layer:
    """The stack [L, ...] with y [...] in the place of the layer."""
    stack = jax.lax.dynamic_update_index_in_dim(into.stack, y, into.index, 0)
    return into.replace(stack=stack)


def by_rows(x: jax.Array | Layer | None) -> jax.Array | Layer | None:
    """Activations [..., D], or a layer of a stack of them [L, ..., D], as [M, D] or [L, M, D]."""
    if isinstance(x, Layer):
        return x.replace(stack=x.stack.reshape(len(x.stack), -1, x.stack.shape[-1]))
    return None if x is None else x.reshape(-1, x.shape[-1])


def pack_nibbles(codes: jax.Array) -> jax.Array:
    """codes uint8 [..., I] below 16 -> uint8 [..., I/2], even index in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: jax.Array) -> jax.Array:
    """uint8 [..., I/2] -> uint8 [..., I]."""
    # Broadcast and shift is one elementwise pass; stacking two halves would be a concatenation.
    shifts = jnp.array([0, 4], jnp.uint8)
    codes = (packed[..., None] >> shifts) & jnp.uint8(15)
    return codes.reshape(*packed.shape[:-1], packed.shape[-1] * 2)


def _grouped(x: jax.Array, groups: int) -> jax.Array:
    return x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)


def _absmax(w: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(w), axis=-1)


@functools.partial(jax.jit, static_argnums=1)
def quantize(
    w: jax.Array,  # [*O, I] float
    fmt: QuantFormat,
) -> QTensor:
    """Quantizes one matrix by rounding to nearest; all arithmetic in float32."""
    groups = fmt.groups(w.shape[-1])
    w = _grouped(w.astype(jnp.float32), groups)  # [*O, I/G, G]
    if fmt.kind == "nf4":
        return _quantize_nf4(w)
    top = np.float32(127.0 if fmt.kind == "int8" else 7.5)  # GPTQ: scale = 2 absmax / 15
    dtype = jnp.float32 if fmt.group == 0 else jnp.float16
    # Round the scale first, then the codes with the scale that is really stored.
    # Reciprocals, because XLA turns both divisions into them anyway, and numpy would not.
    scale = (_absmax(w) * (1 / top)).astype(dtype)
    step = scale.astype(jnp.float32)[..., None]
    codes = jnp.round(w * (1.0 / jnp.where(step > 0, step, 1.0)))
    if fmt.kind == "int8":
        data = jnp.clip(codes, -127, 127).astype(jnp.int8).reshape(*w.shape[:-2], -1)
        return QTensor(data=data, scale=scale, kind="int8")
    codes = jnp.clip(codes + INT4_ZERO_POINT, 0, 15).astype(jnp.uint8)
    data = pack_nibbles(codes.reshape(*w.shape[:-2], -1))
    return QTensor(data=data, scale=scale, kind="int4")


def _quantize_nf4(
    w: jax.Array,  # [*O, I/64, 64] float32
) -> QTensor:
    absmax = _absmax(w)  # [*O, I/64]
    scaled = jnp.clip(w * (1.0 / jnp.maximum(absmax, TINY))[..., None], -1.0, 1.0)
    codes = jnp.zeros(w.shape, jnp.uint8)
    # Counting the midpoints below a value is a bucketize that fuses into one pass.
    for bound in (NF4_CODE[:-1] + NF4_CODE[1:]) / np.float32(2):
        codes += (scaled > bound).astype(jnp.uint8)
    # Double quantization: the scales, less their mean, in blocks of 256 of the dynamic type.
    offset = nf4_offset(absmax)
    flat = (absmax - offset).reshape(-1)
    rest = -flat.size % NF4_SCALE_BLOCK
    blocks = jnp.pad(flat, (0, rest)).reshape(-1, NF4_SCALE_BLOCK)
    block_absmax = _absmax(blocks)
    unit = jnp.clip(blocks * (1.0 / jnp.maximum(block_absmax, TINY))[:, None], -1.0, 1.0)
    bounds = (DYNAMIC_CODE[:-1] + DYNAMIC_CODE[1:]) / np.float32(2)
    scale = jnp.searchsorted(bounds, unit.reshape(-1)).astype(jnp.uint8)
    return QTensor(
        data=pack_nibbles(codes.reshape(*w.shape[:-2], -1)),
        scale=scale[: flat.size].reshape(absmax.shape),
        scale_absmax=block_absmax,
        scale_offset=offset,
        kind="nf4",
    )


def nf4_offset(
    absmax: jax.Array | np.ndarray,  # [*O, I/64] float32
) -> jax.Array | np.ndarray:
    """What is taken off the scales before they are quantized: their mean, [].

    Added up in one fixed order, half onto half, so that numpy, XLA and every device get the same
    bits; `mean` differs in the last one with the shape and with what XLA fuses it into.
    """
    size = absmax.size
    lib = np if isinstance(absmax, np.ndarray) else jnp
    sums = lib.pad(absmax.reshape(-1), (0, (1 << (size - 1).bit_length()) - size))
    while sums.size > 1:
        half = sums.size // 2
        sums = sums[:half] + sums[half:]
    # The maximum changes nothing; it keeps XLA from fusing the product into the subtraction of it.
    return lib.maximum(sums[0] * np.float32(1 / size), np.float32(0))


def group_scales(q: QTensor) -> jax.Array:
    """The scale of each group as float32 [*O, I/G]; undoes NF4's double quantization."""
    if q.kind != "nf4":
        return q.scale.astype(jnp.float32)
    if q.scale_absmax is None or q.scale_absmax.ndim != 1:
        raise ValueError(f"expected one nf4 matrix, got a stack: {q.scale.shape}")
    per_scale = jnp.repeat(q.scale_absmax, NF4_SCALE_BLOCK)[: q.scale.size].reshape(q.scale.shape)
    return jnp.asarray(DYNAMIC_CODE)[q.scale] * per_scale + q.scale_offset


def largest(w: QTensor | Layer) -> jax.Array:
    """A bound on the magnitude of all values, float32 [], from the scales alone; never zero."""
    if isinstance(w, Layer):
        return largest(w.cut()) if w.stack.bound is None else w.stack.bound[w.index]
    if w.bound is not None:
        return w.bound
    if w.kind == "nf4":
        bound = jnp.max(w.scale_absmax) + w.scale_offset  # the codes of both levels end at 1
    else:
        bound = jnp.max(w.scale).astype(jnp.float32) * (127 if w.kind == "int8" else 8)
    return jnp.maximum(bound, 1e-30)


def with_bounds(stack: QTensor) -> QTensor:
    """The stack [L, ...] with the largest of each layer, so that no layer looks for it again."""
    return stack.replace(bound=jax.vmap(largest)(stack))


def dequantize(
    w: QTensor | Layer,
    dtype: jnp.dtype,
) -> jax.Array:
    """Returns the weight [*O, I]: code times scale in float32, rounded once to `dtype`."""
    q = w.cut() if isinstance(w, Layer) else w
    scales = group_scales(q)[..., None]  # [*O, I/G, 1]
    if q.kind == "int8":
        codes = q.data.astype(jnp.float32)
    elif q.kind == "int4":
        codes = unpack_nibbles(q.data).astype(jnp.float32) - INT4_ZERO_POINT
    else:
        codes = jnp.asarray(NF4_CODE)[unpack_nibbles(q.data)]
    w = _grouped(codes, q.scale.shape[-1]) * scales
    return w.reshape(q.shape).astype(dtype)


def quantize_heads(
    x: jax.Array,  # [..., H]
) -> tuple[jax.Array, jax.Array]:  # int8 [..., H], bfloat16 [...]
    """Rounds each head to 255 levels, with the scale that is really stored."""
    x = x.astype(jnp.float32)
    scale = (jnp.max(jnp.abs(x), axis=-1) / 127).astype(jnp.bfloat16)
    step = scale.astype(jnp.float32)[..., None]
    codes = jnp.round(x / jnp.where(step > 0, step, 1.0))
    return jnp.clip(codes, -127, 127).astype(jnp.int8), scale
