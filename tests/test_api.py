"""What `import qwen_jax` offers, on bad input."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import qwen_jax
from convert import hf_to_flax
from demo.tiny_checkpoint import write_tiny_checkpoint
from qwen_jax.errors import InputError
from qwen_jax.manifest import load_manifest
from qwen_jax.sampling import SamplingParams


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    write_tiny_checkpoint(folder / "hf", hidden_size=64, num_layers=1, tokenizer=False)
    hf_to_flax.main(["--input", str(folder / "hf"), "--output", str(folder / "ckpt")])
    return folder / "ckpt"


@pytest.mark.parametrize("dtype", ["float16", jnp.float16, np.dtype("float16"), jnp.int8, "int8"])
def test_dtypes_that_cannot_compute_are_refused(checkpoint, dtype):
    with pytest.raises(InputError, match="expected one of bfloat16, float32"):
        qwen_jax.load(checkpoint, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", jnp.float32, np.dtype("float32")])
def test_a_dtype_may_be_given_in_any_form(checkpoint, dtype):
    logits = qwen_jax.load(checkpoint, dtype=dtype).logits([[1, 2, 3]])
    assert logits.shape[:2] == (1, 3) and logits.dtype == np.float32
    assert np.isfinite(np.asarray(logits)).all()


def test_the_engine_gets_what_load_was_told(checkpoint):
    model = qwen_jax.load(checkpoint, dtype="float32", cache_dtype="int8", drafts=3)
    assert (model.engine.cache_dtype, model.engine.drafts) == (jnp.int8, 3)
    assert len(model.generate([1, 2, 3], SamplingParams(greedy=True, max_new_tokens=4))) == 4
    assert qwen_jax.load(checkpoint).engine.cache_dtype == jnp.bfloat16


def test_a_head_that_cannot_be_packed_is_refused_before_loading(checkpoint, monkeypatch):
    manifest = load_manifest(checkpoint)
    odd = dataclasses.replace(manifest, config=dataclasses.replace(manifest.config, vocab_size=211))
    monkeypatch.setattr("qwen_jax.api.load_manifest", lambda path: odd)
    monkeypatch.setattr("qwen_jax.packed.pays", lambda *_: True)  # as on Hopper cards
    monkeypatch.setattr("qwen_jax.api.load_params", None)
    with pytest.raises(InputError, match=r"blocks of 16 tokens, and the vocabulary .* has 211"):
        qwen_jax.load(checkpoint, int8_head=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(cache_dtype="int4"), "cache_dtype is 'int4'; expected int8, or nothing .* bfloat16"),
        (dict(cache_dtype=jnp.float16), "cache_dtype is 'float16'"),
        (dict(int8_head=True), "int8_head is for weights that are packed for Hopper cards"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_loading(
    checkpoint, settings, message, monkeypatch
):
    monkeypatch.setattr("qwen_jax.api.load_params", None)
    with pytest.raises(InputError, match=message):
        qwen_jax.load(checkpoint, **settings)
