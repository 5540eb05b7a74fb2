"""Every program as a user meets it: help, wrong flags, bad input, and being stopped.

Each main runs in this process through qwen_jax.cli.run: exit code, one line, nothing left behind.
"""

import dataclasses
import importlib
import io
import json
import os
import re
import shutil
import signal
import sys

import numpy as np
import pytest
import safetensors.numpy

from convert import flax_to_hf, hf_to_flax
from demo.tiny_checkpoint import write_tiny_checkpoint
from qwen_jax import api
from qwen_jax.adapters import ADAPTER_WEIGHTS, LoraConfig, init_lora, save_peft
from qwen_jax.checkpoint import load_manifest
from qwen_jax.cli import run
from qwen_jax.errors import InputError
from qwen_jax.sampling import SamplingParams
from sample import chat, generate
from train import lora as train_lora
from train.report import Report

PROGRAMS = {
    "convert.hf_to_flax": ("--input", "--output"),
    "convert.flax_to_hf": ("--input", "--output"),
    "train.lora": ("--model_name_or_path", "--dataset", "--output_dir"),
    "sample.chat": ("--checkpoint",),
    "sample.generate": ("--checkpoint",),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """hf: a Hugging Face folder; ckpt: the same converted; adapter; dataset_info.json and data."""
    folder = tmp_path_factory.mktemp("home")
    write_tiny_checkpoint(folder / "hf", hidden_size=32, num_layers=2, kv_channels=8, ffn=64)
    hf_to_flax.convert(folder / "hf", folder / "ckpt", dtype="float32")
    manifest = load_manifest(folder / "ckpt")
    lora_cfg = LoraConfig(rank=2)
    save_peft(
        folder / "adapter",
        manifest.config,
        lora_cfg,
        init_lora(manifest.config, lora_cfg, api.jax.random.key(0)),
        base_name="tiny",
        fingerprint=manifest.fingerprint,
    )
    rows = [{"instruction": f"{i} + {i}?", "output": f"{2 * i}"} for i in range(6)]
    (folder / "sums.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text('{"sums": {"file_name": "sums.json"}}')
    return folder


def stopped(capsys, name, argv, code=1):
    """Runs a program that must fail; returns its one line of error."""
    with pytest.raises(SystemExit) as stop:
        run(lambda: importlib.import_module(name).main([str(word) for word in argv]))
    said = capsys.readouterr()
    assert stop.value.code == code, said
    assert "Traceback" not in said.out + said.err
    lines = [line for line in said.err.splitlines() if "error:" in line]
    assert len(lines) == 1, said.err
    return lines[0].partition("error: ")[2]


def copied(source, target):
    """A folder whose files share their bytes with `source`; one is replaced, never changed."""
    return shutil.copytree(source, target, copy_function=os.link)


def replace(path, content: bytes | str):
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_explains_every_flag(name, capsys):
    program = importlib.import_module(name)
    with pytest.raises(SystemExit) as stop:
        program.main(["--help"])
    page = capsys.readouterr().out
    assert not stop.value.code
    for field in dataclasses.fields(program.Args):
        text = re.split(r"--\w", re.split(rf"--{field.name}\b", page)[1])[0]
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
def test_wrong_values(home, name, flags, message, capsys):
    given = [word for flag in PROGRAMS[name] if flag not in flags for word in (flag, "x")]
    assert message in stopped(capsys, name, [*given, *flags], 2)
    assert not os.path.exists("x")


# --- convert -------------------------------------------------------------------------------------


def index_of(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())


def change_index(**names):
    def change(folder):
        index = index_of(folder)
        for name, file in names.items():
            index["weight_map"][name.replace("__", ".")] = file
        replace(folder / "model.safetensors.index.json", json.dumps(index))

    return change


def change_tensor(name, make):
    """make(tensor) is the new one; None drops it. The index follows."""

    def change(folder):
        index = index_of(folder)
        places = index["weight_map"]
        file = folder / places.get(name, "model-00001-of-00003.safetensors")
        tensors = safetensors.numpy.load_file(file)
        old = tensors.pop(name, None)
        places.pop(name, None)
        if (new := make(old)) is not None:
            tensors[name], places[name] = new, file.name
        file.unlink()
        safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
        sizes = [0 if tensor is None else tensor.nbytes for tensor in (old, new)]
        index["metadata"]["total_size"] += sizes[1] - sizes[0]
        replace(folder / "model.safetensors.index.json", json.dumps(index))

    return change


def change_config(**values):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        replace(folder / "config.json", json.dumps(config | values))

    return change


def change_bytes(name, change_content):
    return lambda folder: replace(folder / name, change_content((folder / name).read_bytes()))


def with_one(value):
    def change(tensor):
        tensor = tensor.copy()
        tensor.flat[5] = value
        return tensor

    return change


SHARD, INDEX = "model-00002-of-00003.safetensors", "model.safetensors.index.json"
NORM = "transformer.ln_f.weight"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / SHARD).unlink(), SHARD),
        (change_bytes(SHARD, lambda b: b[:-100]), SHARD),
        (change_bytes(SHARD, lambda b: b""), SHARD),
        (change_bytes(SHARD, lambda b: b"\xff" * len(b)), SHARD),
        (lambda f: ((f / SHARD).unlink(), (f / SHARD).mkdir()), SHARD),
        (change_index(lm_head__weight="nowhere.safetensors"), "nowhere.safetensors"),
        (change_index(lm_head__weight="../outside.safetensors"), "../outside.safetensors"),
        (change_index(lm_head__weight="/etc/passwd"), "/etc/passwd"),
        (change_index(lm_head__weight=5), "lm_head.weight"),
        (change_bytes(INDEX, lambda b: b"{"), INDEX),
        (change_bytes(INDEX, lambda b: b"[]"), INDEX),
        (change_bytes(INDEX, lambda b: b""), INDEX),
        (change_tensor(NORM, lambda t: None), f"lacks {NORM}"),
        (change_tensor("transformer.extra.weight", lambda t: np.ones(2, np.float32)), "extra"),
        (change_tensor(NORM, lambda t: t[:-1].copy()), NORM),
        (change_tensor(NORM, with_one(np.nan)), NORM),
        (change_tensor(NORM, with_one(-np.inf)), NORM),
        (change_config(model_type="qwen2"), "Qwen2"),
        (change_config(model_type="llama"), "LLaMA"),
        (change_config(rotary_emb_bas=10000), "did you mean 'rotary_emb_base'"),
        (change_config(hidden_size="32"), "hidden_size"),
        (change_config(hidden_size=None), "hidden_size"),
        (change_config(num_attention_heads=0), "num_heads"),
        (change_bytes("config.json", lambda b: b"{"), "config.json"),
        (lambda f: (f / "config.json").unlink(), "config.json"),
    ],
)
def test_a_bad_source_is_refused_and_nothing_is_left(home, tmp_path, damage, message, capsys):
    source = copied(home / "hf", tmp_path / "hf")
    damage(source)
    before = sorted(os.listdir(tmp_path))
    argv = ["--input", source, "--output", tmp_path / "out"]
    assert message in stopped(capsys, "convert.hf_to_flax", argv)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--input", "nowhere"], "nowhere"),
        (["--quantize", "nf4"], "32 is not a multiple"),
        (["--quantize", "int4"], "32 is not a multiple"),
        (["--output", "{home}/ckpt"], "already exists"),
        (["--output", "{home}/hf", "--overwrite"], "not overwritten"),
        (["--output", "{home}/sums.json/out"], "sums.json/out"),
    ],
)
def test_convert_refuses_and_changes_nothing(home, tmp_path, flags, message, capsys):
    argv = ["--input", home / "hf", "--output", tmp_path / "out"]
    before = sorted(os.listdir(home))
    flags = [flag.format(home=home) for flag in flags]
    assert message in stopped(capsys, "convert.hf_to_flax", [*argv, *flags])
    assert os.listdir(tmp_path) == [] and sorted(os.listdir(home)) == before


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--input", "{home}/hf"], "not a converted checkpoint"),
        (["--input", "{home}/ckpt", "--adapter", "{home}/hf"], "adapter_config.json"),
        (["--input", "{home}/ckpt", "--shard_size", "5 apples"], "5 apples"),
        (["--input", "{home}/ckpt", "--output", "{home}/ckpt", "--overwrite"], "is a checkpoint"),
    ],
)
def test_export_refuses_and_changes_nothing(home, tmp_path, flags, message, capsys):
    before = sorted(os.listdir(home))
    flags = [flag.format(home=home) for flag in flags]
    argv = ["--output", tmp_path / "out", *flags]
    assert message in stopped(capsys, "convert.flax_to_hf", argv)
    assert os.listdir(tmp_path) == [] and sorted(os.listdir(home)) == before


def test_a_stopped_conversion_leaves_nothing(home, tmp_path, monkeypatch, capsys):
    def stop(*args):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(hf_to_flax, "check_names_and_shapes", stop)
    with pytest.raises(SystemExit) as stopped_by:
        run(lambda: hf_to_flax.main(["--input", str(home / "hf"), "--output", f"{tmp_path}/out"]))
    assert stopped_by.value.code == 143 and os.listdir(tmp_path) == []
    assert "terminated" in capsys.readouterr().err


# --- train ---------------------------------------------------------------------------------------


def training(home, output, *more):
    return [
        "--model_name_or_path", home / "ckpt", "--dataset", "sums", "--dataset_dir", home,
        "--output_dir", output, "--lora_rank", "2", "--max_steps", "3", "--cutoff_len", "64", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model_name_or_path", "{home}/hf"], "not a converted checkpoint"),
        (["--model_name_or_path", "Qwen/Qwen-72B"], "not a converted checkpoint"),
        (["--mesh", "tensor=3"], "tensor=3 must divide the 4 heads and 64 FFN columns"),
        (["--mesh", "64"], "needs 64 devices, this machine has 8"),
        (["--dataset", "sms"], "it has: sums; did you mean 'sums'?"),
        (["--dataset", "sums,nix"], "no dataset 'nix'"),
        (["--dataset", ","], "expected names"),
        (["--dataset_dir", "{home}/hf"], "no dataset_info.json"),
        (["--lora_target", "c_attn,attn.cproj"], "did you mean 'attn.c_proj'"),
        (["--lora_target", "q_proj"], "this model calls it 'c_attn'"),
        (["--remat", "half"], "unknown level 'half'"),
        (["--cutoff_len", "3"], "no answer within 3 tokens"),
        (["--resume_from_checkpoint", "true"], "not a complete checkpoint"),
        (["--output_dir", "{home}/sums.json"], "sums.json is not a folder"),
        (["--output_dir", "{home}/sums.json/x"], "sums.json is not a folder"),
    ],
)
def test_training_refuses_before_anything_is_made(home, tmp_path, flags, message, capsys):
    flags = [flag.format(home=home) for flag in flags]
    argv = training(home, tmp_path / "out", *flags)
    assert message in stopped(capsys, "train.lora", argv)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "0 rows read"),
        ("[]", "0 rows read"),
        ('[{"instruction": "a", "output": " "}]', "1 dropped (empty or missing answer)"),
        (
            '[{"instruction": "a", "output": "b"}, {"instruction": "a"}]',
            "row 2: no column 'output'",
        ),
        ('{"instruction": "a", "output": "b"}\n{"instruction": "a"}', "line 2: no column 'output'"),
        ('[{"instruction": 5, "output": "b"}]', "row 1: 'instruction' is int"),
        ("[null]", "row 1: expected an object with columns, got null"),
        ("[1]", "row 1: expected an object with columns, got int"),
        ('[{"instruction": "a"', "line 1: not JSON"),
        (b"\xff\xfe[]", "not UTF-8 at byte 0"),
        ('[{"instruction": "\\ud800", "output": "b"}]', "half a surrogate pair"),
    ],
)
def test_bad_rows_are_named(home, tmp_path, content, message, capsys):
    replace(tmp_path / "d.json", content)
    replace(tmp_path / "dataset_info.json", '{"sums": {"file_name": "d.json"}}')
    argv = training(home, tmp_path / "out", "--dataset_dir", tmp_path)
    assert message in stopped(capsys, "train.lora", argv)
    assert sorted(os.listdir(tmp_path)) == ["d.json", "dataset_info.json"]


def test_a_terminated_run_saves_its_state_and_says_so(home, tmp_path, monkeypatch, capfd):
    add = Report.add

    def stop_at_1(self, step, *rest):
        add(self, step, *rest)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Report, "add", stop_at_1)
    argv = [str(word) for word in training(home, tmp_path / "out", "--save_strategy", "no")]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        run(lambda: train_lora.main(argv))
    said = capfd.readouterr()
    assert stop.value.code == 143
    assert "stopping after this step" in said.err
    assert f"to go on from {tmp_path / 'out' / 'checkpoint-1'}" in said.out
    assert os.listdir(tmp_path / "out") == ["checkpoint-1"]
    assert (tmp_path / "out" / "checkpoint-1" / ADAPTER_WEIGHTS).is_file()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_numbers_that_are_none_are_found_before_they_are_saved(tmp_path, name):
    report = Report(tmp_path, start=0, total=9, steps_per_epoch=9, every=9)
    good = {"loss": np.float32(1), "grad_norm": np.float32(1)}
    report.add(1, good, 5)
    report.check()
    report.add(2, good | {name: np.float32("inf")}, 5)
    with pytest.raises(InputError, match=r"no longer finite numbers .* up to step 2"):
        report.check()


# --- sample --------------------------------------------------------------------------------------


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


def test_a_reader_that_leaves_is_no_error(home, monkeypatch, capsys):
    def leave(*args):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(generate, "answers", leave)
    argv = ["--checkpoint", str(home / "ckpt"), "--prompt", "a"]
    with pytest.raises(SystemExit) as stop:
        run(lambda: generate.main(argv))
    assert stop.value.code == 141 and capsys.readouterr().err == ""


@pytest.fixture
def talk(home, monkeypatch):
    """A chat whose answers are what `stream` yields."""

    def start(stream):
        model = api.load(home / "ckpt")
        monkeypatch.setattr(model.engine, "stream", lambda prompt, params: stream(model.tokenizer))
        return chat.Chat(model, SamplingParams(greedy=True), "Be brief.")

    return start


def test_ctrl_c_ends_the_answer_and_not_the_chat(talk, monkeypatch, capsys):
    def stream(tokenizer):
        yield from tokenizer.encode("你好 world")
        raise KeyboardInterrupt

    conversation = talk(stream)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n/new\nhi\n"))
    chat.converse(conversation)
    said = capsys.readouterr().out
    assert said == "你好 world [interrupted]\n(new conversation)\n你好 world [interrupted]\n"
    assert [turn.content for turn in conversation.turns] == ["hi", "你好 world"]


def test_ctrl_c_before_the_answer_forgets_the_question(talk, monkeypatch, capsys):
    def stream(tokenizer):
        raise KeyboardInterrupt

    conversation = talk(stream)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n/nw\n/exit\nnever read\n"))
    chat.converse(conversation)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "[interrupted]",
        "unknown command /nw; did you mean '/new'? (/help lists them)",
    ]
    assert conversation.turns == []


def test_ctrl_c_at_the_prompt_and_the_end_of_input_leave_the_chat(talk, monkeypatch):
    conversation = talk(lambda tokenizer: iter(()))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    chat.converse(conversation)

    def interrupt(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    chat.converse(conversation)


def test_a_chat_without_input_is_refused(home, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    line = stopped(capsys, "sample.chat", ["--checkpoint", home / "ckpt"])
    assert "standard input is closed" in line


def test_an_export_with_an_adapter_passes(home, tmp_path):
    """The folders of these tests are good as long as nobody damages them."""
    adapter = home / "adapter"
    flax_to_hf.main(
        ["--input", f"{home}/ckpt", "--output", f"{tmp_path}/out", "--adapter", f"{adapter}"]
    )
    assert (tmp_path / "out" / "config.json").is_file()
