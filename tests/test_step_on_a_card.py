"""What a training step on one Hopper card is made of, lowered for it on the CPU."""

import collections
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh
from tiny import tiny_config

from benchmarks.compiled import for_a_card
from qwen_jax.adapters import LoraConfig, abstract_lora
from qwen_jax.kernels import attention
from qwen_jax.params import abstract_params
from qwen_jax.quant import QuantFormat
from qwen_jax.remat import Remat
from qwen_jax.sharding import make_mesh, parse_mesh
from train.step import Compute, batch_sharding, loss_and_grads

# Wide enough for all kernels.
CFG = tiny_config(
    vocab_size=512, hidden_size=2048, num_layers=4, num_heads=16, head_dim=128, ffn_size=2048
)


@pytest.fixture
def on_a_card():
    with for_a_card():
        yield


def lowered(
    remat: str, products: str, *, packed: bool = False, mesh: Mesh | None = None, kind: str = "nf4"
) -> str:
    shape = jax.ShapeDtypeStruct((1, 1, 512), jnp.int32)
    if mesh is not None:
        shape = jax.ShapeDtypeStruct((1, 2, 512), jnp.int32, sharding=batch_sharding(mesh))
    batch = {"tokens": shape, "loss_mask": shape.update(dtype=jnp.bool_)}
    batch |= {"segments": shape} if packed else {}
    params = abstract_params(CFG, jnp.bfloat16, QuantFormat.named(kind), mesh)
    lora = abstract_lora(CFG, LoraConfig(rank=8), mesh=mesh)
    compute = Compute(remat=Remat.parse(remat, CFG.num_layers), products=products, mesh=mesh)
    step = jax.jit(lambda p, l, b: loss_and_grads(CFG, p, l, b, compute))
    return step.trace(params, lora, batch).lower(lowering_platforms=("cuda",)).as_text()


def calls(text: str) -> dict[str, int]:
    """How often the program calls each kernel: once for all layers if all layers do."""
    found = collections.Counter(re.findall(r"\\[0-9A-F]{2}([a-z_]+)_mosaic_gpu\b", text))
    # Some versions of Pallas do not pass on the name of a kernel that writes in place.
    found["gemm or sum"] = sum(found.pop(name, 0) for name in ("gemm", "sum_behind", "new_body"))
    found.pop("stable", None)  # as in "stable_mosaic_gpu": a version of the format
    for name in ("fmhaSoftmax", "fmhaSoftmaxBackward"):
        found[name] = text.count(f"@__cudnn${name}(")
    return dict(found)


@pytest.mark.parametrize(
    ("remat", "products", "expected"),
    [
        # Forward and backward: five products, each after a weight's dequantization; and one sum.
        ("selective", "bf16",
         {"gemm or sum": 11, "dequantize": 10, "fmhaSoftmax": 1, "rms_norm": 6, "swiglu_low": 1}),
        # Four products more, and attention; the weights are dequantized for each of the three.
        ("full", "bf16",
         {"gemm or sum": 15, "dequantize": 14, "fmhaSoftmax": 2, "rms_norm": 6, "swiglu_low": 2}),
        # Layers that keep nothing, but not for want of memory: once for the second and third.
        ("attention:1,full:3", "bf16",
         {"gemm or sum": 30, "dequantize": 20, "fmhaSoftmax": 3, "rms_norm": 12,
          "swiglu_low": 4}),
        ("selective", "fp8", {"gemm or sum": 11, "dequantize": 10, "fmhaSoftmax": 1, "rms_norm": 6,
                              "quantize_rows": 8, "swiglu_low": 1}),
    ],
)  # fmt: skip
def test_kernels_of_a_step(on_a_card, remat, products, expected):
    text = lowered(remat, products)
    found = calls(text)
    runs = len(remat.split(","))
    assert found.pop("unfilled") >= runs  # the stacks of each run of layers
    assert found == {**expected, "fmhaSoftmaxBackward": runs, "swiglu": runs}
    # The layer's result, and what is kept of the products, are written where they are kept.
    assert text.count("output_operand_alias<") == (5 if remat == "selective" else runs)


@pytest.mark.parametrize(
    ("mesh", "kind", "remat", "products"),
    [
        ("data=2", "nf4", "full", "bf16"),
        ("fsdp=2", "nf4", "selective", "bf16"),
        ("fsdp=2", "nf4", "selective", "fp8"),
        ("tensor=2", "int8", "selective", "bf16"),
    ],
)
def test_each_device_of_a_mesh_runs_the_same_kernels(on_a_card, mesh, kind, remat, products):
    several = lowered(remat, products, mesh=make_mesh(parse_mesh(mesh)), kind=kind)
    assert calls(several) == calls(lowered(remat, products, kind=kind))


@pytest.mark.parametrize(
    ("mesh", "remat"), [("data=2", "none"), ("fsdp=2", "none"), ("tensor=2", "selective")]
)
def test_what_the_compiler_cuts_has_no_kernels(on_a_card, monkeypatch, mesh, remat):
    """It would gather all that they read, on every device."""
    monkeypatch.setattr(attention, "_choose", lambda *_: "xla")  # cuDNN's is cut by jax
    assert "mosaic_gpu" not in lowered(remat, "bf16", mesh=make_mesh(parse_mesh(mesh)))
    assert "mosaic_gpu" in lowered(remat, "bf16")


@pytest.mark.parametrize(("remat", "forward"), [("selective", 1), ("full", 2)])
def test_packed_rows_keep_attention_as_others_do(on_a_card, remat, forward):
    """Their mask is one more operand of cuDNN's; what it keeps must be found nevertheless."""
    text = lowered(remat, "bf16", packed=True)
    assert text.count("@__cudnn$fmhaScaleBiasSoftmax(") == forward
    assert text.count("@__cudnn$fmhaScaleBiasSoftmaxBackward(") == 1
    assert "@__cudnn$fmhaSoftmax" not in text


def test_no_stack_is_filled(on_a_card):
    """But that of the LoRA gradients, which jax.lax.scan makes."""
    text = lowered("selective", "bf16")
    assert re.findall(r"broadcast_in_dim .*-> tensor<[45]x1x(?:16x)?512x?\d*", text) == []
