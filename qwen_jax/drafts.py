"""Prompt-lookup drafts: guesses of the next tokens, found in the text so far (Saxena 2023).

The last three tokens are looked for earlier in the text; what followed them there is the draft. One
pass of the model then checks it: each position draws its own token, with the key of its own step,
as it would have without a draft, and the draft counts as far as the drawn tokens agree with it. The
answer is therefore that of decoding token by token, for greedy and for drawn tokens alike. (But for
rounding: in bfloat16 a pass over several tokens may decide a close call otherwise.) A wrong draft
costs time only, and after wrong drafts a row waits before it tries again, twice as long each time.
Pure functions on arrays; they know no model.
"""

import jax
import jax.numpy as jnp
from flax import struct

NGRAM = 3  # shorter ones match too often where nothing repeats
# Steps without a draft after many wrong ones: a pass over eight tokens may cost a quarter more than
# one over one token, and this makes of it one percent.
_LONGEST_WAIT = 32


@struct.dataclass
class Text:
    """What drafts are looked up in, and how they have fared."""

    tokens: jax.Array  # int32 [B, S]: prompt and answer
    wait: jax.Array  # int32 [B]: steps until the next draft is tried
    penalty: jax.Array  # int32 [B]: steps to wait after the next wrong draft

    @classmethod
    def of(cls, tokens: jax.Array) -> "Text":
        zeros = jnp.zeros(tokens.shape[:1], jnp.int32)
        return cls(tokens=tokens, wait=zeros, penalty=zeros + 1)


def judge(
    text: Text,
    tried: jax.Array,  # bool [B]: a draft was checked in this step
    held: jax.Array,  # int32 [B]: tokens that it brought, the one that any step brings included
) -> Text:
    """Sets the waiting after a step."""
    wrong = tried & (held == 1)
    penalty = jnp.where(wrong, jnp.minimum(2 * text.penalty, _LONGEST_WAIT), text.penalty)
    return text.replace(
        wait=jnp.where(wrong, text.penalty, jnp.maximum(text.wait - 1, 0)),
        penalty=jnp.where(tried & ~wrong, 1, penalty),
    )


def look_up(
    text: Text,
    known: jax.Array,  # int32 [B]: how many of them there are
    count: int,
) -> tuple[jax.Array, jax.Array]:  # drafts int32 [B, count]; found bool [B]
    """What followed the last place where the text was as at its end.

    A place with `count` tokens after it goes before a later one with fewer.
    """
    history, S = text.tokens, text.tokens.shape[1]
    place = jnp.arange(S)
    same = (place >= NGRAM - 1) & (place < known[:, None] - 1)
    for back in range(NGRAM):
        last = jnp.take_along_axis(history, jnp.maximum(known - 1 - back, 0)[:, None], axis=1)
        same &= jnp.roll(history, back, axis=1) == last
    whole = place + count < known[:, None]
    best = jnp.max(jnp.where(same, place + S * whole, -1), axis=1)
    follow = best[:, None] % S + 1 + jnp.arange(count)
    drafts = jnp.take_along_axis(history, jnp.clip(follow, 0, S - 1), axis=1)
    return drafts, (best >= 0) & (known > NGRAM) & (text.wait == 0)


def accept(
    drawn: jax.Array,  # int32 [B, K + 1]: what each position drew
    drafts: jax.Array,  # int32 [B, K]: what followed position i if it drew drafts[i]
    found: jax.Array,  # bool [B]
) -> jax.Array:  # int32 [B], 1..K + 1
    """How many drawn tokens hold: those that agree with the draft, and the first that does not."""
    agree = (drawn[:, :-1] == drafts) & found[:, None]
    return 1 + jnp.sum(jnp.cumprod(agree, axis=1), axis=1, dtype=jnp.int32)


def remember(
    text: Text,
    at: jax.Array,  # int32 [B]
    tokens: jax.Array,  # int32 [B, T]
    count: jax.Array,  # int32 [B]: how many of them are real
) -> Text:
    """Writes tokens from `at` on; what does not fit is dropped."""
    B, S = text.tokens.shape
    index = jnp.arange(tokens.shape[1])
    slots = jnp.where(index < count[:, None], at[:, None] + index, S)
    rows = jnp.arange(B)[:, None]
    return text.replace(tokens=text.tokens.at[rows, slots].set(tokens, mode="drop"))
