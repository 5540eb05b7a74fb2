"""What the command lines share: a dataclass becomes flags, every error becomes one line.

    exit 2   wrong usage: an unknown flag, a missing or malformed value
    exit 1   the work failed for a reason the user can mend (InputError)
    exit 130 interrupted

Flags take --lora_rank and --lora-rank alike.
"""

import contextlib
import io
import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from qwen_jax.errors import InputError, did_you_mean

Args = TypeVar("Args")


def parse(kind: type[Args], argv: Sequence[str] | None = None) -> Args:
    """Fills the dataclass `kind` from the command line; prints help or one line and exits 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    errors = io.StringIO()
    unknown: list[str] = []
    try:
        with contextlib.redirect_stderr(errors):
            parsed, unknown = tyro.cli(
                kind, args=argv, use_underscores=True, return_unknown_args=True
            )
    except SystemExit as stop:
        if stop.code:
            _usage_error(_one_line(errors.getvalue()))
        raise
    if unknown:
        known = [f"--{name}" for name in kind.__dataclass_fields__]
        flag = unknown[0].partition("=")[0].replace("-", "_").replace("__", "--", 1)
        _usage_error(f"unknown argument {unknown[0]!r}{did_you_mean(flag, known)}")
    return parsed


def _usage_error(message: str) -> None:
    print(f"error: {message} (see --help)", file=sys.stderr)
    raise SystemExit(2)


def _one_line(box: str) -> str:
    """The message inside the box that tyro draws."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│╭╮╰╯ ") for line in text.splitlines()]
    lines = [line for line in lines if line and not set(line) <= set("─ ")]
    lines = [line for line in lines if not re.match(r"^─|.*─+$|For full helptext|.*--help$", line)]
    return " ".join(lines) or "wrong arguments"


def run(main: Callable[[], None]) -> None:
    """Runs a program's main: an InputError is one line and exit 1, Ctrl-C is exit 130."""
    # force: a library that logs while it is imported has set the root up already.
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    for noisy in ("absl", "jax", "orbax"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        main()
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
