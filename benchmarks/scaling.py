"""Training on meshes of devices against one of them, in one run: speed, bytes exchanged, losses.

    python -m benchmarks.scaling --layers 80 --meshes data=2 fsdp=2 tensor=2
    python -m benchmarks.scaling --layers 80 --meshes fsdp=2 tensor=2 --base none
    python -m benchmarks.scaling --layers 80 --meshes fsdp=2 --overlap none schedule pipeline
    python -m benchmarks.scaling --toy --meshes data=2 fsdp=2 tensor=2      virtual CPU devices

Each row is one of benchmarks.train, in a process of its own, with --rows sequences for each data or
fsdp device (a tensor axis shares them). What the columns are:

    scaling   tokens/s over those of one device (ideal: as many as the mesh has devices)
    weights   bytes of the frozen base on one device
    sent      GB that each device sends in a step, counted from the compiled program's collectives
              (benchmarks/collectives.py)
    exposed   s/step, less one device's time for the FLOP that a device of the mesh computes: what
              communication, waiting and smaller products cost together
    loss      of the first step, and by how much the first two differ from the same rows trained by
              one device in micro batches

Without a GPU the times say nothing; bytes and losses do.
"""

import dataclasses
import itertools
import math
from typing import Any

from benchmarks import train
from qwen_jax import runtime
from qwen_jax.cli import parse, run
from qwen_jax.errors import UsageError
from qwen_jax.sharding import parse_mesh

# Of losses near 12: bfloat16 sums in another order, or float32 ones (--toy).
CLOSE = {False: 2e-3, True: 1e-5}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Times LoRA training steps on meshes of devices, beside one device in the same run."""

    meshes: tuple[str, ...] = ("data=2", "fsdp=2", "tensor=2")
    """as --mesh has them"""
    config: str = "qwen_72b"
    """a file in configs/"""
    layers: int | None = None
    """unset: as many as the config has"""
    base: str = "nf4"
    """none (bfloat16), int8, int4, nf4"""
    seq: int = 2048
    """tokens of a sequence"""
    rows: int = 1
    """sequences for each data or fsdp device"""
    remat: str = "auto"
    """one for all rows, or auto: each the fastest that fits"""
    compute: str = "bf16"
    """bf16, fp8"""
    overlap: tuple[str, ...] = ("auto",)
    """of exchange and computation: auto, none, schedule, pipeline; a row for each"""
    lora_rank: int = 8
    """of all five targets"""
    steps: int = 5
    """timed steps, after two that are not"""
    toy: bool = False
    """a tiny model, for a machine without a GPU"""
    no_reference: bool = False
    """leave one device out: a base that it cannot hold"""


def main(argv: list[str] | None = None) -> None:
    runtime.configure()
    args = parse(Args, argv)
    train.check_numbers(args, "rows", "seq", "steps", "lora_rank")
    sizes = {text: parse_mesh(text) for text in args.meshes}
    if not sizes:
        raise UsageError("--meshes names no mesh")
    one = None if args.no_reference else measured(args, "1", args.rows)
    if one:
        print(describe(one, None, None, args.toy), flush=True)
    same: dict[int, Any] = {args.rows: one}
    failed = []
    for (text, mesh), overlap in itertools.product(sizes.items(), args.overlap):
        rows = args.rows * mesh["data"] * mesh["fsdp"]
        row = measured(args, text, rows, overlap)
        if row is None:
            failed.append(text)
            continue
        if rows not in same:
            same[rows] = None if one is None else reference(args, rows)
        print(describe(row, one, same[rows], args.toy), flush=True)
        if same[rows] and difference(row, same[rows]) > CLOSE[args.toy]:
            failed.append(f"{text} (loss)")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def measured(args: Args, mesh: str, batch: int, overlap: str = "auto", **more) -> dict | None:
    """One row of benchmarks.train, its mesh and overlap with it."""
    wanted = train.Args(
        config=args.config,
        layers=args.layers,
        batch=batch,
        quantize=args.base,
        lora_rank=args.lora_rank,
        mesh=mesh,
        overlap=overlap,
        toy=args.toy,
        **({"steps": args.steps} | more),
    )
    row = train.in_child(wanted, args.seq, args.compute, args.remat)
    return row and row | {"mesh": mesh, "overlap": overlap, "sizes": parse_mesh(mesh)}


def reference(args: Args, rows: int) -> dict | None:
    """The same rows on one device, as micro batches of `args.rows`: for the losses alone."""
    careful = dataclasses.replace(args, remat="full")
    return measured(careful, "1", args.rows, accumulate=rows // args.rows, steps=1)


def difference(row: dict, same: dict) -> float:
    """The largest relative difference of the first two losses."""
    pairs = zip(row["losses"], same["losses"], strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def exposed(row: dict, one: dict) -> float:
    """Seconds of a step beyond one device's for the FLOP that a device of the mesh computes."""
    share = row["tokens"] * row["computed"] / (one["tokens"] * one["computed"] * row["devices"])
    return row["seconds"] - share * one["seconds"]


def describe(row: dict, one: dict | None, same: dict | None, toy: bool) -> str:
    """The row as a line."""
    rate = row["tokens"] / row["seconds"]
    line = (
        f"{row['mesh']:<22} {row['overlap']:<8} {row['remat']:<22} {row['seconds']:8.4f} s/step "
        f"{rate:9.1f} tok/s"
    )
    if one:
        line += f"  scaling {rate * one['seconds'] / one['tokens']:5.2f} of {row['devices']}"
    line += f"  weights {row['device_weights'] / 1e9:6.2f} GB  peak {row['peak'] / 1e9:6.2f} GB"
    if row["devices"] > 1:
        sent = math.fsum(row["sent"].values())
        kinds = ", ".join(f"{kind} {size / 1e9:.3g}" for kind, size in row["sent"].items())
        line += f"  sent {sent / 1e9:.3g} GB a device ({kinds})"
        line += f"  exposed {exposed(row, one):.4f} s" if one else ""
    line += f"  loss {row['losses'][0]:.4f}"
    if same:
        found = difference(row, same)
        line += f", differs by {found:.1e}{'' if found <= CLOSE[toy] else ': TOO MUCH'}"
    return f"{line}  {row['device']}, jax {row['jax']}"


if __name__ == "__main__":
    run(main)
