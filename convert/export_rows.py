"""What an export writes: each torch tensor as blocks of rows, dequantized and merged on the way.

    source     a checkpoint of ours (StoredParams), or the original Hugging Face folder (HfWeights)
    block      rows of one tensor, at most 32 MiB in float32, made when the writer asks for it

A weight that is neither quantized nor merged passes bit for bit. The sum with the adapter's product
is taken in float32 and rounded once. Where the rows go is not known here.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from convert.hf_files import HfWeights, check_finite
from convert.hf_writer import StreamedTensor
from qwen_jax.adapters import Lora, merged_weight
from qwen_jax.checkpoint import StoredParams
from qwen_jax.config import ModelConfig
from qwen_jax.layout import row_slices
from qwen_jax.params import ParamSpec, param_table
from qwen_jax.quant import NF4_CODE, QTensor, dequantize, group_scales, unpack_nibbles

_BLOCK_ELEMENTS = 2**23
_merged = jax.jit(merged_weight, static_argnames="dtype")
Progress = Callable[[int], Any]


class Source(Protocol):
    """Where unmerged weights come from."""

    def dtype(self, spec: ParamSpec, layer: int) -> np.dtype:
        """What the tensor is exported as."""

    def blocks(self, spec: ParamSpec, layer: int) -> Iterator[np.ndarray | jax.Array]:
        """The rows of one torch tensor in order; float32 where they were quantized."""


class StoredSource:
    """The weights of a checkpoint, dequantized."""

    def __init__(self, stored: StoredParams):
        self._stored = stored

    def dtype(self, spec: ParamSpec, layer: int) -> np.dtype:
        return jnp.dtype(self._stored.manifest.dtype)

    def blocks(self, spec: ParamSpec, layer: int) -> Iterator[np.ndarray | jax.Array]:
        for index in [layer] if spec.stacked else row_slices(spec):
            leaf = self._stored.read(spec, index)
            if isinstance(leaf, QTensor):
                yield from dequantized_blocks(leaf)
            else:
                yield from _cut(leaf.reshape(-1, *spec.torch_shape[1:]))


class FolderSource:
    """The weights of the original Hugging Face folder, as they are."""

    def __init__(self, weights: HfWeights):
        self._weights = weights

    def dtype(self, spec: ParamSpec, layer: int) -> np.dtype:
        return self._weights.dtype(spec.torch_names()[layer])

    def blocks(self, spec: ParamSpec, layer: int) -> Iterator[np.ndarray]:
        name = spec.torch_names()[layer]
        for rows in _row_blocks(spec.torch_shape):
            block = self._weights.read(name, rows)
            check_finite(block, name, rows.start)
            yield block


def export_tensors(
    cfg: ModelConfig, source: Source, lora: Lora | None, progress: Progress
) -> Iterator[StreamedTensor]:
    """Every torch tensor in torch's order: table, layer by layer, final norm and head."""
    table = param_table(cfg)
    stacked = [spec for spec in table if spec.stacked]
    order = [(spec, 0) for spec in table if not spec.stacked]
    layers = [(spec, i) for i in range(cfg.num_layers) for spec in stacked]
    for spec, layer in [*order[:1], *layers, *order[1:]]:
        dtype = source.dtype(spec, layer)
        make = functools.partial(_blocks, source, spec, layer, lora, dtype, progress)
        yield StreamedTensor(spec.torch_names()[layer], spec.torch_shape, dtype, _Lazy(make))


class _Lazy(Iterable[np.ndarray]):
    """Blocks that are read when they are asked for."""

    def __init__(self, make: Callable[[], Iterator[np.ndarray]]):
        self._make = make

    def __iter__(self) -> Iterator[np.ndarray]:
        return self._make()


def _blocks(
    source: Source,
    spec: ParamSpec,
    layer: int,
    lora: Lora | None,
    dtype: np.dtype,
    progress: Progress,
) -> Iterator[np.ndarray]:
    pair = None if lora is None else layer_pair(lora, spec, layer)
    row = 0
    for block in source.blocks(spec, layer):
        stop = row + len(block)
        if pair is not None:
            b = pair["b"].reshape(-1, pair["b"].shape[-1])[row:stop]
            block = _merged(block, {"a": pair["a"], "b": b}, lora.scale, dtype=dtype)
        elif block.dtype != dtype:
            block = _rounded(block, dtype=dtype)
        block, row = np.asarray(block), stop
        yield block
        progress(block.nbytes)


def layer_pair(lora: Lora, spec: ParamSpec, layer: int) -> dict[str, Any] | None:
    """The adapter's a [R, I] and b [*O, R] for one layer of a weight; None if it has none."""
    node: Any = lora.weights
    for name in spec.path:
        if name not in node:
            return None
        node = node[name]
    return {side: node[side][layer] for side in ("a", "b")}


@functools.partial(jax.jit, static_argnames="dtype")
def _rounded(rows: jax.Array, *, dtype: np.dtype) -> jax.Array:
    return rows.astype(dtype)


def dequantized_blocks(q: QTensor) -> Iterator[jax.Array]:
    """float32 blocks [rows, I] of one matrix, the values of `dequantize` to the bit."""
    scales = np.asarray(group_scales(jax.tree.map(jnp.asarray, q)))
    scales = scales.reshape(-1, scales.shape[-1])
    data = np.asarray(q.data).reshape(-1, q.data.shape[-1])
    for rows in _row_blocks((len(data), q.in_size)):
        yield _dequantized(data[rows], scales[rows], kind=q.kind)


@functools.partial(jax.jit, static_argnames="kind")
def _dequantized(
    data: jax.Array,  # [rows, I] or [rows, I/2]
    scales: jax.Array,  # float32 [rows, I/G]
    *,
    kind: str,
) -> jax.Array:  # float32 [rows, I]
    if kind != "nf4":
        return dequantize(QTensor(data=data, scale=scales, kind=kind), jnp.float32)
    codes = jnp.asarray(NF4_CODE)[unpack_nibbles(data)]
    grouped = codes.reshape(*scales.shape, -1) * scales[..., None]
    return grouped.reshape(codes.shape)


def _row_blocks(shape: tuple[int, ...]) -> list[slice]:
    """Slices of axis 0 of at most _BLOCK_ELEMENTS elements each."""
    width = shape[1] if len(shape) > 1 else 1
    step = max(_BLOCK_ELEMENTS // width, 1)
    return [slice(i, min(i + step, shape[0])) for i in range(0, shape[0], step)]


def _cut(array: np.ndarray) -> Iterator[np.ndarray]:
    for rows in _row_blocks(array.shape):
        yield array[rows]
