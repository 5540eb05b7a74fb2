"""The benchmark of the int8 cache in small, and its own arithmetic."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import kv_cache as benchmark
from qwen_jax import model


@pytest.mark.slow  # a program for each cache and head
def test_toy(capsys):
    benchmark.main(["--toy", "--tokens", "32", "--chunk", "16", "--greedy_tokens", "4"])
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
    ][2:]
    assert [tuple(row[:2]) for row in rows] == [
        ("float32", "float32"),
        ("int8", "float32"),
        (benchmark.WITHOUT_UNITS, "float32"),
        ("float32", "int8"),
        ("int8", "int8"),
    ]
    more = [abs(float(row[3].removesuffix("%"))) for row in rows]
    assert more[0] == 0 < more[2] and max(more) < 1
    # 4 heads of 16, keys and values, 2 layers; int8 has 2 bytes of scale for each head.
    assert [row[6] for row in rows[:2]] == [f"{4 * 16 * 2 * 2 * 4:,}", f"{4 * 18 * 2 * 2:,}"]
    assert rows[0][7] == "4, 4" and rows[2][7] == ""


def test_losses_of_chunks_are_those_of_whole_sequences():
    subject = benchmark.toy(benchmark.Args(toy=True, tokens=30))
    losses, best = benchmark.read_texts(subject, subject.params, "float32", chunk=7)
    logits = model.logits(subject.cfg, subject.params, None, jnp.asarray(subject.texts))
    scores = np.asarray(logits, np.float64)
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    want = -np.take_along_axis(scores[:, :-1], subject.texts[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(losses, want, atol=1e-4)
    assert (best == scores.argmax(-1)).mean() > 0.95  # a tie of a random model may fall otherwise


def test_answers_are_equal_up_to_their_first_difference():
    assert benchmark.equal([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 0, 6]]) == "3, 1"
    assert benchmark.equal(None, [[1]]) == ""
