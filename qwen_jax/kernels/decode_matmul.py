"""x @ W^T for few rows of x and one layer of a stack of 4-bit weights: what decode spends its
time on.

    QTensor [L, *O, I] --pack--> PackedWeight [L, ...] --decode_matmul(x, w, layer)--> [M, N]

The weights are packed once at load into the order in which the kernel reads them, and stay stacked:
the kernel takes the whole stack and a layer index, because a slice would be copied before the call.
It knows no model.
"""

import functools
import logging
import math

import jax
import jax.numpy as jnp
from flax import struct

from qwen_jax.quant import INT4_ZERO_POINT, QTensor

GROUP = 128
# Inputs are padded to a multiple of this: four groups, whose scales are one load.
CHUNK = 512
# Above this a GEMM on dequantized weights is faster (benchmarks/qmatmul.py).
MAX_ROWS = 32

_log = logging.getLogger(__name__)


@struct.dataclass
class PackedWeight:
    """int4 weights [L, N, K] in the order of the kernel's loads (see `pack_int4`)."""

    codes: jax.Array  # uint32 [L, N/16, K/64, 32, 4]
    scale: jax.Array  # float16 [L, N/16, K/512, 8, 8]
    out_shape: tuple[int, ...] = struct.field(pytree_node=False)  # *O, their product is N
    in_size: int = struct.field(pytree_node=False)  # I, before it was padded to K


def pack_int4(
    codes: jax.Array,  # uint8 [N, I/2], two codes a byte
    scale: jax.Array,  # float16 [N, I/128]
) -> tuple[jax.Array, jax.Array]:  # uint32 [N/16, K/64, 32, 4], float16 [N/16, K/512, 8, 8]
    """Reorders one layer.

    A lane of a warp is (row, part) of 8 x 4. Its 16 bytes of a unit of 16 rows x 64 inputs are four
    words (b, h), each with the eight codes (second, pair, half) of rows row + 8 half and inputs
    32 b + 8 part + 4 h + 2 pair + second: the operand of one 16 x 16 tensor-core product.
    """
    N, groups = scale.shape
    rest = -groups % (CHUNK // GROUP)
    codes = jnp.pad(codes, [(0, 0), (0, rest * GROUP // 2)])
    scale = jnp.pad(scale, [(0, 0), (0, rest)])  # scale 0: what was padded adds nothing
    K = codes.shape[1] * 2
    pairs = codes.reshape(
        N // 16, 2, 8, K // 64, 2, 4, 2, 2
    )  # [n, half, row, unit, b, part, h, pair]
    pairs = pairs.transpose(0, 3, 2, 5, 4, 6, 7, 1).astype(jnp.uint32)
    shift = jnp.array([[0, 4], [8, 12]], jnp.uint32)  # [pair, half]
    words = ((pairs & 15) << shift) | ((pairs >> 4) << (shift + 16))
    words = jnp.sum(words, axis=(-2, -1), dtype=jnp.uint32)  # disjoint bits: a sum is an or
    scale = scale.reshape(N // 16, 2, 8, K // CHUNK, 4).transpose(0, 3, 2, 4, 1)
    return words.reshape(N // 16, K // 64, 32, 4), scale.reshape(N // 16, K // CHUNK, 8, 8)


def unpack_int4(
    words: jax.Array,  # uint32 [N/16, K/64, 32, 4]
    scale: jax.Array,  # float16 [N/16, K/512, 8, 8]
    dtype: jnp.dtype,
) -> jax.Array:  # [N, K]
    """The weight that a packed layer stands for: the specification of its order."""
    n, units = words.shape[:2]
    shift = jnp.array([[[0, 4], [8, 12]], [[16, 20], [24, 28]]], jnp.uint32)
    codes = (words.reshape(n, units, 8, 4, 2, 2, 1, 1, 1) >> shift) & 15
    # [n, unit, row, part, b, h, second, pair, half] -> rows [n, half, row], inputs in order
    codes = codes.transpose(0, 8, 2, 1, 4, 3, 5, 7, 6).reshape(n * 16, units // 2, GROUP)
    scales = scale.reshape(n, -1, 8, 4, 2).transpose(0, 4, 2, 1, 3).reshape(n * 16, -1, 1)
    w = (codes.astype(jnp.float32) - INT4_ZERO_POINT) * scales.astype(jnp.float32)
    return w.reshape(n * 16, units * 64).astype(dtype)


def pack(*weights: QTensor) -> PackedWeight:
    """Packs a stack of int4 weights [L, *O, I], one layer at a time.

    Several of one shape become one weight [L, count, *O, I]: their products are then one.
    """
    for q in weights:
        if q.kind != "int4" or q.in_size // q.scale.shape[-1] != GROUP:
            raise NotImplementedError(f"packing of {q.kind} {q.shape} with scales {q.scale.shape}")
    _, *out, width = weights[0].data.shape
    N = math.prod(out)
    if N % 16:
        raise NotImplementedError(f"{N} outputs are no multiple of 16")
    data = [
        (q.data.reshape(-1, N, width), q.scale.reshape(-1, N, q.scale.shape[-1])) for q in weights
    ]

    def one(layer: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
        codes, scales = zip(*layer, strict=True)
        return pack_int4(jnp.concatenate(codes), jnp.concatenate(scales))

    codes, scale = jax.lax.map(one, data)
    shape = tuple(out) if len(weights) == 1 else (len(weights), *out)
    return PackedWeight(codes=codes, scale=scale, out_shape=shape, in_size=weights[0].in_size)


def decode_matmul(
    x: jax.Array,  # [..., I]
    w: PackedWeight,
    layer: jax.Array,  # int32 []
    *,
    implementation: str | None = None,  # "mosaic" or "xla"; None chooses
) -> jax.Array:  # [..., *O], in x's dtype
    """Multiplies with one layer of a packed stack; sums in float32, rounded once.

    A named implementation never falls back; the automatic choice takes the kernel for up to
    `MAX_ROWS` rows in bfloat16 on a Hopper card, else dequantizes in front of a GEMM.
    """
    if x.shape[-1] != w.in_size:
        raise ValueError(f"x has {x.shape[-1]} inputs, the packed weight expects {w.in_size}")
    rows = math.prod(x.shape[:-1])
    flat = x.reshape(rows, w.in_size)
    chosen = implementation or choose(flat, w)
    if chosen == "mosaic":
        y = _mosaic(flat, w, layer)
    elif chosen == "xla":
        y = decode_matmul_xla(flat, w, layer)
    else:
        raise ValueError(f"decode_matmul implementation {chosen!r}: expected 'mosaic' or 'xla'")
    return y.astype(x.dtype).reshape(*x.shape[:-1], *w.out_shape)


def decode_matmul_xla(
    x: jax.Array,  # [M, I]
    w: PackedWeight,
    layer: jax.Array,  # int32 []
) -> jax.Array:  # float32 [M, N]
    """The reference: unpacks the layer in x's dtype in front of a GEMM."""
    at = lambda a: jax.lax.dynamic_index_in_dim(a, layer, 0, keepdims=False)  # noqa: E731
    dense = unpack_int4(at(w.codes), at(w.scale), x.dtype)[:, : w.in_size]
    last = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, dense, last, preferred_element_type=jnp.float32)


def _mosaic(x: jax.Array, w: PackedWeight, layer: jax.Array) -> jax.Array:
    from qwen_jax.kernels import _pallas_qmatmul

    M = x.shape[0]
    rows = M if M <= 8 else -(-M // 8) * 8
    K = w.codes.shape[2] * 64
    x = jnp.pad(x, [(0, rows - M), (0, K - w.in_size)])
    tiling = _pallas_qmatmul.tiling_for(rows, w.codes.shape[1] * 16, K)
    index = jnp.asarray(layer, jnp.int32).reshape(1)
    parts = _pallas_qmatmul.split_matmul(index, x, w.codes, w.scale, tiling=tiling)
    return parts.sum(0)[:M]


def choose(x: jax.Array, w: PackedWeight) -> str:
    """The kernel for few rows on a Hopper card, XLA otherwise."""
    chosen = "mosaic" if x.shape[0] <= MAX_ROWS and on_hopper(x) else "xla"
    _say_once(chosen, "few rows" if x.shape[0] <= MAX_ROWS else "many rows")
    return chosen


def on_hopper(x: jax.Array) -> bool:
    """Whether bfloat16 kernels written for sm_90 run here."""
    if jax.default_backend() != "gpu" or x.dtype != jnp.bfloat16:
        return False
    return str(jax.local_devices()[0].compute_capability) == "9.0"


@functools.cache
def _say_once(chosen: str, use: str) -> None:
    _log.info("int4 products of %s run on %s", use, chosen)
