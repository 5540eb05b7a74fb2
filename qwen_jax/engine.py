"""Generation: token ids in, token ids out, for a batch of prompts or as a stream of one.

    prompts -> right-padded to a bucket -> prefill (and each row's first token)
            -> decode, BLOCK tokens a dispatch, until every row is done -> ids

One dispatch runs ahead: the host reads a block while the device computes the next one, which stops
at once if it turns out that every row was done.

Prompt length, rows and cache capacity are rounded up to buckets, so few programs are compiled;
the cache is donated from dispatch to dispatch and grows when it is full, so that a large
max_new_tokens costs memory only as it is used. It knows no tokenizer, no text and no file.
"""

import functools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from qwen_jax import model, packed
from qwen_jax.adapters import Lora
from qwen_jax.cache import KVCache, abstract_cache, init_cache
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.model import Params, unembed
from qwen_jax.sampling import (
    RowParams,
    SamplingParams,
    mask_padded_vocab,
    row_keys,
    row_params,
    sample,
    seen_in_prompt,
    step_keys,
    update_seen,
)
from qwen_jax.sharding import constrain

# Tokens a row that one dispatch decodes: enough to hide the host, few enough to stream smoothly.
BLOCK = 8
_SMALLEST_BUCKET = 64
# Doubling wastes memory in a long cache; from here on capacity grows in steps of this.
_CAPACITY_STEP = 1024
# New tokens for which the first cache has room.
FIRST_ROOM = 512
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


class Engine:
    """A loaded model that continues token ids.

    n_vocab   ids from here on stand for no token and are never drawn; default cfg.vocab_size
    stop_ids  ids that end an answer; they are not part of it
    cache_dtype  of keys and values: int8 halves their memory; default that of the embedding
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: Params,
        lora: Lora | None = None,
        mesh: Mesh | None = None,
        n_vocab: int | None = None,
        stop_ids: Collection[int] = frozenset(),
        cache_dtype: Any = None,
    ):
        self.cfg, self.params, self.lora, self.mesh = cfg, params, lora, mesh
        self.cache_dtype = params["wte"].dtype if cache_dtype is None else jnp.dtype(cache_dtype)
        if packed.is_packed(params) and (lora is not None or (mesh is not None and mesh.size > 1)):
            raise InputError("packed weights run without an adapter and on one device")
        self.n_vocab = cfg.vocab_size if n_vocab is None else n_vocab
        self.stop_ids = frozenset(stop_ids)
        if not 0 < self.n_vocab <= cfg.vocab_size:
            raise InputError(
                f"the vocabulary has {self.n_vocab} tokens, the model {cfg.vocab_size} rows for "
                "them; use the tokenizer that was published with this model"
            )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
    ) -> list[list[int]]:
        """Continues every prompt in one batch; one SamplingParams for all, or one each.

        Raises InputError for an empty prompt or an id out of range.
        """
        prompts = list(prompts)
        params = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(params) != len(prompts):
            raise InputError(f"{len(prompts)} prompts but {len(params)} SamplingParams; one each")
        answers: list[list[int]] = [[] for _ in prompts]
        if not prompts:
            return answers
        for block in self._blocks(self.check(prompts), params):
            for answer, ids in zip(answers, block, strict=False):
                answer.extend(ids[ids != NOTHING].tolist())
        return answers

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[int]:
        """The ids that `generate` gives for one prompt, as each dispatch brings them."""
        prompts = self.check([prompt])  # here, not at the first id

        def ids() -> Iterator[int]:
            for block in self._blocks(prompts, [params]):
                yield from block[0][block[0] != NOTHING].tolist()

        return ids()

    def check(self, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        return [
            check_ids(prompt, self.n_vocab, f"prompt {number}")
            for number, prompt in enumerate(prompts, start=1)
        ]

    def _blocks(
        self, prompts: list[np.ndarray], params: list[SamplingParams]
    ) -> Iterator[np.ndarray]:  # int32 [B, tokens], NOTHING where a row has none
        """Runs the batch, block by block."""
        tokens, counts = self.pad(prompts)
        B, longest = len(tokens), int(counts.max())
        requests = self.requests(params, B)
        most = max(p.max_new_tokens for p in params)
        capacity = round_capacity(longest + min(most, FIRST_ROOM))
        cache = init_cache(self.cfg, B, capacity, self.cache_dtype, self.mesh)
        fixed = (self.cfg, self.mesh, self.n_vocab, self.params, self.lora, requests)
        state, block, done = prefill(*fixed, cache, tokens, counts)
        filled = longest
        while filled + 1 < longest + most:
            # The last room need not hold a whole block: rows that reach their limit stop writing.
            if min(filled + BLOCK, longest + most) > state.cache.capacity:
                capacity = round_capacity(
                    min(2 * state.cache.capacity, state.cache.capacity + _CAPACITY_STEP)
                )
                state = state.replace(cache=grow(self.cfg, self.mesh, state.cache, capacity))
            state, next_block, next_done = decode(*fixed, state)
            filled += BLOCK
            yield np.asarray(block)
            if np.asarray(done).all():
                return
            block, done = next_block, next_done
        yield np.asarray(block)

    def pad(self, prompts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """tokens int32 [B, T] and counts int32 [B]; extra rows hold one token and are ignored."""
        B = padded_rows(_power_of_two(len(prompts)), self.mesh)
        T = max(_SMALLEST_BUCKET, _power_of_two(max(map(len, prompts))))
        tokens, counts = np.zeros((B, T), np.int32), np.ones(B, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)], counts[row] = prompt, len(prompt)
        return tokens, counts

    def requests(self, params: list[SamplingParams], B: int) -> Requests:
        limits = [p.max_new_tokens for p in params] + [0] * (B - len(params))
        params = params + [SamplingParams(greedy=True)] * (B - len(params))
        return Requests(
            rows=row_params(params),
            keys=row_keys(params),
            limits=jnp.array(limits, jnp.int32),
            stops=jnp.array(sorted(self.stop_ids), jnp.int32),
        )


def check_ids(ids: Sequence[int], n_vocab: int, what: str) -> np.ndarray:
    """ids as int32 [T]; InputError if empty, not whole numbers, or outside 0..n_vocab-1."""
    array = np.asarray(ids)
    if array.ndim != 1 or array.size == 0:
        raise InputError(f"{what} has shape {array.shape}; expected at least one token id in a row")
    if array.dtype.kind not in "iu":
        raise InputError(f"{what} holds {array.dtype}; expected token ids, whole numbers")
    wrong = array[(array < 0) | (array >= n_vocab)]
    if wrong.size:
        raise InputError(f"{what} has token id {wrong[0]}; expected ids from 0 to {n_vocab - 1}")
    return array.astype(np.int32)


def padded_rows(count: int, mesh: Mesh | None) -> int:
    """Rows rounded up to a number that the mesh splits evenly."""
    if mesh is None:
        return count
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    return math.ceil(count / split) * split


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def round_capacity(n: int) -> int:
    if n <= _CAPACITY_STEP:
        return max(_SMALLEST_BUCKET, _power_of_two(n))
    return math.ceil(n / _CAPACITY_STEP) * _CAPACITY_STEP


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
    logits = constrain(unembed(params, hidden), mesh, PartitionSpec())
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


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnames="cache")
def prefill(
    cfg: ModelConfig,
    mesh: Mesh | None,
    n_vocab: int,
    params: Params,
    lora: Lora | None,
    requests: Requests,
    cache: KVCache,
    tokens: jax.Array,  # int32 [B, T], right-padded
    counts: jax.Array,  # int32 [B]
) -> tuple[DecodeState, jax.Array, jax.Array]:  # the first tokens, int32 [B, 1]; done, bool [B]
    B, T = tokens.shape
    hidden, cache = _forward(cfg, mesh, params, lora, tokens, cache, counts, fresh=True)
    last = hidden[jnp.arange(B), counts - 1]  # only these rows meet the V x D head
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
    lora: Lora | None,
    requests: Requests,
    state: DecodeState,
) -> tuple[DecodeState, jax.Array, jax.Array]:  # the next tokens, int32 [B, BLOCK]; done, bool [B]
    def step(carry):
        index, state, block = carry
        # A row that is done stays where it is: its one slot is overwritten, its cache never fills.
        counts = 1 - state.done.astype(jnp.int32)
        hidden, cache = _forward(
            cfg, mesh, params, lora, state.token[:, None], state.cache, counts, fresh=False
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


def _forward(cfg, mesh, params, lora, tokens, cache, counts, *, fresh: bool):
    """The decoder for these weights: packed ones have their own."""
    if packed.is_packed(params):
        return packed.forward(cfg, params, tokens, cache, counts=counts, fresh=fresh)
    return model.forward(cfg, params, lora, tokens, cache, counts=counts, fresh=fresh, mesh=mesh)


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
