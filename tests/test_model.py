"""The parity ladder: every block and the whole model against PyTorch in float32.

Tolerances: rms_norm and rope 1e-6, blocks 1e-5, logits 1e-4 absolute, where activations are of
order one. Prompts have about 500 tokens, since short ones miss faults of rope.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny import tiny_config, to_params
from torch_reference import TorchQwen, qwen2_model, random_weights
from transformers.models.qwen2 import modeling_qwen2

from qwen_jax import model
from qwen_jax.cache import init_cache
from qwen_jax.errors import InputError
from qwen_jax.kernels.rms_norm import rms_norm
from qwen_jax.layer_modes import Relay
from qwen_jax.positions import rope, rope_angles

pytestmark = pytest.mark.optimized

T = 500
# Odd head counts, a head size that is no power of two, a wide and a narrow FFN.
SHAPES = {
    "usual": {},
    "odd heads": dict(num_heads=3, head_dim=24, hidden_size=72, ffn_size=100, vocab_size=97),
    "rope base 1e6": dict(rope_base=1e6, num_heads=2, head_dim=32, num_layers=2),
    "one wide head": dict(num_heads=1, head_dim=128, hidden_size=128, num_layers=1),
    "epsilon 1e-5": dict(norm_eps=1e-5, ffn_size=33, num_layers=5),
}


def ids_for(cfg, seed=1, rows=1, length=T):
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, (rows, length)).astype(np.int32)


def test_rms_norm_matches_torch():
    cfg = tiny_config()
    x = np.random.default_rng(0).standard_normal((2, 7, 64)).astype(np.float32) * 3
    reference = modeling_qwen2.Qwen2RMSNorm(64, eps=cfg.norm_eps)
    reference.weight.data = torch.linspace(0.5, 1.5, 64)
    ours = rms_norm(jnp.asarray(x), jnp.asarray(reference.weight.detach().numpy()), 1e-6)
    np.testing.assert_allclose(ours, reference(torch.tensor(x)).detach().numpy(), atol=1e-6)


def test_rms_norm_in_bfloat16_rounds_where_torch_does():
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    weight = np.linspace(0.5, 1.5, 64, dtype=np.float32)
    reference = modeling_qwen2.Qwen2RMSNorm(64, eps=1e-6).to(torch.bfloat16)
    reference.weight.data = torch.tensor(weight).bfloat16()
    theirs = reference(torch.tensor(x).bfloat16()).float().detach().numpy()
    ours = rms_norm(jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16), 1e-6)
    assert (np.asarray(ours, np.float32) == theirs).mean() > 0.99  # an ulp of rsqrt may round away


@pytest.mark.parametrize("base", [1e4, 1e6])
def test_rope_matches_torch(base):
    cfg = tiny_config(rope_base=base)
    x = np.random.default_rng(0).standard_normal((1, T, 4, 16)).astype(np.float32)
    positions = jnp.arange(T)[None]
    ours = rope(jnp.asarray(x), *rope_angles(cfg, positions, jnp.zeros(1, jnp.int32)))
    theirs = TorchQwen(cfg, {}).rotate(torch.tensor(x[0]), alpha=1.0)
    # cos and sin of angles up to 500 rad: a float32 angle is good to 500 * 6e-8 = 3e-5 relative to
    # the turn, but both sides round the same product, so only the functions' last bits differ.
    np.testing.assert_allclose(ours[0], theirs.numpy(), atol=1e-6)


def test_mlp_order_is_w1_times_silu_w2():
    cfg = tiny_config()
    w = random_weights(cfg)
    params = to_params(cfg, w)
    x = np.random.default_rng(0).standard_normal((1, 9, 64)).astype(np.float32)
    reference = qwen2_model(cfg, w).model.layers[1].mlp
    layer = jax.tree.map(lambda leaf: leaf[1], params["layers"]["mlp"])
    relay = Relay(baton=jnp.zeros(()), kept=None)
    ours, _ = model.mlp_block((jnp.asarray(x),) * 2, layer, {}, relay)
    np.testing.assert_allclose(ours, reference(torch.tensor(x)).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_match_transformers(shape):
    cfg = tiny_config(**SHAPES[shape])
    w = random_weights(cfg)
    ids = ids_for(cfg, rows=2)
    with torch.no_grad():
        theirs = qwen2_model(cfg, w)(torch.tensor(ids).long()).logits.numpy()
    ours = np.asarray(model.logits(cfg, to_params(cfg, w), None, ids))
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("length", [63, 64, 65, 128, 129, 256, 257, 500])
def test_ntk_and_logn_past_seq_length_match_torch(length):
    cfg = tiny_config(use_dynamic_ntk=True, use_logn_attn=True)
    w = random_weights(cfg)
    ids = ids_for(cfg, length=length)
    theirs = TorchQwen(cfg, w).logits(ids[0]).numpy()
    np.testing.assert_allclose(
        model.logits(cfg, to_params(cfg, w), None, ids)[0], theirs, atol=1e-4
    )


def test_ntk_of_each_row_follows_its_own_length():
    cfg = tiny_config(use_dynamic_ntk=True, use_logn_attn=True)
    w = random_weights(cfg)
    params, reference = to_params(cfg, w), TorchQwen(cfg, w)
    ids = ids_for(cfg, rows=3, length=200)
    lengths = np.array([200, 50, 100], np.int32)
    ours = model.logits(cfg, params, None, ids, lengths)
    for row, n in enumerate(lengths):
        theirs = reference.logits(ids[row, :n]).numpy()
        np.testing.assert_allclose(ours[row, :n], theirs, atol=1e-4)


def test_training_sees_neither_ntk_nor_logn():
    cfg = tiny_config(use_dynamic_ntk=True, use_logn_attn=True)
    plain = dataclasses.replace(cfg, use_dynamic_ntk=False, use_logn_attn=False)
    w = random_weights(cfg)
    params, ids = to_params(cfg, w), ids_for(cfg, length=300)
    hidden = model.hidden_states(cfg, params, None, jnp.asarray(ids))
    theirs = TorchQwen(plain, w).logits(ids[0]).numpy()
    np.testing.assert_allclose(model.unembed(params, hidden)[0], theirs, atol=1e-4)


@pytest.mark.parametrize("long", [False, True])
def test_cached_decode_equals_full_forward(long):
    cfg = tiny_config(use_dynamic_ntk=long, use_logn_attn=long)
    w = random_weights(cfg)
    params = to_params(cfg, w)
    prompt, steps = (150, 30) if long else (40, 12)
    ids = ids_for(cfg, length=prompt + steps)
    cache = init_cache(cfg, 1, 256, jnp.float32)
    forward = jax.jit(model.forward, static_argnums=0)
    hidden, cache = forward(cfg, params, None, jnp.asarray(ids[:, :prompt]), cache)
    rows = [hidden[0]]
    for t in range(prompt, prompt + steps):
        hidden, cache = forward(cfg, params, None, jnp.asarray(ids[:, t : t + 1]), cache)
        rows.append(hidden[0])
    assert int(cache.lengths[0]) == prompt + steps
    ours = model.unembed(params, jnp.concatenate(rows))
    # The alpha is that of the prompt also when the text has outgrown it.
    theirs = TorchQwen(cfg, w).logits(ids[0], prompt_length=prompt).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_prefill_in_parts_equals_prefill_at_once():
    cfg = tiny_config(use_dynamic_ntk=True, use_logn_attn=True)
    params = to_params(cfg, random_weights(cfg))
    ids = jnp.asarray(ids_for(cfg, length=150))
    whole, _ = model.forward(cfg, params, None, ids, init_cache(cfg, 1, 160, jnp.float32))
    cache = init_cache(cfg, 1, 160, jnp.float32)
    n = jnp.array([150], jnp.int32)
    parts = []
    for start in range(0, 150, 50):
        part = ids[:, start : start + 50]
        hidden, cache = model.forward(cfg, params, None, part, cache, prompt_lengths=n)
        parts.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=2e-5)


def test_rows_of_a_ragged_batch_equal_single_rows():
    cfg = tiny_config(use_dynamic_ntk=True, use_logn_attn=True)
    params = to_params(cfg, random_weights(cfg))
    ids = ids_for(cfg, rows=3, length=100)
    counts = np.array([100, 7, 65], np.int32)
    cache = init_cache(cfg, 3, 128, jnp.float32)
    hidden, cache = model.forward(cfg, params, None, ids, cache, counts=jnp.asarray(counts))
    step, _ = model.forward(cfg, params, None, ids[:, :1], cache)
    for row, n in enumerate(counts):
        one = init_cache(cfg, 1, 128, jnp.float32)
        alone, one = model.forward(cfg, params, None, ids[row : row + 1, :n], one)
        np.testing.assert_allclose(hidden[row, :n], alone[0], atol=2e-5)
        alone, _ = model.forward(cfg, params, None, ids[row : row + 1, :1], one)
        np.testing.assert_allclose(step[row], alone[0], atol=2e-5)


def test_packed_sequences_do_not_see_each_other():
    cfg = tiny_config()
    w = random_weights(cfg)
    params, ids = to_params(cfg, w), ids_for(cfg, length=300)
    segments = np.repeat([0, 1, 2], [120, 110, 70])[None].astype(np.int32)
    hidden = model.hidden_states(cfg, params, None, ids, segments=segments)
    ours, reference = model.unembed(params, hidden)[0], TorchQwen(cfg, w)
    for start, stop in ((0, 120), (120, 230), (230, 300)):
        theirs = reference.logits(ids[0, start:stop]).numpy()
        np.testing.assert_allclose(ours[start:stop], theirs, atol=1e-4)


@pytest.mark.slow  # a program for each field
def test_every_config_field_changes_the_output_or_raises():
    base = tiny_config(use_dynamic_ntk=True, use_logn_attn=True)
    changed = dict(
        vocab_size=212, hidden_size=72, num_layers=2, num_heads=2, head_dim=32, ffn_size=96,
        norm_eps=1e-2, rope_base=1e6, seq_length=32, use_dynamic_ntk=False, use_logn_attn=False,
        initializer_range=0.05,
    )  # fmt: skip
    assert set(changed) == {f.name for f in dataclasses.fields(base)}
    from qwen_jax.params import init_params

    def run(cfg, params):
        return np.asarray(model.logits(cfg, params, None, ids_for(base, length=100)))

    params = init_params(base, jax.random.key(0), jnp.float32)
    reference = run(base, params)
    for field, value in changed.items():
        cfg = dataclasses.replace(base, **{field: value})
        shapes_change = field in "vocab_size hidden_size num_layers num_heads head_dim ffn_size"
        own = shapes_change or field == "initializer_range"
        out = run(cfg, init_params(cfg, jax.random.key(0), jnp.float32) if own else params)
        different = out.shape != reference.shape or np.abs(out - reference).max() > 1e-6
        assert different, f"{field} changes nothing"
    with pytest.raises(InputError, match="head_dim"):
        dataclasses.replace(base, head_dim=15)
