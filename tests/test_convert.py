"""Conversion both ways: exact against the table, strict about its input, all or nothing."""

import json
import pathlib
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import flax_to_hf, hf_to_flax, stream
from demo.tiny_checkpoint import write_tiny_checkpoint
from qwen_jax import checkpoint, layout
from qwen_jax.adapters import LoraConfig, init_lora, save_peft
from qwen_jax.checkpoint import load_params
from qwen_jax.checkpoint_writer import CheckpointWriter
from qwen_jax.config import load_hf_config
from qwen_jax.errors import InputError
from qwen_jax.manifest import load_manifest
from qwen_jax.params import param_table
from qwen_jax.quant import QuantFormat
from qwen_jax.sharding import make_mesh
from tests.tiny import to_params

KINDS = ("none", "int8", "int4", "nf4")
EIGHT = {"data": 2, "fsdp": 2, "tensor": 2}


def read_all(folder: pathlib.Path) -> dict[str, np.ndarray]:
    weights = {}
    for path in folder.glob("*.safetensors"):
        weights |= load_file(path)
    return weights


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """Two layers whose widths divide into every group, 216 rows so that eight devices fit."""
    folder = tmp_path_factory.mktemp("hf")
    return write_tiny_checkpoint(
        folder, hidden_size=256, kv_channels=64, ffn=256, vocab_size=216, tokenizer=False
    )


@pytest.fixture(scope="module")
def converted(hf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    for kind in KINDS:
        hf_to_flax.main(["--input", str(hf), "--output", str(folder / kind), "--quantize", kind])
    return folder


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def small(folder, **changes):
    sizes = dict(vocab_size=64, num_layers=2, shards=1, tokenizer=False)
    return write_tiny_checkpoint(folder, **(sizes | changes))


def assert_refused(source, output, match, **options):
    with pytest.raises(InputError, match=match) as caught:
        hf_to_flax.convert(source, output, **options)
    left = [path.name for path in output.parent.iterdir() if output.name in path.name]
    assert left == ([f".{output.name}.partial"] if "are kept in" in str(caught.value) else [])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on_mesh", [False, True])
def test_converted_equals_table(hf, converted, kind, on_mesh):
    mesh = make_mesh(EIGHT) if on_mesh else None
    cfg = load_hf_config(hf)
    manifest, params = load_params(converted / kind, mesh)
    assert manifest.config == cfg and manifest.quantization == QuantFormat.named(kind)
    assert_same(params, to_params(cfg, read_all(hf), jnp.bfloat16, kind))
    for leaf in jax.tree.leaves(params):
        assert len(leaf.sharding.device_set) == (8 if on_mesh else 1)


def test_dtype_casts_only_floats(converted):
    _, stored = load_params(converted / "nf4")
    _, wide = load_params(converted / "nf4", dtype=jnp.float32)
    assert wide["wte"].dtype == jnp.float32
    np.testing.assert_array_equal(wide["wte"], stored["wte"].astype(jnp.float32))
    assert_same(wide["layers"]["mlp"]["up"], stored["layers"]["mlp"]["up"])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_source_dtypes(tmp_path, dtype):
    source = small(tmp_path / "hf", dtype=dtype)
    manifest = hf_to_flax.convert(source, tmp_path / "ck", dtype="float32")
    _, params = load_params(tmp_path / "ck")
    assert_same(params, to_params(manifest.config, read_all(source), jnp.float32))


def test_tables_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "TABLE_ROWS", 48)
    monkeypatch.setattr(checkpoint, "_READ_BYTES", 1)  # slices larger than the limit must load too
    source = small(tmp_path / "hf", vocab_size=211)
    manifest = hf_to_flax.convert(source, tmp_path / "ck")
    assert len(list((tmp_path / "ck/params/wte/c").iterdir())) == 5
    for mesh in (None, make_mesh(EIGHT)):
        _, params = load_params(tmp_path / "ck", mesh)
        assert_same(params, to_params(manifest.config, read_all(source), jnp.bfloat16))


def test_fingerprint_is_of_the_source(hf, converted, tmp_path):
    prints = {load_manifest(converted / kind).fingerprint for kind in KINDS}
    assert len(prints) == 1
    other = hf_to_flax.convert(small(tmp_path / "hf"), tmp_path / "ck")
    assert other.fingerprint not in prints


def test_export_is_bit_exact(hf, converted, tmp_path):
    paths = ["--input", str(converted / "none"), "--output", str(tmp_path / "out")]
    flax_to_hf.main([*paths, "--shard_size", "1MB"])
    want, got = read_all(hf), read_all(tmp_path / "out")
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        np.testing.assert_array_equal(got[name].view(np.uint16), tensor.view(np.uint16))
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (hf / name).read_bytes()


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_export_dequantizes(hf, converted, tmp_path, kind):
    flax_to_hf.export(converted / kind, tmp_path / "out")
    # Half a step of the coarsest code against the largest weight of a group.
    bound = {"int8": 0.5 / 127, "int4": 0.5 / 7.5, "nf4": 0.16}[kind] * 1.05
    got = read_all(tmp_path / "out")
    for name, tensor in read_all(hf).items():
        want = tensor.astype(np.float32)
        error = np.abs(got[name].astype(np.float32) - want).max()
        assert error <= bound * np.abs(want).max() + np.abs(want).max() / 256


def test_export_merges_adapter(tmp_path):
    source = small(tmp_path / "hf", dtype="float32")
    manifest = hf_to_flax.convert(source, tmp_path / "ck", dtype="float32")
    cfg, lora_cfg = manifest.config, LoraConfig(rank=4, targets=("c_attn", "w2"))
    lora = init_lora(cfg, lora_cfg, jax.random.key(0))
    lora = jax.tree.map(lambda x: x + 0.1, lora)
    options = dict(base_name="tiny", fingerprint=manifest.fingerprint)
    save_peft(tmp_path / "lora", cfg, lora_cfg, lora, **options)
    flax_to_hf.export(tmp_path / "ck", tmp_path / "out", adapter=tmp_path / "lora")
    pairs = load_file(tmp_path / "lora/adapter_model.safetensors")
    got = read_all(tmp_path / "out")
    for name, tensor in read_all(source).items():
        prefix = "base_model.model." + name.removesuffix(".weight")
        want = tensor
        if f"{prefix}.lora_A.weight" in pairs:
            a, b = pairs[f"{prefix}.lora_A.weight"], pairs[f"{prefix}.lora_B.weight"]
            want = tensor + 16 / 4 * b @ a
        np.testing.assert_allclose(got[name], want, rtol=1e-6, atol=1e-6, err_msg=name)
    save_peft(tmp_path / "other", cfg, lora_cfg, lora, base_name="x", fingerprint="0" * 64)
    with pytest.raises(InputError, match="another base"):
        flax_to_hf.export(tmp_path / "ck", tmp_path / "out2", adapter=tmp_path / "other")
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("transformer.h.1.ln_2.weight"), r"lacks transformer\.h\.1\.ln_2"),
        (lambda t: t.update(score=np.zeros(3, np.float32)), "unknown tensors score"),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:-1].copy()}),
            r"lm_head\.weight \(63, 64\) instead of \(64, 64\)",
        ),
        (
            lambda t: t["transformer.h.1.mlp.c_proj.weight"].__setitem__((3, 5), np.nan),
            r"h\.1\.mlp\.c_proj\.weight' has nan at \[3, 5\]",
        ),
        (
            lambda t: t["lm_head.weight"].__setitem__((63, 0), np.inf),
            r"lm_head\.weight' has inf at \[63, 0\]",
        ),
    ],
)
def test_bad_tensors(tmp_path, change, match):
    source = small(tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")
    assert_refused(source, tmp_path / "ck", match)


def test_rotary_buffers_are_ignored(tmp_path):
    source = small(tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    tensors["transformer.h.0.attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(tensors, source / "model.safetensors")
    hf_to_flax.convert(source, tmp_path / "ck")
    _, params = load_params(tmp_path / "ck")
    wte = tensors["transformer.wte.weight"]
    np.testing.assert_array_equal(np.asarray(params["wte"], np.float32), wte.astype(np.float32))


def test_paths_may_go_up(hf, tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    hf_to_flax.main(["--input", str(hf), "--output", "../beside"])
    assert load_manifest("../beside").quantization is None
    flax_to_hf.main(["--input", "../beside", "--output", "../out"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["below", "beside", "out"]


def test_indivisible_group_and_wrong_family(tmp_path):
    source = small(tmp_path / "hf", ffn=96)
    assert_refused(source, tmp_path / "ck", "groups of 64", fmt=QuantFormat.named("nf4"))
    source = small(tmp_path / "qwen2", config_overrides={"model_type": "qwen2"})
    assert_refused(source, tmp_path / "ck", "Qwen2")


def test_existing_target(tmp_path):
    source = small(tmp_path / "hf")
    hf_to_flax.convert(source, tmp_path / "ck")
    with pytest.raises(InputError, match="already exists"):
        hf_to_flax.convert(source, tmp_path / "ck")
    hf_to_flax.convert(source, tmp_path / "ck", dtype="float32", overwrite=True)
    assert load_manifest(tmp_path / "ck").dtype == "float32"
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter.txt").touch()
    with pytest.raises(InputError, match="not overwritten"):
        hf_to_flax.convert(source, tmp_path / "home", overwrite=True)
    assert (tmp_path / "home/letter.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ck", "hf", "home"]


def chunk(folder: pathlib.Path) -> pathlib.Path:
    return next(p for p in sorted((folder / "params/layers.mlp.up/c").rglob("*")) if p.is_file())


def flip_byte(folder):
    data = bytearray(chunk(folder).read_bytes())
    data[100] ^= 1
    chunk(folder).write_bytes(data)


def rewrite_shape(folder):
    path = folder / "params/ln_f/zarr.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"data_type": "float32"}))


@pytest.mark.parametrize("on_mesh", [False, True])
@pytest.mark.parametrize(
    "damage",
    [
        flip_byte,
        rewrite_shape,
        lambda folder: chunk(folder).unlink(),
        lambda folder: chunk(folder).write_bytes(chunk(folder).read_bytes()[:-50]),
        lambda folder: (folder / "params/_METADATA").write_text("{"),
        lambda folder: (folder / "params/wte/zarr.json").unlink(),
    ],
)
def test_damage_is_found(tmp_path, damage, on_mesh):
    hf_to_flax.convert(small(tmp_path / "hf"), tmp_path / "ck")
    damage(tmp_path / "ck")
    with pytest.raises(InputError, match=r"^checkpoint .* is damaged: ") as caught:
        load_params(tmp_path / "ck", make_mesh(EIGHT) if on_mesh else None)
    assert "\n" not in str(caught.value)


def test_damaged_checkpoint_is_not_exported(tmp_path):
    hf_to_flax.convert(small(tmp_path / "hf"), tmp_path / "ck")
    flip_byte(tmp_path / "ck")
    with pytest.raises(InputError, match="is damaged"):
        flax_to_hf.export(tmp_path / "ck", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ck", "hf"]


def test_not_a_checkpoint(hf, tmp_path):
    with pytest.raises(InputError, match="convert it first"):
        load_manifest(hf)
    with pytest.raises(InputError, match="check the path"):
        load_params(tmp_path / "nothing")
    (tmp_path / checkpoint.MANIFEST_NAME).write_text('{"format": "other"}')
    with pytest.raises(InputError, match="convert the model again"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_memory_is_bounded(tmp_path, monkeypatch, kind):
    """With room for 4 MB of arrays, 60 MB of weights never lie in memory together."""
    sizes = dict(hidden_size=256, kv_channels=64, ffn=1024, vocab_size=9000, num_layers=30)
    source = write_tiny_checkpoint(tmp_path / "hf", tokenizer=False, **sizes)
    for name in ("_FILLING_BYTES", "_WRITING_BYTES", "_FREE_BYTES"):
        monkeypatch.setattr(stream, name, 4_000_000)
    tracemalloc.start()
    hf_to_flax.convert(source, tmp_path / "ck", fmt=QuantFormat.named(kind))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 25e6 < sum(path.stat().st_size for path in source.glob("*.safetensors")) / 2


def test_every_layer_must_be_written(hf, tmp_path):
    cfg = load_hf_config(hf)
    spec = param_table(cfg)[0]
    with (
        pytest.raises(ValueError, match="not written"),
        CheckpointWriter(tmp_path / "ck", cfg, "float32") as writer,
    ):
        writer.write(spec, slice(0, 216), {"": np.zeros(spec.shape, np.float32)})()
        writer.commit("0")
    assert not (tmp_path / "ck").exists()


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5mb", 1_500_000), ("800", 800)])
def test_shard_size(text, size):
    assert flax_to_hf.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5 gigabytes", "0"])
def test_shard_size_refused(text):
    with pytest.raises(InputError, match="shard_size"):
        flax_to_hf.parse_size(text)
