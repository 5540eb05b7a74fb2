"""What a sharded training step sends, read off its compiled HLO; and that it computes the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from benchmarks.collectives import Collective, collectives
from benchmarks.compiled import abstract_step
from qwen_jax.adapters import LoraConfig, abstract_lora
from qwen_jax.params import init_params, param_table
from qwen_jax.quant import QuantFormat, quantize
from qwen_jax.remat import Remat
from qwen_jax.sharding import make_mesh, parse_mesh
from train import overlap, step
from train.step import (
    Compute,
    at_once_pays,
    compile_step,
    init_state,
    make_optimizer,
    make_schedule,
)

# Sizes that 8 divides, in nf4 groups of 64, with 8 heads and a vocabulary that is cut too.
CFG = tiny_config(
    num_layers=5, hidden_size=256, num_heads=8, head_dim=32, ffn_size=512, vocab_size=512
)
LORA = LoraConfig(rank=4, alpha=8.0)
ROWS, LENGTH = 8, 64


def parts(mesh, remat="full", base="nf4"):
    """The step over abstract arrays, and those."""
    compute = Compute(remat=Remat.parse(remat, CFG.num_layers), mesh=mesh)
    fmt = QuantFormat.named(base)
    return abstract_step(CFG, fmt, jnp.float32, LORA, compute, rows=ROWS, length=LENGTH)


@functools.cache
def exchange(mesh_text, remat, base="nf4") -> list[Collective]:
    step, *arguments = parts(make_mesh(parse_mesh(mesh_text)), remat, base)
    return collectives(step.lower(*arguments).compile().as_text())


def packed_bytes():
    """Codes and scales of the linear layers: all that fsdp cuts of the frozen layers."""
    fmt = QuantFormat.named("nf4")
    total = 0
    for spec in param_table(CFG):
        if spec.role == "linear":
            shapes = fmt.shapes(spec.out_shape, spec.in_size)
            for name in ("data", "scale"):
                shape, dtype = shapes[name]
                total += spec.layers * int(np.prod(shape)) * np.dtype(dtype).itemsize
    return total


def lora_values():
    """Values of the LoRA matrices whose outputs fsdp cuts: b of all five."""
    return sum(
        int(np.prod((*spec.full_shape[:-1], LORA.rank))) for spec in param_table(CFG)
        if spec.lora_target
    )  # fmt: skip


@pytest.mark.parametrize("group, remat", [(4, "full"), (2, "selective")])
def test_fsdp_gathers_packed_weights_twice_a_layer_and_nothing_wider(group, remat):
    mesh_text = f"fsdp={group}"
    found = exchange(mesh_text, remat)
    in_layers = [c for c in found if c.times > 1]
    # Besides the gathers a layer only sums gradients: it exchanges no activations.
    assert {c.times for c in in_layers} == {CFG.num_layers}
    assert {c.group for c in in_layers} == {group}
    assert {c.kind for c in in_layers} == {"all-gather", "all-reduce"}
    gathers = [c for c in in_layers if c.kind == "all-gather"]
    assert {c.dtypes for c in gathers} == {("u8",)}
    # Once for the forward pass, once for what is recomputed and the backward pass together.
    assert sum(c.size * c.times for c in gathers) == 2 * packed_bytes()
    assert sum(c.size for c in gathers if "again" in c.place) * 2 == sum(c.size for c in gathers)
    sums = [c for c in in_layers if c.kind == "all-reduce"]
    values = sum(leaf.size for leaf in jax.tree.leaves(abstract_lora(CFG, LORA)))
    assert sum(c.size * c.times for c in sums) == 4 * values


def test_the_embedding_table_stays_where_it_is():
    """Rows of activations are exchanged instead; the table would be 2.5 GB a step at 72B."""
    once = [c for c in exchange("fsdp=4", "full") if c.times == 1 and c.kind != "all-reduce"]
    rows = 4 * ROWS * LENGTH * CFG.hidden_size
    # Rows for columns, in 4 devices' shares; then the rows of all to each slice of the head.
    large = sorted((c.kind, c.size) for c in once if c.size >= rows // 4)
    assert large == [("all-gather", rows), ("all-to-all", rows // 4)]
    # LoRA's b is joined for all layers at once. (The rest is tokens, masks and the like.)
    joined = [c.size for c in once if "(loss)" not in c.place and "shard_map" not in c.place]
    assert sum(joined) == 4 * lora_values() and len(joined) == 5


def test_data_parallel_sends_nothing_but_gradients():
    found = exchange("data=4", "full")
    values = sum(leaf.size for leaf in jax.tree.leaves(abstract_lora(CFG, LORA)))
    assert {c.kind for c in found} == {"all-reduce"}
    sent = sum(c.sent for c in found)
    assert sent == pytest.approx(2 * 3 / 4 * 4 * values, rel=0.001)  # and a few scalars


@pytest.mark.parametrize(("remat", "sums"), [("selective", 4), ("full", 5)])
def test_tensor_parallel_adds_up_activations_twice_a_layer_and_pass(remat, sums):
    """Results of wo and down, and the gradients of what reads a norm; if nothing is kept, the
    result of wo once more.
    """
    found = [c for c in exchange("tensor=2", remat, "int8") if c.times == CFG.num_layers]
    assert {(c.kind, c.group) for c in found} == {("all-reduce", 2)}
    pairs = abstract_lora(CFG, LORA).weights["layers"]
    # What all devices have alike of the pairs: a of wqkv, up and gate, b of wo and down.
    alike = [pairs["attn"]["wqkv"]["a"], pairs["mlp"]["up"]["a"], pairs["mlp"]["gate"]["a"]]
    alike += [pairs["attn"]["wo"]["b"], pairs["mlp"]["down"]["b"]]
    values = sum(x.size for x in alike) + CFG.num_layers * sums * ROWS * LENGTH * CFG.hidden_size
    assert sum(c.size * c.times for c in found) == 4 * values


@functools.cache
def weights():
    return init_params(CFG, jax.random.key(0), jnp.float32, QuantFormat.named("nf4"))


@functools.cache
def trained(mesh_text):
    """Losses of four steps and the LoRA weights after them."""
    mesh = make_mesh(parse_mesh(mesh_text))
    _, abstract, layout, batch = parts(mesh)
    params = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), weights(), layout)
    rng = np.random.default_rng(0)
    lora = jax.tree.map(
        lambda x: jax.device_put(rng.standard_normal(x.shape).astype(np.float32) / 10, x.sharding),
        abstract.lora,
    )
    schedule = make_schedule("constant", 3e-3, 10)
    optimizer = make_optimizer(schedule)
    state = init_state(optimizer, lora, mesh)
    compute = Compute(remat=Remat.parse("full", CFG.num_layers), mesh=mesh)
    step = compile_step(CFG, optimizer, schedule, state, params, compute)
    tokens = rng.integers(0, CFG.vocab_size, (1, ROWS, LENGTH)).astype(np.int32)
    rows = {"tokens": tokens, "loss_mask": rng.random(tokens.shape) < 0.4}
    rows = jax.device_put(rows, {name: leaf.sharding for name, leaf in batch.items()})
    metrics = []
    for _ in range(4):
        state, m = step(state, params, rows)
        metrics.append((float(m["loss"]), float(m["grad_norm"])))
    return np.array(metrics), jax.device_get(state.lora.weights)


@pytest.mark.parametrize(
    "mesh_text",
    [
        "data=2,fsdp=4",
        *(
            pytest.param(mesh, marks=pytest.mark.slow)
            for mesh in ("data=8", "fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2")
        ),
    ],
)
def test_eight_devices_train_nf4_like_one(mesh_text):
    # float32 sums in another order: 256 to 512 terms of an ulp (6e-8), through five layers. Where a
    # gradient is small AdamW takes its sign, and rounding may turn it: with steps of 0.01 that
    # moved the norm of the fourth gradient by 0.005, with these by 4e-5.
    one, eight = trained("1"), trained(mesh_text)
    np.testing.assert_allclose(eight[0][:, 0], one[0][:, 0], rtol=1e-5)
    np.testing.assert_allclose(eight[0][:2, 1], one[0][:2, 1], rtol=1e-4)
    np.testing.assert_allclose(eight[0][2:, 1], one[0][2:, 1], rtol=1e-3)
    assert one[0][-1][0] < one[0][0][0] - 0.1  # it does learn
    for a, b in zip(jax.tree.leaves(eight[1]), jax.tree.leaves(one[1]), strict=True):
        assert np.abs(a - b).mean() < 3e-5  # of steps of 0.003


def test_overlap_options_are_those_of_gpus_and_known_to_this_jaxlib():
    mesh = make_mesh(parse_mesh("fsdp=2"))
    assert overlap.compiler_options(mesh) == {}  # a CPU takes none

    class Gpu:
        platform = "gpu"

    class Pair:
        size, devices = 2, np.array([Gpu(), Gpu()])

    options = overlap.compiler_options(Pair(), "pipeline")
    assert options["xla_gpu_enable_latency_hiding_scheduler"] is True
    if jax.__version_info__ < (0, 11):  # later ones do not know it any more
        assert "xla_gpu_enable_pipelined_all_gather" in options
    assert overlap.compiler_options(Pair()) == overlap.compiler_options(Pair(), "schedule")
    One = type("One", (), {"size": 1, "devices": np.array([Gpu()])})
    at_once = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
    apart = overlap.compiler_options(One(), "none")
    # Kernels run on one device and on several, and none of them twice.
    assert apart == {"xla_gpu_enable_dynamic_slice_fusion": False}
    by_nccl = {"xla_gpu_experimental_use_collective_kernels": ""}
    by_nccl = by_nccl if jax.__version_info__ >= (0, 11) else {}  # earlier ones do not know it
    assert overlap.compiler_options(Pair(), "none") == apart | by_nccl
    assert overlap.compiler_options(One()) == apart | at_once
    assert overlap.compiler_options(One(), at_once=False) == apart
    assert overlap.compiler_options(One(), "schedule", at_once=False) == apart | at_once
    assert not overlap.known("xla_gpu_no_such_option", True)
    assert not overlap.known("xla_gpu_command_buffer_scheduling_mode", "NO_SUCH_MODE")
    with pytest.raises(ValueError, match="expected one of auto, none"):
        overlap.compiler_options(Pair(), "some")


@pytest.mark.parametrize(
    ("remat", "kind", "pays"),
    [
        ("selective", "nf4", True),
        ("selective:1,full:3", "nf4", True),
        ("selective:1,attention:4", "nf4", False),
        ("full", "nf4", False),
        ("selective", None, False),
    ],
)
def test_kernels_run_at_once_where_that_pays(monkeypatch, remat, kind, pays):
    layers = sum(int(part.partition(":")[2] or 4) for part in remat.split(","))
    w = (
        jnp.zeros((8, 128))
        if kind is None
        else quantize(jnp.ones((8, 128)), QuantFormat.named(kind))
    )
    params, remat = {"layers": {"w": w}}, Remat.parse(remat, layers)
    assert not at_once_pays(params, remat)  # not a Hopper card
    monkeypatch.setattr(step, "is_hopper", lambda: True)
    assert at_once_pays(params, remat) == pays


@pytest.mark.parametrize(
    "groups, members",
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[2,2]<=[4]", (0, 1)),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", (0, 2)),
        ("replica_groups=mesh['x'=2,'y'=4] {'y'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['x'=2,'y'=4] {'x'}", (0, 4)),
        ("replica_groups=mesh['x'=2,'y'=4] {'y':(2)2}", (0, 1)),
        ("replica_groups=mesh['x'=2,'y'=1,'z'=4], device_ids=([2,2,2]T(0,2,1)) {'x'}", (0, 4)),
        ("replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", (0, 4)),
    ],
)
def test_collectives_are_counted_with_their_loops_and_groups(groups, members):
    text = f"""HloModule step

%body (p: (s32[], f32[4,256])) -> (s32[], f32[4,256]) {{
  %ag = f32[4,256]{{1,0}} all-gather(%x), channel_id=1, {groups}, dimensions={{1}}, metadata={{op_name="a/b"}}
}}

%condition (p: (s32[], f32[4,256])) -> pred[] {{
  %c = pred[] compare(%i, %n), direction=LT
}}

ENTRY %main (p: f32[4,64]) -> f32[4,256] {{
  %w = (s32[], f32[4,256]) while(%t), condition=%condition, body=%body, backend_config={{"known_trip_count":{{"n":"7"}}}}
  %ar = (bf16[8]{{0}}, f32[]) all-reduce(%a, %b), {groups}, to_apply=%add
}}
"""  # noqa: E501
    gather, reduce = sorted(collectives(text), key=lambda c: c.kind)
    share = (len(members) - 1) / len(members)
    assert gather.members == reduce.members == members
    assert (gather.times, gather.size, gather.dtypes, gather.place) == (7, 4096, ("f32",), "a/b")
    assert gather.sent == pytest.approx(7 * 4096 * share)
    assert (reduce.size, reduce.dtypes) == (20, ("bf16", "f32"))
    assert reduce.sent == pytest.approx(20 * 2 * share)
