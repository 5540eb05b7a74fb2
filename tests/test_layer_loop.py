"""The layer loop of training with stand-ins for the kernels of a card, against PyTorch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from test_memory import temporary_bytes
from test_train import (
    ALL,
    assert_trees_close,
    random_batch,
    random_lora,
    torch_loss_and_grads,
)
from tiny import tiny_config, to_params
from torch_reference import random_weights

from qwen_jax import layer_loop, model
from qwen_jax.adapters import abstract_lora
from qwen_jax.kernels import (
    _pallas_gemm,
    _pallas_rms_norm,
    _pallas_swiglu_low,
    lora_matmul,
    lora_mlp,
    rms_norm,
    swiglu,
)
from qwen_jax.kernels.quantize_rows import quantize_rows
from qwen_jax.layer_weights import share_of
from qwen_jax.params import abstract_params, init_params, param_table
from qwen_jax.quant import QuantFormat, dequantize
from qwen_jax.remat import LEVELS, Remat
from qwen_jax.sharding import MESH_AXES, make_mesh, parse_mesh
from train.step import Compute, batch_sharding, loss_and_grads

MIXED = "selective:1,attention:1,full:1"


@pytest.fixture
def with_kernels(monkeypatch):
    """The ways that lead to kernels, of which stand-ins have the formulas.

    Memory is not zero there before something is written to it.
    """

    def gemm(x, w, low, b, scale=None, *, turned=False, into=None):
        y = x.astype(jnp.float32) @ (w if turned else w.T).astype(jnp.float32) + low @ b
        y = y if scale is None else y * scale[:, None]
        return y if into is None else jax.lax.dynamic_update_index_in_dim(into[0], y, into[1], 0)

    def swiglu_low(up, gate, a, dtype):
        h = swiglu.swiglu(up.cut(), gate.cut())
        made = [] if dtype is None else [h] if dtype == a.dtype else quantize_rows(h)
        return [h @ a.T, *made]

    def added(x, y):
        return x.cut() if y is None else x.cut() + y.cut()

    def norm(x, y, weight, eps, *, total):
        both = [added(x, y)] if total and y is not None else []
        return [rms_norm.rms_norm(added(x, y), weight, eps), *both]

    def gradient(x, y, of_total, of_norms, weight, eps):
        _, pullback = jax.vjp(lambda x: rms_norm.rms_norm(x, weight, eps), added(x, y))
        return of_total + pullback(sum(of_norms))[0]

    def add_behind(place, x, y):
        return place.stack.at[place.index + 1].set(x + y)

    for module in (lora_matmul, lora_mlp):
        monkeypatch.setattr(module, "fused", lambda *_: True)
    monkeypatch.setattr(_pallas_gemm, "gemm", gemm)
    monkeypatch.setattr(swiglu, "_choose_narrow", lambda *_: "mosaic")
    monkeypatch.setattr(_pallas_swiglu_low, "swiglu_low", swiglu_low)
    monkeypatch.setattr(rms_norm, "kernels_serve", lambda x: True)
    monkeypatch.setattr(_pallas_rms_norm, "norm", norm)
    monkeypatch.setattr(_pallas_rms_norm, "gradient", gradient)
    monkeypatch.setattr(_pallas_rms_norm, "add_behind", add_behind)
    monkeypatch.setattr(
        layer_loop, "unfilled", lambda shape, dtype, kernels: jnp.full(shape, jnp.nan, dtype)
    )


def lora_of(cfg, targets: tuple[str, ...]):
    """What is trained; and the same with zeros in place of the pairs that are left out of it."""
    everything = random_lora(cfg)
    wanted = abstract_lora(cfg, dataclasses.replace(ALL, targets=targets))
    layers = everything.weights["layers"]
    some = {
        block: {name: layers[block][name] for name in pairs}
        for block, pairs in wanted.weights["layers"].items()
    }
    without = {
        block: {
            name: pair if name in some.get(block, {}) else jax.tree.map(jnp.zeros_like, pair)
            for name, pair in pairs.items()
        }
        for block, pairs in layers.items()
    }
    return wanted.replace(weights={"layers": some}), everything.replace(weights={"layers": without})


def placed(cfg, fmt: QuantFormat | None, mesh: Mesh, params, lora, batch):
    """These on the devices of a mesh."""
    abstract = (abstract_params(cfg, jnp.float32, fmt, mesh), abstract_lora(cfg, ALL, mesh=mesh))
    layout = jax.tree.map(lambda x: x.sharding, abstract)
    wanted = {"layers": {b: {n: layout[1].weights["layers"][b][n] for n in pairs}
                         for b, pairs in lora.weights["layers"].items()}}  # fmt: skip
    return (
        jax.tree.map(jax.device_put, params, layout[0]),
        lora.replace(weights=jax.tree.map(jax.device_put, lora.weights, wanted)),
        jax.device_put(batch, batch_sharding(mesh)),
    )


@functools.cache
def by_torch(targets: tuple[str, ...], fmt: str = "nf4"):
    """Loss and gradients with the dequantized weights in PyTorch."""
    cfg = tiny_config()
    weights, dense = random_weights(cfg), {}
    params = to_params(cfg, weights, fmt=fmt)
    for spec in param_table(cfg):
        leaf = functools.reduce(lambda tree, key: tree[key], spec.path, params)
        if spec.role == "linear":
            for layer, name in enumerate(spec.torch_names()):
                matrix = dequantize(jax.tree.map(lambda x, i=layer: x[i], leaf), jnp.float32)
                dense[name] = np.asarray(matrix).reshape(weights[name].shape)
    batch = random_batch(cfg, (1, 2, 60))
    tokens, mask = np.asarray(batch["tokens"][0]), np.asarray(batch["loss_mask"][0])
    loss, grads = torch_loss_and_grads(cfg, weights | dense, lora_of(cfg, targets)[1], tokens, mask)
    return cfg, params, batch, loss, grads


@pytest.mark.parametrize(
    ("remat", "targets"),
    [(level, ("all",)) for level in (*LEVELS, MIXED)]
    + [(level, t) for level in ("full", MIXED) for t in (("c_attn",), ("w1", "mlp.c_proj"))],
)
def test_gradients_of_some_targets_with_kernels(with_kernels, remat, targets):
    *_, their_loss, theirs = by_torch(targets)
    loss, grads = step_of(targets, remat, "bf16")
    np.testing.assert_allclose(loss, their_loss, rtol=1e-5)
    assert_gradients(grads, theirs, targets)


def step_of(
    targets: tuple[str, ...], remat: str, products: str, fmt: str = "nf4", mesh: Mesh | None = None
):
    """Our loss and gradients."""
    cfg, params, batch, *_ = by_torch(targets, fmt)
    lora, _ = lora_of(cfg, targets)
    if mesh is not None:
        params, lora, batch = placed(cfg, QuantFormat.named(fmt), mesh, params, lora, batch)
    compute = Compute(remat=Remat.parse(remat, cfg.num_layers), products=products, mesh=mesh)
    step = jax.jit(functools.partial(loss_and_grads, cfg, compute=compute))
    loss, grads, _ = step(params, lora, batch)
    return jax.device_get((loss, grads))


def assert_gradients(grads, theirs, targets: tuple[str, ...]) -> None:
    pairs = grads.weights["layers"]
    assert sum(map(len, pairs.values())) == (5 if targets == ("all",) else len(targets))
    for (_, block, name), pair in theirs.items():
        if name in pairs.get(block, {}):
            assert_trees_close(pairs[block][name], pair, rtol=1e-4)


@pytest.mark.parametrize(
    ("mesh", "fmt", "remat", "targets"),
    [
        ("data=2", "nf4", MIXED, ("all",)),
        ("fsdp=2", "nf4", "selective", ("all",)),
        ("tensor=2", "int8", MIXED, ("all",)),
        ("fsdp=2,tensor=4", "int8", "selective", ("w1", "attn.c_proj", "mlp.c_proj")),
    ],
)
def test_each_device_of_a_mesh_runs_the_kernels(
    with_kernels, monkeypatch, mesh, fmt, remat, targets
):
    mesh, seen = make_mesh(parse_mesh(mesh)), set()
    gemm = _pallas_gemm.gemm

    def watched(x, *operands, **more):
        seen.add(jax.typeof(x).sharding.mesh.manual_axes)
        return gemm(x, *operands, **more)

    monkeypatch.setattr(_pallas_gemm, "gemm", watched)
    _, _, _, their_loss, theirs = by_torch(targets, fmt)
    loss, grads = step_of(targets, remat, "bf16", fmt, mesh)
    assert seen == {MESH_AXES}
    np.testing.assert_allclose(loss, their_loss, rtol=1e-5)
    assert_gradients(grads, theirs, targets)


@pytest.mark.parametrize(
    ("fmt", "ffn", "by_hand"),
    [
        (QuantFormat(kind="int4", group=128), 512, True),
        (QuantFormat(kind="int4", group=128), 384, False),  # 3 groups of down for 2 devices
        (QuantFormat(kind="int8", group=128), 512, True),  # one group of wqkv, as with one scale
        (QuantFormat(kind="int8", group=0), 384, True),
        (QuantFormat(kind="nf4", group=64), 512, False),
    ],
    ids=str,
)
def test_formats_over_tensor_train_as_on_one_device(monkeypatch, fmt, ffn, by_hand):
    cfg = tiny_config(hidden_size=128, head_dim=64, num_heads=4, ffn_size=ffn, num_layers=2)
    params = init_params(cfg, jax.random.key(0), jnp.float32, fmt)
    lora, batch = random_lora(cfg), random_batch(cfg, (1, 2, 40))
    mesh = make_mesh(parse_mesh("tensor=2"))
    seen = []
    monkeypatch.setattr(model, "share_of", lambda *a: seen.append(share_of(*a)) or seen[-1])

    def run(mesh, *arguments):
        compute = Compute(remat=Remat.parse("selective", 2), mesh=mesh)
        step = jax.jit(functools.partial(loss_and_grads, cfg, compute=compute))
        return jax.device_get(step(*arguments))

    one = run(None, params, lora, batch)
    two = run(mesh, *placed(cfg, fmt, mesh, params, lora, batch))
    assert [share is not None for share in seen] == [False, by_hand]
    np.testing.assert_allclose(two[0], one[0], rtol=1e-6)
    assert_trees_close(two[1], one[1], rtol=1e-5)


@pytest.mark.parametrize("remat", ["selective", "full"])
def test_gradients_in_fp8_with_kernels(with_kernels, remat):
    """What is rounded, and by what it is multiplied afterwards, belongs together everywhere.

    e4m3 has 4 bits: one product is off by 0.04, as in test_lora_matmul. A unit or a bound of
    another layer or row would be off by far more than three layers of that add up to.
    """
    *_, their_loss, theirs = by_torch(("all",))
    loss, grads = step_of(("all",), remat, "fp8")
    assert abs(loss - their_loss) < 0.01 * their_loss
    for (_, block, name), pair in theirs.items():
        for ours, want in zip(
            jax.tree.leaves(grads.weights["layers"][block][name]), jax.tree.leaves(pair),
            strict=True,
        ):  # fmt: skip
            assert np.linalg.norm(ours - want) < 0.15 * np.linalg.norm(want), (block, name)


@pytest.mark.parametrize("base", ["nf4", "none"])
def test_level_none_keeps_no_weights(request, base):
    """They lie in their stacks; dequantized or cut out, they would be kept a second time."""
    if base == "nf4":
        request.getfixturevalue("with_kernels")
    cfg = tiny_config(num_layers=12, hidden_size=128, ffn_size=512)
    fmt = QuantFormat.named(base)
    none, full = (
        temporary_bytes(cfg, 8, Remat.parse(level, 12), fmt=fmt) for level in ("none", "full")
    )
    one_layer = 4 * (4 * 128 * 64 + 3 * 128 * 512)
    assert none < full + 3 * one_layer
