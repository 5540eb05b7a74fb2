"""The decoder on packed weights (packed_params.py): generation at the memory's speed.

The mathematics is model.py's; what differs is that the scan runs over layer numbers and every large
product reads the whole stack at that number, so that nothing is copied, and that up and gate are
one product. It knows no sampling and no LoRA.

On a mesh each device runs all layers on its share: heads and FFN columns are split over `tensor`,
with a sum over its devices after wo and after down, rows of the batch over `data` and `fsdp`, over
which the weights are replicated. Embedding and head lie as params.py lays them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from qwen_jax import cache as kv
from qwen_jax import model
from qwen_jax.cache import KVCache, abstract_cache
from qwen_jax.config import ModelConfig
from qwen_jax.kernels.append_tokens import Stacks, append_tokens
from qwen_jax.kernels.attention import attention
from qwen_jax.kernels.decode_attention import decode_attention
from qwen_jax.kernels.decode_matmul import MAX_ROWS, decode_matmul, decode_parts
from qwen_jax.kernels.packing import PackedWeight
from qwen_jax.kernels.residual_norm import residual_norm
from qwen_jax.kernels.rms_norm import rms_norm
from qwen_jax.kernels.swiglu import swiglu
from qwen_jax.model import Params, embed
from qwen_jax.packed_params import (
    check_mesh,
    check_packing,
    head_layout,
    is_packed,
    layer_layout,
    pack_params,
    packable,
    pays,
)
from qwen_jax.positions import Place, rope
from qwen_jax.sharding import batch_spec

__all__ = [
    "check_mesh", "check_packing", "forward", "is_packed", "logits", "pack_params", "packable",
    "pays", "unembed",
]  # fmt: skip

# Up to this many new tokens a row read the cache with the decode kernel, one query after another.
FEW_TOKENS = 16


def unembed(params: Params, hidden: jax.Array, mesh: Mesh | None = None) -> jax.Array:
    """model.unembed, also for a packed head: hidden [..., D] -> logits float32 [..., V].

    On a mesh every device gets all rows and gives the logits of its own part of the vocabulary.
    """
    head = params["lm_head"]
    rows = hidden.reshape(-1, hidden.shape[-1])

    def product(rows: jax.Array, head: jax.Array | PackedWeight) -> jax.Array:
        if isinstance(head, PackedWeight):
            return decode_parts(rows, head, jnp.int32(0)).sum(0)
        return model.unembed({"lm_head": head}, rows)

    if mesh is not None and mesh.size > 1:
        # By hand: to join the logits the compiler joins the head, gigabytes for every token.
        layout, vocab = head_layout(head, mesh)
        product = jax.shard_map(
            product, mesh=mesh, in_specs=(PartitionSpec(), layout),
            out_specs=PartitionSpec(None, vocab), check_vma=False,
        )  # fmt: skip
    with jax.named_scope("unembed"):
        return product(rows, head).reshape(*hidden.shape[:-1], -1)


def stacks_of(cache: KVCache) -> Stacks:
    return cache.k, cache.v, cache.k_scale, cache.v_scale


def forward(
    cfg: ModelConfig,
    params: Params,
    tokens: jax.Array,  # int32 [B, T], right-padded
    cache: KVCache | None,  # None: nothing is kept; the tokens are whole sequences
    *,
    counts: jax.Array | None = None,  # int32 [B]: how many of the T tokens are real; default T
    prompt_lengths: jax.Array | None = None,  # int32 [B]: if the prompt comes in parts
    fresh: bool = False,  # promises an empty cache
    implementation: str | None = None,  # of all kernels: "mosaic" or "xla"; None chooses
    mesh: Mesh | None = None,  # the one that the weights are packed for
) -> tuple[jax.Array, KVCache | None]:  # hidden [B, T, D] after the final norm, longer cache
    """model.forward for packed weights."""
    B, T = tokens.shape
    counts = jnp.full((B,), T, jnp.int32) if counts is None else counts
    prompt_lengths = counts if prompt_lengths is None else prompt_lengths
    run = functools.partial(
        _run_layers, cfg, fresh=fresh or cache is None, implementation=implementation
    )
    if mesh is not None and mesh.size > 1:
        # The compiler cannot split the kernels, so each device runs the layers on its own share:
        # some of the rows, some of the heads and of the FFN columns.
        rows, kept = batch_spec(), _cache_layout(cfg, cache, mesh)
        run = jax.shard_map(
            functools.partial(run, axis="tensor"), mesh=mesh, check_vma=False,
            in_specs=(layer_layout(params["layers"]), rows, rows, rows, kept),
            out_specs=(rows, kept),
        )  # fmt: skip
    x = embed(params, tokens, mesh)
    x, cache = run(params["layers"], x, counts, prompt_lengths, cache)
    return rms_norm(x, params["ln_f"], cfg.norm_eps), cache


def _cache_layout(cfg: ModelConfig, cache: KVCache | None, mesh: Mesh) -> KVCache | None:
    if cache is None:
        return None
    _, B, S, _, _ = cache.k.shape
    abstract = abstract_cache(cfg, B, S, cache.k.dtype, mesh)
    return jax.tree.map(lambda x: x.sharding.spec, abstract)


def _run_layers(
    cfg: ModelConfig,
    layers: Params,
    x: jax.Array,  # [B, T, D]
    counts: jax.Array,  # int32 [B]
    prompt_lengths: jax.Array,  # int32 [B]
    cache: KVCache | None,
    *,
    fresh: bool,
    implementation: str | None,
    axis: str | None = None,  # mesh axis over which heads and FFN columns are split
) -> tuple[jax.Array, KVCache | None]:  # [B, T, D] after the last layer, longer cache
    """All layers on one device: on all of the model, or on its share of rows, heads and columns."""
    B, T, D = x.shape
    filled = jnp.zeros((B,), jnp.int32) if cache is None else cache.lengths
    place = Place.of(cfg, filled, T, prompt_lengths, None if cache is None else cache.ntk)
    attend = functools.partial(_attend, place, fresh=fresh, implementation=implementation)
    multiply = functools.partial(decode_parts, implementation=implementation)
    norm = functools.partial(residual_norm, eps=cfg.norm_eps, implementation=implementation)
    attn, mlp = layers["attn"], layers["mlp"]

    def multiply_all(y: jax.Array, w: PackedWeight, index: jax.Array) -> jax.Array:
        """The product over the inputs of all devices, as parts: one, if several devices add up."""
        parts = multiply(y, w, index)
        if axis is None:
            return parts
        total = parts.sum(0, keepdims=True)
        # Few rows: the sum costs its latency, not its bytes, so it stays in float32 and is rounded
        # once, as on one device. A prompt's 100 MB a layer travel in the compute dtype.
        if B * T > MAX_ROWS:
            total = total.astype(x.dtype)
        return jax.lax.psum(total, axis).astype(jnp.float32)

    def layer(carry: Any, index: jax.Array) -> Any:
        # x [B*T, D] lacks the last product, which comes as parts: the norm adds them as it reads.
        x, parts, cache = carry
        with jax.named_scope("attention"):
            x, y = norm(x, parts, layers["ln_1"], index)
            y, cache = attend(multiply(y, attn["wqkv"], index), attn["bqkv"], cache, index)
            parts = multiply_all(y, attn["wo"], index)
        with jax.named_scope("mlp"):
            x, y = norm(x, parts, layers["ln_2"], index)
            up_gate = decode_matmul(y, mlp["up_gate"], index, implementation=implementation)
            wide = swiglu(up_gate[:, 0], up_gate[:, 1])
            parts = multiply_all(wide, mlp["down"], index)
        return (x, parts, cache), None

    wide = jax.ShapeDtypeStruct((B * T, mlp["down"].in_size), x.dtype)
    parts = jax.eval_shape(multiply_all, wide, mlp["down"], jnp.int32(0))
    start = (x.reshape(B * T, D), jnp.zeros(parts.shape, parts.dtype), cache)
    (x, parts, cache), _ = jax.lax.scan(layer, start, jnp.arange(cfg.num_layers))
    if cache is not None:
        cache = cache.replace(lengths=filled + counts, ntk=place.ntk)
    return (x + parts.sum(0).astype(x.dtype)).reshape(B, T, D), cache


def _attend(
    place: Place,
    parts: jax.Array,  # float32 [P, B * T, 3 * N * H]: their sum is query, key and value
    bias: jax.Array,  # [L, 3, N, H]
    cache: KVCache | None,
    index: jax.Array,  # int32 []
    *,
    fresh: bool,
    implementation: str | None,
) -> tuple[jax.Array, KVCache | None]:  # [B * T, N * H]
    B, T = place.positions.shape
    if T <= FEW_TOKENS and cache is not None and not fresh:
        return _attend_few(place, parts, bias, cache, index, implementation)
    bias = jax.lax.dynamic_index_in_dim(bias, index, 0, keepdims=False)
    qkv = parts.sum(0).astype(bias.dtype).reshape(B, T, *bias.shape) + bias
    q, k, v = rope(qkv[:, :, 0], *place.angles), rope(qkv[:, :, 1], *place.angles), qkv[:, :, 2]
    if place.logn is not None:
        q = q * place.logn.astype(q.dtype)
    cache = None if cache is None else kv.write(cache, index, k, v)
    if fresh:
        y = attention(q, k, v, q_index=place.positions, causal_square=True)
    else:
        y = attention(q, *kv.read(cache, index, q.dtype), q_index=place.positions)
    return y.reshape(B * T, -1), cache


def _attend_few(place, parts, bias, cache: KVCache, index, implementation):
    """`_attend` for few tokens a row: two kernels, and the cache is read where it is filled."""
    R = place.positions.size
    cos, sin = (angle.reshape(R, -1) for angle in place.angles)
    factor = jnp.ones((R,)) if place.logn is None else place.logn.reshape(R)
    slots = place.positions.reshape(R)
    q, stacks = append_tokens(
        parts, bias, cos, sin, factor, stacks_of(cache), index, slots,
        implementation=implementation,
    )  # fmt: skip
    # A full row (done, its one token dropped) still sees no more than its slots.
    visible = jnp.minimum(slots + 1, cache.capacity)
    y = decode_attention(q, *stacks, index, visible, implementation=implementation)
    k, v, k_scale, v_scale = stacks
    return y.reshape(R, -1), cache.replace(k=k, v=v, k_scale=k_scale, v_scale=v_scale)


@functools.partial(jax.jit, static_argnames=("cfg", "mesh"))
def logits(
    cfg: ModelConfig, params: Params, tokens: jax.Array, mesh: Mesh | None = None
) -> jax.Array:
    """model.logits for packed weights: tokens int32 [B, T] -> float32 [B, T, V]."""
    hidden, _ = forward(cfg, params, tokens, None, mesh=mesh)
    return unembed(params, hidden, mesh)
