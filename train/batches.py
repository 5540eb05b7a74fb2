"""The order in which examples are trained, and padded batches of them.

    BatchPlan: step -> indices of examples;  examples -> batch [B, T] (tokens, loss_mask, lengths)

Knows nothing of where the examples come from, of the model or of devices.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from qwen_jax.errors import InputError


@dataclass(frozen=True)
class Example:
    """One tokenized row. `loss_mask[t]` says that `ids[t]` is a token to be predicted."""

    ids: np.ndarray  # int32 [T]
    loss_mask: np.ndarray  # bool [T]
    starts: tuple[int, ...] = (0,)  # of the sequences in it: several if they were packed


def fingerprint(examples: Sequence[Example]) -> str:
    """A sha256 of all tokens and masks, in order: data that changed cannot be gone on with."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.ids).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(example.ids).tobytes())
        digest.update(np.packbits(example.loss_mask).tobytes())
        digest.update(np.array(example.starts[1:], np.int64).tobytes())
    return digest.hexdigest()


@lru_cache(maxsize=2)
def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """A shuffled order of `num_examples` indices, int64 [num_examples], read-only.

    Sorts raw PCG64 words: NumPy keeps those the same from version to version, which it does not
    promise for `Generator.permutation` (NEP 19), and a run may resume under a newer NumPy.
    """
    order = np.argsort(np.random.PCG64([seed, epoch]).random_raw(num_examples), kind="stable")
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class BatchPlan:
    """Which examples each optimizer step trains: arithmetic on the step, no state to save.

    Every epoch is a new shuffle and sees each example exactly once; its last batch may be short
    (`collate` fills it with empty rows), so that no example moves over into the next epoch.
    """

    num_examples: int
    global_batch: int  # rows of one optimizer step: devices x per-device batch x accumulation
    seed: int = 0

    def __post_init__(self):
        if self.num_examples < 1 or self.global_batch < 1 or self.seed < 0:
            raise InputError(
                f"{self}: expected at least one example, a batch of at least 1 and a seed from 0"
            )

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_examples // self.global_batch)

    def batch_at(self, step: int) -> np.ndarray:
        """Indices of the examples of optimizer step `step` (from 0), int64 [<= global_batch]."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        start = batch * self.global_batch
        order = epoch_order(self.num_examples, self.seed, epoch)
        return order[start : start + self.global_batch]


def bucket_length(
    n: int,  # longest row of a batch, 1 <= n <= cutoff_len
    cutoff_len: int,
) -> int:
    """The padded length for a batch: the next of 64, 128, 192, 256, 384, 512, 768, 1024, 1536, ...

    Powers of two and the values halfway between, up to cutoff_len rounded up to 64: few shapes to
    compile (8 for a cutoff_len of 1024, 10 for 2048, 14 for 8192), and past 128 at most a third of
    a row is padding.
    """
    if not 1 <= n <= cutoff_len:
        raise ValueError(f"length {n}; expected 1 to cutoff_len = {cutoff_len}")
    power = 64
    while power < n:
        power *= 2
    halfway = power * 3 // 4
    length = halfway if n <= halfway and halfway % 64 == 0 else power
    return min(length, -(-cutoff_len // 64) * 64)


def collate(
    examples: Sequence[Example], *, batch_size: int, length: int, pad_id: int, packed: bool = False
) -> dict[str, np.ndarray]:
    """Pads examples on the right, and the batch with empty rows, to `[batch_size, length]`.

    Returns tokens int32 [B, T], loss_mask bool [B, T] (False on padding), lengths int32 [B]; if
    they are packed, also segments int32 [B, T]: the number of each token's sequence in its row, of
    padding the next one.
    """
    longest = max((len(e.ids) for e in examples), default=0)
    if len(examples) > batch_size or longest > length:
        raise ValueError(
            f"{len(examples)} rows of up to {longest} tokens do not fit [{batch_size}, {length}]"
        )
    tokens = np.full((batch_size, length), pad_id, np.int32)
    loss_mask = np.zeros((batch_size, length), np.bool_)
    lengths = np.zeros(batch_size, np.int32)
    for row, example in enumerate(examples):
        n = lengths[row] = len(example.ids)
        tokens[row, :n], loss_mask[row, :n] = example.ids, example.loss_mask
    batch = {"tokens": tokens, "loss_mask": loss_mask, "lengths": lengths}
    if packed:
        segments = batch["segments"] = np.zeros((batch_size, length), np.int32)
        for row, example in enumerate(examples):
            for start in (*example.starts[1:], len(example.ids)):
                segments[row, start:] += 1
    return batch


def batches(
    examples: Sequence[Example],
    plan: BatchPlan,
    start: int,
    stop: int,
    *,
    cutoff_len: int,
    pad_id: int,
    packed: bool = False,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yields (step, batch) for the optimizer steps start .. stop - 1; to resume, pass `start`."""
    for step in range(start, stop):
        chosen = [examples[i] for i in plan.batch_at(step)]
        length = bucket_length(max(len(e.ids) for e in chosen), cutoff_len)
        yield (
            step,
            collate(
                chosen, batch_size=plan.global_batch, length=length, pad_id=pad_id, packed=packed
            ),
        )
