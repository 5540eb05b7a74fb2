"""The kernels of decode on a Hopper card, each against its reference in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import layer_of, random_params, random_stack

from qwen_jax import packed
from qwen_jax.cache import init_cache
from qwen_jax.config import ModelConfig
from qwen_jax.kernels.append_tokens import append_tokens
from qwen_jax.kernels.attention import attention
from qwen_jax.kernels.decode_attention import decode_attention, decode_attention_xla
from qwen_jax.kernels.decode_matmul import decode_matmul
from qwen_jax.kernels.hopper import on_hopper
from qwen_jax.kernels.packing import pack
from qwen_jax.kernels.residual_norm import residual_norm, residual_norm_xla
from qwen_jax.kernels.unpack import unpack
from qwen_jax.quant import quantize_heads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not on_hopper(jnp.bfloat16), reason="needs a Hopper card"),
]


def relative_error(a, b) -> float:
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def poison():
    """Fills free device memory with NaN, so that what a kernel leaves out is seen."""
    jax.block_until_ready(jnp.full((1 << 28,), jnp.nan, jnp.float32)).delete()


def normal(seed, shape, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@pytest.mark.parametrize("kind", ["int4", "nf4", "int8", "bf16"])
@pytest.mark.parametrize(("N", "K"), [(1024, 1024), (256, 5 * 128), (512, 43 * 128)])
def test_products(kind, N, K):
    """Odd numbers of groups are padded; above 128 rows the weight is unpacked for a GEMM."""
    stack = random_stack(0, kind, 3, N, K)
    w, dense = pack(stack), layer_of(stack, 1)
    for M in (1, 2, 8, 9, 16, 32, 64, 200):
        x = normal(M, (M, K))
        poison()
        name = "mosaic" if M <= 128 else "unpacked"
        got = jax.jit(lambda x: decode_matmul(x, w, jnp.int32(1), implementation=name))(x)  # noqa: B023
        with jax.default_matmul_precision("highest"):
            want = x.astype(jnp.float32) @ dense.T
        assert relative_error(got, want) < 4e-3, (kind, M)  # the rounding of the result to bfloat16


@pytest.mark.parametrize(("N", "K"), [(1024, 1024), (512, 160), (5120, 13696)])
def test_bfloat16_weights_back_in_rows(N, K):
    stack = random_stack(0, "bf16", 2, N, K)
    w = pack(stack)
    poison()
    got = unpack(w, jnp.int32(1), jnp.bfloat16, implementation="mosaic")
    np.testing.assert_array_equal(got.view(jnp.uint16), stack[1].view(jnp.uint16))


@pytest.mark.parametrize("quantized", [False, True])
def test_attention_at_many_lengths(quantized):
    L, B, S, N, H = 2, 2, 4100, 3, 128
    q = normal(0, (6, N, H))
    stacks = [normal(1, (L, B, S, N, H)), normal(2, (L, B, S, N, H)), None, None]
    if quantized:
        pairs = [quantize_heads(x) for x in stacks[:2]]
        stacks = [codes for codes, _ in pairs] + [scale for _, scale in pairs]
    for lengths in (
        [1, 2, 3, 8, 9, 63],
        [64, 65, 127, 128, 129, 1000],
        [4095, 4096, 4097, 17, 1, 4100],
    ):
        visible = jnp.array(lengths, jnp.int32)
        poison()
        got = decode_attention(q, *stacks, jnp.int32(1), visible, implementation="mosaic")
        with jax.default_matmul_precision("highest"):
            want = decode_attention_xla(q.astype(jnp.float32), *stacks, jnp.int32(1), visible)
        assert relative_error(got, want) < 4e-3


@pytest.mark.parametrize("starts", [(0, 0), (1500, 64), (3996, 2000)])
def test_a_chunk_of_a_prompt_against_the_cache(starts):
    """cuDNN with a mask, rows that begin at different places, slots past their ends poisoned."""
    B, T, S, N, H = 2, 512, 4608, 3, 128
    q = normal(0, (B, T, N, H))
    q_index = jnp.array(starts, jnp.int32)[:, None] + jnp.arange(T)
    filled = (jnp.arange(S) <= q_index[:, -1:])[:, :, None, None]
    k, v = (normal(i, (B, S, N, H)) for i in (1, 2))
    poison()
    leftover = jnp.asarray(1e4, jnp.bfloat16)  # what an earlier row of the batch left there
    got = jax.jit(functools.partial(attention, implementation="cudnn"))(
        q, jnp.where(filled, k, leftover), jnp.where(filled, v, leftover), q_index=q_index
    )
    with jax.default_matmul_precision("highest"):
        f32 = (x.astype(jnp.float32) for x in (q, k, v))
        want = attention(*f32, q_index=q_index, implementation="xla")
    assert relative_error(got, want) < 8e-3  # weights are rounded to bfloat16 before the product


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_tokens_written_into_the_cache(quantized, tokens):
    L, B, S, N, H = 2, 4, 70, 3, 128
    R = B * tokens
    stacks = [normal(1, (L, B, S, N, H)), normal(2, (L, B, S, N, H)), None, None]
    if quantized:
        pairs = [quantize_heads(x) for x in stacks[:2]]
        stacks = [codes for codes, _ in pairs] + [scale for _, scale in pairs]
    parts = normal(3, (3, R, 3 * N * H), jnp.float32)
    angle = jax.random.uniform(jax.random.key(4), (R, H // 2)) * 6
    args = (parts, normal(5, (L, 3, N, H)), jnp.cos(angle), jnp.sin(angle), jnp.linspace(1, 1.3, R))
    # The last row is full: nothing of it is written.
    slots = np.array([0, 1, 69 - tokens, 70])[:, None] + np.arange(tokens)
    results = {}
    for name in ("xla", "mosaic"):
        poison()
        results[name] = append_tokens(
            *args, tuple(stacks), jnp.int32(1), jnp.array(slots.reshape(R)), implementation=name
        )
    # Sums in another order, and fused products: now and then one step of bfloat16.
    assert relative_error(results["mosaic"][0], results["xla"][0]) < 2e-3
    for got, want, old in zip(results["mosaic"][1], results["xla"][1], stacks, strict=True):
        if old is None:
            continue
        got, want, old = (np.asarray(x, np.float32) for x in (got, want, old))
        np.testing.assert_allclose(got, want, rtol=1e-2, atol=1.0 if old.ndim == 5 else 1e-2)
        assert (got != want).mean() < 0.01
        new = np.zeros(old.shape, bool)
        for row in range(3):
            new[1, row, slots[row]] = True
        np.testing.assert_array_equal(got[~new], old[~new])
        assert (got[new] != old[new]).mean() > 0.8


@pytest.mark.parametrize("D", [512, 5120, 8192])
def test_residual_and_norm(D):
    x, parts = normal(0, (5, D)), normal(1, (3, 5, D), jnp.float32)
    weight = normal(2, (2, D))
    poison()
    got = residual_norm(x, parts, weight, jnp.int32(1), 1e-6, implementation="mosaic")
    want = residual_norm_xla(x, parts, weight, jnp.int32(1), 1e-6)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 2e-3


@pytest.mark.parametrize("kind", ["int4", "bf16"])
@pytest.mark.parametrize("cache_dtype", [jnp.bfloat16, jnp.int8])
def test_steps_of_a_small_model(kind, cache_dtype):
    """Kernels against references through prefill, single tokens and a draft of three."""
    cfg = ModelConfig(
        vocab_size=512, hidden_size=512, num_layers=2, num_heads=4, head_dim=128, ffn_size=1024
    )
    params = packed.pack_params(random_params(cfg, kind, jnp.bfloat16))
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, 512)
    hidden = {}
    for name in ("xla", "mosaic"):
        cache = init_cache(cfg, 2, 64, cache_dtype)
        _, cache = packed.forward(
            cfg, params, tokens, cache, counts=jnp.array([24, 19]), fresh=True, implementation="xla"
        )
        outs = []
        for width in (1, 1, 3, 1):
            step = tokens[:, :width]
            out, cache = packed.forward(cfg, params, step, cache, implementation=name)
            outs.append(out)
        hidden[name] = np.concatenate([np.asarray(x, np.float32) for x in outs], axis=1)
    assert relative_error(hidden["mosaic"], hidden["xla"]) < 0.03
