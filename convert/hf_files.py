"""Hugging Face safetensors folders, read strictly and piece by piece; no torch, no pickle.

A folder holds `model.safetensors.index.json` and the shards it names, or one `*.safetensors`:

    index   {"metadata": {"total_size": bytes}, "weight_map": {tensor name: shard file name}}

Every header is parsed and checked (hf_shard.py) when the folder is opened. Data is read with plain
`read`, not mmap: a mapped file that shrinks kills the process with SIGBUS, and its pages count as
resident memory (2.5 GB for the embedding of 72B). Which tensors a model has is not known here.
"""

import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from convert.hf_shard import DAMAGED, DTYPES, MAX_HEADER_BYTES, Entry, listed, quote, read_shard
from qwen_jax.errors import InputError, did_you_mean
from qwen_jax.files import read_json_object

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
FLOAT_DTYPES = ("BF16", "F16", "F32")


class BadWeights(InputError):
    """Values that no model has: running again cannot help."""


class HfWeights:
    """The tensors of a Hugging Face folder, checked in whole at open, read piece by piece.

    Raises InputError, naming the file, if anything about the folder is not as the format says:
    weights missing, doubled, damaged, truncated, of a dtype outside `dtypes`, or only pickled.
    Symlinked shards are fine (the Hugging Face cache is made of them); shard names with a path in
    them are not.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        dtypes: Sequence[str] = FLOAT_DTYPES,
        *,
        check_names: Callable[["HfWeights"], None] | None = None,
    ):
        """`check_names` comes before the bytes are summed: that sum can only say that something is
        off, and names and shapes say what."""
        self.folder = pathlib.Path(folder)
        try:
            self._entries, stated = _open_folder(self.folder, dtypes)
        except OSError as error:
            raise InputError(f"{folder} cannot be read: {error}") from error
        if check_names is not None:
            check_names(self)
        if stated is not None and stated != self.total_bytes:
            raise InputError(
                f"{self.folder / INDEX_NAME} says total_size {quote(stated)} but the shards have "
                f"{self.total_bytes} bytes: they are of different models, download both again"
            )

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

    def stamp(self, name: str) -> str:
        """Changes when the file of this tensor is written again."""
        entry = self._entry(name)
        return f"{entry.file_bytes}-{os.stat(entry.file).st_mtime_ns}"

    def read(
        self, name: str, rows: slice | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Returns a copy of a tensor, or of those rows of its axis 0, in the stored dtype.

        `rows` is clipped as in numpy; its step must be 1. `out` is filled instead of a new array;
        it must be contiguous and of the right shape and dtype. Raises InputError if the file has
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
        array = np.empty(shape, entry.dtype) if out is None else out
        if (array.shape, array.dtype) != (shape, entry.dtype) or not array.flags.c_contiguous:
            raise ValueError(f"out is {array.dtype} {array.shape}, expected {entry.dtype} {shape}")
        try:
            _read_into(array, entry, offset)
        except OSError as error:
            raise InputError(f"{entry.file} cannot be read: {error}") from error
        return array

    def _entry(self, name: str) -> Entry:
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
            raise BadWeights(
                f"tensor {name!r} has {value} at {index}; expected finite numbers only: "
                "the checkpoint is damaged or its training diverged, get another one"
            )


def _open_folder(
    folder: pathlib.Path, dtypes: Sequence[str]
) -> tuple[dict[str, Entry], int | float | None]:
    """The tensors by name, and the sum of their bytes if an index states it."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; expected one with config.json and weights")
    if not os.path.lexists(folder / INDEX_NAME):
        single = _find_single(folder)
        if not (entries := read_shard(single, dtypes)):
            raise InputError(f"{single} holds no tensors; expected a model's weights")
        return entries, None
    weight_map, total_size = _read_index(folder / INDEX_NAME)
    shards = sorted(set(weight_map.values()))
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise InputError(
            f"{folder} lacks {len(missing)} of {len(shards)} shards that {INDEX_NAME} names: "
            f"{listed(missing)}; download them"
        )
    if os.path.lexists(folder / SINGLE_NAME) and SINGLE_NAME not in shards:
        raise InputError(
            f"{folder} holds two models, {SINGLE_NAME} and the shards of {INDEX_NAME}; remove one"
        )
    entries: dict[str, Entry] = {}
    for shard in shards:
        found = read_shard(folder / shard, dtypes)
        _check_against_index(folder / shard, found, weight_map)
        entries |= found
    return entries, total_size


def _find_single(folder: pathlib.Path) -> pathlib.Path:
    """The one weight file of a folder without index."""
    # pathlib's glob matches dotfiles too, such as the ._model.safetensors that macOS makes.
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    found = [name for name in names if name.endswith(".safetensors")]
    if SINGLE_NAME in found:
        found = [SINGLE_NAME]
    if len(found) > 1 or (found and re.search(r"-of-0*([2-9]|1\d)\d*\.safetensors$", found[0])):
        raise InputError(f"{folder} has {listed(found)} but no {INDEX_NAME}; download that file")
    if not found:
        pickled = [name for name in names if re.search(r"\.(bin|pt|pth|ckpt)$", name)]
        if pickled:
            raise InputError(
                f"{folder} has only pickled weights ({listed(pickled)}): pickle can run any code "
                "and is never read; convert them to safetensors, or download those"
            )
        raise InputError(f"{folder} has no weights; expected {INDEX_NAME} or {SINGLE_NAME}")
    if not (folder / found[0]).is_file():
        raise InputError(f"{folder / found[0]} is not a file or a broken link; download it again")
    return folder / found[0]


def _read_index(path: pathlib.Path) -> tuple[dict[str, str], int | float | None]:
    """Returns tensor name -> shard file name, and total_size if the index states it."""
    if not path.is_file() or path.stat().st_size > MAX_HEADER_BYTES:
        raise InputError(f"{path} is not a file of under {MAX_HEADER_BYTES} bytes; {DAMAGED}")
    index = read_json_object(path)
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise InputError(
            f"{path} has no weight_map of names or a wrong metadata; expected "
            '{"metadata": {"total_size": ...}, "weight_map": {tensor: shard}}; ' + DAMAGED
        )
    for name, shard in weight_map.items():
        # A separator would let the index reach outside its folder, also on Windows.
        plain = isinstance(shard, str) and shard.isprintable() and len(shard) < 256
        if not plain or set(shard) & set("/\\:") or not shard.endswith(".safetensors"):
            raise InputError(
                f"{path} places {quote(name)} in {quote(shard)}; expected the plain name of a "
                ".safetensors file beside it (nothing else is read, pickle never)"
            )
    total_size = metadata.get("total_size")
    if isinstance(total_size, bool) or not isinstance(total_size, int | float | None):
        raise InputError(f"{path} has total_size {quote(total_size)}; expected bytes; {DAMAGED}")
    return weight_map, total_size


def _check_against_index(
    path: pathlib.Path, found: Mapping[str, Entry], weight_map: Mapping[str, str]
) -> None:
    if lost := [n for n, shard in weight_map.items() if shard == path.name and n not in found]:
        raise InputError(f"{path} lacks {listed(lost)}, which {INDEX_NAME} places there; {DAMAGED}")
    if extra := [name for name in found if name not in weight_map]:
        raise InputError(
            f"{path} has {listed(extra)}, which {INDEX_NAME} does not name: index and shards are "
            "of different models, download them again"
        )
    for name in found:
        if weight_map[name] != path.name:
            raise InputError(
                f"{quote(name)} is in {path}, but {INDEX_NAME} places it in {weight_map[name]}: "
                "it stands twice or in the wrong shard, download the folder again"
            )


def _read_into(array: np.ndarray, entry: Entry, offset: int) -> None:
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
