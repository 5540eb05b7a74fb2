"""The decoder on packed weights against the ordinary one, and the parts it is made of."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny import bfloat16_layers, layer_of, random_params, random_stack, tiny_config, to_params
from torch_reference import qwen2_model, random_weights

from qwen_jax import model, packed
from qwen_jax.cache import init_cache, key_units
from qwen_jax.config import ModelConfig
from qwen_jax.engine import Engine
from qwen_jax.kernels.decode_attention import decode_attention
from qwen_jax.kernels.decode_matmul import decode_matmul
from qwen_jax.kernels.packing import can_pack, pack, pack_layer, padded_inputs, unpack_layer
from qwen_jax.kernels.tilings import FORMATS, tiling_for
from qwen_jax.quant import QuantFormat, dequantize, group_scales, quantize, quantize_heads
from qwen_jax.sampling import SamplingParams

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
CFG = ModelConfig(
    vocab_size=96, hidden_size=128, num_layers=3, num_heads=2, head_dim=64, ffn_size=384,
    seq_length=16, use_dynamic_ntk=True, use_logn_attn=True,
)  # fmt: skip


@pytest.mark.parametrize("kind", ["int4", "nf4", "int8"])
@pytest.mark.parametrize("size", [512, 1024, 128, 640])
def test_packing_loses_nothing_and_pads_with_zeros(kind, size):
    q = quantize(jax.random.normal(jax.random.key(0), (48, size)), QuantFormat.named(kind))
    w = unpack_layer(*pack_layer(q.data, group_scales(q), kind), kind, jnp.float32)
    # The scales of nf4 are kept as float16: 11 bits of 24.
    np.testing.assert_allclose(
        w[:, :size], dequantize(q, jnp.float32), rtol=2**-11 if kind == "nf4" else 0
    )
    assert w.shape[1] % 256 == 0 and not w[:, size:].any()


@pytest.mark.parametrize("size", [128, 8, 600])
def test_packed_bfloat16_keeps_every_bit(size):
    # Bit patterns of all kinds, subnormal numbers and infinities too; not NaN, whose payload a CPU
    # may drop.
    bits = (jnp.arange(48 * size, dtype=jnp.uint32) * 40503).astype(jnp.uint16).reshape(48, size)
    bits = jnp.where((bits & 0x7FFF) > 0x7F80, bits & 0xFF80, bits)
    values, scale = pack_layer(bits.view(jnp.bfloat16), None, "bf16")
    assert scale is None and values.shape == (3, -(-size // 128) * 8, 32, 8)
    got = unpack_layer(values, None, "bf16", jnp.bfloat16).view(jnp.uint16)
    np.testing.assert_array_equal(got[:, :size], bits)
    assert not got[:, size:].any()


@pytest.mark.parametrize("name", ["qwen_1_8b", "qwen_7b", "qwen_14b", "qwen_72b"])
@pytest.mark.parametrize("kind", ["int4", "nf4", "int8", "bf16"])
def test_every_weight_of_the_real_models_has_a_tiling(name, kind):
    """For all rows that the kernel takes, on one card; thread blocks for half of it or more."""
    cfg = ModelConfig.from_hf(json.loads((CONFIGS / f"{name}.json").read_text()))
    D, F, A = cfg.hidden_size, cfg.ffn_size, cfg.attention_size
    for N, size in ((3 * A, D), (D, A), (2 * F, D), (D, F)):
        K = padded_inputs(size, kind)
        assert size <= K < 1.05 * size
        for M in (1, 8, 16, 24, 32):
            tiling = tiling_for(M, N, K, kind)
            tiling.check(N, K, FORMATS[kind].chunk)
            assert N // tiling.rows * tiling.splits >= 64, (N, K, M, tiling)


def test_what_cannot_be_packed_is_refused():
    for wrong in (jnp.zeros((2, 32, 128)), jnp.zeros((2, 24, 128), jnp.bfloat16)):
        assert not can_pack(wrong)
        with pytest.raises(NotImplementedError, match=f"packing as bf16 .* {wrong.dtype}"):
            pack(wrong)
    with pytest.raises(NotImplementedError):
        pack(jnp.zeros((2, 32, 128), jnp.bfloat16), random_stack(0, "int8", 2, 32, 128))


def test_a_word_holds_the_operand_of_one_tensor_core_product():
    # PTX ISA, "Matrix fragments for mma.m16n8k16": lane 4 g + t holds of A the pairs (row g, k 2t),
    # (row g + 8, k 2t), (row g, k 2t + 8), (row g + 8, k 2t + 8). Inputs are permuted: what the
    # hardware calls k 2t .. 2t + 1 and 2t + 8 .. 2t + 9 are inputs 8 t + 4 h .. 8 t + 4 h + 3.
    codes = np.random.default_rng(0).integers(0, 16, (16, 512)).astype(np.uint8)
    data = codes[:, 0::2] | codes[:, 1::2] << 4
    words, _ = pack_layer(jnp.asarray(data), jnp.ones((16, 4), jnp.float16), "int4")
    for unit, lane, word in [(0, 0, 0), (3, 17, 1), (7, 31, 3), (5, 6, 2)]:
        g, t, b, h = lane // 4, lane % 4, word // 2, word % 2
        first = unit * 64 + b * 32 + t * 8 + h * 4
        value = int(words[0, unit, lane, word])
        for register, (row, k) in enumerate([(g, 0), (g + 8, 0), (g, 2), (g + 8, 2)]):
            assert value >> (4 * register) & 15 == codes[row, first + k]
            assert value >> (4 * register + 16) & 15 == codes[row, first + k + 1]


def test_16_bytes_of_bfloat16_are_such_an_operand():
    # In the order of a lane's bytes: the four inputs of row g, then those of row g + 8.
    data = np.random.default_rng(0).normal(size=(16, 128)).astype(jnp.bfloat16)
    values, _ = pack_layer(jnp.asarray(data), None, "bf16")
    for unit, lane in [(0, 0), (3, 17), (7, 31), (4, 6)]:
        g, t, b, h = lane // 4, lane % 4, unit // 2, unit % 2
        four = slice(32 * b + 8 * t + 4 * h, 32 * b + 8 * t + 4 * h + 4)
        np.testing.assert_array_equal(values[0, unit, lane, :4], data[g, four])
        np.testing.assert_array_equal(values[0, unit, lane, 4:], data[g + 8, four])


@pytest.mark.parametrize("kind", ["int4", "nf4", "int8", "bf16"])
def test_product_with_one_layer_of_a_packed_stack(kind):
    q = random_stack(1, kind, 3, 2, 24, 256)
    w = pack(q)
    x = jax.random.normal(jax.random.key(2), (5, 1, 256))
    for layer in range(3):
        want = jnp.einsum("bti,noi->btno", x, layer_of(q, layer), precision="highest")
        got = decode_matmul(x, w, jnp.int32(layer))
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=0.03 if kind == "nf4" else 1e-4)


def test_two_weights_packed_as_one():
    up, gate = random_stack(3, "int4", 2, 32, 128), random_stack(4, "int4", 2, 32, 128)
    x = jax.random.normal(jax.random.key(5), (4, 128))
    both = decode_matmul(x, pack(up, gate), jnp.int32(1))
    for i, q in enumerate((up, gate)):
        alone = decode_matmul(x, pack(q), jnp.int32(1))
        # A wider product may add its 128 terms in another order: some ulps of the largest sums.
        np.testing.assert_allclose(both[:, i], alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("tokens", [1, 3])
def test_decode_attention_sees_filled_slots_only(tokens):
    L, B, S, N, H = 2, 3, 20, 2, 8
    q, k, v = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(B * tokens, N, H), (L, B, S, N, H), (L, B, S, N, H)])
    )
    visible = jnp.array([1, 7, 20, 4, 5, 6, 18, 19, 20][: B * tokens])
    poisoned = jnp.where(jnp.arange(S)[:, None, None] < 20, k, jnp.nan)
    got = decode_attention(q, poisoned, v, None, None, jnp.int32(1), visible)
    for r in range(B * tokens):
        b, n = r // tokens, int(visible[r])
        scores = np.einsum("nh,snh->ns", q[r], k[1, b, :n]) / np.sqrt(H)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        want = np.einsum("ns,snh->nh", weights / weights.sum(1, keepdims=True), v[1, b, :n])
        np.testing.assert_allclose(got[r], want, rtol=1e-4, atol=1e-5)


def test_int8_heads_are_within_half_a_step():
    x = jax.random.normal(jax.random.key(0), (5, 3, 64)).at[0, 0].set(0.0)
    codes, scale = quantize_heads(x)
    step = scale.astype(jnp.float32)[..., None]
    # The stored scale may be rounded down by 2^-9, then the largest code is cut at 127.
    assert (jnp.abs(codes * step - x) <= step * (0.5 + 127 / 256)).all()
    assert jnp.abs(codes * step - x).mean() < 0.3 * step.mean()


@pytest.mark.parametrize(
    ("kind", "cache_dtype"),
    [
        ("int4", jnp.float32),
        ("int4", jnp.int8),
        pytest.param("bf16", jnp.float32, marks=pytest.mark.slow),
        pytest.param("bf16", jnp.int8, marks=pytest.mark.slow),
    ],
)
def test_packed_decoder_gives_what_the_ordinary_one_gives(kind, cache_dtype):
    params = random_params(CFG, kind)
    small = packed.pack_params(params)
    assert packed.is_packed(small) and packed.packable(params)
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, CFG.vocab_size)
    counts = jnp.array([24, 19])
    caches = [init_cache(CFG, 2, 32, cache_dtype) for _ in range(2)]
    want, caches[0] = model.forward(CFG, params, None, tokens, caches[0], counts=counts)
    got, caches[1] = packed.forward(CFG, small, tokens, caches[1], counts=counts, fresh=True)
    loose = 1e-4 if cache_dtype == jnp.float32 else 0.05
    for b, n in enumerate((24, 19)):
        np.testing.assert_allclose(got[b, :n], want[b, :n], rtol=loose, atol=loose)
    for width in (1, 1, 3):
        step = jax.random.randint(jax.random.key(width), (2, width), 0, CFG.vocab_size)
        want, caches[0] = model.forward(CFG, params, None, step, caches[0])
        got, caches[1] = packed.forward(CFG, small, step, caches[1])
        np.testing.assert_allclose(got, want, rtol=loose, atol=loose)
        np.testing.assert_array_equal(caches[0].lengths, caches[1].lengths)


@pytest.mark.parametrize("kind", ["int4", pytest.param("bf16", marks=pytest.mark.slow)])
def test_channels_that_only_their_bias_makes_large_do_not_spoil_an_int8_cache(kind):
    """As in a real model, one pair of key channels with a bias of 100: packed or not."""
    params = random_params(CFG, kind)
    attn = params["layers"]["attn"]
    attn["bqkv"] = attn["bqkv"].at[:, 1, :, 5].set(100.0).at[:, 1, :, 37].set(-60.0)
    unit = key_units(attn["bqkv"][:, 1])
    assert set(np.unique(unit)) == {1.0, 64.0}  # 117 over 2
    np.testing.assert_array_equal(np.unique(np.where(unit > 1)[2]), [5, 37])
    small = packed.pack_params(params)
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, CFG.vocab_size)
    run = functools.partial(model.forward, CFG, params, None, tokens)
    truth, _ = run(init_cache(CFG, 2, 32, jnp.float32))
    plain, _ = run(init_cache(CFG, 2, 32, jnp.int8))
    cache = init_cache(CFG, 2, 32, jnp.int8)
    got, _ = packed.forward(CFG, small, tokens, cache)
    # Without units the keys' other channels would be whole multiples of 100 / 127: of order 1.
    for other in (plain, got):
        assert jnp.linalg.norm(other - truth) < 0.02 * jnp.linalg.norm(truth)
    # And with a cache of floats the units change nothing.
    exact, _ = packed.forward(CFG, small, tokens, init_cache(CFG, 2, 32, jnp.float32))
    np.testing.assert_allclose(exact, truth, rtol=1e-4, atol=1e-4)


def test_biases_whose_squares_overflow_have_units():
    bias = jnp.zeros((2, 64)).at[0, 5].set(1e20).at[1, 37].set(-1e30)
    unit = key_units(bias)
    assert jnp.isfinite(unit).all() and jnp.isfinite(1 / unit).all()
    want = [2.0 ** round(np.log2(1e20 / 2)), 2.0 ** round(np.log2(1e30 / 2))]
    np.testing.assert_array_equal([unit[0, 5], unit[1, 37]], want)


def test_units_of_keys_round_no_bfloat16_weight():
    w = random_stack(6, "bf16", 2, 3, 16, 128)
    unit = jnp.ldexp(1.0, jax.random.randint(jax.random.key(7), (2, 3, 16), -12, 13))
    packed_weight = pack(w, factor=unit.astype(jnp.bfloat16))
    got = unpack_layer(packed_weight.codes[1], None, "bf16", jnp.float32)
    want = layer_of(w, 1) * unit[1, :, :, None]
    np.testing.assert_array_equal(got, want.reshape(48, 128))


@pytest.mark.parametrize("kind", ["int4", pytest.param("bf16", marks=pytest.mark.slow)])
def test_logits_of_whole_sequences(kind):
    params = random_params(CFG, kind)
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, CFG.vocab_size)
    want = model.logits(CFG, params, None, tokens)
    got = packed.logits(CFG, packed.pack_params(params, consume=True), tokens)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["int4", pytest.param("bf16", marks=pytest.mark.slow)])
def test_an_int8_head_agrees_on_nearly_every_likeliest_token(kind):
    params = random_params(CFG, kind)
    tokens = jax.random.randint(jax.random.key(1), (4, 24), 0, CFG.vocab_size)
    want = model.logits(CFG, params, None, tokens)
    got = packed.logits(CFG, packed.pack_params(params, int8_head=True), tokens)
    assert jnp.abs(got - want).max() < 0.02 * jnp.abs(want).max()
    assert (got.argmax(-1) == want.argmax(-1)).mean() > 0.95


@pytest.mark.slow  # the programs of an engine
def test_packed_bfloat16_answers_as_transformers_does():
    cfg = tiny_config(seq_length=8192)
    weights = {name: round_bfloat16(w) for name, w in random_weights(cfg, seed=3).items()}
    params = bfloat16_layers(to_params(cfg, weights))
    engine = Engine(cfg, packed.pack_params(params), cache_dtype=jnp.float32)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, cfg.vocab_size, n).tolist() for n in (1, 17, 50)]
    answers = engine.generate(prompts, SamplingParams(greedy=True, max_new_tokens=40))
    reference = qwen2_model(cfg, weights)
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            ids = reference.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)
        assert answer == ids[0, len(prompt) :].tolist()


def round_bfloat16(w: np.ndarray) -> np.ndarray:
    return w.astype(jnp.bfloat16).astype(np.float32)
