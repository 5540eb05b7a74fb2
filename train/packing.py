"""Short examples that share a row, so that less of it is padding; each sees only itself.

    examples -> rows: Examples of several sequences, up to `length` tokens

The rows stay the same in all epochs, so all that is known of examples (how many, in which order)
holds for rows, and a run that goes on needs nothing more. The loss of a token is what it would be
in a row of its own.
"""

import bisect
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from train.batches import Example


def pack(
    examples: Sequence[Example],
    length: int,  # tokens of a row: no example is longer
) -> list[Example]:
    """Rows that together hold each example once, whole; in the order of their first examples.

    Best fit, longest first: an example goes where it leaves the least room. That needs at most 11/9
    of the fewest rows possible, and 4 more (Johnson, 1973).
    """
    rows: list[list[int]] = []
    rooms: list[int] = []  # that rows have left: in order, each once
    with_room: dict[int, list[list[int]]] = defaultdict(list)
    for i in sorted(range(len(examples)), key=lambda i: -len(examples[i].ids)):
        size = len(examples[i].ids)
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            row, room = [], length
            rows.append(row)
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del rooms[at]
        row.append(i)
        room -= size
        if room < 0:
            raise ValueError(f"an example of {size} tokens does not fit rows of {length}")
        if room and not with_room[room]:
            bisect.insort(rooms, room)
        with_room[room].append(row)
    return [_joined([examples[i] for i in sorted(row)]) for row in sorted(rows, key=min)]


def _joined(examples: Sequence[Example]) -> Example:
    ids = np.concatenate([example.ids for example in examples])
    loss_mask = np.concatenate([example.loss_mask for example in examples])
    starts = np.cumsum([0, *(len(example.ids) for example in examples[:-1])])
    loss_mask[starts] = False  # has nothing before it that it sees
    return Example(ids, loss_mask, tuple(starts.tolist()))


def describe(
    rows: Sequence[Example],
    length: int,  # to which the longest of them is padded
) -> str:
    """One line for the log."""
    examples, tokens = sum(len(row.starts) for row in rows), sum(len(row.ids) for row in rows)
    return (
        f"packed: {examples} examples in {len(rows)} rows of up to {length} tokens, "
        f"{tokens / (len(rows) * length):.1%} full"
    )
