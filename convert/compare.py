"""A checkpoint's weights beside those of its source: equal bit for bit, or how far apart.

What a quantized weight must equal is a new quantization of the source; its distance from the source
is what quantization costs. Whether the files themselves are sound is not asked here.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from convert.hf_files import HfWeights
from convert.host_quant import dequantized_rows
from convert.stream import Part
from qwen_jax.checkpoint import StoredParams
from qwen_jax.layout import plain_arrays
from qwen_jax.quant import QTensor


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


def torch_name(part: Part) -> str:
    return part.spec.torch_names()[part.index if part.spec.stacked else 0]


def compare_part(stored: StoredParams, weights: HfWeights, part: Part) -> Difference:
    """Makes a part's arrays anew and compares them with the stored ones."""
    leaf = stored.read(part.spec, part.index)
    arrays = plain_arrays(leaf) if isinstance(leaf, QTensor) else {"": leaf}
    fresh = {name: np.empty(array.shape, array.dtype) for name, array in arrays.items()}
    # Codes that the source holds already (GPTQ) are at no distance from it.
    quantized = isinstance(leaf, QTensor) and torch_name(part) in weights.names()
    errors = []
    for rows in part.blocks:
        part.fill(rows, fresh)
        if quantized:
            errors.append(_error(leaf, weights.read(torch_name(part), rows), rows))
    fresh = part.finish(fresh)
    return Difference(
        count=sum(array.size for array in arrays.values()),
        wrong=sum(_unequal(fresh[name], array) for name, array in arrays.items()),
        quantized=quantized,
        squares=sum(error[0] for error in errors),
        source_squares=sum(error[1] for error in errors),
        largest=max((error[2] for error in errors), default=0.0),
    )


def _error(q: QTensor, source: np.ndarray, rows: slice) -> tuple[float, float, float]:
    """Squared error, squares of the source, largest error of some rows."""
    error = dequantized_rows(q, rows) - source.astype(np.float32)
    return _squares(error), _squares(source), float(np.abs(error).max(initial=0))


def total_of(differences: Sequence[Difference]) -> Difference:
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
