"""Chat and generate on bad adapters, bad prompts, and without anybody who reads or writes."""

import os
import shutil
import sys

import numpy as np
import pytest
import safetensors.numpy
from programs import change_bytes, copied, make_home, replace, stopped

from qwen_jax.adapters import ADAPTER_WEIGHTS
from qwen_jax.cli import run
from sample import generate


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


def change_adapter(change):
    def damage(folder):
        path = folder / ADAPTER_WEIGHTS
        tensors = safetensors.numpy.load_file(path)
        change(tensors)
        path.unlink()
        safetensors.numpy.save_file(tensors, path)

    return damage


def of_another_base(folder):
    tensors = safetensors.numpy.load_file(folder / ADAPTER_WEIGHTS)
    (folder / ADAPTER_WEIGHTS).unlink()
    about = {"base_fingerprint": "0" * 64}
    safetensors.numpy.save_file(tensors, folder / ADAPTER_WEIGHTS, metadata=about)


def like_qwen2(tensors):
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = np.ones((2, 32))


@pytest.mark.parametrize("name", ["sample.generate", "sample.chat", "convert.flax_to_hf"])
@pytest.mark.parametrize(
    "damage, message",
    [
        (of_another_base, "made for another base"),
        (change_adapter(like_qwen2), "match nothing"),
        (change_adapter(lambda t: t.clear()), "the adapter is empty"),
        (change_adapter(lambda t: t.pop(sorted(t)[0])), "lacks 1 tensors"),
        (change_adapter(lambda t: t[sorted(t)[0]].fill(np.nan)), "NaN or Inf"),
        (change_bytes(ADAPTER_WEIGHTS, lambda b: b[:-9]), "not a readable safetensors file"),
        (change_bytes("adapter_config.json", lambda b: b"[]"), "expected a JSON object"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_bad_adapters_are_refused(home, tmp_path, name, damage, message, capsys):
    adapter = copied(home / "adapter", tmp_path / "adapter")
    damage(adapter)
    argv = {
        "sample.generate": ["--checkpoint", home / "ckpt", "--prompt", "a"],
        "sample.chat": ["--checkpoint", home / "ckpt"],
        "convert.flax_to_hf": ["--input", home / "ckpt", "--output", tmp_path / "out"],
    }[name]
    assert message in stopped(capsys, name, [*argv, "--adapter", adapter])
    assert set(os.listdir(tmp_path)) <= {"adapter"}


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "holds no prompt"),
        ('{"prompt": "a"}\nnot json\n', "line 2 is not valid JSON"),
        ('{"prompt": "a"}\n{"prompt": 5}', "line 2: the prompt is 5"),
        ('[{"prompt": "a"}]', 'either "prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}', 'either "prompt" or "messages"'),
        ('{"messages": []}', "line 1: there is no user turn"),
        ('{"messages": [{"role": "usr", "content": "a"}]}', "did you mean 'user'"),
        ('{"messages": [{"role": "user", "content": null}]}', "content of type NoneType"),
        ('{"messages": "hello"}', "messages must be a list"),
        ('{"prompt": "\\ud800"}', "half a surrogate pair"),
        (b"\xff{}", "cannot be read"),
    ],
)
def test_bad_prompts_are_named_and_nothing_is_written(home, tmp_path, content, message, capsys):
    replace(tmp_path / "in.jsonl", content)
    argv = ["--checkpoint", home / "ckpt", "--input", tmp_path / "in.jsonl"]
    line = stopped(capsys, "sample.generate", [*argv, "--output", tmp_path / "out.jsonl"])
    assert message in line and str(tmp_path / "in.jsonl") in line
    assert os.listdir(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--checkpoint", "{home}/hf"], "not a converted checkpoint"),
        (["--checkpoint", "{home}/nowhere"], "not a converted checkpoint"),
        (["--mesh", "tensor=3"], "tensor=3 must divide the 4 heads"),
        (["--mesh", "64"], "needs 64 devices"),
        (["--output", "{home}"], "expected a file in a folder that exists"),
        (["--output", "{home}/nowhere/out.jsonl"], "expected a file in a folder that exists"),
        (["--raw", "--prompt", ""], "the prompt is empty"),
    ],
)
def test_generate_refuses(home, flags, message, capsys):
    flags = [flag.format(home=home) for flag in flags]
    argv = ["--checkpoint", home / "ckpt", "--prompt", "a", *flags]
    assert message in stopped(capsys, "sample.generate", argv)


@pytest.mark.parametrize("name", ["sample.generate", "sample.chat", "sample.serve"])
@pytest.mark.parametrize(
    "flags, code, message",
    [
        (["--cache_dtype", "int4"], 2, "expected int8"),
        (["--cache_dtype", "int4", "--plan"], 2, "expected int8"),
        (["--dtype", "foo", "--plan"], 2, "expected bfloat16 or float32"),
        (["--dtype", "int8", "--plan"], 2, "expected bfloat16 or float32"),
        (["--plan_tokens", "-5", "--plan"], 2, "--plan_tokens is -5; expected 1 to"),
        (["--device_memory", "-1", "--plan"], 2, "--device_memory is -1.0; expected GB, more than"),
        (["--device_memory", "nan", "--plan"], 2, "--device_memory is nan"),
        (["--drafts", "99", "--plan"], 2, "--drafts is 99"),
        (["--drafts", "16"], 2, "--drafts is 16; expected 0 (none) to 15"),
        (["--int8_head"], 1, "packed for Hopper cards"),
    ],
)
def test_settings_of_memory_and_speed_that_do_not_fit(home, name, flags, code, message, capsys):
    argv = ["--checkpoint", home / "ckpt", *flags]
    if name == "sample.generate":
        argv += ["--prompt", "a"]
    if name == "sample.serve":
        argv += ["--port", "0"]
        if flags[0] == "--drafts":
            message = "--drafts"  # rows of a running batch have none
    assert message in stopped(capsys, name, argv, code)


@pytest.mark.parametrize("plan", [[], ["--plan"]])
@pytest.mark.parametrize("count", [0, -1, 10**30])
@pytest.mark.parametrize(
    "name, flag", [("sample.generate", "--batch_size"), ("sample.serve", "--max_batch")]
)
def test_rows_that_no_machine_can_run(home, name, flag, count, plan, capsys):
    argv = ["--checkpoint", home / "ckpt", flag, count, *plan]
    argv += ["--prompt", "a"] if name == "sample.generate" else []
    assert f"{flag} is {count}; expected" in stopped(capsys, name, argv, code=2)


def test_drafts_are_for_one_prompt_at_a_time(home, capsys):
    argv = ["--checkpoint", home / "ckpt", "--input", "any.jsonl", "--drafts", "3"]
    assert "--batch_size 1" in stopped(capsys, "sample.generate", argv, code=2)


@pytest.mark.slow  # three programs to compile; the parts are tested in test_drafts and test_prefill
def test_an_int8_cache_and_drafts_answer(home, capsys):
    """The text of a random model says nothing; with the drafts it must be the same text."""
    argv = ["--checkpoint", str(home / "ckpt"), "--prompt", "a a a a a a", "--greedy"]
    argv += ["--max_new_tokens", "24", "--cache_dtype", "int8"]
    generate.main(argv)
    plain = capsys.readouterr().out
    generate.main([*argv, "--drafts", "4"])
    assert capsys.readouterr().out == plain != ""


def test_a_reader_that_leaves_is_no_error(home, monkeypatch, capsys):
    def leave(*args):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(generate, "answers", leave)
    argv = ["--checkpoint", str(home / "ckpt"), "--prompt", "a"]
    with pytest.raises(SystemExit) as stop:
        run(lambda: generate.main(argv))
    assert stop.value.code == 141 and capsys.readouterr().err == ""


def test_a_chat_without_input_is_refused(home, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    line = stopped(capsys, "sample.chat", ["--checkpoint", home / "ckpt"])
    assert "standard input is closed" in line
