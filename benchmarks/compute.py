"""Does `--compute fp8` train as well as bf16? The loss of both, step by step, on real text.

    python -m benchmarks.compute --checkpoint CKPT --text FILE --work DIR

Three runs of train.lora on the same rows: as the checkpoint computes, with fp8 products, and the
first again with another seed (another fresh adapter and another order of rows), whose distance
from the first is the noise that fp8 must stay within. A run that is complete is not repeated. Then
the three adapters are compared on rows that none of them saw, computed alike.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np

import qwen_jax
from qwen_jax import chatml
from qwen_jax.cli import parse, run
from qwen_jax.errors import InputError
from qwen_jax.files import write_json
from train.report import LOG_FILE

PROMPT = "Go on."
UNSEEN = 60  # rows for the comparison at the end
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


def pick(args: Args) -> tuple[list[str], list[str]]:
    """The pieces of text to train on, one a step, and the unseen ones that lie between some."""
    text = pathlib.Path(args.text).read_text(encoding="utf-8")
    pieces = [text[i : i + args.characters] for i in range(0, len(text), args.characters)]
    if len(pieces) < 2 * args.steps:
        raise InputError(
            f"{args.text} has {len(text)} characters; {args.steps} rows of {args.characters}, and "
            f"as many between them, need {2 * args.steps * args.characters}"
        )
    # Spread over the whole text, so that all of it is seen whatever its length.
    chosen = np.linspace(0, len(pieces) - 1, args.steps).astype(int)
    unseen = (chosen[:-1] + chosen[1:]) // 2
    step = max(1, len(unseen) // UNSEEN)
    return [pieces[i] for i in chosen], [pieces[i] for i in unseen[::step]]


def write_rows(pieces: list[str], folder: pathlib.Path) -> None:
    """One row of text a step, in the alpaca form."""
    rows = [{"instruction": PROMPT, "output": piece} for piece in pieces]
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


def loss_of(checkpoint: str, adapter: pathlib.Path, pieces: list[str]) -> float:
    """Mean loss of the tokens of unseen pieces, computed as the checkpoint does."""
    model = qwen_jax.load(checkpoint, str(adapter))
    total = count = 0
    for piece in pieces:
        turns = [chatml.Turn("user", PROMPT), chatml.Turn("assistant", piece)]
        ids, mask = chatml.encode_training(model.tokenizer, turns)
        padded = np.pad(ids, (0, -len(ids) % 64))  # few lengths, so few programs
        scores = np.asarray(jax.nn.log_softmax(model.logits([padded])[0], axis=-1))
        learned = np.flatnonzero(mask)
        total -= scores[learned - 1, ids[learned]].sum()
        count += len(learned)
    return float(total / count)


def main(argv: list[str] | None = None) -> None:
    args = parse(Args, argv)
    work = pathlib.Path(args.work)
    pieces, unseen = pick(args)
    write_rows(pieces, work / "data")
    folders = {name: work / name.replace(", ", "_") for name in RUNS}
    losses = {
        name: np.array(train(args, work / "data", folders[name], compute, seed))
        for name, (compute, seed) in RUNS.items()
    }
    print("| steps | " + " | ".join(losses) + " |")
    print("|---" * (len(losses) + 1) + "|")
    for start in range(0, args.steps, 25):
        window = slice(start, start + 25)
        cells = [f"{values[window].mean():.4f}" for values in losses.values()]
        print(f"| {start + 1}-{min(start + 25, args.steps)} | " + " | ".join(cells) + " |")
    means = [loss_of(args.checkpoint, folder, unseen) for folder in folders.values()]
    cells = [f"{mean:.4f}" for mean in means]
    print(f"| {len(unseen)} unseen rows | " + " | ".join(cells) + " |")
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
