"""Writes checkpoints as a stream; where the weights come from is not known here.

The arrays are written by an Orbax TypeHandler of ours, because Orbax's own wants each leaf whole in
memory (32 GB for one of 72B) and stores no checksums: a flipped bit would load in silence.
"""

import asyncio
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.files import write_json
from qwen_jax.layout import StoredLeaf, plain_arrays, stored_leaves
from qwen_jax.manifest import MANIFEST_NAME, Manifest
from qwen_jax.params import ParamSpec, nest
from qwen_jax.quant import QTensor, QuantFormat
from qwen_jax.staging import StagedFolder

SIDECAR_NAMES = ("config.json", "generation_config.json", "tokenizer_config.json", "qwen.tiktoken")


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
        self._leaves = stored_leaves(cfg, dtype, fmt)
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
        registry = ocp.type_handlers.create_type_handler_registry((StoredLeaf, handler))
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


def copy_sidecars(source: pathlib.Path, target: pathlib.Path) -> list[str]:
    """Copies config and tokenizer files; returns the names that `source` does not have."""
    for name in SIDECAR_NAMES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    return [name for name in SIDECAR_NAMES if not (source / name).is_file()]


def _named_arrays(
    parts: Iterable[tuple[ParamSpec, int | slice, np.ndarray | QTensor]],
) -> Iterator[tuple[str, int | slice, np.ndarray]]:
    for spec, index, leaf in parts:
        name = ".".join(spec.path)
        if isinstance(leaf, QTensor):
            for field, array in plain_arrays(leaf).items():
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

    async def _write(self, values: list[StoredLeaf], infos: list[Any]) -> None:
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
