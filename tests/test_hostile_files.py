"""Property: whatever stands in a file from outside, reading it ends well or in one clear line.

No other exception, no hang, no memory taken on the file's word, nothing written outside of the
output folder. The slow tests try 10,000 cases in all, the fast ones a few hundred.
"""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from gptq_folder import write_gptq_checkpoint
from hostile import (
    mutated_bytes,
    mutated_json,
    mutated_shard,
    number_of_cases,
    split_shard,
    watched,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from convert import hf_to_flax
from convert.gptq import read_gptq
from convert.hf_to_flax import hf_parts, open_weights
from demo.tiny_checkpoint import write_tiny_checkpoint
from qwen_jax.adapters import LoraConfig, init_lora, load_peft, save_peft
from qwen_jax.checkpoint_writer import CheckpointWriter
from qwen_jax.config import load_hf_config

SHARD = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def read_everything(folder: pathlib.Path) -> None:
    """A conversion up to the writing: every header parsed, every tensor read and stored."""
    cfg, gptq = load_hf_config(folder), read_gptq(folder)
    weights = open_weights(folder, cfg, gptq)
    fmt = gptq and gptq.fmt
    parts, _ = hf_parts(weights, cfg, np.dtype("bfloat16"), fmt, gptq)
    writer = CheckpointWriter(folder / "out", cfg, "bfloat16", fmt)
    for part in parts:
        shapes = writer.array_shapes(part.spec, part.index)
        arrays = {name: np.empty(shape, dtype) for name, (shape, dtype) in shapes.items()}
        for block in part.blocks:
            part.fill(block, arrays)
        part.finish(arrays)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "hf"
    return write_tiny_checkpoint(folder, hidden_size=16, kv_channels=4, ffn=16, vocab_size=20,
                                 shards=2, tokenizer=False)  # fmt: skip


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "hf"
    write_gptq_checkpoint(folder, 4, num_layers=1, ffn=128, vocab_size=20)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, plain):
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    cfg, lora_cfg = load_hf_config(plain), LoraConfig(rank=2, targets=("c_attn", "w2"))
    import jax

    lora = init_lora(cfg, lora_cfg, jax.random.key(0))
    save_peft(folder, cfg, lora_cfg, lora, base_name="x", fingerprint="f" * 64)
    return folder


def trying(cases: int, *phases: Phase):
    """Seeded, unhurried, and with no memory of other runs."""
    return settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=phases,
    )


def try_all(cases: int, folder: pathlib.Path, name: str, make, read) -> int:
    """Writes `cases` variants of the file `name` made by `make(draw)`, and reads each.

    Returns how many were refused: a fuzzer whose files all pass has missed the parser.
    """
    original = (folder / name).read_bytes()
    refused: list[str] = []

    @trying(cases, Phase.generate, Phase.shrink)
    @given(st.data())
    def case(data):
        (folder / name).write_bytes(make(data.draw))
        with watched(folder / "out") as line:
            read()
        refused.extend(line)
        assert not (folder / "out").exists()

    read()  # the original is fine
    try:
        case()
    finally:
        (folder / name).write_bytes(original)
    return len(refused)


@number_of_cases(60, 2000)
def test_safetensors_headers(plain, cases):
    header, data = split_shard(plain / SHARD)
    make = lambda draw: mutated_shard(draw, header, data)  # noqa: E731
    refused = try_all(cases, plain, SHARD, make, lambda: read_everything(plain))
    assert refused > cases // 4


@number_of_cases(40, 1200)
def test_index(plain, cases):
    index = json.loads((plain / INDEX).read_text())
    make = lambda draw: mutated_json(draw, index)  # noqa: E731
    refused = try_all(cases, plain, INDEX, make, lambda: read_everything(plain))
    assert refused > cases // 4


@number_of_cases(60, 1800)
def test_config(plain, cases):
    config = json.loads((plain / "config.json").read_text())
    make = lambda draw: mutated_json(draw, config)  # noqa: E731
    refused = try_all(cases, plain, "config.json", make, lambda: read_everything(plain))
    assert refused > cases // 4


@number_of_cases(30, 900)
@pytest.mark.parametrize("name", ["quantize_config.json", "config.json"])
def test_quantization_configs(quantized, name, cases):
    config = json.loads((quantized / name).read_text())
    make = lambda draw: mutated_json(draw, config)  # noqa: E731
    refused = try_all(cases, quantized, name, make, lambda: read_everything(quantized))
    assert refused > cases // 4


@number_of_cases(30, 1000)
def test_gptq_tensors(quantized, cases):
    header, data = split_shard(quantized / "model.safetensors")
    make = lambda draw: mutated_shard(draw, header, data)  # noqa: E731
    refused = try_all(
        cases, quantized, "model.safetensors", make, lambda: read_everything(quantized)
    )
    assert refused > cases // 4


@number_of_cases(50, 1000)
def test_adapter_config(plain, adapter, cases):
    cfg = load_hf_config(plain)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"rank_pattern": {"w2": 2}, "alpha_pattern": {"w2": 3}, "layers_to_transform": [0, 1]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    make = lambda draw: mutated_json(draw, config)  # noqa: E731
    refused = try_all(cases, adapter, "adapter_config.json", make, lambda: load_peft(adapter, cfg))
    assert refused > cases // 4


@number_of_cases(50, 1000)
def test_adapter_weights(plain, adapter, cases):
    cfg = load_hf_config(plain)
    header, data = split_shard(adapter / "adapter_model.safetensors")
    make = lambda draw: mutated_shard(draw, header, data)  # noqa: E731
    name = "adapter_model.safetensors"
    refused = try_all(
        cases, adapter, name, make, lambda: load_peft(adapter, cfg, fingerprint="f" * 64)
    )
    assert refused > cases // 4


@number_of_cases(8, 200)
def test_whole_conversions_write_only_their_output(plain, tmp_path, cases):
    """The program itself, on folders of which any file may be wrong."""
    config = json.loads((plain / "config.json").read_text())
    header, data = split_shard(plain / SHARD)
    makers = {
        "config.json": lambda draw: mutated_json(draw, config),
        SHARD: lambda draw: mutated_shard(draw, header, data),
        "generation_config.json": lambda draw: mutated_bytes(draw, b"{}"),
    }

    @trying(cases, Phase.generate)
    @given(st.data())
    def case(data):
        for used in tmp_path.iterdir():
            shutil.rmtree(used)
        source = tmp_path / "hf"
        shutil.copytree(plain, source)
        name = data.draw(st.sampled_from(sorted(makers)))
        (source / name).write_bytes(makers[name](data.draw))
        before = {path: path.read_bytes() for path in source.iterdir()}
        (tmp_path / "place").mkdir()
        with watched(tmp_path / "place"):
            hf_to_flax.convert(source, tmp_path / "place" / "ck")
        assert {path: path.read_bytes() for path in source.iterdir()} == before
        assert sorted(os.listdir(tmp_path)) == ["hf", "place"]

    case()
