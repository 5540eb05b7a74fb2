"""Generation: token ids in, token ids out, for a batch of prompts or as a stream of one.

    prompts -> right-padded to a bucket -> prefill, long ones in chunks (and each row's first token)
            -> decode, BLOCK tokens a dispatch, until every row is done -> ids

One dispatch runs ahead: the host reads a block while the device computes the next one, which stops
at once if it turns out that every row was done.

Prompt length, rows and cache capacity are rounded up to buckets, so few programs are compiled;
the cache is donated from dispatch to dispatch and grows when it is full, so that a large
max_new_tokens costs memory only as it is used. It knows no tokenizer, no text and no file.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qwen_jax import packed
from qwen_jax.adapters import Lora
from qwen_jax.cache import init_cache, stored_dtype
from qwen_jax.config import ModelConfig
from qwen_jax.drafts import Text, remember
from qwen_jax.errors import InputError
from qwen_jax.model import Params, lora_layers
from qwen_jax.sampling import SamplingParams, row_keys, row_params
from qwen_jax.steps import BLOCK, NOTHING, Requests, decode, draft, grow, prefill

_SMALLEST_BUCKET = 64
# Doubling wastes memory in a long cache; from here on capacity grows in steps of this.
_CAPACITY_STEP = 1024
# New tokens for which the first cache has room.
FIRST_ROOM = 512
# Tokens of all rows of a device that a prefill runs at once. As many as a GEMM needs to be bound by
# arithmetic, with the dequantization in front of it; 32,768 would take gigabytes of activations.
PREFILL_TOKENS = 4096
# A pass over these and the token before them still reads the cache where it is filled.
MOST_DRAFTS = packed.FEW_TOKENS - 1


class Engine:
    """A loaded model that continues token ids.

    n_vocab   ids from here on stand for no token and are never drawn; default cfg.vocab_size
    stop_ids  ids that end an answer; they are not part of it
    cache_dtype  of keys and values: int8 halves their memory; default that of the embedding
    drafts    tokens guessed ahead from the text so far where one prompt is alone (drafts.py); the
              answer is the same up to rounding, sooner where the text repeats itself
    prefill_tokens  a prompt, or a batch of them, with more tokens is read in chunks
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
        drafts: int = 0,
        prefill_tokens: int = PREFILL_TOKENS,
    ):
        self.cfg, self.params, self.mesh = cfg, params, mesh
        self.cache_dtype = stored_dtype(cache_dtype, params["wte"].dtype)
        if not 0 <= drafts <= MOST_DRAFTS:
            raise InputError(f"drafts is {drafts}; expected 0 (none) to {MOST_DRAFTS} tokens")
        if packed.is_packed(params):
            packed.check_mesh(cfg, params, mesh)
            if lora is not None:
                raise InputError("packed weights run without an adapter")
        # Once, and not for every token: at 72B the cast and the turn move 0.4 GB.
        prepare = jax.jit(lora_layers, static_argnums=1)
        self.pairs = {} if lora is None else prepare(lora, params["wte"].dtype)
        self.drafts, self.prefill_tokens = drafts, prefill_tokens
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
        fixed = (self.cfg, self.mesh, self.n_vocab, self.params, self.pairs, requests)
        state, block, done = prefill(*fixed, cache, tokens, counts, chunk=self.chunk(B))
        drafts = self.drafts if B == 1 else 0
        text = _text(tokens, counts, state.token, capacity) if drafts else None
        width = BLOCK * (drafts + 1)  # most tokens of a dispatch
        known, ahead = longest, 1  # tokens that the host knows of, and those it has yet to read
        # Without drafts the host can tell which dispatch is the last one.
        while drafts or known + ahead < longest + most:
            # The last room need not hold a whole block: rows that reach their limit stop writing.
            room = min(known + ahead + width, longest + most) + drafts
            if room > state.cache.capacity:
                capacity = round_capacity(max(room, min(2 * capacity, capacity + _CAPACITY_STEP)))
                state = state.replace(cache=grow(self.cfg, self.mesh, state.cache, capacity))
            if drafts:
                more = capacity - text.tokens.shape[1]
                text = text.replace(tokens=jnp.pad(text.tokens, [(0, 0), (0, more)]))
                state, text, next_block, next_done = draft(
                    *fixed[:3], drafts, *fixed[3:], state, text
                )
            else:
                state, next_block, next_done = decode(*fixed, state)
            ids = np.asarray(block)
            yield ids
            if np.asarray(done).all():
                return
            known += int((ids != NOTHING).sum(axis=1).max()) if drafts else ahead
            block, done, ahead = next_block, next_done, width
        yield np.asarray(block)

    def chunk(self, B: int) -> int:
        """Tokens of each of B rows that a prefill runs at once."""
        return prefill_chunk(B // padded_rows(1, self.mesh), self.prefill_tokens)

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


def prefill_chunk(here: int, tokens: int = PREFILL_TOKENS) -> int:
    """Tokens of a row that a prefill runs at once, `here` rows being on a device."""
    return max(_SMALLEST_BUCKET, tokens // here)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def round_capacity(n: int) -> int:
    if n <= _CAPACITY_STEP:
        return max(_SMALLEST_BUCKET, _power_of_two(n))
    return math.ceil(n / _CAPACITY_STEP) * _CAPACITY_STEP


def _text(
    tokens: np.ndarray,  # int32 [B, T], right-padded
    counts: np.ndarray,  # int32 [B]
    first: jax.Array,  # int32 [B]: the first tokens of the answers
    capacity: int,
) -> Text:
    """The text so far, with room for `capacity` tokens."""
    tokens = tokens[:, :capacity]
    room = np.pad(tokens, [(0, 0), (0, capacity - tokens.shape[1])])
    one = jnp.ones(counts.shape, jnp.int32)
    return remember(Text.of(jnp.asarray(room)), jnp.asarray(counts), first[:, None], one)
