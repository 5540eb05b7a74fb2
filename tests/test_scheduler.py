"""The generation thread with slots that only pretend: order, cancelling, faults, the end."""

import queue
import threading

import pytest

from qwen_jax.errors import InputError
from qwen_jax.sampling import SamplingParams
from qwen_jax.slots import Piece
from sample.scheduler import Busy, Closed, Scheduler


class CountingSlots:
    """A prompt [n] is answered with n, n+1, ..., one id a step, when the test lets it."""

    def __init__(self, most_rows):
        self.most_rows, self.rows = most_rows, {}
        self.let = threading.Semaphore(0)
        self.log = []

    @property
    def free(self):
        return self.most_rows - len(self.rows)

    def clear(self):
        self.rows.clear()

    def add(self, prompt, params):
        if not prompt:
            raise InputError("empty")
        number = min(set(range(self.most_rows)) - self.rows.keys())
        self.rows[number] = [prompt[0], params.max_new_tokens]
        self.log.append(("add", prompt[0]))
        return number, self.next(number)

    def step(self):
        self.let.acquire()
        if any(first == 666 for first, _ in self.rows.values()):
            raise RuntimeError("out of memory")
        return {number: self.next(number) for number in list(self.rows)}

    def drop(self, number):
        self.log.append(("drop", self.rows.pop(number)[0]))

    def next(self, number):
        row = self.rows[number]
        row[0], row[1] = row[0] + 1, row[1] - 1
        if row[1] == 0:
            del self.rows[number]
        return Piece([row[0] - 1], "length" if row[1] == 0 else None)


class Client:
    def __init__(self, scheduler, first, tokens=3):
        self.got = queue.Queue()
        prompt = [] if first is None else [first]
        self.job = scheduler.submit(prompt, SamplingParams(max_new_tokens=tokens), self.got.put)

    def next(self):
        return self.got.get(timeout=10)


@pytest.fixture
def slots():
    return CountingSlots(2)


@pytest.fixture
def scheduler(slots):
    scheduler = Scheduler(slots, most_waiting=3)
    yield scheduler
    slots.let.release(1000)
    scheduler.close()


def test_late_comers_join_and_others_wait_in_order(scheduler, slots):
    first = Client(scheduler, 100, tokens=4)
    assert first.next() == Piece([100], None)
    second, third, fourth = (Client(scheduler, first) for first in (200, 300, 400))
    slots.let.release(1)
    assert second.next() == Piece([200], None)  # while the first still runs
    slots.let.release(20)
    for client, start in ((second, 201), (third, 300), (fourth, 400)):
        assert client.next().ids == [start]
    assert slots.log == [("add", 100), ("add", 200), ("add", 300), ("add", 400)]
    assert [first.next() for _ in range(3)][-1] == Piece([103], "length")


def test_cancelled_jobs_leave_their_row_and_their_place(scheduler, slots):
    running = [Client(scheduler, 100, tokens=99), Client(scheduler, 200, tokens=99)]
    assert running[0].next().ids == [100]
    waiting = [Client(scheduler, 300), Client(scheduler, 400)]
    waiting[0].job.cancel()
    running[0].job.cancel()
    slots.let.release(3)
    assert waiting[1].next().ids == [400]
    assert ("drop", 101) in slots.log or ("drop", 102) in slots.log
    assert ("add", 300) not in slots.log
    assert waiting[0].got.empty()


def test_a_fault_ends_its_batch_and_not_the_thread(scheduler, slots):
    slots.let.release(100)
    client = Client(scheduler, 665, tokens=99)
    assert client.next() == Piece([665], None)
    assert isinstance(client.next(), RuntimeError)
    assert isinstance(Client(scheduler, None).next(), InputError)
    assert Client(scheduler, 1).next() == Piece([1], None)


def test_a_refused_prompt_leaves_the_others_alone(scheduler, slots):
    client = Client(scheduler, 100)
    assert client.next() == Piece([100], None)
    refused = Client(scheduler, None)
    slots.let.release(100)
    assert isinstance(refused.next(), InputError)
    assert [client.next().ids for _ in range(2)] == [[101], [102]]


def test_no_more_may_wait_than_that(scheduler, slots):
    running = [Client(scheduler, 100), Client(scheduler, 200)]
    assert running[0].next().ids == [100]
    while scheduler.waiting:  # the second joins with the next step
        slots.let.release(1)
    started = [Client(scheduler, n, tokens=99) for n in (300, 400)]
    del started
    with pytest.raises(Busy, match="3 requests are waiting already; try again later"):
        for n in range(500, 510):
            Client(scheduler, n, tokens=99)


def test_the_end_is_told_to_all(slots):
    scheduler = Scheduler(slots, most_waiting=3)
    clients = [Client(scheduler, n, tokens=99) for n in (100, 200, 300)]
    assert clients[0].next().ids == [100]
    slots.let.release(1)
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    slots.let.release(3)
    closing.join(timeout=10)
    assert not closing.is_alive()
    for client in clients:
        last = client.next()
        while isinstance(last, Piece):
            last = client.next()
        assert isinstance(last, Closed)
    with pytest.raises(Closed, match="shutting down"):
        Client(scheduler, 1)
    scheduler.close()  # twice does no harm
