"""Products with frozen weights against numpy and ml_dtypes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qwen_jax.kernels.lora_matmul import lora_matmul
from qwen_jax.kernels.qmatmul import qmatmul
from qwen_jax.quant import QuantFormat, dequantize, largest, quantize

pytestmark = pytest.mark.optimized


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 5, 128)).astype(np.float32)
    x[0, 1] *= 300.0  # a token far larger than its neighbours, as real models have
    return x, rng.standard_normal((3, 4, 128)).astype(np.float32) * 0.02


def e4m3(x, unit):
    """Rounded to multiples of `unit` that e4m3 has, by ml_dtypes."""
    return (x / unit).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * unit


@pytest.mark.parametrize("kind", ["none", "int8", "int4", "nf4"])
def test_fp8_product_is_that_of_rounded_operands(kind):
    x, w = arrays()
    weight = jnp.asarray(w)
    if kind != "none":
        weight = quantize(weight, QuantFormat.named(kind))
        w = np.asarray(dequantize(weight, jnp.float32))
    unit = float(largest(weight) if kind != "none" else np.abs(w).max()) / 448
    assert np.abs(w).max() <= unit * 448 * (1 + 1e-6)
    rows = np.abs(x).max(-1, keepdims=True) / 448
    expected = np.einsum("bti,cni->btcn", e4m3(x, rows), e4m3(w, unit))
    ours = np.asarray(qmatmul(jnp.asarray(x), weight, "fp8"))
    # Sums of 128 terms in another order: float32 rounding, but for codes on the edge of two.
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()
    # And e4m3 itself, 4 significant bits, stays within a few percent of the exact product.
    exact = np.einsum("bti,cni->btcn", x, w)
    error = np.linalg.norm(ours - exact, axis=(2, 3)) / np.linalg.norm(exact, axis=(2, 3))
    assert error.max() < 0.06, error


def test_fp8_gradient_is_the_product_of_rounded_operands():
    x, w = arrays(1)
    g = np.random.default_rng(2).standard_normal((2, 5, 3, 4)).astype(np.float32)
    _, pullback = jax.vjp(
        lambda x: lora_matmul(x, (jnp.asarray(w),), (None,), jnp.zeros(()), "fp8")[0][0],
        jnp.asarray(x),
    )
    (ours,) = pullback(jnp.asarray(g))
    rows = np.abs(g).max((2, 3), keepdims=True) / 448
    expected = np.einsum("btcn,cni->bti", e4m3(g, rows), e4m3(w, np.abs(w).max() / 448))
    assert np.abs(np.asarray(ours) - expected).max() < 1e-4 * np.abs(expected).max()


def test_fp8_of_zeros_is_zero():
    y = qmatmul(jnp.zeros((1, 3, 128)), jnp.zeros((8, 128)), "fp8")
    assert not np.asarray(y).any()
