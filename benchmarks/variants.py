"""The training step with one thing changed, against itself: variants take turns in one process.

    python -m benchmarks.variants --layers 8 --remat selective --variants as_is wide=4 overlap=none
    python -m benchmarks.variants --toy --variants as_is remat=full

Cards, and calls on one card, differ by 1 to 2 %, which is what most changes are worth. A variant
names, apart by commas, `remat`, `compute` or `overlap`, or fields of the product kernel's Tiling;
`as_is` changes nothing. All compile first; then each makes some steps in its turn, again and again,
and what is printed is the median of its turns.
"""

import dataclasses
import functools
import statistics
from unittest import mock

import jax

from benchmarks import train
from benchmarks.gemm import changes_of, tiling_of
from qwen_jax import runtime
from qwen_jax.cli import parse, run
from qwen_jax.kernels import _pallas_gemm
from qwen_jax.remat import Remat
from train.step import Compute


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args(train.Args):
    """Compares variants of a LoRA training step on a Qwen-shaped model with random weights."""

    variants: tuple[str, ...] = ("as_is",)
    """what to compare, the first with the others"""
    rounds: int = 4
    """turns of each"""


def main(argv: list[str] | None = None) -> None:
    runtime.configure()
    args = parse(Args, argv)
    made = train.prepare(args)
    programs = {text: _compiled(made, args, text) for text in args.variants}
    state, times = made.state, {text: [] for text in programs}
    for turn in range(args.rounds + 1):
        for text, program in programs.items():
            state, _, seconds = made.steps(program, state, args.steps)
            if turn:  # the first one warms up
                times[text].append(seconds)
    print(made.mesh.devices.flat[0].device_kind, "jax", jax.__version__)
    print("variant | s/step | of the first | least and most of its turns")
    first = statistics.median(times[args.variants[0]])
    for text, spent in times.items():
        median = statistics.median(spent)
        span = f"{min(spent):.4f} to {max(spent):.4f}"
        print(f"{text} | {median:.4f} | {median / first:.4f} | {span}", flush=True)


def _compiled(made: train.Setup, args: Args, text: str):
    changes = {} if text == "as_is" else changes_of(text)
    remat = changes.pop("remat", None)
    how = Compute(
        remat=made.memory.remat if remat is None else Remat.parse(remat, made.cfg.num_layers),
        products=changes.pop("compute", args.compute[0]),
        mesh=made.mesh,
        overlap=changes.pop("overlap", args.overlap),
    )
    if not changes:
        return made.compiled(how)
    gemm = functools.partial(_pallas_gemm.gemm, tiling=tiling_of(changes))
    with mock.patch.object(_pallas_gemm, "gemm", gemm):
        return made.compiled(how)


if __name__ == "__main__":
    run(main)
