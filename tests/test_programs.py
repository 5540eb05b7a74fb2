"""The command line of every program: help, wrong flags, wrong values.

Each main runs in this process through qwen_jax.cli.run: exit code, one line, nothing left behind.
Bad input is in test_programs_convert.py, test_programs_train.py and test_programs_sample.py.
"""

import dataclasses
import importlib
import os
import re

import pytest
from programs import stopped

PROGRAMS = {
    "convert.hf_to_flax": ("--input", "--output"),
    "convert.flax_to_hf": ("--input", "--output"),
    "train.lora": ("--model_name_or_path", "--dataset", "--output_dir"),
    "sample.chat": ("--checkpoint",),
    "sample.generate": ("--checkpoint",),
    "convert.download": ("--repo_id", "--output"),
    "convert.verify": ("--checkpoint",),
    "sample.serve": ("--checkpoint",),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_explains_every_flag(name, capsys):
    program = importlib.import_module(name)
    with pytest.raises(SystemExit) as stop:
        program.main(["--help"])
    page = capsys.readouterr().out
    assert not stop.value.code
    for field in dataclasses.fields(program.Args):
        text = re.split(r"\n[│ ]+--\w", re.split(rf"\n[│ ]+--{field.name}\b", page)[1])[0]
        if isinstance(field.default, bool):  # --flag, --no_flag
            text = re.split(rf"--no_{field.name}\b", page)[1]
        words = re.findall(r"[a-z]{2,}", text.partition("(default")[0])
        assert len(words) > 1, f"--{field.name} has no explanation"
        if field.default not in (None, dataclasses.MISSING):
            assert "(default:" in text, field.name
    assert "None" not in page


@pytest.mark.parametrize("name, required", PROGRAMS.items())
def test_wrong_flags(name, required, capsys):
    line = stopped(capsys, name, [], 2)
    assert all(flag in line for flag in required) and "must be given" in line
    misspelt = required[0][:-2] + required[0][-1]
    line = stopped(capsys, name, [misspelt, "x"], 2)
    assert line.startswith(f"unknown argument {misspelt!r}; did you mean {required[0]!r}?")
    assert "unknown argument 'extra'" in stopped(
        capsys, name, [*(w for flag in required for w in (flag, "x")), "extra"], 2
    )


@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("convert.hf_to_flax", ["--quantize", "nf3"], "'none', 'int8', 'int4', 'nf4'"),
        ("convert.hf_to_flax", ["--dtype", "float16"], "'bfloat16', 'float32'"),
        ("train.lora", ["--lora_rank", "0"], "--lora_rank is 0; expected a number 1 or more"),
        ("train.lora", ["--lora_rank", "eight"], "expected a whole number"),
        ("train.lora", ["--lora_alpha", "nan"], "--lora_alpha is nan; expected a number over 0"),
        ("train.lora", ["--cutoff_len", "0"], "--cutoff_len is 0"),
        ("train.lora", ["--max_samples", "0"], "--max_samples is 0"),
        ("train.lora", ["--learning_rate", "inf"], "--learning_rate is inf"),
        ("train.lora", ["--lr_scheduler_type", "cosin"], "did you mean 'cosine'?"),
        ("train.lora", ["--save_strategy", "epochs"], "did you mean 'epoch'?"),
        ("train.lora", ["--warmup_ratio", "2"], "at most 1"),
        ("train.lora", ["--seed", "4294967296"], "at most 4294967295"),
        ("train.lora", ["--max_steps", "3000000000"], "less than 2**31"),
        ("train.lora", ["--output_dir", ""], "--output_dir is empty"),
        ("train.lora", ["--mesh", "tensor=two"], "'two' is not a whole number over 0"),
        ("train.lora", ["--mesh", "tensr=2"], "unknown axis 'tensr'; did you mean 'tensor'?"),
        ("train.lora", ["--mesh", "tensor=2,tensor=2"], "tensor stands twice"),
        ("sample.generate", [], "give either --prompt TEXT or --input FILE.jsonl"),
        ("sample.generate", ["--prompt", "a", "--batch_size", "0"], "--batch_size is 0"),
        ("sample.generate", ["--prompt", "a", "--top_p", "1.5"], "--top_p is 1.5; expected"),
        ("sample.chat", ["--temperature", "-1"], "--temperature is -1.0; expected"),
        ("sample.chat", ["--max_new_tokens", "0"], "--max_new_tokens is 0; expected"),
        ("sample.chat", ["--dtype", "int8"], "expected bfloat16 or float32"),
    ],
)
def test_wrong_values(name, flags, message, capsys):
    given = [word for flag in PROGRAMS[name] if flag not in flags for word in (flag, "x")]
    assert message in stopped(capsys, name, [*given, *flags], 2)
    assert not os.path.exists("x")
