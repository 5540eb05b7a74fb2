"""The three formats against bitsandbytes, the GPTQ rules and float64 arithmetic."""

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from qwen_jax.errors import InputError
from qwen_jax.quant import (
    DYNAMIC_CODE,
    NF4_CODE,
    Layer,
    QuantFormat,
    dequantize,
    group_scales,
    largest,
    quantize,
    with_bounds,
)

pytestmark = pytest.mark.optimized


def weights(shape, seed=0, std=0.02):
    return (np.random.default_rng(seed).standard_normal(shape) * std).astype(np.float32)


def test_code_tables_are_those_of_bitsandbytes():
    np.testing.assert_array_equal(DYNAMIC_CODE, bnb.create_dynamic_map().numpy())
    np.testing.assert_array_equal(NF4_CODE, bnb.get_4bit_type("nf4", device="cpu").numpy())


@pytest.mark.parametrize("shape", [(96, 128), (64, 192), (300, 640)])
def test_nf4_codes_and_scales_are_those_of_bitsandbytes(shape):
    w = weights(shape)
    ours = quantize(w, QuantFormat.named("nf4"))
    packed, state = bnb.quantize_4bit(torch.tensor(w), blocksize=64, quant_type="nf4")
    theirs = packed.numpy().reshape(shape[0], -1)
    # bitsandbytes puts the first of two codes into the high nibble, we into the low one.
    np.testing.assert_array_equal(ours.data, (theirs >> 4) | (theirs << 4))
    # Double quantization, from the published rule: less the mean, then nearest code by bisection.
    absmax = state.absmax
    offset = absmax.mean()
    flat = torch.nn.functional.pad(absmax - offset, (0, -absmax.numel() % 256)).view(-1, 256)
    block = flat.abs().max(dim=1).values
    code = torch.tensor(DYNAMIC_CODE)
    unit = (flat / block[:, None]).clamp(-1, 1).flatten()[: absmax.numel()]
    nearest = torch.bucketize(unit, (code[:-1] + code[1:]) / 2).numpy()
    np.testing.assert_allclose(ours.scale_offset, offset.item(), rtol=1e-6)
    np.testing.assert_allclose(ours.scale_absmax, block.numpy(), rtol=1e-5)
    # A mean that differs in its last bit may move a value across a midpoint, by one code.
    apart = np.abs(np.asarray(ours.scale).ravel().astype(int) - nearest)
    assert apart.max() <= 1 and (apart > 0).mean() < 0.01


def test_nf4_values_come_back_as_bitsandbytes_gives_them():
    w = weights((128, 256))
    ours = quantize(w, QuantFormat.named("nf4"))
    swapped = np.asarray(ours.data)
    swapped = (swapped >> 4) | (swapped << 4)
    state = bnb.QuantState(
        absmax=torch.tensor(np.asarray(group_scales(ours)).ravel()),
        shape=torch.Size(w.shape),
        code=torch.tensor(NF4_CODE),
        blocksize=64,
        quant_type="nf4",
        dtype=torch.float32,
    )
    theirs = bnb.dequantize_4bit(torch.tensor(swapped).reshape(-1, 1), state)
    np.testing.assert_allclose(dequantize(ours, jnp.float32), theirs.numpy(), rtol=1e-6)


def test_int4_follows_the_gptq_rule():
    w = weights((48, 384))
    q = quantize(w, QuantFormat.named("int4"))
    groups = w.reshape(48, 3, 128)
    scale = (np.abs(groups).max(-1) * 2 / 15).astype(np.float16)
    np.testing.assert_array_equal(np.asarray(q.scale), scale)
    step = scale.astype(np.float64)[..., None]
    codes = np.clip(np.round(groups / step) + 8, 0, 15)
    expected = ((codes - 8) * step).reshape(48, 384)
    np.testing.assert_allclose(dequantize(q, jnp.float32), expected, rtol=1e-6, atol=1e-9)


def test_int8_is_symmetric_per_output_channel():
    w = weights((48, 100))
    q = quantize(w, QuantFormat.named("int8"))
    assert q.scale.shape == (48, 1) and int(np.abs(q.data).max()) == 127
    step = np.abs(w).max(-1, keepdims=True) / 127
    assert np.abs(np.asarray(dequantize(q, jnp.float32)) - w).max() <= 0.5001 * step.max()


def test_mean_absolute_error_of_each_format_is_pinned():
    w = weights((256, 1024), std=1.0)

    def error(kind):
        q = quantize(w, QuantFormat.named(kind))
        return np.abs(np.asarray(dequantize(q, jnp.float32)) - w).mean()

    # A uniform step leaves a quarter of itself on average: step = absmax / 127 or absmax / 7.5.
    assert error("int8") == pytest.approx(np.abs(w).max(-1).mean() / 127 / 4, rel=0.02)
    group_max = np.abs(w.reshape(-1, 128)).max(-1).mean()
    assert error("int4") == pytest.approx(group_max / 7.5 / 4, rel=0.02)
    # NF4 in blocks of 64 on normal weights: 0.0727 of the standard deviation, without double
    # quantization by bitsandbytes on the same numbers; the second quantization adds under 1 %.
    packed, state = bnb.quantize_4bit(torch.tensor(w), blocksize=64, quant_type="nf4")
    theirs = np.abs(bnb.dequantize_4bit(packed, state).numpy() - w).mean()
    assert error("nf4") == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_zeros_stay_zeros(kind):
    q = quantize(jnp.zeros((4, 128)), QuantFormat.named(kind))
    assert not np.asarray(dequantize(q, jnp.float32)).any()


@pytest.mark.parametrize(("kind", "slack"), [("nf4", 1.03), ("int4", 1.2), ("int8", 1.01)])
def test_each_layer_has_its_own_bound(kind, slack):
    """Which no value exceeds, and which is not far off: int4 counts to -8, values end at 7."""
    layers = [quantize(weights((8, 256), i, 10.0**i), QuantFormat.named(kind)) for i in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    for i, layer in enumerate(layers):
        most = np.abs(dequantize(layer, jnp.float32)).max()
        for w in (layer, with_bounds(stack)):
            w = w if w is layer else Layer(stack=w, index=jnp.int32(i))
            assert most <= largest(w) * (1 + 1e-6) <= slack * most


def test_a_width_that_the_group_does_not_divide_is_refused():
    with pytest.raises(InputError, match=r"200 is not a multiple of it \(72 left over\)"):
        quantize(weights((4, 200)), QuantFormat.named("int4"))
