"""How each array of a checkpoint is cut into files and pieces: a zarr3 array for each leaf.

    stacked     [L, ...]   one file for each layer
    unstacked   [V, D]     one file for each TABLE_ROWS rows

Which folder, and who writes or reads, is not known here.
"""

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np
from flax import traverse_util

from qwen_jax.config import ModelConfig
from qwen_jax.params import ParamSpec, abstract_params, param_table
from qwen_jax.quant import QTensor, QuantFormat

TABLE_ROWS = 4096  # rows of an unstacked table in one file: 64 MiB at 72B

_READ_PIECES = 8  # a file is read in pieces, this many along each axis that a mesh may split
_CHECKED_BYTES = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


def row_slices(spec: ParamSpec) -> list[slice]:
    """The slices in which the rows of an unstacked weight are written."""
    rows = spec.shape[0]
    return [slice(i, min(i + TABLE_ROWS, rows)) for i in range(0, rows, TABLE_ROWS)]


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
    """One array to be written: to Orbax a leaf, to tensorstore a zarr3 array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file_shape: tuple[int, ...]  # what one file holds: always written whole
    piece_shape: tuple[int, ...]  # what one read takes

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.size * self.dtype.itemsize

    def most_read_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of all pieces that a slice of `shape`, wherever it begins, can touch."""
        counts = [
            min(-(-part // piece) + 1, -(-whole // piece)) * piece
            for part, piece, whole in zip(shape, self.piece_shape, self.shape, strict=True)
        ]
        return math.prod(counts) * self.dtype.itemsize

    def spec(self, folder: pathlib.Path) -> dict[str, Any]:
        """The tensorstore spec of a new array in `folder`."""
        pieces = {
            "chunk_shape": self.piece_shape,
            "codecs": _CHECKED_BYTES,
            "index_codecs": _CHECKED_BYTES,
            "index_location": "end",
        }
        return array_spec(folder) | {
            "store_data_equal_to_fill_value": True,  # zeros that are absent would look like damage
            "metadata": {
                "shape": self.shape,
                "data_type": self.dtype.name,
                "chunk_grid": {
                    "name": "regular",
                    "configuration": {"chunk_shape": self.file_shape},
                },
                "codecs": [{"name": "sharding_indexed", "configuration": pieces}],
            },
        }


def array_spec(folder: pathlib.Path) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}


def stored_leaves(cfg: ModelConfig, dtype: Any, fmt: QuantFormat | None) -> dict[str, StoredLeaf]:
    """Name -> array, for every array of the checkpoint."""
    abstract = traverse_util.flatten_dict(plain_arrays(abstract_params(cfg, dtype, fmt)))
    specs = {spec.path: spec for spec in param_table(cfg)}
    leaves = {}
    for path, struct in abstract.items():
        spec = specs[path] if path in specs else specs[path[:-1]]
        shape = tuple(struct.shape)
        unit = shape[1:] if spec.stacked else (min(shape[0], TABLE_ROWS), *shape[1:])
        piece = unit
        if len(unit) == len(spec.axes):
            piece = tuple(
                size // math.gcd(size, _READ_PIECES) if axis else size
                for size, axis in zip(unit, spec.axes, strict=True)
            )
        lead = (1,) if spec.stacked else ()
        leaves[".".join(path)] = StoredLeaf(
            shape, np.dtype(struct.dtype), lead + unit, lead + piece
        )
    return leaves


def plain_arrays(tree: Any) -> Any:
    """The tree with each QTensor as a dict of its arrays, None left out."""
    if isinstance(tree, QTensor):
        fields = ("data", "scale", "scale_absmax", "scale_offset")
        return {f: getattr(tree, f) for f in fields if getattr(tree, f) is not None}
    if isinstance(tree, dict):
        return {name: plain_arrays(value) for name, value in tree.items()}
    return tree
