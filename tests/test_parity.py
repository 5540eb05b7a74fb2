"""The parity benchmark's own arithmetic; the model behind it is tested elsewhere."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tiny import tiny_config
from torch_reference import qwen2_model, random_weights

from benchmarks import reference
from benchmarks.parity import (
    HEADER,
    Difference,
    agreement,
    leading_equal,
    markdown,
    next_token_loss,
)
from qwen_jax.quant import QuantFormat, dequantize, quantize

pytestmark = pytest.mark.optimized


def test_differences_add_up():
    rng = np.random.default_rng(0)
    ours, theirs = rng.standard_normal((2, 7, 11)).astype(np.float32)
    whole, parts = Difference(), Difference()
    whole.add(ours, theirs)
    parts.add(ours[:3], theirs[:3])
    parts.add(ours[3:], theirs[3:])
    assert whole.largest == parts.largest == pytest.approx(np.abs(ours - theirs).max())
    assert whole.mean == pytest.approx(np.abs(ours - theirs).mean(), rel=1e-6)
    assert parts.mean == pytest.approx(whole.mean, rel=1e-6)
    assert parts.same == (ours.argmax(1) == theirs.argmax(1)).sum() and parts.positions == 7


@pytest.mark.parametrize("first", [0, 1])
def test_a_nan_is_the_largest_difference(first):
    logits = np.zeros((2, 3), np.float32)
    broken = logits.copy()
    broken[first] = np.nan
    difference = Difference()
    for row in range(2):
        difference.add(broken[row : row + 1], logits[row : row + 1])
    assert np.isnan(difference.largest) and np.isnan(difference.mean)


def test_next_token_loss_is_that_of_its_definition():
    logits = np.random.default_rng(0).standard_normal((5, 9)).astype(np.float32)
    ids = [3, 1, 4, 1, 5]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -np.mean([np.log(probabilities[t, ids[t + 1]]) for t in range(4)])
    assert next_token_loss(logits, ids) == pytest.approx(expected, rel=1e-5)


def test_agreement_names_the_margin_where_answers_part():
    assert leading_equal([1, 2, 3], [1, 2, 3]) == 3
    assert leading_equal([0, 2, 3], [1, 2, 3]) == 0
    assert agreement([1, 2, 3], [1, 2, 3], [1, 1, 1]) == "3"
    assert agreement([1, 7, 3], [1, 2, 3], [1.0, 0.03, 1.0]) == "1 (0.03)"
    with pytest.raises(ValueError):
        leading_equal([1, 2], [1, 2, 3])


def test_the_table_is_markdown():
    lines = markdown([["a"] * len(HEADER)]).splitlines()
    assert len(lines) == 3 and len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize("kind, group", [("int8", 0), ("int8", 128), ("int4", 128), ("nf4", 64)])
def test_torch_dequantizes_what_we_store(kind, group):
    w = np.random.default_rng(0).standard_normal((3, 4, 5, 384)).astype(np.float32)
    q = quantize(jnp.asarray(w), QuantFormat(kind=kind, group=group))
    arrays = (q.data, q.scale, q.scale_absmax, q.scale_offset)
    theirs = reference.dequantized(kind, *(None if x is None else np.asarray(x) for x in arrays))
    assert theirs.shape == (60, 384)
    ours = np.asarray(dequantize(q, jnp.float32)).reshape(60, 384)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)
    assert 1e-3 < np.abs(ours - w.reshape(60, 384)).mean() < 0.1


def test_a_replaced_weight_lands_where_the_mapping_says():
    cfg = tiny_config()
    other = random_weights(cfg, seed=1)
    model, expected = qwen2_model(cfg, random_weights(cfg)), qwen2_model(cfg, other)
    for layer in range(cfg.num_layers):
        for module in reference.QWEN2_MODULES:
            weight = torch.tensor(other[f"transformer.h.{layer}.{module}.weight"])
            reference.replace_weight(model, layer, module, weight)
    for name, tensor in expected.named_parameters():
        if "_proj.weight" in name:
            assert torch.equal(model.get_parameter(name), tensor), name


def test_expanded_key_value_heads_change_no_logits():
    config = transformers.Qwen2Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ids = list(range(40))
    before = reference.logits(model, ids)
    reference.expand_key_value_heads(model)
    assert model.model.layers[1].self_attn.k_proj.weight.shape == (64, 64)
    np.testing.assert_allclose(reference.logits(model, ids), before, atol=1e-5)
    greedy, margins = reference.greedy(model, [ids[:3], ids[:9]], 5)
    alone, _ = reference.greedy(model, [ids[:3]], 5)
    assert greedy[0] == alone[0] and len(margins[1]) == 5  # its padding is not seen
    following = [ids[:9] + greedy[1][:n] for n in range(5)]
    assert greedy[1] == [int(reference.logits(model, row)[-1].argmax()) for row in following]
