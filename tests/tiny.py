"""Tiny models for the tests: configs, and torch-named weights as our tree."""

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.params import init_params, nest, param_table
from qwen_jax.quant import QTensor, QuantFormat, dequantize, quantize


def tiny_config(**changes) -> ModelConfig:
    values = dict(
        vocab_size=211,
        hidden_size=64,
        num_layers=3,
        num_heads=4,
        head_dim=16,
        ffn_size=128,
        rope_base=10000.0,
        seq_length=64,
    )
    return ModelConfig(**(values | changes))


def to_params(cfg, weights: dict[str, np.ndarray], dtype=jnp.float32, fmt: str = "none"):
    """Qwen v1 tensors -> our tree, by the table alone (no converter involved)."""
    fmt = QuantFormat.named(fmt)
    leaves = {}
    for spec in param_table(cfg):
        parts = [
            jnp.asarray(weights[name], dtype).reshape(spec.shape) for name in spec.torch_names()
        ]
        if spec.format(fmt) is not None:
            parts = [quantize(part, fmt) for part in parts]
        leaves[spec.path] = stack(parts) if spec.stacked else parts[0]
    return nest(leaves)


def stack(parts):
    return jax.tree.map(lambda *x: jnp.stack(x), *parts)


def random_stack(seed: int, kind: str, *shape: int):
    """Weights [L, *O, I] of a kind: quantized, or plain ones for bf16."""
    w = jax.random.normal(jax.random.key(seed), shape)
    if kind == "bf16":
        return w.astype(jnp.bfloat16)
    return stack([quantize(layer, QuantFormat.named(kind)) for layer in w])


def layer_of(w, index: int):
    """The weight [*O, I] that one layer of a stack stands for, in float32."""
    layer = jax.tree.map(lambda x: x[index], w)
    dense = dequantize(layer, jnp.float32) if isinstance(layer, QTensor) else layer
    return dense.astype(jnp.float32)


def random_params(cfg: ModelConfig, kind: str, dtype=jnp.float32):
    """A model whose linear layers are of a kind that can be packed, the rest in `dtype`."""
    if kind != "bf16":
        return init_params(cfg, jax.random.key(0), dtype, QuantFormat.named(kind))
    return bfloat16_layers(init_params(cfg, jax.random.key(0), dtype))


def bfloat16_layers(params):
    """The same with linear layers in bfloat16; activations stay what they are."""
    blocks = {
        block: {
            name: w if name == "bqkv" else w.astype(jnp.bfloat16)
            for name, w in params["layers"][block].items()
        }
        for block in ("attn", "mlp")
    }
    return params | {"layers": params["layers"] | blocks}
