"""Command lines: both spellings of a flag, and one clear line with exit 2 for wrong usage."""

import dataclasses
import errno
import os
import signal
from typing import Literal

import jax
import pytest

from qwen_jax.cli import parse, run
from qwen_jax.errors import InputError, UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """A program."""

    input: str
    lora_rank: int = 8
    scale: float | None = None
    kind: Literal["red", "green"] = "red"
    bf16: bool = False


@pytest.mark.parametrize("flag", ["--lora_rank", "--lora-rank"])
def test_both_spellings_of_a_flag(flag):
    assert parse(Args, ["--input", "x", flag, "4"]) == Args(input="x", lora_rank=4)


@pytest.mark.parametrize(
    "words, value",
    [
        (["--bf16"], True),
        (["--bf16", "true"], True),
        (["--bf16=False"], False),
        (["--bf16", "--no_bf16"], False),
        (["--no-bf16"], False),
    ],
)
def test_switches_take_the_values_that_transformers_takes(words, value):
    assert parse(Args, [*words, "--input", "true"]) == Args(input="true", bf16=value)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--input", "x", "--lora_rnk", "4"], "did you mean '--lora_rank'"),
        # A flag that is missing because it was misspelt: the hint matters more.
        (["--inptu", "x"], "unknown argument '--inptu'; did you mean '--input'"),
        (["--input", "x", "-lora-rank", "4"], "did you mean '--lora_rank'"),
        (["--input", "x", "--lora_rank", "four"], "--lora_rank is 'four'; expected a whole number"),
        (["--input", "x", "--lora_rank=4.5"], "--lora_rank is '4.5'; expected a whole number"),
        (["--input", "x", "--scale", ""], "--scale is ''; expected a number"),
        (["--input", "x", "--kind", "blue"], "'red', 'green'"),
        (["--input", "x", "--bf16=yes"], "--bf16 is 'yes'; expected true or false"),
        (["--input", "x", "y"], "unknown argument 'y'"),
        (["--input"], "--input needs a value"),
        (["--input", "-x"], "write --input=VALUE"),
        ([], "--input must be given"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Args, argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1 and message in error


FULL = OSError(errno.ENOSPC, "No space left on device", "/disk/file")
LARGE = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nDetails")


@pytest.mark.parametrize(
    "error, code, message",
    [
        (InputError("two\nlines"), 1, "error: two lines"),
        (UsageError("--lora_rank is 0"), 2, "error: --lora_rank is 0 (see --help)"),
        (FULL, 1, "/disk/file: No space left on device; free some space"),
        (LARGE, 1, "out of device memory (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_failure_is_one_line_and_its_exit_code(error, code, message, capsys):
    def fail():
        raise error

    with pytest.raises(SystemExit) as stop:
        run(fail)
    assert stop.value.code == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said


def test_output_that_nobody_reads_is_no_error(capsys):
    def fail():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(SystemExit) as stop:
        run(fail)
    assert stop.value.code == 141 and capsys.readouterr().err == ""


def test_a_terminated_program_cleans_up(capsys):
    cleaned = []

    def work():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            cleaned.append(True)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        run(work)
    assert stop.value.code == 143 and cleaned == [True]
    assert capsys.readouterr().err == "terminated\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)
