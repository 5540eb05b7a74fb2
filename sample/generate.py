"""Answers one prompt or a file of them: `python -m sample.generate --checkpoint C --prompt TEXT`.

An input line is {"prompt": "..."} or {"messages": [{"role": ..., "content": ...}, ...]}, an output
line {"prompt": ..., "response": "..."}. Settings that are not given come from the checkpoint's
generation_config.json. Row i of a file draws with seed + i, so its text depends neither on
--batch_size nor on the other rows.

With --output FILE rows gather in FILE.partial as they finish; a run that was stopped goes on
from there when its command is given again, and FILE appears when all rows are there.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qwen_jax import api, chatml, runtime
from qwen_jax.adapters import ADAPTER_WEIGHTS
from qwen_jax.cli import parse, run
from qwen_jax.engine import MOST_DRAFTS
from qwen_jax.errors import InputError, UsageError
from qwen_jax.manifest import planned_manifest
from qwen_jax.sampling import SamplingParams, check_setting
from sample.answers_file import AnswersFile
from sample.plan import MOST, PlanFlags, check_plan_flags, print_plan


@dataclass(kw_only=True)
class LoadFlags(PlanFlags):
    """What every program that loads a model asks for."""

    checkpoint: str
    """folder that convert wrote"""
    adapter: str | None = None
    """folder of a PEFT LoRA adapter"""
    int8_head: bool = False
    """output head in int8, for weights packed for Hopper cards: a faster step, other rounding"""
    system: str = chatml.DEFAULT_SYSTEM
    """system message"""


@dataclass(kw_only=True)
class ModelFlags(LoadFlags):
    """How the tokens of an answer are drawn."""

    greedy: bool = False
    """the likeliest token every time"""
    temperature: float | None = None
    """divides the logits; 0 is --greedy; unset: as in generation_config.json"""
    top_k: int | None = None
    """tokens to draw from, the likeliest; 0: all; unset: as in generation_config.json"""
    top_p: float | None = None
    """probability, 0 to 1, that the tokens to draw from have together; unset: as there"""
    repetition_penalty: float | None = None
    """over 1 makes tokens of prompt and answer less likely; unset: as there"""
    max_new_tokens: int | None = None
    """longest answer, in tokens; unset: as there"""
    seed: int = 0
    """the same seed gives the same text"""
    drafts: int = 0
    """tokens guessed ahead where the text repeats itself (7 is a good number); one prompt alone"""


@dataclass(kw_only=True)
class Args(ModelFlags):
    """Generate text for one prompt or a file of them."""

    prompt: str | None = None
    """the prompt itself"""
    input: str | None = None
    """JSONL file, a {"prompt": ...} or {"messages": [...]} a line"""
    output: str | None = None
    """JSONL file, whole when it appears, rows gather in FILE.partial; unset: standard output"""
    raw: bool = False
    """the prompt is plain text to be continued, no chat message"""
    batch_size: int = 8
    """prompts that run together"""


@dataclass(frozen=True)
class Request:
    """One row: what the user gave, its token ids, how to continue it."""

    prompt: Any
    ids: list[int]
    params: SamplingParams


def check_load_flags(flags: LoadFlags) -> None:
    """UsageError for what no checkpoint could make right, before minutes of loading."""
    for name in ("checkpoint", "adapter"):
        if getattr(flags, name) == "":
            raise UsageError(f"--{name} is empty")
    check_plan_flags(flags)


def check_flags(flags: ModelFlags) -> None:
    """check_load_flags, and the same of how tokens are drawn."""
    check_load_flags(flags)
    if not 0 <= flags.drafts <= MOST_DRAFTS:
        raise UsageError(f"--drafts is {flags.drafts}; expected 0 (none) to {MOST_DRAFTS}")
    settings = ("top_k", "top_p", "repetition_penalty", "max_new_tokens", "seed")
    # A temperature of 0 means greedy.
    for name in (*settings, "temperature") if flags.temperature else settings:
        if (value := getattr(flags, name)) is not None:
            try:
                check_setting(name, value)
            except InputError as error:
                raise UsageError(f"--{error}") from None


def open_model(flags: LoadFlags) -> api.Model:
    """Loads what the flags name; warnings about its settings go to standard error."""
    model = api.load(
        flags.checkpoint, flags.adapter, flags.mesh, flags.dtype,
        cache_dtype=flags.cache_dtype, int8_head=flags.int8_head,
        drafts=flags.drafts if isinstance(flags, ModelFlags) else 0,
    )  # fmt: skip
    for warning in model.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return model


def sampling_params(flags: ModelFlags, model: api.Model) -> SamplingParams:
    """The model's own settings with those of the command line over them."""
    return model.defaults.sampling_params(
        greedy=flags.greedy or None,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        repetition_penalty=flags.repetition_penalty,
        max_new_tokens=flags.max_new_tokens,
        seed=flags.seed,
    )


def read_prompts(path: pathlib.Path) -> list[tuple[str, str | list[chatml.Turn]]]:
    """(place, prompt or turns) of each line; InputError with file and line for a bad one."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--input {path} cannot be read: {error}") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{path}: line {number}"
            prompts.append((place, _read_line(line, place)))
    if not prompts:
        raise InputError(f"--input {path} holds no prompt; expected one JSON object a line")
    return prompts


def _read_line(line: str, place: str) -> str | list[chatml.Turn]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not valid JSON: {error}") from None
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise InputError(f'{place}: expected an object with either "prompt" or "messages"')
    if "prompt" in row:
        if not isinstance(row["prompt"], str):
            raise InputError(f"{place}: the prompt is {row['prompt']!r}; expected text")
        return row["prompt"]
    messages = row["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
    ):
        raise InputError(f'{place}: messages must be a list of {{"role": ..., "content": ...}}')
    return [chatml.Turn(m["role"], m["content"]) for m in messages]


def make_request(
    model: api.Model, given: str | list[chatml.Turn], params: SamplingParams, system: str, raw: bool
) -> Request:
    """Encodes one prompt, plain or as a chat."""
    tokenizer = model.tokenizer
    turns = [chatml.Turn("user", given)] if isinstance(given, str) else given
    for text in (turn.content for turn in turns if isinstance(turn.content, str)):
        if re.search("[\ud800-\udfff]", text):
            raise InputError("the prompt is no UTF-8 text (half a surrogate pair); mend it")
    if raw:
        if not isinstance(given, str):
            raise InputError("messages cannot be continued as plain text; leave out --raw")
        if not given:
            raise InputError("the prompt is empty; plain text needs something to continue")
        return Request(given, tokenizer.encode(given), params)
    ids = chatml.encode_prompt(tokenizer, turns, system, model.defaults.max_window_size)
    shown = given if isinstance(given, str) else [dataclasses.asdict(turn) for turn in given]
    return Request(shown, ids, params)


def answers(
    model: api.Model, requests: list[Request], batch_size: int, raw: bool
) -> Iterator[tuple[str, int]]:
    """Text and number of tokens of each answer, in order."""
    tokenizer = model.tokenizer
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        generated = model.engine.generate([r.ids for r in batch], [r.params for r in batch])
        for ids in generated:
            text = tokenizer.decode(ids, skip_special=True)
            yield (text if raw else chatml.decode_answer(tokenizer, ids)), len(ids)


def run_settings(args: Args, model: api.Model, params: SamplingParams, raw: bool) -> dict[str, Any]:
    """All that decides a row's text beside its prompt: a run with other values is another run."""
    adapter = None
    if args.adapter is not None:
        with open(pathlib.Path(args.adapter) / ADAPTER_WEIGHTS, "rb") as file:
            adapter = hashlib.file_digest(file, "sha256").hexdigest()
    quantization = model.manifest.quantization
    return {
        "checkpoint": model.manifest.fingerprint,
        "quantization": dataclasses.asdict(quantization) if quantization else None,
        "dtype": args.dtype or model.manifest.dtype,
        "cache_dtype": str(model.engine.cache_dtype),
        "int8_head": args.int8_head,
        "adapter": adapter,
        "raw": raw,
        "system": args.system,
        "max_window_size": model.defaults.max_window_size,
        **dataclasses.asdict(params),
    }


def write_answers(
    output: AnswersFile, model: api.Model, requests: list[Request], batch_size: int, raw: bool
) -> tuple[int, int]:
    """Answers what is not yet in `output` and finishes it; returns how many, and their tokens."""
    with output:
        if output.done:
            print(
                f"{output.partial}: {output.done} of {len(requests)} answers are there, going on",
                file=sys.stderr,
            )
        rest = requests[output.done :]
        count = tokens = 0
        try:
            for row, length in answer_rows(model, rest, batch_size, raw):
                output.add(row)
                count, tokens = count + 1, tokens + length
        except BaseException:
            print(
                f"stopped; {output.done + count} of {len(requests)} answers are in "
                f"{output.partial}, the same command goes on from there",
                file=sys.stderr,
            )
            raise
        output.finish()
    return count, tokens


def answer_rows(
    model: api.Model, requests: list[Request], batch_size: int, raw: bool
) -> Iterator[tuple[dict[str, Any], int]]:
    """The output row of each request, and its number of tokens."""
    texts = answers(model, requests, batch_size, raw)
    for request, (text, length) in zip(requests, texts, strict=True):
        yield {"prompt": request.prompt, "response": text}, length


def _check(args: Args) -> None:
    check_flags(args)
    if not args.plan and (args.prompt is None) == (args.input is None):
        raise UsageError("give either --prompt TEXT or --input FILE.jsonl")
    if not 1 <= args.batch_size <= MOST:
        raise UsageError(f"--batch_size is {args.batch_size}; expected 1 to {MOST}")
    if args.drafts and args.input is not None and args.batch_size > 1:
        raise UsageError("--drafts are for one prompt at a time; give --batch_size 1 with --input")
    if args.output is not None:
        path = pathlib.Path(args.output)
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise InputError(f"--output {path}: expected a file in a folder that exists")


def main(argv: list[str] | None = None) -> None:
    runtime.configure()
    args = parse(Args, argv)
    _check(args)
    if args.plan:
        manifest = planned_manifest(args.checkpoint)
        print_plan(args, manifest, rows=args.batch_size, adapter=args.adapter is not None)
        return
    if args.prompt is None:
        given = read_prompts(pathlib.Path(args.input))
    else:
        given = [("--prompt", args.prompt)]
    model = open_model(args)
    raw = args.raw or model.defaults.chat_format == "raw"
    params = sampling_params(args, model)
    requests = []
    for index, (place, prompt) in enumerate(given):
        own = dataclasses.replace(params, seed=(params.seed + index) % 2**32)
        try:
            requests.append(make_request(model, prompt, own, args.system, raw))
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
    begin = time.perf_counter()
    if args.output is None:
        count = tokens = 0
        for row, length in answer_rows(model, requests, args.batch_size, raw):
            print(json.dumps(row, ensure_ascii=False), flush=True)
            count, tokens = count + 1, tokens + length
    else:
        settings = run_settings(args, model, params, raw)
        prompts = [request.prompt for request in requests]
        output = AnswersFile(pathlib.Path(args.output), settings, prompts)
        count, tokens = write_answers(output, model, requests, args.batch_size, raw)
    seconds = time.perf_counter() - begin
    print(
        f"{count} answers, {tokens} tokens in {seconds:.1f} s, compilation included: "
        f"{tokens / seconds:.1f} tok/s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    run(main)
