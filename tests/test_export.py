"""Exports: fresh conversion is bit-identical, merges are torch's sums, the report is a true KL."""

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch_reference import qwen2_model

import qwen_jax
from convert import compare_logits, export_rows, flax_to_hf, hf_to_flax
from demo.tiny_checkpoint import write_tiny_checkpoint
from qwen_jax.adapters import LoraConfig, init_lora, save_peft
from qwen_jax.checkpoint import StoredParams, load_params
from qwen_jax.errors import InputError
from qwen_jax.manifest import load_manifest
from qwen_jax.quant import QuantFormat, dequantize, quantize

BF16 = ml_dtypes.bfloat16
LORA = LoraConfig(rank=4, alpha=10, targets=("c_attn", "attn.c_proj", "w2", "mlp.c_proj"))
SIZES = dict(
    hidden_size=128, kv_channels=32, ffn=256, vocab_size=640, tokenizer=False,
    config_overrides={"use_dynamic_ntk": False, "use_logn_attn": False},
)  # fmt: skip


def read_all(folder: pathlib.Path) -> dict[str, np.ndarray]:
    weights = {}
    for path in folder.glob("*.safetensors"):
        weights |= load_file(path)
    return weights


def write_adapter(folder, checkpoint):
    manifest = load_manifest(checkpoint)
    lora = init_lora(manifest.config, LORA, jax.random.key(0))
    lora = jax.tree.map(lambda x: x + 0.02, lora)
    fingerprint = manifest.fingerprint
    save_peft(folder, manifest.config, LORA, lora, base_name="x", fingerprint=fingerprint)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """hf: bfloat16 shards; none, nf4: checkpoints of it; lora: an adapter of it."""
    folder = tmp_path_factory.mktemp("export")
    write_tiny_checkpoint(folder / "hf", **SIZES)
    return convert_all(folder)


@pytest.fixture(scope="module")
def readable(tmp_path_factory):
    """The same with the official tokenizer and one narrow layer."""
    folder = tmp_path_factory.mktemp("readable")
    write_tiny_checkpoint(folder / "hf", num_layers=1)
    return convert_all(folder)


def convert_all(folder):
    for kind in ("none", "nf4"):
        hf_to_flax.convert(folder / "hf", folder / kind, fmt=QuantFormat.named(kind))
    write_adapter(folder / "lora", folder / "none")
    return folder


def deltas(adapter: pathlib.Path) -> dict[str, np.ndarray]:
    """Torch name -> alpha / rank B A, from the files alone."""
    pairs = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for key, a in pairs.items():
        if key.endswith(".lora_A.weight"):
            b = pairs[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            found[name] = LORA.alpha / LORA.rank * (b.astype(np.float64) @ a)
    return found


def test_a_fresh_conversion_of_the_export_is_bit_identical(place, tmp_path):
    flax_to_hf.export(place / "none", tmp_path / "out", max_shard_bytes=200_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    hf_to_flax.convert(tmp_path / "out", tmp_path / "again")
    first, second = load_params(place / "none"), load_params(tmp_path / "again")
    assert first[0] == second[0]
    for a, b in zip(jax.tree.leaves(first[1]), jax.tree.leaves(second[1]), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint16), np.asarray(b).view(np.uint16))
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (place / "hf" / name).read_bytes()


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_logits_of_the_export_in_transformers(place, tmp_path, kind):
    flax_to_hf.export(place / kind, tmp_path / "out")
    weights = {k: v.astype(np.float32) for k, v in read_all(tmp_path / "out").items()}
    model = qwen_jax.load(place / kind, dtype=jnp.float32)
    ids = np.random.default_rng(0).integers(0, 640, (1, 200))
    with torch.no_grad():
        theirs = qwen2_model(model.config, weights)(torch.tensor(ids)).logits.numpy()
    # The export of a quantized checkpoint is rounded to bfloat16 once more: 2^-9 of each weight.
    assert np.abs(np.asarray(model.logits(ids)) - theirs).max() < (2e-3 if kind == "none" else 0.6)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_blocks_of_rows_equal_the_whole(monkeypatch, kind):
    monkeypatch.setattr(export_rows, "_BLOCK_ELEMENTS", 1000)
    w = np.random.default_rng(0).standard_normal((3, 10, 256), np.float32)
    q = quantize(jnp.asarray(w), QuantFormat.named(kind))
    blocks = list(export_rows.dequantized_blocks(q))
    assert {len(block) for block in blocks} == {3}
    whole = np.asarray(dequantize(q, jnp.float32)).reshape(30, 256)
    np.testing.assert_array_equal(np.concatenate(blocks), whole)


def test_merge_onto_the_dequantized_weights(place, tmp_path, monkeypatch):
    monkeypatch.setattr(export_rows, "_BLOCK_ELEMENTS", 5000)
    flax_to_hf.export(place / "nf4", tmp_path / "plain")
    flax_to_hf.export(place / "nf4", tmp_path / "out", adapter=place / "lora")
    _, params = load_params(place / "nf4")
    up = params["layers"]["mlp"]["down"]
    layer = dequantize(jax.tree.map(lambda x: x[1], up), jnp.float32)
    name = "transformer.h.1.mlp.c_proj.weight"
    want = np.asarray(layer) + deltas(place / "lora")[name]
    got = read_all(tmp_path / "out")
    np.testing.assert_allclose(got[name].astype(np.float32), want, rtol=2**-8, atol=1e-6)
    name = "transformer.h.1.mlp.w1.weight"  # not a target
    np.testing.assert_array_equal(
        got[name].view(np.uint16), read_all(tmp_path / "plain")[name].view(np.uint16)
    )


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_merge_onto_the_original(place, tmp_path, kind):
    options = dict(adapter=place / "lora", base=place / "hf", max_shard_bytes=10**5)
    flax_to_hf.export(place / kind, tmp_path / "out", **options)
    got, added = read_all(tmp_path / "out"), deltas(place / "lora")
    for name, tensor in read_all(place / "hf").items():
        if name in added:  # one rounding of the exact sum
            want = (tensor.astype(np.float64) + added[name]).astype(np.float32)
            np.testing.assert_allclose(got[name].astype(np.float32), want, rtol=2**-8, atol=1e-6)
        else:
            np.testing.assert_array_equal(got[name].view(np.uint16), tensor.view(np.uint16))
    assert len(added) == 8


def test_merge_onto_another_model_is_refused(place, tmp_path):
    write_tiny_checkpoint(tmp_path / "other", seed=1, **SIZES)
    merge = dict(adapter=place / "lora", base=tmp_path / "other")
    with pytest.raises(InputError, match=r"transformer\.wte\.weight differs"):
        flax_to_hf.export(place / "nf4", tmp_path / "out", **merge)
    write_tiny_checkpoint(tmp_path / "wide", hidden_size=256, kv_channels=64, tokenizer=False)
    with pytest.raises(InputError, match=r"another config\.json"):
        flax_to_hf.export(place / "nf4", tmp_path / "out", **(merge | {"base": tmp_path / "wide"}))
    with pytest.raises(InputError, match="--base without --adapter"):
        flax_to_hf.main(["--input", "a", "--output", "b", "--base", "c"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["none", "nf4"])
@pytest.mark.parametrize("adapter", [None, "lora"])
def test_streamed_logits_are_the_model_s(place, tmp_path, kind, adapter):
    adapter = adapter and place / adapter
    fmt = QuantFormat.named(kind)
    hf_to_flax.convert(place / "hf", tmp_path / "ck", fmt=fmt, dtype="float32")
    model = qwen_jax.load(tmp_path / "ck", adapter=adapter)
    ids = np.random.default_rng(1).integers(0, 640, 60).astype(np.int32)
    source = export_rows.StoredSource(StoredParams(tmp_path / "ck"))
    got = compare_logits.streamed_logits(model.config, source, model.lora, ids)
    np.testing.assert_allclose(got, np.asarray(model.logits(ids[None]))[0], atol=5e-4)


def test_difference_is_the_kl_of_torch():
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal((7, 50)).astype(np.float32) * 3 for _ in range(2))
    found = compare_logits.difference(first, second)
    p, q = (torch.tensor(x, dtype=torch.float64).log_softmax(-1) for x in (first, second))
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert found.mean_kl == pytest.approx(kl.mean().item())
    assert found.max_kl == pytest.approx(kl.max().item())
    assert found.same_top == (first.argmax(-1) == second.argmax(-1)).mean()
    assert compare_logits.difference(first, first).mean_kl == 0


def report_of(capsys) -> float:
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("merged"))
    return float(line.split("KL mean ")[1].split(",")[0])


def test_the_report_tells_quantized_from_original(readable, tmp_path, capsys):
    place = readable
    (tmp_path / "text.txt").write_text("A text of one's own, 自己的文字。" * 5, encoding="utf-8")

    def merged(name, *more):
        paths = ["--input", str(place / "nf4"), "--output", str(tmp_path / name)]
        flax_to_hf.main([*paths, "--adapter", str(place / "lora"), *more])
        return report_of(capsys)

    onto_own = merged("own")
    onto_original = merged("original", "--base", str(place / "hf"))
    assert 0 < onto_own < onto_original / 5, "merging onto other weights must show"
    merged("texted", "--text", str(tmp_path / "text.txt"))
    with pytest.raises(StopIteration):
        merged("silent", "--no-compare")


def test_without_a_tokenizer_the_report_says_so(place, tmp_path, capsys):
    paths = ["--input", str(place / "nf4"), "--output", str(tmp_path / "out")]
    flax_to_hf.main([*paths, "--adapter", str(place / "lora")])
    assert "was not compared" in capsys.readouterr().out


def test_config_tells_of_what_was_written(tmp_path):
    source = tmp_path / "hf"
    overrides = {"torch_dtype": "float16", "quantization_config": {"quant_method": "none"}}
    sizes = dict(vocab_size=64, num_layers=1, shards=1, tokenizer=False)
    write_tiny_checkpoint(source, dtype="float16", config_overrides=overrides, **sizes)
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    hf_to_flax.convert(source, tmp_path / "ck")
    (tmp_path / "ck/config.json").write_text(json.dumps(config | overrides))
    flax_to_hf.export(tmp_path / "ck", tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written == config | {"torch_dtype": "bfloat16"}


def test_a_base_with_nan_is_refused(tmp_path):
    write_tiny_checkpoint(tmp_path / "hf", vocab_size=64, num_layers=1, shards=1, tokenizer=False)
    hf_to_flax.convert(tmp_path / "hf", tmp_path / "ck")
    write_adapter(tmp_path / "lora", tmp_path / "ck")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["transformer.h.0.mlp.w1.weight"][5, 3] = np.nan
    save_file(tensors, tmp_path / "hf/model.safetensors")
    options = dict(adapter=tmp_path / "lora", base=tmp_path / "hf")
    with pytest.raises(InputError, match=r"w1\.weight' has nan at \[5, 3\]"):
        flax_to_hf.export(tmp_path / "ck", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
