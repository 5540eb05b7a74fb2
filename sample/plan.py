"""The memory that generation needs, known before any weight is read: what --plan prints."""

import dataclasses
import math

import jax.numpy as jnp

from qwen_jax.api import mesh_sizes
from qwen_jax.cache import abstract_cache
from qwen_jax.manifest import Manifest
from qwen_jax.memory import GB, Budget, abstract_mesh, device_bytes, layer_values, weight_bytes
from qwen_jax.sharding import describe_mesh

REMEDY = "use a shorter --plan_tokens, fewer rows, more devices (--mesh), or --quantize int4 or nf4"


@dataclasses.dataclass(kw_only=True)
class PlanFlags:
    """What every program that runs a model says about its memory."""

    plan: bool = False
    """print the memory that this needs, and stop; needs no weights, only config.json"""
    plan_tokens: int = 2048
    """tokens of prompt and answer to plan for"""
    device_memory: float | None = None
    """GB of each device to plan for; unset: no limit"""


def budget(
    manifest: Manifest, sizes: dict[str, int], rows: int, tokens: int, dtype: str | None, limit: int
) -> Budget:
    """Weights, cache and work of `rows` sequences of `tokens` tokens, on one device."""
    cfg, dtype = manifest.config, jnp.dtype(dtype or manifest.dtype)
    cache = device_bytes(abstract_cache(cfg, rows, tokens, dtype, abstract_mesh(sizes)))
    here = math.ceil(rows / (sizes["data"] * sizes["fsdp"]))
    layer = layer_values(cfg) if manifest.quantization else 0
    activations = here * tokens * (2 * cfg.ffn_size + 4 * cfg.attention_size)
    logits = 3 * here * cfg.vocab_size * 4
    return Budget(
        {
            **weight_bytes(cfg, dtype, manifest.quantization, sizes),
            f"KV cache of {rows} x {tokens} tokens": cache,
            "work of a prefill": (layer + activations) // sizes["tensor"] * dtype.itemsize + logits,
        },
        limit,
    )


def print_plan(
    flags: PlanFlags, manifest: Manifest, mesh: str | None, dtype: str | None, rows: int
) -> None:
    """Prints the plan; InputError, with its numbers, if it does not fit --device_memory."""
    sizes = mesh_sizes(mesh or 1, manifest.config)
    limit = int((flags.device_memory or 0) * GB)
    plan = budget(manifest, sizes, rows, flags.plan_tokens, dtype, limit)
    count = math.prod(sizes.values())
    print(f"memory of each of {count} devices ({describe_mesh(sizes)}):\n{plan.describe()}")
    plan.check(REMEDY)
