"""Rows that join, leave and outlive each other get the tokens that they would get alone.

"Alone" is Engine.generate, which test_engine.py holds against transformers; one test here asks
transformers itself. All in float32 on the tiny model.
"""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from tiny import tiny_config, to_params
from torch_reference import qwen2_model, random_weights

from qwen_jax.engine import Engine
from qwen_jax.errors import InputError
from qwen_jax.params import abstract_params, shardings
from qwen_jax.sampling import SamplingParams
from qwen_jax.sharding import make_mesh
from qwen_jax.slots import Slots

CFG = tiny_config(seq_length=8192)
GREEDY = SamplingParams(greedy=True, max_new_tokens=40)
SAMPLED = SamplingParams(temperature=0.9, top_k=50, top_p=0.9, max_new_tokens=20, seed=5)


@pytest.fixture(scope="module")
def weights():
    return random_weights(CFG, seed=3)


@pytest.fixture(scope="module")
def engine(weights):
    return Engine(CFG, to_params(CFG, weights))


def prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CFG.vocab_size, n).tolist() for n in lengths]


def run(slots: Slots, arrivals, drops=()):
    """Rows join at the step that `arrivals` names, as soon as one is free: (step, prompt, params).

    `drops` holds (step, request). Returns ids and reason of each request.
    """
    waiting = sorted(range(len(arrivals)), key=lambda i: arrivals[i][0])
    answers = [([], None) for _ in arrivals]
    at: dict[int, int] = {}  # row -> request
    step = 0

    def take(row, piece):
        request = at[row]
        answers[request] = (answers[request][0] + piece.ids, piece.finish)
        if piece.finish is not None:
            del at[row]

    while waiting or at:
        for row, request in list(at.items()):
            if (step, request) in drops:
                slots.drop(row)
                del at[row]
        while waiting and slots.free and arrivals[waiting[0]][0] <= step:
            request = waiting.pop(0)
            row, piece = slots.add(*arrivals[request][1:])
            assert row not in at
            at[row] = request
            take(row, piece)
        for row, piece in slots.step().items():
            take(row, piece)
        step += 1
    assert slots.free == slots.most_rows
    return answers


def test_greedy_rows_that_join_late_are_those_of_transformers(engine, weights):
    reference = qwen2_model(CFG, weights)
    several = prompts(17, 50, 9)
    ours = run(Slots(engine, 2), [(0, several[0], GREEDY), (2, several[1], GREEDY),
                                  (3, several[2], GREEDY)])  # fmt: skip
    for prompt, (ids, reason) in zip(several, ours, strict=True):
        with torch.no_grad():
            out = reference.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False, max_new_tokens=40,
            )  # fmt: skip
        assert (ids, reason) == (out[0, len(prompt) :].tolist(), "length")


def mixed():
    """Seven requests of different lengths and settings, one of one token only."""
    several = prompts(30, 64, 61, 1, 70, 12, 130)
    settings = [
        GREEDY,
        SAMPLED,
        dataclasses.replace(SAMPLED, seed=9, max_new_tokens=5),
        dataclasses.replace(GREEDY, max_new_tokens=1),
        dataclasses.replace(GREEDY, repetition_penalty=1.3, max_new_tokens=90),
        dataclasses.replace(SAMPLED, seed=2**32 - 1, max_new_tokens=33),
        dataclasses.replace(GREEDY, max_new_tokens=17),
    ]
    return several, settings


@pytest.mark.parametrize("rows", [pytest.param(3, marks=pytest.mark.slow), 8])
def test_company_changes_nothing(engine, rows):
    several, settings = mixed()
    alone = [engine.generate([p], s)[0] for p, s in zip(several, settings, strict=True)]
    arrivals = list(zip([0, 0, 1, 1, 2, 4, 4], several, settings, strict=True))
    together = run(Slots(engine, rows), arrivals)
    assert [ids for ids, _ in together] == alone
    assert {reason for _, reason in together} == {"length"}


@pytest.mark.slow  # the engine below it is tested on eight devices in the fast suite
def test_eight_devices_give_the_same_tokens(engine):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    layouts = shardings(abstract_params(CFG, np.float32, None, mesh))
    split = Engine(CFG, jax.tree.map(jax.device_put, engine.params, layouts), mesh=mesh)
    several, settings = mixed()
    alone = [engine.generate([p], s)[0] for p, s in zip(several[:5], settings[:5], strict=True)]
    arrivals = list(zip([0, 0, 1, 1, 2], several[:5], settings[:5], strict=True))
    assert [ids for ids, _ in run(Slots(split, 5), arrivals)] == alone


def test_cache_grows_under_running_rows(engine, monkeypatch):
    monkeypatch.setattr("qwen_jax.slots.FIRST_ROOM", 1)
    several, settings = mixed()
    alone = [engine.generate([p], s)[0] for p, s in zip(several, settings, strict=True)]
    arrivals = list(zip([0, 0, 1, 1, 2, 4, 4], several, settings, strict=True))
    assert [ids for ids, _ in run(Slots(engine, 4), arrivals)] == alone


def test_a_dropped_row_is_free_and_the_others_go_on(engine):
    first, second, third = prompts(30, 64, 20)
    long = dataclasses.replace(GREEDY, max_new_tokens=100)
    arrivals = [(0, first, long), (0, second, GREEDY), (2, third, SAMPLED)]
    answers = run(Slots(engine, 2), arrivals, drops=[(2, 0)])
    assert answers[0] == (engine.generate([first], long)[0][:17], None)
    assert answers[1][0] == engine.generate([second], GREEDY)[0]
    assert answers[2][0] == engine.generate([third], SAMPLED)[0]


def test_stop_ids_end_a_row_and_are_left_out(engine):
    (prompt,) = prompts(60)
    free = engine.generate([prompt], GREEDY)[0]
    for stop in (free[0], free[12]):
        stopping = Engine(CFG, engine.params, stop_ids={stop})
        ((ids, reason),) = run(Slots(stopping, 2), [(0, prompt, GREEDY)])
        assert (ids, reason) == (free[: free.index(stop)], "stop")


def test_a_bad_prompt_changes_nothing(engine):
    (prompt,) = prompts(9)
    slots = Slots(engine, 1)
    with pytest.raises(InputError, match="expected ids from 0 to 210"):
        slots.add([CFG.vocab_size], GREEDY)
    assert slots.free == 1
    ((ids, _),) = run(slots, [(0, prompt, GREEDY)])
    assert ids == engine.generate([prompt], GREEDY)[0]
    slots.add(prompt, GREEDY)
    with pytest.raises(ValueError, match="all 1 rows are in use"):
        slots.add(prompt, GREEDY)
