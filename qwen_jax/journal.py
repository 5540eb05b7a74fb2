"""Which parts of a folder are written: one JSON line each, appended after the part's files.

    {"about": {...}}                                            what all of it is, on the first line
    {"part": "layers.mlp.up 3", "key": ..., "boot": ..., "files": {file: digest}}

A line that a kill cut off does not count. A part counts only for the same `key` (what it was made
from). `boot` tells whether the machine was restarted since: files need not have reached the disk
then. What a part or a digest is, is not known here.
"""

import json
import os
import pathlib
from typing import Any

from qwen_jax.errors import InputError

_BOOT_ID = pathlib.Path("/proc/sys/kernel/random/boot_id")


class Journal:
    """`parts`: name -> its line. `about` is None until `begin`."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.about: dict[str, Any] | None = None
        self.parts: dict[str, dict[str, Any]] = {}
        if not path.is_file():
            return
        lines = path.read_bytes().split(b"\n")
        if lines.pop():  # the last line is empty unless a kill cut it off
            os.truncate(path, sum(len(line) + 1 for line in lines))
        try:
            values = [json.loads(line) for line in lines]
            self.parts = {value["part"]: value for value in values[1:]}
            self.about = values[0]["about"] if values else None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(
                f"{path} is damaged, so what is beside it cannot be gone on with; "
                f"remove the folder {path.parent}"
            ) from None

    def begin(self, about: dict[str, Any]) -> None:
        self.about, self.parts = about, {}
        self.path.write_text(json.dumps({"about": about}) + "\n")

    def add(self, part: str, key: str, files: dict[str, str]) -> None:
        value = {"part": part, "key": key, "boot": boot_id(), "files": files}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")  # one write call, so a kill leaves all or a stub
        self.parts[part] = value

    def drop(self, part: str) -> None:
        """Forgets a part whose files are not as they were; its next `add` counts."""
        del self.parts[part]


def boot_id() -> str:
    """Changes with every start of the machine; empty where that is not told."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else ""
