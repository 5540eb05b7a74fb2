"""The memory plan against arrays that exist and against XLA's own accounting."""

import dataclasses
import functools
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh
from tiny import tiny_config

from convert import hf_to_flax
from qwen_jax.adapters import LoraConfig, abstract_lora
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.manifest import Manifest
from qwen_jax.memory import Budget, replicated_share, weight_bytes
from qwen_jax.params import abstract_params, init_params
from qwen_jax.quant import QuantFormat
from qwen_jax.remat import Remat
from qwen_jax.sharding import make_mesh, parse_mesh
from sample import generate
from sample.plan import budget
from train import lora
from train.base import check_room_to_quantize
from train.memory import Workload
from train.step import Compute, loss_and_grads

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
ONE = {"data": 1, "fsdp": 1, "tensor": 1}


def config_72b() -> ModelConfig:
    return ModelConfig.from_hf(json.loads((CONFIGS / "qwen_72b.json").read_text()))


def workload(**changes) -> Workload:
    values = dict(
        cfg=config_72b(),
        format=QuantFormat.named("nf4"),
        dtype=jnp.dtype(jnp.bfloat16),
        lora=LoraConfig(rank=8),
        sizes=ONE,
        rows=1,
        length=2048,
    )
    return Workload(**(values | changes))


def test_unquantized_72b_is_the_published_total_size():
    assert sum(weight_bytes(config_72b(), jnp.bfloat16, None, ONE).values()) == 144_575_840_256


def test_weights_that_an_axis_does_not_divide_are_named():
    nf4 = QuantFormat.named("nf4")
    for divides in (ONE, ONE | {"fsdp": 8}, ONE | {"fsdp": 2, "tensor": 4}, ONE | {"data": 3}):
        assert replicated_share(config_72b(), jnp.bfloat16, nf4, divides) is None
    line = replicated_share(config_72b(), jnp.bfloat16, nf4, ONE | {"fsdp": 3})
    # 3 divides F = 24576 and V = 152064, but neither D = 8192 nor H = 128.
    assert "21.88 of 40.99 GB" in line and "\n" not in line
    assert "(wte over fsdp, wqkv over fsdp, wo over fsdp, down over fsdp)" in line
    alone = sum(weight_bytes(config_72b(), jnp.bfloat16, nf4, ONE | {"fsdp": 3}).values())
    assert alone == pytest.approx(21.88e9 + (40.99e9 - 21.88e9) / 3, rel=1e-3)


@pytest.mark.parametrize("fmt", ["none", "int8", "nf4"])
def test_bytes_of_a_device_are_those_of_real_shards(fmt):
    sizes = {"data": 1, "fsdp": 4, "tensor": 2}
    cfg, fmt = tiny_config(hidden_size=128, head_dim=32, ffn_size=256), QuantFormat.named(fmt)
    params = init_params(cfg, jax.random.key(0), jnp.float32, fmt, make_mesh(sizes))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
    assert sum(weight_bytes(cfg, jnp.float32, fmt, sizes).values()) == held


def temporary_bytes(
    cfg: ModelConfig,
    length: int,
    remat: Remat,
    mesh: Mesh | None = None,
    fmt: QuantFormat | None = None,
) -> int:
    """What XLA allocates for the gradients of a step besides arguments and results."""
    step = functools.partial(loss_and_grads, cfg, compute=Compute(remat=remat, mesh=mesh))
    tokens = jax.ShapeDtypeStruct((1, 1, length), jnp.int32)
    batch = {"tokens": tokens, "loss_mask": jax.ShapeDtypeStruct(tokens.shape, jnp.bool_)}
    lora = abstract_lora(cfg, LoraConfig(rank=4), mesh=mesh)
    params = abstract_params(cfg, jnp.float32, fmt, mesh)
    return jax.jit(step).lower(params, lora, batch).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("tensor", [1, 4])
def test_what_layers_keep_is_what_xla_allocates(tensor):
    cfg, length = tiny_config(num_layers=12, ffn_size=256, head_dim=32), 96
    sizes, mesh = ONE | {"tensor": tensor}, None
    if tensor > 1:
        mesh = make_mesh(sizes)
    work = workload(cfg=cfg, format=None, dtype=jnp.dtype(jnp.float32), length=length, sizes=sizes)
    none = temporary_bytes(cfg, length, Remat.parse("full", 12), mesh)
    for text in ("selective", "attention", "full:6,selective:6"):
        remat = Remat.parse(text, 12)
        more = temporary_bytes(cfg, length, remat, mesh) - none
        planned = sum(n * (work.saved_bytes(level) - work.saved_bytes("full"))
                      for n, level in remat.runs)  # fmt: skip
        # The fullest moment is not the same one in every program: one layer's work of slack.
        assert abs(more - planned) < 1.5 * work.saved_bytes("selective"), (text, more, planned)


@pytest.mark.parametrize(
    ("length", "text", "mesh", "seen"),
    [
        # On one H100 at all 80 layers, with the code of their day.
        (2048, "selective", "1", 76.61),
        (4096, "selective:40,full:40", "1", 81.00),
        (4096, "full:37,selective:43", "1", 79.78),
        (8192, "selective:8,attention:72", "1", 78.23),
        (8192, "selective:8,attention:72", "1", 77.97),
        (2048, "full", "1", 44.45),
        (2048, "full", "1", 43.84),
        # On one H200, and on two.
        (2048, "selective", "1", 76.58),
        (4096, "full:35,selective:45", "1", 81.26),
        (8192, "attention:69,selective:11", "1", 79.50),
        (2048, "full", "1", 44.30),
        (2048, "selective", "data=2", 75.90),
        (2048, "selective", "tensor=2", 41.32),
        # Of programs that XLA compiled for H100s: arguments and temporaries.
        (2048, "none", "1", 87.56),
        (2048, "selective", "fsdp=2", 55.22),
        (2048, "none", "fsdp=2", 66.56),
        (8192, "full", "fsdp=8", 20.87),
        (2048, "selective", "data=2,fsdp=2,tensor=2", 31.02),
    ],
)
def test_the_plan_of_72b_nf4_agrees_with_the_peaks_seen_on_cards(length, text, mesh, seen):
    on_host = text.startswith(("full:3", "attention:69")) or (text, mesh) == ("full", "1")
    work = workload(length=length, offload_embedding=on_host, sizes=parse_mesh(mesh))
    planned = work.budget(Remat.parse(text, 80)).total / 1e9
    assert abs(planned / seen - 1) < 0.03


def test_packed_rows_have_a_mask():
    apart, packed = (workload(rows=2, packed=packed) for packed in (False, True))
    remat = Remat.parse("selective", 80)
    assert packed.budget(remat).total - apart.budget(remat).total == 2 * 2048 * 2048 * 2


def test_each_run_of_layers_has_its_moment():
    """A layer that is run again holds all its weights, while those before it still keep theirs."""
    work = workload(length=512)

    def total(text):
        return work.budget(Remat.parse(text, 80)).total

    # 80 layers that keep nothing need less than when one of them does: then none is lean any more.
    all_weights = 2 * (4 * 8192**2 + 3 * 8192 * 24576)
    some_weights = 2 * (2 * 24576 + 8192) * 8192
    lean, mixed = total("full"), total("full:79,selective:1")
    one_kept = work.saved_bytes("selective") - work.saved_bytes("full")
    assert one_kept < all_weights - some_weights
    assert mixed - lean == all_weights - some_weights - work.saved_bytes("full")
    # Where so many keep their products that these are more, that moment counts.
    many = total("full:40,selective:40")
    inputs = 512 * 8192 * 2  # one more result behind the inputs of a run
    assert many - lean == 40 * one_kept + inputs
    # On a mesh all weights of a layer may be there at once.
    mesh = workload(format=None, length=512, sizes=ONE | {"fsdp": 8})
    planned = mesh.budget(Remat.parse("selective", 80)).items
    assert planned["work of one layer or of the loss"] > all_weights


def test_chosen_remat_fits_and_uses_the_room():
    card = int(82.9e9)
    for length, expected in ((1024, "selective"), (2048, "selective")):
        assert str(workload(length=length).choose_remat(card)) == expected
    for length in (4096, 8192):
        work = workload(length=length)
        chosen = work.choose_remat(card)
        room = card - work.budget(chosen).total
        assert 0 < room < 0.03 * card + work.saved_bytes("selective")
    assert str(workload(length=8192).choose_remat(card)) == "attention:70,selective:10"


def test_layers_that_keep_most_come_last_and_need_no_more_memory_there():
    cfg, length = tiny_config(num_layers=6, ffn_size=256, head_dim=32), 96
    nf4 = QuantFormat.named("nf4")
    last, first = (
        temporary_bytes(cfg, length, Remat.parse(text, 6), fmt=nf4)
        for text in ("full:3,selective:3", "selective:3,full:3")
    )
    assert last <= first
    card = int(82.9e9)
    for length, levels in (
        (4096, ["full", "selective"]),
        (8192, ["attention", "selective"]),
        (16384, ["full", "attention"]),
    ):
        assert [level for _, level in workload(length=length).choose_remat(card).runs] == levels
    given = workload(length=4096).plan("selective:30,full:50", card)
    assert str(given.remat) == "selective:30,full:50"


def test_the_embedding_leaves_the_device_if_more_layers_then_keep_their_products():
    card = int(82.9e9)
    work = workload(length=4096)
    plan, without = work.plan("auto", card), work.choose_remat(card)
    assert plan.offload_embedding and kept(plan.remat) >= kept(without) + 3
    assert "embedding" not in plan.budget.items and plan.budget.total < card
    assert plan.describe().endswith("in host memory, which makes room on the device")
    # All fits, nothing is known of the card, or what each step would hold of it is more than it.
    fits = workload(length=2048).plan("auto", card)
    assert not fits.offload_embedding and str(fits.remat) == "selective"
    assert "embedding" in fits.budget.items and "host" not in fits.describe()
    assert not work.plan("auto", 0).offload_embedding
    many = dataclasses.replace(work, accumulation=64)
    assert not many.plan("auto", card).offload_embedding


def test_the_embedding_lies_where_flag_or_explicit_remat_want_it():
    card = int(82.9e9)
    for text in ("full", "full:40,selective:40"):
        plan = workload(length=4096).plan(text, card)
        assert (str(plan.remat), plan.offload_embedding) == (text, False)
    for length, text in ((4096, "full"), (2048, "auto")):
        plan = workload(length=length, offload_embedding=True).plan(text, card)
        assert plan.offload_embedding and "embedding" not in plan.budget.items
        assert plan.describe().endswith("the embedding stays in host memory")


def kept(remat: Remat) -> int:
    """Layers that keep their products."""
    return sum(count for count, level in remat.runs if level == "selective")


def test_what_cannot_fit_is_refused_with_its_numbers():
    work = workload(format=None)
    with pytest.raises(InputError, match=r"needs 14\d\.\d GB on each device .*; buy another"):
        work.budget(Remat.parse("full", 80), int(82.9e9)).check("buy another")
    assert str(work.choose_remat(int(82.9e9))) == "full"
    Budget({"anything": 10**15}).check("")  # no limit known, nothing refused


def test_more_devices_hold_less():
    whole = workload().budget(Remat.parse("attention", 80)).items
    cut = dataclasses.replace(workload(), sizes=ONE | {"fsdp": 8})
    part = cut.budget(Remat.parse("attention", 80)).items
    codes = "linear layers, nf4 codes"
    assert part[codes] * 8 == whole[codes]
    work = "work of one layer or of the loss"  # weights are gathered layer by layer
    assert part[work] == whole[work]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("selectiv", "did you mean .selective"),
        ("selective:2,full:2", "names 4 layers; the model has 3"),
        ("selective:x,full:2", "needs a number of layers"),
        ("full:-3", "needs a number of layers"),
    ],
)
def test_wrong_remat_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        Remat.parse(text, 3)


def test_plans_of_the_programs_need_no_weights(tmp_path, capsys, monkeypatch):
    space = shutil.disk_usage(tmp_path)._replace(free=10**12)  # whatever this machine has
    monkeypatch.setattr(shutil, "disk_usage", lambda path: space)
    config = json.loads((CONFIGS / "qwen_72b_chat.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    folder = str(tmp_path)
    hf_to_flax.main(["--input", folder, "--output", f"{folder}/out", "--quantize", "nf4", "--plan"])
    assert re.search(r"sum +40\.99 GB of", capsys.readouterr().out)
    train = ["--model_name_or_path", folder, "--dataset", "x", "--output_dir", f"{folder}/o"]
    train += ["--plan", "--bf16", "--quantization_bit", "4", "--device_memory"]
    lora.main([*train, "48", "--offload_embedding"])
    assert "of 48.00 GB" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"which has 40\.0 GB; use --remat full"):
        lora.main([*train, "40"])
    generate.main(["--checkpoint", folder, "--plan", "--mesh", "tensor=2", "--batch_size", "4"])
    shown = capsys.readouterr().out
    # 2 x 64 x 128 x 80 bf16 values a token, 4 rows of 2,048, half on each device.
    assert f"{2 * 64 * 128 * 80 * 2 * 4 * 2048 / 2 / 1e9:.2f} GB" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


def test_the_plan_of_generation_counts_what_the_cache_and_a_chunk_take():
    manifest = Manifest(
        config=config_72b(), dtype="bfloat16", quantization=QuantFormat.named("int4"),
        fingerprint="", checksums={},
    )  # fmt: skip

    def items(tokens, cache_dtype=None):
        return budget(manifest, ONE, 2, tokens, None, 0, cache_dtype).items

    values, heads = 2 * 64 * 128 * 80, 2 * 64 * 80  # keys and values of a token; their scales
    name = "KV cache of 2 x 4096 tokens"
    rows = 2 * 2 * 4  # length and NTK row of each sequence
    assert items(4096)[name] == 2 * 4096 * values * 2 + rows
    assert items(4096, "int8")[name] == 2 * 4096 * (values + 2 * heads) + rows
    # 2,048 tokens of each of two rows at once. Beyond that only what a chunk looks at grows: a
    # layer's keys and values, and its mask.
    work = "work of a prefill"
    more = items(32768)[work] - items(2048)[work]
    assert more == 2 * 32768 * (2 * 64 * 128 + 2048) * 2


def test_the_plan_of_generation_counts_packed_layers_whole_where_there_is_room():
    manifest = Manifest(
        config=config_72b(), dtype="bfloat16", quantization=QuantFormat.named("int4"),
        fingerprint="", checksums={},
    )  # fmt: skip
    sizes, card = ONE | {"fsdp": 2, "tensor": 2}, int(80e9)

    def codes(sizes=sizes, limit=card, **more):
        items = budget(manifest, sizes, 2, 2048, None, limit, **more).items
        return {name: size for name, size in items.items() if "codes" in name}

    half = codes(ONE)["linear layers, int4 codes"] // 2
    assert codes() == {"linear layers, int4 codes, packed: whole over fsdp": half}
    split = {"linear layers, int4 codes": half // 2}
    # Half of 30 GB is less than the layers' 18; an unknown card promises nothing; adapters need
    # plain weights, and the kernels bfloat16.
    assert codes(limit=int(30e9)) == codes(limit=0) == codes(adapter=True) == split
    float32 = budget(manifest, sizes, 2, 2048, "float32", card).items
    assert float32["linear layers, int4 codes"] == half // 2


def test_bfloat16_layers_are_packed_and_whole_where_there_is_room():
    manifest = Manifest(
        config=config_72b(), dtype="bfloat16", quantization=None, fingerprint="", checksums={}
    )

    def layers(sizes, limit, **more):
        items = budget(manifest, sizes, 2, 2048, None, limit, **more).items
        return {name: size for name, size in items.items() if "linear" in name}

    sizes = ONE | {"fsdp": 2, "tensor": 4}
    quarter = layers(ONE, 0)["linear layers"] // 4
    assert layers(sizes, int(80e9)) == {"linear layers, packed: whole over fsdp": quarter}
    split = {"linear layers": quarter // 2}
    # A quarter is 35 GB. An adapter needs plain weights, the kernels bfloat16.
    assert layers(sizes, int(60e9)) == layers(sizes, int(80e9), adapter=True) == split
    float32 = budget(manifest, sizes, 2, 2048, "float32", int(300e9)).items
    assert float32["linear layers"] == quarter


def test_a_plain_base_that_cannot_be_quantized_in_memory_is_refused():
    manifest = Manifest(
        config=config_72b(), dtype="bfloat16", quantization=None, fingerprint="", checksums={}
    )
    nf4 = QuantFormat.named("nf4")
    with pytest.raises(InputError, match=r"needs 15\d\.\d GB .* convert with --quantize nf4"):
        check_room_to_quantize(manifest, "bfloat16", nf4, ONE, int(82.9e9))
    check_room_to_quantize(manifest, "bfloat16", nf4, ONE | {"fsdp": 8}, int(82.9e9))
