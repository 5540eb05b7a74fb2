"""Frozen products with LoRA in them: against PyTorch, and the kernel interpreted on the CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from qwen_jax.kernels import _pallas_gemm, _pallas_qmatmul
from qwen_jax.kernels import lora_matmul as lora_products
from qwen_jax.kernels.decode_matmul import decode_matmul, decode_matmul_xla
from qwen_jax.kernels.lora_matmul import lora_matmul
from qwen_jax.kernels.packing import pack
from qwen_jax.quant import Layer, QuantFormat, dequantize, quantize

pytestmark = pytest.mark.optimized


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_products_and_gradients_equal_those_of_torch():
    """Two weights that read one x: one quantized and with a pair, one plain and without."""
    x, a, b = normal(0, 2, 5, 64), normal(1, 8, 64), normal(2, 8, 3, 4)
    frozen = quantize(jnp.asarray(normal(3, 3, 4, 64)), QuantFormat.named("nf4"))
    weights = (frozen, jnp.asarray(normal(4, 6, 64)))

    def loss(x, pair):
        (first, second), _ = lora_matmul(x, weights, (pair, None), jnp.zeros(()))
        return jnp.sum(jnp.sin(first)) + jnp.sum(jnp.cos(second))

    value, (dx, pair) = jax.value_and_grad(loss, (0, 1))(x, {"a": a, "b": b})

    tx, ta, tb = (torch.tensor(v.astype(np.float64), requires_grad=True) for v in (x, a, b))
    dense = torch.tensor(np.asarray(dequantize(frozen, jnp.float32), np.float64))
    first = torch.einsum("bti,oni->bton", tx, dense)
    first = first + torch.einsum("bti,ri,ron->bton", tx, ta, tb)
    total = torch.sin(first).sum() + torch.cos(tx @ torch.tensor(normal(4, 6, 64)).double().T).sum()
    total.backward()
    np.testing.assert_allclose(value, total.item(), rtol=1e-4)
    for ours, theirs in ((dx, tx), (pair["a"], ta), (pair["b"], tb)):
        want = theirs.grad.numpy()
        assert np.abs(np.asarray(ours) - want).max() < 1e-4 * np.abs(want).max()


# Rounding of float32 sums; rounding of both operands to the 4 bits of e4m3. Another layer: over 1.
@pytest.mark.parametrize(("compute", "limit"), [("bf16", 1e-6), ("fp8", 0.06)])
def test_each_weight_waits_for_the_product_before_it(monkeypatch, compute, limit):
    """The way through the kernel, of which a stand-in has the formula, against float64.

    A baton of one instead of zero shows who waits: it then reads the stack's next layer.
    """
    L, O, I, R, M = 2, 128, 256, 8, 4
    q = [quantize(jnp.asarray(normal(i, O, I)), QuantFormat.named("nf4")) for i in range(L)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *q)
    dense = [np.asarray(dequantize(layer, jnp.float32), np.float64) for layer in q]
    weights = (Layer(stack=stack, index=jnp.int32(0)),) * 2
    pairs = tuple({"a": normal(i, R, I), "b": normal(i + 1, R, O)} for i in (2, 4))
    x, *gs = normal(6, M, I), normal(7, M, O), normal(8, M, O)

    def gemm(x, w, low, b, scale=None, *, turned=False):
        y = x.astype(jnp.float32) @ (w if turned else w.T).astype(jnp.float32) + low @ b
        return y if scale is None else y * scale[:, None]

    monkeypatch.setattr(lora_products, "fused", lambda *_: True)
    monkeypatch.setattr(_pallas_gemm, "gemm", gemm)

    def run(baton, gradient_of_baton, recalled=False, lean=False):
        made = lora_products.products(jnp.asarray(x), weights, pairs, zero, compute)
        kept = (made.ys, made.lows) if recalled else None

        def products(x, pairs, baton):
            return lora_matmul(x, weights, pairs, baton, compute, lean, kept)

        (ys, passed_on), pullback = jax.vjp(products, jnp.asarray(x), pairs, baton)
        dx, gradients, baton = pullback((tuple(map(jnp.asarray, gs)), gradient_of_baton))
        return [*ys, dx, *jax.tree.leaves(gradients)], float(passed_on), float(baton)

    def check(ours, layers, layers_back):
        want, dx, gradients = [], 0, []
        for pair, g, i, j in zip(pairs, gs, layers, layers_back, strict=True):
            low, slope = x.astype(np.float64) @ pair["a"].T, g.astype(np.float64) @ pair["b"].T
            want.append(x @ dense[i].T + low @ pair["b"])
            dx = dx + g @ dense[j] + slope @ pair["a"]
            gradients += [slope.T @ x, low.T @ g]
        for a, b in zip(ours, [*want, dx, *gradients], strict=True):
            assert np.linalg.norm(a - b) < limit * np.linalg.norm(b)

    zero, one = jnp.zeros(()), jnp.ones(())
    for recalled in (False, True):
        ours, *batons = run(zero, zero, recalled)
        assert batons == [0, 0]
        check(ours, (0, 0), (0, 0))
    ours, *_ = run(zero * jnp.nan, zero)  # NaN in what came before reads no other layer
    check(ours, (0, 0), (0, 0))
    kept_weights = compute == "bf16"  # for e4m3 the gradient's is another, turned one
    monkeypatch.setattr(lora_products, "_zero_after", lambda *arrays: one)
    ours, *batons = run(zero, zero)
    assert batons == [1, 0 if kept_weights else 1]
    check(ours, (0, 1), (0, 1))
    ours, *_ = run(one, one)
    check(ours, (1, 1), (1, 1))
    ours, *batons = run(zero, zero, lean=True)  # nor is that held
    assert batons == [1, 1]
    check(ours, (0, 1), (0, 1))
    ours, *batons = run(zero, zero, recalled=True)  # and those that were not computed here
    assert batons == [0, 1]
    check(ours, (0, 1), (0, 1))


@pytest.mark.parametrize(
    ("M", "N", "clusters"),
    [
        (2048, 24576, 64), (2048, 8192, 64), (4096, 24576, 64), (4096, 8192, 64),
        (8192, 24576, 66), (8192, 8192, 64), (256, 256, 1),
    ],
)  # fmt: skip
def test_blocks_that_the_kernel_leaves(M, N, clusters):
    """Of 66 pairs of multiprocessors, as few as need no further turn, and no fewer."""
    body = _pallas_gemm.Body(
        M=M, N=N, K=8192, R=16, turned=False, scaled=False, tiling=_pallas_gemm.Tiling(),
        dtype=jnp.bfloat16,
    )  # fmt: skip
    assert body.clusters(66) == clusters
    turns = -(-body.pieces // 66)
    assert clusters * turns >= body.pieces > (clusters - 1) * turns


@pytest.mark.parametrize(
    ("rank", "layer", "scaled"),
    [
        (0, None, False), (0, 1, False), (16, None, False), (16, 1, False),
        pytest.param(16, None, True, marks=pytest.mark.skipif(
            jax.__version__.startswith("0.10."), reason="jax 0.10 does not interpret that load"
        )),
    ],
)  # fmt: skip
def test_kernel_interpreted(rank, layer, scaled):
    """Four pieces for two blocks, each of four steps through a ring of two tiles."""
    M, N, K = 256, 128, 256
    tiling = _pallas_gemm.Tiling(rows=64, columns=64, stages=2, cluster=1)
    shapes = [(M, K), (K, N), (M, rank), (rank, N)]
    x, w, *pair = (jnp.asarray(normal(i, *s), jnp.bfloat16) for i, s in enumerate(shapes))
    stack = jnp.asarray(normal(4, 3, M, N), jnp.bfloat16)
    run = functools.partial(
        _pallas_gemm.gemm, turned=True, tiling=tiling, blocks=2, interpret=InterpretGPUParams()
    )
    into = None if layer is None else (stack, jnp.int32(layer))
    scale = jnp.asarray(np.abs(normal(5, M))) if scaled else None
    y = jax.jit(run)(x, w, *(pair if rank else (None, None)), scale, into=into)
    if layer is not None:
        others = [i for i in range(len(stack)) if i != layer]
        np.testing.assert_array_equal(y[jnp.array(others)], stack[jnp.array(others)])
        y = y[layer]
    x, w, low, b = (np.asarray(v, np.float64) for v in (x, w, *pair))
    want = (x @ w + low @ b) * (1 if scale is None else np.asarray(scale, np.float64)[:, None])
    # Rounded once to 8 bits.
    assert np.abs(np.asarray(y, np.float64) - want).max() <= 2**-8 * np.abs(want).max()


@pytest.mark.parametrize(
    ("dtype", "turned", "rank"),
    [(jnp.bfloat16, False, 8), (jnp.bfloat16, True, 64), (jnp.float8_e4m3fn, False, 8)],
)
def test_kernel_lowers_for_a_card(dtype, turned, rank):
    M, N, K = 512, 1024, 512
    shapes = [(M, K), (K, N) if turned else (N, K), (M, rank), (rank, N)]
    inputs = [
        jax.ShapeDtypeStruct(shape, dtype if i < 2 else jnp.bfloat16)
        for i, shape in enumerate(shapes)
    ]
    if dtype != jnp.bfloat16:
        inputs.append(jax.ShapeDtypeStruct((M,), jnp.float32))
    run = jax.jit(functools.partial(_pallas_gemm.gemm, turned=turned))
    text = run.trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ((100, 1024, 512, 8), "a product of 100 x 512"),
        ((256, 1000, 512, 8), "not cut by tiles"),
        ((256, 1024, 512, 12), "rank 12"),
        ((256, 1024, 512, 128), "rank 128"),
    ],
)
def test_what_the_kernel_does_not_serve(shape, why):
    with pytest.raises(NotImplementedError, match=why):
        _pallas_gemm.check(*shape)


@pytest.mark.parametrize("M", [5, 33, 40, 100])
def test_many_rows_go_through_the_few_row_kernel_in_pieces(monkeypatch, M):
    """A stand-in for the kernel's call, which takes 32 rows at most and returns parts of k."""
    q = quantize(jnp.asarray(normal(0, 256, 1024)), QuantFormat.named("int4"))
    w = pack(jax.tree.map(lambda leaf: leaf[None], q))
    rows_seen = []

    def split_matmul(index, x, codes, scale, *, tiling, kind):
        rows_seen.append(len(x))
        half = x.shape[1] // 2
        zeros = jnp.zeros_like(x[:, :half])
        parts = [(x[:, :half], zeros), (zeros, x[:, half:])]
        return jnp.stack([decode_matmul_xla(jnp.concatenate(p, 1), w, index[0]) for p in parts])

    monkeypatch.setattr(_pallas_qmatmul, "split_matmul", split_matmul)
    x = jnp.asarray(normal(1, M, 1024))
    ours = decode_matmul(x, w, jnp.int32(0), implementation="mosaic")
    theirs = decode_matmul_xla(x, w, jnp.int32(0))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)
    assert max(rows_seen) <= 32 and len(set(rows_seen)) == 1
