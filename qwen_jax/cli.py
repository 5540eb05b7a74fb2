"""What the command lines share: a dataclass becomes flags, every error becomes one line.

    exit 2   wrong usage: an unknown flag, a missing, malformed or impossible value (UsageError)
    exit 1   the work failed for a reason the user can mend (InputError, a full disk, memory)
    exit 130 interrupted (Ctrl-C), 143 terminated, 141 nobody reads the output any more

Flags take --lora_rank and --lora-rank alike.
"""

import contextlib
import dataclasses
import errno
import io
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import jax
import tyro

from qwen_jax import processes
from qwen_jax.errors import InputError, UsageError, did_you_mean

Args = TypeVar("Args")

_REMEDIES = {
    errno.ENOSPC: "; free some space",
    errno.EDQUOT: "; free some of your quota",
    errno.EACCES: "; use a folder with the right to it",
    errno.EPERM: "; use a folder with the right to it",
    errno.EROFS: "; use a folder that can be written",
}
_KINDS = {"INT": "a whole number", "FLOAT": "a number"}


def parse(kind: type[Args], argv: Sequence[str] | None = None) -> Args:
    """Fills the dataclass `kind` from the command line; prints help or one line and exits 2."""
    argv = _switched(kind, sys.argv[1:] if argv is None else argv)
    errors, page = io.StringIO(), _Page()
    unknown: list[str] = []
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(page):
            parsed, unknown = tyro.cli(
                kind, prog=_program(), args=argv, use_underscores=True, return_unknown_args=True
            )
    except SystemExit as stop:
        if stop.code:
            # A misspelt flag is the likely reason for a missing one: it is named first.
            _refuse_unknown(kind, [word for word in argv if word.startswith("--")])
            _usage_error(_plain_message(_one_line(errors.getvalue()), kind, argv))
        print(_without_none(page.getvalue()), end="")
        raise
    _refuse_unknown(kind, unknown)
    return parsed


class _Page(io.StringIO):
    """Help text; tyro asks its output for the encoding before it draws a box."""

    def __init__(self):
        self.encoding_of_terminal = getattr(sys.stdout, "encoding", None)
        super().__init__()

    @property
    def encoding(self) -> str | None:
        return self.encoding_of_terminal


def _without_none(page: str) -> str:
    """Blanks `{None}|` and `(default: None)`: the text of a flag says what unset means."""
    page = re.sub(r"\{None\}\|(\S+)", r"\1       ", page)

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^│\n]", " ", match[0])

    page = re.sub(r"\(default:[ │\n]+None\)", blank, page)
    return re.sub(r"(?m)^│ +│\n", "", page)


def _program() -> str | None:
    """`python -m train.lora`, as it was typed."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return f"python -m {spec.name}" if spec else None


def _switches(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if isinstance(field.default, bool)]


def _switched(kind: type, argv: Sequence[str]) -> list[str]:
    """`--bf16 true` and `--bf16=false`, as transformers takes them, as `--bf16` and `--no_bf16`."""
    switches, words, result = _switches(kind), list(argv), []
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in switches:
            if not equals and words and words[0].lower() in ("true", "false"):
                value = words.pop(0)
            if (equals or value) and value.lower() not in ("true", "false"):
                _usage_error(f"{flag} is {value!r}; expected true or false, or no value")
            word = f"--no_{name}" if value.lower() == "false" else f"--{name}"
        result.append(word)
    return result


def _refuse_unknown(kind: type, words: Sequence[str]) -> None:
    """Exits 2 if one of the words is no flag of the program."""
    fields = [field.name for field in dataclasses.fields(kind)]
    known = [*fields, *(f"no_{name}" for name in _switches(kind)), "help"]
    for word in words:
        flag = word.partition("=")[0]
        name = flag.lstrip("-").replace("-", "_")
        if not flag.startswith("--") or name not in known:
            _usage_error(f"unknown argument {word!r}{_nearest(name, known)}")


def _nearest(name: str, known: Sequence[str]) -> str:
    hint = did_you_mean(name.lower(), known)
    return re.sub(r"'(\w+)'", r"'--\1'", hint)


def _usage_error(message: str) -> None:
    _fail(f"error: {' '.join(message.split())} (see --help)", 2)


def _one_line(box: str) -> str:
    """The message inside the box that tyro draws, in ASCII where the terminal knows no more."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│╭╮╰╯ ") for line in text.splitlines()]
    lines = [line for line in lines if line and not set(line) <= set("─- ")]
    lines = [line for line in lines[1:] if not re.match(r"For full helptext|.*--help$", line)]
    return " ".join(lines) or "wrong arguments"


def _plain_message(text: str, kind: type, argv: Sequence[str]) -> str:
    """tyro's message in our words; one that is not known stays as it is."""
    given = [word.partition("=")[0].replace("-", "_").lstrip("_") for word in argv]
    if text.startswith("Missing from"):
        unset = dataclasses.MISSING
        missing = [
            f"--{field.name}"
            for field in dataclasses.fields(kind)
            if field.default is unset and field.default_factory is unset and field.name not in given
        ]
        return f"{' and '.join(missing)} must be given" if missing else text
    if match := re.match(r"Missing value for argument '(--\S+)'", text):
        flag = match[1]
        return f"{flag} needs a value; if it begins with a dash, write {flag}=VALUE"
    if match := re.match(r"Error parsing (--\S+): .*Argument helptext: --\S+ (\S+)", text):
        flag, expected = match[1], match[2].removeprefix("{None}|")
        value = _last_value(flag, argv)
        return f"{flag} is {value!r}; expected {_KINDS.get(expected, expected)}"
    return text


def _last_value(flag: str, argv: Sequence[str]) -> str:
    value = ""
    for word, after in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, own = word.partition("=")
        if "--" + name.lstrip("-").replace("-", "_") == flag:
            value = own if equals else after
    return value


def run(main: Callable[[], None]) -> None:
    """Runs a program's main; what the user or the machine caused is one line, see the module."""
    # force: a library that logs while it is imported has set the root up already.
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    for noisy in ("jax", "orbax"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # Orbax logs through absl, as an error with its traceback, what it raises as well.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that cannot show a character
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _terminable():
            main()
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a full disk or a closed pipe can be caught
    except KeyboardInterrupt:
        _fail("interrupted", 128 + signal.SIGINT)
    except SystemExit as stop:
        if stop.code == 128 + signal.SIGTERM:
            _fail("terminated", 128 + signal.SIGTERM)
        raise
    except UsageError as error:
        _usage_error(str(error))
    except BrokenPipeError:
        _fail(None, 128 + signal.SIGPIPE)
    except Exception as error:
        if (text := _cause(error)) is None:
            if processes.several():
                traceback.print_exc()
                processes.leave_at_once(1)
            raise
        _fail(f"error: {' '.join(text.split())}", 1)


def _fail(line: str | None, code: int) -> None:
    """Ends the program; either stream may be what failed."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        # What is still buffered has nowhere to go; Python would complain about it at exit.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if line is not None:
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)
    processes.leave_at_once(code)
    raise SystemExit(code) from None


def _cause(error: Exception) -> str | None:
    """What the user is told; None for a bug of ours, which keeps its traceback."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{where}{error.strerror}{_REMEDIES.get(error.errno, '')}"
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        first = str(error).partition("\n")[0]
        return f"out of device memory ({first}); use more devices, shorter or fewer rows at once"
    if isinstance(error, MemoryError):
        return "out of memory on the host; close other programs or use a larger machine"
    return None


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds like an error, so that nothing half-written stays behind."""

    def stop(number, frame):
        raise SystemExit(128 + number)  # said later: the signal may have come in a print

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
