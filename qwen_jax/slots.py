"""A running batch whose rows come and go (continuous batching): token ids in, token ids out.

    add    a prompt is prefilled by itself, its first token comes out, its row joins the others
    step   every row gets up to BLOCK more tokens from one dispatch
    drop   a row that nobody waits for any longer is free at once

The rows share one decode program, whatever their prompts, ages and settings, and each draws from
its own seed: a row's tokens are those that `Engine.generate` gives for it alone. Rows and cache
grow by doubling as they are needed, and the memory goes back when the last row ends. Not
thread-safe; knows no text, no queue and no client (see sample/scheduler.py).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from qwen_jax.cache import init_cache
from qwen_jax.config import ModelConfig
from qwen_jax.engine import FIRST_ROOM, Engine, padded_rows, round_capacity
from qwen_jax.sampling import SamplingParams
from qwen_jax.sharding import constrain
from qwen_jax.steps import BLOCK, NOTHING, DecodeState, Requests, decode, pin, prefill


class Piece(NamedTuple):
    """The next tokens of one row; `finish` is None while more will come."""

    ids: list[int]
    finish: str | None  # "stop": a stop id, which is left out; "length": max_new_tokens


@dataclass
class _Row:
    length: int  # tokens of prompt and answer so far
    left: int  # tokens still wanted


class Slots:
    """Up to `most_rows` answers in the making."""

    def __init__(self, engine: Engine, most_rows: int):
        self.engine, self.most_rows = engine, most_rows
        self.clear()

    @property
    def free(self) -> int:
        return self.most_rows - len(self._rows)

    def clear(self) -> None:
        """Forgets every row and frees the cache."""
        self._rows: dict[int, _Row] = {}
        self._state: DecodeState | None = None
        self._requests: Requests | None = None
        self._dropped: set[int] = set()

    def add(self, prompt: Sequence[int], params: SamplingParams) -> tuple[int, Piece]:
        """Starts a row, if one is free; its number and its first token.

        Raises InputError for an empty prompt or an id out of range, and nothing has changed.
        """
        if not self.free:
            raise ValueError(f"all {self.most_rows} rows are in use; drop or finish one first")
        engine = self.engine
        tokens, counts = engine.pad(engine.check([prompt]))
        B, T = tokens.shape
        requests = engine.requests([params], B)
        cache = init_cache(engine.cfg, B, T, engine.cache_dtype, engine.mesh)
        state, block, *_ = prefill(
            *self._fixed(requests), cache, tokens, counts, chunk=engine.chunk(B)
        )
        number = min(set(range(self.most_rows)) - self._rows.keys())
        row = _Row(length=len(prompt), left=params.max_new_tokens)
        piece = self._piece(row, np.asarray(block)[0])
        if piece.finish is None:
            room = min(row.left, FIRST_ROOM)
            self._make_room(number + 1, row.length + room)
            # The rows that only fill the prefill's batch go nowhere.
            rows = np.array([number] + [self._B] * (B - 1), np.int32)
            self._put(state, requests, rows)
            self._rows[number] = row
            self._dropped.discard(number)
        return number, piece

    def step(self) -> dict[int, Piece]:
        """The next tokens of every row; a row that finishes is free again."""
        if not self._rows:
            return {}
        self._make_room(
            self._B, max(row.length + min(row.left, BLOCK) for row in self._rows.values())
        )
        if self._dropped:
            mask = np.zeros(self._B, bool)
            mask[list(self._dropped)] = True
            self._state = self._state.replace(done=self._state.done | mask)
            self._dropped.clear()
        self._state, block, *_ = decode(*self._fixed(self._requests), self._state)
        block = np.asarray(block)
        pieces = {number: self._piece(row, block[number]) for number, row in self._rows.items()}
        for number, piece in pieces.items():
            if piece.finish is not None:
                del self._rows[number]
        self._free_if_idle()
        return pieces

    def drop(self, number: int) -> None:
        """Ends a row early."""
        del self._rows[number]
        self._dropped.add(number)
        self._free_if_idle()

    @property
    def _B(self) -> int:
        return 0 if self._state is None else len(self._state.token)

    def _fixed(self, requests: Requests) -> tuple:
        engine = self.engine
        return engine.cfg, engine.mesh, engine.n_vocab, engine.params, engine.pairs, requests

    def _piece(self, row: _Row, ids: np.ndarray) -> Piece:
        """Takes a row's share of a block into account."""
        given = ids[ids != NOTHING].tolist()
        row.length += len(given)
        row.left -= len(given)
        if row.left == 0:
            return Piece(given, "length")
        return Piece(given, "stop" if len(given) < len(ids) else None)

    def _free_if_idle(self) -> None:
        if not self._rows:
            self.clear()

    def _make_room(self, rows: int, length: int) -> None:
        """Grows the state to at least `rows` rows of `length` tokens."""
        engine, old = self.engine, self._state
        capacity = round_capacity(length)
        if old is not None:
            capacity = max(capacity, old.cache.capacity)
            if rows <= self._B and capacity == old.cache.capacity:
                return
            if length > old.cache.capacity:  # by doubling, so that it happens seldom
                capacity = max(capacity, round_capacity(min(2 * old.cache.capacity, length + 1024)))
        B = max(self._B, padded_rows(1 << (rows - 1).bit_length(), engine.mesh))
        requests, self._requests = self._requests, engine.requests([], B)
        self._state = DecodeState(
            cache=init_cache(engine.cfg, B, capacity, engine.cache_dtype, engine.mesh),
            token=jnp.zeros(B, jnp.int32),
            seen=jnp.zeros((B, engine.cfg.vocab_size), bool),
            steps=jnp.zeros(B, jnp.int32),
            done=jnp.ones(B, bool),
        )
        if old is not None:
            self._put(old, requests, np.arange(len(old.token), dtype=np.int32))

    def _put(self, new: DecodeState, requests: Requests, rows: np.ndarray) -> None:
        self._state, self._requests = _insert(
            self.engine.cfg, self.engine.mesh, self._state, self._requests, new, requests, rows
        )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _insert(
    cfg: ModelConfig,
    mesh: Mesh | None,
    state: DecodeState,  # B rows
    requests: Requests,
    new: DecodeState,  # B' rows
    new_requests: Requests,
    rows: jax.Array,  # int32 [B']: where each goes; B for nowhere
) -> tuple[DecodeState, Requests]:
    """Writes rows into a running batch, in place."""
    S = min(state.cache.capacity, new.cache.capacity)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:  # [B, ...], [B', ...]
        return old.at[rows].set(new, mode="drop")

    def put_slots(old: jax.Array, new: jax.Array) -> jax.Array:  # [L, B, S, ...]
        return old.at[:, rows, :S].set(new[:, :, :S], mode="drop")

    # Lengths and such are [B]; keys, values and their scales all begin with [L, B, S].
    cache = jax.tree.map(
        lambda old, new: (put if old.ndim == 1 else put_slots)(old, new), state.cache, new.cache
    )
    state = DecodeState(
        cache=cache,
        token=put(state.token, new.token),
        seen=put(state.seen, new.seen),
        steps=put(state.steps, new.steps),
        done=put(state.done, new.done),
    )
    requests = Requests(
        rows=jax.tree.map(put, requests.rows, new_requests.rows),
        keys=put(requests.keys, new_requests.keys),
        limits=put(requests.limits, new_requests.limits),
        stops=requests.stops,
    )
    requests = jax.tree.map(lambda x: constrain(x, mesh, PartitionSpec()), requests)
    return pin(cfg, mesh, state), requests
