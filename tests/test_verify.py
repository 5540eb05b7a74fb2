"""Verification finds each kind of damage; its error statistics are those of an independent sum."""

import json
import pathlib
import shutil
import tracemalloc

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import hf_to_flax, verify
from convert.host_quant import dequantized_rows
from demo.tiny_checkpoint import write_tiny_checkpoint
from qwen_jax.checkpoint import load_params
from qwen_jax.errors import InputError
from qwen_jax.quant import QuantFormat, dequantize, quantize
from tests.gptq_folder import write_gptq_checkpoint

KINDS = ("none", "int8", "int4", "nf4")


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    sizes = dict(hidden_size=256, kv_channels=64, ffn=256, vocab_size=216, tokenizer=False)
    return write_tiny_checkpoint(tmp_path_factory.mktemp("hf") / "hf", shards=1, **sizes)


@pytest.fixture(scope="module")
def converted(hf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    for kind in KINDS:
        hf_to_flax.convert(hf, folder / kind, fmt=QuantFormat.named(kind))
    return folder


@pytest.fixture
def checkpoint(converted, tmp_path):
    shutil.copytree(converted / "int4", tmp_path / "ck")
    return tmp_path / "ck"


def files_of(checkpoint: pathlib.Path, leaf: str) -> list[pathlib.Path]:
    return sorted(p for p in (checkpoint / "params" / leaf / "c").rglob("*") if p.is_file())


@pytest.mark.parametrize("kind", KINDS)
def test_intact(hf, converted, capsys, kind):
    verify.main(["--checkpoint", str(converted / kind), "--source", str(hf)])
    assert "is intact, equal to" in capsys.readouterr().out


def flip(path: pathlib.Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


def swap(a: pathlib.Path, b: pathlib.Path) -> None:
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)


def change_json(path: pathlib.Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


UP = "layers.mlp.up.data"
DAMAGES = {
    "first byte": (lambda c: flip(files_of(c, UP)[1], 0), rf"{UP}/c/1/\S+ is damaged"),
    "middle byte": (lambda c: flip(files_of(c, "wte")[0], 60_000), r"wte/c/0/0 is damaged"),
    "byte of a checksum": (lambda c: flip(files_of(c, "ln_f")[0], -40), "ln_f/c/0 is damaged"),
    "byte of the index": (lambda c: flip(files_of(c, UP)[0], -10), rf"{UP}/c/0/\S+ is damaged"),
    "truncated": (
        lambda c: files_of(c, UP)[0].write_bytes(files_of(c, UP)[0].read_bytes()[:-9]),
        rf"{UP}/c/0/\S+ is damaged",
    ),
    "empty": (lambda c: files_of(c, UP)[0].write_bytes(b""), rf"{UP}/c/0/\S+ is damaged"),
    "missing": (lambda c: files_of(c, UP)[1].unlink(), rf"{UP}/c/1/\S+ is missing"),
    "layers swapped": (lambda c: swap(*files_of(c, UP)), f"{UP} is intact in itself but"),
    "array header": (
        lambda c: change_json(c / "params/ln_f/zarr.json", data_type="float32"),
        "is damaged: ln_f",
    ),
    "no array header": (lambda c: (c / "params/ln_f/zarr.json").unlink(), "is damaged"),
    "Orbax metadata": (lambda c: (c / "params/_METADATA").write_text("{"), "_METADATA"),
    "other config": (lambda c: change_json(c / "config.json", seq_length=77), "differs from"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_found_and_named(checkpoint, capsys, case):
    damage, match = DAMAGES[case]
    damage(checkpoint)
    with pytest.raises(InputError, match=match) as caught:
        verify.main(["--checkpoint", str(checkpoint)])
    assert "1 fault" in str(caught.value) and "\n" not in str(caught.value)
    assert "fault: " in capsys.readouterr().out


def test_files_of_another_conversion(hf, converted, tmp_path):
    """Sound files of the same shapes: only the manifest tells that they belong elsewhere."""
    other = write_tiny_checkpoint(
        tmp_path / "hf", seed=1, hidden_size=256, kv_channels=64, ffn=256, vocab_size=216,
        tokenizer=False,
    )  # fmt: skip
    hf_to_flax.convert(other, tmp_path / "ck", fmt=QuantFormat.named("nf4"))
    for leaf in ("data", "scale", "scale_absmax", "scale_offset"):
        source = files_of(converted / "nf4", f"layers.attn.wo.{leaf}")[0]
        shutil.copyfile(source, files_of(tmp_path / "ck", f"layers.attn.wo.{leaf}")[0])
    faults = verify.find_damage(tmp_path / "ck")
    assert len(faults) == 4 and all("layers.attn.wo" in fault for fault in faults)


def test_manifest_missing(checkpoint):
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"no manifest\.json"):
        verify.main(["--checkpoint", str(checkpoint)])


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_another_source_is_found(hf, converted, tmp_path, kind):
    """One number in the middle of a matrix, which no fingerprint reads."""
    shutil.copytree(hf, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["transformer.h.1.mlp.w2.weight"][100, 7] += 1
    save_file(tensors, tmp_path / "hf/model.safetensors")
    faults, _ = verify.compare(converted / kind, tmp_path / "hf")
    assert len(faults) == 1 and faults[0].startswith("transformer.h.1.mlp.w2.weight: ")
    if kind == "none":
        assert ": 1 of 65536 stored values differ" in faults[0]


@pytest.mark.parametrize("kind", KINDS[1:])
def test_error_statistics(hf, converted, tmp_path, capsys, kind):
    report = tmp_path / "report.json"
    verify.main(
        ["--checkpoint", str(converted / kind), "--source", str(hf), "--report", str(report)]
    )
    assert "transformer.h.*.mlp.w1.weight" in capsys.readouterr().out
    found = json.loads(report.read_text())
    _, params = load_params(converted / kind)
    sources = load_file(hf / "model.safetensors")
    for torch_name, path in {"attn.c_attn": ("attn", "wqkv"), "mlp.w1": ("mlp", "up")}.items():
        stack = params["layers"][path[0]][path[1]]
        for layer in range(2):
            name = f"transformer.h.{layer}.{torch_name}.weight"
            leaf = jax.tree.map(lambda x, i=layer: x[i], stack)
            source = sources[name].astype(np.float64)
            error = np.asarray(dequantize(leaf, "float32"), np.float64).reshape(source.shape)
            error -= source
            np.testing.assert_allclose(found[name]["squares"], (error**2).sum(), rtol=1e-4)
            np.testing.assert_allclose(found[name]["source_squares"], (source**2).sum(), rtol=1e-4)
            np.testing.assert_allclose(found[name]["largest"], np.abs(error).max(), rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_dequantized_rows_as_the_specification(kind):
    w = np.random.default_rng(0).standard_normal((3, 50, 384), np.float32)
    q = quantize(w, QuantFormat.named(kind))
    want = np.asarray(dequantize(q, "float32")).reshape(150, 384)
    got = dequantized_rows(jax.tree.map(np.asarray, q), slice(37, 90))
    np.testing.assert_allclose(got, want[37:90], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_source(tmp_path, hf, converted, bits):
    write_gptq_checkpoint(tmp_path / "hf", bits)
    hf_to_flax.convert(tmp_path / "hf", tmp_path / "ck")
    faults, differences = verify.compare(tmp_path / "ck", tmp_path / "hf")
    assert not faults and not any(found.quantized for found in differences.values())
    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["transformer.h.1.mlp.w2.qweight"][3, 7] ^= 1
    save_file(tensors, tmp_path / "hf/model.safetensors")
    faults, _ = verify.compare(tmp_path / "ck", tmp_path / "hf")
    assert len(faults) == 1 and "transformer.h.1.mlp.w2.weight: 1 of" in faults[0]
    with pytest.raises(InputError, match="was not made from it"):
        verify.compare(converted / "nf4", tmp_path / "hf")


def test_memory_is_that_of_a_few_layers(hf, tmp_path):
    """8 MB of embedding and head, 0.5 MB a layer: nothing holds the whole."""
    source = write_tiny_checkpoint(
        tmp_path / "hf", hidden_size=256, kv_channels=64, ffn=1024, vocab_size=9000, num_layers=30,
        tokenizer=False,
    )  # fmt: skip
    hf_to_flax.convert(source, tmp_path / "ck")
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    tracemalloc.start()
    verify.main(["--checkpoint", str(tmp_path / "ck"), "--source", str(source)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 60e6 and peak < size / 3
