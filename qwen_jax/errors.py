"""The one kind of error that a user is meant to read.

Everything a user can cause (a corrupt shard, a misspelt target, a mesh that does not fit) raises
`InputError`; programs print its single line and exit 1, or 2 if the command line alone is wrong
(`UsageError`). Any other exception is a bug of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """Bad input: the message says what was got, what was expected and what to do, in one line."""


class UsageError(InputError):
    """A flag whose value no model and no data could make right; programs exit 2."""


def shown(value: Any) -> str:
    """A value out of a file as it can stand in a line of error: short, printable, never deep."""
    if isinstance(value, dict | list):
        return f"a {type(value).__name__}"  # it may nest too deep for repr
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` for the known name nearest to `name`, or an empty string."""
    if len(name) > 200:
        return ""  # the comparison takes the square of the length
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
