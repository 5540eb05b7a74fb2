"""Folders that appear under their name only when they are complete."""

import os
import pathlib
import shutil
from typing import Any

from qwen_jax.errors import InputError
from qwen_jax.files import sync_folder


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


def _has(folder: pathlib.Path, name: str) -> bool:
    return (folder / name).is_file()
