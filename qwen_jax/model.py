"""The Qwen v1 decoder as pure functions over the trees of params.py and adapters.py.

    tokens [B, T] -> embed -> L x (x + attention_block(rms_norm x); x + mlp_block(rms_norm x))
                  -> rms_norm -> hidden [B, T, D] -> unembed -> logits float32 [B, T, V]

Layers are stacked and run by one lax.scan, so that 80 layers compile like one. The compute dtype
is that of the embedding; norms, rope angles and softmax run in float32. It knows nothing of
tokenizers, files or optimizers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen_jax.adapters import Lora
from qwen_jax.cache import KVCache, key_units, read, write
from qwen_jax.config import ModelConfig
from qwen_jax.kernels.attention import attention
from qwen_jax.kernels.rms_norm import rms_norm
from qwen_jax.layer_loop import Run, run_layers
from qwen_jax.layer_modes import PLAIN, Plain, Relay
from qwen_jax.layer_weights import is_quantized, joined_layer, joined_pairs, share_of, whole_layer
from qwen_jax.params import EMBEDDING_AXES
from qwen_jax.positions import Place, logn_scale, ntk_row, positions_within, rope, rope_angles
from qwen_jax.quant import with_bounds
from qwen_jax.remat import OUT, QKV, Remat
from qwen_jax.sharding import batch_spec, constrain, partition_spec

Params = dict[str, Any]


def mlp_block(
    xs: tuple[jax.Array, jax.Array],  # [B, T, D]: the same for up and for gate
    w: Params,
    lora: Params,
    relay: Relay,
    mode: Plain = PLAIN,
) -> tuple[jax.Array, Relay]:
    """SwiGLU: x [B, T, D] -> down(up(x) * silu(gate(x))); torch calls up w1 and gate w2.

    The relay, here and below, goes from product to product; the mode computes them: layer_modes.py.
    """
    names = ("up", "gate", "down")
    with jax.named_scope("mlp"):
        weights, pairs = tuple(w[name] for name in names), tuple(lora.get(name) for name in names)
        return mode.mlp(xs, weights, pairs, relay)


def project_qkv(x, w, lora, angles, logn, relay, mode=PLAIN):
    """x [B, T, D] -> q, k, v [B, T, N, H], rotated, the query scaled by logn if given; relay."""
    (qkv,), relay = mode.multiply((QKV,), x, (w["wqkv"],), (lora.get("wqkv"),), relay)
    qkv = qkv + w["bqkv"]  # [B, T, 3, N, H]
    # A split, because its gradient is one concatenation; that of slices is a sum of padded arrays.
    q, k, v = (x[:, :, 0] for x in jnp.split(qkv, 3, axis=2))
    q, k = rope(q, *angles), rope(k, *angles)
    if logn is not None:
        q = q * logn.astype(q.dtype)
    return q, k, v, relay


def project_out(x, w, lora, relay, mode=PLAIN):
    """x [B, T, N, H] -> [B, T, D]; relay."""
    x, pairs = x.reshape(*x.shape[:2], -1), (lora.get("wo"),)
    (y,), relay = mode.multiply((OUT,), x, (w["wo"],), pairs, relay)
    return y, relay


def lora_layers(lora: Lora | None, dtype: jnp.dtype) -> Params:
    """The stacks as a layer uses them, a [L, R, I] and b [L, R, *O] in the compute dtype.

    Once for all layers, not in each, b gets its outputs contiguous and takes in the scale: what is
    left of LoRA is then a bare sum of two products, which XLA can accumulate in one GEMM.
    """
    if lora is None:
        return {}
    layers: Params = {}
    for block, pairs in lora.weights.get("layers", {}).items():
        layers[block] = {
            name: {
                "a": pair["a"].astype(dtype),
                "b": jnp.moveaxis(pair["b"] * lora.scale, -1, 1).astype(dtype),
            }
            for name, pair in pairs.items()
        }
    return layers


def embed(params: Params, tokens: jax.Array, mesh: Mesh | None) -> jax.Array:
    """tokens int32 [B, T] -> [B, T, D]."""
    table = params["wte"]
    if mesh is None or mesh.size == 1:
        return jnp.take(table, tokens, axis=0)
    # By hand, because the compiler gathers the whole table, 2.5 GB at 72B, for every token.
    layout = partition_spec(EMBEDDING_AXES, table.shape, mesh)
    look_up = functools.partial(_look_up, *(axis or "" for axis in layout))
    return jax.shard_map(
        look_up, mesh=mesh, in_specs=(layout, batch_spec()), out_specs=batch_spec(),
        check_vma=False,
    )(table, tokens)  # fmt: skip


def _look_up(
    row_axis: str,  # mesh axis over which the rows of the table are split; "": none
    column_axis: str,  # the same for its columns
    table: jax.Array,  # this device's part, [V', D']
    tokens: jax.Array,  # int32 [B', T]: this device's rows of the batch
) -> jax.Array:  # [B', T, D]
    """One device's share of `embed`: each looks its part up, and the parts change hands."""
    if column_axis:  # the devices of the axis have other rows of the batch: all look up all
        tokens = jax.lax.all_gather(tokens, column_axis, axis=0, tiled=True)
    if row_axis:
        tokens = tokens - jax.lax.axis_index(row_axis) * table.shape[0]
    x = jnp.take(table, tokens, axis=0, mode="fill", fill_value=0)
    if row_axis:
        # One device has the row and the others zeros: the sum is exact.
        own = (tokens >= 0) & (tokens < table.shape[0])
        x = jax.lax.psum(jnp.where(own[:, :, None], x, 0), row_axis)
    if column_axis:
        x = jax.lax.all_to_all(x, column_axis, split_axis=0, concat_axis=2, tiled=True)
    return x


def unembed(params: Params, hidden: jax.Array) -> jax.Array:
    """hidden [..., D] -> logits float32 [..., V]; padded vocabulary rows are still in it."""
    with jax.named_scope("unembed"):
        head = params["lm_head"]
        dims = (((hidden.ndim - 1,), (1,)), ((), ()))
        return jax.lax.dot_general(hidden, head, dims, preferred_element_type=jnp.float32)


def decoder_layer(cfg, x, w, low, angles, logn, attend, kept=None, mode=PLAIN):
    """One layer: x [B, T, D] -> x and kept.

    w and low are this layer's weights and LoRA pairs; `attend(q, k, v, kept) -> (y, kept)` is the
    only thing in which a layer with a cache differs from one without; the mode (layer_modes.py)
    that in which training does.
    """
    low_attn, low_mlp = low.get("attn", {}), low.get("mlp", {})
    relay = Relay(baton=jnp.zeros(()), kept=kept)
    x, (y,) = mode.norm(x, None, w["ln_1"], cfg.norm_eps)
    q, k, v, relay = project_qkv(y, w["attn"], low_attn, angles, logn, relay, mode)
    with jax.named_scope("attention"):
        y, kept = attend(q, k, v, relay.kept)
    y, relay = project_out(y, w["attn"], low_attn, relay.replace(kept=kept), mode)
    x, ys = mode.norm(x, y, w["ln_2"], cfg.norm_eps, readers=2, kept=relay.kept)
    y, relay = mlp_block(ys, w["mlp"], low_mlp, relay, mode)
    return mode.add(x, y), relay.kept


def _layer(cfg, weights_of, mode, x, index, low, frozen, kept):
    """A layer without a cache, as layer_loop runs it."""
    layers, angles, logn, slots, segments = frozen
    w = weights_of(layers, index)
    rule = {"q_index": slots, "segments": segments, "causal_square": True}
    attend = functools.partial(mode.attend, **rule)
    return decoder_layer(cfg, x, w, low, angles, logn, attend, kept, mode)


def hidden_states(
    cfg: ModelConfig,
    params: Params,
    lora: Lora | None,
    tokens: jax.Array,  # int32 [B, T]
    *,
    positions: jax.Array | None = None,  # int32 [B, T]; default from 0 in each row, or segment
    segments: jax.Array | None = None,  # int32 [B, T]: packed sequences do not see each other
    lengths: jax.Array | None = None,  # int32 [B]: inference with dynamic NTK and logn
    embedded: jax.Array | None = None,  # [B, T, D]: the embedding, if it was looked up already
    remat: Remat | None = None,  # what the backward pass keeps; None: no gradient is wanted
    compute: str = "bf16",  # "fp8": products with frozen weights in e4m3
    mesh: Mesh | None = None,
) -> jax.Array:  # [B, T, D], after the final norm
    """The decoder without a cache: training, or (given prompt `lengths`) scoring.

    Training sees neither dynamic NTK nor logn, as in the original; `lengths` switches them on.
    Only `lora` and `embedded` get gradients: those of the layers' params are zeros, all of them.
    """
    B, T = tokens.shape
    slots = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    if positions is None:
        positions = slots if segments is None else positions_within(segments)
    ntk = jnp.zeros((B,), jnp.int32) if lengths is None else ntk_row(cfg, lengths)
    angles = rope_angles(cfg, positions, ntk)
    logn = logn_scale(cfg, positions) if cfg.use_logn_attn and lengths is not None else None
    x = embed(params, tokens, mesh) if embedded is None else embedded
    pairs = joined_pairs(cfg, lora_layers(lora, x.dtype), mesh)
    layers = params["layers"]
    if compute == "fp8":  # two passes of every layer would look for them
        layers = jax.tree.map(
            lambda w: with_bounds(w) if is_quantized(w) else w, layers, is_leaf=is_quantized
        )
    others = (angles, logn, slots, segments)
    for start, stop, level in [(0, cfg.num_layers, "full")] if remat is None else remat.ranges():
        low = jax.tree.map(lambda x, run=slice(start, stop): x[run], pairs)
        by_hand = remat is not None and level != "none"
        share = share_of(cfg, layers, others, low, mesh) if by_hand else None
        weights_of = functools.partial(joined_layer if share else whole_layer, cfg, mesh=mesh)
        run = Run(
            layer=functools.partial(_layer, cfg, weights_of), start=start, stop=stop, level=level,
            compute=compute, share=share, alone=mesh is None or mesh.size == 1,
            lean=remat is not None and remat.lean,
        )  # fmt: skip
        x = run_layers(run, x, low, (layers, *others))
    return rms_norm(x, params["ln_f"], cfg.norm_eps)


def forward(
    cfg: ModelConfig,
    params: Params,
    pairs: Params | None,  # LoRA as `lora_layers` gives it: made once, not for every token
    tokens: jax.Array,  # int32 [B, T], right-padded
    cache: KVCache,
    *,
    counts: jax.Array | None = None,  # int32 [B]: how many of the T tokens are real; default T
    prompt_lengths: jax.Array | None = None,  # int32 [B]: if the prompt comes in parts; see below
    fresh: bool = False,  # promises an empty cache: attention then needs no look into it
    mesh: Mesh | None = None,
) -> tuple[jax.Array, KVCache]:  # hidden [B, T, D] after the final norm, cache with the T tokens
    """Runs T new tokens of each row after what its cache holds: prefill (T long) or decode (T = 1).

    The NTK row of a sequence is fixed when its first tokens go in, from the length of its whole
    prompt (by default `counts`), and kept.
    """
    B, T = tokens.shape
    counts = jnp.full((B,), T, jnp.int32) if counts is None else counts
    prompt_lengths = counts if prompt_lengths is None else prompt_lengths
    place = Place.of(cfg, cache.lengths, T, prompt_lengths, cache.ntk)
    heads = None
    if mesh is not None:
        heads = partition_spec(("batch", None, "heads", None), (B, T, *cache.k.shape[3:]), mesh)

    mode = Plain(kernels=mesh is None or mesh.size == 1)

    def layer(carry, per_layer):
        # The cache rides in the carry: as scan inputs and outputs XLA would keep two of it.
        x, cache = carry
        index, low, unit = per_layer
        w = whole_layer(cfg, params["layers"], index, mesh)

        def attend(q, k, v, cache):
            if unit is not None:
                q, k = q * unit, k / unit
            written = write(cache, index, k, v)
            if fresh:
                return attention(q, k, v, q_index=place.positions, causal_square=True), written
            # cuDNN wants one layout for all three; the cache has its own.
            q, k_all, v_all = (
                constrain(x, mesh, heads) for x in (q, *read(written, index, q.dtype))
            )
            return attention(q, k_all, v_all, q_index=place.positions), written

        return decoder_layer(cfg, x, w, low, place.angles, place.logn, attend, cache, mode), None

    x = embed(params, tokens, mesh)
    bias = params["layers"]["attn"]["bqkv"]  # [L, 3, N, H]
    units = None if cache.k_scale is None else key_units(bias[:, 1])
    per_layer = (jnp.arange(cfg.num_layers), pairs or {}, units)
    (x, cache), _ = jax.lax.scan(layer, (x, cache), per_layer)
    cache = cache.replace(lengths=cache.lengths + counts, ntk=place.ntk)
    return rms_norm(x, params["ln_f"], cfg.norm_eps), cache


@functools.partial(jax.jit, static_argnames=("cfg", "mesh"))
def logits(
    cfg: ModelConfig,
    params: Params,
    lora: Lora | None,
    tokens: jax.Array,  # int32 [B, T]
    lengths: jax.Array | None = None,  # int32 [B]; default T
    *,
    mesh: Mesh | None = None,
) -> jax.Array:  # float32 [B, T, V]
    """All logits of whole sequences at inference (dynamic NTK and logn on)."""
    B, T = tokens.shape
    lengths = jnp.full((B,), T, jnp.int32) if lengths is None else lengths
    hidden = hidden_states(cfg, params, lora, tokens, lengths=lengths, mesh=mesh)
    return unembed(params, hidden)
