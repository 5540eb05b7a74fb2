"""The decoder on packed quantized weights: generation on one card, at the speed of its memory.

    params["layers"] = {"ln_1", "ln_2": [L, D],
                        "attn": {"wqkv": PackedWeight, "bqkv": [L, 3, N, H], "wo": PackedWeight},
                        "mlp": {"up_gate": PackedWeight, "down": PackedWeight}}

The rest of the tree is that of params.py. The mathematics is model.py's; what differs is that the
scan runs over layer numbers and every large product reads the whole stack at that number, so that
nothing is copied, and that up and gate are one product. It knows no sampling and no LoRA.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen_jax import cache as kv
from qwen_jax import model
from qwen_jax.cache import KVCache
from qwen_jax.config import ModelConfig
from qwen_jax.kernels.append_tokens import Stacks, append_tokens
from qwen_jax.kernels.attention import attention
from qwen_jax.kernels.decode_attention import decode_attention
from qwen_jax.kernels.decode_matmul import decode_matmul, decode_parts
from qwen_jax.kernels.hopper import on_hopper
from qwen_jax.kernels.packing import PackedWeight, can_pack, pack
from qwen_jax.kernels.residual_norm import residual_norm
from qwen_jax.model import Params, Place, embed, rms_norm, rope
from qwen_jax.quant import QTensor, QuantFormat, quantize

# Up to this many new tokens a row read the cache with the decode kernel, one query after another.
_FEW_TOKENS = 16
_HEAD = QuantFormat.named("int8")


def packable(params: Params) -> bool:
    """Whether these weights have a format that `pack_params` takes."""
    blocks = (params["layers"]["attn"], params["layers"]["mlp"])
    weights = [w for block in blocks for w in block.values() if isinstance(w, QTensor)]
    return len(weights) == 5 and all(can_pack(w) for w in weights)


def pays(params: Params, lora: Any, mesh: Mesh | None) -> bool:
    """Whether packing makes generation faster here: on one Hopper card, without an adapter."""
    alone = mesh is None or mesh.size == 1
    return lora is None and alone and on_hopper(params["wte"].dtype) and packable(params)


def is_packed(params: Params) -> bool:
    return isinstance(params["layers"]["attn"]["wqkv"], PackedWeight)


def pack_params(params: Params, *, consume: bool = False, int8_head: bool = False) -> Params:
    """Reorders the quantized weights.

    With `consume` each leaf is freed as soon as it is packed: memory then holds the model once and
    its largest leaf a second time. `int8_head` also quantizes the output head, one scale a token:
    half of the bytes that it costs a step, for a change of the logits. What `cache.key_units` takes
    off the keys and gives to the queries, so that an int8 cache holds them well, goes into their
    weight and bias here, once.
    """
    layers, pack_leaf = params["layers"], jax.jit(pack)

    def packed(*leaves: QTensor, factor: jax.Array | None = None) -> PackedWeight:
        out = pack_leaf(*leaves, factor=factor)
        if consume:
            jax.block_until_ready(out)
            for array in jax.tree.leaves(leaves):
                array.delete()
        return out

    attn, mlp = layers["attn"], layers["mlp"]
    unit = kv.key_units(attn["bqkv"][:, 1])  # [L, N, H]
    factor = jnp.stack([unit, 1 / unit, jnp.ones_like(unit)], axis=1)  # [L, 3, N, H]
    head = params["lm_head"]
    if int8_head:
        one = jax.jit(lambda w: pack(jax.tree.map(lambda x: x[None], quantize(w, _HEAD))))
        head = one(head)
    return params | {
        "lm_head": head,
        "layers": {
            "ln_1": layers["ln_1"],
            "ln_2": layers["ln_2"],
            "attn": {
                "wqkv": packed(attn["wqkv"], factor=factor),
                "bqkv": attn["bqkv"] * factor,
                "wo": packed(attn["wo"]),
            },
            "mlp": {"up_gate": packed(mlp["up"], mlp["gate"]), "down": packed(mlp["down"])},
        },
    }


def unembed(params: Params, hidden: jax.Array) -> jax.Array:
    """model.unembed, also for a packed head: hidden [..., D] -> logits float32 [..., V]."""
    head = params["lm_head"]
    if not isinstance(head, PackedWeight):
        return model.unembed(params, hidden)
    with jax.named_scope("unembed"):
        rows = hidden.reshape(-1, hidden.shape[-1])
        return decode_parts(rows, head, jnp.int32(0)).sum(0).reshape(*hidden.shape[:-1], -1)


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
) -> tuple[jax.Array, KVCache | None]:  # hidden [B, T, D] after the final norm, longer cache
    """model.forward for packed weights on one device."""
    B, T = tokens.shape
    filled = jnp.zeros((B,), jnp.int32) if cache is None else cache.lengths
    counts = jnp.full((B,), T, jnp.int32) if counts is None else counts
    prompt_lengths = counts if prompt_lengths is None else prompt_lengths
    place = Place.of(cfg, filled, T, prompt_lengths, None if cache is None else cache.ntk)
    attend = functools.partial(
        _attend, place, fresh=fresh or cache is None, implementation=implementation
    )
    multiply = functools.partial(decode_parts, implementation=implementation)
    norm = functools.partial(residual_norm, eps=cfg.norm_eps, implementation=implementation)
    layers = params["layers"]
    attn, mlp = layers["attn"], layers["mlp"]

    def layer(carry: Any, index: jax.Array) -> Any:
        # x [B*T, D] lacks the last product, which comes as parts: the norm adds them as it reads.
        x, parts, cache = carry
        with jax.named_scope("attention"):
            x, y = norm(x, parts, layers["ln_1"], index)
            y, cache = attend(multiply(y, attn["wqkv"], index), attn["bqkv"], cache, index)
            parts = multiply(y, attn["wo"], index)
        with jax.named_scope("mlp"):
            x, y = norm(x, parts, layers["ln_2"], index)
            up_gate = decode_matmul(y, mlp["up_gate"], index, implementation=implementation)
            parts = multiply(up_gate[:, 0] * jax.nn.silu(up_gate[:, 1]), mlp["down"], index)
        return (x, parts, cache), None

    x = embed(params, tokens, None).reshape(B * T, -1)
    wide = jax.ShapeDtypeStruct((B * T, cfg.ffn_size), x.dtype)
    parts = jax.eval_shape(multiply, wide, mlp["down"], jnp.int32(0))
    parts = jnp.zeros(parts.shape, parts.dtype)
    (x, parts, cache), _ = jax.lax.scan(layer, (x, parts, cache), jnp.arange(cfg.num_layers))
    x = (x + parts.sum(0).astype(x.dtype)).reshape(B, T, -1)
    if cache is not None:
        cache = cache.replace(lengths=filled + counts, ntk=place.ntk)
    return rms_norm(x, params["ln_f"], cfg.norm_eps), cache


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
    if T <= _FEW_TOKENS and cache is not None and not fresh:
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


@functools.partial(jax.jit, static_argnames="cfg")
def logits(cfg: ModelConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """model.logits for packed weights: tokens int32 [B, T] -> float32 [B, T, V]."""
    hidden, _ = forward(cfg, params, tokens, None)
    return unembed(params, hidden)
