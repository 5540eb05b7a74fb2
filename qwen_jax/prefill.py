"""Prompts into the cache, in chunks if they are long; and which decoder runs them.

What a chunk needs in memory grows with the chunk, not with the prompt: activations of its own
tokens, and attention without scores (kernels/attention.py). It knows no sampling and no requests.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen_jax import model, packed
from qwen_jax.cache import KVCache
from qwen_jax.config import ModelConfig
from qwen_jax.model import Params


def forward(
    cfg: ModelConfig,
    mesh: Mesh | None,
    params: Params,
    pairs: Params | None,  # model.lora_layers
    tokens: jax.Array,  # int32 [B, T]
    cache: KVCache,
    counts: jax.Array,  # int32 [B]: how many of the T tokens are real
    *,
    fresh: bool,
    prompt_lengths: jax.Array | None = None,  # int32 [B]: if the prompt comes in parts
) -> tuple[jax.Array, KVCache]:  # hidden [B, T, D], longer cache
    """The decoder for these weights: packed ones have their own."""
    how = {"counts": counts, "prompt_lengths": prompt_lengths, "fresh": fresh, "mesh": mesh}
    if packed.is_packed(params):
        return packed.forward(cfg, params, tokens, cache, **how)
    return model.forward(cfg, params, pairs, tokens, cache, **how)


def fill(
    cfg: ModelConfig,
    mesh: Mesh | None,
    params: Params,
    pairs: Params,  # model.lora_layers
    cache: KVCache,
    tokens: jax.Array,  # int32 [B, T]
    counts: jax.Array,  # int32 [B], at least 1
    chunk: int,  # tokens of a row that run at once
) -> tuple[jax.Array, KVCache]:  # the last hidden state of each row [B, D]: only it meets the head
    """Runs prompts into an empty cache.

    The first chunk knows that it is empty, the others look into it; as many of them run as the
    longest prompt has.
    """
    B, T = tokens.shape
    run = functools.partial(forward, cfg, mesh, params, pairs)
    if chunk >= T:
        hidden, cache = run(tokens, cache, counts, fresh=True)
        return hidden[jnp.arange(B), counts - 1], cache
    tokens = jnp.pad(tokens, [(0, 0), (0, -T % chunk)])

    def part(index, last, cache, fresh):
        start = index * chunk
        here = jnp.clip(counts - start, 0, chunk)
        ids = jax.lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
        hidden, cache = run(ids, cache, here, prompt_lengths=counts, fresh=fresh)
        new = hidden[jnp.arange(B), jnp.maximum(here, 1) - 1]
        last = new if last is None else jnp.where((here > 0)[:, None], new, last)
        return last, cache

    def goes_on(carry):
        return carry[0] * chunk < jnp.max(counts)

    def later(carry):
        index, last, cache = carry
        return index + 1, *part(index, last, cache, fresh=False)

    first = part(jnp.int32(0), None, cache, fresh=True)
    _, last, cache = jax.lax.while_loop(goes_on, later, (jnp.int32(1), *first))
    return last, cache
