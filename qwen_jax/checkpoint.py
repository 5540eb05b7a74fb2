"""Checkpoints on disk: written as a stream, read as slices, whole or not there at all.

    CKPT/
        manifest.json     config, dtype, quantization, fingerprint; written last
        params/           Orbax; one zarr3 array for each leaf, one file for each layer of it
            layers.attn.wqkv/           (quantized: layers.attn.wqkv.data, .scale, ...)
        config.json, generation_config.json, tokenizer_config.json, qwen.tiktoken

Orbax is what reads it; one layer at a time on the host goes past it, straight to tensorstore.
Writing is in checkpoint_writer.py, the cut into files in layout.py.
"""

import contextlib
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp_v1
import tensorstore as ts
from flax import traverse_util
from jax.sharding import Mesh, SingleDeviceSharding

from qwen_jax.errors import InputError
from qwen_jax.layout import array_spec, plain_arrays, stored_leaves
from qwen_jax.manifest import DTYPES, MANIFEST_NAME, Manifest, load_manifest
from qwen_jax.params import ParamSpec, abstract_params, nest, param_table
from qwen_jax.quant import QTensor

__all__ = ["DTYPES", "MANIFEST_NAME", "Manifest", "StoredParams", "load_manifest", "load_params"]

_READ_BYTES = 1_000_000_000  # in flight while loading, beside the arrays themselves


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

    wanted = jax.tree.map(target, plain_arrays(abstract))
    context = ocp_v1.Context()
    # Orbax refuses a read, rounded outwards to whole pieces, that is not below its limit.
    stored = stored_leaves(manifest.config, manifest.dtype, manifest.quantization)
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

    def array(self, name: str) -> ts.TensorStore:
        """One array by its dotted name; reading it raises ValueError where it is damaged."""
        return self._arrays[name]

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


def _open_arrays(path: pathlib.Path, manifest: Manifest) -> dict[str, ts.TensorStore]:
    """Opens every array and compares shape and dtype with what the manifest implies."""
    leaves = stored_leaves(manifest.config, manifest.dtype, manifest.quantization)
    arrays = {}
    for name, leaf in leaves.items():
        spec = array_spec(path / "params" / name) | {"fill_missing_data_reads": False}
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


def _pop(tree: dict[str, Any], path: tuple[str, ...]) -> Any:
    """Takes a leaf out of the tree, so that it dies as soon as its cast replaces it."""
    for name in path[:-1]:
        tree = tree[name]
    return tree.pop(path[-1])
