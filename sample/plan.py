"""The memory that generation needs, known before any weight is read: what --plan prints."""

import dataclasses
import math

import jax.numpy as jnp

from qwen_jax.api import mesh_sizes
from qwen_jax.cache import abstract_cache, stored_dtype
from qwen_jax.engine import prefill_chunk
from qwen_jax.errors import UsageError
from qwen_jax.manifest import DTYPES, Manifest
from qwen_jax.memory import GB, Budget, abstract_mesh, device_bytes, layer_values, weight_bytes
from qwen_jax.packed_params import packable, room_for_whole
from qwen_jax.params import abstract_params
from qwen_jax.sharding import describe_mesh

REMEDY = (
    "use a shorter --plan_tokens, fewer rows, --cache_dtype int8, more devices (--mesh), "
    "or --quantize int4 or nf4"
)


PREFILL_WORK = "work of a prefill"  # the item of a plan that decoding does not need
# Of tokens, and of GB: no machine has as many.
MOST = 2**31 - 1


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


def check_plan_flags(flags: PlanFlags) -> None:
    """UsageError for what no checkpoint could make right."""
    if flags.dtype is not None and flags.dtype not in DTYPES:
        raise UsageError(f"--dtype is {flags.dtype!r}; expected {' or '.join(DTYPES)}")
    if flags.cache_dtype not in (None, "int8", flags.dtype):
        raise UsageError(f"--cache_dtype is {flags.cache_dtype!r}; expected int8, or leave it out")
    if not 1 <= flags.plan_tokens <= MOST:
        raise UsageError(f"--plan_tokens is {flags.plan_tokens}; expected 1 to {MOST}")
    if flags.device_memory is not None and not 0 < flags.device_memory <= MOST:
        raise UsageError(f"--device_memory is {flags.device_memory}; expected GB, more than 0")


def budget(
    manifest: Manifest,
    sizes: dict[str, int],
    rows: int,
    tokens: int,
    dtype: str | None,
    limit: int,
    cache_dtype: str | None = None,
    adapter: bool = False,
) -> Budget:
    """Weights, cache and work of `rows` sequences of `tokens` tokens, on one device.

    A prefill works on so many tokens at a time as the engine runs at once, and has the weights of
    a layer once more: dequantized, unpacked or copied out of the stack. A chunk of a longer prompt
    also copies its layer's keys and values out of the cache, and has a mask. Without an adapter the
    base is packed on Hopper cards, and is then whole on each fsdp device if `limit` has room.
    """
    cfg, dtype = manifest.config, jnp.dtype(dtype or manifest.dtype)
    stored = stored_dtype(cache_dtype, dtype)
    cache = device_bytes(abstract_cache(cfg, rows, tokens, stored, abstract_mesh(sizes)))
    here = math.ceil(rows / (sizes["data"] * sizes["fsdp"]))
    chunk = prefill_chunk(here)
    tokens_here = here * min(tokens, chunk)
    work = layer_values(cfg) + tokens_here * (2 * cfg.ffn_size + 4 * cfg.attention_size)
    mask = 0
    if tokens > chunk:
        work += 2 * here * tokens * cfg.attention_size
        mask = here * chunk * tokens * dtype.itemsize
    logits = 3 * here * cfg.vocab_size * 4
    layers = abstract_params(cfg, dtype, manifest.quantization)["layers"]
    whole = _may_be_whole(manifest, dtype, sizes, adapter)
    whole = whole and room_for_whole(layers, abstract_mesh(sizes), limit)
    return Budget(
        {
            **weight_bytes(cfg, dtype, manifest.quantization, sizes, packed=whole),
            f"KV cache of {rows} x {tokens} tokens": cache,
            PREFILL_WORK: work // sizes["tensor"] * dtype.itemsize + mask + logits,
        },
        limit,
    )


def _may_be_whole(
    manifest: Manifest, dtype: jnp.dtype, sizes: dict[str, int], adapter: bool
) -> bool:
    """Whether Hopper cards with room for it would hold packed layers whole over fsdp."""
    if adapter or sizes["fsdp"] == 1 or dtype != jnp.bfloat16:
        return False
    return packable(
        abstract_params(manifest.config, dtype, manifest.quantization), abstract_mesh(sizes)
    )


def print_plan(flags: PlanFlags, manifest: Manifest, rows: int, adapter: bool = False) -> None:
    """Prints the plan; InputError, with its numbers, if it does not fit --device_memory."""
    sizes = mesh_sizes(flags.mesh or 1, manifest.config)
    limit = int((flags.device_memory or 0) * GB)
    plan = budget(
        manifest, sizes, rows, flags.plan_tokens, flags.dtype, limit, flags.cache_dtype, adapter
    )
    count = math.prod(sizes.values())
    print(f"memory of each of {count} devices ({describe_mesh(sizes)}):\n{plan.describe()}")
    dtype = jnp.dtype(flags.dtype or manifest.dtype)
    if not limit and _may_be_whole(manifest, dtype, sizes, adapter):
        print(
            "on Hopper cards the layers are packed, and whole over fsdp if that takes less than "
            "half of a card: give --device_memory to count them so"
        )
    plan.check(REMEDY)
