"""A JSONL file of answers that survives a crash: rows land on disk as they finish.

    OUT.jsonl.partial    line 1: {"unfinished": {settings of the run}}, then a row for each answer
    OUT.jsonl            the rows alone, once all are there

A run that finds the partial file of the same settings goes on behind its last whole row. It knows
rows as JSON and nothing of models.
"""

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Sequence
from typing import Any, BinaryIO

from qwen_jax.errors import InputError
from qwen_jax.files import replacing

_HEADER = "unfinished"


class AnswersFile:
    """The rows of one run, in order; use it in a `with`.

    `settings` is what decides the text of a row, as JSON; `prompts` are what the rows to come hold
    under "prompt". Raises InputError if the partial file is that of another run, or in use.

    done   rows that an earlier run has written
    """

    def __init__(self, path: pathlib.Path, settings: dict[str, Any], prompts: Sequence[Any]):
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self._settings, self._prompts = settings, prompts
        self.done = 0

    def __enter__(self) -> "AnswersFile":
        try:
            self._file: BinaryIO = open(self.partial, "a+b")
        except OSError as error:
            raise InputError(f"{self.partial} cannot be written: {error.strerror}") from None
        try:
            self._lock()
            self._continue()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def add(self, row: dict[str, Any]) -> None:
        """Appends one row; it outlives this process from now on."""
        self._write(row)

    def finish(self) -> None:
        """Puts the rows under the file's own name and drops the partial file."""
        self._file.seek(0)
        self._file.readline()
        with replacing(self.path) as temporary, open(temporary, "wb") as target:
            target.writelines(self._file)
        self.partial.unlink()

    def _write(self, value: dict[str, Any]) -> None:
        self._file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another run is writing {self.partial}; wait for it or give another --output"
            ) from None
        except OSError:
            pass  # some network file systems have no locks; the rest works without

    def _continue(self) -> None:
        """Counts the rows that are there, and cuts off one that a crash left unfinished."""
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        header, *rows = [self._parsed(line) for line in whole.splitlines()] or [None]
        if header is None:
            self._write({_HEADER: self._settings})
            return
        self._compare(header.get(_HEADER), rows)
        self.done = len(rows)

    def _parsed(self, line: bytes) -> dict[str, Any]:
        with contextlib.suppress(ValueError):
            if isinstance(value := json.loads(line), dict):
                return value
        raise InputError(
            f"{self.partial} is damaged: {line[:60]!r}; delete it to begin anew"
        ) from None

    def _compare(self, before: Any, rows: list[dict[str, Any]]) -> None:
        begin_anew = f"repeat that command to go on, or delete {self.partial} to begin anew"
        now = json.loads(json.dumps(self._settings))
        if not isinstance(before, dict):
            raise InputError(f"{self.partial} is not the partial file of a run; move it away")
        changed = [key for key in now | before if now.get(key) != before.get(key)]
        if changed:
            what = ", ".join(
                f"{key} {json.dumps(before.get(key))} -> {json.dumps(now.get(key))}"
                for key in changed
            )
            raise InputError(f"{self.partial} holds rows of another run ({what}); {begin_anew}")
        for number, row in enumerate(rows, start=1):
            beyond = number > len(self._prompts)
            if beyond or row.get("prompt") != json.loads(json.dumps(self._prompts[number - 1])):
                raise InputError(
                    f"{self.partial}: answer {number} belongs to a prompt that the input no longer "
                    f"has in this place; {begin_anew}"
                )
