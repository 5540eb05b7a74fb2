"""GPTQ files: unpacked as AutoGPTQ does, imported without loss, others refused with a reason."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gptq_folder import pack, write_gptq_checkpoint
from safetensors.numpy import load_file, save_file
from torch_reference import TorchQwen

import qwen_jax
from convert import flax_to_hf, gptq, hf_to_flax
from convert.hf_files import FLOAT_DTYPES, HfWeights
from qwen_jax.checkpoint import load_params
from qwen_jax.errors import InputError
from qwen_jax.params import ParamSpec, param_table
from qwen_jax.quant import QTensor, QuantFormat, dequantize

pytestmark = pytest.mark.optimized

REFERENCE = pathlib.Path(__file__).parent / "data" / "auto_gptq_reference.npz"
BOTH = pytest.mark.parametrize("bits", [4, 8])


def one_layer(shape) -> ParamSpec:
    return ParamSpec(
        path=("w",), torch_name="w.{layer}.weight", shape=shape, axes=(None,) * len(shape),
        role="linear", layers=1,
    )  # fmt: skip


def open_layer(folder, tensors) -> HfWeights:
    tensors = {f"w.0.{name}": array for name, array in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    return HfWeights(folder, (*FLOAT_DTYPES, "I32"))


def read_linear(weights, shape, layout, layer=0) -> QTensor:
    """One layer as a conversion makes it: allocated, then filled block by block."""
    spec = one_layer(shape)
    part, _ = gptq.linear_part(weights, spec, layer, layout)
    arrays = {
        name: np.full(size, 85, dtype)
        for name, (size, dtype) in layout.fmt.shapes(spec.out_shape, spec.in_size).items()
    }
    for block in part.blocks:
        part.fill(block, arrays)
    return QTensor(kind=layout.fmt.kind, **arrays)


def library_layer(bits) -> dict[str, np.ndarray]:
    with np.load(REFERENCE) as arrays:
        prefix = f"int{bits}."
        return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


@BOTH
@pytest.mark.parametrize("block_bytes", [16_000_000, 1000])
def test_unpacks_as_autogptq_does(tmp_path, monkeypatch, bits, block_bytes):
    monkeypatch.setattr(gptq, "_BLOCK_BYTES", block_bytes)
    layer = library_layer(bits)
    weights = open_layer(tmp_path, layer)
    q = read_linear(weights, (32, 256), gptq.Gptq(bits=bits))
    np.testing.assert_array_equal(dequantize(q, jnp.float32), layer["weight"])
    np.testing.assert_array_equal(q.scale, layer["scales"].T)
    # Output dimensions as the table has them: a reshape, nothing else.
    q = read_linear(weights, (2, 4, 4, 256), gptq.Gptq(bits=bits))
    assert q.shape == (2, 4, 4, 256) and q.scale.shape == (2, 4, 4, 2)
    np.testing.assert_array_equal(dequantize(q, jnp.float32).reshape(32, 256), layer["weight"])


@BOTH
def test_the_packing_of_the_tests_is_that_of_autogptq(bits):
    layer = library_layer(bits)
    packed, dequantized = pack(layer["weight"], bits)
    np.testing.assert_array_equal(packed["qzeros"], layer["qzeros"])
    assert np.abs(dequantized - layer["weight"]).max() < layer["scales"].max()


@BOTH
def test_zero_points_of_the_second_layout(tmp_path, bits):
    layer = library_layer(bits)
    full = layer["qzeros"].view(np.uint32) + np.uint32(0x11111111 if bits == 4 else 0x01010101)
    weights = open_layer(tmp_path, layer | {"qzeros": full.view(np.int32)})
    later = gptq.Gptq(bits=bits, stored_minus_one=False)
    q = read_linear(weights, (32, 256), later)
    np.testing.assert_array_equal(dequantize(q, jnp.float32), layer["weight"])
    with pytest.raises(InputError, match="not symmetric"):
        read_linear(weights, (32, 256), gptq.Gptq(bits=bits))


def changed(array, index, value):
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("g_idx", lambda a: a[np.random.default_rng(0).permutation(256)], "act-order"),
        ("g_idx", lambda a: changed(a, 200, 0), "puts input 200 into group 0, expected 1"),
        ("qzeros", lambda a: changed(a, (1, 2), 0x77777776), "zero points other than 8"),
        ("scales", lambda a: changed(a, (0, 3), np.inf), r"scales' has inf at \[0, 3\]"),
    ],
)
def test_what_the_formats_cannot_hold_is_refused(tmp_path, name, change, match):
    layer = library_layer(4)
    weights = open_layer(tmp_path, layer | {name: change(layer[name])})
    with pytest.raises(InputError, match=match):
        read_linear(weights, (32, 256), gptq.Gptq(bits=4))


def write_configs(folder, in_config=None, in_file=None):
    config = {} if in_config is None else {"quantization_config": in_config}
    (folder / "config.json").write_text(json.dumps(config))
    if in_file is not None:
        (folder / "quantize_config.json").write_text(json.dumps(in_file))


OFFICIAL = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}


def test_either_config_names_the_quantization(tmp_path):
    write_configs(tmp_path)
    assert gptq.read_gptq(tmp_path) is None
    write_configs(tmp_path, in_config=OFFICIAL | {"quant_method": "gptq"})
    assert gptq.read_gptq(tmp_path) == gptq.Gptq(bits=4)
    write_configs(tmp_path, in_file=OFFICIAL | {"bits": 8})
    assert gptq.read_gptq(tmp_path) == gptq.Gptq(bits=8)
    write_configs(tmp_path, in_config=OFFICIAL, in_file=OFFICIAL | {"bits": 8})
    with pytest.raises(InputError, match="disagree"):
        gptq.read_gptq(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"desc_act": True}, "act-order"),
        ({"group_size": 64}, "group_size 64; .* groups of 128"),
        ({"group_size": -1}, "group_size -1"),
        ({"bits": 3}, "bits 3; only 4 and 8"),
        ({"bits": True}, "bits True"),
        ({"sym": False}, "symmetric"),
        ({"quant_method": "awq"}, "quant_method 'awq'; only gptq"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"bits": {"a": [1]}}, "bits a dict"),
    ],
)
@pytest.mark.parametrize("place", ["in_config", "in_file"])
def test_other_quantizations_are_refused_with_the_reason(tmp_path, change, match, place):
    write_configs(tmp_path, **{place: OFFICIAL | change})
    with pytest.raises(InputError, match=match):
        gptq.read_gptq(tmp_path)


# Whole folders.


@BOTH
def test_a_folder_is_imported_without_loss(tmp_path, bits):
    weights = write_gptq_checkpoint(tmp_path / "hf", bits)
    hf_to_flax.main(["--input", str(tmp_path / "hf"), "--output", str(tmp_path / "ck")])
    manifest, params = load_params(tmp_path / "ck")
    assert manifest.quantization == QuantFormat(kind=f"int{bits}", group=128)
    for spec in param_table(manifest.config):
        leaf = params
        for name in spec.path:
            leaf = leaf[name]
        dtype = jnp.bfloat16
        if spec.role == "linear":
            assert leaf.scale.dtype == jnp.float16
            leaf, dtype = dequantize(leaf, jnp.float32), jnp.float32
        want = np.stack([weights[name] for name in spec.torch_names()])
        want = np.asarray(jnp.asarray(want.reshape(leaf.shape), dtype))
        np.testing.assert_array_equal(np.asarray(leaf), want, err_msg=str(spec.path))


@BOTH
def test_logits_equal_torch_with_the_dequantized_weights(tmp_path, bits):
    weights = write_gptq_checkpoint(tmp_path / "hf", bits)
    hf_to_flax.convert(tmp_path / "hf", tmp_path / "ck", dtype="float32")
    model = qwen_jax.load(tmp_path / "ck")
    ids = np.random.default_rng(0).integers(0, 211, 300)
    want = TorchQwen(model.config, weights).logits(torch.tensor(ids)).numpy()
    np.testing.assert_allclose(np.asarray(model.logits(ids[None]))[0], want, atol=2e-4)


def test_an_interrupted_import_goes_on(tmp_path, monkeypatch):
    write_gptq_checkpoint(tmp_path / "hf", 4)
    hf_to_flax.convert(tmp_path / "hf", tmp_path / "whole")
    real, calls, interrupted = gptq._check_zeros, [], [True]

    def fail_once(*args):
        calls.append(args)
        if args[1] == "transformer.h.0.mlp.w2" and interrupted:
            raise InputError("interrupted here")
        real(*args)

    monkeypatch.setattr(gptq, "_check_zeros", fail_once)
    with pytest.raises(InputError, match=r"interrupted here; .* run the command again"):
        hf_to_flax.convert(tmp_path / "hf", tmp_path / "ck")
    interrupted.clear()
    calls.clear()
    hf_to_flax.convert(tmp_path / "hf", tmp_path / "ck")
    first, second = (load_params(tmp_path / name)[1] for name in ("whole", "ck"))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    # Of the ten linear layers those before the fault in the table's order are kept: 3 x 2.
    assert len(calls) == 4


def test_other_quantization_of_a_quantized_folder_is_refused(tmp_path):
    write_gptq_checkpoint(tmp_path / "hf", 4)
    hf_to_flax.convert(tmp_path / "hf", tmp_path / "same", fmt=QuantFormat.named("int4"))
    for kind in ("int8", "nf4"):
        with pytest.raises(InputError, match=f"4 bits already; leave --quantize {kind} out"):
            hf_to_flax.convert(tmp_path / "hf", tmp_path / "ck", fmt=QuantFormat.named(kind))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_without_the_zero_biases_of_autogptq(tmp_path):
    write_gptq_checkpoint(tmp_path / "hf", 4, zero_biases=False)
    hf_to_flax.convert(tmp_path / "hf", tmp_path / "ck")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t["transformer.h.1.mlp.w1.bias"].__setitem__(3, 1), r"w1\.bias is not zero"),
        (lambda t: t.pop("transformer.h.1.mlp.w1.g_idx"), r"lacks transformer\.h\.1\.mlp\.w1\.g_i"),
        (lambda t: t.pop("transformer.h.0.attn.c_attn.bias"), r"lacks .*c_attn\.bias"),
        (
            lambda t: t.update({"transformer.h.0.mlp.w1.weight": np.zeros((256, 128), np.float16)}),
            r"unknown tensors transformer\.h\.0\.mlp\.w1\.weight",
        ),
        (
            lambda t: t.update({"lm_head.weight": np.zeros((211, 128), np.int32)}),
            r"integers for floats.*lm_head",
        ),
        (
            lambda t: t.update({"transformer.h.0.mlp.w2.qweight": np.zeros((16, 256), np.float32)}),
            r"floats for integers.*w2\.qweight",
        ),
        (
            lambda t: t.update({"transformer.h.0.mlp.w2.scales": np.zeros((2, 256), np.float16)}),
            r"w2\.scales \(2, 256\) instead of \(1, 256\)",
        ),
    ],
)
def test_folders_of_another_kind_are_refused(tmp_path, change, match):
    write_gptq_checkpoint(tmp_path / "hf", 4)
    change_tensors(tmp_path / "hf", change)
    with pytest.raises(InputError, match=match):
        hf_to_flax.convert(tmp_path / "hf", tmp_path / "ck")


def test_the_export_of_an_import_is_a_plain_model(tmp_path):
    weights = write_gptq_checkpoint(tmp_path / "hf", 4)
    hf_to_flax.convert(tmp_path / "hf", tmp_path / "ck")
    flax_to_hf.export(tmp_path / "ck", tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        want = weights[name].astype(tensor.dtype)
        np.testing.assert_array_equal(tensor.view(np.uint16), want.view(np.uint16), err_msg=name)
    hf_to_flax.convert(tmp_path / "out", tmp_path / "again")
