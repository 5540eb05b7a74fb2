"""Answers in a file: rows outlive a crash, and a run given again ends in the same file."""

import json

import pytest

from convert import hf_to_flax
from demo.tiny_checkpoint import write_tiny_checkpoint
from qwen_jax.engine import Engine
from qwen_jax.errors import InputError
from sample import generate
from sample.answers_file import AnswersFile

SETTINGS = {"seed": 0, "adapter": None, "system": "你好"}
PROMPTS = ["one", "二", [{"role": "user", "content": "three\n"}]]
ROWS = [{"prompt": prompt, "response": f"answer {prompt}\u2028"} for prompt in PROMPTS]


def write(path, rows, settings=SETTINGS, prompts=PROMPTS):
    with AnswersFile(path, settings, prompts) as file:
        for row in rows:
            file.add(row)
    return path.with_name(path.name + ".partial")


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.mark.parametrize("whole", [0, 1, 2, 3])
def test_a_run_goes_on_where_it_was(tmp_path, whole):
    path = tmp_path / "out.jsonl"
    partial = write(path, ROWS[:whole])
    assert read(partial)[1:] == ROWS[:whole] and not path.exists()
    with AnswersFile(path, SETTINGS, PROMPTS) as file:
        assert file.done == whole
        for row in ROWS[whole:]:
            file.add(row)
        file.finish()
    assert read(path) == ROWS
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("left", [1, 10, 75])
def test_a_row_that_a_crash_cut_off_is_written_again(tmp_path, left):
    path = tmp_path / "out.jsonl"
    partial = write(path, ROWS[:2])
    header, first, second = partial.read_bytes().splitlines(keepends=True)
    whole = header + first
    partial.write_bytes((whole + second)[: len(whole) + min(left, len(second) - 1)])
    with AnswersFile(path, SETTINGS, PROMPTS) as file:
        assert file.done == 1
        for row in ROWS[1:]:
            file.add(row)
        file.finish()
    assert read(path) == ROWS


def test_a_cut_off_header_begins_anew(tmp_path):
    path = tmp_path / "out.jsonl"
    partial = write(path, [])
    partial.write_bytes(partial.read_bytes()[:9])
    write(path, ROWS[:1])
    assert read(partial) == [{"unfinished": SETTINGS}, ROWS[0]]


@pytest.mark.parametrize(
    "settings, prompts, message",
    [
        (SETTINGS | {"seed": 1}, PROMPTS, r"another run \(seed 0 -> 1\)"),
        ({"seed": 0, "adapter": None}, PROMPTS, "another run"),
        (SETTINGS, ["one", "zwei", "three"], "answer 2 belongs to a prompt"),
        (SETTINGS, ["one"], "answer 2 belongs to a prompt"),
    ],
)
def test_rows_of_another_run_are_neither_mixed_nor_lost(tmp_path, settings, prompts, message):
    path = tmp_path / "out.jsonl"
    partial = write(path, ROWS[:2])
    before = partial.read_bytes()
    with pytest.raises(InputError, match=message):
        write(path, [], settings, prompts)
    assert partial.read_bytes() == before


@pytest.mark.parametrize("line", ["[]\n", "{}\n", "not JSON\n"])
def test_a_file_that_is_none_of_ours_is_left_alone(tmp_path, line):
    partial = tmp_path / "out.jsonl.partial"
    partial.write_text(line)
    with pytest.raises(InputError, match="partial"):
        write(tmp_path / "out.jsonl", [])
    assert partial.read_text() == line


def test_two_runs_do_not_write_one_file(tmp_path):
    path = tmp_path / "out.jsonl"
    with (
        AnswersFile(path, SETTINGS, PROMPTS),
        pytest.raises(InputError, match="another run is writing"),
    ):
        write(path, ROWS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    hf = write_tiny_checkpoint(folder / "hf")
    hf_to_flax.convert(hf, folder / "checkpoint", dtype="float32")
    return folder / "checkpoint"


def test_a_stopped_generate_goes_on_with_the_same_seeds(checkpoint, tmp_path, monkeypatch, capsys):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps({"prompt": f"number {i}"}) + "\n" for i in range(5)]
    source.write_text("".join(lines))
    command = ["--checkpoint", str(checkpoint), "--input", str(source), "--seed", "7",
               "--max_new_tokens", "4", "--batch_size", "2", "--temperature", "0.9"]  # fmt: skip
    generate.main([*command, "--output", str(tmp_path / "whole.jsonl")])
    whole = read(tmp_path / "whole.jsonl")
    assert [row["prompt"] for row in whole] == [f"number {i}" for i in range(5)]
    assert len({row["response"] for row in whole}) == 5

    real, calls = Engine.generate, []

    def crashing(engine, *args):
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError("the device is full")
        return real(engine, *args)

    command += ["--output", str(output)]
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "generate", crashing)
        with pytest.raises(MemoryError):
            generate.main(command)
    assert not output.exists()
    assert read(tmp_path / "out.jsonl.partial")[1:] == whole[:4]
    assert "4 of 5 answers are in" in capsys.readouterr().err
    generate.main(command)
    assert "4 of 5 answers are there" in capsys.readouterr().err
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "out.jsonl.partial").exists()

    write(output, [], {"seed": 8})
    with pytest.raises(InputError, match="another run"):
        generate.main(command)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
