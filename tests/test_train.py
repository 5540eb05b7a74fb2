"""Training against PyTorch, one device against eight, and a run against a run that was resumed."""

import functools
import json
import os
import pathlib
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from tiny import tiny_config, to_params
from torch_reference import qwen2_model, random_weights

from convert import hf_to_flax
from demo.tiny_checkpoint import write_tiny_checkpoint
from qwen_jax.adapters import (
    LoraConfig,
    abstract_lora,
    count_trainable,
    describe_trainable,
    init_lora,
)
from qwen_jax.config import ModelConfig
from qwen_jax.errors import InputError
from qwen_jax.manifest import load_manifest
from qwen_jax.params import abstract_params, param_table
from qwen_jax.quant import QTensor, QuantFormat
from qwen_jax.remat import Remat
from qwen_jax.sharding import make_mesh, parse_mesh
from train import lora as program
from train import loss as loss_file
from train.base import quantize_params
from train.batches import Example, collate
from train.loss import next_token_loss
from train.memory import Workload
from train.packing import pack
from train.report import Report
from train.step import (
    Compute,
    compile_step,
    init_state,
    loss_and_grads,
    make_optimizer,
    make_schedule,
)

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
ALL = LoraConfig(rank=4, alpha=8.0)
QWEN2_NAMES = {
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "mlp.w1.weight": "mlp.up_proj.weight",
    "mlp.w2.weight": "mlp.gate_proj.weight",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
}


def random_batch(cfg, shape, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, cfg.vocab_size, shape).astype(np.int32)
    return {"tokens": jnp.asarray(tokens), "loss_mask": jnp.asarray(rng.random(shape) < 0.4)}


@functools.partial(jax.jit, static_argnames=("cfg", "remat", "mesh"))
def jitted(cfg, params, lora, batch, remat="full", mesh=None):
    compute = Compute(remat=Remat.parse(remat, cfg.num_layers), mesh=mesh)
    return loss_and_grads(cfg, params, lora, batch, compute)


def random_lora(cfg, lora_cfg=ALL, seed=0):
    """Both factors away from zero: a fresh adapter has b = 0 and no gradient at a."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape) * 0.1, jnp.float32),
        abstract_lora(cfg, lora_cfg),
    )


def assert_trees_close(ours, theirs, rtol):
    """Largest difference of each leaf, relative to its largest entry."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        assert np.abs(b).max() > 0, path
        assert np.abs(a - b).max() <= rtol * np.abs(b).max(), jax.tree_util.keystr(path)


@pytest.mark.parametrize("chunk", [1, 7, 24, 512])
def test_loss_and_its_gradient_match_torch(monkeypatch, chunk):
    monkeypatch.setattr(loss_file, "CHUNK_TOKENS", chunk)
    B, T, D, V = 2, 23, 16, 97
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((B, T, D)).astype(np.float32)
    head = rng.standard_normal((V, D)).astype(np.float32)
    tokens, mask = rng.integers(0, V, (B, T)).astype(np.int32), rng.random((B, T)) < 0.5
    mask[:, 0] = True  # has nothing before it: must not count

    def ours(h):
        return next_token_loss(h, jnp.asarray(head), jnp.asarray(tokens), jnp.asarray(mask))

    (total, count), grad = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(hidden))
    h = torch.tensor(hidden, requires_grad=True)
    labels = torch.tensor(np.where(mask, tokens, -100)[:, 1:]).long()
    theirs = torch.nn.functional.cross_entropy(
        (h @ torch.tensor(head).T)[:, :-1].reshape(-1, V), labels.reshape(-1), reduction="sum"
    )
    theirs.backward()
    assert int(count) == int((labels != -100).sum())
    np.testing.assert_allclose(total, theirs.item(), rtol=1e-6)
    np.testing.assert_allclose(grad, h.grad.numpy(), atol=1e-5)


def torch_loss_and_grads(cfg, weights, lora, tokens, mask):
    """Loss and gradients of a and b by autograd through W + s b a put into transformers' Qwen2."""
    merged = {name: torch.tensor(w) for name, w in weights.items()}
    factors = {}
    for spec in param_table(cfg):
        if spec.lora_target is None:
            continue
        pair = lora.weights["layers"][spec.path[1]][spec.path[2]]
        a = torch.tensor(np.asarray(pair["a"]), requires_grad=True)
        b = torch.tensor(np.asarray(pair["b"]), requires_grad=True)
        factors[spec.path] = (a, b)
        for layer, name in enumerate(spec.torch_names()):
            merged[name] = merged[name] + lora.scale * b[layer].flatten(0, -2) @ a[layer]
    model = qwen2_model(cfg, weights)
    state = {}
    for name, w in merged.items():
        layer, _, part = name.removeprefix("transformer.h.").partition(".")
        if part.startswith("attn.c_attn."):
            kind = part.rpartition(".")[2]
            for third, letter in zip(w.chunk(3), "qkv", strict=True):
                state[f"model.layers.{layer}.self_attn.{letter}_proj.{kind}"] = third
        elif part in QWEN2_NAMES:
            state[f"model.layers.{layer}.{QWEN2_NAMES[part]}"] = w
    logits = torch.func.functional_call(model, state, (torch.tensor(tokens).long(),)).logits
    labels = torch.tensor(np.where(mask, tokens, -100)[:, 1:]).long()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
    loss.backward()
    grads = {path: {"a": a.grad.numpy(), "b": b.grad.numpy()} for path, (a, b) in factors.items()}
    return loss.item(), grads


@pytest.mark.parametrize("remat", ["none", "selective", "attention", "full", "selective:1,full:2"])
def test_lora_gradients_match_torch(remat):
    cfg = tiny_config()
    weights, lora = random_weights(cfg), random_lora(cfg)
    batch = random_batch(cfg, (1, 2, 60))
    loss, grads, _ = jitted(cfg, to_params(cfg, weights), lora, batch, remat)
    tokens, mask = np.asarray(batch["tokens"][0]), np.asarray(batch["loss_mask"][0])
    their_loss, theirs = torch_loss_and_grads(cfg, weights, lora, tokens, mask)
    np.testing.assert_allclose(loss, their_loss, rtol=1e-5)
    assert len(theirs) == 5
    for (_, part, name), pair in theirs.items():
        assert_trees_close(grads.weights["layers"][part][name], pair, rtol=1e-4)


@pytest.mark.parametrize(
    ("remat", "mesh"), [("selective", "1"), ("full", "data=2,fsdp=2,tensor=2"), ("none", "1")]
)
def test_packed_rows_train_as_rows_of_their_own_in_torch(remat, mesh):
    cfg = tiny_config(vocab_size=216)
    weights, lora, rng = random_weights(cfg), random_lora(cfg), np.random.default_rng(1)
    examples = [
        Example(rng.integers(0, cfg.vocab_size, n).astype(np.int32), rng.random(n) < 0.4)
        for n in (37, 20, 11, 30, 22, 60, 1)
    ]
    rows = pack(examples, 64)
    assert len(rows) == 3
    batch = collate(rows, batch_size=4, length=64, pad_id=5, packed=True)
    batch = {name: jnp.asarray(batch[name])[None] for name in ("tokens", "loss_mask", "segments")}
    mesh = make_mesh(parse_mesh(mesh))
    loss, grads, _ = jitted(cfg, to_params(cfg, weights), lora, batch, remat, mesh)
    apart = collate(examples, batch_size=7, length=60, pad_id=5)
    their_loss, theirs = torch_loss_and_grads(
        cfg, weights, lora, apart["tokens"], apart["loss_mask"]
    )
    np.testing.assert_allclose(loss, their_loss, rtol=1e-5)
    for (_, part, name), pair in theirs.items():
        assert_trees_close(grads.weights["layers"][part][name], pair, rtol=1e-4)


@pytest.mark.parametrize(
    ("fmt", "remat"),
    [
        pytest.param("none", "full", marks=pytest.mark.slow), ("nf4", "full"),
        ("nf4", "selective"), ("nf4", "attention:1,selective:1"),
    ],
)  # fmt: skip
def test_eight_devices_equal_one(fmt, remat):
    cfg = tiny_config(
        hidden_size=128, ffn_size=256, num_heads=4, head_dim=32, vocab_size=216, num_layers=2
    )
    params, lora = to_params(cfg, random_weights(cfg), fmt=fmt), random_lora(cfg)
    batch = random_batch(cfg, (2, 4, 48))

    def on(mesh_text, remat):
        mesh = make_mesh(parse_mesh(mesh_text))
        layout = jax.tree.map(
            lambda x: x.sharding,
            (
                abstract_params(cfg, jnp.float32, QuantFormat.named(fmt), mesh),
                abstract_lora(cfg, ALL, mesh=mesh),
            ),
        )
        placed = jax.tree.map(jax.device_put, (params, lora), layout)
        loss, grads, count = jax.device_get(jitted(cfg, *placed, batch, remat, mesh=mesh))
        return loss, grads.weights, count

    one, eight = on("1", "full"), on("data=2,fsdp=2,tensor=2", remat)
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-5)
    assert eight[2] == one[2]
    assert_trees_close(eight[1], one[1], rtol=1e-4)


def test_accumulation_and_padding_change_nothing():
    cfg = tiny_config()
    params, lora = to_params(cfg, random_weights(cfg)), random_lora(cfg)
    whole = random_batch(cfg, (1, 4, 40))
    # Very uneven: a mean of means would come out far off.
    mask = np.array(whole["loss_mask"])
    mask[0, 1:, 3:] = False
    whole["loss_mask"] = jnp.asarray(mask)
    cut = {name: x.reshape(4, 1, 40) for name, x in whole.items()}
    padded = {name: jnp.pad(x, ((0, 2), (0, 0), (0, 24))) for name, x in cut.items()}
    loss, grads, count = jitted(cfg, params, lora, whole)
    for other in (cut, padded):
        loss2, grads2, count2 = jitted(cfg, params, lora, other)
        assert count2 == count
        np.testing.assert_allclose(loss2, loss, rtol=1e-5)
        assert_trees_close(grads2, grads, rtol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedule_matches_transformers(kind, warmup):
    if kind == "constant" and warmup:
        with pytest.raises(InputError, match="constant_with_warmup"):
            make_schedule(kind, 1e-4, 40, warmup)
        return
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    scheduler = transformers.get_scheduler(kind, optimizer, warmup, 40)
    ours = make_schedule(kind, 1e-4, 40, warmup)
    for step in range(41):
        np.testing.assert_allclose(ours(step), scheduler.get_last_lr()[0], rtol=1e-5, atol=1e-11)
        optimizer.step()
        scheduler.step()


def test_schedule_name_is_checked():
    with pytest.raises(InputError, match="did you mean 'cosine'"):
        make_schedule("cosin", 1e-4, 10)


def test_optimizer_matches_torch():
    """Clipping and AdamW with weight decay for five steps, gradients well over the norm."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((5, 3)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(w))
    torch_opt = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    scheduler = transformers.get_scheduler("linear", torch_opt, 2, 5)
    optimizer = make_optimizer(make_schedule("linear", 0.01, 5, 2), weight_decay=0.1)
    ours, moments = jnp.asarray(w), optimizer.init(jnp.asarray(w))
    for _ in range(5):
        g = rng.standard_normal((5, 3)).astype(np.float32) * 3
        updates, moments = optimizer.update(jnp.asarray(g), moments, ours)
        ours = ours + updates
        theirs.grad = torch.tensor(g)
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        torch_opt.step()
        scheduler.step()
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-6)


def test_compiled_step_learns_and_compiles_once():
    cfg = tiny_config()
    mesh = make_mesh(parse_mesh("data=2,fsdp=2,tensor=2"))
    abstract = abstract_params(cfg, jnp.float32, None, mesh)
    params = jax.tree.map(
        lambda x, y: jax.device_put(x, y.sharding), to_params(cfg, random_weights(cfg)), abstract
    )
    schedule = make_schedule("constant", 1e-2, 6)
    optimizer = make_optimizer(schedule)
    state = init_state(optimizer, init_lora(cfg, ALL, jax.random.key(0), mesh), mesh)
    moment = state.opt_state[1][0].mu.weights["layers"]["mlp"]["up"]["b"]
    assert moment.sharding == state.lora.weights["layers"]["mlp"]["up"]["b"].sharding
    compute = Compute(remat=Remat.parse("full", cfg.num_layers), mesh=mesh)
    step = compile_step(cfg, optimizer, schedule, state, params, compute)
    batch, losses = random_batch(cfg, (2, 4, 32)), []
    for _ in range(6):
        old = state
        state, metrics = step(state, params, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1 and int(state.step) == 6
    assert step._cache_size() == 1
    assert old.lora.weights["layers"]["mlp"]["up"]["b"].is_deleted()  # donated
    trained = int(batch["loss_mask"][:, :, 1:].sum())
    assert int(metrics["tokens"]) == trained and float(metrics["lr"]) == pytest.approx(1e-2)


@pytest.mark.parametrize(
    "targets, expected", [(("c_attn", "w1", "w2"), 62_914_560), (("all",), 94_371_840)]
)
def test_72b_trains_the_published_number_of_parameters(targets, expected):
    cfg = ModelConfig.from_hf(json.loads((CONFIGS / "qwen_72b.json").read_text()))
    lora_cfg = LoraConfig(rank=8, targets=targets)
    assert sum(c.trainable for c in count_trainable(cfg, lora_cfg)) == expected
    assert f"trainable {expected:,} of" in describe_trainable(cfg, lora_cfg)
    leaves = jax.tree.leaves(abstract_lora(cfg, lora_cfg))
    assert sum(leaf.size for leaf in leaves) == expected


def test_misspelt_target_is_an_error_with_the_right_name():
    with pytest.raises(InputError, match=r"'attn.cproj'.*did you mean 'attn.c_proj'"):
        count_trainable(tiny_config(), LoraConfig(targets=("c_attn", "attn.cproj")))
    with pytest.raises(InputError, match=r"'q_proj'.*this model calls it 'c_attn'"):
        count_trainable(tiny_config(), LoraConfig(targets=("q_proj", "v_proj")))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A tiny converted checkpoint and a dataset of 10 rows."""
    folder = tmp_path_factory.mktemp("train")
    write_tiny_checkpoint(folder / "hf", hidden_size=64, num_layers=2)
    hf_to_flax.convert(folder / "hf", folder / "ckpt", dtype="float32")
    rows = [
        {"instruction": f"What is {i} + {i}?", "output": f"It is {2 * i}. " + "Yes. " * (i % 4)}
        for i in range(10)
    ]
    (folder / "dataset_info.json").write_text('{"sums": {"file_name": "sums.json"}}')
    (folder / "sums.json").write_text(json.dumps(rows))
    return folder


def flags(folder, output, *more):
    return [
        "--model_name_or_path", str(folder / "ckpt"), "--dataset", "sums",
        "--dataset_dir", str(folder), "--output_dir", str(output), "--lora_rank", "4",
        "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2",
        "--learning_rate", "1e-2", "--lr_scheduler_type", "cosine", "--warmup_steps", "2",
        "--max_steps", "6", "--logging_steps", "1", "--cutoff_len", "64", *more,
    ]  # fmt: skip


def adapter_bytes(folder):
    # Not the file: safetensors writes its metadata in no fixed order.
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    return {name: tensor.tobytes() for name, tensor in tensors.items()}


def test_interrupted_and_resumed_run_is_the_same_to_the_bit(run_folder, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    program.main(flags(run_folder, whole, "--save_steps", "3"))
    add = Report.add

    def interrupt_at_3(self, step, *rest):
        add(self, step, *rest)
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Report, "add", interrupt_at_3)
        with pytest.raises(KeyboardInterrupt):
            program.main(flags(run_folder, parts, "--save_strategy", "no"))
    assert (parts / "checkpoint-3" / "adapter_model.safetensors").is_file()
    assert not (parts / "adapter_config.json").exists()
    program.main(flags(run_folder, parts, "--save_strategy", "no"))
    one, two, saved = (adapter_bytes(f) for f in (whole, parts, whole / "checkpoint-6"))
    assert one == two == saved and len(one) == 20
    assert one != adapter_bytes(parts / "checkpoint-3")
    logs = [
        [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
        for folder in (whole, parts)
    ]
    losses = [[(row["step"], row["loss"], row["lr"]) for row in log] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert losses[0][-1][1] < losses[0][0][1]


def test_a_run_whose_plan_moves_the_embedding_to_the_host_learns_the_same(
    run_folder, tmp_path, capsys
):
    work = Workload(
        cfg=load_manifest(run_folder / "ckpt").config, format=None, dtype=jnp.dtype(jnp.float32),
        lora=LoraConfig(rank=4), sizes=parse_mesh("1"), rows=2, length=64, accumulation=2,
    )  # fmt: skip
    # All of it on the device leaves no room for what layers keep; the embedding is 39 MB of that.
    limit = work.budget(Remat.parse("full", 2)).total
    losses = []
    for remat, offloaded in (("selective", False), ("auto", True)):
        folder = tmp_path / remat
        more = ["--remat", remat, "--max_steps", "4", "--save_strategy", "no"]
        more += ["--device_memory", f"{limit / 1e9 if offloaded else 1}"]
        program.main(flags(run_folder, folder, *more))
        shown = capsys.readouterr().out
        assert "backward pass, selective" in shown
        assert ("the embedding stays in host memory, which makes room" in shown) == offloaded
        log = (folder / "trainer_log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in log])
    assert len(losses[0]) == 4 and losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


def test_settings_that_cannot_be_resumed_or_overwritten(run_folder, tmp_path, capsys):
    output = tmp_path / "out"
    short = ["--max_steps", "2", "--save_steps", "1"]
    program.main(flags(run_folder, output, *short))
    with pytest.raises(InputError, match="finished adapter"):
        program.main(flags(run_folder, output, *short))
    (output / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"another run \(seed 42 -> 7\)"):
        program.main(flags(run_folder, output, *short, "--seed", "7"))
    rows = json.loads((run_folder / "sums.json").read_text())
    rows[3]["output"] = rows[3]["output"].replace("6", "7")
    (tmp_path / "sums.json").write_text(json.dumps(rows))
    shutil.copy(run_folder / "dataset_info.json", tmp_path)
    with pytest.raises(InputError, match=r'another run \(data "\w{12}... -> "\w{12}...\); use'):
        program.main(flags(run_folder, output, *short, "--dataset_dir", str(tmp_path)))
    files = (output / "checkpoint-2" / "state").rglob("*")
    largest = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(InputError, match=f"damaged: .*{largest.name} is not as written"):
        program.main(flags(run_folder, output, *short))
    shutil.rmtree(output / "checkpoint-2" / "state")  # no longer complete: not the newest
    program.main(flags(run_folder, output, *short))
    assert f"resuming from {output / 'checkpoint-1'}" in capsys.readouterr().out
    anew = ["--overwrite_output_dir", "--save_strategy", "epoch"]
    program.main(flags(run_folder, output, *short, *anew))
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("flag", ["--packing", "--neat_packing"])
def test_a_packed_run_takes_fewer_rows_and_learns(run_folder, tmp_path, capsys, flag):
    output, more = tmp_path / "out", ["--cutoff_len", "128", "--max_steps", "4"]
    program.main(flags(run_folder, output, *more, flag, "--save_steps", "2"))
    shown = capsys.readouterr().out
    (line,) = (line for line in shown.splitlines() if line.startswith("packed: "))
    assert re.fullmatch(r"packed: 10 examples in [345] rows of up to 1\d\d tokens, .*% full", line)
    assert "1 an epoch" in shown  # 4 rows a step
    log = [json.loads(x) for x in (output / "trainer_log.jsonl").read_text().splitlines()]
    assert len(log) == 4 and log[-1]["loss"] < log[0]["loss"]
    (output / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"another run \(.*packing true -> null"):
        program.main(flags(run_folder, output, *more))


def test_qlora_on_a_mesh_with_the_published_flags(run_folder, tmp_path, capsys):
    program.main(
        flags(
            run_folder, tmp_path / "out", "--stage", "sft", "--do_train", "--overwrite_cache",
            "--finetuning_type", "lora", "--template", "qwen", "--overwrite_output_dir",
            "--lora_target", "c_attn,attn.c_proj,w1,w2,mlp.c_proj", "--bf16",
            "--save_strategy", "epoch", "--quantization_bit", "4", "--max_steps", "1",
            "--mesh", "data=2,fsdp=2,tensor=2",
        )
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "quantizing the base to nf4" in out
    assert "mesh data=2,fsdp=2,tensor=2" in out and "16 rows" in out
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def test_quantization_in_memory_is_that_of_the_format():
    cfg = tiny_config()
    weights = random_weights(cfg)
    mesh = make_mesh(parse_mesh("1"))
    fmt = QuantFormat.named("nf4")
    ours = quantize_params(cfg, to_params(cfg, weights), fmt, mesh)
    expected = to_params(cfg, weights, fmt="nf4")
    assert isinstance(ours["layers"]["mlp"]["up"], QTensor)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--stage", "dpo"], "--stage dpo: only sft"),
        (["--finetuning_type", "full"], "only lora"),
        (["--template", "llama2"], "only qwen or chatml or default"),
        (["--fp16"], "use --bf16"),
        (["--quantization_bit", "3"], "only 4 or 8"),
        (["--lora_target", "c_attn,attn.cproj"], "did you mean 'attn.c_proj'"),
        (["--logging_steps", "0"], "expected a number 1 or more"),
        (["--resume_from_checkpoint", "nowhere/checkpoint-1"], "not a complete checkpoint"),
    ],
)
def test_wrong_flags_are_one_line_before_any_work(run_folder, tmp_path, more, message):
    with pytest.raises(InputError, match=message) as error:
        program.main(flags(run_folder, tmp_path / "out", *more))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_stored_quantization_must_fit_the_flag(run_folder, tmp_path):
    hf_to_flax.convert(run_folder / "hf", tmp_path / "int8", fmt=QuantFormat.named("int8"))
    argv = flags(run_folder, tmp_path / "out", "--quantization_bit", "4")
    argv[1] = str(tmp_path / "int8")
    with pytest.raises(InputError, match="stored as int8 already"):
        program.main(argv)
    argv[-1] = "8"
    program.main([*argv, "--max_steps", "1"])
