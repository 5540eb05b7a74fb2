"""Writes Hugging Face safetensors folders as a stream: memory holds one block of rows at a time.

One shard is `model.safetensors`, several come with the index. Nothing is under its name before all
of it is complete; which tensors a model has is not known here.
"""

import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from convert.hf_files import INDEX_NAME, SINGLE_NAME
from convert.hf_shard import DTYPES, listed
from qwen_jax.errors import InputError
from qwen_jax.files import sync_folder, write_json


class StreamedTensor(NamedTuple):
    """A tensor to be written: what it is, and its rows in blocks along axis 0, made when asked."""

    name: str
    shape: tuple[int, ...]
    dtype: Any  # anything np.dtype takes, one of DTYPES
    blocks: Iterable[np.ndarray]  # [rows, *shape[1:]] each; a single [] if the shape is []

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def plan_shards(tensors: Iterable[tuple], max_shard_bytes: int) -> dict[str, list[StreamedTensor]]:
    """File name -> its tensors; follows from names, shapes and dtypes alone, no block is made.

    As Hugging Face does it: tensors in the order given, a new shard when the next would exceed
    `max_shard_bytes` (a larger tensor gets its own); one shard alone is `model.safetensors`.
    """
    shards: list[list[StreamedTensor]] = []
    names: set[str] = set()
    filled = 0
    for tensor in map(StreamedTensor._make, tensors):
        if tensor.name in names or np.dtype(tensor.dtype) not in DTYPES.values():
            raise ValueError(f"{tensor.name!r} stands twice or has dtype {tensor.dtype}")
        names.add(tensor.name)
        if not shards or filled + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.num_bytes
    if not shards:
        raise ValueError("no tensors to write")
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": s for i, s in enumerate(shards, 1)}


def write_sharded(
    folder: str | os.PathLike, tensors: Iterable[tuple], max_shard_bytes: int = 5 * 10**9
) -> list[str]:
    """Writes (name, shape, dtype, blocks) tuples as a Hugging Face folder; returns file names.

    Blocks are taken one at a time in the order of `tensors`, so memory holds one block. One shard
    is written as `model.safetensors` without index, several with the index, as Hugging Face does.
    All files grow under hidden temporary names and appear when the last is complete and synced,
    the index after them all: a folder that opens as HfWeights is whole.

    Raises InputError if the folder already holds weights or the disk is too small, ValueError if
    the blocks do not make up the tensor that was announced.
    """
    folder = pathlib.Path(folder)
    plan = plan_shards(tensors, max_shard_bytes)
    total = sum(tensor.num_bytes for members in plan.values() for tensor in members)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_target(folder, total)
        _write_all_shards(folder, plan)
        if len(plan) > 1:
            where = {tensor.name: name for name, members in plan.items() for tensor in members}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            write_json(folder / INDEX_NAME, index)
    except OSError as error:
        raise InputError(f"weights cannot be written to {folder}: {error}") from error
    return list(plan)


def _write_all_shards(folder: pathlib.Path, plan: Mapping[str, list[StreamedTensor]]) -> None:
    partial = {name: folder / f".{name}.partial" for name in plan}
    try:
        for name, members in plan.items():
            _write_shard(partial[name], members)
        for name, path in partial.items():
            os.replace(path, folder / name)
        sync_folder(folder)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def _check_target(folder: pathlib.Path, total: int) -> None:
    # Mixed with another model's shards the folder would be neither.
    old = [p.name for p in folder.iterdir() if p.name.endswith((".safetensors", INDEX_NAME))]
    if old:
        raise InputError(f"{folder} already holds {listed(sorted(old))}; give an empty folder")
    if (free := shutil.disk_usage(folder).free) < total:
        raise InputError(f"{folder} has {free} bytes free, {total} are needed; free some space")


def shard_header(members: Sequence[StreamedTensor]) -> tuple[bytes, dict[str, int]]:
    """All of a shard before the data, and the byte after it at which each tensor begins."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    begin, begins = 0, {}
    names = {dtype: name for name, dtype in DTYPES.items()}
    # Wide dtypes first keeps every tensor aligned to its dtype, as the library's writer does.
    for tensor in sorted(members, key=lambda t: -np.dtype(t.dtype).itemsize):
        begins[tensor.name] = begin
        header[tensor.name] = {
            "dtype": names[np.dtype(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [begin, begin := begin + tensor.num_bytes],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw, begins


def _write_shard(path: pathlib.Path, members: Sequence[StreamedTensor]) -> None:
    header, begins = shard_header(members)
    with open(path, "wb") as file:
        file.write(header)
        for tensor in members:
            file.seek(len(header) + begins[tensor.name])
            _write_blocks(file, tensor)
        file.flush()
        os.fsync(file.fileno())


def _write_blocks(file: BinaryIO, tensor: StreamedTensor) -> None:
    rows, expected = 0, tensor.shape[0] if tensor.shape else 1
    for block in tensor.blocks:
        same_rows = block.ndim == len(tensor.shape) and block.shape[1:] == tuple(tensor.shape[1:])
        if not same_rows or block.dtype != tensor.dtype:
            raise ValueError(
                f"{tensor.name!r} got a block {block.shape} of {block.dtype}; expected rows of "
                f"{tensor.shape} of {tensor.dtype}"
            )
        rows += block.shape[0] if block.ndim else 1
        file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8))
    if rows != expected:
        raise ValueError(f"{tensor.name!r} got {rows} rows in its blocks; expected {expected}")
