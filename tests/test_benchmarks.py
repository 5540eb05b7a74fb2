"""The two large benchmarks, typed as a user does, at the size that a CPU can do."""

import json
import math
import re
import subprocess
import sys


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
        seconds, rate = map(float, re.search(r"([\d.]+) s/step +([\d.]+) tok/s", row).groups())
        assert math.isclose(seconds * rate, 64, rel_tol=0.05)
        first, last = map(float, re.search(r"loss ([\d.]+) ([\d.]+)", row).groups())
        # Random weights over 152,064 tokens know nothing; of a row that is seen twice they learn.
        assert last < first and abs(first - math.log(152_064)) < 0.1


def test_decoding_prints_a_row_for_each_batch():
    lines = output_of("benchmarks.decode", "--toy", "--batch", "1", "2:int8").splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert [(row["batch"], row["cache"]) for row in rows] == [(1, "float32"), (2, "int8")]
    for row in rows:
        assert math.isclose(row["tok/s"] * row["ms/step"], 1000 * row["batch"], rel_tol=0.05)
        assert row["GB/s"] > 0
