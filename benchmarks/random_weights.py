"""Random weights and a filled cache at full width, each device making its own part on the spot.

What packing random weights would give, but at once: packed codes are random bits, and those of bf16
random numbers. One layer at a time, because the generator needs several times its output.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from qwen_jax.cache import KVCache, abstract_cache
from qwen_jax.config import ModelConfig
from qwen_jax.kernels.packing import UNITS, PackedWeight, padded_inputs, slice_layout
from qwen_jax.kernels.tilings import FORMATS
from qwen_jax.packed_params import CUT, head_layout
from qwen_jax.params import EMBEDDING_AXES, HEAD_AXES
from qwen_jax.sharding import check_tensor_axis, partition_spec, tensor_size

# Scales that give weights of about 0.02.
_SCALES = {"int4": 0.0043, "nf4": 0.05, "int8": 0.00027}


def born(make: Callable[[jax.Array], Any], layout: Any, mesh: Mesh | None) -> Any:
    """make(key) -> the arrays of one device, with `layout` the PartitionSpec of each."""
    key = jax.random.key(0, impl="rbg")
    if mesh is None or mesh.size == 1:
        return jax.jit(make)(key)

    def share() -> Any:  # devices of the other axes hold copies, so they draw the same
        return make(jax.random.fold_in(key, jax.lax.axis_index("tensor")))

    run = jax.shard_map(share, mesh=mesh, in_specs=(), out_specs=layout, check_vma=False)
    return jax.jit(run)()


def random_params(cfg: ModelConfig, kind: str, mesh: Mesh | None, int8_head: bool = False) -> dict:
    """Packed weights of a kind."""
    tp, N, H = tensor_size(mesh), cfg.num_heads, cfg.head_dim
    L, D, F, V = cfg.num_layers, cfg.hidden_size, cfg.ffn_size, cfg.vocab_size
    if tp > 1:
        check_tensor_axis(dict(mesh.shape), {"heads": N, "blocks of 128 FFN columns": F // 128})

    def weight(name: str, *out: int, size: int) -> PackedWeight:
        layout = jax.eval_shape(lambda: packed_weight(kind, L, out, size, jax.random.key(0)))
        layout = slice_layout(layout, CUT[name])
        return born(lambda key: packed_weight(kind, L, out, size, key), layout, mesh)

    def table(axes: tuple[str | None, ...]) -> jax.Array:
        layout = PartitionSpec() if mesh is None else partition_spec(axes, (V, D), mesh)
        parts = [1 if mesh is None or axis is None else _devices(mesh, axis) for axis in layout]
        shape = (V, D) if mesh is None else (V // parts[0], D // parts[1])
        return born(lambda key: small_normal(key, shape), layout, mesh)

    def packed_head() -> PackedWeight:
        like = jax.eval_shape(lambda: packed_weight("int8", 1, (V // tp,), D, jax.random.key(0)))
        make = lambda key: packed_weight("int8", 1, (V // tp,), D, key)  # noqa: E731
        return born(make, head_layout(like, mesh)[0] if mesh else None, mesh)

    whole, bias = PartitionSpec(), PartitionSpec(None, None, "tensor")
    ones = born(lambda _: jnp.ones((L, D), jnp.bfloat16), whole, mesh)
    return {
        "wte": table(EMBEDDING_AXES),
        "layers": {
            "ln_1": ones,
            "ln_2": ones,
            "attn": {
                "wqkv": weight("wqkv", 3, N // tp, H, size=D),
                "bqkv": born(lambda _: jnp.zeros((L, 3, N // tp, H), jnp.bfloat16), bias, mesh),
                "wo": weight("wo", D, size=N // tp * H),
            },
            "mlp": {
                "up_gate": weight("up_gate", 2, F // tp, size=D),
                "down": weight("down", D, size=F // tp),
            },
        },
        "ln_f": born(lambda _: jnp.ones((D,), jnp.bfloat16), whole, mesh),
        "lm_head": packed_head() if int8_head else table(HEAD_AXES),
    }


def _devices(mesh: Mesh, axes: str | tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def small_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16) * 0.02


def packed_weight(
    kind: str, L: int, out: tuple[int, ...], size: int, key: jax.Array
) -> PackedWeight:
    """Random codes [L, *out, size] with one scale for all, or random values."""
    rows, unit = math.prod(out) // 16, FORMATS[kind].unit
    units = padded_inputs(size, kind) // unit
    lanes = (rows, units, 32)

    def layer(key: jax.Array) -> jax.Array:
        if kind == "bf16":
            return small_normal(key, (*lanes, 8))
        return jax.random.bits(key, (*lanes, 4), jnp.uint32)

    codes = jax.lax.map(layer, jax.random.split(key, L))
    if kind == "bf16":
        scale = None
    elif kind == "int8":
        scale = jnp.full((L, rows * 16), _SCALES[kind], jnp.float32)
    else:
        loads = (2,) if kind == "nf4" else ()
        scale = jnp.full((L, rows, units // UNITS, *loads, 8, 8), _SCALES[kind], jnp.float16)
    return PackedWeight(codes=codes, scale=scale, out_shape=out, in_size=size, kind=kind)


def filled_cache(
    cfg: ModelConfig, batch: int, capacity: int, context: int, dtype, mesh: Mesh | None = None
) -> KVCache:
    """A cache whose rows hold `context` random tokens."""
    abstract = abstract_cache(cfg, batch, capacity, dtype, mesh)

    def values(x: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        shape = x.shape if mesh is None else x.sharding.shard_shape(x.shape)
        if len(shape) == 1:
            return jnp.zeros(shape, x.dtype)
        if len(shape) == 4:
            return jnp.full(shape, 0.01, x.dtype)

        def layer(key: jax.Array) -> jax.Array:
            if x.dtype == jnp.int8:
                return jax.random.bits(key, shape[1:], jnp.uint8).view(jnp.int8)
            # Bits rather than normal numbers: no float32 copy of the cache on the way.
            bits = jax.random.bits(key, shape[1:], jnp.uint16)
            small = (bits & jnp.uint16(0x80FF)) | jnp.uint16(0x3F00)
            return small.view(jnp.bfloat16).astype(x.dtype)

        return jax.lax.map(layer, jax.random.split(key, shape[0]))

    def make(key: jax.Array) -> KVCache:
        cache = jax.tree.map(lambda x: values(x, key), abstract)
        return cache.replace(lengths=jnp.full_like(cache.lengths, context))

    layout = None if mesh is None else jax.tree.map(lambda x: x.sharding.spec, abstract)
    return born(make, layout, mesh)
