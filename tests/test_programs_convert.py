"""Convert and export on bad input: one line, exit 1, and the folders are as before."""

import json
import os
import signal

import numpy as np
import pytest
import safetensors.numpy
from programs import change_bytes, copied, make_home, replace, stopped

from convert import flax_to_hf, hf_to_flax
from qwen_jax.cli import run


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


def index_of(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())


def change_index(**names):
    def change(folder):
        index = index_of(folder)
        for name, file in names.items():
            index["weight_map"][name.replace("__", ".")] = file
        replace(folder / "model.safetensors.index.json", json.dumps(index))

    return change


def change_tensor(name, make, total_follows=True):
    """make(tensor) is the new one; None drops it. The index follows, its sum only if asked."""

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
        index["metadata"]["total_size"] += (sizes[1] - sizes[0]) * total_follows
        replace(folder / "model.safetensors.index.json", json.dumps(index))

    return change


def change_config(**values):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        replace(folder / "config.json", json.dumps(config | values))

    return change


def with_one(value):
    def change(tensor):
        tensor = tensor.copy()
        tensor.flat[5] = value
        return tensor

    return change


SHARD, INDEX = "model-00002-of-00003.safetensors", "model.safetensors.index.json"
NORM = "transformer.ln_f.weight"


def test_values_that_no_rerun_can_mend_advise_none(home, tmp_path, capsys):
    source = copied(home / "hf", tmp_path / "hf")
    change_tensor(NORM, with_one(np.nan))(source)
    line = stopped(capsys, "convert.hf_to_flax", ["--input", source, "--output", tmp_path / "out"])
    assert "get another one" in line and "again" not in line


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
        # The sum of bytes is off as well then; what helps is the name.
        (change_tensor(NORM, lambda t: None, total_follows=False), f"lacks {NORM}"),
        (change_tensor(NORM, lambda t: t[:-1].copy(), total_follows=False), NORM),
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
    # A hidden folder may stay, to go on from; nothing that looks like a checkpoint does.
    assert sorted(name for name in os.listdir(tmp_path) if name[0] != ".") == before


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


def test_an_export_with_an_adapter_passes(home, tmp_path):
    """The folders of these tests are good as long as nobody damages them."""
    adapter = home / "adapter"
    flax_to_hf.main(
        ["--input", f"{home}/ckpt", "--output", f"{tmp_path}/out", "--adapter", f"{adapter}"]
    )
    assert (tmp_path / "out" / "config.json").is_file()
