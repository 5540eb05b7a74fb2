"""Packed decoding on meshes of virtual CPU devices: the numbers of one device, and few messages."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import layer_of, random_params, random_stack

from benchmarks.collectives import collectives
from qwen_jax import packed, steps
from qwen_jax.cache import abstract_cache, init_cache
from qwen_jax.config import ModelConfig
from qwen_jax.engine import Engine
from qwen_jax.errors import InputError
from qwen_jax.kernels.packing import pack_slices, slice_layout, unpack_layer
from qwen_jax.params import abstract_params, init_params, shardings
from qwen_jax.quant import QuantFormat
from qwen_jax.sampling import SamplingParams
from qwen_jax.sharding import MESH_AXES, make_mesh
from qwen_jax.slots import Slots

# 384 FFN columns are three blocks of 128, which neither 2 nor 4 devices divide: they are padded.
CFG = ModelConfig(
    vocab_size=256, hidden_size=128, num_layers=2, num_heads=8, head_dim=64, ffn_size=384,
    seq_length=16, use_dynamic_ntk=True, use_logn_attn=True,
)  # fmt: skip
GREEDY = SamplingParams(greedy=True, max_new_tokens=20)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.9, repetition_penalty=1.1, max_new_tokens=20)


def mesh_of(text):
    sizes = dict(part.split("=") for part in text.split(","))
    return make_mesh({axis: int(sizes.get(axis, 1)) for axis in MESH_AXES})


weights = functools.cache(functools.partial(random_params, CFG))


def format_of(kind):
    return None if kind == "bf16" else QuantFormat.named(kind)


@functools.cache
def packed_on(text, kind, dtype=jnp.float32, int8_head=False):
    """Mesh and weights: laid out as a checkpoint is loaded, then packed."""
    if text is None:
        return None, packed.pack_params(weights(kind, dtype), int8_head=int8_head)
    mesh = mesh_of(text)
    layouts = shardings(abstract_params(CFG, dtype, format_of(kind), mesh))
    params = jax.tree.map(jax.device_put, weights(kind, dtype), layouts)
    return mesh, packed.pack_params(params, mesh=mesh, int8_head=int8_head)


@pytest.mark.parametrize("kind", ["int4", "nf4", "int8", "bf16"])
@pytest.mark.parametrize("dim", [-1, -2])
def test_each_device_packs_its_own_slice(kind, dim):
    """Against a cut of the dense weight; 384 are padded with zeros to 512."""
    shape = (32, 384) if dim == -1 else (384, 128)
    stack = random_stack(0, kind, 2, *shape)
    mesh = mesh_of("tensor=4")
    got = jax.jit(functools.partial(pack_slices, mesh=mesh, dim=dim, size=512))(stack)
    assert (got.in_size, got.out_shape) == ((128, (32,)) if dim == -1 else (128, (128,)))
    dense = np.pad(layer_of(stack, 1), [(0, 512 - n if n == 384 else 0) for n in shape])
    assert jax.tree.map(lambda x: x.sharding.spec, got) == slice_layout(got, dim)
    for device in range(4):
        codes, scale = jax.tree.map(
            lambda x: x.addressable_shards[device].data[1],  # noqa: B023
            (got.codes, got.scale),
        )
        one = unpack_layer(codes, scale, kind, jnp.float32)[:, : got.in_size]
        want = np.split(dense, 4, axis=dim)[device]
        # The scales of nf4 are kept as float16: 11 bits of 24.
        np.testing.assert_allclose(one, want, rtol=2**-11 if kind == "nf4" else 0)


@pytest.mark.parametrize(
    ("kind", "text", "cache_dtype"),
    [
        ("int4", "data=2,fsdp=2,tensor=2", jnp.bfloat16),
        pytest.param("nf4", "tensor=4", jnp.int8, marks=pytest.mark.slow),
        pytest.param("int8", "tensor=2", jnp.float32, marks=pytest.mark.slow),
        pytest.param("int4", "tensor=4", jnp.float32, marks=pytest.mark.slow),
        pytest.param("int4", "data=2,tensor=2", jnp.int8, marks=pytest.mark.slow),
        pytest.param("nf4", "data=2,fsdp=2,tensor=2", jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param("int8", "data=2,tensor=2", jnp.int8, marks=pytest.mark.slow),
        pytest.param("bf16", "tensor=4", jnp.float32, marks=pytest.mark.slow),
        pytest.param("bf16", "data=2,fsdp=2,tensor=2", jnp.int8, marks=pytest.mark.slow),
    ],
)
def test_prompt_and_steps_are_those_of_one_device(kind, text, cache_dtype):
    tokens = jax.random.randint(jax.random.key(1), (4, 40), 0, CFG.vocab_size)
    counts = jnp.array([24, 19, 1, 8])
    results = []
    for mesh, params in (packed_on(None, kind), packed_on(text, kind)):
        cache = init_cache(CFG, 4, 32, cache_dtype, mesh)
        run = jax.jit(functools.partial(packed.forward, CFG, mesh=mesh), static_argnames="fresh")
        hidden, cache = run(params, tokens[:, :24], cache, counts=counts, fresh=True)
        outs = [packed.unembed(params, hidden[jnp.arange(4), counts - 1], mesh)]
        for start, width in ((24, 1), (25, 3), (28, 1)):
            hidden, cache = run(params, tokens[:, start : start + width], cache)
            outs.append(packed.unembed(params, hidden[:, -1], mesh))
        results.append((np.stack(outs), np.asarray(cache.lengths), np.asarray(cache.ntk)))
    (want, *kept), (got, *kept_too) = results
    # Sums in another order, some ulps; one of them can move a cached value to the next of its
    # dtype: half a step of 1/128 (bfloat16) or 1/127 of the largest (int8), among many.
    loose = 2e-5 if cache_dtype == jnp.float32 else 2e-3
    np.testing.assert_allclose(got, want, rtol=0, atol=loose * np.abs(want).max())
    for a, b in zip(kept, kept_too, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["int8", pytest.param("bf16", marks=pytest.mark.slow)])
def test_whole_sequences_and_an_int8_head(kind):
    tokens = jax.random.randint(jax.random.key(1), (4, 24), 0, CFG.vocab_size)
    (_, one), (mesh, split) = (packed_on(t, kind, int8_head=True) for t in (None, "tensor=2"))
    want = packed.logits(CFG, one, tokens)
    got = packed.logits(CFG, split, tokens, mesh=mesh)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.slow
def test_bfloat16_prompts_add_up_in_bfloat16():
    """Many rows are summed over devices in the compute dtype: one more rounding than one device."""
    tokens = jax.random.randint(jax.random.key(1), (4, 24), 0, CFG.vocab_size)
    (_, one), (mesh, split) = (packed_on(t, "int4", jnp.bfloat16) for t in (None, "tensor=4"))
    want = packed.logits(CFG, one, tokens)
    got = packed.logits(CFG, split, tokens, mesh=mesh)
    # bfloat16 has steps of 2^-8; six sums and their roundings accumulate to a few of them.
    assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)


def requests():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, CFG.vocab_size, n).tolist() for n in (9, 40, 3)]
    return prompts, [GREEDY, SAMPLED, dataclasses.replace(SAMPLED, seed=7, max_new_tokens=5)]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("data=2,fsdp=2,tensor=2", marks=pytest.mark.slow),
        pytest.param("tensor=4", marks=pytest.mark.slow),
        "data=2,tensor=2",
    ],
)
def test_engine_gives_the_tokens_of_one_device(text):
    prompts, settings = requests()
    (_, one), (mesh, split) = packed_on(None, "int4"), packed_on(text, "int4")
    want = Engine(CFG, one).generate(prompts, settings)
    assert Engine(CFG, split, mesh=mesh).generate(prompts, settings) == want


@pytest.mark.slow
def test_drafts_and_slots_give_the_tokens_of_one_device():
    prompts, settings = requests()
    (_, one), (mesh, split) = packed_on(None, "int4"), packed_on("data=2,tensor=2", "int4")
    alone = Engine(CFG, one, cache_dtype=jnp.float32)
    want = [alone.generate([p], s)[0] for p, s in zip(prompts, settings, strict=True)]
    slots = Slots(Engine(CFG, split, mesh=mesh), 3)
    answers = collections.defaultdict(list)
    for prompt, setting in zip(prompts, settings, strict=True):
        row, piece = slots.add(prompt, setting)
        answers[row] += piece.ids
    while slots.free < 3:
        for row, piece in slots.step().items():
            answers[row] += piece.ids
    assert list(answers.values()) == want
    mesh, split = packed_on("tensor=4", "int4")
    drafting = Engine(CFG, split, mesh=mesh, drafts=3)
    assert drafting.generate([prompts[0]], [GREEDY])[0] == want[0]


def decode_text(mesh, params) -> str:
    """The compiled program of a dispatch of decode steps, one device's share of it."""
    engine = Engine(CFG, params, mesh=mesh)
    B = 4
    state = steps.DecodeState(
        cache=init_cache(CFG, B, 64, jnp.float32, mesh),
        token=jnp.zeros(B, jnp.int32),
        seen=jnp.zeros((B, CFG.vocab_size), bool),
        steps=jnp.zeros(B, jnp.int32),
        done=jnp.zeros(B, bool),
    )
    args = (CFG, mesh, CFG.vocab_size, params, {}, engine.requests([SAMPLED] * B, B), state)
    return steps.decode.lower(*args).compile().as_text()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("data=2,fsdp=2,tensor=2", "int4"),
        pytest.param("tensor=2", "int4", marks=pytest.mark.slow),
        pytest.param("tensor=2", "bf16", marks=pytest.mark.slow),
        pytest.param("tensor=2", None, marks=pytest.mark.slow),  # plain weights
    ],
)
def test_a_layer_sends_two_sums_and_no_weight(text, kind):
    if kind is None:
        mesh = mesh_of(text)
        params = init_params(CFG, jax.random.key(0), jnp.float32, None, mesh)
    else:
        mesh, params = packed_on(text, kind)
    # The loop over tokens ends by a condition: one turn of it.
    found = collectives(decode_text(mesh, params), unknown=1)
    # Two in the loop over layers; one joins the rows of the split embedding table. What has one
    # element asks whether all rows are done.
    sums = [c for c in found if c.kind == "all-reduce" and c.size > 4]
    in_layers = [c for c in sums if c.times == CFG.num_layers]
    assert (len(in_layers), len(sums)) == (2, 3), found
    rows = 4 // (4 if "fsdp" in text else 1)
    assert {c.size for c in in_layers} == {4 * rows * CFG.hidden_size}
    # Nothing that travels is larger than the joined logits; the smallest weight is much larger.
    assert max(c.size for c in found) <= 4 * 4 * CFG.vocab_size, found
    assert 4 * CFG.vocab_size < CFG.hidden_size**2 // 8


@pytest.mark.parametrize("kind", ["int4", "bf16"])
def test_gpu_kernels_stay_whole_on_each_device(kind):
    """The program for GPUs is made without one: its kernels may stand only inside the shares."""
    cfg = dataclasses.replace(CFG, hidden_size=512, num_heads=4, head_dim=128, ffn_size=1024)
    mesh = mesh_of("tensor=2")
    params = init_params(cfg, jax.random.key(0), jnp.bfloat16, format_of(kind), mesh)
    params = packed.pack_params(params, mesh=mesh)
    step = jax.jit(
        functools.partial(packed.forward, cfg, mesh=mesh, implementation="mosaic")
    ).trace(params, jnp.zeros((2, 1), jnp.int32), abstract_cache(cfg, 2, 64, jnp.int8, mesh))
    text = step.lower(lowering_platforms=("cuda",)).as_text()
    # Two sums of a layer (the loop stands there once) and that of the embedding.
    assert "mosaic_gpu" in text and text.count("stablehlo.all_reduce") == 3


def test_what_does_not_divide_is_refused():
    with pytest.raises(InputError, match="tensor=8 must divide the 8 heads and 4 groups of 128"):
        packed.pack_params(weights("int4"), mesh=mesh_of("tensor=8"))
    assert not packed.packable(weights("int4"), mesh_of("tensor=8"))
    assert packed.packable(weights("nf4"), mesh_of("tensor=8"))
    _, params = packed_on("data=2,fsdp=2,tensor=2", "int4")
    with pytest.raises(InputError, match="packed for tensor=2, the mesh has tensor=4"):
        Engine(CFG, params, mesh=mesh_of("tensor=4"))


@pytest.mark.parametrize(
    ("kind", "text", "limit", "reason"),
    [
        ("int4", "tensor=8", 10**9, "tensor=8 does not divide 8 heads and 4 groups of 128 inputs"),
        ("int4", "fsdp=2", 0, "whole over fsdp, and the memory of a device is unknown"),
        ("int4", "fsdp=2", 10**5, "more than half of a device's"),
        ("int4", "fsdp=2,tensor=2", 10**9, None),
        ("int4", "data=2,tensor=2", 0, None),
        ("bf16", "tensor=8", 10**9, None),
        ("bf16", "fsdp=2", 0, "whole over fsdp, and the memory of a device is unknown"),
        # 1.8 MB of weights, of which up and gate are 0.4; half of that on each device.
        ("bf16", "tensor=2", 10**6, "their largest are there twice"),
        ("bf16", "tensor=2", 12 * 10**5, None),
    ],
)
def test_why_weights_are_not_packed_is_said_once(kind, text, limit, reason, monkeypatch, caplog):
    monkeypatch.setattr("qwen_jax.packed_params.on_hopper", lambda dtype: True)
    monkeypatch.setattr("qwen_jax.packed_params.device_limit", lambda device: limit)
    params = abstract_params(CFG, jnp.bfloat16, format_of(kind))
    assert packed.pays(params, None, mesh_of(text)) == (reason is None)
    assert len(caplog.messages) == (reason is not None)
    assert reason is None or reason in caplog.text


@pytest.mark.parametrize("kind", ["int4", "bf16"])
def test_weights_are_packed_for_bfloat16_on_a_hopper_card_without_an_adapter(kind, monkeypatch):
    params = abstract_params(CFG, jnp.bfloat16, format_of(kind))
    assert not packed.pays(params, None, None)  # on this machine
    monkeypatch.setattr("qwen_jax.kernels.hopper.is_hopper", lambda: True)
    assert packed.pays(params, None, None)
    assert not packed.pays(params, object(), None)
    assert not packed.pays(abstract_params(CFG, jnp.float32, format_of(kind)), None, None)
