"""Drafts from the text: what is found, what holds, and that answers stay as they are without."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import decode, decode_drafts
from benchmarks.drafts import count_passes
from qwen_jax import drafts, engine, steps
from qwen_jax.config import ModelConfig
from qwen_jax.drafts import Text
from qwen_jax.engine import Engine
from qwen_jax.errors import InputError
from qwen_jax.params import init_params
from qwen_jax.sampling import SamplingParams

CFG = ModelConfig(
    vocab_size=48, hidden_size=32, num_layers=2, num_heads=2, head_dim=16, ffn_size=64,
    seq_length=64, use_dynamic_ntk=True, use_logn_attn=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ([1, 2, 3, 7, 8, 9, 1, 2, 3], [7, 8]),
        ([1, 2, 3, 7, 8, 1, 2, 3, 5, 6, 1, 2, 3], [5, 6]),  # the later place
        ([1, 2, 3, 4, 5, 6, 7], None),  # nothing repeats
        ([1, 2, 3], None),  # no earlier place
        ([4, 2, 3, 9, 9, 1, 2, 3], None),  # two tokens agree, the third does not
        ([5, 5, 5, 5, 5, 5], [5, 5]),  # a place with two tokens after it, not the last one
    ],
)
def test_what_follows_the_last_place_is_the_draft(text, want):
    history = np.zeros((1, 20), np.int32)
    history[0, : len(text)] = text
    known = drafts.Text.of(jnp.asarray(history))
    found_drafts, found = drafts.look_up(known, jnp.array([len(text)]), 2)
    assert bool(found[0]) == (want is not None)
    if want is not None:
        assert found_drafts[0].tolist() == want


def test_a_draft_holds_as_far_as_it_agrees():
    drawn = jnp.array([[1, 2, 3, 4], [1, 9, 3, 4], [9, 2, 3, 4], [1, 2, 3, 4]])
    guess = jnp.array([[1, 2, 3]] * 4)
    held = drafts.accept(drawn, guess, jnp.array([True, True, True, False]))
    assert held.tolist() == [4, 2, 1, 1]


def test_wrong_drafts_are_tried_less_and_less():
    text = drafts.Text.of(jnp.array([[1, 2, 3, 4, 1, 2, 3]]))
    tries = 0
    for _ in range(200):
        _, found = drafts.look_up(text, jnp.array([7]), 2)
        tries += int(found[0])
        text = drafts.judge(text, found, jnp.array([1]))
    assert tries < 12
    text = drafts.judge(text, jnp.array([True]), jnp.array([3]))
    assert int(text.penalty[0]) == 1 and drafts.look_up(text, jnp.array([7]), 2)[0][0, 0] == 4


@pytest.fixture(scope="module")
def weights():
    return init_params(CFG, jax.random.key(0), jnp.float32)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(greedy=True, max_new_tokens=70),
        pytest.param(
            SamplingParams(greedy=True, max_new_tokens=61, repetition_penalty=1.2),
            marks=pytest.mark.slow,
        ),
        SamplingParams(temperature=0.3, top_p=0.9, max_new_tokens=50, seed=3),
        SamplingParams(greedy=True, max_new_tokens=1),
    ],
)
def test_answers_are_those_without_drafts(weights, params):
    plain = Engine(CFG, weights, stop_ids={47})
    with_drafts = Engine(CFG, weights, stop_ids={47}, drafts=4)
    for prompt in ([3, 4, 5, 6] * 6, [7], list(range(40))):
        assert with_drafts.generate([prompt], params) == plain.generate([prompt], params)


def test_drafts_save_passes_on_a_cycle(monkeypatch, weights):
    """Greedy decoding of a tiny random model ends in a cycle; then most drafts hold."""
    blocks = []
    original = engine.draft

    def counting(*args):
        result = original(*args)
        blocks.append(np.asarray(result[2]))
        return result

    monkeypatch.setattr(engine, "draft", counting)
    params = SamplingParams(greedy=True, max_new_tokens=200)
    answer = Engine(CFG, weights, drafts=4).generate([[1, 2, 3]], params)[0]
    assert len(answer) == 200
    held = np.concatenate([block.reshape(-1, 5) for block in blocks])
    passes = (held != -1).any(axis=1).sum()
    assert passes < 200 / 1.5
    # The benchmark, which plays the lookup through on a finished answer, counts the same.
    assert sum(count_passes([1, 2, 3], answer, 4)) == passes


def test_a_draft_longer_than_a_pass_of_few_tokens_is_refused():
    params = init_params(CFG, jax.random.key(0), jnp.float32)
    with pytest.raises(InputError, match="drafts is 16; expected 0"):
        Engine(CFG, params, drafts=16)


def test_a_step_that_may_draft_does_not_copy_the_cache():
    """A branch would: 6 ms a step at 72B, more than drafts can win back on ordinary text."""
    flags = decode.Args(toy=True, greedy=True, context=64)
    cfg, params = decode.TOY, decode.make_params(decode.TOY, flags, None)
    requests, state = decode.start(cfg, flags, 1, 192, params["wte"].dtype, None)
    text = Text.of(jnp.zeros((1, 192), jnp.int32))
    fixed = (cfg, None, cfg.vocab_size, 7, params, None, requests)
    program = steps.draft.lower(*fixed, state, text).compile().as_text()
    shape = ",".join(map(str, state.cache.k.shape))
    assert f"f32[{shape}]" in program
    assert not re.search(rf"f32\[{shape}\]\S* copy\(", program)


@pytest.mark.slow  # programs with and without drafts for each text
def test_the_benchmark_drafts_what_its_texts_say(capsys):
    decode_drafts.main(["--toy", "--context", "64", "--dispatches", "2", "--rounds", "1"])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "|" in line][2:]
    # The benchmark itself fails if an answer is not the one that was built into its weights.
    assert [(row[1].strip(), row[2].strip()) for row in rows] == [
        ("repeats", "8.00"), ("new", "1.00"), ("wrong", "1.00"),
    ]  # fmt: skip
