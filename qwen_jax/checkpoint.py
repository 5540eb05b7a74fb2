"""Checkpoints on disk: written as a stream, read as slices, whole or not there at all.

    CKPT/
        manifest.json     config, dtype, quantization, fingerprint; written last
        params/           Orbax; one zarr3 array for each leaf, one file for each layer of it
            layers.attn.wqkv/           (quantized: layers.attn.wqkv.data, .scale, ...)
        config.json, generation_config.json, tokenizer_config.json, qwen.tiktoken

The arrays are written by an Orbax TypeHandler of ours, because Orbax's own wants each leaf whole in
memory (32 GB for one of 72B) and stores no checksums: a flipped bit would load in silence. Reading
is stock Orbax. Where the weights come from is not known here. Writer and reader share one file
because they share the layout, hence its length.
"""

import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as ocp_v1
import tensorstore as ts
from flax import traverse_util
from jax.sharding import Mesh, SingleDeviceSharding

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.files import read_json_object, sync_folder, write_json
from qwen_jax.params import ParamSpec, abstract_params, nest, param_table
from qwen_jax.quant import QTensor, QuantFormat

MANIFEST_NAME = "manifest.json"
SIDECAR_NAMES = ("config.json", "generation_config.json", "tokenizer_config.json", "qwen.tiktoken")
DTYPES = ("bfloat16", "float32")
TABLE_ROWS = 4096  # rows of an unstacked table in one file: 64 MiB at 72B

_FORMAT = "qwen-jax checkpoint"
_VERSION = 1
_READ_PIECES = 8  # a file is read in pieces, this many along each axis that a mesh may split
_READ_BYTES = 1_000_000_000  # in flight while loading, beside the arrays themselves
_CHECKED_BYTES = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint says of itself."""

    config: ModelConfig
    dtype: str  # of every array that is not quantized, one of DTYPES
    quantization: QuantFormat | None
    fingerprint: str  # identifies the weights that it was converted from

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "config": self.config.to_dict(),
            "dtype": self.dtype,
            "quantization": dataclasses.asdict(self.quantization) if self.quantization else None,
            "fingerprint": self.fingerprint,
        }


def load_manifest(path: str | os.PathLike) -> Manifest:
    """Reads CKPT/manifest.json; InputError if `path` is not a complete checkpoint of ours."""
    path = pathlib.Path(path)
    file = path / MANIFEST_NAME
    if not file.is_file():
        hint = "convert it first" if (path / "config.json").is_file() else "check the path"
        raise InputError(f"{path} is not a converted checkpoint (no {MANIFEST_NAME}); {hint}")
    values = read_json_object(file)
    keys = {"format", "version", "config", "dtype", "quantization", "fingerprint"}
    if values.get("format") != _FORMAT or values.get("version") != _VERSION:
        raise InputError(
            f"{file} has format {values.get('format')!r} version {values.get('version')!r}; "
            f"expected {_FORMAT!r} version {_VERSION}: convert the model again"
        )
    fmt, config = values.get("quantization"), values.get("config")
    good_fmt = fmt is None or (isinstance(fmt, dict) and set(fmt) == {"kind", "group"})
    if set(values) != keys or values["dtype"] not in DTYPES or not isinstance(config, dict):
        raise InputError(f"{file} is damaged: expected the keys {sorted(keys)}; convert again")
    if not good_fmt or not isinstance(values["fingerprint"], str):
        raise InputError(f"{file} is damaged: quantization {fmt!r}; convert the model again")
    return Manifest(
        config=ModelConfig.from_dict(config),
        dtype=values["dtype"],
        quantization=None if fmt is None else QuantFormat(**fmt),
        fingerprint=values["fingerprint"],
    )


def load_params(
    path: str | os.PathLike, mesh: Mesh | None = None, dtype: Any = None
) -> tuple[Manifest, dict[str, Any]]:
    """Loads a checkpoint, each device reading its slice; without a mesh, onto the first device.

    `dtype` casts the arrays that are not quantized. Raises InputError if anything stored is
    missing, damaged or other than the manifest says.
    """
    path = pathlib.Path(path).resolve()
    manifest = load_manifest(path)
    abstract = abstract_params(manifest.config, manifest.dtype, manifest.quantization, mesh)
    # Orbax casts to the asked dtype without a word, so what is stored is compared first.
    _open_arrays(path, manifest)
    here = SingleDeviceSharding(jax.devices()[0])

    def target(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here)

    wanted = jax.tree.map(target, _plain(abstract))
    context = ocp_v1.Context()
    # Orbax refuses a read, rounded outwards to whole pieces, that is not below its limit.
    stored = _stored_leaves(manifest.config, manifest.dtype, manifest.quantization)
    largest = max(
        stored[".".join(name)].most_read_bytes(leaf.sharding.shard_shape(leaf.shape))
        for name, leaf in traverse_util.flatten_dict(wanted).items()
    )
    context.memory.read_concurrent_bytes = max(_READ_BYTES, largest + 1)
    with _damage_named(path), _without_false_alarm(), context:
        loaded = ocp_v1.load(path / "params", wanted)
        jax.block_until_ready(loaded)
    leaves = {}
    for spec in param_table(manifest.config):
        leaf = _pop(loaded, spec.path)
        fmt = spec.format(manifest.quantization)
        if fmt is not None:
            leaf = QTensor(kind=fmt.kind, **leaf)
        elif dtype is not None:
            leaf = leaf.astype(dtype)
        leaves[spec.path] = leaf
    return manifest, nest(leaves)


class StoredParams:
    """A checkpoint read on the host piece by piece: one layer, or some rows of a table."""

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path).resolve()
        self.manifest = load_manifest(self.path)
        self._arrays = _open_arrays(self.path, self.manifest)

    def read(self, spec: ParamSpec, index: int | slice) -> np.ndarray | QTensor:
        """Layer `index` of a stacked weight, rows `index` of any other."""
        name = ".".join(spec.path)
        fmt = spec.format(self.manifest.quantization)
        with _damage_named(self.path):
            if fmt is None:
                return self._arrays[name][index].read().result()
            fields = fmt.shapes(spec.out_shape, spec.in_size)
            arrays = {f: self._arrays[f"{name}.{f}"][index].read().result() for f in fields}
        return QTensor(kind=fmt.kind, **arrays)


class CheckpointWriter:
    """Writes one checkpoint; nothing is at `path` before `commit`, and nothing is left without it.

    with CheckpointWriter(path, cfg, "bfloat16", fmt) as writer:
        writer.write_params(parts)
        writer.copy_sidecars(folder)
        writer.commit(fingerprint)
    """

    def __init__(
        self,
        path: str | os.PathLike,
        cfg: ModelConfig,
        dtype: str,
        fmt: QuantFormat | None = None,
        *,
        overwrite: bool = False,
    ):
        self.path = pathlib.Path(path).absolute()
        self._about = {"config": cfg, "dtype": dtype, "quantization": fmt}
        self._leaves = _stored_leaves(cfg, dtype, fmt)
        self._staging = StagedFolder(self.path, MANIFEST_NAME, overwrite=overwrite)

    def __enter__(self) -> "CheckpointWriter":
        self._staging.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._staging.__exit__(*error)

    def write_params(
        self, parts: Iterable[tuple[ParamSpec, int | slice, np.ndarray | QTensor]]
    ) -> None:
        """Takes every layer of every row of the table once (rows of an unstacked one in order).

        A part is (row, layer, that layer's weight), or (row, slice of rows, these rows) in steps
        of TABLE_ROWS. Memory holds one part at a time.
        """
        total = sum(leaf.num_bytes for leaf in self._leaves.values())
        self._staging.check_free(total)
        handler = _StreamHandler(_named_arrays(parts))
        registry = ocp.type_handlers.create_type_handler_registry((_StoredLeaf, handler))
        tree = nest({tuple(name.split(".")): leaf for name, leaf in self._leaves.items()})
        orbax = ocp.PyTreeCheckpointHandler(
            type_handler_registry=registry, use_ocdbt=False, use_zarr3=True
        )
        try:
            with ocp.Checkpointer(orbax) as saver:
                saver.save(self._staging.folder / "params", args=ocp.args.PyTreeSave(tree))
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error}") from error
        finally:
            handler.stopped = True

    def copy_sidecars(self, folder: pathlib.Path) -> list[str]:
        """Copies config and tokenizer files; returns the names that `folder` does not have."""
        return copy_sidecars(folder, self._staging.folder)

    def commit(self, fingerprint: str) -> Manifest:
        """Writes the manifest and moves the checkpoint into place."""
        manifest = Manifest(**self._about, fingerprint=fingerprint)
        write_json(self._staging.folder / MANIFEST_NAME, manifest.to_dict())
        self._staging.commit()
        return manifest


class StagedFolder:
    """A folder that grows under a hidden name beside its own and is renamed when complete.

    An existing target is refused, or with `overwrite` replaced at the end; then it must be empty
    or hold the file `mark`, for a mistyped path must not cost a home folder.
    """

    def __init__(self, path: pathlib.Path, mark: str, *, overwrite: bool):
        self.path = pathlib.Path(path).absolute()
        self.folder = self.path.with_name(f".{self.path.name}.partial")
        if os.path.lexists(self.path):
            if not overwrite:
                raise InputError(f"{path} already exists; give another path or --overwrite")
            if not self.path.is_dir() or (any(self.path.iterdir()) and not _has(self.path, mark)):
                raise InputError(f"{path} is no folder with a {mark}; it is not overwritten")

    def __enter__(self) -> "StagedFolder":
        try:
            shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was killed
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error}") from error
        return self

    def __exit__(self, *error: Any) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def check_free(self, num_bytes: int) -> None:
        if (free := shutil.disk_usage(self.folder).free) < num_bytes:
            raise InputError(
                f"{self.path.parent} has {free} bytes free, {num_bytes} are needed; free some space"
            )

    def commit(self) -> None:
        old = self.path.with_name(f".{self.path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if os.path.lexists(self.path):
            os.rename(self.path, old)
        os.rename(self.folder, self.path)
        sync_folder(self.path.parent)
        shutil.rmtree(old, ignore_errors=True)


def copy_sidecars(source: pathlib.Path, target: pathlib.Path) -> list[str]:
    """Copies config and tokenizer files; returns the names that `source` does not have."""
    for name in SIDECAR_NAMES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    return [name for name in SIDECAR_NAMES if not (source / name).is_file()]


def row_slices(spec: ParamSpec) -> list[slice]:
    """The slices in which the rows of an unstacked weight are written."""
    rows = spec.shape[0]
    return [slice(i, min(i + TABLE_ROWS, rows)) for i in range(0, rows, TABLE_ROWS)]


@dataclasses.dataclass(frozen=True)
class _StoredLeaf:
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
        return _array_spec(folder) | {
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


def _array_spec(folder: pathlib.Path) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}


def _stored_leaves(cfg: ModelConfig, dtype: Any, fmt: QuantFormat | None) -> dict[str, _StoredLeaf]:
    """Name -> array, for every array of the checkpoint."""
    abstract = traverse_util.flatten_dict(_plain(abstract_params(cfg, dtype, fmt)))
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
        leaves[".".join(path)] = _StoredLeaf(
            shape, np.dtype(struct.dtype), lead + unit, lead + piece
        )
    return leaves


def _named_arrays(
    parts: Iterable[tuple[ParamSpec, int | slice, np.ndarray | QTensor]],
) -> Iterator[tuple[str, int | slice, np.ndarray]]:
    for spec, index, leaf in parts:
        name = ".".join(spec.path)
        if isinstance(leaf, QTensor):
            for field, array in _plain(leaf).items():
                yield f"{name}.{field}", index, np.asarray(array)
        else:
            yield name, index, leaf


class _StreamHandler(ocp.type_handlers.TypeHandler):
    """Lets Orbax own folder, metadata and commit while the arrays arrive in pieces."""

    def __init__(self, arrays: Iterator[tuple[str, int | slice, np.ndarray]]):
        self._arrays = arrays
        self.stopped = False  # an interrupt reaches the main thread only; the work is in another

    def typestr(self) -> str:
        return "np.ndarray"  # read back by the stock handlers, without a sharding on record

    async def metadata(self, infos):
        raise NotImplementedError("only writes; checkpoints are read by the stock handlers")

    async def deserialize(self, infos, args=None):
        raise NotImplementedError("only writes; checkpoints are read by the stock handlers")

    async def serialize(self, values, infos, args=None):
        return [
            ocp.future.CommitFutureAwaitingContractedSignals(
                self._write(values, infos), name="stream"
            )
        ]

    async def _write(self, values: list[_StoredLeaf], infos: list[Any]) -> None:
        stores, missing = {}, {}
        for leaf, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            spec = leaf.spec(info.parent_dir / info.name)
            stores[info.name] = await ts.open(spec, create=True, open=True)
            missing[info.name] = leaf.size
        for name, index, array in self._arrays:
            if self.stopped:
                raise asyncio.CancelledError
            store, leaf_part = stores[name], stores[name][index]
            if leaf_part.shape != array.shape or store.dtype.numpy_dtype != array.dtype:
                raise ValueError(
                    f"{name}[{index}] got {array.dtype} {array.shape}; expected "
                    f"{store.dtype.name} {leaf_part.shape}"
                )
            await leaf_part.write(array)
            missing[name] -= array.size
        if wrong := {name: count for name, count in missing.items() if count}:
            raise ValueError(f"elements not written, or written twice: {wrong}")


def _open_arrays(path: pathlib.Path, manifest: Manifest) -> dict[str, ts.TensorStore]:
    """Opens every array and compares shape and dtype with what the manifest implies."""
    leaves = _stored_leaves(manifest.config, manifest.dtype, manifest.quantization)
    arrays = {}
    for name, leaf in leaves.items():
        spec = _array_spec(path / "params" / name) | {"fill_missing_data_reads": False}
        with _damage_named(path):
            array = arrays[name] = ts.open(spec, open=True, read=True).result()
        if array.shape != leaf.shape or array.dtype.numpy_dtype != leaf.dtype:
            raise InputError(
                f"checkpoint {path} is damaged: {name} is stored as {array.dtype.name} "
                f"{array.shape}, its manifest implies {leaf.dtype} {leaf.shape}; convert it again"
            )
    return arrays


@contextlib.contextmanager
def _damage_named(path: pathlib.Path) -> Iterator[None]:
    """Turns what Orbax and tensorstore raise for damaged files into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        cause = error
        while cause.__cause__ is not None:  # Orbax wraps the useful text in pages of others
            cause = cause.__cause__
        if isinstance(cause, jax.errors.JaxRuntimeError | MemoryError):
            raise  # the device is too small: no fault of the files
        text = " ".join(str(cause).split())[:300]
        raise InputError(
            f"checkpoint {path} is damaged: {text}; convert or copy it again"
        ) from error


@contextlib.contextmanager
def _without_false_alarm() -> Iterator[None]:
    """Drops a warning of Orbax that every zarr3 checkpoint is perhaps malformed.

    It looks for data files by the names of OCDBT and zarr2 only, and logs to the root logger.
    """

    def keep(record: logging.LogRecord) -> bool:
        return "TensorStore data files not found" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)


def _plain(tree: Any) -> Any:
    """The tree with each QTensor as a dict of its arrays, None left out."""
    if isinstance(tree, QTensor):
        fields = ("data", "scale", "scale_absmax", "scale_offset")
        return {f: getattr(tree, f) for f in fields if getattr(tree, f) is not None}
    if isinstance(tree, dict):
        return {name: _plain(value) for name, value in tree.items()}
    return tree


def _pop(tree: dict[str, Any], path: tuple[str, ...]) -> Any:
    """Takes a leaf out of the tree, so that it dies as soon as its cast replaces it."""
    for name in path[:-1]:
        tree = tree[name]
    return tree.pop(path[-1])


def _has(folder: pathlib.Path, name: str) -> bool:
    return (folder / name).is_file()
