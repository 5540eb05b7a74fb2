"""GPTQ files: unpacked as AutoGPTQ does, imported without loss, others refused with a reason."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from gptq_folder import pack
from safetensors.numpy import save_file

from convert import gptq
from convert.hf_files import FLOAT_DTYPES, HfWeights
from qwen_jax.errors import InputError
from qwen_jax.params import ParamSpec
from qwen_jax.quant import dequantize

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


def library_layer(bits) -> dict[str, np.ndarray]:
    with np.load(REFERENCE) as arrays:
        prefix = f"int{bits}."
        return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


@BOTH
def test_unpacks_as_autogptq_does(tmp_path, bits):
    layer = library_layer(bits)
    weights = open_layer(tmp_path, layer)
    q = gptq.read_linear(weights, one_layer((32, 256)), 0, gptq.Gptq(bits=bits))
    np.testing.assert_array_equal(dequantize(q, jnp.float32), layer["weight"])
    np.testing.assert_array_equal(q.scale, layer["scales"].T)
    # Output dimensions as the table has them: a reshape, nothing else.
    q = gptq.read_linear(weights, one_layer((2, 4, 4, 256)), 0, gptq.Gptq(bits=bits))
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
    q = gptq.read_linear(weights, one_layer((32, 256)), 0, later)
    np.testing.assert_array_equal(dequantize(q, jnp.float32), layer["weight"])
    with pytest.raises(InputError, match="not symmetric"):
        gptq.read_linear(weights, one_layer((32, 256)), 0, gptq.Gptq(bits=bits))


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
        gptq.read_linear(weights, one_layer((32, 256)), 0, gptq.Gptq(bits=4))


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
        ({"bits": {"a": [1]}}, "bits dict"),
    ],
)
@pytest.mark.parametrize("place", ["in_config", "in_file"])
def test_other_quantizations_are_refused_with_the_reason(tmp_path, change, match, place):
    write_configs(tmp_path, **{place: OFFICIAL | change})
    with pytest.raises(InputError, match=match):
        gptq.read_gptq(tmp_path)
