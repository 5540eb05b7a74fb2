"""What an int8 KV cache and an int8 output head cost: next-token loss and greedy answers.

    python -m benchmarks.kv_cache --checkpoint CKPT     a converted model with its tokenizer
    python -m benchmarks.kv_cache --toy                 a tiny random one, in seconds

Fixed texts run through the decoder's cache in chunks. Every query reads what the cache holds,
its own key among it, so the numbers are those of decoding token by token. Then a few questions are
answered greedily. Everything is compared with cache and head in the compute dtype, float32 by
default, so that what differs is the rounding to int8 alone. Prints Markdown.
"""

import dataclasses
import functools
import math
import pathlib
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.texts import QUESTIONS, TEXTS
from qwen_jax import api, chatml, model
from qwen_jax.cache import abstract_cache, init_cache
from qwen_jax.cli import parse, run
from qwen_jax.config import ModelConfig
from qwen_jax.engine import Engine
from qwen_jax.errors import InputError, UsageError
from qwen_jax.memory import device_bytes
from qwen_jax.params import init_params
from qwen_jax.quant import QuantFormat, dequantize, quantize
from qwen_jax.sampling import SamplingParams

HEADER = (
    "cache", "head", "loss", "over {dtype}", "perplexity", "same best token",
    "bytes of cache a token", "greedy tokens equal",
)  # fmt: skip
# As if no channel of the keys were large by its bias: what the units are good for.
WITHOUT_UNITS = "int8, keys as they come"
TOY = ModelConfig(
    vocab_size=211, hidden_size=64, num_layers=2, num_heads=4, head_dim=16, ffn_size=128
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Measures what int8 costs in the cache and in the output head."""

    checkpoint: pathlib.Path | None = None
    """folder that convert wrote, with a tokenizer"""
    dtype: str = "float32"
    """compute dtype, and that of the cache that int8 is compared with"""
    tokens: int = 500
    """tokens of each text"""
    chunk: int = 100
    """tokens that run at once"""
    greedy_tokens: int = 64
    """tokens of each greedy answer; 0 leaves them out"""
    toy: bool = False
    """a tiny random model instead of a checkpoint"""


@dataclasses.dataclass(frozen=True)
class Subject:
    cfg: ModelConfig
    params: dict[str, Any]
    texts: np.ndarray  # int32 [texts, tokens]
    prompts: list[list[int]]


def main(argv: list[str] | None = None) -> None:
    args = parse(Args, argv)
    if args.toy == (args.checkpoint is not None):
        raise UsageError("give either --checkpoint or --toy")
    if args.tokens < 2 or args.chunk < 1:
        raise UsageError("a loss needs --tokens of at least 2 and a --chunk of at least 1")
    subject = toy(args) if args.toy else from_checkpoint(args)
    head = subject.params["lm_head"]
    rounded = dequantize(quantize(head, QuantFormat.named("int8")), head.dtype)
    small = subject.params | {"lm_head": rounded}
    print("| " + " | ".join(HEADER).format(dtype=args.dtype) + " |\n" + "|---" * len(HEADER) + "|")
    first = None
    for name, cache, params in (
        (args.dtype, args.dtype, subject.params),
        ("int8", "int8", subject.params),
        (WITHOUT_UNITS, "int8", subject.params),
        (args.dtype, args.dtype, small),
        ("int8", "int8", small),
    ):
        if name == WITHOUT_UNITS:
            with mock.patch("qwen_jax.model.key_units", jnp.ones_like):
                losses, best = read_texts(subject, params, cache, args.chunk)
            answers = None  # the engine keeps its compiled programs
        else:
            losses, best = read_texts(subject, params, cache, args.chunk)
            answers = answer(subject, params, cache, args.greedy_tokens)
        loss = float(losses.mean(dtype=np.float64))
        first = first or (loss, best, answers)
        cells = (
            name,
            "int8" if params is small else args.dtype,
            f"{loss:.4f}",
            f"{100 * (loss / first[0] - 1):+.3f} %",
            f"{math.exp(loss):.3f}",
            f"{100 * (best == first[1]).mean():.2f} %",
            f"{device_bytes(abstract_cache(subject.cfg, 1, 1, jnp.dtype(cache))) - 8:,}",
            equal(answers, first[2]),
        )
        print("| " + " | ".join(cells) + " |", flush=True)


def toy(args: Args) -> Subject:
    """Two key channels get a large bias, as real models have them."""
    params = init_params(TOY, jax.random.key(0), jnp.dtype(args.dtype))
    attn = params["layers"]["attn"]
    attn["bqkv"] = attn["bqkv"].at[:, 1, :, 3].set(100.0)
    rng = np.random.default_rng(0)
    texts = rng.integers(0, TOY.vocab_size, (2, args.tokens)).astype(np.int32)
    return Subject(TOY, params, texts, [[1, 2, 3], [4, 5]])


def from_checkpoint(args: Args) -> Subject:
    loaded = api.load(args.checkpoint, dtype=args.dtype)
    encoded = {name: loaded.tokenizer.encode(text) for name, text in TEXTS.items()}
    for name, ids in encoded.items():
        if len(ids) < args.tokens:
            raise InputError(f"the text {name} has {len(ids)} tokens; --tokens is {args.tokens}")
    texts = np.array([ids[: args.tokens] for ids in encoded.values()], np.int32)
    prompts = [
        chatml.encode_prompt(loaded.tokenizer, [chatml.Turn("user", question)])
        for question in QUESTIONS.values()
    ]
    return Subject(loaded.config, loaded.params, texts, prompts)


def read_texts(
    subject: Subject, params: dict[str, Any], cache_dtype: str, chunk: int
) -> tuple[np.ndarray, np.ndarray]:  # losses [B, T - 1] of each next token; likeliest ones [B, T]
    """Runs the texts through a cache, `chunk` tokens at a time."""
    cfg, texts = subject.cfg, subject.texts
    B, T = texts.shape

    # A new function each time: what it was traced with would otherwise be kept.
    @functools.partial(jax.jit, donate_argnums=1)
    def part(params, cache, tokens, following):
        lengths = jnp.full((B,), T, jnp.int32)
        hidden, cache = model.forward(cfg, params, None, tokens, cache, prompt_lengths=lengths)
        logits = model.unembed(params, hidden)
        picked = jnp.take_along_axis(logits, following[..., None], axis=-1)[..., 0]
        return cache, jax.nn.logsumexp(logits, axis=-1) - picked, logits.argmax(-1)

    cache = init_cache(cfg, B, T, jnp.dtype(cache_dtype))
    following = np.concatenate([texts[:, 1:], texts[:, :1]], axis=1)  # the last one is left out
    losses, best = [], []
    for start in range(0, T, chunk):
        here = slice(start, start + chunk)
        cache, loss, likeliest = part(params, cache, texts[:, here], following[:, here])
        losses.append(np.asarray(loss))
        best.append(np.asarray(likeliest))
    return np.concatenate(losses, axis=1)[:, :-1], np.concatenate(best, axis=1)


def answer(
    subject: Subject, params: dict[str, Any], cache_dtype: str, count: int
) -> list[list[int]] | None:
    if count == 0:
        return None
    engine = Engine(subject.cfg, params, cache_dtype=cache_dtype)
    return engine.generate(subject.prompts, SamplingParams(greedy=True, max_new_tokens=count))


def equal(ours: list[list[int]] | None, theirs: list[list[int]] | None) -> str:
    """Tokens of each answer before the first that differs."""
    if ours is None or theirs is None:
        return ""
    pairs = zip(ours, theirs, strict=True)
    return ", ".join(str(int(np.cumprod(np.equal(a, b)).sum())) for a, b in pairs)


if __name__ == "__main__":
    run(main)
