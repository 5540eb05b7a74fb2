"""Examples that share rows: none is lost, cut, or seen by another."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.batches import BatchPlan, Example, batches, collate, fingerprint
from train.packing import describe, pack


def examples_of(lengths):
    """Each token names its example; the first is to be predicted, too."""
    return [Example(np.full(n, i, np.int32), np.arange(n) % 2 == 0) for i, n in enumerate(lengths)]


def pieces(row):
    """(ids, loss_mask) of each sequence of a row."""
    ends = (*row.starts[1:], len(row.ids))
    return [
        (row.ids[start:end], row.loss_mask[start:end])
        for start, end in zip(row.starts, ends, strict=True)
    ]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_each_example_is_in_one_row_whole(lengths):
    examples = examples_of(lengths)
    rows = pack(examples, 50)
    found = [piece for row in rows for piece in pieces(row)]
    assert sorted(ids[0] for ids, _ in found) == list(range(len(examples)))
    for ids, mask in found:
        example = examples[ids[0]]
        np.testing.assert_array_equal(ids, example.ids)
        assert not mask[0]
        np.testing.assert_array_equal(mask[1:], example.loss_mask[1:])
    filled = [len(row.ids) for row in rows]
    assert max(filled) <= 50
    # Else the fuller of two such rows would have taken what is in the other.
    assert sum(n <= 25 for n in filled) <= 1
    firsts = [row.ids[0] for row in rows]
    assert firsts == sorted(firsts)


def test_rows_are_the_fewest_where_that_is_known():
    assert len(pack(examples_of([30, 30, 20, 20, 20, 30]), 50)) == 3
    assert len(pack(examples_of([1] * 100), 50)) == 2
    assert len(pack(examples_of([50] * 4), 50)) == 4


def test_an_example_that_fits_no_row_is_refused():
    with pytest.raises(ValueError, match="51 tokens does not fit rows of 50"):
        pack(examples_of([3, 51]), 50)


def test_segments_of_a_batch():
    rows = pack(examples_of([3, 2, 4]), 5)  # 4; 3 and 2
    batch = collate(rows, batch_size=3, length=6, pad_id=9, packed=True)
    assert batch["tokens"].tolist() == [[0, 0, 0, 1, 1, 9], [2, 2, 2, 2, 9, 9], [9] * 6]
    assert batch["segments"].tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 1, 1], [0] * 6]
    assert batch["segments"].dtype == np.int32
    ((_, other),) = batches(rows, BatchPlan(2, 2), 0, 1, cutoff_len=64, pad_id=9, packed=True)
    assert other["segments"].shape == other["tokens"].shape == (2, 64)
    assert "segments" not in collate(rows, batch_size=3, length=6, pad_id=9)


def test_how_rows_are_cut_is_part_of_the_fingerprint():
    whole = Example(np.arange(6, dtype=np.int32), np.zeros(6, bool))
    cut = Example(whole.ids, whole.loss_mask, (0, 2))
    assert fingerprint([whole]) != fingerprint([cut])


def test_what_packing_gains_is_said():
    rows = pack(examples_of([30, 20, 40]), 50)
    assert describe(rows, 64) == "packed: 3 examples in 2 rows of up to 64 tokens, 70.3% full"
