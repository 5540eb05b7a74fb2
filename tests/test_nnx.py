"""The Flax face is the same model: logits, gradients, a step of an nnx optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from tiny import bfloat16_layers, tiny_config, to_params
from torch_reference import qwen2_model, random_weights

from qwen_jax import model as decoder
from qwen_jax.adapters import Lora, LoraConfig, init_lora
from qwen_jax.errors import InputError
from qwen_jax.nnx import Qwen
from qwen_jax.packed_params import pack_params

CFG = tiny_config(hidden_size=128, head_dim=32, ffn_size=256, num_layers=2)


@pytest.fixture(scope="module")
def weights():
    return random_weights(CFG, seed=1)


@pytest.fixture(scope="module")
def lora():
    fresh = init_lora(CFG, LoraConfig(rank=4), jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.02, fresh)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, CFG.vocab_size, (2, 40)))


def loss(logits, tokens):
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
    return -picked.mean()


def test_logits_are_those_of_transformers(weights, tokens):
    with torch.no_grad():
        expected = qwen2_model(CFG, weights)(torch.tensor(np.asarray(tokens))).logits
    np.testing.assert_allclose(
        Qwen(CFG, to_params(CFG, weights))(tokens), expected.numpy(), atol=1e-4
    )


def test_packed_weights_are_refused(weights):
    params = bfloat16_layers(to_params(CFG, weights))
    with pytest.raises(InputError, match="packed for generation; give those of"):
        Qwen(CFG, pack_params(params))


@pytest.mark.parametrize("fmt", ["none", "nf4"])
def test_gradients_of_the_adapter_are_those_of_jax(weights, lora, tokens, fmt):
    params = to_params(CFG, weights, fmt=fmt)
    model = Qwen(CFG, params, lora)
    np.testing.assert_array_equal(model(tokens), decoder.logits(CFG, params, lora, tokens))

    def nnx_loss(model):
        return loss(model(tokens), tokens)

    def jax_loss(weights):
        low = Lora(weights=weights, scale=lora.scale)
        return loss(decoder.logits(CFG, params, low, tokens), tokens)

    got = nnx.jit(nnx.grad(nnx_loss, argnums=nnx.DiffState(0, nnx.LoRAParam)))(model)
    expected = jax.jit(jax.grad(jax_loss))(lora.weights)
    got = nnx.to_pure_dict(got)["adapter"]
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)


def test_an_nnx_optimizer_trains_the_adapter_and_leaves_the_base(weights, lora, tokens):
    model = Qwen(CFG, to_params(CFG, weights, fmt="int8"), lora)
    before = jax.tree.map(np.asarray, model.params)
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        wrt = nnx.DiffState(0, nnx.LoRAParam)
        value, grads = nnx.value_and_grad(lambda m: loss(m(tokens), tokens), argnums=wrt)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(5)]
    assert losses[-1] < losses[0] - 0.1
    for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)
    assert isinstance(model.lora, Lora) and model.lora.scale == lora.scale


def test_without_an_adapter(weights, tokens):
    model = Qwen(CFG, to_params(CFG, weights))
    assert model.lora is None
    assert not jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
    assert len(nnx.to_flat_state(nnx.state(model, nnx.Param))) == 11
