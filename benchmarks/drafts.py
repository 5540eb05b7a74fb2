"""What prompt-lookup drafts save on a real model's answers, without a GPU.

    python -m benchmarks.drafts --checkpoint CKPT

Drafts do not change an answer, so it is generated once, without them; then the lookup is played
through on its tokens, and passes over one token and over a whole draft are counted. What such
passes cost is measured elsewhere (benchmarks.decode --verify 8) and given here as milliseconds.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

import qwen_jax
from benchmarks.texts import CODE, ENGLISH, QUESTIONS
from qwen_jax import chatml
from qwen_jax.cli import parse, run
from qwen_jax.drafts import Text, accept, judge, look_up, remember
from qwen_jax.sampling import SamplingParams

PROMPTS = {
    "copy English": "Repeat this text word for word:\n\n" + ENGLISH,
    "change code": "Rename the variable `total` to `amount`, and print the whole code:\n\n" + CODE,
    **{f"question, {name}": question for name, question in QUESTIONS.items()},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Counts passes with and without drafts on greedy answers."""

    checkpoint: str
    """a converted chat model"""
    drafts: int = 7
    """tokens of a draft"""
    max_new_tokens: int = 200
    """of each answer"""
    single: float = 17.1
    """milliseconds of a step over one token"""
    several: float = 20.5
    """milliseconds of a step over a draft"""


def count_passes(prompt: list[int], answer: list[int], count: int) -> tuple[int, int]:
    """Steps over one token, and steps over a draft, after the first token of the answer."""
    end = len(prompt) + len(answer)
    following = jnp.array([*answer, *[-1] * count], jnp.int32)
    room = jnp.zeros((1, end + count + 1), jnp.int32)
    text = Text.of(room.at[0, : len(prompt) + 1].set(jnp.array([*prompt, answer[0]])))
    known, passes = len(prompt) + 1, [0, 0]
    while known < end:
        drawn = jax.lax.dynamic_slice(following, (known - len(prompt),), (count + 1,))[None]
        text, held, tried = _step(text, jnp.array([known]), drawn, count)
        known += int(held)
        passes[int(tried)] += 1
    return passes[0], passes[1]


@functools.partial(jax.jit, static_argnums=3)
def _step(text: Text, known: jax.Array, drawn: jax.Array, count: int):
    drafts, found = look_up(text, known, count)
    held = jnp.where(found, accept(drawn, drafts, found), 1)
    return judge(remember(text, known, drawn, held), found, held), held[0], found[0]


def main(argv: list[str] | None = None) -> None:
    args = parse(Args, argv)
    model = qwen_jax.load(args.checkpoint)
    params = SamplingParams(greedy=True, max_new_tokens=args.max_new_tokens)
    print("| answer | tokens | steps over one token | over a draft | tokens a step | faster |")
    print("|---|---|---|---|---|---|")
    for name, prompt in PROMPTS.items():
        ids = chatml.encode_prompt(model.tokenizer, [chatml.Turn("user", prompt)])
        answer = model.engine.generate([ids], params)[0]
        if len(answer) < 2:
            continue
        single, several = count_passes(ids, answer, args.drafts)
        rest = len(answer) - 1  # the first token comes with the prompt
        time = single * args.single + several * args.several
        print(
            f"| {name} | {len(answer)} | {single} | {several} | {rest / (single + several):.2f} "
            f"| {rest * args.single / time:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    run(main)
