"""One safetensors file: its header parsed and checked before a byte of data is touched.

    shard   header length (8 bytes, little endian) | header (JSON) | the bytes of all tensors
    header  {tensor name: {"dtype": "BF16", "shape": [V, D], "data_offsets": [begin, end]}, ...}

Source: https://github.com/huggingface/safetensors#format. A damaged file is one clear line and
never a crash. Folders, indexes and which tensors a model has are not known here.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from qwen_jax.errors import InputError
from qwen_jax.files import unique_keys

DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the format; 72B in one file would need 90 kB
DAMAGED = "the file is damaged, download it again"

_MAX_DIMENSIONS = 8
_MAX_ELEMENTS = 2**48  # far above any model, far below what overflows in numpy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """Where one tensor lies; offsets are bytes from the start of the file."""

    file: pathlib.Path
    file_bytes: int
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_shard(path: pathlib.Path, dtypes: Sequence[str]) -> dict[str, Entry]:
    """Parses and checks one shard's header: afterwards its tensors tile the file exactly."""
    header, data_begin, file_bytes = _read_header(path)
    entries = {
        name: _parse_entry(path, name, value, dtypes, data_begin, file_bytes)
        for name, value in header.items()
        if name != "__metadata__"
    }
    cursor = data_begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != cursor:
            raise InputError(
                f"{path}: {quote(name)} begins at byte {entry.begin}, expected {cursor}: tensors "
                f"overlap or leave a gap; {DAMAGED}"
            )
        cursor = entry.end
    if cursor != file_bytes:
        fault = "truncated" if cursor > file_bytes else "longer than it should be"
        raise InputError(
            f"{path} is {fault}: it has {file_bytes} bytes, its header describes {cursor}; "
            f"{DAMAGED}"
        )
    return entries


def _read_header(path: pathlib.Path) -> tuple[dict[str, Any], int, int]:
    """Returns the header, the byte where data begins, and the size of the file."""
    with open(path, "rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if start == b"version ":
            raise InputError(
                f"{path} is a Git LFS pointer, not weights; fetch them with `git lfs pull`"
            )
        length = int.from_bytes(start, "little")
        if file_bytes < 10 or length > min(file_bytes - 8, MAX_HEADER_BYTES):
            raise InputError(
                f"{path} has {file_bytes} bytes and says that its header has {length}; expected a "
                f"safetensors file, header under {MAX_HEADER_BYTES} bytes; {DAMAGED}"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} has a header that is not valid JSON: {error}; {DAMAGED}"
        ) from None
    if not isinstance(header, dict) or raw[:1] != b"{":
        raise InputError(f"{path} has a header that is not a JSON object; {DAMAGED}")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"{path} has a __metadata__ other than strings by name; {DAMAGED}")
    return header, 8 + length, file_bytes


def _parse_entry(
    path: pathlib.Path,
    name: str,
    value: Any,
    dtypes: Sequence[str],
    data_begin: int,
    file_bytes: int,
) -> Entry:
    """Checks the header's description of one tensor against itself."""
    where = f"{path}: {quote(name)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where} is not given as dtype, shape and data_offsets; {DAMAGED}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not name.isprintable() or dtype not in dtypes:
        raise InputError(
            f"{where} has dtype {quote(dtype)}; expected a printable name and one of "
            f"{', '.join(dtypes)}; save the checkpoint in one of these"
        )
    if not _is_sizes(shape):
        raise InputError(f"{where} has an impossible shape {quote(shape)}; {DAMAGED}")
    if math.prod(max(size, 1) for size in shape) > _MAX_ELEMENTS:
        raise InputError(f"{where} has the giant shape {quote(shape)}; {DAMAGED}")
    num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != num_bytes:
        raise InputError(
            f"{where} has data_offsets {quote(offsets)}; shape {shape} of {dtype} needs "
            f"{num_bytes} bytes; {DAMAGED}"
        )
    begin, end = (data_begin + offset for offset in offsets)
    return Entry(
        file=path,
        file_bytes=file_bytes,
        dtype=DTYPES[dtype],
        shape=tuple(shape),
        begin=begin,
        end=end,
    )


def _is_sizes(value: Any) -> bool:
    """Whether a JSON value is a short list of whole numbers from 0 to 2^63 (true is no number)."""
    short = isinstance(value, list) and len(value) <= _MAX_DIMENSIONS
    return short and all(type(v) is int and 0 <= v < 2**63 for v in value)


def quote(value: Any) -> str:
    """One value from a file, short enough for a line of error."""
    if isinstance(value, dict | list) and not _is_sizes(value):
        return f"a {type(value).__name__}"  # it may nest too deep for repr
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(quote(name) for name in names[:5]) + more
