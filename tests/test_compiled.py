"""The benchmark that compiles for cards that are not there: what it reads off programs.

With jax's CUDA plugin, on a machine without a GPU, the programs themselves too:

    JAX_PLATFORMS=cpu python -m pytest -m slow tests/test_compiled.py
"""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from tiny import tiny_config

from benchmarks import compiled
from benchmarks.collectives import collectives
from qwen_jax.adapters import LoraConfig
from qwen_jax.errors import InputError, UsageError
from qwen_jax.kernels import hopper
from qwen_jax.quant import QuantFormat
from qwen_jax.sharding import parse_mesh
from train.memory import Workload

HAS_PLUGIN = importlib.util.find_spec("jax_cuda13_plugin") is not None


def with_the_compiler(test):
    here = HAS_PLUGIN and jax.config.jax_platforms == "cpu"
    reason = "needs jax's CUDA plugin, and JAX_PLATFORMS=cpu"
    return pytest.mark.slow(pytest.mark.skipif(not here, reason=reason)(test))


# As XLA writes it: sums of a float32 and of a bfloat16 array, joined as if both were float32.
JOINED = """\
ENTRY %main (p: f32[1], q: bf16[2,4]) -> bf16[2,4] {
  %p = f32[1]{0} parameter(0)
  %q = bf16[2,4]{1,0} parameter(1)
  %flat = f32[8]{0} bitcast(%q), metadata={scheduling_name="flat"}
  %both = f32[9]{0} fusion(%p, %flat), kind=kLoop, calls=%wrapped_concatenate
  %sum = f32[9]{0} all-reduce(%both), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  %part = f32[8]{0} fusion(%sum), kind=kLoop, calls=%wrapped_slice
  ROOT %back = bf16[2,4]{1,0} bitcast(%part)
}
"""


def test_an_array_taken_for_another_is_found():
    found = compiled.mistaken(JOINED)
    assert [line.split(" = ")[0] for line in found] == ["%flat", "ROOT %back"]
    assert compiled.mistaken(JOINED.replace("f32[8]", "f32[4]")) == []  # the same 16 bytes
    # Names are those of one computation: another one may have the same.
    other = "%body {\n  %q = f32[8]{0} parameter(0)\n  %flat = f32[2,4]{1,0} bitcast(%q)\n}"
    assert compiled.mistaken(f"{other}\n\n{JOINED}") == found


def test_weights_of_many_layers_made_twice_are_counted():
    given = "ENTRY %main {\n  %stack = u8[80,16,8]{2,1,0} parameter(0)\n"
    layer = "  %one = u8[16,8]{1,0} fusion(%stack, %i), kind=kLoop, calls=%fused_cut\n"
    kept = "  %kept = bf16[80,16,8]{2,1,0} fusion(%x), kind=kLoop, calls=%fused_write\n"
    turned = "(u8[16,80,8]{2,1,0}, f32[]) fusion(%stack), kind=kLoop, calls=%wrapped_turn\n"
    inside = "%wrapped_turn {\n  ROOT %t = u8[16,80,8]{2,1,0} transpose(%p), dimensions={1,0,2}\n}"
    assert compiled.copied_weights(f"{inside}\n\n{given}{layer}{kept}}}", 16 * 8) == 0
    text = f"{inside}\n\n{given}{layer}  %all = {turned}{kept}}}"
    assert compiled.copied_weights(text, 16 * 8) == 80 * 16 * 8


@pytest.mark.parametrize(
    ("result", "size"),
    [
        ("bf16[4,8]{1,0} all-reduce-start(", 64),
        ("(bf16[4,8]{1,0}, f32[2]{0}) all-reduce-start(", 72),
        # jax 0.11: operands first, apart.
        ("((bf16[4,8]{1,0}), bf16[4,8]{1,0}) all-reduce-start(", 64),
        ("((bf16[4,8]{1,0}, f32[2]{0}), (bf16[4,8]{1,0}, f32[2]{0})) all-reduce-start(", 72),
        ("((u8[4,8]{1,0}), u8[8,8]{1,0}) all-gather-start(", 64),
        ("(u8[4,8]{1,0}, u8[8,8]{1,0}) all-gather-start(", 64),
    ],
)
def test_a_start_counts_its_results_alone(result, size):
    text = f"ENTRY %main () -> f32[] {{\n  %x = {result}%p), replica_groups={{{{0,1}}}}\n}}\n"
    (found,) = collectives(text)
    assert found.size == size


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rows", "0"], "--rows is 0; expected at least 1"),
        (["--seq", "2048", "0"], "--seq is 0; expected at least 1"),
        (["--compute", "bf17"], "--compute bf17: expected one of bf16, fp8"),
        (["--layers", "0"], "num_layers is 0: a whole number over 0 is expected"),
        (["--meshes", "1", "tensor=3"], "tensor=3 must divide the 64 heads"),
        (["--meshes", "1", "fspd=2"], "fspd"),
        (["--quantize", "nf4", "foo"], "foo"),
        (["--remat", "full", "most"], "unknown level 'most'"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_compiled(flags, message, capsys):
    with pytest.raises((UsageError, InputError), match=message):
        compiled.main(flags)
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(hopper.is_hopper(), reason="the card is here")
def test_kernels_are_chosen_for_a_card_only_within():
    assert not hopper.on_hopper(jnp.bfloat16)
    with compiled.for_a_card():
        assert hopper.on_hopper(jnp.bfloat16)
        assert not hopper.on_hopper(jnp.float32)
    assert not hopper.is_hopper()
    assert not hopper.on_gpu()


def test_without_a_compiler_it_says_what_to_install(monkeypatch):
    if HAS_PLUGIN:

        def nothing(*_, **__):
            raise NotImplementedError("topology not implemented for cuda")

        monkeypatch.setattr(compiled.topologies, "get_topology_desc", nothing)
    with pytest.raises(UsageError, match=r"no compiler for CUDA .*pip install -e '\.\[cuda\]'"):
        compiled.main(["--layers", "2", "--meshes", "fsdp=2"])


@pytest.mark.parametrize(
    ("mesh", "base", "remat", "products"),
    [
        # Runs of one layer are not in a loop: XLA joins their sums with others.
        ("data=2", "nf4", "selective:1,full:1", "bf16"),
        ("data=2", "nf4", "selective:1,full:1", "fp8"),
        ("data=2", "nf4", "none", "bf16"),
        ("fsdp=2", "nf4", "full:1,selective:1", "bf16"),
        ("fsdp=2", "nf4", "attention:1,selective:1", "fp8"),
        ("data=2,fsdp=2", "none", "selective:1,full:1", "bf16"),
        ("tensor=2", "nf4", "selective", "bf16"),
        ("data=2,tensor=2", "int8", "selective:1,full:1", "bf16"),
        ("data=2,fsdp=2,tensor=2", "int8", "none", "bf16"),
    ],
)
@with_the_compiler
def test_programs_for_cards_take_no_array_for_another(mesh, base, remat, products):
    cfg = tiny_config(
        vocab_size=512, hidden_size=1024, num_layers=2, num_heads=8, head_dim=128, ffn_size=1024
    )
    work = Workload(
        cfg=cfg, format=QuantFormat.named(base), dtype=jnp.bfloat16,
        lora=LoraConfig(rank=8), sizes=parse_mesh(mesh), rows=1, length=512,
    )  # fmt: skip
    text, _ = compiled.compiled_step(work, work.plan(remat, 0), products)
    assert compiled.mistaken(text) == []
    if remat != "none" and "tensor" not in mesh:  # there the compiler adds up, or activations too
        sums = [c for c in collectives(text, unknown=1) if re.search("transpose.*psum", c.place)]
        assert {dtype for one in sums for dtype in one.dtypes} == {"f32"}


@pytest.mark.parametrize(
    ("mesh", "remat"),
    [
        ("1", "selective"), ("1", "none"), ("data=2", "selective"), ("fsdp=2", "selective"),
        ("fsdp=2", "none"), ("tensor=2", "full"), ("data=2,fsdp=2,tensor=2", "selective"),
    ],
)  # fmt: skip
@with_the_compiler
def test_the_plan_is_what_xla_plans_for_cards(mesh, remat):
    args = compiled.Args()
    cfg = compiled.ModelConfig.from_hf(
        compiled.read_json_object(compiled.CONFIGS / "qwen_72b.json")
    )
    work, plan = compiled.planned(args, cfg, mesh, "nf4", 2048, remat)
    _, line = compiled.row(work, plan, mesh, "bf16")
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    total, planned = (float(cell.removesuffix(" GB")) for cell in (cells[7], cells[8]))
    assert abs(planned / total - 1) < 0.05
    assert cells[10:12] == ["0.00 GB", "0"]
