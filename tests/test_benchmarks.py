"""The benchmarks of steps, typed as a user does, at the size that a CPU can do."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import pytest

from benchmarks import train
from benchmarks.gemm import changes_of, tiling_of
from benchmarks.profile import covered
from qwen_jax.errors import InputError


def output_of(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_training_prints_a_row_for_each_compute():
    command = ["benchmarks.train", "--toy", "--seq", "64", "--compute", "bf16", "fp8"]
    rows = output_of(*command, "--steps", "1").splitlines()
    assert [row.split()[:3] for row in rows] == [["seq", "64", "bf16"], ["seq", "64", "fp8"]]
    for row in rows:
        # Embedding and head of 151,936 x 64 in float32: 77.8 MB, the rest is small.
        weights, planned = (
            float(re.search(rf"{name} +([\d.]+)", row)[1]) for name in ("weights", "planned")
        )
        assert planned > weights == 0.08
        first, last = map(float, re.search(r"loss ([\d.]+) ([\d.]+)", row).groups())
        # Random weights over 151,936 tokens know nothing; of a row that is seen twice they learn.
        assert last < first and abs(first - math.log(151_936)) < 0.1


@pytest.mark.slow  # two processes
def test_the_first_step_is_timed_cold_and_warm(monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    command = ["benchmarks.train", "--toy", "--seq", "64", "--sequences", "3", "--first_step"]
    rows = output_of(*command, "--steps", "1", "--remat", "full").splitlines()
    kept, rows = zip(*(row.split(" files of programs kept: ") for row in rows), strict=True)
    assert [row.split()[:4] for row in rows] == [["seq", "64", "bf16", "full"]] * 2
    assert kept[0] == "0" and int(kept[1]) > 0
    losses = [re.search(r"loss ([\d.]+ [\d.]+)", row)[1] for row in rows]
    assert losses[0] == losses[1]
    for row in rows:
        first, compiling = map(
            float, re.search(r"first step ([\d.]+) s, compiling ([\d.]+) s", row).groups()
        )
        assert first > compiling > 0


def test_the_embedding_of_a_timed_step_lies_where_the_plan_puts_it():
    args = train.Args(toy=True, seq=(64,), quantize="none", steps=1, sequences=3)
    here = train.measure(args)
    host = train.measure(dataclasses.replace(args, offload_embedding=True))
    assert (here["offload_embedding"], host["offload_embedding"]) == (False, True)
    assert ", embedding on the host " in train.describe(host, 0.0)
    assert "embedding" not in train.describe(here, 0.0)
    table = 151_936 * 64 * 4
    assert here["weights"] == host["weights"] == here["device_weights"]
    assert host["device_weights"] == here["device_weights"] - table
    assert host["losses"] == pytest.approx(here["losses"], rel=1e-6)


def test_decoding_prints_a_row_for_each_batch():
    lines = output_of("benchmarks.decode", "--toy", "--batch", "1", "2:int8").splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert [(row["batch"], row["cache"]) for row in rows] == [(1, "float32"), (2, "int8")]
    for row in rows:
        assert row["tok/s"] > 0 and row["GB/s"] > 0
        assert row["tokens differ"] > 1  # random weights, sampled: not one token over and over


def test_time_of_kernels_that_run_at_once_is_counted_once():
    assert covered([]) == 0
    assert covered([(0, 4), (10, 11)]) == 5
    assert covered([(5, 7), (0, 4), (1, 2), (3, 6)]) == 7  # within, across, and out of order


def test_training_kernels_are_timed_beside_xla():
    lines = output_of("benchmarks.training_kernels", "--toy", "--implementations", "xla")
    rows = [line.split(" | ") for line in lines.splitlines()[2:]]
    names = "SwiGLU", "SwiGLU in e4m3", "gradient of SwiGLU", "gradient of RMS norm"
    assert [row[:2] for row in rows] == [[name, "xla"] for name in names]
    assert all(float(row[2]) > 0 for row in rows)


def test_variants_of_a_step_take_turns():
    command = ["benchmarks.variants", "--toy", "--seq", "32", "--steps", "1", "--rounds", "2"]
    lines = output_of(*command, "--variants", "as_is", "remat=selective", "wide=4").splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith(("as_is", "remat", "wide"))]
    assert [row[0] for row in rows] == ["as_is", "remat=selective", "wide=4"]
    assert float(rows[0][2]) == 1 and all(float(row[1]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wide", "expected name=value, apart by commas, got 'wide'"),
        ("wid=4", "no 'wid' to change; did you mean 'wide'"),
        ("wide=four", "wide=four: expected a whole number"),
    ],
)
def test_a_variant_that_is_none_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        tiling_of(changes_of(text))
