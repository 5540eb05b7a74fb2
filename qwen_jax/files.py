"""Small files read strictly and written atomically: JSON in, anything out.

A reader sees the old content or the new, never half of it, also after a crash.
"""

import collections
import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from qwen_jax.errors import InputError


def read_json_object(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON file that must hold an object; every fault is an InputError with its place."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads(object_pairs_hook=...): a dict, or ValueError if a key stands twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = counts.most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} stands twice")
    return result


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `path`; on success it is synced and renamed onto `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: pathlib.Path) -> None:
    """Makes renames and new names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: pathlib.Path, value: Any) -> None:
    with replacing(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False)
        temporary.write_text(text + "\n", encoding="utf-8")
