"""The dequantization kernel, run in numpy one instruction at a time, against quant.dequantize."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.kernels import _pallas_codes as codes
from qwen_jax.kernels import _pallas_dequantize as kernel
from qwen_jax.kernels.dequantize import dequantize as dequantize_kernel
from qwen_jax.kernels.lora_matmul import lora_matmul
from qwen_jax.quant import Layer, QTensor, QuantFormat, dequantize, quantize
from tests.ptx_numpy import Machine

pytestmark = pytest.mark.optimized

LAYERS = 3


def random_stack(kind: str, shape: tuple[int, ...]) -> QTensor:
    rng = np.random.default_rng(len(shape) + shape[-1])
    layers = []
    for _ in range(LAYERS):
        w = rng.standard_normal(shape) * rng.uniform(0.2, 3, (*shape[:-1], 1))
        layers.append(quantize(jnp.asarray(w, jnp.float32), QuantFormat.named(kind)))
    return jax.tree.map(lambda *x: jnp.stack(x), *layers)


def interpret(monkeypatch, body, layer: int, q: QTensor, factor, dtype) -> np.ndarray:
    """Runs all blocks of a body; values that were not written stay NaN."""
    machine = Machine(body.blocks, body.tiling.warps * 32, body.smem_bytes)
    monkeypatch.setattr(kernel, "ptx", machine)
    monkeypatch.setattr(codes, "ptx", machine)
    inputs = kernel.operands(jnp.int32(layer), q, factor)
    refs = [machine.place(np.asarray(x)) for x in inputs]
    size = body.O * body.I
    out = machine.place(np.full(size, np.nan).astype(dtype))
    body(None, *refs, out, "shared")
    return machine.memory[out : out + size * np.dtype(dtype).itemsize].view(dtype)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("kind", ["nf4", "int4"])
def test_bfloat16_equals_dequantize_to_the_last_bit(monkeypatch, kind, turns, layer):
    q = random_stack(kind, (2, 64, 384))
    tiling = kernel.Tiling(warps=4, turns=turns)
    body = kernel.Straight(**kernel.sizes(q), tiling=tiling, bytes=2)
    out = interpret(monkeypatch, body, layer, q, None, jnp.bfloat16)
    # Op by op: a compiler may fuse the product and the sum of the scales into one rounding.
    with jax.disable_jit():
        want = dequantize(jax.tree.map(lambda x: x[layer], q), jnp.bfloat16)
    np.testing.assert_array_equal(out.reshape(q.shape[1:]), want)


@pytest.mark.parametrize("kind", ["nf4", "int4"])
def test_e4m3_is_the_value_over_the_unit_straight_and_turned(monkeypatch, kind):
    q = random_stack(kind, (256, 512))
    layer, factor = 1, jnp.float32(97.0)
    with jax.disable_jit():
        want = dequantize(jax.tree.map(lambda x: x[layer], q), jnp.float32) * factor
    want = np.asarray(jnp.clip(want, -448, 448).astype(jnp.float8_e4m3fn), np.float32)
    for warps in (4, 8):
        tiling = kernel.Tiling(warps=warps, turns=2)
        body = kernel.Straight(**kernel.sizes(q), tiling=tiling, bytes=1)
        out = interpret(monkeypatch, body, layer, q, factor, jnp.float8_e4m3fn)
        assert_nearly_equal(out.reshape(256, 512).astype(np.float32), want)
    for warps, turns, side in ((8, 1, 1), (8, 2, 1), (8, 1, 2), (16, 2, 2)):
        tiling = kernel.Tiling(warps=warps, turns=turns, side=side)
        body = kernel.Turned(**kernel.sizes(q), tiling=tiling)
        out = interpret(monkeypatch, body, layer, q, factor, jnp.float8_e4m3fn)
        assert_nearly_equal(out.reshape(512, 256).astype(np.float32), want.T)


def assert_nearly_equal(out: np.ndarray, want: np.ndarray) -> None:
    """Equal, but that (code * scale) * factor may round otherwise than code * (scale * factor)."""
    np.testing.assert_allclose(out, want, rtol=0.125, atol=2**-9)
    assert np.mean(out != want) < 1e-4


@pytest.mark.parametrize("compute", ["bf16", "fp8"])
@pytest.mark.parametrize("kind", ["nf4", "int4", "int8"])
def test_a_layer_of_a_stack_multiplies_like_the_layer_cut_out(kind, compute):
    q = random_stack(kind, (2, 8, 256))
    x = jax.random.normal(jax.random.key(0), (3, 256))

    def loss(x, w):
        return jnp.sum(jnp.sin(lora_matmul(x, (w,), (None,), jnp.zeros(()), compute)[0][0]))

    step = jax.jit(jax.value_and_grad(loss))
    cut = jax.tree.map(lambda a: a[2], q)
    got, want = step(x, Layer(stack=q, index=jnp.int32(2))), step(x, cut)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-4, atol=1e-5)


def test_a_named_kernel_refuses_what_it_does_not_write():
    int8, odd = random_stack("int8", (8, 256)), random_stack("nf4", (128, 320))
    with pytest.raises(NotImplementedError, match="kind int8"):
        dequantize_kernel(
            Layer(stack=int8, index=jnp.int32(0)), jnp.bfloat16, implementation="mosaic"
        )
    layer = Layer(stack=odd, index=jnp.int32(0))
    with pytest.raises(NotImplementedError, match="float32 straight"):
        dequantize_kernel(layer, jnp.float32, implementation="mosaic")
    with pytest.raises(NotImplementedError, match="128 x 320 is not cut by tiles of 128 x 256"):
        dequantize_kernel(layer, jnp.float8_e4m3fn, turned=True, implementation="mosaic")
