"""Hugging Face safetensors folders, read strictly and written as a stream; no torch, no pickle.

A folder holds `model.safetensors.index.json` and the shards it names, or one `*.safetensors`:

    index   {"metadata": {"total_size": bytes}, "weight_map": {tensor name: shard file name}}
    shard   header length (8 bytes, little endian) | header (JSON) | the bytes of all tensors
    header  {tensor name: {"dtype": "BF16", "shape": [V, D], "data_offsets": [begin, end]}, ...}

Source: https://github.com/huggingface/safetensors#format. Every header is parsed and checked here
before a byte of data is touched, so a damaged file is one clear line and never a crash. Data is
read with plain `read`, not mmap: a mapped file that shrinks kills the process with SIGBUS, and its
pages count as resident memory (2.5 GB for the embedding of 72B). Nothing here knows which tensors
a model has. Reader and writer share one file because they share the format, hence its length.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from qwen_jax.errors import InputError, did_you_mean
from qwen_jax.files import read_json_object, sync_folder, unique_keys, write_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
}
FLOAT_DTYPES = ("BF16", "F16", "F32")

_MAX_HEADER_BYTES = 100_000_000  # the limit of the format; 72B in one file would need 90 kB
_MAX_DIMENSIONS = 8
_MAX_ELEMENTS = 2**48  # far above any model, far below what overflows in numpy
_AGAIN = "the file is damaged, download it again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Entry:
    """Where one tensor lies; offsets are bytes from the start of the file."""

    file: pathlib.Path
    file_bytes: int
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class HfWeights:
    """The tensors of a Hugging Face folder, checked in whole at open, read piece by piece.

    Raises InputError, naming the file, if anything about the folder is not as the format says:
    weights missing, doubled, damaged, truncated, of a dtype outside `dtypes`, or only pickled.
    Symlinked shards are fine (the Hugging Face cache is made of them); shard names with a path in
    them are not.
    """

    def __init__(self, folder: str | os.PathLike, dtypes: Sequence[str] = FLOAT_DTYPES):
        self.folder = pathlib.Path(folder)
        try:
            self._entries = _open_folder(self.folder, dtypes)
        except OSError as error:
            raise InputError(f"{folder} cannot be read: {error}") from error

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(entry.end - entry.begin for entry in self._entries.values())

    def names(self) -> list[str]:
        return sorted(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> np.dtype:
        return self._entry(name).dtype

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Returns a copy of a tensor, or of those rows of its axis 0, in the stored dtype.

        `rows` is clipped as in numpy; its step must be 1. Raises InputError if the file has
        changed since it was opened.
        """
        entry = self._entry(name)
        shape, offset = entry.shape, entry.begin
        if rows is not None:
            start, stop, step = rows.indices(shape[0])
            if step != 1:
                raise ValueError(f"rows {rows}: the step must be 1")
            offset += start * math.prod(shape[1:]) * entry.dtype.itemsize
            shape = (max(stop - start, 0), *shape[1:])
        array = np.empty(shape, entry.dtype)
        try:
            _read_into(array, entry, offset)
        except OSError as error:
            raise InputError(f"{entry.file} cannot be read: {error}") from error
        return array

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            hint = did_you_mean(name, self._entries)
            raise InputError(f"{self.folder} has no tensor {name!r}{hint}")
        return self._entries[name]


def check_finite(array: np.ndarray, name: str, first_row: int = 0) -> None:
    """Raises InputError with the first index of a NaN or Inf in `array`, the tensor `name`.

    `array` may be a block of rows, `first_row` is then the tensor's row it begins with. NaN and
    Inf are the numbers whose exponent bits are all set, so integer views decide, in chunks that
    stay in cache: 0.04 s for 400 MB of bf16; through a float32 copy it takes 1.3 s and 800 MB.
    """
    if np.issubdtype(array.dtype, np.integer):
        return
    unsigned, exponent = {
        DTYPES["BF16"]: (np.uint16, 0x7F80),
        DTYPES["F16"]: (np.uint16, 0x7C00),
        DTYPES["F32"]: (np.uint32, 0x7F800000),
    }[array.dtype]
    bits = array.reshape(-1).view(unsigned)
    chunk = 1 << 16
    buffer = np.empty(chunk, unsigned)
    for start in range(0, bits.size, chunk):
        part = bits[start : start + chunk]
        exponents = np.bitwise_and(part, unsigned(exponent), out=buffer[: part.size])
        if exponents.max() == exponent:
            place = start + int(np.argmax(exponents == exponent))
            value = float(array.reshape(-1)[place])
            index = [int(i) for i in np.unravel_index(place, array.shape)]
            if index:
                index[0] += first_row
            raise InputError(
                f"tensor {name!r} has {value} at {index}; expected finite numbers only: "
                "the checkpoint is damaged or its training diverged, get another one"
            )


def _open_folder(folder: pathlib.Path, dtypes: Sequence[str]) -> dict[str, _Entry]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; expected one with config.json and weights")
    if not os.path.lexists(folder / INDEX_NAME):
        single = _find_single(folder)
        if not (entries := _read_shard(single, dtypes)):
            raise InputError(f"{single} holds no tensors; expected a model's weights")
        return entries
    weight_map, total_size = _read_index(folder / INDEX_NAME)
    shards = sorted(set(weight_map.values()))
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise InputError(
            f"{folder} lacks {len(missing)} of {len(shards)} shards that {INDEX_NAME} names: "
            f"{_listed(missing)}; download them"
        )
    if os.path.lexists(folder / SINGLE_NAME) and SINGLE_NAME not in shards:
        raise InputError(
            f"{folder} holds two models, {SINGLE_NAME} and the shards of {INDEX_NAME}; remove one"
        )
    entries: dict[str, _Entry] = {}
    for shard in shards:
        found = _read_shard(folder / shard, dtypes)
        _check_against_index(folder / shard, found, weight_map)
        entries |= found
    total = sum(entry.end - entry.begin for entry in entries.values())
    if total_size is not None and total_size != total:
        raise InputError(
            f"{folder / INDEX_NAME} says total_size {_quote(total_size)} but the shards have "
            f"{total} bytes: they are of different models, download both again"
        )
    return entries


def _find_single(folder: pathlib.Path) -> pathlib.Path:
    """The one weight file of a folder without index."""
    # pathlib's glob matches dotfiles too, such as the ._model.safetensors that macOS makes.
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    found = [name for name in names if name.endswith(".safetensors")]
    if SINGLE_NAME in found:
        found = [SINGLE_NAME]
    if len(found) > 1 or (found and re.search(r"-of-0*([2-9]|1\d)\d*\.safetensors$", found[0])):
        raise InputError(f"{folder} has {_listed(found)} but no {INDEX_NAME}; download that file")
    if not found:
        pickled = [name for name in names if re.search(r"\.(bin|pt|pth|ckpt)$", name)]
        if pickled:
            raise InputError(
                f"{folder} has only pickled weights ({_listed(pickled)}): pickle can run any code "
                "and is never read; convert them to safetensors, or download those"
            )
        raise InputError(f"{folder} has no weights; expected {INDEX_NAME} or {SINGLE_NAME}")
    if not (folder / found[0]).is_file():
        raise InputError(f"{folder / found[0]} is not a file or a broken link; download it again")
    return folder / found[0]


def _read_index(path: pathlib.Path) -> tuple[dict[str, str], int | float | None]:
    """Returns tensor name -> shard file name, and total_size if the index states it."""
    if not path.is_file() or path.stat().st_size > _MAX_HEADER_BYTES:
        raise InputError(f"{path} is not a file of under {_MAX_HEADER_BYTES} bytes; {_AGAIN}")
    index = read_json_object(path)
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise InputError(
            f"{path} has no weight_map of names or a wrong metadata; expected "
            '{"metadata": {"total_size": ...}, "weight_map": {tensor: shard}}; ' + _AGAIN
        )
    for name, shard in weight_map.items():
        # A separator would let the index reach outside its folder, also on Windows.
        plain = isinstance(shard, str) and shard.isprintable() and len(shard) < 256
        if not plain or set(shard) & set("/\\:") or not shard.endswith(".safetensors"):
            raise InputError(
                f"{path} places {_quote(name)} in {_quote(shard)}; expected the plain name of a "
                ".safetensors file beside it (nothing else is read, pickle never)"
            )
    total_size = metadata.get("total_size")
    if isinstance(total_size, bool) or not isinstance(total_size, int | float | None):
        raise InputError(f"{path} has total_size {_quote(total_size)}; expected bytes; {_AGAIN}")
    return weight_map, total_size


def _check_against_index(
    path: pathlib.Path, found: Mapping[str, _Entry], weight_map: Mapping[str, str]
) -> None:
    if lost := [n for n, shard in weight_map.items() if shard == path.name and n not in found]:
        raise InputError(f"{path} lacks {_listed(lost)}, which {INDEX_NAME} places there; {_AGAIN}")
    if extra := [name for name in found if name not in weight_map]:
        raise InputError(
            f"{path} has {_listed(extra)}, which {INDEX_NAME} does not name: index and shards are "
            "of different models, download them again"
        )
    for name in found:
        if weight_map[name] != path.name:
            raise InputError(
                f"{_quote(name)} is in {path}, but {INDEX_NAME} places it in {weight_map[name]}: "
                "it stands twice or in the wrong shard, download the folder again"
            )


def _read_shard(path: pathlib.Path, dtypes: Sequence[str]) -> dict[str, _Entry]:
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
                f"{path}: {_quote(name)} begins at byte {entry.begin}, expected {cursor}: tensors "
                f"overlap or leave a gap; {_AGAIN}"
            )
        cursor = entry.end
    if cursor != file_bytes:
        fault = "truncated" if cursor > file_bytes else "longer than it should be"
        raise InputError(
            f"{path} is {fault}: it has {file_bytes} bytes, its header describes {cursor}; {_AGAIN}"
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
        if file_bytes < 10 or length > min(file_bytes - 8, _MAX_HEADER_BYTES):
            raise InputError(
                f"{path} has {file_bytes} bytes and says that its header has {length}; expected a "
                f"safetensors file, header under {_MAX_HEADER_BYTES} bytes; {_AGAIN}"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} has a header that is not valid JSON: {error}; {_AGAIN}") from None
    if not isinstance(header, dict) or raw[:1] != b"{":
        raise InputError(f"{path} has a header that is not a JSON object; {_AGAIN}")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"{path} has a __metadata__ other than strings by name; {_AGAIN}")
    return header, 8 + length, file_bytes


def _parse_entry(
    path: pathlib.Path,
    name: str,
    value: Any,
    dtypes: Sequence[str],
    data_begin: int,
    file_bytes: int,
) -> _Entry:
    """Checks the header's description of one tensor against itself."""
    where = f"{path}: {_quote(name)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where} is not given as dtype, shape and data_offsets; {_AGAIN}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not name.isprintable() or dtype not in dtypes:
        raise InputError(
            f"{where} has dtype {_quote(dtype)}; expected a printable name and one of "
            f"{', '.join(dtypes)}; save the checkpoint in one of these"
        )
    if not _is_sizes(shape):
        raise InputError(f"{where} has an impossible shape {_quote(shape)}; {_AGAIN}")
    if math.prod(max(size, 1) for size in shape) > _MAX_ELEMENTS:
        raise InputError(f"{where} has the giant shape {_quote(shape)}; {_AGAIN}")
    num_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != num_bytes:
        raise InputError(
            f"{where} has data_offsets {_quote(offsets)}; shape {shape} of {dtype} needs "
            f"{num_bytes} bytes; {_AGAIN}"
        )
    begin, end = (data_begin + offset for offset in offsets)
    return _Entry(
        file=path,
        file_bytes=file_bytes,
        dtype=DTYPES[dtype],
        shape=tuple(shape),
        begin=begin,
        end=end,
    )


def _read_into(array: np.ndarray, entry: _Entry, offset: int) -> None:
    with open(entry.file, "rb", buffering=0) as file:
        rest = memoryview(array.reshape(-1).view(np.uint8))
        file.seek(offset)
        unchanged = os.fstat(file.fileno()).st_size == entry.file_bytes
        # One read call of Linux returns 2 GiB at most, and a 72B embedding has 2.5 GB.
        while unchanged and len(rest):
            count = file.readinto(rest)
            unchanged, rest = count > 0, rest[count:]
    if not unchanged:
        raise InputError(
            f"{entry.file} has changed since it was opened (it had {entry.file_bytes} bytes); "
            "wait until it is written, then start again"
        )


def _is_sizes(value: Any) -> bool:
    """Whether a JSON value is a short list of whole numbers from 0 to 2^63 (true is no number)."""
    short = isinstance(value, list) and len(value) <= _MAX_DIMENSIONS
    return short and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _quote(value: Any) -> str:
    """One value from a file, short enough for a line of error."""
    if isinstance(value, dict | list) and not _is_sizes(value):
        return f"a {type(value).__name__}"  # it may nest too deep for repr
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(_quote(name) for name in names[:5]) + more


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
        raise InputError(f"{folder} already holds {_listed(sorted(old))}; give an empty folder")
    if (free := shutil.disk_usage(folder).free) < total:
        raise InputError(f"{folder} has {free} bytes free, {total} are needed; free some space")


def _write_shard(path: pathlib.Path, members: Sequence[StreamedTensor]) -> None:
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
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in members:
            file.seek(8 + len(raw) + begins[tensor.name])
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
