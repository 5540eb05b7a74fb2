"""A checkpoint's weights beside those of its source: equal bit for bit, or how far apart.

What a quantized weight must equal is a new quantization of the source; its distance from the source
is what quantization costs. Whether the files themselves are sound is not asked here.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from convert.hf_files import HfWeights
from convert.hf_to_flax import check_names_and_shapes, hf_parts
from convert.host_quant import dequantized_rows, nf4_scales, rows_into
from qwen_jax.checkpoint import StoredParams
from qwen_jax.layout import row_slices
from qwen_jax.params import ParamSpec, param_table
from qwen_jax.quant import QTensor

_BLOCK_BYTES = 16_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """How one tensor, or a part of it, differs from its source."""

    count: int  # stored values compared, codes and scales
    wrong: int  # that are not what a conversion gives
    quantized: bool = False
    squares: float = 0.0  # sum of squared errors of the dequantized weight
    source_squares: float = 0.0  # sum of squares of the source
    largest: float = 0.0  # error

    @property
    def relative_rms(self) -> float:
        return math.sqrt(self.squares / self.source_squares) if self.source_squares else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparedPart:
    weights: HfWeights
    spec: ParamSpec
    name: str  # of the torch tensor
    index: int | slice  # as in the checkpoint
    rows: slice  # of the torch tensor

    @property
    def num_bytes(self) -> int:
        row = math.prod(self.spec.torch_shape[1:]) * self.weights.dtype(self.name).itemsize
        return (self.rows.stop - self.rows.start) * row

    def blocks(self) -> Iterator[slice]:
        """Row ranges of about _BLOCK_BYTES."""
        row = self.num_bytes // (self.rows.stop - self.rows.start)
        step = max(1, _BLOCK_BYTES // row)
        for start in range(self.rows.start, self.rows.stop, step):
            yield slice(start, min(start + step, self.rows.stop))


def parts_to_compare(
    stored: StoredParams, source: pathlib.Path
) -> tuple[list[ComparedPart], int, str]:
    """All parts in the order of the table, their bytes in the source, and its fingerprint."""
    manifest, weights = stored.manifest, HfWeights(source)
    check_names_and_shapes(weights, manifest.config)
    _, fingerprint = hf_parts(
        weights, manifest.config, np.dtype(manifest.dtype), manifest.quantization
    )
    parts = [
        ComparedPart(
            weights=weights,
            spec=spec,
            name=name,
            index=index,
            rows=slice(0, spec.torch_shape[0]) if spec.stacked else index,
        )
        for spec in param_table(manifest.config)
        for layer, name in enumerate(spec.torch_names())
        for index in ([layer] if spec.stacked else row_slices(spec))
    ]
    return parts, sum(part.num_bytes for part in parts), fingerprint


def compare_part(stored: StoredParams, part: ComparedPart) -> Difference:
    leaf = stored.read(part.spec, part.index)
    if isinstance(leaf, QTensor):
        return _compare_quantized(stored, part, leaf)
    got = leaf.reshape(-1, *part.spec.torch_shape[1:])
    wrong = 0
    for rows in part.blocks():
        want = part.weights.read(part.name, rows)
        if want.dtype != got.dtype:
            want = want.astype(np.float32).astype(got.dtype)
        wrong += _unequal(got[rows.start - part.rows.start : rows.stop - part.rows.start], want)
    return Difference(count=got.size, wrong=wrong)


def _compare_quantized(stored: StoredParams, part: ComparedPart, leaf: QTensor) -> Difference:
    fmt = part.spec.format(stored.manifest.quantization)
    data = leaf.data.reshape(-1, leaf.data.shape[-1])
    scale = leaf.scale.reshape(-1, leaf.scale.shape[-1])
    fresh = np.empty(scale.shape, np.float32 if fmt.kind == "nf4" else scale.dtype)
    wrong, parts = 0, []
    for rows in part.blocks():
        source = part.weights.read(part.name, rows)
        codes = np.empty(data[rows].shape, data.dtype)
        rows_into(source, fmt, codes, fresh[rows])
        wrong += _unequal(codes, data[rows])
        error = dequantized_rows(leaf, rows) - source.astype(np.float32)
        parts.append((_squares(error), _squares(source), float(np.abs(error).max(initial=0))))
    scales = {"scale": fresh} if fmt.kind != "nf4" else nf4_scales(fresh)
    for field, array in scales.items():
        wrong += _unequal(array.reshape(-1), np.asarray(getattr(leaf, field)).reshape(-1))
    return Difference(
        count=data.size + sum(array.size for array in scales.values()),
        wrong=wrong,
        quantized=True,
        squares=sum(part[0] for part in parts),
        source_squares=sum(part[1] for part in parts),
        largest=max(part[2] for part in parts),
    )


def worst_of(differences: Sequence[Difference]) -> Difference:
    """Of parts, or of tensors, the sums and the largest error."""
    return Difference(
        count=sum(d.count for d in differences),
        wrong=sum(d.wrong for d in differences),
        quantized=any(d.quantized for d in differences),
        squares=sum(d.squares for d in differences),
        source_squares=sum(d.source_squares for d in differences),
        largest=max(d.largest for d in differences),
    )


def _squares(x: np.ndarray) -> float:
    x = x.astype(np.float32, copy=False).reshape(-1)
    return float(np.dot(x, x))


def _unequal(a: np.ndarray, b: np.ndarray) -> int:
    """How many values differ in their bits."""
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    return int(np.count_nonzero(a.reshape(-1).view(unsigned) != b.reshape(-1).view(unsigned)))
