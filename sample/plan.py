"""The memory that generation needs, known before any weight is read: what --plan prints."""

import dataclasses
import math

import jax.numpy as jnp

from qwen_jax.api import mesh_sizes
from qwen_jax.cache import abstract_cache, stored_dtype
from qwen_jax.engine import prefill_chunk
from qwen_jax.manifest import Manifest
from qwen_jax.memory import GB, Budget, abstract_mesh, device_bytes, layer_values, weight_bytes
from qwen_jax.sharding import describe_mesh

REMEDY = (
    "use a shorter --plan_tokens, fewer rows, --cache_dtype int8, more devices (--mesh), "
    "or --quantize int4 or nf4"
)


@dataclasses.dataclass(kw_only=True)
class PlanFlags:
    """What every program that runs a model says about its memory, and what that follows from."""

    mesh: str | None = None
    """number of devices, or sizes such as fsdp=2,tensor=4; unset: one device"""
    dtype: str | None = None
    """compute dtype, bfloat16 or float32; unset: that of the checkpoint"""
    cache_dtype: str | None = None
    """int8: keys and values in half the memory; unset: in the compute dtype"""
    plan: bool = False
    """print the memory that this needs, and stop; needs no weights, only config.json"""
    plan_tokens: int = 2048
    """tokens of prompt and answer to plan for"""
    device_memory: float | None = None
    """GB of each device to plan for; unset: no limit"""


def budget(
    manifest: Manifest,
    sizes: dict[str, int],
    rows: int,
    tokens: int,
    dtype: str | None,
    limit: int,
    cache_dtype: str | None = None,
) -> Budget:
    """Weights, cache and work of `rows` sequences of `tokens` tokens, on one device.

    A prefill works on so many tokens at a time as the engine runs at once. A chunk of a longer
    prompt also copies its layer's keys and values out of the cache, and has a mask.
    """
    cfg, dtype = manifest.config, jnp.dtype(dtype or manifest.dtype)
    stored = stored_dtype(cache_dtype, dtype)
    cache = device_bytes(abstract_cache(cfg, rows, tokens, stored, abstract_mesh(sizes)))
    here = math.ceil(rows / (sizes["data"] * sizes["fsdp"]))
    chunk = prefill_chunk(here)
    layer = layer_values(cfg) if manifest.quantization else 0
    work = layer + here * min(tokens, chunk) * (2 * cfg.ffn_size + 4 * cfg.attention_size)
    mask = 0
    if tokens > chunk:
        work += 2 * here * tokens * cfg.attention_size
        mask = here * chunk * tokens * dtype.itemsize
    logits = 3 * here * cfg.vocab_size * 4
    return Budget(
        {
            **weight_bytes(cfg, dtype, manifest.quantization, sizes),
            f"KV cache of {rows} x {tokens} tokens": cache,
            "work of a prefill": work // sizes["tensor"] * dtype.itemsize + mask + logits,
        },
        limit,
    )


def print_plan(flags: PlanFlags, manifest: Manifest, rows: int) -> None:
    """Prints the plan; InputError, with its numbers, if it does not fit --device_memory."""
    sizes = mesh_sizes(flags.mesh or 1, manifest.config)
    limit = int((flags.device_memory or 0) * GB)
    plan = budget(manifest, sizes, rows, flags.plan_tokens, flags.dtype, limit, flags.cache_dtype)
    count = math.prod(sizes.values())
    print(f"memory of each of {count} devices ({describe_mesh(sizes)}):\n{plan.describe()}")
    plan.check(REMEDY)
