"""The KV cache: static arrays, one slot a position, each row at its own length.

Rows are right-padded: slot s of row b holds position s. Slots past a row's length hold leftovers
that no query sees and that later tokens overwrite. It knows nothing of weights or sampling.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_jax.config import ModelConfig
from qwen_jax.sharding import partition_spec


@struct.dataclass
class KVCache:
    k: jax.Array  # [L, B, S, N, H]
    v: jax.Array  # [L, B, S, N, H]
    lengths: jax.Array  # int32 [B]: filled slots, the position of the next token
    ntk: jax.Array  # int32 [B]: row of the rope table, fixed at prefill (see model.rope_table)

    @property
    def capacity(self) -> int:
        return self.k.shape[2]


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
    return KVCache(k=kv, v=kv, lengths=rows, ntk=rows)


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


def append(
    stack: jax.Array,  # [L, B, S, N, H]
    new: jax.Array,  # [B, T, N, H]
    layer: jax.Array,  # int32 []
    start: jax.Array,  # int32 [B]
) -> jax.Array:
    """Writes T new keys or values of one layer, row b from slot start[b] on, in place."""
    T = new.shape[1]
    # Rows differ in length, so this is a scatter of one window a row; out-of-range slots drop.
    rows = jnp.arange(new.shape[0])[:, None]
    slots = start[:, None] + jnp.arange(T)
    return stack.at[layer, rows, slots].set(new.astype(stack.dtype), mode="drop")
