"""The frozen base of a run: in which format it is trained on, loaded and, if asked, quantized."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen_jax.checkpoint import load_params
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.manifest import Manifest
from qwen_jax.memory import GB, weight_bytes
from qwen_jax.params import abstract_params, param_table
from qwen_jax.quant import QuantFormat, quantize
from train.arguments import KINDS


def quantized_base(
    manifest: Manifest, bits: int | None
) -> tuple[QuantFormat | None, QuantFormat | None]:
    """The format in which the base is trained on, and that in which it must be quantized first."""
    stored = manifest.quantization
    if bits is None:
        return stored, None
    if stored is None:
        fmt = QuantFormat.named(KINDS[bits][0])
        return fmt, fmt
    if stored.kind not in KINDS[bits]:
        raise InputError(
            f"--quantization_bit {bits}: the checkpoint is stored as {stored.kind} already; leave "
            "the flag out, or convert the original with --quantize " + KINDS[bits][0]
        )
    return stored, None


def check_room_to_quantize(
    manifest: Manifest, dtype: str, quantize_to: QuantFormat | None, sizes: dict, limit: int
) -> None:
    """InputError if a device cannot hold the plain weights that are quantized in memory."""
    if quantize_to is None or not limit:
        return
    plain = sum(weight_bytes(manifest.config, dtype, None, sizes).values())
    quantized = weight_bytes(manifest.config, dtype, quantize_to, sizes)
    # The last matrix is there twice, in the end: a third of the quantized layers is a fair bound.
    need = plain + max(quantized.values()) // 3
    if need > limit:
        raise InputError(
            f"quantizing in memory first needs {need / GB:.1f} GB on each device, which has "
            f"{limit / GB:.1f} GB; convert with --quantize {quantize_to.kind} instead"
        )


def load_base(
    checkpoint: str | pathlib.Path, dtype: str, quantize_to: QuantFormat | None, mesh: Mesh
) -> dict[str, Any]:
    """The parameters on their devices."""
    manifest, params = load_params(checkpoint, mesh, jnp.dtype(dtype))
    if quantize_to is None:
        return params
    print(f"quantizing the base to {quantize_to.kind}")
    return quantize_params(manifest.config, params, quantize_to, mesh)


def quantize_params(
    cfg: ModelConfig, params: dict[str, Any], fmt: QuantFormat, mesh
) -> dict[str, Any]:
    """Replaces the linear layers in `params` by quantized ones, layer by layer, and frees them."""
    layout = jax.tree.map(lambda x: x.sharding, abstract_params(cfg, jnp.float32, fmt, mesh))
    for spec in param_table(cfg):
        if spec.format(fmt) is None:
            continue
        parent, out = params, layout
        for name in spec.path[:-1]:
            parent, out = parent[name], out[name]
        old = parent.pop(spec.path[-1])

        def stacked(w: jax.Array):  # [L, *O, I]
            return jax.lax.map(lambda one: quantize(one, fmt), w)

        new = jax.jit(stacked, out_shardings=out[spec.path[-1]])(old)
        parent[spec.path[-1]] = jax.block_until_ready(new)
        old.delete()
    return params
