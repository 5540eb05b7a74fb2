"""The conversion benchmark in small: it runs, and its figures are those of the files."""

import pathlib

import numpy as np

from benchmarks import convert as benchmark
from benchmarks.watched import watched
from convert.hf_files import HfWeights
from demo.tiny_checkpoint import tensor_shapes


def test_toy(tmp_path, capsys):
    benchmark.main(["--work", str(tmp_path / "work"), "--toy", "--formats", "nf4"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[3:]]
    assert [(row[0].strip(), row[1].strip()) for row in rows] == [
        ("toy", "cp"),
        ("toy", "nf4"),
        ("toy zeros", "nf4"),
    ]
    for row in rows[1:]:
        disk, paper = float(row[6]), float(row[7])
        assert paper <= disk <= paper * 1.1 + 1
    assert not list((tmp_path / "work").iterdir())


def test_source_of_72b_has_the_published_size_and_takes_no_disk(tmp_path):
    total = benchmark.make_source(tmp_path / "hf", "72b", zeros=True)
    assert total == 144_575_840_256  # total_size of the published index
    weights = HfWeights(tmp_path / "hf")
    want = tensor_shapes(
        hidden_size=8192, num_layers=80, attention_size=8192, ffn=24576, vocab_size=152064
    )
    assert {name: weights.shape(name) for name in weights.names()} == want
    assert sum(path.stat().st_blocks * 512 for path in (tmp_path / "hf").iterdir()) < 1e6
    assert not weights.read("lm_head.weight", slice(0, 10)).any()


def test_random_source_has_no_page_of_zeros(tmp_path):
    benchmark.make_source(tmp_path / "hf", "toy", zeros=False)
    data = (tmp_path / "hf/model.safetensors").read_bytes()
    pages = np.frombuffer(data[: len(data) // 4096 * 4096], np.uint8).reshape(-1, 4096)
    assert pages.any(axis=1).all() and len(np.unique(pages, axis=0)) == len(pages)


def test_anonymous_memory_of_a_child_of_the_command_counts(tmp_path):
    grown = "x = bytearray(b'1' * 200_000_000); import time; time.sleep(1)"
    script = tmp_path / "parent.py"
    script.write_text(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grown!r}])")
    cost = watched(["python3", str(pathlib.Path(script))])
    assert 200e6 < cost.anonymous < 500e6 and cost.wall > 1
