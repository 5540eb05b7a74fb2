"""Times and memory of the conversion, beside `cp` of the same shards in the same run.

    python -m benchmarks.convert --work DIR             1.8B and 7B of random weights, 72B of zeros
    python -m benchmarks.convert --work DIR --toy       a small model, seconds, for CI

The honest speed is that of random weights, read from a cold page cache; `cp` and the conversion
both count until the disk has everything. 72B is made of sparse files: all its names and shapes, no
disk, zeros when read. That gives the memory and the time at scale. What its conversion writes is
made sparse file by file as it comes (`fallocate --dig-holes`, in the time measured), else none and
int8 would need 145 and 74 GB of disk; its check of free space is switched off for the same reason.

Needs about three times the largest random model of disk, 42 GB for the packed formats of 72B, and
Linux. Everything it makes is removed again.
"""

import dataclasses
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from unittest import mock

import jax
import ml_dtypes
import numpy as np

from benchmarks.watched import Cost, watched
from convert import hf_to_flax
from convert.hf_files import INDEX_NAME
from convert.hf_writer import StreamedTensor, plan_shards, shard_header
from qwen_jax import checkpoint_writer
from qwen_jax.cli import parse, run
from qwen_jax.config import ModelConfig, load_hf_config
from qwen_jax.params import abstract_params, param_table, tree_bytes
from qwen_jax.quant import QuantFormat
from qwen_jax.staging import StagedFolder

_CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
_SHARD_BYTES = 8 * 10**9  # about that of the published base models
_TOY = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "kv_channels": 64}
_TOY |= {"intermediate_size": 1024, "vocab_size": 2048}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Measure conversions."""

    work: pathlib.Path
    """folder for what is made and removed again"""
    sizes: tuple[str, ...] = ("1_8b", "7b", "72b")
    """models, as in configs/; those from 72b on are of zeros"""
    formats: tuple[str, ...] = ("none", "int8", "int4", "nf4")
    """formats to convert into"""
    layers: int | None = None
    """layers of each model, if not all: the peak of memory is that of all from 8 on"""
    toy: bool = False
    """only a small model, with and without zeros"""


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(Args, argv)
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.processor() or platform.machine()}, "
        f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}, Python "
        f"{platform.python_version()}, jax {jax.__version__}, numpy {np.__version__}"
    )
    print(
        "| model | into | wall s | input MB/s | CPU s | peak anonymous MB | disk MB | on paper MB |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    runs = [("toy", False), ("toy", True)] if args.toy else [(s, s == "72b") for s in args.sizes]
    for size, zeros in runs:
        args.work.mkdir(parents=True, exist_ok=True)
        source, output = args.work / f"hf-{size}", args.work / f"out-{size}"
        try:
            total = make_source(source, size, zeros, args.layers)
            if not zeros:
                _row(size, "cp", copy(source, output), total, total, total)
                shutil.rmtree(output)
            for kind in args.formats:
                cost = convert(source, output, kind, zeros)
                paper = paper_bytes(load_hf_config(source), kind)
                written = sum(p.stat().st_size for p in output.rglob("*") if p.is_file())
                _row(size + " zeros" * zeros, kind, cost, total, written, paper)
                shutil.rmtree(output)
        finally:
            for path in (source, output, output.with_name(f".{output.name}.partial")):
                shutil.rmtree(path, ignore_errors=True)


def _row(size: str, kind: str, cost: Cost, total: int, written: int, paper: int) -> None:
    print(
        f"| {size} | {kind} | {cost.wall:.1f} | {total / 1e6 / cost.wall:.0f} | {cost.cpu:.1f} "
        f"| {cost.anonymous / 1e6:.0f} | {written / 1e6:.0f} | {paper / 1e6:.0f} |",
        flush=True,
    )


def paper_bytes(cfg: ModelConfig, kind: str) -> int:
    return tree_bytes(abstract_params(cfg, "bfloat16", QuantFormat.named(kind)))


def make_source(folder: pathlib.Path, size: str, zeros: bool, layers: int | None = None) -> int:
    """Writes a Hugging Face folder of the size's names and shapes; returns the bytes of tensors."""
    folder.mkdir(parents=True)
    config = json.loads((_CONFIGS / f"qwen_{'1_8b' if size == 'toy' else size}.json").read_text())
    config |= _TOY if size == "toy" else {}
    config |= {"num_hidden_layers": layers} if layers else {}
    (folder / "config.json").write_text(json.dumps(config))
    cfg = load_hf_config(folder)
    names = {
        name: StreamedTensor(name, spec.torch_shape, ml_dtypes.bfloat16, ())
        for spec in param_table(cfg)
        for name in spec.torch_names()
    }
    # In the order of the model: the 72B index cuts shards that way, a layer across two of them.
    order = sorted(names, key=lambda name: [int(w) if w.isdigit() else -1 for w in name.split(".")])
    plan = plan_shards([names[name] for name in order], _SHARD_BYTES)
    pool = (np.random.default_rng(0).standard_normal(2**25, np.float32) * 0.02).astype("bfloat16")
    for file, members in plan.items():
        _write_shard(folder / file, members, None if zeros else pool)
    total = sum(tensor.num_bytes for tensor in names.values())
    if len(plan) > 1:
        where = {tensor.name: file for file, members in plan.items() for tensor in members}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX_NAME).write_text(json.dumps(index))
    return total


def _write_shard(
    path: pathlib.Path, members: Sequence[StreamedTensor], pool: np.ndarray | None
) -> None:
    header, _ = shard_header(members)
    total = sum(tensor.num_bytes for tensor in members)
    rng = np.random.default_rng(len(path.name) + total)
    with open(path, "wb") as file:
        file.write(header)
        left = 0 if pool is None else total
        while left > 0:  # slices of the pool from random places: no page is zero, none is alike
            part = pool[int(rng.integers(pool.size // 2)) :][: left // 2].view(np.uint8)
            left -= file.write(part)
        file.truncate(len(header) + total)
        os.fsync(file.fileno())


def forget_pages(folder: pathlib.Path) -> None:
    """Drops the page cache of the shards, so that the next run reads them from the disk."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: pathlib.Path, output: pathlib.Path) -> Cost:
    """`cp` of the shards, until they are on the disk."""
    forget_pages(source)
    output.mkdir()
    shards = sorted(str(path) for path in source.glob("*.safetensors"))
    begin = time.perf_counter()
    cost = watched(["cp", *shards, str(output)])
    for path in output.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return dataclasses.replace(cost, wall=time.perf_counter() - begin)


def convert(source: pathlib.Path, output: pathlib.Path, kind: str, zeros: bool) -> Cost:
    """The converter as a process of its own, imports included."""
    flags = ["--input", str(source), "--output", str(output), "--quantize", kind]
    if not zeros:
        forget_pages(source)
        return watched([sys.executable, "-m", "convert.hf_to_flax", *flags])
    code = "import sys, benchmarks.convert as b; b.convert_sparsely(sys.argv[1:])"
    return watched([sys.executable, "-c", code, *flags])


def convert_sparsely(argv: Sequence[str]) -> None:
    """The converter, on a disk too small for its output: each finished file is made sparse."""
    # A process of its own, begun first: one forked later would for a moment count all memory twice.
    digger = subprocess.Popen(
        ["bash", "-c", 'while read -r file; do fallocate --dig-holes "$file"; echo; done'],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def dig_holes(path: pathlib.Path) -> None:
        """Gives the blocks of zeros back; what is read from the file stays the same."""
        digger.stdin.write(f"{path}\n")
        digger.stdin.flush()
        digger.stdout.readline()

    with (
        digger,
        mock.patch.object(StagedFolder, "check_free"),
        mock.patch.object(checkpoint_writer, "_start_writeback", dig_holes),
    ):
        hf_to_flax.main(argv)


if __name__ == "__main__":
    run(main)
