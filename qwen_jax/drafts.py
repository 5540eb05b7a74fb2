"""Prompt-lookup drafts: guesses of the next tokens, found in the text so far (Saxena 2023).

The last three tokens are looked for earlier in the text; what followed them there is the draft. One
pass of the model then checks it: each position draws its own token, with the key of its own step,
as it would have without a draft, and the draft counts as far as the drawn tokens agree with it. The
answer is therefore that of decoding token by token, for greedy and for drawn tokens alike; a wrong
draft costs time only. Pure functions on arrays; they know no model.
"""

import jax
import jax.numpy as jnp

NGRAM = 3  # shorter ones match too often where nothing repeats


def look_up(
    history: jax.Array,  # int32 [B, S]: tokens of prompt and answer
    known: jax.Array,  # int32 [B]: how many of them there are
    count: int,
) -> tuple[jax.Array, jax.Array]:  # drafts int32 [B, count]; found bool [B]
    """What followed the last place where the text was as at its end.

    A place with `count` tokens after it goes before a later one with fewer.
    """
    S = history.shape[1]
    place = jnp.arange(S)
    same = (place >= NGRAM - 1) & (place < known[:, None] - 1)
    for back in range(NGRAM):
        last = jnp.take_along_axis(history, jnp.maximum(known - 1 - back, 0)[:, None], axis=1)
        same &= jnp.roll(history, back, axis=1) == last
    whole = place + count < known[:, None]
    best = jnp.max(jnp.where(same, place + S * whole, -1), axis=1)
    follow = best[:, None] % S + 1 + jnp.arange(count)
    drafts = jnp.take_along_axis(history, jnp.clip(follow, 0, S - 1), axis=1)
    return drafts, (best >= 0) & (known > NGRAM)


def accept(
    drawn: jax.Array,  # int32 [B, K + 1]: what each position drew
    drafts: jax.Array,  # int32 [B, K]: what followed position i if it drew drafts[i]
    found: jax.Array,  # bool [B]
) -> jax.Array:  # int32 [B], 1..K + 1
    """How many drawn tokens hold: those that agree with the draft, and the first that does not."""
    agree = (drawn[:, :-1] == drafts) & found[:, None]
    return 1 + jnp.sum(jnp.cumprod(agree, axis=1), axis=1, dtype=jnp.int32)


def remember(
    history: jax.Array,  # int32 [B, S]
    at: jax.Array,  # int32 [B]
    tokens: jax.Array,  # int32 [B, T]
    count: jax.Array,  # int32 [B]: how many of them are real
) -> jax.Array:
    """Writes tokens from `at` on; what does not fit is dropped."""
    B, S = history.shape
    index = jnp.arange(tokens.shape[1])
    slots = jnp.where(index < count[:, None], at[:, None] + index, S)
    return history.at[jnp.arange(B)[:, None], slots].set(tokens, mode="drop")
