"""What only a GPU can show: its step against the same step in float32 on the host's CPU."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny import tiny_config

from qwen_jax.adapters import LoraConfig, abstract_lora
from qwen_jax.kernels.attention import attention
from qwen_jax.kernels.dequantize import FP8
from qwen_jax.kernels.quantize_rows import quantize_rows
from qwen_jax.kernels.swiglu import swiglu_narrow
from qwen_jax.params import abstract_params, init_params
from qwen_jax.quant import QuantFormat
from qwen_jax.remat import Remat
from qwen_jax.sharding import make_mesh, parse_mesh
from train.overlap import compiler_options
from train.step import Compute, batch_sharding, loss_and_grads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA GPU"),
]


def relative_error(a, b) -> float:
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def wide_model(kind: str, rows: int):
    """Wide enough for the kernels: 4-bit weights of whole tiles, heads of 128."""
    cfg = tiny_config(
        vocab_size=512, hidden_size=1024, num_layers=2, num_heads=8, head_dim=128, ffn_size=1024
    )
    rng = np.random.default_rng(0)
    lora = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape) * 0.02, jnp.float32),
        abstract_lora(cfg, LoraConfig(rank=8)),
    )
    tokens = jnp.asarray(rng.integers(0, 512, (1, rows, 512)), jnp.int32)
    batch = {"tokens": tokens, "loss_mask": jnp.ones(tokens.shape, bool)}
    params = init_params(cfg, jax.random.key(0), jnp.bfloat16, QuantFormat.named(kind))
    return cfg, params, lora, batch


@pytest.mark.parametrize(
    "products, packed, limit", [("bf16", False, 0.03), ("bf16", True, 0.03), ("fp8", False, 0.15)]
)
def test_gradients_equal_those_of_the_cpu_in_float32(products, packed, limit, capsys):
    cfg, params, lora, batch = wide_model("nf4", 1)
    if packed:
        batch["segments"] = jnp.asarray(np.repeat([0, 1, 2], [200, 300, 12])[None, None], jnp.int32)

    def run(device, compute, dtype):
        placed = jax.device_put((params, lora, batch), device)
        cast = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.bfloat16 else x, placed[0])
        # As a step of training is compiled: on one card, kernels at once.
        options = compiler_options(make_mesh(parse_mesh("1"))) if device.platform == "gpu" else None
        step = jax.jit(
            lambda p, l, b: loss_and_grads(cfg, p, l, b, compute), compiler_options=options
        )
        return jax.device_get(step(cast, *placed[1:]))

    remat = Remat.parse("selective:1,full:1", 2)
    loss, grads, _ = run(jax.devices()[0], Compute(remat=remat, products=products), jnp.bfloat16)
    with jax.default_device(jax.devices("cpu")[0]):
        true_loss, true, _ = run(jax.devices("cpu")[0], Compute(remat=remat), jnp.float32)
    errors = [
        relative_error(a, b)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(true), strict=True)
    ]
    with capsys.disabled():
        print(f"\n{products}{', packed' * packed}: loss {loss:.5f} against {true_loss:.5f}, "
              f"gradients of the leaves off by {min(errors):.4f} to {max(errors):.4f}")  # fmt: skip
    assert abs(loss - true_loss) < 0.01 * true_loss
    assert all(error < limit for error in errors)  # max() would pass over what is no number


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "axis, kind, products",
    [("data", "nf4", "bf16"), ("fsdp", "nf4", "bf16"), ("fsdp", "nf4", "fp8"),
     ("tensor", "nf4", "bf16"), ("tensor", "int8", "bf16")],
)  # fmt: skip
def test_two_cards_give_the_gradients_of_one(axis, kind, products, capsys):
    cfg, params, lora, batch = wide_model(kind, 2)
    remat = Remat.parse("selective:1,full:1", 2)

    def run(mesh):
        abstract = (
            abstract_params(cfg, jnp.bfloat16, QuantFormat.named(kind), mesh),
            abstract_lora(cfg, LoraConfig(rank=8), mesh=mesh),
        )
        layout = jax.tree.map(lambda x: x.sharding, abstract)
        placed = jax.tree.map(jax.device_put, (params, lora), layout)
        compute = Compute(remat=remat, products=products, mesh=mesh)
        step = jax.jit(
            lambda p, l, b: loss_and_grads(cfg, p, l, b, compute),
            compiler_options=compiler_options(mesh) or None,
        )
        return jax.device_get(step(*placed, jax.device_put(batch, batch_sharding(mesh))))

    (loss, grads, _), (loss_2, grads_2, _) = (
        run(make_mesh(parse_mesh(text))) for text in ("1", f"{axis}=2")
    )
    pairs = zip(jax.tree.leaves(grads_2), jax.tree.leaves(grads), strict=True)
    errors = [relative_error(a, b) for a, b in pairs]
    with capsys.disabled():
        print(f"\n{axis}=2, {kind}, {products}: loss {loss_2:.5f} against {loss:.5f}, "
              f"gradients of the leaves off by {min(errors):.4f} to {max(errors):.4f}")  # fmt: skip
    assert abs(loss_2 - loss) < 0.002 * loss
    # Sums in another order are rounded to bfloat16 on the way; what that turns in the last bit of a
    # value may turn its e4m3 code, a step of 1/16 (0.028 where a CPU computes all that).
    assert all(error < (0.02 if products == "bf16" else 0.06) for error in errors)


@pytest.mark.parametrize("K", [8192, 24576])
def test_rows_to_e4m3(K):
    x = jax.random.normal(jax.random.key(0), (300, K)).astype(jnp.bfloat16)
    x = x.at[1].mul(300).at[2].set(0)
    codes, unit = quantize_rows(x, implementation="mosaic")
    exact = np.asarray(x, np.float64)
    want_unit = np.maximum(np.abs(exact).max(axis=1), 1e-30) / 448
    np.testing.assert_allclose(unit, want_unit, rtol=1e-6)
    quotient = exact / want_unit[:, None]
    nearest = quotient.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    # bfloat16 often lies on the very edge of two codes: either is right, but no other, and as near
    # as the float32 quotient of the kernel can tell.
    off, least = (np.abs(c - quotient) for c in (np.asarray(codes, np.float64), nearest))
    assert (off <= least + 1e-6 * np.abs(quotient)).all()


@pytest.mark.parametrize("F", [3840, 24576])
def test_swiglu_rounded_by_the_blocks_of_a_cluster(F):
    """Three blocks, and eight, that share each row's largest value."""
    up, gate = (jax.random.normal(jax.random.key(i), (2, 512, F), jnp.bfloat16) for i in range(2))
    a = jax.random.normal(jax.random.key(2), (8, F), jnp.bfloat16)
    ours, theirs = (
        swiglu_narrow(up[1], gate[0], a, kind, implementation=how)
        for kind, how in ((FP8, "mosaic"), (a.dtype, "xla"))
    )
    h = np.asarray(theirs.h, np.float32)
    np.testing.assert_allclose(ours.unit, np.abs(h).max(axis=1) / 448, rtol=2**-7)
    # e4m3 keeps 4 bits, bfloat16 8.
    assert relative_error(np.asarray(ours.h, np.float32) * ours.unit[:, None], h) < 2**-4
    assert relative_error(ours.low, theirs.low) < 2**-7


def test_packed_rows_on_cudnn_equal_the_reference():
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 256, 4, 64)), jnp.bfloat16) for _ in range(3))
    segments = jnp.asarray(np.sort(rng.integers(0, 5, (2, 256)), axis=1), jnp.int32)
    index = jnp.broadcast_to(jnp.arange(256), (2, 256))

    def run(implementation):
        def f(q, k, v):
            y = attention(q, k, v, q_index=index, segments=segments, causal_square=True,
                          implementation=implementation)  # fmt: skip
            return jnp.sum(y.astype(jnp.float32) ** 2), y

        return jax.grad(f, (0, 1, 2), has_aux=True)(q, k, v)

    (ours, out), (theirs, reference) = run("cudnn"), run("xla")
    # bfloat16 keeps 8 bits; sums over up to 256 keys.
    assert relative_error(out, reference) < 0.01
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < 0.02


def test_kept_attention_is_not_computed_again():
    """cuDNN's statistics are found by dtype and shape: if not, that costs time in silence."""
    cfg = tiny_config(head_dim=64, num_heads=2, hidden_size=128, num_layers=2)
    params = init_params(cfg, jax.random.key(0), jnp.bfloat16)
    lora = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), abstract_lora(cfg, LoraConfig(rank=8))
    )
    tokens = jnp.zeros((1, 1, 128), jnp.int32)
    batch = {"tokens": tokens, "loss_mask": jnp.ones(tokens.shape, bool)}

    def forward_calls(level: str) -> int:
        compute = Compute(remat=Remat.parse(level, 2))
        step = jax.jit(lambda l, b: loss_and_grads(cfg, params, l, b, compute))
        return step.lower(lora, batch).as_text().count("__cudnn$fmhaSoftmax(")

    assert forward_calls("full") == 2 * forward_calls("attention") > 0
