"""Does `--compute fp8` train as well as bf16? The loss of both, step by step, on real text.

    python -m benchmarks.compute --checkpoint CKPT --text FILE --work DIR

Three runs of train.lora on the same rows: as the checkpoint computes, with fp8 products, and the
first again with another seed (another fresh adapter and another order of rows), whose distance
from the first is the noise that fp8 must stay within. A run that is complete is not repeated.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np

from qwen_jax.cli import parse, run
from qwen_jax.errors import InputError
from qwen_jax.files import write_json
from train.report import LOG_FILE

RUNS = {"bf16": ("bf16", 1), "fp8": ("fp8", 1), "bf16, other seed": ("bf16", 2)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Compares the losses of training in bf16 and fp8."""

    checkpoint: str
    """a converted chat model"""
    text: str
    """a file of real text; its parts are the answers to be learned"""
    work: str
    """folder for rows and runs"""
    steps: int = 200
    """optimizer steps of each run, one row each"""
    characters: int = 240
    """of one row"""
    learning_rate: float = 1e-4
    """its peak"""


def write_rows(args: Args, folder: pathlib.Path) -> None:
    """One row of text a step, in the alpaca form."""
    text = pathlib.Path(args.text).read_text(encoding="utf-8")
    pieces = [text[i : i + args.characters] for i in range(0, len(text), args.characters)]
    if len(pieces) < args.steps:
        raise InputError(
            f"{args.text} has {len(text)} characters; {args.steps} rows of {args.characters} need "
            f"{args.steps * args.characters}"
        )
    # Spread over the whole text, so that all of it is seen whatever its length.
    chosen = np.linspace(0, len(pieces) - 1, args.steps).astype(int)
    rows = [{"instruction": "Go on.", "output": pieces[i]} for i in chosen]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    write_json(folder / "dataset_info.json", {"rows": {"file_name": "rows.json"}})


def train(args: Args, data: pathlib.Path, out: pathlib.Path, compute: str, seed: int) -> list:
    """The losses of one run, by step."""
    if not (out / "adapter_config.json").exists():
        flags = [sys.executable, "-m", "train.lora", "--model_name_or_path", args.checkpoint]
        flags += ["--dataset", "rows", "--dataset_dir", str(data), "--output_dir", str(out)]
        flags += ["--compute", compute, "--seed", str(seed), "--max_steps", str(args.steps)]
        flags += ["--learning_rate", str(args.learning_rate), "--lr_scheduler_type", "cosine"]
        flags += ["--warmup_steps", "10", "--logging_steps", "1", "--save_steps", "25"]
        subprocess.run(flags, check=True)
    lines = (out / LOG_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def main(argv: list[str] | None = None) -> None:
    args = parse(Args, argv)
    work = pathlib.Path(args.work)
    write_rows(args, work / "data")
    losses = {
        name: np.array(train(args, work / "data", work / name.replace(", ", "_"), compute, seed))
        for name, (compute, seed) in RUNS.items()
    }
    print("| steps | " + " | ".join(losses) + " |")
    print("|---" * (len(losses) + 1) + "|")
    for start in range(0, args.steps, 25):
        window = slice(start, start + 25)
        cells = [f"{values[window].mean():.4f}" for values in losses.values()]
        print(f"| {start + 1}-{min(start + 25, args.steps)} | " + " | ".join(cells) + " |")
    difference = losses["fp8"] - losses["bf16"]
    half = difference[args.steps // 2 :]
    error = half.std(ddof=1) / np.sqrt(len(half))
    noise = losses["bf16, other seed"].mean() - losses["bf16"].mean()
    print(
        f"fp8 - bf16, same rows: mean {difference.mean():+.4f}, second half {half.mean():+.4f}"
        f" +- {error:.4f}, largest {np.abs(difference).max():.4f}; another seed: {noise:+.4f}"
    )


if __name__ == "__main__":
    run(main)
