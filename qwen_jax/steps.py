"""The device programs of generation: prefill, decode, growing the cache.

    prefill   prompts -> cache and each row's first token, in chunks if they are long
    decode    BLOCK tokens a row in one dispatch, fewer if every row is done
    draft     the same, but each step tries several tokens looked up in the text (drafts.py)

All are jitted with the cache donated. Which decoder runs follows from the weights: packed ones have
their own. They know no prompts and no lists, only arrays of rows.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from qwen_jax.cache import KVCache, abstract_cache
from qwen_jax.config import ModelConfig
from qwen_jax.drafts import Text, accept, judge, look_up, remember
from qwen_jax.model import Params
from qwen_jax.packed import unembed
from qwen_jax.prefill import fill, forward
from qwen_jax.sampling import (
    RowParams,
    mask_padded_vocab,
    sample,
    seen_in_prompt,
    step_keys,
    update_seen,
)
from qwen_jax.sharding import constrain

# Tokens a row that one dispatch decodes: enough to hide the host, few enough to stream smoothly.
BLOCK = 8
# Stands in a block where a row has no more tokens.
NOTHING = -1


@struct.dataclass
class DecodeState:
    """What goes from one dispatch to the next."""

    cache: KVCache
    token: jax.Array  # int32 [B]: chosen, not yet in the cache
    seen: jax.Array  # bool [B, V]: tokens of prompt and answer
    steps: jax.Array  # int32 [B]: tokens chosen so far
    done: jax.Array  # bool [B]


@struct.dataclass
class Requests:
    """What stays the same for all tokens of a batch."""

    rows: RowParams
    keys: jax.Array  # [B] typed keys
    limits: jax.Array  # int32 [B]: tokens wanted; 0 for a row that only fills the batch
    stops: jax.Array  # int32 [number of stop ids]


def pin(cfg: ModelConfig, mesh: Mesh | None, state: DecodeState) -> DecodeState:
    """Fixes the layouts between dispatches: a layout that changed would compile a second time."""
    if mesh is None or mesh.size == 1:
        return state
    _, B, S, _, _ = state.cache.k.shape
    abstract = abstract_cache(cfg, B, S, state.cache.k.dtype, mesh)
    layouts = jax.tree.map(lambda x: x.sharding, abstract)
    cache = jax.lax.with_sharding_constraint(state.cache, layouts)
    rest = jax.tree.map(
        lambda x: constrain(x, mesh, PartitionSpec()),
        (state.token, state.seen, state.steps, state.done),
    )
    return DecodeState(cache, *rest)


def _choose(
    params: Params,
    mesh: Mesh | None,
    n_vocab: int,
    requests: Requests,
    hidden: jax.Array,  # [B, D]
    cache: KVCache,
    seen: jax.Array,  # bool [B, V]
    steps: jax.Array,  # int32 [B]
    done: jax.Array,  # bool [B]
) -> tuple[DecodeState, jax.Array]:
    """Draws the next token of each row; second: the tokens to hand out, int32 [B]."""
    # Joined before sampling: sorts and random bits of a split vocabulary cost more than 0.6 MB a
    # row, and every device must draw the same token.
    logits = constrain(unembed(params, hidden, mesh), mesh, PartitionSpec())
    logits = mask_padded_vocab(logits, n_vocab)
    token = sample(logits, seen, requests.rows, step_keys(requests.keys, steps))
    stopped = jnp.any(token[:, None] == requests.stops, axis=1)
    out = jnp.where(done | stopped, NOTHING, token)
    steps = steps + 1
    state = DecodeState(
        cache=cache,
        token=token,
        seen=update_seen(seen, token),
        steps=steps,
        done=done | stopped | (steps >= requests.limits),
    )
    return state, out


@functools.partial(
    jax.jit, static_argnums=(0, 1, 2), static_argnames="chunk", donate_argnames="cache"
)
def prefill(
    cfg: ModelConfig,
    mesh: Mesh | None,
    n_vocab: int,
    params: Params,
    pairs: Params,  # model.lora_layers
    requests: Requests,
    cache: KVCache,
    tokens: jax.Array,  # int32 [B, T], right-padded
    counts: jax.Array,  # int32 [B], at least 1
    *,
    chunk: int,  # tokens of a row that run at once
) -> tuple[DecodeState, jax.Array, jax.Array]:  # the first tokens, int32 [B, 1]; done, bool [B]
    B, T = tokens.shape
    last, cache = fill(cfg, mesh, params, pairs, cache, tokens, counts, chunk)
    seen = seen_in_prompt(tokens, jnp.arange(T) < counts[:, None], cfg.vocab_size)
    steps, done = jnp.zeros((B,), jnp.int32), requests.limits == 0
    state, out = _choose(params, mesh, n_vocab, requests, last, cache, seen, steps, done)
    return pin(cfg, mesh, state), out[:, None], state.done


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnames="state")
def decode(
    cfg: ModelConfig,
    mesh: Mesh | None,
    n_vocab: int,
    params: Params,
    pairs: Params,  # model.lora_layers
    requests: Requests,
    state: DecodeState,
) -> tuple[DecodeState, jax.Array, jax.Array]:  # the next tokens, int32 [B, BLOCK]; done, bool [B]
    def step(carry):
        index, state, block = carry
        # A row that is done stays where it is: its one slot is overwritten, its cache never fills.
        counts = 1 - state.done.astype(jnp.int32)
        hidden, cache = forward(
            cfg, mesh, params, pairs, state.token[:, None], state.cache, counts, fresh=False
        )
        state, out = _choose(
            params, mesh, n_vocab, requests,
            hidden[:, 0], cache, state.seen, state.steps, state.done,
        )  # fmt: skip
        return index + 1, pin(cfg, mesh, state), block.at[:, index].set(out)

    def goes_on(carry):
        index, state, _ = carry
        return (index < BLOCK) & ~jnp.all(state.done)

    block = jnp.full((state.done.shape[0], BLOCK), NOTHING, jnp.int32)
    _, state, block = jax.lax.while_loop(goes_on, step, (jnp.int32(0), state, block))
    return state, block, state.done


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def grow(cfg: ModelConfig, mesh: Mesh | None, cache: KVCache, capacity: int) -> KVCache:
    """The same cache with room for `capacity` tokens."""
    more = capacity - cache.capacity

    def grow(stack: jax.Array) -> jax.Array:
        return jnp.pad(stack, [(0, more if axis == 2 else 0) for axis in range(stack.ndim)])

    scales = (cache.k_scale, cache.v_scale)
    k_scale, v_scale = (None if scale is None else grow(scale) for scale in scales)
    cache = cache.replace(k=grow(cache.k), v=grow(cache.v), k_scale=k_scale, v_scale=v_scale)
    if mesh is None or mesh.size == 1:
        return cache
    abstract = abstract_cache(cfg, cache.k.shape[1], capacity, cache.k.dtype, mesh)
    return jax.lax.with_sharding_constraint(cache, jax.tree.map(lambda x: x.sharding, abstract))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnames=("state", "text"))
def draft(
    cfg: ModelConfig,
    mesh: Mesh | None,
    n_vocab: int,
    count: int,  # tokens of a draft
    params: Params,
    pairs: Params,  # model.lora_layers
    requests: Requests,
    state: DecodeState,
    text: Text,  # prompt and answer, state.token among them
) -> tuple[DecodeState, Text, jax.Array, jax.Array]:
    """`decode` with drafts. Returns state, text, the next tokens int32 [B, BLOCK * (count + 1)]
    with NOTHING between them, and done, bool [B].

    Where no row finds a draft a step is that of `decode`, so that text without repetition pays
    nothing for the chance.
    """
    B = state.done.shape[0]
    fixed = (cfg, mesh, n_vocab, params, pairs, requests)

    def step(carry):
        index, state, text, block = carry
        drafts, found = look_up(text, state.cache.lengths + 1, count)
        found &= ~state.done

        def several(carry):
            return _advance(*fixed, *carry[:2], drafts, found)

        def single(carry):
            new, longer, out = _advance(*fixed, *carry[:2], drafts[:, :0], found)
            return new, longer, jnp.pad(out, [(0, 0), (0, count)], constant_values=NOTHING)

        tried = jnp.any(found)
        made = (state, text, jnp.full((B, count + 1), NOTHING, jnp.int32))
        state, text, out = _when(~tried, single, _when(tried, several, made))
        return index + 1, state, text, block.at[:, index].set(out)

    def goes_on(carry):
        return (carry[0] < BLOCK) & ~jnp.all(carry[1].done)

    block = jnp.full((B, BLOCK, count + 1), NOTHING, jnp.int32)
    start = (jnp.int32(0), state, text, block)
    _, state, text, block = jax.lax.while_loop(goes_on, step, start)
    return state, text, block.reshape(B, -1), state.done


def _when(wanted: jax.Array, advance, carry):
    """advance(carry) if wanted: a loop of one turn or none, where a branch would copy the cache."""
    once = jax.lax.while_loop(
        lambda c: c[0], lambda c: (jnp.zeros((), bool), advance(c[1])), (wanted, carry)
    )
    return once[1]


def _advance(
    cfg: ModelConfig,
    mesh: Mesh | None,
    n_vocab: int,
    params: Params,
    pairs: Params,  # model.lora_layers
    requests: Requests,
    state: DecodeState,
    text: Text,
    drafts: jax.Array,  # int32 [B, K]
    found: jax.Array,  # bool [B]
) -> tuple[DecodeState, Text, jax.Array]:  # and the tokens to hand out, int32 [B, K + 1]
    """One pass over a row's last token and its draft."""
    B, K = drafts.shape
    index = jnp.arange(K + 1)
    filled = state.cache.lengths
    tokens = jnp.concatenate([state.token[:, None], drafts], axis=1)
    counts = jnp.where(state.done, 0, K + 1)
    hidden, cache = forward(cfg, mesh, params, pairs, tokens, state.cache, counts, fresh=False)
    logits = constrain(unembed(params, hidden, mesh), mesh, PartitionSpec())
    logits = mask_padded_vocab(logits.reshape(B * (K + 1), -1), n_vocab)
    # Position i draws as if the draft before it had been drawn: the penalty knows those tokens.
    seen = [state.seen]
    for i in range(K):
        seen.append(update_seen(seen[-1], drafts[:, i]))
    rows, keys = jax.tree.map(
        lambda x: jnp.repeat(x, K + 1, axis=0), (requests.rows, requests.keys)
    )
    keys = step_keys(keys, (state.steps[:, None] + index).reshape(-1))
    seen = jnp.stack(seen, axis=1).reshape(logits.shape)
    drawn = sample(logits, seen, rows, keys).reshape(B, K + 1)

    stopped = jnp.any(drawn[:, :, None] == requests.stops, axis=2)
    ends = stopped | (state.steps[:, None] + index + 1 >= requests.limits[:, None])
    until_end = jnp.where(jnp.any(ends, axis=1), jnp.argmax(ends, axis=1) + 1, K + 1)
    held = jnp.minimum(accept(drawn, drafts, found), until_end.astype(jnp.int32))
    held = jnp.where(state.done, 0, held)
    holds = index < held[:, None]
    row = jnp.arange(B)
    new = DecodeState(
        cache=cache.replace(lengths=filled + held),
        token=jnp.where(state.done, state.token, drawn[row, jnp.maximum(held - 1, 0)]),
        seen=state.seen.at[row[:, None], jnp.where(holds, drawn, cfg.vocab_size)].set(
            True, mode="drop"
        ),
        steps=state.steps + held,
        done=state.done | jnp.any(ends & holds, axis=1),
    )
    out = jnp.where(holds & ~stopped, drawn, NOTHING)
    text = judge(remember(text, filled + 1, drawn, held), found, held)
    return pin(cfg, mesh, new), text, out
