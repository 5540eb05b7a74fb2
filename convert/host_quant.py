"""The formats of qwen_jax.quant made on the host with numpy, rows by rows, in all threads.

Bit for bit what `qwen_jax.quant.quantize` gives (tests compare them), several times as fast on a
CPU and in bounded memory: XLA takes a matrix whole, in float32. The arithmetic runs in chunks that
stay in a core's cache, in numpy calls that release the GIL.

`rows_into` quantizes rows independently of each other. NF4 alone needs a second step over the whole
matrix, `nf4_scales`, because its scales are quantized too, around their mean.

XLA takes numbers below 1.2e-38 for zero; so does this file, where it matters.
"""

import numpy as np

from qwen_jax.quant import (
    DYNAMIC_CODE,
    INT4_ZERO_POINT,
    NF4_CODE,
    NF4_SCALE_BLOCK,
    TINY,
    QTensor,
    QuantFormat,
    nf4_offset,
)

_CHUNK = 1 << 17  # elements: with its temporaries about 2 MB
_FAR_FROM_ZERO = 1e-34  # where a group's largest is above, numbers below TINY get code 0 anyway
# Adding it leaves a float32's nearest whole number, ties to even, in the low bits.
_ROUND = np.float32(1.5 * 2**23)
_NF4_BOUNDS = (NF4_CODE[:-1] + NF4_CODE[1:]) / np.float32(2)
_DYNAMIC_BOUNDS = (DYNAMIC_CODE[:-1] + DYNAMIC_CODE[1:]) / np.float32(2)


def rows_into(
    rows: np.ndarray,  # [R, I] bfloat16, float16 or float32, finite
    fmt: QuantFormat,
    data: np.ndarray,  # [R, I] or [R, I/2], written
    scale: np.ndarray,  # [R, groups], written; for NF4 float32: the largest of each group
) -> None:
    """Quantizes rows of a matrix into rows of its arrays."""
    R, I = rows.shape
    size = I // fmt.groups(I)
    quantize = {"int8": _int8, "int4": _int4, "nf4": _nf4}[fmt.kind]
    step = max(1, _CHUNK // I)
    for start in range(0, R, step):
        part = slice(start, start + step)
        w, absmax = _grouped_float32(rows[part], size)
        quantize(w, absmax, data[part].reshape(-1), scale[part].reshape(-1, 1))


def nf4_scales(
    absmax: np.ndarray,  # [R, I/64] float32: the largest of each group of the whole matrix
    offset: np.ndarray | None = None,  # [] float32, if not their mean
) -> dict[str, np.ndarray]:
    """The arrays `scale`, `scale_absmax` and `scale_offset` of a matrix."""
    offset = np.asarray(nf4_offset(absmax) if offset is None else offset)
    flat = (absmax - offset).reshape(-1)
    blocks = np.pad(flat, (0, -flat.size % NF4_SCALE_BLOCK)).reshape(-1, NF4_SCALE_BLOCK)
    largest = np.abs(blocks).max(axis=-1)
    unit = blocks * _reciprocal(largest)[:, None]
    codes = np.searchsorted(_DYNAMIC_BOUNDS, np.clip(unit, -1, 1).reshape(-1)[: flat.size])
    return {
        "scale": codes.astype(np.uint8).reshape(absmax.shape),
        "scale_absmax": largest,
        "scale_offset": offset,
    }


def _grouped_float32(rows: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows as float32 [G, size] and the largest magnitude of each group [G, 1]."""
    w = np.empty(rows.shape, np.float32)
    if rows.dtype.itemsize == 2 and rows.dtype != np.float16:  # bfloat16: the upper half
        bits = w.view(np.uint32)
        np.copyto(bits, rows.view(np.uint16))
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(w, rows)
    w = w.reshape(-1, size)
    absmax = np.abs(w).max(axis=-1, keepdims=True)
    if np.any((absmax > 0) & (absmax < _FAR_FROM_ZERO)):
        w[np.abs(w) < TINY] = 0
        absmax[absmax < TINY] = 0
    return w, absmax


def _rounded_codes(w: np.ndarray, absmax: np.ndarray, top: float, scale: np.ndarray) -> np.ndarray:
    """Sets scale = absmax / top as it is stored; returns w / scale, not yet rounded."""
    exact = absmax * np.float32(1 / np.float32(top))
    scale[...] = np.where(exact < TINY, 0, exact)
    step = scale.astype(np.float32)
    return np.multiply(w, _reciprocal(np.where(step > 0, step, np.float32(1))), out=w)


def _reciprocal(x: np.ndarray) -> np.ndarray:
    inverse = np.float32(1) / np.maximum(x, TINY)
    return np.where(inverse < TINY, np.float32(0), inverse)


def _int8(w: np.ndarray, absmax: np.ndarray, data: np.ndarray, scale: np.ndarray) -> None:
    codes = _rounded_codes(w, absmax, 127.0, scale)
    np.clip(codes, -127, 127, out=codes)
    codes += _ROUND
    # The low byte of each float is the code; a cast of integers keeps the low byte.
    np.copyto(data.view(np.uint8), codes.view(np.uint32).reshape(-1), casting="unsafe")


def _int4(w: np.ndarray, absmax: np.ndarray, data: np.ndarray, scale: np.ndarray) -> None:
    codes = _rounded_codes(w, absmax, 7.5, scale)
    np.clip(codes, -INT4_ZERO_POINT, 15 - INT4_ZERO_POINT, out=codes)
    codes += _ROUND + np.float32(INT4_ZERO_POINT)
    nibbles = np.empty(codes.size, np.uint8)
    np.copyto(nibbles, codes.view(np.uint32).reshape(-1), casting="unsafe")
    _pack(nibbles, data)


def _nf4(w: np.ndarray, absmax: np.ndarray, data: np.ndarray, scale: np.ndarray) -> None:
    scale[...] = absmax
    np.multiply(w, _reciprocal(absmax), out=w)
    w = w.reshape(-1)
    codes = np.zeros(w.size, np.uint8)
    above = np.empty(w.size, bool)
    # Fifteen vectorized comparisons: half the time of a table, a fifth of searchsorted.
    for bound in _NF4_BOUNDS:
        np.greater(w, bound, out=above)
        np.add(codes, above.view(np.uint8), out=codes)
    _pack(codes, data)


def _pack(
    codes: np.ndarray,  # [I] uint8 below 16
    data: np.ndarray,  # [I/2] uint8, written: the even code in the low nibble
) -> None:
    pairs = codes.view("<u2")
    np.copyto(data, pairs | (pairs >> 4), casting="unsafe")


def dequantized_rows(
    q: QTensor,  # of one matrix, numpy arrays
    rows: slice,
) -> np.ndarray:
    """Some rows [R, I] of the weight in float32, outputs flattened."""
    data = q.data.reshape(-1, q.data.shape[-1])[rows]
    groups = q.scale.shape[-1]
    scale = q.scale.reshape(-1, groups)[rows]
    if q.kind == "nf4":
        start = rows.indices(q.scale.size // groups)[0] * groups
        block = np.arange(start, start + scale.size) // NF4_SCALE_BLOCK
        largest = q.scale_absmax[block].reshape(scale.shape)
        scale = DYNAMIC_CODE[scale] * largest + np.float32(q.scale_offset)
    if q.kind == "int8":
        codes = data.astype(np.float32)
    else:
        nibbles = np.stack([data & 15, data >> 4], axis=-1).reshape(data.shape[0], -1)
        codes = NF4_CODE[nibbles] if q.kind == "nf4" else nibbles - np.float32(INT4_ZERO_POINT)
    w = codes.reshape(*scale.shape, -1) * scale.astype(np.float32)[..., None]
    return w.reshape(data.shape[0], -1)
