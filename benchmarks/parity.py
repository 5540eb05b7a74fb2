"""How close each format comes to transformers, on a real model in both layouts.

    python -m benchmarks.parity --qwen1 HF_DIR --qwen2 HF_DIR [--work DIR]

--qwen1 is a folder in the original Qwen layout, --qwen2 the same weights for transformers' Qwen2.
Converts the first in every format, compares logits, greedy tokens and next-token loss with the
second in float32, then fine-tunes for a few steps, runs the adapter in PEFT as well, and chats. It
calls our programs as a user would, and prints Markdown. Needs the `test` extra.
"""

import dataclasses
import json
import math
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
import peft
import torch
import tqdm
import transformers

from benchmarks import reference
from benchmarks.texts import QUESTIONS, TEXTS
from qwen_jax import api, chatml
from qwen_jax.checkpoint import StoredParams
from qwen_jax.cli import parse, run
from qwen_jax.engine import Engine
from qwen_jax.errors import InputError
from qwen_jax.params import param_table
from qwen_jax.sampling import SamplingParams
from qwen_jax.tokenizer import Tokenizer

TEXT_TOKENS = 500
GREEDY_TOKENS = 64
DATA = pathlib.Path(__file__).parents[1] / "demo" / "data"
# Name, --quantize, --dtype, compute dtype. Quantized weights are compared in float32: what is left
# is then the quantization alone.
FORMATS = (
    ("float32", "none", "float32", "float32"),
    ("bfloat16", "none", "bfloat16", "bfloat16"),
    ("int8", "int8", "bfloat16", "float32"),
    ("int4", "int4", "bfloat16", "float32"),
    ("nf4", "nf4", "bfloat16", "float32"),
)
HEADER = (
    "format", "computes in", "logits: largest difference", "mean", "same best token",
    "largest difference from dequantized", "greedy tokens equal", "loss", "perplexity", "on disk",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Compare every format with transformers on a real model."""

    qwen1: pathlib.Path
    """folder in the original Qwen layout"""
    qwen2: pathlib.Path
    """the same weights for transformers' Qwen2ForCausalLM"""
    work: pathlib.Path = pathlib.Path("parity_output")
    """folder for checkpoints, which a second run uses again"""
    train_steps: int = 8
    """optimizer steps of the fine-tuning; 0 leaves it out"""


@dataclasses.dataclass
class Expected:
    """What transformers says in float32."""

    texts: list[list[int]]  # token ids; the loss is that of these
    prompts: list[list[int]]  # chat prompts, continued greedily
    logits: list[np.ndarray]  # [T, V] of texts and prompts
    greedy: list[list[int]]
    margins: list[list[float]]  # best score less second best, for each greedy token


@dataclasses.dataclass
class Difference:
    """Logits against logits, summed up over texts."""

    largest: float = 0.0
    total: float = 0.0
    elements: int = 0
    same: int = 0
    positions: int = 0

    def add(self, ours: np.ndarray, theirs: np.ndarray) -> None:  # both [T, V]
        gap = np.abs(ours - theirs)
        # A NaN must show: max() would drop it.
        self.largest = float(np.maximum(self.largest, gap.max()))
        self.total += float(gap.sum(dtype=np.float64))
        self.elements += gap.size
        self.same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        self.positions += len(gap)

    @property
    def mean(self) -> float:
        return self.total / max(self.elements, 1)


def next_token_loss(
    logits: np.ndarray,  # [T, V]
    ids: Sequence[int],
) -> float:
    """The mean of -log p(next token) over T - 1 places, in nats."""
    scores = torch.tensor(logits[:-1])
    return float(torch.nn.functional.cross_entropy(scores, torch.tensor(ids[1:])))


def leading_equal(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens are the same before the first that differs."""
    pairs = enumerate(zip(ours, theirs, strict=True))
    return next((i for i, (a, b) in pairs if a != b), len(theirs))


def agreement(ours: Sequence[int], theirs: Sequence[int], margins: Sequence[float]) -> str:
    """'64', or '17 (0.021)': equal tokens, and the reference's margin where they part."""
    count = leading_equal(ours, theirs)
    return str(count) if count == len(theirs) else f"{count} ({margins[count]:.2g})"


def folder_bytes(folder: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def program(name: str, *arguments: object, given: str | None = None) -> str:
    """Runs one of our programs as a user would; what it prints is returned if input is `given`."""
    words = [name, *map(str, arguments)]
    print(f"$ python -m {' '.join(words)}", flush=True)
    stdout = None if given is None else subprocess.PIPE
    done = subprocess.run(
        [sys.executable, "-m", *words], input=given, stdout=stdout, text=True, check=False
    )
    if done.returncode:
        raise InputError(f"{name} ended with exit code {done.returncode}")
    return done.stdout or ""


def expected(model: torch.nn.Module, tokenizer: Tokenizer) -> Expected:
    texts = [tokenizer.encode(text)[:TEXT_TOKENS] for text in TEXTS.values()]
    prompts = [
        chatml.encode_prompt(tokenizer, [chatml.Turn("user", question)])
        for question in QUESTIONS.values()
    ]
    logits = [reference.logits(model, ids) for ids in tqdm.tqdm(texts + prompts, "transformers")]
    print(f"transformers: {GREEDY_TOKENS} greedy tokens for each question", flush=True)
    greedy, margins = reference.greedy(model, prompts, GREEDY_TOKENS)
    return Expected(texts, prompts, logits, greedy, margins)


def mean_loss(logits: Sequence[np.ndarray], texts: Sequence[Sequence[int]]) -> float:
    """All texts have one length, so the mean of means is the mean over tokens."""
    return float(np.mean([next_token_loss(x, ids) for x, ids in zip(logits, texts, strict=True)]))


def convert(args: Args, name: str, quantize: str, dtype: str) -> pathlib.Path:
    checkpoint = args.work / name
    if (checkpoint / "manifest.json").is_file():
        print(f"{checkpoint} is there already")
    else:
        program("convert.hf_to_flax", "--input", args.qwen1, "--output", checkpoint,
                "--quantize", quantize, "--dtype", dtype)  # fmt: skip
    return checkpoint


def put_dequantized(model: torch.nn.Module, checkpoint: pathlib.Path) -> None:
    """Gives the torch model the linear weights that a quantized checkpoint stands for."""
    stored = StoredParams(checkpoint)
    for spec in tqdm.tqdm(param_table(stored.manifest.config), "dequantized into transformers"):
        for layer in range(spec.layers if spec.role == "linear" else 0):
            q = stored.read(spec, layer)
            weight = reference.dequantized(q.kind, q.data, q.scale, q.scale_absmax, q.scale_offset)
            module = spec.torch_module.partition("{layer}.")[2]
            reference.replace_weight(model, layer, module, weight)


def measure(
    name: str, checkpoint: pathlib.Path, compute: str, want: Expected, model: torch.nn.Module
) -> tuple[str, ...]:
    """One row of the table; `model` may get other weights on the way."""
    ours = api.load(checkpoint, dtype=compute)
    quantized = ours.manifest.quantization is not None
    if quantized:
        put_dequantized(model, checkpoint)
    difference, rest, losses = Difference(), Difference(), []
    for index, ids in enumerate(tqdm.tqdm(want.texts + want.prompts, name)):
        logits = np.asarray(ours.logits([ids])[0])
        difference.add(logits, want.logits[index])
        if index < len(want.texts):
            losses.append(next_token_loss(logits, ids))
        if quantized and index < len(want.texts):
            rest.add(logits, reference.logits(model, ids))
    # Without stop ids, so that every answer has all its tokens.
    engine = Engine(ours.config, ours.params, n_vocab=ours.tokenizer.n_vocab)
    params = SamplingParams(greedy=True, max_new_tokens=GREEDY_TOKENS)
    answers = engine.generate(want.prompts, params)
    equal = map(agreement, answers, want.greedy, want.margins)
    loss = float(np.mean(losses))
    return (
        name,
        compute,
        f"{difference.largest:.2g}",
        f"{difference.mean:.2g}",
        f"{difference.same / difference.positions:.2%}",
        f"{rest.largest:.2g}" if quantized else "",
        ", ".join(equal),
        f"{loss:.4f}",
        f"{math.exp(loss):.3f}",
        f"{folder_bytes(checkpoint) / 1e9:.2f} GB",
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fine_tune(args: Args, checkpoint: pathlib.Path) -> pathlib.Path:
    """A few steps of QLoRA on the demo's rows; InputError unless the loss fell."""
    adapter = args.work / "adapter"
    program(
        "train.lora", "--model_name_or_path", checkpoint, "--quantization_bit", 4,
        "--dataset", "demo_alpaca", "--dataset_dir", DATA, "--output_dir", adapter,
        "--overwrite_output_dir", "--max_steps", args.train_steps, "--logging_steps", 1,
        "--per_device_train_batch_size", 4, "--learning_rate", 2e-4, "--cutoff_len", 128,
        "--save_strategy", "no",
    )  # fmt: skip
    lines = (adapter / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    print("loss of each step: " + ", ".join(f"{loss:.3f}" for loss in losses))
    half = len(losses) // 2
    if not np.mean(losses[half:]) < np.mean(losses[:half]):
        raise InputError(f"the loss did not fall in {len(losses)} steps: {losses}")
    return adapter


def compare_adapter(
    args: Args, checkpoint: pathlib.Path, adapter: pathlib.Path, ids: list[int]
) -> None:
    """The adapter on our model, and PEFT with it on transformers' model."""
    ours = np.asarray(api.load(checkpoint, adapter).logits([ids])[0])
    renamed = args.work / "adapter-qwen2"
    reference.write_qwen2_adapter(adapter, renamed)
    model = reference.load_qwen2(args.qwen2)
    reference.expand_key_value_heads(model)
    before = reference.logits(model, ids)
    theirs = reference.logits(peft.PeftModel.from_pretrained(model, renamed), ids)
    effect, difference = Difference(), Difference()
    effect.add(theirs, before)
    difference.add(ours, theirs)
    print(
        f"adapter: moves logits by up to {effect.largest:.2g}; ours and PEFT's then differ by up "
        f"to {difference.largest:.2g}, mean {difference.mean:.2g}"
    )


def describe_machine() -> str:
    device = jax.devices()[0]
    versions = (f"{m.__name__} {m.__version__}" for m in (jax, torch, transformers, peft))
    return (
        f"{time.strftime('%Y-%m-%d')}, {device.device_kind} ({device.platform}), "
        f"Python {platform.python_version()}, {', '.join(versions)}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(Args, argv)
    args.work.mkdir(parents=True, exist_ok=True)
    print(describe_machine())
    model = reference.load_qwen2(args.qwen2)
    want = expected(model, Tokenizer.from_dir(args.qwen1))
    reference.expand_key_value_heads(model)
    loss = mean_loss(want.logits[: len(want.texts)], want.texts)
    rows = [("transformers", "float32", *[""] * 5, f"{loss:.4f}", f"{math.exp(loss):.3f}", "")]
    for name, quantize, dtype, compute in FORMATS:
        checkpoint = convert(args, name, quantize, dtype)
        rows.append(measure(name, checkpoint, compute, want, model))
        print(f"{name}: {'; '.join(rows[-1][2:])}", flush=True)
    print("\n" + markdown(rows) + "\n", flush=True)
    del model
    if args.train_steps:
        plain = args.work / "float32"
        adapter = fine_tune(args, plain)
        compare_adapter(args, plain, adapter, want.texts[1])
        question = "Who are you?"
        answer = program("sample.chat", "--checkpoint", plain, "--adapter", adapter, "--greedy",
                         "--max_new_tokens", 32, given=question + "\n")  # fmt: skip
        print(f"> {question}\n{answer.strip()}")


if __name__ == "__main__":
    run(main)
