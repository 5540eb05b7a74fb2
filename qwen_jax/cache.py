"""The KV cache: static arrays, one slot a position, each row at its own length.

Rows are right-padded: slot s of row b holds position s. Slots past a row's length hold leftovers
that no query sees and that later tokens overwrite. It knows nothing of weights or sampling.

With dtype int8 each key and each value of a head has one scale, absmax / 127, and takes half the
memory (130 bytes instead of 256 for a head of 128). Keys come to it in `key_units`: a few of their
channels are large only by the bias of the projection and would take all levels for themselves.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.quant import quantize_heads
from qwen_jax.sharding import partition_spec


@struct.dataclass
class KVCache:
    k: jax.Array  # [L, B, S, N, H]
    v: jax.Array  # [L, B, S, N, H]
    lengths: jax.Array  # int32 [B]: filled slots, the position of the next token
    ntk: jax.Array  # int32 [B]: row of the rope table, fixed at prefill (see positions.rope_table)
    k_scale: jax.Array | None = None  # bfloat16 [L, B, S, N] if k and v are int8
    v_scale: jax.Array | None = None

    @property
    def capacity(self) -> int:
        return self.k.shape[2]


def stored_dtype(wanted: Any, compute: Any) -> np.dtype:
    """The dtype of keys and values: int8, or that of the computation (None); else InputError."""
    compute = jnp.dtype(compute)
    name = compute.name if wanted is None else getattr(wanted, "__name__", str(wanted))
    if name not in ("int8", compute.name):
        raise InputError(
            f"cache_dtype is {name!r}; expected int8, or nothing for that of the computation, "
            f"{compute.name}"
        )
    return jnp.dtype(name)


def abstract_cache(
    cfg: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype, mesh: Mesh | None = None
) -> KVCache:
    """Shapes (and layouts, given a mesh) of a cache; heads over tensor, rows over data and fsdp."""
    shape = (cfg.num_layers, batch, capacity, cfg.num_heads, cfg.head_dim)
    kv_sharding = row_sharding = None
    if mesh is not None:
        axes = (None, "batch", None, "heads", None)
        kv_spec = partition_spec(axes, shape, mesh)
        kv_sharding = NamedSharding(mesh, kv_spec)
        row_sharding = NamedSharding(mesh, PartitionSpec(kv_spec[1]))
    rows = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=row_sharding)
    kv = jax.ShapeDtypeStruct(shape, dtype, sharding=kv_sharding)
    if dtype != jnp.int8:
        return KVCache(k=kv, v=kv, lengths=rows, ntk=rows)
    scale_sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(*kv_spec[:-1]))
    scale = jax.ShapeDtypeStruct(shape[:-1], jnp.bfloat16, sharding=scale_sharding)
    return KVCache(k=kv, v=kv, lengths=rows, ntk=rows, k_scale=scale, v_scale=scale)


@functools.partial(jax.jit, static_argnums=range(5))
def init_cache(
    cfg: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype, mesh: Mesh | None = None
) -> KVCache:
    """An empty cache for `batch` rows of up to `capacity` tokens."""
    abstract = abstract_cache(cfg, batch, capacity, dtype, mesh)
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
    if mesh is None:
        return cache
    layouts = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.lax.with_sharding_constraint(cache, layouts)


def key_units(
    bias: jax.Array,  # [..., N, H], added to the keys before they are rotated
) -> jax.Array:  # [..., N, H]: powers of two, from 1 on
    """What to divide the keys by, and multiply the queries with, so that 255 levels serve a head.

    Rotation turns channels i and i + H/2 into each other, so a pair has one unit, and scores stay
    what they are to the last bit (float16 scales of packed weights may round, where a large unit
    makes a small one subnormal). A unit is how often the bias of a pair exceeds what is usual in
    its head: the median, and 2 for what the input adds. On a real model with biases up to 211 this
    takes the cost of an int8 cache from 0.94 % of the loss to 0.02 % (docs/benchmarks.md).
    """
    first, second = jnp.split(bias.astype(jnp.float32), 2, axis=-1)
    size = jnp.hypot(first, second)  # squares of large ones would overflow
    usual = jnp.median(size, axis=-1, keepdims=True) + 2
    power = jnp.round(jnp.log2(jnp.maximum(size / usual, 1)))
    unit = jnp.ldexp(jnp.ones_like(size), power.astype(jnp.int32))  # exp2 is not exact everywhere
    return jnp.concatenate([unit, unit], axis=-1).astype(bias.dtype)


def write(
    cache: KVCache,
    layer: jax.Array,  # int32 []
    k: jax.Array,  # [B, T, N, H]
    v: jax.Array,  # [B, T, N, H]
) -> KVCache:
    """Puts T new keys and values of one layer behind each row's filled slots, in place.

    Lengths stay: they grow once, after the last layer.
    """
    if cache.k_scale is None:
        return cache.replace(
            k=_append(cache.k, k, layer, cache.lengths), v=_append(cache.v, v, layer, cache.lengths)
        )
    (k, k_scale), (v, v_scale) = quantize_heads(k), quantize_heads(v)
    return cache.replace(
        k=_append(cache.k, k, layer, cache.lengths),
        v=_append(cache.v, v, layer, cache.lengths),
        k_scale=_append(cache.k_scale, k_scale, layer, cache.lengths),
        v_scale=_append(cache.v_scale, v_scale, layer, cache.lengths),
    )


def read(
    cache: KVCache,
    layer: jax.Array,  # int32 []
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:  # k, v [B, S, N, H]
    """All slots of one layer, filled or not."""

    def one(stack: jax.Array, scale: jax.Array | None) -> jax.Array:
        x = jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)
        if scale is None:
            return x.astype(dtype)
        scale = jax.lax.dynamic_index_in_dim(scale, layer, 0, keepdims=False)
        return (x.astype(jnp.float32) * scale.astype(jnp.float32)[..., None]).astype(dtype)

    return one(cache.k, cache.k_scale), one(cache.v, cache.v_scale)


def _append(
    stack: jax.Array,  # [L, B, S, ...]
    new: jax.Array,  # [B, T, ...]
    layer: jax.Array,  # int32 []
    start: jax.Array,  # int32 [B]
) -> jax.Array:
    B, T = new.shape[:2]
    new = new.astype(stack.dtype)
    if B == T == 1:
        # One window: XLA makes it in the fusion that computes it. A full row is past its end and
        # may overwrite its last slot, which nothing reads any more.
        zeros = (0,) * (new.ndim - 2)
        return jax.lax.dynamic_update_slice(stack, new[None], (layer, 0, start[0], *zeros))
    # Rows differ in length, so this is a scatter of one window a row; out-of-range slots drop.
    rows = jnp.arange(B)[:, None]
    slots = start[:, None] + jnp.arange(T)
    return stack.at[layer, rows, slots].set(new, mode="drop")
