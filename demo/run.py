"""The main job in small: make a tiny Qwen checkpoint, convert it, fine-tune it, chat with it.

    python -m demo.run [FOLDER]        default: demo_output in the current folder

Every step is a command that is printed before it runs, so that the same lines work on real weights.
The tiny model is random: its base babbles, and only the adapter can know the trained answers.
"""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

from qwen_jax.cli import run
from qwen_jax.errors import InputError

DATA = pathlib.Path(os.path.relpath(pathlib.Path(__file__).parent / "data"))
DATASETS = "demo_alpaca,demo_chat"
QUESTIONS = 4  # shown side by side


def command(title: str, explanation: str, *arguments: object) -> None:
    """Prints one command line, runs it with this Python and stops the demo if it fails."""
    words = [str(argument) for argument in arguments]
    print(f"\n== {title}\n   {explanation}\n{command_line(words)}", flush=True)
    start = time.monotonic()
    finished = subprocess.run([sys.executable, "-m", *words], check=False)
    if finished.returncode:
        raise InputError(f"the step '{title}' ended with exit code {finished.returncode}")
    print(f"   done in {time.monotonic() - start:.0f} s", flush=True)


def command_line(words: list[str]) -> str:
    """The words as one would type them, on lines that fit a terminal."""
    lines = ["$ python -m"]
    flag = ""
    for word in [*words, "--"]:
        if word.startswith("--") and flag:
            if len(lines[-1]) + len(flag) > 96:
                lines[-1] += " \\"
                lines.append("     ")
            lines[-1] += flag
            flag = ""
        flag += " " + shlex.quote(word)
    return "\n".join(lines)


def answers(checkpoint: pathlib.Path, questions: pathlib.Path, *more: object) -> list[str]:
    output = questions.with_suffix(".answers.jsonl")
    command(
        "chat " + ("with the adapter" if more else "with the base model"),
        "The trained answers are expected." if more else "It is random, so it babbles.",
        "sample.generate", "--checkpoint", checkpoint, *more, "--input", questions,
        "--output", output, "--greedy", "--repetition_penalty", "1.0", "--max_new_tokens", "24",
    )  # fmt: skip
    lines = output.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["response"] for line in lines]


def trained_pairs() -> list[tuple[str, str]]:
    info = json.loads((DATA / "dataset_info.json").read_text(encoding="utf-8"))
    rows = json.loads((DATA / info["demo_alpaca"]["file_name"]).read_text(encoding="utf-8"))
    plain = [(row["instruction"], row["output"]) for row in rows if not row.get("input")]
    step = max(1, len(plain) // QUESTIONS)
    return plain[::step][:QUESTIONS]


def main(folder: pathlib.Path) -> None:
    start = time.monotonic()
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    hf, checkpoint, adapter = folder / "qwen-tiny-hf", folder / "qwen-tiny-nf4", folder / "adapter"
    command(
        "make a tiny checkpoint in Hugging Face format",
        "Files, names and tokenizer are those of a published Qwen; the weights are random.",
        "demo.tiny_checkpoint", "--output", hf,
    )  # fmt: skip
    # float32 for what is not quantized: CPUs are slow in bfloat16.
    command(
        "convert it, 4-bit",
        "Linear layers become nf4, the rest stays float32 (CPUs are slow in bfloat16).",
        "convert.hf_to_flax", "--input", hf, "--output", checkpoint, "--quantize", "nf4",
        "--dtype", "float32",
    )  # fmt: skip
    command(
        "train LoRA on 8 virtual devices",
        "The base stays frozen in 4 bits; its adapter learns 30 short dialogues by heart.",
        "train.lora", "--model_name_or_path", checkpoint, "--dataset", DATASETS,
        "--dataset_dir", DATA, "--output_dir", adapter, "--mesh", "8", "--lora_rank", "16",
        "--lora_target", "all", "--per_device_train_batch_size", "1", "--num_train_epochs", "30",
        "--learning_rate", "1.5e-2", "--lr_scheduler_type", "cosine", "--warmup_ratio", "0.1",
        "--logging_steps", "10", "--save_strategy", "no", "--cutoff_len", "64",
    )  # fmt: skip
    pairs = trained_pairs()
    questions = folder / "questions.jsonl"
    questions.write_text(
        "".join(json.dumps({"prompt": q}, ensure_ascii=False) + "\n" for q, _ in pairs),
        encoding="utf-8",
    )
    base = answers(checkpoint, questions)
    tuned = answers(checkpoint, questions, "--adapter", adapter)
    print("\n== base and adapter, side by side")
    for (question, answer), before, after in zip(pairs, base, tuned, strict=True):
        print(f"\n  question  {question}\n  trained   {answer}")
        print(f"  base      {before!r:.100}\n  adapter   {after!r}")
    right = sum(after.strip() == answer for (_, answer), after in zip(pairs, tuned, strict=True))
    print(f"\n{right} of {len(pairs)} answers are the trained ones, word for word.")
    print(
        f"""
Where everything lies (after {time.monotonic() - start:.0f} s):
  {hf}    the tiny checkpoint as Hugging Face has it
  {checkpoint}   converted, 4-bit
  {adapter}         PEFT adapter and training log
Ask it yourself (what it was not taught it cannot know):
  {os.path.relpath(sys.executable)} -m sample.chat --checkpoint {checkpoint} \\
      --adapter {adapter} --greedy --repetition_penalty 1.0
With real weights, the same commands:
  python -m convert.hf_to_flax --input Qwen-72B-Chat --output qwen-72b-nf4 --quantize nf4
  python -m train.lora --model_name_or_path qwen-72b-nf4 --dataset NAME --dataset_dir DIR \\
      --output_dir OUT --lora_target c_attn,attn.c_proj,w1,w2,mlp.c_proj
  python -m sample.chat --checkpoint qwen-72b-nf4 --adapter OUT"""
    )
    if not right:
        raise InputError("no answer is the trained one; the training above did not converge")


if __name__ == "__main__":
    run(lambda: main(pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "demo_output")))
