"""The parameter table against the published files: names, sizes, layouts."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.params import abstract_params, init_params, num_parameters, param_table, tree_bytes
from qwen_jax.quant import QTensor, QuantFormat
from qwen_jax.sharding import make_mesh, parse_mesh

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def load(name: str) -> ModelConfig:
    return ModelConfig.from_hf(json.loads((CONFIGS / f"qwen_{name}.json").read_text()))


def test_the_table_gives_the_published_72b():
    cfg = load("72b")
    table = param_table(cfg)
    assert len(table) == 11
    assert sum(len(spec.torch_names()) for spec in table) == 643
    # total_size in the published model.safetensors.index.json
    assert 2 * num_parameters(cfg) == 144_575_840_256
    assert sum(2 * math.prod(s.torch_shape) * max(s.layers, 1) for s in table) == 144_575_840_256


@pytest.mark.parametrize(
    "name, billions", [("1_8b", 1.84), ("7b", 7.72), ("14b", 14.17), ("72b", 72.29)]
)
def test_every_size_and_its_chat_version_load(name, billions):
    assert round(num_parameters(load(name)) / 1e9, 2) == billions
    assert num_parameters(load(name + "_chat")) == num_parameters(load(name))


def test_bytes_of_the_quantized_72b():
    cfg = load("72b")
    linear = 80 * (4 * 8192 * 8192 + 3 * 8192 * 24576)
    rest = 144_575_840_256 - 2 * linear
    int4 = tree_bytes(abstract_params(cfg, jnp.bfloat16, QuantFormat.named("int4")))
    assert int4 == rest + linear // 2 + 2 * linear // 128
    nf4 = tree_bytes(abstract_params(cfg, jnp.bfloat16, QuantFormat.named("nf4")))
    assert nf4 == rest + linear // 2 + linear // 64 + 4 * linear // 64 // 256 + 5 * 80 * 4


@pytest.mark.parametrize("kind", ["none", "int8", "int4", "nf4"])
def test_fsdp_divides_the_layers_bytes(kind):
    cfg, fmt = load("72b"), QuantFormat.named(kind)
    mesh = make_mesh(parse_mesh("fsdp=8"))

    def local_bytes(leaf):
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    layers = abstract_params(cfg, jnp.bfloat16, fmt, mesh)["layers"]
    local = sum(local_bytes(leaf) for leaf in jax.tree.leaves(layers))
    # Norms, biases and NF4's second scales stay whole: about one in ten thousand.
    assert local / tree_bytes(layers) == pytest.approx(1 / 8, rel=0.01)


def test_groups_are_never_cut_by_a_mesh():
    cfg = ModelConfig(
        vocab_size=100, hidden_size=384, num_layers=1, num_heads=6, head_dim=64, ffn_size=640
    )
    mesh = make_mesh(parse_mesh("tensor=2"))
    layers = abstract_params(cfg, jnp.bfloat16, QuantFormat.named("int4"), mesh)["layers"]
    for leaf in jax.tree.leaves(layers, is_leaf=lambda x: isinstance(x, QTensor)):
        if isinstance(leaf, QTensor):
            data = leaf.data.sharding.shard_shape(leaf.data.shape)
            scale = leaf.scale.sharding.shard_shape(leaf.scale.shape)
            assert data[-1] * 2 == scale[-1] * 128


@pytest.mark.parametrize("kind", ["none", "int8", "nf4"])
def test_random_weights_are_born_as_the_table_says(kind):
    cfg, fmt = load("tiny"), QuantFormat.named(kind)
    mesh = make_mesh(parse_mesh("data=2,fsdp=2,tensor=2"))
    params = init_params(cfg, jax.random.key(0), jnp.bfloat16, fmt, mesh)
    abstract = abstract_params(cfg, jnp.bfloat16, fmt, mesh)
    assert jax.tree.structure(params) == jax.tree.structure(abstract)
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(abstract), strict=True):
        assert (got.shape, got.dtype, got.sharding) == (want.shape, want.dtype, want.sharding)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "qwen2"}, "Qwen2"),
        ({"visual": {}}, "Qwen-VL"),
        ({"rotary_emb_bas": 5}, "did you mean 'rotary_emb_base'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"hidden_size": "8192"}, "hidden_size"),
        ({"intermediate_size": 5}, "even"),
        ({"rope_theta": 5.0}, "contradicts"),
        ({"num_hidden_layers": 0}, "num_layers"),
    ],
)
def test_bad_configs_are_refused(change, message):
    good = json.loads((CONFIGS / "qwen_72b.json").read_text())
    with pytest.raises(InputError, match=message):
        ModelConfig.from_hf(good | change)


@pytest.mark.parametrize("text", ["0", "x", "data=2,tensr=2", "tensor=-1", "2,2", "data="])
def test_bad_meshes_are_refused(text):
    with pytest.raises(InputError, match="--mesh"):
        parse_mesh(text)


def test_a_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(InputError, match="needs 16 devices, this machine has 8"):
        make_mesh(parse_mesh("16"))
