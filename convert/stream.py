"""Runs the parts of a checkpoint from source to disk: all cores fill, few are in memory at once.

    parts --> blocks of rows, filled by a pool of threads --> finish --> write, recorded when done

At 72B a layer's largest weight is 403 MB; a bound on the bytes in flight keeps the whole process
under 4 GiB. Where a part comes from and what its arrays mean is not known here.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import os
import threading
from collections.abc import Callable, Iterable

import numpy as np

from qwen_jax.checkpoint_writer import CheckpointWriter
from qwen_jax.params import ParamSpec

Arrays = dict[str, np.ndarray]  # "" or the QTensor's fields, in the shapes in which they are stored

_FILLING_BYTES = 1_300_000_000  # arrays that are being filled, wait to be written or are written
_FREE_BYTES = 420_000_000  # that wait to be used again
_SMALL_BYTES = 100_000
_MOST_WRITES = 8  # at once: what is finished should soon be on record
_WRITING_BYTES = 450_000_000  # of which tensorstore makes a copy in the order of the file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One layer of a stacked weight, or some rows of another, and how its arrays are made."""

    spec: ParamSpec
    index: int | slice
    key: str  # what it is made from: another key, and a resumed run makes it again
    in_bytes: int  # of the source, for the progress
    blocks: tuple[slice, ...]  # of rows; each is filled once, by whichever thread is free
    fill: Callable[[slice, Arrays], None]  # writes these rows into the arrays
    finish: Callable[[Arrays], Arrays] = lambda arrays: arrays  # after all blocks


@dataclasses.dataclass
class _Flight:
    part: Part
    memory: list[np.ndarray]
    arrays: Arrays
    blocks: list[concurrent.futures.Future]
    num_bytes: int  # of the arrays; threads may add to these meanwhile
    done: Callable[[], None] | None = None  # waits for the write, once begun


def stream(
    parts: Iterable[Part],
    writer: CheckpointWriter,
    advance: Callable[[int], object],
    threads: int | None = None,
) -> None:
    """Makes and writes every part; `advance` is told the bytes of the source as they are read.

    Whatever ends it early, parts whose write has begun are still recorded.
    """
    filling: collections.deque[_Flight] = collections.deque()
    writing: collections.deque[_Flight] = collections.deque()
    threads = threads or num_cores()
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    memory = _Memory()

    def total(flights: Iterable[_Flight]) -> int:
        return sum(flight.num_bytes for flight in flights)

    def unfilled(block: concurrent.futures.Future) -> bool:
        return not block.done()

    def busy() -> int:
        return sum(unfilled(block) for flight in filling for block in flight.blocks)

    def settle() -> None:
        flight = writing.popleft()
        flight.done()
        memory.give(flight.memory)

    def start_write() -> None:
        flight = filling[0]
        for block in flight.blocks:
            block.result()
            advance(flight.part.in_bytes // len(flight.blocks))
        advance(flight.part.in_bytes % len(flight.blocks))
        flight.arrays = flight.part.finish(flight.arrays)
        while writing and (
            total(writing) + flight.num_bytes > _WRITING_BYTES or len(writing) == _MOST_WRITES
        ):
            settle()
        part = flight.part
        flight.done = writer.write(part.spec, part.index, flight.arrays, part.key)
        writing.append(filling.popleft())

    try:
        for part in parts:
            shapes = writer.array_shapes(part.spec, part.index)
            size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
            while filling and (busy() > 4 * threads or not any(map(unfilled, filling[0].blocks))):
                start_write()
            while (filling or writing) and total([*filling, *writing]) + size > _FILLING_BYTES:
                start_write() if filling else settle()
            pieces, arrays = memory.take(shapes)
            blocks = [pool.submit(part.fill, rows, arrays) for rows in part.blocks]
            filling.append(_Flight(part, pieces, arrays, blocks, size))
            del pieces, arrays
        while filling:
            start_write()
        while writing:
            settle()
    finally:
        pool.shutdown(cancel_futures=True)
        for flight in writing:
            with contextlib.suppress(Exception):  # the error on its way out is the one to show
                flight.done()


class _Memory:
    """Arrays are made in memory that was used before: fresh pages cost as much time as `read`."""

    def __init__(self):
        self._free: list[np.ndarray] = []

    def take(self, shapes: dict[str, tuple[tuple[int, ...], np.dtype]]) -> tuple[list, Arrays]:
        """The pieces to `give` back, and the arrays in them."""
        pieces, arrays = [], {}
        for name, (shape, dtype) in shapes.items():
            size = math.prod(shape) * dtype.itemsize
            fitting = [i for i, piece in enumerate(self._free) if size <= piece.size <= 4 * size]
            best = min(fitting, key=lambda i: self._free[i].size, default=None)
            piece = np.empty(size, np.uint8) if best is None else self._free.pop(best)
            pieces.append(piece)
            arrays[name] = piece[:size].view(dtype).reshape(shape)
        return pieces, arrays

    def give(self, pieces: list[np.ndarray]) -> None:
        self._free += [piece for piece in pieces if piece.size > _SMALL_BYTES]
        while sum(piece.size for piece in self._free) > _FREE_BYTES:
            self._free.pop(0)


_thread = threading.local()


def scratch(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array for the calling thread, until its next call."""
    size = math.prod(shape) * dtype.itemsize
    if getattr(_thread, "memory", None) is None or _thread.memory.size < size:
        _thread.memory = np.empty(size, np.uint8)
    return _thread.memory[:size].view(dtype).reshape(shape)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
