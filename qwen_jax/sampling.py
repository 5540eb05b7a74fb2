"""From logits to the next token: repetition penalty, temperature, top-k, top-p, the draw.

The order and the results are those of Hugging Face's logits processors (transformers,
generation/logits_process.py), so the settings of a published generation_config.json mean the same
here. (Among equal scores at the edge of top-p the highest ids stay, as with a stable torch.sort;
theirs is unstable on some CPUs.) Every setting is an array over rows: requests with different
settings share one compiled program. It knows no model, no tokenizer and no cache.

    SamplingParams, one a request      what a user asks for, checked
      row_params -> RowParams [B]      the same as arrays
      row_keys   -> keys [B]           one random stream a row; step_keys gives that of a step

What of a row survives is a suffix of its tokens in ascending (score, id) order, so a filter is one
cut per row: the score and id of its smallest survivor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.errors import InputError

# Kind, least and greatest value. Temperature and penalty stay far from where float32 scores would
# overflow; a seed is 32 bits because jax.random.key drops the rest (2**32 would repeat seed 0).
_LIMITS: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 1e-6, 1e6),
    "top_k": (int, 0, 2**31 - 1),
    "top_p": (float, 0.0, 1.0),
    "repetition_penalty": (float, 1e-6, 1e6),
    "max_new_tokens": (int, 1, 2**31 - 1),
    "seed": (int, 0, 2**32 - 1),
}

# Bits of a score that one pass of the search for a cut settles: 2**4 - 1 thresholds a pass.
_DIGIT = 4
# Float32 sums of probabilities may be this far off, relatively. A cut that lies nearer to the edge
# of a token is left to the sort, unless the token is so unlikely that it does not matter.
_SUM_ERROR = 2e-6
_UNLIKELY = 1e-4


def check_setting(name: str, value: Any) -> None:
    """Raises InputError unless `value` has the type and range of the SamplingParams field."""
    if name == "greedy":
        if not isinstance(value, bool):
            raise InputError(f"greedy is {value!r}; expected true or false")
        return
    kind, low, high = _LIMITS[name]
    # A whole number may stand for a float; a bool is neither. NaN fails the comparison.
    good_type = isinstance(value, int if kind is int else int | float)
    if isinstance(value, bool) or not good_type or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        hint = "; for the likeliest token every time use greedy"
        raise InputError(
            f"{name} is {value!r}; expected {what} from {low:g} to {high:.10g}"
            + (hint if name == "temperature" and value == 0 else "")
        )


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is to be continued; top_k 0, top_p 1 and repetition_penalty 1 mean off."""

    greedy: bool = False  # the likeliest token after the repetition penalty; the rest is ignored
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0  # over 1 discourages every token of prompt and answer
    max_new_tokens: int = 512
    seed: int = 0

    def __post_init__(self):
        for name in ("greedy", *_LIMITS):
            check_setting(name, getattr(self, name))


class RowParams(NamedTuple):
    """The settings of B rows as arrays; a pytree, traced by jit."""

    greedy: jax.Array  # [B] bool
    temperature: jax.Array  # [B] float32
    top_k: jax.Array  # [B] int32, 0 is off
    tail: jax.Array  # [B] float32, 1 - top_p: the probability that top-p removes, 0 is off
    repetition_penalty: jax.Array  # [B] float32


def row_params(params: Sequence[SamplingParams]) -> RowParams:
    """Stacks the settings of B requests."""
    return RowParams(
        greedy=jnp.array([p.greedy for p in params], bool),
        temperature=jnp.array([p.temperature for p in params], jnp.float32),
        # A greedy row must not send its neighbours to the full sort for filters it ignores.
        top_k=jnp.array([0 if p.greedy else p.top_k for p in params], jnp.int32),
        # Subtracted in float64: in float32, 1 - 0.8 falls short of 0.2, and of five equally likely
        # tokens Hugging Face drops one where we would keep all.
        tail=jnp.array([0.0 if p.greedy else 1.0 - p.top_p for p in params], jnp.float32),
        repetition_penalty=jnp.array([p.repetition_penalty for p in params], jnp.float32),
    )


def row_keys(params: Sequence[SamplingParams]) -> jax.Array:
    """One random key a row [B], from its own seed alone."""
    seeds = jnp.array([p.seed for p in params], jnp.uint32)
    # Named, so that the same seed gives the same text whatever JAX's default generator is.
    return jax.vmap(lambda seed: jax.random.key(seed, impl="threefry2x32"))(seeds)


def step_keys(
    keys: jax.Array,  # [B] typed keys
    steps: jax.Array,  # [B] tokens generated so far in each row
) -> jax.Array:
    """The keys [B] of one step; they depend on each row's own progress, not on its batch's."""
    return jax.vmap(jax.random.fold_in)(keys, steps)


def mask_padded_vocab(
    logits: jax.Array,  # [B, V]
    n_vocab: int,
) -> jax.Array:
    """Sets ids from `n_vocab` on to -inf: rows of the embedding that no token stands for."""
    return jnp.where(jnp.arange(logits.shape[-1]) < n_vocab, logits, -jnp.inf)


def seen_in_prompt(
    ids: jax.Array,  # [B, T]
    valid: jax.Array,  # [B, T] bool, False on padding
    vocab_size: int,
) -> jax.Array:
    """Marks the tokens of each row's prompt: bool [B, V]."""
    rows = jnp.arange(ids.shape[0])[:, None]
    seen = jnp.zeros((ids.shape[0], vocab_size), bool)
    return seen.at[rows, jnp.where(valid, ids, vocab_size)].set(True, mode="drop")


def update_seen(
    seen: jax.Array,  # [B, V] bool
    ids: jax.Array,  # [B]
) -> jax.Array:
    """Marks one more token a row."""
    return seen.at[jnp.arange(seen.shape[0]), ids].set(True)


def penalize_repetition(
    logits: jax.Array,  # [B, V]
    seen: jax.Array,  # [B, V] bool
    penalty: jax.Array,  # [B]
) -> jax.Array:
    """Lowers the score of every seen token, once however often it was seen."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def process_logits(
    logits: jax.Array,  # [B, V] float32
    seen: jax.Array,  # [B, V] bool
    rows: RowParams,
    *,
    sort: bool = False,
) -> jax.Array:
    """Scores [B, V] to sample from, -inf where a token is ruled out; `rows.greedy` is not read.

    `sort` makes every row take the specification's way, a sort of its whole vocabulary.
    """
    if logits.dtype != jnp.float32 or logits.shape != seen.shape:
        raise ValueError(
            f"logits are {logits.dtype}{logits.shape} and seen {seen.shape}; "
            "expected float32 [B, V] and bool [B, V]"
        )
    scores = penalize_repetition(logits, seen, rows.repetition_penalty)
    return _warp(scores, rows, sort)


def sample(
    logits: jax.Array,  # [B, V] float32
    seen: jax.Array,  # [B, V] bool
    rows: RowParams,
    keys: jax.Array,  # [B] typed keys, those of this step (see `step_keys`)
    *,
    sort: bool = False,
) -> jax.Array:
    """The next token of each row, int32 [B].

    A greedy row takes its likeliest token after the repetition penalty, as Hugging Face's greedy
    search does; any other is drawn with the row's own key, whatever rows stand beside it.
    """
    with jax.named_scope("sample"):
        scores = penalize_repetition(logits, seen, rows.repetition_penalty)
        best = jnp.argmax(scores, axis=-1).astype(jnp.int32)

        def draw() -> jax.Array:
            drawn = jax.vmap(jax.random.categorical)(keys, _warp(scores, rows, sort))
            return jnp.where(rows.greedy, best, drawn.astype(jnp.int32))

        return lax.cond(jnp.all(rows.greedy), lambda: best, draw)


def _warp(
    scores: jax.Array,  # [B, V] float32, repetition penalty applied
    rows: RowParams,
    sort: bool,
) -> jax.Array:
    """Temperature, then top-k, then top-p."""
    scores = scores / rows.temperature[:, None]
    value, token = (x[:, None] for x in _cut(scores, rows.top_k, rows.tail, sort))
    ids = jnp.arange(scores.shape[-1])
    keep = (scores > value) | ((scores == value) & (ids >= token))
    return jnp.where(keep, scores, -jnp.inf)


def _cut(
    scores: jax.Array,  # [B, V]
    top_k: jax.Array,  # [B], 0 is off
    tail: jax.Array,  # [B], 0 is off
    sort: bool,
) -> tuple[jax.Array, jax.Array]:
    """Score [B] and id [B] of each row's smallest survivor of top-k and top-p.

    A search over score values settles nearly every row; sorting 152,064 scores takes milliseconds
    on a GPU. If a row stays open all are sorted, but settled rows keep what they have, so no row's
    result depends on another's.
    """
    V = scores.shape[1]
    top_k = jnp.where((top_k <= 0) | (top_k >= V), V, top_k)
    if sort:
        return _cut_of_all(scores, top_k, tail)
    value, token, settled = _cut_by_search(scores, top_k, tail)
    full = lax.cond(
        jnp.all(settled), lambda: (value, token), lambda: _cut_of_all(scores, top_k, tail)
    )
    return jnp.where(settled, value, full[0]), jnp.where(settled, token, full[1])


def _cut_of_all(
    scores: jax.Array,  # [B, V]
    top_k: jax.Array,  # [B], V is off
    tail: jax.Array,  # [B]
) -> tuple[jax.Array, jax.Array]:
    """The specification: sorts every row, as Hugging Face does."""
    ids = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    values, ids = lax.sort((scores, ids), num_keys=1, is_stable=True)
    first = _first_kept(values, jnp.exp(values - values[:, -1:]), top_k, tail)
    return _at(values, first), _at(ids, first)


def _cut_by_search(
    scores: jax.Array,  # [B, V]
    top_k: jax.Array,  # [B], V is off
    tail: jax.Array,  # [B]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same cut from counts and sums over thresholds, and whether it holds: bool [B].

    It does not hold where several tokens have the score of the cut and some of them must go, or
    where the sums come so near to `tail` that their rounding could decide.
    """
    order = _ordered_bits(scores)
    most = jnp.max(scores, axis=1)
    k_on, p_on = top_k < scores.shape[1], tail > 0

    # Both searches always: looking whether some row wants them would make a GPU wait for the host.
    kth = _largest(order, lambda low: jnp.sum(~low, axis=-1), lambda n: n >= top_k[:, None])
    floor = jnp.where(k_on, kth, 0)
    weights = jnp.where(order >= floor[:, None], jnp.exp(scores - most[:, None]), 0.0)
    total = jnp.sum(weights, axis=1)
    goal = tail * total

    def mass_below(low: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(low, weights[:, None], 0.0), axis=-1)

    smallest_kept = _largest(order, mass_below, lambda mass: mass <= goal[:, None])
    cut = jnp.where(p_on, jnp.maximum(smallest_kept, floor), floor)
    cut = jnp.minimum(cut, jnp.max(order, axis=1))
    at_cut = order == cut[:, None]
    alone = jnp.sum(at_cut, axis=1) == 1
    below = jnp.sum(jnp.where(order < cut[:, None], weights, 0.0), axis=1)
    here = jnp.sum(jnp.where(at_cut, weights, 0.0), axis=1)
    is_most = jnp.sum(order > cut[:, None], axis=1) == 0
    clear = (goal - below > _SUM_ERROR * goal) & (
        is_most | (below + here - goal > _SUM_ERROR * goal)
    )
    settled = ~p_on | (alone & (clear | (here < _UNLIKELY * total)))
    value = jnp.max(jnp.where(at_cut, scores, -jnp.inf), axis=1)
    value = jnp.where(k_on | p_on, value, -jnp.inf)
    token = jnp.where(p_on, jnp.argmax(at_cut, axis=1), 0)
    return value, token, settled


def _ordered_bits(x: jax.Array) -> jax.Array:
    """float32 -> uint32 in the same order."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    bits = jnp.where(
        bits == jnp.uint32(1 << 31), jnp.uint32(0), bits
    )  # -0 is 0; XLA drops an addition of zero
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest(order: jax.Array, measure, holds) -> jax.Array:  # uint32 [B, V] -> uint32 [B]
    """The largest t for which the condition holds, digit by digit; it must hold from 0 up to it.

    `measure` takes which elements lie below a threshold, bool [B, thresholds, V], and returns
    [B, thresholds]; `holds` makes of that a condition.
    """
    digits = jnp.arange(1, 2**_DIGIT, dtype=jnp.uint32)

    def one(i, found):
        shift = (32 - _DIGIT * (i + 1)).astype(jnp.uint32)
        thresholds = found[:, None] | (digits << shift)  # [B, thresholds]
        good = holds(measure(order[:, None] < thresholds[:, :, None]))
        return found | (jnp.sum(good, axis=1, dtype=jnp.uint32) << shift)

    return lax.fori_loop(0, 32 // _DIGIT, one, jnp.zeros_like(order[:, 0]))


def _first_kept(
    values: jax.Array,  # [B, C] scores, ascending
    weights: jax.Array,  # [B, C] exp(score - greatest score)
    top_k: jax.Array,  # [B]
    tail: jax.Array,  # [B]
) -> jax.Array:
    """Position [B] of the first token that top-k (ties kept) and then top-p leave."""
    inside = values >= _kth_largest(values, top_k)[:, None]
    weights = jnp.where(inside, weights, 0.0)
    mass = _running_sum(weights / weights.sum(axis=1, keepdims=True))
    kept = jnp.where(tail[:, None] > 0, mass > tail[:, None], inside)
    return jnp.argmax(kept.at[:, -1].set(True), axis=1)


def _kth_largest(values: jax.Array, k: jax.Array) -> jax.Array:  # [B, C] ascending, [B] -> [B]
    C = values.shape[1]
    return _at(values, C - jnp.clip(k, 1, C))


def _at(x: jax.Array, position: jax.Array) -> jax.Array:  # [B, C], [B] -> [B]
    return jnp.take_along_axis(x, position[:, None], axis=1)[:, 0]


def _running_sum(x: jax.Array) -> jax.Array:  # [B, C] -> [B, C]
    """Cumulative sums carried as a float32 and its rounding error, which stands for float64.

    PyTorch adds in float64 and rounds each sum; with plain float32 sums, four of ten equally likely
    tokens stay at top_p 0.3 where three should. The error-free sum: Knuth, TAOCP vol. 2, 4.2.2.
    Step i adds the sum that ends 2**i places before. With this loop `sample` compiles in 0.8 s;
    lax.associative_scan unrolls, and it took 3.3 s.
    """
    C = x.shape[1]

    def step(i, sums):
        b, b_error = sums
        reaches = jnp.arange(C) >= 2**i
        a, a_error = (jnp.where(reaches, jnp.roll(s, 2**i, axis=1), 0.0) for s in sums)
        total = a + b
        part = total - a
        error = (a - (total - part)) + (b - part) + (a_error + b_error)
        return total + error, error - ((total + error) - total)

    return lax.fori_loop(0, (C - 1).bit_length(), step, (x, jnp.zeros_like(x)))[0]
