"""One thread that generates for everybody: requests wait in a queue and join the running batch.

    submit -> waiting -> a free row of Slots (the prompt is prefilled, others pause for that long)
           -> pieces of token ids to the request's own callback, until it ends or is cancelled

Whoever arrives joins at the next step, whatever the age of the others. An error in the middle of
generation ends the requests of that batch and not the thread. It knows token ids only, no text,
no HTTP and no event loop; callbacks run in the generation thread and must return at once.
"""

import collections
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qwen_jax.errors import InputError
from qwen_jax.sampling import SamplingParams
from qwen_jax.slots import Piece, Slots

log = logging.getLogger(__name__)


class Busy(Exception):
    """As many requests as may wait are waiting already."""


class Closed(Exception):
    """The scheduler ends: the request will not be finished."""


@dataclass(eq=False)
class Job:
    """One request; `deliver` gets pieces until one has a finish, or one exception."""

    prompt: Sequence[int]
    params: SamplingParams
    deliver: Callable[[Piece | Exception], None]
    cancelled: bool = False  # read by the thread before each step

    def cancel(self) -> None:
        """Nobody waits for the rest: its row is free from the next step on."""
        self.cancelled = True


class Scheduler:
    """Owns the slots and the thread; `submit` may be called from any thread."""

    def __init__(self, slots: Slots, most_waiting: int):
        self._slots, self._most_waiting = slots, most_waiting
        self._waiting: collections.deque[Job] = collections.deque()
        self._running: dict[int, Job] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        deliver: Callable[[Piece | Exception], None],
    ) -> Job:
        """Queues a request. Raises Busy or Closed."""
        job = Job(prompt, params, deliver)
        with self._changed:
            if self._closing:
                raise Closed("the server is shutting down")
            if len(self._waiting) >= self._most_waiting:
                raise Busy(f"{len(self._waiting)} requests are waiting already; try again later")
            self._waiting.append(job)
            self._changed.notify()
        return job

    def close(self) -> None:
        """Ends the thread after the step that it is in; whoever still waits gets Closed."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._wait():
            try:
                self._drop_cancelled()
                self._admit()
                for row, piece in self._slots.step().items():
                    self._hand_out(row, piece)
            except Exception as error:
                # The step may have consumed the state, so no row of it can go on.
                log.exception("generation failed; %d requests are ended", len(self._running))
                self._slots.clear()
                self._end(list(self._running.values()), error)
                self._running.clear()
        closed = Closed("the server is shutting down")
        self._end([*self._running.values(), *self._waiting], closed)

    def _wait(self) -> bool:
        """Sleeps until there is work; False to end."""
        with self._changed:
            while not (self._closing or self._waiting or self._running):
                self._changed.wait()
            return not self._closing

    def _drop_cancelled(self) -> None:
        for row, job in list(self._running.items()):
            if job.cancelled:
                del self._running[row]
                self._slots.drop(row)

    def _admit(self) -> None:
        """Gives the rows that are free to those who wait, first come, first served.

        No more than that before the next step, or short answers could keep long ones waiting.
        """
        for _ in range(self._slots.free):
            with self._changed:
                if self._closing or not self._waiting:
                    return
                job = self._waiting.popleft()
            if job.cancelled:
                continue
            try:
                row, piece = self._slots.add(job.prompt, job.params)
            except InputError as error:  # nothing has changed, the others go on
                self._end([job], error)
                continue
            except Exception as error:
                self._end([job], error)
                raise
            self._running[row] = job
            self._hand_out(row, piece)

    def _hand_out(self, row: int, piece: Piece) -> None:
        job = self._running[row]
        if piece.finish is not None:
            del self._running[row]
        if not job.cancelled:
            job.deliver(piece)

    @staticmethod
    def _end(jobs: list[Job], error: Exception) -> None:
        for job in jobs:
            if not job.cancelled:
                job.deliver(error)
