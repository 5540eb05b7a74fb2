"""Tiny models for the tests: configs, and torch-named weights as our tree."""

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.params import nest, param_table
from qwen_jax.quant import QuantFormat, quantize


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
