"""Folders that appear under their name when they are complete; one process at a time writes them.

    .NAME.partial/     locked while a process works on it; the lock dies with the process
        NAME/          what will become NAME, in one rename
        ...            what its writer notes about the work so far

What the folder holds is not known here.
"""

import errno
import fcntl
import os
import pathlib
import shutil
from typing import Any

from qwen_jax.errors import InputError
from qwen_jax.files import sync_folder


class StagedFolder:
    """A folder that grows under a hidden name beside its own and is renamed when complete.

    An existing target is refused, or with `overwrite` replaced at the end; then it must be empty
    or hold the file `mark`, for a mistyped path must not cost a home folder. On leaving without
    `commit`, what was written is removed, unless `keep` is set by then.
    """

    def __init__(self, path: str | os.PathLike, mark: str, *, overwrite: bool):
        self.path = pathlib.Path(path).absolute()
        self.work = self.path.with_name(f".{self.path.name}.partial")
        self.folder = self.work / self.path.name
        self.keep = False
        self._mark, self._overwrite = mark, overwrite
        self._lock: int | None = None

    def only_cleaning_is_left(self) -> bool:
        """Whether a run was killed after the rename of its `commit`."""
        return self.path.is_dir() and self.work.is_dir() and not self.folder.is_dir()

    def __enter__(self) -> "StagedFolder":
        """Takes the lock; what a killed run left in `work` is there until `clear`."""
        if os.path.lexists(self.path):
            if not self._overwrite:
                raise InputError(f"{self.path} already exists; give another path or --overwrite")
            if not self.path.is_dir() or (any(self.path.iterdir()) and not self._has_mark()):
                raise InputError(
                    f"{self.path} is no folder with a {self._mark}; it is not overwritten"
                )
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock = _lock_folder(self.work)
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error}") from error
        return self

    def __exit__(self, *error: Any) -> None:
        if not self.keep:
            shutil.rmtree(self.work, ignore_errors=True)
        os.close(self._lock)

    def clean_up(self) -> None:
        """Removes `work`, unless another process works there: InputError."""
        lock = _lock_folder(self.work)
        shutil.rmtree(self.work, ignore_errors=True)
        os.close(lock)

    def clear(self) -> None:
        """Removes what a killed run left and makes `folder`, empty."""
        try:
            for path in self.work.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.folder.mkdir()
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error}") from error

    def check_free(self, num_bytes: int) -> None:
        if (free := shutil.disk_usage(self.work).free) < num_bytes:
            raise InputError(
                f"{self.path.parent} has {free} bytes free, {num_bytes} are needed; free some space"
            )

    def _has_mark(self) -> bool:
        return (self.path / self._mark).is_file()

    def commit(self) -> None:
        """Syncs all files and puts `folder` in the place of `path`.

        A kill in between is mended by the next run.
        """
        for path in sorted(self.folder.rglob("*")):
            sync_folder(path) if path.is_dir() else _sync_file(path)
        if os.path.lexists(self.path):
            old = self.work / "replaced"
            shutil.rmtree(old, ignore_errors=True)
            os.rename(self.path, old)
        os.rename(self.folder, self.path)
        sync_folder(self.path.parent)
        self.keep = False


def _lock_folder(folder: pathlib.Path) -> int:
    """An open descriptor that holds the lock; InputError if another process does."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A run that ended between the two calls has removed what was opened.
        free = folder.exists() and os.path.samestat(os.fstat(lock), os.stat(folder))
    except OSError as error:
        free = error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN)  # file systems without locks
    if not free:
        os.close(lock)
        raise InputError(
            f"another process is writing {folder}; wait until it ends, or give another output"
        )
    return lock


def _sync_file(path: pathlib.Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
