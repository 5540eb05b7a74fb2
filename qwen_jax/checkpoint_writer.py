"""Writes checkpoints part by part; a run that was killed goes on where it was.

A part is one layer of a stacked weight, or TABLE_ROWS rows of another: with each of its arrays it
fills whole files. Orbax first makes the folder, its metadata and the empty arrays (its own writer
wants each leaf whole in memory, 32 GB for one of 72B, and stores no checksums); then tensorstore
writes the files, each under a temporary name first, and a journal records every finished part.
Where the weights come from is not known here.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorstore as ts

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.files import write_json
from qwen_jax.journal import Journal, boot_id
from qwen_jax.layout import leaf_checksum, part_number, stored_leaves, written_spec
from qwen_jax.manifest import MANIFEST_NAME, Manifest, load_manifest
from qwen_jax.orbax_folder import make_empty_arrays
from qwen_jax.params import ParamSpec
from qwen_jax.quant import QuantFormat
from qwen_jax.staging import StagedFolder

SIDECAR_NAMES = ("config.json", "generation_config.json", "tokenizer_config.json", "qwen.tiktoken")

_log = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes one checkpoint; nothing is at `path` before `commit`.

    with CheckpointWriter(path, cfg, "bfloat16", fmt) as writer:
        if not writer.has(spec, index, key):
            writer.write(spec, index, arrays, key)()
        writer.copy_sidecars(folder)
        writer.commit(fingerprint)

    Left without `commit`, the finished parts stay in a hidden folder beside `path` and the next
    writer with the same arguments has them; with others it is refused, or with `overwrite` removes
    them. Raises InputError for all of that, a full disk, and another process at the same output.
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
        self._manifest = Manifest(
            config=cfg, dtype=dtype, quantization=fmt, fingerprint="", checksums={}
        )
        self._leaves = stored_leaves(cfg, dtype, fmt)
        self._overwrite = overwrite
        self._stores: dict[str, ts.TensorStore] = {}
        self._staging = StagedFolder(path, MANIFEST_NAME, overwrite=overwrite)
        self.path = self._staging.path
        self._params = self._staging.folder / "params"

    @property
    def unfinished(self) -> pathlib.Path:
        """Where the work so far is kept."""
        return self._staging.work

    @property
    def parts_done(self) -> int:
        return len(self._journal.parts)

    def published_by_a_killed_run(self, fingerprint: str) -> Manifest | None:
        """The manifest at `path`, if all that a run with the same result left to do was cleaning.

        Then this cleans up, and there is nothing to write.
        """
        published = (self.path / MANIFEST_NAME).is_file()
        if not published or not self._staging.only_cleaning_is_left():
            return None
        found = load_manifest(self.path)
        if found == dataclasses.replace(
            self._manifest, fingerprint=fingerprint, checksums=found.checksums
        ):
            self._staging.clean_up()
            return found
        return None

    def __enter__(self) -> "CheckpointWriter":
        self._staging.__enter__()
        try:
            self._go_on_or_begin()
        except BaseException:
            self._staging.__exit__()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        if self._staging.keep and not self._journal.parts:
            self._staging.keep = False
        self._staging.__exit__(*error)

    def has(self, spec: ParamSpec, index: int | slice, key: str) -> bool:
        """Whether an earlier run wrote the part from the same `key`."""
        done = self._journal.parts.get(_part_name(spec, index))
        return done is not None and done["key"] == key

    def array_shapes(
        self, spec: ParamSpec, index: int | slice
    ) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Array name ("" if not quantized, else the QTensor's) -> shape and dtype of a part."""
        name = ".".join(spec.path)
        shapes = {}
        for field in self._fields(spec):
            leaf = self._leaves[f"{name}.{field}" if field else name]
            rows = () if spec.stacked else (len(range(*index.indices(leaf.shape[0]))),)
            shapes[field] = (*rows, *leaf.shape[1:]), leaf.dtype
        return shapes

    def write(
        self, spec: ParamSpec, index: int | slice, arrays: Mapping[str, np.ndarray], key: str = ""
    ) -> Callable[[], None]:
        """Starts to write a part; the function returned waits until it is done and records it.

        The arrays must not change afterwards: they are not copied.
        """
        expected = self.array_shapes(spec, index)
        got = {field: (array.shape, array.dtype) for field, array in arrays.items()}
        if got != expected:
            raise ValueError(f"{_part_name(spec, index)} got {got}; expected {expected}")
        name = ".".join(spec.path)
        paths, writes = [], []
        for field, array in arrays.items():
            leaf = f"{name}.{field}" if field else name
            target = self._store(leaf)[index]
            writes.append(target.write(array, can_reference_source_data_indefinitely=True))
            paths.append((leaf, self._leaves[leaf].files()[part_number(spec, index)]))

        def finish() -> None:
            with _write_errors_named(self.path):
                for write in writes:
                    write.result()
            for leaf, file in paths:
                _start_writeback(self._params / leaf / file)
            files = {f"{leaf}/{file}": self._digest(leaf, file) for leaf, file in paths}
            self._journal.add(_part_name(spec, index), key, files)

        return finish

    def copy_sidecars(self, folder: pathlib.Path) -> list[str]:
        """Copies config and tokenizer files; returns the names that `folder` does not have."""
        return copy_sidecars(folder, self._staging.folder)

    def commit(self, fingerprint: str) -> Manifest:
        """Writes the manifest and moves the checkpoint into place."""
        digests = {f: d for part in self._journal.parts.values() for f, d in part["files"].items()}
        wanted = {
            name: [f"{name}/{file}" for file in leaf.files()] for name, leaf in self._leaves.items()
        }
        if missing := [f for files in wanted.values() for f in files if f not in digests]:
            raise ValueError(f"{len(missing)} files were not written, the first is {missing[0]}")
        manifest = dataclasses.replace(
            self._manifest,
            fingerprint=fingerprint,
            checksums={
                name: leaf_checksum([digests[f] for f in files]) for name, files in wanted.items()
            },
        )
        with _write_errors_named(self.path):
            write_json(self._staging.folder / MANIFEST_NAME, manifest.to_dict())
            self._staging.commit()
        return manifest

    def _go_on_or_begin(self) -> None:
        """Takes over what an earlier run left, if it was to make the same."""
        about = self._about()
        self._staging.keep = True
        self._journal = Journal(self._staging.work / "journal.jsonl")
        old = self._journal.about
        if old is not None and old != about:
            differing = [k for k in about if old.get(k) != about[k]] or sorted(set(old) - {*about})
            text = ", ".join(
                f"{k} {_brief(old.get(k))} (now {_brief(about[k])})" for k in differing
            )
            if not self._overwrite:
                raise InputError(
                    f"{self._staging.work} holds unfinished work of other arguments: {text}; "
                    "finish that, remove it with --overwrite, or give another output"
                )
            _log.info("removing unfinished work of other arguments: %s", text)
        if old == about and self._params.is_dir():
            self._forget_damaged_parts()
        else:
            self._staging.keep = False
            self._staging.clear()
            with _write_errors_named(self.path):
                make_empty_arrays(self._params, self._leaves)
            self._journal.begin(about)
        done = [f for part in self._journal.parts.values() for f in part["files"]]
        written = sum((self._params / file).stat().st_size for file in done)
        total = sum(leaf.num_bytes for leaf in self._leaves.values())
        self._staging.check_free(total - written)
        self._staging.keep = True

    def _about(self) -> dict[str, Any]:
        about = self._manifest.to_dict()
        del about["fingerprint"], about["checksums"]
        files = {name: list(leaf.file_shape) for name, leaf in self._leaves.items()}
        return json.loads(json.dumps(about | {"files": files}))

    def _forget_damaged_parts(self) -> None:
        # Files that a killed run had not finished: of arrays, and of its manifest.
        for path in (*self._params.rglob("*.__lock"), *self._staging.folder.glob(".*.partial")):
            path.unlink()
        for name, part in list(self._journal.parts.items()):
            try:
                for file, digest in part["files"].items():
                    leaf, _, inner = file.partition("/")
                    if self._digest(leaf, inner) != digest:
                        raise ValueError(f"{file} has changed")
                    if part["boot"] != boot_id() or not boot_id():
                        self._read(leaf, inner)
            except (OSError, ValueError) as error:
                _log.info("writing %s again: %s", name, error)
                self._journal.drop(name)

    def _digest(self, leaf: str, file: str) -> str:
        return self._leaves[leaf].file_digest(self._params / leaf / file)

    def _read(self, leaf: str, file: str) -> None:
        """Reads a file whole, which compares its checksums; ValueError if they differ."""
        number = self._leaves[leaf].files().index(file)
        for index in self._leaves[leaf].read_steps(number):
            self._store(leaf)[index].read().result()

    def _store(self, leaf: str) -> ts.TensorStore:
        if leaf not in self._stores:
            with _write_errors_named(self.path):
                # Synced once, at the commit: waiting for the disk after each file takes 3x as long.
                spec = written_spec(self._params / leaf) | {"context": {"file_io_sync": False}}
                self._stores[leaf] = ts.open(spec, open=True).result()
        return self._stores[leaf]

    def _fields(self, spec: ParamSpec) -> list[str]:
        fmt = spec.format(self._manifest.quantization)
        return [""] if fmt is None else list(fmt.shapes(spec.out_shape, spec.in_size))


def copy_sidecars(source: pathlib.Path, target: pathlib.Path) -> list[str]:
    """Copies config and tokenizer files; returns the names that `source` does not have."""
    for name in SIDECAR_NAMES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    return [name for name in SIDECAR_NAMES if not (source / name).is_file()]


def _part_name(spec: ParamSpec, index: int | slice) -> str:
    return f"{'.'.join(spec.path)} {part_number(spec, index)}"


def _brief(value: Any) -> str:
    """One of the values that say what a checkpoint is, for a line of error."""
    if isinstance(value, dict):
        return str(value.get("kind", "differs"))
    return "none" if value is None else str(value)


def _start_writeback(path: pathlib.Path) -> None:
    """Lets the disk begin, without waiting, so that little is left to sync at the commit."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _write_errors_named(path: pathlib.Path) -> Iterator[None]:
    """Turns what the system and tensorstore raise into one line."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())[:300]
        raise InputError(f"{path} cannot be written: {text}") from error
