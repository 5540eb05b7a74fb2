"""What prompt-lookup drafts bring and cost at full width: whole dispatches, timed on the device.

    python -m benchmarks.decode_drafts --layers 80
    python -m benchmarks.decode_drafts --toy                 a size that a CPU can do

Random weights, except that the embedding outweighs all layers and the head answers the embedding
of token t with token t + 1, so that greedy answers are known before they are computed: they count
up to `period` and start again. A text of the past then decides what drafts do, at full cost:

    repeats    the text is that cycle: every draft holds
    new        the text has nothing in common with what comes: no draft is found
    wrong      whatever three tokens come stood in the text before, with another one after them

Each is timed with drafts and without, in turns: the engine's dispatches, one after the other.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import decode
from qwen_jax import runtime, steps
from qwen_jax.cli import parse, run
from qwen_jax.config import ModelConfig
from qwen_jax.drafts import NGRAM, Text

# Over the largest sum that random layers reach, so that they do not decide the answer.
EMBEDDING = 2.0**30
TEXTS = ("repeats", "new", "wrong")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Times decoding with drafts against decoding without."""

    layers: int | None = None  # of Qwen-72B; default all
    kind: str = "int4"  # of the weights
    context: int = 1024  # tokens of the text so far
    drafts: int = 7  # tokens of a draft
    dispatches: int = 4  # timed ones, after one that is not
    rounds: int = 3  # of both in turns; the median counts
    toy: bool = False  # a tiny model, for a machine without a GPU


def with_cycle(params: dict, period: int) -> dict:
    """The weights with an embedding and a head that answer token t < period by (t + 1) % period."""

    @jax.jit
    def tables(table):
        table = jax.random.normal(jax.random.key(5, impl="rbg"), table.shape, table.dtype)
        following = jnp.roll(table[:period], 1, axis=0)
        return table * EMBEDDING, jnp.concatenate([following, table[period:]])

    wte, lm_head = tables(params["wte"])
    return {**params, "wte": wte, "lm_head": lm_head}


def past(name: str, period: int, context: int, vocab_size: int) -> np.ndarray:
    """Tokens int32 [context + 1] before the answer."""
    if name == "repeats":
        return np.arange(context + 1, dtype=np.int32) % period
    rng = np.random.default_rng(0)
    text = rng.integers(period, vocab_size, context + 1, np.int32)  # none of the cycle
    if name == "wrong":
        for place, start in enumerate(range(0, context - NGRAM, NGRAM + 1)):
            text[start : start + NGRAM] = place + np.arange(NGRAM)
    text[-1] = 0
    return text


def timed(
    cfg: ModelConfig, args: Args, params: dict, text: np.ndarray, drafts: int
) -> tuple[float, np.ndarray]:
    """Seconds of the timed dispatches, and their tokens."""
    made = (args.dispatches + 2) * steps.BLOCK * (drafts + 1)
    capacity = decode.room_for(args.context + made)
    flags = decode.Args(greedy=True, context=args.context)
    requests, state = decode.start(cfg, flags, 1, capacity, params["wte"].dtype, None)
    state = state.replace(token=jnp.asarray(text[-1:]))
    history = Text.of(jnp.zeros((1, capacity), jnp.int32).at[0, : len(text)].set(text))
    fixed = (cfg, None, cfg.vocab_size)

    def dispatch(state, history):
        if drafts:
            return steps.draft(*fixed, drafts, params, None, requests, state, history)[:3]
        state, block, _ = steps.decode(*fixed, params, None, requests, state)
        return state, history, block

    state, history, block = dispatch(state, history)
    jax.block_until_ready(block)
    blocks = []
    began = time.perf_counter()
    for _ in range(args.dispatches):
        state, history, block = dispatch(state, history)
        blocks.append(block)
    jax.block_until_ready(block)
    seconds = time.perf_counter() - began
    ids = np.concatenate([np.asarray(block)[0] for block in blocks])
    return seconds, ids[ids != steps.NOTHING]


def measure(cfg: ModelConfig, args: Args, params: dict, name: str) -> str:
    """A row of the table."""
    # A cycle that the text has gone through already, or one that no answer here gets through.
    period = min(200, args.context // 2) if name == "repeats" else cfg.vocab_size // 2
    params = with_cycle(params, period)
    text = past(name, period, args.context, cfg.vocab_size)
    times = {0: [], args.drafts: []}
    for turn in range(args.rounds + 1):  # the first compiles
        for drafts, kept in times.items():
            seconds, made = timed(cfg, args, params, text, drafts)
            wrong = np.flatnonzero(np.diff(made) % period != 1)
            if len(wrong):
                raise RuntimeError(f"the answer does not count: {made[wrong[0] :][:4]}")
            if turn:
                kept.append(seconds / len(made) * 1e3)
    without, with_drafts = (float(np.median(kept)) for kept in times.values())
    steps_made = args.dispatches * steps.BLOCK
    return (
        f"| {name} | {len(made) / steps_made:.2f} | {without:.2f} | {with_drafts:.2f} "
        f"| {without / with_drafts:.2f} |"
    )


def main(argv=None):
    args = parse(Args, argv)
    runtime.configure()
    flags = decode.Args(kind=args.kind, toy=args.toy, layers=args.layers)
    cfg = decode.configured(flags)
    print(jax.devices()[0].device_kind, "jax", jax.__version__, flush=True)
    params = decode.make_params(cfg, flags, None)
    print("| text | tokens a step | ms a token without | with drafts | faster |")
    print("|---|---|---|---|---|")
    for name in TEXTS:
        print(measure(cfg, args, params, name), flush=True)


if __name__ == "__main__":
    run(main)
