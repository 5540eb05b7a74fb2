"""Prompts that are read in chunks give what they give at once, in memory that does not grow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config, to_params
from torch_reference import TorchQwen, random_weights

from qwen_jax import model, packed
from qwen_jax.cache import init_cache
from qwen_jax.config import ModelConfig
from qwen_jax.engine import Engine
from qwen_jax.kernels.attention import _attention_cudnn_cached, attention
from qwen_jax.params import abstract_params, init_params, shardings
from qwen_jax.prefill import fill
from qwen_jax.quant import QuantFormat
from qwen_jax.sampling import SamplingParams
from qwen_jax.sharding import make_mesh
from qwen_jax.slots import Slots

# Lengths in three rows of the NTK table; the chunks of 64 are one, two, three and five.
CFG = tiny_config(use_dynamic_ntk=True, use_logn_attn=True)
COUNTS = np.array([300, 40, 64, 150], np.int32)
TOKENS = np.random.default_rng(0).integers(0, CFG.vocab_size, (4, 300)).astype(np.int32)
GREEDY = SamplingParams(greedy=True, max_new_tokens=12)


@pytest.fixture(scope="module")
def weights():
    return random_weights(CFG, seed=1)


def last_hidden(cfg, params, chunk, dtype):
    cache = init_cache(cfg, 4, 320, dtype)
    run = jax.jit(fill, static_argnums=(0, 1, 7))
    return run(cfg, None, params, {}, cache, TOKENS % cfg.vocab_size, COUNTS, chunk)


def error(got, want) -> float:
    return float(jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want))


def test_chunks_give_the_logits_of_torch(weights):
    params = to_params(CFG, weights)
    hidden, cache = last_hidden(CFG, params, 64, jnp.float32)
    np.testing.assert_array_equal(cache.lengths, COUNTS)
    logits = model.unembed(params, hidden)
    for row, n in enumerate(COUNTS):
        theirs = TorchQwen(CFG, weights).logits(TOKENS[row, :n])[-1].numpy()
        np.testing.assert_allclose(logits[row], theirs, atol=1e-4)


@pytest.mark.parametrize("chunk", [64, 100])
def test_chunks_fill_the_cache_as_one_pass_does(weights, chunk):
    params = to_params(CFG, weights)
    want, whole = last_hidden(CFG, params, 512, jnp.float32)
    got, parts = last_hidden(CFG, params, chunk, jnp.float32)
    np.testing.assert_allclose(got, want, atol=2e-5)  # sums of up to 300 terms in another order
    np.testing.assert_array_equal(parts.ntk, whole.ntk)
    for row, n in enumerate(COUNTS):
        np.testing.assert_allclose(parts.k[:, row, :n], whole.k[:, row, :n], atol=2e-5)
        np.testing.assert_allclose(parts.v[:, row, :n], whole.v[:, row, :n], atol=2e-5)


def test_chunks_round_no_more_than_one_pass_does(weights):
    """bfloat16, and int8: there later chunks read what an earlier one rounded."""
    truth, _ = last_hidden(CFG, to_params(CFG, weights), 512, jnp.float32)
    params = to_params(CFG, weights, jnp.bfloat16)
    once, parts = (last_hidden(CFG, params, chunk, jnp.bfloat16)[0] for chunk in (512, 64))
    assert error(parts, truth) < 1.5 * error(once, truth) < 0.03
    params = to_params(CFG, weights)
    small, _ = last_hidden(CFG, params, 64, jnp.int8)
    assert 1e-5 < error(small, truth) < 0.02


def test_packed_weights_in_chunks():
    cfg = ModelConfig(
        vocab_size=96, hidden_size=128, num_layers=2, num_heads=2, head_dim=64, ffn_size=256,
        seq_length=64, use_dynamic_ntk=True, use_logn_attn=True,
    )  # fmt: skip
    params = init_params(cfg, jax.random.key(0), jnp.float32, QuantFormat.named("int4"))
    small = packed.pack_params(params)
    # A code of the int8 cache that falls the other way is a step of 1/127.
    for dtype, atol in ((jnp.float32, 1e-4), (jnp.int8, 0.02)):
        want, _ = last_hidden(cfg, params, 64, dtype)
        got, _ = last_hidden(cfg, small, 64, dtype)
        np.testing.assert_allclose(got, want, atol=atol)


@pytest.mark.slow  # six programs to compile
def test_the_engine_and_its_slots_chunk_long_prompts(weights):
    params = to_params(CFG, weights)
    prompts = [TOKENS[row, :n].tolist() for row, n in enumerate(COUNTS)]
    want = Engine(CFG, params).generate(prompts, GREEDY)
    small = Engine(CFG, params, prefill_tokens=256)
    assert small.chunk(4) == 64 and small.chunk(1) == 256
    assert small.generate(prompts, GREEDY) == want
    small.prefill_tokens = 100  # no divisor of the padded length
    slots = Slots(small, 1)
    _, piece = slots.add(prompts[0], GREEDY)
    ids = list(piece.ids)
    while slots.free == 0:
        ids += slots.step()[0].ids
    assert ids == want[0]
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    layouts = shardings(abstract_params(CFG, np.float32, None, mesh))
    split = Engine(CFG, jax.tree.map(jax.device_put, params, layouts), mesh=mesh, prefill_tokens=64)
    assert split.chunk(4) == 64
    assert split.generate(prompts, GREEDY) == want


def test_memory_grows_with_the_chunk_and_not_with_the_square_of_the_prompt():
    def temporary(T: int) -> int:
        params = abstract_params(CFG, jnp.float32)
        cache = jax.eval_shape(lambda: init_cache(CFG, 1, T, jnp.float32))
        tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
        counts = jax.ShapeDtypeStruct((1,), jnp.int32)
        run = jax.jit(fill, static_argnums=(0, 1, 7), donate_argnums=4)
        lowered = run.lower(CFG, None, params, {}, cache, tokens, counts, 128)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(8192), temporary(32768)
    assert long < 4.2 * short  # a chunk's scores, the layer that is read: both linear
    assert long < 32768**2  # a quarter of one head's scores


@pytest.mark.parametrize("starts", [(0, 0), (70, 13)])
def test_what_cudnn_is_told_means_the_causal_rule(starts, monkeypatch):
    """cuDNN itself runs on cards only; jax's own XLA path takes the same arguments."""
    S, T = 140, 70
    q = jax.random.normal(jax.random.key(0), (2, T, 3, 16))
    k, v = (jax.random.normal(jax.random.key(i), (2, S, 3, 16)) for i in (1, 2))
    q_index = jnp.array(starts)[:, None] + jnp.arange(T)
    original = jax.nn.dot_product_attention

    def on_xla(*args, implementation, **settings):
        assert implementation == "cudnn"
        return original(*args, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_xla)
    got = _attention_cudnn_cached(q, k, v, q_index)
    want = attention(q, k, v, q_index=q_index, implementation="xla")
    np.testing.assert_allclose(got, want, atol=2e-6)
