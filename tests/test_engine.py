"""Generation agrees with transformers' Qwen2 token for token; batching and devices change nothing.

All in float32 on the tiny model.
"""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from tiny import tiny_config, to_params
from torch_reference import qwen2_model, random_weights

from qwen_jax.api import mesh_sizes
from qwen_jax.engine import Engine
from qwen_jax.errors import InputError
from qwen_jax.params import abstract_params, shardings
from qwen_jax.sampling import SamplingParams
from qwen_jax.sharding import make_mesh

CFG = tiny_config(seq_length=8192)
GREEDY = SamplingParams(greedy=True, max_new_tokens=40)
SAMPLED = SamplingParams(temperature=0.9, top_k=50, top_p=0.9, max_new_tokens=20, seed=5)


@pytest.fixture(scope="module")
def weights():
    return random_weights(CFG, seed=3)


@pytest.fixture(scope="module")
def params(weights):
    return to_params(CFG, weights)


@pytest.fixture(scope="module")
def engine(params):
    return Engine(CFG, params)


@pytest.fixture(scope="module")
def reference(weights):
    return qwen2_model(CFG, weights)


def prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CFG.vocab_size, n).tolist() for n in lengths]


def reference_ids(model, prompt, **settings):
    """Forty new ids, none of them a stop."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, max_new_tokens=40, **settings,
        )  # fmt: skip
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_is_that_of_transformers(engine, reference, penalty):
    params = dataclasses.replace(GREEDY, repetition_penalty=penalty)
    several = prompts(1, 17, 50, 64)
    ours = engine.generate(several, params)
    for prompt, answer in zip(several, ours, strict=True):
        assert answer == reference_ids(reference, prompt, repetition_penalty=penalty)


def test_ragged_batch_is_single(engine):
    several = prompts(30, 64, 61)
    settings = [GREEDY, SAMPLED, dataclasses.replace(SAMPLED, seed=9, max_new_tokens=5)]
    together = engine.generate(several, settings)
    alone = [engine.generate([p], s)[0] for p, s in zip(several, settings, strict=True)]
    assert together == alone
    assert [len(answer) for answer in together] == [s.max_new_tokens for s in settings]


def test_eight_devices_give_the_same_tokens(engine, params):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    layouts = shardings(abstract_params(CFG, np.float32, None, mesh))
    split = Engine(CFG, jax.tree.map(jax.device_put, params, layouts), mesh=mesh)
    several = prompts(9, 64, 3)
    settings = [GREEDY, dataclasses.replace(GREEDY, repetition_penalty=1.3), SAMPLED]
    assert split.generate(several, settings) == engine.generate(several, settings)


def test_padded_vocabulary_is_never_drawn(params):
    small = Engine(CFG, params, n_vocab=20)
    hot = SamplingParams(temperature=100.0, max_new_tokens=60)
    (answer,) = small.generate([[1, 2]], hot)
    assert len(answer) == 60 and max(answer) < 20
    with pytest.raises(InputError, match="token id 20; expected ids from 0 to 19"):
        small.generate([[20]], GREEDY)


def test_stop_ids_end_the_answer_and_are_left_out(engine, params):
    several = prompts(60, 64)
    free = engine.generate(several, GREEDY)
    stop = free[0][12]
    stopping = Engine(CFG, params, stop_ids={stop, CFG.vocab_size - 1})
    expected = [
        answer[: min((i for i, t in enumerate(answer) if t in stopping.stop_ids), default=40)]
        for answer in free
    ]
    assert stopping.generate(several, GREEDY) == expected
    assert len(expected[0]) <= 12
    # A stop as the very first token is an empty answer.
    stopping.stop_ids = frozenset({free[0][0], CFG.vocab_size - 1})
    assert stopping.generate(several, GREEDY)[0] == []


def test_seed_decides_the_text(engine):
    (prompt,) = prompts(50)
    first, again = (engine.generate([prompt], SAMPLED) for _ in range(2))
    assert first == again
    assert engine.generate([prompt], dataclasses.replace(SAMPLED, seed=6)) != first


@pytest.mark.parametrize("count", [1, 2, 8, 9, 10])
def test_stream_is_generate(engine, count):
    (prompt,) = prompts(50)
    params = dataclasses.replace(SAMPLED, max_new_tokens=count)
    streamed = list(engine.stream(prompt, params))
    assert streamed == engine.generate([prompt], params)[0]
    assert len(streamed) == count


def test_cache_grows_without_a_trace(engine, monkeypatch):
    (prompt,) = prompts(50)
    expected = engine.generate([prompt], GREEDY)
    monkeypatch.setattr("qwen_jax.engine.FIRST_ROOM", 1)
    assert engine.generate([prompt], GREEDY) == expected  # 64 slots, then 128


@pytest.mark.parametrize(
    "prompt, message",
    [([], "at least one token id"), ([CFG.vocab_size], "expected ids from 0 to 210"),
     ([-1], "token id -1"), ([1.5], "whole numbers")],
)  # fmt: skip
def test_bad_prompts_are_refused_at_once(engine, prompt, message):
    with pytest.raises(InputError, match=message):
        engine.generate([[1], prompt], GREEDY)
    with pytest.raises(InputError, match=message):
        engine.stream(prompt, GREEDY)


def test_mesh_for_inference_fits_heads_and_ffn():
    assert mesh_sizes("8", CFG) == {"data": 1, "fsdp": 2, "tensor": 4}
    assert mesh_sizes("6", CFG) == {"data": 1, "fsdp": 3, "tensor": 2}
    assert mesh_sizes({"data": 2, "tensor": 2}, CFG) == {"data": 2, "fsdp": 1, "tensor": 2}
    with pytest.raises(InputError, match="tensor=8 must divide the 4 heads and 128 FFN columns"):
        mesh_sizes("tensor=8", CFG)
