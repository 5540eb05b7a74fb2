"""Sampling against transformers' logits processors and its generate(), and against chi-square."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from transformers.generation import logits_process as hf

from qwen_jax.errors import InputError
from qwen_jax.sampling import (
    SamplingParams,
    mask_padded_vocab,
    process_logits,
    row_keys,
    row_params,
    sample,
    seen_in_prompt,
    step_keys,
    update_seen,
)

pytestmark = pytest.mark.optimized

process = jax.jit(process_logits, static_argnames="sort")
draw = jax.jit(sample, static_argnames="sort")


@pytest.fixture
def stable_sort(monkeypatch):
    """Makes torch.sort stable; on CPUs with AVX512 it leaves ties in any order."""
    monkeypatch.setattr(torch, "sort", functools.partial(torch.sort, stable=True))


def reference(logits, prompt, p):  # [V], [T] -> [V]
    steps = hf.LogitsProcessorList()
    if p.repetition_penalty != 1.0:
        steps.append(hf.RepetitionPenaltyLogitsProcessor(float(p.repetition_penalty)))
    if p.temperature != 1.0:
        steps.append(hf.TemperatureLogitsWarper(float(p.temperature)))
    if p.top_k != 0:
        steps.append(hf.TopKLogitsWarper(p.top_k))
    if p.top_p < 1.0:
        steps.append(hf.TopPLogitsWarper(p.top_p))
    return steps(torch.tensor(prompt)[None], torch.tensor(logits)[None])[0].numpy()


def random_row(rng, V):
    """Logits [V] of one of the shapes that a model or a hard case has."""
    x = rng.normal(size=V).astype(np.float32) * rng.choice([0.5, 3.0, 10.0])
    kind = rng.integers(8)
    if kind == 1:  # ties, as logits rounded to bfloat16 have
        x = np.asarray(x.astype(jnp.bfloat16))
    elif kind == 2:
        x = np.round(x)
    elif kind == 3:
        x = x * 1e4
    elif kind == 4:  # all equal, and zeros of both signs
        x = np.where(rng.random(V) < 0.5, 0.0, -0.0)
    elif kind == 5:
        x[V - V // 3 :] = -np.inf
    elif kind == 6:  # a few equal tokens stand out
        x[rng.integers(V, size=6)] = 60.0
    elif kind == 7:  # the same at zero
        x = np.where(rng.random(V) < 6 / V, rng.choice([0.0, -0.0], size=V), -np.abs(x) - 60)
    return np.asarray(x, np.float32)


def random_params(rng, V):
    return SamplingParams(
        temperature=float(rng.choice([1.0, 0.95, 0.3, 2.5])),
        top_k=int(rng.choice([0, 1, 5, 50, V, V + 9])),
        top_p=float(rng.choice([1.0, 0.8, 0.95, 0.5, 0.3, 0.2, 1e-4, 0.0, 0.999])),
        repetition_penalty=float(rng.choice([1.0, 1.1, 0.7, 3.0])),
    )


def random_batch(seed, B, V):
    rng = np.random.default_rng(seed)
    logits = np.stack([random_row(rng, V) for _ in range(B)])
    prompts = rng.integers(V, size=(B, 7))
    return logits, prompts, [random_params(rng, V) for _ in range(B)]


def seen_of(prompts, V):
    return seen_in_prompt(jnp.asarray(prompts), jnp.ones(prompts.shape, bool), V)


def assert_close(got, want):
    """Same tokens ruled out, the scores of the others within float32 rounding."""
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("V", [1, 37, 1001, 4099])
def test_scores_equal_transformers(stable_sort, V, sort):
    logits, prompts, params = random_batch(V + 1, 200, V)
    got = process(logits, seen_of(prompts, V), row_params(params), sort=sort)
    for b, p in enumerate(params):
        assert_close(np.asarray(got[b]), reference(logits[b], prompts[b], p))


def test_kept_scores_equal_unpatched_transformers():
    """Where torch sorts ties in its own order another of them may stay, with the same score."""
    V = 1001
    logits, prompts, params = random_batch(5, 200, V)
    got = process(logits, seen_of(prompts, V), row_params(params))
    for b, p in enumerate(params):
        assert_close(np.sort(got[b]), np.sort(reference(logits[b], prompts[b], p)))


def test_scores_equal_transformers_on_the_vocabulary_of_72b(stable_sort):
    V = 152_064
    settings = [
        SamplingParams(temperature=0.95, top_k=50, top_p=0.8, repetition_penalty=1.1),
        SamplingParams(top_p=0.8, repetition_penalty=1.1),
        SamplingParams(top_p=0.9999, temperature=2.0),
        SamplingParams(top_k=5000),
    ]
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(len(settings), V)).astype(np.float32) * 3
    logits[:2] = logits[:2].astype(jnp.bfloat16)
    prompts = rng.integers(V, size=(len(settings), 500))
    got = process(logits, seen_of(prompts, V), row_params(settings))
    for b, p in enumerate(settings):
        assert_close(np.asarray(got[b]), reference(logits[b], prompts[b], p))


def test_equal_probabilities_are_cut_where_transformers_cuts(stable_sort):
    """N equal tokens and top_p a multiple of 1/N: one float32 rounding decides about a token."""
    V = 64
    cases = [(n, k / n) for n in (2, 3, 5, 7, 10, 25, 40) for k in range(1, n)]
    logits = np.full((len(cases), V), -np.inf, np.float32)
    for row, (n, _) in zip(logits, cases, strict=True):
        row[:n] = 1.0
    params = [SamplingParams(top_p=top_p) for _, top_p in cases]
    for sort in (False, True):
        rows = row_params(params)
        got = process(logits, jnp.zeros(logits.shape, bool), rows, sort=sort)
        for b, p in enumerate(params):
            assert_close(np.asarray(got[b]), reference(logits[b], [0], p))


def test_the_search_changes_nothing():
    """Ties at the cut, flat rows and filters that are off, against the full sort."""
    V = 501
    logits, prompts, params = random_batch(9, 250, V)
    args = (logits, seen_of(prompts, V), row_params(params))
    np.testing.assert_array_equal(process(*args), process(*args, sort=True))


def test_one_program_serves_every_setting():
    fn = jax.jit(lambda *args: process_logits(*args))  # a cache of its own
    for seed in range(3):
        logits, prompts, params = random_batch(seed, 4, 37)
        fn(logits, seen_of(prompts, 37), row_params(params))
    assert fn._cache_size() == 1


def test_a_row_depends_on_nothing_but_itself():
    """The same row alone and among neighbours that need the full sort, bit for bit."""
    V, B = 501, 8
    logits, prompts, params = random_batch(11, B, V)
    logits[1::2] = 0.0  # every other row cannot be settled by the search
    params[1::2] = [SamplingParams(top_p=0.9)] * (B // 2)
    params = [dataclasses.replace(p, seed=b // 2) for b, p in enumerate(params)]
    params[4] = dataclasses.replace(params[4], greedy=True)
    seen = seen_of(prompts, V)
    keys = step_keys(row_keys(params), jnp.arange(B))
    together = process(logits, seen, row_params(params))
    drawn = draw(logits, seen, row_params(params), keys)
    for b in range(B):
        alone = slice(b, b + 1)
        row = row_params(params[alone])
        np.testing.assert_array_equal(process(logits[alone], seen[alone], row)[0], together[b])
        id_alone = draw(logits[alone], seen[alone], row, keys[alone])[0]
        assert id_alone == drawn[b]
    back = slice(None, None, -1)
    flipped = draw(logits[back], seen[back], row_params(params[back]), keys[back])
    np.testing.assert_array_equal(flipped, drawn[back])


def test_a_seed_names_one_stream():
    V, steps = 1000, 40
    params = [SamplingParams(seed=s) for s in (7, 7, 8, 2**32 - 1)]
    logits, seen = jnp.zeros((4, V)), jnp.zeros((4, V), bool)
    keys = row_keys(params)
    texts = np.stack(
        [
            draw(logits, seen, row_params(params), step_keys(keys, jnp.full(4, t)))
            for t in range(steps)
        ],
        axis=1,
    )
    np.testing.assert_array_equal(texts[0], texts[1])
    assert (texts[0] == texts[2]).sum() < 3 and (texts[2] == texts[3]).sum() < 3
    assert len(set(texts[0])) > steps // 2  # the stream moves with the step
    ahead = draw(logits, seen, row_params(params), step_keys(keys, jnp.array([5, 0, 0, 0])))
    assert ahead[0] == texts[0, 5] and ahead[2] == texts[2, 0]


@pytest.mark.parametrize(
    "p",
    [
        SamplingParams(),
        SamplingParams(temperature=1.7, repetition_penalty=1.3),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.8, temperature=0.8),
        SamplingParams(top_k=12, top_p=0.9, temperature=1.2, repetition_penalty=1.1),
    ],
)
def test_draws_follow_the_distribution_of_transformers(p):
    V, draws = 37, 10_000
    rng = np.random.default_rng(3)
    logits = rng.normal(size=V).astype(np.float32) * 1.5
    prompt = rng.integers(V, size=9)
    expected = torch.softmax(torch.tensor(reference(logits, prompt, p)).double(), 0).numpy()
    rows = jax.tree.map(lambda x: jnp.repeat(x, draws), row_params([p]))
    keys = step_keys(jnp.repeat(row_keys([p]), draws), jnp.arange(draws))
    seen = jnp.repeat(seen_of(prompt[None], V), draws, axis=0)
    ids = np.asarray(draw(jnp.tile(logits, (draws, 1)), seen, rows, keys))
    counts = np.bincount(ids, minlength=V)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    assert scipy.stats.chisquare(counts[kept], draws * expected[kept]).pvalue > 0.01


def test_padded_vocabulary_is_never_chosen():
    V, n_vocab, B = 64, 50, 2000
    logits = jnp.zeros((B, V)).at[:, n_vocab:].set(100.0)
    masked = mask_padded_vocab(logits, n_vocab)
    assert (np.asarray(masked[:, n_vocab:]) == -np.inf).all()
    assert (np.asarray(masked[:, :n_vocab]) == 0).all()
    for p in (
        SamplingParams(temperature=50.0),
        SamplingParams(top_k=60, top_p=0.9999, repetition_penalty=0.5),
        SamplingParams(greedy=True),
    ):
        params = [p] * B
        keys = step_keys(row_keys(params), jnp.arange(B))
        ids = draw(masked, jnp.ones((B, V), bool), row_params(params), keys)
        assert int(ids.max()) < n_vocab


def tiny_model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=53,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
        eos_token_id=None,
        bos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).eval()


def generate(prompt, **settings):
    return tiny_model().generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=15,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **settings,
    )


def test_greedy_text_equals_generate():
    prompt = torch.arange(12).reshape(2, 6)
    settings = {"temperature": 0.3, "top_k": 2, "repetition_penalty": 1.6}
    want = generate(prompt, do_sample=False, **settings)
    rows = row_params([SamplingParams(greedy=True, **settings)] * 2)
    raw_best, seen = 0, seen_of(prompt.numpy(), 53)
    for t, logits in enumerate(want.logits):
        ids = draw(logits.numpy(), seen, rows, row_keys([SamplingParams()] * 2))
        np.testing.assert_array_equal(ids, want.sequences[:, 6 + t])
        raw_best += (logits.argmax(-1).numpy() == np.asarray(ids)).sum()
        seen = update_seen(seen, ids)
    assert raw_best < 30  # the penalty did change the text


def test_scores_equal_those_of_generate(stable_sort):
    """generate() itself chooses the processors and their order."""
    prompt = torch.arange(12).reshape(2, 6)
    settings = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}
    torch.manual_seed(1)
    want = generate(prompt, do_sample=True, **settings)
    rows = row_params([SamplingParams(**settings)] * 2)
    seen = seen_of(prompt.numpy(), 53)
    for t, (logits, scores) in enumerate(zip(want.logits, want.scores, strict=True)):
        got = process(logits.numpy(), seen, rows)
        assert_close(np.asarray(got), scores.numpy())
        seen = update_seen(seen, want.sequences[:, 6 + t].numpy())


def test_greedy_rows_ignore_the_rest_beside_sampling_rows():
    V = 37
    logits = np.random.default_rng(4).normal(size=(3, V)).astype(np.float32)
    hot = SamplingParams(temperature=1e6, seed=5)
    params = [dataclasses.replace(hot, greedy=True, top_p=0.1, top_k=3), hot, hot]
    seen = jnp.zeros((3, V), bool)
    keys = row_keys(params)
    got = [
        draw(logits, seen, row_params(params), step_keys(keys, jnp.full(3, t))) for t in range(9)
    ]
    ids = np.stack(got)
    assert (ids[:, 0] == logits[0].argmax()).all()
    assert len(set(ids[:, 1])) > 3 and ids.dtype == np.int32


def test_seen_marks_prompt_without_padding_and_answer():
    ids = jnp.array([[0, 4, 4], [9, 9, 2]])
    valid = jnp.array([[False, True, True], [False, False, True]])
    seen = update_seen(seen_in_prompt(ids, valid, 6), jnp.array([1, 2]))
    assert [np.flatnonzero(row).tolist() for row in np.asarray(seen)] == [[1, 4], [2]]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("greedy", 1),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 1e-39),
        ("temperature", True),
        ("temperature", "1"),
        ("temperature", None),
        ("top_k", -1),
        ("top_k", 2**31),
        ("top_k", 5.0),
        ("top_p", -0.1),
        ("top_p", 1.5),
        ("repetition_penalty", 0),
        ("max_new_tokens", 0),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(InputError) as error:
        SamplingParams(**{name: value})
    message = str(error.value)
    assert message.startswith(f"{name} is {value!r}; expected ") and "\n" not in message


def test_wrong_arrays_are_refused():
    rows = row_params([SamplingParams()])
    with pytest.raises(ValueError, match="expected float32"):
        process_logits(jnp.zeros((1, 5), jnp.bfloat16), jnp.zeros((1, 5), bool), rows)
    with pytest.raises(ValueError, match="expected float32"):
        process_logits(jnp.zeros((1, 5)), jnp.zeros((1, 6), bool), rows)
