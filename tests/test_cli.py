"""Command lines: both spellings of a flag, and one clear line with exit 2 for wrong usage."""

import dataclasses

import pytest

from qwen_jax.cli import parse, run
from qwen_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """A program."""

    input: str
    lora_rank: int = 8


@pytest.mark.parametrize("flag", ["--lora_rank", "--lora-rank"])
def test_both_spellings_of_a_flag(flag):
    assert parse(Args, ["--input", "x", flag, "4"]) == Args(input="x", lora_rank=4)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--input", "x", "--lora_rnk", "4"], "did you mean '--lora_rank'"),
        (["--input", "x", "--lora_rank", "four"], "four"),
        ([], "--input"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Args, argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1 and message in error


@pytest.mark.parametrize("error, code", [(InputError("two\nlines"), 1), (KeyboardInterrupt(), 130)])
def test_a_failure_is_one_line_and_its_exit_code(error, code, capsys):
    def fail():
        raise error

    with pytest.raises(SystemExit) as stop:
        run(fail)
    assert stop.value.code == code
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)
