"""How each array of a checkpoint is cut into files and pieces: a zarr3 array for each leaf.

    stacked     [L, ...]   one file for each layer
    unstacked   [V, D]     one file for each TABLE_ROWS rows

Which folder, and who writes or reads, is not known here.
"""

import dataclasses
import hashlib
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from flax import traverse_util

from qwen_jax.config import ModelConfig
from qwen_jax.params import ParamSpec, abstract_params, param_table
from qwen_jax.quant import QTensor, QuantFormat

TABLE_ROWS = 4096  # rows of an unstacked table in one file: 64 MiB at 72B

_ABSENT = 2**64 - 1
_READ_PIECES = 8  # a file is read in pieces, this many along each axis that a mesh may split
_CHECKED_BYTES = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


def row_slices(spec: ParamSpec) -> list[slice]:
    """The slices in which the rows of an unstacked weight are written."""
    rows = spec.shape[0]
    return [slice(i, min(i + TABLE_ROWS, rows)) for i in range(0, rows, TABLE_ROWS)]


def part_number(spec: ParamSpec, index: int | slice) -> int:
    """Which file of each of its arrays holds a layer, or one of `row_slices`."""
    return index if spec.stacked else index.start // TABLE_ROWS


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

    def files(self) -> list[str]:
        """Names of all files below the array's folder, in order of the index along axis 0."""
        count = -(-self.shape[0] // self.file_shape[0])
        return ["/".join(["c", str(i), *["0"] * (len(self.shape) - 1)]) for i in range(count)]

    def read_steps(self, number: int) -> Iterator[tuple[slice, ...]]:
        """Indices that cover file `number` together, each some whole pieces of it."""
        index = [slice(0, size) for size in self.shape]
        rows = self.file_shape[0]
        index[0] = slice(number * rows, min((number + 1) * rows, self.shape[0]))
        counts = [f // p for f, p in zip(self.file_shape, self.piece_shape, strict=True)]
        axis = counts.index(max(counts))
        start, stop, _ = index[axis].indices(self.shape[axis])
        for begin in range(start, stop, self.piece_shape[axis]):
            index[axis] = slice(begin, min(begin + self.piece_shape[axis], stop))
            yield tuple(index)

    def file_digest(self, path: pathlib.Path) -> str:
        """Identifies a file's content by the checksums in it, which whoever reads it compares.

        sha256 over the crc32c (4 bytes) of each piece. A file is its pieces, each with its crc32c
        behind it, then an index of (offset, bytes) pairs and the index' crc32c; a piece that lies
        wholly beyond the end of the array is absent. Raises OSError or ValueError if it is not so.
        """
        counts = [f // p for f, p in zip(self.file_shape, self.piece_shape, strict=True)]
        index_bytes = 16 * math.prod(counts) + 4
        digest = hashlib.sha256()
        with open(path, "rb", buffering=0) as file:
            begin = os.fstat(file.fileno()).st_size - index_bytes
            index = os.pread(file.fileno(), index_bytes, max(begin, 0))
            digest.update(index[-4:])
            for offset, size in np.frombuffer(index[:-4], "<u8").reshape(-1, 2).tolist():
                if (offset, size) == (_ABSENT, _ABSENT):
                    continue
                if not 4 <= size <= begin or offset > begin - size:
                    raise ValueError(f"{path} is truncated or damaged")
                digest.update(os.pread(file.fileno(), 4, offset + size - 4))
        return digest.hexdigest()

    def spec(self, folder: pathlib.Path) -> dict[str, Any]:
        """The tensorstore spec of a new array in `folder`."""
        pieces = {
            "chunk_shape": self.piece_shape,
            "codecs": _CHECKED_BYTES,
            "index_codecs": _CHECKED_BYTES,
            "index_location": "end",
        }
        return written_spec(folder) | {
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


def leaf_checksum(file_digests: list[str]) -> str:
    """The manifest's checksum of a leaf, from the digests of its files in order."""
    return hashlib.sha256("".join(file_digests).encode()).hexdigest()


def array_spec(folder: pathlib.Path) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}


def written_spec(folder: pathlib.Path) -> dict[str, Any]:
    # Zeros that are absent would look like damage.
    return array_spec(folder) | {"store_data_equal_to_fill_value": True}


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
